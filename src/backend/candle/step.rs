//! The operations of a layer over candle's tensors.

use std::borrow::Cow;
use std::ops::Range;

use candle_core::{DType, Tensor};

use super::CandleStage;
use super::attention::{attend, attention_weights, soft_cap};
use super::kv::TensorKv;
use super::mask::MaskCache;
use super::matrix::{CandleBuild, DeviceMatrix};
use crate::backend::layer::{LayerOps, MOST_PRODUCTS, Register};
use crate::backend::{Prediction, SequenceSlice, Wanted};
use crate::error::Result;
use crate::model::config::{Activation, LayerRope};
use crate::model::stage_weights::{AttentionWeights, GatedMlp, HeadWeights, Linear};

/// Attention scores of one sequence are held for as many rows at a time as fit this: about a core's caches.
const CPU_SCORE_BYTES: usize = 8 << 20;

/// The same on a GPU, where fewer and larger products are faster.
const GPU_SCORE_BYTES: usize = 128 << 20;

impl CandleStage {
    /// The embeddings of `tokens`: (tokens, hidden_size).
    pub(super) fn embed(&self, table: &DeviceMatrix, tokens: &[u32]) -> Result<Tensor> {
        scale(table.look_up(tokens, &self.device, self.dtype)?, self.config.embedding_multiplier)
    }

    /// The last dimension normalised; `x` itself where there is no weight.
    fn norm(&self, x: &Tensor, weight: &Option<Tensor>) -> Result<Tensor> {
        match weight {
            Some(weight) => Ok(candle_nn::ops::rms_norm(&x.contiguous()?, weight, self.config.rms_norm_eps as f32)?),
            None => Ok(x.clone()),
        }
    }
}

/// One step, see [`LayerOps`].
pub(super) struct CandleStep<'a> {
    stage: &'a CandleStage,
    masks: &'a mut MaskCache,
    slices: &'a [SequenceSlice],
    kv: &'a mut [TensorKv],
    residual: Tensor,
    input: Tensor,
    products: [Tensor; MOST_PRODUCTS],
    /// q, k and v of each slice: (heads, len, head_dim).
    heads: Vec<[Tensor; 3]>,
    /// What a register holds that nothing was written to.
    nothing: Tensor,
}

impl<'a> CandleStep<'a> {
    /// For the rows of `slices`, whose sequences' keys and values are `kv`, one for each.
    pub(super) fn new(
        stage: &'a CandleStage,
        masks: &'a mut MaskCache,
        slices: &'a [SequenceSlice],
        kv: &'a mut [TensorKv],
    ) -> Result<Self> {
        let nothing = Tensor::zeros(0, DType::F32, &candle_core::Device::Cpu)?;
        let [residual, input] = [nothing.clone(), nothing.clone()];
        let products = std::array::from_fn(|_| nothing.clone());
        Ok(CandleStep { stage, masks, slices, kv, residual, input, products, heads: Vec::new(), nothing })
    }

    /// Takes the products out, so that their memory is free as soon as what reads them is done.
    fn take_products(&mut self) -> [Tensor; MOST_PRODUCTS] {
        let nothing = std::array::from_fn(|_| self.nothing.clone());
        std::mem::replace(&mut self.products, nothing)
    }

    /// Attention of slice number `slice`, block by block: a long prompt's scores would fill the memory.
    fn attend_slice(
        &mut self,
        index: usize,
        slice: usize,
        window: Option<usize>,
        mixed: &mut Vec<Tensor>,
    ) -> Result<()> {
        let CandleStage { config, dtype, device, softmax, .. } = self.stage;
        let (SequenceSlice { position, len, .. }, [q, ..]) = (self.slices[slice], &self.heads[slice]);
        let score_row = config.num_attention_heads * (position + len) * dtype.size_in_bytes();
        let most = if device.is_cpu() { CPU_SCORE_BYTES } else { GPU_SCORE_BYTES };
        let block = (most / score_row).clamp(1, len);
        for first in (0..len).step_by(block) {
            let rows = block.min(len - first);
            let position = position + first;
            // Positions that no row's window reaches, and those after the block, are not read at all.
            let from = window.map_or(0, |window| (position + 1).saturating_sub(window));
            let (keys, values) = self.kv[slice].view(index, from, position + rows)?;
            let (keys, values) = (keys.to_dtype(*dtype)?, values.to_dtype(*dtype)?);
            let mask = match rows {
                1 => None,
                rows => Some(self.masks.get(rows, position + rows - from, window)?),
            };
            let q = if rows == len { q.clone() } else { q.narrow(1, first, rows)?.contiguous()? };
            let (scale, cap) = (config.attention_scale, config.attn_logit_softcapping);
            mixed.push(attend(&q, &keys, &values, mask.as_ref(), scale, cap, softmax)?); // (rows, heads * head_dim)
        }
        Ok(())
    }
}

