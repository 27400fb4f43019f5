//! What the layers of a model do: statistics of activations and what is wrong with them, where heads look, which token
//! each layer would have chosen, what quantisation costs, and how the KV cache fares.
//!
//! [`trace`] starts a tracer behind a queue and gives the collector that an executor is to tell; a [`ModelTracer`] can
//! also be driven by hand. A forward pass is one step over all its stages: a micro-batch of rows of one or more requests.
//!
//! ```
//! use candle_pipeline::instrument::tracer::{ModelTracer, ModelTracerConfig};
//! use candle_pipeline::instrument::{LayerActivations, TensorStats};
//!
//! let mut tracer = ModelTracer::new(ModelTracerConfig::lightweight())?;
//! let (sound, broken) = (TensorStats::of(&[0.5, -0.5]), TensorStats::of(&[0.5, f32::NAN]));
//! tracer.begin_forward(0, Vec::new());
//! tracer.record_layer(0, LayerActivations {
//!     layer: 3, input: sound, post_norm: sound, post_attention: broken, post_ffn: sound, output: sound,
//!     residual_ratio: 0.4,
//! });
//! let anomaly = tracer.end_forward(0).unwrap();
//! assert_eq!(anomaly.to_string(), "layer 3, post_attention: 1 of 2 values are NaN");
//! assert_eq!(tracer.summary().anomalies_detected, 1);
//! # Ok::<_, candle_pipeline::Error>(())
//! ```
//!
//! # What it keeps
//!
//! [`ModelTracerConfig::max_bytes`] bounds all of it: a sixteenth for the latest states of the KV cache, an eighth for
//! the worst quantisation errors, the rest for the latest forward passes. Older forward passes make way; the figures of
//! [`ModelTracerSummary`] go on counting. Rows of attention weights and logits are never kept, only what was made of
//! them.

pub mod activation;
pub mod attention;
pub mod logit;
pub mod quant_error;
pub mod kv;
mod forward;
mod collect;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Serialize, Serializer};

pub use self::collect::{RunningTracer, TracerHandle, TracerSink, trace};
pub use self::forward::ForwardTrace;

use self::activation::{Anomaly, AnomalyThresholds};
use self::attention::{AttentionRow, AttentionTrace, AttentionTraceConfig};
use self::forward::Forwards;
use self::kv::{KvSession, KvTrace};
use self::logit::LogitTrace;
use self::quant_error::{QuantError, QuantErrors};
use super::{Event, Interest, KvState, LayerActivations, LensInterest, LensLayer, StepOutcome, StepSlice, lens_layers};
use crate::error::{Error, Result};

/// What is traced. `Default` is nothing.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelTracerConfig {
    /// Statistics of each layer's activations, and what is wrong with them.
    pub activations: bool,
    /// Where heads look, of the last row of prompts and of each decode step.
    pub attention: Option<AttentionTraceConfig>,
    /// What each layer would have said, of the same rows: the head's product once more for each layer.
    pub logits: bool,
    /// Tokens to follow through the layers. `None` follows the [`top_k`](Self::top_k) that the last layer finds most
    /// likely.
    pub tracked_tokens: Option<Vec<u32>>,
    /// Most likely tokens that are kept of each layer.
    pub top_k: usize,
    /// Errors of quantised tensors and outputs. They are not events: whoever compares gives them to
    /// [`record_quant_error`](ModelTracer::record_quant_error).
    pub quant_error: bool,
    /// How the KV cache fares.
    pub kv_cache: bool,
    /// From where on activations are suspicious.
    pub thresholds: AnomalyThresholds,
    /// Bytes that all traces together may hold.
    pub max_bytes: usize,
}

/// Less would hold no forward pass of a common model.
const LEAST_BYTES: usize = 64 << 10;

