//! What a decoder is: one set of typed data for every family, read from a config.json or from GGUF metadata. Anything
//! that is not supported is refused here by name, before a weight is touched.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::family::{self, AttentionScale, Family, SlidingLayers, Softcap};
use crate::error::{Error, Result};
use crate::weights::WeightSource;
use crate::weights::gguf::GgufFile;

/// The function between gate and up projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// GELU with the error function.
    Gelu,
    /// GELU by its tanh approximation.
    GeluTanh,
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
}

impl DecoderConfig {
    /// Reads config.json, and the end-of-sequence ids from generation_config.json where there is one.
    pub fn from_hf_dir(dir: &Path) -> Result<(DecoderConfig, &'static Family)> {
        let root = Json::read(dir.join("config.json"))?;
        let model_type = root.text("model_type")?.ok_or_else(|| root.missing("model_type"))?;
        let family = family::by_model_type(&model_type)?;
        // Multimodal wrappers keep the language model's fields in a folder of their own.
        let json = match root.value.get("text_config") {
            Some(text) => Json { path: root.path.clone(), value: text.clone() },
            None => root,
        };
        if let Some(kind) = json.value.get("quantization_config") {
            let method = kind.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
            return Err(Error::Unsupported {
                what: "quantization_config",
                value: method.to_string(),
                hint: "use the unquantised safetensors or a GGUF file of the model".into(),
            });
        }
        let mut config = from_json(&json, family, &model_type)?;
        let generation = dir.join("generation_config.json");
        if generation.exists() {
            let eos = Json::read(generation)?.token_ids("eos_token_id")?;
            if let Some(eos) = eos {
                config.eos_token_ids = eos;
            }
        }
        config.validate(&json.path)?;
        Ok((config, family))
    }

    /// Reads a GGUF file's metadata.
    pub fn from_gguf(gguf: &GgufFile) -> Result<(DecoderConfig, &'static Family)> {
        let family = family::by_gguf_architecture(gguf.architecture()?)?;
        let config = from_gguf(gguf, family)?;
        config.validate(gguf.path())?;
        Ok((config, family))
    }

    /// Values of KV that one token takes in one layer, keys and values together.
    pub fn kv_elements_per_token(&self) -> usize {
        2 * self.num_key_value_heads * self.head_dim
    }

    fn validate(&self, path: &Path) -> Result<()> {
        let refuse = |reason: String| Err(Error::file(path, reason));
        // Far above every model there is; keeps products of two of them within 64 bits.
        const LIMIT: usize = 1 << 24;
        for (field, value) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
        ] {
            if value == 0 || value > LIMIT {
                return refuse(format!("`{field}` is {value}, which is not in 1..={LIMIT}"));
            }
        }
        if self.num_hidden_layers == 0 || self.num_hidden_layers > MAX_LAYERS {
            return refuse(format!(
                "`num_hidden_layers` is {}, which is not in 1..={MAX_LAYERS}",
                self.num_hidden_layers
            ));
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return refuse(format!(
                "`num_attention_heads` ({}) is not a multiple of `num_key_value_heads` ({})",
                self.num_attention_heads, self.num_key_value_heads
            ));
        }
        for rope in std::iter::once(&self.rope).chain(&self.local_rope) {
            let dim = rope.rotary_dim;
            if dim == 0 || dim > self.head_dim || !dim.is_multiple_of(2) {
                return refuse(format!("RoPE rotates {dim} of {} elements of a head", self.head_dim));
            }
            if !(rope.theta.is_finite() && rope.theta > 0.0) {
                return refuse(format!("`rope_theta` is {}", rope.theta));
            }
            let divisors: &[&Vec<f32>] = match &rope.scaling {
                RopeScaling::LongRope { short_factor, long_factor, .. } => &[short_factor, long_factor],
                RopeScaling::Divided { factors } => &[factors],
                _ => &[],
            };
            if let Some(wrong) = divisors.iter().find(|d| d.len() != dim / 2) {
                let found = wrong.len();
                return refuse(format!("RoPE scaling lists {found} factors for {} frequencies", dim / 2));
            }
        }
        for (field, value) in [
            ("rms_norm_eps", self.rms_norm_eps),
            ("attention scale", self.attention_scale),
            ("embedding_multiplier", self.embedding_multiplier),
            ("residual_multiplier", self.residual_multiplier),
            ("logits_scaling", self.logits_scaling),
        ] {
            if !(value.is_finite() && value > 0.0) {
                return refuse(format!("`{field}` is {value}, which is not a finite number above 0"));
            }
        }
        if self.layers.iter().any(|layer| layer.sliding_window == Some(0)) {
            return refuse("`sliding_window` is 0".into());
        }
        Ok(())
    }
}

