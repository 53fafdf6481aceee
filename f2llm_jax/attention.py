"""Causal grouped-query attention: one signature, several kernels, picked by platform or by name.

A position sees itself and those before it that carry the same segment id. Rows of one text each need no segment ids:
they are filled from the left, so that no token of the text sees the padding behind it.

    kernel     where                           computes
    blocked    everywhere; default on CPUs     plain products of blocks, nothing above the diagonal
    splash     TPUs; interpreted on CPUs       jax.experimental.pallas.ops.tpu.splash_attention
    cudnn      GPUs, not in float32            jax.nn.dot_product_attention(implementation="cudnn")
    reference  everywhere                      the formula; what the others are tested against

All take grouped queries as they are: keys and values are never repeated. On a mesh, splash and cudnn run under
``shard_map`` over batch and heads; the compiler splits the others by itself.

Dimensions: b batch, t query position, s key position, n query head, k key/value head, g query head of the group that
shares a key/value head, q query of such a group (t · g), h size of a head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from f2llm_jax.axes import COMPUTE_RULES, partition_spec, platform
from f2llm_jax.errors import InputError
from f2llm_jax.products import einsum, from_bits, matmul_precision, product, to_bits

# Queries of a block see at most the keys up to its own end, so a causal row of n blocks computes (n + 1) / 2n of the
# full score matrix, and the scores of one block stay in the cache of a core.
QUERY_BLOCK = 128

# Positions of a block of the splash kernel, at most; a block is a multiple of the lanes of a TPU's vector unit.
SPLASH_BLOCK = 512
LANES = 128


def attention(
    q_btnh: jax.Array,
    k_bskh: jax.Array,
    v_bskh: jax.Array,
    segment_ids_bt: jax.Array | None = None,
    *,
    kernel: str = "auto",
) -> jax.Array:
    """softmax(q · k) · v, each position seeing itself and those before it, of its own segment.

    Args:
        q_btnh: queries [batch, length, heads, head_dim], already divided by sqrt(head_dim).
        k_bskh: keys [batch, length, key/value heads, head_dim], same dtype as the queries.
        v_bskh: values, like the keys.
        segment_ids_bt: int32 [batch, length]; None where every row is one segment.
        kernel: one of ``KERNELS``, or "auto" for ``default_kernel`` of the platform.

    Returns:
        float32, shaped like the queries. Scores, softmax and sums are float32 whatever the inputs are; blocked,
        splash and cudnn round what they return to the dtype of the queries.

    Raises:
        InputError: no such kernel, or one that does not compute in this dtype.
    """
    name = resolve_kernel(kernel, platform(), q_btnh.dtype)
    compute = KERNELS[name]
    if name in ("splash", "cudnn") and not jax.sharding.get_abstract_mesh().empty:
        compute = functools.partial(_on_shards, compute)
    return compute(q_btnh, k_bskh, v_bskh, segment_ids_bt).astype(jnp.float32)


def default_kernel(platform: str, dtype: jax.typing.DTypeLike) -> str:
    """The kernel of a platform. On GPUs float32 has none of its own: cuDNN's computes in 16 bits only."""
    if platform == "tpu":
        return "splash"
    return "cudnn" if platform == "gpu" and jnp.dtype(dtype) != jnp.float32 else "blocked"


def resolve_kernel(kernel: str, platform: str, dtype: jax.typing.DTypeLike) -> str:
    """The kernel's name, chosen by ``default_kernel`` for "auto".

    Raises:
        InputError: no such kernel, or one that does not compute in this dtype.
    """
    if kernel == "auto":
        return default_kernel(platform, dtype)
    if kernel not in KERNELS:
        raise InputError(f"no attention kernel {kernel!r}; there are auto, {', '.join(KERNELS)}")
    if kernel == "cudnn" and jnp.dtype(dtype) == jnp.float32:
        raise InputError("the cudnn kernel computes in bfloat16 or float16, not in float32; take kernel='blocked'")
    return kernel