impl Default for ModelTracerConfig {
    fn default() -> Self {
        ModelTracerConfig {
            activations: false,
            attention: None,
            logits: false,
            tracked_tokens: None,
            top_k: 5,
            quant_error: false,
            kv_cache: false,
            thresholds: AnomalyThresholds::default(),
            max_bytes: 64 << 20,
        }
    }
}

impl ModelTracerConfig {
    /// Everything.
    pub fn full() -> Self {
        ModelTracerConfig {
            attention: Some(AttentionTraceConfig::default()),
            logits: true,
            quant_error: true,
            ..ModelTracerConfig::lightweight()
        }
    }

    /// Activations and the KV cache.
    pub fn lightweight() -> Self {
        ModelTracerConfig { activations: true, kv_cache: true, ..ModelTracerConfig::default() }
    }

    /// Whether anything is traced.
    pub fn is_enabled(&self) -> bool {
        self.activations || self.attention.is_some() || self.logits || self.quant_error || self.kv_cache
    }

    /// What the forward pass is asked for. Heads that are filtered out are not computed.
    pub fn interest(&self) -> Interest {
        Interest {
            activations: self.activations,
            attention: self.attention.as_ref().map(AttentionTraceConfig::filter),
            lens: self.logits.then(|| self.lens()),
            kv: self.kv_cache.then_some(Duration::ZERO),
            ..Interest::default()
        }
    }

    fn lens(&self) -> LensInterest {
        LensInterest { tokens: self.tracked_tokens.clone().unwrap_or_default(), top_k: self.top_k }
    }

    /// Refuses values that have no meaning, naming the option.
    pub fn validate(&self) -> Result<()> {
        if self.max_bytes < LEAST_BYTES {
            let reason = format!("is {}, at least {LEAST_BYTES} bytes are needed for a forward pass", self.max_bytes);
            return Err(Error::option("max_bytes", reason));
        }
        if self.logits && self.top_k == 0 {
            return Err(Error::option("top_k", "is 0, at least 1 token of each layer is needed"));
        }
        if self.tracked_tokens.as_ref().is_some_and(Vec::is_empty) {
            return Err(Error::option("tracked_tokens", "lists none; None follows the most likely ones"));
        }
        let AnomalyThresholds { explosion, variance, vanishing } = self.thresholds;
        for (option, value) in [("explosion", explosion), ("variance", variance), ("vanishing", vanishing)] {
            if value.is_nan() || value < 0.0 {
                return Err(Error::option(option, format!("is {value}, expected a number of at least 0")));
            }
        }
        let Some(attention) = &self.attention else { return Ok(()) };
        for (option, share) in [
            ("sink_share", attention.sink_share),
            ("recent_share", attention.recent_share),
            ("uniform_evenness", attention.uniform_evenness),
        ] {
            if !(0.0..=1.0).contains(&share) {
                return Err(Error::option(option, format!("is {share}, expected a part from 0 to 1")));
            }
        }
        Ok(())
    }

    fn kv_bytes(&self) -> usize {
        self.max_bytes / 16
    }

    fn quant_bytes(&self) -> usize {
        self.max_bytes / 8
    }

    fn forward_bytes(&self) -> usize {
        self.max_bytes - self.kv_bytes() - self.quant_bytes()
    }
}

/// Traces the forward passes of one executor.
#[derive(Debug)]
pub struct ModelTracer {
    config: ModelTracerConfig,
    forwards: Forwards,
    kv: KvSession,
    quant: QuantErrors,
    totals: Totals,
    /// Stages that a step goes through; 0 while that is not known.
    stages: usize,
}

/// What is counted whether or not it is kept.
#[derive(Debug, Clone, Default)]
struct Totals {
    forwards: u64,
    anomalies: u64,
    attention: u64,
    logits: u64,
    dropped_events: u64,
    first_anomaly: Option<(u64, Anomaly)>,
}

