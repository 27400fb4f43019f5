//! How far quantised values are from those they stand for.

use std::fmt;

use crate::error::{Error, Result};

/// What a cosine similarity says of a quantisation. Every value, NaN too, is in exactly one class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum QuantClass {
    /// Above 0.995.
    Acceptable,
    /// From 0.99 to 0.995, both included.
    Warning,
    /// Below 0.99, or NaN.
    Critical,
}

impl QuantClass {
    /// The class of a cosine similarity.
    pub fn of(cosine: f64) -> QuantClass {
        if cosine > 0.995 {
            QuantClass::Acceptable
        } else if cosine >= 0.99 {
            QuantClass::Warning
        } else {
            QuantClass::Critical
        }
    }

    /// One word.
    pub fn name(self) -> &'static str {
        match self {
            QuantClass::Acceptable => "acceptable",
            QuantClass::Warning => "warning",
            QuantClass::Critical => "critical",
        }
    }
}

/// The difference between a tensor or output and its reference. NaN and infinite figures are `null` in JSON.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct QuantError {
    /// Of the tensor or output.
    pub name: String,
    /// Type that it is stored in; empty for an output.
    pub dtype: String,
    /// Values compared.
    pub values: u64,
    /// Mean of the squared differences.
    pub mse: f64,
    /// Greatest difference; NaN where one is.
    pub max_error: f64,
    /// Cosine of the angle between both as vectors. Two vectors of zeros are alike (1); one beside something else has
    /// nothing in common with it (0).
    pub cosine: f64,
    /// Power of the reference over that of the difference, in dB: infinite where there is no difference, minus infinity
    /// where the reference is zeros and the other is not.
    pub snr_db: f64,
    /// Of logits: Kullback-Leibler divergence from the reference's distribution, in nats, as a mean over the positions.
    pub kl: Option<f64>,
    /// By the cosine.
    pub class: QuantClass,
}

impl QuantError {
    /// Of two runs of values of one length.
    pub fn of(name: &str, reference: &[f32], found: &[f32]) -> Result<QuantError> {
        let mut sums = ErrorSums::default();
        sums.add(reference, found)?;
        Ok(sums.finish(name))
    }

    /// The same of the logits of one position, with their divergence.
    pub fn of_logits(name: &str, reference: &[f32], found: &[f32]) -> Result<QuantError> {
        let error = QuantError::of(name, reference, found)?;
        Ok(QuantError { kl: Some(kl_divergence(reference, found)), ..error })
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        size_of::<Self>() + self.name.capacity() + self.dtype.capacity()
    }

    /// The worse one comes first: NaN, then the lesser cosine, then the greater error for its power.
    pub fn worst_first(&self, other: &QuantError) -> std::cmp::Ordering {
        let place = |error: &QuantError| if error.cosine.is_nan() { f64::NEG_INFINITY } else { error.cosine };
        place(self).total_cmp(&place(other)).then(self.snr_db.total_cmp(&other.snr_db))
    }
}

impl fmt::Display for QuantError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let QuantError { name, mse, max_error, cosine, snr_db, class, .. } = self;
        let class = class.name();
        write!(f, "{name}: {class}, cosine {cosine:.6}, SNR {snr_db:.1} dB, MSE {mse:.3e}, greatest {max_error:.3e}")
    }
}

/// What is added up of two runs of values, part by part, so that neither need be in memory as a whole.
#[derive(Debug, Clone, Copy, Default)]
pub struct ErrorSums {
    values: u64,
    product: f64,
    reference: f64,
    found: f64,
    difference: f64,
    max_error: f64,
}

impl ErrorSums {
    /// Adds the next values of both.
    pub fn add(&mut self, reference: &[f32], found: &[f32]) -> Result<()> {
        if reference.len() != found.len() {
            let (reference, found) = (reference.len(), found.len());
            return Err(Error::Tensors(format!("{found} values cannot be compared with {reference}: give as many")));
        }
        for (&r, &f) in reference.iter().zip(found) {
            let (r, f) = (f64::from(r), f64::from(f));
            let difference = f - r;
            self.product += r * f;
            self.reference += r * r;
            self.found += f * f;
            self.difference += difference * difference;
            let error = difference.abs();
            // NaN stays; f64::max would pass it by.
            if error > self.max_error || error.is_nan() {
                self.max_error = if self.max_error.is_nan() { f64::NAN } else { error };
            }
        }
        self.values += reference.len() as u64;
        Ok(())
    }

