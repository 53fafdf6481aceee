"""Pooling, Matryoshka and normalisation; that no text's result depends on what is around it; gradients."""

from __future__ import annotations

import dataclasses
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from releases import TINY, params_of, torch_model

import f2llm_jax
from f2llm_jax import model
from f2llm_jax.batching import bucket_lengths
from f2llm_jax.embedding import trims_last_layer
from f2llm_jax.errors import InputError
from f2llm_jax.segments import PREFIX

SAME_COSINE = 0.999999

embed = jax.jit(partial(f2llm_jax.embed, config=TINY), static_argnames=("dim", "dtype", "kernel"))


@pytest.fixture(scope="module")
def torch_tiny():
    return torch_model(TINY)


@pytest.fixture(scope="module")
def params(torch_tiny):
    return params_of(torch_tiny, TINY)


def random_tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(TINY.vocab_size, size=shape, dtype=np.int32)


def test_every_dim_is_the_cut_normalised_again(params):
    batch = f2llm_jax.Batch(random_tokens(5, 24), np.array([1, 24, 7, 3, 23], np.int32))
    states = np.asarray(f2llm_jax.eos_states(params, batch, config=TINY))
    assert states.shape == (5, 96) and np.abs(np.linalg.norm(states, axis=1) - 1).min() > 0.1
    for dim in (1, 2, 8, 33, 64, 95, 96, None):
        expected = torch.nn.functional.normalize(torch.tensor(states[:, :dim]), dim=-1).numpy()
        got = np.asarray(embed(params, batch, dim=dim))
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, rtol=1e-6)


def test_the_state_is_that_of_the_last_token(params):
    batch = f2llm_jax.Batch(random_tokens(6, 16), np.array([1, 2, 8, 9, 15, 16], np.int32))
    states = f2llm_jax.Backbone(TINY).apply({"params": params}, batch.tokens_bt)
    expected = np.stack([states[row, length - 1] for row, length in enumerate(batch.lengths_b)])
    np.testing.assert_array_equal(f2llm_jax.eos_states(params, batch, config=TINY), expected)


