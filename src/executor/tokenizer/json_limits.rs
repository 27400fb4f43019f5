//! Limits on what a tokenizer.json may ask for, checked before the crate `tokenizers` sees it: that crate allocates and
//! repeats as the file says, and a few kilobytes can say gigabytes. Limits are far above what real tokenizers have.

use std::borrow::Cow;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

/// Levels of objects and lists within each other.
const MAX_DEPTH: usize = 24;
/// Characters that one may become by all replacements together.
const MAX_GROWTH: usize = 1024;
/// Characters of a unigram model's or an added token, of a replacement, or of what is put before a text.
const MAX_CONTENT: usize = 1024;
/// Bytes of all tokens of a unigram model, whose trie takes some hundred times as much, and of all added tokens.
const MAX_TEXTS: usize = 6 << 20;
/// Parts of a template for what is put around a text, and tokens of a part.
const MAX_PARTS: usize = 64;
/// Length of a word that WordPiece looks at; its time grows with the cube.
const MAX_WORD: u64 = 1000;
/// Characters of a regular expression.
const MAX_EXPRESSION: usize = 16 << 10;
/// Counted repetitions of a regular expression, multiplied where they are nested.
const MAX_REPETITIONS: usize = 4096;
/// Regular expressions in a file.
const MAX_EXPRESSIONS: usize = 256;

/// Walks over a tokenizer.json. The error says what is beyond a limit, or where the JSON is not valid.
pub(super) fn check(json: &[u8]) -> Result<(), String> {
    let mut limits = Limits { growth: 1, texts: 0, expressions: 0 };
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let walk = Walk { limits: &mut limits, key: "", depth: 0 };
    walk.deserialize(&mut deserializer).map(|_| ()).map_err(|error| error.to_string())
}

struct Limits {
    growth: usize,
    texts: usize,
    expressions: usize,
}

struct Walk<'l> {
    limits: &'l mut Limits,
    /// Of the innermost object's value that this is, or is in.
    key: &'l str,
    depth: usize,
}

/// What an object needs to know of its values.
enum Seen {
    Text(String),
    Other,
}

impl Walk<'_> {
    fn text(self, text: &str) -> Result<(), String> {
        let limits = self.limits;
        let beyond = |what: &str, limit: usize| Err(format!("{what} is longer than {limit} characters"));
        match self.key {
            "content" | "prepend" | "vocab" => {
                limits.texts += text.len();
                if text.chars().count() > MAX_CONTENT {
                    return beyond(&format!("a text of `{}`", self.key), MAX_CONTENT);
                }
                if limits.texts > MAX_TEXTS {
                    return Err(format!("tokens have more than {MAX_TEXTS} bytes"));
                }
            }
            "precompiled_charsmap" => limits.grow(longest_replacement(text)?)?,
            "Regex" => {
                limits.expressions += 1;
                if limits.expressions > MAX_EXPRESSIONS {
                    return Err(format!("there are more than {MAX_EXPRESSIONS} regular expressions"));
                }
                if text.len() > MAX_EXPRESSION {
                    return beyond("a regular expression", MAX_EXPRESSION);
                }
                if repetitions(text) > MAX_REPETITIONS {
                    return Err(format!("a regular expression repeats more than {MAX_REPETITIONS} times"));
                }
            }
            _ => {}
        }
        Ok(())
    }
}

impl Limits {
    fn grow(&mut self, factor: usize) -> Result<(), String> {
        self.growth = self.growth.saturating_mul(factor.max(1));
        match self.growth > MAX_GROWTH {
            true => Err(format!("replacements make a text more than {MAX_GROWTH} times as long")),
            false => Ok(()),
        }
    }
}

