//! The stage thread: owns one [`StageBackend`], takes messages in order, passes them on. Control messages travel the
//! same way as the work, so a sequence is opened in a stage before its first rows arrive and closed after its last.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender};
use std::time::{Duration, Instant};

use candle_core::Tensor;

use super::transfer::{Arrival, Link};
use crate::backend::{MicroBatch, Prediction, SequenceId, StageBackend, StageOutput};
use crate::device::OpenDevice;
use crate::error::{Error, Result};
use crate::instrument::{Event, HiddenRow, Probe, StepPhases, Watcher, lens_layers};

/// What a stage is told, in order.
pub enum StageMessage {
    /// Set KV aside.
    Open {
        /// The sequence.
        id: SequenceId,
        /// Positions it may grow to.
        capacity: usize,
        /// An open sequence whose first positions it begins with, and how many.
        prefix: Option<(SequenceId, usize)>,
    },
    /// Compute.
    Step {
        /// Number of the step, for the reply.
        step: u64,
        /// Rows to run.
        batch: MicroBatch,
        /// The previous stage's output.
        input: Option<Arrival>,
        /// Set when nobody wants the step any more: a stage that has not begun it passes it by. Not part of the
        /// micro-batch, which is plain data.
        cancelled: Arc<AtomicBool>,
        /// For the accounts.
        times: StepTimes,
        /// Outputs of earlier layers that somebody wants the head's view of.
        hidden: Vec<HiddenRow>,
    },
    /// Free KV.
    Close {
        /// The sequence.
        id: SequenceId,
    },
}

/// Times that travel with a step.
#[derive(Debug, Clone, Copy)]
pub struct StepTimes {
    /// Since when there has been work. A stage that stood idle before that was not starved: nobody wanted anything.
    pub work_since: Instant,
    /// When the step was handed to the stage that is to compute it.
    pub sent: Instant,
    /// The longest that a stage has computed it.
    pub slowest: Duration,
    /// Whether those who listen hear of its phases.
    pub phases: StepPhases,
}

impl StepTimes {
    /// Of a step that is sent now.
    pub fn sent_now(work_since: Instant) -> Self {
        StepTimes { work_since, sent: Instant::now(), slowest: Duration::ZERO, phases: StepPhases::default() }
    }
}

/// What the stages answer.
pub enum StageReply {
    /// A step came out of the last stage, with what was wanted of it, or was passed by.
    Done {
        /// Number of the step.
        step: u64,
        /// One for each slice that wanted anything.
        predictions: Vec<(SequenceId, Prediction)>,
        /// The longest that a stage computed it; what bounds the rate of a full pipeline.
        slowest: Duration,
    },
    /// Every stage has freed the sequence.
    Closed {
        /// The sequence.
        id: SequenceId,
    },
    /// KV could not be set aside for a sequence.
    OpenFailed {
        /// The sequence.
        id: SequenceId,
        /// Why.
        error: Error,
    },
    /// A step ended in an error and went no further.
    StepFailed {
        /// Number of the step.
        step: u64,
        /// Why.
        error: Error,
    },
    /// A stage panicked and its thread has ended.
    Died {
        /// [`Error::StagePanicked`].
        error: Error,
    },
}

/// Figures that a stage publishes for others to read.
#[derive(Debug, Default)]
pub struct StageCounters {
    /// Bytes of weights.
    pub weight_bytes: AtomicU64,
    /// Bytes of KV held now.
    pub kv_bytes: AtomicU64,
    /// Nanoseconds spent computing.
    pub compute_ns: AtomicU64,
    /// Nanoseconds spent without a step while there was work somewhere in the pipeline: the bubbles.
    pub wait_ns: AtomicU64,
    /// Nanoseconds spent copying output towards the next stage.
    pub copy_ns: AtomicU64,
    /// Nanoseconds that steps waited for the stage, summed over the steps.
    pub queued_ns: AtomicU64,
    /// Micro-batches computed.
    pub steps: AtomicU64,
    /// Rows in them.
    pub rows: AtomicU64,
}

