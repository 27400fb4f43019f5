//! Rows for people, made from a [`Snapshot`]: a tree in order, with the depth of each row.
//!
//! Where the rows below one do not add up to it, a row named `other` says what is missing.

use serde::Serialize;

use super::super::Phase;
use super::snapshot::{Bytes, LayerLatency, Snapshot, StageLatency, Timing};

/// A time and what it is of.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LatencyRow {
    /// What.
    pub label: String,
    /// The latest.
    pub last_ms: f64,
    /// Mean of the latest few.
    pub average_ms: f64,
    /// Depth; a row's parent is the nearest one before it with a smaller one.
    pub level: usize,
}

/// A number of bytes and what they are for.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MemoryRow {
    /// What.
    pub label: String,
    /// Now.
    pub current_bytes: u64,
    /// At most so far.
    pub peak_bytes: u64,
    /// Depth; a row's parent is the nearest one before it with a smaller one.
    pub level: usize,
}

/// Remainders below this are those of rounding averages.
const ROUNDING_NS: u64 = 1_000;

/// A row with rows below it.
struct Tree {
    label: String,
    timing: Timing,
    below: Vec<Tree>,
}

impl Tree {
    fn leaf(label: impl Into<String>, timing: Timing) -> Tree {
        Tree { label: label.into(), timing, below: Vec::new() }
    }

    fn of(label: impl Into<String>, timing: Timing, below: Vec<Tree>) -> Tree {
        Tree { label: label.into(), timing, below }
    }

    /// What the rows below it leave.
    fn other(&self) -> Option<Tree> {
        let (mut last_ns, mut average_ns) = (self.timing.last_ns, self.timing.average_ns);
        for tree in &self.below {
            last_ns = last_ns.saturating_sub(tree.timing.last_ns);
            average_ns = average_ns.saturating_sub(tree.timing.average_ns);
        }
        let missing = !self.below.is_empty() && last_ns.max(average_ns) >= ROUNDING_NS;
        missing.then(|| Tree::leaf("other", Timing { last_ns, average_ns }))
    }

    fn write(&self, level: usize, rows: &mut Vec<LatencyRow>) {
        let ms = |ns: u64| ns as f64 / 1e6;
        let Timing { last_ns, average_ns } = self.timing;
        rows.push(LatencyRow { label: self.label.clone(), last_ms: ms(last_ns), average_ms: ms(average_ns), level });
        for tree in self.below.iter().chain(&self.other()) {
            tree.write(level + 1, rows);
        }
    }
}

impl Snapshot {
    /// A stage's name in rows.
    pub fn stage_label(&self, stage: usize) -> String {
        match self.stages.get(stage) {
            Some(figures) => format!("Stage {stage} ({})", figures.device),
            None => format!("Stage {stage}"),
        }
    }
}

/// Where the time of the latest steps went. Softmax has no rows of its own, since no backend tells it apart from the rest
/// of `sdpa`.
pub fn build_latency_rows(snapshot: &Snapshot) -> Vec<LatencyRow> {
    let latency = &snapshot.latency;
    let of_each = |of: fn(&StageLatency) -> Timing| {
        let stages = latency.stages.iter().enumerate();
        stages.map(|(index, stage)| Tree::leaf(snapshot.stage_label(index), of(stage))).collect::<Vec<_>>()
    };
    let forward = latency.stages.iter().enumerate().map(|(index, stage)| forward(snapshot, index, stage));
    let mut step = vec![
        Tree::of("Queue", latency.queue, of_each(|stage| stage.queued)),
        Tree::of("Forward", latency.forward, forward.collect()),
    ];
    if latency.stages.len() > 1 {
        step.push(Tree::of("Transfer", latency.transfer, of_each(|stage| stage.copy)));
    }
    let waits = of_each(|stage| stage.wait);
    let sum = |of: fn(&Timing) -> u64| waits.iter().map(|wait| of(&wait.timing)).sum();
    let wait = Timing { last_ns: sum(|timing| timing.last_ns), average_ns: sum(|timing| timing.average_ns) };
    let trees = [
        Tree::of("Step", latency.step, step),
        Tree::leaf("Sampling", latency.sampling),
        Tree::leaf("Admission", latency.admission),
        Tree::of("Bubbles", wait, waits),
    ];
    let mut rows = Vec::new();
    trees.iter().for_each(|tree| tree.write(0, &mut rows));
    rows
}

