//! Filters that shorten and wrap texts.

use crate::arguments::CallArgs;
use crate::error::{Error, Result};
use crate::limits;
use crate::methods::text::split_lines;
use crate::methods::text_of;
use crate::unicode::{is_alnum, is_decimal};
use crate::value::{Builder, Text, Value};

pub(super) fn filter(name: &str, input: &Value, arguments: CallArgs) -> Result<Value> {
    if name == "truncate" {
        return truncate(input, arguments);
    }
    let names = ["width", "break_long_words", "wrapstring", "break_on_hyphens"];
    let [width, long, wrapper, hyphens] = arguments.bind(name, names, 0)?;
    let width = width.map_or(Ok(79), |width| width.need_int())?;
    let flag = |value: Option<Value>| value.is_none_or(|value| value.truth());
    let wrapper = match wrapper {
        None | Some(Value::None) => Text::free("\n"),
        Some(wrapper) => wrapper.need_text()?.clone(),
    };
    let (long, hyphens) = (flag(long), flag(hyphens));
    let text = input.need_text()?;
    limits::scan(text.len().saturating_mul(4))?;
    let mut out = Builder::new();
    for (at, line) in split_lines(text, false).into_iter().enumerate() {
        if at > 0 {
            out.push_str(&wrapper)?;
        }
        for (at, wrapped) in wrap(line, width, long, hyphens)?.into_iter().enumerate() {
            if at > 0 {
                out.push_str(&wrapper)?;
            }
            out.push_str(&wrapped)?;
        }
    }
    Ok(Value::Str(out.into_text()?))
}

fn truncate(input: &Value, arguments: CallArgs) -> Result<Value> {
    let [length, kill, end, leeway] = arguments.bind("truncate", ["length", "killwords", "end", "leeway"], 0)?;
    let length = length.map_or(Ok(255), |length| length.need_int())?;
    let end = text_of(end, "...")?;
    let leeway = match leeway {
        None | Some(Value::None) => 5,
        Some(leeway) => leeway.need_int()?,
    };
    let end_length = end.chars_len()? as i128;
    if length < end_length || leeway < 0 {
        return Err(Error::runtime(format!("truncate needs length >= {end_length} and leeway >= 0")));
    }
    // Whatever has a length that is short enough stays as it is.
    if crate::value::length(input)?.is_some_and(|found| found as i128 <= length.saturating_add(leeway)) {
        return Ok(input.clone());
    }
    let text = input.need_text()?;
    let keep = (length - end_length) as usize;
    let kept = text.char_indices().nth(keep).map_or(&**text, |(at, _)| &text[..at]);
    let kept = match kill.is_some_and(|kill| kill.truth()) {
        true => kept,
        false => kept.rsplit_once(' ').map_or(kept, |(kept, _)| kept),
    };
    let mut out = Builder::new();
    out.push_str(kept)?;
    match text.is_markup() {
        true => out.push_str(&end.escaped()?)?,
        false => out.push_str(&end)?,
    }
    Value::Str(out.into_text()?).marked_like(text)
}

fn is_blank(c: char) -> bool {
    matches!(c, '\t' | '\n' | '\x0b' | '\x0c' | '\r' | ' ')
}