/// Where a stage's output goes.
pub enum Next {
    /// To the next stage over a link.
    Stage(SyncSender<StageMessage>, Box<Link>),
    /// This is the last stage.
    Scheduler,
}

/// A stage's output on its way.
enum Sent {
    Activations(Arrival),
    Predictions(Vec<Prediction>),
}

/// All that a stage thread is given besides its backend.
pub struct Worker {
    /// Index of the stage.
    pub stage: usize,
    /// Its device.
    pub device: OpenDevice,
    /// Messages for this stage.
    pub inbox: Receiver<StageMessage>,
    /// Where they go on.
    pub next: Next,
    /// Answers to the scheduler, wrapped into its own message type.
    pub replies: Box<dyn Fn(StageReply) + Send>,
    /// Published figures.
    pub counters: Arc<StageCounters>,
    /// Set when the executor is dropped: what is still queued is not computed.
    pub stopping: Arc<AtomicBool>,
    /// Who listens.
    pub probe: Probe,
}

/// What a stage remembers from message to message.
struct State {
    /// When the last step ended. Opening and closing count as waiting, they compute nothing.
    idle_since: Instant,
    /// Sequences that could not be opened here and are not closed yet.
    refused: HashSet<SequenceId>,
    /// Gathers what those who listen want of a forward pass.
    watcher: Watcher,
    /// Most rows of a step so far: with more, the buffers have grown.
    most_rows: usize,
}

/// The micro-batch without the rows of sequences that could not be opened here: the others in it go on.
fn without(
    refused: &HashSet<SequenceId>,
    mut batch: MicroBatch,
    mut input: Option<Tensor>,
) -> Result<(MicroBatch, Option<Tensor>)> {
    if batch.slices.iter().all(|slice| !refused.contains(&slice.id)) {
        return Ok((batch, input));
    }
    let mut kept = Vec::with_capacity(batch.tokens.len());
    let mut start = 0;
    for slice in &batch.slices {
        let rows = start..start + slice.len as u32;
        start = rows.end;
        if !refused.contains(&slice.id) {
            kept.extend(rows);
        }
    }
    batch.slices.retain(|slice| !refused.contains(&slice.id));
    batch.tokens = kept.iter().map(|&row| batch.tokens[row as usize]).collect();
    if let Some(x) = &mut input {
        *x = x.index_select(&Tensor::new(kept, x.device())?, 0)?;
    }
    Ok((batch, input))
}

impl Worker {
    /// Serves messages until the sender is gone or the backend panics. Runs on the stage's thread.
    pub fn run(self, mut backend: Box<dyn StageBackend>) {
        let mut state = State {
            idle_since: Instant::now(),
            refused: HashSet::new(),
            watcher: Watcher::new(self.probe.clone(), self.stage),
            most_rows: 0,
        };
        self.publish(&*backend);
        while let Ok(message) = self.inbox.recv() {
            if self.stopping.load(Ordering::Relaxed) {
                return;
            }
            // Until it is there nothing behind it is either: a link delivers in order.
            if let StageMessage::Step { input: Some(arrival), .. } = &message {
                arrival.wait();
            }
            // The backend is not looked at again after a panic, so what it was in the middle of does not matter.
            let served = catch_unwind(AssertUnwindSafe(|| self.serve(&mut *backend, message, &mut state)));
            if let Err(panic) = served {
                let reason = panic_message(&*panic);
                (self.replies)(StageReply::Died {
                    error: Error::StagePanicked { stage: self.stage, device: self.device.spec.to_string(), reason },
                });
                // Dropping a backend in an unknown state may panic again; that ends here too.
                let _ = catch_unwind(AssertUnwindSafe(move || drop(backend)));
                return;
            }
        }
    }

