//! The inputs of a matrix product: rows of f32, the same in 8 bits for quantised matrices, in BF16 for those of that type,
//! and cut up for AMX's tiles. Several matrices that read the same input (q, k and v; gate and up) share one.

use std::ops::Range;

use half::bf16;

use super::pool::Pool;
use super::rows::{RowsMut, each_row};
use super::simd::{Isa, Kernel, LANES, Simd};
use super::size;

/// Columns that share a scale.
pub const BLOCK: usize = 32;

/// Values below which waking other threads costs more than it saves.
const PARALLEL_FROM: usize = 1 << 15;

/// The greatest value of a block must be above this to count.
const SMALLEST: f32 = 127.0 * f32::MIN_POSITIVE;

/// 32 columns of a row in 8 bits, with what the products need of them: one cache line.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[repr(C, align(64))]
pub struct InputBlock {
    /// The values, over `scale`, from -127 to 127.
    pub values: [i8; BLOCK],
    /// What one unit is worth.
    pub scale: f32,
    /// Sum of the first and of the last 16 values.
    pub sums: [i32; 2],
    /// What a weight's minimum is multiplied by: the same times `-scale`, and the sum of both.
    pub lowered: [f32; 3],
}

/// Rows of a tile.
pub const TILE: usize = 16;

/// 32 columns of a row in BF16: a row of a tile, which is one cache line.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[repr(C, align(64))]
pub struct TileRow(pub [bf16; BLOCK]);

/// How rows are cut up for tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// Values are rounded to the nearest BF16.
    Rounded,
    /// Values are the sum of two BF16, see [`halves`]; the rows that meet weights in BF16 are left out.
    Halved,
    /// The rows that meet weights in BF16 are rounded, others left out.
    Bf16,
}

impl Cut {
    /// Tiles that a tile's values take.
    pub fn parts(self) -> usize {
        match self {
            Cut::Rounded | Cut::Bf16 => 1,
            Cut::Halved => 2,
        }
    }
}

/// Rows cut up for tiles, see [`Input::tiles`].
#[derive(Clone, Copy)]
pub struct TileRows<'a> {
    lines: &'a [TileRow],
    first: usize,
    rows: usize,
    steps: usize,
    cut: Cut,
}

impl TileRows<'_> {
    /// The input's row that is the first here.
    pub fn first(&self) -> usize {
        self.first
    }

    /// How many rows there are.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Tiles that the rows make.
    pub fn chunks(&self) -> usize {
        self.rows.div_ceil(TILE)
    }

    /// Rows of tile `chunk`: more than two tiles are whole, the last with zeros; of one or two it has as many as there are.
    pub fn rows_of(&self, chunk: usize) -> usize {
        if self.chunks() > 2 { TILE } else { TILE.min(self.rows - TILE * chunk) }
    }

    /// The first row of a tile's columns from `32 * step` on. The other rows lie behind it, then those of the next part or
    /// step.
    pub fn tile(&self, chunk: usize, step: usize) -> *const TileRow {
        assert!(chunk < self.chunks() && step < self.steps, "no such tile");
        self.lines[self.cut.parts() * (TILE * chunk * self.steps + step * self.rows_of(chunk))..].as_ptr()
    }

    /// How they are cut.
    pub fn cut(&self) -> Cut {
        self.cut
    }
}

/// Rows of inputs. Keeps its memory from step to step.
#[derive(Default)]
pub struct Input {
    rows: usize,
    bf16_rows: usize,
    columns: usize,
    values: Vec<f32>,        // (rows, columns)
    blocks: Vec<InputBlock>, // (columns / BLOCK, `quantised`)
    quantised: usize,
    pairs: Vec<[bf16; 2]>, // (rows, columns / 2, rounded up)
    rounded: bool,
    tiles: [Tiles; 3], // by `Cut`
    halves: Vec<f32>,  // (2, columns), of the first row
    halved: bool,
}

/// Rows cut up.
#[derive(Default)]
struct Tiles {
    lines: Vec<TileRow>, // (chunks, columns / BLOCK rounded up, parts, rows of the chunk)
    made: bool,
}

impl Input {
    /// Makes room for `rows` rows of `columns` values and lends them for writing; what was in them is unspecified. The last
    /// `bf16_rows` of them meet weights in BF16 where there are tiles, unless these are F32.
    pub fn reset(&mut self, rows: usize, bf16_rows: usize, columns: usize) -> &mut [f32] {
        assert!(bf16_rows <= rows, "{bf16_rows} of {rows} rows");
        let len = size::product("rows and columns of an input", [rows, columns]);
        if self.values.len() < len {
            self.values.resize(len, 0.0);
        }
        // Once there is room, so that the sizes are true even if an allocation has failed.
        (self.rows, self.bf16_rows, self.columns) = (rows, bf16_rows, columns);
        (self.quantised, self.rounded, self.halved) = (0, false, false);
        self.tiles.iter_mut().for_each(|tiles| tiles.made = false);
        &mut self.values[..len]
    }

