//! Text as it is generated. Ctrl-C drops the stream, which stops the work in every stage.
//!
//! ```text
//! cargo run --release --example test_streaming_inference -- --temperature 0.8 --prompt "Once upon a time"
//! ```

mod common;

use std::process::ExitCode;
use std::time::Instant;

use candle_pipeline::GenerationEvent;
use clap::Parser;
use common::{Flags, OutputFormat, print_now};
use futures::StreamExt;

#[tokio::main]
async fn main() -> ExitCode {
    common::exit(run().await)
}

async fn run() -> anyhow::Result<()> {
    let flags = Flags::parse();
    let executor = flags.load().await?;
    let prompts = flags.prompts(executor.needed_tokenizer(), &["Once upon a time"])?;
    for prompt in prompts {
        let options = flags.generation();
        let began = Instant::now();
        let mut stream = match executor.tokenizer() {
            Some(_) => executor.infer_stream_with_text(prompt, &options),
            None => executor.infer_stream_with(prompt, &options),
        };
        let mut tokens = 0;
        loop {
            let event = tokio::select! {
                event = stream.next() => event,
                _ = tokio::signal::ctrl_c() => break,
            };
            let Some(event) = event else { break };
            let (id, text) = match event? {
                GenerationEvent::Token(token) => {
                    tokens += 1;
                    (Some(token.id), token.text)
                }
                GenerationEvent::Finished(finish) => (None, finish.text),
                _ => continue,
            };
            match flags.output_format {
                OutputFormat::Text if executor.tokenizer().is_none() => {
                    print_now(&id.map(|id| format!("{id} ")).unwrap_or_default());
                }
                OutputFormat::Text => print_now(&text),
                // One object a line, so that a reader can follow the stream.
                OutputFormat::Json => {
                    let time = began.elapsed().as_micros() as u64;
                    println!("{}", serde_json::json!({ "token": id, "text": text, "time_us": time }));
                }
                OutputFormat::None => {}
            }
        }
        if flags.output_format == OutputFormat::Text {
            println!();
        }
        eprintln!("{tokens} tokens in {:.2?}", began.elapsed());
    }
    Ok(())
}
