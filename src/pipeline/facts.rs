//! What is known of a model on its stages, as plain data for those who listen.

use super::HeterogeneousPipeline;
use crate::error::Result;
use crate::instrument::{ModelFacts, StageFacts, TensorFacts};
use crate::model::stage_weights::WeightBytes;

impl HeterogeneousPipeline {
    /// The model, its stages and its weights. `kv_positions` is what the stages have KV for together.
    pub fn facts(&self, kv_positions: usize) -> Result<ModelFacts> {
        let (config, source) = (self.config(), self.weights());
        let bytes = WeightBytes::of(&**source, config, self.options().dtype)?;
        let stages = self.stages().iter().map(|stage| {
            let layers: u64 = bytes.layers[stage.layers.clone()].iter().sum();
            let (first, last) = (stage.layers.start == 0, stage.layers.end == config.num_hidden_layers);
            let shared = if first && last && bytes.tied { bytes.embeddings } else { 0 };
            StageFacts {
                device: stage.device.to_string(),
                first_layer: stage.layers.start,
                layers: stage.layers.len(),
                weight_bytes: stage.weight_bytes,
                embedding_bytes: if first { bytes.embeddings } else { 0 },
                layer_bytes: bytes.layers[stage.layers.clone()].to_vec(),
                head_bytes: if last { bytes.head - shared } else { 0 },
                step_bytes: layers + if last { bytes.head } else { 0 },
                kv_bytes_per_position: stage.kv_bytes_per_token,
                windows: config.layers[stage.layers.clone()].iter().map(|layer| layer.sliding_window).collect(),
                kv_budget: stage.kv_budget,
            }
        });
        let mut names = source.names();
        // Embeddings, layers, and what is behind them.
        let place = |name: &str| match layer_of(name) {
            Some(layer) => layer + 1,
            None if name.starts_with("embed") => 0,
            None => usize::MAX,
        };
        names.sort_by_key(|name| (place(name), name.clone()));
        let mut tensors = Vec::with_capacity(names.len());
        for name in names {
            let Some(meta) = source.meta(&name)? else { continue };
            let holder = match layer_of(&name) {
                Some(layer) => self.stages().iter().find(|stage| stage.layers.contains(&layer)),
                None if name.starts_with("norm") || name.starts_with("lm_head") => self.stages().last(),
                None => self.stages().first(),
            };
            tensors.push(TensorFacts {
                memory_bytes: meta.bytes(),
                element_count: meta.shape.iter().product::<usize>() as u64,
                dtype: meta.dtype.name().to_string(),
                shape: meta.shape,
                device: holder.map_or_else(String::new, |stage| stage.device.to_string()),
                name,
            });
        }
        Ok(ModelFacts {
            architecture: config.architecture.clone(),
            n_layer: config.num_hidden_layers,
            n_embd: config.hidden_size,
            vocab_size: config.vocab_size,
            context_length: self.context_length(),
            kv_positions,
            stages: stages.collect(),
            tensors,
        })
    }
}

/// The layer that a canonical name belongs to.
fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("layers.")?.split_once('.')?.0.parse().ok()
}
