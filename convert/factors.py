"""ML-Embed: releases that store the embedding table as two factors.

ML-Embed trains U [vocabulary, r] and V [r, hidden] instead of the table. This follows the reference's
``ML-Embed/utils.py: save_checkpoint``, which stores them beside the weights as ``U.pth`` and ``V.pth`` (one tensor
each, by ``torch.save``) and their product ``U @ V``, in their own dtype, among the weights as ``embed_tokens.weight``;
and ``ML-Embed/model.py``, whose forward pass looks tokens up in that product. A release with the table is therefore
read like any other, and the factors are not opened; without it, the table is computed from the factors.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from f2llm_jax.convert.safetensors import Checkpoint
from f2llm_jax.convert.table import HF_NAMES
from f2llm_jax.convert.tensors import CODES, DTYPES, TensorInfo, array_blocks, check_finite
from f2llm_jax.errors import ReleaseError

FACTORS = ("U", "V")

_TABLE = HF_NAMES["embed_tokens"]


def open_release(folder: Path) -> Checkpoint:
    """The weights of a release folder, with a factored embedding table (ML-Embed) or a plain one.

    Raises:
        ReleaseError: as for ``Checkpoint`` and ``FactoredCheckpoint``.
    """
    checkpoint = Checkpoint(folder)
    stored = all(name in checkpoint.tensors for name in FACTORS)
    beside = all((folder / f"{name}.pth").exists() for name in FACTORS)
    return FactoredCheckpoint(folder) if _TABLE not in checkpoint.tensors and (stored or beside) else checkpoint


class FactoredCheckpoint(Checkpoint):
    """A release whose embedding table is the product of two factors; the product is computed and kept in memory."""

    def __init__(self, folder: Path):
        """Reads all headers, and the factors.

        Raises:
            ReleaseError: as for ``Checkpoint``; or the factors cannot be multiplied, or PyTorch is missing.
        """
        super().__init__(folder)
        try:
            import torch
        except ImportError:
            raise ReleaseError(
                f"{folder} holds its embedding table as factors; multiplying them takes PyTorch: pip install torch"
            ) from None
        u, v = (self._read_factor(name, torch) for name in FACTORS)
        if u.ndim != 2 or v.ndim != 2 or u.shape[1] != v.shape[0] or u.dtype != v.dtype:
            shapes = f"U {list(u.shape)} {u.dtype}, V {list(v.shape)} {v.dtype}"
            raise ReleaseError(f"{folder}: the factors cannot be multiplied: {shapes}")
        dtype = CODES[str(u.dtype).removeprefix("torch.")]
        bits = {2: torch.int16, 4: torch.int32}[u.element_size()]
        self._product = (u @ v).view(bits).numpy().view(DTYPES[dtype])
        self.tensors[_TABLE] = TensorInfo(folder / f"{FACTORS[0]}.pth", dtype, self._product.shape, 0)

    def files(self) -> list[Path]:
        beside = (self.folder / f"{name}.pth" for name in FACTORS)
        return [*super().files(), *(file for file in beside if file.exists())]

    def _read_factor(self, name: str, torch: Any) -> Any:
        info = self.tensors.get(name)
        if info is not None:
            values = np.empty(info.shape, DTYPES[info.dtype])
            for first, block in super().blocks(name, info.shape):
                values[first : first + len(block)] = block
            del self.tensors[name]
            bits = np.int16 if values.itemsize == 2 else np.int32
            return torch.from_numpy(values.view(bits)).view(getattr(torch, values.dtype.name))
        file = self.folder / f"{name}.pth"
        try:
            # The only pickle that this package reads from a release, and only tensors are loaded from it.
            factor = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ReleaseError(f"{file} holds no plain tensor: {type(error).__name__}: {error}") from None
        if not isinstance(factor, torch.Tensor) or str(factor.dtype).removeprefix("torch.") not in CODES:
            raise ReleaseError(f"{file} should hold a tensor of dtype {', '.join(CODES)}")
        return factor.detach()

    def blocks(
        self, name: str, shape: tuple[int, ...], index: tuple[slice, ...] | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        if name != _TABLE:
            yield from super().blocks(name, shape, index)
            return
        for first, block in array_blocks(self._product.reshape(shape), index):
            check_finite(block, name, self.tensors[name].file)
            yield first, block
