"""The attention kernels against the reference one, forward and backward, alone and on a mesh; which is chosen."""

from __future__ import annotations

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from f2llm_jax import make_mesh
from f2llm_jax.attention import (
    KERNELS,
    attention,
    default_kernel,
    fused,
    longest_prefixed_row,
    reference,
    resolve_kernel,
    splash_block,
)
from f2llm_jax.config import ModelConfig
from f2llm_jax.errors import InputError
from f2llm_jax.model import Backbone, init_params
from f2llm_jax.ragged import SHORT, _Blocks, ragged
from f2llm_jax.segments import PREFIX

LARGEST_DIFFERENCE = {"float32": 2e-6, "bfloat16": 2e-2}  # relative to the largest value

# rows, length, query heads, key/value heads, head_dim; whether there are segments
CASES = {
    "one block": ((2, 128, 4, 2, 128), True),
    "one key/value head": ((1, 130, 3, 1, 128), False),
    "blocks that do not divide": ((1, 700, 2, 2, 128), True),
    "rows that begin within blocks": ((3, 100, 4, 2, 16), True),
    "small heads": ((2, 24, 4, 2, 16), False),
}


def case(shape, dtype, *, segments):
    b, t, n, k, h = shape
    rng = np.random.default_rng(0)
    q_btnh, k_bskh, v_bskh = (
        jnp.asarray(rng.normal(size=size), dtype) for size in ((b, t, n, h), (b, t, k, h), (b, t, k, h))
    )
    segment_ids_bt = jnp.asarray(np.sort(rng.integers(0, 5, (b, t))), jnp.int32) if segments else None
    return (q_btnh * jnp.asarray(h**-0.5, dtype), k_bskh, v_bskh), segment_ids_bt


def value_and_gradients(kernel, inputs, segment_ids_bt):
    """The result of a kernel, and the gradients of its sum with fixed random weights."""
    weight_btnh = jnp.asarray(np.random.default_rng(1).normal(size=inputs[0].shape), jnp.float32)

    def total(*inputs):
        out_btnh = kernel(*inputs, segment_ids_bt)
        return jnp.sum(out_btnh.astype(jnp.float32) * weight_btnh), out_btnh

    grads, out_btnh = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*inputs)
    return [np.asarray(x, np.float32) for x in (out_btnh, *grads)]


def assert_close(got, expected, dtype):
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        assert ours.shape == theirs.shape
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert error <= LARGEST_DIFFERENCE[dtype], (name, error)


@pytest.mark.parametrize("segments", [False, True], ids=["one text", "segments"])
def test_the_reference_is_torchs(segments):
    inputs, segment_ids_bt = case((2, 37, 4, 2, 16), "float32", segments=segments)
    seen_bts = np.tril(np.ones((2, 37, 37), bool))
    if segments:
        seen_bts &= np.asarray(segment_ids_bt)[:, :, None] == np.asarray(segment_ids_bt)[:, None]
    query, key, value = (torch.tensor(np.asarray(x)).transpose(1, 2).requires_grad_() for x in inputs)
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=torch.tensor(seen_bts)[:, None], scale=1.0, enable_gqa=True
    )
    weight_btnh = np.random.default_rng(1).normal(size=inputs[0].shape).astype(np.float32)
    grads = torch.autograd.grad((out.transpose(1, 2) * torch.tensor(weight_btnh)).sum(), (query, key, value))
    expected = [x.detach().transpose(1, 2).numpy() for x in (out, *grads)]
    assert_close(value_and_gradients(reference, inputs, segment_ids_bt), expected, "float32")


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [*((kernel, "float32") for kernel in ("reference", "blocked", "ragged", "fused")), ("ragged", "bfloat16")],
)
def test_a_text_sees_the_prefix_of_its_row(kernel, dtype):
    """As torch computes it; so do the ends of texts by themselves, whatever the kernel is."""
    inputs, _ = case((2, 150, 4, 2, 16), dtype, segments=False)
    row_t = np.repeat([PREFIX, 1, 2, 3, 0], [11, 30, 1, 99, 9])
    segment_ids_bt = np.stack([row_t, np.where(row_t == PREFIX, 4, row_t)])  # the second row has no prefix
    seen_bts = np.tril(segment_ids_bt[:, :, None] == segment_ids_bt[:, None])
    seen_bts[0] |= np.tril(np.broadcast_to(row_t == PREFIX, (150, 150)))
    query, key, value = (torch.tensor(np.asarray(x, np.float32)).transpose(1, 2) for x in inputs)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=torch.tensor(seen_bts)[:, None], scale=1.0, enable_gqa=True
    )
    expected = expected.transpose(1, 2).numpy()
    compute = partial(fused, implementation="xla") if kernel == "fused" else partial(attention, kernel=kernel)
    got = jax.jit(compute)(*inputs, segment_ids_bt)
    assert np.abs(got - expected).max() <= LARGEST_DIFFERENCE[dtype] * np.abs(expected).max()
    ends_be = np.array([[40, 41, 140]] * 2)
    got = jax.jit(attention)(inputs[0][:, ends_be[0]], *inputs[1:], segment_ids_bt, ends_be)
    assert np.abs(got - expected[:, ends_be[0]]).max() <= LARGEST_DIFFERENCE[dtype] * np.abs(expected).max()


