//! The weights of a run of layers, read from a [`WeightSource`] tensor by tensor into whatever a device computes with.
//! [`Build`] is that device's half: it takes bytes and gives back matrices and vectors.

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};

use super::config::{DecoderConfig, QkNorm};
use crate::error::{Error, Result};
use crate::kernels::dequantise;
use crate::weights::{MappedTensor, StoredTensor, TensorBytes, WeightSource, WeightType};

/// Makes a device's matrices and vectors.
pub trait Build {
    /// A matrix of a stored type.
    type Matrix;
    /// A norm weight or a bias.
    type Vector;

    /// Whether weights may stay in a mapped file, where [`mapped_matrix`](Self::mapped_matrix) finds them.
    const READS_IN_PLACE: bool = false;

    /// The `n` by `k` matrix of these bytes; `None` when they are not one.
    fn matrix(&self, dtype: WeightType, bytes: &TensorBytes<'_>, n: usize, k: usize) -> Result<Option<Self::Matrix>>;

    /// The same matrix of bytes in a mapped file, read in place for as long as the matrix lasts; `None` where they have
    /// to be copied, for [`matrix`](Self::matrix) to do.
    fn mapped_matrix(
        &self,
        _dtype: WeightType,
        _stored: &MappedTensor,
        _n: usize,
        _k: usize,
    ) -> Result<Option<Self::Matrix>> {
        Ok(None)
    }

    /// A vector.
    fn vector(&self, values: Vec<f32>) -> Result<Self::Vector>;

    /// Bytes that a matrix holds, in memory of its own or in a mapped file: its pages are in memory as well once it has
    /// been multiplied.
    fn matrix_bytes(matrix: &Self::Matrix) -> u64;

    /// Bytes that a vector holds.
    fn vector_bytes(vector: &Self::Vector) -> u64;
}

/// A projection: matrix and optional bias.
pub struct Linear<B: Build> {
    /// (n, k); the tied head shares the embedding table.
    pub matrix: Arc<B::Matrix>,
    /// (n)
    pub bias: Option<B::Vector>,
}

impl<B: Build> Linear<B> {
    fn bytes(&self) -> u64 {
        B::matrix_bytes(&self.matrix) + self.bias.as_ref().map_or(0, B::vector_bytes)
    }
}

/// One layer's weights.
#[allow(missing_docs)]
pub struct LayerWeights<B: Build> {
    pub attn_norm: Option<B::Vector>,      // (hidden_size)
    pub attn_post_norm: Option<B::Vector>, // (hidden_size)
    pub mlp_norm: Option<B::Vector>,       // (hidden_size)
    pub mlp_post_norm: Option<B::Vector>,  // (hidden_size)
    pub mixer: Mixer<B>,
    pub mlp: Mlp<B>,
}

/// What passes information between the positions of a sequence: a layer's first branch.
pub enum Mixer<B: Build> {
    /// Softmax attention over keys and values of all positions.
    Attention(AttentionWeights<B>),
}

/// What works on each position by itself: a layer's second branch.
pub enum Mlp<B: Build> {
    /// `down(activation(gate(x)) * up(x))`.
    Gated(GatedMlp<B>),
}

/// Weights of attention.
#[allow(missing_docs)]
pub struct AttentionWeights<B: Build> {
    pub q_proj: Linear<B>,
    pub k_proj: Linear<B>,
    pub v_proj: Linear<B>,
    pub o_proj: Linear<B>,
    /// As long as what it normalises: (head_dim) for each head, (heads * head_dim) for the whole projection.
    pub q_norm: Option<B::Vector>,
    pub k_norm: Option<B::Vector>,
}

/// Weights of a gated MLP.
#[allow(missing_docs)]
pub struct GatedMlp<B: Build> {
    pub gate_proj: Linear<B>,
    pub up_proj: Linear<B>,
    pub down_proj: Linear<B>,
}

/// Final norm and head.
pub struct HeadWeights<B: Build> {
    /// (hidden_size)
    pub norm: B::Vector,
    /// To the vocabulary.
    pub projection: Linear<B>,
}

/// All weights of a run of layers.
pub struct StageWeights<B: Build> {
    /// Index in the model of the first of `layers`.
    pub first: usize,
    /// The embedding table, of the first run only: (vocab_size, hidden_size).
    pub embeddings: Option<Arc<B::Matrix>>,
    /// The layers, in order.
    pub layers: Vec<LayerWeights<B>>,
    /// Of the last run only.
    pub head: Option<HeadWeights<B>>,
    /// Bytes of all of them.
    pub bytes: u64,
}

impl<B: Build> StageWeights<B> {
    /// Reads the layers `range`. F32, F16 and BF16 matrices become `dense_type`, `None` leaves them as stored. `progress`
    /// hears of each part's bytes when it is in place.
    pub fn load(
        source: &dyn WeightSource,
        config: &DecoderConfig,
        range: Range<usize>,
        dense_type: Option<WeightType>,
        build: &B,
        progress: &dyn Fn(u64),
    ) -> Result<Self> {
        let reader = Reader { source, dense_type, build };
        let bytes = std::cell::Cell::new(0);
        let done = |part: u64| {
            bytes.set(bytes.get() + part);
            progress(part);
        };
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let first = range.start;
        let has_embeddings = first == 0;
        let last = range.end == config.num_hidden_layers;
        let tied = is_tied(source, config)?;
        let embeddings = match has_embeddings || (last && tied) {
            true => Some(Arc::new(reader.matrix("embed_tokens.weight", vocab, 0, vocab, hidden)?)),
            false => None,
        };
        done(embeddings.as_deref().map_or(0, B::matrix_bytes));
        let mut layers = Vec::with_capacity(range.len());
        for index in range {
            let layer = LayerWeights::load(&reader, config, index)?;
            done(layer.bytes());
            layers.push(layer);
        }
        let head = match last {
            false => None,
            true => {
                let projection = match (&embeddings, tied) {
                    (Some(table), true) => Linear { matrix: table.clone(), bias: None },
                    _ => {
                        let projection = reader.linear("lm_head", vocab, hidden, Some(false))?;
                        done(projection.bytes());
                        projection
                    }
                };
                let norm = reader.vector("norm.weight", hidden, config.norm_offset)?;
                done(B::vector_bytes(&norm));
                Some(HeadWeights { norm, projection })
            }
        };
        Ok(StageWeights { first, embeddings: embeddings.filter(|_| has_embeddings), layers, head, bytes: bytes.get() })
    }
}

impl<B: Build> LayerWeights<B> {
    fn load(reader: &Reader<B>, config: &DecoderConfig, index: usize) -> Result<Self> {
        let norm = |part: &str, wanted: bool| match wanted {
            true => {
                let name = format!("layers.{index}.{part}.weight");
                reader.vector(&name, config.hidden_size, config.norm_offset).map(Some)
            }
            false => Ok(None),
        };
        Ok(LayerWeights {
            attn_norm: norm("attn_norm", config.norms.attn_norm)?,
            attn_post_norm: norm("attn_post_norm", config.norms.attn_post_norm)?,
            mlp_norm: norm("mlp_norm", config.norms.mlp_norm)?,
            mlp_post_norm: norm("mlp_post_norm", config.norms.mlp_post_norm)?,
            mixer: Mixer::Attention(AttentionWeights::load(reader, config, index)?),
            mlp: Mlp::Gated(GatedMlp::load(reader, config, index)?),
        })
    }

