//! Products of F16 and BF16 matrices on AMX, which multiplies BF16: a tile of sixteen inputs times a tile of sixteen rows,
//! 32 columns at a time, and two by two of them so that each tile that is loaded is used twice.
//!
//! BF16 weights are what a tile wants as they lie there, and inputs are rounded to BF16, as they are on every other
//! instruction set. An F16 weight is the sum of two BF16 numbers, exactly; an input is taken as such a sum too, which keeps
//! 16 of its 24 bits and more; and three of the four products of parts are added up. The fourth is below what is lost.
//!
//! The instruction adds 32 products in an order of its own, so results have other bits than without tiles. One input is
//! therefore multiplied in the same way as many: a row computed alone has the bits of the row computed in a batch here too.

use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::ptr::null;

use super::super::formats::VECTOR;
use super::super::input::{TILE, TileRow, TileRows};
use super::super::simd::avx512::Avx512;
use super::super::simd::{LANES, Simd};
use super::Config;
use crate::weights::WeightType;

/// Columns of a step.
const COLUMNS: usize = 32;

/// Bytes of a tile.
const BYTES: usize = TILE * VECTOR;

/// Tiles of inputs that take turns with weights while these are in a core's caches.
const CHUNKS: usize = 8;

/// Bytes of such inputs that stay in a core's second cache while group after group is multiplied with them.
const CACHED: usize = 1 << 20;

/// Steps that the inputs take turns with: of two groups they fit a core's first cache. Weights are asked for so far ahead.
const PART: usize = 8;

/// Tiles of inputs from which on results bypass the caches.
const MANY: usize = 4;

/// Steps that F16 is taken apart for when inputs take no turns.
const FEW: usize = 2;

/// Groups of an F16 or BF16 matrix with all inputs.
pub struct Dense<'a> {
    pub dtype: WeightType,
    pub weights: *const u8,
    pub inputs: TileRows<'a>,
    pub m: usize,
    pub out: *mut f32,
    pub first: usize,
    pub count: usize,
    pub n: usize,
    pub k: usize,
}

/// Sums of sixteen inputs with sixteen rows.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Sums([[f32; LANES]; TILE]);

/// Sums of sixteen inputs with two groups.
type Pair = [Sums; 2];

/// Weights of 32 columns, two of them in a row.
#[repr(C, align(64))]
struct Tile([[u8; VECTOR]; TILE]);

/// A group's weights that are not multiplied as they lie in memory: steps, and the high and low parts of F16.
type Apart = [[Tile; 2]; PART];

/// What a pass of two tiles of inputs, or of one, over some steps needs.
struct Pass {
    /// The tiles of inputs, or twice the one.
    inputs: [*const TileRow; 2],
    /// Bytes from step to step of the second of them.
    step: usize,
    /// Of BF16 the same of the first, of F16 bytes to the low parts of the second.
    other: usize,
    steps: usize,
    weights: *const u8,
    /// Bytes from a group to the next.
    group: usize,
    sums: *mut Pair,
    /// What to ask for: from where on, and how many lines of each group in a step.
    ahead: *const u8,
    lines: usize,
}

/// Sums come from memory and go there. Tiles 0 to 3 are sums, of the first inputs with both groups and of the second, 4 and
/// 5 are inputs, 6 and 7 weights.
macro_rules! pass {
    ($pass:expr, [$($begin:literal)*], [$($step:literal)*], [$($end:literal)*]) => {
        asm!(
            "# {y} {other}", // not all have a use for these
            $($begin,)*
            "2:",
            "mov {left}, {lines}",
            "jmp 4f",
            "3:",
            "prefetcht1 [{ahead}]",
            "prefetcht1 [{ahead} + {group}]",
            "add {ahead}, 64",
            "4:",
            "sub {left}, 1",
            "jns 3b",
            $($step,)*
            "sub {steps}, 1",
            "jnz 2b",
            $($end,)*
            x = inout(reg) $pass.inputs[0] => _,
            y = inout(reg) $pass.inputs[1] => _,
            w = inout(reg) $pass.weights => _,
            group = in(reg) $pass.group,
            step = in(reg) $pass.step,
            other = in(reg) $pass.other,
            line = in(reg) VECTOR,
            steps = inout(reg) $pass.steps => _,
            sums = in(reg) $pass.sums,
            ahead = inout(reg) $pass.ahead => _,
            lines = in(reg) $pass.lines,
            left = out(reg) _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack)
        )
    };
}

