//! The vocabulary of a GGUF file as its metadata describe it: texts and types of the tokens, the ids with a role, and
//! the tokens that end a generation. The config takes the end tokens from here and the tokenizer everything, so the two
//! cannot disagree.
//!
//! Files say less than a model needs: many name one end token where the chat format has several, and give control
//! tokens the type of ordinary text. Like llama.cpp, this module knows such tokens by their text.

use std::collections::{HashMap, HashSet};

use crate::error::{Error, Result, shorten};
use crate::weights::gguf::GgufFile;

/// Type of a token, as `tokenizer.ggml.token_type` numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TokenType {
    /// No text of its own.
    Undefined = 0,
    /// Ordinary text.
    Normal = 1,
    /// Stands for text without a token.
    Unknown = 2,
    /// Has a role and is not shown.
    Control = 3,
    /// Recognised in a text as a whole, and shown.
    UserDefined = 4,
    /// Reserved.
    Unused = 5,
    /// One byte, spelled `<0x0A>`.
    Byte = 6,
}

impl TokenType {
    fn from_number(number: f64) -> Self {
        use TokenType::*;
        let known = [Undefined, Normal, Unknown, Control, UserDefined, Unused, Byte];
        known.into_iter().find(|&kind| f64::from(kind as u8) == number).unwrap_or(Undefined)
    }
}

/// Texts that end a generation wherever they are a token.
const END_TEXTS: [&str; 22] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
];

/// Texts that stand for the token of a role when no key names one; the first that the vocabulary has does.
struct Role {
    keys: &'static [&'static str],
    texts: &'static [&'static str],
    /// Whether the token ends a generation.
    ends: bool,
}

/// Roles in code completion. The padding, repository and separator tokens follow the completed code.
const FILL_IN_ROLES: [Role; 6] = [
    Role {
        keys: &["fim_pre_token_id", "prefix_token_id"],
        texts: &[
            "<|fim_prefix|>",
            "<fim-prefix>",
            "<fim_prefix>",
            "<｜fim▁begin｜>",
            "<PRE>",
            "▁<PRE>",
            "<|code_prefix|>",
            "<|prefix|>",
        ],
        ends: false,
    },
    Role {
        keys: &["fim_suf_token_id", "suffix_token_id"],
        texts: &[
            "<|fim_suffix|>",
            "<fim-suffix>",
            "<fim_suffix>",
            "<｜fim▁hole｜>",
            "<SUF>",
            "▁<SUF>",
            "<|code_suffix|>",
            "<|suffix|>",
        ],
        ends: false,
    },
    Role {
        keys: &["fim_mid_token_id", "middle_token_id"],
        texts: &[
            "<|fim_middle|>",
            "<fim-middle>",
            "<fim_middle>",
            "<｜fim▁end｜>",
            "<MID>",
            "▁<MID>",
            "<|code_middle|>",
            "<|middle|>",
        ],
        ends: false,
    },
    Role {
        keys: &["fim_pad_token_id"],
        texts: &["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"],
        ends: true,
    },
    Role {
        keys: &["fim_rep_token_id"],
        texts: &["<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"],
        ends: true,
    },
    Role { keys: &["fim_sep_token_id"], texts: &["<|file_sep|>"], ends: true },
];

/// Parts of the harmony format: they open a message's parts, which a reader of the text needs to see.
const SHOWN_TEXTS: [&str; 4] = ["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"];

/// Vocabularies with one of these have an ordinary `</s>`.
const WITH_ORDINARY_S: [&str; 2] = ["<|tool_response>", "<|plamo:eos|>"];

/// The ids that have a role when the file does not say, by the kind of tokenizer.
#[derive(Debug, Clone, Copy, Default)]
struct DefaultIds {
    bos: Option<u32>,
    eos: Option<u32>,
    unknown: Option<u32>,
    padding: Option<u32>,
}

