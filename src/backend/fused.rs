//! What of a model metal-ext's fused decode step covers, and its weights in that step's terms. Plain data over any buffers:
//! the Metal stage fills them with GPU memory, a test with the CPU's.

use metal_ext::decode::{self, AngleTable, LayerShape, Rope};
use metal_ext::gemv::Gate;
use metal_ext::heads::NormOver;

use crate::model::config::{Activation, DecoderConfig, LayerRope, QkNorm};
use crate::model::stage_weights::{Build, HeadWeights, LayerWeights, Linear, Mixer, Mlp, StageWeights};

/// How a device's matrices and vectors become those of the fused step.
pub trait FusedBuffers<B: Build> {
    /// Memory that kernels work on.
    type Buffer;

    /// The matrix in its packed format; the error says why there is none.
    fn matrix(&self, matrix: &B::Matrix) -> metal_ext::Result<decode::FusedMatrix<Self::Buffer>>;

    /// Vectors one after the other, as floats.
    fn floats(&self, vectors: &[&B::Vector]) -> metal_ext::Result<Self::Buffer>;
}

/// The layer of index `index` in the model; the error names what the fused step does not cover.
pub fn layer_shape(config: &DecoderConfig, index: usize) -> metal_ext::Result<LayerShape> {
    let layer = &config.layers[index];
    let rope = |rope: &crate::model::config::RopeConfig, table| Rope {
        rotary_dim: rope.rotary_dim,
        interleaved: rope.interleaved,
        table,
    };
    let shape = LayerShape {
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_attention_heads: config.num_attention_heads,
        num_key_value_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        rms_norm_eps: config.rms_norm_eps as f32,
        qk_norm: match config.qk_norm {
            QkNorm::None => None,
            QkNorm::PerHead => Some(NormOver::Head),
            QkNorm::WholeProjection => Some(NormOver::Projection),
        },
        rope: match layer.rope {
            LayerRope::None => None,
            LayerRope::Global => Some(rope(&config.rope, AngleTable::Global)),
            LayerRope::Local => config.local_rope.as_ref().map(|local| rope(local, AngleTable::Local)),
        },
        sliding_window: layer.sliding_window,
        attention_scale: config.attention_scale as f32,
        attn_logit_softcapping: config.attn_logit_softcapping.map(|cap| cap as f32),
        residual_multiplier: config.residual_multiplier as f32,
        gate: match config.activation {
            Activation::Silu => Gate::Silu,
            Activation::GeluTanh => Gate::GeluTanh,
            Activation::Gelu => return Err(not_covered("GELU with the error function".into())),
        },
    };
    shape.check()?;
    Ok(shape)
}

/// A stage of the fused step, `first` being the index of its first layer in the model. The error names what is not
/// covered.
pub fn stage<B: Build, F: FusedBuffers<B>>(
    config: &DecoderConfig,
    first: usize,
    weights: &StageWeights<B>,
    buffers: &F,
) -> metal_ext::Result<decode::FusedStage<F::Buffer>> {
    let layer = |(index, weights): (usize, &LayerWeights<B>)| {
        let shape = layer_shape(config, first + index)?;
        let layer = layer_weights(weights, buffers)?;
        layer.check(&shape)?;
        Ok((shape, layer))
    };
    let head = |head: &HeadWeights<B>| {
        if head.projection.bias.is_some() {
            return Err(not_covered("a head with a bias".into()));
        }
        Ok(decode::FusedHead {
            norm: buffers.floats(&[&head.norm])?,
            rms_norm_eps: config.rms_norm_eps as f32,
            projection: buffers.matrix(&head.projection.matrix)?,
        })
    };
    Ok(decode::FusedStage {
        layers: weights.layers.iter().enumerate().map(layer).collect::<metal_ext::Result<_>>()?,
        head: weights.head.as_ref().map(head).transpose()?,
    })
}

fn layer_weights<B: Build, F: FusedBuffers<B>>(
    weights: &LayerWeights<B>,
    buffers: &F,
) -> metal_ext::Result<decode::FusedLayer<F::Buffer>> {
    let vector = |vector: &Option<B::Vector>| vector.as_ref().map(|v| buffers.floats(&[v])).transpose();
    let matrix = |linear: &Linear<B>| buffers.matrix(&linear.matrix);
    // All or none: a product's biases are added together.
    let biases = |linears: &[&Linear<B>]| {
        let biases: Vec<&B::Vector> = linears.iter().filter_map(|linear| linear.bias.as_ref()).collect();
        match biases.len() {
            0 => Ok(None),
            n if n == linears.len() => buffers.floats(&biases).map(Some),
            n => Err(not_covered(format!("biases on {n} of {} projections of one input", linears.len()))),
        }
    };
    let Mixer::Attention(attention) = &weights.mixer;
    let Mlp::Gated(mlp) = &weights.mlp;
    Ok(decode::FusedLayer {
        attn_norm: vector(&weights.attn_norm)?,
        attn_post_norm: vector(&weights.attn_post_norm)?,
        mlp_norm: vector(&weights.mlp_norm)?,
        mlp_post_norm: vector(&weights.mlp_post_norm)?,
        qkv_bias: biases(&[&attention.q_proj, &attention.k_proj, &attention.v_proj])?,
        q_proj: matrix(&attention.q_proj)?,
        k_proj: matrix(&attention.k_proj)?,
        v_proj: matrix(&attention.v_proj)?,
        q_norm: vector(&attention.q_norm)?,
        k_norm: vector(&attention.k_norm)?,
        o_proj: matrix(&attention.o_proj)?,
        o_bias: vector(&attention.o_proj.bias)?,
        gate_up_bias: biases(&[&mlp.gate_proj, &mlp.up_proj])?,
        gate_proj: matrix(&mlp.gate_proj)?,
        up_proj: matrix(&mlp.up_proj)?,
        down_proj: matrix(&mlp.down_proj)?,
        down_bias: vector(&mlp.down_proj.bias)?,
    })
}

fn logits_factor(config: &DecoderConfig) -> f32 {
    (1.0 / config.logits_scaling) as f32
}

/// Whether the head's product is the logits. Where something stands between, two values may become one by rounding, and
/// then another token is the first of the most likely ones.
pub fn logits_are_the_product(config: &DecoderConfig) -> bool {
    logits_factor(config) == 1.0 && config.final_logit_softcapping.is_none()
}

/// What stands between the head's product and a caller: scaling and cap.
pub fn finish_logits(config: &DecoderConfig, mut logits: Vec<f32>) -> Vec<f32> {
    let factor = logits_factor(config);
    if factor != 1.0 {
        logits.iter_mut().for_each(|value| *value *= factor);
    }
    if let Some(cap) = config.final_logit_softcapping.map(|cap| cap as f32) {
        // An infinite logit is not capped but becomes NaN, so that it is refused.
        logits.iter_mut().for_each(|value| *value = cap * (*value / cap).tanh() + *value * 0.0);
    }
    logits
}

fn not_covered(reason: String) -> metal_ext::Error {
    metal_ext::Error::unsupported("fused decode", reason)
}
