//! One request from its admission to its end: its tokens, its text, and what its caller hears.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::mpsc::UnboundedSender;

use super::Limits;
use crate::backend::{Prediction, SequenceId, Wanted};
use crate::error::Result;
use crate::executor::options::{FinishReason, GenerationOptions, TokenLogprob};
use crate::executor::sampler::{Sampler, check_finite};
use crate::executor::tokenizer::{IncrementalDecoder, StopStringMatcher, Tokenizer};
use crate::model::config::SuppressedTokens;

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
    /// When it ends at the latest.
    pub deadline: Option<Instant>,
    /// Given back when it is admitted or ends.
    pub place: Option<QueuePlace>,
}

/// A place among the waiting requests, free again when dropped.
#[derive(Debug)]
pub struct QueuePlace(Arc<AtomicUsize>);

impl QueuePlace {
    /// Takes a place in a queue of at most `limit`; the number of those that wait if there is none.
    pub fn take(waiting: &Arc<AtomicUsize>, limit: Option<usize>) -> std::result::Result<QueuePlace, usize> {
        let more = |count: usize| (count < limit.unwrap_or(usize::MAX)).then_some(count + 1);
        waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more)?;
        Ok(QueuePlace(waiting.clone()))
    }
}

impl Drop for QueuePlace {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Request {
    /// What of the prompt may be taken over. The last token is computed in any case: its logits choose the first one.
    pub fn prefix(&self) -> &[u32] {
        &self.prompt[..self.prompt.len() - 1]
    }

    /// Tells the caller of the end of a request that was never admitted.
    pub fn finish_unadmitted(&self, reason: FinishReason) {
        let finish = Finish {
            reason,
            text: String::new(),
            time_to_first_token: Duration::ZERO,
            total_time: self.submitted.elapsed(),
            reused_tokens: 0,
        };
        let _ = self.events.send(Ok(GenerationEvent::Finished(finish)));
    }
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
    /// Prompt tokens whose KV was taken over from another sequence.
    pub reused_tokens: usize,
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

/// A request that has KV in the stages.
pub struct Sequence {
    /// What was asked for.
    pub request: Request,
    /// Prompt, then generated tokens.
    pub tokens: Vec<u32>,
    /// Positions handed to the stages.
    pub sent: usize,
    /// Positions that every stage has computed.
    pub computed: usize,
    /// Length that the stages were told with the latest step; it settles the rotations of what is computed.
    pub kv_length: usize,
    /// Whether its next step, ready or in flight, is of the one token that was chosen last.
    pub decoding: bool,
    /// Positions that KV is set aside for.
    pub capacity: usize,
    /// Prompt tokens whose KV was taken over.
    pub reused: usize,
    sampler: Sampler,
    text: Option<TextState>,
    first_token: Option<Duration>,
    /// When the last token was chosen; before the first one, when the request was submitted.
    last_token: Instant,
    /// The token chosen last, until it is told of: how many came before it, and the time since the last of those.
    chosen: Option<(usize, Duration)>,
}

impl Sequence {
    /// A sequence of which nothing is computed yet.
    pub fn new(mut request: Request, capacity: usize, suppressed: Arc<SuppressedTokens>) -> Self {
        request.place = None;
        Sequence {
            tokens: request.prompt.clone(),
            sent: 0,
            computed: 0,
            kv_length: request.prompt.len(),
            decoding: false,
            capacity,
            reused: 0,
            sampler: Sampler::new(&request.options, request.seed, &request.prompt).suppressing(suppressed),
            text: request.text.take(),
            first_token: None,
            last_token: request.submitted,
            chosen: None,
            request,
        }
    }

    /// Takes the first `reused` positions as computed.
    pub fn start_after(&mut self, reused: usize) {
        (self.sent, self.computed, self.reused) = (reused, reused, reused);
    }

    /// Positions that are still to be handed to the stages.
    pub fn pending(&self) -> usize {
        self.tokens.len() - self.sent
    }

    /// Tokens generated so far.
    pub fn generated(&self) -> usize {
        self.tokens.len() - self.request.prompt.len()
    }

    /// What is wanted of its last position so far: as little as its next token can be chosen from.
    pub fn wanted(&self) -> Wanted {
        let reported = self.request.options.prompt_logits && self.generated() == 0;
        match self.sampler.enough() {
            Some(k) if !reported => Wanted::Best { rows: 1, k },
            _ => Wanted::Logits { rows: 1 },
        }
    }

    /// Tells the caller that the prompt has been computed. Logits that are handed out are finite.
    pub fn report_prefilled(&self, prediction: &Prediction) -> Result<()> {
        let logits = match prediction {
            Prediction::Logits(logits) if self.request.options.prompt_logits => {
                check_finite(logits)?;
                Some(logits.clone())
            }
            _ => None,
        };
        let _ = self.request.events.send(Ok(GenerationEvent::Prefilled { logits }));
        Ok(())
    }

    /// Samples, tells the caller, and says whether that was the end.
    pub fn choose(&mut self, prediction: &Prediction, limits: &Limits) -> Result<Option<FinishReason>> {
        let options = &self.request.options;
        let generated = self.generated();
        if generated >= options.max_tokens {
            return Ok(Some(FinishReason::Length)); // max_tokens is 0
        }
        let sampled = match prediction {
            Prediction::Logits(logits) => self.sampler.sample(logits)?,
            Prediction::Best(best) => self.sampler.sample_best(best)?,
        };
        self.tokens.push(sampled.token);
        let now = Instant::now();
        self.first_token.get_or_insert(now.saturating_duration_since(self.request.submitted));
        self.chosen = Some((generated, now.saturating_duration_since(self.last_token)));
        self.last_token = now;
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

    /// What is to be told of the token that was chosen last, once.
    pub fn take_chosen(&mut self) -> Option<(usize, Duration)> {
        self.chosen.take()
    }

    /// Tells the caller of the end.
    pub fn report_finish(&mut self, reason: FinishReason) {
        let finish = Finish {
            reason,
            text: self.held_text(),
            time_to_first_token: self.first_token.unwrap_or_default(),
            total_time: self.request.submitted.elapsed(),
            reused_tokens: self.reused,
        };
        let _ = self.request.events.send(Ok(GenerationEvent::Finished(finish)));
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
