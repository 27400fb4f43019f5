//! The part that applications talk to: loads a planned pipeline, keeps its threads, and serves requests from any number
//! of async tasks. Async is only at this edge: the work is done on named std threads, and no runtime is started.

pub mod options;
pub mod sampler;
pub mod scheduler;
pub mod stats;
pub mod stream;
pub mod tokenizer;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use futures::StreamExt;

pub use self::options::ExecutorOptions;
use self::options::GenerationOptions;
use self::scheduler::prefix::PrefixCounters;
use self::scheduler::{GenerationEvent, Limits, Message, QueuePlace, Request, Scheduler, TextState, Ways, capacity};
pub use self::stats::{Generation, PrefixStats, StageMemory, StageStats, WarmupReport};
use self::stream::{GenerationStream, TextStream, TokenStream};
use self::tokenizer::{ChatMessage, Tokenizer};
use crate::backend::SequenceId;
use crate::error::{Error, Result};
use crate::instrument::{Event, Probe};
use crate::pipeline::stages::{self, StartOptions, spawn};
use crate::pipeline::worker::{StageCounters, panic_message};
use crate::pipeline::{HeterogeneousPipeline, StagePlan};
use crate::weights::hub::{self, ModelFiles};

/// Runs a planned model. Handles are cheap to clone and may be used from many tasks at once; when the last one is
/// dropped the stages finish the step they are in and their threads are joined, which blocks for as long.
///
/// ```
/// # tokio_test(async {
/// use candle_pipeline::{DEMO_MODEL, DeviceSpec, HeterogeneousPipeline, HeterogeneousPipelineExecutor};
/// let devices = DeviceSpec::parse_list("cpu,cpu")?;
/// let pipeline = HeterogeneousPipeline::new(&devices, DEMO_MODEL)?;
/// let executor = HeterogeneousPipelineExecutor::new(pipeline, DEMO_MODEL).await?;
/// let tokenizer = executor.tokenizer().unwrap();
/// let prompt = tokenizer.encode("Once upon a time", true)?;
/// let tokens = executor.infer(&prompt, 20, 0.0, 1.0).await?;
/// assert_eq!(tokens.len(), 20);
/// # Ok::<_, candle_pipeline::Error>(()) }).unwrap();
/// # fn tokio_test<F: std::future::Future>(f: F) -> F::Output {
/// #     tokio::runtime::Runtime::new().unwrap().block_on(f)
/// # }
/// ```
#[derive(Clone)]
pub struct HeterogeneousPipelineExecutor {
    inner: Arc<Inner>,
}

struct Inner {
    scheduler: Sender<Message>,
    threads: Vec<JoinHandle<()>>,
    pipeline: HeterogeneousPipeline,
    counters: Vec<Arc<StageCounters>>,
    prefix_counters: Arc<PrefixCounters>,
    /// Requests that wait for admission, and how many may.
    waiting: Arc<AtomicUsize>,
    queue_limit: Option<usize>,
    /// A tokenizer that cannot be built is an error when text is asked for; token ids work without.
    tokenizer: Result<Option<Tokenizer>>,
    failed: Arc<OnceLock<Error>>,
    stopping: Arc<AtomicBool>,
    next_id: AtomicU64,
    load_time: Duration,
    probe: Probe,
}

impl HeterogeneousPipelineExecutor {
    /// Loads each stage's weights on a thread of its own and starts serving. `model` must be the one that `pipeline`
    /// was planned for.
    pub async fn new(pipeline: HeterogeneousPipeline, model: &str) -> Result<Self> {
        Self::with_options(pipeline, model, ExecutorOptions::default()).await
    }

    /// The same with options.
    pub async fn with_options(pipeline: HeterogeneousPipeline, model: &str, options: ExecutorOptions) -> Result<Self> {
        options.validate()?;
        let (done, loaded) = tokio::sync::oneshot::channel();
        let model = model.to_string();
        // Loading blocks, so it has a thread; the executor it makes comes back through the channel.
        spawn("pipeline-load".into(), move || {
            let started = catch_unwind(AssertUnwindSafe(|| Self::start(pipeline, &model, options)));
            let _ = done
                .send(started.unwrap_or_else(|panic| Err(Error::SchedulerPanicked { reason: panic_message(&*panic) })));
        })?;
        loaded.await.map_err(|_| Error::Stopped)?
    }

