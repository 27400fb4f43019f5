//! CPU matrix products over weights in the type they are stored in, so that a model is held once and never widened.
//!
//! [`Rows`] is a matrix whose rows are blocks of one type. Two ways lead through it:
//!
//! - few inputs (decode): each row is dotted with the input as it is stored. The input is brought into the type that
//!   the row's dot product wants (8-bit blocks for the quantised types) once for all rows;
//! - many inputs (prefill): tiles of rows are widened to f32 and multiplied with all inputs, which pays for the widening.
//!
//! The dense types are dotted by [`dense`], the quantised ones by candle ([`GgmlType`]), which both detect the CPU at run
//! time; block layouts are candle's.
//!
//! Both split the rows over the threads of the pool that the caller runs in. Every output element is the same sequence
//! of operations whatever the number of threads, so results do not depend on it.

#![allow(unsafe_code)]

pub mod buffer;
pub mod dense;
pub mod formats;
pub mod input;
pub mod matrix;
pub mod pool;
pub mod simd;

use candle_core::quantized::k_quants::{
    BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0, GgmlType,
};
use half::{bf16, f16};
use rayon::prelude::*;

use self::dense::Dense;
use crate::weights::WeightType;

/// From this many inputs on, widening a tile of rows costs less than dotting each row with each input.
const WIDEN_FROM: usize = 16;

/// Rows widened at a time: with 2048 columns a tile is 512 KiB and stays in a core's second-level cache.
const TILE_ROWS: usize = 64;

/// Multiplications below which waking other threads costs more than it saves.
const PARALLEL_FROM: usize = 1 << 17;

/// A matrix of `n` rows by `k` columns in a stored type.
pub trait Rows: Send + Sync {
    /// `out[i][j] = dot(x[i], row j)` for `m` inputs of `k` values; `out` has `m * n` elements.
    fn matmul(&self, x: &[f32], out: &mut [f32], m: usize);

    /// Writes row `row`, widened, to `out` (`k` elements).
    fn widen_row(&self, row: usize, out: &mut [f32]);

    /// Bytes held.
    fn bytes(&self) -> u64;
}

/// Takes over the bytes of an `n` by `k` matrix. `None` when they are not exactly that long, or when a row is not a
/// whole number of blocks.
pub fn rows_from_bytes(dtype: WeightType, bytes: &[u8], n: usize, k: usize) -> Option<Box<dyn Rows>> {
    Some(match dtype {
        WeightType::F32 => Box::new(Matrix::<f32>::copy(bytes, n, k)?),
        WeightType::F16 => Box::new(Matrix::<f16>::copy(bytes, n, k)?),
        WeightType::BF16 => Box::new(Matrix::<bf16>::copy(bytes, n, k)?),
        WeightType::Q4_0 => Box::new(Matrix::<BlockQ4_0>::copy(bytes, n, k)?),
        WeightType::Q4_1 => Box::new(Matrix::<BlockQ4_1>::copy(bytes, n, k)?),
        WeightType::Q5_0 => Box::new(Matrix::<BlockQ5_0>::copy(bytes, n, k)?),
        WeightType::Q5_1 => Box::new(Matrix::<BlockQ5_1>::copy(bytes, n, k)?),
        WeightType::Q8_0 => Box::new(Matrix::<BlockQ8_0>::copy(bytes, n, k)?),
        WeightType::Q2_K => Box::new(Matrix::<BlockQ2K>::copy(bytes, n, k)?),
        WeightType::Q3_K => Box::new(Matrix::<BlockQ3K>::copy(bytes, n, k)?),
        WeightType::Q4_K => Box::new(Matrix::<BlockQ4K>::copy(bytes, n, k)?),
        WeightType::Q5_K => Box::new(Matrix::<BlockQ5K>::copy(bytes, n, k)?),
        WeightType::Q6_K => Box::new(Matrix::<BlockQ6K>::copy(bytes, n, k)?),
    })
}

