//! The expected tokens, words and end tokens are llama.cpp's, recorded by `tools/vocabularies/make_fixtures.py`.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use candle_core::quantized::gguf_file::{Content, Value as GgufValue};
use serde_json::Value as Json;
use tempfile::TempDir;

use super::super::test_support::{Spaces, TEXTS, byte_level, folder, pieces, plain, saved, sentencepiece_like};
use super::super::{ChatMessage, IncrementalDecoder};
use super::*;
use crate::model::vocabulary::end_token_ids;

type Metadata = BTreeMap<String, GgufValue>;

fn write(dir: &TempDir, metadata: &Metadata) -> PathBuf {
    let path = dir.path().join("model.gguf");
    let metadata: Vec<(&str, &GgufValue)> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    candle_core::quantized::gguf_file::write(&mut fs::File::create(&path).unwrap(), &metadata, &[]).unwrap();
    path
}

fn load(metadata: &Metadata) -> Result<Option<Tokenizer>> {
    Tokenizer::from_gguf(&write(&folder(&[]), metadata))
}

fn loaded(metadata: &Metadata) -> Tokenizer {
    load(metadata).unwrap().unwrap()
}

fn texts(texts: impl IntoIterator<Item = impl Into<String>>) -> GgufValue {
    GgufValue::Array(texts.into_iter().map(|text| GgufValue::String(text.into())).collect())
}

fn text(text: &str) -> GgufValue {
    GgufValue::String(text.to_owned())
}

fn fixture() -> Json {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/vocabularies.json");
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn demo() -> Metadata {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/models/demo/demo-q8_0.gguf");
    let content = Content::read(&mut fs::File::open(path).unwrap()).unwrap();
    content.metadata.into_iter().filter(|(key, _)| key.starts_with("tokenizer.")).collect()
}

/// A value of the fixture: its type's name and itself.
fn value(kind: &str, value: &Json) -> GgufValue {
    match kind {
        "STRING" => text(value.as_str().unwrap()),
        "BOOL" => GgufValue::Bool(value.as_bool().unwrap()),
        "UINT32" => GgufValue::U32(value.as_u64().unwrap().try_into().unwrap()),
        "INT32" => GgufValue::I32(value.as_i64().unwrap().try_into().unwrap()),
        "FLOAT32" => GgufValue::F32(value.as_f64().unwrap() as f32),
        _ => {
            let element = kind.strip_prefix("ARRAY of ").unwrap();
            GgufValue::Array(value.as_array().unwrap().iter().map(|item| self::value(element, item)).collect())
        }
    }
}

fn array<'m>(metadata: &'m mut Metadata, key: &str) -> &'m mut Vec<GgufValue> {
    match metadata.get_mut(key) {
        Some(GgufValue::Array(values)) => values,
        other => panic!("{key}: {other:?}"),
    }
}

fn ids(json: &Json) -> Vec<u32> {
    json.as_array().unwrap().iter().map(|id| id.as_u64().unwrap().try_into().unwrap()).collect()
}

#[test]
fn vocabularies_give_the_tokens_and_ends_of_llama_cpp() {
    let fixture = fixture();
    let cases = fixture["cases"].as_array().unwrap();
    assert!(cases.len() > 20);
    for case in cases {
        let mut metadata = if case["demo"].as_bool().unwrap() { demo() } else { Metadata::new() };
        for key in case["removed"].as_array().unwrap() {
            metadata.remove(key.as_str().unwrap());
        }
        for (key, given) in case["metadata"].as_object().unwrap() {
            metadata.insert(key.clone(), value(given[0].as_str().unwrap(), &given[1]));
        }
        for token in case["tokens"].as_array().unwrap() {
            let place = token[0].as_u64().unwrap() as usize;
            array(&mut metadata, "tokenizer.ggml.tokens")[place] = value("STRING", &token[1]);
            array(&mut metadata, "tokenizer.ggml.token_type")[place] = value("INT32", &token[2]);
        }
        let dir = folder(&[]);
        let path = write(&dir, &metadata);
        let mut ends = end_token_ids(&GgufFile::open(&path).unwrap());
        ends.sort();
        assert_eq!(ends, ids(&case["ends"]), "{}", case["name"]);

        let tokenizer = Tokenizer::from_gguf(&path).unwrap().unwrap();
        for id in ends {
            assert_eq!(tokenizer.decode(&[id], true).unwrap(), "", "an end token is not shown: {}", case["name"]);
        }
        for (text, expected) in case["texts"].as_array().unwrap().iter().zip(case["ids"].as_array().unwrap()) {
            let tokens = tokenizer.encode(text.as_str().unwrap(), true).unwrap();
            assert_eq!(tokens, ids(expected), "{}: {text}", case["name"]);
            for skip in [true, false] {
                let whole = tokenizer.decode(&tokens, skip).unwrap();
                assert_eq!(pieces(IncrementalDecoder::new(&tokenizer, skip), &tokens).concat(), whole);
            }
        }
    }
}