def test_prefixes_are_for_kernels_that_know_them():
    assert longest_prefixed_row("splash") == 0 and longest_prefixed_row("ragged") == SHORT - 1
    assert all(longest_prefixed_row(kernel) > 10**6 for kernel in {*KERNELS} - {"splash", "ragged"})


@pytest.mark.parametrize(("shape", "segments"), CASES.values(), ids=CASES)
def test_kernels_equal_the_reference(shape, segments):
    """Of cuDNN's kernel, which needs a GPU, the call with its masks is computed by XLA."""
    inputs, segment_ids_bt = case(shape, "float32", segments=segments)
    expected = value_and_gradients(partial(attention, kernel="reference"), inputs, segment_ids_bt)
    for compute in (
        partial(attention, kernel="ragged"),
        partial(attention, kernel="blocked"),
        partial(attention, kernel="splash"),
        partial(fused, implementation="xla"),
    ):
        assert_close(value_and_gradients(compute, inputs, segment_ids_bt), expected, "float32")


@pytest.mark.parametrize("name", ["one block", "rows that begin within blocks"])
def test_in_bfloat16_too(name):
    inputs, segment_ids_bt = case(CASES[name][0], "bfloat16", segments=True)
    exact = [x.astype(jnp.float32) for x in inputs]
    expected = value_and_gradients(partial(attention, kernel="reference"), exact, segment_ids_bt)
    for kernel in ("ragged", "blocked", "splash"):
        got = value_and_gradients(partial(attention, kernel=kernel), inputs, segment_ids_bt)
        assert_close(got, expected, "bfloat16")


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "HIGHEST"), ("bfloat16", "DEFAULT")])
def test_float32_means_float32_within_splash(dtype, precision):
    """A TPU would multiply float32 in bfloat16 otherwise; of the two passes, the backward one is traced later."""
    inputs, segment_ids_bt = case((1, 128, 2, 1, 128), dtype, segments=True)

    def total(*inputs):
        return jnp.sum(attention(*inputs, segment_ids_bt, kernel="splash"))

    jaxpr = jax.make_jaxpr(jax.grad(total, argnums=(0, 1, 2)))(*inputs)
    products = [equation for kernel in equations(jaxpr, "pallas_call") for equation in within(kernel, "dot_general")]
    assert len(products) == 2 + 4 + 3  # scores and output; for keys and values; for queries
    assert {equation.params["precision"] for equation in products} == {(jax.lax.Precision[precision],) * 2}


@pytest.mark.parametrize(("remat", "products"), [("none", 2 + 5), ("dots", 2 + 5), ("full", 2 + 2 + 5)])
def test_what_the_ragged_kernel_computes_again(remat, products):
    """Scores alone, within its gradient; if a policy keeps nothing, all of it."""
    config = ModelConfig(32, 8, 16, 2, 2, 1, 8, rope_theta=1e4)
    params, tokens_bt = init_params(config, jax.random.key(0)), jnp.zeros((1, 16), jnp.int32)
    backbone = Backbone(config, kernel="ragged", remat=remat)
    jaxpr = jax.make_jaxpr(jax.grad(lambda params: backbone.apply({"params": params}, tokens_bt).sum()))(params)
    batches = [equation.params["dimension_numbers"][1][0] for equation in equations(jaxpr, "dot_general")]
    assert len([batch for batch in batches if batch]) == products


