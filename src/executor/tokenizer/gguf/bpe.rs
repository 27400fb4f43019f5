//! Byte pair encoding with a list of merges.

use std::collections::HashMap;

use super::merge::{Merger, NO_TOKEN};
use super::pre::Splitter;
use super::texts::Texts;
use crate::error::{Error, Result};
use crate::weights::gguf::GgufFile;

/// The encoder of tokenizers that have merges.
#[derive(Debug)]
pub(super) struct Bpe {
    splitter: Splitter,
    /// By the ids of two parts: the merge's rank and the id of the result. Parts that are no tokens have ids beyond
    /// those of the tokens.
    merges: HashMap<(u32, u32), (u32, u32)>,
    /// Ids of the parts that are one character.
    characters: HashMap<char, u32>,
    /// The character that stands for each byte.
    alphabet: [char; 256],
}

impl Bpe {
    /// Reads the merges of a file.
    pub(super) fn read(gguf: &GgufFile, texts: &Texts, splitter: Splitter) -> Result<Self> {
        const KEY: &str = "tokenizer.ggml.merges";
        // Kimi-K2's merges may be left out; its vocabulary is then spelled in characters.
        let optional = splitter.row.names.contains(&"kimi-k2");
        let listed = match gguf.get_str_array(KEY)? {
            Some(merges) => merges,
            None if optional => Vec::new(),
            None => {
                let reason = format!("metadata key `{KEY}` is missing: convert the model again");
                return Err(Error::file(gguf.path(), reason));
            }
        };
        let mut others: HashMap<String, u32> = HashMap::new();
        let mut part = |text: &str| match texts.id(text).or_else(|| others.get(text).copied()) {
            Some(id) => id,
            None => {
                let id = (texts.len() + others.len()) as u32; // the file's length bounds both
                others.insert(text.to_owned(), id);
                id
            }
        };
        let mut merges = HashMap::with_capacity(listed.len());
        for (rank, merge) in listed.iter().enumerate() {
            // A part may itself be a space.
            let space = merge.char_indices().skip(1).find(|&(_, character)| character == ' ');
            let Some((left, right)) = space.map(|(at, _)| (&merge[..at], &merge[at + 1..])) else {
                let reason = format!("metadata key `{KEY}` has no pair at index {rank}: convert the model again");
                return Err(Error::file(gguf.path(), reason));
            };
            let pair = (part(left), part(right));
            let result = part(&format!("{left}{right}"));
            merges.entry(pair).or_insert((rank as u32, result));
        }
        let one = |text: &str| {
            let mut characters = text.chars();
            characters.next().filter(|_| characters.next().is_none())
        };
        let mut characters: HashMap<char, u32> = HashMap::new();
        characters.extend(others.iter().filter_map(|(text, &id)| Some((one(text)?, id))));
        characters.extend(texts.iter().zip(0..).filter_map(|(text, id)| Some((one(text)?, id))));
        Ok(Self { splitter, merges, characters, alphabet: alphabet() })
    }

    /// Adds the tokens of a text that has no special ones.
    pub(super) fn encode(&self, text: &str, texts: &Texts, ids: &mut Vec<u32>) -> Result<()> {
        let row = self.splitter.row;
        let escaped = if row.spelled_out { Some(text.replace(' ', "▁")) } else { None };
        let text = escaped.as_deref().unwrap_or(text);
        let mut merger = Merger::default();
        let mut spelled = String::new();
        for word in self.splitter.words(text)? {
            let word = &text[word];
            let word = if row.spelled_out {
                word
            } else {
                spelled.clear();
                spelled.extend(word.bytes().map(|byte| self.alphabet[usize::from(byte)]));
                &spelled
            };
            if (row.whole_words || row.gemma && word.bytes().all(|byte| byte == b'\n'))
                && let Some(id) = texts.id(word)
            {
                ids.push(id);
                continue;
            }
            merger.symbols.clear();
            merger.characters(word, |character| {
                character.chars().next().and_then(|one| self.characters.get(&one)).copied().unwrap_or(NO_TOKEN)
            });
            merger.merge(|left, right| self.merges.get(&(left.id, right.id)).copied());
            for symbol in &merger.symbols {
                if (symbol.id as usize) < texts.len() {
                    ids.push(symbol.id);
                    continue;
                }
                // Without a token for the part there may be one for each of its bytes; what has none is left out.
                let bytes = word[symbol.start..symbol.start + symbol.length].bytes();
                ids.extend(bytes.filter_map(|byte| match row.spelled_out {
                    true => texts.byte(byte),
                    false => texts.id(std::str::from_utf8(&[byte]).ok()?),
                }));
            }
        }
        Ok(())
    }
}

/// GPT-2's character for each byte: printable ones of Latin-1 stand for themselves, the others follow from U+0100 on.
pub(super) fn alphabet() -> [char; 256] {
    let mut others = '\u{100}'..;
    std::array::from_fn(|byte| match byte as u8 {
        byte @ (b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF) => char::from(byte),
        _ => others.next().unwrap_or(char::REPLACEMENT_CHARACTER),
    })
}
