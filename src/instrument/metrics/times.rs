//! Where the time of steps goes: puts together what the stages tell of each step, and keeps the latest few.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::snapshot::{Latency, LayerLatency, StageLatency, Timing};
use crate::instrument::{Lap, Phase};

/// Steps under way that are kept; one that is passed by never ends, and makes way here.
const MOST_OPEN_STEPS: usize = 256;

/// The latest few of a time.
#[derive(Debug, Default)]
pub(super) struct Rolling(VecDeque<u64>);

impl Rolling {
    pub(super) fn push(&mut self, window: usize, time: Duration) {
        self.0.push_back(time.as_nanos() as u64);
        while self.0.len() > window {
            self.0.pop_front();
        }
    }

    pub(super) fn timing(&self) -> Timing {
        timing(self.0.iter().copied())
    }
}

/// The last and the mean of some times.
fn timing(times: impl Iterator<Item = u64>) -> Timing {
    let (mut last_ns, mut sum, mut count) = (0, 0u64, 0);
    for time in times {
        (last_ns, sum, count) = (time, sum.saturating_add(time), count + 1);
    }
    Timing { last_ns, average_ns: sum / count.max(1) }
}

/// What a stage told of one step.
#[derive(Debug, Clone, Default)]
pub(super) struct StageTimes {
    pub(super) compute: Duration,
    pub(super) copy: Duration,
    pub(super) queued: Duration,
    pub(super) wait: Duration,
}

#[derive(Debug, Clone, Default)]
struct StageSample {
    times: Option<StageTimes>,
    laps: Option<Vec<Lap>>,
}

/// A step under way.
#[derive(Debug)]
struct OpenStep {
    sent: Instant,
    ended: Option<Instant>,
    stages: Vec<StageSample>,
}

/// A step that all stages have told of.
#[derive(Debug)]
struct StepSample {
    trip: Duration,
    stages: Vec<(StageTimes, Vec<Lap>)>,
}

/// The latest steps.
#[derive(Debug, Default)]
pub(super) struct Steps {
    /// Whether a step without phases is left out.
    phases: bool,
    window: usize,
    stages: usize,
    /// By number, in the order in which they were sent: few, so that they are found by looking through them.
    open: VecDeque<(u64, OpenStep)>,
    /// What steps that have ended kept their samples in, for the next.
    spare: Vec<Vec<StageSample>>,
    /// The step that the first stage told of last.
    computed_first: Option<u64>,
    latest: VecDeque<StepSample>,
}

impl Steps {
    pub(super) fn new(stages: usize, window: usize, phases: bool) -> Steps {
        Steps { phases, window, stages, ..Steps::default() }
    }

    /// Steps that not all has been told of yet.
    #[cfg(test)]
    pub(super) fn open(&self) -> usize {
        self.open.len()
    }

    pub(super) fn sent(&mut self, step: u64, at: Instant) {
        let mut stages = self.spare.pop().unwrap_or_default();
        stages.clear();
        stages.resize(self.stages, StageSample::default());
        self.open.push_back((step, OpenStep { sent: at, ended: None, stages }));
        while self.open.len() > MOST_OPEN_STEPS {
            self.open.pop_front();
        }
    }

    fn under_way(&mut self, step: u64) -> Option<&mut OpenStep> {
        self.open.iter_mut().find(|(sent, _)| *sent == step).map(|(_, open)| open)
    }

    fn forget(&mut self, step: u64) {
        let index = self.open.iter().position(|(sent, _)| *sent == step);
        if let Some((_, open)) = index.and_then(|index| self.open.remove(index)) {
            self.spare.push(open.stages);
        }
    }

