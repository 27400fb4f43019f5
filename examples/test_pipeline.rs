//! The first thing to run: cuts the demo model into two stages and lets it write a story.
//!
//! ```text
//! cargo run --release --example test_pipeline
//! cargo run --release --example test_pipeline -- --devices cpu,cpu,cpu --split 1,5,2 --temperature 0.8 --seed 7
//! cargo run --release --example test_pipeline -- --devices cpu@threads=1,cpu@threads=1 --split measured
//! ```

mod common;

use std::process::ExitCode;

use candle_pipeline::{FinishReason, GenerationEvent};
use clap::Parser;
use common::{Flags, OutputFormat, print_now, rates};
use futures::StreamExt;

#[tokio::main]
async fn main() -> ExitCode {
    common::exit(run().await)
}

async fn run() -> anyhow::Result<()> {
    let flags = Flags::parse();
    let executor = flags.load().await?;
    let tokenizer = executor.tokenizer();
    let prompts = flags.prompts(executor.needed_tokenizer(), &["Once upon a time"])?;
    let [prompt] = prompts.as_slice() else {
        anyhow::bail!("one prompt, please; test_batch_inference takes several");
    };
    let show_text = flags.output_format == OutputFormat::Text;
    if show_text
        && !flags.chat
        && let Some(tokenizer) = tokenizer
    {
        print_now(&tokenizer.decode(prompt, true)?);
    }

    let options = flags.generation();
    let mut stream = match tokenizer {
        Some(_) => executor.infer_stream_with_text(prompt.clone(), &options),
        None => executor.infer_stream_with(prompt.clone(), &options),
    };
    let (mut tokens, mut text, mut logits) = (Vec::new(), String::new(), None);
    let (mut reason, mut ttft, mut total) = (FinishReason::Cancelled, Default::default(), Default::default());
    while let Some(event) = stream.next().await {
        let piece = match event? {
            GenerationEvent::Prefilled { logits: found } => {
                logits = found;
                continue;
            }
            GenerationEvent::Token(token) => {
                tokens.push(token.id);
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
            print_now(&piece);
        }
        text.push_str(&piece);
    }

    let (rate, decode_rate) = rates(tokens.len(), ttft, total);
    match flags.output_format {
        OutputFormat::Text => println!(),
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
            if flags.logits {
                object["prompt_logits"] = serde_json::json!(logits);
            }
            println!("{object}");
        }
        OutputFormat::None => {}
    }
    eprintln!(
        "{} prompt tokens, {} generated at {rate:.1} tokens/s, first after {ttft:.1?}, then {decode_rate:.1} tokens/s",
        prompt.len(),
        tokens.len()
    );
    Ok(())
}
