"""A program for each layer computes what the one program does, from the same memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from releases import TINY

import f2llm_jax
from f2llm_jax.embedding import Batch, PackedBatch
from f2llm_jax.layerwise import Layerwise, bit_views

LENGTH = 40


@pytest.fixture(params=["float32", "bfloat16"])
def params(request) -> dict:
    params = f2llm_jax.init_params(TINY, jax.random.key(0))
    return jax.tree.map(lambda x: x.astype(request.param), params)


def batches(rows: int) -> list[Batch | PackedBatch]:
    random = np.random.default_rng(0)
    tokens_bt = random.integers(TINY.vocab_size, size=(rows, LENGTH)).astype(np.int32)
    segment_ids_bt = np.sort(random.integers(1, 5, size=(rows, LENGTH)), axis=1).astype(np.int32)
    ends_be = np.array([np.searchsorted(row, [1, 2, 3, 4], side="right") - 1 for row in segment_ids_bt], np.int32)
    lengths_b = np.resize(np.array([1, 17, 40], np.int32), rows)
    return [Batch(tokens_bt, lengths_b), PackedBatch(tokens_bt, segment_ids_bt, ends_be)]


@pytest.mark.parametrize("batch", batches(3) + batches(7), ids=["bucketed", "packed", "many, bucketed", "many, packed"])
def test_equals_the_one_program_bit_for_bit(params, batch):
    dtype = params["embed_tokens"].dtype
    layerwise = Layerwise(params, TINY, dtype=dtype, kernel="ragged")
    embed = jax.jit(f2llm_jax.embed, static_argnames=("config", "dim", "dtype", "kernel"))
    for dim in (TINY.hidden_size, 8):
        expected = embed(params, batch, config=TINY, dim=dim, dtype=dtype, kernel="ragged")
        np.testing.assert_array_equal(layerwise(batch, dim), expected)
    found = embed(bit_views(params), batch, config=TINY, dtype=dtype, kernel="ragged")
    np.testing.assert_array_equal(found, layerwise(batch, TINY.hidden_size))


def test_layers_are_views_of_the_stack(params):
    layerwise = Layerwise(params, TINY, dtype=jnp.float32, kernel="ragged")
    stacks = jax.tree.leaves(params["layers"])
    for number, layer in enumerate(layerwise._layers):
        for weight, stack in zip(jax.tree.leaves(layer), stacks, strict=True):
            np.testing.assert_array_equal(weight, stack[number])
            # XLA takes memory as it is where it begins at a multiple of 64 bytes: of all but small arrays.
            if stack[0].nbytes % 64 == 0:
                assert np.shares_memory(np.asarray(weight), np.asarray(stack))
