//! `format % values`.

use super::ascii;
use super::number::{check_precision, general_float, integer_digits};
use crate::error::{Error, Result};
use crate::limits;
use crate::value::{Builder, Number, Object, Text, Value, display, repr};

/// One conversion: `%(key)-+ #0width.precision kind`.
#[derive(Default)]
struct Conversion {
    left: bool,
    plus: bool,
    space: bool,
    alternate: bool,
    zero: bool,
    width: usize,
    precision: Option<usize>,
}

struct Values<'v> {
    all: &'v Value,
    /// Elements of a tuple; a single value otherwise.
    list: &'v [Value],
    used: usize,
    by_key: bool,
    /// Whether texts are escaped for HTML.
    escape: bool,
}

impl<'v> Values<'v> {
    fn next(&mut self) -> Result<&'v Value> {
        self.used += 1;
        self.list.get(self.used - 1).ok_or_else(|| Error::runtime("not enough arguments for format string"))
    }

    fn is_mapping(&self) -> bool {
        match self.all {
            Value::Dict(_) | Value::List(_) | Value::Bytes(_) | Value::Undefined(_) => true,
            Value::Object(object) => matches!(object, Object::Range(_)),
            _ => false,
        }
    }
}

/// Python's `%` of a text.
pub(crate) fn percent(format: &Text, values: &Value) -> Result<Value> {
    limits::scan(format.len())?;
    let list = match values {
        Value::Tuple(items) => items.values.as_slice(),
        single => std::slice::from_ref(single),
    };
    let mut values = Values { all: values, list, used: 0, by_key: false, escape: format.is_markup() };
    let mut out = Builder::new();
    let mut rest = &**format;
    while let Some(at) = rest.find('%') {
        limits::step(1)?;
        out.push_str(&rest[..at])?;
        rest = conversion(&rest[at + 1..], &mut values, &mut out)?;
    }
    out.push_str(rest)?;
    if values.used < values.list.len() && !values.is_mapping() && !values.by_key {
        return Err(Error::runtime("not all arguments converted during string formatting"));
    }
    Value::Str(out.into_text()?).marked_like(format)
}

