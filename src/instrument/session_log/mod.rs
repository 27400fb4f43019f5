//! The session log: newline-delimited JSON, one line an event, for people and programs to read afterwards.
//!
//! A **session** is one executor from the opening of its model to its end, with all requests that it serves meanwhile:
//! requests share micro-batches, so a log of one of them alone would tell half of what happened. Every line has the
//! `session_id`; those about one request have its number as `request`. A step's lines have it too when the step has rows
//! of that request only; whose rows are in the others is said by `step_rows` lines.
//!
//! [`SessionLog`] is a [`Sink`] and belongs behind a [`queue`](super::queue), one for each executor:
//!
//! ```
//! use candle_pipeline::instrument::queue::{QueueOptions, listen};
//! use candle_pipeline::instrument::session_log::{SessionLog, SessionLogOptions};
//! # let folder = tempfile::tempdir().unwrap();
//! # let path = folder.path().join("session.jsonl");
//! let log = SessionLog::open(SessionLogOptions::new(path))?;
//! let (collector, listener) = listen("session-log", log, QueueOptions::default())?;
//! // ExecutorOptions { probe: Probe::new(collector), .. }; drop the listener after the executor.
//! # Ok::<_, candle_pipeline::Error>(())
//! ```
//!
//! Whatever ends the process, the file has whole lines, all but those of the last
//! [`interval`](super::queue::QueueOptions::interval). `docs/session-log.md` says what each field means, and
//! `docs/session-log.schema.json` says it to programs.

mod line;

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

pub use line::SCHEMA_VERSION;
use line::{Account, Body, Step, tensors_of};

use super::line_file::{Existing, LineFile};
use super::queue::Sink;
use super::{Event, Interest, Lap, LayerActivations, ModelFacts, Outcome, Record, StepSlice, WriteFailures, micros};
use crate::error::{Error, Result};

/// How often a detailed log has the layers of a step of each stage. All of them would cost more than the rest.
const LAYERS_EVERY: Duration = Duration::from_millis(100);

/// Prompt tokens in a line, and bytes of text as JSON has them, so that lines fit a page of the file.
const TOKENS_IN_LINE: usize = 256;
const TEXT_IN_LINE: usize = 3000;

/// Length of a time in RFC 3339 down to the second, without the zone.
const WHOLE_SECONDS: usize = "2026-01-01T00:00:00".len();

/// The least size at which files change: a model's weights and a few steps.
const LEAST_MAX_BYTES: u64 = 16 * 1024;

/// How much is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum SessionLogLevel {
    /// Sessions, requests and micro-batches.
    Minimal,
    /// Also the weights, tokens, the stages' part of each micro-batch, layers of some, memory.
    #[default]
    Detailed,
    /// Also layers and phases of every micro-batch, statistics of activations, the state of the KV.
    Verbose,
}

impl SessionLogLevel {
    /// As it stands in the log.
    pub fn name(self) -> &'static str {
        match self {
            SessionLogLevel::Minimal => "MINIMAL",
            SessionLogLevel::Detailed => "DETAILED",
            SessionLogLevel::Verbose => "VERBOSE",
        }
    }
}

impl std::fmt::Display for SessionLogLevel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for SessionLogLevel {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let levels = [SessionLogLevel::Minimal, SessionLogLevel::Detailed, SessionLogLevel::Verbose];
        let level = levels.into_iter().find(|level| text.eq_ignore_ascii_case(level.name()));
        level.ok_or_else(|| Error::option("level", format!("`{text}` is not one of MINIMAL, DETAILED, VERBOSE")))
    }
}

/// Gives the text of tokens, if it can.
pub type Detokenise = Arc<dyn Fn(&[u32]) -> Option<String> + Send + Sync>;

/// How a session is logged.
#[derive(Clone)]
pub struct SessionLogOptions {
    /// The file. Sessions are added to the ones in it.
    pub path: PathBuf,
    /// How much is told.
    pub level: SessionLogLevel,
    /// Size at which a new file is begun. `None` lets it grow.
    pub max_bytes: Option<u64>,
    /// Micro-batches that only decode are told at most every so long, but all of them at [`SessionLogLevel::Verbose`];
    /// zero tells all. A model that takes longer for a step has every step in its log; one that takes 0.1 ms would write
    /// 20 MB a second.
    pub steps_every: Duration,
    /// Files that are kept: `path`, and the ones before it as `path.1`, `path.2`, ..., the newest first.
    pub keep: usize,
    /// Adds the text of prompts and outputs. It is called on the log's thread.
    pub detokenise: Option<Detokenise>,
}

