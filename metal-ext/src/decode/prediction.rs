//! What a decode step should take on GPUs that are not here: arithmetic over a dry run, no measurement.

use crate::encoder::DryRun;

/// A chip by its published memory bandwidth.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Chip {
    /// As Apple calls it.
    pub name: &'static str,
    /// Bytes a second, in 10^9, as Apple publishes them in each chip's announcement and in the specifications of the
    /// Macs that have it.
    pub bandwidth: f64,
}

/// Chips whose memory differs.
pub const CHIPS: [Chip; 13] = [
    Chip { name: "M1", bandwidth: 68.25 },
    Chip { name: "M1 Pro", bandwidth: 200.0 },
    Chip { name: "M1 Max", bandwidth: 400.0 },
    Chip { name: "M2", bandwidth: 100.0 },
    Chip { name: "M2 Pro", bandwidth: 200.0 },
    Chip { name: "M2 Max", bandwidth: 400.0 },
    Chip { name: "M2 Ultra", bandwidth: 800.0 },
    Chip { name: "M3", bandwidth: 100.0 },
    Chip { name: "M3 Pro", bandwidth: 150.0 },
    Chip { name: "M3 Max, 40 cores", bandwidth: 400.0 },
    Chip { name: "M4", bandwidth: 120.0 },
    Chip { name: "M4 Pro", bandwidth: 273.0 },
    Chip { name: "M4 Max, 40 cores", bandwidth: 546.0 },
];

/// The part of the published bandwidth that a program gets. An assumption: what is reported for such chips lies between
/// 0.7 and 0.85.
const SHARE: f64 = 0.8;

/// Seconds from the end of a dispatch to the start of the next that waits for it. An assumption, of the order that fits
/// what other engines report; a Mac must tell.
const LAUNCH: f64 = 3e-6;

/// Seconds to hand a step to the GPU and hear that it is done. An assumption as well.
const SUBMISSION: f64 = 100e-6;

/// Where a step's time should go.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prediction {
    /// Seconds of moving bytes.
    pub moving: f64,
    /// Seconds between dispatches.
    pub launching: f64,
    /// Seconds around the step.
    pub submitting: f64,
}

impl Prediction {
    /// For these dispatches on this chip.
    pub fn new<B>(step: &DryRun<B>, chip: Chip) -> Prediction {
        Prediction {
            moving: step.bytes() as f64 / (chip.bandwidth * 1e9 * SHARE),
            launching: step.dispatches.len() as f64 * LAUNCH,
            submitting: SUBMISSION,
        }
    }

    /// Steps a second.
    pub fn tokens_per_second(&self) -> f64 {
        1.0 / (self.moving + self.launching + self.submitting)
    }
}
