//! Attention of single queries over a KV cache. The kernels are in `kernels/attention.metal`; [`kv`](crate::kv) says how
//! keys and values lie, and how rows of several sequences share a dispatch.
//!
//! One dispatch, and a second one where a row sees so many positions that threadgroups share them. How many do follows
//! from the row's own positions and the heads, so a row's result is the same to the bit whatever rows it is dispatched
//! with.

use crate::encoder::{Constant, Dispatch, Encoder, Region};
use crate::error::{Error, Result};
use crate::kv::{KvRow, KvShape};
use crate::library::{KernelLibrary, kernel_lib};
use crate::params::{AttendParams, AttendRow};

/// The kernels.
pub static LIBRARY: KernelLibrary = kernel_lib!("attention", attention_metallib);

/// Simdgroups of a threadgroup.
const SIMDGROUPS: usize = 8;

/// Query heads of a simdgroup, at most: their sums are kept in registers.
const MOST_TILE: usize = 4;

/// Query heads of a threadgroup, at most.
const MOST_PART: usize = 8;

/// Threadgroups that share a row's positions, at most: a lane of the second kernel for each.
pub const MOST_SPLITS: usize = 32;

/// Positions that are worth a threadgroup of their own, and a second dispatch.
const LEAST_SPAN: usize = 256;

/// Threadgroups of a row beyond which splitting gains nothing: a few for each core of a large GPU.
const ENOUGH_THREADGROUPS: usize = 128;

/// Spans are multiples of this, so that no simdgroup's block of positions is cut.
const BLOCK: usize = 32;

/// How threadgroups share the positions that a row sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Splits {
    /// Threadgroups.
    pub count: usize,
    /// Positions of each; the last has what is left.
    pub span: usize,
}

impl Splits {
    /// For a row that sees `positions` positions and has `threadgroups` threadgroups for each split.
    pub fn new(positions: usize, threadgroups: usize) -> Splits {
        let span = positions.div_ceil(Splits::wanted(positions, threadgroups)).next_multiple_of(BLOCK);
        Splits { count: positions.div_ceil(span).max(1), span }
    }

    /// Threadgroups before spans are rounded up, which leaves as many or fewer. More positions never get fewer.
    fn wanted(positions: usize, threadgroups: usize) -> usize {
        let most = (ENOUGH_THREADGROUPS / threadgroups.max(1)).clamp(1, MOST_SPLITS);
        (positions / LEAST_SPAN).clamp(1, most)
    }
}

/// How the query heads of a key head are shared out.
struct Heads {
    /// Threadgroups.
    parts: usize,
    /// Query heads of a threadgroup.
    part: usize,
    /// Simdgroups of a threadgroup beside each other.
    tiles: usize,
    /// Query heads of a simdgroup.
    tile: usize,
}

impl Heads {
    fn new(group: usize) -> Heads {
        let parts = group.div_ceil(MOST_PART);
        let part = group.div_ceil(parts);
        let tile = part.next_power_of_two().min(MOST_TILE);
        Heads { parts, part, tiles: part.div_ceil(tile), tile }
    }
}

/// What attention is like, whatever the rows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads, which share the key heads in runs of equal length.
    pub heads: usize,
    /// The KV caches' shape.
    pub kv: KvShape,
    /// Factor on the scores.
    pub scale: f32,
    /// `softcap * tanh(score / softcap)` in place of the scores.
    pub softcap: Option<f32>,
    /// How many positions a row sees, itself included; all of them without one.
    pub window: Option<usize>,
}

impl AttentionShape {
    /// Threadgroups of a row for each split.
    fn threadgroups(&self) -> usize {
        self.kv.kv_heads * Heads::new(self.heads / self.kv.kv_heads).parts
    }

    /// How the positions that a row at `position` sees are split.
    pub fn splits(&self, position: usize) -> Splits {
        Splits::new(position + 1 - self.first(position), self.threadgroups())
    }

    /// The first position that a row at `position` sees.
    fn first(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// Bytes of scratch memory that a dispatch of `rows` rows at positions below `capacity` may need.
    pub fn scratch_bytes(&self, rows: usize, capacity: usize) -> usize {
        let visible = capacity.min(self.window.unwrap_or(capacity));
        let most = Splits::wanted(visible, self.threadgroups());
        match most {
            1 => 0,
            most => Partials { rows, heads: self.heads, head_dim: self.kv.head_dim, splits: most }.bytes(),
        }
    }
}

/// The partial results of split rows: (rows, heads, splits, head_dim) sums, then (rows, heads, splits) pairs of greatest
/// score and sum of weights.
struct Partials {
    rows: usize,
    heads: usize,
    head_dim: usize,
    splits: usize,
}

impl Partials {
    fn sums(&self) -> usize {
        self.rows * self.heads * self.splits * self.head_dim * 4
    }

