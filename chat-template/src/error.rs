//! The error of compiling and rendering.

use std::fmt;

/// Result with the crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Why a template does not compile or cannot be rendered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    line: Option<u32>,
}

/// What kind of failure an [`Error`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The template's source is not valid.
    Syntax,
    /// The template called `raise_exception`.
    Raised,
    /// An operation that Python or Jinja refuses.
    Runtime,
    /// A limit of [`Limits`](crate::Limits) was reached.
    Limit,
    /// The engine failed; the template may be fine.
    Internal,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), line: None }
    }

    pub(crate) fn syntax(message: impl Into<String>, line: u32) -> Self {
        Self { kind: ErrorKind::Syntax, message: message.into(), line: Some(line) }
    }

    pub(crate) fn runtime(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Runtime, message)
    }

    /// `name` is the field of [`Limits`](crate::Limits).
    pub(crate) fn limit(name: &str, value: usize) -> Self {
        Self::new(ErrorKind::Limit, format!("limit `{name}` of {value} exceeded"))
    }

    /// Adds the line unless the error has one: the innermost place counts.
    pub(crate) fn at(mut self, line: u32) -> Self {
        self.line.get_or_insert(line);
        self
    }

    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// What is wrong, without the line.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// Line of the template, counted from 1.
    pub fn line(&self) -> Option<u32> {
        self.line
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "line {line}: {}", self.message),
            None => f.write_str(&self.message),
        }
    }
}

impl std::error::Error for Error {}

/// Shortens a text that a message quotes.
pub(crate) fn excerpt(text: &str) -> &str {
    match text.char_indices().nth(80) {
        Some((end, _)) => &text[..end],
        None => text,
    }
}
