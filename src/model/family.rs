//! Model families as rows of a table. A family differs from Llama in names, norms and defaults, never in code: the one
//! decoder reads a [`DecoderConfig`](super::config::DecoderConfig) that [`super::config`] fills from a row and a file.
//!
//! The defaults are those of Hugging Face transformers for fields that a `config.json` leaves out, since a file may
//! leave out exactly what its authors left at the default.

use std::path::Path;

use crate::error::{Error, Result, shorten};
use crate::weights::safetensors::HfNames;

use super::config::{Activation, QkNorm};

/// Which layers look at a sliding window only, when `layer_types` does not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlidingLayers {
    /// No layer, whatever `sliding_window` says.
    Never,
    /// Every layer, when `sliding_window` is set.
    All,
    /// With `use_sliding_window`, the layers from `max_window_layers` on.
    FromMaxWindowLayers,
    /// All but every n-th layer (`sliding_window_pattern` overrides n).
    AllButEvery(usize),
    /// With `use_sliding_window`, the layers that do not use RoPE.
    WithoutRope,
}

/// What the scores are multiplied by before the softmax.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttentionScale {
    /// `head_dim^-0.5`.
    HeadDim,
    /// `query_pre_attn_scalar^-0.5`.
    QueryPreAttnScalar,
    /// `attention_multiplier`.
    AttentionMultiplier,
}

/// How a soft-capping field of config.json is read. An explicit null switches it off.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Softcap {
    /// The family's code does not look at the field.
    Ignored,
    /// The value when the field is absent.
    Default(Option<f64>),
}

/// Sizes that Gemma 3 files leave out where they are the default.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
}

/// One row of the table: how a family differs from the others.
#[derive(Debug)]
pub struct Family {
    /// Name for messages.
    pub name: &'static str,
    /// `model_type` values of config.json.
    pub model_types: &'static [&'static str],
    /// Those of `model_types` whose language model is described in an object of its own, `text_config`.
    pub wrappers: &'static [&'static str],
    /// `general.architecture` values of GGUF.
    pub gguf: &'static [&'static str],
    /// Norms and what their modules are called in safetensors; a norm that is `None` does not exist.
    pub names: HfNames,
    /// Added to every norm weight of a safetensors file (Gemma stores w - 1; its GGUF files store w).
    pub norm_offset: f32,
    /// Whether and how q and k are normalised.
    pub qk_norm: QkNorm,
    /// Whether q, k and v always have a bias.
    pub qkv_bias: bool,
    /// Whether `attention_bias` counts; the others' code ignores it.
    pub attention_bias: bool,
    /// Whether `mlp_bias` counts; the others' code ignores it.
    pub mlp_bias: bool,
    /// Activation when config.json names none, and always in GGUF, which names none.
    pub activation: Activation,
    /// Whether embeddings are multiplied by `sqrt(hidden_size)`.
    pub embedding_sqrt_hidden: bool,
    /// Factor on the attention scores.
    pub attention_scale: AttentionScale,
    /// Layers with a sliding window.
    pub sliding: SlidingLayers,
    /// Whether RoPE rotates neighbouring elements in GGUF files (their q and k rows are permuted for that); elsewhere
    /// and in all safetensors files it rotates element i with element i + half.
    pub gguf_interleaved_rope: bool,
    /// Every n-th layer has no RoPE unless the file lists the layers.
    pub no_rope_interval: Option<usize>,
    /// Base of a second RoPE for the layers with a sliding window.
    pub local_rope_theta: Option<f64>,
    /// Whether `partial_rotary_factor` counts; the others' code ignores it.
    pub partial_rotary: bool,
    /// Default of `original_max_position_embeddings`; the family's old names for LongRoPE (`su`, `yarn`) come with it.
    pub longrope_original: Option<usize>,
    /// Default of `num_key_value_heads`; `None` is `num_attention_heads`.
    pub num_key_value_heads: Option<usize>,
    /// Defaults of sizes that files of this family leave out.
    pub sizes: Option<Sizes>,
    /// Default of `head_dim`; `None` is `hidden_size / num_attention_heads`.
    pub head_dim: Option<usize>,
    /// Default of `tie_word_embeddings`.
    pub tied: bool,
    /// Default of `rms_norm_eps`.
    pub rms_norm_eps: f64,
    /// Default of `rope_theta`.
    pub rope_theta: f64,
    /// Default of `max_position_embeddings`.
    pub max_position_embeddings: usize,
    /// Default of `sliding_window`.
    pub sliding_window: Option<usize>,
    /// Soft-capping of the attention scores.
    pub attn_logit_softcapping: Softcap,
    /// Soft-capping of the logits.
    pub final_logit_softcapping: Softcap,
    /// Default of `eos_token_id`.
    pub eos_token_id: Option<u32>,
}

