//! Format specifications: `[[fill]align][sign][z][#][0][width][grouping][.precision][type]`.

use super::number::{check_precision, default_float, general_float, integer_digits};
use crate::error::{Error, Result};
use crate::value::{Builder, Value, display_into};

#[derive(Clone, Default)]
struct Spec {
    fill: Option<char>,
    align: Option<char>,
    sign: Option<char>,
    no_negative_zero: bool,
    alternate: bool,
    zero: bool,
    width: usize,
    grouping: Option<char>,
    precision: Option<usize>,
    kind: Option<char>,
}

impl Spec {
    fn parse(text: &str, of: &str) -> Result<Self> {
        let invalid =
            || Error::runtime(format!("invalid format specifier '{}' for '{of}'", crate::error::excerpt(text)));
        let mut spec = Self::default();
        let mut chars = text.chars().peekable();
        let mut ahead = text.chars();
        let (first, second) = (ahead.next(), ahead.next());
        let is_align = |c: Option<char>| matches!(c, Some('<' | '>' | '=' | '^'));
        if is_align(second) {
            (spec.fill, spec.align) = (chars.next(), chars.next());
        } else if is_align(first) {
            spec.align = chars.next();
        }
        spec.sign = chars.next_if(|c| matches!(c, '+' | '-' | ' '));
        spec.no_negative_zero = chars.next_if_eq(&'z').is_some();
        spec.alternate = chars.next_if_eq(&'#').is_some();
        if chars.next_if_eq(&'0').is_some() {
            spec.zero = true;
            spec.fill = spec.fill.or(Some('0'));
        }
        let number = |chars: &mut std::iter::Peekable<std::str::Chars<'_>>| {
            let mut value: Option<usize> = None;
            while let Some(c) = chars.next_if(char::is_ascii_digit) {
                let digit = c.to_digit(10).unwrap_or(0) as usize;
                value = Some(value.unwrap_or(0).saturating_mul(10).saturating_add(digit));
            }
            value
        };
        spec.width = number(&mut chars).unwrap_or(0);
        spec.grouping = chars.next_if(|c| matches!(c, ',' | '_'));
        if chars.next_if_eq(&'.').is_some() {
            spec.precision =
                Some(number(&mut chars).ok_or_else(|| Error::runtime("format specifier missing precision"))?);
        }
        spec.kind = chars.next();
        if chars.next().is_some() { Err(invalid()) } else { Ok(spec) }
    }

    fn unknown(&self, of: &str) -> Error {
        Error::runtime(format!("unknown format code '{}' for object of type '{of}'", self.kind.unwrap_or(' ')))
    }

    /// Writes a text in its field. `head` is a sign that zeros go behind.
    fn place(&self, out: &mut Builder, head: &str, text: &str, default: char) -> Result<()> {
        let missing = self.width.saturating_sub(head.chars().count() + text.chars().count());
        let align = self.align.unwrap_or(if self.zero && default == '>' { '=' } else { default });
        let fill = self.fill.unwrap_or(' ');
        let (left, inner, right) = match align {
            '<' => (0, 0, missing),
            '>' => (missing, 0, 0),
            '^' => (missing / 2, 0, missing - missing / 2),
            _ => (0, missing, 0),
        };
        out.repeat(fill, left)?;
        out.push_str(head)?;
        out.repeat(fill, inner)?;
        out.push_str(text)?;
        out.repeat(fill, right)
    }

    fn sign(&self, negative: bool) -> &'static str {
        match (negative, self.sign) {
            (true, _) => "-",
            (_, Some('+')) => "+",
            (_, Some(' ')) => " ",
            _ => "",
        }
    }

    /// Groups the digits before the point; zeros that fill the field are grouped as well.
    fn grouped(&self, head: &str, text: &str, size: usize) -> Result<String> {
        let Some(separator) = self.grouping else { return Ok(text.to_owned()) };
        let end = text.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(text.len());
        let end = if size == 3 { text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()) } else { end };
        let (digits, tail) = text.split_at(end);
        let mut digits = digits.to_owned();
        let fills = self.zero && matches!(self.align, None | Some('='));
        if fills {
            check_precision(self.width)?;
            while head.len() + tail.len() + digits.len() + (digits.len() - 1) / size < self.width {
                digits.insert(0, '0');
            }
        }
        let mut out = String::new();
        for (at, c) in digits.chars().enumerate() {
            if at > 0 && (digits.len() - at) % size == 0 {
                out.push(separator);
            }
            out.push(c);
        }
        Ok(out + tail)
    }
}