/// How rows of one type are dotted.
trait Block: GgmlType {
    /// What an input is brought into, once for all rows.
    type Input: Send + Sync;

    /// Brings an input into it.
    fn input(x: &[f32]) -> Vec<Self::Input>;

    /// Dots an input of `k` values with a row.
    fn dot(k: usize, row: &[Self], input: &[Self::Input]) -> f32;

    /// Dots it with four rows, which gives each the bits that `dot` gives it.
    fn dot_4(k: usize, rows: [&[Self]; 4], input: &[Self::Input]) -> [f32; 4];
}

macro_rules! dense_blocks {
    ($($type:ty),*) => {$(
        impl Block for $type {
            type Input = f32;

            fn input(x: &[f32]) -> Vec<f32> {
                x.to_vec()
            }

            fn dot(_k: usize, row: &[Self], input: &[f32]) -> f32 {
                <$type as Dense>::dot(input, row)
            }

            fn dot_4(_k: usize, rows: [&[Self]; 4], input: &[f32]) -> [f32; 4] {
                <$type as Dense>::dot_4(input, rows)
            }
        }
    )*};
}

macro_rules! quantised_blocks {
    ($($type:ty),*) => {$(
        impl Block for $type {
            type Input = <$type as GgmlType>::VecDotType;

            fn input(x: &[f32]) -> Vec<Self::Input> {
                let mut blocks = vec![Self::Input::zeros(); x.len() / Self::Input::BLCK_SIZE];
                Self::Input::from_float(x, &mut blocks);
                blocks
            }

            fn dot(k: usize, row: &[Self], input: &[Self::Input]) -> f32 {
                Self::vec_dot(k, row, input)
            }

            fn dot_4(k: usize, [a, b, c, d]: [&[Self]; 4], input: &[Self::Input]) -> [f32; 4] {
                Self::vec_dot_4(k, a, b, c, d, input).into()
            }
        }
    )*};
}

dense_blocks!(f32, f16, bf16);
quantised_blocks!(BlockQ4_0, BlockQ4_1, BlockQ5_0, BlockQ5_1, BlockQ8_0);
quantised_blocks!(BlockQ2K, BlockQ3K, BlockQ4K, BlockQ5K, BlockQ6K);

struct Matrix<T> {
    blocks: Vec<T>,
    n: usize,
    k: usize,
}

