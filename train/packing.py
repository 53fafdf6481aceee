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

from f2llm_jax.batching import PACKED_LENGTH, SHORT_ROW, Bucket, PackedRow, best_fit, fill_packed, round_rows, row_slots
from f2llm_jax.embedding import PackedBatch

# Of the number of rows, per doubling: an eighth more than needed at most, a sixteenth on average, and none up to 16. Of
# the lengths of fitted rows as well.
_STEPS = 8


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
    """The shapes that packed training batches may have.

    A program is compiled for each shape. The number of rows has eight steps per doubling, the slots of a row are a
    power of four: the texts of one dataset make a few shapes, and other datasets the same ones.

    Attributes:
        max_length: of a text.
        multiple: the rows of a batch are a multiple of it: devices that share a batch get equal parts.
        chunk_rows: rows computed at a time; more rows than these are a multiple of it. 0 for all at once.
        row_length: rows are of so many tokens, or for longer texts of a power of two times that.
        fitted: of eight lengths from half of that on instead, or shorter ones where a batch would not fill a row for
            each of ``multiple``: each batch in those that pad it least. For CPUs, where a row costs by its tokens.
    """

    max_length: int
    multiple: int = 1
    chunk_rows: int = 0
    row_length: int = PACKED_LENGTH
    fitted: bool = False

    def lengths(self, tokens: int, longest: int, processes: int = 1) -> list[int]:
        """The row lengths to choose from, ascending, for a batch of so many tokens, ``longest`` those of a text."""
        length = self.row_length
        while length < longest:
            length *= 2
        if not self.fitted:
            return [length]
        rows = math.lcm(self.multiple, processes)
        while length // 2 >= max(SHORT_ROW, longest, tokens / rows):
            length //= 2
        half = length // 2
        return [n for n in range(half, length + 1, half // _STEPS) if n >= longest]

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
        tokens = sum(int(lengths.sum()) for lengths in shares)
        longest = max(int(lengths.max()) for lengths in shares)
        plans = [self._plan(shares, length) for length in self.lengths(tokens, longest, len(shares))]
        return min(plans, key=lambda plan: plan.rows * plan.length)

    def _plan(self, shares: Sequence[np.ndarray], length: int) -> PackPlan:
        filled = [best_fit(lengths, length) for lengths in shares]
        rows = self.rows(len(shares) * max(map(len, filled)), len(shares))
        texts = max(len(row.texts) for share in filled for row in share)
        return PackPlan(rows, length, row_slots(length, texts, short=self.fitted), filled)


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