impl SessionLogOptions {
    /// A detailed log in one file, without texts.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        let level = SessionLogLevel::default();
        let steps_every = Duration::from_millis(1);
        SessionLogOptions { path: path.into(), level, max_bytes: None, steps_every, keep: 5, detokenise: None }
    }

    fn validate(&self) -> Result<()> {
        if self.keep == 0 {
            return Err(Error::option("keep", "is 0; the file that is written is one, give at least 1"));
        }
        match self.max_bytes {
            Some(bytes) if bytes < LEAST_MAX_BYTES => {
                Err(Error::option("max_bytes", format!("is {bytes}, at least {LEAST_MAX_BYTES} is needed")))
            }
            _ => Ok(()),
        }
    }
}

/// Writes events as lines.
pub struct SessionLog {
    options: SessionLogOptions,
    file: LineFile,
    failures: WriteFailures,
    /// Lost lines that the log reports.
    lost_told: u64,
    /// Set when a new file could not be begun: the old one grows on.
    stuck: bool,
    clock: Clock,
    session: Option<Session>,
    line: Vec<u8>,
}

/// The time of day of an instant. Many lines fall within a second, so the text up to it is kept.
struct Clock {
    instant: Instant,
    time: SystemTime,
    second: u64,
    text: String,
}

impl Clock {
    fn new() -> Clock {
        Clock { instant: Instant::now(), time: SystemTime::now(), second: u64::MAX, text: String::new() }
    }

    fn timestamp(&mut self, at: Instant) -> &str {
        let time = match at.checked_duration_since(self.instant) {
            Some(later) => self.time + later,
            None => self.time - self.instant.duration_since(at),
        };
        let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        if since.as_secs() != self.second {
            self.second = since.as_secs();
            self.text = humantime::format_rfc3339_seconds(time).to_string();
        }
        self.text.truncate(WHOLE_SECONDS);
        // A String takes whatever is written.
        let _ = write!(self.text, ".{:06}Z", since.subsec_micros());
        &self.text
    }
}

/// What is kept of the session under way.
struct Session {
    id: String,
    facts: Arc<ModelFacts>,
    began: Instant,
    /// Files so far, and lines in the current one.
    part: u64,
    lines: u64,
    requests: HashMap<u64, Request>,
    ended: u64,
    /// Those in flight that are told.
    steps: BTreeMap<u64, MicroBatch>,
    /// All steps so far, those that were told, and when the last of these was sent.
    steps_sent: u64,
    steps_told: u64,
    step_told: Option<Instant>,
    /// When the layers of a step of each stage were last told.
    layers_told: HashMap<usize, Instant>,
}

#[derive(Default)]
struct Request {
    submitted: Option<Instant>,
    ttft: Option<Duration>,
    /// What it has generated, for its text.
    output: Vec<u32>,
}

/// A micro-batch in flight.
struct MicroBatch {
    name: &'static str,
    sent: Instant,
    rows: usize,
    /// The request, when there is only one.
    request: Option<u64>,
}

impl MicroBatch {
    fn of(slices: &[StepSlice], sent: Instant) -> MicroBatch {
        let request = if let [slice] = slices { Some(slice.request) } else { None };
        MicroBatch { name: StepSlice::kind(slices), sent, rows: slices.iter().map(|slice| slice.rows).sum(), request }
    }

    fn step(&self, step_id: u64) -> Step<'static> {
        let (rows, request) = (Some(self.rows), self.request);
        Step { step_id, step_name: self.name, step_type: "inference_step", stage: None, layer: None, rows, request }
    }
}

impl SessionLog {
    /// Opens the file, which shows here whether it can be written.
    pub fn open(options: SessionLogOptions) -> Result<SessionLog> {
        options.validate()?;
        let failures = WriteFailures::default();
        let file = LineFile::open(&options.path, Existing::AddedTo(FIRST_LINE), failures.clone())?;
        if options.max_bytes.is_some() && !options.path.is_file() {
            return Err(Error::file(&options.path, "is no regular file, so `max_bytes` cannot be kept; leave it out"));
        }
        let clock = Clock::new();
        let line = Vec::with_capacity(1024);
        Ok(SessionLog { options, file, failures, lost_told: 0, stuck: false, clock, session: None, line })
    }

    /// Lines that could not be written, those that dropping the log writes among them.
    pub fn failures(&self) -> WriteFailures {
        self.failures.clone()
    }

