//! A decode step of a run of decoder layers: one row of each of a few sequences, five dispatches a layer, or six.
//!
//! ```text
//! 1  norm, q, k and v with their biases             gemv      x -> qkv
//! 2  q/k norm, RoPE, append to the KV, attention    attend    qkv, KV -> mixed    (one for each sequence)
//! 3  output projection, added to x                  gemv      mixed -> x
//! 4  norm, gate, up, activation                     gemv      x -> gated
//! 5  down projection, added to x                    gemv      gated -> x
//! ```
//!
//! Attention over some hundred positions and more is shared by several threadgroups, and a sixth dispatch, `attend_merge`,
//! puts their parts together, those of all sequences at once. Norms after attention and MLP (Gemma) take a dispatch each,
//! and so does a product of matrices that are stored in more than one format. What is not covered at all is told by
//! [`LayerShape::check`].
//!
//! Everything is plain data over the buffers of an [`Encoder`], so that the same code encodes a step for a GPU, runs it on
//! a CPU, and counts what it costs.

mod attention;
mod candidates;
mod layer;
mod prediction;

pub use candidates::{CandidateBytes, Candidates, RowCandidates, found_words, most_candidates, read_candidates};
pub use layer::{KvCache, Row};
pub use prediction::{CHIPS, Chip, Prediction};

use crate::encoder::{Encoder, Region};
use crate::error::{Error, Result};
use crate::gemv::{Finish, Gate, Gemv, MOST_ROWS, Norm, PackedMatrix};
use crate::heads::NormOver;
use crate::options::MetalExtOptions;
use crate::pack::MatrixLayout;

/// What a layer is, without its weights. Names are those of Hugging Face configs.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerShape {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Of every norm.
    pub rms_norm_eps: f32,
    /// What norms of q and k are over; `None` without them.
    pub qk_norm: Option<NormOver>,
    /// How positions turn queries and keys; `None` where they do not.
    pub rope: Option<Rope>,
    /// A query sees this many positions, itself included; `None` sees all.
    pub sliding_window: Option<usize>,
    /// Factor on the scores.
    pub attention_scale: f32,
    /// Scores become `cap * tanh(score / cap)`.
    pub attn_logit_softcapping: Option<f32>,
    /// Factor on each branch before it is added to the residual stream.
    pub residual_multiplier: f32,
    /// The MLP's activation.
    pub gate: Gate,
}

/// A layer's rotary embedding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rope {
    /// Leading values of a head that are rotated.
    pub rotary_dim: usize,
    /// Pairs are neighbours instead of halves.
    pub interleaved: bool,
    /// Which of the step's two tables of angles.
    pub table: AngleTable,
}

/// The tables of cos and sin that a step brings along.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AngleTable {
    /// Of most layers.
    Global,
    /// Of layers that see a window, where those have an embedding of their own.
    Local,
}

