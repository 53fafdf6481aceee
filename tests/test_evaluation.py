"""Evaluation on data of one's own: metrics against a second library, rankings against brute force, errors by name."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import tracemalloc
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import jax
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from sentence_transformers import SentenceTransformer

import f2llm_jax as f2llm
from f2llm_jax import search
from f2llm_jax.cli import main
from f2llm_jax.commands import evaluate
from f2llm_jax.evaluation import embedders, metrics, own_data, ranking
from f2llm_jax.evaluation.data import read_bitext, read_retrieval
from f2llm_jax.evaluation.embedders import F2LLMEmbedder, load_embedder, role_prompts, translation_prompt
from f2llm_jax.evaluation.metrics import RETRIEVAL_METRICS, bitext_scores, retrieval_scores
from f2llm_jax.evaluation.own_data import evaluate_bitext, evaluate_retrieval, parse_dims
from f2llm_jax.evaluation.ranking import OUTPUTS, cosines, rank
from f2llm_jax.evaluation.report import plot, table

DOCUMENTS = {"a": "the quick brown fox", "b": "jumps over", "c": "the lazy dog", "d": "retrieve the dog", "e": "fox"}
QUERIES = {"1": "a quick fox", "2": "which dog is lazy", "3": "who jumps"}
TRANSLATIONS = "Instruct: Retrieve translations of the following text.\nQuery: "
QRELS = [("1", "a", 2), ("1", "e", 1), ("2", "c", 1), ("2", "d", 0), ("3", "b", 1)]


class Fixed:
    """An embedder of given vectors: texts are row numbers."""

    def __init__(self, vectors: np.ndarray, name: str = "fixed"):
        self.prompts = {"query": "", "document": "", "bitext": ""}
        self.name, self.dtype, self.dim, self.calls = name, "float32", vectors.shape[1], 0
        self._vectors = ranking.unit(vectors).astype(np.float32)

    def encode(self, texts: Sequence[str], role: str) -> np.ndarray:
        self.calls += 1
        return self._vectors[[int(text) for text in texts]]


def write_beir(
    folder: Path,
    documents: dict[str, str] = DOCUMENTS,
    queries: dict[str, str] = QUERIES,
    qrels: Sequence[tuple[str, str, int]] = QRELS,
) -> Path:
    (folder / "qrels").mkdir(parents=True)
    write_jsonl(folder / "corpus.jsonl", [{"_id": key, "title": "", "text": text} for key, text in documents.items()])
    write_jsonl(folder / "queries.jsonl", [{"_id": key, "text": text} for key, text in queries.items()])
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in qrels)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    return folder


def write_jsonl(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


# Metrics


def random_run(seed: int) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, float]]]:
    """Graded judgements and a run with many equal scores, documents nobody judged, and a query without results."""
    rng = np.random.default_rng(seed)
    documents = [f"d{number}" for number in range(200)]
    qrels, run = {}, {}
    for query in map(str, range(40)):
        judged = rng.choice(documents, 12, replace=False)
        qrels[query] = {str(document): int(rng.integers(0, 4)) for document in judged}
        qrels[query][str(judged[0])] = 1
        found = rng.choice(documents, 120, replace=False)
        run[query] = {str(d): float(rng.integers(0, 20)) / 4 + 2 * qrels[query].get(d, 0) for d in found}
    del run["7"]
    return qrels, run


@pytest.mark.parametrize("seed", range(3))
def test_retrieval_metrics_agree_with_ranx(seed: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(os.environ, "NUMBA_DISABLE_JIT", "1")  # compiling takes ranx most of a minute
    import ranx

    qrels, run = random_run(seed)
    # Ties broken as documented, the greater id first: ranx leaves them to the order that they are given in.
    ordered = {query: sorted(run.get(query, {}).items(), key=lambda item: (item[1], item[0])) for query in qrels}
    untied = {query: {d: float(place) for place, (d, _) in enumerate(items)} for query, items in ordered.items()}
    untied["7"] = {"not in the corpus": 1.0}
    expected = ranx.evaluate(ranx.Qrels(qrels), ranx.Run(untied), list(RETRIEVAL_METRICS))
    ours = retrieval_scores(qrels, run)
    assert list(ours) == list(RETRIEVAL_METRICS)
    assert ours == pytest.approx(expected, abs=1e-12)
    assert all(0 < score < 1 for score in ours.values())


def test_a_query_without_results_counts_as_zero():
    scores = retrieval_scores({"1": {"a": 1}, "2": {"a": 1}}, {"1": {"a": 1.0}})
    assert set(scores.values()) == {0.5}


def test_reciprocal_rank_ends_at_ten():
    run = {"1": {f"d{place:02}": -float(place) for place in range(20)}}
    assert retrieval_scores({"1": {"d09": 1}}, run)["mrr@10"] == pytest.approx(0.1)
    assert retrieval_scores({"1": {"d10": 1}}, run)["mrr@10"] == 0


def test_bitext_scores_by_brute_force():
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(0)
    first, noise = rng.normal(size=(2, 60, 8))
    second = first + 0.9 * noise
    cosine = cosines(first, second).astype(np.float64)
    ours = bitext_scores(rank(first, second, 4, dim=8), rank(second, first, 4, dim=8))
    # LASER's xsim: of the 4 nearest, the one with the largest cosine over the mean of both sides' 4 nearest.
    for name, cosine_nm in (("", cosine), ("_back", cosine.T)):
        mean_n, mean_m = (np.sort(c, axis=1)[:, -4:].mean(axis=1) for c in (cosine_nm, cosine_nm.T))
        margin = cosine_nm / ((mean_n[:, None] + mean_m) / 2)
        margin[cosine_nm < np.sort(cosine_nm, axis=1)[:, -4][:, None]] = -np.inf
        numbers = np.arange(60)
        assert ours["xsim" + name] == pytest.approx(np.mean(margin.argmax(axis=1) != numbers))
        found = cosine_nm.argmax(axis=1)
        assert ours["accuracy" + name] == pytest.approx(np.mean(found == numbers))
        assert ours["f1" + name] == pytest.approx(f1_score(numbers, found, average="weighted", zero_division=0))
    assert 0.2 < ours["accuracy"] < 0.9 and ours["xsim"] != 1 - ours["accuracy"]


# Rankings


@pytest.fixture
def vectors() -> tuple[np.ndarray, np.ndarray]:
    queries, documents = np.split(np.random.default_rng(1).normal(size=(330, 24)).astype(np.float32), [30])
    documents[200] = documents[17]  # equal scores everywhere
    return ranking.unit(queries).astype(np.float32), ranking.unit(documents).astype(np.float32)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("dim", [10, 24])
def test_rankings_are_exact_in_any_blocks(output: str, dim: int, vectors, monkeypatch: pytest.MonkeyPatch):
    queries, documents = vectors
    whole = rank(queries, documents, 5, dim=dim, output=output)
    head_q, head_d = (ranking.unit(x[:, :dim]).astype(np.float32) for x in (queries, documents))
    signs_q, signs_d = (np.where(x > 0, 1.0, -1.0) for x in (head_q, head_d))
    hamming = (signs_q[:, None] != signs_d).sum(axis=2)
    if output == "int8":
        ranges = f2llm.int8_ranges(head_d)
        codes = f2llm.quantize(head_d, "int8", ranges).astype(np.float64)
        score = cosines(head_q, ranges[0] + (codes + 128.5) * (ranges[1] - ranges[0]) / 255)
    elif output == "float32":
        score = cosines(head_q, head_d)
    else:
        score = (dim - 2.0 * hamming).astype(np.float32)
    if output == "rescored":
        candidates = np.argsort(hamming, axis=1, kind="stable")[:, :20]
        rescored = np.full(score.shape, -np.inf, np.float32)
        fine = (head_q.astype(np.float64) @ signs_d.T).astype(np.float32)
        np.put_along_axis(rescored, candidates, np.take_along_axis(fine, candidates, axis=1), axis=1)
        score = rescored
    expected = np.argsort(-score, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(whole[1], expected)
    if output != "rescored":
        np.testing.assert_allclose(whole[0], np.take_along_axis(score, expected, axis=1), atol=1e-6)
    monkeypatch.setattr(ranking, "DOCUMENT_BLOCK", 7)
    monkeypatch.setattr(search, "SCORES", 4 * 7)  # and four queries at a time
    for part, again in zip(whole, rank(queries, documents, 5, dim=dim, output=output), strict=True):
        np.testing.assert_array_equal(part, again)


def test_the_help_says_how_many_are_scored_again():
    retrieval, bitext = (ranking.RESCORE_FACTOR * top for top in (metrics.DEPTH, metrics.MARGIN_NEIGHBOURS))
    assert f"binary search for {retrieval} candidates (--bitext: {bitext})," in str(evaluate.__doc__)


def test_fewer_documents_than_asked_for(vectors):
    scores, numbers = rank(vectors[0], vectors[1][:3], 100, dim=24)
    assert scores.shape == numbers.shape == (30, 3)
    assert (np.sort(numbers, axis=1) == [0, 1, 2]).all()


# Sweeps


def test_one_encoding_serves_all_sizes_and_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(2)
    vectors = rng.normal(size=(80, 16))
    vectors[:20] += 1.5 * vectors[20:40]  # query i is near document i
    folder = write_beir(
        tmp_path / "data",
        {f"d{i}": str(20 + i) for i in range(60)},
        {f"q{i}": str(i) for i in range(20)},
        [(f"q{i}", f"d{i}", 1) for i in range(20)],
    )
    monkeypatch.setattr(own_data, "ENCODE_BLOCK", 25)
    model = Fixed(vectors)
    report = evaluate_retrieval([model], folder, dims=[4, None, 16, 8], outputs=["float32", "binary"])
    assert model.calls == 1 + 3  # the queries, and the documents in blocks of 25
    settings = [(row.output, row.dim, row.bytes_per_vector) for row in report.rows]
    full = [("float32", 4, 16), ("float32", 8, 32), ("float32", 16, 64)]
    assert settings == [*full, ("binary", 4, 1), ("binary", 8, 1), ("binary", 16, 2)]
    for row in report.rows[:3]:
        similarity = cosines(vectors[:20, : row.dim], vectors[20:, : row.dim])
        place = (similarity > np.diag(similarity)[:, None]).sum(axis=1)
        assert row.scores["recall@10"] == pytest.approx(np.mean(place < 10))
        assert row.scores["mrr@10"] == pytest.approx(np.mean(np.where(place < 10, 1 / (place + 1), 0)))
        assert row.scores["ndcg@10"] == pytest.approx(np.mean(np.where(place < 10, 1 / np.log2(place + 2), 0)))
    assert report.sizes == {"queries": 20, "documents": 60, "judgements": 20}


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Endless(Fixed):
        def encode(self, texts: Sequence[str], role: str) -> np.ndarray:
            return np.random.default_rng(len(texts)).normal(size=(len(texts), self.dim)).astype(np.float32)

    monkeypatch.setattr(own_data, "ENCODE_BLOCK", 2048)
    monkeypatch.setattr(ranking, "DOCUMENT_BLOCK", 2048)
    count, dim = 50_000, 512  # 102 MB of embeddings
    folder = write_beir(tmp_path / "data", {str(i): "" for i in range(count)}, {"q": ""}, [("q", "7", 1)])
    tracemalloc.start()
    evaluate_retrieval([Endless(np.zeros((1, dim)))], folder, dims=[8, None], outputs=OUTPUTS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6


def on_a_circle(folder: Path, relevant: int) -> tuple[Fixed, Path]:
    """Two queries, the first of which is the document nearest to both, and the number of the one that answers them."""
    angles = np.arange(110) / 100
    documents = {f"d{i}": str(i) for i in range(110)}
    qrels = [(query, f"d{relevant}", 1) for query in ("d0", "other")]
    folder = write_beir(folder, documents, {"d0": "0", "other": "0"}, qrels)
    return Fixed(np.stack([np.cos(angles), np.sin(angles)], axis=1)), folder


def test_a_query_can_be_kept_out_of_its_own_ranking(tmp_path: Path, recwarn: pytest.WarningsRecorder):
    model, folder = on_a_circle(tmp_path / "data", relevant=1)
    (row,) = evaluate_retrieval([model], folder, ignore_identical_ids=True).rows
    assert not recwarn.list
    assert row.scores["mrr@10"] == (1 + 1 / 2) / 2  # the second query is no document
    with pytest.warns(UserWarning, match=r"1 of 2 queries have the id of a document, the first is 'd0'; .*--ignore"):
        (row,) = evaluate_retrieval([model], folder).rows
    assert row.scores["mrr@10"] == 1 / 2


@pytest.mark.parametrize("output", OUTPUTS)
def test_without_the_query_itself_a_ranking_is_as_deep(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs = []
    monkeypatch.setattr(
        own_data, "retrieval_scores", lambda qrels, run: runs.append(run) or retrieval_scores(qrels, run)
    )
    model, folder = on_a_circle(tmp_path / "data", relevant=100)
    (row,) = evaluate_retrieval([model], folder, outputs=[output], ignore_identical_ids=True).rows
    assert {query: len(found) for query, found in runs[0].items()} == {"d0": 100, "other": 100}
    assert "d0" not in runs[0]["d0"] and "d0" in runs[0]["other"]
    if output == "float32":
        assert list(runs[0]["d0"]) == [f"d{i}" for i in range(1, 101)]
        assert row.scores["recall@100"] == 1 / 2


@pytest.mark.parametrize("score", ["retrieval", "bitext"])
def test_a_model_is_let_go_of_before_the_next_is_loaded(score: str, tmp_path: Path):
    loaded: list[weakref.ref] = []

    def models() -> Iterator[Fixed]:
        for name in ("first", "second"):
            assert all(model() is None for model in loaded)
            model = Fixed(np.ones((2, 2)), name)
            loaded.append(weakref.ref(model))
            yield model
            del model

    if score == "retrieval":
        evaluate_retrieval(models(), write_beir(tmp_path / "data", {"a": "0", "b": "1"}, {"1": "0"}, [("1", "a", 1)]))
    else:
        evaluate_bitext(models(), write_jsonl(tmp_path / "pairs.jsonl", [{"a": "0", "b": "1"}]))
    assert len(loaded) == 2


def test_sizes_that_only_the_other_model_lacks_are_left_out(tmp_path: Path):
    folder = write_beir(tmp_path / "data", {"a": "0", "b": "1"}, {"1": "0"}, [("1", "a", 1)])
    large, small = Fixed(np.eye(2, 8), "large"), Fixed(np.eye(2, 4), "small")
    with pytest.warns(UserWarning, match="small has 4 dimensions; left out: 8"):
        report = evaluate_retrieval([large, small], folder, dims=[2, 8])
    assert [(row.model, row.dim) for row in report.rows] == [("large", 2), ("large", 8), ("small", 2)]


def test_the_release_prompts_are_used(tiny: f2llm.Encoder, tmp_path: Path):
    folder = write_beir(tmp_path / "data")
    report = evaluate_retrieval([F2LLMEmbedder("tiny", tiny)], folder)
    assert report.prompts == {"tiny": {"query": tiny.prompts["query"], "document": ""}}
    similarity = tiny.similarity(
        tiny.encode_query(list(QUERIES.values())), tiny.encode_document(list(DOCUMENTS.values()))
    )
    documents = list(DOCUMENTS)
    run = {q: dict(zip(documents, map(float, row), strict=True)) for q, row in zip(QUERIES, similarity, strict=True)}
    qrels: dict[str, dict[str, int]] = {}
    for query, document, grade in QRELS:
        qrels.setdefault(query, {})[document] = grade
    assert report.rows[0].scores == pytest.approx(retrieval_scores(qrels, run))


@pytest.mark.parametrize(
    "saved", [None, {"query": "find: ", "passage": "text: ", "BitextMining": "pair: "}], ids=["released", "others"]
)
def test_ours_and_sentence_transformers_agree(saved: dict[str, str] | None, copied_release: Path, tmp_path: Path):
    if saved is not None:
        (copied_release / "config_sentence_transformers.json").write_text(json.dumps({"prompts": saved}))
    folder = write_beir(tmp_path / "data")
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"a": x, "b": y} for x, y in zip("abcd", "wxyz", strict=True)])
    models = [load_embedder(name, dtype="float32") for name in (str(copied_release), f"st:{copied_release}")]
    sweep = {"dims": [8, None], "outputs": ["float32", "int8"]}
    for report in (evaluate_retrieval(models, folder, **sweep), evaluate_bitext(models, pairs, **sweep)):
        ours, other = report.rows[:4], report.rows[4:]
        assert [row.model for row in other] == [f"st:{copied_release}"] * 4
        assert [row.scores for row in ours] == [pytest.approx(row.scores) for row in other]
        ours_prompts, other_prompts = report.prompts.values()
        assert ours_prompts == other_prompts
        assert len(table(report).splitlines()) == 1 + len(report.rows)  # nothing to say of the same prompts
    assert ours_prompts["bitext"] == (saved or {}).get("BitextMining", TRANSLATIONS)
    texts = list(DOCUMENTS.values())
    expected = SentenceTransformer(str(copied_release)).encode_document(texts, normalize_embeddings=True)
    encoded = [model.encode(texts, "document") for model in models]
    for got in (*encoded, f2llm.load(copied_release).encode_document(texts)):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def test_the_same_model_is_compared_at_the_same_revision_and_instructed_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loaded = {}
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"a": "0", "b": "1"}])
    monkeypatch.setattr(embedders, "find_embedder", lambda *_: None)
    monkeypatch.setattr(own_data, "score_bitext", lambda models, *_, **__: list(models))
    monkeypatch.setattr(evaluate, "_show", lambda *_: None)
    monkeypatch.setattr(embedders, "load_embedder", lambda name, **options: loaded.update({name: options}))
    others = ["--compare", "st:a/b", "--compare", "st:c/d"]
    assert main(["evaluate", "a/b", "--bitext", str(pairs), "--revision", "r", "--instructions-of", "i", *others]) == 0
    own, same, other = ((options.get("revision"), options.get("instructions_of")) for options in loaded.values())
    assert own == same == ("r", "i") and other == (None, None)


def test_the_mesh_is_for_models_of_this_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    loaded = []
    monkeypatch.setattr(embedders, "find_embedder", lambda *_: None)
    monkeypatch.setattr(own_data, "score_bitext", lambda models, *_, **__: list(models))
    monkeypatch.setattr(own_data, "score_retrieval", lambda models, *_, **__: list(models))
    monkeypatch.setattr("f2llm_jax.evaluation.data.read_bitext", lambda *_, **__: None)
    monkeypatch.setattr("f2llm_jax.evaluation.data.read_retrieval", lambda *_, **__: None)
    monkeypatch.setattr(evaluate, "_show", lambda *_: None)
    monkeypatch.setattr(embedders, "load_embedder", lambda name, **options: loaded.append((name, options["mesh"])))
    others = ["--bitext", "x", "--retrieval", "y", "--compare", "st:a/b", "--compare", "c/d"]
    mesh = f2llm.make_mesh(data=2, fsdp=4)
    assert main(["evaluate", "a/b", *others, "--mesh", "data=2,fsdp=4"]) == 0
    assert loaded == [("a/b", mesh), ("st:a/b", None), ("c/d", mesh)] * 2
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert main(["evaluate", "a/b", *others]) == 0
    assert capsys.readouterr().err == "f2llm: one of 8 TPU devices is used; --mesh all uses all of them\n"


def test_the_home_folder_is_found_by_sentence_transformers_too(tiny_release: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tiny_release.parent))
    name = f"st:~/{tiny_release.name}"
    embedders.find_embedder(name)
    model = load_embedder(name, dtype="float32")
    assert (model.name, model.dim) == (name, 96)


def test_a_limit_on_tokens_is_for_all_models(tiny_release: Path):
    ours, other = (
        load_embedder(name, dtype="float32", max_length=3) for name in (str(tiny_release), f"st:{tiny_release}")
    )
    texts = ["the quick brown fox jumps over"]
    with pytest.warns(UserWarning, match="truncated"):
        np.testing.assert_allclose(ours.encode(texts, "document"), other.encode(texts, "document"), atol=1e-5)


def test_prompts_of_queries_and_documents():
    own = {"query": "task: search result | query: ", "document": "title: none | text: "}
    assert role_prompts("google/embeddinggemma-300m", {**own, "BitextMining": "task: x"}) == own
    # Saved without prompts; MTEB's registry knows them.
    e5 = role_prompts("intfloat/multilingual-e5-large", {"query": "", "document": ""})
    assert e5 == {"query": "query: ", "document": "passage: "}
    assert set(role_prompts("somebody/unknown", {}).values()) == {""}


def test_prompts_of_translations(tiny_release: Path):
    saved = {"BitextMining": "pair: "}
    assert translation_prompt("codefuse-ai/F2LLM-v2-80M", {}) == TRANSLATIONS
    assert translation_prompt("codefuse-ai/F2LLM-v2-80M", saved) == "pair: "
    assert translation_prompt(str(tiny_release), saved, "codefuse-ai/F2LLM-0.6B") == (
        "Instruct: Retrieve parallel sentences.\nQuery: "
    )


def test_a_peer_is_not_instructed_as_a_model_of_this_family(hub_of_settings: list, tmp_path: Path):
    assert embedders.is_instructed("codefuse-ai/F2LLM-v2-80M") and not hub_of_settings
    assert embedders.is_instructed("somebody/tuned", "main")  # the hub has a release of this kind there
    assert hub_of_settings == [("somebody/tuned", "main")]
    assert not embedders.is_instructed("Qwen/Qwen3-Embedding-0.6B")  # whose entry states none
    assert not embedders.is_instructed("LaBSE")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert not embedders.is_instructed(str(tmp_path))


# Reports


def test_table_json_and_plot(tiny_release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, results = write_beir(tmp_path / "data"), tmp_path / "results"
    arguments = ["--dims", "8,16,full", "--outputs", ",".join(OUTPUTS), "--dtype", "float32", "--results", str(results)]
    assert main(["evaluate", str(tiny_release), "--retrieval", str(folder), *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["model", "dtype", "output", "dim", "bytes", *RETRIEVAL_METRICS]
    assert len(lines) == 1 + 3 * len(OUTPUTS) + 1
    assert len({len(line) for line in lines[:-1]}) == 1
    report = json.loads((results / "retrieval.json").read_text())
    assert [row["bytes_per_vector"] for row in report["rows"]] == [32, 64, 384, 8, 16, 96] + 2 * [1, 2, 12]
    assert f"{report['rows'][0]['scores']['ndcg@10']:.4f}" == lines[1].split()[5]
    assert {row["dtype"] for row in report["rows"]} == {"float32"} == {line.split()[1] for line in lines[1:-1]}
    assert (results / "retrieval.png").read_bytes().startswith(b"\x89PNG")


def test_the_plot_shows_every_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    folder = write_beir(tmp_path / "data", {"a": "0", "b": "1"}, {"1": "0"}, [("1", "a", 1)])
    models = [Fixed(np.eye(2, 16), "one"), Fixed(np.eye(2, 32), "two")]
    plot(evaluate_retrieval(models, folder, dims=[8, None], outputs=["float32", "int8"]), tmp_path / "plot.png")
    left, right = figures[0].axes
    assert [line.get_label() for line in left.lines] == ["one, float32", "one, int8", "two, float32", "two, int8"]
    assert [list(line.get_xdata()) for line in left.lines] == [[8, 16], [8, 16], [8, 32], [8, 32]]
    assert [list(line.get_xdata()) for line in right.lines] == [[32, 64], [8, 16], [32, 128], [8, 32]]
    assert left.get_xscale() == right.get_xscale() == "log"
    top = left.child_axes[0]
    assert top.get_xlabel() == "bytes per float32 vector"
    assert [label.get_text() for label in top.get_xticklabels()] == ["128", "64", "32"]


def test_a_plot_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from matplotlib.figure import Figure

    def savefig(figure: Figure, file: Path | BinaryIO, **options: object) -> None:
        stream = file.open("wb") if isinstance(file, Path) else file
        stream.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", savefig)
    (tmp_path / "plot.png").write_bytes(b"before")
    report = evaluate_bitext([Fixed(np.ones((2, 2)))], write_jsonl(tmp_path / "pairs.jsonl", [{"a": "0", "b": "1"}]))
    with pytest.raises(OSError, match="No space left"):
        plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes() == b"before"


def test_table_keeps_long_names_apart(tmp_path: Path):
    folder = write_beir(tmp_path / "data", {"a": "0", "b": "1"}, {"1": "0"}, [("1", "a", 1)])
    report = evaluate_retrieval([Fixed(np.eye(2, 4), "/x" * 50 + "/release")], folder)
    name = table(report).splitlines()[1].split()[0]
    assert len(name) == 40 and name.startswith("…") and name.endswith("/release")


def test_table_says_what_models_compute_in_and_are_told(tmp_path: Path):
    folder = write_beir(tmp_path / "data", {"a": "0", "b": "1"}, {"1": "0"}, [("1", "a", 1)])
    path = "/x" * 50 + "/release"
    ours, other, third = (Fixed(np.eye(2, 4), name) for name in (path, f"st:{path}", "third"))
    ours.dtype, other.dtype, third.dtype = "int8", "bfloat16", "float32"
    ours.prompts["query"] = "Aufgabe: für\n"
    lines = table(evaluate_retrieval([ours, other, third], folder, outputs=["float32", "int8"])).splitlines()
    short, st_short = "…" + path[-39:], "st:…" + path[-36:]
    assert [line.split()[:3] for line in lines[1:7]] == [
        [name, dtype, output]
        for name, dtype in ((short, "int8"), (st_short, "bfloat16"), ("third", "float32"))
        for output in ("float32", "int8")
    ]
    assert lines[7:] == [
        f"prompts of {short}: query 'Aufgabe: für\\n', document none",
        f"prompts of {st_short}: query none, document none",
        "prompts of third: query none, document none",
    ]


@pytest.mark.parametrize(("dtype", "loaded"), [("int8", "bfloat16"), ("bfloat16",) * 2, ("float32",) * 2])
def test_what_a_model_computes_in(dtype: str, loaded: str, tiny_release: Path):
    assert load_embedder(str(tiny_release), dtype=dtype).dtype == dtype
    assert load_embedder(f"st:{tiny_release}", dtype=dtype).dtype == loaded


def test_bitext_command(tiny_release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "pairs.tsv"
    file.write_text('en\tother\na "fox\tder Fuchs\nthe dog\tder Hund\n', encoding="utf-8")
    arguments = ["--bitext", str(file), "--dtype", "float32", "--results", str(tmp_path)]
    assert main(["evaluate", str(tiny_release), *arguments]) == 0
    assert "xsim_back" in capsys.readouterr().out
    report = json.loads((tmp_path / "bitext.json").read_text())
    assert report["sizes"] == {"pairs": 2}
    assert report["prompts"][str(tiny_release)]["bitext"] == TRANSLATIONS


# Data


def test_every_format_reads_the_same(tmp_path: Path):
    expected = read_retrieval(write_beir(tmp_path / "jsonl"))
    columns = {
        "corpus": {"_id": list(DOCUMENTS), "title": [""] * 5, "text": list(DOCUMENTS.values())},
        "queries": {"_id": list(map(int, QUERIES)), "text": list(QUERIES.values())},
        "qrels/test": dict(zip(("query-id", "corpus-id", "score"), map(list, zip(*QRELS, strict=True)), strict=True)),
    }
    for suffix in (".parquet", ".csv", ".tsv"):
        folder = tmp_path / suffix
        (folder / "qrels").mkdir(parents=True)
        for name, values in columns.items():
            file = folder / (name + suffix)
            if suffix == ".parquet":
                parquet.write_table(pyarrow.table(values), file)
            else:
                separator = {".csv": ",", ".tsv": "\t"}[suffix]
                lines = [values, *zip(*values.values(), strict=True)]
                file.write_text("".join(separator.join(map(str, line)) + "\n" for line in lines))
        data = read_retrieval(folder)
        assert (data.query_ids, data.queries, data.qrels) == (expected.query_ids, expected.queries, expected.qrels)
        assert list(data.documents()) == list(expected.documents()) == list(DOCUMENTS.values())


def test_titles_are_joined_as_mteb_joins_them(tmp_path: Path):
    folder = write_beir(tmp_path / "data", qrels=[("1", "a", 1), ("2", "a", 1), ("3", "a", 1)])
    rows = [
        {"_id": "a", "title": "Fox", "text": " brown "},
        {"_id": "b", "title": None, "text": " x"},
        {"_id": "c", "text": ""},
    ]
    write_jsonl(folder / "corpus.jsonl", rows)
    assert list(read_retrieval(folder).documents()) == ["Fox  brown", "x", ""]


def test_unjudged_queries_can_be_left_out(tmp_path: Path):
    folder = write_beir(tmp_path / "data", qrels=QRELS[:2])
    data = read_retrieval(folder, judged_only=True)
    assert (data.query_ids, data.queries) == (["1"], [QUERIES["1"]])


def test_bitext_columns(tmp_path: Path):
    file = write_jsonl(tmp_path / "pairs.jsonl", [{"de": "der Hund", "en": "the dog", "id": "1"}])
    assert read_bitext(file, columns=("en", "de")) == (["the dog"], ["der Hund"])
    with pytest.raises(f2llm.InputError, match=r"which two of its columns \(de, en, id\)"):
        read_bitext(file)
    with pytest.raises(f2llm.InputError, match="no column 'fr'; there are de, en, id"):
        read_bitext(file, columns=("en", "fr"))


def corpus(*rows: dict) -> dict[str, list[dict]]:
    return {"corpus.jsonl": list(rows)}


def judged(score: str) -> dict:
    """A change of the judgements to one of this score."""
    line = f'{{"query-id": "1", "corpus-id": "a", "score": {score}}}\n'
    return {"qrels/test.tsv": None, "qrels/test.jsonl": line}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qrels/test.tsv": "query-id\tcorpus-id\tscore\n1\ta\t1\n"}, "2 of 3 queries have no judgement .* is '2'"),
        (corpus({"_id": "a", "text": "x"}, {"_id": "a", "text": "y"}), "corpus.jsonl: the id 'a' appears twice"),
        ({"queries.jsonl": [{"_id": 1, "text": "x"}, {"_id": "1", "text": "y"}]}, "queries.jsonl: the id '1' appears"),
        ({"corpus.jsonl": []}, "corpus.jsonl holds no documents"),
        ({"queries.jsonl": []}, "queries.jsonl holds no queries"),
        ({"qrels/test.tsv": "query-id\tcorpus-id\tscore\n"}, "test.tsv holds no judgements"),
        ({"qrels/test.tsv": "query-id\tcorpus-id\n1\ta\n"}, "test.tsv, line 2: no column 'score'"),
        ({"qrels/test.tsv": "query-id\tcorpus-id\tscore\n1\tz\t1\n"}, "line 2: there is no document 'z'"),
        ({"qrels/test.tsv": "query-id\tcorpus-id\tscore\n9\ta\t1\n"}, "line 2: there is no query '9'"),
        ({"qrels/test.tsv": "query-id\tcorpus-id\tscore\n1\ta\tyes\n"}, "the score is 'yes', not a whole number"),
        (judged("0.5"), "line 1: the score is 0.5, not a whole number"),
        (judged("Infinity"), "line 1: the score is inf, not a whole number"),
        ({"qrels/test.tsv": "query-id\tcorpus-id\tscore\n1\ta\t1\n1\ta\t0\n"}, "'1' and document 'a' are judged twice"),
        ({"qrels/test.tsv": "query-id\tcorpus-id\tscore\n1\ta\n"}, "line 2: 2 cells in a table of 3 columns"),
        ({"qrels/test.tsv": None}, "one file .*test with an ending of .* is needed; there is none of them"),
        ({"queries.csv": "_id,text\n1,x\n"}, "there is queries.jsonl and queries.csv"),
        (corpus({"text": "x"}), "corpus.jsonl, line 1: no '_id'"),
        (corpus({"_id": "a", "title": ""}, *({"_id": i, "text": ""} for i in "bcde")), "line 1: no column 'text'"),
        (corpus(*({"_id": i, "text": None} for i in "abcde")), "line 1: field 'text' is null, not a string"),
        ({"corpus.jsonl": "{"}, "corpus.jsonl, line 1: not valid JSON"),
        ({"corpus.jsonl": "[" * 100_000}, "corpus.jsonl, line 1: not valid JSON"),
        ({"corpus.jsonl": "[]"}, "corpus.jsonl, line 1: should be a JSON object, not of type list"),
    ],
)
def test_bad_data_is_named(change: dict, message: str, tmp_path: Path):
    folder = write_beir(tmp_path / "data")
    for name, content in change.items():
        if content is None:
            (folder / name).unlink()
        elif isinstance(content, str):
            (folder / name).write_text(content)
        else:
            write_jsonl(folder / name, content)
    with pytest.raises(f2llm.InputError, match=message):
        evaluate_retrieval([Fixed(np.eye(4))], folder)
    with pytest.raises(f2llm.InputError, match="nowhere is no folder"):
        read_retrieval(tmp_path / "nowhere")


@pytest.mark.parametrize("dims", [[5], [0], [2, None, 400]])
def test_a_dimension_above_hidden_is_named(dims: list[int | None], tmp_path: Path):
    folder = write_beir(tmp_path / "data")
    with pytest.raises(f2llm.InputError, match=r"a dimension of fixed must be within 1\.\.4, not (5|0|400)"):
        evaluate_retrieval([Fixed(np.eye(4))], folder, dims=dims)


def test_bad_bitext_and_options(tmp_path: Path):
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    with pytest.raises(f2llm.InputError, match="holds no pairs"):
        evaluate_bitext([], empty, columns=("a", "b"))
    with pytest.raises(f2llm.InputError, match="does not exist"):
        evaluate_bitext([], tmp_path / "nothing.tsv")
    with pytest.raises(f2llm.InputError, match="the format is none of"):
        evaluate_bitext([], tmp_path / "nothing.txt")
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(b"PAR1")
    with pytest.raises(f2llm.InputError, match="not valid Parquet"):
        evaluate_bitext([], damaged)
    binary = pyarrow.array([b"a", b"\xff"], pyarrow.binary())
    parquet.write_table(pyarrow.table({"a": binary.view(pyarrow.string()), "b": ["a", "b"]}), damaged)
    with pytest.raises(f2llm.InputError, match=r"damaged.parquet, row 1: not valid UTF-8: invalid start byte"):
        evaluate_bitext([], damaged)
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"a": "0", "b": "1"}])
    with pytest.raises(f2llm.InputError, match="no output 'int4'; there are float32, int8, binary, rescored"):
        evaluate_bitext([Fixed(np.eye(2))], pairs, outputs=["int4"])
    assert parse_dims("8, 16,full") == [8, 16, None]
    for text in ("", "0", "8,x", "-8"):
        with pytest.raises(f2llm.InputError, match="a dimension is a whole number above 0, or full"):
            parse_dims(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate on"),
        (["--mteb", "STS17", "--dims", "8"], "--dims is for --retrieval or --bitext"),
        (["--mteb", "STS17", "--outputs", "int8"], "--outputs is for --retrieval or --bitext"),
        (["--benchmark", "b", "--compare", "x"], "--compare is for --retrieval or --bitext"),
        (["--bitext", "pairs.tsv", "--split", "dev"], "--split is for --retrieval"),
        (["--bitext", "pairs.tsv", "--judged-only"], "--judged-only is for --retrieval"),
        (["--bitext", "pairs.tsv", "--ignore-identical-ids"], "--ignore-identical-ids is for --retrieval"),
        (["--retrieval", "data", "--columns", "a", "b"], "--columns is for --bitext"),
        (["--retrieval", "data", "--dim", "8"], "--dim is for --mteb or --benchmark"),
        (
            ["--retrieval", "data", "--instructions-of", "x"],
            "--instructions-of is for --mteb or --benchmark or --bitext",
        ),
        (["--retrieval", "data", "--compare", "no/such/model"], "no/such/model is neither a folder nor a hub id"),
        (["--retrieval", "data", "--compare", "st:./none"], "there is no folder ./none"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    arguments: list[str], message: str, tiny_release: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["evaluate", str(tiny_release), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dims", "8,x"], "a dimension is a whole number above 0, or full, not 'x'"),
        (["--outputs", "float32,int4"], "no output 'int4'"),
        (["--compare", "no/such/model"], "no/such/model is neither a folder nor a hub id"),
        (["--split", "dev"], "one file .*dev with an ending of"),
        (["--bitext", "none.tsv"], "none.tsv does not exist"),
    ],
)
def test_data_is_read_before_the_first_model_is_loaded(
    arguments: list[str],
    message: str,
    tiny_release: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    folder = write_beir(tmp_path / "data")
    monkeypatch.setattr(evaluate, "_run_mteb", lambda *_: pytest.fail("it began with MTEB"))
    monkeypatch.setattr(embedders, "load_embedder", lambda *_, **__: pytest.fail("a model was loaded"))
    assert main(["evaluate", str(tiny_release), "--mteb", "STS17", "--retrieval", str(folder), *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_option_reaches_the_ranking(tiny_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _, folder = on_a_circle(tmp_path / "data", relevant=1)
    scored = []
    monkeypatch.setattr(own_data, "score_retrieval", lambda models, name, data, **_: scored.append((name, data)))
    monkeypatch.setattr(evaluate, "_show", lambda *_: None)
    assert main(["evaluate", str(tiny_release), "--retrieval", str(folder), "--ignore-identical-ids"]) == 0
    assert [(name, data.ignore_identical_ids) for name, data in scored] == [(str(folder), True)]


def test_what_scores_and_plots_is_asked_for_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    model = Fixed(np.eye(2))
    monkeypatch.setitem(sys.modules, "pytrec_eval", None)
    with pytest.raises(f2llm.InputError, match="evaluation needs pytrec_eval"):
        evaluate_retrieval([model], write_beir(tmp_path / "data", {"a": "0"}, {"1": "1"}, [("1", "a", 1)]))
    assert not model.calls
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["evaluate", "no-model", "--retrieval", str(tmp_path / "data")]) == 2
    assert "evaluation needs matplotlib" in capsys.readouterr().err
