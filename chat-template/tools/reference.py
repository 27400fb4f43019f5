"""What Python makes of templates: Jinja2 as transformers sets it up.

    python reference.py ../tests/cases.json

renders every template of the file anew and writes the results into it. A new case needs only its `template`.
"""

import copy
import json
import pathlib
import sys
import warnings

from transformers.utils.chat_template_utils import _compile_jinja_template

warnings.simplefilter("ignore")

MESSAGES = [
    {"role": "system", "content": 'Sys <b> & "q"'},
    {"role": "user", "content": "Hi there\n"},
    {"role": "assistant", "content": "<think>\nx\n</think>\n\nAns"},
    {"role": "user", "content": "ünï 😀 İß"},
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
VARIABLES = {"messages": MESSAGES, "tools": None, "documents": None, "add_generation_prompt": True, **TOKENS}


def render(template, variables=None):
    """`{"ok": text}` or `{"error": message}`."""
    try:
        text = _compile_jinja_template(template).render(
            # A filter may change what it is given.
            **copy.deepcopy(VARIABLES if variables is None else variables)
        )
        text.encode()
        return {"ok": text}
    except RecursionError:
        return {"error": "RecursionError"}
    except Exception as error:  # Templates fail with every kind of exception.
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def main():
    path = pathlib.Path(sys.argv[1])
    cases = json.loads(path.read_text())
    cases["variables"] = VARIABLES
    cases["cases"] = [{"template": c["template"], **render(c["template"])} for c in cases["cases"]]
    # One case a line, so that changes can be read.
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases["cases"])
    variables = json.dumps(cases["variables"], ensure_ascii=False)
    path.write_text(f'{{"variables": {variables},\n"cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
