//! What three things gain that matter most on Metal: the tables of rotary embeddings, the kept attention masks, and the
//! warmup. Each is measured with and without, in pairs in random order, on every device that there is; where there is
//! no Metal device it says what that leaves open, and measures the CPU counterpart.
//!
//! ```text
//! cargo run --release --example benchmark_metal_optimizations -- --devices metal:0
//! ```
//!
//! The whole model is one stage, and forward passes are timed with no scheduler around them, from the tokens to the logits
//! in this process's memory. Two backends are measured on a CPU: its own, and the one over candle's tensors that GPUs run
//! (`candle`), which alone needs masks. For the comparison rotary tables are switched off with `Ropes::afresh`, masks with
//! `CandleBackend::keep_masks(0)`; neither changes a bit of the logits, which is checked. The warmup is measured through
//! the executor, on the first token of one that was just loaded: kernels that the driver caches on disk or in the process
//! stay there, so this is the least that it gains. `profile_pipeline --phases warmup` measures it with new processes.

mod common;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, ensure};
use candle_pipeline::backend::{
    CandleBackend, MicroBatch, SequenceId, SequenceSlice, StageBackend, StageOutput, StageSource, Wanted,
};
use candle_pipeline::device::hardware_name;
use candle_pipeline::instrument::Watch;
use candle_pipeline::model::rope::Ropes;
use candle_pipeline::{DeviceSpec, GenerationOptions, present_devices};
use clap::parser::ValueSource;
use clap::{CommandFactory, FromArgMatches, Parser};
use common::cases::Case;
use common::output::print_line;
use common::ratio::Ratio;
use common::{Flags, OutputFormat};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    flags: Flags,
    /// Pairs of each measurement.
    #[arg(long, default_value_t = 30)]
    pairs: usize,
    /// Pairs of executors that are loaded for the warmup.
    #[arg(long, default_value_t = 10)]
    loads: usize,
    /// Prompt tokens; fewer where the context is shorter.
    #[arg(long, default_value_t = 256)]
    prompt_tokens: usize,
    /// Print one JSON object instead of the tables.
    #[arg(long)]
    json: bool,
}

/// One thing, with and without.
#[derive(serde::Serialize)]
struct Measured {
    /// What was switched.
    what: &'static str,
    /// Who computed.
    backend: &'static str,
    /// What was computed.
    work: String,
    pairs: usize,
    /// Microseconds without over microseconds with.
    without_over_with: Ratio,
}

#[tokio::main]
async fn main() -> ExitCode {
    common::program(run()).await
}

async fn run() -> Result<()> {
    let matches = Arguments::command().get_matches();
    let mut arguments = Arguments::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    if matches.value_source("devices") == Some(ValueSource::DefaultValue) {
        // Every device, one after the other.
        let present = present_devices().iter().map(DeviceSpec::to_string).collect::<Vec<_>>();
        arguments.flags.devices = present.join(",");
    }
    let &Arguments { pairs, loads, prompt_tokens, json, .. } = &arguments;
    ensure!(pairs > 0 && loads > 0 && prompt_tokens > 1, "--pairs and --loads must be at least 1, --prompt-tokens 2");
    let devices = DeviceSpec::parse_list(&arguments.flags.devices)?;
    let metal = devices.iter().any(|device| matches!(device, DeviceSpec::Metal(_)));
    let cannot: &[&str] = match metal {
        true => &[],
        false => &[
            "no Metal device was measured: what compiling Metal's kernels costs before the first token is not known from \
             this run",
            "uploads of tables and masks to a GPU are not in these times: on a CPU they are written in place",
        ],
    };
    let mut reports = Vec::new();
    for device in devices {
        let hardware = hardware_name(device);
        let measured = measure(&arguments, device).await?;
        if !json {
            print_line(format_args!("{device} ({hardware})"))?;
            let (backend, with) = ("backend", "with, us");
            print_line(format_args!(
                "{:<13} {backend:<8} {:<34} {with:>10} {:>10}  slower without",
                "", "", "without"
            ))?;
            for measured in &measured {
                print_line(measured.row())?;
            }
        }
        reports.push(serde_json::json!({ "device": device.to_string(), "hardware": hardware, "measured": measured }));
    }
    if json {
        let output = serde_json::json!({ "model": arguments.flags.model, "cannot": cannot, "devices": reports });
        print_line(output)?;
    } else {
        print_line("medians; in brackets what 95 of 100 such measurements would give")?;
        for cannot in cannot {
            print_line(cannot)?;
        }
        print_line("a decode step needs no mask, so keeping them gains nothing there")?;
    }
    Ok(())
}

impl Measured {
    fn row(&self) -> String {
        let Measured { what, backend, work, without_over_with: ratio, .. } = self;
        format!("{what:<13} {backend:<8} {work:<34} {:>10.1} {:>10.1}  {}", ratio.second, ratio.first, ratio.percent())
    }
}

