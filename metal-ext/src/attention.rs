//! A decode step's attention over a KV cache, from the projections' q, k and v on. The kernels are in
//! `kernels/attention.metal`; [`kv`](crate::kv) says how keys and values lie, and how rows of several sequences share a
//! dispatch, [`heads`] what is done to q and k.
//!
//! One dispatch, and a second one where a row sees so many positions that threadgroups share them. How many do follows
//! from the row's own positions and the heads, so a row's result is the same to the bit whatever rows it is dispatched
//! with. A row's own key and value count as they are stored, so they weigh the same in later steps.

use crate::encoder::{Constant, Dispatch, Encoder, Region};
use crate::error::{Error, Result};
use crate::heads::{self, QkNorm, Rope};
use crate::kv::{KvRow, KvShape, MOST_ROWS};
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
    /// How the query heads of a key head are shared out.
    fn shared(&self) -> Heads {
        Heads::new(self.heads / self.kv.kv_heads)
    }

    /// Threadgroups of a row for each split.
    fn threadgroups(&self) -> usize {
        self.kv.kv_heads * self.shared().parts
    }

    /// How the positions that a row at `position` sees are split.
    pub fn splits(&self, position: usize) -> Splits {
        Splits::new(position + 1 - self.first(position), self.threadgroups())
    }

    /// The first position that a row at `position` sees.
    fn first(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    fn table_row(&self, row: &KvRow, splits: &Splits, angles: usize) -> AttendRow {
        AttendRow {
            first: self.first(row.position) as u32,
            end: row.position as u32 + 1,
            span: splits.span as u32,
            splits: splits.count as u32,
            base: (row.offset / 16) as u32,
            capacity: row.capacity as u32,
            angles: angles as u32,
        }
    }

    /// Bytes of scratch memory that a step of `rows` rows at positions below `capacity` may need.
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

    /// The sums and the pairs of rows from `first` on that are split like this, up to the last that is used: a row with
    /// fewer splits than there is room for leaves the rest untouched.
    fn of_rows<'a, B>(&self, scratch: Region<'a, B>, first: usize, splits: &[Splits]) -> [Region<'a, B>; 2] {
        let part = |start: usize, width: usize| {
            let room = splits.len() * self.heads * self.splits;
            let unused = self.splits - splits.last().map_or(0, |splits| splits.count);
            let used = self.heads * splits.iter().map(|splits| splits.count).sum::<usize>();
            let start = scratch.after(start + first * self.heads * self.splits * width);
            start.spanning((room - unused) * width).touching(used * width)
        };
        [part(0, self.head_dim * 4), part(self.sums(), 8)]
    }
}

/// Rows whose keys lie in one region, and whose values in another. They take a dispatch.
#[derive(Debug)]
pub struct KvRows<'a, B> {
    /// The region in which the rows' keys are.
    pub keys: Region<'a, B>,
    /// The region in which the rows' values are.
    pub values: Region<'a, B>,
    /// Positions, and where in these regions their sequences are. Each is a sequence's own: a row's key is not there for
    /// another row before the dispatch is over.
    pub rows: &'a [KvRow],
    /// Rotation of q and k.
    pub rope: Option<Rope<'a, B>>,
}

/// Attention of rows, from the projections on: norms of q and k, RoPE, the append to the KV cache, and what each row sees
/// of its own position and those before it.
#[derive(Debug)]
pub struct Attention<'a, B> {
    /// What it is like.
    pub shape: AttentionShape,
    /// Rows of all heads of q, then of k, then of v, with their biases; where they begin.
    pub qkv: Region<'a, B>,
    /// Floats from one row of q, k and v to the next, a multiple of 4.
    pub stride_qkv: usize,
    /// Norm of q and k.
    pub norm: Option<QkNorm<'a, B>>,
    /// The rows, in the order in which they lie in `qkv` and `y`.
    pub sequences: &'a [KvRows<'a, B>],
    /// Where rows of results go, (heads, head_dim) each.
    pub y: Region<'a, B>,
    /// Floats from one row of results to the next, a multiple of 4.
    pub stride_y: usize,
    /// Memory for partial results, [`AttentionShape::scratch_bytes`] of it.
    pub scratch: Region<'a, B>,
}

