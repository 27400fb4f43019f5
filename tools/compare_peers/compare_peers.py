#!/usr/bin/env python3
"""Measures candle-pipeline against llama.cpp and candle's own models, in one run that alternates between them.

All read the same model files, which examples/make_model.rs writes, and use the same number of threads. See README.md
beside this file for what is measured and how.

    python3 tools/compare_peers/compare_peers.py --rounds 5 --json peers.json > peers.md
"""

import argparse
import datetime
import json
import os
import platform
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
OURS = "candle-pipeline"
EXAMPLES = ["make_model", "bench_batch", "read_bandwidth"]
SHAPES = ["tinyllama-1.1b", "qwen2.5-0.5b", "llama-3.2-1b"]
DENSE_TYPES = ["f32", "f16", "bf16"]
DEEP_GENERATE = 32
BATCH_PROMPT, BATCH_GENERATE = 64, 32
# Cores that others may use while a program is measured before the table says so.
DISTURBED = 0.1

# What a CPU must have (names of /proc/cpuinfo) for a build of llama.cpp, and the options that switch it on. AMX stays
# off in all of them: ggml's AMX path crashes on some virtual machines.
AVX2_FLAGS = {"sse4_2", "avx", "avx2", "fma", "f16c", "bmi2"}
AVX512_FLAGS = {"avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw", "avx512vbmi", "avx512_vnni", "avx512_bf16"}
AVX512_OPTIONS = ["GGML_AVX512", "GGML_AVX512_VBMI", "GGML_AVX512_VNNI", "GGML_AVX512_BF16"]
CMAKE_ON = ["LLAMA_BUILD_COMMON", "LLAMA_BUILD_TOOLS", "GGML_SSE42", "GGML_AVX", "GGML_AVX2", "GGML_BMI2", "GGML_FMA",
            "GGML_F16C"]
CMAKE_OFF = ["BUILD_SHARED_LIBS", "LLAMA_OPENSSL", "LLAMA_BUILD_SERVER", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES",
             "LLAMA_BUILD_APP", "GGML_NATIVE", "GGML_AVX_VNNI", "GGML_AMX_TILE", "GGML_AMX_INT8", "GGML_AMX_BF16"]
LLAMA_TARGETS = ["llama-bench", "llama-batched-bench"]


class Failure(Exception):
    """Something that the user should read, without a traceback."""


def say(text):
    print(text, file=sys.stderr, flush=True)


def run(command, timeout=None, env=None, cwd=None):
    """Runs a program and returns its stdout; a failure carries the end of its stderr."""
    command = [str(part) for part in command]
    try:
        environment = {**os.environ, "RUST_BACKTRACE": "0", **(env or {})}
        done = subprocess.run(command, cwd=cwd, env=environment, timeout=timeout,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    except FileNotFoundError:
        raise Failure(f"{command[0]} was not found") from None
    except subprocess.TimeoutExpired:
        raise Failure(f"{Path(command[0]).name} took more than {timeout} s: raise --timeout") from None
    if done.returncode != 0:
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
        tail = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-15:]
        shown = "\n  ".join([" ".join(command), *tail])
        raise Failure(f"{Path(command[0]).name} ended with {how}: {tail[-1]}\n  {shown}")
    return done.stdout


# What is measured


@dataclass(frozen=True)
class Measure:
    """One number of each program: tokens a second of a case, in prefill or in decode."""
    name: str
    prompt: int
    generate: int
    sequences: int = 1

    @property
    def case(self):
        return f"{self.prompt}:{self.generate}:{self.sequences}"

    @property
    def rate(self):
        return "decode_tokens_per_second" if self.generate else "prefill_tokens_per_second"


def measures_of(args):
    measures = []
    for name in args.what:
        prefill = re.fullmatch(r"prefill(\d+)", name)
        if name == "decode":
            measures.append(Measure(name, 1, args.generate))
        elif name == "deep":
            measures.append(Measure(name, args.depth, DEEP_GENERATE))
        elif name == "batch":
            measures += [Measure(f"batch{n}", BATCH_PROMPT, BATCH_GENERATE, n) for n in args.batch_sizes]
        elif prefill and int(prefill[1]) > 0:
            measures.append(Measure(name, int(prefill[1]), 0))
        else:
            raise Failure(f"--what {name}: one of decode, deep, batch, prefill128, prefill512, or another prefillN")
    return measures


# The programs


