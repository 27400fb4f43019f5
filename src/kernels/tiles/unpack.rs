//! Weights for tiles: F16 as sums of two BF16 or rounded to one, and quantised ones widened to one; and what takes the
//! tiles' place where a single input meets F16.

use std::arch::x86_64::*;

use super::super::formats::{Format, Offset, SUB, VECTOR};
use super::super::input::TILE;
use super::super::simd::LANES;
use super::super::simd::avx512::Avx512;

type S = Avx512<false>;

/// Columns of a tile.
pub const COLUMNS: usize = 32;

/// How far ahead of the columns in hand weights are asked for, in bytes.
pub const AHEAD: usize = 4096;

/// Weights of 32 columns, two of them in a row.
#[repr(C, align(64))]
pub struct Tile([[u8; VECTOR]; TILE]);

/// Adds to round a number to the nearest of eight bits when the bits below are cut off.
const HALF: i32 = 0x8000;

/// The bits of a number that BF16 keeps.
const KEPT: i32 = -0x1_0000;

/// Sixteen rows' weights of up to 32 columns to tiles of their upper and lower parts, with zeros behind the last column. Asks
/// for what is `ahead` bytes behind them.
///
/// # Safety
/// The CPU has AVX-512; the weights are there.
#[target_feature(enable = "avx512f,avx512bw")]
pub unsafe fn unpack(weights: *const u8, columns: usize, ahead: usize, to: *mut [Tile; 2]) {
    let (half, kept) = (_mm512_set1_epi32(HALF), _mm512_set1_epi32(KEPT));
    for pair in 0..COLUMNS / 2 {
        _mm_prefetch::<_MM_HINT_T0>(weights.wrapping_add(pair * VECTOR + ahead).cast());
        // Of two columns: what the nearest of eight bits is in, and the rest, exactly.
        let mut high = [_mm512_setzero_si512(); 2];
        let mut low = [_mm512_setzero_si512(); 2];
        for t in 0..2 {
            let column = 2 * pair + t;
            if column < columns {
                // SAFETY: the column is there.
                let w = unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(weights.add(column * 2 * LANES).cast())) };
                high[t] = _mm512_add_epi32(_mm512_castps_si512(w), half);
                low[t] = _mm512_castps_si512(_mm512_sub_ps(w, _mm512_castsi512_ps(_mm512_and_si512(high[t], kept))));
            }
        }
        for (tile, [first, second]) in [high, low].into_iter().enumerate() {
            let both = _mm512_mask_blend_epi16(0xaaaa_aaaa, _mm512_srli_epi32::<16>(first), second);
            // SAFETY: a tile has a row for each pair.
            unsafe { _mm512_store_si512((&raw mut (*to)[tile].0[pair]).cast(), both) }
        }
    }
}

/// What weights are raised by before bits are cut off, so that it makes numbers of all sizes neither smaller nor greater on
/// the whole: half a unit of the last bit that stays, over the middle of the logarithms of what is before it.
const RAISED: f32 = 1.0 + std::f32::consts::LN_2 / 256.0;

/// Columns from `32 * step` on of a group to a tile of BF16, each within a unit of its last bit of what it stands for.
///
/// A number of eight bits below the first of a mantissa is 256 more than it counts, without a conversion; the multiply-add
/// that scales it takes that back. Bits are cut off rather than rounded, which would be one more operation of five.
///
/// # Safety
/// The CPU has AVX-512; the columns are there.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub unsafe fn widen<F: Format>(group: *const u8, step: usize, _columns: usize, to: *mut Tile) {
    const EIGHT_BITS: i32 = 0xff << 15;
    let exponent = 256f32.to_bits() as i32;
    // Signed ones get a number that is 128 more.
    let (base, first) = match F::OFFSET {
        Offset::Fixed(offset) => (256 + offset, exponent),
        Offset::Signed => (256 + 128, exponent ^ 0x80 << 15),
    };
    // SAFETY: this function's conditions.
    unsafe {
        let block = group.add(step / (F::COLUMNS / SUB) * F::PACKED);
        let sub = step % (F::COLUMNS / SUB);
        let scales = F::scales::<S>(block, sub);
        let w = F::weights::<S>(block, sub);
        let (raised, base) = (_mm512_set1_ps(RAISED), _mm512_set1_ps(base as f32));
        let (kept, first) = (_mm512_set1_epi32(EIGHT_BITS), _mm512_set1_epi32(first));
        let scale = [_mm512_mul_ps(scales.scale[0], raised), _mm512_mul_ps(scales.scale[1], raised)];
        let min = [_mm512_mul_ps(scales.min[0], raised), _mm512_mul_ps(scales.min[1], raised)];
        let lowered = [_mm512_fmadd_ps(scale[0], base, min[0]), _mm512_fmadd_ps(scale[1], base, min[1])];
        for j in 0..8 {
            let half = if F::HALVES { j / 4 } else { 0 };
            let mut columns = [
                _mm512_slli_epi32::<15>(w[j]),
                _mm512_slli_epi32::<7>(w[j]),
                _mm512_srli_epi32::<1>(w[j]),
                _mm512_srli_epi32::<9>(w[j]),
            ];
            for column in &mut columns {
                // (kept & column) ^ first
                let value = _mm512_castsi512_ps(_mm512_ternarylogic_epi32::<0x78>(first, kept, *column));
                *column = _mm512_castps_si512(_mm512_fmsub_ps(value, scale[half], lowered[half]));
            }
            for pair in 0..2 {
                let below = _mm512_srli_epi32::<16>(columns[2 * pair]);
                let both = _mm512_mask_blend_epi16(0xaaaa_aaaa, below, columns[2 * pair + 1]);
                _mm512_store_si512((&raw mut (*to).0[2 * j + pair]).cast(), both);
            }
        }
    }
}

