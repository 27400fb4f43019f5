//! Products with matrices of F32, F16 and BF16, some groups side by side and a few inputs at a time.

use std::mem::MaybeUninit;

use half::{bf16, f16};

use super::super::buffer::Line;
use super::super::formats::VECTOR;
use super::super::simd::{Kernel, LANES, Simd};
use super::put;
use crate::weights::WeightType;

/// Groups of a dense matrix with all inputs.
pub(super) struct Dense {
    pub dtype: WeightType,
    pub weights: *const u8,
    /// Values, or of BF16 pairs.
    pub input: *const u8,
    pub m: usize,
    pub out: *mut f32,
    pub first: usize,
    pub count: usize,
    pub n: usize,
    pub k: usize,
}

/// Inputs that a tile of dense groups is multiplied with at a time.
const DENSE_INPUTS: usize = 6;

/// The same where there are few registers, and each input and weight takes two.
const FEW_INPUTS: usize = 4;

/// Dense groups that are multiplied side by side.
const WIDE: usize = 4;

/// Times that a few inputs of a dense product take their turn up to which memory is what to look after.
const FEW_TURNS: usize = 6;

/// Bytes of dense groups that inputs take turns with then: with the next ones they fit into a core's first cache.
const PART: usize = 16 << 10;

/// Steps of columns between two requests for lines ahead.
const STRETCH: usize = 8;

/// How far ahead of the columns in hand weights are asked for where all inputs are multiplied in one turn, in bytes.
const AHEAD: usize = 8192;

impl Kernel for Dense {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the pointers are what `multiply` has checked.
        unsafe {
            match self.dtype {
                WeightType::F16 => self.run_type::<S, f16>(),
                _ => self.run_type::<S, f32>(),
            }
        }
    }
}

/// The same of BF16, with inputs that are rounded to it: twice the multiplications in an instruction where there is one.
pub(super) struct Rounded(pub Dense);

impl Kernel for Rounded {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: as of `Dense`.
        unsafe { self.0.run_type::<S, [bf16; 2]>() }
    }
}

/// What a row has of a dense matrix for a step of a product.
///
/// # Safety of all functions
/// As of [`Simd`]: pointers to weights have sixteen, those to inputs one.
trait Value: Copy {
    /// Columns of a step.
    const COLUMNS: usize;
    /// What an input has for it.
    type X;
    /// Sixteen rows' weights in registers.
    type W<S: Simd>: Copy;

    unsafe fn load<S: Simd>(from: *const Self) -> Self::W<S>;
    unsafe fn multiply_add<S: Simd>(w: Self::W<S>, x: *const Self::X, sum: S::F) -> S::F;
}

// SAFETY of all blocks: the trait's conditions.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Value for f32 {
    const COLUMNS: usize = 1;
    type X = f32;
    type W<S: Simd> = S::F;

    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const f32) -> S::F {
        unsafe { S::load(from) }
    }

    #[inline(always)]
    unsafe fn multiply_add<S: Simd>(w: S::F, x: *const f32, sum: S::F) -> S::F {
        unsafe { S::fma(w, S::splat(*x), sum) }
    }
}

// SAFETY of all blocks: the trait's conditions.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Value for f16 {
    const COLUMNS: usize = 1;
    type X = f32;
    type W<S: Simd> = S::F;

    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const f16) -> S::F {
        unsafe { S::load_f16(from) }
    }

    #[inline(always)]
    unsafe fn multiply_add<S: Simd>(w: S::F, x: *const f32, sum: S::F) -> S::F {
        unsafe { S::fma(w, S::splat(*x), sum) }
    }
}

// SAFETY of all blocks: the trait's conditions.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Value for [bf16; 2] {
    const COLUMNS: usize = 2;
    type X = [bf16; 2];
    type W<S: Simd> = S::B;

    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const [bf16; 2]) -> S::B {
        unsafe { S::load_bytes(from.cast()) }
    }

    #[inline(always)]
    unsafe fn multiply_add<S: Simd>(w: S::B, x: *const [bf16; 2], sum: S::F) -> S::F {
        unsafe { S::dot_bf16(sum, w, x) }
    }
}

/// The sums of an input with groups that are multiplied side by side.
type Sums = [Line; WIDE];

/// Where a tile of a dense product is in the columns of its groups.
struct Part {
    /// Steps of columns that it multiplies.
    steps: std::ops::Range<usize>,
    /// Room for its inputs' sums, written by a part and read by the next.
    sums: *mut Sums,
    /// Lines that it asks for in each stretch, of those which lie `distance` steps ahead.
    ahead: std::ops::Range<usize>,
    distance: usize,
}

impl Dense {
    #[inline(always)]
    unsafe fn run_type<S: Simd, V: Value>(&self) {
        // Groups side by side where there are enough registers for their sums, or only one input.
        // SAFETY: `run_groups` is called for groups and inputs that there are.
        unsafe {
            let wide = if S::REGISTERS >= 32 || self.m == 1 { WIDE } else { 1 };
            // Not filled with zeros: that would be longer than a product with one input of a small model.
            let mut room = MaybeUninit::<[Sums; FEW_TURNS * DENSE_INPUTS]>::uninit();
            let sums = room.as_mut_ptr().cast::<Sums>();
            let mut group = 0;
            while group < self.count {
                if wide == WIDE && self.count - group >= WIDE {
                    self.run_groups::<S, V, WIDE>(group, sums);
                    group += WIDE;
                } else {
                    self.run_groups::<S, V, 1>(group, sums);
                    group += 1;
                }
            }
        }
    }