@dataclass
class CasesProgram:
    """Our bench or that of candle's models: both take --cases and print the same JSON."""
    name: str
    command: list
    env: dict = field(default_factory=dict)

    def measure(self, measures, timeout):
        command = self.command + ["--json", "--cases", ",".join(measure.case for measure in measures)]
        cases = json.loads(run(command, timeout, self.env))["cases"]
        return {measure.name: case[measure.rate] for measure, case in zip(measures, cases)}


@dataclass
class LlamaProgram:
    name: str
    folder: Path
    model: Path
    threads: int

    def measure(self, measures, timeout):
        rates = {}
        plain = [m for m in measures if not m.name.startswith("batch") and m.name != "deep"]
        if plain:
            prompts = [m.prompt for m in plain if not m.generate] or [0]
            generate = max(m.generate for m in plain)
            rows = self.bench(timeout, "-p", ",".join(map(str, prompts)), "-n", generate)
            for measure in plain:
                wanted = (0, measure.generate) if measure.generate else (measure.prompt, 0)
                rates[measure.name] = next(r["avg_ts"] for r in rows if (r["n_prompt"], r["n_gen"]) == wanted)
        for measure in measures:
            if measure.name == "deep":
                (row,) = self.bench(timeout, "-p", 0, "-n", measure.generate, "-d", measure.prompt)
                rates[measure.name] = row["avg_ts"]
        batches = [m for m in measures if m.name.startswith("batch")]
        if batches:
            rates |= self.batched(batches, timeout)
        return rates

    def bench(self, timeout, *options):
        command = [self.folder / "llama-bench", "-m", self.model, "-t", self.threads, "-r", 1, "-o", "json", *options]
        return json.loads(run(command, timeout))

    def batched(self, batches, timeout):
        most = max(m.sequences for m in batches)
        # The context is divided evenly among the sequences, in pieces of 256 positions.
        command = [self.folder / "llama-batched-bench", "-m", self.model, "-t", self.threads, "-c", 256 * most,
                   "-npp", BATCH_PROMPT, "-ntg", BATCH_GENERATE,
                   "-npl", ",".join(str(m.sequences) for m in batches), "--output-format", "jsonl"]
        lines = [line for line in run(command, timeout).splitlines() if line.startswith("{")]
        speeds = {row["pl"]: row["speed_tg"] for row in map(json.loads, lines)}
        missing = [m.name for m in batches if m.sequences not in speeds]
        if missing:
            raise Failure(f"llama-batched-bench printed nothing for {', '.join(missing)}")
        return {m.name: speeds[m.sequences] for m in batches}


# Building


def find_tool(name):
    """On the path, or beside the Python that runs this, where `pip install` puts it."""
    beside = Path(sys.executable).parent / name
    return shutil.which(name) or (str(beside) if beside.exists() else None)


def cpu_info():
    info = {"model": platform.processor() or platform.machine(), "flags": set(), "logical": os.cpu_count()}
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return info
    fields = dict(re.findall(r"^(model name|flags)\s*: (.*)$", text, re.MULTILINE))
    return {**info, "model": fields.get("model name", info["model"]), "flags": set(fields.get("flags", "").split())}


def llama_source(args):
    """The folder of llama.cpp's sources: the one given, or from the source package of llama-cpp-python."""
    if args.llama_source:
        if not (args.llama_source / "CMakeLists.txt").exists():
            raise Failure(f"--llama-source {args.llama_source}: there is no CMakeLists.txt in it; "
                          "give the folder of llama.cpp itself")
        return args.llama_source
    folder = args.cache / f"llama_cpp_python-{args.llama_version}"
    source = folder / "vendor" / "llama.cpp"
    if source.exists():
        return source
    args.cache.mkdir(parents=True, exist_ok=True)
    package = f"llama-cpp-python=={args.llama_version}"
    say(f"downloading the sources of {package}")
    try:
        # Only this package as sources: pip also fetches what would build it, and that should not be compiled.
        run([sys.executable, "-m", "pip", "download", "--no-binary", "llama-cpp-python", "--no-deps", "-d", args.cache,
             package])
    except Failure as error:
        raise Failure(f"{error}\nWithout a connection give the folder of llama.cpp's sources as --llama-source, "
                      "or leave it out with --skip llama.") from None
    archives = sorted(args.cache.glob(f"llama_cpp_python-{args.llama_version}*.tar.gz"))
    if not archives:
        raise Failure(f"pip left no source package of {package} in {args.cache}")
    safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(archives[0]) as archive:
        archive.extractall(args.cache, **safely)
    if not source.exists():
        raise Failure(f"{archives[0]} has no vendor/llama.cpp: try another --llama-version")
    return source