async fn measure(arguments: &Arguments, device: DeviceSpec) -> Result<Vec<Measured>> {
    let flags = Flags { devices: device.to_string(), output_format: OutputFormat::None, ..arguments.flags.clone() };
    let pipeline = flags.plan().await?;
    let source = pipeline.stage_source(0);
    let afresh =
        StageSource { ropes: Arc::new(Ropes::afresh(pipeline.config(), &source.device.device)), ..source.clone() };
    let prompt = arguments.prompt_tokens.min(pipeline.context_length() / 2).max(2);
    let case = Case { prompt, generate: 0, sequences: 1 };
    let tokens = case.prompts(pipeline.config().vocab_size).concat();
    let random = &mut ChaCha8Rng::seed_from_u64(1);
    let mut all = Vec::new();

    let works = [Work::Prefill(tokens.clone()), Work::Decode(prompt)];
    if source.device.cpu.is_some() {
        let (mut with, mut without) = (source.load(&|_| {})?, afresh.load(&|_| {})?);
        for work in &works {
            let one = |timed| match timed {
                Switched::On => work.time(&mut *with),
                Switched::Off => work.time(&mut *without),
            };
            all.push(measured("rotary tables", "cpu", work, arguments.pairs, random, one)?);
        }
    }
    let mut with = CandleBackend::load(&source, &|_| {})?;
    {
        let mut without = CandleBackend::load(&afresh, &|_| {})?;
        for work in &works {
            let one = |timed| match timed {
                Switched::On => work.time(&mut with),
                Switched::Off => work.time(&mut without),
            };
            all.push(measured("rotary tables", "candle", work, arguments.pairs, random, one)?);
        }
    }
    let one = |timed| {
        with.keep_masks(if timed == Switched::On { KEPT_MASKS } else { 0 });
        works[0].time(&mut with)?; // after the switch, what is to be kept is there again
        works[0].time(&mut with)
    };
    all.push(measured("masks", "candle", &works[0], arguments.pairs, random, one)?);
    drop(with);

    // Of a short prompt, so that computing it does not hide the rest.
    let first = tokens.len().min(4);
    let mut pairs = Vec::new();
    for _ in 0..arguments.loads {
        let mut pair = [0.0; 2];
        for switched in order(random) {
            let executor = flags.load().await?;
            if switched == Switched::On {
                executor.warmup().await?;
            }
            let options = GenerationOptions { ignore_eos: true, ..GenerationOptions::new(2, 0.0, 1.0) };
            let generated = executor.infer_with(&tokens[..first], &options).await?;
            pair[switched as usize] = generated.time_to_first_token.as_nanos() as f64 / 1e3;
        }
        pairs.push((pair[Switched::Off as usize], pair[Switched::On as usize]));
    }
    all.push(Measured {
        what: "warmup",
        backend: if source.device.cpu.is_some() { "cpu" } else { "candle" },
        work: format!("first token of {first}"),
        pairs: pairs.len(),
        without_over_with: Ratio::of(&pairs),
    });
    Ok(all)
}

/// As many as a backend keeps by itself.
const KEPT_MASKS: usize = 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Switched {
    On,
    Off,
}

/// Both, in random order.
fn order(random: &mut ChaCha8Rng) -> [Switched; 2] {
    match random.random() {
        true => [Switched::On, Switched::Off],
        false => [Switched::Off, Switched::On],
    }
}

/// Times pairs after one pass of each that is not counted; what is switched must not change the logits.
fn measured(
    what: &'static str,
    backend: &'static str,
    work: &Work,
    pairs: usize,
    random: &mut ChaCha8Rng,
    mut time: impl FnMut(Switched) -> Result<(f64, Vec<f32>)>,
) -> Result<Measured> {
    let same = time(Switched::On)?.1 == time(Switched::Off)?.1;
    ensure!(same, "{what} of the {backend} backend: switching them off changed the logits");
    let mut times = Vec::with_capacity(pairs);
    for _ in 0..pairs {
        let mut pair = [0.0; 2];
        for switched in order(random) {
            pair[switched as usize] = time(switched)?.0;
        }
        times.push((pair[Switched::Off as usize], pair[Switched::On as usize]));
    }
    Ok(Measured { what, backend, work: work.name(), pairs, without_over_with: Ratio::of(&times) })
}

/// What is computed.
enum Work {
    /// A prompt in one chunk.
    Prefill(Vec<u32>),
    /// Steps of one token from this position on.
    Decode(usize),
}

/// Decode steps of one measurement.
const STEPS: usize = 8;

impl Work {
    fn name(&self) -> String {
        match self {
            Work::Prefill(tokens) => format!("a prompt of {}", tokens.len()),
            Work::Decode(position) => format!("a decode step behind {position}"),
        }
    }

    /// Microseconds of the prompt or of one step, and the last logits.
    fn time(&self, backend: &mut dyn StageBackend) -> Result<(f64, Vec<f32>)> {
        let id = SequenceId(0);
        let (position, tokens, steps): (usize, &[u32], usize) = match self {
            Work::Prefill(tokens) => (0, tokens, 1),
            Work::Decode(position) => (*position, &[1], STEPS),
        };
        backend.open(id, position + tokens.len() * steps)?;
        let began = Instant::now();
        let mut last = Vec::new();
        for step in 0..steps {
            let position = position + step;
            let len = tokens.len();
            let slice = SequenceSlice {
                id,
                position,
                len,
                length: position + len,
                decode: len == 1,
                wanted: Wanted::Logits { rows: 1 },
            };
            let batch = MicroBatch { slices: vec![slice], tokens: tokens.to_vec() };
            let StageOutput::Logits(logits) = backend.forward(&batch, None, &mut Watch::off())? else {
                anyhow::bail!("the whole model gave no logits");
            };
            last = logits.concat();
        }
        let time = began.elapsed().as_nanos() as f64 / 1e3 / steps as f64;
        backend.close(id);
        Ok((time, last))
    }
}