    /// Bytes that it keeps.
    pub fn bytes(&self) -> u64 {
        let values = (self.values.capacity() + self.halves.capacity()) * size_of::<f32>();
        let pairs = self.pairs.capacity() * size_of::<[bf16; 2]>();
        let tiles: usize = self.tiles.iter().map(|tiles| tiles.lines.capacity()).sum();
        let lines = self.blocks.capacity() * size_of::<InputBlock>() + tiles * size_of::<TileRow>();
        (values + pairs + lines) as u64
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The first that meets weights in BF16.
    pub fn first_bf16(&self) -> usize {
        self.rows - self.bf16_rows
    }

    /// Their length.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The rows: (rows, columns).
    pub fn values(&self) -> &[f32] {
        &self.values[..self.rows * self.columns]
    }

    /// The rows, to write; 8-bit blocks and pairs are not made anew.
    pub fn values_mut(&mut self) -> &mut [f32] {
        &mut self.values[..self.rows * self.columns]
    }

    /// The first rows in 8 bits, as many as have been asked for: block `b` of row `i` at `b * rows + i`, so that a product
    /// that goes through the columns of a matrix once reads them in order. Empty until they have been made.
    pub fn blocks(&self) -> &[InputBlock] {
        &self.blocks[..self.columns / BLOCK * self.quantised]
    }

    /// Makes the 8-bit blocks of the first rows. The length of the rows must be a multiple of [`BLOCK`].
    pub fn quantise(&mut self, pool: &Pool, isa: Isa, rows: usize) {
        assert!(self.columns.is_multiple_of(BLOCK), "rows of {} values are no whole blocks", self.columns);
        assert!(rows <= self.rows, "blocks of {rows} rows of {}", self.rows);
        let columns = self.columns;
        let count = size::product("blocks of an input", [columns / BLOCK, rows]);
        if self.blocks.len() < count {
            self.blocks.resize(count, InputBlock::default());
        }
        let blocks = Blocks(self.blocks.as_mut_ptr());
        let values = &self.values;
        let row = |i: usize| {
            let blocks = &blocks;
            let kernel =
                Quantise { values: &values[i * columns..(i + 1) * columns], to: blocks.0, first: i, step: rows };
            // SAFETY: the blocks of row `i` lie within `count` and no other row's
            // kernel writes them.
            unsafe { isa.run(kernel) }
        };
        match rows * columns < PARALLEL_FROM {
            true => (0..rows).for_each(row),
            false => pool.for_each(rows, row),
        }
        self.quantised = rows;
    }

    /// The rows in BF16, two columns together, the last one of an odd number with a zero. Empty until they have been made.
    pub fn pairs(&self) -> &[[bf16; 2]] {
        let count = if self.rounded { self.columns.div_ceil(2) * self.rows } else { 0 };
        &self.pairs[..count]
    }

    /// Makes the pairs: each value is rounded to the nearest, ties to even.
    pub fn round(&mut self, pool: &Pool, isa: Isa) {
        let (rows, columns) = (self.rows, self.columns);
        let count = size::product("pairs of an input", [columns.div_ceil(2), rows]);
        if self.pairs.len() < count {
            self.pairs.resize(count, [bf16::ZERO; 2]);
        }
        let (values, pairs) = (&self.values[..rows * columns], &mut self.pairs[..count]);
        each_row(pool, [RowsMut::new(pairs, columns.div_ceil(2))], |row, [pairs]| {
            let values = &values[row * columns..][..columns];
            isa.compile(|| {
                let (twos, rest) = values.as_chunks::<2>();
                for (pair, two) in pairs.iter_mut().zip(twos) {
                    *pair = two.map(to_bf16);
                }
                if let [last] = rest {
                    pairs[twos.len()] = [to_bf16(*last), bf16::ZERO];
                }
            });
        });
        self.rounded = true;
    }

    /// The rows in BF16 by sixteen, for tiles. `None` until they have been made.
    pub fn tiles(&self, cut: Cut) -> Option<TileRows<'_>> {
        let (rows, steps) = (self.rows_to_cut(cut), self.columns.div_ceil(BLOCK));
        let Tiles { lines, made } = &self.tiles[cut as usize];
        let there = *made && !rows.is_empty();
        there.then_some(TileRows { lines, first: rows.start, rows: rows.len(), steps, cut })
    }

