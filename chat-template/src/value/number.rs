//! Python's arithmetic on numbers and its way to write floats.

use super::Value;
use crate::ast::Binary;
use crate::error::{Error, Result};

/// A number; booleans count as integers.
#[derive(Clone, Copy)]
pub(crate) enum Number {
    Int(i128),
    Float(f64),
}

impl Number {
    pub(crate) fn of(value: &Value) -> Option<Self> {
        match value {
            Value::Float(value) => Some(Self::Float(*value)),
            value => value.as_int().map(Self::Int),
        }
    }

    pub(crate) fn to_f64(self) -> f64 {
        match self {
            Self::Int(value) => value as f64,
            Self::Float(value) => value,
        }
    }
}

fn overflow() -> Error {
    Error::runtime("integers of more than 127 bits are not supported")
}

fn zero(what: &str) -> Error {
    Error::runtime(what)
}

/// An operation on two numbers.
pub(crate) fn binary(op: Binary, a: Number, b: Number) -> Result<Value> {
    if let (Number::Int(a), Number::Int(b)) = (a, b) {
        return integers(op, a, b);
    }
    let (a, b) = (a.to_f64(), b.to_f64());
    let result = match op {
        Binary::Add => a + b,
        Binary::Subtract => a - b,
        Binary::Multiply => a * b,
        Binary::Divide if b == 0.0 => return Err(zero("float division by zero")),
        Binary::Divide => a / b,
        Binary::FloorDivide if b == 0.0 => return Err(zero("float floor division by zero")),
        Binary::FloorDivide => floor_divide(a, b).0,
        Binary::Modulo if b == 0.0 => return Err(zero("float modulo")),
        Binary::Modulo => floor_divide(a, b).1,
        Binary::Power => return power(a, b),
    };
    Ok(Value::Float(result))
}

fn integers(op: Binary, a: i128, b: i128) -> Result<Value> {
    let result = match op {
        Binary::Add => a.checked_add(b),
        Binary::Subtract => a.checked_sub(b),
        Binary::Multiply => a.checked_mul(b),
        Binary::Divide if b == 0 => return Err(zero("division by zero")),
        Binary::Divide => return Ok(Value::Float(true_divide(a, b))),
        Binary::FloorDivide if b == 0 => return Err(zero("integer division or modulo by zero")),
        Binary::Modulo if b == 0 => return Err(zero("integer modulo by zero")),
        Binary::FloorDivide => a.checked_div(b).map(|q| if a % b != 0 && (a < 0) != (b < 0) { q - 1 } else { q }),
        Binary::Modulo => a.checked_rem(b).map(|r| if r != 0 && (r < 0) != (b < 0) { r + b } else { r }),
        Binary::Power if b < 0 => return power(a as f64, b as f64),
        Binary::Power => match a {
            0 | 1 => Some(if b == 0 { 1 } else { a }),
            -1 => Some(if b % 2 == 0 { 1 } else { -1 }),
            _ => u32::try_from(b).ok().and_then(|b| a.checked_pow(b)),
        },
    };
    result.map(Value::Int).ok_or_else(overflow)
}

/// The quotient of two integers, rounded once.
fn true_divide(a: i128, b: i128) -> f64 {
    const EXACT: i128 = 1 << 53;
    if a.abs() <= EXACT && b.abs() <= EXACT {
        return a as f64 / b as f64;
    }
    // The quotient with 64 bits or more, its remainder folded into the last bit.
    let negative = (a < 0) != (b < 0);
    let (a, b) = (a.unsigned_abs(), b.unsigned_abs());
    let shift = 66 + (128 - b.leading_zeros() as i32) - (128 - a.leading_zeros() as i32);
    let (a, b, exponent) = match shift {
        // Moves the smaller side up as far as it goes; what is left comes from the other one.
        1.. => {
            let up = shift.min(a.leading_zeros() as i32);
            (a << up, b, -up)
        }
        _ => (a, b, 0),
    };
    let (quotient, rest) = (a / b, a % b);
    let sticky = quotient | u128::from(rest != 0);
    let result = if quotient < 1 << 55 { a as f64 / b as f64 } else { sticky as f64 };
    let result = result * 2f64.powi(exponent);
    if negative { -result } else { result }
}

/// Python's quotient and remainder of floats: the remainder has the sign of the divisor.
fn floor_divide(a: f64, b: f64) -> (f64, f64) {
    let mut modulo = a % b;
    let mut quotient = (a - modulo) / b;
    if modulo == 0.0 {
        modulo = 0f64.copysign(b);
    } else if (b < 0.0) != (modulo < 0.0) {
        modulo += b;
        quotient -= 1.0;
    }
    if quotient == 0.0 {
        return (0f64.copysign(a / b), modulo);
    }
    let floor = quotient.floor();
    (if quotient - floor > 0.5 { floor + 1.0 } else { floor }, modulo)
}

fn power(a: f64, b: f64) -> Result<Value> {
    if a == 0.0 && b < 0.0 {
        return Err(zero("0.0 cannot be raised to a negative power"));
    }
    if a < 0.0 && a.is_finite() && b.is_finite() && b.fract() != 0.0 {
        return Err(Error::runtime("complex numbers are not supported"));
    }
    let result = a.powf(b);
    if result.is_infinite() && a.is_finite() && b.is_finite() {
        return Err(Error::runtime("(34, 'Numerical result out of range')"));
    }
    Ok(Value::Float(result))
}

/// A float as Python's `repr` writes it.
pub(crate) fn float_repr(value: f64) -> String {
    if value.is_nan() {
        return "nan".into();
    }
    if value.is_infinite() {
        return if value < 0.0 { "-inf".into() } else { "inf".into() };
    }
    // The shortest digits that give the number back: d.ddde±x.
    let shortest = format!("{value:e}");
    let (digits, exponent) = shortest.split_once('e').unwrap_or((&shortest, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = format!("{value}");
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}
