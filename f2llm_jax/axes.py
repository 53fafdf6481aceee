"""Logical axes, and the mesh axes they lie on: where parameters rest, and where they are used.

The mesh has three axes: ``data`` (replicas), ``fsdp`` (parameters and batch) and ``tensor`` (heads, MLP channels,
vocabulary). Parameters rest split over ``fsdp`` as well; a layer that uses one gathers it over that axis first. That
difference between the two sets of rules is ZeRO-3.

Key/value heads are few: where ``tensor`` is a multiple of their number, every device has all of them (eight heads on
tensor=16 would be half a head each), and uses the one that its query heads share.
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
"""Where parameters rest. None: whole on every device."""

COMPUTE_RULES: dict[str, MeshAxes] = {
    **STORAGE_RULES,
    "embed": None,
    "batch": BATCH_AXES,
    "length": None,
}
"""Where weights and activations are when they are used."""


def partition_spec(
    shape: Sequence[int], names: Sequence[str], rules: Mapping[str, MeshAxes], mesh_shape: Mapping[str, int]
) -> PartitionSpec:
    """Where an array lies on a mesh.

    Args:
        shape: of the array.
        names: the logical name of each of its axes.
        rules: ``STORAGE_RULES`` or ``COMPUTE_RULES``.
        mesh_shape: {mesh axis: devices along it}.

    Raises:
        InputError: a dimension does not divide over its mesh axes; the message has the numbers. Or the mesh has others.
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
    """Puts an array where rules want it, on the mesh of ``jax.set_mesh``; without a mesh, nothing.

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
    """A parameter as ``constrain`` puts it where it is used; its gradient goes back to where the parameter rests.

    The gradient of a plain constraint is the same constraint: every device would get the whole sum of a gradient of
    which it keeps one part (an all-reduce over fsdp for a reduce-scatter, which sends half the bytes).

    Over all chips of some slices (fsdp=16 on 4x4 of v5e or v6e, or on 2x2x4 of v5p; not on 2x4 or 4x8) the TPU compiler
    makes an all-reduce and a slice of it nevertheless, even of a ``psum_scatter``: it has an all-reduce that runs along
    all axes of the slice at once, in four parts, and only a reduce-scatter that is one ring. By the links in use, twice
    the bytes are no slower that way.

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
    """An InputError if a mesh has other axes than ``make_mesh`` gives it."""
    if tuple(mesh_shape) != MESH_AXES:
        axes, ours = (", ".join(names) for names in (mesh_shape, MESH_AXES))
        raise InputError(f"the mesh has axes {axes}; make_mesh makes one of {ours}")


def batch_parts(mesh: Mesh | AbstractMesh | None = None) -> int:
    """How many parts a batch is cut into, of which its rows must be a multiple.

    Args:
        mesh: default that of ``jax.set_mesh``; 1 without one.

    Raises:
        InputError: it has other axes than ``make_mesh`` gives it.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if mesh.empty:
        return 1
    check_axes(mesh.shape)
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def platform() -> str:
    """``cpu``, ``gpu`` or ``tpu``: that of the mesh of ``jax.set_mesh``, else JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
