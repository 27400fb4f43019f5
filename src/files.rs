//! Reading the small files of a model. Only regular files are opened, since reading a pipe or a device might never end,
//! and none is read beyond a limit, whatever the file system says of its size.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};

/// Far above every config.json there is.
pub(crate) const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// Far above every tokenizer: the largest have some 40 MB.
pub(crate) const MAX_TOKENIZER_BYTES: u64 = 128 << 20;

/// Opens a regular file.
pub(crate) fn open_regular(path: &Path) -> Result<File> {
    let unreadable = |error: std::io::Error| Error::file(path, format!("cannot be read: {error}"));
    let refuse_others = |is_file: bool| match is_file {
        true => Ok(()),
        false => Err(Error::file(path, "is not a regular file")),
    };
    // Asked before opening, since opening a named pipe waits for its writer, and again for what was opened.
    refuse_others(std::fs::metadata(path).map_err(unreadable)?.is_file())?;
    let file = File::open(path).map_err(unreadable)?;
    refuse_others(file.metadata().map_err(unreadable)?.is_file())?;
    Ok(file)
}

/// The bytes of a regular file of at most `limit` bytes.
pub(crate) fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = open_regular(path)?.take(limit.saturating_add(1)).read_to_end(&mut bytes);
    read.map_err(|error| Error::file(path, format!("cannot be read: {error}")))?;
    if bytes.len() as u64 > limit {
        return Err(Error::file(path, format!("is too large, more than {limit} bytes: fetch the file again")));
    }
    Ok(bytes)
}

/// As [`read_bounded`]; `None` where nothing is at the path.
pub(crate) fn read_if_there(path: &Path, limit: u64) -> Result<Option<Vec<u8>>> {
    match std::fs::metadata(path) {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
        _ => read_bounded(path, limit).map(Some),
    }
}

/// Parses the JSON text of the file at `path`, as Python's parser would.
pub(crate) fn parse_json(path: &Path, bytes: &[u8]) -> Result<Value> {
    let text = std::str::from_utf8(bytes).map_err(|error| Error::file(path, format!("not UTF-8: {error}")))?;
    json_value(text).map_err(|error| Error::file(path, format!("not valid JSON ({error}); fetch the file again")))
}

/// Parses JSON as Python writes and reads it, which is more than the standard has: `NaN`, `Infinity` and `-Infinity`,
/// numbers beyond 64-bit floats, and escapes of half a surrogate pair. Numbers that are not finite become texts, so that
/// they are harmless where nothing reads them and of the wrong type where something does.
fn json_value(text: &str) -> serde_json::Result<Value> {
    serde_json::from_str(text).or_else(|_| serde_json::from_str(&standard_json(text)))
}

/// The text with quotes around numbers that are not finite, and U+FFFD for half surrogate pairs.
fn standard_json(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 16);
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let end = match first {
            '"' => string_end(rest),
            '-' | '0'..='9' | 'A'..='Z' | 'a'..='z' => {
                let in_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '+' | '.');
                rest.find(|c| !in_word(c)).unwrap_or(rest.len())
            }
            other => other.len_utf8(),
        };
        let (token, after) = rest.split_at(end);
        match first {
            '"' => push_string(token, &mut out),
            _ if is_not_finite(token) => {
                out.push('"');
                out.push_str(token);
                out.push('"');
            }
            _ => out.push_str(token),
        }
        rest = after;
    }
    out
}

fn is_not_finite(token: &str) -> bool {
    let digits = token.strip_prefix('-').unwrap_or(token);
    matches!(token, "NaN" | "Infinity" | "-Infinity")
        || (digits.starts_with(|c: char| c.is_ascii_digit()) && digits.parse().is_ok_and(f64::is_infinite))
}