impl<'de> DeserializeSeed<'de> for Walk<'_> {
    type Value = Seen;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Seen, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Walk<'_> {
    type Value = Seen;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Seen, E> {
        Ok(Seen::Other)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Seen, E> {
        Ok(Seen::Other)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Seen, E> {
        Ok(Seen::Other)
    }

    fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<Seen, E> {
        if self.key == "max_input_chars_per_word" && number > MAX_WORD {
            return Err(E::custom(format!("`max_input_chars_per_word` is {number}, more than {MAX_WORD}")));
        }
        Ok(Seen::Other)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Seen, E> {
        Ok(Seen::Other)
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Seen, E> {
        let short = matches!(self.key, "type" | "content");
        self.text(text).map_err(E::custom)?;
        Ok(if short { Seen::Text(text.to_owned()) } else { Seen::Other })
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut values: A) -> Result<Seen, A::Error> {
        self.deeper().map_err(A::Error::custom)?;
        let most = if matches!(self.key, "single" | "pair" | "ids") { MAX_PARTS } else { usize::MAX };
        for count in 0.. {
            let walk = Walk { limits: &mut *self.limits, key: self.key, depth: self.depth + 1 };
            if values.next_element_seed(walk)?.is_none() {
                break;
            }
            if count >= most {
                return Err(A::Error::custom(format!("`{}` has more than {MAX_PARTS} elements", self.key)));
            }
        }
        Ok(Seen::Other)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut values: A) -> Result<Seen, A::Error> {
        self.deeper().map_err(A::Error::custom)?;
        let (mut replaces, mut content, mut spells_bytes) = (false, 0, false);
        while let Some(key) = values.next_key::<Cow<'_, str>>()? {
            let walk = Walk { limits: &mut *self.limits, key: &key, depth: self.depth + 1 };
            match (&*key, values.next_value_seed(walk)?) {
                ("type", Seen::Text(kind)) => {
                    replaces |= kind == "Replace";
                    spells_bytes |= kind == "ByteLevel";
                }
                ("content", Seen::Text(text)) => content = content.max(text.chars().count()),
                _ => {}
            }
        }
        if replaces {
            self.limits.grow(content).map_err(A::Error::custom)?;
        }
        if spells_bytes {
            // A byte beyond ASCII becomes a character of two bytes.
            self.limits.grow(2).map_err(A::Error::custom)?;
        }
        Ok(Seen::Other)
    }
}

impl Walk<'_> {
    fn deeper(&self) -> Result<(), String> {
        match self.depth < MAX_DEPTH {
            true => Ok(()),
            false => Err(format!("objects are nested more than {MAX_DEPTH} deep")),
        }
    }
}

/// Checks a charsmap in base64 and gives the characters of its longest replacement. It begins with the length of a
/// table, which is allocated before anything is read, and ends with replacements that each end with a zero.
fn longest_replacement(base64: &str) -> Result<usize, String> {
    let bytes = decode_base64(base64);
    let Some((size, rest)) = bytes.split_first_chunk::<4>() else { return Ok(1) };
    let size = u32::from_le_bytes(*size) as usize;
    let Some(replacements) = rest.get(size..) else {
        return Err(format!("`precompiled_charsmap` has a table of {size} bytes in {}", rest.len()));
    };
    Ok(replacements
        .split(|&byte| byte == 0)
        .map(|text| String::from_utf8_lossy(text).chars().count())
        .max()
        .unwrap_or(1))
}

/// The bytes up to the first character that is not of the alphabet.
fn decode_base64(text: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut count) = (0u32, 0);
    for character in text.bytes() {
        let value = match character {
            b'A'..=b'Z' => character - b'A',
            b'a'..=b'z' => character - b'a' + 26,
            b'0'..=b'9' => character - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => break,
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8); // the upper bits are those of bytes before
        }
    }
    bytes
}

