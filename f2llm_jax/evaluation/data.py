"""Evaluation data: retrieval sets in BEIR's layout, and files of sentence pairs."""

from __future__ import annotations

import csv
import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from f2llm_jax.errors import InputError
from f2llm_jax.texts import Lines, check_text, json_objects

if TYPE_CHECKING:
    import pyarrow

FORMATS = (".jsonl", ".parquet", ".tsv", ".csv")

# Rows read from a Parquet file at a time.
_PARQUET_ROWS = 4096


@dataclasses.dataclass(frozen=True)
class RetrievalData:
    """Queries, and relevance judgements on the documents of a corpus, which stays on disk (see ``documents``).

    Attributes:
        query_ids, queries: ids and texts of the queries.
        document_ids: ids of the corpus, in its order.
        qrels: {query id: {document id: grade}}; grades above 0 are relevant.
        corpus_file: the file with the texts of the corpus.
        ignore_identical_ids: whether to leave a document with the id of the query out of the query's ranking.
    """

    query_ids: list[str]
    queries: list[str]
    document_ids: list[str]
    qrels: dict[str, dict[str, int]]
    corpus_file: Path
    ignore_identical_ids: bool = False

    def documents(self) -> Iterator[str]:
        """The texts of the corpus in the order of ``document_ids``; title and text are joined as in MTEB."""
        for _, text in _documents(self.corpus_file):
            yield text


def read_retrieval(
    folder: str | Path, *, split: str = "test", judged_only: bool = False, ignore_identical_ids: bool = False
) -> RetrievalData:
    """Reads a retrieval set in BEIR's layout and checks all of it, so that errors are found before anything is encoded.

    The folder holds ``corpus`` (``_id``, optional ``title``, ``text``), ``queries`` (``_id``, ``text``) and
    ``qrels/SPLIT`` (``query-id``, ``corpus-id``, ``score``), each as .jsonl, .parquet, .tsv or .csv.

    Args:
        folder: the folder.
        split: the split of the judgements.
        judged_only: leave out queries without judgements, as BEIR and MTEB do, whose query files have the queries of
            all splits. By default such a query is an error.
        ignore_identical_ids: leave a document with the id of the query out of the query's ranking, as BEIR always does,
            and MTEB in tasks whose queries are documents (ArguAna, Quora). Without it, such a document is a warning.

    Raises:
        InputError: a file or column is missing, an id appears twice, the corpus is empty, a query has no judgements, or
            a judgement names an unknown query or document.
    """
    folder = Path(folder)
    corpus_file = _find(folder / "corpus")
    document_ids = [name for name, _ in _documents(corpus_file)]
    _check_ids(document_ids, corpus_file, "documents")
    queries_file = _find(folder / "queries")
    queries: dict[str, str] = {}
    query_ids = []
    for where, row in read_rows(queries_file, ("text",), ("_id", "id")):
        query_ids.append(_id(row, where))
        queries[query_ids[-1]] = check_text(row["text"], where, "text")
    _check_ids(query_ids, queries_file, "queries")
    qrels = _read_qrels(_find(folder / "qrels" / split), queries, set(document_ids))
    unjudged = [query for query in query_ids if query not in qrels]
    if unjudged and not judged_only:
        raise InputError(
            f"{queries_file}: {len(unjudged)} of {len(query_ids)} queries have no judgement in split {split!r}, the "
            f"first is {unjudged[0]!r}; to leave them out as BEIR does, ask for judged queries only"
        )
    query_ids = [query for query in query_ids if query in qrels]
    if not ignore_identical_ids:
        _warn_of_identical_ids(query_ids, document_ids, folder)
    texts = [queries[query] for query in query_ids]
    return RetrievalData(query_ids, texts, document_ids, qrels, corpus_file, ignore_identical_ids)


def _warn_of_identical_ids(query_ids: Sequence[str], document_ids: Sequence[str], folder: Path) -> None:
    documents = set(document_ids)
    identical = [query for query in query_ids if query in documents]
    if identical:
        warnings.warn(
            f"{folder}: {len(identical)} of {len(query_ids)} queries have the id of a document, the first is "
            f"{identical[0]!r}; if they are the same texts, --ignore-identical-ids leaves them out of their rankings",
            stacklevel=3,
        )


