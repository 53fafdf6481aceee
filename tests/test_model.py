"""The backbone against ``transformers.Qwen3Model``, on random weights."""

from __future__ import annotations

import dataclasses
import gc
import re
from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compilation import jit_as_users
from releases import TINY, params_of, torch_model

import f2llm_jax
from f2llm_jax import Batch, embed, init_params, products
from f2llm_jax.config import ModelConfig
from f2llm_jax.configs.models import MODELS
from f2llm_jax.model import Block, abstract_params

# FACTS: recomputed from the paper's Table 1, and equal to the released ones.
PARAMETERS = {
    "80M": 80_084_288,
    "160M": 159_185_024,
    "330M": 334_349_184,
    "0.6B": 596_049_920,
    "1.7B": 1_720_574_976,
    "4B": 4_022_468_096,
    "8B": 7_568_405_504,
    "14B": 13_990_394_880,
}

LARGEST_DIFFERENCE = 2e-6  # of unit embeddings, float32
STATES_RELATIVE = 1e-4  # of every token's state after every layer
BFLOAT16_COSINE = 0.9995

EVERY_SHORT_LENGTH = (1, 2, 7, 8, 9, 31, 63, 64, 65, 100, 127, 128, 129, 130)

ODD_SHAPES = {
    "as many key/value heads as heads": dataclasses.replace(TINY, num_key_value_heads=4),
    "one layer": dataclasses.replace(TINY, num_hidden_layers=1),
    "one key/value head": dataclasses.replace(TINY, num_key_value_heads=1),
    "40 heads": dataclasses.replace(TINY, num_attention_heads=40, num_key_value_heads=8, head_dim=16),
    "one head of two": dataclasses.replace(TINY, num_attention_heads=1, num_key_value_heads=1, head_dim=2),
    "odd sizes": dataclasses.replace(TINY, vocab_size=67, hidden_size=33, intermediate_size=71, head_dim=10),
    "another theta and epsilon": dataclasses.replace(TINY, rope_theta=1e4, rms_norm_eps=1e-2),
}


@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_odd_shapes_equal_transformers(shape):
    check_against_transformers(ODD_SHAPES[shape], EVERY_SHORT_LENGTH, (300,))


@pytest.mark.parametrize(
    ("size", "batches"),
    [
        ("80M", (EVERY_SHORT_LENGTH, (255, 257, 384), (640, 1023, 1024))),
        ("160M", ((1, 2, 9, 64, 129), (300,))),
        ("0.6B", ((1, 17, 130),)),
    ],
)
def test_real_sizes_equal_transformers(size, batches):
    check_against_transformers(MODELS[size], *batches, jit=jit_as_users if size == "80M" else jax.jit)


def check_against_transformers(config: ModelConfig, *batches_of_lengths: Sequence[int], jit=jax.jit) -> None:
    """Embeddings of random texts in float32 and bfloat16; of the first batch also the states after every layer."""
    model = torch_model(config)
    params = params_of(model, config)
    batches = [random_batch(config, lengths) for lengths in batches_of_lengths]
    expected = [np.stack([torch_embedding(model, row) for row in rows_of(batch)]) for batch in batches]
    embed = jit(partial(f2llm_jax.embed, config=config), static_argnames="dtype")

    for batch, expected_bd in zip(batches, expected, strict=True):
        np.testing.assert_allclose(embed(params, batch), expected_bd, rtol=0, atol=LARGEST_DIFFERENCE)

    states = jax.jit(
        partial(f2llm_jax.Backbone(config).apply, capture_intermediates=_of_layers, mutable="intermediates")
    )
    final_btd, noted = states({"params": params}, batches[0].tokens_bt)
    (layers_lbtd,) = noted["intermediates"]["layers"]["__call__"]
    for row, tokens_t in enumerate(rows_of(batches[0])):
        expected_ltd = torch_states(model, tokens_t)
        got_ltd = np.concatenate([layers_lbtd[:, row], final_btd[None, row]])[:, : len(tokens_t)]
        assert got_ltd.shape == expected_ltd.shape == (config.num_hidden_layers + 1, len(tokens_t), config.hidden_size)
        error_lt = np.linalg.norm(got_ltd - expected_ltd, axis=-1) / np.linalg.norm(expected_ltd, axis=-1)
        assert error_lt.max() <= STATES_RELATIVE, f"layer and position {np.argwhere(error_lt > STATES_RELATIVE)[0]}"

    del model
    gc.collect()
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    for batch, expected_bd in zip(batches, expected, strict=True):
        got_bd = np.asarray(embed(params, batch, dtype="bfloat16"))
        assert got_bd.dtype == np.float32
        assert (got_bd * expected_bd).sum(axis=1).min() >= BFLOAT16_COSINE


