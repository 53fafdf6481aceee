"""Raw data in the released layout: one Parquet file per dataset, with columns ``query``, ``passage``, ``negative_1``, …

Files in other layouts are converted to this one first, by ``f2llm_jax.train.layouts``. A file of many GB may be a
single row group, so files are read a few rows at a time, front to back.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute as pc
from pyarrow import parquet

from f2llm_jax.errors import InputError

# The reasons for dropping a row, in order of precedence. Empty means missing, only white space, or not Unicode.
REASONS = ("empty_query", "empty_positive", "empty_negative", "negative_is_positive")

# The beginning of a query with an instruction, and the whole prefix of the queries in the released data.
INSTRUCTION = "Instruct:"
_PREFIX = r"\A(?s:Instruct: .*?\nQuery: ?)"

# Rows held at a time: 26 texts each, of up to some 30 KB in long-document sets.
_BATCH_ROWS = 256

# The part of a column chunk that is held in memory; by default, Arrow would read the whole chunk.
_BUFFER_BYTES = 1 << 18

DIGEST_BYTES = 16

# The extensions of raw data files.
_EXTENSIONS = (".parquet", ".jsonl")


@dataclasses.dataclass(frozen=True)
class RawDataset:
    """A file of raw data.

    Attributes:
        name: the file's name without its extension.
        file: the file.
        rows: number of rows.
        negatives: number of negatives per row.
        fill_negatives: read a row's negatives without the empty ones, and repeat them if they are too few.
        spare: number of further negatives per row in the file, which are read to take the place of empty ones.
    """

    name: str
    file: Path
    rows: int
    negatives: int
    fill_negatives: bool = False
    spare: int = 0

    @property
    def columns(self) -> list[str]:
        """The columns to read; those after the first 2 + ``negatives`` are spare."""
        return released_columns(self.negatives + self.spare)


def released_columns(negatives: int) -> list[str]:
    """The columns of the released layout."""
    return ["query", "passage", *(f"negative_{n}" for n in range(1, negatives + 1))]


def find_files(folder: Path) -> list[Path]:
    """The raw data files of a folder, sorted by dataset name.

    Raises:
        InputError: there is no such folder, it has no raw data files, or two of them have the same dataset name.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    found = (file for file in folder.iterdir() if file.suffix in _EXTENSIONS)
    files = sorted(found, key=lambda file: (file.stem, file.suffix))
    if not files:
        raise InputError(f"{folder} has no {' or '.join(_EXTENSIONS)} files")
    for file, other in itertools.pairwise(files):
        if file.stem == other.stem:
            raise InputError(f"{file} and {other} are both the dataset {file.stem!r}; rename one, or move it away")
    return files


def open_parquet(file: Path) -> parquet.ParquetFile:
    """Opens a Parquet file for reading in bounded memory; raises an InputError if it is not one."""
    try:
        return parquet.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)
    except pyarrow.ArrowException as error:
        raise InputError(f"{file} is not a Parquet file, or damaged: {error}") from None


def open_dataset(file: Path, *, negatives: int, fill_negatives: bool = False) -> RawDataset:
    """The dataset in a Parquet file of the released layout, with at most ``negatives`` negatives per row.

    Raises:
        InputError: the file is not a Parquet file, lacks a column, or has one that does not hold strings.
    """
    with open_parquet(file) as opened:
        schema, rows = opened.schema_arrow, opened.metadata.num_rows
    found = len(negative_columns("negative", tuple(schema.names)))
    taken = min(found, negatives)
    dataset = RawDataset(file.stem, file, rows, taken, fill_negatives, spare=found - taken if fill_negatives else 0)
    for name in dataset.columns:
        if name not in schema.names:
            raise InputError(f"{file} has no column {name!r}; it has {', '.join(schema.names)}")
        if not _is_text(schema.field(name).type):
            raise InputError(f"{file}: the column {name!r} holds {schema.field(name).type}, not strings")
    return dataset


@functools.lru_cache
def negative_columns(name: str | None, columns: tuple[str, ...]) -> tuple[str, ...]:
    """The columns that hold negatives: ``name`` itself, then ``name_1``, ``name_2``, …"""
    numbers: dict[str, int] = {}
    for column in columns:
        base, _, number = column.rpartition("_")
        if column == name:
            numbers[column] = 0
        elif base == name and number.isdecimal():
            numbers[column] = int(number)
    return tuple(sorted(numbers, key=numbers.__getitem__))


def _is_text(kind: Any) -> bool:
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    return kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())