    /// What comes of them.
    pub fn finish(&self, name: &str) -> QuantError {
        let ErrorSums { values, product, reference, found, difference, max_error } = *self;
        let cosine = match (reference == 0.0, found == 0.0) {
            (true, true) => 1.0,
            (true, false) | (false, true) if product == 0.0 => 0.0,
            _ => (product / (reference.sqrt() * found.sqrt())).clamp(-1.0, 1.0),
        };
        let snr_db = if difference == 0.0 { f64::INFINITY } else { 10.0 * (reference / difference).log10() };
        QuantError {
            name: name.to_string(),
            dtype: String::new(),
            values,
            mse: difference / values.max(1) as f64,
            max_error,
            cosine,
            snr_db,
            kl: None,
            class: QuantClass::of(cosine),
        }
    }
}

/// The Kullback-Leibler divergence of the distribution that logits `found` describe from that of `reference`, in nats.
/// Infinite where `found` rules out what `reference` does not; NaN where a logit is NaN or plus infinity.
pub fn kl_divergence(reference: &[f32], found: &[f32]) -> f64 {
    let log_sum = |logits: &[f32]| {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        f64::from(max) + logits.iter().map(|&x| (f64::from(x) - f64::from(max)).exp()).sum::<f64>().ln()
    };
    let (reference_sum, found_sum) = (log_sum(reference), log_sum(found));
    let pairs = reference.iter().zip(found);
    let divergence: f64 = pairs
        .map(|(&r, &f)| {
            let (r, f) = (f64::from(r) - reference_sum, f64::from(f) - found_sum);
            // What the reference rules out adds nothing, whatever the other says.
            if r == f64::NEG_INFINITY && !f.is_nan() { 0.0 } else { r.exp() * (r - f) }
        })
        .sum();
    // Rounding may leave a little less than nothing.
    if divergence < 0.0 { 0.0 } else { divergence }
}

/// Errors with a bound on their bytes: the worst are kept, all are counted.
#[derive(Debug, Clone, Default)]
pub(super) struct QuantErrors {
    kept: Vec<QuantError>,
    bytes: usize,
    pub warnings: u64,
    pub criticals: u64,
}

impl QuantErrors {
    /// Takes one, and gives up the best while all take more than `max_bytes`.
    pub fn add(&mut self, error: QuantError, max_bytes: usize) {
        match error.class {
            QuantClass::Acceptable => {}
            QuantClass::Warning => self.warnings += 1,
            QuantClass::Critical => self.criticals += 1,
        }
        let place = self.kept.partition_point(|other| other.worst_first(&error).is_le());
        self.bytes += error.bytes();
        self.kept.insert(place, error);
        while self.bytes > max_bytes
            && let Some(best) = self.kept.pop()
        {
            self.bytes -= best.bytes();
        }
    }

    /// The worst first.
    pub fn kept(&self) -> &[QuantError] {
        &self.kept
    }