    fn has(&self, level: SessionLogLevel) -> bool {
        self.options.level >= level
    }

    fn put(&mut self, at: Instant, body: &Body<'_>) {
        let Some(session) = &mut self.session else { return };
        body.write(&session.id, self.clock.timestamp(at), &mut self.line);
        let size = self.file.length() + self.line.len() as u64 + 1;
        let full = self.options.max_bytes.is_some_and(|most| size > most);
        // The first line of a session or file goes with those behind it.
        if full && !self.stuck && session.lines > 1 {
            let line = std::mem::take(&mut self.line);
            self.begin_file(at);
            self.line = line;
        }
        self.file.push(&self.line);
        if let Some(session) = &mut self.session {
            session.lines += 1;
        }
    }

    fn begin_session(&mut self, at: Instant, facts: &Arc<ModelFacts>) {
        self.end_session(at);
        self.session = Some(Session {
            id: format!("sess_{:016x}", rand::random::<u64>()),
            facts: facts.clone(),
            began: at,
            part: 0,
            lines: 0,
            requests: HashMap::new(),
            ended: 0,
            steps: BTreeMap::new(),
            steps_sent: 0,
            steps_told: 0,
            step_told: None,
            layers_told: HashMap::new(),
        });
        match self.options.max_bytes.is_some_and(|most| self.file.length() >= most) {
            true => self.begin_file(at),
            false => self.head(at),
        }
        if self.has(SessionLogLevel::Detailed) {
            for tensor in &facts.tensors {
                self.put(at, &Body::TensorLog(tensor));
            }
        }
    }

    /// The line that a session and each of its files begins with.
    fn head(&mut self, at: Instant) {
        let Some(session) = &mut self.session else { return };
        session.part += 1;
        session.lines = 0;
        let (facts, part) = (session.facts.clone(), session.part);
        let mut padding = Vec::new();
        Body::Padding {}.write(&session.id, self.clock.timestamp(at), &mut padding);
        self.file.set_filler(padding);
        self.put(at, &Body::session_start(&facts, self.options.level.name(), part));
    }

    fn end_session(&mut self, at: Instant) {
        let Some(session) = &self.session else { return };
        let duration_us = micros(at.saturating_duration_since(session.began));
        let Session { ended: requests, steps_sent: steps, steps_told, .. } = *session;
        self.put(at, &Body::SessionEnd { requests, steps, steps_told, duration_us });
        self.session = None;
        self.file.flush();
    }

    fn begin_file(&mut self, at: Instant) {
        self.file.flush();
        match shift(&self.options.path, self.options.keep, &self.failures) {
            Ok(file) => {
                self.file = file;
                self.head(at);
            }
            Err(error) => {
                self.stuck = true;
                if self.session.as_ref().is_some_and(|session| session.part == 0) {
                    self.head(at);
                }
                tracing::warn!("the session log goes on beyond `max_bytes`, a new file cannot be begun: {error}");
            }
        }
    }

    fn queued(&mut self, at: Instant, request: u64, submitted: Instant, prompt: &[u32]) {
        if let Some(session) = &mut self.session {
            let known = Request { submitted: Some(submitted), ..Request::default() };
            session.requests.insert(request, known);
        }
        self.put(submitted, &Body::RequestStart { request, prompt_tokens: prompt.len() });
        for (part, tokens) in prompt.chunks(TOKENS_IN_LINE).enumerate() {
            self.put(at, &Body::Prompt { request, first: part * TOKENS_IN_LINE, tokens });
        }
        self.text(at, request, "prompt", prompt);
    }

    /// The text of tokens, in as many lines as it needs.
    fn text(&mut self, at: Instant, request: u64, of: &'static str, tokens: &[u32]) {
        let Some(detokenise) = &self.options.detokenise else { return };
        let Some(text) = detokenise(tokens) else { return };
        for (part, text) in pieces(&text, TEXT_IN_LINE).into_iter().enumerate() {
            self.put(at, &Body::Text { request, of, part, text });
        }
    }

    fn finished(&mut self, at: Instant, request: u64, tokens: usize, outcome: Outcome) {
        let Some(session) = &mut self.session else { return };
        session.ended += 1;
        let known = session.requests.remove(&request).unwrap_or_default();
        if !known.output.is_empty() {
            self.text(at, request, "output", &known.output);
        }
        let duration = known.submitted.map(|submitted| at.saturating_duration_since(submitted));
        self.put(at, &Body::request_end(request, tokens, outcome, known.ttft, duration));
    }

