//! A Chrome trace: what the scheduler, the stages and the requests did, on one clock, for Perfetto (ui.perfetto.dev) and
//! chrome://tracing to draw.
//!
//! The file is a JSON array of trace events, written as they come, so that memory stays bounded. The format makes the
//! closing bracket optional: the trace of a process that was killed opens too. Timestamps are microseconds since the
//! trace was created, with nanoseconds behind the point.
//!
//! | where | what |
//! |---|---|
//! | process `pipeline`, thread `scheduler` | its turns, and within them each token's choice |
//! | process `pipeline`, a thread a stage | each micro-batch, its layers and phases where they are told, and the copy to the next stage; a gap is a bubble |
//! | process `requests` | a request as an async slice: queued, prefill, decode within it, an instant a token |
//! | flows | each micro-batch: from the scheduler's turn through the stages to the tokens that were chosen from it, and the turn in which it came back |
//! | counters | KV positions, running and waiting requests, bytes of each stage |
//!
//! ```
//! use candle_pipeline::instrument::chrome::{ChromeTrace, ChromeTraceOptions};
//! use candle_pipeline::instrument::queue::{QueueOptions, listen};
//! # let folder = tempfile::tempdir().unwrap();
//! # let path = folder.path().join("trace.json");
//! let trace = ChromeTrace::create(ChromeTraceOptions::new(path))?;
//! let (collector, listener) = listen("chrome-trace", trace, QueueOptions::default())?;
//! // ExecutorOptions { probe: Probe::new(collector), .. }; drop the listener after the executor.
//! # Ok::<_, candle_pipeline::Error>(())
//! ```

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::line_file::{Existing, LineFile};
use super::queue::Sink;
use super::{Event, Interest, Lap, ModelFacts, Outcome, Record, StepSlice, WriteFailures, micros};
use crate::error::Result;

/// Process and thread numbers, as an operating system could give them, because viewers take them for that: no thread has
/// the number 0, a process's first thread has the number of the process, and no thread has that of another process.
/// Stages are threads from [`FIRST_STAGE`] on.
const PIPELINE: u64 = 1;
const SCHEDULER: u64 = PIPELINE;
const FIRST_STAGE: u64 = 2;
const REQUESTS: u64 = 1_000_000;

/// What a trace has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChromeTraceOptions {
    /// The file. An earlier trace is replaced; a file that holds anything else is refused and left as it is.
    pub path: PathBuf,
    /// Layers and phases of a step of each stage at most every so long; zero is every step. `None` has none of its own,
    /// only those that another collector asks for.
    pub phases: Option<Duration>,
    /// Wait for the device at the end of each phase, see [`Interest::synchronise`].
    pub synchronise: bool,
}

impl ChromeTraceOptions {
    /// Layers and phases of every step, without waiting for devices.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        ChromeTraceOptions { path: path.into(), phases: Some(Duration::ZERO), synchronise: false }
    }
}

/// Writes events as a trace. A [`Sink`], for one executor.
pub struct ChromeTrace {
    options: ChromeTraceOptions,
    file: LineFile,
    failures: WriteFailures,
    origin: Instant,
    /// What is before the next event: nothing before the first.
    separator: &'static str,
    steps: BTreeMap<u64, Sent>,
    requests: HashMap<u64, Asked>,
    stages: usize,
}

/// A micro-batch in flight.
struct Sent {
    name: &'static str,
    requests: Vec<u64>,
}

/// A request that has not ended.
struct Asked {
    /// The slice that is open within the request's.
    phase: &'static str,
    /// The micro-batch that it was last part of.
    step: Option<u64>,
}

impl ChromeTrace {
    /// Makes the file, which shows here whether it can be written.
    pub fn create(options: ChromeTraceOptions) -> Result<ChromeTrace> {
        let failures = WriteFailures::default();
        let mut file = LineFile::open(&options.path, Existing::Replaced(is_trace), failures.clone())?;
        file.push(b"[");
        let mut trace = ChromeTrace {
            options,
            file,
            failures,
            origin: Instant::now(),
            separator: "",
            steps: BTreeMap::new(),
            requests: HashMap::new(),
            stages: 0,
        };
        trace.name("process_name", PIPELINE, SCHEDULER, "pipeline");
        trace.name("thread_name", PIPELINE, SCHEDULER, "scheduler");
        trace.name("process_name", REQUESTS, REQUESTS, "requests");
        trace.file.flush();
        Ok(trace)
    }

    /// Lines that could not be written, those that dropping the trace writes among them.
    pub fn failures(&self) -> WriteFailures {
        self.failures.clone()
    }

    fn put(&mut self, event: Value) {
        let line = format!("{}{event}", self.separator);
        self.separator = ",";
        self.file.push(line.as_bytes());
    }

    fn name(&mut self, what: &str, pid: u64, tid: u64, name: &str) {
        self.put(json!({ "ph": "M", "name": what, "pid": pid, "tid": tid, "args": { "name": name } }));
    }

