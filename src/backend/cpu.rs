//! The CPU's own forward pass: a layer is five products and attention over buffers that are kept from step to step, with
//! the small operations between them fused into what prepares the next product's input.
//!
//! The arithmetic is that of [`Decoder`](crate::model::decoder::Decoder), in f32 with keys and values of a chosen type. A
//! row has the same bits whatever else is in the step, see [`kernels`](crate::kernels).

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use candle_core::{Device, Tensor};

use super::{
    MicroBatch, Prediction, SequenceId, SequenceSlice, StageBackend, StageBytes, StageOutput, StageSource, Wanted,
};
use crate::device::Cpu;
use crate::error::{Error, Result};
use crate::instrument::{AttentionFilter, HiddenRow, Phase, Tap, Watch};
use crate::kernels::attention::{AttentionRows, AttentionShape, attend};
use crate::kernels::best;
use crate::kernels::buffer::Values;
use crate::kernels::input::Input;
use crate::kernels::kv::{KvType, LayerKv, MOST_DIMS, Strided};
use crate::kernels::matrix::{Matrix, Product, multiply};
use crate::kernels::ops;
use crate::kernels::rows::{RowsMut, each_row};
use crate::model::config::{Activation, DecoderConfig, LayerRope, QkNorm};
use crate::model::linear::{check_token, pack};
use crate::model::rope::{RopeCache, Ropes};
use crate::model::stage_weights::{Build, HeadWeights, LayerWeights, Linear, StageWeights};
use crate::weights::{TensorBytes, WeightType};

/// Rows that go through the head together; more take turns, so that the logits of a prompt's rows do not fill the memory.
const MOST_HEAD_ROWS: usize = 128;

/// A run of decoder layers on a CPU, and the keys and values of the sequences that are open in it.
pub struct CpuBackend {
    weights: StageWeights<Cpu>,
    stage: Stage,
    sequences: HashMap<SequenceId, SequenceKv>,
    buffers: Buffers,
}

/// What a forward pass reads besides weights.
struct Stage {
    config: Arc<DecoderConfig>,
    cpu: Cpu,
    ropes: Arc<Ropes>,
    kv_type: KvType,
    bf16_prompts: bool,
    /// Index of the first layer in the model.
    first: usize,
}

/// Keys and values of one sequence, one entry a layer.
struct SequenceKv {
    layers: Vec<LayerKv>,
}

impl SequenceKv {
    /// Bytes of the positions that were asked for, which is what is budgeted. The allocation is up to 63 positions larger,
    /// see [`LayerKv::new`]; the budget leaves a twentieth of the memory for such things.
    fn bytes(&self, stage: &Stage) -> u64 {
        let Stage { config, kv_type, .. } = stage;
        let position = kv_type.bytes_per_position(config.num_key_value_heads, config.head_dim);
        self.layers.iter().map(|layer| layer.capacity() as u64 * position).sum()
    }
}

/// The values of a step. They grow to the largest step and stay.
#[derive(Default)]
struct Buffers {
    x: Vec<f32>,      // (rows, hidden_size), the residual stream
    bf16_rows: usize, // how many of the rows, the last ones, are computed in BF16 where there is AMX
    input: Input,
    q: Values,      // (rows, heads * head_dim)
    k: Values,      // (rows, kv_heads * head_dim)
    v: Values,      // (rows, kv_heads * head_dim)
    gate: Values,   // (rows, intermediate_size)
    up: Values,     // (rows, intermediate_size)
    branch: Values, // (rows, hidden_size), what is added to x
    logits: Values, // (rows of the head, vocab_size)
    global: Angles,
    local: Angles,
}

impl Buffers {
    fn bytes(&self) -> u64 {
        let Buffers { x, input, q, k, v, gate, up, branch, logits, global, local, bf16_rows: _ } = self;
        let angles = [&global.cos, &global.sin, &local.cos, &local.sin];
        let values: usize = [x].into_iter().chain(angles).map(Vec::capacity).sum();
        let products: u64 = [q, k, v, gate, up, branch, logits].into_iter().map(Values::bytes).sum();
        (values * size_of::<f32>()) as u64 + products + input.bytes()
    }
}

/// Cos and sin of the step's rows.
#[derive(Default)]
struct Angles {
    cos: Vec<f32>, // (rows, rotary_dim / 2)
    sin: Vec<f32>, // (rows, rotary_dim / 2)
}

