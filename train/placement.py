"""The placement of the state and the batches of a run on its mesh."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding

from f2llm_jax.axes import batch_parts
from f2llm_jax.config import ModelConfig
from f2llm_jax.embedding import AnyBatch
from f2llm_jax.errors import InputError
from f2llm_jax.model import Params, abstract_params
from f2llm_jax.sharding import BATCH_SPEC, make_mesh, param_shardings, put_batch, replicated
from f2llm_jax.train.batch import AnyTrainBatch, PackedTrainBatch
from f2llm_jax.train.config import MeshConfig, TrainConfig
from f2llm_jax.train.step import TrainState


def make_train_mesh(config: MeshConfig) -> Mesh:
    """The mesh; the axis of size 0, if any, takes all remaining devices.

    Raises:
        InputError: there are not enough devices, two axes are 0, or the tensor axis spans processes.
    """
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    free = [name for name, size in sizes.items() if size == 0]
    if len(free) > 1:
        raise InputError(f"of the mesh's axes only one can be 0, not {' and '.join(free)}")
    for name in free:
        sizes[name] = max(1, jax.device_count() // math.prod(size for size in sizes.values() if size))
    mesh = make_mesh(sizes["data"], sizes["fsdp"], sizes["tensor"])
    if mesh.local_mesh.shape["tensor"] != mesh.shape["tensor"]:
        raise InputError(f"tensor={mesh.shape['tensor']} spans processes; each has {jax.local_device_count()} devices")
    return mesh


def check_batch(config: TrainConfig, mesh: Mesh) -> None:
    """Raises an InputError, with the numbers, if a batch does not divide over the mesh."""
    parts = batch_parts(mesh)
    if config.data.batch_size % parts:
        raise InputError(
            f"data.batch_size={config.data.batch_size} does not divide over data={mesh.shape['data']} · "
            f"fsdp={mesh.shape['fsdp']} = {parts} parts of the mesh"
        )


def abstract_state(model: ModelConfig, optimizer: optax.GradientTransformation, dtype: str, mesh: Mesh) -> TrainState:
    """The shapes and shardings of the state: moments are sharded like their parameters, counters are replicated."""

    def put(x: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), nn.unbox(abstract_params(model)))
    shardings = param_shardings(model, mesh)
    opt_state = optax.tree.map_params(
        optimizer,
        put,
        jax.eval_shape(optimizer.init, shapes),
        shardings,
        transform_non_params=lambda x: put(x, replicated(mesh)),
    )
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    return TrainState(step, jax.tree.map(put, shapes, shardings), opt_state)


def on_mesh(step: Callable[..., Any], params: Params, batch: AnyBatch, mesh: Mesh | None) -> Any:
    """Calls a compiled function with parameters on the mesh and a batch of rows; without a mesh, on one device."""
    if mesh is None:
        return step(params, batch)
    with jax.set_mesh(mesh):
        return step(params, put_batch(batch, mesh))


def shardings_of(tree: Any) -> Any:
    """The shardings of the arrays in a tree, as a tree."""
    return jax.tree.map(lambda x: x.sharding, tree)


def global_batch(batch: AnyTrainBatch, mesh: Mesh) -> AnyTrainBatch:
    """The global batch, sharded over the mesh, from this process's share."""
    if isinstance(batch, PackedTrainBatch):
        batch = _with_global_slots(batch, NamedSharding(mesh, BATCH_SPEC))
    return jax.tree.map(functools.partial(global_rows, mesh=mesh), batch)


def global_rows(x: np.ndarray, mesh: Mesh) -> jax.Array:
    """The rows of all processes, sharded over the mesh, from this process's share."""
    shape = (jax.process_count() * len(x), *x.shape[1:])
    return jax.make_array_from_process_local_data(NamedSharding(mesh, BATCH_SPEC), x, shape)


def _with_global_slots(batch: PackedTrainBatch, sharding: NamedSharding) -> PackedTrainBatch:
    """Renumbers the slots of a share from its own rows to the rows of all processes."""
    rows, per_row = batch.rows.ends_be.shape
    count = jax.process_count() * rows
    parts = sharding.addressable_devices_indices_map((count,)).values()
    own = np.unique(np.concatenate([np.arange(count)[part] for part in parts]))

    def move(slots: Any) -> Any:
        return (own[slots // per_row] * per_row + slots % per_row).astype(np.int32)

    return batch._replace(
        query_slots_b=move(batch.query_slots_b),
        passage_slots_b=move(batch.passage_slots_b),
        negative_slots_m=None if batch.negative_slots_m is None else move(batch.negative_slots_m),
    )
