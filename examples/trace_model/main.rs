//! Shows what the layers of a model do with a prompt: activations and what is wrong with them, where heads look, which
//! token each layer would have chosen, how the KV cache fares, and what quantisation costs.
//!
//! ```text
//! cargo run --release --example trace_model -- --max-tokens 12
//! cargo run --release --example trace_model -- --layers 0,7 --heads 1,5 --track 300,17 --json trace.json
//! cargo run --release --example trace_model -- --model models/demo/demo-q4_0.gguf --reference models/demo
//! ```
//!
//! With `--reference`, every tensor is compared with that of the full-precision model, and then the logits: both models
//! compute the prompt and what was generated, one token at a time on the first device.

#[path = "../common/mod.rs"]
mod common;
mod report;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use candle_pipeline::backend::{MicroBatch, SequenceId, SequenceSlice, StageBackend, StageOutput, Wanted};
use candle_pipeline::instrument::queue::QueueOptions;
use candle_pipeline::instrument::tracer::activation::merged;
use candle_pipeline::instrument::tracer::attention::{AttentionTraceConfig, LayerAttention, by_layer};
use candle_pipeline::instrument::tracer::quant_error::{ErrorSums, QuantError, kl_divergence};
use candle_pipeline::instrument::tracer::{ModelTracerConfig, TracerHandle, TracerSnapshot, trace};
use candle_pipeline::instrument::{LayerActivations, Probe, Watch};
use candle_pipeline::model::quantisation::{ModelWeights, compare};
use candle_pipeline::{DeviceSpec, ExecutorOptions, HeterogeneousPipeline, PipelineOptions, Tokenizer};
use clap::{CommandFactory, FromArgMatches, Parser};
use common::files::OutputFile;
use common::output::{print, print_line};
use common::{Flags, OutputFormat, greedy};
use serde::Serialize;

/// Shows what the layers of a model do with a prompt.
#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    flags: Flags,
    /// Layers whose heads are traced; all when absent.
    #[arg(long, value_delimiter = ',')]
    layers: Option<Vec<usize>>,
    /// Query heads that are traced; all when absent.
    #[arg(long, value_delimiter = ',')]
    heads: Option<Vec<usize>>,
    /// Token ids to follow through the layers; the last layer's favourites when absent.
    #[arg(long, value_delimiter = ',')]
    track: Option<Vec<u32>>,
    /// Most likely tokens that are kept of each layer, and followed where none are named.
    #[arg(long, default_value_t = 5)]
    lens_top: usize,
    /// Generated tokens that the logit lens is shown of.
    #[arg(long, default_value_t = 3)]
    lens_rows: usize,
    /// Bytes that all traces together may hold.
    #[arg(long, default_value_t = 64 << 20)]
    max_bytes: usize,
    /// The model in full precision that a quantised one was made from: a folder, a .gguf file or a hub id.
    #[arg(long)]
    reference: Option<String>,
    /// Tensors that the quantisation errors are shown of, worst first.
    #[arg(long, default_value_t = 12)]
    tensors: usize,
    /// A file for everything that was found. An earlier report is replaced, other files are left alone.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// How the logits of a model differ from its reference's.
#[derive(Debug, Serialize)]
struct LogitDifference {
    /// Positions compared.
    positions: usize,
    /// Kullback-Leibler divergence from the reference, in nats: mean over the positions.
    kl_mean: f64,
    /// The greatest, and where.
    kl_max: f64,
    kl_max_position: usize,
    /// Part of the positions with the same most likely token.
    agreement: f64,
}

/// Everything that is shown.
#[derive(Serialize)]
struct Report {
    model: String,
    reference: Option<String>,
    prompt: Vec<u32>,
    tokens: Vec<u32>,
    text: Option<String>,
    /// Of all forward passes that were kept, merged.
    layers: Vec<LayerActivations>,
    attention: Vec<LayerAttention>,
    logits: Option<LogitDifference>,
    trace: TracerSnapshot,
    #[serde(skip)]
    tokenizer: Option<Tokenizer>,
}