def test_the_functions_of_the_readme(tiny_release):
    """As they stand there, but for the model's name."""
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "make_batch" in block)
    code, count = re.subn(r'"codefuse-ai/[^"]+"', repr(str(tiny_release)), code)
    assert count == 1
    names: dict[str, Any] = {}
    exec(code, names)
    expected = names["model"].encode(names["texts"], dim=64)
    np.testing.assert_allclose(names["embeddings"], expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(names["heads"][64], expected, rtol=0, atol=1e-5)
    assert list(names["heads"]) == [8, 64, TINY.hidden_size]


def rows_of_each_layout() -> list[f2llm_jax.Batch | f2llm_jax.PackedBatch]:
    """The same tokens twice; in packed rows texts of 1, 9, 30 and 24 tokens, and a slot without one."""
    tokens_bt = random_tokens(4, 64)
    segment_ids_bt = np.repeat(np.array([[1, 2, 3, 4]] * 4, np.int32), [1, 9, 30, 24], axis=1)
    ends_be = np.array([[0, 9, 39, 63, 0]] * 4, np.int32)
    return [
        f2llm_jax.Batch(tokens_bt, np.array([64, 17, 1, 40], np.int32)),
        f2llm_jax.PackedBatch(tokens_bt, segment_ids_bt, ends_be),
    ]


@pytest.mark.parametrize("batch", rows_of_each_layout(), ids=["bucketed", "packed"])
@pytest.mark.parametrize(
    ("dtype", "remat", "few_layers", "limit"),
    [("float32", "full", 3, 5e-6), ("float32", "dots", 2, 5e-6), ("bfloat16", "dots", 3, 2e-2)],
)
def test_the_last_layer_for_ends_alone_is_that_for_all(params, batch, dtype, remat, few_layers, limit, monkeypatch):
    """States and gradients, against those of all positions, of which the ends are taken."""
    monkeypatch.setattr(model, "FEW_LAYERS", few_layers)
    packed = isinstance(batch, f2llm_jax.PackedBatch)
    segment_ids_bt = batch.segment_ids_bt if packed else None
    ends_be = batch.ends_be if packed else batch.lengths_b[:, None] - 1
    weight_bed = np.random.default_rng(1).normal(size=(*ends_be.shape, TINY.hidden_size)).astype(np.float32)

    def of_ends(params):
        assert trims_last_layer(batch)
        states = f2llm_jax.eos_states(params, batch, config=TINY, dtype=dtype, remat=remat)
        return states if packed else states[:, None]

    def of_all(params):
        backbone = f2llm_jax.Backbone(TINY, dtype=jnp.dtype(dtype), remat=remat)
        states_btd = backbone.apply({"params": params}, batch.tokens_bt, segment_ids_bt)
        return jnp.take_along_axis(states_btd, ends_be[..., None], axis=1)

    def with_gradient(states):
        gradient = jax.jit(jax.grad(lambda params: (states(params) * weight_bed).sum()))
        return jax.jit(states)(params), gradient(params)

    for got, expected in zip(*(jax.tree.leaves(with_gradient(states)) for states in (of_ends, of_all)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=limit * np.abs(expected).max())


def test_the_last_layer_computes_few_positions():
    """By the compiler's count. Of a layer's weights, keys and values are 96 · 128 and all others 96 · 736."""
    config = dataclasses.replace(TINY, num_hidden_layers=1)
    params = f2llm_jax.init_params(config, jax.random.key(0))
    tokens_bt = random_tokens(8, 64)

    def flops(compute, *args):
        return jax.jit(compute).lower(params, *args).compile().cost_analysis()["flops"]

    every = flops(lambda params, tokens_bt: f2llm_jax.Backbone(config).apply({"params": params}, tokens_bt), tokens_bt)
    batch = f2llm_jax.Batch(tokens_bt, np.full(8, 64, np.int32))
    assert flops(lambda params, batch: f2llm_jax.eos_states(params, batch, config=config), batch) < every / 4


@pytest.mark.parametrize(("few_layers", "copied"), [(12, True), (11, False)])
def test_of_many_layers_no_weights_are_copied_for_a_gradient(few_layers, copied, monkeypatch):
    monkeypatch.setattr(model, "FEW_LAYERS", few_layers)
    config = dataclasses.replace(TINY, num_hidden_layers=12, intermediate_size=8192)
    params = jax.eval_shape(lambda: f2llm_jax.init_params(config, jax.random.key(0)))
    batch = f2llm_jax.Batch(random_tokens(4, 64), np.full(4, 64, np.int32))
    loss = jax.grad(lambda params: f2llm_jax.eos_states(params, batch, config=config, remat="full").sum())
    temporary = jax.jit(loss).lower(params).compile().memory_analysis().temp_size_in_bytes
    stack_bytes = sum(4 * math.prod(x.shape) for x in jax.tree.leaves(params["layers"]))
    assert (temporary > stack_bytes) == copied


@pytest.mark.parametrize(("ends", "expected"), [(64, True), (65, False)])
def test_many_ends_are_computed_like_all_positions(ends, expected):
    rows = np.zeros((1, 256), np.int32)
    assert trims_last_layer(f2llm_jax.PackedBatch(rows, rows, np.zeros((1, ends), np.int32))) == expected


def test_another_number_of_layers_is_refused(params):
    batch = f2llm_jax.Batch(random_tokens(4, 64), np.full(4, 64, np.int32))
    config = dataclasses.replace(TINY, num_hidden_layers=2)
    with pytest.raises(InputError, match="of 3 layers, the config of 2"):
        jax.eval_shape(partial(f2llm_jax.eos_states, config=config), params, batch)


def test_no_weights_are_copied_without_a_gradient():
    config = dataclasses.replace(TINY, num_hidden_layers=12, intermediate_size=8192)
    params = f2llm_jax.init_params(config, jax.random.key(0))
    batch = f2llm_jax.Batch(random_tokens(4, 64), np.full(4, 64, np.int32))
    compiled = jax.jit(partial(f2llm_jax.eos_states, config=config)).lower(params, batch).compile()
    stack_bytes = sum(x.nbytes for x in jax.tree.leaves(params["layers"]))
    assert compiled.memory_analysis().temp_size_in_bytes < stack_bytes / 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_stands_behind_the_end_changes_no_bit(params, dtype):
    lengths = np.array([1, 2, 63, 64, 100, 129, 130, 200], np.int32)
    tokens = random_tokens(8, 200)
    behind = np.arange(200) >= lengths[:, None]
    results = [
        np.asarray(embed(params, f2llm_jax.Batch(np.where(behind, other, tokens), lengths), dtype=dtype))
        for other in (tokens, 0, TINY.vocab_size - 1, random_tokens(8, 200, seed=1))
    ]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("length", [1, 5, 64, 100])
def test_one_text_is_the_same_in_every_bucket(params, length):
    text = random_tokens(length)
    alone = np.asarray(embed(params, f2llm_jax.Batch(text[None], np.array([length], np.int32))))[0]
    for bucket in [bucket for bucket in bucket_lengths(400) if bucket >= length][::4]:
        tokens = random_tokens(3, bucket, seed=bucket)
        tokens[1, :length] = text
        got = embed(params, f2llm_jax.Batch(tokens, np.array([bucket, length, 1], np.int32)))[1]
        assert got @ alone >= SAME_COSINE, bucket
        np.testing.assert_allclose(got, alone, rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 16), min_size=8, max_size=8),
    order=st.permutations(range(8)),
    seed=st.integers(0, 2**31),
)
def test_neighbours_do_not_matter(params, lengths, order, seed):
    tokens, lengths_b = random_tokens(8, 16, seed=seed), np.array(lengths, np.int32)
    straight = np.asarray(embed(params, f2llm_jax.Batch(tokens, lengths_b)))
    shuffled = np.asarray(embed(params, f2llm_jax.Batch(tokens[order], lengths_b[order])))
    assert (shuffled * straight[order]).sum(axis=1).min() >= SAME_COSINE