/// The same with sums of one tile of inputs.
macro_rules! one {
    ($pass:expr, [$($step:literal)*]) => {
        pass!(
            $pass,
            ["tileloadd tmm0, [{sums} + {line}*1]" "tileloadd tmm1, [{sums} + {line}*1 + 1024]"],
            [$($step)* "add {x}, {step}"],
            ["tilestored [{sums} + {line}*1], tmm0" "tilestored [{sums} + {line}*1 + 1024], tmm1"]
        )
    };
}

/// The same of two.
macro_rules! two {
    ($pass:expr, [$($step:literal)*]) => {
        pass!(
            $pass,
            [
                "tileloadd tmm0, [{sums} + {line}*1]"
                "tileloadd tmm1, [{sums} + {line}*1 + 1024]"
                "tileloadd tmm2, [{sums} + {line}*1 + 2048]"
                "tileloadd tmm3, [{sums} + {line}*1 + 3072]"
            ],
            [$($step)* "add {y}, {step}"],
            [
                "tilestored [{sums} + {line}*1], tmm0"
                "tilestored [{sums} + {line}*1 + 1024], tmm1"
                "tilestored [{sums} + {line}*1 + 2048], tmm2"
                "tilestored [{sums} + {line}*1 + 3072], tmm3"
            ]
        )
    };
}

impl Pass {
    /// # Safety
    /// The tiles are configured for the inputs, and everything is there.
    unsafe fn one_of_bf16(self) {
        // SAFETY: this function's conditions.
        unsafe {
            one!(
                self,
                [
                    "tileloadd tmm4, [{x} + {line}*1]"
                    "tileloadd tmm6, [{w} + {line}*1]"
                    "tdpbf16ps tmm0, tmm4, tmm6"
                    "lea {left}, [{w} + {group}]"
                    "tileloadd tmm7, [{left} + {line}*1]"
                    "tdpbf16ps tmm1, tmm4, tmm7"
                    "add {w}, 1024"
                ]
            );
        }
    }

    /// # Safety
    /// As [`one_of_bf16`](Self::one_of_bf16).
    unsafe fn two_of_bf16(self) {
        // SAFETY: this function's conditions.
        unsafe {
            two!(
                self,
                [
                    "tileloadd tmm4, [{x} + {line}*1]"
                    "tileloadd tmm6, [{w} + {line}*1]"
                    "tdpbf16ps tmm0, tmm4, tmm6"
                    "tileloadd tmm5, [{y} + {line}*1]"
                    "tdpbf16ps tmm2, tmm5, tmm6"
                    "lea {left}, [{w} + {group}]"
                    "tileloadd tmm7, [{left} + {line}*1]"
                    "tdpbf16ps tmm1, tmm4, tmm7"
                    "tdpbf16ps tmm3, tmm5, tmm7"
                    "add {x}, {other}"
                    "add {w}, 1024"
                ]
            );
        }
    }

    /// Low parts of inputs come before those of weights. The second group lies where [`Apart`] has it.
    ///
    /// # Safety
    /// As [`one_of_bf16`](Self::one_of_bf16).
    unsafe fn one_of_f16(self) {
        const { assert!(size_of::<Apart>() == 16384) };
        // SAFETY: this function's conditions.
        unsafe {
            one!(
                self,
                [
                    "tileloadd tmm4, [{x} + {line}*1]"
                    "tileloadd tmm6, [{w} + {line}*1]"
                    "tdpbf16ps tmm0, tmm4, tmm6"
                    "tileloadd tmm7, [{w} + {line}*1 + 16384]"
                    "tdpbf16ps tmm1, tmm4, tmm7"
                    "lea {left}, [{x} + {other}]"
                    "tileloadd tmm5, [{left} + {line}*1]"
                    "tdpbf16ps tmm0, tmm5, tmm6"
                    "tdpbf16ps tmm1, tmm5, tmm7"
                    "tileloadd tmm6, [{w} + {line}*1 + 1024]"
                    "tdpbf16ps tmm0, tmm4, tmm6"
                    "tileloadd tmm7, [{w} + {line}*1 + 17408]"
                    "tdpbf16ps tmm1, tmm4, tmm7"
                    "add {w}, 2048"
                ]
            );
        }
    }

