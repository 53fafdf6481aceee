"""Matrix products: operands in the dtype of the model, sums in float32, forwards and backwards alike.

JAX's own gradient of a product of bfloat16 operands with float32 sums multiplies the float32 cotangent with a bfloat16
operand, which hardware does at the rate of float32. Here the cotangent is rounded as every other operand is.

XLA's CPU compiler has kernels for bfloat16 only where the first operand is summed over its last axis. Others, such as
the gradient of a weight, which sums over the rows of both operands, it turns to float32: 33 ms for the 2048 x 320 of a
projection's 4,096 rows, where a copy of the first operand in the other order and the fast product take 12.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint


def matmul_precision(dtype: jax.typing.DTypeLike) -> jax.lax.Precision:
    """float32 means float32: without this, a TPU multiplies float32 matrices in bfloat16."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else jax.lax.Precision.DEFAULT


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(spec: str, a: jax.Array, b: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """An einsum of two arrays that enter it in ``dtype``; float32.

    Args:
        spec: such as ``mi,oi->mo``: every letter is in two of the three terms or in all of them, once in each.
        a, b: of any float dtype, which their gradients have too.
        dtype: that of the operands, here and in the gradient.
    """
    return _einsum(spec, a, b, dtype)


def _einsum(spec: str, a: jax.Array, b: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    precision = matmul_precision(dtype)
    return jnp.einsum(spec, a.astype(dtype), b.astype(dtype), precision=precision, preferred_element_type=jnp.float32)


def _on_one_cpu() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return platform == "cpu" and (mesh.empty or mesh.size == 1)


def _gradient(spec: str, cotangent: jax.Array, other: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The einsum of a cotangent and the other operand."""
    if jnp.dtype(dtype) != jnp.bfloat16 or not _on_one_cpu():
        return _einsum(spec, cotangent, other, dtype)
    a, b = cotangent.astype(dtype), other.astype(dtype)
    terms, out = spec.split("->")
    of_a, of_b = terms.split(",")
    first = next(letter for letter in out if (letter in of_a) != (letter in of_b))
    if first in of_b:
        a, b, of_a, of_b = b, a, of_b, of_a
    summed_last = "".join(sorted(of_a, key=lambda letter: letter not in out))
    if summed_last != of_a:
        a = _row_major(a.transpose([of_a.index(letter) for letter in summed_last]))
    # Where the gradient is transposed, the compiler would merge that into the product, and have no kernel for it.
    return _row_major(_einsum(f"{summed_last},{of_b}->{out}", a, b, dtype))


def _row_major(x: jax.Array) -> jax.Array:
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _forward(
    spec: str, a: jax.Array, b: jax.Array, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array, jax.Array]]:
    # Not ``product``: a policy of ``jax.checkpoint`` sees a product, but not one within a function of its own gradient.
    # Of the arrays themselves only the dtypes are wanted.
    like = (jnp.empty(0, a.dtype), jnp.empty(0, b.dtype))
    return _einsum(spec, a, b, dtype), (a.astype(dtype), b.astype(dtype), *like)


def _backward(
    spec: str,
    dtype: jax.typing.DTypeLike,
    residuals: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    a, b, like_a, like_b = residuals
    terms, out = spec.split("->")
    of_a, of_b = terms.split(",")
    a_cotangent = _gradient(f"{out},{of_b}->{of_a}", cotangent, b, dtype)
    b_cotangent = _gradient(f"{out},{of_a}->{of_b}", cotangent, a, dtype)
    return a_cotangent.astype(like_a.dtype), b_cotangent.astype(like_b.dtype)


product.defvjp(_forward, _backward)
