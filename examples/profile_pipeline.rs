//! Latencies of a model on a split: time to first token (TTFT), inter-token latency (ITL) with percentiles, rates.
//!
//! ```text
//! cargo run --release --example profile_pipeline -- --devices cpu,cpu --runs 10 --max-tokens 64
//! ```

mod common;

use std::process::ExitCode;
use std::time::Instant;

use candle_pipeline::GenerationEvent;
use clap::Parser;
use common::Flags;
use futures::StreamExt;
use hdrhistogram::Histogram;

#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    flags: Flags,
    /// Measured runs.
    #[arg(long, default_value_t = 10)]
    runs: usize,
    /// Print one JSON object instead of the table.
    #[arg(long)]
    json: bool,
}

/// Microseconds.
struct Latencies(Histogram<u64>);

impl Latencies {
    fn new() -> anyhow::Result<Self> {
        Ok(Latencies(Histogram::new_with_bounds(1, 3_600_000_000, 3)?))
    }

    /// How often the median fits in a second; 0 without samples.
    fn median_rate(&self) -> f64 {
        if self.0.is_empty() { 0.0 } else { 1e6 / self.0.value_at_quantile(0.50) as f64 }
    }

    fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "samples": self.0.len(),
            "mean_us": self.0.mean(),
            "p50_us": self.0.value_at_quantile(0.50),
            "p95_us": self.0.value_at_quantile(0.95),
            "p99_us": self.0.value_at_quantile(0.99),
            "max_us": self.0.max(),
        })
    }

    fn row(&self, name: &str) -> String {
        let ms = |us: u64| us as f64 / 1e3;
        let percentile = |q: f64| ms(self.0.value_at_quantile(q));
        // A percentile stands on samples beyond it: with fewer than 100 the 99th is the maximum under another name.
        let p99 = if self.0.len() >= 100 { format!("{:9.3}", percentile(0.99)) } else { format!("{:>9}", "-") };
        format!(
            "{name:<5} {:>8} {:9.3} {:9.3} {:9.3} {p99} {:9.3}",
            self.0.len(),
            self.0.mean() / 1e3,
            percentile(0.50),
            percentile(0.95),
            ms(self.0.max())
        )
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    common::exit(run().await)
}

async fn run() -> anyhow::Result<()> {
    let Arguments { flags, runs, json } = Arguments::parse();
    anyhow::ensure!(runs > 0, "--runs 0 measures nothing");
    let executor = flags.load().await?;
    let warmup = executor.warmup().await?;
    let prompts = flags.prompts(executor.tokenizer(), &["Once upon a time"])?;
    // Runs are of one length only if no end-of-sequence token cuts them short.
    // Repeated prompts are to be computed each time.
    let options = candle_pipeline::GenerationOptions { ignore_eos: true, reuse_prefix: false, ..flags.generation() };

    let (mut ttft, mut itl) = (Latencies::new()?, Latencies::new()?);
    let (mut input_tokens, mut output_tokens) = (0, 0);
    let before = executor.stage_stats();
    let began = Instant::now();
    for run in 0..runs {
        let prompt = prompts[run % prompts.len()].clone();
        input_tokens += prompt.len();
        let mut last = Instant::now();
        let mut first = true;
        let mut stream = executor.infer_stream_with(prompt, &options);
        while let Some(event) = stream.next().await {
            if let GenerationEvent::Token(_) = event? {
                let latencies = if std::mem::take(&mut first) { &mut ttft } else { &mut itl };
                latencies.0.saturating_record(last.elapsed().as_micros() as u64);
                last = Instant::now();
                output_tokens += 1;
            }
        }
    }
    let total = began.elapsed();
    let rate = output_tokens as f64 / total.as_secs_f64();
    if json {
        println!(
            "{}",
            serde_json::json!({
                "model": flags.model,
                "stages": common::stages_json(&executor),
                "load_us": executor.load_time().as_micros() as u64,
                "warmup_us": warmup.duration.as_micros() as u64,
                "runs": runs,
                "input_tokens": input_tokens,
                "output_tokens": output_tokens,
                "total_us": total.as_micros() as u64,
                "tokens_per_second": rate,
                "prefill_tokens_per_second": input_tokens as f64 / runs as f64 * ttft.median_rate(),
                "decode_tokens_per_second": itl.median_rate(),
                "ttft": ttft.json(),
                "itl": itl.json(),
            })
        );
        return Ok(());
    }
    println!("warmup {:.1?}, {runs} runs, {input_tokens} tokens in, {output_tokens} out, {total:.2?}", warmup.duration);
    println!("{:<5} {:>8} {:>9} {:>9} {:>9} {:>9} {:>9}  (ms)", "", "samples", "mean", "P50", "P95", "P99", "max");
    println!("{}", ttft.row("TTFT"));
    println!("{}", itl.row("ITL"));
    println!("{rate:.1} tokens/s over all, {:.1} tokens/s in decode", 1e6 / itl.0.mean().max(1.0));
    print!("{}", common::stage_table(&executor, &before));
    Ok(())
}
