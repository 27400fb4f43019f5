//! Text to token ids and back: tokenizers of Hugging Face folders and GGUF files, chat templates, and the decoding of a
//! growing sequence piece by piece up to a stop string.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::fs;
use std::io::{BufReader, ErrorKind};
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use candle_core::quantized::gguf_file::{Content, Value as GgufValue};
use candle_core::quantized::tokenizer::TokenizerFromGguf;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Value};
use tokenizers::decoders::{byte_fallback::ByteFallback, fuse::Fuse, sequence::Sequence as Decoders, strip::Strip};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::{Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, PreTokenizerWrapper, SplitDelimiterBehavior};

use crate::error::{Error, Result};

/// What a decoder writes for bytes that are not (yet) UTF-8.
const REPLACEMENT: char = char::REPLACEMENT_CHARACTER;

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
    tables: tokenizers::Tokenizer,
    /// Ids that `skip_special_tokens` leaves out.
    special: HashSet<u32>,
    /// "bos_token", "eos_token", ... with their texts: variables of the chat template.
    named: BTreeMap<String, String>,
    bos: Option<u32>,
    eos: Option<u32>,
    /// A template that does not compile is an error when it is used: the model is still good for plain text.
    chat: Option<std::result::Result<Environment<'static>, String>>,
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
        let tables = tokenizers::Tokenizer::from_bytes(bytes)
            .map_err(|error| Error::file(&path, format!("not a tokenizer ({error}); fetch the file again")))?;
        let config = read_json(&dir.join("tokenizer_config.json"))?.unwrap_or_default();
        let special_tokens_map = read_json(&dir.join("special_tokens_map.json"))?.unwrap_or_default();

        let mut named = BTreeMap::new();
        for name in ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"] {
            // A text, or an AddedToken object that holds it; null where the model has no such token.
            let text = |json: &serde_json::Value| {
                let token = json.get(name)?;
                token.as_str().or_else(|| token.get("content")?.as_str()).map(str::to_owned)
            };
            let text = if config.get(name).is_some() { text(&config) } else { text(&special_tokens_map) };
            if let Some(text) = text {
                named.insert(name.to_owned(), text);
            }
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

    /// The tokenizer that a GGUF file carries; `None` where it carries none.
    ///
    /// Byte-level BPE ("gpt2") is built by candle, after its metadata have been brought into the form that candle
    /// reads rightly: candle takes every pre-tokenizer name that it does not know for GPT-2's, "llama-bpe" among them,
    /// and that gives other tokens than the model was trained on. SentencePiece BPE ("llama") has scores in place of
    /// merges; its merges are found again as transformers does it: every way to put a token together from two others,
    /// in the order of the token's score.
    pub fn from_gguf(path: &Path) -> Result<Option<Self>> {
        let file = fs::File::open(path).map_err(|error| Error::file(path, format!("cannot be opened: {error}")))?;
        let content = Content::read(&mut BufReader::new(file))
            .map_err(|error| Error::file(path, format!("the GGUF header cannot be read: {error}")))?;
        gguf_tokenizer(path, content)
    }

    fn assemble(
        mut tables: tokenizers::Tokenizer,
        named: BTreeMap<String, String>,
        template: Option<String>,
    ) -> tokenizers::Result<Self> {
        // Saved settings for batches of training texts; a prompt is taken whole and as it is.
        tables.with_truncation(None)?;
        tables.with_padding(None);
        let added = tables.get_added_vocabulary().get_added_tokens_decoder();
        let special = added.iter().filter(|(_, token)| token.special).map(|(&id, _)| id).collect();
        let id = |name| named.get(name).and_then(|text: &String| tables.token_to_id(text));
        let (bos, eos) = (id("bos_token"), id("eos_token"));
        let chat = template.map(compile_chat_template);
        Ok(Self { shared: Arc::new(Shared { tables, special, named, bos, eos, chat }) })
    }

    /// The token ids of a text. `add_special_tokens` puts the tokens around it that the model expects at the ends of a
    /// text (often a BOS token). Special tokens spelled out in the text become what they say either way.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding = self.shared.tables.encode_fast(text, add_special_tokens);
        Ok(encoding.map_err(|error| Error::Tokenizer(error.to_string()))?.get_ids().to_vec())
    }

    /// The text of token ids. Ids outside the vocabulary (models pad their embedding table) have no text. Bytes that
    /// are not UTF-8 become U+FFFD.
    pub fn decode(&self, tokens: &[u32], skip_special_tokens: bool) -> Result<String> {
        let text = self.shared.tables.decode(tokens, skip_special_tokens);
        text.map_err(|error| Error::Tokenizer(error.to_string()))
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
        self.shared.tables.get_vocab_size(true)
    }

    /// Whether [`apply_chat_template`](Self::apply_chat_template) has a template to apply.
    pub fn has_chat_template(&self) -> bool {
        self.shared.chat.is_some()
    }

    /// The text that the model's template makes of a conversation, special tokens spelled out in it.
    /// `add_generation_prompt` ends it where the assistant's next message begins.
    ///
    /// Templates are rendered as transformers does: the same whitespace rules and the same variables and functions
    /// (`strftime_now` gives UTC).
    pub fn apply_chat_template(&self, messages: &[ChatMessage], add_generation_prompt: bool) -> Result<String> {
        let environment = match &self.shared.chat {
            Some(Ok(environment)) => environment,
            Some(Err(reason)) => {
                return Err(Error::ChatTemplate(format!(
                    "it does not compile: {reason}; give the prompt as plain text"
                )));
            }
            None => {
                return Err(Error::ChatTemplate(
                    "this model comes without one: give the prompt as plain text, or put the template as \
                     `chat_template.jinja` into the model's folder"
                        .to_owned(),
                ));
            }
        };
        let messages: Vec<Value> = messages
            .iter()
            .map(|message| Value::from_pairs([("role", &message.role), ("content", &message.content)]))
            .collect();
        let mut variables = vec![
            ("messages", Value::from(messages)),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
            // Defined and None, as transformers passes them: templates ask `tools is not none`.
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ];
        variables.extend(self.shared.named.iter().map(|(name, text)| (name.as_str(), Value::from(text))));
        let rendered = environment.get_template(TEMPLATE).and_then(|template| {
            // The state of a rendering is the caller's; nothing of it is kept.
            template.render(Value::from_pairs(variables))
        });
        rendered.map_err(|error| Error::ChatTemplate(error.to_string()))
    }

    /// The prompt for the assistant's next message in a conversation. The template writes the special tokens, so none
    /// are added to it.
    pub fn encode_chat(&self, messages: &[ChatMessage]) -> Result<Vec<u32>> {
        self.encode(&self.apply_chat_template(messages, true)?, false)
    }

    /// Whether decoding takes notice of a token at all.
    fn has_text(&self, token: u32, skip_special_tokens: bool) -> bool {
        let skipped = skip_special_tokens && self.shared.special.contains(&token);
        !skipped && self.shared.tables.id_to_token(token).is_some()
    }
}

fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::file(path, format!("cannot be read: {error}"))),
    }
}

