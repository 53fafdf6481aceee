"""Training batches in packed rows: the shape of a batch, and the row of each text.

The shape of a batch depends on the lengths of all its texts. Every process knows the lengths of the whole global batch,
so all arrive at the same shape without communicating, and each fills its part of the rows with its own texts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from f2llm_jax.batching import Bucket
from f2llm_jax.embedding import PackedBatch
from f2llm_jax.packing import (
    PACKED_LENGTH,
    SHORT_ROW,
    PackedRow,
    best_fit,
    fill_packed,
    packed_length,
    round_rows,
    row_slots,
)
from f2llm_jax.ragged import block_size, windows

# Steps per doubling of the number of rows: at most an eighth more rows than needed, a sixteenth more on average, and
# none up to 16. Also those of the lengths of fitted rows from 256 on.
_STEPS = 8

# Scoring a query against this many keys costs as much as the rest of a token's computation, according to training steps
# of the 80M on two cores.
_KEYS = 250


class PackPlan(NamedTuple):
    """Where the texts of a global batch go.

    Attributes:
        rows: number of rows of all processes together.
        length: length of each row.
        slots: number of slots for texts per row.
        shares: the rows that each process fills, with the indices of its texts; may be fewer than its part of ``rows``.
    """

    rows: int
    length: int
    slots: int
    shares: list[list[PackedRow]]


@dataclasses.dataclass(frozen=True)
class TrainPacking:
    """The shapes that packed training batches may have.

    A program is compiled for each shape. The number of rows has eight steps per doubling, and the slots per row grow by
    a factor of four (``row_slots``), so the batches of a dataset have few shapes, and other datasets share them.

    Attributes:
        multiple: the number of rows is a multiple of this, so that devices that share a batch get equal parts.
        chunk_rows: rows computed at a time; a number of rows above this is a multiple of it. 0 for all at once.
        row_length: rows have this many tokens or, for longer texts, this times a power of two.
        fitted: instead choose, for each batch, the cheapest of the lengths 64, 128, 192, 256 and then eight per
            doubling, up to that length. For CPUs, where short rows are as fast as long ones.
    """

    multiple: int = 1
    chunk_rows: int = 0
    row_length: int = PACKED_LENGTH
    fitted: bool = False

    @classmethod
    def on(cls, platform: str, multiple: int = 1, chunk_rows: int = 0) -> TrainPacking:
        """The shapes that suit ``cpu``, ``gpu`` or ``tpu``."""
        return cls(multiple, chunk_rows, packed_length(platform), fitted=platform == "cpu")

    def lengths(self, longest: int) -> list[int]:
        """The row lengths to choose from, ascending, for a batch whose longest text has ``longest`` tokens."""
        length = self.row_length
        while length < longest:
            length *= 2
        if not self.fitted:
            return [length]
        lengths = {length}
        while (half := length // 2) >= max(SHORT_ROW, longest // 2):
            lengths |= {n for n in range(half, length, half // _STEPS if half >= 256 else 64) if n >= longest}
            length = half
        return sorted(lengths)

    def rows(self, at_least: int, processes: int = 1) -> int:
        """The number of rows of a batch that needs at least ``at_least``."""
        unit = math.lcm(self.multiple, processes)
        rows = round_rows(at_least, unit, steps=_STEPS)
        if self.chunk_rows and rows > self.chunk_rows:
            rows = round_rows(at_least, math.lcm(unit, self.chunk_rows), steps=_STEPS)
        return rows

    def plan(self, shares: Sequence[np.ndarray]) -> PackPlan:
        """The rows of a batch.

        Args:
            shares: the lengths of the texts of each process.
        """
        longest = max(int(lengths.max()) for lengths in shares)
        plans = [self._plan(shares, length) for length in self.lengths(longest)]
        return plans[0] if len(plans) == 1 else min(plans, key=functools.partial(_cost, shares))

    def _plan(self, shares: Sequence[np.ndarray], length: int) -> PackPlan:
        filled = [best_fit(lengths, length) for lengths in shares]
        rows = self.rows(len(shares) * max(map(len, filled)), len(shares))
        texts = max(len(row.texts) for share in filled for row in share)
        return PackPlan(rows, length, row_slots(length, texts, short=self.fitted), filled)


def _cost(shares: Sequence[np.ndarray], plan: PackPlan) -> float:
    """The cost of a batch on a CPU, in tokens: those of its rows, plus the scores that ``ragged`` computes."""
    size = block_size(plan.rows, plan.length)
    sizes = np.array(windows(size, plan.length, plan.rows * plan.length))
    block_starts = np.arange(0, plan.length, size)
    rows = [lengths[row.texts] for lengths, filled in zip(shares, plan.shares, strict=True) for row in filled]
    rows += [np.zeros(0, int)] * (plan.rows - len(rows))  # without a text: padding, which sees all padding before it
    keys = 0
    for lengths in rows:
        text_starts = np.cumsum([0, *lengths])
        firsts = text_starts[np.searchsorted(text_starts, block_starts, side="right") - 1]
        keys += sizes[np.searchsorted(sizes, block_starts + size - firsts)].sum()
    return plan.rows * plan.length + size * keys / _KEYS


def pack(plan: PackPlan, process: int, texts: Sequence[np.ndarray], pad_id: int) -> tuple[PackedBatch, Any]:
    """Fills a process's part of the rows.

    Args:
        plan: the plan of the global batch.
        process: the number of the process.
        texts: the tokens of its texts, in the order of the lengths given to ``plan``.
        pad_id: fills the rest of each row.

    Returns:
        The rows, and int32 [texts]: the slot of each text, numbered within these rows.
    """
    bucket = Bucket(plan.rows // len(plan.shares), plan.length)
    filled = fill_packed(plan.shares[process], bucket, plan.slots, texts, pad_id)
    slots = np.empty(len(texts), np.int32)
    slots[filled.texts] = filled.slots
    assert isinstance(filled.batch, PackedBatch)
    return filled.batch, slots
