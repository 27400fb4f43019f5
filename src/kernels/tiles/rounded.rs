//! Products of BF16 matrices on AMX: a tile of sixteen inputs times a tile of sixteen rows, 32 columns at a time, and two by
//! two of them, so that each tile that is loaded is used twice. Weights are what a tile wants as they lie there, and inputs
//! are rounded to BF16, as they are on every other instruction set.
//!
//! The instruction adds 32 products in an order of its own, so results have other bits than without tiles. One input is
//! therefore multiplied in the same way as many: here too a row computed in a batch has the bits of the row computed alone.
//!
//! F16 has no tiles: it would take three products of BF16 parts to keep its accuracy.

use std::arch::asm;
use std::arch::x86_64::{__mmask16, _mm_sfence, _mm512_load_ps, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps};
use std::arch::x86_64::{_mm512_store_ps, _mm512_stream_ps};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::ptr::null;
use std::time::Instant;

use super::super::formats::VECTOR;
use super::super::input::{TILE, TileRow, TileRows};
use super::super::pool::Pool;
use super::super::simd::LANES;
use super::{Config, is_available, release};

/// Columns of a step.
const COLUMNS: usize = 32;

/// Bytes of a tile.
const BYTES: usize = TILE * VECTOR;

/// Tiles of inputs that take turns with weights while these are in a core's caches.
const CHUNKS: usize = 16;

/// Bytes of such inputs that stay in a core's second cache while group after group is multiplied with them.
const CACHED: usize = 1 << 20;

/// Steps that the inputs take turns with: of two groups they fit a core's first cache. Weights are asked for so far ahead.
const PART: usize = 8;

/// Tiles of inputs from which on results bypass the caches.
const MANY: usize = 4;

/// Groups of a BF16 matrix with all inputs.
pub struct Rounded<'a> {
    pub weights: *const u8,
    pub inputs: TileRows<'a>,
    pub m: usize,
    pub out: *mut f32,
    pub first: usize,
    pub count: usize,
    pub n: usize,
    pub k: usize,
}

/// Sums of sixteen inputs with two groups.
type Pair = [Sums; 2];

/// Sums of sixteen inputs with sixteen rows.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Sums([[f32; LANES]; TILE]);

/// Weights of 32 columns, two of them in a row.
#[repr(C, align(64))]
struct Tile([[u8; VECTOR]; TILE]);

/// The last steps of two groups, with zeros behind the last column.
type Completed = [[Tile; PART]; 2];

/// Runs a product.
///
/// # Safety
/// [`is_available`](super::is_available), the CPU has AVX-512; the weights are `count` groups of a matrix with `k` columns
/// packed as [`Matrix`](super::super::matrix::Matrix) does, `out` is (m, n) and no other thread's in these groups.
#[target_feature(enable = "avx512f")]
pub unsafe fn run(product: &Rounded) {
    let (inputs, steps) = (&product.inputs, product.k.div_ceil(COLUMNS));
    let chunks = inputs.chunks();
    let (first, second) = ((inputs.rows_of(0), VECTOR), (inputs.rows_of(1.min(chunks - 1)), VECTOR));
    let config = Config::new([first, first, second, second, first, second, (TILE, VECTOR), (TILE, VECTOR)]);
    let block = CACHED / (CHUNKS * BYTES);
    // Not filled with zeros: that would be longer than a product with one input of a small model.
    let mut room = MaybeUninit::<[Pair; CHUNKS]>::uninit();
    let mut completed = MaybeUninit::<Completed>::uninit();
    // SAFETY: the CPU has tiles, and what is configured is a valid palette; groups, inputs and steps are there.
    unsafe {
        config.load();
        for first in (0..chunks).step_by(CHUNKS) {
            for from in (0..steps).step_by(block) {
                for group in (0..product.count).step_by(2) {
                    let part = Part {
                        group,
                        groups: 2.min(product.count - group),
                        chunks: first..chunks.min(first + CHUNKS),
                        steps: from..steps.min(from + block),
                    };
                    product.part(&part, room.as_mut_ptr().cast(), completed.as_mut_ptr().cast());
                }
            }
        }
        release();
        // Results that bypass the caches are not behind what tells other threads that they are there.
        _mm_sfence();
    }
}

