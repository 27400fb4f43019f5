//! Keys and values as they are stored, and what attention does with them.

// A tile's vectors are arrays in registers, several of them under the same index.
#![allow(clippy::needless_range_loop)]

use half::f16;

use super::{CACHE_LINE, CHUNK, PASS};
use crate::kernels::kv::{Dense, GROUP, Layout, MOST_DIMS, SLAB, STRIP, greatest, quantise};
use crate::kernels::simd::{LANES, Simd};

/// A stored type of keys and values.
pub trait Stored: 'static {
    /// Bytes of a value.
    const SIZE: usize;

    /// How many f32 a packed query takes.
    fn packed_len(layout: &Layout) -> usize;

    /// Brings query `t` of a tile of `tile` into the form that `scores` reads, times `scale`.
    ///
    /// # Safety
    /// As of [`Simd`]; the query has a value for each dimension and `packed` room for all of the tile.
    unsafe fn pack<S: Simd>(layout: &Layout, query: *const f32, scale: f32, t: usize, tile: usize, packed: *mut f32);

    /// The products of a tile of `T` queries with a slab of keys, to rows of `out` that are [`CHUNK`] apart. Asks
    /// for the same positions' values, which are wanted next.
    ///
    /// # Safety
    /// As of [`Simd`]; slab and queries are as `layout` says, and `out` has room for [`SLAB`] results in each row.
    unsafe fn scores<S: Simd, const T: usize>(
        slab: *const u8,
        layout: &Layout,
        packed: *const f32,
        out: *mut f32,
        ahead: Ahead,
    );

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
    unsafe fn scores<S: Simd, const T: usize>(
        slab: *const u8,
        layout: &Layout,
        packed: *const f32,
        out: *mut f32,
        ahead: Ahead,
    ) {
        let (slab, dims) = (slab.cast::<N>(), layout.head_dim);
        // SAFETY: this function's conditions.
        unsafe {
            match const { fitting(S::REGISTERS, T) } {
                4 => dense_scores::<S, N, T, 4>(slab, dims, packed, out, ahead),
                2 => dense_scores::<S, N, T, 2>(slab, dims, packed, out, ahead),
                _ => dense_scores::<S, N, T, 1>(slab, dims, packed, out, ahead),
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
pub const fn fitting(registers: usize, tile: usize) -> usize {
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
    ahead: Ahead,
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
                    prefetch::<S>(ahead.line(dim, SLAB * N::SIZE).wrapping_add(first * N::SIZE), P * LANES * N::SIZE);
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

/// Where the values of a slab's positions lie, as many bytes for a dimension as its keys have.
#[derive(Clone, Copy)]
pub struct Ahead {
    /// Those of the first strip.
    pub values: *const u8,
    /// Bytes from a strip to the next.
    pub strip: usize,
}

impl Ahead {
    /// The part of dimension `dim`, of `bytes` bytes.
    #[inline(always)]
    fn line(self, dim: usize, bytes: usize) -> *const u8 {
        self.values.wrapping_add(dim / STRIP * self.strip + dim % STRIP * bytes)
    }
}

/// Asks for `bytes` bytes. Keys and values are read in turns, and the hardware's prefetcher has to find its way anew each
/// time.
///
/// # Safety
/// As of [`Simd`].
#[inline(always)]
pub unsafe fn prefetch<S: Simd>(from: *const u8, bytes: usize) {
    for line in (0..bytes).step_by(CACHE_LINE) {
        // SAFETY: this function's condition.
        unsafe { S::prefetch(from.wrapping_add(line)) }
    }
}

/// Zeros for the first pass over rows of sums, and what has been stored for the next ones.
///
/// # Safety
/// As of [`Simd`]; there are `T` rows of `V` vectors, `stride` apart.
#[inline(always)]
pub unsafe fn sums_so_far<S: Simd, const T: usize, const V: usize>(
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
pub struct Quantised;

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
    unsafe fn scores<S: Simd, const T: usize>(
        slab: *const u8,
        layout: &Layout,
        packed: *const f32,
        out: *mut f32,
        ahead: Ahead,
    ) {
        // SAFETY: this function's conditions.
        unsafe {
            match const { fitting(S::REGISTERS, T) } {
                4 => quantised_scores::<S, T, 4>(slab, layout.padded(), packed, out, ahead),
                2 => quantised_scores::<S, T, 2>(slab, layout.padded(), packed, out, ahead),
                _ => quantised_scores::<S, T, 1>(slab, layout.padded(), packed, out, ahead),
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
    ahead: Ahead,
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
                    let row = ahead.line(group * GROUP + 4 * i, SLAB);
                    prefetch::<S>(row.wrapping_add(first * 4), P * LANES * 4);
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