    fn start(pipeline: HeterogeneousPipeline, model: &str, options: ExecutorOptions) -> Result<Self> {
        let began = Instant::now();
        let files = hub::locate(model)?;
        if files != *pipeline.model() {
            let planned = format!("{:?}", pipeline.model());
            return Err(Error::option("model", format!("the pipeline was planned for {planned}, not for `{model}`")));
        }
        let tokenizer = match &files {
            ModelFiles::HuggingFace { dir } => Tokenizer::from_hf_dir(dir),
            ModelFiles::Gguf { file } => Tokenizer::from_gguf(file),
        };
        if let Err(error) = &tokenizer {
            tracing::warn!("only token ids can be used: {error}");
        }
        let failed = Arc::new(OnceLock::new());
        let (to_scheduler, scheduler_inbox) = std::sync::mpsc::channel();
        let limits = limits(&pipeline, &options)?;
        if options.probe.is_on() {
            let facts = Arc::new(pipeline.facts(limits.kv_positions)?);
            options.probe.emit(|| Event::ModelOpened(facts));
        }
        let start = StartOptions {
            // Enough for the steps and for many sequences to be opened and closed behind a step that takes long.
            inbox: 2 * pipeline.stages().len() + 2 * options.max_sequences.min(1024),
            probe: options.probe.clone(),
            progress: options.progress,
            wrap: options.wrap_backend,
        };
        let replies = to_scheduler.clone();
        let stages = stages::start(&pipeline, &start, move |reply| {
            let _ = replies.send(Message::Stage(reply));
        })?;
        let (mut threads, counters, stopping) = (stages.threads, stages.counters, stages.stopping);

        let prefix_counters: Arc<PrefixCounters> = Arc::default();
        let ways = Ways { inbox: scheduler_inbox, first_stage: stages.first, cancelled: stages.cancelled };
        let scheduler = Scheduler::new(limits, ways, options.probe.clone(), prefix_counters.clone(), failed.clone());
        // The scheduler first: joining it drops the way into the first stage, which lets the stages end in turn.
        threads.insert(0, spawn("pipeline-scheduler".into(), move || scheduler.run())?);
        let inner = Inner {
            scheduler: to_scheduler,
            threads,
            pipeline,
            counters,
            prefix_counters,
            waiting: Arc::default(),
            queue_limit: options.queue_limit,
            tokenizer,
            failed,
            stopping,
            next_id: AtomicU64::new(0),
            load_time: began.elapsed(),
            probe: options.probe,
        };
        Ok(HeterogeneousPipelineExecutor { inner: Arc::new(inner) })
    }

    /// Where its events go: to [pause](Probe::pause) and resume those who listen.
    pub fn probe(&self) -> &Probe {
        &self.inner.probe
    }

    /// Runs a prompt and a few tokens through every stage, so that kernels are compiled, packs built and caches touched
    /// before the first request. Leaves no trace in later results.
    pub async fn warmup(&self) -> Result<WarmupReport> {
        const PREFILL: usize = 32;
        const DECODE: usize = 2;
        let began = Instant::now();
        let compute = || -> Vec<u64> {
            self.inner.counters.iter().map(|counters| counters.compute_ns.load(Ordering::Relaxed)).collect()
        };
        let before = compute();
        let context = self.inner.pipeline.context_length();
        let prefill = PREFILL.min(context.saturating_sub(DECODE)).max(1);
        let decode = DECODE.min(context.saturating_sub(prefill));
        let options =
            GenerationOptions { ignore_eos: true, reuse_prefix: false, ..GenerationOptions::new(decode + 1, 0.0, 1.0) };
        self.infer_with(&vec![0; prefill], &options).await?;
        let stages = self.inner.pipeline.stages().iter().zip(compute()).zip(before);
        Ok(WarmupReport {
            prefill_tokens: prefill,
            decode_steps: decode,
            duration: began.elapsed(),
            stages: stages
                .map(|((stage, after), before)| (stage.device, Duration::from_nanos(after - before)))
                .collect(),
        })
    }

    /// Generates up to `max_tokens` tokens and returns them without the prompt. `temperature` 0 is greedy, `top_p` 1
    /// cuts nothing.
    pub async fn infer(&self, ids: &[u32], max_tokens: usize, temperature: f32, top_p: f32) -> Result<Vec<u32>> {
        let options = GenerationOptions::new(max_tokens, temperature, top_p);
        Ok(self.infer_with(ids, &options).await?.tokens)
    }

