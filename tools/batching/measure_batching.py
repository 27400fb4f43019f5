#!/usr/bin/env python3
"""What overlap, batching and chunked prefill gain: one alternating run, ratios of medians, as a table.

    cargo run --release --example make_model -- --type q8_0 --out /tmp/tinyllama-q8_0.gguf
    cargo build --release --examples
    python3 tools/batching/measure_batching.py --model /tmp/tinyllama-q8_0.gguf

Each round runs every configuration once, so that a slow spell of the machine falls on all of them. README.md says what
the rows mean.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TWO = "cpu@threads=1,cpu@threads=1"

# name: (devices, case, further flags)
CONFIGURATIONS = {
    "one stage of two threads, 1 sequence": ("cpu@threads=2", "16:48:1", []),
    "one stage of two threads, 4 sequences": ("cpu@threads=2", "16:32:4", []),
    "one stage of two threads, 8 sequences": ("cpu@threads=2", "16:32:8", []),
    "one stage of two threads, 16 sequences": ("cpu@threads=2", "16:24:16", []),
    "two stages of one thread, 8 sequences": (TWO, "16:32:8", []),
    "the same, one micro-batch in flight": (TWO, "16:32:8", ["--in-flight", "1"]),
    "no split, 1 sequence": ("cpu", "16:48:1", []),
    "two stages that share a pool, 1 sequence": ("cpu,cpu", "16:48:1", []),
    "4 streams, then a prompt of 1500 tokens": ("cpu", "16:64:4", ["--disturb", "1500"]),
}

# row: (numerator, denominator)
RATIOS = {
    "4 sequences over 1": ("one stage of two threads, 4 sequences", "one stage of two threads, 1 sequence"),
    "16 sequences over 1": ("one stage of two threads, 16 sequences", "one stage of two threads, 1 sequence"),
    "overlap over none": ("two stages of one thread, 8 sequences", "the same, one micro-batch in flight"),
    "two stages over one": ("two stages of one thread, 8 sequences", "one stage of two threads, 8 sequences"),
    "two stages on one pool over no split": ("two stages that share a pool, 1 sequence", "no split, 1 sequence"),
}


def run(arguments: argparse.Namespace, devices: str, case: str, flags: list[str]) -> dict:
    if arguments.split and devices == TWO:
        flags = [*flags, "--split", arguments.split]
    if arguments.dtype:
        flags = [*flags, "--dtype", arguments.dtype]
    command = [str(arguments.binary), "--model", arguments.model, "--devices", devices, "--cases", case, "--json", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout)["cases"][0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model that the examples can load")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--split", help="layers of the two stages, such as 12,10 for TinyLlama: the head is worth 1.5")
    parser.add_argument("--dtype", help="type that F32, F16 and BF16 weights are held in, such as bf16 for a model in F16")
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/examples/bench_batch")
    parser.add_argument("--json", type=Path, help="also write everything that was measured here")
    arguments = parser.parse_args()
    if not arguments.binary.exists():
        sys.exit(f"{arguments.binary} is not there: run `cargo build --release --examples` first")
    if arguments.rounds < 1:
        sys.exit("--rounds must be at least 1")

    measured: dict[str, list[dict]] = {name: [] for name in CONFIGURATIONS}
    for round_number in range(arguments.rounds):
        for name, (devices, case, flags) in CONFIGURATIONS.items():
            print(f"round {round_number + 1}: {name}", file=sys.stderr)
            measured[name].append(run(arguments, devices, case, flags))

    dtype = f", --dtype {arguments.dtype}" if arguments.dtype else ""
    print(f"{Path(arguments.model).name}{dtype}, {arguments.rounds} rounds, tokens/s over all sequences\n")
    print("| configuration | min | median | max | busy |\n|---|---|---|---|---|")
    medians = {}
    for name, runs in measured.items():
        rates = sorted(run["decode_tokens_per_second"] for run in runs)
        medians[name] = statistics.median(rates)
        busy = [statistics.median(shares) for shares in zip(*(run["busy_shares"] for run in runs))]
        shares = ", ".join(f"{100 * share:.0f} %" for share in busy)
        print(f"| {name} | {rates[0]:.1f} | {medians[name]:.1f} | {rates[-1]:.1f} | {shares} |")
    print("\n| ratio of medians | |\n|---|---|")
    for row, (numerator, denominator) in RATIOS.items():
        print(f"| {row} | {medians[numerator] / medians[denominator]:.2f} |")
    disturbed = measured["4 streams, then a prompt of 1500 tokens"]
    calm = statistics.median(run["inter_token_p99_us"] for run in disturbed)
    during = statistics.median(run["disturbed_inter_token_p99_us"] for run in disturbed)
    count = min(run["disturbed_inter_tokens"] for run in disturbed)
    print(f"| inter-token P99 while a prompt of 1500 is computed over undisturbed ({count} tokens or more) "
          f"| {during / calm:.2f} ({during / 1e3:.1f} ms over {calm / 1e3:.1f} ms) |")
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
