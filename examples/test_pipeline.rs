//! The first thing to run: cuts the demo model into two stages and lets it write a story. Ctrl-C ends the story; what there
//! is of it is printed, also as JSON, and the exit code is 130.
//!
//! ```text
//! cargo run --release --example test_pipeline
//! cargo run --release --example test_pipeline -- --devices cpu,cpu,cpu --split 1,5,2 --temperature 0.8 --seed 7
//! cargo run --release --example test_pipeline -- --devices cpu@threads=1,cpu@threads=1 --split measured
//! ```

mod common;

use std::pin::Pin;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use candle_pipeline::{FinishReason, GenerationEvent};
use clap::Parser;
use common::output::{Interrupted, note_line, print, print_line};
use common::{Flags, OutputFormat, interrupt, rates};
use futures::{FutureExt, StreamExt};

#[tokio::main]
async fn main() -> ExitCode {
    common::program(run()).await
}

async fn run() -> anyhow::Result<()> {
    let flags = Flags::parse();
    let executor = flags.load().await?;
    let tokenizer = executor.tokenizer();
    let prompts = flags.prompts(executor.needed_tokenizer(), &["Once upon a time"])?;
    let [prompt] = prompts.as_slice() else {
        anyhow::bail!("one prompt, please; test_batch_inference takes several");
    };
    let options = flags.generation()?;
    let mut interrupted = interrupt::claim();
    let began = Instant::now();
    let stream = match tokenizer {
        Some(_) => executor.infer_stream_with_text(prompt.clone(), &options),
        None => executor.infer_stream_with(prompt.clone(), &options),
    };
    let mut stream = stream.peekable();
    // A request that is refused ends at once, before anything is printed.
    if Pin::new(&mut stream).peek().now_or_never().flatten().is_some_and(Result::is_err) {
        stream.next().await.transpose()?;
    }
    let show_text = flags.output_format == OutputFormat::Text;
    if show_text
        && !flags.chat
        && let Some(tokenizer) = tokenizer
    {
        print(tokenizer.decode(prompt, true)?)?;
    }

    let (mut tokens, mut logprobs, mut text, mut logits) = (Vec::new(), Vec::new(), String::new(), None);
    let (mut reason, mut ttft, mut total) = (FinishReason::Cancelled, Duration::ZERO, Duration::ZERO);
    loop {
        let event = tokio::select! {
            event = stream.next() => event,
            Ok(()) = &mut interrupted => None,
        };
        let Some(event) = event else { break };
        let piece = match event? {
            GenerationEvent::Prefilled { logits: found } => {
                logits = found;
                continue;
            }
            GenerationEvent::Token(token) => {
                if tokens.is_empty() {
                    ttft = began.elapsed();
                }
                total = began.elapsed();
                tokens.push(token.id);
                logprobs.extend(token.logprob);
                match tokenizer {
                    Some(_) => token.text,
                    None => format!("{} ", token.id),
                }
            }
            GenerationEvent::Finished(finish) => {
                (reason, ttft, total) = (finish.reason, finish.time_to_first_token, finish.total_time);
                finish.text
            }
            _ => continue,
        };
        if show_text {
            print(&piece)?;
        }
        text.push_str(&piece);
    }

    let (rate, decode_rate) = rates(tokens.len(), ttft, total);
    match flags.output_format {
        OutputFormat::Text => print_line("")?,
        OutputFormat::Json => {
            let mut object = serde_json::json!({
                "model": flags.model,
                "prompt_tokens": prompt,
                "tokens": tokens,
                "text": if tokenizer.is_some() { text } else { String::new() },
                "finish_reason": reason,
                "stages": common::stages_json(&executor),
                "load_us": executor.load_time().as_micros() as u64,
                "ttft_us": ttft.as_micros() as u64,
                "total_us": total.as_micros() as u64,
                "tokens_per_second": rate,
                "decode_tokens_per_second": decode_rate,
            });
            if flags.sampling.logprobs.is_some() {
                object["logprobs"] = serde_json::json!(logprobs);
            }
            if flags.sampling.logits {
                object["prompt_logits"] = serde_json::json!(logits);
            }
            print_line(object)?;
        }
        OutputFormat::None => {}
    }
    note_line(format_args!(
        "{} prompt tokens, {} generated at {rate:.1} tokens/s, first after {ttft:.1?}, then {decode_rate:.1} tokens/s",
        prompt.len(),
        tokens.len()
    ));
    match reason {
        FinishReason::Cancelled => Err(Interrupted.into()),
        _ => Ok(()),
    }
}