    /// Microseconds since the trace was created.
    fn ts(&self, at: Instant) -> f64 {
        micros(at.saturating_duration_since(self.origin))
    }

    /// Something that took time on a thread of the pipeline.
    fn slice(&mut self, slice: Slice<'_>) {
        let Slice { tid, name, category, from, duration, args } = slice;
        let (ts, dur) = (self.ts(from), micros(duration));
        self.put(json!({ "ph": "X", "name": name, "cat": category, "pid": PIPELINE, "tid": tid, "ts": ts, "dur": dur, "args": args }));
    }

    /// A piece of a micro-batch's way, within the slice that is on the thread then.
    fn flow(&mut self, ph: &str, tid: u64, step: u64, at: Instant) {
        let ts = self.ts(at);
        self.put(json!({ "ph": ph, "bp": "e", "name": "micro-batch", "cat": "flow", "id": step, "pid": PIPELINE, "tid": tid, "ts": ts }));
    }

    /// The beginning `b`, the end `e` or an instant `n` of what a request does.
    fn request(&mut self, ph: &str, request: u64, name: &str, at: Instant, args: Value) {
        let ts = self.ts(at);
        self.put(json!({ "ph": ph, "name": name, "cat": "request", "id": request, "pid": REQUESTS, "tid": REQUESTS, "ts": ts, "args": args }));
    }

    fn counter(&mut self, name: &str, at: Instant, args: Value) {
        let ts = self.ts(at);
        self.put(json!({ "ph": "C", "name": name, "pid": PIPELINE, "tid": SCHEDULER, "ts": ts, "args": args }));
    }

    fn model(&mut self, facts: &ModelFacts) {
        self.stages = facts.stages.len();
        for (stage, facts) in facts.stages.iter().enumerate() {
            let last = (facts.first_layer + facts.layers).saturating_sub(1);
            let name = format!("stage {stage}: {}, layers {}-{last}", facts.device, facts.first_layer);
            let tid = FIRST_STAGE + stage as u64;
            self.name("thread_name", PIPELINE, tid, &name);
            self.put(json!({ "ph": "M", "name": "thread_sort_index", "pid": PIPELINE, "tid": tid, "args": { "sort_index": tid } }));
        }
    }

    fn sent(&mut self, at: Instant, step: u64, slices: &[StepSlice]) {
        for slice in slices {
            if let Some(asked) = self.requests.get_mut(&slice.request) {
                asked.step = Some(step);
            }
        }
        self.flow("s", SCHEDULER, step, at);
        let requests = slices.iter().map(|slice| slice.request).collect();
        self.steps.insert(step, Sent { name: StepSlice::kind(slices), requests });
    }

    fn computed(&mut self, at: Instant, told: &Event) {
        let &Event::StageStep { stage, step, rows, queued, wait, compute, copy, bytes } = told else { return };
        let tid = FIRST_STAGE + stage as u64;
        let sent = self.steps.get(&step);
        let (name, requests) = sent.map_or(("step", json!([])), |sent| (sent.name, json!(sent.requests)));
        // The event comes right after the copy.
        let copied_from = at.checked_sub(copy).unwrap_or(at);
        let from = copied_from.checked_sub(compute).unwrap_or(copied_from);
        let (queued_us, wait_us) = (micros(queued), micros(wait));
        let args = json!({ "step": step, "rows": rows, "requests": requests, "queued_us": queued_us, "wait_us": wait_us, "bytes": bytes });
        self.slice(Slice { tid, name, category: "stage", from, duration: compute, args });
        self.flow("t", tid, step, from);
        if stage + 1 < self.stages {
            let args = json!({ "step": step, "bytes": bytes, "to_stage": stage + 1 });
            self.slice(Slice { tid, name: "copy", category: "transfer", from: copied_from, duration: copy, args });
        }
    }

    fn laps(&mut self, stage: usize, step: u64, started: Instant, laps: &[Lap]) {
        let tid = FIRST_STAGE + stage as u64;
        let mut from = started;
        for laps in laps.chunk_by(|a, b| a.layer == b.layer) {
            let duration = laps.iter().map(|lap| lap.duration).sum();
            if let Some(layer) = laps[0].layer {
                let (name, args) = (format!("layer {layer}"), json!({ "step": step, "layer": layer }));
                self.slice(Slice { tid, name: &name, category: "layer", from, duration, args });
            }
            for lap in laps {
                let (name, duration) = (lap.phase.name_on(stage), lap.duration);
                self.slice(Slice { tid, name, category: "phase", from, duration, args: json!({}) });
                from += duration;
            }
        }
    }

    /// A request goes from what it did into `phase`, or to its end.
    fn phase(&mut self, at: Instant, request: u64, phase: Option<&'static str>) {
        let Some(asked) = self.requests.get_mut(&request) else { return };
        let before = std::mem::replace(&mut asked.phase, phase.unwrap_or_default());
        self.request("e", request, before, at, json!({}));
        if let Some(phase) = phase {
            self.request("b", request, phase, at, json!({}));
        }
    }

