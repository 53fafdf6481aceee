"""Measures encoding speed: f2llm_jax beside the engines that a user would otherwise choose.

    python benchmarks/encode.py --sizes 80M,330M,0.6B --texts short,medium,long,mix --json results.json
    python benchmarks/encode.py --device gpu --sizes 0.6B --no-tune --seconds 0.2

Random weights of the real shapes, real texts, tokenising included. Every engine has its own process, loaded and warmed
up before the clock starts. In each round, the engines encode the same texts in turn while the others wait; the figures
are medians over the rounds. Ratios are medians of the ratios within a round, so that a temporary slowdown of the
machine affects both sides. f2llm in int8 is listed with the bfloat16 engines. Peers first find their best batch size
for each kind of texts, once: it is kept in the cache folder.

On a GPU, the peer is sentence-transformers in bfloat16, memory is that of the card, and the ceiling is the rate of one
large product.

Needs the ``bench`` and ``test`` extras, Linux, and the folders ``qwen3-tokenizer``, ``bitext`` and ``xquad`` in --data.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from engines import DEVICES, ENGINES, EXPORT, THREADS, Setting, export, serve
from inputs import SIZES, TEXTS, read_texts, write_release
from tables import markdown

from f2llm_jax.configs.models import MODELS

OURS = {"float32": "f2llm-fp32", "bfloat16": "f2llm-bf16"}

# What is measured by default.
_SIZES = {"cpu": ("80M", "330M", "0.6B"), "gpu": ("80M", "0.6B", "4B")}
_ENGINES = {"cpu": tuple(name for name in ENGINES if name != "ceiling"), "gpu": ("torch-bf16", "f2llm-bf16")}

# Turns are sized for this rate of matrix products, that of an average engine on an average machine.
_ASSUMED_FLOPS = {"cpu": 200e9, "gpu": 200e12}

# Minimum number of texts in a turn: fewer do not represent their kind, and leave batches partly filled.
_LEAST_TEXTS = {"short": 128, "medium": 64, "long": 16, "mix": 40}

# Number of texts of each kind whose embeddings are compared with exact ones.
_COMPARED_TEXTS = 128

# A turn counts as disturbed if other processes took more than this share of the cores.
_DISTURBED = 0.05


def is_ours(engine: str) -> bool:
    return engine.startswith("f2llm")


class Lost(SystemExit):
    """A worker process ended unexpectedly."""


class Worker:
    """An engine in its own process."""

    def __init__(self, name: str, release: Path, device: str):
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, name, release, device), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, method: str, texts: list[str] | None = None, setting: Setting | None = None) -> Any:
        try:
            self.connection.send((method, texts, setting or {}))
            return self.connection.recv()
        except (EOFError, BrokenPipeError):
            self.process.join()
            raise Lost(f"{self.name} ended without an answer, with exit code {self.process.exitcode}") from None

    def close(self) -> None:
        self.connection.send(None)
        self.process.join()

    def turn(self, texts: list[str] | None, setting: Setting | None = None, repeats: int = 0) -> Turn:
        """A timed call; if other processes disturb it, it is repeated, and the least disturbed call counts."""
        turns: list[Turn] = []
        while len(turns) <= repeats and not (turns and turns[-1].quiet):
            busy = _busy_seconds()
            seconds, cpu_seconds, result = self.ask("time", texts, setting)
            others = max(_busy_seconds() - busy - cpu_seconds, 0) / (seconds * THREADS)
            turns.append(Turn(seconds, cpu_seconds, others, result))
        return min(turns, key=lambda turn: turn.others)


class Turn(NamedTuple):
    """What a timed call took, and what it returned.

    Attributes:
        seconds: wall time.
        cpu_seconds: CPU time of all threads together.
        others: the share of the cores that other processes took during the call.
        result: what the engine returned.
    """

    seconds: float
    cpu_seconds: float
    others: float
    result: Any

    @property
    def quiet(self) -> bool:
        return self.others < _DISTURBED


def _busy_seconds() -> float:
    """CPU time of all processes since boot."""
    user, nice, system, _idle, _wait, *rest = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system + sum(rest[:3])) / os.sysconf("SC_CLK_TCK")


class Texts:
    """Texts of one kind, as many as fill a turn for a model.

    Attributes:
        kind: one of ``TEXTS``.
        texts: the texts.
        tokens: total number of tokens, EOS included.
        flops_per_token: FLOPs per token of the products with the layers' weights, without those of attention itself.
        spared_per_token: the part that f2llm does not compute: the last layer except keys and values. (It computes
            the rest of the last layer only for the ends of texts, which is not counted.)
    """

    def __init__(self, kind: str, size: str, data: Path, release: Path, flops: float):
        import tokenizers

        config = MODELS[size]
        heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
        weights = config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)
        self.flops_per_token = 2 * weights * config.num_hidden_layers
        tokenizer = tokenizers.Tokenizer.from_file(str(release / "tokenizer.json"))

        def tokens(texts: list[str]) -> int:
            return sum(len(encoding.ids) for encoding in tokenizer.encode_batch_fast(texts))

        sample = read_texts(kind, 200, data)
        count = flops / (self.flops_per_token * tokens(sample) / len(sample))
        self.kind = kind
        self.texts = read_texts(kind, max(round(count), _LEAST_TEXTS[kind]), data)
        self.tokens = tokens(self.texts)
        keys_and_values = config.hidden_size * 2 * config.num_key_value_heads * config.head_dim
        self.spared_per_token = 2 * (weights - keys_and_values)

    @property
    def key(self) -> str:
        """A name that identifies the texts."""
        return f"{self.kind}-{hashlib.sha256(repr(self.texts).encode()).hexdigest()[:8]}"


class Tuning:
    """The best setting of each engine for each kind of texts; settings found on a quiet machine are kept in a file."""

    def __init__(self, file: Path, tune: bool, device: str):
        self.file = file
        self.tune = tune
        self.device = device
        self.settings: dict[str, Setting] = json.loads(file.read_text()) if file.exists() else {}
        self.worker: Worker | None = None  # of the engine tuned last, reused for all kinds of texts

    def setting(self, engine: str, size: str, texts: Texts, release: Path) -> Setting:
        kind = ENGINES[engine].kind
        key = f"{engine} {size} {texts.key} " + (f"{THREADS} threads" if self.device == "cpu" else self.device)
        ladders = kind.ladders[self.device]
        if key not in self.settings:
            if not (self.tune and ladders):
                return kind.usual[self.device]
            note(f"finding the best setting of {engine} for {texts.kind}")
            tried = [entry for ladder in ladders for entry in self._climb(engine, release, ladder, texts.texts)]
            if not tried:
                raise Lost(f"{engine} works with none of its settings")
            self.settings[key] = min(tried, key=lambda entry: entry[0].seconds)[1]
            if all(turn.quiet for turn, _ in tried):
                self.file.write_text(json.dumps(self.settings, indent=2))
        return self.settings[key]

    def _climb(self, engine: str, release: Path, ladder: list[Setting], texts: list[str]) -> list[tuple[Turn, Setting]]:
        """Runs a turn with each setting, with larger and larger batches until one is clearly slower than the best.

        A setting that ends the process is not used: OpenVINO 2026.4 divides by zero with AMX, bfloat16 and one thread
        per batch.
        """
        tried: list[tuple[Turn, Setting]] = []
        worker = self._worker(engine, release)
        try:
            for setting in ladder:
                worker.ask("encode", texts, setting)
                tried.append((worker.turn(texts, setting, repeats=1), setting))
                if tried[-1][0].seconds > 1.1 * min(turn.seconds for turn, _ in tried):
                    break
        except Lost as error:
            note(f"{error} at {setting}")
            self.worker = None
        return tried

    def _worker(self, engine: str, release: Path) -> Worker:
        if self.worker is None or self.worker.name != engine:
            self.close()
            self.worker = Worker(engine, release, self.device)
        return self.worker

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None


def compare(
    size: str,
    kinds: Sequence[str],
    engines: Sequence[str],
    device: str,
    *,
    rounds: int,
    repeats: int,
    seconds: float,
    tune: bool,
    data: Path,
    cache: Path,
) -> tuple[list[Row], dict[str, int]]:
    """A row for each kind of texts and engine, for one model size, and {engine: peak bytes of its process}."""
    release = cache / size
    _in_process(write_release, release, size, data / "qwen3-tokenizer")
    if device == "cpu" and not (release / EXPORT).exists():
        _in_process(export, release)
    flops = seconds * _ASSUMED_FLOPS[device]
    workload = [Texts(kind, size, data, release, flops) for kind in kinds]
    exact = _exact_embeddings(workload, release, cache / f"{size}-{device}", device)
    tuning = Tuning(cache / "tuning.json", tune, device)
    settings = {
        (texts.kind, engine): tuning.setting(engine, size, texts, release) for engine in engines for texts in workload
    }
    tuning.close()
    rows = {
        (texts.kind, engine): Row(size, texts, engine, settings[texts.kind, engine], exact[texts.kind])
        for texts in workload
        for engine in engines
    }
    peaks: dict[str, int] = {}
    for group in [list(engines)] if device == "gpu" else _groups(engines, release):
        for engine, peak in _compare_together(group, workload, rows, release, device, rounds, repeats).items():
            peaks[engine] = max(peak, peaks.get(engine, 0))
    return list(rows.values()), peaks


def _in_process(function: Any, *arguments: Any) -> None:
    """Runs a function in its own process, so that its imports take no memory from the timed processes."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function.__name__} failed; its message stands above")


