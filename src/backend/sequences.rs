//! The sequences that are open in a stage, and what is kept of each.

use std::collections::HashMap;

use super::{MicroBatch, SequenceId};
use crate::error::{Error, Result};

/// What a stage keeps of one sequence from step to step.
pub trait SequenceState {
    /// Takes over the first `len` positions of `source`, a sequence of the same layers.
    fn copy_prefix(&mut self, source: &Self, len: usize) -> Result<()>;

    /// Drops the positions from `length` on. What is addressed by position may leave them, since a row reads only positions
    /// up to its own and those are written again before.
    fn truncate(&mut self, length: usize) -> Result<()>;

    /// Bytes held.
    fn bytes(&self) -> u64;
}

/// The open sequences of a stage.
pub struct Sequences<S> {
    open: HashMap<SequenceId, S>,
}

impl<S> Default for Sequences<S> {
    fn default() -> Self {
        Sequences { open: HashMap::new() }
    }
}

impl<S: SequenceState> Sequences<S> {
    /// Opens a sequence.
    pub fn open(&mut self, id: SequenceId, state: S) {
        self.open.insert(id, state);
    }

    /// Opens the sequence `to` with the first `len` positions of `from`, which is open.
    pub fn fork(&mut self, from: SequenceId, to: SequenceId, len: usize, mut state: S) -> Result<()> {
        state.copy_prefix(self.get(from)?, len)?;
        self.open.insert(to, state);
        Ok(())
    }

    /// Drops the positions of an open sequence from `length` on.
    pub fn truncate(&mut self, id: SequenceId, length: usize) -> Result<()> {
        self.open.get_mut(&id).ok_or_else(|| not_open(id))?.truncate(length)
    }

    /// Closes a sequence, if it is open.
    pub fn close(&mut self, id: SequenceId) {
        self.open.remove(&id);
    }

    /// What is kept of an open sequence.
    pub fn get(&self, id: SequenceId) -> Result<&S> {
        self.open.get(&id).ok_or_else(|| not_open(id))
    }

    /// Calls `step` with the states of the slices' sequences, in order. They leave the table meanwhile, so that two slices
    /// of one sequence cannot alias, and return to it even if the step fails.
    pub fn lend<T>(&mut self, batch: &MicroBatch, step: impl FnOnce(&mut [S]) -> Result<T>) -> Result<T> {
        let mut lent = Vec::with_capacity(batch.slices.len());
        let mut missing = None;
        for slice in &batch.slices {
            match self.open.remove(&slice.id) {
                Some(state) => lent.push(state),
                None => {
                    missing = Some(slice.id);
                    break;
                }
            }
        }
        let result = match missing {
            Some(id) => Err(not_open(id)),
            None => step(&mut lent),
        };
        self.open.extend(batch.slices.iter().map(|slice| slice.id).zip(lent));
        result
    }

    /// Bytes held by all open sequences.
    pub fn bytes(&self) -> u64 {
        self.open.values().map(S::bytes).sum()
    }
}

fn not_open(id: SequenceId) -> Error {
    Error::Tensors(format!("sequence {} is not open in this stage", id.0))
}

#[cfg(test)]
mod tests {
    use super::super::{SequenceSlice, Wanted};
    use super::*;

    struct Held(u64);

    impl SequenceState for Held {
        fn copy_prefix(&mut self, source: &Held, len: usize) -> Result<()> {
            self.0 += source.0 * len as u64;
            Ok(())
        }

        fn truncate(&mut self, length: usize) -> Result<()> {
            self.0 = self.0.min(length as u64);
            Ok(())
        }

        fn bytes(&self) -> u64 {
            self.0
        }
    }

    fn batch(ids: &[u64]) -> MicroBatch {
        let slice = |&id: &u64| SequenceSlice {
            id: SequenceId(id),
            position: 0,
            len: 1,
            length: 1,
            decode: true,
            wanted: Wanted::Nothing,
        };
        MicroBatch { slices: ids.iter().map(slice).collect(), tokens: vec![0; ids.len()] }
    }

    fn open(ids: &[u64]) -> Sequences<Held> {
        let mut sequences = Sequences::default();
        ids.iter().for_each(|&id| sequences.open(SequenceId(id), Held(id)));
        sequences
    }

    #[test]
    fn sequences_are_lent_in_order_and_return_when_a_step_fails() {
        let mut sequences = open(&[1, 2, 3]);
        let failed: Result<()> = sequences.lend(&batch(&[3, 1]), |kv| {
            assert_eq!(kv.iter().map(|held| held.0).collect::<Vec<_>>(), [3, 1]);
            kv[0].0 = 30;
            Err(Error::Tensors("the step fails".into()))
        });
        assert!(failed.is_err());
        assert_eq!(sequences.bytes(), 1 + 2 + 30);
    }

    #[test]
    fn an_open_sequence_is_truncated_and_another_is_refused() {
        let mut sequences = open(&[5, 9]);
        sequences.truncate(SequenceId(9), 3).unwrap();
        assert_eq!(sequences.bytes(), 5 + 3);
        let error = sequences.truncate(SequenceId(4), 3).unwrap_err().to_string();
        assert!(error.contains("sequence 4 is not open"), "{error}");
    }

    #[test]
    fn a_sequence_is_lent_to_one_slice_of_a_step() {
        let mut sequences = open(&[1, 2]);
        for ids in [[1, 1], [2, 9]] {
            let error = sequences.lend(&batch(&ids), |_| Ok(())).unwrap_err().to_string();
            assert!(error.contains(&format!("sequence {} is not open", ids[1])), "{error}");
            assert_eq!(sequences.bytes(), 1 + 2, "both are back");
        }
    }

    #[test]
    fn a_fork_needs_an_open_sequence() {
        let mut sequences = open(&[5]);
        sequences.fork(SequenceId(5), SequenceId(6), 2, Held(0)).unwrap();
        assert!(sequences.fork(SequenceId(7), SequenceId(8), 2, Held(0)).is_err());
        sequences.close(SequenceId(5));
        assert_eq!(sequences.get(SequenceId(6)).unwrap().0, 10);
        assert!(sequences.get(SequenceId(5)).is_err() && sequences.get(SequenceId(8)).is_err());
    }
}
