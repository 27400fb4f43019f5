//! The tokenizer of a GGUF file. The file has no tokenizer.json: texts, merges or scores, and the special tokens are in
//! its metadata, and how a text is cut into words is known by name. The tokens are those of llama.cpp, whose format it is.
//!
//! Each kind of tokenizer has an encoder in a file of its own; this one reads what they have in common.

mod bpe;
mod merge;
mod partition;
mod plamo;
mod pre;
mod prefixes;
mod rwkv;
mod sentencepiece;
mod special;
mod texts;
mod unigram;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use self::bpe::Bpe;
use self::partition::{Part, Partition};
use self::plamo::Plamo;
use self::pre::Splitter;
use self::rwkv::Rwkv;
use self::sentencepiece::SentencePiece;
use self::texts::Texts;
use self::unigram::Unigram;
use super::{Tokenizer, chat_template};
use crate::error::{Error, Result, shorten};
use crate::model::vocabulary::{RoleId, TokenType, Vocabulary};
use crate::weights::gguf::GgufFile;

/// What to do about a tokenizer that cannot be built.
const WAY_OUT: &str = "put the model's tokenizer.json beside the file, which is used then, or give token ids";

impl Tokenizer {
    /// The tokenizer that a GGUF file carries; `None` where it carries none.
    ///
    /// A `tokenizer.json` in the file's folder is used where the file has no tokenizer, or one that cannot be built.
    pub fn from_gguf(path: &Path) -> Result<Option<Self>> {
        let gguf = GgufFile::open(path)?;
        let own = read(&gguf);
        if let Ok(Some(_)) = &own {
            return own;
        }
        let beside = path.parent().unwrap_or(Path::new("")).join("tokenizer.json");
        if !beside.exists() {
            return own;
        }
        match &own {
            Err(error) => tracing::warn!("{} is used: {error}", beside.display()),
            _ => tracing::info!("{} is used: {} has no tokenizer", beside.display(), path.display()),
        }
        let mut tokenizer = Self::from_hf_dir(beside.parent().unwrap_or(Path::new("")))?;
        // A folder with a tokenizer.json alone has no chat template.
        if let Some(shared) = tokenizer.as_mut().and_then(|tokenizer| Arc::get_mut(&mut tokenizer.shared))
            && shared.chat.is_none()
        {
            shared.chat = chat_source(&gguf).map(chat_template::compile);
        }
        Ok(tokenizer)
    }
}

fn chat_source(gguf: &GgufFile) -> Option<String> {
    gguf.get_str("tokenizer.chat_template").ok().flatten().map(str::to_owned)
}

fn read(gguf: &GgufFile) -> Result<Option<Tokenizer>> {
    let Some(vocabulary) = Vocabulary::read(gguf)? else { return Ok(None) };
    let tables = Tables::read(gguf, &vocabulary)?;
    // A default id has no name: the file does not say that the model knows it.
    let named = |name: &str, role: Option<RoleId>| {
        let role = role.filter(|role| role.given || vocabulary.model != "gpt2")?;
        Some((name.to_owned(), tables.texts.text(role.id)?.to_owned()))
    };
    let named: BTreeMap<String, String> = [
        named("bos_token", tables.bos),
        named("eos_token", vocabulary.eos),
        named("unk_token", vocabulary.unknown),
        named("pad_token", vocabulary.padding),
    ]
    .into_iter()
    .flatten()
    .collect();
    let assembled = Tokenizer::assemble(tables, named, chat_source(gguf));
    assembled.map(Some).map_err(|error| Error::file(gguf.path(), error))
}

/// A GGUF file's tokenizer, ready for use.
#[derive(Debug)]
pub(super) struct Tables {
    texts: Texts,
    types: Vec<TokenType>,
    /// Tokens that are not shown where special ones are skipped.
    hidden: HashSet<u32>,
    partition: Partition,
    encoder: Encoder,
    spelling: Spelling,
    /// A word at the beginning of a text, or behind a special token, has a space before it.
    space_prefix: bool,
    bos: Option<RoleId>,
    /// What is put before and behind a text.
    around: (Option<u32>, Option<u32>),
}

#[derive(Debug)]
enum Encoder {
    Bpe(Box<Bpe>),
    SentencePiece(SentencePiece),
    Unigram(Box<Unigram>),
    Rwkv(Rwkv),
    Plamo(Plamo),
}