/// Up to 32 columns of F16 from `32 * step` on to a tile of BF16, each to the nearest, with zeros behind the last column.
///
/// # Safety
/// The CPU has AVX-512 with the instruction for BF16; the columns are there.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub unsafe fn narrow(group: *const u8, step: usize, columns: usize, to: *mut Tile) {
    // Sixteen rows of one column and then of the next: a row's two side by side.
    let order: [u16; 2 * LANES] = std::array::from_fn(|i| (i % 2 * LANES + i / 2) as u16);
    // SAFETY: this function's conditions.
    unsafe {
        let order = _mm512_loadu_si512(order.as_ptr().cast());
        let weights = group.add(step * COLUMNS * 2 * LANES);
        for pair in 0..COLUMNS / 2 {
            let column = |column: usize| match column < columns {
                true => _mm512_cvtph_ps(_mm256_loadu_si256(weights.add(column * 2 * LANES).cast())),
                false => _mm512_setzero_ps(),
            };
            let both = _mm512_cvtne2ps_pbh(column(2 * pair + 1), column(2 * pair));
            let both = _mm512_permutexvar_epi16(order, std::mem::transmute::<__m512bh, __m512i>(both));
            _mm512_store_si512((&raw mut (*to).0[pair]).cast(), both);
        }
    }
}

/// Groups of an F16 matrix with one input.
pub struct Alone<'a> {
    pub weights: *const u8,
    /// (2, k)
    pub halves: &'a [f32],
    pub out: *mut f32,
    pub first: usize,
    pub count: usize,
    pub n: usize,
    pub k: usize,
}

impl Alone<'_> {
    /// # Safety
    /// The CPU has AVX-512; the weights are `count` groups of an F16 matrix packed as
    /// [`Matrix`](super::super::matrix::Matrix) does, `out` is (n) and no other thread's in these groups.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn run(&self) {
        // SAFETY: the groups are there.
        unsafe {
            for group in (0..self.count / 2 * 2).step_by(2) {
                self.groups::<2>(group);
            }
            if !self.count.is_multiple_of(2) {
                self.groups::<1>(self.count - 1);
            }
        }
    }

    /// `G` groups, two of them so that there is always a chain that no other operation waits for.
    ///
    /// # Safety
    /// As [`run`](Self::run); there are so many.
    #[target_feature(enable = "avx512f")]
    unsafe fn groups<const G: usize>(&self, group: usize) {
        let zero = _mm512_setzero_ps();
        let (half, kept) = (_mm512_set1_epi32(HALF), _mm512_set1_epi32(KEPT));
        let group_bytes = self.k * 2 * LANES;
        let (highs, lows) = self.halves.split_at(self.k);
        let mut sums = [zero; G];
        // SAFETY: this function's conditions. What is asked for ahead need not be there.
        unsafe {
            let weights = self.weights.add(group * group_bytes);
            for step in (0..self.k).step_by(COLUMNS) {
                // Of each product of parts a chain of what is first in a pair of columns, and one of what is second.
                let mut chains = [[[zero; 2]; 3]; G];
                let end = self.k.min(step + COLUMNS);
                for pair in (step..end).step_by(2) {
                    for g in 0..G {
                        let ahead = weights.wrapping_add(g * group_bytes + pair * 2 * LANES + AHEAD);
                        _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                    }
                    for t in 0..2.min(end - pair) {
                        let column = pair + t;
                        let high = _mm512_set1_ps(*highs.get_unchecked(column));
                        let low = _mm512_set1_ps(*lows.get_unchecked(column));
                        for g in 0..G {
                            let w = weights.add(g * group_bytes + column * 2 * LANES);
                            let w = _mm512_cvtph_ps(_mm256_loadu_si256(w.cast()));
                            let w_high = _mm512_add_epi32(_mm512_castps_si512(w), half);
                            let w_high = _mm512_castsi512_ps(_mm512_and_si512(w_high, kept));
                            let (chains, w_low) = (&mut chains[g], _mm512_sub_ps(w, w_high));
                            chains[0][t] = _mm512_fmadd_ps(high, w_low, chains[0][t]);
                            chains[1][t] = _mm512_fmadd_ps(high, w_high, chains[1][t]);
                            chains[2][t] = _mm512_fmadd_ps(low, w_high, chains[2][t]);
                        }
                    }
                }
                for g in 0..G {
                    for chain in chains[g] {
                        sums[g] = _mm512_add_ps(sums[g], _mm512_add_ps(chain[0], chain[1]));
                    }
                }
            }
            for g in 0..G {
                let row = (self.first + group + g) * LANES;
                let rows = LANES.min(self.n - row);
                _mm512_mask_storeu_ps(self.out.add(row), __mmask16::MAX >> (LANES - rows), sums[g]);
            }
        }
    }
}
