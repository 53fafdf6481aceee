"""Evaluation on your own data: every model encodes once, and every size and output is scored from that."""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from f2llm_jax.errors import InputError
from f2llm_jax.evaluation import optional
from f2llm_jax.evaluation.data import RetrievalData, read_bitext, read_retrieval
from f2llm_jax.evaluation.embedders import Embedder
from f2llm_jax.evaluation.metrics import (
    BITEXT_METRICS,
    DEPTH,
    MARGIN_NEIGHBOURS,
    RETRIEVAL_METRICS,
    bitext_scores,
    retrieval_scores,
)
from f2llm_jax.evaluation.ranking import OUTPUTS, bytes_per_vector, rank

# Documents encoded at a time: memory holds only their texts, and embeddings go to disk.
ENCODE_BLOCK = 16384


@dataclasses.dataclass(frozen=True)
class Row:
    """The scores of one model at one size and with one output.

    Attributes:
        model: its name.
        dtype: the dtype that the model computes in.
        output: the form in which embeddings are compared, one of ``ranking.OUTPUTS``.
        dim: how many values of each embedding are kept.
        bytes_per_vector: bytes per stored document.
        scores: {metric: mean over the data}.
    """

    model: str
    dtype: str
    output: str
    dim: int
    bytes_per_vector: int
    scores: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of an evaluation.

    Attributes:
        task: ``retrieval`` or ``bitext``.
        data: name of the data.
        metrics: names of the scores, the main one first.
        sizes: numbers of queries, documents and judgements, or of pairs.
        prompts: {model: {role: prompt}}.
        rows: the scores, by model, output and size.
    """

    task: str
    data: str
    metrics: tuple[str, ...]
    sizes: dict[str, int]
    prompts: dict[str, dict[str, str]]
    rows: list[Row]


def evaluate_retrieval(
    models: Iterable[Embedder],
    folder: str | Path,
    *,
    split: str = "test",
    judged_only: bool = False,
    ignore_identical_ids: bool = False,
    dims: Sequence[int | None] = (None,),
    outputs: Sequence[str] = ("float32",),
) -> Report:
    """``score_retrieval`` on a folder in BEIR's layout.

    Args:
        models, dims, outputs: as for ``score_retrieval``.
        folder, split, judged_only, ignore_identical_ids: as for ``read_retrieval``.

    Raises:
        InputError: the data cannot be used (see ``read_retrieval``), or a size or output is out of range.
    """
    data = read_retrieval(folder, split=split, judged_only=judged_only, ignore_identical_ids=ignore_identical_ids)
    return score_retrieval(models, str(folder), data, dims=dims, outputs=outputs)


def score_retrieval(
    models: Iterable[Embedder],
    name: str,
    data: RetrievalData,
    *,
    dims: Sequence[int | None] = (None,),
    outputs: Sequence[str] = ("float32",),
) -> Report:
    """Retrieval: nDCG@10, MRR@10, recall at 1, 10 and 100.

    Each model encodes queries and documents once, at its full size. The embeddings of the documents are kept in a
    temporary file (documents · size · 4 bytes); memory holds the queries, the ids and one block.

    Args:
        models: from ``load_embedder``; each is used and released before the next is requested, so an iterator can load
            them one by one.
        name: name of the data, for the report.
        data: from ``read_retrieval``.
        dims: sizes to truncate to, None for the full size; at most the size of the first model. Sizes above that of
            another model are left out for that model, with a warning.
        outputs: one or more of ``ranking.OUTPUTS``.

    Raises:
        InputError: a size or output is out of range.
    """
    optional("pytrec_eval")  # needed for the scores: fails now and not after all the encoding
    sizes = {
        "queries": len(data.query_ids),
        "documents": len(data.document_ids),
        "judgements": sum(map(len, data.qrels.values())),
    }
    depth = DEPTH + data.ignore_identical_ids  # one document may be left out
    rows: list[Row] = []
    prompts = {}
    for model in models:
        settings = _settings(model, dims, outputs, strict=not rows)
        queries_qd = model.encode(data.queries, "query")
        with tempfile.TemporaryFile() as file:
            documents_nd = _encode_to_disk(model, data.documents(), file)
            for output, dim in settings:
                found = rank(queries_qd, documents_nd, depth, dim=dim, output=output)
                rows.append(_row(model, output, dim, retrieval_scores(data.qrels, _run(data, *found))))
        prompts[model.name] = {role: model.prompts[role] for role in ("query", "document")}
        del model  # before the next is loaded
    return Report("retrieval", name, RETRIEVAL_METRICS, sizes, prompts, rows)


def evaluate_bitext(
    models: Iterable[Embedder],
    file: str | Path,
    *,
    columns: tuple[str, str] | None = None,
    dims: Sequence[int | None] = (None,),
    outputs: Sequence[str] = ("float32",),
) -> Report:
    """``score_bitext`` on a file of pairs.

    Args:
        models, dims, outputs: as for ``score_retrieval``.
        file, columns: as for ``read_bitext``.

    Raises:
        InputError: the data cannot be used (see ``read_bitext``), or a size or output is out of range.
    """
    return score_bitext(models, str(file), read_bitext(file, columns=columns), dims=dims, outputs=outputs)


def score_bitext(
    models: Iterable[Embedder],
    name: str,
    pairs: tuple[list[str], list[str]],
    *,
    dims: Sequence[int | None] = (None,),
    outputs: Sequence[str] = ("float32",),
) -> Report:
    """Bitext mining: whether each sentence finds its translation among all.

    Args:
        models, name, dims, outputs: as for ``score_retrieval``.
        pairs: from ``read_bitext``.

    Raises:
        InputError: a size or output is out of range.
    """
    first, second = pairs
    rows: list[Row] = []
    prompts = {}
    for model in models:
        settings = _settings(model, dims, outputs, strict=not rows)
        first_nd, second_nd = (model.encode(side, "bitext") for side in (first, second))
        for output, dim in settings:
            forward = rank(first_nd, second_nd, MARGIN_NEIGHBOURS, dim=dim, output=output)
            backward = rank(second_nd, first_nd, MARGIN_NEIGHBOURS, dim=dim, output=output)
            rows.append(_row(model, output, dim, bitext_scores(forward, backward)))
        prompts[model.name] = {"bitext": model.prompts["bitext"]}
        del model  # before the next is loaded
    return Report("bitext", name, BITEXT_METRICS, {"pairs": len(first)}, prompts, rows)


def parse_dims(text: str) -> list[int | None]:
    """Sizes from a command line, such as ``8,16,full``; ``full`` is None.

    Raises:
        InputError: one of them is not a whole number above 0.
    """
    dims: list[int | None] = []
    for part in text.split(","):
        part = part.strip()
        if part != "full" and (not part.isdecimal() or int(part) < 1):
            raise InputError(f"a dimension is a whole number above 0, or full, not {part!r}")
        dims.append(None if part == "full" else int(part))
    return dims


def parse_outputs(text: str) -> list[str]:
    """Outputs from a command line, such as ``float32,int8``.

    Raises:
        InputError: one of them is not in ``ranking.OUTPUTS``.
    """
    outputs = [part.strip() for part in text.split(",")]
    _check_outputs(outputs)
    return outputs


def _check_outputs(outputs: Sequence[str]) -> None:
    for output in outputs:
        if output not in OUTPUTS:
            raise InputError(f"no output {output!r}; there are {', '.join(OUTPUTS)}")


def _settings(
    model: Embedder, dims: Sequence[int | None], outputs: Sequence[str], *, strict: bool
) -> list[tuple[str, int]]:
    """All outputs at all sizes, ascending; sizes above the model's are left out, or an InputError if ``strict``."""
    _check_outputs(outputs)
    sizes = sorted({model.dim if dim is None else dim for dim in dims})
    too_large = [dim for dim in sizes if not 1 <= dim <= model.dim]
    if too_large and strict:
        raise InputError(f"a dimension of {model.name} must be within 1..{model.dim}, not {too_large[0]}")
    if too_large:
        left_out = ", ".join(map(str, too_large))
        warnings.warn(f"{model.name} has {model.dim} dimensions; left out: {left_out}", stacklevel=3)
    sizes = [dim for dim in sizes if dim not in too_large]
    return [(output, dim) for output in dict.fromkeys(outputs) for dim in sizes]


def _encode_to_disk(model: Embedder, documents: Iterator[str], file: BinaryIO) -> np.ndarray:
    """The embeddings of all documents as a memory map, float32 [documents, model.dim]."""
    count = 0
    while block := list(islice(documents, ENCODE_BLOCK)):
        model.encode(block, "document").astype(np.float32).tofile(file)
        count += len(block)
    file.flush()
    return np.memmap(file, np.float32, "r", shape=(count, model.dim))


def _run(data: RetrievalData, score_qk: np.ndarray, number_qk: np.ndarray) -> dict[str, dict[str, float]]:
    """{query id: {document id: score}} of the top ``DEPTH`` documents of each query."""
    run = {}
    for query, score_k, number_k in zip(data.query_ids, score_qk, number_qk, strict=True):
        scores = {data.document_ids[number]: float(score) for score, number in zip(score_k, number_k, strict=True)}
        if data.ignore_identical_ids:
            scores.pop(query, None)
        run[query] = dict(islice(scores.items(), DEPTH))
    return run


def _row(model: Embedder, output: str, dim: int, scores: dict[str, float]) -> Row:
    return Row(model.name, model.dtype, output, dim, bytes_per_vector(output, dim), scores)