    fn bytes(&self) -> u64 {
        let norms = [&self.attn_norm, &self.attn_post_norm, &self.mlp_norm, &self.mlp_post_norm];
        let norms: u64 = norms.into_iter().flatten().map(B::vector_bytes).sum();
        let mixer = match &self.mixer {
            Mixer::Attention(attention) => attention.bytes(),
        };
        let mlp = match &self.mlp {
            Mlp::Gated(mlp) => mlp.bytes(),
        };
        norms + mixer + mlp
    }
}

impl<B: Build> AttentionWeights<B> {
    fn load(reader: &Reader<B>, config: &DecoderConfig, index: usize) -> Result<Self> {
        let hidden = config.hidden_size;
        let q_rows = config.num_attention_heads * config.head_dim;
        let kv_rows = config.num_key_value_heads * config.head_dim;
        let name = |part: &str| format!("layers.{index}.{part}");
        let qkv = name("qkv_proj");
        let qkv_total = q_rows + 2 * kv_rows;
        let fused = reader.source.meta(&name("qkv_proj.weight"))?.is_some();
        let input = |part: &str, start: usize, rows: usize| match fused {
            true => reader.linear_rows(&qkv, qkv_total, start, rows, hidden, config.qkv_bias),
            false => reader.linear(&name(part), rows, hidden, config.qkv_bias),
        };
        let norm = |part: &str, rows: usize| {
            let size = match config.qk_norm {
                QkNorm::None => return Ok(None),
                QkNorm::PerHead => config.head_dim,
                QkNorm::WholeProjection => rows,
            };
            reader.vector(&name(part), size, config.norm_offset).map(Some)
        };
        Ok(AttentionWeights {
            q_proj: input("q_proj", 0, q_rows)?,
            k_proj: input("k_proj", q_rows, kv_rows)?,
            v_proj: input("v_proj", q_rows + kv_rows, kv_rows)?,
            o_proj: reader.linear(&name("o_proj"), hidden, q_rows, config.o_bias)?,
            q_norm: norm("q_norm.weight", q_rows)?,
            k_norm: norm("k_norm.weight", kv_rows)?,
        })
    }

