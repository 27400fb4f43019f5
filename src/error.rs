//! The one error type of the crate. Every variant names the thing that is wrong (file, tensor, option, value) and what
//! to do about it, because the person who reads it can change those and nothing else.
//!
//! Names and values in an error often come from a file that nobody vouches for, and reasons from libraries below. `Display`
//! is the one place where they become a message: a line without control characters, of bounded length.

use std::borrow::Cow;
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
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it (names the field) and what to do.
        reason: String,
    },

    /// A tensor is missing or does not have the shape or type that the config asks for.
    Tensor {
        /// The file that should hold the tensor.
        path: PathBuf,
        /// The tensor's name in that file.
        tensor: String,
        /// What is wrong with it.
        reason: String,
    },

    /// The model uses something that this crate does not implement.
    Unsupported {
        /// The kind of thing: "architecture", "tensor type", "RoPE type", ...
        what: &'static str,
        /// Its name in the model.
        value: String,
        /// What is supported instead.
        hint: String,
    },

    /// The device is not on this machine. There is no fallback: the caller asked for this one.
    DeviceUnavailable {
        /// The device as asked for.
        device: String,
        /// Why it cannot be opened.
        reason: String,
        /// The devices that can be opened, separated by commas.
        present: String,
    },

    /// An option has a value that makes no sense.
    InvalidOption {
        /// The option's name.
        option: &'static str,
        /// Why its value is refused and which ones are not.
        reason: String,
    },

    /// The stages do not fit the devices' memory.
    DoesNotFit(String),

    /// A prompt without a single token.
    EmptyPrompt,

    /// A prompt token is outside the vocabulary.
    TokenOutOfRange {
        /// The token id.
        token: u32,
        /// Its index in the prompt.
        position: usize,
        /// Number of rows of the embedding table.
        vocab_size: usize,
    },

    /// The prompt leaves no room for a generated token in the context.
    PromptTooLong {
        /// Tokens in the prompt.
        prompt_tokens: usize,
        /// Positions in the context, prompt and generated tokens together.
        context_length: usize,
    },

    /// The KV cache of this request can never fit beside the weights.
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
    Busy {
        /// Requests that wait.
        waiting: usize,
        /// How many may.
        limit: usize,
    },

    /// The model gave a logit that is infinite or NaN, from which no token can be chosen.
    LogitsNotFinite {
        /// The first such token's id.
        token: usize,
        /// Its logit.
        logit: f32,
    },

    /// A stage returned an error for a step; the sequences in that step end with this.
    StageFailed {
        /// Index of the stage.
        stage: usize,
        /// Its device.
        device: String,
        /// The error it gave.
        reason: String,
    },

    /// A stage thread panicked. The executor is of no use any more; build a new one.
    StagePanicked {
        /// Index of the stage.
        stage: usize,
        /// Its device.
        device: String,
        /// The panic's message.
        reason: String,
    },

    /// The scheduler's thread panicked, in a collector or in the crate itself. Build a new executor.
    SchedulerPanicked {
        /// The panic's message.
        reason: String,
    },

    /// The executor has been dropped or has stopped.
    Stopped,

    /// Text could not become tokens, or tokens text.
    Tokenizer(String),

    /// The model's chat template is missing or does not render.
    ChatTemplate(String),

    /// A model could not be downloaded.
    Download {
        /// The hub id.
        model: String,
        /// Why.
        reason: String,
    },

    /// A tensor operation failed.
    Tensors(String),
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Error::Tensors(library_reason(&error))
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            // The crate's own words and numbers, with a table.
            Error::DoesNotFit(table) => write!(f, "the model does not fit: {table}"),
            other => f.write_str(&one_line(&other.message())),
        }
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

    /// The message, with the texts of files and libraries in it as they are.
    fn message(&self) -> String {
        match self {
            Error::File { path, reason } => format!("{}: {reason}", path.display()),
            Error::Tensor { path, tensor, reason } => {
                format!("{}: tensor `{}`: {reason}", path.display(), shorten(tensor))
            }
            Error::Unsupported { what, value, hint } => format!("unsupported {what} `{value}`: {hint}"),
            Error::DeviceUnavailable { device, reason, present } => {
                format!("device `{device}` is not available: {reason}; present here: {present}")
            }
            Error::InvalidOption { option, reason } => format!("option `{option}`: {reason}"),
            Error::DoesNotFit(reason) => format!("the model does not fit: {reason}"),
            Error::EmptyPrompt => {
                "the prompt is empty: give at least one token (a tokenizer that adds a BOS token makes \
                                   one from an empty text)"
                    .to_string()
            }
            Error::TokenOutOfRange { token, position, vocab_size } => {
                format!("prompt token {token} at position {position} is outside the vocabulary of {vocab_size} tokens")
            }
            Error::PromptTooLong { prompt_tokens, context_length } => format!(
                "the prompt has {prompt_tokens} tokens and the context holds {context_length}: shorten the prompt, or \
                 raise `context_length` if the model allows more"
            ),
            Error::KvCacheTooSmall { stage, device, tokens, needed, available, tokens_that_fit } => format!(
                "stage {stage} ({device}) would need {needed} bytes of KV cache for {tokens} tokens and has \
                 {available}: at most {tokens_that_fit} tokens fit; lower max_tokens, or give the stage fewer layers"
            ),
            Error::Busy { waiting, limit } => format!(
                "the executor is busy: {waiting} requests wait and `queue_limit` is {limit}; try again later, or raise \
                 the limit (None lets any number wait)"
            ),
            Error::LogitsNotFinite { token, logit } => format!(
                "the model's logit for token {token} is {logit}: a weight is infinite or NaN, or arithmetic overflowed; \
                 check the model's files against their checksums, or try another file, `kv_type` or device"
            ),
            Error::StageFailed { stage, device, reason } => format!("stage {stage} ({device}) failed: {reason}"),
            Error::StagePanicked { stage, device, reason } => {
                format!("stage {stage} ({device}) panicked: {reason}; the executor has stopped, build a new one")
            }
            Error::SchedulerPanicked { reason } => {
                format!("the scheduler panicked: {reason}; the executor has stopped, build a new one")
            }
            Error::Stopped => "the executor has stopped: build a new one".to_string(),
            Error::Tokenizer(reason) => format!("tokenizer: {reason}"),
            Error::ChatTemplate(reason) => format!("chat template: {reason}"),
            Error::Download { model, reason } => format!("model `{model}` could not be downloaded: {reason}"),
            Error::Tensors(reason) => format!("tensor operation: {reason}"),
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

/// What a library says, as a single line. Candle's errors carry a backtrace where RUST_BACKTRACE is set.
pub(crate) fn library_reason(error: &impl std::fmt::Display) -> String {
    let text = error.to_string();
    without_backtrace(&text).split('\n').map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(": ")
}

/// The text in front of the first backtrace in it.
fn without_backtrace(text: &str) -> &str {
    let starts = text.match_indices('\n').find(|(at, _)| text[at + 1..].trim_start_matches(' ').starts_with("0: "));
    starts.map_or(text, |(at, _)| &text[..at])
}

/// A message that a terminal shows as one line: backtraces are cut off, control characters escaped, and the middle of a
/// very long text is left out. [`Error`]'s are such lines; those of candle and of other libraries are not.
pub fn one_line(message: &str) -> String {
    const HEAD: usize = 1200;
    const TAIL: usize = 400;
    let message = without_backtrace(message).trim_end();
    let count = message.chars().count();
    let text = if count > HEAD + TAIL {
        let at = |index: usize| message.char_indices().nth(index).map_or(message.len(), |(at, _)| at);
        let (head, tail) = (&message[..at(HEAD)], &message[at(count - TAIL)..]);
        Cow::from(format!("{head}[... {} characters ...]{tail}", count - HEAD - TAIL))
    } else {
        Cow::from(message)
    };
    let mut line = String::with_capacity(text.len());
    for character in text.chars() {
        match is_unprintable(character) {
            true => line.extend(character.escape_default()),
            false => line.push(character),
        }
    }
    line
}

/// Whether a terminal acts on the character, or shows the text around it in another order.
fn is_unprintable(character: char) -> bool {
    character.is_control()
        || matches!(character, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(reason: &str) -> String {
        Error::file("model.gguf", reason).to_string()
    }

    #[test]
    fn control_characters_of_a_file_are_escaped() {
        let name = "a\u{1b}[2J\u{9b}31m\nb\rc\td\u{7f}\u{202e}\0";
        let escaped = "a\\u{1b}[2J\\u{9b}31m\\nb\\rc\\td\\u{7f}\\u{202e}\\u{0}";
        let path = PathBuf::from(name);
        for error in [
            Error::file(&path, name),
            Error::Tensor { path, tensor: name.into(), reason: name.into() },
            Error::Unsupported { what: "architecture", value: name.into(), hint: name.into() },
            Error::option("model", name),
            Error::StageFailed { stage: 0, device: "cpu".into(), reason: name.into() },
            Error::Tokenizer(name.into()),
            Error::ChatTemplate(name.into()),
            Error::Download { model: name.into(), reason: name.into() },
            Error::Tensors(name.into()),
        ] {
            let message = error.to_string();
            assert!(message.contains(escaped) && !message.chars().any(is_unprintable), "{message:?}");
            // A message within a message stays as it is.
            assert!(file(&message).ends_with(&message), "{message}");
        }
        assert_eq!(file("`ä` is no `模型` 🙂\u{301}"), "model.gguf: `ä` is no `模型` 🙂\u{301}");
    }

    #[test]
    fn a_very_long_text_keeps_its_beginning_and_its_end() {
        let message = file(&format!("`{}` is too long: what to do", "ä\u{1b}".repeat(100_000)));
        assert!(message.starts_with("model.gguf: `ä\\u{1b}ä"), "{message}");
        assert!(message.ends_with(" is too long: what to do") && message.contains("characters ...]"), "{message}");
        assert!(message.len() < 12_000, "{}", message.len());
        let tensor = "x".repeat(100_000);
        let message = Error::Tensor { path: "a".into(), tensor, reason: "is missing".into() }.to_string();
        assert!(message.len() < 200 && message.ends_with("is missing"), "{message}");
    }

    #[test]
    fn a_table_of_what_does_not_fit_keeps_its_lines() {
        assert_eq!(Error::DoesNotFit("a\nb".into()).to_string(), "the model does not fit: a\nb");
    }

    #[test]
    fn backtraces_of_libraries_are_cut_off() {
        let captured = || Box::new(std::backtrace::Backtrace::force_capture());
        let inner = candle_core::Error::Msg("bad shape".into());
        let inner = candle_core::Error::WithBacktrace { inner: Box::new(inner), backtrace: captured() };
        let wrapped = inner.context("while loading");
        let error = candle_core::Error::WithBacktrace { inner: Box::new(wrapped), backtrace: captured() };
        let text = error.to_string();
        assert!(text.lines().count() > 4, "{text}");
        assert_eq!(library_reason(&error), "while loading: bad shape");
        assert_eq!(file(&text), "model.gguf: while loading\\nbad shape");
        assert_eq!(Error::from(error).to_string(), "tensor operation: while loading: bad shape");
    }
}
