//! What is told: one small vocabulary of plain data.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::stats::TensorStats;

/// An event and when it was told. What took time ends there.
#[derive(Debug, Clone)]
pub struct Record {
    /// When.
    pub at: Instant,
    /// What.
    pub event: Event,
}

/// Something that happened in a stage or to a request. Times are wall-clock on the thread that reports.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// The weights are about to be loaded to their stages: the first event of an executor.
    ModelOpened(Arc<ModelFacts>),
    /// A request has come to the scheduler.
    RequestQueued {
        /// Its number, unique within the executor.
        request: u64,
        /// When it was submitted.
        submitted: Instant,
        /// Its prompt.
        prompt: Vec<u32>,
    },
    /// A request was admitted.
    RequestStarted {
        /// Its number.
        request: u64,
        /// Tokens in its prompt.
        prompt_tokens: usize,
        /// Time since it was submitted.
        queued: Duration,
    },
    /// A request took over the KV of tokens that it shares with another.
    PrefixReused {
        /// Its number.
        request: u64,
        /// Tokens of its prompt that need not be computed.
        tokens: usize,
    },
    /// A request ended. Those that were never admitted end too.
    RequestFinished {
        /// Its number.
        request: u64,
        /// Tokens it generated.
        tokens: usize,
        /// How.
        outcome: Outcome,
    },
    /// A micro-batch was composed and sent to the first stage.
    StepSent {
        /// Its number: the same micro-batch has the same one in every stage.
        step: u64,
        /// Whose rows are in it.
        slices: Vec<StepSlice>,
    },
    /// A micro-batch has left the stages, or they have died over it, and what came of it has been told: nothing more is
    /// told of it but [`Event::Kv`]. An executor that is dropped ends all micro-batches; its stages may tell of the ones
    /// that they are computing.
    StepFinished {
        /// Its number.
        step: u64,
        /// How.
        outcome: StepOutcome,
    },
    /// The scheduler has done what there was to do, and waits for messages again. Told where an
    /// [`Interest`](super::Interest) asks for it.
    SchedulerTurn {
        /// Time since it had a message.
        busy: Duration,
    },
    /// A stage computed one micro-batch.
    StageStep {
        /// Index of the stage.
        stage: usize,
        /// Number of the step.
        step: u64,
        /// Rows in the micro-batch.
        rows: usize,
        /// Time the micro-batch waited for the stage.
        queued: Duration,
        /// Time the stage waited for it while there was work elsewhere in the pipeline: a bubble.
        wait: Duration,
        /// Time it computed.
        compute: Duration,
        /// Time it copied its output towards the next stage.
        copy: Duration,
        /// Bytes of activations handed to the next stage; 0 from the last one.
        bytes: u64,
    },
    /// Where the time of a stage's forward pass went, see [`Interest::phases`](super::Interest::phases).
    Phases {
        /// Index of the stage.
        stage: usize,
        /// Number of the step.
        step: u64,
        /// When the forward pass began.
        started: Instant,
        /// One after the other, without gaps.
        laps: Vec<Lap>,
    },
    /// What a stage's layers made of a micro-batch, see [`Interest::activations`](super::Interest::activations).
    Activations {
        /// Index of the stage.
        stage: usize,
        /// Number of the step.
        step: u64,
        /// Rows in the micro-batch.
        rows: usize,
        /// In order.
        layers: Vec<LayerActivations>,
    },
    /// Where one query head looked, see [`Interest::attention`](super::Interest::attention).
    Attention {
        /// The request's number.
        request: u64,
        /// Number of the step.
        step: u64,
        /// Layer in the model.
        layer: usize,
        /// Query head.
        head: usize,
        /// Position of the row that looks.
        position: usize,
        /// Position of the first weight; above 0 behind a sliding window.
        first: usize,
        /// Weights of the positions from `first` to `position`. They sum to 1.
        weights: Vec<f32>,
    },
    /// What each layer would have said, see [`Interest::lens`](super::Interest::lens).
    Lens {
        /// The request's number.
        request: u64,
        /// Number of the step.
        step: u64,
        /// Position of the row.
        position: usize,
        /// In order; the last one is what the model says.
        layers: Vec<LensLayer>,
    },
    /// A token was chosen.
    Sampled {
        /// The request's number.
        request: u64,
        /// The token.
        token: u32,
        /// How many the request had generated before it.
        index: usize,
        /// Time since the one before; of the first since the request was submitted (TTFT).
        since: Duration,
        /// Time the choice took, text and delivery with it.
        duration: Duration,
    },
    /// Bytes that a stage holds have changed.
    StageMemory {
        /// Index of the stage.
        stage: usize,
        /// Weights.
        weights: u64,
        /// KV of open sequences.
        kv: u64,
        /// Buffers that a forward pass computes in.
        scratch: u64,
    },
    /// How the KV stands after a step, as often as an [`Interest`](super::Interest) asks for it.
    Kv(KvState),
    /// Events that a full queue did not take, see [`queue`](super::queue).
    Dropped {
        /// How many.
        events: u64,
    },
}

