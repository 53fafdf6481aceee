"""End to end: from text to embedding as ``sentence_transformers`` does it, on real text in 106 languages."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from compilation import encoder_as_users
from releases import QUERY_PROMPT, bitext, xquad
from sentence_transformers import SentenceTransformer

import f2llm_jax

LARGEST_DIFFERENCE = 5e-6

CUT = 24  # tokens; most questions are shorter, most paragraphs longer


@pytest.fixture(scope="module")
def reference(real_release) -> SentenceTransformer:
    return SentenceTransformer(str(real_release), device="cpu")


@pytest.fixture(scope="module")
def model(real_release) -> Iterator[f2llm_jax.Encoder]:
    with encoder_as_users(real_release) as encoder:
        yield encoder


@pytest.fixture(scope="module")
def warning_model(real_release) -> f2llm_jax.Encoder:
    """In this process, where a warning is seen."""
    return f2llm_jax.load(real_release)


@pytest.fixture(scope="module")
def questions() -> list[str]:
    return xquad(6)[0]


@pytest.fixture(scope="module")
def paragraphs() -> list[str]:
    return xquad(2)[1]


def check(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.shape == expected.shape and got.dtype == expected.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=LARGEST_DIFFERENCE)


def test_sentences_in_106_languages(model, reference):
    texts = bitext(4)
    assert len(texts) == 4 * 106
    check(model.encode(texts), reference.encode(texts))
    texts = bitext(1)
    check(model.encode(texts, prompt_name="query"), reference.encode(texts, prompt_name="query"))


def test_questions_and_paragraphs(model, reference, questions, paragraphs):
    queries, documents = model.encode_query(questions), model.encode_document(paragraphs)
    check(queries, reference.encode_query(questions))
    check(documents, reference.encode_document(paragraphs))
    check(model.encode(questions, prompt=QUERY_PROMPT), reference.encode(questions, prompt=QUERY_PROMPT))
    check(model.encode(questions, prompt="Frage: "), reference.encode(questions, prompt="Frage: "))
    expected = reference.similarity(queries, documents).numpy()
    np.testing.assert_allclose(model.similarity(queries, documents), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dim", [1, 8, 64, 79, 80])
def test_cut_dims(model, reference, questions, dim):
    expected = reference.encode(questions, truncate_dim=dim, normalize_embeddings=True)
    check(model.encode(questions, dim=dim), expected)


def test_cut_queries(model, reference, questions):
    expected = reference.encode_query(questions, truncate_dim=32, normalize_embeddings=True)
    check(model.encode_query(questions, dim=32), expected)


@pytest.mark.parametrize("call", ["encode", "encode_query"])
def test_truncated_texts(warning_model, real_release, questions, paragraphs, call):
    reference = SentenceTransformer(str(real_release), device="cpu")
    reference.max_seq_length = CUT
    texts = questions + paragraphs
    with pytest.warns(UserWarning, match="truncated"):
        got = getattr(warning_model, call)(texts, max_length=CUT)
    check(got, getattr(reference, call)(texts))


def test_awkward_texts(warning_model, reference):
    texts = [
        "",
        " ",
        "\n",
        " spaces at both ends ",
        "<|im_end|>",
        "a<|endoftext|>b",
        "\x00",
        "👩‍👩‍👧‍👦",
        "e\u0301 é",
        "Z" * 999,
        "\u200f\u202e",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(warning_model.encode(texts), reference.encode(texts))
        check(warning_model.encode_query(texts), reference.encode_query(texts))


def test_one_text_and_none(model, reference):
    check(model.encode("Guten Tag"), reference.encode("Guten Tag"))
    check(model.encode_query("Guten Tag"), reference.encode_query("Guten Tag"))
    assert len(model.encode([])) == len(reference.encode([])) == 0
