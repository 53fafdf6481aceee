"""The command line: every format in and out, every error as one line, and outputs equal to the library's."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from releases import TINY

import f2llm_jax as f2llm
from f2llm_jax.cli import COMMANDS, main, make_parser
from f2llm_jax.commands import load_model
from f2llm_jax.dtypes import FILE_OUTPUTS
from f2llm_jax.files import new_file

TEXTS = [
    "The quick brown fox jumps over the lazy dog",
    "",
    "할머니는 매일 아침 차를 마십니다.",
    "تشرب جدتي الشاي",
    "one, \"two\" and 'three'\tfour",
    "no line break: \u2028, \x0b or \x0c",
    "def f(x):",
    "the lazy dog",
]
BROKEN_LINES = ["a text\nof two lines", "and\r\nanother"]


@pytest.fixture(scope="module")
def expected(tiny: f2llm.Encoder) -> np.ndarray:
    return tiny.encode(TEXTS)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "corpus.txt", TEXTS)


def write_texts(file: Path, texts: list[str], field: str = "text", ids: list | None = None) -> Path:
    columns = {field: texts} | ({} if ids is None else {"id": ids})
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if file.suffix == ".txt":
        file.write_bytes("".join(f"{text}\n" for text in texts).encode())
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif file.suffix == ".csv":
        with file.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(columns))
            writer.writeheader()
            writer.writerows(rows)
    else:
        parquet.write_table(pyarrow.table(columns), file)
    return file


def encode(release: Path, source: str | Path, output: Path, *options: str) -> int:
    return main(["encode", "--model", str(release), "--input", str(source), "--output", str(output), *options])


def error_of(capsys: pytest.CaptureFixture[str], status: int) -> str:
    """The one line of standard error that a failed command prints."""
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert captured.err.startswith("f2llm: error: ")
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n")
    return captured.err


def run(*args: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "f2llm_jax.cli", *args], capture_output=True, **options)


# --- inputs


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv", "parquet"])
def test_encode_reads_every_format(suffix, tiny_release, tiny, tmp_path):
    texts = TEXTS if suffix == "txt" else TEXTS + BROKEN_LINES
    source = write_texts(tmp_path / f"in.{suffix}", texts)
    assert encode(tiny_release, source, tmp_path / "out.npy") == 0
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), tiny.encode(texts))


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_encode_reads_the_field_asked_for(suffix, tiny_release, expected, tmp_path):
    source = write_texts(tmp_path / f"in.{suffix}", TEXTS, field="body")
    assert encode(tiny_release, source, tmp_path / "out.npy", "--field", "body") == 0
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected)


def test_txt_with_byte_order_mark_crlf_and_no_last_newline(tiny_release, expected, tmp_path):
    source = tmp_path / "in.txt"
    source.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(TEXTS).encode())
    assert encode(tiny_release, source, tmp_path / "out.npy") == 0
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected)


def test_jsonl_skips_blank_lines(tiny_release, expected, tmp_path):
    source = write_texts(tmp_path / "in.jsonl", TEXTS)
    source.write_text(source.read_text(encoding="utf-8").replace("\n", "\n \n"), encoding="utf-8")
    assert encode(tiny_release, source, tmp_path / "out.npy") == 0
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected)


def test_csv_cells_may_be_longer_than_the_csv_module_likes(tmp_path):
    from f2llm_jax.texts import read_texts

    long = "word " * 100_000
    assert read_texts(write_texts(tmp_path / "in.csv", [long, "short"])).texts == [long, "short"]


@pytest.mark.parametrize("type_", [pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())])
def test_parquet_strings_of_every_kind(type_, tmp_path):
    from f2llm_jax.texts import read_texts

    parquet.write_table(pyarrow.table({"text": pyarrow.array(TEXTS).cast(type_)}), tmp_path / "in.parquet")
    assert read_texts(tmp_path / "in.parquet").texts == TEXTS


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv", "parquet"])
def test_standard_input(suffix, tiny_release, expected, tmp_path, monkeypatch):
    source = write_texts(tmp_path / f"in.{suffix}", TEXTS)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(source.read_bytes())))
    options = [] if suffix == "txt" else ["--input-format", suffix]
    assert encode(tiny_release, "-", tmp_path / "out.npy", *options) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected)


def test_input_format_wins_over_the_extension(tiny_release, expected, tmp_path):
    source = write_texts(tmp_path / "in.txt", TEXTS).rename(tmp_path / "in.csv")
    assert encode(tiny_release, source, tmp_path / "out.npy", "--input-format", "txt") == 0
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected)


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_no_texts_give_no_embeddings(suffix, tiny_release, tmp_path):
    table = pyarrow.table({"text": pyarrow.array([], pyarrow.string())})
    source = tmp_path / f"in.{suffix}"
    parquet.write_table(table, source) if suffix == "parquet" else source.touch()
    assert encode(tiny_release, source, tmp_path / "out.npy", "--dim", "8") == 0
    assert np.load(tmp_path / "out.npy").shape == (0, 8)
    assert encode(tiny_release, source, tmp_path / "out.parquet", "--dim", "8") == 0
    assert parquet.read_table(tmp_path / "out.parquet").num_rows == 0


# --- outputs


@pytest.mark.parametrize(
    ("suffix", "ids", "kept"),
    [
        ("txt", None, pyarrow.array(range(len(TEXTS)))),
        ("jsonl", [f"doc-{n}" for n in range(len(TEXTS))], None),
        ("jsonl", [7 * n for n in range(len(TEXTS))], None),
        ("csv", [f"{n:03d}" for n in range(len(TEXTS))], None),
        ("parquet", pyarrow.array(range(len(TEXTS)), pyarrow.uint16()), None),
        ("parquet", pyarrow.array([None, *"abcdefg"], pyarrow.large_string()), None),
    ],
)
def test_parquet_output_keeps_ids(suffix, ids, kept, tiny_release, expected, tmp_path):
    source = write_texts(tmp_path / f"in.{suffix}", TEXTS, ids=ids)
    assert encode(tiny_release, source, tmp_path / "out.parquet") == 0
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["id", "embedding"]
    assert table["id"].combine_chunks() == (pyarrow.array(ids) if kept is None else kept)
    assert table["embedding"].type == pyarrow.list_(pyarrow.float32(), TINY.hidden_size)
    np.testing.assert_array_equal(np.array(table["embedding"].to_pylist(), np.float32), expected)


@pytest.mark.parametrize("output_type", FILE_OUTPUTS)
@pytest.mark.parametrize("suffix", ["npy", "parquet"])
def test_output_types(output_type, suffix, tiny_release, tiny, corpus, tmp_path, capsys):
    out = tmp_path / f"out.{suffix}"
    assert encode(tiny_release, corpus, out, "--dim", "32", "--output-type", output_type) == 0
    full = tiny.encode(TEXTS, dim=32)
    wanted = f2llm.quantize(full, output_type, f2llm.int8_ranges(full) if output_type == "int8" else None)
    if suffix == "npy":
        written = np.load(out)
        assert written.dtype == wanted.dtype
    else:
        column = parquet.read_table(out)["embedding"]
        assert column.type == pyarrow.list_(pyarrow.from_numpy_dtype(wanted.dtype), wanted.shape[1])
        written = np.array(column.to_pylist(), wanted.dtype)
    np.testing.assert_array_equal(written, wanted)
    assert (tmp_path / "out.ranges.npy").exists() == (output_type == "int8")
    assert f"{len(TEXTS)} embeddings" in capsys.readouterr().out


def test_int8_ranges_of_one_output_serve_the_next(tiny_release, tiny, corpus, tmp_path):
    assert encode(tiny_release, corpus, tmp_path / "docs.npy", "--output-type", "int8") == 0
    ranges = np.load(tmp_path / "docs.ranges.npy")
    np.testing.assert_array_equal(ranges, f2llm.int8_ranges(tiny.encode(TEXTS)))

    queries = write_texts(tmp_path / "queries.txt", ["the lazy dog", "fox"])
    options = ("--output-type", "int8", "--ranges", str(tmp_path / "docs.ranges.npy"))
    assert encode(tiny_release, queries, tmp_path / "queries.npy", *options) == 0
    wanted = tiny.encode(["the lazy dog", "fox"], output="int8", ranges=ranges)
    np.testing.assert_array_equal(np.load(tmp_path / "queries.npy"), wanted)
    assert not (tmp_path / "queries.ranges.npy").exists()


@pytest.mark.parametrize("prompt", [{"prompt_name": "query"}, {"prompt": "Say: "}])
def test_encode_with_a_prompt(prompt, tiny_release, tiny, corpus, tmp_path):
    ((name, value),) = prompt.items()
    assert encode(tiny_release, corpus, tmp_path / "out.npy", "--" + name.replace("_", "-"), value) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), tiny.encode(TEXTS, **prompt))


def test_encode_passes_its_options_on(tiny_release, corpus, tmp_path, monkeypatch):
    calls = []

    def spy(self, texts, **options):
        calls.append((self.dtype, options))
        return np.zeros((len(texts), options["dim"]), np.float32)

    monkeypatch.setattr(f2llm.Encoder, "encode", spy)
    options = ["--dim", "8", "--max-length", "4", "--batch-tokens", "64", "--prompt", "", "--dtype", "bfloat16"]
    assert encode(tiny_release, corpus, tmp_path / "out.npy", *options) == 0
    wanted = {"prompt_name": None, "prompt": "", "dim": 8, "max_length": 4, "batch_tokens": 64, "output": "float32"}
    assert calls == [("bfloat16", {**wanted, "ranges": None, "show_progress": False})]


def test_encode_in_bfloat16(tiny_release, corpus, tmp_path):
    assert encode(tiny_release, corpus, tmp_path / "out.npy", "--dtype", "bfloat16") == 0
    wanted = f2llm.load(tiny_release, dtype="bfloat16").encode(TEXTS)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), wanted)


# --- an output is there when it is complete, and replaces nothing unasked


def test_an_existing_output_is_refused_before_any_work(corpus, tmp_path, capsys):
    out = tmp_path / "out.npy"
    out.write_bytes(b"mine")
    # Neither the model nor the input exists: the output is what is looked at first.
    message = error_of(capsys, encode(tmp_path / "no-model", tmp_path / "no-input.txt", out))
    assert "out.npy exists; --force" in message
    assert out.read_bytes() == b"mine"


def test_existing_ranges_are_refused_too(tiny_release, corpus, tmp_path, capsys):
    ranges = tmp_path / "out.ranges.npy"
    ranges.write_bytes(b"mine")
    message = error_of(capsys, encode(tiny_release, corpus, tmp_path / "out.npy", "--output-type", "int8"))
    assert "out.ranges.npy exists; --force" in message
    assert ranges.read_bytes() == b"mine"
    assert encode(tiny_release, corpus, tmp_path / "out.npy", "--output-type", "int8", "--force") == 0
    assert np.load(ranges).shape == (2, TINY.hidden_size)


def test_force_replaces(tiny_release, expected, corpus, tmp_path):
    out = tmp_path / "out.npy"
    out.write_bytes(b"mine")
    assert encode(tiny_release, corpus, out, "--force") == 0
    np.testing.assert_array_equal(np.load(out), expected)


def test_force_does_not_replace_the_input(tiny_release, tmp_path, capsys):
    source = write_texts(tmp_path / "in.parquet", TEXTS)
    before = source.read_bytes()
    assert "is the input too" in error_of(capsys, encode(tiny_release, source, source, "--force"))
    assert source.read_bytes() == before


@pytest.mark.parametrize("suffix", ["npy", "parquet"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_what_was_there(
    failure, suffix, tiny_release, corpus, tmp_path, capsys, monkeypatch
):
    from f2llm_jax.commands import encode as command

    def half_written(stream, embeddings, ids):
        stream.write(embeddings.tobytes()[:100])
        stream.flush()
        assert len(os.listdir(tmp_path)) == 3  # the test does fail in the middle: a temporary file is there
        raise failure

    out = tmp_path / f"out.{suffix}"
    out.write_bytes(b"mine")
    monkeypatch.setitem(command.WRITERS, f".{suffix}", half_written)
    monkeypatch.setattr(command, f"_write_{suffix}", half_written)
    status = encode(tiny_release, corpus, out, "--force")
    if isinstance(failure, KeyboardInterrupt):
        assert status == 130
        assert capsys.readouterr().err == "f2llm: interrupted\n"
    else:
        assert "No space left on device" in error_of(capsys, status)
    assert out.read_bytes() == b"mine"
    assert sorted(os.listdir(tmp_path)) == ["corpus.txt", out.name]


def test_what_a_killed_process_left_is_neither_in_the_way_nor_removed(tmp_path):
    """In containers every process may have the same host name and number."""
    with new_file(tmp_path / "out") as stream:
        left = tmp_path / Path(stream.name).name
        with new_file(tmp_path / "out") as second:
            second.write(b"second")
        assert left.exists()
        stream.write(b"first")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("out", b"first")]


def test_a_failure_while_encoding_leaves_nothing(tiny_release, corpus, tmp_path, capsys, monkeypatch):
    def fail(self, texts, **options):
        raise f2llm.InputError("half way")

    monkeypatch.setattr(f2llm.Encoder, "encode", fail)
    assert "half way" in error_of(capsys, encode(tiny_release, corpus, tmp_path / "out.npy"))
    assert os.listdir(tmp_path) == ["corpus.txt"]


# --- errors


BAD_INPUTS = {
    "missing.txt": (None, "missing.txt: No such file or directory"),
    "in.md": (b"text", "in.md: unknown format 'md'; formats are txt, jsonl, csv, parquet"),
    "name": (b"text", "name: no extension to tell the format by; formats are txt"),
    "bytes.txt": (b"fine\n\xff\xfe\n", "bytes.txt, line 2: not valid UTF-8: byte 0xff at column 1"),
    "bytes.csv": (b"text\nfine\nab\xff\n", "bytes.csv, line 3: not valid UTF-8: byte 0xff at column 3"),
    "bad.jsonl": (b'{"text": "a"}\n{"text": \n', "bad.jsonl, line 2: not valid JSON"),
    "deep.jsonl": (b"[" * 100_000, "deep.jsonl, line 1: not valid JSON"),
    "list.jsonl": (b'["a"]', "list.jsonl, line 1: should be a JSON object, not of type list"),
    "field.jsonl": (b'{"text": "a"}\n{"body": "b"}', "field.jsonl, line 2: no field 'text'; there are 'body'"),
    "null.jsonl": (b'{"text": "a"}\n\n{"text": null}', "null.jsonl, line 3: field 'text' is null, not a string"),
    "int.jsonl": (b'{"text": 5}', "int.jsonl, line 1: field 'text' is of type int, not a string"),
    "half.jsonl": (b'{"text": "a\\ud800"}', "half.jsonl, line 1: character 1 is half of a surrogate pair"),
    "field.csv": (b"id,body\n1,a\n", "field.csv has no column 'text' in its first line; there are id, body"),
    "twice.csv": (b"text,text\n1,a\n", "twice.csv has more than one column 'text'"),
    "empty.csv": (b"", "empty.csv is empty"),
    "short.csv": (b'id,text\n1,"a\nb"\n2\n', "short.csv, line 4: 1 cells in a table of 2 columns"),
    "quote.csv": (b'text\n"a', "quote.csv, line 2: not valid CSV"),
    "bad.parquet": (b"PAR1 no", "bad.parquet is not valid Parquet"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_a_bad_input_is_one_clear_line(name, tiny_release, tmp_path, capsys):
    content, message = BAD_INPUTS[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert message in error_of(capsys, encode(tiny_release, tmp_path / name, tmp_path / "out.npy"))
    assert not (tmp_path / "out.npy").exists()


BAD_COLUMNS = {
    "no column 'text'; there are body": {"body": ["a"]},
    "in.parquet, row 1: field 'text' is null, not a string": {"text": ["a", None]},
    "in.parquet, row 0: field 'text' is of type int, not a string": {"text": [5]},
    "in.parquet, row 2: field 'text' is not valid UTF-8": {
        "text": pyarrow.array([b"a", b"b", b"\xff"]).cast(pyarrow.binary()).view(pyarrow.string())
    },
}


@pytest.mark.parametrize("message", BAD_COLUMNS)
def test_a_bad_parquet_column_is_one_clear_line(message, tiny_release, tmp_path, capsys):
    parquet.write_table(pyarrow.table(BAD_COLUMNS[message]), tmp_path / "in.parquet")
    assert message in error_of(capsys, encode(tiny_release, tmp_path / "in.parquet", tmp_path / "out.npy"))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ('"one"', "ids do not make a column"),
        ('"\\ud800"', "the id of the input's row 1: character 0 is half of a surrogate pair"),
    ],
)
def test_ids_that_make_no_column_are_found_before_the_work(second, message, tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_text(f'{{"text": "a", "id": 1}}\n{{"text": "b", "id": {second}}}\n')
    assert message in error_of(capsys, encode(tmp_path / "no-model", source, tmp_path / "out.parquet"))


def test_bad_arguments_are_one_clear_line(tiny_release, corpus, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.npy"
    ranges = tmp_path / "ranges.npy"
    ranges.write_bytes(b"no numbers")
    archive = tmp_path / "archive.npy"
    archive.write_bytes(b"PK\x03\x04no archive")
    one = write_texts(tmp_path / "one.txt", ["a"])
    cases = [
        ([corpus, tmp_path / "out.txt"], "the output is a .npy or .parquet file, not '.txt'"),
        ([corpus, "."], ".: the output is a .npy or .parquet file, not ''"),
        ([corpus, tmp_path / "nowhere" / "out.npy"], "nowhere is not a folder"),
        ([tmp_path, out, "--input-format", "txt"], "Is a directory"),
        ([corpus, out, "--dim", "97"], "dim must be a whole number within 1..96, not 97"),
        ([corpus, out, "--max-length", "0"], "max_length must be a whole number within 1..2048, not 0"),
        ([corpus, out, "--prompt-name", "poem"], "no prompt named 'poem'; there are 'query', 'document'"),
        ([corpus, out, "--revision", "main"], "is a local folder; a revision ('main') belongs to a hub id"),
        ([corpus, out, "--ranges", str(ranges)], "--ranges is for --output-type int8"),
        ([corpus, out, "--output-type", "int8", "--ranges", str(ranges)], "is not a .npy file of float ranges"),
        ([corpus, out, "--output-type", "int8", "--ranges", str(archive)], "is not a .npy file of float ranges"),
        ([corpus, out, "--output-type", "int8", "--ranges", str(tmp_path / "no.npy")], "No such file"),
        ([one, out, "--output-type", "int8"], "needs at least 2 texts, not 1"),
    ]
    for arguments, message in cases:
        assert message in error_of(capsys, encode(tiny_release, *arguments))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"{ranges} exists; --force" in error_of(capsys, encode(tiny_release, corpus, "~/ranges.npy"))
    assert "is neither a folder nor a hub id" in error_of(capsys, encode(tmp_path / "no-model", corpus, out))
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["embed"], "invalid choice: 'embed'"),
        (["encode", "--model", "m"], "one of the arguments --input --corpus is required"),
        (["search", "--model", "m", "--corpus", "c", "--query", "q", "--top", "0"], "must be at least 1, not 0"),
        (["info", "m", "--batch-tokens", "x"], "unrecognized arguments"),
        (["demo", "--model", "m", "--folder", "f"], "not allowed with argument"),
    ],
)
def test_arguments_that_do_not_parse_are_one_clear_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert message in error_of(capsys, exit_.value.code)


def test_truncation_is_one_warning_line(tiny_release, corpus, tmp_path, capsys):
    for _ in range(2):  # the second time too: Python by itself repeats no warning
        assert encode(tiny_release, corpus, tmp_path / "out.npy", "--max-length", "4", "--force") == 0
        err = capsys.readouterr().err
        assert err.startswith("f2llm: warning: ") and err.endswith("longer than 4 tokens and were truncated\n")
        assert err.count("\n") == 1


def test_progress_is_for_terminals_or_on_demand(tiny_release, corpus, tmp_path, capsys, monkeypatch):
    def err(*options: str) -> str:
        assert encode(tiny_release, corpus, tmp_path / "out.npy", "--force", *options) == 0
        return capsys.readouterr().err

    assert err() == ""
    bar = err("--progress")
    assert "text/s" in bar and "tokens/s" in bar and f"{len(TEXTS)}/{len(TEXTS)}" in bar
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert "tokens/s" in err()
    assert err("--quiet") == ""


# --- search


def search(release: Path, corpus: Path, *options: str) -> int:
    return main(["search", "--model", str(release), "--corpus", str(corpus), *options])


def results_of(capsys: pytest.CaptureFixture[str]) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]


@pytest.mark.parametrize("block", [5, 65536])
def test_search_ranks_as_brute_force_does(block, tiny_release, tiny, corpus, capsys, monkeypatch):
    monkeypatch.setattr("f2llm_jax.commands.search.BLOCK_TEXTS", block)
    queries = ["a lazy fox", "차"]
    options = [part for query in queries for part in ("--query", query)]
    assert search(tiny_release, corpus, *options, "--top", "5", "--dim", "64", "--json") == 0
    found = results_of(capsys)
    assert [result["query"] for result in found] == queries
    scores_qn = tiny.encode_query(queries, dim=64) @ tiny.encode_document(TEXTS, dim=64).T
    for result, scores_n in zip(found, scores_qn, strict=True):
        rows = np.argsort(-scores_n)[:5]
        assert [hit["row"] for hit in result["results"]] == rows.tolist()
        assert [hit["rank"] for hit in result["results"]] == [1, 2, 3, 4, 5]
        assert [hit["text"] for hit in result["results"]] == [TEXTS[row] for row in rows]
        np.testing.assert_allclose([hit["score"] for hit in result["results"]], scores_n[rows], atol=1e-6)


def test_json_is_valid_whatever_the_terminal_can_show(tiny_release, corpus, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert search(tiny_release, corpus, "--query", "né 차", "--json") == 0
    assert json.loads(stdout.buffer.getvalue().decode("utf-8"))["query"] == "né 차"


def test_search_prompts_are_for_queries(tiny_release, tiny, corpus, capsys):
    assert search(tiny_release, corpus, "--query", "fox", "--prompt", "Find: ", "--json", "--top", "1") == 0
    scores_n = (tiny.encode(["fox"], prompt="Find: ") @ tiny.encode_document(TEXTS).T)[0]
    (result,) = results_of(capsys)
    assert result["results"][0]["score"] == pytest.approx(scores_n.max(), abs=1e-6)


def test_search_finds_every_text_by_itself(tiny_release, capsys, tmp_path):
    texts = TEXTS + BROKEN_LINES
    corpus = write_texts(tmp_path / "in.jsonl", texts, ids=[f"d{row}" for row in range(len(texts))])
    queries = [part for text in texts for part in ("--query", text)]
    assert search(tiny_release, corpus, *queries, "--prompt", "", "--json") == 0
    for row, result in enumerate(results_of(capsys)):
        score = pytest.approx(1, abs=1e-5)
        best = {"rank": 1, "score": score, "row": row, "id": f"d{row}", "text": texts[row]}
        assert result["query"] == texts[row]
        assert result["results"][0] == best


def test_search_prints_a_line_a_text_within_the_terminal(tiny_release, tmp_path, capsys, monkeypatch):
    from f2llm_jax.display import width

    monkeypatch.setenv("COLUMNS", "40")
    texts = ["夏天在湖里游泳很舒服" * 5, "long " * 50, "تشرب جدتي الشاي " * 10, *BROKEN_LINES, "\x1b[31mred"]
    corpus = write_texts(tmp_path / "in.jsonl", texts)
    assert search(tiny_release, corpus, "--query", "one", "--query", "a\nb " * 30) == 0
    lines = capsys.readouterr().out.split("\n")
    assert len(lines) == 2 * (2 + len(texts) + 1) + 1
    assert max(map(width, lines)) <= 40
    assert sum(line.endswith("…") for line in lines) >= 5
    assert "\x1b" not in "".join(lines)
    ranked = [line.split() for line in lines[2 : 2 + len(texts)]]
    assert [int(cells[0]) for cells in ranked] == [1, 2, 3, 4, 5, 6]
    scores = [float(cells[1]) for cells in ranked]
    assert scores == sorted(scores, reverse=True)


def test_search_for_more_than_there_is(tiny_release, corpus, capsys):
    assert search(tiny_release, corpus, "--query", "fox", "--top", "1000", "--json") == 0
    (result,) = results_of(capsys)
    assert sorted(hit["row"] for hit in result["results"]) == list(range(len(TEXTS)))


def test_search_in_an_empty_corpus(tiny_release, tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    assert search(tiny_release, tmp_path / "empty.txt", "--query", "fox", "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"query": "fox", "results": []}
    assert captured.err.startswith("f2llm: warning: ") and captured.err.endswith("empty.txt holds no texts\n")


def test_search_refuses_a_query_that_is_no_text(tiny_release, corpus, capsys):
    message = error_of(capsys, search(tiny_release, corpus, "--query", os.fsdecode(b"a\xff")))
    assert "--query: character 1 is half of a surrogate pair" in message


@pytest.mark.parametrize("scores", [1 << 23, 3, 50])  # the most held at a time: of all queries, of one, of some
def test_nearest_breaks_ties_by_order(scores, monkeypatch):
    monkeypatch.setattr("f2llm_jax.search.SCORES", scores)
    rng = np.random.default_rng(0)
    query_qd = rng.integers(-1, 2, (4, 3)).astype(np.float32)
    document_nd = rng.integers(-1, 2, (50, 3)).astype(np.float32)  # 27 different ones: ties abound
    order_qn = np.argsort(-(query_qd @ document_nd.T), axis=1, kind="stable")
    for size in (1, 7, 50, 60):
        blocks = (document_nd[start : start + size] for start in range(0, 51, size))  # the last may be empty
        scores_qk, numbers_qk = f2llm.nearest(query_qd, blocks, 10)
        np.testing.assert_array_equal(numbers_qk, order_qn[:, :10])
        np.testing.assert_array_equal(scores_qk, np.take_along_axis(query_qd @ document_nd.T, order_qn[:, :10], 1))


def test_nearest_puts_what_is_no_number_last():
    document_nd = np.float32([[math.nan], [-math.inf], [2], [math.nan]])
    scores_qk, numbers_qk = f2llm.nearest(np.float32([[1]]), iter([document_nd[:3], document_nd[3:]]), 4)
    np.testing.assert_array_equal(numbers_qk, [[2, 1, 0, 3]])
    np.testing.assert_array_equal(scores_qk, [[2, -math.inf, math.nan, math.nan]])
    with pytest.raises(f2llm.InputError, match="top must be at least 1, not 0"):
        f2llm.nearest(np.float32([[1]]), [document_nd], 0)
    for queries, block, message in (
        (np.int8([[1]]), document_nd, "nearest compares float embeddings, not int8"),
        (np.float32([[1]]), np.uint8([[1]]), "not uint8.*Hamming"),
        (np.float32([1]), document_nd, r"query_qd must be an array \[n, dim\], not of shape \(1,\)"),
        (np.float32([[1]]), document_nd[0], r"a block must be an array \[n, dim\]"),
        (np.float32([[1, 2]]), document_nd, "queries have 2 dimensions, a block 1"),
    ):
        with pytest.raises(f2llm.InputError, match=message):
            f2llm.nearest(queries, [block], 3)


# --- several devices


def test_encode_on_a_mesh_gives_the_same(tiny_release, corpus, expected, tmp_path, capsys):
    assert encode(tiny_release, corpus, tmp_path / "out.npy", "--mesh", "data=2,fsdp=2,tensor=2") == 0
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, rtol=0, atol=1e-6)
    assert capsys.readouterr().err == ""


def test_a_mesh_takes_all_devices(tiny_release, corpus, tmp_path, capsys):
    message = error_of(capsys, encode(tiny_release, corpus, tmp_path / "out.npy", "--mesh", "data=4"))
    assert "a mesh data=4 fsdp=1 tensor=1 takes 4 devices, not 8" in message
    options = ["encode", "--model", str(tiny_release), "--corpus", str(corpus), "--out", str(tmp_path / "out")]
    assert "--mesh all is for --input: --corpus by itself has" in error_of(capsys, main([*options, "--mesh", "all"]))


@pytest.mark.parametrize(
    ("platform", "options", "said"),
    [
        ("tpu", [], ["float32; --dtype bfloat16 is about six times as fast on TPUs", "one of 8 TPU devices is used; "]),
        ("gpu", [], ["float32; --dtype bfloat16 is several times as fast on GPUs", "one of 8 GPU devices is used; "]),
        ("tpu", ["--dtype", "bfloat16"], ["one of 8 TPU devices is used; --mesh all uses all of them"]),
        ("tpu", ["--dtype", "float32", "--mesh", "all"], []),
        ("cpu", [], []),
    ],
)
@pytest.mark.parametrize("command", ["encode", "search"])
def test_accelerators_that_are_left_idle_are_named(command, platform, options, said, corpus, capsys, monkeypatch):
    loaded = []
    monkeypatch.setattr("f2llm_jax.encoder.load", lambda *args, **given: loaded.append(given))
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    own = ["--input", str(corpus)] if command == "encode" else ["--corpus", str(corpus), "--query", "q"]
    args = make_parser().parse_args([command, "--model", "m", *own, *options])
    load_model(args)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(said)
    assert all(line.startswith(f"f2llm: {start}") for line, start in zip(lines, said, strict=True))
    dtype = options[1] if options else "float32"
    assert [(given["dtype"], given["mesh"] is None) for given in loaded] == [(dtype, "--mesh" not in options)]


# --- info


def test_info_reads_no_weights(copied_release, capsys):
    folder = copied_release
    parameters = sum(math.prod(shape) for shape in _shapes(folder / "model.safetensors"))
    assert main(["info", str(folder)]) == 0
    with_weights = capsys.readouterr().out
    size = (folder / "model.safetensors").stat().st_size
    assert f"{size / 1e6:,.1f} MB of it weights" in with_weights

    (folder / "model.safetensors").unlink()
    assert main(["info", str(folder)]) == 0
    out = capsys.readouterr().out
    for part in (
        f"{parameters:,} ({TINY.vocab_size * TINY.hidden_size:,} of them the embedding table)",
        f"float32 {4 * parameters / 1e6:,.1f} MB, bfloat16 {2 * parameters / 1e6:,.1f} MB",
        "8 16 32 64 96",
        "2,048 tokens",
        '"Instruct: Given a question, retrieve passages that can help answer the question.\\nQuery: "',
        "no weights",
    ):
        assert part in out


def _shapes(file: Path) -> list[list[int]]:
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return [entry["shape"] for name, entry in header.items() if name != "__metadata__"]


def test_info_downloads_no_weights(hub_of_settings, capsys):
    assert main(["info", "owner/name", "--revision", "v2"]) == 0
    assert hub_of_settings == [("owner/name", "v2")]
    assert "parameters" in capsys.readouterr().out


# --- the process


def test_help_is_there_without_what_is_heavy():
    program = """
