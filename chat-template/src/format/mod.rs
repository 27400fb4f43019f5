//! Python's ways to format: `%`, `str.format` and the language of format specifications.

mod number;
mod percent;
mod spec;
mod template;

pub(crate) use self::number::general_float;
pub(crate) use self::percent::percent;
pub(crate) use self::template::{str_format, str_format_map};

use crate::error::Result;
use crate::limits;
use crate::value::{Builder, Value, repr};

/// `ascii(value)`: `repr` with everything beyond ASCII escaped.
fn ascii(value: &Value) -> Result<String> {
    let text = repr(value)?;
    if text.is_ascii() {
        return Ok(text);
    }
    limits::check_text(text.len().saturating_mul(5))?;
    let mut out = Builder::new();
    for c in text.chars() {
        match u32::from(c) {
            ..0x80 => out.push(c)?,
            code @ ..0x100 => out.push_str(&format!("\\x{code:02x}"))?,
            code @ ..0x1_0000 => out.push_str(&format!("\\u{code:04x}"))?,
            code => out.push_str(&format!("\\U{code:08x}"))?,
        }
    }
    Ok(out.into_string())
}
