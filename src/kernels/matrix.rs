//! Matrices packed by sixteen rows, and their product with few or many inputs.
//!
//! A matrix is held once: in the bytes of its stored type, reordered when it is loaded. The product goes through a
//! group's columns in order, for all inputs at once, so that weights are read from memory in the order they lie there and
//! unpacked once for all inputs. Each result is the same chain of operations whatever the number of inputs, threads or
//! the instruction set: a row computed in a batch has the bits of the row computed alone.
//!
//! On AMX that holds as well, but BF16 and F16 have chains of their own there, see `tiles/rounded.rs`, and so have F16 and
//! quantised weights for rows that ask for BF16, where multiplications count rather than bytes.

mod dense;
mod quantised;

use std::cell::RefCell;
use std::ops::Range;
use std::sync::{Mutex, OnceLock, PoisonError};

use half::{bf16, f16};

use self::dense::{Dense, Rounded};
use self::quantised::{INPUT_TILE, PAIRED_FROM, Paired, Quantised};
use super::buffer::Buffer;
use super::formats::{Format, Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0, SUB};
use super::input::{Cut, Input, TILE};
use super::pool::Pool;
use super::simd::{Isa, LANES, Simd};
use super::size;
#[cfg(target_arch = "x86_64")]
use super::tiles::rounded::{self, Stored};
#[cfg(target_arch = "x86_64")]
use super::tiles::unpack::{Alone, narrow, widen};
use crate::weights::WeightType;

/// Multiplications below which waking other threads costs more than it saves.
const PARALLEL_FROM: usize = 1 << 15;

/// Parts that a thread's share of a product is handed out in, so that a thread that is held up holds up little.
const PARTS: usize = 6;

/// A matrix of `n` rows and `k` columns.
pub struct Matrix {
    n: usize,
    k: usize,
    dtype: WeightType,
    data: Buffer,
}

/// A product to compute: `out[i][j] = dot(input i, row j)`, with `out` of (rows of the input, n).
pub struct Product<'a> {
    /// The matrix.
    pub matrix: &'a Matrix,
    /// Where the results go.
    pub out: &'a mut [f32],
}

/// Runs `$body` with `$format` naming the format of a quantised type.
macro_rules! with_format {
    ($dtype:expr, $format:ident => $body:expr, dense => $dense:expr) => {
        match $dtype {
            WeightType::Q4_0 => {
                type $format = Q4_0;
                $body
            }
            WeightType::Q4_1 => {
                type $format = Q4_1;
                $body
            }
            WeightType::Q5_0 => {
                type $format = Q5_0;
                $body
            }
            WeightType::Q5_1 => {
                type $format = Q5_1;
                $body
            }
            WeightType::Q8_0 => {
                type $format = Q8_0;
                $body
            }
            WeightType::Q2_K => {
                type $format = Q2K;
                $body
            }
            WeightType::Q3_K => {
                type $format = Q3K;
                $body
            }
            WeightType::Q4_K => {
                type $format = Q4K;
                $body
            }
            WeightType::Q5_K => {
                type $format = Q5K;
                $body
            }
            WeightType::Q6_K => {
                type $format = Q6K;
                $body
            }
            WeightType::F32 | WeightType::F16 | WeightType::BF16 => $dense,
        }
    };
}

impl Matrix {
    /// Packs the bytes of an `n` by `k` matrix. `None` when they are not exactly that long, or when a row is not a whole
    /// number of blocks.
    pub fn pack(pool: &Pool, dtype: WeightType, bytes: &[u8], n: usize, k: usize) -> Option<Matrix> {
        if Some(bytes.len()) != n.checked_mul(dtype.bytes_for(k)?) {
            return None;
        }
        let read = |at: usize, into: &mut [u8]| {
            into.copy_from_slice(&bytes[at..][..into.len()]);
            Ok::<(), std::convert::Infallible>(())
        };
        Self::pack_from(pool, dtype, n, k, read)?.ok()
    }

