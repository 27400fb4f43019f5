//! Products with quantised matrices: 32 columns at a time, unpacked once for all inputs.

use super::super::buffer::Line;
use super::super::formats::{Format, Offset, SUB, Scales, VECTOR};
use super::super::input::InputBlock;
use super::super::simd::{Kernel, LANES, Simd};
use super::put;

/// Inputs that a group is multiplied with at a time: their 8-bit blocks, a cache line each, stay in a core's caches.
pub(super) const INPUT_TILE: usize = 128;

/// Groups of a quantised matrix with inputs `start..start + tile` of `m`.
pub(super) struct Quantised<'a, F> {
    pub weights: *const u8,
    pub input: &'a [InputBlock],
    pub m: usize,
    pub start: usize,
    pub tile: usize,
    pub out: *mut f32,
    pub first: usize,
    pub count: usize,
    pub n: usize,
    pub k: usize,
    pub format: std::marker::PhantomData<F>,
}

impl<F: Format> Kernel for Quantised<'_, F> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let mut sums = [[Line::ZERO; 1]; INPUT_TILE];
        for group in 0..self.count {
            // SAFETY: the group is there.
            unsafe { self.run_groups::<S, 1, false>(group, &mut sums) }
        }
    }
}

/// The same for several inputs: where the registers hold the weights of two groups, an input's values are loaded once for
/// both. A kernel of its own, since one text for both makes the compiler spare on a single input.
pub(super) struct Paired<'a, F>(pub Quantised<'a, F>);

/// Inputs from which two groups at a time are faster. With fewer, what counts is that memory is read in its order.
pub(super) const PAIRED_FROM: usize = 3;

impl<F: Format> Kernel for Paired<'_, F> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let pairs = if S::REGISTERS >= 32 { self.0.count / 2 } else { 0 };
        let mut sums = [[Line::ZERO; 2]; INPUT_TILE];
        for pair in 0..pairs {
            // SAFETY: the groups are there.
            unsafe { self.0.run_groups::<S, 2, true>(2 * pair, &mut sums) }
        }
        let mut sums = [[Line::ZERO; 1]; INPUT_TILE];
        for group in 2 * pairs..self.0.count {
            // SAFETY: as above.
            unsafe { self.0.run_groups::<S, 1, true>(group, &mut sums) }
        }
    }
}

impl<F: Format> Quantised<'_, F> {
    /// `G` groups side by side, from `group` on, with one or `SEVERAL` inputs. `sums` is room for those of the inputs.
    #[inline(always)]
    unsafe fn run_groups<S: Simd, const G: usize, const SEVERAL: bool>(
        &self,
        group: usize,
        sums: &mut [[Line; G]; INPUT_TILE],
    ) {
        let group_bytes = self.k / F::COLUMNS * F::PACKED;
        // SAFETY: the groups lie within the weights; block `b` of input `i` lies at `b * m + i`.
        unsafe {
            let weights = self.weights.add(group * group_bytes);
            sums[..self.tile].fill([Line::ZERO; G]);
            for super_block in 0..self.k / F::COLUMNS {
                let mut blocks = [weights.add(super_block * F::PACKED); G];
                for g in 1..G {
                    blocks[g] = blocks[0].add(g * group_bytes);
                }
                for sub in 0..F::COLUMNS / SUB {
                    let column_block = super_block * (F::COLUMNS / SUB) + sub;
                    let inputs = self.input.as_ptr().add(column_block * self.m + self.start);
                    multiply_sub::<S, F, G, SEVERAL>(blocks, sub, inputs, &mut sums[..self.tile]);
                }
            }
            for (i, sums) in sums[..self.tile].iter().enumerate() {
                let out = self.out.add((self.start + i) * self.n);
                for g in 0..G {
                    put::<S>(S::load(sums[g].0.as_ptr()), out, (self.first + group + g) * LANES, self.n);
                }
            }
        }
    }
}

/// 32 columns of `G` groups with all inputs of the tile.
#[inline(always)]
unsafe fn multiply_sub<S: Simd, F: Format, const G: usize, const SEVERAL: bool>(
    blocks: [*const u8; G],
    sub: usize,
    inputs: *const InputBlock,
    sums: &mut [[Line; G]],
) {
    // SAFETY: `inputs` has as many blocks as `sums`; the blocks are whole.
    unsafe {
        let distance = if sums.len() < PAIRED_FROM { FAR_AHEAD } else { AHEAD };
        // No `map`: a closure of it would not be compiled for the instruction set.
        let mut scales = [F::scales::<S>(blocks[0], sub); G];
        let mut w = [F::weights::<S>(blocks[0], sub); G];
        for g in 1..G {
            scales[g] = F::scales::<S>(blocks[g], sub);
            w[g] = F::weights::<S>(blocks[g], sub);
        }
        // Several inputs in step, where registers hold their sums, since each product waits for the one before it of its
        // input, or where they share work.
        let most = const {
            match (G > 1, F::HALVES) {
                (true, false) => 4,
                (true, true) => 2,
                _ if SEVERAL && fits_u5::<S, F>() => 4,
                _ => 1,
            }
        };
        // The hardware's own prefetcher keeps up neither with the pauses between two columns' weights while several inputs
        // are multiplied, nor, with one, with how much has to be under way at once.
        let ahead = sub * F::SUB_BYTES + distance;
        let lines = const { F::SUB_BYTES / VECTOR };
        let (mut i, mut line, mut due, count) = (0, 0, 0, sums.len());
        if count == 1 {
            for line in 0..lines {
                prefetch::<S, G>(blocks, ahead + line * VECTOR);
            }
        }
        let sums = sums.as_mut_ptr();
        while i < count {
            let step = match count - i {
                left if left >= most => most,
                2.. if const { fits_u5::<S, F>() } => 2,
                _ => 1,
            };
            // Spread over the inputs: what is asked for beyond what a core can have under way makes everything behind it wait.
            due += lines * step;
            while count > 1 && due >= count {
                prefetch::<S, G>(blocks, ahead + line * VECTOR);
                (line, due) = (line + 1, due - count);
            }
            let (x, sums) = (inputs.add(i), sums.add(i));
            match step {
                4 => multiply_inputs::<S, F, G, 4>(&w, &scales, x, sums),
                2 => multiply_inputs::<S, F, G, 2>(&w, &scales, x, sums),
                _ => multiply_inputs::<S, F, G, 1>(&w, &scales, x, sums),
            }
            i += step;
        }
    }
}

