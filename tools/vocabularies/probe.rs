//! Answers questions about a tokenizer: a JSON object on each line of stdin, one answer a line on stdout. `compare.py`
//! asks them.
//!
//! `{"op": "load", "path": ...}` takes a GGUF file or a folder; the operations after it ask that tokenizer:
//! `encode` (`text`, `special`), `decode` and `pieces` (`ids`, `skip`), `ends` (the model's end tokens; needs weights).
//! An answer is `{"ok": ...}` or `{"error": ...}`.

use std::io::{BufRead, Write};
use std::path::Path;

use candle_pipeline::executor::tokenizer::IncrementalDecoder;
use candle_pipeline::{DeviceSpec, Error, HeterogeneousPipeline, Result, Tokenizer};
use serde_json::{Value, json};

#[derive(serde::Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
enum Question {
    Load { path: String },
    Encode { text: String, special: bool },
    Decode { ids: Vec<u32>, skip: bool },
    Pieces { ids: Vec<u32>, skip: bool },
    Ends { path: String },
}

fn main() -> anyhow::Result<()> {
    let mut tokenizer = None;
    let mut out = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        let answer = match answer(serde_json::from_str(&line?)?, &mut tokenizer) {
            Ok(answer) => json!({ "ok": answer }),
            Err(error) => json!({ "error": error.to_string() }),
        };
        writeln!(out, "{answer}")?;
        out.flush()?;
    }
    Ok(())
}

fn answer(question: Question, loaded: &mut Option<Tokenizer>) -> Result<Value> {
    let tokenizer =
        |loaded: &Option<Tokenizer>| loaded.clone().ok_or_else(|| Error::Tokenizer("none is loaded".into()));
    Ok(match question {
        Question::Load { path } => {
            *loaded = None;
            let path = Path::new(&path);
            *loaded = if path.is_dir() { Tokenizer::from_hf_dir(path)? } else { Tokenizer::from_gguf(path)? };
            loaded.as_ref().map(Tokenizer::vocab_size).into()
        }
        Question::Encode { text, special } => tokenizer(loaded)?.encode(&text, special)?.into(),
        Question::Decode { ids, skip } => tokenizer(loaded)?.decode(&ids, skip)?.into(),
        Question::Pieces { ids, skip } => {
            let mut decoder = IncrementalDecoder::new(&tokenizer(loaded)?, skip);
            let mut pieces = ids.into_iter().map(|id| decoder.push(id)).collect::<Result<Vec<_>>>()?;
            pieces.push(decoder.finish()?);
            pieces.into()
        }
        Question::Ends { path } => {
            let pipeline = HeterogeneousPipeline::new(&DeviceSpec::parse_list("cpu")?, &path)?;
            pipeline.config().eos_token_ids.clone().into()
        }
    })
}
