"""Converts raw data from the layouts of other projects to the released one: JSON Lines, Parquet with other columns.

``LAYOUTS`` lists all of these layouts. A positive or a negative is a text or a list of texts; a row with several
positives becomes one row for each. The negatives of a row are those of all its negative columns, in order, up to the
number requested. The result has as many negative columns as the longest row needs; when it is read, a row with fewer
negatives repeats its own (``RawDataset.fill_negatives``).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from f2llm_jax.errors import InputError
from f2llm_jax.texts import Lines, check_text, field_of, read_object
from f2llm_jax.train.raw import RawDataset, negative_columns, open_parquet, released_columns
from f2llm_jax.train.units import Worker, new_folder

_ROWS = "rows.parquet"

# Rows held at a time while a Parquet file is read.
_BATCH_ROWS = 256

# A row group is written once its texts have this many characters.
_GROUP_CHARACTERS = 1 << 24


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which column holds what.

    Attributes:
        name: the name of the layout, for reports.
        query: the column of queries, one text per row.
        passage: the column of positives.
        negatives: the column of negatives; ``NEGATIVES_1``, ``NEGATIVES_2``, … are also read. A file may have none.
    """

    name: str
    query: str
    passage: str
    negatives: str | None = None

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.query, self.passage, self.negatives)))

    def fits(self, columns: list[str]) -> bool:
        return self.query in columns and self.passage in columns

    def used(self, columns: list[str]) -> list[str]:
        """The columns that are read, of those of a file that it fits."""
        return [self.query, self.passage, *negative_columns(self.negatives, tuple(columns))]

    def finds_negatives(self, columns: list[str]) -> bool:
        return bool(negative_columns(self.negatives, tuple(columns)))

    def rows(self, record: dict[str, Any], where: str) -> Iterator[tuple[str | None, str | None, list[str]]]:
        """The query, passage and negatives of each row that a record becomes; None for what is missing.

        Other positives of the record are left out of a row's negatives.

        Raises:
            InputError: the record lacks a column, or the column holds something other than texts.
        """
        query = field_of(record, self.query, where)
        if query is not None:
            check_text(query, where, self.query)
        passages = _texts(field_of(record, self.passage, where), where, self.passage)
        negatives = [
            text
            for column in negative_columns(self.negatives, tuple(record))
            for text in _texts(record[column], where, column)
            if text is not None and text.strip()
        ]
        for passage in passages or [None]:
            others = {other for other in passages if other != passage}
            yield query, passage, [negative for negative in negatives if negative not in others]


LAYOUTS = (
    Layout("released", "query", "passage", "negative"),
    Layout("sentence-transformers", "anchor", "positive", "negative"),
    Layout("sentence-transformers", "query", "positive", "negative"),
    Layout("FlagEmbedding", "query", "pos", "neg"),
    Layout("Tevatron", "query", "positive_passages", "negative_passages"),
)
RELEASED = LAYOUTS[0]


def _texts(value: Any, where: str, column: str) -> list[str | None]:
    """The texts of a cell: one or a list, each a string or, as in Tevatron, an object with ``title`` and ``text``."""
    if value is None:
        return []
    texts: list[str | None] = []
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, dict):
            if not isinstance(text := part.get("text"), str):
                raise InputError(f"{where}: field {column!r} has a passage without a 'text'")
            part = f"{part.get('title') or ''} {text}".strip()
        texts.append(None if part is None else check_text(part, where, column))
    return texts


def own_layout(columns: Mapping[str, str] | None) -> Layout | None:
    """The layout that a user describes: {``query``, ``passage`` and optionally ``negatives``: column}.

    Raises:
        InputError: there are other keys.
    """
    if columns is None:
        return None
    if not {"query", "passage"} <= set(columns) <= {"query", "passage", "negatives"}:
        raise InputError(f"--columns takes query, passage and, if there are any, negatives, not {', '.join(columns)}")
    return Layout("--columns", **columns)


def find_layout(file: Path, own: Layout | None) -> Layout | None:
    """The layout of a file, by its columns or the keys of its first line; None for Parquet in the released layout.

    Args:
        file: .parquet or .jsonl.
        own: a layout that takes precedence over ``LAYOUTS``. If it names negatives, a file without them is left to
            those that fit; later lines of a .jsonl may have them, so there only to those that find negatives.

    Raises:
        InputError: the file is damaged or empty, or its columns match no known layout.
    """
    schema = _schema(file) if file.suffix == ".parquet" else None
    columns = schema.names if schema is not None else _first_keys(file)
    layouts = LAYOUTS if own is None else (own, *LAYOUTS)
    fitting = [layout for layout in layouts if layout.fits(columns)]
    if own in fitting and own.negatives and not own.finds_negatives(columns):
        others = [layout for layout in fitting if layout != own]
        if schema is not None or any(layout.finds_negatives(columns) for layout in others):
            fitting = others
    layout = next(iter(fitting), None)
    if layout is None:
        known = "; ".join(map(str, layouts))
        raise InputError(
            f"{file} has the columns {', '.join(columns)}, which are of no known layout ({known}): say which they are "
            "with --columns query=NAME,passage=NAME,negatives=NAME, or leave it out with --exclude"
        )
    if schema is None or layout != RELEASED or "negative" in columns:
        return layout
    nested = any(pyarrow.types.is_nested(schema.field(name).type) for name in layout.used(columns))
    return RELEASED if nested else None


