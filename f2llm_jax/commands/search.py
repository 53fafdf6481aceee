"""Find the texts of a corpus that are most similar to a query.

The search is exact: a query is compared with every text.

--embeddings DIR searches what `f2llm encode --corpus … --out DIR` wrote, without embedding it again: shard by shard, in
the memory of one shard. The model must be the one that wrote it. A .npy or .parquet file of `f2llm encode --output` in
float32 or float16 is also accepted; such a file does not record its model. Results have ids, not texts. int8, binary
and ubinary embeddings are dequantised before they are compared with a query: to the middle of a step, and to 1 or -1
for a bit.

--corpus FILE embeds the texts of a file first, at every search. The texts are held in memory, their embeddings only in
blocks of some tens of thousands.

--output FILE writes the results of all queries, with the ids of the input, or else row numbers from 0:
  .tsv      a TREC run: query id, Q0, id, rank from 1, score, f2llm
  .jsonl    one line per query, as printed by --json
  .parquet  columns query_id, id, rank, score
"""

from __future__ import annotations

import argparse
import codecs
import json
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from f2llm_jax.commands import (
    add_fields,
    add_mesh,
    add_model,
    add_progress,
    add_prompt,
    check_output,
    load_model,
    positive,
    show_progress,
)
from f2llm_jax.errors import InputError
from f2llm_jax.files import local_path, new_file
from f2llm_jax.texts import STDIN, Texts, check_unicode, read_texts

if TYPE_CHECKING:
    import numpy as np

    from f2llm_jax.encoder import Encoder
    from f2llm_jax.stored import StoredEmbeddings

# Texts embedded and compared at a time: 1.3 GB at the 14B's 5,120 values, a twentieth of its weights.
BLOCK_TEXTS = 65536


def declare(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--corpus", metavar="FILE", help="texts as txt, jsonl, csv or parquet; - for stdin")
    source.add_argument("--embeddings", type=Path, metavar="DIR", help="what f2llm encode wrote: a folder, or a file")
    add_fields(parser, "--corpus")
    queries = parser.add_mutually_exclusive_group(required=True)
    queries.add_argument(
        "--query", action="append", metavar="TEXT", help="what to look for; may be given several times"
    )
    queries.add_argument(
        "--queries", metavar="FILE", help="queries, as txt, jsonl, csv or parquet (--field is theirs too); - for stdin"
    )
    add_prompt(parser, "each query", "default: query")
    parser.add_argument("--top", type=positive, default=10, metavar="N", help="texts a query; default: %(default)s")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a .tsv, .jsonl or .parquet file to write")
    parser.add_argument("--force", action="store_true", help="replace an output that exists")
    parser.add_argument(
        "--json", action="store_true", help="a line of JSON a query: query, results of rank, score, row, id, text"
    )
    add_mesh(parser)
    add_progress(parser)


class Found(NamedTuple):
    """The results of a query.

    Attributes:
        query: its text.
        query_id: its id, or else its row number.
        results: best first: rank, score, row, and id and text if available.
    """

    query: str
    query_id: Any
    results: list[dict[str, Any]]


def run(args: argparse.Namespace) -> None:
    write = _check_arguments(args)
    queries = _read_queries(args)
    search = _search_corpus if args.embeddings is None else _search_stored
    if write is not None:
        with new_file(args.output) as stream:  # opened before the work, to find out now whether it can be written
            write(stream, search(queries, args))
        print(f"{args.output}: results of {len(queries.texts)} queries")
        return
    # JSON is UTF-8; if standard output is not, escapes are equivalent.
    escaped = codecs.lookup(sys.stdout.encoding or "utf-8").name != "utf-8"
    for found in search(queries, args):
        if args.json:
            print(_to_json(found, with_id=args.queries is not None, escaped=escaped))
        else:
            _print_results(found)


def _check_arguments(args: argparse.Namespace) -> Callable[[BinaryIO, Iterator[Found]], None] | None:
    """The function that writes the output, or None without --output."""
    if args.corpus == args.queries == STDIN:
        raise InputError("--corpus and --queries cannot both be read from stdin")
    if args.embeddings is not None and args.corpus_format is not None:
        raise InputError("--corpus-format is for --corpus, not for --embeddings")
    if args.output is None:
        return None
    if args.json:
        raise InputError("--json is for standard output; --output FILE.jsonl writes the same to a file")
    args.output = local_path(args.output)
    suffix = args.output.suffix.lower()
    if suffix not in WRITERS:
        raise InputError(f"{args.output}: the output is a {', '.join(WRITERS)} file, not {args.output.suffix!r}")
    inputs = [args.corpus, args.queries, args.embeddings]
    check_output(args.output, [str(path) for path in inputs if path is not None], force=args.force)
    return WRITERS[suffix]


def _read_queries(args: argparse.Namespace) -> Texts:
    if args.queries is None:
        return Texts([check_unicode(query, "--query") for query in args.query], None)
    queries = _read(args.queries, args.field)
    if args.output is not None and args.output.suffix.lower() == ".tsv":
        for id_ in queries.ids or ():
            _trec_id(id_)  # before the work
    return queries


def _read(file: str, field: str, file_format: str | None = None) -> Texts:
    """The texts of a file, with the ids of its field ``id`` or, as BEIR names it, ``_id``."""
    texts = read_texts(file, field=field, file_format=file_format)
    if texts.ids is None and Path(file).is_file():  # a pipe can be read but once
        texts = read_texts(file, field=field, file_format=file_format, id_field="_id")
    return texts


def _search_corpus(queries: Texts, args: argparse.Namespace) -> Iterator[Found]:
    """Embeds the corpus and searches it."""
    corpus = _read(args.corpus, args.field, args.corpus_format)
    if not corpus.texts:
        warnings.warn(f"{args.corpus} holds no texts", stacklevel=1)
    model = load_model(args)

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, len(corpus.texts), BLOCK_TEXTS):
            block = corpus.texts[start : start + BLOCK_TEXTS]
            yield model.encode_document(block, show_progress=show_progress(args), **_options(args, args.dim))

    scores_qk, rows_qk = _nearest(model, queries, blocks(), args, args.dim)
    fields = {"text": [corpus.texts[row] for row in rows_qk.flat]}
    if corpus.ids is not None:
        fields = {"id": [corpus.ids[row] for row in rows_qk.flat]} | fields
    return _results(queries, scores_qk, rows_qk, fields)


