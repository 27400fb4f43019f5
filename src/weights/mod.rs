//! Where tensors come from. A [`WeightSource`] finds a tensor's type, shape and bytes by its canonical name, so that
//! nothing above this module knows whether a model is safetensors or GGUF. Whoever runs a stage builds what it needs
//! from the bytes: candle tensors, quantised matrices, packed kernels.
//!
//! # Canonical names
//!
//! Each name says what the decoder does with the tensor, not what some file calls it (Hugging Face uses
//! `post_attention_layernorm` for two different norms). `{i}` is the layer's index in the whole model:
//!
//! ```text
//! embed_tokens.weight                 (vocab_size, hidden_size)
//! norm.weight                         (hidden_size)                  final norm
//! lm_head.weight                      (vocab_size, hidden_size)      absent when tied to the embeddings
//! layers.{i}.attn_norm.weight         (hidden_size)                  before attention
//! layers.{i}.attn_post_norm.weight    (hidden_size)                  on attention's output, before the residual add
//! layers.{i}.mlp_norm.weight          (hidden_size)                  before the MLP
//! layers.{i}.mlp_post_norm.weight     (hidden_size)                  on the MLP's output, before the residual add
//! layers.{i}.{q,k,v,o}_proj.{weight,bias}
//! layers.{i}.qkv_proj.{weight,bias}   q, k and v stacked by rows     instead of the three
//! layers.{i}.{q,k}_norm.weight        (head_dim) or (heads * head_dim)
//! layers.{i}.{gate,up,down}_proj.{weight,bias}
//! layers.{i}.gate_up_proj.{weight,bias}  gate and up stacked by rows instead of the two
//! rope_freqs.weight, rope_factors_{long,short}.weight                GGUF's RoPE scaling tables
//! ```

pub mod gguf;
pub mod hub;
pub mod safetensors;

mod file;
mod names;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use candle_core::quantized::GgmlDType;
use memmap2::Mmap;
use metal_ext::pack::Format;

pub use self::file::{ModelFile, TensorBytes};
use crate::error::Result;

/// How the numbers of a stored tensor are encoded. The names are those of GGML.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, non_camel_case_types)]
pub enum WeightType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
}

impl WeightType {
    /// Every supported type.
    pub const ALL: [WeightType; 13] = [
        WeightType::F32,
        WeightType::F16,
        WeightType::BF16,
        WeightType::Q4_0,
        WeightType::Q4_1,
        WeightType::Q5_0,
        WeightType::Q5_1,
        WeightType::Q8_0,
        WeightType::Q2_K,
        WeightType::Q3_K,
        WeightType::Q4_K,
        WeightType::Q5_K,
        WeightType::Q6_K,
    ];

    /// The same type in candle's terms.
    pub fn ggml(self) -> GgmlDType {
        match self {
            WeightType::F32 => GgmlDType::F32,
            WeightType::F16 => GgmlDType::F16,
            WeightType::BF16 => GgmlDType::BF16,
            WeightType::Q4_0 => GgmlDType::Q4_0,
            WeightType::Q4_1 => GgmlDType::Q4_1,
            WeightType::Q5_0 => GgmlDType::Q5_0,
            WeightType::Q5_1 => GgmlDType::Q5_1,
            WeightType::Q8_0 => GgmlDType::Q8_0,
            WeightType::Q2_K => GgmlDType::Q2K,
            WeightType::Q3_K => GgmlDType::Q3K,
            WeightType::Q4_K => GgmlDType::Q4K,
            WeightType::Q5_K => GgmlDType::Q5K,
            WeightType::Q6_K => GgmlDType::Q6K,
        }
    }

    /// The format of metal-ext's kernels that holds this type, if there is one.
    pub fn packed_format(self) -> Option<Format> {
        match self {
            WeightType::F16 => Some(Format::F16),
            WeightType::BF16 => Some(Format::BF16),
            WeightType::Q8_0 => Some(Format::Q8_0),
            WeightType::Q4_0 => Some(Format::Q4_0),
            WeightType::Q4_K => Some(Format::Q4_K),
            WeightType::Q6_K => Some(Format::Q6_K),
            WeightType::F32
            | WeightType::Q4_1
            | WeightType::Q5_0
            | WeightType::Q5_1
            | WeightType::Q2_K
            | WeightType::Q3_K
            | WeightType::Q5_K => None,
        }
    }

