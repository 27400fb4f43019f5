//! The filters of Jinja.

mod convert;
mod html;
mod json;
mod sequence;
mod sort;
mod text;
mod wrap;

use crate::arguments::CallArgs;
use crate::error::{Error, Result};
use crate::eval::Evaluator;
use crate::limits;
use crate::value::{Text, Value, display, length};

#[rustfmt::skip]
const NAMES: &[&str] = &[
    "abs", "attr", "batch", "capitalize", "center", "count", "d", "default", "dictsort", "e", "escape",
    "filesizeformat", "first", "float", "forceescape", "format", "groupby", "indent", "int", "items", "join", "last",
    "length", "list", "lower", "map", "max", "min", "pprint", "random", "reject", "rejectattr", "replace", "reverse",
    "round", "safe", "select", "selectattr", "slice", "sort", "string", "striptags", "sum", "title", "tojson", "trim",
    "truncate", "unique", "upper", "urlencode", "urlize", "wordcount", "wordwrap", "xmlattr",
];

/// Whether there is a filter of this name.
pub(crate) fn exists(name: &str) -> bool {
    NAMES.contains(&name)
}

impl Evaluator<'_> {
    /// Applies a filter.
    pub(crate) fn filter(&mut self, name: &str, input: Value, arguments: CallArgs) -> Result<Value> {
        limits::step(3)?;
        match name {
            "attr" => {
                let [name] = arguments.bind("attr", ["name"], 1)?;
                let name = name.unwrap_or(Value::None).need_text()?.clone();
                input.check_defined()?;
                let hint = || Value::hint(format!("no attribute '{}'", crate::error::excerpt(&name)));
                Ok(self.own_attribute(&input, &name)?.unwrap_or_else(hint))
            }
            "count" | "length" => {
                let [] = arguments.positional(name, 0)?;
                if let Value::Object(crate::value::Object::Loop(state)) = &input {
                    return Ok(self.loop_attribute(state, "length")?.unwrap_or(Value::None));
                }
                match length(&input)? {
                    Some(length) => Ok(Value::Int(length as i128)),
                    None => Err(Error::runtime(format!("object of type '{}' has no len()", input.type_name()))),
                }
            }
            "d" | "default" => {
                let [default, boolean] = arguments.bind(name, ["default_value", "boolean"], 0)?;
                let boolean = boolean.is_some_and(|boolean| boolean.truth());
                match input.is_undefined() || boolean && !input.truth() {
                    true => default.map_or_else(|| Value::str(""), Ok),
                    false => Ok(input),
                }
            }
            "abs" | "float" | "int" | "round" | "filesizeformat" => convert::filter(name, input, arguments),
            "batch" | "first" | "items" | "last" | "list" | "random" | "reverse" | "slice" => {
                sequence::filter(name, &input, arguments)
            }
            "join" | "map" | "reject" | "rejectattr" | "select" | "selectattr" | "sum" => {
                self.filter_each(name, &input, arguments)
            }
            "dictsort" | "groupby" | "max" | "min" | "sort" | "unique" => self.filter_sorted(name, &input, arguments),
            "e" | "escape" | "forceescape" | "safe" | "striptags" | "urlencode" | "urlize" | "xmlattr" => {
                html::filter(name, &input, arguments)
            }
            "tojson" => json::filter(&input, arguments),
            "truncate" | "wordwrap" => wrap::filter(name, &input, arguments),
            name if exists(name) => text::filter(name, &input, arguments),
            name => Err(Error::runtime(format!("no filter named '{}' found", crate::error::excerpt(name)))),
        }
    }

    /// An element of an element of an element: `path` holds names and numbers between dots.
    pub(crate) fn path(&mut self, item: &Value, path: &[Value], default: Option<&Value>) -> Result<Value> {
        let mut value = item.clone();
        for part in path {
            value = self.item(&value, part)?;
            if let (true, Some(default)) = (value.is_undefined(), default) {
                value = default.clone();
            }
        }
        Ok(value)
    }
}

/// The parts of an attribute's path.
pub(crate) fn path_of(attribute: &Value) -> Result<Vec<Value>> {
    match attribute {
        Value::None => Ok(Vec::new()),
        Value::Str(text) => text.split('.').map(part_of_path).collect(),
        other => Ok(vec![other.clone()]),
    }
}

fn part_of_path(part: &str) -> Result<Value> {
    match part.parse::<u64>() {
        Ok(index) if part.bytes().all(|b| b.is_ascii_digit()) => Ok(Value::Int(index.into())),
        _ => Value::str(part),
    }
}

/// Strings in lower case, other values as they are.
pub(crate) fn ignore_case(value: Value) -> Result<Value> {
    match &value {
        Value::Str(text) => crate::methods::text::change_case(text, "lower"),
        _ => Ok(value),
    }
}

fn shown(value: &Value) -> Result<Text> {
    display(value)
}
