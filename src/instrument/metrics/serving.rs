//! What is counted over all requests: tokens, how fast they come, how requests end, and how busy stages are.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::snapshot::{Bandwidth, Distribution, Occupancy, Requests, StageFigures, Tokens};
use super::times::StageTimes;
use crate::instrument::{KvState, Outcome, StageFacts, StepSlice};

/// Upper bounds in seconds of the buckets of the time to first token.
const TTFT_BOUNDS: [f64; 17] =
    [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 60.0];

/// Upper bounds in seconds of the buckets of the time from token to token.
const INTER_TOKEN_BOUNDS: [f64; 17] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5];

/// Longer times count as this, an hour.
const LONGEST_US: u64 = 3_600_000_000;

/// Times in microseconds, to three digits, and in fixed buckets.
#[derive(Debug)]
struct Times {
    /// `None` is never the case: the bounds are constants that the crate takes.
    histogram: Option<Histogram<u64>>,
    sum: Duration,
    bounds: &'static [f64],
    /// Samples in each bucket, the last without a bound.
    counts: Vec<u64>,
}

impl Times {
    fn new(bounds: &'static [f64]) -> Times {
        let histogram = Histogram::new_with_bounds(1, LONGEST_US, 3).ok();
        Times { histogram, sum: Duration::ZERO, bounds, counts: vec![0; bounds.len() + 1] }
    }

    fn add(&mut self, time: Duration) {
        self.sum += time;
        let bucket = self.bounds.partition_point(|&bound| bound < time.as_secs_f64());
        self.counts[bucket] += 1;
        if let Some(histogram) = &mut self.histogram {
            histogram.saturating_record((time.as_micros() as u64).clamp(1, LONGEST_US));
        }
    }

    fn distribution(&self) -> Distribution {
        let quantile = |q| self.histogram.as_ref().map_or(0, |histogram| histogram.value_at_quantile(q));
        let mut up_to = 0;
        let buckets = self.bounds.iter().zip(&self.counts).map(|(&bound, count)| {
            up_to += count;
            (bound, up_to)
        });
        Distribution {
            buckets: buckets.collect(),
            count: self.counts.iter().sum(),
            sum: self.sum.as_secs_f64(),
            p50_us: quantile(0.50),
            p95_us: quantile(0.95),
            p99_us: quantile(0.99),
            max_us: self.histogram.as_ref().map_or(0, Histogram::max),
        }
    }
}

/// Tokens in slices of time.
#[derive(Debug)]
struct Throughput {
    began: Instant,
    /// Number of the last slice in `slices`.
    slice: u64,
    slices: VecDeque<u32>,
}

impl Throughput {
    const SLICE: Duration = Duration::from_millis(250);
    const SLICES: usize = 240;

    fn new(began: Instant) -> Throughput {
        Throughput { began, slice: 0, slices: VecDeque::from([0]) }
    }

    fn number(&self, at: Instant) -> u64 {
        (at.saturating_duration_since(self.began).as_nanos() / Self::SLICE.as_nanos()) as u64
    }

    /// Slices without tokens are slices too.
    fn advance(&mut self, at: Instant) {
        let number = self.number(at);
        let missing = number.saturating_sub(self.slice).min(Self::SLICES as u64);
        self.slices.extend((0..missing).map(|_| 0));
        self.slice = self.slice.max(number);
        while self.slices.len() > Self::SLICES {
            self.slices.pop_front();
        }
    }

    /// An event that is a little late belongs to the slice in which it happened.
    fn add(&mut self, at: Instant) {
        self.advance(at);
        let back = (self.slice - self.number(at)) as usize;
        if let Some(slice) = self.slices.iter_mut().rev().nth(back) {
            *slice += 1;
        }
    }

    /// Tokens a second in the latest second of whole slices.
    fn per_second(&self) -> f64 {
        let second = (1.0 / Self::SLICE.as_secs_f64()) as usize;
        let whole = self.slices.iter().rev().skip(1).take(second);
        whole.map(|&tokens| f64::from(tokens)).sum()
    }
}

