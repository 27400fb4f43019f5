//! The decoder: a run of layers, with the embeddings in front if it is the first run and norm and head behind if it is
//! the last. A whole model is the run of all layers.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use metal_ext::MetalExtOptions;

use super::attention::{Softmax, attend, attention_weights, soft_cap};
use super::config::{Activation, DecoderConfig, LayerRope, QkNorm};
use super::kv_cache::SequenceKv;
use super::linear::CandleBuild;
use super::mask::MaskCache;
use super::rope::Ropes;
use super::stage_weights::{HeadWeights, Linear, StageWeights, is_tied};
use crate::device::OpenDevice;
use crate::error::{Error, Result};
use crate::instrument::{Phase, Tap, Watch};
use crate::weights::{WeightSource, WeightType};

/// A run of consecutive positions of one sequence within a forward pass.
pub struct Rows<'a> {
    /// The sequence's number.
    pub sequence: u64,
    /// The sequence's keys and values.
    pub kv: &'a mut SequenceKv,
    /// Position of the first row.
    pub position: usize,
    /// Number of rows.
    pub len: usize,
    /// Length of the sequence as far as it is known, for rotary embeddings that depend on it.
    pub length: usize,
    /// Whether the logits of the last row are wanted.
    pub logits: bool,
}

/// Weight bytes as a plan needs them: what each part takes on a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightBytes {
    /// The embedding table.
    pub embeddings: u64,
    /// Each layer.
    pub layers: Vec<u64>,
    /// Final norm and head. A tied head on the stage that has the embeddings costs nothing more, see `tied`.
    pub head: u64,
    /// Whether the head is the embedding table.
    pub tied: bool,
}

impl WeightBytes {
    /// Adds up the tensors of a model as they will be held, from headers alone.
    pub fn of(
        source: &dyn WeightSource,
        config: &DecoderConfig,
        dense_type: Option<WeightType>,
    ) -> Result<WeightBytes> {
        let mut bytes = WeightBytes {
            embeddings: 0,
            layers: vec![0; config.num_hidden_layers],
            head: 0,
            tied: is_tied(source, config)?,
        };
        for name in source.names() {
            let Some(mut meta) = source.meta(&name)? else { continue };
            if let Some(dense_type) = dense_type.filter(|_| meta.dtype.is_dense()) {
                meta.dtype = dense_type;
            }
            let size = meta.bytes();
            match name.strip_prefix("layers.").and_then(|rest| rest.split_once('.')) {
                Some((layer, _)) => {
                    if let Some(total) = layer.parse().ok().and_then(|layer: usize| bytes.layers.get_mut(layer)) {
                        *total += size;
                    }
                }
                None if name.starts_with("embed_tokens") => bytes.embeddings += size,
                None if name.starts_with("norm") || name.starts_with("lm_head") => bytes.head += size,
                None => {}
            }
        }
        if bytes.tied {
            bytes.head += bytes.embeddings;
        }
        Ok(bytes)
    }

    /// Bytes of a stage with these layers out of all.
    pub fn stage(&self, layers: &Range<usize>) -> u64 {
        let first = layers.start == 0;
        let last = layers.end == self.layers.len();
        let mut bytes = self.layers[layers.clone()].iter().sum::<u64>();
        if first {
            bytes += self.embeddings;
        }
        if last {
            bytes += self.head;
        }
        if first && last && self.tied {
            bytes -= self.embeddings;
        }
        bytes
    }
}

/// How weights are held, and what computes with them.
#[derive(Debug, Clone, Copy, Default)]
pub struct DecoderOptions {
    /// F32, F16 and BF16 matrices become this type; `None` leaves them as stored.
    pub dense_type: Option<WeightType>,
    /// How metal-ext's kernels are used on an Apple GPU.
    pub metal: MetalExtOptions,
}

/// What a forward pass returns.
pub enum Output {
    /// For the next stage: (rows, hidden_size).
    Activations(Tensor),
    /// Of each sequence that asked, in order: (sequences that asked, vocab_size), f32. `None` when none did.
    Logits(Option<Tensor>),
}

/// What a forward pass is given.
pub enum Input<'a> {
    /// Token ids, one a row; only for the run with the embeddings.
    Tokens(&'a [u32]),
    /// The previous run's output: (rows, hidden_size).
    Activations(Tensor),
}

/// Attention scores of one sequence are held for as many rows at a time as fit this: about a core's caches.
const CPU_SCORE_BYTES: usize = 8 << 20;