def _exact_embeddings(workload: list[Texts], release: Path, folder: Path, device: str) -> dict[str, np.ndarray]:
    """Embeddings of the first texts of each kind by sentence-transformers in float32, computed once."""
    folder.mkdir(exist_ok=True)
    files = {texts.kind: folder / f"{texts.key}.npy" for texts in workload}
    if not all(file.exists() for file in files.values()):
        note("computing the exact embeddings")
        worker = Worker("torch-fp32", release, device)
        for texts in workload:
            np.save(files[texts.kind], worker.ask("encode", texts.texts[:_COMPARED_TEXTS], {"batch_size": 8}))
        worker.close()
    return {kind: np.load(file) for kind, file in files.items()}


def _groups(engines: Sequence[str], release: Path) -> list[list[str]]:
    """Engines that are in memory together, each peer with f2llm_jax in its dtype: all at once, if memory allows."""
    # The files are in bfloat16. In float32, weights take twice that, and as much again while an engine repacks them;
    # plus 1 GiB for code and batches.
    each = 4 * sum(file.stat().st_size for file in release.glob("*.safetensors")) + (1 << 30)
    available = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    most = int(0.8 * available / each)
    if len(engines) <= most:
        return [list(engines)]
    groups: list[list[str]] = []
    ours = [engine for engine in engines if engine in OURS.values()]
    for engine in sorted(set(engines) - set(ours), key=list(ENGINES).index):
        companions = [own for own in ours if own == OURS[ENGINES[engine].dtype]]
        if groups and len({*groups[-1], engine, *companions}) <= most:
            groups[-1] += [name for name in (engine, *companions) if name not in groups[-1]]
        else:
            groups.append([engine, *companions])
    return groups