def build_llama(args, source, name):
    """Configures and builds one variant; a build that is there is only brought up to date. Returns its programs."""
    cmake = find_tool("cmake")
    if not cmake:
        raise Failure("cmake was not found: `pip install cmake ninja`, or leave llama.cpp out with --skip llama")
    switches = {option: "ON" for option in CMAKE_ON} | {option: "OFF" for option in CMAKE_OFF}
    switches |= {option: "ON" if name == "llama-avx512" else "OFF" for option in AVX512_OPTIONS}
    options = ["-DCMAKE_BUILD_TYPE=Release"] + [f"-D{option}={value}" for option, value in switches.items()]
    ninja = find_tool("ninja")
    if ninja:
        options += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    folder = args.cache / name
    say(f"building {name} in {folder}")
    run([cmake, "-S", source, "-B", folder, *options])
    run([cmake, "--build", folder, "--config", "Release", "-j", args.jobs, "--target", *LLAMA_TARGETS])
    return folder / "bin"


def build_ours(args):
    """Builds the examples that this tool runs; returns their paths by name."""
    say("building candle-pipeline's benches")
    command = ["cargo", "build", "--release", "--message-format=json-render-diagnostics", "-j", args.jobs]
    examples = list(EXAMPLES)
    if "candle" not in args.skip:  # without it there is no candle-dense either
        examples.append("candle_peer")
        command += ["-p", "candle-pipeline", "-p", "conformance"]
    for example in examples:
        command += ["--example", example]
    paths = {}
    for line in run(command, cwd=ROOT).splitlines():
        message = json.loads(line) if line.startswith("{") else {}
        if message.get("executable"):
            paths[message["target"]["name"]] = Path(message["executable"])
    missing = [example for example in examples if example not in paths]
    if missing:
        raise Failure(f"cargo built no {', '.join(missing)}")
    return paths


def make_model(args, make, shape, dtype, suffix):
    """A model file (`.gguf`) or folder (no suffix); made once, under another name until it is whole."""
    path = args.models / f"{shape}-{dtype}{suffix}"
    if not path.exists():
        args.models.mkdir(parents=True, exist_ok=True)
        unfinished = args.models / f"unfinished-{path.name}"
        say(f"writing {path}")
        run([make, "--shape", shape, "--type", dtype, "--out", unfinished])
        unfinished.rename(path)
    return path


def read_through(path):
    """Brings a file into the page cache, so that the first program to load it has no disadvantage."""
    files = [path] if path.is_file() else [entry for entry in path.iterdir() if entry.is_file()]
    block = bytearray(16 << 20)
    for file in files:
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(block):
                pass


# Measuring


class Others:
    """Cores that something else kept busy while a program ran, and cores that the host took away."""

    def __init__(self):
        self.began = self.now()

    @staticmethod
    def now():
        try:
            ticks = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        user, nice, system, _idle, _wait, irq, softirq, steal = (int(t) / os.sysconf("SC_CLK_TCK") for t in ticks)
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        busy = user + nice + system + irq + softirq - children.ru_utime - children.ru_stime
        return time.monotonic(), busy, steal

    def cores(self):
        now = self.now()
        if not self.began or not now:
            return None
        (t0, busy0, steal0), (t1, busy1, steal1) = self.began, now
        passed = max(t1 - t0, 1e-3)
        return {"others": max(0.0, busy1 - busy0) / passed, "stolen": (steal1 - steal0) / passed}


def wait_until_quiet(limit):
    """Waits until nothing else uses the machine, so many seconds at most."""
    until = time.monotonic() + limit
    told = False
    while time.monotonic() < until:
        others = Others()
        time.sleep(1)
        cores = others.cores()
        if not cores or cores["others"] + cores["stolen"] < DISTURBED:
            return
        if not told:
            say(f"  waiting: others keep {cores['others']:.1f} cores busy")
            told = True


def our_options(args):
    options = ["--isa", args.isa] if args.isa else []
    options += ["--dtype", args.dtype] if args.dtype else []
    return options + (["--bf16-prompts"] if args.bf16_prompts else [])


