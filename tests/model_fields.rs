//! What a model's files say beside its sizes: fields and keys that change results are obeyed or refused by name, those
//! that change nothing are passed over, and files that are something else than models are named as what they are.

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use candle_core::Tensor;
use candle_core::quantized::gguf_file::Value as Meta;
use candle_pipeline::model::config::{DecoderConfig, LayerRope, RopeScaling};
use candle_pipeline::{DeviceSpec, HeterogeneousPipeline, PipelineOptions, Result, Tokenizer};
use common::models::{Model, gguf, vector};
use serde_json::{Value, json};

fn open(model: &Path) -> Result<HeterogeneousPipeline> {
    HeterogeneousPipeline::new(&DeviceSpec::parse_list("cpu")?, model.to_str().unwrap())
}

fn config(model: &Path) -> DecoderConfig {
    (**open(model).unwrap().config()).clone()
}

/// The message with which a model is refused. It has one line and names the file and all of `words`.
fn refusal(model: &Path, file: &Path, words: &[&str]) -> String {
    let message = match open(model) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("{} was accepted: {words:?}", file.display()),
    };
    for word in words.iter().copied().chain(file.to_str()) {
        assert!(message.contains(word), "`{word}` is not in: {message}");
    }
    assert!(message.len() < 1000 && !message.contains('\n'), "{message}");
    message
}

/// A fixture's GGUF file with further keys. A key without its architecture begins with a dot.
fn with_keys(fixture: &str, keys: &[(&str, Meta)]) -> (tempfile::TempDir, std::path::PathBuf) {
    gguf(fixture, |metadata, _| {
        let architecture = metadata["general.architecture"].to_string().unwrap().clone();
        for (key, value) in keys {
            let key = if key.starts_with('.') { format!("{architecture}{key}") } else { key.to_string() };
            metadata.insert(key, value.clone());
        }
    })
}

fn text(text: &str) -> Meta {
    Meta::String(text.to_string())
}

// ---- GGUF keys ------------------------------------------------------------------------------------------------------

#[test]
fn the_old_name_of_linear_scaling_counts_as_in_llama_cpp() {
    use Meta::F32;
    let scaling = |keys: &[(&str, Meta)]| {
        let (_folder, path) = with_keys("llama", keys);
        let config = config(&path);
        (config.rope.scaling, config.max_position_embeddings)
    };
    let (plain, context) = scaling(&[]);
    assert_eq!(plain, RopeScaling::Default);
    let linear = |factor: f64| (RopeScaling::Linear { factor }, context * factor as usize);
    let kind = |kind: &str| (".rope.scaling.type", text(kind));
    let (factor, old) = (|factor| (".rope.scaling.factor", F32(factor)), |factor| (".rope.scale_linear", F32(factor)));
    assert_eq!(scaling(&[kind("linear"), factor(2.0)]), linear(2.0));
    assert_eq!(scaling(&[old(2.0)]), linear(2.0));
    assert_eq!(scaling(&[old(2.0), kind("linear")]), linear(2.0));
    // The new key hides the old one, even with the 0 that stands for none.
    assert_eq!(scaling(&[old(2.0), factor(4.0)]), linear(4.0));
    assert_eq!(scaling(&[old(2.0), factor(0.0)]).0, RopeScaling::Default);
    assert_eq!(scaling(&[old(2.0), kind("none")]).0, RopeScaling::Default);
    assert_eq!(scaling(&[old(0.0)]).0, RopeScaling::Default);
    assert_eq!(scaling(&[kind("linear")]).0, RopeScaling::Default);
    assert!(matches!(scaling(&[old(2.0), kind("yarn")]).0, RopeScaling::Yarn { factor: 2.0, .. }));
    for wrong in [-2.0, f32::NAN, f32::INFINITY] {
        let (_folder, path) = with_keys("llama", &[old(wrong)]);
        refusal(&path, &path, &["`llama.rope.scale_linear`", "above 0"]);
    }
}

