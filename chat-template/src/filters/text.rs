//! Filters that make texts.

use super::{html, shown};
use crate::arguments::CallArgs;
use crate::error::{Error, Result};
use crate::format::percent;
use crate::limits;
use crate::methods::text::{change_case, pad, replace, split_lines, strip};
use crate::unicode::{is_alnum, is_space};
use crate::value::{Builder, Text, Value, repr};

pub(super) fn filter(name: &str, input: &Value, arguments: CallArgs) -> Result<Value> {
    match name {
        "format" => {
            let text = shown(input)?;
            let CallArgs { positional, keywords } = arguments;
            if !positional.is_empty() && !keywords.is_empty() {
                return Err(Error::runtime("can't handle positional and keyword arguments at the same time"));
            }
            let values = match keywords.is_empty() {
                true => Value::tuple(positional)?,
                false => Value::dict(keywords.into_iter().map(|(name, value)| (Value::Str(name), value)).collect())?,
            };
            percent(&text, &values)
        }
        "indent" => {
            let [width, first, blank] = arguments.bind(name, ["width", "first", "blank"], 0)?;
            let flag = |value: Option<Value>| value.is_some_and(|value| value.truth());
            indent(input, width.unwrap_or(Value::Int(4)), flag(first), flag(blank))
        }
        "replace" => {
            let [old, new, count] = arguments.bind(name, ["old", "new", "count"], 2)?;
            let text = |value: Option<Value>| shown(&value.unwrap_or(Value::None));
            let count = match count {
                None | Some(Value::None) => -1,
                Some(count) => count.need_int()?,
            };
            replace(&shown(input)?, &text(old)?, &text(new)?, count)
        }
        "trim" => {
            let [chars] = arguments.bind(name, ["chars"], 0)?;
            let chars = match chars {
                None | Some(Value::None) => None,
                Some(chars) => Some(chars.need_text()?.clone()),
            };
            let text = shown(input)?;
            limits::scan(text.len())?;
            let stripped = strip(&text, chars.as_deref(), true, true);
            if stripped.len() == text.len() {
                return Ok(Value::Str(text));
            }
            Value::str(stripped)?.marked_like(&text)
        }
        "center" => {
            let [width] = arguments.bind(name, ["width"], 0)?;
            let width = width.map_or(Ok(80), |width| width.need_int())?;
            pad(&shown(input)?, usize::try_from(width.max(0)).unwrap_or(usize::MAX), ' ', "center")
        }
        name => {
            let [] = arguments.positional(name, 0)?;
            match name {
                "string" => Ok(Value::Str(shown(input)?)),
                "title" => title(&shown(input)?),
                "wordcount" => {
                    let text = shown(input)?;
                    limits::scan(text.len().saturating_mul(4))?;
                    let words = text.split(|c: char| c != '_' && !is_alnum(c)).filter(|word| !word.is_empty());
                    Ok(Value::Int(words.count() as i128))
                }
                "pprint" => Value::str(repr(input)?),
                "lower" | "upper" | "capitalize" => change_case(&shown(input)?, name),
                other => html::unsupported(other),
            }
        }
    }
}

/// Jinja's title case: words begin after white space, hyphens and opening brackets.
fn title(text: &Text) -> Result<Value> {
    limits::scan(text.len())?;
    let is_separator = |c: char| is_space(c) || matches!(c, '-' | '(' | '{' | '[' | '<');
    let mut out = Builder::new();
    let mut rest = &**text;
    while !rest.is_empty() {
        let word = rest.find(is_separator).unwrap_or(rest.len());
        if let Some(first) = rest[..word].chars().next() {
            out.push_str(&first.to_uppercase().to_string())?;
            limits::scan(word)?;
            out.push_str(&rest[first.len_utf8()..word].to_lowercase())?;
        }
        let separator = rest[word..].find(|c| !is_separator(c)).unwrap_or(rest.len() - word);
        out.push_str(&rest[word..word + separator])?;
        rest = &rest[word + separator..];
    }
    Ok(Value::Str(out.into_text()?))
}

fn indent(input: &Value, width: Value, first: bool, blank: bool) -> Result<Value> {
    input.check_defined()?;
    let Value::Str(text) = input else {
        return Err(Error::runtime(format!("indent needs a text, not {}", input.type_name())));
    };
    let width = match &width {
        Value::Str(text) => text.clone(),
        width => {
            let mut spaces = Builder::new();
            spaces.repeat(' ', usize::try_from(width.need_int()?.max(0)).unwrap_or(usize::MAX))?;
            spaces.into_text()?
        }
    };
    limits::scan(text.len())?;
    let mut with_end = Builder::new();
    with_end.push_str(text)?;
    with_end.push('\n')?;
    let lines = split_lines(with_end.as_str(), false);
    let mut out = Builder::new();
    for (at, line) in lines.into_iter().enumerate() {
        limits::step(1)?;
        if at > 0 {
            out.push('\n')?;
        }
        if at == 0 && first || at > 0 && (blank || !line.is_empty()) {
            out.push_str(&width)?;
        }
        out.push_str(line)?;
    }
    Value::Str(out.into_text()?).marked_like(text)
}