def read_bitext(file: str | Path, *, columns: tuple[str, str] | None = None) -> tuple[list[str], list[str]]:
    """Reads pairs of translations.

    Args:
        file: .tsv, .csv, .jsonl or .parquet with named columns.
        columns: the two columns; may be omitted if the file has only two.

    Raises:
        InputError: the file or a column is missing, there are no pairs, or a cell is not text.
    """
    file = Path(file)
    if columns is None:
        columns = _two_columns(file)
    rows = read_rows(file, columns, ())
    pairs = [tuple(check_text(row[column], where, column) for column in columns) for where, row in rows]
    if not pairs:
        raise InputError(f"{file} holds no pairs")
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def read_rows(
    file: Path, required: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file, one at a time.

    Yields:
        The place of the row, for messages, and {column: value} of all requested columns; optional ones may be None.

    Raises:
        InputError: the file is missing, damaged or of an unsupported format, or lacks a required column.
    """
    for where, row in _rows(file, (*required, *optional)):
        for column in required:
            if column not in row:
                raise InputError(f"{where}: no column {column!r}; there are {', '.join(row) or 'none'}")
        yield where, {column: row.get(column) for column in (*required, *optional)}


def _rows(file: Path, columns: Sequence[str] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """All rows with all columns; from a Parquet file only ``columns``, unless that is None."""
    if file.suffix not in FORMATS:
        raise InputError(f"{file}: the format is none of {', '.join(FORMATS)}")
    if not file.is_file():
        raise InputError(f"{file} does not exist")
    if file.suffix == ".parquet":
        return _read_parquet(file, columns)
    return _read_jsonl(file) if file.suffix == ".jsonl" else _read_table(file)


def _read_jsonl(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.open("rb") as stream:
        lines = Lines(stream, str(file))
        for row in json_objects(lines):
            yield lines.where, row


def _read_table(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # the default limit of 128 KiB per cell is too small for long documents
    # .tsv as BEIR writes it is separated by tabs and has no quoting: a lone quotation mark is part of the text.
    options: dict[str, Any] = {} if file.suffix == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    with file.open(encoding="utf-8-sig", newline="") as stream:
        rows = csv.reader(stream, strict=True, **options)
        try:
            header = next(rows, [])
            for cells in rows:
                where = f"{file}, line {rows.line_num}"
                if len(cells) not in (0, len(header)):
                    raise InputError(f"{where}: {len(cells)} cells in a table of {len(header)} columns")
                if cells:
                    yield where, dict(zip(header, cells, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{file}, line {rows.line_num}: {error}") from None


def _read_parquet(file: Path, columns: Sequence[str] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    from pyarrow import parquet

    try:
        stream = parquet.ParquetFile(file)
        there = stream.schema_arrow.names
        wanted = there if columns is None else [column for column in columns if column in there]
        number = 0
        for batch in stream.iter_batches(_PARQUET_ROWS, columns=wanted):
            for row in _records(batch):
                yield f"{file}, row {number}", row
                number += 1
    except UnicodeDecodeError as error:
        raise InputError(f"{file}, row {number}: not valid UTF-8: {error.reason}") from None
    except pyarrow.ArrowException as error:
        raise InputError(f"{file} is not valid Parquet: {str(error).splitlines()[0]}") from None


def _records(batch: pyarrow.RecordBatch) -> Iterable[dict[str, Any]]:
    """The rows of a batch; if one is not valid UTF-8, the rows before it are returned first."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        return (batch.slice(row, 1).to_pylist()[0] for row in range(batch.num_rows))


def _documents(file: Path) -> Iterator[tuple[str, str]]:
    """Ids, and texts prefixed with their titles."""
    for where, row in read_rows(file, ("text",), ("_id", "id", "title")):
        text, title = check_text(row["text"], where, "text"), row["title"]
        yield _id(row, where), (check_text(title, where, "title") + " " + text if title else text).strip()


def _find(stem: Path) -> Path:
    """The file with this name in one of the formats."""
    if not stem.parent.is_dir():
        raise InputError(f"{stem.parent} is no folder")
    files = [file for suffix in FORMATS if (file := stem.with_name(stem.name + suffix)).is_file()]
    if len(files) != 1:
        there = " and ".join(file.name for file in files) if files else "none of them"
        raise InputError(f"one file {stem} with an ending of {', '.join(FORMATS)} is needed; there is {there}")
    return files[0]


def _read_qrels(file: Path, queries: dict[str, str], documents: set[str]) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    for where, row in read_rows(file, ("query-id", "corpus-id", "score")):
        query, document = str(row["query-id"]), str(row["corpus-id"])
        for kind, name, known in (("query", query, queries), ("document", document, documents)):
            if name not in known:
                raise InputError(f"{where}: there is no {kind} {name!r}")
        grade = _grade(row["score"], where)
        if document in qrels.setdefault(query, {}):
            raise InputError(f"{where}: query {query!r} and document {document!r} are judged twice")
        qrels[query][document] = grade
    if not qrels:
        raise InputError(f"{file} holds no judgements")
    return qrels


def _grade(score: Any, where: str) -> int:
    try:
        grade = int(score)
        if isinstance(score, str) or grade == score:  # int() truncates 1.9 to 1
            return grade
    except (TypeError, ValueError, OverflowError):
        pass
    raise InputError(f"{where}: the score is {score!r}, not a whole number")


def _two_columns(file: Path) -> tuple[str, str]:
    first = next(_rows(file, None), None)
    names = [] if first is None else list(first[1])
    if len(names) != 2:
        raise InputError(f"{file}: which two of its columns ({', '.join(names) or 'none'}) are the pairs?")
    return names[0], names[1]


def _id(row: dict[str, Any], where: str) -> str:
    """The id of a row as a string: ``_id`` as in BEIR's files, or ``id`` as in some datasets on the hub."""
    value = row["_id"] if row["_id"] is not None else row["id"]
    if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
        raise InputError(f"{where}: no '_id' (a string or whole number)")
    return str(value)


def _check_ids(ids: list[str], file: Path, what: str) -> None:
    if not ids:
        raise InputError(f"{file} holds no {what}")
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            raise InputError(f"{file}: the id {name!r} appears twice")
        seen.add(name)
