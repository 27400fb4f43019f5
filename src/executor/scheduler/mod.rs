//! The scheduler thread: admits requests, feeds the stages, samples what comes out, and ends each request exactly once.
//!
//! Policy, in full:
//!
//! - **Admission** is in order of arrival, as soon as every stage has KV for the whole of the next request. KV that is
//!   kept for reuse makes way, least recently used first; nobody is overtaken.
//! - **Continuous batching** (Orca, OSDI 2022): a micro-batch is composed anew each time one has come out. Sequences join
//!   and leave between two micro-batches, never waiting for each other's end.
//! - **Pipelining** (GPipe, 2018): as many micro-batches are in flight as there are stages, and the decode steps are
//!   spread evenly over them, so that each stage has one to work on. What is idle all the same is the bubble, which
//!   every stage accounts for.
//! - **Chunked prefill** (Sarathi-Serve, OSDI 2024): prompts are computed in chunks that share micro-batches with decode
//!   steps. While nothing decodes a chunk is large. Otherwise a token budget bounds it: as many rows as double the time
//!   of a pure decode step, which is measured as it goes; where rows are computed by tiles of sixteen, they fill those.
//!   Decode steps go first; prompts take turns by chunks, so a short one is not stuck behind a long one.
//! - **Prefix reuse**: a prompt that begins like a live or recent sequence starts with a copy of its KV, made in all
//!   stages. Only what every stage has computed is copied, and the last prompt token is always computed, for its logits.
//!   Where decode steps have other bits than prompts, only KV of prompts is.
//!   Where another request is just computing the beginning, a request waits for that, so that a batch of prompts with
//!   one beginning computes it once.
//! - **The end**: stop, length, deadline or cancellation. A micro-batch none of whose sequences is wanted any more is
//!   passed by; a step that fails ends the sequences in it.

mod batch;
pub mod prefix;
mod sequence;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvError, RecvTimeoutError};
use std::time::{Duration, Instant};

use self::batch::{Composition, TokenBudget, compose, decode_rows};
use self::prefix::{PrefixCache, PrefixCounters, Retained, Rotations, SHORTEST_PREFIX, WORTH_WAITING, common_prefix};
use self::sequence::Sequence;
pub use self::sequence::{Finish, GeneratedToken, GenerationEvent, QueuePlace, Request, TextState, capacity};
use super::options::FinishReason;
use crate::backend::{MicroBatch, Prediction, SequenceId, SequenceSlice, Wanted};
use crate::error::Error;
use crate::instrument::{Event, KvState, Outcome, Probe, StepOutcome, StepSlice};
use crate::model::config::SuppressedTokens;
use crate::pipeline::inbox::Outlet;
use crate::pipeline::message::{CancelledSteps, StageMessage, StageReply, StepTimes};
use crate::pipeline::worker::panic_message;

/// What the scheduler hears.
pub enum Message {
    /// A caller wants tokens, of one request or of a batch.
    Submit(Vec<Request>),
    /// A caller has dropped its stream.
    Cancel(SequenceId),
    /// Kept KV is to be freed.
    ClearPrefixes,
    /// From a stage.
    Stage(StageReply),
    /// The last handle is gone.
    Shutdown,
}

/// What the model, the stages and the options allow, for the scheduler's decisions.
pub struct Limits {
    /// Positions of a sequence.
    pub context_length: usize,
    /// Rows of a micro-batch while nothing decodes.
    pub prefill_chunk: usize,
    /// Rows of a micro-batch with decode steps; `None` measures.
    pub token_budget: Option<usize>,
    /// Rows that take as long together as one more of them would.
    pub rows_at_a_time: usize,
    /// Micro-batches that decode steps are spread over.
    pub micro_batches: usize,
    /// How many of them are in flight at once.
    pub in_flight: usize,
    /// Sequences that run at once.
    pub max_sequences: usize,
    /// Positions that every stage has KV for.
    pub kv_positions: usize,
    /// Positions of KV that ended sequences may keep.
    pub prefix_cache: usize,
    /// Whether KV of generated tokens may be shared: it is what a prompt with these tokens would have.
    pub share_generated: bool,
    /// Tokens that end a generation.
    pub eos_token_ids: Vec<u32>,
    /// Tokens that are never generated.
    pub suppressed: Arc<SuppressedTokens>,
    /// LongRoPE changes all rotations when a sequence reaches this length, so its KV is computed anew there.
    pub recompute_at: Option<usize>,
    /// With dynamic NTK, rotations from this length on are different in each sequence.
    pub own_rotations_from: Option<usize>,
}

