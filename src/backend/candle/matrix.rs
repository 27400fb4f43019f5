//! Matrices as candle computes with them.

use std::sync::Arc;

use candle_core::quantized::{QMatMul, QStorage, QTensor};
use candle_core::{DType, Device, Module, Tensor};
use metal_ext::MetalExtOptions;

use super::attention::Softmax;
use crate::device::{Cpu, OpenDevice};
use crate::error::Result;
use crate::kernels::input::Input;
use crate::kernels::matrix::{self, Product};
use crate::model::stage_weights::Build;
#[cfg(all(feature = "metal", target_os = "macos"))]
use crate::weights::MappedTensor;
use crate::weights::{TensorBytes, WeightType};

/// Candle's half of loading: tensors on a device.
pub struct CandleBuild {
    /// Where they go.
    pub device: Device,
    /// The threads of a CPU device.
    pub cpu: Option<Cpu>,
    /// Type of the activations, which norms and biases have.
    pub dtype: DType,
    /// The kernels of an Apple GPU.
    #[cfg(all(feature = "metal", target_os = "macos"))]
    pub metal: Option<super::metal_matrix::Kernels>,
}

impl CandleBuild {
    /// For a device, the type of its activations, and how metal-ext's kernels are used if it is an Apple GPU.
    pub fn new(device: &OpenDevice, dtype: DType, metal: MetalExtOptions) -> Self {
        #[cfg(not(all(feature = "metal", target_os = "macos")))]
        let _ = metal;
        CandleBuild {
            device: device.device.clone(),
            cpu: device.cpu.clone(),
            dtype,
            #[cfg(all(feature = "metal", target_os = "macos"))]
            metal: super::metal_matrix::Kernels::of(&device.device, metal),
        }
    }

    /// The softmax of this device's attention.
    pub fn softmax(&self) -> Softmax {
        #[cfg(all(feature = "metal", target_os = "macos"))]
        if let Some(kernels) = self.metal.as_ref().filter(|kernels| kernels.has_softmax()) {
            return Softmax::Metal(kernels.clone());
        }
        Softmax::Candle
    }
}

impl Build for CandleBuild {
    type Matrix = DeviceMatrix;
    type Vector = Tensor;

    #[cfg(all(feature = "metal", target_os = "macos"))]
    const READS_IN_PLACE: bool = true;

    fn matrix(&self, dtype: WeightType, bytes: &TensorBytes<'_>, n: usize, k: usize) -> Result<Option<DeviceMatrix>> {
        if let Some(cpu) = &self.cpu {
            let packed = cpu.matrix(dtype, bytes, n, k)?;
            return Ok(packed.map(|matrix| DeviceMatrix::Packed { matrix, cpu: cpu.clone() }));
        }
        let bytes = &*bytes.read()?;
        #[cfg(all(feature = "metal", target_os = "macos"))]
        if let Some(kernels) = &self.metal
            && let Some(matrix) = kernels.pack(dtype, bytes, n, k)?
        {
            return Ok(Some(DeviceMatrix::Metal(matrix)));
        }
        let dense = match dtype {
            WeightType::F32 => DType::F32,
            WeightType::F16 => DType::F16,
            WeightType::BF16 => DType::BF16,
            quantised => {
                let storage = QStorage::from_data(bytes.into(), &self.device, quantised.ggml())?;
                let tensor = Arc::new(QTensor::new(storage, (n, k))?);
                return Ok(Some(DeviceMatrix::Quantised { matmul: QMatMul::from_arc(tensor.clone())?, tensor }));
            }
        };
        Ok(Some(DeviceMatrix::Dense(Tensor::from_raw_buffer(bytes, dense, &[n, k], &self.device)?)))
    }

    #[cfg(all(feature = "metal", target_os = "macos"))]
    fn mapped_matrix(
        &self,
        dtype: WeightType,
        stored: &MappedTensor,
        n: usize,
        k: usize,
    ) -> Result<Option<DeviceMatrix>> {
        match &self.metal {
            Some(kernels) => Ok(kernels.map(dtype, stored, n, k)?.map(DeviceMatrix::Metal)),
            None => Ok(None),
        }
    }

