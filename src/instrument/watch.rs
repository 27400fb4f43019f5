//! What a forward pass is asked about, gathered while it runs. A backend calls a [`Watch`] at fixed places; where nobody
//! asks, each call is a test of one field.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::stats::distance;
use super::{
    AttentionFilter, Event, Interest, Lap, LayerActivations, LensInterest, LensLayer, Phase, Probe, TensorStats,
    TokenRank,
};

/// The output of a layer in one row, on its way to the head.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HiddenRow {
    /// The request's number.
    pub request: u64,
    /// Position of the row.
    pub position: usize,
    /// Layer in the model.
    pub layer: usize,
    /// The residual stream behind it: (hidden_size).
    pub values: Vec<f32>,
}

/// Whether the phases of a step are told. The first stage decides and the others follow, so that of a step all stages tell
/// them or none does, and what they tell adds up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum StepPhases {
    /// No stage has looked at the step yet.
    #[default]
    Undecided,
    /// They are told.
    Told,
    /// They are not.
    Untold,
}

/// A stage's side of a [`Probe`]: makes a [`Watch`] for each step.
pub struct Watcher {
    probe: Probe,
    stage: usize,
    /// When phases were last told.
    phases_told: Option<Instant>,
}

impl Watcher {
    /// For stage number `stage`.
    pub fn new(probe: Probe, stage: usize) -> Watcher {
        Watcher { probe, stage, phases_told: None }
    }

    /// For the step that begins now. `hidden` are the rows that earlier stages have gathered of it, and `phases` is what
    /// they have decided.
    pub fn watch(&mut self, step: u64, hidden: Vec<HiddenRow>, phases: &mut StepPhases) -> Watch {
        let Some(interest) = self.probe.interest() else { return Watch::off() };
        let now = Instant::now();
        if *phases == StepPhases::Undecided {
            let due = |interval| self.phases_told.is_none_or(|told| now.duration_since(told) >= interval);
            *phases = if interest.phases.is_some_and(due) { StepPhases::Told } else { StepPhases::Untold };
            if *phases == StepPhases::Told {
                self.phases_told = Some(now);
            }
        }
        let Interest { activations, attention, lens, .. } = interest;
        if *phases != StepPhases::Told && !activations && attention.is_none() && lens.is_none() {
            return Watch::off();
        }
        let laps = (*phases == StepPhases::Told).then(|| Laps {
            started: now,
            last: now,
            laps: Vec::new(),
            synchronise: interest.synchronise,
        });
        Watch {
            activations: activations.then(Activations::default),
            attention: attention.clone(),
            hidden: lens.is_some().then_some(hidden),
            laps,
            probe: self.probe.clone(),
            stage: self.stage,
            step,
        }
    }
}

/// What one step of one stage is watched for.
pub struct Watch {
    laps: Option<Laps>,
    activations: Option<Activations>,
    attention: Option<AttentionFilter>,
    hidden: Option<Vec<HiddenRow>>,
    probe: Probe,
    stage: usize,
    step: u64,
}

struct Laps {
    started: Instant,
    last: Instant,
    laps: Vec<Lap>,
    synchronise: bool,
}

#[derive(Default)]
struct Activations {
    layers: Vec<LayerActivations>,
    input: Vec<f32>,
    input_stats: Option<TensorStats>,
    taps: [Option<TensorStats>; 3],
}

/// A place within a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tap {
    /// After the norm before attention.
    PostNorm,
    /// What attention adds to the residual stream, before a residual multiplier.
    PostAttention,
    /// What the MLP adds to the residual stream, before a residual multiplier.
    PostFfn,
}

impl Watch {
    /// Nobody asks.
    pub fn off() -> Watch {
        Watch {
            laps: None,
            activations: None,
            attention: None,
            hidden: None,
            probe: Probe::default(),
            stage: 0,
            step: 0,
        }
    }

    /// Asked for all of `interest`, with the events going to `probe`: for a backend that is driven by hand.
    pub fn of(interest: &Interest, probe: Probe) -> Watch {
        let now = Instant::now();
        let synchronise = interest.synchronise;
        Watch {
            laps: interest.phases.map(|_| Laps { started: now, last: now, laps: Vec::new(), synchronise }),
            activations: interest.activations.then(Activations::default),
            attention: interest.attention.clone(),
            hidden: interest.lens.is_some().then(Vec::new),
            probe,
            stage: 0,
            step: 0,
        }
    }

    /// Whether the device is to be waited for before [`lap`](Self::lap).
    pub fn synchronises(&self) -> bool {
        self.laps.as_ref().is_some_and(|laps| laps.synchronise)
    }

    /// What was computed since the last lap was this.
    pub fn lap(&mut self, layer: Option<usize>, phase: Phase) {
        if let Some(laps) = &mut self.laps {
            let now = Instant::now();
            laps.laps.push(Lap { layer, phase, duration: now - laps.last });
            laps.last = now;
        }
    }

