"""Writes tests/strftime.json: what Python makes of every conversion of `strftime`, for some times."""

import json
import pathlib
import string
from datetime import datetime

TIMES = [(2024, 12, 30, 0, 0, 5), (2000, 2, 29, 12, 34, 56), (1999, 1, 3, 23, 59, 59), (2026, 7, 4, 9, 5, 0), (2021, 1, 1, 13, 1, 1)]
# `%s` depends on the time zone.
FORMATS = [f"%{flag}{c}" for c in string.ascii_letters + "+%" if c != "s" for flag in ("", "-", "_", "0", "^", "#", "5", "05", "-3", "E", "O")]
FORMATS += ["%d %b %Y", "%B %-d, %Y", "a%", "%", "%5", "%Y%m%dT%H%M%S", "é%Aé", "%%Y"]
cases = []
for time in TIMES:
    for format in FORMATS:
        cases.append([list(time), format, datetime(*time).strftime(format)])
lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
path = pathlib.Path(__file__).parent.parent / "tests" / "strftime.json"
path.write_text(f"[\n{lines}\n]\n")