fn forward(snapshot: &Snapshot, index: usize, stage: &StageLatency) -> Tree {
    let input = Phase::Embedding.name_on(index);
    let layer = |layer: &LayerLatency| {
        let phases = layer.phases.iter().map(|(phase, timing)| Tree::leaf(phase.name(), *timing));
        Tree::of(format!("Layer {}", layer.layer), layer.total, phases.collect())
    };
    let mut below: Vec<Tree> = stage.input.iter().map(|timing| Tree::leaf(input, *timing)).collect();
    below.extend(stage.layers.iter().map(layer));
    below.extend(stage.output.map(|timing| Tree::leaf("output", timing)));
    Tree::of(snapshot.stage_label(index), stage.compute, below)
}

/// What is held. KV that was set aside but has not been written is a row of its own, as is what a process has besides.
pub fn build_memory_rows(snapshot: &Snapshot) -> Vec<MemoryRow> {
    let memory = &snapshot.memory;
    let mut rows = Vec::new();
    let mut row = |level: usize, label: String, bytes: Bytes| {
        rows.push(MemoryRow { label, current_bytes: bytes.current, peak_bytes: bytes.peak, level });
    };
    let held = |bytes: u64, weights: Bytes| {
        // What is not loaded yet is not held.
        Bytes { current: if weights.current > 0 { bytes } else { 0 }, peak: if weights.peak > 0 { bytes } else { 0 } }
    };
    row(0, "Weights".into(), memory.weights);
    for (index, stage) in memory.stages.iter().enumerate() {
        row(1, snapshot.stage_label(index), stage.weights);
        if stage.embedding_bytes > 0 {
            row(2, "embeddings".into(), held(stage.embedding_bytes, stage.weights));
        }
        for &(layer, bytes) in &stage.layer_bytes {
            row(2, format!("Layer {layer}"), held(bytes, stage.weights));
        }
        if stage.head_bytes > 0 {
            row(2, "head".into(), held(stage.head_bytes, stage.weights));
        }
        if stage.other.peak > 0 {
            row(2, "other".into(), stage.other);
        }
    }
    row(0, "KV cache".into(), memory.kv);
    for (index, stage) in memory.stages.iter().enumerate() {
        row(1, snapshot.stage_label(index), stage.kv_reserved);
        row(2, "used".into(), stage.kv_used);
        row(2, "not used yet".into(), stage.kv_unused);
    }
    let fixed = |bytes| Bytes { current: bytes, peak: bytes };
    row(0, "KV limit".into(), fixed(memory.stages.iter().map(|stage| stage.kv_limit).sum()));
    for (index, stage) in memory.stages.iter().enumerate() {
        row(1, snapshot.stage_label(index), fixed(stage.kv_limit));
    }
    row(0, "Scratch".into(), memory.scratch);
    for (index, stage) in memory.stages.iter().enumerate() {
        row(1, snapshot.stage_label(index), stage.scratch);
    }
    let host = &memory.host;
    row(0, "Host process".into(), host.process);
    row(1, "weights".into(), host.weights);
    row(1, "KV cache".into(), host.kv);
    row(1, "scratch".into(), host.scratch);
    row(1, "unattributed".into(), host.unattributed);
    let split = |bytes: u64| (bytes.min(host.at_start), bytes.saturating_sub(host.at_start));
    let (now, most) = (split(host.unattributed.current), split(host.unattributed.peak));
    row(2, "at start".into(), Bytes { current: now.0, peak: most.0 });
    row(2, "other".into(), Bytes { current: now.1, peak: most.1 });
    rows
}
