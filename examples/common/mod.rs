//! What the examples share: flags, loading with a progress bar, and output.
#![allow(dead_code)] // each example uses a part

pub mod cases;
pub mod files;
pub mod instruments;
pub mod interrupt;
pub mod logs;
pub mod output;
pub mod ratio;
pub mod sampling;
pub mod warnings;

use std::future::Future;
use std::io::IsTerminal;
use std::ops::Deref;
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use candle_pipeline::instrument::WriteFailures;
use candle_pipeline::weights::WeightType;
use candle_pipeline::{
    ChatMessage, ChatOptions, DEMO_MODEL, DeviceSpec, ExecutorOptions, GenerationOptions, HeterogeneousPipeline,
    HeterogeneousPipelineExecutor, Isa, KvType, LinkOptions, MeasuredSplit, MetalExtOptions, Objective,
    PipelineOptions, SimulatedLink, Split, StageStats, Tokenizer, WireType,
};
use clap::builder::{PathBufValueParser, TypedValueParser};
use clap::{Parser, ValueEnum};

use self::instruments::Instruments;
use self::output::{note, note_line};
use self::sampling::Sampling;

/// What goes to stdout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OutputFormat {
    /// The answer and nothing else.
    Text,
    /// One JSON object.
    Json,
    /// Nothing.
    None,
}

/// Flags that every example takes.
#[derive(Debug, Clone, Parser)]
pub struct Flags {
    /// Model: a folder in Hugging Face layout, a .gguf file, or a hub id (`org/name`).
    #[arg(long, default_value = DEMO_MODEL)]
    pub model: String,
    /// Devices of the stages, in order: cpu, cpu@threads=N, cuda:N, metal:N.
    #[arg(long, default_value = "cpu,cpu")]
    pub devices: String,
    /// Layers of each stage (`5,3`), or what to plan them by: `bytes` (free memory) or `measured` (time on this machine).
    #[arg(long, default_value = "bytes")]
    pub split: String,
    /// What a measured split is to be best at: latency (of one sequence) or throughput (of all).
    #[arg(long, default_value = "latency")]
    pub objective: Objective,
    /// Sequences at once: those that a measured split is for, and those that an example which runs several runs.
    #[arg(long, default_value_t = 1)]
    pub sequences: usize,
    /// File that keeps what a measured split has measured; in the user's cache folder when absent. Files that hold anything
    /// else are left alone.
    #[arg(long)]
    pub cost_cache: Option<std::path::PathBuf>,
    /// Measure again what the file has.
    #[arg(long)]
    pub remeasure: bool,
    /// Pretend that the links between stages are slow: latency in ms, and after a comma bytes a second (`5,1.25e9`).
    #[arg(long)]
    pub link: Option<SimulatedLink>,
    /// Type of activations between devices: f32 (exact), f16 or bf16; as computed (exact) when absent.
    #[arg(long)]
    pub wire_type: Option<WireType>,
    /// The prompt. May be repeated where an example takes several.
    #[arg(long)]
    pub prompt: Vec<String>,
    /// A file with the prompt; - reads standard input.
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    #[arg(value_parser = PathBufValueParser::new().try_map(PromptFile::read))]
    pub prompt_file: Option<PromptFile>,
    /// The prompt as token ids, for models without a tokenizer.
    #[arg(long, conflicts_with_all = ["prompt", "prompt_file"])]
    pub token_ids: Vec<String>,
    /// Wrap the prompt in the model's chat template.
    #[arg(long)]
    pub chat: bool,
    /// A variable of the chat template, as JSON or text: `enable_thinking=false`. May be repeated.
    #[arg(long, value_name = "NAME=VALUE", requires = "chat", value_parser = parse_chat_var)]
    pub chat_var: Vec<(String, serde_json::Value)>,
    /// Type for F32, F16 and BF16 weights: f32, f16 or bf16.
    #[arg(long)]
    pub dtype: Option<String>,
    /// Type of keys and values on CPU stages: f32, f16 or q8_0.
    #[arg(long, default_value_t)]
    pub kv_type: KvType,
    /// Instructions that CPU stages use: avx512, avx2, neon, scalar, as far as the CPU has them. The best when absent.
    #[arg(long)]
    pub isa: Option<Isa>,
    /// Compute prompts in BF16 on CPU stages with AMX: faster for one sequence at a time.
    #[arg(long)]
    pub bf16_prompts: bool,
    /// Decode on Apple GPUs with candle's kernels instead of the fused ones.
    #[arg(long)]
    pub no_fused: bool,
    /// Positions of a sequence, prompt and output together; the model's own limit when absent.
    #[arg(long, visible_alias = "context")]
    pub context_length: Option<usize>,
    /// What goes to stdout.
    #[arg(long, value_enum, default_value_t = OutputFormat::Text)]
    pub output_format: OutputFormat,
    #[command(flatten)]
    pub sampling: Sampling,
    #[command(flatten)]
    pub logs: logs::Logs,
}

