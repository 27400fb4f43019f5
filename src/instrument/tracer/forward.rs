//! What is kept of forward passes, within a bound.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use super::super::{LayerActivations, StepSlice};
use super::activation::Anomaly;
use super::attention::AttentionTrace;
use super::logit::LogitTrace;

/// One forward pass: a step over all its stages.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize)]
pub struct ForwardTrace {
    /// Number of the step.
    pub step: u64,
    /// Whose rows were in it. Activations are of all rows of a step together; attention and logits name their request.
    pub slices: Vec<StepSlice>,
    /// Whether every stage computed it. A step that nobody wanted any more, or that failed, goes only part of the way.
    pub complete: bool,
    /// In order.
    pub layers: Vec<LayerActivations>,
    /// What is wrong in them, in the order of the layers.
    pub anomalies: Vec<Anomaly>,
    /// In the order in which they came: by layers.
    pub attention: Vec<AttentionTrace>,
    /// One for each request that wanted logits.
    pub logits: Vec<LogitTrace>,
}

/// One that is under way.
#[derive(Debug, Default)]
pub(super) struct Open {
    pub trace: ForwardTrace,
    /// Stages that have computed it.
    pub stages: usize,
    /// Whether anything was wrong, kept or not.
    pub anomalous: bool,
    /// What was traced of it has made way. It still counts.
    forgotten: bool,
}

/// What an entry takes beside the forward pass itself: pointers and counts of the containers.
const ENTRY_BYTES: usize = 64;

impl ForwardTrace {
    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        let ForwardTrace { slices, layers, anomalies, attention, logits, .. } = self;
        let inner: usize = attention.iter().map(|trace| trace.bytes() - size_of::<AttentionTrace>()).sum::<usize>()
            + logits.iter().map(|trace| trace.bytes() - size_of::<LogitTrace>()).sum::<usize>();
        ENTRY_BYTES
            + size_of::<Open>()
            + room_of(slices)
            + room_of(layers)
            + room_of(anomalies)
            + room_of(attention)
            + room_of(logits)
            + inner
    }

    fn shrink(&mut self) {
        self.slices.shrink_to_fit();
        self.layers.shrink_to_fit();
        self.anomalies.shrink_to_fit();
        self.attention.shrink_to_fit();
        self.logits.shrink_to_fit();
    }
}

fn room_of<T>(items: &Vec<T>) -> usize {
    items.capacity() * size_of::<T>()
}

/// How many items a full list grows by.
fn growth<T>(items: &Vec<T>) -> usize {
    if items.len() < items.capacity() { 0 } else { items.len().max(4) }
}

/// Steps that may be under way at once. More of them means that their ends were not heard of.
const MOST_OPEN: usize = 64;

/// Forward passes under way, and the latest of those that are over.
#[derive(Debug, Default)]
pub(super) struct Forwards {
    open: BTreeMap<u64, Open>,
    ended: VecDeque<Arc<ForwardTrace>>,
    /// Of all of them.
    bytes: usize,
    /// Forward passes that made way for later ones.
    pub evicted: u64,
    /// Traces that there was no room for, even so.
    pub refused: u64,
}

impl Forwards {
    /// Bytes of all that is kept.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Those that are over, oldest first.
    pub fn ended(&self) -> impl Iterator<Item = &Arc<ForwardTrace>> {
        self.ended.iter()
    }

    /// Steps that are under way, oldest first.
    pub fn open(&self) -> impl Iterator<Item = u64> {
        self.open.keys().copied()
    }

    /// Traces of rows in steps that are under way, the latest step first.
    pub fn open_logits(&mut self) -> impl Iterator<Item = &mut LogitTrace> {
        self.open.values_mut().rev().flat_map(|open| &mut open.trace.logits)
    }

    /// Stages that have computed a step; 0 where it is not under way.
    pub fn stages(&self, step: u64) -> usize {
        self.open.get(&step).map_or(0, |open| open.stages)
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        *self = Forwards::default();
    }

    /// The forward pass of a step, begun if it is not under way. `None` when there is no room.
    pub fn at(&mut self, step: u64, max_bytes: usize) -> Option<&mut Open> {
        if !self.open.contains_key(&step) {
            while self.open.len() >= MOST_OPEN
                && let Some((_, oldest)) = self.open.pop_first()
            {
                self.bytes -= oldest.trace.bytes();
                self.evicted += u64::from(!oldest.forgotten);
            }
            let trace = ForwardTrace { step, ..ForwardTrace::default() };
            let bytes = trace.bytes();
            if !self.make_room(bytes, step, max_bytes) {
                self.refused += 1;
                return None;
            }
            self.bytes += bytes;
            self.open.insert(step, Open { trace, ..Open::default() });
        }
        self.open.get_mut(&step)
    }

    /// Adds an item that holds `inner` bytes beside itself to one of the lists of a step; older steps make way. What
    /// there is no room for is counted and let go.
    pub fn push<T>(
        &mut self,
        step: u64,
        list: fn(&mut ForwardTrace) -> &mut Vec<T>,
        item: T,
        inner: usize,
        max_bytes: usize,
    ) {
        let Some(open) = self.at(step, max_bytes) else { return };
        if open.forgotten {
            self.refused += 1;
            return;
        }
        let more = growth(list(&mut open.trace));
        let bytes = more * size_of::<T>() + inner;
        if !self.make_room(bytes, step, max_bytes) {
            self.refused += 1;
            return;
        }
        if let Some(open) = self.open.get_mut(&step) {
            let items = list(&mut open.trace);
            let before = room_of(items);
            items.reserve_exact(more);
            items.push(item);
            self.bytes += room_of(items) - before + inner;
        }
    }

    /// The step is over: it is kept with the others, unless it has made way. `None` when it was not under way.
    pub fn end(&mut self, step: u64, complete: bool) -> Option<Arc<ForwardTrace>> {
        let Open { mut trace, forgotten, .. } = self.open.remove(&step)?;
        self.bytes -= trace.bytes();
        trace.complete = complete;
        trace.shrink();
        trace.layers.sort_by_key(|layer| layer.layer);
        trace.anomalies.sort_by_key(|anomaly| (anomaly.layer, anomaly.place));
        let trace = Arc::new(trace);
        if !forgotten {
            self.bytes += trace.bytes();
            self.ended.push_back(trace.clone());
        }
        Some(trace)
    }

    /// Whether `bytes` more fit, once older steps than `step` have made way.
    fn make_room(&mut self, bytes: usize, step: u64, max_bytes: usize) -> bool {
        while self.bytes + bytes > max_bytes {
            if let Some(oldest) = self.ended.pop_front() {
                self.bytes -= oldest.bytes();
                self.evicted += 1;
            } else if !self.forget_oldest_open(step) {
                return false;
            }
        }
        true
    }

    /// Forgets what was traced of the oldest step under way that is not `step`; false when there is none.
    fn forget_oldest_open(&mut self, step: u64) -> bool {
        let Some((&oldest, open)) = self.open.iter_mut().find(|(other, open)| **other != step && !open.forgotten)
        else {
            return false;
        };
        self.bytes -= open.trace.bytes();
        open.trace = ForwardTrace { step: oldest, ..ForwardTrace::default() };
        open.forgotten = true;
        self.bytes += open.trace.bytes();
        self.evicted += 1;
        true
    }

    /// Bytes by going through everything.
    #[cfg(test)]
    pub fn recounted(&self) -> usize {
        let open = self.open.values().map(|open| open.trace.bytes());
        open.chain(self.ended.iter().map(|forward| forward.bytes())).sum()
    }
}
