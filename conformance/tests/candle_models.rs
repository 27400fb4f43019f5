//! Our one decoder against candle's own models, family by family, on the fixtures of `tests/fixtures/families`. Where
//! candle's model is not the fixture's, a table says so and why, and the test holds the table to that: candle then has
//! to differ from what Hugging Face transformers computes, and to equal ours once our config says what candle does.

#[path = "../../tests/common/mod.rs"]
mod common;

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use candle_core::quantized::gguf_file::Content;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_pipeline::HeterogeneousPipelineExecutor;
use candle_transformers::models as candle;
use serde_json::{Value, json};

/// Largest difference that counts as equal, as a share of the largest magnitude.
const TOLERANCE: f32 = 1e-4;

/// Fixtures that candle gets wrong.
struct LeftOut {
    /// What candle does instead.
    why: &'static str,
    fixtures: &'static [&'static str],
    /// Tokens of the shortest prompt that shows it; shorter ones are compared all the same.
    from: usize,
    /// The fields of config.json that describe what candle does. Empty where no config does, or candle gives nothing.
    instead: &'static str,
}

const SAFETENSORS_LEFT_OUT: &[LeftOut] = &[
    LeftOut {
        why: "llama: the config knows llama3 scaling and no other, and does not deserialise",
        fixtures: &[
            "llama-dynamic-rope",
            "llama-linear-rope",
            "llama-yarn",
            "llama-yarn-attention-factor",
            "llama-yarn-mscale",
        ],
        from: 1,
        instead: "",
    },
    LeftOut {
        why: "llama: `head_dim` is not read, so the shapes do not match",
        fixtures: &["llama-head-dim"],
        from: 1,
        instead: "",
    },
    LeftOut {
        why: "llama: biases are not loaded",
        fixtures: &["llama-bias"],
        from: 1,
        instead: r#"{"attention_bias": false, "mlp_bias": false}"#,
    },
    LeftOut {
        why: "llama: `hidden_act` is not read",
        fixtures: &["llama-gelu"],
        from: 1,
        instead: r#"{"hidden_act": "silu"}"#,
    },
    LeftOut {
        why: "mistral: the mask of a window of 16 shows 17 keys (`j + window < i`), and so it does in the families below",
        fixtures: &["mistral-sliding"],
        from: 60,
        instead: r#"{"sliding_window": 17}"#,
    },
    LeftOut {
        why: "qwen2: the window goes on every layer",
        fixtures: &["qwen2-sliding"],
        from: 60,
        instead: r#"{"sliding_window": 17, "layer_types": null, "max_window_layers": 0}"#,
    },
    LeftOut {
        why: "qwen2: RoPE scaling is not read",
        fixtures: &["qwen2-yarn"],
        from: 7,
        instead: r#"{"rope_parameters": {"rope_theta": 100.0}, "max_position_embeddings": 256}"#,
    },
    LeftOut {
        why: "qwen3, smollm3: sliding windows are refused",
        fixtures: &["qwen3-sliding", "smollm3-sliding"],
        from: 1,
        instead: "",
    },
    LeftOut {
        why: "gemma2: the window goes on every layer",
        fixtures: &["gemma2", "gemma2-no-softcap"],
        from: 60,
        instead: r#"{"sliding_window": 17, "layer_types":
            ["sliding_attention", "sliding_attention", "sliding_attention", "sliding_attention"]}"#,
    },
    LeftOut {
        why: "gemma2: scores are scaled by `head_dim`, not by `query_pre_attn_scalar`; and the window",
        fixtures: &["gemma2-query-scalar"],
        from: 7,
        instead: r#"{"query_pre_attn_scalar": 16, "sliding_window": 17, "layer_types":
            ["sliding_attention", "sliding_attention", "sliding_attention", "sliding_attention"]}"#,
    },
    LeftOut {
        why: "gemma3: the mask's window is one too wide",
        fixtures: &["gemma3"],
        from: 60,
        instead: r#"{"sliding_window": 17}"#,
    },
    LeftOut {
        why: "gemma3: RoPE scaling is not read; and the window",
        fixtures: &["gemma3-linear-rope"],
        from: 7,
        instead: r#"{"sliding_window": 17, "rope_parameters":
            {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}}"#,
    },
    LeftOut {
        why: "gemma3: a prompt fails with several key heads, whose values do not lie as its KV cache wants them",
        fixtures: &["gemma3-conditional", "gemma3-pattern"],
        from: 7,
        instead: "",
    },
    LeftOut {
        why: "phi3: `sliding_window` is not read",
        fixtures: &["phi3-sliding"],
        from: 60,
        instead: r#"{"sliding_window": null}"#,
    },
    LeftOut {
        why: "phi3: LongRoPE's factors multiply the frequencies instead of dividing them, a long sequence begins with \
              the short ones, and the attention factor is missing",
        fixtures: &["phi3-longrope", "phi4-mini"],
        from: 7,
        instead: "",
    },
    LeftOut {
        why: "granite: none of the four multipliers is read, and scores are scaled by `head_dim`",
        fixtures: &["granite"],
        from: 1,
        instead: r#"{"attention_multiplier": 0.3535533905932738, "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0, "logits_scaling": 1.0}"#,
    },
    LeftOut {
        why: "granite: the same where all of them are 1",
        fixtures: &["granite-defaults"],
        from: 7,
        instead: r#"{"attention_multiplier": 0.3535533905932738}"#,
    },
    LeftOut {
        why: "granite: a model with tied embeddings does not load",
        fixtures: &["granite-bias"],
        from: 1,
        instead: "",
    },
];