    /// Packs a matrix whose rows are read as they are needed: `read(at, into)` fills `into` with the stored bytes from `at`
    /// on, sixteen rows at a time, on the pool's threads. Fails with the first error of `read`; `None` when there is no
    /// such matrix.
    pub fn pack_from<E: Send>(
        pool: &Pool,
        dtype: WeightType,
        n: usize,
        k: usize,
        read: impl Fn(usize, &mut [u8]) -> Result<(), E> + Sync,
    ) -> Option<Result<Matrix, E>> {
        thread_local! {
            /// The stored bytes of the rows being packed. Kept, since asking the system for memory anew for each
            /// sixteen rows takes as long as packing them.
            static ROWS: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        let row_bytes = dtype.bytes_for(k)?;
        let total = n.checked_mul(row_bytes)?;
        if n == 0 || k == 0 {
            return None;
        }
        let groups = n.div_ceil(LANES);
        // BF16 goes by two columns.
        let padded = if dtype == WeightType::BF16 { row_bytes.checked_next_multiple_of(4)? } else { row_bytes };
        let packed_total = size::product_of(&[groups, padded, LANES])?;
        let group_bytes = padded * LANES;
        let mut data = Buffer::zeroed(packed_total);
        let out = Pointer(data.as_mut_slice().as_mut_ptr());
        let failed = OnceLock::new();
        pool.for_each(groups, |group| {
            if failed.get().is_some() {
                return;
            }
            let out = &out;
            // SAFETY: the buffer has `groups` parts of `group_bytes`, and each task has its own.
            let packed = unsafe { std::slice::from_raw_parts_mut(out.0.add(group * group_bytes), group_bytes) };
            ROWS.with_borrow_mut(|stored| {
                let start = group * LANES * row_bytes;
                stored.resize((LANES * row_bytes).min(total - start), 0);
                if let Err(error) = read(start, stored) {
                    let _ = failed.set(Mutex::new(error)); // another thread's error is as good
                    return;
                }
                let rows: [Option<&[u8]>; LANES] =
                    std::array::from_fn(|lane| stored.get(lane * row_bytes..)?.get(..row_bytes));
                with_format!(dtype, F => pack_group::<F>(rows, packed), dense => pack_dense(dtype, rows, packed));
            });
        });
        match failed.into_inner() {
            Some(error) => Some(Err(error.into_inner().unwrap_or_else(PoisonError::into_inner))),
            None => Some(Ok(Matrix { n, k, dtype, data })),
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.n
    }

    /// Length of a row.
    pub fn columns(&self) -> usize {
        self.k
    }

    /// Type of the values.
    pub fn dtype(&self) -> WeightType {
        self.dtype
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        self.data.as_slice().len() as u64
    }

    /// Writes row `row`, widened, to `out` (`k` values).
    pub fn widen_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.n && out.len() == self.k, "row {row} of {} into {} values", self.n, out.len());
        let group_bytes = self.data.as_slice().len() / self.n.div_ceil(LANES);
        let group = &self.data.as_slice()[row / LANES * group_bytes..][..group_bytes];
        let lane = row % LANES;
        with_format!(self.dtype, F => {
            for (block, out) in group.chunks_exact(F::PACKED).zip(out.chunks_exact_mut(F::COLUMNS)) {
                F::unpack_row(block, lane, out);
            }
        }, dense => {
            for (column, out) in out.iter_mut().enumerate() {
                let two = |at: usize| [group[at], group[at + 1]];
                *out = match self.dtype {
                    WeightType::F16 => f16::from_le_bytes(two((column * LANES + lane) * 2)).to_f32(),
                    WeightType::BF16 => bf16::from_le_bytes(two((column / 2 * LANES + lane) * 4 + column % 2 * 2)).to_f32(),
                    _ => {
                        let at = (column * LANES + lane) * 4;
                        f32::from_le_bytes([group[at], group[at + 1], group[at + 2], group[at + 3]])
                    }
                };
            }
        });
    }
}

/// Whether products with matrices of this type read an input's 8-bit blocks, see [`Input::quantise`].
fn needs_blocks(dtype: WeightType) -> bool {
    !dtype.is_dense()
}

/// Of how many rows, from the first on.
fn rows_in_blocks(input: &Input, isa: Isa) -> usize {
    if isa.has_tiles() { input.first_bf16() } else { input.rows() }
}

/// Whether they read its pairs, see [`Input::round`].
fn needs_pairs(dtype: WeightType, isa: Isa) -> bool {
    dtype == WeightType::BF16 && !isa.has_tiles()
}