/// Python's `format(value, spec)`, written to `out`.
pub(super) fn format_value(out: &mut Builder, value: &Value, spec: &str) -> Result<()> {
    if spec.is_empty() {
        return display_into(out, value);
    }
    match value {
        Value::Str(text) => {
            let spec = Spec::parse(spec, "str")?;
            if !matches!(spec.kind, None | Some('s')) {
                return Err(spec.unknown("str"));
            }
            if spec.sign.is_some()
                || spec.no_negative_zero
                || spec.alternate
                || spec.grouping.is_some()
                || spec.align == Some('=')
            {
                return Err(Error::runtime("sign, `#`, `,`, `_` and `=` are not allowed in a format of a text"));
            }
            let shown = match spec.precision {
                Some(precision) => text.char_indices().nth(precision).map_or(&**text, |(end, _)| &text[..end]),
                None => text,
            };
            spec.place(out, "", shown, '<')
        }
        Value::Int(_) | Value::Bool(_) => integer(out, value.as_int().unwrap_or(0), &Spec::parse(spec, "int")?),
        Value::Float(value) => float(out, *value, &Spec::parse(spec, "float")?, "float"),
        other => {
            let kind = other.type_name();
            Err(Error::runtime(format!("unsupported format string passed to {kind}.__format__")))
        }
    }
}

fn integer(out: &mut Builder, value: i128, spec: &Spec) -> Result<()> {
    let kind = spec.kind.unwrap_or('d');
    if spec.no_negative_zero && !matches!(kind, 'e' | 'E' | 'f' | 'F' | 'g' | 'G' | '%') {
        return Err(Error::runtime("`z` is not allowed in a format of an integer"));
    }
    match kind {
        'd' | 'n' | 'b' | 'o' | 'x' | 'X' => {
            if spec.precision.is_some() {
                return Err(Error::runtime("Precision not allowed in integer format specifier"));
            }
            if kind == 'n' && spec.grouping.is_some() {
                return Err(Error::runtime("Cannot specify ',' with 'n'."));
            }
            let size = if matches!(kind, 'd' | 'n') { 3 } else { 4 };
            if spec.grouping == Some(',') && size == 4 {
                return Err(Error::runtime(format!("Cannot specify ',' with '{kind}'.")));
            }
            let prefix = match (spec.alternate, kind) {
                (true, 'b') => "0b",
                (true, 'o') => "0o",
                (true, 'x') => "0x",
                (true, 'X') => "0X",
                _ => "",
            };
            let head = format!("{}{prefix}", spec.sign(value < 0));
            let digits = spec.grouped(&head, &integer_digits(value, kind), size)?;
            spec.place(out, &head, &digits, '>')
        }
        'c' => {
            if spec.sign.is_some() || spec.precision.is_some() || spec.alternate {
                return Err(Error::runtime("sign, precision and `#` are not allowed with integer format 'c'"));
            }
            let c = u32::try_from(value).ok().and_then(char::from_u32);
            let Some(c) = c else { return Err(Error::runtime("%c arg not in range(0x110000)")) };
            spec.place(out, "", c.encode_utf8(&mut [0; 4]), '<')
        }
        'e' | 'E' | 'f' | 'F' | 'g' | 'G' | '%' => float(out, value as f64, spec, "int"),
        _ => Err(spec.unknown("int")),
    }
}

fn float(out: &mut Builder, value: f64, spec: &Spec, of: &str) -> Result<()> {
    let precision = spec.precision.unwrap_or(6);
    let mut text = match spec.kind {
        None => default_float(value, spec.precision)?,
        Some(kind @ ('e' | 'E' | 'f' | 'F' | 'g' | 'G' | 'n')) => {
            let c = if kind == 'n' { 'g' } else { kind.to_ascii_lowercase() };
            let text = general_float(value, c, precision, spec.alternate)?;
            if kind.is_ascii_uppercase() { text.to_uppercase() } else { text }
        }
        Some('%') => general_float(value * 100.0, 'f', precision, spec.alternate)? + "%",
        Some(_) => return Err(spec.unknown(of)),
    };
    let is_zero = !text.contains(|c: char| matches!(c, '1'..='9') || c.is_ascii_alphabetic() && c != 'e' && c != 'E');
    let negative = value.is_sign_negative() && !value.is_nan() && !(spec.no_negative_zero && is_zero);
    let head = spec.sign(negative);
    if value.is_finite() {
        text = spec.grouped(head, &text, 3)?;
    }
    spec.place(out, head, &text, '>')
}
