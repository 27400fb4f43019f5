//! What is wrong with a layer's values, and where.

use std::fmt;

use serde::ser::{Serialize, SerializeStruct, Serializer};

use super::super::{LayerActivations, TensorStats};

/// A place within a layer where values are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// The residual stream before the layer.
    Input,
    /// After the norm before attention.
    PostNorm,
    /// What attention adds to the residual stream.
    PostAttention,
    /// What the MLP adds to the residual stream.
    PostFfn,
    /// The residual stream after the layer.
    Output,
}

impl Place {
    /// In the order in which a layer passes them.
    pub const ALL: [Place; 5] = [Place::Input, Place::PostNorm, Place::PostAttention, Place::PostFfn, Place::Output];

    /// Its name in tables and messages.
    pub fn name(self) -> &'static str {
        match self {
            Place::Input => "input",
            Place::PostNorm => "post_norm",
            Place::PostAttention => "post_attention",
            Place::PostFfn => "post_ffn",
            Place::Output => "output",
        }
    }

    /// A layer's values there.
    pub fn of(self, layer: &LayerActivations) -> &TensorStats {
        match self {
            Place::Input => &layer.input,
            Place::PostNorm => &layer.post_norm,
            Place::PostAttention => &layer.post_attention,
            Place::PostFfn => &layer.post_ffn,
            Place::Output => &layer.output,
        }
    }
}

/// From where on values are suspicious.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AnomalyThresholds {
    /// A magnitude above this is an explosion.
    pub explosion: f64,
    /// A standard deviation above this is too much.
    pub variance: f64,
    /// A standard deviation below this means that nothing is left of the signal.
    pub vanishing: f64,
}

impl Default for AnomalyThresholds {
    fn default() -> Self {
        AnomalyThresholds { explosion: 1e6, variance: 1e4, vanishing: 1e-6 }
    }
}

/// What may be wrong with values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum AnomalyKind {
    /// Values that are not a number; the value is how many.
    Nan,
    /// Values that are infinite; the value is how many.
    Inf,
    /// The greatest magnitude is above [`AnomalyThresholds::explosion`].
    Explosion,
    /// The standard deviation is above [`AnomalyThresholds::variance`].
    Variance,
    /// The standard deviation is below [`AnomalyThresholds::vanishing`].
    Vanishing,
}

impl AnomalyKind {
    /// One word.
    pub fn name(self) -> &'static str {
        match self {
            AnomalyKind::Nan => "nan",
            AnomalyKind::Inf => "inf",
            AnomalyKind::Explosion => "explosion",
            AnomalyKind::Variance => "variance",
            AnomalyKind::Vanishing => "vanishing",
        }
    }
}

/// Something that is wrong at one place of one layer. Its `Display` is a description that names layer, place and value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Anomaly {
    /// Layer in the model.
    pub layer: usize,
    /// Where in the layer.
    pub place: Place,
    /// What.
    pub kind: AnomalyKind,
    /// The count, magnitude or deviation that shows it.
    pub value: f64,
    /// What it is measured against: the threshold, or for NaN and infinite values the number of values.
    pub limit: f64,
}

impl fmt::Display for Anomaly {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Anomaly { layer, place, kind, value, limit } = self;
        write!(f, "layer {layer}, {}: ", place.name())?;
        match kind {
            AnomalyKind::Nan => write!(f, "{value} of {limit} values are NaN"),
            AnomalyKind::Inf => write!(f, "{value} of {limit} values are infinite"),
            AnomalyKind::Explosion => write!(f, "explosion, a magnitude of {value:.3e} is above {limit:e}"),
            AnomalyKind::Variance => write!(f, "variance, a standard deviation of {value:.3e} is above {limit:e}"),
            AnomalyKind::Vanishing => write!(f, "vanishing, a standard deviation of {value:.3e} is below {limit:e}"),
        }
    }
}

impl Serialize for Anomaly {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut object = serializer.serialize_struct("Anomaly", 6)?;
        object.serialize_field("layer", &self.layer)?;
        object.serialize_field("place", &self.place)?;
        object.serialize_field("kind", &self.kind)?;
        object.serialize_field("value", &self.value)?;
        object.serialize_field("limit", &self.limit)?;
        object.serialize_field("description", &self.to_string())?;
        object.end()
    }
}

