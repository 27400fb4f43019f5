//! What each type of weights and of KV costs in accuracy: logits at every position of some stories, compared with those
//! of the same model in F32. With a program that writes llama.cpp's logits, llama.cpp's on the same files beside them.
//!
//! ```text
//! cargo run --release --example accuracy
//! cargo run --release --example accuracy -- --text FILE --types f16,q8_0,q4_k --llama target/llama-logits
//! ```
//!
//! The model, a folder of safetensors of the Llama architecture, is written to a temporary GGUF in each type: all
//! matrices in the type, with the embeddings and the head; norms in F32. Every file is measured twice: against the
//! original in F32 (what the type costs), and against its own rounded values held in F32 (what the arithmetic adds).
//! Tokens go in one at a time, as in decode. The stories are sampled from the model in F32, unless `--text` gives some.
//! `tools/compare_peers/README.md` says how the program for `--llama` is compiled.

mod common;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use candle_pipeline::backend::{MicroBatch, SequenceId, SequenceSlice, StageOutput, Wanted};
use candle_pipeline::instrument::Watch;
use candle_pipeline::instrument::tracer::quant_error::kl_divergence;
use candle_pipeline::weights::WeightType;
use candle_pipeline::{
    DEMO_MODEL, DeviceSpec, GenerationOptions, HeterogeneousPipeline, HeterogeneousPipelineExecutor, KvType,
    PipelineOptions,
};
use clap::Parser;
use common::files::read_text;
use common::greedy;
use common::output::{note_line, print_line};
use serde::{Deserialize, Serialize};

/// Most precise first.
const TYPES: [WeightType; 13] = [
    WeightType::F32,
    WeightType::F16,
    WeightType::BF16,
    WeightType::Q8_0,
    WeightType::Q6_K,
    WeightType::Q5_K,
    WeightType::Q5_1,
    WeightType::Q5_0,
    WeightType::Q4_K,
    WeightType::Q4_1,
    WeightType::Q4_0,
    WeightType::Q3_K,
    WeightType::Q2_K,
];

#[derive(Parser)]
struct Arguments {
    /// Folder with config.json and safetensors of the Llama architecture.
    #[arg(long, default_value = DEMO_MODEL)]
    model: PathBuf,
    /// The device that computes.
    #[arg(long, default_value = "cpu")]
    device: DeviceSpec,
    /// Text to measure on, in paragraphs with blank lines between them, instead of sampled stories.
    #[arg(long)]
    text: Option<PathBuf>,
    /// Tokens to sample, at least.
    #[arg(long, default_value_t = 2000)]
    tokens: usize,
    /// Types of weights, all when absent.
    #[arg(long, value_delimiter = ',', value_parser = parse_type)]
    types: Vec<WeightType>,
    /// Compute rows as those of prompts in BF16, instead of decode steps.
    #[arg(long)]
    bf16_prompts: bool,
    /// The program that writes llama.cpp's logits.
    #[arg(long)]
    llama: Option<PathBuf>,
    /// Print one JSON object instead of the tables.
    #[arg(long)]
    json: bool,
}

fn parse_type(name: &str) -> Result<WeightType> {
    let found = TYPES.into_iter().find(|dtype| dtype.name().eq_ignore_ascii_case(name));
    found.with_context(|| format!("one of {}", TYPES.map(WeightType::name).join(", ")))
}

/// How far some logits are from others.
#[derive(Debug, Serialize)]
struct Difference {
    /// Kullback-Leibler divergence from the reference, in nats: mean over the positions.
    kl_mean: f64,
    /// Of a hundred positions one has more.
    kl_p99: f64,
    /// Share of positions with the same most likely token.
    agreement: f64,
    /// Greatest difference of two logits.
    max_difference: f32,
    /// The divergence at each position.
    #[serde(skip)]
    divergences: Vec<f64>,
}