def programs_of(args, paths, llama_folders, shape, dtype, gguf):
    programs = [CasesProgram(OURS, [paths["bench_batch"], "--model", gguf, "--devices", f"cpu@threads={args.threads}",
                                    "--output-format", "none", *our_options(args)])]
    programs += [LlamaProgram(name, folder, gguf, args.threads) for name, folder in llama_folders.items()]
    env = {"RAYON_NUM_THREADS": str(args.threads), "CANDLE_NUM_THREADS": str(args.threads)}
    if "candle" not in args.skip:
        programs.append(CasesProgram("candle", [paths["candle_peer"], "--model", gguf], env))
    if not {"candle", "candle-dense"} & set(args.skip) and dtype in DENSE_TYPES:
        folder = make_model(args, paths["make_model"], shape, dtype, "")
        read_through(folder)
        programs.append(CasesProgram("candle-dense", [paths["candle_peer"], "--model", folder], env))
    return programs


def measure_model(args, paths, llama_folders, measures, shape, dtype, results):
    gguf = make_model(args, paths["make_model"], shape, dtype, ".gguf")
    read_through(gguf)
    programs = programs_of(args, paths, llama_folders, shape, dtype, gguf)
    result = {"shape": shape, "type": dtype, "file_bytes": gguf.stat().st_size, "bandwidth_gb_per_second": [],
              "tile_g_multiplications_per_second": [],
              "programs": [program.name for program in programs],
              "rates": {m.name: {program.name: [] for program in programs} for m in measures},
              "failures": {}, "cores": {program.name: [] for program in programs}}
    results.append(result)
    for number in range(1, args.rounds + 1):
        bandwidth = json.loads(run([paths["read_bandwidth"], "--json", "--threads", args.threads, "--model", gguf]))
        result["bandwidth_gb_per_second"].append(bandwidth["median_gb_per_second"])
        (result["bytes_per_token"],) = bandwidth["bytes_per_token"].values()
        (result["multiplications_per_prompt_token"],) = bandwidth["multiplications_per_prompt_token"].values()
        if tiles := bandwidth["median_tile_g_multiplications_per_second"]:
            result["tile_g_multiplications_per_second"].append(tiles)
        for program in programs:
            if program.name in result["failures"]:
                continue
            say(f"{shape} {dtype}, round {number} of {args.rounds}: {program.name}")
            if args.wait_quiet:
                wait_until_quiet(args.wait_quiet)
            others = Others()
            try:
                rates = program.measure(measures, args.timeout)
            except Failure as error:
                say(f"  failed: {error}")
                result["failures"][program.name] = str(error)
                continue
            result["cores"][program.name].append(others.cores())
            for name, rate in rates.items():
                result["rates"][name][program.name].append(rate)
            say("  " + ", ".join(f"{name} {rate:.2f}" for name, rate in rates.items()))


# Reporting


def git(*command):
    try:
        return run(["git", *command], cwd=ROOT).strip()
    except Failure:
        return ""


def first_line(command):
    try:
        return run(command).splitlines()[0].strip()
    except (Failure, IndexError):
        return ""


def machine_and_versions(args, cpu, source, llama_folders):
    vector_flags = sorted(f for f in cpu["flags"] if re.match(r"(avx|amx|fma|f16c)", f))
    package = next((part for part in reversed(source.parts) if part.startswith("llama_cpp_python-")), source.name) \
        if source else None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu["model"],
        "cpu_flags": vector_flags,
        "logical_cpus": cpu["logical"],
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "threads": args.threads,
        "rounds": args.rounds,
        "commit": git("rev-parse", "HEAD"),
        "changed": bool(git("status", "--porcelain")),
        "rustc": first_line(["rustc", "--version"]),
        "c_compiler": first_line(["cc", "--version"]) if llama_folders else None,
        "llama": package,
        "generate": args.generate,
        "depth": args.depth,
        "options": " ".join(our_options(args)),
    }


def spread(values):
    return {"min": min(values), "median": statistics.median(values), "max": max(values), "values": values}


