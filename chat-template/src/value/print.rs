//! Python's `str` and `repr`.

use std::rc::Rc;

use super::{Builder, Global, Items, Object, Text, Value, ViewKind, float_repr};
use crate::error::{Error, Result};
use crate::{limits, unicode};

/// Python's `str(value)`.
pub(crate) fn display(value: &Value) -> Result<Text> {
    if let Value::Str(text) = value {
        return Ok(text.clone());
    }
    let mut out = Builder::new();
    display_into(&mut out, value)?;
    out.into_text()
}

/// Python's `repr(value)`.
pub(crate) fn repr(value: &Value) -> Result<String> {
    let mut out = Builder::new();
    repr_into(&mut out, value)?;
    Ok(out.into_string())
}

pub(crate) fn display_into(out: &mut Builder, value: &Value) -> Result<()> {
    match value {
        Value::Str(text) => out.push_str(text),
        Value::Undefined(_) => Ok(()),
        other => repr_into(out, other),
    }
}

fn repr_into(out: &mut Builder, value: &Value) -> Result<()> {
    Printer { out, namespaces: Vec::new() }.value(value)
}

struct Printer<'b> {
    out: &'b mut Builder,
    /// The namespaces that are being printed: Python writes an ellipsis where one contains itself.
    namespaces: Vec<usize>,
}

/// Namespaces within namespaces that are printed.
const MOST_NAMESPACES: usize = 50;

