//! Statistics of a run of values in one pass.

use crate::kernels::simd::Isa;

/// What a tensor's values are like. NaN and infinite values are counted and left out of the rest.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct TensorStats {
    /// Number of values.
    pub count: u64,
    /// Least finite value; 0 when there is none.
    pub min: f32,
    /// Greatest finite value; 0 when there is none.
    pub max: f32,
    /// Mean of the finite values.
    pub mean: f64,
    /// Standard deviation of the finite values, over their number.
    pub std: f64,
    /// Square root of the sum of squares of the finite values.
    pub l2: f64,
    /// Values that are not a number.
    pub nan_count: u64,
    /// Values that are infinite.
    pub inf_count: u64,
}

/// Values that are added up side by side, so that the compiler can use vectors.
const LANES: usize = 16;

impl TensorStats {
    /// Looks at all values once, and once more when some are not finite.
    ///
    /// Sums are kept in f64 of values less the first finite one, so that a small spread around a large mean keeps its
    /// digits.
    pub fn of(values: &[f32]) -> TensorStats {
        let shift = values.iter().copied().find(|x| x.is_finite()).unwrap_or(0.0);
        let mut all = Isa::detect().compile(|| Sums::of(values, shift, |x| x));
        let (mut nan_count, mut inf_count) = (0, 0);
        // Squares of finite values do not overflow in f64.
        if !all.squares.is_finite() {
            all = Sums::of(values, shift, |x| if x.is_finite() { x } else { shift });
            nan_count = values.iter().filter(|x| x.is_nan()).count() as u64;
            inf_count = values.iter().filter(|x| x.is_infinite()).count() as u64;
        }
        let finite = (values.len() as u64 - nan_count - inf_count) as f64;
        let shift = f64::from(shift);
        if finite == 0.0 {
            return TensorStats {
                count: values.len() as u64,
                min: 0.0,
                max: 0.0,
                mean: 0.0,
                std: 0.0,
                l2: 0.0,
                nan_count,
                inf_count,
            };
        }
        let mean = all.sum / finite; // of the shifted values
        let variance = (all.squares / finite - mean * mean).max(0.0);
        // sum x^2 = sum (d + shift)^2
        let squares = all.squares + shift * (2.0 * all.sum + finite * shift);
        TensorStats {
            count: values.len() as u64,
            min: all.min,
            max: all.max,
            mean: mean + shift,
            std: variance.sqrt(),
            l2: squares.max(0.0).sqrt(),
            nan_count,
            inf_count,
        }
    }

    /// The statistics of both runs of values together.
    pub fn and(&self, other: &TensorStats) -> TensorStats {
        let (count, nan_count, inf_count) =
            (self.count + other.count, self.nan_count + other.nan_count, self.inf_count + other.inf_count);
        let [a, b] = [self, other].map(|stats| stats.finite_count() as f64);
        let mut one = match (a == 0.0, b == 0.0) {
            (_, true) => *self,
            (true, false) => *other,
            (false, false) => {
                let apart = self.mean - other.mean;
                // Spread within each, and of the two means.
                let variance = (a * self.std * self.std + b * other.std * other.std) / (a + b)
                    + apart * apart * (a / (a + b)) * (b / (a + b));
                TensorStats {
                    min: self.min.min(other.min),
                    max: self.max.max(other.max),
                    mean: (a * self.mean + b * other.mean) / (a + b),
                    std: variance.sqrt(),
                    l2: self.l2.hypot(other.l2),
                    ..*self
                }
            }
        };
        (one.count, one.nan_count, one.inf_count) = (count, nan_count, inf_count);
        one
    }

    /// Values that are neither NaN nor infinite.
    pub fn finite_count(&self) -> u64 {
        self.count - self.nan_count - self.inf_count
    }

    /// Whether every value is finite.
    pub fn is_finite(&self) -> bool {
        self.nan_count == 0 && self.inf_count == 0
    }
}

/// Square root of the sum of squares of `b - a`.
pub(super) fn distance(a: &[f32], b: &[f32]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut add = |a: &[f32], b: &[f32]| {
        for ((sum, &a), &b) in lanes.iter_mut().zip(a).zip(b) {
            let d = f64::from(b) - f64::from(a);
            *sum += d * d;
        }
    };
    a.iter().zip(b).for_each(|(a, b)| add(a, b));
    add(a_rest, b_rest);
    lanes.iter().sum::<f64>().sqrt()
}

struct Sums {
    min: f32,
    max: f32,
    sum: f64,
    squares: f64,
}

