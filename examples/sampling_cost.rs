//! What the scheduler's thread does beside the steps: sampling, detokenising and everything else, as a share of the time
//! that many streams at once take.
//!
//! ```text
//! cargo run --release --example make_model -- --shape qwen2.5-0.5b --type q8_0 --out /tmp/qwen.gguf
//! cargo run --release --example sampling_cost -- --model /tmp/qwen.gguf --streams 64
//! ```

mod common;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use candle_pipeline::instrument::{Collector, Event, Interest, Probe, Record};
use candle_pipeline::{ExecutorOptions, GenerationOptions};
use clap::Parser;
use common::Flags;
use common::output::print_line;
use futures::StreamExt;

#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    flags: Flags,
    /// Streams at once.
    #[arg(long, default_value_t = 64)]
    streams: usize,
    /// Tokens of each.
    #[arg(long, default_value_t = 12)]
    generate: usize,
}

/// Nanoseconds of choosing tokens, of the scheduler's turns in all, and of the stages' computation; tokens.
#[derive(Default)]
struct Sums {
    sampled: AtomicU64,
    turns: AtomicU64,
    computed: AtomicU64,
    tokens: AtomicU64,
}

impl Collector for Sums {
    fn record(&self, record: &Arc<Record>) {
        let add = |sum: &AtomicU64, time: Duration| sum.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
        match &record.event {
            Event::Sampled { duration, .. } => {
                add(&self.sampled, *duration);
                self.tokens.fetch_add(1, Ordering::Relaxed);
            }
            Event::SchedulerTurn { busy } => _ = add(&self.turns, *busy),
            Event::StageStep { compute, .. } => _ = add(&self.computed, *compute),
            _ => {}
        }
    }

    fn interest(&self) -> Interest {
        Interest { turns: true, ..Interest::default() }
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    common::program(run()).await
}

async fn run() -> Result<()> {
    let Arguments { flags, streams, generate } = Arguments::parse();
    let sums = Arc::new(Sums::default());
    let options = ExecutorOptions { probe: Probe::new(sums.clone()), ..ExecutorOptions::default() };
    let executor = flags.load_with(options).await?;
    executor.warmup().await?;
    let vocab = executor.pipeline().config().vocab_size;
    let text = executor.tokenizer().is_some();
    print_line(format_args!(
        "{streams} streams, a vocabulary of {vocab} tokens, {} text",
        if text { "with" } else { "without" }
    ))?;
    print_line(format_args!(
        "{:<28} {:>12} {:>12} {:>14} {:>12}",
        "options", "ms a step", "sampling, %", "scheduler, %", "us a token"
    ))?;
    let plain =
        GenerationOptions { ignore_eos: true, reuse_prefix: false, ..GenerationOptions::new(generate, 0.0, 1.0) };
    let sampled = GenerationOptions { temperature: 0.8, seed: Some(1), ..plain.clone() };
    for (name, options) in [
        ("greedy", plain.clone()),
        ("top-k 40, top-p 0.95", GenerationOptions { top_k: Some(40), top_p: 0.95, ..sampled.clone() }),
        ("temperature 0.8", sampled.clone()),
        ("top-p 0.95", GenerationOptions { top_p: 0.95, ..sampled.clone() }),
        ("repetition penalty, greedy", GenerationOptions { repetition_penalty: 1.1, ..plain.clone() }),
        ("log-probabilities, greedy", GenerationOptions { logprobs: Some(3), ..plain }),
    ] {
        let prompt = |i: usize| (0..8).map(|j| ((i * 7919 + j * 104_729) % vocab) as u32).collect::<Vec<_>>();
        for measured in [false, true] {
            let read =
                || [&sums.sampled, &sums.turns, &sums.computed, &sums.tokens].map(|sum| sum.load(Ordering::Relaxed));
            let (before, began) = (read(), Instant::now());
            let all = (0..streams).map(|i| match text {
                true => executor.infer_stream_with_text(prompt(i), &options),
                false => executor.infer_stream_with(prompt(i), &options),
            });
            let mut events = futures::stream::select_all(all);
            while let Some(event) = events.next().await {
                event?;
            }
            let wall = began.elapsed().as_secs_f64();
            let now = read();
            let [choosing, turns, _, tokens] = std::array::from_fn(|i| (now[i] - before[i]) as f64);
            if measured {
                print_line(format_args!(
                    "{name:<28} {:>12.2} {:>12.2} {:>14.2} {:>12.2}",
                    wall * 1e3 / generate as f64,
                    choosing / 1e7 / wall,
                    turns / 1e7 / wall,
                    choosing / 1e3 / tokens
                ))?;
            }
        }
    }
    Ok(())
}
