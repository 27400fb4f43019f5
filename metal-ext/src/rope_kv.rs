//! Between the products for q, k and v and attention: norms of q and k, RoPE, and what is kept of k and v, in one
//! dispatch. The kernels are in `kernels/rope_kv.metal`; [`kv`](crate::kv) says where keys and values go.

use crate::encoder::{Constant, Dispatch, Encoder, Region};
use crate::error::{Error, Result};
use crate::kv::{KvRow, KvShape};
use crate::library::{KernelLibrary, kernel_lib};
use crate::params::{RopeKvParams, RopeKvRow};

/// The kernels.
pub static LIBRARY: KernelLibrary = kernel_lib!("rope_kv", rope_kv_metallib);

/// Simdgroups of a threadgroup, each with a head: `SIMDGROUPS` of the kernel.
const SIMDGROUPS: usize = 4;

/// RMSNorm of q and k before they are rotated.
#[derive(Debug)]
pub struct QkNorm<'a, B> {
    /// What is normalised.
    pub over: NormOver,
    /// Floats of the norm of q: head_dim, or heads * head_dim over the whole projection.
    pub gamma_q: Region<'a, B>,
    /// Floats of the norm of k: head_dim, or kv_heads * head_dim over the whole projection.
    pub gamma_k: Region<'a, B>,
    /// Added to the mean square.
    pub eps: f32,
}

/// What a norm of q and k is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NormOver {
    /// Each head by itself.
    Head,
    /// All heads of a row together.
    Projection,
}

/// Rotary embedding with angles from tables.
#[derive(Debug)]
pub struct Rope<'a, B> {
    /// Cosines: rows of `rotary_dim / 2` floats.
    pub cos: Region<'a, B>,
    /// Sines, in the same form.
    pub sin: Region<'a, B>,
    /// Which row of the tables a row of the dispatch takes.
    pub angles: Angles,
    /// Leading values of a head that are rotated; the others stay as they are.
    pub rotary_dim: usize,
    /// Which values are turned together.
    pub pairing: Pairing,
}

/// What a row of the tables of cos and sin belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Angles {
    /// A position, from 0 on.
    OfPosition,
    /// A row of the dispatch, in order.
    OfRow,
}

/// Which values are turned together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Pairing {
    /// `i` and `i + rotary_dim / 2`.
    Halves,
    /// `2 * i` and `2 * i + 1`.
    Neighbours,
}

/// One dispatch: rows of q, k and v, each at a position of a sequence.
#[derive(Debug)]
pub struct RopeKv<'a, B> {
    /// Query heads.
    pub heads: usize,
    /// The KV caches' shape.
    pub shape: KvShape,
    /// Rows of all heads of q, then of k, then of v, with their biases; where they begin.
    pub qkv: Region<'a, B>,
    /// Floats from one row of q, k and v to the next, a multiple of 4.
    pub stride_qkv: usize,
    /// Norm of q and k.
    pub norm: Option<QkNorm<'a, B>>,
    /// Rotation of q and k.
    pub rope: Option<Rope<'a, B>>,
    /// Where rows of normalised and rotated q go; not the buffer that they come from.
    pub q: Region<'a, B>,
    /// Floats from one of those rows to the next, a multiple of 4.
    pub stride_q: usize,
    /// The region in which the rows' keys are.
    pub keys: Region<'a, B>,
    /// The region in which the rows' values are.
    pub values: Region<'a, B>,
    /// Positions, and where in these regions their sequences are. No two rows have the same position of a sequence.
    pub rows: &'a [KvRow],
}

