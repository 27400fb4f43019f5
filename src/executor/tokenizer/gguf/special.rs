//! Which tokens are recognised in a text as a whole, and which of them strip the white space beside them. No key of a
//! GGUF file says the latter: it is known by model, as in llama.cpp.

use super::partition::SpecialToken;
use crate::error::Result;
use crate::model::vocabulary::{TokenType, Vocabulary};
use crate::weights::gguf::GgufFile;

/// Tokens that a model's own tokenizer lets strip white space.
enum Strips {
    Nothing,
    /// On the left of this token.
    LeftOf(&'static str),
    /// On the right of every special token but these.
    RightOfAllBut(&'static [&'static str]),
}

fn strips(gguf: &GgufFile, vocabulary: &Vocabulary<'_>) -> Result<Strips> {
    let pre = gguf.get_str("tokenizer.ggml.pre").ok().flatten().unwrap_or_default();
    let architecture = gguf.get_str("general.architecture")?.unwrap_or_default();
    let name = gguf.get_str("general.name").ok().flatten().unwrap_or_default().to_lowercase();
    let has = |text: &str, parts: &[&str]| parts.iter().any(|part| text.contains(part));
    // Phi-4-mini has the architecture too, and a tokenizer that strips nothing.
    let phi3 = architecture == "phi3" && vocabulary.model == "llama";
    Ok(
        if has(pre, &["jina-v2-de", "jina-v2-es", "jina-v2-code"])
            || has(architecture, &["nomic-bert-moe", "jina-bert-v3"])
        {
            Strips::LeftOf("<mask>")
        } else if phi3 || has(&name, &["phi-3", "phi3"]) {
            Strips::RightOfAllBut(&["<unk>", "<s>", "<|endoftext|>"])
        } else if name.contains("modern-bert") {
            Strips::LeftOf("[MASK]")
        } else {
            Strips::Nothing
        },
    )
}

/// The tokens that are recognised in a text as a whole.
pub(super) fn special_tokens<'a>(gguf: &GgufFile, vocabulary: &Vocabulary<'a>) -> Result<Vec<(&'a str, SpecialToken)>> {
    let strips = strips(gguf, vocabulary)?;
    let special = [TokenType::Control, TokenType::UserDefined, TokenType::Unknown];
    let tokens = vocabulary.texts.iter().zip(&vocabulary.types).zip(0..);
    let tokens = tokens.filter(|((_, kind), _)| special.contains(kind)).map(|((&text, _), id)| {
        let strips_left = matches!(strips, Strips::LeftOf(token) if token == text);
        let strips_right = matches!(strips, Strips::RightOfAllBut(others) if !others.contains(&text));
        (text, SpecialToken { id, strips_left, strips_right })
    });
    Ok(tokens.collect())
}