#[tokio::test]
async fn the_old_name_of_linear_scaling_gives_the_tokens_of_the_new_one() {
    let mut found = Vec::new();
    for keys in [vec![(".rope.scale_linear", Meta::F32(4.0))], vec![(".rope.scaling.factor", Meta::F32(4.0))], vec![]] {
        let (_folder, path) = with_keys("llama", &keys);
        let executor = common::executor(path.to_str().unwrap(), "cpu", None).await.unwrap();
        let prompt: Vec<u32> = (1..25).collect();
        found.push(common::bits(&executor.infer_with(&prompt, &common::greedy(4)).await.unwrap()));
    }
    assert!(found[0] == found[1] && found[0].1 != found[2].1);
}

#[test]
fn a_factor_beside_tables_of_divisors_divides_too() {
    let divisors = [1.0, 1.5, 2.0, 4.0];
    let with = |tables: &[&str], keys: &[(&str, Meta)]| {
        gguf("llama", |metadata, tensors| {
            metadata.extend(keys.iter().map(|(key, value)| (format!("llama{key}"), value.clone())));
            tensors.extend(tables.iter().map(|name| (name.to_string(), vector(&divisors))));
        })
    };
    let (_folder, path) = with(&["rope_freqs.weight"], &[(".rope.scale_linear", Meta::F32(2.0))]);
    assert_eq!(config(&path).rope.scaling, RopeScaling::Divided { factors: vec![2.0, 3.0, 4.0, 8.0] });
    let yarn = [(".rope.scaling.type", text("yarn")), (".rope.scaling.factor", Meta::F32(2.0))];
    let (_folder, path) = with(&["rope_freqs.weight"], &yarn);
    refusal(&path, &path, &["yarn", "`llama.rope.scaling.type`", "table of RoPE factors"]);
    for (there, missing) in [("long", "short"), ("short", "long")] {
        let (_folder, path) = with(&[&format!("rope_factors_{there}.weight")], &[]);
        refusal(&path, &path, &[&format!("`rope_factors_{missing}.weight`"), "is missing"]);
    }
    let (_folder, path) = with_keys("llama", &[(".rope.scaling.attn_factor", Meta::F32(1.5))]);
    refusal(&path, &path, &["`llama.rope.scaling.attn_factor` is 1.5", "yarn and longrope"]);
    let (_folder, path) = with_keys("llama-yarn", &[(".rope.scaling.yarn_attn_factor", Meta::F32(1.5))]);
    refusal(&path, &path, &["`llama.rope.scaling.yarn_attn_factor` is 1.5", "1.13"]);
}

#[test]
fn keys_that_are_not_acted_on_are_refused_by_name() {
    use Meta::{Array, Bool, F32, I32, U32};
    for (fixture, key, value, words) in [
        ("llama", "attention.causal", Bool(false), ["= 0", "does not generate"]),
        ("qwen2", "attention.clamp_kqv", F32(8.0), ["= 8", "clamped"]),
        ("llama", "attention.max_alibi_bias", F32(8.0), ["= 8", "not supported"]),
        ("qwen3", "attention.temperature_scale", F32(0.1), ["= 0.1", "not supported"]),
        ("llama", "attention.key_length_swa", U32(4), ["= 4", "which is 8"]),
        ("llama", "rope.dimension_count_swa", U32(4), ["= 4", "which is 8"]),
        ("gemma2", "rope.freq_base_swa", F32(5e5), ["= 500000", "which is 10000"]),
        ("qwen2", "rope.dimension_sections", Array(vec![I32(1), I32(1), I32(2), I32(0)]), ["[1, 1, 2, 0]", "position"]),
        ("llama-yarn", "rope.scaling.yarn_log_multiplier", F32(0.7), ["= 0.7", "not supported"]),
        ("llama-yarn", "rope.scaling.yarn_ext_factor", F32(0.5), ["= 0.5", "not supported"]),
        ("llama", "use_parallel_residual", Bool(true), ["= 1", "not supported"]),
        ("llama", "expert_used_count", U32(2), ["= 2", "mixture-of-experts"]),
        ("granite", "expert_shared_feed_forward_length", U32(64), ["= 64", "mixture-of-experts"]),
        ("qwen3", "nextn_predict_layers", U32(1), ["= 1", "not supported"]),
        ("llama", "swiglu_clamp_exp", Array(vec![F32(0.0), F32(7.0), F32(0.0)]), ["[0, 7, 0]", "not supported"]),
        ("olmo2", "attention.sliding_window", U32(16), ["= 16", "OLMo 3"]),
        ("llama", "hidden_activation", text("gelu"), ["\"gelu\"", "Silu"]),
        ("llama", "attention.causal", text("no"), ["\"no\"", "does not generate"]),
    ] {
        let (_folder, path) = with_keys(fixture, &[(&format!(".{key}"), value)]);
        let architecture = if fixture == "llama-yarn" { "llama" } else { fixture };
        refusal(&path, &path, &[&[&format!("`{architecture}.{key} = ")[..]], &words[..]].concat());
    }
}

