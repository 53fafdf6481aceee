"""Batches of static shape from texts of any length, one text per row: rows in length buckets, longest texts first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from f2llm_jax.embedding import AnyBatch, Batch, PackedBatch
from f2llm_jax.errors import InputError

BATCH_TOKENS = {"cpu": 512, "gpu": 32768, "tpu": 32768}
"""Tokens per full batch and device. Few suffice to keep a CPU core's matrix units busy; more only spill its cache."""


class Bucket(NamedTuple):
    """The static shape of a batch; a program is compiled for each one used."""

    rows: int
    length: int


def bucket_lengths(max_length: int) -> tuple[int, ...]:
    """The row lengths: multiples of 8 up to 64, then eight (above 1,024: four) steps per doubling, up to max_length.

    So a text of 64 tokens or more is padded by at most an eighth (above 1,024: a quarter) of its length.
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
        batch_tokens: limit on rows · length of a full batch, unless one row per device already exceeds it.
        multiple: the number of rows is a multiple of this, so that devices that share a batch get equal parts.
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
        """The bucket for the last few texts: a power of two times ``multiple`` rows, at most those of the full one."""
        bucket = self.full(tokens)
        rows = self.multiple
        while rows < texts:
            rows *= 2
        return bucket._replace(rows=min(rows, bucket.rows))

    def __len__(self) -> int:
        """The number of shapes, which bounds the number of compilations."""
        shapes = set()
        for length in self.lengths:
            bucket = self.full(length)
            shapes |= {self.last(length, texts) for texts in (2**n for n in range(bucket.rows.bit_length() + 1))}
            shapes.add(bucket)
        return len(shapes)


class Rows(NamedTuple):
    """A batch, and the texts that it holds.

    Attributes:
        batch: the rows.
        texts: the indices of the texts.
        slots: where each text's result is: its row in a ``Batch``, row · slots per row + slot in a ``PackedBatch``.
        tokens: the number of tokens of these texts, a shared prefix counted for each.
    """

    batch: AnyBatch
    texts: list[int]
    slots: np.ndarray
    tokens: int

    @property
    def padding(self) -> int:
        """The number of tokens of the batch that belong to no text."""
        if isinstance(self.batch, PackedBatch):
            return int(np.count_nonzero(self.batch.segment_ids_bt == 0))
        return self.batch.tokens_bt.size - self.tokens


def batched(sequences: Iterable[list[np.ndarray]], buckets: Buckets, pad_id: int) -> Iterator[Rows]:
    """Groups texts of similar length into batches.

    Full batches are taken from the longest texts available; what does not fill one waits for the next chunk, so that
    only the last batch of a run is partly filled.

    Args:
        sequences: the texts in chunks, each a list of int32 token arrays.
        buckets: the shapes.
        pad_id: fills the rest of each row, and rows without a text (which have length 1).

    Yields:
        Every text once, identified by its index over all chunks.
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
    batch = make_batch([ids for _, ids in items], bucket.length, rows=bucket.rows, pad_id=pad_id)
    tokens = int(batch.lengths_b[: len(items)].sum())
    return Rows(batch, [text for text, _ in items], np.arange(len(items)), tokens)


def make_batch(
    sequences: Sequence[np.ndarray | Sequence[int]],
    length: int | None = None,
    *,
    rows: int | None = None,
    pad_id: int = 0,
) -> Batch:
    """A batch of NumPy arrays, one text per row.

    Args:
        sequences: the token ids of each text, EOS last, as ``Tokenizer.encode`` gives them.
        length: row length; default: that of the longest text. A program is compiled for each shape.
        rows: number of rows; those without a text come last and have length 1. Default: one per text.
        pad_id: fills the rest of each row; no embedding depends on it.

    Raises:
        InputError: a text has no tokens, or there are more tokens or texts than fit.
    """
    lengths = [len(ids) for ids in sequences]
    length = max(lengths, default=1) if length is None else length
    rows = len(lengths) if rows is None else rows
    if len(lengths) > rows:
        raise InputError(f"{rows} rows hold as many texts at most, not {len(lengths)}")
    if not all(1 <= tokens <= length for tokens in lengths):
        found = f"{min(lengths)} to {max(lengths)}"
        raise InputError(f"rows of {length} hold texts of 1 to {length} tokens, not of {found}")
    tokens_bt = np.full((rows, length), pad_id, np.int32)
    lengths_b = np.ones(rows, np.int32)
    lengths_b[: len(lengths)] = lengths
    for row, ids in zip(tokens_bt, sequences, strict=False):
        row[: len(ids)] = ids
    return Batch(tokens_bt, lengths_b)
