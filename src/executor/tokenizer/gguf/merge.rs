//! Byte pair encoding: neighbours are put together in the order of a rank until no pair has one. Merging `n` symbols
//! takes `n log n` steps.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// The id of a symbol that is no token.
pub(super) const NO_TOKEN: u32 = u32::MAX;

/// A part of the text that is being merged.
#[derive(Debug, Clone, Copy)]
pub(super) struct Symbol {
    pub(super) start: usize,
    /// Bytes; zero once the symbol has become a part of its left neighbour.
    pub(super) length: usize,
    pub(super) id: u32,
}

/// Merges the symbols of one word. The buffers are kept from one word to the next.
#[derive(Debug, Default)]
pub(super) struct Merger {
    pub(super) symbols: Vec<Symbol>,
    /// Neighbours of each symbol; an index beyond the symbols for none.
    neighbours: Vec<(usize, usize)>,
    candidates: BinaryHeap<Reverse<Candidate>>,
}

/// Two neighbours that may be merged, in the order in which candidates are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    rank: u32,
    left: usize,
    right: usize,
    /// Of both together when they were found.
    length: usize,
    /// The result's.
    id: u32,
}

impl Merger {
    /// Sets the symbols to a text's characters, with ids by `id`.
    pub(super) fn characters(&mut self, text: &str, id: impl Fn(&str) -> u32) {
        self.symbols.clear();
        self.symbols.extend(text.char_indices().map(|(start, character)| {
            let length = character.len_utf8();
            Symbol { start, length, id: id(&text[start..start + length]) }
        }));
    }

    /// Merges the symbols. `pair` gives a pair's rank, of which the lowest is merged first, and the id of the result;
    /// among pairs of one rank the leftmost is merged first.
    pub(super) fn merge(&mut self, pair: impl Fn(Symbol, Symbol) -> Option<(u32, u32)>) {
        let count = self.symbols.len();
        self.candidates.clear();
        self.neighbours.clear();
        self.neighbours.extend((0..count).map(|index| (index.wrapping_sub(1), index + 1)));
        for right in 1..count {
            self.propose(right - 1, right, &pair);
        }
        while let Some(Reverse(Candidate { left, right, length, id, .. })) = self.candidates.pop() {
            let (a, b) = (self.symbols[left], self.symbols[right]);
            // Symbols only grow or vanish, so the length tells whether the pair is still what it was.
            if a.length == 0 || b.length == 0 || a.length + b.length != length {
                continue;
            }
            self.symbols[left] = Symbol { length, id, ..a };
            self.symbols[right].length = 0;
            let (before, after) = (self.neighbours[left].0, self.neighbours[right].1);
            self.neighbours[left].1 = after;
            if after < count {
                self.neighbours[after].0 = left;
            }
            self.propose(before, left, &pair);
            self.propose(left, after, &pair);
        }
        self.symbols.retain(|symbol| symbol.length > 0);
    }

    fn propose(&mut self, left: usize, right: usize, pair: &impl Fn(Symbol, Symbol) -> Option<(u32, u32)>) {
        let (Some(&a), Some(&b)) = (self.symbols.get(left), self.symbols.get(right)) else { return };
        if let Some((rank, id)) = pair(a, b) {
            self.candidates.push(Reverse(Candidate { rank, left, right, length: a.length + b.length, id }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lower_ranks_and_then_left_pairs_merge_first() {
        let merged = |text: &str, ranks: &[(&str, u32)]| {
            let mut merger = Merger::default();
            merger.characters(text, |_| NO_TOKEN);
            merger.merge(|a, b| {
                let both = &text[a.start..b.start + b.length];
                let &(_, rank) = ranks.iter().find(|(known, _)| *known == both)?;
                Some((rank, NO_TOKEN))
            });
            let parts = merger.symbols.iter().map(|symbol| &text[symbol.start..symbol.start + symbol.length]);
            parts.collect::<Vec<_>>().join("|")
        };
        assert_eq!(merged("abc", &[("ab", 1), ("bc", 0), ("abc", 2)]), "abc");
        assert_eq!(merged("abc", &[("ab", 1), ("bc", 0)]), "a|bc");
        assert_eq!(merged("aaaaa", &[("aa", 0)]), "aa|aa|a");
        assert_eq!(merged("aaaaa", &[("aa", 0), ("aaaa", 1)]), "aaaa|a");
        assert_eq!(merged("é中é", &[("é中", 0)]), "é中|é");
        assert_eq!(merged("", &[]), "");
    }
}
