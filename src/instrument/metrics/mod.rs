//! Figures from events: where time goes, what is held, how fast tokens come.
//!
//! [`Metrics::start`] makes a collector for [`ExecutorOptions::probe`](crate::ExecutorOptions::probe) and a thread behind
//! it that adds up; [`Metrics::snapshot`] gives the figures at a moment, and [`build_latency_rows`] and
//! [`build_memory_rows`] make rows for people from them.
//!
//! ```
//! use candle_pipeline::instrument::Probe;
//! use candle_pipeline::instrument::metrics::{Metrics, MetricsOptions, build_latency_rows};
//! use candle_pipeline::{DEMO_MODEL, DeviceSpec, ExecutorOptions, HeterogeneousPipeline, HeterogeneousPipelineExecutor};
//! # tokio::runtime::Runtime::new().unwrap().block_on(async {
//! let (collector, metrics) = Metrics::start(MetricsOptions::default())?;
//! let pipeline = HeterogeneousPipeline::new(&[DeviceSpec::CPU], DEMO_MODEL)?;
//! let options = ExecutorOptions { probe: Probe::new(collector), ..ExecutorOptions::default() };
//! let executor = HeterogeneousPipelineExecutor::with_options(pipeline, DEMO_MODEL, options).await?;
//! executor.infer(&[1, 2, 3], 5, 0.0, 1.0).await?;
//! for row in build_latency_rows(&metrics.snapshot()) {
//!     println!("{:width$}{} {:.3} ms", "", row.label, row.average_ms, width = 2 * row.level);
//! }
//! # Ok::<_, candle_pipeline::Error>(()) }).unwrap();
//! ```

mod bytes;
mod rows;
mod serving;
mod snapshot;
mod times;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

pub use rows::{LatencyRow, MemoryRow, build_latency_rows, build_memory_rows};
pub use snapshot::{
    Bandwidth, Bytes, Distribution, HostMemory, Latency, LayerLatency, Memory, Occupancy, Requests, Snapshot,
    StageFigures, StageFootprint, StageLatency, Timing, Tokens,
};

use self::bytes::{Holdings, Process};
use self::serving::Counts;
use self::times::{Rolling, StageTimes, Steps};
use super::queue::{Listener, Queue, QueueOptions, Sink, listen};
use super::{Event, Interest, KvState, ModelFacts, Record};
use crate::error::{Error, Result};

/// How often valid positions are asked for while nothing else of the KV changes.
const KV_EVERY: Duration = Duration::from_millis(5);

/// What is gathered and how.
#[derive(Debug, Clone, PartialEq)]
pub struct MetricsOptions {
    /// Look into a step at most every so long: its layers and their phases. Zero looks into all, `None` into none.
    pub phases: Option<Duration>,
    /// Wait for the device at the end of each phase. GPUs show the true time of phases only so, but what would have
    /// overlapped does not; on a CPU it changes nothing.
    pub synchronise: bool,
    /// How many of the latest steps an average is over.
    pub window: usize,
    /// How often the system is asked how much memory the process has. It is asked when weights have come too.
    pub host_interval: Duration,
    /// Bytes a second that devices can read, by the name that options give them, see
    /// [`read_bandwidth`](crate::device::read_bandwidth). Those of other devices stay unknown.
    pub device_bandwidth: BTreeMap<String, f64>,
    /// The queue between the pipeline and the thread that adds up.
    pub queue: QueueOptions,
}

impl Default for MetricsOptions {
    fn default() -> Self {
        MetricsOptions {
            phases: Some(Duration::from_millis(5)),
            synchronise: false,
            window: 10,
            host_interval: Duration::from_secs(1),
            device_bandwidth: BTreeMap::new(),
            queue: QueueOptions::default(),
        }
    }
}

/// Figures that are kept up to date until this is dropped. They are of one executor: opening another model begins them
/// anew.
pub struct Metrics {
    listener: Listener<MetricsSink>,
    figures: Arc<Mutex<Figures>>,
}

impl Metrics {
    /// Starts the thread. The collector is to be part of the executor's probe.
    pub fn start(options: MetricsOptions) -> Result<(Arc<Queue>, Metrics)> {
        if options.window == 0 {
            return Err(Error::option("window", "an average of 0 steps is none; give it at least 1"));
        }
        let bandwidths = options.device_bandwidth.iter();
        if let Some((device, rate)) = bandwidths.clone().find(|(_, rate)| !(rate.is_finite() && **rate > 0.0)) {
            return Err(Error::option(
                "device_bandwidth",
                format!("{rate} bytes a second of {device} is no rate above 0"),
            ));
        }
        let mut process = Process::new(options.host_interval);
        let (queue, interest) = (options.queue, interest(&options));
        let mut figures = Figures::new(options, Instant::now());
        if let Some(bytes) = process.resident(Instant::now()) {
            figures.holdings.start(bytes);
        }
        let figures = Arc::new(Mutex::new(figures));
        let sink = MetricsSink { figures: figures.clone(), process, interest };
        let (collector, listener) = listen("pipeline-metrics", sink, queue)?;
        Ok((collector, Metrics { listener, figures }))
    }