fn default_ids(model: &str) -> DefaultIds {
    let ids = |bos, eos, unknown, padding| DefaultIds { bos, eos, unknown, padding };
    match model {
        "llama" => ids(Some(1), Some(2), Some(0), None),
        "gpt2" => ids(Some(11), Some(11), None, None),
        "t5" => ids(None, Some(1), Some(2), Some(0)),
        "plamo2" => ids(Some(1), Some(2), Some(0), Some(3)),
        "bert" => ids(Some(101), None, Some(100), Some(0)),
        _ => DefaultIds::default(),
    }
}

/// An id with a role.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RoleId {
    pub(crate) id: u32,
    /// Whether the file names it; otherwise it is the default of the tokenizer's kind.
    pub(crate) given: bool,
}

/// A GGUF file's vocabulary.
#[derive(Debug)]
pub(crate) struct Vocabulary<'a> {
    /// `tokenizer.ggml.model`.
    pub(crate) model: &'a str,
    /// Texts by id, as the file spells them.
    pub(crate) texts: Vec<&'a str>,
    /// Types by id, as the file has them; all [`TokenType::Normal`] when it has none.
    pub(crate) stored_types: Vec<TokenType>,
    /// Types by id, corrected by what the texts tell.
    pub(crate) types: Vec<TokenType>,
    pub(crate) bos: Option<RoleId>,
    pub(crate) eos: Option<RoleId>,
    pub(crate) unknown: Option<RoleId>,
    pub(crate) padding: Option<RoleId>,
    /// Tokens that end a generation, EOS first.
    pub(crate) ends: Vec<u32>,
}

impl<'a> Vocabulary<'a> {
    /// Reads a file's vocabulary; `None` when it has none. An id with a role that is no token's is ignored with a
    /// warning.
    pub(crate) fn read(gguf: &'a GgufFile) -> Result<Option<Self>> {
        let model = gguf.get_str("tokenizer.ggml.model")?.unwrap_or_default();
        if matches!(model, "none" | "no_vocab") {
            return Ok(None);
        }
        let Some(texts) = gguf.get_str_array("tokenizer.ggml.tokens")? else { return Ok(None) };
        let mut stored_types = vec![TokenType::Normal; texts.len()];
        if let Some(numbers) = gguf.get_f64_array("tokenizer.ggml.token_type")? {
            if numbers.len() < texts.len() {
                let reason = format!(
                    "metadata key `tokenizer.ggml.token_type` has {} elements for {} tokens: convert the model again",
                    numbers.len(),
                    texts.len()
                );
                return Err(Error::file(gguf.path(), reason));
            }
            stored_types = numbers[..texts.len()].iter().map(|&number| TokenType::from_number(number)).collect();
        }
        let default = default_ids(model);
        let count = texts.len();
        let role = |names: &[&str], default: Option<u32>| role_id(gguf, names, default, count);
        let mut vocabulary = Self {
            model,
            types: stored_types.clone(),
            stored_types,
            bos: role(&["bos_token_id"], default.bos),
            eos: role(&["eos_token_id"], default.eos),
            unknown: role(&["unknown_token_id", "unk_token_id"], default.unknown),
            padding: role(&["padding_token_id", "pad_token_id"], default.padding),
            ends: Vec::new(),
            texts,
        };
        vocabulary.find_ends(gguf);
        Ok(Some(vocabulary))
    }