/// The same on a GPU, where fewer and larger products are faster.
const GPU_SCORE_BYTES: usize = 128 << 20;

/// A run of layers on one device.
pub struct Decoder {
    config: Arc<DecoderConfig>,
    device: Device,
    dtype: DType,
    kv_dtype: DType,
    weights: StageWeights<CandleBuild>,
    /// Index of the first layer in the model.
    first: usize,
    ropes: Arc<Ropes>,
    masks: MaskCache,
    softmax: Softmax,
}

impl Decoder {
    /// Loads the layers `range` to `device`, whose rotary tables are `ropes`. `progress` hears of each part's bytes when
    /// it is in place.
    pub fn load(
        source: &dyn WeightSource,
        config: Arc<DecoderConfig>,
        range: Range<usize>,
        device: &OpenDevice,
        ropes: Arc<Ropes>,
        options: DecoderOptions,
        progress: &dyn Fn(u64),
    ) -> Result<Decoder> {
        let dense_type = options.dense_type;
        let dtype = activation_dtype(source, &device.device, dense_type)?;
        let kv_dtype = kv_dtype(source, &device.device, dense_type)?;
        let build = CandleBuild::new(device, dtype, options.metal);
        let softmax = build.softmax();
        let first = range.start;
        let weights = StageWeights::load(source, &config, range, dense_type, &build, progress)?;
        let device = build.device;
        let masks = MaskCache::new(device.clone(), dtype);
        Ok(Decoder { masks, softmax, ropes, device, config, dtype, kv_dtype, weights, first })
    }

    /// The weights, for a backend that computes some steps by itself.
    pub fn weights(&self) -> &StageWeights<CandleBuild> {
        &self.weights
    }

    /// Keeps so many attention masks at most.
    pub fn keep_masks(&mut self, capacity: usize) {
        self.masks.keep(capacity);
    }

    /// Bytes of the weights.
    pub fn weight_bytes(&self) -> u64 {
        self.weights.bytes
    }

    /// Room for one sequence of up to `capacity` positions in this run's layers.
    pub fn new_kv(&self, capacity: usize) -> Result<SequenceKv> {
        SequenceKv::new(&self.config, self.weights.layers.len(), capacity, self.kv_dtype, &self.device)
    }

    /// The embeddings of `tokens`: (tokens, hidden_size).
    pub fn embed(&self, tokens: &[u32]) -> Result<Tensor> {
        let Some(table) = &self.weights.embeddings else {
            return Err(Error::Tensors("only the first stage is given tokens, and nothing else".into()));
        };
        let x = table.look_up(tokens, &self.device, self.dtype)?;
        scale(x, self.config.embedding_multiplier)
    }

    /// Runs the rows of all `sequences` through the layers, writing their keys and values.
    pub fn forward(&mut self, input: Input, sequences: &mut [Rows], watch: &mut Watch) -> Result<Output> {
        let mut x = match (input, &self.weights.embeddings) {
            (Input::Tokens(tokens), Some(_)) => self.embed(tokens)?,
            (Input::Activations(x), None) => x.to_dtype(self.dtype)?,
            _ => return Err(Error::Tensors("only the first stage is given tokens, and nothing else".into())),
        }; // (rows, hidden_size)
        self.lap(watch, None, Phase::Embedding)?;
        for index in 0..self.weights.layers.len() {
            if watch.wants_activations() {
                watch.layer_input(&to_host(&x)?);
            }
            x = self.layer(index, x, sequences, watch)?;
            if watch.wants_activations() {
                watch.layer_output(self.first + index, &to_host(&x)?);
            }
            if watch.wants_hidden() {
                let mut end = 0;
                for rows in sequences.iter() {
                    end += rows.len;
                    if rows.logits {
                        let values = to_host(&x.narrow(0, end - 1, 1)?)?;
                        watch.hidden(rows.sequence, rows.position + rows.len - 1, self.first + index, &values);
                    }
                }
            }
        }
        let Some(head) = &self.weights.head else { return Ok(Output::Activations(x)) };
        let mut wanted = Vec::new();
        let mut end = 0;
        for rows in sequences.iter() {
            end += rows.len;
            if rows.logits {
                wanted.push(x.narrow(0, end - 1, 1)?);
            }
        }
        if wanted.is_empty() {
            return Ok(Output::Logits(None));
        }
        let logits = self.logits(head, &Tensor::cat(&wanted, 0)?)?;
        self.lap(watch, None, Phase::Output)?;
        Ok(Output::Logits(Some(logits)))
    }

