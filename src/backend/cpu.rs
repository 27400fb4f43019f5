//! The CPU's own forward pass: a layer is five products and attention over buffers that are kept from step to step, with
//! the small operations between them fused into what prepares the next product's input.
//!
//! The order of it all is in [`layer`], the arithmetic in [`kernels`](crate::kernels), in f32 with keys and values of a
//! chosen type. A row has the same bits whatever else is in the step.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use candle_core::{Device, Tensor};

use super::layer::{self, LayerOps, MOST_PRODUCTS, Register};
use super::sequences::{SequenceState, Sequences};
use super::{
    MicroBatch, Prediction, SequenceId, SequenceSlice, StageBackend, StageBytes, StageOutput, StageSource, Wanted,
};
use crate::device::Cpu;
use crate::error::{Error, Result};
use crate::instrument::{HiddenRow, Watch};
use crate::kernels::attention::{AttentionRows, AttentionShape, attend};
use crate::kernels::best;
use crate::kernels::buffer::Values;
use crate::kernels::input::Input;
use crate::kernels::kv::{KvType, LayerKv, MOST_DIMS, Strided};
use crate::kernels::matrix::{Matrix, Product, multiply};
use crate::kernels::ops;
use crate::kernels::rows::{RowsMut, each_row};
use crate::kernels::simd::Isa;
use crate::model::config::{DecoderConfig, LayerRope};
use crate::model::rope::{RopeCache, Ropes};
use crate::model::stage_weights::{AttentionWeights, Build, GatedMlp, HeadWeights, Linear, StageWeights};
use crate::weights::{TensorBytes, WeightType};

/// A run of decoder layers on a CPU, and the keys and values of the sequences that are open in it.
pub struct CpuBackend {
    weights: StageWeights<Cpu>,
    stage: CpuStage,
    sequences: Sequences<CpuKv>,
    buffers: Buffers,
}

/// What a forward pass reads besides weights.
struct CpuStage {
    config: Arc<DecoderConfig>,
    cpu: Cpu,
    ropes: Arc<Ropes>,
    kv_type: KvType,
    bf16_prompts: bool,
}

/// Keys and values of one sequence, one entry a layer.
struct CpuKv {
    layers: Vec<LayerKv>,
    /// Bytes of the positions that were asked for, which is what is budgeted. The allocation is up to 63 positions larger,
    /// see [`LayerKv::new`]; the budget leaves a twentieth of the memory for such things.
    bytes: u64,
}