/// How tokens spell what they stand for.
#[derive(Debug)]
enum Spelling {
    /// A character for each byte.
    Alphabet(HashMap<char, u8>),
    /// UTF-8 with `▁` for a space and `<0x0A>` for a byte.
    Spaced,
    /// UTF-8 with `<0x0A>` for a byte.
    Verbatim,
    /// Bytes with escapes.
    Escapes,
}

impl Tables {
    fn read(gguf: &GgufFile, vocabulary: &Vocabulary<'_>) -> Result<Self> {
        let flag = |name: &str, default: bool| -> Result<bool> {
            Ok(gguf.get_bool(&format!("tokenizer.ggml.{name}"))?.unwrap_or(default))
        };
        let unknown = vocabulary.unknown.map(|role| role.id);
        let texts = Texts::new(&vocabulary.texts);
        let mut bos = vocabulary.bos;
        let (encoder, spelling, space_prefix, adds_bos, adds_eos) = match vocabulary.model {
            model @ ("gpt2" | "gemma4") => {
                let splitter = splitter(gguf, if model == "gemma4" { Some("gemma4") } else { None })?;
                let row = splitter.row;
                bos = bos.filter(|bos| bos.given || row.has_default_bos);
                let spelling = match row.spelled_out {
                    true => Spelling::Spaced,
                    false => Spelling::Alphabet(bpe::alphabet().into_iter().zip(0..=255).collect()),
                };
                let adds_bos = flag("add_bos_token", row.adds_bos)? || row.gemma;
                let bpe = Bpe::read(gguf, &texts, splitter)?;
                (Encoder::Bpe(Box::new(bpe)), spelling, false, adds_bos, flag("add_eos_token", false)?)
            }
            "llama" => {
                let encoder = SentencePiece::read(gguf, &texts, unknown)?;
                let (adds_bos, adds_eos) = (flag("add_bos_token", true)?, flag("add_eos_token", false)?);
                let space_prefix = flag("add_space_prefix", true)?;
                (Encoder::SentencePiece(encoder), Spelling::Spaced, space_prefix, adds_bos, adds_eos)
            }
            "t5" => {
                let space_prefix = flag("add_space_prefix", false)?;
                let encoder = Unigram::read(gguf, vocabulary, &texts, space_prefix)?;
                let (adds_bos, adds_eos) = (flag("add_bos_token", false)?, flag("add_eos_token", true)?);
                (Encoder::Unigram(Box::new(encoder)), Spelling::Spaced, space_prefix, adds_bos, adds_eos)
            }
            "rwkv" => (Encoder::Rwkv(Rwkv::new(&texts, unknown)), Spelling::Escapes, false, false, false),
            "plamo2" => {
                let encoder = Plamo::read(gguf, vocabulary, &texts)?;
                (Encoder::Plamo(encoder), Spelling::Verbatim, false, false, false)
            }
            "" => {
                let reason =
                    format!("`tokenizer.ggml.model` is missing: the kind of the tokenizer is unknown; {WAY_OUT}");
                return Err(Error::file(gguf.path(), reason));
            }
            other => return Err(unsupported("GGUF tokenizer", other)),
        };
        let id_around = |adds: bool, role: Option<RoleId>, key: &str| {
            if adds && role.is_none() {
                tracing::warn!(
                    "{}: no token is put at the text's end for `{key}`: it has no id",
                    gguf.path().display()
                );
            }
            role.filter(|_| adds).map(|role| role.id)
        };
        let around = (id_around(adds_bos, bos, "add_bos_token"), id_around(adds_eos, vocabulary.eos, "add_eos_token"));

        let hidden = |kind: &TokenType| matches!(kind, TokenType::Control | TokenType::Unknown);
        let by_type = vocabulary.types.iter().zip(0..).filter(|(kind, _)| hidden(kind)).map(|(_, id)| id);
        let roles = [bos, vocabulary.unknown, vocabulary.padding].into_iter().flatten();
        let by_role = roles.filter(|role| role.given || vocabulary.model != "gpt2").map(|role| role.id);
        Ok(Self {
            hidden: by_type.chain(by_role).chain(vocabulary.ends.iter().copied()).collect(),
            partition: Partition::new(special::special_tokens(gguf, vocabulary)?),
            types: vocabulary.types.clone(),
            texts,
            encoder,
            spelling,
            space_prefix,
            bos,
            around,
        })
    }