impl ModelTracer {
    /// A tracer that has found nothing yet.
    pub fn new(config: ModelTracerConfig) -> Result<ModelTracer> {
        config.validate()?;
        Ok(ModelTracer {
            config,
            forwards: Forwards::default(),
            kv: KvSession::default(),
            quant: QuantErrors::default(),
            totals: Totals::default(),
            stages: 0,
        })
    }

    /// What it traces.
    pub fn config(&self) -> &ModelTracerConfig {
        &self.config
    }

    /// A forward pass begins. Several may be under way; one that was not begun begins with the first thing told of it.
    pub fn begin_forward(&mut self, step: u64, slices: Vec<StepSlice>) {
        if !self.config.is_enabled() {
            return;
        }
        for slice in slices {
            self.forwards.push(step, |forward| &mut forward.slices, slice, 0, self.config.forward_bytes());
        }
        self.forwards.at(step, self.config.forward_bytes());
    }

    /// What a layer made of the rows.
    pub fn record_layer(&mut self, step: u64, layer: LayerActivations) {
        if !self.config.activations {
            return;
        }
        let most = self.config.forward_bytes();
        let anomalies = self.config.thresholds.anomalies(&layer);
        self.forwards.push(step, |forward| &mut forward.layers, layer, 0, most);
        if let Some(first) = anomalies.first() {
            let earlier = self.totals.first_anomaly;
            let order = |(step, anomaly): (u64, Anomaly)| (step, anomaly.layer, anomaly.place);
            if earlier.is_none_or(|earlier| order((step, *first)) < order(earlier)) {
                self.totals.first_anomaly = Some((step, *first));
            }
            if let Some(open) = self.forwards.at(step, most)
                && !std::mem::replace(&mut open.anomalous, true)
            {
                self.totals.anomalies += 1;
            }
        }
        for anomaly in anomalies {
            self.forwards.push(step, |forward| &mut forward.anomalies, anomaly, 0, most);
        }
    }

    /// Where a head looked. Heads that the configuration leaves out are passed by: the row may be there for another
    /// collector.
    pub fn record_attention(&mut self, step: u64, row: &AttentionRow) {
        let Some(config) = &self.config.attention else { return };
        let filter = |wanted: &Option<Vec<usize>>, index| wanted.as_ref().is_none_or(|wanted| wanted.contains(&index));
        if !filter(&config.layers, row.layer) || !filter(&config.heads, row.head) {
            return;
        }
        let trace = AttentionTrace::of(row, config);
        let inner = trace.bytes() - size_of::<AttentionTrace>();
        self.totals.attention += 1;
        self.forwards.push(step, |forward| &mut forward.attention, trace, inner, self.config.forward_bytes());
    }

    /// What each layer would have said at a row, from all logits of each: (layer, logits) in order.
    pub fn record_logits(&mut self, step: u64, request: u64, position: usize, logits: &[(usize, Vec<f32>)]) {
        if self.config.logits {
            self.record_lens(step, request, position, &lens_layers(&self.config.lens(), logits));
        }
    }

    /// The same where the most likely and the followed tokens are picked out already. Those that the configuration does
    /// not name are left out.
    pub fn record_lens(&mut self, step: u64, request: u64, position: usize, layers: &[LensLayer]) {
        if !self.config.logits {
            return;
        }
        let named = self.config.tracked_tokens.as_ref();
        let kept = |layer: &LensLayer| {
            let wanted = |token: u32| named.is_none_or(|named| named.contains(&token));
            let tracked: Vec<_> = layer.tracked.iter().filter(|tracked| wanted(tracked.token)).copied().collect();
            let top = layer.top[..self.config.top_k.min(layer.top.len())].to_vec();
            LensLayer { layer: layer.layer, top, tracked }
        };
        let mut trace = LogitTrace::new(request, position, layers.iter().map(kept).collect());
        trace.decisive.shrink_to_fit();
        let inner = trace.bytes() - size_of::<LogitTrace>();
        self.totals.logits += 1;
        self.forwards.push(step, |forward| &mut forward.logits, trace, inner, self.config.forward_bytes());
    }