impl SequenceState for CpuKv {
    fn copy_prefix(&mut self, source: &CpuKv, len: usize) -> Result<()> {
        for (to, from) in self.layers.iter_mut().zip(&source.layers) {
            if len > to.capacity().min(from.capacity()) {
                let (to, from) = (to.capacity(), from.capacity());
                return Err(Error::Tensors(format!("{len} positions of a KV cache of {from} do not fit into {to}")));
            }
            to.copy_prefix(from, len);
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

/// The values of a step, which are the registers of [`LayerOps`]. They grow to the largest step and stay.
#[derive(Default)]
struct Buffers {
    x: Vec<f32>, // (rows, hidden_size), the residual stream
    input: Input,
    products: [Values; MOST_PRODUCTS], // (rows, as many as the matrix has)
    logits: Values,                    // (rows of the head, vocab_size)
    global: RowAngles,
    local: RowAngles,
}

impl Buffers {
    fn bytes(&self) -> u64 {
        let Buffers { x, input, products, logits, global, local } = self;
        let angles = [&global.cos, &global.sin, &local.cos, &local.sin];
        let values: usize = [x].into_iter().chain(angles).map(Vec::capacity).sum();
        let products: u64 = products.iter().chain([logits]).map(Values::bytes).sum();
        (values * size_of::<f32>()) as u64 + products + input.bytes()
    }
}

/// Cos and sin of the step's rows.
#[derive(Default)]
struct RowAngles {
    cos: Vec<f32>, // (rows, rotary_dim / 2)
    sin: Vec<f32>, // (rows, rotary_dim / 2)
}

impl Build for Cpu {
    type Matrix = Matrix;
    type Vector = Vec<f32>;

    fn matrix(&self, dtype: WeightType, bytes: &TensorBytes<'_>, n: usize, k: usize) -> Result<Option<Matrix>> {
        if dtype.bytes_for(k).and_then(|row| n.checked_mul(row)) != Some(bytes.len()) {
            return Ok(None);
        }
        Matrix::pack_from(&self.pool, dtype, n, k, |at, into| bytes.read_at(at, into)).transpose()
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
        let stage = CpuStage {
            config: config.clone(),
            cpu: cpu.clone(),
            ropes: ropes.clone(),
            kv_type: options.kv_type,
            bf16_prompts: options.bf16_prompts,
        };
        Ok(CpuBackend { weights, stage, sequences: Sequences::default(), buffers: Buffers::default() })
    }

    fn new_kv(&self, capacity: usize) -> CpuKv {
        let CpuStage { config, kv_type, .. } = &self.stage;
        let (kv_heads, head_dim) = (config.num_key_value_heads, config.head_dim);
        let layers = self.weights.layers.iter().map(|_| LayerKv::new(*kv_type, kv_heads, head_dim, capacity));
        let layers: Vec<LayerKv> = layers.collect();
        let bytes = (layers.len() * capacity) as u64 * kv_type.bytes_per_position(kv_heads, head_dim);
        CpuKv { layers, bytes }
    }
}

/// One step, see [`LayerOps`].
struct CpuStep<'a> {
    stage: &'a CpuStage,
    slices: &'a [SequenceSlice],
    kv: &'a mut [CpuKv],
    buffers: &'a mut Buffers,
    rows: usize,
    /// How many of the rows, the last ones, are computed in BF16 where there is AMX.
    bf16_rows: usize,
}

impl<'a> CpuStep<'a> {
    /// For the rows of `batch`, whose sequences' keys and values are `kv`, one for each slice.
    fn new(stage: &'a CpuStage, batch: &'a MicroBatch, kv: &'a mut [CpuKv], buffers: &'a mut Buffers) -> Result<Self> {
        let prompt_rows = batch.prompt_rows()?;
        let bf16_rows = if stage.bf16_prompts { prompt_rows } else { 0 };
        buffers.global.fill(&stage.ropes.global, batch)?;
        if let Some(local) = &stage.ropes.local {
            buffers.local.fill(local, batch)?;
        }
        Ok(CpuStep { stage, slices: &batch.slices, kv, buffers, rows: batch.tokens.len(), bf16_rows })
    }

    /// Widths of q and of k and v.
    fn widths(&self) -> (usize, usize) {
        let config = &*self.stage.config;
        (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim)
    }

    fn attention_shape(&self) -> AttentionShape {
        let config = &*self.stage.config;
        AttentionShape {
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            scale: config.attention_scale as f32,
            softcap: config.attn_logit_softcapping.map(|cap| cap as f32),
        }
    }
}

impl LayerOps for CpuStep<'_> {
    type Build = Cpu;

    fn embed(&mut self, table: &Matrix, tokens: &[u32]) -> Result<()> {
        let CpuStage { config, cpu: Cpu { pool, isa }, .. } = self.stage;
        let factor = config.embedding_multiplier as f32;
        let x = grown(&mut self.buffers.x, self.rows * config.hidden_size);
        each_row(pool, [RowsMut::new(x, config.hidden_size)], |i, [x]| {
            table.widen_row(tokens[i] as usize, x);
            if factor != 1.0 {
                ops::scale(*isa, x, factor);
            }
        });
        Ok(())
    }

    fn receive(&mut self, x: Tensor) -> Result<()> {
        self.buffers.x = x.flatten_all()?.to_vec1::<f32>()?;
        Ok(())
    }

    fn norm(&mut self, weight: &Option<Vec<f32>>) -> Result<()> {
        let CpuStage { config, cpu: Cpu { pool, isa }, .. } = self.stage;
        let (hidden, eps) = (config.hidden_size, config.rms_norm_eps as f32);
        let Buffers { x, input, .. } = &mut *self.buffers;
        let normed = input.reset(self.rows, self.bf16_rows, hidden);
        each_row(pool, [RowsMut::new(normed, hidden)], |row, [normed]| {
            let x = &x[row * hidden..][..hidden];
            match weight {
                Some(weight) => ops::rms_norm(*isa, x, weight, eps, normed),
                None => normed.copy_from_slice(x),
            }
        });
        Ok(())
    }

    fn project<const N: usize>(&mut self, linears: [&Linear<Cpu>; N]) -> Result<()> {
        const { assert!(N <= MOST_PRODUCTS) };
        let Buffers { input, products, .. } = &mut *self.buffers;
        let mut products = products.iter_mut();
        let linears = linears.map(|linear| {
            let product = products.next().expect("as many as are asked for");
            (linear, product.room(input.rows() * linear.matrix.rows()))
        });
        multiply_into(&self.stage.cpu, input, linears);
        Ok(())
    }

    fn prepare_qkv(&mut self, weights: &AttentionWeights<Cpu>, rope: LayerRope) -> Result<()> {
        let (q_width, kv_width) = self.widths();
        let CpuStage { config, cpu: Cpu { pool, isa }, .. } = self.stage;
        let Buffers { products: [q, k, v], global, local, .. } = &mut *self.buffers;
        let angles = match rope {
            LayerRope::None => None,
            LayerRope::Global => Some((&config.rope, &*global)),
            LayerRope::Local => config.local_rope.as_ref().map(|rope| (rope, &*local)),
        };
        let prepare = |values: &mut [f32], row: usize, linear: &Linear<Cpu>, norm: &Option<Vec<f32>>| {
            add_bias(*isa, values, &linear.bias);
            if let Some(weight) = norm {
                let eps = config.rms_norm_eps as f32;
                let parts = values.chunks_exact_mut(weight.len());
                parts.for_each(|part| ops::rms_norm_in_place(*isa, part, weight, eps));
            }
            if let Some((rope, angles)) = angles {
                let half = rope.rotary_dim / 2;
                let (cos, sin) = (&angles.cos[row * half..][..half], &angles.sin[row * half..][..half]);
                for head in values.chunks_exact_mut(config.head_dim) {
                    ops::rotate(*isa, &mut head[..rope.rotary_dim], cos, sin, rope.interleaved);
                }
            }
        };
        let (q, k, v) = (q.room(self.rows * q_width), k.room(self.rows * kv_width), v.room(self.rows * kv_width));
        let parts = [RowsMut::new(q, q_width), RowsMut::new(k, kv_width), RowsMut::new(v, kv_width)];
        each_row(pool, parts, |row, [q, k, v]| {
            prepare(q, row, &weights.q_proj, &weights.q_norm);
            prepare(k, row, &weights.k_proj, &weights.k_norm);
            add_bias(*isa, v, &weights.v_proj.bias);
        });
        Ok(())
    }

    fn append(&mut self, index: usize) -> Result<()> {
        let (_, width) = self.widths();
        let [_, k, v] = &mut self.buffers.products;
        let (k, v) = (k.room(self.rows * width), v.room(self.rows * width));
        let mut start = 0;
        for (slice, kv) in self.slices.iter().zip(&mut *self.kv) {
            let (k, v) = (rows_of(k, width, start, slice.len), rows_of(v, width, start, slice.len));
            kv.layers[index].append(self.stage.cpu.isa, slice.position, slice.len, k, v);
            start += slice.len;
        }
        Ok(())
    }

    fn attend(&mut self, index: usize, window: Option<usize>) -> Result<()> {
        let ((width, _), shape) = (self.widths(), self.attention_shape());
        let Buffers { input, products: [q, ..], .. } = &mut *self.buffers;
        let q = q.room(self.rows * width);
        let mut mixed = input.reset(self.rows, self.bf16_rows, width);
        let mut attention = Vec::with_capacity(self.slices.len());
        let mut start = 0;
        for (&SequenceSlice { position, len, .. }, kv) in self.slices.iter().zip(&*self.kv) {
            let (out, rest) = mixed.split_at_mut(len * width);
            mixed = rest;
            let q = rows_of(q, width, start, len);
            attention.push(AttentionRows { kv: &kv.layers[index], q, position, len, window, out });
            start += len;
        }
        let Cpu { pool, isa } = &self.stage.cpu;
        attend(pool, *isa, &shape, &mut attention);
        Ok(())
    }

    fn gate(&mut self, weights: &GatedMlp<Cpu>) -> Result<()> {
        let CpuStage { config, cpu: Cpu { pool, isa }, .. } = self.stage;
        let inner = config.intermediate_size;
        let Buffers { input, products: [gate, up, _], .. } = &mut *self.buffers;
        let (gate, up) = (gate.room(self.rows * inner), up.room(self.rows * inner));
        let gated = input.reset(self.rows, self.bf16_rows, inner);
        let parts = [RowsMut::new(gated, inner), RowsMut::new(gate, inner), RowsMut::new(up, inner)];
        each_row(pool, parts, |_, [gated, gate, up]| {
            add_bias(*isa, gate, &weights.gate_proj.bias);
            add_bias(*isa, up, &weights.up_proj.bias);
            ops::activate_mul(*isa, config.activation, gate, up);
            gated.copy_from_slice(gate);
        });
        Ok(())
    }

    fn add_branch(&mut self, bias: &Option<Vec<f32>>, norm: &Option<Vec<f32>>) -> Result<()> {
        let CpuStage { config, cpu: Cpu { pool, isa }, .. } = self.stage;
        let (hidden, eps) = (config.hidden_size, config.rms_norm_eps as f32);
        let factor = config.residual_multiplier as f32;
        let Buffers { x, products: [branch, ..], .. } = &mut *self.buffers;
        let (x, branch) = (&mut x[..self.rows * hidden], branch.room(self.rows * hidden));
        each_row(pool, [RowsMut::new(x, hidden), RowsMut::new(branch, hidden)], |_, [x, branch]| {
            add_bias(*isa, branch, bias);
            if let Some(weight) = norm {
                ops::rms_norm_in_place(*isa, branch, weight, eps);
            }
            ops::add_scaled(*isa, x, branch, factor);
        });
        Ok(())
    }

    fn head(&mut self, head: &HeadWeights<Cpu>, rows: &[(usize, Wanted)]) -> Result<Vec<Prediction>> {
        let CpuStage { config, cpu, .. } = self.stage;
        let (hidden, vocab, eps) = (config.hidden_size, config.vocab_size, config.rms_norm_eps as f32);
        let Buffers { x, input, logits, .. } = &mut *self.buffers;
        // Few rows, so of prompts as well they are multiplied as those of decode steps are.
        let normed = input.reset(rows.len(), 0, hidden);
        for ((row, _), normed) in rows.iter().zip(normed.chunks_exact_mut(hidden)) {
            ops::rms_norm(cpu.isa, &x[row * hidden..][..hidden], &head.norm, eps, normed);
        }
        let logits = logits.room(rows.len() * vocab);
        multiply_into(cpu, input, [(&head.projection, &mut *logits)]);
        // The most likely tokens are searched for where the logits are, so that only those are copied.
        let predictions: Vec<OnceLock<Prediction>> = rows.iter().map(|_| OnceLock::new()).collect();
        each_row(&cpu.pool, [RowsMut::new(logits, vocab)], |index, [logits]| {
            if config.logits_scaling != 1.0 {
                ops::scale(cpu.isa, logits, (1.0 / config.logits_scaling) as f32);
            }
            if let Some(cap) = config.final_logit_softcapping {
                ops::soft_cap(cpu.isa, logits, cap as f32);
            }
            let best = match rows[index].1 {
                Wanted::Best { k, .. } => best::most_likely(logits, k),
                Wanted::Nothing | Wanted::Logits { .. } => None,
            };
            let prediction = best.map_or_else(|| Prediction::Logits(logits.to_vec()), Prediction::Best);
            let _ = predictions[index].set(prediction); // each row is given out once
        });
        Ok(predictions.into_iter().filter_map(OnceLock::into_inner).collect())
    }

    fn send(&mut self) -> Result<Tensor> {
        let hidden = self.stage.config.hidden_size;
        Ok(Tensor::from_slice(&self.buffers.x[..self.rows * hidden], (self.rows, hidden), &Device::Cpu)?)
    }

    fn values(&mut self, register: Register, rows: Range<usize>) -> Result<Cow<'_, [f32]>> {
        let hidden = self.stage.config.hidden_size;
        let Buffers { x, input, products: [branch, ..], .. } = &mut *self.buffers;
        let (values, width): (&[f32], usize) = match register {
            Register::Residual => (x, hidden),
            Register::Input => (input.values(), input.columns()),
            Register::Branch => (branch.room(self.rows * hidden), hidden),
        };
        Ok(Cow::Borrowed(&values[rows.start * width..rows.end * width]))
    }

