//! The backend over candle's tensors: every device, and the readable reference for the faster ones.

mod attention;
mod kv;
mod mask;
mod matrix;
#[cfg(all(feature = "metal", target_os = "macos"))]
pub mod metal_matrix;
mod step;

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use self::attention::Softmax;
pub(super) use self::kv::TensorKv;
use self::mask::MaskCache;
pub(super) use self::matrix::CandleBuild;
#[cfg(all(feature = "metal", target_os = "macos"))]
pub(super) use self::matrix::DeviceMatrix;
use self::step::CandleStep;
use super::layer;
use super::sequences::Sequences;
use super::{MicroBatch, SequenceId, StageBackend, StageBytes, StageOptions, StageOutput, StageSource};
use crate::error::Result;
use crate::instrument::{HiddenRow, Watch};
use crate::model::config::DecoderConfig;
use crate::model::rope::Ropes;
use crate::model::stage_weights::StageWeights;
use crate::weights::{WeightSource, WeightType};

/// A run of decoder layers and the keys and values of the sequences that are open in it.
pub struct CandleBackend {
    weights: StageWeights<CandleBuild>,
    stage: CandleStage,
    masks: MaskCache,
    sequences: Sequences<TensorKv>,
}

/// What a forward pass reads besides weights.
struct CandleStage {
    config: Arc<DecoderConfig>,
    device: Device,
    /// Type of activations.
    dtype: DType,
    kv_dtype: DType,
    ropes: Arc<Ropes>,
    softmax: Softmax,
}

impl CandleBackend {
    /// Loads a stage tensor by tensor; `progress` hears of bytes as they arrive.
    pub fn load(source: &StageSource, progress: &dyn Fn(u64)) -> Result<Self> {
        let StageSource { weights, config, layers, device, ropes, options } = source;
        let StageOptions { dense_type, metal, .. } = *options;
        let dtype = activation_dtype(&**weights, &device.device, dense_type)?;
        let kv_dtype = kv_dtype(&**weights, &device.device, dense_type)?;
        let build = CandleBuild::new(device, dtype, metal);
        let softmax = build.softmax();
        let weights = StageWeights::load(&**weights, config, layers.clone(), dense_type, &build, progress)?;
        let (config, device, ropes) = (config.clone(), build.device, ropes.clone());
        let masks = MaskCache::new(device.clone(), dtype);
        let stage = CandleStage { config, device, dtype, kv_dtype, ropes, softmax };
        Ok(CandleBackend { weights, stage, masks, sequences: Sequences::default() })
    }

    /// Keeps so many attention masks of prompt chunks at most, for the next layers and chunks; 0 makes each anew, which
    /// shows what keeping them gains.
    pub fn keep_masks(&mut self, capacity: usize) {
        self.masks.keep(capacity);
    }

    fn new_kv(&self, capacity: usize) -> Result<TensorKv> {
        let CandleStage { config, kv_dtype, device, .. } = &self.stage;
        TensorKv::new(config, self.weights.layers.len(), capacity, *kv_dtype, device)
    }
}

/// For the Metal backend, which computes some steps by itself.
#[cfg(all(feature = "metal", target_os = "macos"))]
impl CandleBackend {
    pub(super) fn weights(&self) -> &StageWeights<CandleBuild> {
        &self.weights
    }

    /// Keys and values of an open sequence.
    pub(super) fn sequence(&self, id: SequenceId) -> Result<&TensorKv> {
        self.sequences.get(id)
    }

    /// The embeddings of `tokens`, on a first stage: (tokens, hidden_size).
    pub(super) fn embed(&self, tokens: &[u32]) -> Result<Tensor> {
        layer::check_tokens(tokens, &self.stage.config)?;
        match &self.weights.embeddings {
            Some(table) => self.stage.embed(table, tokens),
            None => Err(layer::wrong_input()),
        }
    }
}

impl StageBackend for CandleBackend {
    fn open(&mut self, id: SequenceId, capacity: usize) -> Result<()> {
        let kv = self.new_kv(capacity)?;
        self.sequences.open(id, kv);
        Ok(())
    }

    fn fork(&mut self, from: SequenceId, to: SequenceId, len: usize, capacity: usize) -> Result<()> {
        let kv = self.new_kv(capacity)?;
        self.sequences.fork(from, to, len, kv)
    }

    fn truncate(&mut self, id: SequenceId, length: usize) -> Result<()> {
        self.sequences.truncate(id, length)
    }

    fn close(&mut self, id: SequenceId) {
        self.sequences.close(id);
    }

    fn forward(&mut self, batch: &MicroBatch, input: Option<Tensor>, watch: &mut Watch) -> Result<StageOutput> {
        let CandleBackend { weights, stage, masks, sequences } = self;
        sequences.lend(batch, |kv| {
            let step = CandleStep::new(stage, masks, &batch.slices, kv)?;
            layer::forward(step, weights, &stage.config, batch, input, watch)
        })
    }

    fn lens(&mut self, rows: &[HiddenRow]) -> Result<Vec<Vec<f32>>> {
        let step = CandleStep::new(&self.stage, &mut self.masks, &[], &mut [])?;
        layer::lens(step, &self.weights, &self.stage.config, rows)
    }

    fn bytes(&self) -> StageBytes {
        StageBytes {
            weights: self.weights.bytes,
            kv: self.sequences.bytes(),
            scratch: 0, // candle allocates and frees as it goes
        }
    }
}

/// The type of activations: f32 on a CPU, on Metal, where metal-ext's kernels share them, and with quantised weights; on
/// CUDA with dense weights, the weights' own.
pub fn activation_dtype(source: &dyn WeightSource, device: &Device, dense_type: Option<WeightType>) -> Result<DType> {
    if device.is_cpu() || device.is_metal() {
        return Ok(DType::F32);
    }
    // A stage need not hold the first layer, but the layers of a model are of one kind.
    let meta = match source.meta("layers.0.o_proj.weight")? {
        Some(meta) => meta,
        None => return Ok(DType::F32),
    };
    Ok(match (meta.dtype.is_dense(), dense_type.unwrap_or(meta.dtype)) {
        (true, WeightType::F16) => DType::F16,
        (true, WeightType::BF16) => DType::BF16,
        _ => DType::F32,
    })
}

/// The type of keys and values in a stage over tensors: f16 on Metal, as metal-ext's attention reads them; elsewhere that of the
/// activations.
pub fn kv_dtype(source: &dyn WeightSource, device: &Device, dense_type: Option<WeightType>) -> Result<DType> {
    match device.is_metal() {
        true => Ok(DType::F16),
        false => activation_dtype(source, device, dense_type),
    }
}
