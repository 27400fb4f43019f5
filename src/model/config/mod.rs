//! What a decoder is: one set of typed data for every family, read from a config.json or from GGUF metadata. Anything
//! that is not supported is refused here by name, before a weight is touched.
//!
//! This file holds the data and the checks that both sources share; the reading is in a file for each.

mod generation;
mod gguf;
mod gguf_keys;
mod hf;
mod json;

use std::path::Path;

use super::family::Family;
use crate::error::{Error, Result};
pub use crate::kernels::ops::Activation;

impl Activation {
    /// The function that files call `name`.
    fn from_name(name: &str) -> Option<Activation> {
        match name {
            "silu" | "swish" => Some(Activation::Silu),
            "gelu_pytorch_tanh" | "gelu_new" | "gelu_fast" => Some(Activation::GeluTanh),
            "gelu" => Some(Activation::Gelu),
            _ => None,
        }
    }
}

/// RMSNorm on queries and keys, before RoPE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    None,
    /// On each head, one weight for all heads.
    PerHead,
    /// On the whole projection.
    WholeProjection,
}

/// How RoPE's inverse frequencies are stretched for long contexts.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// As in the RoFormer paper.
    Default,
    /// Positions divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// NTK-aware: the base grows with the length once that passes the trained one.
    Dynamic {
        /// How much longer than trained.
        factor: f64,
        /// The trained length.
        original_max_position_embeddings: usize,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Turns over the trained length below which a frequency is low.
        low_freq_factor: f64,
        /// Turns above which it is high.
        high_freq_factor: f64,
        /// The trained length.
        original_max_position_embeddings: usize,
    },
    /// YaRN (arXiv 2309.00071).
    Yarn {
        /// How much longer than trained.
        factor: f64,
        /// The trained length.
        original_max_position_embeddings: usize,
        /// Multiplies cos and sin.
        attention_factor: f64,
        /// Turns above which a frequency is kept.
        beta_fast: f64,
        /// Turns below which it is divided by `factor`.
        beta_slow: f64,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
    },
    /// LongRoPE (arXiv 2402.13753): a divisor for each frequency, one set up to the trained length, one beyond.
    LongRope {
        /// Divisors while the sequence is within the trained length.
        short_factor: Vec<f32>,
        /// Divisors for longer sequences.
        long_factor: Vec<f32>,
        /// The trained length.
        original_max_position_embeddings: usize,
        /// Multiplies cos and sin.
        attention_factor: f64,
    },
    /// A divisor for each frequency, which is how GGUF stores Llama 3.1's scaling.
    Divided {
        /// The divisors.
        factors: Vec<f32>,
    },
}

/// One rotary position embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// Leading elements of a head that are rotated; the rest pass through.
    pub rotary_dim: usize,
    /// Long-context scaling.
    pub scaling: RopeScaling,
    /// Pairs are neighbours (2i, 2i + 1) instead of halves (i, i + rotary_dim / 2).
    pub interleaved: bool,
}

/// Which rotary embedding a layer uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerRope {
    /// None at all.
    None,
    /// [`DecoderConfig::rope`].
    Global,
    /// [`DecoderConfig::local_rope`].
    Local,
}

/// What differs from layer to layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerConfig {
    /// A query sees this many positions, itself included. `None` sees all before it.
    pub sliding_window: Option<usize>,
    /// Its rotary embedding.
    pub rope: LayerRope,
}

/// Which norms a layer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerNorms {
    /// Before attention.
    pub attn_norm: bool,
    /// On attention's output.
    pub attn_post_norm: bool,
    /// Before the MLP.
    pub mlp_norm: bool,
    /// On the MLP's output.
    pub mlp_post_norm: bool,
}

/// Everything the decoder needs to know about a model but its weights. Field names are those of Hugging Face configs.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderConfig {
    /// Name of the family, such as `Llama`.
    pub family: &'static str,
    /// The architecture as the file names it (`model_type` or `general.architecture`).
    pub architecture: String,
    /// Rows of the embedding table and of the head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Epsilon of every RMSNorm.
    pub rms_norm_eps: f64,
    /// Added to the stored norm weights.
    pub norm_offset: f32,
    /// The norms of a layer.
    pub norms: LayerNorms,
    /// Norms on q and k.
    pub qk_norm: QkNorm,
    /// The MLP's activation.
    pub activation: Activation,
    /// Whether the head is the embedding table.
    pub tie_word_embeddings: bool,
    /// Whether the q, k and v projections must have a bias; `None` where the file alone decides.
    pub qkv_bias: Option<bool>,
    /// The same for attention's output projection.
    pub o_bias: Option<bool>,
    /// The same for the MLP's projections.
    pub mlp_bias: Option<bool>,
    /// The rotary embedding of most layers.
    pub rope: RopeConfig,
    /// The one of layers with [`LayerRope::Local`].
    pub local_rope: Option<RopeConfig>,
    /// One entry for each layer.
    pub layers: Vec<LayerConfig>,
    /// Positions that the model can tell apart, prompt and generated tokens together. `usize::MAX` where the rotary
    /// embedding stretches to any length.
    pub max_position_embeddings: usize,
    /// Factor on the attention scores.
    pub attention_scale: f64,
    /// Scores become `cap * tanh(score / cap)`.
    pub attn_logit_softcapping: Option<f64>,
    /// The same for the logits.
    pub final_logit_softcapping: Option<f64>,
    /// Factor on the embeddings.
    pub embedding_multiplier: f64,
    /// Factor on each branch before it is added to the residual stream.
    pub residual_multiplier: f64,
    /// The logits are divided by it.
    pub logits_scaling: f64,
    /// Tokens that end a generation.
    pub eos_token_ids: Vec<u32>,
    /// Tokens that are never generated.
    pub suppressed: SuppressedTokens,
}

