"""`f2llm prepare` on people's own files: layouts, missing negatives, unknown datasets, a prompt before the queries."""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyarrow
import pytest
from pyarrow import parquet
from raw_data import rows, run, write_raw, written
from releases import QUERY_PROMPT

from f2llm_jax.cli import main
from f2llm_jax.errors import InputError
from f2llm_jax.release import read_release
from f2llm_jax.tokens import Tokenizer
from f2llm_jax.train import loop
from f2llm_jax.train.config import TrainConfig, load_recipe, override
from f2llm_jax.train.layouts import RELEASED, Conversion, find_layout, own_layout
from f2llm_jax.train.prepare import _Work
from f2llm_jax.train.raw import read_rows
from f2llm_jax.train.records import Settings

OWN = {"query": "question", "passage": "answer", "negatives": "hard"}


def passages(*texts: str) -> list[dict[str, str]]:
    return [{"docid": "1", "title": "A", "text": text} for text in texts]


LAYOUTS: dict[str, tuple[list[dict[str, Any]], list[list[str | None]]]] = {
    "triplets": (
        [{"anchor": "q", "positive": "p", "negative": "n"}, {"anchor": "r", "positive": "s", "negative": "m"}],
        [["q", "p", "n"], ["r", "s", "m"]],
    ),
    "pairs": ([{"anchor": "q", "positive": "p", "id": 7}], [["q", "p"]]),
    "query and positive": ([{"query": "q", "positive": "p", "negative": "n"}], [["q", "p", "n"]]),
    "numbered": (
        [{"anchor": "q", "positive": "p", "negative_10": "c", "negative_2": "b", "negative_1": "a"}],
        [["q", "p", "a", "b", "c"]],
    ),
    "FlagEmbedding": (
        [
            {"query": "q", "pos": ["p", "o"], "neg": ["a", "b", "c"], "pos_scores": [1.0, 0.5]},
            {"query": "r", "pos": ["s"], "neg": ["d", " "], "pos_scores": [1.0]},
            {"query": "t", "pos": ["u"], "neg": [], "pos_scores": [1.0]},
            {"query": "v", "pos": [], "neg": ["w"], "pos_scores": [0.1]},
        ],
        [
            ["q", "p", "a", "b", "c"],
            ["q", "o", "a", "b", "c"],
            ["r", "s", "d", "d", "d"],
            ["t", "u", None, None, None],
            ["v", None, "w", "w", "w"],
        ],
    ),
    "Tevatron": (
        [{"query_id": "1", "query": "q", "positive_passages": passages("p"), "negative_passages": passages("n", "m")}],
        [["q", "A p", "A n", "A m"]],
    ),
    "--columns": (
        [{"query": "no", "pos": ["no"], "question": "q", "answer": "p", "hard": ["n"], "hard_1": ["m"]}],
        [["q", "p", "n", "m"]],
    ),
}


def write(file: Path, records: list[dict[str, Any]]) -> Path:
    """A raw file of the format that its name says."""
    file.parent.mkdir(exist_ok=True)
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    else:
        parquet.write_table(pyarrow.Table.from_pylist(records), file)
    return file


def converted(file: Path, columns: Mapping[str, str] | None = None, negatives: int = 24) -> list[list[str | None]]:
    """The rows that are read of a file, after its conversion."""
    layout = find_layout(file, own_layout(columns))
    assert layout is not None
    conversion = Conversion(file, layout, negatives, file.parent / "converted")
    advanced: list[int] = []
    conversion.run(Mock(advance=advanced.append))
    assert sum(advanced) == conversion.size == file.stat().st_size
    dataset = conversion.dataset()
    read = [columns for _, columns in read_rows(dataset, strip_instructions=False)]
    return [list(row) for columns in read for row in zip(*(column.to_pylist() for column in columns), strict=True)]