def _compare_together(
    group: list[str],
    workload: list[Texts],
    rows: dict[tuple[str, str], Row],
    release: Path,
    device: str,
    rounds: int,
    repeats: int,
) -> dict[str, int]:
    """Fills the rows of a group of engines; returns the peak bytes of each process over all kinds of texts."""
    note(f"loading and warming {', '.join(group)}")
    workers = {engine: Worker(engine, release, device) for engine in group}
    ceiling = Worker("ceiling", release, device)
    for texts in workload:
        for engine, worker in workers.items():
            row = rows[texts.kind, engine]
            row.check(worker.ask("encode", texts.texts, row.setting))
            if is_ours(engine):
                row.computed_tokens = worker.ask("computed", texts.texts)
        for number in range(rounds):
            rates = ceiling.turn(None, repeats=repeats).result
            first = number % len(group)
            turns = {}
            for engine in group[first:] + group[:first]:
                row = rows[texts.kind, engine]
                turns[engine] = workers[engine].turn(texts.texts, row.setting, repeats)
                row.turns.append(turns[engine])
                row.ceilings.append(rates[row.dtype])
            for engine in group:
                own = OURS[ENGINES[engine].dtype]
                if own in turns:
                    rows[texts.kind, engine].ratios.append(turns[engine].seconds / turns[own].seconds)
        note(
            f"{texts.kind}: "
            + ", ".join(f"{engine} {len(texts.texts) / rows[texts.kind, engine].seconds:.1f}/s" for engine in group)
        )
    peaks = {engine: worker.ask("peak") for engine, worker in workers.items()}
    for worker in (*workers.values(), ceiling):
        worker.close()
    return peaks


