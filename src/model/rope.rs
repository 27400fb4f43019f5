//! Rotary position embeddings (RoFormer, arXiv 2104.09864) with the long-context scalings of Hugging Face transformers.
//! Cos and sin are computed once a device, in f32, and shared by all layers of all stages on it.

use std::f64::consts::PI;
use std::sync::OnceLock;

use candle_core::{DType, Device, Tensor};

use super::config::{DecoderConfig, RopeConfig, RopeScaling};
use crate::error::Result;

/// Positions in the smallest table; each further one has twice as many.
const FIRST_POSITIONS: usize = 512;

/// Tables of doubling length, enough for every position that KV could be held for.
const TABLES: usize = 32;

/// The rotary embeddings of a model on one device.
pub struct Ropes {
    /// Of most layers.
    pub global: RopeCache,
    /// Of the layers with [`LayerRope::Local`](super::config::LayerRope::Local).
    pub local: Option<RopeCache>,
}

impl Ropes {
    /// Empty tables for `device`; they fill as positions are asked for.
    pub fn new(config: &DecoderConfig, device: &Device) -> Self {
        let cache = |rope: &RopeConfig| RopeCache::new(rope.clone(), device.clone());
        Ropes { global: cache(&config.rope), local: config.local_rope.as_ref().map(cache) }
    }

    /// Bytes of all tables on a device once a sequence has come to `context` positions.
    pub fn most_bytes(config: &DecoderConfig, context: usize) -> u64 {
        let bytes = |rope: &RopeConfig| {
            let (positions, sets) = match rope.scaling {
                // Longer sequences have rotations of their own, which are not kept.
                RopeScaling::Dynamic { original_max_position_embeddings, .. } => {
                    (context.min(original_max_position_embeddings), 1)
                }
                RopeScaling::LongRope { .. } => (context, 2),
                _ => (context, 1),
            };
            // Each table is twice as long as the one before, so all together are less than twice the longest.
            let blocks = positions.div_ceil(FIRST_POSITIONS).checked_next_power_of_two().unwrap_or(usize::MAX);
            let positions = (blocks as u64).saturating_mul(2 * FIRST_POSITIONS as u64);
            positions.saturating_mul((sets * rope.rotary_dim * size_of::<f32>()) as u64)
        };
        std::iter::once(&config.rope).chain(&config.local_rope).fold(0, |all, rope| bytes(rope).saturating_add(all))
    }

    /// Keeps nothing: every layer of every step computes what it needs. The values are the same; it shows what the tables
    /// gain.
    pub fn afresh(config: &DecoderConfig, device: &Device) -> Self {
        let Ropes { global, local } = Ropes::new(config, device);
        let afresh = |cache: RopeCache| RopeCache { keeping: Keeping::Nothing, ..cache };
        Ropes { global: afresh(global), local: local.map(afresh) }
    }
}

/// Cos and sin for one device. A table is written once and never changes, so stages share them without a lock.
pub struct RopeCache {
    config: RopeConfig,
    device: Device,
    keeping: Keeping,
    short: [OnceLock<Table>; TABLES],
    long: [OnceLock<Table>; TABLES],
}

/// What is kept of what was computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Keeping {
    Tables,
    Nothing,
}

struct Table {
    cos: Tensor, // (positions, rotary_dim / 2)
    sin: Tensor, // (positions, rotary_dim / 2)
}

impl RopeCache {
    /// An empty cache on `device`.
    pub fn new(config: RopeConfig, device: Device) -> Self {
        RopeCache { config, device, keeping: Keeping::Tables, short: Default::default(), long: Default::default() }
    }