    /// The figures with all that was told before this call.
    pub fn snapshot(&self) -> Snapshot {
        self.listener.flush();
        lock(&self.figures).snapshot(Instant::now(), SystemTime::now())
    }
}

fn interest(options: &MetricsOptions) -> Interest {
    let MetricsOptions { phases, synchronise, .. } = *options;
    Interest { phases, synchronise, kv: Some(KV_EVERY), ..Interest::default() }
}

fn lock(figures: &Mutex<Figures>) -> MutexGuard<'_, Figures> {
    figures.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Adds up behind the queue.
struct MetricsSink {
    figures: Arc<Mutex<Figures>>,
    process: Process,
    interest: Interest,
}

impl Sink for MetricsSink {
    fn record(&mut self, record: &Record) {
        lock(&self.figures).record(record);
    }

    fn idle(&mut self) {
        let now = Instant::now();
        let due = self.process.is_due(now) || lock(&self.figures).holdings.has_loaded();
        if due && let Some(bytes) = self.process.resident(now) {
            lock(&self.figures).holdings.resident(bytes);
        }
    }

    fn interest(&self) -> Interest {
        self.interest.clone()
    }
}

/// All that is kept between two snapshots.
struct Figures {
    options: MetricsOptions,
    began: Instant,
    architecture: String,
    steps: Steps,
    sampling: Rolling,
    admission: Rolling,
    holdings: Holdings,
    counts: Counts,
    kv: KvState,
    dropped: u64,
}

impl Figures {
    fn new(options: MetricsOptions, began: Instant) -> Figures {
        let nothing = ModelFacts::default();
        let mut figures = Figures {
            counts: Counts::new(began, &[], options.window, &BTreeMap::new()),
            options,
            began,
            architecture: String::new(),
            steps: Steps::default(),
            sampling: Rolling::default(),
            admission: Rolling::default(),
            holdings: Holdings::default(),
            kv: KvState::default(),
            dropped: 0,
        };
        figures.open(&nothing, began);
        figures
    }

    fn open(&mut self, facts: &ModelFacts, at: Instant) {
        let MetricsOptions { window, phases, device_bandwidth, .. } = &self.options;
        self.began = at;
        self.architecture = facts.architecture.clone();
        self.steps = Steps::new(facts.stages.len(), *window, phases.is_some());
        (self.sampling, self.admission) = Default::default();
        self.holdings.open(facts);
        self.counts = Counts::new(at, &facts.stages, *window, device_bandwidth);
        self.kv = KvState { limit: facts.kv_positions, ..KvState::default() };
    }

    fn record(&mut self, record: &Record) {
        let window = self.options.window;
        match &record.event {
            Event::ModelOpened(facts) => self.open(facts, record.at),
            Event::RequestQueued { request, .. } => self.counts.queued(*request),
            Event::RequestStarted { request, prompt_tokens, queued } => {
                self.admission.push(window, *queued);
                self.counts.started(*request, *prompt_tokens);
            }
            Event::PrefixReused { tokens, .. } => self.counts.reused(*tokens),
            Event::RequestFinished { request, outcome, .. } => self.counts.finished(*request, *outcome),
            Event::StepSent { step, slices } => {
                self.steps.sent(*step, record.at);
                self.counts.sent(*step, slices);
            }
            Event::StageStep { stage, step, rows, queued, wait, compute, copy, bytes } => {
                let times = StageTimes { compute: *compute, copy: *copy, queued: *queued, wait: *wait };
                self.steps.computed(*stage, *step, record.at, times.clone());
                self.counts.computed(*stage, *step, *rows, *bytes, times);
            }
            Event::Phases { stage, step, laps, .. } => self.steps.phases(*stage, *step, laps),
            Event::Sampled { index, since, duration, .. } => {
                self.sampling.push(window, *duration);
                self.counts.sampled(record.at, *index, *since);
            }
            Event::StageMemory { stage, weights, kv, scratch } => self.holdings.hold(*stage, *weights, *kv, *scratch),
            Event::Kv(state) => {
                self.kv = *state;
                self.counts.kv(state);
                self.holdings.computed(state.valid);
            }
            Event::Dropped { events } => self.dropped += events,
            Event::StepFinished { .. } | Event::SchedulerTurn { .. } => {}
            Event::Activations { .. } | Event::Attention { .. } | Event::Lens { .. } => {}
        }
    }

    fn snapshot(&mut self, now: Instant, time: SystemTime) -> Snapshot {
        let mut latency =
            Latency { sampling: self.sampling.timing(), admission: self.admission.timing(), ..Latency::default() };
        self.steps.fill(&mut latency);
        Snapshot {
            time: time.duration_since(SystemTime::UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64()),
            uptime: now.saturating_duration_since(self.began).as_secs_f64(),
            architecture: self.architecture.clone(),
            stages: self.counts.stages(),
            latency,
            memory: self.holdings.memory().clone(),
            requests: self.counts.requests(),
            tokens: self.counts.tokens(now),
            kv: self.kv,
            dropped_events: self.dropped,
        }
    }
}

#[cfg(test)]
mod tests;
