"""Markdown tables that are also readable in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], *, text: int | None = None) -> str:
    """A table with its columns aligned.

    Args:
        header, rows: the contents of the cells.
        text: number of columns from the left that are text; the others are numbers, aligned to the right. None for all.
    """
    lines = [header, *rows]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(header))]
    numbers = [text is not None and column >= text for column in range(len(header))]
    aligned = [
        [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numbers, strict=True)
        ]
        for line in lines
    ]
    rule = ["-" * (width - 1) + (":" if right else "-") for width, right in zip(widths, numbers, strict=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (aligned[0], rule, *aligned[1:]))
