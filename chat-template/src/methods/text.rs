//! Methods of texts.

use std::collections::HashSet;

use super::{no_method, text_of};
use crate::arguments::CallArgs;
use crate::error::{Error, Result};
use crate::eval::Evaluator;
use crate::format;
use crate::limits::{self, Charge};
use crate::unicode::{self, is_space};
use crate::value::{Builder, ELEMENT, Text, Value, collect, display, iterate};

pub(super) fn call(
    text: &Text,
    name: &'static str,
    mut arguments: CallArgs,
    evaluator: &mut Evaluator<'_>,
) -> Result<Value> {
    if !text.is_markup() {
        return call_plain(text, name, arguments, evaluator);
    }
    // A text that is marked as safe for HTML escapes what comes in, and gives texts of its kind.
    match (name, arguments.positional.as_mut_slice()) {
        ("replace", [_, added, ..]) | ("ljust" | "rjust" | "center", [_, added]) => {
            *added = Value::Str(display(added)?.escaped()?);
        }
        ("join", [items]) => {
            let escaped = collect(items)?.into_iter().map(|item| Ok(Value::Str(display(&item)?.escaped()?)));
            *items = Value::list(escaped.collect::<Result<_>>()?)?;
        }
        _ => {}
    }
    call_plain(text, name, arguments, evaluator)?.into_markup()
}

fn call_plain(text: &Text, name: &'static str, arguments: CallArgs, evaluator: &mut Evaluator<'_>) -> Result<Value> {
    limits::scan(text.len())?;
    let receiver = Value::Str(text.clone());
    match name {
        "format" => return format::str_format(text, arguments, evaluator),
        "format_map" => {
            let [values] = arguments.positional(name, 1)?;
            return format::str_format_map(text, &values.unwrap_or(Value::None), evaluator);
        }
        "split" | "rsplit" => {
            let [separator, most] = arguments.bind(name, ["sep", "maxsplit"], 0)?;
            return split(text, separator, most, name == "rsplit");
        }
        "splitlines" => {
            let [keep] = arguments.bind(name, ["keepends"], 0)?;
            let lines = split_lines(text, keep.is_some_and(|keep| keep.truth()));
            return list_of(lines.into_iter());
        }
        "encode" => {
            let [encoding, _] = arguments.bind(name, ["encoding", "errors"], 0)?;
            let encoding = text_of(encoding, "utf-8")?.to_lowercase();
            return match encoding.as_str() {
                "utf-8" | "utf8" => Ok(Value::Bytes(text.as_bytes().to_vec().into())),
                "ascii" if text.is_ascii() => Ok(Value::Bytes(text.as_bytes().to_vec().into())),
                _ => Err(Error::runtime(format!("cannot encode as {encoding:?}: only UTF-8 is supported"))),
            };
        }
        "expandtabs" => {
            let [size] = arguments.bind(name, ["tabsize"], 0)?;
            return expand_tabs(text, size.map_or(Ok(8), |size| size.need_int())?);
        }
        "startswith" | "endswith" => return starts_or_ends(text, name, arguments),
        "find" | "index" | "rfind" | "rindex" | "count" => return search(text, name, arguments),
        _ => {}
    }
    let [a, b, c] = arguments.positional(name, 0)?;
    let given = usize::from(a.is_some()) + usize::from(b.is_some()) + usize::from(c.is_some());
    let (least, most) = match name {
        "strip" | "lstrip" | "rstrip" => (0, 1),
        "center" | "ljust" | "rjust" => (1, 2),
        "replace" => (2, 3),
        "join" | "partition" | "rpartition" | "removeprefix" | "removesuffix" | "zfill" => (1, 1),
        "translate" | "maketrans" => return Err(no_method(&receiver, name)),
        _ => (0, 0),
    };
    if given < least || given > most {
        return Err(Error::runtime(format!("{name}() takes {least} to {most} arguments ({given} given)")));
    }
    let first = a.unwrap_or(Value::None);
    match name {
        "strip" | "lstrip" | "rstrip" => {
            let chars = match &first {
                Value::None => None,
                chars => Some(chars.need_text()?.clone()),
            };
            Value::str(strip(text, chars.as_deref(), name != "rstrip", name != "lstrip"))
        }
        "center" | "ljust" | "rjust" => {
            let fill = text_of(b, " ")?;
            let mut fill = fill.chars();
            let (Some(fill), None) = (fill.next(), fill.next()) else {
                return Err(Error::runtime("the fill character must be exactly one character long"));
            };
            pad(text, width(&first)?, fill, name)
        }
        "replace" => {
            let count = c.map_or(Ok(-1), |count| count.need_int())?;
            replace(text, first.need_text()?, b.unwrap_or(Value::None).need_text()?, count)
        }
        "join" => join(text, &first),
        "partition" | "rpartition" => {
            let separator = first.need_text()?;
            if separator.is_empty() {
                return Err(Error::runtime("empty separator"));
            }
            let reverse = name == "rpartition";
            let found = if reverse { text.rfind(&**separator) } else { text.find(&**separator) };
            let parts = match found {
                Some(at) => [&text[..at], &**separator, &text[at + separator.len()..]],
                None if reverse => ["", "", text],
                None => [text, "", ""],
            };
            Value::tuple(parts.into_iter().map(Value::str).collect::<Result<_>>()?)
        }
        "removeprefix" => Value::str(text.strip_prefix(&**first.need_text()?).unwrap_or(text)),
        "removesuffix" => Value::str(text.strip_suffix(&**first.need_text()?).unwrap_or(text)),
        "zfill" => {
            let (sign, digits) = match text.chars().next() {
                Some(c @ ('+' | '-')) => (Some(c), &text[1..]),
                _ => (None, &**text),
            };
            let missing = width(&first)?.saturating_sub(text.chars_len()?);
            let mut out = Builder::new();
            sign.map_or(Ok(()), |sign| out.push(sign))?;
            out.repeat('0', missing)?;
            out.push_str(digits)?;
            Ok(Value::Str(out.into_text()?))
        }
        "lower" | "upper" | "casefold" | "title" | "capitalize" | "swapcase" => change_case(text, name),
        _ => is(text, name).map(Value::Bool).ok_or_else(|| no_method(&receiver, name)),
    }
}

