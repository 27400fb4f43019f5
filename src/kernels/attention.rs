//! Grouped-query attention.
//!
//! Positions are taken 256 at a time, counted from the sequence's start. Within a chunk a query's scores become
//! weights relative to the chunk's greatest, and the weighted values are summed; the chunks' sums are put together in
//! order. A query's result is thereby one sequence of operations, whatever other queries it is computed with, whichever
//! threads take which chunks, and on every instruction set. What a query does not see has weight 0, which changes no sum.

// A tile's vectors are arrays in registers, several of them under the same index.
#![allow(clippy::needless_range_loop)]

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::f16;

use super::kv::{Dense, GROUP, KvType, LayerKv, Layout, MOST_DIMS, SLAB, STRIP, Strided, greatest, quantise};
use super::ops::{capped, exp, store_part};
use super::pool::Pool;
use super::simd::{Isa, Kernel, LANES, Simd};

/// Positions that get weights together. Their keys and values stay in a core's second-level cache.
const CHUNK: usize = 256;

/// Queries that are multiplied with a key or value once it is in a register.
const TILE: usize = 6;

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

/// A stored type of keys and values.
trait Stored: 'static {
    /// Bytes of a value.
    const SIZE: usize;

    /// How many f32 a packed query takes.
    fn packed_len(layout: &Layout) -> usize;

    /// Brings query `t` of a tile of `tile` into the form that `scores` reads, times `scale`.
    ///
    /// # Safety
    /// As of [`Simd`]; the query has a value for each dimension and `packed` room for all of the tile.
    unsafe fn pack<S: Simd>(layout: &Layout, query: *const f32, scale: f32, t: usize, tile: usize, packed: *mut f32);

    /// The products of a tile of `T` queries with a slab of keys, to rows of `out` that are [`CHUNK`] apart.
    ///
    /// # Safety
    /// As of [`Simd`]; slab and queries are as `layout` says, and `out` has room for [`SLAB`] results in each row.
    unsafe fn scores<S: Simd, const T: usize>(slab: *const u8, layout: &Layout, packed: *const f32, out: *mut f32);

    /// Sixteen of a position's values, multiplied with their group's scale if they have one.
    ///
    /// # Safety
    /// As of [`Simd`].
    unsafe fn values<S: Simd>(from: *const u8, scale: *const f32) -> S::F;
}

impl<N: Dense> Stored for N {
    const SIZE: usize = size_of::<N>();

    #[inline(always)]
    fn packed_len(layout: &Layout) -> usize {
        layout.head_dim
    }

    #[inline(always)]
    unsafe fn pack<S: Simd>(layout: &Layout, query: *const f32, scale: f32, t: usize, tile: usize, packed: *mut f32) {
        for dim in 0..layout.head_dim {
            // SAFETY: this function's conditions.
            unsafe { *packed.add(dim * tile + t) = *query.add(dim) * scale }
        }
    }

    #[inline(always)]
    unsafe fn scores<S: Simd, const T: usize>(slab: *const u8, layout: &Layout, packed: *const f32, out: *mut f32) {
        let (slab, dims) = (slab.cast::<N>(), layout.head_dim);
        // SAFETY: this function's conditions.
        unsafe {
            match const { fitting(S::REGISTERS, T) } {
                4 => dense_scores::<S, N, T, 4>(slab, dims, packed, out),
                2 => dense_scores::<S, N, T, 2>(slab, dims, packed, out),
                _ => dense_scores::<S, N, T, 1>(slab, dims, packed, out),
            }
        }
    }

    #[inline(always)]
    unsafe fn values<S: Simd>(from: *const u8, _scale: *const f32) -> S::F {
        // SAFETY: this function's conditions.
        unsafe { N::load::<S>(from.cast()) }
    }
}

/// Vectors that are multiplied with a tile of queries at a time: so many that the sums fit the registers, with a vector
/// and a query's value beside them.
const fn fitting(registers: usize, tile: usize) -> usize {
    if tile * 4 + 3 <= registers {
        4
    } else if tile * 2 + 3 <= registers {
        2
    } else {
        1
    }
}

