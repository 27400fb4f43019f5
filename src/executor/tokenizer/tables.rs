//! The one interface over the two kinds of tokenizer: a tokenizer.json, which the crate `tokenizers` reads, and a GGUF
//! file's, which is this crate's own.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use super::{gguf, json_limits};
use crate::error::{Error, Result};
use crate::pipeline::worker::panic_message;

/// What turns text into tokens and back.
pub(super) enum Tables {
    Json(Box<JsonTables>),
    Gguf(Box<gguf::Tables>),
}

/// A tokenizer.json.
pub(super) struct JsonTables {
    pub(super) tables: tokenizers::Tokenizer,
    /// For errors.
    pub(super) path: PathBuf,
}

impl From<JsonTables> for Tables {
    fn from(tables: JsonTables) -> Self {
        Self::Json(Box::new(tables))
    }
}

impl From<gguf::Tables> for Tables {
    fn from(tables: gguf::Tables) -> Self {
        Self::Gguf(Box::new(tables))
    }
}

impl JsonTables {
    /// Reads a tokenizer.json.
    pub(super) fn read(path: &Path, bytes: Vec<u8>) -> Result<Self> {
        let refused = |reason: String| Error::file(path, format!("not a tokenizer ({reason}); fetch the file again"));
        let tables = guarded(|| {
            json_limits::check(&bytes)?;
            let mut tables = tokenizers::Tokenizer::from_bytes(bytes)?;
            // Saved settings for batches of training texts; a prompt is taken whole and as it is.
            tables.with_truncation(None)?;
            tables.with_padding(None);
            Ok(tables)
        });
        Ok(Self { tables: tables.map_err(refused)?, path: path.into() })
    }

    /// Runs code of `tokenizers`. Some of what a file may ask for makes it panic.
    fn run<T>(&self, run: impl FnOnce(&tokenizers::Tokenizer) -> tokenizers::Result<T>) -> Result<T> {
        guarded(|| run(&self.tables))
            .map_err(|reason| Error::Tokenizer(format!("{}: {reason}; fetch the file again", self.path.display())))
    }
}

/// Calls `run` and turns an error or a panic into its text.
pub(super) fn guarded<T>(run: impl FnOnce() -> tokenizers::Result<T>) -> std::result::Result<T, String> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(panic) => Err(format!("the tokenizer panicked: {}", panic_message(&*panic))),
    }
}

impl Tables {
    pub(super) fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        match self {
            Self::Json(json) => json.run(|tables| Ok(tables.encode_fast(text, add_special_tokens)?.get_ids().to_vec())),
            Self::Gguf(gguf) => gguf.encode(text, add_special_tokens),
        }
    }

    pub(super) fn decode(&self, tokens: &[u32], skip_special_tokens: bool) -> Result<String> {
        match self {
            Self::Json(json) => json.run(|tables| tables.decode(tokens, skip_special_tokens)),
            Self::Gguf(gguf) => Ok(gguf.decode(tokens, skip_special_tokens)),
        }
    }

    pub(super) fn token_to_id(&self, token: &str) -> Option<u32> {
        match self {
            Self::Json(json) => json.tables.token_to_id(token),
            Self::Gguf(gguf) => gguf.token_to_id(token),
        }
    }

    pub(super) fn has_token(&self, id: u32) -> bool {
        match self {
            Self::Json(json) => json.tables.id_to_token(id).is_some(),
            Self::Gguf(gguf) => (id as usize) < gguf.size(),
        }
    }

    /// Number of tokens, added ones included.
    pub(super) fn size(&self) -> usize {
        match self {
            Self::Json(json) => json.tables.get_vocab_size(true),
            Self::Gguf(gguf) => gguf.size(),
        }
    }

    /// Tokens that are not shown where special ones are skipped.
    pub(super) fn special(&self) -> HashSet<u32> {
        match self {
            Self::Json(json) => {
                let added = json.tables.get_added_vocabulary().get_added_tokens_decoder();
                added.iter().filter(|(_, token)| token.special).map(|(&id, _)| id).collect()
            }
            Self::Gguf(gguf) => gguf.hidden().clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::Tokenizer;
    use super::super::test_support::{byte_level, folder, saved};

    fn folder_with(change: impl FnOnce(&mut Value)) -> tempfile::TempDir {
        let mut saved: Value = serde_json::from_str(&saved(&byte_level()).1).unwrap();
        change(&mut saved);
        folder(&[("tokenizer.json", saved.to_string())])
    }

    #[test]
    fn panics_inside_tokenizers_become_errors_with_the_file() {
        let of_load = folder_with(|json| {
            json["normalizer"] = json!({"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="});
            json["added_tokens"][0]["normalized"] = json!(true);
        });
        let refused = Tokenizer::from_hf_dir(of_load.path()).unwrap_err().to_string();
        assert!(refused.contains("tokenizer.json: not a tokenizer (the tokenizer panicked: "), "{refused}");

        let of_encode = folder_with(|json| json["pre_tokenizer"] = json!({"type": "FixedLength", "length": 0}));
        let tokenizer = Tokenizer::from_hf_dir(of_encode.path()).unwrap().unwrap();
        let refused = tokenizer.encode("hello", true).unwrap_err().to_string();
        assert!(refused.contains("tokenizer.json: the tokenizer panicked: "), "{refused}");

        let of_decode = folder_with(|json| {
            json["decoder"] = json!({"type": "Strip", "content": "h", "start": 0, "stop": 9});
        });
        let tokenizer = Tokenizer::from_hf_dir(of_decode.path()).unwrap().unwrap();
        let tokens = tokenizer.encode("hhh", false).unwrap();
        let refused = tokenizer.decode(&tokens, true).unwrap_err().to_string();
        assert!(refused.contains("tokenizer.json: the tokenizer panicked: "), "{refused}");
    }

    #[test]
    fn a_tokenizer_json_that_asks_for_gigabytes_is_refused() {
        // A table of 4 GB in the header, and 20 kB.
        let charsmap = format!("/////w{}", "A".repeat(19_998));
        let bomb = folder_with(|json| {
            json["normalizer"] = json!({"type": "Precompiled", "precompiled_charsmap": charsmap});
        });
        let refused = Tokenizer::from_hf_dir(bomb.path()).unwrap_err().to_string();
        assert!(
            refused.contains("tokenizer.json: not a tokenizer") && refused.contains("4294967295 bytes"),
            "{refused}"
        );

        let bomb = folder_with(|_| {});
        let file = std::fs::File::create(bomb.path().join("tokenizer.json")).unwrap();
        file.set_len(1 << 40).unwrap();
        let refused = Tokenizer::from_hf_dir(bomb.path()).unwrap_err().to_string();
        assert!(refused.contains("tokenizer.json") && refused.contains("more than 134217728 bytes"), "{refused}");
        std::fs::remove_file(bomb.path().join("tokenizer.json")).unwrap();
        std::fs::create_dir(bomb.path().join("tokenizer.json")).unwrap();
        let refused = Tokenizer::from_hf_dir(bomb.path()).unwrap_err().to_string();
        assert!(refused.contains("not a regular file"), "{refused}");
    }
}