    fn serve(&self, backend: &mut dyn StageBackend, message: StageMessage, state: &mut State) {
        match message {
            StageMessage::Open { id, capacity, prefix } => {
                let opened = {
                    let _turn = self.device.turns.take();
                    match prefix {
                        None => backend.open(id, capacity),
                        Some((from, len)) => backend.fork(from, id, len, capacity),
                    }
                };
                match opened {
                    Ok(()) => self.pass_on(StageMessage::Open { id, capacity, prefix }),
                    Err(error) => {
                        state.refused.insert(id);
                        (self.replies)(StageReply::OpenFailed { id, error: self.failed(error) });
                    }
                }
                self.publish(backend);
            }
            StageMessage::Close { id } => {
                state.refused.remove(&id);
                backend.close(id);
                self.publish(backend);
                match &self.next {
                    Next::Stage(..) => self.pass_on(StageMessage::Close { id }),
                    Next::Scheduler => (self.replies)(StageReply::Closed { id }),
                }
            }
            StageMessage::Step { step, cancelled, times, .. } if cancelled.load(Ordering::Relaxed) => {
                (self.replies)(StageReply::Done { step, predictions: Vec::new(), slowest: times.slowest });
            }
            StageMessage::Step { step, batch, input, cancelled, mut times, hidden } => {
                // While another stage has the device's turn, this one waits and does not compute. The turn ends before
                // anything is handed on: a full inbox may belong to a stage on the same device.
                let turn = self.device.turns.take();
                let received = Instant::now();
                let wait = received.saturating_duration_since(state.idle_since.max(times.work_since));
                let queued = received.saturating_duration_since(times.sent);
                let rows = batch.tokens.len();
                let mut watch = state.watcher.watch(step, hidden, &mut times.phases);
                let forward = |backend: &mut dyn StageBackend| {
                    let (batch, input) = without(&state.refused, batch, input.map(Arrival::into_activations))?;
                    if batch.slices.is_empty() {
                        return Err(Error::Tensors("none of the step's sequences could be opened".into()));
                    }
                    let output = backend.forward(&batch, input, &mut watch)?;
                    // A GPU computes on after the call returns; its time belongs to this stage.
                    self.device.device.synchronize()?;
                    Ok((batch, output))
                };
                let output = forward(backend);
                drop(turn);
                let computed = Instant::now();
                let compute = computed - received;
                let bytes = match (&output, &self.next) {
                    (Ok((_, StageOutput::Activations(x))), Next::Stage(..)) => {
                        x.elem_count() * x.dtype().size_in_bytes()
                    }
                    _ => 0,
                } as u64;
                let sent = match (output, &self.next) {
                    (Ok((batch, StageOutput::Activations(x))), Next::Stage(_, link)) => {
                        link.send(x).map(|x| (batch, Sent::Activations(x)))
                    }
                    (Ok((_, StageOutput::Activations(_))), Next::Scheduler) => {
                        Err(Error::Tensors("the last stage returned activations instead of logits".into()))
                    }
                    (Ok((batch, StageOutput::Logits(logits))), _) => {
                        Ok((batch, Sent::Predictions(logits.into_iter().map(Prediction::Logits).collect())))
                    }
                    (Ok((batch, StageOutput::Predictions(predictions))), _) => {
                        Ok((batch, Sent::Predictions(predictions)))
                    }
                    (Err(error), _) => Err(error),
                };
                state.idle_since = Instant::now();
                let copy = state.idle_since - computed;
                let counters = &self.counters;
                let add = |counter: &AtomicU64, time: Duration| {
                    counter.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
                };
                add(&counters.compute_ns, compute);
                add(&counters.wait_ns, wait);
                add(&counters.copy_ns, copy);
                add(&counters.queued_ns, queued);
                counters.steps.fetch_add(1, Ordering::Relaxed);
                counters.rows.fetch_add(rows as u64, Ordering::Relaxed);
                self.probe.emit_at(state.idle_since, || Event::StageStep {
                    stage: self.stage,
                    step,
                    rows,
                    queued,
                    wait,
                    compute,
                    copy,
                    bytes,
                });
                let mut hidden = watch.finish(rows);
                if self.probe.is_on() && rows > state.most_rows {
                    state.most_rows = rows;
                    self.publish(backend);
                }
                times = StepTimes { sent: state.idle_since, slowest: times.slowest.max(compute), ..times };
                match sent {
                    Ok((batch, Sent::Activations(arrival))) => {
                        let input = Some(arrival);
                        self.pass_on(StageMessage::Step { step, batch, input, cancelled, times, hidden });
                    }
                    Ok((batch, Sent::Predictions(predictions))) => {
                        self.tell_lens(backend, step, &mut hidden);
                        let wanted = batch.slices.iter().filter(|slice| slice.is_predicted()).map(|slice| slice.id);
                        let predictions = wanted.zip(predictions).collect();
                        (self.replies)(StageReply::Done { step, predictions, slowest: times.slowest });
                    }
                    Err(error) => (self.replies)(StageReply::StepFailed { step, error: self.failed(error) }),
                }
            }
        }
    }

