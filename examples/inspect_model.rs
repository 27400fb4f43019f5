//! Shows what a model's files hold, by their headers alone: compression against F32 and F16, the types of the weights by
//! bytes and by number, layer by layer.
//!
//! ```text
//! cargo run --release --example inspect_model -- --model models/demo/demo-q4_0.gguf
//! ```

#[allow(dead_code)] // this example uses a part
#[path = "common/output.rs"]
mod output;
#[path = "common/warnings.rs"]
mod warnings;

use std::process::ExitCode;

use anyhow::Result;
use candle_pipeline::instrument::quantisation::QuantisationView;
use candle_pipeline::{DEMO_MODEL, DeviceSpec, HeterogeneousPipeline};
use clap::Parser;
use output::{print, print_line};

#[derive(Parser)]
struct Arguments {
    /// Model: a folder in Hugging Face layout, a .gguf file, or a hub id (`org/name`).
    #[arg(long, default_value = DEMO_MODEL)]
    model: String,
    /// Devices of the stages: where each weight would be. They must have room for the model.
    #[arg(long, default_value = "cpu")]
    devices: String,
    /// One JSON object: the model, its stages, all tensors, and the tables.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    warnings::show();
    output::exit(run())
}

fn run() -> Result<()> {
    let Arguments { model, devices, json } = Arguments::parse();
    let pipeline = HeterogeneousPipeline::new(&DeviceSpec::parse_list(&devices)?, &model)?;
    let facts = pipeline.facts(0)?;
    let view = QuantisationView::of(&facts.tensors);
    if json {
        let both = serde_json::json!({ "model": facts, "quantisation": view });
        print_line(serde_json::to_string_pretty(&both)?)?;
    } else {
        let (layers, width, vocabulary) = (facts.n_layer, facts.n_embd, facts.vocab_size);
        let architecture = &facts.architecture;
        print_line(format_args!("{model}: {architecture}, {layers} layers of {width}, {vocabulary} tokens"))?;
        print(view)?;
    }
    Ok(())
}
