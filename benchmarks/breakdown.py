"""Breaks down the time of encoding on a CPU: by kind of work within a batch, and around the batches.

    python benchmarks/breakdown.py --size 80M --dtype bfloat16 --texts long

A batch is timed on one core, thunk by thunk, with JAX's profiler; the compiled program tells what each thunk does. The
release and the texts are those of encode.py.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from inputs import SIZES, TEXTS, read_texts, write_release
from tables import markdown

KINDS = {
    "projections": r"_proj/.*dot_general|[qk]_norm/reduce_sum",
    "attention": r"attention/(while/body/)?(reduce|dot_general|exp|sub|add|div|bk|kq)",
    "rotary positions, transpositions": r"attention/",
    "activation": r"mlp/(mul|down_proj|silu|jit\(silu\))",
    "norms, residual sums, the rest": r"",
}
"""{kind of work: pattern of the source of a thunk's instruction}; the first match counts."""


def main() -> None:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "f2llm_jax" / "benchmarks"
    data = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="80M")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--texts", choices=TEXTS, default="long")
    parser.add_argument("--count", type=int, default=200, help="how many texts")
    parser.add_argument("--data", type=Path, default=data)
    parser.add_argument("--cache", type=Path, default=cache)
    args = parser.parse_args()
    # One core, so that nothing runs at the same time as a thunk.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # JAX's profiler uses libtpu if it is installed, which crashes without a TPU.
    sys.modules["libtpu"] = None  # type: ignore[assignment]
    import jax

    import f2llm_jax
    from f2llm_jax.batching import BATCH_TOKENS

    jax.config.update("jax_enable_compilation_cache", False)
    release = write_release(args.cache / args.size, args.size, args.data / "qwen3-tokenizer")
    model = f2llm_jax.load(release, dtype=args.dtype)
    texts = read_texts(args.texts, args.count, args.data)

    start = time.perf_counter()
    ids = model.tokenizer.encode(texts, model.max_length)[0]
    tokenising = time.perf_counter() - start
    start = time.perf_counter()
    batches = list(model._batches(iter([ids]), "auto", BATCH_TOKENS["cpu"], model.max_length)[1])
    batching = time.perf_counter() - start
    model.encode(texts)
    start = time.perf_counter()
    model.encode(texts)
    total = time.perf_counter() - start
    tokens, padding = sum(map(len, ids)), sum(rows.padding for rows in batches)
    computed = sum(rows.batch.tokens_bt.size for rows in batches)
    kind = f"{len(texts)} {args.texts} texts of {tokens / len(texts):.0f} tokens"
    print(f"{args.size}, {args.dtype}, {kind}, one core:")
    print(f"{total:.2f} s, of which tokenising {tokenising / total:.1%} and batching {batching / total:.1%};")
    print(f"{computed} computed tokens, {padding / computed:.1%} of them padding, in {len(batches)} batches\n")

    shapes = Counter(rows.batch.tokens_bt.shape for rows in batches)
    shape = shapes.most_common(1)[0][0]
    batch = next(rows.batch for rows in batches if rows.batch.tokens_bt.shape == shape)
    milliseconds = profile(model, batch)
    whole = sum(milliseconds.values())
    print(f"a batch of {shape[0]} rows of {shape[1]} tokens, {whole:.1f} ms:\n")
    print(
        markdown(("", "ms", "share"), [(kind, f"{ms:.1f}", f"{ms / whole:.0%}") for kind, ms in milliseconds.items()])
    )


def profile(model: Any, batch: Any) -> dict[str, float]:
    """{kind of work: milliseconds} for one batch of an ``Encoder``."""
    import jax
    from jax.profiler import ProfileData

    compute, dim = model._layerwise, model.config.hidden_size
    sources = {
        program.removeprefix("HloModule ").partition(",")[0]: dict(
            re.findall(r"%([\w.-]+) = .*?op_name=\"([^\"]*)\"", program)
        )
        for program in compute.programs(batch)
    }
    times = 3
    compute(batch, dim).block_until_ready()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(times):
                compute(batch, dim).block_until_ready()
        data = ProfileData.from_file(str(next(Path(folder).rglob("*.xplane.pb"))))
    found = dict.fromkeys(KINDS, 0.0)
    for event in (event for plane in data.planes for line in plane.lines for event in line.events):
        name, module = event.name, dict(event.stats).get("hlo_module")
        # The time of a call or a loop is the sum of its contents, which are counted themselves.
        if module is None or name.startswith(("call", "while")):
            continue
        source = ""
        if module in sources:
            source = f"{name} {sources[module].get(name, 'attention/transpose' if 'transpose' in name else '')}"
        kind = next(kind for kind, pattern in KINDS.items() if re.search(pattern, source))
        found[kind] += event.duration_ns / 1e6 / times
    return found


if __name__ == "__main__":
    main()