    fn sampled(&mut self, at: Instant, request: u64, token: u32, index: usize, duration: Duration) {
        let from = at.checked_sub(duration).unwrap_or(at);
        let args = json!({ "request": request, "token": token, "index": index });
        self.slice(Slice { tid: SCHEDULER, name: "sample", category: "token", from, duration, args });
        // The latest micro-batch that the request was part of is the one that its logits came from: the next is composed
        // after this.
        let step = self.requests.get(&request).and_then(|asked| asked.step);
        if let Some(step) = step.filter(|step| self.steps.contains_key(step)) {
            self.flow("t", SCHEDULER, step, from);
        }
        if index == 0 {
            self.phase(at, request, Some("decode"));
        }
        self.request("n", request, "token", at, json!({ "token": token, "index": index }));
    }

    fn finished(&mut self, at: Instant, request: u64, tokens: usize, outcome: Outcome) {
        if !self.requests.contains_key(&request) {
            return;
        }
        self.phase(at, request, None);
        self.requests.remove(&request);
        let mut args = json!({ "tokens": tokens, "outcome": outcome.name() });
        if let Outcome::Error(kind) = outcome {
            args["error"] = kind.into();
        }
        self.request("e", request, "request", at, args);
    }

    fn dropped(&mut self, at: Instant, events: u64) {
        let ts = self.ts(at);
        let args = json!({ "events": events });
        self.put(json!({ "ph": "i", "s": "g", "name": "events dropped", "pid": PIPELINE, "tid": SCHEDULER, "ts": ts, "args": args }));
    }
}

/// Whether a file begins as [`ChromeTrace::create`] begins one: with the name of the first process.
fn is_trace(head: &[u8]) -> bool {
    let head = String::from_utf8_lossy(head);
    head.starts_with('[') && head.contains("\"process_name\"") && head.contains("\"pipeline\"")
}

/// A complete event.
struct Slice<'a> {
    tid: u64,
    name: &'a str,
    category: &'a str,
    from: Instant,
    duration: Duration,
    args: Value,
}

impl Sink for ChromeTrace {
    fn record(&mut self, record: &Record) {
        let at = record.at;
        match &record.event {
            Event::ModelOpened(facts) => self.model(facts),
            Event::RequestQueued { request, submitted, prompt } => {
                self.requests.insert(*request, Asked { phase: "queued", step: None });
                self.request("b", *request, "request", *submitted, json!({ "prompt_tokens": prompt.len() }));
                self.request("b", *request, "queued", *submitted, json!({}));
            }
            Event::RequestStarted { request, .. } => self.phase(at, *request, Some("prefill")),
            Event::PrefixReused { request, tokens } => {
                self.request("n", *request, "prefix reused", at, json!({ "tokens": tokens }));
            }
            Event::RequestFinished { request, tokens, outcome } => self.finished(at, *request, *tokens, *outcome),
            Event::StepSent { step, slices } => self.sent(at, *step, slices),
            Event::StageStep { .. } => self.computed(at, &record.event),
            Event::Phases { stage, step, started, laps } => self.laps(*stage, *step, *started, laps),
            Event::Sampled { request, token, index, duration, .. } => {
                self.sampled(at, *request, *token, *index, *duration);
            }
            Event::StepFinished { step, .. } => {
                self.steps.remove(step);
                self.flow("f", SCHEDULER, *step, at);
            }
            Event::SchedulerTurn { busy } => {
                let from = at.checked_sub(*busy).unwrap_or(at);
                let args = Value::Object(Map::new());
                let (name, category) = ("turn", "scheduler");
                self.slice(Slice { tid: SCHEDULER, name, category, from, duration: *busy, args });
            }
            Event::Kv(kv) => {
                self.counter("KV positions", at, json!({ "reserved": kv.reserved, "valid": kv.valid }));
                self.counter("requests", at, json!({ "running": kv.sequences, "waiting": kv.waiting }));
            }
            Event::StageMemory { stage, weights, kv, scratch } => {
                let name = format!("stage {stage} bytes");
                self.counter(&name, at, json!({ "weights": weights, "kv": kv, "scratch": scratch }));
            }
            Event::Dropped { events } => self.dropped(at, *events),
            _ => {}
        }
    }

    fn idle(&mut self) {
        self.file.flush();
    }

    fn interest(&self) -> Interest {
        let ChromeTraceOptions { phases, synchronise, .. } = self.options;
        let synchronise = synchronise && phases.is_some();
        Interest { phases, synchronise, kv: Some(Duration::ZERO), turns: true, ..Interest::default() }
    }
}

impl Drop for ChromeTrace {
    fn drop(&mut self) {
        self.file.push(b"]");
        self.file.flush();
    }
}
