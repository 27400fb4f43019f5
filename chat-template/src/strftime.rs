//! `strftime` with the conversions of C's library, in its default locale.

use chrono::{DateTime, Datelike, Local, NaiveDateTime, Timelike};

use crate::error::Result;
use crate::value::Builder;

const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
#[rustfmt::skip]
const MONTHS: [&str; 12] = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
];

/// Python's `datetime.now().strftime(format)`: local time without a time zone.
pub(crate) fn strftime_now(format: &str) -> Result<String> {
    let now: DateTime<Local> = Local::now();
    strftime(format, now.naive_local(), now.timestamp())
}

/// What fills a number up, and to which width.
#[derive(Clone, Copy, Default)]
struct Flags {
    pad: Option<char>,
    upper: bool,
    swap: bool,
    width: usize,
    modifier: Option<char>,
}

/// Conversions that the modifiers `E` and `O` can stand before.
const WITH_E: &str = "%CPRTXYZcnprtuxyz";
const WITH_O: &str = "%BCGHIMPRSTUVWZbdeghjklmnprtuwyz";

/// A conversion that the library does not know: it stays as it is written.
fn unknown(out: &mut Builder, flags: Flags, spelled: &str) -> Result<()> {
    let spelled = if flags.upper { spelled.to_uppercase() } else { spelled.to_owned() };
    padded(out, flags, &spelled)
}

/// A text in a field, as wide as it was asked for.
fn padded(out: &mut Builder, flags: Flags, text: &str) -> Result<()> {
    let pad = if flags.pad == Some('0') { '0' } else { ' ' };
    out.repeat(pad, flags.width.saturating_sub(text.len()))?;
    out.push_str(text)
}

/// `timestamp` is the time's number of seconds since 1970 in UTC.
pub(crate) fn strftime(format: &str, time: NaiveDateTime, timestamp: i64) -> Result<String> {
    let mut out = Builder::new();
    write(&mut out, format, time, timestamp)?;
    Ok(out.into_string())
}

fn write(out: &mut Builder, format: &str, time: NaiveDateTime, timestamp: i64) -> Result<()> {
    let mut rest = format;
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at])?;
        let conversion = &rest[at..];
        let mut flags = Flags::default();
        let mut chars = conversion[1..].char_indices().peekable();
        while let Some((_, c)) = chars.next_if(|(_, c)| matches!(c, '_' | '-' | '0' | '^' | '#')) {
            match c {
                '^' => flags.upper = true,
                '#' => flags.swap = true,
                pad => flags.pad = Some(pad),
            }
        }
        while let Some((_, digit)) = chars.next_if(|(_, c)| c.is_ascii_digit()) {
            flags.width = (flags.width * 10 + digit.to_digit(10).unwrap_or(0) as usize).min(1 << 40);
        }
        flags.modifier = chars.next_if(|(_, c)| matches!(c, 'E' | 'O')).map(|(_, c)| c);
        let Some((last, c)) = chars.next() else {
            return padded(out, flags, conversion);
        };
        rest = &conversion[1 + last + c.len_utf8()..];
        let spelled = &conversion[..1 + last + c.len_utf8()];
        convert(out, c, flags, spelled, time, timestamp)?;
    }
    out.push_str(rest)
}