    /// The rows that are cut in a way.
    pub fn rows_to_cut(&self, cut: Cut) -> Range<usize> {
        match cut {
            Cut::Rounded => 0..self.rows,
            Cut::Halved => 0..self.first_bf16(),
            Cut::Bf16 => self.first_bf16()..self.rows,
        }
    }

    /// Makes the tiles.
    pub fn cut(&mut self, pool: &Pool, isa: Isa, cut: Cut) {
        let (first, columns) = (self.rows_to_cut(cut).start, self.columns);
        let rows = self.rows_to_cut(cut).len();
        let steps = columns.div_ceil(BLOCK);
        let chunks = rows.div_ceil(TILE);
        let padded = if chunks > 2 { chunks * TILE } else { rows };
        let count = size::product("tiles of an input", [cut.parts(), padded, steps]);
        let Tiles { lines, made } = &mut self.tiles[cut as usize];
        if lines.len() < count {
            lines.resize(count, TileRow::default());
        }
        *made = true;
        let values = &self.values[first * columns..];
        let lines = Lines(lines.as_mut_ptr());
        let row = |row: usize| {
            let lines = &lines;
            let (chunk, of_chunk) = (row / TILE, if chunks > 2 { TILE } else { TILE.min(rows - row / TILE * TILE) });
            isa.compile(|| {
                for step in 0..steps {
                    let mut x = [0f32; BLOCK];
                    if row < rows {
                        let from = &values[row * columns..(row + 1) * columns][step * BLOCK..];
                        match from.first_chunk::<BLOCK>() {
                            Some(whole) => x = *whole,
                            None => x[..from.len()].copy_from_slice(from),
                        }
                    }
                    let line = cut.parts() * (TILE * chunk * steps + step * of_chunk) + row % TILE;
                    // SAFETY: there are lines for the parts of `padded` rows, and each row has its own.
                    unsafe {
                        match cut {
                            Cut::Rounded | Cut::Bf16 => lines.0.add(line).write(TileRow(x.map(to_bf16))),
                            Cut::Halved => {
                                let halves = x.map(halves);
                                lines.0.add(line).write(TileRow(halves.map(|[high, _]| to_bf16(high))));
                                lines.0.add(line + of_chunk).write(TileRow(halves.map(|[_, low]| to_bf16(low))));
                            }
                        }
                    }
                }
            });
        };
        match rows * columns < PARALLEL_FROM {
            true => (0..padded).for_each(row),
            false => pool.for_each(padded, row),
        }
    }

    /// The [`halves`] of the values of a single row: (2, columns). Empty until they have been made.
    pub fn halves(&self) -> &[f32] {
        let count = if self.halved { 2 * self.columns } else { 0 };
        &self.halves[..count]
    }

    /// Makes the halves of the first row.
    pub fn halve(&mut self, isa: Isa) {
        let columns = self.columns;
        if self.halves.len() < 2 * columns {
            self.halves.resize(2 * columns, 0.0);
        }
        let (values, (highs, lows)) = (&self.values[..columns], self.halves[..2 * columns].split_at_mut(columns));
        isa.compile(|| {
            for ((value, high), low) in values.iter().zip(highs).zip(lows) {
                [*high, *low] = halves(*value);
            }
        });
        self.halved = true;
    }
}

/// Two numbers of eight bits each that are the value up to a part of 2^-17 of it: the nearest one and the nearest to the
/// rest. Parts that are tiny are zero, so that no product with a weight of F16 is a subnormal number, which tiles take for
/// zero. Lost values have no second part.
#[inline(always)]
pub fn halves(value: f32) -> [f32; 2] {
    // F16 are multiples of 2^-24 and these of 2^-102, so products and sums are multiples of the smallest normal number.
    const TINY: f32 = f32::from_bits((127 - 95) << 23);
    let nearest = |value: f32| f32::from_bits(value.to_bits().wrapping_add(0x8000) & 0xffff_0000);
    let kept = |part: f32| if part.abs() >= TINY { part } else { 0.0 };
    let high = if value.is_finite() { kept(nearest(value)) } else { value };
    // Of what is infinite or none the rest is none, which is not kept.
    [high, kept(nearest(value - high))]
}

/// Without a branch, so that the compiler makes vectors of it.
#[inline(always)]
fn to_bf16(value: f32) -> bf16 {
    let bits = value.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
    // A rounded NaN might be none.
    bf16::from_bits(if value.is_nan() { (bits >> 16) as u16 | 0x40 } else { rounded })
}

