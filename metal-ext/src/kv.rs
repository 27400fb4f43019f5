//! The KV cache of one layer of one sequence, as kernels read and write it.
//!
//! Keys and values are two regions of the same layout:
//!
//! | type | layout |
//! |---|---|
//! | F16 | halves, (kv_heads, capacity, head_dim) |
//! | Q8_0 | int8, (kv_heads, capacity, head_dim); then their scales, halves, (kv_heads, capacity, ceil(head_dim / 32)) |
//!
//! The F16 layout is a contiguous tensor of candle's, so a prefill by candle's kernels and a decode step by these share
//! it. In Q8_0, 32 neighbouring values of a head share a scale, and a last group of a head may be shorter; a value is its
//! byte times its scale. The scales are kept apart so that each position's bytes begin at a multiple of 16.
//!
//! # Rows of several sequences
//!
//! A dispatch takes rows of any sequences, as long as their keys lie in one region and their values in another: a
//! [`KvRow`] says where in both its sequence begins. The rows' table goes along with the dispatch (28 bytes a row),
//! so there is no buffer that the host must not overwrite while the GPU still reads it. Sequences in buffers of their own
//! take a dispatch each, with an offset of 0.

use crate::encoder::Region;
use crate::error::{Error, Result};

/// Rows that one dispatch takes: what their table's 4 KiB hold.
pub const MOST_ROWS: usize = 128;

/// The largest head.
pub const MOST_DIM: usize = 256;

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[allow(non_camel_case_types)]
pub enum KvType {
    /// Half floats.
    #[default]
    F16,
    /// 8 bits a value, and a scale for each 32.
    Q8_0,
}

impl KvType {
    /// Both.
    pub const ALL: [KvType; 2] = [KvType::F16, KvType::Q8_0];

    /// The name that kernels have it under.
    pub fn name(self) -> &'static str {
        match self {
            KvType::F16 => "f16",
            KvType::Q8_0 => "q8_0",
        }
    }
}

/// What all sequences of a model have alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// How keys and values are stored.
    pub kv_type: KvType,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Size of a head, a multiple of 16 up to [`MOST_DIM`].
    pub head_dim: usize,
}

impl KvShape {
    /// Bytes of a head's key, or value, at one position: without its scales, and of these.
    fn position_bytes(&self) -> (usize, usize) {
        match self.kv_type {
            KvType::F16 => (self.head_dim * 2, 0),
            KvType::Q8_0 => (self.head_dim, self.head_dim.div_ceil(32) * 2),
        }
    }

    /// The same together.
    pub(crate) fn entry_bytes(&self) -> usize {
        let (values, scales) = self.position_bytes();
        values + scales
    }

    /// Bytes of the keys, or of the values, at `positions` positions.
    pub(crate) fn touched(&self, positions: usize) -> usize {
        positions * self.kv_heads * self.entry_bytes()
    }

    /// Bytes of the keys, or of the values, of a sequence with room for `capacity` positions.
    pub fn bytes(&self, capacity: usize) -> usize {
        self.touched(capacity)
    }

    /// Bytes from a sequence's start to the end of position `end - 1` in the last head, behind which nothing is touched.
    fn reach(&self, capacity: usize, end: usize) -> usize {
        let (values, scales) = self.position_bytes();
        let last = (self.kv_heads - 1) * capacity + end;
        match scales {
            0 => last * values,
            scales => self.kv_heads * capacity * values + last * scales,
        }
    }

    /// The part of `region`, in which the rows' sequences lie, up to the last byte of the last position of each, of which
    /// `positions` positions are read.
    pub(crate) fn region<'a, B>(&self, region: Region<'a, B>, rows: &[KvRow], positions: usize) -> Region<'a, B> {
        let reach = |row: &KvRow| row.offset + self.reach(row.capacity, row.position + 1);
        region.spanning(rows.iter().map(reach).max().unwrap_or(0)).touching(self.touched(positions))
    }

    /// Refuses shapes and rows that the kernels do not take.
    pub(crate) fn check(&self, kernel: &str, heads: usize, rows: &[KvRow]) -> Result<()> {
        let wrong = |reason: String| Err(Error::unsupported(kernel, reason));
        let KvShape { kv_heads, head_dim, .. } = *self;
        if head_dim == 0 || head_dim > MOST_DIM || !head_dim.is_multiple_of(16) {
            return wrong(format!("heads of {head_dim} values, expected a multiple of 16 up to {MOST_DIM}"));
        }
        if kv_heads == 0 || heads == 0 || !heads.is_multiple_of(kv_heads) {
            return wrong(format!("{heads} query heads cannot share {kv_heads} key heads"));
        }
        if rows.is_empty() || rows.len() > MOST_ROWS {
            return wrong(format!("{} rows, expected 1 to {MOST_ROWS}", rows.len()));
        }
        for row in rows {
            let KvRow { position, capacity, offset } = *row;
            if position >= capacity {
                return wrong(format!("position {position} is past the KV cache's {capacity}"));
            }
            if !offset.is_multiple_of(16) {
                return wrong(format!("a sequence's keys begin at byte {offset}, expected a multiple of 16"));
            }
            if u32::try_from(offset / 16).is_err() || u32::try_from(capacity).is_err() {
                return wrong(format!(
                    "a KV cache of {capacity} positions at byte {offset} is out of a kernel's reach"
                ));
            }
        }
        Ok(())
    }
}

/// A row of a dispatch: a position of a sequence, and where that sequence's keys and values are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvRow {
    /// The position, from 0 on.
    pub position: usize,
    /// Positions that the sequence has room for.
    pub capacity: usize,
    /// Where in the region of keys, and in that of values, the sequence begins: bytes, a multiple of 16.
    pub offset: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_cache_reaches_to_its_end() {
        for kv_type in KvType::ALL {
            for head_dim in [16, 64, 80, 96, 128, 256] {
                let shape = KvShape { kv_type, kv_heads: 3, head_dim };
                assert_eq!(shape.reach(10, 10), shape.bytes(10));
                assert!(shape.reach(10, 9) < shape.bytes(10));
            }
        }
    }

    #[test]
    fn sizes_are_those_of_the_table() {
        let shape = |kv_type| KvShape { kv_type, kv_heads: 8, head_dim: 80 };
        assert_eq!(shape(KvType::F16).bytes(1000), 8 * 1000 * 80 * 2);
        assert_eq!(shape(KvType::Q8_0).bytes(1000), 8 * 1000 * (80 + 3 * 2));
    }
}
