//! Attributes and methods of Python's types.

mod containers;
pub(crate) mod text;

use crate::arguments::CallArgs;
use crate::error::{Error, Result};
use crate::eval::Evaluator;
use crate::value::{Global, Object, Text, Value, ViewKind};

/// What Python finds under a name.
pub(crate) enum Found {
    Value(Value),
    Method(&'static str),
    /// The sandbox hides it: it would change the value, or leads to Python's internals.
    Unsafe,
}

#[rustfmt::skip]
const OF_TEXTS: &[&str] = &[
    "capitalize", "casefold", "center", "count", "encode", "endswith", "expandtabs", "find", "format", "format_map",
    "index", "isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric",
    "isprintable", "isspace", "istitle", "isupper", "join", "ljust", "lower", "lstrip", "maketrans", "partition",
    "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rjust", "rpartition", "rsplit", "rstrip", "split",
    "splitlines", "startswith", "strip", "swapcase", "title", "translate", "upper", "zfill",
];
const OF_LISTS: &[&str] = &["copy", "count", "index"];
const OF_TUPLES: &[&str] = &["count", "index"];
const OF_DICTS: &[&str] = &["copy", "fromkeys", "get", "items", "keys", "values"];
const OF_INTS: &[&str] = &["as_integer_ratio", "bit_count", "bit_length", "conjugate"];
const OF_FLOATS: &[&str] = &["as_integer_ratio", "conjugate", "is_integer"];
const CHANGING_LISTS: &[&str] = &["append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort"];
const CHANGING_DICTS: &[&str] = &["clear", "pop", "popitem", "setdefault", "update"];
/// Names of Python's internals that every object has.
#[rustfmt::skip]
const INTERNALS: &[&str] = &[
    "__class__", "__delattr__", "__dir__", "__doc__", "__eq__", "__format__", "__ge__", "__getattribute__",
    "__getstate__", "__gt__", "__hash__", "__init__", "__init_subclass__", "__le__", "__lt__", "__ne__", "__new__",
    "__reduce__", "__reduce_ex__", "__repr__", "__setattr__", "__sizeof__", "__str__", "__subclasshook__",
];

fn method(names: &[&'static str], name: &str) -> Option<Found> {
    names.iter().find(|other| **other == name).map(|name| Found::Method(name))
}

fn unsafe_method(names: &[&'static str], name: &str) -> Option<Found> {
    names.contains(&name).then_some(Found::Unsafe)
}

/// The attribute of a value; namespaces and loops have theirs in the evaluator.
pub(crate) fn find(value: &Value, name: &str) -> Result<Option<Found>> {
    let int = |value: i128| Some(Found::Value(Value::Int(value)));
    let found = match value {
        Value::Str(_) => method(OF_TEXTS, name),
        Value::Bytes(_) => method(&["decode", "hex"], name),
        Value::List(_) => method(OF_LISTS, name).or_else(|| unsafe_method(CHANGING_LISTS, name)),
        Value::Tuple(items) => match items.fields.iter().position(|field| *field == name) {
            Some(at) => Some(Found::Value(items.values[at].clone())),
            None => method(OF_TUPLES, name),
        },
        Value::Dict(_) => method(OF_DICTS, name).or_else(|| unsafe_method(CHANGING_DICTS, name)),
        Value::Int(_) | Value::Bool(_) => match name {
            "real" | "numerator" => int(value.as_int().unwrap_or(0)),
            "imag" => int(0),
            "denominator" => int(1),
            _ => method(OF_INTS, name),
        },
        Value::Float(number) => match name {
            "real" => Some(Found::Value(Value::Float(*number))),
            "imag" => Some(Found::Value(Value::Float(0.0))),
            _ => method(OF_FLOATS, name),
        },
        Value::None | Value::Undefined(_) => None,
        Value::Object(object) => of_object(object, name)?,
    };
    let is_namespace = matches!(value, Value::Object(Object::Namespace(_)));
    let internal = !is_namespace && INTERNALS.contains(&name);
    Ok(found.or_else(|| internal.then_some(Found::Unsafe)))
}

fn of_object(object: &Object, name: &str) -> Result<Option<Found>> {
    let int = |value: i128| Some(Found::Value(Value::Int(value)));
    let flag = |value: bool| Some(Found::Value(Value::Bool(value)));
    Ok(match object {
        Object::Range(range) => match name {
            "start" => int(range.start),
            "stop" => int(range.stop),
            "step" => int(range.step),
            _ => method(OF_TUPLES, name),
        },
        Object::View(view) if view.kind != ViewKind::Values => method(&["isdisjoint"], name),
        Object::Loop(_) => method(&["cycle", "changed"], name),
        Object::Cycler(cycler) => match name {
            "current" => Some(Found::Value(cycler.items[cycler.position.get()].clone())),
            "pos" => int(cycler.position.get() as i128),
            "items" => Some(Found::Value(Value::tuple(cycler.items.clone())?)),
            _ => method(&["next", "reset"], name),
        },
        Object::Joiner(joiner) => match name {
            "sep" => Some(Found::Value(joiner.separator.clone())),
            "used" => flag(joiner.used.get()),
            _ => None,
        },
        Object::Macro(value) => match name {
            "name" => {
                let name = value.function.name.as_deref().map(Value::str).transpose()?;
                Some(Found::Value(name.unwrap_or(Value::None)))
            }
            "arguments" => {
                let names = value.function.parameters.iter().map(|parameter| Value::str(&*parameter.name));
                Some(Found::Value(Value::tuple(names.collect::<Result<_>>()?)?))
            }
            "catch_kwargs" => flag(value.function.kwargs.is_some()),
            "catch_varargs" => flag(value.function.varargs.is_some()),
            "caller" => flag(value.function.caller.is_some()),
            "explicit_caller" => flag(value.function.parameters.iter().any(|p| *p.name == *"caller")),
            _ => None,
        },
        Object::Block(block) if name == "name" => Some(Found::Value(Value::str(&*block.0)?)),
        Object::Global(Global::Dict) => method(&["fromkeys"], name),
        _ => None,
    })
}

/// Calls a method that [`find`] found.
pub(crate) fn call(
    receiver: &Value,
    name: &'static str,
    arguments: CallArgs,
    evaluator: &mut Evaluator<'_>,
) -> Result<Value> {
    match receiver {
        Value::Str(text) => text::call(text, name, arguments, evaluator),
        other => containers::call(other, name, arguments),
    }
}

fn no_method(receiver: &Value, name: &str) -> Error {
    Error::runtime(format!("method '{name}' of '{}' is not supported", receiver.type_name()))
}

/// Text of an argument; anything else is an error.
pub(crate) fn text_of(value: Option<Value>, default: &str) -> Result<Text> {
    match value {
        Some(value) => value.need_text().cloned(),
        None => Text::new(default.to_owned()),
    }
}
