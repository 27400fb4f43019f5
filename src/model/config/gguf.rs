//! GGUF metadata, read key by key: llama.cpp's names, defaults and conventions differ from those of config.json, and some
//! things it leaves unsaid.

use super::{
    DecoderConfig, LayerConfig, LayerRope, MAX_LAYERS, MAX_SIZE, RopeConfig, RopeScaling, check_size, layer_norms,
    longrope_attention_factor, with_stretched_context,
};
use crate::error::{Error, Result, shorten};
use crate::model::family::{self, Family, SlidingLayers, Softcap};
use crate::model::vocabulary;
use crate::weights::WeightSource;
use crate::weights::gguf::GgufFile;

impl DecoderConfig {
    /// Reads a GGUF file's metadata.
    pub fn from_gguf(gguf: &GgufFile) -> Result<(DecoderConfig, &'static Family)> {
        let architecture = gguf.architecture()?;
        let family = family::by_gguf_architecture(architecture, gguf.path())?;
        let config = from_gguf(gguf, family)?;
        config.validate(gguf.path(), &|field| key_of(architecture, field))?;
        Ok((config, family))
    }
}

/// GGUF's key for what config.json calls `field`.
fn key_of(architecture: &str, field: &str) -> String {
    let key = match field {
        "vocab_size" => return "token_embd.weight".into(),
        "long_factor" => return "rope_factors_long.weight".into(),
        "short_factor" => return "rope_factors_short.weight".into(),
        "factors" => return "rope_freqs.weight".into(),
        "hidden_size" => "embedding_length",
        "intermediate_size" => "feed_forward_length",
        "num_hidden_layers" => "block_count",
        "num_attention_heads" => "attention.head_count",
        "num_key_value_heads" => "attention.head_count_kv",
        "head_dim" => "attention.key_length",
        "max_position_embeddings" => "context_length",
        "sliding_window" => "attention.sliding_window",
        "rms_norm_eps" => "attention.layer_norm_rms_epsilon",
        "attention_multiplier" => "attention.scale",
        "embedding_multiplier" => "embedding_scale",
        "residual_multiplier" => "residual_scale",
        "logits_scaling" => "logit_scale",
        "rope_theta" => "rope.freq_base",
        "partial_rotary_factor" => "rope.dimension_count",
        "factor" => "rope.scaling.factor",
        "attention_factor" => "rope.scaling.attn_factor",
        "original_max_position_embeddings" => "rope.scaling.original_context_length",
        "beta_fast" => "rope.scaling.yarn_beta_fast",
        "beta_slow" => "rope.scaling.yarn_beta_slow",
        same => same,
    };
    format!("{architecture}.{key}")
}

