"""Training batches in packed rows: the shape of a batch, and which text lies in which row.

The lengths of all its texts decide the shape of a batch. Every process knows those of the whole batch, so that all come
to the same shape without a word, and each fills its part of the rows with its own texts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from f2llm_jax.attention import QUERY_BLOCK
from f2llm_jax.batching import PACKED_LENGTH, SHORT_ROW, Bucket, PackedRow, best_fit, fill_packed, round_rows, row_slots
from f2llm_jax.embedding import PackedBatch

# Of the number of rows, per doubling: an eighth more than needed at most, a sixteenth on average, and none up to 16.
_STEPS = 8

# Keys that a query can see, in a row, for what a token costs beside: 480 in float32 and 250 in bfloat16, by training
# steps of the 80M on two cores.
_KEYS = 400


class PackPlan(NamedTuple):
    """Where the texts of a global batch go.

    Attributes:
        rows: of all processes together.
        length: of each row.
        slots: for texts, of each row.
        shares: the rows that each process fills, with the numbers of its texts; there may be fewer than its part.
    """

    rows: int
    length: int
    slots: int
    shares: list[list[PackedRow]]


@dataclasses.dataclass(frozen=True)
class TrainPacking:
    """The shapes that packed training batches may have: one row length on accelerators, a few on CPUs.

    A program is compiled for each shape. The number of rows has eight steps per doubling, the slots of a row are a
    power of four: the texts of one dataset make a few shapes, and other datasets the same ones.

    Attributes:
        max_length: of a text.
        multiple: the rows of a batch are a multiple of it: devices that share a batch get equal parts.
        chunk_rows: rows computed at a time; more rows than these are a multiple of it. 0 for all at once.
        row_length: rows are of so many tokens, or for longer texts of a power of two times that.
        short_rows: rows of 64, 128, 192, 256, 384, … tokens instead, for CPUs: each batch in those that cost least.
    """

    max_length: int
    multiple: int = 1
    chunk_rows: int = 0
    row_length: int = PACKED_LENGTH
    short_rows: bool = False

    @property
    def lengths(self) -> list[int]:
        """The row lengths, ascending; the last holds any text."""
        powers = [SHORT_ROW if self.short_rows else self.row_length]
        while powers[-1] < max(self.max_length, self.row_length):
            powers.append(2 * powers[-1])
        between = [3 * length // 2 for length in powers[1:-1]] if self.short_rows else []
        return sorted(powers + between)

    def rows(self, at_least: int, processes: int = 1) -> int:
        """The number of rows of a batch that needs so many."""
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
        longest = max(lengths.max() for lengths in shares)
        fitting = [length for length in self.lengths if length >= longest]
        plans = [self._plan(shares, length) for length in (fitting if self.short_rows else fitting[:1])]
        return min(plans, key=_cost)

    def _plan(self, shares: Sequence[np.ndarray], length: int) -> PackPlan:
        filled = [best_fit(lengths, length) for lengths in shares]
        rows = self.rows(len(shares) * max(map(len, filled)), len(shares))
        texts = max(len(row.texts) for share in filled for row in share)
        return PackPlan(rows, length, row_slots(length, texts, short=self.short_rows), filled)


def _cost(plan: PackPlan) -> float:
    """Of a batch on a CPU, in tokens: ``attention.blocked`` scores a block of queries against all that stand before."""
    keys = plan.length if plan.length < QUERY_BLOCK else (plan.length + QUERY_BLOCK) / 2
    return plan.rows * plan.length * (1 + keys / _KEYS)


def pack(plan: PackPlan, process: int, texts: Sequence[np.ndarray], pad_id: int) -> tuple[PackedBatch, Any]:
    """A process's part of the rows, filled.

    Args:
        plan: of the global batch.
        process: which part.
        texts: the tokens of its texts, in the order of the lengths that were planned with.
        pad_id: fills what is left of rows.

    Returns:
        The rows, and int32 [texts]: the slot of each text, counted through these rows.
    """
    bucket = Bucket(plan.rows // len(plan.shares), plan.length)
    filled = fill_packed(plan.shares[process], bucket, plan.slots, texts, pad_id)
    slots = np.empty(len(texts), np.int32)
    slots[filled.texts] = filled.slots
    assert isinstance(filled.batch, PackedBatch)
    return filled.batch, slots