    fn bytes(&self) -> u64 {
        let linears = [&self.q_proj, &self.k_proj, &self.v_proj, &self.o_proj];
        let norms = [&self.q_norm, &self.k_norm].into_iter().flatten().map(B::vector_bytes);
        linears.iter().map(|linear| linear.bytes()).chain(norms).sum()
    }
}

impl<B: Build> GatedMlp<B> {
    fn load(reader: &Reader<B>, config: &DecoderConfig, index: usize) -> Result<Self> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let name = |part: &str| format!("layers.{index}.{part}");
        let gate_up = name("gate_up_proj");
        let fused = reader.source.meta(&name("gate_up_proj.weight"))?.is_some();
        let input = |part: &str, start: usize| match fused {
            true => reader.linear_rows(&gate_up, 2 * inner, start, inner, hidden, config.mlp_bias),
            false => reader.linear(&name(part), inner, hidden, config.mlp_bias),
        };
        Ok(GatedMlp {
            gate_proj: input("gate_proj", 0)?,
            up_proj: input("up_proj", inner)?,
            down_proj: reader.linear(&name("down_proj"), hidden, inner, config.mlp_bias)?,
        })
    }

    fn bytes(&self) -> u64 {
        [&self.gate_proj, &self.up_proj, &self.down_proj].iter().map(|linear| linear.bytes()).sum()
    }
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

/// The head is the embedding table where the config says so and the file has no head of its own.
pub fn is_tied(source: &dyn WeightSource, config: &DecoderConfig) -> Result<bool> {
    Ok(config.tie_word_embeddings && source.meta("lm_head.weight")?.is_none())
}

struct Reader<'a, B> {
    source: &'a dyn WeightSource,
    dense_type: Option<WeightType>,
    build: &'a B,
}

