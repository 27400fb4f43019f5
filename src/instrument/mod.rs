//! What happens inside, told as plain events to whoever listens. Without a listener no event is built.
//!
//! [`Event`] is the vocabulary. The scheduler and the stage threads tell it to a [`Probe`], which hands each event to any
//! number of [`Collector`]s on the thread where it happens. Whoever wants to do more than count puts a [`queue`] between:
//! a bounded channel that never blocks, and a thread behind it.
//!
//! Some events cost time where they happen, so they are told only when a collector's [`Interest`] asks for them. Those
//! are gathered during a forward pass by a [`Watch`].

pub mod chrome;
mod event;
mod failures;
pub mod jsonl;
mod line_file;
pub mod metrics;
pub mod prometheus;
pub mod quantisation;
pub mod queue;
pub mod session_log;
mod stats;
mod watch;
pub mod tracer;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

pub use event::{
    Event, KvState, Lap, LayerActivations, LensLayer, ModelFacts, Outcome, Phase, Record, StageFacts, StepOutcome,
    StepSlice, TensorFacts, TokenRank,
};
pub use failures::WriteFailures;
pub use stats::TensorStats;
pub use watch::{HiddenRow, StepPhases, Tap, Watch, Watcher, lens_layers, lens_tokens};

/// Receives events on the threads where they happen; it must not block them.
pub trait Collector: Send + Sync {
    /// Takes one event.
    fn record(&self, record: &Arc<Record>);

    /// What it wants beyond the events that cost nothing where they happen.
    fn interest(&self) -> Interest {
        Interest::default()
    }
}

/// What a collector wants of what costs time to find out.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Interest {
    /// [`Event::Phases`] of all stages, of a step at most every so long; zero is every step.
    pub phases: Option<Duration>,
    /// Wait for the device at the end of each phase. Without it, the phases of a GPU show when work was submitted, not
    /// when it was done; with it, work that would have overlapped does not.
    pub synchronise: bool,
    /// [`Event::Activations`], of every step.
    pub activations: bool,
    /// [`Event::Attention`], of the last row of each sequence in a step that ends a prompt or decodes.
    pub attention: Option<AttentionFilter>,
    /// [`Event::Lens`], of the same rows.
    pub lens: Option<LensInterest>,
    /// [`Event::Kv`] after a step, at most every so long where nothing but the valid positions has changed; zero is after
    /// every step.
    pub kv: Option<Duration>,
    /// [`Event::SchedulerTurn`].
    pub turns: bool,
}

/// Which heads are watched. An absent list is all of them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AttentionFilter {
    /// Layers in the model.
    pub layers: Option<Vec<usize>>,
    /// Query heads.
    pub heads: Option<Vec<usize>>,
}

impl AttentionFilter {
    /// Whether a layer is watched.
    pub fn has_layer(&self, layer: usize) -> bool {
        self.layers.as_ref().is_none_or(|layers| layers.contains(&layer))
    }

    /// Whether a head is watched, in the layers that are.
    pub fn has_head(&self, head: usize) -> bool {
        self.heads.as_ref().is_none_or(|heads| heads.contains(&head))
    }

    fn union(self, other: AttentionFilter) -> AttentionFilter {
        AttentionFilter { layers: union(self.layers, other.layers), heads: union(self.heads, other.heads) }
    }
}

/// What of each layer's logits is told.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LensInterest {
    /// Tokens to follow. None given: those that the last layer finds most likely.
    pub tokens: Vec<u32>,
    /// How many most likely tokens are told of each layer, and followed where none are given.
    pub top_k: usize,
}

/// Microseconds with fractions.
fn micros(time: Duration) -> f64 {
    time.as_nanos() as f64 / 1000.0
}

/// Both lists; an absent one is all.
fn union(a: Option<Vec<usize>>, b: Option<Vec<usize>>) -> Option<Vec<usize>> {
    let mut all = a?;
    all.extend(b?);
    all.sort_unstable();
    all.dedup();
    Some(all)
}

/// What one of two wants, or both.
fn either<T>(a: Option<T>, b: Option<T>, both: impl FnOnce(T, T) -> T) -> Option<T> {
    match (a, b) {
        (Some(a), Some(b)) => Some(both(a, b)),
        (one, None) | (None, one) => one,
    }
}

impl Interest {
    /// What either wants.
    pub fn and(self, other: Interest) -> Interest {
        Interest {
            phases: either(self.phases, other.phases, Duration::min),
            synchronise: self.synchronise || other.synchronise,
            activations: self.activations || other.activations,
            attention: either(self.attention, other.attention, AttentionFilter::union),
            lens: either(self.lens, other.lens, |mut a, b| {
                a.tokens.extend(b.tokens);
                a.tokens.sort_unstable();
                a.tokens.dedup();
                LensInterest { tokens: a.tokens, top_k: a.top_k.max(b.top_k) }
            }),
            kv: either(self.kv, other.kv, Duration::min),
            turns: self.turns || other.turns,
        }
    }
}

/// Where events go: to collectors or nowhere.
#[derive(Clone, Default)]
pub struct Probe(Option<Arc<Listeners>>);

