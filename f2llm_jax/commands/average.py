"""Make a release from a checkpoint of a training run, or from the mean of several.

RUN is the --out folder of f2llm train; training may still be running. The default is the mean of the latest 3
checkpoints, without an older one that is kept as the best; --last 1 takes the last checkpoint as it is, --steps 1500
the one of step 1500, and --best the best one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from f2llm_jax.commands import needs_extra, positive
from f2llm_jax.dtypes import STORED_DTYPES


def declare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="folder of a training run")
    parser.add_argument("out", metavar="OUT", help="the release folder to write")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--last", type=positive, default=3, metavar="K", help="the last K checkpoints; default: %(default)s"
    )
    which.add_argument("--steps", type=_steps, metavar="N,…", help="the checkpoints of these steps")
    which.add_argument("--best", action="store_true", help="the best checkpoint, by the run's every.keep_best")
    parser.add_argument("--dtype", choices=STORED_DTYPES, help="default: that of the model training began with")
    parser.add_argument("--force", action="store_true", help="replace OUT if it is a model folder")


def run(args: argparse.Namespace) -> None:
    with needs_extra("train"):
        from f2llm_jax.train.average import average_run

    steps = average_run(
        args.run_folder,
        args.out,
        last=args.last,
        steps=args.steps,
        best=args.best,
        dtype=args.dtype,
        force=args.force,
    )
    what = f"step {steps[0]}" if len(steps) == 1 else f"the mean of steps {', '.join(map(str, steps))}"
    print(f"{args.out}: {what}")


def _steps(text: str) -> list[int]:
    """Parses an argument like 1000,1500."""
    try:
        return [positive(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes steps like 1000,1500, not {text!r}") from None
