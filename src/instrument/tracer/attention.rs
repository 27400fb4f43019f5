//! Where query heads look: a row of weights made into a few figures. The row itself is not kept.

use std::collections::BTreeMap;

use super::super::AttentionFilter;

/// Which heads are traced, and what is said of each.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionTraceConfig {
    /// Layers in the model; `None` is all. Heads that are filtered out are not even computed.
    pub layers: Option<Vec<usize>>,
    /// Query heads; `None` is all.
    pub heads: Option<Vec<usize>>,
    /// Positions with the greatest weights that are kept.
    pub top_k: usize,
    /// Positions at the end of a row, the looking one included, that count as recent.
    pub recent_positions: usize,
    /// A head with more than this share on the first position of the sequence is a sink.
    pub sink_share: f64,
    /// A head with more than this share on the recent positions looks at them.
    pub recent_share: f64,
    /// A head whose entropy is more than this part of the greatest one, `ln n`, looks everywhere alike.
    pub uniform_evenness: f64,
}

impl Default for AttentionTraceConfig {
    fn default() -> Self {
        AttentionTraceConfig {
            layers: None,
            heads: None,
            top_k: 5,
            recent_positions: 8,
            sink_share: 0.5,
            recent_share: 0.5,
            uniform_evenness: 0.95,
        }
    }
}

impl AttentionTraceConfig {
    /// What the forward pass is asked for.
    pub fn filter(&self) -> AttentionFilter {
        AttentionFilter { layers: self.layers.clone(), heads: self.heads.clone() }
    }
}

/// One row of attention weights to be traced.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionRow<'a> {
    /// The request's number.
    pub request: u64,
    /// Layer in the model.
    pub layer: usize,
    /// Query head.
    pub head: usize,
    /// Position of the row that looks.
    pub position: usize,
    /// Position of the first weight; above 0 behind a sliding window.
    pub first: usize,
    /// Weights of the positions from `first` on.
    pub weights: &'a [f32],
}

/// Where one query head looked from one position.
///
/// Shares are of the row's sum, which is 1 but for rounding. A row whose sum is not a positive number (NaN in it) has
/// NaN for all of them, shows no pattern, and has no `top`.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct AttentionTrace {
    /// The request's number.
    pub request: u64,
    /// Layer in the model.
    pub layer: usize,
    /// Query head.
    pub head: usize,
    /// Position of the row that looks.
    pub position: usize,
    /// Positions that it sees.
    pub seen: usize,
    /// Positions with the greatest shares, greatest first, the earlier one of equals.
    pub top: Vec<(usize, f32)>,
    /// Share of all other positions.
    pub tail_mass: f64,
    /// Entropy in nats; from 0 (one position) to `ln seen` (all alike).
    pub entropy: f64,
    /// Entropy as a part of the greatest one, from 0 to 1. 0 where only one position is seen.
    pub evenness: f64,
    /// Share of the first position of the sequence; 0 where a sliding window hides it.
    pub sink: f64,
    /// Share of the recent positions.
    pub recency: f64,
    /// More than [`AttentionTraceConfig::sink_share`] on the first position, with others to choose from.
    pub is_sink: bool,
    /// More than [`AttentionTraceConfig::uniform_evenness`], with others to choose from.
    pub is_uniform: bool,
    /// More than [`AttentionTraceConfig::recent_share`] on the recent positions, with others to choose from.
    pub is_recent: bool,
}

impl AttentionTrace {
    /// Makes figures of a row.
    pub fn of(row: &AttentionRow, config: &AttentionTraceConfig) -> AttentionTrace {
        let weights = row.weights;
        let seen = weights.len();
        let sum: f64 = weights.iter().map(|&w| f64::from(w)).sum();
        let sound = sum.is_finite() && sum > 0.0;
        let share = |weight: f32| f64::from(weight) / sum;
        let or_nan = |value: f64| if sound { value } else { f64::NAN };

        let entropy = weights.iter().map(|&w| share(w)).filter(|p| *p > 0.0).map(|p| -p * p.ln()).sum::<f64>();
        let evenness = if seen > 1 { entropy / (seen as f64).ln() } else { 0.0 };
        let sink = if row.first == 0 { weights.first().map_or(0.0, |&w| share(w)) } else { 0.0 };
        let recent = &weights[seen.saturating_sub(config.recent_positions)..];
        let recency = recent.iter().map(|&w| share(w)).sum::<f64>();
        let top = if sound { top(weights, config.top_k) } else { Vec::new() };
        let kept: f64 = top.iter().map(|&(_, w)| share(w)).sum();
        AttentionTrace {
            request: row.request,
            layer: row.layer,
            head: row.head,
            position: row.position,
            seen,
            top: top.into_iter().map(|(index, w)| (row.first + index, share(w) as f32)).collect(),
            // All positions but those kept; rounding may leave less than nothing.
            tail_mass: or_nan((1.0 - kept).max(0.0)),
            entropy: or_nan(entropy),
            evenness: or_nan(evenness),
            sink: or_nan(sink),
            recency: or_nan(recency),
            is_sink: sound && seen > 1 && sink > config.sink_share,
            is_uniform: sound && seen > 1 && evenness > config.uniform_evenness,
            is_recent: sound && seen > recent.len() && recency > config.recent_share,
        }
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        size_of::<Self>() + self.top.capacity() * size_of::<(usize, f32)>()
    }
}