    /// Whether values from within the layers are wanted, which fused kernels do not give.
    pub fn looks_inside(&self) -> bool {
        self.activations.is_some() || self.attention.is_some() || self.hidden.is_some()
    }

    /// Whether [`layer_input`](Self::layer_input), [`tap`](Self::tap) and [`layer_output`](Self::layer_output) are wanted.
    pub fn wants_activations(&self) -> bool {
        self.activations.is_some()
    }

    /// The residual stream before a layer: (rows, hidden_size).
    pub fn layer_input(&mut self, x: &[f32]) {
        if let Some(activations) = &mut self.activations {
            activations.input.clear();
            activations.input.extend_from_slice(x);
            // What one layer puts out the next takes in.
            let before = activations.layers.last().map(|layer| layer.output);
            activations.input_stats = Some(before.unwrap_or_else(|| TensorStats::of(x)));
        }
    }

    /// Values within the layer.
    pub fn tap(&mut self, tap: Tap, values: &[f32]) {
        if let Some(activations) = &mut self.activations {
            activations.taps[tap as usize] = Some(TensorStats::of(values));
        }
    }

    /// The residual stream after a layer: (rows, hidden_size).
    pub fn layer_output(&mut self, layer: usize, x: &[f32]) {
        let Some(activations) = &mut self.activations else { return };
        let nothing = TensorStats::of(&[]);
        let added = distance(&activations.input, x);
        let input = activations.input_stats.take().unwrap_or(nothing);
        let [post_norm, post_attention, post_ffn] =
            std::mem::take(&mut activations.taps).map(|stats| stats.unwrap_or(nothing));
        activations.layers.push(LayerActivations {
            layer,
            input,
            post_norm,
            post_attention,
            post_ffn,
            output: TensorStats::of(x),
            residual_ratio: if input.l2 > 0.0 { added / input.l2 } else { 0.0 },
        });
    }

    /// The heads that are watched in a layer, if any.
    pub fn attention_of(&self, layer: usize) -> Option<AttentionFilter> {
        self.attention.as_ref().filter(|filter| filter.has_layer(layer)).cloned()
    }

    /// Attention weights of one head in one row: of the positions from `first` to `position`.
    pub fn attention(&self, request: u64, layer: usize, head: usize, first: usize, position: usize, weights: Vec<f32>) {
        let step = self.step;
        self.probe.emit(|| Event::Attention { request, step, layer, head, position, first, weights });
    }

    /// Whether the outputs of layers are wanted, in the last row of slices with logits.
    pub fn wants_hidden(&self) -> bool {
        self.hidden.is_some()
    }

    /// The output of a layer in one row.
    pub fn hidden(&mut self, request: u64, position: usize, layer: usize, values: &[f32]) {
        if let Some(hidden) = &mut self.hidden {
            hidden.push(HiddenRow { request, position, layer, values: values.to_vec() });
        }
    }

    /// The forward pass is over: tells what was gathered, and gives back the rows for the head.
    pub fn finish(self, rows: usize) -> Vec<HiddenRow> {
        let Watch { laps, activations, hidden, probe, stage, step, .. } = self;
        if let Some(Laps { started, last, laps, .. }) = laps {
            probe.emit_at(last, || Event::Phases { stage, step, started, laps });
        }
        if let Some(Activations { layers, .. }) = activations {
            probe.emit(|| Event::Activations { stage, step, rows, layers });
        }
        hidden.unwrap_or_default()
    }
}

/// The tokens to follow through the layers: those asked for, or the most likely of the last layer.
pub fn lens_tokens(interest: &LensInterest, last: &[f32]) -> Vec<u32> {
    match interest.tokens.as_slice() {
        [] => top(last, interest.top_k.max(1)).into_iter().map(|(token, _)| token).collect(),
        tokens => tokens.to_vec(),
    }
}

/// What one row's layers say, from the logits of each: (layer, logits) in order.
pub fn lens_layers(interest: &LensInterest, logits: &[(usize, Vec<f32>)]) -> Vec<LensLayer> {
    let Some((_, last)) = logits.last() else { return Vec::new() };
    let tokens = lens_tokens(interest, last);
    let followed = |logits: &[f32], token: u32| {
        let logit = *logits.get(token as usize)?;
        let rank = logits.iter().filter(|&&other| greater(other, logit)).count();
        Some(TokenRank { token, logit, rank })
    };
    let layer = |(layer, logits): &(usize, Vec<f32>)| LensLayer {
        layer: *layer,
        top: top(logits, interest.top_k.max(1)),
        tracked: tokens.iter().filter_map(|&token| followed(logits, token)).collect(),
    };
    logits.iter().map(layer).collect()
}