    /// `G` groups with all inputs, a few of them at a time. With more than that the groups are gone through in parts, and
    /// while the inputs take turns with a part the next one is fetched: memory would stand idle in all turns but the first.
    /// With many inputs it may, and putting sums away costs more than waiting. Where few inputs are multiplied with one group
    /// the same is asked for without parts: the hardware's own prefetcher does not keep up there.
    #[inline(always)]
    unsafe fn run_groups<S: Simd, V: Value, const G: usize>(&self, group: usize, sums: *mut Sums) {
        // Two columns' weights and an input's take twice the registers.
        let most = if S::REGISTERS < 32 && V::COLUMNS > 1 { FEW_INPUTS } else { DENSE_INPUTS };
        let steps = self.k.div_ceil(V::COLUMNS);
        let turns = self.m.div_ceil(most);
        let in_parts = (2..=FEW_TURNS).contains(&turns);
        let part = if in_parts { PART / G / (LANES * size_of::<V>()) } else { steps };
        let distance = if in_parts { part } else { AHEAD / (LANES * size_of::<V>()) };
        let ahead = in_parts || G == 1 && turns == 1 && self.m > 1;
        let lines = if ahead { G * STRETCH * LANES * size_of::<V>() / VECTOR } else { 0 };
        for first in (0..steps).step_by(part) {
            for turn in 0..turns {
                let start = turn * most;
                let count = most.min(self.m - start);
                let part = Part {
                    steps: first..steps.min(first + part),
                    sums: sums.wrapping_add(start),
                    // In proportion to its inputs, that is to its time.
                    ahead: start * lines / self.m..(start + count) * lines / self.m,
                    distance,
                };
                // SAFETY: the groups and inputs are there.
                unsafe {
                    match count {
                        1 => self.tile::<S, V, G, 1>(group, start, part),
                        2 => self.tile::<S, V, G, 2>(group, start, part),
                        3 => self.tile::<S, V, G, 3>(group, start, part),
                        4 => self.tile::<S, V, G, 4>(group, start, part),
                        5 => self.tile::<S, V, G, 5>(group, start, part),
                        _ => self.tile::<S, V, G, 6>(group, start, part),
                    }
                }
            }
        }
    }

    /// `G` groups with `M` inputs: every result is one chain of multiply-adds over the columns.
    #[inline(always)]
    unsafe fn tile<S: Simd, V: Value, const G: usize, const M: usize>(&self, group: usize, start: usize, part: Part) {
        let steps = self.k.div_ceil(V::COLUMNS);
        let lines = STRETCH * LANES * size_of::<V>() / VECTOR;
        // SAFETY: a group is as many vectors of `V` as there are steps, and an input has as many `X`; `part.sums` has
        // room for `M` unless the part is all steps, and what the part before has written. What is asked for ahead need not be there.
        unsafe {
            let weights = self.weights.cast::<V>().add(group * steps * LANES);
            let input = self.input.cast::<V::X>().add(start * steps);
            // By index: a loop over references would keep the sums in memory.
            let mut sums = [[S::splat(0.0); G]; M];
            if part.steps.start > 0 {
                for i in 0..M {
                    for g in 0..G {
                        sums[i][g] = S::load(part.sums.add(i).cast::<f32>().add(g * LANES));
                    }
                }
            }
            let stretch = if part.ahead.is_empty() { part.steps.len() } else { STRETCH };
            let mut from = part.steps.start;
            while from < part.steps.end {
                let to = part.steps.end.min(from + stretch);
                // Behind the last step the next groups begin.
                let next = from + part.distance;
                let next = if next < steps { next } else { next + (G - 1) * steps };
                for line in part.ahead.clone() {
                    let column = weights.wrapping_add((line / lines * steps + next) * LANES);
                    S::prefetch(column.cast::<u8>().wrapping_add(line % lines * VECTOR));
                }
                for step in from..to {
                    let mut w = [V::load::<S>(weights.add(step * LANES)); G];
                    for g in 1..G {
                        w[g] = V::load::<S>(weights.add((g * steps + step) * LANES));
                    }
                    for i in 0..M {
                        let x = input.add(i * steps + step);
                        for g in 0..G {
                            sums[i][g] = V::multiply_add::<S>(w[g], x, sums[i][g]);
                        }
                    }
                }
                from = to;
            }
            if part.steps.end < steps {
                for i in 0..M {
                    for g in 0..G {
                        S::store(part.sums.add(i).cast::<f32>().add(g * LANES), sums[i][g]);
                    }
                }
                return;
            }
            for i in 0..M {
                for g in 0..G {
                    let out = self.out.add((start + i) * self.n);
                    put::<S>(sums[i][g], out, (self.first + group + g) * LANES, self.n);
                }
            }
        }
    }
}