    /// What the head says to rows of (hidden_size), wherever they lie: (vocab_size) each.
    pub fn lens(&self, rows: Tensor) -> Result<Vec<Vec<f32>>> {
        let Some(head) = &self.weights.head else { return Err(Error::Tensors("this stage has no head".into())) };
        let x = rows.to_device(&self.device)?.to_dtype(self.dtype)?;
        Ok(self.logits(head, &x)?.to_vec2()?)
    }

    /// The time since the last lap, which on a GPU has passed only once the work is done.
    fn lap(&self, watch: &mut Watch, layer: Option<usize>, phase: Phase) -> Result<()> {
        if watch.synchronises() {
            self.device.synchronize()?;
        }
        watch.lap(layer, phase);
        Ok(())
    }

    /// Final norm and head. `x`: (rows, hidden_size) -> (rows, vocab_size), f32.
    fn logits(&self, head: &HeadWeights<CandleBuild>, x: &Tensor) -> Result<Tensor> {
        let x = rms_norm(x, &head.norm, self.config.rms_norm_eps)?;
        let mut logits = head.projection.forward(&x)?.to_dtype(DType::F32)?; // (wanted, vocab_size)
        logits = scale(logits, 1.0 / self.config.logits_scaling)?;
        if let Some(cap) = self.config.final_logit_softcapping {
            // Infinite logits become NaN, so that they are refused: a cap would hide them.
            let lost = (&logits * 0.0)?; // zeros, NaN where a logit is not finite
            logits = (soft_cap(&logits, cap)? + lost)?;
        }
        Ok(logits)
    }

    /// One layer. `x`: (rows, hidden_size) -> the same.
    fn layer(&mut self, index: usize, x: Tensor, sequences: &mut [Rows], watch: &mut Watch) -> Result<Tensor> {
        let number = Some(self.first + index);
        let heads_watched = watch.attention_of(self.first + index);
        let (layer, config) = (&self.weights.layers[index], &self.config);
        let layer_config = &config.layers[self.first + index];
        let norm = |x: &Tensor, weight: &Option<Tensor>| match weight {
            Some(weight) => rms_norm(x, weight, config.rms_norm_eps),
            None => Ok(x.clone()),
        };
        let normed = norm(&x, &layer.attn_norm)?;
        if watch.wants_activations() {
            watch.tap(Tap::PostNorm, &to_host(&normed)?);
        }
        self.lap(watch, number, Phase::AttnNorm)?;
        let q = self.heads(&normed, &layer.q_proj, &layer.q_norm, config.num_attention_heads)?;
        let k = self.heads(&normed, &layer.k_proj, &layer.k_norm, config.num_key_value_heads)?;
        let v = self.heads(&normed, &layer.v_proj, &None, config.num_key_value_heads)?;
        self.lap(watch, number, Phase::AttnQkvProj)?;

        let mut mixed = Vec::with_capacity(sequences.len());
        let mut start = 0;
        for rows in sequences.iter_mut() {
            // (rows, heads, head_dim) -> (heads, len, head_dim) of this sequence
            let own = |t: &Tensor| t.narrow(0, start, rows.len)?.transpose(0, 1)?.contiguous();
            let (mut q, mut k, v) = (own(&q)?, own(&k)?, own(&v)?);
            start += rows.len;
            let rope = match layer_config.rope {
                LayerRope::None => None,
                LayerRope::Global => Some(&self.ropes.global),
                LayerRope::Local => self.ropes.local.as_ref(),
            };
            if let Some(rope) = rope {
                q = rope.rotate(&q.unsqueeze(0)?, rows.position, rows.length)?.squeeze(0)?;
                k = rope.rotate(&k.unsqueeze(0)?, rows.position, rows.length)?.squeeze(0)?;
            }
            self.lap(watch, number, Phase::Rope)?;
            rows.kv.append(index, rows.position, &k, &v)?;
            self.lap(watch, number, Phase::KvCache)?;
            let window = layer_config.sliding_window;
            // A long prompt's scores would fill the memory, so its rows are taken in blocks.
            let score_row = config.num_attention_heads * (rows.position + rows.len) * self.dtype.size_in_bytes();
            let most = if self.device.is_cpu() { CPU_SCORE_BYTES } else { GPU_SCORE_BYTES };
            let block = (most / score_row).clamp(1, rows.len);
            for first in (0..rows.len).step_by(block) {
                let len = block.min(rows.len - first);
                let position = rows.position + first;
                // Positions that no row's window reaches, and those after the block, are not read at all.
                let from = window.map_or(0, |window| (position + 1).saturating_sub(window));
                let (keys, values) = rows.kv.view(index, from, position + len)?;
                let (keys, values) = (keys.to_dtype(self.dtype)?, values.to_dtype(self.dtype)?);
                let mask = match len {
                    1 => None,
                    len => Some(self.masks.get(len, position + len - from, window)?),
                };
                let q = if len == rows.len { q.clone() } else { q.narrow(1, first, len)?.contiguous()? };
                let (scale, cap) = (config.attention_scale, config.attn_logit_softcapping);
                mixed.push(attend(&q, &keys, &values, mask.as_ref(), scale, cap, &self.softmax)?); // (len, heads * head_dim)
            }
            if let Some(filter) = heads_watched.as_ref().filter(|_| rows.logits) {
                let position = rows.position + rows.len - 1;
                let from = window.map_or(0, |window| (position + 1).saturating_sub(window));
                let (keys, _) = rows.kv.view(index, from, position + 1)?;
                let last = q.narrow(1, rows.len - 1, 1)?;
                let weights = attention_weights(&last, &keys, config.attention_scale, config.attn_logit_softcapping)?;
                for (head, weights) in weights.into_iter().enumerate().filter(|(head, _)| filter.has_head(*head)) {
                    watch.attention(rows.sequence, self.first + index, head, from, position, weights);
                }
            }
            self.lap(watch, number, Phase::Sdpa)?;
        }
        let mixed = if mixed.len() == 1 { mixed.remove(0) } else { Tensor::cat(&mixed, 0)? };
        let attended = norm(&layer.o_proj.forward(&mixed)?, &layer.attn_post_norm)?;
        if watch.wants_activations() {
            watch.tap(Tap::PostAttention, &to_host(&attended)?);
        }
        let x = (x + scale(attended, config.residual_multiplier)?)?;
        self.lap(watch, number, Phase::AttnOutput)?;

        let normed = norm(&x, &layer.mlp_norm)?;
        self.lap(watch, number, Phase::MlpNorm)?;
        let gate = layer.gate_proj.forward(&normed)?; // (rows, intermediate_size)
        let gate = match config.activation {
            Activation::Silu => gate.silu()?,
            Activation::Gelu => gate.gelu_erf()?,
            Activation::GeluTanh => gate.gelu()?,
        };
        let up = layer.up_proj.forward(&normed)?;
        let gated = (gate * up)?;
        self.lap(watch, number, Phase::MlpSwiglu)?;
        let down = norm(&layer.down_proj.forward(&gated)?, &layer.mlp_post_norm)?;
        if watch.wants_activations() {
            watch.tap(Tap::PostFfn, &to_host(&down)?);
        }
        let x = (x + scale(down, config.residual_multiplier)?)?;
        self.lap(watch, number, Phase::MlpOutput)?;
        Ok(x)
    }

