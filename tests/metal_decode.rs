//! The Metal path on a machine without Metal: metal-ext's fused decode step, its kernels run on the CPU, against the CPU
//! backend, token by token. What is different on a GPU is its compiler and its rounding; grids, offsets, weights and the
//! order of everything are the same.
#![cfg(not(target_os = "macos"))]
#![allow(clippy::print_stdout)] // shown with --nocapture

mod common;

use std::cell::Cell;
use std::sync::Arc;

use candle_core::quantized::GgmlDType;
use candle_pipeline::backend::fused::{self, FusedBuffers};
use candle_pipeline::backend::{SequenceId, StageSource};
use candle_pipeline::model::config::DecoderConfig;
use candle_pipeline::model::rope::Ropes;
use candle_pipeline::model::stage_weights::{Build, StageWeights};
use candle_pipeline::weights::{MappedTensor, TensorBytes, WeightSource, WeightType};
use candle_pipeline::{DeviceSpec, Result};
use common::stages::{Widened, best, largest_difference, most_likely, source_of, step, write_demo};
use metal_ext::decode::{self, Candidates, KvCache, Row, Scratch};
use metal_ext::dequantise::LookUp;
use metal_ext::gemv::PackedMatrix;
use metal_ext::pack::MatrixLayout;
use metal_ext::window::{BufferRules, Window};
use metal_ext::{MetalExtOptions, Region};
use msl_cpu::{Check, CpuBuffer, CpuEncoder};

const CPU: DeviceSpec = DeviceSpec::Cpu { threads: Some(1) };

/// Makes matrices for the CPU encoder: packed copies, or the pages of the file around them.
#[derive(Default)]
struct CpuBuffers {
    /// Bytes of a page; `None` copies everything.
    page: Option<usize>,
    /// Matrices that were not copied.
    mapped: Cell<usize>,
}

impl Build for CpuBuffers {
    type Matrix = decode::FusedMatrix<CpuBuffer>;
    type Vector = Vec<f32>;

    const READS_IN_PLACE: bool = true;

    fn matrix(&self, dtype: WeightType, bytes: &TensorBytes<'_>, n: usize, k: usize) -> Result<Option<Self::Matrix>> {
        let Some(format) = dtype.packed_format() else { return Ok(None) };
        let layout = MatrixLayout::new(format, n, k).unwrap();
        let mut packed = vec![0; layout.bytes];
        layout.pack(&bytes.read()?, &mut packed).unwrap();
        Ok(Some(decode::FusedMatrix { layout, buffer: CpuBuffer::from_bytes(&packed), offset: 0 }))
    }

    /// What a GPU would see of the pages, with zeros behind the file's end.
    fn mapped_matrix(
        &self,
        dtype: WeightType,
        stored: &MappedTensor,
        n: usize,
        k: usize,
    ) -> Result<Option<Self::Matrix>> {
        let (Some(page), Some(format)) = (self.page, dtype.packed_format()) else { return Ok(None) };
        let layout = MatrixLayout::new(format, n, k).unwrap();
        let MappedTensor { file, range } = stored;
        let rules = BufferRules { page, longest: 1 << 30 };
        let window = Window::around(&layout, range.clone(), file.as_ptr().addr(), file.len(), rules);
        let Ok(Window { start, len, offset }) = window else { return Ok(None) };
        self.mapped.set(self.mapped.get() + 1);
        let mut pages = file[start..file.len().min(start + len)].to_vec();
        pages.resize(len, 0);
        Ok(Some(decode::FusedMatrix { layout, buffer: CpuBuffer::from_bytes(&pages), offset }))
    }

    fn vector(&self, values: Vec<f32>) -> Result<Vec<f32>> {
        Ok(values)
    }

    fn matrix_bytes(matrix: &Self::Matrix) -> u64 {
        matrix.layout.bytes as u64
    }

    fn vector_bytes(vector: &Vec<f32>) -> u64 {
        vector.len() as u64 * 4
    }
}

impl FusedBuffers<CpuBuffers> for CpuBuffers {
    type Buffer = CpuBuffer;

    fn matrix(&self, matrix: &decode::FusedMatrix<CpuBuffer>) -> metal_ext::Result<decode::FusedMatrix<CpuBuffer>> {
        Ok(matrix.clone())
    }

    fn floats(&self, vectors: &[&Vec<f32>]) -> metal_ext::Result<CpuBuffer> {
        let values: Vec<f32> = vectors.iter().copied().flatten().copied().collect();
        Ok(CpuBuffer::from_floats(&values))
    }
}