fn from_gguf(gguf: &GgufFile, family: &'static Family) -> Result<DecoderConfig> {
    let arch = gguf.architecture()?.to_string();
    let key = |name: &str| format!("{arch}.{name}");
    let missing = |name: &str| Error::file(gguf.path(), format!("metadata key `{arch}.{name}` is missing"));
    let size = |name: &str| gguf.get_u64(&key(name)).map(|value| value.map(|n| n as usize));
    let number = |name: &str| gguf.get_f64(&key(name));
    let needed = |name: &str| size(name)?.ok_or_else(|| missing(name));

    let hidden_size = needed("embedding_length")?;
    let num_hidden_layers = needed("block_count")?;
    check_size(gguf.path(), &key("block_count"), num_hidden_layers, MAX_LAYERS)?;
    let num_attention_heads = needed("attention.head_count")?;
    check_size(gguf.path(), &key("attention.head_count"), num_attention_heads, MAX_SIZE)?;
    let path = gguf.path().display();
    let head_dim = size("attention.key_length")?.unwrap_or(hidden_size / num_attention_heads);
    if let Some(value_dim) = size("attention.value_length")?
        && value_dim != head_dim
    {
        return Err(Error::Unsupported {
            what: "GGUF key",
            value: format!("{arch}.attention.value_length = {value_dim}"),
            hint: format!("in {path}; `{arch}.attention.key_length` is {head_dim}, and values must be as wide as keys"),
        });
    }
    if let Some(experts) = size("expert_count")?.filter(|&experts| experts > 0) {
        return Err(Error::Unsupported {
            what: "GGUF key",
            value: format!("{arch}.expert_count = {experts}"),
            hint: format!("in {path}; mixture-of-experts models are not supported"),
        });
    }
    let context_length = size("context_length")?.unwrap_or(family.max_position_embeddings);
    let rotary_dim = size("rope.dimension_count")?.unwrap_or(head_dim);
    let theta = number("rope.freq_base")?.unwrap_or(10_000.0);
    let scaling = rope_scaling_from_gguf(gguf, &arch, context_length)?;
    let rope = RopeConfig { theta, rotary_dim, scaling, interleaved: family.gguf_interleaved_rope };
    let sliding_window = match size("attention.sliding_window")? {
        None if family.name == "Gemma 2" => family.sliding_window,
        window => window.filter(|&window| window > 0),
    };
    let local_rope = match family.local_rope_theta.filter(|_| sliding_window.is_some()) {
        None => None,
        Some(default) => Some(RopeConfig {
            theta: number("rope.freq_base_swa")?.unwrap_or(default),
            scaling: RopeScaling::Default,
            ..rope.clone()
        }),
    };

    let has_rope = |layer: usize| family.no_rope_interval.is_none_or(|n| !(layer + 1).is_multiple_of(n));
    // One number for every n-th layer, or a flag for each layer.
    let pattern_key = key("attention.sliding_window_pattern");
    let flags = gguf.get_bool_array(&pattern_key).ok().flatten();
    let interval = match &flags {
        Some(_) => None,
        None => gguf.get_u64(&pattern_key)?.map(|n| n as usize),
    };
    let is_sliding = |layer: usize| match (family.sliding, &flags) {
        (SlidingLayers::Never, _) => false,
        (SlidingLayers::All, _) => true,
        (SlidingLayers::AllButEvery(_), Some(flags)) => flags.get(layer).copied().unwrap_or(false),
        (SlidingLayers::AllButEvery(n), None) => !(layer + 1).is_multiple_of(interval.unwrap_or(n).max(1)),
        // GGUF has no key for these patterns, and llama.cpp attends to everything.
        (SlidingLayers::FromMaxWindowLayers | SlidingLayers::WithoutRope, _) => false,
    };
    let layers = (0..num_hidden_layers)
        .map(|layer| LayerConfig {
            sliding_window: sliding_window.filter(|_| is_sliding(layer)),
            rope: match (has_rope(layer), &local_rope) {
                (false, _) => LayerRope::None,
                (true, Some(_)) if is_sliding(layer) => LayerRope::Local,
                (true, _) => LayerRope::Global,
            },
        })
        .collect();

    let attention_scale = match number("attention.scale")?.filter(|&scale| scale != 0.0) {
        Some(scale) => scale,
        // Gemma's two 27B models scale by the hidden size over the heads, and no key says so.
        None if (family.name == "Gemma 2" && num_hidden_layers == 46)
            || (family.name == "Gemma 3" && num_hidden_layers == 62) =>
        {
            ((hidden_size / num_attention_heads) as f64).powf(-0.5)
        }
        None => (head_dim as f64).powf(-0.5),
    };
    let vocab_size = match gguf.meta("embed_tokens.weight")? {
        Some(meta) => meta.shape.first().copied().unwrap_or(0),
        None => return Err(Error::file(gguf.path(), "tensor `token_embd.weight` is missing")),
    };
    let softcap = |name: &str, rule: Softcap| match rule {
        Softcap::Ignored => Ok(None),
        Softcap::Default(default) => number(name).map(|cap| cap.or(default).filter(|&cap| cap != 0.0)),
    };
    let nonzero = |value: Option<f64>| value.filter(|&v| v != 0.0);
    let head_count_kv = gguf.get_u64(&key("attention.head_count_kv"))?.map(|n| n as usize);
    Ok(with_stretched_context(DecoderConfig {
        family: family.name,
        vocab_size,
        hidden_size,
        intermediate_size: needed("feed_forward_length")?,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads: head_count_kv.unwrap_or(num_attention_heads),
        head_dim,
        rms_norm_eps: number("attention.layer_norm_rms_epsilon")?.unwrap_or(family.rms_norm_eps),
        norm_offset: 0.0,
        norms: layer_norms(family),
        qk_norm: family.qk_norm,
        activation: family.activation,
        tie_word_embeddings: gguf.meta("lm_head.weight")?.is_none(),
        qkv_bias: family.qkv_bias.then_some(true),
        o_bias: None,
        mlp_bias: None,
        rope,
        local_rope,
        layers,
        max_position_embeddings: context_length,
        attention_scale,
        attn_logit_softcapping: softcap("attn_logit_softcapping", family.attn_logit_softcapping)?,
        final_logit_softcapping: softcap("final_logit_softcapping", family.final_logit_softcapping)?,
        embedding_multiplier: if family.embedding_sqrt_hidden {
            (hidden_size as f64).sqrt()
        } else {
            nonzero(number("embedding_scale")?).unwrap_or(1.0)
        },
        residual_multiplier: nonzero(number("residual_scale")?).unwrap_or(1.0),
        logits_scaling: nonzero(number("logit_scale")?).unwrap_or(1.0),
        eos_token_ids: vocabulary::end_token_ids(gguf),
        architecture: arch,
    }))
}