    fn pass_on(&self, message: StageMessage) {
        if let Next::Stage(sender, _) = &self.next {
            // A closed channel means that the next stage has died or everything is being shut down. The scheduler
            // hears of the former from that stage itself.
            let _ = sender.send(message);
        }
    }

    /// Tells what each layer would have said, in the rows that were gathered on the way.
    fn tell_lens(&self, backend: &mut dyn StageBackend, step: u64, hidden: &mut [HiddenRow]) {
        let Some(interest) = self.probe.interest().and_then(|interest| interest.lens.as_ref()) else { return };
        let row = |row: &HiddenRow| (row.request, row.position);
        // Stage by stage and layer by layer they came; the sort keeps that order within a row.
        hidden.sort_by_key(row);
        for rows in hidden.chunk_by(|a, b| row(a) == row(b)) {
            let lens = {
                let _turn = self.device.turns.take();
                backend.lens(rows)
            };
            match lens {
                Ok(logits) => {
                    let logits: Vec<_> = rows.iter().map(|row| row.layer).zip(logits).collect();
                    let (request, position) = row(&rows[0]);
                    let layers = lens_layers(interest, &logits);
                    self.probe.emit(|| Event::Lens { request, step, position, layers });
                }
                Err(error) => tracing::warn!("the lens on step {step} failed: {error}"),
            }
        }
    }

    fn publish(&self, backend: &dyn StageBackend) {
        let bytes = backend.bytes();
        self.probe.emit(|| Event::StageMemory {
            stage: self.stage,
            weights: bytes.weights,
            kv: bytes.kv,
            scratch: bytes.scratch,
        });
        self.counters.weight_bytes.store(bytes.weights, Ordering::Relaxed);
        self.counters.kv_bytes.store(bytes.kv, Ordering::Relaxed);
    }

    fn failed(&self, error: Error) -> Error {
        Error::StageFailed { stage: self.stage, device: self.device.spec.to_string(), reason: error.to_string() }
    }
}

/// The text a thread panicked with.
pub fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => (*text).to_string(),
        (_, Some(text)) => text.clone(),
        _ => "no message".to_string(),
    }
}

