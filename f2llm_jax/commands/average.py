"""Average the last checkpoints of a training run into a release.

RUN is the --out folder of f2llm train, which may still be going on. With --last 1, the last checkpoint as it is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from f2llm_jax.commands import needs_extra, positive
from f2llm_jax.dtypes import STORED_DTYPES


def declare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="folder of a training run")
    parser.add_argument("out", metavar="OUT", help="the release folder to write")
    parser.add_argument("--last", type=positive, default=3, metavar="K", help="checkpoints; default: %(default)s")
    parser.add_argument("--dtype", choices=STORED_DTYPES, help="default: that of the model training began with")
    parser.add_argument("--force", action="store_true", help="replace OUT if it is a model folder")


def run(args: argparse.Namespace) -> None:
    with needs_extra("train"):
        from f2llm_jax.train.average import average_run

    steps = average_run(args.run_folder, args.out, last=args.last, dtype=args.dtype, force=args.force)
    print(f"{args.out}: the mean of steps {', '.join(map(str, steps))}")