impl Difference {
    /// Of `found` from `reference`, each with `vocab` values a position.
    fn of(found: &[f32], reference: &[f32], vocab: usize) -> Result<Difference> {
        ensure!(found.len() == reference.len(), "{} logits instead of {}", found.len(), reference.len());
        ensure!(found.iter().all(|logit| logit.is_finite()), "a logit is not finite");
        let positions = || found.chunks_exact(vocab).zip(reference.chunks_exact(vocab));
        let divergences: Vec<f64> = positions().map(|(found, reference)| kl_divergence(reference, found)).collect();
        let mut sorted = divergences.clone();
        sorted.sort_by(f64::total_cmp);
        let count = sorted.len();
        ensure!(count > 0, "no positions");
        let same = positions().filter(|(found, reference)| greedy(found) == greedy(reference)).count();
        let differences = found.iter().zip(reference).map(|(a, b)| (a - b).abs());
        Ok(Difference {
            kl_mean: divergences.iter().sum::<f64>() / count as f64,
            kl_p99: sorted[(count * 99).div_ceil(100) - 1],
            agreement: same as f64 / count as f64,
            max_difference: differences.fold(0.0, f32::max),
            divergences,
        })
    }
}

/// How much more one program diverges than another at the same positions.
#[derive(Debug, Serialize)]
struct Excess {
    /// Mean over the positions.
    mean: f64,
    /// Its standard error.
    error: f64,
}

impl Excess {
    fn of(ours: &Difference, theirs: &Difference) -> Excess {
        let differences = || ours.divergences.iter().zip(&theirs.divergences).map(|(ours, theirs)| ours - theirs);
        let count = ours.divergences.len() as f64;
        let mean = differences().sum::<f64>() / count;
        let squares: f64 = differences().map(|difference| (difference - mean).powi(2)).sum();
        Excess { mean, error: squares.sqrt() / count }
    }
}

/// Logits from one program.
#[derive(Debug, Serialize)]
struct Measured {
    /// From the original in F32.
    to_original: Difference,
    /// From the file's rounded values in F32.
    to_rounded: Difference,
}

#[derive(Debug, Serialize)]
struct Row {
    weights: &'static str,
    kv: &'static str,
    ours: Measured,
    llama: Option<Measured>,
    /// What we diverge from the original more than llama.cpp.
    excess: Option<Excess>,
}

/// What of config.json goes into the GGUF's metadata.
#[derive(Debug, Deserialize)]
struct Config {
    architectures: Vec<String>,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    max_position_embeddings: usize,
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_scaling: Option<serde_json::Value>,
}

/// The model as GGUF has it, in F32.
struct Original {
    config: Config,
    tensors: BTreeMap<String, Tensor>,
}

