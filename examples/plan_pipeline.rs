//! Measures a model on devices and prints the best cut, with what it is expected to do. Nothing is kept loaded.
//!
//! ```text
//! cargo run --release --example plan_pipeline -- --devices cpu@threads=1,cpu@threads=1 --objective throughput --sequences 8
//! ```
//!
//! What one does not have can be planned for: `--slow 1=3` makes the second device three times slower, `--link 5` gives
//! every link a latency of 5 ms. `--verify 3` then tries every cut in three rounds, slowed in the same way, each time after
//! measuring anew, and says how far the medians of the predictions and the planned cut are from what it finds:
//!
//! ```text
//! cargo run --release --example plan_pipeline -- --devices cpu@threads=1,cpu@threads=1 --context 64 \
//!     --slow 1=3 --link 5 --verify 3
//! ```

mod common;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use candle_core::Tensor;
use candle_pipeline::backend::{MicroBatch, SequenceId, StageBackend, StageBytes, StageOutput};
use candle_pipeline::instrument::{HiddenRow, Watch};
use candle_pipeline::pipeline::plan::{Placement, Problem};
use candle_pipeline::{
    DeviceSpec, ExecutorOptions, GenerationOptions, HeterogeneousPipeline, HeterogeneousPipelineExecutor,
    MeasuredSplit, Objective, PipelineOptions, Split,
};
use clap::Parser;
use common::Flags;
use common::output::{print, print_line};

#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    flags: Flags,
    /// Plan as if a device were slower: its index and a factor, as in 1=3. May be repeated.
    #[arg(long, value_name = "DEVICE=FACTOR")]
    slow: Vec<String>,
    /// Try every cut in this many rounds and compare. Decodes the tokens of --max-tokens, at most 16, around the middle
    /// of the context, where the plan measured.
    #[arg(long, default_value_t = 0)]
    verify: usize,
}

#[tokio::main]
async fn main() -> ExitCode {
    common::program(run()).await
}

async fn run() -> Result<()> {
    let arguments = Arguments::parse();
    let flags = &arguments.flags;
    let devices = DeviceSpec::parse_list(&flags.devices)?;
    let slow = slow_factors(&arguments.slow, devices.len())?;
    let problem = measure(flags, &devices, &slow, flags.measured()).await?;
    let plan = problem.plan(flags.objective)?;
    print(&plan)?;
    if arguments.verify > 0 {
        let planned: Vec<Placement> = plan.stages.iter().map(|stage| stage.placement.clone()).collect();
        verify(&arguments, problem, &devices, &slow, &planned).await?;
    }
    Ok(())
}

async fn measure(flags: &Flags, devices: &[DeviceSpec], slow: &[f64], measured: MeasuredSplit) -> Result<Problem> {
    let (model, options, specs) = (flags.model.clone(), flags.pipeline()?, devices.to_vec());
    // Measuring computes for seconds, which must not hold up the runtime.
    let measuring =
        tokio::task::spawn_blocking(move || HeterogeneousPipeline::measure(&specs, &model, options, &measured));
    let mut problem = measuring.await??;
    for (device, factor) in problem.devices.iter_mut().zip(slow) {
        device.cost = std::mem::take(&mut device.cost).slowed(*factor);
    }
    Ok(problem)
}

fn slow_factors(slow: &[String], devices: usize) -> Result<Vec<f64>> {
    let mut factors = vec![1.0; devices];
    for text in slow {
        let parsed: Option<(usize, f64)> =
            text.split_once('=').and_then(|(device, factor)| Some((device.parse().ok()?, factor.parse().ok()?)));
        match parsed {
            Some((device, factor)) if device < devices && (1.0..1e6).contains(&factor) => factors[device] = factor,
            _ => bail!(
                "--slow {text}: write the index of one of the {devices} devices and a factor of at least 1, as in 1=3"
            ),
        }
    }
    Ok(factors)
}