/// `P` vectors of keys at a time: every score is the sum over the dimensions in their order.
///
/// # Safety
/// As of [`Stored::scores`].
#[inline(always)]
unsafe fn dense_scores<S: Simd, N: Dense, const T: usize, const P: usize>(
    slab: *const N,
    dims: usize,
    packed: *const f32,
    out: *mut f32,
) {
    // Where a slab is more than one pass, each is over so few dimensions that memory is read in its order.
    let block = if P * LANES == SLAB { dims } else { PASS };
    for start in (0..dims).step_by(block) {
        for first in (0..SLAB).step_by(P * LANES) {
            // SAFETY: the slab has `dims` rows of `SLAB` keys, the packed queries as many rows of `T`.
            unsafe {
                let out = out.add(first);
                let mut sums = sums_so_far::<S, T, P>(out, CHUNK, start == 0);
                for dim in start..dims.min(start + block) {
                    let (keys, queries) = (slab.add(dim * SLAB + first), packed.add(dim * T));
                    let mut key = [S::splat(0.0); P];
                    for p in 0..P {
                        key[p] = N::load::<S>(keys.add(p * LANES));
                    }
                    for t in 0..T {
                        let query = S::splat(*queries.add(t));
                        for p in 0..P {
                            sums[t][p] = S::fma(key[p], query, sums[t][p]);
                        }
                    }
                }
                for t in 0..T {
                    for p in 0..P {
                        S::store(out.add(t * CHUNK + p * LANES), sums[t][p]);
                    }
                }
            }
        }
    }
}

/// Zeros for the first pass over rows of sums, and what has been stored for the next ones.
///
/// # Safety
/// As of [`Simd`]; there are `T` rows of `V` vectors, `stride` apart.
#[inline(always)]
unsafe fn sums_so_far<S: Simd, const T: usize, const V: usize>(
    from: *const f32,
    stride: usize,
    first: bool,
) -> [[S::F; V]; T] {
    // SAFETY: this function's conditions.
    unsafe {
        let mut sums = [[S::splat(0.0); V]; T];
        if !first {
            for t in 0..T {
                for v in 0..V {
                    sums[t][v] = S::load(from.add(t * stride + v * LANES));
                }
            }
        }
        sums
    }
}

/// Bytes in groups with a scale each.
///
/// Queries are brought into such groups as well, and multiplied as integers. A tile of them is packed as four bytes of
/// each query for each four dimensions, then the scales of each group, then what [`Simd::I8_OFFSET`] adds to each group.
struct Quantised;

impl Stored for Quantised {
    const SIZE: usize = 1;

    #[inline(always)]
    fn packed_len(layout: &Layout) -> usize {
        layout.padded() / 4 + layout.padded() / GROUP * 2
    }

    #[inline(always)]
    unsafe fn pack<S: Simd>(layout: &Layout, query: *const f32, scale: f32, t: usize, tile: usize, packed: *mut f32) {
        let padded = layout.padded();
        let mut scaled = [0f32; MOST_DIMS];
        let mut bytes = [0i8; MOST_DIMS];
        let mut factors = [0f32; MOST_DIMS / GROUP];
        // SAFETY: this function's conditions.
        unsafe {
            for (dim, scaled) in scaled[..layout.head_dim].iter_mut().enumerate() {
                *scaled = *query.add(dim) * scale;
            }
            for group in 0..padded / GROUP {
                let range = group * GROUP..(group + 1) * GROUP;
                factors[group] = greatest::<S>(&scaled[range.clone()]) / 127.0;
                quantise::<S>(&scaled[range.clone()], factors[group], &mut bytes[range]);
            }
            let fours = packed.cast::<[i8; 4]>().add(t);
            for (i, four) in bytes[..padded].chunks_exact(4).enumerate() {
                *fours.add(i * tile) = [four[0], four[1], four[2], four[3]];
            }
            let scales = packed.add(padded / 4 * tile + t);
            let offsets = scales.add(padded / GROUP * tile).cast::<i32>();
            for (group, bytes) in bytes[..padded].chunks_exact(GROUP).enumerate() {
                *scales.add(group * tile) = factors[group];
                *offsets.add(group * tile) = -S::I8_OFFSET * bytes.iter().map(|&byte| byte as i32).sum::<i32>();
            }
        }
    }

