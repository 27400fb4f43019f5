//! Which rows go into the next micro-batch: pure functions of counts and measured times, no threads and no sequences.

use std::time::Duration;

/// How many rows each sequence in turn puts into a micro-batch.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Composition {
    /// Sequences at the front of the decode queue, with one row each.
    pub decodes: usize,
    /// Rows of the sequences at the front of the prefill queue.
    pub chunks: Vec<usize>,
}

impl Composition {
    /// Whether there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.decodes == 0 && self.chunks.is_empty()
    }
}

/// Composes a micro-batch: decode steps first, up to `decode_rows`, then chunks of the prompts in turn until
/// `prefill_rows` are reached. `pending` are the rows that each sequence in prefill has left.
pub fn compose(
    ready_decodes: usize,
    pending: impl IntoIterator<Item = usize>,
    decode_rows: usize,
    prefill_rows: usize,
) -> Composition {
    let mut room = prefill_rows;
    let mut chunks = Vec::new();
    for rows in pending {
        if room == 0 {
            break;
        }
        let chunk = rows.min(room);
        room -= chunk;
        chunks.push(chunk);
    }
    Composition { decodes: ready_decodes.min(decode_rows), chunks }
}

/// Decode rows of the next micro-batch, so that all `micro_batches` have work and none has more than its share:
/// `decoding` sequences in all, of which `ready` wait for one of the `free` micro-batches.
pub fn decode_rows(decoding: usize, micro_batches: usize, ready: usize, free: usize) -> usize {
    decoding.div_ceil(micro_batches).min(ready.div_ceil(free))
}

/// How many times longer than a pure decode step a micro-batch with prefill may take. Noise comes on top, and streams
/// should stay below 2.5 times their undisturbed inter-token latency.
const MOST_SLOWDOWN: f64 = 2.0;

/// Where only whole tiles of rows can be added: the part of one by which a micro-batch may exceed that.
const SLACK: f64 = 0.2;

/// After this many micro-batches with prefill one goes without, so that the time of a pure decode step stays known.
const MEASURE_EVERY: usize = 16;

/// Weight of a new measurement in the running mean.
const NEWEST: f64 = 0.3;

/// Rows of prefill that a micro-batch has room for: Sarathi-Serve's token budget, given or kept by measurement.
#[derive(Debug)]
pub struct TokenBudget {
    prefill_chunk: usize,
    given: Option<usize>,
    rows_at_a_time: usize,
    /// Seconds that the slowest stage takes for a micro-batch of decode steps.
    decode: Option<f64>,
    /// Seconds that `rows_at_a_time` rows of prefill add to it.
    more: Option<f64>,
    /// Micro-batches with prefill since the last one without.
    mixed: usize,
}

impl TokenBudget {
    /// `prefill_chunk` rows while nothing decodes; otherwise `given` rows in all, or as many as measurement allows. One row
    /// more than a multiple of `rows_at_a_time` takes as long as so many more.
    pub fn new(prefill_chunk: usize, given: Option<usize>, rows_at_a_time: usize) -> Self {
        TokenBudget { prefill_chunk, given, rows_at_a_time, decode: None, more: None, mixed: 0 }
    }

    /// Rows of prefill for a micro-batch with `decode_rows` decode steps, while `decoding` sequences decode.
    pub fn prefill_rows(&self, decoding: usize, decode_rows: usize) -> usize {
        if decoding == 0 {
            return self.prefill_chunk;
        }
        if let Some(given) = self.given {
            // A prompt always gets on, however many decode.
            return given.saturating_sub(decode_rows).clamp(1, self.prefill_chunk);
        }
        let Some(decode) = self.decode else { return 0 }; // known as soon as the first decode steps have landed
        if self.mixed >= MEASURE_EVERY && decode_rows > 0 {
            return 0;
        }
        let more = self.more.unwrap_or(decode).max(f64::MIN_POSITIVE);
        let slack = if self.rows_at_a_time > 1 { SLACK } else { 0.0 };
        let times = (decode * (MOST_SLOWDOWN - 1.0) / more + slack).min(self.prefill_chunk as f64) as usize;
        // What decode steps leave free of their own costs nothing, and a prompt always gets on.
        let begun = decode_rows.next_multiple_of(self.rows_at_a_time);
        let rows = begun + times * self.rows_at_a_time - decode_rows;
        (if rows == 0 { self.rows_at_a_time } else { rows }).min(self.prefill_chunk)
    }