/// Tries every cut in rounds, so that a change of the machine's speed meets all of them, and the predictions too: before
/// each round but the first, for which there is `problem`, costs are measured again.
async fn verify(
    arguments: &Arguments,
    problem: Problem,
    devices: &[DeviceSpec],
    slow: &[f64],
    planned: &[Placement],
) -> Result<()> {
    let flags = &arguments.flags;
    let cuts = all_cuts(devices.len(), problem.weights.layers.len());
    let mut predicted = vec![Vec::new(); cuts.len()];
    let mut measured = vec![Vec::new(); cuts.len()];
    let mut problem = problem;
    let bar = indicatif::ProgressBar::new((arguments.verify * cuts.len()) as u64);
    for round in 0..arguments.verify {
        if round > 0 {
            let again = MeasuredSplit { cache: None, remeasure: true, ..flags.measured() };
            problem = measure(flags, devices, slow, again).await?;
        }
        for ((cut, predicted), measured) in cuts.iter().zip(&mut predicted).zip(&mut measured) {
            let prediction = problem.predict(cut);
            predicted.push(match flags.objective {
                Objective::Latency => prediction.one.seconds(),
                Objective::Throughput => prediction.all.seconds(),
            });
            measured.push(seconds_of_a_round(flags, &problem, devices, slow, cut).await?);
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    let median = |seconds: &mut Vec<f64>| {
        seconds.sort_by(f64::total_cmp);
        (seconds[(seconds.len() - 1) / 2] + seconds[seconds.len() / 2]) / 2.0
    };
    let predicted: Vec<f64> = predicted.iter_mut().map(median).collect();
    let measured: Vec<f64> = measured.iter_mut().map(median).collect();
    print_line(format_args!("{:<48}  {:>10}  {:>10}  {:>7}", "cut", "predicted", "measured", "off"))?;
    let mut worst: f64 = 0.0;
    for ((cut, &predicted), &seconds) in cuts.iter().zip(&predicted).zip(&measured) {
        let off = predicted / seconds - 1.0;
        worst = worst.max(off.abs());
        let (name, off) = (name(cut, devices), off * 100.0);
        let (predicted, seconds) = (predicted * 1e3, seconds * 1e3);
        print_line(format_args!("{name:<48}  {predicted:>7.2} ms  {seconds:>7.2} ms  {off:>+6.1}%"))?;
    }
    let best = (0..cuts.len()).min_by(|&a, &b| measured[a].total_cmp(&measured[b])).context("there are no cuts")?;
    let planned = cuts.iter().position(|cut| cut == planned).context("the planned cut is not among all cuts")?;
    print_line(format_args!(
        "planned {}: {:.1} % above the best, {}; predictions at most {:.1} % off",
        name(&cuts[planned], devices),
        (measured[planned] / measured[best] - 1.0) * 100.0,
        name(&cuts[best], devices),
        worst * 100.0
    ))?;
    Ok(())
}

fn name(cut: &[Placement], devices: &[DeviceSpec]) -> String {
    let stages =
        cut.iter().map(|stage| format!("{} on {}:{}", stage.layers.len(), stage.device, devices[stage.device]));
    stages.collect::<Vec<_>>().join(", ")
}

/// Every way to cut the layers over some of the devices in their order.
fn all_cuts(devices: usize, layers: usize) -> Vec<Vec<Placement>> {
    fn extend(
        cut: &mut Vec<Placement>,
        device: usize,
        devices: usize,
        start: usize,
        layers: usize,
        found: &mut Vec<Vec<Placement>>,
    ) {
        if start == layers {
            found.push(cut.clone());
            return;
        }
        for device in device..devices {
            for end in start + 1..=layers {
                cut.push(Placement { device, layers: start..end });
                extend(cut, device + 1, devices, end, layers, found);
                cut.pop();
            }
        }
    }
    let mut found = Vec::new();
    extend(&mut Vec::new(), 0, devices, 0, layers, &mut found);
    found
}

/// Loads a cut and decodes; seconds from one token of each sequence to the next.
async fn seconds_of_a_round(
    flags: &Flags,
    problem: &Problem,
    devices: &[DeviceSpec],
    slow: &[f64],
    cut: &[Placement],
) -> Result<f64> {
    let specs: Vec<DeviceSpec> = cut.iter().map(|stage| devices[stage.device]).collect();
    let split = Split::Layers(cut.iter().map(|stage| stage.layers.len()).collect());
    let (model, options) = (flags.model.clone(), PipelineOptions { split, ..flags.pipeline()? });
    let planning = tokio::task::spawn_blocking(move || HeterogeneousPipeline::with_options(&specs, &model, options));
    let factors: Vec<f64> = cut.iter().map(|stage| slow[stage.device]).collect();
    let slowing = ExecutorOptions {
        wrap_backend: Some(Arc::new(move |stage, backend| Box::new(Slowed { backend, factor: factors[stage] }))),
        ..ExecutorOptions::default()
    };
    let executor = HeterogeneousPipelineExecutor::with_options(planning.await??, &flags.model, slowing).await?;
    executor.warmup().await?;
    let sequences = match flags.objective {
        Objective::Latency => 1,
        Objective::Throughput => flags.sequences,
    };
    let context = problem.workload.context;
    let tokens = flags.sampling.max_tokens.min(16).min(context / 2).max(2);
    let prompt = vec![0; (context / 2).saturating_sub(tokens / 2).max(1)];
    let options = GenerationOptions { ignore_eos: true, ..GenerationOptions::new(tokens, 0.0, 1.0) };
    let generations = executor.infer_batch_with(&vec![prompt; sequences], &options).await?;
    // While the last prompt is computed the others decode already; from then on all are in step.
    let began = generations.iter().map(|generation| generation.time_to_first_token).max().unwrap_or_default();
    let ended = generations.iter().map(|generation| generation.total_time).max().unwrap_or_default();
    Ok((ended - began).as_secs_f64() / (tokens - 1) as f64)
}

/// More than a sleeping thread wakes up too late by, as a rule.
const OVERSLEPT: Duration = Duration::from_micros(150);

/// A stage that takes `factor` times as long, and hardly uses the processor for it.
struct Slowed {
    backend: Box<dyn StageBackend>,
    factor: f64,
}

impl StageBackend for Slowed {
    fn open(&mut self, id: SequenceId, capacity: usize) -> candle_pipeline::Result<()> {
        self.backend.open(id, capacity)
    }

    fn fork(&mut self, from: SequenceId, to: SequenceId, len: usize, capacity: usize) -> candle_pipeline::Result<()> {
        self.backend.fork(from, to, len, capacity)
    }

    fn truncate(&mut self, id: SequenceId, length: usize) -> candle_pipeline::Result<()> {
        self.backend.truncate(id, length)
    }

    fn close(&mut self, id: SequenceId) {
        self.backend.close(id);
    }

    fn forward(
        &mut self,
        batch: &MicroBatch,
        input: Option<Tensor>,
        watch: &mut Watch,
    ) -> candle_pipeline::Result<StageOutput> {
        let began = Instant::now();
        let output = self.backend.forward(batch, input, watch);
        let end = began + began.elapsed().mul_f64(self.factor);
        std::thread::sleep(end.saturating_duration_since(Instant::now()).saturating_sub(OVERSLEPT));
        while Instant::now() < end {
            std::hint::spin_loop();
        }
        output
    }

    fn lens(&mut self, rows: &[HiddenRow]) -> candle_pipeline::Result<Vec<Vec<f32>>> {
        self.backend.lens(rows)
    }

    fn bytes(&self) -> StageBytes {
        self.backend.bytes()
    }
}
