//! Hugging Face's config.json, read field by field: families spell and default the same things in their own ways, so what
//! is absent comes from the family and what is wrong is named.

use std::path::Path;

use serde_json::Value;

use super::generation::Generation;
use super::json::Json;
use super::{
    Activation, DecoderConfig, LayerConfig, LayerRope, MAX_LAYERS, MAX_SIZE, RopeConfig, RopeScaling, SuppressedTokens,
    check_size, layer_norms, longrope_attention_factor, with_stretched_context,
};
use crate::error::{Error, Result, shorten};
use crate::model::family::{self, AttentionScale, Family, SlidingLayers, Softcap};

impl DecoderConfig {
    /// Reads config.json, and the end-of-sequence ids from generation_config.json where there is one.
    pub fn from_hf_dir(dir: &Path) -> Result<(DecoderConfig, &'static Family)> {
        let root = Json::read(dir.join("config.json"))?;
        let model_type = root.text("model_type")?.ok_or_else(|| root.missing("model_type"))?;
        let family = family::by_model_type(&model_type, &root.path)?;
        refuse_quantised(&root)?;
        // Multimodal wrappers keep the language model's fields in an object of their own.
        let wrapped = match family.wrappers.contains(&model_type.as_str()) {
            true => root.object("text_config")?,
            false => None,
        };
        let json = wrapped.as_ref().unwrap_or(&root);
        if let Some(inner) = wrapped.as_ref().and_then(|json| json.text("model_type").transpose()).transpose()?
            && !family.model_types.contains(&inner.as_str())
        {
            return Err(json.unsupported(
                "text model",
                &inner,
                "text_config.model_type",
                &family.model_types.join(", "),
            ));
        }
        refuse_quantised(json)?;
        let mut config = from_json(json, family, &model_type)?;
        if wrapped.is_some() {
            config.tie_word_embeddings = root.flag("tie_word_embeddings")?.unwrap_or(family.tied);
        }
        let generation = Generation::read(dir, &root, json)?;
        config.eos_token_ids = generation.eos_token_ids.unwrap_or(config.eos_token_ids);
        config.suppressed = generation.suppressed;
        config.validate(&root.path, &str::to_string)?;
        Ok((config, family))
    }
}

fn refuse_quantised(json: &Json) -> Result<()> {
    let Some(config) = json.get("quantization_config") else { return Ok(()) };
    let method = config.get("quant_method").and_then(Value::as_str).map_or(config.to_string(), str::to_string);
    Err(Error::Unsupported {
        what: "quantization_config",
        value: shorten(&method),
        hint: format!("in {}; use the unquantised safetensors or a GGUF file of the model", json.path.display()),
    })
}

/// Fields that switch off what makes a decoder of the model.
fn refuse_bidirectional(json: &Json) -> Result<()> {
    for (field, causal) in [("use_bidirectional_attention", false), ("is_causal", true)] {
        if json.flag(field)?.is_some_and(|value| value != causal) {
            return Err(Error::Unsupported {
                what: "attention",
                value: format!("{field} = {}", !causal),
                hint: format!(
                    "in {}; a model whose positions see those after them makes embeddings and does not generate",
                    json.path.display()
                ),
            });
        }
    }
    Ok(())
}

