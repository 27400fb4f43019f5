//! Keys and values of one layer of one sequence, as attention reads them: sixteen lanes at a time, with a single value of
//! the query's side for all lanes. Keys lie position by position in each dimension, values dimension by dimension in each
//! position.

#[cfg(test)]
mod tests;

use std::marker::PhantomData;

use half::f16;

use super::buffer::Buffer;
use super::ops::load_part;
use super::simd::{Isa, Kernel, LANES, Simd};
use super::size;

/// Positions whose keys lie together, dimension by dimension: what the widest registers take at a time.
pub(super) const SLAB: usize = 64;

/// Dimensions whose values lie together, position by position.
pub(super) const STRIP: usize = 64;

/// Values that share a scale in [`KvType::Q8_0`].
pub(super) const GROUP: usize = 32;

/// Greatest size of a head.
pub const MOST_DIMS: usize = 512;

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum KvType {
    /// As they are computed.
    F32,
    /// In half the memory.
    #[default]
    F16,
    /// In about a quarter: 8 bits a value, and a scale for each 32.
    Q8_0,
}

impl KvType {
    /// Every type.
    pub const ALL: [KvType; 3] = [KvType::F32, KvType::F16, KvType::Q8_0];

    /// Its name as options have it.
    pub fn name(self) -> &'static str {
        match self {
            KvType::F32 => "f32",
            KvType::F16 => "f16",
            KvType::Q8_0 => "q8_0",
        }
    }

    /// Bytes of a position's key and value in one layer; `u64::MAX` where that is more than a u64 can count.
    pub fn bytes_per_position(self, kv_heads: usize, head_dim: usize) -> u64 {
        let padding = Layout { kv_type: self, head_dim: 1, capacity: SLAB }.padded() as u128;
        let padded = (head_dim as u128).next_multiple_of(padding);
        let (keys, values) = match self {
            KvType::F32 => (4 * head_dim as u128, 4 * padded),
            KvType::F16 => (2 * head_dim as u128, 2 * padded),
            KvType::Q8_0 => {
                (padded / GROUP as u128 * (GROUP as u128 + 2), padded / GROUP as u128 * (GROUP as u128 + 2))
            }
        };
        (keys + values).checked_mul(kv_heads as u128).map_or(u64::MAX, |bytes| bytes.try_into().unwrap_or(u64::MAX))
    }
}

impl std::fmt::Display for KvType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for KvType {
    type Err = crate::Error;

    fn from_str(name: &str) -> crate::Result<KvType> {
        KvType::ALL.into_iter().find(|kv_type| kv_type.name() == name).ok_or_else(|| {
            crate::Error::option(
                "kv_type",
                format!("`{name}` is none; there are {}", KvType::ALL.map(Self::name).join(", ")),
            )
        })
    }
}

/// Where one head's keys and values lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    pub kv_type: KvType,
    pub head_dim: usize,
    /// A multiple of [`SLAB`].
    pub capacity: usize,
}

impl Layout {
    /// Dimensions with the zeros behind them: whole vectors, or whole groups.
    pub fn padded(&self) -> usize {
        self.head_dim.next_multiple_of(if self.kv_type == KvType::Q8_0 { GROUP } else { LANES })
    }

    /// Bytes of a value.
    fn size(&self) -> usize {
        match self.kv_type {
            KvType::F32 => 4,
            KvType::F16 => 2,
            KvType::Q8_0 => 1,
        }
    }

    /// Bytes of a slab of keys.
    pub fn slab_bytes(&self) -> usize {
        match self.kv_type {
            KvType::Q8_0 => self.padded() / GROUP * SLAB * (GROUP + 2),
            _ => self.head_dim * SLAB * self.size(),
        }
    }

    /// The rows of 64 positions, one element each, that a slab of keys is made of: bytes of an element of each row.
    fn slab_rows(&self) -> impl Iterator<Item = usize> {
        // In Q8_0, a group's scales are followed by its values, four dimensions to an element.
        let (rows, period) = match self.kv_type {
            KvType::Q8_0 => (self.padded() / GROUP * (GROUP / 4 + 1), GROUP / 4 + 1),
            _ => (self.head_dim, 1),
        };
        let size = self.size();
        (0..rows).map(move |row| match (period, row % period) {
            (1, _) => size,
            (_, 0) => 2,
            _ => 4,
        })
    }

    /// Bytes of the keys.
    fn key_bytes(&self) -> usize {
        self.slab_bytes() * (self.capacity / SLAB)
    }