impl Limits {
    /// Which rotations are computed at this length of a sequence.
    fn rotations(&self, length: usize) -> Rotations {
        let past = |limit: Option<usize>| limit.is_some_and(|limit| length >= limit);
        match (past(self.recompute_at), past(self.own_rotations_from)) {
            (_, true) => Rotations::Own,
            (true, false) => Rotations::Long,
            (false, false) => Rotations::Short,
        }
    }
}

/// A micro-batch in flight.
struct Step {
    slices: Vec<SequenceSlice>,
    decode_rows: usize,
    prefill_rows: usize,
}

/// How the scheduler is reached and how it reaches the stages.
pub struct Ways {
    /// Messages to the scheduler.
    pub inbox: Receiver<Message>,
    /// The way into the first stage. Dropping it ends the stages one after the other.
    pub first_stage: Outlet,
    /// Steps that the stages are to skip.
    pub cancelled: Arc<CancelledSteps>,
}

/// An admitted request whose beginning another one is computing.
struct Follower {
    id: SequenceId,
    leader: SequenceId,
    /// Positions that it waits for.
    len: usize,
}

/// The scheduler's state.
pub struct Scheduler {
    limits: Limits,
    ways: Ways,
    probe: Probe,
    waiting: VecDeque<Request>,
    active: BTreeMap<SequenceId, Sequence>,
    /// Sequences with a decode step to send, in turn.
    decodes: VecDeque<SequenceId>,
    /// Sequences with prompt to send, in turn.
    prefills: VecDeque<SequenceId>,
    followers: Vec<Follower>,
    budget: TokenBudget,
    steps: HashMap<u64, Step>,
    next_step: u64,
    /// Since when there has been work.
    work_since: Instant,
    /// Of waiting and active requests.
    deadlines: BTreeSet<(Instant, SequenceId)>,
    prefixes: PrefixCache,
    prefix_counters: Arc<PrefixCounters>,
    /// Kept sequences that have made way.
    evictions: u64,
    /// Positions that KV is set aside for, until the last stage has freed them.
    kv_used: usize,
    /// Positions of sequences that are ending but not yet freed.
    closing: HashMap<SequenceId, usize>,
    /// When [`Event::Kv`] was last told, and what of it changes with requests.
    kv_told: Option<(Instant, KvHeld)>,
    /// Set when a stage has died: everything fails with it from then on.
    dead: Option<Error>,
    failed: Arc<std::sync::OnceLock<Error>>,
}

/// Positions that are set aside, running and waiting requests, and evictions.
type KvHeld = (usize, usize, usize, u64);

impl Scheduler {
    /// A scheduler with nothing to do. `failed` is set when a stage dies, for the handles to see.
    pub fn new(
        limits: Limits,
        ways: Ways,
        probe: Probe,
        prefix_counters: Arc<PrefixCounters>,
        failed: Arc<std::sync::OnceLock<Error>>,
    ) -> Self {
        Scheduler {
            budget: TokenBudget::new(limits.prefill_chunk, limits.token_budget, limits.rows_at_a_time),
            prefixes: PrefixCache::new(limits.prefix_cache),
            limits,
            ways,
            probe,
            waiting: VecDeque::new(),
            active: BTreeMap::new(),
            decodes: VecDeque::new(),
            prefills: VecDeque::new(),
            followers: Vec::new(),
            steps: HashMap::new(),
            next_step: 0,
            work_since: Instant::now(),
            deadlines: BTreeSet::new(),
            prefix_counters,
            evictions: 0,
            kv_used: 0,
            closing: HashMap::new(),
            kv_told: None,
            dead: None,
            failed,
        }
    }

