//! Tokens of preprocessed source, with the line each stands on.

use super::{Kind, Tok};

pub(super) fn lex(s: &str) -> Result<Vec<Tok>, String> {
    let b = s.as_bytes();
    let mut t: Vec<Tok> = Vec::new();
    let (mut i, mut line, mut bol) = (0, 1u32, true);
    while i < b.len() {
        let start = i;
        let c = b[i];
        let mut at = line;
        let kind = if bol && c == b'#' {
            while i < b.len() && b[i] != b'\n' {
                i += 1;
            }
            let d = s[start + 1..i].trim_start();
            if let Ok(n) = d.split(' ').next().unwrap_or("").parse::<u32>() {
                line = n.wrapping_sub(1); // `# 12 "file"` numbers the NEXT line
            } else {
                // pragmas mean nothing here
                t.push(Tok { kind: Kind::Blank, text: String::new(), line });
                continue;
            }
            Kind::Blank
        } else if c.is_ascii_whitespace() {
            while i < b.len() && b[i].is_ascii_whitespace() {
                i += 1;
                if b[i - 1] == b'\n' {
                    line = line.wrapping_add(1); // gcc emits `# 0 "file"` first
                    bol = true;
                    break;
                }
            }
            t.push(Tok { kind: Kind::Blank, text: s[start..i].to_string(), line: at });
            continue;
        } else if c.is_ascii_alphabetic() || c == b'_' {
            while i < b.len() && (b[i].is_ascii_alphanumeric() || b[i] == b'_') {
                i += 1;
            }
            Kind::Ident
        } else if c.is_ascii_digit() || (c == b'.' && b.get(i + 1).is_some_and(u8::is_ascii_digit)) {
            let hex = s[start..].starts_with("0x") || s[start..].starts_with("0X");
            let exp = if hex { b"pP" } else { b"eE" };
            while i < b.len() {
                let sign = (b[i] == b'+' || b[i] == b'-') && i > start && exp.contains(&b[i - 1]);
                if !sign && !b[i].is_ascii_alphanumeric() && b[i] != b'.' && b[i] != b'_' {
                    break;
                }
                i += 1;
            }
            Kind::Number
        } else if c == b'"' || c == b'\'' {
            i += 1;
            while i < b.len() && b[i] != c {
                i += if b[i] == b'\\' { 2 } else { 1 };
            }
            i += 1;
            Kind::Text
        } else {
            i += s[i..].chars().next().map_or(1, char::len_utf8);
            Kind::Punct
        };
        bol = false;
        if kind == Kind::Blank {
            at = line;
        }
        let text = s.get(start..i).ok_or("unterminated literal")?.to_string();
        t.push(Tok { kind, text, line: at });
    }
    Ok(t)
}

pub(super) fn match_brackets(t: &[Tok]) -> Result<Vec<usize>, String> {
    let mut mate = vec![usize::MAX; t.len()];
    let mut open = Vec::new();
    for (i, k) in t.iter().enumerate() {
        if k.kind != Kind::Punct {
            continue;
        }
        match k.text.as_str() {
            "(" | "[" | "{" => open.push(i),
            ")" | "]" | "}" => {
                let o = open.pop().ok_or(format!("line {}: unmatched `{}`", k.line, k.text))?;
                mate[o] = i;
                mate[i] = o;
            }
            _ => {}
        }
    }
    match open.pop() {
        Some(o) => Err(format!("line {}: unclosed `{}`", t[o].line, t[o].text)),
        None => Ok(mate),
    }
}

pub(super) fn swizzle_indices(s: &str) -> Option<Vec<usize>> {
    if !(2..=4).contains(&s.len()) {
        return None;
    }
    ["xyzw", "rgba"].iter().find_map(|set| s.chars().map(|c| set.find(c)).collect())
}

pub(super) fn number(s: &str) -> String {
    let lower = s.to_ascii_lowercase();
    if lower.starts_with("0x") {
        let float = lower.contains('p') && !lower.ends_with('f') && !lower.ends_with('h');
        return if float { format!("{s}f") } else { s.to_string() };
    }
    if let Some(v) = lower.strip_suffix("bf") {
        return format!("bfloat({v}f)");
    }
    if let Some(v) = lower.strip_suffix('h') {
        return format!("half({v}f)");
    }
    let float = lower.contains('.') || lower.contains('e');
    if float && !lower.ends_with('f') && !lower.ends_with('l') { format!("{s}f") } else { s.to_string() }
}

/// Joins the adjacent string literals of a host_name.
pub(super) fn unquote(s: &str) -> String {
    s.split('"').skip(1).step_by(2).collect()
}
