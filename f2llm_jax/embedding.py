"""From tokens to embeddings, as pure functions of (params, batch)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from f2llm_jax.config import ModelConfig
from f2llm_jax.errors import InputError, whole_number
from f2llm_jax.model import Backbone, Params, apply, at_positions

MANY_TOKENS = 256
"""Lower bound on the tokens of a batch, padding included: see ``ends_are_few``."""

FEW_ENDS = 1 / 4
"""Upper bound on the ends of a row, as a fraction of its positions: see ``ends_are_few``."""


class Batch(NamedTuple):
    """Texts as rows of token ids, padded on the right.

    Attributes:
        tokens_bt: int32 [batch, length]; after a row's EOS the ids may be anything, nothing depends on them.
        lengths_b: int32 [batch], tokens of each row, EOS included; at least 1.
    """

    tokens_bt: jax.Array | np.ndarray
    lengths_b: jax.Array | np.ndarray

    @property
    def segment_ids_bt(self) -> None:
        """None: a row is one text."""

    @property
    def ends_be(self) -> jax.Array | np.ndarray:
        """int32 [batch, 1], the position of each text's EOS in its row."""
        return self.lengths_b[:, None] - 1


class PackedBatch(NamedTuple):
    """Packed rows, many texts one after another in each: no token sees another text, and positions restart.

    A prefix common to all texts of a row may be stored once, in front of them.

    Attributes:
        tokens_bt: int32 [batch, length]; outside of the texts the ids may be anything, nothing depends on them.
        segment_ids_bt: int32 [batch, length], equal for the tokens of one text, different from those of the row's other
            texts; 0 for padding; ``segments.PREFIX`` for a shared prefix, in rows up to
            ``attention.longest_prefixed_row`` and only without a gradient.
        ends_be: int32 [batch, texts], the position of each text's EOS in its row; 0 in a slot without a text, whose
            state is meaningless.
    """

    tokens_bt: jax.Array | np.ndarray
    segment_ids_bt: jax.Array | np.ndarray
    ends_be: jax.Array | np.ndarray


AnyBatch = Batch | PackedBatch


def eos_states(
    params: Params,
    batch: AnyBatch,
    *,
    config: ModelConfig,
    dtype: jax.typing.DTypeLike = jnp.float32,
    kernel: str = "auto",
    remat: str = "none",
) -> jax.Array:
    """The final-norm hidden state of every text's EOS, unnormalised: what distillation compares.

    If ``ends_are_few``, the last layer computes keys and values for all tokens and everything else for the EOS only,
    with plain attention whatever the kernel is; under a gradient, only if the model ``has_few_layers``.

    Args:
        params: the parameters, as returned by ``init_params`` or ``load``.
        batch: the rows.
        config: the sizes that belong to ``params``.
        dtype: dtype of the operands of matrix products, a float dtype; int8 projections are multiplied in int8 whatever
            it is.
        kernel: the attention kernel, one of ``attention.KERNELS``; "auto" for the platform's.
        remat: what the backward pass recomputes, see ``model.REMAT_POLICIES``.

    Returns:
        float32 [batch, hidden]; of a ``PackedBatch`` [batch, texts, hidden].

    Raises:
        InputError: the dtype is not a float dtype.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(f"dtype must be float32 or bfloat16, not {jnp.dtype(dtype)}; with int8 projections, bfloat16")
    backbone = Backbone(config, dtype=jnp.dtype(dtype), kernel=kernel, remat=remat)
    inputs, ends_be = (batch.tokens_bt, batch.segment_ids_bt), jnp.asarray(batch.ends_be)
    if trims_last_layer(batch):
        states_bed = apply(backbone, params, *inputs, ends_be)
    else:
        states_bed = at_positions(apply(backbone, params, *inputs), ends_be)
    return states_bed if isinstance(batch, PackedBatch) else states_bed[:, 0]


def trims_last_layer(batch: AnyBatch) -> bool:
    """Whether the last layer is computed at the texts' ends only: if these ``ends_are_few``."""
    return ends_are_few(batch.ends_be.shape[1], *batch.tokens_bt.shape)


def ends_are_few(ends: int, rows: int, length: int) -> bool:
    """Whether it pays to compute the last layer at the texts' ends only, ``ends`` per row.

    With few tokens, reading the weights dominates, and a second kind of layer has to be compiled. With many ends, their
    scores, which are all in memory at once, outweigh the savings: according to the TPU compiler, 32 rows of 1,024
    tokens of the 80M move 23.2 GB of HBM with a full last layer, and 21.6, 22.4 and 29.4 GB with one at only 64, 256
    and 1,024 ends per row.
    """
    return rows * length >= MANY_TOKENS and ends <= FEW_ENDS * length


def embed(
    params: Params,
    batch: AnyBatch,
    *,
    config: ModelConfig,
    dim: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    kernel: str = "auto",
) -> jax.Array:
    """Unit embeddings of the texts: EOS pooling, Matryoshka truncation, L2 normalisation; jittable, differentiable.

    Args:
        params, batch, config, dtype, kernel: as for ``eos_states``.
        dim: keep the first ``dim`` values before normalising; ``None`` keeps all.

    Returns:
        float32 [batch, dim]; of a ``PackedBatch`` [batch, texts, dim].

    Raises:
        InputError: ``dim`` is not within 1 … ``config.hidden_size``.
    """
    dim = check_dim(dim, config)
    states = eos_states(params, batch, config=config, dtype=dtype, kernel=kernel)
    return matryoshka(states, (dim,))[dim]


def matryoshka(states_bd: jax.Array, dims: Iterable[int]) -> dict[int, jax.Array]:
    """The Matryoshka heads: the first ``dim`` values of each state, normalised again, for each of ``dims``.

    Args:
        states_bd: [..., hidden] EOS states (or full-size embeddings: the result is the same).
        dims: sizes, each within 1 … hidden.

    Returns:
        {dim: unit embeddings [..., dim]}, in the order of ``dims``.

    Raises:
        InputError: a size is not within 1 … hidden.
    """
    hidden = states_bd.shape[-1]
    heads = {}
    for dim in dims:
        if not 1 <= dim <= hidden:
            raise InputError(f"a Matryoshka dimension must be within 1..{hidden}, not {dim}")
        heads[dim] = unit(states_bd[..., :dim])
    return heads


def unit(x: jax.Array) -> jax.Array:
    """x / max(‖x‖, 1e-12) over the last axis, in float32, as ``torch.nn.functional.normalize`` does."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def check_dim(dim: int | None, config: ModelConfig) -> int:
    """``dim``, or the full size for ``None``; anything outside 1 … hidden is an InputError that lists advised sizes."""
    if dim is None:
        return config.hidden_size
    advised = ", ".join(map(str, config.matryoshka_dims))
    return whole_number("dim", dim, config.hidden_size, f"; advised: {advised}")