    /// Generates for all prompts together: they share the passes over the weights, and each gets the tokens that it gets
    /// alone. Outputs are in the order of the prompts. The first error ends all.
    pub async fn infer_batch(
        &self,
        sequences: &[Vec<u32>],
        max_tokens: usize,
        temperature: f32,
        top_p: f32,
    ) -> Result<Vec<Vec<u32>>> {
        let options = GenerationOptions::new(max_tokens, temperature, top_p);
        let generations = self.infer_batch_with(sequences, &options).await?;
        Ok(generations.into_iter().map(|generation| generation.tokens).collect())
    }

    /// Generates as a stream of token ids. Dropping the stream stops the work.
    pub fn infer_stream(&self, ids: Vec<u32>, max_tokens: usize, temperature: f32, top_p: f32) -> TokenStream {
        TokenStream(self.infer_stream_with(ids, &GenerationOptions::new(max_tokens, temperature, top_p)))
    }

    /// [`infer`](Self::infer) with all options.
    pub async fn infer_with(&self, ids: &[u32], options: &GenerationOptions) -> Result<Generation> {
        collect(self.submit(ids.to_vec(), options, !options.stop_strings.is_empty())).await
    }

    /// [`infer_batch`](Self::infer_batch) with all options. A given seed counts up over the prompts, so that equal
    /// prompts differ.
    pub async fn infer_batch_with(
        &self,
        sequences: &[Vec<u32>],
        options: &GenerationOptions,
    ) -> Result<Vec<Generation>> {
        let text = !options.stop_strings.is_empty();
        let (mut requests, mut streams) = (Vec::new(), Vec::new());
        for (index, ids) in sequences.iter().enumerate() {
            let seed = options.seed.map(|seed| seed.wrapping_add(index as u64));
            let (request, stream) = self.prepare(ids.clone(), &GenerationOptions { seed, ..options.clone() }, text)?;
            requests.push(request);
            streams.push(collect(stream));
        }
        // In one message, so that already their prompts share micro-batches.
        self.inner.scheduler.send(Message::Submit(requests)).map_err(|_| Error::Stopped)?;
        futures::future::try_join_all(streams).await
    }

    /// [`infer_stream`](Self::infer_stream) with all options.
    pub fn infer_stream_with(&self, ids: Vec<u32>, options: &GenerationOptions) -> GenerationStream {
        self.submit(ids, options, !options.stop_strings.is_empty())
    }

    /// Generates text from a prompt. Needs a model with a tokenizer.
    pub async fn infer_text(&self, prompt: &str, options: &GenerationOptions) -> Result<Generation> {
        let ids = self.needed_tokenizer()?.encode(prompt, true)?;
        collect(self.submit(ids, options, true)).await
    }

    /// Generates text as a stream of pieces, each of whole characters. Needs a model with a tokenizer.
    pub fn infer_text_stream(&self, prompt: &str, options: &GenerationOptions) -> TextStream {
        let ids = self.needed_tokenizer().and_then(|tokenizer| tokenizer.encode(prompt, true));
        TextStream(self.submit_encoded(ids, options))
    }

    /// Answers a chat as a stream of text. Needs a model with a tokenizer and a chat template.
    pub fn chat_stream(&self, messages: &[ChatMessage], options: &GenerationOptions) -> TextStream {
        TextStream(self.chat_stream_with(messages, options))
    }

    /// [`chat_stream`](Self::chat_stream) with tokens and text of each step.
    pub fn chat_stream_with(&self, messages: &[ChatMessage], options: &GenerationOptions) -> GenerationStream {
        let ids = self.needed_tokenizer().and_then(|tokenizer| tokenizer.encode_chat(messages));
        self.submit_encoded(ids, options)
    }

    /// [`infer_stream_with`](Self::infer_stream_with) whose tokens carry their text. Needs a model with a tokenizer.
    pub fn infer_stream_with_text(&self, ids: Vec<u32>, options: &GenerationOptions) -> GenerationStream {
        self.submit(ids, options, true)
    }