    /// Serves until told to stop. Runs on the scheduler's thread.
    pub fn run(mut self) {
        let served = catch_unwind(AssertUnwindSafe(|| self.serve()));
        let error = match served {
            Ok(()) => self.dead.clone().unwrap_or(Error::Stopped),
            Err(panic) => {
                // A collector that panicked once is not called again, or nobody would hear of it.
                self.probe = Probe::default();
                Error::SchedulerPanicked { reason: panic_message(&*panic) }
            }
        };
        if !matches!(error, Error::Stopped) {
            let _ = self.failed.set(error.clone());
        }
        self.fail_all(&error);
        // Requests that arrived too late to be heard end as well, with the same cause.
        for message in self.ways.inbox.try_iter() {
            if let Message::Submit(requests) = message {
                self.refuse(requests, &error);
            }
        }
    }

    fn serve(&mut self) {
        while let Ok(message) = self.next_message() {
            let began = self.probe.interest().is_some_and(|interest| interest.turns).then(Instant::now);
            let goes_on = self.turn(message);
            if let Some(began) = began {
                let now = Instant::now();
                self.probe.emit_at(now, || Event::SchedulerTurn { busy: now - began });
            }
            if !goes_on {
                return;
            }
        }
    }

    /// Does all that there is to do after a message, or after a deadline; false means stop.
    fn turn(&mut self, message: Option<Message>) -> bool {
        if !message.is_none_or(|message| self.handle(message)) {
            return false;
        }
        // What has arrived in the meantime is heard before the next micro-batch is composed.
        while let Ok(message) = self.ways.inbox.try_recv() {
            if !self.handle(message) {
                return false;
            }
        }
        self.expire();
        self.release_followers();
        self.admit();
        self.dispatch();
        true
    }

    /// Waits for a message, or with `None` for the next deadline.
    fn next_message(&self) -> std::result::Result<Option<Message>, RecvError> {
        let Some((deadline, _)) = self.deadlines.first() else { return self.ways.inbox.recv().map(Some) };
        match self.ways.inbox.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(message) => Ok(Some(message)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(RecvError),
        }
    }

    /// Nothing can be computed any more.
    fn die(&mut self, error: Error) {
        // The first death is the cause; others follow from it.
        let error = self.dead.get_or_insert(error).clone();
        let _ = self.failed.set(error.clone());
        self.fail_all(&error);
    }

    fn fail_all(&mut self, error: &Error) {
        // A step whose requests were all cancelled has not failed, whatever ends it.
        let outcome = |step| match self.ways.cancelled.contains(step) {
            true => StepOutcome::Unwanted,
            false => StepOutcome::Failed,
        };
        let ended: Vec<_> = self.steps.drain().map(|(number, _)| (number, outcome(number))).collect();
        for (_, sequence) in std::mem::take(&mut self.active) {
            self.emit_finished(&sequence, Outcome::Error(error.kind()));
            let _ = sequence.request.events.send(Err(error.clone()));
        }
        for (step, outcome) in ended {
            self.probe.emit(|| Event::StepFinished { step, outcome });
        }
        let waiting = std::mem::take(&mut self.waiting);
        self.refuse(waiting, error);
        self.decodes.clear();
        self.prefills.clear();
        self.followers.clear();
        self.deadlines.clear();
    }

