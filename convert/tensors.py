"""Tensors as bytes in files: where they are, and how to read and write slices of them.

Safetensors files and uncompressed Zarr chunks both store the values of a tensor in row-major order from some offset on.
Both therefore share this code for reading, writing, casting and checking values. Files are read with ``pread`` instead
of a memory map: resident memory is only what was asked for, only those bytes are transferred, and a file that shrinks
is an error, not a SIGBUS.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from f2llm_jax.errors import InputError, ReleaseError

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""{name in safetensors: dtype}, the dtypes that a tensor may have."""

CODES = {dtype.name: code for code, dtype in DTYPES.items()}
"""{name of a dtype in JAX and config.json: its name in safetensors}."""

# Exponent bits: all set in infinities and NaNs, and in no other number.
_EXPONENTS: dict[str, Any] = {
    "F32": np.uint32(0x7F800000),
    "F16": np.uint16(0x7C00),
    "BF16": np.uint16(0x7F80),
}

# Bytes read and cast at a time: small enough to stay in the cache and not to count in memory use.
_BLOCK_BYTES = 8 << 20


class TensorInfo(NamedTuple):
    """The location of a tensor: file, dtype (a key of ``DTYPES``), shape, and offset of its first byte."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def dtype_code(dtype: str) -> str:
    """``bfloat16`` to ``BF16``; an InputError if the dtype is not one of the three."""
    if dtype not in CODES:
        raise InputError(f"dtype must be one of {', '.join(CODES)}, not {dtype!r}")
    return CODES[dtype]


def read_blocks(info: TensorInfo, shape: tuple[int, ...], index: tuple[slice, ...]) -> Iterator[tuple[int, np.ndarray]]:
    """Reads a slice of a tensor, some rows at a time.

    Args:
        info: the location of the tensor.
        shape: the shape to read it in: its own, or one with axes split.
        index: a slice with step 1 for each axis of ``shape``.

    Yields:
        (first row, block [rows, ...] in the file's dtype); the next block is read into the same memory.

    Raises:
        ReleaseError: the file ended early.
    """
    bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
    (begin, end), inner = bounds[0], [stop - start for start, stop in bounds[1:]]
    dtype = DTYPES[info.dtype]
    step = max(1, _BLOCK_BYTES // max(1, math.prod(inner) * dtype.itemsize))
    buffer = np.empty((max(0, min(step, end - begin)), *inner), dtype)
    with info.file.open("rb", buffering=0) as stream:
        for first in range(begin, end, step):
            block = buffer[: min(step, end - first)]
            view = block.reshape(-1).view(np.uint8).data
            for start, nbytes in _runs(info, shape, (slice(first, first + len(block)), *index[1:])):
                _read_exactly(stream.fileno(), view[:nbytes], start, info.file)
                view = view[nbytes:]
            yield first, block


def array_blocks(array: np.ndarray, index: tuple[slice, ...] | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """A slice of an array in memory, in blocks like those of ``read_blocks``."""
    begin, end = (index[0] if index else slice(None)).indices(len(array))[:2]
    rest = index[1:] if index else ()
    step = max(1, _BLOCK_BYTES * len(array) // max(1, array.nbytes))
    for first in range(begin, end, step):
        yield first, array[(slice(first, min(first + step, end)), *rest)]


def write_part(info: TensorInfo, shape: tuple[int, ...], index: tuple[slice, ...], values: np.ndarray) -> None:
    """Writes a slice of a tensor to its file, which must exist.

    Args:
        info, shape, index: as for ``read_blocks``.
        values: the slice, in the dtype of ``info``.
    """
    view = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
    descriptor = os.open(info.file, os.O_WRONLY)
    try:
        for start, nbytes in _runs(info, shape, index):
            run, view = view[:nbytes], view[nbytes:]
            while run:
                put = os.pwrite(descriptor, run, start)
                run, start = run[put:], start + put
    finally:
        os.close(descriptor)


def check_finite(block: np.ndarray, name: str, file: Path) -> None:
    """A ReleaseError that names the tensor and its file if the block holds a NaN or an infinity."""
    mask = _EXPONENTS[CODES[block.dtype.name]]
    block = np.ascontiguousarray(block)
    if block.size and np.bitwise_and(block.view(mask.dtype), mask).max() == mask:
        bad = block[~np.isfinite(block.astype(np.float32))][0]
        raise ReleaseError(f"{file}: {name} holds {bad}: the weights are damaged")


def cast(block: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """The block in another dtype; a finite value out of its range is a ReleaseError instead of becoming infinite."""
    wanted = DTYPES[dtype]
    if block.dtype == wanted:
        return block
    with np.errstate(over="ignore"):
        result = block.astype(wanted)
    mask = _EXPONENTS[dtype]
    if np.bitwise_and(result.view(mask.dtype), mask).max() == mask:
        largest = np.abs(block.astype(np.float32)).max()
        raise ReleaseError(f"{name} holds {largest:g}, which {wanted.name} cannot hold")
    return result


def _runs(info: TensorInfo, shape: tuple[int, ...], index: tuple[slice, ...]) -> Iterator[tuple[int, int]]:
    """The contiguous runs (file offset, number of bytes) of a slice of a row-major tensor, in order."""
    bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
    itemsize = DTYPES[info.dtype].itemsize
    strides = [math.prod(shape[axis + 1 :]) * itemsize for axis in range(len(shape))]
    # Trailing axes that are complete form one run with the axis before them.
    axis = len(shape) - 1
    while axis > 0 and bounds[axis] == (0, shape[axis]):
        axis -= 1
    begin, end = bounds[axis]
    for outer in itertools.product(*(range(*bound) for bound in bounds[:axis])):
        start = sum(i * stride for i, stride in zip(outer, strides, strict=False))
        yield info.offset + start + begin * strides[axis], (end - begin) * strides[axis]


def _read_exactly(descriptor: int, view: memoryview, offset: int, file: Path) -> None:
    while view:
        got = os.preadv(descriptor, [view], offset)
        if got == 0:
            raise ReleaseError(f"{file} ended at byte {offset} while it was read")
        view, offset = view[got:], offset + got