    /// Learns from a micro-batch that has come out; `slowest` is the longest that a stage computed it.
    pub fn landed(&mut self, decode_rows: usize, prefill_rows: usize, slowest: Duration) {
        let seconds = slowest.as_secs_f64();
        let learn = |known: &mut Option<f64>, value: f64| {
            *known = Some(known.map_or(value, |known| known + (value - known) * NEWEST));
        };
        match prefill_rows {
            0 => {
                learn(&mut self.decode, seconds);
                self.mixed = 0;
            }
            rows => {
                let times = |rows: usize| rows.div_ceil(self.rows_at_a_time);
                let begun = times(decode_rows + rows) - times(decode_rows);
                if begun > 0 {
                    let added = seconds - self.decode.unwrap_or(0.0);
                    learn(&mut self.more, added.max(0.0) / begun as f64);
                }
                self.mixed += usize::from(decode_rows > 0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    #[test]
    fn decode_steps_come_first_and_prompts_fill_the_rest_in_turn() {
        let composed = |decodes, pending: &[usize], decode_rows, prefill_rows| {
            let Composition { decodes, chunks } = compose(decodes, pending.iter().copied(), decode_rows, prefill_rows);
            (decodes, chunks)
        };
        assert_eq!(composed(3, &[], 8, 256), (3, vec![]));
        assert_eq!(composed(9, &[], 4, 256), (4, vec![]));
        assert_eq!(composed(2, &[100, 500], 4, 256), (2, vec![100, 156]));
        assert_eq!(composed(0, &[5, 6, 7], 4, 256), (0, vec![5, 6, 7]));
        assert_eq!(composed(2, &[100], 4, 0), (2, vec![]));
        assert!(compose(0, [], 4, 256).is_empty() && compose(0, [9], 4, 0).is_empty());
    }

    #[test]
    fn sequences_spread_evenly_over_the_micro_batches() {
        for stages in 1..5 {
            for decoding in 1..20 {
                // All are ready at once; micro-batches then land in the order in which they were sent.
                let (mut ready, mut in_flight) = (decoding, VecDeque::new());
                for round in 0..10 * stages {
                    while in_flight.len() < stages {
                        let most = decode_rows(decoding, stages, ready, stages - in_flight.len());
                        let rows = compose(ready, [], most, 0).decodes;
                        if rows == 0 {
                            break;
                        }
                        ready -= rows;
                        in_flight.push_back(rows);
                    }
                    assert_eq!(in_flight.len(), stages.min(decoding), "{decoding} over {stages}, round {round}");
                    let (least, most) = (in_flight.iter().min(), in_flight.iter().max());
                    assert!(most.unwrap() - least.unwrap() <= 1, "{in_flight:?}");
                    ready += in_flight.pop_front().unwrap();
                }
            }
        }
    }

    #[test]
    fn uneven_micro_batches_even_out() {
        // One of eight is in flight alone, seven land together.
        let first = decode_rows(8, 2, 7, 1);
        assert_eq!(first, 4);
        assert_eq!(decode_rows(8, 2, 7 - first + 1, 1), 4);
    }

    const MS: Duration = Duration::from_millis(1);

    /// A device that takes 10 ms for a micro-batch and `row` more for each row of prefill.
    fn settle(budget: &mut TokenBudget, row: Duration) -> Duration {
        let mut longest = Duration::ZERO;
        for step in 0..200 {
            let rows = budget.prefill_rows(4, 4);
            let time = 10 * MS + row * rows as u32;
            if step >= 20 {
                longest = longest.max(time);
            }
            budget.landed(4, rows, time);
        }
        longest
    }

    #[test]
    fn prefill_beside_decode_takes_as_long_as_streams_can_bear() {
        for row in [MS / 50, MS / 5, MS, 4 * MS] {
            let mut budget = TokenBudget::new(256, None, 1);
            assert_eq!(budget.prefill_rows(0, 0), 256);
            budget.landed(0, 256, 256 * row);
            assert_eq!(budget.prefill_rows(4, 4), 0, "the first decode step is measured alone");
            let longest = settle(&mut budget, row);
            assert!(longest <= 21 * MS, "{row:?} a row: {longest:?}");
            let rows = budget.prefill_rows(4, 0) as u128;
            let best = (10 * MS).as_nanos() / row.as_nanos();
            assert!(rows >= best.min(256) * 8 / 10, "{row:?} a row: {rows} rows");
            assert_eq!(budget.prefill_rows(0, 0), 256);
        }
    }

    #[test]
    fn the_budget_follows_a_change_of_speed() {
        let mut budget = TokenBudget::new(256, None, 1);
        settle(&mut budget, MS / 10);
        let many = budget.prefill_rows(4, 0);
        assert!(settle(&mut budget, MS) <= 21 * MS);
        assert!(budget.prefill_rows(4, 0) < many / 5);
        settle(&mut budget, MS / 10);
        assert!(budget.prefill_rows(4, 0) > many * 8 / 10);
    }

    #[test]
    fn a_slow_row_still_gets_through_and_a_given_budget_is_kept() {
        let mut budget = TokenBudget::new(256, None, 1);
        settle(&mut budget, 100 * MS);
        assert_eq!(budget.prefill_rows(4, 0), 1);
        let given = TokenBudget::new(256, Some(64), 1);
        assert_eq!((given.prefill_rows(0, 0), given.prefill_rows(16, 16), given.prefill_rows(80, 80)), (256, 48, 1));
    }

    #[test]
    fn rows_that_come_by_sixteen_fill_sixteen_and_never_begin_what_takes_too_long() {
        // 10 ms for the first sixteen, decode steps among them, and so much for sixteen more.
        for (more, decode_rows, expected) in
            [(4, 4, 44), (4, 16, 32), (9, 4, 28), (12, 4, 28), (15, 4, 12), (30, 16, 16)]
        {
            let mut budget = TokenBudget::new(256, None, 16);
            let mut all = Vec::new();
            for _ in 0..200 {
                let rows = budget.prefill_rows(decode_rows, decode_rows);
                let sixteens = (decode_rows + rows).div_ceil(16) as u32;
                budget.landed(decode_rows, rows, 10 * MS + more * MS * (sixteens - 1));
                all.push(rows);
            }
            let settled = all.into_iter().skip(20).filter(|&rows| rows > 0);
            let settled: std::collections::BTreeSet<usize> = settled.collect();
            assert_eq!(settled, [expected].into(), "{more} ms for sixteen more than {decode_rows}");
        }
        assert_eq!(TokenBudget::new(100, None, 16).prefill_rows(0, 0), 100);
    }
}