    /// A stage is done with a step at `at`.
    pub(super) fn computed(&mut self, stage: usize, step: u64, at: Instant, times: StageTimes) {
        if stage == 0 {
            // A stage tells the phases of a step before it tells of the next one, or never.
            let before = self.computed_first.replace(step).filter(|_| self.phases);
            let lacks_phases = |open: &mut OpenStep| open.stages.first().is_some_and(|sample| sample.laps.is_none());
            if let Some(before) = before.filter(|&before| self.under_way(before).is_some_and(lacks_phases)) {
                self.forget(before);
            }
        }
        let Some(open) = self.under_way(step) else { return };
        let Some(sample) = open.stages.get_mut(stage) else { return };
        sample.times = Some(times);
        open.ended = Some(at);
        self.close(step);
    }

    pub(super) fn phases(&mut self, stage: usize, step: u64, laps: &[Lap]) {
        if !self.phases {
            return;
        }
        if let Some(sample) = self.under_way(step).and_then(|open| open.stages.get_mut(stage)) {
            sample.laps = Some(laps.to_vec());
            self.close(step);
        }
    }

    /// Takes in a step once all stages have told all of it.
    fn close(&mut self, step: u64) {
        let phases = self.phases;
        let Some(OpenStep { sent, ended: Some(ended), stages }) = self.under_way(step) else { return };
        let whole = |sample: &StageSample| {
            let laps = if phases { sample.laps.clone()? } else { Vec::new() };
            Some((sample.times.clone()?, laps))
        };
        let Some(stages) = stages.iter().map(whole).collect() else { return };
        let trip = ended.saturating_duration_since(*sent);
        self.latest.push_back(StepSample { trip, stages });
        self.forget(step);
        while self.latest.len() > self.window {
            self.latest.pop_front();
        }
    }

    /// A sum over each of the latest steps.
    fn timing(&self, of: impl Fn(&StepSample) -> Duration) -> Timing {
        timing(self.latest.iter().map(|sample| of(sample).as_nanos() as u64))
    }

    /// Fills in what steps tell.
    pub(super) fn fill(&self, latency: &mut Latency) {
        let sum = |of: fn(&StageTimes) -> Duration| {
            self.timing(|sample| sample.stages.iter().map(|(times, _)| of(times)).sum())
        };
        latency.step = self.timing(|sample| sample.trip);
        latency.queue = sum(|times| times.queued);
        latency.forward = sum(|times| times.compute);
        latency.transfer = sum(|times| times.copy);
        latency.stages = (0..self.stages).map(|stage| self.stage(stage)).collect();
    }

    fn stage(&self, stage: usize) -> StageLatency {
        let of = |of: fn(&StageTimes) -> Duration| self.timing(|sample| of(&sample.stages[stage].0));
        let laps = |wanted: &dyn Fn(&Lap) -> bool| {
            self.timing(|sample| {
                let laps = sample.stages[stage].1.iter();
                laps.filter(|lap| wanted(lap)).map(|lap| lap.duration).sum()
            })
        };
        // What there is, in the order in which it was told.
        let told = self.latest.back().map_or(&[][..], |sample| &sample.stages[stage].1);
        let edge = |phase| {
            let there = told.iter().any(|lap| lap.layer.is_none() && lap.phase == phase);
            there.then(|| laps(&|lap| lap.layer.is_none() && lap.phase == phase))
        };
        let mut layers: Vec<LayerLatency> = Vec::new();
        for lap in told {
            let Some(layer) = lap.layer else { continue };
            if layers.last().is_none_or(|last| last.layer != layer) {
                let total = laps(&|lap| lap.layer == Some(layer));
                layers.push(LayerLatency { layer, total, phases: Vec::new() });
            }
            let Some(last) = layers.last_mut() else { continue };
            if last.phases.iter().all(|(phase, _)| *phase != lap.phase) {
                let phase = lap.phase;
                last.phases.push((phase, laps(&|lap| lap.layer == Some(layer) && lap.phase == phase)));
            }
        }
        StageLatency {
            compute: of(|times| times.compute),
            copy: of(|times| times.copy),
            queued: of(|times| times.queued),
            wait: of(|times| times.wait),
            input: edge(Phase::Embedding),
            layers,
            output: edge(Phase::Output),
        }
    }
}
