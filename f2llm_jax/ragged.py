"""Attention for CPUs, by blocks of queries, each against only the keys that its texts reach back to.

The rows of a batch are joined into one. A query sees the positions from the start of its text up to itself; in a block
of queries, the text of the first one starts first, so the block needs the keys from there to its own end. Their number
is known only at run time: blocks are sorted by the shortest of a few static windows that holds their keys, and each
window has one loop, over the blocks that use it. Few scores between texts are computed this way: in blocks in which a
text begins, and where a window is longer than necessary. Rows may be as long as is convenient, and the data of a block
stays in the cache of a core.

For the gradient, the result and the log-sum-exp of each query are kept, and weights are recomputed block by block
(FlashAttention-2, arXiv:2307.08691, algorithm 2): nothing of the size of the scores outlives its block.

Dimensions, besides those of ``attention``: p position in the joined rows, padded to whole blocks; c block; q query of a
block that shares a key/value head (position · g); s key of a window.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from f2llm_jax.blocked import blocked, heads_first, heads_last
from f2llm_jax.products import einsum, from_bits, product, to_bits

Carry = TypeVar("Carry")
Gradients = tuple[jax.Array, jax.Array, jax.Array]

# Maximum positions per block. Larger blocks multiply a little faster, but compute more scores that no query sees.
LARGEST_BLOCK = 96

# Row length from which loops are used. A batch of the 80M in bfloat16, two at a time, takes 57 ms with loops and 60
# ms without in rows of 256 with two texts each, and 70 and 58 ms in rows of 176 with one.
SHORT = 256

ATTENTION_RESULTS = "attention results"
"""The name, for ``jax.checkpoint`` policies, of what the gradient needs from the forward pass."""


@jax.custom_vjp
def ragged(q_btnh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, segment_ids_bt: jax.Array | None) -> jax.Array:
    """``attention`` on one device: float32, rounded to the dtype of the queries.

    Without a gradient, the static blocks of ``blocked`` are faster for rows shorter than ``SHORT``.
    """
    if q_btnh.shape[1] < SHORT:
        return blocked(q_btnh, k_bskh, v_bskh, segment_ids_bt)
    return _forward(q_btnh, k_bskh, v_bskh, segment_ids_bt)[0].astype(jnp.float32)


class _Blocks(NamedTuple):
    """The blocks of the joined rows.

    Attributes:
        size: positions per block.
        first_p: int32, the first position of each position's text.
        length: row length, and so the maximum length of a text.
    """

    size: int
    first_p: jax.Array
    length: int

    @classmethod
    def of(cls, shape: tuple[int, int], segment_ids_bt: jax.Array | None) -> _Blocks:
        """The blocks of rows of this shape; the padding of the last block counts as texts of one token."""
        b, t = shape
        size = block_size(b, t)
        position_p = jnp.arange(math.ceil(b * t / size) * size)
        starts_p = (position_p % t == 0) | (position_p >= b * t)
        if segment_ids_bt is not None:
            segment_ids_p = segment_ids_bt.reshape(-1)
            changes_p = jnp.diff(segment_ids_p, prepend=segment_ids_p[:1]) != 0
            starts_p |= jnp.pad(changes_p, (0, len(position_p) - b * t))
        return cls(size, jax.lax.cummax(jnp.where(starts_p, position_p, 0)), t)

    @property
    def windows(self) -> list[int]:
        return windows(self.size, self.length, len(self.first_p))

    def each(self, visit: Callable[[jax.Array, int, Carry], Carry], carry: Carry) -> Carry:
        """Calls ``visit(block, window, carry)`` for each block, with the shortest window that holds all it sees."""
        end_c = jnp.arange(self.size, len(self.first_p) + 1, self.size)
        keys_c = end_c - self.first_p[:: self.size]
        order_c = jnp.argsort(keys_c)
        done = jnp.int32(0)
        for window in self.windows:
            up_to = jnp.sum(keys_c <= window, dtype=jnp.int32)

            def step(n: jax.Array, carry: Carry, window: int = window) -> Carry:
                return visit(order_c[n], window, carry)

            carry = jax.lax.fori_loop(done, up_to, step, carry)
            done = up_to
        return carry

    def cut(self, x_p: jax.Array, block: jax.Array) -> jax.Array:
        """The part of an array that belongs to a block."""
        return jax.lax.dynamic_slice_in_dim(x_p, block * self.size, self.size)

    def window_start(self, block: jax.Array, window: int) -> jax.Array:
        """The start of a window, which ends where its block does, unless it would begin before position 0."""
        return jnp.maximum((block + 1) * self.size - window, 0)

    def seen(self, block: jax.Array, window: int, g: int) -> jax.Array:
        """Whether each query [q, 1] sees each key [1, s]."""
        query_q1 = jnp.repeat(block * self.size + jnp.arange(self.size), g)[:, None]
        first_q1 = jnp.repeat(self.cut(self.first_p, block), g)[:, None]
        key_1s = self.window_start(block, window) + jnp.arange(window)
        return (first_q1 <= key_1s) & (key_1s <= query_q1)


def block_size(b: int, t: int) -> int:
    """The largest block, up to ``LARGEST_BLOCK`` positions, that divides a row, or is whole rows and divides the batch.

    If that is less than a third of the maximum, a block is two thirds of it, and rows begin and end within blocks.
    """
    sizes = (n for n in range(LARGEST_BLOCK, 0, -1) if t % n == 0 or (n % t == 0 and b * t % n == 0))
    size = next(sizes)
    return size if 3 * size >= min(LARGEST_BLOCK, b * t) else 2 * LARGEST_BLOCK // 3


def windows(size: int, length: int, positions: int) -> list[int]:
    """Static window sizes in keys, ascending: 1 or 1.5 times a power of two blocks; the last is always enough.

    Args:
        size: positions per block.
        length: row length, and so the maximum length of a text.
        positions: number of positions of all rows.
    """
    if length % size == 0 or size % length == 0:  # then rows and blocks begin together
        enough = max(length, size)
    else:
        enough = min(math.ceil((length + size - 1) / size) * size, positions)
    blocks = sorted({factor * 2**power // 2 for power in range(32) for factor in (2, 3)})
    return [*(n * size for n in blocks if n * size < enough), enough]


def _forward(
    q_btnh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, segment_ids_bt: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The result in the dtype of the queries, and float32 log(sum(exp(score))) for each [c, k, q].

    Slicing and joining operate on bits: see ``to_bits``.
    """
    b, t, n, _ = q_btnh.shape
    k = k_bskh.shape[2]
    g, dtype = n // k, q_btnh.dtype
    blocks = _Blocks.of((b, t), segment_ids_bt)
    q_pn2h, k_pk2h, v_pk2h = (_joined(_halves(x), blocks) for x in (q_btnh, k_bskh, v_bskh))

    def visit(block: jax.Array, window: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x_pn2h, log_sum_ckq = carry  # results of finished blocks take the place of their queries
        q_kqh = _queries(blocks, block, x_pn2h, k, dtype)
        k_ksh, v_ksh = _keys(blocks, block, window, k_pk2h, v_pk2h, dtype)
        score_kqs = product("kqh,ksh->kqs", q_kqh, k_ksh, dtype)
        score_kqs += jnp.where(blocks.seen(block, window, g), 0.0, -jnp.inf)
        # Normalised after the product with v: the division then touches h values per query instead of s.
        largest_kq1 = jnp.max(score_kqs, axis=-1, keepdims=True)
        weight_kqs = jnp.exp(score_kqs - largest_kq1)
        out_kqh = product("kqs,ksh->kqh", weight_kqs, v_ksh, dtype)
        sum_kq1 = jnp.sum(weight_kqs, axis=-1, keepdims=True)
        out_qn2h = _halves(heads_last((out_kqh / sum_kq1).astype(dtype), g))
        log_sum_kq = (largest_kq1 + jnp.log(sum_kq1))[..., 0]
        return (
            jax.lax.dynamic_update_slice_in_dim(x_pn2h, out_qn2h, block * blocks.size, 0),
            jax.lax.dynamic_update_index_in_dim(log_sum_ckq, log_sum_kq, block, 0),
        )

    count = len(blocks.first_p) // blocks.size
    zeros_ckq = jnp.zeros((count, k, blocks.size * g), jnp.float32)
    out_pn2h, log_sum_ckq = blocks.each(visit, (q_pn2h, zeros_ckq))
    return from_bits(out_pn2h[: b * t].reshape(q_btnh.shape), dtype), log_sum_ckq


def _residuals(
    q_btnh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, segment_ids_bt: jax.Array | None
) -> tuple[jax.Array, Any]:
    dtype = q_btnh.dtype
    out_btnh, log_sum_ckq = _forward(q_btnh, k_bskh, v_bskh, segment_ids_bt)
    out_btnh, log_sum_ckq = checkpoint_name((to_bits(out_btnh), log_sum_ckq), ATTENTION_RESULTS)
    out_btnh = from_bits(out_btnh, dtype)
    return out_btnh.astype(jnp.float32), (q_btnh, k_bskh, v_bskh, segment_ids_bt, out_btnh, log_sum_ckq)


def _backward(residuals: Any, cotangent_btnh: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """Score-sized arrays have keys as rows: most of the products can then take them without a transposition."""
    q_btnh, k_bskh, v_bskh, segment_ids_bt, out_btnh, log_sum_ckq = residuals
    b, t, n, h = q_btnh.shape
    k = k_bskh.shape[2]
    g, dtype = n // k, q_btnh.dtype
    blocks = _Blocks.of((b, t), segment_ids_bt)
    q_pn2h, k_pk2h, v_pk2h, d_out_pn2h = (
        _joined(_halves(x), blocks) for x in (q_btnh, k_bskh, v_bskh, cotangent_btnh.astype(dtype))
    )
    # The softmax term of the gradient, rowsum(dO ∘ O).
    delta_pn = _joined(jnp.sum(cotangent_btnh * out_btnh.astype(jnp.float32), axis=-1), blocks)
    multiply = functools.partial(einsum, dtype=dtype)

    def visit(block: jax.Array, window: int, carry: Gradients) -> Gradients:
        x_pn2h, d_k_kph, d_v_kph = carry  # gradients of finished blocks take the place of their queries
        q_kqh, d_out_kqh = (_queries(blocks, block, x, k, dtype) for x in (x_pn2h, d_out_pn2h))
        k_ksh, v_ksh = _keys(blocks, block, window, k_pk2h, v_pk2h, dtype)
        score_ksq = multiply("ksh,kqh->ksq", k_ksh, q_kqh)
        log_sum_k1q = jax.lax.dynamic_index_in_dim(log_sum_ckq, block, 0, keepdims=False)[:, None]
        weight_ksq = jnp.exp(jnp.where(blocks.seen(block, window, g).T, score_ksq - log_sum_k1q, -jnp.inf))
        delta_k1q = blocks.cut(delta_pn, block).reshape(-1, k, g).swapaxes(0, 1).reshape(k, 1, -1)
        d_score_ksq = weight_ksq * (multiply("ksh,kqh->ksq", v_ksh, d_out_kqh) - delta_k1q)
        d_q_qn2h = _halves(heads_last(multiply("ksq,ksh->kqh", d_score_ksq, k_ksh).astype(dtype), g))
        start = blocks.window_start(block, window)
        return (
            jax.lax.dynamic_update_slice_in_dim(x_pn2h, d_q_qn2h, block * blocks.size, 0),
            _add_at(d_k_kph, multiply("ksq,kqh->ksh", d_score_ksq, q_kqh), start),
            _add_at(d_v_kph, multiply("ksq,kqh->ksh", weight_ksq, d_out_kqh), start),
        )

    zeros_kph = jnp.zeros((k, len(blocks.first_p), h), jnp.float32)
    d_q_pn2h, *d_kv = blocks.each(visit, (q_pn2h, zeros_kph, zeros_kph))
    d_q_btnh = from_bits(d_q_pn2h[: b * t].reshape(q_btnh.shape), dtype)
    d_k_bskh, d_v_bskh = (heads_last(x[:, : b * t].astype(dtype), 1).reshape(k_bskh.shape) for x in d_kv)
    return d_q_btnh, d_k_bskh, d_v_bskh, None


ragged.defvjp(_residuals, _backward)


def _joined(x_bt: jax.Array, blocks: _Blocks) -> jax.Array:
    """The rows [batch, length, ...] joined into one, padded to whole blocks."""
    x_p = x_bt.reshape(-1, *x_bt.shape[2:])
    return jnp.pad(x_p, [(0, len(blocks.first_p) - len(x_p)), *[(0, 0)] * (x_p.ndim - 1)])


def _halves(x_nh: jax.Array) -> jax.Array:
    """The bits of heads [..., h] as halves [..., 2, h / 2], the form in which loops carry them.

    XLA would fuse the computation of queries and keys with the joining of the halves, whose index would then need a
    division; it does not fuse into a loop.
    """
    return to_bits(x_nh).reshape(*x_nh.shape[:-1], 2, -1)


def _whole(x_n2h: jax.Array) -> jax.Array:
    """The inverse of ``_halves``, except for the bits."""
    return x_n2h.reshape(*x_n2h.shape[:-2], -1)


def _queries(blocks: _Blocks, block: jax.Array, x_pn2h: jax.Array, k: int, dtype: Any) -> jax.Array:
    """The part of a query-shaped array that belongs to a block, [k, q, h]."""
    return from_bits(heads_first(_whole(blocks.cut(x_pn2h, block)), k), dtype)


def _keys(
    blocks: _Blocks, block: jax.Array, window: int, k_pk2h: jax.Array, v_pk2h: jax.Array, dtype: Any
) -> Iterator[jax.Array]:
    """Keys and values of a block's window, [k, s, h]."""
    start = blocks.window_start(block, window)
    for x_pk2h in (k_pk2h, v_pk2h):
        x_sk2h = jax.lax.dynamic_slice_in_dim(x_pk2h, start, window)
        yield from_bits(heads_first(_whole(x_sk2h), x_sk2h.shape[1]), dtype)


def _add_at(total_kph: jax.Array, part_ksh: jax.Array, start: jax.Array) -> jax.Array:
    """The total with the part added to it from position ``start`` on."""
    before = jax.lax.dynamic_slice_in_dim(total_kph, start, part_ksh.shape[1], 1)
    return jax.lax.dynamic_update_slice_in_dim(total_kph, before + part_ksh, start, 1)
