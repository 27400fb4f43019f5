//! Filters that make numbers.

use crate::arguments::CallArgs;
use crate::ast::Binary;
use crate::error::{Error, Result};
use crate::eval::binary;
use crate::format::general_float;
use crate::unicode::{decimal_value, is_space};
use crate::value::{Number, Value};

pub(super) fn filter(name: &str, input: Value, arguments: CallArgs) -> Result<Value> {
    match name {
        "abs" => {
            let [] = arguments.positional(name, 0)?;
            input.check_defined()?;
            match Number::of(&input) {
                Some(Number::Int(value)) => Ok(Value::Int(value.saturating_abs())),
                Some(Number::Float(value)) => Ok(Value::Float(value.abs())),
                None => Err(Error::runtime(format!("bad operand type for abs(): '{}'", input.type_name()))),
            }
        }
        "int" => {
            let [default, base] = arguments.bind(name, ["default", "base"], 0)?;
            let base = base.map_or(Ok(10), |base| base.need_int())?;
            let value = to_int(&input, base)?;
            Ok(value.map(Value::Int).or(default).unwrap_or(Value::Int(0)))
        }
        "float" => {
            let [default] = arguments.bind(name, ["default"], 0)?;
            input.check_defined()?;
            let value = match &input {
                Value::Str(text) => float_of(text),
                other => Number::of(other).map(Number::to_f64),
            };
            Ok(value.map(Value::Float).or(default).unwrap_or(Value::Float(0.0)))
        }
        "round" => {
            let [precision, method] = arguments.bind(name, ["precision", "method"], 0)?;
            let precision = precision.unwrap_or(Value::Int(0));
            let method = method.map_or_else(|| Value::str("common"), Ok)?;
            round(&input, &precision, method.as_str().unwrap_or(""))
        }
        _ => {
            let [binary] = arguments.bind(name, ["binary"], 0)?;
            file_size(&input, binary.is_some_and(|binary| binary.truth()))
        }
    }
}

/// Jinja's `int`: `None` where the default counts.
fn to_int(value: &Value, base: i128) -> Result<Option<i128>> {
    value.check_defined()?;
    let whole = |value: f64| (value.is_finite() && value.abs() < 1.7e38).then_some(value as i128);
    match value {
        Value::Str(text) => match int_of(text, base) {
            Some(value) => Ok(Some(value)),
            None => match float_of(text) {
                Some(value) if value.is_finite() && whole(value).is_none() => Err(too_long()),
                value => Ok(value.and_then(whole)),
            },
        },
        Value::Float(value) if value.is_nan() => Ok(None),
        Value::Float(value) => match whole(*value) {
            Some(value) => Ok(Some(value)),
            None if value.is_infinite() => Err(Error::runtime("cannot convert float infinity to integer")),
            None => Err(too_long()),
        },
        other => Ok(other.as_int()),
    }
}

fn too_long() -> Error {
    Error::runtime("integers of more than 127 bits are not supported")
}

/// Python's `int(text, base)`.
fn int_of(text: &str, base: i128) -> Option<i128> {
    let text = text.trim_matches(is_space);
    let (negative, mut digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let prefix = digits.get(..2).map(str::to_ascii_lowercase);
    let prefixed = match prefix.as_deref() {
        Some("0x") => Some(16),
        Some("0o") => Some(8),
        Some("0b") => Some(2),
        _ => None,
    };
    let radix = match (base, prefixed) {
        (0, Some(radix)) => radix,
        (0, None) => 10,
        (2..=36, _) => base as u32,
        _ => return None,
    };
    if prefixed == Some(radix) {
        digits = &digits[2..];
        digits = digits.strip_prefix('_').unwrap_or(digits);
    } else if base == 0
        && digits.len() > 1
        && digits.starts_with('0')
        && digits.bytes().any(|b| !matches!(b, b'0' | b'_'))
    {
        return None;
    }
    let mut value: i128 = 0;
    let mut after_digit = false;
    for c in digits.chars() {
        if c == '_' && after_digit {
            after_digit = false;
            continue;
        }
        let digit = c.to_digit(36).or_else(|| decimal_value(c)).filter(|&digit| digit < radix)?;
        value = value.checked_mul(radix.into())?.checked_add(digit.into())?;
        after_digit = true;
    }
    after_digit.then_some(if negative { -value } else { value })
}

/// Python's `float(text)`.
fn float_of(text: &str) -> Option<f64> {
    let text = text.trim_matches(is_space);
    let mut plain = String::with_capacity(text.len());
    let mut last = ' ';
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == '_' {
            let between = last.is_ascii_digit() && chars.peek().is_some_and(|&next| decimal_value(next).is_some());
            if !between {
                return None;
            }
            last = c;
            continue;
        }
        last = decimal_value(c).and_then(|digit| char::from_digit(digit, 10)).unwrap_or(c);
        plain.push(last);
    }
    let unsigned = plain.trim_start_matches(['+', '-']).to_ascii_lowercase();
    let is_word = matches!(unsigned.as_str(), "inf" | "infinity" | "nan");
    let is_number = unsigned.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'.' | b'e' | b'+' | b'-'));
    if is_word || is_number { plain.parse().ok() } else { None }
}