    /// Bytes of the scales in front of the values.
    pub fn scale_bytes(&self) -> usize {
        match self.kv_type {
            KvType::Q8_0 => self.padded() / GROUP * self.capacity * 2,
            _ => 0,
        }
    }

    /// Bytes of the values with their scales.
    fn value_bytes(&self) -> usize {
        self.scale_bytes() + self.padded() * self.capacity * self.size()
    }

    /// Bytes of one head.
    fn head_bytes(&self) -> usize {
        self.key_bytes() + self.value_bytes()
    }

    /// Each strip's first byte among the values, and its width in dimensions.
    pub fn strips(&self) -> impl Iterator<Item = (usize, usize)> {
        let Layout { capacity, .. } = *self;
        let (padded, size) = (self.padded(), self.size());
        (0..padded).step_by(STRIP).map(move |dim| (dim * capacity * size, STRIP.min(padded - dim)))
    }
}

/// Rows of values, each `stride` after the one before.
#[derive(Debug, Clone, Copy)]
pub struct Strided<'a> {
    /// The values, from the first row's first on.
    pub values: &'a [f32],
    /// From a row's first value to the next row's.
    pub stride: usize,
}

impl Strided<'_> {
    /// Whether there are `rows` of `width` values.
    pub(super) fn has(&self, rows: usize, width: usize) -> bool {
        let Some(before) = rows.checked_sub(1) else { return true };
        // The first value behind the last row.
        let end = before.checked_mul(self.stride).and_then(|start| start.checked_add(width));
        (rows == 1 || self.stride >= width) && end.is_some_and(|end| end <= self.values.len())
    }
}

/// Keys and values of one layer of one sequence, allocated once for all the positions it will have.
pub struct LayerKv {
    pub(super) layout: Layout,
    pub(super) kv_heads: usize,
    /// Positions asked for; the layout's are rounded up.
    capacity: usize,
    /// For each head its keys, the scales of its values, its values.
    data: Buffer,
}

impl LayerKv {
    /// Room for `capacity` positions. Panics where no memory has so much.
    pub fn new(kv_type: KvType, kv_heads: usize, head_dim: usize, capacity: usize) -> LayerKv {
        assert!((1..=MOST_DIMS).contains(&head_dim), "heads of {head_dim} dimensions, of 1 to {MOST_DIMS}");
        let slabs = capacity.div_ceil(SLAB);
        // A head's keys and values: everything that the layout computes is a part of them.
        let of_slab = Layout { kv_type, head_dim, capacity: SLAB }.head_bytes();
        let of_head = size::product("slabs of 64 positions, and their bytes", [slabs, of_slab]);
        let bytes = size::product("KV heads, and their bytes", [kv_heads, of_head]);
        let layout = Layout { kv_type, head_dim, capacity: slabs * SLAB };
        LayerKv { layout, kv_heads, capacity, data: Buffer::zeroed(bytes) }
    }

    /// Bytes that [`new`](Self::new) allocates; `u64::MAX` where that is more than a u64 can count.
    pub fn bytes_for(kv_type: KvType, kv_heads: usize, head_dim: usize, capacity: usize) -> u64 {
        let positions = (capacity.div_ceil(SLAB) as u64).saturating_mul(SLAB as u64);
        positions.saturating_mul(kv_type.bytes_per_position(kv_heads, head_dim))
    }

    /// Bytes allocated.
    pub fn bytes(&self) -> u64 {
        self.data.as_slice().len() as u64
    }

    /// Positions that there is room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Writes the keys and values of `rows` positions from `position` on, (rows, kv_heads * head_dim) each.
    pub fn append(&mut self, isa: Isa, position: usize, rows: usize, keys: Strided, values: Strided) {
        let kv_heads = if rows == 0 { 0 } else { self.kv_heads };
        let writer = self.writer();
        for head in 0..kv_heads {
            // SAFETY: nobody else has the writer.
            unsafe { writer.append(isa, head, position, rows, keys, values) }
        }
    }

