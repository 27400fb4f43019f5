//! A stage's forward pass in the order in which it is computed: embeddings, layers, head, and the places within a layer
//! that a [`Watch`] looks at. It is written here once for all devices.
//!
//! A device implements [`LayerOps`] at the granularity of its fused passes. It knows no order, and nothing here knows
//! where values lie. [`Mixer`] and [`Mlp`] say what a layer is made of; a new kind of either is a variant there, a
//! function here, and the operations that it needs beside the existing ones.

use std::borrow::Cow;
use std::ops::Range;

use candle_core::{Device, Tensor};

use super::{MicroBatch, Prediction, StageOutput, Wanted};
use crate::error::{Error, Result};
use crate::instrument::{HiddenRow, Phase, Tap, Watch};
use crate::model::config::{DecoderConfig, LayerConfig, LayerRope};
use crate::model::stage_weights::{
    AttentionWeights, Build, GatedMlp, HeadWeights, LayerWeights, Linear, Mixer, Mlp, StageWeights,
};

/// Matrices that one [`LayerOps::project`] multiplies at most.
pub const MOST_PRODUCTS: usize = 3;

/// The matrices of a device.
pub type MatrixOf<O> = <<O as LayerOps>::Build as Build>::Matrix;

/// The norm weights and biases of a device.
pub type VectorOf<O> = <<O as LayerOps>::Build as Build>::Vector;

/// Values of a step that can be read for a [`Watch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    /// The residual stream: (rows, hidden_size).
    Residual,
    /// The input of the next products.
    Input,
    /// What [`LayerOps::add_branch`] has added last, before the residual multiplier: (rows, hidden_size).
    Branch,
}

/// One step of a stage on a device: a machine of a few registers and the operations between them.
///
/// The registers are the residual stream (rows, hidden_size), the input of the next products (rows, columns), up to
/// [`MOST_PRODUCTS`] products of it, and the keys and values of the step's sequences. A step is made for one micro-batch,
/// whose slices say which sequence and position a row belongs to. Results of a row must not depend on the other rows.
pub trait LayerOps {
    /// The device's matrices and vectors.
    type Build: Build;

    /// Residual = rows of the embedding table, times the embedding multiplier. All tokens are in the table.
    fn embed(&mut self, table: &MatrixOf<Self>, tokens: &[u32]) -> Result<()>;

    /// Residual = `x`, (rows, hidden_size).
    fn receive(&mut self, x: Tensor) -> Result<()>;

    /// Input = RMSNorm of the residual, or the residual itself where there is no weight.
    fn norm(&mut self, weight: &Option<VectorOf<Self>>) -> Result<()>;

    /// Products = input times each matrix, in order. What reads a product next adds its bias.
    fn project<const N: usize>(&mut self, linears: [&Linear<Self::Build>; N]) -> Result<()>;

    /// Takes the products for q, k and v: adds biases, normalises heads of q and k where they have weights, and rotates
    /// them by `rope`.
    fn prepare_qkv(&mut self, weights: &AttentionWeights<Self::Build>, rope: LayerRope) -> Result<()>;

    /// Writes k and v to the KV of layer `index` of the stage, each row at its position.
    fn append(&mut self, index: usize) -> Result<()>;

    /// Input = attention of q over the KV of layer `index`. A row sees itself and the positions before it, `window` in all
    /// where there is one.
    fn attend(&mut self, index: usize, window: Option<usize>) -> Result<()>;

    /// Input = activation of the first product times the second, with the biases of gate and up projection.
    fn gate(&mut self, weights: &GatedMlp<Self::Build>) -> Result<()>;

    /// Adds `bias` to the first product, normalises it where there is a weight, and adds it, times the residual
    /// multiplier, to the residual.
    fn add_branch(&mut self, bias: &Option<VectorOf<Self>>, norm: &Option<VectorOf<Self>>) -> Result<()>;

    /// The final norm and the head on rows of the residual, at least one, and what is wanted of each. All logits will do
    /// where the most likely tokens are wanted.
    fn head(&mut self, head: &HeadWeights<Self::Build>, rows: &[(usize, Wanted)]) -> Result<Vec<Prediction>>;

    /// The residual, for the next stage.
    fn send(&mut self) -> Result<Tensor>;

    /// Rows of a register, for a watch.
    fn values(&mut self, register: Register, rows: Range<usize>) -> Result<Cow<'_, [f32]>>;

