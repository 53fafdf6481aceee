"""Causal grouped-query attention: one signature, several kernels, picked by platform or by name.

A position sees itself and those before it that carry the same segment id. Rows of one text each need no segment ids:
they are filled from the left, so that no token of the text sees the padding behind it.

    kernel     where                           computes
    ragged     CPUs                            blocks of queries, each against the keys of its texts; ``ragged.py``
    splash     TPUs; interpreted on CPUs       jax.experimental.pallas.ops.tpu.splash_attention
    cudnn      GPUs, not in float32            jax.nn.dot_product_attention(implementation="cudnn")
    blocked    everywhere; GPUs in float32     plain products of blocks, nothing above the diagonal; ``blocked.py``
    reference  everywhere                      the formula; what the others are tested against

Where but a few positions have a query (of the last layer no one asks for the others), ``of_ends`` computes what
the formula says. The texts of a row may share a prefix (``segments.PREFIX``) in rows up to ``longest_prefixed_row``.
All take grouped queries as they are: keys and values are never repeated. On a mesh, ragged, splash and cudnn run under
``shard_map`` over batch and heads; the compiler splits the others by itself.

Dimensions: b batch, t query position, s key position, n query head, k key/value head, g query head of the group that
shares a key/value head, h size of a head.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from f2llm_jax.axes import COMPUTE_RULES, partition_spec, platform
from f2llm_jax.blocked import blocked
from f2llm_jax.errors import InputError
from f2llm_jax.products import matmul_precision, product
from f2llm_jax.ragged import SHORT, ragged
from f2llm_jax.segments import sees

# Positions of a block of the splash kernel, at most; a block is a multiple of the lanes of a TPU's vector unit.
SPLASH_BLOCK = 512
LANES = 128


def attention(
    q_btnh: jax.Array,
    k_bskh: jax.Array,
    v_bskh: jax.Array,
    segment_ids_bt: jax.Array | None = None,
    ends_be: jax.Array | None = None,
    *,
    kernel: str = "auto",
) -> jax.Array:
    """softmax(q · k) · v, each position seeing itself and those before it, of its own segment or a prefix.

    Args:
        q_btnh: queries [batch, length, heads, head_dim], already divided by sqrt(head_dim).
        k_bskh: keys [batch, length, key/value heads, head_dim], same dtype as the queries.
        v_bskh: values, like the keys.
        segment_ids_bt: int32 [batch, length], see ``segments``; None where every row is one text.
        ends_be: int32 [batch, ends], the positions of the queries where there are but a few, [batch, ends, heads,
            head_dim]; None where every position has one.
        kernel: one of ``KERNELS``, or "auto" for ``default_kernel`` of the platform. A few queries are computed as the
            formula says, whatever it is.

    Returns:
        float32, shaped like the queries. Scores, softmax and sums are float32 whatever the inputs are; all
        but the reference round what they return to the dtype of the queries.

    Raises:
        InputError: no such kernel, or one that does not compute in this dtype.
    """
    name = resolve_kernel(kernel, platform(), q_btnh.dtype)
    if ends_be is not None:
        return of_ends(q_btnh, k_bskh, v_bskh, segment_ids_bt, ends_be)
    compute = KERNELS[name]
    if name in ("ragged", "splash", "cudnn") and not jax.sharding.get_abstract_mesh().empty:
        compute = functools.partial(_on_shards, compute)
    return compute(q_btnh, k_bskh, v_bskh, segment_ids_bt).astype(jnp.float32)


def default_kernel(platform: str, dtype: jax.typing.DTypeLike) -> str:
    """The kernel of a platform. On GPUs float32 has none of its own: cuDNN's computes in 16 bits only."""
    if platform == "gpu":
        return "blocked" if jnp.dtype(dtype) == jnp.float32 else "cudnn"
    return "splash" if platform == "tpu" else "ragged"


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


def longest_prefixed_row(kernel: str) -> int:
    """The longest rows in which a kernel lets texts share a prefix; 0 if in none.

    Splash compares segments by itself; the loops of ragged, which are for longer rows and for gradients of all, look
    back no further than to where a text begins.
    """
    return {"splash": 0, "ragged": SHORT - 1}.get(kernel, sys.maxsize)


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
        seen_bts &= sees(segment_ids_bt[:, :, None], segment_ids_bt[:, None, :])
    weight_bkgts = jax.nn.softmax(jnp.where(seen_bts[:, None, None], score_bkgts, -jnp.inf), axis=-1)
    out_btkgh = jnp.einsum(
        "bkgts,bskh->btkgh",
        weight_bkgts.astype(v_bskh.dtype),
        v_bskh,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return out_btkgh.reshape(q_btnh.shape)


def of_ends(
    q_benh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, segment_ids_bt: jax.Array | None, ends_be: jax.Array
) -> jax.Array:
    """A few queries of each row against all of its keys: float32, rounded to the dtype of the queries.

    The queries of the group that shares a key/value head are rows of one matrix, q = (e, g).
    """
    b, e, n, h = q_benh.shape
    t, k = k_bskh.shape[1:3]
    g, dtype = n // k, q_benh.dtype
    q_bkqh = q_benh.reshape(b, e, k, g, h).swapaxes(1, 2).reshape(b, k, e * g, h)
    # Not as halves, as blocks of queries are moved on CPUs: TPUs would read half as much again.
    k_bksh, v_bksh = (x_bskh.swapaxes(1, 2) for x_bskh in (k_bskh, v_bskh))
    seen_bes = jnp.arange(t) <= ends_be[..., None]
    if segment_ids_bt is not None:
        segment_ids_be = jnp.take_along_axis(segment_ids_bt, ends_be, axis=1)
        seen_bes &= sees(segment_ids_be[..., None], segment_ids_bt[:, None])
    seen_b1qs = jnp.repeat(seen_bes, g, axis=1)[:, None]
    score_bkqs = jnp.where(seen_b1qs, product("bkqh,bksh->bkqs", q_bkqh, k_bksh, dtype), -jnp.inf)
    weight_bkqs = jnp.exp(score_bkqs - jax.lax.stop_gradient(jnp.max(score_bkqs, axis=-1, keepdims=True)))
    out_bkqh = product("bkqs,bksh->bkqh", weight_bkqs, v_bksh, dtype) / jnp.sum(weight_bkqs, axis=-1, keepdims=True)
    out_benh = out_bkqh.reshape(b, k, e, g, h).swapaxes(1, 2).reshape(b, e, n, h)
    return out_benh.astype(dtype).astype(jnp.float32)


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
        mask_b1ts = sees(segment_ids_bt[:, :, None], segment_ids_bt[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q_btnh, k_bskh, v_bskh, mask=mask_b1ts, scale=1.0, is_causal=True, implementation=implementation
    )


KERNELS: dict[str, Callable[..., jax.Array]] = {
    "blocked": blocked,
    "cudnn": cudnn,
    "ragged": ragged,
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
