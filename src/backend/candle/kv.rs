//! Keys and values of one sequence, allocated once for all the positions it will ever have.

use candle_core::{DType, Device, Tensor};

use crate::backend::sequences::SequenceState;
use crate::error::{Error, Result};
use crate::model::config::DecoderConfig;

/// Keys and values of one sequence in the layers of one stage.
pub struct TensorKv {
    layers: Vec<KeysValues>,
    capacity: usize,
    bytes: u64,
}

/// Those of one layer.
struct KeysValues {
    keys: Tensor,   // (num_key_value_heads, capacity, head_dim)
    values: Tensor, // (num_key_value_heads, capacity, head_dim)
}

impl TensorKv {
    /// Room for `capacity` positions in `layers` layers.
    pub fn new(
        config: &DecoderConfig,
        layers: usize,
        capacity: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<TensorKv> {
        let shape = (config.num_key_value_heads, capacity, config.head_dim);
        let layers = (0..layers)
            .map(|_| {
                Ok(KeysValues {
                    keys: Tensor::zeros(shape, dtype, device)?,
                    values: Tensor::zeros(shape, dtype, device)?,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let elements = layers.len() * capacity * config.kv_elements_per_token();
        Ok(TensorKv { layers, capacity, bytes: (elements * dtype.size_in_bytes()) as u64 })
    }

    /// Positions that there is room for.
    #[cfg(all(feature = "metal", target_os = "macos"))]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// All keys and all values of layer `layer`: (num_key_value_heads, capacity, head_dim) each.
    #[cfg(all(feature = "metal", target_os = "macos"))]
    pub fn tensors(&self, layer: usize) -> (&Tensor, &Tensor) {
        (&self.layers[layer].keys, &self.layers[layer].values)
    }

    /// Writes keys and values, (num_key_value_heads, seq, head_dim) each, at `position` of layer `layer`, in the cache's type.
    pub fn append(&mut self, layer: usize, position: usize, keys: &Tensor, values: &Tensor) -> Result<()> {
        let end = position + keys.dim(1)?;
        if end > self.capacity {
            let capacity = self.capacity;
            return Err(Error::Tensors(format!("position {end} is past the KV cache's {capacity}")));
        }
        let cache = &self.layers[layer];
        cache.keys.slice_set(&keys.to_dtype(cache.keys.dtype())?.contiguous()?, 1, position)?;
        cache.values.slice_set(&values.to_dtype(cache.values.dtype())?.contiguous()?, 1, position)?;
        Ok(())
    }

    /// Views of positions `start..end` of layer `layer`: (num_key_value_heads, end - start, head_dim) each.
    pub fn view(&self, layer: usize, start: usize, end: usize) -> Result<(Tensor, Tensor)> {
        let cache = &self.layers[layer];
        Ok((cache.keys.narrow(1, start, end - start)?, cache.values.narrow(1, start, end - start)?))
    }
}

impl SequenceState for TensorKv {
    fn copy_prefix(&mut self, source: &TensorKv, len: usize) -> Result<()> {
        if len > self.capacity.min(source.capacity) {
            let (capacity, source) = (self.capacity, source.capacity);
            return Err(Error::Tensors(format!(
                "{len} positions of a KV cache of {source} do not fit into {capacity}"
            )));
        }
        for (to, from) in self.layers.iter().zip(&source.layers) {
            to.keys.slice_set(&from.keys.narrow(1, 0, len)?.contiguous()?, 1, 0)?;
            to.values.slice_set(&from.values.narrow(1, 0, len)?.contiguous()?, 1, 0)?;
        }
        Ok(())
    }

    fn truncate(&mut self, _: usize) -> Result<()> {
        Ok(()) // what stands behind is written again before it is read
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }
}
