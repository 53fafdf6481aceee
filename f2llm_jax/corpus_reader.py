"""The texts of many files, split into units: runs of rows that fit into memory, read one at a time.

Unit boundaries depend on the files alone. Every process splits the same files into the same units, so units can be
assigned by number, and a unit is the same whichever process reads it.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from f2llm_jax.errors import InputError
from f2llm_jax.texts import RECORDS, Lines, Position, check_text, check_unicode, format_of

if TYPE_CHECKING:
    import pyarrow
    from pyarrow import parquet
    from tqdm import tqdm

# A unit of long texts has fewer rows: its texts take at most about this many bytes.
_UNIT_BYTES = 64 << 20

# Bytes of a Parquet column chunk in memory, and rows decoded at a time. By default Arrow would read the whole chunk,
# and released files are often a single row group of a GB.
_BUFFER_BYTES = 1 << 20
_BATCH_ROWS = 1024

ROW_NUMBER = "int64"
"""The Arrow type of ids that are row numbers."""


@dataclasses.dataclass(frozen=True)
class InputFile:
    """An input file, and where its units begin.

    Attributes:
        path, format: its path, and one of ``texts.FORMATS``.
        bytes: its size.
        modified_ns: its modification time.
        sha256: of the file; for a Parquet file, of its footer, which has the sizes and statistics of all its parts.
        id_type: the Arrow type of its ids, ``int64`` for row numbers; None if it has no rows to infer it from.
        units: for each unit, its number of rows and where it begins: byte and line of a text file, row and 0 of a
            Parquet file.
    """

    path: str
    format: str
    bytes: int
    modified_ns: int
    sha256: str
    id_type: str | None
    units: tuple[tuple[int, int, int], ...]

    @property
    def rows(self) -> int:
        return sum(rows for rows, _, _ in self.units)


class Unit(NamedTuple):
    """A run of rows of one file, which becomes one shard of the output.

    Attributes:
        number: its index among all units, which are in the order of the files and their rows.
        file: the index of its file.
        first_row: its first row, counted over all files.
        rows: its number of rows.
        begin: where it begins, as in ``InputFile.units``.
    """

    number: int
    file: int
    first_row: int
    rows: int
    begin: tuple[int, int]


class UnitTexts(NamedTuple):
    """A unit with its texts and an Arrow array of their ids."""

    unit: Unit
    texts: list[str]
    ids: pyarrow.Array


def find_files(patterns: Sequence[str], out: Path) -> list[str]:
    """The files that match glob patterns: pattern by pattern, sorted by name within each; each file once.

    Args:
        patterns: globs; a pattern that names an existing file means that file, whatever brackets it contains.
        out: the output folder, whose own files are skipped.

    Raises:
        InputError: there are no patterns, or nothing matches one.
    """
    files: dict[Path, str] = {}  # by resolved path: a file may have several names
    out = out.resolve()
    for pattern in patterns:
        name = os.path.expanduser(pattern)
        paths = [name] if os.path.isfile(name) else sorted(filter(os.path.isfile, glob.glob(name, recursive=True)))
        found = [(Path(path).resolve(), path) for path in paths]
        found = [(file, path) for file, path in found if not file.is_relative_to(out)]
        if not found:
            raise InputError(f"no file matches {pattern}" + (f" but those of {out} itself" if paths else ""))
        for file, path in found:
            files.setdefault(file, path)
    if not files:
        raise InputError("no input files: the list of patterns is empty")
    return list(files.values())


class Corpus:
    """All rows of some files, split into units.

    Attributes:
        files: the files.
        units: the units of all files.
        rows: the total number of rows.
        id_type: the Arrow type of the ids.
    """

    def __init__(self, files: Iterable[InputFile], field: str, id_field: str | None):
        """Combines files.

        Raises:
            InputError: the ids of two files have different types.
        """
        self.files = list(files)
        self.field, self.id_field = field, id_field
        self.units: list[Unit] = []
        self.rows = 0
        self.id_type = self._id_type()
        for number, file in enumerate(self.files):
            for rows, *begin in file.units:
                self.units.append(Unit(len(self.units), number, self.rows, rows, (begin[0], begin[1])))
                self.rows += rows

    def _id_type(self) -> str:
        types: dict[str, str] = {}
        for file in self.files:
            if file.id_type is not None:
                types.setdefault(file.id_type, file.path)
        if len(types) > 1:
            (one, first), (other, second), *_ = types.items()
            raise InputError(
                f"the ids in {self.id_field!r} are {one} in {first} and {other} in {second}; a column has one type"
            )
        return next(iter(types), ROW_NUMBER)


def index(
    paths: Sequence[str],
    *,
    field: str = "text",
    id_field: str | None = None,
    file_format: str | None = None,
    unit_rows: int,
    known: Iterable[InputFile] = (),
    show_progress: bool = False,
) -> Corpus:
    """Splits files into units.

    Text files are read once in full, and every row is checked; of Parquet files only the footers are read.

    Args:
        paths: the files, in order.
        field: the column or key that holds the text.
        id_field: the column or key of the ids; default: the row number, counted over all files.
        file_format: one of ``texts.FORMATS``; default by each file's extension.
        unit_rows: maximum rows per unit.
        known: files indexed before with the same arguments; those whose size and modification time are unchanged are
            not read again.
        show_progress: show a progress bar on standard error.

    Raises:
        InputError: a row or a file cannot be used; the message names it.
    """
    from tqdm import tqdm

    before = {(file.path, file.bytes, file.modified_ns): file for file in known}
    sizes = [os.path.getsize(path) for path in paths]
    files = []
    with tqdm(total=sum(sizes), desc="reading", unit="B", unit_scale=True, disable=not show_progress) as bar:
        for path, size in zip(paths, sizes, strict=True):
            done = bar.n
            file = before.get((path, size, os.stat(path).st_mtime_ns))
            if file is None:
                kind = format_of(path, file_format)
                indexed = _index_parquet if kind == "parquet" else _index_lines
                file = indexed(path, kind, field, id_field, unit_rows, bar)
            files.append(file)
            bar.update(size - (bar.n - done))
    return Corpus(files, field, id_field)


def _index_lines(path: str, kind: str, field: str, id_field: str | None, unit_rows: int, bar: tqdm) -> InputFile:
    if id_field is not None and kind == "txt":
        raise InputError(
            f"{path} is a txt file, which has no field {id_field!r}; without --id-field ids are row numbers"
        )
    digest = hashlib.sha256()
    units: list[tuple[int, int, int]] = []
    rows, begin, id_type = 0, Position(), None if id_field else ROW_NUMBER
    modified_ns = os.stat(path).st_mtime_ns
    with open(path, "rb") as stream:
        lines = Lines(stream, path, digest)
        for _, id_ in RECORDS[kind](lines, field, id_field, begin):
            rows += 1
            if id_field is not None:
                id_type = _check_id(id_, id_field, id_type, lines.where)
            if rows == unit_rows or lines.position.offset - begin.offset >= _UNIT_BYTES:
                units.append((rows, *begin))
                bar.update(lines.position.offset - begin.offset)
                rows, begin = 0, lines.position
    if rows:
        units.append((rows, *begin))
    return InputFile(path, kind, lines.position.offset, modified_ns, digest.hexdigest(), id_type, tuple(units))


def _check_id(id_: Any, id_field: str, id_type: str | None, where: str) -> str:
    """The type of an id, which must match that of the ids before it."""
    kinds = {str: "string", int: "int64"}
    if type(id_) not in kinds:
        problem = "there is no id" if id_ is None else f"an id is of type {type(id_).__name__}"
        raise InputError(f"{where}: {problem} in field {id_field!r}; it takes a string or a whole number")
    found = kinds[type(id_)]
    if id_type not in (None, found):
        raise InputError(f"{where}: the id in field {id_field!r} is {found}, those before it are {id_type}")
    if found == "int64" and not -(2**63) <= id_ < 2**63:
        raise InputError(f"{where}: the id {id_} in field {id_field!r} does not fit 64 bits; make the ids strings")
    if found == "string":
        check_unicode(id_, f"{where}: the id in field {id_field!r}")
    return found


def _index_parquet(path: str, kind: str, field: str, id_field: str | None, unit_rows: int, bar: tqdm) -> InputFile:
    import pyarrow
    from pyarrow import parquet

    status = os.stat(path)
    try:
        with parquet.ParquetFile(path) as opened:
            schema, metadata = opened.schema_arrow, opened.metadata
            text_type = _column_type(schema, field, path)
            if text_type != pyarrow.string():
                raise InputError(f"{path}: field {field!r} is of type {text_type}, not a string")
            id_type = ROW_NUMBER if id_field is None else str(_column_type(schema, id_field, path))
            for name in filter(None, (field, id_field)):
                _refuse_nulls(metadata, name, path)
            text_bytes = sum(
                metadata.row_group(group).column(_leaf(metadata, field)).total_uncompressed_size
                for group in range(metadata.num_row_groups)
            )
    except pyarrow.ArrowException as error:
        raise InputError(f"{path} is not valid Parquet: {str(error).splitlines()[0]}") from None
    rows = metadata.num_rows
    step = max(1, min(unit_rows, _UNIT_BYTES * rows // max(text_bytes, 1)))
    units = tuple((min(step, rows - first), first, 0) for first in range(0, rows, step))
    footer = hashlib.sha256(_footer(path)).hexdigest()
    return InputFile(path, kind, status.st_size, status.st_mtime_ns, footer, id_type, units)


def _column_type(schema: pyarrow.Schema, name: str, path: str) -> pyarrow.DataType:
    """A column's type; for a dictionary, its value type. String types are treated alike: pandas 3 writes large ones."""
    import pyarrow

    if schema.names.count(name) != 1:
        there = "more than one column" if name in schema.names else "no column"
        raise InputError(f"{path} has {there} {name!r}; there are {', '.join(schema.names)}")
    kind = schema.field(name).type
    if pyarrow.types.is_nested(kind):
        raise InputError(f"{path}: column {name!r} is of type {kind}, and not one value a row")
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    return pyarrow.string() if kind in (pyarrow.large_string(), pyarrow.string_view()) else kind


