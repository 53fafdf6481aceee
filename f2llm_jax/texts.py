"""Input texts from files: plain lines, JSON Lines, CSV and Parquet; every cell is checked, errors name the bad one."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Protocol

from f2llm_jax.errors import InputError

if TYPE_CHECKING:
    import pyarrow

STDIN = "-"

FORMATS = ("txt", "jsonl", "csv", "parquet")


class Texts(NamedTuple):
    """The texts of an input, in its order.

    Attributes:
        texts: the texts; an empty line or cell is an empty text.
        ids: the values of the input's ``id`` column, None for a record without one; None if no record has one.
        id_type: the Arrow type of that column, if the input states one.
    """

    texts: list[str]
    ids: list[Any] | None
    id_type: pyarrow.DataType | None = None


class Position(NamedTuple):
    """A position between two records of a line-based file: the number of bytes and of lines before it."""

    offset: int = 0
    line: int = 0


class Lines:
    """The lines of a UTF-8 file with their line endings, without a byte order mark.

    Only a newline ends a line. Python's own text mode also splits at a lone carriage return, str.splitlines at U+2028.

    Attributes:
        name: of the file, for error messages.
        position: where the next line begins.
    """

    def __init__(self, stream: BinaryIO, name: str, digest: Digest | None = None):
        """Starts at the first line; ``digest`` is updated with the bytes of every line read."""
        self.name = name
        self._stream = stream
        self._digest = digest
        self._offset = self._line = 0

    @property
    def position(self) -> Position:
        return Position(self._offset, self._line)

    def seek(self, position: Position) -> None:
        self._stream.seek(position.offset)
        self._offset, self._line = position

    @property
    def where(self) -> str:
        """The location of the line read last, for error messages."""
        return f"{self.name}, line {self._line}"

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._stream.readline()
        if not line:
            raise StopIteration
        if self._digest is not None:
            self._digest.update(line)
        self._offset += len(line)
        self._line += 1
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self.where}: not valid UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}"
            ) from None
        return text.removeprefix("\ufeff") if self._line == 1 else text


class Digest(Protocol):
    """A hash object of ``hashlib``."""

    def update(self, data: bytes, /) -> object: ...


def read_texts(
    source: str | Path, *, field: str = "text", file_format: str | None = None, id_field: str = "id"
) -> Texts:
    """Reads all texts of a file into memory.

    Args:
        source: a file, or ``-`` for standard input.
        field: the column (csv, parquet) or key (jsonl) that holds the text; a txt file has one text per line.
        file_format: one of ``FORMATS``; default: by the file's extension, txt for standard input.
        id_field: the column or key of the ids, if there is one.

    Raises:
        InputError: there is no such format or field, a cell is missing or not a string, or the JSON, CSV, Parquet or
            UTF-8 is invalid. The message names the line, or the row counted from 0.
        OSError: the file cannot be read.
    """
    file_format = format_of(source, file_format)
    if str(source) == STDIN:
        return _read(sys.stdin.buffer, "standard input", field, id_field, file_format)
    with Path(source).open("rb") as stream:
        return _read(stream, str(source), field, id_field, file_format)


def format_of(source: str | Path, file_format: str | None = None) -> str:
    """The given format, else that of the source's extension; an InputError if it is not one of ``FORMATS``."""
    if file_format is None:
        file_format = "txt" if str(source) == STDIN else Path(source).suffix.lower().removeprefix(".")
    if file_format not in FORMATS:
        problem = f"unknown format {file_format!r}" if file_format else "no extension to tell the format by"
        raise InputError(f"{source}: {problem}; formats are {', '.join(FORMATS)}")
    return file_format


def check_unicode(text: str, where: str) -> str:
    """Returns the text; half a surrogate pair, which no tokenizer accepts, is an InputError that says where it is."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: character {error.start} is half of a surrogate pair, not Unicode text") from None
    return text


def read_object(line: str, where: str) -> dict[Any, Any]:
    """A line's JSON object; anything else is an InputError that says where it is."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
        raise InputError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: should be a JSON object, not of type {type(record).__name__}")
    return record


def field_of(record: dict[str, Any], field: str, where: str) -> Any:
    """A record's value of a field; a record without it is an InputError that says where it is."""
    if field not in record:
        raise InputError(f"{where}: no field {field!r}; there are {', '.join(map(repr, record)) or 'none'}")
    return record[field]