impl<T: Block> Matrix<T> {
    fn copy(bytes: &[u8], n: usize, k: usize) -> Option<Self> {
        if n == 0 || k == 0 || !k.is_multiple_of(T::BLCK_SIZE) {
            return None;
        }
        let count = n.checked_mul(k / T::BLCK_SIZE)?;
        if Some(bytes.len()) != count.checked_mul(size_of::<T>()) {
            return None;
        }
        let mut blocks = Vec::<T>::with_capacity(count);
        // SAFETY: `bytes` is exactly `count` blocks long and the vector has room for them. The block types are plain
        // numbers and arrays of them without padding, so any bytes are valid, at any alignment of the source.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), blocks.as_mut_ptr().cast::<u8>(), bytes.len());
            blocks.set_len(count);
        }
        Some(Matrix { blocks, n, k })
    }

    fn row(&self, row: usize) -> &[T] {
        let blocks = self.k / T::BLCK_SIZE;
        &self.blocks[row * blocks..(row + 1) * blocks]
    }

    /// Dots each row with each input, as stored.
    fn dot_rows(&self, x: &[f32], out: &mut [f32], m: usize) {
        let inputs: Vec<Vec<T::Input>> = x.chunks_exact(self.k).map(T::input).collect();
        if m == 1 {
            split(out, self.k, |start, part| self.dot_range(&inputs[0], start, part));
            return;
        }
        // Threads share out the rows, four at a time, so the products are made row by row and turned over afterwards.
        let mut turned = vec![0f32; self.n * m]; // (n, m)
        let work = |(quad, products): (usize, &mut [f32])| {
            let mut four = [0f32; 4];
            for (i, input) in inputs.iter().enumerate() {
                let rows = products.len() / m;
                self.dot_range(input, quad * 4, &mut four[..rows]);
                for (row, product) in four[..rows].iter().enumerate() {
                    products[row * m + i] = *product;
                }
            }
        };
        if self.n * self.k * m < PARALLEL_FROM {
            turned.chunks_mut(4 * m).enumerate().for_each(work);
        } else {
            turned.par_chunks_mut(4 * m).with_min_len(4).enumerate().for_each(work);
        }
        for (row, products) in turned.chunks_exact(m).enumerate() {
            for (i, product) in products.iter().enumerate() {
                out[i * self.n + row] = *product;
            }
        }
    }

    /// One input against the rows from `start` on, four at a time so that the input is loaded once for four.
    fn dot_range(&self, input: &[T::Input], start: usize, out: &mut [f32]) {
        let mut row = start;
        let mut quads = out.chunks_exact_mut(4);
        for quad in &mut quads {
            let rows = [self.row(row), self.row(row + 1), self.row(row + 2), self.row(row + 3)];
            quad.copy_from_slice(&T::dot_4(self.k, rows, input));
            row += 4;
        }
        for product in quads.into_remainder() {
            *product = T::dot(self.k, self.row(row), input);
            row += 1;
        }
    }

    /// Widens tiles of rows to f32 and multiplies all inputs with them.
    fn widen_tiles(&self, x: &[f32], out: &mut [f32], m: usize) {
        let out_pointer = Shared(out.as_mut_ptr());
        let (n, k) = (self.n, self.k);
        let tile = |start: usize| {
            let rows = TILE_ROWS.min(n - start);
            let mut wide = vec![0f32; rows * k];
            T::to_float(&self.blocks[start * (k / T::BLCK_SIZE)..(start + rows) * (k / T::BLCK_SIZE)], &mut wide);
            let out = out_pointer;
            // SAFETY: `x` holds m * k values and `wide` rows * k. The destination is columns start..start + rows of the
            // (m, n) matrix `out`, which outlives the call; no two tiles share a column.
            unsafe {
                gemm::gemm(
                    m,
                    rows,
                    k,
                    { out }.0.add(start),
                    1,
                    n as isize,
                    false,
                    x.as_ptr(),
                    1,
                    k as isize,
                    wide.as_ptr(),
                    k as isize,
                    1,
                    0f32,
                    1f32,
                    false,
                    false,
                    false,
                    gemm::Parallelism::None,
                );
            }
        };
        let tiles = n.div_ceil(TILE_ROWS);
        if n * k * m < PARALLEL_FROM {
            (0..tiles).for_each(|i| tile(i * TILE_ROWS));
        } else {
            (0..tiles).into_par_iter().for_each(|i| tile(i * TILE_ROWS));
        }
    }
}

/// A pointer that threads share; each writes elements of its own.
#[derive(Clone, Copy)]
struct Shared(*mut f32);
// SAFETY: only used by `widen_tiles`, whose tiles write disjoint elements.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

/// Runs `work(first index, part)` over parts of `out`, on several threads when there is enough to do.
fn split(out: &mut [f32], k: usize, work: impl Fn(usize, &mut [f32]) + Sync) {
    let threads = rayon::current_num_threads();
    if threads == 1 || out.len() * k < PARALLEL_FROM {
        return work(0, out);
    }
    // A few parts for each thread, so that one that is held up costs little; whole quads in all but the last.
    let part = out.len().div_ceil(threads * 4).next_multiple_of(4);
    out.par_chunks_mut(part).enumerate().for_each(|(i, chunk)| work(i * part, chunk));
}

impl<T: Block> Rows for Matrix<T> {
    fn matmul(&self, x: &[f32], out: &mut [f32], m: usize) {
        assert!(x.len() == m * self.k && out.len() == m * self.n, "matmul of {m} inputs with wrong buffer sizes");
        if m >= WIDEN_FROM { self.widen_tiles(x, out, m) } else { self.dot_rows(x, out, m) }
    }