/// A norm before attention and one before the MLP.
const PRE_NORMS: HfNames = HfNames {
    attn_norm: Some("input_layernorm"),
    attn_post_norm: None,
    mlp_norm: Some("post_attention_layernorm"),
    mlp_post_norm: None,
};

/// Gemma 2's four norms.
const FOUR_NORMS: HfNames = HfNames {
    attn_norm: Some("input_layernorm"),
    attn_post_norm: Some("post_attention_layernorm"),
    mlp_norm: Some("pre_feedforward_layernorm"),
    mlp_post_norm: Some("post_feedforward_layernorm"),
};

/// OLMo 2's: on the outputs only.
const POST_NORMS: HfNames = HfNames {
    attn_norm: None,
    attn_post_norm: Some("post_attention_layernorm"),
    mlp_norm: None,
    mlp_post_norm: Some("post_feedforward_layernorm"),
};

/// What the other rows are compared with.
const LLAMA: Family = Family {
    name: "Llama",
    model_types: &["llama"],
    wrappers: &[],
    gguf: &["llama"],
    names: PRE_NORMS,
    norm_offset: 0.0,
    qk_norm: QkNorm::None,
    qkv_bias: false,
    attention_bias: true,
    mlp_bias: true,
    activation: Activation::Silu,
    embedding_sqrt_hidden: false,
    attention_scale: AttentionScale::HeadDim,
    sliding: SlidingLayers::Never,
    gguf_interleaved_rope: true,
    no_rope_interval: None,
    local_rope_theta: None,
    partial_rotary: false,
    longrope_original: None,
    num_key_value_heads: None,
    sizes: None,
    head_dim: None,
    tied: false,
    rms_norm_eps: 1e-6,
    rope_theta: 10_000.0,
    max_position_embeddings: 2048,
    sliding_window: None,
    attn_logit_softcapping: Softcap::Ignored,
    final_logit_softcapping: Softcap::Ignored,
    eos_token_id: Some(2),
};

/// Qwen 2, which Qwen 3 varies.
const QWEN2: Family = Family {
    name: "Qwen2",
    model_types: &["qwen2"],
    gguf: &["qwen2"],
    qkv_bias: true,
    attention_bias: false,
    mlp_bias: false,
    gguf_interleaved_rope: false,
    sliding: SlidingLayers::FromMaxWindowLayers,
    num_key_value_heads: Some(32),
    max_position_embeddings: 32_768,
    sliding_window: Some(4096),
    eos_token_id: None,
    ..LLAMA
};

/// Gemma, which Gemma 2 and 3 vary.
const GEMMA: Family = Family {
    name: "Gemma",
    model_types: &["gemma"],
    gguf: &["gemma"],
    norm_offset: 1.0,
    mlp_bias: false,
    activation: Activation::GeluTanh,
    embedding_sqrt_hidden: true,
    gguf_interleaved_rope: false,
    num_key_value_heads: Some(16),
    head_dim: Some(256),
    tied: true,
    max_position_embeddings: 8192,
    eos_token_id: Some(1),
    ..LLAMA
};

