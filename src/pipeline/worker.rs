//! The stage thread: owns one [`StageBackend`], handles messages in order and passes them on. Control messages travel the
//! same way as the work, so a sequence is opened in a stage before its first rows arrive and closed after its last.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use candle_core::Tensor;

use super::inbox::{Delivery, Departed, Inbox, Outlet};
use super::message::{CancelledSteps, StageFailure, StageMessage, StageReply, StepTimes};
use crate::backend::{MicroBatch, Prediction, SequenceId, StageBackend, StageOutput};
use crate::device::OpenDevice;
use crate::error::{Error, Result};
use crate::instrument::{Event, HiddenRow, Probe, Watcher, lens_layers};

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
    /// To the next stage.
    Stage(Box<Outlet>),
    /// This is the last stage.
    Scheduler,
}

/// A stage's output on its way.
enum Sent {
    Activations(Departed),
    Predictions(Vec<(SequenceId, Vec<Prediction>)>),
}

/// All that a stage thread is given besides its backend.
pub struct Worker {
    /// Index of the stage.
    pub stage: usize,
    /// Its device.
    pub device: OpenDevice,
    /// Messages for this stage.
    pub inbox: Inbox,
    /// Where they go on.
    pub next: Next,
    /// Answers to the scheduler, wrapped into its own message type.
    pub replies: Box<dyn Fn(StageReply) + Send>,
    /// Published figures.
    pub counters: Arc<StageCounters>,
    /// Steps to skip.
    pub cancelled: Arc<CancelledSteps>,
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

/// Predictions of rows, by the slices that want them.
fn of_slices(batch: &MicroBatch, predictions: Vec<Prediction>) -> Result<Vec<(SequenceId, Vec<Prediction>)>> {
    let (found, wanted) = (predictions.len(), batch.predicted_rows().count());
    if found != wanted {
        return Err(Error::Tensors(format!("the last stage returned {found} predictions for {wanted} rows")));
    }
    let mut rest = predictions.into_iter();
    let slices = batch.slices.iter().filter(|slice| slice.is_predicted());
    Ok(slices.map(|slice| (slice.id, rest.by_ref().take(slice.wanted.rows()).collect())).collect())
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
        while let Some(parcel) = self.inbox.recv() {
            if self.stopping.load(Ordering::Relaxed) {
                return;
            }
            let delivery = match parcel.open() {
                Ok(delivery) => delivery,
                // Which sequence or step it was about is not known, so nothing can go on.
                Err(error) => return (self.replies)(StageReply::Died { failure: self.failure(error.to_string()) }),
            };
            // The backend is not looked at again after a panic, so what it was in the middle of does not matter.
            let served = catch_unwind(AssertUnwindSafe(|| self.serve(&mut *backend, delivery, &mut state)));
            if let Err(panic) = served {
                (self.replies)(StageReply::Died { failure: self.failure(panic_message(&*panic)) });
                // Dropping a backend in an unknown state may panic again; that ends here too.
                let _ = catch_unwind(AssertUnwindSafe(move || drop(backend)));
                return;
            }
        }
    }

