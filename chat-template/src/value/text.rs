//! Texts and the builder that makes them within the limits.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::limits::{self, Charge};

/// A shared text that counts its memory.
#[derive(Clone, Debug)]
pub(crate) struct Text(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    text: String,
    /// Marked as safe for HTML: what is added to it is escaped.
    markup: bool,
    _charge: Charge,
}

impl Text {
    pub(crate) fn new(text: String) -> Result<Self> {
        limits::check_text(text.len())?;
        let charge = Charge::new(text.capacity().max(32) + 80)?;
        Ok(Self(Arc::new(Inner { text, markup: false, _charge: charge })))
    }

    /// A text of the template or of the caller.
    pub(crate) fn free(text: impl Into<String>) -> Self {
        Self(Arc::new(Inner { text: text.into(), markup: false, _charge: Charge::FREE }))
    }

    /// The same text, marked as safe for HTML: Python's `Markup`.
    pub(crate) fn into_markup(self) -> Result<Self> {
        if self.0.markup {
            return Ok(self);
        }
        let charge = Charge::new(self.len() + 80)?;
        Ok(Self(Arc::new(Inner { text: self.to_string(), markup: true, _charge: charge })))
    }

    pub(crate) fn is_markup(&self) -> bool {
        self.0.markup
    }

    /// The text escaped for HTML and marked as safe. What is marked already stays.
    pub(crate) fn escaped(&self) -> Result<Self> {
        if self.0.markup { Ok(self.clone()) } else { escape(self)?.into_markup() }
    }

    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || (self.len() < 2 && **self == **other)
    }

    /// Number of characters.
    pub(crate) fn chars_len(&self) -> Result<usize> {
        limits::scan(self.len() / 8)?;
        Ok(if self.is_ascii() { self.len() } else { self.chars().count() })
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self)
    }
}

impl Deref for Text {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0.text
    }
}

/// Escapes a text for HTML.
pub(crate) fn escape(text: &str) -> Result<Text> {
    limits::scan(text.len())?;
    let mut out = Builder::new();
    let mut rest = text;
    while let Some(at) = rest.find(['&', '<', '>', '\'', '"']) {
        out.push_str(&rest[..at])?;
        out.push_str(match rest.as_bytes()[at] {
            b'&' => "&amp;",
            b'<' => "&lt;",
            b'>' => "&gt;",
            b'\'' => "&#39;",
            _ => "&#34;",
        })?;
        rest = &rest[at + 1..];
    }
    out.push_str(rest)?;
    out.into_text()
}

/// Puts a text together and checks its size before it grows.
pub(crate) struct Builder {
    out: String,
    charge: Charge,
    limit: usize,
    limit_name: &'static str,
}

impl Default for Builder {
    fn default() -> Self {
        Self::new()
    }
}

impl Builder {
    pub(crate) fn new() -> Self {
        Self { out: String::new(), charge: Charge::FREE, limit: limits::current().text, limit_name: "text" }
    }

    /// For the text that a rendering gives.
    pub(crate) fn output() -> Self {
        Self { limit: limits::current().output, limit_name: "output", ..Self::new() }
    }

    fn reserve(&mut self, more: usize) -> Result<()> {
        let needed = self.out.len().saturating_add(more);
        if needed > self.out.capacity() {
            if needed > self.limit {
                return Err(Error::limit(self.limit_name, self.limit));
            }
            let capacity = needed.max(self.out.capacity().saturating_mul(2).min(self.limit)).max(64);
            self.charge.grow(capacity - self.out.capacity())?;
            self.out.reserve_exact(capacity - self.out.len());
        }
        Ok(())
    }

    pub(crate) fn push_str(&mut self, text: &str) -> Result<()> {
        self.reserve(text.len())?;
        limits::step(text.len() / 256)?;
        self.out.push_str(text);
        Ok(())
    }

    pub(crate) fn push(&mut self, c: char) -> Result<()> {
        self.reserve(c.len_utf8())?;
        self.out.push(c);
        Ok(())
    }

    pub(crate) fn repeat(&mut self, c: char, count: usize) -> Result<()> {
        let bytes = c.len_utf8().saturating_mul(count);
        self.reserve(bytes)?;
        limits::step(bytes / 64)?;
        self.out.extend(std::iter::repeat_n(c, count));
        Ok(())
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.out
    }

    pub(crate) fn into_string(self) -> String {
        self.out
    }

    pub(crate) fn into_text(self) -> Result<Text> {
        let Self { mut out, charge, .. } = self;
        if out.capacity() > 2 * out.len() + 64 {
            out.shrink_to_fit();
        }
        drop(charge);
        Text::new(out)
    }
}
