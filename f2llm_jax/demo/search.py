"""Search across languages: each held-out text of the demo is a query against those in other languages."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from f2llm_jax.demo.texts import Text, descriptions, held_out_sentences, programs
from f2llm_jax.display import isolate, one_line, shorten
from f2llm_jax.embedding import matryoshka
from f2llm_jax.encoder import Encoder

CODE_SEARCH = "code search"

# The queries shown in full, as (meaning, group): sentences in five scripts, and the description of a program.
SHOWN = (
    ("p135", "Korean"),
    ("p131", "Arabic"),
    ("p133", "Japanese"),
    ("p134", "Hindi"),
    ("p132", "English"),
    ("c03", CODE_SEARCH),
)
TOP = 3


@dataclasses.dataclass(frozen=True)
class Search:
    """Queries, documents, and their similarities at every Matryoshka size.

    The candidates of a query are the documents in other languages; the right ones are those with the same meaning.

    Attributes:
        queries: sentences in every language, and descriptions of programs.
        documents: the same sentences, and the programs.
        groups: {language, or ``CODE_SEARCH`` for descriptions: indices of the queries}.
        scores: {dim: cosine similarities [queries, documents]}, dims ascending; -inf for documents that are not
            candidates.
        right_qn: bool [queries, documents], whether a document is right for a query.
    """

    queries: list[Text]
    documents: list[Text]
    groups: dict[str, np.ndarray]
    scores: dict[int, np.ndarray]
    right_qn: np.ndarray

    def hit_rate(self, group_q: np.ndarray, dim: int) -> float:
        """The share of these queries whose top document is a right one."""
        best_q = self.scores[dim][group_q].argmax(axis=1)
        return float(self.right_qn[group_q, best_q].mean())

    def chance(self, group_q: np.ndarray) -> float:
        """The hit rate of a model that draws a candidate at random."""
        candidates_qn = np.isfinite(next(iter(self.scores.values()))[group_q])
        return float((self.right_qn[group_q].sum(axis=1) / candidates_qn.sum(axis=1)).mean())

    @property
    def everybody(self) -> np.ndarray:
        """The indices of all queries."""
        return np.arange(len(self.queries))

    def first_right(self, query: int, dim: int) -> int:
        """The rank of the best right document, counted from 1."""
        scores_n = self.scores[dim][query]
        return 1 + int((scores_n > scores_n[self.right_qn[query]].max()).sum())


def search(model: Encoder, *, show_progress: bool = False) -> Search:
    """Embeds the held-out sentences and the programs, and compares each text with those in other languages."""
    sentences = held_out_sentences()
    queries = [*sentences, *descriptions()]
    documents = [*sentences, *programs()]
    query_qd = model.encode_query([query.text for query in queries], show_progress=show_progress)
    document_nd = model.encode_document([document.text for document in documents], show_progress=show_progress)

    names = [*(query.language for query in sentences), *(CODE_SEARCH for _ in descriptions())]
    groups = {name: np.flatnonzero(np.array(names) == name) for name in dict.fromkeys(names)}
    languages_n = np.array([document.language for document in documents])
    candidate_qn = np.stack([languages_n != query.language for query in queries])
    meanings_n = np.array([document.meaning for document in documents])
    right_qn = candidate_qn & np.stack([meanings_n == query.meaning for query in queries])

    dims = model.config.matryoshka_dims
    query_heads, document_heads = (matryoshka(jnp.asarray(x), dims) for x in (query_qd, document_nd))
    scores = {
        dim: np.where(candidate_qn, np.asarray(query_heads[dim] @ document_heads[dim].T), -np.inf) for dim in dims
    }
    return Search(queries, documents, groups, scores, right_qn)


def report(result: Search, columns: int) -> Iterator[str]:
    """The lines to print on a terminal of this width."""
    for meaning, group in SHOWN:
        query = next(number for number in result.groups[group] if result.queries[number].meaning == meaning)
        yield from _query_lines(result, group, query, columns)
    yield "Right at first rank, % of queries, by Matryoshka size:"
    yield ""
    yield from _hit_rate_lines(result)


def _query_lines(result: Search, group: str, query: int, columns: int) -> Iterator[str]:
    full = max(result.scores)
    yield f"{group}: {isolate(shorten(one_line(result.queries[query].text), columns - len(group) - 2))}"
    yield f"{'rank':>6}{'score':>8}  {'language':9} text"
    for rank, number in enumerate(np.argsort(-result.scores[full][query], kind="stable")[:TOP], start=1):
        document = result.documents[number]
        mark = "*" if result.right_qn[query, number] else " "
        found = shorten(one_line(document.text), columns - 26)
        yield f"{mark}{rank:5d}{result.scores[full][query, number]:8.3f}  {document.language:9} {isolate(found)}"
    ranks = ", ".join(f"{result.first_right(query, dim)} at {dim}" for dim in result.scores)
    yield f"  rank of the first right text, by dim: {ranks}"
    yield ""


def _hit_rate_lines(result: Search) -> Iterator[str]:
    yield f"{'query':12}" + "".join(f"{dim:>7}" for dim in result.scores) + f"{'chance':>9}"
    groups = result.groups | {"all": result.everybody}
    for name, group_q in groups.items():
        rates = "".join(f"{100 * result.hit_rate(group_q, dim):7.1f}" for dim in result.scores)
        yield f"{name:12}{rates}{100 * result.chance(group_q):9.2f}"
