//! What an executor reports: a finished generation, and what its stages hold and have done.

use std::time::Duration;

use super::options::{FinishReason, TokenLogprob};
use crate::device::DeviceSpec;

/// What one generation gave.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// Generated token ids. An end-of-sequence or stop token that ended it is the last one, as in transformers.
    pub tokens: Vec<u32>,
    /// Generated text without special tokens, up to a stop string; empty for the forms that take and give tokens only.
    pub text: String,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// For each token, when asked for.
    pub logprobs: Vec<TokenLogprob>,
    /// Logits of the last prompt position, when asked for.
    pub prompt_logits: Option<Vec<f32>>,
    /// From submission to the first token.
    pub time_to_first_token: Duration,
    /// From submission to the end.
    pub total_time: Duration,
    /// Prompt tokens whose KV was taken over from another sequence.
    pub reused_tokens: usize,
}

/// What warming up did.
#[derive(Debug, Clone, PartialEq)]
pub struct WarmupReport {
    /// Positions of the prompt that was computed.
    pub prefill_tokens: usize,
    /// Steps of one token.
    pub decode_steps: usize,
    /// Time it took in all.
    pub duration: Duration,
    /// Device and computing time of each stage.
    pub stages: Vec<(DeviceSpec, Duration)>,
}

/// Bytes that a stage holds now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StageMemory {
    /// Where it runs.
    pub device: DeviceSpec,
    /// Weights.
    pub weights: u64,
    /// KV of open sequences.
    pub kv: u64,
    /// How much of that belongs to ended sequences and makes way when it is needed.
    pub kv_retained: u64,
    /// KV that there may be.
    pub kv_budget: u64,
}

/// What a stage has done since it was loaded. Times are wall-clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StageStats {
    /// Where it runs.
    pub device: DeviceSpec,
    /// Time it computed.
    pub compute: Duration,
    /// Time it stood without work while there was some elsewhere in the pipeline: its bubbles.
    pub wait: Duration,
    /// Time it copied its output towards the next stage.
    pub copy: Duration,
    /// Time that micro-batches waited for it, summed over them.
    pub queued: Duration,
    /// Micro-batches.
    pub steps: u64,
    /// Rows in them.
    pub rows: u64,
}

impl StageStats {
    /// The part of its time that it computed, from 0 to 1; the rest are bubbles and copies. Time in which nobody wanted
    /// anything does not count.
    pub fn busy_share(&self) -> f64 {
        let all = (self.compute + self.wait + self.copy).as_secs_f64();
        if all == 0.0 { 0.0 } else { self.compute.as_secs_f64() / all }
    }

    /// What it has done after `earlier`.
    pub fn since(&self, earlier: &StageStats) -> StageStats {
        StageStats {
            device: self.device,
            compute: self.compute.saturating_sub(earlier.compute),
            wait: self.wait.saturating_sub(earlier.wait),
            copy: self.copy.saturating_sub(earlier.copy),
            queued: self.queued.saturating_sub(earlier.queued),
            steps: self.steps.saturating_sub(earlier.steps),
            rows: self.rows.saturating_sub(earlier.rows),
        }
    }
}

/// What prefix reuse has done since the executor was built, and what it keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrefixStats {
    /// Requests that might have reused a prefix.
    pub lookups: u64,
    /// Those that did.
    pub hits: u64,
    /// Prompt tokens that did not have to be computed.
    pub reused_tokens: u64,
    /// Ended sequences whose KV is kept now.
    pub retained_sequences: u64,
    /// Positions that their KV is set aside for.
    pub retained_positions: u64,
}
