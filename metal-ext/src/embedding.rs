//! Embeddings of tokens whose ids the GPU has found itself: with [`sampling`](crate::sampling) in front, steps follow each
//! other without the host. [`dequantise::LookUp`](crate::dequantise::LookUp) takes ids that the host knows; the kernels
//! are the same.

use crate::dequantise::{LIBRARY, THREADS, grid, params};
use crate::encoder::{Dispatch, Encoder, Region};
use crate::error::{Error, Result};
use crate::gemv::{MOST_ROWS, PackedMatrix};
use crate::params::DequantiseParams;

/// An embedding table: a row for each token of the vocabulary.
#[derive(Debug)]
pub enum Table<'a, B> {
    /// As products have it too, where the head is tied to it.
    Packed(PackedMatrix<'a, B>),
    /// Floats, row by row.
    F32 {
        /// Where they begin.
        values: Region<'a, B>,
        /// Rows.
        vocab_size: usize,
        /// Floats of a row, a multiple of 8.
        hidden_size: usize,
    },
}

/// One dispatch: rows of the table as floats, one after the other.
#[derive(Debug)]
pub struct Embedding<'a, B> {
    /// The table.
    pub table: Table<'a, B>,
    /// The tokens' ids, (rows) u32. An id outside the vocabulary, which only a mistake can bring here, gets its last row.
    pub ids: Region<'a, B>,
    /// Tokens, at most [`MOST_ROWS`].
    pub rows: usize,
    /// Of every value.
    pub multiplier: f32,
    /// Where rows go.
    pub out: Region<'a, B>,
}

impl<B> Embedding<'_, B> {
    /// The dispatch.
    pub fn dispatch(&self) -> Result<Dispatch<'_, B>> {
        let wrong = |reason: String| Err(Error::unsupported("embedding", reason));
        let rows = self.rows;
        if rows == 0 || rows > MOST_ROWS {
            return wrong(format!("{rows} tokens, expected 1 to {MOST_ROWS}"));
        }
        let (name, region, params, threadgroups, row_bytes) = match &self.table {
            Table::Packed(PackedMatrix { layout, buffer, offset }) => (
                layout.format.name(),
                Region::new(*buffer, *offset, layout.bytes),
                params(layout, rows, self.multiplier),
                grid(layout, rows),
                layout.stored_bytes() / layout.n,
            ),
            Table::F32 { values, vocab_size, hidden_size } => {
                if *vocab_size == 0 || *hidden_size == 0 || !hidden_size.is_multiple_of(8) {
                    let shape = format!("{vocab_size} by {hidden_size} floats");
                    return wrong(format!("{shape}, expected at least a row of a multiple of 8"));
                }
                let params = DequantiseParams {
                    n: *vocab_size as u32,
                    k: *hidden_size as u32,
                    stride_w: *hidden_size as u32 * 4,
                    rows: rows as u32,
                    multiplier: self.multiplier,
                    ..DequantiseParams::default()
                };
                let threadgroups = [(hidden_size / 8).div_ceil(THREADS), rows, 1];
                ("f32", values.spanning(vocab_size * hidden_size * 4), params, threadgroups, hidden_size * 4)
            }
        };
        for (what, offset, unit) in [("the table's rows", region.offset, 16), ("ids", self.ids.offset, 4)] {
            if !offset.is_multiple_of(unit) {
                return wrong(format!("{what} begin at byte {offset}, expected a multiple of {unit}"));
            }
        }
        Ok(Dispatch::new(&LIBRARY, format!("look_up_{name}"))
            .read(0, region.touching(rows * row_bytes))
            .write(1, self.out.spanning(rows * params.k as usize * 4))
            .read(2, self.ids.spanning(rows * 4))
            .bytes(3, params.to_bytes())
            .grid(threadgroups, [THREADS, 1, 1]))
    }

    /// Encodes it.
    pub fn encode<E: Encoder<Buffer = B>>(&self, encoder: &mut E) -> Result<()> {
        encoder.dispatch(&self.dispatch()?)
    }
}
