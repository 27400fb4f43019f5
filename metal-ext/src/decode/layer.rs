//! One layer of a decode step.

use super::{FusedLayer, FusedMatrix, LayerShape, Scratch, attention, stride};
use crate::encoder::{Encoder, Region};
use crate::error::{Error, Result};
use crate::gemv::{Finish, Gemv, Norm, PackedMatrix};
use crate::norm_add::NormAdd;
use crate::options::MetalExtOptions;

/// One row of a step: the last position of a sequence.
#[derive(Debug)]
pub struct Row<'a, B> {
    /// The position.
    pub position: usize,
    /// The sequence's keys and values in each of the stage's layers.
    pub kv: &'a [KvCache<B>],
    /// cos and sin of the position for [`AngleTable::Global`](super::AngleTable::Global): `rotary_dim / 2` floats each.
    pub global_angles: [Region<'a, B>; 2],
    /// The same for [`AngleTable::Local`](super::AngleTable::Local), where a layer uses it.
    pub local_angles: Option<[Region<'a, B>; 2]>,
}

/// Keys and values of one sequence in one layer: F16, (num_key_value_heads, capacity, head_dim) each.
#[derive(Debug, Clone)]
pub struct KvCache<B> {
    /// The keys, after RoPE.
    pub keys: B,
    /// The values.
    pub values: B,
    /// Positions that there is room for.
    pub capacity: usize,
}

pub(super) fn unsupported(reason: String) -> Error {
    Error::unsupported("fused decode", reason)
}

impl<B> FusedLayer<B> {
    /// Refuses weights that the fused path does not take, by name.
    pub fn check(&self, shape: &LayerShape) -> Result<()> {
        let (hidden, inner) = (shape.hidden_size, shape.intermediate_size);
        for (name, matrix, n, k) in [
            ("q_proj", &self.q_proj, shape.q_width(), hidden),
            ("k_proj", &self.k_proj, shape.kv_width(), hidden),
            ("v_proj", &self.v_proj, shape.kv_width(), hidden),
            ("o_proj", &self.o_proj, hidden, shape.q_width()),
            ("gate_proj", &self.gate_proj, inner, hidden),
            ("up_proj", &self.up_proj, inner, hidden),
            ("down_proj", &self.down_proj, hidden, inner),
        ] {
            let layout = matrix.layout;
            if (layout.n, layout.k) != (n, k) {
                return Err(unsupported(format!("{name} is {} by {}, expected {n} by {k}", layout.n, layout.k)));
            }
        }
        let (gate, up) = (self.gate_proj.layout.format, self.up_proj.layout.format);
        if gate != up {
            return Err(unsupported(format!("gate_proj is {}, up_proj is {}", gate.name(), up.name())));
        }
        Ok(())
    }
}

/// A product before it is told which rows and what becomes of it.
struct Projection<'a, B> {
    matrices: &'a [&'a FusedMatrix<B>],
    /// The input's buffer; its rows are `k` floats.
    x: &'a B,
    y: &'a B,
    /// Floats of a row of y.
    width: usize,
    norm: Option<Norm<'a, B>>,
    bias: Option<&'a B>,
    finish: Finish,
}

impl<B> Projection<'_, B> {
    /// One dispatch for matrices of one format, several where the formats differ.
    fn encode<E: Encoder<Buffer = B>>(self, encoder: &mut E, rows: usize, options: &MetalExtOptions) -> Result<()> {
        let mut column = 0;
        for run in self.matrices.chunk_by(|a, b| a.layout.format == b.layout.format) {
            let matrices: Vec<PackedMatrix<'_, B>> = run.iter().map(|matrix| matrix.packed()).collect();
            let gemv = Gemv {
                matrices: &matrices,
                x: Region::at(self.x, 0),
                stride_x: stride(run[0].layout.k),
                y: Region::at(self.y, column * 4),
                stride_y: stride(self.width),
                rows,
                norm: self.norm.as_ref().map(|norm| Norm { gamma: norm.gamma, eps: norm.eps }),
                bias: self.bias.map(|bias| Region::at(bias, column * 4)),
                finish: self.finish,
            };
            gemv.encode(encoder, options.columns_per_threadgroup)?;
            column += run.iter().map(|matrix| matrix.layout.n).sum::<usize>();
        }
        Ok(())
    }
}