impl Build for Cpu {
    type Matrix = Matrix;
    type Vector = Vec<f32>;

    fn matrix(&self, dtype: WeightType, bytes: &TensorBytes<'_>, n: usize, k: usize) -> Result<Option<Matrix>> {
        pack(&self.pool, dtype, bytes, n, k)
    }

    fn vector(&self, values: Vec<f32>) -> Result<Vec<f32>> {
        Ok(values)
    }

    fn matrix_bytes(matrix: &Matrix) -> u64 {
        matrix.bytes()
    }

    fn vector_bytes(vector: &Vec<f32>) -> u64 {
        size_of_val(vector.as_slice()) as u64
    }
}

impl CpuBackend {
    /// Loads a stage tensor by tensor; `progress` hears of bytes as they arrive.
    pub fn load(source: &StageSource, cpu: &Cpu, progress: &dyn Fn(u64)) -> Result<Self> {
        let StageSource { config, layers, ropes, options, .. } = source;
        if config.head_dim > MOST_DIMS {
            return Err(Error::Unsupported {
                what: "head_dim",
                value: config.head_dim.to_string(),
                hint: format!("CPU stages take heads of up to {MOST_DIMS} values"),
            });
        }
        let weights = StageWeights::load(&*source.weights, config, layers.clone(), options.dense_type, cpu, progress)?;
        let stage = Stage {
            config: config.clone(),
            cpu: cpu.clone(),
            ropes: ropes.clone(),
            kv_type: options.kv_type,
            bf16_prompts: options.bf16_prompts,
            first: layers.start,
        };
        Ok(CpuBackend { weights, stage, sequences: HashMap::new(), buffers: Buffers::default() })
    }

    fn new_kv(&self, capacity: usize) -> SequenceKv {
        let Stage { config, kv_type, .. } = &self.stage;
        let layer = || LayerKv::new(*kv_type, config.num_key_value_heads, config.head_dim, capacity);
        SequenceKv { layers: self.weights.layers.iter().map(|_| layer()).collect() }
    }

    /// Runs the rows of `batch`, whose sequences' keys and values are `kv`, one for each slice.
    fn run(
        &mut self,
        batch: &MicroBatch,
        input: Option<Tensor>,
        kv: &mut [SequenceKv],
        watch: &mut Watch,
    ) -> Result<StageOutput> {
        let CpuBackend { weights, stage, buffers, .. } = self;
        let config = &*stage.config;
        let (rows, hidden) = (batch.tokens.len(), config.hidden_size);
        let prompt_rows = batch.prompt_rows()?;
        buffers.bf16_rows = if stage.bf16_prompts { prompt_rows } else { 0 };
        match (input, &weights.embeddings) {
            (None, Some(table)) => stage.embed(table, &batch.tokens, grown(&mut buffers.x, rows * hidden))?,
            (Some(input), None) => {
                let values = input.flatten_all()?.to_vec1::<f32>()?;
                if values.len() != rows * hidden {
                    let shape = input.dims();
                    return Err(Error::Tensors(format!("activations of shape {shape:?} for {rows} rows of {hidden}")));
                }
                buffers.x = values;
            }
            _ => return Err(Error::Tensors("only the first stage is given tokens, and nothing else".into())),
        }
        buffers.global.fill(&stage.ropes.global, batch)?;
        if let Some(local) = &stage.ropes.local {
            buffers.local.fill(local, batch)?;
        }
        watch.lap(None, Phase::Embedding);
        for (index, layer) in weights.layers.iter().enumerate() {
            if watch.wants_activations() {
                watch.layer_input(&buffers.x[..rows * hidden]);
            }
            stage.attention(index, layer, batch, kv, buffers, watch)?;
            stage.mlp(index, layer, buffers, rows, watch);
            if watch.wants_activations() {
                watch.layer_output(stage.first + index, &buffers.x[..rows * hidden]);
            }
            if watch.wants_hidden() {
                for (slice, row, position) in batch.predicted_rows() {
                    watch.hidden(slice.id.0, position, stage.first + index, &buffers.x[row * hidden..][..hidden]);
                }
            }
        }
        match &weights.head {
            None => Ok(StageOutput::Activations(Tensor::from_slice(
                &buffers.x[..rows * hidden],
                (rows, hidden),
                &Device::Cpu,
            )?)),
            Some(head) => {
                let predictions = stage.predictions(head, batch, buffers);
                watch.lap(None, Phase::Output);
                Ok(predictions.into())
            }
        }
    }
}

