//! Attention masks for prompt chunks. One token at a time needs none: it sees all that its range of the KV cache holds.

use std::collections::VecDeque;

use candle_core::{DType, Device, Tensor};

use crate::error::Result;

/// Masks kept: those of one chunk's blocks, which every layer asks for again, with and without a window.
const MASKS: usize = 16;

/// What a mask depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Key {
    queries: usize,
    keys: usize,
    window: Option<usize>,
}

/// The masks used last, a bounded number of them.
pub struct MaskCache {
    device: Device,
    dtype: DType,
    masks: VecDeque<(Key, Tensor)>,
}

impl MaskCache {
    /// An empty cache for scores of `dtype` on `device`.
    pub fn new(device: Device, dtype: DType) -> Self {
        MaskCache { device, dtype, masks: VecDeque::new() }
    }

    /// What is added to the scores of `queries` positions against the `keys` positions that end with them:
    /// (queries, keys), 0 where a query may look and minus infinity where not. A query sees itself and what is before
    /// it, `window` positions in all where there is one.
    pub fn get(&mut self, queries: usize, keys: usize, window: Option<usize>) -> Result<Tensor> {
        let key = Key { queries, keys, window };
        if let Some(at) = self.masks.iter().position(|(held, _)| *held == key) {
            if let Some(entry) = self.masks.remove(at) {
                self.masks.push_front(entry);
            }
        } else {
            self.masks.truncate(MASKS - 1);
            let mask = Tensor::from_vec(values(key), (queries, keys), &self.device)?.to_dtype(self.dtype)?;
            self.masks.push_front((key, mask));
        }
        Ok(self.masks[0].1.clone())
    }
}

fn values(Key { queries, keys, window }: Key) -> Vec<f32> {
    let first = keys - queries; // the first query's own position among the keys
    let mut values = Vec::with_capacity(queries * keys);
    for query in first..keys {
        for key in 0..keys {
            let visible = key <= query && window.is_none_or(|window| query - key < window);
            values.push(if visible { 0.0 } else { f32::NEG_INFINITY });
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_sees_itself_and_its_window() {
        const NO: f32 = f32::NEG_INFINITY;
        let causal = values(Key { queries: 2, keys: 4, window: None });
        assert_eq!(causal, [0., 0., 0., NO, 0., 0., 0., 0.]);
        let sliding = values(Key { queries: 2, keys: 4, window: Some(2) });
        assert_eq!(sliding, [NO, 0., 0., NO, NO, NO, 0., 0.]);
    }

    #[test]
    fn the_cache_is_bounded_and_keeps_what_was_used_last() {
        let mut cache = MaskCache::new(Device::Cpu, DType::F32);
        for keys in 2..100 {
            cache.get(2, 2, None).unwrap();
            cache.get(2, keys, None).unwrap();
            assert!(cache.masks.len() <= MASKS);
            assert!(cache.masks.iter().any(|(key, _)| key.keys == 2));
        }
    }
}
