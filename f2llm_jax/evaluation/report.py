"""Formats a report as a table, as JSON and as a plot."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from f2llm_jax.display import width
from f2llm_jax.evaluation import optional
from f2llm_jax.evaluation.embedders import SENTENCE_TRANSFORMERS
from f2llm_jax.evaluation.own_data import Report
from f2llm_jax.files import new_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

# Maximum length of a model's name in a table or a legend; of a longer one, such as a path, the end (and st:) is kept.
_NAME_LENGTH = 40

# Line and marker show the output, the colour shows the model; with only one model, the colour shows the output too.
_STYLES = {"float32": ("-", "o"), "int8": ("--", "s"), "binary": (":", "v"), "rescored": ("-.", "^")}

_TITLES = {"ndcg@10": "nDCG@10", "accuracy": "accuracy"}


def table(report: Report) -> str:
    """The scores as aligned text, one line per model, output and size; then each model's prompts, if they differ."""
    lines = [["model", "dtype", "output", "dim", "bytes", *report.metrics]]
    for row in report.rows:
        scores = [f"{row.scores[metric]:.4f}" for metric in report.metrics]
        lines.append([_short(row.model), row.dtype, row.output, str(row.dim), f"{row.bytes_per_vector:,}", *scores])
    columns = [max(map(width, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join(
            cell + " " * (size - width(cell)) if number < 3 else cell.rjust(size)
            for number, (cell, size) in enumerate(zip(line, columns, strict=True))
        )
        for line in lines
    ]
    return "\n".join(aligned + _different_prompts(report))


def _different_prompts(report: Report) -> list[str]:
    """One line per model with its prompts; none if all models have the same prompts."""
    if len({tuple(prompts.items()) for prompts in report.prompts.values()}) < 2:
        return []
    return [
        f"prompts of {_short(model)}: "
        + ", ".join(f"{role} {prompt!r}" if prompt else f"{role} none" for role, prompt in prompts.items())
        for model, prompts in report.prompts.items()
    ]


def write_json(report: Report, file: Path) -> None:
    """Writes the whole report, with the keys named as in ``Report`` and ``Row``."""
    with new_file(file) as stream:
        stream.write((json.dumps(dataclasses.asdict(report), indent=2, ensure_ascii=False) + "\n").encode())


def plot(report: Report, file: Path) -> None:
    """Writes a PNG: the main metric against the dimension, with the bytes of a float32 vector on a second axis.

    If there are outputs other than float32, a second panel shows the metric against the bytes per vector.
    """
    optional("matplotlib")
    from matplotlib.figure import Figure

    by_bytes = any(row.output != "float32" for row in report.rows)
    figure = Figure(figsize=(12 if by_bytes else 7, 5), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2 if by_bytes else 1, sharey=True, squeeze=False)[0]
    dims = sorted({row.dim for row in report.rows})
    _draw(panels[0], report, "dim")
    panels[0].set_xlabel("dimensions")
    panels[0].set_ylabel(_TITLES[report.metrics[0]])
    _ticks(panels[0].xaxis, dims)
    top = panels[0].secondary_xaxis("top", functions=(lambda dim: 4 * dim, lambda size: size / 4))
    top.set_xlabel("bytes per float32 vector")
    _ticks(top.xaxis, [4 * dim for dim in dims])
    if by_bytes:
        _draw(panels[1], report, "bytes_per_vector")
        panels[1].set_xlabel("bytes per vector")
        _ticks(panels[1].xaxis, sorted({row.bytes_per_vector for row in report.rows}))
    sizes = ", ".join(f"{count:,} {name}" for name, count in report.sizes.items())
    figure.suptitle(f"{report.task}: {_short(report.data)} ({sizes})", fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4 if by_bytes else 2, frameon=False)
    with new_file(file) as stream:
        figure.savefig(stream, format="png")


def _draw(axes: Axes, report: Report, x: str) -> None:
    metric = report.metrics[0]
    models = list(dict.fromkeys(row.model for row in report.rows))
    for model, output in dict.fromkeys((row.model, row.output) for row in report.rows):
        rows = [row for row in report.rows if (row.model, row.output) == (model, output)]
        line, marker = _STYLES[output]
        colour = models.index(model) if len(models) > 1 else list(_STYLES).index(output)
        axes.plot(
            [getattr(row, x) for row in rows],
            [row.scores[metric] for row in rows],
            color=f"C{colour % 10}",
            linestyle=line,
            marker=marker,
            label=f"{_short(model)}, {output}",
        )
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)


def _ticks(axis: Axis, values: Sequence[int]) -> None:
    """Sets ticks at the largest value and, going down, at those at least a factor 1.4 below the previous tick."""
    kept: list[int] = []
    for value in sorted(values, reverse=True):
        if not kept or kept[-1] >= 1.4 * value:
            kept.append(value)
    axis.set_ticks(kept, [f"{value:,}" for value in kept])
    axis.set_minor_locator(optional("matplotlib.ticker").NullLocator())


def _short(name: str) -> str:
    if len(name) <= _NAME_LENGTH:
        return name
    start = SENTENCE_TRANSFORMERS + "…" if name.startswith(SENTENCE_TRANSFORMERS) else "…"
    return start + name[len(start) - _NAME_LENGTH :]
