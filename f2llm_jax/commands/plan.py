"""What a TPU slice would do with a model: whether it fits, and how fast it could be. Needs no TPU.

Compiles the real program for the slice with the TPU compiler. Memory and collectives are the compiler's; times are
estimates: the longest of what arithmetic, memory traffic and exchange would take at the rates of the data sheet.
Without --mesh, tries the meshes that look best until one fits.

Training is planned for batches of retrieval, 7 negatives a query; those of clustering have 9.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from f2llm_jax.commands import mesh_sizes, needs_extra, positive
from f2llm_jax.errors import InputError

if TYPE_CHECKING:
    from f2llm_jax.config import ModelConfig
    from f2llm_jax.plan import Candidate
    from f2llm_jax.planning.jobs import Job


def declare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a size (80M … 14B), release folder, converted folder or hub id")
    parser.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="the slice, for example v5e:4x4")
    parser.add_argument("--do", default="encode", choices=("encode", "train"), help="default: %(default)s")
    parser.add_argument(
        "--mesh", type=mesh_sizes, metavar="AXIS=N,…", help="for example data=2,fsdp=8; default: the best found"
    )
    parser.add_argument(
        "--length", type=positive, default=1024, metavar="N", help="tokens of a text; default: %(default)s"
    )
    parser.add_argument(
        "--batch-tokens",
        type=positive,
        metavar="N",
        help="tokens computed at a time on all chips; default: 32,768 a device for encode, what fits for train",
    )
    parser.add_argument("--recipe", metavar="R", help="for train; default: stage 2 of the model's size")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="for encode; default: bfloat16")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    import jax

    from f2llm_jax.plan import make_plan
    from f2llm_jax.planning.chips import parse_topology
    from f2llm_jax.planning.counts import Axes
    from f2llm_jax.planning.report import describe, to_json

    # A plan needs no device; a TPU of this machine must not be taken for it.
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
    asked = {"config": config, "length": args.length, "batch_tokens": args.batch_tokens}
    if args.do == "encode":
        if args.recipe is not None:
            raise InputError("--recipe is for --do train, not for --do encode")
        return EncodeJob(**asked, dtype=args.dtype or "bfloat16")
    if args.dtype is not None:
        raise InputError("--dtype is for --do encode; a recipe says what training computes in")
    with needs_extra("train"):
        from f2llm_jax.train.config import load_recipe
    recipe = load_recipe(args.recipe or _recipe_of(config, args.model))
    # A teacher whose states are read from disk is never loaded.
    teacher = None if recipe.teacher is None or recipe.teacher_states is not None else read_config(recipe.teacher)
    return TrainJob(**asked, recipe=recipe, teacher=teacher)


def read_config(model: str) -> ModelConfig:
    """The sizes of a model: those of a released one by its size or its name on the hub, without asking the hub."""
    from f2llm_jax.configs.models import MODELS
    from f2llm_jax.release import find_release, read_release

    size = model.rsplit("-", 1)[-1] if model.startswith("codefuse-ai/F2LLM-v2-") else model
    if size in MODELS:
        return MODELS[size]
    return read_release(find_release(model, weights=False)).config


def _recipe_of(config: ModelConfig, model: str) -> str:
    """The stage-2 recipe of the released model that has the same sizes."""
    from f2llm_jax.configs.models import MODELS

    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for size, released in MODELS.items():
        if all(getattr(released, name) == getattr(config, name) for name in names):
            return f"stage2_{size.replace('.', '_').lower()}"
    raise InputError(f"{model} has the sizes of no released model: --recipe says how it would be trained")


def _say_what_is_tried(candidate: Candidate) -> None:
    print(f"f2llm: compiling for {candidate.mesh}, {candidate.rows_at_once:,} rows at a time", file=sys.stderr)