/// How the tiles that they read are cut, see [`Input::cut`], unless [`reads_halves`].
fn needs_tiles(dtype: WeightType, isa: Isa) -> &'static [Cut] {
    match dtype {
        _ if !isa.has_tiles() => &[],
        WeightType::F32 => &[],
        WeightType::BF16 => &[Cut::Rounded],
        WeightType::F16 => &[Cut::Halved, Cut::Bf16],
        _ => &[Cut::Bf16],
    }
}

/// Rows that products with matrices of this type take as long for together as for one more, unless these ask for BF16.
pub(crate) fn rows_at_a_time(dtype: WeightType, isa: Isa) -> usize {
    if needs_tiles(dtype, isa).iter().any(|cut| *cut != Cut::Bf16) { TILE } else { 1 }
}

/// Whether they read [`Input::halves`] instead of tiles: a single row is faster without those.
fn reads_halves(cut: Cut, input: &Input) -> bool {
    cut == Cut::Halved && input.rows_to_cut(cut).len() == 1
}

impl Input {
    /// Makes the forms that products with matrices of these types read, besides the values.
    pub fn prepare(&mut self, pool: &Pool, isa: Isa, dtypes: impl Iterator<Item = WeightType> + Clone) {
        if dtypes.clone().any(needs_blocks) {
            self.quantise(pool, isa, rows_in_blocks(self, isa));
        }
        if dtypes.clone().any(|dtype| needs_pairs(dtype, isa)) {
            self.round(pool, isa);
        }
        for cut in [Cut::Rounded, Cut::Halved, Cut::Bf16] {
            if dtypes.clone().any(|dtype| needs_tiles(dtype, isa).contains(&cut)) {
                match reads_halves(cut, self) {
                    true => self.halve(isa),
                    false => self.cut(pool, isa, cut),
                }
            }
        }
    }
}

/// Computes products with one input, in one pass over the pool's threads.
pub fn multiply(pool: &Pool, isa: Isa, input: &Input, products: &mut [Product]) {
    let m = input.rows();
    for product in products.iter() {
        let (n, k) = (product.matrix.n, product.matrix.k);
        let results = size::product("results of a product", [m, n]);
        assert!(k == input.columns() && product.out.len() == results, "product of {m} inputs with wrong sizes");
        let blocks = input.blocks().len();
        let wanted = k / SUB * rows_in_blocks(input, isa);
        assert!(!needs_blocks(product.matrix.dtype) || blocks == wanted, "the input has not been quantised");
        let pairs = input.pairs().len();
        assert!(
            !needs_pairs(product.matrix.dtype, isa) || pairs == k.div_ceil(2) * m,
            "the input has not been rounded"
        );
        let is_cut = |&cut: &Cut| match reads_halves(cut, input) {
            true => input.halves().len() == 2 * k,
            false => input.tiles(cut).is_some() || input.rows_to_cut(cut).is_empty(),
        };
        assert!(needs_tiles(product.matrix.dtype, isa).iter().all(is_cut), "the input has not been cut");
    }
    // A task is a run of groups of one matrix. Four at a time, which is how dense ones are multiplied.
    let work = products.iter().fold(0usize, |work, p| work.saturating_add(p.matrix.n.saturating_mul(p.matrix.k)));
    let parts = if work.saturating_mul(m) < PARALLEL_FROM || pool.threads() == 1 { 1 } else { pool.threads() * PARTS };
    let total: usize = products.iter().map(|p| p.matrix.n.div_ceil(LANES)).sum();
    let run = total.div_ceil(parts).next_multiple_of(4);
    let mut tasks = Vec::with_capacity(parts + products.len());
    for product in products.iter_mut() {
        let groups = product.matrix.n.div_ceil(LANES);
        for first in (0..groups).step_by(run) {
            let count = run.min(groups - first);
            tasks.push(Task { isa, input, matrix: product.matrix, out: product.out.as_mut_ptr(), first, count });
        }
    }
    match parts {
        1 => tasks.iter().for_each(Task::run),
        _ => pool.for_each(tasks.len(), |task| tasks[task].run()),
    }
}

/// A run of groups of one matrix.
struct Task<'a> {
    isa: Isa,
    input: &'a Input,
    matrix: &'a Matrix,
    out: *mut f32,
    first: usize,
    count: usize,
}

// SAFETY: tasks write the results of their own groups.
unsafe impl Sync for Task<'_> {}

