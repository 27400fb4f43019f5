//! Special tokens spelled out in a text: where they are, and the ordinary text between them.

use std::collections::BTreeMap;

use super::prefixes::Prefixes;
use crate::error::{Error, Result};

/// Places at which special tokens may be spelled, for each byte of the text. No real vocabulary comes near.
const MOST_MATCHES: usize = 64;

/// A special token and how it treats the white space around it.
#[derive(Debug, Clone, Copy)]
pub(super) struct SpecialToken {
    pub(super) id: u32,
    /// Takes the white space on its left away.
    pub(super) strips_left: bool,
    /// Takes the white space on its right away.
    pub(super) strips_right: bool,
}

/// A part of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part<'a> {
    Text(&'a str),
    Token(u32),
}

/// Finds special tokens in texts.
#[derive(Debug)]
pub(super) struct Partition {
    /// Ids in the index are places in `tokens`.
    texts: Prefixes,
    tokens: Vec<SpecialToken>,
}

impl Partition {
    pub(super) fn new<'a>(tokens: impl IntoIterator<Item = (&'a str, SpecialToken)>) -> Self {
        let (texts, tokens): (Vec<&str>, Vec<SpecialToken>) = tokens.into_iter().unzip();
        let texts = texts.into_iter().zip(0..).map(|(text, index)| (text.as_bytes().into(), index));
        Self { texts: Prefixes::new(texts), tokens }
    }

    /// Cuts a text at the special tokens in it. Where two overlap the longer one counts, of equally long ones that
    /// with the lower id, and otherwise the one further left.
    pub(super) fn parts<'a>(&self, text: &'a str) -> Result<Vec<Part<'a>>> {
        let mut matches = Vec::new();
        let most = text.len().saturating_mul(MOST_MATCHES);
        for start in 0..text.len() {
            self.texts.each(&text.as_bytes()[start..], |length, index| matches.push((length, index, start)));
            if matches.len() > most {
                let reason = "special tokens overlap too often in this text: the vocabulary has too many alike";
                return Err(Error::Tokenizer(reason.into()));
            }
        }
        matches.sort_by_key(|&(length, index, start)| (std::cmp::Reverse(length), index, start));

        // By where their claim on the text begins: where it ends, and the token.
        let mut taken: BTreeMap<usize, (usize, u32)> = BTreeMap::new();
        for (length, index, start) in matches {
            let token = self.tokens[index as usize];
            let left = taken.range(..start + length).next_back().map_or(0, |(_, &(end, _))| end);
            if left > start {
                continue;
            }
            let right = taken.range(start + length..).next().map_or(text.len(), |(&begin, _)| begin);
            let (before, after) = (&text[left..start], &text[start + length..right]);
            let begin = if token.strips_left { left + before.trim_end_matches(is_space).len() } else { start };
            let stripped = if token.strips_right { after.len() - after.trim_start_matches(is_space).len() } else { 0 };
            taken.insert(begin, (start + length + stripped, token.id));
        }

        let mut parts = Vec::new();
        let mut at = 0;
        for (begin, (end, id)) in taken {
            if begin > at {
                parts.push(Part::Text(&text[at..begin]));
            }
            parts.push(Part::Token(id));
            at = end;
        }
        if at < text.len() {
            parts.push(Part::Text(&text[at..]));
        }
        Ok(parts)
    }
}

/// C's `isspace`.
fn is_space(character: char) -> bool {
    matches!(character, ' ' | '\t'..='\r')
}

#[cfg(test)]
mod tests {
    use super::Part::{Text, Token};
    use super::*;

    fn partition(tokens: &[(&'static str, bool, bool)]) -> Partition {
        let tokens = tokens.iter().zip(0..);
        Partition::new(
            tokens
                .map(|(&(text, strips_left, strips_right), id)| (text, SpecialToken { id, strips_left, strips_right })),
        )
    }

    #[test]
    fn the_longest_special_token_counts_wherever_it_begins() {
        let plain = partition(&[("ab", false, false), ("bcd", false, false), ("a", false, false)]);
        assert_eq!(plain.parts("xabcd").unwrap(), [Text("x"), Token(2), Token(1)]);
        assert_eq!(plain.parts("abab").unwrap(), [Token(0), Token(0)]);
        assert_eq!(plain.parts("é").unwrap(), [Text("é")]);
        assert_eq!(plain.parts("").unwrap(), []);
    }

    #[test]
    fn special_tokens_strip_white_space_beside_them() {
        let strips =
            partition(&[("<r>", false, true), ("<l>", true, false), ("<p>", false, false), ("\n\n", false, false)]);
        assert_eq!(strips.parts("a <r>\n\t b").unwrap(), [Text("a "), Token(0), Text("b")]);
        assert_eq!(strips.parts("a \n<l> b").unwrap(), [Text("a"), Token(1), Text(" b")]);
        assert_eq!(strips.parts(" <p> ").unwrap(), [Text(" "), Token(2), Text(" ")]);
        assert_eq!(strips.parts("<r> <l>").unwrap(), [Token(0), Token(1)]);
        assert_eq!(strips.parts("<r>\n\nx").unwrap(), [Token(0), Text("x")], "the longer token is first");
        assert_eq!(strips.parts("<r>\u{a0}x").unwrap(), [Token(0), Text("\u{a0}x")], "only ASCII's white space");
    }

    #[test]
    fn special_tokens_that_overlap_endlessly_are_refused() {
        let long: Vec<String> = (1..=400).map(|length| "a".repeat(length)).collect();
        let token = |id| SpecialToken { id, strips_left: false, strips_right: false };
        let partition = Partition::new(long.iter().zip(0..).map(|(text, id)| (text.as_str(), token(id))));
        let refused = partition.parts(&"a".repeat(10_000)).unwrap_err().to_string();
        assert!(refused.contains("overlap"), "{refused}");
    }
}