#[test]
fn keys_that_change_nothing_are_passed_over() {
    use Meta::{Array, Bool, F32, I32, U32};
    // What llama.cpp itself saves beside a Llama model, and what no program knows.
    let keys = [
        (".attention.causal", Bool(true)),
        (".attention.clamp_kqv", F32(0.0)),
        (".attention.max_alibi_bias", F32(0.0)),
        (".attention.key_length_swa", U32(8)),
        (".attention.value_length_swa", U32(8)),
        (".attention.scale", F32(0.0)),
        (".attention.output_scale", F32(0.0)),
        (".attention.temperature_scale", F32(0.0)),
        (".attention.rope_pattern", U32(1)),
        (".attention.recurrent_layers", Array(vec![U32(0); 3])),
        (".attention.sliding_window", U32(4096)),
        (".attn_logit_softcapping", F32(50.0)),
        (".final_logit_softcapping", F32(30.0)),
        (".expert_count", U32(0)),
        (".expert_used_count", Array(vec![U32(0); 3])),
        (".hidden_activation", text("silu")),
        (".logit_scale", F32(0.0)),
        (".rope.dimension_count_swa", U32(8)),
        (".rope.dimension_sections", Array(vec![I32(0); 4])),
        (".rope.freq_base_swa", F32(12345.0)),
        (".rope.scaling.type", text("linear")),
        (".rope.scaling.factor", F32(0.0)),
        (".rope.scaling.attn_factor", F32(1.0)),
        (".rope.scaling.finetuned", Bool(false)),
        (".rope.scaling.yarn_ext_factor", F32(-1.0)),
        (".rope.scaling.yarn_attn_factor", F32(1.0)),
        (".rope.scaling.yarn_log_multiplier", F32(0.0)),
        (".swiglu_clamp_exp", Array(vec![F32(0.0); 3])),
        (".use_parallel_residual", Bool(false)),
        (".tensor_data_layout", text("Meta AI original pth")),
        (".some.key.of.tomorrow", F32(f32::NAN)),
        ("general.type", text("model")),
    ];
    let (_folder, path) = with_keys("llama", &keys);
    let (_plain_folder, plain) = with_keys("llama", &[]);
    assert_eq!(config(&path), config(&plain));
}

#[test]
fn arrays_of_equal_sizes_are_sizes() {
    use Meta::{Array, I32, U32};
    let (_folder, path) = with_keys("llama", &[]);
    let plain = config(&path);
    let array = |size: usize| Array(vec![U32(size as u32); 3]);
    let keys = [
        (".attention.head_count", array(plain.num_attention_heads)),
        (".attention.head_count_kv", Array(vec![I32(plain.num_key_value_heads as i32); 3])),
        (".feed_forward_length", array(plain.intermediate_size)),
    ];
    let (_folder, path) = with_keys("llama", &keys);
    assert_eq!(config(&path), plain);
    for (key, size) in [("attention.head_count", 4), ("attention.head_count_kv", 2), ("feed_forward_length", 48)] {
        let key = format!("llama.{key}");
        for (sizes, words) in [
            (vec![size, size, 2 * size], ["differ in size", &format!("{key} = [{size}, {size}, {}]", 2 * size)]),
            (vec![size; 4], ["4 numbers for 3 layers", &key]),
            (vec![], ["0 numbers for 3 layers", &key]),
        ] {
            let (_folder, path) = with_keys("llama", &[(&key, Array(sizes.into_iter().map(U32).collect()))]);
            refusal(&path, &path, &words);
        }
    }
}