struct Listeners {
    collectors: Vec<Arc<dyn Collector>>,
    interest: Interest,
    paused: AtomicBool,
}

impl std::fmt::Debug for Probe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.is_on() { "Probe(on)" } else { "Probe(off)" })
    }
}

impl Probe {
    /// Sends events to `collector`.
    pub fn new(collector: Arc<dyn Collector>) -> Self {
        Probe::to_all(vec![collector])
    }

    /// Sends events to all of them, one after the other. None is the same as [`Probe::default`].
    pub fn to_all(collectors: Vec<Arc<dyn Collector>>) -> Self {
        if collectors.is_empty() {
            return Probe(None);
        }
        let interest = collectors.iter().map(|collector| collector.interest()).fold(Interest::default(), Interest::and);
        Probe(Some(Arc::new(Listeners { collectors, interest, paused: AtomicBool::new(false) })))
    }

    /// Sends them to these too, after those that it has.
    pub fn and(self, collectors: Vec<Arc<dyn Collector>>) -> Self {
        let mut all = self.0.map_or_else(Vec::new, |listeners| listeners.collectors.clone());
        all.extend(collectors);
        Probe::to_all(all)
    }

    /// Tells nothing until [`resume`](Self::resume), by this probe and all its clones: a running executor is watched for
    /// as long as one wants to know. Of micro-batches and requests that are under way at either call, a part is told.
    /// Pause after the executor is built: collectors learn then what the model is.
    pub fn pause(&self) {
        self.set_paused(true);
    }

    /// Tells events again.
    pub fn resume(&self) {
        self.set_paused(false);
    }

    fn set_paused(&self, paused: bool) {
        if let Some(listeners) = &self.0 {
            listeners.paused.store(paused, Ordering::Relaxed);
        }
    }

    fn listeners(&self) -> Option<&Listeners> {
        self.0.as_deref().filter(|listeners| !listeners.paused.load(Ordering::Relaxed))
    }

    /// Whether anybody listens, and is not paused.
    pub fn is_on(&self) -> bool {
        self.listeners().is_some()
    }

    /// What those who listen want; `None` when nobody does.
    pub fn interest(&self) -> Option<&Interest> {
        self.listeners().map(|listeners| &listeners.interest)
    }

    /// Builds and sends the event if anybody listens.
    pub fn emit(&self, event: impl FnOnce() -> Event) {
        if self.is_on() {
            self.emit_at(Instant::now(), event);
        }
    }

    /// The same for an event whose time is known.
    pub fn emit_at(&self, at: Instant, event: impl FnOnce() -> Event) {
        if let Some(listeners) = self.listeners() {
            let record = Arc::new(Record { at, event: event() });
            for collector in &listeners.collectors {
                collector.record(&record);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Wants(Interest);

    impl Collector for Wants {
        fn record(&self, _: &Arc<Record>) {}

        fn interest(&self) -> Interest {
            self.0.clone()
        }
    }

    #[test]
    fn a_probe_asks_for_what_any_of_its_collectors_wants() {
        let heads = |heads: Option<Vec<usize>>| Some(AttentionFilter { layers: Some(vec![1]), heads });
        let first = Interest {
            phases: Some(Duration::from_millis(5)),
            attention: heads(Some(vec![3, 1])),
            lens: Some(LensInterest { tokens: vec![7], top_k: 2 }),
            ..Interest::default()
        };
        let second = Interest {
            phases: Some(Duration::from_millis(2)),
            attention: heads(Some(vec![1, 4])),
            lens: Some(LensInterest { tokens: vec![3, 7], top_k: 1 }),
            kv: Some(Duration::from_millis(7)),
            turns: true,
            ..Interest::default()
        };
        let probe = Probe::to_all(vec![Arc::new(Wants(first)), Arc::new(Wants(second.clone()))]);
        let merged = probe.interest().unwrap();
        assert_eq!(merged.phases, Some(Duration::from_millis(2)));
        assert_eq!(merged.attention, heads(Some(vec![1, 3, 4])));
        assert_eq!(merged.lens, Some(LensInterest { tokens: vec![3, 7], top_k: 2 }));
        assert!(merged.turns && !merged.activations && !merged.synchronise);
        assert_eq!(merged.kv, Some(Duration::from_millis(7)));
        let both =
            Probe::default().and(vec![Arc::new(Wants(second.clone()))]).and(vec![Arc::new(Wants(Interest::default()))]);
        assert_eq!(both.interest(), Some(&second), "adding to a probe takes nothing away");
        let all = second.and(Interest { attention: heads(None), ..Interest::default() });
        assert_eq!(all.attention, heads(None));
    }

    #[test]
    fn nobody_listening_builds_no_event() {
        Probe::default().emit(|| unreachable!("nobody listens"));
        assert!(!Probe::to_all(Vec::new()).is_on());
        let probe = Probe::new(Arc::new(Wants(Interest::default())));
        let clone = probe.clone();
        clone.pause();
        probe.emit(|| unreachable!("paused"));
        assert!(!probe.is_on() && probe.interest().is_none());
        probe.resume();
        assert!(clone.is_on() && clone.interest().is_some());
    }
}
