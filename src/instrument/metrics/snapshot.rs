//! The figures at one moment, as plain data. Rows, logs and exports are made from this and from nothing else, so that all
//! show the same numbers.

use std::collections::BTreeMap;

use crate::instrument::{KvState, Phase};

/// Everything that is known at one moment.
#[derive(Debug, Clone, PartialEq, Default, serde::Serialize)]
pub struct Snapshot {
    /// Seconds since the beginning of 1970.
    pub time: f64,
    /// Seconds since the figures began.
    pub uptime: f64,
    /// Family of the model, such as `llama`; empty before one is opened.
    pub architecture: String,
    /// What each stage has done, in order.
    pub stages: Vec<StageFigures>,
    /// Where the time of the latest steps went.
    pub latency: Latency,
    /// What is held.
    pub memory: Memory,
    /// Requests.
    pub requests: Requests,
    /// Tokens.
    pub tokens: Tokens,
    /// How the KV stood after the latest step.
    pub kv: KvState,
    /// Events that the queue did not take: figures are too low by what they told.
    pub dropped_events: u64,
}

/// A time that is measured again and again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct Timing {
    /// The latest.
    pub last_ns: u64,
    /// Mean of the latest few, see [`MetricsOptions::window`](super::MetricsOptions::window).
    pub average_ns: u64,
}

/// Where time went. Steps in this tree are those whose phases were told, all of them when phases are off; each average is
/// over the same steps as those below it.
#[derive(Debug, Clone, PartialEq, Default, serde::Serialize)]
pub struct Latency {
    /// From sending a step to its end in the last stage.
    pub step: Timing,
    /// Time that a step waited for stages, links under way included.
    pub queue: Timing,
    /// Time that all stages computed it.
    pub forward: Timing,
    /// Time that it was copied between stages.
    pub transfer: Timing,
    /// In order.
    pub stages: Vec<StageLatency>,
    /// Choosing a token, text and delivery with it.
    pub sampling: Timing,
    /// Time that a request waited for admission.
    pub admission: Timing,
}

/// One stage's part of a step.
#[derive(Debug, Clone, PartialEq, Default, serde::Serialize)]
pub struct StageLatency {
    /// Time that it computed.
    pub compute: Timing,
    /// Time that it copied its output towards the next stage.
    pub copy: Timing,
    /// Time that the step waited for it.
    pub queued: Timing,
    /// Time that it waited for the step while there was work elsewhere: a bubble.
    pub wait: Timing,
    /// Looking up embeddings, or taking over the previous stage's activations. Absent without phases.
    pub input: Option<Timing>,
    /// In order. Empty without phases.
    pub layers: Vec<LayerLatency>,
    /// Final norm and head. Absent without phases, and but in the last stage.
    pub output: Option<Timing>,
}

/// One layer.
#[derive(Debug, Clone, PartialEq, Default, serde::Serialize)]
pub struct LayerLatency {
    /// Its number in the model.
    pub layer: usize,
    /// All of it.
    pub total: Timing,
    /// Its phases, in order.
    pub phases: Vec<(Phase, Timing)>,
}

/// Bytes now and at most so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct Bytes {
    /// Now.
    pub current: u64,
    /// At most so far.
    pub peak: u64,
}

/// What is held.
#[derive(Debug, Clone, PartialEq, Default, serde::Serialize)]
pub struct Memory {
    /// Weights of all stages.
    pub weights: Bytes,
    /// KV set aside in all stages.
    pub kv: Bytes,
    /// Buffers that forward passes compute in, of all stages.
    pub scratch: Bytes,
    /// In order.
    pub stages: Vec<StageFootprint>,
    /// The process that all this is in.
    pub host: HostMemory,
}

/// What one stage holds.
#[derive(Debug, Clone, PartialEq, Default, serde::Serialize)]
pub struct StageFootprint {
    /// Weights.
    pub weights: Bytes,
    /// How much of them are embeddings.
    pub embedding_bytes: u64,
    /// How much each layer is: number in the model and bytes.
    pub layer_bytes: Vec<(usize, u64)>,
    /// How much are the final norm and the head.
    pub head_bytes: u64,
    /// How much is none of these: packs that are larger than the file says.
    pub other: Bytes,
    /// KV set aside for the requests that run and for kept prefixes: at each one's own capacity.
    pub kv_reserved: Bytes,
    /// How much of that holds computed positions.
    pub kv_used: Bytes,
    /// How much of it does not.
    pub kv_unused: Bytes,
    /// KV that there may be.
    pub kv_limit: u64,
    /// Buffers that a forward pass computes in.
    pub scratch: Bytes,
}

