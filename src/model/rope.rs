//! Rotary position embeddings (RoFormer, arXiv 2104.09864) with the long-context scalings of Hugging Face transformers.
//! Cos and sin are computed once in f32, shared by all layers of a stage, and grown by doubling up to the context.

use std::f64::consts::PI;

use candle_core::{DType, Device, Tensor};

use super::config::{RopeConfig, RopeScaling};
use crate::error::Result;

/// Positions in the first table; it doubles when a sequence grows past it.
const FIRST_POSITIONS: usize = 512;

/// Cos and sin for one device.
pub struct RopeCache {
    config: RopeConfig,
    device: Device,
    short: Option<Table>,
    long: Option<Table>,
}

struct Table {
    cos: Tensor, // (positions, rotary_dim / 2)
    sin: Tensor, // (positions, rotary_dim / 2)
    positions: usize,
}

impl RopeCache {
    /// An empty cache on `device`.
    pub fn new(config: RopeConfig, device: Device) -> Self {
        RopeCache { config, device, short: None, long: None }
    }

    /// Rotates `x`: (1, heads, seq, head_dim), whose first row stands at `position` in a sequence that is `length`
    /// long as far as it is known (the scalings that depend on the length ask for it).
    pub fn rotate(&mut self, x: &Tensor, position: usize, length: usize) -> Result<Tensor> {
        let seq = x.dim(2)?;
        let (cos, sin) = self.cos_sin(position, seq, length)?;
        let rotary_dim = self.config.rotary_dim;
        // In f32, whatever the activations' type: half types cannot tell large angles apart.
        let apply = |x: &Tensor| {
            let wide = x.to_dtype(DType::F32)?;
            match self.config.interleaved {
                true => candle_nn::rotary_emb::rope_i(&wide, &cos, &sin),
                false => candle_nn::rotary_emb::rope(&wide, &cos, &sin),
            }?
            .to_dtype(x.dtype())
        };
        let head_dim = x.dim(3)?;
        if rotary_dim == head_dim {
            return Ok(apply(&x.contiguous()?)?);
        }
        let rotated = apply(&x.narrow(3, 0, rotary_dim)?.contiguous()?)?;
        let passed = x.narrow(3, rotary_dim, head_dim - rotary_dim)?;
        Ok(Tensor::cat(&[&rotated, &passed.contiguous()?], 3)?)
    }

    /// Cos and sin of `seq` positions from `position` on: (seq, rotary_dim / 2) each.
    fn cos_sin(&mut self, position: usize, seq: usize, length: usize) -> Result<(Tensor, Tensor)> {
        let long = match &self.config.scaling {
            RopeScaling::LongRope { original_max_position_embeddings, .. } => {
                length > *original_max_position_embeddings
            }
            // Every length has frequencies of its own, which are not worth keeping.
            RopeScaling::Dynamic { original_max_position_embeddings, .. }
                if length > *original_max_position_embeddings =>
            {
                let table = self.table(position, seq, length)?;
                return Ok((table.cos, table.sin));
            }
            _ => false,
        };
        let end = position + seq;
        let held = if long { &self.long } else { &self.short };
        if held.as_ref().is_none_or(|table| table.positions < end) {
            let grown = self.table(0, end.next_power_of_two().max(FIRST_POSITIONS), length)?;
            *(if long { &mut self.long } else { &mut self.short }) = Some(grown);
        }
        match if long { &self.long } else { &self.short } {
            Some(table) => Ok((table.cos.narrow(0, position, seq)?, table.sin.narrow(0, position, seq)?)),
            None => unreachable!("the table was made above"),
        }
    }

    fn table(&self, position: usize, positions: usize, length: usize) -> Result<Table> {
        let (frequencies, factor) = inverse_frequencies(&self.config, length);
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for p in position..position + positions {
            for &frequency in &frequencies {
                // f32 throughout, as the reference computes it.
                let angle = p as f32 * frequency;
                cos.push(angle.cos() * factor);
                sin.push(angle.sin() * factor);
            }
        }
        let shape = (positions, frequencies.len());
        let upload = |values: Vec<f32>| Tensor::from_vec(values, shape, &self.device);
        Ok(Table { cos: upload(cos)?, sin: upload(sin)?, positions })
    }
}

/// Inverse frequencies for a sequence of `length` positions, and the factor on cos and sin.
pub fn inverse_frequencies(config: &RopeConfig, length: usize) -> (Vec<f32>, f32) {
    let dim = config.rotary_dim;
    let base = |theta: f64| -> Vec<f32> {
        (0..dim / 2).map(|i| 1.0 / (theta as f32).powf((2 * i) as f32 / dim as f32)).collect()
    };
    let plain = base(config.theta);
    match &config.scaling {
        RopeScaling::Default => (plain, 1.0),
        RopeScaling::Linear { factor } => (plain.iter().map(|f| f / *factor as f32).collect(), 1.0),
        RopeScaling::Dynamic { factor, original_max_position_embeddings } => {
            let trained = *original_max_position_embeddings as f64;
            let length = (length as f64).max(trained);
            let stretch = factor * length / trained - (factor - 1.0);
            let d = dim as f64;
            (base(config.theta * stretch.powf(d / (d - 2.0))), 1.0)
        }
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
            let trained = *original_max_position_embeddings as f64;
            let scale = |&frequency: &f32| {
                let frequency = frequency as f64;
                let turns = trained * frequency / (2.0 * PI);
                let scaled = match turns {
                    t if t < *low_freq_factor => frequency / factor,
                    t if t > *high_freq_factor => frequency,
                    t => {
                        let smooth = (t - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        (1.0 - smooth) * frequency / factor + smooth * frequency
                    }
                };
                scaled as f32
            };
            (plain.iter().map(scale).collect(), 1.0)
        }
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            attention_factor,
            beta_fast,
            beta_slow,
            truncate,
        } => {
            // The dimension whose frequency makes `turns` turns over the trained length.
            let dimension = |turns: f64| {
                let trained = *original_max_position_embeddings as f64;
                dim as f64 * (trained / (turns * 2.0 * PI)).ln() / (2.0 * config.theta.ln())
            };
            let (mut low, mut high) = (dimension(*beta_fast), dimension(*beta_slow));
            if *truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            (low, high) = (low.max(0.0), high.min(dim as f64 - 1.0));
            if low == high {
                high += 0.001;
            }
            let blend = |(i, &frequency): (usize, &f32)| {
                let stretched = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0) as f32;
                frequency / *factor as f32 * stretched + frequency * (1.0 - stretched)
            };
            (plain.iter().enumerate().map(blend).collect(), *attention_factor as f32)
        }
        RopeScaling::LongRope { short_factor, long_factor, original_max_position_embeddings, attention_factor } => {
            let long = length > *original_max_position_embeddings;
            let divisors = if long { long_factor } else { short_factor };
            (divide(&plain, divisors), *attention_factor as f32)
        }
        RopeScaling::Divided { factors } => (divide(&plain, factors), 1.0),
    }
}

fn divide(frequencies: &[f32], divisors: &[f32]) -> Vec<f32> {
    frequencies.iter().zip(divisors).map(|(frequency, divisor)| frequency / divisor).collect()
}