def check_text(value: Any, where: str, field: str) -> str:
    """Returns the value if it is a text; anything else is an InputError that says where it is."""
    if not isinstance(value, str):
        kind = "null" if value is None else f"of type {type(value).__name__}"
        raise InputError(f"{where}: field {field!r} is {kind}, not a string")
    return check_unicode(value, where)


def json_objects(lines: Lines) -> Iterator[dict[Any, Any]]:
    """The objects of a JSON Lines file; ``lines.where`` is the location of the last one. Blank lines are skipped.

    Raises:
        InputError: a line is not a JSON object; the message names it.
    """
    for line in lines:
        if line.strip():
            yield read_object(line, lines.where)


def _read(stream: BinaryIO, name: str, field: str, id_field: str, file_format: str) -> Texts:
    if file_format == "parquet":
        return _read_parquet(stream, name, field, id_field)
    texts, ids = [], []
    for text, id_ in RECORDS[file_format](Lines(stream, name), field, id_field, Position()):
        texts.append(text)
        ids.append(id_)
    return Texts(texts, ids if any(id_ is not None for id_ in ids) else None)


Records = Iterator[tuple[str, Any]]
"""Texts and ids; an id is None where a record has none."""


def _txt_records(lines: Lines, field: str, id_field: str | None, start: Position) -> Records:
    if start.offset:
        lines.seek(start)
    for line in lines:
        yield line.removesuffix("\n").removesuffix("\r"), None


def _jsonl_records(lines: Lines, field: str, id_field: str | None, start: Position) -> Records:
    if start.offset:
        lines.seek(start)
    for record in json_objects(lines):
        yield check_text(field_of(record, field, lines.where), lines.where, field), record.get(id_field)


def _csv_records(lines: Lines, field: str, id_field: str | None, start: Position) -> Records:
    # Long documents exceed the default limit of 128 KiB per cell; on some platforms, this is the largest C long.
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader(lines, strict=True)
    try:
        header = next(rows, None)
        if header is None:
            raise InputError(f"{lines.name} is empty: a csv file starts with a line of column names")
        if header.count(field) != 1:
            there = "more than one column" if field in header else "no column"
            raise InputError(f"{lines.name} has {there} {field!r} in its first line; there are {', '.join(header)}")
        text_column, id_column = header.index(field), header.index(id_field) if id_field in header else None
        if start.offset:
            lines.seek(start)
        for row in rows:
            if not row:  # a blank line
                continue
            if len(row) != len(header):
                raise InputError(f"{lines.where}: {len(row)} cells in a table of {len(header)} columns")
            yield row[text_column], None if id_column is None else row[id_column]
    except csv.Error as error:
        raise InputError(f"{lines.where}: not valid CSV: {error}") from None


RECORDS: dict[str, Callable[[Lines, str, str | None, Position], Records]] = {
    "txt": _txt_records,
    "jsonl": _jsonl_records,
    "csv": _csv_records,
}
"""For each format, the records of a line-based file from a position on: (lines, field, id field, start)."""


def _read_parquet(stream: BinaryIO, name: str, field: str, id_field: str) -> Texts:
    import pyarrow
    from pyarrow import parquet

    try:
        # Standard input cannot seek, and Parquet is read from its end.
        file = parquet.ParquetFile(stream if stream.seekable() else io.BytesIO(stream.read()))
        columns = file.schema_arrow.names
        if columns.count(field) != 1:
            there = "more than one column" if field in columns else "no column"
            raise InputError(f"{name} has {there} {field!r}; there are {', '.join(columns)}")
        table = file.read(columns=[column for column in dict.fromkeys((field, id_field)) if column in columns])
    except pyarrow.ArrowException as error:
        raise InputError(f"{name} is not valid Parquet: {str(error).splitlines()[0]}") from None
    texts = []
    for row, value in enumerate(table[field]):
        where = f"{name}, row {row}"
        try:
            texts.append(check_text(value.as_py(), where, field))
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: field {field!r} is not valid UTF-8: {error.reason}") from None
    if columns.count(id_field) != 1:
        return Texts(texts, None)
    return Texts(texts, table[id_field].to_pylist(), table[id_field].type)
