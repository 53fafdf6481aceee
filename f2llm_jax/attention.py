"""Causal grouped-query attention: one signature, several kernels, picked by platform or by name.

A position attends to itself and to earlier positions with the same segment id. Rows that hold one text each need no
segment ids: they are padded on the right, so no token of the text sees the padding.

    kernel     where                           computes
    ragged     CPUs                            blocks of queries, each against the keys of its texts; ``ragged.py``
    splash     TPUs; interpreted on CPUs       jax.experimental.pallas.ops.tpu.splash_attention
    cudnn      GPUs, not in float32            jax.nn.dot_product_attention(implementation="cudnn")
    blocked    everywhere; GPUs in float32     plain products of blocks, none above the diagonal; ``blocked.py``
    reference  everywhere                      the formula itself; the other kernels are tested against it

With only a few query positions (the last layer needs no others), ``of_ends`` evaluates the formula directly. The texts
of a row may share a prefix (``segments.PREFIX``) in rows of up to ``longest_prefixed_row``. All kernels take grouped
queries directly: keys and values are never repeated. On a mesh, ragged, splash and cudnn run under ``shard_map`` over
batch and heads; the compiler partitions the others itself.

Dimensions: b batch, t query position, s key position, n query head, k key/value head, g query head within the group
that shares a key/value head, h head size.
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

# Maximum block of the splash kernel, in positions; blocks are multiples of the lanes of a TPU's vector unit.
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
    """softmax(q · k) · v; a position attends to itself and to earlier ones of its own segment or of a prefix.

    Args:
        q_btnh: queries [batch, length, heads, head_dim], already divided by sqrt(head_dim).
        k_bskh: keys [batch, length, key/value heads, head_dim], same dtype as the queries.
        v_bskh: values, like the keys.
        segment_ids_bt: int32 [batch, length], see ``segments``; None if every row is one text.
        ends_be: int32 [batch, ends], the query positions if there are only a few; the queries are then [batch, ends,
            heads, head_dim]. None if every position has a query.
        kernel: one of ``KERNELS``, or "auto" for the platform's ``default_kernel``. With ``ends_be`` the formula is
            evaluated directly, whichever kernel is named.

    Returns:
        float32, shaped like the queries. Scores, softmax and sums are float32 whatever the dtype of the inputs; all
        kernels except the reference round their result to the dtype of the queries.

    Raises:
        InputError: there is no such kernel, or it does not support this dtype.
    """
    name = resolve_kernel(kernel, platform(), q_btnh.dtype)
    if ends_be is not None:
        return of_ends(q_btnh, k_bskh, v_bskh, segment_ids_bt, ends_be)
    compute = KERNELS[name]
    if name in ("ragged", "splash", "cudnn") and not jax.sharding.get_abstract_mesh().empty:
        compute = functools.partial(_on_shards, compute)
    return compute(q_btnh, k_bskh, v_bskh, segment_ids_bt).astype(jnp.float32)


def default_kernel(platform: str, dtype: jax.typing.DTypeLike) -> str:
    """The default kernel of a platform. On GPUs, float32 takes the blocked one: cuDNN's supports only 16-bit dtypes."""
    if platform == "gpu":
        return "blocked" if jnp.dtype(dtype) == jnp.float32 else "cudnn"
    return "splash" if platform == "tpu" else "ragged"


def resolve_kernel(kernel: str, platform: str, dtype: jax.typing.DTypeLike) -> str:
    """The name of the kernel; "auto" is resolved by ``default_kernel``.

    Raises:
        InputError: there is no such kernel, or it does not support this dtype.
    """
    if kernel == "auto":
        return default_kernel(platform, dtype)
    if kernel not in KERNELS:
        raise InputError(f"no attention kernel {kernel!r}; there are auto, {', '.join(KERNELS)}")
    if kernel == "cudnn" and jnp.dtype(dtype) == jnp.float32:
        raise InputError("the cudnn kernel computes in bfloat16 or float16, not in float32; take kernel='blocked'")
    return kernel


