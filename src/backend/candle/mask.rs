//! Attention masks for prompt chunks. One token at a time needs none: it sees all that its range of the KV cache holds.

use std::collections::VecDeque;

use candle_core::{DType, Device, Tensor};

use crate::error::Result;

/// Masks kept, unless told otherwise: those of one chunk's blocks, which every layer asks for again, with and without a
/// window.
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
    /// Masks kept at most.
    capacity: usize,
}

impl MaskCache {
    /// An empty cache for scores of `dtype` on `device`.
    pub fn new(device: Device, dtype: DType) -> Self {
        MaskCache { device, dtype, masks: VecDeque::new(), capacity: MASKS }
    }

    /// Keeps so many masks at most from now on; none, and each is made when it is asked for.
    pub fn keep(&mut self, capacity: usize) {
        self.capacity = capacity;
        self.masks.truncate(capacity);
    }

    /// What is added to the scores of `queries` positions against the `keys` positions that end with them:
    /// (queries, keys), 0 where a query may look and minus infinity where not. A query sees itself and what is before
    /// it, `window` positions in all where there is one.
    pub fn get(&mut self, queries: usize, keys: usize, window: Option<usize>) -> Result<Tensor> {
        let key = Key { queries, keys, window };
        let held = self.masks.iter().position(|(held, _)| *held == key);
        let (_, mask) = match held.and_then(|at| self.masks.remove(at)) {
            Some(entry) => entry,
            None => (key, Tensor::from_vec(values(key), (queries, keys), &self.device)?.to_dtype(self.dtype)?),
        };
        if self.capacity > 0 {
            self.masks.truncate(self.capacity - 1);
            self.masks.push_front((key, mask.clone()));
        }
        Ok(mask)
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

    #[test]
    fn a_cache_of_none_makes_the_same_masks_and_keeps_none() {
        let mut cache = MaskCache::new(Device::Cpu, DType::F32);
        let kept = cache.get(3, 5, Some(2)).unwrap().to_vec2::<f32>().unwrap();
        cache.keep(0);
        assert!(cache.masks.is_empty());
        assert_eq!(cache.get(3, 5, Some(2)).unwrap().to_vec2::<f32>().unwrap(), kept);
        assert!(cache.masks.is_empty());
        cache.keep(1);
        cache.get(2, 4, None).unwrap();
        cache.get(2, 5, None).unwrap();
        assert_eq!(cache.masks.len(), 1);
    }
}