    fn vector(&self, values: Vec<f32>) -> Result<Tensor> {
        let n = values.len();
        Ok(Tensor::from_vec(values, n, &self.device)?.to_dtype(self.dtype)?)
    }

    fn matrix_bytes(matrix: &DeviceMatrix) -> u64 {
        match matrix {
            DeviceMatrix::Packed { matrix, .. } => matrix.bytes(),
            DeviceMatrix::Dense(tensor) => Self::vector_bytes(tensor),
            DeviceMatrix::Quantised { tensor, .. } => tensor.storage_size_in_bytes() as u64,
            #[cfg(all(feature = "metal", target_os = "macos"))]
            DeviceMatrix::Metal(matrix) => matrix.bytes(),
        }
    }

    fn vector_bytes(tensor: &Tensor) -> u64 {
        (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64
    }
}

/// A matrix of `n` rows by `k` columns where the stage runs.
pub enum DeviceMatrix {
    /// On a CPU, any type.
    Packed {
        /// The rows.
        matrix: matrix::Matrix,
        /// What multiplies them.
        cpu: Cpu,
    },
    /// On a GPU: F32, F16 or BF16, (n, k).
    Dense(Tensor),
    /// On a GPU: quantised.
    Quantised {
        /// Its product.
        matmul: QMatMul,
        /// For looking rows up.
        tensor: Arc<QTensor>,
    },
    /// On an Apple GPU, in a format of metal-ext's kernels.
    #[cfg(all(feature = "metal", target_os = "macos"))]
    Metal(super::metal_matrix::MetalMatrix),
}

impl DeviceMatrix {
    /// `x`: (rows, k) -> (rows, n), in x's type.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            DeviceMatrix::Packed { matrix, cpu } => {
                let values = x.flatten_all()?.to_vec1::<f32>()?;
                let rows = values.len() / matrix.columns();
                let mut input = Input::default();
                input.reset(rows, 0, matrix.columns()).copy_from_slice(&values);
                input.prepare(&cpu.pool, cpu.isa, std::iter::once(matrix.dtype()));
                let mut out = vec![0f32; rows * matrix.rows()];
                matrix::multiply(&cpu.pool, cpu.isa, &input, &mut [Product { matrix, out: &mut out }]);
                Ok(Tensor::from_vec(out, (rows, matrix.rows()), &Device::Cpu)?)
            }
            DeviceMatrix::Dense(weight) => Ok(x.to_dtype(weight.dtype())?.matmul(&weight.t()?)?.to_dtype(x.dtype())?),
            #[cfg(all(feature = "metal", target_os = "macos"))]
            DeviceMatrix::Metal(matrix) => matrix.forward(x),
            // Candle's Metal kernel for several rows ignores where a view starts, so views are copied.
            DeviceMatrix::Quantised { matmul, .. } => {
                let x = if x.layout().start_offset() == 0 { x.contiguous()? } else { x.force_contiguous()? };
                Ok(matmul.forward(&x.to_dtype(DType::F32)?)?.to_dtype(x.dtype())?)
            }
        }
    }

    /// The rows of `tokens`, all of which it has: (tokens, k), in `dtype`.
    pub fn look_up(&self, tokens: &[u32], device: &Device, dtype: DType) -> Result<Tensor> {
        let table = match self {
            DeviceMatrix::Packed { matrix, .. } => {
                let k = matrix.columns();
                let mut out = vec![0f32; tokens.len() * k];
                for (&token, out) in tokens.iter().zip(out.chunks_exact_mut(k)) {
                    matrix.widen_row(token as usize, out);
                }
                return Ok(Tensor::from_vec(out, (tokens.len(), k), &Device::Cpu)?);
            }
            #[cfg(all(feature = "metal", target_os = "macos"))]
            DeviceMatrix::Metal(table) => table.look_up(tokens)?,
            DeviceMatrix::Dense(table) => table.index_select(&Tensor::new(tokens, device)?, 0)?,
            DeviceMatrix::Quantised { tensor, .. } => tensor.embedding(&Tensor::new(tokens, device)?)?,
        };
        Ok(table.to_dtype(dtype)?)
    }
}