/// The index behind the closing quote of a string that begins `text`.
fn string_end(text: &str) -> usize {
    let mut escaped = false;
    for (at, byte) in text.bytes().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

fn push_string(token: &str, out: &mut String) {
    let mut rest = token;
    while let Some(at) = rest.find('\\') {
        // Two bytes for an escape, six for one of a UTF-16 unit, twelve for a pair of them.
        let unit = |at: usize| {
            let digits = rest.get(at..at + 6)?.strip_prefix("\\u")?;
            u16::from_str_radix(digits, 16).ok()
        };
        let (length, replacement) = match (unit(at), unit(at + 6)) {
            (Some(0xd800..0xdc00), Some(0xdc00..0xe000)) => (12, None),
            (Some(0xd800..0xe000), _) => (6, Some("\\ufffd")),
            (Some(_), _) => (6, None),
            (None, _) => (2, None),
        };
        let end = (at..=rest.len()).find(|&end| end >= at + length && rest.is_char_boundary(end)).unwrap_or(rest.len());
        out.push_str(&rest[..at]);
        out.push_str(replacement.unwrap_or(&rest[at..end]));
        rest = &rest[end..];
    }
    out.push_str(rest);
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn json_as_python_writes_it_is_read() {
        let huge = "9".repeat(400);
        for (text, value) in [
            (r#"{"a": NaN, "b": [Infinity, -Infinity]}"#, json!({"a": "NaN", "b": ["Infinity", "-Infinity"]})),
            (r#"{"NaN": "NaN, -Infinity", "b": NaN}"#, json!({"NaN": "NaN, -Infinity", "b": "NaN"})),
            (r#"["a\"NaN", NaN, "\\", -1e999, 1e999]"#, json!(["a\"NaN", "NaN", "\\", "-1e999", "1e999"])),
            (r#"[true, null, -0.5e-3, 1E+2, "ä"]"#, json!([true, null, -0.0005, 100.0, "ä"])),
            (r#"{"a": 1, "a": 2}"#, json!({"a": 2})),
            (
                r#"["\ud83d\ude00", "\ud83d", "\ude00x", "\ud83dä"]"#,
                json!(["😀", "\u{fffd}", "\u{fffd}x", "\u{fffd}ä"]),
            ),
            (r#"["\\ud83d", "\u00e4\n"]"#, json!(["\\ud83d", "ä\n"])),
        ] {
            assert_eq!(json_value(text).unwrap(), value, "{text}");
        }
        assert_eq!(json_value(&format!("[{huge}]")).unwrap(), json!([huge]));
        assert_eq!(json_value("[123456789012345678901234567890]").unwrap()[0].as_f64(), Some(1.2345678901234568e29));
    }

    #[test]
    fn what_python_refuses_is_refused() {
        for text in [
            "",
            "[nan]",
            "[inf]",
            "[+1]",
            "[01]",
            "[1,]",
            "[-NaN]",
            "[NaN",
            "\u{feff}[]",
            "[] NaN",
            "[\"\\",
            "[\"\\u12",
        ] {
            assert!(json_value(text).is_err(), "{text}");
        }
    }

    #[test]
    fn only_regular_files_within_the_limit_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "12345").unwrap();
        assert_eq!(read_bounded(&path, 5).unwrap(), b"12345");
        assert_eq!(read_if_there(&path.join("below"), 5).unwrap(), None);
        assert_eq!(read_if_there(&dir.path().join("absent"), 5).unwrap(), None);
        for (path, reason) in [
            (path.as_path(), "too large, more than 4 bytes"),
            (dir.path(), "not a regular file"),
            (Path::new("/dev/zero"), "not a regular file"),
            (&dir.path().join("absent"), "cannot be read"),
        ] {
            if path.exists() || reason == "cannot be read" {
                let message = read_bounded(path, 4).unwrap_err().to_string();
                assert!(message.contains(path.to_str().unwrap()) && message.contains(reason), "{message}");
            }
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_named_pipe_is_refused_without_waiting_for_a_writer() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let message = read_if_there(&pipe, 10).unwrap_err().to_string();
        assert!(message.contains("not a regular file"), "{message}");
    }
}
