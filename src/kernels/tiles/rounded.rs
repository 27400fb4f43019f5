//! Products on AMX: a tile of sixteen inputs times a tile of sixteen rows, 32 columns at a time, and two by two of them, so
//! that each tile that is loaded is used twice.
//!
//! Weights of BF16 are what a tile wants as they lie there, and inputs are rounded to BF16, as they are on every other
//! instruction set. F16 has more bits than fit into BF16, so its weights are unpacked as sums of two BF16, exactly, and
//! inputs are cut into two as well, see [`halves`](super::super::input::halves). Of their four products the one of both lower
//! parts, a 2^-16th of the whole at most, is left out. Splitting numbers for narrower units: Henry, Tang, Heinecke,
//! "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations", 2019.
//!
//! Rows that ask for it are rounded to BF16 and meet weights in BF16 whatever these are stored in: F16 is [rounded][narrow],
//! quantised weights are [widened][widen]. Tiles of bytes would keep all bits of those, but each 32 columns have a scale of
//! their own: half of a tile would be empty, and what it gives would have to be stored, scaled and added up by vectors, which
//! takes longer than tiles do. It is also nearer to quantised weights as they are and inputs in F32 than inputs in 8 bits are.
//!
//! The instruction adds 32 products in an order of its own, so results have other bits than without tiles. One input is
//! therefore multiplied in the same way as many: here too a row computed in a batch has the bits of the row computed alone.
//! With one input of F16, when only memory counts, unpacking for tiles takes longer than reading: [`Alone`] does with vectors
//! what the tiles do, operation by operation.
//!
//! [narrow]: super::unpack::narrow
//! [widen]: super::unpack::widen
//! [`Alone`]: super::unpack::Alone

use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::ptr::null;
use std::time::Instant;

use super::super::formats::VECTOR;
use super::super::input::{Cut, TILE, TileRow, TileRows};
use super::super::pool::Pool;
use super::super::simd::LANES;
use super::unpack::{AHEAD, COLUMNS, Tile, unpack};
use super::{Config, is_available, release};

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

/// How weights are stored, and what is made of them for tiles.
#[derive(Clone, Copy)]
pub enum Stored {
    /// As tiles want them.
    Bf16,
    /// Each is the sum of two BF16.
    F16,
    /// In another type, of which the function makes BF16: [`widen`](super::unpack::widen) or [`narrow`](super::unpack::narrow)
    /// of a group's columns from a step on, and how many of these there are.
    Other(unsafe fn(*const u8, usize, usize, *mut Tile)),
}

/// Groups of a matrix with all inputs, which are cut as the weights want it.
pub struct Rounded<'a> {
    pub weights: *const u8,
    pub stored: Stored,
    pub group_bytes: usize,
    pub inputs: TileRows<'a>,
    pub out: *mut f32,
    /// Of the matrix: the group that the weights begin with.
    pub first: usize,
    pub n: usize,
    pub k: usize,
}

/// Sums of sixteen inputs with two groups.
type Pair = [Sums; 2];

/// Sums of sixteen inputs with sixteen rows.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Sums([[f32; LANES]; TILE]);

/// Steps of two groups that are not used where they lie: the last ones of BF16, with zeros behind the last column, all of
/// F16 in two parts, and all that become BF16, in the first half of the room.
type Unpacked = [[[Tile; 2]; PART]; 2];

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

impl Part {
    /// Bytes from something of the first group to that of the second, if there is one.
    fn second(&self, bytes: usize) -> usize {
        if self.groups == 2 { bytes } else { 0 }
    }
}

/// Tiles of weights for some steps.
struct Weights {
    /// Those of the first group.
    start: *const u8,
    /// Bytes to those of the second. None where there is only one: it is multiplied twice, and the second result left.
    group: usize,
    /// What is needed next of the first group from memory. Null for nothing.
    next: *const u8,
    /// Bytes from there to that of the second.
    next_group: usize,
}

/// Sums of [`meanwhile`](Rounded::meanwhile) from memory or to it.
macro_rules! sums {
    ($first:literal, $second:literal, $sums:expr) => {
        asm!($first, $second, sums = in(reg) $sums, line = in(reg) VECTOR, options(nostack, preserves_flags))
    };
}