/// Steps that [`StageFigures::recent`] looks back at.
const RECENT_STEPS: usize = 64;

/// One stage's counts.
#[derive(Debug)]
struct StageCounts {
    facts: StageFacts,
    figures: StageFigures,
    times: StageTimes,
    recent: VecDeque<StageTimes>,
    /// Numbers of the decode steps under way, and the bytes of each.
    sent: VecDeque<(u64, u64)>,
    /// Bytes and time of the latest decode steps.
    decodes: VecDeque<(u64, Duration)>,
}

impl StageCounts {
    /// Bytes that a decode step of these rows must read: the weights once, and the KV that each row looks at.
    fn decode_bytes(&self, slices: &[StepSlice]) -> u64 {
        let layers = self.facts.layers.max(1) as u64;
        let layer_bytes = self.facts.kv_bytes_per_position / layers;
        let windows = &self.facts.windows;
        let positions = |slice: &StepSlice| -> u64 {
            let seen = slice.position + slice.rows;
            let of = |window: &Option<usize>| window.map_or(seen, |window| seen.min(window)) as u64;
            let unlisted = layers.saturating_sub(windows.len() as u64) * seen as u64;
            windows.iter().map(of).sum::<u64>() + unlisted
        };
        self.facts.step_bytes + slices.iter().map(positions).sum::<u64>() * layer_bytes
    }

    fn figures(&self) -> StageFigures {
        let sum = |of: fn(&StageTimes) -> Duration| self.recent.iter().map(of).sum::<Duration>().as_secs_f64();
        let (bytes, time) =
            self.decodes.iter().fold((0, 0.0), |(bytes, time), step| (bytes + step.0, time + step.1.as_secs_f64()));
        let StageTimes { compute, copy, queued, wait } = self.times;
        StageFigures {
            compute: compute.as_secs_f64(),
            wait: wait.as_secs_f64(),
            copy: copy.as_secs_f64(),
            queued: queued.as_secs_f64(),
            recent: Occupancy::of(sum(|times| times.compute), sum(|times| times.wait), sum(|times| times.copy)),
            bandwidth: Bandwidth {
                step_bytes: self.decodes.back().map_or(0, |(bytes, _)| *bytes),
                bytes_per_second: if time > 0.0 { bytes as f64 / time } else { 0.0 },
                ..self.figures.bandwidth
            },
            ..self.figures.clone()
        }
    }
}

/// All that is counted.
#[derive(Debug)]
pub(super) struct Counts {
    window: usize,
    stages: Vec<StageCounts>,
    waiting: HashSet<u64>,
    running: HashSet<u64>,
    received: u64,
    finished: HashMap<&'static str, u64>,
    errors: HashMap<&'static str, u64>,
    tokens: Tokens,
    throughput: Throughput,
    ttft: Times,
    inter_token: Times,
}

impl Counts {
    pub(super) fn new(
        began: Instant,
        stages: &[StageFacts],
        window: usize,
        device_bandwidth: &BTreeMap<String, f64>,
    ) -> Counts {
        let stage = |facts: &StageFacts| StageCounts {
            figures: StageFigures {
                device: facts.device.clone(),
                first_layer: facts.first_layer,
                layers: facts.layers,
                bandwidth: Bandwidth {
                    device_bytes_per_second: device_bandwidth.get(&facts.device).copied(),
                    ..Bandwidth::default()
                },
                ..StageFigures::default()
            },
            facts: facts.clone(),
            times: StageTimes::default(),
            recent: VecDeque::new(),
            sent: VecDeque::new(),
            decodes: VecDeque::new(),
        };
        Counts {
            window,
            stages: stages.iter().map(stage).collect(),
            waiting: HashSet::new(),
            running: HashSet::new(),
            received: 0,
            finished: HashMap::new(),
            errors: HashMap::new(),
            tokens: Tokens::default(),
            throughput: Throughput::new(began),
            ttft: Times::new(&TTFT_BOUNDS),
            inter_token: Times::new(&INTER_TOKEN_BOUNDS),
        }
    }

