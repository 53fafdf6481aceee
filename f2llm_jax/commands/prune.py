"""Prune a model to a smaller one, to be trained with the larger one as its teacher.

Keeps the first layers, the hidden channels with the largest activations (the same channels in all layers), and in each
layer the MLP channels with the largest activations; all heads stay. OUT is a release, and also has
  pruning.json   what was kept, and its share of the activations' energy in every layer
  pruning.png    the same as a plot, and the importance of channels

--calibration takes texts (txt, jsonl, csv, parquet), or a folder written by f2llm prepare. --importance measures a
channel where projections read it: l2 (root mean square), mean (absolute value), or weighted (root mean square times the
norm of the weights that read it). --layers-by change keeps the layers that change the direction of their input most,
instead of the first layers.

Needs the extras [train] and [eval].
"""

from __future__ import annotations

import argparse

from f2llm_jax.commands import add_mesh, add_progress, mesh_of, needs_extra, positive, show_progress
from f2llm_jax.dtypes import STORED_DTYPES
from f2llm_jax.errors import InputError


def declare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RELEASE", help="release folder, converted folder or hub id")
    parser.add_argument("out", metavar="OUT", help="the release folder to write")
    parser.add_argument("--calibration", required=True, metavar="FILE", help="texts, or a folder of prepared data")
    parser.add_argument("--to", choices=("330M", "160M", "80M"), help="the sizes of a released model")
    parser.add_argument("--hidden", type=positive, metavar="D", help="hidden channels; default: all")
    parser.add_argument("--mlp", type=positive, metavar="F", help="MLP channels of a layer; default: all")
    parser.add_argument("--layers", type=positive, metavar="N", help="layers; default: all")
    parser.add_argument(
        "--importance", default="l2", choices=("l2", "mean", "weighted"), help="of a channel; default: %(default)s"
    )
    parser.add_argument(
        "--layers-by", default="first", choices=("first", "change"), help="which layers stay; default: %(default)s"
    )
    parser.add_argument(
        "--texts", type=positive, default=1024, metavar="N", help="that many, drawn at random; default: %(default)s"
    )
    parser.add_argument(
        "--max-length", type=positive, default=512, metavar="N", help="cut texts to N tokens; default: %(default)s"
    )
    parser.add_argument("--dtype", choices=STORED_DTYPES, help="to write; default: RELEASE's")
    parser.add_argument("--force", action="store_true", help="replace OUT if it is a model folder")
    add_mesh(parser)
    add_progress(parser)


def run(args: argparse.Namespace) -> None:
    from f2llm_jax.configs.models import MODELS

    sizes = {"hidden": args.hidden, "mlp": args.mlp, "layers": args.layers}
    if args.to is not None:
        if given := [f"--{name}" for name, size in sizes.items() if size is not None]:
            raise InputError(f"--to {args.to} states all sizes; leave out {', '.join(given)}")
        to = MODELS[args.to]
        sizes = {"hidden": to.hidden_size, "mlp": to.intermediate_size, "layers": to.num_hidden_layers}
    elif not any(sizes.values()):
        raise InputError("to which size? give --to, or some of --hidden, --mlp and --layers")
    with needs_extra("train"):
        from f2llm_jax.train.prune import prune

    report = prune(
        args.model,
        args.out,
        calibration=args.calibration,
        **sizes,
        importance=args.importance,
        layers_by=args.layers_by,
        texts=args.texts,
        max_length=args.max_length,
        mesh=mesh_of(args),
        dtype=args.dtype,
        force=args.force,
        show_progress=show_progress(args),
    )
    for name, energy in report["energy_kept"].items():
        print(f"{name}: {min(energy):.1%} to {max(energy):.1%} of the energy kept")
    print(f"{args.out}: {report['to']['parameters']:,} of {report['from']['parameters']:,} parameters")
