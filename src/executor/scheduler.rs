//! The scheduler thread: admits requests, feeds the stages, samples what comes out, and ends each request exactly once.
//!
//! Policy, in full: requests are admitted in order of arrival as soon as every stage has KV for the whole of them; the
//! admitted take turns; a sequence has one step of decode or, in prefill, as many chunks as there are stages in flight;
//! altogether twice as many steps as stages are in flight, so that a stage always has its next step waiting.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender};
use std::time::{Duration, Instant};

use tokio::sync::mpsc::UnboundedSender;

use super::options::{FinishReason, GenerationOptions, TokenLogprob};
use super::sampler::Sampler;
use super::tokenizer::{IncrementalDecoder, StopStringMatcher, Tokenizer};
use crate::backend::{MicroBatch, SequenceId, SequenceSlice};
use crate::error::{Error, Result};
use crate::instrument::{Event, Probe};
use crate::pipeline::worker::{StageMessage, StageReply, panic_message};

/// What the scheduler hears.
pub enum Message {
    /// A caller wants tokens.
    Submit(Box<Request>),
    /// A caller has dropped its stream.
    Cancel(SequenceId),
    /// From a stage.
    Stage(StageReply),
    /// The last handle is gone.
    Shutdown,
}

/// A checked request.
pub struct Request {
    /// Its number and its sequence's.
    pub id: SequenceId,
    /// Token ids, at least one, all within the vocabulary.
    pub prompt: Vec<u32>,
    /// How to choose and when to stop.
    pub options: GenerationOptions,
    /// Seed of the random choice, settled.
    pub seed: u64,
    /// Turns tokens into text where text is wanted.
    pub text: Option<TextState>,
    /// Where the events go.
    pub events: UnboundedSender<Result<GenerationEvent>>,
    /// When it was made.
    pub submitted: Instant,
}

/// What a caller hears of its request.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum GenerationEvent {
    /// The prompt has been computed.
    Prefilled {
        /// Logits of the last prompt position, when they were asked for.
        logits: Option<Vec<f32>>,
    },
    /// A token was chosen.
    Token(GeneratedToken),
    /// The end; nothing comes after it.
    Finished(Finish),
}

/// One generated token.
#[derive(Debug, Clone, PartialEq)]
pub struct GeneratedToken {
    /// Its id.
    pub id: u32,
    /// Text that is certain now; empty while a character is incomplete and when no text was asked for.
    pub text: String,
    /// Its log-probability, when asked for.
    pub logprob: Option<TokenLogprob>,
}

/// How a generation ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Finish {
    /// Why.
    pub reason: FinishReason,
    /// Text that was held back until now.
    pub text: String,
    /// From submission to the first token; zero when none was generated.
    pub time_to_first_token: Duration,
    /// From submission to the end.
    pub total_time: Duration,
}

/// What the model and the stages allow, for the scheduler's decisions.
pub struct Limits {
    /// Positions of a sequence.
    pub context_length: usize,
    /// Rows of a prefill chunk.
    pub prefill_chunk: usize,
    /// For each stage: bytes of KV a position takes and bytes there are.
    pub kv: Vec<(u64, u64)>,
    /// Tokens that end a generation.
    pub eos_token_ids: Vec<u32>,
    /// LongRoPE changes all rotations when a sequence outgrows this length, so its KV is computed anew there.
    pub recompute_at: Option<usize>,
}

/// A request that has KV in the stages.
struct Sequence {
    request: Request,
    /// Prompt, then generated tokens.
    tokens: Vec<u32>,
    /// Positions handed to the stages.
    sent: usize,
    /// Steps of this sequence in flight.
    in_flight: usize,
    /// Positions that KV is set aside for.
    capacity: usize,
    sampler: Sampler,
    text: Option<TextState>,
    /// Tells the stages to pass by what is queued of it.
    cancelled: Arc<AtomicBool>,
    first_token: Option<Duration>,
}

/// Text of a sequence as far as it has come.
pub struct TextState {
    decoder: IncrementalDecoder,
    stops: StopStringMatcher,
}