@pytest.mark.parametrize("kernel", ["ragged", "reference", "splash"])
def test_a_packed_text_is_as_it_is_alone(params, kernel):
    """Whatever its neighbours are, and wherever in the row it stands."""
    rows = [[5, 1, 60, 1, 23], [100], [33, 40, 2]]
    tokens = random_tokens(3, 110)
    segment_ids, ends = np.zeros((3, 110), np.int32), np.zeros((3, 8), np.int32)
    for row, lengths in enumerate(rows):
        ends[row, : len(lengths)] = np.cumsum(lengths) - 1
        segment_ids[row, : sum(lengths)] = np.repeat(np.arange(len(lengths)) + 1, lengths)
    got = np.asarray(embed(params, f2llm_jax.PackedBatch(tokens, segment_ids, ends), kernel=kernel))
    assert got.shape == (3, 8, TINY.hidden_size)
    alone = np.zeros((9, 100), np.int32)
    lengths = np.array([length for row in rows for length in row], np.int32)
    slots = [(row, slot) for row, row_lengths in enumerate(rows) for slot in range(len(row_lengths))]
    for text, (row, slot) in enumerate(slots):
        alone[text, : lengths[text]] = tokens[row, segment_ids[row] == slot + 1]
    expected = np.asarray(embed(params, f2llm_jax.Batch(alone, lengths)))
    got = np.stack([got[slot] for slot in slots])
    assert (got * expected).sum(axis=1).min() >= SAME_COSINE
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def test_a_text_behind_a_prefix_is_as_it_is_alone(params):
    """Through all layers: positions go on behind the prefix, wherever in the row the text stands."""
    lengths = [5, 1, 60, 2]
    tokens = random_tokens(1, 100)
    segment_ids = np.zeros((1, 100), np.int32)
    segment_ids[0, :20] = PREFIX
    segment_ids[0, 20:88] = np.repeat([1, 2, 3, 4], lengths)
    ends = 19 + np.cumsum([lengths], axis=1)
    got = np.asarray(embed(params, f2llm_jax.PackedBatch(tokens, segment_ids, ends)))[0]
    for text, embedding in enumerate(got, start=1):
        alone = tokens[:, (segment_ids[0] == PREFIX) | (segment_ids[0] == text)]
        expected = embed(params, f2llm_jax.Batch(alone, np.array([alone.size])))[0]
        np.testing.assert_allclose(embedding, expected, rtol=0, atol=1e-6)