def _search_stored(queries: Texts, args: argparse.Namespace) -> Iterator[Found]:
    """Searches what ``f2llm encode`` wrote."""
    from tqdm import tqdm

    stored = _open_stored(args)
    model = load_model(args)
    if stored.dim > model.config.hidden_size:
        raise InputError(
            f"{stored.source} holds embeddings of {stored.dim} dimensions, and {args.model} has but "
            f"{model.config.hidden_size}: name the model that they are of"
        )

    if stored.prompt not in (None, model.prompts["document"]):
        warnings.warn(
            f"{stored.source} was embedded with the prompt {stored.prompt!r}; documents of {args.model} have "
            f"{model.prompts['document']!r} (f2llm encode --prompt-name document)",
            stacklevel=1,
        )

    def blocks() -> Iterator[np.ndarray]:
        with tqdm(total=stored.rows, desc="searching", unit="row", disable=not show_progress(args)) as bar:
            for block_nd in stored.blocks():
                yield block_nd
                bar.update(len(block_nd))

    scores_qk, rows_qk = _nearest(model, queries, blocks(), args, stored.dim)
    return _results(queries, scores_qk, rows_qk, {"id": stored.ids(rows_qk)})


def _open_stored(args: argparse.Namespace) -> StoredEmbeddings:
    """Opens the embeddings, and checks that they are from this model and of this size."""
    from f2llm_jax.convert.digest import model_digest
    from f2llm_jax.release import find_release
    from f2llm_jax.stored import open_stored

    stored = open_stored(args.embeddings)
    if args.dim not in (None, stored.dim):
        raise InputError(
            f"{stored.source} holds embeddings of {stored.dim} dimensions, not of --dim {args.dim}; leave --dim out"
        )
    if stored.model_sha256 not in (None, model_digest(find_release(args.model, args.revision))):
        raise InputError(
            f"{stored.source} holds embeddings of another model than {args.model}, which differs from what was "
            f"{stored.model} then, in its weights or settings"
        )
    if not stored.rows:
        warnings.warn(f"{stored.source} holds no embeddings", stacklevel=1)
    return stored