def ignored_columns(file: Path, layout: Layout) -> list[str]:
    """The columns of a file, or the keys of its first line, that its layout does not read."""
    columns = _schema(file).names if file.suffix == ".parquet" else _first_keys(file)
    return [column for column in columns if column not in layout.used(columns)]


def _schema(file: Path) -> pyarrow.Schema:
    with open_parquet(file) as opened:
        return opened.schema_arrow


def _first_keys(file: Path) -> list[str]:
    with file.open("rb") as stream:
        for line in (lines := Lines(stream, str(file))):
            if line.strip():
                return list(read_object(line, lines.where))
    raise InputError(f"{file} is empty")


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A unit of the conversion, which precedes the first pass: one file to rewrite in the released layout.

    It writes ``rows.parquet``, with null for what is missing, and counts in ``done.json``.

    Attributes:
        file, layout: the input.
        negatives: maximum number of negatives to keep per row.
        folder: the output.
    """

    file: Path
    layout: Layout
    negatives: int
    folder: Path

    @property
    def size(self) -> int:
        """The number of bytes to read."""
        return self.file.stat().st_size

    def run(self, worker: Worker) -> None:
        records = self._parquet_records if self.file.suffix == ".parquet" else self._jsonl_records
        with new_folder(self.folder) as folder:
            with _RowWriter(folder / _ROWS, self.negatives) as writer:
                for where, record in records(worker):
                    for query, passage, negatives in self.layout.rows(record, where):
                        writer.write(query, passage, negatives[: self.negatives])
            done = {"rows": writer.rows, "negatives": writer.longest}
            (folder / "done.json").write_text(json.dumps(done), encoding="utf-8")

    def _jsonl_records(self, worker: Worker) -> Iterator[tuple[str, dict[str, Any]]]:
        read = 0
        with self.file.open("rb") as stream:
            lines = Lines(stream, str(self.file))
            for line in lines:
                if line.strip():
                    yield lines.where, read_object(line, lines.where)
                worker.advance(lines.position.offset - read)
                read = lines.position.offset

    def _parquet_records(self, worker: Worker) -> Iterator[tuple[str, dict[str, Any]]]:
        """Records, numbered from 0; progress counts an equal part of the file's bytes for each."""
        row = read = 0
        try:
            with open_parquet(self.file) as opened:
                names = opened.schema_arrow.names
                columns = self.layout.used(names)
                for batch in opened.iter_batches(_BATCH_ROWS, columns=columns, use_threads=False):
                    yield from ((f"{self.file}, row {row + n}", r) for n, r in enumerate(self._as_dicts(batch, row)))
                    row += batch.num_rows
                    now = self.size * row // opened.metadata.num_rows
                    worker.advance(now - read)
                    read = now
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{self.file} is damaged: {error}") from None

    def _as_dicts(self, batch: pyarrow.RecordBatch, first: int) -> list[dict[str, Any]]:
        try:
            return batch.to_pylist()
        except UnicodeDecodeError:
            pass
        for name in batch.schema.names:
            for row, value in enumerate(batch.column(name)):
                try:
                    value.as_py()
                except UnicodeDecodeError as error:
                    raise InputError(
                        f"{self.file}, row {first + row}: field {name!r} is not valid UTF-8: {error.reason}"
                    ) from None
        raise AssertionError("a batch is not Unicode, and all of its cells are")

    def dataset(self) -> RawDataset:
        """The converted dataset."""
        done = json.loads((self.folder / "done.json").read_text(encoding="utf-8"))
        return RawDataset(self.file.stem, self.folder / _ROWS, done["rows"], done["negatives"], fill_negatives=True)


class _RowWriter:
    """Writes rows of the released layout, a row group at a time.

    Attributes:
        rows: number of rows.
        longest: the largest number of negatives of a row.
    """

    def __init__(self, file: Path, negatives: int):
        self.rows = self.longest = 0
        self._schema = pyarrow.schema([(name, pyarrow.string()) for name in released_columns(negatives)])
        self._writer = parquet.ParquetWriter(file, self._schema, write_statistics=False)
        self._held: list[list[str | None]] = []
        self._characters = 0

    def __enter__(self) -> _RowWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._flush()
        self._writer.close()

    def write(self, query: str | None, passage: str | None, negatives: list[str]) -> None:
        texts = [query, passage, *negatives]
        self._held.append(texts + [None] * (len(self._schema) - len(texts)))
        self._characters += sum(len(text or "") + 1 for text in texts)
        self.rows += 1
        self.longest = max(self.longest, len(negatives))
        if self._characters >= _GROUP_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        if not self._held:
            return
        columns = [[row[place] for row in self._held] for place in range(len(self._schema))]
        arrays = [pyarrow.array(column, pyarrow.string()) for column in columns]
        self._writer.write_table(pyarrow.Table.from_arrays(arrays, schema=self._schema))
        self._held, self._characters = [], 0
