"""Show a model's sizes, prompts and files, and the memory that its weights need.

Neither reads weights, nor downloads them for a hub id.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from f2llm_jax.dtypes import DTYPES

if TYPE_CHECKING:
    from f2llm_jax.release import Release


def declare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="M", help="release folder, converted folder or hub id")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub id")


def run(args: argparse.Namespace) -> None:
    from f2llm_jax.release import find_release, read_release

    folder = find_release(args.model, args.revision, weights=False)
    lines = [("folder", str(folder)), *_describe(read_release(folder)), ("on disk", _on_disk(folder))]
    label_columns = max(len(label) for label, _ in lines) + 2
    for label, value in lines:
        print(f"{label:{label_columns}}{value}")


def _describe(release: Release) -> list[tuple[str, str]]:
    from f2llm_jax.convert.load import params_bytes
    from f2llm_jax.model import count_parameters

    config = release.config
    parameters = count_parameters(config)
    table = config.vocab_size * config.hidden_size
    default = release.default_prompt_name
    sizes = {dtype: params_bytes(config, dtype) for dtype in DTYPES}
    return [
        ("parameters", f"{parameters:,} ({table:,} of them the embedding table)"),
        ("layers", str(config.num_hidden_layers)),
        ("hidden size", str(config.hidden_size)),
        ("MLP size", str(config.intermediate_size)),
        ("heads", f"{config.num_attention_heads} query, {config.num_key_value_heads} key/value"),
        ("head dim", str(config.head_dim)),
        ("vocabulary", f"{config.vocab_size:,} rows"),
        ("Matryoshka dims", " ".join(map(str, config.matryoshka_dims))),
        ("max length", f"{release.max_length:,} tokens"),
        *((f"prompt {name!r}", json.dumps(text, ensure_ascii=False)) for name, text in release.prompts.items()),
        ("default prompt", "none" if default is None else repr(default)),
        ("released dtype", config.dtype),
        ("memory, weights only", ", ".join(f"{dtype} {_megabytes(size)}" for dtype, size in sizes.items())),
    ]


def _on_disk(folder: Path) -> str:
    files = [file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file()]
    files = [file for file in files if not file.parts[0].startswith(".")]  # a clone has everything again in .git
    weights = [file for file in files if file.suffix == ".safetensors" or file.parts[0] == "params"]

    def size(files: list[Path]) -> str:
        return _megabytes(sum((folder / file).stat().st_size for file in files))

    return f"{len(files)} files, {size(files)}; {f'{size(weights)} of it weights' if weights else 'no weights'}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
