"""Packed rows, many texts in each, separated by segment ids: long on accelerators, as short as their texts on CPUs.

If all texts begin alike, as they do after a prompt, each row stores their common prefix once.
"""

from __future__ import annotations

import bisect
import copy
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from f2llm_jax.batching import Bucket, Buckets, Rows, batched, bucket_lengths
from f2llm_jax.embedding import PackedBatch
from f2llm_jax.errors import InputError
from f2llm_jax.segments import PREFIX

PACKED_LENGTH = 1024
"""Length of a packed row on TPUs. Longer rows have less padding, but compute more scores, of which only those within
a text count."""

GPU_PACKED_LENGTH = 512
"""Length of a packed row on GPUs, and the maximum for training batches on CPUs: cuDNN computes every score under the
diagonal. On an H100, the attention of one layer of the 0.6B over 32,768 tokens takes 0.65 ms in rows of 1,024 and 0.33
ms in rows of 256; the layer's other work takes 2.5 ms."""

SHORT_ROW = 64
"""Minimum length of a packed row on CPUs: a few ordinary sentences nearly fill it, and its scores cost little."""

_BATCH_COST = 48
"""The fixed cost of a batch, in tokens: every program reads all weights once. Derived from the speeds at 128 and 1,024
tokens per batch, it is 29 for the 80M in float32 and 90 in bfloat16, 40 and 62 for the 0.6B."""


PREFIXED_ROW = 192
"""Length of a packed row on CPUs whose texts share a prefix. In float32, the 80M and the 330M encode questions after a
prompt of 18 tokens 1.7, 1.9, 2.0, 2.3 and 2.1 times as fast as without sharing, in rows of 64, 96, 128, 192 and 240."""

_LEAST_PREFIX = 8
"""Minimum length of a common prefix, in tokens, for rows to store it once."""

_NO_TOKENS = np.zeros(0, np.int32)


