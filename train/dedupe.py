"""Numbers distinct documents in bounded memory: equal digests get equal numbers, in order of first occurrence.

Digests are distributed over buckets by their leading bits, so that a bucket fits in memory and equal digests share one.
Every bucket keeps the order of occurrence, and so do the streams written for it: reading all streams together, front to
back, brings the results for a bucket's digests back to where the digests occurred.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from f2llm_jax.errors import InputError

# Bytes of memory per digest while its bucket or chunk is sorted: keys, order, links and copies.
_BYTES_PER_DIGEST = 96

_MAX_BUCKETS = 256  # each has two open files; the usual limit is 1,024


class Digests(NamedTuple):
    """The digests of some rows' documents.

    Attributes:
        rows: number of rows.
        width: documents per row.
        read: maps (first, count) to the digests of the rows from ``first`` to ``first + count - 1``: uint64 [count,
            width, 2].
    """

    rows: int
    width: int
    read: Callable[[int, int], np.ndarray]


def number_documents(
    datasets: Sequence[Digests], outputs: Sequence[Path], folder: Path, *, memory: int = 1 << 29
) -> list[int]:
    """Writes the number of every document of every row.

    Args:
        datasets: the digests, in the order that defines first occurrences.
        outputs: the file to write for each dataset: int32 [rows, width], little-endian, without a header.
        folder: for temporary files of up to 29 bytes per distinct digest of each chunk; it must be empty.
        memory: bytes of memory to use. The output does not depend on it.

    Returns:
        The number of documents numbered before each dataset, and finally their total: one more value than datasets. The
        new documents of a dataset have the numbers from its value up to the next one.

    Raises:
        InputError: there are more distinct documents than an int32 can number.
    """
    total = sum(dataset.rows * dataset.width for dataset in datasets)
    bits = min(max(total * _BYTES_PER_DIGEST // memory, 1), _MAX_BUCKETS).bit_length() - 1
    buckets = _Buckets(folder, bits)
    chunk = max(memory // _BYTES_PER_DIGEST // 2, 1)

    with buckets.open("digest", "wb") as streams:
        for _, distinct in _chunks(datasets, chunk):
            buckets.deal(streams, distinct.keys, distinct.keys)
    for bucket in range(buckets.count):
        _link(buckets, bucket)
    starts = _number_first_occurrences(buckets, datasets, chunk)
    for bucket in range(buckets.count):
        numbers = np.fromfile(buckets.file("number", bucket), np.int32)
        numbers[np.fromfile(buckets.file("link", bucket), np.int32)].tofile(buckets.file("numbers", bucket))
    _write_numbers(buckets, datasets, chunk, outputs)
    return starts


class _Distinct(NamedTuple):
    """The distinct digests of a chunk in order of first occurrence, and the index among them of each digest."""

    keys: np.ndarray
    inverse: np.ndarray


def _chunks(datasets: Sequence[Digests], size: int) -> Iterator[tuple[int, _Distinct]]:
    """The digests in chunks of about ``size``, each from a single dataset, with the index of that dataset."""
    for index, dataset in enumerate(datasets):
        step = max(size // max(dataset.width, 1), 1)
        for first in range(0, dataset.rows, step):
            keys = dataset.read(first, min(step, dataset.rows - first)).reshape(-1, 2)
            yield index, _distinct(keys)


def _distinct(keys: np.ndarray) -> _Distinct:
    first = _first_occurrences(keys)
    is_first = first == np.arange(len(keys))
    return _Distinct(keys[is_first], (np.cumsum(is_first) - 1)[first])


def _first_occurrences(keys: np.ndarray) -> np.ndarray:
    """The position of the first occurrence of each digest: int64 [count]."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: equal digests stay in order of occurrence
    ordered = keys[order]
    starts = np.ones(len(keys), bool)
    starts[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.empty(len(keys), np.int64)
    first[order] = order[starts][np.cumsum(starts) - 1]
    return first


class _Buckets:
    """The files of 2^bits buckets, and the transfer of values to and from them."""

    def __init__(self, folder: Path, bits: int):
        self.folder = folder
        self.bits = bits
        self.count = 1 << bits

    def file(self, kind: str, bucket: int) -> Path:
        return self.folder / f"{bucket:03d}.{kind}"

    def open(self, kind: str, mode: str) -> _Streams:
        return _Streams([self.file(kind, bucket) for bucket in range(self.count)], mode)

    def order(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The positions of the digests, stably sorted by bucket, and the boundaries of the buckets among them."""
        # A shift by 64 is undefined.
        bucket = (keys[:, 0] >> np.uint64(64 - self.bits)).astype(np.int16) if self.bits else np.zeros(len(keys), int)
        order = np.argsort(bucket, kind="stable")
        return order, np.searchsorted(bucket[order], np.arange(self.count + 1))

    def deal(self, streams: Sequence[BinaryIO], keys: np.ndarray, values: np.ndarray) -> None:
        """Appends to the stream of each bucket the values that belong to its digests."""
        order, bounds = self.order(keys)
        values = values[order]
        for stream, first, last in zip(streams, bounds[:-1], bounds[1:], strict=True):
            stream.write(values[first:last].tobytes())

    def collect(self, streams: Sequence[BinaryIO], keys: np.ndarray, dtype: type) -> np.ndarray:
        """Reads the next values of these digests from the streams of the buckets, in the order of the digests."""
        order, bounds = self.order(keys)
        values: np.ndarray = np.empty(len(keys), dtype)
        size = values.itemsize
        for stream, first, last in zip(streams, bounds[:-1], bounds[1:], strict=True):
            values[order[first:last]] = np.frombuffer(stream.read((last - first) * size), dtype)
        return values


class _Streams(ExitStack):
    """Files that are open together; a with block gets their list."""

    def __init__(self, files: list[Path], mode: str):
        super().__init__()
        self._files, self._mode = files, mode

    def __enter__(self) -> list[BinaryIO]:  # type: ignore[override]
        return [self.enter_context(file.open(self._mode)) for file in self._files]  # type: ignore[misc]


def _link(buckets: _Buckets, bucket: int) -> None:
    """Writes which digests of a bucket are first occurrences, and for each digest the index of its own among those."""
    keys = np.fromfile(buckets.file("digest", bucket), "<u8").reshape(-1, 2)
    distinct = _first_occurrences(keys)
    is_first = distinct == np.arange(len(keys))
    is_first.tofile(buckets.file("first", bucket))
    (np.cumsum(is_first) - 1)[distinct].astype(np.int32).tofile(buckets.file("link", bucket))


def _number_first_occurrences(buckets: _Buckets, datasets: Sequence[Digests], chunk: int) -> list[int]:
    """Numbers first occurrences across all buckets, in the order of the data; writes those of each bucket to a file."""
    new_by_dataset = np.zeros(len(datasets) + 1, np.int64)
    count = 0
    with buckets.open("first", "rb") as firsts, buckets.open("number", "wb") as numbers:
        for index, distinct in _chunks(datasets, chunk):
            is_first = buckets.collect(firsts, distinct.keys, np.bool_)
            new = distinct.keys[is_first]
            if count + len(new) > np.iinfo(np.int32).max:
                raise InputError("there are more than 2^31 - 1 distinct documents; prepare the datasets in two parts")
            buckets.deal(numbers, new, np.arange(count, count + len(new), dtype=np.int32))
            count += len(new)
            new_by_dataset[index + 1] += len(new)
    return np.cumsum(new_by_dataset).tolist()


def _write_numbers(buckets: _Buckets, datasets: Sequence[Digests], chunk: int, outputs: Sequence[Path]) -> None:
    for output in outputs:
        output.write_bytes(b"")
    with buckets.open("numbers", "rb") as streams:
        for index, distinct in _chunks(datasets, chunk):
            numbers = buckets.collect(streams, distinct.keys, np.int32)
            with outputs[index].open("ab") as stream:
                stream.write(numbers[distinct.inverse].astype("<i4").tobytes())
