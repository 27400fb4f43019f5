//! Packed weights as plain floats: a whole matrix for a matrix-matrix product, or the rows of a few tokens. The kernels are
//! in `kernels/dequantise.metal`.

use crate::encoder::{Dispatch, Encoder, Region};
use crate::error::{Error, Result};
use crate::gemv::{MOST_ROWS, PackedMatrix};
use crate::library::{KernelLibrary, kernel_lib};
use crate::pack::{Format, MatrixLayout};
use crate::params::DequantiseParams;

/// The kernels.
pub static LIBRARY: KernelLibrary = kernel_lib!("dequantise", dequantise_metallib);

/// Threads of a threadgroup.
pub(crate) const THREADS: usize = 64;

pub(crate) fn params(layout: &MatrixLayout, rows: usize, multiplier: f32) -> DequantiseParams {
    DequantiseParams {
        n: layout.n as u32,
        k: layout.k as u32,
        stride_w: layout.stride as u32,
        scales: layout.scales as u32,
        stride_scales: layout.stride_scales as u32,
        rows: rows as u32,
        multiplier,
    }
}

/// Threadgroups over the chunks of `rows` rows.
pub(crate) fn grid(layout: &MatrixLayout, rows: usize) -> [usize; 3] {
    let chunk = match layout.format {
        Format::F16 | Format::F16Blocked | Format::BF16 => 8,
        Format::Q8_0 => 16,
        Format::Q4_0 | Format::Q4_K | Format::Q6_K => 32,
    };
    [layout.k.div_ceil(chunk).div_ceil(THREADS), rows, 1]
}

/// Every row of a matrix, (n, k).
#[derive(Debug)]
pub struct Widen<'a, B> {
    /// The matrix.
    pub matrix: PackedMatrix<'a, B>,
    /// Where its floats go.
    pub out: Region<'a, B>,
}

impl<B> Widen<'_, B> {
    /// The dispatch.
    pub fn dispatch(&self) -> Dispatch<'_, B> {
        let PackedMatrix { layout, buffer, offset } = self.matrix;
        Dispatch::new(&LIBRARY, format!("widen_{}", layout.format.name()))
            .read(0, Region::new(buffer, offset, layout.bytes))
            .write(1, self.out.spanning(layout.n * layout.k * 4))
            .bytes(2, params(&layout, layout.n, 1.0).to_bytes())
            .grid(grid(&layout, layout.n), [THREADS, 1, 1])
    }

    /// Encodes it.
    pub fn encode<E: Encoder<Buffer = B>>(&self, encoder: &mut E) -> Result<()> {
        encoder.dispatch(&self.dispatch())
    }
}

/// The rows of a few tokens as floats, (tokens, k): the beginning of a step.
#[derive(Debug)]
pub struct LookUp<'a, B> {
    /// The embedding table.
    pub table: PackedMatrix<'a, B>,
    /// At most [`MOST_ROWS`].
    pub tokens: &'a [u32],
    /// Of every value.
    pub multiplier: f32,
    /// Where rows of floats go, one after the other.
    pub out: Region<'a, B>,
}

impl<B> LookUp<'_, B> {
    /// The dispatch.
    pub fn dispatch(&self) -> Result<Dispatch<'_, B>> {
        let PackedMatrix { layout, buffer, offset } = self.table;
        let wrong = |reason: String| Err(Error::unsupported("look_up", reason));
        if let Some(token) = self.tokens.iter().find(|&&token| token as usize >= layout.n) {
            return wrong(format!("token {token} is outside the {} rows of the table", layout.n));
        }
        if self.tokens.is_empty() || self.tokens.len() > MOST_ROWS {
            return wrong(format!("{} tokens, expected 1 to {MOST_ROWS}", self.tokens.len()));
        }
        let rows = self.tokens.len();
        let touched = rows * (layout.stored_bytes() / layout.n);
        Ok(Dispatch::new(&LIBRARY, format!("look_up_{}", layout.format.name()))
            .read(0, Region::new(buffer, offset, layout.bytes).touching(touched))
            .write(1, self.out.spanning(rows * layout.k * 4))
            .bytes(2, self.tokens.iter().flat_map(|token| token.to_le_bytes()).collect())
            .bytes(3, params(&layout, rows, self.multiplier).to_bytes())
            .grid(grid(&layout, rows), [THREADS, 1, 1]))
    }

    /// Encodes it.
    pub fn encode<E: Encoder<Buffer = B>>(&self, encoder: &mut E) -> Result<()> {
        encoder.dispatch(&self.dispatch()?)
    }
}
