"""Meshes, and the shardings of parameters and batches on them; the rules are in ``axes.py``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from f2llm_jax.axes import COMPUTE_RULES, MESH_AXES, STORAGE_RULES, check_axes, partition_spec
from f2llm_jax.config import ModelConfig
from f2llm_jax.embedding import AnyBatch
from f2llm_jax.errors import InputError
from f2llm_jax.model import Params, abstract_params

BATCH_SPEC = PartitionSpec(COMPUTE_RULES["batch"])


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes of this package.

    Of several TPU slices, which only the data centre's network connects, each holds a part of ``data``: what ``fsdp``
    and ``tensor`` exchange stays within a slice.

    Args:
        data, fsdp, tensor: sizes of the axes.
        devices: which devices; default ``jax.devices()``.

    Raises:
        InputError: there are not exactly data · fsdp · tensor devices, or ``data`` is no multiple of the slices.
    """
    devices = jax.devices() if devices is None else devices
    needed = data * fsdp * tensor
    if len(devices) != needed:
        raise InputError(f"a mesh data={data} fsdp={fsdp} tensor={tensor} takes {needed} devices, not {len(devices)}")
    slices = _tpu_slices(devices)
    if data % slices:
        raise InputError(
            f"a mesh data={data} fsdp={fsdp} tensor={tensor} does not divide over {slices} TPU slices: "
            f"data must be a multiple of {slices}"
        )
    # jax.make_mesh does not split an axis of a v4, v5p or v6e slice: it refuses fsdp=8 on 2x2x4 chips.
    if slices == 1:
        grid = create_device_mesh((data, fsdp, tensor), devices, allow_split_physical_axes=True)
    else:
        within, over = (data // slices, fsdp, tensor), (slices, 1, 1)
        grid = create_hybrid_device_mesh(within, over, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def _tpu_slices(devices: Sequence[jax.Device]) -> int:
    """How many slices the devices are of. On GPUs, where a slice is mostly a host, any axis may reach over several."""
    return len({getattr(device, "slice_index", 0) if device.platform == "tpu" else 0 for device in devices})


def put_batch(batch: AnyBatch, mesh: Mesh) -> AnyBatch:
    """Shards a batch that every process holds in full: each places its own rows.

    Args:
        batch: the whole batch, as NumPy arrays, the same in every process.
        mesh: of this process's devices, or of several processes'.
    """
    sharding = NamedSharding(mesh, BATCH_SPEC)
    if sharding.is_fully_addressable:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), batch)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that is replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())


def padded_config(config: ModelConfig, mesh: Mesh | None) -> ModelConfig:
    """The config with its vocabulary rounded up to a multiple of the tensor axis; the added rows are zeros.

    Raises:
        InputError: the mesh has axes other than those of ``make_mesh``.
    """
    if mesh is None:
        return config
    check_axes(mesh.shape)
    parts = mesh.shape["tensor"]
    return dataclasses.replace(config, vocab_size=math.ceil(config.vocab_size / parts) * parts)


def param_shardings(config: ModelConfig, mesh: Mesh | None) -> Params:
    """The sharding of every parameter: the logical axes of its declaration, through ``STORAGE_RULES``.

    Args:
        config: the sizes, with a vocabulary that is divisible (``padded_config``).
        mesh: from ``make_mesh``; None puts everything on the first device.

    Returns:
        A tree like that of the parameters, of ``NamedSharding`` (or ``SingleDeviceSharding`` without a mesh).

    Raises:
        InputError: a dimension is not divisible by its mesh axis; the message has the numbers.
    """

    def sharding(box: nn.LogicallyPartitioned) -> jax.sharding.Sharding:
        if mesh is None:
            return SingleDeviceSharding(jax.local_devices()[0])
        return NamedSharding(mesh, partition_spec(box.value.shape, box.names, STORAGE_RULES, mesh.shape))

    return jax.tree.map(sharding, abstract_params(config), is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