/// The layer of index `index` within the stage.
pub(super) fn encode<E: Encoder>(
    encoder: &mut E,
    index: usize,
    (shape, weights): (&LayerShape, &FusedLayer<E::Buffer>),
    x: &E::Buffer,
    rows: &[Row<'_, E::Buffer>],
    scratch: &Scratch<E::Buffer>,
    options: &MetalExtOptions,
) -> Result<()> {
    Projection {
        matrices: &[&weights.q_proj, &weights.k_proj, &weights.v_proj],
        x,
        y: &scratch.qkv,
        width: shape.qkv_width(),
        norm: norm(&weights.attn_norm, shape),
        bias: weights.qkv_bias.as_ref(),
        finish: Finish::Store,
    }
    .encode(encoder, rows.len(), options)?;
    attention::encode(encoder, index, (shape, weights), rows, scratch)?;
    Branch {
        projection: &weights.o_proj,
        bias: &weights.o_bias,
        input: &scratch.mixed,
        post_norm: norm(&weights.attn_post_norm, shape),
    }
    .add_to(encoder, x, shape, rows.len(), scratch, options)?;

    Projection {
        matrices: &[&weights.gate_proj, &weights.up_proj],
        x,
        y: &scratch.gated,
        width: shape.intermediate_size,
        norm: norm(&weights.mlp_norm, shape),
        bias: weights.gate_up_bias.as_ref(),
        finish: Finish::Gated(shape.gate),
    }
    .encode(encoder, rows.len(), options)?;
    Branch {
        projection: &weights.down_proj,
        bias: &weights.down_bias,
        input: &scratch.gated,
        post_norm: norm(&weights.mlp_post_norm, shape),
    }
    .add_to(encoder, x, shape, rows.len(), scratch, options)
}

fn norm<'a, B>(gamma: &'a Option<B>, shape: &LayerShape) -> Option<Norm<'a, B>> {
    gamma.as_ref().map(|gamma| Norm { gamma: Region::at(gamma, 0), eps: shape.rms_norm_eps })
}

/// What is added to the residual stream.
struct Branch<'a, B> {
    projection: &'a FusedMatrix<B>,
    bias: &'a Option<B>,
    input: &'a B,
    post_norm: Option<Norm<'a, B>>,
}

impl<B> Branch<'_, B> {
    /// One dispatch, two where a norm stands before the addition.
    fn add_to<E: Encoder<Buffer = B>>(
        self,
        encoder: &mut E,
        x: &B,
        shape: &LayerShape,
        rows: usize,
        scratch: &Scratch<B>,
        options: &MetalExtOptions,
    ) -> Result<()> {
        let (hidden, multiplier) = (shape.hidden_size, shape.residual_multiplier);
        let (y, finish) = match self.post_norm {
            None => (x, Finish::Add { multiplier }),
            Some(_) => (&scratch.branch, Finish::Store),
        };
        Projection {
            matrices: &[self.projection],
            x: self.input,
            y,
            width: hidden,
            norm: None,
            bias: self.bias.as_ref(),
            finish,
        }
        .encode(encoder, rows, options)?;
        let Some(norm) = self.post_norm else { return Ok(()) };
        NormAdd {
            branch: Region::at(&scratch.branch, 0),
            stride_branch: stride(hidden),
            y: Region::at(x, 0),
            stride_y: stride(hidden),
            width: hidden,
            rows,
            norm,
            multiplier,
        }
        .encode(encoder)
    }
}
