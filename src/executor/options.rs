//! What an executor is told when it is built, and what a caller can ask of one generation.

use std::time::Duration;

use crate::error::{Error, Result};
use crate::instrument::{Outcome, Probe};
use crate::pipeline::stages::{Progress, WrapBackend};

/// How an executor runs. `Default` suits most uses.
#[derive(Clone)]
pub struct ExecutorOptions {
    /// Prompt positions computed in one step while no stream is running. A larger number is faster, a smaller one lets
    /// other requests in between sooner and cancels sooner.
    pub prefill_chunk: usize,
    /// Rows of a step while streams are running, theirs and those of prompts together (Sarathi-Serve's token budget). A
    /// smaller number keeps the streams flowing, a larger one computes prompts sooner. `None` measures: as many as double
    /// the time of a step without prompts.
    pub token_budget: Option<usize>,
    /// Micro-batches that the running sequences are spread over. `None` is one for each stage, so that each has work.
    pub micro_batches: Option<usize>,
    /// Micro-batches in flight, at most `micro_batches`. `None` is all of them; 1 switches the overlap of stages off, to
    /// see what it gains.
    pub in_flight: Option<usize>,
    /// Sequences that run at once; more requests wait. A larger number raises throughput and inter-token latency.
    pub max_sequences: usize,
    /// Requests that may wait for admission before further ones are refused with [`Error::Busy`]. `None` lets any number
    /// wait. Each prompt of a batch counts.
    pub queue_limit: Option<usize>,
    /// Positions of KV that ended sequences keep in every stage, for requests that begin alike; the least recently used
    /// go first, and all when running requests need the room. 0 reuses nothing, from running sequences neither.
    pub prefix_cache: usize,
    /// Where events go. Off costs nothing.
    pub probe: Probe,
    /// Called as weights load.
    pub progress: Option<Progress>,
    /// Wraps each stage's backend.
    pub wrap_backend: Option<WrapBackend>,
}

impl Default for ExecutorOptions {
    fn default() -> Self {
        ExecutorOptions {
            prefill_chunk: 256,
            token_budget: None,
            micro_batches: None,
            in_flight: None,
            max_sequences: 256,
            queue_limit: None,
            prefix_cache: 8192,
            probe: Probe::default(),
            progress: None,
            wrap_backend: None,
        }
    }
}

impl ExecutorOptions {
    /// Refuses values that have no meaning, naming the option.
    pub fn validate(&self) -> Result<()> {
        let counts = [
            ("prefill_chunk", Some(self.prefill_chunk)),
            ("token_budget", self.token_budget),
            ("micro_batches", self.micro_batches),
            ("in_flight", self.in_flight),
            ("max_sequences", Some(self.max_sequences)),
            ("queue_limit", self.queue_limit),
        ];
        match counts.into_iter().find(|(_, count)| *count == Some(0)) {
            Some((option, _)) => Err(Error::option(option, "is 0, at least 1 is needed")),
            None => Ok(()),
        }
    }
}

