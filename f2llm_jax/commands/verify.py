"""Check whether two models are the same: settings, tensors bit by bit, and embeddings.

A and B are release folders, converted folders or hub ids. If one is in a narrower dtype, the tensors of the other are
rounded to it before the comparison. The exit status is 0 if they agree, 1 if they differ, 2 after an error.
"""

from __future__ import annotations

import argparse

from f2llm_jax.commands import add_progress, show_progress
from f2llm_jax.texts import read_texts


def declare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="release folder, converted folder or hub id")
    parser.add_argument("b", metavar="B", help="another")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--texts", metavar="FILE", help="embed these (txt, jsonl, csv or parquet); default: a few")
    group.add_argument("--no-embeddings", action="store_true", help="compare settings and tensors alone")
    parser.add_argument("--field", default="text", help="column or key that holds the text; default: %(default)s")
    add_progress(parser)


def run(args: argparse.Namespace) -> int:
    from f2llm_jax.convert.verify import verify

    texts = None if args.texts is None else read_texts(args.texts, field=args.field, file_format=None).texts
    report = verify(args.a, args.b, texts=texts, embeddings=not args.no_embeddings, show_progress=show_progress(args))
    print(report)
    return 0 if report.agree else 1
