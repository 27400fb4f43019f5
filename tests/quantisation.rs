//! Quantised weights beside those they were made from, tensor by tensor, whatever the files call and store them.

mod common;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Content};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use candle_pipeline::instrument::tracer::quant_error::{QuantClass, QuantError};
use candle_pipeline::model::quantisation::{ModelWeights, compare};
use candle_pipeline::{DEMO_MODEL, DeviceSpec, HeterogeneousPipeline, Result};
use common::fixture;

fn errors(found: &str, reference: &str) -> Result<Vec<QuantError>> {
    let open = |model: &str| HeterogeneousPipeline::new(&[DeviceSpec::CPU], model);
    let (found, reference) = (open(found)?, open(reference)?);
    let weights = |of: &HeterogeneousPipeline| (of.weights().clone(), of.config().clone());
    let ((found, found_config), (reference, reference_config)) = (weights(&found), weights(&reference));
    let mut errors = Vec::new();
    compare(
        ModelWeights { weights: &*found, config: &found_config },
        ModelWeights { weights: &*reference, config: &reference_config },
        &mut |error| errors.push(error),
    )?;
    Ok(errors)
}

/// The demo model's tensors as candle reads them, in f64, with q and k in the order of safetensors.
fn by_candle(file: &str) -> BTreeMap<String, Vec<f64>> {
    let mut file = File::open(format!("{DEMO_MODEL}/{file}")).unwrap();
    let content = Content::read(&mut file).unwrap();
    let names: Vec<String> = content.tensor_infos.keys().cloned().collect();
    let values = |tensor: &Tensor| -> Vec<f64> {
        tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    };
    let read = |name: String| {
        let tensor = content.tensor(&mut file, &name, &Device::Cpu).unwrap().dequantize(&Device::Cpu).unwrap();
        let heads = match () {
            () if name.contains("attn_q.") => 8,
            () if name.contains("attn_k.") => 2,
            () => return (name, values(&tensor)),
        };
        let apart = tensor.reshape((heads, 16, 2, 256)).unwrap().transpose(1, 2).unwrap().contiguous().unwrap();
        (name, values(&apart))
    };
    names.into_iter().map(read).collect()
}

fn gguf_name(canonical: &str) -> String {
    let name = canonical.replace("layers.", "blk.").replace("embed_tokens", "token_embd");
    let name = name.replace("attn_norm", "ATTN").replace("mlp_norm", "ffn_norm").replace("o_proj", "attn_output");
    let name = name.replace("q_proj", "attn_q").replace("k_proj", "attn_k").replace("v_proj", "attn_v");
    let name = name.replace("gate_proj", "ffn_gate").replace("up_proj", "ffn_up").replace("down_proj", "ffn_down");
    if name == "norm.weight" { "output_norm.weight".into() } else { name.replace("ATTN", "attn_norm") }
}

#[test]
fn each_tensors_error_is_what_candles_values_and_the_textbook_say() {
    let original = candle_core::safetensors::load(format!("{DEMO_MODEL}/model.safetensors"), &Device::Cpu).unwrap();
    for (file, worst) in [("demo-q8_0.gguf", 0.9999..1.0), ("demo-q4_0.gguf", 0.99..0.999)] {
        let found = errors(&format!("{DEMO_MODEL}/{file}"), DEMO_MODEL).unwrap();
        assert_eq!(found.len(), original.len());
        assert_eq!(
            (found[0].name.as_str(), found[1].name.as_str()),
            ("embed_tokens.weight", "layers.0.attn_norm.weight")
        );
        let values = by_candle(file);
        for error in &found {
            let quantised = &values[&gguf_name(&error.name)];
            assert_eq!(error.values as usize, quantised.len());
            let hf = error.name.replace("attn_norm", "input_layernorm").replace("mlp_norm", "post_attention_layernorm");
            let hf = ["q_proj", "k_proj", "v_proj", "o_proj"]
                .iter()
                .fold(hf, |name, part| name.replace(part, &format!("self_attn.{part}")));
            let hf = ["gate_proj", "up_proj", "down_proj"]
                .iter()
                .fold(hf, |name, part| name.replace(part, &format!("mlp.{part}")));
            let reference = original[&format!("model.{hf}")].to_dtype(DType::F64).unwrap();
            let reference: Vec<f64> = reference.flatten_all().unwrap().to_vec1().unwrap();
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let noise: Vec<f64> = quantised.iter().zip(&reference).map(|(q, r)| q - r).collect();
            let power = dot(&reference, &reference);
            let cosine = dot(quantised, &reference) / (power * dot(quantised, quantised)).sqrt();
            assert!((error.cosine - cosine).abs() < 1e-9, "{file} {error} {cosine}");
            assert!((error.mse - dot(&noise, &noise) / noise.len() as f64).abs() <= 1e-9 * error.mse, "{file} {error}");
            let greatest = noise.iter().map(|x| x.abs()).fold(0.0, f64::max);
            assert!((error.max_error - greatest).abs() <= 1e-12, "{file} {error}");
            let snr = 10.0 * (power / dot(&noise, &noise)).log10();
            assert!(error.snr_db == snr || (error.snr_db - snr).abs() < 1e-6, "{file} {error} {snr}");
        }
        let least = found.iter().min_by(|a, b| a.worst_first(b)).unwrap();
        assert!(worst.contains(&least.cosine), "{file} {least}");
        let norm = found.iter().find(|error| error.name == "norm.weight").unwrap();
        assert_eq!((norm.dtype.as_str(), norm.mse, norm.cosine), ("F32", 0.0, 1.0));
    }
}