    /// The model's tokenizer, if it has one that can be used.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.inner.tokenizer.as_ref().ok()?.as_ref()
    }

    /// The model's tokenizer, or the reason why there is none.
    pub fn needed_tokenizer(&self) -> Result<&Tokenizer> {
        let missing = "the model has no tokenizer (tokenizer.json, or tokenizer.ggml.* in GGUF); use token ids";
        match &self.inner.tokenizer {
            Ok(tokenizer) => tokenizer.as_ref().ok_or_else(|| Error::Tokenizer(missing.into())),
            Err(error) => Err(error.clone()),
        }
    }

    /// The plan it runs.
    pub fn pipeline(&self) -> &HeterogeneousPipeline {
        &self.inner.pipeline
    }

    /// The stages, in the order in which tokens pass them.
    pub fn stages(&self) -> &[StagePlan] {
        self.inner.pipeline.stages()
    }

    /// What each stage holds now.
    pub fn memory(&self) -> Vec<StageMemory> {
        let counters = self.inner.counters.iter();
        let retained = self.inner.prefix_counters.retained_positions.load(Ordering::Relaxed);
        counters
            .zip(self.stages())
            .map(|(counters, stage)| {
                let kv = counters.kv_bytes.load(Ordering::Relaxed);
                StageMemory {
                    device: stage.device,
                    weights: counters.weight_bytes.load(Ordering::Relaxed),
                    kv,
                    // The stage may have freed already what was kept when that was read.
                    kv_retained: (retained * stage.kv_bytes_per_token).min(kv),
                    kv_budget: stage.kv_budget,
                }
            })
            .collect()
    }

    /// Where each stage's time has gone. Differences of two readings are an interval's, see [`StageStats::since`].
    pub fn stage_stats(&self) -> Vec<StageStats> {
        let time = |counter: &AtomicU64| Duration::from_nanos(counter.load(Ordering::Relaxed));
        let counters = self.inner.counters.iter();
        counters
            .zip(self.stages())
            .map(|(counters, stage)| StageStats {
                device: stage.device,
                compute: time(&counters.compute_ns),
                wait: time(&counters.wait_ns),
                copy: time(&counters.copy_ns),
                queued: time(&counters.queued_ns),
                steps: counters.steps.load(Ordering::Relaxed),
                rows: counters.rows.load(Ordering::Relaxed),
            })
            .collect()
    }

    /// What prefix reuse has saved and what it keeps.
    pub fn prefix_stats(&self) -> PrefixStats {
        let counters = &self.inner.prefix_counters;
        PrefixStats {
            lookups: counters.lookups.load(Ordering::Relaxed),
            hits: counters.hits.load(Ordering::Relaxed),
            reused_tokens: counters.reused_tokens.load(Ordering::Relaxed),
            retained_sequences: counters.retained_sequences.load(Ordering::Relaxed),
            retained_positions: counters.retained_positions.load(Ordering::Relaxed),
        }
    }

    /// Frees the KV of ended sequences. Returns before the stages have done so.
    pub fn clear_prefix_cache(&self) {
        let _ = self.inner.scheduler.send(Message::ClearPrefixes);
    }

    /// Requests that wait for admission now.
    pub fn waiting(&self) -> usize {
        self.inner.waiting.load(Ordering::Relaxed)
    }

    /// Time that loading took.
    pub fn load_time(&self) -> Duration {
        self.inner.load_time
    }

    /// The error that stopped the executor, if a stage has died. Nothing can be generated after that; build a new one.
    pub fn failure(&self) -> Option<&Error> {
        self.inner.failed.get()
    }

    fn submit_encoded(&self, ids: Result<Vec<u32>>, options: &GenerationOptions) -> GenerationStream {
        match ids {
            Ok(ids) => self.submit(ids, options, true),
            Err(error) => GenerationStream::refused(error, self.inner.scheduler.clone()),
        }
    }

    fn submit(&self, ids: Vec<u32>, options: &GenerationOptions, text: bool) -> GenerationStream {
        let submitted = self.prepare(ids, options, text).and_then(|(request, stream)| {
            let sent = self.inner.scheduler.send(Message::Submit(vec![request]));
            sent.map(|()| stream).map_err(|_| Error::Stopped)
        });
        match submitted {
            Ok(stream) => stream,
            Err(error) => GenerationStream::refused(error, self.inner.scheduler.clone()),
        }
    }

    /// Checks a request, and gives it a place in the queue and a stream for its events.
    fn prepare(
        &self,
        prompt: Vec<u32>,
        options: &GenerationOptions,
        text: bool,
    ) -> Result<(Request, GenerationStream)> {
        options.validate()?;
        if let Some(error) = self.failure() {
            return Err(error.clone());
        }
        let pipeline = &self.inner.pipeline;
        let (vocab_size, context_length) = (pipeline.config().vocab_size, pipeline.context_length());
        if prompt.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        if let Some(position) = prompt.iter().position(|&token| token as usize >= vocab_size) {
            return Err(Error::TokenOutOfRange { token: prompt[position], position, vocab_size });
        }
        if prompt.len() >= context_length {
            return Err(Error::PromptTooLong { prompt_tokens: prompt.len(), context_length });
        }
        let tokens = capacity(prompt.len(), options.max_tokens, context_length);
        for (index, stage) in pipeline.stages().iter().enumerate() {
            let needed = stage.kv_bytes_per_token.saturating_mul(tokens as u64);
            if needed > stage.kv_budget {
                return Err(Error::KvCacheTooSmall {
                    stage: index,
                    device: stage.device.to_string(),
                    tokens,
                    needed,
                    available: stage.kv_budget,
                    tokens_that_fit: (stage.kv_budget / stage.kv_bytes_per_token.max(1)) as usize,
                });
            }
        }
        let text = match text {
            true => Some(TextState::new(self.needed_tokenizer()?, &prompt, &options.stop_strings)?),
            false => None,
        };
        let place = QueuePlace::take(&self.inner.waiting, self.inner.queue_limit)
            .map_err(|waiting| Error::Busy { waiting, limit: self.inner.queue_limit.unwrap_or(usize::MAX) })?;
        let id = SequenceId(self.inner.next_id.fetch_add(1, Ordering::Relaxed));
        let (events, receiver) = tokio::sync::mpsc::unbounded_channel();
        let seed = options.seed.unwrap_or_else(rand::random);
        let submitted = Instant::now();
        let request = Request {
            id,
            prompt,
            seed,
            text,
            events,
            submitted,
            // A deadline further off than the clock goes is none.
            deadline: options.deadline.and_then(|deadline| submitted.checked_add(deadline)),
            options: options.clone(),
            place: Some(place),
        };
        Ok((request, GenerationStream::live(id, receiver, self.inner.scheduler.clone())))
    }
}

