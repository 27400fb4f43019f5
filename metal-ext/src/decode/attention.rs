//! From a layer's q, k and v to attention's output.

use super::layer::{Row, unsupported};
use super::{AngleTable, FusedLayer, LayerShape, Scratch, stride};
use crate::attention::{Attention, AttentionShape, KvRows};
use crate::encoder::{Encoder, Region};
use crate::error::Result;
use crate::heads::{Angles, Pairing, QkNorm, Rope};
use crate::kv::{KvRow, KvShape, KvType, MOST_DIM};

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

    /// Bytes of partial results that `rows` rows need at the most.
    pub(super) fn partial_bytes(&self, rows: usize) -> usize {
        self.attention().scratch_bytes(rows, usize::MAX).max(16)
    }

    /// Refuses what the fused path does not cover, by name and value.
    pub fn check(&self) -> Result<()> {
        let (head_dim, hidden) = (self.head_dim, self.hidden_size);
        if head_dim == 0 || head_dim > MOST_DIM || !head_dim.is_multiple_of(16) {
            return Err(unsupported(format!("head_dim is {head_dim}, expected a multiple of 16 up to {MOST_DIM}")));
        }
        if !hidden.is_multiple_of(4) {
            return Err(unsupported(format!("hidden_size is {hidden}, expected a multiple of 4")));
        }
        Ok(())
    }

    /// Rotation of this row's q and k.
    fn rope_of<'a, B>(&self, row: &Row<'a, B>) -> Result<Option<Rope<'a, B>>> {
        let Some(rope) = self.rope else { return Ok(None) };
        let [cos, sin] = match (rope.table, row.local_angles) {
            (AngleTable::Global, _) => row.global_angles,
            (AngleTable::Local, Some(local)) => local,
            (AngleTable::Local, None) => return Err(unsupported("the local table of angles is not given".into())),
        };
        let pairing = if rope.interleaved { Pairing::Neighbours } else { Pairing::Halves };
        Ok(Some(Rope { cos, sin, angles: Angles::OfRow, rotary_dim: rope.rotary_dim, pairing }))
    }
}

/// Each row's key and value are appended to its cache of the layer of index `index`, and it attends to all that are
/// there.
pub(super) fn encode<E: Encoder>(
    encoder: &mut E,
    index: usize,
    (shape, weights): (&LayerShape, &FusedLayer<E::Buffer>),
    rows: &[Row<'_, E::Buffer>],
    scratch: &Scratch<E::Buffer>,
) -> Result<()> {
    let norm = match (shape.qk_norm, &weights.q_norm, &weights.k_norm) {
        (Some(over), Some(gamma_q), Some(gamma_k)) => Some(QkNorm {
            over,
            gamma_q: Region::at(gamma_q, 0),
            gamma_k: Region::at(gamma_k, 0),
            eps: shape.rms_norm_eps,
        }),
        _ => None,
    };
    let place = |row: &Row<'_, E::Buffer>| KvRow {
        position: row.position,
        capacity: row.kv[index].capacity,
        offset: 0, // a sequence has buffers of its own
    };
    let places: Vec<KvRow> = rows.iter().map(place).collect();
    let sequences = rows
        .iter()
        .zip(places.chunks(1))
        .map(|(row, places)| {
            Ok(KvRows {
                keys: Region::at(&row.kv[index].keys, 0),
                values: Region::at(&row.kv[index].values, 0),
                rows: places,
                rope: shape.rope_of(row)?,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    Attention {
        shape: shape.attention(),
        qkv: Region::at(&scratch.qkv, 0),
        stride_qkv: stride(shape.qkv_width()),
        norm,
        sequences: &sequences,
        y: Region::at(&scratch.mixed, 0),
        stride_y: stride(shape.q_width()),
        scratch: Region::at(&scratch.partials, 0),
    }
    .encode(encoder)
}