class Row:
    """Results of one engine on one kind of texts; the lists have one entry per round."""

    def __init__(self, size: str, texts: Texts, engine: str, setting: Setting, exact: np.ndarray):
        self.size = size
        self.texts = texts
        self.engine = engine
        self.dtype = ENGINES[engine].dtype
        self.setting = setting
        self.exact = exact
        self.computed_tokens = texts.tokens
        self.cosine = math.nan
        self.turns: list[Turn] = []
        self.ceilings: list[float] = []
        self.ratios: list[float] = []

    def check(self, embeddings: np.ndarray) -> None:
        """Stores the smallest cosine with the exact embeddings; ends the benchmark if it is not above 0.99."""
        pairs = (embeddings[: len(self.exact)], self.exact)
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in map(np.float64, pairs))
        self.cosine = float((a * b).sum(axis=1).min())
        if not self.cosine > 0.99:
            raise SystemExit(f"{self.engine} computes other embeddings: cosine {self.cosine:.4f} on {self.texts.kind}")

    @property
    def seconds(self) -> float:
        return statistics.median(turn.seconds for turn in self.turns)

    @property
    def flops(self) -> float:
        """FLOPs that the engine computed."""
        spared = self.texts.spared_per_token if is_ours(self.engine) else 0
        return self.computed_tokens * (self.texts.flops_per_token - spared)

    def values(self) -> dict[str, Any]:
        """All figures, for a JSON file."""
        rates = [self.flops / turn.seconds for turn in self.turns]
        shares = [rate / ceiling for rate, ceiling in zip(rates, self.ceilings, strict=True)]
        return {
            "size": self.size,
            "texts": self.texts.kind,
            "count": len(self.texts.texts),
            "tokens": self.texts.tokens,
            "computed_tokens": self.computed_tokens,
            "engine": self.engine,
            "dtype": self.dtype,
            "setting": self.setting,
            "texts_per_second": len(self.texts.texts) / self.seconds,
            "tokens_per_second": self.texts.tokens / self.seconds,
            "gflops": self.flops / self.seconds / 1e9,
            "ceiling_gflops": statistics.median(self.ceilings) / 1e9,
            "ceiling_share": statistics.median(shares),
            "cosine": self.cosine,
            "f2llm_speed_ratio": statistics.median(self.ratios) if self.ratios else None,
            "seconds": [turn.seconds for turn in self.turns],
            "cpu_seconds": [turn.cpu_seconds for turn in self.turns],
            "others": statistics.median(turn.others for turn in self.turns),
        }


# A user's first lines: the time from the start of Python to the embedding of one text.
_FIRST = {
    "torch": """
import torch
from sentence_transformers import SentenceTransformer
model = SentenceTransformer({release!r}, device="cpu", model_kwargs=dict(dtype=torch.{dtype}))
model.encode(["Where is the library?"])
""",
    "f2llm": """
import f2llm_jax
f2llm_jax.load({release!r}, dtype={dtype!r}).encode(["Where is the library?"])
""",
}


