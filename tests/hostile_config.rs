//! Configs and metadata that lie: fields that are missing, of the wrong type, or say something impossible, and tensors
//! that do not fit them. Each is refused with an error that names the file, the field and the value. Nothing panics,
//! hangs, or allocates what a lie asks for.

// The counting allocator below hands every call on to the system's.
#![allow(unsafe_code)]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use candle_core::quantized::gguf_file::Value as Meta;
use candle_core::{DType, Tensor};
use candle_pipeline::{DeviceSpec, Error, HeterogeneousPipeline, Result};
use common::models::{Model, gguf, vector};
use proptest::prelude::*;
use proptest::sample::select;
use serde_json::{Value, json};

struct Counting;

/// Bytes that the process holds, and the most that it has held.
static HELD: AtomicUsize = AtomicUsize::new(0);
static MOST_HELD: AtomicUsize = AtomicUsize::new(0);

// SAFETY: Every call goes to the system's allocator unchanged; counting touches atomics only.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = HELD.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        MOST_HELD.fetch_max(held, Ordering::Relaxed);
        // SAFETY: the caller's obligations are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's obligations are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Above what all tests here need side by side, far below what the lies ask for.
const MOST_BYTES: usize = 512 << 20;
/// Far above what a model of a few kilobytes takes on a busy machine.
const LONGEST: Duration = Duration::from_secs(60);

/// Does `work` and checks that it neither panics nor hangs nor allocates too much.
fn bounded<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let (done, result) = std::sync::mpsc::channel();
    std::thread::spawn(move || done.send(work()));
    let result = result.recv_timeout(LONGEST).unwrap_or_else(|error| panic!("panicked or hangs: {error}"));
    let most = MOST_HELD.load(Ordering::Relaxed);
    assert!(most < MOST_BYTES, "{most} bytes were held");
    if let Err(error @ (Error::StagePanicked { .. } | Error::Stopped)) = &result {
        panic!("panicked: {error}");
    }
    result
}

/// Opens a model, which reads headers only.
fn open(model: &Path) -> Result<()> {
    let model = model.to_str().unwrap().to_string();
    bounded(move || HeterogeneousPipeline::new(&DeviceSpec::parse_list("cpu,cpu")?, &model).map(drop))
}

/// Opens a model, loads it on the devices and generates two tokens.
fn run(model: &Path, devices: &'static str) -> Result<()> {
    let model = model.to_str().unwrap().to_string();
    bounded(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let executor = common::executor(&model, devices, None).await?;
            executor.infer(&[1, 2], 2, 0.0, 1.0).await.map(drop)
        })
    })
}

/// What is missing in an error message that should name the file and contain the words.
fn lacking(result: Result<()>, file: &Path, words: &[&str]) -> Option<String> {
    let Err(error) = result else { return Some(format!("{words:?} was accepted")) };
    let message = error.to_string();
    let lacks: Vec<&str> = words.iter().copied().chain(file.to_str()).filter(|word| !message.contains(word)).collect();
    if lacks.is_empty() && message.len() < 1000 {
        return None;
    }
    Some(format!("{lacks:?} not in {} characters: {message:.1000}", message.len()))
}

fn assert_refused(result: Result<()>, file: &Path, words: &[&str]) {
    assert_eq!(lacking(result, file, words), None);
}

// ---- config.json ----------------------------------------------------------------------------------------------------

