"""The Qwen3 decoder as an embedding backbone, in Flax Linen.

Computes what transformers' ``models/qwen3/modeling_qwen3.py`` does. Every parameter is declared here once, with its
shape, initialiser and logical axes; shardings, Hugging Face names and parameter counts derive from that.

Weights keep PyTorch's orientation, outputs before inputs (``q_proj`` is [heads, head_dim, hidden]). A conversion is
then a reshape that moves no bytes, a mesh shards the outputs of a projection as whole rows of the file, and the matrix
units of TPUs and the CPU kernels measured are equally fast with either orientation.

Arithmetic: matrix products take operands in ``dtype`` and accumulate in float32. Everything between them (residual
stream, norms, rotary angles, softmax, activation) is float32, so bfloat16 rounds only what enters a product; on
accelerators, results that only feed another product are rounded too. Projections with int8 weights multiply int8 and
accumulate in int32 (``int8_product``).

Dimensions: b batch, t position, d hidden, n query heads, k key/value heads, h head_dim, f intermediate, l layers,
v vocabulary.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from f2llm_jax.attention import attention
from f2llm_jax.axes import batch_parts, constrain, gather
from f2llm_jax.config import ModelConfig
from f2llm_jax.errors import InputError
from f2llm_jax.products import from_bits, int8_product, product
from f2llm_jax.ragged import ATTENTION_RESULTS
from f2llm_jax.segments import positions
from f2llm_jax.vocabulary import lookup

Params = dict[str, Any]
"""A nested dict of arrays; those under ``layers`` are stacked over the layers on axis 0."""

REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENTION_RESULTS),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What is saved of a layer for the backward pass: everything, the results of projections (and of attention, if the
ragged kernel computes it), or only the layer's input."""

FEW_LAYERS = 16
"""See ``has_few_layers``."""

_tracing = threading.RLock()
"""Held while Flax runs: see ``apply``."""

# The initializer_range of Qwen3's config.json files.
_normal = nn.initializers.normal(stddev=0.02)