pub(crate) fn change_case(text: &Text, name: &str) -> Result<Value> {
    // A character can become three.
    let most = if text.is_ascii() { text.len() } else { 3 * text.len() };
    let room = Charge::new(most)?;
    limits::scan(text.len())?;
    // The case of a capital sigma depends on the characters around it.
    limits::step(text.matches('Σ').count().saturating_mul(60))?;
    let changed = match name {
        "lower" => text.to_lowercase(),
        "upper" => text.to_uppercase(),
        "casefold" => unicode::casefold(text),
        "title" => unicode::title(text),
        "capitalize" => unicode::capitalize(text),
        _ => unicode::swap_case(text),
    };
    drop(room);
    Value::str(changed)?.marked_like(text)
}

/// The predicates: `isdigit` and its kin.
fn is(text: &str, name: &str) -> Option<bool> {
    let all = |test: fn(char) -> bool| !text.is_empty() && text.chars().all(test);
    Some(match name {
        "isascii" => text.is_ascii(),
        "isalpha" => all(unicode::is_alpha),
        "isalnum" => all(unicode::is_alnum),
        "isdecimal" => all(unicode::is_decimal),
        "isdigit" => all(unicode::is_digit),
        "isnumeric" => all(unicode::is_numeric),
        "isspace" => all(is_space),
        "isprintable" => text.chars().all(unicode::is_printable),
        "isupper" => unicode::is_upper(text),
        "islower" => unicode::is_lower(text),
        "istitle" => unicode::is_title(text),
        "isidentifier" => {
            // Letters, and numbers that are letters, such as those of Rome.
            let begins = |c: char| c == '_' || unicode::is_alpha(c) || c.is_alphabetic() && unicode::is_numeric(c);
            text.starts_with(begins) && text.chars().all(|c| begins(c) || unicode::is_decimal(c))
        }
        _ => return None,
    })
}

fn list_of<'t>(parts: impl Iterator<Item = &'t str>) -> Result<Value> {
    let mut values = Vec::new();
    for part in parts {
        values.push(Value::str(part)?);
        if values.len().is_power_of_two() {
            limits::check_elements(values.len() * 2, ELEMENT)?;
        }
        limits::step(1)?;
    }
    Value::list(values)
}

fn width(value: &Value) -> Result<usize> {
    Ok(usize::try_from(value.need_int()?.max(0)).unwrap_or(usize::MAX))
}

