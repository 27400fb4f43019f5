//! The tokenizer of a GGUF file. The file has no tokenizer.json: the tables, the way texts are split into words and the
//! special tokens are put together from its metadata.

use std::collections::BTreeMap;
use std::io::BufReader;
use std::path::Path;

use candle_core::quantized::gguf_file::{Content, Value as GgufValue};
use candle_core::quantized::tokenizer::TokenizerFromGguf;
use tokenizers::decoders::{byte_fallback::ByteFallback, fuse::Fuse, sequence::Sequence as Decoders, strip::Strip};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::{Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, PreTokenizerWrapper, SplitDelimiterBehavior};

use super::Tokenizer;
use crate::error::{Error, Result};
use crate::files;

impl Tokenizer {
    /// The tokenizer that a GGUF file carries; `None` where it carries none.
    ///
    /// Byte-level BPE ("gpt2") is built by candle, after its metadata have been brought into the form that candle
    /// reads rightly: candle takes every pre-tokenizer name that it does not know for GPT-2's, "llama-bpe" among them,
    /// and that gives other tokens than the model was trained on. SentencePiece BPE ("llama") has scores in place of
    /// merges; its merges are found again as transformers does it: every way to put a token together from two others,
    /// in the order of the token's score.
    pub fn from_gguf(path: &Path) -> Result<Option<Self>> {
        let file = files::open_regular(path)?;
        let content = Content::read(&mut BufReader::new(file))
            .map_err(|error| Error::file(path, format!("the GGUF header cannot be read: {error}")))?;
        gguf_tokenizer(path, content)
    }
}

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

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use tempfile::TempDir;

    use super::super::test_support::{Spaces, TEXTS, byte_level, folder, pieces, plain, sentencepiece_like};
    use super::super::{ChatMessage, IncrementalDecoder};
    use super::*;

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
