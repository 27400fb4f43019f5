//! Grouped-query attention.
//!
//! Positions are taken 256 at a time, counted from the sequence's start. Within a chunk a query's scores become
//! weights relative to the chunk's greatest, and the weighted values are summed; the chunks' sums are put together in
//! order. A query's result is thereby one sequence of operations, whatever other queries it is computed with, whichever
//! threads take which chunks, and on every instruction set. What a query does not see has weight 0, which changes no sum.

// A tile's vectors are arrays in registers, several of them under the same index.
#![allow(clippy::needless_range_loop)]

mod stored;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::f16;

use stored::{Ahead, Quantised, Stored, fitting, prefetch, sums_so_far};

use super::buffer::Line;
use super::kv::{GROUP, KvType, LayerKv, Layout, SLAB, STRIP, Strided};
use super::ops::{capped, exp, store_part};
use super::pool::Pool;
use super::simd::{Isa, Kernel, LANES, Simd};
use super::size;

/// Positions that get weights together. Their keys and values stay in a core's second-level cache.
const CHUNK: usize = 256;

/// Queries that are multiplied with a key or value once it is in a register.
const TILE: usize = 6;

/// Bytes that come from memory together.
const CACHE_LINE: usize = 64;

/// Dimensions or positions of a pass where registers do not take a whole [`SLAB`] or [`STRIP`].
const PASS: usize = 16;

/// Queries of a task: as many as share what is in the caches.
const QUERIES: usize = 64;

/// Queries of a task where there would be too few tasks otherwise. Tasks of no more can be split by positions.
const FEW_QUERIES: usize = 16;

/// Tasks for each thread, so that one that is held up holds up little.
const PARTS: usize = 4;

/// Multiplications below which waking other threads costs more than it saves.
const PARALLEL_FROM: usize = 1 << 15;

/// What the attention of a layer is like.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads, which the query heads share in runs of equal length.
    pub kv_heads: usize,
    /// Size of a head.
    pub head_dim: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// `cap * tanh(score / cap)` in place of the scores.
    pub softcap: Option<f32>,
}

/// Consecutive positions of one sequence, whose keys and values are in its cache already.
pub struct AttentionRows<'a> {
    /// The sequence's keys and values.
    pub kv: &'a LayerKv,
    /// Queries: (len, heads * head_dim).
    pub q: Strided<'a>,
    /// The first row's position.
    pub position: usize,
    /// Number of rows.
    pub len: usize,
    /// How many positions a row sees, itself included.
    pub window: Option<usize>,
    /// Results: (len, heads * head_dim).
    pub out: &'a mut [f32],
}

/// Attention of all rows, in one pass over the pool's threads. A row sees its own position and those before it.
pub fn attend(pool: &Pool, isa: Isa, shape: &AttentionShape, rows: &mut [AttentionRows]) {
    let &AttentionShape { heads, kv_heads, head_dim, .. } = shape;
    assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads), "{heads} heads cannot share {kv_heads}");
    let width = size::product("query heads and their size", [heads, head_dim]);
    for rows in rows.iter() {
        let (kv, end) = (rows.kv, size::end("positions of attention", rows.position, rows.len));
        let results = size::product("results of attention", [rows.len, width]);
        assert!(kv.kv_heads == kv_heads && kv.layout.head_dim == head_dim, "keys of another shape");
        assert!(end <= kv.capacity(), "position {end} is past the KV cache's {}", kv.capacity());
        assert!(rows.q.has(rows.len, width) && rows.out.len() == results, "attention of wrong sizes");
    }
    let sequences: Vec<Sequence> = rows.iter_mut().map(Sequence::new).collect();
    let plan = Plan::new(pool.threads(), shape, &sequences);
    PARTS_OF_SPLITS.with_borrow_mut(|parts| {
        let parts = Shared(reserve(parts, plan.parts));
        let run = |task: usize| {
            let task = &plan.tasks[task];
            let (sequence, split) = (&sequences[task.sequence], task.split.map(|split| &plan.splits[split]));
            // SAFETY: an `Isa` is one that this CPU has. Sizes and positions are checked above. Tasks of the same queries write
            // parts of their own, and nobody writes to the keys and values, which are borrowed.
            SCRATCH.with_borrow_mut(|scratch| unsafe {
                match sequence.kv.layout.kv_type {
                    KvType::F32 => isa.run(Attend::<f32>::new(shape, sequence, task, split, &parts, scratch)),
                    KvType::F16 => isa.run(Attend::<f16>::new(shape, sequence, task, split, &parts, scratch)),
                    KvType::Q8_0 => isa.run(Attend::<Quantised>::new(shape, sequence, task, split, &parts, scratch)),
                }
            });
        };
        match plan.serial {
            true => (0..plan.tasks.len()).for_each(run),
            false => pool.for_each(plan.tasks.len(), run),
        }
    });
}