    fn stats(&self) -> usize {
        self.rows * self.heads * self.splits * 8
    }

    fn bytes(&self) -> usize {
        self.sums() + self.stats()
    }
}

/// Attention of rows, each of which sees its own position and those before it.
#[derive(Debug)]
pub struct Attention<'a, B> {
    /// What it is like.
    pub shape: AttentionShape,
    /// Rows of queries, (heads, head_dim) each; where they begin.
    pub q: Region<'a, B>,
    /// Floats from one row of queries to the next, a multiple of 4.
    pub stride_q: usize,
    /// The region in which the rows' keys are.
    pub keys: Region<'a, B>,
    /// The region in which the rows' values are.
    pub values: Region<'a, B>,
    /// Positions, and where in these regions their sequences are.
    pub rows: &'a [KvRow],
    /// Where rows of results go, (heads, head_dim) each.
    pub y: Region<'a, B>,
    /// Floats from one row of results to the next, a multiple of 4.
    pub stride_y: usize,
    /// Memory for partial results, [`AttentionShape::scratch_bytes`] of it.
    pub scratch: Region<'a, B>,
}

impl<'a, B> Attention<'a, B> {
    fn check(&self) -> Result<()> {
        let AttentionShape { heads, kv, window, softcap, .. } = self.shape;
        kv.check("attention", heads, self.rows)?;
        let wrong = |reason: String| Err(Error::unsupported("attention", reason));
        if window == Some(0) {
            return wrong("a window of 0 positions, expected at least 1".into());
        }
        if let Some(cap) = softcap.filter(|cap| !(*cap > 0.0 && cap.is_finite())) {
            return wrong(format!("a soft cap of {cap}, expected a positive number"));
        }
        let width = heads * kv.head_dim;
        for (what, stride) in [("q", self.stride_q), ("y", self.stride_y)] {
            if self.rows.len() > 1 && (stride < width || !stride.is_multiple_of(4)) {
                return wrong(format!(
                    "rows of {what} are {stride} floats apart, expected a multiple of 4 from {width}"
                ));
            }
        }
        let regions = [("q", &self.q), ("the keys", &self.keys), ("the values", &self.values), ("y", &self.y)];
        for (what, region) in regions.into_iter().chain([("the partial results", &self.scratch)]) {
            if !region.offset.is_multiple_of(16) {
                return wrong(format!("{what} begin at byte {}, expected a multiple of 16", region.offset));
            }
        }
        Ok(())
    }