@pytest.mark.parametrize("extension", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_file_becomes_rows_of_the_released_layout(tmp_path, name, extension):
    records, expected = LAYOUTS[name]
    assert converted(write(tmp_path / f"mine.{extension}", records), OWN) == expected


def test_lines_may_lack_negatives_and_have_them_numbered(tmp_path):
    records = [
        {"query": "q", "passage": "p"},
        {"query": "r", "passage": "s", "negative_2": "b", "negative_1": "a"},
        {"query": "t", "passage": "u", "negative_1": None, "negative_2": "c"},
    ]
    expected = [["q", "p", None, None], ["r", "s", "a", "b"], ["t", "u", "c", "c"]]
    assert converted(write(tmp_path / "mine.jsonl", records)) == expected


def test_at_most_so_many_negatives_are_taken(tmp_path):
    records = [{"query": "q", "pos": ["p"], "neg": ["a", "b", "c"]}, {"query": "r", "pos": ["s"], "neg": ["d"]}]
    file = write(tmp_path / "mine.jsonl", records)
    assert converted(file, negatives=2) == [["q", "p", "a", "b"], ["r", "s", "d", "d"]]


def test_many_rows_are_converted_a_part_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("f2llm_jax.train.layouts._GROUP_CHARACTERS", 100)
    records = [{"query": f"query {n}", "pos": [f"passage {n}"], "neg": [f"negative {n}"] * (n % 3)} for n in range(300)]
    for extension in ("jsonl", "parquet"):
        read = converted(write(tmp_path / extension / f"mine.{extension}", records))
        assert [row[:2] for row in read] == [[f"query {n}", f"passage {n}"] for n in range(300)]
    assert parquet.ParquetFile(tmp_path / "parquet" / "converted" / "rows.parquet").num_row_groups > 50


def test_the_released_parquet_layout_is_not_converted(tmp_path):
    write_raw(tmp_path, {"xquad_en": rows(2, negatives=2)})
    assert find_layout(tmp_path / "xquad_en.parquet", None) is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "q", "pos": ["p"]', r"line 3: not valid JSON"),
        ('["q"]', r"line 3: should be a JSON object, not of type list"),
        ('{"query": "q", "positive": "p"}', r"line 3: no field 'pos'; there are 'query', 'positive'"),
        ('{"query": 3, "pos": ["p"]}', r"line 3: field 'query' is of type int, not a string"),
        ('{"query": ["q"], "pos": ["p"]}', r"line 3: field 'query' is of type list, not a string"),
        ('{"query": "q", "pos": [4]}', r"line 3: field 'pos' is of type int, not a string"),
        ('{"query": "q", "pos": ["p"], "neg": [{"title": "t"}]}', r"line 3: field 'neg' has .* without a 'text'"),
        ('{"query": "q", "pos": ["\\ud800"]}', r"line 3: character 0 is half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_an_error_that_names_it(tmp_path, tiny_release, line, message):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "mine.jsonl").write_text('{"query": "a", "pos": ["b"], "neg": []}\n\n' + line + "\n")
    with pytest.raises(InputError, match=f"mine.jsonl, {message}"):
        run(tmp_path / "raw", tiny_release, tmp_path / "out", tasks={"*": "retrieval"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


def test_a_bad_cell_of_parquet_is_an_error_that_names_its_row(tmp_path):
    bad = pyarrow.Array.from_buffers(pyarrow.string(), 2, pyarrow.array([b"a", b"\xff"]).buffers())
    parquet.write_table(pyarrow.table({"anchor": ["q", "r"], "positive": bad}), tmp_path / "mine.parquet")
    with pytest.raises(InputError, match=r"mine.parquet, row 1: field 'positive' is not valid UTF-8"):
        converted(tmp_path / "mine.parquet")
    (tmp_path / "other.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(InputError, match=r"other.parquet is not a Parquet file, or damaged"):
        find_layout(tmp_path / "other.parquet", None)


def test_unknown_columns_are_an_error_that_says_how_to_name_them(tmp_path, tiny_release, capsys):
    records = [{"question": f"question {n}", "answer": f"answer {n}", "wrong": [f"no {n}"]} for n in range(4)]
    for extension in ("jsonl", "parquet"):
        raw, out = tmp_path / extension, tmp_path / f"{extension}.out"
        write(raw / f"mine.{extension}", records)
        command = ["prepare", "--raw", str(raw), "--tokenizer", str(tiny_release), "--out", str(out), "--quiet"]
        command += ["--task", "*=retrieval", "--workers", "1"]
        assert main(command) == 2
        error = capsys.readouterr().err
        assert f"mine.{extension}" in error and "question, answer, wrong" in error
        assert "anchor, positive, negative" in error and "query, pos, neg" in error
        assert "--columns query=NAME,passage=NAME,negatives=NAME" in error
        assert main([*command, "--columns", "query=question,passage=answer,negatives=wrong"]) == 0
        assert Settings.read(out).datasets[0].negatives == 1
    write(tmp_path / "known" / "aya.jsonl", LAYOUTS["FlagEmbedding"][0])
    with pytest.raises(InputError, match=r"no file of .*known has the columns question, answer, hard of --columns"):
        run(tmp_path / "known", tiny_release, tmp_path / "no", columns=OWN)
    bad = {**OWN, "negatives": "bad"}
    with pytest.raises(InputError, match=r"mine.parquet has the columns .* no known layout \(question, answer, bad; "):
        find_layout(tmp_path / "parquet" / "mine.parquet", own_layout(bad))
    with pytest.raises(InputError, match=r"mine.jsonl has no negatives in a column 'bad', as --columns says; .*wrong"):
        run(tmp_path / "jsonl", tiny_release, tmp_path / "no", columns=bad, tasks={"*": "retrieval"})
    for columns in ({"query": "q"}, {"query": "q", "passage": "p", "negative": "n"}):
        with pytest.raises(InputError, match="columns takes query, passage and, if there are any, negatives"):
            own_layout(columns)
    with pytest.raises(SystemExit):
        main([*command, "--columns", "question"])
    assert "must be query=NAME,passage=NAME,negatives=NAME" in capsys.readouterr().err


def test_columns_apply_where_the_negatives_are_too(tmp_path):
    """Other files are left to other layouts; of a .jsonl, later lines may have the negatives."""
    columns = {"query": "query", "passage": "passage", "negatives": "hard"}
    pair = {"query": "q", "passage": "p"}
    released, plain = {**pair, "negative_1": "n"}, [pair, {**pair, "hard": "m"}]
    own = own_layout(columns)
    assert find_layout(write(tmp_path / "a.parquet", [{**released, "hard": "m"}]), own) == own
    assert find_layout(write(tmp_path / "b.parquet", [released]), own) is None
    assert find_layout(write(tmp_path / "c.jsonl", [released]), own) == RELEASED
    assert converted(write(tmp_path / "d.jsonl", plain), columns) == [["q", "p", None], ["q", "p", "m"]]


@pytest.mark.parametrize("extension", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("extra", "options", "said"),
    [
        ({"negatives": ["a"], "id": "7"}, {}, ["ignored columns: negatives, id."]),
        ({"negatives": ["a"], "id": "7"}, {"negatives": 0}, []),
        ({"negatives": ["a"], "id": "7", "negative": "b"}, {}, []),
        ({}, {}, []),
    ],
)
def test_a_warning_names_columns_that_are_ignored_for_lack_of_negatives(
    tmp_path, tiny_release, recwarn, extension, extra, options, said
):
    for place, positive in enumerate(("positive", "passage")):
        records = [{"query": f"q {n}", positive: f"p {n}", **extra} for n in range(3)]
        raw = write(tmp_path / positive / f"aya.{extension}", records).parent
        out = tmp_path / f"out {place}"
        recwarn.clear()
        (dataset,) = run(raw, tiny_release, out, **options)["datasets"]
        messages = [str(warning.message) for warning in recwarn]
        assert all(part in message for part, message in zip(said, messages, strict=True))
        assert all("--columns query=NAME,passage=NAME,negatives=NAME" in message for message in messages)
        assert re.search(r"\| train \| validation \| negatives \|", (out / "report.md").read_text())
        assert f"| 2 | 1 | {dataset['negatives']} |" in (out / "report.md").read_text()


def test_other_positives_of_a_record_are_no_negatives(tmp_path):
    records = [{"query": "q", "pos": ["p", "o"], "neg": ["o", "n", "p"]}]
    assert converted(write(tmp_path / "mine.jsonl", records)) == [["q", "p", "n", "p"], ["q", "o", "o", "n"]]


def test_a_file_is_not_converted_again_for_another_task(tmp_path, tiny_release, monkeypatch):
    write(tmp_path / "raw" / "mine.jsonl", [{"anchor": f"q {n}", "positive": f"p {n}"} for n in range(3)])
    with pytest.raises(InputError, match="'mine' is for clustering, which trains with hard negatives alone"):
        run(tmp_path / "raw", tiny_release, tmp_path / "out", tasks={"mine": "clustering"})
    monkeypatch.setattr(Conversion, "run", Mock(side_effect=AssertionError("converted again")))
    assert (
        run(tmp_path / "raw", tiny_release, tmp_path / "out", tasks={"mine": "retrieval"})["datasets"][0]["kept"] == 3
    )


def test_a_name_may_be_of_one_file_alone(tmp_path, tiny_release):
    write(tmp_path / "raw" / "aya.jsonl", [{"query": "q", "pos": ["p"]}])
    write(tmp_path / "raw" / "aya.parquet", [{"query": "q", "passage": "p"}])
    with pytest.raises(InputError, match=r"aya\.jsonl and .*aya\.parquet are both the dataset 'aya'"):
        run(tmp_path / "raw", tiny_release, tmp_path / "out")


@contextlib.contextmanager
def killed_after(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A run dies as soon as it calls the method of ``_Work``."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_Work, name, Mock(side_effect=KeyboardInterrupt))
        yield


def test_own_files_are_prepared_and_a_killed_run_converts_no_file_twice(tmp_path, tiny_release, monkeypatch):
    raw, out = tmp_path / "raw", tmp_path / "out"
    records = [
        {"query": f"question {n}", "pos": [f"yes {n}", f"sure {n}"], "neg": [f"no {n}", f"never {n}"][: n % 3]}
        for n in range(30)
    ]
    write(raw / "mine.jsonl", records)
    write_raw(raw, {"aya": rows(5, negatives=1)})
    tasks = {"mine": "retrieval"}
    with killed_after("scans", monkeypatch):
        run(raw, tiny_release, out, tasks=tasks)
    monkeypatch.setattr(Conversion, "run", Mock(side_effect=AssertionError("converted again")))
    with pytest.raises(InputError, match="unfinished work with another negatives"):
        run(raw, tiny_release, out, tasks=tasks, negatives=3)
    with pytest.warns(UserWarning, match="mine: 20 of 60 rows"):
        report = run(raw, tiny_release, out, tasks=tasks)
    aya, mine = report["datasets"]
    assert (aya["layout"], mine["layout"]) == ("released", "FlagEmbedding")
    assert mine["read"] == 60 and mine["dropped"]["empty_negative"] == 20 and mine["kept"] == 40
    decode = Tokenizer.from_release(tiny_release).backend.decode
    found = {
        (decode(example["query"]), *map(decode, example["documents"]))
        for example in written(out)
        if example["dataset"] == "mine"
    }
    expected = {
        (f"question {n}", passage, f"no {n}", f"never {n}" if n % 3 == 2 else f"no {n}")
        for n in range(30)
        for passage in (f"yes {n}", f"sure {n}")
        if n % 3
    }
    assert found == expected
    assert "Other layouts: mine (FlagEmbedding)." in (out / "report.md").read_text()


# --- missing negatives, dropped rows


def test_missing_negatives_are_filled_with_the_rows_own(tmp_path, tiny_release):
    table = rows(20, negatives=3, seed=1, prefix="")
    kept = [dict(row) for row in table]
    table[0] |= {"negative_2": None, "negative_3": "Instruct: x\nQuery: "}
    kept[0] |= {"negative_2": kept[0]["negative_1"], "negative_3": kept[0]["negative_1"]}
    table[1] |= {"negative_1": " "}
    kept[1] |= {f"negative_{n}": table[1][f"negative_{m}"] for n, m in ((1, 2), (2, 3), (3, 2))}
    table[2] |= dict.fromkeys(("negative_1", "negative_2", "negative_3"))
    write_raw(tmp_path / "raw", {"aya": table})
    with pytest.warns(UserWarning, match="aya: 3 of 20 rows"):
        (dataset,) = run(tmp_path / "raw", tiny_release, tmp_path / "dropped", stage=1)["datasets"]
    assert dataset["dropped"]["empty_negative"] == 3
    options = {"stage": 1, "fill_negatives": True}
    (dataset,) = run(tmp_path / "raw", tiny_release, tmp_path / "filled", **options)["datasets"]
    assert dataset["dropped"]["empty_negative"] == 1
    decode = Tokenizer.from_release(tiny_release).backend.decode
    found = {(decode(e["query"]), *map(decode, e["documents"])) for e in written(tmp_path / "filled")}
    assert found == {tuple(row.values()) for n, row in enumerate(kept) if n != 2}
    (dataset,) = run(tmp_path / "raw", tiny_release, tmp_path / "cut", negatives=2, **options)["datasets"]
    assert (dataset["negatives"], dataset["dropped"]["empty_negative"]) == (2, 1)
    found = {(decode(e["query"]), *map(decode, e["documents"])) for e in written(tmp_path / "cut")}
    assert found == {tuple(row.values())[:4] for n, row in enumerate(kept) if n != 2}


@pytest.mark.parametrize(
    ("bad", "options", "message"),
    [
        ({"negative_2": None}, {}, r"above all as empty_negative \(2\): .*--fill-negatives"),
        (
            {"negative_1": None, "negative_2": ""},
            {"negatives": 1},  # there is none to repeat
            r"above all as empty_negative \(2\): they have no negative.*--negatives 0",
        ),
        ({"passage": None}, {}, r"above all as empty_positive \(2\): .*--columns"),
    ],
)
def test_a_warning_says_what_many_rows_lack(tmp_path, tiny_release, recwarn, bad, options, message):
    table = rows(60, negatives=2)
    for row in table[:2]:
        row.update(bad)
    few, many = [{**row} for row in table], [{**row} for row in table[:39]]
    write_raw(tmp_path / "raw", {"aya": many, "xquad_en": few})
    run(tmp_path / "raw", tiny_release, tmp_path / "out", **options)
    (warning,) = [str(w.message) for w in recwarn if "rows" in str(w.message)]  # 2 of 60 are few
    assert re.search(r"aya: 2 of 39 rows \(5\.1%\) are dropped, " + message, warning)


def test_no_good_row_is_an_error_that_says_what_they_lack(tmp_path, tiny_release):
    write_raw(tmp_path / "raw", {"aya": [{**row, "negative_2": None} for row in rows(3, negatives=2)]})
    with pytest.raises(
        InputError, match=r"every row in .*: aya: 3 of 3 rows \(100\.0%\) are dropped.*--fill-negatives"
    ):
        run(tmp_path / "raw", tiny_release, tmp_path / "out")
    report = run(tmp_path / "raw", tiny_release, tmp_path / "out", negatives=0)
    assert report["datasets"][0]["negatives"] == 0 and report["datasets"][0]["kept"] == 3


# --- unknown datasets


def test_unknown_datasets_are_errors_that_say_what_to_type(tmp_path, tiny_release):
    write_raw(tmp_path / "raw", {name: rows(4, negatives=1) for name in ("mine", "ours")})
    with pytest.raises(InputError, match=r"'mine', 'ours', are unknown: .* --task '\*=retrieval'"):
        run(tmp_path / "raw", tiny_release, tmp_path / "out")
    write_raw(tmp_path / "raw", {name: rows(4, negatives=1) for name in ("aya", "mine", "ours")})
    with pytest.raises(InputError, match=r"--task 'mine=retrieval' --task 'ours=retrieval'"):
        run(tmp_path / "raw", tiny_release, tmp_path / "out")
    with pytest.raises(InputError, match=r"'ours' is unknown: .* --task 'ours=retrieval'"):
        run(tmp_path / "raw", tiny_release, tmp_path / "out", tasks={"mine": "clustering"})


# --- a prompt before the queries

PROMPT = "Instruct: X\nQuery: "


def test_a_prompt_goes_before_every_query_that_has_it_not(tmp_path, tiny_release):
    table = rows(6, negatives=1, prefix="")
    table[1]["query"] = PROMPT + table[1]["query"]
    table[2]["query"] = " "  # is dropped still
    table[3]["query"] = "Instruct: Y\nQuery: " + table[3]["query"]  # has its own
    write_raw(tmp_path / "raw", {"aya": table})
    with pytest.warns(UserWarning, match="empty_query"):
        run(tmp_path / "raw", tiny_release, tmp_path / "out", query_prompt=PROMPT)
    tokenizer = Tokenizer.from_release(tiny_release)
    queries = [table[1]["query"], table[3]["query"], *(PROMPT + table[n]["query"] for n in (0, 4, 5))]
    expected, _ = tokenizer.encode(queries, 2048)
    found = sorted(example["query"] for example in written(tmp_path / "out"))
    assert found == sorted(tokens.tolist() for tokens in expected)
    settings = Settings.read(tmp_path / "out")
    assert settings.query_prompt == PROMPT and settings.instructed == 1.0


def prepared_with(folder: Path, *, stage: int = 2, query_prompt: str | None = None, instructed: float) -> Path:
    folder.mkdir(exist_ok=True)
    rest = dict(seed=0, max_length=2048, vocabulary="", eos_id=1, pad_id=0, documents=1, content="", datasets=[])
    Settings(stage=stage, query_prompt=query_prompt, instructed=instructed, **rest).write(folder)
    return folder


@pytest.fixture
def exported(tmp_path, tiny_release, monkeypatch):
    """Gives the query prompt of what ``train`` exports, and its warnings, without training or writing any."""
    releases: list[dict[str, str] | None] = []
    monkeypatch.setattr(loop, "export_release", lambda *args, prompts, **options: releases.append(prompts))

    def export_now(config: TrainConfig, *rest: object) -> None:
        loop.export_run({}, config, read_release(tiny_release), tmp_path / "export")
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "check_batch", export_now)

    def run_with(prepared: dict[str, Any], **settings: str) -> tuple[str, list[str]]:
        values = {"model": tiny_release, "data.path": "data", **settings}
        config = override(load_recipe("tiny"), [f"{key}={value}" for key, value in values.items()])
        loader = Mock(settings=Settings.read(prepared_with(tmp_path / "data", **prepared)))
        with warnings.catch_warnings(record=True) as caught, pytest.raises(KeyboardInterrupt):
            warnings.simplefilter("always")
            loop.train(config, loader, tmp_path / "run")
        prompts = releases.pop() or read_release(tiny_release).prompts
        return prompts["query"], [str(warning.message) for warning in caught]

    return run_with


def test_an_export_has_the_prompt_that_the_data_was_prepared_with(exported):
    recorded = {"query_prompt": PROMPT, "instructed": 1.0}
    assert exported(recorded) == (PROMPT, [])
    assert exported(recorded, query_prompt=PROMPT) == (PROMPT, [])
    prompt, (warning,) = exported(recorded, query_prompt="query: ")
    assert prompt == "query: "
    assert "query_prompt='query: '" in warning and f"--query-prompt {PROMPT!r}" in warning
    prompt, (warning,) = exported(recorded, query_prompt="none")
    assert prompt == "" and "query_prompt=none" in warning


def test_training_warns_of_a_prompt_that_no_query_had(exported):
    prompt, (warning,) = exported({"instructed": 0.004})
    assert prompt == QUERY_PROMPT and repr(QUERY_PROMPT) in warning
    assert all(part in warning for part in ("0.4%", "--query-prompt", "query_prompt=TEXT", "query_prompt=none"))
    prompt, (warning,) = exported({"instructed": 0.0}, query_prompt="query: ")
    assert prompt == "query: " and "'query: '" in warning
    assert exported({"instructed": 0.0}, query_prompt="none") == ("", [])
    for quiet in ({"instructed": 0.9}, {"instructed": 0.0, "stage": 1}):
        assert exported(quiet) == (QUERY_PROMPT, [])
