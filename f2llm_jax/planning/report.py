"""Formats a plan as text and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from f2llm_jax.configs.datasets import NEGATIVES
from f2llm_jax.model import count_parameters
from f2llm_jax.plan import Plan
from f2llm_jax.planning.chips import GIB
from f2llm_jax.planning.counts import value_size
from f2llm_jax.planning.hlo import Collective, total_by_kind
from f2llm_jax.planning.jobs import Job, TrainJob

BOUNDS = {"compute": "arithmetic", "hbm": "HBM traffic", "ici": "exchange between chips (ICI)"}


def describe(plan: Plan) -> str:
    """The plan as lines of text."""
    job, chip, memory = plan.job, plan.topology.chip, plan.memory
    device = "chip" if chip.devices == 1 else f"device, {chip.devices} to a chip"
    batch = ""
    if isinstance(job, TrainJob):
        queries = job.recipe.data.batch_size
        batch = f", batches of {queries} queries, each with a passage and {job.negatives} negatives"
    rows = f", {job.texts_per_row} in a row of {job.row_length:,} ({job.padding:.1%} padding)"
    lines = [
        f"{job.do} {count_parameters(job.config):,} parameters on {plan.topology.name}: "
        f"{plan.topology.size} devices {chip.kind}, mesh {plan.mesh}",
        f"texts of {job.length:,} tokens{batch}{rows}, {plan.batch_tokens:,} tokens at a time",
        *_other_batches(job),
        "",
        f"memory per {device}, GiB (as compiled)",
        *(_row(name, nbytes / GIB) for name, nbytes in memory.state.items()),
    ]
    if memory.refused is None:
        rest = memory.arguments - sum(memory.state.values())
        lines += [
            _row("batch and padding", rest / GIB),
            _row("activations, temporaries", memory.temporaries / GIB),
            _row("results and code", (memory.results + memory.code) / GIB),
        ]
    verdict = "fits" if plan.fits else "does NOT fit"
    lines += [_row("total", memory.total / GIB) + f" of {memory.limit / GIB:.2f}: {verdict}", ""]
    lines += _speed(plan)
    if len(plan.tried) > 1:
        lines += ["", "compiled, in this order"]
        lines += [
            f"  {x.mesh}, {x.batch_tokens:,} tokens at a time: {x.memory_bytes / GIB:.2f} GiB"
            f"{'' if x.fits else ', does not fit'}"
            for x in plan.tried
        ]
    return "\n".join(lines)


def _other_batches(job: Job) -> list[str]:
    most = max(NEGATIVES, key=lambda task: NEGATIVES[task])
    if not isinstance(job, TrainJob) or job.negatives >= NEGATIVES[most]:
        return []
    return [
        f"batches of {most} have {NEGATIVES[most]} negatives a query: they take longer, and all at once more memory"
    ]


def _speed(plan: Plan) -> list[str]:
    work, chip = plan.work, plan.topology.chip
    lines = [f"a step per device                     {'':10}seconds (estimates)"]
    if work is None:
        lines += [_step(BOUNDS[name], "", seconds) for name, seconds in plan.seconds.items()]
        why = "libtpu does not show it" if plan.fits else "it does not fit"
        lines += [f"  all from the sizes, nothing counted in the program, its collectives not listed: {why}"]
    else:
        lines += [
            _step(
                f"arithmetic at {_rates(plan)} TFLOP/s",
                f"{work.flops / 1e12:,.2f} TFLOP",
                plan.seconds["compute"],
            ),
            _step(
                f"HBM at {chip.hbm_bandwidth / 1e9:.0f} GB/s",
                f"{work.program_hbm_bytes / 1e9:,.1f} GB",
                plan.seconds["hbm"],
            ),
            _step("ICI", f"{work.ici_bytes / 1e9:,.2f} GB", plan.seconds["ici"]),
        ]
    lines += [
        f"bound by {BOUNDS[plan.bound]}; at the most {plan.tokens_per_second:,.0f} tokens/s, "
        f"{plan.texts_per_second:,.1f} texts/s (estimate)",
    ]
    if work is None:
        return lines
    lines += [
        "",
        "counted twice",
        f"  matrix products in the program, loops by their trips, over those of the sizes: {work.flops_ratio:.4f}",
        f"  the same with loop bodies once, over the compiler's cost analysis:             {work.compiler_ratio:.4f}",
        f"  HBM traffic of the program over that estimated from the sizes:                {work.hbm_ratio:.2f}",
    ]
    if work.kernel_flops:
        lines += [f"  inside Pallas kernels, where neither sees it: {work.kernel_flops / 1e12:,.2f} TFLOP (attention)"]
    if work.unknown_loops:
        lines += [f"  counted once, for their trips could not be read: {', '.join(work.unknown_loops)}"]
    if plan.collectives:
        lines += ["", "collectives of a step per device"]
        for kind, (times, nbytes) in total_by_kind(plan.collectives).items():
            lines += [f"  {kind:20}{times:8,} times {nbytes / 1e9:12,.3f} GB"]
        lines += ["  largest:", *_largest(plan.collectives)]
    return lines


def _rates(plan: Plan) -> str:
    """TFLOP/s of the products; with int8, those of attention and of the projections."""
    sizes = {value_size(plan.job.itemsize), plan.job.itemsize}
    return " to ".join(f"{rate / 1e12:.0f}" for rate in sorted({plan.topology.chip.rate(size) for size in sizes}))


def _largest(collectives: Sequence[Collective], count: int = 4) -> list[str]:
    ordered = sorted(collectives, key=lambda x: -x.sent_bytes)[:count]
    return [
        f"    {x.kind} of {x.nbytes / 1e6:,.1f} MB over {x.groups.shape[1]}, {x.times:,} times, for {_brief(x.source)}"
        for x in ordered
    ]


def _brief(source: str) -> str:
    parts = [part for part in source.split("/") if part not in ("while", "body", "closed_call", "checkpoint", "layers")]
    return "/".join(parts[-3:])


def _row(name: str, gib: float) -> str:
    return f"  {name:26}{gib:10.2f}"


def _step(name: str, amount: str, seconds: float) -> str:
    return f"  {name:34}{amount:>14}{seconds:10.3f}"


def to_json(plan: Plan) -> str:
    """The plan as a JSON object."""
    return json.dumps(to_dict(plan), indent=1)


def to_dict(plan: Plan) -> dict[str, object]:
    """The plan as plain values: bytes, FLOPs, seconds, per device and step unless the name says otherwise."""
    job, memory, work = plan.job, plan.memory, plan.work
    return {
        "do": job.do,
        "parameters": count_parameters(job.config),
        "topology": plan.topology.name,
        "devices": plan.topology.size,
        "device_kind": plan.topology.chip.kind,
        "mesh": plan.mesh._asdict(),
        "length": job.length,
        "row_length": job.row_length,
        "texts_per_row": job.texts_per_row,
        "padding": job.padding,
        "batch_tokens": plan.batch_tokens,
        "texts_per_step": plan.texts,
        "fits": plan.fits,
        "memory": {
            **{name: getattr(memory, name) for name in ("state", "arguments", "temporaries", "results", "code")},
            "total": memory.total,
            "limit": memory.limit,
        },
        "work": None
        if work is None
        else {
            **dataclasses.asdict(work),
            **{name: getattr(work, name) for name in ("flops_ratio", "compiler_ratio", "hbm_ratio")},
        },
        "collectives": {
            kind: {"times": times, "bytes": nbytes} for kind, (times, nbytes) in total_by_kind(plan.collectives).items()
        },
        "estimates": {
            "seconds": plan.seconds,
            "bound": plan.bound,
            "tokens_per_second": plan.tokens_per_second,
            "texts_per_second": plan.texts_per_second,
        },
        "tried": [{**dataclasses.asdict(x), "mesh": x.mesh._asdict()} for x in plan.tried],
    }