/// The process. All zeros where the system does not tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct HostMemory {
    /// Bytes resident.
    pub process: Bytes,
    /// Bytes resident when the figures began, before a model was loaded.
    pub at_start: u64,
    /// Weights of the CPU stages.
    pub weights: Bytes,
    /// KV of the CPU stages. What was set aside and never written is not resident, so this may be more than there is.
    pub kv: Bytes,
    /// Scratch of the CPU stages.
    pub scratch: Bytes,
    /// What is resident besides: what was there at the start, the runtime, files that are mapped.
    pub unattributed: Bytes,
}

/// What one stage has done so far.
#[derive(Debug, Clone, PartialEq, Default, serde::Serialize)]
pub struct StageFigures {
    /// Its device, as options name it.
    pub device: String,
    /// Its first layer.
    pub first_layer: usize,
    /// Its layers.
    pub layers: usize,
    /// Micro-batches computed.
    pub steps: u64,
    /// Rows in them.
    pub rows: u64,
    /// Seconds that it computed.
    pub compute: f64,
    /// Seconds that it waited while there was work elsewhere.
    pub wait: f64,
    /// Seconds that it copied towards the next stage.
    pub copy: f64,
    /// Seconds that steps waited for it.
    pub queued: f64,
    /// Bytes of activations handed to the next stage.
    pub transfer_bytes: u64,
    /// Shares of its time, over its latest steps.
    pub recent: Occupancy,
    /// How fast its latest decode steps read memory.
    pub bandwidth: Bandwidth,
}

/// How a stage spent the time in which there was work somewhere: shares that add up to 1, or all 0.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize)]
pub struct Occupancy {
    /// Computing.
    pub busy: f64,
    /// Waiting: the bubbles.
    pub bubble: f64,
    /// Copying.
    pub copy: f64,
}

impl Occupancy {
    /// From times in the same unit.
    pub fn of(compute: f64, wait: f64, copy: f64) -> Occupancy {
        match compute + wait + copy {
            all if all > 0.0 => Occupancy { busy: compute / all, bubble: wait / all, copy: copy / all },
            _ => Occupancy::default(),
        }
    }
}

/// Bytes that decode steps must read (weights once, and the KV of each row) over the time that they took.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize)]
pub struct Bandwidth {
    /// Bytes of the latest decode step; 0 before the first.
    pub step_bytes: u64,
    /// Bytes a second, over the latest few decode steps.
    pub bytes_per_second: f64,
    /// What the device can read, if it was measured.
    pub device_bytes_per_second: Option<f64>,
}

impl Bandwidth {
    /// The part of what the device can do. More than 1 means that caches had some of it.
    pub fn share(&self) -> Option<f64> {
        self.device_bytes_per_second.filter(|device| *device > 0.0).map(|device| self.bytes_per_second / device)
    }
}

/// Requests so far and now.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize)]
pub struct Requests {
    /// Came to the scheduler.
    pub received: u64,
    /// Wait for admission.
    pub waiting: u64,
    /// Are running.
    pub running: u64,
    /// Ended, by [`Outcome::name`](crate::instrument::Outcome::name).
    pub finished: BTreeMap<&'static str, u64>,
    /// Ended in an error, by its kind.
    pub errors: BTreeMap<&'static str, u64>,
}

/// Tokens so far, and how fast they come.
#[derive(Debug, Clone, PartialEq, Default, serde::Serialize)]
pub struct Tokens {
    /// In prompts that were admitted.
    pub prompt: u64,
    /// How many of those were computed. More than once where a sequence had to be computed anew.
    pub prefilled: u64,
    /// How many of those were taken over from other requests.
    pub reused: u64,
    /// Requests that took some over.
    pub prefix_hits: u64,
    /// Generated.
    pub generated: u64,
    /// Generated in the latest whole second.
    pub per_second: f64,
    /// Generated in each slice of the latest minute, oldest first.
    pub history: Vec<u32>,
    /// Length of a slice in seconds.
    pub history_slice: f64,
    /// From submission to the first token.
    pub ttft: Distribution,
    /// From one token to the next of the same request.
    pub inter_token: Distribution,
}

/// How a time is distributed.
#[derive(Debug, Clone, PartialEq, Default, serde::Serialize)]
pub struct Distribution {
    /// Samples.
    pub count: u64,
    /// Their sum in seconds.
    pub sum: f64,
    /// The median, to three digits.
    pub p50_us: u64,
    /// To three digits.
    pub p95_us: u64,
    /// To three digits.
    pub p99_us: u64,
    /// The largest, to three digits.
    pub max_us: u64,
    /// Upper bounds in seconds, and samples up to each.
    pub buckets: Vec<(f64, u64)>,
}