    /// Elements that share one block; rows are a whole number of blocks.
    pub fn block_size(self) -> usize {
        self.ggml().block_size()
    }

    /// Bytes of one block.
    pub fn type_size(self) -> usize {
        self.ggml().type_size()
    }

    /// Bytes that a tensor of `elements` takes; `None` when that is not a whole number of blocks or overflows.
    pub fn bytes_for(self, elements: usize) -> Option<usize> {
        if !elements.is_multiple_of(self.block_size()) {
            return None;
        }
        (elements / self.block_size()).checked_mul(self.type_size())
    }

    /// Whether the type is F32, F16 or BF16.
    pub fn is_dense(self) -> bool {
        matches!(self, WeightType::F32 | WeightType::F16 | WeightType::BF16)
    }

    /// The type's usual name: `F16`, `Q4_K`, ...
    pub fn name(self) -> &'static str {
        match self {
            WeightType::F32 => "F32",
            WeightType::F16 => "F16",
            WeightType::BF16 => "BF16",
            WeightType::Q4_0 => "Q4_0",
            WeightType::Q4_1 => "Q4_1",
            WeightType::Q5_0 => "Q5_0",
            WeightType::Q5_1 => "Q5_1",
            WeightType::Q8_0 => "Q8_0",
            WeightType::Q2_K => "Q2_K",
            WeightType::Q3_K => "Q3_K",
            WeightType::Q4_K => "Q4_K",
            WeightType::Q5_K => "Q5_K",
            WeightType::Q6_K => "Q6_K",
        }
    }
}

impl std::fmt::Display for WeightType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Type and shape of a stored tensor, without its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorMeta {
    /// Encoding.
    pub dtype: WeightType,
    /// Dimensions, row-major (last one contiguous), as in Hugging Face files; GGUF's reversed order is undone.
    pub shape: Vec<usize>,
}

impl TensorMeta {
    /// Bytes as stored.
    pub fn bytes(&self) -> u64 {
        // Sources check at opening that the product is a whole number of blocks and lies within the file.
        self.dtype.bytes_for(self.shape.iter().product()).unwrap_or(0) as u64
    }
}

/// A stored tensor: its type and shape, and its bytes.
#[derive(Debug, Clone)]
pub struct StoredTensor<'a> {
    /// Type and shape.
    pub meta: TensorMeta,
    /// Exactly `meta.bytes()` bytes, little endian.
    pub bytes: TensorBytes<'a>,
}

/// A tensor's bytes in a mapped file, for a device that reads them in place.
#[derive(Debug, Clone)]
pub struct MappedTensor {
    /// The mapping, which lasts as long as any clone of it.
    pub file: Arc<Mmap>,
    /// The tensor's bytes in it.
    pub range: Range<usize>,
}

/// Tensors by canonical name. Opening one reads headers only; bytes are read when they are asked for.
pub trait WeightSource: Send + Sync {
    /// Type and shape, or `None` when the model has no such tensor. A tensor of a type that is not supported is an
    /// error that names it.
    fn meta(&self, name: &str) -> Result<Option<TensorMeta>>;

    /// The tensor. An absent one is an error that names it as the file would.
    fn tensor(&self, name: &str) -> Result<StoredTensor<'_>>;

    /// The bytes of [`tensor`](Self::tensor) in a mapping of their file; `None` where the source has no such tensor or
    /// changes the bytes on the way. A file that is truncated while it is mapped kills the process, so only devices
    /// that read weights in place ask for it.
    fn mapped(&self, _name: &str) -> Result<Option<MappedTensor>> {
        Ok(None)
    }

    /// Canonical names of all tensors that have one, in no order.
    fn names(&self) -> Vec<String>;

    /// What the file calls the tensor, or would; for error messages.
    fn stored_name(&self, name: &str) -> String;

    /// The file that holds, or would hold, the tensor; for error messages.
    fn path_of(&self, name: &str) -> &Path;
}