class Projection(nn.Module):
    """y = W x: one tensor [*outputs, *inputs], applied to the last axes of its argument.

    An int8 weight, as from ``load(dtype="int8")``, comes with its ``scale`` [*outputs]: see ``int8_product``.

    Attributes:
        outputs, inputs: sizes of the output and input axes, for example (heads, head_dim) and (hidden,).
        axes: their logical names, outputs first.
        dtype: of the operands.
        may_round: see ``product``; False if the result is added to the residual stream.
    """

    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: Any
    may_round: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*self.outputs, *self.inputs)
        weight = self.param("weight", nn.with_logical_partitioning(_normal, self.axes), shape, jnp.float32)
        weight = gather(from_bits(weight, jnp.bfloat16), self.axes)
        batch = x.shape[: x.ndim - len(self.inputs)]
        # As plain matrices: with several output axes, XLA's CPU compiler first copies the weights into another order.
        x_mi = x.reshape(math.prod(batch), math.prod(self.inputs))
        weight_oi = weight.reshape(math.prod(self.outputs), math.prod(self.inputs))
        if weight.dtype == jnp.int8:
            scale = gather(self.get_variable("params", "scale"), self.axes[: len(self.outputs)])
            y = int8_product(x_mi, weight_oi, scale.reshape(-1))
        else:
            y = product("mi,oi->mo", x_mi, weight_oi, self.dtype, self.may_round)
        return y.reshape(*batch, *self.outputs)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last axis, in float32."""

    size: int
    axis: str
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ones = nn.with_logical_partitioning(nn.initializers.ones, (self.axis,))
        weight = self.param("weight", ones, (self.size,), jnp.float32)
        x = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(variance + self.eps) * weight.astype(jnp.float32)


class Attention(nn.Module):
    config: ModelConfig
    dtype: Any
    kernel: str

    @nn.compact
    def __call__(
        self,
        x_btd: jax.Array,
        rotary: tuple[jax.Array, jax.Array],
        segment_ids_bt: jax.Array | None,
        ends_be: jax.Array | None,
    ) -> jax.Array:
        c = self.config
        n, k, h, d = c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.hidden_size
        kv_axes = ("kv_heads", "head_dim", "embed")
        query_btd, query_rotary = x_btd, rotary
        if ends_be is not None:
            query_btd = at_positions(x_btd, ends_be)
            query_rotary = (at_positions(rotary[0], ends_be), at_positions(rotary[1], ends_be))
        q_btnh = Projection((n, h), (d,), ("heads", "head_dim", "embed"), self.dtype, name="q_proj")(query_btd)
        k_btkh = Projection((k, h), (d,), kv_axes, self.dtype, name="k_proj")(x_btd)
        v_btkh = Projection((k, h), (d,), kv_axes, self.dtype, name="v_proj")(x_btd)
        q_btnh = rotate(RMSNorm(h, "head_dim", c.rms_norm_eps, name="q_norm")(q_btnh), query_rotary)
        k_btkh = rotate(RMSNorm(h, "head_dim", c.rms_norm_eps, name="k_norm")(k_btkh), rotary)
        # Scaled before the single rounding to dtype.
        out_btnh = attention(
            (q_btnh * h**-0.5).astype(self.dtype),
            k_btkh.astype(self.dtype),
            v_btkh.astype(self.dtype),
            segment_ids_bt,
            ends_be,
            kernel=self.kernel,
        )
        o_proj = Projection((d,), (n, h), ("embed", "heads", "head_dim"), self.dtype, may_round=False, name="o_proj")
        return o_proj(out_btnh)


class MLP(nn.Module):
    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_btd: jax.Array) -> jax.Array:
        d, f = self.config.hidden_size, self.config.intermediate_size
        gate_btf = Projection((f,), (d,), ("mlp", "embed"), self.dtype, name="gate_proj")(x_btd)
        up_btf = Projection((f,), (d,), ("mlp", "embed"), self.dtype, name="up_proj")(x_btd)
        down_proj = Projection((d,), (f,), ("embed", "mlp"), self.dtype, may_round=False, name="down_proj")
        return down_proj(nn.silu(gate_btf.astype(jnp.float32)) * up_btf)


class Block(nn.Module):
    """One decoder layer; returns the residual stream after it.

    With ``ends_be``, only at those positions, [b, e, d]: the others contribute only keys and values.
    """

    config: ModelConfig
    dtype: Any
    kernel: str

    @nn.compact
    def __call__(
        self,
        x_btd: jax.Array,
        rotary: tuple[jax.Array, jax.Array],
        segment_ids_bt: jax.Array | None,
        ends_be: jax.Array | None = None,
    ) -> jax.Array:
        c = self.config
        normed_btd = RMSNorm(c.hidden_size, "embed", c.rms_norm_eps, name="input_norm")(x_btd)
        attention = Attention(c, self.dtype, self.kernel, name="attention")
        attended_btd = attention(normed_btd, rotary, segment_ids_bt, ends_be)
        x_btd = (x_btd if ends_be is None else at_positions(x_btd, ends_be)) + attended_btd
        normed_btd = RMSNorm(c.hidden_size, "embed", c.rms_norm_eps, name="mlp_norm")(x_btd)
        x_btd = x_btd + MLP(c, self.dtype, name="mlp")(normed_btd)
        return constrain(x_btd, "batch", "length", "embed")


class Backbone(nn.Module):
    """Token ids to final-norm hidden states.

    Attributes:
        config: the sizes.
        dtype: of the operands of matrix products.
        kernel: the attention kernel, one of ``attention.KERNELS``; "auto" for the platform's.
        remat: what the backward pass recomputes, see ``REMAT_POLICIES``.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    kernel: str = "auto"
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        tokens_bt: jax.Array,
        segment_ids_bt: jax.Array | None = None,
        ends_be: jax.Array | None = None,
    ) -> jax.Array:
        """Runs the decoder.

        Args:
            tokens_bt: int32 [batch, length] token ids; rows are padded on the right.
            segment_ids_bt: int32 [batch, length], which text each token belongs to, see ``segments``; None for rows of
                one text each.
            ends_be: int32 [batch, ends], the positions whose states are wanted; None for all. The last layer then skips
                what only other positions need; under a gradient, only if the model ``has_few_layers``.

        Returns:
            float32 [batch, length, hidden] final-norm states, or [batch, ends, hidden]. Flax's
            ``capture_intermediates`` gives the states after each layer, as those of ``Block``.

        Raises:
            InputError: the parameters and the config differ in the number of layers.
        """
        c = self.config
        table = nn.with_logical_partitioning(_normal, ("vocab", "embed"))
        table_vd = self.param("embed_tokens", table, (c.vocab_size, c.hidden_size), jnp.float32)
        if not self.is_initializing():
            check_layers(self.variables["params"], c)
        x_btd = lookup(table_vd, tokens_bt).astype(jnp.float32)
        rotary = rotary_angles(positions(tokens_bt.shape[1], segment_ids_bt), c.head_dim, c.rope_theta)
        norm = RMSNorm(c.hidden_size, "embed", c.rms_norm_eps, name="norm")
        if ends_be is not None:
            plain = functools.partial(apply, Block(c, self.dtype, self.kernel, parent=None))
            # CSE may merge the recomputation of the last layer with its forward pass: except for keys and values, it
            # covers few positions.
            layer = jax.checkpoint(plain, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
            weights = self.variables["params"]["layers"]
            return norm(_through_layers(layer, weights, x_btd, rotary, segment_ids_bt, ends_be))
        # Within a scan nothing can be merged with the forward pass anyway: prevent_cse would only add cost.
        block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        through_layers = nn.scan(
            lambda block, x_btd, *others: (block(x_btd, *others), None),
            variable_axes={"params": 0, "intermediates": 0},  # the latter for inspection, as in train/prune.py
            split_rngs={"params": True},
            in_axes=(nn.broadcast,) * 2,
            length=c.num_hidden_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x_btd, _ = through_layers(block(c, self.dtype, self.kernel, name="layers"), x_btd, rotary, segment_ids_bt)
        return norm(x_btd)


def check_layers(params: Params, config: ModelConfig) -> None:
    """Raises an InputError if the parameters and the config differ in the number of layers."""
    found = jax.tree.leaves(params["layers"])[0].shape[0]
    if found != config.num_hidden_layers:
        raise InputError(f"the parameters are of {found} layers, the config of {config.num_hidden_layers}")


def _through_layers(
    layer: Callable[..., jax.Array],
    weights: Params,
    x_btd: jax.Array,
    rotary: tuple[jax.Array, jax.Array],
    segment_ids_bt: jax.Array | None,
    ends_be: jax.Array,
) -> jax.Array:
    """The residual stream at ``ends_be``, [batch, ends, hidden]; the last layer computes only those positions.

    Without a gradient, each layer's weights are read in place. With one, that would add the gradient of a layer to a
    whole stack in every iteration, so the loop runs over a copy without the last layer or, unless the model
    ``has_few_layers``, over the whole stack, with the last layer computing all positions like the others.
    """
    count = jax.tree.leaves(weights)[0].shape[0] - 1
    few = has_few_layers(count + 1)

    @jax.custom_vjp
    def run(weights: Params, x_btd: jax.Array, *inputs: Any) -> jax.Array:
        *others, ends_be = inputs

        def at(n: Any) -> Params:
            return jax.tree.map(lambda stack: jax.lax.dynamic_index_in_dim(stack, n, keepdims=False), weights)

        x_btd = jax.lax.fori_loop(0, count, lambda n, x_btd: layer(at(n), x_btd, *others), x_btd)
        return layer(at(count), x_btd, *others, ends_be)

    def forward(weights: Params, x_btd: jax.Array, *inputs: Any) -> tuple[jax.Array, Any]:
        *others, ends_be = inputs

        def through(stack: Params, x_btd: jax.Array) -> jax.Array:
            return jax.lax.scan(lambda x_btd, own: (layer(own, x_btd, *others), None), x_btd, stack)[0]

        def through_last(first: Params, last: Params, x_btd: jax.Array) -> jax.Array:
            return layer(last, through(first, x_btd), *others, ends_be)

        if not few:
            return jax.vjp(lambda weights, x_btd: at_positions(through(weights, x_btd), ends_be), weights, x_btd)
        first, last = (jax.tree.map(lambda stack, part=part: stack[part], weights) for part in (slice(count), count))
        return jax.vjp(through_last, first, last, x_btd)

    def backward(pull: Any, cotangent_bed: jax.Array) -> tuple[Any, ...]:
        *d_weights, d_x_btd = pull(cotangent_bed)
        if few:
            d_weights = [jax.tree.map(lambda first, last: jnp.concatenate([first, last[None]]), *d_weights)]
        return *d_weights, d_x_btd, None, None, None

    run.defvjp(forward, backward)
    # Jitted for callers outside ``jax.jit``: operation by operation, a layer is about a hundred programs to compile.
    return jax.jit(run)(weights, x_btd, rotary, segment_ids_bt, ends_be)


def has_few_layers(layers: int) -> bool:
    """Whether training computes the last layer at the texts' ends only, which requires a copy of the other weights.

    With 8 layers (the 80M) this saves a tenth of the work for 110 MB in float32; with 28 (the 0.6B), a thirtieth for
    1.7 GB.
    """
    return layers <= FEW_LAYERS


def at_positions(x_bt: jax.Array, position_be: jax.Array) -> jax.Array:
    """Gathers some positions of each row: from [batch, length, ...] or [1, length, ...] to [batch, e, ...]."""
    index_be = position_be.reshape(*position_be.shape, *(1,) * (x_bt.ndim - 2))
    return jnp.take_along_axis(x_bt, index_be, axis=1)


def apply(module: nn.Module, params: Params, *args: Any, **options: Any) -> Any:
    """``module.apply``, by one thread at a time.

    JAX traces a program in the thread that first calls it, and Flax, while it derives a class (``nn.remat``,
    ``nn.scan``), removes fields from the class that it derives from: another thread would find them missing.
    """
    with _tracing:
        return module.apply({"params": params}, *args, **options)


def rotary_angles(position_bt: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and signed sines of the rotary positions, for ``rotate``.

    In float32 throughout: bfloat16 rounds position 257 to 256, and sin(257) is not sin(256).

    Returns:
        float32 [batch, length, 1, 1, head_dim / 2] and [batch, length, 1, 2, head_dim / 2].
    """
    frequency_h = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle_bth = position_bt.astype(jnp.float32)[..., None] * frequency_h
    sin_bth = jnp.sin(angle_bth)
    return jnp.cos(angle_bth)[:, :, None, None], jnp.stack([-sin_bth, sin_bth], axis=2)[:, :, None]


def rotate(x_btnh: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (i, i + head_dim / 2) of every head by the angle of their position.

    The halves are swapped by reversing an axis of size two: one pass over memory, where a concatenation takes three.
    """
    cos, sin = rotary
    x_btn2h = x_btnh.reshape(*x_btnh.shape[:-1], 2, -1)
    return (x_btn2h * cos + jnp.flip(x_btn2h, axis=-2) * sin).reshape(x_btnh.shape)


def abstract_params(config: ModelConfig) -> Params:
    """Shapes and logical axes of every parameter, without allocating any.

    Returns:
        A tree of ``nn.LogicallyPartitioned`` boxes around ``jax.ShapeDtypeStruct``; ``box.names`` are the logical axes.
        This is the single source of shapes, shardings and names. It does not depend on the mesh that is set.
    """
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        return jax.eval_shape(lambda: _init(config, jax.random.key(0)))


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Random float32 parameters: weights from normal(0, 0.02), norms one.

    Args:
        config: the sizes.
        key: a ``jax.random.key``.
    """
    return nn.unbox(_init(config, key))


def _init(config: ModelConfig, key: jax.Array) -> Params:
    """Boxed parameters. The contents of the dummy batch do not matter, but its rows must divide over the mesh."""
    with _tracing:
        return Backbone(config, kernel="reference").init(key, jnp.zeros((batch_parts(), 8), jnp.int32))["params"]


def count_parameters(config: ModelConfig) -> int:
    """The number of parameters, from shapes alone."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))