def _leaf(metadata: parquet.FileMetaData, name: str) -> int:
    """The index of a column among the leaves of the schema; nested columns before it may have several leaves."""
    return next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == name)


def _refuse_nulls(metadata: parquet.FileMetaData, name: str, path: str) -> None:
    """Rejects missing values before any work, if the file has null counts; in other files they are found on reading."""
    leaf = _leaf(metadata, name)
    nulls = 0
    for group in range(metadata.num_row_groups):
        statistics = metadata.row_group(group).column(leaf).statistics
        nulls += statistics.null_count or 0 if statistics is not None and statistics.has_null_count else 0
    if nulls:
        raise InputError(f"{path}: field {name!r} is null in {nulls} of {metadata.num_rows} rows")


def _footer(path: str) -> bytes:
    """The bytes of a Parquet file's metadata, which precede their length and the magic number at the file's end."""
    with open(path, "rb") as stream:
        stream.seek(-8, os.SEEK_END)
        length = int.from_bytes(stream.read(4), "little")
        stream.seek(-8 - length, os.SEEK_END)
        return stream.read(length)


class Reader:
    """Reads units. Those of a Parquet file are best read in order, so that it is decoded only once."""

    def __init__(self, corpus: Corpus):
        self._corpus = corpus
        self._open: tuple[int, _ParquetRows] | None = None

    def read(self, unit: Unit) -> UnitTexts:
        """The texts and ids of a unit.

        Raises:
            InputError: a value is missing or not a text, or a file has changed; the message names it.
        """
        file = self._corpus.files[unit.file]
        read = self._read_parquet if file.format == "parquet" else self._read_lines
        _check_unchanged(file)
        try:
            texts, ids = read(unit, file)
        finally:  # also after an error: a change may be its cause
            _check_unchanged(file)
        if len(texts) != unit.rows:
            raise _changed(file)
        return UnitTexts(unit, texts, ids)

    def _read_lines(self, unit: Unit, file: InputFile) -> tuple[list[str], pyarrow.Array]:
        import pyarrow

        texts: list[str] = []
        ids: list[Any] = []
        with open(file.path, "rb") as stream:
            records = RECORDS[file.format](
                Lines(stream, file.path), self._corpus.field, self._corpus.id_field, Position(*unit.begin)
            )
            for text, id_ in records:
                texts.append(text)
                ids.append(id_)
                if len(texts) == unit.rows:
                    break
        if self._corpus.id_field is None:
            return texts, _row_numbers(unit)
        return texts, pyarrow.array(ids, file.id_type)

    def _read_parquet(self, unit: Unit, file: InputFile) -> tuple[list[str], pyarrow.Array]:
        import pyarrow

        field, id_field = self._corpus.field, self._corpus.id_field
        first = unit.begin[0]
        if self._open is None or self._open[0] != unit.file or self._open[1].next_row > first:
            self._open = (unit.file, _ParquetRows(Path(file.path), [name for name in (field, id_field) if name]))
        try:
            table = self._open[1].take(first, unit.rows)
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{file.path} is damaged: {str(error).splitlines()[0]}") from None
        texts = _texts(table[field], f"{file.path}, row", first, field)
        if id_field is None:
            return texts, _row_numbers(unit)
        ids = table[id_field].cast(_column_type(table.schema, id_field, file.path)).combine_chunks()
        if ids.null_count:
            row = first + ids.is_null().index(True).as_py()
            raise InputError(f"{file.path}, row {row}: there is no id in field {id_field!r}")
        return texts, ids


