//! Cuts without measured costs: as given, or by bytes.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::model::stage_weights::WeightBytes;

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
pub fn split_by_bytes(weights: &WeightBytes, kv_per_layer: u64, budgets: &[u64]) -> Result<Vec<Range<usize>>> {
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
