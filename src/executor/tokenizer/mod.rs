//! Text to token ids and back: tokenizers of Hugging Face folders and GGUF files, chat templates, and the decoding of a
//! growing sequence piece by piece up to a stop string.
//!
//! This file holds the tokenizer itself and what reads it from a folder; the rest has files of its own.

mod chat_template;
mod gguf;
mod incremental;
mod json_limits;
mod stop_strings;
mod tables;
#[cfg(test)]
mod test_support;

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::path::Path;
use std::sync::Arc;

pub use self::chat_template::ChatOptions;
pub use self::incremental::IncrementalDecoder;
pub use self::stop_strings::{StopMatch, StopStringMatcher};
use self::tables::{JsonTables, Tables};
use crate::error::{Error, Result};
use crate::files;

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ChatMessage {
    /// Who speaks: "system", "user", "assistant", or whatever else the model's template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl ChatMessage {
    /// A message of any role.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }

    /// Instructions that stand above the conversation.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new("system", content)
    }

    /// What the person says.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    /// What the model said.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new("assistant", content)
    }
}

/// A model's tokenizer with its special tokens and its chat template. Clones share the tables.
#[derive(Clone)]
pub struct Tokenizer {
    shared: Arc<Shared>,
}

struct Shared {
    tables: Tables,
    /// Ids that `skip_special_tokens` leaves out.
    special: HashSet<u32>,
    /// "bos_token", "eos_token", ... with their texts: variables of the chat template.
    named: BTreeMap<String, String>,
    bos: Option<u32>,
    eos: Option<u32>,
    /// A template that does not compile is an error when it is used: the model is still good for plain text.
    chat: Option<chat_template::Compiled>,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("named", &self.shared.named)
            .field("has_chat_template", &self.has_chat_template())
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// The tokenizer of a folder in Hugging Face layout; `None` where it has none (token ids still work then).
    ///
    /// Reads `tokenizer.json`, the names of the special tokens from `tokenizer_config.json` or
    /// `special_tokens_map.json`, and the chat template from `chat_template.jinja`, `tokenizer_config.json` or
    /// `chat_template.json`, in the order of precedence that transformers gives them.
    pub fn from_hf_dir(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join("tokenizer.json");
        let Some(bytes) = read_if_there(&path)? else {
            // These need code or a conversion that this crate does not have; nothing at all means ids only.
            let other = ["tokenizer.model", "spiece.model", "tekken.json", "vocab.json", "vocab.txt"];
            return match other.iter().map(|name| dir.join(name)).find(|path| path.exists()) {
                Some(path) => Err(Error::file(
                    path,
                    "this form of tokenizer is not read: put the model's `tokenizer.json` beside it (transformers \
                     writes one with AutoTokenizer.from_pretrained(folder).save_pretrained(folder))",
                )),
                None => Ok(None),
            };
        };
        let tables = JsonTables::read(&path, bytes)?;
        let config = read_json(&dir.join("tokenizer_config.json"))?.unwrap_or_default();
        let special_tokens_map = read_json(&dir.join("special_tokens_map.json"))?.unwrap_or_default();

        // transformers looks into the second file only where the first one does not list the added tokens.
        let mut named = named_tokens(&config);
        if config.get("added_tokens_decoder").is_none() {
            named.extend(named_tokens(&special_tokens_map));
        }

        let jinja = dir.join("chat_template.jinja");
        let template = match read_if_there(&jinja)? {
            Some(bytes) => Some(String::from_utf8(bytes).map_err(|error| Error::file(&jinja, error))?),
            None => match chat_template_in(&config) {
                Some(template) => Some(template),
                None => read_json(&dir.join("chat_template.json"))?.as_ref().and_then(chat_template_in),
            },
        };
        Self::assemble(tables, named, template).map(Some).map_err(|error| Error::file(&path, error))
    }

    fn assemble(
        tables: impl Into<Tables>,
        named: BTreeMap<String, String>,
        template: Option<String>,
    ) -> tokenizers::Result<Self> {
        let tables = tables.into();
        let special = tables.special();
        let id = |name| named.get(name).and_then(|text: &String| tables.token_to_id(text));
        let (bos, eos) = (id("bos_token"), id("eos_token"));
        let chat = template.map(chat_template::compile);
        Ok(Self { shared: Arc::new(Shared { tables, special, named, bos, eos, chat }) })
    }

