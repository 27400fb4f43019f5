//! The tests of Jinja: `value is name`.

use crate::arguments::CallArgs;
use crate::ast::{Binary, Comparison};
use crate::error::{Error, Result};
use crate::eval::{Evaluator, binary, compare, is_callable};
use crate::filters;
use crate::unicode;
use crate::value::{Object, Value, display, equal, is_hashable, is_iterable};

#[rustfmt::skip]
const NAMES: &[&str] = &[
    "!=", "<", "<=", "==", ">", ">=", "boolean", "callable", "defined", "divisibleby", "eq", "equalto", "escaped",
    "even", "false", "filter", "float", "ge", "greaterthan", "gt", "in", "integer", "iterable", "le", "lessthan",
    "lower", "lt", "mapping", "ne", "none", "number", "odd", "sameas", "sequence", "string", "test", "true",
    "undefined", "upper",
];

/// Whether there is a test of this name.
pub(crate) fn exists(name: &str) -> bool {
    NAMES.contains(&name)
}

impl Evaluator<'_> {
    /// Applies a test.
    pub(crate) fn check(&mut self, name: &str, value: &Value, arguments: CallArgs) -> Result<bool> {
        let comparison = match name {
            "==" | "eq" | "equalto" => Some(Comparison::Equal),
            "!=" | "ne" => Some(Comparison::NotEqual),
            "<" | "lt" | "lessthan" => Some(Comparison::Less),
            "<=" | "le" => Some(Comparison::LessOrEqual),
            ">" | "gt" | "greaterthan" => Some(Comparison::Greater),
            ">=" | "ge" => Some(Comparison::GreaterOrEqual),
            _ => None,
        };
        if let Some(comparison) = comparison {
            let [other] = arguments.positional(name, 1)?;
            return compare(comparison, value, &other.unwrap_or(Value::None));
        }
        match name {
            "in" => {
                let [sequence] = arguments.bind(name, ["seq"], 1)?;
                return compare(Comparison::In, value, &sequence.unwrap_or(Value::None));
            }
            "sameas" => {
                let [other] = arguments.bind(name, ["other"], 1)?;
                return Ok(value.same(&other.unwrap_or(Value::None)));
            }
            "divisibleby" => {
                let [number] = arguments.bind(name, ["num"], 1)?;
                let rest = binary(Binary::Modulo, value, &number.unwrap_or(Value::None))?;
                return equal(&rest, &Value::Int(0));
            }
            _ => {}
        }
        let [] = arguments.positional(name, 0)?;
        let is_number = matches!(value, Value::Bool(_) | Value::Int(_) | Value::Float(_));
        Ok(match name {
            "odd" => equal(&binary(Binary::Modulo, value, &Value::Int(2))?, &Value::Int(1))?,
            "even" => equal(&binary(Binary::Modulo, value, &Value::Int(2))?, &Value::Int(0))?,
            "defined" => !value.is_undefined(),
            "undefined" => value.is_undefined(),
            "filter" | "test" => {
                if !is_hashable(value) {
                    return Err(Error::runtime(format!("unhashable type: '{}'", value.type_name())));
                }
                let exists = if name == "filter" { filters::exists } else { exists };
                value.as_str().is_some_and(exists)
            }
            "none" => value.is_none(),
            "boolean" => matches!(value, Value::Bool(_)),
            "false" => matches!(value, Value::Bool(false)),
            "true" => matches!(value, Value::Bool(true)),
            "integer" => matches!(value, Value::Int(_)),
            "float" => matches!(value, Value::Float(_)),
            "lower" => unicode::is_lower(&display(value)?),
            "upper" => unicode::is_upper(&display(value)?),
            "string" => matches!(value, Value::Str(_)),
            "mapping" => matches!(value, Value::Dict(_)),
            "number" => is_number,
            // What has a length and elements by position or key.
            "sequence" => match value {
                Value::Object(object) => matches!(object, Object::Range(_)),
                value => !is_number && !value.is_none(),
            },
            "iterable" => is_iterable(value),
            "callable" => is_callable(value),
            "escaped" => matches!(value, Value::Str(text) if text.is_markup()),
            name => {
                let name = crate::error::excerpt(name);
                return Err(Error::runtime(format!("no test named '{name}' found")));
            }
        })
    }
}
