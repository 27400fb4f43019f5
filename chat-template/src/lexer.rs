//! Source to tokens, with Jinja's rules for white space: `trim_blocks`, `lstrip_blocks` and the signs of tags.

use crate::error::{Error, Result};
use crate::unicode::is_space;

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Token {
    Text(String),
    VariableBegin,
    VariableEnd,
    BlockBegin,
    BlockEnd,
    Name(String),
    Str(String),
    Int(i128),
    Float(f64),
    Op(&'static str),
    End,
}

impl Token {
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Text(_) => "template text".into(),
            Self::VariableBegin => "`{{`".into(),
            Self::VariableEnd => "`}}`".into(),
            Self::BlockBegin => "`{%`".into(),
            Self::BlockEnd => "`%}`".into(),
            Self::Name(name) => format!("`{}`", crate::error::excerpt(name)),
            Self::Str(_) => "a text".into(),
            Self::Int(_) | Self::Float(_) => "a number".into(),
            Self::Op(op) => format!("`{op}`"),
            Self::End => "the end of the template".into(),
        }
    }
}

/// A token and its line.
pub(crate) type Spanned = (Token, u32);

/// Longer operators come first.
const OPERATORS: [&str; 26] = [
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}", ">", "<", "=", ".",
    ":", "|", ",", ";",
];

/// The tokens of a template, the last one [`Token::End`].
pub(crate) fn tokenize(source: &str) -> Result<Vec<Spanned>> {
    let normalized = source.replace("\r\n", "\n").replace('\r', "\n");
    // `keep_trailing_newline` is off.
    let source = normalized.strip_suffix('\n').unwrap_or(&normalized);
    let mut lexer = Lexer { source, at: 0, line: 1, line_starting: true, tokens: Vec::new() };
    lexer.root()?;
    lexer.push(Token::End);
    Ok(lexer.tokens)
}

struct Lexer<'s> {
    source: &'s str,
    at: usize,
    line: u32,
    /// Whether what was read last ended with a line end.
    line_starting: bool,
    tokens: Vec<Spanned>,
}

