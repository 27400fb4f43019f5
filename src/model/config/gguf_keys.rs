//! Metadata keys that would change what a model computes and that this crate does not act on. llama.cpp passes over keys
//! that it does not know, and so does this crate; those listed here are refused by name unless they say what is done
//! anyway. Files saved by llama.cpp itself carry most of them, with such values.

use crate::error::{Error, Result, shorten};
use crate::model::config::Activation;
use crate::weights::gguf::GgufFile;

const EXPERTS: &str = "mixture-of-experts models are not supported";
const NO_DECODER: &str = "the model makes embeddings and does not generate";
const ATTENTION: &str = "this form of attention is not supported";
const POSITIONS: &str = "this form of position embedding is not supported";
const LAYERS: &str = "this form of layer is not supported";

/// Key behind the architecture's name, values that change nothing, and what other values ask for.
const UNSUPPORTED: &[(&str, &[f64], &str)] = &[
    ("expert_count", &[0.0], EXPERTS),
    ("expert_used_count", &[0.0], EXPERTS),
    ("expert_shared_count", &[0.0], EXPERTS),
    ("expert_shared_feed_forward_length", &[0.0], EXPERTS),
    ("expert_group_count", &[0.0], EXPERTS),
    ("moe_every_n_layers", &[0.0], EXPERTS),
    ("interleave_moe_layer_step", &[0.0], EXPERTS),
    ("attention.causal", &[1.0], NO_DECODER),
    ("attention.clamp_kqv", &[0.0], "clamped queries, keys and values are not supported"),
    ("attention.max_alibi_bias", &[0.0], POSITIONS),
    ("attention.output_scale", &[0.0, 1.0], ATTENTION),
    ("attention.value_scale", &[0.0, 1.0], ATTENTION),
    ("attention.temperature_length", &[0.0], ATTENTION),
    ("attention.temperature_scale", &[0.0], ATTENTION),
    ("attention.q_lora_rank", &[0.0], ATTENTION),
    ("attention.kv_lora_rank", &[0.0], ATTENTION),
    ("attention.key_length_mla", &[0.0], ATTENTION),
    ("attention.value_length_mla", &[0.0], ATTENTION),
    ("attention.shared_kv_layers", &[0.0], ATTENTION),
    ("attention.recurrent_layers", &[0.0], LAYERS),
    ("attention.rope_pattern", &[1.0], POSITIONS),
    ("rope.dimension_sections", &[0.0], POSITIONS),
    ("rope.scaling.alpha", &[0.0, 1.0], POSITIONS),
    // What llama.cpp infers from the type of the scaling, written out.
    ("rope.scaling.yarn_ext_factor", &[1.0, -1.0], POSITIONS),
    ("rope.scaling.yarn_log_multiplier", &[0.0], POSITIONS),
    ("use_parallel_residual", &[0.0], LAYERS),
    ("swin_norm", &[0.0], LAYERS),
    ("swiglu_clamp_exp", &[0.0], LAYERS),
    ("swiglu_clamp_shexp", &[0.0], LAYERS),
    ("full_attention_interval", &[0.0, 1.0], LAYERS),
    ("nextn_predict_layers", &[0.0], "layers that predict further tokens are not supported"),
    ("embedding_length_per_layer_input", &[0.0], LAYERS),
    ("num_loops", &[0.0, 1.0], LAYERS),
    ("hyper_connection.count", &[0.0, 1.0], LAYERS),
];

/// Values that the layers with a sliding window have to share with the others.
pub(super) struct Shared {
    pub(super) head_dim: usize,
    pub(super) rotary_dim: usize,
    /// `None` where those layers have a base of their own, or where there are none.
    pub(super) theta: Option<f64>,
}

/// Refuses a file with a key that is not acted on.
pub(super) fn refuse_unsupported(
    gguf: &GgufFile,
    architecture: &str,
    activation: Activation,
    shared: &Shared,
) -> Result<()> {
    let refuse = |key: &str, reason: &str| {
        Err(Error::Unsupported {
            what: "GGUF key",
            value: format!("{architecture}.{key} = {}", shorten(&gguf.shown(&format!("{architecture}.{key}")))),
            hint: format!("in {}; {reason}", gguf.path().display()),
        })
    };
    let has = |key: &str, harmless: &dyn Fn(f64) -> bool| {
        let key = format!("{architecture}.{key}");
        gguf.contains(&key) && !gguf.numbers(&key).is_some_and(|values| values.into_iter().all(harmless))
    };
    for (key, harmless, reason) in UNSUPPORTED {
        if has(key, &|value| harmless.contains(&value)) {
            return refuse(key, reason);
        }
    }
    let Shared { head_dim, rotary_dim, theta } = *shared;
    for (key, full) in [
        ("attention.key_length_swa", Some(head_dim as f64)),
        ("attention.value_length_swa", Some(head_dim as f64)),
        ("rope.dimension_count_swa", Some(rotary_dim as f64)),
        ("rope.freq_base_swa", theta),
    ] {
        if let Some(full) = full
            && has(key, &|value| value == full)
        {
            return refuse(key, &format!("layers with a sliding window share the others' value, which is {full}"));
        }
    }
    // llama.cpp gives OLMo 3, which is OLMo 2 with windows, the same name.
    if architecture == "olmo2" && has("attention.sliding_window", &|window| window == 0.0) {
        return refuse("attention.sliding_window", "OLMo models with a sliding window (OLMo 3) are not supported");
    }
    let key = format!("{architecture}.hidden_activation");
    if gguf.contains(&key) && gguf.get_str(&key)?.and_then(Activation::from_name) != Some(activation) {
        return refuse("hidden_activation", &format!("this architecture's is {activation:?}"));
    }
    Ok(())
}

/// Refuses files that hold something else than a model's weights, and says what they are.
pub(super) fn refuse_other_kinds(gguf: &GgufFile) -> Result<()> {
    let text = |key: &str| gguf.get_str(key).ok().flatten();
    let kind = text("general.type").unwrap_or_default();
    let architecture = text("general.architecture").unwrap_or_default();
    let hint = if kind == "adapter" || gguf.contains("adapter.type") {
        "an adapter changes a model and is none: merge it into its base model (`llama-export-lora`) and give the merged \
         file"
    } else if kind == "mmproj" || architecture == "clip" {
        "it holds a projector for images or sounds: give the file of the language model beside it"
    } else if kind == "imatrix" {
        "it holds an importance matrix, a tool for quantising: give the file of the model"
    } else if architecture == "controlvector" {
        "it holds a control vector, which changes a model: give the file of the model"
    } else if gguf.tensor_infos().next().is_none() && gguf.contains("tokenizer.ggml.model") {
        "it holds a vocabulary and no weights: give the file of the whole model"
    } else if gguf.tensor_infos().next().is_none() {
        "it holds no tensors: give the file of the whole model"
    } else {
        return Ok(());
    };
    let path = gguf.path().display().to_string();
    Err(Error::Unsupported { what: "kind of GGUF file", value: path, hint: hint.to_string() })
}