/// Tokens that the model's own files rule out, whatever the logits say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SuppressedTokens {
    /// Everywhere.
    pub always: Vec<u32>,
    /// As the first token that is generated.
    pub at_first: Vec<u32>,
}

impl DecoderConfig {
    /// Values of KV that one token takes in one layer, keys and values together.
    pub fn kv_elements_per_token(&self) -> usize {
        2 * self.num_key_value_heads * self.head_dim
    }

    /// Refuses what no model can be. `name` says what the file calls a field of config.json.
    fn validate(&self, path: &Path, name: &dyn Fn(&str) -> String) -> Result<()> {
        let refuse = |reason: String| Err(Error::file(path, reason));
        let above_zero = |field: &str, value: f64| match value.is_finite() && value > 0.0 {
            true => Ok(()),
            false => Err(Error::file(path, format!("`{}` is {value}, expected a finite number above 0", name(field)))),
        };
        for (field, value) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
        ] {
            check_size(path, &name(field), value, MAX_SIZE)?;
        }
        check_size(path, &name("num_hidden_layers"), self.num_hidden_layers, MAX_LAYERS)?;
        let (heads, kv_heads, head_dim) = (self.num_attention_heads, self.num_key_value_heads, self.head_dim);
        if heads * head_dim > MAX_SIZE {
            return refuse(format!(
                "`{}` ({heads}) times `{}` ({head_dim}) is more than {MAX_SIZE}",
                name("num_attention_heads"),
                name("head_dim")
            ));
        }
        if !heads.is_multiple_of(kv_heads) {
            return refuse(format!(
                "`{}` ({heads}) is not a multiple of `{}` ({kv_heads})",
                name("num_attention_heads"),
                name("num_key_value_heads")
            ));
        }
        if self.max_position_embeddings == 0 {
            return refuse(format!("`{}` is 0, expected at least 1", name("max_position_embeddings")));
        }
        if self.layers.iter().any(|layer| layer.sliding_window == Some(0)) {
            return refuse(format!("`{}` is 0; leave it out or write null for none", name("sliding_window")));
        }
        for (field, value) in [
            ("rms_norm_eps", self.rms_norm_eps),
            ("attention_multiplier", self.attention_scale),
            ("embedding_multiplier", self.embedding_multiplier),
            ("residual_multiplier", self.residual_multiplier),
            ("logits_scaling", self.logits_scaling),
            ("attn_logit_softcapping", self.attn_logit_softcapping.unwrap_or(1.0)),
            ("final_logit_softcapping", self.final_logit_softcapping.unwrap_or(1.0)),
        ] {
            above_zero(field, value)?;
        }
        for rope in std::iter::once(&self.rope).chain(&self.local_rope) {
            let dim = rope.rotary_dim;
            if dim == 0 || dim > head_dim || !dim.is_multiple_of(2) {
                let field = if dim == head_dim { "head_dim" } else { "partial_rotary_factor" };
                return refuse(format!(
                    "`{}`: RoPE would rotate {dim} of the {head_dim} elements of a head, expected an even number of them",
                    name(field)
                ));
            }
            above_zero("rope_theta", rope.theta)?;
            rope.scaling.validate(path, name, dim, &above_zero)?;
        }
        Ok(())
    }
}

impl DecoderConfig {
    /// Length of a sequence at which all its rotations change, so that its KV must be computed anew: LongRoPE's first
    /// length past the trained one. `None` where they never do.
    pub fn rotations_change_at(&self) -> Option<usize> {
        match self.rope.scaling {
            RopeScaling::LongRope { original_max_position_embeddings, .. } => {
                Some(original_max_position_embeddings + 1)
            }
            _ => None,
        }
    }

    /// Length from which a sequence's rotations are its own, since they depend on the length at which each position was
    /// computed: with dynamic NTK, past the trained length. `None` where they never do.
    pub fn rotations_follow_length_from(&self) -> Option<usize> {
        match self.rope.scaling {
            RopeScaling::Dynamic { original_max_position_embeddings, .. } => Some(original_max_position_embeddings + 1),
            _ => None,
        }
    }
}

