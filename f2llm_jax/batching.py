"""Rows of static shape from texts of any length: length buckets, filled from the longest text down."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from f2llm_jax.embedding import Batch
from f2llm_jax.errors import InputError


class Bucket(NamedTuple):
    """The static shape of a batch; a program is compiled for each one used."""

    rows: int
    length: int


def bucket_lengths(max_length: int) -> tuple[int, ...]:
    """The row lengths: multiples of 8 up to 64, then eight (above 1,024: four) steps per doubling, up to max_length.

    A text of 64 tokens or more is so padded by at most an eighth (above 1,024: a quarter) of its length.
    """
    lengths = list(range(8, 64, 8))
    start = 64
    while start < max_length:
        step = start // (8 if start < 1024 else 4)
        lengths += range(start, 2 * start, step)
        start *= 2
    return (*(length for length in lengths if length < max_length), max_length)


class Buckets:
    """The shapes that batches may have.

    Attributes:
        lengths: the row lengths, ascending; the last is the longest text allowed.
        batch_tokens: rows · length of a full batch stays within it, unless one row per device is more.
        multiple: the number of rows is a multiple of it: devices that share a batch get equal parts.
    """

    def __init__(self, batch_tokens: int, max_length: int, multiple: int = 1):
        if batch_tokens < 1:
            raise InputError(f"batch_tokens must be positive, not {batch_tokens}")
        self.lengths = bucket_lengths(max_length)
        self.batch_tokens = batch_tokens
        self.multiple = multiple

    def full(self, tokens: int) -> Bucket:
        """The full bucket for texts of up to ``tokens`` tokens."""
        length = self.lengths[int(np.searchsorted(self.lengths, tokens))]
        rows = self.batch_tokens // length // self.multiple * self.multiple
        return Bucket(max(rows, self.multiple), length)

    def last(self, tokens: int, texts: int) -> Bucket:
        """A bucket for the few texts that are left: rows are a power of two times ``multiple``, at most the full."""
        bucket = self.full(tokens)
        rows = self.multiple
        while rows < texts:
            rows *= 2
        return bucket._replace(rows=min(rows, bucket.rows))

    def __len__(self) -> int:
        """How many shapes there are: the bound on the number of compilations."""
        shapes = set()
        for length in self.lengths:
            bucket = self.full(length)
            shapes |= {self.last(length, texts) for texts in (2**n for n in range(bucket.rows.bit_length() + 1))}
            shapes.add(bucket)
        return len(shapes)


class Rows(NamedTuple):
    """A batch, and which texts its first rows are; what follows them is padding."""

    batch: Batch
    texts: list[int]


def batched(sequences: Iterable[list[np.ndarray]], buckets: Buckets, pad_id: int) -> Iterator[Rows]:
    """Batches of texts of like length.

    Full batches are cut from the longest texts at hand; what does not fill one waits for the next chunk, so that a run
    has a single part-filled batch, its last.

    Args:
        sequences: the texts in chunks, each a list of int32 token arrays.
        buckets: the shapes.
        pad_id: fills the rest of rows, and rows without a text (those have length 1).

    Yields:
        Every text once, under its number in order of ``sequences``.
    """
    waiting: list[tuple[int, np.ndarray]] = []
    count = 0
    for chunk in sequences:
        waiting += enumerate(chunk, start=count)
        count += len(chunk)
        waiting.sort(key=lambda item: -len(item[1]))
        first = 0
        while first < len(waiting):
            bucket = buckets.full(len(waiting[first][1]))
            if first + bucket.rows > len(waiting):
                break
            yield _fill(bucket, waiting[first : first + bucket.rows], pad_id)
            first += bucket.rows
        waiting = waiting[first:]
    while waiting:
        bucket = buckets.last(len(waiting[0][1]), len(waiting))
        yield _fill(bucket, waiting[: bucket.rows], pad_id)
        waiting = waiting[bucket.rows :]


def _fill(bucket: Bucket, items: list[tuple[int, np.ndarray]], pad_id: int) -> Rows:
    tokens_bt = np.full(bucket, pad_id, np.int32)
    lengths_b = np.ones(bucket.rows, np.int32)
    for row, (_, ids) in enumerate(items):
        tokens_bt[row, : len(ids)] = ids
        lengths_b[row] = len(ids)
    return Rows(Batch(tokens_bt, lengths_b), [text for text, _ in items])
