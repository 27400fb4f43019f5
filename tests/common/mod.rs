//! What several test binaries need.
#![allow(dead_code)] // each binary uses a part

pub mod models;
pub mod programs;
pub mod stages;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use candle_core::Tensor;
use candle_pipeline::backend::{MicroBatch, SequenceId, StageBackend, StageBytes, StageOutput};
use candle_pipeline::instrument::{HiddenRow, Watch};
use candle_pipeline::{
    DEMO_MODEL, DeviceSpec, Error, ExecutorOptions, Generation, GenerationOptions, HeterogeneousPipeline,
    HeterogeneousPipelineExecutor, KvType, PipelineOptions, Result, Split,
};

/// A folder below tests/fixtures.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(DEMO_MODEL).join("../../tests/fixtures").join(name)
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
    // Keys and values unrounded, so that what is compared with other programs is the model's arithmetic alone.
    let plan = PipelineOptions { split, kv_type: KvType::F32, ..PipelineOptions::default() };
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

/// What a test does to the stages, and what it sees of them.
#[derive(Default)]
pub struct Meddling {
    /// Forward passes so far, over all stages.
    pub passes: AtomicUsize,
    /// Passes of stage 1.
    pub second_stage: AtomicUsize,
    /// Milliseconds each pass takes longer.
    pub delay_ms: AtomicUsize,
    /// Microseconds each row takes longer.
    pub row_delay_us: AtomicUsize,
    /// Pass of stage 1 that panics; 0 for none.
    pub panic_at: AtomicUsize,
    /// Pass of stage 1 that returns an error; 0 for none.
    pub error_at: AtomicUsize,
    /// Sequence, counted from 1, that stage 1 has no room for; 0 for none.
    pub refuse_open: AtomicUsize,
    /// Sequences opened in stage 1.
    pub opened: AtomicUsize,
    /// Backends dropped.
    pub dropped: AtomicUsize,
    /// Stage, micro-batch, beginning and end of each pass.
    pub log: Mutex<Vec<(usize, MicroBatch, Instant, Instant)>>,
}

impl Meddling {
    /// Options whose stages it meddles with.
    pub fn options(self: &Arc<Self>) -> ExecutorOptions {
        let shared = self.clone();
        let wrap = move |stage, inner| -> Box<dyn StageBackend> {
            Box::new(Meddled { stage, inner, meddling: shared.clone() })
        };
        ExecutorOptions { wrap_backend: Some(Arc::new(wrap)), ..ExecutorOptions::default() }
    }
}

struct Meddled {
    stage: usize,
    inner: Box<dyn StageBackend>,
    meddling: Arc<Meddling>,
}

impl Meddled {
    fn admit(&self) -> Result<()> {
        if self.stage == 1 {
            let opened = self.meddling.opened.fetch_add(1, Ordering::SeqCst) + 1;
            if opened == self.meddling.refuse_open.load(Ordering::SeqCst) {
                return Err(Error::Tensors("the test wants no room".into()));
            }
        }
        Ok(())
    }
}

impl StageBackend for Meddled {
    fn open(&mut self, id: SequenceId, capacity: usize) -> Result<()> {
        self.admit()?;
        self.inner.open(id, capacity)
    }

    fn fork(&mut self, from: SequenceId, to: SequenceId, len: usize, capacity: usize) -> Result<()> {
        self.admit()?;
        self.inner.fork(from, to, len, capacity)
    }

    fn truncate(&mut self, id: SequenceId, length: usize) -> Result<()> {
        self.inner.truncate(id, length)
    }

    fn close(&mut self, id: SequenceId) {
        self.inner.close(id);
    }

    fn forward(&mut self, batch: &MicroBatch, input: Option<Tensor>, watch: &mut Watch) -> Result<StageOutput> {
        let meddling = &self.meddling;
        let began = Instant::now();
        meddling.passes.fetch_add(1, Ordering::SeqCst);
        let rows = meddling.row_delay_us.load(Ordering::SeqCst) * batch.tokens.len();
        let delay = Duration::from_millis(meddling.delay_ms.load(Ordering::SeqCst) as u64);
        std::thread::sleep(delay + Duration::from_micros(rows as u64));
        if self.stage == 1 {
            let pass = meddling.second_stage.fetch_add(1, Ordering::SeqCst) + 1;
            assert!(pass != meddling.panic_at.load(Ordering::SeqCst), "the test wants this panic");
            if pass == meddling.error_at.load(Ordering::SeqCst) {
                return Err(Error::Tensors("the test wants this error".into()));
            }
        }
        let output = self.inner.forward(batch, input, watch);
        meddling.log.lock().unwrap().push((self.stage, batch.clone(), began, Instant::now()));
        output
    }

    fn lens(&mut self, rows: &[HiddenRow]) -> Result<Vec<Vec<f32>>> {
        self.inner.lens(rows)
    }

    fn bytes(&self) -> StageBytes {
        self.inner.bytes()
    }
}

impl Drop for Meddled {
    fn drop(&mut self) {
        self.meddling.dropped.fetch_add(1, Ordering::SeqCst);
    }
}

/// The demo model on two stages that a test meddles with.
pub async fn meddled(prefill_chunk: usize) -> (HeterogeneousPipelineExecutor, Arc<Meddling>) {
    let meddling = Arc::new(Meddling::default());
    let options = ExecutorOptions { prefill_chunk, ..meddling.options() };
    (executor_with(DEMO_MODEL, "cpu,cpu", Some(&[5, 3]), options).await.unwrap(), meddling)
}

/// KV of running sequences; what is kept of ended ones does not count.
pub fn kv_bytes(executor: &HeterogeneousPipelineExecutor) -> u64 {
    executor.memory().iter().map(|stage| stage.kv - stage.kv_retained).sum()
}

/// Waits until every stage has freed its KV, but for what is kept, and then all of it.
pub async fn assert_memory_returns(executor: &HeterogeneousPipelineExecutor) {
    wait_until("KV of running sequences is freed", || kv_bytes(executor) == 0).await;
    executor.clear_prefix_cache();
    wait_until("all KV is freed", || executor.memory().iter().all(|stage| stage.kv == 0)).await;
    assert_eq!(executor.prefix_stats().retained_positions, 0);
}

/// Waits for something that must come soon.
pub async fn wait_until(what: &str, holds: impl Fn() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < Duration::from_secs(5), "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
