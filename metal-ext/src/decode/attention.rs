//! From a layer's q, k and v to attention's output, for one row.

use super::layer::{KvCache, Row};
use super::{AngleTable, LayerShape, LayerWeights, Scratch, stride};
use crate::attention::{Attention, AttentionShape};
use crate::encoder::{Encoder, Region};
use crate::error::{Error, Result};
use crate::kv::{KvRow, KvShape, KvType, MOST_DIM};
use crate::rope_kv::{Angles, Pairing, QkNorm, Rope, RopeKv};

impl LayerShape {
    fn attention(&self) -> AttentionShape {
        let kv = KvShape { kv_type: KvType::F16, kv_heads: self.num_key_value_heads, head_dim: self.head_dim };
        AttentionShape {
            heads: self.num_attention_heads,
            kv,
            scale: self.attention_scale,
            softcap: self.attn_logit_softcapping,
            window: self.sliding_window,
        }
    }

    /// Bytes of partial results that one row needs at the most.
    pub(super) fn partial_bytes(&self) -> usize {
        self.attention().scratch_bytes(1, usize::MAX).max(16)
    }

    /// Refuses what the fused path does not cover, by name and value.
    pub fn check(&self) -> Result<()> {
        let unsupported = |reason: String| Err(Error::unsupported("fused decode", reason));
        let (head_dim, hidden) = (self.head_dim, self.hidden_size);
        if head_dim == 0 || head_dim > MOST_DIM || !head_dim.is_multiple_of(16) {
            return unsupported(format!("head_dim is {head_dim}, expected a multiple of 16 up to {MOST_DIM}"));
        }
        if !hidden.is_multiple_of(4) {
            return unsupported(format!("hidden_size is {hidden}, expected a multiple of 4"));
        }
        Ok(())
    }
}

/// Row `at` of the step: its key and value are appended to `cache`, and it attends to all that are there.
pub(super) fn encode<E: Encoder>(
    encoder: &mut E,
    (shape, weights): (&LayerShape, &LayerWeights<E::Buffer>),
    at: usize,
    row: &Row<'_, E::Buffer>,
    cache: &KvCache<E::Buffer>,
    scratch: &Scratch<E::Buffer>,
) -> Result<()> {
    let attention = shape.attention();
    let rows = [KvRow { position: row.position, capacity: cache.capacity, offset: 0 }];
    let (keys, values) = (Region::at(&cache.keys, 0), Region::at(&cache.values, 0));
    let (stride_qkv, stride_q) = (stride(shape.qkv_width()), stride(shape.q_width()));
    let q = Region::at(&scratch.q, at * stride_q * 4);
    let norm = match (shape.qk_norm, &weights.q_norm, &weights.k_norm) {
        (Some(over), Some(gamma_q), Some(gamma_k)) => Some(QkNorm {
            over,
            gamma_q: Region::at(gamma_q, 0),
            gamma_k: Region::at(gamma_k, 0),
            eps: shape.rms_norm_eps,
        }),
        _ => None,
    };
    let rope = match shape.rope {
        None => None,
        Some(rope) => {
            let [cos, sin] = match (rope.table, row.local_angles) {
                (AngleTable::Global, _) => row.global_angles,
                (AngleTable::Local, Some(local)) => local,
                (AngleTable::Local, None) => {
                    return Err(Error::unsupported("fused decode", "the local table of angles is not given"));
                }
            };
            let pairing = if rope.interleaved { Pairing::Neighbours } else { Pairing::Halves };
            Some(Rope { cos, sin, angles: Angles::OfRow, rotary_dim: rope.rotary_dim, pairing })
        }
    };
    RopeKv {
        heads: shape.num_attention_heads,
        shape: attention.kv,
        qkv: Region::at(&scratch.qkv, at * stride_qkv * 4),
        stride_qkv,
        norm,
        rope,
        q,
        stride_q,
        keys,
        values,
        rows: &rows,
    }
    .encode(encoder)?;
    Attention {
        shape: attention,
        q,
        stride_q,
        keys,
        values,
        rows: &rows,
        y: Region::at(&scratch.mixed, at * stride_q * 4),
        stride_y: stride_q,
        scratch: Region::at(&scratch.partials, 0),
    }
    .encode(encoder)
}