pub(crate) fn strip<'t>(text: &'t str, chars: Option<&str>, left: bool, right: bool) -> &'t str {
    let many: HashSet<char> = chars.filter(|chars| chars.len() > 32).unwrap_or_default().chars().collect();
    let strips = |c: char| match chars {
        Some(_) if !many.is_empty() => many.contains(&c),
        Some(chars) => chars.contains(c),
        None => is_space(c),
    };
    let text = if left { text.trim_start_matches(strips) } else { text };
    if right { text.trim_end_matches(strips) } else { text }
}

pub(crate) fn pad(text: &Text, width: usize, fill: char, name: &str) -> Result<Value> {
    let length = text.chars_len()?;
    let missing = width.saturating_sub(length);
    let left = match name {
        "ljust" => 0,
        "rjust" => missing,
        // Python gives the odd one to the left where the width is odd.
        _ => missing / 2 + (missing & width & 1),
    };
    let mut out = Builder::new();
    limits::check_text(text.len().saturating_add(missing.saturating_mul(fill.len_utf8())))?;
    out.repeat(fill, left)?;
    out.push_str(text)?;
    out.repeat(fill, missing - left)?;
    Value::Str(out.into_text()?).marked_like(text)
}

/// `str.replace`; a negative count replaces all.
pub(crate) fn replace(text: &str, old: &str, new: &str, count: i128) -> Result<Value> {
    let most = usize::try_from(count).unwrap_or(usize::MAX);
    limits::scan(text.len())?;
    let mut out = Builder::new();
    let mut last = 0;
    // An empty text is found before every character and at the end.
    for (at, found) in text.match_indices(old).take(most) {
        limits::step(1)?;
        out.push_str(&text[last..at])?;
        out.push_str(new)?;
        last = at + found.len();
    }
    out.push_str(&text[last..])?;
    Ok(Value::Str(out.into_text()?))
}

fn join(separator: &str, items: &Value) -> Result<Value> {
    let mut out = Builder::new();
    let mut items = iterate(items).map_err(|_| Error::runtime("can only join an iterable"))?;
    let mut at = 0;
    while let Some(item) = items.next()? {
        let Value::Str(item) = item else {
            let kind = item.type_name();
            return Err(Error::runtime(format!("sequence item {at}: expected str instance, {kind} found")));
        };
        if at > 0 {
            out.push_str(separator)?;
        }
        out.push_str(&item)?;
        at += 1;
    }
    Ok(Value::Str(out.into_text()?))
}

fn split(text: &str, separator: Option<Value>, most: Option<Value>, reverse: bool) -> Result<Value> {
    let most = most.map_or(Ok(-1), |most| most.need_int())?;
    let most = usize::try_from(most).unwrap_or(usize::MAX);
    let separator = match separator.unwrap_or(Value::None) {
        Value::None => return split_at_space(text, most, reverse),
        separator => separator.need_text()?.clone(),
    };
    if separator.is_empty() {
        return Err(Error::runtime("empty separator"));
    }
    if !reverse {
        return list_of(text.splitn(most.saturating_add(1), &*separator));
    }
    let mut parts: Vec<&str> = Vec::new();
    for part in text.rsplitn(most.saturating_add(1), &*separator) {
        parts.push(part);
        if parts.len().is_power_of_two() {
            limits::check_elements(parts.len(), ELEMENT)?;
        }
    }
    list_of(parts.into_iter().rev())
}

fn split_at_space(text: &str, most: usize, reverse: bool) -> Result<Value> {
    let mut parts = Vec::new();
    let mut rest = if reverse { text.trim_end_matches(is_space) } else { text.trim_start_matches(is_space) };
    while !rest.is_empty() {
        if parts.len().is_power_of_two() {
            limits::check_elements(parts.len(), ELEMENT)?;
        }
        let found = match (parts.len() == most, reverse) {
            (true, _) => None,
            (false, false) => rest.find(is_space),
            (false, true) => rest.rfind(is_space),
        };
        match (found, reverse) {
            (None, false) => {
                parts.push(if parts.len() == most { rest } else { rest.trim_end_matches(is_space) });
                break;
            }
            (None, true) => {
                parts.push(if parts.len() == most { rest } else { rest.trim_start_matches(is_space) });
                break;
            }
            (Some(at), false) => {
                parts.push(&rest[..at]);
                rest = rest[at..].trim_start_matches(is_space);
            }
            (Some(at), true) => {
                let after = at + rest[at..].chars().next().map_or(1, char::len_utf8);
                parts.push(&rest[after..]);
                rest = rest[..at].trim_end_matches(is_space);
            }
        }
    }
    if reverse {
        parts.reverse();
    }
    list_of(parts.into_iter())
}