    /// Projects (rows, hidden_size) to (rows, heads, head_dim), normalised where the model does that.
    fn heads(
        &self,
        x: &Tensor,
        projection: &Linear<CandleBuild>,
        weight: &Option<Tensor>,
        heads: usize,
    ) -> Result<Tensor> {
        let mut y = projection.forward(x)?; // (rows, heads * head_dim)
        let shape = (y.dim(0)?, heads, self.config.head_dim);
        let eps = self.config.rms_norm_eps;
        match (weight, self.config.qk_norm) {
            (Some(weight), QkNorm::WholeProjection) => y = rms_norm(&y, weight, eps)?,
            (Some(weight), QkNorm::PerHead) => return rms_norm(&y.reshape(shape)?, weight, eps),
            (_, QkNorm::None) | (None, _) => {}
        }
        Ok(y.reshape(shape)?)
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

/// The type of keys and values in [`SequenceKv`]: f16 on Metal, as metal-ext's attention reads them; elsewhere that of the
/// activations.
pub fn kv_dtype(source: &dyn WeightSource, device: &Device, dense_type: Option<WeightType>) -> Result<DType> {
    match device.is_metal() {
        true => Ok(DType::F16),
        false => activation_dtype(source, device, dense_type),
    }
}

/// `x * factor`, without the pass over x that a factor of 1 would cost.
fn scale(x: Tensor, factor: f64) -> Result<Tensor> {
    Ok(if factor == 1.0 { x } else { (x * factor)? })
}

/// All values of a tensor in f32.
fn to_host(x: &Tensor) -> Result<Vec<f32>> {
    Ok(x.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    Ok(candle_nn::ops::rms_norm(&x.contiguous()?, weight, eps as f32)?)
}
