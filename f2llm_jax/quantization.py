"""Embeddings in fewer bits, in the layout of sentence-transformers' ``quantize_embeddings``."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from f2llm_jax.dtypes import OUTPUTS
from f2llm_jax.errors import InputError


def output_spec(output: str, dim: int) -> tuple[int, np.dtype]:
    """The number of values per embedding, and their dtype: bits are packed eight to a byte.

    Raises:
        InputError: no such output.
    """
    if output not in OUTPUTS:
        raise InputError(f"output must be one of {', '.join(OUTPUTS)}, not {output!r}")
    if output in ("binary", "ubinary"):
        return (dim + 7) // 8, np.dtype(np.int8 if output == "binary" else np.uint8)
    return dim, np.dtype(ml_dtypes.bfloat16 if output == "bfloat16" else output)


def int8_ranges(embeddings: np.ndarray) -> np.ndarray:
    """The least and the largest value of every dimension, for ``output="int8"``.

    Args:
        embeddings: float [n, dim] of a sample of the texts to be encoded, at least 2; the more the better.

    Returns:
        float32 [2, dim].
    """
    embeddings = np.asarray(embeddings, np.float32)
    if embeddings.ndim != 2 or len(embeddings) < 2:
        raise InputError(f"ranges need at least 2 embeddings as [n, dim], not an array of shape {embeddings.shape}")
    return np.stack([embeddings.min(axis=0), embeddings.max(axis=0)])


def quantize(embeddings: np.ndarray, output: str, ranges: np.ndarray | None = None) -> np.ndarray:
    """Converts unit embeddings to ``output``.

    int8: each dimension's range in 255 steps, from -128; values outside the range are clipped. binary and ubinary: one
    bit per dimension, set if the value is positive, the first dimension in the highest bit; binary is ubinary - 128 as
    int8. Follows sentence_transformers/util/quantization.py.

    Args:
        embeddings: float32 [n, dim], or [dim].
        output: one of ``dtypes.OUTPUTS``.
        ranges: float [2, dim] from ``int8_ranges``; needed for int8, and for int8 only.

    Raises:
        InputError: there is no such output, or ranges are missing or of another shape.
    """
    _, dtype = output_spec(output, embeddings.shape[-1])
    if (ranges := check_ranges(output, ranges, embeddings.shape[-1])) is not None:
        low, high = ranges
        step = (high - low) / 255
        levels = np.floor((embeddings - low) / np.where(step == 0, 1, step))
        return (np.clip(levels, 0, 255) - 128).astype(np.int8)
    if output in ("binary", "ubinary"):
        bits = np.packbits(embeddings > 0, axis=-1)
        return bits if output == "ubinary" else (bits.astype(np.int16) - 128).astype(np.int8)
    return embeddings.astype(dtype)


def dequantize(embeddings: np.ndarray, output: str, dim: int, ranges: np.ndarray | None = None) -> np.ndarray:
    """What the results of ``quantize`` stand for.

    A code of int8 stands for the middle of its step, a bit of binary and ubinary for 1 where it is set, else for -1.

    Args:
        embeddings: [n, dim], or [n, ceil(dim / 8)] of packed bits.
        output: one of ``dtypes.OUTPUTS``.
        dim: values of an embedding.
        ranges: float [2, dim], those that int8 was made with.

    Returns:
        float32 [n, dim]; of int8, binary and ubinary not of length 1.

    Raises:
        InputError: no such output, or ranges missing or of another shape.
    """
    output_spec(output, dim)
    if (ranges := check_ranges(output, ranges, dim)) is not None:
        low, high = ranges
        return low + (embeddings.astype(np.float32) + np.float32(128.5)) * ((high - low) / 255)
    if output in ("binary", "ubinary"):
        bits = embeddings if output == "ubinary" else (embeddings.astype(np.int16) + 128).astype(np.uint8)
        return np.where(np.unpackbits(bits, axis=-1, count=dim), np.float32(1), np.float32(-1))
    return embeddings.astype(np.float32)


def check_ranges(output: str, ranges: np.ndarray | None, dim: int) -> np.ndarray | None:
    """The ranges that an output needs, float32 [2, dim] for int8, else None.

    Raises:
        InputError: ranges are missing, of another shape or not finite, or given for another output.
    """
    if output != "int8":
        if ranges is not None:
            raise InputError(f"ranges are for output='int8', not for {output!r}")
        return None
    if ranges is None:
        raise InputError(
            "output='int8' needs ranges=, the least and largest value of each dimension: "
            "f2llm_jax.int8_ranges(model.encode(sample_texts, dim=...))"
        )
    ranges = np.asarray(ranges, np.float32)
    if ranges.shape != (2, dim):
        raise InputError(f"ranges must have shape (2, {dim}), not {ranges.shape}")
    if not (ranges[0] <= ranges[1]).all() or not np.isfinite(ranges).all():
        raise InputError("ranges must be finite, the least value of each dimension before the largest")
    return ranges


def check_float(embeddings: np.ndarray, compares: str) -> np.ndarray:
    """The embeddings as float32; an InputError if they are what ``quantize`` makes of embeddings.

    Args:
        embeddings: of any shape.
        compares: the function that compares them, for the message.
    """
    embeddings = np.asarray(embeddings)
    if embeddings.dtype.kind in "biu" and embeddings.itemsize == 1:
        raise InputError(
            f"{compares} compares float embeddings, not {embeddings.dtype}: encode with output='float32', or compare "
            "bits of 'ubinary' by their Hamming distance, np.bitwise_count(a[:, None] ^ b).sum(axis=-1)"
        )
    return embeddings.astype(np.float32, copy=False)