/// What the counted repetitions of an expression amount to: those beside each other added, nested ones multiplied.
fn repetitions(expression: &str) -> usize {
    // For each open group: the sum so far, and that of the last thing in it, to which a count belongs.
    let mut groups = vec![(0usize, 0usize)];
    let mut in_class = false;
    let mut characters = expression.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '(' if !in_class => {
                groups.push((0, 0));
                continue;
            }
            ')' if !in_class && groups.len() > 1 => {
                let inner = groups.pop().map_or(0, |(sum, last)| sum.saturating_add(last));
                if let Some((sum, last)) = groups.last_mut() {
                    (*sum, *last) = (sum.saturating_add(*last), inner);
                }
                continue;
            }
            _ => {}
        }
        let Some((sum, last)) = groups.last_mut() else { break };
        match character {
            '\\' => {
                characters.next();
                (*sum, *last) = (sum.saturating_add(*last), 0);
            }
            _ if in_class => in_class = character != ']',
            '[' => {
                in_class = true;
                (*sum, *last) = (sum.saturating_add(*last), 0);
            }
            '{' => {
                let counts = expression[at + 1..].split('}').next().unwrap_or_default();
                let most = counts.split(',').filter_map(|count| count.trim().parse::<usize>().ok()).max();
                if let Some(most) = most {
                    *last = (*last).max(1).saturating_mul(most);
                }
            }
            _ => {}
        }
    }
    groups.into_iter().fold(0, |all, (sum, last)| all.saturating_add(sum).saturating_add(last))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn refused(json: serde_json::Value) -> String {
        check(json.to_string().as_bytes()).unwrap_err()
    }

    #[test]
    fn nested_repetitions_multiply() {
        assert_eq!(repetitions(r"\p{L}+|\p{N}{1,3}"), 3);
        assert_eq!(repetitions(r"\s{512}(?!\S)|\s{256}"), 768);
        assert_eq!(repetitions("(?:(?=a)b{100}){50}"), 5000);
        assert_eq!(repetitions("((a{9}){9}){9}"), 729);
        assert_eq!(repetitions(r"[{2,99}]\{7}"), 0);
        assert_eq!(repetitions("((((((("), 0);
    }

    #[test]
    fn base64_is_decoded() {
        assert_eq!(decode_base64("aGVsbG8="), b"hello");
        assert_eq!(decode_base64("/+8AAQ=="), [255, 239, 0, 1]);
    }

    #[test]
    fn what_a_tokenizer_may_ask_for_is_bounded() {
        // The header of the charsmap says a table of 4 GB.
        assert!(
            refused(json!({"type": "Precompiled", "precompiled_charsmap": "/////wAA"})).contains("4294967295 bytes")
        );
        let doubling = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"});
        assert!(refused(json!({"normalizers": vec![doubling; 40]})).contains("1024 times"));
        let long = json!({"content": "b".repeat(2000), "type": "Replace", "pattern": {"String": "a"}});
        assert!(refused(long).contains("1024 characters"));
        assert!(refused(json!({"type": "Prepend", "prepend": "b".repeat(2000)})).contains("`prepend`"));
        let bytes = json!({"type": "ByteLevel"});
        assert!(refused(json!({"normalizers": vec![bytes; 20]})).contains("1024 times"));
        assert!(refused(json!({"single": vec![1; 100]})).contains("`single` has more than 64"));
        assert!(refused(json!({"x": {"ids": vec![1; 100]}})).contains("`ids` has more than 64"));
        assert!(refused(json!({"vocab": [["a".repeat(5000), 0.5]]})).contains("1024 characters"));
        assert!(refused(json!({"pattern": {"Regex": "(?:(?=a)b{1000}){1000}"}})).contains("4096 times"));
        assert!(refused(json!({"pattern": {"Regex": "a".repeat(20_000)}})).contains("regular expression"));
        assert!(refused(json!({"max_input_chars_per_word": 1_000_000})).contains("max_input_chars_per_word"));
        assert!(refused(json!({"vocab": vec![json!(["a".repeat(1000), 0.5]); 7000]})).contains("bytes"));
        let nested = (0..30).fold(json!(1), |inner, _| json!([inner]));
        assert!(refused(nested).contains("24 deep"));
        assert!(refused(json!({"vocab": vec![json!({"pattern": {"Regex": "a"}}); 300]})).contains("256 regular"));
        assert!(check(b"{").is_err());

        let usual = json!({
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}|\s+(?!\S)"}, "behavior": "Isolated"},
            "model": {"type": "BPE", "vocab": {"type": 1, "content": 2, "Regex": 3}, "merges": [["a", "b"]]},
        });
        check(usual.to_string().as_bytes()).unwrap();
    }
}