impl<B: Build> Reader<'_, B> {
    /// The matrix `name` with its bias, `n` rows by `k` columns. `bias` says whether there must be one; `None` takes
    /// what the file has.
    fn linear(&self, name: &str, n: usize, k: usize, bias: Option<bool>) -> Result<Linear<B>> {
        self.linear_rows(name, n, 0, n, k, bias)
    }

    /// Rows `start..start + n` of a matrix of `total` rows, for projections that a file stores as one.
    fn linear_rows(
        &self,
        name: &str,
        total: usize,
        start: usize,
        n: usize,
        k: usize,
        bias: Option<bool>,
    ) -> Result<Linear<B>> {
        let matrix = self.matrix(&format!("{name}.weight"), total, start, n, k)?;
        let bias_name = format!("{name}.bias");
        let has_bias = match bias {
            Some(needed) => needed,
            None => self.source.meta(&bias_name)?.is_some(),
        };
        let bias = match has_bias {
            true => Some(self.build.vector(self.values(&bias_name, total)?[start..start + n].to_vec())?),
            false => None,
        };
        Ok(Linear { matrix: Arc::new(matrix), bias })
    }

    /// A one-dimensional weight of `n` values, plus `offset`.
    fn vector(&self, name: &str, n: usize, offset: f32) -> Result<B::Vector> {
        self.build.vector(self.values(name, n)?.into_iter().map(|v| v + offset).collect())
    }

    fn values(&self, name: &str, n: usize) -> Result<Vec<f32>> {
        let stored = self.source.tensor(name)?;
        self.check_shape(name, &stored, &[n])?;
        let values = dequantise(stored.meta.dtype, &stored.bytes.read()?);
        values.ok_or_else(|| self.wrong(name, "its bytes do not match its shape".into()))
    }

    fn matrix(&self, name: &str, total: usize, start: usize, n: usize, k: usize) -> Result<B::Matrix> {
        let stored = self.source.tensor(name)?;
        self.check_shape(name, &stored, &[total, k])?;
        let dtype = stored.meta.dtype;
        let row_bytes = dtype
            .bytes_for(k)
            .ok_or_else(|| self.wrong(name, format!("rows of {k} values are no whole blocks of {dtype}")))?;
        let rows = start * row_bytes..(start + n) * row_bytes;
        let bytes = stored.bytes.part(rows.clone());
        let (dtype, bytes) = match self.dense_type {
            Some(wanted) if dtype.is_dense() && wanted != dtype => {
                (wanted, TensorBytes::Memory(convert(&bytes, dtype, wanted)?.into()))
            }
            _ => {
                if B::READS_IN_PLACE
                    && let Some(MappedTensor { file, range }) = self.source.mapped(name)?
                {
                    let stored = MappedTensor { file, range: range.start + rows.start..range.start + rows.end };
                    if let Some(matrix) = self.build.mapped_matrix(dtype, &stored, n, k)? {
                        return Ok(matrix);
                    }
                }
                (dtype, bytes)
            }
        };
        let matrix = self.build.matrix(dtype, &bytes, n, k)?;
        matrix.ok_or_else(|| self.wrong(name, format!("{} bytes are no {n} by {k} {dtype} matrix", bytes.len())))
    }

    fn check_shape(&self, name: &str, stored: &StoredTensor, wanted: &[usize]) -> Result<()> {
        if stored.meta.shape == wanted {
            return Ok(());
        }
        Err(self.wrong(name, format!("has shape {:?}, the config asks for {wanted:?}", stored.meta.shape)))
    }

    fn wrong(&self, name: &str, reason: String) -> Error {
        Error::Tensor { path: self.source.path_of(name).into(), tensor: self.source.stored_name(name), reason }
    }
}

/// From one dense type to another, some values at a time, so that they are never all in memory as f32.
fn convert(bytes: &TensorBytes<'_>, from: WeightType, to: WeightType) -> Result<Vec<u8>> {
    const VALUES: usize = 1 << 16;
    let mut converted = Vec::with_capacity(bytes.len() / from.type_size() * to.type_size());
    let mut part = vec![0; VALUES * from.type_size()];
    for start in (0..bytes.len()).step_by(part.len()) {
        part.truncate(bytes.len() - start);
        bytes.read_at(start, &mut part)?;
        let values = dequantise(from, &part).unwrap_or_default();
        match to {
            WeightType::F16 => converted.extend(values.into_iter().flat_map(|v| f16::from_f32(v).to_le_bytes())),
            WeightType::BF16 => converted.extend(values.into_iter().flat_map(|v| bf16::from_f32(v).to_le_bytes())),
            _ => converted.extend(values.into_iter().flat_map(f32::to_le_bytes)),
        }
    }
    Ok(converted)
}