    /// The token ids of a text. `add_special_tokens` puts the tokens around it that the model expects at the ends of a
    /// text (often a BOS token). Special tokens spelled out in the text become what they say either way.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        self.shared.tables.encode(text, add_special_tokens)
    }

    /// The text of token ids. Ids outside the vocabulary (models pad their embedding table) have no text. Bytes that
    /// are not UTF-8 become U+FFFD.
    pub fn decode(&self, tokens: &[u32], skip_special_tokens: bool) -> Result<String> {
        self.shared.tables.decode(tokens, skip_special_tokens)
    }

    /// The id of a token spelled as in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.shared.tables.token_to_id(token)
    }

    /// The token that ends a text, by the tokenizer's files. The model's generation config may name more.
    pub fn eos_token_id(&self) -> Option<u32> {
        self.shared.eos
    }

    /// The token that begins a text.
    pub fn bos_token_id(&self) -> Option<u32> {
        self.shared.bos
    }

    /// Number of tokens, added ones included. The model's embedding table may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.shared.tables.size()
    }

    /// Whether [`apply_chat_template`](Self::apply_chat_template) has a template to apply.
    pub fn has_chat_template(&self) -> bool {
        self.shared.chat.is_some()
    }

    /// Whether decoding takes notice of a token at all.
    fn has_text(&self, token: u32, skip_special_tokens: bool) -> bool {
        let skipped = skip_special_tokens && self.shared.special.contains(&token);
        !skipped && self.shared.tables.has_token(token)
    }
}

fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>> {
    files::read_if_there(path, files::MAX_TOKENIZER_BYTES)
}

fn read_json(path: &Path) -> Result<Option<serde_json::Value>> {
    read_if_there(path)?.map(|bytes| files::parse_json(path, &bytes)).transpose()
}

/// Names of special tokens with their texts, as transformers passes them to a chat template: every field that ends in
/// `_token`, and the names that a model gives to tokens of its own.
fn named_tokens(json: &serde_json::Value) -> BTreeMap<String, String> {
    // A text, or an AddedToken object that holds it; null where the model has no such token.
    let text = |token: &serde_json::Value| token.as_str().or_else(|| token.get("content")?.as_str()).map(str::to_owned);
    let mut named = BTreeMap::new();
    for (name, token) in json.as_object().into_iter().flatten() {
        if name.ends_with("_token") {
            named.extend(text(token).map(|text| (name.clone(), text)));
        }
    }
    for group in ["additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"] {
        let tokens = json.get(group).and_then(serde_json::Value::as_object).into_iter().flatten();
        named.extend(tokens.filter_map(|(name, token)| Some((name.clone(), text(token)?))));
    }
    named
}