/// [`AttentionRows`] for all threads.
struct Sequence<'a> {
    kv: &'a LayerKv,
    q: Strided<'a>,
    position: usize,
    len: usize,
    window: Option<usize>,
    out: *mut f32,
}

// SAFETY: tasks write the results of their own queries.
unsafe impl Sync for Sequence<'_> {}

impl<'a> Sequence<'a> {
    fn new(rows: &'a mut AttentionRows) -> Sequence<'a> {
        let AttentionRows { kv, q, position, len, window, ref mut out } = *rows;
        Sequence { kv, q, position, len, window, out: out.as_mut_ptr() }
    }

    /// The positions that a row sees.
    #[inline(always)]
    fn visible(&self, row: usize) -> Range<usize> {
        let end = self.position + row + 1;
        self.window.map_or(0, |window| end.saturating_sub(window.max(1)))..end
    }
}

/// Memory that threads share.
struct Shared(*mut f32);

// SAFETY: tasks write parts of their own, and read others' when these are complete, see [`Split::remaining`].
unsafe impl Sync for Shared {}

/// Queries of a sequence that share one head's keys and values, and which positions to take. Queries are numbered by row,
/// then by head within the group.
struct Task {
    sequence: usize,
    head: usize,
    queries: Range<usize>,
    chunks: Range<usize>,
    /// Where other tasks have the same queries and other positions.
    split: Option<usize>,
}

impl Task {
    fn cost(&self) -> usize {
        self.queries.len() * self.chunks.len()
    }
}

/// Queries whose positions are divided among tasks.
struct Split {
    /// Where the parts of a query's result are, a chunk's of all queries after the other's.
    parts: usize,
    chunks: Range<usize>,
    /// Tasks that are not done. The last one puts the parts together.
    remaining: AtomicUsize,
}

struct Plan {
    tasks: Vec<Task>,
    splits: Vec<Split>,
    /// Length of all parts.
    parts: usize,
    /// Too little to wake other threads for.
    serial: bool,
}

impl Plan {
    /// No choice made here changes a result.
    fn new(threads: usize, shape: &AttentionShape, sequences: &[Sequence]) -> Plan {
        let group = shape.heads / shape.kv_heads;
        let blocks =
            |size: usize| sequences.iter().map(|s| (s.len * group).div_ceil(size)).sum::<usize>() * shape.kv_heads;
        let mut size = QUERIES;
        while threads > 1 && size > FEW_QUERIES && blocks(size) < threads * PARTS {
            size /= 2;
        }
        let mut whole = Vec::with_capacity(blocks(size));
        let mut work = 0usize;
        for (index, sequence) in sequences.iter().enumerate() {
            let queries = sequence.len * group;
            for first in (0..queries).step_by(size) {
                let end = queries.min(first + size);
                let seen = sequence.visible(first / group).start..sequence.visible((end - 1) / group).end;
                let of_query = seen.len().saturating_mul(2 * shape.head_dim).saturating_mul(shape.kv_heads);
                work = of_query.saturating_mul(end - first).saturating_add(work);
                let chunks = seen.start / CHUNK..seen.end.div_ceil(CHUNK);
                for head in 0..shape.kv_heads {
                    let (queries, chunks) = (first..end, chunks.clone());
                    whole.push(Task { sequence: index, head, queries, chunks, split: None });
                }
            }
        }
        let serial = threads == 1 || work < PARALLEL_FROM;
        let share = whole.iter().map(Task::cost).sum::<usize>().div_ceil(threads * PARTS);
        let mut plan = Plan { tasks: Vec::with_capacity(whole.len()), splits: Vec::new(), parts: 0, serial };
        for task in whole {
            let count = task.queries.len();
            let span = (share / count).max(1);
            if serial || count > FEW_QUERIES || task.chunks.len() <= span {
                plan.tasks.push(task);
                continue;
            }
            let split = Some(plan.splits.len());
            let starts = task.chunks.clone().step_by(span);
            let remaining = AtomicUsize::new(starts.len());
            plan.splits.push(Split { parts: plan.parts, chunks: task.chunks.clone(), remaining });
            let part = part_len(&sequences[task.sequence].kv.layout);
            let parts = size::product("parts of attention", [task.chunks.len(), count, part]);
            plan.parts = size::end("parts of attention", plan.parts, parts);
            for start in starts {
                let (queries, chunks) = (task.queries.clone(), start..task.chunks.end.min(start + span));
                plan.tasks.push(Task { queries, chunks, split, ..task });
            }
        }
        // The longest first, so that none is left alone at the end.
        plan.tasks.sort_by_key(|task| std::cmp::Reverse(task.cost()));
        plan
    }
}

thread_local! {
    /// What a task works with.
    static SCRATCH: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
    /// The parts of split tasks, of the thread that asks for attention.
    static PARTS_OF_SPLITS: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// Room for `len` values, kept from call to call.
fn reserve(lines: &mut Vec<Line>, len: usize) -> *mut f32 {
    if lines.len() * LANES < len {
        lines.resize(len.div_ceil(LANES), Line::ZERO);
    }
    lines.as_mut_ptr().cast()
}

/// A query's result for some positions: the weighted sum of their values, the greatest score, the sum of the weights.
fn part_len(layout: &Layout) -> usize {
    layout.padded() + LANES
}

/// Queries as even tiles of at most [`TILE`]: the first of each, and how many.
#[inline(always)]
fn tiles(queries: usize) -> impl Iterator<Item = (usize, usize)> {
    let tiles = queries.div_ceil(TILE);
    (0..tiles).map(move |tile| {
        let first = tile * queries / tiles;
        (first, (tile + 1) * queries / tiles - first)
    })
}

/// A task to compute, and what to compute it with.
struct Attend<'a, N> {
    shape: &'a AttentionShape,
    sequence: &'a Sequence<'a>,
    task: &'a Task,
    split: Option<(&'a Split, *mut f32)>,
    /// The queries as the keys want them, one tile after the other.
    packed: *mut f32,
    /// The queries' results for the positions so far.
    states: *mut f32,
    /// Scores and then weights of a tile of queries for a chunk.
    weights: *mut f32,
    /// A tile's results for a chunk.
    parts: *mut f32,
    /// A chunk's scales of values, by group.
    scales: *mut f32,
    stored: PhantomData<N>,
}

impl<'a, N: Stored> Attend<'a, N> {
    fn new(
        shape: &'a AttentionShape,
        sequence: &'a Sequence<'a>,
        task: &'a Task,
        split: Option<&'a Split>,
        parts: &Shared,
        scratch: &mut Vec<Line>,
    ) -> Self {
        let layout = &sequence.kv.layout;
        let (count, part) = (task.queries.len(), part_len(layout));
        let lens = [
            count * N::packed_len(layout),
            count * part,
            TILE * CHUNK,
            TILE * part,
            if layout.scale_bytes() > 0 { layout.padded() / GROUP * CHUNK } else { 0 },
        ];
        let mut next = reserve(scratch, lens.iter().map(|len| len.next_multiple_of(LANES)).sum());
        let [packed, states, weights, parts_of_tile, scales] = lens.map(|len| {
            let start = next;
            next = next.wrapping_add(len.next_multiple_of(LANES));
            start
        });
        let split = split.map(|split| (split, parts.0.wrapping_add(split.parts)));
        Attend {
            shape,
            sequence,
            task,
            split,
            packed,
            states,
            weights,
            parts: parts_of_tile,
            scales,
            stored: PhantomData,
        }
    }

    /// What a query of the task sees of a chunk, counted from the chunk's start.
    #[inline(always)]
    fn visible(&self, query: usize, chunk: usize) -> Range<usize> {
        let group = self.shape.heads / self.shape.kv_heads;
        let seen = self.sequence.visible((self.task.queries.start + query) / group);
        let start = chunk * CHUNK;
        seen.start.max(start) - start..seen.end.min(start + CHUNK).saturating_sub(start)
    }

    /// Where a query of the task lies among the heads of a row: its row, and its first dimension.
    #[inline(always)]
    fn place(&self, query: usize) -> (usize, usize) {
        let group = self.shape.heads / self.shape.kv_heads;
        let query = self.task.queries.start + query;
        (query / group, (self.task.head * group + query % group) * self.shape.head_dim)
    }
}

impl<N: Stored> Kernel for Attend<'_, N> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let layout = &self.sequence.kv.layout;
        let (count, part) = (self.task.queries.len(), part_len(layout));
        // SAFETY: this function's conditions; the scratch is as long as `new` has made it.
        unsafe {
            for (first, tile) in tiles(count) {
                let packed = self.packed.add(first * N::packed_len(layout));
                for t in 0..tile {
                    let (row, dim) = self.place(first + t);
                    let query = self.sequence.q.values.as_ptr().add(row * self.sequence.q.stride + dim);
                    N::pack::<S>(layout, query, self.shape.scale, t, tile, packed);
                }
            }
            for query in 0..count {
                reset(self.states.add(query * part), layout.padded());
            }
            for chunk in self.task.chunks.clone() {
                self.widen_scales::<S>(chunk);
                for (first, tile) in tiles(count) {
                    match tile {
                        1 => self.chunk::<S, 1>(chunk, first),
                        2 => self.chunk::<S, 2>(chunk, first),
                        3 => self.chunk::<S, 3>(chunk, first),
                        4 => self.chunk::<S, 4>(chunk, first),
                        5 => self.chunk::<S, 5>(chunk, first),
                        _ => self.chunk::<S, TILE>(chunk, first),
                    }
                }
            }
            if let Some((split, parts)) = self.split {
                // What the others have written is seen by the one that counts to the end.
                if split.remaining.fetch_sub(1, Ordering::AcqRel) > 1 {
                    return;
                }
                for (i, chunk) in split.chunks.clone().enumerate() {
                    for query in 0..count {
                        if !self.visible(query, chunk).is_empty() {
                            let of_chunk = parts.add((i * count + query) * part);
                            merge::<S>(self.states.add(query * part), of_chunk, layout.padded());
                        }
                    }
                }
            }
            for query in 0..count {
                self.finish::<S>(query);
            }
        }
    }
}