    /// Takes in one message; false means stop.
    fn handle(&mut self, message: Message) -> bool {
        match message {
            Message::Shutdown => return false,
            Message::Submit(requests) => match &self.dead {
                Some(error) => self.refuse(requests, error),
                None => {
                    for request in &requests {
                        self.probe.emit(|| Event::RequestQueued {
                            request: request.id.0,
                            submitted: request.submitted,
                            prompt: request.prompt.clone(),
                        });
                    }
                    let deadlines = requests.iter().filter_map(|request| Some((request.deadline?, request.id)));
                    self.deadlines.extend(deadlines);
                    self.waiting.extend(requests);
                }
            },
            Message::Cancel(id) => self.end_early(id, FinishReason::Cancelled),
            Message::ClearPrefixes => {
                let all: Vec<_> = std::iter::from_fn(|| self.prefixes.evict(None)).collect();
                self.evictions += all.len() as u64;
                self.release(all);
            }
            Message::Stage(StageReply::Done { step, predictions, slowest }) => self.landed(step, predictions, slowest),
            Message::Stage(StageReply::Closed { id }) => {
                self.kv_used -= self.closing.remove(&id).unwrap_or(0);
            }
            Message::Stage(StageReply::SequenceFailed { id, failure }) => self.fail(id, failure.into_failed()),
            Message::Stage(StageReply::StepFailed { step, failure }) => {
                let error = failure.into_failed();
                self.ways.cancelled.forget(step);
                if let Some(failed) = self.steps.remove(&step) {
                    failed.slices.iter().for_each(|slice| self.fail(slice.id, error.clone()));
                    self.probe.emit(|| Event::StepFinished { step, outcome: StepOutcome::Failed });
                }
            }
            Message::Stage(StageReply::Died { failure }) => {
                let error = failure.into_panicked();
                self.die(error);
            }
        }
        true
    }

    /// A step has left the stages. Some of its sequences may have ended in the meantime.
    fn landed(&mut self, number: u64, predictions: Vec<(SequenceId, Vec<Prediction>)>, slowest: Duration) {
        self.ways.cancelled.forget(number);
        let Some(step) = self.steps.remove(&number) else { return };
        let mut predictions: HashMap<SequenceId, Vec<Prediction>> = predictions.into_iter().collect();
        let mut wanted = false;
        for slice in step.slices {
            // One that still runs kept the step from being passed by, so it has been computed.
            let Some(sequence) = self.active.get_mut(&slice.id) else { continue };
            sequence.computed = slice.position + slice.len;
            wanted = true;
            let wrong = |what: &str| Error::Tensors(format!("the last stage returned {what}"));
            // Of the last row alone: there is no draft to check.
            match (slice.wanted, predictions.remove(&slice.id).and_then(|mut rows| rows.pop())) {
                (Wanted::Nothing, _) => {}
                (Wanted::Logits { .. }, Some(Prediction::Best(_))) => {
                    self.fail(slice.id, wrong("the most likely tokens where all logits were wanted"));
                }
                (_, Some(prediction)) => self.sample(slice.id, &prediction),
                (_, None) => self.fail(slice.id, wrong("no logits")),
            }
        }
        if wanted {
            self.budget.landed(step.decode_rows, step.prefill_rows, slowest);
        }
        let outcome = if wanted { StepOutcome::Computed } else { StepOutcome::Unwanted };
        self.probe.emit(|| Event::StepFinished { step: number, outcome });
        self.tell_kv();
    }

    /// As often as anybody wants to know.
    fn tell_kv(&mut self) {
        let Some(every) = self.probe.interest().and_then(|interest| interest.kv) else { return };
        let now = Instant::now();
        let held = (self.kv_used, self.active.len(), self.waiting.len(), self.evictions);
        let told = self.kv_told.is_some_and(|(at, before)| before == held && now.duration_since(at) < every);
        if !told {
            self.kv_told = Some((now, held));
            self.probe.emit_at(now, || Event::Kv(self.kv_state()));
        }
    }

    fn kv_state(&self) -> KvState {
        let running: usize = self.active.values().map(|sequence| sequence.computed).sum();
        let kept: usize = self.prefixes.entries().map(|entry| entry.tokens.len()).sum();
        let counters = &self.prefix_counters;
        KvState {
            limit: self.limits.kv_positions,
            reserved: self.kv_used,
            valid: running + kept,
            retained: self.prefixes.positions(),
            sequences: self.active.len(),
            waiting: self.waiting.len(),
            evictions: self.evictions,
            lookups: counters.lookups.load(Ordering::Relaxed),
            hits: counters.hits.load(Ordering::Relaxed),
        }
    }