/// Multiplications a second that tiles of all threads of a pool reach together, with nothing loaded or stored: the
/// median of many times, each a few milliseconds. `None` without tiles.
pub fn rate(pool: &Pool) -> Option<f64> {
    const TIMES: usize = 101;
    const REPETITIONS: usize = 1 << 15;
    const AT_ONCE: usize = 4;
    let multiply = || {
        // SAFETY: the CPU has tiles, and what is configured is a valid palette. Nothing but registers is changed.
        unsafe {
            Config::new([(TILE, VECTOR); 8]).load();
            asm!(
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "sub {left}, 1",
                "jnz 2b",
                left = inout(reg) REPETITIONS => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, nomem)
            );
            release();
        }
    };
    let multiplications = (REPETITIONS * AT_ONCE * TILE * LANES * COLUMNS * pool.threads()) as f64;
    let time = |_| {
        let began = Instant::now();
        pool.run(&|_| multiply());
        multiplications / began.elapsed().as_secs_f64()
    };
    is_available().then(|| {
        let mut rates: Vec<f64> = (0..TIMES).map(time).collect();
        rates.sort_by(f64::total_cmp);
        rates[TIMES / 2]
    })
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
    /// Bytes to those of the second. None where there is only one: it is multiplied twice, and the second result left.
    group: usize,
    /// What is needed next of the first; that of the second is as far from it. Null for nothing.
    next: *const u8,
}

impl Rounded<'_> {
    /// # Safety
    /// As [`run`]; the tiles are configured, and the part is there.
    #[target_feature(enable = "avx512f")]
    unsafe fn part(&self, part: &Part, room: *mut Pair, completed: *mut [Tile; PART]) {
        let whole = self.k / COLUMNS;
        let group_bytes = self.k.next_multiple_of(2) * 2 * LANES;
        let second = |bytes| if part.groups == 2 { bytes } else { 0 };
        // SAFETY: this function's conditions. What is asked for ahead need not be there.
        unsafe {
            let weights = self.weights.add(part.group * group_bytes);
            self.fetch(part, room);
            for from in part.steps.clone().step_by(PART) {
                let steps = from..part.steps.end.min(from + PART);
                if steps.end <= whole {
                    let next = match from + PART < part.steps.end {
                        true => weights.wrapping_add((from + PART) * BYTES),
                        false => weights.wrapping_add(part.groups * group_bytes + part.steps.start * BYTES),
                    };
                    let weights = Weights { start: weights.add(from * BYTES), group: second(group_bytes), next };
                    self.passes(part, steps, &weights, room);
                    continue;
                }
                for g in 0..part.groups {
                    let there = group_bytes - from * BYTES;
                    let to = completed.add(g).cast::<u8>();
                    weights.add(g * group_bytes + from * BYTES).copy_to_nonoverlapping(to, there);
                    to.add(there).write_bytes(0, steps.len() * BYTES - there);
                }
                let group = second(size_of::<[Tile; PART]>());
                self.passes(part, steps, &Weights { start: completed.cast(), group, next: null() }, room);
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
            let pass = Pass {
                inputs: [self.inputs.tile(chunk, steps.start), self.inputs.tile(last, steps.start)],
                bytes: self.inputs.rows_of(last) * size_of::<TileRow>(),
                steps: steps.len(),
                weights: weights.start,
                group: weights.group,
                sums: room.wrapping_add(2 * pass),
                ahead: weights.next.wrapping_add(pass * lines * steps.len() * VECTOR),
                lines,
            };
            // SAFETY: this function's conditions.
            unsafe {
                match two {
                    true => pass.two(),
                    false => pass.one(),
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
                    let sums = _mm512_load_ps((&raw const (*room.add(i / TILE))[g].0[i % TILE]).cast());
                    // So many results do not stay in the caches, and what is there would be read from memory first.
                    match part.chunks.len() > MANY && there == __mmask16::MAX && out.addr().is_multiple_of(VECTOR) {
                        true => _mm512_stream_ps(out, sums),
                        false => _mm512_mask_storeu_ps(out, there, sums),
                    }
                }
            }
        }
    }

    /// Where the results of an input with a group are, and which of them there are.
    fn place(&self, part: &Part, input: usize, g: usize) -> (*mut f32, __mmask16) {
        let row = (self.first + part.group + g) * LANES;
        let rows = LANES.min(self.n - row);
        (self.out.wrapping_add(input * self.n + row), __mmask16::MAX >> (LANES - rows))
    }
}

