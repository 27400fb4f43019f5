//! Several prompts at once; each output is the one the prompt gives alone.
//!
//! ```text
//! cargo run --release --example test_batch_inference -- --prompt "Once upon a time" --prompt "One day"
//! cargo run --release --example test_batch_inference -- --sequences 16 --max-tokens 64 --compare --output-format none
//! cargo run --release --example test_batch_inference -- --sequences 4 --output-format none --prometheus metrics.prom
//! ```

mod common;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use candle_pipeline::instrument::metrics::MetricsOptions;
use candle_pipeline::instrument::prometheus::render;
use candle_pipeline::{ExecutorOptions, GenerationOptions};
use clap::Parser;
use common::files::OutputFile;
use common::instruments::Instruments;
use common::output::{note, note_line, print_line};
use common::{Flags, OutputFormat};

#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    flags: Flags,
    /// Run the prompts one after the other first, to see what the batch gains.
    #[arg(long)]
    compare: bool,
    /// At the end, write what Prometheus would be told to this file. Such a file is replaced, others are left alone.
    #[arg(long, value_name = "FILE")]
    prometheus: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> ExitCode {
    common::program(run()).await
}

async fn run() -> anyhow::Result<()> {
    let Arguments { flags, compare, prometheus } = Arguments::parse();
    let known = |head: &[u8]| head.starts_with(b"# HELP candle_pipeline_");
    let prometheus = prometheus.map(|path| OutputFile::new("--prometheus", &path, known)).transpose()?;
    let mut instruments = Instruments::default();
    let metrics = prometheus.as_ref().map(|_| instruments.metrics(MetricsOptions::default())).transpose()?;
    let executor = flags.load_watched(ExecutorOptions::default(), instruments).await?;
    let defaults = ["Once upon a time", "One sunny morning", "There was a little"];
    let prompts = flags.prompts(executor.needed_tokenizer(), &defaults)?;
    // With --sequences above the number of prompts they are repeated in turn.
    let sequences = flags.sequences.max(prompts.len());
    let prompts: Vec<_> = prompts.into_iter().cycle().take(sequences).collect();
    // What is compared is batching; equal beginnings would be computed once otherwise.
    let options = GenerationOptions { reuse_prefix: !compare, ..flags.generation()? };
    if compare {
        executor.warmup().await?;
        let (began, mut tokens) = (Instant::now(), 0);
        for prompt in &prompts {
            tokens += executor.infer_with(prompt, &options).await?.tokens.len();
        }
        let rate = tokens as f64 / began.elapsed().as_secs_f64();
        note_line(format_args!("{} sequences, {tokens} tokens one after the other: {rate:.1} tokens/s", prompts.len()));
    }
    let before = executor.stage_stats();
    let began = Instant::now();
    let outputs = executor.infer_batch_with(&prompts, &options).await?;
    let total = began.elapsed();

    let text = |ids: &[u32]| match executor.tokenizer() {
        Some(tokenizer) => tokenizer.decode(ids, true),
        None => Ok(format!("{ids:?}")),
    };
    let generated: usize = outputs.iter().map(|output| output.tokens.len()).sum();
    match flags.output_format {
        OutputFormat::Text => {
            for (prompt, output) in prompts.iter().zip(&outputs) {
                let whole: Vec<u32> = prompt.iter().chain(&output.tokens).copied().collect();
                print_line(format_args!("{}\n", text(&whole)?))?;
            }
        }
        OutputFormat::Json => {
            let sequences = prompts.iter().zip(&outputs).map(|(prompt, output)| {
                let mut object = serde_json::json!({
                    "prompt_tokens": prompt,
                    "tokens": output.tokens,
                    "text": text(&output.tokens)?,
                    "finish_reason": output.finish_reason,
                    "ttft_us": output.time_to_first_token.as_micros() as u64,
                    "total_us": output.total_time.as_micros() as u64,
                });
                if flags.sampling.logprobs.is_some() {
                    object["logprobs"] = serde_json::json!(output.logprobs);
                }
                if flags.sampling.logits {
                    object["prompt_logits"] = serde_json::json!(output.prompt_logits);
                }
                Ok(object)
            });
            let sequences = sequences.collect::<anyhow::Result<Vec<_>>>()?;
            print_line(serde_json::json!({
                "model": flags.model,
                "sequences": sequences,
                "stages": common::stages_json(&executor),
                "total_us": total.as_micros() as u64,
                "tokens_per_second": generated as f64 / total.as_secs_f64(),
            }))?;
        }
        OutputFormat::None => {}
    }
    let rate = generated as f64 / total.as_secs_f64();
    note_line(format_args!(
        "{} sequences, {generated} tokens in {total:.2?}: {rate:.1} tokens/s together",
        prompts.len()
    ));
    note(common::stage_table(&executor, &before));
    if let (Some(file), Some(metrics)) = (prometheus, metrics) {
        file.write(render(&metrics.snapshot()).as_bytes())?;
    }
    Ok(())
}
