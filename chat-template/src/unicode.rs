//! Classes and cases of characters as Python has them. Rust's own tables serve where the definitions are the same.

#[path = "unicode_tables.rs"]
mod tables;

use std::cmp::Ordering;

fn is_in(table: &[(u32, u32)], c: char) -> bool {
    let code = u32::from(c);
    let place = |&(first, last): &(u32, u32)| match code {
        code if code < first => Ordering::Greater,
        code if code > last => Ordering::Less,
        _ => Ordering::Equal,
    };
    table.binary_search_by(place).is_ok()
}

fn mapped(table: &[(u32, &'static str)], c: char) -> Option<&'static str> {
    table.binary_search_by_key(&u32::from(c), |(code, _)| *code).ok().map(|at| table[at].1)
}

/// `str.isspace` of a character, which `strip`, `split` and regular expressions go by.
pub(crate) fn is_space(c: char) -> bool {
    matches!(
        c,
        '\t'..='\r' | '\x1c'..=' ' | '\u{85}' | '\u{a0}' | '\u{1680}' | '\u{2000}'..='\u{200a}' | '\u{2028}'
        | '\u{2029}' | '\u{202f}' | '\u{205f}' | '\u{3000}'
    )
}

pub(crate) fn is_printable(c: char) -> bool {
    if c.is_ascii() { matches!(c, ' '..='~') } else { !is_in(tables::UNPRINTABLE, c) }
}

pub(crate) fn is_alpha(c: char) -> bool {
    if c.is_ascii() { c.is_ascii_alphabetic() } else { is_in(tables::ALPHA, c) }
}

/// Digits that a number can be written with.
pub(crate) fn is_decimal(c: char) -> bool {
    if c.is_ascii() { c.is_ascii_digit() } else { is_in(tables::DECIMAL, c) }
}

pub(crate) fn is_digit(c: char) -> bool {
    is_decimal(c) || is_in(tables::OTHER_DIGIT, c)
}

pub(crate) fn is_numeric(c: char) -> bool {
    is_digit(c) || is_in(tables::OTHER_NUMERIC, c)
}

pub(crate) fn is_alnum(c: char) -> bool {
    is_alpha(c) || is_numeric(c)
}

/// Value of a decimal digit of any script.
pub(crate) fn decimal_value(c: char) -> Option<u32> {
    if c.is_ascii() {
        return c.to_digit(10);
    }
    // Scripts have their ten digits in a row, some of them several rows one after the other.
    let code = u32::from(c);
    let at = tables::DECIMAL.partition_point(|&(_, last)| last < code);
    let (first, _) = *tables::DECIMAL.get(at).filter(|(first, _)| *first <= code)?;
    Some((code - first) % 10)
}

fn is_title_char(c: char) -> bool {
    is_in(tables::TITLE, c)
}

fn is_cased(c: char) -> bool {
    c.is_lowercase() || c.is_uppercase() || is_title_char(c)
}

pub(crate) fn is_upper(text: &str) -> bool {
    let wrong = |c: char| c.is_lowercase() || is_title_char(c);
    !text.chars().any(wrong) && text.chars().any(char::is_uppercase)
}

pub(crate) fn is_lower(text: &str) -> bool {
    let wrong = |c: char| c.is_uppercase() || is_title_char(c);
    !text.chars().any(wrong) && text.chars().any(char::is_lowercase)
}

pub(crate) fn is_title(text: &str) -> bool {
    let (mut any, mut within) = (false, false);
    for c in text.chars() {
        if c.is_uppercase() || is_title_char(c) {
            if within {
                return false;
            }
            (any, within) = (true, true);
        } else if c.is_lowercase() {
            if !within {
                return false;
            }
            any = true;
        } else {
            within = false;
        }
    }
    any
}

/// Characters around a capital sigma that are looked at.
const MOST_MARKS: usize = 30;

/// Lower case of the character at `at`: a capital sigma has two, by what is around it.
fn lower_at(text: &str, at: usize, c: char, out: &mut String) {
    if c != 'Σ' {
        out.extend(c.to_lowercase());
        return;
    }
    // Only marks and the like stand between a letter and the end of its word; a long run of them is no text.
    let before: String = text[..at].chars().rev().take(MOST_MARKS).collect();
    let before: String = before.chars().rev().chain(['Σ']).collect();
    let after: String = ['A'].into_iter().chain(text[at..].chars().take(MOST_MARKS)).collect();
    let (follows_letter, ends_word) = (before.to_lowercase().ends_with('ς'), after.to_lowercase().starts_with("aς"));
    out.push(if follows_letter && ends_word { 'ς' } else { 'σ' });
}

fn title_char(c: char, out: &mut String) {
    match mapped(tables::TO_TITLE, c) {
        Some(title) => out.push_str(title),
        None => out.extend(c.to_uppercase()),
    }
}

/// `str.title`.
pub(crate) fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut within = false;
    for (at, c) in text.char_indices() {
        if within {
            lower_at(text, at, c, &mut out)
        } else {
            title_char(c, &mut out)
        }
        within = is_cased(c);
    }
    out
}

/// `str.capitalize`.
pub(crate) fn capitalize(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for (at, c) in text.char_indices() {
        if at == 0 { title_char(c, &mut out) } else { lower_at(text, at, c, &mut out) }
    }
    out
}

/// `str.swapcase`.
pub(crate) fn swap_case(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for (at, c) in text.char_indices() {
        if c.is_uppercase() {
            lower_at(text, at, c, &mut out);
        } else if c.is_lowercase() {
            out.extend(c.to_uppercase());
        } else {
            out.push(c);
        }
    }
    out
}

/// `str.casefold`.
pub(crate) fn casefold(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match mapped(tables::TO_FOLDED, c) {
            Some(folded) => out.push_str(folded),
            None => out.extend(c.to_lowercase()),
        }
    }
    out
}
