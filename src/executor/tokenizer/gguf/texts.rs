//! The texts of the tokens, both ways.

use std::collections::HashMap;
use std::sync::Arc;

/// Token texts by id and ids by text.
#[derive(Debug)]
pub(super) struct Texts {
    by_id: Vec<Arc<str>>,
    by_text: HashMap<Arc<str>, u32>,
    /// Tokens of single bytes, spelled `<0x0A>`.
    bytes: Vec<Option<u32>>,
    longest: usize,
}

impl Texts {
    /// Of equal texts the last has the id. An empty text gets a name.
    pub(super) fn new(texts: &[&str]) -> Self {
        let name = |(id, &text): (usize, &&str)| match text {
            "" => format!("[EMPTY_{id}]").into(),
            _ => text.into(),
        };
        let by_id: Vec<Arc<str>> = texts.iter().enumerate().map(name).collect();
        let by_text: HashMap<Arc<str>, u32> = by_id.iter().cloned().zip(0..).collect();
        let bytes = (0..=255u8).map(|byte| by_text.get(format!("<0x{byte:02X}>").as_str()).copied()).collect();
        let longest = by_id.iter().map(|text| text.len()).max().unwrap_or(0);
        Self { by_id, by_text, bytes, longest }
    }

    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &str> {
        self.by_id.iter().map(|text| &**text)
    }

    pub(super) fn text(&self, id: u32) -> Option<&str> {
        self.by_id.get(id as usize).map(|text| &**text)
    }

    pub(super) fn id(&self, text: &str) -> Option<u32> {
        if text.len() > self.longest {
            return None;
        }
        self.by_text.get(text).copied()
    }

    /// The token of a single byte.
    pub(super) fn byte(&self, byte: u8) -> Option<u32> {
        self.bytes[usize::from(byte)]
    }
}