    /// A request's token was chosen from the logits that were last traced of it, in a step that is not over.
    pub fn record_chosen(&mut self, request: u64, token: u32) {
        let mut open = self.forwards.open_logits().filter(|trace| trace.request == request && trace.chosen.is_none());
        if let Some(trace) = open.next() {
            trace.chosen = Some(token);
        }
    }

    /// How the KV cache stands after a step.
    pub fn record_kv(&mut self, state: &KvState) -> Option<KvTrace> {
        self.config.kv_cache.then(|| self.kv.add(state, self.config.kv_bytes()))
    }

    /// How far a quantised tensor or output is from what it stands for.
    pub fn record_quant_error(&mut self, error: QuantError) {
        if self.config.quant_error {
            self.quant.add(error, self.config.quant_bytes());
        }
    }

    /// A forward pass has gone through all stages. The first thing that was wrong in it, if anything.
    pub fn end_forward(&mut self, step: u64) -> Option<Anomaly> {
        self.end(step, true)
    }

    fn end(&mut self, step: u64, complete: bool) -> Option<Anomaly> {
        let forward = self.forwards.end(step, complete)?;
        self.totals.forwards += u64::from(complete);
        forward.anomalies.first().copied()
    }

    /// Takes in an event of an executor.
    pub fn hear(&mut self, event: &Event) {
        match event {
            Event::ModelOpened(facts) => {
                // A new executor numbers its steps from the beginning.
                let unfinished: Vec<u64> = self.forwards.open().collect();
                unfinished.into_iter().for_each(|step| _ = self.end(step, false));
                self.stages = facts.stages.len();
                self.kv.open(facts.stages.iter().map(|stage| stage.kv_bytes_per_position).sum());
            }
            Event::StepSent { step, slices } => self.begin_forward(*step, slices.clone()),
            Event::Activations { step, layers, .. } => {
                layers.iter().for_each(|layer| self.record_layer(*step, *layer));
            }
            Event::Attention { request, step, layer, head, position, first, weights } => {
                let (request, layer, head, position, first) = (*request, *layer, *head, *position, *first);
                self.record_attention(*step, &AttentionRow { request, layer, head, position, first, weights });
            }
            Event::Lens { request, step, position, layers } => self.record_lens(*step, *request, *position, layers),
            Event::StageStep { step, .. } if self.config.is_enabled() => {
                if let Some(open) = self.forwards.at(*step, self.config.forward_bytes()) {
                    open.stages += 1;
                }
            }
            Event::Sampled { request, token, .. } => self.record_chosen(*request, *token),
            Event::StepFinished { step, outcome } => {
                let failed = *outcome == StepOutcome::Failed;
                let computed = self.forwards.stages(*step) >= self.stages.max(1);
                self.end(*step, computed && !failed);
            }
            Event::Kv(state) => _ = self.record_kv(state),
            Event::Dropped { events } => self.totals.dropped_events += events,
            _ => {}
        }
    }

    /// The figures.
    pub fn summary(&self) -> ModelTracerSummary {
        ModelTracerSummary {
            total_forwards: self.totals.forwards,
            anomalies_detected: self.totals.anomalies,
            attention_traces: self.totals.attention,
            logit_traces: self.totals.logits,
            kv_steps: self.kv.steps,
            total_evictions: self.kv.evictions,
            avg_hit_rate: self.kv.hit_rate(),
            quant_warnings: self.quant.warnings,
            quant_criticals: self.quant.criticals,
        }
    }