/// A prompt that was read from a file when the command line was.
#[derive(Debug, Clone)]
pub struct PromptFile {
    /// The file, or - for standard input.
    pub path: std::path::PathBuf,
    /// What was in it.
    pub text: String,
}

impl PromptFile {
    fn read(path: std::path::PathBuf) -> Result<PromptFile, String> {
        let text = files::read_text(&path).map_err(|error| format!("{error:#}"))?;
        Ok(PromptFile { path, text })
    }
}

impl Flags {
    /// Options for a generation.
    pub fn generation(&self) -> Result<GenerationOptions> {
        Ok(self.sampling.options()?)
    }

    /// Options for a plan.
    pub fn pipeline(&self) -> Result<PipelineOptions> {
        let split = match self.split.as_str() {
            "bytes" => Split::Bytes,
            "measured" => Split::Measured(self.measured()),
            counts => {
                let count = |count: &str| count.trim().parse().ok();
                let counts = counts.split(',').map(count).collect::<Option<_>>();
                let wanted = "write `bytes`, `measured` or the layers of each stage, as in 5,3";
                Split::Layers(counts.with_context(|| format!("--split {}: {wanted}", self.split))?)
            }
        };
        Ok(PipelineOptions {
            split,
            link: LinkOptions { wire_type: self.wire_type, simulated: self.link, ..LinkOptions::default() },
            context_length: self.context_length,
            dtype: self.dtype.as_deref().map(parse_dtype).transpose()?,
            kv_type: self.kv_type,
            isa: self.isa,
            bf16_prompts: self.bf16_prompts,
            metal: MetalExtOptions { fused: !self.no_fused, ..metal_options()? },
            ..PipelineOptions::default()
        })
    }

    /// Options for a measured split.
    pub fn measured(&self) -> MeasuredSplit {
        let cache = || Some(dirs::cache_dir()?.join("candle-pipeline").join("costs.json"));
        let cache_failures = WriteFailures::default();
        // A cache that nobody asked for is no loss.
        if let Some(path) = &self.cost_cache {
            logs::watch(format!("--cost-cache {}", path.display()), "file", &cache_failures);
        }
        MeasuredSplit {
            objective: self.objective,
            sequences: self.sequences,
            cache: self.cost_cache.clone().or_else(cache),
            remeasure: self.remeasure,
            cache_failures,
        }
    }

    /// Plans and loads the model, showing both on stderr.
    pub async fn load(&self) -> Result<Loaded> {
        self.load_with(ExecutorOptions::default()).await
    }

    /// The same with executor options.
    pub async fn load_with(&self, options: ExecutorOptions) -> Result<Loaded> {
        self.load_watched(options, Instruments::default()).await
    }

    /// The same with collectors beside those that the environment asks for.
    pub async fn load_watched(&self, options: ExecutorOptions, instruments: Instruments) -> Result<Loaded> {
        self.load_planned(self.plan().await?, options, instruments).await
    }

    /// Plans the model, which reads headers only.
    pub async fn plan(&self) -> Result<HeterogeneousPipeline> {
        // Options are checked before anything is read or printed.
        self.generation()?;
        let devices = DeviceSpec::parse_list(&self.devices)?;
        let plan = self.pipeline()?;
        let model = self.model.clone();
        // Planning reads files and may download, which must not hold up the runtime.
        Ok(tokio::task::spawn_blocking(move || HeterogeneousPipeline::with_options(&devices, &model, plan)).await??)
    }