/// Python's `textwrap.wrap` of one line.
fn wrap(line: &str, width: i128, break_long: bool, hyphens: bool) -> Result<Vec<String>> {
    if width <= 0 {
        return Err(Error::runtime(format!("invalid width {width} (must be > 0)")));
    }
    let width = usize::try_from(width).unwrap_or(usize::MAX);
    let chars: Vec<char> = line.chars().collect();
    limits::check_elements(chars.len(), 4 * size_of::<char>())?;
    let mut chunks: Vec<&[char]> = split(&chars, hyphens);
    chunks.reverse();
    let mut lines: Vec<String> = Vec::new();
    while !chunks.is_empty() {
        limits::step(1)?;
        let mut current: Vec<&[char]> = Vec::new();
        let mut length = 0;
        let blank = |chunk: &[char]| chunk.iter().all(|&c| crate::unicode::is_space(c));
        if !lines.is_empty() && chunks.last().is_some_and(|chunk| blank(chunk)) {
            chunks.pop();
        }
        while let Some(chunk) = chunks.last() {
            if length + chunk.len() > width {
                break;
            }
            length += chunk.len();
            current.extend(chunks.pop());
        }
        if let Some(chunk) = chunks.last().copied().filter(|chunk| chunk.len() > width) {
            let room = width - length;
            if break_long {
                let mut end = room;
                if hyphens && chunk.len() > room {
                    let hyphen = chunk[..room].iter().rposition(|&c| c == '-');
                    if let Some(at) = hyphen.filter(|&at| at > 0 && chunk[..at].iter().any(|&c| c != '-')) {
                        end = at + 1;
                    }
                }
                let end = if length == 0 { end.max(1) } else { end };
                current.push(&chunk[..end]);
                chunks.pop();
                chunks.push(&chunk[end..]);
            } else if current.is_empty() {
                current.extend(chunks.pop());
            }
        }
        if current.last().is_some_and(|chunk| blank(chunk)) {
            current.pop();
        }
        if !current.is_empty() {
            lines.push(current.concat().into_iter().collect());
        }
    }
    Ok(lines)
}

/// Pieces between which a line can be broken: words, the space between them, and parts of words with hyphens.
fn split(chars: &[char], hyphens: bool) -> Vec<&[char]> {
    let mut chunks = Vec::new();
    let mut start = 0;
    while start < chars.len() {
        let end = if is_blank(chars[start]) {
            run(chars, start, is_blank)
        } else if hyphens {
            word_end(chars, start)
        } else {
            run(chars, start, |c| !is_blank(c))
        };
        chunks.push(&chars[start..end]);
        start = end;
    }
    chunks
}

fn run(chars: &[char], start: usize, holds: impl Fn(char) -> bool) -> usize {
    chars[start..].iter().position(|&c| !holds(c)).map_or(chars.len(), |length| start + length)
}

fn is_word(c: char) -> bool {
    c == '_' || is_alnum(c)
}

fn is_letter(c: char) -> bool {
    is_word(c) && !is_decimal(c)
}

/// Where a piece of a word ends: behind a hyphen between letters, around a dash of several hyphens, or with the word.
fn word_end(chars: &[char], start: usize) -> usize {
    let at = |index: usize| chars.get(index).copied();
    let before = |index: usize, back: usize| index.checked_sub(back).and_then(at);
    let punctuation = |c: char| is_word(c) || matches!(c, '!' | '"' | '\'' | '&' | '.' | ',' | '?');
    let dash = |index: usize| {
        let end = run(chars, index.min(chars.len()), |c| c == '-');
        (end >= index + 2 && at(end).is_some_and(is_word)).then_some(end)
    };
    let after_punctuation = before(start, 1).is_some_and(punctuation);
    if let Some(end) = dash(start).filter(|_| after_punctuation) {
        return end;
    }
    for end in start + 1..=chars.len() {
        // A hyphen follows what was read.
        if at(end) == Some('-') {
            let next = end + 1;
            let two = before(end, 1).is_some_and(is_letter) && before(end, 2).is_some_and(is_letter);
            let one = before(end, 1).is_some_and(punctuation)
                && before(end, 2) == Some('-')
                && before(end, 3).is_some_and(is_letter);
            let letters = at(next).is_some_and(is_letter)
                && (at(next + 1).is_some_and(is_letter)
                    || at(next + 1) == Some('-') && at(next + 2).is_some_and(is_letter));
            if (two || one) && letters {
                return next;
            }
        }
        if at(end).is_none_or(is_blank) {
            return end;
        }
        if before(end, 1).is_some_and(punctuation) && dash(end).is_some() {
            return end;
        }
    }
    chars.len()
}