/// What [`meanwhile`](Rounded::meanwhile) does with tiles of inputs `x` and `y` and of weights `v` and `w`. Tiles are not
/// named as changed, since what they hold is what the next piece goes on with.
macro_rules! step {
    ($x:expr, $w:expr, [$($text:literal)*]) => {
        asm!(
            "# {x} {y} {v} {w} {line}", // not all of them have a use for all
            $($text,)*
            x = in(reg) $x[0],
            y = in(reg) $x[1],
            v = in(reg) $w[0],
            w = in(reg) $w[1],
            line = in(reg) VECTOR,
            options(nostack, preserves_flags)
        )
    };
}

impl Rounded<'_> {
    /// Multiplies some groups.
    ///
    /// # Safety
    /// [`is_available`](super::is_available), the CPU has AVX-512; the groups are those of a matrix with `k` columns packed as
    /// [`Matrix`](super::super::matrix::Matrix) does, `out` is (rows of the input, n) and no other thread's in these groups.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub unsafe fn run(&self, groups: Range<usize>) {
        let (inputs, steps) = (&self.inputs, self.k.div_ceil(COLUMNS));
        let chunks = inputs.chunks();
        let (first, second) = ((inputs.rows_of(0), VECTOR), (inputs.rows_of(1.min(chunks - 1)), VECTOR));
        let config = Config::new([first, first, second, second, first, second, (TILE, VECTOR), (TILE, VECTOR)]);
        let block = CACHED / (CHUNKS * BYTES * inputs.cut().parts());
        // Not filled with zeros: that would be longer than a product with one input of a small model.
        let mut room = MaybeUninit::<[Pair; CHUNKS]>::uninit();
        let mut unpacked = MaybeUninit::<Unpacked>::uninit();
        // SAFETY: the CPU has tiles, and what is configured is a valid palette; groups, inputs and steps are there.
        unsafe {
            config.load();
            for first in (0..chunks).step_by(CHUNKS) {
                for from in (0..steps).step_by(block) {
                    for group in groups.clone().step_by(2) {
                        let part = Part {
                            group,
                            groups: 2.min(groups.end - group),
                            chunks: first..chunks.min(first + CHUNKS),
                            steps: from..steps.min(from + block),
                        };
                        self.part(&part, room.as_mut_ptr().cast(), unpacked.as_mut_ptr().cast());
                    }
                }
            }
            release();
            // Results that bypass the caches are not behind what tells other threads that they are there.
            _mm_sfence();
        }
    }

    /// # Safety
    /// As [`run`](Self::run); the tiles are configured, and the part is there.
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn part(&self, part: &Part, room: *mut Pair, unpacked: *mut [[Tile; 2]; PART]) {
        // SAFETY: this function's conditions.
        unsafe {
            let weights = self.weights.add(part.group * self.group_bytes);
            self.fetch(part, room);
            match (self.stored, part.chunks.len()) {
                (Stored::Bf16, _) => self.in_place(part, weights, room, unpacked),
                (_, 1 | 2) => self.stream(part, weights, room.cast(), unpacked.cast()),
                _ => self.unpacking(part, weights, room, unpacked),
            }
            self.put(part, room);
        }
    }

    /// Multiplies weights of BF16 with the inputs where they lie, but for the last columns where a step is not whole.
    ///
    /// # Safety
    /// As [`part`](Self::part); `weights` are the part's.
    unsafe fn in_place(&self, part: &Part, weights: *const u8, room: *mut Pair, unpacked: *mut [[Tile; 2]; PART]) {
        let passes = part.chunks.len().div_ceil(2);
        for from in part.steps.clone().step_by(PART) {
            let steps = from..part.steps.end.min(from + PART);
            // SAFETY: this function's conditions.
            unsafe {
                let mut tiles = Weights {
                    start: weights.add(from * BYTES),
                    group: part.second(self.group_bytes),
                    next: self.next(part, weights, from),
                    next_group: part.second(self.group_bytes),
                };
                if steps.end > self.k / COLUMNS {
                    for g in 0..part.groups {
                        let there = self.group_bytes - from * BYTES;
                        let to = unpacked.add(g).cast::<u8>();
                        tiles.start.add(g * self.group_bytes).copy_to_nonoverlapping(to, there);
                        to.add(there).write_bytes(0, steps.len() * BYTES - there);
                    }
                    tiles = Weights {
                        start: unpacked.cast(),
                        group: part.second(size_of::<[[Tile; 2]; PART]>()),
                        next: null(),
                        ..tiles
                    };
                }
                self.passes(part, steps, &tiles, room, passes);
            }
        }
    }

    /// Multiplies weights that are unpacked with more than two tiles of inputs: some steps, of which each makes way for one
    /// that comes later while the last inputs are multiplied with it.
    ///
    /// # Safety
    /// As [`part`](Self::part); `weights` are the part's.
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn unpacking(&self, part: &Part, weights: *const u8, room: *mut Pair, unpacked: *mut [[Tile; 2]; PART]) {
        let passes = part.chunks.len().div_ceil(2);
        let (first, last) = (part.chunks.start + 2 * (passes - 1), part.chunks.end - 1);
        let parts = self.inputs.cut().parts();
        let place = |step: usize, g: usize| {
            let step = (step - part.steps.start) % PART;
            // SAFETY: the room has so many steps of two groups.
            unsafe { unpacked.add(g).cast::<Tile>().add(step * parts) }
        };
        // SAFETY: this function's conditions. What is asked for ahead need not be there.
        unsafe {
            let unpack = |step: usize, g: usize| {
                if step < part.steps.end {
                    self.unpack(weights.add(g * self.group_bytes), step, 0, place(step, g));
                }
            };
            for step in part.steps.start..part.steps.start + PART {
                (0..part.groups).for_each(|g| unpack(step, g));
            }
            for from in part.steps.clone().step_by(PART) {
                let steps = from..part.steps.end.min(from + PART);
                let tiles = Weights {
                    start: unpacked.cast(),
                    group: part.second(size_of::<[[Tile; 2]; PART]>()),
                    next: self.next(part, weights, from),
                    next_group: part.second(self.group_bytes),
                };
                self.passes(part, steps.clone(), &tiles, room, passes - 1);
                let sums = room.add(2 * (passes - 1)).cast();
                self.meanwhile([first, last], part.groups, steps, sums, place, |step, g| unpack(step + PART, g));
            }
        }
    }

    /// Multiplies weights that are unpacked with one or two tiles of inputs. While tiles multiply a step the next one is
    /// unpacked: with so few inputs both take about as long, and memory should wait for neither.
    ///
    /// # Safety
    /// As [`part`](Self::part); `weights` are the part's.
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn stream(&self, part: &Part, weights: *const u8, room: *mut Sums, unpacked: *mut [[Tile; 2]; 2]) {
        let place = |step: usize, g: usize| {
            // SAFETY: the room has two steps of two groups.
            unsafe { (&raw mut (*unpacked.add(step % 2))[g]).cast::<Tile>() }
        };
        // SAFETY: this function's conditions. What is asked for ahead need not be there.
        unsafe {
            let unpack = |step: usize, g: usize| {
                if step == part.steps.end {
                    return;
                }
                let group = weights.add(g * self.group_bytes);
                if let Stored::Other(_) = self.stored {
                    // The next groups' columns, which products with decode steps read first if there are any.
                    let next = group.wrapping_add(part.groups * self.group_bytes);
                    for at in (self.bytes_before(step)..self.bytes_before(step + 1)).step_by(VECTOR) {
                        _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add(at).cast());
                    }
                }
                self.unpack(group, step, AHEAD, place(step, g));
            };
            (0..part.groups).for_each(|g| unpack(part.steps.start, g));
            let chunks = [part.chunks.start, part.chunks.end - 1];
            self.meanwhile(chunks, part.groups, part.steps.clone(), room, place, |step, g| unpack(step + 1, g));
        }
    }

    /// Multiplies some steps, whose weights are in a place for each step and group, with one or two tiles of inputs. `unpack`
    /// is called for each of them when its weights have been loaded, to do something else while tiles multiply.
    ///
    /// # Safety
    /// As [`part`](Self::part); the weights are there.
    #[inline(always)]
    unsafe fn meanwhile(
        &self,
        chunks: [usize; 2],
        groups: usize,
        steps: Range<usize>,
        room: *mut Sums,
        place: impl Fn(usize, usize) -> *mut Tile,
        unpack: impl Fn(usize, usize),
    ) {
        let two = chunks[1] > chunks[0];
        let bytes = chunks.map(|chunk| self.inputs.rows_of(chunk) * size_of::<TileRow>());
        // SAFETY: this function's conditions. What tiles hold stays from one piece of assembly to the next: nothing else uses
        // them.
        unsafe {
            sums!("tileloadd tmm0, [{sums} + {line}*1]", "tileloadd tmm1, [{sums} + {line}*1 + 1024]", room);
            if two {
                sums!("tileloadd tmm2, [{sums} + {line}*1 + 2048]", "tileloadd tmm3, [{sums} + {line}*1 + 3072]", room);
            }
            for step in steps {
                let w = [place(step, 0), place(step, groups - 1)];
                let x = chunks.map(|chunk| self.inputs.tile(chunk, step).cast::<u8>());
                if self.inputs.cut() == Cut::Halved {
                    step!(x, w, ["tileloadd tmm4, [{x} + {line}*1]" "tileloadd tmm6, [{v} + {line}*1 + 1024]"
                        "tdpbf16ps tmm0, tmm4, tmm6" "tileloadd tmm7, [{w} + {line}*1 + 1024]"
                        "tdpbf16ps tmm1, tmm4, tmm7"]);
                    if two {
                        step!(x, w, ["tileloadd tmm5, [{y} + {line}*1]" "tdpbf16ps tmm2, tmm5, tmm6"
                            "tdpbf16ps tmm3, tmm5, tmm7"]);
                    }
                    step!(x, w, ["tileloadd tmm6, [{v} + {line}*1]" "tdpbf16ps tmm0, tmm4, tmm6"
                        "tileloadd tmm7, [{w} + {line}*1]" "tdpbf16ps tmm1, tmm4, tmm7"]);
                    unpack(step, 0);
                    if two {
                        step!(x, w, ["tdpbf16ps tmm2, tmm5, tmm6" "tdpbf16ps tmm3, tmm5, tmm7"]);
                    }
                    let x = [x[0].add(bytes[0]), x[1].add(bytes[1])];
                    step!(x, w, ["tileloadd tmm4, [{x} + {line}*1]" "tdpbf16ps tmm0, tmm4, tmm6"
                        "tdpbf16ps tmm1, tmm4, tmm7"]);
                    if two {
                        step!(x, w, ["tileloadd tmm5, [{y} + {line}*1]" "tdpbf16ps tmm2, tmm5, tmm6"
                            "tdpbf16ps tmm3, tmm5, tmm7"]);
                    }
                } else {
                    step!(x, w, ["tileloadd tmm4, [{x} + {line}*1]" "tileloadd tmm6, [{v} + {line}*1]"
                        "tdpbf16ps tmm0, tmm4, tmm6"]);
                    if two {
                        step!(x, w, ["tileloadd tmm5, [{y} + {line}*1]" "tdpbf16ps tmm2, tmm5, tmm6"]);
                    }
                    unpack(step, 0);
                    step!(x, w, ["tileloadd tmm7, [{w} + {line}*1]" "tdpbf16ps tmm1, tmm4, tmm7"]);
                    if two {
                        step!(x, w, ["tdpbf16ps tmm3, tmm5, tmm7"]);
                    }
                }
                if groups == 2 {
                    unpack(step, 1);
                }
            }
            sums!("tilestored [{sums} + {line}*1], tmm0", "tilestored [{sums} + {line}*1 + 1024], tmm1", room);
            if two {
                sums!(
                    "tilestored [{sums} + {line}*1 + 2048], tmm2",
                    "tilestored [{sums} + {line}*1 + 3072], tmm3",
                    room
                );
            }
        }
    }

    /// Unpacks 32 columns of a group; of F16, asks for what is `ahead` bytes behind them.
    ///
    /// # Safety
    /// As [`part`](Self::part); the step is there.
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn unpack(&self, group: *const u8, step: usize, ahead: usize, to: *mut Tile) {
        let columns = COLUMNS.min(self.k - step * COLUMNS);
        // SAFETY: this function's conditions.
        unsafe {
            match self.stored {
                Stored::Other(to_bf16) => to_bf16(group, step, columns, to),
                _ => unpack(group.add(step * BYTES), columns, ahead, to.cast()),
            }
        }
    }

    /// Bytes of a group before a step.
    fn bytes_before(&self, step: usize) -> usize {
        match self.stored {
            Stored::Other(_) => self.group_bytes * step / self.k.div_ceil(COLUMNS),
            _ => step * BYTES,
        }
    }

    /// What is needed of the first group's weights after the steps that begin at `from`: those behind them, or the next
    /// groups'.
    fn next(&self, part: &Part, weights: *const u8, from: usize) -> *const u8 {
        match from + PART < part.steps.end {
            true => weights.wrapping_add(self.bytes_before(from + PART)),
            false => weights.wrapping_add(part.groups * self.group_bytes + self.bytes_before(part.steps.start)),
        }
    }

    /// Multiplies weights with the part's inputs, in the first `passes` of two tiles each.
    ///
    /// # Safety
    /// As [`part`](Self::part).
    unsafe fn passes(&self, part: &Part, steps: Range<usize>, weights: &Weights, room: *mut Pair, passes: usize) {
        let bytes = self.group_bytes / self.k.div_ceil(COLUMNS);
        let lines = if weights.next.is_null() { 0 } else { bytes.div_ceil(VECTOR).div_ceil(passes) };
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
                next_group: weights.next_group,
                lines,
            };
            // SAFETY: this function's conditions.
            unsafe {
                match (self.inputs.cut(), two) {
                    (Cut::Halved, true) => pass.two_in_parts(),
                    (Cut::Halved, false) => pass.one_in_parts(),
                    (_, true) => pass.two(),
                    (_, false) => pass.one(),
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
            for (i, input) in (TILE * part.chunks.start..self.inputs.rows().min(TILE * part.chunks.end)).enumerate() {
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
        for (i, input) in (TILE * part.chunks.start..self.inputs.rows().min(TILE * part.chunks.end)).enumerate() {
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
        (self.out.wrapping_add((self.inputs.first() + input) * self.n + row), __mmask16::MAX >> (LANES - rows))
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
    /// What to ask for: from where on, bytes to that of the second group, and how many lines of each in a step.
    ahead: *const u8,
    next_group: usize,
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
            "prefetcht1 [{ahead} + {next}]",
            "add {ahead}, 64",
            "4:",
            "sub {left}, 1",
            "jns 3b",
            "lea {left}, [{w} + {group}]",
            $($step,)*
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
            next = in(reg) $pass.next_group,
            lines = in(reg) $pass.lines,
            left = out(reg) _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack)
        )
    };
}