impl Task<'_> {
    fn run(&self) {
        let Matrix { n, k, dtype, data } = self.matrix;
        let m = self.input.rows();
        let group_bytes = data.as_slice().len() / n.div_ceil(LANES);
        let weights = data.as_slice()[self.first * group_bytes..].as_ptr();
        with_format!(dtype, F => {
            let m = rows_in_blocks(self.input, self.isa);
            let blocks = |groups: Range<usize>| {
                for start in (0..m).step_by(INPUT_TILE) {
                    let kernel = Quantised::<F> {
                        weights: weights.wrapping_add(groups.start * group_bytes),
                        input: self.input.blocks(),
                        m,
                        start,
                        tile: INPUT_TILE.min(m - start),
                        out: self.out,
                        first: self.first + groups.start,
                        count: groups.len(),
                        n: *n,
                        k: *k,
                        format: std::marker::PhantomData,
                    };
                    // SAFETY: `multiply` has checked the sizes; no other task has these groups.
                    unsafe {
                        match kernel.tile < PAIRED_FROM {
                            true => self.isa.run(kernel),
                            false => self.isa.run(Paired(kernel)),
                        }
                    }
                }
            };
            #[cfg(target_arch = "x86_64")]
            if let Some(tiles) = self.tiles(Cut::Bf16, Stored::Other(widen::<F>)) {
                return self.in_turns(m, blocks, &tiles);
            }
            blocks(0..self.count);
        }, dense => {
            #[cfg(target_arch = "x86_64")]
            {
                if *dtype == WeightType::BF16
                    && let Some(tiles) = self.tiles(Cut::Rounded, Stored::Bf16)
                {
                    // SAFETY: the CPU has tiles; else as above.
                    return unsafe { tiles.run(0..self.count) };
                }
                if *dtype == WeightType::F16 && self.isa.has_tiles() {
                    let tiles = self.tiles(Cut::Halved, Stored::F16);
                    let halved = |groups: Range<usize>| match (reads_halves(Cut::Halved, self.input), &tiles) {
                        (true, _) => {
                            let weights = weights.wrapping_add(groups.start * group_bytes);
                            let (first, count, n, k) = (self.first + groups.start, groups.len(), *n, *k);
                            let product = Alone { weights, halves: self.input.halves(), out: self.out, first, count, n, k };
                            // SAFETY: the CPU has AVX-512; else as above.
                            unsafe { product.run() }
                        }
                        // SAFETY: the CPU has tiles; else as above.
                        (false, Some(tiles)) => unsafe { tiles.run(groups) },
                        (false, None) => {}
                    };
                    return match self.tiles(Cut::Bf16, Stored::Other(narrow)) {
                        Some(rounded) => self.in_turns(self.input.first_bf16(), halved, &rounded),
                        None => halved(0..self.count),
                    };
                }
            }
            let kernel = Dense {
                dtype: *dtype,
                weights,
                input: match dtype {
                    WeightType::BF16 => self.input.pairs().as_ptr().cast(),
                    _ => self.input.values().as_ptr().cast(),
                },
                m,
                out: self.out,
                first: self.first,
                count: self.count,
                n: *n,
                k: *k,
            };
            // SAFETY: as above.
            unsafe {
                match dtype {
                    WeightType::BF16 => self.isa.run_bf16(Rounded(kernel)),
                    _ => self.isa.run(kernel),
                }
            }
        });
    }
}

#[cfg(target_arch = "x86_64")]
impl Task<'_> {
    /// The products of two kinds of rows, of which `others` has so many: where there are both, in turns, so that the tiles'
    /// work is the time in which memory brings the next groups.
    fn in_turns(&self, others: usize, product: impl Fn(Range<usize>), tiles: &rounded::Rounded) {
        let together = if others == 0 { self.count } else { 2 };
        for first in (0..self.count).step_by(together) {
            let groups = first..self.count.min(first + together);
            product(groups.clone());
            // SAFETY: `multiply` has checked the sizes and no other task has these groups; who has tiles has the CPU for it.
            unsafe { tiles.run(groups) };
        }
    }

    /// The product of the rows that are cut in this way, if there are tiles and such rows.
    fn tiles(&self, cut: Cut, stored: Stored) -> Option<rounded::Rounded<'_>> {
        let Matrix { n, k, data, .. } = self.matrix;
        let inputs = self.input.tiles(cut).filter(|_| self.isa.has_tiles())?;
        let group_bytes = data.as_slice().len() / n.div_ceil(LANES);
        let weights = data.as_slice()[self.first * group_bytes..].as_ptr();
        Some(rounded::Rounded { weights, stored, group_bytes, inputs, out: self.out, first: self.first, n: *n, k: *k })
    }
}

