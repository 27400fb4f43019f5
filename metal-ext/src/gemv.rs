//! Matrix-vector products: what is dispatched for which shape. The kernels are in `kernels/gemv.metal`.

use crate::encoder::{Constant, Dispatch, Encoder, Region};
use crate::error::{Error, Result};
use crate::library::{KernelLibrary, kernel_lib};
use crate::options::ColumnsPerThreadgroup;
use crate::pack::MatrixLayout;
use crate::params::GemvParams;

/// The kernels.
pub static LIBRARY: KernelLibrary = kernel_lib!("gemv", gemv_metallib);

/// Rows of x that one dispatch takes.
pub const MOST_ROWS: usize = 8;

/// A packed matrix in a buffer.
#[derive(Debug)]
pub struct PackedMatrix<'a, B> {
    /// Its parts.
    pub layout: MatrixLayout,
    /// The buffer.
    pub buffer: &'a B,
    /// Where the matrix begins, in bytes; a multiple of 16.
    pub offset: usize,
}

// Not derived: that would ask for `B: Clone`.
impl<B> Clone for PackedMatrix<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B> Copy for PackedMatrix<'_, B> {}

/// RMSNorm of x before the product.
#[derive(Debug)]
pub struct Norm<'a, B> {
    /// `k` floats.
    pub gamma: Region<'a, B>,
    /// Added to the mean square.
    pub eps: f32,
}

/// The function between gate and up projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Gate {
    /// `x * sigmoid(x)`.
    Silu,
    /// GELU by its tanh approximation.
    GeluTanh,
}

/// What becomes of the product.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Finish {
    /// `y = product`; several matrices' outputs one after the other.
    Store,
    /// `y += multiplier * product`.
    Add {
        /// The factor.
        multiplier: f32,
    },
    /// `y = gate(first product) * second product`.
    Gated(Gate),
}

/// One dispatch: the products of one to three matrices with the same rows of x.
#[derive(Debug)]
pub struct Gemv<'a, B> {
    /// Of one format and one `k`; two of them of one size with [`Finish::Gated`].
    pub matrices: &'a [PackedMatrix<'a, B>],
    /// Rows of `k` floats; where they begin.
    pub x: Region<'a, B>,
    /// Floats from one row of x to the next, a multiple of 4.
    pub stride_x: usize,
    /// Rows of floats; where they begin.
    pub y: Region<'a, B>,
    /// Floats from one row of y to the next.
    pub stride_y: usize,
    /// Rows of x and y, at most [`MOST_ROWS`].
    pub rows: usize,
    /// Norm of x.
    pub norm: Option<Norm<'a, B>>,
    /// A float for each row of each matrix, one matrix's after the other's.
    pub bias: Option<Region<'a, B>>,
    /// What becomes of the product.
    pub finish: Finish,
}

