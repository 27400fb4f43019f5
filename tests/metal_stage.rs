//! A Metal stage on a real GPU against the CPU backend: the fused path, candle's, and the change from one to the other;
//! weights in the mapped file, tokens found on the GPU, and two stages on one.
#![cfg(all(feature = "metal", target_os = "macos"))]

mod common;

use std::sync::Arc;

use candle_core::quantized::GgmlDType;
use candle_pipeline::backend::{
    MicroBatch, Prediction, SequenceId, SequenceSlice, StageBackend, StageOptions, StageOutput, StageSource, Wanted,
};
use candle_pipeline::instrument::Watch;
use candle_pipeline::{DEMO_MODEL, DeviceSpec, MetalExtOptions};
use common::stages::{Widened, best, largest_difference, most_likely, source_of, step, write_demo};
use common::{executor, greedy};

const CPU: DeviceSpec = DeviceSpec::Cpu { threads: Some(1) };
const GPU: DeviceSpec = DeviceSpec::Metal(0);

/// The whole demo model on the GPU, decoding with the fused kernels or with candle's.
fn on_gpu(file: &str, fused: bool) -> Box<dyn StageBackend> {
    let source = source_of(GPU, file);
    let metal = MetalExtOptions { fused, ..source.options.metal };
    StageSource { options: StageOptions { metal, ..source.options }, ..source }.load(&|_| {}).unwrap()
}

/// The same on the CPU, with inputs that are not rounded.
fn on_cpu(file: &str) -> Box<dyn StageBackend> {
    let source = source_of(CPU, file);
    StageSource { weights: Arc::new(Widened::new(source.weights.clone())), ..source }.load(&|_| {}).unwrap()
}

fn prefill(backend: &mut dyn StageBackend, id: SequenceId, tokens: &[u32]) -> Vec<f32> {
    let len = tokens.len();
    let slice = SequenceSlice { id, position: 0, len, length: len, decode: false, wanted: Wanted::Logits { rows: 1 } };
    match backend
        .forward(&MicroBatch { slices: vec![slice], tokens: tokens.to_vec() }, None, &mut Watch::off())
        .unwrap()
    {
        StageOutput::Logits(mut logits) => logits.remove(0),
        _ => unreachable!("a whole model returns logits"),
    }
}

#[test]
fn both_paths_agree_with_the_cpu_for_a_whole_story() {
    let folder = tempfile::tempdir().unwrap();
    let made = |name: &str, dtype| {
        let path = folder.path().join(name);
        write_demo(dtype, &path);
        path.to_str().unwrap().to_string()
    };
    // Of these two the GPU reads the mapped file.
    let mapped = [made("f16.gguf", GgmlDType::F16), made("q4_k.gguf", GgmlDType::Q4K)];
    for file in ["", "demo-q8_0.gguf", "demo-q4_0.gguf", &mapped[0], &mapped[1]] {
        for fused in [true, false] {
            let (mut gpu, mut cpu) = (on_gpu(file, fused), on_cpu(file));
            let id = SequenceId(1);
            gpu.open(id, 300).unwrap();
            cpu.open(id, 300).unwrap();
            // A prompt long enough for a matrix-matrix product, then decode steps.
            let prompt: Vec<u32> = [0, 431, 432, 260, 375, 13, 344, 283, 260, 729].to_vec();
            let (mut got, mut want) = (prefill(&mut *gpu, id, &prompt), prefill(&mut *cpu, id, &prompt));
            for position in prompt.len()..200 {
                let off = largest_difference(&got, &want);
                assert!(off <= 0.1, "{file}, fused {fused}, position {position}: logits differ by {off}");
                let token = best(&want);
                (got, want) = (step(&mut *gpu, id, token, position), step(&mut *cpu, id, token, position));
            }
        }
    }
}

#[test]
fn sequences_of_one_step_are_what_they_are_alone() {
    let mut gpu = on_gpu("demo-q8_0.gguf", true);
    let rows: Vec<(SequenceId, u32)> = (0..8).map(|id| (SequenceId(id), 300 + id as u32)).collect();
    for (id, _) in &rows {
        gpu.open(*id, 8).unwrap();
        step(&mut *gpu, *id, 0, 0);
    }
    let slice =
        |id| SequenceSlice { id, position: 1, len: 1, length: 2, decode: true, wanted: Wanted::Logits { rows: 1 } };
    let batch = MicroBatch {
        slices: rows.iter().map(|(id, _)| slice(*id)).collect(),
        tokens: rows.iter().map(|(_, token)| *token).collect(),
    };
    let StageOutput::Logits(together) = gpu.forward(&batch, None, &mut Watch::off()).unwrap() else {
        unreachable!("a whole model returns logits")
    };
    for ((id, token), together) in rows.iter().zip(&together) {
        // The same position again: the step overwrites what it appended.
        let alone = step(&mut *gpu, *id, *token, 1);
        assert!(largest_difference(&alone, together) <= 1e-3);
    }
}

#[test]
fn tokens_found_on_the_gpu_are_the_most_likely_of_its_logits() {
    let mut gpu = on_gpu("demo-q8_0.gguf", true);
    let rows: Vec<(SequenceId, u32)> = (0..4).map(|id| (SequenceId(id), 300 + id as u32)).collect();
    for (id, _) in &rows {
        gpu.open(*id, 8).unwrap();
        step(&mut *gpu, *id, 0, 0);
    }
    let wanted = [
        Wanted::Best { rows: 1, k: 1 },
        Wanted::Logits { rows: 1 },
        Wanted::Best { rows: 1, k: 5 },
        Wanted::Best { rows: 1, k: 2 },
    ];
    let slice = |id, wanted| SequenceSlice { id, position: 1, len: 1, length: 2, decode: true, wanted };
    let batch = MicroBatch {
        slices: rows.iter().zip(wanted).map(|((id, _), wanted)| slice(*id, wanted)).collect(),
        tokens: rows.iter().map(|(_, token)| *token).collect(),
    };
    let StageOutput::Predictions(found) = gpu.forward(&batch, None, &mut Watch::off()).unwrap() else {
        unreachable!("some wanted the most likely tokens")
    };
    // The same step again, which overwrites what it appended, for its logits.
    let all = batch.slices.iter().map(|slice| SequenceSlice { wanted: Wanted::Logits { rows: 1 }, ..*slice }).collect();
    let all = MicroBatch { slices: all, tokens: batch.tokens.clone() };
    let StageOutput::Logits(logits) = gpu.forward(&all, None, &mut Watch::off()).unwrap() else {
        unreachable!("all wanted logits")
    };
    for ((found, logits), wanted) in found.into_iter().zip(logits).zip(wanted) {
        let expected = match wanted {
            Wanted::Best { rows: 1, k } => Prediction::Best(most_likely(&logits, k)),
            _ => Prediction::Logits(logits),
        };
        assert_eq!(found, expected);
    }
}

#[tokio::test]
async fn two_stages_on_one_gpu_generate_what_one_does() {
    let one = executor(DEMO_MODEL, "metal:0", None).await.unwrap();
    let two = executor(DEMO_MODEL, "metal:0,metal:0", Some(&[4, 4])).await.unwrap();
    let prompts: Vec<Vec<u32>> = (0..6).map(|seed| (0..9).map(|i| 4 + (seed * 97 + i * 13) % 700).collect()).collect();
    let one = one.infer_batch_with(&prompts, &greedy(64)).await.unwrap();
    let two = two.infer_batch_with(&prompts, &greedy(64)).await.unwrap();
    for (one, two) in one.iter().zip(&two) {
        assert_eq!(one.tokens, two.tokens);
    }
}