impl<N: Stored> Attend<'_, N> {
    /// Brings the scales of a chunk's values to f32, for all tiles.
    ///
    /// # Safety
    /// As of the kernel.
    #[inline(always)]
    unsafe fn widen_scales<S: Simd>(&self, chunk: usize) {
        let layout = &self.sequence.kv.layout;
        if layout.scale_bytes() == 0 {
            return;
        }
        let (_, scales, _) = self.sequence.kv.head(self.task.head);
        let start = chunk * CHUNK;
        for group in 0..layout.padded() / GROUP {
            for i in (0..CHUNK.min(layout.capacity - start)).step_by(LANES) {
                // SAFETY: the capacity is a whole number of vectors.
                unsafe {
                    let wide = S::load_f16(scales.add(group * layout.capacity + start + i));
                    S::store(self.scales.add(group * CHUNK + i), wide);
                }
            }
        }
    }

    /// A tile's results for a chunk.
    ///
    /// # Safety
    /// As of the kernel.
    #[inline(always)]
    unsafe fn chunk<S: Simd, const T: usize>(&self, chunk: usize, first: usize) {
        let layout = &self.sequence.kv.layout;
        let (padded, part) = (layout.padded(), part_len(layout));
        let (keys, _, values) = self.sequence.kv.head(self.task.head);
        // What each of the queries sees, and what any does.
        let mut visible = [(0, 0); T];
        let (mut from, mut to) = (CHUNK, 0);
        for t in 0..T {
            let seen = self.visible(first + t, chunk);
            if !seen.is_empty() {
                visible[t] = (seen.start, seen.end);
                (from, to) = (from.min(seen.start), to.max(seen.end));
            }
        }
        if from >= to {
            return;
        }
        // SAFETY: this function's conditions. What is seen lies within the capacity, in whole slabs.
        unsafe {
            let parts = match self.split {
                Some((split, parts)) => {
                    let queries = (chunk - split.chunks.start) * self.task.queries.len() + first;
                    parts.add(queries * part)
                }
                None => self.parts,
            };
            let packed = self.packed.add(first * N::packed_len(layout));
            for slab in from / SLAB..to.div_ceil(SLAB) {
                let position = chunk * CHUNK + slab * SLAB;
                let keys = keys.add(position / SLAB * layout.slab_bytes());
                let values = values.wrapping_add(position * STRIP.min(padded) * N::SIZE);
                let ahead = Ahead { values, strip: layout.capacity * STRIP * N::SIZE };
                N::scores::<S, T>(keys, layout, packed, self.weights.add(slab * SLAB), ahead);
            }
            for t in 0..T {
                let (most, sum) = weigh::<S>(self.weights.add(t * CHUNK), visible[t], (from, to), self.shape.softcap);
                *parts.add(t * part + padded) = most;
                *parts.add(t * part + padded + 1) = sum;
            }
            // As for keys: where a strip is more than one pass, each is over few positions.
            let fitting = const { fitting(S::REGISTERS, T) };
            let block = if fitting * LANES == STRIP { CHUNK } else { PASS };
            let next = if chunk + 1 < self.task.chunks.end { chunk + 1 } else { chunk };
            let next_keys = keys.wrapping_add(next * CHUNK / SLAB * layout.slab_bytes());
            let strip_of_keys = STRIP * layout.slab_bytes() / layout.head_dim;
            for (index, (strip, width)) in layout.strips().enumerate() {
                let values = values.add(strip + chunk * CHUNK * width * N::SIZE);
                for start in (from..to).step_by(block) {
                    let mut dim = 0;
                    while dim < width {
                        let mix = Mix {
                            values: values.add(dim * N::SIZE),
                            stride: width * N::SIZE,
                            ahead: next_keys.wrapping_add(strip_of_keys * index + dim * N::SIZE),
                            slab: layout.slab_bytes(),
                            scales: self.scales.wrapping_add((index * STRIP + dim) / GROUP * CHUNK),
                            weights: self.weights,
                            positions: start..to.min(start + block),
                            first: start == from,
                            out: parts.add(index * STRIP + dim),
                            part,
                        };
                        let vectors = (width - dim) / LANES;
                        dim += LANES
                            * if fitting >= 4 && vectors >= 4 {
                                mix.run::<S, N, T, 4>()
                            } else if fitting >= 2 && vectors >= 2 {
                                mix.run::<S, N, T, 2>()
                            } else {
                                mix.run::<S, N, T, 1>()
                            };
                    }
                }
            }
            if self.split.is_none() {
                for t in 0..T {
                    if visible[t].0 < visible[t].1 {
                        merge::<S>(self.states.add((first + t) * part), parts.add(t * part), padded);
                    }
                }
            }
        }
    }

    /// Writes a query's result.
    ///
    /// # Safety
    /// As of the kernel.
    #[inline(always)]
    unsafe fn finish<S: Simd>(&self, query: usize) {
        let layout = &self.sequence.kv.layout;
        let (row, dim) = self.place(query);
        let AttentionShape { heads, head_dim, .. } = *self.shape;
        // SAFETY: this function's conditions.
        unsafe {
            let state = self.states.add(query * part_len(layout));
            let out = self.sequence.out.add(row * heads * head_dim + dim);
            let sum = S::splat(*state.add(layout.padded() + 1));
            for dim in (0..head_dim).step_by(LANES) {
                // Zeros that were added on the way may have changed the sign of a zero. Adding one more leaves none negative.
                let value = S::add(S::div(S::load(state.add(dim)), sum), S::splat(0.0));
                store_part::<S>(out.add(dim), head_dim - dim, value);
            }
        }
    }
}