def equations(jaxpr, name):
    """The equations of a primitive in a program, however deep."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == name:
            yield equation
        else:
            yield from within(equation, name)


def within(equation, name):
    for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
        if hasattr(value, "eqns"):
            yield from equations(value, name)


@pytest.mark.parametrize("kernel", ["ragged", "splash"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv_heads", [4, 2])  # they divide over tensor=4; they are fewer
def test_on_a_mesh_kernels_take_own_rows_and_heads(kv_heads, dtype, kernel):
    inputs, segment_ids_bt = case((2, 100, 8, kv_heads, 16), dtype, segments=True)
    exact = [x.astype(jnp.float32) for x in inputs]
    expected = value_and_gradients(partial(attention, kernel="reference"), exact, segment_ids_bt)
    with jax.set_mesh(make_mesh(fsdp=2, tensor=4)):
        got = value_and_gradients(partial(attention, kernel=kernel), inputs, segment_ids_bt)
    assert_close(got, expected, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_a_gradient_long_rows_and_short_ones(dtype):
    """Short rows are then of static blocks."""
    for length in (SHORT - 40, SHORT + 44):
        inputs, segment_ids_bt = case((2, length, 4, 2, 16), dtype, segments=True)
        exact = [x.astype(jnp.float32) for x in inputs]
        expected = attention(*exact, segment_ids_bt, kernel="reference")
        loops = "while" in str(jax.make_jaxpr(ragged)(*inputs, segment_ids_bt))
        assert loops == (length > SHORT)
        error = jnp.abs(attention(*inputs, segment_ids_bt, kernel="ragged") - expected).max() / jnp.abs(expected).max()
        assert error <= LARGEST_DIFFERENCE[dtype]


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (5, 40), (3, 100), (2, 256), (1, 700)])
@pytest.mark.parametrize("texts", [1, 2, 12], ids=lambda texts: f"{texts} a row")
def test_a_block_takes_the_shortest_window_that_holds_its_texts(shape, texts):
    """Whatever the rows are, and wherever they begin."""
    b, t = shape
    segment_ids_bt = np.sort(np.random.default_rng(0).integers(0, texts, shape))
    blocks = _Blocks.of(shape, jnp.asarray(segment_ids_bt))
    count = len(blocks.first_p) // blocks.size
    visits_c = blocks.each(lambda block, window, c: c.at[block].add(window), jnp.zeros(count, int))
    text_p = (segment_ids_bt + np.arange(b)[:, None] * texts).reshape(-1)
    for block, window in enumerate(np.asarray(visits_c)):
        queries = np.arange(block * blocks.size, (block + 1) * blocks.size)
        texts_of_block = text_p[queries[queries < b * t]]
        first = np.flatnonzero(text_p == texts_of_block[0])[0]
        assert window == min(size for size in blocks.windows if size >= queries[-1] + 1 - first)
        start = int(blocks.window_start(block, window))
        seen_qs = np.asarray(blocks.seen(block, window, 1))[: len(texts_of_block)]
        keys = start + np.arange(window)
        same_qs = texts_of_block[:, None] == np.where(keys < b * t, text_p[np.minimum(keys, b * t - 1)], -1)
        np.testing.assert_array_equal(seen_qs, same_qs & (keys <= queries[: len(texts_of_block), None]))
    assert blocks.windows[0] == blocks.size and blocks.windows[-1] < t + 2 * blocks.size


def test_the_platform_and_the_dtype_choose():
    assert default_kernel("cpu", jnp.float32) == default_kernel("cpu", jnp.bfloat16) == "ragged"
    assert default_kernel("tpu", jnp.float32) == default_kernel("tpu", jnp.bfloat16) == "splash"
    assert default_kernel("gpu", jnp.bfloat16) == "cudnn"
    # cuDNN's kernel has no float32.
    assert default_kernel("gpu", jnp.float32) == default_kernel("gpu", "float32") == "blocked"
    for name in KERNELS:
        assert resolve_kernel(name, "cpu", jnp.bfloat16) == name
    with pytest.raises(InputError, match="no attention kernel 'flash'; there are auto, blocked, cudnn, ragged, ref"):
        resolve_kernel("flash", "cpu", jnp.float32)
    with pytest.raises(InputError, match="cudnn kernel computes in bfloat16 or float16"):
        resolve_kernel("cudnn", "gpu", jnp.float32)


@pytest.mark.parametrize(
    ("length", "block", "blocks"),
    [(1, 128, 1), (128, 128, 1), (129, 256, 1), (513, 384, 2), (1024, 512, 2), (1100, 384, 3)],
)
def test_rows_are_padded_to_few_blocks(length, block, blocks):
    assert splash_block(length) == block
    assert block * (blocks - 1) < length <= block * blocks


@pytest.mark.parametrize("segments", [False, True], ids=["one text", "segments"])
@pytest.mark.parametrize("axes", [None, {"fsdp": 2, "tensor": 4}], ids=["alone", "mesh"])
def test_cudnn_lowers_for_gpus(monkeypatch, axes, segments):
    """No GPU is needed to see that cuDNN's calls, forward and backward, are in a program for one."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    inputs, segment_ids_bt = case((2, 128, 8, 4, 128), "bfloat16", segments=segments)

    def total(*inputs):
        return jnp.sum(attention(*inputs, segment_ids_bt, kernel="cudnn"))

    with jax.set_mesh(make_mesh(**axes)) if axes else contextlib.nullcontext():
        lowered = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(*inputs).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    kind = "ScaleBias" if segments else ""
    assert f"__cudnn$fmha{kind}Softmax(" in text and f"__cudnn$fmha{kind}SoftmaxBackward(" in text
    # What a device computes: one row and two heads of the two rows and eight.
    assert ("tensor<1x128x2x128xbf16>" if axes else "tensor<2x128x8x128xbf16>") in text
