"""The report on prepared data: JSON for programs, Markdown for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np


class TokenCounts:
    """A histogram of text lengths: the number of texts of each length in tokens."""

    def __init__(self) -> None:
        self._counts = np.zeros(1 << 16, np.int64)

    def add(self, lengths: np.ndarray) -> None:
        """Adds the lengths of texts, uint16 [texts]."""
        counts = np.bincount(lengths)
        self._counts[: len(counts)] += counts

    @property
    def texts(self) -> int:
        return int(self._counts.sum())

    def summary(self) -> dict[str, float]:
        """Sum, mean, median, 95th percentile and maximum; empty if there are no texts."""
        if not self.texts:
            return {}
        tokens = int(self._counts @ np.arange(len(self._counts)))
        ranked = np.cumsum(self._counts)
        return {
            "sum": tokens,
            "mean": round(tokens / self.texts, 2),
            "median": int(np.searchsorted(ranked, 0.5 * self.texts)),
            "p95": int(np.searchsorted(ranked, 0.95 * self.texts)),
            "max": int(np.flatnonzero(self._counts)[-1]),
        }


def write_report(report: dict[str, Any], folder: Path) -> None:
    text = json.dumps(report, indent=1, ensure_ascii=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    (folder / "report.md").write_text(_markdown(report), encoding="utf-8")


def totals(report: dict[str, Any]) -> dict[str, int]:
    """Sums over all datasets."""
    datasets = report["datasets"]
    keys = ("read", "capped", "kept", "train", "validation", "truncated_queries", "truncated_documents")
    sums = {key: sum(dataset[key] for dataset in datasets) for key in keys}
    return {**sums, "dropped": sum(sum(dataset["dropped"].values()) for dataset in datasets)}


def _markdown(report: dict[str, Any]) -> str:
    sums = totals(report)
    reasons: dict[str, int] = {}
    for dataset in report["datasets"]:
        for reason, count in dataset["dropped"].items():
            reasons[reason] = reasons.get(reason, 0) + count
    others = [f"{d['name']} ({d['layout']})" for d in report["datasets"] if d["layout"] != "released"]
    lines = [
        f"# Training data of stage {report['stage']}",
        "",
        f"{sums['read']:,} rows read from {len(report['datasets'])} datasets: {sums['kept']:,} kept "
        f"({sums['train']:,} to train, {sums['validation']:,} to validate), {sums['dropped']:,} dropped, "
        f"{sums['capped']:,} over the cap of {report['cap'] or 'none'}. {report['documents']:,} distinct documents.",
        "",
        f"Dropped: {', '.join(f'{reason} {count:,}' for reason, count in reasons.items())}.",
        f"Truncated to {report['max_length']:,} tokens: {sums['truncated_queries']:,} queries, "
        f"{sums['truncated_documents']:,} documents.",
        f"Sources of several datasets: {'; '.join(report['grouped_sources']) or 'none'}.",
        f"Other layouts: {', '.join(others) or 'none'}.",
        f"Excluded: {', '.join(report['excluded']) or 'none'}.",
        "",
        "| dataset | task | read | dropped | capped | train | validation | negatives | new documents "
        "| query tokens, mean / p95 / max | document tokens, mean / p95 / max | truncated |",
        "|---|---|" + "---:|" * 10,
    ]
    lines += map(_row, report["datasets"])
    return "\n".join(lines) + "\n"


def _row(dataset: dict[str, Any]) -> str:
    cells = [dataset["name"], dataset["task"], f"{dataset['read']:,}", f"{sum(dataset['dropped'].values()):,}"]
    cells += [f"{dataset[key]:,}" for key in ("capped", "train", "validation", "negatives", "new_documents")]
    cells += [_tokens(dataset["query_tokens"]), _tokens(dataset["document_tokens"])]
    cells += [f"{dataset['truncated_queries'] + dataset['truncated_documents']:,}"]
    return f"| {' | '.join(cells)} |"


def _tokens(summary: dict[str, float]) -> str:
    return f"{summary['mean']:.1f} / {summary['p95']} / {summary['max']}" if summary else "–"
