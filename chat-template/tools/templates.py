"""Renders real chat templates over many conversations by Python and by us, and prints totals.

    python templates.py PROGRAM FOLDER

PROGRAM is the example `render_lines`; FOLDER holds `*.jinja` files, for instance `models/templates` of llama.cpp's
sources (in the source distribution of llama-cpp-python, under vendor/). They are not part of this project.
"""

import json
import pathlib
import sys
from collections import Counter

import compare
import reference

SYSTEM = 'You are "helpful" & <b>brief</b>.\n  Two lines. '
USER = "What's 2 < 3 && \"x\"? 中文 😀 \\n\tTab"
ANSWER = 'It is **true**.\n\n```py\nprint("a")\n```'
THOUGHT = "<think>\nLet me see. 2 < 3.\n</think>\n\nYes, it is."


def talk(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def call(arguments, id="call_1_abcde", name="get_weather"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Gives the weather.\nWith a second line & <tags>.",
            "parameters": {
                "type": "object",
                "properties": {
                    "location": {"type": "string", "description": "A city", "enum": ["Bern", "Zürich"]},
                    "days": {"type": ["integer", "null"], "default": 3, "minimum": 0.5},
                    "options": {"type": "object", "properties": {"unit": {"type": "string"}}, "required": ["unit"]},
                    "tags": {"type": "array", "items": {"type": "string"}},
                },
                "required": ["location"],
                "additionalProperties": False,
            },
            "return": {"type": "string"},
        },
    },
    {"type": "function", "function": {"name": "now", "description": "The time", "parameters": {"type": "object", "properties": {}}}},
]
SIMPLE = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds <numbers>",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer", "description": "The first"},
                    "b": {"type": "array", "items": {"type": "number"}, "description": "More"},
                },
                "required": ["a"],
            },
            "return": {"type": "number", "description": "The sum"},
        },
    }
]
DOCUMENTS = [{"title": "A", "text": "First text."}, {"title": "B & C", "text": "Second\ntext."}]
ARGUMENTS = {"location": "Zürich", "days": 2, "options": {"unit": "°C"}, "flag": True, "none": None, "x": 1.5, "list": [1, "a"]}

