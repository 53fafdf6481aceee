"""Loads the weights of a model folder into device arrays, tensor by tensor; each device receives only its shard."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from f2llm_jax.config import ModelConfig
from f2llm_jax.convert.factors import open_release
from f2llm_jax.convert.orbax import MARKER, PARAMS, FlaxCheckpoint, OrbaxCheckpoint
from f2llm_jax.convert.safetensors import Checkpoint
from f2llm_jax.convert.table import Tensor, tensor_table
from f2llm_jax.dtypes import float_dtype
from f2llm_jax.errors import InputError
from f2llm_jax.model import Params
from f2llm_jax.products import int8_rows
from f2llm_jax.sharding import padded_config, param_shardings

Bounds = tuple[tuple[int, int], ...]
"""(begin, end) of each axis."""

PARAM_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def params_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of the parameters that ``f2llm_jax.load`` returns for ``float32``, ``bfloat16`` or ``int8``."""

    def of(tensor: Tensor) -> int:
        if dtype == "int8" and tensor.inputs:
            return tensor.size + 4 * math.prod(tensor.shape[: len(tensor.shape) - tensor.inputs])
        return tensor.size * PARAM_DTYPES[float_dtype(dtype)].itemsize

    return sum(map(of, tensor_table(config)))


def open_checkpoint(folder: Path) -> Checkpoint:
    """The weights of a release folder or of a converted one; reads headers only.

    Raises:
        ReleaseError: as for the kinds of ``Checkpoint``.
    """
    if (folder / MARKER).exists():
        return FlaxCheckpoint(folder)
    if (folder / PARAMS).is_dir():
        return OrbaxCheckpoint(folder)
    return open_release(folder)


def load_params(
    checkpoint: Checkpoint,
    config: ModelConfig,
    *,
    dtype: str = "float32",
    int8: bool = False,
    mesh: Mesh | None = None,
) -> Params:
    """Reads the parameters of a release or a converted folder.

    Beyond the result, host memory holds one shard of one parameter (on a CPU not even that: the buffer becomes the
    array). On a mesh, every process reads only the bytes of its own shards; a vocabulary that does not divide over the
    tensor axis is padded with zero rows.

    Args:
        checkpoint: the weights.
        config: the sizes.
        dtype: dtype of the parameters, ``float32`` or ``bfloat16``.
        int8: round the projections to int8, each with a ``scale`` beside its ``weight`` (``model.Projection``). While
            a projection is rounded, the devices also hold all its layers in ``dtype``.
        mesh: the mesh to shard over; None for the first device.

    Raises:
        ReleaseError: tensors are missing, unexpected, of the wrong shape, damaged or not finite.
        InputError: the dtype is not supported, or the sizes do not divide over the mesh.
    """
    if dtype not in PARAM_DTYPES:
        raise InputError(f"dtype must be one of {', '.join(PARAM_DTYPES)}, not {dtype!r}")
    table = tensor_table(config)
    checkpoint.check(table)
    shardings = flatten_dict(param_shardings(padded_config(config, mesh), mesh), sep=".")
    vocab_size = padded_config(config, mesh).vocab_size
    read = checkpoint.restore if isinstance(checkpoint, OrbaxCheckpoint) else partial(_read_sharded, checkpoint)
    flat: dict[str, jax.Array] = {}
    with jax.set_mesh(mesh):  # the caller may have set a different one
        for tensor in table:
            shape = tuple(
                vocab_size if axis == "vocab" else size for size, axis in zip(tensor.shape, tensor.axes, strict=True)
            )
            value = read(tensor, shape, PARAM_DTYPES[dtype], shardings[tensor.path])
            if int8 and tensor.inputs:
                if isinstance(checkpoint, OrbaxCheckpoint):
                    checkpoint.check_finite({tensor.path: value})
                value, scale = _to_int8(value, tensor.inputs)
                flat[tensor.path.removesuffix("weight") + "scale"] = scale
            flat[tensor.path] = value
        if isinstance(checkpoint, OrbaxCheckpoint):
            checkpoint.check_finite(flat)
    return unflatten_dict(flat, sep=".")


def _to_int8(weight: jax.Array, inputs: int) -> tuple[jax.Array, jax.Array]:
    """The int8 weight and the scale of a projection (``int8_rows``), sharded like the projection."""
    sharding = weight.sharding
    of_scale = sharding
    if isinstance(sharding, NamedSharding):
        of_scale = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[: weight.ndim - inputs]))
    return jax.jit(int8_rows, static_argnums=1, out_shardings=(sharding, of_scale))(weight, inputs)


def _read_sharded(
    checkpoint: Checkpoint, tensor: Tensor, shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding
) -> jax.Array:
    devices_of: dict[Bounds, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        devices_of.setdefault(bounds, []).append(device)
    buffers = {bounds: _aligned_empty(_extents(bounds), dtype) for bounds in devices_of}
    _fill(buffers, checkpoint, tensor)
    shards = [jax.device_put(buffers[bounds], device) for bounds, devices in devices_of.items() for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _fill(buffers: dict[Bounds, np.ndarray], checkpoint: Checkpoint, tensor: Tensor) -> None:
    """Reads the parts of a parameter within the bounds; rows beyond the vocabulary are set to zero."""
    for layer, name in enumerate(tensor.hf_names):
        parts: dict[Bounds, np.ndarray] = {}
        for bounds, buffer in buffers.items():
            if not tensor.stacked:
                parts[bounds] = buffer
            elif layer in range(*bounds[0]):
                parts[bounds[1:]] = buffer[layer - bounds[0][0]]
        for box, inside in _boxes(list(parts)).items():
            index = tuple(
                slice(begin, min(end, size)) for (begin, end), size in zip(box, tensor.layer_shape, strict=True)
            )
            for first, block in checkpoint.blocks(name, tensor.layer_shape, index):
                origin = (first, *(begin for begin, _ in box[1:]))
                for bounds in inside:
                    _copy_rows(parts[bounds], bounds, block, origin)
    for bounds, buffer in buffers.items():
        if tensor.axes[0] == "vocab":
            buffer[max(0, tensor.shape[0] - bounds[0][0]) :] = 0


def _boxes(parts: list[Bounds]) -> dict[Bounds, list[Bounds]]:
    """{box to read: the parts in it}: one box if the parts tile it, as parts of one row are adjacent in the file."""
    axes = list(zip(*parts, strict=True))
    hull = tuple((min(begin for begin, _ in axis), max(end for _, end in axis)) for axis in axes)
    tiled = sum(math.prod(_extents(bounds)) for bounds in parts) == math.prod(_extents(hull))
    return {hull: parts} if tiled else {bounds: [bounds] for bounds in parts}


def _copy_rows(part: np.ndarray, bounds: Bounds, block: np.ndarray, origin: tuple[int, ...]) -> None:
    """Copies from a block that starts at ``origin`` the rows and columns of a part, cast to the part's dtype."""
    begin, end = bounds[0]
    first, last = max(begin, origin[0]), min(end, origin[0] + len(block))
    if first < last:
        columns = (slice(b - start, e - start) for (b, e), start in zip(bounds[1:], origin[1:], strict=True))
        part[first - begin : last - begin] = block[(slice(first - origin[0], last - origin[0]), *columns)]


def _extents(bounds: Bounds) -> tuple[int, ...]:
    return tuple(end - begin for begin, end in bounds)


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array aligned to 64 bytes, which a CPU device takes over without a copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)