/// Asks for a cache line of each group, this far behind its block.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
unsafe fn prefetch<S: Simd, const G: usize>(blocks: [*const u8; G], ahead: usize) {
    for block in blocks {
        // SAFETY: this function's condition.
        unsafe { S::prefetch(block.wrapping_add(ahead)) }
    }
}

/// The same 32 columns with `I` inputs.
///
/// # Safety
/// As [`Simd`]; there are `I` inputs and sums.
#[inline(always)]
unsafe fn multiply_inputs<S: Simd, F: Format, const G: usize, const I: usize>(
    w: &[[S::B; 8]; G],
    scales: &[Scales<S>; G],
    inputs: *const InputBlock,
    sums: *mut [Line; G],
) {
    // SAFETY: this function's conditions.
    unsafe {
        let mut dots = [[[S::splat_i(0); 2]; G]; I];
        for i in 0..I {
            let x = &*inputs.add(i);
            let first = S::splat_i(start::<F>(x, 0, S::I8_OFFSET));
            let second = if F::HALVES { S::splat_i(start::<F>(x, 1, S::I8_OFFSET)) } else { first };
            dots[i] = [[first, second]; G];
        }
        if I > 1 && const { fits_u5::<S, F>() } {
            for four in 0..2 {
                let half = if F::HALVES { four } else { 0 };
                let mut x = [(*inputs).values.as_ptr(); I];
                for i in 0..I {
                    x[i] = (*inputs.add(i)).values.as_ptr().add(16 * four);
                }
                for g in 0..G {
                    let mut sums = [dots[0][g][half]; I];
                    for i in 1..I {
                        sums[i] = dots[i][g][half];
                    }
                    sums = S::dots_u5(sums, &w[g].as_chunks::<4>().0[four], x);
                    for i in 0..I {
                        dots[i][g][half] = sums[i];
                    }
                }
            }
        } else {
            for j in 0..8 {
                let half = if F::HALVES { j / 4 } else { 0 };
                for i in 0..I {
                    let values = (*inputs.add(i)).values.as_ptr().add(4 * j);
                    for g in 0..G {
                        dots[i][g][half] = match F::OFFSET {
                            Offset::Fixed(_) => S::dot_u7(dots[i][g][half], w[g][j], values),
                            Offset::Signed => S::dot_i8(dots[i][g][half], w[g][j], values),
                        };
                    }
                }
            }
        }
        for i in 0..I {
            for g in 0..G {
                let sum = (*sums.add(i))[g].0.as_mut_ptr();
                S::store(sum, add_sub::<S, F>(S::load(sum), dots[i][g], &*inputs.add(i), &scales[g]));
            }
        }
    }
}

/// Whether a format's values are small enough for [`Simd::dots_u5`], and that is of use.
const fn fits_u5<S: Simd, F: Format>() -> bool {
    S::HAS_DOTS_U5 && F::LOW + F::HIGH <= 5
}

/// What the dot products of 32 columns with an input, or of one half of them, begin with, so that they end lowered by the
/// format's offset. `signed` is what the instruction adds to signed weights.
#[inline(always)]
fn start<F: Format>(x: &InputBlock, half: usize, signed: i32) -> i32 {
    let total = if F::HALVES { x.sums[half] } else { x.sums[0].wrapping_add(x.sums[1]) };
    // An infinite input has no sum worth the name; its scale carries it to the result.
    match F::OFFSET {
        Offset::Fixed(offset) => total.wrapping_mul(-offset),
        Offset::Signed => total.wrapping_mul(-signed),
    }
}

/// Adds what 32 columns give, from their dot products: one of all, or one of each half.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
unsafe fn add_sub<S: Simd, F: Format>(mut acc: S::F, dots: [S::I; 2], x: &InputBlock, scales: &Scales<S>) -> S::F {
    // SAFETY: this function's condition.
    unsafe {
        let unit = S::splat(x.scale);
        acc = S::fma(S::to_f32(dots[0]), S::mul(scales.scale[0], unit), acc);
        if F::HALVES {
            acc = S::fma(S::to_f32(dots[1]), S::mul(scales.scale[1], unit), acc);
        }
        if F::MINIMA {
            if F::HALVES {
                acc = S::fma(scales.min[0], S::splat(x.lowered[0]), acc);
                acc = S::fma(scales.min[1], S::splat(x.lowered[1]), acc);
            } else {
                acc = S::fma(scales.min[0], S::splat(x.lowered[2]), acc);
            }
        }
        acc
    }
}

/// How far ahead of the columns in hand weights are asked for, in bytes.
const AHEAD: usize = 2048;

/// The same with few inputs, when a core waits for nothing but memory: what arrives in the time that an access takes.
const FAR_AHEAD: usize = 8192;
