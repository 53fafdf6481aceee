"""Mine hard negatives for pairs of query and passage.

Reads a Parquet file with columns query and passage, and writes its rows with negative_1, negative_2, …, in the format
of f2llm prepare. Negatives come from the passages of the file, and from --corpus if given.

A query is compared with every distinct passage. The candidates are the HI nearest passages that are not positives of
the same query text (--range LO,HI). Those are removed that score more than --margin times the positive (the lowest, if
the query has several; NV-Retriever's rule) or more than --max-score. The first LO of the rest are skipped, as they may
well be answers, and the next N (--negatives) are the negatives. Rows of a query with fewer than N, and rows with an
empty text, are dropped and counted.

All texts are held in memory, and the embeddings of passages in a temporary file ($TMPDIR).
"""

from __future__ import annotations

import argparse
from pathlib import Path

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
from f2llm_jax.files import local_path
from f2llm_jax.texts import read_texts


def declare(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_mesh(parser)
    parser.add_argument("--raw", required=True, type=Path, metavar="FILE", help="a .parquet file of query and passage")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the .parquet file to write")
    parser.add_argument("--force", action="store_true", help="replace an output that exists")
    parser.add_argument("--corpus", metavar="FILE", help="more passages, as txt, jsonl, csv or parquet; - for stdin")
    add_fields(parser, "--corpus")
    add_prompt(parser, "each query", "default: query, and none before queries that begin with Instruct:")
    parser.add_argument("--negatives", type=positive, default=24, metavar="N", help="of a row; default: %(default)s")
    parser.add_argument(
        "--range", type=_ranks, default=(10, 100), metavar="LO,HI", help="ranks to take them from; default: 10,100"
    )
    parser.add_argument(
        "--margin", type=float, default=0.95, metavar="X", help="of the positive's cosine; default: %(default)s"
    )
    parser.add_argument("--max-score", type=float, metavar="X", help="largest cosine of a negative; default: none")
    add_progress(parser)


def run(args: argparse.Namespace) -> None:
    args.out, args.raw = local_path(args.out), args.raw.expanduser()
    if args.out.suffix != ".parquet":
        raise InputError(f"{args.out}: the output is a .parquet file, not {args.out.suffix!r}")
    inputs = [str(args.raw), *([] if args.corpus is None else [args.corpus])]
    check_output(args.out, inputs, force=args.force)
    from f2llm_jax.train.mine import Pairs, Rule, mine

    first, last = args.range
    limits = {} if args.max_score is None else {"max_score": args.max_score}
    rule = Rule(negatives=args.negatives, first=first, last=last, margin=args.margin, **limits)
    corpus = []
    if args.corpus is not None:
        corpus = read_texts(args.corpus, field=args.field, file_format=args.corpus_format).texts
    pairs = Pairs(args.raw, corpus)
    mined = mine(
        load_model(args),
        pairs,
        args.out,
        rule=rule,
        prompt_name=args.prompt_name,
        prompt=args.prompt,
        dim=args.dim,
        max_length=args.max_length,
        batch_tokens=args.batch_tokens,
        show_progress=show_progress(args),
    )
    print(
        f"{args.out}: {mined.written} rows with {args.negatives} negatives, of {mined.documents} distinct passages; "
        f"dropped: {mined.short} rows with fewer, {mined.bad} with an empty text"
    )


def _ranks(text: str) -> tuple[int, int]:
    first, _, last = text.partition(",")
    if not (first.isdecimal() and last.isdecimal()):
        raise argparse.ArgumentTypeError(f"takes two ranks, like 10,100, not {text!r}")
    return int(first), int(last)
