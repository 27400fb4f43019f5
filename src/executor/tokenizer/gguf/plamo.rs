//! PLaMo 2's tokenizer: of all ways to cut a text into tokens the one with the highest sum of scores, found from the
//! text's end; characters without a token become bytes.

use super::prefixes::Prefixes;
use super::sentencepiece::scores;
use super::texts::Texts;
use crate::error::{Error, Result};
use crate::model::vocabulary::{TokenType, Vocabulary};
use crate::weights::gguf::GgufFile;

/// What a character without a token scores, in ten thousandths.
const UNKNOWN_SCORE: i64 = -10_000_000;
/// Tokens that score no more than this are not used.
const INVALID_SCORE: i64 = -20_000_000;

/// The encoder of "plamo2".
#[derive(Debug)]
pub(super) struct Plamo {
    tokens: Prefixes,
    /// By token, in ten thousandths.
    scores: Vec<i64>,
}

impl Plamo {
    pub(super) fn read(gguf: &GgufFile, vocabulary: &Vocabulary<'_>, texts: &Texts) -> Result<Self> {
        let types = &vocabulary.stored_types;
        if let Some(byte) = (0..=255u8).find(|&byte| texts.byte(byte).is_none()) {
            let reason = format!("the vocabulary has no token `<0x{byte:02X}>`: convert the model again");
            return Err(Error::file(gguf.path(), reason));
        }
        let tokens = texts.iter().zip(0..).filter(|&(_, id)| types[id as usize] != TokenType::Byte);
        let score = |&score: &f32| match score.is_finite() {
            true => (score * 1e4).round() as i64,
            false => INVALID_SCORE,
        };
        Ok(Self {
            tokens: Prefixes::new(tokens.map(|(text, id)| (text.as_bytes().into(), id))),
            scores: scores(gguf, texts.len())?.iter().map(score).collect(),
        })
    }

    /// Adds the tokens of a text that has no special ones.
    pub(super) fn encode(&self, text: &str, texts: &Texts, ids: &mut Vec<u32>) {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        // For each place: the cost of the best way from there to the end, and the first token on it with its length.
        let mut best: Vec<(i64, usize, Option<u32>)> = vec![(0, 0, None); text.len() + 1];
        let mut here = Vec::new();
        for (start, character) in text.char_indices().rev() {
            here.clear();
            self.tokens
                .each(&text.as_bytes()[start..], |length, id| here.push((length, Some(id), self.scores[id as usize])));
            here.reverse();
            here.push((character.len_utf8(), None, UNKNOWN_SCORE));
            best[start].0 = i64::MAX;
            for &(length, id, score) in here.iter().filter(|(.., score)| *score > INVALID_SCORE) {
                let cost = best[start + length].0.saturating_sub(score);
                if cost < best[start].0 {
                    best[start] = (cost, length, id);
                }
            }
        }
        let mut at = 0;
        while at < text.len() {
            let (_, length, id) = best[at];
            match id {
                Some(id) => ids.push(id),
                None => ids.extend(text[at..at + length].bytes().filter_map(|byte| texts.byte(byte))),
            }
            at += length;
        }
    }
}