    /// Finds the end tokens and corrects types, in the order in which llama.cpp does.
    fn find_ends(&mut self, gguf: &GgufFile) {
        let known = END_TEXTS.iter().chain(&SHOWN_TEXTS).chain(&WITH_ORDINARY_S);
        let known = known.chain(FILL_IN_ROLES.iter().flat_map(|role| role.texts));
        let mut by_text: HashMap<&str, Option<u32>> = known.map(|&text| (text, None)).collect();
        for (id, text) in self.texts.iter().enumerate() {
            if let Some(found) = by_text.get_mut(text) {
                *found = Some(id as u32); // a file's length bounds the number of tokens
            }
        }
        let token = |text: &str| by_text.get(text).copied().flatten();

        let mut ends: Vec<u32> = self.eos.iter().map(|eos| eos.id).collect();
        for name in ["eot_token_id", "eom_token_id"] {
            ends.extend(role_id(gguf, &[name], None, self.texts.len()).map(|role| role.id));
        }
        let listed = gguf.get_u64_array("tokenizer.ggml.eos_token_ids").ok().flatten().unwrap_or_default();
        ends.extend(listed.into_iter().filter(|&id| id < self.texts.len() as u64).map(|id| id as u32));
        for role in &FILL_IN_ROLES {
            let given = role_id(gguf, role.keys, None, self.texts.len()).map(|role| role.id);
            let found = given.or_else(|| {
                let id = role.texts.iter().find_map(|&text| token(text))?;
                self.types[id as usize] = TokenType::Control;
                Some(id)
            });
            ends.extend(found.filter(|_| role.ends));
        }
        for id in END_TEXTS.iter().filter_map(|&text| token(text)) {
            self.types[id as usize] = TokenType::Control;
            ends.push(id);
        }
        for id in SHOWN_TEXTS.iter().filter_map(|&text| token(text)) {
            self.types[id as usize] = TokenType::UserDefined;
        }

        // In harmony's format a message ends with `<|end|>` and the answer goes on.
        let ends_with = |ends: &[u32], text: &str| token(text).filter(|id| ends.contains(id));
        let call = ends_with(&ends, "<|call|>").or(ends_with(&ends, "<|calls|>"));
        let answer_goes_on =
            call.is_some() && (ends_with(&ends, "<|return|>").or(ends_with(&ends, "<|flush|>"))).is_some();
        if let Some(end) = ends_with(&ends, "<|end|>").filter(|_| answer_goes_on) {
            ends.retain(|&id| id != end);
            self.types[end as usize] = TokenType::UserDefined;
        }
        let ordinary_s = WITH_ORDINARY_S.iter().any(|text| ends_with(&ends, text).is_some());
        if let Some(s) = ends_with(&ends, "</s>").filter(|_| ordinary_s) {
            ends.retain(|&id| id != s);
            self.types[s as usize] = TokenType::Normal;
        }
        let mut seen = HashSet::new();
        ends.retain(|&id| seen.insert(id));
        self.ends = ends;
    }
}

/// The ids that end a generation by a GGUF file's metadata. A vocabulary that cannot be read leaves those that keys
/// name: token ids are of use without it.
pub(crate) fn end_token_ids(gguf: &GgufFile) -> Vec<u32> {
    match Vocabulary::read(gguf) {
        Ok(Some(vocabulary)) => vocabulary.ends,
        Ok(None) | Err(_) => {
            let ids = ["eos_token_id", "eot_token_id", "eom_token_id"]
                .map(|name| role_id(gguf, &[name], None, usize::MAX).map(|role| role.id));
            let mut ends = Vec::new();
            for id in ids.into_iter().flatten() {
                if !ends.contains(&id) {
                    ends.push(id);
                }
            }
            ends
        }
    }
}

/// The id under the first key that names a token, or the default if that is one.
fn role_id(gguf: &GgufFile, names: &[&str], default: Option<u32>, count: usize) -> Option<RoleId> {
    let is_token = |id: &u32| (*id as usize) < count;
    let default = default.filter(is_token).map(|id| RoleId { id, given: false });
    for name in names {
        let key = format!("tokenizer.ggml.{name}");
        match gguf.get_u64(&key) {
            Ok(None) => {}
            Ok(Some(id)) => match u32::try_from(id).ok().filter(is_token) {
                Some(id) => return Some(RoleId { id, given: true }),
                None => tracing::warn!("{}: `{key}` is {id}, which is no token: ignored", gguf.path().display()),
            },
            Err(error) => tracing::warn!("{}: ignored", shorten(&error.to_string())),
        }
    }
    default
}
