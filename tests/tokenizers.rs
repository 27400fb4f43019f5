//! Models whose tokenizer is damaged, unknown, or says too little: token ids always work, and texts end where they
//! should.

mod common;

use std::fs;
use std::path::Path;

use candle_pipeline::{DEMO_MODEL, FinishReason, GenerationOptions};
use common::{executor, greedy};
use tempfile::TempDir;

/// The demo model's GGUF file with a metadata value replaced by one of the same length.
fn patched(key: &str, from: &[u8], to: &[u8]) -> TempDir {
    let mut bytes = fs::read(Path::new(DEMO_MODEL).join("demo-q8_0.gguf")).unwrap();
    let after_key = bytes.windows(key.len()).position(|window| window == key.as_bytes()).unwrap() + key.len();
    let at = after_key + bytes[after_key..].windows(from.len()).position(|window| window == from).unwrap();
    assert!(at - after_key < 16 && from.len() == to.len(), "{key}");
    bytes[at..at + to.len()].copy_from_slice(to);
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("model.gguf"), bytes).unwrap();
    dir
}

async fn assert_only_ids_work(model: &Path, reasons: &[&str]) {
    let executor = executor(model.to_str().unwrap(), "cpu", None).await.unwrap();
    let generation = executor.infer_with(&[0, 5, 6], &greedy(5)).await.unwrap();
    assert_eq!(generation.tokens.len(), 5);
    assert!(executor.tokenizer().is_none());
    let refused = executor.infer_text("Once", &GenerationOptions::default()).await.unwrap_err().to_string();
    assert!(reasons.iter().all(|reason| refused.contains(reason)), "{refused}");
    assert_eq!(executor.needed_tokenizer().unwrap_err().to_string(), refused);
}

#[tokio::test]
async fn a_damaged_tokenizer_leaves_token_ids() {
    let dir = TempDir::new().unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        fs::copy(Path::new(DEMO_MODEL).join(name), dir.path().join(name)).unwrap();
    }
    let whole = fs::read(dir.path().join("tokenizer.json")).unwrap();
    fs::write(dir.path().join("tokenizer.json"), &whole[..whole.len() / 2]).unwrap();
    assert_only_ids_work(dir.path(), &["tokenizer.json: not a tokenizer"]).await;
}

#[tokio::test]
async fn an_unknown_pre_tokenizer_leaves_token_ids() {
    let dir = patched("tokenizer.ggml.pre", b"gpt-2", b"gpt-9");
    let model = dir.path().join("model.gguf");
    assert_only_ids_work(&model, &["`gpt-9`", "tokenizer.json beside the file"]).await;

    fs::copy(Path::new(DEMO_MODEL).join("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    let executor = executor(model.to_str().unwrap(), "cpu", None).await.unwrap();
    assert_eq!(executor.infer_text("Once upon a time", &greedy(5)).await.unwrap().tokens.len(), 5);
}

#[tokio::test]
async fn a_text_ends_at_a_token_known_by_its_text() {
    // The file says that token 766 ends a text; the model writes `<|end|>`, token 1.
    let dir = patched("tokenizer.ggml.eos_token_id", &1u32.to_le_bytes(), &766u32.to_le_bytes());
    let model = dir.path().join("model.gguf");
    let executor = executor(model.to_str().unwrap(), "cpu", None).await.unwrap();
    let options = GenerationOptions { ignore_eos: false, ..greedy(480) };
    let generation = executor.infer_text("Once upon a time", &options).await.unwrap();
    assert_eq!(generation.finish_reason, FinishReason::Stop);
    assert!(!generation.text.contains("<|end|>"));
}