fn convert(out: &mut Builder, c: char, flags: Flags, spelled: &str, time: NaiveDateTime, timestamp: i64) -> Result<()> {
    let known = match flags.modifier {
        Some('E') => WITH_E.contains(c),
        Some(_) => WITH_O.contains(c),
        None => true,
    };
    // Python itself takes care of microseconds, without flags.
    if !known || c == 'f' && spelled != "%f" {
        return unknown(out, flags, spelled);
    }
    let (day, month) = (DAYS[time.weekday().num_days_from_sunday() as usize], MONTHS[time.month0() as usize]);
    let year = i64::from(time.year());
    let (_, hour12) = time.hour12();
    let week = |first: u32| i64::from((time.ordinal0() + 7 - first) / 7);
    let iso = time.iso_week();
    let mut number = |value: i64, digits: usize, pad: char| {
        let pad = match flags.pad {
            Some('-') if flags.width == 0 => return out.push_str(&value.to_string()),
            Some('-') => {
                let text = value.to_string();
                out.repeat(' ', flags.width.saturating_sub(text.len()))?;
                return out.push_str(&text);
            }
            Some('_') => ' ',
            Some(_) => '0',
            None => pad,
        };
        let text = value.to_string();
        out.repeat(pad, digits.max(flags.width).saturating_sub(text.len()))?;
        out.push_str(&text)
    };
    let text = match c {
        'a' => day[..3].to_owned(),
        'A' => day.to_owned(),
        'b' | 'h' => month[..3].to_owned(),
        'B' => month.to_owned(),
        'p' | 'P' => {
            let half = if time.hour() < 12 { "AM" } else { "PM" };
            if c == 'P' || flags.swap { half.to_lowercase() } else { half.to_owned() }
        }
        // A time without a time zone.
        'z' => return Ok(()),
        'Z' => String::new(),
        'f' => format!("{:06}", time.nanosecond() / 1000 % 1_000_000),
        'n' => "\n".to_owned(),
        't' => "\t".to_owned(),
        '%' => "%".to_owned(),
        'c' | 'D' | 'F' | 'r' | 'R' | 'T' | 'x' | 'X' => {
            let parts = match c {
                'c' => "%a %b %e %H:%M:%S %Y",
                'D' | 'x' => "%m/%d/%y",
                'F' => "%Y-%m-%d",
                'r' => "%I:%M:%S %p",
                'R' => "%H:%M",
                _ => "%H:%M:%S",
            };
            strftime(parts, time, timestamp)?
        }
        'C' => return number(year.div_euclid(100), 2, '0'),
        'd' => return number(time.day().into(), 2, '0'),
        'e' => return number(time.day().into(), 2, ' '),
        'g' => return number(i64::from(iso.year()).rem_euclid(100), 2, '0'),
        'G' => return number(iso.year().into(), 1, '0'),
        'H' => return number(time.hour().into(), 2, '0'),
        'I' => return number(hour12.into(), 2, '0'),
        'j' => return number(time.ordinal().into(), 3, '0'),
        'k' => return number(time.hour().into(), 2, ' '),
        'l' => return number(hour12.into(), 2, ' '),
        'm' => return number(time.month().into(), 2, '0'),
        'M' => return number(time.minute().into(), 2, '0'),
        's' => return number(timestamp, 1, '0'),
        'S' => return number(time.second().into(), 2, '0'),
        'u' => return number(time.weekday().number_from_monday().into(), 1, '0'),
        'U' => return number(week(time.weekday().num_days_from_sunday()), 2, '0'),
        'V' => return number(iso.week().into(), 2, '0'),
        'w' => return number(time.weekday().num_days_from_sunday().into(), 1, '0'),
        'W' => return number(week(time.weekday().num_days_from_monday()), 2, '0'),
        'y' => return number(year.rem_euclid(100), 2, '0'),
        'Y' => return number(year, 1, '0'),
        _ => return unknown(out, flags, spelled),
    };
    let upper = flags.upper && c != 'P' || flags.swap && matches!(c, 'a' | 'A' | 'b' | 'B' | 'h');
    let text = if upper { text.to_uppercase() } else { text };
    padded(out, flags, &text)
}

#[cfg(test)]
mod tests {
    use chrono::NaiveDate;
    use serde_json::Value;

    use super::*;

    #[test]
    fn conversions_give_what_python_gives() {
        let cases: Value = serde_json::from_str(include_str!("../tests/strftime.json")).unwrap();
        let mut wrong = Vec::new();
        for case in cases.as_array().unwrap() {
            let part = |at: usize| case[0][at].as_u64().unwrap() as u32;
            let date = NaiveDate::from_ymd_opt(part(0) as i32, part(1), part(2)).unwrap();
            let time = date.and_hms_opt(part(3), part(4), part(5)).unwrap();
            let format = case[1].as_str().unwrap();
            let text = strftime(format, time, 0).unwrap();
            if Some(text.as_str()) != case[2].as_str() {
                wrong.push(format!("{format:?} {time}: {text:?}, not {}", case[2]));
            }
        }
        assert!(wrong.is_empty(), "{}:\n{}", wrong.len(), wrong.join("\n"));
    }

    #[test]
    fn a_huge_width_is_refused() {
        let time = NaiveDate::from_ymd_opt(2024, 1, 1).unwrap().and_hms_opt(0, 0, 0).unwrap();
        assert!(strftime("%1000000000000a", time, 0).is_err());
        assert!(strftime("%1000000000d", time, 0).is_err());
        assert_eq!(strftime("%s", time, 86_400).unwrap(), "86400");
    }
}