fn read_json(path: &Path) -> Result<Option<serde_json::Value>> {
    let Some(bytes) = read_if_there(path)? else { return Ok(None) };
    match serde_json::from_slice(&bytes) {
        Ok(json) => Ok(Some(json)),
        Err(error) => Err(Error::file(path, format!("not valid JSON ({error}); fetch the file again"))),
    }
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

// GGUF

fn gguf_tokenizer(path: &Path, mut content: Content) -> Result<Option<Tokenizer>> {
    let fault = |reason: String| Error::file(path, reason);
    let Some(tokens) = content.metadata.get("tokenizer.ggml.tokens") else { return Ok(None) };
    let tokens = gguf_strings(tokens).ok_or_else(|| fault("`tokenizer.ggml.tokens` is not a list of texts".into()))?;
    let kind = match content.metadata.get("tokenizer.ggml.model") {
        Some(GgufValue::String(kind)) => kind.clone(),
        _ => return Err(fault("`tokenizer.ggml.model` is missing: the kind of the tokenizer is unknown".into())),
    };
    let types = match content.metadata.get("tokenizer.ggml.token_type") {
        Some(GgufValue::Array(types)) => types.iter().map(gguf_integer).collect(),
        _ => Vec::new(),
    };
    let of_type = |wanted: u32| {
        let tokens = tokens.iter().zip(&types).filter(move |(_, kind)| **kind == Some(wanted));
        tokens.map(|(token, _)| token.clone())
    };

    // Special tokens by name, with llama.cpp's defaults for a SentencePiece file that does not say.
    let spm = kind == "llama";
    let mut special = BTreeMap::new();
    for (name, keys, default) in [
        ("bos_token", ["tokenizer.ggml.bos_token_id", ""], spm.then_some(1)),
        ("eos_token", ["tokenizer.ggml.eos_token_id", ""], spm.then_some(2)),
        ("unk_token", ["tokenizer.ggml.unknown_token_id", "tokenizer.ggml.unk_token_id"], spm.then_some(0)),
        ("pad_token", ["tokenizer.ggml.padding_token_id", "tokenizer.ggml.pad_token_id"], None),
    ] {
        let given = keys.iter().find_map(|&key| Some((key, content.metadata.get(key)?)));
        let id = match given {
            Some((key, value)) => match gguf_integer(value).filter(|&id| (id as usize) < tokens.len()) {
                Some(id) => Some(id),
                None => return Err(fault(format!("`{key}` is {value:?}, and there are {} tokens", tokens.len()))),
            },
            None => default.filter(|&id| (id as usize) < tokens.len()),
        };
        if let Some(id) = id {
            special.insert(name, (id, tokens[id as usize].clone()));
        }
    }

    let mut tables = match kind.as_str() {
        "gpt2" => {
            let pre = match content.metadata.get("tokenizer.ggml.pre") {
                Some(GgufValue::String(pre)) => pre.clone(),
                _ => {
                    return Err(fault(
                        "`tokenizer.ggml.pre` is missing, so how texts are split is unknown: take a file converted \
                         after April 2024"
                            .into(),
                    ));
                }
            };
            let split = ByteLevelSplit::of(&pre)?;
            let has_bos = special.contains_key("bos_token");
            let metadata = &mut content.metadata;
            let text = |text: &str| GgufValue::String(text.to_owned());
            metadata.insert("tokenizer.ggml.pre".into(), text(split.candle));
            metadata.entry("tokenizer.ggml.ignore_merges".into()).or_insert(GgufValue::Bool(split.whole_words));
            let add_bos = GgufValue::Bool(split.whole_words && has_bos);
            metadata.entry("tokenizer.ggml.add_bos_token".into()).or_insert(add_bos);
            // Candle makes tokens of types 4 (user-defined: visible, like a tag around a model's reasoning) and 5
            // (unused) special, and decoding would drop them.
            let visible =
                types.iter().map(|&kind| GgufValue::U32(kind.filter(|kind| ![4, 5].contains(kind)).unwrap_or(1)));
            metadata.insert("tokenizer.ggml.token_type".into(), GgufValue::Array(visible.collect()));
            let mut tables = tokenizers::Tokenizer::from_gguf(&content)
                .map_err(|error| fault(format!("the tokenizer cannot be built: {error}")))?;
            if let Some(pre_tokenizer) = split.pre_tokenizer {
                tables.with_pre_tokenizer(Some(pre_tokenizer));
            }
            tables
        }
        "llama" => sentencepiece(path, &content, &tokens, &types, &special)?,
        _ => {
            return Err(Error::Unsupported {
                what: "GGUF tokenizer",
                value: kind,
                hint: "`gpt2` (byte-level BPE) and `llama` (SentencePiece BPE) are; take the model's tokenizer.json"
                    .into(),
            });
        }
    };
    let user_defined = of_type(4).map(|token| AddedToken::from(token, false).normalized(false));
    tables.add_tokens(user_defined).map_err(|error| fault(error.to_string()))?;

    let named = special.into_iter().map(|(name, (_, text))| (name.to_owned(), text)).collect();
    let template = match content.metadata.get("tokenizer.chat_template") {
        Some(GgufValue::String(template)) => Some(template.clone()),
        _ => None,
    };
    Tokenizer::assemble(tables, named, template).map(Some).map_err(|error| fault(error.to_string()))
}

/// How byte-level BPE splits a text into words before the merges.
struct ByteLevelSplit {
    /// The name that makes candle do it, or nearly.
    candle: &'static str,
    /// What to put in place of candle's choice.
    pre_tokenizer: Option<PreTokenizerWrapper>,
    /// A word that is a token as a whole becomes it, whatever the merges say. The same families begin a text with BOS
    /// unless the file says otherwise.
    whole_words: bool,
}

impl ByteLevelSplit {
    /// By the names that llama.cpp's conversion gives in `tokenizer.ggml.pre`.
    fn of(name: &str) -> Result<Self> {
        let gpt2 = || ByteLevel::new(false, true, true);
        let split = match name {
            "qwen2" | "deepseek-r1-qwen" | "megrez" => {
                Self { candle: "qwen2", pre_tokenizer: None, whole_words: false }
            }
            "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "pixtral" | "lfm2" => {
                Self { candle: "llama3", pre_tokenizer: None, whole_words: true }
            }
            "smaug-bpe" => Self { candle: "smaug-bpe", pre_tokenizer: None, whole_words: false },
            // Candle's has a space put before the text, GPT-2's own does not.
            "gpt-2" | "gpt2" | "phi-2" => {
                Self { candle: "gpt-2", pre_tokenizer: Some(gpt2().into()), whole_words: false }
            }
            "smollm" | "starcoder" => {
                let digits_alone = PreTokenizers::new(vec![Digits::new(true).into(), gpt2().into()]);
                Self { candle: "gpt-2", pre_tokenizer: Some(digits_alone.into()), whole_words: false }
            }
            // Mistral's since Nemo.
            "tekken" => {
                let words = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
                let split = Split::new(SplitPattern::Regex(words.into()), SplitDelimiterBehavior::Isolated, false)
                    .map_err(|error| Error::Tokenizer(error.to_string()))?;
                let words = PreTokenizers::new(vec![split.into(), ByteLevel::new(false, true, false).into()]);
                Self { candle: "gpt-2", pre_tokenizer: Some(words.into()), whole_words: true }
            }
            _ => {
                return Err(Error::Unsupported {
                    what: "GGUF pre-tokenizer",
                    value: name.to_owned(),
                    hint: "`qwen2`, `llama-bpe`, `smaug-bpe`, `gpt-2`, `smollm`, `starcoder` and `tekken` are; take \
                           the model's tokenizer.json"
                        .into(),
                });
            }
        };
        Ok(split)
    }
}