impl Report {
    /// A token as text in quotes, or its number.
    fn token(&self, token: u32) -> String {
        match self.tokenizer.as_ref().and_then(|tokenizer| tokenizer.decode(&[token], false).ok()) {
            Some(text) => format!("{text:?}"),
            None => token.to_string(),
        }
    }
}

/// Whether a file begins as the report of `--json` does.
fn is_report(head: &[u8]) -> bool {
    let head = String::from_utf8_lossy(head);
    head.starts_with("{\n  \"model\": \"") && head.contains("\n  \"reference\": ")
}

/// The layers of all forward passes, each as if all rows had been in one.
fn merged_layers(trace: &TracerSnapshot) -> Vec<LayerActivations> {
    let mut layers: Vec<LayerActivations> = Vec::new();
    for layer in trace.forwards.iter().flat_map(|forward| &forward.layers) {
        match layers.binary_search_by_key(&layer.layer, |known| known.layer) {
            Ok(index) => layers[index] = merged(&layers[index], layer),
            Err(index) => layers.insert(index, *layer),
        }
    }
    layers
}

/// Compares all tensors of a model with those of its reference.
fn compare_tensors(
    model: &HeterogeneousPipeline,
    reference: &HeterogeneousPipeline,
    handle: &TracerHandle,
) -> Result<()> {
    let weights = |pipeline: &HeterogeneousPipeline| (pipeline.weights().clone(), pipeline.config().clone());
    let ((found, config), (reference, reference_config)) = (weights(model), weights(reference));
    compare(
        ModelWeights { weights: &*found, config: &config },
        ModelWeights { weights: &*reference, config: &reference_config },
        &mut |error| handle.record_quant_error(error),
    )?;
    Ok(())
}

/// A whole model on one device, fed one token at a time.
struct Whole {
    backend: Box<dyn StageBackend>,
    vocab: usize,
}

impl Whole {
    const SEQUENCE: SequenceId = SequenceId(0);

    fn load(device: DeviceSpec, model: &str, options: &PipelineOptions, positions: usize) -> Result<Whole> {
        let options = PipelineOptions { split: Default::default(), ..options.clone() };
        let pipeline = HeterogeneousPipeline::with_options(&[device], model, options)?;
        let mut backend = pipeline.stage_source(0).load(&|_| {})?;
        backend.open(Self::SEQUENCE, positions)?;
        Ok(Whole { backend, vocab: pipeline.config().vocab_size })
    }

    fn logits(&mut self, position: usize, token: u32) -> Result<Vec<f32>> {
        let slice = SequenceSlice {
            id: Self::SEQUENCE,
            position,
            len: 1,
            length: position + 1,
            decode: true,
            wanted: Wanted::Logits { rows: 1 },
        };
        let batch = MicroBatch { slices: vec![slice], tokens: vec![token] };
        match self.backend.forward(&batch, None, &mut Watch::off())? {
            StageOutput::Logits(logits) => logits.into_iter().next().context("no logits"),
            _ => bail!("a whole model gave no logits"),
        }
    }
}

/// Compares logits at every position, both models being given the same tokens.
fn compare_logits(
    mut model: Whole,
    mut reference: Whole,
    tokens: &[u32],
    handle: &TracerHandle,
) -> Result<LogitDifference> {
    ensure!(model.vocab == reference.vocab, "the vocabularies differ: {} and {}", model.vocab, reference.vocab);
    let mut sums = ErrorSums::default();
    let (mut divergences, mut same) = (Vec::with_capacity(tokens.len()), 0);
    for (position, &token) in tokens.iter().enumerate() {
        let (found, expected) = (model.logits(position, token)?, reference.logits(position, token)?);
        sums.add(&expected, &found)?;
        divergences.push(kl_divergence(&expected, &found));
        same += usize::from(greedy(&found) == greedy(&expected));
    }
    let count = divergences.len().max(1) as f64;
    let kl_mean = divergences.iter().sum::<f64>() / count;
    handle.record_quant_error(QuantError { kl: Some(kl_mean), ..sums.finish("logits") });
    let worst = (0..divergences.len()).max_by(|&a, &b| divergences[a].total_cmp(&divergences[b])).unwrap_or(0);
    Ok(LogitDifference {
        positions: divergences.len(),
        kl_mean,
        kl_max: divergences.get(worst).copied().unwrap_or(0.0),
        kl_max_position: worst,
        agreement: same as f64 / count,
    })
}

