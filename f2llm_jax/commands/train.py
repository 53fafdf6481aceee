"""Train a model: contrastive losses, Matryoshka, distillation, on any mesh.

RECIPE is a Python file with a function get_config() that returns a TrainConfig, or the name of a recipe that comes with
f2llm (--list); the recipe tiny is for the output of f2llm demo --folder tiny. --set changes single values:
--set optim.learning_rate=1e-5 --set loss.mrl_dims=8,16,32

OUT gets checkpoints/, tensorboard/ (tensorboard --logdir OUT) and scalars.jsonl; standard error gets a line every
every.log steps and for each validation. With --resume auto, the same command starts a run or resumes it: after a kill
it continues with exactly the next batch, also on another mesh. While a run is active, other runs cannot use OUT.

Exit status: 0 when all steps are done; 143 after a SIGTERM, which saves a checkpoint and cuts a validation short:
--resume auto then repeats the validation and exports; 2 after an error. A loss that is not finite is an error, which
names the step, the dataset and the last good checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
from typing import TYPE_CHECKING

from f2llm_jax.commands import (
    add_processes,
    add_progress,
    add_settings,
    needs_extra,
    show_log,
    show_progress,
    start_processes,
)
from f2llm_jax.errors import InputError

if TYPE_CHECKING:
    from f2llm_jax.train.config import TrainConfig


def declare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="Python file, or name of a recipe")
    parser.add_argument("--out", metavar="OUT", help="folder of the run")
    add_settings(parser)
    parser.add_argument(
        "--resume", choices=("auto", "never"), default="never", help="go on with the run in OUT; default: %(default)s"
    )
    parser.add_argument("--export", metavar="DIR", help="write the trained model as a release")
    parser.add_argument("--list", action="store_true", help="print the recipes, or the settings of RECIPE, and stop")
    add_processes(parser)
    add_progress(parser)


def run(args: argparse.Namespace) -> int:
    with needs_extra("train"):
        from f2llm_jax.train.config import load_recipe, override, recipe_names, values

    if args.recipe is None:
        if not args.list:
            raise InputError("which RECIPE? f2llm train --list names those that come with f2llm")
        print("\n".join(recipe_names()))
        return 0
    config = override(load_recipe(args.recipe), args.settings)
    if args.list:
        print("\n".join(f"{key}={value!r}" for key, value in values(config).items()))
        return 0
    if args.out is None:
        raise InputError("where to? --out DIR gets the run's checkpoints")
    return _train(config, args)


def _train(config: TrainConfig, args: argparse.Namespace) -> int:
    if args.processes is not None and args.coordinator is None:
        raise InputError("processes train together: --processes and --process-id need --coordinator HOST:PORT")
    start_processes(args)
    with needs_extra("train"):
        from f2llm_jax.train.loop import train
        from f2llm_jax.train.source import open_loader

    with contextlib.closing(open_loader(config)) as loader, show_log(args):
        outcome = train(
            config,
            loader,
            args.out,
            resume=args.resume == "auto",
            export=args.export,
            show_progress=show_progress(args),
        )
    if not outcome.finished:
        print(f"stopped after step {outcome.step} of {outcome.total}; --resume auto goes on from {outcome.checkpoint}")
        return 128 + signal.SIGTERM
    print(args.export or outcome.checkpoint)
    return 0