impl<B> Gemv<'_, B> {
    /// Floats of a row of y.
    pub fn width(&self) -> usize {
        match self.finish {
            Finish::Gated(_) => self.matrices.first().map_or(0, |matrix| matrix.layout.n),
            Finish::Store | Finish::Add { .. } => self.matrices.iter().map(|matrix| matrix.layout.n).sum(),
        }
    }

    fn check(&self) -> Result<()> {
        let wrong = |reason: String| Err(Error::unsupported("gemv", reason));
        let Some(first) = self.matrices.first() else { return wrong("no matrix is given".into()) };
        let (count, MatrixLayout { format, k, .. }) = (self.matrices.len(), first.layout);
        if self.matrices.iter().any(|matrix| matrix.layout.format != format || matrix.layout.k != k) {
            return wrong("matrices of one dispatch have one format and one k".into());
        }
        if count > 3 {
            return wrong(format!("{count} matrices, at most 3 fit into a dispatch"));
        }
        if matches!(self.finish, Finish::Gated(_)) && (count != 2 || first.layout.n != self.matrices[1].layout.n) {
            return wrong("a gate needs two matrices of one size".into());
        }
        if self.rows == 0 || self.rows > MOST_ROWS {
            return wrong(format!("{} rows, expected 1 to {MOST_ROWS}", self.rows));
        }
        if self.rows > 1 && (self.stride_x < k || !self.stride_x.is_multiple_of(4)) {
            return wrong(format!("rows of x are {} floats apart, expected a multiple of 4 from {k}", self.stride_x));
        }
        if self.rows > 1 && self.stride_y < self.width() {
            return wrong(format!("rows of y are {} floats apart, and {} wide", self.stride_y, self.width()));
        }
        let loaded = self.matrices.iter().map(|matrix| ("a matrix", matrix.offset));
        let loaded = loaded.chain([("x", self.x.offset)]);
        let loaded = loaded.chain(self.norm.as_ref().map(|norm| ("gamma", norm.gamma.offset)));
        for (what, offset) in loaded {
            if !offset.is_multiple_of(16) {
                return wrong(format!("{what} begins at byte {offset}, expected a multiple of 16"));
            }
        }
        Ok(())
    }

    /// The dispatch.
    pub fn dispatch(&self, columns: ColumnsPerThreadgroup) -> Result<Dispatch<'_, B>> {
        self.check()?;
        let layout = self.matrices[0].layout;
        let gated = matches!(self.finish, Finish::Gated(_));
        let (finish, multiplier) = match self.finish {
            Finish::Store => (0, 0.0),
            Finish::Add { multiplier } => (1, multiplier),
            Finish::Gated(Gate::Silu) => (2, 0.0),
            Finish::Gated(Gate::GeluTanh) => (3, 0.0),
        };
        // Rows that a simdgroup takes at once: each is multiplied with weights that are read once.
        let rows = match self.rows {
            1 => 1,
            2 => 2,
            _ => 4,
        };
        let part = |index: usize| self.matrices.get(index).map(|matrix| matrix.layout);
        let params = GemvParams {
            k: layout.k as u32,
            n0: layout.n as u32,
            n1: part(1).map_or(0, |layout| layout.n as u32),
            n2: part(2).map_or(0, |layout| layout.n as u32),
            rows: self.rows as u32,
            stride_x: self.stride_x as u32,
            stride_y: self.stride_y as u32,
            stride_w: layout.stride as u32,
            scales0: layout.scales as u32,
            scales1: part(1).map_or(0, |layout| layout.scales as u32),
            scales2: part(2).map_or(0, |layout| layout.scales as u32),
            stride_scales: layout.stride_scales as u32,
            eps: self.norm.as_ref().map_or(0.0, |norm| norm.eps),
            multiplier,
        };
        let outputs = if gated { &self.matrices[..1] } else { self.matrices };
        let tiles: usize = outputs.iter().map(|matrix| matrix.layout.n.div_ceil(layout.format.columns())).sum();
        let simdgroups = columns.simdgroups();
        let y = self.y.rows(self.rows, self.width() * 4, self.stride_y * 4);
        let mut dispatch = Dispatch::new(&LIBRARY, format!("gemv_{}_{rows}", layout.format.name()))
            .constant(0, Constant::Bool(self.norm.is_some()))
            .constant(1, Constant::Bool(self.bias.is_some()))
            .constant(2, Constant::Bool(self.matrices.len() > 1))
            .constant(3, Constant::Bool(self.matrices.len() > 2))
            .constant(4, Constant::Ushort(finish))
            .read(3, self.x.rows(self.rows, layout.k * 4, self.stride_x * 4))
            .read_if(4, self.norm.as_ref().map(|norm| norm.gamma.spanning(layout.k * 4)))
            .bytes(7, params.to_bytes())
            .grid([tiles.div_ceil(simdgroups), 1, self.rows.div_ceil(rows)], [32 * simdgroups, 1, 1]);
        for (index, matrix) in (0..).zip(self.matrices) {
            dispatch = dispatch.read(index, Region::new(matrix.buffer, matrix.offset, matrix.layout.bytes));
        }
        if let Some(bias) = self.bias {
            let all: usize = self.matrices.iter().map(|matrix| matrix.layout.n).sum();
            dispatch = dispatch.read(5, bias.spanning(all * 4));
        }
        Ok(match self.finish {
            Finish::Add { .. } => dispatch.update(6, y),
            Finish::Store | Finish::Gated(_) => dispatch.write(6, y),
        })
    }

    /// Encodes it.
    pub fn encode<E: Encoder<Buffer = B>>(&self, encoder: &mut E, columns: ColumnsPerThreadgroup) -> Result<()> {
        encoder.dispatch(&self.dispatch(columns)?)
    }
}