/// A whole model as the fused step sees it, over the CPU encoder's buffers.
struct FusedModel {
    config: Arc<DecoderConfig>,
    ropes: Ropes,
    embeddings: decode::FusedMatrix<CpuBuffer>,
    stage: decode::FusedStage<CpuBuffer>,
    scratch: Scratch<CpuBuffer>,
    candidates: Candidates<CpuBuffer>,
}

impl FusedModel {
    fn load(source: &dyn WeightSource, config: &Arc<DecoderConfig>, rows: usize) -> FusedModel {
        FusedModel::load_with(source, config, rows, &CpuBuffers::default())
    }

    fn load_with(
        source: &dyn WeightSource,
        config: &Arc<DecoderConfig>,
        rows: usize,
        buffers: &CpuBuffers,
    ) -> FusedModel {
        let layers = 0..config.num_hidden_layers;
        let weights = StageWeights::load(source, config, layers, None, buffers, &|_| {}).unwrap();
        let stage = fused::stage(config, 0, &weights, buffers).unwrap();
        let bytes = stage.scratch_bytes(rows);
        let scratch = Scratch {
            qkv: CpuBuffer::new(bytes.qkv),
            mixed: CpuBuffer::new(bytes.mixed),
            gated: CpuBuffer::new(bytes.gated),
            branch: CpuBuffer::new(bytes.branch),
            partials: CpuBuffer::new(bytes.partials),
            logits: CpuBuffer::new(bytes.logits),
        };
        let embeddings = weights.embeddings.as_deref().unwrap().clone();
        let ropes = Ropes::new(config, &candle_core::Device::Cpu);
        let bytes = Candidates::<CpuBuffer>::bytes(config.vocab_size);
        let candidates = Candidates { found: CpuBuffer::new(bytes.found), scratch: CpuBuffer::new(bytes.scratch) };
        FusedModel { config: config.clone(), ropes, embeddings, stage, scratch, candidates }
    }

    fn new_kv(&self, capacity: usize) -> Vec<KvCache<CpuBuffer>> {
        let bytes = self.config.num_key_value_heads * capacity * self.config.head_dim * 2;
        let layers = self.stage.layers.iter();
        layers.map(|_| KvCache { keys: CpuBuffer::new(bytes), values: CpuBuffer::new(bytes), capacity }).collect()
    }

    /// One row of each sequence; returns the logits of each, in which the most likely tokens stand that are found behind
    /// them.
    fn step(&self, check: Check, rows: &[(u32, usize, &[KvCache<CpuBuffer>])]) -> Vec<Vec<f32>> {
        let hidden = self.config.hidden_size;
        let mut encoder = CpuEncoder::new(check);
        let x = CpuBuffer::new(rows.len() * decode::stride(hidden) * 4);
        let tokens: Vec<u32> = rows.iter().map(|(token, ..)| *token).collect();
        LookUp {
            table: PackedMatrix {
                layout: self.embeddings.layout,
                buffer: &self.embeddings.buffer,
                offset: self.embeddings.offset,
            },
            tokens: &tokens,
            multiplier: self.config.embedding_multiplier as f32,
            out: Region::at(&x, 0),
        }
        .encode(&mut encoder)
        .unwrap();
        let half = self.ropes.global.rotary_dim() / 2;
        let angles: Vec<[CpuBuffer; 2]> = rows
            .iter()
            .map(|(_, position, _)| {
                let (mut cos, mut sin) = (vec![0.0; half], vec![0.0; half]);
                self.ropes.global.copy_rows(*position, position + 1, &mut cos, &mut sin).unwrap();
                [CpuBuffer::from_floats(&cos), CpuBuffer::from_floats(&sin)]
            })
            .collect();
        let places: Vec<Row<CpuBuffer>> = rows
            .iter()
            .zip(&angles)
            .map(|((_, position, kv), angles)| Row {
                position: *position,
                kv,
                global_angles: angles.each_ref().map(|buffer| Region::at(buffer, 0)),
                local_angles: None,
            })
            .collect();
        let wanted: Vec<usize> = (0..rows.len()).collect();
        let options = MetalExtOptions::default();
        self.stage.encode(&mut encoder, &x, &places, &wanted, &self.scratch, &options).unwrap();
        let vocab = self.config.vocab_size;
        const K: usize = 3;
        assert!(fused::logits_are_the_product(&self.config));
        self.candidates.encode(&mut encoder, &self.scratch.logits, vocab, &wanted, K).unwrap();
        let words: Vec<u32> = self.candidates.found.floats().iter().map(|value| value.to_bits()).collect();
        let found = decode::read_candidates(&words[..decode::found_words(rows.len(), K)], rows.len(), K);
        let logits = self.scratch.logits.floats();
        let logits = logits.chunks(decode::stride(vocab)).take(rows.len());
        let logits: Vec<Vec<f32>> =
            logits.map(|row| fused::finish_logits(&self.config, row[..vocab].to_vec())).collect();
        for (found, logits) in found.iter().zip(&logits) {
            assert_eq!(found.as_ref(), Some(&most_likely(logits, K)));
        }
        logits
    }
}

