//! How a text is cut into words before byte-level BPE, by the names that llama.cpp's conversion gives in
//! `tokenizer.ggml.pre`.
//!
//! A row of [`ROWS`] is what one group of names means. Where the expression in a model's own tokenizer.json is known it
//! stands here, since that is what the model was trained with; llama.cpp's engine lacks some of Unicode's classes, and
//! approximates them.

use std::ops::Range;

use fancy_regex::Regex;

use crate::error::{Error, Result};

/// One step of cutting. Steps are applied in turn, each to the words that the one before has left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cut {
    /// Every match is a word, and so is what lies between two matches.
    At(&'static str),
    /// Runs of digits are cut into groups of three, counted from the run's end.
    DigitsByThrees,
}

use Cut::{At, DigitsByThrees};

/// What a name of `tokenizer.ggml.pre` means.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) names: &'static [&'static str],
    pub(super) cuts: &'static [Cut],
    /// A word that is a token as a whole becomes it, whatever the merges say.
    pub(super) whole_words: bool,
    /// A text begins with BOS unless the file says otherwise.
    pub(super) adds_bos: bool,
    /// There is a default BOS token.
    pub(super) has_default_bos: bool,
    /// Tokens are spelled with `▁` for a space and UTF-8 otherwise, in place of a character for each byte.
    pub(super) spelled_out: bool,
    /// Gemma 4's habits: a text begins with BOS whatever the file says, and a run of line ends that is a token becomes
    /// it.
    pub(super) gemma: bool,
}

const PLAIN: Row = Row {
    names: &[],
    cuts: &[],
    whole_words: false,
    adds_bos: false,
    has_default_bos: true,
    spelled_out: false,
    gemma: false,
};

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// DeepSeek-V3's words, after digits and CJK have been cut off.
const MARKED_WORDS: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
const HAN_AND_KANA: &str = "[一-龥぀-ゟ゠-ヿ]+";
const LINES: &str = r"[^\n]+|\n+";

/// What a file without a name, or with the name "default", gets.
const DEFAULT: Row = Row {
    names: &["default"],
    cuts: &[At(r"[\p{P}\$\+<=>\^~\|]+"), At(GPT2), At(r"\p{N}+"), At("[0-9][0-9][0-9]")],
    ..PLAIN
};

