//! Values as Python has them. Texts, lists, tuples and maps never change after they are made: the sandbox of
//! transformers hides the methods that would change them. Only namespaces, cyclers, joiners and loops have state.

mod compare;
mod dict;
mod iter;
mod json;
mod number;
mod object;
mod print;
mod text;

use std::rc::Rc;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::limits::{self, Charge};

pub(crate) use self::compare::{compare_order, contains, equal, python_less};
pub(crate) use self::dict::{Dict, is_hashable};
pub(crate) use self::iter::{Iter, Lazy, collect, is_iterable, iterate, length};
pub(crate) use self::json::from_json;
pub(crate) use self::number::{Number, binary as number_binary, float_repr};
pub(crate) use self::object::{
    BlockRef, BoundMethod, Cycler, Frame, Global, Joiner, LoopState, MacroValue, Namespace, Object, Range, View,
    ViewKind,
};
pub(crate) use self::print::{display, display_into, repr};
pub(crate) use self::text::{Builder, Text, escape};

/// A value of a template.
#[derive(Clone)]
pub(crate) enum Value {
    Undefined(Rc<Undefined>),
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(Text),
    Bytes(Rc<Vec<u8>>),
    List(Rc<Items>),
    Tuple(Rc<Items>),
    Dict(Rc<Dict>),
    Object(Object),
}

/// Why a value is undefined, for the error of using it.
pub(crate) enum Undefined {
    Name(Arc<str>),
    Attribute { of: &'static str, name: Text },
    Element { of: &'static str, key: String },
    Hint(String),
}

impl Undefined {
    pub(crate) fn message(&self) -> String {
        match self {
            Self::Name(name) => format!("'{name}' is undefined"),
            Self::Attribute { of, name } => format!("'{of}' has no attribute '{}'", crate::error::excerpt(name)),
            Self::Element { of, key } => format!("{of} has no element {}", crate::error::excerpt(key)),
            Self::Hint(hint) => hint.clone(),
        }
    }
}

/// Elements of a list or tuple.
pub(crate) struct Items {
    pub(crate) values: Vec<Value>,
    /// Levels of containers below, itself included.
    pub(crate) depth: usize,
    /// Names of the fields of a named tuple (those of `groupby`).
    pub(crate) fields: &'static [&'static str],
    _charge: Charge,
}

/// Memory that an element of a container takes.
pub(crate) const ELEMENT: usize = size_of::<Value>();

impl Items {
    pub(crate) fn new(values: Vec<Value>) -> Result<Self> {
        limits::check_elements(values.len(), 0)?;
        Self::charged(values, true)
    }

    /// Elements that came from the caller.
    pub(crate) fn free(values: Vec<Value>) -> Result<Self> {
        Self::charged(values, false)
    }

    fn charged(values: Vec<Value>, charge: bool) -> Result<Self> {
        let depth = 1 + values.iter().map(Value::depth).max().unwrap_or(0);
        limits::check_value_depth(depth)?;
        let bytes = values.capacity() * ELEMENT + 64;
        let charge = if charge { Charge::new(bytes)? } else { Charge::FREE };
        Ok(Self { values, depth, fields: &[], _charge: charge })
    }
}

impl Value {
    pub(crate) fn str(text: impl Into<String>) -> Result<Self> {
        Ok(Self::Str(Text::new(text.into())?))
    }

    /// Marks a text, or the texts of a list or tuple, as safe for HTML.
    pub(crate) fn into_markup(self) -> Result<Self> {
        let all = |items: &Items| items.values.iter().cloned().map(Self::into_markup).collect::<Result<Vec<_>>>();
        match self {
            Self::Str(text) => Ok(Self::Str(text.into_markup()?)),
            Self::List(items) => Self::list(all(&items)?),
            Self::Tuple(items) => Self::tuple(all(&items)?),
            other => Ok(other),
        }
    }

    /// Marks the value where `text` is marked.
    pub(crate) fn marked_like(self, text: &Text) -> Result<Self> {
        if text.is_markup() { self.into_markup() } else { Ok(self) }
    }

    pub(crate) fn list(values: Vec<Self>) -> Result<Self> {
        Ok(Self::List(Rc::new(Items::new(values)?)))
    }

    pub(crate) fn tuple(values: Vec<Self>) -> Result<Self> {
        Ok(Self::Tuple(Rc::new(Items::new(values)?)))
    }