    /// Bytes of those that are kept.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-9 * (1.0 + b.abs())
    }

    proptest! {
        #[test]
        fn figures_equal_the_textbook(
            pairs in prop::collection::vec((-50f32..50.0, -1f32..1.0), 1..80),
            cut in 0usize..80,
        ) {
            let reference: Vec<f32> = pairs.iter().map(|(r, _)| *r).collect();
            let found: Vec<f32> = pairs.iter().map(|(r, noise)| r + noise).collect();
            let mut sums = ErrorSums::default();
            let cut = cut.min(found.len());
            sums.add(&reference[..cut], &found[..cut]).unwrap();
            sums.add(&reference[cut..], &found[cut..]).unwrap();
            let error = sums.finish("x");
            let wide = |values: &[f32]| values.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
            let (r, f) = (wide(&reference), wide(&found));
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let noise: Vec<f64> = r.iter().zip(&f).map(|(r, f)| f - r).collect();
            prop_assert!(close(error.mse, dot(&noise, &noise) / r.len() as f64));
            prop_assert!(close(error.max_error, noise.iter().map(|x| x.abs()).fold(0.0, f64::max)));
            prop_assert!(close(error.cosine, dot(&r, &f) / (dot(&r, &r) * dot(&f, &f)).sqrt()));
            prop_assert!(close(error.snr_db, 10.0 * dot(&r, &r).log10() - 10.0 * dot(&noise, &noise).log10()));
            prop_assert_eq!(error.class, QuantClass::of(error.cosine));
        }

        #[test]
        fn the_divergence_equals_the_textbook(pairs in prop::collection::vec((-9f32..9.0, -9f32..9.0), 1..40)) {
            let softmax = |logits: Vec<f64>| {
                let sum: f64 = logits.iter().map(|x| x.exp()).sum();
                logits.iter().map(|x| x.exp() / sum).collect::<Vec<f64>>()
            };
            let p = softmax(pairs.iter().map(|(r, _)| f64::from(*r)).collect());
            let q = softmax(pairs.iter().map(|(_, f)| f64::from(*f)).collect());
            let expected: f64 = p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
            let (reference, found): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
            let error = QuantError::of_logits("logits", &reference, &found).unwrap();
            prop_assert!((error.kl.unwrap() - expected).abs() < 1e-9, "{error:?} {expected}");
        }

        #[test]
        fn every_cosine_is_in_exactly_one_class(cosine in prop_oneof![-1f64..1.0, 0.98f64..1.0, prop::num::f64::ANY]) {
            let in_classes = [cosine > 0.995, (0.99..=0.995).contains(&cosine), cosine < 0.99 || cosine.is_nan()];
            prop_assert_eq!(in_classes.iter().filter(|is| **is).count(), 1);
            let class = [QuantClass::Acceptable, QuantClass::Warning, QuantClass::Critical]
                [in_classes.iter().position(|is| *is).unwrap()];
            prop_assert_eq!(QuantClass::of(cosine), class);
        }
    }

    #[test]
    fn the_limits_of_the_classes_are_where_they_are_said_to_be() {
        let classes = [0.995f64.next_up(), 0.995, 0.99, 0.99f64.next_down(), f64::NAN].map(QuantClass::of);
        use QuantClass::{Acceptable, Critical, Warning};
        assert_eq!(classes, [Acceptable, Warning, Warning, Critical, Critical]);
    }

    #[test]
    fn zeros_and_values_that_are_none_are_told_apart() {
        let figures = |reference: &[f32], found: &[f32]| {
            let error = QuantError::of("x", reference, found).unwrap();
            (error.cosine, error.snr_db, error.class)
        };
        assert_eq!(figures(&[0.0; 3], &[0.0; 3]), (1.0, f64::INFINITY, QuantClass::Acceptable));
        assert_eq!(figures(&[], &[]), (1.0, f64::INFINITY, QuantClass::Acceptable));
        assert_eq!(figures(&[0.0; 2], &[1.0, 0.0]), (0.0, f64::NEG_INFINITY, QuantClass::Critical));
        assert_eq!(figures(&[1.0, 0.0], &[0.0; 2]), (0.0, 0.0, QuantClass::Critical));
        assert_eq!(figures(&[3.0, 4.0], &[3.0, 4.0]), (1.0, f64::INFINITY, QuantClass::Acceptable));
        for wrong in [f32::NAN, f32::INFINITY] {
            for (reference, found) in [([1.0, 2.0], [1.0, wrong]), ([wrong, 1.0], [1.0, 1.0]), ([0.0; 2], [wrong, 0.0])]
            {
                let error = QuantError::of("x", &reference, &found).unwrap();
                assert!(error.cosine.is_nan() && error.class == QuantClass::Critical, "{error:?}");
            }
        }
        assert!(QuantError::of("x", &[1.0; 3], &[f32::NAN, 9.0, 1.0]).unwrap().max_error.is_nan());
        let refused = QuantError::of("x", &[1.0], &[1.0, 2.0]).unwrap_err().to_string();
        assert!(refused.contains("2 values") && refused.contains("with 1"), "{refused}");
    }

    #[test]
    fn a_divergence_with_ruled_out_tokens_is_what_it_should_be() {
        const OUT: f32 = f32::NEG_INFINITY;
        assert_eq!(kl_divergence(&[0.0, OUT], &[0.0, OUT]), 0.0);
        assert!((kl_divergence(&[0.0, OUT], &[0.0, 0.0]) - 2f64.ln()).abs() < 1e-12);
        assert_eq!(kl_divergence(&[0.0, 0.0], &[0.0, OUT]), f64::INFINITY);
        assert!(kl_divergence(&[0.0, f32::NAN], &[0.0, 0.0]).is_nan());
        assert!(kl_divergence(&[0.0, 0.0], &[f32::NAN, 0.0]).is_nan());
    }

    #[test]
    fn the_worst_are_kept_and_all_are_counted() {
        let error = |cosine: f64| QuantError {
            cosine,
            class: QuantClass::of(cosine),
            ..QuantError::of("t", &[1.0], &[1.0]).unwrap()
        };
        let mut errors = QuantErrors::default();
        let room = 3 * error(1.0).bytes();
        for cosine in [0.999, 0.993, f64::NAN, 0.5, 0.98, 0.992, 1.0] {
            errors.add(error(cosine), room);
            assert!(errors.bytes() <= room);
        }
        let kept: Vec<f64> = errors.kept().iter().map(|error| error.cosine).collect();
        assert!(kept[0].is_nan() && kept[1..] == [0.5, 0.98], "{kept:?}");
        assert_eq!((errors.warnings, errors.criticals), (2, 3));
    }
}
