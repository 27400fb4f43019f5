//! How much one way is slower than another, from times that were taken in pairs.

use rand::{Rng, SeedableRng};

/// The ratio of two medians.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Ratio {
    /// Median of the first times.
    pub first: f64,
    /// Median of the second.
    pub second: f64,
    /// The first over the second.
    pub ratio: f64,
    /// The ratio lies between this...
    pub low: f64,
    /// ...and this in 95 of 100 such measurements, as far as the pairs tell (bootstrap, percentile method).
    pub high: f64,
}

/// Times that pairs are drawn anew.
const DRAWS: usize = 2000;

impl Ratio {
    /// Of pairs of times. A slow spell of the machine falls on both of a pair, so pairs are drawn as wholes.
    pub fn of(pairs: &[(f64, f64)]) -> Ratio {
        let first: Vec<f64> = pairs.iter().map(|pair| pair.0).collect();
        let second: Vec<f64> = pairs.iter().map(|pair| pair.1).collect();
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        let mut drawn: Vec<f64> = (0..DRAWS)
            .map(|_| {
                let picks: Vec<usize> = pairs.iter().map(|_| random.random_range(0..pairs.len())).collect();
                let median = |times: &[f64]| quantile(picks.iter().map(|&pick| times[pick]).collect(), 0.5);
                median(&first) / median(&second)
            })
            .collect();
        drawn.sort_by(f64::total_cmp);
        let (low, high) = (quantile(drawn.clone(), 0.025), quantile(drawn, 0.975));
        let (first, second) = (quantile(first, 0.5), quantile(second, 0.5));
        Ratio { first, second, ratio: first / second, low, high }
    }

    /// As a change in percent, with its interval.
    pub fn percent(&self) -> String {
        let percent = |ratio: f64| 100.0 * (ratio - 1.0);
        format!("{:+.1} % ({:+.1} to {:+.1})", percent(self.ratio), percent(self.low), percent(self.high))
    }
}

/// The value that a share of all does not exceed, between two neighbours in proportion; NaN of none.
fn quantile(mut values: Vec<f64>, share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let Some(last) = values.len().checked_sub(1) else { return f64::NAN };
    let place = share * last as f64;
    let (below, above) = (values[place.floor() as usize], values[place.ceil() as usize]);
    below + (above - below) * place.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pairs that share a slow spell, the first `factor` times the second, and some noise.
    fn pairs(random: &mut rand_chacha::ChaCha8Rng, factor: f64) -> Vec<(f64, f64)> {
        let pair = |random: &mut rand_chacha::ChaCha8Rng| {
            let spell = 1.0 + random.random::<f64>();
            let mut noise = || spell * (1.0 + 0.05 * random.random::<f64>());
            (factor * noise(), noise())
        };
        (0..40).map(|_| pair(random)).collect()
    }

    #[test]
    fn the_interval_holds_the_true_ratio_about_as_often_as_it_says() {
        let random = &mut rand_chacha::ChaCha8Rng::seed_from_u64(3);
        let held = (0..200).filter(|_| {
            let ratio = Ratio::of(&pairs(random, 1.1));
            assert!((ratio.ratio - 1.1).abs() < 0.1, "{ratio:?}");
            (ratio.low..=ratio.high).contains(&1.1)
        });
        // 190 are expected.
        assert!(held.count() >= 176);
    }

    #[test]
    fn quantiles_lie_between_neighbours() {
        assert_eq!(quantile(vec![3.0, 1.0, 2.0, 4.0], 0.5), 2.5);
        assert_eq!(quantile(vec![1.0, 2.0, 3.0], 1.0), 3.0);
        assert!(quantile(Vec::new(), 0.5).is_nan());
    }
}
