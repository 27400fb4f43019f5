//! GGUF metadata, read key by key: llama.cpp's names, defaults and conventions differ from those of config.json, and some
//! things it leaves unsaid.

use super::{
    DecoderConfig, LayerConfig, LayerRope, MAX_LAYERS, RopeConfig, RopeScaling, layer_norms, longrope_attention_factor,
    with_stretched_context,
};
use crate::error::{Error, Result};
use crate::model::family::{self, Family, SlidingLayers, Softcap};
use crate::weights::WeightSource;
use crate::weights::gguf::GgufFile;

impl DecoderConfig {
    /// Reads a GGUF file's metadata.
    pub fn from_gguf(gguf: &GgufFile) -> Result<(DecoderConfig, &'static Family)> {
        let family = family::by_gguf_architecture(gguf.architecture()?)?;
        let config = from_gguf(gguf, family)?;
        config.validate(gguf.path())?;
        Ok((config, family))
    }
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
    if num_hidden_layers > MAX_LAYERS {
        return Err(Error::file(gguf.path(), format!("`{arch}.block_count` is {num_hidden_layers}")));
    }
    let num_attention_heads = needed("attention.head_count")?;
    if num_attention_heads == 0 {
        return Err(Error::file(gguf.path(), format!("`{arch}.attention.head_count` is 0")));
    }
    let head_dim = size("attention.key_length")?.unwrap_or(hidden_size / num_attention_heads);
    if let Some(value_dim) = size("attention.value_length")?
        && value_dim != head_dim
    {
        return Err(Error::Unsupported {
            what: "GGUF key",
            value: format!("{arch}.attention.value_length = {value_dim}"),
            hint: format!("values must be as wide as keys ({head_dim})"),
        });
    }
    if size("expert_count")?.is_some_and(|experts| experts > 0) {
        return Err(Error::Unsupported {
            what: "GGUF key",
            value: format!("{arch}.expert_count"),
            hint: "mixture-of-experts models are not supported".into(),
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
    let pattern = gguf.get_u64("gemma3.attention.sliding_window_pattern").ok().flatten().map(|n| n as usize);
    let is_sliding = |layer: usize| match family.sliding {
        SlidingLayers::Never => false,
        SlidingLayers::All => true,
        SlidingLayers::AllButEvery(n) => !(layer + 1).is_multiple_of(pattern.unwrap_or(n).max(1)),
        // GGUF has no key for these patterns, and llama.cpp attends to everything.
        SlidingLayers::FromMaxWindowLayers | SlidingLayers::WithoutRope => false,
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
    let mut eos_token_ids = Vec::new();
    for name in ["eos_token_id", "eot_token_id", "eom_token_id"] {
        if let Some(id) = gguf.get_u64(&format!("tokenizer.ggml.{name}"))?.and_then(|id| u32::try_from(id).ok())
            && !eos_token_ids.contains(&id)
        {
            eos_token_ids.push(id);
        }
    }
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
        eos_token_ids,
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
                tensor: name.into(),
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
            value: format!("{kind} (factor {factor:?})"),
            hint: "supported are none, linear with a factor, yarn with a factor, and longrope with its tensors".into(),
        }),
    }
}