/// A pass with one tile of inputs.
macro_rules! one {
    ($pass:expr, [$($step:literal)*] $(,)?) => {
        pass!(
            $pass,
            ["tileloadd tmm0, [{sums} + {line}*1]" "tileloadd tmm1, [{sums} + {line}*1 + 1024]"],
            [$($step)*],
            ["tilestored [{sums} + {line}*1], tmm0" "tilestored [{sums} + {line}*1 + 1024], tmm1"]
        )
    };
}

/// A pass with two.
macro_rules! two {
    ($pass:expr, [$($step:literal)*] $(,)?) => {
        pass!(
            $pass,
            ["tileloadd tmm0, [{sums} + {line}*1]" "tileloadd tmm1, [{sums} + {line}*1 + 1024]"
             "tileloadd tmm2, [{sums} + {line}*1 + 2048]" "tileloadd tmm3, [{sums} + {line}*1 + 3072]"],
            [$($step)*],
            ["tilestored [{sums} + {line}*1], tmm0" "tilestored [{sums} + {line}*1 + 1024], tmm1"
             "tilestored [{sums} + {line}*1 + 2048], tmm2" "tilestored [{sums} + {line}*1 + 3072], tmm3"]
        )
    };
}

impl Pass {
    /// # Safety
    /// The tiles are configured for the inputs, and everything is there.
    unsafe fn one(self) {
        // SAFETY: this function's conditions.
        unsafe {
            one!(
                self,
                [
                    "tileloadd tmm4, [{x} + {line}*1]"
                    "tileloadd tmm6, [{w} + {line}*1]"
                    "tdpbf16ps tmm0, tmm4, tmm6"
                    "tileloadd tmm7, [{left} + {line}*1]"
                    "tdpbf16ps tmm1, tmm4, tmm7"
                    "add {x}, {bytes}"
                    "add {w}, 1024"
                ],
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
            two!(
                self,
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
                    "add {w}, 1024"
                ],
            );
        }
    }

