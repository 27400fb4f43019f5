//! Values of JSON.

use std::rc::Rc;

use super::{Dict, Items, Text, Value};
use crate::error::{Error, Result};
use crate::limits;

/// What the caller gave, as Python's `json` would have read it. It does not count as the rendering's memory.
pub(crate) fn from_json(json: &serde_json::Value) -> Result<Value> {
    convert(json, 1)
}

fn convert(json: &serde_json::Value, depth: usize) -> Result<Value> {
    limits::check_value_depth(depth)?;
    Ok(match json {
        serde_json::Value::Null => Value::None,
        serde_json::Value::Bool(value) => Value::Bool(*value),
        serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(value), _, _) => Value::Int(value.into()),
            (_, Some(value), _) => Value::Int(value.into()),
            (_, _, Some(value)) => Value::Float(value),
            _ => return Err(Error::runtime(format!("number {number} is out of range"))),
        },
        serde_json::Value::String(text) => Value::Str(Text::free(text.as_str())),
        serde_json::Value::Array(items) => {
            let items = items.iter().map(|item| convert(item, depth + 1)).collect::<Result<_>>()?;
            Value::List(Rc::new(Items::free(items)?))
        }
        serde_json::Value::Object(entries) => {
            let entry = |(key, value): (&String, &serde_json::Value)| {
                Ok((Value::Str(Text::free(key.as_str())), convert(value, depth + 1)?))
            };
            Value::Dict(Rc::new(Dict::free(entries.iter().map(entry).collect::<Result<_>>()?)?))
        }
    })
}