impl Original {
    fn read(folder: &Path) -> Result<Original> {
        let path = folder.join("config.json");
        let text = std::fs::read(&path).with_context(|| format!("{}", path.display()))?;
        let config: Config = serde_json::from_slice(&text).with_context(|| format!("{}", path.display()))?;
        ensure!(config.architectures == ["LlamaForCausalLM"], "{:?}: only Llama is written", config.architectures);
        ensure!(config.rope_scaling.is_none(), "RoPE scaling is not written");
        let mut tensors = BTreeMap::new();
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if path.extension().is_none_or(|extension| extension != "safetensors") {
                continue;
            }
            for (name, tensor) in candle_core::safetensors::load(&path, &Device::Cpu)? {
                let stored = gguf_name(&name).with_context(|| format!("{name} is no tensor of a Llama"))?;
                let tensor = tensor.to_dtype(DType::F32)?;
                let heads = config.num_attention_heads;
                let tensor = match stored.rsplit('.').nth(1) {
                    Some("attn_q") => interleave(&tensor, heads)?,
                    Some("attn_k") => interleave(&tensor, config.num_key_value_heads.unwrap_or(heads))?,
                    _ => tensor,
                };
                tensors.insert(stored, tensor);
            }
        }
        ensure!(!tensors.is_empty(), "{}: no safetensors", folder.display());
        Ok(Original { config, tensors })
    }

    /// Writes matrices as `dtype`, and returns their rounded values.
    fn write(&self, path: &Path, dtype: WeightType) -> Result<BTreeMap<String, Tensor>> {
        let mut stored = BTreeMap::new();
        let mut rounded = BTreeMap::new();
        for (name, tensor) in &self.tensors {
            let kind = if tensor.rank() == 1 { GgmlDType::F32 } else { dtype.ggml() };
            let tensor = QTensor::quantize(tensor, kind).with_context(|| format!("{name} as {dtype}"))?;
            rounded.insert(name.clone(), tensor.dequantize(&Device::Cpu)?);
            stored.insert(name.clone(), tensor);
        }
        self.write_stored(path, &stored)?;
        Ok(rounded)
    }

    fn write_stored(&self, path: &Path, stored: &BTreeMap<String, QTensor>) -> Result<()> {
        let config = &self.config;
        let heads = config.num_attention_heads;
        let number = |value: usize| Value::U32(value as u32);
        let text = |value: &str| Value::String(value.into());
        // llama.cpp loads files without a tokenizer by this name of one.
        let metadata = [
            ("general.architecture", text("llama")),
            ("tokenizer.ggml.model", text("none")),
            ("llama.block_count", number(config.num_hidden_layers)),
            ("llama.context_length", number(config.max_position_embeddings)),
            ("llama.embedding_length", number(config.hidden_size)),
            ("llama.feed_forward_length", number(config.intermediate_size)),
            ("llama.attention.head_count", number(heads)),
            ("llama.attention.head_count_kv", number(config.num_key_value_heads.unwrap_or(heads))),
            ("llama.attention.layer_norm_rms_epsilon", Value::F32(config.rms_norm_eps as f32)),
            ("llama.rope.freq_base", Value::F32(config.rope_theta.unwrap_or(10_000.0) as f32)),
            ("llama.rope.dimension_count", number(config.hidden_size / heads)),
            ("llama.vocab_size", number(config.vocab_size)),
            ("general.quantization_version", number(2)),
        ];
        let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
        let stored: Vec<(&str, &QTensor)> = stored.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        Ok(gguf_file::write(&mut BufWriter::new(File::create(path)?), &metadata, &stored)?)
    }
}

/// GGUF's name of a tensor that safetensors have as `name`.
fn gguf_name(name: &str) -> Option<String> {
    let whole = match name {
        "model.embed_tokens.weight" => Some("token_embd.weight"),
        "model.norm.weight" => Some("output_norm.weight"),
        "lm_head.weight" => Some("output.weight"),
        _ => None,
    };
    if let Some(whole) = whole {
        return Some(whole.into());
    }
    let (layer, part) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let part = match part.strip_suffix(".weight")? {
        "input_layernorm" => "attn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "post_attention_layernorm" => "ffn_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        _ => return None,
    };
    Some(format!("blk.{layer}.{part}.weight"))
}

/// Rows of each head in GGUF's order for Llama: those that rotate together side by side, not half a head apart.
fn interleave(tensor: &Tensor, heads: usize) -> Result<Tensor> {
    let (rows, columns) = tensor.dims2()?;
    let halves = tensor.reshape((heads, 2, rows / heads / 2, columns))?;
    Ok(halves.transpose(1, 2)?.contiguous()?.reshape((rows, columns))?)
}

/// What computes logits, on which tokens.
struct Bench {
    device: DeviceSpec,
    sequences: Vec<Vec<u32>>,
    bf16_prompts: bool,
    llama: Option<PathBuf>,
    folder: tempfile::TempDir,
}

impl Bench {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Logits of every position from a pipeline of one stage.
    fn ours(&self, model: &Path, kv_type: KvType) -> Result<Vec<f32>> {
        let options = PipelineOptions { kv_type, bf16_prompts: self.bf16_prompts, ..PipelineOptions::default() };
        let model = model.to_str().context("the temporary folder's name is not UTF-8")?;
        let pipeline = HeterogeneousPipeline::with_options(&[self.device], model, options)?;
        let mut backend = pipeline.stage_source(0).load(&|_| {})?;
        let mut all = Vec::new();
        for (index, tokens) in self.sequences.iter().enumerate() {
            let id = SequenceId(index as u64);
            backend.open(id, tokens.len())?;
            for (position, &token) in tokens.iter().enumerate() {
                let slice = SequenceSlice {
                    id,
                    position,
                    len: 1,
                    length: position + 1,
                    decode: !self.bf16_prompts,
                    wanted: Wanted::Logits { rows: 1 },
                };
                let batch = MicroBatch { slices: vec![slice], tokens: vec![token] };
                match backend.forward(&batch, None, &mut Watch::off())? {
                    StageOutput::Logits(logits) => all.extend(logits.into_iter().flatten()),
                    _ => bail!("a whole model gave no logits"),
                }
            }
            backend.close(id);
        }
        Ok(all)
    }