    /// Loads what was planned, showing it on stderr.
    pub async fn load_planned(
        &self,
        pipeline: HeterogeneousPipeline,
        options: ExecutorOptions,
        mut instruments: Instruments,
    ) -> Result<Loaded> {
        instruments.add_from_environment()?;
        if self.output_format != OutputFormat::None {
            note(&pipeline);
        }
        let (progress, bar) = loading_bar(pipeline.stages().iter().map(|stage| stage.weight_bytes).sum());
        let tokenizer: Arc<OnceLock<Tokenizer>> = Arc::default();
        let probe = options.probe.and(instruments.collectors()).and(self.logs.start(&tokenizer)?);
        let options = ExecutorOptions { progress: Some(progress), probe, ..options };
        let executor = HeterogeneousPipelineExecutor::with_options(pipeline, &self.model, options).await?;
        bar.finish_and_clear();
        if let Some(loaded) = executor.tokenizer() {
            let _ = tokenizer.set(loaded.clone());
        }
        if self.output_format != OutputFormat::None {
            note_line(format_args!("ready in {:.2?}", executor.load_time()));
        }
        Ok(Loaded { executor, _instruments: instruments })
    }

    /// The prompts as token ids: those given, or `defaults`.
    pub fn prompts(&self, tokenizer: candle_pipeline::Result<&Tokenizer>, defaults: &[&str]) -> Result<Vec<Vec<u32>>> {
        if !self.token_ids.is_empty() {
            return self.token_ids.iter().map(|list| parse_ids(list)).collect();
        }
        let texts: Vec<String> = match &self.prompt_file {
            Some(file) => vec![file.text.clone()],
            None if self.prompt.is_empty() => defaults.iter().map(|text| text.to_string()).collect(),
            None => self.prompt.clone(),
        };
        let tokenizer = tokenizer.context("a prompt of text needs a tokenizer; --token-ids does without")?;
        let variables = self.chat_var.iter().cloned().collect();
        let options = ChatOptions::prompt().with_variables(variables);
        let encode = |text: String| match self.chat {
            true => tokenizer.encode_chat_with(&[ChatMessage::user(text)], &options),
            false => tokenizer.encode(&text, true),
        };
        Ok(texts.into_iter().map(encode).collect::<candle_pipeline::Result<_>>()?)
    }
}

/// What the environment says about metal-ext's kernels: `METALLIC_GEMV_COLS_PER_TG` (2, 4 or 8) and
/// `METALLIC_SOFTMAX_BACKEND` (auto, kernel or candle).
fn metal_options() -> Result<MetalExtOptions> {
    let mut options = MetalExtOptions::default();
    if let Ok(columns) = std::env::var("METALLIC_GEMV_COLS_PER_TG") {
        let wrong = || format!("METALLIC_GEMV_COLS_PER_TG={columns}: expected 2, 4 or 8");
        let columns: usize = columns.trim().parse().with_context(wrong)?;
        options.columns_per_threadgroup = columns.try_into().with_context(wrong)?;
    }
    if let Ok(backend) = std::env::var("METALLIC_SOFTMAX_BACKEND") {
        options.softmax_backend =
            backend.trim().parse().with_context(|| format!("METALLIC_SOFTMAX_BACKEND={backend}"))?;
    }
    Ok(options)
}

/// A loaded model, and what watches it until it is dropped.
pub struct Loaded {
    executor: HeterogeneousPipelineExecutor,
    _instruments: Instruments, // dropped after the executor has told its last event
}

impl Deref for Loaded {
    type Target = HeterogeneousPipelineExecutor;

    fn deref(&self) -> &HeterogeneousPipelineExecutor {
        &self.executor
    }
}

/// Token ids with commas between them.
pub fn parse_ids(list: &str) -> Result<Vec<u32>> {
    let id = |id: &str| id.trim().parse().with_context(|| format!("--token-ids: `{id}` is no token id"));
    list.split(',').filter(|id| !id.trim().is_empty()).map(id).collect()
}

