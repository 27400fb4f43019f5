"""Writes tests/fixtures/vocabularies.json: small vocabularies and what llama.cpp makes of them. See README.md."""
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
K = "tokenizer.ggml."

# A text for each habit in which pre-tokenizers differ. Each piece of a text is made a token below, so they are short.
SPLIT_TEXTS = [
    "I'LL don't  be x12345,67\r\n\n (a_b)!\t\n  end",
    "fooBar ÉTÉ  été 中文かな한국 ²③ …“q” 😀\u00a0ok",
    "a\n b  \n\n  c/d\n'S IMGIMGAZ <sentinel:3> 1234567",
    "    x=y+1; $a.b|c `d` ~e…f，g。h\u200bi",
]


def llama(found):
    """Tokens of texts, and the end tokens; None if llama.cpp refuses the vocabulary."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.gguf")
        models.write(path, *models.with_weights(found))
        texts = found["texts"]
        run = subprocess.run([sys.executable, os.path.join(HERE, "reference.py"), path], capture_output=True, text=True, errors="replace",
                             input="".join(json.dumps(text) + "\n" for text in texts))
        ends = sorted({int(number) for number in re.findall(r"EOG token += (\d+)", run.stderr)})
        ids = [json.loads(line) for line in run.stdout.splitlines()]
        return None if len(ids) != len(texts) else (ids, ends)


def alphabet():
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def strings(values):
    return T.ARRAY, T.STRING, values


def splits(name, text, spelled_out):
    """The words that llama.cpp cuts a text into: tokens of a vocabulary in which every part of the text is one."""
    letters = alphabet()
    spelled = list(text.replace(" ", "▁")) if spelled_out else [letters[byte] for byte in text.encode()]
    tokens, merges = set(spelled), []
    for length in range(2, len(spelled) + 1):
        for start in range(len(spelled) - length + 1):
            whole = "".join(spelled[start:start + length])
            if whole in tokens:
                continue
            tokens.add(whole)
            merges += [f"{whole[:cut]} {whole[cut:]}" for cut in range(1, length)]
    tokens = sorted(tokens)
    found = {K + "model": (T.STRING, None, "gpt2"), K + "pre": (T.STRING, None, name), K + "tokens": strings(tokens),
             K + "merges": strings(merges), K + "add_bos_token": (T.BOOL, None, False), "texts": [text]}
    ids, _ = llama(found)
    bytes_of = {letter: byte for byte, letter in enumerate(letters)}
    words = [tokens[id] for id in ids[0]]
    if spelled_out:
        words = [word.replace("▁", " ") for word in words][-len(words) + (name != "sarvam-moe"):]
    else:
        words = [bytes(bytes_of[letter] for letter in word).decode(errors="replace") for word in words]
    assert "".join(words) == text, (name, words)
    return words


def demo():
    return models.metadata(os.path.join(ROOT, "models", "demo", "demo-q8_0.gguf"))


def sentencepiece():
    """Tokens with scores, bytes, and special ones, as Llama 2 has them."""
    words = ["▁", "t", "h", "e", "▁t", "he", "▁the", "▁th", "a", "n", "d", "▁a", "nd", "▁and", "an", "▁an", "l", "o",
             "lo", "el", "▁he", "ll", "▁hello", "hell", "▁hell", "▁w", "w", "or", "r", "ld", "▁wor", "▁world", "é", "s", "x",
             "▁▁", "▁▁▁▁", "aa", "aaa", "aaaa", "aaaaaa", ".", ",", "\n\n"]
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + words
    types = [2, 3, 3] + [6] * 256 + [1] * len(words)
    generator = random.Random(3)
    # Some scores are equal: the leftmost pair counts then.
    scores = [0.0] * 259 + [-float(generator.randrange(12)) for _ in words]
    extra = ["<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>", "<tag>", "  x"]
    return {K + "model": (T.STRING, None, "llama"), K + "tokens": strings(tokens + extra),
            K + "scores": (T.ARRAY, T.FLOAT32, scores + [0.0] * 6),
            K + "token_type": (T.ARRAY, T.INT32, types + [3, 3, 3, 3, 4, 4])}


SPM_TEXTS = ["", " ", "the hello world", "  the  and\n\naaaaaaaaaaa", "é中x <s>the</s> hell<tag> the<tag>the", "<unk>hello",
             "<|user|>\nthe hello<|end|>\n<|assistant|>\n  the <|endoftext|> \n the<s> a</s> \t x", "a  xx\t<|end|> \u00a0 an",
             "▁the worldl", "the\r\nand"]


def unigram():
    words = ["▁", "t", "h", "e", "▁the", "the", "he", "▁a", "a", "n", "d", "and", "▁and", "ll", "▁hello", "o", "l", "▁hell", "xx"]
    scores = [-3.1, -5, -5.5, -5, -2.2, -4, -4.5, -3.3, -4.1, -5, -5, -4.4, -3, -5, -3.7, -5, -5, -3.9, -6.5]
    tokens = ["<pad>", "</s>", "<unk>"] + words + ["<tag>"]
    return {K + "model": (T.STRING, None, "t5"), K + "tokens": strings(tokens),
            K + "scores": (T.ARRAY, T.FLOAT32, [0.0] * 3 + scores + [0.0]),
            K + "token_type": (T.ARRAY, T.INT32, [3, 3, 2] + [1] * len(words) + [4]),
            K + "add_space_prefix": (T.BOOL, None, True)}


def rwkv():
    tokens = ["<s>"] + ["\\x%02x" % byte for byte in range(256)] + ["the", " the", "\\n\\n", "and", "\\xe4\\xb8", "th", "\\\\x", "\\t\\t"]
    return {K + "model": (T.STRING, None, "rwkv"), K + "tokens": strings(tokens),
            K + "token_type": (T.ARRAY, T.INT32, [3] + [1] * (len(tokens) - 1))}


def plamo():
    words = ["the", " the", "t", "h", "e", " ", "and", "a", "n", "d", "中", "中文", "hello", "hel", "lo", "o", "he"]
    scores = [-3.1, -2.5, -6, -6, -6, -4, -3, -5, -6, -6, -7, -5, -4, -5.5, -5, -6, -6.3]
    tokens = ["<|plamo:unk|>", "<|plamo:bos|>", "<|plamo:eos|>", "<|plamo:pad|>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    return {K + "model": (T.STRING, None, "plamo2"), K + "tokens": strings(tokens + words + ["</s>"]),
            K + "scores": (T.ARRAY, T.FLOAT32, [0.0] * 260 + scores + [-9.0]),
            K + "token_type": (T.ARRAY, T.INT32, [2, 3, 3, 3] + [6] * 256 + [1] * (len(words) + 1))}


def gemma():
    words = ["▁", "t", "h", "e", "▁t", "he", "▁the", "a", "▁a", "\n", "\n\n", "\n\n\n", "x", "y"]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>"] + [f"<0x{byte:02X}>" for byte in range(256)] + words + ["</s>", "<turn|>", "<|tool_response>"]
    return {K + "model": (T.STRING, None, "gemma4"), K + "tokens": strings(tokens),
            K + "merges": strings(["▁ t", "h e", "▁t he", "▁ a"]), K + "add_bos_token": (T.BOOL, None, False),
            K + "token_type": (T.ARRAY, T.INT32, [3, 3, 3, 2] + [6] * 256 + [1] * len(words) + [1, 3, 3]),
            K + "bos_token_id": (T.UINT32, None, 2), K + "eos_token_id": (T.UINT32, None, 1)}


PLAIN_TEXTS = ["the hello  and\n\nthe", "中文 é 𝄞x", " the\t\tandthe </s>a", "hello<tag> the", "the\n\n\nx\ny"]
DEMO_TEXTS = ["Once upon a time <|eot_id|> a <|im_end|>b", "it's</s> <|end|> 12"]


def renamed(found, names, kind=1):
    """Gives the last tokens other texts, of the type of ordinary text unless said otherwise."""
    tokens, types = found[K + "tokens"][2], found[K + "token_type"][2]
    for place, name in enumerate(names):
        tokens[700 + place], types[700 + place] = name, kind
    return found


def key(found, **changes):
    for name, value in changes.items():
        kind = T.BOOL if isinstance(value, bool) else T.STRING if isinstance(value, str) else T.INT32 if value < 0 else T.UINT32
        where = name.replace("general_", "general.") if name.startswith("general_") else K + name
        found[where] = (kind, None, value)
    return found


def without(found, *names):
    for name in names:
        found.pop(K + name)
    return found


def cases():
    none = 2**32 - 1
    yield "spm", sentencepiece(), SPM_TEXTS
    yield "spm by name phi-3", key(sentencepiece(), general_name="Phi-3-mini"), SPM_TEXTS
    yield "spm without prefix", key(sentencepiece(), add_space_prefix=False), SPM_TEXTS
    yield "spm with eos", key(sentencepiece(), add_eos_token=True, add_bos_token=False), SPM_TEXTS
    yield "spm ids that are none", key(sentencepiece(), padding_token_id=none, unknown_token_id=none, bos_token_id=none), SPM_TEXTS
    yield "spm without types", without(sentencepiece(), "token_type"), SPM_TEXTS
    yield "spm without scores", without(sentencepiece(), "scores"), SPM_TEXTS
    yield "t5", unigram(), PLAIN_TEXTS
    yield "t5 with one space", key(unigram(), remove_extra_whitespaces=True), PLAIN_TEXTS
    yield "rwkv", rwkv(), PLAIN_TEXTS
    yield "plamo2", plamo(), PLAIN_TEXTS
    yield "gemma4", gemma(), PLAIN_TEXTS
    yield "end tokens of normal type", renamed(demo(), ["<|eot_id|>", "<|im_end|>", "</s>", "<end_of_turn>", "<turn|>"]), DEMO_TEXTS
    yield "an ordinary </s>", renamed(demo(), ["<|tool_response>", "</s>", "<eos>"]), DEMO_TEXTS
    yield "harmony", renamed(demo(), ["<|return|>", "<|call|>", "<|start|>", "<|message|>"], 3), DEMO_TEXTS
    yield "solar", renamed(demo(), ["<|flush|>", "<|calls|>"], 3), DEMO_TEXTS
    yield "only call", renamed(demo(), ["<|call|>"], 3), DEMO_TEXTS
    yield "code completion", renamed(demo(), ["<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|fim_prefix|>"]), DEMO_TEXTS
    yield "end keys", key(demo(), eos_token_id=766, eot_token_id=13, eom_token_id=15, fim_pad_token_id=20), DEMO_TEXTS
    yield "ids that are none", key(demo(), eos_token_id=none, bos_token_id=none, eot_token_id=5000, add_bos_token=False), DEMO_TEXTS
    yield "no ids", without(demo(), "eos_token_id", "bos_token_id"), DEMO_TEXTS
    yield "no pre", without(demo(), "pre"), DEMO_TEXTS + SPLIT_TEXTS
    yield "default pre", key(demo(), pre="default"), DEMO_TEXTS + SPLIT_TEXTS
    yield "no types", without(demo(), "token_type"), DEMO_TEXTS
    yield "bos and eos", key(demo(), add_bos_token=True, add_eos_token=True), DEMO_TEXTS
    yield "glm4", without(key(demo(), pre="glm4"), "bos_token_id", "add_bos_token"), DEMO_TEXTS


def main():
    with open(os.path.join(ROOT, "src/executor/tokenizer/gguf/pre.rs"), encoding="utf-8") as file:
        rows = re.findall(r"names: &\[([^\]]+)\].*", file.read())
    cut = {}
    for row in rows:
        name = re.search(r'"([^"]+)"', row)[1]
        spelled_out = name in ("gemma4", "sarvam-moe")
        cut[name] = [splits(name, text, spelled_out) for text in SPLIT_TEXTS]
        print(name, flush=True)
    made = []
    whole = demo()
    for name, found, texts in cases():
        ids, ends = llama({**found, "texts": texts})
        # What the demo model's file has in the same way is not repeated.
        differs = {key: value for key, value in found.items() if whole.get(key) != value}
        on_demo = found[K + "model"][2] == "gpt2"
        removed = [key for key in whole if key not in found] if on_demo else []
        metadata = {key: [T(kind).name if kind != T.ARRAY else "ARRAY of " + T(element).name, value]
                    for key, (kind, element, value) in (differs if on_demo else found).items()}
        if on_demo and K + "tokens" in metadata:
            changed = {place: text for place, text in enumerate(found[K + "tokens"][2]) if text != whole[K + "tokens"][2][place]}
            types = {place: found[K + "token_type"][2][place] for place in changed}
            metadata.pop(K + "tokens"), metadata.pop(K + "token_type", None)
            tokens = [[place, text, types[place]] for place, text in changed.items()]
        else:
            tokens = []
        made.append({"name": name, "demo": on_demo, "metadata": metadata, "removed": removed, "tokens": tokens,
                     "texts": texts, "ids": ids, "ends": ends})
        print(name, ends, flush=True)
    with open(os.path.join(ROOT, "tests", "fixtures", "vocabularies.json"), "w", encoding="utf-8") as file:
        json.dump({"split_texts": SPLIT_TEXTS, "splits": cut, "cases": made}, file, ensure_ascii=False, separators=(",", ":"))
        file.write("\n")


main()