impl Printer<'_> {
    fn value(&mut self, value: &Value) -> Result<()> {
        limits::step(1)?;
        match value {
            Value::Undefined(_) => self.out.push_str("Undefined"),
            Value::None => self.out.push_str("None"),
            Value::Bool(true) => self.out.push_str("True"),
            Value::Bool(false) => self.out.push_str("False"),
            Value::Int(value) => self.out.push_str(&value.to_string()),
            Value::Float(value) => self.out.push_str(&float_repr(*value)),
            Value::Str(text) if text.is_markup() => {
                self.out.push_str("Markup(")?;
                quoted(self.out, text)?;
                self.out.push(')')
            }
            Value::Str(text) => quoted(self.out, text),
            Value::Bytes(bytes) => self.bytes(bytes),
            Value::List(items) => self.sequence('[', items, ']'),
            Value::Tuple(items) if items.values.len() == 1 => {
                self.out.push('(')?;
                self.value(&items.values[0])?;
                self.out.push_str(",)")
            }
            Value::Tuple(items) => self.sequence('(', items, ')'),
            Value::Dict(dict) => self.entries(dict.entries().iter().map(|(key, value)| (key, value))),
            Value::Object(object) => self.object(object),
        }
    }

    fn sequence(&mut self, open: char, items: &Items, close: char) -> Result<()> {
        self.out.push(open)?;
        self.separated(&items.values)?;
        self.out.push(close)
    }

    fn separated(&mut self, values: &[Value]) -> Result<()> {
        for (index, value) in values.iter().enumerate() {
            if index > 0 {
                self.out.push_str(", ")?;
            }
            self.value(value)?;
        }
        Ok(())
    }

    fn entries<'v>(&mut self, entries: impl Iterator<Item = (&'v Value, &'v Value)>) -> Result<()> {
        self.out.push('{')?;
        for (index, (key, value)) in entries.enumerate() {
            if index > 0 {
                self.out.push_str(", ")?;
            }
            self.value(key)?;
            self.out.push_str(": ")?;
            self.value(value)?;
        }
        self.out.push('}')
    }

    fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        let quote = if bytes.contains(&b'\'') && !bytes.contains(&b'"') { '"' } else { '\'' };
        self.out.push('b')?;
        self.out.push(quote)?;
        for &byte in bytes {
            match byte {
                b'\\' => self.out.push_str("\\\\")?,
                b'\t' => self.out.push_str("\\t")?,
                b'\n' => self.out.push_str("\\n")?,
                b'\r' => self.out.push_str("\\r")?,
                byte if char::from(byte) == quote => self.out.push_str(&format!("\\{quote}"))?,
                b' '..=b'~' => self.out.push(byte.into())?,
                byte => self.out.push_str(&format!("\\x{byte:02x}"))?,
            }
        }
        self.out.push(quote)
    }

    fn object(&mut self, object: &Object) -> Result<()> {
        match object {
            Object::Range(range) if range.step == 1 => {
                self.out.push_str(&format!("range({}, {})", range.start, range.stop))
            }
            Object::Range(range) => {
                self.out.push_str(&format!("range({}, {}, {})", range.start, range.stop, range.step))
            }
            Object::View(view) => {
                self.out.push_str(object.type_name())?;
                self.out.push_str("([")?;
                for (index, (key, value)) in view.dict.entries().iter().enumerate() {
                    if index > 0 {
                        self.out.push_str(", ")?;
                    }
                    match view.kind {
                        ViewKind::Keys => self.value(key)?,
                        ViewKind::Values => self.value(value)?,
                        ViewKind::Items => {
                            self.out.push('(')?;
                            self.value(key)?;
                            self.out.push_str(", ")?;
                            self.value(value)?;
                            self.out.push(')')?;
                        }
                    }
                }
                self.out.push_str("])")
            }
            Object::Namespace(namespace) => {
                let address = Rc::as_ptr(namespace) as usize;
                if self.namespaces.contains(&address) {
                    return self.out.push_str("<Namespace {...}>");
                }
                if self.namespaces.len() == MOST_NAMESPACES {
                    return Err(Error::limit("value_depth", limits::current().value_depth));
                }
                self.namespaces.push(address);
                let entries = namespace.entries();
                let entries: Vec<_> = entries.into_iter().map(|(name, value)| (Value::Str(name), value)).collect();
                self.out.push_str("<Namespace ")?;
                self.entries(entries.iter().map(|(name, value)| (name, value)))?;
                self.namespaces.pop();
                self.out.push('>')
            }
            Object::Macro(value) => match &value.function.name {
                Some(name) => self.out.push_str(&format!("<Macro '{name}'>")),
                None => self.out.push_str("<Macro anonymous>"),
            },
            Object::Loop(state) => {
                let index = state.begun.get();
                let length = state.length.get().unwrap_or(index);
                self.out.push_str(&format!("<LoopContext {index}/{length}>"))
            }
            Object::Lazy(lazy) if !lazy.kind().contains("do_") => {
                self.out.push_str(&format!("<{} object at {:#x}>", lazy.kind(), lazy.address()))
            }
            Object::Lazy(lazy) => {
                self.out.push_str(&format!("<generator object {} at {:#x}>", lazy.kind(), lazy.address()))
            }
            Object::Global(global) => self.out.push_str(match global {
                Global::Range => "<function safe_range at 0x0>",
                Global::Dict => "<transformers.TemplateDict object at 0x0>",
                Global::Lipsum => "<function generate_lorem_ipsum at 0x0>",
                Global::Cycler => "<class 'jinja2.utils.Cycler'>",
                Global::Joiner => "<class 'jinja2.utils.Joiner'>",
                Global::Namespace => "<class 'jinja2.utils.Namespace'>",
                Global::RaiseException => "<function raise_exception at 0x0>",
                Global::StrftimeNow => "<function strftime_now at 0x0>",
            }),
            Object::Method(method) => {
                let kind = method.receiver.type_name();
                self.out.push_str(&format!("<built-in method {} of {kind} object at 0x0>", method.name))
            }
            Object::Cycler(_) => self.out.push_str("<jinja2.utils.Cycler object at 0x0>"),
            Object::Joiner(_) => self.out.push_str("<jinja2.utils.Joiner object at 0x0>"),
            Object::This => self.out.push_str("<TemplateReference None>"),
            Object::Block(_) => self.out.push_str("<jinja2.runtime.BlockReference object at 0x0>"),
        }
    }
}

/// A text in quotes, as `repr` chooses and escapes them.
fn quoted(out: &mut Builder, text: &str) -> Result<()> {
    limits::scan(text.len())?;
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote)?;
    let mut plain = 0;
    for (at, c) in text.char_indices() {
        if c == ' ' || c.is_ascii_graphic() && c != quote && c != '\\' {
            continue;
        }
        let escaped = match c {
            '\\' => "\\\\".to_owned(),
            '\n' => "\\n".to_owned(),
            '\r' => "\\r".to_owned(),
            '\t' => "\\t".to_owned(),
            c if c == quote => format!("\\{c}"),
            c if !c.is_ascii() && unicode::is_printable(c) => continue,
            c => match u32::from(c) {
                code @ ..0x100 => format!("\\x{code:02x}"),
                code @ ..0x1_0000 => format!("\\u{code:04x}"),
                code => format!("\\U{code:08x}"),
            },
        };
        out.push_str(&text[plain..at])?;
        out.push_str(&escaped)?;
        plain = at + c.len_utf8();
    }
    out.push_str(&text[plain..])?;
    out.push(quote)
}
