//! RWKV's tokenizer: the longest token that fits, from left to right. Tokens are bytes, spelled with escapes.

use super::prefixes::Prefixes;
use super::texts::Texts;
use crate::error::{Error, Result};

/// The encoder of "rwkv".
#[derive(Debug)]
pub(super) struct Rwkv {
    tokens: Prefixes,
    unknown: Option<u32>,
}

impl Rwkv {
    pub(super) fn new(texts: &Texts, unknown: Option<u32>) -> Self {
        Self { tokens: Prefixes::new(texts.iter().map(|text| unescaped(text).into()).zip(0..)), unknown }
    }

    pub(super) fn encode(&self, text: &str, ids: &mut Vec<u32>) -> Result<()> {
        let mut rest = text.as_bytes();
        while let Some(byte) = rest.first() {
            let longest = self.tokens.longest(rest).or(self.unknown.map(|unknown| (1, unknown)));
            let (length, id) = longest
                .ok_or_else(|| Error::Tokenizer(format!("the vocabulary has no token for the byte 0x{byte:02X}")))?;
            ids.push(id);
            rest = &rest[length..];
        }
        Ok(())
    }
}

/// The bytes of a token: `\t`, `\n`, `\r` and `\x0a` stand for what they do in Python, and any other character behind a
/// backslash for itself.
pub(super) fn unescaped(text: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'\\' => match rest.next() {
                Some(b't') => b'\t',
                Some(b'n') => b'\n',
                Some(b'r') => b'\r',
                Some(b'x') => {
                    let digit = |byte: Option<u8>| byte.and_then(|byte| char::from(byte).to_digit(16)).unwrap_or(0);
                    (digit(rest.next()) << 4 | digit(rest.next())) as u8 // two digits of four bits
                }
                Some(other) => other,
                None => break,
            },
            other => other,
        });
    }
    bytes
}