    /// Ends the requests whose time is up.
    fn expire(&mut self) {
        while let Some(&(deadline, id)) = self.deadlines.first()
            && deadline <= Instant::now()
        {
            self.deadlines.pop_first();
            self.end_early(id, FinishReason::Deadline);
        }
    }

    /// Ends a request, waiting or active, that nobody wants to the end.
    fn end_early(&mut self, id: SequenceId, reason: FinishReason) {
        if let Some(index) = self.waiting.iter().position(|request| request.id == id)
            && let Some(request) = self.waiting.remove(index)
        {
            self.forget_deadline(&request);
            self.probe.emit(|| Event::RequestFinished { request: id.0, tokens: 0, outcome: reason.into() });
            request.finish_unadmitted(reason);
        }
        self.finish(id, reason);
    }

    /// Admits waiting requests in order while each stage has KV for the next one.
    fn admit(&mut self) {
        while self.dead.is_none()
            && self.active.len() < self.limits.max_sequences
            && let Some(request) = self.waiting.front()
        {
            let capacity = capacity(request.prompt.len(), request.options.max_tokens, self.limits.context_length);
            if !self.fits(capacity) {
                return;
            }
            let prefix = self.shared_prefix(request);
            let leader = self.leader(request, prefix.map_or(0, |(_, len)| len));
            if !self.make_room(capacity, prefix.map(|(from, _)| from)) {
                return;
            }
            let Some(request) = self.waiting.pop_front() else { return };
            if self.active.is_empty() && self.steps.is_empty() {
                self.work_since = Instant::now();
            }
            self.kv_used += capacity;
            let (id, prompt_tokens) = (request.id, request.prompt.len());
            let queued = request.submitted.elapsed();
            if self.sharable(&request).is_some() {
                self.prefix_counters.lookups.fetch_add(1, Ordering::Relaxed);
            }
            let suppressed = self.limits.suppressed.clone();
            self.active.insert(id, Sequence::new(request, capacity, suppressed));
            self.probe.emit(|| Event::RequestStarted { request: id.0, prompt_tokens, queued });
            match leader {
                Some((leader, len)) => self.followers.push(Follower { id, leader, len }),
                None => self.begin(id),
            }
        }
    }

    /// Opens an admitted request in the stages and lets its prompt be computed, from the end of what it can take over.
    fn begin(&mut self, id: SequenceId) {
        let Some(sequence) = self.active.get(&id) else { return };
        let capacity = sequence.capacity;
        let prefix = self.shared_prefix(&sequence.request);
        if let (Some((from, tokens)), Some(sequence)) = (prefix, self.active.get_mut(&id)) {
            sequence.start_after(tokens);
            self.prefixes.touch(from);
            self.prefix_counters.hits.fetch_add(1, Ordering::Relaxed);
            self.prefix_counters.reused_tokens.fetch_add(tokens as u64, Ordering::Relaxed);
            self.probe.emit(|| Event::PrefixReused { request: id.0, tokens });
        }
        self.prefills.push_back(id);
        self.send(StageMessage::Open { id, capacity, prefix });
    }

    /// Begins those whose leader has computed what they share with it, or has ended.
    fn release_followers(&mut self) {
        let waits = |follower: &mut Follower| {
            self.active.get(&follower.leader).is_some_and(|leader| leader.computed < follower.len)
        };
        let begin: Vec<_> = self.followers.extract_if(.., |follower| !waits(follower)).collect();
        for follower in begin {
            self.begin(follower.id);
        }
    }

    /// The rotations of a request's prompt, if it may share KV with sequences that have the same.
    fn sharable(&self, request: &Request) -> Option<Rotations> {
        let rotations = self.limits.rotations(request.prompt.len());
        let may = self.limits.prefix_cache > 0 && request.options.reuse_prefix && rotations != Rotations::Own;
        may.then_some(rotations)
    }