    fn sampled(&mut self, at: Instant, request: u64, token: u32, index: usize, since: Duration, duration: Duration) {
        let texts = self.options.detokenise.is_some();
        if let Some(known) = self.session.as_mut().and_then(|session| session.requests.get_mut(&request)) {
            if index == 0 {
                known.ttft = Some(since);
            }
            if texts {
                known.output.push(token);
            }
        }
        if self.has(SessionLogLevel::Detailed) {
            let (since_us, duration_us) = (micros(since), micros(duration));
            self.put(at, &Body::Token { request, token, index, since_us, duration_us });
        }
    }

    fn sent(&mut self, at: Instant, step_id: u64, slices: &[StepSlice]) {
        let every = if self.has(SessionLogLevel::Verbose) { Duration::ZERO } else { self.options.steps_every };
        let Some(session) = &mut self.session else { return };
        session.steps_sent += 1;
        let due = session.step_told.is_none_or(|told| at.saturating_duration_since(told) >= every);
        if !due && slices.iter().all(|slice| !slice.prefill) {
            return;
        }
        session.steps_told += 1;
        session.step_told = Some(at);
        let micro_batch = MicroBatch::of(slices, at);
        let begin = Body::StepBegin(micro_batch.step(step_id));
        session.steps.insert(step_id, micro_batch);
        self.put(at, &begin);
        for &StepSlice { request, position, rows, prefill } in slices {
            self.put(at, &Body::StepRows { step_id, request, position, rows, prefill });
        }
    }

    /// Whether the step is one of those that are told.
    fn tells(&self, step: u64) -> bool {
        self.session.as_ref().is_some_and(|session| session.steps.contains_key(&step))
    }

    /// The request that a step is of alone.
    fn request_of(&self, step: u64) -> Option<u64> {
        self.session.as_ref()?.steps.get(&step)?.request
    }

    fn layers(&mut self, stage: usize, step_id: u64, started: Instant, laps: &[Lap]) {
        let request = self.request_of(step_id);
        let mut at = started;
        for laps in laps.chunk_by(|a, b| a.layer == b.layer) {
            let duration: Duration = laps.iter().map(|lap| lap.duration).sum();
            if let Some(layer) = laps[0].layer {
                let name = format!("layer_{layer}");
                let step = part(step_id, &name, "transformer_layer", stage, Some(layer), request);
                self.put(at, &Body::StepBegin(step));
                self.phases(stage, step_id, at, laps);
                self.put(at + duration, &Body::step_end(step, duration));
            } else {
                self.phases(stage, step_id, at, laps);
            }
            at += duration;
        }
    }

    fn phases(&mut self, stage: usize, step_id: u64, mut at: Instant, laps: &[Lap]) {
        if !self.has(SessionLogLevel::Verbose) {
            return;
        }
        let request = self.request_of(step_id);
        for lap in laps {
            let step = part(step_id, lap.phase.name_on(stage), "phase", stage, lap.layer, request);
            self.put(at, &Body::StepBegin(step));
            at += lap.duration;
            self.put(at, &Body::step_end(step, lap.duration));
        }
    }

    fn activations(&mut self, at: Instant, stage: usize, step_id: u64, rows: usize, layers: &[LayerActivations]) {
        let request = self.request_of(step_id);
        for layer in layers {
            for (name, stats) in tensors_of(layer).into_iter().filter(|(_, stats)| stats.count > 0) {
                let residual_ratio = (name == "output").then_some(layer.residual_ratio);
                let (layer, stats) = (layer.layer, stats.into());
                self.put(at, &Body::TensorStats { step_id, stage, layer, request, name, rows, stats, residual_ratio });
            }
        }
    }

    /// Whether the layers of a stage's step are told now, whoever else wants them more often.
    fn layers_due(&mut self, stage: usize, at: Instant) -> bool {
        let (Some(interval), Some(session)) = (self.interest().phases, &mut self.session) else { return false };
        let told = session.layers_told.get(&stage);
        let due = told.is_none_or(|told| at.saturating_duration_since(*told) >= interval);
        if due {
            session.layers_told.insert(stage, at);
        }
        due
    }
}

/// A part of a stage's forward pass.
fn part<'a>(
    step_id: u64,
    step_name: &'a str,
    step_type: &'a str,
    stage: usize,
    layer: Option<usize>,
    request: Option<u64>,
) -> Step<'a> {
    Step { step_id, step_name, step_type, stage: Some(stage), layer, rows: None, request }
}

