//! KV of ended sequences, kept for requests that begin with the same tokens. The KV itself stays where it is, in the
//! stages; here is what is kept, and in which order it goes.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::backend::SequenceId;

/// Positions that two sequences must share at least. Every prompt of a tokenizer begins alike, and to copy a few
/// positions saves nothing.
pub const SHORTEST_PREFIX: usize = 16;

/// Positions that are worth waiting for while another sequence computes them. Fewer are computed sooner along with the
/// rest of the prompt.
pub const WORTH_WAITING: usize = 64;

/// A sequence that has ended and is still open in the stages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retained {
    /// Its name in the stages.
    pub id: SequenceId,
    /// Tokens whose KV every stage has.
    pub tokens: Vec<u32>,
    /// Positions that KV is set aside for.
    pub capacity: usize,
    /// Which rotations its keys have; only equal ones can be shared.
    pub rotations: Rotations,
}

/// Rotary embeddings that depend on a sequence's length make keys of equal tokens differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rotations {
    /// Those of every sequence up to the trained length.
    Short,
    /// LongRoPE's, past the trained length.
    Long,
    /// No other sequence's (dynamic NTK past the trained length).
    Own,
}

/// Retained sequences within a budget of positions, least recently used first.
#[derive(Debug)]
pub struct PrefixCache {
    budget: usize,
    entries: VecDeque<Retained>,
}

impl PrefixCache {
    /// Keeps up to `budget` positions; 0 keeps nothing.
    pub fn new(budget: usize) -> Self {
        PrefixCache { budget, entries: VecDeque::new() }
    }

    /// What is kept.
    pub fn entries(&self) -> impl Iterator<Item = &Retained> {
        self.entries.iter()
    }

    /// Positions that KV is set aside for.
    pub fn positions(&self) -> usize {
        self.entries.iter().map(|entry| entry.capacity).sum()
    }

    /// Marks an entry as used.
    pub fn touch(&mut self, id: SequenceId) {
        if let Some(index) = self.entries.iter().position(|entry| entry.id == id)
            && let Some(entry) = self.entries.remove(index)
        {
            self.entries.push_back(entry);
        }
    }

    /// Keeps an ended sequence and returns those that make way for it, itself included if it is not worth keeping.
    pub fn insert(&mut self, entry: Retained) -> Vec<Retained> {
        let covers = |long: &Retained, short: &Retained| {
            long.rotations == short.rotations && long.tokens.starts_with(&short.tokens)
        };
        let covered_by = self.entries.iter().find(|kept| covers(kept, &entry)).map(|kept| kept.id);
        if let Some(id) = covered_by {
            self.touch(id);
            return vec![entry];
        }
        let useless = entry.tokens.len() < SHORTEST_PREFIX || entry.rotations == Rotations::Own;
        if useless || entry.capacity > self.budget {
            return vec![entry];
        }
        let (mut evicted, kept): (Vec<_>, Vec<_>) = self.entries.drain(..).partition(|kept| covers(&entry, kept));
        self.entries.extend(kept);
        self.entries.push_back(entry);
        while self.positions() > self.budget {
            evicted.extend(self.entries.pop_front());
        }
        evicted
    }

    /// Gives up the least recently used entry; `spared` only if it is the last.
    pub fn evict(&mut self, spared: Option<SequenceId>) -> Option<Retained> {
        let index = self.entries.iter().position(|entry| Some(entry.id) != spared).unwrap_or(0);
        self.entries.remove(index)
    }
}

/// Positions at which two token runs first differ.
pub fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// Figures that the scheduler publishes for others to read.
#[derive(Debug, Default)]
pub struct PrefixCounters {
    /// Requests that were admitted and might have reused a prefix.
    pub lookups: AtomicU64,
    /// Those that did.
    pub hits: AtomicU64,
    /// Prompt tokens that were not computed for it.
    pub reused_tokens: AtomicU64,
    /// Ended sequences whose KV is kept now.
    pub retained_sequences: AtomicU64,
    /// Positions that their KV is set aside for.
    pub retained_positions: AtomicU64,
}

impl PrefixCounters {
    /// Publishes what is kept.
    pub fn publish(&self, cache: &PrefixCache) {
        self.retained_sequences.store(cache.entries.len() as u64, Ordering::Relaxed);
        self.retained_positions.store(cache.positions() as u64, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn retained(id: u64, tokens: std::ops::Range<u32>, capacity: usize) -> Retained {
        Retained { id: SequenceId(id), tokens: tokens.collect(), capacity, rotations: Rotations::Short }
    }

    fn ids(entries: &[Retained]) -> Vec<u64> {
        entries.iter().map(|entry| entry.id.0).collect()
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let mut cache = PrefixCache::new(100);
        assert!(cache.insert(retained(1, 0..30, 40)).is_empty());
        assert!(cache.insert(retained(2, 100..130, 40)).is_empty());
        cache.touch(SequenceId(1));
        assert_eq!(ids(&cache.insert(retained(3, 200..230, 40))), [2]);
        assert_eq!(cache.positions(), 80);
        assert_eq!(cache.evict(Some(SequenceId(1))).unwrap().id.0, 3);
        assert_eq!(cache.evict(Some(SequenceId(1))).unwrap().id.0, 1, "the spared one when it is the last");
        assert!(cache.evict(None).is_none());
    }

    #[test]
    fn a_longer_sequence_replaces_its_own_beginning() {
        let mut cache = PrefixCache::new(100);
        cache.insert(retained(1, 0..20, 20));
        cache.insert(retained(2, 100..120, 20));
        assert_eq!(ids(&cache.insert(retained(3, 0..40, 40))), [1]);
        assert_eq!(ids(&cache.insert(retained(4, 0..30, 30))), [4], "covered by 3");
        assert_eq!(cache.positions(), 60);
        let long = Retained { rotations: Rotations::Long, ..retained(5, 0..40, 40) };
        assert!(cache.insert(long).is_empty(), "other rotations are other keys");
    }

    #[test]
    fn what_is_short_too_big_or_nobody_elses_is_not_kept() {
        let mut cache = PrefixCache::new(100);
        assert_eq!(ids(&cache.insert(retained(1, 0..15, 20))), [1]);
        assert_eq!(ids(&cache.insert(retained(2, 0..50, 101))), [2]);
        let own = Retained { rotations: Rotations::Own, ..retained(3, 0..40, 40) };
        assert_eq!(ids(&cache.insert(own)), [3]);
        assert_eq!(ids(&PrefixCache::new(0).insert(retained(4, 0..50, 50))), [4]);
    }
}
