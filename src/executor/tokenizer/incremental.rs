//! Tokens to text as they come, so that a reader sees words while the model still writes, and never a part of a
//! character.

use super::Tokenizer;
use crate::error::Result;

/// What a decoder writes for bytes that are not (yet) UTF-8.
const REPLACEMENT: char = char::REPLACEMENT_CHARACTER;

/// Tokens in a row without new text after which replacement characters count as text. A character has at most four
/// bytes and a token at least one, so a valid text never comes near this.
const STALLED: usize = 16;
/// Tokens after which the window is cut although its text still ends within a character.
pub(super) const LONGEST_WINDOW: usize = 48;
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
    pub(super) window: Vec<u32>,
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{RngCore, SeedableRng};
    use tokenizers::models::bpe::{BPE, Vocab};
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    use super::super::test_support::{Spaces, TEXTS, all_kinds, byte_level, pieces, plain, sentencepiece_like};
    use super::*;

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
}