    /// # Safety
    /// As [`one_of_bf16`](Self::one_of_bf16).
    unsafe fn two_of_f16(self) {
        // SAFETY: this function's conditions.
        unsafe {
            two!(
                self,
                [
                    "tileloadd tmm4, [{x} + {line}*1]"
                    "tileloadd tmm6, [{w} + {line}*1]"
                    "tdpbf16ps tmm0, tmm4, tmm6"
                    "tileloadd tmm5, [{y} + {line}*1]"
                    "tdpbf16ps tmm2, tmm5, tmm6"
                    "tileloadd tmm7, [{w} + {line}*1 + 16384]"
                    "tdpbf16ps tmm1, tmm4, tmm7"
                    "tdpbf16ps tmm3, tmm5, tmm7"
                    "tileloadd tmm4, [{x} + {line}*1 + 1024]"
                    "tdpbf16ps tmm0, tmm4, tmm6"
                    "lea {left}, [{y} + {other}]"
                    "tileloadd tmm5, [{left} + {line}*1]"
                    "tdpbf16ps tmm2, tmm5, tmm6"
                    "tdpbf16ps tmm1, tmm4, tmm7"
                    "tdpbf16ps tmm3, tmm5, tmm7"
                    "tileloadd tmm4, [{x} + {line}*1]"
                    "tileloadd tmm6, [{w} + {line}*1 + 1024]"
                    "tdpbf16ps tmm0, tmm4, tmm6"
                    "tileloadd tmm5, [{y} + {line}*1]"
                    "tdpbf16ps tmm2, tmm5, tmm6"
                    "tileloadd tmm7, [{w} + {line}*1 + 17408]"
                    "tdpbf16ps tmm1, tmm4, tmm7"
                    "tdpbf16ps tmm3, tmm5, tmm7"
                    "add {x}, 2048"
                    "add {w}, 2048"
                ]
            );
        }
    }
}

/// Runs a product.
///
/// # Safety
/// [`is_available`](super::is_available), the CPU has AVX-512; the weights are `count` groups of a matrix with `k` columns
/// packed as [`Matrix`](super::super::matrix::Matrix) does, `out` is (m, n) and no other thread's in these groups.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub unsafe fn run(dense: &Dense) {
    let (inputs, steps) = (&dense.inputs, dense.k.div_ceil(COLUMNS));
    let chunks = inputs.chunks();
    let (first, second) = ((inputs.rows_of(0), VECTOR), (inputs.rows_of(1.min(chunks - 1)), VECTOR));
    let config = Config::new([first, first, second, second, first, second, (TILE, VECTOR), (TILE, VECTOR)]);
    let block = CACHED / (CHUNKS * BYTES * inputs.parts());
    // Not filled with zeros: that would be longer than a product with one input of a small model.
    let mut room = MaybeUninit::<[Pair; CHUNKS]>::uninit();
    let mut split = MaybeUninit::<[Apart; 2]>::uninit();
    // SAFETY: the CPU has tiles, and what is configured is a valid palette; groups, inputs and steps are there.
    unsafe {
        config.load();
        for first in (0..chunks).step_by(CHUNKS) {
            for from in (0..steps).step_by(block) {
                for group in (0..dense.count).step_by(2) {
                    let part = Part {
                        group,
                        groups: 2.min(dense.count - group),
                        chunks: first..chunks.min(first + CHUNKS),
                        steps: from..steps.min(from + block),
                    };
                    dense.part(&part, room.as_mut_ptr().cast(), split.as_mut_ptr().cast());
                }
            }
        }
        super::release();
        // Results that bypass the caches are not behind what tells other threads that they are there.
        _mm_sfence();
    }
}

/// A part of a product: two groups, or the last one, with some inputs and steps.
struct Part {
    group: usize,
    groups: usize,
    chunks: Range<usize>,
    steps: Range<usize>,
}

/// Tiles of weights for some steps.
struct Weights {
    /// Those of the first group.
    start: *const u8,
    /// Bytes to those of the second, and from what is asked for of the first to what is of the second. None where there is
    /// only one: of BF16 it is multiplied twice, and the second result left.
    group: usize,
    /// What is needed next.
    next: *const u8,
}

