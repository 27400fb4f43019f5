//! The CPU's arithmetic: everything that is written for vector registers, and all `unsafe` code but the mapping of files.
//!
//! - [`simd`]: what kernels may ask of a CPU, and its implementations;
//! - [`pool`]: the threads of a stage;
//! - [`buffer`]: aligned memory;
//! - [`formats`]: how quantised types are packed;
//! - [`input`]: the inputs of a product, in f32 and in 8 bits;
//! - [`matrix`]: packed matrices and their products;
//! - `tiles`: the same products on AMX;
//! - [`rows`]: the rows of a step over threads;
//! - [`ops`]: norms, rotation, activations;
//! - [`kv`]: keys and values of a sequence;
//! - [`attention`]: what queries make of them.

#![allow(unsafe_code)]
// Loops over registers index several arrays by one number.
#![allow(clippy::needless_range_loop)]

pub mod simd;
pub mod pool;
pub mod buffer;
pub mod formats;
pub mod input;
pub mod matrix;
#[cfg(target_arch = "x86_64")]
mod tiles;
pub mod rows;
pub mod ops;
pub mod kv;
pub mod attention;

use half::{bf16, f16};

use crate::weights::WeightType;

/// Widens whole blocks of a stored type. `None` when the bytes are none.
pub fn dequantise(dtype: WeightType, bytes: &[u8]) -> Option<Vec<f32>> {
    let values = bytes.len() / dtype.type_size() * dtype.block_size();
    if values == 0 || dtype.bytes_for(values) != Some(bytes.len()) {
        return None;
    }
    let (two, four) = (bytes.as_chunks::<2>().0, bytes.as_chunks::<4>().0);
    Some(match dtype {
        WeightType::F32 => four.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect(),
        WeightType::F16 => two.iter().map(|&bytes| f16::from_le_bytes(bytes).to_f32()).collect(),
        WeightType::BF16 => two.iter().map(|&bytes| bf16::from_le_bytes(bytes).to_f32()).collect(),
        _ => {
            let alone = pool::Pool::new(1).ok()?;
            let matrix = matrix::Matrix::pack(&alone, dtype, bytes, 1, values)?;
            let mut wide = vec![0f32; values];
            matrix.widen_row(0, &mut wide);
            wide
        }
    })
}
