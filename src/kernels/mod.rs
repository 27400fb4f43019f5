//! The CPU's arithmetic: everything that is written for vector registers, and all `unsafe` code but the mapping of files.
//!
//! - `size`: sizes that unsafe code relies on;
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

mod size;
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
pub mod best;

use half::{bf16, f16};

use self::pool::Pool;
use crate::weights::WeightType;

/// Multiplications of BF16 a second that the AMX tiles of all threads of a pool reach together, with nothing loaded or
/// stored: what no product can exceed. Measured now, within a second; `None` where there is no AMX.
pub fn tile_rate(pool: &Pool) -> Option<f64> {
    #[cfg(target_arch = "x86_64")]
    return tiles::rounded::rate(pool);
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = pool;
        None
    }
}

/// Widens whole blocks of a stored type. `None` when the bytes are none.
pub fn dequantise(dtype: WeightType, bytes: &[u8]) -> Option<Vec<f32>> {
    dequantise_rows(dtype, bytes, 1)
}

/// The same of `rows` rows of one length. Sixteen rows are unpacked together, so a block of rows takes as long as one.
pub fn dequantise_rows(dtype: WeightType, bytes: &[u8], rows: usize) -> Option<Vec<f32>> {
    let values = bytes.len() / dtype.type_size() * dtype.block_size();
    if rows == 0 || values == 0 || dtype.bytes_for(values) != Some(bytes.len()) || !values.is_multiple_of(rows) {
        return None;
    }
    let (two, four) = (bytes.as_chunks::<2>().0, bytes.as_chunks::<4>().0);
    Some(match dtype {
        WeightType::F32 => four.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect(),
        WeightType::F16 => two.iter().map(|&bytes| f16::from_le_bytes(bytes).to_f32()).collect(),
        WeightType::BF16 => two.iter().map(|&bytes| bf16::from_le_bytes(bytes).to_f32()).collect(),
        _ => {
            let alone = Pool::new(1).ok()?;
            let matrix = matrix::Matrix::pack(&alone, dtype, bytes, rows, values / rows)?;
            let mut wide = vec![0f32; values];
            for (row, wide) in wide.chunks_exact_mut(values / rows).enumerate() {
                matrix.widen_row(row, wide);
            }
            wide
        }
    })
}