/// Generates a story with both until the end token, and follows it with the CPU backend on the file as it is. No logit
/// differs from the widened model's by more than `tolerance`, nor from the CPU backend's own by more than `rounding`.
fn same_story(file: &str, tolerance: f32, rounding: f32) {
    let source = source_of(CPU, file);
    let fused = FusedModel::load(&*source.weights, &source.config, 1);
    let widened = StageSource { weights: Arc::new(Widened::new(source.weights.clone())), ..source.clone() };
    let (mut exact, mut rounded) = (widened.load(&|_| {}).unwrap(), source.load(&|_| {}).unwrap());
    let capacity = source.config.max_position_embeddings;
    let kv = fused.new_kv(capacity);
    let id = SequenceId(1);
    exact.open(id, capacity).unwrap();
    rounded.open(id, capacity).unwrap();
    let (mut token, mut story) = (0, Vec::new());
    let (mut off, mut off_rounded, mut ties) = (0f32, 0f32, 0);
    for position in 0..capacity {
        let got = fused.step(Check::Fast, &[(token, position, &kv)]).remove(0);
        let want = step(&mut *exact, id, token, position);
        off = off.max(largest_difference(&got, &want));
        assert!(off <= tolerance, "{file}, position {position}: logits differ by {off}");
        let cpu = step(&mut *rounded, id, token, position);
        let here = largest_difference(&got, &cpu);
        off_rounded = off_rounded.max(here);
        assert!(off_rounded <= rounding, "{file}, position {position}: logits differ by {off_rounded} from the CPU's");
        token = best(&got);
        assert_eq!(token, best(&want), "{file}, position {position}, after {story:?}");
        let other = best(&cpu);
        if token != other {
            // Only where both tokens are as likely as the rounding can tell.
            let margin = got[token as usize] - got[other as usize];
            assert!(margin <= 2.0 * here, "{file}, position {position}: {token} leads {other} by {margin}");
            ties += 1;
        }
        if source.config.eos_token_ids.contains(&token) {
            break;
        }
        story.push(token);
    }
    println!(
        "{file}: {} tokens; logits are within {off} of the widened model's and {off_rounded} of the CPU's, which would \
         have taken another token {ties} times",
        story.len()
    );
    assert!(story.len() > 100, "that is no story: {story:?}");
}

// The CPU backend multiplies F16 weights with unrounded inputs, as the kernels do: it tells the very same story.
#[test]
fn the_f16_model_tells_the_same_story() {
    same_story("", 0.01, 0.01); // the folder itself: model.safetensors
}

// Where weights are quantised it rounds inputs to 8 bits, and the kernels do not. Its logits differ by that, and once in
// a while it takes the other of two tokens that are equally likely.
#[test]
fn the_q8_0_model_tells_the_same_story() {
    same_story("demo-q8_0.gguf", 0.01, 0.5);
}

#[test]
fn the_q4_0_model_tells_the_same_story() {
    same_story("demo-q4_0.gguf", 0.01, 0.5);
}

#[test]
fn sequences_of_one_step_are_what_they_are_alone() {
    let source = source_of(CPU, "");
    let fused = FusedModel::load(&*source.weights, &source.config, 3);
    let prompts: [&[u32]; 3] = [&[0, 300, 17], &[0, 41], &[0, 500, 600, 2]];
    let alone: Vec<Vec<f32>> = prompts
        .iter()
        .map(|prompt| {
            let kv = fused.new_kv(16);
            let steps = prompt.iter().enumerate();
            steps.map(|(at, token)| fused.step(Check::Fast, &[(*token, at, &kv)]).remove(0)).last().unwrap()
        })
        .collect();
    // The last token of each in one step.
    let kvs: Vec<_> = prompts.iter().map(|_| fused.new_kv(16)).collect();
    for (prompt, kv) in prompts.iter().zip(&kvs) {
        for (at, token) in prompt[..prompt.len() - 1].iter().enumerate() {
            fused.step(Check::Fast, &[(*token, at, kv)]);
        }
    }
    let rows: Vec<(u32, usize, &[KvCache<CpuBuffer>])> = prompts
        .iter()
        .zip(&kvs)
        .map(|(prompt, kv)| (prompt[prompt.len() - 1], prompt.len() - 1, kv.as_slice()))
        .collect();
    let together = fused.step(Check::Fast, &rows);
    for (alone, together) in alone.iter().zip(&together) {
        assert!(largest_difference(alone, together) <= 1e-4);
    }
}

