//! Every family and variant against Hugging Face transformers: `tests/fixtures/families` holds tiny random models with
//! the tokens and logits that transformers computes for them (`tools/fixtures/make_fixtures.py` makes them).

mod common;

use std::path::{Path, PathBuf};

use common::{executor, greedy};

#[derive(serde::Deserialize)]
struct Expected {
    cases: Vec<Case>,
}

#[derive(serde::Deserialize)]
struct Case {
    prompt: Vec<u32>,
    tokens: Vec<u32>,
    logits: Vec<f32>,
}

fn families() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(common::fixture("families")).expect("fixtures are part of the repository");
    let mut dirs: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()).collect();
    dirs.sort();
    assert!(dirs.len() > 20, "fixtures are missing");
    dirs
}

fn expected(dir: &Path) -> Expected {
    serde_json::from_str(&std::fs::read_to_string(dir.join("expected.json")).unwrap()).unwrap()
}

/// Largest difference as a share of the largest magnitude.
fn relative_difference(found: &[f32], wanted: &[f32]) -> f32 {
    assert_eq!(found.len(), wanted.len());
    let size = wanted.iter().fold(0f32, |size, value| size.max(value.abs()));
    found.iter().zip(wanted).fold(0f32, |worst, (a, b)| worst.max((a - b).abs())) / size
}

/// Runs all cases of a model on two stages; returns what is wrong.
async fn check(dir: &Path, model: &Path) -> Vec<String> {
    let of = dir.file_name().unwrap().display();
    let name = format!("{of} ({})", model.file_name().unwrap().display());
    let executor = match executor(model.to_str().unwrap(), "cpu,cpu", None).await {
        Ok(executor) => executor,
        Err(error) => return vec![format!("{name}: {error}")],
    };
    let mut wrong = Vec::new();
    for case in expected(dir).cases {
        let length = case.prompt.len();
        match executor.infer_with(&case.prompt, &greedy(case.tokens.len())).await {
            Err(error) => wrong.push(format!("{name}: prompt of {length}: {error}")),
            Ok(found) => {
                let difference = relative_difference(found.prompt_logits.as_ref().unwrap(), &case.logits);
                if difference.is_nan() || difference > 1e-4 {
                    wrong.push(format!("{name}: prompt of {length}: logits differ by {difference:e}"));
                }
                if found.tokens != case.tokens {
                    wrong.push(format!(
                        "{name}: prompt of {length}: tokens {:?}, transformers {:?}",
                        found.tokens, case.tokens
                    ));
                }
            }
        }
    }
    wrong
}

#[tokio::test]
async fn safetensors_of_every_family_equal_transformers() {
    let mut wrong = Vec::new();
    for dir in families() {
        wrong.extend(check(&dir, &dir).await);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Files on the hub write configs in an older dialect and leave defaults out.
#[tokio::test]
async fn configs_as_older_transformers_wrote_them_give_the_same() {
    let mut wrong = Vec::new();
    for dir in families() {
        let copy = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension != "gguf") {
                std::fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
            }
        }
        std::fs::copy(dir.join("config_legacy.json"), copy.path().join("config.json")).unwrap();
        wrong.extend(check(&dir, copy.path()).await);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[tokio::test]
async fn every_end_of_sequence_id_ends_a_generation() {
    let dir = common::fixture("families/llama-multi-eos");
    let text = std::fs::read_to_string(dir.join("expected.json")).unwrap();
    let cases = serde_json::from_str::<serde_json::Value>(&text).unwrap()["cases"].as_array().unwrap().clone();
    let executor = executor(dir.to_str().unwrap(), "cpu", None).await.unwrap();
    let ids = |value: &serde_json::Value| -> Vec<u32> { serde_json::from_value(value.clone()).unwrap() };
    let mut stopped = 0;
    for case in &cases {
        let wanted = ids(&case["tokens_until_eos"]);
        let options = candle_pipeline::GenerationOptions::new(ids(&case["tokens"]).len(), 0.0, 1.0);
        let found = executor.infer_with(&ids(&case["prompt"]), &options).await.unwrap();
        assert_eq!(found.tokens, wanted);
        stopped += usize::from(found.finish_reason == candle_pipeline::FinishReason::Stop);
    }
    assert!(stopped > 0, "no case reached an end-of-sequence id");
}

#[tokio::test]
async fn gguf_of_the_same_weights_equals_transformers() {
    let mut wrong = Vec::new();
    let mut files = 0;
    for dir in families() {
        let file = dir.join("model-f32.gguf");
        if file.exists() {
            files += 1;
            wrong.extend(check(&dir, &file).await);
        }
    }
    assert!(files >= 10, "only {files} GGUF fixtures");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