impl Dense<'_> {
    /// # Safety
    /// As [`run`]; the tiles are configured, and the part is there.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    unsafe fn part(&self, part: &Part, room: *mut Pair, apart: *mut Apart) {
        let is_f16 = self.dtype == WeightType::F16;
        let whole = self.k / COLUMNS;
        let group_bytes = if is_f16 { self.k } else { self.k.next_multiple_of(2) } * 2 * LANES;
        // Weights are asked for while inputs take turns with others. Where they do not, while F16 is taken apart, and a few
        // steps at a time, since memory waits while they are multiplied.
        let turns = part.chunks.len() > 2;
        let stretch = if is_f16 && !turns { FEW } else { PART };
        let second = |bytes| if part.groups == 2 { bytes } else { 0 };
        // SAFETY: this function's conditions. What is asked for ahead need not be there.
        unsafe {
            let weights = self.weights.add(part.group * group_bytes);
            self.fetch(part, room);
            for from in part.steps.clone().step_by(stretch) {
                let steps = from..part.steps.end.min(from + stretch);
                let next = match from + PART < part.steps.end {
                    true => weights.wrapping_add((from + PART) * BYTES),
                    false => {
                        let behind = part.steps.start + from + PART - part.steps.end;
                        weights.wrapping_add(part.groups * group_bytes + behind * BYTES)
                    }
                };
                if !is_f16 && steps.end <= whole {
                    let weights = Weights { start: weights.add(from * BYTES), group: second(group_bytes), next };
                    self.passes(part, steps, &weights, room);
                    continue;
                }
                for g in 0..part.groups {
                    let (from, next) = (weights.add(g * group_bytes), next.wrapping_add(g * group_bytes));
                    match (is_f16, turns) {
                        (true, true) => take_apart::<false>(from, self.k, steps.clone(), null(), apart.add(g)),
                        (true, false) => take_apart::<true>(from, self.k, steps.clone(), next, apart.add(g)),
                        (false, _) => complete(from, group_bytes, steps.clone(), apart.add(g)),
                    }
                }
                // What has been completed is the end, and what is asked for between taking apart is asked for.
                let (group, next) = match is_f16 {
                    true => (second(group_bytes), if turns { next } else { null() }),
                    false => (second(size_of::<Apart>()), null()),
                };
                self.passes(part, steps, &Weights { start: apart.cast(), group, next }, room);
            }
            self.put(part, room);
        }
    }

    /// Multiplies weights with all inputs of the part.
    ///
    /// # Safety
    /// As [`part`](Self::part).
    unsafe fn passes(&self, part: &Part, steps: Range<usize>, weights: &Weights, room: *mut Pair) {
        let passes = part.chunks.len().div_ceil(2);
        let lines = if weights.next.is_null() { 0 } else { (BYTES / VECTOR).div_ceil(passes) };
        for pass in 0..passes {
            let chunk = part.chunks.start + 2 * pass;
            let two = chunk + 1 < part.chunks.end;
            let last = if two { chunk + 1 } else { chunk };
            let bytes = |chunk| self.inputs.rows_of(chunk) * size_of::<TileRow>();
            let (parts, is_f16) = (self.inputs.parts(), self.dtype == WeightType::F16);
            let pass = Pass {
                inputs: [self.inputs.tile(chunk, steps.start), self.inputs.tile(last, steps.start)],
                step: bytes(last) * parts,
                other: if is_f16 { bytes(last) } else { bytes(chunk) * parts },
                steps: steps.len(),
                weights: weights.start,
                group: weights.group,
                sums: room.wrapping_add(2 * pass),
                ahead: weights.next.wrapping_add(pass * lines * steps.len() * VECTOR),
                lines,
            };
            // SAFETY: this function's conditions.
            unsafe {
                match (is_f16, two) {
                    (true, false) => pass.one_of_f16(),
                    (true, true) => pass.two_of_f16(),
                    (false, false) => pass.one_of_bf16(),
                    (false, true) => pass.two_of_bf16(),
                }
            }
        }
    }

    /// What the sums begin with: zeros, or what the steps before have given.
    ///
    /// # Safety
    /// As [`part`](Self::part).
    #[target_feature(enable = "avx512f")]
    unsafe fn fetch(&self, part: &Part, room: *mut Pair) {
        // SAFETY: this function's conditions; `place` says what is there.
        unsafe {
            if part.steps.start == 0 {
                return room.write_bytes(0, part.chunks.len());
            }
            for (i, input) in (TILE * part.chunks.start..self.m.min(TILE * part.chunks.end)).enumerate() {
                for g in 0..part.groups {
                    let (out, there) = self.place(part, input, g);
                    let sums = &raw mut (*room.add(i / TILE))[g].0[i % TILE];
                    _mm512_store_ps(sums.cast(), _mm512_maskz_loadu_ps(there, out));
                }
            }
        }
    }

    /// Puts the sums where they go.
    ///
    /// # Safety
    /// As [`part`](Self::part).
    #[target_feature(enable = "avx512f")]
    unsafe fn put(&self, part: &Part, room: *const Pair) {
        for (i, input) in (TILE * part.chunks.start..self.m.min(TILE * part.chunks.end)).enumerate() {
            for g in 0..part.groups {
                let (out, there) = self.place(part, input, g);
                // SAFETY: this function's conditions; `place` says what is there.
                unsafe {
                    let sums = &raw const (*room.add(i / TILE))[g].0[i % TILE];
                    let sums = _mm512_load_ps(sums.cast());
                    // So many results do not stay in the caches, and what is there already would be read from memory first.
                    match part.chunks.len() > MANY && there == 0xffff && (out as usize).is_multiple_of(VECTOR) {
                        true => _mm512_stream_ps(out, sums),
                        false => _mm512_mask_storeu_ps(out, there, sums),
                    }
                }
            }
        }
    }

    /// Where the results of an input with a group are, and which of them there are.
    fn place(&self, part: &Part, input: usize, g: usize) -> (*mut f32, u16) {
        let row = (self.first + part.group + g) * LANES;
        let rows = LANES.min(self.n - row);
        (self.out.wrapping_add(input * self.n + row), (0xffff_u32 >> (LANES - rows)) as u16)
    }
}