/// Fixture, field, its values as JSON (nothing: the field is missing) and what else the message has to say. All
/// messages name file and field.
const LIES: &[(&str, &str, &[&str], &[&str])] = &[
    ("llama", "/model_type", &[""], &["missing"]),
    ("llama", "/model_type", &["7", "[]"], &["expected a text"]),
    ("llama", "/model_type", &["\"mamba\""], &["mamba", "supported are", "llama, mistral"]),
    ("llama", "/hidden_size", &[""], &["missing"]),
    ("llama", "/hidden_size", &["0"], &["is 0", "1..="]),
    ("llama", "/hidden_size", &["100000000"], &["is 100000000", "1..="]),
    ("llama", "/hidden_size", &["-1", "1e18", "32.5", "\"32\"", "[32]", "true", "{}"], &["expected a whole number"]),
    ("llama", "/hidden_size", &["-1"], &["-1"]),
    ("llama", "/vocab_size", &[""], &["missing"]),
    ("llama", "/vocab_size", &["0", "18446744073709551615"], &["1..="]),
    ("llama", "/intermediate_size", &[""], &["missing"]),
    ("llama", "/intermediate_size", &["0", "1e12"], &["1..="]),
    ("llama", "/num_hidden_layers", &[""], &["missing"]),
    ("llama", "/num_hidden_layers", &["0", "1000000000"], &["1..="]),
    ("llama", "/num_hidden_layers", &["\"3\"", "-3"], &["3", "expected a whole number"]),
    ("llama", "/num_attention_heads", &[""], &["missing"]),
    ("llama", "/num_attention_heads", &["0", "1000000000"], &["1..="]),
    ("llama", "/num_attention_heads", &["3"], &["3", "multiple", "`num_key_value_heads`"]),
    ("llama", "/num_key_value_heads", &["0", "1000000000"], &["1..="]),
    ("llama", "/num_key_value_heads", &["3"], &["3", "multiple", "`num_attention_heads`"]),
    ("llama", "/head_dim", &["0", "1000000000"], &["1..="]),
    ("llama", "/head_dim", &["7"], &["7", "even"]),
    ("llama", "/max_position_embeddings", &["0"], &["is 0"]),
    ("llama", "/max_position_embeddings", &["-1", "\"long\"", "{}"], &["expected a whole number"]),
    ("llama", "/rms_norm_eps", &["0", "-1.5"], &["above 0"]),
    ("llama", "/rms_norm_eps", &["\"1e-6\""], &["1e-6", "expected a number"]),
    ("llama", "/hidden_act", &["\"relu2\""], &["relu2", "supported are", "silu"]),
    ("llama", "/hidden_act", &["5"], &["expected a text"]),
    ("llama", "/tie_word_embeddings", &["1", "\"no\""], &["expected true or false"]),
    ("llama", "/attention_bias", &["0"], &["expected true or false"]),
    ("llama", "/mlp_bias", &["[]"], &["expected true or false"]),
    ("llama", "/eos_token_id", &["\"</s>\"", "[2, null]", "{}", "2.5", "true"], &["expected a token id"]),
    ("llama", "/quantization_config", &[r#"{"quant_method": "gptq"}"#], &["gptq", "GGUF"]),
    ("llama", "/quantization_config", &["{}", "4"], &["GGUF"]),
    ("llama", "/rope_parameters", &["\"yarn\"", "[]", "1"], &["expected an object"]),
    ("llama", "/rope_scaling", &["\"yarn\"", "[]", "1"], &["expected an object"]),
    ("llama", "/rope_parameters/rope_type", &["\"ntk\""], &["ntk", "supported are", "yarn"]),
    ("llama", "/rope_parameters/rope_type", &["5"], &["5", "expected a text"]),
    ("llama", "/rope_parameters/rope_theta", &["0", "-5"], &["above 0"]),
    ("llama", "/rope_parameters/rope_theta", &["\"NaN\""], &["NaN", "expected a number"]),
    ("llama-linear-rope", "/rope_parameters/factor", &[""], &["missing"]),
    ("llama-linear-rope", "/rope_parameters/factor", &["0", "-2"], &["above 0"]),
    ("llama-linear-rope", "/rope_parameters/factor", &["\"nan\"", "[2]"], &["expected a number"]),
    ("llama-dynamic-rope", "/rope_parameters/factor", &["0", "-2"], &["above 0"]),
    ("llama-dynamic-rope", "/max_position_embeddings", &["0"], &["is 0"]),
    ("llama3-rope", "/rope_parameters/factor", &["0", "-8"], &["above 0"]),
    ("llama3-rope", "/rope_parameters/low_freq_factor", &[""], &["missing"]),
    ("llama3-rope", "/rope_parameters/low_freq_factor", &["0", "-1"], &["above 0"]),
    ("llama3-rope", "/rope_parameters/high_freq_factor", &["0", "-1"], &["above 0"]),
    ("llama3-rope", "/rope_parameters/high_freq_factor", &["1", "0.5"], &["above `low_freq_factor`"]),
    ("llama3-rope", "/rope_parameters/original_max_position_embeddings", &["0"], &["is 0"]),
    ("llama3-rope", "/rope_parameters/original_max_position_embeddings", &["-1"], &["-1", "expected a whole number"]),
    ("llama-yarn", "/rope_parameters/factor", &["0", "-4"], &["above 0"]),
    ("llama-yarn", "/rope_parameters/beta_fast", &["-1"], &["above 0"]),
    ("llama-yarn", "/rope_parameters/beta_slow", &["-1"], &["above 0"]),
    ("llama-yarn", "/rope_parameters/original_max_position_embeddings", &["0"], &["is 0"]),
    ("llama-yarn", "/rope_parameters/truncate", &["1"], &["expected true or false"]),
    ("llama-yarn-attention-factor", "/rope_parameters/attention_factor", &["0", "-1"], &["above 0"]),
    ("phi3-longrope", "/rope_parameters/short_factor", &[""], &["missing"]),
    ("phi3-longrope", "/rope_parameters/long_factor", &["[]", "[1.5]", "[1, 1, 1, 1, 1]"], &["factors for 4"]),
    ("phi3-longrope", "/rope_parameters/short_factor", &["[]", "[1.5]", "[1, 1, 1, 1, 1]"], &["factors for 4"]),
    ("phi3-longrope", "/rope_parameters/long_factor", &["5", "[1, 2, 3, \"4\"]"], &["expected a list of numbers"]),
    ("phi3-longrope", "/rope_parameters/long_factor", &["[1, 1, 0, 1]", "[1, -2, 1, 1]"], &["above 0"]),
    ("phi3-longrope", "/original_max_position_embeddings", &["0"], &["is 0"]),
    ("phi3-longrope", "/original_max_position_embeddings", &["18446744073709551615"], &["18446744073709551615"]),
    (
        "phi3-partial-rotary",
        "/rope_parameters/partial_rotary_factor",
        &["0", "-1", "2"],
        &["expected a number above 0"],
    ),
    ("phi3-partial-rotary", "/rope_parameters/partial_rotary_factor", &["0.4"], &["3", "even"]),
    ("mistral-sliding", "/sliding_window", &["0"], &["is 0", "null"]),
    ("mistral-sliding", "/sliding_window", &["-1", "\"16\""], &["expected a whole number"]),
    ("qwen2-sliding", "/use_sliding_window", &["1"], &["expected true or false"]),
    ("gemma2", "/query_pre_attn_scalar", &["0", "-16"], &["above 0"]),
    ("gemma2", "/query_pre_attn_scalar", &["\"16\""], &["expected a number"]),
    ("gemma2", "/attn_logit_softcapping", &["0", "-5"], &["above 0"]),
    ("gemma2", "/final_logit_softcapping", &["0", "-5"], &["above 0"]),
    ("gemma2", "/sliding_window", &["0"], &["is 0", "null"]),
    ("gemma2", "/layer_types", &["\"full_attention\"", "{}"], &["expected a list"]),
    ("gemma2", "/layer_types", &["[]"], &["0 entries for 4 layers"]),
    ("gemma2", "/layer_types", &["[\"full_attention\", 3, 3, 3]"], &["3", "supported are", "sliding_attention"]),
    ("gemma2", "/layer_types", &["[\"mamba\", 1, 2, 3]"], &["mamba", "supported are", "sliding_attention"]),
    ("gemma3", "/rope_parameters/full_attention", &["5"], &["expected an object"]),
    ("gemma3", "/rope_parameters/sliding_attention/rope_theta", &["0"], &["above 0"]),
    ("gemma3-conditional", "/text_config", &["5", "[]"], &["expected an object"]),
    ("gemma3-conditional", "/text_config/hidden_size", &["0"], &["is 0", "1..="]),
    ("gemma3-conditional", "/quantization_config", &[r#"{"quant_method": "fp8"}"#], &["fp8", "GGUF"]),
    ("granite", "/attention_multiplier", &["0", "-1"], &["above 0"]),
    ("granite", "/embedding_multiplier", &["0", "-1"], &["above 0"]),
    ("granite", "/residual_multiplier", &["0", "-1"], &["above 0"]),
    ("granite", "/logits_scaling", &["0", "-1"], &["above 0"]),
    ("granite", "/logits_scaling", &["\"8\""], &["8", "expected a number"]),
    ("smollm3", "/no_rope_layers", &["\"none\"", "[\"1\"]"], &["expected a list of numbers"]),
    ("smollm3", "/no_rope_layer_interval", &["\"4\"", "-4"], &["4", "expected a whole number"]),
];

#[test]
fn every_lie_in_config_json_is_refused_by_file_and_field() {
    let mut wrong = Vec::new();
    for (fixture, pointer, values, words) in LIES {
        for text in *values {
            let model = Model::of(fixture);
            let value: Option<Value> = (!text.is_empty()).then(|| serde_json::from_str(text).unwrap());
            model.set(pointer, value.clone());
            let field = pointer.rsplit('/').next().unwrap();
            let mut words = [&[field], *words].concat();
            // Numbers are shown as they are.
            words.extend(value.filter(|value| value.is_i64()).map(|_| *text));
            let lacking = lacking(open(model.dir()), &model.path("config.json"), &words);
            wrong.extend(lacking.map(|lacking| format!("{fixture} {pointer} = {text}: {lacking}")));
        }
    }
    assert!(wrong.is_empty(), "{} of the messages:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn sizes_whose_products_overflow_are_refused() {
    let model = Model::of("llama");
    model.set("/max_position_embeddings", Some(json!(4096)));
    for field in ["/num_attention_heads", "/num_key_value_heads", "/head_dim"] {
        model.set(field, Some(json!(1 << 24)));
    }
    assert_refused(open(model.dir()), &model.path("config.json"), &["`head_dim`", "`num_attention_heads`", "16777216"]);
}

#[test]
fn null_and_whole_floats_stand_for_what_they_mean() {
    let model = Model::of("llama");
    for field in ["/quantization_config", "/text_config", "/rope_scaling", "/eos_token_id", "/hidden_act", "/head_dim"]
    {
        model.set(field, Some(Value::Null));
    }
    model.set("/hidden_size", Some(json!(32.0)));
    run(model.dir(), "cpu,cpu").unwrap();
}

#[test]
fn a_config_truncated_anywhere_is_refused_by_name() {
    let model = Model::of("llama");
    let whole = model.config().to_string();
    for length in 0..whole.len() {
        model.write("config.json", &whole[..length]);
        assert_refused(open(model.dir()), &model.path("config.json"), &["JSON"]);
    }
}

#[test]
fn what_is_no_config_at_all_is_refused_by_name() {
    let model = Model::of("llama");
    let deep = |open: &str, close: &str| [open.repeat(100_000), close.repeat(100_000)].concat();
    for text in ["[]", "5", "\"llama\"", "null", "{}", "NaN", &deep("[", "]"), &deep("{\"model_type\":", "}")] {
        model.write("config.json", text);
        assert_refused(open(model.dir()), &model.path("config.json"), &[]);
    }
    model.write("config.json", b"{\"model_type\": \"ll\xff\xfe\"}");
    assert_refused(open(model.dir()), &model.path("config.json"), &["UTF-8"]);
}

#[test]
fn a_config_of_50_megabytes_is_not_read() {
    const SIZE: usize = 50_000_000;
    let model = Model::of("llama");
    let path = model.path("config.json");
    for (before, unit, after) in [("", "\0", ""), ("{\"model_type\": \"", "x", "\"}"), ("[1", ",1", "]")] {
        let mut file = std::io::BufWriter::new(File::create(&path).unwrap());
        file.write_all(before.as_bytes()).unwrap();
        for _ in 0..SIZE / (1000 * unit.len()) {
            file.write_all(unit.repeat(1000).as_bytes()).unwrap();
        }
        file.write_all(after.as_bytes()).unwrap();
        drop(file);
        assert_refused(open(model.dir()), &path, &["too large"]);
    }
}

#[test]
fn a_message_shows_the_beginning_of_a_long_value() {
    for field in ["/hidden_size", "/model_type", "/hidden_act", "/rope_parameters/rope_type"] {
        for value in [json!("ä".repeat(100_000)), json!(vec!["ä"; 100_000])] {
            let model = Model::of("llama");
            model.set(field, Some(value));
            assert_refused(open(model.dir()), &model.path("config.json"), &["ä"]);
        }
    }
}

#[test]
fn generation_config_json_that_lies_is_refused_by_name() {
    for (text, words) in [
        ("", &["JSON"][..]),
        ("{\"eos_token_id\": 2", &["JSON"]),
        ("{\"eos_token_id\": \"</s>\"}", &["`eos_token_id`", "</s>", "expected a token id"]),
        ("{\"eos_token_id\": [2, null]}", &["`eos_token_id`", "null", "expected a token id"]),
        ("{\"eos_token_id\": [2, NaN]}", &["`eos_token_id`", "NaN", "expected a token id"]),
        ("{\"suppress_tokens\": \"all\"}", &["`suppress_tokens`", "all", "expected a token id"]),
        ("{\"bad_words_ids\": [5]}", &["`bad_words_ids`", "5", "a list of lists of token ids"]),
        ("{\"eos_token_id\": 1e10}", &["`eos_token_id`", "expected a token id"]),
    ] {
        let model = Model::of("llama");
        model.write("generation_config.json", text);
        assert_refused(open(model.dir()), &model.path("generation_config.json"), words);
    }
}

// ---- tensors --------------------------------------------------------------------------------------------------------

#[test]
fn tensors_that_do_not_fit_the_config_are_refused_by_their_names() {
    let down = "model.layers.1.mlp.down_proj.weight";
    let embeddings = "model.embed_tokens.weight";
    let shapes = |found: &'static str, wanted: &'static str| vec![found, wanted];
    let with = |field: &str, value: Value| {
        let model = Model::of("llama");
        model.set(field, Some(value));
        model
    };
    let changed = |fixture: &str, change: &dyn Fn(&mut HashMap<String, Tensor>)| {
        let model = Model::of(fixture);
        model.change(change);
        model
    };
    let without_embeddings = changed("llama", &|tensors| drop(tensors.remove(embeddings)));
    without_embeddings.set("/tie_word_embeddings", Some(json!(true)));
    let untied = Model::of("llama-tied");
    untied.set("/tie_word_embeddings", Some(json!(false)));
    for (model, tensor, words) in [
        (changed("llama", &|tensors| drop(tensors.remove(down))), down, vec!["missing"]),
        (
            changed("llama", &|tensors| {
                let turned = tensors[down].t().unwrap().contiguous().unwrap();
                tensors.insert(down.to_string(), turned);
            }),
            down,
            shapes("[48, 32]", "[32, 48]"),
        ),
        (
            changed("llama", &|tensors| {
                let flat = tensors[down].flatten_all().unwrap();
                tensors.insert(down.to_string(), flat);
            }),
            down,
            shapes("[1536]", "[32, 48]"),
        ),
        (
            changed("llama", &|tensors| {
                let integers = tensors[down].to_dtype(DType::I64).unwrap();
                tensors.insert(down.to_string(), integers);
            }),
            down,
            vec!["I64", "F32, F16 and BF16", "GGUF"],
        ),
        (with("/vocab_size", json!(95)), embeddings, shapes("[96, 32]", "[95, 32]")),
        (with("/vocab_size", json!(97)), embeddings, shapes("[96, 32]", "[97, 32]")),
        (with("/hidden_size", json!(64)), embeddings, shapes("[96, 32]", "[96, 64]")),
        (with("/intermediate_size", json!(47)), "model.layers.0.mlp.gate_proj.weight", shapes("[48, 32]", "[47, 32]")),
        (with("/head_dim", json!(4)), "model.layers.0.self_attn.q_proj.weight", shapes("[32, 32]", "[16, 32]")),
        (with("/num_hidden_layers", json!(4)), "model.layers.3.input_layernorm.weight", vec!["missing"]),
        (with("/attention_bias", json!(true)), "model.layers.0.self_attn.q_proj.bias", vec!["missing"]),
        (without_embeddings, embeddings, vec!["missing"]),
        (untied, "lm_head.weight", vec!["missing"]),
    ] {
        let words = [vec![tensor], words].concat();
        // On one device, so that the tensors are loaded in order.
        assert_refused(run(model.dir(), "cpu"), &model.path("model.safetensors"), &words);
    }
}

// ---- GGUF -----------------------------------------------------------------------------------------------------------

#[test]
fn every_lie_in_gguf_metadata_is_refused_by_file_and_key() {
    use Meta::{Array, F32, I32, String as Text, U32, U64};
    let absent = || None;
    let text = |text: &str| Some(Text(text.to_string()));
    let mut wrong = Vec::new();
    for (fixture, key, value, words) in [
        ("llama", "general.architecture", absent(), &["missing"][..]),
        ("llama", "general.architecture", text("mamba"), &["mamba", "supported are", "llama, mistral"]),
        ("llama", "general.architecture", Some(U32(1)), &["a UTF-8 string"]),
        ("llama", "llama.embedding_length", absent(), &["missing"]),
        ("llama", "llama.embedding_length", Some(U32(0)), &["is 0", "1..="]),
        ("llama", "llama.embedding_length", Some(U64(u64::MAX)), &["18446744073709551615", "1..="]),
        ("llama", "llama.embedding_length", text("32"), &["a non-negative integer", "\"32\""]),
        ("llama", "llama.embedding_length", Some(I32(-32)), &["a non-negative integer", "-32"]),
        ("llama", "llama.block_count", absent(), &["missing"]),
        ("llama", "llama.block_count", Some(U32(0)), &["is 0", "1..="]),
        ("llama", "llama.block_count", Some(U32(1_000_000_000)), &["1000000000", "1..="]),
        ("llama", "llama.attention.head_count", absent(), &["missing"]),
        ("llama", "llama.attention.head_count", Some(U32(0)), &["is 0", "1..="]),
        ("llama", "llama.attention.head_count", Some(U32(3)), &["3", "multiple", "`llama.attention.head_count_kv`"]),
        ("llama", "llama.attention.head_count_kv", Some(U32(0)), &["is 0", "1..="]),
        ("llama", "llama.attention.head_count_kv", Some(Array(vec![U32(2); 4])), &["array of 4 numbers for 3 layers"]),
        ("llama", "llama.attention.head_count_kv", Some(Array(vec![U32(2), U32(2), U32(1)])), &["[2, 2, 1]", "differ"]),
        ("llama", "llama.feed_forward_length", absent(), &["missing"]),
        ("llama", "llama.feed_forward_length", Some(U32(0)), &["is 0", "1..="]),
        ("llama", "llama.context_length", Some(U32(0)), &["is 0"]),
        ("llama", "llama.attention.key_length", Some(U32(1 << 30)), &["1073741824"]),
        ("llama", "llama.attention.value_length", Some(U32(4)), &["4"]),
        ("llama", "llama.attention.layer_norm_rms_epsilon", Some(F32(0.0)), &["is 0", "above 0"]),
        ("llama", "llama.attention.layer_norm_rms_epsilon", Some(F32(f32::NAN)), &["NaN", "above 0"]),
        ("llama", "llama.rope.freq_base", Some(F32(0.0)), &["is 0", "above 0"]),
        ("llama", "llama.rope.freq_base", Some(F32(f32::INFINITY)), &["inf", "above 0"]),
        ("llama", "llama.rope.dimension_count", Some(U32(0)), &["0", "even"]),
        ("llama", "llama.rope.dimension_count", Some(U32(7)), &["7", "even"]),
        ("llama", "llama.rope.dimension_count", Some(U32(64)), &["64", "even"]),
        ("llama", "llama.rope.scaling.type", text("ntk"), &["ntk", "supported are", "yarn"]),
        ("llama", "llama.expert_count", Some(U32(8)), &["8", "not supported"]),
        ("llama-linear-rope", "llama.rope.scaling.factor", Some(F32(-2.0)), &["-2", "above 0"]),
        ("llama-linear-rope", "llama.rope.scaling.factor", Some(F32(f32::NAN)), &["NaN", "above 0"]),
        ("llama-yarn", "llama.rope.scaling.factor", Some(F32(-2.0)), &["-2", "above 0"]),
        ("llama-yarn", "llama.rope.scaling.attn_factor", Some(F32(f32::NAN)), &["NaN", "above 0"]),
        ("llama-yarn", "llama.rope.scaling.original_context_length", Some(U32(0)), &["is 0"]),
        ("gemma2", "gemma2.attn_logit_softcapping", Some(F32(f32::NAN)), &["NaN", "above 0"]),
        ("gemma2", "gemma2.final_logit_softcapping", Some(F32(-30.0)), &["-30", "above 0"]),
        ("granite", "granite.logit_scale", Some(F32(-2.0)), &["-2", "above 0"]),
        ("granite", "granite.attention.scale", Some(F32(f32::NAN)), &["NaN", "above 0"]),
        ("granite", "granite.embedding_scale", Some(F32(f32::INFINITY)), &["inf", "above 0"]),
        ("granite", "granite.residual_scale", Some(F32(-1.0)), &["-1", "above 0"]),
    ] {
        let shown = format!("{value:?}");
        let (_folder, path) = gguf(fixture, |metadata, _| {
            metadata.remove(key);
            metadata.extend(value.map(|value| (key.to_string(), value)));
        });
        let lacking = lacking(open(&path), &path, &[&[key], words].concat());
        wrong.extend(lacking.map(|lacking| format!("{fixture} {key} = {shown}: {lacking}")));
    }
    assert!(wrong.is_empty(), "{} of the messages:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn gguf_tensors_that_do_not_fit_the_metadata_are_refused_by_their_names() {
    for (fixture, tensor, replacement, words) in [
        ("llama", "token_embd.weight", None, &["missing"][..]),
        ("llama", "blk.1.ffn_down.weight", None, &["missing"]),
        ("llama", "blk.1.ffn_down.weight", Some(vector(&[1.0; 64])), &["[64]", "[32, 48]"]),
        ("llama", "blk.0.attn_norm.weight", Some(vector(&[1.0; 31])), &["[31]", "[32]"]),
        ("llama", "token_embd.weight", Some(vector(&[1.0; 96])), &["[96]", "[96, 32]"]),
        ("llama3-rope", "rope_freqs.weight", Some(vector(&[1.0; 3])), &["3 factors for 4"]),
        ("llama3-rope", "rope_freqs.weight", Some(vector(&[1.0, 1.0, 0.0, 1.0])), &["0", "above 0"]),
        ("phi3-longrope", "rope_factors_long.weight", Some(vector(&[1.0; 5])), &["5 factors for 4"]),
        ("phi3-longrope", "rope_factors_short.weight", Some(vector(&[f32::NAN; 4])), &["NaN", "above 0"]),
    ] {
        let (_folder, path) = gguf(fixture, |_, tensors| {
            tensors.remove(tensor);
            tensors.extend(replacement.map(|replacement| (tensor.to_string(), replacement)));
        });
        assert_refused(run(&path, "cpu"), &path, &[&[tensor], words].concat());
    }
}

// ---- anything -------------------------------------------------------------------------------------------------------

const FIXTURES: &[&str] = &[
    "llama",
    "llama-dynamic-rope",
    "llama3-rope",
    "llama-yarn-mscale",
    "mistral-sliding",
    "qwen2-sliding",
    "qwen3",
    "phi3-longrope",
    "phi4-mini",
    "gemma",
    "gemma2",
    "gemma3-linear-rope",
    "granite-bias",
    "olmo2",
    "smollm3-sliding",
];

/// Every field that is read.
const FIELDS: &[&str] = &[
    "/model_type",
    "/text_config",
    "/quantization_config",
    "/vocab_size",
    "/hidden_size",
    "/intermediate_size",
    "/num_hidden_layers",
    "/num_attention_heads",
    "/num_key_value_heads",
    "/head_dim",
    "/max_position_embeddings",
    "/original_max_position_embeddings",
    "/partial_rotary_factor",
    "/rms_norm_eps",
    "/hidden_act",
    "/hidden_activation",
    "/tie_word_embeddings",
    "/attention_bias",
    "/mlp_bias",
    "/eos_token_id",
    "/sliding_window",
    "/use_sliding_window",
    "/max_window_layers",
    "/sliding_window_pattern",
    "/_sliding_window_pattern",
    "/layer_types",
    "/no_rope_layers",
    "/no_rope_layer_interval",
    "/query_pre_attn_scalar",
    "/attn_logit_softcapping",
    "/final_logit_softcapping",
    "/attention_multiplier",
    "/embedding_multiplier",
    "/residual_multiplier",
    "/logits_scaling",
    "/rope_theta",
    "/rope_local_base_freq",
    "/rope_scaling",
    "/rope_parameters",
    "/rope_parameters/rope_type",
    "/rope_parameters/type",
    "/rope_parameters/rope_theta",
    "/rope_parameters/partial_rotary_factor",
    "/rope_parameters/factor",
    "/rope_parameters/low_freq_factor",
    "/rope_parameters/high_freq_factor",
    "/rope_parameters/original_max_position_embeddings",
    "/rope_parameters/attention_factor",
    "/rope_parameters/beta_fast",
    "/rope_parameters/beta_slow",
    "/rope_parameters/mscale",
    "/rope_parameters/mscale_all_dim",
    "/rope_parameters/truncate",
    "/rope_parameters/short_factor",
    "/rope_parameters/long_factor",
    "/rope_parameters/full_attention",
    "/rope_parameters/sliding_attention",
];

/// Texts that mean something somewhere.
const TEXTS: &[&str] = &[
    "",
    "llama",
    "gemma3",
    "phi3",
    "default",
    "linear",
    "dynamic",
    "llama3",
    "yarn",
    "longrope",
    "silu",
    "gelu",
    "full_attention",
    "sliding_attention",
    "NaN",
    "\u{0}",
];

fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (0u64..100).prop_map(Value::from),
        select(vec![1 << 24, 1 << 31, 1 << 32, 1 << 53, u64::MAX - 1, u64::MAX]).prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-2.0..2.0).prop_map(Value::from),
        select(vec![1e-320, 1e-40, 1e18, 1e39, f64::MAX, f64::MIN]).prop_map(Value::from),
        select(TEXTS).prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 16, 6, |inner| {
        let key = select(FIELDS).prop_map(|field| field.rsplit('/').next().unwrap().to_string());
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::hash_map(key, inner, 0..6).prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    #[test]
    fn anything_in_any_field_is_refused_or_run(
        fixture in select(FIXTURES),
        lies in prop::collection::vec((select(FIELDS), any_value()), 1..4),
    ) {
        let model = Model::of(fixture);
        for (field, value) in lies {
            model.set(field, Some(value));
        }
        let _ = run(model.dir(), "cpu,cpu");
    }
}
