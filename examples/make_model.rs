//! Writes a model of a real shape with seeded random weights, for benches and tests without a download.
//!
//! ```text
//! cargo run --release --example make_model -- --shape tinyllama-1.1b --type f16 --out /tmp/tinyllama
//! cargo run --release --example make_model -- --shape qwen2.5-0.5b --type q4_k --out /tmp/qwen.gguf
//! cargo run --release --example make_model -- --type q4_k_m --out /tmp/tinyllama.gguf
//! cargo run --release --example make_model -- --shape custom --hidden-size 512 --layers 4 --out /tmp/small
//! ```
//!
//! An output that ends in `.gguf` is a GGUF file of any supported type, with norms in F32 as usual; any other is a folder
//! with config.json and safetensors in F32, F16 or BF16. The output is nonsense, the arithmetic and the bytes are real.
//! GGUF files say that they have no tokenizer, in the way that llama.cpp loads too.

#[allow(dead_code)] // this example uses a part
#[path = "common/output.rs"]
mod output;
#[allow(dead_code)]
#[path = "common/files.rs"]
mod files;

use std::collections::BTreeMap;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use candle_pipeline::weights::WeightType;
use clap::{Parser, ValueEnum};
use files::OutputFile;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use rayon::prelude::*;

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ShapeName {
    #[value(name = "tinyllama-1.1b")]
    TinyLlama,
    #[value(name = "qwen2.5-0.5b")]
    Qwen,
    #[value(name = "llama-3.2-1b")]
    Llama32,
    Custom,
}

#[derive(Parser)]
struct Arguments {
    /// Shape of the model.
    #[arg(long, value_enum, default_value = "tinyllama-1.1b")]
    shape: ShapeName,
    /// Type of the matrices: f32, f16, bf16, and for GGUF also q4_0 q4_1 q5_0 q5_1 q8_0 q2_k q3_k q4_k q5_k q6_k, and
    /// the mixtures q4_k_m q5_k_m.
    #[arg(long = "type", default_value = "f16")]
    dtype: String,
    /// Folder, or file that ends in .gguf. Only models that this program wrote are replaced.
    #[arg(long)]
    out: PathBuf,
    /// Seed of the weights.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Overrides, and the whole shape with `--shape custom`.
    #[arg(long)]
    hidden_size: Option<usize>,
    #[arg(long)]
    intermediate_size: Option<usize>,
    #[arg(long)]
    layers: Option<usize>,
    #[arg(long)]
    heads: Option<usize>,
    #[arg(long)]
    kv_heads: Option<usize>,
    #[arg(long)]
    vocab_size: Option<usize>,
}

struct Shape {
    architecture: &'static str,
    hidden_size: usize,
    intermediate_size: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    vocab_size: usize,
    context: usize,
    rope_theta: f64,
    eps: f64,
    tied: bool,
    qkv_bias: bool,
}

impl Shape {
    fn new(arguments: &Arguments) -> Result<Shape> {
        let llama = Shape {
            architecture: "llama",
            hidden_size: 512,
            intermediate_size: 1024,
            layers: 8,
            heads: 8,
            kv_heads: 2,
            vocab_size: 4096,
            context: 2048,
            rope_theta: 10_000.0,
            eps: 1e-5,
            tied: false,
            qkv_bias: false,
        };
        let mut shape = match arguments.shape {
            ShapeName::Custom => llama,
            ShapeName::TinyLlama => Shape {
                hidden_size: 2048,
                intermediate_size: 5632,
                layers: 22,
                heads: 32,
                kv_heads: 4,
                vocab_size: 32_000,
                ..llama
            },
            ShapeName::Llama32 => Shape {
                hidden_size: 2048,
                intermediate_size: 8192,
                layers: 16,
                heads: 32,
                kv_heads: 8,
                vocab_size: 128_256,
                context: 131_072,
                rope_theta: 500_000.0,
                tied: true,
                ..llama
            },
            ShapeName::Qwen => Shape {
                architecture: "qwen2",
                hidden_size: 896,
                intermediate_size: 4864,
                layers: 24,
                heads: 14,
                kv_heads: 2,
                vocab_size: 151_936,
                context: 32_768,
                rope_theta: 1_000_000.0,
                eps: 1e-6,
                tied: true,
                qkv_bias: true,
            },
        };
        let overrides = [
            (&mut shape.hidden_size, arguments.hidden_size),
            (&mut shape.intermediate_size, arguments.intermediate_size),
            (&mut shape.layers, arguments.layers),
            (&mut shape.heads, arguments.heads),
            (&mut shape.kv_heads, arguments.kv_heads),
            (&mut shape.vocab_size, arguments.vocab_size),
        ];
        for (field, value) in overrides {
            *field = value.unwrap_or(*field);
            if *field == 0 {
                bail!("every size must be at least 1");
            }
        }
        if !shape.hidden_size.is_multiple_of(shape.heads) || !shape.heads.is_multiple_of(shape.kv_heads) {
            bail!("--hidden-size must be a multiple of --heads, and that one of --kv-heads");
        }
        Ok(shape)
    }

