//! Digits of numbers.

use crate::error::{Error, Result};
use crate::value::float_repr;

/// Most digits after the point: Python writes more, which no text needs.
const MOST_DIGITS: usize = 1_000;

pub(super) fn check_precision(precision: usize) -> Result<()> {
    if precision > MOST_DIGITS {
        return Err(Error::runtime(format!("a precision of {precision} is more than {MOST_DIGITS}")));
    }
    Ok(())
}

/// A float without its sign in one of C's formats: `e`, `f` or `g`.
pub(crate) fn general_float(value: f64, kind: char, precision: usize, alternate: bool) -> Result<String> {
    check_precision(precision)?;
    let value = value.abs();
    if !value.is_finite() {
        return Ok(if value.is_nan() { "nan".into() } else { "inf".into() });
    }
    Ok(match kind {
        'f' => {
            let text = format!("{value:.precision$}");
            if alternate && precision == 0 { text + "." } else { text }
        }
        'e' => exponential(value, precision, alternate),
        _ => {
            let precision = precision.max(1);
            let scientific = exponential(value, precision - 1, false);
            let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
            let exponent: i32 = exponent.parse().unwrap_or(0);
            let trim = |text: &str| match text.contains('.') && !alternate {
                true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
                false if alternate && !text.contains('.') => format!("{text}."),
                false => text.to_owned(),
            };
            if (-4..precision as i32).contains(&exponent) {
                let decimals = (precision as i32 - 1 - exponent) as usize;
                trim(&format!("{value:.decimals$}"))
            } else {
                let sign = if exponent < 0 { '-' } else { '+' };
                format!("{}e{sign}{:02}", trim(mantissa), exponent.abs())
            }
        }
    })
}

fn exponential(value: f64, precision: usize, alternate: bool) -> String {
    let text = format!("{value:.precision$e}");
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let sign = if exponent < 0 { '-' } else { '+' };
    let point = if alternate && precision == 0 { "." } else { "" };
    format!("{mantissa}{point}e{sign}{:02}", exponent.abs())
}

/// A float without its sign as `format` writes it by default: as `repr`, or with so many digits.
pub(super) fn default_float(value: f64, precision: Option<usize>) -> Result<String> {
    let Some(precision) = precision else { return Ok(float_repr(value.abs())) };
    // As `g`, but with a digit after the point, and with an exponent one digit earlier.
    check_precision(precision)?;
    let precision = precision.max(1);
    let scientific = exponential(value.abs(), precision - 1, false);
    let exponent: i32 = scientific.split_once('e').and_then(|(_, e)| e.parse().ok()).unwrap_or(0);
    if exponent == precision as i32 - 1 && value.is_finite() {
        let (mantissa, tail) = scientific.split_once('e').unwrap_or((&scientific, "+00"));
        let mantissa = match mantissa.contains('.') {
            true => mantissa.trim_end_matches('0').trim_end_matches('.'),
            false => mantissa,
        };
        return Ok(format!("{mantissa}e{tail}"));
    }
    let text = general_float(value, 'g', precision, false)?;
    Ok(if text.contains(['.', 'e', 'n']) { text } else { text + ".0" })
}

/// An integer without its sign.
pub(super) fn integer_digits(value: i128, kind: char) -> String {
    let value = value.unsigned_abs();
    match kind {
        'b' => format!("{value:b}"),
        'o' => format!("{value:o}"),
        'x' => format!("{value:x}"),
        'X' => format!("{value:X}"),
        _ => value.to_string(),
    }
}