/// The tokenizer of Llama 2 and Mistral before Nemo: SentencePiece BPE with byte tokens for what has no token.
fn sentencepiece(
    path: &Path,
    content: &Content,
    tokens: &[String],
    types: &[Option<u32>],
    special: &BTreeMap<&'static str, (u32, String)>,
) -> Result<tokenizers::Tokenizer> {
    let fault = |reason: String| Error::file(path, reason);
    let scores = match content.metadata.get("tokenizer.ggml.scores") {
        Some(GgufValue::Array(scores)) => scores.iter().map(|score| score.to_f32().ok()).collect::<Option<Vec<_>>>(),
        _ => None,
    };
    let scores = scores
        .filter(|scores| scores.len() == tokens.len())
        .ok_or_else(|| fault("`tokenizer.ggml.scores` does not have one number for each token".into()))?;
    let flag = |key: &str, default: bool| match content.metadata.get(key) {
        Some(GgufValue::Bool(flag)) => *flag,
        _ => default,
    };

    let vocab: Vocab = tokens.iter().enumerate().map(|(id, token)| (token.clone(), id as u32)).collect();
    // Only ordinary tokens come out of merges (type 1; a file without types has ordinary ones only).
    let mut merges = Vec::new();
    for (id, token) in tokens.iter().enumerate().filter(|(id, _)| matches!(types.get(*id), None | Some(Some(1)))) {
        for (middle, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(middle);
            if let (Some(&left_id), Some(&right_id)) = (vocab.get(left), vocab.get(right)) {
                merges.push((scores[id], left_id, right_id));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
    let text = |id: u32| tokens[id as usize].clone();
    let merges = merges.into_iter().map(|(_, left, right)| (text(left), text(right))).collect();
    let mut bpe = BPE::builder().vocab_and_merges(vocab, merges).byte_fallback(true).fuse_unk(true);
    if let Some((_, unknown)) = special.get("unk_token") {
        bpe = bpe.unk_token(unknown.clone());
    }

    let build = || -> tokenizers::Result<tokenizers::Tokenizer> {
        let mut tables = tokenizers::Tokenizer::new(bpe.build()?);
        let mut normalizers = vec![Replace::new(" ", "▁")?.into()];
        let mut decoders = vec![Replace::new("▁", " ")?.into(), ByteFallback::new().into(), Fuse::new().into()];
        if flag("tokenizer.ggml.add_space_prefix", true) {
            normalizers.insert(0, Prepend::new("▁".into()).into());
            decoders.push(Strip::new(' ', 1, 0).into());
        }
        tables.with_normalizer(Some(Normalizers::new(normalizers)))?;
        tables.with_decoder(Some(Decoders::new(decoders)));

        let bos = special.get("bos_token").filter(|_| flag("tokenizer.ggml.add_bos_token", true));
        let eos = special.get("eos_token").filter(|_| flag("tokenizer.ggml.add_eos_token", false));
        let names = |token: Option<&(u32, String)>| token.map(|(_, text)| text.clone());
        let around: Vec<String> = [names(bos), Some("$0".into()), names(eos)].into_iter().flatten().collect();
        let ids: Vec<(String, u32)> = [bos, eos].into_iter().flatten().map(|(id, text)| (text.clone(), *id)).collect();
        tables
            .with_post_processor(Some(TemplateProcessing::builder().try_single(around)?.special_tokens(ids).build()?));

        // Types 2 (unknown) and 3 (control), and what the file names as special without giving types.
        let control = tokens.iter().zip(types).filter(|(_, kind)| matches!(kind, Some(2 | 3))).map(|(token, _)| token);
        let control = control.chain(special.values().map(|(_, text)| text));
        tables.add_special_tokens(control.map(|token| AddedToken::from(token.clone(), true)))?;
        Ok(tables)
    };
    build().map_err(|error| fault(format!("the tokenizer cannot be built: {error}")))
}

fn gguf_strings(value: &GgufValue) -> Option<Vec<String>> {
    let GgufValue::Array(values) = value else { return None };
    values.iter().map(|value| if let GgufValue::String(text) = value { Some(text.clone()) } else { None }).collect()
}

fn gguf_integer(value: &GgufValue) -> Option<u32> {
    match *value {
        GgufValue::U8(n) => Some(n.into()),
        GgufValue::U16(n) => Some(n.into()),
        GgufValue::U32(n) => Some(n),
        GgufValue::U64(n) => n.try_into().ok(),
        GgufValue::I8(n) => n.try_into().ok(),
        GgufValue::I16(n) => n.try_into().ok(),
        GgufValue::I32(n) => n.try_into().ok(),
        GgufValue::I64(n) => n.try_into().ok(),
        _ => None,
    }
}

// Chat templates

/// The one template's name in its environment. Without an extension nothing is escaped.
const TEMPLATE: &str = "chat template";

fn compile_chat_template(source: String) -> std::result::Result<Environment<'static>, String> {
    let mut environment = Environment::new();
    // `trim_blocks` and `lstrip_blocks` are what transformers sets, and templates count on it.
    let syntax = environment.syntax().to_builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(|error| error.to_string())?);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", to_json);
    environment.add_function("raise_exception", |message: String| -> std::result::Result<String, minijinja::Error> {
        Err(minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: String| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        strftime(&format, now.as_secs())
    });
    let source = without_generation_tags(&source);
    environment.add_template_owned(TEMPLATE, source).map_err(|error| error.to_string())?;
    Ok(environment)
}

/// `{% generation %}` marks what the assistant said, for training; it changes nothing in the text. Jinja does not know
/// it (transformers adds it), so it becomes an `if` that is always taken.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        let Some(end) = tag.find("%}") else { break };
        let (tag, after) = tag.split_at(end + 2);
        let inside = tag[2..end].trim_matches(['-', '+']);
        out.push_str(before);
        match inside.trim() {
            "generation" => out.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endif")),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out + rest
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`, which is what transformers' filter is; the one of
/// Jinja escapes for HTML.
fn to_json(value: &Value, kwargs: Kwargs) -> std::result::Result<String, minijinja::Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    if kwargs.get::<Option<bool>>("ensure_ascii")? == Some(true) {
        let reason = "tojson(ensure_ascii=true) is not supported";
        return Err(minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, reason));
    }
    kwargs.assert_all_used()?;
    let mut out = String::new();
    write_json(&mut out, value, indent, 0)?;
    Ok(out)
}

fn write_json(
    out: &mut String,
    value: &Value,
    indent: Option<usize>,
    depth: usize,
) -> std::result::Result<(), minijinja::Error> {
    let new_line = |out: &mut String, depth: usize| {
        if let Some(indent) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    // A comma is followed by a space, or by a new line where there is an indent.
    let comma = if indent.is_some() { "," } else { ", " };
    match value.kind() {
        ValueKind::Undefined | ValueKind::None => out.push_str("null"),
        // A template writes Python's `True`.
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => out.push_str(&value.to_string()),
        ValueKind::Map => {
            out.push('{');
            let mut empty = true;
            for key in value.try_iter()? {
                out.push_str(if empty { "" } else { comma });
                empty = false;
                new_line(out, depth + 1);
                out.push_str(&json_text(&key));
                out.push_str(": ");
                write_json(out, &value.get_item(&key)?, indent, depth + 1)?;
            }
            if !empty {
                new_line(out, depth);
            }
            out.push('}');
        }
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            let mut empty = true;
            for item in value.try_iter()? {
                out.push_str(if empty { "" } else { comma });
                empty = false;
                new_line(out, depth + 1);
                write_json(out, &item, indent, depth + 1)?;
            }
            if !empty {
                new_line(out, depth);
            }
            out.push(']');
        }
        _ => out.push_str(&json_text(value)),
    }
    Ok(())
}

fn json_text(value: &Value) -> String {
    serde_json::Value::from(value.to_string()).to_string()
}

/// The directives of C's `strftime` that templates use, in UTC.
fn strftime(format: &str, unix_seconds: u64) -> String {
    const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let days = unix_seconds / 86_400;
    let (hour, minute, second) = (unix_seconds / 3600 % 24, unix_seconds / 60 % 60, unix_seconds % 60);
    // Howard Hinnant's `civil_from_days`: years begin in March, so that the leap day is the last one.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let leap = year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400);
    let ordinal = if month > 2 { day_of_year + 60 + u64::from(leap) } else { day_of_year - 305 };
    let (day_name, month_name) = (DAYS[((days + 3) % 7) as usize], MONTHS[(month - 1) as usize]);
    let twelve = if hour.is_multiple_of(12) { 12 } else { hour % 12 };

    let mut out = String::new();
    let mut directives = format.chars();
    while let Some(c) = directives.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = directives.next();
        // `%-d` is glibc's way to ask for no leading zero.
        let bare = directive == Some('-');
        if bare {
            directive = directives.next();
        }
        let two = |n: u64| if bare { n.to_string() } else { format!("{n:02}") };
        match directive {
            Some('Y') => out.push_str(&year.to_string()),
            Some('y') => out.push_str(&two(year % 100)),
            Some('m') => out.push_str(&two(month)),
            Some('B') => out.push_str(month_name),
            Some('b' | 'h') => out.push_str(&month_name[..3]),
            Some('d') => out.push_str(&two(day)),
            Some('e') => out.push_str(&format!("{day:2}")),
            Some('j') => out.push_str(&if bare { ordinal.to_string() } else { format!("{ordinal:03}") }),
            Some('A') => out.push_str(day_name),
            Some('a') => out.push_str(&day_name[..3]),
            Some('H') => out.push_str(&two(hour)),
            Some('I') => out.push_str(&two(twelve)),
            Some('M') => out.push_str(&two(minute)),
            Some('S') => out.push_str(&two(second)),
            Some('p') => out.push_str(if hour < 12 { "AM" } else { "PM" }),
            Some('F') => out.push_str(&format!("{year}-{month:02}-{day:02}")),
            Some('T') => out.push_str(&format!("{hour:02}:{minute:02}:{second:02}")),
            Some('Z') => out.push_str("UTC"),
            Some('z') => out.push_str("+0000"),
            Some('%') => out.push('%'),
            Some(other) => out.extend(['%', other]),
            None => out.push('%'),
        }
    }
    out
}

// Decoding piece by piece

/// Tokens in a row without new text after which replacement characters count as text. A character has at most four
/// bytes and a token at least one, so a valid text never comes near this.
const STALLED: usize = 16;
/// Tokens after which the window is cut although its text still ends within a character.
const LONGEST_WINDOW: usize = 48;
/// Tokens that such a cut leaves: more than can hold text that is not out yet.
const CUT_WINDOW: usize = 24;

/// Turns the tokens of one sequence into text as they come.
///
/// A piece never changes once it is out: bytes of a character that is not whole yet are held back. The pieces put
/// together, with what [`finish`](Self::finish) returns, are what [`Tokenizer::decode`] makes of all the tokens at once,
/// wherever that is valid text.
///
/// A token cannot be decoded on its own: a SentencePiece decoder drops the space before a text's first word, and a
/// character may be spread over several tokens. So a window of the last tokens is decoded, and what was given out of its
/// text before is left away, as text-generation-inference does with its prefix and read offsets. The window moves on
/// whenever its text ends with a whole character, and is a few tokens long; the cost of a token does not depend on the
/// length of the text.
#[derive(Debug, Clone)]
pub struct IncrementalDecoder {
    tokenizer: Tokenizer,
    skip_special_tokens: bool,
    window: Vec<u32>,
    /// So many tokens at the front of the window have all their text out.
    complete: usize,
    /// The front of the window's text that is out.
    given: String,
    /// Tokens since text came out.
    stalled: usize,
}

impl IncrementalDecoder {
    /// For a text that begins with the first token.
    pub fn new(tokenizer: &Tokenizer, skip_special_tokens: bool) -> Self {
        Self {
            tokenizer: tokenizer.clone(),
            skip_special_tokens,
            window: Vec::new(),
            complete: 0,
            given: String::new(),
            stalled: 0,
        }
    }

    /// For a text that goes on from `prompt`: the space between the prompt's last word and the first new one is part of
    /// the text then.
    pub fn continuing(tokenizer: &Tokenizer, prompt: &[u32], skip_special_tokens: bool) -> Result<Self> {
        let mut decoder = Self::new(tokenizer, skip_special_tokens);
        let with_text = prompt.iter().copied().filter(|&token| tokenizer.has_text(token, skip_special_tokens));
        let mut window: Vec<u32> = with_text.rev().take(8).collect();
        window.reverse();
        let text = tokenizer.decode(&window, skip_special_tokens)?;
        decoder.given = text.trim_end_matches(REPLACEMENT).to_owned();
        decoder.complete = window.len();
        decoder.window = window;
        Ok(decoder)
    }

    /// The text that is certain with this token, and was not before. Often empty.
    pub fn push(&mut self, token: u32) -> Result<String> {
        if !self.tokenizer.has_text(token, self.skip_special_tokens) {
            return Ok(String::new());
        }
        self.window.push(token);
        self.stalled += 1;
        let text = self.window_text(0)?;
        let settled = text.trim_end_matches(REPLACEMENT).len();
        let whole = settled == text.len();
        let mut piece = String::new();
        match text.strip_prefix(self.given.as_str()) {
            // A token without text stays in the window: after it a word is not the first any more.
            Some("") => {}
            Some(rest) if whole => {
                piece.push_str(rest);
                self.move_on()?;
            }
            Some(rest) => {
                // Everything before the last replacement character is certain if that goes on for too long, so those
                // are in the text; the last one may still be the beginning of a character.
                let certain = if self.stalled > STALLED { text.len() - REPLACEMENT.len_utf8() } else { settled };
                if let Some(certain) = certain.checked_sub(self.given.len()).filter(|&certain| certain > 0) {
                    piece.push_str(&rest[..certain]);
                    self.given.push_str(&piece);
                    self.stalled = 0;
                }
            }
            // Text that is out has become another one. A byte-fallback decoder does that with a run of byte tokens,
            // which it shows as replacement characters until its last character is whole. If it never is, the text was
            // invalid, and what the tokens say on their own is as good as anything.
            None if whole || self.stalled > STALLED => {
                piece = self.window_text(self.complete)?;
                self.move_on()?;
            }
            None => {}
        }
        if self.window.len() > LONGEST_WINDOW {
            piece.push_str(&self.cut()?);
        }
        Ok(piece)
    }

    /// The text that was held back, with replacement characters for what never became whole. The decoder is as new
    /// after it.
    pub fn finish(&mut self) -> Result<String> {
        let text = self.window_text(0)?;
        let rest = match text.strip_prefix(self.given.as_str()) {
            Some(rest) => rest.to_owned(),
            None => self.window_text(self.complete)?,
        };
        *self = Self::new(&self.tokenizer, self.skip_special_tokens);
        Ok(rest)
    }

    fn window_text(&self, from: usize) -> Result<String> {
        self.tokenizer.decode(&self.window[from..], self.skip_special_tokens)
    }

    /// All the text is out: keep the tokens of the last piece as what goes before the next.
    fn move_on(&mut self) -> Result<()> {
        self.window.drain(..self.complete);
        self.complete = self.window.len();
        self.given = self.window_text(0)?;
        self.stalled = 0;
        Ok(())
    }

    /// Shortens a window whose tokens all end within characters. The text of the shorter window begins with rubbish,
    /// but it ends in the same way; where it does not, the text that was held back is returned.
    fn cut(&mut self) -> Result<String> {
        let text = self.window_text(0)?;
        let held = text.strip_prefix(self.given.as_str());
        let dropped = self.window.len() - CUT_WINDOW;
        self.window.drain(..dropped);
        let text_after = self.window_text(0)?;
        if let Some(out) = held.and_then(|held| text_after.strip_suffix(held)) {
            self.given = out.to_owned();
            self.complete = self.complete.saturating_sub(dropped);
            return Ok(String::new());
        }
        let held = held.unwrap_or_default().to_owned();
        self.complete = self.window.len();
        self.given = text_after;
        self.stalled = 0;
        Ok(held)
    }
}

/// Looks for stop strings in a text that comes in pieces.
///
/// What is released does not depend on where the pieces are cut: the match that ends first wins, the longest of those
/// that end together.
#[derive(Debug, Clone)]
pub struct StopStringMatcher {
    stops: Vec<String>,
    longest: usize,
    /// Text that may be the beginning of a stop string.
    held: String,
    matched: Option<usize>,
}

/// What one piece leads to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StopMatch {
    /// Text that no stop string can take back any more.
    pub text: String,
    /// The index of the stop string that was found. The text ends before it, and what came after it is dropped.
    pub matched: Option<usize>,
}

impl StopStringMatcher {
    /// A matcher for these texts. Empty ones are left out of account.
    pub fn new(stops: &[String]) -> Self {
        let longest = stops.iter().map(String::len).max().unwrap_or(0);
        Self { stops: stops.to_vec(), longest, held: String::new(), matched: None }
    }

    /// Takes the next piece. After a match nothing is released any more.
    pub fn push(&mut self, piece: &str) -> StopMatch {
        if self.matched.is_some() {
            return StopMatch { text: String::new(), matched: self.matched };
        }
        self.held.push_str(piece);
        let stops = self.stops.iter().enumerate().filter(|(_, stop)| !stop.is_empty());
        let found = stops.filter_map(|(i, stop)| self.held.find(stop).map(|start| (start + stop.len(), start, i)));
        if let Some((_, start, i)) = found.min() {
            self.matched = Some(i);
            let mut text = std::mem::take(&mut self.held);
            text.truncate(start);
            return StopMatch { text, matched: self.matched };
        }
        let earliest = (self.held.len() + 1).saturating_sub(self.longest);
        let starts = self.held.char_indices().map(|(i, _)| i).skip_while(|&i| i < earliest);
        let first = starts.into_iter().find(|&i| self.stops.iter().any(|stop| stop.starts_with(&self.held[i..])));
        let held = self.held.split_off(first.unwrap_or(self.held.len()));
        StopMatch { text: std::mem::replace(&mut self.held, held), matched: None }
    }

    /// The text that was held back, once the last piece has been: no stop string follows. Empty after a match.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use proptest::prelude::*;
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{RngCore, SeedableRng};
    use serde_json::json;
    use tempfile::TempDir;
    use tokenizers::models::TrainerWrapper;
    use tokenizers::models::bpe::BpeTrainer;
    use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};

    use super::*;

    const TEXTS: [&str; 8] = [
        "Once upon a time there was a small model that lived on two devices.",
        "It said: hello, world! And the world said hello to it, again and again.",
        "数字と漢字のテスト。模型住在两个设备上，它说：你好，世界！你好，你好。",
        "Emoji 😀😀 🎉🎉 👩‍👩‍👧‍👦 🇩🇪 and flags, 👍🏽 with tones 👍🏽👍🏽.",
        "Cafe\u{301} nai\u{308}ve re\u{301}sume\u{301}, and the composed é ï ü too: café naïve résumé.",
        "fn main() {\n    println!(\"{}\", 1234567890);\n}\n\n\tindented\r\n",
        "Привет, мир! Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم.",
        "  two spaces,   three,\u{a0}one that does not break, and a long tail of dots.....",
    ];

    fn with_bos(tables: &mut tokenizers::Tokenizer, token: &str, id: u32) {
        let around = format!("{token} $0");
        let mut builder = TemplateProcessing::builder();
        builder.try_single(around).unwrap().special_tokens(vec![(token, id)]);
        tables.with_post_processor(Some(builder.build().unwrap()));
    }

    /// Byte-level BPE trained on the texts above, 256 bytes and some hundred merges.
    fn byte_level() -> tokenizers::Tokenizer {
        let mut tables = tokenizers::Tokenizer::new(BPE::default());
        tables.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
        tables.with_decoder(Some(ByteLevel::new(false, true, true)));
        let special = ["<|begin|>", "<|end|>"].map(|token| AddedToken::from(token, true));
        let mut trainer: TrainerWrapper = BpeTrainer::builder()
            .vocab_size(600)
            .show_progress(false)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(special.to_vec())
            .build()
            .into();
        tables.train(&mut trainer, TEXTS.iter()).unwrap();
        with_bos(&mut tables, "<|begin|>", 0);
        tables
    }

    /// How the space before the first word of a text comes and goes in a SentencePiece tokenizer.
    #[derive(Clone, Copy, Debug)]
    enum Spaces {
        /// Llama 2: put there by the normalizer, stripped by the decoder.
        Normalizer,
        /// Newer conversions of the same: put there and taken away by `Metaspace`.
        Metaspace,
        /// Gemma: there is none.
        None,
    }

    /// BPE over characters with `▁` for a space; rare characters have no token and become bytes.
    fn sentencepiece_like(spaces: Spaces) -> tokenizers::Tokenizer {
        let mut special: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
        special.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
        let mut trainer: TrainerWrapper = BpeTrainer::builder()
            .vocab_size(3 + 256 + 300)
            .show_progress(false)
            .limit_alphabet(60)
            .special_tokens(special.iter().map(|token| AddedToken::from(token.as_str(), true)).collect())
            .build()
            .into();
        let mut trained = tokenizers::Tokenizer::new(BPE::default());
        trained.with_pre_tokenizer(Some(Metaspace::new('▁', PrependScheme::Always, true)));
        trained.train(&mut trainer, TEXTS.iter()).unwrap();

        // The byte tokens are tokens of the model, not added ones, so start again from the trained model.
        let mut saved: serde_json::Value = serde_json::from_str(&trained.to_string(false).unwrap()).unwrap();
        saved["model"]["byte_fallback"] = json!(true);
        saved["model"]["unk_token"] = json!("<unk>");
        saved["model"]["fuse_unk"] = json!(true);
        saved["added_tokens"].as_array_mut().unwrap().truncate(3);
        saved["pre_tokenizer"] = json!(null);
        let mut tables = tokenizers::Tokenizer::from_bytes(saved.to_string()).unwrap();
        let replace = || Replace::new(" ", "▁").unwrap().into();
        let mut decoders = vec![Replace::new("▁", " ").unwrap().into(), ByteFallback::new().into(), Fuse::new().into()];
        match spaces {
            Spaces::Normalizer => {
                let prepend = Prepend::new("▁".into()).into();
                tables.with_normalizer(Some(Normalizers::new(vec![prepend, replace()]))).unwrap();
                decoders.push(Strip::new(' ', 1, 0).into());
            }
            Spaces::Metaspace => {
                let metaspace = Metaspace::new('▁', PrependScheme::First, false);
                tables.with_pre_tokenizer(Some(metaspace.clone()));
                decoders = vec![ByteFallback::new().into(), metaspace.into()];
            }
            Spaces::None => {
                tables.with_normalizer(Some(Normalizers::new(vec![replace()]))).unwrap();
            }
        }
        tables.with_decoder(Some(Decoders::new(decoders)));
        with_bos(&mut tables, "<s>", 1);
        tables
    }

    fn plain(tables: tokenizers::Tokenizer) -> Tokenizer {
        Tokenizer::assemble(tables, BTreeMap::new(), None).unwrap()
    }

    fn all_kinds() -> Vec<Tokenizer> {
        let mut kinds = vec![plain(byte_level())];
        kinds.extend([Spaces::Normalizer, Spaces::Metaspace, Spaces::None].map(|s| plain(sentencepiece_like(s))));
        kinds
    }

    /// The pieces of a sequence, the last one from `finish`.
    fn pieces(mut decoder: IncrementalDecoder, tokens: &[u32]) -> Vec<String> {
        let mut pieces = Vec::new();
        for &token in tokens {
            pieces.push(decoder.push(token).unwrap());
            assert!(decoder.window.len() <= LONGEST_WINDOW);
        }
        pieces.push(decoder.finish().unwrap());
        pieces
    }

    fn chat_model(template: &str) -> Tokenizer {
        let named = [("bos_token", "<|begin|>"), ("eos_token", "<|end|>")];
        let named = named.map(|(name, text)| (name.to_owned(), text.to_owned())).into();
        Tokenizer::assemble(byte_level(), named, Some(template.to_owned())).unwrap()
    }

    fn folder(files: &[(&str, String)]) -> TempDir {
        let dir = TempDir::new().unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    fn saved(tables: &tokenizers::Tokenizer) -> (&'static str, String) {
        ("tokenizer.json", tables.to_string(false).unwrap())
    }

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
    fn pieces_add_up_and_are_whole() {
        let mut random = ChaCha8Rng::seed_from_u64(1);
        let alphabet: Vec<char> = TEXTS.concat().chars().chain("𝄞ẅ\u{200d}€".chars()).collect();
        for tokenizer in all_kinds() {
            let mut texts: Vec<String> = TEXTS.map(str::to_owned).to_vec();
            texts.push(TEXTS.join("\n\n"));
            for length in 1..80 {
                let character = |_| alphabet[random.next_u32() as usize % alphabet.len()];
                texts.push((0..length).map(character).collect());
            }
            for text in texts {
                for specials in [true, false] {
                    let tokens = tokenizer.encode(&text, specials).unwrap();
                    let whole = tokenizer.decode(&tokens, true).unwrap();
                    let pieces = pieces(IncrementalDecoder::new(&tokenizer, true), &tokens);
                    assert_eq!(pieces.concat(), whole);
                    assert!(pieces.iter().all(|piece| !piece.contains(REPLACEMENT)), "{pieces:?}");
                    assert_eq!(pieces.last().unwrap(), "", "all of a valid text is out with its last token");
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        #[test]
        fn pieces_of_random_tokens_add_up(
            seed in any::<u64>(), length in 1usize..120, bytes_only in any::<bool>(), skip in any::<bool>(),
        ) {
            thread_local!(static KINDS: Vec<Tokenizer> = all_kinds());
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            KINDS.with(|kinds| for (i, tokenizer) in kinds.iter().enumerate() {
                // The first 260 or so ids are the special tokens and the single bytes.
                let range = if bytes_only { 260 } else { tokenizer.vocab_size() as u32 + 5 };
                let tokens: Vec<u32> = (0..length).map(|_| random.next_u32() % range).collect();
                let whole = tokenizer.decode(&tokens, skip).unwrap();
                let pieces = pieces(IncrementalDecoder::new(tokenizer, skip), &tokens);
                // Bytes that are not UTF-8: exact for byte-level tokens, which do not change what was before them.
                if i == 0 || !whole.contains(REPLACEMENT) {
                    assert_eq!(pieces.concat(), whole, "{tokens:?}");
                }
            });
        }

        #[test]
        fn stop_strings_do_not_depend_on_the_pieces(
            text in "[abc]{0,40}",
            stops in proptest::collection::vec("[abc]{1,5}", 0..4),
            cuts in proptest::collection::vec(1usize..6, 0..40),
        ) {
            let mut matcher = StopStringMatcher::new(&stops);
            let (mut out, mut rest, mut matched) = (String::new(), text.as_str(), None);
            for cut in cuts {
                let (piece, after) = rest.split_at(cut.min(rest.len()));
                rest = after;
                let step = matcher.push(piece);
                out.push_str(&step.text);
                matched = step.matched;
                // What is out is never the beginning of a stop string in what follows.
                prop_assert!(matched.is_some() || stops.iter().all(|stop| !out.contains(stop.as_str())));
            }
            let step = matcher.push(rest);
            out.push_str(&step.text);
            matched = matched.or(step.matched);
            out.push_str(&matcher.finish());

            // By definition: go through the text and stop at the first position at which a stop string ends.
            let end = (0..=text.len()).find(|&end| stops.iter().any(|stop| text[..end].ends_with(stop.as_str())));
            match end {
                Some(end) => {
                    let ending = stops.iter().filter(|stop| text[..end].ends_with(stop.as_str()));
                    let longest = ending.max_by_key(|stop| stop.len()).unwrap();
                    prop_assert_eq!(&out, &text[..end - longest.len()]);
                    prop_assert_eq!(&stops[matched.unwrap()], longest);
                }
                None => {
                    prop_assert_eq!(&out, &text);
                    prop_assert_eq!(matched, None);
                }
            }
        }
    }

    #[test]
    fn characters_come_out_as_soon_as_they_are_whole() {
        for tokenizer in all_kinds() {
            // Characters of four bytes that no merge was learned for, behind a word.
            let tokens = tokenizer.encode("the𝄞𝄞", false).unwrap();
            let pieces = pieces(IncrementalDecoder::new(&tokenizer, true), &tokens);
            let with_text: Vec<&str> = pieces.iter().map(String::as_str).filter(|piece| !piece.is_empty()).collect();
            assert_eq!(with_text[with_text.len() - 2..], ["𝄞", "𝄞"], "{pieces:?}");
        }
    }

    #[test]
    fn a_chain_of_tokens_that_end_within_characters() {
        // Each token has the last byte of one character and the first two of the next: the text of no window is ever
        // whole, and still every character comes out with the token that ends it.
        let bytes_of = |text: &[u8]| {
            let byte_level = ByteLevel::new(false, true, false);
            let mut split = tokenizers::PreTokenizedString::from(String::from_utf8_lossy(text).as_ref());
            tokenizers::PreTokenizer::pre_tokenize(&byte_level, &mut split).unwrap();
            let splits = split.get_splits(tokenizers::OffsetReferential::Original, tokenizers::OffsetType::Byte);
            splits[0].0.chars().collect::<Vec<char>>()
        };
        let character = bytes_of("中".as_bytes());
        let text = |characters: &[char]| characters.iter().collect::<String>();
        let vocab: Vocab = [
            (text(&character[..2]), 0),
            (text(&[character[2], character[0], character[1]]), 1),
            (text(&character[2..]), 2),
        ]
        .into_iter()
        .collect();
        let mut tables = tokenizers::Tokenizer::new(BPE::builder().vocab_and_merges(vocab, vec![]).build().unwrap());
        tables.with_decoder(Some(ByteLevel::default()));
        let tokenizer = plain(tables);
        let mut tokens = vec![0];
        tokens.extend([1; 300]);
        tokens.push(2);
        let pieces = pieces(IncrementalDecoder::new(&tokenizer, true), &tokens);
        assert_eq!(pieces[0], "");
        assert!(pieces[1..302].iter().all(|piece| piece == "中"), "{pieces:?}");
    }

    #[test]
    fn what_is_never_whole_comes_out_in_the_end() {
        let tokenizer = plain(byte_level());
        let tokens = tokenizer.encode("a𝄞", false).unwrap();
        let cut = &tokens[..tokens.len() - 1];
        let mut decoder = IncrementalDecoder::new(&tokenizer, true);
        let text: String = cut.iter().map(|&token| decoder.push(token).unwrap()).collect();
        assert_eq!(text, "a");
        assert_eq!(decoder.finish().unwrap(), "\u{FFFD}");
        assert_eq!(decoder.finish().unwrap(), "");
        assert_eq!(decoder.push(tokens[0]).unwrap(), "a", "as new after finish");

        // Bytes that are no text at all, for ever: memory and delay stay bounded.
        let bad = tokenizer.token_to_id("ÿ").unwrap();
        let all = pieces(IncrementalDecoder::new(&tokenizer, true), &[bad; 500]);
        assert_eq!(all.concat(), "\u{FFFD}".repeat(500));
        for spaces in [Spaces::Normalizer, Spaces::Metaspace] {
            let tokenizer = plain(sentencepiece_like(spaces));
            let bad = tokenizer.token_to_id("<0xFF>").unwrap();
            let all = pieces(IncrementalDecoder::new(&tokenizer, true), &[bad; 500]).concat();
            assert!(all.len() > 1000 && all.chars().all(|c| c == REPLACEMENT), "{all}");
        }
    }

    #[test]
    fn text_goes_on_after_bytes_that_are_none() {
        // The decoder turns the whole run of byte tokens into replacement characters, the line end with it that is out
        // already.
        let tokenizer = plain(sentencepiece_like(Spaces::Normalizer));
        let token = |token: &str| tokenizer.token_to_id(token).unwrap();
        let tokens = [token("<0x0A>"), token("<0xE4>"), token("t"), token("h")];
        assert_eq!(tokenizer.decode(&tokens, true).unwrap(), "\u{FFFD}\u{FFFD}th");
        let all = pieces(IncrementalDecoder::new(&tokenizer, true), &tokens);
        assert_eq!(all, ["\n", "", "\u{FFFD}t", "h", ""]);
    }

    #[test]
    fn replacement_characters_that_are_in_the_text() {
        for tokenizer in all_kinds() {
            let text = "one \u{FFFD} two \u{FFFD}\u{FFFD}, three \u{FFFD}";
            let tokens = tokenizer.encode(text, false).unwrap();
            assert_eq!(pieces(IncrementalDecoder::new(&tokenizer, true), &tokens).concat(), text);
        }
    }

    #[test]
    fn skipped_tokens_are_not_context() {
        // The space between two words is the second one's; tokens without text between them must not eat it.
        for tokenizer in all_kinds() {
            let (hello, world) =
                (tokenizer.encode("hello", false).unwrap(), tokenizer.encode("hello world", false).unwrap());
            assert_eq!(world[..hello.len()], hello);
            let mut tokens = hello.clone();
            tokens.extend([1; 100]);
            tokens.extend(&world[hello.len()..]);
            assert_eq!(pieces(IncrementalDecoder::new(&tokenizer, true), &tokens).concat(), "hello world");
        }
    }

    #[test]
    fn a_continued_text_keeps_its_space() {
        for tokenizer in all_kinds() {
            let prompt = tokenizer.encode("hello hello hello hello", true).unwrap();
            let tokens = tokenizer.encode("hello hello hello hello world", true).unwrap();
            let continuation = &tokens[prompt.len()..];
            let decoder = IncrementalDecoder::continuing(&tokenizer, &prompt, true).unwrap();
            assert_eq!(pieces(decoder, continuation).concat(), " world");
        }
        let tokenizer = plain(sentencepiece_like(Spaces::Normalizer));
        let tokens = tokenizer.encode("world", false).unwrap();
        assert_eq!(pieces(IncrementalDecoder::new(&tokenizer, true), &tokens).concat(), "world");
        let decoder = IncrementalDecoder::continuing(&tokenizer, &[], true).unwrap();
        assert_eq!(pieces(decoder, &tokens).concat(), "world");
    }

    #[test]
    fn stop_strings() {
        let stops = ["</s>".to_owned(), "\n\nUser:".to_owned(), "。终".to_owned(), String::new()];
        let run = |pieces: &[&str]| {
            let mut matcher = StopStringMatcher::new(&stops);
            let mut steps: Vec<String> = pieces.iter().map(|piece| matcher.push(piece).text).collect();
            steps.push(matcher.finish());
            (steps.join("|"), matcher.matched)
        };
        assert_eq!(run(&["hello", " <", "/", "b>"]), ("hello| ||</b>|".into(), None));
        assert_eq!(run(&["hello", " <", "/s", "> rest", "more"]), ("hello| ||||".into(), Some(0)));
        assert_eq!(run(&["a\n", "\n\nUs", "er: b"]), ("a|\n||".into(), Some(1)));
        assert_eq!(run(&["好。", "好。", "终了"]), ("好|。好||".into(), Some(2)));
        assert_eq!(run(&["end </", "s"]), ("end ||</s".into(), None));
        let mut none = StopStringMatcher::new(&[]);
        assert_eq!(none.push("anything"), StopMatch { text: "anything".into(), matched: None });
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

    // Chat templates

    fn conversation() -> Vec<ChatMessage> {
        vec![
            ChatMessage::system("Be brief."),
            ChatMessage::user("Hi <b>'you' & me</b>"),
            ChatMessage::assistant("Hello!"),
            ChatMessage::user("Bye"),
        ]
    }

    #[test]
    fn chatml() {
        let tokenizer = chat_model(
            "{% for message in messages %}\n    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + \
             '<|im_end|>\\n' -}}\n{% endfor %}\n{% if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' -}}\n\
             {% endif %}\n",
        );
        let expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <b>'you' & me</b><|im_end|>\n\
                        <|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n";
        assert_eq!(tokenizer.apply_chat_template(&conversation(), false).unwrap(), expected);
        let with_prompt = format!("{expected}<|im_start|>assistant\n");
        assert_eq!(tokenizer.apply_chat_template(&conversation(), true).unwrap(), with_prompt);
    }

    #[test]
    fn llama3_style() {
        let tokenizer = chat_model(
            "{{- bos_token }}\n{%- if not tools is none %}\n    {{- raise_exception('no tools here') }}\n{%- endif %}\n\
             {#- The first message may be the system's. #}\n{%- if messages[0]['role'] == 'system' %}\n    \
             {%- set system_message = messages[0]['content']|trim %}\n    {%- set messages = messages[1:] %}\n\
             {%- else %}\n    {%- set system_message = '' %}\n{%- endif %}\n\
             {{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + system_message + '<|eot_id|>' }}\n\
             {%- for message in messages %}\n    {{- '<|start_header_id|>' + message['role'] + \
             '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n\
             {%- if add_generation_prompt %}\n    \
             {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n",
        );
        let messages = [ChatMessage::system(" Be brief. "), ChatMessage::user("Hi\n")];
        assert_eq!(
            tokenizer.apply_chat_template(&messages, true).unwrap(),
            "<|begin|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user\
             <|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        );
        let tokens = tokenizer.encode_chat(&messages).unwrap();
        assert_eq!(tokens.iter().filter(|&&token| Some(token) == tokenizer.bos_token_id()).count(), 1);
    }

    #[test]
    fn python_in_templates() {
        // As the templates of reasoning models: a namespace, slices backwards, methods of strings, loop controls.
        let tokenizer = chat_model(
            "{%- set ns = namespace(last=-1, system='') %}\n\
             {%- for message in messages[::-1] %}\n    {%- set index = (messages|length - 1) - loop.index0 %}\n    \
             {%- if message.role == 'user' and not (message.content.startswith('<tool') and \
             message.content.endswith('>')) %}\n        {%- set ns.last = index %}\n        {%- break %}\n    \
             {%- endif %}\n{%- endfor %}\n\
             {%- for message in messages %}\n    {%- if loop.first and message.role == 'system' %}\n        \
             {%- set ns.system = message.content.strip() %}\n        {%- continue %}\n    {%- endif %}\n    \
             {%- if message.role == 'assistant' and message.tool_calls is not defined %}\n        \
             {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}\n        \
             {%- if loop.index0 > ns.last or loop.last %}{{ raise_exception('not the last') }}{% endif %}\n        \
             {{- 'A:' ~ content }}\n    \
             {%- elif message.content is string and message.role in ['user'] %}\n        \
             {{- 'U' ~ loop.index ~ ':' ~ message.content.rstrip('!').upper().replace('HI', 'ho') }}\n    \
             {%- endif %}\n    {{- '|' if not loop.last else '' }}\n{%- endfor %}\n\
             {{- '[' + ns.system + ',' + ns.last|string + ']' }}",
        );
        let messages = [
            ChatMessage::system("  rules\n"),
            ChatMessage::user("hi you!!"),
            ChatMessage::assistant("<think>\nhm\n</think>\n\nyes"),
            ChatMessage::user("bye"),
        ];
        assert_eq!(tokenizer.apply_chat_template(&messages, true).unwrap(), "U2:ho YOU|A:yes|U4:BYE[rules,3]");
    }

    #[test]
    fn templates_that_refuse() {
        let tokenizer = chat_model(
            "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}\
             {{ raise_exception('roles must alternate: ' ~ m.role) }}{% endif %}{% endfor %}ok",
        );
        assert_eq!(tokenizer.apply_chat_template(&[ChatMessage::user("a")], true).unwrap(), "ok");
        let error = tokenizer.apply_chat_template(&conversation(), true).unwrap_err();
        assert!(
            matches!(&error, Error::ChatTemplate(reason) if reason.contains("roles must alternate: system")),
            "{error}"
        );

        let none = plain(byte_level());
        assert!(!none.has_chat_template());
        let error = none.encode_chat(&conversation()).unwrap_err().to_string();
        assert!(error.contains("comes without one") && error.contains("chat_template.jinja"), "{error}");

        let broken = chat_model("{% if messages %}");
        assert!(broken.has_chat_template());
        let error = broken.apply_chat_template(&conversation(), true).unwrap_err().to_string();
        assert!(error.contains("does not compile"), "{error}");
    }

    #[test]
    fn functions_of_templates() {
        let render = |template: &str| chat_model(template).apply_chat_template(&conversation()[1..2], true).unwrap();
        assert_eq!(
            render("{{ {'a': [1, 2.5, true, none, \"<é'&>\\n\"], 'b': {}} | tojson }}"),
            "{\"a\": [1, 2.5, true, null, \"<é'&>\\n\"], \"b\": {}}"
        );
        assert_eq!(
            render("{{ {'a': [1, {}], 'b': []} | tojson(indent=2) }}"),
            "{\n  \"a\": [\n    1,\n    {}\n  ],\n  \"b\": []\n}"
        );
        assert_eq!(render("{{ messages[0].content | tojson(ensure_ascii=false) }}"), "\"Hi <b>'you' & me</b>\"");
        assert_eq!(
            render("a\n{%- generation -%}\n b{% endgeneration %}{% if generation is defined %}c{% endif %}"),
            "ab"
        );
        assert_eq!(strftime("%d %b %Y, %A %H:%M:%S", 0), "01 Jan 1970, Thursday 00:00:00");
        assert_eq!(
            strftime("%Y-%m-%d %j %-d.%-m. %I %p %y %a %B %%", 951_827_696),
            "2000-02-29 060 29.2. 12 PM 00 Tue February %"
        );
        assert_eq!(strftime("%F %T %j %e%q%", 1_735_689_599), "2024-12-31 23:59:59 366 31%q%");
        assert_eq!(strftime("%F %j", 1_740_787_200), "2025-03-01 060");
        assert_eq!(render("{{ strftime_now('%Y')|length }}"), "4");
    }

    // GGUF

    fn gguf(dir: &TempDir, metadata: &[(&str, GgufValue)]) -> PathBuf {
        let path = dir.path().join("model.gguf");
        let metadata: Vec<(&str, &GgufValue)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
        candle_core::quantized::gguf_file::write(&mut fs::File::create(&path).unwrap(), &metadata, &[]).unwrap();
        path
    }

    fn texts(texts: impl IntoIterator<Item = impl Into<String>>) -> GgufValue {
        GgufValue::Array(texts.into_iter().map(|text| GgufValue::String(text.into())).collect())
    }

    fn text(text: &str) -> GgufValue {
        GgufValue::String(text.to_owned())
    }

    fn vocab_by_id(tables: &tokenizers::Tokenizer) -> Vec<String> {
        (0..tables.get_vocab_size(true) as u32).map(|id| tables.id_to_token(id).unwrap()).collect()
    }

    fn merges_of(tables: &tokenizers::Tokenizer) -> Vec<(String, String)> {
        let saved: serde_json::Value = serde_json::from_str(&tables.to_string(false).unwrap()).unwrap();
        serde_json::from_value(saved["model"]["merges"].clone()).unwrap()
    }

    fn byte_level_metadata(pre: &str) -> Vec<(&'static str, GgufValue)> {
        let tables = byte_level();
        let mut tokens = vocab_by_id(&tables);
        let mut types = vec![GgufValue::I32(3); 2];
        types.resize(tokens.len(), GgufValue::I32(1));
        tokens.push("<think>".into());
        types.push(GgufValue::I32(4));
        vec![
            ("tokenizer.ggml.model", text("gpt2")),
            ("tokenizer.ggml.pre", text(pre)),
            ("tokenizer.ggml.tokens", texts(tokens)),
            ("tokenizer.ggml.token_type", GgufValue::Array(types)),
            ("tokenizer.ggml.merges", texts(merges_of(&tables).iter().map(|(left, right)| format!("{left} {right}")))),
            ("tokenizer.ggml.bos_token_id", GgufValue::U32(0)),
            ("tokenizer.ggml.eos_token_id", GgufValue::U32(1)),
            ("tokenizer.chat_template", text("{{ bos_token }}{{ messages[0].content }}")),
        ]
    }

    #[test]
    fn gguf_byte_level() {
        let dir = folder(&[]);
        let reference = plain(byte_level());
        let tokenizer = Tokenizer::from_gguf(&gguf(&dir, &byte_level_metadata("gpt-2"))).unwrap().unwrap();
        for text in TEXTS {
            let tokens = tokenizer.encode(text, true).unwrap();
            assert_eq!(tokens, reference.encode(text, false).unwrap(), "no BOS unless the file asks for it");
            assert_eq!(tokenizer.decode(&tokens, true).unwrap(), text);
            assert_eq!(pieces(IncrementalDecoder::new(&tokenizer, true), &tokens).concat(), text);
        }
        assert_eq!((tokenizer.bos_token_id(), tokenizer.eos_token_id()), (Some(0), Some(1)));
        assert_eq!(tokenizer.apply_chat_template(&[ChatMessage::user("x")], true).unwrap(), "<|begin|>x");

        // A user-defined token is found in the text and stays visible, a control token does not.
        let tokens = tokenizer.encode("<think>a<|end|>", false).unwrap();
        assert_eq!(tokens[0], tokenizer.token_to_id("<think>").unwrap());
        assert_eq!(tokens.len(), 3);
        assert_eq!(tokenizer.decode(&tokens, true).unwrap(), "<think>a");

        let mut metadata = byte_level_metadata("gpt-2");
        metadata.push(("tokenizer.ggml.add_bos_token", GgufValue::Bool(true)));
        let tokenizer = Tokenizer::from_gguf(&gguf(&dir, &metadata)).unwrap().unwrap();
        assert_eq!(tokenizer.encode(TEXTS[0], true).unwrap(), reference.encode(TEXTS[0], true).unwrap());
        assert_eq!(tokenizer.encode(TEXTS[0], false).unwrap(), reference.encode(TEXTS[0], false).unwrap());
    }

    #[test]
    fn gguf_pre_tokenizers() {
        let dir = folder(&[]);
        // Digits, a contraction in capitals and line ends are where the families differ.
        let split = |pre: &str| {
            let tokenizer = Tokenizer::from_gguf(&gguf(&dir, &byte_level_metadata(pre))).unwrap().unwrap();
            let words = tokenizer.shared.tables.get_pre_tokenizer().unwrap().clone();
            let mut text = tokenizers::PreTokenizedString::from("I'LL be x12345\n\n(a)");
            tokenizers::PreTokenizer::pre_tokenize(&words, &mut text).unwrap();
            let splits = text.get_splits(tokenizers::OffsetReferential::Original, tokenizers::OffsetType::Byte);
            let splits = splits.iter().map(|(split, ..)| split.to_string()).collect::<Vec<_>>().join("|");
            let begins = tokenizer.encode("a", true).unwrap()[0] == 0;
            assert_eq!(tokenizer.decode(&tokenizer.encode("I'LL be", true).unwrap(), true).unwrap(), "I'LL be");
            (splits, begins)
        };
        let split_of = |pre: &str| split(pre).0;
        assert_eq!(split("llama-bpe"), ("I|'LL|Ġbe|Ġx|123|45|ĊĊ|(a|)".into(), true));
        assert_eq!(split("llama3"), split("llama-bpe"));
        assert_eq!(split("smaug-bpe"), (split_of("llama-bpe"), false));
        assert_eq!(split("qwen2"), ("I|'LL|Ġbe|Ġx|1|2|3|4|5|ĊĊ|(a|)".into(), false));
        assert_eq!(split("gpt-2"), ("I|'|LL|Ġbe|Ġx|12345|Ċ|Ċ|(|a|)".into(), false));
        assert_eq!(split("smollm"), ("I|'|LL|Ġbe|Ġx|1|2|3|4|5|Ċ|Ċ|(|a|)".into(), false));
        assert_eq!(split("tekken"), ("I|'LL|Ġbe|Ġx|1|2|3|4|5|ĊĊ|(a|)".into(), true));

        // A word that is a token, and that no merges lead to.
        let tokens_of_word = |pre: &str| {
            let mut metadata = byte_level_metadata(pre);
            if let Some((_, GgufValue::Array(tokens))) = metadata.iter_mut().find(|(key, _)| key.ends_with(".tokens")) {
                tokens.push(text("zqxj"));
            }
            let tokenizer = Tokenizer::from_gguf(&gguf(&dir, &metadata)).unwrap().unwrap();
            tokenizer.encode("zqxj", false).unwrap().len()
        };
        assert_eq!((tokens_of_word("llama-bpe"), tokens_of_word("tekken")), (1, 1));
        assert_eq!((tokens_of_word("gpt-2"), tokens_of_word("qwen2")), (4, 4));

        let unknown = Tokenizer::from_gguf(&gguf(&dir, &byte_level_metadata("brand-new"))).unwrap_err();
        assert!(matches!(&unknown, Error::Unsupported { value, .. } if value == "brand-new"), "{unknown}");
    }

    #[test]
    fn gguf_sentencepiece() {
        for (spaces, prefix) in [(Spaces::Normalizer, true), (Spaces::None, false)] {
            let tables = sentencepiece_like(spaces);
            let tokens = vocab_by_id(&tables);
            let merges = merges_of(&tables);
            let rank = |token: &str| merges.iter().position(|(left, right)| format!("{left}{right}") == token);
            let scores = tokens.iter().map(|token| GgufValue::F32(-(rank(token).unwrap_or(9999) as f32)));
            let types = (0..tokens.len()).map(|id| match id {
                0 => GgufValue::I32(2),
                1 | 2 => GgufValue::I32(3),
                3..259 => GgufValue::I32(6),
                _ => GgufValue::I32(1),
            });
            let dir = folder(&[]);
            let metadata = [
                ("tokenizer.ggml.model", text("llama")),
                ("tokenizer.ggml.scores", GgufValue::Array(scores.collect())),
                ("tokenizer.ggml.token_type", GgufValue::Array(types.collect())),
                ("tokenizer.ggml.add_space_prefix", GgufValue::Bool(prefix)),
                ("tokenizer.ggml.tokens", texts(tokens)),
            ];
            let tokenizer = Tokenizer::from_gguf(&gguf(&dir, &metadata)).unwrap().unwrap();
            let reference = plain(tables);
            for text in TEXTS.into_iter().chain(["", " ", "x", "the</s> the<s>"]) {
                for special in [true, false] {
                    let tokens = tokenizer.encode(text, special).unwrap();
                    assert_eq!(tokens, reference.encode(text, special).unwrap(), "{text:?}");
                    assert_eq!(tokenizer.decode(&tokens, true).unwrap(), reference.decode(&tokens, true).unwrap());
                }
            }
            assert_eq!((tokenizer.bos_token_id(), tokenizer.eos_token_id()), (Some(1), Some(2)));
        }
    }

    #[test]
    fn gguf_files_that_do_not_work_say_why() {
        let dir = folder(&[]);
        assert!(Tokenizer::from_gguf(&gguf(&dir, &[("general.name", text("none"))])).unwrap().is_none());
        let message = |metadata: &[(&str, GgufValue)]| {
            let message = Tokenizer::from_gguf(&gguf(&dir, metadata)).unwrap_err().to_string();
            assert!(message.contains("model.gguf") || message.contains("unsupported"), "{message}");
            message
        };
        let without = |key: &str| {
            let mut metadata = byte_level_metadata("gpt-2");
            metadata.retain(|(other, _)| *other != key);
            metadata
        };
        let with = |key: &'static str, value: GgufValue| {
            let mut metadata = without(key);
            metadata.push((key, value));
            metadata
        };
        assert!(message(&without("tokenizer.ggml.model")).contains("tokenizer.ggml.model"));
        assert!(message(&without("tokenizer.ggml.pre")).contains("tokenizer.ggml.pre"));
        assert!(message(&without("tokenizer.ggml.merges")).contains("merges"));
        assert!(message(&with("tokenizer.ggml.tokens", text("no list"))).contains("tokenizer.ggml.tokens"));
        assert!(message(&with("tokenizer.ggml.merges", texts(["nospace"]))).contains("merge"));
        assert!(message(&with("tokenizer.ggml.merges", texts(["no such"]))).contains("tokenizer cannot be built"));
        let beyond = message(&with("tokenizer.ggml.bos_token_id", GgufValue::U32(100_000)));
        assert!(beyond.contains("tokenizer.ggml.bos_token_id") && beyond.contains("100000"), "{beyond}");
        assert!(message(&with("tokenizer.ggml.model", text("t5"))).contains("unsupported GGUF tokenizer `t5`"));
        assert!(message(&with("tokenizer.ggml.model", text("llama"))).contains("scores"));
        let missing = Tokenizer::from_gguf(&dir.path().join("nothing.gguf")).unwrap_err().to_string();
        assert!(missing.contains("nothing.gguf"), "{missing}");
        fs::write(dir.path().join("cut.gguf"), b"GGUF\x03\0\0\0").unwrap();
        let cut = Tokenizer::from_gguf(&dir.path().join("cut.gguf")).unwrap_err().to_string();
        assert!(cut.contains("cut.gguf: the GGUF header cannot be read"), "{cut}");
    }
}
