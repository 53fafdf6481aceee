"""One training step: (state, batch) -> (state, metrics).

The loss needs the states of the whole global batch. With ``chunk_rows``, its gradient is computed in pieces (GradCache,
arXiv:2101.06983): a forward pass in chunks keeps only the EOS states, the loss is differentiated with respect to them,
and a second pass runs each chunk again, forward and backward. Activations then take the memory of one chunk, whatever
the batch size.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from f2llm_jax import losses
from f2llm_jax.axes import batch_parts
from f2llm_jax.config import ModelConfig
from f2llm_jax.embedding import AnyBatch, Batch, eos_states
from f2llm_jax.model import Params
from f2llm_jax.train.batch import AnyTrainBatch, PackedTrainBatch


class TrainState(NamedTuple):
    """The training state.

    Attributes:
        step: int32 scalar, the number of updates made so far.
        params: float32 parameters (or bfloat16, to train as the reference does).
        opt_state: the state of the Optax optimizer.
    """

    step: jax.Array
    params: Params
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The losses and their options.

    Attributes:
        temperature: divides the cosines.
        mrl_dims: Matryoshka sizes besides the full one; empty for none.
        mask_duplicates: leave duplicates of a query's own passage out of its in-batch denominator.
        stop_passage_gradient: see ``losses.in_batch_loss``.
        kd_weight: the weight of the distillation terms, if there is a teacher.
        kd_mrl: compare with the teacher at every Matryoshka size; the reference does so at the full size only.
    """

    temperature: float = losses.TEMPERATURE
    mrl_dims: tuple[int, ...] = ()
    mask_duplicates: bool = True
    stop_passage_gradient: bool = False
    kd_weight: float = 1.0
    kd_mrl: bool = False


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How states are computed.

    Attributes:
        dtype: dtype of the operands of matrix products.
        remat: which activations are kept for the backward pass, see ``model.REMAT_POLICIES``.
        kernel: the attention kernel, see ``attention.KERNELS``; "auto" for the platform's default.
        chunk_rows: maximum rows per GradCache chunk, with one text each or packed according to ``data.layout``; rounded
            up to a number that divides over the mesh. 0 computes all rows at once.
    """

    dtype: str = "bfloat16"
    remat: str = "full"
    kernel: str = "auto"
    chunk_rows: int = 0


class Teacher(NamedTuple):
    """A frozen model to distil from."""

    params: Params
    config: ModelConfig


class States(NamedTuple):
    """Unnormalised EOS states of a batch: queries [b, d]; documents [(1 + n) · b, d], passages before negatives."""

    query_bd: jax.Array
    documents_md: jax.Array


def train_step(
    state: TrainState,
    batch: AnyTrainBatch,
    teacher_params: Params | None = None,
    *,
    config: ModelConfig,
    loss: LossConfig,
    compute: ComputeConfig,
    optimizer: optax.GradientTransformation,
    in_batch: bool,
    teacher_config: ModelConfig | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Updates the parameters with one batch.

    Args:
        state: the state before the update; may be donated.
        batch: the global batch; if it holds a teacher's states, the student is distilled from them.
        teacher_params: parameters of a teacher whose states are computed here; None for none.
        config: the sizes of the model.
        loss, compute: the losses, and how states are computed.
        optimizer: from ``make_optimizer``.
        in_batch: whether the in-batch loss applies (retrieval only).
        teacher_config: the sizes of the teacher.

    Returns:
        The state after the update, and float32 scalars: ``loss``, ``hard``, ``in_batch``, ``distill``, ``grad_norm``.
    """
    teacher = teacher_states(batch, teacher_params, teacher_config, compute)

    def batch_loss(states: States) -> tuple[jax.Array, dict[str, jax.Array]]:
        terms = loss_terms(states, batch, loss, in_batch=in_batch, teacher=teacher)
        return terms["hard"] + terms["in_batch"] + loss.kd_weight * terms["distill"], terms

    total, terms, grads = loss_and_grads(batch_loss, state.params, batch, config, compute)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {"loss": total, **terms, "grad_norm": optax.tree.norm(grads)}
    return TrainState(state.step + 1, params, opt_state), metrics