fn from_json(json: &Json, family: &'static Family, model_type: &str) -> Result<DecoderConfig> {
    refuse_bidirectional(json)?;
    let needed = |field: &str, default: fn(&family::Sizes) -> usize| -> Result<usize> {
        let size = json.size(field)?.or(family.sizes.as_ref().map(default));
        size.ok_or_else(|| json.missing(field))
    };
    let hidden_size = needed("hidden_size", |sizes| sizes.hidden_size)?;
    let num_hidden_layers = needed("num_hidden_layers", |sizes| sizes.num_hidden_layers)?;
    let num_attention_heads = needed("num_attention_heads", |sizes| sizes.num_attention_heads)?;
    check_size(&json.path, "num_hidden_layers", num_hidden_layers, MAX_LAYERS)?;
    check_size(&json.path, "num_attention_heads", num_attention_heads, MAX_SIZE)?;
    let head_dim = json.size("head_dim")?.or(family.head_dim).unwrap_or(hidden_size / num_attention_heads);
    let max_position_embeddings = json.size("max_position_embeddings")?.unwrap_or(family.max_position_embeddings);
    let (rope, local_rope) = ropes_from_json(json, family, head_dim, max_position_embeddings)?;
    let activation_field = if json.get("hidden_activation").is_some() { "hidden_activation" } else { "hidden_act" };
    let activation = match json.text(activation_field)?.as_deref() {
        None => family.activation,
        // Gemma 1 says `gelu` and means the approximation; transformers corrects it in the same way.
        Some("gelu") if family.activation == Activation::GeluTanh => Activation::GeluTanh,
        Some(name) => Activation::from_name(name).ok_or_else(|| {
            json.unsupported("activation", name, activation_field, "silu, gelu and gelu_pytorch_tanh")
        })?,
    };
    let (no_rope_layers, interval) = match family.no_rope_interval {
        Some(_) => (json.numbers("no_rope_layers")?, json.size("no_rope_layer_interval")?.or(family.no_rope_interval)),
        None => (None, None),
    };
    let has_rope = |layer: usize| match (&no_rope_layers, family.no_rope_interval) {
        // The list holds 1 for a layer WITH RoPE, in spite of its name.
        (Some(list), Some(_)) => list.get(layer).is_none_or(|&flag| flag != 0.0),
        (None, Some(_)) => interval.is_none_or(|n| n == 0 || !(layer + 1).is_multiple_of(n)),
        (_, None) => true,
    };
    let sliding_window = sliding_window_from_json(json, family)?;
    let is_sliding = sliding_layers_from_json(json, family, num_hidden_layers, &has_rope)?;
    let layers = (0..num_hidden_layers)
        .map(|layer| LayerConfig {
            sliding_window: sliding_window.filter(|_| is_sliding[layer]),
            rope: match (has_rope(layer), &local_rope) {
                (false, _) => LayerRope::None,
                (true, Some(_)) if is_sliding[layer] => LayerRope::Local,
                (true, _) => LayerRope::Global,
            },
        })
        .collect();
    let attention_scale = match family.attention_scale {
        AttentionScale::HeadDim => (head_dim as f64).powf(-0.5),
        AttentionScale::QueryPreAttnScalar => json.positive("query_pre_attn_scalar")?.unwrap_or(256.0).powf(-0.5),
        AttentionScale::AttentionMultiplier => json.positive("attention_multiplier")?.unwrap_or(1.0),
    };
    let softcap = |field: &str, rule: Softcap| -> Result<Option<f64>> {
        match (rule, json.value.get(field)) {
            (Softcap::Ignored, _) => Ok(None),
            (Softcap::Default(default), None) => Ok(default),
            (Softcap::Default(_), Some(_)) => json.positive(field),
        }
    };
    let multiplier = |field: &str| -> Result<f64> {
        if family.attention_scale != AttentionScale::AttentionMultiplier {
            return Ok(1.0);
        }
        Ok(json.positive(field)?.unwrap_or(1.0))
    };
    // A field that strayed into the config of a family without it means nothing.
    let bias = |field: &str, counts: bool| if counts { json.flag(field) } else { Ok(None) };
    let attention_bias = bias("attention_bias", family.attention_bias)?.unwrap_or(false);
    let embedding_multiplier =
        if family.embedding_sqrt_hidden { (hidden_size as f64).sqrt() } else { multiplier("embedding_multiplier")? };
    Ok(with_stretched_context(DecoderConfig {
        family: family.name,
        architecture: model_type.to_string(),
        vocab_size: needed("vocab_size", |sizes| sizes.vocab_size)?,
        hidden_size,
        intermediate_size: needed("intermediate_size", |sizes| sizes.intermediate_size)?,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads: match json.value.get("num_key_value_heads") {
            None => family.num_key_value_heads,
            Some(_) => json.size("num_key_value_heads")?,
        }
        .unwrap_or(num_attention_heads),
        head_dim,
        rms_norm_eps: json.number("rms_norm_eps")?.unwrap_or(family.rms_norm_eps),
        norm_offset: family.norm_offset,
        norms: layer_norms(family),
        qk_norm: family.qk_norm,
        activation,
        tie_word_embeddings: json.flag("tie_word_embeddings")?.unwrap_or(family.tied),
        qkv_bias: Some(family.qkv_bias || attention_bias),
        o_bias: Some(attention_bias),
        mlp_bias: Some(bias("mlp_bias", family.mlp_bias)?.unwrap_or(false)),
        rope,
        local_rope,
        layers,
        max_position_embeddings,
        attention_scale,
        attn_logit_softcapping: softcap("attn_logit_softcapping", family.attn_logit_softcapping)?,
        final_logit_softcapping: softcap("final_logit_softcapping", family.final_logit_softcapping)?,
        embedding_multiplier,
        residual_multiplier: multiplier("residual_multiplier")?,
        logits_scaling: multiplier("logits_scaling")?,
        eos_token_ids: match json.value.get("eos_token_id") {
            None => family.eos_token_id.into_iter().collect(),
            Some(_) => json.token_ids("eos_token_id")?.unwrap_or_default(),
        },
        suppressed: SuppressedTokens::default(),
    }))
}

