"""Reads and writes GGUF files' metadata, and makes a vocabulary a model: llama.cpp tokenises only for models."""
import struct

import numpy as np
from gguf import GGUFReader
from gguf import GGUFValueType as T

FORMATS = {T.UINT8: "B", T.INT8: "b", T.UINT16: "H", T.INT16: "h", T.UINT32: "I", T.INT32: "i", T.FLOAT32: "f",
           T.BOOL: "?", T.UINT64: "Q", T.INT64: "q", T.FLOAT64: "d"}


def metadata(path):
    """Key to (type, element type or None, value)."""
    found = {}
    for key, field in GGUFReader(path).fields.items():
        if key.startswith("GGUF."):
            continue
        kind = field.types[0]
        if kind == T.ARRAY:
            element = field.types[1] if len(field.types) > 1 else T.STRING
            found[key] = (T.ARRAY, element, field.contents())
        else:
            found[key] = (kind, None, field.contents())
    return found


def _string(text):
    encoded = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(encoded)) + encoded


def _value(kind, element, value):
    if kind == T.STRING:
        return _string(value)
    if kind == T.ARRAY:
        return struct.pack("<IQ", int(element), len(value)) + b"".join(_value(element, None, item) for item in value)
    return struct.pack("<" + FORMATS[kind], value)


def write(path, found, tensors=()):
    """`tensors`: (name, shape, GGML type, bytes)."""
    with open(path, "wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(found)))
        for key, (kind, element, value) in found.items():
            file.write(_string(key) + struct.pack("<I", int(kind)) + _value(kind, element, value))
        offset = 0
        for name, shape, kind, data in tensors:
            file.write(_string(name) + struct.pack("<I", len(shape)))
            file.write(b"".join(struct.pack("<Q", size) for size in shape) + struct.pack("<IQ", kind, offset))
            offset += -(-len(data) // 32) * 32
        file.write(b"\0" * (-file.tell() % 32))
        for *_, data in tensors:
            file.write(data + b"\0" * (-len(data) % 32))


def with_weights(found, hidden=16):
    """The vocabulary in a random llama of one layer."""
    count = len(found["tokenizer.ggml.tokens"][2])
    random = np.random.default_rng(1)
    sizes = {"context_length": 512, "embedding_length": hidden, "block_count": 1, "feed_forward_length": 32,
             "attention.head_count": 2, "attention.head_count_kv": 2, "vocab_size": count}
    model = {"general.architecture": (T.STRING, None, "llama")}
    model.update({f"llama.{key}": (T.UINT32, None, size) for key, size in sizes.items()})
    model["llama.attention.layer_norm_rms_epsilon"] = (T.FLOAT32, None, 1e-5)
    model.update({key: value for key, value in found.items() if key.startswith("tokenizer.") or key == "general.name"})

    def tensor(name, *shape):
        values = random.standard_normal(shape) if len(shape) == 2 else np.ones(shape)
        return name, list(reversed(shape)), 1 if len(shape) == 2 else 0, \
            (values * 0.05 if len(shape) == 2 else values).astype(np.float16 if len(shape) == 2 else np.float32).tobytes()

    tensors = [tensor("token_embd.weight", count, hidden), tensor("output_norm.weight", hidden)]
    shapes = {"attn_q": (hidden, hidden), "attn_k": (hidden, hidden), "attn_v": (hidden, hidden),
              "attn_output": (hidden, hidden), "ffn_gate": (32, hidden), "ffn_up": (32, hidden),
              "ffn_down": (hidden, 32), "attn_norm": (hidden,), "ffn_norm": (hidden,)}
    tensors += [tensor(f"blk.0.{name}.weight", *shape) for name, shape in shapes.items()]
    return model, tensors