class Packing:
    """The shapes that packed batches may have.

    On accelerators, row lengths are ``row_length``, twice that, and so on. With ``short_rows``, for CPUs, a row is just
    long enough for the longest of its texts (but at least ``SHORT_ROW``), and shorter texts fill the rest.

    Attributes:
        lengths: the row lengths, ascending; a text opens a row of the smallest length that it fits in.
        last_lengths: the row lengths of the last batches, whose rows are trimmed to their texts.
        batch_tokens: limit on rows · length of a full batch, unless one row per device already exceeds it.
        multiple: the number of rows is a multiple of this, so that devices that share a batch get equal parts.
        short_rows: as above.
        prefixed_length: the length of a row whose texts share a prefix; 0 if texts may not share one.
        prefix_t: int32, the shared prefix that every row, and each of its texts, begins with.
    """

    def __init__(
        self,
        batch_tokens: int,
        max_length: int,
        multiple: int = 1,
        *,
        row_length: int = PACKED_LENGTH,
        short_rows: bool = False,
        prefixed_length: int = 0,
    ):
        if batch_tokens < 1:
            raise InputError(f"batch_tokens must be positive, not {batch_tokens}")
        if short_rows:
            self.last_lengths = bucket_lengths(max_length)
            self.lengths = tuple(n for n in self.last_lengths if n >= min(SHORT_ROW, max_length))
        else:
            longest = math.ceil(max_length / row_length) * row_length
            lengths = [row_length]
            while lengths[-1] < longest:
                lengths.append(min(2 * lengths[-1], longest))
            self.lengths = self.last_lengths = tuple(lengths)
        self.batch_tokens = batch_tokens
        self.multiple = multiple
        self.short_rows = short_rows
        self.prefixed_length = prefixed_length
        self.prefix_t = _NO_TOKENS

    @classmethod
    def on(
        cls, platform: str, batch_tokens: int, max_length: int, multiple: int = 1, *, longest_prefixed: int = 0
    ) -> Packing:
        """The shapes that suit ``cpu``, ``gpu`` or ``tpu``.

        Args:
            platform: where batches are computed.
            batch_tokens, max_length, multiple: as above.
            longest_prefixed: the longest row whose texts may share a prefix, see ``attention.longest_prefixed_row``.
        """
        short_rows, row_length = platform == "cpu", packed_length(platform)
        prefixed_length = PREFIXED_ROW if short_rows else row_length
        return cls(
            batch_tokens,
            max_length,
            multiple,
            row_length=row_length,
            short_rows=short_rows,
            prefixed_length=prefixed_length if prefixed_length <= longest_prefixed else 0,
        )

    def prefixed(self, prefix_t: np.ndarray) -> Packing:
        """The shapes for rows that begin with a prefix."""
        packing = copy.copy(self)
        packing.prefix_t = prefix_t
        packing.lengths = (self.prefixed_length,)
        packing.last_lengths = bucket_lengths(self.prefixed_length) if self.short_rows else packing.lengths
        return packing

    def shares(self, text_t: np.ndarray) -> bool:
        """Whether a text begins with the prefix, if there is one, and a row has room for two such texts."""
        prefix, own = len(self.prefix_t), len(text_t) - len(self.prefix_t)
        if prefix == 0 or not 0 < own <= (self.prefixed_length - prefix) // 2:
            return False
        return np.array_equal(text_t[:prefix], self.prefix_t)

    def rows(self, length: int) -> int:
        """The number of rows of a full batch."""
        return max(self.batch_tokens // length // self.multiple, 1) * self.multiple

    def last_rows(self, length: int, rows: int) -> int:
        """The number of rows of a batch for ``rows`` leftover ones: eight steps per doubling, times ``multiple``.

        Two steps for short rows, which come in many lengths: a program is compiled for each number that occurs.
        """
        return min(self.rows(length), round_rows(rows, self.multiple, steps=2 if self.short_rows else 8))

    def last_length(self, tokens: int) -> int:
        """The row length of a batch whose fullest row has ``tokens`` tokens."""
        return self.last_lengths[bisect.bisect_left(self.last_lengths, tokens)]

    def slots(self, length: int, texts: int) -> int:
        """The number of slots for texts per row; hardly any short row needs more than the minimum."""
        return row_slots(length, texts, short=self.short_rows)


def row_slots(length: int, texts: int, *, short: bool) -> int:
    """The number of slots for at most ``texts`` texts per row: a power of four, times 16 if short (32 from 128 tokens).

    Few slots, because the last layer computes all of them; few distinct numbers, as a program is compiled for each.
    """
    slots = (32 if length >= 128 else 16) if short else 1
    while slots < texts:
        slots *= 4
    return min(slots, length)


def packed_length(platform: str) -> int:
    """``row_length`` for ``gpu`` and ``tpu``, and for training on ``cpu``, where longer rows waste hardly less."""
    return PACKED_LENGTH if platform == "tpu" else GPU_PACKED_LENGTH


def round_rows(rows: int, multiple: int, *, steps: int) -> int:
    """A number of rows, rounded up to ``steps`` steps per doubling, times ``multiple``."""
    parts = math.ceil(rows / multiple)
    step = max(_power_of_two(parts) // (2 * steps), 1)
    return multiple * math.ceil(parts / step) * step


class PackedRow:
    """A row that is being filled.

    Attributes:
        length: its length in tokens.
        free: the number of tokens not yet taken by a prefix or a text.
        texts: the indices of its texts.
    """

    def __init__(self, length: int, prefix: int = 0):
        self.length = length
        self.free = length - prefix
        self.texts: list[int] = []

    @property
    def tokens(self) -> int:
        return self.length - self.free


def best_fit(lengths: Sequence[int] | np.ndarray, row_length: int) -> list[PackedRow]:
    """Packs texts of these lengths, none longer than a row, into rows of one length (best fit decreasing)."""
    rows: dict[int, list[PackedRow]] = {row_length: []}
    open_rows: list[PackedRow] = []
    for text in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        _place(text, int(lengths[text]), rows, open_rows)
    return rows[row_length]


def choose_layout(layout: str, platform: str, chunk: list[np.ndarray], buckets: Buckets, packing: Packing) -> str:
    """The layout for texts like these: the one requested, or for "auto" the one that suits the platform best.

    On CPUs that is packed, in short rows: hardly any token is padding, and hardly any score spans two texts. On
    accelerators it is the one that computes fewer tokens: packed rows are long there, and win unless there are only a
    few short texts.

    Args:
        layout: "auto", "bucketed" or "packed".
        platform: ``cpu``, ``gpu`` or ``tpu``.
        chunk: a sample of the texts, as token arrays.
        buckets, packing: the shapes of the two layouts.

    Raises:
        InputError: no such layout.
    """
    if layout not in ("auto", "bucketed", "packed"):
        raise InputError(f"no layout {layout!r}; there are auto, bucketed, packed")
    if layout != "auto":
        return layout
    if platform == "cpu":
        return "packed"
    in_buckets = sum(rows.batch.tokens_bt.size for rows in batched([chunk], buckets, 0))
    in_packs = sum(rows.batch.tokens_bt.size for rows in packed([chunk], packing, 0))
    return "packed" if in_packs <= in_buckets else "bucketed"


def packed(sequences: Iterable[list[np.ndarray]], packing: Packing, pad_id: int) -> Iterator[Rows]:
    """Packs many texts into each row, and rows into batches.

    If all texts of the first chunk begin alike, texts with that prefix go into rows that store it once.

    The texts of a chunk are placed longest first, each into the fullest row that it fits in (best fit decreasing). Rows
    stay open across chunks: of each length, the emptiest ones, fewer than two batches of them, wait for texts that fill
    them. Short rows left at the end are batched for the least computation: rows of different lengths share a batch if
    the padding costs less than a separate batch.

    Args:
        sequences: the texts in chunks, each a list of int32 token arrays.
        packing: the shapes.
        pad_id: fills the rest of each row.

    Yields:
        Every text once, identified by its index over all chunks. A program is compiled for each combination of rows,
        length and slots that occurs.
    """
    sequences = iter(sequences)
    first = next(sequences, [])
    prefix_t = common_prefix(first, packing.prefixed_length)
    plain = _Packer(packing, pad_id)
    prefixed = _Packer(packing.prefixed(prefix_t), pad_id) if len(prefix_t) else plain
    count = 0
    for chunk in itertools.chain([first], sequences):
        texts: dict[_Packer, dict[int, np.ndarray]] = {prefixed: {}, plain: {}}
        for number, ids in enumerate(chunk, start=count):
            texts[prefixed if prefixed.packing.shares(ids) else plain][number] = ids
        count += len(chunk)
        for packer, its in texts.items():
            yield from packer.add(its)
    for packer in texts:
        yield from packer.rest()


def common_prefix(texts: Sequence[np.ndarray], most: int) -> np.ndarray:
    """The longest common prefix of at most ``most`` tokens, shorter than any text; empty below ``_LEAST_PREFIX``."""
    if len(texts) < 2:
        return _NO_TOKENS
    length = min(most, *(len(ids) - 1 for ids in texts))
    beginnings_nt = np.stack([ids[:length] for ids in texts])
    alike_t = np.append((beginnings_nt == beginnings_nt[0]).all(axis=0), False)
    prefix_t = beginnings_nt[0, : np.argmin(alike_t)]
    return prefix_t if len(prefix_t) >= _LEAST_PREFIX else _NO_TOKENS


class _Packer:
    """Collects texts into full batches."""

    def __init__(self, packing: Packing, pad_id: int):
        self.packing = packing
        self._pad_id = pad_id
        self._waiting: dict[int, list[PackedRow]] = {length: [] for length in packing.lengths}
        self._open_rows: list[PackedRow] = []  # rows with free tokens, the fullest first
        self._texts: dict[int, np.ndarray] = {}  # the texts of waiting rows, without the prefix

    def add(self, texts: Mapping[int, np.ndarray]) -> Iterator[Rows]:
        """Adds texts, {index: tokens}; yields the batches that they fill."""
        prefix = len(self.packing.prefix_t)
        for text, ids in sorted(texts.items(), key=lambda item: -len(item[1])):
            self._texts[text] = ids[prefix:]
            _place(text, len(ids) - prefix, self._waiting, self._open_rows, prefix)
        for length, rows in self._waiting.items():
            rows.sort(key=lambda row: row.free)
            batch = self.packing.rows(length)
            while len(rows) >= 2 * batch:
                yield self._batch_of(rows[:batch], Bucket(batch, length))
                del rows[:batch]
        with_room = (row for row in itertools.chain(*self._waiting.values()) if row.free)
        self._open_rows = sorted(with_room, key=lambda row: row.free)

    def rest(self) -> Iterator[Rows]:
        """Yields batches of the remaining rows."""
        last_batches = _cheapest_batches if self.packing.short_rows else _batches_by_length
        for rows, bucket in last_batches(self._waiting, self.packing):
            yield self._batch_of(rows, bucket)

    def _batch_of(self, rows: list[PackedRow], bucket: Bucket) -> Rows:
        slots = self.packing.slots(bucket.length, max(len(row.texts) for row in rows))
        texts = {text: self._texts.pop(text) for row in rows for text in row.texts}
        return fill_packed(rows, bucket, slots, texts, self._pad_id, self.packing.prefix_t)


def _batches_by_length(
    waiting: dict[int, list[PackedRow]], packing: Packing
) -> Iterator[tuple[list[PackedRow], Bucket]]:
    """Batches of the remaining rows, {length: rows}, each batch of one length."""
    for length, rows in waiting.items():
        while rows:
            bucket = Bucket(packing.last_rows(length, len(rows)), length)
            yield rows[: bucket.rows], bucket
            del rows[: bucket.rows]


def _cheapest_batches(
    waiting: dict[int, list[PackedRow]], packing: Packing
) -> Iterator[tuple[list[PackedRow], Bucket]]:
    """Batches of the remaining rows, trimmed to their texts, with the lowest total cost.

    That is, the cheapest partition of the rows ordered from the fullest to the emptiest.
    """
    rows = sorted(itertools.chain(*waiting.values()), key=lambda row: -row.tokens)
    lengths = [packing.last_length(row.tokens) for row in rows]
    shortest = packing.last_lengths[0]
    sizes = sorted({packing.last_rows(shortest, n) for n in range(1, min(packing.rows(shortest), len(rows)) + 1)})
    costs = [0]  # the lowest cost of the first n rows
    batches: list[tuple[int, Bucket]] = []  # the last batch of the first n rows: its first row, its shape
    for end in range(1, len(rows) + 1):
        choices = []
        for size in sizes:
            first = max(end - size, 0)
            bucket = Bucket(packing.last_rows(lengths[first], end - first), lengths[first])
            if end - first <= bucket.rows:
                choices.append((costs[first] + _BATCH_COST + bucket.rows * bucket.length, first, bucket))
            if first == 0:
                break
        cost, first, bucket = min(choices)
        costs.append(cost)
        batches.append((first, bucket))
    chosen = []
    end = len(rows)
    while end:
        first, bucket = batches[end - 1]
        chosen.append((rows[first:end], bucket))
        end = first
    # Longest first, so that what is computed concurrently at the very end is as short as possible.
    yield from reversed(chosen)


def _place(
    text: int, tokens: int, waiting: dict[int, list[PackedRow]], open_rows: list[PackedRow], prefix: int = 0
) -> None:
    """Adds a text to the fullest open row that it fits in, or to a new row."""
    best = bisect.bisect_left(open_rows, tokens, key=lambda row: row.free)
    if best < len(open_rows):
        row = open_rows.pop(best)
    else:
        length = next(length for length in waiting if length >= prefix + tokens)
        row = PackedRow(length, prefix)
        waiting[length].append(row)
    row.texts.append(text)
    row.free -= tokens
    if row.free:
        bisect.insort(open_rows, row, key=lambda row: row.free)


def fill_packed(
    rows: list[PackedRow],
    bucket: Bucket,
    slots_per_row: int,
    texts: Mapping[int, np.ndarray] | Sequence[np.ndarray],
    pad_id: int,
    prefix_t: np.ndarray | Sequence[int] = (),
) -> Rows:
    """Fills these rows into a batch.

    Args:
        rows: at most as many as the bucket has.
        bucket: the shape.
        slots_per_row: at least the number of texts of any row.
        texts: the tokens of the texts, without the prefix, by index.
        pad_id: fills the rest of each row.
        prefix_t: the shared prefix, which is put in front of each row.
    """
    tokens_bt = np.full(bucket, pad_id, np.int32)
    segment_ids_bt = np.zeros(bucket, np.int32)
    ends_be = np.zeros((bucket.rows, slots_per_row), np.int32)
    numbers, slots = [], []
    for b, row in enumerate(rows):
        start = len(prefix_t)
        tokens_bt[b, :start] = prefix_t
        segment_ids_bt[b, :start] = PREFIX
        for slot, text in enumerate(row.texts):
            end = start + len(texts[text])
            tokens_bt[b, start:end] = texts[text]
            segment_ids_bt[b, start:end] = slot + 1
            ends_be[b, slot] = end - 1
            numbers.append(text)
            slots.append(b * slots_per_row + slot)
            start = end
    tokens = int(np.count_nonzero(segment_ids_bt > 0)) + len(numbers) * len(prefix_t)
    return Rows(PackedBatch(tokens_bt, segment_ids_bt, ends_be), numbers, np.array(slots), tokens)


def text_lengths(batch: PackedBatch) -> np.ndarray:
    """The number of tokens of each text, int64 [texts], row by row."""
    segment_ids_bt = np.asarray(batch.segment_ids_bt, np.int64)
    row_b1 = np.arange(len(segment_ids_bt))[:, None]
    texts_bt = row_b1 * (segment_ids_bt.shape[1] + 1) + segment_ids_bt
    return np.unique(texts_bt[segment_ids_bt > 0], return_counts=True)[1]


def _power_of_two(at_least: int) -> int:
    """The smallest power of two that is not below ``at_least``, a positive number."""
    return 1 << (at_least - 1).bit_length()