    fn serve(&self, backend: &mut dyn StageBackend, delivery: Delivery, state: &mut State) {
        let Delivery { message, activations, sent } = delivery;
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
                        (self.replies)(StageReply::SequenceFailed { id, failure: self.failure(error.to_string()) });
                    }
                }
                self.publish(backend);
            }
            // Where it was refused it is not open, nor behind.
            StageMessage::Truncate { id, .. } if state.refused.contains(&id) => {}
            StageMessage::Truncate { id, length } => match backend.truncate(id, length) {
                Ok(()) => self.pass_on(StageMessage::Truncate { id, length }),
                Err(error) => {
                    state.refused.insert(id);
                    (self.replies)(StageReply::SequenceFailed { id, failure: self.failure(error.to_string()) });
                }
            },
            StageMessage::Close { id } => {
                state.refused.remove(&id);
                backend.close(id);
                self.publish(backend);
                match &self.next {
                    Next::Stage(_) => self.pass_on(StageMessage::Close { id }),
                    Next::Scheduler => (self.replies)(StageReply::Closed { id }),
                }
            }
            StageMessage::Step { step, times, .. } if self.cancelled.contains(step) => {
                (self.replies)(StageReply::Done { step, predictions: Vec::new(), slowest: times.slowest });
            }
            StageMessage::Step { step, batch, mut times, hidden } => {
                // While another stage has the device's turn, this one waits and does not compute. The turn ends before
                // anything is handed on: a full inbox may belong to a stage on the same device.
                let turn = self.device.turns.take();
                let received = Instant::now();
                let work_since = sent.checked_sub(times.working).unwrap_or(sent);
                let wait = received.saturating_duration_since(state.idle_since.max(work_since));
                let queued = received.saturating_duration_since(sent);
                let rows = batch.tokens.len();
                let mut watch = state.watcher.watch(step, hidden, &mut times.phases);
                let forward = |backend: &mut dyn StageBackend| {
                    batch.validate()?;
                    let input =
                        activations.map(|activations| activations.into_tensor(&self.device.device)).transpose()?;
                    let (batch, input) = without(&state.refused, batch, input)?;
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
                    (Ok((_, StageOutput::Activations(x))), Next::Stage(_)) => {
                        x.elem_count() * x.dtype().size_in_bytes()
                    }
                    _ => 0,
                } as u64;
                let output = match (output, &self.next) {
                    (Ok((batch, StageOutput::Activations(x))), Next::Stage(next)) => {
                        next.depart(x).map(|departed| (batch, Sent::Activations(departed)))
                    }
                    (Ok((batch, output)), _) => {
                        let predictions = output.into_predictions().and_then(|all| of_slices(&batch, all));
                        predictions.map(|predictions| (batch, Sent::Predictions(predictions)))
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
                let working = state.idle_since.saturating_duration_since(work_since);
                times = StepTimes { working, slowest: times.slowest.max(compute), ..times };
                match output {
                    Ok((batch, Sent::Activations(departed))) => {
                        let message = StageMessage::Step { step, batch, times, hidden };
                        self.send(message, Some(departed), state.idle_since);
                    }
                    Ok((_, Sent::Predictions(predictions))) => {
                        self.tell_lens(backend, step, &mut hidden);
                        (self.replies)(StageReply::Done { step, predictions, slowest: times.slowest });
                    }
                    Err(error) => self.fail_step(step, error),
                }
            }
        }
    }

    fn pass_on(&self, message: StageMessage) {
        self.send(message, None, Instant::now());
    }

    fn send(&self, message: StageMessage, departed: Option<Departed>, sent: Instant) {
        let Next::Stage(next) = &self.next else { return };
        let step = if let StageMessage::Step { step, .. } = &message { Some(*step) } else { None };
        if let Err(error) = next.send(message, departed, sent) {
            match step {
                Some(step) => self.fail_step(step, error),
                None => (self.replies)(StageReply::Died { failure: self.failure(error.to_string()) }),
            }
        }
    }

    fn fail_step(&self, step: u64, error: Error) {
        (self.replies)(StageReply::StepFailed { step, failure: self.failure(error.to_string()) });
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

    fn failure(&self, reason: String) -> StageFailure {
        StageFailure { stage: self.stage, device: self.device.spec.to_string(), reason }
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

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::super::inbox::inbox;
    use super::super::link::{Link, LinkOptions};
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

        fn truncate(&mut self, _: SequenceId, _: usize) -> Result<()> {
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
        let link = Link::new(&devices[0], &devices[1], LinkOptions::default()).unwrap();
        let (to_first, first_inbox) = inbox(2, None, false);
        let (to_second, second_inbox) = inbox(2, Some(link), false);
        let (replies, answers) = std::sync::mpsc::channel();
        let ways = [(first_inbox, Next::Stage(Box::new(to_second))), (second_inbox, Next::Scheduler)];
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
                    cancelled: Arc::default(),
                    stopping: Arc::default(),
                    probe: Probe::default(),
                };
                std::thread::spawn(move || worker.run(Box::new(backend)))
            })
            .collect();
        let sender = std::thread::spawn(move || {
            for step in 0..20 {
                let (id, wanted) = (SequenceId(1), Wanted::Best { rows: 1, k: 1 });
                let position = step as usize;
                let slice = SequenceSlice { id, position, len: 1, length: position + 1, decode: true, wanted };
                let batch = MicroBatch { slices: vec![slice], tokens: vec![0] };
                let times = StepTimes::new(Duration::ZERO);
                let message = StageMessage::Step { step, batch, times, hidden: Vec::new() };
                to_first.send(message, None, Instant::now()).unwrap();
            }
        });
        for step in 0..20 {
            // Stages that waited for each other would never answer.
            match answers.recv_timeout(Duration::from_secs(20)).expect("an answer") {
                StageReply::Done { step: done, predictions, .. } => {
                    assert_eq!((done, predictions), (step, vec![(SequenceId(1), vec![Prediction::Logits(vec![0.0])])]));
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
