"""Products and their gradients: JAX's own in float32; in bfloat16 the operands are rounded and the sums are not."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import jit_as_users

from f2llm_jax import products
from f2llm_jax.products import product
from f2llm_jax.ragged import ragged
from f2llm_jax.sharding import make_mesh

SPECS = {
    "mi,oi->mo": ((24, 40), (16, 40)),
    "mi,ji->mj": ((80, 8), (64, 8)),  # of the gradient of b, its transpose is computed
    "bti,oi->bto": ((3, 8, 40), (16, 40)),
    "bkqh,bksh->bkqs": ((2, 3, 8, 16), (2, 3, 12, 16)),
    "bkqs,bksh->bkqh": ((2, 3, 8, 12), (2, 3, 12, 16)),
    "bqkh,bskh->kbsq": ((2, 8, 3, 16), (2, 12, 3, 16)),
}


def case(spec):
    keys = jax.random.split(jax.random.key(0), 3)
    a, b = (jax.random.normal(key, shape) for key, shape in zip(keys, SPECS[spec], strict=False))
    out = jnp.einsum(spec, a, b)
    return a, b, jax.random.normal(keys[2], out.shape)


@pytest.mark.parametrize("spec", SPECS)
def test_float32_is_einsum_and_its_gradient(spec):
    a, b, cotangent = case(spec)
    expected, pull = jax.vjp(lambda a, b: jnp.einsum(spec, a, b, precision="highest"), a, b)
    found, own_pull = jax.vjp(lambda a, b: product(spec, a, b, "float32"), a, b)
    for one, other in zip([found, *own_pull(cotangent)], [expected, *pull(cotangent)], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_bfloat16_rounds_what_enters_a_product_and_nothing_else(spec):
    a, b, cotangent = case(spec)
    found, pull = jax.vjp(lambda a, b: product(spec, a, b, "bfloat16"), a, b)
    a, b, cotangent_rounded = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in (a, b, cotangent))
    expected, exact_pull = jax.vjp(lambda a, b: jnp.einsum(spec, a, b, precision="highest"), a, b)
    for one, other in zip([found, *pull(cotangent)], [expected, *exact_pull(cotangent_rounded)], strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-5)


def test_gradients_multiply_operands_of_the_dtype():
    """Not a float32 cotangent with a bfloat16 operand, which runs at the rate of float32."""
    a, b, cotangent = case("mi,oi->mo")
    text = jit_as_users(
        lambda a, b: jax.vjp(lambda a, b: product("mi,oi->mo", a, b, "bfloat16"), a, b)[1](cotangent)
    ).lower(a, b)
    dots = [line for line in text.as_text().splitlines() if "dot_general" in line]
    assert len(dots) == 2
    for line in dots:
        types = line.rpartition(" : ")[2]
        assert types.count("xbf16>") == 2 and types.endswith("xf32>"), line


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("on_mesh", [False, True])
def test_cpus_multiply_in_bfloat16(spec, on_mesh):
    """XLA's CPU compiler turns the operands of products it has no bfloat16 kernel for to float32."""
    a, b, cotangent = case(spec)
    run = jit_as_users(lambda a, b: jax.vjp(lambda a, b: product(spec, a, b, "bfloat16"), a, b)[1](cotangent))
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])) if on_mesh else contextlib.nullcontext():
        text = run.lower(a, b).compile().as_text()
    assert operand_types(text) == [{"bf16"}] * 2


def operand_types(program: str) -> list[set[str]]:
    """Of each product of a compiled program."""
    types = dict(re.findall(r"%([\w.-]+) = (\w+)\[", program))
    return [{types[operand] for operand in dot} for dot in re.findall(r" dot\(%([\w.-]+), %([\w.-]+)\)", program)]


