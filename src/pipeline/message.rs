//! What passes between the scheduler and the stages: plain data, which crosses a wire as well as a channel. Numbers of
//! steps, ids and durations stand for what only one process can hold: no tensor, clock reading, flag or closure is in a
//! message. Activations travel beside it, see [`link`](super::link); cancellation overtakes it, see [`CancelledSteps`].

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::backend::{MicroBatch, Prediction, SequenceId};
use crate::error::{Error, Result};
use crate::instrument::{HiddenRow, StepPhases};

/// A message to a stage, which passes it on to the next one. A stage handles messages in the order in which they arrive.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum StageMessage {
    /// Reserve KV for a sequence.
    Open {
        /// The new sequence.
        id: SequenceId,
        /// Positions to reserve.
        capacity: usize,
        /// An open sequence whose first positions the new one starts with, and their number.
        prefix: Option<(SequenceId, usize)>,
    },
    /// Compute a micro-batch. All but the first stage get the previous stage's activations with it.
    Step {
        /// Number of the step; the reply names it.
        step: u64,
        /// Rows to compute.
        batch: MicroBatch,
        /// Times for the stages' accounts.
        times: StepTimes,
        /// Outputs of earlier layers for the lens, which needs the last stage's head.
        hidden: Vec<HiddenRow>,
    },
    /// Drop the positions of a sequence from `length` on. It may have gone on by the wrong tokens, or its keys and values
    /// may have to be computed anew.
    Truncate {
        /// The sequence.
        id: SequenceId,
        /// Positions that stay.
        length: usize,
    },
    /// Free a sequence's KV.
    Close {
        /// The sequence.
        id: SequenceId,
    },
}

/// Times that travel with a step, as durations: clocks of two machines have no common zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepTimes {
    /// Time for which the pipeline has had work when the step is sent. A stage that stood idle before that was not
    /// starved: there was nothing to do.
    pub working: Duration,
    /// Longest time that a stage has computed the step so far.
    pub slowest: Duration,
    /// Whether the stages report the step's phases.
    pub phases: StepPhases,
}

impl StepTimes {
    /// Times of a step that no stage has seen, sent when the pipeline has had work for `working`.
    pub fn new(working: Duration) -> Self {
        StepTimes { working, slowest: Duration::ZERO, phases: StepPhases::default() }
    }
}

/// A stage's answer to the scheduler.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum StageReply {
    /// The step has left the last stage, or a stage found it cancelled.
    Done {
        /// Number of the step.
        step: u64,
        /// For each slice that wanted predictions one for each of the rows, in order. None if the step was cancelled.
        predictions: Vec<(SequenceId, Vec<Prediction>)>,
        /// Longest time that a stage computed the step, which bounds the rate of a full pipeline.
        slowest: Duration,
    },
    /// Every stage has freed the sequence's KV.
    Closed {
        /// The sequence.
        id: SequenceId,
    },
    /// A stage could not open or truncate the sequence, which cannot go on.
    SequenceFailed {
        /// The sequence.
        id: SequenceId,
        /// The stage and its error.
        failure: StageFailure,
    },
    /// A stage failed to compute the step, which goes no further.
    StepFailed {
        /// Number of the step.
        step: u64,
        /// The stage and its error.
        failure: StageFailure,
    },
    /// A stage panicked and its thread has ended.
    Died {
        /// The stage and the panic's message.
        failure: StageFailure,
    },
}

/// A stage and why it failed, in words: an [`Error`] holds paths and sources of its own process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageFailure {
    /// Index of the stage.
    pub stage: usize,
    /// Its device, as [`DeviceSpec`](crate::device::DeviceSpec) writes it.
    pub device: String,
    /// The error's or the panic's message.
    pub reason: String,
}

impl StageFailure {
    /// As the error of a stage that goes on.
    pub fn into_failed(self) -> Error {
        let StageFailure { stage, device, reason } = self;
        Error::StageFailed { stage, device, reason }
    }

    /// As the error of a stage that has ended.
    pub fn into_panicked(self) -> Error {
        let StageFailure { stage, device, reason } = self;
        Error::StagePanicked { stage, device, reason }
    }
}

/// The bytes of a message or reply. Floats keep their bits, those of NaN included.
pub fn to_bytes<T: Serialize>(message: &T) -> Result<Vec<u8>> {
    postcard::to_allocvec(message).map_err(|e| Error::Tensors(format!("a message cannot be encoded: {e}")))
}

/// The message that [`to_bytes`] made `bytes` from. Bytes that are no message are an error.
pub fn from_bytes<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    let invalid = |e: String| Error::Tensors(format!("{} bytes are no message between stages: {e}", bytes.len()));
    match postcard::take_from_bytes(bytes) {
        Ok((message, [])) => Ok(message),
        Ok((_, rest)) => Err(invalid(format!("{} bytes are left over", rest.len()))),
        Err(e) => Err(invalid(e.to_string())),
    }
}

/// Steps that no request needs any more. The scheduler marks them beside the queue, since a message behind the steps
/// would arrive after they were computed; a stage skips a marked step and answers it at once. To a stage on another
/// machine the marks travel as numbers, on a connection of their own.
#[derive(Debug, Default)]
pub struct CancelledSteps {
    steps: Mutex<BTreeSet<u64>>,
    /// Length of `steps`. Almost always 0, which spares a stage the lock.
    count: AtomicUsize,
}

