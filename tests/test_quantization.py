"""Fewer bits, exactly as ``sentence_transformers.util.quantize_embeddings`` has them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sentence_transformers.util import quantize_embeddings

import f2llm_jax
from f2llm_jax.dtypes import OUTPUTS
from f2llm_jax.errors import InputError
from f2llm_jax.quantization import dequantize

values = st.floats(-1, 1, width=32) | st.sampled_from([0.0, -0.0, 1e-38, -1e-38])
tables = arrays.arrays(np.float32, st.tuples(st.integers(2, 9), st.integers(1, 40)), elements=values, fill=st.nothing())


@given(tables)
@example(np.array([[0.0, -0.0, 1e-45, -1e-45]] * 2, np.float32))
def test_bits_equal_sentence_transformers(embeddings):
    for output in ("binary", "ubinary"):
        got, expected = f2llm_jax.quantize(embeddings, output), quantize_embeddings(embeddings, output)
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)


@pytest.mark.filterwarnings("ignore:overflow")  # of ranges that are all but empty
@given(tables, st.data())
@example(np.full((3, 4), 0.25, np.float32), None)  # a range of no extent
def test_int8_equals_sentence_transformers(embeddings, data):
    dim = embeddings.shape[1]
    sample = embeddings if data is None else data.draw(arrays.arrays(np.float32, (5, dim), elements=values))
    ranges = f2llm_jax.int8_ranges(sample)
    got = f2llm_jax.quantize(embeddings, "int8", ranges)
    expected = quantize_embeddings(embeddings, "int8", calibration_embeddings=sample)
    assert got.dtype == expected.dtype == np.int8
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(got, quantize_embeddings(embeddings, "int8", ranges=ranges))


def test_values_outside_the_ranges_are_clipped():
    ranges = np.array([[-1, 0], [1, 1]], np.float32)
    got = f2llm_jax.quantize(np.array([[-9, 9], [9, -9]], np.float32), "int8", ranges)
    np.testing.assert_array_equal(got, [[-128, 127], [127, -128]])


@given(tables)
def test_floats(embeddings):
    np.testing.assert_array_equal(f2llm_jax.quantize(embeddings, "float32"), embeddings)
    for output, dtype, rtol, atol in (
        ("bfloat16", ml_dtypes.bfloat16, 2**-8, 1e-38),
        ("float16", np.float16, 2**-11, 2**-24),
    ):
        got = f2llm_jax.quantize(embeddings, output)
        assert got.dtype == dtype
        np.testing.assert_allclose(got.astype(np.float32), embeddings, rtol=rtol, atol=atol)


def test_the_first_dimension_is_the_highest_bit():
    embeddings = np.array([[1, -1, -1, -1, -1, -1, -1, -1, 1, -1]], np.float32)
    np.testing.assert_array_equal(f2llm_jax.quantize(embeddings, "ubinary"), [[128, 128]])
    np.testing.assert_array_equal(f2llm_jax.quantize(embeddings, "binary"), [[0, 0]])


def test_a_vector_is_one_embedding():
    embeddings = np.random.default_rng(0).uniform(-1, 1, (5, 20)).astype(np.float32)
    ranges = f2llm_jax.int8_ranges(embeddings)
    for output in ("float16", "int8", "binary", "ubinary"):
        given = ranges if output == "int8" else None
        got, expected = (f2llm_jax.quantize(values, output, given) for values in (embeddings[3], embeddings))
        np.testing.assert_array_equal(got, expected[3])


@pytest.mark.parametrize("output", OUTPUTS)
def test_no_embeddings(output):
    ranges = np.zeros((2, 12), np.float32) if output == "int8" else None
    got = f2llm_jax.quantize(np.zeros((0, 12), np.float32), output, ranges)
    assert got.shape == ((0, 2) if "binary" in output else (0, 12))


def test_wrong_arguments():
    embeddings = np.zeros((2, 8), np.float32)
    with pytest.raises(InputError, match="float32, bfloat16, float16, int8, binary, ubinary, not 'float64'"):
        f2llm_jax.quantize(embeddings, "float64")
    with pytest.raises(InputError, match="int8_ranges"):
        f2llm_jax.quantize(embeddings, "int8")
    with pytest.raises(InputError, match=r"\(2, 8\), not \(2, 7\)"):
        f2llm_jax.quantize(embeddings, "int8", np.zeros((2, 7)))
    for sample in (np.zeros((1, 8)), np.zeros(8)):
        with pytest.raises(InputError, match="at least 2"):
            f2llm_jax.int8_ranges(sample)


@given(tables, st.sampled_from(OUTPUTS))
def test_what_numbers_stand_for_is_what_they_were_made_of(embeddings, output):
    ranges = f2llm_jax.int8_ranges(embeddings) if output == "int8" else None
    dim = embeddings.shape[1]
    codes = f2llm_jax.quantize(embeddings, output, ranges)
    got = dequantize(codes, output, dim, ranges)
    assert got.dtype == np.float32 and got.shape == embeddings.shape
    if output in ("binary", "ubinary"):
        np.testing.assert_array_equal(got, np.where(embeddings > 0, 1, -1))
    elif output == "int8":  # within half a step, and the largest value at the edge of its
        step = (ranges[1].astype(np.float64) - ranges[0]) / 255
        assert (np.abs(got - embeddings.astype(np.float64)) <= 0.501 * step + 1e-6).all()
    else:
        np.testing.assert_array_equal(got, codes.astype(np.float32))