/// The sending half of a stage's inbox and the receiving one. Bounded: a stage that falls behind holds up the one before.
pub fn inbox(messages: usize) -> (SyncSender<StageMessage>, Receiver<StageMessage>) {
    std::sync::mpsc::sync_channel(messages)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::super::transfer::LinkOptions;
    use super::*;
    use crate::backend::{SequenceSlice, StageBytes, Wanted};
    use crate::device::{DeviceSpec, Turns};
    use crate::instrument::Watch;

    /// A stage that computes nothing for a while, and notices when another one does so at the same time.
    struct Slow {
        is_last: bool,
        computing: Arc<AtomicU64>,
        overlaps: Arc<AtomicU64>,
    }

    impl StageBackend for Slow {
        fn open(&mut self, _: SequenceId, _: usize) -> Result<()> {
            Ok(())
        }

        fn fork(&mut self, _: SequenceId, _: SequenceId, _: usize, _: usize) -> Result<()> {
            Ok(())
        }

        fn close(&mut self, _: SequenceId) {}

        fn forward(&mut self, _: &MicroBatch, _: Option<Tensor>, _: &mut Watch) -> Result<StageOutput> {
            let others = self.computing.fetch_add(1, Ordering::SeqCst);
            self.overlaps.fetch_add(others, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(2));
            self.computing.fetch_sub(1, Ordering::SeqCst);
            Ok(match self.is_last {
                true => StageOutput::Logits(vec![vec![0.0]]),
                false => StageOutput::Activations(Tensor::zeros((1, 8), DType::F32, &Device::Cpu)?),
            })
        }

        fn lens(&mut self, _: &[HiddenRow]) -> Result<Vec<Vec<f32>>> {
            Ok(Vec::new())
        }

        fn bytes(&self) -> StageBytes {
            StageBytes::default()
        }
    }

    /// Two stages with these turns and inboxes for two messages run 20 steps; how often both computed.
    fn overlaps_of_two_stages(turns: [Turns; 2]) -> u64 {
        let (computing, overlaps) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let devices = turns.map(|turns| OpenDevice { spec: DeviceSpec::CPU, device: Device::Cpu, cpu: None, turns });
        let (to_first, first_inbox) = inbox(2);
        let (to_second, second_inbox) = inbox(2);
        let link = Link::new(&devices[0], &devices[1], LinkOptions::default()).unwrap();
        let (replies, answers) = std::sync::mpsc::channel();
        let ways = [(first_inbox, Next::Stage(to_second, Box::new(link))), (second_inbox, Next::Scheduler)];
        let threads: Vec<_> = ways
            .into_iter()
            .zip(devices)
            .enumerate()
            .map(|(stage, ((inbox, next), device))| {
                let replies = replies.clone();
                let backend = Slow { is_last: stage == 1, computing: computing.clone(), overlaps: overlaps.clone() };
                let worker = Worker {
                    stage,
                    device,
                    inbox,
                    next,
                    replies: Box::new(move |reply| replies.send(reply).unwrap()),
                    counters: Arc::default(),
                    stopping: Arc::default(),
                    probe: Probe::default(),
                };
                std::thread::spawn(move || worker.run(Box::new(backend)))
            })
            .collect();
        let sender = std::thread::spawn(move || {
            for step in 0..20 {
                let (id, wanted) = (SequenceId(1), Wanted::Best(1));
                let position = step as usize;
                let slice = SequenceSlice { id, position, len: 1, length: position + 1, decode: true, wanted };
                let batch = MicroBatch { slices: vec![slice], tokens: vec![0] };
                let times = StepTimes::sent_now(Instant::now());
                let (cancelled, hidden) = (Arc::default(), Vec::new());
                let message = StageMessage::Step { step, batch, input: None, cancelled, times, hidden };
                to_first.send(message).unwrap();
            }
        });
        for step in 0..20 {
            // Stages that waited for each other would never answer.
            match answers.recv_timeout(Duration::from_secs(20)).expect("an answer") {
                StageReply::Done { step: done, predictions, .. } => {
                    assert_eq!((done, predictions), (step, vec![(SequenceId(1), Prediction::Logits(vec![0.0]))]));
                }
                _ => panic!("step {step} failed"),
            }
        }
        sender.join().unwrap();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        overlaps.load(Ordering::SeqCst)
    }

    #[test]
    fn stages_on_one_apple_gpu_compute_one_after_the_other() {
        let shared = Turns::of(DeviceSpec::Metal(0));
        assert_eq!(overlaps_of_two_stages([shared.clone(), shared]), 0);
    }

    #[test]
    fn stages_on_two_devices_compute_at_the_same_time() {
        let two = [Turns::of(DeviceSpec::Metal(0)), Turns::of(DeviceSpec::Metal(1))];
        assert!(overlaps_of_two_stages(two) > 0);
        assert!(overlaps_of_two_stages([Turns::of(DeviceSpec::CPU), Turns::of(DeviceSpec::CPU)]) > 0);
    }
}
