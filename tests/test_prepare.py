"""`f2llm prepare`: what is written, against a plain recount of the raw rows."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from raw_data import rows, run, source, write_raw, written
from releases import QWEN_TOKENIZER, SHARED, skip_without_shared

from f2llm_jax.cli import main
from f2llm_jax.configs.datasets import SETS, TASKS, expand, matches, tasks_of
from f2llm_jax.errors import InputError
from f2llm_jax.tokens import Tokenizer
from f2llm_jax.train.dedupe import Digests, number_documents
from f2llm_jax.train.prepare import mix, split_off
from f2llm_jax.train.raw import REASONS, digests, faults, open_dataset, read_rows
from f2llm_jax.train.records import Records, Settings
from f2llm_jax.train.units import usable_cores


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def as_set(examples: list[dict]) -> list[str]:
    return sorted(map(json.dumps, examples))


@pytest.fixture
def usual_open_files() -> Iterator[None]:
    """1,024 files may be open, as anywhere where nobody raised the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_is_written_is_what_a_plain_loop_finds(tmp_path, tiny_release):
    data = {
        "xquad_en": rows(250, negatives=24, seed=1),
        "tatoeba_deu": rows(120, negatives=24, seed=2, shared=40),
        "question_classification": rows(30, negatives=1, seed=3),
    }
    write_raw(tmp_path / "raw", data)
    report = run(tmp_path / "raw", tiny_release, tmp_path / "out", max_length=24)

    backend = Tokenizer.from_release(tiny_release)

    def tokens(text: str) -> list[int]:
        return [*backend.backend.encode(text, add_special_tokens=False).ids[:23], backend.eos_id]

    expected = [
        {"dataset": name, "query": tokens(row["query"]), "documents": [tokens(row[c]) for c in list(row)[1:]]}
        for name, table in data.items()
        for row in table
    ]
    assert as_set(written(tmp_path / "out")) == as_set(expected)
    texts = {row[column] for table in data.values() for row in table for column in list(row)[1:]}
    assert len(source(tmp_path / "out", "documents")) == report["documents"] == len(texts)
    truncated = sum(len(backend.backend.encode(text, add_special_tokens=False).ids) > 23 for text in texts)
    assert 0 < truncated == sum(dataset["truncated_documents"] for dataset in report["datasets"])
    by_name = {dataset["name"]: dataset for dataset in report["datasets"]}
    assert {name: dataset["task"] for name, dataset in by_name.items()} == {
        "question_classification": "classification",
        "tatoeba_deu": "retrieval",
        "xquad_en": "retrieval",
    }
    assert {name: dataset["validation"] for name, dataset in by_name.items()} == {
        "question_classification": 1,
        "tatoeba_deu": 2,
        "xquad_en": 3,
    }
    lengths = sorted(len(tokens(row["query"])) for row in data["xquad_en"])
    assert by_name["xquad_en"]["query_tokens"]["sum"] == sum(lengths)
    assert by_name["xquad_en"]["query_tokens"]["max"] == lengths[-1]
    assert by_name["xquad_en"]["query_tokens"]["median"] == lengths[(len(lengths) - 1) // 2]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert "| xquad_en | retrieval | 250 |" in (tmp_path / "out" / "report.md").read_text()


def test_the_index_holds_the_lengths_of_all_texts(tmp_path, tiny_release, usual_open_files):
    write_raw(tmp_path / "raw", {"xquad_en": rows(130, seed=1), "question_classification": rows(20, negatives=1)})
    run(tmp_path / "raw", tiny_release, tmp_path / "out")
    documents = source(tmp_path / "out", "documents")
    for split in ("train", "validation"):
        lengths = np.load(tmp_path / "out" / "index" / f"{split}.lengths.npy")
        examples = source(tmp_path / "out", "examples", split)
        assert lengths.shape == (len(examples), 26)
        for row, record in zip(lengths.tolist(), examples, strict=True):
            numbers = [record["passage"], *record["negatives"]]
            found = [len(record["query"]), *(len(documents[int(number)]["tokens"]) for number in numbers)]
            assert row == found + [0] * (26 - len(found))
    # Whoever reads may open a file for each shard.
    assert len(Records(tmp_path / "out", "documents", "train")) == len(documents)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 1024


@pytest.mark.filterwarnings("ignore:.* are dropped")
def test_bad_rows_are_dropped_and_counted(tmp_path, tiny_release):
    table = rows(40, negatives=3)
    table[1]["passage"] = ""
    table[2]["passage"] = None
    table[3]["passage"] = " \u3000\n"
    table[4]["negative_2"] = "  "
    table[5]["negative_3"] = table[5]["passage"]
    table[6]["query"] = "\t"
    table[7]["passage"] = table[7]["negative_1"] = ""  # several faults: the first counts
    write_raw(tmp_path / "raw", {"xquad_en": table})
    (dataset,) = run(tmp_path / "raw", tiny_release, tmp_path / "out")["datasets"]
    assert dataset["dropped"] == dict(zip(REASONS, (1, 4, 1, 1), strict=True))
    assert dataset["read"] == 40 and dataset["kept"] == 33 == len(written(tmp_path / "out"))


@pytest.mark.filterwarnings("ignore:.* are dropped")
def test_text_that_is_not_unicode_counts_as_empty(tmp_path, tiny_release):
    columns = {name: [row[name] for row in rows(8, negatives=1)] for name in ("query", "passage", "negative_1")}
    binary = pyarrow.array([b"\xff\xfe", *(text.encode() for text in columns["passage"][1:])])
    arrays = {**columns, "passage": pyarrow.Array.from_buffers(pyarrow.string(), 8, binary.buffers())}
    (tmp_path / "raw").mkdir()
    parquet.write_table(pyarrow.table(arrays), tmp_path / "raw" / "xquad_en.parquet")
    (dataset,) = run(tmp_path / "raw", tiny_release, tmp_path / "out")["datasets"]
    assert dataset["dropped"]["empty_positive"] == 1 and dataset["kept"] == 7


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
@pytest.mark.parametrize("strip", [False, True])
def test_rows_read_together_may_have_no_text_that_is_unicode(tmp_path, kind, strip):
    binary = pyarrow.array(
        [b"\xff"] * 4, pyarrow.large_binary() if kind == pyarrow.large_string() else pyarrow.binary()
    )
    bad = pyarrow.Array.from_buffers(kind, 4, binary.buffers())
    good = pyarrow.array(["a", "b", "c", "d"])
    parquet.write_table(pyarrow.table({"query": good, "passage": bad, "negative_1": good}), tmp_path / "aya.parquet")
    dataset = open_dataset(tmp_path / "aya.parquet", negatives=24)
    ((_, columns),) = read_rows(dataset, strip_instructions=strip)
    assert [REASONS[fault - 1] for fault in faults(columns)] == ["empty_positive"] * 4


@pytest.mark.filterwarnings("ignore:.* are dropped")
def test_stage_1_strips_instructions_and_stage_2_keeps_them(tmp_path, tiny_release):
    table = rows(12, negatives=2, prefix="Instruct: Find: it\nQuery: ")
    table[0]["query"] = "no instruction"
    table[1]["query"] = "Instruct: Given A\nB\nQuery:as in Qwen3-Embedding"
    table[2]["query"] = "Instruct: x\nQuery: What is\nQuery: this?"
    table[3]["passage"] = "Instruct: x\nQuery: a symmetric task's document"
    table[4]["query"] = "Instruct: x\nQuery: "
    write_raw(tmp_path / "raw", {"xquad_en": table})
    (dataset,) = run(tmp_path / "raw", tiny_release, tmp_path / "two", stage=2)["datasets"]
    assert sum(dataset["dropped"].values()) == 0
    (dataset,) = run(tmp_path / "raw", tiny_release, tmp_path / "one", stage=1)["datasets"]
    assert dataset["dropped"]["empty_query"] == 1
    decode = Tokenizer.from_release(tiny_release).backend.decode
    queries = {decode(example["query"]) for example in written(tmp_path / "one")}
    assert {"no instruction", "as in Qwen3-Embedding", "What is\nQuery: this?"} < queries
    assert not any("Instruct" in query for query in queries)
    passages = {decode(example["documents"][0]) for example in written(tmp_path / "one")}
    assert "a symmetric task's document" in passages
    assert all(decode(e["query"]).startswith(("Instruct: ", "no")) for e in written(tmp_path / "two"))


def test_caps_choose_at_random_and_count_sources_together(tmp_path, tiny_release):
    data = {name: rows(100, negatives=1, seed=n) for n, name in enumerate(("mqa_de", "paracrawl_a", "paracrawl_b"))}
    data["mqa_de"][0]["passage"] = ""  # a bad row takes no place under the cap
    write_raw(tmp_path / "raw", data)

    def kept(out: str, **options) -> dict[str, int]:
        report = run(tmp_path / "raw", tiny_release, tmp_path / out, **options)
        assert all(d["capped"] + d["kept"] + sum(d["dropped"].values()) == d["read"] for d in report["datasets"])
        return {dataset["name"]: dataset["kept"] for dataset in report["datasets"]}

    assert kept("each", cap=99) == {"mqa_de": 99, "paracrawl_a": 99, "paracrawl_b": 99}
    grouped = kept("grouped", cap=60, sources=["paracrawl_*"])
    assert grouped["mqa_de"] == 60 == grouped["paracrawl_a"] + grouped["paracrawl_b"]
    assert 15 < grouped["paracrawl_a"] < 45  # of 30 ± 3.4
    kept("again", cap=60, sources=["paracrawl_*"])
    assert tree(tmp_path / "again") == tree(tmp_path / "grouped")
    kept("seed", cap=60, sources=["paracrawl_*"], seed=1)
    one, other = (as_set(written(tmp_path / out)) for out in ("again", "seed"))
    assert one != other
    first_rows = {json.dumps(row["query"]) for row in data["mqa_de"][:60]}
    decode = Tokenizer.from_release(tiny_release).backend.decode
    queries = {json.dumps(decode(e["query"])) for e in written(tmp_path / "again") if e["dataset"] == "mqa_de"}
    assert len(queries) == 60 and 20 < len(queries & first_rows) < 52
    with pytest.raises(InputError, match="cap must be 0, for none, or more, not -1"):
        kept("none", cap=-1)
    assert kept("none", stage=1) == {"mqa_de": 99, "paracrawl_a": 100, "paracrawl_b": 100}


def test_include_exclude_and_sets(tmp_path, tiny_release):
    names = ("mkqa_de", "sib200", "webfaq_deu", "xquad_en")
    write_raw(tmp_path / "raw", {name: rows(4, negatives=1) for name in names})
    report = run(tmp_path / "raw", tiny_release, tmp_path / "out", exclude=["@overlapping", "xq*"])
    assert [dataset["name"] for dataset in report["datasets"]] == ["webfaq_deu"]
    assert report["excluded"] == ["mkqa_de", "sib200", "xquad_en"]
    report = run(tmp_path / "raw", tiny_release, tmp_path / "one", include=["@stage1"])
    assert [dataset["name"] for dataset in report["datasets"]] == ["webfaq_deu"]
    write_raw(tmp_path / "two", {name: rows(4, negatives=1) for name in ("webfaq_deu", "webfaq_eng")})
    grouped = run(tmp_path / "two", tiny_release, tmp_path / "grouped", sources=["@stage1"])
    assert grouped["grouped_sources"] == ["webfaq_deu+webfaq_eng"]
    with pytest.raises(InputError, match="none of the 4 datasets"):
        run(tmp_path / "raw", tiny_release, tmp_path / "none", include=["x*"], exclude=["*en"])
    for option, glob in (("include", "a*"), ("include", "xquad_e"), ("exclude", "xquad"), ("sources", "paracrawl_*")):
        flag = option.removesuffix("s")
        with pytest.raises(InputError, match=f"--{flag} {re.escape(glob)} matches none of the 4 datasets in .*raw"):
            run(tmp_path / "raw", tiny_release, tmp_path / "none", **{option: ["*", glob]})
    with pytest.raises(InputError, match=r"--task xquad matches none of the 4 datasets in .*raw"):
        run(tmp_path / "raw", tiny_release, tmp_path / "none", tasks={"*": "retrieval", "xquad": "clustering"})
    write_raw(tmp_path / "other", {"xquad_en": rows(4, negatives=1)})
    with pytest.raises(InputError, match="--include @stage1 matches none of the 1 datasets"):
        run(tmp_path / "other", tiny_release, tmp_path / "none", include=["@stage1", "*"])
    assert run(tmp_path / "other", tiny_release, tmp_path / "none", exclude=["@overlapping"])["excluded"] == []
    with pytest.raises(InputError, match=r"no set '@mteb'.*@stage1, @overlapping"):
        expand(["@mteb"])
    assert set(SETS) == {"stage1", "overlapping"}


def test_an_unknown_dataset_is_an_error_that_says_how_to_add_it(tmp_path, tiny_release, capsys):
    write_raw(tmp_path / "raw", {"my_data": rows(4, negatives=1)})
    arguments = ["prepare", "--raw", str(tmp_path / "raw"), "--tokenizer", str(tiny_release), "--out"]
    assert main([*arguments, str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert (
        "'my_data' is unknown" in message
        and "--task 'my_data=retrieval'" in message
        and "configs/datasets.py" in message
    )
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.incomplete").exists()
    options = ["--task", "my_*=clustering", "--workers", "1", "--quiet"]
    assert main([*arguments, str(tmp_path / "out"), *options]) == 0
    assert "3 + 1 examples" in capsys.readouterr().out
    assert Settings.read(tmp_path / "out").datasets[0].task == "clustering"
    with pytest.raises(SystemExit):
        main([*arguments, str(tmp_path / "no"), "--task", "my_*=ranking"])
    assert "retrieval, clustering, classification" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dataset", "task"),
    [
        ("paracrawl_so-en", "retrieval"),
        ("xcodeeval_code2code_C#", "retrieval"),
        ("xcodeeval_translation", "clustering"),
        ("bactrianx_language_classification", "clustering"),
        ("nordic_classification_danish", "classification"),
        ("nordic_sts_danish", "retrieval"),
        ("mlsum_retrieval_de", "retrieval"),
        ("mlsum_clustering_de", "clustering"),
        ("imdb", "classification"),
        ("stackexchange", "retrieval"),
        ("stackexchange_clustering_p2p", "clustering"),
    ],
)
def test_tasks_of_released_datasets(dataset, task):
    assert tasks_of([dataset]) == {dataset: task}
    assert [known for known, globs in TASKS.items() if matches(dataset, globs)] == [task]


def test_a_task_of_ones_own_goes_before_the_tables():
    own = {"@overlapping": "clustering", "sib*": "classification"}
    tasks = tasks_of(["mkqa_de", "sib200", "xquad_en"], own)
    assert tasks == {"mkqa_de": "clustering", "sib200": "clustering", "xquad_en": "retrieval"}


def test_bad_raw_folders_are_errors_that_leave_nothing(tmp_path, tiny_release):
    raw, out = tmp_path / "raw", tmp_path / "out"
    with pytest.raises(InputError, match="not a folder"):
        run(raw, tiny_release, out)
    raw.mkdir()
    with pytest.raises(InputError, match=r"no \.parquet or \.jsonl files"):
        run(raw, tiny_release, out)
    (raw / "xquad_en.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(InputError, match="damaged"):
        run(raw, tiny_release, out)
    parquet.write_table(pyarrow.table({"query": ["a"], "answer": ["b"]}), raw / "xquad_en.parquet")
    with pytest.raises(InputError, match=r"has the columns query, answer, which are of no known layout"):
        run(raw, tiny_release, out)
    parquet.write_table(pyarrow.table({"query": ["a"], "passage": [1]}), raw / "xquad_en.parquet")
    with pytest.raises(InputError, match="'passage' holds int64"):
        run(raw, tiny_release, out)
    write_raw(raw, {"xquad_en": [{**row, "passage": ""} for row in rows(3)]})
    with pytest.raises(InputError, match="every row"):
        run(raw, tiny_release, out)
    write_raw(raw, {"xquad_en": rows(3, negatives=0), "imdb": rows(3, negatives=0)})
    with pytest.raises(InputError, match=r"'imdb' is for classification, .* and has none: .*--exclude"):
        run(raw, tiny_release, out)
    write_raw(raw, {"xquad_en": rows(2000)})
    data = bytearray((raw / "xquad_en.parquet").read_bytes())
    data[2000:3000] = bytes(1000)
    (raw / "xquad_en.parquet").write_bytes(data)
    with pytest.raises(InputError, match="damaged"):
        run(raw, tiny_release, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


def test_workers_are_as_many_as_cores_also_on_macos(tmp_path, tiny_release, monkeypatch):
    assert usable_cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores() == os.cpu_count()
    run(write_raw(tmp_path / "raw", {"xquad_en": rows(2)}), tiny_release, tmp_path / "out", workers=None)


def test_an_existing_output_is_refused_and_replaced_by_force(tmp_path, tiny_release):
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_raw(raw, {"xquad_en": rows(5)})
    run(raw, tiny_release, out)
    write_raw(raw, {"xquad_en": rows(6)})
    with pytest.raises(InputError, match="exists; --force replaces it"):
        run(raw, tiny_release, out)
    assert len(written(out)) == 5
    run(raw, tiny_release, out, force=True)
    assert len(written(out)) == 6
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match=r"no prepared\.json"):
        run(raw, tiny_release, tmp_path / "mine", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out", "raw"]


def test_rows_are_read_the_same_from_any_layout_and_place(tmp_path):
    table = pyarrow.Table.from_pylist(rows(1000, negatives=2))
    for name, options in {"one": {"row_group_size": 1000}, "many": {"row_group_size": 70}}.items():
        (tmp_path / name).mkdir()
        parquet.write_table(table, tmp_path / name / "xquad_en.parquet", **options)
        dataset = open_dataset(tmp_path / name / "xquad_en.parquet", negatives=24)
        for first, last in ((0, 1000), (0, 1), (69, 71), (255, 700), (999, 1000)):
            read = list(read_rows(dataset, strip_instructions=False, first=first, last=last))
            assert read[0][0] == first
            assert [t for _, columns in read for t in columns[1].to_pylist()] == table["passage"].to_pylist()[
                first:last
            ]


def test_strings_are_read_from_any_type_of_column(tmp_path):
    texts = ["Instruct: X\nQuery: a", None, "long enough not to be kept within a view", " "]
    binary = pyarrow.array([b"\xff", *(text and text.encode() for text in texts[1:])], pyarrow.large_binary())
    plain = pyarrow.array(texts)
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), plain.dictionary_encode().type):
        table = pyarrow.table({"query": plain.cast(kind), "passage": plain.cast(kind)})
        if not pyarrow.types.is_dictionary(kind):
            table = table.append_column("negative_1", binary.view(pyarrow.large_string()).cast(kind))
        parquet.write_table(table, tmp_path / "xquad_en.parquet")
        dataset = open_dataset(tmp_path / "xquad_en.parquet", negatives=24)
        assert parquet.read_schema(dataset.file).field("query").type == kind
        ((_, columns),) = read_rows(dataset, strip_instructions=True)
        query, passage, *negatives = (column.to_pylist() for column in columns)
        assert query == passage == ["a", *texts[1:]]
        assert negatives in ([], [[None, *texts[1:]]])
        assert faults(columns)[[1, 3]].tolist() == [1, 1] and len(digests(columns)) == len(texts)
        ((_, columns),) = read_rows(dataset, strip_instructions=False, query_prompt="P: ")
        assert columns[0].to_pylist() == [texts[0], None, "P: " + texts[2], " "]


def test_only_numbered_columns_are_negatives(tmp_path):
    names = ("query", "passage", "negative_1", "negative_1_score", "negative_passages")
    parquet.write_table(pyarrow.table({name: [name] for name in names}), tmp_path / "xquad_en.parquet")
    assert open_dataset(tmp_path / "xquad_en.parquet", negatives=24).negatives == 1


@pytest.mark.parametrize("memory", [1 << 30, 1 << 16, 4096, 400])
def test_documents_are_numbered_by_first_occurrence(tmp_path, memory, usual_open_files):
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 900, (300, 5)), np.zeros((40, 2), int), rng.integers(500, 2500, (211, 3))]
    digests = [
        mix((values.astype(np.uint64)[..., None] + np.uint64(7)) * np.array([1, 3], np.uint64)) for values in texts
    ]
    (tmp_path / "buckets").mkdir()
    outputs = [tmp_path / str(n) for n in range(len(texts))]
    starts = number_documents(
        [Digests(len(d), d.shape[1], lambda first, count, d=d: d[first : first + count]) for d in digests],
        outputs,
        tmp_path / "buckets",
        memory=memory,
    )
    number: dict[int, int] = {}
    for values, output, start, end in zip(texts, outputs, starts[:-1], starts[1:], strict=True):
        assert start == len(number)
        expected = [[number.setdefault(int(text), len(number)) for text in row] for row in values]
        assert np.fromfile(output, "<i4").reshape(values.shape).tolist() == expected
        assert end == len(number)


