"""Plan a model on a TPU slice: whether it fits, and how fast it could be. Needs no TPU.

Compiles the real program for the slice with the TPU compiler. Memory and collectives are from the compiler; times are
estimates: the longest of the times for arithmetic, memory traffic and communication at the rates of the data sheet.
Without --mesh, tries the most promising meshes until one fits.

With --dtype int8, projections are counted at the chip's int8 rate, which is twice the bfloat16 rate on v5e, v5p and
v6e; attention stays in bfloat16.

Training is planned for retrieval batches, with 7 negatives per query; clustering batches have 9.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from f2llm_jax.commands import add_settings, mesh_sizes, needs_extra, note, positive
from f2llm_jax.dtypes import DTYPES
from f2llm_jax.errors import InputError

if TYPE_CHECKING:
    from f2llm_jax.config import ModelConfig
    from f2llm_jax.plan import Candidate
    from f2llm_jax.planning.jobs import Job
    from f2llm_jax.train.config import TrainConfig

# Tokens per text, as in the training of the released models.
LENGTH = 1024


def declare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a size (80M … 14B), release folder, converted folder or hub id")
    parser.add_argument(
        "--topology",
        required=True,
        metavar="CHIP:SHAPE",
        help="the slice, for example v5e:4x4, or as gcloud names it: v5litepod-16, v6e-16, v5p-32 (which has 16 chips)",
    )
    parser.add_argument("--do", default="encode", choices=("encode", "train"), help="default: %(default)s")
    parser.add_argument(
        "--mesh", type=mesh_sizes, metavar="AXIS=N,…", help="for example data=2,fsdp=8; default: the best found"
    )
    parser.add_argument(
        "--length",
        type=positive,
        metavar="N",
        help="tokens of a text; default: 1024 for encode, the recipe's data.max_length for train",
    )
    parser.add_argument(
        "--batch-tokens",
        type=positive,
        metavar="N",
        help="tokens computed at a time on all chips; default: 32,768 a device for encode, what fits for train",
    )
    parser.add_argument("--recipe", metavar="R", help="for train; default: stage 2 of the model's size")
    add_settings(parser, of="for train: ")
    parser.add_argument("--dtype", choices=DTYPES, help="for encode; default: bfloat16")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    import jax

    from f2llm_jax.plan import make_plan
    from f2llm_jax.planning.chips import parse_topology
    from f2llm_jax.planning.counts import Axes
    from f2llm_jax.planning.report import describe, to_json

    # A plan needs no device, and must not claim a TPU of this machine.
    jax.config.update("jax_platforms", "cpu")
    topology = parse_topology(args.topology)
    mesh = None if args.mesh is None else Axes(**args.mesh)
    job = _job(args)
    plan = make_plan(job, topology, mesh, on_try=_say_what_is_tried)
    print(to_json(plan) if args.json else describe(plan))
    return 0 if plan.fits else 1


def _job(args: argparse.Namespace) -> Job:
    from f2llm_jax.planning.jobs import EncodeJob, TrainJob

    config = read_config(args.model)
    asked = {"config": config, "batch_tokens": args.batch_tokens}
    if args.do == "encode":
        for name, given in (("recipe", args.recipe), ("set", args.settings)):
            if given:
                raise InputError(f"--{name} is for --do train, not for --do encode")
        return EncodeJob(**asked, length=args.length or LENGTH, dtype=args.dtype or "bfloat16")
    if args.dtype is not None:
        raise InputError("--dtype is for --do encode; a recipe says what training computes in")
    recipe = _recipe(args, config)
    # A teacher whose states are read from disk is never loaded.
    teacher = None if recipe.teacher is None or recipe.teacher_states is not None else read_config(recipe.teacher)
    return TrainJob(**asked, length=args.length or recipe.data.max_length, recipe=recipe, teacher=teacher)


def _recipe(args: argparse.Namespace, config: ModelConfig) -> TrainConfig:
    """The recipe, with --set applied."""
    for setting in args.settings:
        key = setting.partition("=")[0]
        if key == "model" or key.startswith("mesh."):
            raise InputError(f"--set {setting}: a plan takes it from {'MODEL' if key == 'model' else '--mesh'}")
    with needs_extra("train"):
        from f2llm_jax.train.config import load_recipe, override
    return override(load_recipe(args.recipe or _recipe_of(config, args.model)), args.settings)


def read_config(model: str) -> ModelConfig:
    """The sizes of a model; for a released model, named by its size or its hub id, without accessing the hub."""
    from f2llm_jax.configs.models import MODELS
    from f2llm_jax.release import find_release, read_release

    size = model.rsplit("-", 1)[-1] if model.startswith("codefuse-ai/F2LLM-v2-") else model
    if size in MODELS:
        return MODELS[size]
    return read_release(find_release(model, weights=False)).config


def _recipe_of(config: ModelConfig, model: str) -> str:
    """The stage-2 recipe of the released model with the same sizes."""
    from f2llm_jax.configs.models import MODELS

    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for size, released in MODELS.items():
        if all(getattr(released, name) == getattr(config, name) for name in names):
            return f"stage2_{size.replace('.', '_').lower()}"
    raise InputError(f"{model} has the sizes of no released model: --recipe says how it would be trained")


def _say_what_is_tried(candidate: Candidate) -> None:
    note(f"compiling for {candidate.mesh}, {candidate.rows_at_once:,} rows at a time")