def first_results(size: str, rounds: int, data: Path, cache: Path) -> list[dict[str, Any]]:
    """Seconds from the start of a process to its first embedding, with programs and bytecode already compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    release = write_release(cache / size, size, data / "qwen3-tokenizer")
    seconds: dict[tuple[str, str], list[float]] = {(name, dtype): [] for dtype in OURS for name in _FIRST}
    for number in range(rounds + 1):
        for (name, dtype), entries in seconds.items():
            code = _FIRST[name].format(release=str(release), dtype=dtype) + "print('done', flush=True)"
            start = time.perf_counter()
            command = [sys.executable, "-c", code]
            with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                answered = any(line == "done\n" for line in process.stdout)
                if number:  # the first fills the caches
                    entries.append(time.perf_counter() - start)
            if not answered:
                raise SystemExit(f"{name} gave no first result; its message stands above")
    return [
        {"size": size, "engine": name, "dtype": dtype, "seconds": statistics.median(entries)}
        for (name, dtype), entries in seconds.items()
    ]


def speed_table(rows: list[dict[str, Any]]) -> str:
    """All rows, in the order in which they were measured."""
    header = (
        "model", "texts", "tokens", "engine", "setting", "texts/s", "±", "tokens/s", "GFLOP/s", "of ceiling", "cosine",
        "f2llm is", "texts/core-s", "others",
    )  # fmt: skip
    lines = []
    for row in rows:
        fastest, slowest = min(row["seconds"]), max(row["seconds"])
        ratio = row["f2llm_speed_ratio"]
        lines.append(
            (
                row["size"],
                f"{row['texts']} ({row['count']})",
                f"{row['tokens'] / row['count']:.0f}",
                row["engine"],
                ", ".join(map(str, row["setting"].values())),
                f"{row['texts_per_second']:.1f}",
                f"{(slowest - fastest) / 2 / statistics.median(row['seconds']):.0%}",
                f"{row['tokens_per_second']:.0f}",
                f"{row['gflops']:.0f}",
                f"{row['ceiling_share']:.0%}",
                f"{row['cosine']:.6f}",
                "" if ratio is None or row["engine"] in OURS.values() else f"{ratio:.2f} x",
                f"{row['count'] / statistics.median(row['cpu_seconds']):.1f}",
                f"{row['others']:.0%}",
            )
        )
    return markdown(header, lines)


def summary_table(rows: list[dict[str, Any]]) -> str:
    """f2llm_jax against torch and against the best peer in each dtype, and its share of the ceiling."""
    lines = []
    for own in rows:
        if own["engine"] not in OURS.values():
            continue
        peers = {
            row["engine"]: row
            for row in rows
            if (row["size"], row["texts"], row["dtype"]) == (own["size"], own["texts"], own["dtype"])
            and not is_ours(row["engine"])
        }
        torch = peers.get("torch-fp32") or peers.get("torch-bf16")
        best = min(peers.values(), key=lambda row: row["f2llm_speed_ratio"], default=None)
        lines.append(
            (
                own["size"],
                own["texts"],
                own["dtype"],
                f"{torch['f2llm_speed_ratio']:.2f} x" if torch else "",
                f"{best['f2llm_speed_ratio']:.2f} x ({best['engine']})" if best else "",
                f"{own['ceiling_share']:.0%} of {own['ceiling_gflops']:.0f} GFLOP/s",
                f"{own['cosine']:.6f}",
            )
        )
    header = ("model", "texts", "dtype", "speed / torch", "speed / best peer", "of ceiling", "cosine")
    return markdown(header, lines)


def memory_table(memory: list[dict[str, Any]]) -> str:
    """Peak memory of each engine over all texts, relative to torch in the same dtype."""
    peaks = {(entry["size"], entry["engine"]): entry["peak_bytes"] for entry in memory}
    lines = []
    for (size, engine), peak in peaks.items():
        torch = peaks.get((size, "torch-fp32" if ENGINES[engine].dtype == "float32" else "torch-bf16"))
        lines.append((size, engine, f"{peak / 1e6:.0f}", f"{peak / torch:.2f} x" if torch else ""))
    return markdown(("model", "engine", "peak MB", "memory / torch"), lines)


def first_table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for dtype in OURS:
        seconds = {row["engine"]: row["seconds"] for row in rows if row["dtype"] == dtype}
        ratio = f"{seconds['f2llm'] / seconds['torch']:.2f} x"
        lines.append((rows[0]["size"], dtype, *(f"{seconds[name]:.2f} s" for name in _FIRST), ratio))
    return markdown(("model", "dtype", "sentence-transformers", "f2llm", "time / torch"), lines)


def machine(device: str, *packages: str) -> str:
    """CPU model and cores, or the GPU, and the versions of the given packages."""
    if device == "gpu":
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        name = "one " + subprocess.check_output(query, text=True).splitlines()[0]
    else:
        model = Path("/proc/cpuinfo").read_text().split("model name")[1].split(":", 1)[1].split("\n", 1)[0].strip()
        flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split()
        units = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
        name = f"{THREADS} cores of {model} ({', '.join(units)})"
    return f"{name}; {', '.join(f'{package} {metadata.version(package)}' for package in packages)}"


def note(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def choices(allowed: Sequence[str]) -> Any:
    """An argparse type: some of ``allowed``, separated by commas."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(allowed):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: choose from {', '.join(allowed)}")
        return names

    return parse


