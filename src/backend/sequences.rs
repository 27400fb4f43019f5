//! The sequences that are open in a stage, and what is kept of each.

use std::collections::HashMap;

use super::{MicroBatch, SequenceId};
use crate::error::{Error, Result};

/// What a stage keeps of one sequence from step to step.
pub trait SequenceState {
    /// Takes over the first `len` positions of `source`, a sequence of the same layers.
    fn copy_prefix(&mut self, source: &Self, len: usize) -> Result<()>;

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
