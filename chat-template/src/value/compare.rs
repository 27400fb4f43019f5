//! Python's `==`, `<` and `in`.

use std::cmp::Ordering;
use std::rc::Rc;

use super::{Iter, Number, Object, Value, iterate};
use crate::error::{Error, Result};
use crate::limits;

/// Python's `==`.
pub(crate) fn equal(a: &Value, b: &Value) -> Result<bool> {
    limits::step(1)?;
    Ok(match (a, b) {
        (Value::Str(a), Value::Str(b)) => {
            limits::step(a.len().min(b.len()) / 256)?;
            a.len() == b.len() && **a == **b
        }
        (Value::None, Value::None) | (Value::Undefined(_), Value::Undefined(_)) => true,
        (Value::Bytes(a), Value::Bytes(b)) => a == b,
        (Value::List(a), Value::List(b)) | (Value::Tuple(a), Value::Tuple(b)) => {
            if Rc::ptr_eq(a, b) {
                return Ok(true);
            }
            if a.values.len() != b.values.len() {
                return Ok(false);
            }
            for (a, b) in a.values.iter().zip(&b.values) {
                if !equal(a, b)? {
                    return Ok(false);
                }
            }
            true
        }
        (Value::Dict(a), Value::Dict(b)) => {
            if Rc::ptr_eq(a, b) {
                return Ok(true);
            }
            if a.len() != b.len() {
                return Ok(false);
            }
            for (key, value) in a.entries() {
                match b.get(key)? {
                    Some(other) if equal(value, other)? => {}
                    _ => return Ok(false),
                }
            }
            true
        }
        (Value::Object(a), Value::Object(b)) => a.equal(b)?,
        (a, b) => match (Number::of(a), Number::of(b)) {
            (Some(a), Some(b)) => order_of_numbers(a, b) == Some(Ordering::Equal),
            _ => false,
        },
    })
}

fn order_of_numbers(a: Number, b: Number) -> Option<Ordering> {
    match (a, b) {
        (Number::Int(a), Number::Int(b)) => Some(a.cmp(&b)),
        (Number::Float(a), Number::Float(b)) => a.partial_cmp(&b),
        (Number::Float(a), Number::Int(b)) => order_of_mixed(b, a).map(Ordering::reverse),
        (Number::Int(a), Number::Float(b)) => order_of_mixed(a, b),
    }
}

/// Compares without rounding the integer.
fn order_of_mixed(a: i128, b: f64) -> Option<Ordering> {
    if b.is_nan() {
        return None;
    }
    if b >= 1.7e38 {
        return Some(Ordering::Less);
    }
    if b <= -1.7e38 {
        return Some(Ordering::Greater);
    }
    let whole = b.trunc();
    Some(a.cmp(&(whole as i128)).then_with(|| {
        if b > whole {
            Ordering::Less
        } else if b < whole {
            Ordering::Greater
        } else {
            Ordering::Equal
        }
    }))
}

/// The order of two values for `<` and its kin: `None` where nothing holds (NaN).
pub(crate) fn compare_order(a: &Value, b: &Value, op: &str) -> Result<Option<Ordering>> {
    limits::step(1)?;
    if let (Some(a), Some(b)) = (Number::of(a), Number::of(b)) {
        return Ok(order_of_numbers(a, b));
    }
    match (a, b) {
        (Value::Str(a), Value::Str(b)) => {
            limits::step(a.len().min(b.len()) / 256)?;
            Ok(Some((**a).cmp(&**b)))
        }
        (Value::Bytes(a), Value::Bytes(b)) => Ok(Some(a.cmp(b))),
        (Value::List(a), Value::List(b)) | (Value::Tuple(a), Value::Tuple(b)) => {
            for (a, b) in a.values.iter().zip(&b.values) {
                if !equal(a, b)? {
                    return compare_order(a, b, op);
                }
            }
            Ok(Some(a.values.len().cmp(&b.values.len())))
        }
        _ => {
            a.check_defined()?;
            b.check_defined()?;
            let (a, b) = (a.type_name(), b.type_name());
            Err(Error::runtime(format!("'{op}' not supported between instances of '{a}' and '{b}'")))
        }
    }
}

/// Python's `<`, which sorting goes by.
pub(crate) fn python_less(a: &Value, b: &Value) -> Result<bool> {
    Ok(compare_order(a, b, "<")? == Some(Ordering::Less))
}

/// Python's `in`.
pub(crate) fn contains(container: &Value, value: &Value) -> Result<bool> {
    match container {
        Value::Str(text) => {
            value.check_defined()?;
            let Value::Str(part) = value else {
                let kind = value.type_name();
                return Err(Error::runtime(format!("'in <string>' requires string as left operand, not {kind}")));
            };
            limits::scan(text.len())?;
            Ok(text.contains(&**part))
        }
        Value::Dict(dict) => Ok(dict.get(value)?.is_some()),
        Value::Object(Object::Range(range)) if value.as_int().is_some() => {
            Ok(value.as_int().is_some_and(|value| range.position(value).is_some()))
        }
        Value::Undefined(_) => Ok(false),
        container => {
            let mut items: Iter = iterate(container).map_err(|error| match container {
                Value::None | Value::Bool(_) | Value::Int(_) | Value::Float(_) => {
                    Error::runtime(format!("argument of type '{}' is not iterable", container.type_name()))
                }
                _ => error,
            })?;
            while let Some(item) = items.next()? {
                if item.same(value) || equal(&item, value)? {
                    return Ok(true);
                }
            }
            Ok(false)
        }
    }
}
