//! Norm of a branch before its addition to the residual stream. The kernel is in `kernels/norm_add.metal`.

use crate::encoder::{Dispatch, Encoder, Region};
use crate::error::Result;
use crate::gemv::Norm;
use crate::library::{KernelLibrary, kernel_lib};
use crate::params::NormAddParams;

/// The kernel.
pub static LIBRARY: KernelLibrary = kernel_lib!("norm_add", norm_add_metallib);

/// `y += multiplier * norm(branch)`, row by row.
#[derive(Debug)]
pub struct NormAdd<'a, B> {
    /// Rows of `width` floats; where they begin.
    pub branch: Region<'a, B>,
    /// Floats from one row of the branch to the next.
    pub stride_branch: usize,
    /// Where rows of y begin.
    pub y: Region<'a, B>,
    /// Floats from one row of y to the next.
    pub stride_y: usize,
    /// Values of a row.
    pub width: usize,
    /// Rows.
    pub rows: usize,
    /// The norm.
    pub norm: Norm<'a, B>,
    /// The factor.
    pub multiplier: f32,
}

impl<B> NormAdd<'_, B> {
    /// The dispatch.
    pub fn dispatch(&self) -> Dispatch<'_, B> {
        let params = NormAddParams {
            width: self.width as u32,
            stride_branch: self.stride_branch as u32,
            stride_y: self.stride_y as u32,
            eps: self.norm.eps,
            multiplier: self.multiplier,
        };
        Dispatch::new(&LIBRARY, "norm_add")
            .read(0, self.branch.rows(self.rows, self.width * 4, self.stride_branch * 4))
            .read(1, self.norm.gamma.spanning(self.width * 4))
            .update(2, self.y.rows(self.rows, self.width * 4, self.stride_y * 4))
            .bytes(3, params.to_bytes())
            .grid([self.rows, 1, 1], [256, 1, 1])
    }

    /// Encodes it.
    pub fn encode<E: Encoder<Buffer = B>>(&self, encoder: &mut E) -> Result<()> {
        encoder.dispatch(&self.dispatch())
    }
}