/// A pointer that threads share.
struct Blocks(*mut InputBlock);
// SAFETY: each thread writes the blocks of its own rows.
unsafe impl Sync for Blocks {}

/// The same to rows of tiles.
struct Lines(*mut TileRow);
// SAFETY: as above.
unsafe impl Sync for Lines {}

/// One row to 8 bits: block `b` goes to `to[b * step + first]`.
struct Quantise<'a> {
    values: &'a [f32],
    to: *mut InputBlock,
    first: usize,
    step: usize,
}

impl Kernel for Quantise<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for (b, values) in self.values.chunks_exact(BLOCK).enumerate() {
            // SAFETY: 32 values are two vectors; the destination is this row's own block.
            unsafe {
                let (low, high) = (S::load(values.as_ptr()), S::load(values.as_ptr().add(LANES)));
                // Of an infinite value or NaN the scale is that too and carries it to the product's results.
                let greatest = S::greatest_abs(low, high);
                let scale = greatest / 127.0;
                // Below that the quotient would be infinite; such values count as zeros.
                let inverse = S::splat(if greatest > SMALLEST { 127.0 / greatest } else { 0.0 });
                let (low, high) = (S::round(S::mul(low, inverse)), S::round(S::mul(high, inverse)));
                let sums = [S::sum_i(low), S::sum_i(high)];
                let block = &mut *self.to.add(b * self.step + self.first);
                S::store_i8(block.values.as_mut_ptr(), low);
                S::store_i8(block.values.as_mut_ptr().add(LANES), high);
                block.scale = scale;
                block.sums = sums;
                let scaled = [scale * sums[0] as f32, scale * sums[1] as f32];
                block.lowered = [-scaled[0], -scaled[1], -(scaled[0] + scaled[1])];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "rows and columns of an input: [4611686018427387904, 4] multiplied")]
    fn rows_that_no_memory_has_are_refused() {
        Input::default().reset(1 << 62, 0, 4);
    }

    #[test]
    fn a_refused_size_leaves_the_input_as_it_was() {
        let mut input = Input::default();
        input.reset(2, 1, 32).fill(3.0);
        for (rows, columns) in [(1 << 62, 4), (1 << 59, 4), (usize::MAX, 1)] {
            let reset = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| input.reset(rows, 0, columns).len()));
            assert!(reset.is_err(), "{rows} rows of {columns}");
            assert_eq!((input.rows(), input.columns(), input.values()), (2, 32, &[3.0; 64][..]));
        }
    }

    #[test]
    #[should_panic(expected = "blocks of 3 rows of 2")]
    fn blocks_are_made_of_rows_that_there_are() {
        let mut input = Input::default();
        input.reset(2, 0, 32);
        input.quantise(&Pool::new(1).unwrap(), Isa::SCALAR, 3);
    }

    #[test]
    fn blocks_hold_the_rows_to_half_a_unit_on_every_instruction_set() {
        let pool = Pool::new(2).unwrap();
        let (rows, columns) = (3, 96);
        let mut made = Vec::new();
        for isa in Isa::available() {
            let mut input = Input::default();
            let values = input.reset(rows, 0, columns);
            for (i, v) in values.iter_mut().enumerate() {
                *v = ((i * 7919 + 13) % 2003) as f32 / 1001.5 - 1.0;
            }
            values[..32].fill(0.0);
            values[40] = 1e30;
            values[70] = -1e-38;
            values[96..128].fill(1e-40);
            input.quantise(&pool, isa, rows);
            for i in 0..rows {
                for b in 0..columns / BLOCK {
                    let block = &input.blocks()[b * rows + i];
                    let values = &input.values()[i * columns + b * BLOCK..][..BLOCK];
                    for (q, v) in block.values.iter().zip(values) {
                        assert!(
                            (*q as f32 * block.scale - v).abs() <= block.scale * 0.5001 + SMALLEST,
                            "{isa} {q} {v}"
                        );
                    }
                    for half in 0..2 {
                        let sum: i32 = block.values[16 * half..][..16].iter().map(|&q| q as i32).sum();
                        assert_eq!((block.sums[half], block.lowered[half]), (sum, -(block.scale * sum as f32)));
                    }
                    assert_eq!(block.lowered[2], block.lowered[0] + block.lowered[1]);
                }
            }
            made.push(input.blocks().to_vec());
        }
        assert!(made.iter().all(|blocks| *blocks == made[0]));
    }
}