impl Event {
    /// Bytes that it holds beside itself, where that may be much: what a queue counts against its limit.
    pub fn heap_bytes(&self) -> usize {
        match self {
            Event::RequestQueued { prompt, .. } => size_of_val(prompt.as_slice()),
            Event::Activations { layers, .. } => size_of_val(layers.as_slice()),
            Event::Attention { weights, .. } => size_of_val(weights.as_slice()),
            Event::Lens { layers, .. } => layers.iter().map(LensLayer::bytes).sum(),
            Event::Phases { laps, .. } => size_of_val(laps.as_slice()),
            _ => 0,
        }
    }
}

/// What is known of a model before it is loaded.
#[derive(Debug, Clone, PartialEq, Default, serde::Serialize)]
pub struct ModelFacts {
    /// Family, such as `llama`.
    pub architecture: String,
    /// Decoder layers.
    pub n_layer: usize,
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Tokens.
    pub vocab_size: usize,
    /// Positions of a sequence.
    pub context_length: usize,
    /// Positions that there is KV for.
    pub kv_positions: usize,
    /// In order.
    pub stages: Vec<StageFacts>,
    /// All weights, as stored in the file.
    pub tensors: Vec<TensorFacts>,
}

/// One stage.
#[derive(Debug, Clone, PartialEq, Default, serde::Serialize)]
pub struct StageFacts {
    /// Its device, as options name it.
    pub device: String,
    /// Its first layer.
    pub first_layer: usize,
    /// Its layers.
    pub layers: usize,
    /// Bytes of its weights.
    pub weight_bytes: u64,
    /// How much of that are embeddings; 0 but in the first stage.
    pub embedding_bytes: u64,
    /// How much each of its layers is.
    pub layer_bytes: Vec<u64>,
    /// How much are the final norm and the head; 0 but in the last stage. A head that is the embeddings of the same stage
    /// counts there.
    pub head_bytes: u64,
    /// Bytes of weights that a decode step reads: all but the rows of the embeddings that it does not look up.
    pub step_bytes: u64,
    /// Bytes of KV of a position.
    pub kv_bytes_per_position: u64,
    /// For each of its layers, the positions that attention looks back at most, where it does not see all.
    pub windows: Vec<Option<usize>>,
    /// Bytes of KV that there may be.
    pub kv_budget: u64,
}

/// A stored weight.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct TensorFacts {
    /// Canonical name, see [`weights`](crate::weights).
    pub name: String,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Type in the file.
    pub dtype: String,
    /// Device of the stage that holds it; of the first if there are several.
    pub device: String,
    /// Bytes in the file.
    pub memory_bytes: u64,
    /// Values.
    pub element_count: u64,
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// A token or string that ends it.
    Stop,
    /// As many tokens as were asked for, or as there is room for.
    Length,
    /// Its stream was dropped.
    Cancelled,
    /// Its time was up.
    Deadline,
    /// An error, by the name of its kind.
    Error(&'static str),
}

impl Outcome {
    /// One word.
    pub fn name(&self) -> &'static str {
        match self {
            Outcome::Stop => "stop",
            Outcome::Length => "length",
            Outcome::Cancelled => "cancelled",
            Outcome::Deadline => "deadline",
            Outcome::Error(_) => "error",
        }
    }
}

/// How a micro-batch ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StepOutcome {
    /// All stages computed it.
    Computed,
    /// All its requests had ended before; stages may have passed it by.
    Unwanted,
    /// A stage failed or died, or the executor was stopped meanwhile.
    Failed,
}

/// A request's rows in a micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct StepSlice {
    /// The request's number.
    pub request: u64,
    /// Position of the first row.
    pub position: usize,
    /// Rows.
    pub rows: usize,
    /// Whether they are of the prompt.
    pub prefill: bool,
}