def summarise(result):
    """Adds the bandwidth bound, and for each measure the spread of each program and our ratio to it."""
    bandwidth = result["bandwidth_gb_per_second"]
    if bandwidth:
        result["bandwidth"] = spread(bandwidth)
        result["bound_tokens_per_second"] = result["bandwidth"]["median"] * 1e9 / result["bytes_per_token"]
    tiles = result["tile_g_multiplications_per_second"]
    if tiles:
        result["tile_bound_tokens_per_second"] = \
            statistics.median(tiles) * 1e9 / result["multiplications_per_prompt_token"]
    result["summary"] = {}
    for name, by_program in result["rates"].items():
        rows = {program: spread(values) for program, values in by_program.items() if values}
        ours = rows.get(OURS)
        for row in rows.values():
            row["ratio"] = ours["median"] / row["median"] if ours else None
            if name in ("decode", "deep", "batch1") and bandwidth:
                row["of_bound"] = row["median"] / result["bound_tokens_per_second"]
            elif name.startswith("prefill") and tiles:
                row["of_bound"] = row["median"] / result["tile_bound_tokens_per_second"]
        result["summary"][name] = rows


def markdown(report):
    machine = report["machine"]
    lines = [
        f"{machine['cpu']}, {machine['logical_cpus']} logical CPUs, {machine['threads']} threads, {machine['system']}; "
        f"{' '.join(machine['cpu_flags'])}",
        "",
        f"candle-pipeline {machine['commit'][:12] or 'of no commit'}{' with changes' if machine['changed'] else ''}, "
        f"{machine['rustc']}; llama.cpp of {machine['llama'] or 'none'}, {machine['c_compiler'] or ''}; "
        f"{machine['date']}, {machine['rounds']} rounds{', ' + machine['options'] if machine['options'] else ''}. "
        f"Tokens a second; ratio: {OURS} over the program, by medians.",
    ]
    for result in report["models"]:
        heading = f"{result['shape']} {result['type']}"
        lines += ["", f"### {heading}", ""]
        if "bandwidth" in result:
            bandwidth = result["bandwidth"]
            lines += [f"File {result['file_bytes'] / 1e6:.0f} MB, {result['bytes_per_token'] / 1e6:.0f} MB read a token; "
                      f"memory is read at {bandwidth['median']:.1f} GB/s ({bandwidth['min']:.1f} to "
                      f"{bandwidth['max']:.1f}), which allows {result['bound_tokens_per_second']:.1f} tokens/s.", ""]
        if "tile_bound_tokens_per_second" in result:
            tiles = result["tile_g_multiplications_per_second"]
            lines[-1:] = [f"AMX does {statistics.median(tiles):.0f} G multiplications of BF16 a second ({min(tiles):.0f} to "
                          f"{max(tiles):.0f}), which allows {result['tile_bound_tokens_per_second']:.0f} prompt tokens/s.",
                          ""]
        disturbed = {
            program: max((c["others"] + c["stolen"] for c in cores if c), default=0.0)
            for program, cores in result["cores"].items()
        }
        disturbed = {program: cores for program, cores in disturbed.items() if cores > DISTURBED}
        if disturbed:
            cores = ", ".join(f"{cores:.1f} cores beside {program}" for program, cores in disturbed.items())
            lines += [f"**Something else was running, up to {cores}: measure again on a quiet machine.**", ""]
        lines += ["| measure | program | min | median | max | ratio | of the bound |", "|---|---|---|---|---|---|---|"]
        for name, rows in result["summary"].items():
            for program, row in rows.items():
                ratio = f"{row['ratio']:.2f}" if row["ratio"] is not None else "-"
                share = f"{100 * row['of_bound']:.0f} %" if "of_bound" in row else ""
                lines.append(f"| {name} | {program} | {row['min']:.2f} | {row['median']:.2f} | {row['max']:.2f} "
                             f"| {ratio} | {share} |")
        lines += [""] + [f"{program} failed: {text.splitlines()[0]}" for program, text in result["failures"].items()]
    return "\n".join(lines).rstrip() + "\n"