/// A pointer that threads share.
struct Pointer(*mut u8);
// SAFETY: each thread writes a part of its own.
unsafe impl Sync for Pointer {}

fn pack_group<F: Format>(rows: [Option<&[u8]>; LANES], packed: &mut [u8]) {
    for (block, packed) in packed.chunks_exact_mut(F::PACKED).enumerate() {
        F::pack(rows.map(|row| Some(&row?[block * F::BLOCK_BYTES..][..F::BLOCK_BYTES])), packed);
    }
}

/// Dense types: the sixteen rows' values of a column lie side by side; of BF16, those of two columns.
fn pack_dense(dtype: WeightType, rows: [Option<&[u8]>; LANES], packed: &mut [u8]) {
    for (lane, row) in rows.into_iter().enumerate() {
        let Some(row) = row else { continue };
        match dtype {
            WeightType::F16 => interleave::<2>(row, lane, packed),
            _ => interleave::<4>(row, lane, packed),
        }
    }
}

fn interleave<const SIZE: usize>(row: &[u8], lane: usize, packed: &mut [u8]) {
    for (value, column) in row.chunks(SIZE).zip(packed.chunks_exact_mut(SIZE * LANES)) {
        column[lane * SIZE..][..value.len()].copy_from_slice(value);
    }
}

