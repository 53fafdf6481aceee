"""Searching what ``f2llm encode`` wrote: the same ranking as brute force, and nothing of another model or size."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import jax
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from releases import TINY, edit_json

import f2llm_jax as f2llm
from f2llm_jax.cli import main
from f2llm_jax.convert.digest import model_digest
from f2llm_jax.corpus_reader import index
from f2llm_jax.corpus_writer import Output
from f2llm_jax.dtypes import FILE_OUTPUTS
from f2llm_jax.evaluation.ranking import cosines
from f2llm_jax.stored import open_stored

ROWS, DIM = 50, 20
QUERIES = ["a lazy fox", "the brown dog"]


@pytest.fixture(scope="module")
def documents() -> np.ndarray:
    """Unit embeddings [ROWS, DIM]."""
    values = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def digest(tiny_release: Path) -> str:
    return model_digest(tiny_release)


def store(
    folder: Path, embeddings: np.ndarray, digest: str, output: str = "float32", finish: bool = True, prompt: str = ""
) -> Path:
    """A folder as ``f2llm encode --corpus`` writes one, of four shards: of ids d-0 …"""
    ranges = f2llm.int8_ranges(embeddings) if output == "int8" else None
    source = folder.with_suffix(".txt")
    source.write_text("text\n" * len(embeddings))
    corpus = index([str(source)], field="text", id_field=None, file_format=None, unit_rows=16)
    settings = {"model_sha256": digest, "dim": embeddings.shape[1], "output": output, "prompt": prompt}
    work = Output(folder, settings, corpus, model="the/model", ranges=ranges)
    for unit in corpus.units:
        rows = range(unit.first_row, unit.first_row + unit.rows)
        ids = pyarrow.array([f"d-{row}" for row in rows])
        work.write(unit, ids, f2llm.quantize(embeddings[rows], output, ranges), 0)
    if finish:
        assert len(work.commit()["shards"]) == 4
    return folder


def search(release: Path, embeddings: Path, *options: str | Path) -> int:
    return main(["search", "--model", str(release), "--embeddings", str(embeddings), *map(str, options)])


def asked(queries: list[str]) -> list[str]:
    return [part for query in queries for part in ("--query", query)]


def error_of(capsys: pytest.CaptureFixture[str], status: int) -> str:
    captured = capsys.readouterr()
    assert status == 2 and captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("f2llm: error: ")
    return captured.err


def test_what_encode_wrote_is_searched_without_embedding_it(tiny_release, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])  # each would compile its own programs
    texts = [f"the quick fox {n:02d}" for n in range(ROWS)]
    lines = (json.dumps({"key": f"d-{n}", "body": text}) + "\n" for n, text in enumerate(texts))
    (tmp_path / "in.jsonl").write_text("".join(lines))
    out = ["--corpus", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out"), "--id-field", "key"]
    options = ["--field", "body", "--shard-rows", "16", "--dim", "32"]
    assert main(["encode", "--model", str(tiny_release), *out, *options]) == 0
    scores_qn = tiny.encode_query(QUERIES, dim=32) @ tiny.encode_document(texts, dim=32).T
    capsys.readouterr()

    def refuse(*_, **__):
        raise AssertionError

    monkeypatch.setattr(f2llm.Encoder, "encode_document", refuse)
    assert search(tiny_release, tmp_path / "out", *asked(QUERIES), "--top", "5", "--json") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [result["query"] for result in found] == QUERIES
    for result, scores_n in zip(found, scores_qn, strict=True):
        rows = np.argsort(-scores_n)[:5].tolist()
        hits = result["results"]
        assert [(hit["rank"], hit["row"], hit["id"]) for hit in hits] == [
            (rank, row, f"d-{row}") for rank, row in enumerate(rows, start=1)
        ]
        np.testing.assert_allclose([hit["score"] for hit in hits], scores_n[rows], atol=1e-5)
    assert search(tiny_release, tmp_path / "out", "--query", QUERIES[0], "--top", "3", "--progress") == 0
    captured = capsys.readouterr()
    lines = captured.out.split("\n")
    assert lines[:2] == [f"query: {QUERIES[0]}", "rank    score  id"] and len(lines) == 7
    assert lines[2].split()[::2] == ["1", f"d-{scores_qn[0].argmax()}"]
    assert f"{ROWS}/{ROWS}" in captured.err


@pytest.mark.parametrize("output", FILE_OUTPUTS)
def test_every_output_type_is_compared_by_what_it_stands_for(output, documents, digest, tiny_release, tiny, tmp_path):
    stored = open_stored(store(tmp_path / "out", documents, digest, output))
    assert (stored.rows, stored.dim, stored.output, stored.model) == (ROWS, DIM, output, "the/model")
    assert [len(block) for block in stored.blocks()] == [16, 16, 16, 2]
    if output == "int8":
        low, high = f2llm.int8_ranges(documents)
        codes = f2llm.quantize(documents, "int8", np.stack([low, high])).astype(np.float64)
        values = low + (codes + 128.5) * (high - low) / 255
    elif output in ("binary", "ubinary"):
        values = np.where(documents > 0, 1.0, -1.0)
    else:
        values = documents.astype(output)
    expected_qn = cosines(tiny.encode_query(QUERIES, dim=DIM), values)
    run = tmp_path / "run.parquet"
    assert search(tiny_release, tmp_path / "out", *asked(QUERIES), "--top", "7", "--output", run) == 0
    table = parquet.read_table(run)
    order_qk = np.argsort(-expected_qn, axis=1, kind="stable")[:, :7]
    assert table["id"].to_pylist() == [f"d-{row}" for row in order_qk.flat]
    scores = np.take_along_axis(expected_qn, order_qk, axis=1).reshape(-1)
    np.testing.assert_allclose(table["score"].to_numpy(), scores, atol=1e-5 if output != "float16" else 1e-3)


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_single_file_is_searched_too(suffix, dtype, documents, tiny_release, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("f2llm_jax.stored._BLOCK_ROWS", 16)
    file = tmp_path / f"out{suffix}"
    if suffix == ".npy":
        np.save(file, documents.astype(dtype))
    else:
        values = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(documents.astype(dtype).reshape(-1)), DIM)
        parquet.write_table(pyarrow.table({"id": pyarrow.array(range(ROWS)), "embedding": values}), file)
    blocks = list(open_stored(file).blocks())
    assert [len(block) for block in blocks] == [16, 16, 16, 2]
    np.testing.assert_array_equal(np.concatenate(blocks), documents.astype(dtype).astype(np.float32))
    assert open_stored(file).ids(np.array([[3, 40], [40, 0]])) == [3, 40, 40, 0]
    assert search(tiny_release, file, "--query", "fox", "--top", "60", "--json") == 0
    hits = json.loads(capsys.readouterr().out)["results"]
    assert sorted(hit["id"] for hit in hits) == [hit["row"] for hit in sorted(hits, key=lambda hit: hit["row"])]
    assert len(hits) == ROWS


# --- outputs


def test_results_of_many_queries_in_files(documents, digest, tiny_release, tiny, tmp_path, capsys):
    folder = store(tmp_path / "out", documents, digest)
    queries = tmp_path / "queries.csv"
    queries.write_text("id,question\nq7,a lazy fox\nq3,차\n", encoding="utf-8")
    options = ("--queries", queries, "--field", "question", "--top", "4")
    scores_qn = tiny.encode_query(["a lazy fox", "차"], dim=DIM) @ documents.T
    order_qk = np.argsort(-scores_qn, axis=1)[:, :4]
    wanted = [
        (query, f"d-{row}", rank, pytest.approx(scores_n[row], abs=1e-5))
        for query, order_k, scores_n in zip(("q7", "q3"), order_qk, scores_qn, strict=True)
        for rank, row in enumerate(order_k, start=1)
    ]
    for suffix in (".tsv", ".jsonl", ".parquet"):
        run = tmp_path / f"run{suffix}"
        assert search(tiny_release, folder, *options, "--output", run) == 0
        assert capsys.readouterr().out == f"{run}: results of 2 queries\n"
        if suffix == ".tsv":
            lines = [line.split("\t") for line in run.read_text().splitlines()]
            assert {(line[1], line[5]) for line in lines} == {("Q0", "f2llm")}
            assert [(line[0], line[2], int(line[3]), float(line[4])) for line in lines] == wanted
        elif suffix == ".parquet":
            table = parquet.read_table(run)
            assert table.column_names == ["query_id", "id", "rank", "score"]
            assert [tuple(row.values()) for row in table.to_pylist()] == wanted
        else:
            lines = [json.loads(line) for line in run.read_text(encoding="utf-8").splitlines()]
            assert [line["query"] for line in lines] == ["a lazy fox", "차"]
            hits = [
                (line["query_id"], *(hit[key] for key in ("id", "rank", "score")))
                for line in lines
                for hit in line["results"]
            ]
            assert hits == wanted
    assert "exists; --force replaces it" in error_of(capsys, search(tiny_release, folder, *options, "--output", run))
    assert search(tiny_release, folder, *options, "--output", run, "--force") == 0


def test_an_output_of_a_corpus_of_texts(tiny_release, tmp_path):
    (tmp_path / "docs.txt").write_text("a fox\na dog\n")
    source = ["search", "--model", str(tiny_release), "--corpus", str(tmp_path / "docs.txt")]
    assert main([*source, "--query", "a fox", "--prompt", "", "--output", str(tmp_path / "run.tsv")]) == 0
    lines = [line.split("\t")[:4] for line in (tmp_path / "run.tsv").read_text().splitlines()]
    assert lines == [["0", "Q0", "0", "1"], ["0", "Q0", "1", "2"]]


def test_ids_as_beir_names_them(tiny_release, tmp_path):
    (tmp_path / "docs.csv").write_text("_id,text\nd1,a fox\nd2,a dog\n")
    (tmp_path / "queries.jsonl").write_text('{"text": "a fox", "_id": "q1"}\n')
    source = ["search", "--model", str(tiny_release), "--corpus", str(tmp_path / "docs.csv")]
    output = str(tmp_path / "RUN.TSV")
    assert main([*source, "--queries", str(tmp_path / "queries.jsonl"), "--prompt", "", "--output", output]) == 0
    lines = [line.split("\t")[:4] for line in Path(output).read_text().splitlines()]
    assert lines == [["q1", "Q0", "d1", "1"], ["q1", "Q0", "d2", "2"]]


def test_documents_of_another_prompt_are_a_warning(documents, digest, tiny_release, tmp_path, capsys):
    folder = store(tmp_path / "out", documents, digest, prompt="passage: ")
    assert search(tiny_release, folder, "--query", "fox") == 0
    assert "was embedded with the prompt 'passage: '; documents of" in capsys.readouterr().err
    assert search(tiny_release, store(tmp_path / "plain", documents, digest), "--query", "fox") == 0
    assert capsys.readouterr().err == ""


def test_an_id_that_breaks_a_trec_run_is_refused(documents, digest, tiny_release, tmp_path, capsys, monkeypatch):
    folder = store(tmp_path / "out", documents, digest)
    monkeypatch.setattr("f2llm_jax.commands.search.load_model", Mock(side_effect=AssertionError))  # before the work
    (tmp_path / "queries.jsonl").write_text('{"text": "fox", "id": "two words"}\n')
    options = ("--queries", tmp_path / "queries.jsonl", "--output", tmp_path / "run.tsv")
    assert "no place for the id 'two words'" in error_of(capsys, search(tiny_release, folder, *options))
    assert not list(tmp_path.glob("*run.tsv*"))


# --- what is refused


def test_a_folder_that_is_not_what_it_says_is_refused(documents, digest, tiny_release, tmp_path, capsys):
    def error(folder: Path, *options: str) -> str:
        return error_of(capsys, search(tiny_release, folder, "--query", "fox", *options))

    begun = store(tmp_path / "begun", documents, digest, finish=False)
    assert "begun is unfinished, without manifest.json yet" in error(begun)
    (tmp_path / "empty").mkdir()
    assert "empty has no manifest.json, so f2llm encode --corpus did not write it" in error(tmp_path / "empty")
    folder = store(tmp_path / "out", documents, digest)
    assert f"holds embeddings of {DIM} dimensions, not of --dim 8; leave --dim out" in error(folder, "--dim", "8")
    shard = folder / "shards" / "000002.parquet"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    assert "000002.parquet is damaged; the f2llm encode command" in error(folder)
    shard.unlink()
    assert "000002.parquet is missing; the f2llm encode command" in error(folder)
    shard.write_bytes(content[:100] + bytes(len(content) - 100))
    assert "000002.parquet is damaged" in error(folder)
    shard.write_bytes(content)
    edit_json(
        folder / "manifest.json", settings={"model_sha256": "0" * 64, "dim": DIM, "output": "float32", "prompt": ""}
    )
    assert f"out holds embeddings of another model than {tiny_release}" in error(folder)


def test_a_file_that_is_not_searched_is_refused(tiny_release, tmp_path, capsys):
    wide = np.zeros((3, TINY.hidden_size + 1), np.float32)
    np.save(tmp_path / "wide.npy", wide)
    np.save(tmp_path / "codes.npy", wide.astype(np.int8))
    np.save(tmp_path / "flat.npy", wide[0])
    (tmp_path / "no.npy").write_text("text")
    (tmp_path / "no.parquet").write_text("text")
    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "texts.parquet")
    parquet.write_table(pyarrow.table({"id": [1], "embedding": [[0.5]]}), tmp_path / "lists.parquet")
    cases = {
        "wide.npy": f"wide.npy holds embeddings of {TINY.hidden_size + 1} dimensions, and",
        "codes.npy": "codes.npy holds int8 of shape (3, 97); of a single file float32 and float16",
        "flat.npy": "flat.npy holds float32 of shape (97,)",
        "no.npy": "no.npy is not a .npy file",
        "no.parquet": "no.parquet is not a Parquet file",
        "texts.parquet": "has no columns 'id' and 'embedding'; it has text",
        "lists.parquet": "not lists of fixed size",
        "none.npy": "No such file",
        "other.bin": "neither a folder of f2llm encode --corpus nor",
    }
    for name, message in cases.items():
        assert message in error_of(capsys, search(tiny_release, tmp_path / name, "--query", "fox"))


def test_arguments_that_do_not_go_together(tiny_release, tmp_path, capsys, monkeypatch):
    np.save(tmp_path / "e.npy", np.eye(8, dtype=np.float32))
    cases = {
        "--corpus-format is for --corpus": ["--corpus-format", "txt"],
        "--json is for standard output": ["--json", "--output", "run.jsonl"],
        "the output is a .tsv, .jsonl, .parquet file, not '.txt'": ["--output", "run.txt"],
        "nowhere is not a folder": ["--output", tmp_path / "nowhere" / "run.tsv"],
    }
    for message, options in cases.items():
        assert message in error_of(capsys, search(tiny_release, tmp_path / "e.npy", "--query", "fox", *options))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.tsv").touch()
    there = search(tiny_release, tmp_path / "e.npy", "--query", "fox", "--output", "~/run.tsv")
    assert f"{tmp_path / 'run.tsv'} exists; --force" in error_of(capsys, there)
    both = ["search", "--model", str(tiny_release), "--corpus", "-", "--queries", "-"]
    assert "cannot both be read from stdin" in error_of(capsys, main(both))
