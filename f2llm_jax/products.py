"""Matrix products: operands in the dtype of the model, float32 accumulation, in the forward and the backward pass.

Products with int8 weights, further down, accumulate in int32 and have no gradient.

JAX's own gradient of a product of bfloat16 operands with float32 accumulation multiplies the float32 cotangent by a
bfloat16 operand, which hardware does at the speed of float32. Here the cotangent is rounded like any other operand.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from f2llm_jax.axes import platform


def matmul_precision(dtype: jax.typing.DTypeLike) -> jax.lax.Precision:
    """float32 means float32: without this, a TPU multiplies float32 matrices in bfloat16."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else jax.lax.Precision.DEFAULT


# The L2 cache of a core with AMX. Other CPUs were not measured.
_CACHE_BYTES = 2 << 20


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def product(spec: str, a: jax.Array, b: jax.Array, dtype: jax.typing.DTypeLike, may_round: bool = False) -> jax.Array:
    """An einsum of two arrays, which are cast to ``dtype``; float32, unless the result is rounded.

    Args:
        spec: such as ``mi,oi->mo``: every letter occurs in two or all of the three terms, once in each; each operand
            has a letter that the other lacks, and at least one letter is summed over.
        a, b: of any float dtype; their gradients have the same.
        dtype: the dtype of the operands, here and in the gradient.
        may_round: the result only feeds another product, so it may be rounded to ``dtype``. On accelerators it is: they
            still accumulate in float32, but write half the bytes, and what comes before the next product reads half. On
            CPUs it is not: XLA would convert the operands of a product with such a result to float32.
    """
    return einsum(spec, a, b, dtype, may_round)


def einsum(spec: str, a: jax.Array, b: jax.Array, dtype: jax.typing.DTypeLike, may_round: bool = False) -> jax.Array:
    """``product``, without its custom gradient."""
    a, b = a.astype(dtype), b.astype(dtype)
    if jnp.dtype(dtype) == jnp.bfloat16 and _on_one_cpu():
        return _matrices(spec, a, b)
    out = dtype if may_round and platform() != "cpu" else jnp.float32
    return jnp.einsum(spec, a, b, precision=matmul_precision(dtype), preferred_element_type=out)


