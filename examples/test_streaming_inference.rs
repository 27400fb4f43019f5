//! Text as it is generated. Ctrl-C drops the stream, which stops the work in every stage; the next prompt goes on. A second
//! Ctrl-C within a second ends the program.
//!
//! ```text
//! cargo run --release --example test_streaming_inference -- --temperature 0.8 --prompt "Once upon a time"
//! ```

mod common;

use std::process::ExitCode;
use std::time::Instant;

use candle_pipeline::GenerationEvent;
use clap::Parser;
use common::output::{note_line, print, print_line};
use common::{Flags, OutputFormat, interrupt};
use futures::StreamExt;

#[tokio::main]
async fn main() -> ExitCode {
    common::program(run()).await
}

async fn run() -> anyhow::Result<()> {
    let flags = Flags::parse();
    let executor = flags.load().await?;
    let prompts = flags.prompts(executor.needed_tokenizer(), &["Once upon a time"])?;
    for prompt in prompts {
        let options = flags.generation()?;
        let mut interrupted = interrupt::claim();
        let began = Instant::now();
        let mut stream = match executor.tokenizer() {
            Some(_) => executor.infer_stream_with_text(prompt, &options),
            None => executor.infer_stream_with(prompt, &options),
        };
        let mut tokens = 0;
        loop {
            let event = tokio::select! {
                event = stream.next() => event,
                Ok(()) = &mut interrupted => break,
            };
            let Some(event) = event else { break };
            let (id, text, logprob) = match event? {
                GenerationEvent::Token(token) => {
                    tokens += 1;
                    (Some(token.id), token.text, token.logprob)
                }
                GenerationEvent::Finished(finish) => (None, finish.text, None),
                _ => continue,
            };
            match flags.output_format {
                OutputFormat::Text if executor.tokenizer().is_none() => {
                    print(id.map(|id| format!("{id} ")).unwrap_or_default())?;
                }
                OutputFormat::Text => print(&text)?,
                // One object a line, so that a reader can follow the stream.
                OutputFormat::Json => {
                    let time = began.elapsed().as_micros() as u64;
                    let mut object = serde_json::json!({ "token": id, "text": text, "time_us": time });
                    if let Some(logprob) = logprob {
                        object["logprob"] = serde_json::json!(logprob.logprob);
                        object["top_logprobs"] = serde_json::json!(logprob.top);
                    }
                    print_line(object)?;
                }
                OutputFormat::None => {}
            }
        }
        if flags.output_format == OutputFormat::Text {
            print_line("")?;
        }
        note_line(format_args!("{tokens} tokens in {:.2?}", began.elapsed()));
    }
    Ok(())
}