impl RopeScaling {
    fn validate(
        &self,
        path: &Path,
        name: &dyn Fn(&str) -> String,
        rotary_dim: usize,
        above_zero: &dyn Fn(&str, f64) -> Result<()>,
    ) -> Result<()> {
        let trained = |field: &str, length: usize| match length {
            0 | MAX_POSITIONS.. => Err(Error::file(
                path,
                format!("`{}` is {length}, expected at least 1 and less than {MAX_POSITIONS}", name(field)),
            )),
            _ => Ok(()),
        };
        let original = "original_max_position_embeddings";
        let divisors = |field: &str, divisors: &[f32]| {
            let reason = match divisors.iter().find(|&&divisor| !(divisor.is_finite() && divisor > 0.0)) {
                _ if divisors.len() != rotary_dim / 2 => {
                    format!("lists {} factors for {} frequencies", divisors.len(), rotary_dim / 2)
                }
                Some(wrong) => format!("holds {wrong}, expected finite numbers above 0"),
                None => return Ok(()),
            };
            Err(Error::file(path, format!("`{}` {reason}", name(field))))
        };
        match self {
            RopeScaling::Default => Ok(()),
            RopeScaling::Linear { factor } => above_zero("factor", *factor),
            RopeScaling::Dynamic { factor, original_max_position_embeddings } => {
                // The dimension's exponent is dim / (dim - 2).
                if rotary_dim <= 2 {
                    let field = name("head_dim");
                    return Err(Error::file(
                        path,
                        format!("`{field}`: dynamic RoPE needs more than 2 rotated elements"),
                    ));
                }
                trained("max_position_embeddings", *original_max_position_embeddings)?;
                above_zero("factor", *factor)
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                above_zero("factor", *factor)?;
                above_zero("low_freq_factor", *low_freq_factor)?;
                above_zero("high_freq_factor", *high_freq_factor)?;
                if high_freq_factor <= low_freq_factor {
                    let reason = format!(
                        "`high_freq_factor` is {high_freq_factor}, expected a number above `low_freq_factor` ({low_freq_factor})"
                    );
                    return Err(Error::file(path, reason));
                }
                trained(original, *original_max_position_embeddings)
            }
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings,
                attention_factor,
                beta_fast,
                beta_slow,
                truncate: _,
            } => {
                trained(original, *original_max_position_embeddings)?;
                above_zero("factor", *factor)?;
                above_zero("attention_factor", *attention_factor)?;
                above_zero("beta_fast", *beta_fast)?;
                above_zero("beta_slow", *beta_slow)
            }
            RopeScaling::LongRope { short_factor, long_factor, original_max_position_embeddings, attention_factor } => {
                trained(original, *original_max_position_embeddings)?;
                divisors("short_factor", short_factor)?;
                divisors("long_factor", long_factor)?;
                above_zero("attention_factor", *attention_factor)
            }
            RopeScaling::Divided { factors } => divisors("factors", factors),
        }
    }
}

/// More layers than any model has; a larger number in a file is a damaged file.
const MAX_LAYERS: usize = 4096;

/// Far above every model's sizes; keeps products of two of them, and bytes of KV, within 64 bits.
const MAX_SIZE: usize = 1 << 24;

/// Far above every trained length.
const MAX_POSITIONS: usize = 1 << 40;

fn check_size(path: &Path, name: &str, value: usize, limit: usize) -> Result<()> {
    match value >= 1 && value <= limit {
        true => Ok(()),
        false => Err(Error::file(path, format!("`{name}` is {value}, which is not in 1..={limit}"))),
    }
}

fn layer_norms(family: &Family) -> LayerNorms {
    LayerNorms {
        attn_norm: family.names.attn_norm.is_some(),
        attn_post_norm: family.names.attn_post_norm.is_some(),
        mlp_norm: family.names.mlp_norm.is_some(),
        mlp_post_norm: family.names.mlp_post_norm.is_some(),
    }
}

/// Configs with linear or yarn scaling mostly state the trained length, which the scaling then multiplies; all others
/// state the final one (as Gemma 3, the family with a second RoPE, does with linear scaling too). Dynamic scaling has no
/// end.
fn with_stretched_context(mut config: DecoderConfig) -> DecoderConfig {
    let stated = config.max_position_embeddings;
    config.max_position_embeddings = match &config.rope.scaling {
        RopeScaling::Dynamic { .. } => usize::MAX,
        RopeScaling::Linear { factor } if config.local_rope.is_none() => (stated as f64 * factor.max(1.0)) as usize,
        RopeScaling::Yarn { factor, original_max_position_embeddings, .. } => {
            stated.max((*original_max_position_embeddings as f64 * factor.max(1.0)) as usize)
        }
        _ => stated,
    };
    config
}

fn longrope_attention_factor(factor: f64, original: usize) -> f64 {
    if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / (original as f64).ln()).sqrt() }
}
