"""Scores of rankings and of bitext mining."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from f2llm_jax.evaluation import optional

# The depth to which rankings are evaluated.
DEPTH = 100

RETRIEVAL_METRICS = ("ndcg@10", "mrr@10", "recall@1", "recall@10", f"recall@{DEPTH}")
BITEXT_METRICS = ("accuracy", "f1", "accuracy_back", "f1_back", "xsim", "xsim_back")

# Neighbours over which the margin is computed, as in LASER's xsim.
MARGIN_NEIGHBOURS = 4


def retrieval_scores(
    qrels: Mapping[str, Mapping[str, int]], run: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """Mean scores over the judged queries, by trec_eval's code (``pytrec_eval``), which MTEB also uses.

    Documents are ranked by score, then by id, the greater string first. A document without a judgement counts as not
    relevant; a judged query that is not in the run counts as 0.

    Args:
        qrels: {query id: {document id: grade}}.
        run: {query id: {document id: score}}, at least the top ``DEPTH`` documents of each query.

    Returns:
        {metric: score} for ``RETRIEVAL_METRICS``.
    """
    pytrec_eval = optional("pytrec_eval")
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", f"recall.1,10,{DEPTH}", "recip_rank"})
    queries = evaluator.evaluate(run).values()
    sums = {
        "ndcg@10": sum(query["ndcg_cut_10"] for query in queries),
        # trec_eval has the reciprocal rank only without a cutoff; beyond rank 10 it is below 1/10.
        "mrr@10": sum(query["recip_rank"] for query in queries if query["recip_rank"] >= 1 / 10),
        **{f"recall@{k}": sum(query[f"recall_{k}"] for query in queries) for k in (1, 10, DEPTH)},
    }
    return {metric: sums[metric] / len(qrels) for metric in RETRIEVAL_METRICS}


def bitext_scores(forward: tuple[np.ndarray, np.ndarray], backward: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    """Scores of bitext mining, where sentence i on one side is the translation of sentence i on the other.

    Args:
        forward: for each sentence of the first side, its nearest neighbours on the second: cosines float32 and indices
            int64, both [n, MARGIN_NEIGHBOURS] (or [n, n] if n is smaller), best first.
        backward: the same for the second side.

    Returns:
        {metric: score} for ``BITEXT_METRICS``. ``accuracy`` and ``f1`` rank by cosine, as in MTEB's BitextMining;
        ``xsim`` is the error rate by ratio margin, as in LASER's xsim (lower is better); ``_back`` is from the second
        side to the first.
    """
    scores = {}
    for name, (cosine_nk, number_nk), (other_nk, _) in (("", forward, backward), ("_back", backward, forward)):
        found = number_nk[:, 0]
        correct = found == np.arange(len(found))
        margin_nk = cosine_nk / ((cosine_nk.mean(axis=1)[:, None] + other_nk.mean(axis=1)[number_nk]) / 2)
        best = np.take_along_axis(number_nk, margin_nk.argmax(axis=1)[:, None], axis=1)[:, 0]
        scores["accuracy" + name] = float(correct.mean())
        # Each sentence is its own class: recall is 0 or 1, precision is 1 / the number of times that it was found.
        scores["f1" + name] = float((2 * correct / (1 + np.bincount(found, minlength=len(found)))).mean())
        scores["xsim" + name] = float((best != np.arange(len(best))).mean())
    return {metric: scores[metric] for metric in BITEXT_METRICS}
