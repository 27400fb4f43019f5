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
use serde::{Deserialize, Serialize};

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
    /// How weights and KV are held and what computes with them.
    pub options: StageOptions,
}

/// How a stage holds weights and KV and computes with them, whatever its layers and its device are.
#[derive(Debug, Clone, Copy, Default)]
pub struct StageOptions {
    /// Type that F32, F16 and BF16 matrices are held in; `None` leaves them as stored.
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SequenceId(pub u64);

/// A run of consecutive positions of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
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
    /// What is wanted of the last rows.
    pub wanted: Wanted,
}

/// The predictions that are wanted of a slice: of its last `rows` rows, one each. A prompt's last row predicts the first
/// token, a decode step's row the next one. Rows of a draft each predict the token that should follow them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Wanted {
    /// None: more of the prompt follows.
    Nothing,
    /// The `k` most likely tokens of each row are enough. A stage that finds them where the logits are may answer with
    /// those, or with all logits.
    Best {
        /// Number of rows, the slice's last ones.
        rows: usize,
        /// Number of tokens.
        k: usize,
    },
    /// All logits of each row.
    Logits {
        /// Number of rows, the slice's last ones.
        rows: usize,
    },
}

impl Wanted {
    /// Number of rows that predictions are wanted of.
    pub fn rows(self) -> usize {
        match self {
            Wanted::Nothing => 0,
            Wanted::Best { rows, .. } | Wanted::Logits { rows } => rows,
        }
    }
}

impl SequenceSlice {
    /// Whether predictions are wanted of any of its rows.
    pub fn is_predicted(&self) -> bool {
        self.wanted.rows() > 0
    }
}

/// Rows of one or more sequences that pass through the stages together.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
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

    /// The rows that predictions are wanted of, in order: slice, index among all rows, and position in the sequence.
    pub fn predicted_rows(&self) -> impl Iterator<Item = (&SequenceSlice, usize, usize)> {
        let mut end = 0;
        self.slices.iter().flat_map(move |slice| {
            end += slice.len;
            let (end, rows) = (end, slice.wanted.rows().min(slice.len));
            (1..=rows).rev().map(move |back| (slice, end - back, slice.position + slice.len - back))
        })
    }

    /// Refuses a micro-batch that contradicts itself.
    pub fn validate(&self) -> Result<()> {
        let rows = self.slices.iter().try_fold(0usize, |rows, slice| rows.checked_add(slice.len));
        if rows != Some(self.tokens.len()) {
            let tokens = self.tokens.len();
            return Err(Error::Tensors(format!(
                "a micro-batch of {tokens} tokens whose slices have another number of rows"
            )));
        }
        match self.slices.iter().find(|slice| slice.wanted.rows() > slice.len) {
            Some(SequenceSlice { id, len, wanted, .. }) => {
                let (id, rows) = (id.0, wanted.rows());
                Err(Error::Tensors(format!("predictions of {rows} rows are wanted of sequence {id}, which has {len}")))
            }
            None => self.prompt_rows().map(|_| ()),
        }
    }
}

/// What a stage passes on.
#[derive(Debug, Clone)]
pub enum StageOutput {
    /// For the next stage: (rows, hidden_size).
    Activations(Tensor),
    /// From the last stage: `vocab_size` values for each row in [`MicroBatch::predicted_rows`], in that order.
    Logits(Vec<Vec<f32>>),
    /// From a last stage that looks for the most likely tokens where the logits are: one for each row in
    /// [`MicroBatch::predicted_rows`], in that order.
    Predictions(Vec<Prediction>),
}

impl From<Vec<Prediction>> for StageOutput {
    /// [`Logits`](Self::Logits) where there is nothing else.
    fn from(predictions: Vec<Prediction>) -> Self {
        if predictions.iter().any(|prediction| matches!(prediction, Prediction::Best(_))) {
            return StageOutput::Predictions(predictions);
        }
        let logits = |prediction| if let Prediction::Logits(logits) = prediction { Some(logits) } else { None };
        StageOutput::Logits(predictions.into_iter().filter_map(logits).collect())
    }
}

impl StageOutput {
    /// Predictions of a row each. An error for activations, which the last stage does not return.
    pub fn into_predictions(self) -> Result<Vec<Prediction>> {
        match self {
            StageOutput::Activations(_) => {
                Err(Error::Tensors("the last stage returned activations instead of logits".into()))
            }
            StageOutput::Logits(logits) => Ok(logits.into_iter().map(Prediction::Logits).collect()),
            StageOutput::Predictions(predictions) => Ok(predictions),
        }
    }
}

/// What the last stage says of a row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Prediction {
    /// `vocab_size` values.
    Logits(Vec<f32>),
    /// As many of the most likely tokens as were wanted, fewer than the vocabulary has, with their logits: the most likely
    /// first, the lowest id first among equals. Never of a row in which any logit is infinite or NaN: the error that reports
    /// it needs all logits.
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

    /// Drops the positions of an open sequence from `length` on, so that it can go on differently from there. Where KV is
    /// addressed by position nothing need be done: a row sees only positions up to its own, and those are written again
    /// before they are read.
    fn truncate(&mut self, id: SequenceId, length: usize) -> Result<()>;

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