impl Sums {
    /// Of what `keep` makes of the values.
    #[inline(always)]
    fn of(values: &[f32], shift: f32, keep: impl Fn(f32) -> f32) -> Sums {
        let (mut min, mut max) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
        let (mut sum, mut squares) = ([0.0f64; LANES], [0.0f64; LANES]);
        let shift = f64::from(shift);
        let mut add = |values: &[f32]| {
            for (lane, &x) in values.iter().enumerate() {
                let x = keep(x);
                let d = f64::from(x) - shift;
                sum[lane] += d;
                squares[lane] += d * d;
                min[lane] = if x < min[lane] { x } else { min[lane] };
                max[lane] = if x > max[lane] { x } else { max[lane] };
            }
        };
        let (chunks, rest) = values.as_chunks::<LANES>();
        chunks.iter().for_each(|chunk| add(chunk));
        add(rest);
        Sums {
            min: min.into_iter().fold(f32::INFINITY, f32::min),
            max: max.into_iter().fold(f32::NEG_INFINITY, f32::max),
            sum: sum.iter().sum(),
            squares: squares.iter().sum(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Two passes in f64, as a textbook has it.
    fn reference(values: &[f32]) -> TensorStats {
        let finite: Vec<f64> = values.iter().filter(|x| x.is_finite()).map(|&x| f64::from(x)).collect();
        let n = finite.len().max(1) as f64;
        let mean = finite.iter().sum::<f64>() / n;
        let least = finite.iter().copied().reduce(f64::min).unwrap_or(0.0);
        let greatest = finite.iter().copied().reduce(f64::max).unwrap_or(0.0);
        TensorStats {
            count: values.len() as u64,
            min: least as f32,
            max: greatest as f32,
            mean,
            std: (finite.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n).sqrt(),
            l2: finite.iter().map(|x| x * x).sum::<f64>().sqrt(),
            nan_count: values.iter().filter(|x| x.is_nan()).count() as u64,
            inf_count: values.iter().filter(|x| x.is_infinite()).count() as u64,
        }
    }

    fn close(a: f64, b: f64, scale: f64) -> bool {
        (a - b).abs() <= 1e-9 * scale.max(1e-30)
    }

    proptest! {
        #[test]
        fn statistics_equal_the_textbook(values in prop::collection::vec(
            prop_oneof![
                8 => -1e3f32..1e3,
                1 => prop::num::f32::ANY.prop_filter("squares fit f64", |x| x.abs() < 1e30 || !x.is_finite()),
            ], 0..70)) {
            let (ours, theirs) = (TensorStats::of(&values), reference(&values));
            let scale = theirs.max.abs().max(theirs.min.abs()) as f64;
            prop_assert_eq!((ours.count, ours.nan_count, ours.inf_count), (theirs.count, theirs.nan_count, theirs.inf_count));
            prop_assert_eq!((ours.min, ours.max), (theirs.min, theirs.max));
            prop_assert!(close(ours.mean, theirs.mean, scale), "{ours:?} {theirs:?}");
            prop_assert!((ours.std - theirs.std).abs() <= 1e-6 * scale, "{ours:?} {theirs:?}");
            prop_assert!(close(ours.l2, theirs.l2, scale * 10.0), "{ours:?} {theirs:?}");
        }
    }

    proptest! {
        #[test]
        fn statistics_of_parts_add_up_to_those_of_the_whole(
            values in prop::collection::vec(
                prop_oneof![8 => -1e3f32..1e3, 1 => Just(f32::NAN), 1 => Just(f32::INFINITY)], 0..40),
            cut in 0usize..40,
        ) {
            let (first, second) = values.split_at(cut.min(values.len()));
            let (whole, parts) = (TensorStats::of(&values), TensorStats::of(first).and(&TensorStats::of(second)));
            prop_assert_eq!((whole.count, whole.nan_count, whole.inf_count), (parts.count, parts.nan_count, parts.inf_count));
            prop_assert_eq!((whole.min, whole.max), (parts.min, parts.max));
            for (a, b) in [(whole.mean, parts.mean), (whole.std, parts.std), (whole.l2, parts.l2)] {
                prop_assert!((a - b).abs() <= 1e-6 * (1.0 + a.abs()), "{whole:?} {parts:?}");
            }
        }
    }

    #[test]
    fn a_small_spread_around_a_large_mean_is_seen() {
        let values: Vec<f32> = (0..1000).map(|i| 1000.0 + (i % 2) as f32 * 2f32.powi(-10)).collect();
        let stats = TensorStats::of(&values);
        assert!((stats.std - 2f64.powi(-11)).abs() < 1e-12, "{stats:?}");
    }

    #[test]
    fn a_distance_is_the_textbooks() {
        for n in [0, 1, 15, 16, 17, 100] {
            let (a, b): (Vec<f32>, Vec<f32>) = (0..n).map(|i| ((i as f32).sin(), (i * i) as f32)).unzip();
            let plain: f64 = a.iter().zip(&b).map(|(a, b)| (f64::from(*b) - f64::from(*a)).powi(2)).sum();
            assert!((distance(&a, &b) - plain.sqrt()).abs() <= 1e-12 * plain.sqrt(), "{n}");
        }
    }

    #[test]
    fn nothing_finite_gives_zeros_and_counts() {
        let stats = TensorStats::of(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY]);
        assert_eq!((stats.count, stats.nan_count, stats.inf_count, stats.mean, stats.max), (3, 1, 2, 0.0, 0.0));
        assert!(!stats.is_finite() && TensorStats::of(&[]).is_finite());
    }
}
