//! What the tests of this folder have in common: texts, small tokenizers of every kind trained on them, and folders.

use std::collections::BTreeMap;
use std::fs;

use serde_json::json;
use tempfile::TempDir;
use tokenizers::AddedToken;
use tokenizers::decoders::{byte_fallback::ByteFallback, fuse::Fuse, sequence::Sequence as Decoders, strip::Strip};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::normalizers::{Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::processors::template::TemplateProcessing;

use super::incremental::LONGEST_WINDOW;
use super::tables::JsonTables;
use super::{IncrementalDecoder, Tokenizer};

pub(super) const TEXTS: [&str; 8] = [
    "Once upon a time there was a small model that lived on two devices.",
    "It said: hello, world! And the world said hello to it, again and again.",
    "数字と漢字のテスト。模型住在两个设备上，它说：你好，世界！你好，你好。",
    "Emoji 😀😀 🎉🎉 👩‍👩‍👧‍👦 🇩🇪 and flags, 👍🏽 with tones 👍🏽👍🏽.",
    "Cafe\u{301} nai\u{308}ve re\u{301}sume\u{301}, and the composed é ï ü too: café naïve résumé.",
    "fn main() {\n    println!(\"{}\", 1234567890);\n}\n\n\tindented\r\n",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم.",
    "  two spaces,   three,\u{a0}one that does not break, and a long tail of dots.....",
];

pub(super) fn with_bos(tables: &mut tokenizers::Tokenizer, token: &str, id: u32) {
    let around = format!("{token} $0");
    let mut builder = TemplateProcessing::builder();
    builder.try_single(around).unwrap().special_tokens(vec![(token, id)]);
    tables.with_post_processor(Some(builder.build().unwrap()));
}

/// Byte-level BPE trained on the texts above, 256 bytes and some hundred merges.
pub(super) fn byte_level() -> tokenizers::Tokenizer {
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
pub(super) enum Spaces {
    /// Llama 2: put there by the normalizer, stripped by the decoder.
    Normalizer,
    /// Newer conversions of the same: put there and taken away by `Metaspace`.
    Metaspace,
    /// Gemma: there is none.
    None,
}

/// BPE over characters with `▁` for a space; rare characters have no token and become bytes.
pub(super) fn sentencepiece_like(spaces: Spaces) -> tokenizers::Tokenizer {
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

fn json(tables: tokenizers::Tokenizer) -> JsonTables {
    JsonTables { tables, path: "tokenizer.json".into() }
}

pub(super) fn plain(tables: tokenizers::Tokenizer) -> Tokenizer {
    Tokenizer::assemble(json(tables), BTreeMap::new(), None).unwrap()
}

pub(super) fn all_kinds() -> Vec<Tokenizer> {
    let mut kinds = vec![plain(byte_level())];
    kinds.extend([Spaces::Normalizer, Spaces::Metaspace, Spaces::None].map(|s| plain(sentencepiece_like(s))));
    kinds
}

/// The pieces of a sequence, the last one from `finish`.
pub(super) fn pieces(mut decoder: IncrementalDecoder, tokens: &[u32]) -> Vec<String> {
    let mut pieces = Vec::new();
    for &token in tokens {
        pieces.push(decoder.push(token).unwrap());
        assert!(decoder.window.len() <= LONGEST_WINDOW);
    }
    pieces.push(decoder.finish().unwrap());
    pieces
}

pub(super) fn chat_model(template: &str) -> Tokenizer {
    let named = [("bos_token", "<|begin|>"), ("eos_token", "<|end|>")];
    let named = named.map(|(name, text)| (name.to_owned(), text.to_owned())).into();
    Tokenizer::assemble(json(byte_level()), named, Some(template.to_owned())).unwrap()
}

pub(super) fn folder(files: &[(&str, String)]) -> TempDir {
    let dir = TempDir::new().unwrap();
    for (name, text) in files {
        fs::write(dir.path().join(name), text).unwrap();
    }
    dir
}

pub(super) fn saved(tables: &tokenizers::Tokenizer) -> (&'static str, String) {
    ("tokenizer.json", tables.to_string(false).unwrap())
}