/// Caches of the whole stage whose every half is between 1/4 and 1/2, or minus that.
fn filled(fused: &FusedModel, capacity: usize) -> Vec<KvCache<CpuBuffer>> {
    let kv = fused.new_kv(capacity);
    for (seed, buffer) in kv.iter().flat_map(|cache| [&cache.keys, &cache.values]).enumerate() {
        let half = |at: usize| 0x3400 | ((at + seed).wrapping_mul(40_503) >> 3) as u16 & 0x83ff;
        let bytes: Vec<u8> = (0..buffer.len() / 2).flat_map(|at| half(at).to_le_bytes()).collect();
        buffer.write(0, &bytes);
    }
    kv
}

#[test]
fn a_long_sequence_and_a_short_one_are_what_they_are_alone() {
    let source = source_of(CPU, "");
    let mut fused = FusedModel::load(&*source.weights, &source.config, 2);
    fused.stage.layers.truncate(2);
    // The model's last position is the first at which threadgroups share the keys: one dispatch for each sequence, then one
    // that puts the parts of both together.
    let places = [(7, 511), (9, 3)];
    let kvs = places.map(|_| filled(&fused, 512));
    let rows = [0, 1].map(|row| (places[row].0, places[row].1, kvs[row].as_slice()));
    let together = fused.step(Check::Accesses, &rows);
    for ((token, position), together) in places.into_iter().zip(together) {
        let kv = filled(&fused, 512);
        let alone = fused.step(Check::Accesses, &[(token, position, &kv)]).remove(0);
        let off = largest_difference(&alone, &together);
        assert!(off <= 1e-4, "at position {position} logits differ by {off}");
    }
}

#[test]
fn a_step_passes_every_check() {
    let source = source_of(CPU, "");
    let mut fused = FusedModel::load(&*source.weights, &source.config, 2);
    // One layer is enough: all are encoded alike.
    fused.stage.layers.truncate(1);
    let kvs = [fused.new_kv(3), fused.new_kv(5)];
    for position in 0..3 {
        let rows = [(7, position, kvs[0].as_slice()), (9, position, kvs[1].as_slice())];
        fused.step(Check::AllOrders, &rows);
    }
}

#[test]
fn mapped_bytes_are_those_of_the_tensor_and_outlive_their_source() {
    for file in ["", "demo-q8_0.gguf"] {
        let source = source_of(CPU, file);
        let mapped: Vec<(Vec<u8>, MappedTensor)> = source
            .weights
            .names()
            .iter()
            .map(|name| {
                let bytes = source.weights.tensor(name).unwrap().bytes.read().unwrap().into_owned();
                (bytes, source.weights.mapped(name).unwrap().unwrap())
            })
            .collect();
        assert!(source.weights.mapped("layers.99.q_proj.weight").unwrap().is_none());
        drop(source);
        assert!(mapped.len() > 8 * 9, "{file}: {} tensors", mapped.len());
        assert!(mapped.iter().all(|(bytes, MappedTensor { file, range })| file[range.clone()] == bytes[..]), "{file}");
    }
}

#[test]
fn weights_read_from_the_pages_of_the_file_are_those_that_are_copied() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("demo.gguf");
    // Every matrix of the model, the embeddings that the head is tied to once. What kernels read in another order than
    // the file's is copied all the same.
    for (dtype, expected) in [(GgmlDType::F16, 8 * 7 + 1), (GgmlDType::Q4K, 8 * 7 + 1), (GgmlDType::Q8_0, 0)] {
        write_demo(dtype, &path);
        let source = source_of(CPU, path.to_str().unwrap());
        let copied = FusedModel::load(&*source.weights, &source.config, 1);
        let buffers = CpuBuffers { page: Some(4 << 10), ..CpuBuffers::default() };
        let mapped = FusedModel::load_with(&*source.weights, &source.config, 1, &buffers);
        assert_eq!(buffers.mapped.get(), expected, "{dtype:?}");
        let (kv, kv_mapped) = (copied.new_kv(4), mapped.new_kv(4));
        for (position, token) in [0, 431, 432, 260].into_iter().enumerate() {
            let want = copied.step(Check::Fast, &[(token, position, &kv)]);
            let got = mapped.step(Check::Fast, &[(token, position, &kv_mapped)]);
            assert!(got[0].iter().zip(&want[0]).all(|(a, b)| a.to_bits() == b.to_bits()), "{dtype:?} at {position}");
        }
    }
}