async fn run() -> Result<()> {
    // A report of 400 tokens is a long one.
    let command = Arguments::command().mut_arg("max_tokens", |argument| argument.default_value("12"));
    let arguments = Arguments::from_arg_matches(&command.get_matches()).map_err(|error| error.exit())?;
    let flags = &arguments.flags;
    let generation = flags.generation()?;
    let json = arguments.json.as_deref().map(|path| OutputFile::new("--json", path, is_report)).transpose()?;
    let largest = |list: &Option<Vec<usize>>| list.iter().flatten().copied().max();
    let (layers, heads) = (arguments.layers, arguments.heads);
    let tracked = arguments.track.iter().flatten().map(|token| *token as usize).max();
    let attention =
        AttentionTraceConfig { layers: layers.clone(), heads: heads.clone(), ..AttentionTraceConfig::default() };
    let config = ModelTracerConfig {
        attention: Some(attention),
        tracked_tokens: arguments.track,
        top_k: arguments.lens_top,
        max_bytes: arguments.max_bytes,
        ..ModelTracerConfig::full()
    };
    let (queue, tracer) = trace(config, QueueOptions::default())?;
    let options = ExecutorOptions { probe: Probe::new(queue), ..ExecutorOptions::default() };
    let executor = flags.load_with(options).await?;
    let model = executor.pipeline().config().clone();
    for (flag, given, limit) in [
        ("--layers", largest(&layers), model.num_hidden_layers),
        ("--heads", largest(&heads), model.num_attention_heads),
        ("--track", tracked, model.vocab_size),
    ] {
        if let Some(given) = given.filter(|given| *given >= limit) {
            bail!("{flag} {given}: the model has 0 to {}", limit - 1);
        }
    }
    let tokenizer = executor.tokenizer().cloned();
    let prompts = flags.prompts(executor.needed_tokenizer(), &["Once upon a time"])?;
    let [prompt] = prompts.as_slice() else { bail!("one prompt, please: a report is of one") };
    // An error is shown behind the report: what the layers did may be its cause.
    let outcome = executor.infer_with(prompt, &generation).await;
    let tokens = outcome.as_ref().map_or(Vec::new(), |generation| generation.tokens.clone());
    let pipeline = executor.pipeline().clone();
    // Its last step is over when its threads have ended.
    drop(executor);

    let handle = tracer.handle();
    let mut logits = None;
    if let Some(reference) = &arguments.reference {
        let device = *DeviceSpec::parse_list(&flags.devices)?.first().context("--devices is empty")?;
        let options = flags.pipeline()?;
        compare_tensors(&pipeline, &HeterogeneousPipeline::new(&[device], reference)?, &handle)?;
        // The last token has been chosen, not computed.
        let mut all = prompt.clone();
        all.extend(&tokens[..tokens.len().saturating_sub(1)]);
        let load = |model: &str| Whole::load(device, model, &options, all.len());
        if outcome.is_ok() {
            logits = Some(compare_logits(load(&flags.model)?, load(reference)?, &all, &handle)?);
        }
    }
    drop(pipeline);
    let trace = tracer.close();
    let report = Report {
        model: flags.model.clone(),
        reference: arguments.reference,
        prompt: prompt.clone(),
        text: tokenizer.as_ref().map(|tokenizer| tokenizer.decode(&tokens, false)).transpose()?,
        tokens,
        layers: merged_layers(&trace),
        attention: by_layer(trace.forwards.iter().flat_map(|forward| &forward.attention)),
        logits,
        trace,
        tokenizer,
    };
    if let Some(file) = json {
        file.write(&serde_json::to_vec_pretty(&report)?)?;
    }
    match flags.output_format {
        OutputFormat::Text => {
            print(report::Text { report: &report, shown: arguments.lens_rows, tensors: arguments.tensors })?;
        }
        OutputFormat::Json => print_line(serde_json::to_string(&report)?)?,
        OutputFormat::None => {}
    }
    outcome?;
    Ok(())
}

#[tokio::main]
async fn main() -> ExitCode {
    common::program(run()).await
}
