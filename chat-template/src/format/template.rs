//! `str.format` and `str.format_map`.

use super::ascii;
use super::spec::format_value;
use crate::arguments::CallArgs;
use crate::error::{Error, Result};
use crate::eval::Evaluator;
use crate::limits;
use crate::value::{Builder, Text, Value, display, repr};

/// Where fields find their values.
struct Fields<'v, 'e, 't> {
    positional: &'v [Value],
    keywords: &'v dyn Fn(&str) -> Option<Value>,
    /// The number of the next field without a name; none once fields have numbers.
    next: Option<usize>,
    numbered: bool,
    /// Whether values are escaped for HTML.
    escape: bool,
    evaluator: &'e mut Evaluator<'t>,
}

/// `text.format(...)`.
pub(crate) fn str_format(text: &Text, arguments: CallArgs, evaluator: &mut Evaluator<'_>) -> Result<Value> {
    let CallArgs { positional, keywords } = arguments;
    let by_name = |name: &str| keywords.iter().find(|(other, _)| **other == *name).map(|(_, value)| value.clone());
    run(text, &positional, &by_name, evaluator)
}

/// `text.format_map(values)`.
pub(crate) fn str_format_map(text: &Text, values: &Value, evaluator: &mut Evaluator<'_>) -> Result<Value> {
    values.check_defined()?;
    let Value::Dict(dict) = values else {
        return Err(Error::runtime(format!("'{}' object is not a mapping", values.type_name())));
    };
    run(text, &[], &|name| dict.get_str(name).cloned(), evaluator)
}

fn run(
    text: &Text,
    positional: &[Value],
    keywords: &dyn Fn(&str) -> Option<Value>,
    evaluator: &mut Evaluator<'_>,
) -> Result<Value> {
    let mut fields =
        Fields { positional, keywords, next: Some(0), numbered: false, escape: text.is_markup(), evaluator };
    let mut out = Builder::new();
    fields.write(&mut out, text, 2)?;
    Ok(Value::Str(out.into_text()?))
}

