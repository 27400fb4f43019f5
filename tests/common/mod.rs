//! What several test binaries need.
#![allow(dead_code)] // each binary uses a part

use std::path::{Path, PathBuf};

use candle_pipeline::{
    DeviceSpec, ExecutorOptions, Generation, GenerationOptions, HeterogeneousPipeline, HeterogeneousPipelineExecutor,
    PipelineOptions, Result, Split,
};

/// A folder below tests/fixtures.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// Loads `model` on `devices`, cut as given.
pub async fn executor(model: &str, devices: &str, split: Option<&[usize]>) -> Result<HeterogeneousPipelineExecutor> {
    executor_with(model, devices, split, ExecutorOptions::default()).await
}

/// The same with executor options.
pub async fn executor_with(
    model: &str,
    devices: &str,
    split: Option<&[usize]>,
    options: ExecutorOptions,
) -> Result<HeterogeneousPipelineExecutor> {
    let devices = DeviceSpec::parse_list(devices)?;
    let split = split.map_or(Split::Bytes, |counts| Split::Layers(counts.to_vec()));
    let plan = PipelineOptions { split, ..PipelineOptions::default() };
    let pipeline = HeterogeneousPipeline::with_options(&devices, model, plan)?;
    HeterogeneousPipelineExecutor::with_options(pipeline, model, options).await
}

/// Greedy, to the given length, with the prompt's logits.
pub fn greedy(max_tokens: usize) -> GenerationOptions {
    GenerationOptions { ignore_eos: true, prompt_logits: true, ..GenerationOptions::new(max_tokens, 0.0, 1.0) }
}

/// A generation's tokens and the bits of its prompt logits.
pub fn bits(generation: &Generation) -> (Vec<u32>, Vec<u32>) {
    let logits = generation.prompt_logits.as_ref().expect("logits were asked for");
    (generation.tokens.clone(), logits.iter().map(|value| value.to_bits()).collect())
}