/// The state before the first position.
///
/// # Safety
/// `state` has room for a part of `padded` dimensions.
#[inline(always)]
unsafe fn reset(state: *mut f32, padded: usize) {
    // SAFETY: this function's condition.
    unsafe {
        state.write_bytes(0, padded);
        *state.add(padded) = f32::NEG_INFINITY;
        *state.add(padded + 1) = 0.0;
    }
}

/// Adds a chunk's part to a query's state.
///
/// # Safety
/// As of [`Simd`]; both are parts of `padded` dimensions.
#[inline(always)]
unsafe fn merge<S: Simd>(state: *mut f32, part: *const f32, padded: usize) {
    // SAFETY: this function's conditions.
    unsafe {
        let (old, new) = (*state.add(padded), *part.add(padded));
        let most = if old > new { old } else { new };
        let mut factors = [0f32; LANES];
        (factors[0], factors[1]) = (old - most, new - most);
        S::store(factors.as_mut_ptr(), exp::<S>(S::load(factors.as_ptr())));
        let (old, new) = (factors[0], factors[1]);
        *state.add(padded) = most;
        *state.add(padded + 1) = *state.add(padded + 1) * old + *part.add(padded + 1) * new;
        let (old, new) = (S::splat(old), S::splat(new));
        for dim in (0..padded).step_by(LANES) {
            let sum = S::fma(S::load(state.add(dim)), old, S::mul(S::load(part.add(dim)), new));
            S::store(state.add(dim), sum);
        }
    }
}