def teacher_states(
    batch: AnyTrainBatch, params: Params | None, config: ModelConfig | None, compute: ComputeConfig
) -> States | None:
    """The teacher's states of a batch, computed here or taken from the batch; None without a teacher."""
    if params is not None:
        assert config is not None
        return batch_states(params, batch, config, compute)
    if batch.teacher is None:
        return None
    query_bd, passage_bd, negatives_md = batch.teacher
    return States(query_bd, passage_bd if negatives_md is None else jnp.concatenate([passage_bd, negatives_md]))


def loss_terms(
    states: States,
    batch: AnyTrainBatch,
    loss: LossConfig,
    *,
    in_batch: bool,
    teacher: States | None = None,
    example_mask_b: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """The terms ``hard``, ``in_batch`` and ``distill`` (unweighted) of a batch, float32 scalars; 0 for those not used.

    If ``example_mask_b`` is given, a bool [batch], the first two cover only these examples.
    """
    query_bd, passage_bd, negatives_bnd = split_states(states)
    options: dict[str, Any] = {
        "temperature": loss.temperature,
        "mrl_dims": loss.mrl_dims,
        "example_mask_b": example_mask_b,
    }
    terms = {
        "hard": losses.hard_negative_loss(query_bd, passage_bd, negatives_bnd, **options),
        "in_batch": jnp.float32(0),
        "distill": jnp.float32(0),
    }
    if in_batch:
        terms["in_batch"] = losses.in_batch_loss(
            query_bd,
            passage_bd,
            passage_ids_c=batch.passage_ids_b if loss.mask_duplicates else None,
            stop_passage_gradient=loss.stop_passage_gradient,
            **options,
        )
    if teacher is not None:
        pairs = zip(split_states(states), split_states(teacher), strict=True)
        terms["distill"] = sum(
            (
                losses.distillation_loss(own, its, mrl_dims=loss.mrl_dims if loss.kd_mrl else None)
                for own, its in pairs
                if own is not None and its is not None
            ),
            jnp.float32(0),
        )
    return terms


def split_states(states: States) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Queries [b, d], passages [b, d], negatives [b, n, d] (None for none)."""
    b, d = states.query_bd.shape
    passage_bd, negatives_md = states.documents_md[:b], states.documents_md[b:]
    return states.query_bd, passage_bd, negatives_md.reshape(b, -1, d) if len(negatives_md) else None


def loss_and_grads(
    batch_loss: Any, params: Params, batch: AnyTrainBatch, config: ModelConfig, compute: ComputeConfig
) -> tuple[jax.Array, dict[str, jax.Array], Params]:
    """The loss of a batch, its terms and its gradient, directly or with GradCache."""

    def loss_of(states: tuple[jax.Array, ...]) -> tuple[jax.Array, dict[str, jax.Array]]:
        return batch_loss(text_states(batch, states))

    runs = batch_rows(batch)
    if not compute.chunk_rows:

        def direct(params: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
            return loss_of(row_states(params, runs, config, compute))

        (total, terms), grads = jax.value_and_grad(direct, has_aux=True)(params)
        return total, terms, grads

    states = row_states(params, runs, config, compute)
    (total, terms), cotangents = jax.value_and_grad(loss_of, has_aux=True)(states)
    grads = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    for rows, cotangent in zip(runs, cotangents, strict=True):
        grads = _add_chunk_grads(grads, params, rows, cotangent, config, compute)
    return total, terms, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)


def batch_states(params: Params, batch: AnyTrainBatch, config: ModelConfig, compute: ComputeConfig) -> States:
    """The states of queries and documents, all at once or in chunks."""
    return text_states(batch, row_states(params, batch_rows(batch), config, compute))


def batch_rows(batch: AnyTrainBatch) -> tuple[AnyBatch, ...]:
    """The groups of rows that the model computes: one if they are packed, else the queries and all documents."""
    if isinstance(batch, PackedTrainBatch):
        return (batch.rows,)
    if batch.negatives is None:
        return batch.query, batch.passage
    return batch.query, jax.tree.map(lambda *rows: jnp.concatenate(rows), batch.passage, batch.negatives)


def row_states(
    params: Params, runs: tuple[AnyBatch, ...], config: ModelConfig, compute: ComputeConfig
) -> tuple[jax.Array, ...]:
    """``eos_states`` of each group of rows (``batch_rows``), all at once or in chunks."""

    def encode(rows: AnyBatch) -> jax.Array:
        return _eos_states(params, rows, config, compute)

    if not compute.chunk_rows:
        return tuple(encode(rows) for rows in runs)
    return tuple(_join(jax.lax.map(encode, _chunks(rows, compute.chunk_rows)), len(rows.tokens_bt)) for rows in runs)


def text_states(batch: AnyTrainBatch, states: tuple[jax.Array, ...]) -> States:
    """The states of queries and documents, gathered from those of the rows (``row_states``)."""
    if not isinstance(batch, PackedTrainBatch):
        return States(*states)
    (states_bed,) = states
    states_sd = states_bed.reshape(-1, states_bed.shape[-1])
    slots = (batch.passage_slots_b, batch.negative_slots_m)
    return States(
        states_sd[batch.query_slots_b], states_sd[jnp.concatenate([part for part in slots if part is not None])]
    )


def _eos_states(params: Params, rows: AnyBatch, config: ModelConfig, compute: ComputeConfig) -> jax.Array:
    return eos_states(params, rows, config=config, dtype=compute.dtype, kernel=compute.kernel, remat=compute.remat)


def _add_chunk_grads(
    grads: Params, params: Params, rows: AnyBatch, cotangent: jax.Array, config: ModelConfig, compute: ComputeConfig
) -> Params:
    def add(grads: Params, chunk: tuple[AnyBatch, jax.Array]) -> tuple[Params, None]:
        rows, cotangent = chunk
        _, pull = jax.vjp(lambda params: _eos_states(params, rows, config, compute), params)
        (chunk_grads,) = pull(cotangent)
        return jax.tree.map(lambda total, g: total + g.astype(total.dtype), grads, chunk_grads), None

    chunks = (_chunks(rows, compute.chunk_rows), _chunks(cotangent, compute.chunk_rows))
    return jax.lax.scan(add, grads, chunks)[0]


def _padded(rows: Any, spare: int) -> Any:
    """Appends ``spare`` rows without a text to a batch, or ``spare`` rows of zeros to an array."""
    if not spare:
        return rows
    rows = jax.tree.map(lambda x: jnp.pad(x, [(0, spare)] + [(0, 0)] * (x.ndim - 1)), rows)
    return rows._replace(lengths_b=jnp.maximum(rows.lengths_b, 1)) if isinstance(rows, Batch) else rows


def _chunks(tree: Any, rows: int) -> Any:
    """Reshapes [b, …] to [chunks, rows of ``chunk_shape``, …]; where b does not divide, appends rows without a text.

    A chunk takes every chunks-th row, so that each device holds its part of every chunk.
    """
    count = len(jax.tree.leaves(tree)[0])
    chunks, size = chunk_shape(count, rows, batch_parts())
    tree = _padded(tree, chunks * size - count)
    return jax.tree.map(lambda x: x.reshape(-1, chunks, *x.shape[1:]).swapaxes(0, 1), tree)


def chunk_shape(rows: int, chunk_rows: int, parts: int) -> tuple[int, int]:
    """The number of chunks, and the rows of each: equal chunks that divide over ``parts`` devices.

    ``chunk_rows`` is rounded up to a multiple of ``parts``. With 4,608 rows in chunks of 24 on 16 devices these are 144
    chunks of 32; 192 chunks of at most 24 would be of 32 rows each, too, and a quarter of all padding.
    """
    at_most = math.ceil(chunk_rows / parts) * parts
    chunks = math.ceil(rows / at_most)
    return chunks, math.ceil(rows / (chunks * parts)) * parts


def _join(x: jax.Array, count: int) -> jax.Array:
    """The inverse of ``_chunks``: the first ``count`` rows."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:count]
