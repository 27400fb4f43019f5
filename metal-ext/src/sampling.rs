//! The most likely tokens of each row of logits, found where the logits are: a step then reads back a few ids instead of
//! the vocabulary. The kernels are in `kernels/top_k.metal`.
//!
//! The order is the sampler's: the greatest logit first, the lowest id first among equals, NaN last. The lowest id whose
//! logit is infinite or NaN is reported, since a sampler refuses such logits.

use crate::encoder::{Dispatch, Encoder, Region};
use crate::error::{Error, Result};
use crate::library::{KernelLibrary, kernel_lib};
use crate::params::TopKParams;

/// The kernels.
pub static LIBRARY: KernelLibrary = kernel_lib!("top_k", top_k_metallib);

/// Logits that a simdgroup searches first.
const PIECE: usize = 1024;

/// Simdgroups of a threadgroup, each with a piece: `SIMDGROUPS` of the kernel.
const SIMDGROUPS: usize = 4;

/// The longest row of logits: 16 pieces for each lane of the second pass.
pub const MOST_LOGITS: usize = 32 * 16 * PIECE;

/// Most tokens of a row. Each takes a turn of both passes, so that many of them are better searched for elsewhere.
pub const MOST_K: usize = 256;

/// In [`TopK::first_not_finite`]: no logit is infinite or NaN.
pub const ALL_FINITE: u32 = u32::MAX;

/// Two dispatches: the `k` greatest logits of each row, in order. With `k = 1` that is argmax.
#[derive(Debug)]
pub struct TopK<'a, B> {
    /// Rows of `vocab_size` floats; where they begin.
    pub logits: Region<'a, B>,
    /// Floats from one row of logits to the next, a multiple of 4.
    pub stride: usize,
    /// Logits of a row.
    pub vocab_size: usize,
    /// Rows.
    pub rows: usize,
    /// Tokens wanted of each row.
    pub k: usize,
    /// Where ids go: (rows, k) u32.
    pub ids: Region<'a, B>,
    /// Where their logits go: (rows, k) floats.
    pub values: Region<'a, B>,
    /// Where the lowest id whose logit is infinite or NaN goes, or [`ALL_FINITE`]: (rows) u32.
    pub first_not_finite: Region<'a, B>,
    /// Memory between the dispatches, [`scratch_bytes`] of it.
    pub scratch: Region<'a, B>,
}

/// Bytes of scratch memory for `rows` rows of `vocab_size` logits.
pub fn scratch_bytes(vocab_size: usize, rows: usize, k: usize) -> usize {
    rows * vocab_size.div_ceil(PIECE) * (k * 8 + 4)
}

impl<'a, B> TopK<'a, B> {
    fn check(&self) -> Result<()> {
        let wrong = |reason: String| Err(Error::unsupported("top_k", reason));
        let TopK { vocab_size, rows, k, stride, .. } = *self;
        if vocab_size == 0 || vocab_size > MOST_LOGITS {
            return wrong(format!("{vocab_size} logits, expected 1 to {MOST_LOGITS}"));
        }
        if k == 0 || k > MOST_K.min(vocab_size) {
            return wrong(format!("{k} tokens wanted, expected 1 to {}", MOST_K.min(vocab_size)));
        }
        if rows == 0 {
            return wrong("no rows".into());
        }
        if rows > 1 && (stride < vocab_size || !stride.is_multiple_of(4)) {
            return wrong(format!(
                "rows of logits are {stride} floats apart, expected a multiple of 4 from {vocab_size}"
            ));
        }
        for (what, offset, unit) in [
            ("logits", self.logits.offset, 16),
            ("ids", self.ids.offset, 4),
            ("values", self.values.offset, 4),
            ("first_not_finite", self.first_not_finite.offset, 4),
            ("scratch", self.scratch.offset, 8),
        ] {
            if !offset.is_multiple_of(unit) {
                return wrong(format!("{what} begin at byte {offset}, expected a multiple of {unit}"));
            }
        }
        Ok(())
    }

    /// The dispatches.
    pub fn dispatches(&self) -> Result<[Dispatch<'a, B>; 2]> {
        self.check()?;
        let TopK { vocab_size, rows, k, .. } = *self;
        let lists = vocab_size.div_ceil(PIECE);
        let params = TopKParams { n: vocab_size as u32, stride: self.stride as u32, k: k as u32, lists: lists as u32 };
        let candidates = self.scratch.spanning(rows * lists * k * 8);
        let lost = self.scratch.after(rows * lists * k * 8).spanning(rows * lists * 4);
        let pieces = Dispatch::new(&LIBRARY, "top_k_pieces")
            .read(0, self.logits.rows(rows, vocab_size * 4, self.stride * 4))
            .write(1, candidates)
            .write(2, lost)
            .bytes(3, params.to_bytes())
            .grid([lists.div_ceil(SIMDGROUPS), rows, 1], [32 * SIMDGROUPS, 1, 1]);
        let merge = Dispatch::new(&LIBRARY, "top_k_merge")
            .read(0, candidates)
            .read(1, lost)
            .write(2, self.ids.spanning(rows * k * 4))
            .write(3, self.values.spanning(rows * k * 4))
            .write(4, self.first_not_finite.spanning(rows * 4))
            .bytes(5, params.to_bytes())
            .grid([rows, 1, 1], [32, 1, 1]);
        Ok([pieces, merge])
    }

    /// Encodes it.
    pub fn encode<E: Encoder<Buffer = B>>(&self, encoder: &mut E) -> Result<()> {
        self.dispatches()?.iter().try_for_each(|dispatch| encoder.dispatch(dispatch))
    }
}