/// More layers than any model has; a larger number in a file is a damaged file.
const MAX_LAYERS: usize = 4096;

/// A config.json with typed access; errors name the file and the field.
struct Json {
    path: PathBuf,
    value: Value,
}

impl Json {
    fn read(path: PathBuf) -> Result<Json> {
        let text = std::fs::read_to_string(&path).map_err(|e| Error::file(&path, e))?;
        let value = serde_json::from_str(&text).map_err(|e| Error::file(&path, format!("not valid JSON: {e}")))?;
        Ok(Json { path, value })
    }

    fn missing(&self, field: &str) -> Error {
        Error::file(&self.path, format!("field `{field}` is missing"))
    }

    fn wrong(&self, field: &str, value: &Value, wanted: &str) -> Error {
        Error::file(&self.path, format!("field `{field}` is {value}, expected {wanted}"))
    }

    /// The field's value; absent and null are `None`.
    fn get<'a>(&'a self, field: &str) -> Option<&'a Value> {
        self.value.get(field).filter(|value| !value.is_null())
    }

    fn read_as<'a, T>(
        &'a self,
        field: &str,
        wanted: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        match self.get(field) {
            None => Ok(None),
            Some(value) => convert(value).map(Some).ok_or_else(|| self.wrong(field, value, wanted)),
        }
    }

    fn size(&self, field: &str) -> Result<Option<usize>> {
        self.read_as(field, "a whole number", |v| {
            v.as_u64()
                .or_else(|| v.as_f64().filter(|f| f.fract() == 0.0 && (0.0..1e15).contains(f)).map(|f| f as u64))
                .map(|n| n as usize)
        })
    }

    fn number(&self, field: &str) -> Result<Option<f64>> {
        self.read_as(field, "a number", Value::as_f64)
    }

    fn flag(&self, field: &str) -> Result<Option<bool>> {
        self.read_as(field, "true or false", Value::as_bool)
    }

    fn text(&self, field: &str) -> Result<Option<String>> {
        self.read_as(field, "a text", |v| v.as_str().map(str::to_string))
    }

    fn numbers(&self, field: &str) -> Result<Option<Vec<f32>>> {
        self.read_as(field, "a list of numbers", |v| {
            v.as_array()?.iter().map(|n| n.as_f64().map(|n| n as f32)).collect()
        })
    }

    fn token_ids(&self, field: &str) -> Result<Option<Vec<u32>>> {
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        self.read_as(field, "a token id or a list of them", |v| match v.as_array() {
            Some(ids) => ids.iter().map(id).collect(),
            None => id(v).map(|id| vec![id]),
        })
    }

    /// A nested object with the same error messages.
    fn object(&self, field: &str) -> Result<Option<Json>> {
        self.read_as(field, "an object", |v| v.as_object().map(|_| v.clone()))
            .map(|value| value.map(|value| Json { path: self.path.clone(), value }))
    }
}

