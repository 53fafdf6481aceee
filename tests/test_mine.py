"""Hard negatives: those of a plain formula and of sentence-transformers, in the layout that prepare reads."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from sentence_transformers.util import mine_hard_negatives

from f2llm_jax.cli import main
from f2llm_jax.encoder import Done
from f2llm_jax.search import nearest
from f2llm_jax.train import mine as module
from f2llm_jax.train.mine import Mined, Pairs, Rule, mine
from f2llm_jax.train.prepare import prepare
from f2llm_jax.train.report import totals

DIM = 12


class Fixed:
    """An encoder, and a SentenceTransformer, of a random embedding for each text: a query's is near its first positive.

    Attributes:
        seen: what was encoded, prompts included.
    """

    device = "cpu"
    max_length = 7
    similarity = staticmethod(lambda a, b: torch.as_tensor(a) @ torch.as_tensor(b).T)
    similarity_pairwise = staticmethod(lambda a, b: (torch.as_tensor(a) * torch.as_tensor(b)).sum(dim=1))

    def __init__(self, pairs: Sequence[tuple[str, str]], others: Sequence[str] = (), noise: float = 0.7):
        self.prompts = {"query": "Q: ", "document": "D: "}
        self.seen: list[str] = []
        rng = np.random.default_rng(0)
        texts = dict.fromkeys([*(passage for _, passage in pairs), *others])
        self._vectors = {text: rng.normal(size=DIM) for text in texts}
        for query, passage in pairs:
            self._vectors.setdefault(query, self._vectors[passage] + noise * rng.normal(size=DIM))

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        values = np.array([self._vectors[text.removeprefix("Q: ").removeprefix("D: ")] for text in texts])
        return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)

    def encode(self, texts: list[str], *, prompt: str, on_batch: Callable[[Done], None], **options: object):
        self.seen += [prompt + text for text in texts]
        self.options = options
        on_batch(Done(len(texts), 0, 1))
        return self.vectors(texts)

    def encode_query(self, texts: list[str], **_: object) -> np.ndarray:
        return self.vectors(texts)

    encode_document = encode_query


def some_pairs(queries: int = 40, passages: int = 60) -> list[tuple[str, str]]:
    """Most queries have one positive, some have several; some passages are those of several queries."""
    rng = np.random.default_rng(1)
    pairs = [(f"q{n}", f"p{n}") for n in range(min(queries, passages))]
    return pairs + [(f"q{rng.integers(queries)}", f"p{rng.integers(passages)}") for _ in range(25)]


def write(file: Path, pairs: Sequence[tuple[str | None, str | None]]) -> Path:
    query, passage = zip(*pairs, strict=True)
    schema = pyarrow.schema([("query", pyarrow.string()), ("passage", pyarrow.string())])
    parquet.write_table(pyarrow.table({"query": query, "passage": passage}, schema), file)
    return file


def mined(file: Path) -> list[tuple[str, ...]]:
    table = parquet.read_table(file)
    assert table.column_names[:2] == ["query", "passage"]
    assert table.column_names[2:] == [f"negative_{n}" for n in range(1, table.num_columns - 1)]
    return [tuple(row.values()) for row in table.to_pylist()]


def formula(model: Fixed, pairs: list[tuple[str, str]], corpus: Sequence[str], rule: Rule) -> list[tuple[str, ...]]:
    """The rows, a query at a time, in plain Python."""
    documents = list(dict.fromkeys([*(passage for _, passage in pairs), *corpus]))
    rows = []
    for query, passage in pairs:
        positives = {text for other, text in pairs if other == query}
        scores = dict(zip(documents, (model.vectors(documents) @ model.vectors([query])[0]).tolist(), strict=True))
        ranked = sorted((text for text in documents if text not in positives), key=lambda text: -scores[text])
        lowest = min(scores[text] for text in positives)
        limit = min(lowest * rule.margin if lowest > 0 else lowest * (2 - rule.margin), rule.max_score)
        allowed = [text for text in ranked[: rule.last] if scores[text] <= limit]
        negatives = allowed[rule.first : rule.first + rule.negatives]
        if len(negatives) == rule.negatives:
            rows.append((query, passage, *negatives))
    return rows


RULES = [
    Rule(negatives=5, first=3, last=20),
    Rule(negatives=3, first=0, last=1000, margin=0.6),
    Rule(negatives=1, first=0, last=1, margin=1),
    Rule(negatives=10, first=2, last=30, max_score=0.3),
]


@pytest.mark.parametrize("small_blocks", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_negatives_are_those_of_the_formula(rule, small_blocks, tmp_path, monkeypatch):
    if small_blocks:
        for name, size in {"_ENCODE_TEXTS": 11, "_BLOCK": 7, "_QUERIES": 6, "_GROUP_ROWS": 10}.items():
            monkeypatch.setattr(module, name, size)
    pairs, corpus = some_pairs(), [f"c{n}" for n in range(20)] + ["p3", "c5"]
    model = Fixed(pairs, corpus)
    expected = formula(model, pairs, corpus, rule)
    assert 0 < len(expected) < len(pairs) or rule is RULES[0]
    with pytest.warns(UserWarning, match="texts were longer than 7 tokens and were truncated"):
        result = mine(model, Pairs(write(tmp_path / "raw.parquet", pairs), corpus), tmp_path / "out.parquet", rule=rule)
    assert mined(tmp_path / "out.parquet") == expected
    documents = len({passage for _, passage in pairs} | set(corpus))
    assert result == Mined(len(expected), len(pairs) - len(expected), 0, documents)


@pytest.mark.filterwarnings("ignore:.*truncated")
@pytest.mark.parametrize("rule", [RULES[0], RULES[1], dataclasses.replace(RULES[3], last=1000)])
def test_negatives_are_those_of_sentence_transformers(rule, tmp_path):
    pairs, corpus = list(dict.fromkeys(some_pairs())), [f"c{n}" for n in range(20)]
    model = Fixed(pairs, corpus, noise=0.4)
    theirs = mine_hard_negatives(
        datasets.Dataset.from_list([{"query": query, "passage": passage} for query, passage in pairs]),
        model,
        corpus=corpus,
        range_min=rule.first,
        range_max=rule.last,
        relative_margin=1 - rule.margin,
        max_score=rule.max_score,
        num_negatives=rule.negatives,
        output_format="n-tuple",
        verbose=False,
    )
    mine(model, Pairs(write(tmp_path / "raw.parquet", pairs), corpus), tmp_path / "out.parquet", rule=rule)
    assert len(theirs) > 10
    assert sorted(mined(tmp_path / "out.parquet")) == sorted(tuple(row.values()) for row in theirs)


@pytest.mark.filterwarnings("ignore:.*truncated")
def test_a_query_of_many_positives_widens_no_chunk_of_others(tmp_path, monkeypatch):
    rule, pairs = RULES[0], some_pairs()
    pairs = [*(("q7", f"p{n}") for n in range(10, 50)), *pairs]
    model, compared = Fixed(pairs), []

    def spy(query_qd: np.ndarray, blocks: object, top: int) -> tuple[np.ndarray, np.ndarray]:
        compared.append((len(query_qd), top))
        return nearest(query_qd, blocks, top)

    monkeypatch.setattr(module, "nearest", spy)
    monkeypatch.setattr(module, "_NEAREST", 20 * (rule.last + 1))
    source = Pairs(write(tmp_path / "raw.parquet", pairs))
    mine(model, source, tmp_path / "out.parquet", rule=rule)
    assert mined(tmp_path / "out.parquet") == formula(model, pairs, [], rule)
    assert compared[0] == (20, rule.last + 1) and compared[-1][1] >= rule.last + 40
    assert sum(queries for queries, _ in compared) == 40
    assert all(queries * top <= 20 * (rule.last + 1) for queries, top in compared)


@pytest.mark.filterwarnings("ignore:.*truncated")
def test_queries_with_an_instruction_get_no_prompt_unless_it_is_given(tmp_path):
    pairs = [("Instruct: find\nQuery: a", "one"), ("b", "two")]
    model = Fixed(pairs)
    source = Pairs(write(tmp_path / "raw.parquet", pairs))
    options = {"rule": Rule(negatives=1, first=0, last=2, max_score=1, margin=1)}
    model._vectors |= {"one": np.eye(DIM)[0], "two": np.eye(DIM)[1]}
    model._vectors |= {query: model._vectors[passage] for query, passage in pairs}
    mine(model, source, tmp_path / "out.parquet", dim=3, max_length=4, batch_tokens=5, **options)
    assert model.seen == ["D: one", "D: two", pairs[0][0], "Q: b"]
    assert model.options == {"dim": 3, "max_length": 4, "batch_tokens": 5}
    for given in ({"prompt": "Q: "}, {"prompt_name": "query"}):
        mine(model, source, tmp_path / "out.parquet", **options, **given)
        assert model.seen[-2:] == ["Q: " + query for query, _ in pairs]


# --- the command


def command(release: Path, raw: Path, out: Path, *options: str) -> list[str]:
    return ["mine", "--model", str(release), "--raw", str(raw), "--out", str(out), *options]


def error_of(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("f2llm: error: ") and captured.err.count("\n") == 1
    return captured.err


def test_what_is_mined_can_be_prepared(tiny_release, tiny, tmp_path, capsys):
    pairs = [(f"Instruct: find\nQuery: fox {n:02d}", f"the fox {n:02d}") for n in range(20)]
    dirty = [*pairs[:5], (None, "the fox"), ("fox", " "), *pairs[5:]]
    (tmp_path / "raw").mkdir()
    (tmp_path / "more.txt").write_text("the fox 03\na lazy dog\n\n")
    out = tmp_path / "raw" / "mined.parquet"
    arguments = command(
        tiny_release, write(tmp_path / "in.parquet", dirty), out, "--corpus", str(tmp_path / "more.txt")
    )
    assert main([*arguments, "--negatives", "3", "--range", "1,12", "--margin", "1", "--progress"]) == 0
    captured = capsys.readouterr()
    rows = mined(out)
    assert captured.out == (
        f"{out}: {len(rows)} rows with 3 negatives, of 21 distinct passages; "
        f"dropped: {20 - len(rows)} rows with fewer, 2 with an empty text\n"
    )
    assert "41/41" in captured.err
    documents = [*(passage for _, passage in pairs), "a lazy dog"]
    scores_qn = tiny.encode([query for query, _ in pairs]) @ tiny.encode_document(documents).T
    expected = []
    for row, scores_n in enumerate(scores_qn):
        others = [number for number in np.argsort(-scores_n)[:13] if number != row][:12]
        allowed = [documents[number] for number in others if scores_n[number] <= scores_n[row]][1:4]
        if len(allowed) == 3:
            expected.append((*pairs[row], *allowed))
    assert rows == expected and rows
    report = prepare(tmp_path / "raw", tiny_release, tmp_path / "data", tasks={"mined": "retrieval"}, workers=1)
    sums = totals(report)
    assert sums["train"] + sums["validation"] == len(rows)

    assert "mined.parquet exists; --force replaces it" in error_of(capsys, arguments)
    same = command(tiny_release, tmp_path / "in.parquet", tmp_path / "in.parquet", "--force")
    assert "in.parquet is the input too" in error_of(capsys, same)


def test_what_cannot_be_mined_is_one_clear_line(tiny_release, tmp_path, capsys, monkeypatch):
    raw = write(tmp_path / "raw.parquet", [("fox 1", "the fox 1"), ("fox 2", "the fox 2")])
    out = tmp_path / "out.parquet"
    parquet.write_table(pyarrow.table({"query": ["a"], "text": ["b"]}), tmp_path / "columns.parquet")
    write(tmp_path / "empty.parquet", [("", "a"), ("b", None)])
    (tmp_path / "no.parquet").write_text("text")
    names = sorted(os.listdir(tmp_path))
    cases = [
        (raw, ["--negatives", "95"], "a range of 10,100 has room for 90 negatives, not for 95"),
        (raw, ["--range", "7,7"], "the range must go from 0 or more to more than that, not 7,7"),
        (raw, ["--margin", "1.5"], "the margin must be above 0 and at most 1, not 1.5"),
        (raw, [], "no query of"),
        (tmp_path / "columns.parquet", [], "columns.parquet has no column 'passage'; it has query, text"),
        (tmp_path / "empty.parquet", [], "empty.parquet has no row with a query and a passage"),
        (tmp_path / "no.parquet", [], "no.parquet is not a Parquet file"),
        (tmp_path / "none.parquet", [], "none.parquet"),
    ]
    for source, options, message in cases:
        assert message in error_of(capsys, command(tiny_release, source, out, *options))
    assert "is a .parquet file, not '.jsonl'" in error_of(capsys, command(tiny_release, raw, tmp_path / "out.jsonl"))
    (tmp_path / "no.parquet").rename(tmp_path / "pairs.jsonl")
    error = error_of(capsys, command(tiny_release, Path("~/pairs.jsonl"), out))
    assert "mine takes Parquet; f2llm prepare --raw reads JSON Lines" in error
    (tmp_path / "pairs.jsonl").rename(tmp_path / "no.parquet")
    assert sorted(os.listdir(tmp_path)) == names
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Pairs("~/raw.parquet").queries == ["fox 1", "fox 2"]
    same = command(tiny_release, Path("~/raw.parquet"), Path("~/raw.parquet"))
    assert "raw.parquet exists; --force replaces it" in error_of(capsys, same)
    assert f"{raw} is the input too" in error_of(capsys, [*same, "--force"])
    with pytest.raises(SystemExit):
        main(command(tiny_release, raw, out, "--range", "10"))
    assert "takes two ranks, like 10,100, not '10'" in capsys.readouterr().err
