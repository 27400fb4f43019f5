//! Grouped-query attention without expanding keys and values: the query heads that share a key head become rows of one
//! product with it.

use candle_core::{D, DType, Tensor};

use crate::error::Result;

/// `softcap * tanh(x / softcap)`.
pub fn soft_cap(x: &Tensor, cap: f64) -> Result<Tensor> {
    Ok(((x / cap)?.tanh()? * cap)?)
}

/// Where the last row of a sequence looks, for showing: the softmax of its scores, one vector of positions a head.
///
/// - `q`: (num_attention_heads, 1, head_dim)
/// - `keys`: (num_key_value_heads, positions, head_dim)
pub fn attention_weights(q: &Tensor, keys: &Tensor, scale: f64, softcap: Option<f64>) -> Result<Vec<Vec<f32>>> {
    let (heads, _, head_dim) = q.dims3()?;
    let (kv_heads, positions, _) = keys.dims3()?;
    let q = (q * scale)?.reshape((kv_heads, heads / kv_heads, head_dim))?;
    let scores = q.matmul(&keys.transpose(1, 2)?)?.to_dtype(DType::F32)?; // (kv_heads, heads / kv_heads, positions)
    let scores = match softcap {
        Some(cap) => soft_cap(&scores, cap)?,
        None => scores,
    };
    Ok(candle_nn::ops::softmax_last_dim(&scores.contiguous()?)?.reshape((heads, positions))?.to_vec2()?)
}

/// Whose softmax.
pub enum Softmax {
    /// candle's.
    Candle,
    /// metal-ext's, on rows that it takes.
    #[cfg(all(feature = "metal", target_os = "macos"))]
    Metal(super::metal_matrix::Kernels),
}

impl Softmax {
    /// Over the last dimension of `scores`, f32.
    fn forward(&self, scores: &Tensor) -> Result<Tensor> {
        match self {
            #[cfg(all(feature = "metal", target_os = "macos"))]
            Softmax::Metal(kernels) if scores.dim(D::Minus1)?.is_multiple_of(4) => kernels.softmax(scores),
            _ => Ok(candle_nn::ops::softmax_last_dim(scores)?),
        }
    }
}

/// Attention of one sequence.
///
/// - `q`: (num_attention_heads, seq, head_dim)
/// - `keys`, `values`: (num_key_value_heads, positions, head_dim)
/// - `mask`: (seq, positions), added to the scores
///
/// Returns (seq, num_attention_heads * head_dim).
pub fn attend(
    q: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    mask: Option<&Tensor>,
    scale: f64,
    softcap: Option<f64>,
    softmax: &Softmax,
) -> Result<Tensor> {
    let (heads, seq, head_dim) = q.dims3()?;
    let (kv_heads, positions, _) = keys.dims3()?;
    let group = heads / kv_heads;
    let q = (q * scale)?.reshape((kv_heads, group * seq, head_dim))?;
    let mut scores = q.matmul(&keys.transpose(1, 2)?)?; // (kv_heads, group * seq, positions)
    if let Some(cap) = softcap {
        scores = soft_cap(&scores, cap)?;
    }
    if let Some(mask) = mask {
        let grouped = scores.reshape((kv_heads * group, seq, positions))?;
        scores = grouped.broadcast_add(mask)?.reshape((kv_heads, group * seq, positions))?;
    }
    let dtype = scores.dtype();
    let weights = match dtype {
        DType::F32 => softmax.forward(&scores)?,
        // Half types lose too much in the sum of a long row.
        _ => softmax.forward(&scores.to_dtype(DType::F32)?)?.to_dtype(dtype)?,
    };
    let mixed = weights.matmul(values)?; // (kv_heads, group * seq, head_dim)
    let by_row = mixed.reshape((heads, seq, head_dim))?.transpose(0, 1)?; // (seq, heads, head_dim)
    Ok(by_row.contiguous()?.flatten_from(D::Minus2)?)
}