    /// The tokens of a text.
    pub(super) fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        ids.extend(self.around.0.filter(|_| add_special_tokens));
        let mut after_text = false;
        for part in self.partition.parts(text)? {
            let text = match part {
                Part::Token(id) => {
                    ids.push(id);
                    after_text = false;
                    continue;
                }
                Part::Text(text) => text,
            };
            match &self.encoder {
                Encoder::Bpe(bpe) => bpe.encode(text, &self.texts, &mut ids)?,
                Encoder::SentencePiece(encoder) => {
                    let prefix = if self.space_prefix && !after_text { "▁" } else { "" };
                    encoder.encode(&(prefix.to_owned() + &text.replace(' ', "▁")), &self.texts, &mut ids)?;
                }
                Encoder::Unigram(unigram) => unigram.encode(text, &mut ids)?,
                Encoder::Rwkv(rwkv) => rwkv.encode(text, &mut ids)?,
                Encoder::Plamo(plamo) => plamo.encode(text, &self.texts, &mut ids),
            }
            after_text = true;
        }
        ids.extend(self.around.1.filter(|_| add_special_tokens));
        Ok(ids)
    }

    /// The text of tokens; ids that are no token have none.
    pub(super) fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> String {
        let mut bytes = Vec::new();
        for &id in ids {
            if !(skip_special_tokens && self.hidden.contains(&id)) {
                self.spell(id, &mut bytes);
            }
        }
        let text =
            String::from_utf8(bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned());
        match text.strip_prefix(' ').filter(|_| self.space_prefix) {
            Some(stripped) => stripped.to_owned(),
            None => text,
        }
    }

    fn spell(&self, id: u32, out: &mut Vec<u8>) {
        let Some(text) = self.texts.text(id) else { return };
        if matches!(self.types[id as usize], TokenType::Control | TokenType::Unknown | TokenType::UserDefined) {
            return out.extend(text.bytes());
        }
        match &self.spelling {
            Spelling::Alphabet(bytes) => {
                // A token that is not spelled in the alphabet is text as it is.
                let spelled: Option<Vec<u8>> = text.chars().map(|one| bytes.get(&one).copied()).collect();
                out.extend(spelled.unwrap_or_else(|| text.into()));
            }
            Spelling::Escapes => out.extend(rwkv::unescaped(text)),
            Spelling::Spaced | Spelling::Verbatim => match byte_of(text) {
                Some(byte) => out.push(byte),
                None if matches!(self.spelling, Spelling::Spaced) => out.extend(text.replace('▁', " ").bytes()),
                None => out.extend(text.bytes()),
            },
        }
    }

    pub(super) fn token_to_id(&self, text: &str) -> Option<u32> {
        self.texts.id(text)
    }

    /// Number of tokens.
    pub(super) fn size(&self) -> usize {
        self.texts.len()
    }

    pub(super) fn hidden(&self) -> &HashSet<u32> {
        &self.hidden
    }
}

/// How words are cut, by the file's own name for it or the one given.
fn splitter(gguf: &GgufFile, name: Option<&str>) -> Result<Splitter> {
    let name = match name {
        Some(name) => name,
        None => gguf.get_str("tokenizer.ggml.pre")?.filter(|name| !name.is_empty()).unwrap_or("default"),
    };
    if name == "default" {
        tracing::warn!(
            "{}: `tokenizer.ggml.pre` does not say how texts are cut into words, so other tokens than the model was \
             trained on are likely: take a file that was converted after April 2024",
            gguf.path().display()
        );
    }
    Splitter::named(name)?.ok_or_else(|| unsupported("GGUF pre-tokenizer", name))
}

fn unsupported(what: &'static str, value: &str) -> Error {
    Error::Unsupported { what, value: shorten(value), hint: WAY_OUT.into() }
}

/// The byte that a token like `<0x0A>` stands for.
fn byte_of(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    u8::from_str_radix(digits, 16).ok().filter(|_| digits.len() == 2)
}

#[cfg(test)]
mod tests;
