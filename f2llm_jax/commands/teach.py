"""Compute a teacher's states of prepared data once, for f2llm train to read.

DATA is a folder written by f2llm prepare. OUT gets the teacher's unnormalised state of every distinct document and of
every training query, in ArrayRecord. With --set teacher_states=OUT, f2llm train distils from these instead of computing
them in every step of every epoch. --dim keeps the first values of a state, as many as the student's hidden size (320
for the 80M): a value takes 2 bytes, or 4 with --dtype float32.

OUT appears when it is complete, or not at all; a command that was killed leaves OUT.incomplete, and the same command
resumes from there. Training refuses states of other data, of another --max-length, or of a teacher with other weights.
"""

from __future__ import annotations

import argparse

from f2llm_jax.commands import add_mesh, add_progress, mesh_of, needs_extra, positive, show_progress


def declare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="folder of prepared data")
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument("--teacher", required=True, metavar="M", help="release folder, converted folder or hub id")
    parser.add_argument("--dim", type=positive, metavar="D", help="values of a state to keep; default: all")
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float32"),
        help="of the computation, and of what is written; default: %(default)s",
    )
    parser.add_argument(
        "--max-length",
        type=positive,
        default=1024,
        metavar="N",
        help="cut texts to N tokens, training's data.max_length; default: %(default)s",
    )
    parser.add_argument("--batch-tokens", type=positive, metavar="N", help="tokens computed at a time")
    parser.add_argument("--force", action="store_true", help="replace OUT, and drop unfinished work")
    add_mesh(parser)
    add_progress(parser)


def run(args: argparse.Namespace) -> None:
    with needs_extra("train"):
        from f2llm_jax.train.teacher import teach

    settings = teach(
        args.data,
        args.teacher,
        args.out,
        dim=args.dim,
        dtype=args.dtype,
        max_length=args.max_length,
        batch_tokens=args.batch_tokens,
        mesh=mesh_of(args),
        force=args.force,
        show_progress=show_progress(args),
    )
    print(f"{args.out}: {settings.documents} documents and {settings.queries} queries, {settings.dim} dimensions")
