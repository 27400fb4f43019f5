//! Methods of lists, tuples, maps, ranges, numbers and bytes.

use super::no_method;
use crate::arguments::CallArgs;
use crate::error::{Error, Result};
use crate::value::{Object, Value, View, ViewKind, collect, contains, equal, iterate};

pub(super) fn call(receiver: &Value, name: &'static str, arguments: CallArgs) -> Result<Value> {
    match (receiver, name) {
        (Value::List(items), "copy") => {
            arguments.positional::<0>(name, 0)?;
            // Lists do not change, so the copy is the list.
            Ok(Value::List(items.clone()))
        }
        (Value::List(_) | Value::Tuple(_) | Value::Object(Object::Range(_)), "count") => {
            let [value] = arguments.positional(name, 1)?;
            let value = value.unwrap_or(Value::None);
            let mut count = 0;
            let mut items = iterate(receiver)?;
            while let Some(item) = items.next()? {
                count += i128::from(item.same(&value) || equal(&item, &value)?);
            }
            Ok(Value::Int(count))
        }
        (Value::List(_) | Value::Tuple(_) | Value::Object(Object::Range(_)), "index") => index(receiver, arguments),
        (Value::Dict(dict), "get") => {
            let [key, default] = arguments.positional(name, 1)?;
            let found = dict.get(&key.unwrap_or(Value::None))?.cloned();
            Ok(found.or(default).unwrap_or(Value::None))
        }
        (Value::Dict(dict), "keys" | "values" | "items") => {
            arguments.positional::<0>(name, 0)?;
            let kind = match name {
                "keys" => ViewKind::Keys,
                "values" => ViewKind::Values,
                _ => ViewKind::Items,
            };
            Ok(Value::Object(Object::View(View { dict: dict.clone(), kind }.into())))
        }
        (Value::Dict(dict), "copy") => {
            arguments.positional::<0>(name, 0)?;
            Ok(Value::Dict(dict.clone()))
        }
        (Value::Dict(_) | Value::Object(Object::Global(_)), "fromkeys") => {
            let [keys, value] = arguments.positional(name, 1)?;
            let value = value.unwrap_or(Value::None);
            let keys = collect(&keys.unwrap_or(Value::None))?;
            Value::dict(keys.into_iter().map(|key| (key, value.clone())).collect())
        }
        (Value::Object(Object::View(_)), "isdisjoint") => {
            let [other] = arguments.positional(name, 1)?;
            let other = other.unwrap_or(Value::None);
            let mut items = iterate(&other)?;
            while let Some(item) = items.next()? {
                if contains(receiver, &item)? {
                    return Ok(Value::Bool(false));
                }
            }
            Ok(Value::Bool(true))
        }
        (Value::Object(Object::Cycler(cycler)), "next") => {
            arguments.positional::<0>(name, 0)?;
            let at = cycler.position.get();
            cycler.position.set((at + 1) % cycler.items.len());
            Ok(cycler.items[at].clone())
        }
        (Value::Object(Object::Cycler(cycler)), "reset") => {
            arguments.positional::<0>(name, 0)?;
            cycler.position.set(0);
            Ok(Value::None)
        }
        (Value::Int(_) | Value::Bool(_), _) => {
            arguments.positional::<0>(name, 0)?;
            let value = receiver.as_int().unwrap_or(0);
            match name {
                "bit_length" => Ok(Value::Int(i128::from(128 - value.unsigned_abs().leading_zeros()))),
                "bit_count" => Ok(Value::Int(value.unsigned_abs().count_ones().into())),
                "conjugate" => Ok(Value::Int(value)),
                "as_integer_ratio" => Value::tuple(vec![Value::Int(value), Value::Int(1)]),
                _ => Err(no_method(receiver, name)),
            }
        }
        (Value::Float(value), "is_integer") => Ok(Value::Bool(value.is_finite() && value.fract() == 0.0)),
        (Value::Float(value), "conjugate") => Ok(Value::Float(*value)),
        (Value::Bytes(bytes), "decode") => match std::str::from_utf8(bytes) {
            Ok(text) => Value::str(text),
            Err(_) => Err(Error::runtime("the bytes are not UTF-8")),
        },
        (Value::Bytes(bytes), "hex") => Value::str(bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>()),
        _ => Err(no_method(receiver, name)),
    }
}

fn index(receiver: &Value, arguments: CallArgs) -> Result<Value> {
    let [value, start, stop] = arguments.positional("index", 1)?;
    let value = value.unwrap_or(Value::None);
    let items = collect(receiver)?;
    let length = items.len() as i128;
    let bound = |bound: Option<Value>, default: i128| -> Result<i128> {
        let bound = bound.map_or(Ok(default), |bound| bound.need_int())?;
        Ok(if bound < 0 { bound.saturating_add(length).max(0) } else { bound.min(length) })
    };
    let (start, stop) = (bound(start, 0)?, bound(stop, length)?);
    for at in start..stop {
        let item = &items[at as usize];
        if item.same(&value) || equal(item, &value)? {
            return Ok(Value::Int(at));
        }
    }
    Err(Error::runtime(format!("the value is not in the {}", receiver.type_name())))
}