    /// The same from llama.cpp.
    fn llama(&self, program: &Path, model: &Path, kv_type: KvType) -> Result<Vec<f32>> {
        let (tokens, output) = (self.path("tokens"), self.path("logits"));
        let line = |ids: &Vec<u32>| ids.iter().map(u32::to_string).collect::<Vec<_>>().join(" ") + "\n";
        std::fs::write(&tokens, self.sequences.iter().map(line).collect::<String>())?;
        let threads = std::thread::available_parallelism()?.to_string();
        let mut command = Command::new(program);
        command.arg(model).arg(&tokens).args([kv_type.name(), threads.as_str()]).arg(&output);
        let status = command.status().with_context(|| format!("{}", program.display()))?;
        ensure!(status.success(), "{} ended with {status}", program.display());
        let bytes = std::fs::read(&output)?;
        Ok(bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect())
    }
}

/// Stories from the model in F32, until there are `least` tokens.
async fn sample(model: &str, device: DeviceSpec, least: usize) -> Result<Vec<Vec<u32>>> {
    let options = PipelineOptions { dtype: Some(WeightType::F32), kv_type: KvType::F32, ..PipelineOptions::default() };
    let pipeline = HeterogeneousPipeline::with_options(&[device], model, options)?;
    let executor = HeterogeneousPipelineExecutor::new(pipeline, model).await?;
    let mut prompts = Vec::new();
    for text in ["Once upon a time", "One sunny morning", "There was a little"] {
        prompts.push(match executor.tokenizer() {
            Some(tokenizer) => tokenizer.encode(text, true)?,
            None => vec![1],
        });
    }
    let mut sequences: Vec<Vec<u32>> = Vec::new();
    while sequences.iter().map(Vec::len).sum::<usize>() < least {
        let seed = sequences.len();
        let options = GenerationOptions { seed: Some(seed as u64), ..GenerationOptions::new(240, 0.8, 1.0) };
        let mut tokens = prompts[seed % prompts.len()].clone();
        tokens.extend(executor.infer_with(&tokens, &options).await?.tokens);
        sequences.push(tokens);
    }
    Ok(sequences)
}

