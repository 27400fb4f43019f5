//! Softmax by itself: what prefill uses where [`SoftmaxBackend`](crate::options::SoftmaxBackend) says so. A decode step's
//! is part of its attention. The kernel is in `kernels/softmax.metal`.

use crate::encoder::{Dispatch, Encoder, Region};
use crate::error::{Error, Result};
use crate::library::{KernelLibrary, kernel_lib};
use crate::params::SoftmaxParams;

/// The kernel.
pub static LIBRARY: KernelLibrary = kernel_lib!("softmax", softmax_metallib);

/// Threads of a threadgroup, at most.
const MOST_THREADS: usize = 256;

/// `y = softmax(scale * x)`, row by row. A row of nothing but minus infinity has no softmax and becomes NaN.
#[derive(Debug)]
pub struct Softmax<'a, B> {
    /// Rows of `width` floats; where they begin.
    pub x: Region<'a, B>,
    /// Floats from one row of x to the next, a multiple of 4.
    pub stride_x: usize,
    /// Where rows of y begin; not the buffer of x.
    pub y: Region<'a, B>,
    /// Floats from one row of y to the next, a multiple of 4.
    pub stride_y: usize,
    /// Values of a row.
    pub width: usize,
    /// Rows.
    pub rows: usize,
    /// The factor.
    pub scale: f32,
}

impl<B> Softmax<'_, B> {
    fn check(&self) -> Result<()> {
        let wrong = |reason: String| Err(Error::unsupported("softmax", reason));
        let width = self.width;
        if width == 0 || self.rows == 0 {
            return wrong(format!("{} rows of {width} values, expected at least one of each", self.rows));
        }
        for (what, region, stride) in [("x", &self.x, self.stride_x), ("y", &self.y, self.stride_y)] {
            if self.rows > 1 && (stride < width || !stride.is_multiple_of(4)) {
                return wrong(format!(
                    "rows of {what} are {stride} floats apart, expected a multiple of 4 from {width}"
                ));
            }
            if !region.offset.is_multiple_of(16) {
                return wrong(format!("{what} begins at byte {}, expected a multiple of 16", region.offset));
            }
        }
        Ok(())
    }

    /// The dispatch.
    pub fn dispatch(&self) -> Result<Dispatch<'_, B>> {
        self.check()?;
        let params = SoftmaxParams {
            width: self.width as u32,
            stride_x: self.stride_x as u32,
            stride_y: self.stride_y as u32,
            scale: self.scale,
        };
        // Short rows leave no thread without four values.
        let threads = self.width.div_ceil(4).next_multiple_of(32).min(MOST_THREADS);
        let x = self.x.rows(self.rows, self.width * 4, self.stride_x * 4);
        Ok(Dispatch::new(&LIBRARY, "softmax")
            .read(0, x)
            .write(1, self.y.rows(self.rows, self.width * 4, self.stride_y * 4))
            .bytes(2, params.to_bytes())
            .grid([self.rows, 1, 1], [threads, 1, 1]))
    }

    /// Encodes it.
    pub fn encode<E: Encoder<Buffer = B>>(&self, encoder: &mut E) -> Result<()> {
        encoder.dispatch(&self.dispatch()?)
    }
}