def _of_layers(module: nn.Module, _: str) -> bool:
    return isinstance(module, Block)


def test_what_accelerators_round_costs_little(monkeypatch):
    """There the results of projections that end in another product come in bfloat16; those of the stream do not."""
    config = MODELS["80M"]
    params = f2llm_jax.init_params(config, jax.random.key(0))
    batch = random_batch(config, (2, 17, 130))
    embed = partial(f2llm_jax.embed, config=config, kernel="ragged")
    exact_bd = jax.jit(embed)(params, batch)
    monkeypatch.setattr(products, "platform", lambda: "gpu")
    traced = jax.jit(partial(embed, dtype="bfloat16")).trace(params, batch)
    found_bd = traced.lower().compile()(params, batch)
    assert (found_bd * exact_bd).sum(axis=1).min() >= BFLOAT16_COSINE
    results = re.findall(r"dot_general.*-> tensor<\d+x(\d+)x(\w+)>", traced.lower().as_text())
    rounded = {size for size, dtype in results if dtype == "bf16"}
    assert rounded == {"2048", "1024"} and ("320", "f32") in results


def random_batch(config: ModelConfig, lengths: Sequence[int], seed: int = 0) -> f2llm_jax.Batch:
    """Rows of random tokens, with other random tokens behind their ends."""
    tokens_bt = np.random.default_rng(seed).integers(config.vocab_size, size=(len(lengths), max(lengths)))
    return f2llm_jax.Batch(tokens_bt.astype(np.int32), np.array(lengths, np.int32))


def rows_of(batch: f2llm_jax.Batch) -> list[np.ndarray]:
    return [tokens_t[:length] for tokens_t, length in zip(batch.tokens_bt, batch.lengths_b, strict=True)]


@torch.inference_mode()
def torch_embedding(model: torch.nn.Module, tokens_t: np.ndarray) -> np.ndarray:
    states_1td = model(torch.tensor(tokens_t[None])).last_hidden_state
    return torch.nn.functional.normalize(states_1td[0, -1], dim=-1).numpy()


@torch.inference_mode()
def torch_states(model: torch.nn.Module, tokens_t: np.ndarray) -> np.ndarray:
    """The residual stream after each layer, and the final-norm states: [layers + 1, length, hidden]."""
    states_ltd = []
    hooks = [
        layer.register_forward_hook(lambda _module, _args, output: states_ltd.append(output[0]))
        for layer in model.layers
    ]
    states_ltd.append(model(torch.tensor(tokens_t[None])).last_hidden_state[0])
    for hook in hooks:
        hook.remove()
    return torch.stack([state.reshape(len(tokens_t), -1) for state in states_ltd]).numpy()


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameter_counts_are_the_released_ones(size):
    assert f2llm_jax.count_parameters(MODELS[size]) == PARAMETERS[size]


def test_all_sizes_are_listed():
    assert list(MODELS) == list(PARAMETERS)


def test_every_parameter_has_logical_axes():
    boxes = jax.tree.leaves(abstract_params(TINY), is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert len(boxes) == 13
    for box in boxes:
        assert isinstance(box, nn.LogicallyPartitioned)
        assert len(box.names) == len(box.value.shape)
        assert None not in box.names


def test_init_params_fits_the_declared_shapes():
    params = f2llm_jax.init_params(TINY, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, nn.unbox(abstract_params(TINY)))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert np.all(params["norm"]["weight"] == 1)
    assert abs(float(params["embed_tokens"].std()) - 0.02) < 1e-3
    other = f2llm_jax.init_params(TINY, jax.random.key(1))
    assert not np.array_equal(params["embed_tokens"], other["embed_tokens"])
    layers = params["layers"]["attention"]["q_proj"]["weight"]
    assert not np.array_equal(layers[0], layers[1])


def test_64_bit_types_change_nothing():
    config = dataclasses.replace(TINY, num_hidden_layers=1)
    batch = Batch(np.arange(300, dtype=np.int32)[None], np.array([300], np.int32))

    @jax.jit
    @jax.value_and_grad
    def run(params):
        return embed(params, batch, config=config, kernel="ragged").sum()

    expected = run(init_params(config, jax.random.key(0)))
    with jax.enable_x64(True):
        params = init_params(config, jax.random.key(0))
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
        found = run(params)
    for own, like in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert own.dtype == like.dtype
        np.testing.assert_allclose(own, like, rtol=1e-5, atol=1e-6)


def test_unknown_kernel_lists_the_known(tiny):
    batch = random_batch(TINY, (3,))
    with pytest.raises(ValueError, match="reference"):
        f2llm_jax.embed(tiny.params, batch, config=TINY, kernel="none")
