//! What becomes of heads of q and k before attention: a norm, then RoPE. [`Attention`](crate::attention::Attention) does
//! it on the way; the code is in `kernels/heads.metal`.

use crate::encoder::{Constant, Dispatch, Region};
use crate::error::{Error, Result};
use crate::kv::{KvRow, KvShape};

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

impl<'a, B> QkNorm<'a, B> {
    pub(crate) fn check(&self, kernel: &str) -> Result<()> {
        for (what, region) in [("gamma_q", &self.gamma_q), ("gamma_k", &self.gamma_k)] {
            if !region.offset.is_multiple_of(16) {
                let reason = format!("{what} begin at byte {}, expected a multiple of 16", region.offset);
                return Err(Error::unsupported(kernel, reason));
            }
        }
        Ok(())
    }

    /// Binds the weights, from this index on.
    pub(crate) fn bind(&self, dispatch: Dispatch<'a, B>, index: u32, heads: usize, kv: &KvShape) -> Dispatch<'a, B> {
        let bytes = |heads: usize| match self.over {
            NormOver::Head => kv.head_dim * 4,
            NormOver::Projection => heads * kv.head_dim * 4,
        };
        dispatch
            .read(index, self.gamma_q.spanning(bytes(heads)))
            .read(index + 1, self.gamma_k.spanning(bytes(kv.kv_heads)))
    }
}

impl<'a, B> Rope<'a, B> {
    pub(crate) fn check(&self, kernel: &str, head_dim: usize) -> Result<()> {
        let rotary_dim = self.rotary_dim;
        if rotary_dim == 0 || rotary_dim > head_dim || !rotary_dim.is_multiple_of(2) {
            let reason = format!("{rotary_dim} values are rotated, expected an even number up to {head_dim}");
            return Err(Error::unsupported(kernel, reason));
        }
        Ok(())
    }

    /// The row of the tables that the row of index `index` takes.
    pub(crate) fn table_row(&self, index: usize, row: &KvRow) -> usize {
        match self.angles {
            Angles::OfRow => index,
            Angles::OfPosition => row.position,
        }
    }

    /// Binds the tables, from this index on.
    pub(crate) fn bind(&self, dispatch: Dispatch<'a, B>, index: u32, rows: &[KvRow]) -> Dispatch<'a, B> {
        let end = (0..).zip(rows).map(|(index, row)| self.table_row(index, row) + 1).max().unwrap_or(0);
        let width = self.rotary_dim * 2;
        let table = |region: Region<'a, B>| region.spanning(end * width).touching(rows.len() * width);
        dispatch.read(index, table(self.cos)).read(index + 1, table(self.sin))
    }
}

/// Sets the constants that `kernels/heads.metal` declares.
pub(crate) fn constants<'a, B>(
    dispatch: Dispatch<'a, B>,
    norm: Option<&QkNorm<'a, B>>,
    rope: Option<&Rope<'a, B>>,
) -> Dispatch<'a, B> {
    dispatch
        .constant(3, Constant::Bool(norm.is_some()))
        .constant(4, Constant::Bool(norm.is_some_and(|norm| norm.over == NormOver::Projection)))
        .constant(5, Constant::Bool(rope.is_some()))
        .constant(6, Constant::Bool(rope.is_some_and(|rope| rope.pairing == Pairing::Neighbours)))
}
