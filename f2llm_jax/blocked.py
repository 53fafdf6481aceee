"""Attention as plain products of static blocks: compiles well on every platform; CPUs use it for short rows.

Dimensions: those of ``attention``, and q query of the group that shares a key/value head (t · g).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from f2llm_jax.products import from_bits, product, to_bits
from f2llm_jax.segments import sees

# The queries of a block see only keys up to its own end, so a causal row of n blocks computes (n + 1) / 2n of the full
# score matrix, and the scores of one block fit in a core's cache.
QUERY_BLOCK = 128


@jax.custom_vjp
def blocked(q_btnh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, segment_ids_bt: jax.Array | None) -> jax.Array:
    """Query blocks, each against the keys up to its end: nothing above the diagonal blocks is computed.

    Queries that share a key/value head form the rows of one matrix (q = (t, g)), so a block is one plain product per
    row and key/value head. Slicing and concatenation operate on bits (see ``to_bits``), except under a gradient: there,
    the backward pass recomputes each block, so that no scores outlive it.
    """
    return _blocks(q_btnh, k_bskh, v_bskh, segment_ids_bt, differentiable=False)


def _differentiable(
    q_btnh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, segment_ids_bt: jax.Array | None
) -> tuple[jax.Array, Any]:
    return jax.vjp(lambda q, k, v: _blocks(q, k, v, segment_ids_bt, differentiable=True), q_btnh, k_bskh, v_bskh)


blocked.defvjp(_differentiable, lambda pull, cotangent_btnh: (*pull(cotangent_btnh), None))


def _blocks(
    q_btnh: jax.Array,
    k_bskh: jax.Array,
    v_bskh: jax.Array,
    segment_ids_bt: jax.Array | None,
    *,
    differentiable: bool,
) -> jax.Array:
    length, dtype = q_btnh.shape[1], q_btnh.dtype
    bits = (lambda x: x) if differentiable else to_bits
    outs = []
    for first in range(0, length, QUERY_BLOCK):
        end = min(first + QUERY_BLOCK, length)
        block = functools.partial(_block, first=first, end=end, bits=bits)
        compute = jax.checkpoint(block) if differentiable else block
        outs.append(compute(q_btnh, k_bskh, v_bskh, segment_ids_bt))
    out_btnh = jnp.concatenate(outs, axis=1) if len(outs) > 1 else outs[0]
    return from_bits(out_btnh, dtype).astype(jnp.float32)


def _block(
    q_btnh: jax.Array,
    k_bskh: jax.Array,
    v_bskh: jax.Array,
    segment_ids_bt: jax.Array | None,
    *,
    first: int,
    end: int,
    bits: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """The result for one block of queries, in their dtype or as bits."""
    k = k_bskh.shape[2]
    g = q_btnh.shape[2] // k
    dtype = q_btnh.dtype
    q_bkqh = from_bits(heads_first(bits(q_btnh)[:, first:end], k), dtype)
    k_bksh, v_bksh = (from_bits(heads_first(bits(x_bskh)[:, :end], k), dtype) for x_bskh in (k_bskh, v_bskh))
    score_bkqs = product("bkqh,bksh->bkqs", q_bkqh, k_bksh, dtype)
    seen_qs = first + jnp.arange((end - first) * g)[:, None] // g >= jnp.arange(end)
    if segment_ids_bt is not None:
        segment_ids_bq = jnp.repeat(segment_ids_bt[:, first:end], g, axis=1)
        seen_qs = seen_qs & sees(segment_ids_bq[:, None, :, None], segment_ids_bt[:, None, None, :end])
    score_bkqs += jnp.where(seen_qs, 0.0, -jnp.inf)
    # Normalised after the product with v: the division then touches h values per query instead of s.
    weight_bkqs = jnp.exp(score_bkqs - jnp.max(score_bkqs, axis=-1, keepdims=True))
    out_bkqh = product("bkqs,bksh->bkqh", weight_bkqs, v_bksh, dtype)
    out_bkqh = (out_bkqh / jnp.sum(weight_bkqs, axis=-1, keepdims=True)).astype(dtype)
    return heads_last(bits(out_bkqh), g)


def heads_first(x_tnh: jax.Array, k: int) -> jax.Array:
    """[..., t, n, h] to [..., k, q, h], where the queries q = (t, g) share a key/value head.

    XLA fuses this with the loop that rotates the halves of heads. Heads are therefore transposed as halves, which keeps
    divisions out of the index of that loop; for the same reason, positions are sliced beforehand. Keys and values also
    get a group axis, of size one: XLA's CPU compiler would fold a plain transposition into the product that follows,
    and multiply bfloat16 in float32.
    """
    *batch, t, n, h = x_tnh.shape
    x_ktg2h = x_tnh.reshape(*batch, t, k, n // k, 2, h // 2).swapaxes(-5, -4)
    return x_ktg2h.reshape(*batch, k, t * n // k, h)


def heads_last(x_kqh: jax.Array, g: int) -> jax.Array:
    """The inverse of ``heads_first``."""
    *batch, k, q, h = x_kqh.shape
    x_tkg2h = x_kqh.reshape(*batch, k, q // g, g, 2, h // 2).swapaxes(-5, -4)
    return x_tkg2h.reshape(*batch, q // g, k * g, h)