/// A `chat_template` field: one template, or several with names of which "default" is meant.
fn chat_template_in(json: &serde_json::Value) -> Option<String> {
    let field = json.get("chat_template")?;
    let template = field.as_str().or_else(|| {
        let named = field.as_array()?.iter().find(|named| named.get("name").is_some_and(|name| name == "default"))?;
        named.get("template")?.as_str()
    });
    template.map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;
    use tempfile::TempDir;

    use super::test_support::{TEXTS, all_kinds, byte_level, folder, saved};
    use super::*;

    #[test]
    fn tokenizer_is_shared_between_threads() {
        fn is_shared<T: Send + Sync + Clone>() {}
        is_shared::<Tokenizer>();
    }

    #[test]
    fn encode_and_decode() {
        for tokenizer in all_kinds() {
            for text in TEXTS {
                // The Metaspace decoder takes all spaces off the front, SentencePiece only the one it put there.
                let text = text.trim_start();
                let tokens = tokenizer.encode(text, false).unwrap();
                assert_eq!(tokenizer.decode(&tokens, true).unwrap(), text);
                let with_bos = tokenizer.encode(text, true).unwrap();
                assert_eq!(with_bos[1..], tokens);
                assert_eq!(tokenizer.decode(&with_bos, true).unwrap(), text);
                assert_ne!(tokenizer.decode(&with_bos, false).unwrap(), text);
            }
            let beyond = tokenizer.vocab_size() as u32;
            assert_eq!(tokenizer.decode(&[beyond, u32::MAX], false).unwrap(), "");
        }
    }

    #[test]
    fn folder_with_config() {
        let dir = folder(&[
            saved(&byte_level()),
            (
                "tokenizer_config.json",
                json!({
                    "bos_token": {"__type": "AddedToken", "content": "<|begin|>", "special": true},
                    "eos_token": "<|end|>",
                    "pad_token": null,
                    "chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ bos_token }}yes"}],
                })
                .to_string(),
            ),
        ]);
        let tokenizer = Tokenizer::from_hf_dir(dir.path()).unwrap().unwrap();
        assert_eq!(tokenizer.bos_token_id(), Some(0));
        assert_eq!(tokenizer.eos_token_id(), Some(1));
        assert_eq!(tokenizer.vocab_size(), byte_level().get_vocab_size(true));
        assert_eq!(tokenizer.apply_chat_template(&[], true).unwrap(), "<|begin|>yes");
        assert_eq!(tokenizer.encode_chat(&[]).unwrap().iter().filter(|&&token| token == 0).count(), 1);
        assert!(format!("{tokenizer:?}").contains("<|end|>"));

        // A template in a file of its own comes first, one in chat_template.json last.
        fs::write(dir.path().join("chat_template.json"), json!({"chat_template": "json"}).to_string()).unwrap();
        let template = || Tokenizer::from_hf_dir(dir.path()).unwrap().unwrap().apply_chat_template(&[], true).unwrap();
        assert_eq!(template(), "<|begin|>yes");
        fs::write(dir.path().join("chat_template.jinja"), "jinja").unwrap();
        assert_eq!(template(), "jinja");
        fs::remove_file(dir.path().join("chat_template.jinja")).unwrap();
        fs::remove_file(dir.path().join("tokenizer_config.json")).unwrap();
        assert_eq!(template(), "json");

        fs::write(dir.path().join("special_tokens_map.json"), json!({"eos_token": "<|end|>"}).to_string()).unwrap();
        let tokenizer = Tokenizer::from_hf_dir(dir.path()).unwrap().unwrap();
        assert_eq!((tokenizer.bos_token_id(), tokenizer.eos_token_id()), (None, Some(1)));
    }

    #[test]
    fn names_of_extra_special_tokens_reach_the_template() {
        let template = "{{ bos_token }}|{{ image_token }}|{{ audio_token }}|{{ think_token }}|{{ tool_token }}|\
                        {{ add_bos_token is defined }}|{{ eos_token is defined }}|{{ pad_token is defined }}";
        let config = json!({
            "bos_token": "<|begin|>",
            "pad_token": null,
            "add_bos_token": true,
            "image_token": "<image>",
            "audio_token": {"__type": "AddedToken", "content": "<audio>"},
            "extra_special_tokens": {"think_token": "<think>"},
            "model_specific_special_tokens": {"tool_token": {"content": "<tool>"}},
            "additional_special_tokens": ["<a>", "<b>"],
            "chat_template": template,
        });
        let render = |config: &serde_json::Value, map: &str| {
            let files = [
                saved(&byte_level()),
                ("tokenizer_config.json", config.to_string()),
                ("special_tokens_map.json", map.into()),
            ];
            let dir = folder(&files);
            Tokenizer::from_hf_dir(dir.path()).unwrap().unwrap().apply_chat_template(&[], true).unwrap()
        };
        assert_eq!(render(&config, "{}"), "<|begin|>|<image>|<audio>|<think>|<tool>|False|False|False");

        // The second file counts where the first one does not list the added tokens.
        let map = r#"{"eos_token": "<|end|>", "image_token": {"content": "<img>"}}"#;
        assert_eq!(render(&config, map), "<|begin|>|<img>|<audio>|<think>|<tool>|False|True|False");
        let mut listed = config;
        listed["added_tokens_decoder"] = json!({});
        assert_eq!(render(&listed, map), "<|begin|>|<image>|<audio>|<think>|<tool>|False|False|False");
    }

    #[test]
    fn saved_truncation_and_padding_do_not_apply() {
        let mut tables = byte_level();
        tables.with_truncation(Some(tokenizers::TruncationParams { max_length: 4, ..Default::default() })).unwrap();
        tables.with_padding(Some(tokenizers::PaddingParams {
            strategy: tokenizers::PaddingStrategy::Fixed(64),
            ..Default::default()
        }));
        let dir = folder(&[saved(&tables)]);
        let tokenizer = Tokenizer::from_hf_dir(dir.path()).unwrap().unwrap();
        let tokens = tokenizer.encode(TEXTS[0], true).unwrap();
        assert_eq!(tokenizer.decode(&tokens, true).unwrap(), TEXTS[0]);
        assert!(!tokens[1..].contains(&0));
    }

    #[test]
    fn folders_that_do_not_work_say_why() {
        let empty = folder(&[]);
        assert!(Tokenizer::from_hf_dir(empty.path()).unwrap().is_none());

        let message = |dir: &TempDir| Tokenizer::from_hf_dir(dir.path()).unwrap_err().to_string();
        for name in ["tokenizer.model", "vocab.json"] {
            let dir = folder(&[(name, "{}".into())]);
            assert!(message(&dir).contains(name) && message(&dir).contains("tokenizer.json"), "{}", message(&dir));
        }
        let (name, text) = saved(&byte_level());
        for broken in [text[..text.len() / 2].to_owned(), String::new(), "{}".into(), text.replace("BPE", "XYZ")] {
            let dir = folder(&[(name, broken)]);
            assert!(message(&dir).contains("tokenizer.json: not a tokenizer"), "{}", message(&dir));
        }
        let dir = folder(&[(name, text), ("tokenizer_config.json", "{\"eos_token\":".into())]);
        assert!(message(&dir).contains("tokenizer_config.json: not valid JSON"), "{}", message(&dir));
    }
}
