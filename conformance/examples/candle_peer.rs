//! The cases of `bench_batch` with the models of candle-transformers, for `compare_peers.py`: a GGUF file with its
//! quantised Llama or Qwen2, a folder of safetensors with the dense ones. Sequences side by side are one tensor.
//!
//! ```text
//! RAYON_NUM_THREADS=2 cargo run --release -p conformance --example candle_peer -- --model FILE --cases 128:0,1:48
//! ```

#[path = "../../examples/common/cases.rs"]
mod cases;
#[allow(dead_code)] // this program uses a part
#[path = "../../examples/common/output.rs"]
mod output;

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use candle_core::quantized::gguf_file::Content;
use candle_core::safetensors::MmapedSafetensors;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{llama, quantized_llama, quantized_qwen2, qwen2};
use cases::{Case, HEADER, Timing};
use clap::Parser;
use output::print_line;

#[derive(Parser)]
struct Arguments {
    /// A .gguf file, or a folder with config.json and model.safetensors.
    #[arg(long)]
    model: PathBuf,
    /// What to measure, each `prompt:generate` or `prompt:generate:sequences`.
    #[arg(long, value_delimiter = ',', default_value = "128:0,1:48")]
    cases: Vec<Case>,
    /// Print one JSON object instead of the table.
    #[arg(long)]
    json: bool,
}

enum Weights {
    QuantizedLlama(quantized_llama::ModelWeights),
    QuantizedQwen2(quantized_qwen2::ModelWeights),
    Llama { model: Box<llama::Llama>, config: llama::Config, dtype: DType, cache: llama::Cache },
    Qwen2(qwen2::ModelForCausalLM),
}

struct Model {
    weights: Weights,
    vocab_size: usize,
}

impl Model {
    fn load(path: &Path) -> Result<Model> {
        if path.is_dir() { Self::from_safetensors(path) } else { Self::from_gguf(path) }
    }

    fn from_gguf(path: &Path) -> Result<Model> {
        let mut reader = BufReader::new(File::open(path)?);
        let content = Content::read(&mut reader)?;
        let architecture = content.metadata.get("general.architecture").context("no general.architecture")?;
        let architecture = architecture.to_string()?.clone();
        let embeddings = content.tensor_infos.get("token_embd.weight").context("no token_embd.weight")?;
        let (vocab_size, _) = embeddings.shape.dims2()?;
        let weights = match architecture.as_str() {
            "llama" => {
                Weights::QuantizedLlama(quantized_llama::ModelWeights::from_gguf(content, &mut reader, &Device::Cpu)?)
            }
            "qwen2" => {
                Weights::QuantizedQwen2(quantized_qwen2::ModelWeights::from_gguf(content, &mut reader, &Device::Cpu)?)
            }
            _ => bail!("architecture {architecture}: llama and qwen2 are measured"),
        };
        Ok(Model { weights, vocab_size })
    }

    #[allow(unsafe_code)]
    fn from_safetensors(folder: &Path) -> Result<Model> {
        let mut config: serde_json::Value =
            serde_json::from_reader(BufReader::new(File::open(folder.join("config.json"))?))?;
        let vocab_size = config["vocab_size"].as_u64().context("no vocab_size")? as usize;
        let dtype = match config["torch_dtype"].as_str() {
            Some("float32") => DType::F32,
            Some("bfloat16") => DType::BF16,
            _ => DType::F16,
        };
        let path = folder.join("model.safetensors");
        // SAFETY: the file is not written to while this program measures.
        let tensors = unsafe { MmapedSafetensors::new(path)? };
        let tensors = VarBuilder::from_backend(Box::new(tensors), dtype, Device::Cpu);
        let weights = match config["model_type"].as_str() {
            Some("llama") => {
                let config: llama::LlamaConfig = serde_json::from_value(config)?;
                let config = config.into_config(false);
                let cache = llama::Cache::new(true, dtype, &config, &Device::Cpu)?;
                Weights::Llama { model: Box::new(llama::Llama::load(tensors, &config)?), config, dtype, cache }
            }
            Some("qwen2") => {
                // Fields that candle wants although there is no window.
                config["use_sliding_window"] = false.into();
                config["sliding_window"] = config["max_position_embeddings"].clone();
                config["max_window_layers"] = config["num_hidden_layers"].clone();
                Weights::Qwen2(qwen2::ModelForCausalLM::new(&serde_json::from_value(config)?, tensors)?)
            }
            other => bail!("model_type {other:?}: llama and qwen2 are measured"),
        };
        Ok(Model { weights, vocab_size })
    }

    fn forget(&mut self) -> Result<()> {
        match &mut self.weights {
            Weights::QuantizedLlama(model) => model.clear_kv_cache(),
            Weights::QuantizedQwen2(model) => model.clear_kv_cache(),
            Weights::Llama { config, dtype, cache, .. } => {
                *cache = llama::Cache::new(true, *dtype, config, &Device::Cpu)?;
            }
            Weights::Qwen2(model) => model.clear_kv_cache(),
        }
        Ok(())
    }

    fn forward(&mut self, tokens: &Tensor, position: usize) -> Result<Tensor> {
        Ok(match &mut self.weights {
            Weights::QuantizedLlama(model) => model.forward(tokens, position)?,
            Weights::QuantizedQwen2(model) => model.forward(tokens, position)?,
            Weights::Llama { model, cache, .. } => model.forward(tokens, position, cache)?,
            Weights::Qwen2(model) => model.forward(tokens, position)?,
        })
    }

    fn measure(&mut self, case: &Case) -> Result<Timing> {
        self.forget()?;
        let prompts = Tensor::new(case.prompts(self.vocab_size), &Device::Cpu)?;
        // The quantised models refuse prompts of several sequences: the rows for their head do not lie together.
        let together = case.sequences == 1 || matches!(self.weights, Weights::Llama { .. } | Weights::Qwen2(_));
        // Any tokens will do, and choosing them is no part of the model.
        let token = Tensor::new(vec![vec![1u32]; case.sequences], &Device::Cpu)?;
        let mut timing = Timing::default();
        let began = Instant::now();
        if together {
            self.forward(&prompts, 0)?;
        } else {
            for position in 0..case.prompt {
                self.forward(&prompts.narrow(1, position, 1)?.contiguous()?, position)?;
            }
        }
        timing.prefill = began.elapsed();
        let began = Instant::now();
        for step in 0..case.generate {
            let step_began = Instant::now();
            self.forward(&token, case.prompt + step)?;
            timing.steps.push(step_began.elapsed());
        }
        timing.decode = began.elapsed();
        timing.decoded = case.generate * case.sequences;
        Ok(timing)
    }
}

fn main() -> ExitCode {
    output::exit(run())
}

fn run() -> Result<()> {
    let Arguments { model: path, cases, json } = Arguments::parse();
    let began = Instant::now();
    let mut model = Model::load(&path).with_context(|| path.display().to_string())?;
    let load = began.elapsed();
    if !json {
        print_line(HEADER)?;
    }
    // As `bench_batch` does: a short run to warm up, and once unmeasured what is a prompt only.
    model.measure(&Case { prompt: 32, generate: 2, sequences: 1 })?;
    let mut measured = Vec::new();
    for case in &cases {
        if case.generate == 0 {
            model.measure(case)?;
        }
        let timing = model.measure(case)?;
        if !json {
            print_line(timing.row(case))?;
        }
        measured.push(timing.json(case));
    }
    if json {
        let output = serde_json::json!({
            "model": path.display().to_string(),
            "load_us": load.as_micros() as u64,
            "cases": measured,
        });
        print_line(output)?;
    }
    Ok(())
}
