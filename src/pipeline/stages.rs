//! Starts the stages of a pipeline: a thread for each, which loads its own weights, and the way from each to the next.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::thread::JoinHandle;

use super::HeterogeneousPipeline;
use super::inbox::{Outlet, inbox};
use super::link::Link;
use super::message::{self, CancelledSteps, StageFailure, StageReply};
use super::worker::{Next, StageCounters, Worker, panic_message};
use crate::backend::StageBackend;
use crate::error::{Error, Result};
use crate::instrument::Probe;

/// Called with a stage's index and backend on the stage's thread; what it returns is run instead. For backends that add
/// something to another one, and for tests.
pub type WrapBackend = Arc<dyn Fn(usize, Box<dyn StageBackend>) -> Box<dyn StageBackend> + Send + Sync>;

/// Called as weights load, with the bytes loaded and the bytes in all, over all stages.
pub type Progress = Arc<dyn Fn(u64, u64) + Send + Sync>;

/// How the stages are started.
#[derive(Clone)]
pub struct StartOptions {
    /// Messages that a stage's inbox holds before the sender has to wait.
    pub inbox: usize,
    /// Where the stages' events go.
    pub probe: Probe,
    /// Called as weights load.
    pub progress: Option<Progress>,
    /// Wraps each stage's backend.
    pub wrap: Option<WrapBackend>,
}

/// Running stages. They end one after the other when `first` is dropped; join the threads after that.
pub struct Stages {
    /// The way into the first stage.
    pub first: Outlet,
    /// A thread for each stage, in their order.
    pub threads: Vec<JoinHandle<()>>,
    /// The figures that each stage publishes.
    pub counters: Vec<Arc<StageCounters>>,
    /// Steps that the stages skip.
    pub cancelled: Arc<CancelledSteps>,
    /// Makes the stages end without computing what is still queued, when set.
    pub stopping: Arc<AtomicBool>,
}

/// Loads the stages of `pipeline`, each on its own thread, and returns when all are ready. Their answers go to `replies`.
pub fn start<R>(pipeline: &HeterogeneousPipeline, options: &StartOptions, replies: R) -> Result<Stages>
where
    R: Fn(StageReply) + Clone + Send + 'static,
{
    let count = pipeline.stages().len();
    let total = pipeline.stages().iter().map(|stage| stage.weight_bytes).sum();
    let (loaded, cancelled, stopping) = (Arc::new(AtomicU64::new(0)), Arc::default(), Arc::default());
    let (ready, readiness) = std::sync::mpsc::channel();
    let (devices, link) = (pipeline.devices(), pipeline.options().link);
    // Before any stage loads: a link is tried in its devices' turns, which a stage has for as long as it loads.
    let links = devices.windows(2).map(|pair| Link::new(&pair[0], &pair[1], link));
    let mut links = links.collect::<Result<Vec<Link>>>()?;
    let mut threads = Vec::with_capacity(count);
    let mut counters = vec![Arc::default(); count];
    // From the last stage to the first, since each is given the way into the next.
    let mut next: Option<Outlet> = None;
    for stage in (0..count).rev() {
        let (outlet, stage_inbox) = inbox(options.inbox, links.pop(), link.as_bytes);
        let counter: Arc<StageCounters> = Arc::default();
        counters[stage] = counter.clone();
        let replies = replies.clone();
        let device = pipeline.stages()[stage].device.to_string();
        let worker = Worker {
            stage,
            device: devices[stage].clone(),
            inbox: stage_inbox,
            next: next.take().map_or(Next::Scheduler, |outlet| Next::Stage(Box::new(outlet))),
            replies: match link.as_bytes {
                false => Box::new(replies),
                true => Box::new(move |reply| replies(through_bytes(&reply, stage, &device))),
            },
            counters: counter,
            cancelled: Arc::clone(&cancelled),
            stopping: Arc::clone(&stopping),
            probe: options.probe.clone(),
        };
        let load =
            LoadStage { pipeline: pipeline.clone(), stage, loaded: loaded.clone(), total, options: options.clone() };
        let ready = ready.clone();
        threads.push(spawn(format!("pipeline-stage-{stage}"), move || {
            let backend = load.run();
            match backend {
                Ok(backend) => {
                    let bytes = backend.bytes();
                    worker.counters.weight_bytes.store(bytes.weights, Ordering::Relaxed);
                    let _ = ready.send(Ok(()));
                    drop((ready, load));
                    worker.run(backend);
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            }
        })?);
        next = Some(outlet);
    }
    drop(ready);
    threads.reverse();
    match (wait_for(&readiness, count), next) {
        (Ok(()), Some(first)) => Ok(Stages { first, threads, counters, cancelled, stopping }),
        (outcome, first) => {
            // The others end when the way into them closes.
            drop(first);
            for thread in threads {
                let _ = thread.join();
            }
            Err(outcome.err().unwrap_or(Error::Stopped))
        }
    }
}

/// Starts a named thread.
pub(crate) fn spawn(name: String, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    let thread = std::thread::Builder::new().name(name).spawn(body);
    thread.map_err(|e| Error::Tensors(format!("cannot start a thread: {e}")))
}

/// A reply after its way as bytes.
fn through_bytes(reply: &StageReply, stage: usize, device: &str) -> StageReply {
    let arrived = message::to_bytes(reply).and_then(|bytes| message::from_bytes(&bytes));
    arrived.unwrap_or_else(|error: Error| {
        let failure = StageFailure { stage, device: device.into(), reason: error.to_string() };
        StageReply::Died { failure }
    })
}

fn wait_for(readiness: &Receiver<Result<()>>, count: usize) -> Result<()> {
    (0..count).try_for_each(|_| readiness.recv().unwrap_or(Err(Error::Stopped)))
}

/// What a stage thread needs to load its backend.
struct LoadStage {
    pipeline: HeterogeneousPipeline,
    stage: usize,
    loaded: Arc<AtomicU64>,
    total: u64,
    options: StartOptions,
}

impl LoadStage {
    /// Loads, turning a panic into an error.
    fn run(&self) -> Result<Box<dyn StageBackend>> {
        let loaded = catch_unwind(AssertUnwindSafe(|| self.load()));
        loaded.unwrap_or_else(|panic| {
            let device = self.pipeline.stages()[self.stage].device.to_string();
            Err(Error::StagePanicked { stage: self.stage, device, reason: panic_message(&*panic) })
        })
    }

    fn load(&self) -> Result<Box<dyn StageBackend>> {
        let progress = |bytes| {
            let loaded = self.loaded.fetch_add(bytes, Ordering::Relaxed) + bytes;
            if let Some(progress) = &self.options.progress {
                progress(loaded, self.total);
            }
        };
        let source = self.pipeline.stage_source(self.stage);
        let backend = {
            let _turn = source.device.turns.take();
            source.load(&progress)?
        };
        Ok(match &self.options.wrap {
            Some(wrap) => wrap(self.stage, backend),
            None => backend,
        })
    }
}