def test_validation_takes_one_in_a_hundred_and_never_parts_equal_queries():
    rng = np.random.default_rng(0)
    for count in (1, 2, 99, 100, 101, 5000):
        mask = split_off(rng.integers(0, 2**63, count).astype(np.uint64), np.uint64(5))
        assert mask.sum() == (0 if count == 1 else -(-count // 100))
    queries = rng.integers(0, 1000, 5000).astype(np.uint64)
    mask = split_off(queries, np.uint64(5))
    assert 40 <= mask.sum() <= 50
    assert not set(queries[mask].tolist()) & set(queries[~mask].tolist())
    assert (mask == split_off(queries, np.uint64(5))).all() and (mask != split_off(queries, np.uint64(6))).any()


def test_workers_and_a_kill_change_no_byte(tmp_path, tiny_release):
    raw = tmp_path / "raw"
    write_raw(raw, {name: rows(2000, negatives=6, seed=len(name), words=30) for name in ("xquad_en", "mqa_deu", "aya")})
    run(raw, tiny_release, tmp_path / "whole", max_length=64)

    out, incomplete = tmp_path / "out", tmp_path / "out.incomplete"
    arguments = ["--raw", raw, "--tokenizer", tiny_release, "--out", out, "--max-length", "64", "--memory", "1"]
    command = [sys.executable, "-m", "f2llm_jax.cli", "prepare", *map(str, arguments), "--workers", "2", "--quiet"]
    for stage in ("scan", "pieces"):
        process = subprocess.Popen(command, start_new_session=True)
        try:
            while not list(incomplete.glob(f"{stage}/[!.]*")):
                assert process.poll() is None
                time.sleep(0.01)
            with pytest.raises(InputError, match="another process right now"):
                run(raw, tiny_release, out, max_length=64)
        finally:
            process.kill()
            process.wait()
        _wait_for_the_end_of(process.pid)
        assert incomplete.is_dir() and not out.exists()

    with pytest.raises(InputError, match=r"unfinished work with another max_length.*--force"):
        run(raw, tiny_release, out, max_length=32)
    run(raw, tiny_release, out, max_length=64)
    assert tree(out) == tree(tmp_path / "whole")
    assert not incomplete.exists()


def _wait_for_the_end_of(group: int) -> None:
    """Workers end by themselves when their parent is killed."""
    for _ in range(500):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    os.killpg(group, signal.SIGKILL)
    pytest.fail("workers outlive their killed parent")


READING = """
from pathlib import Path
from f2llm_jax.train.raw import digests, faults, open_dataset, read_rows

def work(rows):
    dataset = open_dataset(Path("xquad_en.parquet"), negatives=24)
    assert dataset.rows == rows
    start = peak()
    for _, columns in read_rows(dataset, strip_instructions=False):
        digests(columns), faults(columns)
    return peak() - start
"""

NUMBERING = """
from pathlib import Path
import numpy as np
from f2llm_jax.train.dedupe import Digests, number_documents
from f2llm_jax.train.prepare import mix

def work(rows):
    Path("buckets").mkdir()
    def read(first, count):
        numbers = np.arange(first * 25, (first + count) * 25, dtype=np.uint64) // np.uint64(2)
        return np.stack([mix(numbers), mix(numbers + np.uint64(1))], axis=1).reshape(count, 25, 2)
    start = peak()
    starts = number_documents([Digests(rows, 25, read)], [Path("numbers")], Path("buckets"), memory=8 << 20)
    assert starts == [0, (rows * 25 + 1) // 2]
    return peak() - start
"""


# Not ru_maxrss, which a process takes over from the one that started it.
PEAK = """
import re

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
"""


def _peak_growth(script: str, rows: int, folder: Path) -> float:
    """Megabytes by which ``work`` of the script raises the peak of a fresh process."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", f"{PEAK}{script}\nprint(work({rows}))"]
    growth = float(subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout)
    print(f"{rows} rows: {growth:.1f} MB")
    return growth


def test_memory_for_numbering_does_not_grow_with_the_rows(tmp_path):
    """Sixteen times the rows (32 MB of digests), in 8 MB."""
    small = _peak_growth(NUMBERING, 5_000, tmp_path / "small")
    large = _peak_growth(NUMBERING, 80_000, tmp_path / "large")
    assert large < small + 8 and large < 40


def test_a_row_group_is_read_in_bounded_memory(tmp_path):
    """A single row group of 200 MB, most of it one column's."""
    text = pyarrow.array([f"{n} " + "some words " * 180 for n in range(2000)])
    short = pyarrow.array([str(n) for n in range(2000)])
    columns = {"query": [short] * 50, "passage": [text] * 50, "negative_1": [short] * 50}
    table = pyarrow.table({name: pyarrow.chunked_array(chunks) for name, chunks in columns.items()})
    parquet.write_table(
        table, tmp_path / "xquad_en.parquet", row_group_size=100_000, use_dictionary=False, compression="none"
    )
    assert (tmp_path / "xquad_en.parquet").stat().st_size > 190e6
    assert _peak_growth(READING, 100_000, tmp_path) < 90  # with whole column chunks it is 243


def test_the_shared_mix_is_kept_whole(tmp_path):
    skip_without_shared()
    include = ["question_classification", "tatoeba_deu", "tatoeba_fra"]
    report = run(SHARED / "train_raw", QWEN_TOKENIZER, tmp_path / "out", include=include)
    texts, queries = set(), []
    for name in include:
        table = parquet.read_table(SHARED / "train_raw" / f"{name}.parquet")
        queries += table["query"].to_pylist()
        for column in table.column_names[1:]:
            texts |= set(table[column].to_pylist())
    assert report["documents"] == len(texts)
    assert [sum(d["dropped"].values()) for d in report["datasets"]] == [0] * 3
    tokenizer = Tokenizer.from_release(QWEN_TOKENIZER)
    examples = written(tmp_path / "out")
    eos_id = tokenizer.backend.token_to_id("<|im_end|>")
    sequences = [tokens for example in examples for tokens in (example["query"], *example["documents"])]
    assert all(tokens.index(eos_id) == len(tokens) - 1 for tokens in sequences)
    assert sorted(tokenizer.backend.decode(example["query"]) for example in examples) == sorted(
        tokenizer.backend.decode(tokenizer.backend.encode(query).ids) for query in queries
    )
