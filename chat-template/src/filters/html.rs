//! Filters for HTML and addresses. Nothing is escaped unless a template asks for it.

use super::shown;
use crate::arguments::CallArgs;
use crate::error::{Error, Result};
use crate::limits;
use crate::unicode::is_space;
use crate::value::{Builder, Text, Value, collect, escape, iterate};

pub(super) fn unsupported(name: &str) -> Result<Value> {
    Err(Error::runtime(format!("filter `{name}` is not supported: a prompt has no HTML links")))
}

pub(super) fn filter(name: &str, input: &Value, arguments: CallArgs) -> Result<Value> {
    match name {
        "urlize" => unsupported(name),
        "xmlattr" => {
            let [space] = arguments.bind(name, ["autospace"], 0)?;
            attributes(input, space.is_none_or(|space| space.truth()))
        }
        name => {
            let [] = arguments.positional(name, 0)?;
            match name {
                "urlencode" => url_encode(input),
                "striptags" => strip_tags(&shown(input)?),
                "safe" => Ok(Value::Str(shown(input)?.into_markup()?)),
                "forceescape" => Ok(Value::Str(escape(&shown(input)?)?.into_markup()?)),
                _ => Ok(Value::Str(shown(input)?.escaped()?)),
            }
        }
    }
}

fn attributes(input: &Value, space: bool) -> Result<Value> {
    input.check_defined()?;
    let Value::Dict(dict) = input else {
        return Err(Error::runtime(format!("xmlattr needs a mapping, not {}", input.type_name())));
    };
    let mut out = Builder::new();
    let mut any = false;
    for (key, value) in dict.entries() {
        if value.is_none() || value.is_undefined() {
            continue;
        }
        let key = key.need_text()?;
        if key.contains([' ', '\t', '\n', '\r', '\x0b', '\x0c', '/', '>', '=']) {
            let key = crate::error::excerpt(key);
            return Err(Error::runtime(format!("invalid character in attribute name {key:?}")));
        }
        if any || space {
            out.push(' ')?;
        }
        any = true;
        out.push_str(&key.escaped()?)?;
        out.push_str("=\"")?;
        out.push_str(&shown(value)?.escaped()?)?;
        out.push('"')?;
    }
    Ok(Value::Str(out.into_text()?))
}

fn url_encode(input: &Value) -> Result<Value> {
    let mut out = Builder::new();
    if let Value::Str(text) = input {
        quote(&mut out, text, false)?;
        return Ok(Value::Str(out.into_text()?));
    }
    let mut pairs = match input {
        Value::Dict(dict) => {
            let pairs = dict.entries().iter().map(|(key, value)| Value::tuple(vec![key.clone(), value.clone()]));
            iterate(&Value::list(pairs.collect::<Result<_>>()?)?)?
        }
        other => match iterate(other) {
            Ok(items) => items,
            Err(_) => {
                quote(&mut out, &shown(input)?, false)?;
                return Ok(Value::Str(out.into_text()?));
            }
        },
    };
    let mut first = true;
    while let Some(pair) = pairs.next()? {
        let Ok([key, value]) = <[Value; 2]>::try_from(collect(&pair)?) else {
            return Err(Error::runtime("urlencode needs pairs"));
        };
        if !first {
            out.push('&')?;
        }
        first = false;
        quote(&mut out, &shown(&key)?, true)?;
        out.push('=')?;
        quote(&mut out, &shown(&value)?, true)?;
    }
    Ok(Value::Str(out.into_text()?))
}

fn quote(out: &mut Builder, text: &str, query: bool) -> Result<()> {
    limits::scan(text.len())?;
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'_' | b'.' | b'-' | b'~' => out.push(byte.into())?,
            b'/' if !query => out.push('/')?,
            b' ' if query => out.push('+')?,
            byte => out.push_str(&format!("%{byte:02X}"))?,
        }
    }
    Ok(())
}

/// Removes comments and tags, makes runs of white space one space, and resolves the usual entities.
fn strip_tags(text: &Text) -> Result<Value> {
    limits::scan(text.len())?;
    let mut kept = Builder::new();
    let mut rest = &**text;
    while let Some(start) = rest.find('<') {
        let end = match rest[start..].strip_prefix("<!--") {
            Some(comment) => comment.find("-->").map(|end| start + 4 + end + 3),
            None => rest[start..].find('>').map(|end| start + end + 1),
        };
        let Some(end) = end else { break };
        kept.push_str(&rest[..start])?;
        rest = &rest[end..];
    }
    kept.push_str(rest)?;
    let mut out = Builder::new();
    for (at, word) in kept.as_str().split(is_space).filter(|word| !word.is_empty()).enumerate() {
        if at > 0 {
            out.push(' ')?;
        }
        out.push_str(word)?;
    }
    let mut plain = Builder::new();
    let mut rest = out.as_str();
    while let Some(at) = rest.find('&') {
        plain.push_str(&rest[..at])?;
        rest = &rest[at..];
        let entity = rest.find(';').filter(|&end| end < 12).map(|end| (&rest[1..end], end + 1));
        let known = entity.and_then(|(name, length)| Some((entity_char(name)?, length)));
        match known {
            Some((c, length)) => {
                plain.push(c)?;
                rest = &rest[length..];
            }
            None => {
                plain.push('&')?;
                rest = &rest[1..];
            }
        }
    }
    plain.push_str(rest)?;
    Ok(Value::Str(plain.into_text()?))
}

fn entity_char(name: &str) -> Option<char> {
    Some(match name {
        "amp" => '&',
        "lt" => '<',
        "gt" => '>',
        "quot" => '"',
        "apos" => '\'',
        "nbsp" => '\u{a0}',
        name => {
            let number = name.strip_prefix('#')?;
            let code = match number.strip_prefix(['x', 'X']) {
                Some(hex) => u32::from_str_radix(hex, 16).ok()?,
                None => number.parse().ok()?,
            };
            char::from_u32(code)?
        }
    })
}
