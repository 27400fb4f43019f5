//! The most likely tokens of a step's rows, looked for behind its logits: the host reads a few words back instead of the
//! vocabulary. With one token a row that is the greedy choice itself.

use crate::encoder::{Encoder, Region};
use crate::error::Result;
use crate::gemv::MOST_ROWS;
use crate::sampling::{ALL_FINITE, MOST_K, MOST_LOGITS, TopK, scratch_bytes};

/// Tokens of a row that can be looked for: fewer than there are, so that some are left out.
pub fn most_candidates(vocab_size: usize) -> usize {
    match vocab_size <= MOST_LOGITS {
        true => MOST_K.min(vocab_size.saturating_sub(1)),
        false => 0,
    }
}

/// Buffers for the most likely tokens of a step; they are made once for the most rows and tokens.
#[derive(Debug, Clone)]
pub struct Candidates<B> {
    /// Words of ids, (rows, k); of logits, (rows, k); and of the lowest id whose logit is NaN, (rows).
    pub found: B,
    /// Memory between the dispatches.
    pub scratch: B,
}

/// Bytes of a [`Candidates`]'s buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // as there
pub struct CandidateBytes {
    pub found: usize,
    pub scratch: usize,
}

/// Words of [`Candidates::found`] that a step writes.
pub fn found_words(rows: usize, k: usize) -> usize {
    rows * (2 * k + 1)
}

/// Bytes between the dispatches for a row. Each row's begin at a multiple of 8.
fn row_scratch(vocab_size: usize, k: usize) -> usize {
    scratch_bytes(vocab_size, 1, k).next_multiple_of(8)
}

impl<B> Candidates<B> {
    /// What steps over a vocabulary need.
    pub fn bytes(vocab_size: usize) -> CandidateBytes {
        let k = most_candidates(vocab_size).max(1);
        CandidateBytes { found: found_words(MOST_ROWS, k) * 4, scratch: MOST_ROWS * row_scratch(vocab_size, k) }
    }

    /// Encodes the search for the `k` most likely tokens, at most [`most_candidates`], of the step's rows `rows`, in
    /// ascending order, in `logits` as [`FusedStage::encode`](super::FusedStage::encode) leaves them.
    pub fn encode<E: Encoder<Buffer = B>>(
        &self,
        encoder: &mut E,
        logits: &B,
        vocab_size: usize,
        rows: &[usize],
        k: usize,
    ) -> Result<()> {
        let stride = super::stride(vocab_size);
        let mut done = 0;
        for run in rows.chunk_by(|a, b| a + 1 == *b) {
            let top_k = TopK {
                logits: Region::at(logits, run[0] * stride * 4),
                stride,
                vocab_size,
                rows: run.len(),
                k,
                ids: Region::at(&self.found, done * k * 4),
                values: Region::at(&self.found, (rows.len() + done) * k * 4),
                first_not_finite: Region::at(&self.found, (2 * rows.len() * k + done) * 4),
                scratch: Region::at(&self.scratch, done * row_scratch(vocab_size, k)),
            };
            top_k.encode(encoder)?;
            done += run.len();
        }
        Ok(())
    }
}

/// The tokens of a row with their logits: the most likely first, the lowest id first among equals.
pub type RowCandidates = Vec<(u32, f32)>;

/// What the words of [`Candidates::found`] say of each of `rows` rows. `None` where any logit is infinite or NaN: no token
/// is to be chosen there, and the error that reports it needs the logits.
pub fn read_candidates(words: &[u32], rows: usize, k: usize) -> Vec<Option<RowCandidates>> {
    let (ids, rest) = words.split_at(rows * k);
    let (values, not_finite) = rest.split_at(rows * k);
    let row = |row: usize| {
        let of = |words: &[u32]| words[row * k..][..k].to_vec();
        let tokens: RowCandidates = of(ids).into_iter().zip(of(values).into_iter().map(f32::from_bits)).collect();
        (not_finite[row] == ALL_FINITE).then_some(tokens)
    };
    (0..rows).map(row).collect()
}