impl CancelledSteps {
    /// Marks a step.
    pub fn cancel(&self, step: u64) {
        self.change(|steps| _ = steps.insert(step));
    }

    /// Removes the mark of a step that has left the stages.
    pub fn forget(&self, step: u64) {
        if self.count.load(Ordering::Relaxed) > 0 {
            self.change(|steps| _ = steps.remove(&step));
        }
    }

    /// Whether a step is marked.
    pub fn contains(&self, step: u64) -> bool {
        self.count.load(Ordering::Relaxed) > 0 && self.lock().contains(&step)
    }

    fn change(&self, change: impl FnOnce(&mut BTreeSet<u64>)) {
        let mut steps = self.lock();
        change(&mut steps);
        self.count.store(steps.len(), Ordering::Relaxed);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeSet<u64>> {
        // Inserting and removing leave a set behind whatever happens.
        self.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{SequenceSlice, Wanted};

    fn step(hidden: Vec<HiddenRow>) -> StageMessage {
        let slice = |id, position, len, decode, wanted| SequenceSlice {
            id: SequenceId(id),
            position,
            len,
            length: position + len,
            decode,
            wanted,
        };
        let slices = vec![
            slice(u64::MAX, 9, 1, true, Wanted::Best { rows: 1, k: 40 }),
            slice(4, 0, 2, false, Wanted::Nothing),
            slice(5, 7, 1, false, Wanted::Logits { rows: 1 }),
        ];
        let batch = MicroBatch { slices, tokens: vec![0, 7, u32::MAX, 1] };
        let times = StepTimes { slowest: Duration::from_nanos(1), ..StepTimes::new(Duration::MAX) };
        StageMessage::Step { step: 1 << 60, batch, times, hidden }
    }

    #[test]
    fn messages_and_replies_survive_the_way_through_bytes() {
        let hidden = HiddenRow { request: 4, position: 8, layer: 2, values: vec![-0.0, f32::INFINITY, 1e-45] };
        let id = SequenceId(300);
        for message in [
            StageMessage::Open { id, capacity: 4096, prefix: None },
            StageMessage::Open { id, capacity: 1, prefix: Some((SequenceId(0), 1)) },
            step(vec![hidden.clone(), hidden]),
            StageMessage::Truncate { id, length: 0 },
            StageMessage::Close { id },
        ] {
            assert_eq!(from_bytes::<StageMessage>(&to_bytes(&message).unwrap()).unwrap(), message);
        }
        let failure = || StageFailure { stage: 3, device: "cpu@threads=2".into(), reason: "kein Platz (ü)".into() };
        let (best, slowest) = (Prediction::Best(vec![(7, -1.5), (0, f32::NEG_INFINITY)]), Duration::from_micros(1500));
        for reply in [
            StageReply::Done {
                step: 0,
                predictions: vec![(id, vec![Prediction::Logits(vec![0.1, -3e38]), best]), (SequenceId(1), vec![])],
                slowest,
            },
            StageReply::Closed { id },
            StageReply::SequenceFailed { id, failure: failure() },
            StageReply::StepFailed { step: 9, failure: failure() },
            StageReply::Died { failure: failure() },
        ] {
            assert_eq!(from_bytes::<StageReply>(&to_bytes(&reply).unwrap()).unwrap(), reply);
        }
    }

    #[test]
    fn the_bits_of_nan_survive_the_way_through_bytes() {
        let odd = [0x7fc0_0000u32, 0xffc0_1234, 0x7f80_0001].map(f32::from_bits);
        let reply = StageReply::Done {
            step: 1,
            predictions: vec![(SequenceId(1), vec![Prediction::Logits(odd.to_vec())])],
            slowest: Duration::ZERO,
        };
        let StageReply::Done { predictions, .. } = from_bytes(&to_bytes(&reply).unwrap()).unwrap() else { panic!() };
        let [Prediction::Logits(found)] = &predictions[0].1[..] else { panic!("{predictions:?}") };
        assert_eq!(found.iter().map(|value| value.to_bits()).collect::<Vec<_>>(), odd.map(f32::to_bits));
    }

    #[test]
    fn bytes_that_are_no_message_are_refused() {
        let good = to_bytes(&step(Vec::new())).unwrap();
        for bytes in [&good[..good.len() - 1], &good[..0], &[&good[..], &[0]].concat(), &[9; 30]] {
            let message = from_bytes::<StageMessage>(bytes).unwrap_err().to_string();
            assert!(message.contains(&format!("{} bytes are no message", bytes.len())), "{message}");
        }
    }

    #[test]
    fn steps_stay_cancelled_until_they_are_forgotten() {
        let cancelled = CancelledSteps::default();
        assert!(!cancelled.contains(3));
        cancelled.cancel(3);
        cancelled.cancel(5);
        cancelled.cancel(3);
        cancelled.forget(4);
        assert_eq!([3, 4, 5].map(|step| cancelled.contains(step)), [true, false, true]);
        cancelled.forget(3);
        cancelled.forget(5);
        assert_eq!([3, 4, 5].map(|step| cancelled.contains(step)), [false; 3]);
    }
}
