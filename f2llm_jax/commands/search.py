"""Find the texts of a file that are most similar to a query.

The search is exact: every text of the corpus is embedded and compared. The texts are held in memory, their embeddings
only some tens of thousands at a time. Every search embeds them anew: to search the same corpus often, write them once
with `f2llm encode`, and compare in Python, with Encoder.similarity for example.
"""

from __future__ import annotations

import argparse
import codecs
import json
import shutil
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from f2llm_jax.commands import add_model, add_progress, add_prompt, add_texts, load_model, positive, show_progress
from f2llm_jax.texts import check_unicode, read_texts

if TYPE_CHECKING:
    import numpy as np

    from f2llm_jax.encoder import Encoder

# Texts embedded and compared at a time: at the 14B's 5,120 values that is 1.3 GB, a twentieth of its weights.
BLOCK_TEXTS = 65536


def declare(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_texts(parser, "--corpus")
    parser.add_argument(
        "--query", required=True, action="append", metavar="TEXT", help="what to look for; may be given several times"
    )
    add_prompt(parser, "each query", "default: query")
    parser.add_argument("--top", type=positive, default=10, metavar="N", help="texts a query; default: %(default)s")
    parser.add_argument(
        "--json", action="store_true", help="a line of JSON a query: query, results of rank, score, row, id, text"
    )
    add_progress(parser)


def run(args: argparse.Namespace) -> None:
    queries = [check_unicode(query, "--query") for query in args.query]
    corpus = read_texts(args.corpus, field=args.field, file_format=args.corpus_format)
    if not corpus.texts:
        warnings.warn(f"{args.corpus} holds no texts", stacklevel=1)
    scores_qk, rows_qk = _search(load_model(args), queries, corpus.texts, args)
    # JSON is UTF-8; where standard output is not, escapes say the same.
    escaped = codecs.lookup(sys.stdout.encoding or "utf-8").name != "utf-8"
    for query, scores_k, rows_k in zip(queries, scores_qk, rows_qk, strict=True):
        results = [
            {"rank": rank, "score": float(score), "row": int(row)}
            | ({} if corpus.ids is None else {"id": corpus.ids[row]})
            | {"text": corpus.texts[row]}
            for rank, (score, row) in enumerate(zip(scores_k, rows_k, strict=True), start=1)
        ]
        if args.json:
            print(json.dumps({"query": query, "results": results}, ensure_ascii=escaped, default=str))
        else:
            _print_results(query, results)


def _search(
    model: Encoder, queries: list[str], corpus: list[str], args: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray]:
    from f2llm_jax.search import nearest

    options = {"dim": args.dim, "max_length": args.max_length, "batch_tokens": args.batch_tokens}
    query_qd = model.encode_query(queries, prompt_name=args.prompt_name, prompt=args.prompt, **options)

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, len(corpus), BLOCK_TEXTS):
            block = corpus[start : start + BLOCK_TEXTS]
            yield model.encode_document(block, show_progress=show_progress(args), **options)

    return nearest(query_qd, blocks(), args.top)


def _print_results(query: str, results: list[dict[str, Any]]) -> None:
    from f2llm_jax.display import isolate, one_line, shorten

    columns = shutil.get_terminal_size((100, 24)).columns
    print(f"query: {isolate(shorten(one_line(query), columns - 7))}")
    print("rank    score  text")
    for result in results:
        text = isolate(shorten(one_line(result["text"]), columns - 15))
        print(f"{result['rank']:4d}  {result['score']:7.4f}  {text}")
    print()