const GGUF_LEFT_OUT: &[LeftOut] = &[
    LeftOut {
        why: "there is no model for the architecture",
        fixtures: &["gemma", "gemma2", "granite", "granite-bias", "olmo2"],
        from: 1,
        instead: "",
    },
    LeftOut {
        why: "quantized_smollm3: knows heads of 128 only, and quantises the output to Q8_0 whatever the file has",
        fixtures: &["smollm3"],
        from: 1,
        instead: "",
    },
    LeftOut {
        why: "quantized_gemma3: SiLU, a window one too wide, and no RoPE scaling",
        fixtures: &["gemma3", "gemma3-linear-rope"],
        from: 1,
        instead: r#"{"hidden_activation": "silu", "sliding_window": 17, "rope_parameters":
            {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}}"#,
    },
    LeftOut {
        why: "quantized_llama: biases are not loaded",
        fixtures: &["llama-bias"],
        from: 1,
        instead: r#"{"attention_bias": false, "mlp_bias": false}"#,
    },
    LeftOut {
        why: "quantized_llama: `key_length` is not read, so the shapes do not match",
        fixtures: &["llama-head-dim"],
        from: 1,
        instead: "",
    },
    LeftOut {
        why: "quantized_llama: `rope.scaling` is not read",
        fixtures: &["llama-linear-rope"],
        from: 7,
        instead: r#"{"rope_parameters": {"rope_theta": 10000.0}}"#,
    },
    LeftOut {
        why: "quantized_llama: `rope.scaling` is not read",
        fixtures: &["llama-yarn"],
        from: 7,
        instead: r#"{"rope_parameters": {"rope_theta": 100.0}}"#,
    },
    LeftOut {
        why: "quantized_llama: `rope_freqs.weight` is not read",
        fixtures: &["llama3-rope"],
        from: 7,
        instead: r#"{"rope_parameters": {"rope_theta": 50.0}}"#,
    },
    LeftOut {
        why: "quantized_qwen2: `rope.scaling` is not read, and a prompt past the trained length fails",
        fixtures: &["qwen2-yarn"],
        from: 7,
        instead: "",
    },
    LeftOut {
        why: "quantized_qwen3: cos and sin are F16 unless the file has `general.dtype`",
        fixtures: &["qwen3"],
        from: 7,
        instead: "",
    },
    LeftOut {
        why: "quantized_phi3: the part of a head that is not rotated is not passed through, so the shapes do not match",
        fixtures: &["phi3-partial-rotary"],
        from: 1,
        instead: "",
    },
    LeftOut {
        why: "quantized_phi3: a model with tied embeddings does not load",
        fixtures: &["phi4-mini"],
        from: 1,
        instead: "",
    },
    LeftOut {
        why: "quantized_phi3: LongRoPE's factors are not read",
        fixtures: &["phi3-longrope"],
        from: 7,
        instead: r#"{"rope_parameters": {"rope_theta": 10000.0}}"#,
    },
];

/// config.json in the dialect that candle's models read: rotary settings at the top level, and no field left out.
fn config(dir: &Path) -> anyhow::Result<Value> {
    let mut config: Value = serde_json::from_reader(File::open(dir.join("config.json"))?)?;
    if let Some(text) = config.get("text_config") {
        config = text.clone();
    }
    let mut rope = config["rope_parameters"].clone();
    if let Some(local) = rope.get("sliding_attention") {
        config["rope_local_base_freq"] = local["rope_theta"].clone();
        rope = rope["full_attention"].clone();
    }
    config["rope_theta"] = rope["rope_theta"].clone();
    if rope["rope_type"] != "default" {
        rope["type"] = rope["rope_type"].clone();
        config["rope_scaling"] = rope;
    }
    if config["use_sliding_window"] == false {
        config["sliding_window"] = json!(256);
    }
    // Only the length of candle's tables, which the longest prompts would pass.
    config["max_position_embeddings"] = json!(256);
    if let Some(types) = config["layer_types"].as_array() {
        let full = types.iter().position(|kind| kind == "full_attention").unwrap_or(types.len());
        config["sliding_window_pattern"] = json!(full + 1);
    }
    Ok(config)
}