@pytest.mark.parametrize(("times", "halved"), [(1, False), (1.1, True), (2, True), (2.1, False)])
def test_an_operand_that_a_core_cannot_keep_is_multiplied_in_halves(monkeypatch, times, halved):
    """The first, of so many times the size of the cache; those of the two gradients fit."""
    shapes = ((75, 64), (24, 64), (75, 24))
    monkeypatch.setattr(products, "_CACHE_BYTES", int(75 * 64 * 2 / times))
    a, b, cotangent = (
        jax.random.normal(key, shape).astype(jnp.bfloat16).astype(jnp.float32)
        for key, shape in zip(jax.random.split(jax.random.key(0), 3), shapes, strict=True)
    )

    def run(a, b, multiply):
        y, pull = jax.vjp(multiply, a, b)
        return y, *pull(cotangent)

    own = jit_as_users(functools.partial(run, multiply=lambda a, b: product("mi,oi->mo", a, b, "bfloat16")))
    compiled = own.lower(a, b).compile()
    for one, other in zip(compiled(a, b), run(a, b, lambda a, b: jnp.einsum("mi,oi->mo", a, b)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-5)
    assert operand_types(compiled.as_text()) == [{"bf16"}] * (4 if halved else 3)


def test_an_operand_is_not_halved_for_a_wider_result(monkeypatch):
    monkeypatch.setattr(products, "_CACHE_BYTES", 5000)
    program = jit_as_users(lambda a, b: product("mi,oi->mo", a, b, "bfloat16"))
    for outputs, dots in ((63, 2), (64, 1)):
        text = program.lower(jnp.zeros((75, 64)), jnp.zeros((outputs, 64))).compile().as_text()
        assert operand_types(text) == [{"bf16"}] * dots


def test_a_transposed_gradient_compiles():
    """A transpose merged into a product makes one that the CPU has no bfloat16 kernel for, and cannot run at all."""
    a, b, cotangent = case("mi,oi->mo")
    _, pull = jax.vjp(lambda a, b: product("mi,oi->mo", a, b, "bfloat16"), a, b)
    expected = pull(cotangent)
    run = jax.jit(lambda a, b: jax.vjp(lambda a, b: product("mi,oi->mo", a, b, "bfloat16"), a, b)[1](cotangent))
    found = jit_as_users(lambda a, b: jax.tree.map(jnp.transpose, run(a, b)))(a, b)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.T, other, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_accelerators_write_what_may_be_rounded_in_the_dtype(platform, monkeypatch):
    a, b, cotangent = case("mi,oi->mo")
    exact = product("mi,oi->mo", a, b, "bfloat16")
    monkeypatch.setattr("f2llm_jax.products.platform", lambda: platform)
    rounded, pull = jax.vjp(lambda a, b: product("mi,oi->mo", a, b, "bfloat16", True), a, b)
    assert rounded.dtype == jnp.bfloat16 and product("mi,oi->mo", a, b, "bfloat16").dtype == jnp.float32
    np.testing.assert_array_equal(rounded, exact.astype(jnp.bfloat16))
    assert product("mi,oi->mo", a, b, "float32", True).dtype == jnp.float32
    assert [x.dtype for x in pull(cotangent.astype(jnp.bfloat16))] == [jnp.float32, jnp.float32]


def test_gradients_have_the_dtype_of_the_operand():
    a, b, cotangent = case("mi,oi->mo")
    _, pull = jax.vjp(lambda a, b: product("mi,oi->mo", a, b, "bfloat16"), a.astype(jnp.bfloat16), b)
    assert [x.dtype for x in pull(cotangent)] == [jnp.bfloat16, jnp.float32]


def test_compiled_for_a_cpu_attention_and_its_gradient_multiply_bfloat16():
    """XLA's CPU compiler would multiply in float32 wherever it folded a transposition into a product."""

    def attention(x_md, q_oi, kv_oi):
        q_btnh = product("mi,oi->mo", x_md, q_oi, "bfloat16").reshape(2, 48, 4, 32)
        k_btkh = product("mi,oi->mo", x_md, kv_oi, "bfloat16").reshape(2, 48, 2, 32)
        q_btnh, k_btkh = q_btnh.astype("bfloat16"), k_btkh.astype("bfloat16")
        return ragged(q_btnh, k_btkh, k_btkh, None).astype(jnp.float32).sum()

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((96, 64), (128, 64), (64, 64))]
    lines = jit_as_users(jax.grad(attention, argnums=(0, 1, 2))).lower(*shapes).compile().as_text().splitlines()
    types = {}
    for line in lines:
        name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
        types[name] = rest.partition("[")[0]
    operands = [re.search(r" dot\((.*?)\)", line)[1].split(", ") for line in lines if " dot(" in line]
    assert len(operands) == 13  # 4 forward, 9 backward: scores are computed again
    assert {types[name] for pair in operands for name in pair} == {"bf16"}
