//! The one error type of the crate. Every variant names the thing that is wrong (file, tensor, option, value) and what
//! to do about it, because the person who reads it can change those and nothing else.

use std::path::PathBuf;

/// Result with the crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong, from opening a model to the last token of a stream.
///
/// Cloneable, since one failing stage has to tell every sequence it held.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file of the model is missing, truncated or says something impossible.
    #[error("{path}: {reason}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it (names the field) and what to do.
        reason: String,
    },

    /// A tensor is missing or does not have the shape or type that the config asks for.
    #[error("{path}: tensor `{tensor}`: {reason}", path = path.display())]
    Tensor {
        /// The file that should hold the tensor.
        path: PathBuf,
        /// The tensor's name in that file.
        tensor: String,
        /// What is wrong with it.
        reason: String,
    },

    /// The model uses something that this crate does not implement.
    #[error("unsupported {what} `{value}`: {hint}")]
    Unsupported {
        /// The kind of thing: "architecture", "tensor type", "RoPE type", ...
        what: &'static str,
        /// Its name in the model.
        value: String,
        /// What is supported instead.
        hint: String,
    },

    /// The device is not on this machine. There is no fallback: the caller asked for this one.
    #[error("device `{device}` is not available: {reason}; present here: {present}")]
    DeviceUnavailable {
        /// The device as asked for.
        device: String,
        /// Why it cannot be opened.
        reason: String,
        /// The devices that can be opened, separated by commas.
        present: String,
    },

    /// An option has a value that makes no sense.
    #[error("option `{option}`: {reason}")]
    InvalidOption {
        /// The option's name.
        option: &'static str,
        /// Why its value is refused and which ones are not.
        reason: String,
    },

    /// The stages do not fit the devices' memory.
    #[error("the model does not fit: {0}")]
    DoesNotFit(String),

    /// A prompt without a single token.
    #[error(
        "the prompt is empty: give at least one token (a tokenizer that adds a BOS token makes one from an empty text)"
    )]
    EmptyPrompt,

    /// A prompt token is outside the vocabulary.
    #[error("prompt token {token} at position {position} is outside the vocabulary of {vocab_size} tokens")]
    TokenOutOfRange {
        /// The token id.
        token: u32,
        /// Its index in the prompt.
        position: usize,
        /// Number of rows of the embedding table.
        vocab_size: usize,
    },

    /// The prompt leaves no room for a generated token in the context.
    #[error(
        "the prompt has {prompt_tokens} tokens and the context holds {context_length}: shorten the prompt, or raise `context_length` if the model allows more"
    )]
    PromptTooLong {
        /// Tokens in the prompt.
        prompt_tokens: usize,
        /// Positions in the context, prompt and generated tokens together.
        context_length: usize,
    },

    /// The KV cache of this request can never fit beside the weights.
    #[error(
        "stage {stage} ({device}) would need {needed} bytes of KV cache for {tokens} tokens and has {available}: at most {tokens_that_fit} tokens fit; lower max_tokens, or give the stage fewer layers"
    )]
    KvCacheTooSmall {
        /// Index of the stage.
        stage: usize,
        /// Its device.
        device: String,
        /// Prompt plus generated tokens asked for.
        tokens: usize,
        /// Bytes that they need on this stage.
        needed: u64,
        /// Bytes set aside for KV on this stage.
        available: u64,
        /// The largest request that would be admitted.
        tokens_that_fit: usize,
    },

    /// More requests wait to be admitted than the executor was told to hold.
    #[error(
        "the executor is busy: {waiting} requests wait and `queue_limit` is {limit}; try again later, or raise the limit (None lets any number wait)"
    )]
    Busy {
        /// Requests that wait.
        waiting: usize,
        /// How many may.
        limit: usize,
    },

    /// The model gave a logit that is infinite or NaN, from which no token can be chosen.
    #[error(
        "the model's logit for token {token} is {logit}: a weight is infinite or NaN, or arithmetic overflowed; check the model's files against their checksums, or try another file, `kv_type` or device"
    )]
    LogitsNotFinite {
        /// The first such token's id.
        token: usize,
        /// Its logit.
        logit: f32,
    },

    /// A stage returned an error for a step; the sequences in that step end with this.
    #[error("stage {stage} ({device}) failed: {reason}")]
    StageFailed {
        /// Index of the stage.
        stage: usize,
        /// Its device.
        device: String,
        /// The error it gave.
        reason: String,
    },

    /// A stage thread panicked. The executor is of no use any more; build a new one.
    #[error("stage {stage} ({device}) panicked: {reason}; the executor has stopped, build a new one")]
    StagePanicked {
        /// Index of the stage.
        stage: usize,
        /// Its device.
        device: String,
        /// The panic's message.
        reason: String,
    },

    /// The scheduler's thread panicked, in a collector or in the crate itself. Build a new executor.
    #[error("the scheduler panicked: {reason}; the executor has stopped, build a new one")]
    SchedulerPanicked {
        /// The panic's message.
        reason: String,
    },

    /// The executor has been dropped or has stopped.
    #[error("the executor has stopped: build a new one")]
    Stopped,

    /// Text could not become tokens, or tokens text.
    #[error("tokenizer: {0}")]
    Tokenizer(String),

    /// The model's chat template is missing or does not render.
    #[error("chat template: {0}")]
    ChatTemplate(String),

    /// A model could not be downloaded.
    #[error("model `{model}` could not be downloaded: {reason}")]
    Download {
        /// The hub id.
        model: String,
        /// Why.
        reason: String,
    },

    /// A tensor operation failed.
    #[error("tensor operation: {0}")]
    Tensors(String),
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Error::Tensors(error.to_string())
    }
}

impl Error {
    /// The kind of error in one word, for counting.
    pub fn kind(&self) -> &'static str {
        match self {
            Error::File { .. } => "file",
            Error::Tensor { .. } => "tensor",
            Error::Unsupported { .. } => "unsupported",
            Error::DeviceUnavailable { .. } => "device_unavailable",
            Error::InvalidOption { .. } => "invalid_option",
            Error::DoesNotFit(_) => "does_not_fit",
            Error::EmptyPrompt => "empty_prompt",
            Error::TokenOutOfRange { .. } => "token_out_of_range",
            Error::PromptTooLong { .. } => "prompt_too_long",
            Error::KvCacheTooSmall { .. } => "kv_cache_too_small",
            Error::Busy { .. } => "busy",
            Error::LogitsNotFinite { .. } => "logits_not_finite",
            Error::StageFailed { .. } => "stage_failed",
            Error::StagePanicked { .. } => "stage_panicked",
            Error::SchedulerPanicked { .. } => "scheduler_panicked",
            Error::Stopped => "stopped",
            Error::Tokenizer(_) => "tokenizer",
            Error::ChatTemplate(_) => "chat_template",
            Error::Download { .. } => "download",
            Error::Tensors(_) => "tensors",
        }
    }

    /// An [`Error::File`].
    pub(crate) fn file(path: impl Into<PathBuf>, reason: impl std::fmt::Display) -> Self {
        Error::File { path: path.into(), reason: reason.to_string() }
    }

    /// An [`Error::InvalidOption`].
    pub(crate) fn option(option: &'static str, reason: impl std::fmt::Display) -> Self {
        Error::InvalidOption { option, reason: reason.to_string() }
    }
}

/// The beginning of a text from a file: a damaged file may hold a very long one.
pub(crate) fn shorten(text: &str) -> String {
    const LONGEST: usize = 80;
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_string(),
    }
}
