"""Convert a model folder: a release to an Orbax checkpoint for JAX, and back.

--to flax  a converted folder: an Orbax checkpoint in params/, beside the release's tokenizer, prompts and config
--to hf    a release: safetensors, config, tokenizer, prompts, for sentence-transformers, transformers and servers

Values are copied bit by bit, unless --dtype casts them. Memory use does not grow with the model. OUT appears when it is
complete, or not at all; a command that was killed leaves OUT.incomplete, and the same command resumes from there.
"""

from __future__ import annotations

import argparse

from f2llm_jax.commands import add_progress, show_progress
from f2llm_jax.dtypes import STORED_DTYPES


def declare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="M", help="release folder, converted folder or hub id")
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument("--to", required=True, choices=("flax", "hf"), help="what to write")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub id")
    parser.add_argument("--dtype", choices=STORED_DTYPES, help="cast to it; default: as it is")
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of a safetensors file; default: %(default)s"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it is a model folder")
    add_progress(parser)


def run(args: argparse.Namespace) -> None:
    from f2llm_jax.convert.conversion import convert_release

    out = convert_release(
        args.model,
        args.out,
        to=args.to,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        force=args.force,
        revision=args.revision,
        show_progress=show_progress(args),
    )
    print(out)
