"""Trains the demo story model and exports it (Hugging Face folder and GGUF).

    python train.py tokenizer            # byte-level BPE -> OUT/tokenizer.json
    python train.py bench                # tokens per second, f32 against bf16
    python train.py train                # -> WORK/ckpt-*.pt, loss.csv
    python train.py sample               # a few samples of the newest checkpoint
    python train.py export               # safetensors F16, GGUF Q8_0 and Q4_0
    python train.py verify               # reads the exported files back, prints samples

The training text is never stored: it is generated from --seed.
"""

import argparse
import csv
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import stories

HERE = Path(__file__).resolve().parent
BOS, EOS = "<|begin|>", "<|end|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] != 'system' %}"
    "{% if not loop.first and messages[loop.index0 - 1]['role'] != 'system' %}{{ ' ' }}{% endif %}"
    "{{ m['content'] | trim }}{% endif %}{% endfor %}"
)


def options():
    ap = argparse.ArgumentParser()
    ap.add_argument("command", choices=["tokenizer", "bench", "train", "sample", "export", "verify"])
    ap.add_argument("--out", type=Path, default=HERE.parent.parent / "models" / "demo")
    ap.add_argument("--work", type=Path, default=HERE / "work", help="checkpoints and token cache")
    ap.add_argument("--loss-csv", type=Path, default=HERE / "loss.csv")
    ap.add_argument("--checkpoint", type=Path, help="for sample/export; default: the newest")
    ap.add_argument("--seed", type=int, default=20240)
    ap.add_argument("--vocab", type=int, default=768)
    ap.add_argument("--layers", type=int, default=8)
    ap.add_argument("--hidden", type=int, default=256)
    ap.add_argument("--ffn", type=int, default=256)
    ap.add_argument("--heads", type=int, default=8)
    ap.add_argument("--kv-heads", type=int, default=2)
    ap.add_argument("--context", type=int, default=512)
    ap.add_argument("--rope-theta", type=float, default=10000.0)
    ap.add_argument("--eps", type=float, default=1e-5)
    ap.add_argument("--stories", type=int, default=60000, help="stories in the training set")
    ap.add_argument("--steps", type=int, default=3000)
    ap.add_argument("--minutes", type=float, default=1e9,
                    help="time limit: the schedule then follows the share of the time used, if that is the larger one")
    ap.add_argument("--resume", type=Path, help="checkpoint to go on from (weights only; its name tells the step)")
    ap.add_argument("--batch-tokens", type=int, default=4096, help="tokens in a batch, padding included")
    ap.add_argument("--lr", type=float, default=2e-3)
    ap.add_argument("--warmup", type=int, default=100)
    ap.add_argument("--weight-decay", type=float, default=0.05)
    ap.add_argument("--save-every", type=int, default=300)
    ap.add_argument("--eval-every", type=int, default=100)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--bf16", action="store_true", help="bfloat16 autocast in the forward pass")
    ap.add_argument("--compile", action="store_true")
    return ap.parse_args()


# ---------------------------------------------------------------- model (training)