#[rustfmt::skip] // a row is read across
static ROWS: [Row; 34] = [
    DEFAULT,
    Row { names: &["gpt-2", "gpt2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum", "modern-bert", "jina-v1-en", "jina-v2-code", "roberta-bpe", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4"], cuts: &[At(GPT2)], ..PLAIN },
    Row { names: &["llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"], cuts: &[At(LLAMA3)], whole_words: true, adds_bos: true, ..PLAIN },
    Row { names: &["dbrx", "smaug-bpe"], cuts: &[At(LLAMA3)], ..PLAIN },
    Row { names: &["chatglm-bpe"], cuts: &[At(LLAMA3)], has_default_bos: false, ..PLAIN },
    Row { names: &["glm4", "glm5"], cuts: &[At(LLAMA3)], whole_words: true, has_default_bos: false, ..PLAIN },
    Row { names: &["qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"], cuts: &[At(QWEN2)], ..PLAIN },
    Row { names: &["qwen35"], cuts: &[At(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")], ..PLAIN },
    Row { names: &["starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"], cuts: &[At(r"\p{N}"), At(GPT2)], ..PLAIN },
    Row { names: &["falcon"], cuts: &[At(r"[\p{P}\$\+<=>\^~\|`]+"), At(GPT2), At("[0-9][0-9][0-9]")], ..PLAIN },
    Row { names: &["tekken"], cuts: &[At(r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")], whole_words: true, adds_bos: true, ..PLAIN },
    Row { names: &["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"], cuts: &[At(GPT4O)], ..PLAIN },
    Row { names: &["granite-embed-multi-97m"], cuts: &[At(GPT4O)], whole_words: true, ..PLAIN },
    Row { names: &["tiny_aya", "cohere2moe"], cuts: &[DigitsByThrees, At(GPT4O)], ..PLAIN },
    Row { names: &["deepseek-llm"], cuts: &[At(r"[\r\n]"), At(CASED_WORDS), At(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"), At(r"\s+$"), At("[一-龥ࠀ-一가-퟿]+"), At(r"\p{N}+")], ..PLAIN },
    Row { names: &["deepseek-coder"], cuts: &[At(r"[\r\n]"), At(r"\s?\p{L}+"), At(r"\s?\p{P}+"), At("[一-龥ࠀ-一가-퟿]+"), At(r"\p{N}")], ..PLAIN },
    Row { names: &["deepseek-v3", "hunyuan-dense", "hy_v4", "joyai-llm"], cuts: &[At(r"\p{N}{1,3}"), At(HAN_AND_KANA), At(MARKED_WORDS)], ..PLAIN },
    Row { names: &["spark2_5"], cuts: &[At(r"\p{N}{1,3}"), At(HAN_AND_KANA), At(r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+"##), At(r"\p{N}")], ..PLAIN },
    Row { names: &["youtu"], cuts: &[At("[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+"), At(r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")], whole_words: true, ..PLAIN },
    Row { names: &["bloom", "gpt3-finnish", "poro-chat"], cuts: &[At(r" ?[^(\s|.,!?…。，、।۔،)]+")], ..PLAIN },
    Row { names: &["viking"], cuts: &[At(r" ?[^(\s|.,!?…。，、।۔،)]+"), At(r"\p{N}")], ..PLAIN },
    Row { names: &["chameleon"], cuts: &[At("<sentinel:[0-9]+>"), At("IMGIMG[A-I]{1,4}Z"), At(r"[\t\n]|    |  "), At(r"\p{N}"), At(r"[\p{P}!-/:-@\[-`\{-~]"), At(GPT2)], adds_bos: true, ..PLAIN },
    Row { names: &["kimi-k2"], cuts: &[At(r"\p{Han}+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")], ..PLAIN },
    Row { names: &["superbpe"], cuts: &[At(r"\p{N}+"), DigitsByThrees], ..PLAIN },
    Row { names: &["bailingmoe", "bailingmoe2", "llada-moe"], cuts: &[At(r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")], ..PLAIN },
    Row { names: &["seed-coder"], cuts: &[At(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+")], ..PLAIN },
    Row { names: &["ufakzeka"], cuts: &[At(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")], ..PLAIN },
    Row { names: &["afmoe"], cuts: &[DigitsByThrees, At("[一-鿿㐀-䶿豈-﫿぀-ゟ゠-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+"), At(MARKED_WORDS)], ..PLAIN },
    Row { names: &["laguna"], cuts: &[At(LINES), At(QWEN2)], ..PLAIN },
    Row { names: &["exaone-moe"], cuts: &[At(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+")], ..PLAIN },
    Row { names: &["jais-2"], cuts: &[At(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s")], ..PLAIN },
    Row { names: &["minicpm5"], cuts: &[At(r"\p{N}{1,3}"), At(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")], whole_words: true, ..PLAIN },
    Row { names: &["gemma4", "granite-embed-multi-311m"], cuts: &[At(LINES)], spelled_out: true, gemma: true, ..PLAIN },
    Row { names: &["sarvam-moe"], cuts: &[At(LINES)], spelled_out: true, ..PLAIN },
];

/// DeepSeek-LLM's cased letters, by their ranges.
const CASED_WORDS: &str = r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+";

#[cfg(test)]
pub(super) fn rows() -> &'static [Row] {
    &ROWS
}

/// A row of the table, ready for use.
#[derive(Debug)]
pub(super) struct Splitter {
    pub(super) row: &'static Row,
    steps: Vec<Step>,
}

#[derive(Debug)]
enum Step {
    At(Regex),
    DigitsByThrees,
}

impl Splitter {
    /// The splitter of a name; `None` for names that are not known.
    pub(super) fn named(name: &str) -> Result<Option<Self>> {
        let Some(row) = ROWS.iter().find(|row| row.names.contains(&name)) else { return Ok(None) };
        let step = |cut: &Cut| match cut {
            At(expression) => Regex::new(expression).map(Step::At).map_err(|error| Error::Tokenizer(error.to_string())),
            DigitsByThrees => Ok(Step::DigitsByThrees),
        };
        Ok(Some(Self { row, steps: row.cuts.iter().map(step).collect::<Result<_>>()? }))
    }

    /// The words of a text, one after the other, which together are the text.
    pub(super) fn words(&self, text: &str) -> Result<Vec<Range<usize>>> {
        let mut words: Vec<Range<usize>> = std::iter::once(0..text.len()).collect();
        for step in &self.steps {
            let mut finer = Vec::with_capacity(words.len());
            for word in words {
                let start = word.start;
                let mut at = start;
                let mut cut = |from: usize, to: usize| {
                    if start + from > at {
                        finer.push(at..start + from);
                    }
                    if to > from {
                        finer.push(start + from..start + to);
                    }
                    at = start + to;
                };
                let piece = &text[word.clone()];
                match step {
                    Step::At(expression) => {
                        for found in expression.find_iter(piece) {
                            let found = found.map_err(|error| {
                                Error::Tokenizer(format!("the text cannot be cut into words: {error}"))
                            })?;
                            cut(found.start(), found.end());
                        }
                    }
                    Step::DigitsByThrees => digits_by_threes(piece, &mut cut),
                }
                if at < word.end {
                    finer.push(at..word.end);
                }
            }
            words = finer;
        }
        words.retain(|word| !word.is_empty());
        Ok(words)
    }
}

/// Calls `cut` with the groups of each run of numerals: the first has one to three, the others three.
fn digits_by_threes(text: &str, cut: &mut impl FnMut(usize, usize)) {
    let mut characters = text.char_indices().peekable();
    let mut ends = Vec::new();
    while let Some((start, character)) = characters.next() {
        if !character.is_numeric() {
            continue;
        }
        ends.clear();
        ends.push(start);
        ends.push(start + character.len_utf8());
        while let Some((at, digit)) = characters.next_if(|&(_, next)| next.is_numeric()) {
            ends.push(at + digit.len_utf8());
        }
        let digits = ends.len() - 1;
        let mut from = 0;
        let mut to = if digits.is_multiple_of(3) { 3 } else { digits % 3 };
        while from < digits {
            cut(ends[from], ends[to]);
            (from, to) = (to, to + 3);
        }
    }
}
