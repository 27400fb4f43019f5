//! A last stage that answers with the most likely tokens where those are enough, as a CPU stage does, and one whose logits
//! lie on a GPU: what is chosen is what all logits choose.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::Tensor;
use candle_pipeline::backend::{
    MicroBatch, Prediction, SequenceId, SequenceSlice, StageBackend, StageBytes, StageOutput, Wanted,
};
use candle_pipeline::instrument::{HiddenRow, Watch};
use candle_pipeline::{
    DEMO_MODEL, Error, ExecutorOptions, Generation, GenerationOptions, HeterogeneousPipelineExecutor, Result,
};
use common::stages::most_likely;
use common::{executor, executor_with};

/// Looks for the most likely tokens in the logits of the stage that it is around.
struct Searching {
    inner: Box<dyn StageBackend>,
    shared: Arc<Shared>,
}

/// What it does and has done.
#[derive(Default)]
struct Shared {
    /// Rows answered with the most likely tokens.
    best: AtomicUsize,
    /// Rows answered with all logits.
    logits: AtomicUsize,
    /// Answers with so many tokens whatever is wanted; 0 for what is, `ALL` for all logits.
    always: AtomicUsize,
}

const ALL: usize = usize::MAX;

impl Searching {
    fn answer(&self, slice: &SequenceSlice, logits: Vec<f32>) -> Prediction {
        let k = match (self.shared.always.load(Ordering::SeqCst), slice.wanted) {
            (0, Wanted::Best { rows: 1, k }) if k < logits.len() && logits.iter().all(|logit| logit.is_finite()) => k,
            (0 | ALL, _) => {
                self.shared.logits.fetch_add(1, Ordering::SeqCst);
                return Prediction::Logits(logits);
            }
            (k, _) => k,
        };
        self.shared.best.fetch_add(1, Ordering::SeqCst);
        Prediction::Best(most_likely(&logits, k))
    }
}

impl StageBackend for Searching {
    fn open(&mut self, id: SequenceId, capacity: usize) -> Result<()> {
        self.inner.open(id, capacity)
    }

    fn fork(&mut self, from: SequenceId, to: SequenceId, len: usize, capacity: usize) -> Result<()> {
        self.inner.fork(from, to, len, capacity)
    }

    fn truncate(&mut self, id: SequenceId, length: usize) -> Result<()> {
        self.inner.truncate(id, length)
    }

    fn close(&mut self, id: SequenceId) {
        self.inner.close(id);
    }

    fn forward(&mut self, batch: &MicroBatch, input: Option<Tensor>, watch: &mut Watch) -> Result<StageOutput> {
        let mut asked = batch.clone();
        for slice in &mut asked.slices {
            slice.wanted = Wanted::Logits { rows: slice.wanted.rows() };
        }
        match self.inner.forward(&asked, input, watch)? {
            StageOutput::Logits(logits) => {
                let wanted = batch.predicted_rows();
                let answers = wanted.zip(logits).map(|((slice, ..), logits)| self.answer(slice, logits));
                Ok(StageOutput::Predictions(answers.collect()))
            }
            other => Ok(other),
        }
    }

    fn lens(&mut self, rows: &[HiddenRow]) -> Result<Vec<Vec<f32>>> {
        self.inner.lens(rows)
    }

    fn bytes(&self) -> StageBytes {
        self.inner.bytes()
    }
}

async fn searching() -> (HeterogeneousPipelineExecutor, Arc<Shared>) {
    searching_in(DEMO_MODEL).await
}

async fn searching_in(model: &str) -> (HeterogeneousPipelineExecutor, Arc<Shared>) {
    let shared = Arc::<Shared>::default();
    let given = shared.clone();
    let wrap = move |_, inner| -> Box<dyn StageBackend> { Box::new(Searching { inner, shared: given.clone() }) };
    let options = ExecutorOptions { wrap_backend: Some(Arc::new(wrap)), ..ExecutorOptions::default() };
    (executor_with(model, "cpu,cpu", Some(&[4, 4]), options).await.unwrap(), shared)
}

fn prompt(seed: u32) -> Vec<u32> {
    (0..9 + seed).map(|i| 4 + (seed * 97 + i * 13) % 700).collect()
}

const TOKENS: usize = 24;

fn greedy() -> GenerationOptions {
    GenerationOptions { ignore_eos: true, reuse_prefix: false, ..GenerationOptions::new(TOKENS, 0.0, 1.0) }
}

fn sampled(temperature: f32, top_k: Option<usize>, top_p: f32) -> GenerationOptions {
    GenerationOptions { temperature, top_k, top_p, seed: Some(11), ..greedy() }
}

/// Options, and how many of the tokens are chosen from the most likely ones.
fn cases() -> Vec<(GenerationOptions, usize)> {
    vec![
        (greedy(), TOKENS),
        (GenerationOptions { top_k: Some(40), top_p: 0.5, ..greedy() }, TOKENS),
        (GenerationOptions { prompt_logits: true, ..greedy() }, TOKENS - 1),
        (sampled(0.8, Some(40), 0.9), TOKENS),
        (GenerationOptions { min_p: 0.05, ..sampled(1.3, Some(5), 1.0) }, TOKENS),
        (sampled(1.0, Some(767), 1.0), TOKENS),
        (sampled(1.0, Some(768), 0.95), 0), // the whole vocabulary
        (sampled(1.0, None, 0.95), 0),
        (GenerationOptions { logprobs: Some(2), ..greedy() }, 0),
        (GenerationOptions { repetition_penalty: 1.2, ..greedy() }, 0),
        (GenerationOptions { frequency_penalty: 0.3, ..sampled(0.8, Some(40), 1.0) }, 0),
    ]
}