    /// Running sequences that share their KV, and have these rotations.
    fn sharing(&self, rotations: Rotations) -> impl DoubleEndedIterator<Item = (SequenceId, &Sequence)> {
        let active = self.active.iter().map(|(&id, sequence)| (id, sequence));
        active.filter(move |(_, sequence)| {
            sequence.request.options.reuse_prefix && self.limits.rotations(sequence.kv_length) == rotations
        })
    }

    /// Tokens of a sequence whose KV may be shared.
    fn shared_of<'a>(&self, sequence: &'a Sequence) -> &'a [u32] {
        let most = if self.limits.share_generated { sequence.tokens.len() } else { sequence.request.prompt.len() };
        &sequence.tokens[..sequence.computed.min(most)]
    }

    /// The open sequence that shares the longest prefix with a request, and the length of it.
    fn shared_prefix(&self, request: &Request) -> Option<(SequenceId, usize)> {
        let rotations = self.sharable(request)?;
        let running = self.sharing(rotations).map(|(id, sequence)| (id, self.shared_of(sequence)));
        let retained = self.prefixes.entries().filter(|entry| entry.rotations == rotations);
        running
            .chain(retained.map(|entry| (entry.id, &entry.tokens[..])))
            .map(|(id, tokens)| (id, common_prefix(request.prefix(), tokens)))
            .filter(|(_, shared)| *shared >= SHORTEST_PREFIX)
            .max_by_key(|(_, shared)| *shared)
    }

    /// The sequence whose prompt a request should wait for, and how much of it, when `shared` positions can be had now.
    fn leader(&self, request: &Request, shared: usize) -> Option<(SequenceId, usize)> {
        // From the back, since of those that share the most the first is wanted: the others may wait for it themselves.
        self.sharing(self.sharable(request)?)
            .rev()
            .map(|(id, sequence)| (id, common_prefix(request.prefix(), &sequence.request.prompt), sequence.computed))
            .filter(|(_, len, computed)| computed < len && *len >= shared + WORTH_WAITING)
            .map(|(id, len, _)| (id, len))
            .max_by_key(|(_, len)| *len)
    }

    /// Whether there would be KV for `capacity` positions if nothing were kept and all that is ending were freed. Alone
    /// every request fits (that was checked when it was submitted), so somebody's end makes room.
    fn fits(&self, capacity: usize) -> bool {
        let running: usize = self.active.values().map(|sequence| sequence.capacity).sum();
        running + capacity <= self.limits.kv_positions
    }

    /// Whether there is KV for `capacity` positions now. If not, kept KV is given up, `spared` last; it is there as soon
    /// as the stages have freed it.
    fn make_room(&mut self, capacity: usize, spared: Option<SequenceId>) -> bool {
        let mut used = self.kv_used - self.closing.values().sum::<usize>();
        while used + capacity > self.limits.kv_positions
            && let Some(entry) = self.prefixes.evict(spared)
        {
            used -= entry.capacity;
            self.evictions += 1;
            self.release([entry]);
        }
        self.kv_used + capacity <= self.limits.kv_positions
    }

    /// Sends micro-batches until enough are in flight.
    fn dispatch(&mut self) {
        while self.steps.len() < self.limits.in_flight {
            let decoding = self.active.values().filter(|sequence| sequence.decoding).count();
            let (ready, free) = (self.decodes.len(), self.limits.in_flight - self.steps.len());
            let decode_rows = decode_rows(decoding, self.limits.micro_batches, ready, free);
            let pending = self.prefills.iter().map(|id| self.active[id].pending());
            let prefill_rows = self.budget.prefill_rows(decoding, decode_rows);
            let composition = compose(ready, pending, decode_rows, prefill_rows);
            if composition.is_empty() {
                return;
            }
            self.send_step(&composition);
        }
    }

    fn send_step(&mut self, composition: &Composition) {
        let decodes: Vec<_> = self.decodes.drain(..composition.decodes).map(|id| (id, 1)).collect();
        let prefills: Vec<_> =
            self.prefills.drain(..composition.chunks.len()).zip(composition.chunks.iter().copied()).collect();
        let mut batch = MicroBatch::default();
        let mut told = Vec::new();
        for (id, len) in decodes.into_iter().chain(prefills) {
            let Some(sequence) = self.active.get_mut(&id) else { continue };
            let (position, length) = (sequence.sent, sequence.tokens.len());
            let end = position + len;
            let wanted = if end == length { sequence.wanted() } else { Wanted::Nothing };
            batch.slices.push(SequenceSlice { id, position, len, length, decode: sequence.decoding, wanted });
            batch.tokens.extend_from_slice(&sequence.tokens[position..end]);
            sequence.sent = end;
            sequence.kv_length = length;
            if self.probe.is_on() {
                told.push(StepSlice { request: id.0, position, rows: len, prefill: !sequence.decoding });
            }
            if end < length {
                self.prefills.push_back(id);
            }
        }
        let step = self.next_step;
        self.next_step += 1;
        let in_flight = Step {
            slices: batch.slices.clone(),
            decode_rows: composition.decodes,
            prefill_rows: composition.chunks.iter().sum(),
        };
        self.steps.insert(step, in_flight);
        let sent = Instant::now();
        let times = StepTimes::new(sent.saturating_duration_since(self.work_since));
        // Empty where the probe was resumed just now.
        if !told.is_empty() {
            self.probe.emit_at(sent, || Event::StepSent { step, slices: told });
        }
        self.send_at(StageMessage::Step { step, batch, times, hidden: Vec::new() }, sent);
    }

    fn send(&mut self, message: StageMessage) {
        self.send_at(message, Instant::now());
    }

    fn send_at(&mut self, message: StageMessage, sent: Instant) {
        // Without activations nothing of it can fail but the encoding, and only where messages are bytes.
        if let Err(error) = self.ways.first_stage.send(message, None, sent) {
            self.die(error);
        }
    }

    /// Chooses a sequence's next token and tells its caller; ends it or makes it ready for the next step.
    fn sample(&mut self, id: SequenceId, prediction: &Prediction) {
        let Some(sequence) = self.active.get_mut(&id) else { return };
        let started = Instant::now();
        let reported = match sequence.generated() {
            0 => sequence.report_prefilled(prediction),
            _ => Ok(()),
        };
        let outcome = reported.and_then(|()| sequence.choose(prediction, &self.limits));
        // An error, or a request for no token, chooses none.
        if let Some((index, since)) = sequence.take_chosen()
            && self.probe.is_on()
        {
            // One reading of the clock, so that the choice began when it says.
            let now = Instant::now();
            self.probe.emit_at(now, || Event::Sampled {
                request: id.0,
                token: sequence.tokens[sequence.tokens.len() - 1],
                index,
                since,
                duration: now - started,
            });
        }
        match outcome {
            Err(error) => self.fail(id, error),
            Ok(Some(reason)) => self.finish(id, reason),
            Ok(None) if self.limits.recompute_at == Some(sequence.tokens.len()) => {
                (sequence.sent, sequence.computed, sequence.decoding) = (0, 0, false);
                self.prefills.push_back(id);
                self.send(StageMessage::Truncate { id, length: 0 });
            }
            Ok(None) => {
                sequence.decoding = true;
                self.decodes.push_back(id);
            }
        }
    }

    /// Takes a sequence out; steps that nobody else is in are passed by.
    fn take_out(&mut self, id: SequenceId, outcome: Outcome) -> Option<Sequence> {
        // A collector that panics here leaves the sequence where it will be told so.
        self.emit_finished(self.active.get(&id)?, outcome);
        let sequence = self.active.remove(&id)?;
        self.decodes.retain(|ready| *ready != id);
        self.prefills.retain(|ready| *ready != id);
        self.followers.retain(|follower| follower.id != id);
        self.forget_deadline(&sequence.request);
        for (number, step) in &self.steps {
            if step.slices.iter().all(|slice| !self.active.contains_key(&slice.id)) {
                self.ways.cancelled.cancel(*number);
            }
        }
        Some(sequence)
    }

    /// Frees a sequence's KV once the steps in flight have passed.
    fn close(&mut self, id: SequenceId, capacity: usize) {
        self.closing.insert(id, capacity);
        self.send(StageMessage::Close { id });
    }

    /// Publishes what is kept, and frees what no longer is: in this order, or a reader who sees memory freed would still
    /// be told that it is kept.
    fn release(&mut self, evicted: impl IntoIterator<Item = Retained>) {
        self.prefix_counters.publish(&self.prefixes);
        evicted.into_iter().for_each(|entry| self.close(entry.id, entry.capacity));
    }

    fn fail(&mut self, id: SequenceId, error: Error) {
        if let Some(sequence) = self.take_out(id, Outcome::Error(error.kind())) {
            self.close(id, sequence.capacity);
            let _ = sequence.request.events.send(Err(error));
        }
    }

    /// Ends an active sequence, and keeps its KV if that may be of use.
    fn finish(&mut self, id: SequenceId, reason: FinishReason) {
        let Some(mut sequence) = self.take_out(id, reason.into()) else { return };
        let capacity = sequence.capacity;
        if sequence.request.options.reuse_prefix {
            let tokens = self.shared_of(&sequence).to_vec();
            let rotations = self.limits.rotations(sequence.kv_length);
            let not_kept = self.prefixes.insert(Retained { id, tokens, capacity, rotations });
            self.evictions += not_kept.iter().filter(|evicted| evicted.id != id).count() as u64;
            self.release(not_kept);
        } else {
            self.close(id, capacity);
        }
        sequence.report_finish(reason);
    }

    fn forget_deadline(&mut self, request: &Request) {
        if let Some(deadline) = request.deadline {
            self.deadlines.remove(&(deadline, request.id));
        }
    }

    fn emit_finished(&self, sequence: &Sequence, outcome: Outcome) {
        let request = sequence.request.id.0;
        self.probe.emit(|| Event::RequestFinished { request, tokens: sequence.generated(), outcome });
    }

    /// Ends requests that were not admitted with an error.
    fn refuse(&self, requests: impl IntoIterator<Item = Request>, error: &Error) {
        for request in requests {
            let outcome = Outcome::Error(error.kind());
            self.probe.emit(|| Event::RequestFinished { request: request.id.0, tokens: 0, outcome });
            let _ = request.events.send(Err(error.clone()));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;
    use crate::pipeline::inbox::inbox;

    /// Memory that is seen to be freed must not be said to be kept any more.
    #[test]
    fn what_is_kept_is_published_before_the_rest_is_freed() {
        let limits = Limits {
            context_length: 100,
            prefill_chunk: 100,
            token_budget: None,
            rows_at_a_time: 1,
            micro_batches: 1,
            in_flight: 1,
            max_sequences: 1,
            kv_positions: 100,
            prefix_cache: 100,
            share_generated: true,
            eos_token_ids: Vec::new(),
            suppressed: Arc::default(),
            recompute_at: None,
            own_rotations_from: None,
        };
        // Without room: the scheduler goes on when the stage has taken a message.
        let (first_stage, stage) = inbox(0, None, false);
        let counters = Arc::<PrefixCounters>::default();
        let ways = Ways { inbox: channel().1, first_stage, cancelled: Arc::default() };
        let mut scheduler = Scheduler::new(limits, ways, Probe::default(), counters.clone(), Arc::default());
        for id in 1..=2 {
            let tokens = (id as u32 * 50..).take(30).collect();
            scheduler.prefixes.insert(Retained {
                id: SequenceId(id),
                tokens,
                capacity: 40,
                rotations: Rotations::Short,
            });
        }
        scheduler.prefix_counters.publish(&scheduler.prefixes);
        let kept = || counters.retained_positions.load(Ordering::Relaxed);
        assert_eq!(kept(), 80);
        let clearing = std::thread::spawn(move || scheduler.handle(Message::ClearPrefixes));
        for id in 1..=2 {
            let message = stage.recv().unwrap().open().unwrap().message;
            assert_eq!(message, StageMessage::Close { id: SequenceId(id) });
            assert_eq!(kept(), 0);
        }
        assert!(clearing.join().unwrap());
    }
}