    /// One dispatch, or two.
    pub fn dispatches(&self) -> Result<Vec<Dispatch<'a, B>>> {
        self.check()?;
        let AttentionShape { heads, kv, scale, softcap, .. } = self.shape;
        let KvShape { kv_type, kv_heads, head_dim } = kv;
        let (group, count) = (heads / kv_heads, self.rows.len());
        let shared = Heads::new(group);
        let splits: Vec<Splits> = self.rows.iter().map(|row| self.shape.splits(row.position)).collect();
        let most_splits = splits.iter().map(|splits| splits.count).max().unwrap_or(1);
        let is_split = most_splits > 1;
        let mut table = Vec::new();
        let mut positions = 0;
        for (row, splits) in self.rows.iter().zip(&splits) {
            let first = self.shape.first(row.position);
            positions += row.position + 1 - first;
            let row = AttendRow {
                first: first as u32,
                end: row.position as u32 + 1,
                span: splits.span as u32,
                splits: splits.count as u32,
                base: (row.offset / 16) as u32,
                capacity: row.capacity as u32,
            };
            table.extend(row.to_bytes());
        }
        let params = AttendParams {
            kv_heads: kv_heads as u32,
            group: group as u32,
            parts: shared.parts as u32,
            part_heads: shared.part as u32,
            tiles: shared.tiles as u32,
            stride_q: self.stride_q as u32,
            stride_y: self.stride_y as u32,
            most_splits: most_splits as u32,
            scale,
            softcap: softcap.unwrap_or(0.0),
        };
        let partials = Partials { rows: count, heads, head_dim, splits: most_splits };
        // A row with fewer splits than there is room for leaves the rest untouched.
        let used = heads * splits.iter().map(|splits| splits.count).sum::<usize>();
        let sums = self.scratch.spanning(partials.sums()).touching(used * head_dim * 4);
        let stats = self.scratch.after(partials.sums()).spanning(partials.stats()).touching(used * 8);
        let (sums, stats) = self.tight(&partials, sums, stats, &splits);
        let y = self.y.rows(count, heads * head_dim * 4, self.stride_y * 4);
        let constants = |dispatch: Dispatch<'a, B>| {
            dispatch
                .constant(0, Constant::Ushort(head_dim as u16))
                .constant(1, Constant::Bool(softcap.is_some()))
                .constant(2, Constant::Bool(is_split))
        };
        let attend = Dispatch::new(&LIBRARY, format!("attend_{}_{}", kv_type.name(), shared.tile))
            .read(0, self.q.rows(count, heads * head_dim * 4, self.stride_q * 4))
            .read(1, kv.region(self.keys, self.rows, positions))
            .read(2, kv.region(self.values, self.rows, positions))
            .bytes(5, table.clone())
            .bytes(6, params.to_bytes())
            .threadgroup_memory(0, shared.tiles * shared.tile * head_dim * 4)
            .threadgroup_memory(1, SIMDGROUPS * head_dim * 4)
            .threadgroup_memory(2, SIMDGROUPS * 8)
            .grid([most_splits, kv_heads * shared.parts, count], [32 * SIMDGROUPS, 1, 1]);
        if !is_split {
            return Ok(vec![constants(attend.write(3, y))]);
        }
        let merge = Dispatch::new(&LIBRARY, "attend_merge")
            .read(0, sums)
            .read(1, stats)
            .write(2, y)
            .bytes(3, table)
            .bytes(4, params.to_bytes())
            .grid([heads, count, 1], [32, 1, 1]);
        Ok(vec![constants(attend.write(3, sums).write(4, stats)), constants(merge)])
    }

    /// The partial results up to the last that is used: those of the last head of the last row.
    fn tight(
        &self,
        partials: &Partials,
        sums: Region<'a, B>,
        stats: Region<'a, B>,
        splits: &[Splits],
    ) -> (Region<'a, B>, Region<'a, B>) {
        let unused = partials.splits - splits.last().map_or(0, |splits| splits.count);
        let shorter = |region: Region<'a, B>, bytes: usize| Region { span: region.span - bytes, ..region };
        (shorter(sums, unused * partials.head_dim * 4), shorter(stats, unused * 8))
    }

    /// Encodes it.
    pub fn encode<E: Encoder<Buffer = B>>(&self, encoder: &mut E) -> Result<()> {
        self.dispatches()?.iter().try_for_each(|dispatch| encoder.dispatch(dispatch))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_cover_all_positions_and_none_is_empty() {
        for threadgroups in [1, 2, 8, 9, 32, 128, 500] {
            let mut before = 0;
            for positions in (1..5000).chain([8191, 8192, 100_000, 1 << 20]) {
                let Splits { count, span } = Splits::new(positions, threadgroups);
                let what = format!("{positions} positions, {threadgroups} threadgroups: {count} times {span}");
                assert!(count * span >= positions && (count - 1) * span < positions, "{what}");
                assert!(span.is_multiple_of(BLOCK) && (1..=MOST_SPLITS).contains(&count), "{what}");
                assert!(count == 1 || count * threadgroups <= ENOUGH_THREADGROUPS, "{what}");
                let wanted = Splits::wanted(positions, threadgroups);
                assert!(count <= wanted && before <= wanted, "{what}");
                before = wanted;
            }
        }
    }

    #[test]
    fn few_positions_and_many_heads_are_not_split() {
        let splits = |positions, threadgroups| Splits::new(positions, threadgroups).count;
        assert_eq!([splits(1, 1), splits(511, 1), splits(512, 1), splits(512, 64), splits(512, 65)], [1, 1, 2, 2, 1]);
        assert_eq!([splits(4096, 8), splits(1 << 20, 8), splits(1 << 20, 1)], [16, 16, 32]);
    }

    #[test]
    fn query_heads_are_shared_out_evenly() {
        for group in 1..100 {
            let Heads { parts, part, tiles, tile } = Heads::new(group);
            assert!(parts * part >= group && (parts - 1) * part < group, "{group}: {parts} parts of {part}");
            assert!(tiles * tile >= part && (tiles - 1) * tile < part, "{group}: {tiles} tiles of {tile}");
            assert!(part <= MOST_PART && tile <= MOST_TILE && tiles <= 2, "{group}");
        }
    }
}