impl AnomalyThresholds {
    /// All that is wrong with a layer, in the order in which it passes the places.
    ///
    /// Magnitude and deviation are those of the finite values. A deviation needs two of them: a place that was not
    /// looked at, or that holds nothing finite, has not vanished.
    pub fn anomalies(&self, layer: &LayerActivations) -> Vec<Anomaly> {
        let mut found = Vec::new();
        for place in Place::ALL {
            let stats = place.of(layer);
            let mut check = |wrong: bool, kind, value: f64, limit: f64| {
                if wrong {
                    found.push(Anomaly { layer: layer.layer, place, kind, value, limit });
                }
            };
            let count = stats.count as f64;
            let magnitude = f64::from(stats.min).abs().max(f64::from(stats.max).abs());
            check(stats.nan_count > 0, AnomalyKind::Nan, stats.nan_count as f64, count);
            check(stats.inf_count > 0, AnomalyKind::Inf, stats.inf_count as f64, count);
            check(magnitude > self.explosion, AnomalyKind::Explosion, magnitude, self.explosion);
            check(stats.std > self.variance, AnomalyKind::Variance, stats.std, self.variance);
            let spread = stats.finite_count() >= 2;
            check(spread && stats.std < self.vanishing, AnomalyKind::Vanishing, stats.std, self.vanishing);
        }
        found
    }
}