class Norm(nn.Module):
    def __init__(self, n, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Block(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.h, self.kv, self.d = a.heads, a.kv_heads, a.hidden // a.heads
        self.input_layernorm = Norm(a.hidden, a.eps)
        self.post_attention_layernorm = Norm(a.hidden, a.eps)
        self.qkv = nn.Linear(a.hidden, (self.h + 2 * self.kv) * self.d, bias=False)
        self.o = nn.Linear(a.hidden, a.hidden, bias=False)
        self.gate_up = nn.Linear(a.hidden, 2 * a.ffn, bias=False)
        self.down = nn.Linear(a.ffn, a.hidden, bias=False)

    def forward(self, x, cos, sin, mask):
        b, t, _ = x.shape
        y = self.qkv(self.input_layernorm(x)).view(b, t, self.h + 2 * self.kv, self.d).transpose(1, 2)
        qk, v = y[:, : self.h + self.kv], y[:, self.h + self.kv:]
        x1, x2 = qk.chunk(2, -1)
        qk = qk * cos + torch.cat((-x2, x1), -1) * sin
        q, k = qk[:, : self.h], qk[:, self.h:]
        # plain attention, the query heads of a group folded into the rows: on a CPU, at these
        # sizes, twice as fast as scaled_dot_product_attention's backward pass
        q = (q * self.d ** -0.5).reshape(b, self.kv, -1, self.d)
        s = (q @ k.transpose(-1, -2)).view(b, self.h, t, t) + mask
        y = (s.softmax(-1).view(b, self.kv, -1, t) @ v).view(b, self.h, t, self.d)
        x = x + self.o(y.transpose(1, 2).reshape(b, t, -1))
        g, u = self.gate_up(self.post_attention_layernorm(x)).chunk(2, -1)
        return x + self.down(F.silu(g) * u)


class Model(nn.Module):
    """The same network as transformers' LlamaForCausalLM, with fused projections."""

    def __init__(self, a):
        super().__init__()
        self.embed = nn.Embedding(a.vocab, a.hidden)
        self.blocks = nn.ModuleList(Block(a) for _ in range(a.layers))
        self.norm = Norm(a.hidden, a.eps)
        d = a.hidden // a.heads
        inv = 1.0 / (a.rope_theta ** (torch.arange(0, d, 2).float() / d))
        ang = torch.outer(torch.arange(a.context).float(), inv).repeat(1, 2)
        self.register_buffer("cos", ang.cos(), persistent=False)
        self.register_buffer("sin", ang.sin(), persistent=False)
        for n, p in self.named_parameters():
            if p.dim() == 2:
                std = 0.04 if "embed" in n else 1 / math.sqrt(p.shape[1])
                if n.endswith(("o.weight", "down.weight")):
                    std /= math.sqrt(2 * a.layers)
                nn.init.normal_(p, std=std)

    def forward(self, ids):
        x = self.embed(ids)
        t = ids.shape[1]
        if torch.is_autocast_enabled("cpu"):
            x = x.bfloat16()
        cos, sin = self.cos[:t].to(x.dtype), self.sin[:t].to(x.dtype)
        mask = torch.full((t, t), float("-inf"), dtype=x.dtype).triu(1)
        for b in self.blocks:
            x = b(x, cos, sin, mask)
        return F.linear(self.norm(x), self.embed.weight)


def hf_state(model, a):
    """Parameter names and shapes of transformers' LlamaForCausalLM (tied head left out)."""
    d = a.hidden // a.heads
    out = {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": model.norm.weight}
    for i, b in enumerate(model.blocks):
        p = f"model.layers.{i}."
        q, k, v = b.qkv.weight.split([a.heads * d, a.kv_heads * d, a.kv_heads * d])
        g, u = b.gate_up.weight.chunk(2)
        out.update({
            p + "input_layernorm.weight": b.input_layernorm.weight,
            p + "post_attention_layernorm.weight": b.post_attention_layernorm.weight,
            p + "self_attn.q_proj.weight": q, p + "self_attn.k_proj.weight": k, p + "self_attn.v_proj.weight": v,
            p + "self_attn.o_proj.weight": b.o.weight,
            p + "mlp.gate_proj.weight": g, p + "mlp.up_proj.weight": u, p + "mlp.down_proj.weight": b.down.weight,
        })
    return {k: v.detach().float().clone().contiguous() for k, v in out.items()}


# ---------------------------------------------------------------- tokenizer and data

def make_tokenizer(a):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=a.vocab, special_tokens=[BOS, EOS], show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tok.train_from_iterator(stories.stories(a.seed + 1, 8000), trainer)
    tok.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A $B",
                                                       special_tokens=[(BOS, tok.token_to_id(BOS))])
    a.out.mkdir(parents=True, exist_ok=True)
    tok.save(str(a.out / "tokenizer.json"))
    return tok


def load_tokenizer(a):
    from tokenizers import Tokenizer
    return Tokenizer.from_file(str(a.out / "tokenizer.json"))


def encode(a, seed, count):
    """List of int16 arrays: BOS, story, EOS; each fits the context."""
    tok = load_tokenizer(a)
    eos = tok.token_to_id(EOS)
    out, chunk = [], []
    for i, s in enumerate(stories.stories(seed, count)):
        chunk.append(s)
        if len(chunk) == 2000 or i == count - 1:
            out += [np.array(e.ids + [eos], dtype=np.int16) for e in tok.encode_batch(chunk)]
            chunk = []
    return [x for x in out if len(x) <= a.context]


BUCKET = 32


def batches(data, a, seed):
    """Endless batches of whole stories, one to a row, of like length; padded at the end.

    Stories are drawn without replacement, epoch by epoch."""
    r = random.Random(seed)
    buckets = {}
    while True:
        order = list(range(len(data)))
        r.shuffle(order)
        for i in order:
            n = max(192, -(-len(data[i]) // BUCKET) * BUCKET)
            rows = buckets.setdefault(n, [])
            rows.append(data[i])
            if len(rows) == max(1, a.batch_tokens // n):
                x = np.zeros((len(rows), n), dtype=np.int64)
                y = np.full((len(rows), n), -100, dtype=np.int64)
                for j, s in enumerate(rows):
                    x[j, : len(s)] = s
                    y[j, : len(s) - 1] = s[1:]
                rows.clear()
                yield torch.from_numpy(x), torch.from_numpy(y)


def loss_of(model, x, y, a):
    with torch.autocast("cpu", torch.bfloat16, enabled=a.bf16):
        logits = model(x)
    return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), y.view(-1), ignore_index=-100)


# ---------------------------------------------------------------- commands

def bench(a):
    make = lambda: Model(a)
    for bf in (False, True):
        a.bf16 = bf
        torch.manual_seed(0)
        m = make()
        x = torch.randint(0, a.vocab, (a.batch_tokens // 224, 224))
        opt = torch.optim.AdamW(m.parameters(), lr=1e-3, fused=True)
        n = 0
        for i in range(6):
            if i == 2:
                t = time.time()
            loss_of(m, x, x, a).backward()
            opt.step()
            opt.zero_grad()
            n += x.numel() if i >= 2 else 0
        print("bf16" if bf else "f32", round(n / (time.time() - t)), "tokens/s", flush=True)
    print("parameters", sum(p.numel() for p in m.parameters()))


def train(a):
    torch.manual_seed(a.seed)
    a.work.mkdir(parents=True, exist_ok=True)
    t0 = time.time()
    data = encode(a, a.seed + 2, a.stories)
    val = encode(a, a.seed + 3, 400)
    n = np.array([len(x) for x in data])
    print(f"{len(data)} stories, {n.sum()} tokens, lengths {n.min()} to {n.max()}, mean {n.mean():.0f}; "
          f"made in {time.time() - t0:.0f} s", flush=True)
    gen = batches(val, a, 0)
    vb = [next(gen) for _ in range(8)]
    model = Model(a)
    torch._dynamo.config.recompile_limit = 32       # one graph for each length of batch
    net = torch.compile(model, dynamic=False) if a.compile else model
    decay = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    opt = torch.optim.AdamW([{"params": decay, "weight_decay": a.weight_decay}, {"params": rest, "weight_decay": 0.0}],
                            lr=a.lr, betas=(0.9, 0.98), fused=True)
    gen = batches(data, a, a.seed + 4)
    first = 0
    if a.resume:
        first = int(a.resume.stem.split("-")[1])
        model.load_state_dict(torch.load(a.resume, weights_only=True))
        rows = [r for r in csv.reader(open(a.loss_csv)) if not r[0].isdigit() or int(r[0]) <= first]
        for _ in range(first):
            next(gen)
    t0, seen, run, frac = time.time(), 0, [], 0.0
    with open(a.loss_csv, "w", newline="") as f:
        log = csv.writer(f, lineterminator="\n")
        log.writerows(rows if a.resume else [["step", "train_loss", "val_loss"]])
        step = first
        while frac < 1:
            step += 1
            used = (time.time() - t0) / (60 * a.minutes)
            frac = min(1.0, max(step / a.steps, first / a.steps + (1 - first / a.steps) * used))
            lr = a.lr * min(1.0, (step - first) / a.warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * frac)))
            for g in opt.param_groups:
                g["lr"] = lr
            x, y = next(gen)
            loss = loss_of(net, x, y, a)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            opt.zero_grad(set_to_none=True)
            run.append(loss.item())
            seen += int((y >= 0).sum())
            if step % 20 == 0 or frac == 1:
                val_loss = ""
                if step % a.eval_every == 0 or frac == 1:
                    with torch.no_grad():
                        val_loss = round(sum(loss_of(model, x, y, a).item() for x, y in vb) / len(vb), 4)
                log.writerow([step, round(sum(run) / len(run), 4), val_loss])
                f.flush()
                el = time.time() - t0
                print(f"step {step} train {sum(run) / len(run):.4f} val {val_loss} lr {lr:.2e} tokens {seen} "
                      f"{seen / el:.0f} tok/s {el:.0f} s", flush=True)
                run = []
            if step % a.save_every == 0 or frac == 1:
                torch.save(model.state_dict(), a.work / f"ckpt-{step:05}.pt")


def newest(a):
    path = a.checkpoint or max(a.work.glob("ckpt-*.pt"))
    m = Model(a)
    m.load_state_dict(torch.load(path, weights_only=True))
    print("#", path.name)
    return m.eval()


@torch.no_grad()
def generate(forward, tok, prompt, temperature, seed, limit=400):
    """`forward(ids)` gives logits; returns (text, stopped by EOS, number of tokens)."""
    ids = tok.encode(prompt).ids
    g = torch.Generator().manual_seed(seed)
    n = len(ids)
    while len(ids) < limit:
        z = forward(torch.tensor([ids]))[0, -1].float()
        i = int(z.argmax()) if temperature == 0 else int(torch.multinomial((z / temperature).softmax(-1), 1, generator=g))
        if i == tok.token_to_id(EOS):
            return tok.decode(ids), True, len(ids) - n
        ids.append(i)
    return tok.decode(ids), False, len(ids) - n


PROMPTS = [("Once upon a time", 0.0, 0)] + [("Once upon a time", 0.8, s) for s in range(1, 6)]


def show(forward, tok, prompts):
    for p, t, s in prompts:
        text, end, n = generate(forward, tok, p, t, s)
        print(f"[temperature {t}, seed {s}, {n} tokens, {'stopped by itself' if end else 'NOT STOPPED'}]\n{text}\n", flush=True)


def sample(a):
    show(newest(a), load_tokenizer(a), PROMPTS[:3] + [("One rainy day, a little dog", 0.8, 7)])


def config(a, tok):
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": a.vocab, "hidden_size": a.hidden,
        "intermediate_size": a.ffn, "num_hidden_layers": a.layers, "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads, "head_dim": a.hidden // a.heads, "hidden_act": "silu",
        "max_position_embeddings": a.context, "initializer_range": 0.02, "rms_norm_eps": a.eps,
        "rope_theta": a.rope_theta, "rope_scaling": None, "attention_bias": False, "mlp_bias": False,
        "attention_dropout": 0.0, "tie_word_embeddings": True, "use_cache": True, "torch_dtype": "float16",
        "bos_token_id": tok.token_to_id(BOS), "eos_token_id": tok.token_to_id(EOS),
    }


def permute(w, heads):
    """Order of the rows of q and k in GGUF files of the llama architecture."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def unpermute(w, heads):
    return w.reshape(heads, w.shape[0] // heads // 2, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


GGUF_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    i, rest = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    return f"blk.{i}.{GGUF_NAMES[rest]}.weight"


def write_gguf(a, state, tok, path, kind):
    import gguf
    q8, q4 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0
    w = gguf.GGUFWriter(str(path), "llama")
    w.add_name("Demo stories")
    w.add_description("A small language model that writes short stories in simple English")
    w.add_license("MIT OR Apache-2.0")
    w.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if kind == q8 else gguf.LlamaFileType.MOSTLY_Q4_0)
    w.add_quantization_version(gguf.GGML_QUANT_VERSION)
    w.add_vocab_size(a.vocab)
    w.add_context_length(a.context)
    w.add_embedding_length(a.hidden)
    w.add_block_count(a.layers)
    w.add_feed_forward_length(a.ffn)
    w.add_head_count(a.heads)
    w.add_head_count_kv(a.kv_heads)
    w.add_key_length(a.hidden // a.heads)
    w.add_value_length(a.hidden // a.heads)
    w.add_rope_dimension_count(a.hidden // a.heads)
    w.add_rope_freq_base(a.rope_theta)
    w.add_layer_norm_rms_eps(a.eps)
    spec = json.loads((a.out / "tokenizer.json").read_text())
    vocab = sorted(spec["model"]["vocab"].items(), key=lambda kv: kv[1])
    assert [i for _, i in vocab] == list(range(a.vocab))
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list([t for t, _ in vocab])
    w.add_token_types([gguf.TokenType.CONTROL if t in (BOS, EOS) else gguf.TokenType.NORMAL for t, _ in vocab])
    w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]])
    w.add_bos_token_id(tok.token_to_id(BOS))
    w.add_eos_token_id(tok.token_to_id(EOS))
    w.add_add_bos_token(True)
    w.add_add_eos_token(False)
    w.add_chat_template(CHAT_TEMPLATE)
    for name, t in state.items():
        t = t.float().numpy()
        if name.endswith("q_proj.weight"):
            t = permute(t, a.heads)
        elif name.endswith("k_proj.weight"):
            t = permute(t, a.kv_heads)
        if t.ndim == 1:
            w.add_tensor(gguf_name(name), np.ascontiguousarray(t, dtype=np.float32))
        else:
            k = q8 if "embed" in name else kind
            w.add_tensor(gguf_name(name), gguf.quants.quantize(np.ascontiguousarray(t), k), raw_dtype=k)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def export(a):
    import gguf
    from safetensors.torch import save_file
    tok = load_tokenizer(a)
    state = {k: v.half() for k, v in hf_state(newest(a), a).items()}
    save_file(state, str(a.out / "model.safetensors"), metadata={"format": "pt"})
    dump = lambda name, v: (a.out / name).write_text(json.dumps(v, indent=2) + "\n")
    dump("config.json", config(a, tok))
    dump("generation_config.json", {"bos_token_id": tok.token_to_id(BOS), "eos_token_id": tok.token_to_id(EOS),
                                    "do_sample": True, "temperature": 0.8, "max_length": a.context})
    dump("tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "pad_token": EOS,
        "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False,
        "model_max_length": a.context, "chat_template": CHAT_TEMPLATE,
    })
    write_gguf(a, state, tok, a.out / "demo-q8_0.gguf", gguf.GGMLQuantizationType.Q8_0)
    write_gguf(a, state, tok, a.out / "demo-q4_0.gguf", gguf.GGMLQuantizationType.Q4_0)
    total = 0
    for f in sorted(a.out.iterdir()):
        total += f.stat().st_size
        print(f"{f.stat().st_size:9} {f.name}")
    print(f"{total:9} in all")


def verify(a):
    """Everything is read back from the exported files and run by transformers."""
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tok = load_tokenizer(a)
    hf = AutoTokenizer.from_pretrained(a.out)
    text = next(stories.stories(77, 1))
    assert hf(text).input_ids == tok.encode(text).ids and hf.decode(tok.encode(text).ids, skip_special_tokens=True) == text
    chat = hf.apply_chat_template([{"role": "user", "content": "Once upon a time"}], add_generation_prompt=True, tokenize=False)
    print("chat:", chat)
    assert chat == BOS + "Once upon a time"
    model = AutoModelForCausalLM.from_pretrained(a.out, dtype=torch.float32).eval()
    val = encode(a, a.seed + 3, 400)
    gen = batches(val, a, 0)
    vb = [next(gen) for _ in range(8)]
    forward = lambda ids: model(ids, use_cache=False).logits

    def held_out():
        with torch.no_grad():
            return sum(F.cross_entropy(forward(x).view(-1, a.vocab), y.view(-1), ignore_index=-100).item() for x, y in vb) / len(vb)

    print("\n== model.safetensors (F16 weights), held-out loss", round(held_out(), 4))
    show(forward, tok, PROMPTS)
    for name in ("demo-q8_0.gguf", "demo-q4_0.gguf"):
        tensors = {t.name: t for t in gguf.GGUFReader(str(a.out / name)).tensors}
        state = {}
        for key in model.state_dict():
            if key == "lm_head.weight":
                continue
            t = tensors.pop(gguf_name(key))
            w = gguf.quants.dequantize(t.data, t.tensor_type)
            w = unpermute(w, a.heads) if "q_proj" in key else unpermute(w, a.kv_heads) if "k_proj" in key else w
            state[key] = torch.from_numpy(np.array(w, dtype=np.float32))
        assert not tensors, tensors.keys()
        model.load_state_dict(state, strict=False)
        model.tie_weights()
        print(f"\n== {name}, held-out loss", round(held_out(), 4))
        show(forward, tok, PROMPTS[:3])


if __name__ == "__main__":
    args = options()
    torch.set_num_threads(args.threads)
    {"tokenizer": make_tokenizer, "bench": bench, "train": train, "sample": sample, "export": export,
     "verify": verify}[args.command](args)