def reference(q_btnh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, segment_ids_bt: jax.Array | None) -> jax.Array:
    """All scores at once, as the formula says: what the others are tested against."""
    b, t, n, h = q_btnh.shape
    k = k_bskh.shape[2]
    precision = matmul_precision(q_btnh.dtype)
    score_bkgts = jnp.einsum(
        "btkgh,bskh->bkgts",
        q_btnh.reshape(b, t, k, n // k, h),
        k_bskh,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    seen_bts = jnp.tril(jnp.ones((1, t, t), bool))
    if segment_ids_bt is not None:
        seen_bts &= segment_ids_bt[:, :, None] == segment_ids_bt[:, None, :]
    weight_bkgts = jax.nn.softmax(jnp.where(seen_bts[:, None, None], score_bkgts, -jnp.inf), axis=-1)
    out_btkgh = jnp.einsum(
        "bkgts,bskh->btkgh",
        weight_bkgts.astype(v_bskh.dtype),
        v_bskh,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return out_btkgh.reshape(q_btnh.shape)


@jax.custom_vjp
def blocked(q_btnh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, segment_ids_bt: jax.Array | None) -> jax.Array:
    """Query blocks, each against the keys up to its end: what lies above the diagonal blocks is never computed.

    The queries that share a key/value head are rows of one matrix (q = (t, g)), so that a block is a plain product per
    text and key/value head.

    For the gradient, the result and the logarithm of each query's sum are kept, and weights are computed again block by
    block (FlashAttention-2, arXiv:2307.08691, algorithm 2): nothing of the size of the scores outlives its block.
    """
    return _blocked_forward(q_btnh, k_bskh, v_bskh, segment_ids_bt)[0].astype(jnp.float32)


BLOCKED_RESULTS = "blocked attention"
"""The name, for policies of ``jax.checkpoint``, of what the gradient of ``blocked`` needs of the forward pass."""


def _blocked_forward(
    q_btnh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, segment_ids_bt: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The result in the dtype of the queries, and float32 log(sum(exp(score))) of each [batch, key/value heads, q].

    What is cut or joined is bits: see ``to_bits``.
    """
    k = k_bskh.shape[2]
    g = q_btnh.shape[2] // k
    dtype = q_btnh.dtype
    outs, log_sums = [], []
    for first, end in _query_blocks(q_btnh.shape[1]):
        q_bkqh = _heads_first(q_btnh, first, end, k)
        k_bksh, v_bksh = (_heads_first(x_bskh, 0, end, k) for x_bskh in (k_bskh, v_bskh))
        score_bkqs = product("bkqh,bksh->bkqs", q_bkqh, k_bksh, dtype)
        seen_qs = first + jnp.arange((end - first) * g)[:, None] // g >= jnp.arange(end)
        if segment_ids_bt is not None:
            segment_ids_bq = jnp.repeat(segment_ids_bt[:, first:end], g, axis=1)
            seen_qs = seen_qs & (segment_ids_bq[:, None, :, None] == segment_ids_bt[:, None, None, :end])
        score_bkqs += jnp.where(seen_qs, 0.0, -jnp.inf)
        # The sum is divided out after the product with v, where it touches h values a query instead of s.
        largest_bkq1 = jnp.max(score_bkqs, axis=-1, keepdims=True)
        weight_bkqs = jnp.exp(score_bkqs - largest_bkq1)
        out_bkqh = product("bkqs,bksh->bkqh", weight_bkqs, v_bksh, dtype)
        sum_bkq1 = jnp.sum(weight_bkqs, axis=-1, keepdims=True)
        outs.append(_heads_last(to_bits((out_bkqh / sum_bkq1).astype(dtype)), g))
        log_sums.append((largest_bkq1 + jnp.log(sum_bkq1))[..., 0])
    return from_bits(_join(outs, axis=1), dtype), _join(log_sums, axis=2)


def _blocked_residuals(
    q_btnh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, segment_ids_bt: jax.Array | None
) -> tuple[jax.Array, Any]:
    dtype = q_btnh.dtype
    out_btnh, log_sum_bkq = _blocked_forward(q_btnh, k_bskh, v_bskh, segment_ids_bt)
    out_btnh, log_sum_bkq = checkpoint_name((to_bits(out_btnh), log_sum_bkq), BLOCKED_RESULTS)
    out_btnh = from_bits(out_btnh, dtype)
    return out_btnh.astype(jnp.float32), (q_btnh, k_bskh, v_bskh, segment_ids_bt, out_btnh, log_sum_bkq)


def _blocked_backward(residuals: Any, cotangent_btnh: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """Keys are the rows of all that has the size of the scores: most of the products then take it as it lies."""
    q_btnh, k_bskh, v_bskh, segment_ids_bt, out_btnh, log_sum_bkq = residuals
    k = k_bskh.shape[2]
    g = q_btnh.shape[2] // k
    dtype = q_btnh.dtype
    multiply = functools.partial(einsum, dtype=dtype)
    d_out_btnh = cotangent_btnh.astype(dtype)
    # What a query's weights have to do with each other by their sum being one.
    mean_btkg = jnp.sum(cotangent_btnh * out_btnh.astype(jnp.float32), axis=-1).reshape(*q_btnh.shape[:2], k, g)
    mean_bkq = mean_btkg.transpose(0, 2, 1, 3).reshape(log_sum_bkq.shape)
    position_q = jnp.arange(mean_bkq.shape[2]) // g
    d_qs: list[jax.Array] = []
    d_k_bksh = d_v_bksh = jnp.zeros((*mean_bkq.shape[:2], 0, q_btnh.shape[3]))
    for first, end in _query_blocks(q_btnh.shape[1]):
        rows = slice(first * g, end * g)
        q_bkqh, d_out_bkqh = (_heads_first(x_btnh, first, end, k) for x_btnh in (q_btnh, d_out_btnh))
        k_bksh, v_bksh = (_heads_first(x_bskh, 0, end, k) for x_bskh in (k_bskh, v_bskh))
        score_bksq = multiply("bksh,bkqh->bksq", k_bksh, q_bkqh)
        seen_sq = jnp.arange(end)[:, None] <= position_q[rows]
        if segment_ids_bt is not None:
            segment_ids_bq = jnp.repeat(segment_ids_bt[:, first:end], g, axis=1)
            seen_sq = seen_sq & (segment_ids_bt[:, None, :end, None] == segment_ids_bq[:, None, None])
        weight_bksq = jnp.exp(jnp.where(seen_sq, score_bksq - log_sum_bkq[:, :, None, rows], -jnp.inf))
        d_weight_bksq = multiply("bksh,bkqh->bksq", v_bksh, d_out_bkqh)
        d_score_bksq = weight_bksq * (d_weight_bksq - mean_bkq[:, :, None, rows])
        d_q_bkqh = multiply("bksq,bksh->bkqh", d_score_bksq, k_bksh)
        d_qs.append(_heads_last(to_bits(d_q_bkqh.astype(dtype)), g))
        d_k_bksh = _add_longer(d_k_bksh, multiply("bksq,bkqh->bksh", d_score_bksq, q_bkqh))
        d_v_bksh = _add_longer(d_v_bksh, multiply("bksq,bkqh->bksh", weight_bksq, d_out_bkqh))
    d_q_btnh = from_bits(_join(d_qs, axis=1), dtype)
    return d_q_btnh, _heads_last(d_k_bksh.astype(dtype), 1), _heads_last(d_v_bksh.astype(dtype), 1), None


blocked.defvjp(_blocked_residuals, _blocked_backward)


def _query_blocks(length: int) -> list[tuple[int, int]]:
    return [(first, min(first + QUERY_BLOCK, length)) for first in range(0, length, QUERY_BLOCK)]


def _heads_first(x_btnh: jax.Array, first: int, end: int, k: int) -> jax.Array:
    """[b, k, q, h] of some positions, where the queries q = (t, g) share a key/value head.

    XLA merges this with the loop that turns the halves of heads, as which they are therefore moved: its index is then
    no division. For the same reason positions are cut first, and what is cut is bits, as ``to_bits`` says.
    """
    x_btnh, dtype = to_bits(x_btnh)[:, first:end], x_btnh.dtype
    b, t, n, h = x_btnh.shape
    x_bktg2h = x_btnh.reshape(b, t, k, n // k, 2, h // 2).transpose(0, 2, 1, 3, 4, 5)
    return from_bits(x_bktg2h, dtype).reshape(b, k, t * n // k, h)


def _heads_last(x_bkqh: jax.Array, g: int) -> jax.Array:
    """Undoes ``_heads_first``."""
    b, k, q, h = x_bkqh.shape
    x_btkg2h = x_bkqh.reshape(b, k, q // g, g, 2, h // 2).transpose(0, 2, 1, 3, 4, 5)
    return x_btkg2h.reshape(b, q // g, k * g, h)


def _join(blocks: list[jax.Array], axis: int) -> jax.Array:
    return jnp.concatenate(blocks, axis) if len(blocks) > 1 else blocks[0]


def _add_longer(total: jax.Array, longer: jax.Array) -> jax.Array:
    """Their sum, where the total stands for zeros behind its end. (A padded one would be a branch for each element.)"""
    length = total.shape[2]
    return jnp.concatenate([total + longer[:, :, :length], longer[:, :, length:]], axis=2)


def splash(q_btnh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, segment_ids_bt: jax.Array | None) -> jax.Array:
    """The Pallas kernel for TPUs; elsewhere the same program is interpreted, slowly.

    Rows are padded behind their end to a multiple of the block: no position sees what comes after it.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention

    t, n = q_btnh.shape[1:3]
    block = splash_block(t)
    padded = math.ceil(t / block) * block
    block_sizes = splash_attention.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )

    def run(*args: Any) -> jax.Array:
        # Made where it is used: arrays of its own that came from outside would be lost to the backward pass.
        kernel = splash_attention.make_splash_mha(
            splash_attention.MultiHeadMask([splash_attention.CausalMask((padded, padded))] * n),
            block_sizes=block_sizes,
            head_shards=1,
            q_seq_shards=1,
            interpret=platform() != "tpu",
        )
        return jax.vmap(kernel)(*args)

    def heads_first(x_btnh: jax.Array) -> jax.Array:
        return jnp.pad(x_btnh, ((0, 0), (0, padded - t), (0, 0), (0, 0))).transpose(0, 2, 1, 3)

    segments = None
    if segment_ids_bt is not None:
        segment_ids_bt = jnp.pad(segment_ids_bt, ((0, 0), (0, padded - t)))
        segments = splash_attention.SegmentIds(segment_ids_bt, segment_ids_bt)
    compute = _with_precision(run, matmul_precision(q_btnh.dtype))
    out_bnth = compute(heads_first(q_btnh), heads_first(k_bskh), heads_first(v_bskh), segments)
    return out_bnth.transpose(0, 2, 1, 3)[:, :t]


def splash_block(length: int) -> int:
    """The least multiple of ``LANES``, up to ``SPLASH_BLOCK``, with which rows of this length take fewest blocks."""
    blocks = math.ceil(length / SPLASH_BLOCK)
    return math.ceil(length / blocks / LANES) * LANES


def cudnn(q_btnh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, segment_ids_bt: jax.Array | None) -> jax.Array:
    """cuDNN's flash attention. Segment ids become a mask [batch, 1, length, length], which cuDNN reads as a bias."""
    return fused(q_btnh, k_bskh, v_bskh, segment_ids_bt, implementation="cudnn")


def fused(
    q_btnh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, segment_ids_bt: jax.Array | None, *, implementation: Any
) -> jax.Array:
    """``jax.nn.dot_product_attention`` with this module's masks; "xla" shows on a CPU that they are right."""
    mask_b1ts = None
    if segment_ids_bt is not None:
        mask_b1ts = (segment_ids_bt[:, :, None] == segment_ids_bt[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q_btnh, k_bskh, v_bskh, mask=mask_b1ts, scale=1.0, is_causal=True, implementation=implementation
    )


KERNELS: dict[str, Callable[..., jax.Array]] = {
    "blocked": blocked,
    "cudnn": cudnn,
    "reference": reference,
    "splash": splash,
}


def _with_precision(compute: Callable[..., jax.Array], precision: jax.lax.Precision) -> Callable[..., jax.Array]:
    """The function with all its products in ``precision``, and those of its gradient, which JAX traces later."""
    context = functools.partial(jax.default_matmul_precision, precision.name.lower())

    @jax.custom_vjp
    def run(*args: Any) -> jax.Array:
        with context():
            return compute(*args)

    def forward(*args: Any) -> Any:
        with context():
            return jax.vjp(compute, *args)

    def backward(pull: Any, cotangent: jax.Array) -> Any:
        with context():
            return pull(cotangent)

    run.defvjp(forward, backward)
    return run


def _on_shards(
    compute: Callable[..., jax.Array],
    q_btnh: jax.Array,
    k_bskh: jax.Array,
    v_bskh: jax.Array,
    segment_ids_bt: jax.Array | None,
) -> jax.Array:
    """A kernel that the compiler cannot split, on every device's own rows and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    spec = functools.partial(partition_spec, rules=COMPUTE_RULES, mesh_shape=mesh.shape)
    q_spec = spec(q_btnh.shape, ("batch", "length", "heads", "head_dim"))
    kv_spec = spec(k_bskh.shape, ("batch", "length", "kv_heads", "head_dim"))
    group = q_btnh.shape[2] // k_bskh.shape[2]

    def on_shard(
        q_btnh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, segment_ids_bt: jax.Array | None
    ) -> jax.Array:
        if kv_spec != q_spec:  # all key/value heads are here, of which these query heads share one
            own = jax.lax.axis_index(q_spec[2]) * q_btnh.shape[2] // group
            k_bskh, v_bskh = (jax.lax.dynamic_slice_in_dim(x, own, 1, axis=2) for x in (k_bskh, v_bskh))
        return compute(q_btnh, k_bskh, v_bskh, segment_ids_bt)

    segments_spec = None if segment_ids_bt is None else jax.P(q_spec[0])
    # A Pallas call does not say over which axes its results vary, which is what check_vma would ask of it.
    run = jax.shard_map(on_shard, in_specs=(q_spec, kv_spec, kv_spec, segments_spec), out_specs=q_spec, check_vma=False)
    return run(q_btnh, k_bskh, v_bskh, segment_ids_bt)