#[test]
fn each_pre_tokenizer_cuts_as_llama_cpp_does() {
    let fixture = fixture();
    let splits = fixture["splits"].as_object().unwrap();
    for (name, expected) in splits {
        let splitter = Splitter::named(name).unwrap().unwrap();
        for (text, expected) in fixture["split_texts"].as_array().unwrap().iter().zip(expected.as_array().unwrap()) {
            let text = text.as_str().unwrap();
            let words: Vec<&str> = splitter.words(text).unwrap().into_iter().map(|word| &text[word]).collect();
            let mut expected: Vec<&str> = expected.as_array().unwrap().iter().flat_map(Json::as_str).collect();
            // In these expressions llama.cpp takes any letter for one of either case; the models' own do not.
            if ["kimi-k2", "tiny_aya", "youtu"].contains(&name.as_str())
                && let Some(place) = expected.iter().position(|word| *word == "fooBar")
            {
                expected.splice(place..=place, ["foo", "Bar"]);
            }
            assert_eq!(words, expected, "{name}");
        }
    }
    for row in pre::rows() {
        assert!(row.names.iter().any(|name| splits.contains_key(*name)), "no fixture for {:?}", row.names);
    }
}

#[test]
fn pre_tokenizer_names_mean_their_row() {
    let row = |name: &str| Splitter::named(name).unwrap().unwrap().row;
    for (name, flags) in [
        ("llama-bpe", (true, true, true)),
        ("smaug-bpe", (false, false, true)),
        ("tekken", (true, true, true)),
        ("glm4", (true, false, false)),
        ("chatglm-bpe", (false, false, false)),
        ("gpt-2", (false, false, true)),
        ("youtu", (true, false, true)),
        ("chameleon", (false, true, true)),
    ] {
        let row = row(name);
        assert_eq!((row.whole_words, row.adds_bos, row.has_default_bos), flags, "{name}");
    }
    assert_eq!(row("refact"), row("starcoder"));
    assert_eq!(row("dbrx"), row("smaug-bpe"));
    assert_eq!(row("jina-v5-nano"), row("llama3"));
    let names: Vec<&str> = pre::rows().iter().flat_map(|row| row.names).copied().collect();
    let distinct: HashSet<&str> = names.iter().copied().collect();
    assert_eq!(names.len(), distinct.len());
    assert!(Splitter::named("brand-new").unwrap().is_none());
}

#[test]
fn groups_of_digits_are_counted_from_the_right() {
    let words = |text: &str| {
        let splitter = Splitter::named("superbpe").unwrap().unwrap();
        let words = splitter.words(text).unwrap();
        words.into_iter().map(|word| text[word].to_owned()).collect::<Vec<_>>().join("|")
    };
    assert_eq!(words("1234567"), "1|234|567");
    assert_eq!(words("a12b123c"), "a|12|b|123|c");
    assert_eq!(words("٣٤٥٦"), "٣|٤٥٦");
    assert_eq!(words(&"7".repeat(200_000)).len(), 200_000 + 66_666);
}

fn vocab_by_id(tables: &tokenizers::Tokenizer) -> Vec<String> {
    (0..tables.get_vocab_size(true) as u32).map(|id| tables.id_to_token(id).unwrap()).collect()
}

fn merges_of(tables: &tokenizers::Tokenizer) -> Vec<(String, String)> {
    let saved: Json = serde_json::from_str(&tables.to_string(false).unwrap()).unwrap();
    serde_json::from_value(saved["model"]["merges"].clone()).unwrap()
}

