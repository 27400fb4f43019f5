//! GGUF metadata, read key by key: llama.cpp's names, defaults and conventions differ from those of config.json, and some
//! things it leaves unsaid.

use super::gguf_keys::{self, Shared};
use super::{
    DecoderConfig, LayerConfig, LayerRope, MAX_LAYERS, MAX_SIZE, RopeConfig, RopeScaling, SuppressedTokens, check_size,
    layer_norms, longrope_attention_factor, with_stretched_context,
};
use crate::error::{Error, Result, shorten};
use crate::model::family::{self, Family, SlidingLayers, Softcap};
use crate::model::vocabulary;
use crate::weights::WeightSource;
use crate::weights::gguf::GgufFile;

impl DecoderConfig {
    /// Reads a GGUF file's metadata.
    pub fn from_gguf(gguf: &GgufFile) -> Result<(DecoderConfig, &'static Family)> {
        gguf_keys::refuse_other_kinds(gguf)?;
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
    // Sizes of which a file may have one for each layer.
    let uniform = |name: &str| uniform(gguf, &key(name), num_hidden_layers);
    let num_attention_heads = uniform("attention.head_count")?.ok_or_else(|| missing("attention.head_count"))?;
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

    // Granite says with this key whether there is RoPE at all; for others it is a remark.
    let rope_switched_off = family.name == "Granite" && gguf.get_bool(&key("rope.scaling.finetuned"))? == Some(false);
    let has_rope =
        |layer: usize| !rope_switched_off && family.no_rope_interval.is_none_or(|n| !(layer + 1).is_multiple_of(n));
    // A period whose last layer sees everything (0: no layer does), or a flag for each layer.
    let pattern_key = key("attention.sliding_window_pattern");
    let flags = match gguf.get_u64_array(&pattern_key) {
        _ if !gguf.is_array(&pattern_key) => None,
        Ok(flags) => flags.map(|flags| flags.into_iter().map(|flag| flag != 0).collect()),
        Err(_) => gguf.get_bool_array(&pattern_key)?,
    };
    let interval = match &flags {
        Some(_) => None,
        None => gguf.get_u64(&pattern_key)?.map(|n| n as usize),
    };
    let is_sliding = |layer: usize| match (family.sliding, &flags) {
        (SlidingLayers::Never, _) => false,
        (SlidingLayers::All, _) => true,
        (SlidingLayers::AllButEvery(_), Some(flags)) => flags.get(layer).copied().unwrap_or(false),
        (SlidingLayers::AllButEvery(n), None) => match interval.unwrap_or(n) {
            0 => true,
            n => !(layer + 1).is_multiple_of(n),
        },
        // GGUF has no key for these patterns, and llama.cpp attends to everything.
        (SlidingLayers::FromMaxWindowLayers | SlidingLayers::WithoutRope, _) => false,
    };
    let slides = sliding_window.is_some() && (0..num_hidden_layers).any(is_sliding);
    if let Some(window) = sliding_window.filter(|_| !slides) {
        let key = key("attention.sliding_window");
        tracing::warn!("{path}: `{key}` ({window}) is not used: as in llama.cpp every layer sees all positions");
    }
    let theta = Some(rope.theta).filter(|_| slides && local_rope.is_none());
    gguf_keys::refuse_unsupported(gguf, &arch, family.activation, &Shared { head_dim, rotary_dim, theta })?;
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
    Ok(with_stretched_context(DecoderConfig {
        family: family.name,
        vocab_size,
        hidden_size,
        intermediate_size: uniform("feed_forward_length")?.ok_or_else(|| missing("feed_forward_length"))?,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads: uniform("attention.head_count_kv")?.unwrap_or(num_attention_heads),
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
        suppressed: SuppressedTokens { always: suppressed_tokens(gguf), at_first: Vec::new() },
        architecture: arch,
    }))
}

/// A size that all layers have: a single number, or an array of equal ones.
fn uniform(gguf: &GgufFile, key: &str, layers: usize) -> Result<Option<usize>> {
    let Some(sizes) = gguf.get_u64_or_array(key)? else { return Ok(None) };
    if gguf.is_array(key) && sizes.len() != layers {
        let reason = format!("metadata key `{key}` is an array of {} numbers for {layers} layers", sizes.len());
        return Err(Error::file(gguf.path(), reason));
    }
    if sizes.iter().any(|&size| size != sizes[0]) {
        return Err(Error::Unsupported {
            what: "GGUF key",
            value: format!("{key} = {}", gguf.shown(key)),
            hint: format!("in {}; models whose layers differ in size are not supported", gguf.path().display()),
        });
    }
    Ok(sizes.first().map(|&size| size as usize))
}

/// Ids outside of the vocabulary are left out, as llama.cpp does it.
fn suppressed_tokens(gguf: &GgufFile) -> Vec<u32> {
    let ids = gguf.numbers("tokenizer.ggml.suppress_tokens").unwrap_or_default();
    ids.into_iter()
        .filter(|id| id.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(id))
        .map(|id| id as u32)
        .collect()
}

fn rope_scaling_from_gguf(gguf: &GgufFile, arch: &str, context_length: usize) -> Result<RopeScaling> {
    let key = |name: &str| format!("{arch}.rope.scaling.{name}");
    let number = |name: &str| gguf.get_f64(&key(name));
    let path = gguf.path();
    let factors = |name: &str| -> Result<Option<Vec<f32>>> {
        if gguf.meta(name)?.is_none() {
            return Ok(None);
        }
        let stored = gguf.tensor(name)?;
        if stored.meta.dtype != crate::weights::WeightType::F32 {
            return Err(Error::Tensor {
                path: path.into(),
                tensor: gguf.stored_name(name),
                reason: format!("has type {}, expected F32", stored.meta.dtype),
            });
        }
        let bytes = stored.bytes.read()?;
        let (values, _) = bytes.as_chunks::<4>();
        Ok(Some(values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()))
    };
    let kind = gguf.get_str(&key("type"))?.unwrap_or("linear");
    let unsupported = |hint: String| Error::Unsupported {
        what: "RoPE type",
        value: shorten(kind),
        hint: format!("`{}` in {}; {hint}", key("type"), path.display()),
    };
    if !matches!(kind, "none" | "linear" | "yarn" | "longrope") {
        return Err(unsupported("supported are none, linear, yarn, and longrope with its tensors".into()));
    }
    // The factor's old name counts where the new one is absent. 0 stands for none.
    let factor_key = match gguf.contains(&key("factor")) {
        true => key("factor"),
        false => format!("{arch}.rope.scale_linear"),
    };
    let factor = match gguf.get_f64(&factor_key)? {
        None | Some(0.0) => 1.0,
        _ if kind == "none" => 1.0,
        Some(factor) if factor.is_finite() && factor > 0.0 => factor,
        Some(factor) => {
            let reason = format!("`{factor_key}` is {factor}, expected a finite number above 0");
            return Err(Error::file(path, reason));
        }
    };
    let original = gguf.get_u64(&key("original_context_length"))?.map_or(context_length, |n| n as usize);
    let attention_factor = number("attn_factor")?;
    // Beside tables of divisors the factor divides too.
    let stretched = |divisors: Vec<f32>| -> Vec<f32> { divisors.iter().map(|d| d * factor as f32).collect() };
    let (long, short) = (factors("rope_factors_long.weight")?, factors("rope_factors_short.weight")?);
    let table = factors("rope_freqs.weight")?;
    if kind == "yarn" && (long.is_some() || short.is_some() || table.is_some()) {
        return Err(unsupported("YaRN is not supported together with a table of RoPE factors".into()));
    }
    if let (Some(long), Some(short)) = (&long, &short) {
        let inferred = longrope_attention_factor(context_length as f64 / original.max(1) as f64, original);
        return Ok(RopeScaling::LongRope {
            short_factor: stretched(short.clone()),
            long_factor: stretched(long.clone()),
            original_max_position_embeddings: original,
            attention_factor: attention_factor.unwrap_or(inferred),
        });
    }
    if long.is_some() || short.is_some() {
        let missing = if long.is_some() { "rope_factors_short.weight" } else { "rope_factors_long.weight" };
        let reason = "is missing, and the other table of LongRoPE is there".to_string();
        return Err(Error::Tensor { path: path.into(), tensor: missing.into(), reason });
    }
    if kind == "yarn" {
        let inferred = 0.1 * factor.max(1.0).ln() + 1.0;
        // Converters write the attention factor of config.json here, which llama.cpp does not read.
        if let Some(stated) = number("yarn_attn_factor")?
            && stated != 1.0
            && (stated - inferred).abs() > 1e-4
        {
            let reason = format!(
                "`{}` is {stated}, and factor {factor} gives {inferred}: other attention factors are not supported",
                key("yarn_attn_factor")
            );
            return Err(Error::file(path, reason));
        }
        return Ok(RopeScaling::Yarn {
            factor,
            original_max_position_embeddings: original,
            attention_factor: attention_factor.unwrap_or(1.0) * inferred,
            beta_fast: number("yarn_beta_fast")?.unwrap_or(32.0),
            beta_slow: number("yarn_beta_slow")?.unwrap_or(1.0),
            truncate: true,
        });
    }
    if kind == "longrope" {
        return Err(unsupported("it needs the tensors rope_factors_long.weight and rope_factors_short.weight".into()));
    }
    if let Some(attention_factor) = attention_factor.filter(|&factor| factor != 1.0) {
        let reason =
            format!("`{}` is {attention_factor}, which is supported for yarn and longrope only", key("attn_factor"));
        return Err(Error::file(path, reason));
    }
    Ok(match table {
        Some(divisors) => RopeScaling::Divided { factors: stretched(divisors) },
        None if factor == 1.0 => RopeScaling::Default,
        None => RopeScaling::Linear { factor },
    })
}
