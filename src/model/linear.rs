//! Weights as a device holds them: matrices for the projections, the embedding table, and norm weights.

use std::sync::Arc;

use candle_core::quantized::{QMatMul, QStorage, QTensor};
use candle_core::{DType, Device, Module, Tensor};

use crate::error::{Error, Result};
use crate::kernels::{self, Rows};
use crate::weights::{StoredTensor, WeightSource, WeightType};

/// Reads tensors of one model onto one device.
pub struct Loader<'a> {
    /// Where the bytes come from.
    pub source: &'a dyn WeightSource,
    /// Where they go.
    pub device: &'a Device,
    /// F32, F16 and BF16 matrices become this type; `None` leaves them as stored.
    pub dense_type: Option<WeightType>,
    /// Type of the activations, which norms and biases have.
    pub activation_dtype: DType,
}

impl Loader<'_> {
    /// The matrix `name` with its bias, `n` rows by `k` columns. `bias` says whether there must be one; `None` takes
    /// what the file has.
    pub fn linear(&self, name: &str, n: usize, k: usize, bias: Option<bool>) -> Result<Linear> {
        self.linear_rows(name, n, 0, n, k, bias)
    }

    /// Rows `start..start + n` of a matrix of `total` rows, for projections that a file stores as one.
    pub fn linear_rows(
        &self,
        name: &str,
        total: usize,
        start: usize,
        n: usize,
        k: usize,
        bias: Option<bool>,
    ) -> Result<Linear> {
        let weight_name = format!("{name}.weight");
        let matrix = self.matrix(&weight_name, total, start, n, k)?;
        let bias_name = format!("{name}.bias");
        let has_bias = match bias {
            Some(needed) => needed,
            None => self.source.meta(&bias_name)?.is_some(),
        };
        let bias = match has_bias {
            true => Some(self.vector(&bias_name, total, 0.0)?.narrow(0, start, n)?.force_contiguous()?),
            false => None,
        };
        Ok(Linear { matrix: Arc::new(matrix), bias })
    }

    /// The embedding table, or the head tied to it.
    pub fn table(&self, name: &str, n: usize, k: usize) -> Result<Arc<Matrix>> {
        Ok(Arc::new(self.matrix(name, n, 0, n, k)?))
    }

    /// A one-dimensional weight of `n` values, plus `offset`, in the activations' type.
    pub fn vector(&self, name: &str, n: usize, offset: f32) -> Result<Tensor> {
        let stored = self.source.tensor(name)?;
        self.check_shape(name, &stored, &[n])?;
        let values = widen(&stored).ok_or_else(|| self.wrong(name, "its bytes do not match its shape".into()))?;
        self.source.release(name);
        let values: Vec<f32> = values.into_iter().map(|v| v + offset).collect();
        Ok(Tensor::from_vec(values, n, self.device)?.to_dtype(self.activation_dtype)?)
    }

    fn matrix(&self, name: &str, total: usize, start: usize, n: usize, k: usize) -> Result<Matrix> {
        let stored = self.source.tensor(name)?;
        self.check_shape(name, &stored, &[total, k])?;
        let dtype = stored.meta.dtype;
        let row_bytes = dtype
            .bytes_for(k)
            .ok_or_else(|| self.wrong(name, format!("rows of {k} values are no whole blocks of {dtype}")))?;
        let bytes = &stored.bytes[start * row_bytes..(start + n) * row_bytes];
        let matrix = match self.dense_type {
            Some(wanted) if dtype.is_dense() && wanted != dtype => {
                // A few rows at a time, so that the f32 values are never all in memory.
                let mut converted = Vec::with_capacity(wanted.bytes_for(n * k).unwrap_or(0));
                for bytes in bytes.chunks(row_bytes * 256) {
                    let part = StoredTensor { meta: stored.meta.clone(), bytes };
                    let wide =
                        widen(&part).ok_or_else(|| self.wrong(name, "its bytes do not match its shape".into()))?;
                    converted.extend(narrow(&wide, wanted));
                }
                self.upload(name, wanted, &converted, n, k)?
            }
            _ => self.upload(name, dtype, bytes, n, k)?,
        };
        self.source.release(name);
        Ok(matrix)
    }

    fn upload(&self, name: &str, dtype: WeightType, bytes: &[u8], n: usize, k: usize) -> Result<Matrix> {
        if self.device.is_cpu() {
            let rows = kernels::rows_from_bytes(dtype, bytes, n, k)
                .ok_or_else(|| self.wrong(name, format!("{} bytes are no {n} by {k} {dtype} matrix", bytes.len())))?;
            return Ok(Matrix::Rows { rows, n, k });
        }
        let dense = match dtype {
            WeightType::F32 => DType::F32,
            WeightType::F16 => DType::F16,
            WeightType::BF16 => DType::BF16,
            quantised => {
                let storage = QStorage::from_data(bytes.into(), self.device, quantised.ggml())?;
                let tensor = Arc::new(QTensor::new(storage, (n, k))?);
                return Ok(Matrix::Quantised { matmul: QMatMul::from_arc(tensor.clone())?, tensor });
            }
        };
        Ok(Matrix::Dense(Tensor::from_raw_buffer(bytes, dense, &[n, k], self.device)?))
    }

    fn check_shape(&self, name: &str, stored: &StoredTensor, wanted: &[usize]) -> Result<()> {
        if stored.meta.shape == wanted {
            return Ok(());
        }
        Err(self.wrong(name, format!("has shape {:?}, the config asks for {wanted:?}", stored.meta.shape)))
    }

    fn wrong(&self, name: &str, reason: String) -> Error {
        Error::Tensor { path: self.source.path_of(name).into(), tensor: self.source.stored_name(name), reason }
    }
}

