"""Input texts from files: plain lines, JSON Lines, CSV and Parquet, each cell checked and named if it is wrong."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from f2llm_jax.errors import InputError

if TYPE_CHECKING:
    import pyarrow

STDIN = "-"


class Texts(NamedTuple):
    """The texts of an input, in its order.

    Attributes:
        texts: the texts; an empty line or cell is an empty text.
        ids: the values of the input's ``id`` column, None where a record has none; None if there is no such column.
        id_type: the Arrow type of that column, where the input states one.
    """

    texts: list[str]
    ids: list[Any] | None
    id_type: pyarrow.DataType | None = None


def read_texts(source: str | Path, *, field: str = "text", file_format: str | None = None) -> Texts:
    """Reads all texts of a file into memory.

    Args:
        source: a file, or ``-`` for standard input.
        field: the column (csv, parquet) or key (jsonl) that holds the text; a txt file has a text on every line.
        file_format: one of ``FORMATS``; default by the file's extension, and txt for standard input.

    Raises:
        InputError: no such format or field, a cell that is missing or no string, bad JSON, CSV, Parquet or UTF-8. The
            message names the line, or the row counted from 0.
        OSError: the file cannot be read.
    """
    read = FORMATS[_format_of(source, file_format)]
    if str(source) == STDIN:
        return read(sys.stdin.buffer, "standard input", field)
    with Path(source).open("rb") as stream:
        return read(stream, str(source), field)


def check_unicode(text: str, where: str) -> str:
    """The text itself; half a surrogate pair, which no tokenizer takes, is an InputError that says where it is."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: character {error.start} is half of a surrogate pair, not Unicode text") from None
    return text


def _format_of(source: str | Path, file_format: str | None) -> str:
    if file_format is None:
        file_format = "txt" if str(source) == STDIN else Path(source).suffix.lower().removeprefix(".")
    if file_format not in FORMATS:
        problem = f"unknown format {file_format!r}" if file_format else "no extension to tell the format by"
        raise InputError(f"{source}: {problem}; formats are {', '.join(FORMATS)}")
    return file_format


def _read_txt(stream: BinaryIO, name: str, field: str) -> Texts:
    return Texts([line.removesuffix("\n").removesuffix("\r") for line in _lines(stream, name)], None)


def _read_jsonl(stream: BinaryIO, name: str, field: str) -> Texts:
    texts, ids, any_id = [], [], False
    for number, line in enumerate(_lines(stream, name), start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
        except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
            raise InputError(f"{where}: not valid JSON: {error}") from None
        if not isinstance(record, dict):
            raise InputError(f"{where}: should be a JSON object, not of type {type(record).__name__}")
        if field not in record:
            raise InputError(f"{where}: no field {field!r}; there are {', '.join(map(repr, record)) or 'none'}")
        texts.append(_cell(record[field], where, field))
        ids.append(record.get("id"))
        any_id |= "id" in record
    return Texts(texts, ids if any_id else None)


def _read_csv(stream: BinaryIO, name: str, field: str) -> Texts:
    # The default limit of 128 KiB a cell is less than long documents have; C longs end here on some platforms.
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader(_lines(stream, name), strict=True)
    try:
        header = next(rows, None)
        if header is None:
            raise InputError(f"{name} is empty: a csv file starts with a line of column names")
        if header.count(field) != 1:
            there = "more than one column" if field in header else "no column"
            raise InputError(f"{name} has {there} {field!r} in its first line; there are {', '.join(header)}")
        texts, ids = [], []
        for row in rows:
            if not row:  # a blank line
                continue
            if len(row) != len(header):
                raise InputError(f"{name}, line {rows.line_num}: {len(row)} cells in a table of {len(header)} columns")
            texts.append(row[header.index(field)])
            ids.append(row[header.index("id")] if "id" in header else None)
    except csv.Error as error:
        raise InputError(f"{name}, line {rows.line_num}: not valid CSV: {error}") from None
    return Texts(texts, ids if "id" in header else None)


def _read_parquet(stream: BinaryIO, name: str, field: str) -> Texts:
    import pyarrow
    from pyarrow import parquet

    try:
        # Standard input cannot seek, and Parquet is read from its end.
        file = parquet.ParquetFile(stream if stream.seekable() else io.BytesIO(stream.read()))
        columns = file.schema_arrow.names
        if columns.count(field) != 1:
            there = "more than one column" if field in columns else "no column"
            raise InputError(f"{name} has {there} {field!r}; there are {', '.join(columns)}")
        table = file.read(columns=[column for column in dict.fromkeys((field, "id")) if column in columns])
    except pyarrow.ArrowException as error:
        raise InputError(f"{name} is not valid Parquet: {str(error).splitlines()[0]}") from None
    texts = []
    for row, value in enumerate(table[field]):
        where = f"{name}, row {row}"
        try:
            texts.append(_cell(value.as_py(), where, field))
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: field {field!r} is not valid UTF-8: {error.reason}") from None
    if columns.count("id") != 1:
        return Texts(texts, None)
    return Texts(texts, table["id"].to_pylist(), table["id"].type)


FORMATS: dict[str, Callable[[BinaryIO, str, str], Texts]] = {
    "txt": _read_txt,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "parquet": _read_parquet,
}


def _lines(stream: BinaryIO, name: str) -> Iterator[str]:
    """The lines of a UTF-8 file with their ends, without a byte order mark.

    Only a newline ends a line. Python's own text mode also splits at a lone carriage return, str.splitlines at U+2028.
    """
    for number, line in enumerate(stream, start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{name}, line {number}: not valid UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}"
            ) from None
        yield text.removeprefix("\ufeff") if number == 1 else text


def _cell(value: Any, where: str, field: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else f"of type {type(value).__name__}"
        raise InputError(f"{where}: field {field!r} is {kind}, not a string")
    return check_unicode(value, where)