/// What a log begins with, so that no other file is written into.
const FIRST_LINE: &[u8] = br#"{"event":"session_start","#;

/// Renames the files, each to the next number, and begins a new one.
fn shift(path: &Path, keep: usize, failures: &WriteFailures) -> Result<LineFile> {
    let numbered = |n: usize| match n {
        0 => path.to_path_buf(),
        n => {
            let mut name = path.as_os_str().to_owned();
            name.push(format!(".{n}"));
            PathBuf::from(name)
        }
    };
    for n in (0..keep - 1).rev() {
        let (from, to) = (numbered(n), numbered(n + 1));
        if from.exists() {
            std::fs::rename(&from, &to)
                .map_err(|e| Error::file(&from, format!("cannot be renamed to {}: {e}", to.display())))?;
        }
    }
    if keep == 1 {
        std::fs::remove_file(path).map_err(|e| Error::file(path, format!("cannot be removed: {e}")))?;
    }
    LineFile::open(path, Existing::AddedTo(FIRST_LINE), failures.clone())
}

/// Cuts a text where JSON needs at most `most` bytes for a piece.
fn pieces(text: &str, most: usize) -> Vec<&str> {
    let (mut pieces, mut start, mut bytes) = (Vec::new(), 0, 0);
    for (index, c) in text.char_indices() {
        let size = match c {
            '"' | '\\' => 2,
            c if c < ' ' => 6,
            c => c.len_utf8(),
        };
        if bytes + size > most {
            pieces.push(&text[start..index]);
            (start, bytes) = (index, 0);
        }
        bytes += size;
    }
    pieces.push(&text[start..]);
    pieces
}

impl Sink for SessionLog {
    fn record(&mut self, record: &Record) {
        let at = record.at;
        let level = self.options.level;
        match &record.event {
            Event::ModelOpened(facts) => self.begin_session(at, facts),
            Event::RequestQueued { request, submitted, prompt } => self.queued(at, *request, *submitted, prompt),
            Event::RequestStarted { request, queued, .. } => {
                self.put(at, &Body::RequestAdmitted { request: *request, queued_us: micros(*queued) });
            }
            Event::RequestFinished { request, tokens, outcome } => self.finished(at, *request, *tokens, *outcome),
            Event::StepSent { step, slices } => self.sent(at, *step, slices),
            Event::StepFinished { step, outcome } => {
                let sent = self.session.as_mut().and_then(|session| session.steps.remove(step));
                if let Some(sent) = sent {
                    let mut end = Body::step_end(sent.step(*step), at.saturating_duration_since(sent.sent));
                    if let Body::StepEnd { outcome: told, .. } = &mut end {
                        *told = Some(*outcome);
                    }
                    self.put(at, &end);
                }
            }
            Event::Sampled { request, token, index, since, duration } => {
                self.sampled(at, *request, *token, *index, *since, *duration);
            }
            Event::Dropped { events } => self.put(at, &Body::Dropped { reason: "queue_full", count: *events }),
            _ if level < SessionLogLevel::Detailed => {}
            Event::StageStep { step, .. } | Event::Phases { step, .. } | Event::Activations { step, .. }
                if !self.tells(*step) => {}
            Event::PrefixReused { request, tokens } => {
                self.put(at, &Body::PrefixReused { request: *request, tokens: *tokens });
            }
            Event::StageStep { stage, step, rows, queued, wait, compute, copy, bytes } => {
                let (name, request) = (format!("stage_{stage}"), self.request_of(*step));
                let named = Step { rows: Some(*rows), ..part(*step, &name, "stage", *stage, None, request) };
                let duration = *compute + *copy;
                self.put(at.checked_sub(duration).unwrap_or(at), &Body::StepBegin(named));
                let mut end = Body::step_end(named, duration);
                if let Body::StepEnd { account, .. } = &mut end {
                    *account = Some(Account {
                        queued_us: micros(*queued),
                        wait_us: micros(*wait),
                        compute_us: micros(*compute),
                        copy_us: micros(*copy),
                        transfer_bytes: *bytes,
                    });
                }
                self.put(at, &end);
            }
            Event::Phases { stage, step, started, laps } if self.layers_due(*stage, at) => {
                self.layers(*stage, *step, *started, laps);
            }
            Event::StageMemory { stage, weights, kv, scratch } => {
                let (weight_bytes, kv_bytes, scratch_bytes) = (*weights, *kv, *scratch);
                self.put(at, &Body::StageMemory { stage: *stage, weight_bytes, kv_bytes, scratch_bytes });
            }
            _ if level < SessionLogLevel::Verbose => {}
            Event::Activations { stage, step, rows, layers } => self.activations(at, *stage, *step, *rows, layers),
            Event::Kv(state) => self.put(at, &Body::KvState(*state)),
            _ => {}
        }
    }