    /// Weights and inputs are in two parts: the inputs' upper ones with both of the weights', then their lower ones with the
    /// weights' upper ones.
    ///
    /// # Safety
    /// As [`one`](Self::one).
    unsafe fn one_in_parts(self) {
        // SAFETY: this function's conditions.
        unsafe {
            one!(
                self,
                [
                    "tileloadd tmm4, [{x} + {line}*1]"
                    "tileloadd tmm6, [{w} + {line}*1 + 1024]"
                    "tdpbf16ps tmm0, tmm4, tmm6"
                    "tileloadd tmm7, [{left} + {line}*1 + 1024]"
                    "tdpbf16ps tmm1, tmm4, tmm7"
                    "tileloadd tmm6, [{w} + {line}*1]"
                    "tdpbf16ps tmm0, tmm4, tmm6"
                    "tileloadd tmm7, [{left} + {line}*1]"
                    "tdpbf16ps tmm1, tmm4, tmm7"
                    "add {x}, {bytes}"
                    "tileloadd tmm4, [{x} + {line}*1]"
                    "tdpbf16ps tmm0, tmm4, tmm6"
                    "tdpbf16ps tmm1, tmm4, tmm7"
                    "add {x}, {bytes}"
                    "add {w}, 2048"
                ],
            );
        }
    }