fn round(value: &Value, precision: &Value, method: &str) -> Result<Value> {
    if !matches!(method, "common" | "ceil" | "floor") {
        return Err(Error::runtime("method must be common, ceil or floor"));
    }
    value.check_defined()?;
    let Some(number) = Number::of(value) else {
        return Err(Error::runtime(format!("type {} doesn't define __round__ method", value.type_name())));
    };
    if method != "common" {
        let scale = binary(Binary::Power, &Value::Int(10), precision)?;
        let scaled = binary(Binary::Multiply, value, &scale)?;
        let rounded = match Number::of(&scaled) {
            Some(Number::Float(value)) if value.is_finite() => {
                let value = if method == "ceil" { value.ceil() } else { value.floor() };
                if value.abs() >= 1.7e38 {
                    return Err(too_long());
                }
                Value::Int(value as i128)
            }
            Some(Number::Float(_)) => return Err(Error::runtime("cannot convert float to integer")),
            _ => scaled,
        };
        return binary(Binary::Divide, &rounded, &scale);
    }
    match (number, precision) {
        (Number::Int(value), Value::None) => Ok(Value::Int(value)),
        (Number::Float(value), Value::None) => to_int(&Value::Float(value.round_ties_even()), 10)?
            .map(Value::Int)
            .ok_or_else(|| Error::runtime("cannot convert float NaN to integer")),
        (Number::Int(value), precision) => round_int(value, precision.need_int()?).map(Value::Int),
        (Number::Float(value), precision) => round_float(value, precision.need_int()?).map(Value::Float),
    }
}

fn round_int(value: i128, precision: i128) -> Result<i128> {
    if precision >= 0 {
        return Ok(value);
    }
    let Some(unit) = u32::try_from(-precision).ok().and_then(|power| 10i128.checked_pow(power)) else { return Ok(0) };
    let rest = value.rem_euclid(unit);
    let down = value - rest;
    let up = rest > unit - rest || rest == unit - rest && (down / unit) % 2 != 0;
    if up { down.checked_add(unit).ok_or_else(too_long) } else { Ok(down) }
}

fn round_float(value: f64, precision: i128) -> Result<f64> {
    if !value.is_finite() || precision > 323 {
        return Ok(value);
    }
    if precision >= 0 {
        let text = general_float(value, 'f', precision as usize, false)?;
        return Ok(text.parse::<f64>().unwrap_or(value).copysign(value));
    }
    if precision < -308 {
        return Ok(0f64.copysign(value));
    }
    let unit = 10f64.powi(-precision as i32);
    Ok((value / unit).round_ties_even() * unit)
}

fn signed_float(value: f64) -> String {
    if value.is_nan() { "nan".into() } else { format!("{value:.1}") }
}

fn file_size(value: &Value, binary: bool) -> Result<Value> {
    value.check_defined()?;
    let bytes = match value {
        Value::Str(text) => float_of(text),
        other => Number::of(other).map(Number::to_f64),
    };
    let Some(bytes) = bytes else {
        return Err(Error::runtime(format!("could not convert '{}' to float", value.type_name())));
    };
    let base: f64 = if binary { 1024.0 } else { 1000.0 };
    if bytes == 1.0 {
        return Value::str("1 Byte");
    }
    if bytes < base {
        return Value::str(format!("{} Bytes", bytes.trunc() as i128));
    }
    let mut text = String::new();
    for (power, prefix) in (2..).zip(["k", "M", "G", "T", "P", "E", "Z", "Y"]) {
        let unit = base.powi(power);
        let prefix = if binary { format!("{}iB", prefix.to_uppercase()) } else { format!("{prefix}B") };
        text = format!("{} {prefix}", signed_float(base * bytes / unit));
        if bytes < unit {
            break;
        }
    }
    Value::str(text)
}