impl<'s> Lexer<'s> {
    fn rest(&self) -> &'s str {
        &self.source[self.at..]
    }

    fn push(&mut self, token: Token) {
        self.tokens.push((token, self.line));
    }

    fn error<T>(&self, message: impl Into<String>) -> Result<T> {
        Err(Error::syntax(message, self.line))
    }

    fn advance(&mut self, bytes: usize) {
        let read = &self.source[self.at..self.at + bytes];
        self.line += read.bytes().filter(|&b| b == b'\n').count() as u32;
        if !read.is_empty() {
            self.line_starting = read.ends_with('\n');
        }
        self.at += bytes;
    }

    fn skip_space(&mut self) {
        let rest = self.rest();
        self.advance(rest.len() - rest.trim_start_matches(is_space).len());
    }

    fn root(&mut self) -> Result<()> {
        while !self.rest().is_empty() {
            let rest = self.rest();
            let begin =
                rest.match_indices('{').find(|(at, _)| matches!(rest.as_bytes().get(at + 1), Some(b'{' | b'%' | b'#')));
            let Some((begin, _)) = begin else {
                self.text(rest);
                self.advance(rest.len());
                break;
            };
            let kind = rest.as_bytes()[begin + 1];
            let sign = rest[begin + 2..].chars().next().filter(|c| matches!(c, '-' | '+'));
            let text = self.stripped(&rest[..begin], sign, kind != b'{');
            self.text(text);
            self.advance(begin + 2 + usize::from(sign.is_some()));
            match kind {
                b'{' => {
                    self.push(Token::VariableBegin);
                    self.inside(false)?;
                }
                b'#' => self.comment()?,
                _ => {
                    if let Some(length) = self.raw_begin() {
                        self.advance(length);
                        self.raw()?;
                    } else {
                        self.push(Token::BlockBegin);
                        self.inside(true)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn text(&mut self, text: &str) {
        if !text.is_empty() {
            self.push(Token::Text(text.to_owned()));
        }
    }

    /// The text before a tag, without the white space that the tag removes.
    fn stripped<'t>(&self, text: &'t str, sign: Option<char>, is_block: bool) -> &'t str {
        match sign {
            Some('-') => text.trim_end_matches(is_space),
            Some(_) => text,
            None if is_block => {
                let line = text.rfind('\n').map_or(0, |at| at + 1);
                let whole_line = line > 0 || self.line_starting;
                if whole_line && text[line..].chars().all(is_space) { &text[..line] } else { text }
            }
            None => text,
        }
    }

    fn comment(&mut self) -> Result<()> {
        let rest = self.rest();
        let Some(end) = rest.find("#}") else {
            return if rest.is_empty() { Ok(()) } else { self.error("missing end of comment") };
        };
        // `-#}` takes the white space that follows, `+#}` nothing, `#}` one line end.
        let sign = rest[..end].chars().next_back().filter(|c| matches!(c, '-' | '+'));
        self.advance(end + 2);
        self.after_block(sign);
        Ok(())
    }

    fn after_block(&mut self, sign: Option<char>) {
        match sign {
            Some('-') => self.skip_space(),
            None if self.rest().starts_with('\n') => self.advance(1),
            _ => {}
        }
    }

    /// Length of `raw %}` where a raw block begins here.
    fn raw_begin(&self) -> Option<usize> {
        let rest = self.rest();
        let after = rest.trim_start_matches(is_space).strip_prefix("raw")?.trim_start_matches(is_space);
        let after = match after.strip_prefix("-%}") {
            Some(after) => after.trim_start_matches(is_space),
            None => after.strip_prefix("%}")?,
        };
        Some(rest.len() - after.len())
    }

    fn raw(&mut self) -> Result<()> {
        let rest = self.rest();
        for (at, _) in rest.match_indices("{%") {
            let tag = &rest[at + 2..];
            let sign = tag.chars().next().filter(|c| matches!(c, '-' | '+'));
            let tag = &tag[usize::from(sign.is_some())..];
            let Some(after) = tag.trim_start_matches(is_space).strip_prefix("endraw") else { continue };
            let after = after.trim_start_matches(is_space);
            let end_sign = after.chars().next().filter(|c| matches!(c, '-' | '+'));
            let Some(after) = after[usize::from(end_sign.is_some())..].strip_prefix("%}") else { continue };
            let text = self.stripped(&rest[..at], sign, true);
            self.text(text);
            self.advance(rest.len() - after.len());
            self.after_block(end_sign);
            return Ok(());
        }
        if rest.is_empty() { Ok(()) } else { self.error("missing end of raw block") }
    }

    /// Tokens up to the end of a tag.
    fn inside(&mut self, block: bool) -> Result<()> {
        let end = if block { "%}" } else { "}}" };
        let mut open: Vec<&'static str> = Vec::new();
        loop {
            let rest = self.rest();
            if open.is_empty() {
                let sign = match rest.as_bytes().first() {
                    Some(b'-') if rest[1..].starts_with(end) => Some('-'),
                    Some(b'+') if block && rest[1..].starts_with(end) => Some('+'),
                    _ => None,
                };
                if sign.is_some() || rest.starts_with(end) {
                    self.push(if block { Token::BlockEnd } else { Token::VariableEnd });
                    self.advance(2 + usize::from(sign.is_some()));
                    match block {
                        true => self.after_block(sign),
                        false if sign.is_some() => self.skip_space(),
                        false => {}
                    }
                    return Ok(());
                }
            }
            // Jinja notices the missing end of a tag when it parses.
            let Some(c) = rest.chars().next() else { return Ok(()) };
            if is_space(c) {
                self.skip_space();
            } else if c.is_ascii_digit() {
                self.number()?;
            } else if c == '_' || c.is_alphanumeric() {
                self.name()?;
            } else if c == '\'' || c == '"' {
                self.string(c)?;
            } else if let Some(op) = OPERATORS.iter().find(|op| rest.starts_with(**op)) {
                match *op {
                    "{" => open.push("}"),
                    "(" => open.push(")"),
                    "[" => open.push("]"),
                    "}" | ")" | "]" => match open.pop() {
                        Some(expected) if expected == *op => {}
                        Some(expected) => return self.error(format!("unexpected `{op}`, expected `{expected}`")),
                        None => return self.error(format!("unexpected `{op}`")),
                    },
                    _ => {}
                }
                self.push(Token::Op(op));
                self.advance(op.len());
            } else {
                return self.error(format!("unexpected character {c:?}"));
            }
        }
    }

    fn name(&mut self) -> Result<()> {
        let rest = self.rest();
        let length = rest.find(|c: char| c != '_' && !c.is_alphanumeric()).unwrap_or(rest.len());
        let name = &rest[..length];
        if !name.starts_with(|c: char| c == '_' || c.is_alphabetic()) {
            return self.error("invalid character in identifier");
        }
        self.push(Token::Name(name.to_owned()));
        self.advance(length);
        Ok(())
    }

    /// Length of digits with single underscores between them.
    fn digits(text: &str, is_digit: fn(&char) -> bool) -> usize {
        let mut length = 0;
        let mut chars = text.chars().peekable();
        while let Some(c) = chars.next() {
            let between = c == '_' && length > 0 && chars.peek().is_some_and(is_digit);
            if !is_digit(&c) && !between {
                break;
            }
            length += 1;
        }
        length
    }

    fn number(&mut self) -> Result<()> {
        let rest = self.rest();
        if let Some(length) = self.float_length(rest) {
            let text = rest[..length].replace('_', "");
            // Rust reads what Python reads, except that the number may be out of range: infinity in both.
            let Ok(value) = text.parse() else { return self.error("invalid number") };
            self.push(Token::Float(value));
            self.advance(length);
            return Ok(());
        }
        let radix = match rest.get(..2).map(str::to_ascii_lowercase).as_deref() {
            Some("0b") => Some((2, (|c| matches!(c, '0' | '1')) as fn(&char) -> bool)),
            Some("0o") => Some((8, (|c| matches!(c, '0'..='7')) as fn(&char) -> bool)),
            Some("0x") => Some((16, char::is_ascii_hexdigit as fn(&char) -> bool)),
            _ => None,
        };
        if let Some((radix, is_digit)) = radix {
            let digits = &rest[2..];
            let skip = usize::from(digits.starts_with('_'));
            let length = Self::digits(&digits[skip..], is_digit);
            if length > 0 {
                let text = digits[..skip + length].replace('_', "");
                return self.integer(&text, radix, 2 + skip + length);
            }
        }
        let length = match rest.starts_with('0') {
            true => Self::digits(rest, |c| *c == '0'),
            false => Self::digits(rest, char::is_ascii_digit),
        };
        self.integer(&rest[..length].replace('_', ""), 10, length)
    }

    fn integer(&mut self, digits: &str, radix: u32, length: usize) -> Result<()> {
        let Ok(value) = i128::from_str_radix(digits, radix) else {
            return self.error("integers of more than 127 bits are not supported");
        };
        self.push(Token::Int(value));
        self.advance(length);
        Ok(())
    }

    fn float_length(&self, rest: &str) -> Option<usize> {
        if self.source[..self.at].ends_with('.') {
            return None;
        }
        let whole = Self::digits(rest, char::is_ascii_digit);
        let fraction = match rest[whole..].strip_prefix('.') {
            Some(after) => match Self::digits(after, char::is_ascii_digit) {
                0 => 0,
                length => length + 1,
            },
            None => 0,
        };
        let mantissa = whole + fraction;
        let exponent = rest[mantissa..].strip_prefix(['e', 'E']).and_then(|after| {
            let sign = usize::from(after.starts_with(['+', '-']));
            let length = Self::digits(&after[sign..], char::is_ascii_digit);
            (length > 0).then_some(1 + sign + length)
        });
        match exponent {
            Some(exponent) => Some(mantissa + exponent),
            None if fraction > 0 => Some(mantissa),
            None => None,
        }
    }

    fn string(&mut self, quote: char) -> Result<()> {
        let body = &self.rest()[1..];
        let mut bytes = body.bytes().enumerate();
        let end = loop {
            match bytes.next() {
                Some((_, b'\\')) => {
                    bytes.next();
                }
                Some((at, byte)) if byte == quote as u8 => break at,
                Some(_) => {}
                None => return self.error(format!("unexpected character {quote:?}: the text has no end")),
            }
        };
        let value = match unescape(&body[..end]) {
            Ok(value) => value,
            Err(reason) => return self.error(reason),
        };
        self.push(Token::Str(value));
        self.advance(end + 2);
        Ok(())
    }
}

/// The escapes of Python's texts; an unknown one stays as it is written.
fn unescape(text: &str) -> std::result::Result<String, String> {
    if !text.contains('\\') {
        return Ok(text.to_owned());
    }
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let Some(c) = rest.chars().next() else { return Err("a text ends with a backslash".into()) };
        rest = &rest[c.len_utf8()..];
        let mut code = |length: usize| -> std::result::Result<char, String> {
            let digits = rest.get(..length).filter(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()));
            let digits = digits.ok_or_else(|| format!("truncated \\{c} escape"))?;
            rest = &rest[length..];
            let code = u32::from_str_radix(digits, 16).map_err(|error| error.to_string())?;
            char::from_u32(code).ok_or_else(|| format!("\\{c}{digits} is no character"))
        };
        match c {
            '\n' => {}
            '\\' | '\'' | '"' => out.push(c),
            'a' => out.push('\x07'),
            'b' => out.push('\x08'),
            'f' => out.push('\x0c'),
            'n' => out.push('\n'),
            'r' => out.push('\r'),
            't' => out.push('\t'),
            'v' => out.push('\x0b'),
            'x' => out.push(code(2)?),
            'u' => out.push(code(4)?),
            'U' => out.push(code(8)?),
            'N' => return Err("\\N escapes are not supported: write the character".into()),
            '0'..='7' => {
                let more = rest.bytes().take(2).take_while(|b| matches!(b, b'0'..=b'7')).count();
                let value = u32::from_str_radix(&format!("{c}{}", &rest[..more]), 8).unwrap_or(0);
                rest = &rest[more..];
                out.extend(char::from_u32(value));
            }
            c if c.is_ascii() => out.extend(['\\', c]),
            // Jinja makes an escape of the character first, whose backslash this one then escapes.
            c => out.push_str(&match u32::from(c) {
                code @ ..0x100 => format!("\\x{code:02x}"),
                code @ ..0x1_0000 => format!("\\u{code:04x}"),
                code => format!("\\U{code:08x}"),
            }),
        }
    }
    out.push_str(rest);
    Ok(out)
}