    /// Attention weights of the last row of slice number `slice` in layer `index`, recomputed for a watch: for each of
    /// `heads` one value for each of `positions`. Called between [`attend`](Self::attend) and the next projection.
    fn attention_weights(
        &mut self,
        index: usize,
        slice: usize,
        positions: Range<usize>,
        heads: &[usize],
    ) -> Result<Vec<Vec<f32>>>;

    /// Waits until the device has done what it was given.
    fn wait(&self) -> Result<()> {
        Ok(())
    }
}

/// Runs the rows of `batch` through a stage; `input` is as in [`StageBackend::forward`](super::StageBackend::forward).
pub fn forward<O: LayerOps>(
    ops: O,
    weights: &StageWeights<O::Build>,
    config: &DecoderConfig,
    batch: &MicroBatch,
    input: Option<Tensor>,
    watch: &mut Watch,
) -> Result<StageOutput> {
    Pass { ops, config, batch, watch, layer: None }.run(weights, input)
}

/// The final norm and the head on outputs of layers, for [`StageBackend::lens`](super::StageBackend::lens). The step has
/// no sequences.
pub fn lens<O: LayerOps>(
    mut ops: O,
    weights: &StageWeights<O::Build>,
    config: &DecoderConfig,
    rows: &[HiddenRow],
) -> Result<Vec<Vec<f32>>> {
    let Some(head) = &weights.head else { return Err(Error::Tensors("this stage has no head".into())) };
    if rows.is_empty() {
        return Ok(Vec::new());
    }
    let values: Vec<f32> = rows.iter().flat_map(|row| row.values.iter().copied()).collect();
    ops.receive(Tensor::from_vec(values, (rows.len(), config.hidden_size), &Device::Cpu)?)?;
    let rows: Vec<_> = (0..rows.len()).map(|row| (row, Wanted::Logits { rows: 1 })).collect();
    match predict(&mut ops, head, &rows)? {
        StageOutput::Logits(logits) => Ok(logits),
        _ => Err(Error::Tensors("the head returned something else than all logits".into())),
    }
}

/// The head on rows of the residual, some at a time: the logits of a long prompt's rows would fill the memory.
fn predict<O: LayerOps>(ops: &mut O, head: &HeadWeights<O::Build>, rows: &[(usize, Wanted)]) -> Result<StageOutput> {
    const MOST_ROWS: usize = 128;
    let mut predictions = Vec::with_capacity(rows.len());
    for rows in rows.chunks(MOST_ROWS) {
        predictions.extend(ops.head(head, rows)?);
    }
    Ok(predictions.into())
}

/// Refuses tokens that the embedding table does not have.
pub fn check_tokens(tokens: &[u32], config: &DecoderConfig) -> Result<()> {
    let rows = config.vocab_size;
    match tokens.iter().find(|&&token| token as usize >= rows) {
        None => Ok(()),
        Some(token) => Err(Error::Tensors(format!("token {token} is outside the {rows} rows of the embeddings"))),
    }
}

/// The error of a stage that is given tokens and has no embeddings, or activations and has some.
pub fn wrong_input() -> Error {
    Error::Tensors("only the first stage is given tokens, and nothing else".into())
}

/// A forward pass on its way.
struct Pass<'a, O> {
    ops: O,
    config: &'a DecoderConfig,
    batch: &'a MicroBatch,
    watch: &'a mut Watch,
    /// Index in the model of the layer that is computed.
    layer: Option<usize>,
}

