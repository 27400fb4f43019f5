//! Which layers go where: pure functions of bytes, with nothing of devices or files in them.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::model::decoder::WeightBytes;

/// What the planner knows of a stage's device: bytes it may fill.
pub type Budget = u64;

/// Layers `0..layers` cut into runs of the given lengths, one for each device.
pub fn given_split(layers: usize, counts: &[usize], devices: usize) -> Result<Vec<Range<usize>>> {
    let written = counts.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
    if counts.len() != devices {
        let parts = counts.len();
        return Err(Error::option("split", format!("{written} has {parts} parts for {devices} devices")));
    }
    if counts.contains(&0) {
        return Err(Error::option("split", format!("{written} leaves a stage without layers; leave out its device")));
    }
    // Checked, since the numbers come from a command line.
    let total = counts.iter().try_fold(0usize, |sum, &count| sum.checked_add(count));
    if total != Some(layers) {
        return Err(Error::option("split", format!("{written} does not add up to the model's {layers} layers")));
    }
    let mut start = 0;
    Ok(counts
        .iter()
        .map(|&count| {
            let range = start..start + count;
            start = range.end;
            range
        })
        .collect())
}

/// The contiguous cut that fills the fullest device least, as a share of its budget. Each stage has at least a layer.
///
/// Exact, by dynamic programming over (stages, layers): `best[stage][end]` is the smallest share for the first stages
/// up to `stage` with the layers up to `end`.
pub fn split_by_bytes(weights: &WeightBytes, kv_per_layer: u64, budgets: &[Budget]) -> Result<Vec<Range<usize>>> {
    let (layers, stages) = (weights.layers.len(), budgets.len());
    if stages == 0 {
        return Err(Error::option("devices", "at least one device is needed"));
    }
    if stages > layers {
        return Err(Error::option(
            "devices",
            format!("{stages} devices for {layers} layers: a stage needs at least one layer, leave out some devices"),
        ));
    }
    let mut before = vec![0u64; layers + 1]; // bytes of the layers before each
    for (layer, bytes) in weights.layers.iter().enumerate() {
        before[layer + 1] = before[layer].saturating_add(bytes.saturating_add(kv_per_layer));
    }
    let share = |stage: usize, range: Range<usize>| {
        let mut bytes = (before[range.end] - before[range.start]) as f64;
        if range.start == 0 {
            bytes += weights.embeddings as f64;
        }
        if range.end == layers {
            bytes += weights.head as f64;
        }
        bytes / budgets[stage].max(1) as f64
    };
    let mut best = vec![vec![f64::INFINITY; layers + 1]; stages];
    let mut cut = vec![vec![0; layers + 1]; stages];
    for (end, best) in best[0].iter_mut().enumerate().skip(1) {
        *best = share(0, 0..end);
    }
    for stage in 1..stages {
        for end in stage + 1..=layers {
            for start in stage..end {
                let fullest = best[stage - 1][start].max(share(stage, start..end));
                if fullest < best[stage][end] {
                    best[stage][end] = fullest;
                    cut[stage][end] = start;
                }
            }
        }
    }
    let mut ranges = Vec::with_capacity(stages);
    let mut end = layers;
    for stage in (0..stages).rev() {
        let start = cut[stage][end];
        ranges.push(start..end);
        end = start;
    }
    ranges.reverse();
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn even(layers: usize) -> WeightBytes {
        WeightBytes { embeddings: 3, layers: vec![10; layers], head: 5, tied: false }
    }

    fn assert_each_layer_once(ranges: &[Range<usize>], layers: usize) {
        let covered: Vec<usize> = ranges.iter().cloned().flatten().collect();
        assert_eq!(covered, (0..layers).collect::<Vec<_>>(), "{ranges:?}");
        assert!(ranges.iter().all(|range| !range.is_empty()), "{ranges:?}");
    }

    #[test]
    fn every_number_of_layers_and_stages_assigns_each_layer_once() {
        for layers in 1..=100 {
            for stages in 1..=8 {
                let budgets: Vec<Budget> = (0..stages).map(|s| 1000 + 700 * s as u64).collect();
                match split_by_bytes(&even(layers), 1, &budgets) {
                    Ok(ranges) => {
                        assert_eq!(ranges.len(), stages);
                        assert_each_layer_once(&ranges, layers);
                    }
                    Err(_) => assert!(stages > layers),
                }
            }
        }
    }

    #[test]
    fn a_device_with_twice_the_memory_gets_about_twice_the_layers() {
        let ranges = split_by_bytes(&even(30), 0, &[2000, 1000]).unwrap();
        assert_eq!(ranges, [0..20, 20..30]);
    }

    #[test]
    fn given_splits_are_taken_or_refused_with_the_reason() {
        assert_eq!(given_split(8, &[5, 3], 2).unwrap(), [0..5, 5..8]);
        assert_eq!(given_split(8, &[1, 7], 2).unwrap(), [0..1, 1..8]);
        for (counts, devices, reason) in [
            (&[8, 0][..], 2, "without layers"),
            (&[5, 4], 2, "8 layers"),
            (&[8], 2, "1 parts for 2 devices"),
            (&[usize::MAX, 9], 2, "8 layers"),
        ] {
            let message = given_split(8, counts, devices).unwrap_err().to_string();
            assert!(message.contains(reason) && message.contains("`split`"), "{message}");
        }
    }

    /// Tries every cut.
    fn brute_force(weights: &WeightBytes, kv: u64, budgets: &[Budget], stage: usize, start: usize) -> f64 {
        let layers = weights.layers.len();
        let share = |range: Range<usize>| {
            let mut bytes = weights.layers[range.clone()].iter().sum::<u64>() + kv * range.len() as u64;
            bytes += if range.start == 0 { weights.embeddings } else { 0 };
            bytes += if range.end == layers { weights.head } else { 0 };
            bytes as f64 / budgets[stage] as f64
        };
        if stage + 1 == budgets.len() {
            return if start < layers { share(start..layers) } else { f64::INFINITY };
        }
        (start + 1..layers)
            .map(|end| share(start..end).max(brute_force(weights, kv, budgets, stage + 1, end)))
            .fold(f64::INFINITY, f64::min)
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) })]

        #[test]
        fn no_cut_fills_the_fullest_device_less(
            layers in prop::collection::vec(1u64..1000, 1..9),
            budgets in prop::collection::vec(1u64..10_000, 1..5),
            embeddings in 0u64..3000,
            head in 0u64..3000,
            kv in 0u64..100,
        ) {
            prop_assume!(budgets.len() <= layers.len());
            let weights = WeightBytes { embeddings, layers, head, tied: false };
            let ranges = split_by_bytes(&weights, kv, &budgets).unwrap();
            assert_each_layer_once(&ranges, weights.layers.len());
            let fullest = ranges.iter().zip(&budgets).map(|(range, &budget)| {
                let bytes = weights.stage(range) + kv * range.len() as u64;
                bytes as f64 / budget as f64
            }).fold(0.0, f64::max);
            let best = brute_force(&weights, kv, &budgets, 0, 0);
            prop_assert!((fullest - best).abs() <= 1e-9 * best, "{ranges:?}: {fullest}, best {best}");
        }
    }
}