impl StepSlice {
    /// What a micro-batch of them is: `prefill`, `decode` or `mixed`.
    pub fn kind(slices: &[StepSlice]) -> &'static str {
        match slices.iter().filter(|slice| slice.prefill).count() {
            0 => "decode",
            prefills if prefills == slices.len() => "prefill",
            _ => "mixed",
        }
    }
}

/// A part of the forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Looking up the embeddings, or taking over the previous stage's activations.
    Embedding,
    /// Norm before attention.
    AttnNorm,
    /// Products for q, k and v.
    AttnQkvProj,
    /// Biases and norms of q, k and v, and the rotation.
    Rope,
    /// Writing keys and values.
    KvCache,
    /// Scores, softmax and the mix of values.
    Sdpa,
    /// Output product and residual.
    AttnOutput,
    /// Norm before the MLP.
    MlpNorm,
    /// Gate, up and activation.
    MlpSwiglu,
    /// Down product and residual.
    MlpOutput,
    /// Final norm and head.
    Output,
}

impl Phase {
    /// Those of a layer, in order.
    pub const LAYER: [Phase; 9] = [
        Phase::AttnNorm,
        Phase::AttnQkvProj,
        Phase::Rope,
        Phase::KvCache,
        Phase::Sdpa,
        Phase::AttnOutput,
        Phase::MlpNorm,
        Phase::MlpSwiglu,
        Phase::MlpOutput,
    ];

    /// Its name in rows and logs.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Embedding => "embedding",
            Phase::AttnNorm => "attn_norm",
            Phase::AttnQkvProj => "attn_qkv_proj",
            Phase::Rope => "rope",
            Phase::KvCache => "kv_cache",
            Phase::Sdpa => "sdpa",
            Phase::AttnOutput => "attn_output",
            Phase::MlpNorm => "mlp_norm",
            Phase::MlpSwiglu => "mlp_swiglu",
            Phase::MlpOutput => "mlp_output",
            Phase::Output => "output",
        }
    }

    /// Its name on a stage: all but the first begin with `input`, the previous stage's activations, and not with the
    /// embedding.
    pub fn name_on(self, stage: usize) -> &'static str {
        match self {
            Phase::Embedding if stage > 0 => "input",
            phase => phase.name(),
        }
    }
}

/// Time of one phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lap {
    /// Layer in the model; `None` before the first and after the last.
    pub layer: Option<usize>,
    /// What was computed.
    pub phase: Phase,
    /// How long it took.
    pub duration: Duration,
}

/// What a layer made of the rows of a step.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct LayerActivations {
    /// Layer in the model.
    pub layer: usize,
    /// The residual stream before it.
    pub input: TensorStats,
    /// After the norm before attention, or what stands for it in models without.
    pub post_norm: TensorStats,
    /// What attention adds to the residual stream.
    pub post_attention: TensorStats,
    /// What the MLP adds to the residual stream.
    pub post_ffn: TensorStats,
    /// The residual stream after it.
    pub output: TensorStats,
    /// Length of what the layer added over the length of its input, `|output - input| / |input|`; 0 for an input of 0.
    pub residual_ratio: f64,
}

/// What the model would have said after a layer: the final norm and the head on its output.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct LensLayer {
    /// Layer in the model.
    pub layer: usize,
    /// Most likely tokens and their logits, best first.
    pub top: Vec<(u32, f32)>,
    /// The tokens that are followed.
    pub tracked: Vec<TokenRank>,
}

impl LensLayer {
    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        size_of::<Self>() + size_of_val(self.top.as_slice()) + size_of_val(self.tracked.as_slice())
    }
}

/// A followed token at one layer.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct TokenRank {
    /// The token.
    pub token: u32,
    /// Its logit.
    pub logit: f32,
    /// Tokens with a greater logit. NaN is less than every number.
    pub rank: usize,
}

/// How the KV stands, in positions. A position is one token's keys and values in all layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct KvState {
    /// There is KV for so many.
    pub limit: usize,
    /// Set aside for running sequences, for kept ones, and for those about to be freed.
    pub reserved: usize,
    /// Computed, of running and kept sequences.
    pub valid: usize,
    /// How much of `reserved` is kept for requests that begin alike.
    pub retained: usize,
    /// Running sequences.
    pub sequences: usize,
    /// Requests that wait for admission.
    pub waiting: usize,
    /// Kept sequences that have made way so far.
    pub evictions: u64,
    /// Requests so far that might have reused a prefix.
    pub lookups: u64,
    /// Those that did.
    pub hits: u64,
}