fn assert_same(found: &Generation, wanted: &Generation, options: &GenerationOptions) {
    assert_eq!(found.tokens, wanted.tokens, "{options:?}");
    assert_eq!(found.text, wanted.text, "{options:?}");
    assert_eq!(found.logprobs, wanted.logprobs, "{options:?}");
    assert_eq!(found.prompt_logits, wanted.prompt_logits, "{options:?}");
}

#[tokio::test]
async fn the_most_likely_tokens_generate_what_all_logits_generate() {
    let plain = executor(DEMO_MODEL, "cpu,cpu", Some(&[4, 4])).await.unwrap();
    let (searching, shared) = searching().await;
    for (seed, (options, from_best)) in (0..).zip(cases()) {
        shared.always.store(ALL, Ordering::SeqCst);
        let wanted = searching.infer_with(&prompt(seed), &options).await.unwrap();
        assert_eq!(shared.logits.swap(0, Ordering::SeqCst), TOKENS);
        shared.always.store(0, Ordering::SeqCst);
        let found = searching.infer_with(&prompt(seed), &options).await.unwrap();
        assert_same(&found, &wanted, &options);
        assert_same(&plain.infer_with(&prompt(seed), &options).await.unwrap(), &wanted, &options);
        assert_eq!(found.tokens.len(), TOKENS);
        let rows = (shared.best.swap(0, Ordering::SeqCst), shared.logits.swap(0, Ordering::SeqCst));
        assert_eq!(rows, (from_best, TOKENS - from_best), "{options:?}");
    }
    // No token, which is chosen from nothing.
    let none = searching.infer_with(&prompt(1), &GenerationOptions { max_tokens: 0, ..greedy() }).await.unwrap();
    assert!(none.tokens.is_empty());
}

#[tokio::test]
async fn sequences_that_need_different_things_share_steps() {
    let (searching, shared) = searching().await;
    let cases = cases();
    let mut alone = Vec::new();
    for (seed, (options, _)) in (0..).zip(&cases) {
        alone.push(searching.infer_with(&prompt(seed), options).await.unwrap());
    }
    shared.best.store(0, Ordering::SeqCst);
    let prompts: Vec<Vec<u32>> = (0..cases.len() as u32).map(prompt).collect();
    let together = prompts.iter().zip(&cases).map(|(prompt, (options, _))| searching.infer_with(prompt, options));
    let together = futures::future::join_all(together).await;
    for ((together, alone), (options, _)) in together.iter().zip(&alone).zip(&cases) {
        assert_same(together.as_ref().unwrap(), alone, options);
    }
    let expected: usize = cases.iter().map(|(_, from_best)| from_best).sum();
    assert_eq!(shared.best.load(Ordering::SeqCst), expected);
}

#[tokio::test]
async fn a_stage_that_answers_something_else_than_was_wanted_fails_the_request() {
    let (searching, shared) = searching().await;
    shared.always.store(3, Ordering::SeqCst);
    for (options, reason) in [
        (GenerationOptions { prompt_logits: true, ..greedy() }, "the most likely tokens where all logits were wanted"),
        (GenerationOptions { logprobs: Some(1), ..greedy() }, "the most likely tokens where all logits were wanted"),
        (greedy(), "from 3 tokens"),
        (sampled(1.0, Some(8), 1.0), "the 8 most likely were wanted"),
    ] {
        let message = searching.infer_with(&prompt(1), &options).await.unwrap_err().to_string();
        assert!(message.contains(reason), "{message}");
    }
    // The others go on.
    shared.always.store(0, Ordering::SeqCst);
    assert_eq!(searching.infer_with(&prompt(1), &greedy()).await.unwrap().tokens.len(), TOKENS);
}

#[tokio::test]
async fn a_row_that_is_not_finite_fails_as_it_does_with_all_logits() {
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(format!("{DEMO_MODEL}/{file}"), folder.path().join(file)).unwrap();
    }
    let mut tensors =
        candle_core::safetensors::load(format!("{DEMO_MODEL}/model.safetensors"), &candle_core::Device::Cpu).unwrap();
    let norm = tensors.get_mut("model.norm.weight").unwrap();
    let mut values: Vec<f32> = norm.to_dtype(candle_core::DType::F32).unwrap().to_vec1().unwrap();
    values[100] = f32::INFINITY;
    *norm = Tensor::from_vec(values, norm.dims(), &candle_core::Device::Cpu).unwrap();
    candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors")).unwrap();
    let model = folder.path().to_str().unwrap();
    let plain = executor(model, "cpu,cpu", Some(&[4, 4])).await.unwrap();
    let (searching, shared) = searching_in(model).await;
    for (options, _) in cases() {
        let wanted = plain.infer_with(&prompt(1), &options).await.unwrap_err();
        let found = searching.infer_with(&prompt(1), &options).await.unwrap_err();
        assert!(matches!(wanted, Error::LogitsNotFinite { .. }), "{wanted}");
        assert_eq!(found.to_string(), wanted.to_string(), "{options:?}");
    }
    assert_eq!(shared.best.load(Ordering::SeqCst), 0);
}