impl LayerShape {
    /// Floats of a row of q.
    pub fn q_width(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Floats of a row of k, and of v.
    pub fn kv_width(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Floats of a row of q, k and v.
    pub fn qkv_width(&self) -> usize {
        self.q_width() + 2 * self.kv_width()
    }
}

/// A packed matrix that is kept in a buffer.
#[derive(Debug, Clone)]
pub struct FusedMatrix<B> {
    /// Its parts.
    pub layout: MatrixLayout,
    /// The buffer.
    pub buffer: B,
    /// Where it begins, in bytes.
    pub offset: usize,
}

impl<B> FusedMatrix<B> {
    fn packed(&self) -> PackedMatrix<'_, B> {
        PackedMatrix { layout: self.layout, buffer: &self.buffer, offset: self.offset }
    }
}

/// A layer's weights. Vectors are F32.
#[derive(Debug, Clone)]
#[allow(missing_docs)] // the names are those of the model's tensors
pub struct FusedLayer<B> {
    pub attn_norm: Option<B>,      // (hidden_size)
    pub attn_post_norm: Option<B>, // (hidden_size)
    pub mlp_norm: Option<B>,       // (hidden_size)
    pub mlp_post_norm: Option<B>,  // (hidden_size)
    pub q_proj: FusedMatrix<B>,
    pub k_proj: FusedMatrix<B>,
    pub v_proj: FusedMatrix<B>,
    /// Of q, k and v, one after the other.
    pub qkv_bias: Option<B>,
    pub q_norm: Option<B>, // (head_dim), or (q_width) over the whole projection
    pub k_norm: Option<B>, // (head_dim), or (kv_width)
    pub o_proj: FusedMatrix<B>,
    pub o_bias: Option<B>,
    pub gate_proj: FusedMatrix<B>,
    pub up_proj: FusedMatrix<B>,
    /// Of gate and up, one after the other.
    pub gate_up_bias: Option<B>,
    pub down_proj: FusedMatrix<B>,
    pub down_bias: Option<B>,
}

/// Final norm and head.
#[derive(Debug, Clone)]
pub struct FusedHead<B> {
    /// (hidden_size)
    pub norm: B,
    /// Of the norm.
    pub rms_norm_eps: f32,
    /// To the vocabulary.
    pub projection: FusedMatrix<B>,
}

/// A run of layers, and the head behind the last.
#[derive(Debug, Clone)]
pub struct FusedStage<B> {
    /// The layers, in order.
    pub layers: Vec<(LayerShape, FusedLayer<B>)>,
    /// Of the last run only.
    pub head: Option<FusedHead<B>>,
}

/// The buffers of a step; they are made once for the most rows that a step has.
#[derive(Debug, Clone)]
pub struct Scratch<B> {
    /// (rows, qkv_width)
    pub qkv: B,
    /// (rows, q_width): attention's output.
    pub mixed: B,
    /// (rows, intermediate_size)
    pub gated: B,
    /// (rows, hidden_size), where a norm stands before the addition.
    pub branch: B,
    /// What attention puts together from several threadgroups.
    pub partials: B,
    /// (rows, vocab_size)
    pub logits: B,
}

/// Bytes of each of a [`Scratch`]'s buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs)] // as there
pub struct ScratchBytes {
    pub qkv: usize,
    pub mixed: usize,
    pub gated: usize,
    pub branch: usize,
    pub partials: usize,
    pub logits: usize,
}

/// Positions whose steps use, together, all kernels of a stage: attention over few and over many.
pub const POSITIONS: [usize; 2] = [0, 4095];

/// Floats from one row to the next in scratch buffers: rows begin at multiples of 16 bytes.
pub fn stride(width: usize) -> usize {
    width.next_multiple_of(4)
}

impl<B> FusedStage<B> {
    /// What steps of up to `rows` rows need.
    pub fn scratch_bytes(&self, rows: usize) -> ScratchBytes {
        let mut bytes = ScratchBytes { partials: 16, logits: 16, ..ScratchBytes::default() };
        let of = |width: usize| rows * stride(width) * 4;
        for (shape, _) in &self.layers {
            bytes.qkv = bytes.qkv.max(of(shape.qkv_width()));
            bytes.mixed = bytes.mixed.max(of(shape.q_width()));
            bytes.gated = bytes.gated.max(of(shape.intermediate_size));
            bytes.branch = bytes.branch.max(of(shape.hidden_size));
            bytes.partials = bytes.partials.max(shape.partial_bytes(rows));
        }
        if let Some(head) = &self.head {
            bytes.logits = of(head.projection.layout.n);
        }
        bytes
    }

    /// Encodes a step: `rows`, one of each sequence, from `x`, (rows, hidden_size), through all layers and back to it.
    /// Where there is a head, the logits of the rows in `wanted` follow, into the same rows of [`Scratch::logits`]. Rows
    /// of all buffers are [`stride`] apart.
    pub fn encode<E: Encoder<Buffer = B>>(
        &self,
        encoder: &mut E,
        x: &B,
        rows: &[Row<'_, B>],
        wanted: &[usize],
        scratch: &Scratch<B>,
        options: &MetalExtOptions,
    ) -> Result<()> {
        if rows.is_empty() || rows.len() > MOST_ROWS {
            let reason = format!("{} rows, expected 1 to {MOST_ROWS}", rows.len());
            return Err(Error::unsupported("fused decode", reason));
        }
        for (index, (shape, weights)) in self.layers.iter().enumerate() {
            layer::encode(encoder, index, (shape, weights), x, rows, scratch, options)?;
        }
        let Some(head) = &self.head else { return Ok(()) };
        // Rows that follow each other share a dispatch.
        for run in wanted.chunk_by(|a, b| a + 1 == *b) {
            let MatrixLayout { n, k, .. } = head.projection.layout;
            let gemv = Gemv {
                matrices: &[head.projection.packed()],
                x: Region::at(x, run[0] * stride(k) * 4),
                stride_x: stride(k),
                y: Region::at(&scratch.logits, run[0] * stride(n) * 4),
                stride_y: stride(n),
                rows: run.len(),
                norm: Some(Norm { gamma: Region::at(&head.norm, 0), eps: head.rms_norm_eps }),
                bias: None,
                finish: Finish::Store,
            };
            gemv.encode(encoder, options.columns_per_threadgroup)?;
        }
        Ok(())
    }
}
