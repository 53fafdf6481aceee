"""Exact nearest neighbours."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from f2llm_jax.errors import InputError
from f2llm_jax.quantization import check_float

# Scores held at a time, which limits the queries compared with a block at once; 0.3 GB with the buffers for sorting.
SCORES = 1 << 23

Score = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Scores float [n, m] of n queries and m documents."""


def inner_products(query_qd: np.ndarray, document_nd: np.ndarray) -> np.ndarray:
    """Scores [queries, documents]; cosines if the embeddings have unit norm."""
    return query_qd @ document_nd.T


def nearest(
    query_qd: np.ndarray, blocks: Iterable[np.ndarray], top: int, score: Score = inner_products
) -> tuple[np.ndarray, np.ndarray]:
    """The documents most similar to each query.

    Memory holds one block, a few million scores and the result, whatever the number of blocks and queries.

    Args:
        query_qd: float32 [queries, dim].
        blocks: the documents' embeddings in order, in blocks of float32 [n, dim].
        top: number of documents per query, at least 1.
        score: the function to compare by; higher is nearer.

    Returns:
        Scores float32 and document indices int64, both [queries, min(top, documents)], best first; ties are ordered by
        document index. A NaN ranks below all numbers.

    Raises:
        InputError: ``top`` is below 1, or queries or a block are not float arrays [n, dim] of one width.
    """
    if top < 1:
        raise InputError(f"top must be at least 1, not {top}")
    query_qd = _rows(query_qd, "query_qd")
    # A score and a document index are kept as one integer, which sorts by score, then by index.
    keys_qk = np.empty((len(query_qd), 0), np.uint64)
    count = 0
    for block_nd in filter(len, blocks):
        block_nd = _rows(block_nd, "a block")
        if block_nd.shape[1] != query_qd.shape[1]:
            raise InputError(f"queries have {query_qd.shape[1]} dimensions, a block {block_nd.shape[1]}")
        best_qk = np.empty((len(query_qd), min(top, count + len(block_nd))), np.uint64)
        step = max(1, SCORES // len(block_nd))
        for start in range(0, len(query_qd), step):
            part = slice(start, start + step)
            keys_pn = np.concatenate([keys_qk[part], _keys(score(query_qd[part], block_nd), count)], axis=1)
            kept = best_qk.shape[1]
            best_qk[part] = np.partition(keys_pn, -kept, axis=1)[:, -kept:]
        keys_qk, count = best_qk, count + len(block_nd)
    return _from_keys(np.sort(keys_qk, axis=1)[:, ::-1])


def _rows(embeddings: np.ndarray, name: str) -> np.ndarray:
    embeddings_nd = check_float(embeddings, "nearest")
    if embeddings_nd.ndim != 2:
        raise InputError(f"{name} must be an array [n, dim], not of shape {embeddings_nd.shape}")
    return embeddings_nd


_SIGN = np.uint32(1 << 31)
_LAST = np.uint64(2**32 - 1)


def _keys(scores_qn: np.ndarray, first: int) -> np.ndarray:
    """uint64: upper half, the bits of the score, mapped to sort like the scores; lower half, 2³² - 1 - index."""
    bits_qn = (scores_qn.astype(np.float32) + np.float32(0)).view(np.uint32)  # + 0 makes -0 and 0 equal
    ordered_qn = np.where(bits_qn & _SIGN, ~bits_qn, bits_qn | _SIGN)
    ordered_qn[np.isnan(scores_qn)] = 0  # their bits are above infinity's
    numbers_n = np.arange(first, first + scores_qn.shape[1], dtype=np.uint64)
    return (ordered_qn.astype(np.uint64) << np.uint64(32)) | (_LAST - numbers_n)


def _from_keys(keys_qk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ordered_qk = (keys_qk >> np.uint64(32)).astype(np.uint32)
    bits_qk = np.where(ordered_qk & _SIGN, ordered_qk ^ _SIGN, ~ordered_qk)
    return bits_qk.view(np.float32), (_LAST - (keys_qk & _LAST)).astype(np.int64)