/// Values of any stored type as f32.
fn widen(stored: &StoredTensor) -> Option<Vec<f32>> {
    let k = *stored.meta.shape.last()?;
    let row_bytes = stored.meta.dtype.bytes_for(k)?;
    let n = stored.bytes.len() / row_bytes;
    let rows = kernels::rows_from_bytes(stored.meta.dtype, stored.bytes, n, k)?;
    let mut wide = vec![0f32; n * k];
    for (row, out) in wide.chunks_exact_mut(k).enumerate() {
        rows.widen_row(row, out);
    }
    Some(wide)
}

/// f32 values as the little-endian bytes of a dense type.
fn narrow(values: &[f32], dtype: WeightType) -> Vec<u8> {
    match dtype {
        WeightType::F16 => values.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect(),
        WeightType::BF16 => values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

/// A matrix of `n` rows by `k` columns where the stage runs.
pub enum Matrix {
    /// On a CPU: rows as stored, whatever the type.
    Rows {
        /// The rows.
        rows: Box<dyn Rows>,
        /// How many.
        n: usize,
        /// Their length.
        k: usize,
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
}

impl Matrix {
    /// Bytes on the device.
    pub fn bytes(&self) -> u64 {
        match self {
            Matrix::Rows { rows, .. } => rows.bytes(),
            Matrix::Dense(tensor) => (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64,
            Matrix::Quantised { tensor, .. } => tensor.storage_size_in_bytes() as u64,
        }
    }

    /// `x`: (rows, k) -> (rows, n), in x's type.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Matrix::Rows { rows, n, k } => {
                let x = x.contiguous()?;
                let m = x.elem_count() / k;
                let mut out = vec![0f32; m * n];
                with_f32(&x, |x| rows.matmul(x, &mut out, m))?;
                Ok(Tensor::from_vec(out, (m, *n), &Device::Cpu)?)
            }
            Matrix::Dense(weight) => Ok(x.to_dtype(weight.dtype())?.matmul(&weight.t()?)?.to_dtype(x.dtype())?),
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
            Matrix::Rows { rows, n, k } => {
                let mut out = vec![0f32; tokens.len() * k];
                for (&token, out) in tokens.iter().zip(out.chunks_exact_mut(*k)) {
                    if token as usize >= *n {
                        return Err(Error::Tensors(format!("token {token} is outside the {n} rows of the embeddings")));
                    }
                    rows.widen_row(token as usize, out);
                }
                return Ok(Tensor::from_vec(out, (tokens.len(), *k), &Device::Cpu)?);
            }
            Matrix::Dense(table) => table.index_select(&Tensor::new(tokens, device)?, 0)?,
            Matrix::Quantised { tensor, .. } => tensor.embedding(&Tensor::new(tokens, device)?)?,
        };
        Ok(table.to_dtype(dtype)?)
    }
}

/// Lends a contiguous f32 CPU tensor's values.
fn with_f32<R>(x: &Tensor, body: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let (storage, layout) = x.storage_and_layout();
    match &*storage {
        candle_core::Storage::Cpu(cpu) => {
            let values = cpu.as_slice::<f32>()?;
            let start = layout.start_offset();
            Ok(body(&values[start..start + layout.shape().elem_count()]))
        }
        _ => Err(Error::Tensors("a CPU matrix was given another device's activations".into())),
    }
}

/// A projection: matrix and optional bias.
pub struct Linear {
    matrix: Arc<Matrix>,
    bias: Option<Tensor>,
}

impl Linear {
    /// A projection without bias over a matrix that others may share (the tied head).
    pub fn shared(matrix: Arc<Matrix>) -> Self {
        Linear { matrix, bias: None }
    }

    /// `x`: (rows, k) -> (rows, n).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let out = self.matrix.forward(x)?;
        match &self.bias {
            Some(bias) => Ok(out.broadcast_add(bias)?),
            None => Ok(out),
        }
    }

    /// Bytes of matrix and bias.
    pub fn bytes(&self) -> u64 {
        let bias = self.bias.as_ref().map_or(0, |b| b.elem_count() * b.dtype().size_in_bytes());
        self.matrix.bytes() + bias as u64
    }
}
