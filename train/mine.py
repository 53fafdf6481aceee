"""Mines hard negatives for query-passage pairs: the nearest passages that are clearly further away than the positive.

The rule is NV-Retriever's "TopK-PercPos" (Moreira et al. 2024, arXiv:2407.15831), with ranks counted as in
``mine_hard_negatives`` of sentence-transformers: positives are excluded first, then passages that are too near, then
the first ranks.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow
from pyarrow import parquet
from tqdm import tqdm

from f2llm_jax.encoder import Done, Encoder
from f2llm_jax.errors import InputError, warn, whole_number
from f2llm_jax.files import local_path, new_file
from f2llm_jax.release import pick_prompt
from f2llm_jax.search import nearest
from f2llm_jax.train.raw import INSTRUCTION, faults, open_dataset, read_rows, released_columns

# Texts at a time: passages embedded, passages compared, and at most, queries embedded and compared with all passages.
_ENCODE_TEXTS = 65536
_BLOCK = 8192
_QUERIES = 16384

# Nearest passages held at a time, unless a single query needs more; some 40 bytes each while they are compared.
_NEAREST = 1 << 23

# Rows per row group: 200 MB with 26 texts of 1 KB per row.
_GROUP_ROWS = 8192


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which passages are the negatives of a query.

    Take the ``last`` nearest passages that are not positives of the query, keep those that score at most ``margin``
    times its positive and at most ``max_score``, and skip the nearest ``first`` of these; the negatives are the nearest
    ``negatives`` of the rest.

    Attributes:
        negatives: number of negatives per query.
        first, last: the rank to start after and the last rank.
        margin: the maximum score as a share of the positive's cosine, or of the lowest if a query has several. As that
            would raise a cosine below 0, (1 - margin) of its magnitude is subtracted instead.
        max_score: the maximum cosine of a negative.

    Raises:
        InputError: the range of ranks is too small for the negatives, or a number is out of range.
    """

    negatives: int = 24
    first: int = 10
    last: int = 100
    margin: float = 0.95
    max_score: float = math.inf

    def __post_init__(self) -> None:
        whole_number("negatives", self.negatives)
        if not 0 <= self.first < self.last:
            raise InputError(f"the range must go from 0 or more to more than that, not {self.first},{self.last}")
        if self.last - self.first < self.negatives:
            raise InputError(
                f"a range of {self.first},{self.last} has room for {self.last - self.first} negatives, not for "
                f"{self.negatives}"
            )
        if not 0 < self.margin <= 1:
            raise InputError(f"the margin must be above 0 and at most 1, not {self.margin}")

    def select(
        self, scores_qk: np.ndarray, numbers_qk: np.ndarray, positive_qk: np.ndarray, lowest_q: np.ndarray
    ) -> np.ndarray:
        """Selects the negatives.

        Args:
            scores_qk: [queries, k], cosines of the nearest documents, best first.
            numbers_qk: the numbers of these documents.
            positive_qk: bool, which of them are positives of the query.
            lowest_q: the lowest cosine among the query's positives.

        Returns:
            int64 [queries, negatives], nearest first; all -1 for a query with too few.
        """
        limit_q = np.minimum(lowest_q - (1 - self.margin) * np.abs(lowest_q), self.max_score)
        in_depth_qk = ~positive_qk & (np.cumsum(~positive_qk, axis=1) <= self.last)
        allowed_qk = in_depth_qk & (scores_qk <= limit_q[:, None])
        rank_qk = np.cumsum(allowed_qk, axis=1)
        chosen_qk = allowed_qk & (rank_qk > self.first) & (rank_qk <= self.first + self.negatives)
        enough_q = chosen_qk.sum(axis=1) == self.negatives
        result = np.full((len(scores_qk), self.negatives), -1)
        result[enough_q] = numbers_qk[enough_q][chosen_qk[enough_q]].reshape(-1, self.negatives)
        return result


@dataclasses.dataclass(frozen=True)
class Mined:
    """The outcome for the rows of a file.

    Attributes:
        written: number of rows written, with negatives.
        short: number of rows left out because the rule allows too few passages for the query.
        bad: number of rows left out because the query or the passage is empty.
        documents: number of distinct texts that negatives were taken from.
    """

    written: int
    short: int
    bad: int
    documents: int


