//! Matrices as candle computes with them.

use std::sync::Arc;

use candle_core::quantized::{QMatMul, QStorage, QTensor};
use candle_core::{DType, Device, Module, Tensor};
use metal_ext::MetalExtOptions;

use super::attention::Softmax;
use super::stage_weights::{Build, Linear};
use crate::device::{Cpu, OpenDevice};
use crate::error::{Error, Result};
use crate::kernels::input::Input;
use crate::kernels::matrix::{self, Product};
use crate::kernels::pool::Pool;
#[cfg(all(feature = "metal", target_os = "macos"))]
use crate::weights::MappedTensor;
use crate::weights::{TensorBytes, WeightType};

/// Packs the `n` by `k` matrix of these bytes for a CPU; `None` when they are not one.
pub fn pack(
    pool: &Pool,
    dtype: WeightType,
    bytes: &TensorBytes<'_>,
    n: usize,
    k: usize,
) -> Result<Option<matrix::Matrix>> {
    if dtype.bytes_for(k).and_then(|row| n.checked_mul(row)) != Some(bytes.len()) {
        return Ok(None);
    }
    bytes.prefetch();
    matrix::Matrix::pack_from(pool, dtype, n, k, |at, into| bytes.read_at(at, into)).transpose()
}

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
    type Matrix = Matrix;
    type Vector = Tensor;

    #[cfg(all(feature = "metal", target_os = "macos"))]
    const READS_IN_PLACE: bool = true;

    fn matrix(&self, dtype: WeightType, bytes: &TensorBytes<'_>, n: usize, k: usize) -> Result<Option<Matrix>> {
        if let Some(cpu) = &self.cpu {
            let packed = pack(&cpu.pool, dtype, bytes, n, k)?;
            return Ok(packed.map(|matrix| Matrix::Packed { matrix, cpu: cpu.clone() }));
        }
        let bytes = &*bytes.read()?;
        #[cfg(all(feature = "metal", target_os = "macos"))]
        if let Some(kernels) = &self.metal
            && let Some(matrix) = kernels.pack(dtype, bytes, n, k)?
        {
            return Ok(Some(Matrix::Metal(matrix)));
        }
        let dense = match dtype {
            WeightType::F32 => DType::F32,
            WeightType::F16 => DType::F16,
            WeightType::BF16 => DType::BF16,
            quantised => {
                let storage = QStorage::from_data(bytes.into(), &self.device, quantised.ggml())?;
                let tensor = Arc::new(QTensor::new(storage, (n, k))?);
                return Ok(Some(Matrix::Quantised { matmul: QMatMul::from_arc(tensor.clone())?, tensor }));
            }
        };
        Ok(Some(Matrix::Dense(Tensor::from_raw_buffer(bytes, dense, &[n, k], &self.device)?)))
    }

    #[cfg(all(feature = "metal", target_os = "macos"))]
    fn mapped_matrix(&self, dtype: WeightType, stored: &MappedTensor, n: usize, k: usize) -> Result<Option<Matrix>> {
        match &self.metal {
            Some(kernels) => Ok(kernels.map(dtype, stored, n, k)?.map(Matrix::Metal)),
            None => Ok(None),
        }
    }

    fn vector(&self, values: Vec<f32>) -> Result<Tensor> {
        let n = values.len();
        Ok(Tensor::from_vec(values, n, &self.device)?.to_dtype(self.dtype)?)
    }

    fn matrix_bytes(matrix: &Matrix) -> u64 {
        match matrix {
            Matrix::Packed { matrix, .. } => matrix.bytes(),
            Matrix::Dense(tensor) => Self::vector_bytes(tensor),
            Matrix::Quantised { tensor, .. } => tensor.storage_size_in_bytes() as u64,
            #[cfg(all(feature = "metal", target_os = "macos"))]
            Matrix::Metal(matrix) => matrix.bytes(),
        }
    }

    fn vector_bytes(tensor: &Tensor) -> u64 {
        (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64
    }
}

/// A matrix of `n` rows by `k` columns where the stage runs.
pub enum Matrix {
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

impl Matrix {
    /// `x`: (rows, k) -> (rows, n), in x's type.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Matrix::Packed { matrix, cpu } => {
                let values = x.flatten_all()?.to_vec1::<f32>()?;
                let rows = values.len() / matrix.columns();
                let mut input = Input::default();
                input.reset(rows, 0, matrix.columns()).copy_from_slice(&values);
                input.prepare(&cpu.pool, cpu.isa, std::iter::once(matrix.dtype()));
                let mut out = vec![0f32; rows * matrix.rows()];
                matrix::multiply(&cpu.pool, cpu.isa, &input, &mut [Product { matrix, out: &mut out }]);
                Ok(Tensor::from_vec(out, (rows, matrix.rows()), &Device::Cpu)?)
            }
            Matrix::Dense(weight) => Ok(x.to_dtype(weight.dtype())?.matmul(&weight.t()?)?.to_dtype(x.dtype())?),
            #[cfg(all(feature = "metal", target_os = "macos"))]
            Matrix::Metal(matrix) => matrix.forward(x),
            // Candle's Metal kernel for several rows ignores where a view starts, so views are copied.
            Matrix::Quantised { matmul, .. } => {
                let x = if x.layout().start_offset() == 0 { x.contiguous()? } else { x.force_contiguous()? };
                Ok(matmul.forward(&x.to_dtype(DType::F32)?)?.to_dtype(x.dtype())?)
            }
        }
    }

    /// The rows of `tokens`: (tokens, k), in `dtype`.
    pub fn look_up(&self, tokens: &[u32], device: &Device, dtype: DType) -> Result<Tensor> {
        let table = match self {
            Matrix::Packed { matrix, .. } => {
                let k = matrix.columns();
                let mut out = vec![0f32; tokens.len() * k];
                for (&token, out) in tokens.iter().zip(out.chunks_exact_mut(k)) {
                    check_token(token, matrix.rows())?;
                    matrix.widen_row(token as usize, out);
                }
                return Ok(Tensor::from_vec(out, (tokens.len(), k), &Device::Cpu)?);
            }
            #[cfg(all(feature = "metal", target_os = "macos"))]
            Matrix::Metal(table) => table.look_up(tokens)?,
            Matrix::Dense(table) => table.index_select(&Tensor::new(tokens, device)?, 0)?,
            Matrix::Quantised { tensor, .. } => tensor.embedding(&Tensor::new(tokens, device)?)?,
        };
        Ok(table.to_dtype(dtype)?)
    }
}

/// Refuses a token that the embedding table of `rows` rows does not have.
pub fn check_token(token: u32, rows: usize) -> Result<()> {
    match (token as usize) < rows {
        true => Ok(()),
        false => Err(Error::Tensors(format!("token {token} is outside the {rows} rows of the embeddings"))),
    }
}

impl Linear<CandleBuild> {
    /// `x`: (rows, k) -> (rows, n).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let out = self.matrix.forward(x)?;
        match &self.bias {
            Some(bias) => Ok(out.broadcast_add(bias)?),
            None => Ok(out),
        }
    }
}