/// Lines as Python splits them: also at vertical tabs, form feeds, separators and their Unicode kin.
pub(crate) fn split_lines(text: &str, keep_ends: bool) -> Vec<&str> {
    let mut lines = Vec::new();
    let mut start = 0;
    let mut chars = text.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        let is_end = matches!(c, '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}');
        if !is_end {
            continue;
        }
        let mut end = at + c.len_utf8();
        if c == '\r' && chars.next_if(|(_, next)| *next == '\n').is_some() {
            end += 1;
        }
        lines.push(&text[start..if keep_ends { end } else { at }]);
        start = end;
    }
    if start < text.len() {
        lines.push(&text[start..]);
    }
    lines
}

fn expand_tabs(text: &str, size: i128) -> Result<Value> {
    let size = usize::try_from(size.max(0)).unwrap_or(usize::MAX);
    let mut out = Builder::new();
    let mut column = 0;
    for c in text.chars() {
        match c {
            '\t' if size > 0 => {
                let spaces = size - column % size;
                out.repeat(' ', spaces)?;
                column = column.saturating_add(spaces);
            }
            '\t' => {}
            c => {
                out.push(c)?;
                column = if matches!(c, '\n' | '\r') { 0 } else { column + 1 };
            }
        }
    }
    Ok(Value::Str(out.into_text()?))
}

/// The part of a text between two positions in characters, with the first one as Python counts it. `None` where the
/// first one lies behind the second.
fn part(text: &Text, start: Option<Value>, end: Option<Value>) -> Result<Option<(&str, usize)>> {
    let length = text.chars_len()? as i128;
    let bound = |bound: Option<Value>, default: i128| match bound {
        None | Some(Value::None) => Ok::<_, Error>(default),
        Some(bound) => {
            let bound = bound.need_int()?;
            Ok(if bound < 0 { bound.saturating_add(length).max(0) } else { bound })
        }
    };
    let (start, end) = (bound(start, 0)?, bound(end, length)?.min(length));
    if start > end {
        return Ok(None);
    }
    let (start, end) = (start as usize, end as usize);
    let offset = |chars: usize| match text.is_ascii() {
        true => chars,
        false => text.char_indices().nth(chars).map_or(text.len(), |(at, _)| at),
    };
    Ok(Some((&text[offset(start)..offset(end)], start)))
}

fn starts_or_ends(text: &Text, name: &str, arguments: CallArgs) -> Result<Value> {
    let [affix, start, end] = arguments.positional(name, 1)?;
    let affix = affix.unwrap_or(Value::None);
    let affixes = match &affix {
        Value::Tuple(items) => items.values.as_slice(),
        single => std::slice::from_ref(single),
    };
    let part = part(text, start, end)?;
    for affix in affixes {
        affix.check_defined()?;
        let Value::Str(affix) = affix else {
            let kind = affix.type_name();
            return Err(Error::runtime(format!("{name} first arg must be str or a tuple of str, not {kind}")));
        };
        let found = part.is_some_and(|(part, _)| match name {
            "startswith" => part.starts_with(&**affix),
            _ => part.ends_with(&**affix),
        });
        if found {
            return Ok(Value::Bool(true));
        }
    }
    Ok(Value::Bool(false))
}

fn search(text: &Text, name: &str, arguments: CallArgs) -> Result<Value> {
    let [wanted, start, end] = arguments.positional(name, 1)?;
    let wanted = wanted.unwrap_or(Value::None);
    let wanted = wanted.need_text()?;
    let part = part(text, start, end)?;
    if name == "count" {
        let count = part.map_or(0, |(part, _)| part.matches(&**wanted).count());
        return Ok(Value::Int(count as i128));
    }
    let found = part.and_then(|(part, first)| {
        let at = if name.starts_with('r') { part.rfind(&**wanted) } else { part.find(&**wanted) }?;
        Some(first + part[..at].chars().count())
    });
    match found {
        Some(at) => Ok(Value::Int(at as i128)),
        None if name.ends_with("index") => Err(Error::runtime("substring not found")),
        None => Ok(Value::Int(-1)),
    }
}