    pub(crate) fn named_tuple(fields: &'static [&'static str], values: Vec<Self>) -> Result<Self> {
        Ok(Self::Tuple(Rc::new(Items { fields, ..Items::new(values)? })))
    }

    pub(crate) fn dict(entries: Vec<(Self, Self)>) -> Result<Self> {
        Ok(Self::Dict(Rc::new(Dict::new(entries)?)))
    }

    /// An iterator that can be used once, as Python's generators.
    pub(crate) fn generator(values: Vec<Self>, kind: &'static str) -> Result<Self> {
        Ok(Self::Object(Object::Lazy(Lazy::new(values, None, kind)?)))
    }

    pub(crate) fn hint(hint: impl Into<String>) -> Self {
        Self::Undefined(Rc::new(Undefined::Hint(hint.into())))
    }

    pub(crate) fn is_undefined(&self) -> bool {
        matches!(self, Self::Undefined(_))
    }

    pub(crate) fn is_none(&self) -> bool {
        matches!(self, Self::None)
    }

    pub(crate) fn depth(&self) -> usize {
        match self {
            Self::List(items) | Self::Tuple(items) => items.depth,
            Self::Dict(dict) => dict.depth,
            Self::Object(object) => object.depth(),
            _ => 0,
        }
    }

    /// Python's name of the type.
    pub(crate) fn type_name(&self) -> &'static str {
        match self {
            Self::Undefined(_) => "Undefined",
            Self::None => "NoneType",
            Self::Bool(_) => "bool",
            Self::Int(_) => "int",
            Self::Float(_) => "float",
            Self::Str(_) => "str",
            Self::Bytes(_) => "bytes",
            Self::List(_) => "list",
            Self::Tuple(_) => "tuple",
            Self::Dict(_) => "dict",
            Self::Object(object) => object.type_name(),
        }
    }

    /// Python's truth of a value.
    pub(crate) fn truth(&self) -> bool {
        match self {
            Self::Undefined(_) | Self::None => false,
            Self::Bool(value) => *value,
            Self::Int(value) => *value != 0,
            Self::Float(value) => *value != 0.0,
            Self::Str(text) => !text.is_empty(),
            Self::Bytes(bytes) => !bytes.is_empty(),
            Self::List(items) | Self::Tuple(items) => !items.values.is_empty(),
            Self::Dict(dict) => !dict.is_empty(),
            Self::Object(object) => object.truth(),
        }
    }

    /// The value as an index or a count: integers and booleans.
    pub(crate) fn as_int(&self) -> Option<i128> {
        match self {
            Self::Int(value) => Some(*value),
            Self::Bool(value) => Some(i128::from(*value)),
            _ => None,
        }
    }

    pub(crate) fn as_str(&self) -> Option<&str> {
        match self {
            Self::Str(text) => Some(text),
            _ => None,
        }
    }

    pub(crate) fn need_int(&self) -> Result<i128> {
        self.check_defined()?;
        let error = || Error::runtime(format!("'{}' object cannot be interpreted as an integer", self.type_name()));
        self.as_int().ok_or_else(error)
    }

    pub(crate) fn need_text(&self) -> Result<&Text> {
        self.check_defined()?;
        match self {
            Self::Str(text) => Ok(text),
            _ => Err(Error::runtime(format!("expected str, not {}", self.type_name()))),
        }
    }

    /// The error of using an undefined value.
    pub(crate) fn check_defined(&self) -> Result<()> {
        match self {
            Self::Undefined(undefined) => Err(Error::runtime(undefined.message())),
            _ => Ok(()),
        }
    }

    /// Python's `is`, as far as a template can tell.
    pub(crate) fn same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::None, Self::None) => true,
            (Self::Bool(a), Self::Bool(b)) => a == b,
            // Small numbers and constants are shared objects in Python; larger ones usually are not.
            (Self::Int(a), Self::Int(b)) => a == b,
            (Self::Str(a), Self::Str(b)) => a.is_same(b),
            (Self::List(a), Self::List(b)) | (Self::Tuple(a), Self::Tuple(b)) => Rc::ptr_eq(a, b),
            (Self::Dict(a), Self::Dict(b)) => Rc::ptr_eq(a, b),
            (Self::Undefined(a), Self::Undefined(b)) => Rc::ptr_eq(a, b),
            (Self::Object(a), Self::Object(b)) => a.same(b),
            _ => false,
        }
    }
}