/// Logits of the prompt's last position, from candle's model of the folder's `model_type`.
fn safetensors_logits(dir: &Path, prompt: &Tensor) -> anyhow::Result<Tensor> {
    let config = config(dir)?;
    let entries = std::fs::read_dir(dir)?.collect::<Result<Vec<_>, _>>()?;
    let tensors = entries
        .into_iter()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"))
        .map(|path| candle_core::safetensors::load(path, &Device::Cpu))
        .collect::<Result<Vec<_>, _>>()?;
    let mut weights = VarBuilder::from_tensors(tensors.into_iter().flatten().collect(), DType::F32, &Device::Cpu);
    if weights.contains_tensor("language_model.model.norm.weight") {
        weights = weights.pp("language_model");
    }
    let model_type = config["model_type"].as_str().context("no model_type")?.to_string();
    /// Builds the module's model from its config and runs it. Two modules want flash attention declined first.
    macro_rules! run {
        ($module:ident::$model:ident) => {
            candle::$module::$model::new(&serde_json::from_value(config)?, weights)?.forward(prompt, 0)
        };
        ($module:ident::$model:ident, $flash_attention:literal) => {
            candle::$module::$model::new($flash_attention, &serde_json::from_value(config)?, weights)?
                .forward(prompt, 0)
        };
        ($module:ident::$model:ident, $config:ident, $cache:ident) => {{
            let config = serde_json::from_value::<candle::$module::$config>(config)?.into_config(false);
            let mut cache = candle::$module::$cache::new(true, DType::F32, &config, &Device::Cpu)?;
            candle::$module::$model::load(weights, &config)?.forward(prompt, 0, &mut cache)
        }};
    }
    Ok(match model_type.as_str() {
        "llama" => run!(llama::Llama, LlamaConfig, Cache),
        "granite" => run!(granite::Granite, GraniteConfig, Cache),
        "mistral" => run!(mistral::Model),
        "qwen2" => run!(qwen2::ModelForCausalLM),
        "qwen3" => run!(qwen3::ModelForCausalLM),
        "phi3" => run!(phi3::Model),
        "gemma" => run!(gemma::Model, false),
        "gemma2" => run!(gemma2::Model, false),
        "gemma3_text" => run!(gemma3::Model, false),
        "olmo2" => run!(olmo2::Model),
        "smollm3" => {
            let config = serde_json::from_value(config)?;
            candle::smol::smollm3::ModelForCausalLM::new(&config, weights)?.forward(prompt, 0)
        }
        other => bail!("no model for {other}"),
    }?)
}

/// The same from a GGUF file, by its architecture.
fn gguf_logits(path: &Path, prompt: &Tensor) -> anyhow::Result<Tensor> {
    let mut file = File::open(path)?;
    let content = Content::read(&mut file)?;
    let architecture = content.metadata.get("general.architecture").context("no architecture")?.to_string()?.clone();
    let (file, cpu) = (&mut file, &Device::Cpu);
    Ok(match architecture.as_str() {
        "llama" => candle::quantized_llama::ModelWeights::from_gguf(content, file, cpu)?.forward(prompt, 0),
        "qwen2" => candle::quantized_qwen2::ModelWeights::from_gguf(content, file, cpu)?.forward(prompt, 0),
        "qwen3" => candle::quantized_qwen3::ModelWeights::from_gguf(content, file, cpu)?.forward(prompt, 0),
        "phi3" => candle::quantized_phi3::ModelWeights::from_gguf(false, content, file, cpu)?.forward(prompt, 0),
        "gemma3" => candle::quantized_gemma3::ModelWeights::from_gguf(content, file, cpu)?.forward(prompt, 0),
        "smollm3" => {
            candle::smol::quantized_smollm3::QuantizedModelForCausalLM::from_gguf(path, cpu, false)?.forward(prompt, 0)
        }
        other => bail!("no model for {other}"),
    }?)
}

type CandleLogits = fn(&Path, &Tensor) -> anyhow::Result<Tensor>;

/// Candle's logits; some of its models panic about what they cannot load.
fn run_candle(logits: CandleLogits, model: &Path, prompt: &[u32]) -> anyhow::Result<Vec<f32>> {
    let found = catch_unwind(AssertUnwindSafe(|| logits(model, &Tensor::new(prompt, &Device::Cpu)?.unsqueeze(0)?)));
    Ok(found.map_err(|_| anyhow!("candle panicked"))??.flatten_all()?.to_vec1()?)
}