#[test]
fn sliding_layers_are_those_that_llama_cpp_takes() {
    use Meta::{Array, Bool, U32};
    let sliding = |pattern: Meta| {
        let (_folder, path) = with_keys("gemma2", &[(".attention.sliding_window_pattern", pattern)]);
        config(&path).layers.iter().map(|layer| u8::from(layer.sliding_window.is_some())).collect::<Vec<_>>()
    };
    assert_eq!(sliding(U32(2)), [1, 0, 1, 0]);
    assert_eq!(sliding(U32(1)), [0, 0, 0, 0]);
    assert_eq!(sliding(U32(0)), [1, 1, 1, 1]);
    assert_eq!(sliding(Array([false, true, true, false].map(Bool).to_vec())), [0, 1, 1, 0]);
    assert_eq!(sliding(Array([1, 0, 0, 1].map(U32).to_vec())), [1, 0, 0, 1]);
}

#[test]
fn granite_without_rope_has_none() {
    for (finetuned, rope) in [(true, LayerRope::Global), (false, LayerRope::None)] {
        let (_folder, path) = with_keys("granite", &[(".rope.scaling.finetuned", Meta::Bool(finetuned))]);
        assert!(config(&path).layers.iter().all(|layer| layer.rope == rope), "{finetuned}");
    }
}

// ---- config.json and generation_config.json -------------------------------------------------------------------------

#[test]
fn end_tokens_of_a_wrapper_are_those_of_transformers() {
    let absent = || Value::String("absent".into());
    for (file, outer, inner, expected) in [
        (absent(), json!([1, 39]), json!(1), &[1, 39][..]),
        (absent(), json!(39), json!(1), &[39]),
        (absent(), Value::Null, json!(1), &[1]),
        (absent(), absent(), json!([2, 3]), &[2, 3]),
        (absent(), json!([]), json!(1), &[]),
        (absent(), json!(39), absent(), &[39]),
        (absent(), absent(), absent(), &[1]),
        (absent(), json!(-1), json!(2), &[]),
        (json!([7, 8]), json!(39), json!(1), &[7, 8]),
        (Value::Null, json!(39), json!(1), &[39]),
    ] {
        let model = Model::of("gemma3-conditional");
        let some = |value: &Value| Some(value.clone()).filter(|value| *value != absent());
        model.set("/eos_token_id", some(&outer));
        model.set("/text_config/eos_token_id", some(&inner));
        match some(&file) {
            Some(eos) => model.write("generation_config.json", json!({ "eos_token_id": eos }).to_string()),
            None => std::fs::remove_file(model.path("generation_config.json")).unwrap(),
        }
        assert_eq!(config(model.dir()).eos_token_ids, expected, "{file} {outer} {inner}");
    }
}

#[test]
fn only_a_wrapper_has_a_model_within() {
    let model = Model::of("llama");
    model.set("/text_config", Some(json!({"hidden_size": 7, "eos_token_id": 9})));
    assert_eq!((config(model.dir()).hidden_size, config(model.dir()).eos_token_ids), (32, vec![2]));
    let model = Model::of("gemma3-conditional");
    model.set("/text_config/model_type", Some(json!("gemma3n_text")));
    refusal(model.dir(), &model.path("config.json"), &["text model `gemma3n_text`", "gemma3_text"]);
}