    fn idle(&mut self) {
        self.file.flush();
        let lost = self.failures.count();
        if lost > self.lost_told {
            self.put(Instant::now(), &Body::Dropped { reason: "write_failed", count: lost - self.lost_told });
            self.file.flush();
            // A lost line that was to report lost lines does not count itself.
            match self.failures.count() - lost {
                0 => self.lost_told = lost,
                telling => self.failures.discount(telling),
            }
        }
    }

    fn interest(&self) -> Interest {
        let verbose = self.has(SessionLogLevel::Verbose);
        Interest {
            phases: match self.options.level {
                SessionLogLevel::Minimal => None,
                SessionLogLevel::Detailed => Some(LAYERS_EVERY),
                SessionLogLevel::Verbose => Some(Duration::ZERO),
            },
            activations: verbose,
            kv: verbose.then_some(Duration::ZERO),
            ..Interest::default()
        }
    }
}

impl Drop for SessionLog {
    fn drop(&mut self) {
        self.end_session(Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_cut_between_characters_into_pieces_that_fit() {
        let text = "a\"\u{1}ü𝄞".repeat(50);
        let pieces = pieces(&text, 20);
        assert_eq!(pieces.concat(), text);
        assert!(pieces.iter().all(|piece| serde_json::to_string(piece).unwrap().len() <= 22), "{pieces:?}");
        assert_eq!(super::pieces("", 20), [""]);
    }

    #[test]
    fn times_of_day_are_written_to_the_microsecond_before_and_after_the_log_began() {
        let mut clock = Clock::new();
        let began = clock.instant;
        for micros in [0, 1, 999_999, 1_000_000, 1_000_001, 59_999_999, 86_400_000_000] {
            let later = Duration::from_micros(micros);
            let expected = humantime::format_rfc3339_micros(clock.time + later).to_string();
            assert_eq!(clock.timestamp(began + later), expected);
        }
        if let Some(before) = began.checked_sub(Duration::from_millis(1)) {
            let expected = humantime::format_rfc3339_micros(clock.time - Duration::from_millis(1)).to_string();
            assert_eq!(clock.timestamp(before), expected);
        }
    }

    #[test]
    fn levels_are_read_in_any_case_and_ordered() {
        assert_eq!("verbose".parse::<SessionLogLevel>().unwrap(), SessionLogLevel::Verbose);
        let refused = "loud".parse::<SessionLogLevel>().unwrap_err().to_string();
        assert!(refused.contains("`loud`") && refused.contains("DETAILED"), "{refused}");
        assert!(SessionLogLevel::Minimal < SessionLogLevel::default());
    }

    #[test]
    fn options_without_meaning_and_paths_that_cannot_be_written_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let refused = |change: fn(&mut SessionLogOptions)| {
            let mut options = SessionLogOptions::new(folder.path().join("log"));
            change(&mut options);
            SessionLog::open(options).err().map(|error| error.to_string()).unwrap_or_default()
        };
        assert!(refused(|options| options.keep = 0).contains("`keep`"));
        assert!(refused(|options| options.max_bytes = Some(10)).contains("`max_bytes`: is 10"));
        assert!(refused(|options| options.path.push("below")).contains("below"));
        assert!(
            refused(|options| {
                options.path.pop();
            })
            .contains("opened for writing")
        );
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_log_that_cannot_be_written_counts_its_lines_and_goes_on() {
        let mut log = SessionLog::open(SessionLogOptions::new("/dev/full")).unwrap();
        let mut record = |event| log.record(&Record { at: Instant::now(), event });
        record(Event::ModelOpened(Arc::default()));
        for request in 0..100 {
            record(Event::RequestFinished { request, tokens: 3, outcome: Outcome::Length });
        }
        (0..5).for_each(|_| log.idle());
        assert_eq!(log.failures().count(), 101, "with the first line, without those that tell of the loss");
        let mut options = SessionLogOptions::new("/dev/full");
        options.max_bytes = Some(1 << 20);
        assert!(SessionLog::open(options).err().unwrap().to_string().contains("no regular file"));
    }
}