    fn attention_weights(
        &mut self,
        index: usize,
        slice: usize,
        positions: Range<usize>,
        heads: &[usize],
    ) -> Result<Vec<Vec<f32>>> {
        let ((width, _), shape) = (self.widths(), self.attention_shape());
        let [q, ..] = &mut self.buffers.products;
        let last = self.slices[..=slice].iter().map(|slice| slice.len).sum::<usize>() - 1;
        let q = &q.room(self.rows * width)[last * width..][..width];
        let kv = &self.kv[slice].layers[index];
        let weights = |head: &usize| {
            let kv_head = head / (shape.heads / shape.kv_heads);
            let query = &q[head * shape.head_dim..][..shape.head_dim];
            let score = |position| {
                let key = kv.key(kv_head, position);
                let score = shape.scale * query.iter().zip(&key).map(|(q, k)| q * k).sum::<f32>();
                shape.softcap.map_or(score, |cap| cap * (score / cap).tanh())
            };
            let mut weights: Vec<f32> = positions.clone().map(score).collect();
            ops::softmax(self.stage.cpu.isa, &mut weights);
            weights
        };
        Ok(heads.iter().map(weights).collect())
    }
}

/// Products of one input, without biases.
fn multiply_into<const N: usize>(cpu: &Cpu, input: &mut Input, products: [(&Linear<Cpu>, &mut [f32]); N]) {
    let Cpu { pool, isa } = cpu;
    input.prepare(pool, *isa, products.iter().map(|(linear, _)| linear.matrix.dtype()));
    let mut products = products.map(|(linear, out)| Product { matrix: &linear.matrix, out });
    multiply(pool, *isa, input, &mut products);
}