    /// Name in GGUF, name in safetensors, dimensions; matrices have two.
    fn tensors(&self) -> Vec<(String, String, Vec<usize>)> {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let head_dim = hidden / self.heads;
        let kv = self.kv_heads * head_dim;
        let mut tensors = Vec::new();
        let mut add = |gguf: String, hf: String, shape: Vec<usize>| tensors.push((gguf, hf, shape));
        add("token_embd.weight".into(), "model.embed_tokens.weight".into(), vec![self.vocab_size, hidden]);
        for i in 0..self.layers {
            let parts = [
                ("attn_norm.weight", "input_layernorm.weight", vec![hidden]),
                ("attn_q.weight", "self_attn.q_proj.weight", vec![hidden, hidden]),
                ("attn_k.weight", "self_attn.k_proj.weight", vec![kv, hidden]),
                ("attn_v.weight", "self_attn.v_proj.weight", vec![kv, hidden]),
                ("attn_output.weight", "self_attn.o_proj.weight", vec![hidden, hidden]),
                ("ffn_norm.weight", "post_attention_layernorm.weight", vec![hidden]),
                ("ffn_gate.weight", "mlp.gate_proj.weight", vec![inner, hidden]),
                ("ffn_up.weight", "mlp.up_proj.weight", vec![inner, hidden]),
                ("ffn_down.weight", "mlp.down_proj.weight", vec![hidden, inner]),
            ];
            let biases = [
                ("attn_q.bias", "self_attn.q_proj.bias", vec![hidden]),
                ("attn_k.bias", "self_attn.k_proj.bias", vec![kv]),
                ("attn_v.bias", "self_attn.v_proj.bias", vec![kv]),
            ];
            for (gguf, hf, shape) in parts.into_iter().chain(biases.into_iter().filter(|_| self.qkv_bias)) {
                add(format!("blk.{i}.{gguf}"), format!("model.layers.{i}.{hf}"), shape);
            }
        }
        add("output_norm.weight".into(), "model.norm.weight".into(), vec![hidden]);
        if !self.tied {
            add("output.weight".into(), "lm_head.weight".into(), vec![self.vocab_size, hidden]);
        }
        tensors
    }
}

/// How the matrices of a file are stored.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Storage {
    /// All in one type.
    Pure(WeightType),
    /// llama.cpp's mixtures Q4_K_M and Q5_K_M: this type, and Q6_K where more bits help most.
    Mixture(WeightType),
}

impl Storage {
    fn parse(name: &str) -> Result<Storage> {
        let wanted = name.to_ascii_uppercase();
        match wanted.as_str() {
            "Q4_K_M" => return Ok(Storage::Mixture(WeightType::Q4_K)),
            "Q5_K_M" => return Ok(Storage::Mixture(WeightType::Q5_K)),
            _ => {}
        }
        let Some(dtype) = WeightType::ALL.into_iter().find(|dtype| dtype.name() == wanted) else {
            let known: Vec<String> = WeightType::ALL.iter().map(|dtype| dtype.name().to_ascii_lowercase()).collect();
            bail!("--type {name}: one of {}, q4_k_m, q5_k_m", known.join(", "));
        };
        Ok(Storage::Pure(dtype))
    }

