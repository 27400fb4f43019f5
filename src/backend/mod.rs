//! The seam between a pipeline and what computes: [`StageBackend`] is one stage's layers, weights and KV on one device.
//! A [`MicroBatch`] is plain data that names sequences and positions, so that it could cross a wire.

mod layer;
mod sequences;
mod cpu;
pub mod candle;
pub mod fused;
#[cfg(all(feature = "metal", target_os = "macos"))]
mod metal;

pub use candle::CandleBackend;
pub use cpu::CpuBackend;
#[cfg(all(feature = "metal", target_os = "macos"))]
pub use metal::MetalBackend;

use std::ops::Range;
use std::sync::Arc;

use candle_core::Tensor;
use metal_ext::MetalExtOptions;

use crate::device::OpenDevice;
use crate::error::{Error, Result};
use crate::instrument::{HiddenRow, Watch};
use crate::kernels::kv::KvType;
use crate::model::config::DecoderConfig;
use crate::model::rope::Ropes;
use crate::weights::{WeightSource, WeightType};

/// What a stage is loaded from.
#[derive(Clone)]
pub struct StageSource {
    /// The model's tensors.
    pub weights: Arc<dyn WeightSource>,
    /// The model.
    pub config: Arc<DecoderConfig>,
    /// The stage's layers.
    pub layers: Range<usize>,
    /// Where it runs.
    pub device: OpenDevice,
    /// The device's rotary tables.
    pub ropes: Arc<Ropes>,
    /// F32, F16 and BF16 matrices become this type; `None` leaves them as stored.
    pub dense_type: Option<WeightType>,
    /// Type of keys and values on a CPU.
    pub kv_type: KvType,
    /// Whether a CPU with AMX computes prompts in BF16.
    pub bf16_prompts: bool,
    /// How metal-ext's kernels are used on an Apple GPU.
    pub metal: MetalExtOptions,
}

impl StageSource {
    /// Loads the backend that suits the device, tensor by tensor; `progress` hears of bytes as they arrive.
    pub fn load(&self, progress: &dyn Fn(u64)) -> Result<Box<dyn StageBackend>> {
        Ok(match &self.device.cpu {
            Some(cpu) => Box::new(CpuBackend::load(self, cpu, progress)?),
            #[cfg(all(feature = "metal", target_os = "macos"))]
            None if self.device.device.is_metal() => Box::new(MetalBackend::load(self, progress)?),
            None => Box::new(CandleBackend::load(self, progress)?),
        })
    }
}

/// Names a sequence in every stage. Never used twice within an executor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u64);

/// A run of consecutive positions of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SequenceSlice {
    /// The sequence.
    pub id: SequenceId,
    /// Position of the first row.
    pub position: usize,
    /// Number of rows.
    pub len: usize,
    /// Length of the sequence as far as it is known: the whole prompt in prefill, `position + 1` in decode. Rotary
    /// embeddings that depend on the length ask for it.
    pub length: usize,
    /// Whether this is a decode step, rather than rows of a prompt. A backend may compute the two in different ways, each
    /// of which gives a row the same bits whatever else is in the micro-batch.
    pub decode: bool,
    /// What is wanted of the last row.
    pub wanted: Wanted,
}

/// What the last stage is to say of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// Nothing: more of the prompt follows.
    Nothing,
    /// The most likely tokens are enough, so many of them. A stage that has all logits at hand may answer with those.
    Best(usize),
    /// All logits.
    Logits,
}

impl SequenceSlice {
    /// Whether the last row's logits are computed.
    pub fn is_predicted(&self) -> bool {
        self.wanted != Wanted::Nothing
    }
}

/// Rows of one or more sequences that pass through the stages together.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MicroBatch {
    /// The runs, in the order of the rows: decode steps before those of prompts.
    pub slices: Vec<SequenceSlice>,
    /// Token ids, one a row.
    pub tokens: Vec<u32>,
}

impl MicroBatch {
    /// How many of the rows, the last ones, are of prompts. An error if decode steps are behind them.
    pub fn prompt_rows(&self) -> Result<usize> {
        let prompts = self.slices.iter().skip_while(|slice| slice.decode);
        if prompts.clone().any(|slice| slice.decode) {
            return Err(Error::Tensors("a micro-batch with decode steps behind rows of prompts".into()));
        }
        Ok(prompts.map(|slice| slice.len).sum())
    }
}

/// What a stage passes on.
#[derive(Debug, Clone)]
pub enum StageOutput {
    /// For the next stage: (rows, hidden_size).
    Activations(Tensor),
    /// From the last stage: one vector of `vocab_size` values for each slice that wanted anything, in order.
    Logits(Vec<Vec<f32>>),
    /// From a last stage that looks for the most likely tokens where the logits are: one for each slice that wanted
    /// anything, in order.
    Predictions(Vec<Prediction>),
}

/// What the last stage says of a row.
#[derive(Debug, Clone, PartialEq)]
pub enum Prediction {
    /// `vocab_size` values.
    Logits(Vec<f32>),
    /// As many of the most likely tokens as were wanted, fewer than the vocabulary has, with their logits: the most likely
    /// first, the lowest id first among equals. Never of a row from which nothing can be chosen, since a logit is NaN or
    /// all are minus infinity: what is reported of that needs them all.
    Best(Vec<(u32, f32)>),
}

/// Bytes that a stage holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StageBytes {
    /// Weights, those that are read where a file is mapped included: their pages are in memory as the others are.
    pub weights: u64,
    /// Keys and values of open sequences.
    pub kv: u64,
    /// Buffers that a forward pass computes in, where they are kept from step to step.
    pub scratch: u64,
}

/// One stage's layers, weights and KV on one device. Owned by the stage's thread alone.
pub trait StageBackend: Send {
    /// Sets aside KV for `capacity` positions.
    fn open(&mut self, id: SequenceId, capacity: usize) -> Result<()>;

    /// Sets aside KV for `capacity` positions of the new sequence `to` and copies the first `len` positions of `from`,
    /// which is open, into it. Both go their own ways from there.
    fn fork(&mut self, from: SequenceId, to: SequenceId, len: usize, capacity: usize) -> Result<()>;

    /// Frees the sequence's KV. Unknown ids are ignored: a sequence may end before this stage heard of it.
    fn close(&mut self, id: SequenceId);

    /// Runs the rows of `batch` through the stage. `input` is the previous stage's output on this stage's device, `None`
    /// for the first stage, which starts from the tokens. Positions before a slice's that were never computed are zeros:
    /// a step far into a sequence can be measured without the steps before it. `watch` is told what it asks for, which
    /// changes no output.
    fn forward(&mut self, batch: &MicroBatch, input: Option<Tensor>, watch: &mut Watch) -> Result<StageOutput>;

    /// The final norm and the head on outputs of layers, one vector of `vocab_size` logits each: what the model would have
    /// said there. Only for the last stage.
    fn lens(&mut self, rows: &[HiddenRow]) -> Result<Vec<Vec<f32>>>;

    /// Bytes held now.
    fn bytes(&self) -> StageBytes;
}
