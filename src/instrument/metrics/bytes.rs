//! Who holds how many bytes, now and at most so far.

use std::time::{Duration, Instant};

use sysinfo::{Pid, ProcessRefreshKind, ProcessesToUpdate, System};

use super::snapshot::{Bytes, Memory, StageFootprint};
use crate::instrument::{ModelFacts, StageFacts};

impl Bytes {
    pub(super) fn set(&mut self, bytes: u64) {
        *self = Bytes { current: bytes, peak: self.peak.max(bytes) };
    }
}

/// Whether a device's memory is the host's.
fn is_host(stage: &StageFacts) -> bool {
    stage.device.starts_with("cpu")
}

impl StageFootprint {
    fn of(stage: &StageFacts, kv_positions: usize) -> StageFootprint {
        StageFootprint {
            embedding_bytes: stage.embedding_bytes,
            layer_bytes: (stage.first_layer..).zip(stage.layer_bytes.iter().copied()).collect(),
            head_bytes: stage.head_bytes,
            kv_limit: stage.kv_bytes_per_position * kv_positions as u64,
            ..StageFootprint::default()
        }
    }

    fn set_kv_used(&mut self, used: u64) {
        // What was freed since the positions were counted holds none.
        self.kv_used.set(used.min(self.kv_reserved.current));
        self.kv_unused.set(self.kv_reserved.current - self.kv_used.current);
    }
}

/// Keeps a [`Memory`] up to date.
#[derive(Debug, Default)]
pub(super) struct Holdings {
    memory: Memory,
    facts: Vec<StageFacts>,
    /// Computed positions.
    valid: usize,
    /// Whether weights have come or gone since the process was looked at.
    loaded: bool,
}

impl Holdings {
    /// Nothing is held yet of a model that is about to be loaded.
    pub(super) fn open(&mut self, facts: &ModelFacts) {
        let host = self.memory.host;
        let stages = facts.stages.iter().map(|stage| StageFootprint::of(stage, facts.kv_positions)).collect();
        self.memory = Memory { stages, host, ..Memory::default() };
        self.facts = facts.stages.clone();
        self.valid = 0;
        self.add_up();
    }

    pub(super) fn hold(&mut self, stage: usize, weights: u64, kv: u64, scratch: u64) {
        let (Some(footprint), Some(facts)) = (self.memory.stages.get_mut(stage), self.facts.get(stage)) else { return };
        let parts = facts.embedding_bytes + facts.layer_bytes.iter().sum::<u64>() + facts.head_bytes;
        self.loaded |= footprint.weights.current != weights;
        footprint.weights.set(weights);
        footprint.other.set(weights.saturating_sub(parts));
        footprint.kv_reserved.set(kv);
        footprint.scratch.set(scratch);
        footprint.set_kv_used(self.valid as u64 * facts.kv_bytes_per_position);
        self.add_up();
    }

    pub(super) fn computed(&mut self, positions: usize) {
        self.valid = positions;
        for (footprint, facts) in self.memory.stages.iter_mut().zip(&self.facts) {
            footprint.set_kv_used(positions as u64 * facts.kv_bytes_per_position);
        }
    }

    /// Whether the process has surely changed since [`resident`](Self::resident).
    pub(super) fn has_loaded(&self) -> bool {
        self.loaded
    }

    /// The process has so many bytes now.
    pub(super) fn resident(&mut self, bytes: u64) {
        self.loaded = false;
        self.memory.host.process.set(bytes);
        self.attribute();
    }

    /// Before anything was loaded it had so many.
    pub(super) fn start(&mut self, bytes: u64) {
        self.memory.host.at_start = bytes;
        self.resident(bytes);
    }

    fn add_up(&mut self) {
        let Memory { stages, weights, kv, scratch, host, .. } = &mut self.memory;
        let sum = |of: fn(&StageFootprint) -> Bytes| stages.iter().map(|stage| of(stage).current).sum();
        weights.set(sum(|stage| stage.weights));
        kv.set(sum(|stage| stage.kv_reserved));
        scratch.set(sum(|stage| stage.scratch));
        let on_host = |of: fn(&StageFootprint) -> Bytes| {
            let stages = stages.iter().zip(&self.facts).filter(|(_, facts)| is_host(facts));
            stages.map(|(stage, _)| of(stage).current).sum()
        };
        host.weights.set(on_host(|stage| stage.weights));
        host.kv.set(on_host(|stage| stage.kv_reserved));
        host.scratch.set(on_host(|stage| stage.scratch));
        self.attribute();
    }

    fn attribute(&mut self) {
        let host = &mut self.memory.host;
        let attributed = host.weights.current + host.kv.current + host.scratch.current;
        host.unattributed.set(host.process.current.saturating_sub(attributed));
    }

    pub(super) fn memory(&self) -> &Memory {
        &self.memory
    }
}

/// Asks the system now and then how much memory this process has.
pub(super) struct Process {
    pid: Option<Pid>,
    system: System,
    interval: Duration,
    asked: Option<Instant>,
}

impl Process {
    pub(super) fn new(interval: Duration) -> Process {
        Process { pid: sysinfo::get_current_pid().ok(), system: System::new(), interval, asked: None }
    }

    /// Whether it is time to ask again.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.asked.is_none_or(|asked| now.saturating_duration_since(asked) >= self.interval)
    }

    /// Bytes resident, if the system tells.
    pub(super) fn resident(&mut self, now: Instant) -> Option<u64> {
        self.asked = Some(now);
        let pid = self.pid?;
        let only_memory = ProcessRefreshKind::nothing().with_memory();
        self.system.refresh_processes_specifics(ProcessesToUpdate::Some(&[pid]), false, only_memory);
        self.system.process(pid).map(|process| process.memory())
    }
}