    /// The type of a tensor in GGUF.
    fn of(self, shape: &Shape, name: &str, dims: &[usize]) -> GgmlDType {
        let [_, columns] = *dims else { return GgmlDType::F32 };
        let head = name == "output.weight" || (shape.tied && name == "token_embd.weight");
        let wanted = match self {
            Storage::Pure(dtype) => dtype.ggml(),
            Storage::Mixture(_) if head || more_bits(name, shape.layers) => GgmlDType::Q6K,
            Storage::Mixture(base) => base.ggml(),
        };
        if columns.is_multiple_of(wanted.block_size()) {
            return wanted;
        }
        // Rows that are no whole number of blocks are stored in a type of smaller blocks, as llama.cpp does.
        let smaller = match wanted {
            GgmlDType::Q2K | GgmlDType::Q3K => GgmlDType::Q4_0,
            GgmlDType::Q4K => GgmlDType::Q5_0,
            GgmlDType::Q5K => GgmlDType::Q5_1,
            GgmlDType::Q6K => GgmlDType::Q8_0,
            _ => GgmlDType::F16,
        };
        if columns.is_multiple_of(smaller.block_size()) { smaller } else { GgmlDType::F16 }
    }

    /// What `general.file_type` says, as far as llama.cpp has a number for it.
    fn file_type(self) -> Option<u32> {
        let dtype = match self {
            Storage::Mixture(WeightType::Q4_K) => return Some(15),
            Storage::Mixture(_) => return Some(17),
            Storage::Pure(dtype) => dtype,
        };
        let number = match dtype.ggml() {
            GgmlDType::F32 => 0,
            GgmlDType::F16 => 1,
            GgmlDType::BF16 => 32,
            GgmlDType::Q4_0 => 2,
            GgmlDType::Q4_1 => 3,
            GgmlDType::Q8_0 => 7,
            GgmlDType::Q5_0 => 8,
            GgmlDType::Q5_1 => 9,
            GgmlDType::Q2K => 10,
            GgmlDType::Q3K => 11,
            GgmlDType::Q4K => 14,
            GgmlDType::Q5K => 16,
            GgmlDType::Q6K => 18,
            _ => return None,
        };
        Some(number)
    }
}

/// Whether a mixture stores this matrix in Q6_K: values and down projections of the first and last eighth of the layers,
/// and of every third between.
fn more_bits(name: &str, layers: usize) -> bool {
    let mut parts = name.split('.');
    let (Some("blk"), Some(layer), Some("attn_v" | "ffn_down")) = (parts.next(), parts.next(), parts.next()) else {
        return false;
    };
    let Ok(layer) = layer.parse::<usize>() else { return false };
    let (first, last) = (layers / 8, 7 * layers / 8);
    layer < first || layer >= last || (layer - first) % 3 == 2
}

