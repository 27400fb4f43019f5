//! SentencePiece's unigram model: of all ways to cut a text into tokens the one with the highest sum of scores.

use super::prefixes::Prefixes;
use super::sentencepiece::scores;
use super::texts::Texts;
use crate::error::{Error, Result};
use crate::model::vocabulary::{TokenType, Vocabulary};
use crate::weights::gguf::GgufFile;

/// How much an unknown character scores below the worst token.
const UNKNOWN_PENALTY: f32 = 10.0;

/// The encoder of "t5".
#[derive(Debug)]
pub(super) struct Unigram {
    tokens: Prefixes,
    /// By token; zero for user-defined ones.
    scores: Vec<f64>,
    unknown: u32,
    unknown_score: f64,
    charsmap: Option<Charsmap>,
    space_prefix: bool,
    /// Runs of spaces count as one, and spaces at both ends not at all.
    merges_spaces: bool,
}

impl Unigram {
    pub(super) fn read(
        gguf: &GgufFile,
        vocabulary: &Vocabulary<'_>,
        texts: &Texts,
        space_prefix: bool,
    ) -> Result<Self> {
        let types = &vocabulary.stored_types;
        let scores = scores(gguf, texts.len())?;
        let worst = scores.iter().zip(types).filter(|(_, kind)| **kind == TokenType::Normal).map(|(&score, _)| score);
        let worst = worst.fold(f32::MAX, f32::min);
        let in_text = [TokenType::Normal, TokenType::UserDefined, TokenType::Unused];
        let tokens = texts.iter().zip(0..).filter(|&(_, id)| in_text.contains(&types[id as usize]));
        let tokens = Prefixes::new(tokens.map(|(text, id)| (text.as_bytes().into(), id)));
        let score = |(&score, kind): (&f32, &TokenType)| match kind {
            TokenType::UserDefined => 0.0,
            _ => f64::from(score),
        };
        let Some(unknown) = vocabulary.unknown.map(|role| role.id) else {
            let reason =
                "the vocabulary has no unknown token (`tokenizer.ggml.unknown_token_id`): convert the model again";
            return Err(Error::file(gguf.path(), reason));
        };
        Ok(Self {
            tokens,
            scores: scores.iter().zip(types).map(score).collect(),
            unknown,
            unknown_score: f64::from(worst - UNKNOWN_PENALTY),
            charsmap: Charsmap::read(gguf)?,
            space_prefix,
            merges_spaces: gguf.get_bool("tokenizer.ggml.remove_extra_whitespaces")?.unwrap_or(false),
        })
    }

    /// Adds the tokens of a text that has no special ones.
    pub(super) fn encode(&self, text: &str, ids: &mut Vec<u32>) -> Result<()> {
        let text = self.normalize(text)?;
        // For each end of a token: the token before it on the best way there, where that begins, and the way's score.
        let mut best = vec![(self.unknown, 0, f64::MIN); text.len() + 1];
        best[0].2 = 0.0;
        for (start, character) in text.char_indices() {
            let (so_far, width) = (best[start].2, character.len_utf8());
            let mut propose = |length: usize, id: u32, score: f64| {
                if so_far + score > best[start + length].2 {
                    best[start + length] = (id, start, so_far + score);
                }
            };
            let mut known = false;
            self.tokens.each(&text.as_bytes()[start..], |length, id| {
                known |= length == width;
                propose(length, id, self.scores[id as usize]);
            });
            if !known {
                propose(width, self.unknown, self.unknown_score);
            }
        }
        let first = ids.len();
        let mut end = text.len();
        let mut after_unknown = false;
        while end > 0 {
            let (id, start, _) = best[end];
            let unknown = id == self.unknown;
            if !(unknown && after_unknown) {
                ids.push(id);
            }
            after_unknown = unknown;
            end = start;
        }
        ids[first..].reverse();
        Ok(())
    }

    fn normalize(&self, text: &str) -> Result<String> {
        let mut out = String::with_capacity(text.len() + 3);
        let (mut prefixed, mut within_word) = (false, false);
        let mut rest = text;
        while let Some(character) = rest.chars().next() {
            let replaced = match &self.charsmap {
                Some(charsmap) => charsmap.replacement(rest.as_bytes())?,
                None => None,
            };
            let (consumed, normal) = replaced.unwrap_or((character.len_utf8(), &rest[..character.len_utf8()]));
            for character in normal.chars() {
                if character == ' ' {
                    within_word = false;
                    if !self.merges_spaces {
                        out.push('▁');
                    }
                    continue;
                }
                if !within_word {
                    within_word = true;
                    if self.space_prefix && !prefixed || self.merges_spaces {
                        out.push('▁');
                        prefixed = true;
                    }
                }
                out.push(character);
            }
            rest = rest.get(consumed..).ok_or_else(damaged)?;
        }
        Ok(out)
    }
}

fn damaged() -> Error {
    Error::Tokenizer("`tokenizer.ggml.precompiled_charsmap` is damaged: convert the model again".into())
}

/// SentencePiece's normalisation: a trie over bytes, in a double array, to replacement texts.
#[derive(Debug)]
struct Charsmap {
    units: Vec<u32>,
    /// Texts, each ended by a zero.
    replacements: String,
}

impl Charsmap {
    fn read(gguf: &GgufFile) -> Result<Option<Self>> {
        const KEY: &str = "tokenizer.ggml.precompiled_charsmap";
        let Some(numbers) = gguf.get_f64_array(KEY)? else { return Ok(None) };
        // Stored as signed or unsigned bytes.
        let bytes: Vec<u8> = numbers.iter().map(|&number| number as i64 as u8).collect();
        let damaged = || Error::file(gguf.path(), format!("metadata key `{KEY}` is damaged: convert the model again"));
        let (size, rest) = bytes.split_first_chunk::<4>().ok_or_else(damaged)?;
        let (trie, replacements) = rest.split_at_checked(u32::from_le_bytes(*size) as usize).ok_or_else(damaged)?;
        let units = trie.as_chunks::<4>().0.iter().map(|unit| u32::from_le_bytes(*unit)).collect();
        let replacements = String::from_utf8(replacements.to_vec()).map_err(|_| damaged())?;
        Ok(Some(Self { units, replacements }))
    }

    /// The replacement of the longest text in the map that `text` begins with, and that text's length.
    fn replacement(&self, text: &[u8]) -> Result<Option<(usize, &str)>> {
        let unit = |index: u32| self.units.get(index as usize).copied().ok_or_else(damaged);
        let offset = |unit: u32| (unit >> 10) << ((unit & (1 << 9)) >> 6);
        let mut found = None;
        let mut node = offset(unit(0)?);
        for (index, &byte) in text.iter().enumerate() {
            if byte == 0 {
                break;
            }
            node ^= u32::from(byte);
            let here = unit(node)?;
            if here & (1 << 31 | 0xFF) != u32::from(byte) {
                break;
            }
            node ^= offset(here);
            if here & 1 << 8 != 0 {
                found = Some((index + 1, unit(node)? & !(1 << 31)));
            }
        }
        let Some((length, at)) = found else { return Ok(None) };
        let replacement = self.replacements.get(at as usize..).and_then(|from| from.split_once('\0'));
        Ok(Some((length, replacement.ok_or_else(damaged)?.0)))
    }
}