def _check_unchanged(file: InputFile) -> None:
    try:
        status = os.stat(file.path)
    except FileNotFoundError:
        raise _changed(file) from None
    if (status.st_size, status.st_mtime_ns) != (file.bytes, file.modified_ns):
        raise _changed(file)


def _changed(file: InputFile) -> InputError:
    return InputError(
        f"{file.path} has changed since it was indexed; if it holds what it held, the same command goes on"
    )


def _row_numbers(unit: Unit) -> pyarrow.Array:
    import numpy as np
    import pyarrow

    return pyarrow.array(np.arange(unit.first_row, unit.first_row + unit.rows))


def _texts(column: pyarrow.ChunkedArray, where: str, first: int, field: str) -> list[str]:
    """The column as strings; a value that is not one is an InputError that names its row."""
    try:
        texts = column.to_pylist()
    except UnicodeDecodeError:
        texts = []
        for row, value in enumerate(column, start=first):
            try:
                texts.append(value.as_py())
            except UnicodeDecodeError as error:
                raise InputError(f"{where} {row}: field {field!r} is not valid UTF-8: {error.reason}") from None
    for row, text in enumerate(texts, start=first):
        if type(text) is not str:
            check_text(text, f"{where} {row}", field)
    return texts


class _ParquetRows:
    """The rows of a Parquet file, decoded a few at a time, front to back.

    Attributes:
        next_row: the first row that can still be taken.
    """

    def __init__(self, path: Path, columns: list[str]):
        self.next_row = 0
        self._columns = columns
        self._path = path
        self._batches: Iterator[pyarrow.RecordBatch] = iter(())
        self._begun = False
        self._rest: pyarrow.RecordBatch | None = None

    def take(self, first: int, rows: int) -> pyarrow.Table:
        """The rows ``first`` … ``first + rows - 1``; rows before them are skipped."""
        import pyarrow

        if not self._begun:
            self._begin(first)
        taken = []
        while rows and (batch := self._rest or next(self._batches, None)) is not None:
            skipped = min(first - self.next_row, batch.num_rows)
            part = batch.slice(skipped, rows)
            first, rows = first + part.num_rows, rows - part.num_rows
            self.next_row += skipped + part.num_rows
            left = batch.slice(skipped + part.num_rows)
            self._rest = left if left.num_rows else None
            if part.num_rows:
                taken.append(part)
        return pyarrow.Table.from_batches(taken)

    def _begin(self, first: int) -> None:
        """Opens the file at the row group that contains row ``first``."""
        from pyarrow import parquet

        self._begun = True
        opened = parquet.ParquetFile(self._path, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        group = 0
        while self.next_row + opened.metadata.row_group(group).num_rows <= first:
            self.next_row += opened.metadata.row_group(group).num_rows
            group += 1
        groups = list(range(group, opened.num_row_groups))
        self._batches = opened.iter_batches(_BATCH_ROWS, row_groups=groups, columns=self._columns, use_threads=False)
