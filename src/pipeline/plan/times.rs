//! Times and bytes of all possible stages, added up beforehand.

use std::ops::Range;

use super::Problem;
use crate::model::stage_weights::WeightBytes;
use crate::pipeline::cost::LinkCost;

/// Seconds and bytes of all possible stages on some devices, for micro-batches of `rows` rows.
pub struct Times {
    pub rows: usize,
    /// For each stage, seconds of the layers before each.
    before: Vec<Vec<f64>>,
    /// For each stage, seconds besides layers and head.
    step: Vec<f64>,
    /// Seconds of the head behind the last stage's layers.
    head: f64,
    /// Behind each stage but the last.
    pub links: Vec<LinkCost>,
    /// Bytes of the weights of the layers before each.
    weights_before: Vec<u64>,
}

impl Times {
    /// Adds up.
    pub fn new(problem: &Problem, devices: &[usize], rows: usize) -> Times {
        let before = |&device: &usize| {
            let mut sum = 0.0;
            let layers = problem.devices[device].cost.layers.iter().map(|layer| {
                sum += layer.decode(rows);
                sum
            });
            [0.0].into_iter().chain(layers).collect()
        };
        let mut bytes = 0u64;
        let weights = problem.weights.layers.iter().map(|&layer| {
            bytes = bytes.saturating_add(layer);
            bytes
        });
        Times {
            rows,
            before: devices.iter().map(before).collect(),
            step: devices.iter().map(|&device| problem.devices[device].cost.step).collect(),
            head: devices.last().map_or(0.0, |&device| problem.devices[device].cost.head.decode(rows)),
            links: devices.windows(2).map(|pair| problem.links[pair[0]][pair[1]]).collect(),
            weights_before: [0].into_iter().chain(weights).collect(),
        }
    }

    /// Seconds that a stage with these layers is busy with a micro-batch.
    pub fn busy(&self, stage: usize, layers: &Range<usize>) -> f64 {
        let compute = self.step[stage] + (self.before[stage][layers.end] - self.before[stage][layers.start]);
        match self.links.get(stage) {
            Some(link) => compute + link.copy(self.rows),
            None => compute + self.head,
        }
    }

    /// Bytes of the weights of a stage with these layers: [`WeightBytes::stage`] without adding up the layers.
    pub fn weights(&self, weights: &WeightBytes, layers: &Range<usize>) -> u64 {
        let ends = match (layers.start == 0, layers.end + 1 == self.weights_before.len()) {
            (true, true) if weights.tied => weights.head,
            (true, true) => weights.embeddings.saturating_add(weights.head),
            (true, false) => weights.embeddings,
            (false, true) => weights.head,
            (false, false) => 0,
        };
        (self.weights_before[layers.end] - self.weights_before[layers.start]).saturating_add(ends)
    }
}
