"""Rows of static shape: every text once, in shapes that are known beforehand, with little padding."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from f2llm_jax.batching import Buckets, batched, bucket_lengths
from f2llm_jax.errors import InputError

PAD = -7


@given(st.integers(1, 40960))
def test_lengths_ascend_to_the_limit_in_small_steps(max_length):
    lengths = bucket_lengths(max_length)
    assert lengths[-1] == max_length
    assert all(a < b for a, b in pairwise(lengths))
    assert all(b - a <= max(8, (a + 1) * (1 / 8 if a < 1024 else 1 / 4)) for a, b in pairwise(lengths))
    assert len(lengths) < 64


@settings(max_examples=300, deadline=None)
@given(
    chunks=st.lists(st.lists(st.integers(1, 70), max_size=40), max_size=5),
    batch_tokens=st.integers(1, 600),
    multiple=st.sampled_from([1, 2, 3, 8]),
    max_length=st.integers(70, 90),
)
def test_every_text_once_in_known_shapes(chunks, batch_tokens, multiple, max_length):
    buckets = Buckets(batch_tokens, max_length, multiple)
    # A text's tokens say which text it is.
    numbers = iter(range(10**6))
    sequences = [[np.full(length, next(numbers), np.int32) for length in chunk] for chunk in chunks]
    flat = [ids for chunk in sequences for ids in chunk]
    seen, shapes, rows_used, rows_made = [], set(), 0, 0
    for batch, texts in batched(iter(sequences), buckets, PAD):
        tokens_bt, lengths_b = batch
        rows, length = tokens_bt.shape
        assert tokens_bt.dtype == lengths_b.dtype == np.int32 and lengths_b.shape == (rows,)
        assert length in buckets.lengths and rows % multiple == 0
        assert rows * length <= batch_tokens or rows == multiple
        assert 0 < len(texts) <= rows
        for row, text in enumerate(texts):
            assert lengths_b[row] == len(flat[text])
            np.testing.assert_array_equal(tokens_bt[row, : lengths_b[row]], flat[text])
            assert np.all(tokens_bt[row, lengths_b[row] :] == PAD)
        assert np.all(lengths_b[len(texts) :] == 1) and np.all(tokens_bt[len(texts) :] == PAD)
        assert max(lengths_b) > max((other for other in buckets.lengths if other < length), default=0)
        seen += texts
        shapes.add((rows, length))
        rows_used, rows_made = rows_used + len(texts), rows_made + rows
    assert sorted(seen) == list(range(len(flat)))
    assert len(shapes) <= len(buckets)
    assert sum(len(flat[text]) for text in seen) == sum(map(len, flat))


def test_there_is_no_more_padding_than_the_buckets_make():
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(4, 1, size=20_000), 1, 1024).astype(int)
    chunks = [[np.zeros(n, np.int32) for n in part] for part in np.split(lengths, 10)]
    computed = sum(batch.tokens_bt.size for batch, _ in batched(chunks, Buckets(4096, 1024), 0))
    assert computed < 1.15 * lengths.sum()


def test_texts_that_come_late_are_batched_while_others_wait():
    """Nothing is held back until the end: a chunk that fills batches gives them."""
    pulled = 0

    def chunks():
        nonlocal pulled
        for _ in range(10):
            pulled += 1
            yield [np.zeros(8, np.int32)] * 64

    next(batched(chunks(), Buckets(256, 64), 0))
    assert pulled == 1


@pytest.mark.parametrize("batch_tokens", [0, -5])
def test_batch_tokens_must_be_positive(batch_tokens):
    with pytest.raises(InputError, match="batch_tokens"):
        Buckets(batch_tokens, 64)
