"""Compares this crate's tokenizers of GGUF files with llama.cpp's. See README.md."""
import argparse
import collections
import glob
import json
import os
import random
import re
import subprocess
import sys
import tempfile

import models
from gguf import GGUFValueType as T

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.join(HERE, "..", "..")
SEPARATOR = "\n__ggml_vocab_test__\n"


class Process:
    """Asks a line, gets a line."""

    def __init__(self, *command):
        quiet = None if os.environ.get("SHOW_LOGS") else subprocess.DEVNULL
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=quiet, text=True)

    def ask(self, question):
        """The answer; None once the process has ended."""
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        return json.loads(line) if line else None

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Probe(Process):
    def __call__(self, op, **arguments):
        answer = self.ask({"op": op, **arguments})
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["ok"]


# Cut into pieces that are put together at random. llama.cpp approximates some classes of Unicode in some of its
# expressions; `--plain` leaves out what shows that.
PLAIN = ["hello", " world", "I'm", " don't", "WE'LL", "I'D", " they've", "Hello World", "fooBar", "HTTPServer", " x",
         "0", "12", "345", "6789", "1234567", " 42", "3.14", "1,000", "$5", "(a)", "[b]", "{c}", "<d>", "a/b", "e\\f",
         "...", "!!", "?!", "--", "_", "#", "@", "&&", "==", "=>", "+", "~", "^", "|", "`", '"', "'", " '", "' ", ",",
         ", ", ". ", "://", "user@host.com", " ", "  ", "   ", "     ", "\n", "\n\n", " \n", "\n ", "\t", "\t\t", "\r\n",
         "\r", " \t", "中文", "漢字仮名", "日本語テスト", "한국어", "Привет", " мир", "αβγ", "שלום", "مرحبا", "😀", "👍🏽", "🇩🇪",
         "…", "—", "“", "”", "¿", "€", "£", "«", "»", "、", "。", "！", "？", "①", "²", "½", "٣٤٥", "\u200b", "\u00a0",
         "\u3000", "\u2003", "é", "naïve", "Straße", " café", "ÄÖÜ", "Ελλάδα", "\ufeff", "def f(x):\n    return x\n", "    "]
MARKED = ["e\u0301", "n\u0303a", "हिन्दी", "ภาษาไทย", "বাংলা", "தமிழ்", "Ǆ", "ǅa", "ʰa", "ﬁ", "éÀa", "aÉ", "ſ", "'ſ", "K", "\u0300"]


def texts(seed, count, special, plain):
    generator = random.Random(seed)
    parts = PLAIN + ([] if plain else MARKED)
    for _ in range(count):
        length = generator.choice([1, 2, 3, 5, 8, 13, 30])
        chosen = generator.choices(parts, k=length)
        if special and generator.random() < 0.5:
            for _ in range(generator.choice([1, 1, 2, 4])):
                chosen.insert(generator.randrange(len(chosen) + 1), generator.choice(special))
        yield "".join(chosen)


def special_tokens(found):
    types = found.get("tokenizer.ggml.token_type", (0, 0, []))[2]
    special = [token for token, kind in zip(found["tokenizer.ggml.tokens"][2], types) if kind in (2, 3, 4)]
    return [token for token in special if token and "\0" not in token][:400]


def decodes(probe, ids, text, totals):
    """Whether the ids decode to the text at once, and piece by piece to what they decode to at once."""
    whole = probe("decode", ids=ids, skip=False)
    totals["decoded to the text"] += whole == text
    totals["piece by piece as at once"] += "".join(probe("pieces", ids=ids, skip=False)) == whole