    /// For threads that write different parts at the same time.
    pub fn writer(&mut self) -> KvWriter<'_> {
        KvWriter {
            layout: self.layout,
            kv_heads: self.kv_heads,
            capacity: self.capacity,
            data: self.data.as_mut_slice().as_mut_ptr(),
            kv: PhantomData,
        }
    }

    /// Takes over the first `len` positions of a sequence of the same type and shape, to the bit.
    pub fn copy_prefix(&mut self, from: &LayerKv, len: usize) {
        let (to, layout) = (self.layout, from.layout);
        let capacity = to.capacity;
        assert!(to == Layout { capacity, ..layout } && self.kv_heads == from.kv_heads, "a prefix of another shape");
        assert!(len <= self.capacity.min(from.capacity), "a prefix of {len} positions is longer than its KV cache");
        if len == 0 {
            return;
        }
        let source = from.data.as_slice().chunks_exact(layout.head_bytes());
        let target = self.data.as_mut_slice().chunks_exact_mut(to.head_bytes());
        for (target, source) in target.zip(source) {
            let (target_keys, target) = target.split_at_mut(to.key_bytes());
            let (source_keys, source) = source.split_at(layout.key_bytes());
            let mut start = len / SLAB * layout.slab_bytes();
            target_keys[..start].copy_from_slice(&source_keys[..start]);
            // Of the last slab only these positions: behind them is what the other sequence went on with.
            if !len.is_multiple_of(SLAB) {
                for size in layout.slab_rows() {
                    let row = start..start + len % SLAB * size;
                    target_keys[row.clone()].copy_from_slice(&source_keys[row]);
                    start += SLAB * size;
                }
            }
            let (target_scales, target) = target.split_at_mut(to.scale_bytes());
            let (source_scales, source) = source.split_at(layout.scale_bytes());
            let scales = target_scales.chunks_exact_mut(to.capacity * 2);
            for (target, source) in scales.zip(source_scales.chunks_exact(layout.capacity * 2)) {
                target[..len * 2].copy_from_slice(&source[..len * 2]);
            }
            for ((target_start, width), (source_start, _)) in to.strips().zip(layout.strips()) {
                let bytes = len * width * layout.size();
                target[target_start..][..bytes].copy_from_slice(&source[source_start..][..bytes]);
            }
        }
    }

    /// One head's key at a position, as it is stored: (head_dim). For looking at, not for computing with.
    pub fn key(&self, head: usize, position: usize) -> Vec<f32> {
        let Layout { kv_type, head_dim, .. } = self.layout;
        assert!(head < self.kv_heads && position < self.capacity, "head {head}, position {position}");
        let bytes = self.layout.head_bytes();
        let slab = &self.data.as_slice()[head * bytes + position / SLAB * self.layout.slab_bytes()..];
        let lane = position % SLAB;
        let f16_at = |at: usize| f16::from_le_bytes([slab[at], slab[at + 1]]).to_f32();
        let value = |dim: usize| match kv_type {
            KvType::F32 => {
                let at = (dim * SLAB + lane) * 4;
                f32::from_le_bytes([slab[at], slab[at + 1], slab[at + 2], slab[at + 3]])
            }
            KvType::F16 => f16_at((dim * SLAB + lane) * 2),
            KvType::Q8_0 => {
                let group = dim / GROUP * SLAB * (GROUP + 2);
                let byte = SLAB * 2 + (dim % GROUP / 4 * SLAB + lane) * 4 + dim % 4;
                f16_at(group + lane * 2) * f32::from(slab[group + byte] as i8)
            }
        };
        (0..head_dim).map(value).collect()
    }

    /// A head's keys, the scales of its values, its values.
    pub(super) fn head(&self, head: usize) -> (*const u8, *const f16, *const u8) {
        let bytes = self.layout.head_bytes();
        let keys = &self.data.as_slice()[head * bytes..][..bytes];
        let (keys, values) = keys.split_at(self.layout.key_bytes());
        let (scales, values) = values.split_at(self.layout.scale_bytes());
        (keys.as_ptr(), scales.as_ptr().cast(), values.as_ptr())
    }
}

/// Writes to the keys and values of one layer of one sequence, on several threads.
pub struct KvWriter<'a> {
    layout: Layout,
    kv_heads: usize,
    capacity: usize,
    data: *mut u8,
    kv: PhantomData<&'a mut LayerKv>,
}

// SAFETY: who appends promises that no one else appends to the same head and positions at the same time.
unsafe impl Send for KvWriter<'_> {}
// SAFETY: as above.
unsafe impl Sync for KvWriter<'_> {}

