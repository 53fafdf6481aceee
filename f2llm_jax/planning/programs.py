"""The programs of encoding and training, with abstract arguments that are sharded like the real ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from f2llm_jax.config import ModelConfig
from f2llm_jax.convert.table import tensor_table
from f2llm_jax.dtypes import float_dtype
from f2llm_jax.embedding import AnyBatch, Batch, PackedBatch, embed
from f2llm_jax.model import Params, abstract_params
from f2llm_jax.sharding import BATCH_SPEC, padded_config, param_shardings

if TYPE_CHECKING:
    from f2llm_jax.train.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class AbstractProgram:
    """A program that can be compiled.

    Attributes:
        lower: returns the ``jax.stages.Lowered``.
        state: what stays on the devices from step to step, {"parameters": tree, "optimizer": tree, …}.
    """

    lower: Callable[[], Any]
    state: dict[str, Any]

    def state_bytes(self) -> dict[str, int]:
        """Bytes of ``state`` on one device."""
        return {name: sum(map(_local_bytes, jax.tree.leaves(tree))) for name, tree in self.state.items()}


def encode_program(
    config: ModelConfig, mesh: Mesh, *, rows: int, length: int, slots: int | None, dtype: str
) -> AbstractProgram:
    """``embed`` of a batch.

    Args:
        config: the sizes.
        mesh: a mesh of compile-only devices.
        rows, length: the shape of the batch.
        slots: text slots per packed row; None for one text per row.
        dtype: as for ``load``.
    """
    config = padded_config(config, mesh)
    params = _params(config, mesh, dtype)
    sharding = NamedSharding(mesh, BATCH_SPEC)
    rows_bt = _array((rows, length), jnp.int32, sharding)
    batch: AnyBatch
    if slots is None:
        batch = Batch(rows_bt, _array((rows,), jnp.int32, sharding))
    else:
        batch = PackedBatch(rows_bt, rows_bt, _array((rows, slots), jnp.int32, sharding))
    compute = jax.jit(embed, static_argnames=("config", "dim", "dtype", "kernel"))

    def lower() -> Any:
        with jax.set_mesh(mesh):
            return compute.lower(params, batch, config=config, dtype=jnp.dtype(float_dtype(dtype)))

    return AbstractProgram(lower, {"parameters": params})


def train_program(
    recipe: TrainConfig,
    config: ModelConfig,
    mesh: Mesh,
    *,
    length: int,
    negatives: int,
    packed: tuple[int, int, int] | None = None,
    teacher: ModelConfig | None = None,
) -> AbstractProgram:
    """A training step of a recipe, with all its losses.

    Args:
        recipe: the recipe; if it has ``teacher_states``, these are part of the batch.
        config: the sizes.
        mesh: a mesh of compile-only devices.
        length: tokens per text.
        negatives: negatives per query.
        packed: number of rows, row length and text slots per row of the packed layout; None for one text per row.
        teacher: the sizes of a teacher that runs in the step; None for none.
    """
    from f2llm_jax.train.batch import AnyTrainBatch, PackedTrainBatch, TeacherStates, TrainBatch
    from f2llm_jax.train.loop import make_update
    from f2llm_jax.train.optimizer import make_optimizer
    from f2llm_jax.train.placement import abstract_state
    from f2llm_jax.train.step import Teacher

    config = padded_config(config, mesh)
    optimizer = make_optimizer(recipe.optim, total_steps=1)
    state = abstract_state(config, optimizer, recipe.params_dtype, mesh)
    taught = None
    if teacher is not None:
        teacher = padded_config(teacher, mesh)
        taught = Teacher(_params(teacher, mesh, recipe.compute.dtype), teacher)
    sharding = NamedSharding(mesh, BATCH_SPEC)

    def numbers(*shape: int) -> Any:
        return _array(shape, jnp.int32, sharding)

    def texts(count: int) -> Batch:
        return Batch(numbers(count, length), numbers(count))

    def states(count: int) -> Any:
        return _array((count, config.hidden_size), jnp.bfloat16, sharding)  # as f2llm teach writes them

    queries = recipe.data.batch_size
    stored = None
    if recipe.teacher_states is not None:
        stored = TeacherStates(states(queries), states(queries), states(queries * negatives))
    batch: AnyTrainBatch
    if packed is None:
        batch = TrainBatch(texts(queries), texts(queries), texts(queries * negatives), numbers(queries), stored)
    else:
        rows, row_length, slots = packed
        packed_rows = PackedBatch(numbers(rows, row_length), numbers(rows, row_length), numbers(rows, slots))
        query, negative = numbers(queries), numbers(queries * negatives)
        batch = PackedTrainBatch(packed_rows, query, query, negative, passage_ids_b=query, teacher=stored)
    update: Any = make_update(recipe, config, taught, optimizer, state)

    def lower() -> Any:
        with jax.set_mesh(mesh):
            return update.lower(state, batch, taught and taught.params, in_batch=True)

    held = {"parameters": state.params, "optimizer": state.opt_state, **({"teacher": taught.params} if taught else {})}
    return AbstractProgram(lower, held)


def _params(config: ModelConfig, mesh: Mesh, dtype: str) -> Params:
    def place(shape: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> Any:
        return _array(shape.shape, float_dtype(dtype), sharding)

    params = jax.tree.map(place, nn.unbox(abstract_params(config)), param_shardings(config, mesh))
    return _int8_projections(params, config) if dtype == "int8" else params


def _int8_projections(params: Params, config: ModelConfig) -> Params:
    """The parameters with int8 projections and their scales, as returned by ``convert.load.load_params``."""
    flat = flatten_dict(params, sep=".")
    for tensor in tensor_table(config):
        if tensor.inputs:
            weight = flat[tensor.path]
            outputs = weight.ndim - tensor.inputs
            of_scale = NamedSharding(weight.sharding.mesh, PartitionSpec(*weight.sharding.spec[:outputs]))
            flat[tensor.path] = _array(weight.shape, jnp.int8, weight.sharding)
            scale = _array(weight.shape[:outputs], jnp.float32, of_scale)
            flat[tensor.path.removesuffix("weight") + "scale"] = scale
    return unflatten_dict(flat, sep=".")


def _array(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, sharding: jax.sharding.Sharding) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _local_bytes(x: Any) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize
