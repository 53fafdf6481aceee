"""Rows of static shape: every text once, in shapes that are known beforehand, with little padding."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from f2llm_jax import make_batch
from f2llm_jax.batching import Buckets, batched, bucket_lengths
from f2llm_jax.errors import InputError
from f2llm_jax.packing import PACKED_LENGTH, SHORT_ROW, Packing, choose_layout, packed, packed_length
from f2llm_jax.segments import PREFIX

PAD = -7


def test_make_batch():
    texts = [[5, 6, 7], np.array([8])]
    tokens_bt, lengths_b = make_batch(texts)
    assert tokens_bt.dtype == lengths_b.dtype == np.int32
    assert tokens_bt.tolist() == [[5, 6, 7], [8, 0, 0]] and lengths_b.tolist() == [3, 1]
    tokens_bt, lengths_b = make_batch(texts, 4, rows=3, pad_id=PAD)
    assert tokens_bt.tolist() == [[5, 6, 7, PAD], [8, PAD, PAD, PAD], [PAD] * 4] and lengths_b.tolist() == [3, 1, 1]
    assert make_batch([]).tokens_bt.shape == (0, 1)
    for wrong, message in (
        ((texts, 2), "rows of 2 hold texts of 1 to 2 tokens, not of 1 to 3"),
        (([[1], []], 2), "not of 0 to 1"),
    ):
        with pytest.raises(InputError, match=message):
            make_batch(*wrong)
    with pytest.raises(InputError, match="1 rows hold as many texts at most, not 2"):
        make_batch(texts, rows=1)


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
    for (tokens_bt, lengths_b), texts, slots, tokens in batched(iter(sequences), buckets, PAD):
        rows, length = tokens_bt.shape
        assert tokens_bt.dtype == lengths_b.dtype == np.int32 and lengths_b.shape == (rows,)
        assert length in buckets.lengths and rows % multiple == 0
        assert rows * length <= batch_tokens or rows == multiple
        assert 0 < len(texts) <= rows
        assert list(slots) == list(range(len(texts))) and tokens == sum(lengths_b[: len(texts)])
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
    computed = sum(batch.tokens_bt.size for batch, *_ in batched(chunks, Buckets(4096, 1024), 0))
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


@settings(max_examples=200, deadline=None)
@given(
    chunks=st.lists(st.lists(st.integers(1, 70), max_size=60), max_size=5),
    long=st.lists(st.integers(1000, 2100), max_size=4),
    batch_tokens=st.integers(1, 6000),
    multiple=st.sampled_from([1, 2, 3, 8]),
)
def test_every_text_once_in_packed_rows(chunks, long, batch_tokens, multiple):
    packing = Packing(batch_tokens, 2100, multiple)
    assert packing.lengths == (1024, 2048, 3072)
    numbers = iter(range(1, 10**6))
    sequences = [[np.full(length, next(numbers), np.int32) for length in chunk] for chunk in (*chunks, long)]
    flat = [ids for chunk in sequences for ids in chunk]
    seen = []
    for (tokens_bt, segment_ids_bt, ends_be), texts, slots, tokens in packed(iter(sequences), packing, PAD):
        rows, length = tokens_bt.shape
        assert {x.dtype for x in (tokens_bt, segment_ids_bt, ends_be)} == {np.dtype(np.int32)}
        assert length in packing.lengths and rows % multiple == 0 and rows <= packing.rows(length)
        assert ends_be.shape[1] in (1, 4, 16, 64, 256, 1024)
        assert tokens == np.count_nonzero(segment_ids_bt)
        assert np.all(tokens_bt[segment_ids_bt == 0] == PAD)
        left = segment_ids_bt.copy()
        for text, slot in zip(texts, slots, strict=True):
            row, slot = divmod(int(slot), ends_be.shape[1])
            end = ends_be[row, slot] + 1
            start = end - len(flat[text])
            np.testing.assert_array_equal(tokens_bt[row, start:end], flat[text])
            assert set(segment_ids_bt[row, start:end]) == {slot + 1}
            left[row, start:end] = 0
        assert not left.any()
        seen += texts
    assert sorted(seen) == list(range(len(flat)))


@settings(max_examples=300, deadline=None)
@given(
    chunks=st.lists(st.lists(st.integers(1, 70) | st.integers(60, 500), max_size=60), max_size=5),
    batch_tokens=st.integers(1, 3000),
    multiple=st.sampled_from([1, 2, 8]),
)
def test_every_text_once_in_short_rows(chunks, batch_tokens, multiple):
    packing = Packing(batch_tokens, 500, multiple, short_rows=True)
    assert packing.lengths[0] == SHORT_ROW and packing.last_lengths == bucket_lengths(500)
    numbers = iter(range(1, 10**6))
    sequences = [[np.full(length, next(numbers), np.int32) for length in chunk] for chunk in chunks]
    flat = [ids for chunk in sequences for ids in chunk]
    seen = []
    for (tokens_bt, segment_ids_bt, ends_be), texts, slots, tokens in packed(iter(sequences), packing, PAD):
        rows, length = tokens_bt.shape
        assert length in packing.last_lengths and rows % multiple == 0 and rows <= packing.rows(length)
        fullest = np.bincount(slots // ends_be.shape[1]).max()
        assert fullest <= ends_be.shape[1] <= length
        assert ends_be.shape[1] in {16, 32, 64, 128, 256, length}  # few, since a program is compiled for each
        assert tokens == np.count_nonzero(segment_ids_bt) == sum(len(flat[text]) for text in texts)
        ends = ends_be.ravel()
        for text, slot in zip(texts, slots, strict=True):
            row, end = int(slot) // ends_be.shape[1], ends[slot] + 1
            np.testing.assert_array_equal(tokens_bt[row, end - len(flat[text]) : end], flat[text])
        seen += texts
    assert sorted(seen) == list(range(len(flat)))


@settings(max_examples=300, deadline=None)
@given(
    chunks=st.lists(st.lists(st.integers(1, 70) | st.integers(60, 300), max_size=60), min_size=1, max_size=4),
    prefix=st.integers(8, 40),
    others=st.lists(st.integers(1, 300), max_size=9),
    packing=st.sampled_from(
        [
            Packing(512, 500, short_rows=True, prefixed_length=192),
            Packing(700, 340, 2, short_rows=True, prefixed_length=128),
            Packing(2048, 700, 2, row_length=256, prefixed_length=256),
            Packing(2048, 700, row_length=512),
        ]
    ),
)
def test_every_text_once_behind_a_prefix(chunks, prefix, others, packing):
    """The texts of the first chunk begin alike; some of the last do not."""
    numbers = iter(range(1, 10**6))

    def make(beginning, length):
        return np.append(beginning, np.full(length, next(numbers))).astype(np.int32)

    prefix_t = -np.arange(1, prefix + 1)
    sequences = [[make(prefix_t, length) for length in chunk] for chunk in chunks]
    sequences.append([make(prefix_t[: n % 8], length) for n, length in enumerate(others)])
    flat = [ids for chunk in sequences for ids in chunk]
    seen, shared = [], 0
    for rows in packed(iter(sequences), packing, PAD):
        (tokens_bt, segment_ids_bt, ends_be), texts, slots, tokens = rows
        assert tokens_bt.shape[0] % packing.multiple == 0 and tokens_bt.size - rows.padding <= tokens
        has_prefix_b = segment_ids_bt[:, 0] == PREFIX
        for row_t in tokens_bt[has_prefix_b]:
            np.testing.assert_array_equal(row_t[:prefix], prefix_t)
        np.testing.assert_array_equal((segment_ids_bt == PREFIX).sum(axis=1), prefix * has_prefix_b)
        for text, slot in zip(texts, slots, strict=True):
            row, slot = divmod(int(slot), ends_be.shape[1])
            own = tokens_bt[row, segment_ids_bt[row] == slot + 1]
            assert np.flatnonzero(segment_ids_bt[row] == slot + 1)[-1] == ends_be[row, slot]
            np.testing.assert_array_equal(np.append(prefix_t, own) if has_prefix_b[row] else own, flat[text])
        shared += np.count_nonzero(has_prefix_b[slots // ends_be.shape[1]])
        assert tokens == sum(len(flat[text]) for text in texts)
        seen += texts
    assert sorted(seen) == list(range(len(flat)))
    fit = [prefix + 2 * length <= packing.prefixed_length for chunk in chunks for length in chunk]
    assert shared == (sum(fit) if len(chunks[0]) > 1 else 0)


def test_texts_of_one_prompt_take_half_the_tokens():
    """Fourteen of 12 tokens behind 17 are a row of 192."""
    texts = [np.append(np.arange(17), np.full(12, n)) for n in range(100, 128)]
    (rows,) = packed([texts], Packing(512, 500, short_rows=True, prefixed_length=192), PAD)
    assert rows.batch.tokens_bt.shape == (2, 192)
    assert rows.tokens == 28 * 29 and rows.padding == 2 * (192 - 17 - 14 * 12)


def test_the_last_rows_share_batches_where_that_computes_less():
    """Few texts of like lengths are one batch; a long one among short ones is not worth their padding."""

    def shapes(*lengths: int) -> list[tuple[int, ...]]:
        packing = Packing(1024, 4096, short_rows=True)
        batches = packed([[np.zeros(length, np.int32) for length in lengths]], packing, 0)
        return [rows.batch.tokens_bt.shape for rows in batches]

    assert shapes(3) == [(1, 8)]
    assert shapes(130, 140, 150) == [(3, 160)]
    assert sorted(shapes(900, 100, 90, 110)) == [(1, 960), (3, 112)]


def test_many_long_rows_that_are_left_are_soon_put_together():
    """Of a large mesh thousands are left; and one batch has them where it can, at the price of a padded row."""
    for left, rows in ((17, [18]), (31, [32]), (4095, [2048, 2048])):
        packing = Packing(max(32, rows[0]) * 1024, 1024)
        batches = packed([[np.zeros(1000, np.int32)] * left], packing, 0)
        assert [batch.batch.tokens_bt.shape[0] for batch in batches] == rows


def test_short_rows_waste_little_of_few_real_texts(mix):
    """What a call with some hundred texts computes on a CPU; rows of one text each would waste a third of sentences."""
    for name, texts in {"sentences": mix[-300:], "questions": mix[:300], "paragraphs": mix[9600:9800]}.items():
        batches = list(packed([texts], Packing(512, 40960, short_rows=True), 0))
        wasted = 1 - sum(map(len, texts)) / sum(rows.batch.tokens_bt.size for rows in batches)
        print(f"{name}: {wasted:.2%} wasted in {len(batches)} batches")
        assert wasted <= 0.06


@pytest.fixture(scope="module")
def mix() -> list[np.ndarray]:
    """The tokens of XQuAD's questions and paragraphs, and of Tatoeba's pairs in 106 languages."""
    import tokenizers
    from releases import QWEN_TOKENIZER, bitext, skip_without_shared, xquad

    skip_without_shared()
    tokenizer = tokenizers.Tokenizer.from_file(str(QWEN_TOKENIZER / "tokenizer.json"))
    questions, paragraphs = xquad()
    texts = [*questions, *paragraphs, *bitext()]
    return [np.array([*encoding.ids, 0], np.int32) for encoding in tokenizer.encode_batch_fast(texts)]


@pytest.mark.parametrize("packing", [Packing(32768, 1024), Packing(32768, 40960), Packing(8 * 32768, 40960, 8)])
def test_packing_wastes_little_of_real_texts(mix, packing):
    mix = [ids[: packing.lengths[-1]] for ids in mix]
    for texts in (mix, [mix[n] for n in np.random.default_rng(0).permutation(len(mix))]):
        chunks = [texts[first : first + 2048] for first in range(0, len(texts), 2048)]
        batches = list(packed(chunks, packing, 0))
        tokens = sum(map(len, texts))
        wasted = 1 - tokens / sum(rows.batch.tokens_bt.size for rows in batches)
        shapes = {(rows.batch.tokens_bt.shape, rows.batch.ends_be.shape) for rows in batches}
        print(f"{len(texts):,} texts, {tokens:,} tokens: {wasted:.2%} wasted, {len(shapes)} programs")
        assert sum(rows.tokens for rows in batches) == tokens
        assert wasted <= 0.03
        assert len(shapes) <= 8


def test_a_layout_is_chosen_by_platform_and_lengths():
    buckets, packing = Buckets(32768, 1024), Packing(32768, 1024)
    many, one = [np.zeros(17, np.int32)] * 3000, [np.zeros(17, np.int32)]
    for platform in ("tpu", "gpu"):
        assert choose_layout("auto", platform, many, buckets, packing) == "packed"
        assert choose_layout("auto", platform, one, buckets, packing) == "bucketed"
    assert choose_layout("auto", "cpu", many, buckets, packing) == "packed"
    for layout in ("packed", "bucketed"):
        assert choose_layout(layout, "cpu", one, buckets, packing) == layout
    with pytest.raises(InputError, match="no layout 'dense'; there are auto, bucketed, packed"):
        choose_layout("dense", "cpu", one, buckets, packing)
    assert packing.lengths == (PACKED_LENGTH,) == (packed_length("tpu"),)
    on_gpu = Packing(32768, 1500, row_length=packed_length("gpu"))
    assert on_gpu.lengths == (512, 1024, 1536) and on_gpu.rows(512) == 64
