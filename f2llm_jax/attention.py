"""Causal grouped-query attention: one signature, several kernels, picked by platform or by name.

Rows are filled from the left, so a causal mask is all a text needs: its tokens never see the padding behind them.
Dimensions: b batch, t query position, s key position, k key/value head, g query head of the group that shares a
key/value head, h size of a head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Queries of a block see at most the keys up to its own end, so a causal row of n blocks computes (n + 1) / 2n of the
# full score matrix, and the scores of one block stay in the cache of a core.
QUERY_BLOCK = 128


def attention(q_btkgh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, *, kernel: str = "blocked") -> jax.Array:
    """softmax(q · k / sqrt(head_dim)) · v, each position seeing itself and those before it.

    Args:
        q_btkgh: queries [batch, length, key/value heads, query heads per key/value head, head_dim].
        k_bskh: keys [batch, length, key/value heads, head_dim], same dtype as the queries.
        v_bskh: values, like the keys.
        kernel: one of ``KERNELS``.

    Returns:
        float32, shaped like the queries. Scores, softmax and sums are float32 whatever the inputs are.

    Raises:
        ValueError: no such kernel.
    """
    if kernel not in KERNELS:
        raise ValueError(f"no attention kernel {kernel!r}; there are {', '.join(KERNELS)}")
    return KERNELS[kernel](q_btkgh, k_bskh, v_bskh)


def reference(q_btkgh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array) -> jax.Array:
    """All scores at once, as the formula says: what the others are tested against."""
    _, t, _, _, h = q_btkgh.shape
    precision = matmul_precision(q_btkgh.dtype)
    score_bktgs = jnp.einsum(
        "btkgh,bskh->bktgs", q_btkgh, k_bskh, precision=precision, preferred_element_type=jnp.float32
    )
    seen_t1s = jnp.tril(jnp.ones((t, t), bool))[:, None]
    weight_bktgs = jax.nn.softmax(jnp.where(seen_t1s, score_bktgs * h**-0.5, -jnp.inf), axis=-1)
    return jnp.einsum(
        "bktgs,bskh->btkgh",
        weight_bktgs.astype(v_bskh.dtype),
        v_bskh,
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def blocked(q_btkgh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array) -> jax.Array:
    """Query blocks, each against the keys up to its end: what lies above the diagonal blocks is never computed.

    The queries that share a key/value head are rows of one matrix (q = (t, g)), so that a block is a plain product per
    text and key/value head.
    """
    b, t, k, g, h = q_btkgh.shape
    precision = matmul_precision(q_btkgh.dtype)
    q_bkqh = q_btkgh.transpose(0, 2, 1, 3, 4).reshape(b, k, t * g, h)
    k_bksh, v_bksh = k_bskh.transpose(0, 2, 1, 3), v_bskh.transpose(0, 2, 1, 3)
    blocks = []
    for first in range(0, t, QUERY_BLOCK):
        end = min(first + QUERY_BLOCK, t)
        score_bkqs = jnp.einsum(
            "bkqh,bksh->bkqs",
            q_bkqh[:, :, first * g : end * g],
            k_bksh[:, :, :end],
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        position_q1 = first + jnp.arange((end - first) * g)[:, None] // g
        score_bkqs = score_bkqs * h**-0.5 + jnp.where(position_q1 >= jnp.arange(end), 0.0, -jnp.inf)
        # The sum is divided out after the product with v, where it touches h values a query instead of s.
        weight_bkqs = jnp.exp(score_bkqs - jnp.max(score_bkqs, axis=-1, keepdims=True))
        out_bkqh = jnp.einsum(
            "bkqs,bksh->bkqh",
            weight_bkqs.astype(v_bksh.dtype),
            v_bksh[:, :, :end],
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        blocks.append(out_bkqh / jnp.sum(weight_bkqs, axis=-1, keepdims=True))
    out_bkqh = jnp.concatenate(blocks, axis=2) if len(blocks) > 1 else blocks[0]
    return out_bkqh.reshape(b, k, t, g, h).transpose(0, 2, 1, 3, 4)


KERNELS = {"blocked": blocked, "reference": reference}


def matmul_precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """float32 means float32: without this, a TPU multiplies float32 matrices in bfloat16."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