fn add_bias(isa: Isa, values: &mut [f32], bias: &Option<Vec<f32>>) {
    if let Some(bias) = bias {
        ops::add_scaled(isa, values, bias, 1.0);
    }
}

impl RowAngles {
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
        self.sequences.open(id, kv);
        Ok(())
    }

    fn fork(&mut self, from: SequenceId, to: SequenceId, len: usize, capacity: usize) -> Result<()> {
        let kv = self.new_kv(capacity);
        self.sequences.fork(from, to, len, kv)
    }

    fn truncate(&mut self, id: SequenceId, length: usize) -> Result<()> {
        self.sequences.truncate(id, length)
    }

    fn close(&mut self, id: SequenceId) {
        self.sequences.close(id);
    }

    fn forward(&mut self, batch: &MicroBatch, input: Option<Tensor>, watch: &mut Watch) -> Result<StageOutput> {
        let CpuBackend { weights, stage, sequences, buffers } = self;
        sequences.lend(batch, |kv| {
            let step = CpuStep::new(stage, batch, kv, buffers)?;
            layer::forward(step, weights, &stage.config, batch, input, watch)
        })
    }

    fn lens(&mut self, rows: &[HiddenRow]) -> Result<Vec<Vec<f32>>> {
        let CpuBackend { weights, stage, buffers, .. } = self;
        let step = CpuStep { stage, slices: &[], kv: &mut [], buffers, rows: rows.len(), bf16_rows: 0 };
        layer::lens(step, weights, &stage.config, rows)
    }

    fn bytes(&self) -> StageBytes {
        StageBytes { weights: self.weights.bytes, kv: self.sequences.bytes(), scratch: self.buffers.bytes() }
    }
}