/// Writes a group's results for one input, leaving out the rows of zeros behind the last.
#[inline(always)]
unsafe fn put<S: Simd>(results: S::F, out: *mut f32, row: usize, n: usize) {
    // SAFETY: `out` has `n` values from here on; a whole vector is written only where it fits.
    unsafe {
        if row + LANES <= n {
            S::store(out.add(row), results);
        } else {
            let mut all = [0f32; LANES];
            S::store(all.as_mut_ptr(), results);
            std::ptr::copy_nonoverlapping(all.as_ptr(), out.add(row), n - row);
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::QTensor;
    use candle_core::{Device, Tensor};

    use super::*;

    /// Seeded values in -1..1, widened from the stored type, and their matrix.
    fn matrix(dtype: WeightType, n: usize, k: usize) -> (Vec<f32>, Matrix) {
        let values: Vec<f32> = (0..n * k).map(|i| ((i * 7919 + 13) % 2003) as f32 / 1001.5 - 1.0).collect();
        let tensor = Tensor::from_vec(values, (n, k), &Device::Cpu).unwrap();
        let stored = QTensor::quantize(&tensor, dtype.ggml()).unwrap();
        let bytes = stored.data().unwrap();
        let wide = stored.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        // One byte off, so that nothing can rely on the source's alignment.
        let shifted: Vec<u8> = std::iter::once(0).chain(bytes.iter().copied()).collect();
        let pool = Pool::new(2).unwrap();
        (wide, Matrix::pack(&pool, dtype, &shifted[1..], n, k).unwrap())
    }

    /// The last `bf16_rows` of `m` meet weights in BF16.
    fn inputs(m: usize, bf16_rows: usize, k: usize, pool: &Pool, isa: Isa) -> Input {
        let mut input = Input::default();
        for (i, v) in input.reset(m, bf16_rows, k).iter_mut().enumerate() {
            *v = ((i * 31 + 7) % 257) as f32 / 128.5 - 1.0;
        }
        input.round(pool, isa);
        input.prepare(pool, isa, WeightType::ALL.into_iter().filter(|dtype| dtype.is_dense() || k.is_multiple_of(SUB)));
        input
    }

    fn product(matrix: &Matrix, input: &Input, pool: &Pool, isa: Isa) -> Vec<f32> {
        let mut out = vec![f32::NAN; input.rows() * matrix.rows()];
        multiply(pool, isa, input, &mut [Product { matrix, out: &mut out }]);
        out
    }

    fn sizes(dtype: WeightType) -> Vec<(usize, usize)> {
        match dtype.block_size() {
            1 => vec![(1, 1), (5, 7), (16, 33), (70, 65), (83, 128)],
            32 => vec![(1, 32), (17, 96), (70, 64)],
            _ => vec![(1, 256), (17, 512), (70, 256)],
        }
    }

    #[test]
    fn packed_rows_widen_to_what_they_were() {
        for dtype in WeightType::ALL {
            for (n, k) in sizes(dtype) {
                let (wide, matrix) = matrix(dtype, n, k);
                let mut row = vec![f32::NAN; k];
                for j in 0..n {
                    matrix.widen_row(j, &mut row);
                    for (found, want) in row.iter().zip(&wide[j * k..]) {
                        assert!((found - want).abs() <= 1e-6 * want.abs().max(1.0), "{dtype} row {j}: {found} {want}");
                    }
                }
            }
        }
    }

    #[test]
    fn every_type_multiplies_like_f64_with_every_instruction_set_and_number_of_inputs() {
        let pool = Pool::new(2).unwrap();
        for dtype in WeightType::ALL {
            for (n, k) in sizes(dtype) {
                let (wide, matrix) = matrix(dtype, n, k);
                for isa in Isa::available() {
                    for (m, bf16_rows) in
                        [1, 2, 3, 5, 6, 7, 13].into_iter().flat_map(|m: usize| [(m, 0), (m, m.div_ceil(2))])
                    {
                        let input = inputs(m, bf16_rows, k, &pool, isa);
                        let out = product(&matrix, &input, &pool, isa);
                        for i in 0..m {
                            // What the product sees of the input.
                            let tiles = needs_tiles(dtype, isa);
                            let in_bf16 = i >= input.first_bf16() && tiles.contains(&Cut::Bf16);
                            let x: Vec<f64> = match dtype {
                                dtype if dtype == WeightType::BF16 || in_bf16 => {
                                    let pairs = &input.pairs()[i * k.div_ceil(2)..][..k.div_ceil(2)];
                                    pairs.as_flattened()[..k].iter().map(|v| v.to_f64()).collect()
                                }
                                WeightType::F32 | WeightType::F16 => {
                                    input.values()[i * k..][..k].iter().map(|&v| v as f64).collect()
                                }
                                _ => (0..k)
                                    .map(|c| {
                                        let block = &input.blocks()[c / SUB * rows_in_blocks(&input, isa) + i];
                                        block.values[c % SUB] as f64 * block.scale as f64
                                    })
                                    .collect(),
                            };
                            for j in 0..n {
                                let (mut want, mut size) = (0f64, 0f64);
                                for (x, &w) in x.iter().zip(&wide[j * k..][..k]) {
                                    want += x * w as f64;
                                    size += (x * w as f64).abs();
                                }
                                let found = out[i * n + j] as f64;
                                let part = if in_bf16 {
                                    2f64.powi(-8) + 3e-6 // what a weight is rounded by
                                } else if tiles.contains(&Cut::Halved) {
                                    2f64.powi(-17) + 2f64.powi(-16) // what is cut off an input, and what is left out
                                } else {
                                    3e-6
                                };
                                assert!(
                                    (found - want).abs() <= part * size + 1e-6,
                                    "{dtype} {isa} m={m}, {bf16_rows} in BF16, n={n} k={k} [{i},{j}]: {found} for {want}"
                                );
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_has_the_same_bits_alone_in_a_batch_on_any_threads_and_instruction_set() {
        let (one, three) = (Pool::new(1).unwrap(), Pool::new(3).unwrap());
        let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        for dtype in WeightType::ALL {
            // Many inputs, and so few that dense groups are taken in parts: of an odd number of columns where that can be.
            let odd = if dtype.is_dense() { 1281 } else { 1280 };
            for (n, k, m, some) in [(83, 256, 140, &[0, 1, 6, 77, 127, 128, 139][..]), (83, odd, 20, &[0, 5, 6, 19])] {
                let (_, matrix) = matrix(dtype, n, k);
                let together = |isa, bf16_rows| product(&matrix, &inputs(m, bf16_rows, k, &three, isa), &three, isa);
                let everywhere = together(Isa::SCALAR, 0);
                // None of the rows in BF16, all, and both: few and many of each.
                for (isa, bf16_rows) in
                    Isa::available().into_iter().flat_map(|isa| [0, 2, m / 2, m - 1, m].map(|rows| (isa, rows)))
                {
                    let all = inputs(m, bf16_rows, k, &three, isa);
                    let found = together(isa, bf16_rows);
                    for &i in some {
                        let mut alone = Input::default();
                        let in_bf16 = i >= m - bf16_rows;
                        alone.reset(1, usize::from(in_bf16), k).copy_from_slice(&all.values()[i * k..][..k]);
                        alone.prepare(&one, isa, [dtype].into_iter());
                        let out = product(&matrix, &alone, &one, isa);
                        let what = format!("{dtype} {isa} input {i} of {m}, {bf16_rows} in BF16");
                        assert_eq!(bits(&out), bits(&found[i * n..][..n]), "{what}");
                        // Tiles have an order of their own.
                        let tiles = needs_tiles(dtype, isa);
                        if tiles.is_empty() || tiles == [Cut::Bf16] && !in_bf16 {
                            assert_eq!(
                                bits(&out),
                                bits(&everywhere[i * n..][..n]),
                                "{what}, on another instruction set"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn several_products_share_a_pass() {
        let pool = Pool::new(2).unwrap();
        let isa = Isa::detect();
        let (_, a) = matrix(WeightType::Q4_0, 70, 128);
        let (_, b) = matrix(WeightType::F16, 17, 128);
        let input = inputs(9, 4, 128, &pool, isa);
        let (mut out_a, mut out_b) = (vec![0f32; 9 * 70], vec![0f32; 9 * 17]);
        let products = &mut [Product { matrix: &a, out: &mut out_a }, Product { matrix: &b, out: &mut out_b }];
        multiply(&pool, isa, &input, products);
        assert_eq!((out_a, out_b), (product(&a, &input, &pool, isa), product(&b, &input, &pool, isa)));
    }

    #[test]
    fn extreme_values_stay_finite_and_lost_ones_show() {
        let pool = Pool::new(1).unwrap();
        for isa in Isa::available() {
            for dtype in WeightType::ALL {
                let (_, matrix) = matrix(dtype, 3, 256);
                for bf16_rows in [0, 1] {
                    let mut input = inputs(1, bf16_rows, 256, &pool, isa);
                    input.values_mut()[..4].copy_from_slice(&[f32::MAX / 1e6, -1e30, 1e-40, 0.0]);
                    input.prepare(&pool, isa, [dtype].into_iter());
                    assert!(product(&matrix, &input, &pool, isa).iter().all(|v| v.is_finite()), "{dtype} {isa}");
                    // In each half of a block, and in each half of a vector.
                    for (lost, column) in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN].into_iter().zip([5, 40, 250]) {
                        let kept = std::mem::replace(&mut input.values_mut()[column], lost);
                        input.prepare(&pool, isa, [dtype].into_iter());
                        let found = product(&matrix, &input, &pool, isa);
                        assert!(found.iter().all(|v| !v.is_finite()), "{dtype} {isa}, {lost} in {column}: {found:?}");
                        input.values_mut()[column] = kept;
                    }
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "product of 2 inputs with wrong sizes")]
    fn results_that_do_not_fit_are_refused() {
        let pool = Pool::new(1).unwrap();
        let (_, matrix) = matrix(WeightType::F32, 4, 32);
        let input = inputs(2, 0, 32, &pool, Isa::SCALAR);
        multiply(&pool, Isa::SCALAR, &input, &mut [Product { matrix: &matrix, out: &mut [0.0; 7] }]);
    }

    #[test]
    fn wrong_sizes_are_no_matrix() {
        let pool = Pool::new(1).unwrap();
        let pack = |dtype, bytes: usize, n, k| Matrix::pack(&pool, dtype, &vec![0; bytes], n, k);
        assert!(pack(WeightType::F32, 15, 2, 2).is_none());
        assert!(pack(WeightType::Q8_0, 34, 1, 33).is_none());
        assert!(pack(WeightType::F32, 0, 0, 4).is_none());
        assert!(pack(WeightType::F16, 4, usize::MAX, 4).is_none());
        // As many bytes as there are once the product has wrapped.
        for (n, k) in [(1 << 62, 1), (1 << 32, 1 << 30), (1, 1 << 62), (usize::MAX / 4 + 2, 1)] {
            let wrapped = n.wrapping_mul(k).wrapping_mul(4);
            assert!(pack(WeightType::F32, wrapped, n, k).is_none(), "{n} x {k}");
        }
    }
}