/// Whether a logit is greater than another. NaN is less than every number, so that it does not seem the favourite.
fn greater(a: f32, b: f32) -> bool {
    a > b || (b.is_nan() && !a.is_nan())
}

/// The `k` greatest values and where they are, the greatest first; equal ones in order.
fn top(logits: &[f32], k: usize) -> Vec<(u32, f32)> {
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(k + 1);
    for (token, &logit) in logits.iter().enumerate() {
        if best.len() < k || best.last().is_some_and(|(_, least)| greater(logit, *least)) {
            let place = best.partition_point(|(_, other)| !greater(logit, *other));
            best.insert(place, (token as u32, logit));
            best.truncate(k);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use super::super::{Collector, Record};
    use super::*;

    #[derive(Default)]
    struct All(Mutex<Vec<Event>>, Interest);

    impl Collector for All {
        fn record(&self, record: &Arc<Record>) {
            self.0.lock().unwrap().push(record.event.clone());
        }

        fn interest(&self) -> Interest {
            self.1.clone()
        }
    }

    #[test]
    fn phases_are_told_of_a_step_each_interval_by_all_stages() {
        let wants = Interest { phases: Some(Duration::from_millis(20)), ..Interest::default() };
        let all = Arc::new(All(Mutex::default(), wants));
        let (mut watcher, mut follower) =
            (Watcher::new(Probe::new(all.clone()), 3), Watcher::new(Probe::new(all.clone()), 4));
        let mut told_by_first = 0;
        let began = Instant::now();
        let mut steps = 0;
        while began.elapsed() < Duration::from_millis(70) {
            let mut phases = StepPhases::default();
            let mut watch = watcher.watch(steps, Vec::new(), &mut phases);
            watch.lap(Some(0), Phase::Sdpa);
            assert!(watch.finish(1).is_empty());
            told_by_first += usize::from(phases == StepPhases::Told);
            // Behind it there is no second clock.
            let mut watch = follower.watch(steps, Vec::new(), &mut phases);
            watch.lap(Some(1), Phase::Sdpa);
            watch.finish(1);
            steps += 1;
        }
        let told = all.0.lock().unwrap().len();
        assert!((2..=4).contains(&told_by_first) && steps > 10, "{told_by_first} of {steps}");
        assert_eq!(told, 2 * told_by_first, "by both or by none");
        assert!(matches!(&all.0.lock().unwrap()[0], Event::Phases { stage: 3, step: 0, laps, .. } if laps.len() == 1));
    }

    #[test]
    fn the_residual_ratio_is_what_was_added_over_what_came() {
        let all = Arc::new(All(Mutex::default(), Interest { activations: true, ..Interest::default() }));
        let mut watch = Watcher::new(Probe::new(all.clone()), 0).watch(7, Vec::new(), &mut StepPhases::default());
        watch.layer_input(&[3.0, 4.0]);
        watch.tap(Tap::PostAttention, &[1.0, 1.0, 1.0]);
        watch.layer_output(5, &[3.0, 7.0]);
        watch.finish(1);
        let events = all.0.lock().unwrap();
        let [Event::Activations { step: 7, layers, .. }] = &events[..] else { panic!("{events:?}") };
        assert_eq!((layers[0].layer, layers[0].residual_ratio, layers[0].input.l2), (5, 3.0 / 5.0, 5.0));
        assert_eq!((layers[0].post_attention.count, layers[0].post_ffn.count), (3, 0));
    }

    #[test]
    fn the_lens_follows_the_last_layers_favourites() {
        let interest = LensInterest { tokens: Vec::new(), top_k: 2 };
        let layers = lens_layers(&interest, &[(0, vec![1.0, 5.0, 3.0, 5.0]), (1, vec![0.0, -1.0, 9.0, 2.0])]);
        assert_eq!(layers[1].top, [(2, 9.0), (3, 2.0)]);
        let ranks: Vec<_> = layers[0].tracked.iter().map(|tracked| (tracked.token, tracked.rank)).collect();
        assert_eq!(ranks, [(2, 2), (3, 0)]);
        let broken = lens_layers(&interest, &[(0, vec![f32::NAN, 5.0, f32::NAN, 7.0])]);
        assert_eq!(broken[0].top, [(3, 7.0), (1, 5.0)]);
        let broken = lens_layers(&LensInterest { tokens: vec![0, 1], top_k: 1 }, &[(0, vec![f32::NAN, 5.0, 6.0])]);
        let ranks: Vec<_> = broken[0].tracked.iter().map(|tracked| tracked.rank).collect();
        assert_eq!(ranks, [2, 1], "NaN is behind all numbers");
        let given = lens_layers(&LensInterest { tokens: vec![0, 99], top_k: 1 }, &[(0, vec![1.0, 5.0])]);
        assert_eq!(given[0].tracked, [TokenRank { token: 0, logit: 1.0, rank: 1 }], "99 is no token");
    }
}
