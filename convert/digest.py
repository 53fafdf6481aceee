"""Identifies a model without reading all of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from f2llm_jax.convert.orbax import PARAMS
from f2llm_jax.convert.safetensors import read_header
from f2llm_jax.errors import ReleaseError
from f2llm_jax.release import SETTINGS_PATTERNS, WEIGHT_PATTERNS

# One page of weights is read per stretch, and one where each tensor of a safetensors file begins: 9 MB of the 14B.
_PAGE = 4 << 10
_STRETCH = 16 << 20


def model_digest(folder: Path) -> str:
    """SHA-256 of a model's settings and of samples of its weights, from every tensor or at least from every file.

    Files in other folders, such as ``.git`` or ``results``, do not count.
    """
    digest = hashlib.sha256()
    weights = _files(folder, WEIGHT_PATTERNS) | {file for file in (folder / PARAMS).rglob("*") if file.is_file()}
    for file in sorted(_files(folder, SETTINGS_PATTERNS) | weights):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()} {size}\n".encode())
        if file not in weights:
            digest.update(file.read_bytes())
            continue
        with file.open("rb", buffering=0) as stream:  # the buffer for a network file system may be as long as a stretch
            for offset in sorted({*range(0, size, _STRETCH), max(0, size - _PAGE), *_tensor_offsets(file)}):
                stream.seek(offset)
                digest.update(stream.read(_PAGE))
    return digest.hexdigest()


def _files(folder: Path, patterns: Iterable[str]) -> set[Path]:
    return {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}


def _tensor_offsets(file: Path) -> list[int]:
    """Where tensors begin in a safetensors file; none for our Orbax checkpoints, where each tensor has its own file."""
    if file.suffix != ".safetensors":
        return []
    try:
        return [info.offset for info in read_header(file).values()]
    except ReleaseError:  # not weights of the model, or damaged ones, which loading reports
        return []
