//! How the KV cache fares, step by step.

use std::collections::VecDeque;

use super::super::KvState;

/// The KV cache after one step.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize)]
pub struct KvTrace {
    /// Bytes set aside in all stages together; 0 where the bytes of a position are not known.
    pub size_bytes: u64,
    /// Positions set aside.
    pub size_positions: usize,
    /// Positions of them that hold keys and values.
    pub valid_positions: usize,
    /// Positions that may be set aside.
    pub max_positions: usize,
    /// Kept sequences that made way since the trace began.
    pub evictions: u64,
    /// Requests that took over a prefix, of those that might have, since the trace began. 0 before there was one.
    pub hit_rate: f64,
    /// Part of the positions set aside that hold nothing, from 0 to 1.
    pub fragmentation: f64,
    /// The most positions set aside since the trace began.
    pub peak_positions: usize,
    /// Running sequences.
    pub sequences: usize,
    /// Requests that wait for admission.
    pub waiting: usize,
}

impl KvTrace {
    /// Part of `part` in `whole`, 0 of nothing.
    fn share(part: u64, whole: u64) -> f64 {
        if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
    }
}

/// The KV cache over a session.
#[derive(Debug, Clone, Default)]
pub(super) struct KvSession {
    recent: VecDeque<KvTrace>,
    pub steps: u64,
    pub evictions: u64,
    lookups: u64,
    hits: u64,
    peak_positions: usize,
    /// What was last told, whose counters go on from there.
    last: KvState,
    /// Bytes of a position in all stages together.
    bytes_per_position: u64,
}

impl KvSession {
    /// Another executor is watched: its counters begin at 0.
    pub fn open(&mut self, bytes_per_position: u64) {
        self.last = KvState::default();
        self.bytes_per_position = bytes_per_position;
    }

    /// Forgets the traces, not where the counters stand.
    pub fn clear(&mut self) {
        *self = KvSession { last: self.last, bytes_per_position: self.bytes_per_position, ..KvSession::default() };
    }

    /// Takes in how the cache stands, and keeps what fits into `max_bytes` of the latest.
    pub fn add(&mut self, state: &KvState, max_bytes: usize) -> KvTrace {
        // A counter that has gone back is another executor's.
        let grown = |now: u64, before: u64| if now >= before { now - before } else { now };
        self.steps += 1;
        self.evictions += grown(state.evictions, self.last.evictions);
        self.lookups += grown(state.lookups, self.last.lookups);
        self.hits += grown(state.hits, self.last.hits);
        self.last = *state;
        self.peak_positions = self.peak_positions.max(state.reserved);
        let trace = KvTrace {
            size_bytes: state.reserved as u64 * self.bytes_per_position,
            size_positions: state.reserved,
            valid_positions: state.valid,
            max_positions: state.limit,
            evictions: self.evictions,
            hit_rate: self.hit_rate(),
            fragmentation: KvTrace::share(state.reserved.saturating_sub(state.valid) as u64, state.reserved as u64),
            peak_positions: self.peak_positions,
            sequences: state.sequences,
            waiting: state.waiting,
        };
        let most = max_bytes / size_of::<KvTrace>();
        while self.recent.len() >= most.max(1) {
            self.recent.pop_front();
        }
        if most > 0 {
            if self.recent.len() == self.recent.capacity() {
                self.recent.reserve_exact(self.recent.len().clamp(1, most - self.recent.len()));
            }
            self.recent.push_back(trace);
        }
        trace
    }

    /// Of all requests since the trace began.
    pub fn hit_rate(&self) -> f64 {
        KvTrace::share(self.hits, self.lookups)
    }

    /// The latest, in order.
    pub fn recent(&self) -> &VecDeque<KvTrace> {
        &self.recent
    }

    /// Bytes of those that are kept.
    pub fn bytes(&self) -> usize {
        self.recent.capacity() * size_of::<KvTrace>()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_session_adds_up_what_it_is_told(
            steps in prop::collection::vec((0usize..500, 0usize..500, 0u64..3, 0u64..3, 0u64..3), 1..60),
            clear_at in 0usize..60,
            most in 1usize..20,
        ) {
            let mut session = KvSession::default();
            session.open(96);
            let mut state = KvState { limit: 1000, ..KvState::default() };
            let (mut evictions, mut lookups, mut hits, mut peak, mut count) = (0, 0, 0, 0, 0);
            let max_bytes = most * size_of::<KvTrace>();
            for (index, (reserved, valid, evicted, missed, hit)) in steps.into_iter().enumerate() {
                if index == clear_at {
                    session.clear();
                    (evictions, lookups, hits, peak, count) = (0, 0, 0, 0, 0);
                    prop_assert_eq!(session.bytes(), 0);
                }
                state.reserved = reserved;
                state.valid = valid.min(reserved);
                state.evictions += evicted;
                state.lookups += missed + hit;
                state.hits += hit;
                (evictions, lookups, hits, count) = (evictions + evicted, lookups + missed + hit, hits + hit, count + 1);
                peak = peak.max(reserved);
                let trace = session.add(&state, max_bytes);
                prop_assert_eq!((trace.evictions, trace.peak_positions, session.steps), (evictions, peak, count));
                let rate = if lookups == 0 { 0.0 } else { hits as f64 / lookups as f64 };
                prop_assert_eq!((trace.hit_rate, session.hit_rate()), (rate, rate));
                prop_assert_eq!(trace.size_bytes, 96 * reserved as u64);
                let empty = (reserved - state.valid) as f64;
                let fragmentation = if reserved == 0 { 0.0 } else { empty / reserved as f64 };
                prop_assert_eq!(trace.fragmentation, fragmentation);
                prop_assert!(session.bytes() <= max_bytes);
                prop_assert_eq!(session.recent().len() as u64, count.min(most as u64));
                prop_assert_eq!(session.recent().back(), Some(&trace));
            }
        }
    }

    #[test]
    fn another_executor_counts_from_the_beginning() {
        let mut session = KvSession::default();
        let state = |evictions| KvState { evictions, lookups: 2, hits: 1, ..KvState::default() };
        session.add(&state(5), 1 << 20);
        session.open(8);
        session.add(&state(6), 1 << 20);
        assert_eq!((session.evictions, session.hit_rate()), (11, 0.5));
    }
}