/// Statistics of one layer over several forward passes: as if all their rows had been in one.
pub fn merged(a: &LayerActivations, b: &LayerActivations) -> LayerActivations {
    let input = a.input.and(&b.input);
    let added = (a.residual_ratio * a.input.l2).hypot(b.residual_ratio * b.input.l2);
    LayerActivations {
        layer: a.layer,
        input,
        post_norm: a.post_norm.and(&b.post_norm),
        post_attention: a.post_attention.and(&b.post_attention),
        post_ffn: a.post_ffn.and(&b.post_ffn),
        output: a.output.and(&b.output),
        residual_ratio: if input.l2 > 0.0 { added / input.l2 } else { 0.0 },
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A layer with these values at a place and harmless ones elsewhere.
    pub fn layer(layer: usize, place: Place, values: &[f32]) -> LayerActivations {
        let harmless = TensorStats::of(&[-1.0, 0.5, 1.0]);
        let at = |other| if place == other { TensorStats::of(values) } else { harmless };
        LayerActivations {
            layer,
            input: at(Place::Input),
            post_norm: at(Place::PostNorm),
            post_attention: at(Place::PostAttention),
            post_ffn: at(Place::PostFfn),
            output: at(Place::Output),
            residual_ratio: 0.5,
        }
    }

    /// Kinds that the values show, by the definitions, in f64.
    fn reference(values: &[f32], thresholds: &AnomalyThresholds) -> Vec<AnomalyKind> {
        let finite: Vec<f64> = values.iter().filter(|x| x.is_finite()).map(|&x| f64::from(x)).collect();
        let mean = finite.iter().sum::<f64>() / finite.len().max(1) as f64;
        let std = (finite.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / finite.len().max(1) as f64).sqrt();
        let mut kinds = Vec::new();
        if values.iter().any(|x| x.is_nan()) {
            kinds.push(AnomalyKind::Nan);
        }
        if values.iter().any(|x| x.is_infinite()) {
            kinds.push(AnomalyKind::Inf);
        }
        if finite.iter().any(|x| x.abs() > thresholds.explosion) {
            kinds.push(AnomalyKind::Explosion);
        }
        if std > thresholds.variance {
            kinds.push(AnomalyKind::Variance);
        }
        if finite.len() > 1 && std < thresholds.vanishing {
            kinds.push(AnomalyKind::Vanishing);
        }
        kinds
    }

    proptest! {
        #[test]
        fn anomalies_are_those_of_the_definitions(
            values in prop::collection::vec(prop_oneof![
                6 => -1f32..1.0, 2 => -1e7f32..1e7, 2 => -1e-9f32..1e-9, 1 => Just(f32::NAN), 1 => Just(f32::INFINITY),
            ], 0..12),
            scale in prop_oneof![Just(1f32), Just(1e-8), Just(3e4)],
            place in 0usize..5,
        ) {
            let values: Vec<f32> = values.into_iter().map(|x| x * scale).collect();
            let thresholds = AnomalyThresholds::default();
            let place = Place::ALL[place];
            let found = thresholds.anomalies(&layer(7, place, &values));
            prop_assert!(found.iter().all(|anomaly| anomaly.layer == 7 && anomaly.place == place), "{found:?}");
            let kinds: Vec<_> = found.iter().map(|anomaly| anomaly.kind).collect();
            prop_assert_eq!(kinds, reference(&values, &thresholds));
        }
    }

    #[test]
    fn each_kind_is_described_with_layer_place_and_value() {
        let describe = |values: &[f32]| -> Vec<String> {
            let found = AnomalyThresholds::default().anomalies(&layer(3, Place::PostFfn, values));
            found.iter().map(Anomaly::to_string).collect()
        };
        assert_eq!(describe(&[1.0, f32::NAN, f32::NAN, 0.0]), ["layer 3, post_ffn: 2 of 4 values are NaN"]);
        assert_eq!(describe(&[1.0, f32::INFINITY, 0.0]), ["layer 3, post_ffn: 1 of 3 values are infinite"]);
        let exploded = describe(&[2e6, 1999999.0, 2e6, 2e6]);
        assert_eq!(exploded, ["layer 3, post_ffn: explosion, a magnitude of 2.000e6 is above 1e6"]);
        let varied = describe(&[3e4, -3e4]);
        assert_eq!(varied, ["layer 3, post_ffn: variance, a standard deviation of 3.000e4 is above 1e4"]);
        let vanished = describe(&[0.5, 0.5, 0.5]);
        assert_eq!(vanished, ["layer 3, post_ffn: vanishing, a standard deviation of 0.000e0 is below 1e-6"]);
        assert!(describe(&[f32::NAN]).len() == 1 && describe(&[]).is_empty() && describe(&[0.3]).is_empty());
    }

    #[test]
    fn thresholds_are_options_and_themselves_allowed() {
        let values = [-8.0, 8.0];
        let at = AnomalyThresholds { explosion: 8.0, variance: 8.0, vanishing: 8.0 };
        let found = at.anomalies(&layer(0, Place::Input, &values));
        assert!(found.iter().all(|anomaly| anomaly.place != Place::Input), "{found:?}");
        let below = AnomalyThresholds { explosion: 7.9, variance: 7.9, vanishing: 0.0 };
        let kinds: Vec<_> = below.anomalies(&layer(0, Place::Input, &values)).iter().map(|found| found.kind).collect();
        assert_eq!(kinds, [AnomalyKind::Explosion, AnomalyKind::Variance]);
    }

    #[test]
    fn layers_of_two_passes_are_merged_as_if_their_rows_had_been_in_one() {
        let made = |input: &[f32], output: &[f32]| {
            let added: Vec<f32> = output.iter().zip(input).map(|(after, before)| after - before).collect();
            let (before, added) = (TensorStats::of(input), TensorStats::of(&added));
            LayerActivations {
                input: before,
                output: TensorStats::of(output),
                residual_ratio: added.l2 / before.l2,
                ..layer(2, Place::PostNorm, input)
            }
        };
        let (a, b) = (([1.0, 2.0], [3.0, -2.0]), ([0.5, 4.0], [1.0, 1.0]));
        let whole = made(&[a.0, b.0].concat(), &[a.1, b.1].concat());
        let parts = merged(&made(&a.0, &a.1), &made(&b.0, &b.1));
        assert!((whole.residual_ratio - parts.residual_ratio).abs() < 1e-12);
        for place in [Place::Input, Place::PostNorm, Place::Output] {
            let (whole, parts) = (place.of(&whole), place.of(&parts));
            assert_eq!((whole.min, whole.max, whole.count), (parts.min, parts.max, parts.count));
            assert!((whole.std - parts.std).abs() < 1e-9 && (whole.l2 - parts.l2).abs() < 1e-9);
        }
    }
}
