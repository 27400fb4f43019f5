"""Writes src/unicode_tables.rs: the classes and cases of characters that Python has and Rust has not."""

import pathlib
import sys


def ranges(test):
    found = []
    for code in range(0x80, sys.maxunicode + 1):
        if 0xD800 <= code < 0xE000 or not test(chr(code)):
            continue
        if found and found[-1][1] == code - 1:
            found[-1][1] = code
        else:
            found.append([code, code])
    return found


def table(name, comment, test):
    out = [f"/// {comment}", "#[rustfmt::skip]", f"pub(super) const {name}: &[(u32, u32)] = &["]
    line = "   "
    for first, last in ranges(test):
        part = f" ({first:#x}, {last:#x}),"
        if len(line) + len(part) > 120:
            out.append(line)
            line = "   "
        line += part
    return out + [line, "];", ""]


def mapping(name, comment, mapped, usual):
    out = [f"/// {comment}", "#[rustfmt::skip]", f"pub(super) const {name}: &[(u32, &str)] = &["]
    line = "   "
    for code in range(sys.maxunicode + 1):
        if 0xD800 <= code < 0xE000 or mapped(chr(code)) == usual(chr(code)):
            continue
        text = "".join(f"\\u{{{ord(c):x}}}" for c in mapped(chr(code)))
        part = f' ({code:#x}, "{text}"),'
        if len(line) + len(part) > 120:
            out.append(line)
            line = "   "
        line += part
    return out + [line, "];", ""]


lines = ["//! Made by tools/unicode_tables.py.", ""]
lines += table("UNPRINTABLE", "Characters beyond ASCII that `repr` escapes.", lambda c: not c.isprintable())
lines += table("ALPHA", "Letters beyond ASCII.", str.isalpha)
lines += table("DECIMAL", "Digits beyond ASCII that numbers can be written with.", str.isdecimal)
lines += table("OTHER_DIGIT", "Digits that are not decimal.", lambda c: c.isdigit() and not c.isdecimal())
lines += table("OTHER_NUMERIC", "Numeric characters that are no digits.", lambda c: c.isnumeric() and not c.isdigit())
lines += table("TITLE", "Characters in title case.", lambda c: c.istitle() and not c.isupper())
lines += mapping("TO_TITLE", "Title case where it is not the upper case.", str.title, str.upper)
lines += mapping("TO_FOLDED", "`str.casefold` where it is not the lower case.", str.casefold, str.lower)
path = pathlib.Path(__file__).parent.parent / "src" / "unicode_tables.rs"
path.write_text("\n".join(lines).rstrip() + "\n")