    /// The same of two tiles, of which the first is whole.
    ///
    /// # Safety
    /// As [`one`](Self::one).
    unsafe fn two_in_parts(self) {
        // SAFETY: this function's conditions.
        unsafe {
            two!(
                self,
                [
                    "tileloadd tmm4, [{x} + {line}*1]"
                    "tileloadd tmm6, [{w} + {line}*1 + 1024]"
                    "tdpbf16ps tmm0, tmm4, tmm6"
                    "tileloadd tmm5, [{y} + {line}*1]"
                    "tdpbf16ps tmm2, tmm5, tmm6"
                    "tileloadd tmm7, [{left} + {line}*1 + 1024]"
                    "tdpbf16ps tmm1, tmm4, tmm7"
                    "tdpbf16ps tmm3, tmm5, tmm7"
                    "tileloadd tmm6, [{w} + {line}*1]"
                    "tdpbf16ps tmm0, tmm4, tmm6"
                    "tdpbf16ps tmm2, tmm5, tmm6"
                    "tileloadd tmm7, [{left} + {line}*1]"
                    "tdpbf16ps tmm1, tmm4, tmm7"
                    "tdpbf16ps tmm3, tmm5, tmm7"
                    "add {y}, {bytes}"
                    "tileloadd tmm4, [{x} + {line}*1 + 1024]"
                    "tdpbf16ps tmm0, tmm4, tmm6"
                    "tdpbf16ps tmm1, tmm4, tmm7"
                    "tileloadd tmm5, [{y} + {line}*1]"
                    "tdpbf16ps tmm2, tmm5, tmm6"
                    "tdpbf16ps tmm3, tmm5, tmm7"
                    "add {x}, 2048"
                    "add {y}, {bytes}"
                    "add {w}, 2048"
                ],
            );
        }
    }
}