impl KvWriter<'_> {
    /// Writes the keys and values of one head at `rows` positions from `position` on, out of (rows, kv_heads * head_dim)
    /// each.
    ///
    /// # Safety
    /// At the same time, nothing is written to the same head and positions, and nothing is read from the cache.
    pub unsafe fn append(&self, isa: Isa, head: usize, position: usize, rows: usize, keys: Strided, values: Strided) {
        let Layout { kv_type, head_dim, .. } = self.layout;
        let (end, capacity) = (size::end("positions to write", position, rows), self.capacity);
        assert!(end <= capacity, "position {end} is past the KV cache's {capacity}");
        let width = size::product("KV heads and their size", [self.kv_heads, head_dim]);
        assert!(head < self.kv_heads, "head {head} of {}", self.kv_heads);
        assert!(keys.has(rows, width) && values.has(rows, width), "keys or values are not {rows} rows of {width}");
        if rows == 0 {
            return;
        }
        let append = Append {
            layout: self.layout,
            // SAFETY: there are `kv_heads` parts of as many bytes.
            data: unsafe { self.data.add(head * self.layout.head_bytes()) },
            position,
            rows,
            keys: (keys.values[head * head_dim..].as_ptr(), keys.stride),
            values: (values.values[head * head_dim..].as_ptr(), values.stride),
        };
        // SAFETY: an `Isa` is one that this CPU has; positions and sizes are checked above; the caller leaves these positions
        // of the head to this call.
        unsafe {
            match kv_type {
                KvType::F32 => isa.run(AppendDense::<f32>(append, PhantomData)),
                KvType::F16 => isa.run(AppendDense::<f16>(append, PhantomData)),
                KvType::Q8_0 => isa.run(AppendQuantised(append)),
            }
        }
    }
}

/// Rows to write to one head.
struct Append {
    layout: Layout,
    data: *mut u8,
    position: usize,
    rows: usize,
    keys: (*const f32, usize),
    values: (*const f32, usize),
}

impl Append {
    /// Where row `row` goes: its slab of keys, its position in the slab, the values' scales, the values, its position.
    ///
    /// # Safety
    /// The position lies within the layout's capacity.
    #[inline(always)]
    unsafe fn place(&self, row: usize) -> (*mut u8, usize, *mut f16, *mut u8, usize) {
        let (layout, position) = (&self.layout, self.position + row);
        // SAFETY: this function's condition.
        unsafe {
            let slab = self.data.add(position / SLAB * layout.slab_bytes());
            let scales = self.data.add(layout.key_bytes());
            (slab, position % SLAB, scales.cast(), scales.add(layout.scale_bytes()), position)
        }
    }
}

struct AppendDense<T>(Append, PhantomData<T>);

impl<T: Dense> Kernel for AppendDense<T> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let append = self.0;
        let Layout { head_dim, capacity, .. } = append.layout;
        let padded = append.layout.padded();
        for row in 0..append.rows {
            // SAFETY: rows are `head_dim` long and lie within the capacity.
            unsafe {
                let (slab, lane, _, values_to, position) = append.place(row);
                let (slab, values_to) = (slab.cast::<T>().add(lane), values_to.cast::<T>());
                let keys = append.keys.0.add(row * append.keys.1);
                let values = append.values.0.add(row * append.values.1);
                for dim in (0..head_dim).step_by(LANES) {
                    let rest = head_dim - dim;
                    let mut stored = [T::default(); LANES];
                    T::store::<S>(stored.as_mut_ptr(), load_part::<S>(keys.add(dim), rest, 0.0));
                    for (i, stored) in stored[..rest.min(LANES)].iter().enumerate() {
                        *slab.add((dim + i) * SLAB) = *stored;
                    }
                    let strip = dim / STRIP * STRIP;
                    let to = values_to.add(strip * capacity + position * STRIP.min(padded - strip) + dim % STRIP);
                    T::store::<S>(to, load_part::<S>(values.add(dim), rest, 0.0));
                }
            }
        }
    }
}

struct AppendQuantised(Append);

impl Kernel for AppendQuantised {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let append = self.0;
        let Layout { head_dim, capacity, .. } = append.layout;
        let padded = append.layout.padded();
        let mut bytes = [0i8; MOST_DIMS];
        let mut scales = [f16::ZERO; MOST_DIMS / GROUP];
        for row in 0..append.rows {
            // SAFETY: rows are `head_dim` long and lie within the capacity.
            unsafe {
                let (slab, lane, scales_to, values_to, position) = append.place(row);
                quantise_row::<S>(append.keys.0.add(row * append.keys.1), head_dim, &mut bytes, &mut scales);
                for (group, (scale, bytes)) in scales.iter().zip(bytes[..padded].chunks_exact(GROUP)).enumerate() {
                    let slab = slab.add(group * SLAB * (GROUP + 2));
                    *slab.cast::<f16>().add(lane) = *scale;
                    let slab = slab.add(SLAB * 2).cast::<[i8; 4]>().add(lane);
                    for (i, four) in bytes.chunks_exact(4).enumerate() {
                        *slab.add(i * SLAB) = [four[0], four[1], four[2], four[3]];
                    }
                }
                quantise_row::<S>(append.values.0.add(row * append.values.1), head_dim, &mut bytes, &mut scales);
                for (group, (scale, bytes)) in scales.iter().zip(bytes[..padded].chunks_exact(GROUP)).enumerate() {
                    *scales_to.add(group * capacity + position) = *scale;
                    let (strip, dim) = (group * GROUP / STRIP * STRIP, group * GROUP % STRIP);
                    let to = values_to.add(strip * capacity + position * STRIP.min(padded - strip) + dim);
                    std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.cast(), GROUP);
                }
            }
        }
    }
}