/// The `k` greatest weights and where they are, the greatest first, the earlier one of equals.
fn top(weights: &[f32], k: usize) -> Vec<(usize, f32)> {
    let mut best: Vec<(usize, f32)> = Vec::with_capacity(k.min(weights.len()) + 1);
    for (index, &weight) in weights.iter().enumerate() {
        if best.len() < k || best.last().is_some_and(|(_, least)| weight > *least) {
            let place = best.partition_point(|(_, other)| *other >= weight);
            best.insert(place, (index, weight));
            best.truncate(k);
        }
    }
    best.shrink_to_fit();
    best
}

/// What the heads of one layer do, over several traces.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct LayerAttention {
    /// Layer in the model.
    pub layer: usize,
    /// Traces that it is made of; rows with NaN are not among them.
    pub traces: usize,
    /// The head with the greatest mean share on the first position, and that share.
    pub most_sink: (usize, f64),
    /// The head with the least mean entropy, and that entropy.
    pub least_entropy: (usize, f64),
    /// Mean entropy of all heads, in nats.
    pub mean_entropy: f64,
    /// Mean share of recent positions, of all heads.
    pub recency: f64,
    /// Part of the traces that show each pattern.
    pub sinks: f64,
    /// The same for looking everywhere alike.
    pub uniform: f64,
    /// The same for looking at recent positions.
    pub recent: f64,
}