/// Formats one conversion; returns what follows it.
fn conversion<'f>(format: &'f str, values: &mut Values<'_>, out: &mut Builder) -> Result<&'f str> {
    let mut rest = format;
    let mut keyed = None;
    if let Some(after) = rest.strip_prefix('(') {
        let mut depth = 1;
        let end = after.char_indices().find(|(_, c)| {
            depth += match c {
                '(' => 1,
                ')' => -1,
                _ => 0,
            };
            depth == 0
        });
        let Some((end, _)) = end else { return Err(Error::runtime("incomplete format key")) };
        let key = &after[..end];
        rest = &after[end + 1..];
        values.by_key = true;
        keyed = Some(match values.all {
            Value::Dict(dict) => match dict.get_str(key) {
                Some(value) => value.clone(),
                None => return Err(Error::runtime(format!("KeyError: '{}'", crate::error::excerpt(key)))),
            },
            Value::Undefined(_) => return values.all.check_defined().map(|()| rest),
            _ => return Err(Error::runtime("format requires a mapping")),
        });
    }
    let mut with = Conversion::default();
    loop {
        match rest.bytes().next() {
            Some(b'-') => with.left = true,
            Some(b'+') => with.plus = true,
            Some(b' ') => with.space = true,
            Some(b'#') => with.alternate = true,
            Some(b'0') => with.zero = true,
            _ => break,
        }
        rest = &rest[1..];
    }
    if let Some(after) = rest.strip_prefix('*') {
        let width = values.next()?.need_int()?;
        with.left |= width < 0;
        with.width = usize::try_from(width.unsigned_abs()).unwrap_or(usize::MAX);
        rest = after;
    } else {
        let (width, after) = digits(rest);
        with.width = width.unwrap_or(0);
        rest = after;
    }
    if let Some(after) = rest.strip_prefix('.') {
        if let Some(after) = after.strip_prefix('*') {
            let precision = values.next()?.need_int()?.max(0);
            with.precision = Some(usize::try_from(precision).unwrap_or(usize::MAX));
            rest = after;
        } else {
            let (precision, after) = digits(after);
            with.precision = Some(precision.unwrap_or(0));
            rest = after;
        }
    }
    rest = rest.strip_prefix(['h', 'l', 'L']).unwrap_or(rest);
    let Some(kind) = rest.chars().next() else { return Err(Error::runtime("incomplete format")) };
    rest = &rest[kind.len_utf8()..];
    if kind == '%' {
        out.push('%')?;
        return Ok(rest);
    }
    let value = match keyed {
        Some(value) => value,
        None => values.next()?.clone(),
    };
    match kind {
        's' | 'r' | 'a' => {
            let text = match kind {
                's' => display(&value)?,
                'r' => Text::new(repr(&value)?)?,
                _ => Text::new(ascii(&value)?)?,
            };
            let text = if values.escape { text.escaped()? } else { text };
            let shown = match with.precision {
                Some(precision) => text.char_indices().nth(precision).map_or(&*text, |(end, _)| &text[..end]),
                None => &text,
            };
            padded(out, "", shown, &Conversion { zero: false, ..with })?;
        }
        'c' => {
            let c = match &value {
                Value::Str(text) if text.chars().count() == 1 => text.chars().next(),
                Value::Str(_) => None,
                other => other.as_int().and_then(|code| char::from_u32(u32::try_from(code).ok()?)),
            };
            let Some(c) = c else { return Err(Error::runtime("%c requires int or char")) };
            padded(out, "", c.encode_utf8(&mut [0; 4]), &Conversion { zero: false, ..with })?;
        }
        'd' | 'i' | 'u' => {
            let number = match Number::of(&value) {
                Some(Number::Int(value)) => value,
                Some(Number::Float(value)) if value.is_finite() && value.abs() < 1e38 => value as i128,
                Some(Number::Float(_)) => return Err(Error::runtime("cannot convert float to integer")),
                None => {
                    value.check_defined()?;
                    let message = format!("%{kind} format: a real number is required, not {}", value.type_name());
                    return Err(Error::runtime(message));
                }
            };
            integer(out, number, 'd', "", &with)?;
        }
        'x' | 'X' | 'o' => {
            let Some(number) = value.as_int() else {
                value.check_defined()?;
                let message = format!("%{kind} format: an integer is required, not {}", value.type_name());
                return Err(Error::runtime(message));
            };
            let prefix = match kind {
                'x' => "0x",
                'X' => "0X",
                _ => "0o",
            };
            integer(out, number, kind, if with.alternate { prefix } else { "" }, &with)?;
        }
        'e' | 'E' | 'f' | 'F' | 'g' | 'G' => {
            let Some(number) = Number::of(&value) else {
                value.check_defined()?;
                return Err(Error::runtime(format!("must be real number, not {}", value.type_name())));
            };
            let number = number.to_f64();
            let lower = kind.to_ascii_lowercase();
            let mut text = general_float(number, lower, with.precision.unwrap_or(6), with.alternate)?;
            if kind != lower {
                text = text.to_uppercase();
            }
            let zero = with.zero && number.is_finite();
            padded(
                out,
                sign(number.is_sign_negative() && !number.is_nan(), &with),
                &text,
                &Conversion { zero, ..with },
            )?;
        }
        other => return Err(Error::runtime(format!("unsupported format character {other:?}"))),
    }
    Ok(rest)
}

fn digits(text: &str) -> (Option<usize>, &str) {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let value = if end == 0 { None } else { Some(text[..end].parse().unwrap_or(usize::MAX)) };
    (value, &text[end..])
}

fn sign(negative: bool, with: &Conversion) -> &'static str {
    match (negative, with.plus, with.space) {
        (true, ..) => "-",
        (_, true, _) => "+",
        (_, _, true) => " ",
        _ => "",
    }
}

fn integer(out: &mut Builder, number: i128, kind: char, prefix: &str, with: &Conversion) -> Result<()> {
    let mut digits = integer_digits(number, kind);
    if let Some(precision) = with.precision {
        check_precision(precision)?;
        digits = format!("{digits:0>precision$}");
    }
    let head = format!("{}{prefix}", sign(number < 0, with));
    padded(out, &head, &digits, with)
}

/// Writes a sign and a text in a field.
fn padded(out: &mut Builder, head: &str, text: &str, with: &Conversion) -> Result<()> {
    let missing = with.width.saturating_sub(head.len() + text.chars().count());
    match (with.left, with.zero) {
        (true, _) => {
            out.push_str(head)?;
            out.push_str(text)?;
            out.repeat(' ', missing)
        }
        (false, true) => {
            out.push_str(head)?;
            out.repeat('0', missing)?;
            out.push_str(text)
        }
        (false, false) => {
            out.repeat(' ', missing)?;
            out.push_str(head)?;
            out.push_str(text)
        }
    }
}
