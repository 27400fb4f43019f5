"""Compares our renderings with those of Python."""

import json
import re
import subprocess

import reference

# Addresses of objects and what a template cannot rely on.
VOLATILE = re.compile(r"(object|generator|function|method|class)[^>]* at 0x[0-9a-f]+|0x[0-9a-f]{6,}")


def ours(program, tasks):
    """Results of `render_lines` for tasks of (template, variables)."""
    lines = "".join(json.dumps({"template": t, "variables": v}) + "\n" for t, v in tasks)
    done = subprocess.run([program], input=lines, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise SystemExit(f"{program} ended with {done.returncode}: {done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.split("\n")[:-1]]


def differences(program, tasks):
    """Pairs of results that differ, as (template, variables, ours, Python's)."""
    found = []
    for (template, variables), mine in zip(tasks, ours(program, tasks), strict=True):
        python = reference.render(template, variables)
        if "ok" in mine and "ok" in python:
            if VOLATILE.sub("", mine["ok"]) == VOLATILE.sub("", python["ok"]):
                continue
        elif "error" in mine and "error" in python:
            continue
        found.append((template, variables, mine, python))
    return found