/// Every supported family.
pub const FAMILIES: &[Family] = &[
    LLAMA,
    Family {
        name: "Mistral",
        model_types: &["mistral"],
        gguf: &["mistral"],
        attention_bias: false,
        mlp_bias: false,
        sliding: SlidingLayers::All,
        num_key_value_heads: Some(8),
        max_position_embeddings: 131_072,
        sliding_window: Some(4096),
        ..LLAMA
    },
    QWEN2,
    Family {
        name: "Qwen3",
        model_types: &["qwen3"],
        gguf: &["qwen3"],
        qk_norm: QkNorm::PerHead,
        qkv_bias: false,
        attention_bias: true,
        head_dim: Some(128),
        ..QWEN2
    },
    Family {
        name: "Phi-3",
        model_types: &["phi3"],
        gguf: &["phi3"],
        attention_bias: false,
        mlp_bias: false,
        gguf_interleaved_rope: false,
        sliding: SlidingLayers::All,
        partial_rotary: true,
        longrope_original: Some(4096),
        rms_norm_eps: 1e-5,
        max_position_embeddings: 4096,
        eos_token_id: Some(32_000),
        ..LLAMA
    },
    GEMMA,
    Family {
        name: "Gemma 2",
        model_types: &["gemma2"],
        gguf: &["gemma2"],
        names: FOUR_NORMS,
        attention_scale: AttentionScale::QueryPreAttnScalar,
        sliding: SlidingLayers::AllButEvery(2),
        sliding_window: Some(4096),
        num_key_value_heads: Some(4),
        attn_logit_softcapping: Softcap::Default(Some(50.0)),
        final_logit_softcapping: Softcap::Default(Some(30.0)),
        ..GEMMA
    },
    Family {
        name: "Gemma 3",
        model_types: &["gemma3_text", "gemma3"],
        wrappers: &["gemma3"],
        gguf: &["gemma3"],
        names: FOUR_NORMS,
        qk_norm: QkNorm::PerHead,
        attention_scale: AttentionScale::QueryPreAttnScalar,
        sliding: SlidingLayers::AllButEvery(6),
        sliding_window: Some(4096),
        rope_theta: 1_000_000.0,
        local_rope_theta: Some(10_000.0),
        num_key_value_heads: Some(4),
        final_logit_softcapping: Softcap::Default(None),
        sizes: Some(Sizes {
            vocab_size: 262_208,
            hidden_size: 2304,
            intermediate_size: 9216,
            num_hidden_layers: 26,
            num_attention_heads: 8,
        }),
        max_position_embeddings: 131_072,
        ..GEMMA
    },
    Family {
        name: "Granite",
        model_types: &["granite"],
        gguf: &["granite"],
        attention_scale: AttentionScale::AttentionMultiplier,
        ..LLAMA
    },
    Family {
        name: "OLMo 2",
        model_types: &["olmo2"],
        gguf: &["olmo2"],
        names: POST_NORMS,
        mlp_bias: false,
        qk_norm: QkNorm::WholeProjection,
        gguf_interleaved_rope: false,
        rms_norm_eps: 1e-5,
        eos_token_id: Some(50_279),
        ..LLAMA
    },
    Family {
        name: "SmolLM3",
        model_types: &["smollm3"],
        gguf: &["smollm3"],
        sliding: SlidingLayers::WithoutRope,
        no_rope_interval: Some(4),
        num_key_value_heads: Some(4),
        tied: true,
        rope_theta: 2_000_000.0,
        max_position_embeddings: 32_768,
        eos_token_id: Some(128_001),
        ..LLAMA
    },
];

/// The family of a `model_type` of the config.json at `path`.
pub fn by_model_type(model_type: &str, path: &Path) -> Result<&'static Family> {
    find(model_type, &format!("`model_type` in {}", path.display()), |family| family.model_types)
}

/// The family of a `general.architecture` of the GGUF file at `path`.
pub fn by_gguf_architecture(architecture: &str, path: &Path) -> Result<&'static Family> {
    find(architecture, &format!("`general.architecture` in {}", path.display()), |family| family.gguf)
}

fn find(value: &str, place: &str, keys: fn(&Family) -> &'static [&'static str]) -> Result<&'static Family> {
    FAMILIES.iter().find(|family| keys(family).contains(&value)).ok_or_else(|| {
        let known: Vec<&str> = FAMILIES.iter().flat_map(keys).copied().collect();
        Error::Unsupported {
            what: "architecture",
            value: shorten(value),
            hint: format!("{place}; supported are {}", known.join(", ")),
        }
    })
}
