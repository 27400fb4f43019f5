//! Attributes, elements and slices.

use std::rc::Rc;

use super::Evaluator;
use crate::error::{Error, Result};
use crate::limits;
use crate::methods::{self, Found};
use crate::value::{BlockRef, BoundMethod, Object, Range, Text, Undefined, Value, repr};

fn no_attribute(of: &Value, name: &Text) -> Value {
    Value::Undefined(Rc::new(Undefined::Attribute { of: of.type_name(), name: name.clone() }))
}

impl Evaluator<'_> {
    /// `value.name`: an attribute, otherwise an element.
    pub(crate) fn attribute(&mut self, value: &Value, name: &Text) -> Result<Value> {
        value.check_defined()?;
        if let Some(found) = self.own_attribute(value, name)? {
            return Ok(found);
        }
        match value {
            Value::Dict(dict) => Ok(dict.get_str(name).cloned().unwrap_or_else(|| no_attribute(value, name))),
            Value::Object(Object::This) => Ok(match self.tree.blocks.get_key_value(&**name) {
                Some((name, _)) => Value::Object(Object::Block(BlockRef(name.clone()))),
                None => no_attribute(value, name),
            }),
            _ => Ok(no_attribute(value, name)),
        }
    }

    /// What Python's `getattr` finds, with the sandbox's answer for what a template must not reach.
    pub(crate) fn own_attribute(&mut self, value: &Value, name: &Text) -> Result<Option<Value>> {
        match value {
            Value::Object(Object::Namespace(namespace)) => return Ok(namespace.get(name)),
            Value::Object(Object::Loop(state)) => {
                if let Some(found) = self.loop_attribute(state, name)? {
                    return Ok(Some(found));
                }
            }
            _ => {}
        }
        Ok(match methods::find(value, name)? {
            Some(Found::Value(found)) => Some(found),
            Some(Found::Method(method)) => {
                limits::check_value_depth(value.depth() + 1)?;
                let method = BoundMethod { receiver: value.clone(), name: method };
                Some(Value::Object(Object::Method(Rc::new(method))))
            }
            Some(Found::Unsafe) => {
                let (name, kind) = (crate::error::excerpt(name), value.type_name());
                Some(Value::hint(format!("access to attribute '{name}' of '{kind}' object is unsafe")))
            }
            None => None,
        })
    }

    /// `value[index]`: an element, otherwise an attribute.
    pub(crate) fn item(&mut self, value: &Value, index: &Value) -> Result<Value> {
        value.check_defined()?;
        if let Some(found) = element(value, index)? {
            return Ok(found);
        }
        match index {
            Value::Str(name) => {
                if let Value::Object(Object::This) = value {
                    return self.attribute(value, name);
                }
                Ok(self.own_attribute(value, name)?.unwrap_or_else(|| no_attribute(value, name)))
            }
            index => {
                let key = match index {
                    Value::Int(_) | Value::Bool(_) | Value::Float(_) | Value::None => repr(index)?,
                    other => format!("of type {}", other.type_name()),
                };
                Ok(Value::Undefined(Rc::new(Undefined::Element { of: value.type_name(), key })))
            }
        }
    }
}

/// Python's `value[index]`; `None` where there is no such element.
fn element(value: &Value, index: &Value) -> Result<Option<Value>> {
    if let Value::Dict(dict) = value {
        return match index {
            Value::Str(name) => Ok(dict.get_str(name).cloned()),
            // An unhashable key is not found.
            other => Ok(dict.get(other).ok().flatten().cloned()),
        };
    }
    let Some(index) = index.as_int() else { return Ok(None) };
    let at = |length: usize| {
        let index = if index < 0 { index + length as i128 } else { index };
        usize::try_from(index).ok().filter(|&index| index < length)
    };
    Ok(match value {
        Value::List(items) | Value::Tuple(items) => at(items.values.len()).map(|at| items.values[at].clone()),
        Value::Str(text) => match at(text.chars_len()?) {
            Some(at) if text.is_ascii() => Some(Value::str(&text[at..=at])?.marked_like(text)?),
            Some(at) => {
                limits::scan(text.len())?;
                let c = text.chars().nth(at);
                c.map(|c| Value::str(c)?.marked_like(text)).transpose()?
            }
            None => None,
        },
        Value::Bytes(bytes) => at(bytes.len()).map(|at| Value::Int(bytes[at].into())),
        Value::Object(Object::Range(range)) => at(range.len()).and_then(|at| range.get(at)),
        _ => None,
    })
}