    /// Rotates `x`: (1, heads, seq, head_dim), whose first row stands at `position` in a sequence that is `length`
    /// long as far as it is known (the scalings that depend on the length ask for it).
    pub fn rotate(&self, x: &Tensor, position: usize, length: usize) -> Result<Tensor> {
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

    /// Leading elements of a head that are rotated.
    pub fn rotary_dim(&self) -> usize {
        self.config.rotary_dim
    }

    /// Copies cos and sin of as many positions as fit, from `position` on: (positions, rotary_dim / 2) each. `length` as
    /// for [`rotate`](Self::rotate).
    pub fn copy_rows(&self, position: usize, length: usize, cos: &mut [f32], sin: &mut [f32]) -> Result<()> {
        let half = self.config.rotary_dim / 2;
        let tables = self.cos_sin(position, cos.len() / half, length)?;
        for (table, out) in [(tables.0, cos), (tables.1, sin)] {
            out.copy_from_slice(&table.flatten_all()?.to_vec1::<f32>()?);
        }
        Ok(())
    }

    /// Cos and sin of `seq` positions from `position` on, on the device: (seq, rotary_dim / 2) each.
    pub fn cos_sin(&self, position: usize, seq: usize, length: usize) -> Result<(Tensor, Tensor)> {
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
        if self.keeping == Keeping::Nothing {
            let table = self.table(position, seq, length)?;
            return Ok((table.cos, table.sin));
        }
        // The smallest table that reaches the last position.
        let blocks = (position + seq).div_ceil(FIRST_POSITIONS).next_power_of_two();
        let level = blocks.trailing_zeros() as usize;
        let slot = if long { &self.long[level] } else { &self.short[level] };
        let table = match slot.get() {
            Some(table) => table,
            None => {
                let made = self.table(0, FIRST_POSITIONS << level, length)?;
                // Another stage may have been faster; its values are the same.
                slot.get_or_init(|| made)
            }
        };
        Ok((table.cos.narrow(0, position, seq)?, table.sin.narrow(0, position, seq)?))
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
        Ok(Table { cos: upload(cos)?, sin: upload(sin)? })
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

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(scaling: RopeScaling) -> RopeCache {
        RopeCache::new(RopeConfig { theta: 10_000.0, rotary_dim: 8, scaling, interleaved: false }, Device::Cpu)
    }

    #[test]
    fn tables_of_every_length_hold_the_same_values_and_are_made_once() {
        let cache = cache(RopeScaling::Default);
        for (position, seq) in [(0, 1), (511, 1), (510, 3), (1023, 2), (5000, 7)] {
            let (cos, sin) = cache.cos_sin(position, seq, position + seq).unwrap();
            assert_eq!(cos.dims(), [seq, 4]);
            let (cos, sin) = (cos.to_vec2::<f32>().unwrap(), sin.to_vec2::<f32>().unwrap());
            for (row, (cos, sin)) in cos.iter().zip(&sin).enumerate() {
                for (i, (cos, sin)) in cos.iter().zip(sin).enumerate() {
                    let angle = (position + row) as f32 * (1.0 / 10_000f32.powf(2.0 * i as f32 / 8.0));
                    assert_eq!((*cos, *sin), (angle.cos(), angle.sin()));
                }
            }
        }
        let made = cache.short.iter().filter(|table| table.get().is_some()).count();
        assert_eq!(made, 4); // 512, 1024, 2048 and 8192 positions
    }

    #[test]
    fn what_is_computed_afresh_is_the_same_and_is_not_kept() {
        let factors = RopeScaling::LongRope {
            short_factor: vec![1.0, 1.5, 2.0, 3.0],
            long_factor: vec![2.0, 4.0, 8.0, 16.0],
            original_max_position_embeddings: 64,
            attention_factor: 1.1,
        };
        for scaling in [RopeScaling::Default, factors] {
            let kept = cache(scaling.clone());
            let afresh = RopeCache { keeping: Keeping::Nothing, ..cache(scaling) };
            for (position, seq, length) in [(0, 3, 3), (40, 1, 41), (600, 2, 602)] {
                let (kept, afresh) = [&kept, &afresh].map(|c| c.cos_sin(position, seq, length).unwrap()).into();
                for (kept, afresh) in [(kept.0, afresh.0), (kept.1, afresh.1)] {
                    assert_eq!(kept.to_vec2::<f32>().unwrap(), afresh.to_vec2::<f32>().unwrap());
                }
            }
            assert!(afresh.short.iter().chain(&afresh.long).all(|table| table.get().is_none()));
        }
    }
}