def test_what_is_before_the_end_does_matter(params):
    tokens = random_tokens(1, 16)
    changed = tokens.copy()
    changed[0, 0] = (changed[0, 0] + 1) % TINY.vocab_size
    length = np.array([16], np.int32)
    a, b = (embed(params, f2llm_jax.Batch(ids, length))[0] for ids in (tokens, changed))
    assert a @ b < 0.999
    swapped = tokens.copy()
    swapped[0, [3, 4]] = swapped[0, [4, 3]]
    assert a @ embed(params, f2llm_jax.Batch(swapped, length))[0] < 0.999


def test_kernels_agree(params):
    batch = f2llm_jax.Batch(random_tokens(3, 300), np.array([300, 129, 1], np.int32))
    expected = embed(params, batch, kernel="reference")
    np.testing.assert_allclose(embed(params, batch), expected, rtol=0, atol=1e-6)


def test_gradients_equal_torch(params, torch_tiny):
    tokens, length, dim = random_tokens(1, 12), np.array([12], np.int32), 40
    target = np.random.default_rng(0).normal(size=dim).astype(np.float32)

    def loss(params):
        return f2llm_jax.embed(params, f2llm_jax.Batch(tokens, length), config=TINY, dim=dim)[0] @ target

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    state = torch_tiny(torch.tensor(tokens)).last_hidden_state[0, -1, :dim]
    torch_loss = torch.nn.functional.normalize(state, dim=-1) @ torch.tensor(target)
    weights = {
        "embed_tokens": torch_tiny.embed_tokens.weight,
        "norm": torch_tiny.norm.weight,
        "q_proj": torch_tiny.layers[0].self_attn.q_proj.weight,
        "k_norm": torch_tiny.layers[1].self_attn.k_norm.weight,
        "down_proj": torch_tiny.layers[2].mlp.down_proj.weight,
    }
    expected = dict(zip(weights, torch.autograd.grad(torch_loss, list(weights.values())), strict=True))
    layers = grads["layers"]
    got = {
        "embed_tokens": grads["embed_tokens"],
        "norm": grads["norm"]["weight"],
        "q_proj": layers["attention"]["q_proj"]["weight"][0].reshape(-1, TINY.hidden_size),
        "k_norm": layers["attention"]["k_norm"]["weight"][1],
        "down_proj": layers["mlp"]["down_proj"]["weight"][2],
    }
    assert abs(float(value) - torch_loss.item()) < 1e-5
    for name, grad in expected.items():
        scale = float(grad.abs().max())
        assert scale > 0
        np.testing.assert_allclose(got[name], grad.numpy(), rtol=0, atol=1e-4 * scale, err_msg=name)


def test_matryoshka_heads_of_states_and_of_embeddings_are_the_same():
    states = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 20)).astype(np.float32) * 7)
    heads = f2llm_jax.matryoshka(states, dims=(20, 3, 8))
    assert list(heads) == [20, 3, 8]
    again = f2llm_jax.matryoshka(heads[20], dims=heads)
    for dim, head in heads.items():
        assert head.shape == (2, 3, dim)
        np.testing.assert_allclose(np.linalg.norm(head, axis=-1), 1, rtol=1e-6)
        np.testing.assert_allclose(again[dim], head, rtol=0, atol=1e-6)


def test_a_zero_state_stays_zero():
    np.testing.assert_array_equal(f2llm_jax.matryoshka(jnp.zeros((2, 8)), (4,))[4], np.zeros((2, 4)))


@pytest.mark.parametrize("dim", [0, -1, 97, True, 2.5, "8"])
def test_dim_outside_the_model_is_refused(params, dim):
    batch = f2llm_jax.Batch(random_tokens(1, 8), np.array([8], np.int32))
    with pytest.raises(InputError, match=r"1\.\.96.*8, 16, 32, 64, 96"):
        f2llm_jax.embed(params, batch, config=TINY, dim=dim)


@pytest.mark.parametrize("dim", [0, 9])
def test_matryoshka_dims_outside_the_states_are_refused(dim):
    with pytest.raises(InputError, match=r"1\.\.8"):
        f2llm_jax.matryoshka(jnp.ones((1, 8)), (4, dim))