impl<'a, B> Attention<'a, B> {
    fn rows(&self) -> impl Iterator<Item = &KvRow> {
        self.sequences.iter().flat_map(|sequences| sequences.rows)
    }

    fn check(&self) -> Result<()> {
        let AttentionShape { heads, kv, window, softcap, .. } = self.shape;
        let wrong = |reason: String| Err(Error::unsupported("attention", reason));
        for sequences in self.sequences {
            kv.check("attention", heads, sequences.rows)?;
            let mut offsets: Vec<usize> = sequences.rows.iter().map(|row| row.offset).collect();
            offsets.sort_unstable();
            if let Some(pair) = offsets.windows(2).find(|pair| pair[0] == pair[1]) {
                return wrong(format!("two rows of the sequence at byte {}, expected one of each", pair[0]));
            }
            if let Some(rope) = &sequences.rope {
                rope.check("attention", kv.head_dim)?;
            }
        }
        let count = self.rows().count();
        if count == 0 || count > MOST_ROWS {
            return wrong(format!("{count} rows, expected 1 to {MOST_ROWS}"));
        }
        if let Some(norm) = &self.norm {
            norm.check("attention")?;
        }
        if window == Some(0) {
            return wrong("a window of 0 positions, expected at least 1".into());
        }
        if let Some(cap) = softcap.filter(|cap| !(*cap > 0.0 && cap.is_finite())) {
            return wrong(format!("a soft cap of {cap}, expected a positive number"));
        }
        let (qkv_width, y_width) = ((heads + 2 * kv.kv_heads) * kv.head_dim, heads * kv.head_dim);
        for (what, stride, width) in [("q, k and v", self.stride_qkv, qkv_width), ("y", self.stride_y, y_width)] {
            if count > 1 && (stride < width || !stride.is_multiple_of(4)) {
                return wrong(format!(
                    "rows of {what} are {stride} floats apart, expected a multiple of 4 from {width}"
                ));
            }
        }
        let caches = self.sequences.iter().flat_map(|of| [("the keys", &of.keys), ("the values", &of.values)]);
        let rest = [("q, k and v", &self.qkv), ("y", &self.y), ("the partial results", &self.scratch)];
        for (what, region) in caches.chain(rest) {
            if !region.offset.is_multiple_of(16) {
                return wrong(format!("{what} begin at byte {}, expected a multiple of 16", region.offset));
            }
        }
        Ok(())
    }