def longest_prefixed_row(kernel: str) -> int:
    """The length of the longest row in which a kernel lets texts share a prefix; 0 if it does in none.

    Splash compares segment ids itself; the loops of ragged, which are used for longer rows and for all gradients, look
    back only to the beginning of a text.
    """
    return {"splash": 0, "ragged": SHORT - 1}.get(kernel, sys.maxsize)


def reference(q_btnh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, segment_ids_bt: jax.Array | None) -> jax.Array:
    """All scores at once, straight from the formula; the other kernels are tested against it."""
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

    Queries that share a key/value head form the rows of one matrix, q = (e, g).
    """
    b, e, n, h = q_benh.shape
    t, k = k_bskh.shape[1:3]
    g, dtype = n // k, q_benh.dtype
    q_bkqh = q_benh.reshape(b, e, k, g, h).swapaxes(1, 2).reshape(b, k, e * g, h)
    # Not transposed as halves of heads, as blocks of queries are on CPUs: TPUs would read half as much again.
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
    """The Pallas kernel for TPUs; on other platforms the same program is interpreted, slowly.

    Rows are padded on the right to a multiple of the block: no position sees what comes after it.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention

    t, n = q_btnh.shape[1:3]
    block = splash_block(t)
    padded = math.ceil(t / block) * block
    block_sizes = splash_attention.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )

    def run(*args: Any) -> jax.Array:
        # Built where it is traced: the backward pass would lose the kernel's own arrays if they came from outside.
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
    """The smallest multiple of ``LANES``, up to ``SPLASH_BLOCK``, that cuts rows of this length into fewest blocks."""
    blocks = math.ceil(length / SPLASH_BLOCK)
    return math.ceil(length / blocks / LANES) * LANES


def cudnn(q_btnh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, segment_ids_bt: jax.Array | None) -> jax.Array:
    """cuDNN's flash attention. Segment ids become a mask [batch, 1, length, length], which cuDNN applies as a bias."""
    return fused(q_btnh, k_bskh, v_bskh, segment_ids_bt, implementation="cudnn")


def fused(
    q_btnh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, segment_ids_bt: jax.Array | None, *, implementation: Any
) -> jax.Array:
    """``jax.nn.dot_product_attention`` with this module's masks; with "xla" these can be checked on a CPU."""
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
    """The function with all its matrix products in ``precision``, including those of its gradient, traced later."""
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
    """Runs a kernel that the compiler cannot partition, on each device's own rows and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    spec = functools.partial(partition_spec, rules=COMPUTE_RULES, mesh_shape=mesh.shape)
    q_spec = spec(q_btnh.shape, ("batch", "length", "heads", "head_dim"))
    kv_spec = spec(k_bskh.shape, ("batch", "length", "kv_heads", "head_dim"))
    group = q_btnh.shape[2] // k_bskh.shape[2]

    def on_shard(
        q_btnh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, segment_ids_bt: jax.Array | None
    ) -> jax.Array:
        if kv_spec != q_spec:  # all key/value heads are on this device; its query heads share one of them
            own = jax.lax.axis_index(q_spec[2]) * q_btnh.shape[2] // group
            k_bskh, v_bskh = (jax.lax.dynamic_slice_in_dim(x, own, 1, axis=2) for x in (k_bskh, v_bskh))
        return compute(q_btnh, k_bskh, v_bskh, segment_ids_bt)

    segments_spec = None if segment_ids_bt is None else jax.P(q_spec[0])
    # A Pallas call does not declare over which axes its results vary, which check_vma would require.
    run = jax.shard_map(on_shard, in_specs=(q_spec, kv_spec, kv_spec, segments_spec), out_specs=q_spec, check_vma=False)
    return run(q_btnh, k_bskh, v_bskh, segment_ids_bt)