fn byte_level_metadata(pre: &str) -> Metadata {
    let tables = byte_level();
    let mut tokens = vocab_by_id(&tables);
    let mut types = vec![GgufValue::I32(3); 2];
    types.resize(tokens.len(), GgufValue::I32(1));
    tokens.push("<think>".into());
    types.push(GgufValue::I32(4));
    let merges = merges_of(&tables);
    [
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text(pre)),
        ("tokenizer.ggml.tokens", texts(tokens)),
        ("tokenizer.ggml.token_type", GgufValue::Array(types)),
        ("tokenizer.ggml.merges", texts(merges.iter().map(|(left, right)| format!("{left} {right}")))),
        ("tokenizer.ggml.bos_token_id", GgufValue::U32(0)),
        ("tokenizer.ggml.eos_token_id", GgufValue::U32(1)),
        ("tokenizer.chat_template", text("{{ bos_token }}{{ messages[0].content }}")),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into()
}

fn with(pre: &str, key: &str, value: GgufValue) -> Metadata {
    let mut metadata = byte_level_metadata(pre);
    metadata.insert(key.into(), value);
    metadata
}

fn without(key: &str) -> Metadata {
    let mut metadata = byte_level_metadata("gpt-2");
    metadata.remove(key);
    metadata
}

#[test]
fn byte_level_tokenizers_equal_their_tokenizer_json() {
    let reference = plain(byte_level());
    let tokenizer = loaded(&byte_level_metadata("gpt-2"));
    for text in TEXTS {
        let tokens = tokenizer.encode(text, true).unwrap();
        assert_eq!(tokens, reference.encode(text, false).unwrap(), "no BOS unless the file asks for it");
        assert_eq!(tokenizer.decode(&tokens, true).unwrap(), text);
        assert_eq!(pieces(IncrementalDecoder::new(&tokenizer, true), &tokens).concat(), text);
    }
    assert_eq!((tokenizer.bos_token_id(), tokenizer.eos_token_id()), (Some(0), Some(1)));
    assert_eq!(tokenizer.apply_chat_template(&[ChatMessage::user("x")], true).unwrap(), "<|begin|>x");
    assert_eq!(tokenizer.vocab_size(), reference.vocab_size() + 1);

    // A user-defined token is found in the text and stays visible, a control token does not.
    let tokens = tokenizer.encode("<think>a<|end|>", false).unwrap();
    assert_eq!(tokens[0], tokenizer.token_to_id("<think>").unwrap());
    assert_eq!(tokens.len(), 3);
    assert_eq!(tokenizer.decode(&tokens, true).unwrap(), "<think>a");
    assert_eq!(tokenizer.decode(&[u32::MAX, 100_000], false).unwrap(), "");

    let tokenizer = loaded(&with("gpt-2", "tokenizer.ggml.add_bos_token", GgufValue::Bool(true)));
    assert_eq!(tokenizer.encode(TEXTS[0], true).unwrap(), reference.encode(TEXTS[0], true).unwrap());
    assert_eq!(tokenizer.encode(TEXTS[0], false).unwrap(), reference.encode(TEXTS[0], false).unwrap());
}

#[test]
fn whole_words_become_tokens_that_no_merge_leads_to() {
    let tokens_of_word = |pre: &str| {
        let mut metadata = byte_level_metadata(pre);
        array(&mut metadata, "tokenizer.ggml.tokens").push(text("zqxj"));
        array(&mut metadata, "tokenizer.ggml.token_type").push(GgufValue::I32(1));
        loaded(&metadata).encode("zqxj", false).unwrap().len()
    };
    assert_eq!((tokens_of_word("llama-bpe"), tokens_of_word("tekken")), (1, 1));
    assert_eq!((tokens_of_word("gpt-2"), tokens_of_word("qwen2")), (4, 4));
}

