//! What happens inside, told as plain events to whoever listens. Without a listener no event is built.

use std::sync::Arc;
use std::time::Duration;

/// Something that happened in a stage or to a request. Times are wall-clock on the thread that reports.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// A request was admitted.
    RequestStarted {
        /// Its number, unique within the executor.
        request: u64,
        /// Tokens in its prompt.
        prompt_tokens: usize,
    },
    /// A request took over the KV of tokens that it shares with another.
    PrefixReused {
        /// Its number.
        request: u64,
        /// Tokens of its prompt that need not be computed.
        tokens: usize,
    },
    /// A request ended.
    RequestFinished {
        /// Its number.
        request: u64,
        /// Tokens it generated.
        tokens: usize,
    },
    /// A stage computed one micro-batch.
    StageStep {
        /// Index of the stage.
        stage: usize,
        /// Number of the step: the same micro-batch has the same one in every stage.
        step: u64,
        /// Rows in the micro-batch.
        rows: usize,
        /// Time the micro-batch waited for the stage.
        queued: Duration,
        /// Time the stage waited for it while there was work elsewhere in the pipeline: a bubble.
        wait: Duration,
        /// Time it computed.
        compute: Duration,
        /// Time it copied its output towards the next stage.
        copy: Duration,
    },
    /// A token was chosen.
    Sampled {
        /// The request's number.
        request: u64,
        /// Time the choice took.
        duration: Duration,
    },
}

/// Receives events on the threads where they happen; it must not block them.
pub trait Collector: Send + Sync {
    /// Takes one event.
    fn event(&self, event: Event);
}

/// Where events go: a collector or nowhere.
#[derive(Clone, Default)]
pub struct Probe(Option<Arc<dyn Collector>>);

impl std::fmt::Debug for Probe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.is_on() { "Probe(on)" } else { "Probe(off)" })
    }
}

impl Probe {
    /// Sends events to `collector`.
    pub fn new(collector: Arc<dyn Collector>) -> Self {
        Probe(Some(collector))
    }

    /// Whether anybody listens.
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Builds and sends the event if anybody listens.
    pub fn emit(&self, event: impl FnOnce() -> Event) {
        if let Some(collector) = &self.0 {
            collector.event(event());
        }
    }
}