impl<O: LayerOps> Pass<'_, O> {
    fn run(mut self, weights: &StageWeights<O::Build>, input: Option<Tensor>) -> Result<StageOutput> {
        let rows = self.batch.tokens.len();
        match (input, &weights.embeddings) {
            (None, Some(table)) => {
                check_tokens(&self.batch.tokens, self.config)?;
                self.ops.embed(table, &self.batch.tokens)?;
            }
            (Some(x), None) => {
                let hidden = self.config.hidden_size;
                if x.elem_count() != rows * hidden {
                    let shape = x.dims();
                    return Err(Error::Tensors(format!("activations of shape {shape:?} for {rows} rows of {hidden}")));
                }
                self.ops.receive(x)?;
            }
            _ => return Err(wrong_input()),
        }
        self.lap(Phase::Embedding)?;
        for (index, layer) in weights.layers.iter().enumerate() {
            let number = weights.first + index;
            self.layer = Some(number);
            if self.watch.wants_activations() {
                self.watch.layer_input(&self.ops.values(Register::Residual, 0..rows)?);
            }
            self.layer(index, layer, &self.config.layers[number])?;
            if self.watch.wants_activations() {
                self.watch.layer_output(number, &self.ops.values(Register::Residual, 0..rows)?);
            }
            if self.watch.wants_hidden() {
                for (slice, row, position) in self.batch.predicted_rows() {
                    let values = self.ops.values(Register::Residual, row..row + 1)?;
                    self.watch.hidden(slice.id.0, position, number, &values);
                }
            }
        }
        self.layer = None;
        let Some(head) = &weights.head else { return Ok(StageOutput::Activations(self.ops.send()?)) };
        let rows: Vec<_> = self.batch.predicted_rows().map(|(slice, row, _)| (row, slice.wanted)).collect();
        let output = predict(&mut self.ops, head, &rows)?;
        self.lap(Phase::Output)?;
        Ok(output)
    }

    /// One layer: two branches, each of which reads a norm of the residual and is added to it.
    fn layer(&mut self, index: usize, weights: &LayerWeights<O::Build>, config: &LayerConfig) -> Result<()> {
        self.ops.norm(&weights.attn_norm)?;
        self.tap(Tap::PostNorm, Register::Input)?;
        self.lap(Phase::AttnNorm)?;
        let bias = match &weights.mixer {
            Mixer::Attention(attention) => self.attention(index, attention, config)?,
        };
        self.ops.add_branch(bias, &weights.attn_post_norm)?;
        self.tap(Tap::PostAttention, Register::Branch)?;
        self.lap(Phase::AttnOutput)?;

        self.ops.norm(&weights.mlp_norm)?;
        self.lap(Phase::MlpNorm)?;
        let bias = match &weights.mlp {
            Mlp::Gated(mlp) => self.gated_mlp(mlp)?,
        };
        self.ops.add_branch(bias, &weights.mlp_post_norm)?;
        self.tap(Tap::PostFfn, Register::Branch)?;
        self.lap(Phase::MlpOutput)
    }

    /// Attention, up to the product with its last matrix, whose bias is returned.
    fn attention<'w>(
        &mut self,
        index: usize,
        weights: &'w AttentionWeights<O::Build>,
        config: &LayerConfig,
    ) -> Result<&'w Option<VectorOf<O>>> {
        self.ops.project([&weights.q_proj, &weights.k_proj, &weights.v_proj])?;
        self.lap(Phase::AttnQkvProj)?;
        self.ops.prepare_qkv(weights, config.rope)?;
        self.lap(Phase::Rope)?;
        self.ops.append(index)?;
        self.lap(Phase::KvCache)?;
        self.ops.attend(index, config.sliding_window)?;
        self.show_attention(index, config.sliding_window)?;
        self.lap(Phase::Sdpa)?;
        self.ops.project([&weights.o_proj])?;
        Ok(&weights.o_proj.bias)
    }

    /// A dense gated MLP, up to the product with its last matrix, whose bias is returned.
    fn gated_mlp<'w>(&mut self, weights: &'w GatedMlp<O::Build>) -> Result<&'w Option<VectorOf<O>>> {
        self.ops.project([&weights.gate_proj, &weights.up_proj])?;
        self.ops.gate(weights)?;
        self.lap(Phase::MlpSwiglu)?;
        self.ops.project([&weights.down_proj])?;
        Ok(&weights.down_proj.bias)
    }

    /// Emits attention weights of the heads that are watched.
    fn show_attention(&mut self, index: usize, window: Option<usize>) -> Result<()> {
        let Some((layer, filter)) = self.layer.and_then(|layer| Some((layer, self.watch.attention_of(layer)?))) else {
            return Ok(());
        };
        let heads: Vec<usize> = (0..self.config.num_attention_heads).filter(|head| filter.has_head(*head)).collect();
        for (number, slice) in self.batch.slices.iter().enumerate().filter(|(_, slice)| slice.is_predicted()) {
            let position = slice.position + slice.len - 1;
            let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
            let weights = self.ops.attention_weights(index, number, first..position + 1, &heads)?;
            for (head, weights) in heads.iter().zip(weights) {
                self.watch.attention(slice.id.0, layer, *head, first, position, weights);
            }
        }
        Ok(())
    }

    /// Shows a register of all rows.
    fn tap(&mut self, tap: Tap, register: Register) -> Result<()> {
        if self.watch.wants_activations() {
            let rows = self.batch.tokens.len();
            self.watch.tap(tap, &self.ops.values(register, 0..rows)?);
        }
        Ok(())
    }

    /// What was computed since the last lap was `phase`; on a GPU it is over once the device has done it.
    fn lap(&mut self, phase: Phase) -> Result<()> {
        if self.watch.synchronises() {
            self.ops.wait()?;
        }
        self.watch.lap(self.layer, phase);
        Ok(())
    }
}