CONVERSATIONS = {
    "user": talk(("user", USER)),
    "system, user": talk(("system", SYSTEM), ("user", USER)),
    "three turns": talk(("user", USER), ("assistant", ANSWER), ("user", "And 3 < 2?")),
    "system, three turns": talk(("system", SYSTEM), ("user", USER), ("assistant", ANSWER), ("user", "And 3 < 2?")),
    "thought": talk(("user", "hi"), ("assistant", THOUGHT), ("user", "more")),
    "ends with a thought": talk(("user", "hi"), ("assistant", THOUGHT)),
    "long": talk(("system", SYSTEM), ("user", "1"), ("assistant", THOUGHT), ("user", "2"), ("assistant", ANSWER), ("user", "3")),
    "empty text": talk(("user", "")),
    "white space": talk(("system", "  \n"), ("user", "  lead and trail \n\n")),
    "system only": talk(("system", SYSTEM)),
    "no messages": [],
    "two users": talk(("user", "a"), ("user", "b")),
    "assistant first": talk(("assistant", "a"), ("user", "b")),
    "developer": talk(("developer", SYSTEM), ("user", "b")),
    "tool role": talk(("user", "a"), ("assistant", "b"), ("tool", '{"r": 1}'), ("user", "c")),
    "late system": talk(("user", "a"), ("assistant", "b"), ("system", "c"), ("user", "d")),
    "jinja in a text": talk(("user", "{{ 1 + 1 }} {% raw %} {# x #}")),
    "call": talk(("user", "weather?"))
    + [{"role": "assistant", "content": "", "tool_calls": [call(ARGUMENTS)]}]
    + [{"role": "tool", "name": "get_weather", "tool_call_id": "call_1_abcde", "content": '{"t": 21.5}'}]
    + talk(("assistant", "21.5"), ("user", "thanks")),
    "call, arguments as text": talk(("system", SYSTEM), ("user", "weather?"))
    + [{"role": "assistant", "content": "I look.", "tool_calls": [call(json.dumps(ARGUMENTS))]}]
    + [{"role": "tool", "name": "get_weather", "tool_call_id": "call_1_abcde", "content": "fine"}],
    "two calls": talk(("user", "weather?"))
    + [{"role": "assistant", "content": None, "tool_calls": [call({"location": "Bern"}, "abcdefghi"), call({}, "123456789", "now")]}]
    + [{"role": "tool", "name": "get_weather", "tool_call_id": "abcdefghi", "content": "fine"}]
    + [{"role": "tool", "name": "now", "tool_call_id": "123456789", "content": [{"type": "text", "text": "12:00"}]}],
    "call without content": talk(("user", "w"))
    + [{"role": "assistant", "tool_calls": [call({"location": "Bern"}, "abcdefghi")]}],
    "parts": [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
        {"role": "user", "content": [{"type": "text", "text": USER}, {"type": "image"}, {"type": "text", "text": "b"}]},
    ],
    "reasoning": talk(("user", "q"))
    + [{"role": "assistant", "content": "a", "reasoning_content": "r\nr2", "thinking": "r\nr2"}]
    + talk(("user", "q2")),
    "reasoning and call": talk(("user", "q"))
    + [{"role": "assistant", "content": "", "reasoning_content": "r", "thinking": "r", "tool_calls": [call({"location": "Bern"}, "abcdefghi")]}]
    + [{"role": "tool", "name": "get_weather", "tool_call_id": "abcdefghi", "content": {"t": [1, 2.5, None, True]}}],
}
OPTIONS = [
    {},
    {"tools": TOOLS},
    {"tools": SIMPLE, "functions": json.dumps(SIMPLE), "datetime": "now", "strict_tool_use": True},
    # Command R's template wants tools without a schema.
    {"tools": [{"name": "look", "description": "Looks", "parameter_definitions": {"q": {"type": "str", "description": "Q", "required": True}}}]},
    {"documents": DOCUMENTS},
    {"enable_thinking": True, "thinking": True, "reasoning_effort": "high"},
    {"enable_thinking": False, "thinking": False, "tools": TOOLS[:1]},
]


def main():
    program, folder = sys.argv[1:3]
    files = sorted(pathlib.Path(folder).glob("*.jinja"))
    totals = Counter()
    for path in files:
        source = path.read_bytes().decode()
        tasks, names = [], []
        for name, messages in CONVERSATIONS.items():
            for options in OPTIONS:
                for generate in (False, True):
                    variables = {"tools": None, "documents": None, **options}
                    variables |= {"messages": messages, "add_generation_prompt": generate, **reference.TOKENS}
                    tasks.append((source, variables))
                    names.append((name, options, generate))
        mine = compare.ours(program, tasks)
        counts, first = Counter(), {}
        for (_, variables), result, name in zip(tasks, mine, names, strict=True):
            python = reference.render(source, variables)
            kind = {
                (True, True): "equal" if result.get("ok") == python.get("ok") else "DIFFERS",
                (False, True): "ONLY PYTHON RENDERS",
                (True, False): "ONLY WE RENDER",
                (False, False): "both refuse",
            }["ok" in result, "ok" in python]
            counts[kind] += 1
            first.setdefault(kind, (name, result, python))
        totals += counts
        print(f"{path.name:60} " + ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items())))
        for kind, (name, result, python) in first.items():
            if kind.isupper():
                print("   ", kind, name[0], sorted(name[1]), name[2])
                print("       ours  ", str(result)[:500])
                print("       python", str(python)[:500])
    print(f"{len(files)} templates: " + ", ".join(f"{kind} {count}" for kind, count in sorted(totals.items())))


if __name__ == "__main__":
    main()
