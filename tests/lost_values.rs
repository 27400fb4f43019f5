//! A weight that is infinite or NaN ends a request with an error, wherever it lies and however tokens are chosen.

mod common;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Content, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use candle_pipeline::{
    DEMO_MODEL, DeviceSpec, Error, ExecutorOptions, GenerationOptions, HeterogeneousPipeline,
    HeterogeneousPipelineExecutor, KvType, PipelineOptions, Split,
};

/// Metadata and f32 values of the demo model in GGUF.
struct Demo {
    metadata: Vec<(String, Value)>,
    tensors: BTreeMap<String, Tensor>,
}

impl Demo {
    fn read() -> Demo {
        let mut file = File::open(format!("{DEMO_MODEL}/demo-q8_0.gguf")).unwrap();
        let content = Content::read(&mut file).unwrap();
        let names: Vec<String> = content.tensor_infos.keys().cloned().collect();
        let tensors = names.into_iter().map(|name| {
            let tensor = content.tensor(&mut file, &name, &Device::Cpu).unwrap();
            (name, tensor.dequantize(&Device::Cpu).unwrap())
        });
        let mut tensors: BTreeMap<String, Tensor> = tensors.collect();
        // A head of its own, so that a value is changed in one place.
        tensors.insert("output.weight".into(), tensors["token_embd.weight"].clone());
        Demo { metadata: content.metadata.into_iter().collect(), tensors }
    }

    /// Writes the model with `value` at `index` of one tensor and matrices of `dtype`.
    fn write_changed(&self, path: &Path, dtype: GgmlDType, changed: &str, index: usize, value: f32) {
        let tensors = self.tensors.iter().map(|(name, tensor)| {
            let kind = if tensor.rank() == 1 { GgmlDType::F32 } else { dtype };
            let mut tensor = tensor.clone();
            if name == changed {
                let mut values: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
                values[index] = value;
                tensor = Tensor::from_vec(values, tensor.dims(), &Device::Cpu).unwrap();
            }
            (name.as_str(), QTensor::quantize(&tensor, kind).unwrap())
        });
        let tensors: Vec<(&str, QTensor)> = tensors.collect();
        let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
        let metadata: Vec<(&str, &Value)> = self.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
        gguf_file::write(&mut File::create(path).unwrap(), &metadata, &tensors).unwrap();
    }
}

const PROMPT: [u32; 7] = [3, 17, 40, 17, 99, 250, 411];

fn greedy() -> GenerationOptions {
    GenerationOptions { ignore_eos: true, ..GenerationOptions::new(4, 0.0, 1.0) }
}

/// Every way to choose a token, and to be given logits.
fn choices() -> Vec<GenerationOptions> {
    let sampled = GenerationOptions { temperature: 0.8, seed: Some(1), ..greedy() };
    vec![
        greedy(),
        sampled.clone(),
        GenerationOptions { top_p: 0.9, ..sampled.clone() },
        GenerationOptions { top_k: Some(10), ..sampled.clone() },
        GenerationOptions { min_p: 0.1, ..sampled.clone() },
        GenerationOptions { logprobs: Some(3), ..greedy() },
        GenerationOptions { logprobs: Some(0), ..sampled },
        GenerationOptions { repetition_penalty: 1.3, presence_penalty: 0.5, ..greedy() },
        GenerationOptions { prompt_logits: true, ..greedy() },
        GenerationOptions { prompt_logits: true, max_tokens: 0, ..greedy() },
    ]
}

async fn open(model: &Path, devices: &str, kv_type: KvType) -> HeterogeneousPipelineExecutor {
    let model = model.to_str().unwrap();
    let devices = DeviceSpec::parse_list(devices).unwrap();
    let split = if devices.len() == 2 { Split::Layers(vec![4, 4]) } else { Split::Bytes };
    let options = PipelineOptions { kv_type, split, ..PipelineOptions::default() };
    let pipeline = HeterogeneousPipeline::with_options(&devices, model, options).unwrap();
    HeterogeneousPipelineExecutor::with_options(pipeline, model, ExecutorOptions::default()).await.unwrap()
}

/// The error of each way to choose.
async fn assert_refused(executor: &HeterogeneousPipelineExecutor, choices: &[GenerationOptions], what: &str) {
    for options in choices {
        match executor.infer_with(&PROMPT, options).await {
            Err(error @ Error::LogitsNotFinite { .. }) => {
                let message = error.to_string();
                assert!(message.contains("the model's logit for token") && message.contains("check"), "{message}");
            }
            Err(error) => panic!("{what}: {error} with {options:?}"),
            Ok(generation) => panic!("{what}: {:?} were chosen with {options:?}", generation.tokens),
        }
    }
}

#[tokio::test]
async fn an_infinite_weight_in_the_head_is_an_error_for_every_choice() {
    let demo = Demo::read();
    let folder = tempfile::tempdir().unwrap();
    for dtype in [GgmlDType::F32, GgmlDType::F16, GgmlDType::Q8_0] {
        // What writes Q8_0 makes a scale of an infinite value, but drops NaN.
        let values = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
        for value in values.into_iter().take(if dtype == GgmlDType::Q8_0 { 2 } else { 3 }) {
            let path = folder.path().join("changed.gguf");
            demo.write_changed(&path, dtype, "output.weight", 5 * 256 + 7, value);
            let executor = open(&path, "cpu,cpu", KvType::F16).await;
            assert_refused(&executor, &choices(), &format!("{value} in {dtype:?}")).await;
        }
    }
}

#[tokio::test]
async fn a_lost_weight_shows_from_every_tensor_and_kv_type() {
    let demo = Demo::read();
    let folder = tempfile::tempdir().unwrap();
    let mut tensors: Vec<String> = ["output_norm.weight", "output.weight"].map(String::from).to_vec();
    for layer in [0, 7] {
        for name in
            ["attn_norm", "ffn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
        {
            tensors.push(format!("blk.{layer}.{name}.weight"));
        }
    }
    for (i, tensor) in tensors.iter().enumerate() {
        let dtype = [GgmlDType::F16, GgmlDType::F32, GgmlDType::Q8_0][i % 3];
        for value in [f32::INFINITY, f32::NEG_INFINITY] {
            let path = folder.path().join("changed.gguf");
            demo.write_changed(&path, dtype, tensor, 11, value);
            for kv_type in KvType::ALL {
                let executor = open(&path, "cpu", kv_type).await;
                let what = format!("{value} in {tensor} of {dtype:?} with {kv_type}");
                assert_refused(&executor, &choices()[..1], &what).await;
            }
        }
    }
}

#[tokio::test]
async fn an_infinite_embedding_counts_where_its_token_is_read() {
    let demo = Demo::read();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("changed.gguf");
    for dtype in [GgmlDType::F16, GgmlDType::Q8_0] {
        demo.write_changed(&path, dtype, "token_embd.weight", 250 * 256 + 3, f32::INFINITY);
        let executor = open(&path, "cpu", KvType::F16).await;
        assert_refused(&executor, &choices(), &format!("{dtype:?}")).await;
        let other = executor.infer_with(&[3, 17, 40], &GenerationOptions { stop_tokens: vec![250], ..greedy() }).await;
        assert!(!other.unwrap().tokens.is_empty(), "{dtype:?}");
    }
}
