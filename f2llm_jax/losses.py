"""The losses that F2LLM-v2 is trained with, on unnormalised EOS states.

They follow the reference's ``F2LLM/utils.py`` (``hard_loss``, ``inbatch_loss``, the distillation terms of
``accelerate_train``) and sum in float32. Dimensions: b batch, c passages of the global batch, n negatives, d hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from f2llm_jax.embedding import matryoshka
from f2llm_jax.errors import InputError

TEMPERATURE = 0.05


def hard_negative_loss(
    query_bd: jax.Array,
    passage_bd: jax.Array,
    negatives_bnd: jax.Array | None,
    *,
    temperature: float = TEMPERATURE,
    mrl_dims: Sequence[int] | None = None,
    example_mask_b: jax.Array | None = None,
) -> jax.Array:
    """Cross-entropy of each query's own passage against its own hard negatives, mean over the batch.

    Args:
        query_bd, passage_bd: [batch, hidden] states; passage i belongs to query i.
        negatives_bnd: [batch, negatives, hidden]; None gives 0, as the reference does.
        temperature: divides the cosines.
        mrl_dims: Matryoshka sizes besides the full one; None for the full size alone. See ``matryoshka_weights``.
        example_mask_b: bool [batch]; the mean is over these examples. None for all.

    Returns:
        A float32 scalar.
    """
    if negatives_bnd is None:
        return jnp.float32(0)

    def loss(query_bd: jax.Array, documents_bnd: jax.Array) -> jax.Array:
        logit_bn = jnp.einsum("bd,bnd->bn", query_bd, documents_bnd, precision="highest") / temperature
        return -jnp.mean(jax.nn.log_softmax(logit_bn)[:, 0], where=example_mask_b)

    documents_bnd = jnp.concatenate([passage_bd[:, None], negatives_bnd], axis=1)
    return _over_dims(loss, query_bd, documents_bnd, mrl_dims)


def in_batch_loss(
    query_bd: jax.Array,
    passage_cd: jax.Array,
    *,
    temperature: float = TEMPERATURE,
    mrl_dims: Sequence[int] | None = None,
    passage_ids_c: jax.Array | None = None,
    stop_passage_gradient: bool = False,
    example_mask_b: jax.Array | None = None,
) -> jax.Array:
    """Cross-entropy of each query's own passage against all passages of the global batch, mean over the batch.

    Args:
        query_bd, passage_cd: [batch, hidden] states of the whole global batch; passage i belongs to query i.
        temperature: divides the cosines.
        mrl_dims: Matryoshka sizes besides the full one.
        passage_ids_c: int [batch]; passages with the same id as a query's own are the same document and are left out of
            its denominator. None compares with all, as the reference does.
        stop_passage_gradient: let this term train the queries only, as the reference does on several GPUs (its gather
            carries no gradient). The default is the full gradient, as in the reference on one GPU.
        example_mask_b: bool [batch]; the loss is that of a batch of only these examples. None for all.

    Returns:
        A float32 scalar.
    """
    if stop_passage_gradient:
        passage_cd = jax.lax.stop_gradient(passage_cd)

    def loss(query_bd: jax.Array, passage_cd: jax.Array) -> jax.Array:
        logit_bc = jnp.einsum("bd,cd->bc", query_bd, passage_cd, precision="highest") / temperature
        if passage_ids_c is not None:
            same_bc = passage_ids_c[:, None] == passage_ids_c[None, :]
            logit_bc = jnp.where(same_bc & ~jnp.eye(len(passage_ids_c), dtype=bool), -jnp.inf, logit_bc)
        if example_mask_b is not None:
            logit_bc = jnp.where(example_mask_b[None, :], logit_bc, -jnp.inf)
        return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(logit_bc)), where=example_mask_b)

    return _over_dims(loss, query_bd, passage_cd, mrl_dims)


def distillation_loss(
    student_states: jax.Array, teacher_states: jax.Array, *, mrl_dims: Sequence[int] | None = None
) -> jax.Array:
    """Mean squared difference of unnormalised states, the teacher's truncated to the student's width.

    Args:
        student_states: [..., student hidden].
        teacher_states: [..., teacher hidden], no gradient flows into it.
        mrl_dims: also compare the states truncated to each of these sizes, weighted as in ``matryoshka_weights``; None
            compares only the student's full width, as the reference does.

    Returns:
        A float32 scalar: the mean over all elements. The recipe sums this over queries, passages and negatives.

    Raises:
        InputError: the student is wider than the teacher.
    """
    width, teacher_width = student_states.shape[-1], teacher_states.shape[-1]
    if width > teacher_width:
        raise InputError(f"a student of {width} dimensions cannot be distilled from a teacher of {teacher_width}")
    teacher_states = jax.lax.stop_gradient(teacher_states[..., :width])
    square = jnp.square(student_states.astype(jnp.float32) - teacher_states.astype(jnp.float32))
    weights = matryoshka_weights(width, mrl_dims)
    return sum((weight * jnp.mean(square[..., :dim]) for dim, weight in weights.items()), jnp.float32(0))


def matryoshka_weights(hidden: int, mrl_dims: Sequence[int] | None) -> dict[int, float]:
    """The weight of each Matryoshka size: the n-th largest, d, weighs 1 / (n · sqrt(hidden / d)).

    Args:
        hidden: the full size, which is always included, with weight 1.
        mrl_dims: the other sizes; None for none.

    Returns:
        {size: weight}, largest first. The weights are not normalised.
    """
    dims = sorted({hidden, *(mrl_dims or ())}, reverse=True)
    return {dim: 1 / (n * math.sqrt(hidden / dim)) for n, dim in enumerate(dims, start=1)}


def _over_dims(
    loss: Callable[[jax.Array, jax.Array], jax.Array],
    query: jax.Array,
    documents: jax.Array,
    mrl_dims: Sequence[int] | None,
) -> jax.Array:
    weights = matryoshka_weights(query.shape[-1], mrl_dims)
    queries, all_documents = matryoshka(query, weights), matryoshka(documents, weights)
    return sum((weight * loss(queries[dim], all_documents[dim]) for dim, weight in weights.items()), jnp.float32(0))