impl TextState {
    /// For the text that follows `prompt`, up to the first of `stop_strings`.
    pub fn new(tokenizer: &Tokenizer, prompt: &[u32], stop_strings: &[String]) -> Result<Self> {
        Ok(TextState {
            decoder: IncrementalDecoder::continuing(tokenizer, prompt, true)?,
            stops: StopStringMatcher::new(stop_strings),
        })
    }
}

/// The scheduler's state. It owns the way into the first stage; dropping it ends the stages one after the other.
pub struct Scheduler {
    limits: Limits,
    inbox: Receiver<Message>,
    first_stage: SyncSender<StageMessage>,
    probe: Probe,
    waiting: VecDeque<Request>,
    active: BTreeMap<SequenceId, Sequence>,
    /// Sequences with rows to send, in turn.
    ready: VecDeque<SequenceId>,
    /// Sequence of each step in flight, and whether its logits are wanted.
    steps: HashMap<u64, (SequenceId, bool)>,
    next_step: u64,
    /// KV bytes set aside in each stage, until the last stage has freed them.
    kv_used: Vec<u64>,
    /// Positions of sequences that are ending but not yet freed.
    closing: HashMap<SequenceId, usize>,
    /// Set when a stage has died: everything fails with it from then on.
    dead: Option<Error>,
    failed: Arc<std::sync::OnceLock<Error>>,
}