def _nearest(
    model: Encoder, queries: Texts, blocks: Iterator[np.ndarray], args: argparse.Namespace, dim: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and rows, [queries, top]."""
    from f2llm_jax.search import nearest

    prompt = {"prompt_name": args.prompt_name, "prompt": args.prompt}
    progress = args.queries is not None and show_progress(args)
    query_qd = model.encode_query(queries.texts, show_progress=progress, **prompt, **_options(args, dim))
    return nearest(query_qd, blocks, args.top)


def _options(args: argparse.Namespace, dim: int | None) -> dict[str, Any]:
    return {"dim": dim, "max_length": args.max_length, "batch_tokens": args.batch_tokens}


def _results(
    queries: Texts, scores_qk: np.ndarray, rows_qk: np.ndarray, fields: dict[str, list[Any]]
) -> Iterator[Found]:
    """The results, query by query; ``fields`` has a value for each of ``rows_qk``, in row-major order."""
    top = rows_qk.shape[1]
    for number, query in enumerate(queries.texts):
        hits = zip(scores_qk[number].tolist(), rows_qk[number].tolist(), strict=True)
        results = [
            {"rank": rank + 1, "score": score, "row": row}
            | {name: values[number * top + rank] for name, values in fields.items()}
            for rank, (score, row) in enumerate(hits)
        ]
        yield Found(query, number if queries.ids is None else queries.ids[number], results)


def _to_json(found: Found, *, with_id: bool, escaped: bool) -> str:
    line = ({"query_id": found.query_id} if with_id else {}) | {"query": found.query, "results": found.results}
    return json.dumps(line, ensure_ascii=escaped, default=str)


def _print_results(found: Found) -> None:
    from f2llm_jax.display import isolate, one_line, shorten

    columns = shutil.get_terminal_size((100, 24)).columns
    print(f"query: {isolate(shorten(one_line(found.query), columns - 7))}")
    shown = "text" if not found.results or "text" in found.results[0] else "id"
    print(f"rank    score  {shown}")
    for result in found.results:
        text = isolate(shorten(one_line(str(result[shown])), columns - 15))
        print(f"{result['rank']:4d}  {result['score']:7.4f}  {text}")
    print()


def _write_trec(stream: BinaryIO, results: Iterator[Found]) -> None:
    for found in results:
        query_id = _trec_id(found.query_id)
        for result in found.results:
            id_ = _trec_id(_id(result))
            line = f"{query_id}\tQ0\t{id_}\t{result['rank']}\t{result['score']:.9g}\tf2llm\n"
            stream.write(line.encode())


def _trec_id(id_: Any) -> str:
    text = str(id_)
    if id_ is None or text.split() != [text]:
        raise InputError(
            f"a TREC run has no place for the id {id_!r}, empty or with white space: write .jsonl or .parquet"
        )
    return check_unicode(text, f"the id {text!r}")


def _write_jsonl(stream: BinaryIO, results: Iterator[Found]) -> None:
    for found in results:
        # An id may hold half of a surrogate pair, which becomes a JSON escape.
        stream.write(_to_json(found, with_id=True, escaped=False).encode(errors="backslashreplace") + b"\n")


def _write_parquet(stream: BinaryIO, results: Iterator[Found]) -> None:
    import pyarrow
    from pyarrow import parquet

    columns: dict[str, list[Any]] = {"query_id": [], "id": [], "rank": [], "score": []}
    for found in results:
        for result in found.results:
            row = (found.query_id, _id(result), result["rank"], result["score"])
            for values, value in zip(columns.values(), row, strict=True):
                values.append(value)
    types = {"rank": pyarrow.int32(), "score": pyarrow.float32()}
    try:
        arrays = {name: pyarrow.array(values, types.get(name)) for name, values in columns.items()}
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError) as error:
        raise InputError(f"the ids do not make a column, which has values of one type: {error}") from None
    parquet.write_table(pyarrow.table(arrays), stream)


def _id(result: dict[str, Any]) -> Any:
    return result.get("id", result["row"])


WRITERS = {".tsv": _write_trec, ".jsonl": _write_jsonl, ".parquet": _write_parquet}