/// Brings a row of keys or values into bytes with a scale for each group, the last one filled up with zeros.
///
/// # Safety
/// As of [`Simd`]; `from` points to `len` values, at most [`MOST_DIMS`].
#[inline(always)]
unsafe fn quantise_row<S: Simd>(
    from: *const f32,
    len: usize,
    bytes: &mut [i8; MOST_DIMS],
    scales: &mut [f16; MOST_DIMS / GROUP],
) {
    let mut row = [0f32; MOST_DIMS];
    let mut factors = [0f32; MOST_DIMS / GROUP];
    // SAFETY: this function's conditions. There are at most as many groups as a vector has lanes.
    unsafe {
        std::ptr::copy_nonoverlapping(from, row.as_mut_ptr(), len);
        let groups = row.chunks_exact(GROUP).take(len.div_ceil(GROUP));
        for (factor, group) in factors.iter_mut().zip(groups.clone()) {
            *factor = greatest::<S>(group) / 127.0;
        }
        // The bytes are made with the scales as they are stored, so that these are not rounded twice.
        <f16 as Dense>::store::<S>(scales.as_mut_ptr(), S::load(factors.as_ptr()));
        S::store(factors.as_mut_ptr(), S::load_f16(scales.as_ptr()));
        for ((factor, group), bytes) in factors.iter().zip(groups).zip(bytes.chunks_exact_mut(GROUP)) {
            quantise::<S>(group, *factor, bytes);
        }
    }
}

/// A stored type without scales.
pub(super) trait Dense: Copy + Default + 'static {
    /// Loads sixteen.
    ///
    /// # Safety
    /// As of [`Simd`].
    unsafe fn load<S: Simd>(from: *const Self) -> S::F;

    /// Stores sixteen.
    ///
    /// # Safety
    /// As of [`Simd`].
    unsafe fn store<S: Simd>(to: *mut Self, values: S::F);
}

// SAFETY of all blocks: the functions' conditions.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Dense for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const f32) -> S::F {
        unsafe { S::load(from) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(to: *mut f32, values: S::F) {
        unsafe { S::store(to, values) }
    }
}

#[allow(clippy::undocumented_unsafe_blocks)]
impl Dense for f16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const f16) -> S::F {
        unsafe { S::load_f16(from) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(to: *mut f16, values: S::F) {
        unsafe {
            // Values beyond F16 become its greatest: infinity times a weight of 0 would be NaN. Infinite values become
            // NaN, so that arithmetic that went wrong shows in the logits.
            let most = S::splat(f16::MAX.to_f32_const());
            let least = S::splat(f16::MIN.to_f32_const());
            let limited = S::max(least, S::min(most, values));
            S::store_f16(to, S::sub(limited, S::sub(values, values)));
        }
    }
}

/// The greatest absolute value of a group; NaN if any value is NaN.
///
/// # Safety
/// As of [`Simd`].
#[inline(always)]
pub(super) unsafe fn greatest<S: Simd>(group: &[f32]) -> f32 {
    assert!(group.len() == GROUP);
    // SAFETY: a group is two vectors.
    unsafe { S::greatest_abs(S::load(group.as_ptr()), S::load(group.as_ptr().add(LANES))) }
}

/// `group / scale`, rounded to bytes; zeros where the scale is 0.
///
/// # Safety
/// As of [`Simd`].
#[inline(always)]
pub(super) unsafe fn quantise<S: Simd>(group: &[f32], scale: f32, bytes: &mut [i8]) {
    assert!(group.len() == GROUP && bytes.len() == GROUP);
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    for i in [0, LANES] {
        // SAFETY: a group is two vectors. The limits keep what is out of a rounded scale's reach within a byte.
        unsafe {
            let value = S::mul(S::load(group.as_ptr().add(i)), S::splat(inverse));
            let value = S::max(S::splat(-127.0), S::min(S::splat(127.0), value));
            S::store_i8(bytes.as_mut_ptr().add(i), S::round(value));
        }
    }
}