    /// What it has found. Forward passes that are under way are not in it.
    pub fn snapshot(&self) -> TracerSnapshot {
        TracerSnapshot {
            summary: self.summary(),
            first_anomaly: self.totals.first_anomaly.map(|(step, anomaly)| FirstAnomaly { step, anomaly }),
            forwards: self.forwards.ended().cloned().collect(),
            kv: self.kv.recent().iter().copied().collect(),
            quant_errors: self.quant.kept().to_vec(),
            held_bytes: self.held_bytes(),
            evicted_forwards: self.forwards.evicted,
            refused_traces: self.forwards.refused,
            dropped_events: self.totals.dropped_events,
        }
    }

    /// Bytes of all that is kept; never more than [`ModelTracerConfig::max_bytes`].
    pub fn held_bytes(&self) -> usize {
        self.forwards.bytes() + self.kv.bytes() + self.quant.bytes()
    }

    /// Forgets all traces and figures.
    pub fn clear(&mut self) {
        self.forwards.clear();
        self.kv.clear();
        self.quant = QuantErrors::default();
        self.totals = Totals::default();
    }
}

/// What a tracer has found at some moment.
#[derive(Debug, Clone, Serialize)]
pub struct TracerSnapshot {
    /// The figures.
    pub summary: ModelTracerSummary,
    /// The first thing that was wrong, of the earliest step: what is wrong behind it often follows from it.
    pub first_anomaly: Option<FirstAnomaly>,
    /// The latest forward passes, oldest first.
    #[serde(serialize_with = "serialize_forwards")]
    pub forwards: Vec<Arc<ForwardTrace>>,
    /// The latest states of the KV cache, oldest first.
    pub kv: Vec<KvTrace>,
    /// The worst quantisation errors, worst first.
    pub quant_errors: Vec<QuantError>,
    /// Bytes that the tracer holds.
    pub held_bytes: usize,
    /// Forward passes that made way for later ones.
    pub evicted_forwards: u64,
    /// Traces of forward passes that there was no room for.
    pub refused_traces: u64,
    /// Events that the queue before the tracer did not take: what they told is missing.
    pub dropped_events: u64,
}

/// The first thing that was wrong.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct FirstAnomaly {
    /// Number of the step.
    pub step: u64,
    /// What, and where.
    #[serde(flatten)]
    pub anomaly: Anomaly,
}

fn serialize_forwards<S: Serializer>(
    forwards: &[Arc<ForwardTrace>],
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_seq(forwards.iter().map(|forward| &**forward))
}

/// The figures of a tracer, which go on counting when traces make way.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct ModelTracerSummary {
    /// Forward passes that went through all stages.
    pub total_forwards: u64,
    /// Forward passes in which something was wrong.
    pub anomalies_detected: u64,
    /// Rows of heads that were traced.
    pub attention_traces: u64,
    /// Rows whose logits were traced.
    pub logit_traces: u64,
    /// Steps after which the KV cache was looked at.
    pub kv_steps: u64,
    /// Kept sequences whose KV made way.
    pub total_evictions: u64,
    /// Requests that took over a prefix, of those that might have; 0 before there was one.
    pub avg_hit_rate: f64,
    /// Quantisation errors of class warning.
    pub quant_warnings: u64,
    /// Quantisation errors of class critical.
    pub quant_criticals: u64,
}

impl fmt::Display for ModelTracerSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "forward passes         {:>10}", self.total_forwards)?;
        writeln!(f, "  with anomalies       {:>10}", self.anomalies_detected)?;
        writeln!(f, "attention traces       {:>10}", self.attention_traces)?;
        writeln!(f, "logit traces           {:>10}", self.logit_traces)?;
        writeln!(f, "KV steps               {:>10}", self.kv_steps)?;
        writeln!(f, "  evictions            {:>10}", self.total_evictions)?;
        writeln!(f, "  prefix hit rate      {:>8.1} %", 100.0 * self.avg_hit_rate)?;
        writeln!(f, "quantisation warnings  {:>10}", self.quant_warnings)?;
        write!(f, "  criticals            {:>10}", self.quant_criticals)
    }
}

#[cfg(test)]
mod tests;
