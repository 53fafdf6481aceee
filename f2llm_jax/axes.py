"""Logical axes and the mesh axes they map to, for parameters at rest and for arrays in use.

The mesh has three axes: ``data`` (replicas), ``fsdp`` (parameters and batch) and ``tensor`` (heads, MLP channels,
vocabulary). At rest, parameters are sharded over ``fsdp`` as well; a layer gathers a parameter over that axis before it
uses it. This difference between the two rule sets is ZeRO-3.

There are few key/value heads: if ``tensor`` is a larger multiple of their number, every device holds all of them (eight
heads on tensor=16 would be half a head each) and uses the one that its query heads share.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from f2llm_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

MeshAxes = str | tuple[str, ...] | None

STORAGE_RULES: dict[str, MeshAxes] = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
}
"""The placement of parameters at rest. None: replicated."""

COMPUTE_RULES: dict[str, MeshAxes] = {
    **STORAGE_RULES,
    "embed": None,
    "batch": BATCH_AXES,
    "length": None,
}
"""The placement of weights and activations in use."""


def partition_spec(
    shape: Sequence[int], names: Sequence[str], rules: Mapping[str, MeshAxes], mesh_shape: Mapping[str, int]
) -> PartitionSpec:
    """The partition of an array over a mesh.

    Args:
        shape: the shape of the array.
        names: the logical name of each of its axes.
        rules: ``STORAGE_RULES`` or ``COMPUTE_RULES``.
        mesh_shape: {mesh axis: number of devices along it}.

    Raises:
        InputError: a dimension is not divisible by its mesh axes (the message has the numbers), or the mesh has other
            axes.
    """
    check_axes(mesh_shape)

    def mesh_axes(size: int, name: str) -> MeshAxes:
        axes = rules[name]
        used = (axes,) if isinstance(axes, str) else axes or ()
        parts = math.prod(mesh_shape[axis] for axis in used)
        if name == "kv_heads" and parts > size and parts % size == 0:
            return None
        if size % parts:
            sizes = " · ".join(f"{axis}={mesh_shape[axis]}" for axis in used)
            if name == "batch":
                raise InputError(f"{size} rows do not divide over {sizes}; the rows can be a multiple of {parts}")
            multiple = " or a multiple of it" if name == "kv_heads" else ""
            raise InputError(
                f"{size} {name} do not divide over {sizes}; {' · '.join(used)} can be a divisor of {size}{multiple}"
            )
        return axes

    return PartitionSpec(*map(mesh_axes, shape, names))


def constrain(x: jax.Array, *names: str, rules: Mapping[str, MeshAxes] = COMPUTE_RULES) -> jax.Array:
    """Constrains an array to the sharding of ``rules`` on the mesh of ``jax.set_mesh``; does nothing without a mesh.

    Args:
        x: any array.
        names: the logical name of each of its axes.
        rules: ``COMPUTE_RULES`` or ``STORAGE_RULES``.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(x.shape, names, rules, mesh.shape))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather(weight: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """Moves a parameter to its compute sharding; its gradient returns to the storage sharding.

    The gradient of a plain constraint is the same constraint: every device would receive the full sum of a gradient of
    which it keeps one shard (an all-reduce over fsdp instead of a reduce-scatter, which sends half the bytes).

    Over all chips of some slices (fsdp=16 on 4x4 of v5e or v6e, or on 2x2x4 of v5p; not on 2x4 or 4x8) the TPU compiler
    still emits an all-reduce and a slice of it, even for a ``psum_scatter``: its all-reduce runs along all axes of the
    slice at once, in four parts, whereas its reduce-scatter is a single ring. Judging by the links in use, sending
    twice the bytes is no slower that way.

    Args:
        weight: a parameter.
        names: the logical name of each of its axes.
    """
    return constrain(weight, *names)


def _gather_forward(weight: jax.Array, names: tuple[str, ...]) -> tuple[jax.Array, None]:
    return gather(weight, names), None


def _gather_backward(names: tuple[str, ...], _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (constrain(gradient, *names, rules=STORAGE_RULES),)


gather.defvjp(_gather_forward, _gather_backward)


def check_axes(mesh_shape: Mapping[str, int]) -> None:
    """Raises an InputError if a mesh has axes other than those of ``make_mesh``."""
    if tuple(mesh_shape) != MESH_AXES:
        axes, ours = (", ".join(names) for names in (mesh_shape, MESH_AXES))
        raise InputError(f"the mesh has axes {axes}; make_mesh makes one of {ours}")


def batch_parts(mesh: Mesh | AbstractMesh | None = None) -> int:
    """The number of shards of a batch; its number of rows must be a multiple of this.

    Args:
        mesh: default: that of ``jax.set_mesh``. Without a mesh, the result is 1.

    Raises:
        InputError: the mesh has axes other than those of ``make_mesh``.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if mesh.empty:
        return 1
    check_axes(mesh.shape)
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def platform() -> str:
    """``cpu``, ``gpu`` or ``tpu``: the platform of the mesh of ``jax.set_mesh``, else JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