def main() -> None:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "f2llm_jax" / "benchmarks"
    data = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument(
        "--sizes",
        type=choices(SIZES),
        help="default 80M,330M,0.6B on a CPU and 80M,0.6B,4B on a GPU; none with --first",
    )
    parser.add_argument("--texts", type=choices(TEXTS), default=list(TEXTS), help="short,medium,long,mix")
    parser.add_argument("--engines", type=choices(_ENGINES["cpu"]), help=",".join(_ENGINES["cpu"]))
    parser.add_argument("--rounds", type=int, default=5, help="turns of every engine on every row")
    parser.add_argument("--repeats", type=int, default=1, help="of a turn that other processes disturbed")
    parser.add_argument(
        "--no-tune", dest="tune", action="store_false", help="where no best batch size is known, take a usual one"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="about how long a turn should take")
    parser.add_argument("--first", choices=SIZES, help="measure the first result of a new process with this model")
    parser.add_argument("--data", type=Path, default=data, help="the folder with tokenizer and texts")
    parser.add_argument("--cache", type=Path, default=cache, help="where models, exports and tunings are kept")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cpu":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    else:  # which several engines share
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")

    peers = ["onnxruntime", "openvino"] if device == "cpu" else []
    compared = machine(device, "jax", "torch", "sentence-transformers", "transformers", *peers)
    print(compared, flush=True)
    rows: list[dict[str, Any]] = []
    memory: list[dict[str, Any]] = []
    for size in arguments.sizes or ([] if arguments.first else _SIZES[device]):
        measured, peaks = compare(
            size,
            arguments.texts,
            arguments.engines or _ENGINES[device],
            device,
            rounds=arguments.rounds,
            repeats=arguments.repeats,
            seconds=arguments.seconds,
            tune=arguments.tune,
            data=arguments.data,
            cache=arguments.cache,
        )
        rows += [row.values() for row in measured]
        memory += [{"size": size, "engine": engine, "peak_bytes": peak} for engine, peak in peaks.items()]
    if rows:
        print("\n" + "\n\n".join((speed_table(rows), summary_table(rows), memory_table(memory))), flush=True)
    first = first_results(arguments.first, arguments.rounds, arguments.data, arguments.cache) if arguments.first else []
    if first:
        print("\n" + first_table(first))
    if arguments.json:
        results = {"machine": compared, "rows": rows, "memory": memory, "first": first}
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
