//! The stage thread: owns one [`StageBackend`], takes messages in order, passes them on. Control messages travel the
//! same way as the work, so a sequence is opened in a stage before its first rows arrive and closed after its last.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender};
use std::time::Instant;

use super::transfer::{Arrival, Link};
use crate::backend::{MicroBatch, SequenceId, StageBackend, StageOutput};
use crate::device::OpenDevice;
use crate::error::Error;
use crate::instrument::{Event, Probe};

/// What a stage is told, in order.
pub enum StageMessage {
    /// Set KV aside.
    Open {
        /// The sequence.
        id: SequenceId,
        /// Positions it may grow to.
        capacity: usize,
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
    },
    /// Free KV.
    Close {
        /// The sequence.
        id: SequenceId,
    },
}

/// What the stages answer.
pub enum StageReply {
    /// A step came out of the last stage, with the logits that were asked for, or was passed by.
    Done {
        /// Number of the step.
        step: u64,
        /// One vector for each slice that wanted logits.
        logits: Vec<Vec<f32>>,
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
    /// Micro-batches computed.
    pub steps: AtomicU64,
}

/// Where a stage's output goes.
pub enum Next {
    /// To the next stage over a link.
    Stage(SyncSender<StageMessage>, Link),
    /// This is the last stage.
    Scheduler,
}

/// A stage's output on its way.
enum Sent {
    Activations(Arrival),
    Logits(Vec<Vec<f32>>),
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

impl Worker {
    /// Serves messages until the sender is gone or the backend panics. Runs on the stage's thread.
    pub fn run(self, mut backend: Box<dyn StageBackend>) {
        let mut idle_since = Instant::now();
        while let Ok(message) = self.inbox.recv() {
            if self.stopping.load(Ordering::Relaxed) {
                return;
            }
            // Until it is there nothing behind it is either: a link delivers in order.
            if let StageMessage::Step { input: Some(arrival), .. } = &message {
                arrival.wait();
            }
            let received = Instant::now();
            // The backend is not looked at again after a panic, so what it was in the middle of does not matter.
            let served = catch_unwind(AssertUnwindSafe(|| self.serve(&mut *backend, message, idle_since, received)));
            if let Err(panic) = served {
                let reason = panic_message(&*panic);
                (self.replies)(StageReply::Died {
                    error: Error::StagePanicked { stage: self.stage, device: self.device.spec.to_string(), reason },
                });
                // Dropping a backend in an unknown state may panic again; that ends here too.
                let _ = catch_unwind(AssertUnwindSafe(move || drop(backend)));
                return;
            }
            idle_since = Instant::now();
        }
    }

    fn serve(&self, backend: &mut dyn StageBackend, message: StageMessage, idle_since: Instant, received: Instant) {
        match message {
            StageMessage::Open { id, capacity } => {
                match backend.open(id, capacity) {
                    Ok(()) => self.pass_on(StageMessage::Open { id, capacity }),
                    Err(error) => (self.replies)(StageReply::OpenFailed { id, error: self.failed(error) }),
                }
                self.publish(backend);
            }
            StageMessage::Close { id } => {
                backend.close(id);
                self.publish(backend);
                match &self.next {
                    Next::Stage(..) => self.pass_on(StageMessage::Close { id }),
                    Next::Scheduler => (self.replies)(StageReply::Closed { id }),
                }
            }
            StageMessage::Step { step, cancelled, .. } if cancelled.load(Ordering::Relaxed) => {
                (self.replies)(StageReply::Done { step, logits: Vec::new() });
            }
            StageMessage::Step { step, batch, input, cancelled } => {
                let rows = batch.tokens.len();
                let output = backend.forward(&batch, input.map(Arrival::into_activations));
                let computed = Instant::now();
                let compute = computed - received;
                let sent = match (output, &self.next) {
                    (Ok(StageOutput::Activations(x)), Next::Stage(_, link)) => link.send(x).map(Sent::Activations),
                    (Ok(StageOutput::Activations(_)), Next::Scheduler) => {
                        Err(Error::Tensors("the last stage returned activations instead of logits".into()))
                    }
                    (Ok(StageOutput::Logits(logits)), _) => Ok(Sent::Logits(logits)),
                    (Err(error), _) => Err(error),
                };
                self.counters.compute_ns.fetch_add(compute.as_nanos() as u64, Ordering::Relaxed);
                self.counters.steps.fetch_add(1, Ordering::Relaxed);
                self.probe.emit(|| Event::StageStep {
                    stage: self.stage,
                    rows,
                    wait: received - idle_since,
                    compute,
                    copy: computed.elapsed(),
                });
                match sent {
                    Ok(Sent::Activations(arrival)) => {
                        self.pass_on(StageMessage::Step { step, batch, input: Some(arrival), cancelled });
                    }
                    Ok(Sent::Logits(logits)) => (self.replies)(StageReply::Done { step, logits }),
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

    fn publish(&self, backend: &dyn StageBackend) {
        let bytes = backend.bytes();
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
pub fn inbox(stages: usize) -> (SyncSender<StageMessage>, Receiver<StageMessage>) {
    std::sync::mpsc::sync_channel(2 * stages + 2)
}
