//! Every type of weights, through a whole model: the demo model is stored in each type, and its logits compared with
//! those of the same rounded values stored in F32. What is left is the rounding of activations.

mod common;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use candle_core::Device;
use candle_core::quantized::gguf_file::{self, Content, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_pipeline::weights::WeightType;
use candle_pipeline::{DEMO_MODEL, DeviceSpec, HeterogeneousPipeline, HeterogeneousPipelineExecutor, PipelineOptions};
use common::{executor, greedy};

/// Metadata and f32 values of the demo model in GGUF.
fn demo() -> (Vec<(String, Value)>, BTreeMap<String, candle_core::Tensor>) {
    let mut file = File::open(format!("{DEMO_MODEL}/demo-q8_0.gguf")).unwrap();
    let content = Content::read(&mut file).unwrap();
    let names: Vec<String> = content.tensor_infos.keys().cloned().collect();
    let tensors = names.into_iter().map(|name| {
        let tensor = content.tensor(&mut file, &name, &Device::Cpu).unwrap();
        (name, tensor.dequantize(&Device::Cpu).unwrap())
    });
    let tensors = tensors.collect();
    (content.metadata.into_iter().collect(), tensors)
}

fn write(path: &Path, metadata: &[(String, Value)], tensors: &BTreeMap<String, QTensor>) {
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    gguf_file::write(&mut File::create(path).unwrap(), &metadata, &tensors).unwrap();
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| *a as f64 * *b as f64).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// Logits after a prompt that is dotted row by row and after one that is long enough to be computed in tiles.
async fn logits(executor: &HeterogeneousPipelineExecutor) -> Vec<Vec<f32>> {
    let mut all = Vec::new();
    for length in [5, 40] {
        let prompt: Vec<u32> = (0..length).map(|i| 3 + i * 17 % 700).collect();
        all.push(executor.infer_with(&prompt, &greedy(2)).await.unwrap().prompt_logits.unwrap());
    }
    all
}

#[tokio::test]
async fn every_type_computes_what_its_rounded_values_say() {
    let (metadata, values) = demo();
    let folder = tempfile::tempdir().unwrap();
    for dtype in WeightType::ALL {
        let mut stored = BTreeMap::new();
        let mut rounded = BTreeMap::new();
        for (name, tensor) in &values {
            let kind = if tensor.rank() == 1 { GgmlDType::F32 } else { dtype.ggml() };
            let quantised = QTensor::quantize(tensor, kind).unwrap();
            let wide = quantised.dequantize(&Device::Cpu).unwrap();
            rounded.insert(name.clone(), QTensor::quantize(&wide, GgmlDType::F32).unwrap());
            stored.insert(name.clone(), quantised);
        }
        let (small, wide) = (folder.path().join("small.gguf"), folder.path().join("wide.gguf"));
        write(&small, &metadata, &stored);
        write(&wide, &metadata, &rounded);
        let small = executor(small.to_str().unwrap(), "cpu,cpu", Some(&[3, 5])).await.unwrap();
        let wide = executor(wide.to_str().unwrap(), "cpu", None).await.unwrap();
        for (found, wanted) in logits(&small).await.iter().zip(logits(&wide).await) {
            let cosine = cosine(found, &wanted);
            // Inputs are F32 with F32 and F16, rounded to BF16 with that, and of 8 bits with the others.
            let least = match dtype {
                WeightType::F32 | WeightType::F16 => 0.999_999,
                WeightType::BF16 => 0.999_9,
                _ => 0.998,
            };
            assert!(cosine > least, "{dtype}: cosine {cosine}");
        }
    }
}

#[tokio::test]
async fn dense_weights_can_be_held_in_another_dense_type() {
    let plain = executor(DEMO_MODEL, "cpu", None).await.unwrap();
    let wanted = logits(&plain).await;
    let bytes = |executor: &HeterogeneousPipelineExecutor| executor.memory()[0].weights;
    for (dtype, size) in [(WeightType::F32, 2.0), (WeightType::F16, 1.0), (WeightType::BF16, 1.0)] {
        let options = PipelineOptions { dtype: Some(dtype), ..PipelineOptions::default() };
        let pipeline = HeterogeneousPipeline::with_options(&[DeviceSpec::CPU], DEMO_MODEL, options).unwrap();
        let converted = HeterogeneousPipelineExecutor::new(pipeline, DEMO_MODEL).await.unwrap();
        let ratio = bytes(&converted) as f64 / bytes(&plain) as f64;
        assert!((ratio - size).abs() < 0.05, "{dtype}: {ratio} times the bytes");
        for (found, wanted) in logits(&converted).await.iter().zip(&wanted) {
            let cosine = cosine(found, wanted);
            assert!(cosine > if dtype == WeightType::BF16 { 0.999 } else { 0.999_999 }, "{dtype}: {cosine}");
        }
    }
    let options = PipelineOptions { dtype: Some(WeightType::Q8_0), ..PipelineOptions::default() };
    let error = HeterogeneousPipeline::with_options(&[DeviceSpec::CPU], DEMO_MODEL, options).unwrap_err().to_string();
    assert!(error.contains("`dtype`") && error.contains("Q8_0"), "{error}");
}