impl Stage {
    fn embed(&self, table: &Matrix, tokens: &[u32], x: &mut [f32]) -> Result<()> {
        for &token in tokens {
            check_token(token, table.rows())?;
        }
        let factor = self.config.embedding_multiplier as f32;
        each_row(&self.cpu.pool, [RowsMut::new(x, self.config.hidden_size)], |i, [x]| {
            table.widen_row(tokens[i] as usize, x);
            if factor != 1.0 {
                ops::scale(self.cpu.isa, x, factor);
            }
        });
        Ok(())
    }

    /// Attention and its residual.
    fn attention(
        &self,
        index: usize,
        layer: &LayerWeights<Cpu>,
        batch: &MicroBatch,
        kv: &mut [SequenceKv],
        buffers: &mut Buffers,
        watch: &mut Watch,
    ) -> Result<()> {
        let number = Some(self.first + index);
        let (config, Cpu { pool, isa }) = (&*self.config, &self.cpu);
        let rows = batch.tokens.len();
        let (heads, kv_heads, head_dim) = (config.num_attention_heads, config.num_key_value_heads, config.head_dim);
        let (q_width, kv_width) = (heads * head_dim, kv_heads * head_dim);
        let Buffers { x, bf16_rows, input, q, k, v, branch, global, local, .. } = buffers;
        let (q, k, v) = (q.room(rows * q_width), k.room(rows * kv_width), v.room(rows * kv_width));

        self.norm_into(&x[..rows * config.hidden_size], &layer.attn_norm, input, *bf16_rows);
        if watch.wants_activations() {
            watch.tap(Tap::PostNorm, input.values());
        }
        watch.lap(number, Phase::AttnNorm);
        self.project(input, [(&layer.q_proj, &mut *q), (&layer.k_proj, &mut *k), (&layer.v_proj, &mut *v)]);
        watch.lap(number, Phase::AttnQkvProj);

        let layer_config = &config.layers[self.first + index];
        let angles = match layer_config.rope {
            LayerRope::None => None,
            LayerRope::Global => Some((&config.rope, &*global)),
            LayerRope::Local => config.local_rope.as_ref().map(|rope| (rope, &*local)),
        };
        let prepare = |values: &mut [f32], row: usize, linear: &Linear<Cpu>, norm: &Option<Vec<f32>>| {
            self.add_bias(values, linear);
            let eps = config.rms_norm_eps as f32;
            match (norm, config.qk_norm) {
                (Some(weight), QkNorm::WholeProjection) => ops::rms_norm_in_place(*isa, values, weight, eps),
                (Some(weight), QkNorm::PerHead) => {
                    values.chunks_exact_mut(head_dim).for_each(|head| ops::rms_norm_in_place(*isa, head, weight, eps))
                }
                (_, QkNorm::None) | (None, _) => {}
            }
            if let Some((rope, angles)) = angles {
                let half = rope.rotary_dim / 2;
                let (cos, sin) = (&angles.cos[row * half..][..half], &angles.sin[row * half..][..half]);
                for head in values.chunks_exact_mut(head_dim) {
                    ops::rotate(*isa, &mut head[..rope.rotary_dim], cos, sin, rope.interleaved);
                }
            }
        };
        let parts = [RowsMut::new(q, q_width), RowsMut::new(k, kv_width), RowsMut::new(v, kv_width)];
        each_row(pool, parts, |row, [q, k, v]| {
            prepare(q, row, &layer.q_proj, &layer.q_norm);
            prepare(k, row, &layer.k_proj, &layer.k_norm);
            self.add_bias(v, &layer.v_proj);
        });
        watch.lap(number, Phase::Rope);

        let mut mixed = input.reset(rows, *bf16_rows, q_width);
        let mut attention = Vec::with_capacity(batch.slices.len());
        let mut start = 0;
        for (slice, kv) in batch.slices.iter().zip(kv) {
            let (q, k, v) = (
                rows_of(q, q_width, start, slice.len),
                rows_of(k, kv_width, start, slice.len),
                rows_of(v, kv_width, start, slice.len),
            );
            let layer_kv = &mut kv.layers[index];
            layer_kv.append(*isa, slice.position, slice.len, k, v);
            let (out, rest) = mixed.split_at_mut(slice.len * q_width);
            mixed = rest;
            attention.push(AttentionRows {
                kv: layer_kv,
                q,
                position: slice.position,
                len: slice.len,
                window: layer_config.sliding_window,
                out,
            });
            start += slice.len;
        }
        watch.lap(number, Phase::KvCache);
        let shape = AttentionShape {
            heads,
            kv_heads,
            head_dim,
            scale: config.attention_scale as f32,
            softcap: config.attn_logit_softcapping.map(|cap| cap as f32),
        };
        attend(pool, *isa, &shape, &mut attention);
        if let Some(filter) = watch.attention_of(self.first + index) {
            for (slice, rows) in batch.slices.iter().zip(&attention).filter(|(slice, _)| slice.is_predicted()) {
                self.show_attention(self.first + index, slice, rows, &shape, &filter, watch);
            }
        }
        watch.lap(number, Phase::Sdpa);

        let branch = branch.room(rows * config.hidden_size);
        self.project(input, [(&layer.o_proj, &mut *branch)]);
        self.add_branch(x, branch, &layer.o_proj, &layer.attn_post_norm, rows);
        if watch.wants_activations() {
            watch.tap(Tap::PostAttention, branch);
        }
        watch.lap(number, Phase::AttnOutput);
        Ok(())
    }

