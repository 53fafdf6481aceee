"""Exact rankings of documents larger than memory, from float, int8 and binary embeddings."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from f2llm_jax.quantization import dequantize, quantize
from f2llm_jax.search import Score, nearest

# Documents per block: memory holds one block and its scores, 0.5 GB at 4,096 dimensions.
DOCUMENT_BLOCK = 8192

# Candidates of binary search that are rescored, as a multiple of the documents requested.
RESCORE_FACTOR = 4

OUTPUTS = ("float32", "int8", "binary", "rescored")


def cosines(a_nd: np.ndarray, b_md: np.ndarray) -> np.ndarray:
    """Cosine similarities as float32 [n, m], computed in float64.

    A float32 sum depends on the position of its column in the block, so blocks would decide the order of near-ties.
    """
    return (unit(a_nd) @ unit(b_md).T).astype(np.float32)


def unit(x_nd: np.ndarray) -> np.ndarray:
    """The rows normalised to length 1 (zero rows stay zero), float64."""
    x_nd = np.asarray(x_nd, np.float64)
    return x_nd / np.maximum(np.linalg.norm(x_nd, axis=1, keepdims=True), 1e-12)


def bytes_per_vector(output: str, dim: int) -> int:
    """Bytes per stored document for one of ``OUTPUTS``; rescoring needs only the bits."""
    return {"float32": 4 * dim, "int8": dim}.get(output, (dim + 7) // 8)


def rank(
    queries_qd: np.ndarray, documents_nd: np.ndarray, top: int, *, dim: int, output: str = "float32"
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest documents of every query, by exhaustive search.

    Both sides are truncated to ``dim``. ``float32`` compares by cosine. ``int8`` quantises documents with the ranges of
    the corpus itself, and compares queries with the dequantised documents. ``binary`` keeps one bit per dimension on
    both sides and compares by Hamming distance. ``rescored`` takes ``RESCORE_FACTOR`` times as many candidates by
    Hamming distance and orders them by the product of the float query and the document's bits as ±1 (Yamada et al.
    2021; sentence_transformers/util/quantization.py).

    Args:
        queries_qd: float32 [queries, hidden], unit rows.
        documents_nd: float32 [documents, hidden], unit rows; may be a memory map.
        top: number of documents per query.
        dim: the Matryoshka size.
        output: one of ``OUTPUTS``.

    Returns:
        Scores float32 and document indices int64, both [queries, min(top, documents)], best first; ties are ordered by
        document index.
    """
    score: Score = cosines
    if output == "int8":
        score = _int8_score(_ranges(documents_nd, dim))
    elif output in ("binary", "rescored"):
        score = _binary_score
    head_qd = queries_qd[:, :dim]
    if output != "rescored":
        return nearest(head_qd, _blocks(documents_nd, dim), top, score)
    _, candidates_qc = nearest(head_qd, _blocks(documents_nd, dim), top * RESCORE_FACTOR, score)
    return _rescore(head_qd, documents_nd, candidates_qc, top)


def _blocks(documents_nd: np.ndarray, dim: int) -> Iterator[np.ndarray]:
    for start in range(0, len(documents_nd), DOCUMENT_BLOCK):
        yield documents_nd[start : start + DOCUMENT_BLOCK, :dim]


def _ranges(documents_nd: np.ndarray, dim: int) -> np.ndarray:
    """Minimum and maximum of every dimension over all documents, float32 [2, dim]."""
    low, high = np.full(dim, np.inf, np.float32), np.full(dim, -np.inf, np.float32)
    for block_nd in _blocks(documents_nd, dim):
        head_nd = unit(block_nd).astype(np.float32)
        low, high = np.minimum(low, head_nd.min(axis=0)), np.maximum(high, head_nd.max(axis=0))
    return np.stack([low, high])


def _int8_score(ranges: np.ndarray) -> Score:
    def score(queries_qd: np.ndarray, documents_nd: np.ndarray) -> np.ndarray:
        codes_nd = quantize(unit(documents_nd).astype(np.float32), "int8", ranges)
        return cosines(queries_qd, dequantize(codes_nd, "int8", documents_nd.shape[1], ranges))

    return score


def _signs(x_nd: np.ndarray) -> np.ndarray:
    return np.where(x_nd > 0, np.float32(1), np.float32(-1))


def _binary_score(queries_qd: np.ndarray, documents_nd: np.ndarray) -> np.ndarray:
    """dim - 2 · Hamming distance of the bits, computed as the product of their signs: whole numbers, exact."""
    return _signs(queries_qd) @ _signs(documents_nd).T


def _rescore(
    queries_qd: np.ndarray, documents_nd: np.ndarray, number_qc: np.ndarray, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """The candidates of each query, ordered by the product of the float query and their signs."""
    scores_qk = np.empty((len(queries_qd), min(top, number_qc.shape[1])), np.float32)
    numbers_qk = np.empty(scores_qk.shape, np.int64)
    dim = queries_qd.shape[1]
    for row, (query_d, number_c) in enumerate(zip(queries_qd, number_qc, strict=True)):
        number_c = np.sort(number_c)  # orders ties by document index, and reads the memory map in order
        score_c = (_signs(documents_nd[number_c, :dim]).astype(np.float64) @ query_d).astype(np.float32)
        order_k = np.argsort(-score_c, kind="stable")[:top]
        scores_qk[row], numbers_qk[row] = score_c[order_k], number_c[order_k]
    return scores_qk, numbers_qk