/// Turns a query's scores into weights relative to the greatest: that score, and the sum of the weights. Positions
/// `from..to` that the query does not see get a weight of 0.
///
/// # Safety
/// As of [`Simd`]; `scores` has [`CHUNK`] scores, those of whole vectors with positions `from..to` computed.
#[inline(always)]
unsafe fn weigh<S: Simd>(
    scores: *mut f32,
    (start, end): (usize, usize),
    (from, to): (usize, usize),
    softcap: Option<f32>,
) -> (f32, f32) {
    // Whole vectors, which start at the same positions whatever the window.
    let (first, last) = (start / LANES * LANES, end.next_multiple_of(LANES));
    // SAFETY: this function's conditions.
    unsafe {
        if let Some(cap) = softcap {
            for i in (first..last).step_by(LANES) {
                S::store(scores.add(i), capped::<S>(S::load(scores.add(i)), cap, 1.0 / cap));
            }
        }
        for i in (first..start).chain(end..last) {
            *scores.add(i) = f32::NEG_INFINITY;
        }
        let mut most = S::splat(f32::NEG_INFINITY);
        for i in (first..last).step_by(LANES) {
            most = S::max(most, S::load(scores.add(i)));
        }
        let most = S::greatest(most);
        let mut sum = S::splat(0.0);
        for i in (first..last).step_by(LANES) {
            let weights = exp::<S>(S::sub(S::load(scores.add(i)), S::splat(most)));
            sum = S::add(sum, weights);
            S::store(scores.add(i), weights);
        }
        for i in (from..first).chain(last..to) {
            *scores.add(i) = 0.0;
        }
        (most, S::sum(sum))
    }
}