/// F16 weights of a group's steps as sums of two BF16: the value without its last bits, and those.
///
/// # Safety
/// The CPU has AVX-512, and the steps are there.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn take_apart<const ASK: bool>(group: *const u8, k: usize, steps: Range<usize>, next: *const u8, to: *mut Apart) {
    // SAFETY: a column has 32 bytes, and there are `k`; what is asked for ahead need not be there.
    unsafe {
        let column = |column: usize| match column < k {
            true => _mm512_cvtph_ps(_mm256_loadu_si256(group.add(column * 2 * LANES).cast())),
            false => _mm512_setzero_ps(),
        };
        let high = |value| _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(0xffff_0000_u32 as i32));
        let low = |value| _mm512_castps_si512(_mm512_sub_ps(value, _mm512_castsi512_ps(high(value))));
        // The upper halves of both.
        let pair = |a, b| _mm512_mask_mov_epi16(_mm512_srli_epi32::<16>(a), 0xaaaa_aaaa, b);
        for (at, step) in steps.enumerate() {
            let [highs, lows] = [0, 1].map(|part| (&raw mut (*to)[at][part].0).cast::<__m512i>());
            for j in 0..TILE {
                if ASK {
                    Avx512::<false>::prefetch(next.wrapping_add((at * TILE + j) * VECTOR));
                }
                let (a, b) = (column(step * COLUMNS + 2 * j), column(step * COLUMNS + 2 * j + 1));
                let whole = pair(_mm512_castps_si512(a), _mm512_castps_si512(b));
                _mm512_store_si512(highs.add(j), whole);
                _mm512_store_si512(lows.add(j), pair(low(a), low(b)));
            }
        }
    }
}

/// BF16 weights of a group's last steps, with zeros behind the last column.
///
/// # Safety
/// The group has `bytes`.
unsafe fn complete(group: *const u8, bytes: usize, steps: Range<usize>, to: *mut Apart) {
    for (at, step) in steps.enumerate() {
        let there = BYTES.min(bytes - step * BYTES);
        // SAFETY: this function's condition.
        unsafe {
            let tile = to.cast::<Tile>().add(at).cast::<u8>();
            group.add(step * BYTES).copy_to_nonoverlapping(tile, there);
            tile.add(there).write_bytes(0, BYTES - there);
        }
    }
}