impl<B> RopeKv<'_, B> {
    fn check(&self) -> Result<()> {
        self.shape.check("rope_kv", self.heads, self.rows)?;
        let wrong = |reason: String| Err(Error::unsupported("rope_kv", reason));
        let (head_dim, rows) = (self.shape.head_dim, self.rows.len());
        let widths = [
            ("q, k and v", self.stride_qkv, (self.heads + 2 * self.shape.kv_heads) * head_dim),
            ("q", self.stride_q, self.heads * head_dim),
        ];
        for (what, stride, width) in widths {
            if rows > 1 && (stride < width || !stride.is_multiple_of(4)) {
                return wrong(format!(
                    "rows of {what} are {stride} floats apart, expected a multiple of 4 from {width}"
                ));
            }
        }
        if let Some(rope) = &self.rope {
            let rotary_dim = rope.rotary_dim;
            if rotary_dim == 0 || rotary_dim > head_dim || !rotary_dim.is_multiple_of(2) {
                return wrong(format!("{rotary_dim} values are rotated, expected an even number up to {head_dim}"));
            }
        }
        let loaded = [("qkv", &self.qkv), ("q", &self.q), ("the keys", &self.keys), ("the values", &self.values)];
        let gammas = self.norm.iter().flat_map(|norm| [("gamma_q", &norm.gamma_q), ("gamma_k", &norm.gamma_k)]);
        for (what, region) in loaded.into_iter().chain(gammas) {
            if !region.offset.is_multiple_of(16) {
                return wrong(format!("{what} begin at byte {}, expected a multiple of 16", region.offset));
            }
        }
        Ok(())
    }

    /// The dispatch.
    pub fn dispatch(&self) -> Result<Dispatch<'_, B>> {
        self.check()?;
        let KvShape { kv_type, kv_heads, head_dim } = self.shape;
        let (heads, count) = (self.heads + 2 * kv_heads, self.rows.len());
        let params = RopeKvParams {
            heads: self.heads as u32,
            kv_heads: kv_heads as u32,
            head_dim: head_dim as u32,
            rotary_dim: self.rope.as_ref().map_or(0, |rope| rope.rotary_dim as u32),
            stride_qkv: self.stride_qkv as u32,
            stride_q: self.stride_q as u32,
            eps: self.norm.as_ref().map_or(0.0, |norm| norm.eps),
        };
        let angles = self.rope.as_ref().map(|rope| rope.angles);
        let table = self.rows.iter().enumerate().flat_map(|(index, row)| {
            let angles = match angles {
                Some(Angles::OfRow) => index,
                Some(Angles::OfPosition) => row.position,
                None => 0,
            };
            let row = RopeKvRow {
                position: row.position as u32,
                angles: angles as u32,
                base: (row.offset / 16) as u32,
                capacity: row.capacity as u32,
            };
            row.to_bytes()
        });
        let whole = self.norm.as_ref().is_some_and(|norm| norm.over == NormOver::Projection);
        let neighbours = self.rope.as_ref().is_some_and(|rope| rope.pairing == Pairing::Neighbours);
        let mut dispatch = Dispatch::new(&LIBRARY, format!("rope_kv_{}", kv_type.name()))
            .constant(0, Constant::Bool(self.norm.is_some()))
            .constant(1, Constant::Bool(whole))
            .constant(2, Constant::Bool(self.rope.is_some()))
            .constant(3, Constant::Bool(neighbours))
            .read(0, self.qkv.rows(count, heads * head_dim * 4, self.stride_qkv * 4))
            .write(5, self.q.rows(count, self.heads * head_dim * 4, self.stride_q * 4))
            .write(6, self.shape.region(self.keys, self.rows, count))
            .write(7, self.shape.region(self.values, self.rows, count))
            .bytes(8, table.collect())
            .bytes(9, params.to_bytes())
            .grid([heads.div_ceil(SIMDGROUPS), count, 1], [32 * SIMDGROUPS, 1, 1]);
        if let Some(norm) = &self.norm {
            let heads = |heads: usize| if whole { heads } else { 1 };
            dispatch = dispatch
                .read(1, norm.gamma_q.spanning(heads(self.heads) * head_dim * 4))
                .read(2, norm.gamma_k.spanning(heads(kv_heads) * head_dim * 4));
        }
        if let Some(rope) = &self.rope {
            let last = match rope.angles {
                Angles::OfRow => count,
                Angles::OfPosition => self.rows.iter().map(|row| row.position + 1).max().unwrap_or(0),
            };
            let width = rope.rotary_dim * 2;
            dispatch = dispatch
                .read(3, rope.cos.spanning(last * width).touching(count * width))
                .read(4, rope.sin.spanning(last * width).touching(count * width));
        }
        Ok(dispatch)
    }

    /// Encodes it.
    pub fn encode<E: Encoder<Buffer = B>>(&self, encoder: &mut E) -> Result<()> {
        encoder.dispatch(&self.dispatch()?)
    }
}