/// Sums of a chunk's values, weighted for each query of a tile.
struct Mix {
    values: *const u8,
    /// Bytes from a position's values to the next position's.
    stride: usize,
    /// Keys of the next chunk's positions, which are asked for: as many bytes in each slab as the values have.
    ahead: *const u8,
    /// Bytes from a slab of keys to the next.
    slab: usize,
    scales: *const f32,
    weights: *const f32,
    positions: Range<usize>,
    /// Whether these are the first positions.
    first: bool,
    out: *mut f32,
    /// From a query's result to the next query's.
    part: usize,
}

impl Mix {
    /// `D` vectors of dimensions: each the sum over the positions in their order. Returns `D`.
    ///
    /// # Safety
    /// As of [`Simd`].
    #[inline(always)]
    unsafe fn run<S: Simd, N: Stored, const T: usize, const D: usize>(self) -> usize {
        // SAFETY: this function's conditions.
        let mut sums = unsafe { sums_so_far::<S, T, D>(self.out, self.part, self.first) };
        for position in self.positions {
            // SAFETY: as above.
            unsafe {
                let values = self.values.add(position * self.stride);
                let ahead = self.ahead.wrapping_add(position / SLAB * self.slab + position % SLAB * self.stride);
                prefetch::<S>(ahead, D * LANES * N::SIZE);
                let mut value = [S::splat(0.0); D];
                for d in 0..D {
                    let scale = self.scales.wrapping_add(d * LANES / GROUP * CHUNK + position);
                    value[d] = N::values::<S>(values.add(d * LANES * N::SIZE), scale);
                }
                for t in 0..T {
                    let weight = S::splat(*self.weights.add(t * CHUNK + position));
                    for d in 0..D {
                        sums[t][d] = S::fma(value[d], weight, sums[t][d]);
                    }
                }
            }
        }
        for t in 0..T {
            for d in 0..D {
                // SAFETY: this function's conditions.
                unsafe { S::store(self.out.add(t * self.part + d * LANES), sums[t][d]) }
            }
        }
        D
    }
}
