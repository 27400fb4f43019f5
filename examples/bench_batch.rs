//! Rates of prefill and decode for cases of prompt length, generated length and number of sequences side by side. The
//! model is loaded once for all cases, and needs no tokenizer.
//!
//! ```text
//! cargo run --release --example bench_batch -- --model /tmp/tinyllama.gguf --devices cpu@threads=2 \
//!     --cases 128:0,1:48,2000:32,64:32:4
//! ```
//!
//! A case is `prompt:generate` or `prompt:generate:sequences`. Decode is what comes between the moment when every
//! sequence has its first token and the one when they have `generate` more on average; the sequences can go on longer
//! than that, so that they all run until then. A case that generates nothing is run once unmeasured first.

mod common;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use candle_pipeline::{ExecutorOptions, GenerationEvent, GenerationOptions, HeterogeneousPipelineExecutor};
use clap::Parser;
use common::Flags;
use common::cases::{Case, HEADER, Timing};
use common::output::print_line;
use futures::StreamExt;

#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    flags: Flags,
    /// What to measure, each `prompt:generate` or `prompt:generate:sequences`.
    #[arg(long, value_delimiter = ',', default_value = "128:0,1:48,64:32:4")]
    cases: Vec<Case>,
    /// Micro-batches in flight at most: 1 switches overlap of stages off.
    #[arg(long)]
    in_flight: Option<usize>,
    /// Micro-batches that the sequences are spread over; as many as stages when absent.
    #[arg(long)]
    micro_batches: Option<usize>,
    /// In cases that generate: when half of it is there, also submit a prompt of so many tokens, and tell how long the
    /// others' tokens take while it is computed.
    #[arg(long)]
    disturb: Option<usize>,
    /// Print one JSON object instead of the table.
    #[arg(long)]
    json: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    common::program(run()).await
}

async fn run() -> Result<()> {
    let Arguments { flags, cases, in_flight, micro_batches, disturb, json } = Arguments::parse();
    let options = ExecutorOptions { in_flight, micro_batches, ..ExecutorOptions::default() };
    let executor = flags.load_with(options).await?;
    executor.warmup().await?;
    if !json {
        print_line(HEADER)?;
    }
    let mut measured = Vec::new();
    for case in &cases {
        if case.generate == 0 {
            measure(&executor, case, disturb).await?;
        }
        let timing = measure(&executor, case, disturb).await?;
        if !json {
            print_line(timing.row(case))?;
        }
        measured.push(timing.json(case));
    }
    if json {
        let output = serde_json::json!({
            "model": flags.model,
            "stages": common::stages_json(&executor),
            "load_us": executor.load_time().as_micros() as u64,
            "cases": measured,
        });
        print_line(output)?;
    }
    Ok(())
}

async fn measure(executor: &HeterogeneousPipelineExecutor, case: &Case, disturb: Option<usize>) -> Result<Timing> {
    let pipeline = executor.pipeline();
    let left = pipeline.context_length().saturating_sub(case.prompt);
    ensure!(
        left > case.generate,
        "case {case}: {} positions are more than the context of {}",
        case.prompt + case.generate + 1,
        pipeline.context_length()
    );
    // Those that begin first must not end before the last has begun.
    let longer = case.sequences > 1 || disturb.is_some();
    let max_tokens = if longer { left.min((case.generate + 1) * 8) } else { case.generate + 1 };
    let options =
        GenerationOptions { ignore_eos: true, reuse_prefix: false, ..GenerationOptions::new(max_tokens, 0.0, 1.0) };

    let began = Instant::now();
    let prompts = case.prompts(pipeline.config().vocab_size).into_iter().enumerate();
    let mut events = futures::stream::select_all(prompts.map(|(sequence, prompt)| {
        executor.infer_stream_with(prompt, &options).map(move |event| (sequence, event)).boxed()
    }));
    let mut last_token = vec![None; case.sequences];
    let mut waiting = case.sequences;
    let mut all_began = None;
    let mut timing = Timing::default();
    let mut stats = executor.stage_stats();
    let disturb = disturb.filter(|_| case.generate > 0);
    let mut disturber = None;
    while let Some((sequence, event)) = events.next().await {
        match event? {
            GenerationEvent::Token(_) => {}
            GenerationEvent::Finished(_) if waiting > 0 && case.generate > 0 => {
                anyhow::bail!(
                    "case {case}: a sequence ended before {waiting} others had begun: they never ran together"
                )
            }
            GenerationEvent::Finished(_) if case.generate > 0 => break,
            _ => continue,
        }
        let now = Instant::now();
        let before = last_token[sequence].replace(now);
        match (before, all_began) {
            (None, _) => {
                waiting -= 1;
                if waiting == 0 {
                    all_began = Some(now);
                    timing.prefill = now - began;
                    stats = executor.stage_stats();
                }
            }
            (Some(before), Some(_)) if disturber.is_some() => timing.disturbed.push(now - before),
            (Some(before), Some(all_began)) => {
                timing.decoded += 1;
                timing.decode = now - all_began;
                timing.steps.push(now - before);
            }
            (Some(_), None) => {}
        }
        let wanted = case.generate * case.sequences;
        match (&mut disturber, disturb) {
            (None, Some(length)) if waiting == 0 && timing.decoded == wanted / 2 => {
                let vocab = pipeline.config().vocab_size;
                let prompt = (0..length).map(|position| (position * 104_729 % vocab) as u32).collect();
                let options = GenerationOptions { reuse_prefix: false, ..GenerationOptions::new(1, 0.0, 1.0) };
                let stream = executor.infer_stream_with(prompt, &options);
                disturber = Some(tokio::spawn(stream.for_each(|_| std::future::ready(()))));
            }
            (Some(disturber), _) if disturber.is_finished() => break,
            (None, None) if waiting == 0 && timing.decoded == wanted => break,
            _ => {}
        }
    }
    timing.busy = executor.stage_stats().iter().zip(&stats).map(|(now, then)| now.since(then).busy_share()).collect();
    // What is still running must not take time from the next case.
    drop(events);
    while executor.memory().iter().any(|stage| stage.kv > stage.kv_retained) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(timing)
}