impl LayerOps for CandleStep<'_> {
    type Build = CandleBuild;

    fn embed(&mut self, table: &DeviceMatrix, tokens: &[u32]) -> Result<()> {
        self.residual = self.stage.embed(table, tokens)?;
        Ok(())
    }

    fn receive(&mut self, x: Tensor) -> Result<()> {
        self.residual = x.to_device(&self.stage.device)?.to_dtype(self.stage.dtype)?;
        Ok(())
    }

    fn norm(&mut self, weight: &Option<Tensor>) -> Result<()> {
        self.input = self.stage.norm(&self.residual, weight)?;
        Ok(())
    }

    fn project<const N: usize>(&mut self, linears: [&Linear<CandleBuild>; N]) -> Result<()> {
        const { assert!(N <= MOST_PRODUCTS) };
        for (product, linear) in self.products.iter_mut().zip(linears) {
            *product = linear.matrix.forward(&self.input)?;
        }
        Ok(())
    }

    fn prepare_qkv(&mut self, weights: &AttentionWeights<CandleBuild>, rope: LayerRope) -> Result<()> {
        let CandleStage { config, ropes, .. } = self.stage;
        // (rows, heads * head_dim) -> (rows, heads, head_dim)
        let prepare = |product: Tensor, linear: &Linear<CandleBuild>, norm: &Option<Tensor>| -> Result<Tensor> {
            let mut x = add_bias(product, &linear.bias)?;
            let (rows, width) = x.dims2()?;
            if let Some(weight) = norm {
                let part = weight.elem_count();
                x = self.stage.norm(&x.reshape((rows, width / part, part))?, norm)?;
            }
            Ok(x.reshape((rows, width / config.head_dim, config.head_dim))?)
        };
        let [q, k, v] = self.take_products();
        let q = prepare(q, &weights.q_proj, &weights.q_norm)?;
        let k = prepare(k, &weights.k_proj, &weights.k_norm)?;
        let v = prepare(v, &weights.v_proj, &None)?;
        let rope = match rope {
            LayerRope::None => None,
            LayerRope::Global => Some(&ropes.global),
            LayerRope::Local => ropes.local.as_ref(),
        };
        self.heads.clear();
        let mut start = 0;
        for &SequenceSlice { position, len, length, .. } in self.slices {
            // (rows, heads, head_dim) -> (heads, len, head_dim) of this sequence
            let own = |t: &Tensor| t.narrow(0, start, len)?.transpose(0, 1)?.contiguous();
            let (mut q, mut k, v) = (own(&q)?, own(&k)?, own(&v)?);
            if let Some(rope) = rope {
                q = rope.rotate(&q.unsqueeze(0)?, position, length)?.squeeze(0)?;
                k = rope.rotate(&k.unsqueeze(0)?, position, length)?.squeeze(0)?;
            }
            self.heads.push([q, k, v]);
            start += len;
        }
        Ok(())
    }

    fn append(&mut self, index: usize) -> Result<()> {
        for ((slice, kv), [_, k, v]) in self.slices.iter().zip(&mut *self.kv).zip(&self.heads) {
            kv.append(index, slice.position, k, v)?;
        }
        Ok(())
    }

    fn attend(&mut self, index: usize, window: Option<usize>) -> Result<()> {
        let mut mixed = Vec::with_capacity(self.slices.len());
        for slice in 0..self.slices.len() {
            self.attend_slice(index, slice, window, &mut mixed)?;
        }
        self.input = if mixed.len() == 1 { mixed.remove(0) } else { Tensor::cat(&mixed, 0)? };
        Ok(())
    }

    fn gate(&mut self, weights: &GatedMlp<CandleBuild>) -> Result<()> {
        let [gate, up, _] = self.take_products();
        let gate = add_bias(gate, &weights.gate_proj.bias)?; // (rows, intermediate_size)
        let gate = match self.stage.config.activation {
            Activation::Silu => gate.silu()?,
            Activation::Gelu => gate.gelu_erf()?,
            Activation::GeluTanh => gate.gelu()?,
        };
        self.input = (gate * add_bias(up, &weights.up_proj.bias)?)?;
        Ok(())
    }

    fn add_branch(&mut self, bias: &Option<Tensor>, norm: &Option<Tensor>) -> Result<()> {
        let [branch, ..] = self.take_products();
        let branch = self.stage.norm(&add_bias(branch, bias)?, norm)?;
        self.residual = (&self.residual + scale(branch.clone(), self.stage.config.residual_multiplier)?)?;
        self.products[0] = branch;
        Ok(())
    }

    fn head(&mut self, head: &HeadWeights<CandleBuild>, rows: &[(usize, Wanted)]) -> Result<Vec<Prediction>> {
        let config = &self.stage.config;
        let rows =
            rows.iter().map(|&(row, _)| self.residual.narrow(0, row, 1)).collect::<candle_core::Result<Vec<_>>>()?;
        let x = Tensor::cat(&rows, 0)?;
        let x = candle_nn::ops::rms_norm(&x.contiguous()?, &head.norm, config.rms_norm_eps as f32)?;
        let logits = add_bias(head.projection.matrix.forward(&x)?, &head.projection.bias)?;
        let mut logits = scale(logits.to_dtype(DType::F32)?, 1.0 / config.logits_scaling)?; // (rows, vocab_size)
        if let Some(cap) = config.final_logit_softcapping {
            // Infinite logits become NaN, so that they are refused: a cap would hide them.
            let lost = (&logits * 0.0)?; // zeros, NaN where a logit is not finite
            logits = (soft_cap(&logits, cap)? + lost)?;
        }
        Ok(logits.to_vec2()?.into_iter().map(Prediction::Logits).collect())
    }

    fn send(&mut self) -> Result<Tensor> {
        Ok(self.residual.clone())
    }

    fn values(&mut self, register: Register, rows: Range<usize>) -> Result<Cow<'_, [f32]>> {
        let values = match register {
            Register::Residual => &self.residual,
            Register::Input => &self.input,
            Register::Branch => &self.products[0],
        };
        let values = values.narrow(0, rows.start, rows.len())?;
        Ok(Cow::Owned(values.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?))
    }

    fn attention_weights(
        &mut self,
        index: usize,
        slice: usize,
        positions: Range<usize>,
        heads: &[usize],
    ) -> Result<Vec<Vec<f32>>> {
        let config = &self.stage.config;
        let (keys, _) = self.kv[slice].view(index, positions.start, positions.end)?;
        let [q, ..] = &self.heads[slice];
        let last = q.narrow(1, self.slices[slice].len - 1, 1)?;
        let mut all = attention_weights(&last, &keys, config.attention_scale, config.attn_logit_softcapping)?;
        Ok(heads.iter().map(|&head| std::mem::take(&mut all[head])).collect())
    }

    fn wait(&self) -> Result<()> {
        Ok(self.stage.device.synchronize()?)
    }
}

/// `x * factor`, without the pass over x that a factor of 1 would cost.
fn scale(x: Tensor, factor: f64) -> Result<Tensor> {
    Ok(if factor == 1.0 { x } else { (x * factor)? })
}

fn add_bias(x: Tensor, bias: &Option<Tensor>) -> Result<Tensor> {
    match bias {
        Some(bias) => Ok(x.broadcast_add(bias)?),
        None => Ok(x),
    }
}