#[test]
fn numbers_that_are_not_finite_matter_where_they_are_used() {
    let numbers = r#""a": NaN, "b": [Infinity, {"c": -Infinity}], "d": 1e999, "e": "NaN", "f": "\ud800", "#;
    for name in ["config.json", "generation_config.json"] {
        let model = Model::of("llama");
        let text = std::fs::read_to_string(model.path(name)).unwrap();
        model.write(name, text.replacen('{', &format!("{{{numbers}"), 1));
        assert_eq!(config(model.dir()), config(Model::of("llama").dir()), "{name}");
    }
    for (field, wrong) in [("rms_norm_eps", "NaN"), ("rope_theta", "Infinity"), ("hidden_size", "-Infinity")] {
        let model = Model::of("llama");
        model.set(&format!("/{field}"), None);
        let text = std::fs::read_to_string(model.path("config.json")).unwrap();
        model.write("config.json", text.replacen('{', &format!("{{\"{field}\": {wrong}, "), 1));
        refusal(model.dir(), &model.path("config.json"), &[&format!("`{field}` is"), wrong, "expected a"]);
    }
}

#[test]
fn a_tokenizer_config_may_hold_numbers_that_are_not_finite() {
    let folder = tempfile::tempdir().unwrap();
    let demo = Path::new(candle_pipeline::DEMO_MODEL);
    std::fs::copy(demo.join("tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    let config = std::fs::read_to_string(demo.join("tokenizer_config.json")).unwrap();
    let config = config.replacen('{', "{\"a\": NaN, \"model_max_length\": 1000000000000000019884624838656, ", 1);
    std::fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
    let [found, plain] = [folder.path(), demo].map(|dir| Tokenizer::from_hf_dir(dir).unwrap().unwrap());
    assert_eq!((found.bos_token_id(), found.eos_token_id()), (plain.bos_token_id(), plain.eos_token_id()));
    assert!(found.bos_token_id().is_some() && found.has_chat_template() == plain.has_chat_template());
}

#[test]
fn token_ids_that_no_vocabulary_has_are_left_out() {
    let model = Model::of("llama");
    for (eos, expected) in
        [(json!([2, -1]), vec![2]), (json!(-1), vec![]), (json!([4294967296u64, 5, u64::MAX]), vec![5])]
    {
        model.set("/eos_token_id", Some(eos.clone()));
        std::fs::write(model.path("generation_config.json"), "{}").unwrap();
        assert_eq!(config(model.dir()).eos_token_ids, expected, "{eos}");
    }
}

#[test]
fn fields_that_a_family_does_not_read_may_hold_anything() {
    for (fixture, fields) in [
        (
            "llama",
            &["sliding_window", "max_window_layers", "use_sliding_window", "no_rope_layers", "rope_local_base_freq"][..],
        ),
        (
            "llama",
            &["query_pre_attn_scalar", "final_logit_softcapping", "residual_multiplier", "sliding_window_pattern"],
        ),
        ("qwen2", &["sliding_window", "attention_bias", "mlp_bias", "no_rope_layer_interval", "partial_rotary_factor"]),
        ("mistral", &["attention_bias", "mlp_bias", "max_window_layers"]),
        ("phi3", &["attention_bias", "mlp_bias"]),
    ] {
        let plain = config(Model::of(fixture).dir());
        for field in fields {
            for value in [json!("many"), json!(-1), json!([[]]), json!(true)] {
                let model = Model::of(fixture);
                model.set(&format!("/{field}"), Some(value.clone()));
                assert_eq!(config(model.dir()), plain, "{fixture} {field} {value}");
            }
        }
    }
}

#[test]
fn fields_that_are_not_acted_on_are_refused_by_name() {
    for (fixture, pointer, value, words) in [
        ("gemma2", "/use_bidirectional_attention", json!(true), &["use_bidirectional_attention", "embeddings"][..]),
        ("llama", "/is_causal", json!(false), &["is_causal", "embeddings"]),
        ("llama", "/rope_parameters/sliding_attention", json!({"rope_theta": 5.0}), &["`sliding_attention`", "Llama"]),
        ("qwen2", "/rope_parameters/full_attention", json!({"rope_theta": 5.0}), &["`full_attention`", "Qwen2"]),
    ] {
        let model = Model::of(fixture);
        model.set(pointer, Some(value));
        refusal(model.dir(), &model.path("config.json"), words);
    }
    for (field, value) in [
        ("forced_bos_token_id", json!(5)),
        ("forced_eos_token_id", json!([5])),
        ("sequence_bias", json!([[[5], -10.0]])),
        ("force_words_ids", json!([[5]])),
        ("exponential_decay_length_penalty", json!([10, 1.5])),
        ("bad_words_ids", json!([[5, 6]])),
    ] {
        let model = Model::of("llama");
        model.write("generation_config.json", json!({ field: value }).to_string());
        refusal(
            model.dir(),
            &model.path("generation_config.json"),
            &[&format!("`{field} = {value}`"), "suppress_tokens"],
        );
        // Without that file, older ones have the field in config.json.
        std::fs::remove_file(model.path("generation_config.json")).unwrap();
        model.set(&format!("/{field}"), Some(value));
        refusal(model.dir(), &model.path("config.json"), &[field]);
        for nothing in [Value::Null, json!([])] {
            model.set(&format!("/{field}"), Some(nothing));
            open(model.dir()).unwrap();
        }
    }
}

#[tokio::test]
async fn suppressed_tokens_are_not_generated() {
    let tokens = async |model: &Path| {
        let executor = common::executor(model.to_str().unwrap(), "cpu", None).await.unwrap();
        executor.infer_with(&[1, 2, 3], &common::greedy(12)).await.unwrap().tokens
    };
    let model = Model::of("llama");
    let free = tokens(model.dir()).await;
    let (first, ids) = (free[0], |value: Value| value.to_string());
    model.write("generation_config.json", ids(json!({"suppress_tokens": [first, 100_000, -1]})));
    let suppressed = tokens(model.dir()).await;
    assert!(!suppressed.contains(&first) && suppressed.len() == 12, "{free:?} {suppressed:?}");
    // A word of a single token is suppressed in the same way, but not where it ends a generation.
    model.write("generation_config.json", ids(json!({"bad_words_ids": [[first]]})));
    assert_eq!(tokens(model.dir()).await, suppressed);
    model.write("generation_config.json", ids(json!({"bad_words_ids": [[first]], "eos_token_id": first})));
    assert_eq!(tokens(model.dir()).await, free);
    model.write("generation_config.json", ids(json!({"begin_suppress_tokens": [first]})));
    assert_eq!(tokens(model.dir()).await[0], suppressed[0]);
    let array = Meta::Array(vec![Meta::I32(first as i32), Meta::I32(-1), Meta::I32(1 << 30)]);
    let (_folder, path) = with_keys("llama", &[("tokenizer.ggml.suppress_tokens", array)]);
    let found = tokens(&path).await;
    assert!(!found.contains(&first) && found[0] == suppressed[0], "{found:?}");
}

// ---- files that are something else ----------------------------------------------------------------------------------

#[test]
fn gguf_files_that_are_no_models_are_named() {
    let tokens = || ("tokenizer.ggml.model", text("gpt2"));
    for (keys, keeps_tensors, words) in [
        (vec![("general.type", text("adapter"))], true, "merge it into its base model (`llama-export-lora`)"),
        (vec![("adapter.type", text("lora"))], true, "merge it into its base model"),
        (vec![("general.type", text("mmproj"))], true, "projector"),
        (vec![("general.architecture", text("clip"))], true, "projector"),
        (vec![("general.type", text("imatrix"))], true, "importance matrix"),
        (vec![("general.architecture", text("controlvector"))], true, "control vector"),
        (vec![tokens()], false, "a vocabulary and no weights"),
        (vec![("general.name", text("empty"))], false, "no tensors"),
    ] {
        let (_folder, path) = gguf("llama", |metadata, tensors| {
            metadata.remove("tokenizer.ggml.model");
            metadata.extend(keys.iter().map(|(key, value)| (key.to_string(), value.clone())));
            if !keeps_tensors {
                tensors.clear();
            }
        });
        refusal(&path, &path, &["unsupported kind of GGUF file", words]);
    }
}

#[test]
fn folders_of_adapters_are_named() {
    let model = Model::of("llama");
    let merge = "merge_and_unload()";
    std::fs::rename(model.path("model.safetensors"), model.path("adapter_model.safetensors")).unwrap();
    model.write("adapter_config.json", "{}");
    refusal(model.dir(), model.dir(), &["an adapter", merge]);
    std::fs::remove_file(model.path("config.json")).unwrap();
    refusal(model.dir(), model.dir(), &["an adapter", merge]);
    let file = model.path("adapter_model.safetensors");
    refusal(&file, &file, &["an adapter", merge]);
}

#[test]
fn weights_in_f64_are_to_be_converted() {
    let model = Model::of("llama");
    model.change(|tensors| {
        let name = "model.layers.0.mlp.down_proj.weight";
        let wide: Tensor = tensors[name].to_dtype(candle_core::DType::F64).unwrap();
        tensors.insert(name.into(), wide);
    });
    let message = refusal(model.dir(), &model.path("model.safetensors"), &["F64", "down_proj", "dtype=\"bfloat16\""]);
    assert!(!message.contains("not quantised"), "{message}");
}

#[tokio::test]
async fn an_index_may_name_tensors_that_no_file_holds() {
    let model = Model::of("llama");
    std::fs::rename(model.path("model.safetensors"), model.path("a.safetensors")).unwrap();
    let down = "model.layers.1.mlp.down_proj.weight";
    let path = model.path("a.safetensors");
    let mut tensors = candle_core::safetensors::load(&path, &candle_core::Device::Cpu).unwrap();
    let moved = std::collections::HashMap::from([(down.to_string(), tensors.remove(down).unwrap())]);
    candle_core::safetensors::save(&tensors, &path).unwrap();
    candle_core::safetensors::save(&moved, model.path("b.safetensors")).unwrap();
    // The tensors stand in the wrong file, and a tower that nothing asks for in none.
    let names = tensors.keys().map(|name| (name.clone(), json!("b.safetensors")));
    let mut weight_map: serde_json::Map<String, Value> = names.collect();
    weight_map.insert(down.into(), json!("a.safetensors"));
    weight_map.insert("vision_tower.weight".into(), json!("a.safetensors"));
    let index = model.path("model.safetensors.index.json");
    let text =
        json!({ "weight_map": weight_map }).to_string().replacen('{', "{\"metadata\": {\"total_size\": NaN}, ", 1);
    std::fs::write(&index, &text).unwrap();
    let load = async || common::executor(model.dir().to_str().unwrap(), "cpu", None).await.map(drop);
    load().await.unwrap();
    // One that is asked for is missed then.
    tensors.remove("model.norm.weight");
    candle_core::safetensors::save(&tensors, &path).unwrap();
    let message = load().await.unwrap_err().to_string();
    assert!(message.contains("index.json: tensor `model.norm.weight`: is missing"), "{message}");
    std::fs::remove_file(model.path("b.safetensors")).unwrap();
    refusal(model.dir(), &model.path("b.safetensors"), &["cannot be read"]);
}

#[cfg(unix)]
#[test]
fn pipes_and_devices_in_place_of_files_are_refused_at_once() {
    let fifo = |path: &Path| assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success());
    let zeros = |path: &Path| std::os::unix::fs::symlink("/dev/zero", path).unwrap();
    let began = Instant::now();
    for make in [&fifo as &dyn Fn(&Path), &zeros] {
        for name in ["config.json", "generation_config.json", "model.safetensors"] {
            let model = Model::of("llama");
            std::fs::remove_file(model.path(name)).unwrap();
            make(&model.path(name));
            refusal(model.dir(), &model.path(name), &["not a regular file"]);
        }
        let model = Model::of("llama");
        for name in ["model.safetensors.index.json", "shard.safetensors"] {
            let _ = std::fs::remove_file(model.path("model.safetensors"));
            make(&model.path(name));
            refusal(model.dir(), &model.path(name), &["not a regular file"]);
            std::fs::remove_file(model.path(name)).unwrap();
            model.write("model.safetensors.index.json", r#"{"weight_map": {"a": "shard.safetensors"}}"#);
        }
        for name in ["model.gguf", "blob"] {
            make(&model.path(name));
            let path = model.path(name);
            let message = open(&path).unwrap_err().to_string();
            assert!(message.contains("not a regular file") || message.contains("is not a model"), "{message}");
            let message = Tokenizer::from_gguf(&path).unwrap_err().to_string();
            assert!(message.contains("not a regular file"), "{message}");
        }
        make(&model.path("tokenizer.json"));
        let message = Tokenizer::from_hf_dir(model.dir()).unwrap_err().to_string();
        assert!(message.contains("tokenizer.json") && message.contains("not a regular file"), "{message}");
    }
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
}

#[test]
fn escapes_and_long_texts_of_files_do_not_reach_the_terminal() {
    let escape = "\u{1b}]0;title\u{7}\u{9b}2J\r\n";
    for long in ["", &"x".repeat(100_000)] {
        let name = format!("{escape}{long}");
        for (pointer, value) in [
            ("/model_type", json!(name)),
            ("/hidden_act", json!(name)),
            ("/hidden_size", json!(name)),
            ("/layer_types", json!([name])),
            ("/quantization_config", json!({ "quant_method": name })),
        ] {
            let model = Model::of("qwen2");
            model.set(pointer, Some(value));
            let message = refusal(model.dir(), &model.path("config.json"), &[]);
            assert!(!message.chars().any(char::is_control), "{message:?}");
        }
        let model = Model::of("llama");
        let entry = json!({ &name: {"dtype": &name, "shape": [1], "data_offsets": [4, 8]} }).to_string();
        model.write("model.safetensors", [&(entry.len() as u64).to_le_bytes()[..], entry.as_bytes()].concat());
        let message = refusal(model.dir(), &model.path("model.safetensors"), &["\\u{1b}]0;title"]);
        assert!(!message.chars().any(char::is_control), "{message:?}");
        for (key, value) in [
            (name.as_str(), Meta::Array(vec![Meta::Array(vec![Meta::U8(0)])])),
            ("general.architecture", text(&name)),
            (".rope.scaling.type", text(&name)),
        ] {
            let (_folder, path) = with_keys("llama", &[(key, value)]);
            let message = refusal(&path, &path, &["\\u{1b}]0;title"]);
            assert!(!message.chars().any(char::is_control), "{message:?}");
        }
    }
}

// ---- plans ----------------------------------------------------------------------------------------------------------

#[test]
fn a_context_whose_kv_no_stage_has_room_for_is_refused() {
    // Dynamic RoPE has no end of its own.
    let model = common::fixture("families").join("llama-dynamic-rope");
    let plan = |options: PipelineOptions| {
        HeterogeneousPipeline::with_options(&DeviceSpec::parse_list("cpu").unwrap(), model.to_str().unwrap(), options)
    };
    let with = |context_length| PipelineOptions { context_length: Some(context_length), ..PipelineOptions::default() };
    for context_length in [1 << 34, 1 << 40, usize::MAX] {
        let message = plan(with(context_length)).unwrap_err().to_string();
        let words = ["does not fit", "`context_length` is", &context_length.to_string(), "a context of"];
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
    }
    assert_eq!(plan(with(1 << 16)).unwrap().context_length(), 1 << 16);
    // Positions for all sequences together may be fewer than one sequence could have.
    plan(PipelineOptions { kv_positions: Some(1000), ..with(1 << 40) }).unwrap();
}