impl Scheduler {
    /// A scheduler with nothing to do. `failed` is set when a stage dies, for the handles to see.
    pub fn new(
        limits: Limits,
        inbox: Receiver<Message>,
        first_stage: SyncSender<StageMessage>,
        probe: Probe,
        failed: Arc<std::sync::OnceLock<Error>>,
    ) -> Self {
        Scheduler {
            kv_used: vec![0; limits.kv.len()],
            limits,
            inbox,
            first_stage,
            probe,
            waiting: VecDeque::new(),
            active: BTreeMap::new(),
            ready: VecDeque::new(),
            steps: HashMap::new(),
            next_step: 0,
            closing: HashMap::new(),
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
        self.fail_all(error.clone());
        // Requests that arrived too late to be heard end as well, with the same cause.
        for message in self.inbox.try_iter() {
            if let Message::Submit(request) = message {
                let _ = request.events.send(Err(error.clone()));
            }
        }
    }

    fn serve(&mut self) {
        while let Ok(message) = self.inbox.recv() {
            if !self.handle(message) {
                break;
            }
            // What has arrived in the meantime is heard before the next step is chosen.
            while let Ok(message) = self.inbox.try_recv() {
                if !self.handle(message) {
                    return;
                }
            }
            self.admit();
            self.dispatch();
        }
    }

    fn fail_all(&mut self, error: Error) {
        for (_, sequence) in std::mem::take(&mut self.active) {
            self.report_finish(&sequence);
            let _ = sequence.request.events.send(Err(error.clone()));
        }
        for request in std::mem::take(&mut self.waiting) {
            let _ = request.events.send(Err(error.clone()));
        }
        self.ready.clear();
    }

    /// Takes in one message; false means stop.
    fn handle(&mut self, message: Message) -> bool {
        match message {
            Message::Shutdown => return false,
            Message::Submit(request) => match &self.dead {
                Some(error) => {
                    let _ = request.events.send(Err(error.clone()));
                }
                None => self.waiting.push_back(*request),
            },
            Message::Cancel(id) => {
                self.waiting.retain(|request| request.id != id);
                if let Some(sequence) = self.close(id) {
                    self.finish(sequence, FinishReason::Cancelled);
                }
            }
            Message::Stage(StageReply::Done { step, mut logits }) => {
                if let Some((id, wanted)) = self.landed(step) {
                    match (wanted, logits.pop()) {
                        (true, Some(logits)) => self.sample(id, logits),
                        (true, None) => self.fail(id, Error::Tensors("the last stage returned no logits".into())),
                        (false, _) => {}
                    }
                }
            }
            Message::Stage(StageReply::Closed { id }) => {
                if let Some(capacity) = self.closing.remove(&id) {
                    for (used, (per_token, _)) in self.kv_used.iter_mut().zip(&self.limits.kv) {
                        *used -= per_token * capacity as u64;
                    }
                }
            }
            Message::Stage(StageReply::OpenFailed { id, error }) => self.fail(id, error),
            Message::Stage(StageReply::StepFailed { step, error }) => {
                if let Some((id, _)) = self.landed(step) {
                    self.fail(id, error);
                }
            }
            Message::Stage(StageReply::Died { error }) => {
                // The first death is the cause; others follow from it.
                let error = self.dead.get_or_insert(error).clone();
                let _ = self.failed.set(error.clone());
                self.fail_all(error);
            }
        }
        true
    }

    /// A step has left the stages. Its sequence may have ended in the meantime.
    fn landed(&mut self, step: u64) -> Option<(SequenceId, bool)> {
        let (id, wanted) = self.steps.remove(&step)?;
        let sequence = self.active.get_mut(&id)?;
        sequence.in_flight -= 1;
        // A prompt that had as many chunks in flight as it may can send its next one.
        if sequence.sent < sequence.tokens.len() && !self.ready.contains(&id) {
            self.ready.push_back(id);
        }
        Some((id, wanted))
    }

    /// Admits waiting requests in order while each stage has KV for the next one.
    fn admit(&mut self) {
        while self.dead.is_none()
            && let Some(request) = self.waiting.front()
        {
            let capacity = capacity(request.prompt.len(), request.options.max_tokens, self.limits.context_length);
            let fits = |(used, (per_token, budget)): (&u64, &(u64, u64))| used + per_token * capacity as u64 <= *budget;
            if !self.kv_used.iter().zip(&self.limits.kv).all(fits) {
                // Alone it would fit (that was checked when it was submitted), so somebody's end makes room.
                return;
            }
            let Some(mut request) = self.waiting.pop_front() else { return };
            for (used, (per_token, _)) in self.kv_used.iter_mut().zip(&self.limits.kv) {
                *used += per_token * capacity as u64;
            }
            let id = request.id;
            self.probe.emit(|| Event::RequestStarted { request: id.0, prompt_tokens: request.prompt.len() });
            let sequence = Sequence {
                tokens: request.prompt.clone(),
                sampler: Sampler::new(&request.options, request.seed, &request.prompt),
                text: request.text.take(),
                request,
                sent: 0,
                in_flight: 0,
                capacity,
                cancelled: Arc::default(),
                first_token: None,
            };
            self.active.insert(id, sequence);
            self.send(StageMessage::Open { id, capacity });
            self.ready.push_back(id);
        }
    }

    /// Sends steps, each sequence in its turn, until enough are in flight.
    fn dispatch(&mut self) {
        let stages = self.limits.kv.len();
        while self.steps.len() < 2 * stages
            && let Some(id) = self.ready.pop_front()
        {
            let Some(sequence) = self.active.get_mut(&id) else { continue };
            if sequence.in_flight >= stages {
                continue; // it comes back when one of its chunks has landed
            }
            let position = sequence.sent;
            let total = sequence.tokens.len();
            let end = total.min(position + self.limits.prefill_chunk);
            let slice = SequenceSlice { id, position, len: end - position, length: total, logits: end == total };
            let batch = MicroBatch { slices: vec![slice], tokens: sequence.tokens[position..end].to_vec() };
            sequence.sent = end;
            sequence.in_flight += 1;
            if end < total {
                self.ready.push_back(id);
            }
            let cancelled = sequence.cancelled.clone();
            let step = self.next_step;
            self.next_step += 1;
            self.steps.insert(step, (id, slice.logits));
            self.send(StageMessage::Step { step, batch, input: None, cancelled });
        }
    }

    fn send(&self, message: StageMessage) {
        // The first stage is gone only when it has died, and then its own message says so.
        let _ = self.first_stage.send(message);
    }

    /// Chooses a sequence's next token and tells its caller; ends it or makes it ready for the next step.
    fn sample(&mut self, id: SequenceId, logits: Vec<f32>) {
        let Some(sequence) = self.active.get_mut(&id) else { return };
        let started = Instant::now();
        if sequence.tokens.len() == sequence.request.prompt.len() {
            let wanted = sequence.request.options.prompt_logits;
            let event = GenerationEvent::Prefilled { logits: wanted.then(|| logits.clone()) };
            let _ = sequence.request.events.send(Ok(event));
        }
        let outcome = sequence.choose(&logits, &self.limits);
        self.probe.emit(|| Event::Sampled { request: id.0, duration: started.elapsed() });
        match outcome {
            Err(error) => self.fail(id, error),
            Ok(None) => {
                if self.limits.recompute_at == Some(sequence.tokens.len()) {
                    sequence.sent = 0;
                }
                self.ready.push_back(id);
            }
            Ok(Some(reason)) => {
                if let Some(sequence) = self.close(id) {
                    self.finish(sequence, reason);
                }
            }
        }
    }

    /// Takes a sequence out and frees its KV once the steps in flight have passed.
    fn close(&mut self, id: SequenceId) -> Option<Sequence> {
        let sequence = self.active.remove(&id)?;
        sequence.cancelled.store(true, Ordering::Relaxed);
        self.closing.insert(id, sequence.capacity);
        self.send(StageMessage::Close { id });
        Some(sequence)
    }

    fn fail(&mut self, id: SequenceId, error: Error) {
        if let Some(sequence) = self.close(id) {
            self.report_finish(&sequence);
            let _ = sequence.request.events.send(Err(error));
        }
    }

    fn finish(&self, mut sequence: Sequence, reason: FinishReason) {
        self.report_finish(&sequence);
        let finish = Finish {
            reason,
            text: sequence.held_text(),
            time_to_first_token: sequence.first_token.unwrap_or_default(),
            total_time: sequence.request.submitted.elapsed(),
        };
        let _ = sequence.request.events.send(Ok(GenerationEvent::Finished(finish)));
    }

    fn report_finish(&self, sequence: &Sequence) {
        self.probe.emit(|| Event::RequestFinished {
            request: sequence.request.id.0,
            tokens: sequence.tokens.len() - sequence.request.prompt.len(),
        });
    }
}

impl Sequence {
    /// Samples, tells the caller, and says whether that was the end.
    fn choose(&mut self, logits: &[f32], limits: &Limits) -> Result<Option<FinishReason>> {
        let options = &self.request.options;
        let generated = self.tokens.len() - self.request.prompt.len();
        if generated >= options.max_tokens {
            return Ok(Some(FinishReason::Length)); // max_tokens is 0
        }
        let sampled = self.sampler.sample(logits)?;
        self.tokens.push(sampled.token);
        self.first_token.get_or_insert_with(|| self.request.submitted.elapsed());
        let is_eos = !options.ignore_eos && limits.eos_token_ids.contains(&sampled.token);
        let mut stopped = is_eos || options.stop_tokens.contains(&sampled.token);
        let mut text = String::new();
        if let Some(state) = &mut self.text {
            let piece = state.decoder.push(sampled.token)?;
            let matched = state.stops.push(&piece);
            text = matched.text;
            if matched.matched.is_some() {
                stopped = true;
                self.text = None; // what was held back belongs to the stop string
            }
        }
        let token = GeneratedToken { id: sampled.token, text, logprob: sampled.logprob };
        let _ = self.request.events.send(Ok(GenerationEvent::Token(token)));
        Ok(if stopped {
            Some(FinishReason::Stop)
        } else if generated + 1 >= options.max_tokens || self.tokens.len() >= limits.context_length {
            Some(FinishReason::Length)
        } else {
            None
        })
    }

    /// The text that was held back, for the end.
    fn held_text(&mut self) -> String {
        let Some(state) = &mut self.text else { return String::new() };
        let tail = state.decoder.finish().unwrap_or_default();
        let matched = state.stops.push(&tail);
        let mut text = matched.text;
        if matched.matched.is_none() {
            text.push_str(&state.stops.finish());
        }
        text
    }
}

/// Positions that a request needs KV for.
pub fn capacity(prompt: usize, max_tokens: usize, context_length: usize) -> usize {
    prompt.saturating_add(max_tokens).min(context_length)
}