fn sliding_window_from_json(json: &Json, family: &Family) -> Result<Option<usize>> {
    let switched = matches!(family.sliding, SlidingLayers::FromMaxWindowLayers | SlidingLayers::WithoutRope);
    if family.sliding == SlidingLayers::Never || (switched && !json.flag("use_sliding_window")?.unwrap_or(false)) {
        return Ok(None);
    }
    match json.value.get("sliding_window") {
        None => Ok(family.sliding_window),
        Some(_) => json.size("sliding_window"),
    }
}

fn sliding_layers_from_json(
    json: &Json,
    family: &Family,
    layers: usize,
    has_rope: &dyn Fn(usize) -> bool,
) -> Result<Vec<bool>> {
    if !matches!(family.sliding, SlidingLayers::Never | SlidingLayers::All)
        && let Some(types) = json.get("layer_types")
    {
        let types = types.as_array().ok_or_else(|| json.wrong("layer_types", types, "a list"))?;
        if types.len() != layers {
            let found = types.len();
            return Err(Error::file(&json.path, format!("`layer_types` has {found} entries for {layers} layers")));
        }
        return types
            .iter()
            .map(|kind| match kind.as_str() {
                Some("sliding_attention") => Ok(true),
                Some("full_attention") => Ok(false),
                _ => {
                    let supported = "full_attention and sliding_attention";
                    Err(json.unsupported("layer type", &kind.to_string(), "layer_types", supported))
                }
            })
            .collect();
    }
    let all = |slides: &dyn Fn(usize) -> bool| (0..layers).map(slides).collect();
    Ok(match family.sliding {
        SlidingLayers::Never => all(&|_| false),
        SlidingLayers::All => all(&|_| true),
        SlidingLayers::FromMaxWindowLayers => {
            let first = json.size("max_window_layers")?.unwrap_or(28);
            all(&|layer| layer >= first)
        }
        SlidingLayers::AllButEvery(n) => {
            let pattern = json.size("sliding_window_pattern")?.or(json.size("_sliding_window_pattern")?);
            let n = pattern.unwrap_or(n).max(1);
            all(&|layer| !(layer + 1).is_multiple_of(n))
        }
        SlidingLayers::WithoutRope => all(&|layer| !has_rope(layer)),
    })
}

/// The rotary embeddings, from `rope_theta` + `rope_scaling` or from the newer `rope_parameters`, which may hold one
/// set for each layer type.
fn ropes_from_json(
    json: &Json,
    family: &Family,
    head_dim: usize,
    max_positions: usize,
) -> Result<(RopeConfig, Option<RopeConfig>)> {
    let theta = json.number("rope_theta")?.unwrap_or(family.rope_theta);
    let none = || Json::empty(&json.path);
    let parameters = match json.object("rope_scaling")? {
        Some(parameters) => parameters,
        None => json.object("rope_parameters")?.unwrap_or_else(none),
    };
    let build = |p: &Json, theta: f64| rope_from_json(json, p, family, theta, head_dim, max_positions);
    let Some(local_theta) = family.local_rope_theta else {
        for layers in ["full_attention", "sliding_attention"] {
            if parameters.get(layers).is_some() {
                let reason =
                    format!("`rope_parameters` has `{layers}`, but {} has one set for all layers", family.name);
                return Err(Error::file(&json.path, reason));
            }
        }
        return Ok((build(&parameters, theta)?, None));
    };
    let local_theta = json.number("rope_local_base_freq")?.unwrap_or(local_theta);
    match (parameters.object("full_attention")?, parameters.object("sliding_attention")?) {
        (None, None) => Ok((build(&parameters, theta)?, Some(build(&none(), local_theta)?))),
        (full, sliding) => {
            Ok((build(&full.unwrap_or_else(none), theta)?, Some(build(&sliding.unwrap_or_else(none), local_theta)?)))
        }
    }
}