import sys
from f2llm_jax.cli import make_parser
print(make_parser().format_help())
sys.exit(", ".join({"jax", "numpy", "pyarrow", "tokenizers", "huggingface_hub", "tqdm"} & set(sys.modules)) or None)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name in COMMANDS:
        assert name in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([name, "--help"])
    assert exit_.value.code == 0
    assert f"usage: f2llm {name}" in capsys.readouterr().out


def test_version():
    result = run("--version", text=True)
    assert (result.returncode, result.stdout) == (0, f"f2llm {f2llm.__version__}\n")


def test_a_process_reads_a_pipe_and_fails_without_a_traceback(tiny_release, expected, tmp_path):
    source = write_texts(tmp_path / "in.parquet", TEXTS)  # which is read from its end, and a pipe has none
    options = ["--model", str(tiny_release), "--input", "-", "--input-format", "parquet", "--output"]
    result = run("encode", *options, str(tmp_path / "out.npy"), input=source.read_bytes())
    assert (result.returncode, result.stderr) == (0, b"")
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-6)

    result = run("encode", *options, str(tmp_path / "again.npy"), input=b"no parquet")
    assert result.returncode == 2
    assert result.stderr.startswith(b"f2llm: error: standard input is not valid Parquet")
    assert b"Traceback" not in result.stderr


def test_a_reader_that_has_gone_is_no_error(tiny_release):
    command = [sys.executable, "-m", "f2llm_jax.cli", "info", str(tiny_release)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait() == 141
    assert process.stderr.read() == b""
    process.stderr.close()
