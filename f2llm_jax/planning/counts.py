"""FLOPs, bytes and memory of encoding and training, counted from a model's sizes before anything is compiled.

FLOPs are exact for the matrix products. Memory traffic, ICI traffic and memory are estimates: they rank meshes, and are
reported beside the figures of the compiled program. Dimensions: d hidden, n query heads, k key/value heads, h head_dim,
f intermediate; all numbers are per device unless stated otherwise.

``itemsize`` is the size of the operands of projections. With int8, everything else is bfloat16.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import NamedTuple

from f2llm_jax.config import ModelConfig
from f2llm_jax.embedding import ends_are_few
from f2llm_jax.losses import matryoshka_weights
from f2llm_jax.model import has_few_layers
from f2llm_jax.planning.chips import Chip, Topology

FLOAT32 = 4


class Axes(NamedTuple):
    """Sizes of a mesh."""

    data: int
    fsdp: int
    tensor: int

    @property
    def size(self) -> int:
        return self.data * self.fsdp * self.tensor

    @property
    def batch_parts(self) -> int:
        return self.data * self.fsdp

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in zip(self._fields, self, strict=True) if size > 1) or "data=1"


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of a step on one device.

    Attributes:
        projections: products with weights.
        attention: attention scores and weighted sums, causal half only; in backward passes as the kernel computes them.
        end_attention: attention of a few queries over whole rows, which are plain products with any kernel.
        loss: cosines of a training step.
    """

    projections: float
    attention: float
    end_attention: float = 0.0
    loss: float = 0.0

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))

    def seconds(self, chip: Chip, itemsize: int) -> float:
        """Time at the chip's peak rates."""
        others = self.total - self.projections
        return self.projections / chip.rate(itemsize) + others / chip.rate(value_size(itemsize))

    def __add__(self, other: Flops) -> Flops:
        return Flops(*map(sum, zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __truediv__(self, devices: int) -> Flops:
        return Flops(*(flops / devices for flops in dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The cost of a step on one device, from these counts only.

    Attributes:
        flops: see ``Flops``.
        hbm_bytes: bytes read from and written to HBM.
        ici_bytes: bytes received from other devices.
        memory_bytes: peak memory.
    """

    flops: Flops
    hbm_bytes: float
    ici_bytes: float
    memory_bytes: float

    def seconds(self, topology: Topology, itemsize: int) -> tuple[float, float, float]:
        """Seconds of compute, HBM and ICI, if the operands of projections have ``itemsize`` bytes."""
        chip = topology.chip
        everywhere = topology.ici_bandwidth(itertools.product(*map(range, topology.shape)))
        return (
            self.flops.seconds(chip, itemsize),
            self.hbm_bytes / chip.hbm_bandwidth,
            self.ici_bytes / everywhere,
        )


def value_size(itemsize: int) -> int:
    """Bytes per value of everything but operands of projections."""
    return max(itemsize, 2)


def layer_weights(config: ModelConfig) -> int:
    """Elements of the projections of one layer."""
    d, f, h = config.hidden_size, config.intermediate_size, config.head_dim
    return d * h * 2 * (config.num_attention_heads + config.num_key_value_heads) + 3 * d * f


def key_value_weights(config: ModelConfig) -> int:
    """The part of ``layer_weights`` that projects to keys and values."""
    return config.hidden_size * config.head_dim * 2 * config.num_key_value_heads


def parameters(config: ModelConfig) -> int:
    """Elements of the embedding table and the projections; norm weights are negligible."""
    return config.vocab_size * config.hidden_size + config.num_hidden_layers * layer_weights(config)


def parameter_bytes(config: ModelConfig, itemsize: int) -> int:
    """Bytes of ``parameters``."""
    layers = config.num_hidden_layers * layer_weights(config)
    return value_size(itemsize) * (parameters(config) - layers) + itemsize * layers


def forward_flops(config: ModelConfig, texts: int, length: int) -> Flops:
    """Forward pass over ``texts`` texts of ``length`` tokens, on all devices together."""
    return flops_of_lengths(config, texts * length, texts * length**2)


def forward_flops_of_ends(config: ModelConfig, rows: int, length: int, slots: int) -> Flops:
    """``forward_flops`` if only the last states of texts are needed, at most ``slots`` per row.

    If ``ends_are_few``, the last layer computes nothing else, except keys and values.
    """
    whole, layers = forward_flops(config, rows, length), config.num_hidden_layers
    if not ends_are_few(slots, rows, length):
        return whole
    spared = 2.0 * (layer_weights(config) - key_value_weights(config)) * rows * (length - slots)
    return Flops(
        projections=whole.projections - spared,
        attention=whole.attention * (layers - 1) / layers,
        end_attention=4.0 * config.num_attention_heads * config.head_dim * rows * slots * length,
    )


def flops_of_lengths(config: ModelConfig, tokens: int, squares: int) -> Flops:
    """Forward pass over texts with ``tokens`` tokens in total, whose squared lengths sum to ``squares``."""
    heads = config.num_attention_heads * config.head_dim
    layers = config.num_hidden_layers
    return Flops(
        projections=2.0 * layer_weights(config) * layers * tokens,
        # q · k and weights · v, for each of the length · (length + 1) / 2 pairs that the causal mask leaves.
        attention=2.0 * heads * layers * (squares + tokens),
    )


@dataclasses.dataclass(frozen=True)
class Passes:
    """How often a training step runs each part of the layers.

    Attributes:
        projections: forward passes over the projections; a backward pass counts as two.
        attention: forward passes over attention; a backward pass counts as ``ATTENTION_BACKWARD`` of the kernel.
        end_attention: the same for the few queries of the last layer, which are computed without a kernel.
    """

    projections: float
    attention: float
    end_attention: float


ATTENTION_BACKWARD = {"reference": 2.0, "ragged": 2.5, "blocked": 3.0, "splash": 3.5}
"""Products of a backward pass over products of a forward pass. Autodiff keeps the attention weights: 4 to 2. Flash
kernels recompute the scores, splash in both of its kernels (dq: 3 products, dk and dv: 4). Blocked recomputes a whole
forward pass."""


def training_passes(config: ModelConfig, *, cached: bool, remat: str, kernel: str) -> Passes:
    """Passes of a step; GradCache adds a forward pass, and remat adds a part of one within the backward pass.

    A rematerialised layer omits its last projection, as no gradient needs the result.
    """
    last = config.hidden_size * config.intermediate_size / layer_weights(config)
    again_projections, again_attention = {
        "none": (0.0, 0.0),
        "dots": (0.0, float(kernel != "ragged")),
        "full": (1.0 - last, 1.0),
    }[remat]
    forward = 2.0 if cached else 1.0
    return Passes(
        projections=forward + again_projections + 2.0,
        attention=forward + again_attention + ATTENTION_BACKWARD[kernel],
        end_attention=forward + float(remat != "none") + ATTENTION_BACKWARD["reference"],
    )


def layers_flops(config: ModelConfig, work: TrainWork, passes: Passes) -> Flops:
    """FLOPs of the layers in a training step, on all devices together."""
    whole = forward_flops(config, work.rows, work.length)
    of_ends = forward_flops_of_ends(config, work.rows, work.length, work.slots)
    few = has_few_layers(config.num_hidden_layers)
    forward = of_ends if few else whole
    cached = float(work.chunk_rows > 0)
    projections = cached * of_ends.projections + 3.0 * forward.projections
    if work.remat == "full":
        projections += forward.projections - layers_spared_again(config, work, alone=few and of_ends != whole)
    return Flops(
        projections,
        cached * of_ends.attention + (passes.attention - cached) * forward.attention,
        cached * of_ends.end_attention + (passes.end_attention - cached) * forward.end_attention,
    )


def layers_spared_again(config: ModelConfig, work: TrainWork, *, alone: bool) -> float:
    """FLOPs of projections that are not rematerialised: the last of each layer, as no gradient needs the result.

    If the last layer is computed ``alone``, and not in a loop over chunks, the compiler also reuses its keys and values
    from the forward pass.
    """
    tokens, last_tokens = work.rows * work.length, work.rows * (work.slots if alone else work.length)
    positions = (config.num_hidden_layers - 1) * tokens + last_tokens
    spared = 2.0 * config.hidden_size * config.intermediate_size * positions
    if alone and not work.chunk_rows:
        spared += 2.0 * key_value_weights(config) * tokens
    return spared


def loss_flops(hidden: int, queries: int, negatives: int, mrl_dims: tuple[int, ...]) -> float:
    """Cosines of each query with its passage and negatives and with all passages; the backward pass counts twice."""
    dims = sum(matryoshka_weights(hidden, mrl_dims))
    return 3 * 2.0 * dims * queries * (1 + negatives + queries)


def layer_traffic(config: ModelConfig, tokens: float, tensor: int, itemsize: int) -> float:
    """HBM bytes of a layer's forward pass: reads and writes of its products and of the operations fused with them."""
    weights = itemsize * layer_weights(config) / tensor
    itemsize = value_size(itemsize)
    d, f = config.hidden_size, config.intermediate_size / tensor
    q = config.num_attention_heads * config.head_dim / tensor
    kv = config.num_key_value_heads * config.head_dim / tensor
    attention = (
        (FLOAT32 + itemsize) * d  # norm
        + 3 * itemsize * d + itemsize * (q + 2 * kv)  # projections
        + 2 * itemsize * (q + 2 * kv)  # norm and rotation of the heads
        + itemsize * (q + 2 * kv) + itemsize * q  # kernel
        + itemsize * q + 2 * FLOAT32 * d  # output projection and residual
    )  # fmt: skip
    mlp = (
        (FLOAT32 + itemsize) * d
        + 2 * itemsize * d + 3 * itemsize * f  # gate and up
        + itemsize * f + 2 * FLOAT32 * d  # down projection and residual
    )  # fmt: skip
    return tokens * (attention + mlp) + weights


def layer_exchange(config: ModelConfig, tokens: float, axes: Axes, itemsize: int) -> tuple[float, float]:
    """ICI bytes of a layer's forward pass: all-gather of weights over fsdp, all-reduce of both results over tensor."""
    gather = (axes.fsdp - 1) / axes.fsdp * itemsize * layer_weights(config) / axes.tensor
    reduce = 2 * 2 * (axes.tensor - 1) / axes.tensor * FLOAT32 * config.hidden_size * tokens
    return gather, reduce


def working_set(config: ModelConfig, tokens: float, tensor: int, itemsize: int) -> float:
    """Bytes alive at once inside a layer: the residual stream and the widest intermediate results."""
    itemsize = value_size(itemsize)
    d, f = config.hidden_size, config.intermediate_size / tensor
    heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim / tensor
    return tokens * (2 * FLOAT32 * d + itemsize * d + max((FLOAT32 + 2 * itemsize) * f, (2 * FLOAT32) * heads))


def estimate_encode(config: ModelConfig, axes: Axes, *, rows: int, length: int, slots: int, itemsize: int) -> Estimate:
    """Cost of encoding rows of ``length`` tokens, with ``slots`` text slots per row, on a mesh."""
    tokens, layers = rows * length / axes.batch_parts, config.num_hidden_layers
    flops = forward_flops_of_ends(config, rows, length, slots)
    gather, reduce = layer_exchange(config, tokens, axes, itemsize)
    lookup = (axes.tensor > 1) * 2 * FLOAT32 * config.hidden_size * tokens
    gathered = 2 * itemsize * layer_weights(config) / axes.tensor if axes.fsdp > 1 else 0
    return Estimate(
        flops=flops / axes.size,
        hbm_bytes=layers * layer_traffic(config, tokens, axes.tensor, itemsize),
        ici_bytes=layers * (gather + reduce) + lookup,
        memory_bytes=parameter_bytes(config, itemsize) / (axes.fsdp * axes.tensor)
        + gathered
        + working_set(config, tokens, axes.tensor, itemsize),
    )


@dataclasses.dataclass(frozen=True)
class TrainWork:
    """The work of a training step.

    Attributes:
        queries: queries in the global batch.
        negatives: negatives per query.
        runs: rows in each run of the model: queries and documents, or everything packed.
        length: tokens per row.
        slots: text slots per row.
        chunk_rows: rows computed at a time with GradCache; 0 for all at once, without it.
        remat: see ``model.REMAT_POLICIES``.
        kernel: the attention kernel.
        mrl_dims: Matryoshka sizes of the losses.
        itemsize: bytes per operand.
        param_itemsize: bytes per parameter, and of each of its two moments.
    """

    queries: int
    negatives: int
    runs: tuple[int, ...]
    length: int
    slots: int
    chunk_rows: int
    remat: str
    kernel: str
    mrl_dims: tuple[int, ...]
    itemsize: int
    param_itemsize: int

    @property
    def rows(self) -> int:
        return sum(self.runs)

    @property
    def chunks(self) -> int:
        """Number of runs of the model, each over a part of the batch."""
        if not self.chunk_rows:
            return len(self.runs)
        return sum(math.ceil(rows / self.chunk_rows) for rows in self.runs)

    @property
    def rows_at_once(self) -> int:
        return min(self.chunk_rows, max(self.runs)) if self.chunk_rows else self.rows


def estimate_train(config: ModelConfig, axes: Axes, work: TrainWork, teacher: ModelConfig | None = None) -> Estimate:
    """Cost of a training step on a mesh."""
    layers, shards = config.num_hidden_layers, axes.fsdp * axes.tensor
    tokens = work.rows * work.length / axes.batch_parts
    passes = training_passes(config, cached=bool(work.chunk_rows), remat=work.remat, kernel=work.kernel)
    loss = loss_flops(config.hidden_size, work.queries, work.negatives, work.mrl_dims)
    flops = dataclasses.replace(layers_flops(config, work, passes), loss=loss) / axes.size
    weights_chip = parameters(config) / shards
    runs = work.chunks / (work.rows / work.rows_at_once) if work.chunk_rows else 1.0
    gather, reduce = layer_exchange(config, tokens / work.chunks, axes, work.itemsize)
    # A backward pass reduces the gradients of the weights: reduce-scatter over fsdp, then all-reduce over the replicas.
    gradients = FLOAT32 * layer_weights(config) / axes.tensor
    gradients = gradients * ((axes.fsdp - 1) / axes.fsdp + 2 * (axes.data - 1) / axes.data / axes.fsdp)
    gathers = passes.projections - 1.0  # a backward pass gathers weights once for both of its products
    hbm_bytes = passes.projections * layers * layer_traffic(config, tokens, axes.tensor, work.itemsize) * runs
    # The gradients of each chunk are added to a float32 sum; the optimizer reads and writes parameters and moments.
    hbm_bytes += weights_chip * (work.chunks * 3 * FLOAT32 + 6 * work.param_itemsize + 2 * FLOAT32)
    chunk_tokens = work.rows_at_once * work.length / axes.batch_parts
    kept = {"none": 5.0, "dots": 4.0, "full": 1.0}[work.remat] * FLOAT32 * config.hidden_size * chunk_tokens * layers
    memory = (
        weights_chip * (3 * work.param_itemsize + 2 * FLOAT32)
        + kept
        + 2.5 * working_set(config, chunk_tokens, axes.tensor, work.itemsize)
        + (2 * FLOAT32 + work.itemsize) * layer_weights(config) / axes.tensor * (axes.fsdp > 1)
    )
    if has_few_layers(layers):  # the copy of all layers but the last
        memory += work.param_itemsize * (layers - 1) * layer_weights(config) / shards
    estimate = Estimate(
        flops=flops,
        hbm_bytes=hbm_bytes,
        ici_bytes=layers * work.chunks * (gathers * gather + (passes.projections - 1.0) * reduce + gradients),
        memory_bytes=memory,
    )
    if teacher is None:
        return estimate
    taught = estimate_encode(
        teacher, axes, rows=work.rows, length=work.length, slots=work.slots, itemsize=work.itemsize
    )
    return Estimate(
        flops=estimate.flops + taught.flops,
        hbm_bytes=estimate.hbm_bytes + taught.hbm_bytes,
        ici_bytes=estimate.ici_bytes + taught.ici_bytes,
        memory_bytes=estimate.memory_bytes + work.itemsize * parameters(teacher) / shards,
    )