    /// Tells where the last row of a slice looked: its scores once more, beside the computation that goes on.
    fn show_attention(
        &self,
        layer: usize,
        slice: &SequenceSlice,
        rows: &AttentionRows,
        shape: &AttentionShape,
        filter: &AttentionFilter,
        watch: &Watch,
    ) {
        let position = slice.position + slice.len - 1;
        let first = rows.window.map_or(0, |window| (position + 1).saturating_sub(window));
        for head in (0..shape.heads).filter(|head| filter.has_head(*head)) {
            let kv_head = head / (shape.heads / shape.kv_heads);
            let query = &rows.q.values[(slice.len - 1) * rows.q.stride + head * shape.head_dim..][..shape.head_dim];
            let score = |position| {
                let key = rows.kv.key(kv_head, position);
                let score = shape.scale * query.iter().zip(&key).map(|(q, k)| q * k).sum::<f32>();
                shape.softcap.map_or(score, |cap| cap * (score / cap).tanh())
            };
            let mut weights: Vec<f32> = (first..=position).map(score).collect();
            ops::softmax(self.cpu.isa, &mut weights);
            watch.attention(slice.id.0, layer, head, first, position, weights);
        }
    }

    /// The MLP and its residual.
    fn mlp(&self, index: usize, layer: &LayerWeights<Cpu>, buffers: &mut Buffers, rows: usize, watch: &mut Watch) {
        let number = Some(self.first + index);
        let (config, isa) = (&*self.config, self.cpu.isa);
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let Buffers { x, bf16_rows, input, gate, up, branch, .. } = buffers;
        let (gate, up) = (gate.room(rows * inner), up.room(rows * inner));
        self.norm_into(&x[..rows * hidden], &layer.mlp_norm, input, *bf16_rows);
        watch.lap(number, Phase::MlpNorm);
        self.project(input, [(&layer.gate_proj, &mut *gate), (&layer.up_proj, &mut *up)]);
        let activation = match config.activation {
            Activation::Silu => ops::Activation::Silu,
            Activation::Gelu => ops::Activation::Gelu,
            Activation::GeluTanh => ops::Activation::GeluTanh,
        };
        let gated = input.reset(rows, *bf16_rows, inner);
        let parts = [RowsMut::new(gated, inner), RowsMut::new(gate, inner), RowsMut::new(up, inner)];
        each_row(&self.cpu.pool, parts, |_, [gated, gate, up]| {
            self.add_bias(gate, &layer.gate_proj);
            self.add_bias(up, &layer.up_proj);
            ops::activate_mul(isa, activation, gate, up);
            gated.copy_from_slice(gate);
        });
        watch.lap(number, Phase::MlpSwiglu);
        let branch = branch.room(rows * hidden);
        self.project(input, [(&layer.down_proj, &mut *branch)]);
        self.add_branch(x, branch, &layer.down_proj, &layer.mlp_post_norm, rows);
        if watch.wants_activations() {
            watch.tap(Tap::PostFfn, branch);
        }
        watch.lap(number, Phase::MlpOutput);
    }