    #[inline(always)]
    unsafe fn scores<S: Simd, const T: usize>(slab: *const u8, layout: &Layout, packed: *const f32, out: *mut f32) {
        // SAFETY: this function's conditions.
        unsafe {
            match const { fitting(S::REGISTERS, T) } {
                4 => quantised_scores::<S, T, 4>(slab, layout.padded(), packed, out),
                2 => quantised_scores::<S, T, 2>(slab, layout.padded(), packed, out),
                _ => quantised_scores::<S, T, 1>(slab, layout.padded(), packed, out),
            }
        }
    }

    #[inline(always)]
    unsafe fn values<S: Simd>(from: *const u8, scale: *const f32) -> S::F {
        // SAFETY: this function's conditions.
        unsafe { S::mul(S::to_f32(S::load_i8(from.cast())), S::splat(*scale)) }
    }
}

/// As [`dense_scores`]; within a group the products are exact, and the groups are added up in their order.
///
/// # Safety
/// As of [`Stored::scores`].
#[inline(always)]
unsafe fn quantised_scores<S: Simd, const T: usize, const P: usize>(
    slab: *const u8,
    padded: usize,
    packed: *const f32,
    out: *mut f32,
) {
    let groups = padded / GROUP;
    for group in 0..groups {
        for first in (0..SLAB).step_by(P * LANES) {
            // SAFETY: each group of the slab is `SLAB` scales and a row of `SLAB` times four bytes for each four dimensions.
            // The packed queries are as `pack` has made them.
            unsafe {
                let scales = slab.add(group * SLAB * (GROUP + 2)).cast::<f16>();
                let keys = scales.add(SLAB).cast::<u8>().add(first * 4);
                let queries = packed.add(group * GROUP / 4 * T).cast::<i8>();
                let query_scales = packed.add((padded / 4 + group) * T);
                let offsets = query_scales.add(groups * T).cast::<i32>();
                let mut products = [[S::splat_i(0); P]; T];
                for t in 0..T {
                    products[t] = [S::splat_i(*offsets.add(t)); P];
                }
                for i in 0..GROUP / 4 {
                    for p in 0..P {
                        let key = S::load_bytes(keys.add(i * SLAB * 4 + p * LANES * 4));
                        for t in 0..T {
                            products[t][p] = S::dot_i8(products[t][p], key, queries.add((i * T + t) * 4));
                        }
                    }
                }
                for p in 0..P {
                    let scale = S::load_f16(scales.add(first + p * LANES));
                    for t in 0..T {
                        let out = out.add(t * CHUNK + first + p * LANES);
                        let sum = if group == 0 { S::splat(0.0) } else { S::load(out) };
                        let scale = S::mul(scale, S::splat(*query_scales.add(t)));
                        S::store(out, S::fma(S::to_f32(products[t][p]), scale, sum));
                    }
                }
            }
        }
    }
}

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
    for rows in rows.iter() {
        let (kv, end, width) = (rows.kv, rows.position + rows.len, heads * head_dim);
        assert!(kv.kv_heads == kv_heads && kv.layout.head_dim == head_dim, "keys of another shape");
        assert!(end <= kv.capacity(), "position {end} is past the KV cache's {}", kv.capacity());
        assert!(rows.q.has(rows.len, width) && rows.out.len() == rows.len * width, "attention of wrong sizes");
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
        let mut work = 0;
        for (index, sequence) in sequences.iter().enumerate() {
            let queries = sequence.len * group;
            for first in (0..queries).step_by(size) {
                let end = queries.min(first + size);
                let seen = sequence.visible(first / group).start..sequence.visible((end - 1) / group).end;
                work += (end - first) * seen.len() * shape.head_dim * 2 * shape.kv_heads;
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
            plan.parts += task.chunks.len() * count * part_len(&sequences[task.sequence].kv.layout);
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

/// A cache line.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([f32; LANES]);

thread_local! {
    /// What a task works with.
    static SCRATCH: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
    /// The parts of split tasks, of the thread that asks for attention.
    static PARTS_OF_SPLITS: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// Room for `len` values, kept from call to call.
fn reserve(lines: &mut Vec<Line>, len: usize) -> *mut f32 {
    if lines.len() * LANES < len {
        lines.resize(len.div_ceil(LANES), Line([0.0; LANES]));
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
                let keys = keys.add((chunk * CHUNK / SLAB + slab) * layout.slab_bytes());
                N::scores::<S, T>(keys, layout, packed, self.weights.add(slab * SLAB));
            }
            for t in 0..T {
                let (most, sum) = weigh::<S>(self.weights.add(t * CHUNK), visible[t], (from, to), self.shape.softcap);
                *parts.add(t * part + padded) = most;
                *parts.add(t * part + padded + 1) = sum;
            }
            // As for keys: where a strip is more than one pass, each is over few positions.
            let fitting = const { fitting(S::REGISTERS, T) };
            let block = if fitting * LANES == STRIP { CHUNK } else { PASS };
            for (index, (strip, width)) in layout.strips().enumerate() {
                let values = values.add(strip + chunk * CHUNK * width * N::SIZE);
                for start in (from..to).step_by(block) {
                    let mut dim = 0;
                    while dim < width {
                        let mix = Mix {
                            values: values.add(dim * N::SIZE),
                            stride: width * N::SIZE,
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

#[cfg(test)]
mod tests {
    use super::*;

    fn values(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 7919 + seed * 104_729 + 13) % 20_011) as f32 / 10_005.5 - 1.0).collect()
    }

    /// A sequence whose queries, keys and values lie in fused rows, as a layer may compute them.
    struct Case {
        shape: AttentionShape,
        window: Option<usize>,
        rows: usize,
        fused: Vec<f32>,
    }

    impl Case {
        fn new((heads, kv_heads, head_dim): (usize, usize, usize), rows: usize, seed: usize) -> Case {
            // Sharp enough for the weights to differ.
            let scale = 6.0 / (head_dim as f32).sqrt();
            let shape = AttentionShape { heads, kv_heads, head_dim, scale, softcap: None };
            let fused = values(rows * (heads + 2 * kv_heads) * head_dim, seed);
            Case { shape, window: None, rows, fused }
        }

        fn stride(&self) -> usize {
            (self.shape.heads + 2 * self.shape.kv_heads) * self.shape.head_dim
        }

        fn width(&self) -> usize {
            self.shape.heads * self.shape.head_dim
        }

        /// From row `row` on: queries, keys, values.
        fn parts(&self, row: usize) -> [Strided<'_>; 3] {
            let AttentionShape { heads, kv_heads, head_dim, .. } = self.shape;
            [0, heads * head_dim, (heads + kv_heads) * head_dim]
                .map(|start| Strided { values: &self.fused[row * self.stride() + start..], stride: self.stride() })
        }

        fn kv(&self, kv_type: KvType) -> LayerKv {
            LayerKv::new(kv_type, self.shape.kv_heads, self.shape.head_dim, self.rows)
        }

        fn append(&self, isa: Isa, kv: &mut LayerKv, rows: Range<usize>) {
            let [_, keys, values] = self.parts(rows.start);
            kv.append(isa, rows.start, rows.len(), keys, values);
        }

        fn attend(&self, pool: &Pool, isa: Isa, kv: &LayerKv, rows: Range<usize>, out: &mut [f32]) {
            let [q, ..] = self.parts(rows.start);
            let (position, len, window) = (rows.start, rows.len(), self.window);
            attend(pool, isa, &self.shape, &mut [AttentionRows { kv, q, position, len, window, out }]);
        }

        /// All rows, so many at a time.
        fn run(&self, pool: &Pool, isa: Isa, kv_type: KvType, at_a_time: usize) -> Vec<f32> {
            let mut kv = self.kv(kv_type);
            let mut out = vec![f32::NAN; self.rows * self.width()];
            for (i, out) in out.chunks_mut(at_a_time * self.width()).enumerate() {
                let rows = i * at_a_time..self.rows.min((i + 1) * at_a_time);
                self.append(isa, &mut kv, rows.clone());
                self.attend(pool, isa, &kv, rows, out);
            }
            out
        }

        /// One row of one head, as the definition has it.
        fn reference(&self, row: usize, head: usize) -> Vec<f64> {
            let AttentionShape { heads, kv_heads, head_dim, scale, softcap } = self.shape;
            let kv_head = head / (heads / kv_heads);
            let first = self.window.map_or(0, |window| (row + 1).saturating_sub(window));
            let q = &self.parts(row)[0].values[head * head_dim..][..head_dim];
            let scores: Vec<f64> = (first..=row)
                .map(|position| {
                    let key = &self.parts(position)[1].values[kv_head * head_dim..][..head_dim];
                    let product: f64 = q.iter().zip(key).map(|(&q, &k)| q as f64 * k as f64).sum();
                    let score = product * scale as f64;
                    softcap.map_or(score, |cap| cap as f64 * (score / cap as f64).tanh())
                })
                .collect();
            let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = scores.iter().map(|score| (score - most).exp()).sum();
            let mut out = vec![0f64; head_dim];
            for (position, score) in (first..=row).zip(scores) {
                let value = &self.parts(position)[2].values[kv_head * head_dim..][..head_dim];
                for (out, value) in out.iter_mut().zip(value) {
                    *out += (score - most).exp() / sum * *value as f64;
                }
            }
            out
        }

        fn assert_right(&self, kv_type: KvType, out: &[f32], rows: impl Iterator<Item = usize>) {
            let tolerance = match kv_type {
                KvType::F32 => 1e-5,
                KvType::F16 => 2e-3,
                KvType::Q8_0 => 2e-2,
            };
            let (head_dim, width) = (self.shape.head_dim, self.width());
            for row in rows {
                for head in 0..self.shape.heads {
                    let found = &out[row * width + head * head_dim..][..head_dim];
                    for (dim, (&found, want)) in found.iter().zip(self.reference(row, head)).enumerate() {
                        let (shape, window) = (&self.shape, self.window);
                        assert!(
                            (found as f64 - want).abs() <= tolerance,
                            "{kv_type} {shape:?} window {window:?} row {row} head {head} [{dim}]: {found} for {want}"
                        );
                    }
                }
            }
        }
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    #[test]
    fn every_shape_is_right() {
        let pool = Pool::new(1).unwrap();
        let of_dims = [1, 8, 16, 20, 32, 64, 80, 96, 112, 128, 256, 512].map(|dims| (4, 2, dims));
        let of_groups = [(1, 1), (2, 1), (4, 1), (8, 1), (7, 1), (14, 2), (71, 1)].map(|(heads, kv)| (heads, kv, 24));
        for shape in of_dims.into_iter().chain(of_groups) {
            for window in [None, Some(1), Some(13)] {
                for softcap in [None, Some(2.0)] {
                    let mut case = Case::new(shape, 21, 1);
                    case.window = window;
                    case.shape.softcap = softcap;
                    for kv_type in KvType::ALL {
                        let out = case.run(&pool, Isa::detect(), kv_type, case.rows);
                        case.assert_right(kv_type, &out, 0..case.rows);
                    }
                }
            }
        }
    }

    #[test]
    fn every_length_is_right() {
        let pool = Pool::new(2).unwrap();
        for window in [None, Some(100), Some(300)] {
            let mut case = Case::new((3, 1, 16), 2 * CHUNK + 70, 2);
            case.window = window;
            for kv_type in KvType::ALL {
                let out = case.run(&pool, Isa::detect(), kv_type, 1);
                let rows = (0..140).chain(CHUNK - 3..CHUNK + 35).chain(2 * CHUNK - 3..case.rows);
                case.assert_right(kv_type, &out, rows);
            }
        }
    }

    #[test]
    fn nothing_changes_a_bit() {
        let pools = [1, 3].map(|threads| Pool::new(threads).unwrap());
        for (shape, window, softcap) in [
            ((7, 1, 40), None, None),
            ((2, 2, 64), Some(300), Some(3.0)),
            ((8, 2, 128), Some(20), None),
            ((12, 1, 16), None, Some(3.0)),
        ] {
            let mut case = Case::new(shape, 2 * CHUNK + 90, 3);
            case.window = window;
            case.shape.softcap = softcap;
            for kv_type in KvType::ALL {
                let want = bits(&case.run(&pools[0], Isa::detect(), kv_type, case.rows));
                for (pool, at_a_time) in [(0, 1), (0, 100), (1, 2), (1, 64), (1, 333), (1, case.rows)] {
                    let found = bits(&case.run(&pools[pool], Isa::detect(), kv_type, at_a_time));
                    assert!(want == found, "{kv_type} {shape:?} {window:?}: {at_a_time} rows at a time");
                }
            }
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let pool = Pool::new(1).unwrap();
        for (shape, window, softcap) in
            [((7, 1, 40), None, None), ((2, 2, 64), Some(200), Some(3.0)), ((4, 2, 16), Some(20), None)]
        {
            let mut case = Case::new(shape, CHUNK + 30, 4);
            case.window = window;
            case.shape.softcap = softcap;
            for kv_type in KvType::ALL {
                let want = bits(&case.run(&pool, Isa::SCALAR, kv_type, case.rows));
                for isa in Isa::available() {
                    let found = bits(&case.run(&pool, isa, kv_type, case.rows));
                    assert!(want == found, "{kv_type} {shape:?} {window:?}: {isa}");
                }
            }
        }
    }

    #[test]
    fn sequences_do_not_see_each_other() {
        let pools = [1, 3].map(|threads| Pool::new(threads).unwrap());
        let isa = Isa::detect();
        for kv_type in KvType::ALL {
            let cases: Vec<Case> = [1, 40, 3 * CHUNK + 5, 90].map(|rows| Case::new((4, 2, 48), rows, rows)).into();
            let kvs: Vec<LayerKv> = cases
                .iter()
                .map(|case| {
                    let mut kv = case.kv(kv_type);
                    case.append(isa, &mut kv, 0..case.rows);
                    kv
                })
                .collect();
            for pool in &pools {
                // The last few rows of each.
                let lens = [1, 1, 1, 30];
                let mut outs: Vec<Vec<f32>> =
                    cases.iter().zip(lens).map(|(case, len)| vec![f32::NAN; len * case.width()]).collect();
                let mut rows = Vec::new();
                for (((case, kv), len), out) in cases.iter().zip(&kvs).zip(lens).zip(&mut outs) {
                    let position = case.rows - len;
                    rows.push(AttentionRows { kv, q: case.parts(position)[0], position, len, window: None, out });
                }
                attend(pool, isa, &cases[0].shape, &mut rows);
                for (((case, kv), len), out) in cases.iter().zip(&kvs).zip(lens).zip(&outs) {
                    let mut alone = vec![0f32; out.len()];
                    case.attend(&pools[0], isa, kv, case.rows - len..case.rows, &mut alone);
                    assert_eq!(bits(&alone), bits(out));
                }
            }
        }
    }

    #[test]
    fn a_prefix_is_copied_and_what_was_there_before_is_not_seen() {
        let pool = Pool::new(1).unwrap();
        let isa = Isa::detect();
        for kv_type in KvType::ALL {
            for shape in [(2, 1, 16), (4, 2, 80)] {
                let case = Case::new(shape, 200, 5);
                let want = case.run(&pool, isa, kv_type, case.rows);
                let other = Case::new(shape, 300, 6);
                let other_want = other.run(&pool, isa, kv_type, other.rows);
                let mut from = case.kv(kv_type);
                case.append(isa, &mut from, 0..case.rows);
                for len in [0, 1, 15, 63, 64, 65, 130, 199] {
                    // Where another sequence has been, with more room.
                    let mut kv = other.kv(kv_type);
                    other.append(isa, &mut kv, 0..other.rows);
                    kv.copy_prefix(&from, len);
                    case.append(isa, &mut kv, len..case.rows);
                    let mut out = vec![0f32; want.len()];
                    case.attend(&pool, isa, &kv, 0..case.rows, &mut out);
                    assert!(bits(&want) == bits(&out), "{kv_type} {shape:?}: {len} positions");
                    // And back: what lies behind the prefix has not changed.
                    other.append(isa, &mut kv, 0..case.rows);
                    kv.copy_prefix(&from, len);
                    other.append(isa, &mut kv, 0..len);
                    let mut out = vec![0f32; other.rows * other.width()];
                    other.attend(&pool, isa, &kv, 0..other.rows, &mut out);
                    assert!(bits(&other_want) == bits(&out), "{kv_type} {shape:?}: behind {len} positions");
                }
            }
        }
    }

    #[test]
    fn large_values_stay_finite() {
        let pool = Pool::new(1).unwrap();
        let mut case = Case::new((2, 1, 20), 40, 7);
        case.fused.iter_mut().for_each(|value| *value *= 1e6);
        for kv_type in KvType::ALL {
            for isa in Isa::available() {
                let out = case.run(&pool, isa, kv_type, 16);
                assert!(out.iter().all(|value| value.is_finite()), "{kv_type} {isa}");
            }
        }
    }
}
