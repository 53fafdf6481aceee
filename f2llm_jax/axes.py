"""Logical axes, and the mesh axes they lie on: where parameters rest, and where they are used.

The mesh has three axes: ``data`` (replicas), ``fsdp`` (parameters and batch) and ``tensor`` (heads, MLP channels,
vocabulary). Parameters rest split over ``fsdp`` as well; a layer that uses one gathers it over that axis first. That
difference between the two sets of rules is ZeRO-3.
"""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

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
    "batch": ("data", "fsdp"),
    "length": None,
}
"""Where weights and activations are when they are used."""


def constrain(x: jax.Array, *names: str) -> jax.Array:
    """Puts an array where ``COMPUTE_RULES`` want it, on the mesh of ``jax.set_mesh``; without a mesh, nothing.

    Args:
        x: any array.
        names: the logical name of each of its axes.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(COMPUTE_RULES[name] for name in names)))
