//! Draws which micro-batch each stage computed when, from a real run: a row a stage, a column a slice of time, a letter a
//! micro-batch, a dot where a stage stood idle.
//!
//! ```text
//! cargo run --release --example stage_timeline -- --devices cpu@threads=1,cpu@threads=1 --split 4,4 --sequences 4
//! ```

mod common;

use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use candle_pipeline::instrument::{Collector, Event, Probe, Record};
use candle_pipeline::{ExecutorOptions, GenerationOptions};
use clap::Parser;
use common::Flags;
use common::output::print_line;

#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    flags: Flags,
    /// Micro-batches in flight at most: 1 switches overlap of stages off.
    #[arg(long)]
    in_flight: Option<usize>,
    /// Micro-batches to draw.
    #[arg(long, default_value_t = 12)]
    steps: usize,
    /// Columns.
    #[arg(long, default_value_t = 96)]
    width: usize,
}

/// One micro-batch in one stage.
struct Computed {
    stage: usize,
    step: u64,
    rows: usize,
    from: Instant,
    until: Instant,
}

#[derive(Default)]
struct Recorder(Mutex<Vec<Computed>>);

impl Collector for Recorder {
    fn record(&self, record: &Arc<Record>) {
        if let Event::StageStep { stage, step, rows, compute, copy, .. } = record.event {
            // The event comes right after the copy.
            let until = record.at - copy;
            if let Ok(mut computed) = self.0.lock() {
                computed.push(Computed { stage, step, rows, from: until - compute, until });
            }
        }
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    common::program(run()).await
}

async fn run() -> Result<()> {
    let Arguments { flags, in_flight, steps, width } = Arguments::parse();
    ensure!(steps > 0 && width > 0, "--steps and --width must be at least 1");
    let recorder = Arc::new(Recorder::default());
    let probe = Probe::new(recorder.clone());
    let executor = flags.load_with(ExecutorOptions { in_flight, probe, ..ExecutorOptions::default() }).await?;
    let vocab = executor.pipeline().config().vocab_size;
    let sequences = flags.sequences.max(1);
    let prompts: Vec<Vec<u32>> =
        (0..sequences).map(|s| (0..8).map(|i| ((s * 131 + i * 7 + 1) % vocab) as u32).collect()).collect();
    let options = GenerationOptions { ignore_eos: true, ..GenerationOptions::new(steps * 4 + 16, 0.0, 1.0) };
    executor.infer_batch_with(&prompts, &options).await?;

    let stages = executor.pipeline().stages().len();
    let Ok(computed) = recorder.0.lock() else { anyhow::bail!("the recorder's thread panicked") };
    // From the middle of the run, where all sequences decode.
    let middle = computed.iter().map(|c| c.step).max().unwrap_or(0) / 2;
    let drawn: Vec<&Computed> = computed.iter().filter(|c| (middle..middle + steps as u64).contains(&c.step)).collect();
    let from = drawn.iter().map(|c| c.from).min();
    let until = drawn.iter().map(|c| c.until).max();
    let (Some(from), Some(until)) = (from, until) else { anyhow::bail!("nothing was computed") };
    let slice = (until - from).div_f64(width as f64).max(Duration::from_nanos(1));
    let rows = drawn.iter().map(|c| c.rows).max().unwrap_or(0);
    print_line(format_args!("{sequences} sequences, micro-batches of up to {rows} rows, {slice:.0?} a column"))?;
    for stage in 0..stages {
        let mut line = vec!['.'; width];
        for c in drawn.iter().filter(|c| c.stage == stage) {
            let column = |at: Instant| ((at - from).as_secs_f64() / slice.as_secs_f64()).round() as usize;
            let letter = (b'a' + ((c.step - middle) % 26) as u8) as char;
            line[column(c.from).min(width - 1)..column(c.until).min(width)].fill(letter);
        }
        print_line(format_args!("stage {stage} |{}|", line.into_iter().collect::<String>()))?;
    }
    Ok(())
}