class Pairs:
    """The distinct texts of a file, in memory.

    Attributes:
        file: the file.
        queries: distinct queries, those with the fewest positives first, else in the order of the file.
        documents: distinct passages in the order of the file, then the texts of the corpus.
        query_r, passage_r: indices of the query and the document of each row; -1 for both if either is empty.
    """

    def __init__(self, file: str | Path, corpus: Sequence[str] = ()):
        """Reads a Parquet file with columns ``query`` and ``passage``.

        Args:
            file: the file.
            corpus: texts to take negatives from, besides the file's passages.

        Raises:
            InputError: the file is not Parquet, is damaged, lacks a column, or has no row with a query and a passage.
            OSError: the file cannot be read.
        """
        self.file = Path(file).expanduser()
        if self.file.suffix == ".jsonl":
            raise InputError(f"{file}: f2llm mine takes Parquet; f2llm prepare --raw reads JSON Lines, as they are")
        queries: dict[str, int] = {}
        documents: dict[str, int] = {}
        rows: list[tuple[int, int]] = []
        dataset = open_dataset(self.file, negatives=0)
        for _, columns in read_rows(dataset, strip_instructions=False):
            for query, passage, fault in zip(*(column.to_pylist() for column in columns), faults(columns), strict=True):
                if fault:
                    rows.append((-1, -1))
                else:
                    rows.append(
                        (queries.setdefault(query, len(queries)), documents.setdefault(passage, len(documents)))
                    )
        if not queries:
            raise InputError(f"{file} has no row with a query and a passage")
        for text in corpus:
            if text.strip():
                documents.setdefault(text, len(documents))
        self.queries, self.documents = list(queries), list(documents)
        self.query_r, self.passage_r = np.array(rows, np.int64).reshape(-1, 2).T
        self._sort_queries()
        self._keys = self._distinct_pairs()

    def _distinct_pairs(self) -> np.ndarray:
        good_r = self.query_r >= 0
        return np.unique(self.key(self.query_r[good_r], self.passage_r[good_r]))

    def _sort_queries(self) -> None:
        """Orders queries by their number of positives: one with many must not make more work of those beside it."""
        order_q = np.argsort(np.bincount(self._distinct_pairs() // len(self.documents)), kind="stable")
        self.queries = [self.queries[number] for number in order_q]
        good_r = self.query_r >= 0
        self.query_r[good_r] = np.argsort(order_q)[self.query_r[good_r]]

    def key(self, query: np.ndarray, document: np.ndarray) -> np.ndarray:
        """A unique number for each pair."""
        return query * len(self.documents) + document

    def positives(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pairs of the queries from ``start`` to ``stop`` - 1, by query: their keys, queries and documents."""
        first, last = np.searchsorted(self._keys, self.key(np.array([start, stop]), np.array(0)))
        keys_p = self._keys[first:last]
        return keys_p, *np.divmod(keys_p, len(self.documents))


def mine(
    model: Encoder,
    pairs: Pairs,
    out: str | Path,
    *,
    rule: Rule,
    prompt_name: str | None = None,
    prompt: str | None = None,
    dim: int | None = None,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    show_progress: bool = False,
) -> Mined:
    """Finds hard negatives for pairs, and writes them in the layout of the released data.

    Every query is compared with every document. The embeddings of the documents are kept in a temporary file (4 ·
    ``dim`` bytes each).

    Args:
        model: the model that embeds the texts.
        pairs: the texts.
        out: the Parquet file to write, with columns ``query``, ``passage``, ``negative_1``, …, rows in the order of the
            pairs. It appears when it is complete; an existing file is replaced.
        rule: which documents are negatives.
        prompt_name, prompt: the prompt to prepend to each query. Default: the prompt ``query``, but none for queries
            that begin with ``Instruct:``.
        dim, max_length, batch_tokens: as for ``Encoder.encode``.
        show_progress: show a progress bar on standard error.

    Raises:
        InputError: no row gets negatives, or an argument is out of range.
    """
    out = local_path(out)
    options = {"dim": dim, "max_length": max_length, "batch_tokens": batch_tokens}
    with (
        new_file(out, sync=True) as stream,
        tempfile.TemporaryFile() as file,
        _Embed(model, options, len(pairs.queries) + len(pairs.documents), show_progress) as embed,
    ):
        documents_nd = _embed_to_disk(embed, pairs.documents, model.prompts["document"], file)
        queries = _with_prompt(model, pairs.queries, prompt_name, prompt)
        negatives_qk = np.concatenate(
            [
                _negatives(pairs, start, embed(queries[start:stop], ""), documents_nd, rule)
                for start, stop in _chunks(pairs, rule)
            ]
        )
        good_r = pairs.query_r >= 0
        found_r = good_r & (negatives_qk[pairs.query_r, 0] >= 0)
        if not found_r.any():
            raise InputError(
                f"no query of {pairs.file} has {rule.negatives} passages of ranks {rule.first},{rule.last} that score "
                "low enough: ask for fewer negatives, for other ranks or for a larger margin, or add a corpus"
            )
        _write(stream, pairs, np.flatnonzero(found_r), negatives_qk)
    written, good = int(found_r.sum()), int(good_r.sum())
    return Mined(written, good - written, len(good_r) - good, len(pairs.documents))


def _with_prompt(model: Encoder, queries: list[str], name: str | None, prompt: str | None) -> list[str]:
    if name is None and prompt is None:
        prefix = model.prompts["query"]
        return [query if query.startswith(INSTRUCTION) else prefix + query for query in queries]
    prefix = pick_prompt(model.prompts, None, name, prompt)
    return [prefix + query for query in queries]


class _Embed:
    """Embeds texts with a single progress bar, and warns at the end about truncated ones."""

    def __init__(self, model: Encoder, options: dict[str, Any], total: int, show_progress: bool):
        self._model = model
        self._options = options
        self._truncated = 0
        self._bar = tqdm(total=total, desc="embedding", unit="text", smoothing=0, disable=not show_progress)

    def __enter__(self) -> _Embed:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._bar.close()
        if self._truncated and kind is None:
            limit = self._options["max_length"] or self._model.max_length
            warn(f"{self._truncated} of {self._bar.total} texts were longer than {limit} tokens and were truncated")

    def __call__(self, texts: list[str], prompt: str) -> np.ndarray:
        """Embeds texts: float32 [texts, dim]."""
        so_far = Done(0, 0, 0)

        def advance(done: Done) -> None:
            nonlocal so_far
            self._bar.update(done.texts - so_far.texts)
            so_far = done

        embeddings = self._model.encode(texts, prompt=prompt, on_batch=advance, **self._options)
        self._truncated += so_far.truncated
        return embeddings


def _embed_to_disk(embed: _Embed, documents: list[str], prompt: str, file: BinaryIO) -> np.ndarray:
    """Embeds documents; returns a memory map of the embeddings, float32 [documents, dim]."""
    for start in range(0, len(documents), _ENCODE_TEXTS):
        embeddings_nd = embed(documents[start : start + _ENCODE_TEXTS], prompt)
        embeddings_nd.tofile(file)
    file.flush()
    return np.memmap(file, np.float32, "r", shape=(len(documents), embeddings_nd.shape[1]))


def _chunks(pairs: Pairs, rule: Rule) -> Iterator[tuple[int, int]]:
    """The queries to compare at a time, from … to: as many as ``_QUERIES`` and ``_NEAREST`` allow, at least one."""
    _, query_p, _ = pairs.positives(0, len(pairs.queries))
    nearest_q = rule.last + np.maximum.accumulate(np.bincount(query_p))
    start = 0
    while start < len(nearest_q):
        nearest_c = nearest_q[start : start + _QUERIES]
        fits_c = nearest_c * np.arange(1, len(nearest_c) + 1) <= _NEAREST
        stop = start + max(1, int(fits_c.sum()))  # both factors ascend
        yield start, stop
        start = stop


def _negatives(pairs: Pairs, start: int, query_qd: np.ndarray, documents_nd: np.ndarray, rule: Rule) -> np.ndarray:
    """``rule.select`` for the queries from ``start`` on: int64 [queries, negatives]."""
    keys_p, query_p, document_p = pairs.positives(start, start + len(query_qd))
    first_q, count_q = np.unique(query_p, return_index=True, return_counts=True)[1:]
    score_p = np.einsum("pd,pd->p", query_qd[query_p - start], documents_nd[document_p])
    scores_qk, numbers_qk = nearest(query_qd, _blocks(documents_nd), rule.last + int(count_q.max()))
    query_q = np.arange(start, start + len(query_qd))
    positive_qk = np.isin(pairs.key(query_q[:, None], numbers_qk), keys_p)
    return rule.select(scores_qk, numbers_qk, positive_qk, np.minimum.reduceat(score_p, first_q))


def _blocks(documents_nd: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(documents_nd), _BLOCK):
        yield documents_nd[start : start + _BLOCK]


def _write(stream: BinaryIO, pairs: Pairs, rows: np.ndarray, negatives_qk: np.ndarray) -> None:
    names = released_columns(negatives_qk.shape[1])
    with parquet.ParquetWriter(stream, pyarrow.schema([(name, pyarrow.string()) for name in names])) as writer:
        for start in range(0, len(rows), _GROUP_ROWS):
            row_g = rows[start : start + _GROUP_ROWS]
            query_g = pairs.query_r[row_g]
            columns = [[pairs.queries[number] for number in query_g]]
            for document_g in (pairs.passage_r[row_g], *negatives_qk[query_g].T):
                columns.append([pairs.documents[number] for number in document_g])
            writer.write_table(pyarrow.table(dict(zip(names, columns, strict=True)), writer.schema))
