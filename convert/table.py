"""The one table between our parameters and Hugging Face's tensors.

A parameter's Hugging Face name is given here; its shape, stacking and axes come from its declaration in ``model.py``.
Weights keep PyTorch's orientation, so a Hugging Face tensor is one layer of our parameter with (heads, head_dim)
written as a single axis: the same bytes under another shape, in both directions.
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax

from f2llm_jax.config import ModelConfig
from f2llm_jax.model import abstract_params

HF_NAMES = {
    "embed_tokens": "embed_tokens.weight",
    "layers.attention.q_proj.weight": "layers.{layer}.self_attn.q_proj.weight",
    "layers.attention.k_proj.weight": "layers.{layer}.self_attn.k_proj.weight",
    "layers.attention.v_proj.weight": "layers.{layer}.self_attn.v_proj.weight",
    "layers.attention.o_proj.weight": "layers.{layer}.self_attn.o_proj.weight",
    "layers.attention.q_norm.weight": "layers.{layer}.self_attn.q_norm.weight",
    "layers.attention.k_norm.weight": "layers.{layer}.self_attn.k_norm.weight",
    "layers.input_norm.weight": "layers.{layer}.input_layernorm.weight",
    "layers.mlp.gate_proj.weight": "layers.{layer}.mlp.gate_proj.weight",
    "layers.mlp.up_proj.weight": "layers.{layer}.mlp.up_proj.weight",
    "layers.mlp.down_proj.weight": "layers.{layer}.mlp.down_proj.weight",
    "layers.mlp_norm.weight": "layers.{layer}.post_attention_layernorm.weight",
    "norm.weight": "norm.weight",
}

PREFIX = "model."
"""Before every name in a checkpoint saved from a causal language model; absent from one of the bare backbone."""

IGNORED = ("lm_head.weight",)
"""Tensors that a checkpoint may have and this model does not: read past, never written."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One parameter and the Hugging Face tensors it is made of.

    Attributes:
        path: where it is in the tree of parameters, joined with dots.
        shape: of the parameter, layers first if it is stacked.
        axes: logical name of each of its axes.
        hf_names: the Hugging Face tensors, one a layer in order, or just one.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    hf_names: tuple[str, ...]

    @property
    def stacked(self) -> bool:
        return self.axes[0] == "layers"

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """The shape of one Hugging Face tensor, its axes still apart."""
        return self.shape[1:] if self.stacked else self.shape

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of one Hugging Face tensor as its file states it."""
        axes = self.axes[1:] if self.stacked else self.axes
        shape: list[int] = []
        for size, axis, before in zip(self.layer_shape, axes, ("", *axes), strict=False):
            if axis == "head_dim" and before in ("heads", "kv_heads"):
                shape[-1] *= size
            else:
                shape.append(size)
        return tuple(shape)

    @property
    def inputs(self) -> int:
        """How many of its last axes a projection sums over; 0 for what is no projection."""
        if not self.stacked or len(self.layer_shape) == 1:
            return 0
        return 2 if self.axes[-1] == "head_dim" else 1

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def tensor_table(config: ModelConfig) -> list[Tensor]:
    """Every parameter of a model of this config, largest first: whoever holds one at a time holds the largest alone."""
    is_box = nn.LogicallyPartitioned
    boxes = jax.tree_util.tree_leaves_with_path(abstract_params(config), is_leaf=lambda x: isinstance(x, is_box))
    tensors = []
    for key_path, box in boxes:
        path = ".".join(key.key for key in key_path)
        layers = range(config.num_hidden_layers) if box.names[0] == "layers" else range(1)
        names = tuple(HF_NAMES[path].format(layer=layer) for layer in layers)
        tensors.append(Tensor(path, box.value.shape, box.names, names))
    return sorted(tensors, key=lambda tensor: -tensor.size)