def _on_one_cpu() -> bool:
    """Whether arrays are whole on a CPU: over several devices, axes carry the sharding, and none are merged or moved.

    Under ``shard_map`` over the whole mesh, every device has arrays of its own.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return platform() == "cpu" and (mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual)


def _matrices(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """The einsum as plain matrix products, one for each combination of the letters that all three terms share.

    XLA's CPU compiler multiplies bfloat16 operands in bfloat16 only if they are laid out as matrices. It folds a
    transposition before a product into the product, and multiplies the result in float32: 33 ms for the gradient of a
    projection of 2048 x 320 from 4,096 rows on two cores with AMX, where a copy in the other order and the fast product
    take 12 ms. The explicit layouts and the merged axes prevent this.
    """
    terms, out = spec.split("->")
    of_a, of_b = terms.split(",")
    size = dict(zip(of_a + of_b, a.shape + b.shape, strict=True))
    shared = [letter for letter in of_a if letter in of_b and letter in out]
    summed = [letter for letter in of_a if letter in of_b and letter not in out]
    rows = [letter for letter in of_a if letter not in of_b]
    columns = [letter for letter in of_b if letter not in of_a]

    def matrices(x: jax.Array, letters: str, *groups: list[str]) -> jax.Array:
        order = [letters.index(letter) for group in groups for letter in group]
        if order != sorted(order):
            x = _row_major(x.transpose(order))
        return x.reshape([math.prod(size[letter] for letter in group) for group in groups if group])

    # A product reads its second operand in either orientation, so that is left as it is.
    columns_first = of_b.index(columns[0]) < of_b.index(summed[0])
    b = matrices(b, of_b, shared, *((columns, summed) if columns_first else (summed, columns)))
    batch = (0,) if shared else ()
    y = jnp.concatenate(
        [
            jax.lax.dot_general(
                part,
                b,
                (((len(batch) + 1,), (len(batch) + columns_first,)), (batch, batch)),
                preferred_element_type=jnp.float32,
            )
            for part in _within_cache(matrices(a, of_a, shared, rows, summed), math.prod(size[n] for n in columns))
        ]
    )
    letters = [*shared, *rows, *columns]
    return y.reshape([size[letter] for letter in letters]).transpose([letters.index(letter) for letter in out])


def _within_cache(a: jax.Array, columns: int) -> list[jax.Array]:
    """The first operand of a product, split in halves if a half fits in the cache and the whole does not.

    A product reads the whole operand for every 32 columns of the result. If the result is wider than the operand,
    joining two results costs more than is gained; for larger operands, splitting in four parts or more gains nothing.
    """
    halves = a.ndim == 2 and _CACHE_BYTES < a.nbytes <= 2 * _CACHE_BYTES and columns < a.shape[1]
    return jnp.array_split(a, 2) if halves else [a]


def _row_major(x: jax.Array) -> jax.Array:
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _forward(
    spec: str, a: jax.Array, b: jax.Array, dtype: jax.typing.DTypeLike, may_round: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array, jax.Array]]:
    # Not ``product``: a policy of ``jax.checkpoint`` sees a plain product, but not one inside a function with a custom
    # gradient. Of the arrays themselves only the dtypes are needed.
    like = (jnp.empty(0, a.dtype), jnp.empty(0, b.dtype))
    return einsum(spec, a, b, dtype, may_round), (a.astype(dtype), b.astype(dtype), *like)


def _backward(
    spec: str,
    dtype: jax.typing.DTypeLike,
    may_round: bool,
    residuals: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    a, b, like_a, like_b = residuals
    terms, out = spec.split("->")
    of_a, of_b = terms.split(",")
    a_cotangent = _gradient(f"{out},{of_b}->{of_a}", cotangent, b, dtype)
    b_cotangent = _gradient(f"{out},{of_a}->{of_b}", cotangent, a, dtype)
    return a_cotangent.astype(like_a.dtype), b_cotangent.astype(like_b.dtype)


def _gradient(spec: str, cotangent: jax.Array, other: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The einsum, its operands swapped if the first unshared axis of the result does not come from the first one."""
    terms, out = spec.split("->")
    of_a, of_b = terms.split(",")
    first = next(letter for letter in out if (letter in of_a) != (letter in of_b))
    if first in of_b:
        cotangent, other, of_a, of_b = other, cotangent, of_b, of_a
    if not _on_one_cpu():
        return einsum(f"{of_a},{of_b}->{out}", cotangent, other, dtype)
    # A transposition of the gradient would be folded into the product, for which there would then be no kernel at all.
    if (
        len(of_a) == len(of_b) == 2
        and of_a[1] == first
        and other.size + other.shape[1] * cotangent.shape[1] < cotangent.size
    ):
        # The first operand is summed over its rows, so its transpose is needed; swapping the operands moves less here.
        return _row_major(_row_major(einsum(f"{of_b},{of_a}->{out[::-1]}", other, cotangent, dtype)).T)
    return _row_major(einsum(f"{of_a},{of_b}->{out}", cotangent, other, dtype))


product.defvjp(_forward, _backward)


def int8_rows(x: jax.Array, summed: int) -> tuple[jax.Array, jax.Array]:
    """Rounds to int8: 255 levels, symmetric around 0, with a step for each row.

    Args:
        x: of any float dtype.
        summed: number of trailing axes that form a row: those that a product sums over.

    Returns:
        int8 like x, and the float32 scale of each row; x is approximately their product.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=tuple(range(-summed, 0)), keepdims=True)
    scale = jnp.where(largest == 0, 1, largest) / 127
    return jnp.round(x / scale).astype(jnp.int8), scale.reshape(x.shape[: x.ndim - summed])


def int8_product(x_mi: jax.Array, weight_oi: jax.Array, scale_o: jax.Array) -> jax.Array:
    """x · weightᵀ in int8: float32 [m, o].

    Every row of x is rounded by ``int8_rows``, independently of the others; the integer sums are exact. There is no
    gradient.

    Args:
        x_mi: of any float dtype.
        weight_oi: int8.
        scale_o: float32, the scale of each row of the weight.
    """
    x_mi, scale_m = int8_rows(x_mi, 1)
    sum_mo = jnp.einsum("mi,oi->mo", x_mi, weight_oi, preferred_element_type=jnp.int32)
    return sum_mo.astype(jnp.float32) * scale_m[:, None] * scale_o


def to_bits(x: jax.Array) -> jax.Array:
    """A bfloat16 array as uint16 of the same bits, others unchanged: for what a loop over layers saves of each layer.

    XLA's CPU compiler cannot slice bfloat16 arrays: it would convert the whole stack to float32 and back for every
    layer.
    """
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def from_bits(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The inverse of ``to_bits``."""
    return jax.lax.bitcast_convert_type(x, dtype) if x.dtype == jnp.uint16 else x