/// Largest difference as a share of the largest magnitude.
fn relative_difference(found: &[f32], wanted: &[f32]) -> f32 {
    assert_eq!(found.len(), wanted.len());
    let size = wanted.iter().fold(0f32, |size, value| size.max(value.abs()));
    found.iter().zip(wanted).fold(0f32, |worst, (a, b)| worst.max((a - b).abs())) / size
}

/// Ours, with the fields of `instead` in config.json.
async fn ours_as_candle(dir: &Path, instead: &str) -> anyhow::Result<HeterogeneousPipelineExecutor> {
    let mut config: Value = serde_json::from_reader(File::open(dir.join("config.json"))?)?;
    for (field, value) in serde_json::from_str::<serde_json::Map<String, Value>>(instead)? {
        config[field] = value;
    }
    let copy = tempfile::tempdir()?;
    std::fs::copy(dir.join("model.safetensors"), copy.path().join("model.safetensors"))?;
    std::fs::write(copy.path().join("config.json"), config.to_string())?;
    Ok(common::executor(copy.path().to_str().context("no text")?, "cpu,cpu", None).await?)
}

/// Compares every prompt of a fixture; returns how many agreed, and what is wrong.
async fn check(
    dir: &Path,
    model: &Path,
    candle_logits: CandleLogits,
    left_out: &[LeftOut],
) -> anyhow::Result<(usize, Vec<String>)> {
    let fixture = dir.file_name().and_then(|name| name.to_str()).context("no name")?;
    let different = left_out.iter().find(|row| row.fixtures.contains(&fixture));
    let expected: Value = serde_json::from_reader(File::open(dir.join("expected.json"))?)?;
    let executor = common::executor(model.to_str().context("no text")?, "cpu,cpu", None).await?;
    let as_candle = match different.map_or("", |row| row.instead) {
        "" => None,
        instead => Some(ours_as_candle(dir, instead).await?),
    };
    let (mut agreed, mut wrong) = (0, Vec::new());
    for case in expected["cases"].as_array().context("no cases")? {
        let prompt: Vec<u32> = serde_json::from_value(case["prompt"].clone())?;
        let case_of = format!("{fixture}, prompt of {}", prompt.len());
        let candles = run_candle(candle_logits, model, &prompt);
        let different = different.filter(|row| prompt.len() >= row.from);
        if let Some(LeftOut { why, .. }) = different {
            let transformers: Vec<f32> = serde_json::from_value(case["logits"].clone())?;
            if candles.as_ref().is_ok_and(|logits| relative_difference(logits, &transformers) <= TOLERANCE) {
                wrong.push(format!("{case_of}: candle is right, in spite of \"{why}\""));
            }
        }
        let ours = match (different, &as_candle) {
            (None, _) => &executor,
            (Some(_), Some(as_candle)) => as_candle,
            (Some(_), None) => continue,
        };
        let ours = ours.infer_with(&prompt, &common::greedy(1)).await?.prompt_logits.context("no logits")?;
        match candles.map(|logits| relative_difference(&ours, &logits)) {
            Ok(difference) if difference <= TOLERANCE => agreed += 1,
            Ok(difference) => wrong.push(format!("{case_of}: logits differ by {difference:e}")),
            Err(error) => wrong.push(format!("{case_of}: {error:#}")),
        }
    }
    Ok((agreed, wrong))
}

async fn check_all(file: &str, candle_logits: CandleLogits, left_out: &[LeftOut]) -> usize {
    let families = std::fs::read_dir(common::fixture("families")).unwrap().map(|entry| entry.unwrap().path());
    let mut dirs: Vec<PathBuf> = families.filter(|dir| dir.is_dir() && dir.join(file).exists()).collect();
    dirs.sort();
    let absent = |name: &&&str| !dirs.iter().any(|dir| dir.ends_with(name));
    assert_eq!(left_out.iter().flat_map(|row| row.fixtures).find(absent), None, "there is no such fixture");
    let (mut agreed, mut wrong) = (0, Vec::new());
    for dir in dirs {
        let model = if file == "config.json" { dir.clone() } else { dir.join(file) };
        match check(&dir, &model, candle_logits, left_out).await {
            Ok((right, different)) => {
                agreed += right;
                wrong.extend(different);
            }
            Err(error) => wrong.push(format!("{}: {error:#}", model.display())),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    agreed
}

#[tokio::test]
async fn candles_models_of_safetensors_agree() {
    let agreed = check_all("config.json", safetensors_logits, SAFETENSORS_LEFT_OUT).await;
    assert!(agreed >= 100, "only {agreed} prompts were compared");
}

#[tokio::test]
async fn candles_models_of_gguf_agree() {
    let agreed = check_all("model-f32.gguf", gguf_logits, GGUF_LEFT_OUT).await;
    assert!(agreed >= 40, "only {agreed} prompts were compared");
}
