//! The backend over candle's tensors: every device, and the readable reference for the faster ones.

use std::collections::HashMap;

use candle_core::{Device, Tensor};

use super::{MicroBatch, SequenceId, StageBackend, StageBytes, StageOutput, StageSource};
use crate::error::{Error, Result};
use crate::instrument::{HiddenRow, Watch};
use crate::model::decoder::{Decoder, DecoderOptions, Input, Output, Rows};
use crate::model::kv_cache::SequenceKv;

/// A run of decoder layers and the keys and values of the sequences that are open in it.
pub struct CandleBackend {
    decoder: Decoder,
    sequences: HashMap<SequenceId, SequenceKv>,
}

impl CandleBackend {
    /// Loads a stage tensor by tensor; `progress` hears of bytes as they arrive.
    pub fn load(source: &StageSource, progress: &dyn Fn(u64)) -> Result<Self> {
        let decoder = Decoder::load(
            &*source.weights,
            source.config.clone(),
            source.layers.clone(),
            &source.device,
            source.ropes.clone(),
            DecoderOptions { dense_type: source.options.dense_type, metal: source.options.metal },
            progress,
        )?;
        Ok(CandleBackend { decoder, sequences: HashMap::new() })
    }

    /// The layers and what is around them.
    #[cfg(all(feature = "metal", target_os = "macos"))]
    pub(super) fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// Keys and values of an open sequence.
    #[cfg(all(feature = "metal", target_os = "macos"))]
    pub(super) fn sequence(&self, id: SequenceId) -> Result<&SequenceKv> {
        let kv = self.sequences.get(&id);
        kv.ok_or_else(|| Error::Tensors(format!("sequence {} is not open in this stage", id.0)))
    }

    /// Keeps so many attention masks of prompt chunks at most, for the next layers and chunks; 0 makes each anew, which
    /// shows what keeping them gains.
    pub fn keep_masks(&mut self, capacity: usize) {
        self.decoder.keep_masks(capacity);
    }

    fn run(&mut self, batch: &MicroBatch, input: Option<Tensor>, watch: &mut Watch) -> Result<StageOutput> {
        // A sequence's KV leaves the table while the decoder has it: two slices of one sequence cannot alias.
        let mut taken = Vec::with_capacity(batch.slices.len());
        for slice in &batch.slices {
            match self.sequences.remove(&slice.id) {
                Some(kv) => taken.push((slice.id, kv)),
                None => {
                    self.sequences.extend(taken);
                    return Err(Error::Tensors(format!("sequence {} is not open in this stage", slice.id.0)));
                }
            }
        }
        let mut rows: Vec<Rows> = batch
            .slices
            .iter()
            .zip(&mut taken)
            .map(|(slice, (_, kv))| Rows {
                sequence: slice.id.0,
                kv,
                position: slice.position,
                len: slice.len,
                length: slice.length,
                predicted: slice.wanted.rows(),
            })
            .collect();
        let input = match input {
            Some(activations) => Input::Activations(activations),
            None => Input::Tokens(&batch.tokens),
        };
        let output = self.decoder.forward(input, &mut rows, watch);
        self.sequences.extend(taken);
        Ok(match output? {
            Output::Activations(x) => StageOutput::Activations(x),
            Output::Logits(None) => StageOutput::Logits(Vec::new()),
            Output::Logits(Some(logits)) => StageOutput::Logits(logits.to_vec2()?),
        })
    }
}

impl StageBackend for CandleBackend {
    fn open(&mut self, id: SequenceId, capacity: usize) -> Result<()> {
        let kv = self.decoder.new_kv(capacity)?;
        self.sequences.insert(id, kv);
        Ok(())
    }

    fn fork(&mut self, from: SequenceId, to: SequenceId, len: usize, capacity: usize) -> Result<()> {
        let mut kv = self.decoder.new_kv(capacity)?;
        match self.sequences.get(&from) {
            Some(source) => kv.copy_prefix(source, len)?,
            None => return Err(Error::Tensors(format!("sequence {} is not open in this stage", from.0))),
        }
        self.sequences.insert(to, kv);
        Ok(())
    }

    fn truncate(&mut self, id: SequenceId, _: usize) -> Result<()> {
        match self.sequences.contains_key(&id) {
            true => Ok(()),
            false => Err(Error::Tensors(format!("sequence {} is not open in this stage", id.0))),
        }
    }

    fn close(&mut self, id: SequenceId) {
        self.sequences.remove(&id);
    }

    fn forward(&mut self, batch: &MicroBatch, input: Option<Tensor>, watch: &mut Watch) -> Result<StageOutput> {
        self.run(batch, input, watch)
    }

    fn lens(&mut self, rows: &[HiddenRow]) -> Result<Vec<Vec<f32>>> {
        let width = rows.first().map_or(0, |row| row.values.len());
        let values: Vec<f32> = rows.iter().flat_map(|row| row.values.iter().copied()).collect();
        self.decoder.lens(Tensor::from_vec(values, (rows.len(), width), &Device::Cpu)?)
    }

    fn bytes(&self) -> StageBytes {
        StageBytes {
            weights: self.decoder.weight_bytes(),
            kv: self.sequences.values().map(SequenceKv::bytes).sum(),
            scratch: 0, // candle allocates and frees as it goes
        }
    }
}