    pub(super) fn queued(&mut self, request: u64) {
        self.received += 1;
        self.waiting.insert(request);
    }

    pub(super) fn started(&mut self, request: u64, prompt_tokens: usize) {
        self.waiting.remove(&request);
        self.running.insert(request);
        self.tokens.prompt += prompt_tokens as u64;
    }

    pub(super) fn reused(&mut self, tokens: usize) {
        self.tokens.reused += tokens as u64;
        self.tokens.prefix_hits += 1;
    }

    pub(super) fn finished(&mut self, request: u64, outcome: Outcome) {
        self.waiting.remove(&request);
        self.running.remove(&request);
        *self.finished.entry(outcome.name()).or_default() += 1;
        if let Outcome::Error(kind) = outcome {
            *self.errors.entry(kind).or_default() += 1;
        }
    }

    /// The scheduler's own count ends what a dropped event has left open.
    pub(super) fn kv(&mut self, state: &KvState) {
        if state.sequences == 0 {
            self.running.clear();
        }
        if state.waiting == 0 {
            self.waiting.clear();
        }
    }

    pub(super) fn sent(&mut self, step: u64, slices: &[StepSlice]) {
        let prefilled: usize = slices.iter().filter(|slice| slice.prefill).map(|slice| slice.rows).sum();
        self.tokens.prefilled += prefilled as u64;
        if prefilled == 0 {
            for stage in &mut self.stages {
                stage.sent.push_back((step, stage.decode_bytes(slices)));
                // One that is passed by is never computed.
                while stage.sent.len() > RECENT_STEPS {
                    stage.sent.pop_front();
                }
            }
        }
    }

    pub(super) fn computed(&mut self, stage: usize, step: u64, rows: usize, bytes: u64, times: StageTimes) {
        let Some(stage) = self.stages.get_mut(stage) else { return };
        if let Some(index) = stage.sent.iter().position(|(sent, _)| *sent == step)
            && let Some((_, bytes)) = stage.sent.remove(index)
        {
            stage.decodes.push_back((bytes, times.compute));
            while stage.decodes.len() > self.window {
                stage.decodes.pop_front();
            }
        }
        let figures = &mut stage.figures;
        figures.steps += 1;
        figures.rows += rows as u64;
        figures.transfer_bytes += bytes;
        let all = &mut stage.times;
        all.compute += times.compute;
        all.copy += times.copy;
        all.queued += times.queued;
        all.wait += times.wait;
        stage.recent.push_back(times);
        while stage.recent.len() > RECENT_STEPS {
            stage.recent.pop_front();
        }
    }

    pub(super) fn sampled(&mut self, at: Instant, index: usize, since: Duration) {
        self.tokens.generated += 1;
        self.throughput.add(at);
        match index {
            0 => self.ttft.add(since),
            _ => self.inter_token.add(since),
        }
    }

    pub(super) fn stages(&self) -> Vec<StageFigures> {
        self.stages.iter().map(StageCounts::figures).collect()
    }

    pub(super) fn requests(&self) -> Requests {
        // Every outcome is shown, so that a reader need not know that an absent one is 0.
        let outcomes = [Outcome::Stop, Outcome::Length, Outcome::Cancelled, Outcome::Deadline, Outcome::Error("")];
        let count = |name| self.finished.get(name).copied().unwrap_or(0);
        Requests {
            received: self.received,
            waiting: self.waiting.len() as u64,
            running: self.running.len() as u64,
            finished: outcomes.iter().map(|outcome| (outcome.name(), count(outcome.name()))).collect(),
            errors: self.errors.iter().map(|(&kind, &count)| (kind, count)).collect(),
        }
    }

    pub(super) fn tokens(&mut self, now: Instant) -> Tokens {
        self.throughput.advance(now);
        Tokens {
            per_second: self.throughput.per_second(),
            history: self.throughput.slices.iter().copied().collect(),
            history_slice: Throughput::SLICE.as_secs_f64(),
            ttft: self.ttft.distribution(),
            inter_token: self.inter_token.distribution(),
            ..self.tokens.clone()
        }
    }
}