    /// One dispatch for each region of keys, and one more where any row's positions are split.
    pub fn dispatches(&self) -> Result<Vec<Dispatch<'a, B>>> {
        self.check()?;
        let splits: Vec<Splits> = self.rows().map(|row| self.shape.splits(row.position)).collect();
        let partials = Partials {
            rows: splits.len(),
            heads: self.shape.heads,
            head_dim: self.shape.kv.head_dim,
            splits: splits.iter().map(|splits| splits.count).max().unwrap_or(1),
        };
        let mut first = 0;
        let mut dispatches = Vec::with_capacity(self.sequences.len() + 1);
        for sequences in self.sequences {
            let splits = &splits[first..][..sequences.rows.len()];
            dispatches.push(self.attend(sequences, first, splits, &partials));
            first += splits.len();
        }
        if partials.splits > 1 {
            dispatches.push(self.merge(&splits, &partials));
        }
        Ok(dispatches)
    }

    /// Attention of rows of one region, of which `first` is the first one's index.
    fn attend(
        &self,
        sequences: &KvRows<'a, B>,
        first: usize,
        splits: &[Splits],
        partials: &Partials,
    ) -> Dispatch<'a, B> {
        let (AttentionShape { heads, kv, .. }, KvRows { rows, rope, .. }) = (self.shape, sequences);
        let (shared, count, rope) = (self.shape.shared(), rows.len(), rope.as_ref());
        let seen = |row: &KvRow| row.position + 1 - self.shape.first(row.position);
        // A row's own key and value are written and not read.
        let read = rows.iter().map(|row| seen(row) - 1).sum();
        let cache = |region| kv.region(region, rows, read);
        let written = kv.touched(count);
        let table = rows.iter().zip(splits).enumerate().flat_map(|(index, (row, splits))| {
            let angles = rope.map_or(0, |rope| rope.table_row(index, row));
            self.shape.table_row(row, splits, angles).to_bytes()
        });
        let (qkv_width, y_width) = ((heads + 2 * kv.kv_heads) * kv.head_dim * 4, heads * kv.head_dim * 4);
        let qkv = self.qkv.after(first * self.stride_qkv * 4).rows(count, qkv_width, self.stride_qkv * 4);
        let y = self.y.after(first * self.stride_y * 4).rows(count, y_width, self.stride_y * 4);
        let mut dispatch = Dispatch::new(&LIBRARY, format!("attend_{}_{}", kv.kv_type.name(), shared.tile))
            .read(0, qkv)
            .extend(5, cache(sequences.keys), written)
            .extend(6, cache(sequences.values), written)
            .bytes(9, table.collect())
            .bytes(10, self.params(rope, partials).to_bytes())
            .threadgroup_memory(0, shared.tiles * shared.tile * kv.head_dim * 4)
            .threadgroup_memory(1, SIMDGROUPS * kv.head_dim * 4)
            .threadgroup_memory(2, SIMDGROUPS * 8)
            .threadgroup_memory(3, 2 * kv.entry_bytes())
            .grid([partials.splits, kv.kv_heads * shared.parts, count], [32 * SIMDGROUPS, 1, 1]);
        if let Some(norm) = &self.norm {
            dispatch = norm.bind(dispatch, 1, heads, &kv);
        }
        if let Some(rope) = rope {
            dispatch = rope.bind(dispatch, 3, rows);
        }
        let dispatch = match partials.splits {
            1 => dispatch.write(7, y),
            _ => {
                let [sums, stats] = partials.of_rows(self.scratch, first, splits);
                dispatch.write(7, sums).write(8, stats)
            }
        };
        self.constants(dispatch, rope, partials)
    }

    /// Brings the splits of all rows together.
    fn merge(&self, splits: &[Splits], partials: &Partials) -> Dispatch<'a, B> {
        let AttentionShape { heads, kv, .. } = self.shape;
        let [sums, stats] = partials.of_rows(self.scratch, 0, splits);
        let table = self.rows().zip(splits).flat_map(|(row, splits)| self.shape.table_row(row, splits, 0).to_bytes());
        let dispatch = Dispatch::new(&LIBRARY, "attend_merge")
            .read(0, sums)
            .read(1, stats)
            .write(2, self.y.rows(splits.len(), heads * kv.head_dim * 4, self.stride_y * 4))
            .bytes(3, table.collect())
            .bytes(4, self.params(None, partials).to_bytes())
            .grid([heads, splits.len(), 1], [32, 1, 1]);
        self.constants(dispatch, None, partials)
    }

    fn params(&self, rope: Option<&Rope<'a, B>>, partials: &Partials) -> AttendParams {
        let AttentionShape { heads, kv, scale, softcap, .. } = self.shape;
        let shared = self.shape.shared();
        AttendParams {
            kv_heads: kv.kv_heads as u32,
            group: (heads / kv.kv_heads) as u32,
            parts: shared.parts as u32,
            part_heads: shared.part as u32,
            tiles: shared.tiles as u32,
            rotary_dim: rope.map_or(0, |rope| rope.rotary_dim as u32),
            stride_qkv: self.stride_qkv as u32,
            stride_y: self.stride_y as u32,
            most_splits: partials.splits as u32,
            eps: self.norm.as_ref().map_or(0.0, |norm| norm.eps),
            scale,
            softcap: softcap.unwrap_or(0.0),
        }
    }

    fn constants(&self, dispatch: Dispatch<'a, B>, rope: Option<&Rope<'a, B>>, partials: &Partials) -> Dispatch<'a, B> {
        let dispatch = dispatch
            .constant(0, Constant::Ushort(self.shape.kv.head_dim as u16))
            .constant(1, Constant::Bool(self.shape.softcap.is_some()))
            .constant(2, Constant::Bool(partials.splits > 1));
        heads::constants(dispatch, self.norm.as_ref(), rope)
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