/// The paragraphs of a file, each as long as the model's context allows.
async fn read_stories(model: &str, path: &Path) -> Result<Vec<Vec<u32>>> {
    let text = read_text(path).with_context(|| format!("--text {}", path.display()))?;
    let pipeline = HeterogeneousPipeline::new(&[DeviceSpec::CPU], model)?;
    let executor = HeterogeneousPipelineExecutor::new(pipeline, model).await?;
    let tokenizer = executor.needed_tokenizer().context("--text needs a tokenizer")?;
    let most = executor.pipeline().config().max_position_embeddings;
    let paragraphs = text.split("\n\n").map(str::trim).filter(|paragraph| !paragraph.is_empty());
    let encode = |paragraph: &str| -> Result<Vec<u32>> {
        let mut tokens = tokenizer.encode(paragraph, true)?;
        tokens.truncate(most);
        Ok(tokens)
    };
    let sequences: Vec<Vec<u32>> = paragraphs.map(encode).collect::<Result<_>>()?;
    ensure!(!sequences.is_empty(), "{}: no text", path.display());
    Ok(sequences)
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// Two digits, and `0` for what the logarithms' own rounding may leave.
fn nats(value: f64) -> String {
    if value < 1e-12 { "0".into() } else { format!("{value:.1e}") }
}

fn print_table(title: &str, rows: &[Row], name: impl Fn(&Row) -> &'static str) -> Result<()> {
    let with_llama = rows.iter().any(|row| row.llama.is_some());
    let mut header = format!("| {title} | KL, mean | KL, P99 | greedy | greatest difference | KL of arithmetic |");
    let mut rule = "|---|---|---|---|---|---|".to_string();
    if with_llama {
        header +=
            " llama.cpp: KL, mean | KL, P99 | greedy | greatest difference | KL of arithmetic | KL, ours less its |";
        rule += "---|---|---|---|---|---|";
    }
    print_line(format_args!("{header}\n{rule}"))?;
    for row in rows {
        let mut line = format!("| {} |", name(row));
        for measured in [Some(&row.ours), row.llama.as_ref()].into_iter().flatten() {
            let Measured { to_original: found, to_rounded } = measured;
            line += &format!(
                " {} | {} | {} | {:.3} | {} |",
                nats(found.kl_mean),
                nats(found.kl_p99),
                percent(found.agreement),
                found.max_difference,
                nats(to_rounded.kl_mean),
            );
        }
        if let Some(Excess { mean, error }) = &row.excess {
            line += &format!(" {mean:+.1e} ± {error:.1e} |");
        }
        print_line(line)?;
    }
    Ok(())
}

async fn run() -> Result<()> {
    let arguments = Arguments::parse();
    let model = arguments.model.to_str().context("the model's name is not UTF-8")?;
    let original = Original::read(&arguments.model)?;
    let vocab = original.config.vocab_size;
    let sequences = match &arguments.text {
        Some(path) => read_stories(model, path).await?,
        None => sample(model, arguments.device, arguments.tokens).await?,
    };
    let positions: usize = sequences.iter().map(Vec::len).sum();
    note_line(format_args!("{positions} positions in {} sequences", sequences.len()));
    let folder = tempfile::tempdir()?;
    let bench = Bench {
        device: arguments.device,
        sequences,
        bf16_prompts: arguments.bf16_prompts,
        llama: arguments.llama,
        folder,
    };

    let exact = bench.path("f32.gguf");
    original.write(&exact, WeightType::F32)?;
    let reference = bench.ours(&exact, KvType::F32)?;
    let measure = |weights: WeightType, kv_type: KvType, file: &Path, rounded: &[f32]| -> Result<Row> {
        let compare = |logits: Vec<f32>| -> Result<Measured> {
            Ok(Measured {
                to_original: Difference::of(&logits, &reference, vocab)?,
                to_rounded: Difference::of(&logits, rounded, vocab)?,
            })
        };
        let ours = compare(bench.ours(file, kv_type)?)?;
        let llama = bench.llama.as_deref().map(|program| compare(bench.llama(program, file, kv_type)?)).transpose()?;
        note_line(format_args!("weights {weights}, KV {kv_type}"));
        let excess = llama.as_ref().map(|llama| Excess::of(&ours.to_original, &llama.to_original));
        Ok(Row { weights: weights.name(), kv: kv_type.name(), ours, llama, excess })
    };
    let types = if arguments.types.is_empty() { TYPES.to_vec() } else { arguments.types };
    let mut weights = Vec::new();
    for dtype in types {
        let (file, wide) = (bench.path("typed.gguf"), bench.path("rounded.gguf"));
        let rounded = original.write(&file, dtype)?;
        let rounded = rounded.into_iter().map(|(name, tensor)| Ok((name, QTensor::quantize(&tensor, GgmlDType::F32)?)));
        original.write_stored(&wide, &rounded.collect::<Result<_>>()?)?;
        let rounded = bench.ours(&wide, KvType::F32)?;
        weights.push(measure(dtype, KvType::F32, &file, &rounded)?);
    }
    let mut kv = Vec::new();
    for kv_type in KvType::ALL {
        kv.push(measure(WeightType::F32, kv_type, &exact, &reference)?);
    }
    if arguments.json {
        let output = serde_json::json!({ "model": model, "positions": positions, "weights": weights, "kv": kv });
        return Ok(print_line(output)?);
    }
    print_table("weights (KV in F32)", &weights, |row| row.weights)?;
    print_line("")?;
    print_table("KV (weights in F32)", &kv, |row| row.kv)
}

#[tokio::main]
async fn main() -> ExitCode {
    common::program(run()).await
}
