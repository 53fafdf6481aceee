"""Embeddings by one program per layer, called in turn by the host: for short rows on CPUs.

In a program that loops over stacked layers, XLA's CPU compiler copies every layer's weights out of the stack. Here each
layer's weights are separate arrays, views of the same memory: with the 80M in bfloat16, a batch of 8 rows of 64 tokens
takes a tenth less time, a text of 16 tokens a fifth less. But every call allocates its memory from the system anew: for
rows of 512 to 2,560 tokens, one program for all layers is 5 to 10 % faster.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from f2llm_jax.config import ModelConfig
from f2llm_jax.embedding import AnyBatch, PackedBatch, matryoshka, trims_last_layer
from f2llm_jax.model import Block, Params, RMSNorm, apply, at_positions, rotary_angles
from f2llm_jax.segments import positions
from f2llm_jax.vocabulary import lookup

LONGEST_ROW = 256
"""The longest row to compute layer by layer: at this length both ways are equally fast."""


class Layerwise:
    """``embed`` for the parameters of a model on a CPU, with bit-identical results.

    Attributes:
        config: the sizes.
        dtype: of the operands of matrix products.
        kernel: the attention kernel, one of ``attention.KERNELS``.
    """

    def __init__(self, params: Params, config: ModelConfig, *, dtype: jax.typing.DTypeLike, kernel: str):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.kernel = kernel
        self._table_vd, self._norm = params["embed_tokens"], params["norm"]
        self._layers = [
            jax.tree.map(functools.partial(_view, layer), params["layers"]) for layer in range(config.num_hidden_layers)
        ]

    def __call__(self, batch: AnyBatch, dim: int) -> jax.Array:
        """Dispatches the programs of a batch: float32 unit embeddings [batch, dim]; [batch, texts, dim] if packed."""
        segment_ids_bt = batch.segment_ids_bt
        x_btd, rotary = _first(self._table_vd, batch.tokens_bt, segment_ids_bt, config=self.config)
        last = len(self._layers) - 1 if trims_last_layer(batch) else len(self._layers)
        for weights in self._layers[:last]:
            x_btd = _layer(weights, x_btd, rotary, segment_ids_bt, **self._block)
        for weights in self._layers[last:]:
            x_btd = _layer_of_ends(weights, x_btd, rotary, segment_ids_bt, batch.ends_be, **self._block)
        return _last(self._norm, x_btd, batch, config=self.config, dim=dim)

    @property
    def _block(self) -> dict[str, Any]:
        """The fields of ``Block``."""
        return {"config": self.config, "dtype": self.dtype, "kernel": self.kernel}

    def programs(self, batch: AnyBatch) -> list[str]:
        """The text of the compiled programs of a layer and of one for the ends only: to look up names of a profile."""
        segment_ids_bt = batch.segment_ids_bt
        inputs = _first(self._table_vd, batch.tokens_bt, segment_ids_bt, config=self.config)
        weights = self._layers[-1]
        layer = _layer.lower(weights, *inputs, segment_ids_bt, **self._block)
        of_ends = _layer_of_ends.lower(weights, *inputs, segment_ids_bt, batch.ends_be, **self._block)
        return [lowered.compile().as_text() or "" for lowered in (layer, of_ends)]


def bit_views(params: Params) -> Params:
    """The stacked bfloat16 weights viewed as uint16 arrays, in the same memory: for the single program on CPUs.

    XLA's CPU compiler cannot slice bfloat16 arrays: on every call it would convert the whole stack to float32 before
    the loop over layers, and each layer back.
    """

    def bits(x: jax.Array) -> jax.Array:
        if x.dtype != jnp.bfloat16 or x.ndim < 3:
            return x
        return jax.device_put(np.asarray(x).view(np.uint16), x.sharding)

    return {**params, "layers": jax.tree.map(bits, params["layers"])}


def _view(layer: int, stacked: jax.Array) -> jax.Array:
    return jax.device_put(np.asarray(stacked)[layer], stacked.sharding)


@functools.partial(jax.jit, static_argnames="config")
def _first(
    table_vd: jax.Array, tokens_bt: jax.Array, segment_ids_bt: jax.Array | None, *, config: ModelConfig
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    position_bt = positions(tokens_bt.shape[1], segment_ids_bt)
    rotary = rotary_angles(position_bt, config.head_dim, config.rope_theta)
    return lookup(table_vd, tokens_bt).astype(jnp.float32), rotary


_OF_BLOCK = ("config", "dtype", "kernel")


@functools.partial(jax.jit, static_argnames=_OF_BLOCK, donate_argnums=1)
def _layer(weights: Params, x_btd: jax.Array, rotary: Any, segment_ids_bt: jax.Array | None, **block: Any) -> jax.Array:
    return apply(Block(**block), weights, x_btd, rotary, segment_ids_bt)


@functools.partial(jax.jit, static_argnames=_OF_BLOCK)  # nothing to donate: its result is smaller
def _layer_of_ends(
    weights: Params, x_btd: jax.Array, rotary: Any, segment_ids_bt: jax.Array | None, ends_be: jax.Array, **block: Any
) -> jax.Array:
    return apply(Block(**block), weights, x_btd, rotary, segment_ids_bt, ends_be)


@functools.partial(jax.jit, static_argnames=("config", "dim"))
def _last(norm: Params, x_btd: jax.Array, batch: AnyBatch, *, config: ModelConfig, dim: int) -> jax.Array:
    states_bed = apply(RMSNorm(config.hidden_size, "embed", config.rms_norm_eps), norm, x_btd)
    if not trims_last_layer(batch):
        states_bed = at_positions(states_bed, jnp.asarray(batch.ends_be))
    return matryoshka(states_bed if isinstance(batch, PackedBatch) else states_bed[:, 0], (dim,))[dim]