impl std::fmt::Debug for HeterogeneousPipelineExecutor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HeterogeneousPipelineExecutor").field("stages", &self.stages()).finish()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Relaxed);
        let _ = self.scheduler.send(Message::Shutdown);
        for thread in self.threads.drain(..) {
            // A thread that panicked has told its callers so already. A collector may hold the last handle, on one of
            // these threads, which cannot wait for itself.
            if thread.thread().id() != std::thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

/// Awaits all of a generation.
async fn collect(mut stream: GenerationStream) -> Result<Generation> {
    let (mut tokens, mut text, mut logprobs, mut prompt_logits) = (Vec::new(), String::new(), Vec::new(), None);
    while let Some(event) = stream.next().await {
        match event? {
            GenerationEvent::Prefilled { logits } => prompt_logits = logits,
            GenerationEvent::Token(token) => {
                tokens.push(token.id);
                text.push_str(&token.text);
                logprobs.extend(token.logprob);
            }
            GenerationEvent::Finished(finish) => {
                text.push_str(&finish.text);
                return Ok(Generation {
                    tokens,
                    text,
                    finish_reason: finish.reason,
                    logprobs,
                    prompt_logits,
                    time_to_first_token: finish.time_to_first_token,
                    total_time: finish.total_time,
                    reused_tokens: finish.reused_tokens,
                });
            }
        }
    }
    Err(Error::Stopped)
}

/// What the scheduler may do, from the plan and the options.
fn limits(pipeline: &HeterogeneousPipeline, options: &ExecutorOptions) -> Result<Limits> {
    let config = pipeline.config();
    let kv_positions = |stage: &StagePlan| stage.kv_budget / stage.kv_bytes_per_token.max(1);
    let micro_batches = options.micro_batches.unwrap_or(pipeline.stages().len());
    Ok(Limits {
        context_length: pipeline.context_length(),
        prefill_chunk: options.prefill_chunk,
        token_budget: options.token_budget,
        rows_at_a_time: pipeline.rows_at_a_time()?,
        micro_batches,
        in_flight: options.in_flight.map_or(micro_batches, |in_flight| in_flight.min(micro_batches)),
        max_sequences: options.max_sequences,
        kv_positions: pipeline.stages().iter().map(kv_positions).min().unwrap_or(0) as usize,
        prefix_cache: options.prefix_cache,
        share_generated: pipeline.decodes_like_prompts()?,
        eos_token_ids: config.eos_token_ids.clone(),
        suppressed: Arc::new(config.suppressed.clone()),
        recompute_at: config.rotations_change_at(),
        own_rotations_from: config.rotations_follow_length_from(),
    })
}