fn rope_from_json(
    json: &Json,
    parameters: &Json,
    family: &Family,
    theta: f64,
    head_dim: usize,
    max_positions: usize,
) -> Result<RopeConfig> {
    let theta = parameters.number("rope_theta")?.unwrap_or(theta);
    let partial = match family.partial_rotary {
        true => {
            let share = |json: &Json| {
                json.read_as("partial_rotary_factor", "a number above 0 and at most 1", |v| {
                    v.as_f64().filter(|&share| share > 0.0 && share <= 1.0)
                })
            };
            share(parameters)?.or(share(json)?).unwrap_or(1.0)
        }
        false => 1.0,
    };
    let rotary_dim = (head_dim as f64 * partial) as usize;
    let mut kind = parameters.text("rope_type")?.or(parameters.text("type")?).unwrap_or_else(|| "default".into());
    if family.longrope_original.is_some() && matches!(kind.as_str(), "su" | "yarn") {
        kind = "longrope".into();
    }
    let needed = |field: &str| -> Result<f64> { parameters.number(field)?.ok_or_else(|| parameters.missing(field)) };
    // Phi-3 states the trained length outside the parameters, and that one counts.
    let original = match json.size("original_max_position_embeddings")?.or(family.longrope_original) {
        Some(original) => original,
        None => parameters.size("original_max_position_embeddings")?.unwrap_or(max_positions),
    };
    let scaling = match kind.as_str() {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: needed("factor")? },
        "dynamic" => {
            RopeScaling::Dynamic { factor: needed("factor")?, original_max_position_embeddings: max_positions }
        }
        "llama3" => RopeScaling::Llama3 {
            factor: needed("factor")?,
            low_freq_factor: needed("low_freq_factor")?,
            high_freq_factor: needed("high_freq_factor")?,
            original_max_position_embeddings: original,
        },
        "yarn" => {
            let factor = parameters.number("factor")?.unwrap_or(max_positions as f64 / original.max(1) as f64);
            let mscale = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
            let inferred = match (parameters.number("mscale")?, parameters.number("mscale_all_dim")?) {
                (Some(m), Some(all)) if m != 0.0 && all != 0.0 => mscale(m) / mscale(all),
                _ => mscale(1.0),
            };
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings: original,
                attention_factor: parameters.number("attention_factor")?.unwrap_or(inferred),
                beta_fast: parameters.number("beta_fast")?.filter(|&b| b != 0.0).unwrap_or(32.0),
                beta_slow: parameters.number("beta_slow")?.filter(|&b| b != 0.0).unwrap_or(1.0),
                truncate: parameters.flag("truncate")?.unwrap_or(true),
            }
        }
        "longrope" => {
            let factor = parameters.number("factor")?.unwrap_or(max_positions as f64 / original.max(1) as f64);
            let divisors = |field: &str| parameters.numbers(field)?.ok_or_else(|| parameters.missing(field));
            RopeScaling::LongRope {
                short_factor: divisors("short_factor")?,
                long_factor: divisors("long_factor")?,
                original_max_position_embeddings: original,
                attention_factor: parameters
                    .number("attention_factor")?
                    .unwrap_or_else(|| longrope_attention_factor(factor, original)),
            }
        }
        other => {
            let supported = "default, linear, dynamic, llama3, yarn and longrope";
            return Err(parameters.unsupported("RoPE type", other, "rope_type", supported));
        }
    };
    Ok(RopeConfig { theta, rotary_dim, scaling, interleaved: false })
}
