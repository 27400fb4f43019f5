//! What a model's files say of its generations: which tokens end them, and which never come.
//!
//! How tokens are chosen otherwise (temperature, filters, penalties, beams, lengths) is the caller's choice and not read.

use std::path::Path;

use serde_json::Value;

use super::SuppressedTokens;
use super::json::Json;
use crate::error::{Error, Result, shorten};

/// The fields of a generation_config.json that do not depend on what a caller asks for.
pub(super) struct Generation {
    /// Tokens that end a generation; `None` where no file says.
    pub(super) eos_token_ids: Option<Vec<u32>>,
    /// Tokens that are never generated.
    pub(super) suppressed: SuppressedTokens,
}

/// Fields that change which tokens are generated and are not implemented.
const UNSUPPORTED: &[&str] = &[
    "forced_bos_token_id",
    "forced_eos_token_id",
    "force_words_ids",
    "constraints",
    "sequence_bias",
    "exponential_decay_length_penalty",
    "watermarking_config",
];

impl Generation {
    /// Reads generation_config.json. Without one the fields are looked for where older files have them: in config.json,
    /// first in the `outer` object, then in that of the `text` model. The end tokens are looked for there too where
    /// generation_config.json names none. This is the order of transformers.
    pub(super) fn read(dir: &Path, outer: &Json, text: &Json) -> Result<Generation> {
        let path = dir.join("generation_config.json");
        let file = if path.exists() { Some(Json::read(path)?) } else { None };
        let all: Vec<&Json> = file.iter().chain([outer, text]).collect();
        let places = if file.is_some() { &all[..1] } else { &all[..] };

        for &field in UNSUPPORTED {
            if let Some(json) = holder(places, field).filter(|json| !json.get(field).is_some_and(is_empty)) {
                return Err(unsupported(json, field));
            }
        }
        let ids = |places: &[&Json], field| match holder(places, field) {
            Some(json) => json.token_ids(field),
            None => Ok(None),
        };
        let eos_token_ids = ids(&all, "eos_token_id")?;
        let mut always = ids(places, "suppress_tokens")?.unwrap_or_default();
        if let Some(json) = holder(places, "bad_words_ids") {
            for word in json.token_id_lists("bad_words_ids")? {
                match word[..] {
                    // As transformers has it, a generation can end in spite of the list.
                    [token] if eos_token_ids.as_ref().is_some_and(|eos| eos.contains(&token)) => {}
                    [token] => always.push(token),
                    [] => {}
                    _ => return Err(unsupported(json, "bad_words_ids")),
                }
            }
        }
        let at_first = ids(places, "begin_suppress_tokens")?.unwrap_or_default();
        Ok(Generation { eos_token_ids, suppressed: SuppressedTokens { always, at_first } })
    }
}

/// The first of the places that has the field.
fn holder<'a>(places: &[&'a Json], field: &str) -> Option<&'a Json> {
    places.iter().copied().find(|json| json.get(field).is_some())
}

fn is_empty(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty) || value.as_object().is_some_and(serde_json::Map::is_empty)
}

fn unsupported(json: &Json, field: &'static str) -> Error {
    let value = json.get(field).map(Value::to_string).unwrap_or_default();
    Error::Unsupported {
        what: "generation setting",
        value: format!("{field} = {}", shorten(&value)),
        hint: format!(
            "in {}; of the settings that rule out tokens, suppress_tokens, begin_suppress_tokens and bad_words_ids of \
             one token each are supported: take this one out to generate without it",
            json.path.display()
        ),
    }
}
