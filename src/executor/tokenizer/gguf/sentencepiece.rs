//! SentencePiece's byte pair encoding: tokens have scores, and the pair whose token has the highest is merged first.

use super::merge::{Merger, NO_TOKEN};
use super::texts::Texts;
use crate::error::{Error, Result};
use crate::weights::gguf::GgufFile;

/// The encoder of Llama 2, Mistral before Nemo, Gemma up to 3 and Phi-3.
#[derive(Debug)]
pub(super) struct SentencePiece {
    /// By token: 0 for the highest score.
    ranks: Vec<u32>,
    /// Stands for a byte that has no token.
    unknown: Option<u32>,
}

impl SentencePiece {
    pub(super) fn read(gguf: &GgufFile, texts: &Texts, unknown: Option<u32>) -> Result<Self> {
        let scores = scores(gguf, texts.len())?;
        let mut sorted = scores.clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        sorted.dedup_by(|a, b| a.total_cmp(b).is_eq());
        let rank = |score: &f32| sorted.partition_point(|other| other.total_cmp(score).is_gt()) as u32;
        Ok(Self { ranks: scores.iter().map(rank).collect(), unknown })
    }

    /// Adds the tokens of a text in which spaces are `▁`.
    pub(super) fn encode(&self, text: &str, texts: &Texts, ids: &mut Vec<u32>) -> Result<()> {
        let mut merger = Merger::default();
        merger.characters(text, |character| texts.id(character).unwrap_or(NO_TOKEN));
        merger.merge(|left, right| {
            let id = texts.id(&text[left.start..right.start + right.length])?;
            Some((self.ranks[id as usize], id))
        });
        for symbol in &merger.symbols {
            if symbol.id != NO_TOKEN {
                ids.push(symbol.id);
                continue;
            }
            for byte in text[symbol.start..symbol.start + symbol.length].bytes() {
                let alone = || texts.id(std::str::from_utf8(&[byte]).ok()?);
                ids.push(texts.byte(byte).or_else(alone).or(self.unknown).ok_or_else(|| {
                    Error::Tokenizer(format!("the vocabulary has no token for the byte 0x{byte:02X}"))
                })?);
            }
        }
        Ok(())
    }
}

/// `tokenizer.ggml.scores`, or zeros where the file has none.
pub(super) fn scores(gguf: &GgufFile, count: usize) -> Result<Vec<f32>> {
    const KEY: &str = "tokenizer.ggml.scores";
    let Some(scores) = gguf.get_f64_array(KEY)? else { return Ok(vec![0.0; count]) };
    if scores.len() < count {
        let reason =
            format!("metadata key `{KEY}` has {} elements for {count} tokens: convert the model again", scores.len());
        return Err(Error::file(gguf.path(), reason));
    }
    // Adding zero makes of a negative zero a positive one.
    Ok(scores[..count].iter().map(|&score| score as f32 + 0.0).collect())
}
