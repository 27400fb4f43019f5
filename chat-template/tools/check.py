"""Compares our renderings of a fixture with Python's.

    python check.py PROGRAM ../tests/cases.json

PROGRAM is the example `render_lines`.
"""

import json
import pathlib
import sys

import compare
import reference

cases = json.loads(pathlib.Path(sys.argv[2]).read_text())["cases"]
found = compare.differences(sys.argv[1], [(c["template"], reference.VARIABLES) for c in cases])
for template, _, mine, python in found:
    print(repr(template), "\n   ours  ", repr(mine), "\n   python", repr(python))
print(f"{len(cases)} cases, {len(found)} differ")