#[test]
fn a_model_equals_itself() {
    for model in ["families/gemma", "families/phi3", "families/llama-tied", "families/qwen2"] {
        let model = fixture(model);
        let found = errors(model.to_str().unwrap(), model.to_str().unwrap()).unwrap();
        assert!(found.len() > 10);
        for error in found {
            assert_eq!((error.mse, error.max_error, error.snr_db), (0.0, 0.0, f64::INFINITY), "{error}");
            assert!(error.cosine > 1.0 - 1e-12 && error.class == QuantClass::Acceptable);
        }
    }
}

/// The demo model in GGUF, changed.
fn changed(path: &Path, change: impl FnOnce(&mut BTreeMap<String, QTensor>)) {
    let mut file = File::open(format!("{DEMO_MODEL}/demo-q8_0.gguf")).unwrap();
    let content = Content::read(&mut file).unwrap();
    let names: Vec<String> = content.tensor_infos.keys().cloned().collect();
    let tensors = names.into_iter().map(|name| (name.clone(), content.tensor(&mut file, &name, &Device::Cpu).unwrap()));
    let mut tensors: BTreeMap<String, QTensor> = tensors.collect();
    change(&mut tensors);
    let metadata: Vec<_> = content.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    gguf_file::write(&mut File::create(path).unwrap(), &metadata, &tensors).unwrap();
}

#[test]
fn a_head_of_its_own_is_compared_with_the_embeddings_it_was_made_from() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("untied.gguf");
    changed(&path, |tensors| {
        let head = tensors["token_embd.weight"].dequantize(&Device::Cpu).unwrap();
        tensors.insert("output.weight".into(), QTensor::quantize(&head, GgmlDType::Q4_0).unwrap());
    });
    let path = path.to_str().unwrap();
    let found = errors(path, DEMO_MODEL).unwrap();
    let head = found.last().unwrap();
    assert_eq!((head.name.as_str(), head.dtype.as_str()), ("lm_head.weight", "Q4_0"));
    assert!(head.cosine > 0.98 && head.cosine < found[0].cosine, "{head}");
    let other_way = errors(DEMO_MODEL, path).unwrap();
    let head_too = other_way.iter().find(|error| error.name == "lm_head.weight").unwrap();
    assert!((head_too.cosine - head.cosine).abs() < 1e-12 && head_too.dtype == "F16");
}

#[test]
fn models_that_do_not_belong_together_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("changed.gguf");
    let refused = |words: &[&str]| {
        let message = errors(path.to_str().unwrap(), DEMO_MODEL).unwrap_err().to_string();
        for word in words {
            assert!(message.contains(word), "`{word}` is not in: {message}");
        }
    };
    changed(&path, |tensors| _ = tensors.remove("blk.3.ffn_up.weight"));
    refused(&[
        "changed.gguf",
        "`blk.3.ffn_up.weight`",
        "missing",
        "model.safetensors",
        "model.layers.3.mlp.up_proj.weight",
    ]);
    changed(&path, |tensors| {
        let narrow = Tensor::zeros((128, 256), DType::F32, &Device::Cpu).unwrap();
        tensors.insert("blk.3.ffn_up.weight".into(), QTensor::quantize(&narrow, GgmlDType::Q8_0).unwrap());
    });
    refused(&["changed.gguf", "`blk.3.ffn_up.weight`", "[128, 256]", "[256, 256]"]);
    changed(&path, |tensors| {
        let bias = Tensor::zeros(256, DType::F32, &Device::Cpu).unwrap();
        tensors.insert("blk.3.attn_q.bias".into(), QTensor::quantize(&bias, GgmlDType::F32).unwrap());
    });
    refused(&["model.safetensors", "model.layers.3.self_attn.q_proj.bias", "missing", "changed.gguf"]);
}
