//! `tojson`: Python's `json.dumps` with `ensure_ascii=False`, as transformers sets it up.

use crate::arguments::CallArgs;
use crate::error::{Error, Result};
use crate::limits;
use crate::value::{Builder, Text, Value, collect, float_repr};

use super::sort::stable_sort;

struct Writer {
    out: Builder,
    ascii: bool,
    indent: Option<Text>,
    item_separator: Text,
    key_separator: Text,
    sort_keys: bool,
}

pub(super) fn filter(input: &Value, arguments: CallArgs) -> Result<Value> {
    let names = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let [ascii, indent, separators, sort_keys] = arguments.bind("tojson", names, 0)?;
    let flag = |value: Option<Value>| value.is_some_and(|value| value.truth());
    let indent = match indent {
        None | Some(Value::None) => None,
        Some(Value::Str(text)) => Some(text),
        Some(width) => {
            let width = usize::try_from(width.need_int()?.max(0)).unwrap_or(usize::MAX);
            let mut spaces = Builder::new();
            spaces.repeat(' ', width)?;
            Some(spaces.into_text()?)
        }
    };
    let (item_separator, key_separator) = match separators {
        None | Some(Value::None) => (Text::free(if indent.is_some() { "," } else { ", " }), Text::free(": ")),
        Some(separators) => match collect(&separators)?.as_slice() {
            [Value::Str(item), Value::Str(key)] => (item.clone(), key.clone()),
            _ => return Err(Error::runtime("tojson: separators must be two texts")),
        },
    };
    let (ascii, sort_keys) = (flag(ascii), flag(sort_keys));
    let mut writer = Writer { out: Builder::new(), ascii, indent, item_separator, key_separator, sort_keys };
    writer.value(input, 0)?;
    Ok(Value::Str(writer.out.into_text()?))
}

impl Writer {
    fn value(&mut self, value: &Value, depth: usize) -> Result<()> {
        limits::step(1)?;
        match value {
            Value::None => self.out.push_str("null"),
            Value::Bool(value) => self.out.push_str(if *value { "true" } else { "false" }),
            Value::Int(value) => self.out.push_str(&value.to_string()),
            Value::Float(value) => self.out.push_str(&json_float(*value)),
            Value::Str(text) => self.text(text),
            Value::List(items) | Value::Tuple(items) => {
                if items.values.is_empty() {
                    return self.out.push_str("[]");
                }
                self.out.push('[')?;
                for (at, item) in items.values.iter().enumerate() {
                    self.separate(at, depth)?;
                    self.value(item, depth + 1)?;
                }
                self.new_line(depth)?;
                self.out.push(']')
            }
            Value::Dict(dict) => {
                if dict.is_empty() {
                    return self.out.push_str("{}");
                }
                let mut entries: Vec<&(Value, Value)> = dict.entries().iter().collect();
                if self.sort_keys {
                    let keys = entries.iter().map(|(key, _)| key.clone()).collect();
                    let order = stable_sort(keys, false)?;
                    entries = order.into_iter().map(|at| entries[at]).collect();
                }
                self.out.push('{')?;
                for (at, (key, value)) in entries.into_iter().enumerate() {
                    self.separate(at, depth)?;
                    self.key(key)?;
                    let separator = self.key_separator.clone();
                    self.out.push_str(&separator)?;
                    self.value(value, depth + 1)?;
                }
                self.new_line(depth)?;
                self.out.push('}')
            }
            other => Err(Error::runtime(format!("Object of type {} is not JSON serializable", other.type_name()))),
        }
    }

    fn separate(&mut self, at: usize, depth: usize) -> Result<()> {
        if at > 0 {
            let separator = self.item_separator.clone();
            self.out.push_str(&separator)?;
        }
        self.new_line(depth + 1)
    }

    fn new_line(&mut self, depth: usize) -> Result<()> {
        if let Some(indent) = self.indent.clone() {
            self.out.push('\n')?;
            for _ in 0..depth {
                self.out.push_str(&indent)?;
            }
        }
        Ok(())
    }

    fn key(&mut self, key: &Value) -> Result<()> {
        match key {
            Value::Str(text) => self.text(text),
            Value::None => self.text("null"),
            Value::Bool(value) => self.text(if *value { "true" } else { "false" }),
            Value::Int(value) => self.text(&value.to_string()),
            Value::Float(value) => self.text(&json_float(*value)),
            other => {
                let kind = other.type_name();
                Err(Error::runtime(format!("keys must be str, int, float, bool or None, not {kind}")))
            }
        }
    }

    fn text(&mut self, text: &str) -> Result<()> {
        limits::scan(text.len())?;
        self.out.push('"')?;
        let mut plain = 0;
        for (at, c) in text.char_indices() {
            let escaped = match c {
                '"' => "\\\"".to_owned(),
                '\\' => "\\\\".to_owned(),
                '\n' => "\\n".to_owned(),
                '\r' => "\\r".to_owned(),
                '\t' => "\\t".to_owned(),
                '\x08' => "\\b".to_owned(),
                '\x0c' => "\\f".to_owned(),
                c if c < ' ' => format!("\\u{:04x}", u32::from(c)),
                c if self.ascii && !matches!(c, ' '..='~') => {
                    c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")).collect()
                }
                _ => continue,
            };
            self.out.push_str(&text[plain..at])?;
            self.out.push_str(&escaped)?;
            plain = at + c.len_utf8();
        }
        self.out.push_str(&text[plain..])?;
        self.out.push('"')
    }
}

fn json_float(value: f64) -> String {
    match value {
        value if value.is_nan() => "NaN".into(),
        f64::INFINITY => "Infinity".into(),
        f64::NEG_INFINITY => "-Infinity".into(),
        value => float_repr(value),
    }
}