/// Start, stop and step of a slice of so many elements, as Python clips them.
struct Bounds {
    start: i128,
    stop: i128,
    step: i128,
}

impl Bounds {
    fn new([start, stop, step]: [Option<i128>; 3], length: usize) -> Result<Self> {
        let step = step.unwrap_or(1);
        if step == 0 {
            return Err(Error::runtime("slice step cannot be zero"));
        }
        let length = length as i128;
        let (low, high) = if step > 0 { (0, length) } else { (-1, length - 1) };
        let clip = |bound: i128| if bound < 0 { bound.saturating_add(length).max(low) } else { bound.min(high) };
        let (first, last) = if step > 0 { (low, high) } else { (high, low) };
        Ok(Self { start: start.map_or(first, clip), stop: stop.map_or(last, clip), step })
    }

    fn indices(&self) -> impl Iterator<Item = usize> + use<> {
        let count = Range { start: self.start, stop: self.stop, step: self.step }.len();
        let (start, step) = (self.start, self.step);
        // A step beyond the elements is used at most once.
        (0..count).map(move |index| (start + step.saturating_mul(index as i128)) as usize)
    }
}

/// `value[start:stop:step]`.
pub(super) fn slice(value: &Value, bounds: [Option<i128>; 3]) -> Result<Value> {
    value.check_defined()?;
    match value {
        Value::Str(text) => {
            let length = text.chars_len()?;
            limits::scan(text.len() / 4)?;
            let bounds = Bounds::new(bounds, length)?;
            if bounds.step == 1 {
                let (start, stop) = (bounds.start as usize, bounds.stop.max(bounds.start) as usize);
                let offset = |chars: usize| match text.is_ascii() {
                    true => chars,
                    false => text.char_indices().nth(chars).map_or(text.len(), |(at, _)| at),
                };
                return Value::str(&text[offset(start)..offset(stop)])?.marked_like(text);
            }
            limits::check_elements(length, size_of::<char>())?;
            let chars: Vec<char> = text.chars().collect();
            Value::str(bounds.indices().map(|at| chars[at]).collect::<String>())?.marked_like(text)
        }
        Value::List(items) | Value::Tuple(items) => {
            let indices = Bounds::new(bounds, items.values.len())?.indices();
            limits::step(items.values.len() / 4)?;
            limits::check_elements(items.values.len(), crate::value::ELEMENT)?;
            let values = indices.map(|at| items.values[at].clone()).collect();
            match value {
                Value::List(_) => Value::list(values),
                _ => Value::tuple(values),
            }
        }
        Value::Bytes(bytes) => {
            let indices = Bounds::new(bounds, bytes.len())?.indices();
            Ok(Value::Bytes(Rc::new(indices.map(|at| bytes[at]).collect())))
        }
        Value::Object(Object::Range(range)) => {
            let bounds = Bounds::new(bounds, range.len())?;
            let at = |index: i128| range.step.checked_mul(index).and_then(|offset| range.start.checked_add(offset));
            let step = range.step.checked_mul(bounds.step);
            match (at(bounds.start), at(bounds.stop), step) {
                (Some(start), Some(stop), Some(step)) => Ok(Value::Object(Object::Range(Range { start, stop, step }))),
                _ => Err(Error::runtime("integers of more than 127 bits are not supported")),
            }
        }
        Value::Dict(_) => Err(Error::runtime("unhashable type: 'slice'")),
        other => Err(Error::runtime(format!("'{}' object is not subscriptable", other.type_name()))),
    }
}