    fn widen_row(&self, row: usize, out: &mut [f32]) {
        T::to_float(self.row(row), out);
    }

    fn bytes(&self) -> u64 {
        size_of_val(self.blocks.as_slice()) as u64
    }
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::QTensor;
    use candle_core::{Device, Tensor};

    use super::*;

    /// Seeded values in -1..1 and their matrix in a stored type.
    fn matrix(dtype: WeightType, n: usize, k: usize) -> (Vec<f32>, Box<dyn Rows>) {
        let values: Vec<f32> = (0..n * k).map(|i| ((i * 7919 + 13) % 2003) as f32 / 1001.5 - 1.0).collect();
        let tensor = Tensor::from_vec(values, (n, k), &Device::Cpu).unwrap();
        let stored = QTensor::quantize(&tensor, dtype.ggml()).unwrap();
        let bytes = stored.data().unwrap();
        let wide = stored.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        // One byte off, so that nothing can rely on the source's alignment.
        let shifted: Vec<u8> = std::iter::once(0).chain(bytes.iter().copied()).collect();
        (wide, rows_from_bytes(dtype, &shifted[1..], n, k).unwrap())
    }

    #[test]
    fn every_type_multiplies_like_f64_for_every_number_of_inputs() {
        for dtype in WeightType::ALL {
            for (n, k) in [(1, 256), (7, 256), (66, 512)] {
                let (wide, rows) = matrix(dtype, n, k);
                for m in [1, 2, 5, 16, 33] {
                    let x: Vec<f32> = (0..m * k).map(|i| ((i * 31 + 7) % 257) as f32 / 128.5 - 1.0).collect();
                    let mut out = vec![f32::NAN; m * n];
                    rows.matmul(&x, &mut out, m);
                    for i in 0..m {
                        for j in 0..n {
                            let pairs = x[i * k..][..k].iter().zip(&wide[j * k..][..k]);
                            let (mut want, mut size) = (0f64, 0f64);
                            for (&a, &b) in pairs {
                                want += a as f64 * b as f64;
                                size += (a as f64 * b as f64).abs();
                            }
                            // The input is rounded to 8 bits for quantised rows.
                            let tolerance = size * if dtype.is_dense() || m >= WIDEN_FROM { 1e-5 } else { 8e-3 };
                            let found = out[i * n + j] as f64;
                            assert!(
                                (found - want).abs() <= tolerance,
                                "{dtype} m={m} n={n} k={k} [{i},{j}]: {found} for {want}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        for dtype in [WeightType::F32, WeightType::F16, WeightType::Q8_0, WeightType::Q4_K] {
            let (n, k) = (515, 512);
            let (_, rows) = matrix(dtype, n, k);
            for m in [1, 3, 40] {
                let x: Vec<f32> = (0..m * k).map(|i| ((i * 37) % 101) as f32 / 50.0 - 1.0).collect();
                let run = |threads| {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                    let mut out = vec![0f32; m * n];
                    pool.install(|| rows.matmul(&x, &mut out, m));
                    out
                };
                let bits = |v: Vec<f32>| v.into_iter().map(f32::to_bits).collect::<Vec<_>>();
                assert_eq!(bits(run(1)), bits(run(3)), "{dtype} m={m}");
            }
        }
    }

    #[test]
    fn wrong_sizes_are_no_matrix() {
        assert!(rows_from_bytes(WeightType::F32, &[0; 15], 2, 2).is_none());
        assert!(rows_from_bytes(WeightType::Q8_0, &[0; 34], 1, 33).is_none());
        assert!(rows_from_bytes(WeightType::F32, &[], 0, 4).is_none());
        assert!(rows_from_bytes(WeightType::F16, &[0; 4], usize::MAX, 4).is_none());
    }
}
