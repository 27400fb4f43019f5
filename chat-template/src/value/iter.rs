//! Iteration over values, and generators: results of filters that can be iterated once.

use std::cell::RefCell;
use std::rc::Rc;

use super::{Dict, ELEMENT, Items, Object, Range, Text, Value, ViewKind};
use crate::error::{Error, Result};
use crate::limits::{self, Charge};

/// What an [`Iter`] goes through.
enum Source {
    Empty,
    Items { items: Rc<Items>, at: usize },
    Chars { text: Text, at: usize },
    Bytes { bytes: Rc<Vec<u8>>, at: usize },
    Range { range: Range, at: usize },
    Entries { dict: Rc<Dict>, kind: ViewKind, at: usize },
    Lazy(Lazy),
}

pub(crate) struct Iter(Source);

impl Iter {
    pub(crate) fn next(&mut self) -> Result<Option<Value>> {
        limits::step(1)?;
        Ok(match &mut self.0 {
            Source::Empty => None,
            Source::Items { items, at } => {
                *at += 1;
                items.values.get(*at - 1).cloned()
            }
            Source::Chars { text, at } => match text[*at..].chars().next() {
                Some(c) => {
                    *at += c.len_utf8();
                    Some(Value::str(c)?)
                }
                None => None,
            },
            Source::Bytes { bytes, at } => {
                *at += 1;
                bytes.get(*at - 1).map(|&byte| Value::Int(byte.into()))
            }
            Source::Range { range, at } => {
                *at += 1;
                range.get(*at - 1)
            }
            Source::Entries { dict, kind, at } => {
                *at += 1;
                match dict.entries().get(*at - 1) {
                    Some(entry) => Some(kind.element(entry)?),
                    None => None,
                }
            }
            Source::Lazy(lazy) => return lazy.next(),
        })
    }
}

/// Python's `iter`.
pub(crate) fn iterate(value: &Value) -> Result<Iter> {
    let source = match value {
        Value::Undefined(_) => Source::Empty,
        Value::List(items) | Value::Tuple(items) => Source::Items { items: items.clone(), at: 0 },
        Value::Str(text) => Source::Chars { text: text.clone(), at: 0 },
        Value::Bytes(bytes) => Source::Bytes { bytes: bytes.clone(), at: 0 },
        Value::Dict(dict) => Source::Entries { dict: dict.clone(), kind: ViewKind::Keys, at: 0 },
        Value::Object(Object::Range(range)) => Source::Range { range: *range, at: 0 },
        Value::Object(Object::View(view)) => Source::Entries { dict: view.dict.clone(), kind: view.kind, at: 0 },
        Value::Object(Object::Lazy(lazy)) => Source::Lazy(lazy.clone()),
        other => return Err(Error::runtime(format!("'{}' object is not iterable", other.type_name()))),
    };
    Ok(Iter(source))
}

pub(crate) fn is_iterable(value: &Value) -> bool {
    // A loop object is its own iterator in Python.
    iterate(value).is_ok() || matches!(value, Value::Object(Object::Loop(_)))
}

/// Python's `len`; `None` for values that have none.
pub(crate) fn length(value: &Value) -> Result<Option<usize>> {
    Ok(Some(match value {
        Value::Undefined(_) => 0,
        Value::Str(text) => text.chars_len()?,
        Value::Bytes(bytes) => bytes.len(),
        Value::List(items) | Value::Tuple(items) => items.values.len(),
        Value::Dict(dict) => dict.len(),
        Value::Object(Object::Range(range)) => range.len(),
        Value::Object(Object::View(view)) => view.dict.len(),
        _ => return Ok(None),
    }))
}

/// Python's `list`, as a vector.
pub(crate) fn collect(value: &Value) -> Result<Vec<Value>> {
    if let Some(length) = length(value)? {
        limits::check_elements(length, ELEMENT)?;
    }
    let mut items = iterate(value)?;
    let mut values = Vec::new();
    while let Some(item) = items.next()? {
        values.push(item);
        if values.len().is_power_of_two() {
            limits::check_elements(values.len() * 2, ELEMENT)?;
        }
    }
    Ok(values)
}

/// A generator. Its values are made at once; an error on the way appears when iteration gets there, as in Python.
#[derive(Clone)]
pub(crate) struct Lazy(Rc<Inner>);

struct Inner {
    rest: RefCell<(std::vec::IntoIter<Value>, Option<Error>)>,
    kind: &'static str,
    depth: usize,
    _charge: Charge,
}

impl Lazy {
    pub(crate) fn new(values: Vec<Value>, error: Option<Error>, kind: &'static str) -> Result<Self> {
        let depth = 1 + values.iter().map(Value::depth).max().unwrap_or(0);
        limits::check_value_depth(depth)?;
        limits::check_elements(values.len(), 0)?;
        let charge = Charge::new(values.capacity() * ELEMENT + 96)?;
        Ok(Self(Rc::new(Inner { rest: RefCell::new((values.into_iter(), error)), kind, depth, _charge: charge })))
    }

    pub(crate) fn next(&self) -> Result<Option<Value>> {
        let mut rest = self.0.rest.borrow_mut();
        match rest.0.next() {
            Some(value) => Ok(Some(value)),
            None => rest.1.take().map_or(Ok(None), Err),
        }
    }

    pub(crate) fn kind(&self) -> &'static str {
        self.0.kind
    }

    pub(crate) fn depth(&self) -> usize {
        self.0.depth
    }

    pub(crate) fn same(&self, other: &Self) -> bool {
        Rc::ptr_eq(&self.0, &other.0)
    }

    pub(crate) fn address(&self) -> usize {
        Rc::as_ptr(&self.0) as usize
    }
}