/// What a pass of two tiles of inputs, or of one, over some steps needs.
struct Pass {
    /// The tiles of inputs, or twice the one.
    inputs: [*const TileRow; 2],
    /// Bytes from step to step of the second of them.
    bytes: usize,
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
            "# {y}", // one has no use for it
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
            "lea {left}, [{w} + {group}]",
            $($step,)*
            "add {w}, 1024",
            "sub {steps}, 1",
            "jnz 2b",
            $($end,)*
            x = inout(reg) $pass.inputs[0] => _,
            y = inout(reg) $pass.inputs[1] => _,
            bytes = in(reg) $pass.bytes,
            w = inout(reg) $pass.weights => _,
            group = in(reg) $pass.group,
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

impl Pass {
    /// # Safety
    /// The tiles are configured for the inputs, and everything is there.
    unsafe fn one(self) {
        // SAFETY: this function's conditions.
        unsafe {
            pass!(
                self,
                ["tileloadd tmm0, [{sums} + {line}*1]" "tileloadd tmm1, [{sums} + {line}*1 + 1024]"],
                [
                    "tileloadd tmm4, [{x} + {line}*1]"
                    "tileloadd tmm6, [{w} + {line}*1]"
                    "tdpbf16ps tmm0, tmm4, tmm6"
                    "tileloadd tmm7, [{left} + {line}*1]"
                    "tdpbf16ps tmm1, tmm4, tmm7"
                    "add {x}, {bytes}"
                ],
                ["tilestored [{sums} + {line}*1], tmm0" "tilestored [{sums} + {line}*1 + 1024], tmm1"]
            );
        }
    }

    /// Of two tiles the first is whole.
    ///
    /// # Safety
    /// As [`one`](Self::one).
    unsafe fn two(self) {
        // SAFETY: this function's conditions.
        unsafe {
            pass!(
                self,
                [
                    "tileloadd tmm0, [{sums} + {line}*1]"
                    "tileloadd tmm1, [{sums} + {line}*1 + 1024]"
                    "tileloadd tmm2, [{sums} + {line}*1 + 2048]"
                    "tileloadd tmm3, [{sums} + {line}*1 + 3072]"
                ],
                [
                    "tileloadd tmm4, [{x} + {line}*1]"
                    "tileloadd tmm6, [{w} + {line}*1]"
                    "tdpbf16ps tmm0, tmm4, tmm6"
                    "tileloadd tmm5, [{y} + {line}*1]"
                    "tdpbf16ps tmm2, tmm5, tmm6"
                    "tileloadd tmm7, [{left} + {line}*1]"
                    "tdpbf16ps tmm1, tmm4, tmm7"
                    "tdpbf16ps tmm3, tmm5, tmm7"
                    "add {x}, 1024"
                    "add {y}, {bytes}"
                ],
                [
                    "tilestored [{sums} + {line}*1], tmm0"
                    "tilestored [{sums} + {line}*1 + 1024], tmm1"
                    "tilestored [{sums} + {line}*1 + 2048], tmm2"
                    "tilestored [{sums} + {line}*1 + 3072], tmm3"
                ]
            );
        }
    }
}