/// `NAME=VALUE`; a value that is not JSON is a text.
fn parse_chat_var(text: &str) -> Result<(String, serde_json::Value)> {
    let (name, value) = text.split_once('=').with_context(|| format!("`{text}`: expected NAME=VALUE"))?;
    Ok((name.to_owned(), serde_json::from_str(value).unwrap_or_else(|_| value.into())))
}

fn parse_dtype(name: &str) -> Result<WeightType> {
    Ok(match name.to_ascii_lowercase().as_str() {
        "f32" => WeightType::F32,
        "f16" => WeightType::F16,
        "bf16" => WeightType::BF16,
        _ => bail!("--dtype {name}: one of f32, f16, bf16"),
    })
}

/// A bar on stderr while weights arrive, if a terminal watches.
fn loading_bar(total: u64) -> (Arc<dyn Fn(u64, u64) + Send + Sync>, indicatif::ProgressBar) {
    let bar = match std::io::stderr().is_terminal() {
        true => indicatif::ProgressBar::new(total),
        false => indicatif::ProgressBar::hidden(),
    };
    let style = indicatif::ProgressStyle::with_template("loading {bar:40} {bytes}/{total_bytes}");
    bar.set_style(style.expect("the template is a constant"));
    let shown = bar.clone();
    (Arc::new(move |loaded, _total| shown.set_position(loaded)), bar)
}

/// The stages for JSON output.
pub fn stages_json(executor: &HeterogeneousPipelineExecutor) -> serde_json::Value {
    let stages = executor.stages().iter().zip(executor.memory());
    stages
        .map(|(stage, memory)| {
            serde_json::json!({
                "device": stage.device.to_string(),
                "first_layer": stage.layers.start,
                "last_layer": stage.layers.end - 1,
                "bytes": memory.weights,
                "kv_bytes_per_token": stage.kv_bytes_per_token,
            })
        })
        .collect()
}

/// Where each stage's time has gone since `before`.
pub fn stage_table(executor: &HeterogeneousPipelineExecutor, before: &[StageStats]) -> String {
    let mut table = format!(
        "{:<5}  {:<15} {:>8} {:>10} {:>10} {:>10} {:>10} {:>6}\n",
        "stage", "device", "steps", "rows/step", "compute", "wait", "copy", "busy"
    );
    for (index, (stats, before)) in executor.stage_stats().iter().zip(before).enumerate() {
        let stats = stats.since(before);
        table += &format!(
            "{index:<5}  {:<15} {:>8} {:>10.1} {:>10} {:>10} {:>10} {:>5.0}%\n",
            stats.device.to_string(),
            stats.steps,
            stats.rows as f64 / stats.steps.max(1) as f64,
            format!("{:.1?}", stats.compute),
            format!("{:.1?}", stats.wait),
            format!("{:.1?}", stats.copy),
            100.0 * stats.busy_share(),
        );
    }
    table
}

/// Tokens of the run over its whole time, and decode alone (the first token belongs to prefill).
pub fn rates(tokens: usize, ttft: Duration, total: Duration) -> (f64, f64) {
    let rate = |tokens: usize, time: Duration| if time.is_zero() { 0.0 } else { tokens as f64 / time.as_secs_f64() };
    (rate(tokens, total), rate(tokens.saturating_sub(1), total.saturating_sub(ttft)))
}

/// The most likely token, the lowest id among equals.
pub fn greedy(logits: &[f32]) -> usize {
    (0..logits.len()).reduce(|best, index| if logits[index] > logits[best] { index } else { best }).unwrap_or(0)
}

/// Runs a program of the tokio runtime to its exit code, with warnings on stderr and Ctrl-C as [`interrupt`] says.
pub async fn program(run: impl Future<Output = Result<()>>) -> ExitCode {
    warnings::show();
    end(interrupt::run(run).await)
}

/// Ends a program whose result is known and whose logs are closed.
pub fn end(result: Result<()>) -> ExitCode {
    let code = output::exit(result);
    match logs::check() {
        Ok(()) => code,
        // It is said once: beside an error that ended the program, and instead of success.
        incomplete => output::exit(incomplete),
    }
}