/// How tokens are chosen and when to stop. `Default` is greedy, 512 tokens, no penalties.
///
/// The filters apply in this order, as in transformers: penalties, temperature, top-k, top-p, min-p.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationOptions {
    /// Tokens to generate at most. 0 generates nothing.
    pub max_tokens: usize,
    /// 0 is greedy (the most likely token, the lowest id among equals), whatever the filters say. Logits are divided by
    /// it otherwise.
    pub temperature: f32,
    /// Nucleus: the smallest set of most likely tokens whose probabilities add up to at least this. 1 cuts nothing.
    pub top_p: f32,
    /// Only the `k` most likely tokens. `None` and `Some(0)` cut nothing.
    pub top_k: Option<usize>,
    /// Only tokens at least this fraction as likely as the most likely one. 0 cuts nothing.
    pub min_p: f32,
    /// Divides positive logits and multiplies negative ones of every token in prompt and output (CTRL). 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from the logit of each token that was generated. 0 is off.
    pub presence_penalty: f32,
    /// Subtracted from the logit of each generated token once for each time it was. 0 is off.
    pub frequency_penalty: f32,
    /// Seeds the random choice; the same seed and options give the same tokens on any split. `None` takes a random one.
    pub seed: Option<u64>,
    /// Token ids that end the generation, besides the model's own end-of-sequence ids.
    pub stop_tokens: Vec<u32>,
    /// Texts that end the generation. The output text ends before the match. Needs a model with a tokenizer.
    pub stop_strings: Vec<String>,
    /// Report the log-probability of each chosen token and of this many most likely ones beside it.
    pub logprobs: Option<usize>,
    /// Go on past the model's end-of-sequence tokens (for benches).
    pub ignore_eos: bool,
    /// Return the logits of the last prompt position (for checks against other implementations).
    pub prompt_logits: bool,
    /// Time from submission after which the generation ends, wherever it is: with [`FinishReason::Deadline`] and what
    /// there is by then, which is nothing if the request was still waiting. `None` waits as long as it takes.
    pub deadline: Option<Duration>,
    /// Take over the KV of a prompt that begins alike, and leave one's own for others. Off keeps a request's timing from
    /// telling others what it holds.
    pub reuse_prefix: bool,
}

impl Default for GenerationOptions {
    fn default() -> Self {
        Self {
            max_tokens: 512,
            temperature: 0.0,
            top_p: 1.0,
            top_k: None,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: None,
            stop_tokens: Vec::new(),
            stop_strings: Vec::new(),
            logprobs: None,
            ignore_eos: false,
            prompt_logits: false,
            deadline: None,
            reuse_prefix: true,
        }
    }
}

impl GenerationOptions {
    /// The three arguments of the short forms of `infer`.
    pub fn new(max_tokens: usize, temperature: f32, top_p: f32) -> Self {
        Self { max_tokens, temperature, top_p, ..Self::default() }
    }

    /// Refuses values that have no meaning, naming the option.
    pub fn validate(&self) -> Result<()> {
        let finite_at_least_zero = |option, value: f32| {
            if value.is_finite() && value >= 0.0 {
                return Ok(());
            }
            Err(Error::option(option, format!("{value} is not a finite number of at least 0")))
        };
        let finite = |option, value: f32| {
            if value.is_finite() {
                return Ok(());
            }
            Err(Error::option(option, format!("{value} is not a finite number")))
        };
        finite_at_least_zero("temperature", self.temperature)?;
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(Error::option("top_p", format!("{} is not in (0, 1]", self.top_p)));
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return Err(Error::option("min_p", format!("{} is not in [0, 1]", self.min_p)));
        }
        if !(self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0) {
            let value = self.repetition_penalty;
            return Err(Error::option("repetition_penalty", format!("{value} is not a finite number above 0")));
        }
        finite("presence_penalty", self.presence_penalty)?;
        finite("frequency_penalty", self.frequency_penalty)?;
        if self.stop_strings.iter().any(String::is_empty) {
            return Err(Error::option("stop_strings", "an empty text would stop at once"));
        }
        Ok(())
    }
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FinishReason {
    /// An end-of-sequence token, a stop token or a stop string.
    Stop,
    /// `max_tokens` or the end of the context.
    Length,
    /// The caller dropped the stream.
    Cancelled,
    /// The request's deadline passed. What was generated until then is valid.
    Deadline,
}

impl From<FinishReason> for Outcome {
    fn from(reason: FinishReason) -> Outcome {
        match reason {
            FinishReason::Stop => Outcome::Stop,
            FinishReason::Length => Outcome::Length,
            FinishReason::Cancelled => Outcome::Cancelled,
            FinishReason::Deadline => Outcome::Deadline,
        }
    }
}

/// A token's probability among all tokens, before temperature and filters.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct TokenLogprob {
    /// The token that was chosen.
    pub token: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// The most likely tokens with theirs, best first.
    pub top: Vec<(u32, f32)>,
}