def vectors(probe, folder, only):
    everything = collections.Counter()
    for path in sorted(glob.glob(os.path.join(folder, "ggml-vocab-*.gguf"))):
        name = os.path.basename(path)[len("ggml-vocab-"):-len(".gguf")]
        if only and not re.search(only, name):
            continue
        try:
            probe("load", path=path)
        except ValueError as error:
            print(f"{name:16} refused: {error}")
            everything["refused"] += 1
            continue
        everything["accepted"] += 1
        if not os.path.exists(path + ".inp"):
            print(f"{name:16} accepted; has no vectors")
            continue
        with open(path + ".inp", encoding="utf-8", newline="") as file:
            inputs = file.read().split(SEPARATOR)
        with open(path + ".out", encoding="utf-8") as file:
            outputs = [[int(number) for number in line.split()] for line in file.read().split("\n")]
        if inputs[-1] == "":
            inputs.pop()
        totals = collections.Counter()
        for text, wanted in zip(inputs, outputs):
            totals["vectors"] += 1
            found = probe("encode", text=text, special=False)
            totals["exact"] += found == wanted
            if found != wanted:
                print(f"  {name}: {text!r}\n    wanted {wanted}\n    found  {found}")
            decodes(probe, wanted, text, totals)
        print(f"{name:16}", dict(totals))
        everything += totals
    print("total           ", dict(everything))
    return everything["exact"] == everything["vectors"]


def against_llama(probe, name, found, seed, count, plain, show):
    """Random texts through both; the number that differ, or None where both refuse."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.gguf")
        models.write(path, *models.with_weights(found))
        refused = None
        try:
            probe("load", path=path)
        except ValueError as error:
            refused = str(error)
        reference = Process(sys.executable, os.path.join(HERE, "reference.py"), path)
        totals = collections.Counter()
        for text in texts(seed, count, special_tokens(found), plain):
            wanted = reference.ask(text)
            if wanted is None:
                print(f"{name:26} llama.cpp refuses; here: {refused or 'accepted'}")
                return None
            if refused:
                print(f"{name:26} only refused here: {refused}")
                reference.close()
                return count
            totals["texts"] += 1
            ids = probe("encode", text=text, special=True)
            totals["exact"] += ids == wanted
            if ids != wanted and show:
                show -= 1
                print(f"  {name}: {text!r}\n    llama.cpp {wanted}\n    here      {ids}")
            whole = probe("decode", ids=ids, skip=False)
            totals["piece by piece as at once"] += "".join(probe("pieces", ids=ids, skip=False)) == whole
        reference.close()
        print(f"{name:26}", dict(totals), flush=True)
        return totals["texts"] - totals["exact"]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["vectors", "random", "pre"])
    parser.add_argument("folder", help="llama.cpp's `models`")
    parser.add_argument("--probe", default=os.path.join(ROOT, "target", "debug", "examples", "tokenizer_probe"))
    parser.add_argument("--only", help="a regular expression for names of vocabularies or pre-tokenizers")
    parser.add_argument("--base", default="qwen2", help="the vocabulary that `pre` gives other names to")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=500, help="random texts each")
    parser.add_argument("--plain", action="store_true", help="no text on which llama.cpp approximates classes")
    parser.add_argument("--show", type=int, default=0, help="differences to print each")
    arguments = parser.parse_args()
    probe = Probe(arguments.probe)
    if arguments.what == "vectors":
        sys.exit(not vectors(probe, arguments.folder, arguments.only))
    vocabulary = lambda name: os.path.join(arguments.folder, f"ggml-vocab-{name}.gguf")
    wrong = tried = 0
    if arguments.what == "random":
        paths = sorted(glob.glob(vocabulary("*")))
        cases = [(os.path.basename(path)[11:-5], lambda path=path: models.metadata(path)) for path in paths]
    else:
        with open(os.path.join(ROOT, "src/executor/tokenizer/gguf/pre.rs"), encoding="utf-8") as file:
            rows = re.findall(r"names: &\[([^\]]+)\]", file.read())
        names = sorted(set(re.findall(r'"([^"]+)"', " ".join(rows))))
        base = models.metadata(vocabulary(arguments.base))
        cases = [(name, lambda name=name: {**base, "tokenizer.ggml.pre": (T.STRING, None, name)}) for name in names]
    for name, found in cases:
        if arguments.only and not re.search(arguments.only, name):
            continue
        differ = against_llama(
            probe, name, found(), arguments.seed, arguments.count, arguments.plain, arguments.show
        )
        if differ is not None:
            tried += 1
            wrong += differ
    print(f"{tried} compared, {tried * arguments.count} texts, {wrong} differ")


main()