/// Values of one tensor. Matrices are uniform with the spread that keeps activations of one size from layer to layer,
/// norms are near 1. Each row has its own generator, so the values do not depend on the number of threads.
fn values(seed: u64, tensor: usize, name: &str, shape: &[usize]) -> Vec<f32> {
    let columns = shape[shape.len() - 1];
    let (centre, spread) = match (shape.len(), name.ends_with("bias")) {
        (1, false) => (1.0, 0.1),
        (1, true) => (0.0, 0.1),
        _ => (0.0, (3.0 / columns as f32).sqrt()),
    };
    let mut values = vec![0f32; shape.iter().product()];
    values.par_chunks_mut(columns).enumerate().for_each(|(row, out)| {
        let mut rng =
            ChaCha8Rng::seed_from_u64(seed ^ ((tensor as u64) << 32 | row as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        for value in out {
            let unit = (rng.next_u32() >> 8) as f32 / (1 << 23) as f32 - 1.0;
            *value = centre + spread * unit;
        }
    });
    values
}

fn main() -> ExitCode {
    output::exit(run())
}

fn run() -> Result<()> {
    let arguments = Arguments::parse();
    let shape = Shape::new(&arguments)?;
    let storage = Storage::parse(&arguments.dtype)?;
    let is_gguf = arguments.out.extension().is_some_and(|extension| extension == "gguf");
    match storage {
        _ if is_gguf => write_gguf(&arguments, &shape, storage),
        Storage::Pure(dtype) if dtype.is_dense() => write_safetensors(&arguments, &shape, dtype),
        _ => bail!("--type {} needs an --out that ends in .gguf", arguments.dtype),
    }
    .with_context(|| format!("writing {}", arguments.out.display()))?;
    output::note_line(format_args!("wrote {}", arguments.out.display()));
    Ok(())
}

/// What the files say of themselves near their beginning, so that they are told from models that somebody trained.
const DESCRIPTION: &str = "random weights";

/// A file of a model, if nothing else stands in its place.
fn output(path: &Path) -> Result<OutputFile> {
    let known = |head: &[u8]| head.windows(DESCRIPTION.len()).any(|bytes| bytes == DESCRIPTION.as_bytes());
    OutputFile::new("--out", path, known)
}

fn write_gguf(arguments: &Arguments, shape: &Shape, storage: Storage) -> Result<()> {
    let file = output(&arguments.out)?;
    let tensors = shape.tensors();
    let stored: Vec<(String, QTensor)> = tensors
        .into_par_iter()
        .enumerate()
        .map(|(index, (gguf, _, dims))| {
            let stored_type = storage.of(shape, &gguf, &dims);
            let tensor = Tensor::from_vec(values(arguments.seed, index, &gguf, &dims), dims, &Device::Cpu)?;
            Ok((gguf, QTensor::quantize(&tensor, stored_type)?))
        })
        .collect::<Result<_>>()?;
    let architecture = shape.architecture;
    let key = |name: &str| format!("{architecture}.{name}");
    let number = |value: usize| Value::U32(value as u32);
    let mut metadata = vec![
        ("general.architecture".to_string(), Value::String(architecture.into())),
        ("general.name".into(), Value::String(DESCRIPTION.into())),
        (key("block_count"), number(shape.layers)),
        (key("context_length"), number(shape.context)),
        (key("embedding_length"), number(shape.hidden_size)),
        (key("feed_forward_length"), number(shape.intermediate_size)),
        (key("attention.head_count"), number(shape.heads)),
        (key("attention.head_count_kv"), number(shape.kv_heads)),
        (key("attention.layer_norm_rms_epsilon"), Value::F32(shape.eps as f32)),
        (key("rope.freq_base"), Value::F32(shape.rope_theta as f32)),
        (key("rope.dimension_count"), number(shape.hidden_size / shape.heads)),
        (key("vocab_size"), number(shape.vocab_size)),
        ("tokenizer.ggml.model".into(), Value::String("none".into())),
        ("general.quantization_version".into(), number(2)),
    ];
    metadata.extend(storage.file_type().map(|number| ("general.file_type".into(), Value::U32(number))));
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let stored: Vec<(&str, &QTensor)> = stored.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let mut file = BufWriter::with_capacity(1 << 20, file.begin()?);
    gguf_file::write(&mut file, &metadata, &stored)?;
    Ok(file.flush()?)
}

fn write_safetensors(arguments: &Arguments, shape: &Shape, dtype: WeightType) -> Result<()> {
    std::fs::create_dir_all(&arguments.out)?;
    let (config_file, weights) =
        (output(&arguments.out.join("config.json"))?, output(&arguments.out.join("model.safetensors"))?);
    let config = serde_json::json!({
        "_name_or_path": DESCRIPTION,
        "architectures": [if shape.qkv_bias { "Qwen2ForCausalLM" } else { "LlamaForCausalLM" }],
        "model_type": shape.architecture,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.context,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": shape.eps,
        "tie_word_embeddings": shape.tied,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": match dtype { WeightType::F32 => "float32", WeightType::F16 => "float16", _ => "bfloat16" },
    });
    config_file.write(serde_json::to_string_pretty(&config)?.as_bytes())?;
    write_safetensors_file(&weights, arguments.seed, &shape.tensors(), dtype)
}

/// Tensor by tensor, so that no more than one is in memory.
fn write_safetensors_file(
    file: &OutputFile,
    seed: u64,
    tensors: &[(String, String, Vec<usize>)],
    dtype: WeightType,
) -> Result<()> {
    let mut header = BTreeMap::from([("__metadata__", serde_json::json!({ "description": DESCRIPTION }))]);
    let mut offset = 0;
    for (_, name, shape) in tensors {
        let bytes = shape.iter().product::<usize>() * dtype.type_size();
        let entry =
            serde_json::json!({ "dtype": dtype.name(), "shape": shape, "data_offsets": [offset, offset + bytes] });
        header.insert(name.as_str(), entry);
        offset += bytes;
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = BufWriter::with_capacity(1 << 20, file.begin()?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    for (index, (gguf, _, shape)) in tensors.iter().enumerate() {
        let values = values(seed, index, gguf, shape);
        let bytes: Vec<u8> = match dtype {
            WeightType::F32 => values.par_iter().flat_map_iter(|v| v.to_le_bytes()).collect(),
            WeightType::F16 => values.par_iter().flat_map_iter(|&v| half::f16::from_f32(v).to_le_bytes()).collect(),
            _ => values.par_iter().flat_map_iter(|&v| half::bf16::from_f32(v).to_le_bytes()).collect(),
        };
        file.write_all(&bytes)?;
    }
    Ok(file.flush()?)
}