def read_rows(
    dataset: RawDataset, *, strip_instructions: bool, query_prompt: str = "", first: int = 0, last: int | None = None
) -> Iterator[tuple[int, list[Any]]]:
    """The rows from ``first`` to ``last`` - 1, in small batches.

    Args:
        dataset: the dataset to read.
        strip_instructions: strip ``Instruct: …\\nQuery: `` from the beginning of every text.
        query_prompt: prepended to every query that is not empty and begins neither with it nor with ``Instruct:``.
        first, last: row numbers; default: all rows.

    Yields:
        The number of the batch's first row, and an Arrow array of strings for each query, passage and negative. A text
        that is not valid Unicode becomes null.

    Raises:
        InputError: the file is damaged.
    """
    last = dataset.rows if last is None else last
    try:
        with open_parquet(dataset.file) as opened:
            groups, row = _row_groups(opened, first, last)
            batches = opened.iter_batches(_BATCH_ROWS, row_groups=groups, columns=dataset.columns, use_threads=False)
            for batch in batches:
                start, stop = max(first - row, 0), min(last - row, batch.num_rows)
                if start < stop:
                    part = batch.slice(start, stop - start)
                    columns = [_texts(part.column(name), strip_instructions) for name in dataset.columns]
                    if query_prompt:
                        columns[0] = _put_before(query_prompt, columns[0])
                    if dataset.fill_negatives and dataset.negatives:
                        columns[2:] = _fill(columns[2:])
                    yield row + start, columns[: 2 + dataset.negatives]
                row += batch.num_rows
                if row >= last:
                    return
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{dataset.file} is damaged: {error}") from None


def _row_groups(opened: parquet.ParquetFile, first: int, last: int) -> tuple[list[int], int]:
    """The row groups that hold any of the rows, and the number of their first row."""
    ends = np.cumsum([opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)], dtype=int)
    starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
    groups = np.flatnonzero((starts < last) & (ends > first))
    return groups.tolist(), int(starts[groups[0]]) if len(groups) else 0


def _texts(column: Any, strip_instructions: bool) -> Any:
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pyarrow.types.is_string_view(column.type):  # which the functions below do not take
        column = column.cast(pyarrow.large_string())
    try:
        column.validate(full=True)
    except pyarrow.ArrowInvalid:
        values = column.cast(pyarrow.large_binary()).to_pylist()
        column = pyarrow.array(map(_decode, values), column.type)  # None alone would give a null array
    if strip_instructions:
        column = pc.replace_substring_regex(column, _PREFIX, "", max_replacements=1)
    return column


def _decode(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None


def _put_before(prompt: str, queries: Any) -> Any:
    prompted = pc.binary_join_element_wise(
        pyarrow.scalar(prompt, queries.type), queries, pyarrow.scalar("", queries.type)
    )
    has_one = pc.or_(pc.starts_with(queries, prompt), pc.starts_with(queries, INSTRUCTION))
    return pc.if_else(pc.or_(has_one, pyarrow.array(_is_empty(queries))), queries, prompted)


def _fill(negatives: list[Any]) -> list[Any]:
    """The columns with each row's negatives moved up over its empty cells, then repeated; a row of none stays empty."""
    empty = np.array([_is_empty(column) for column in negatives])
    rows = np.flatnonzero(empty.any(axis=0) & ~empty.all(axis=0))
    if not len(rows):
        return negatives
    texts = [column.to_pylist() for column in negatives]
    for row in rows:
        own = itertools.cycle([texts[column][row] for column in np.flatnonzero(~empty[:, row])])
        for column in texts:
            column[row] = next(own)
    return [pyarrow.array(filled, column.type) for filled, column in zip(texts, negatives, strict=True)]


def faults(columns: list[Any]) -> np.ndarray:
    """What is wrong with each row: uint8 [rows], 0 for nothing, n for ``REASONS[n - 1]``."""
    query, passage, *negatives = columns
    empty, repeated = np.zeros(len(query), bool), np.zeros(len(query), bool)
    for negative in negatives:
        empty |= _is_empty(negative)
        repeated |= np.asarray(pc.fill_null(pc.equal(negative, passage), False))
    conditions = [_is_empty(query), _is_empty(passage), empty, repeated]
    return np.select(conditions, np.arange(1, len(conditions) + 1), 0).astype(np.uint8)


def _is_empty(column: Any) -> np.ndarray:
    blank = pc.equal(pc.binary_length(pc.utf8_trim_whitespace(column)), 0)
    return np.asarray(pc.fill_null(blank, True))


def digests(columns: list[Any]) -> np.ndarray:
    """128-bit digests, equal for equal texts: uint64 [rows, columns, 2]."""
    by_column = [
        b"".join(
            hashlib.blake2b(text or b"", digest_size=DIGEST_BYTES).digest()
            for text in column.cast(pyarrow.large_binary()).to_pylist()
        )
        for column in columns
    ]
    digests_cr2 = np.frombuffer(b"".join(by_column), "<u8").reshape(len(columns), -1, 2)
    return digests_cr2.transpose(1, 0, 2)