    /// What is wanted of the rows of which anything is, in order. The most likely tokens are looked for where the logits
    /// are, row by row on the pool's threads, so that only those are copied.
    fn predictions(&self, head: &HeadWeights<Cpu>, batch: &MicroBatch, buffers: &mut Buffers) -> Vec<Prediction> {
        let hidden = self.config.hidden_size;
        let Buffers { x, input, logits, .. } = buffers;
        let wanted: Vec<(Wanted, &[f32])> =
            batch.predicted_rows().map(|(slice, row, _)| (slice.wanted, &x[row * hidden..][..hidden])).collect();
        let mut predictions = Vec::with_capacity(wanted.len());
        for wanted in wanted.chunks(MOST_HEAD_ROWS) {
            let rows: Vec<&[f32]> = wanted.iter().map(|(_, row)| *row).collect();
            predictions.extend(self.head(head, &rows, input, logits, |row, logits| {
                let best = match wanted[row].0 {
                    Wanted::Best { k, .. } => best::most_likely(logits, k),
                    Wanted::Nothing | Wanted::Logits { .. } => None,
                };
                best.map_or_else(|| Prediction::Logits(logits.to_vec()), Prediction::Best)
            }));
        }
        predictions
    }

    /// Final norm and head on rows of (hidden_size), and what `finish` makes of the (vocab_size) logits of each.
    fn head<T: Send + Sync>(
        &self,
        head: &HeadWeights<Cpu>,
        rows: &[&[f32]],
        input: &mut Input,
        logits: &mut Values,
        finish: impl Fn(usize, &[f32]) -> T + Sync,
    ) -> Vec<T> {
        let (config, Cpu { pool, isa }) = (&*self.config, &self.cpu);
        if rows.is_empty() {
            return Vec::new();
        }
        // Few rows, so of prompts as well they are multiplied as those of decode steps are.
        let normed = input.reset(rows.len(), 0, config.hidden_size);
        for (row, normed) in rows.iter().zip(normed.chunks_exact_mut(config.hidden_size)) {
            ops::rms_norm(*isa, row, &head.norm, config.rms_norm_eps as f32, normed);
        }
        let logits = logits.room(rows.len() * config.vocab_size);
        self.project(input, [(&head.projection, &mut *logits)]);
        let finished: Vec<OnceLock<T>> = rows.iter().map(|_| OnceLock::new()).collect();
        each_row(pool, [RowsMut::new(logits, config.vocab_size)], |row, [logits]| {
            if config.logits_scaling != 1.0 {
                ops::scale(*isa, logits, (1.0 / config.logits_scaling) as f32);
            }
            if let Some(cap) = config.final_logit_softcapping {
                ops::soft_cap(*isa, logits, cap as f32);
            }
            let _ = finished[row].set(finish(row, logits)); // each row is given out once
        });
        finished.into_iter().filter_map(OnceLock::into_inner).collect()
    }

    /// The norm of `x` as the next products' input; x itself where the model has no norm.
    fn norm_into(&self, x: &[f32], weight: &Option<Vec<f32>>, input: &mut Input, bf16_rows: usize) {
        let hidden = self.config.hidden_size;
        let eps = self.config.rms_norm_eps as f32;
        let normed = input.reset(x.len() / hidden, bf16_rows, hidden);
        each_row(&self.cpu.pool, [RowsMut::new(normed, hidden)], |row, [normed]| {
            let x = &x[row * hidden..][..hidden];
            match weight {
                Some(weight) => ops::rms_norm(self.cpu.isa, x, weight, eps, normed),
                None => normed.copy_from_slice(x),
            }
        });
    }

    /// Products of one input, without biases.
    fn project<const N: usize>(&self, input: &mut Input, projections: [(&Linear<Cpu>, &mut [f32]); N]) {
        let Cpu { pool, isa } = &self.cpu;
        input.prepare(pool, *isa, projections.iter().map(|(linear, _)| linear.matrix.dtype()));
        let mut products = projections.map(|(linear, out)| Product { matrix: &linear.matrix, out });
        multiply(pool, *isa, input, &mut products);
    }

    fn add_bias(&self, values: &mut [f32], linear: &Linear<Cpu>) {
        if let Some(bias) = &linear.bias {
            ops::add_scaled(self.cpu.isa, values, bias, 1.0);
        }
    }