def arguments():
    def names(text):
        return [name.strip() for name in text.split(",") if name.strip()]

    def numbers(text):
        return [positive(part) for part in names(text)]

    def positive(text):
        if not text.isdigit() or int(text) == 0:
            raise argparse.ArgumentTypeError(f"{text} is not a number of at least 1")
        return int(text)

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    measure = parser.add_argument_group("what is measured")
    measure.add_argument("--shapes", type=names, default="tinyllama-1.1b", help=", ".join(SHAPES))
    measure.add_argument("--types", type=names, default="f16,q8_0,q4_0,q4_k_m", help="types that make_model knows")
    measure.add_argument("--what", type=names, default="decode,prefill128,prefill512,deep,batch",
                         help="decode, deep (decode after --depth tokens), batch (decode of several sequences), prefillN")
    measure.add_argument("--rounds", type=positive, default=5, help="times that each program takes its turn")
    measure.add_argument("--threads", type=positive, default=2, help="threads of each program")
    measure.add_argument("--isa", help="instruction set of candle-pipeline: avx2, avx512 or amx (default: the best)")
    measure.add_argument("--dtype", help="type that candle-pipeline holds F32, F16 and BF16 weights in (default: theirs)")
    measure.add_argument("--bf16-prompts", action="store_true",
                         help="candle-pipeline computes prompts in BF16, where there is AMX")
    measure.add_argument("--skip", type=names, default="", help="candle, candle-dense, llama, llama-avx512, llama-avx2")
    measure.add_argument("--generate", type=positive, default=48, help="tokens of `decode`")
    measure.add_argument("--depth", type=positive, default=2000, help="context of `deep`")
    measure.add_argument("--batch-sizes", type=numbers, default="1,4,16", help="numbers of sequences of `batch`")
    measure.add_argument("--timeout", type=positive, default=1800, help="seconds that a program may take in a round")
    measure.add_argument("--wait-quiet", type=positive, metavar="SECONDS",
                         help="before each turn wait so long at most until nothing else uses the machine")
    measure.add_argument("--json", type=Path, metavar="FILE", help="also write everything as JSON")
    build = parser.add_argument_group("building")
    build.add_argument("--cache", type=Path, default=ROOT / "target" / "compare_peers",
                       help="folder for llama.cpp's sources and builds")
    build.add_argument("--models", type=Path, help="folder for the model files (default: models in --cache)")
    build.add_argument("--llama-source", type=Path, help="folder of llama.cpp's sources, instead of a download")
    build.add_argument("--llama-version", default="0.3.36", help="of llama-cpp-python, whose sources hold llama.cpp")
    build.add_argument("--jobs", type=positive, default=2, help="compilers at once")
    build.add_argument("--build-only", action="store_true", help="build and write the models, measure nothing")
    args = parser.parse_args()
    args.cache = args.cache.resolve()
    args.models = (args.models or args.cache / "models").resolve()
    args.llama_source = args.llama_source and args.llama_source.resolve()
    known = {"candle", "candle-dense", "llama", "llama-avx512", "llama-avx2"}
    for option, given, allowed in (("--skip", args.skip, known), ("--shapes", args.shapes, SHAPES)):
        for name in given:
            if name not in allowed:
                parser.error(f"{option} {name}: one of {', '.join(sorted(allowed))}")
    return args


def build_llamas(args, cpu):
    """The variants of llama.cpp that this CPU can run, by name, and the source they come from."""
    wanted = [name for name in ("llama-avx512", "llama-avx2") if not {name, "llama"} & set(args.skip)]
    if wanted and not AVX2_FLAGS <= cpu["flags"]:
        raise Failure("llama.cpp is built for x86-64 with AVX2 here, which /proc/cpuinfo does not list: --skip llama")
    if "llama-avx512" in wanted and not AVX512_FLAGS <= cpu["flags"]:
        say(f"no llama-avx512: the CPU lacks {', '.join(sorted(AVX512_FLAGS - cpu['flags']))}")
        wanted.remove("llama-avx512")
    source = llama_source(args) if wanted else None
    return {name: build_llama(args, source, name) for name in wanted}, source


def main():
    # Being ended is as good as an interrupt: the program that runs is ended too, and the table is printed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    args = arguments()
    measures = measures_of(args)
    cpu = cpu_info()
    paths = build_ours(args)
    llama_folders, source = build_llamas(args, cpu)
    if args.build_only:
        for shape in args.shapes:
            for dtype in args.types:
                make_model(args, paths["make_model"], shape, dtype, ".gguf")
        return 0
    report = {"machine": machine_and_versions(args, cpu, source, llama_folders), "models": []}
    stopped = False
    for shape, dtype in ((shape, dtype) for shape in args.shapes for dtype in args.types):
        try:
            measure_model(args, paths, llama_folders, measures, shape, dtype, report["models"])
        except KeyboardInterrupt:
            say("interrupted: what has been measured so far follows")
            stopped = True
        if report["models"]:
            summarise(report["models"][-1])
        # After each model, so that a long run that is lost leaves what it has.
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
        if stopped:
            break
    print(markdown(report), end="")
    return 1 if stopped or any(result["failures"] for result in report["models"]) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failure as failure:
        sys.exit(f"error: {failure}")