fn rope_scaling_from_gguf(gguf: &GgufFile, arch: &str, context_length: usize) -> Result<RopeScaling> {
    let number = |name: &str| gguf.get_f64(&format!("{arch}.rope.scaling.{name}"));
    let factors = |name: &str| -> Result<Option<Vec<f32>>> {
        if gguf.meta(name)?.is_none() {
            return Ok(None);
        }
        let stored = gguf.tensor(name)?;
        if stored.meta.dtype != crate::weights::WeightType::F32 {
            return Err(Error::Tensor {
                path: gguf.path().into(),
                tensor: gguf.stored_name(name),
                reason: format!("has type {}, expected F32", stored.meta.dtype),
            });
        }
        let (values, _) = stored.bytes.as_chunks::<4>();
        Ok(Some(values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()))
    };
    let original =
        gguf.get_u64(&format!("{arch}.rope.scaling.original_context_length"))?.map_or(context_length, |n| n as usize);
    if let (Some(long_factor), Some(short_factor)) =
        (factors("rope_factors_long.weight")?, factors("rope_factors_short.weight")?)
    {
        let stretched = longrope_attention_factor(context_length as f64 / original.max(1) as f64, original);
        let attention_factor = number("attn_factor")?.unwrap_or(stretched);
        return Ok(RopeScaling::LongRope {
            short_factor,
            long_factor,
            original_max_position_embeddings: original,
            attention_factor,
        });
    }
    if let Some(factors) = factors("rope_freqs.weight")? {
        return Ok(RopeScaling::Divided { factors });
    }
    let factor = number("factor")?.filter(|&factor| factor != 0.0);
    let kind = gguf.get_str(&format!("{arch}.rope.scaling.type"))?.map(str::to_string);
    match (kind.as_deref(), factor) {
        (None | Some("none"), None) | (Some("none"), _) => Ok(RopeScaling::Default),
        (None | Some("linear"), Some(factor)) => Ok(RopeScaling::Linear { factor }),
        (Some("yarn"), Some(factor)) => Ok(RopeScaling::Yarn {
            factor,
            original_max_position_embeddings: original,
            attention_factor: number("attn_factor")?.unwrap_or(1.0) * (0.1 * factor.max(1.0).ln() + 1.0),
            beta_fast: number("yarn_beta_fast")?.unwrap_or(32.0),
            beta_slow: number("yarn_beta_slow")?.unwrap_or(1.0),
            truncate: true,
        }),
        (Some(kind), factor) => Err(Error::Unsupported {
            what: "RoPE type",
            value: shorten(kind),
            hint: format!(
                "`{arch}.rope.scaling.type` in {}, with factor {factor:?}; supported are none, linear with a factor, yarn with a factor, and longrope with its tensors",
                gguf.path().display()
            ),
        }),
    }
}