    /// Bias, norm and scaling of a branch, and its addition to the residual stream.
    fn add_branch(
        &self,
        x: &mut [f32],
        branch: &mut [f32],
        linear: &Linear<Cpu>,
        norm: &Option<Vec<f32>>,
        rows: usize,
    ) {
        let (hidden, isa) = (self.config.hidden_size, self.cpu.isa);
        let eps = self.config.rms_norm_eps as f32;
        let factor = self.config.residual_multiplier as f32;
        let parts = [RowsMut::new(&mut x[..rows * hidden], hidden), RowsMut::new(branch, hidden)];
        each_row(&self.cpu.pool, parts, |_, [x, branch]| {
            self.add_bias(branch, linear);
            if let Some(weight) = norm {
                ops::rms_norm_in_place(isa, branch, weight, eps);
            }
            ops::add_scaled(isa, x, branch, factor);
        });
    }
}

impl Angles {
    /// Looks up the rows of all slices.
    fn fill(&mut self, rope: &RopeCache, batch: &MicroBatch) -> Result<()> {
        let half = rope.rotary_dim() / 2;
        let rows = batch.tokens.len();
        let (mut cos, mut sin) = (grown(&mut self.cos, rows * half), grown(&mut self.sin, rows * half));
        for &SequenceSlice { position, len, length, .. } in &batch.slices {
            let (own_cos, rest_cos) = cos.split_at_mut(len * half);
            let (own_sin, rest_sin) = sin.split_at_mut(len * half);
            rope.copy_rows(position, length, own_cos, own_sin)?;
            (cos, sin) = (rest_cos, rest_sin);
        }
        Ok(())
    }
}

/// Rows `start..start + len` of rows of `width` values.
fn rows_of(values: &[f32], width: usize, start: usize, len: usize) -> Strided<'_> {
    Strided { values: &values[start * width..(start + len) * width], stride: width }
}

/// The first `len` values of a buffer that grows to what is asked of it.
fn grown(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

impl StageBackend for CpuBackend {
    fn open(&mut self, id: SequenceId, capacity: usize) -> Result<()> {
        let kv = self.new_kv(capacity);
        self.sequences.insert(id, kv);
        Ok(())
    }

    fn fork(&mut self, from: SequenceId, to: SequenceId, len: usize, capacity: usize) -> Result<()> {
        let mut kv = self.new_kv(capacity);
        let Some(source) = self.sequences.get(&from) else {
            return Err(Error::Tensors(format!("sequence {} is not open in this stage", from.0)));
        };
        for (to, from) in kv.layers.iter_mut().zip(&source.layers) {
            if len > to.capacity().min(from.capacity()) {
                let (to, from) = (to.capacity(), from.capacity());
                return Err(Error::Tensors(format!("{len} positions of a KV cache of {from} do not fit into {to}")));
            }
            to.copy_prefix(from, len);
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
        // A sequence's KV leaves the table while the step has it: two slices of one sequence cannot alias.
        let mut kv = Vec::with_capacity(batch.slices.len());
        let mut missing = None;
        for slice in &batch.slices {
            match self.sequences.remove(&slice.id) {
                Some(sequence) => kv.push(sequence),
                None => {
                    missing = Some(slice.id);
                    break;
                }
            }
        }
        let output = match missing {
            Some(id) => Err(Error::Tensors(format!("sequence {} is not open in this stage", id.0))),
            None => self.run(batch, input, &mut kv, watch),
        };
        self.sequences.extend(batch.slices.iter().map(|slice| slice.id).zip(kv));
        output
    }

    fn lens(&mut self, rows: &[HiddenRow]) -> Result<Vec<Vec<f32>>> {
        let Some(head) = &self.weights.head else { return Err(Error::Tensors("this stage has no head".into())) };
        let rows: Vec<&[f32]> = rows.iter().map(|row| &row.values[..]).collect();
        let Buffers { input, logits, .. } = &mut self.buffers;
        Ok(self.stage.head(head, &rows, input, logits, |_, logits| logits.to_vec()))
    }

    fn bytes(&self) -> StageBytes {
        StageBytes {
            weights: self.weights.bytes,
            kv: self.sequences.values().map(|kv| kv.bytes(&self.stage)).sum(),
            scratch: self.buffers.bytes(),
        }
    }
}
