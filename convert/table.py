"""The one table that maps our parameters to Hugging Face tensors.

It has the Hugging Face name of each parameter; shape, stacking and axes come from the declaration in ``model.py``.
Weights keep PyTorch's orientation, so a Hugging Face tensor is one layer of our parameter with (heads, head_dim) merged
into one axis: the same bytes with another shape, in both directions.
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
"""Prefix of every name in a checkpoint of a causal language model; a checkpoint of the bare backbone has none."""

IGNORED = ("lm_head.weight",)
"""Tensors that a checkpoint may have but this model does not: skipped when reading, never written."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One parameter and the Hugging Face tensors that it is made of.

    Attributes:
        path: its path in the parameter tree, joined with dots.
        shape: shape of the parameter, with the layers first if it is stacked.
        axes: logical name of each axis.
        hf_names: names of the Hugging Face tensors, one per layer in order, or just one.
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
        """The shape of one Hugging Face tensor, with (heads, head_dim) as separate axes."""
        return self.shape[1:] if self.stacked else self.shape

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of one Hugging Face tensor, as stated in its file."""
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
        """How many of the last axes a projection sums over; 0 if it is not a projection."""
        if not self.stacked or len(self.layer_shape) == 1:
            return 0
        return 2 if self.axes[-1] == "head_dim" else 1

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def tensor_table(config: ModelConfig) -> list[Tensor]:
    """All parameters of a model of this config, largest first: loaded in turn, the largest has the most free memory."""
    is_box = nn.LogicallyPartitioned
    boxes = jax.tree_util.tree_leaves_with_path(abstract_params(config), is_leaf=lambda x: isinstance(x, is_box))
    tensors = []
    for key_path, box in boxes:
        path = ".".join(key.key for key in key_path)
        layers = range(config.num_hidden_layers) if box.names[0] == "layers" else range(1)
        names = tuple(HF_NAMES[path].format(layer=layer) for layer in layers)
        tensors.append(Tensor(path, box.value.shape, box.names, names))
    return sorted(tensors, key=lambda tensor: -tensor.size)