fn from_json(json: &Json, family: &'static Family, model_type: &str) -> Result<DecoderConfig> {
    let needed = |field: &str, default: fn(&family::Sizes) -> usize| -> Result<usize> {
        let size = json.size(field)?.or(family.sizes.as_ref().map(default));
        size.ok_or_else(|| json.missing(field))
    };
    let hidden_size = needed("hidden_size", |sizes| sizes.hidden_size)?;
    let num_hidden_layers = needed("num_hidden_layers", |sizes| sizes.num_hidden_layers)?;
    let num_attention_heads = needed("num_attention_heads", |sizes| sizes.num_attention_heads)?;
    if num_hidden_layers > MAX_LAYERS {
        return Err(Error::file(&json.path, format!("`num_hidden_layers` is {num_hidden_layers}")));
    }
    if num_attention_heads == 0 {
        return Err(Error::file(&json.path, "`num_attention_heads` is 0"));
    }
    let head_dim = json.size("head_dim")?.or(family.head_dim).unwrap_or(hidden_size / num_attention_heads);
    let max_position_embeddings = json.size("max_position_embeddings")?.unwrap_or(family.max_position_embeddings);
    let (rope, local_rope) = ropes_from_json(json, family, head_dim, max_position_embeddings)?;
    let activation = match json.text("hidden_activation")?.or(json.text("hidden_act")?).as_deref() {
        None => family.activation,
        Some("silu" | "swish") => Activation::Silu,
        Some("gelu_pytorch_tanh" | "gelu_new" | "gelu_fast") => Activation::GeluTanh,
        // Gemma 1 says `gelu` and means the approximation; transformers corrects it in the same way.
        Some("gelu") if family.activation == Activation::GeluTanh => Activation::GeluTanh,
        Some("gelu") => Activation::Gelu,
        Some(other) => {
            return Err(Error::Unsupported {
                what: "activation",
                value: other.to_string(),
                hint: "supported are silu, gelu and gelu_pytorch_tanh".into(),
            });
        }
    };
    let no_rope_layers: Option<Vec<f32>> = json.numbers("no_rope_layers")?;
    let interval = json.size("no_rope_layer_interval")?.or(family.no_rope_interval);
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
        AttentionScale::QueryPreAttnScalar => json.number("query_pre_attn_scalar")?.unwrap_or(256.0).powf(-0.5),
        AttentionScale::AttentionMultiplier => json.number("attention_multiplier")?.unwrap_or(1.0),
    };
    let softcap = |field: &str, rule: Softcap| -> Result<Option<f64>> {
        match (rule, json.value.get(field)) {
            (Softcap::Ignored, _) => Ok(None),
            (Softcap::Default(default), None) => Ok(default),
            (Softcap::Default(_), Some(_)) => json.number(field),
        }
    };
    let multiplier = |field: &str| -> Result<f64> {
        if family.attention_scale != AttentionScale::AttentionMultiplier {
            return Ok(1.0);
        }
        Ok(json.number(field)?.unwrap_or(1.0))
    };
    // Families with a fixed bias have no such field; one that strayed into their config means nothing.
    let attention_bias = !family.qkv_bias && json.flag("attention_bias")?.unwrap_or(false);
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
        mlp_bias: Some(json.flag("mlp_bias")?.unwrap_or(false)),
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
    }))
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

fn sliding_window_from_json(json: &Json, family: &Family) -> Result<Option<usize>> {
    let window = match json.value.get("sliding_window") {
        None => family.sliding_window,
        Some(_) => json.size("sliding_window")?,
    };
    let switched = matches!(family.sliding, SlidingLayers::FromMaxWindowLayers | SlidingLayers::WithoutRope);
    if switched && !json.flag("use_sliding_window")?.unwrap_or(false) {
        return Ok(None);
    }
    Ok(window)
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
                _ => Err(Error::Unsupported {
                    what: "layer type",
                    value: kind.to_string(),
                    hint: "supported are full_attention and sliding_attention".into(),
                }),
            })
            .collect();
    }
    let max_window_layers = json.size("max_window_layers")?.unwrap_or(28);
    let pattern = json.size("sliding_window_pattern")?.or(json.size("_sliding_window_pattern")?);
    Ok((0..layers)
        .map(|layer| match family.sliding {
            SlidingLayers::Never => false,
            SlidingLayers::All => true,
            SlidingLayers::FromMaxWindowLayers => layer >= max_window_layers,
            SlidingLayers::AllButEvery(n) => !(layer + 1).is_multiple_of(pattern.unwrap_or(n).max(1)),
            SlidingLayers::WithoutRope => !has_rope(layer),
        })
        .collect())
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
    let none = || Json { path: json.path.clone(), value: Value::Object(Default::default()) };
    let parameters = match json.object("rope_scaling")? {
        Some(parameters) => parameters,
        None => json.object("rope_parameters")?.unwrap_or_else(none),
    };
    let build = |p: &Json, theta: f64| rope_from_json(json, p, family, theta, head_dim, max_positions);
    let Some(local_theta) = family.local_rope_theta else {
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
        true => parameters.number("partial_rotary_factor")?.or(json.number("partial_rotary_factor")?).unwrap_or(1.0),
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
            return Err(Error::Unsupported {
                what: "RoPE type",
                value: other.to_string(),
                hint: "supported are default, linear, dynamic, llama3, yarn and longrope".into(),
            });
        }
    };
    Ok(RopeConfig { theta, rotary_dim, scaling, interleaved: false })
}

fn longrope_attention_factor(factor: f64, original: usize) -> f64 {
    if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / (original as f64).ln()).sqrt() }
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