/// What the heads of each layer do. Layers with no sound trace are left out.
pub fn by_layer<'a>(traces: impl IntoIterator<Item = &'a AttentionTrace>) -> Vec<LayerAttention> {
    let mut layers: BTreeMap<usize, BTreeMap<usize, Vec<&AttentionTrace>>> = BTreeMap::new();
    for trace in traces.into_iter().filter(|trace| trace.entropy.is_finite()) {
        layers.entry(trace.layer).or_default().entry(trace.head).or_default().push(trace);
    }
    let mean = |traces: &[&AttentionTrace], figure: &dyn Fn(&AttentionTrace) -> f64| {
        traces.iter().map(|trace| figure(trace)).sum::<f64>() / traces.len() as f64
    };
    let summary = |(layer, heads): (usize, BTreeMap<usize, Vec<&AttentionTrace>>)| {
        let of_heads = |figure: &dyn Fn(&AttentionTrace) -> f64| -> Vec<(usize, f64)> {
            heads.iter().map(|(&head, traces)| (head, mean(traces, figure))).collect()
        };
        let sinks = of_heads(&|trace| trace.sink);
        let entropies = of_heads(&|trace| trace.entropy);
        let all: Vec<&AttentionTrace> = heads.values().flatten().copied().collect();
        let part = |shows: fn(&AttentionTrace) -> bool| mean(&all, &|trace| f64::from(u8::from(shows(trace))));
        Some(LayerAttention {
            layer,
            traces: all.len(),
            most_sink: sinks.into_iter().reduce(|best, other| if other.1 > best.1 { other } else { best })?,
            least_entropy: entropies.into_iter().reduce(|best, other| if other.1 < best.1 { other } else { best })?,
            mean_entropy: mean(&all, &|trace| trace.entropy),
            recency: mean(&all, &|trace| trace.recency),
            sinks: part(|trace| trace.is_sink),
            uniform: part(|trace| trace.is_uniform),
            recent: part(|trace| trace.is_recent),
        })
    };
    layers.into_iter().filter_map(summary).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn row(weights: &[f32]) -> AttentionRow<'_> {
        AttentionRow { request: 1, layer: 2, head: 3, position: weights.len() - 1, first: 0, weights }
    }

    proptest! {
        #[test]
        fn figures_equal_the_textbook(
            scores in prop::collection::vec(-12f64..12.0, 1..60),
            first in prop_oneof![Just(0usize), 1usize..9],
            top_k in 0usize..9,
            recent_positions in 0usize..12,
        ) {
            let exps: Vec<f64> = scores.iter().map(|score| score.exp()).collect();
            let sum: f64 = exps.iter().sum();
            let weights: Vec<f32> = exps.iter().map(|exp| (exp / sum) as f32).collect();
            let config = AttentionTraceConfig { top_k, recent_positions, ..AttentionTraceConfig::default() };
            let n = weights.len();
            let row = AttentionRow { first, position: first + n - 1, ..row(&weights) };
            let trace = AttentionTrace::of(&row, &config);

            let p: Vec<f64> = weights.iter().map(|&w| f64::from(w)).collect();
            let close = |a: f64, b: f64| (a - b).abs() < 1e-5;
            let entropy = -p.iter().map(|p| if *p > 0.0 { p * p.ln() } else { 0.0 }).sum::<f64>();
            prop_assert!(close(trace.entropy, entropy), "{trace:?}");
            prop_assert!(trace.entropy <= (n as f64).ln() + 1e-9 && trace.evenness <= 1.0 + 1e-9);
            let sink = if first == 0 { p[0] } else { 0.0 };
            prop_assert!(close(trace.sink, sink));
            prop_assert!(close(trace.recency, p.iter().rev().take(recent_positions).sum()));
            let mut order: Vec<usize> = (0..n).collect();
            order.sort_by(|&a, &b| p[b].total_cmp(&p[a]).then(a.cmp(&b)));
            let kept = &order[..top_k.min(n)];
            let positions: Vec<usize> = trace.top.iter().map(|(position, _)| position - first).collect();
            prop_assert_eq!(&positions, kept);
            prop_assert!(trace.top.iter().zip(kept).all(|((_, share), &i)| close(f64::from(*share), p[i])));
            prop_assert!(close(trace.tail_mass, order[kept.len()..].iter().map(|&i| p[i]).sum()));
            prop_assert_eq!(trace.is_sink, n > 1 && trace.sink > 0.5);
            prop_assert_eq!(trace.is_recent, n > recent_positions && trace.recency > 0.5);
            prop_assert_eq!(trace.is_uniform, n > 1 && trace.evenness > 0.95);
        }
    }

    #[test]
    fn patterns_are_what_they_are_called() {
        let config = AttentionTraceConfig { recent_positions: 2, ..AttentionTraceConfig::default() };
        let patterns = |weights: &[f32]| {
            let trace = AttentionTrace::of(&row(weights), &config);
            (trace.is_sink, trace.is_uniform, trace.is_recent)
        };
        assert_eq!(patterns(&[0.9, 0.05, 0.03, 0.02]), (true, false, false));
        assert_eq!(patterns(&[0.25; 4]), (false, true, false));
        assert_eq!(patterns(&[0.01, 0.04, 0.1, 0.85]), (false, false, true));
        assert_eq!(patterns(&[1.0]), (false, false, false), "there is nothing to choose from");
        assert_eq!(patterns(&[0.0, 1.0]), (false, false, false), "all positions are recent");
        let uniform = AttentionTrace::of(&row(&[0.125; 8]), &config);
        assert!((uniform.entropy - 8f64.ln()).abs() < 1e-12 && (uniform.evenness - 1.0).abs() < 1e-12);
    }

    #[test]
    fn a_row_with_nan_shows_nothing() {
        for weights in [&[f32::NAN, 0.5][..], &[0.0, 0.0], &[f32::INFINITY, 1.0]] {
            let trace = AttentionTrace::of(&row(weights), &AttentionTraceConfig::default());
            assert!(trace.entropy.is_nan() && trace.tail_mass.is_nan() && trace.sink.is_nan(), "{trace:?}");
            assert!(!trace.is_sink && !trace.is_uniform && !trace.is_recent && trace.top.is_empty());
            assert!(by_layer([&trace]).is_empty());
        }
    }

    #[test]
    fn a_layer_is_summed_up_by_its_heads() {
        let config = AttentionTraceConfig { recent_positions: 1, ..AttentionTraceConfig::default() };
        let trace = |head, weights: &[f32]| AttentionTrace::of(&AttentionRow { head, ..row(weights) }, &config);
        let traces = [
            trace(0, &[0.7, 0.1, 0.2]),
            trace(0, &[0.9, 0.05, 0.05]),
            trace(4, &[0.0, 0.0, 1.0]),
            trace(4, &[0.4, 0.3, 0.3]),
        ];
        let [layer] = &by_layer(&traces)[..] else { panic!("one layer") };
        assert_eq!((layer.layer, layer.traces, layer.most_sink.0, layer.least_entropy.0), (2, 4, 0, 4));
        assert!((layer.most_sink.1 - 0.8).abs() < 1e-6);
        let mean = traces.iter().map(|trace| trace.entropy).sum::<f64>() / 4.0;
        assert!((layer.mean_entropy - mean).abs() < 1e-12);
        assert!((layer.recency - (0.2 + 0.05 + 1.0 + 0.3) / 4.0).abs() < 1e-6);
        assert_eq!((layer.sinks, layer.uniform, layer.recent), (0.5, 0.25, 0.25));
    }
}