fn sentencepiece_metadata(tables: &tokenizers::Tokenizer, prefix: bool) -> Metadata {
    let tokens = vocab_by_id(tables);
    let merges = merges_of(tables);
    let rank = |token: &str| merges.iter().position(|(left, right)| format!("{left}{right}") == token);
    let scores = tokens.iter().map(|token| GgufValue::F32(-(rank(token).unwrap_or(9999) as f32)));
    let types = (0..tokens.len()).map(|id| match id {
        0 => GgufValue::I32(2),
        1 | 2 => GgufValue::I32(3),
        3..259 => GgufValue::I32(6),
        _ => GgufValue::I32(1),
    });
    [
        ("tokenizer.ggml.model", text("llama")),
        ("tokenizer.ggml.scores", GgufValue::Array(scores.collect())),
        ("tokenizer.ggml.token_type", GgufValue::Array(types.collect())),
        ("tokenizer.ggml.add_space_prefix", GgufValue::Bool(prefix)),
        ("tokenizer.ggml.tokens", texts(tokens)),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into()
}

#[test]
fn sentencepiece_tokenizers_equal_their_tokenizer_json() {
    for (spaces, prefix) in [(Spaces::Normalizer, true), (Spaces::None, false)] {
        // Training it again may give other tokens.
        let tables = sentencepiece_like(spaces);
        let tokenizer = loaded(&sentencepiece_metadata(&tables, prefix));
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
fn phi3_strips_white_space_behind_its_special_tokens() {
    let build = |architecture: &str, model: &str| {
        let mut metadata = if model == "llama" {
            sentencepiece_metadata(&sentencepiece_like(Spaces::Normalizer), true)
        } else {
            demo()
        };
        metadata.insert("general.architecture".into(), text(architecture));
        metadata.insert("general.name".into(), text("A model"));
        for (place, token) in ["<|user|>", "<|endoftext|>"].into_iter().enumerate() {
            array(&mut metadata, "tokenizer.ggml.tokens")[300 + place] = text(token);
            array(&mut metadata, "tokenizer.ggml.token_type")[300 + place] = GgufValue::I32(3);
        }
        let tokenizer = loaded(&metadata);
        let stripped = |token: &str| {
            let encode = |text: String| tokenizer.encode(&text, false).unwrap();
            encode(format!("{token} \nhello")) == encode(format!("{token}hello"))
        };
        ["<|user|>", "<|endoftext|>"].map(stripped)
    };
    assert_eq!(build("phi3", "llama"), [true, false]);
    assert_eq!(build("llama", "llama"), [false, false]);
    assert_eq!(build("phi3", "gpt2"), [false, false], "Phi-4-mini has another tokenizer");
}

#[test]
fn listed_end_tokens_count_and_impossible_ones_do_not() {
    let listed = GgufValue::Array([700, 20, 100_000].map(GgufValue::U32).into());
    let mut metadata = demo();
    metadata.insert("tokenizer.ggml.eos_token_ids".into(), listed);
    metadata.insert("tokenizer.ggml.eot_token_id".into(), GgufValue::I32(-1));
    let dir = folder(&[]);
    let gguf = GgufFile::open(&write(&dir, &metadata)).unwrap();
    assert_eq!(end_token_ids(&gguf), [1, 700, 20]);
    // Without a vocabulary the keys alone tell.
    metadata.remove("tokenizer.ggml.tokens");
    let gguf = GgufFile::open(&write(&dir, &metadata)).unwrap();
    assert_eq!(end_token_ids(&gguf), [1]);
}

#[test]
fn special_ids_that_are_no_tokens_are_ignored() {
    for value in [GgufValue::U32(u32::MAX), GgufValue::I32(-1), GgufValue::U32(100_000), text("0")] {
        for key in ["padding", "unknown", "bos", "eos", "eot", "seperator", "mask", "fim_pre"] {
            let tokenizer = loaded(&with("gpt-2", &format!("tokenizer.ggml.{key}_token_id"), value.clone()));
            let tokens = tokenizer.encode("hello", true).unwrap();
            assert_eq!(tokenizer.decode(&tokens, true).unwrap(), "hello");
        }
    }
    let tokenizer = loaded(&with("gpt-2", "tokenizer.ggml.bos_token_id", GgufValue::U32(u32::MAX)));
    assert_eq!(tokenizer.bos_token_id(), None, "a default id is not named");
}

#[test]
fn a_missing_pre_tokenizer_name_means_the_default() {
    let tokens = |metadata: &Metadata| loaded(metadata).encode("I'LL be x12345 (a)...", false).unwrap();
    let default = tokens(&byte_level_metadata("default"));
    assert_eq!(tokens(&without("tokenizer.ggml.pre")), default);
    assert_eq!(tokens(&byte_level_metadata("")), default);
}

#[test]
fn gguf_files_that_do_not_work_say_why() {
    let dir = folder(&[]);
    assert!(load(&[("general.name".to_owned(), text("none"))].into()).unwrap().is_none());
    assert!(load(&with("gpt-2", "tokenizer.ggml.model", text("no_vocab"))).unwrap().is_none());
    let message = |metadata: &Metadata| {
        let message = load(metadata).unwrap_err().to_string();
        assert!(message.contains("model.gguf") || message.contains("unsupported"), "{message}");
        message
    };
    let with = |key: &str, value: GgufValue| with("gpt-2", key, value);
    assert!(message(&without("tokenizer.ggml.model")).contains("tokenizer.ggml.model"));
    assert!(message(&without("tokenizer.ggml.merges")).contains("merges"));
    assert!(message(&with("tokenizer.ggml.tokens", text("no list"))).contains("tokenizer.ggml.tokens"));
    assert!(message(&with("tokenizer.ggml.merges", texts(["nospace"]))).contains("merge"));
    let types = GgufValue::Array(vec![GgufValue::I32(1); 3]);
    assert!(message(&with("tokenizer.ggml.token_type", types)).contains("3 elements"));
    for (key, value) in [("model", "bert"), ("model", "hybriddna"), ("pre", "brand-new")] {
        let refused = message(&with(&format!("tokenizer.ggml.{key}"), text(value)));
        assert!(refused.contains(value) && refused.contains("tokenizer.json beside the file"), "{refused}");
    }
    let mut few_scores = sentencepiece_metadata(&sentencepiece_like(Spaces::None), false);
    array(&mut few_scores, "tokenizer.ggml.scores").truncate(5);
    assert!(message(&few_scores).contains("tokenizer.ggml.scores"));
    let missing = Tokenizer::from_gguf(&dir.path().join("nothing.gguf")).unwrap_err().to_string();
    assert!(missing.contains("nothing.gguf"), "{missing}");
    fs::write(dir.path().join("cut.gguf"), b"GGUF\x03\0\0\0").unwrap();
    let cut = Tokenizer::from_gguf(&dir.path().join("cut.gguf")).unwrap_err().to_string();
    assert!(cut.contains("cut.gguf") && cut.contains("truncated or damaged"), "{cut}");
}

#[test]
fn a_tokenizer_json_beside_the_file_is_used_when_needed() {
    let dir = folder(&[saved(&byte_level())]);
    let path = write(&dir, &byte_level_metadata("brand-new"));
    let tokenizer = Tokenizer::from_gguf(&path).unwrap().unwrap();
    assert_eq!(tokenizer.encode(TEXTS[0], true).unwrap(), plain(byte_level()).encode(TEXTS[0], true).unwrap());
    assert!(tokenizer.has_chat_template(), "the file's");

    // The file's own tokenizer has one token more.
    let path = write(&dir, &byte_level_metadata("gpt-2"));
    assert!(Tokenizer::from_gguf(&path).unwrap().unwrap().token_to_id("<think>").is_some());
    let path = write(&dir, &[("general.name".to_owned(), text("none"))].into());
    assert!(Tokenizer::from_gguf(&path).unwrap().is_some());
}

#[test]
fn hostile_vocabularies_take_neither_memory_nor_time() {
    let began = Instant::now();
    let spm = |tokens: Vec<String>| {
        let scores = (0..tokens.len()).map(|id| GgufValue::F32(id as f32)).collect();
        let metadata = [
            ("tokenizer.ggml.model", text("llama")),
            ("tokenizer.ggml.scores", GgufValue::Array(scores)),
            ("tokenizer.ggml.tokens", texts(["<unk>".into(), "<s>".into(), "</s>".into()].into_iter().chain(tokens))),
        ];
        metadata.map(|(key, value)| (key.to_owned(), value)).into()
    };
    // 8 MB of tokens in which every two make a third.
    let mut chain: Metadata = spm((1..4000).map(|length| "a".repeat(length)).collect());
    let zero = GgufValue::F32(0.0);
    array(&mut chain, "tokenizer.ggml.scores").extend([zero.clone(), zero.clone(), zero.clone()]);
    let chain = loaded(&chain);
    assert!(chain.encode(&"a".repeat(20_000), false).unwrap().len() < 20_000);
    let mut long: Metadata = spm(vec!["a".repeat(300_000)]);
    array(&mut long, "tokenizer.ggml.scores").extend([zero.clone(), zero.clone(), zero]);
    assert_eq!(loaded(&long).encode("b", false).unwrap(), [0; 4], "three bytes of a space, and one");
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());

    // A text is merged in n log n steps.
    let usual = loaded(&sentencepiece_metadata(&sentencepiece_like(Spaces::Normalizer), true));
    let began = Instant::now();
    usual.encode(&TEXTS.concat().repeat(500), false).unwrap();
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
}