impl Fields<'_, '_, '_> {
    /// Writes a text with its fields; a specification has fields as well, one level deep.
    fn write(&mut self, out: &mut Builder, text: &str, levels: usize) -> Result<()> {
        let mut rest = text;
        while let Some(at) = rest.find(['{', '}']) {
            limits::step(1)?;
            out.push_str(&rest[..at])?;
            let c = rest.as_bytes()[at];
            rest = &rest[at + 1..];
            if rest.as_bytes().first() == Some(&c) {
                out.push(c.into())?;
                rest = &rest[1..];
            } else if c == b'}' {
                return Err(Error::runtime("Single '}' encountered in format string"));
            } else {
                if levels == 0 {
                    return Err(Error::runtime("Max string recursion exceeded"));
                }
                rest = self.field(out, rest, levels)?;
            }
        }
        out.push_str(rest)
    }

    /// Writes one field; returns what follows it.
    fn field<'f>(&mut self, out: &mut Builder, text: &'f str, levels: usize) -> Result<&'f str> {
        let mut depth = 1;
        let mut in_index = false;
        let end = text.char_indices().find(|(_, c)| {
            match c {
                '[' => in_index = true,
                ']' => in_index = false,
                '{' if !in_index => depth += 1,
                '}' if !in_index => depth -= 1,
                _ => {}
            }
            depth == 0
        });
        let Some((end, _)) = end else { return Err(Error::runtime("expected '}' before end of string")) };
        let (field, rest) = (&text[..end], &text[end + 1..]);
        let mut in_index = false;
        let name_end = field.find(|c| {
            match c {
                '[' => in_index = true,
                ']' => in_index = false,
                _ => {}
            }
            !in_index && matches!(c, '!' | ':')
        });
        let (name, tail) = field.split_at(name_end.unwrap_or(field.len()));
        let (conversion, spec) = match tail.strip_prefix('!') {
            Some(after) => {
                let Some(c) = after.chars().next() else {
                    return Err(Error::runtime("end of string while looking for conversion specifier"));
                };
                match &after[c.len_utf8()..] {
                    "" => (Some(c), ""),
                    after => match after.strip_prefix(':') {
                        Some(spec) => (Some(c), spec),
                        None => return Err(Error::runtime("expected ':' after conversion specifier")),
                    },
                }
            }
            None => (None, tail.strip_prefix(':').unwrap_or("")),
        };
        let value = self.value(name)?;
        let value = match conversion {
            None => value,
            Some('s') => Value::Str(display(&value)?),
            Some('r') => Value::str(repr(&value)?)?,
            Some('a') => Value::str(ascii(&value)?)?,
            Some(c) => return Err(Error::runtime(format!("unknown conversion specifier {c}"))),
        };
        let mut expanded = Builder::new();
        self.write(&mut expanded, spec, levels - 1)?;
        if !self.escape {
            format_value(out, &value, expanded.as_str())?;
            return Ok(rest);
        }
        let is_markup = matches!(&value, Value::Str(text) if text.is_markup());
        if is_markup && !expanded.as_str().is_empty() {
            return Err(Error::runtime("unsupported format specification for Markup"));
        }
        let mut formatted = Builder::new();
        format_value(&mut formatted, &value, expanded.as_str())?;
        let formatted = formatted.into_text()?;
        out.push_str(&if is_markup { formatted } else { formatted.escaped()? })?;
        Ok(rest)
    }

    fn value(&mut self, field: &str) -> Result<Value> {
        let end = field.find(['.', '[']).unwrap_or(field.len());
        let (first, mut rest) = field.split_at(end);
        let is_number = !first.is_empty() && first.bytes().all(|b| b.is_ascii_digit());
        let mut value = if field.is_empty() || is_number {
            if is_number && rest.is_empty() {
                if self.next.is_some_and(|next| next > 0) {
                    return Err(mixed());
                }
                self.numbered = true;
            } else if !is_number && self.numbered {
                return Err(mixed());
            }
            let index = match self.next {
                Some(next) if !is_number => {
                    self.next = Some(next + 1);
                    next
                }
                _ => first.parse().unwrap_or(usize::MAX),
            };
            let missing =
                || Error::runtime(format!("Replacement index {index} out of range for positional args tuple"));
            self.positional.get(index).cloned().ok_or_else(missing)?
        } else {
            let missing = || Error::runtime(format!("KeyError: '{}'", crate::error::excerpt(first)));
            (self.keywords)(first).ok_or_else(missing)?
        };
        while !rest.is_empty() {
            limits::step(1)?;
            if let Some(after) = rest.strip_prefix('.') {
                let end = after.find(['.', '[']).unwrap_or(after.len());
                if end == 0 {
                    return Err(Error::runtime("Empty attribute in format string"));
                }
                value = self.evaluator.attribute(&value, &Text::new(after[..end].to_owned())?)?;
                rest = &after[end..];
            } else if let Some(after) = rest.strip_prefix('[') {
                let Some(end) = after.find(']') else { return Err(Error::runtime("Missing ']' in format string")) };
                let key = &after[..end];
                if key.is_empty() {
                    return Err(Error::runtime("Empty attribute in format string"));
                }
                let key = match key.parse::<u64>() {
                    Ok(index) if key.bytes().all(|b| b.is_ascii_digit()) => Value::Int(index.into()),
                    _ => Value::str(key)?,
                };
                value = self.evaluator.item(&value, &key)?;
                rest = &after[end + 1..];
            } else {
                return Err(Error::runtime("Only '.' or '[' may follow ']' in format field specifier"));
            }
        }
        Ok(value)
    }
}

fn mixed() -> Error {
    Error::runtime("cannot switch between manual field specification and automatic field numbering")
}
