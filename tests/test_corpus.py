"""Corpora: every row once and in order, the same bytes whoever wrote them, whatever was killed before."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pyarrow
import pytest
from compilation import quick_environment
from pyarrow import parquet
from releases import TINY, edit_json

import f2llm_jax as f2llm
from f2llm_jax import corpus, distributed
from f2llm_jax.cli import main
from f2llm_jax.corpus import encode_corpus
from f2llm_jax.corpus_reader import index
from f2llm_jax.corpus_writer import Output, read_plan
from f2llm_jax.distributed import Processes

PROCESS = Path(__file__).with_name("corpus_process.py")

SHARD_ROWS = 32

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog")


def some_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of a few lengths only, so that few programs are compiled."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.choice([0, 5, 9]))) for _ in range(count)]


TEXTS = some_texts(200)


@pytest.fixture(scope="module")
def docs(tmp_path_factory) -> Path:
    """Four files, 200 rows: 8 units of 32 rows at most, the third file without any."""
    folder = tmp_path_factory.mktemp("docs")
    rows = [{"key": f"row-{n}", "text": text} for n, text in enumerate(TEXTS)]
    parquet.write_table(pyarrow.Table.from_pylist(rows[:100]), folder / "a.parquet", row_group_size=45)
    (folder / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[100:170]))
    (folder / "c.jsonl").touch()
    (folder / "d.csv").write_text("key,text\n" + "".join(f"{row['key']},{row['text']}\n" for row in rows[170:]))
    return folder


def command(release: Path, docs: Path, out: Path, *options: str) -> list[str]:
    patterns = [f"{docs}/*.parquet", f"{docs}/[bcd].*"]
    always = ["encode", "--model", str(release), "--corpus", *patterns, "--out", str(out)]
    return [*always, "--shard-rows", str(SHARD_ROWS), *options]


@pytest.fixture(scope="module")
def whole(tiny_release, docs, tmp_path_factory) -> Path:
    """The output of one process of two devices that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(jax, "local_devices", lambda: jax.devices()[:2])
        assert main(command(tiny_release, docs, out, "--id-field", "key")) == 0
    return out


MESH = ["--mesh", "fsdp=4,tensor=2", "--shard-rows", "100"]


@pytest.fixture(scope="module")
def on_mesh(tiny_release, docs, tmp_path_factory) -> Path:
    """The output of one process of eight devices, all on one mesh: three units."""
    out = tmp_path_factory.mktemp("mesh") / "out"
    assert main(command(tiny_release, docs, out, *MESH)) == 0
    return out


def run_process(arguments: list[str], *, devices: int = 4, **options: object) -> subprocess.Popen[str]:
    process = [sys.executable, str(PROCESS), json.dumps(options), *arguments]
    environment = quick_environment(devices)
    return subprocess.Popen(process, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def contents(out: Path) -> dict[str, str]:
    """{path: SHA-256} of all files but the manifest, which is compared as it reads."""
    files = {path for path in out.rglob("*") if path.is_file() and path.name != "manifest.json"}
    return {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def manifest_of(out: Path) -> dict:
    return json.loads((out / "manifest.json").read_text(encoding="utf-8"))


def read(out: Path) -> pyarrow.Table:
    return parquet.read_table(out / "shards")


def values(table: pyarrow.Table, dtype: str = "float32") -> np.ndarray:
    return np.array(table["embedding"].to_pylist(), dtype)


def error_of(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("f2llm: error: ") and captured.err.count("\n") == 1
    return captured.err


# --- what is written


def test_shards_hold_every_row_once_and_in_order(whole, tiny):
    table = read(whole)
    assert table["id"].to_pylist() == [f"row-{n}" for n in range(200)]
    assert table.schema.field("embedding").type == pyarrow.list_(pyarrow.float32(), TINY.hidden_size)
    assert np.abs(values(table) - tiny.encode(TEXTS)).max() <= 2e-6


def test_the_manifest_says_what_is_there(whole, docs, tiny_release):
    manifest = manifest_of(whole)
    assert manifest["rows"] == 200 and manifest["truncated"] == 0 and manifest["model"] == str(tiny_release)
    assert [(Path(file["path"]).name, file["rows"]) for file in manifest["inputs"]] == [
        ("a.parquet", 100), ("b.jsonl", 70), ("c.jsonl", 0), ("d.csv", 30)
    ]  # fmt: skip
    for file in manifest["inputs"]:
        assert file["bytes"] == Path(file["path"]).stat().st_size
    assert [(shard["first_row"], shard["rows"]) for shard in manifest["shards"]] == [
        (0, 32), (32, 32), (64, 32), (96, 4), (100, 32), (132, 32), (164, 6), (170, 30)
    ]  # fmt: skip
    for shard in manifest["shards"]:
        file = whole / shard["file"]
        assert shard["bytes"] == file.stat().st_size
        assert shard["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert shard["rows"] == parquet.read_metadata(file).num_rows
    assert set(contents(whole)) == {shard["file"] for shard in manifest["shards"]}
    settings = manifest["settings"]
    assert (settings["dim"], settings["output"], settings["prompt"]) == (TINY.hidden_size, "float32", "")
    assert settings["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1} and settings["device"] == "cpu cpu"


@pytest.mark.parametrize("output", ["float16", "int8", "ubinary"])
def test_output_types(output, tiny_release, tiny, docs, tmp_path, capsys):
    ranges = f2llm.int8_ranges(tiny.encode(TEXTS, dim=32, prompt_name="query"))
    np.save(tmp_path / "ranges.npy", ranges)
    options = ["--ranges", str(tmp_path / "ranges.npy")] if output == "int8" else []
    source = tmp_path / "in.txt"
    source.write_text("".join(text + "\n" for text in TEXTS[:20]))
    arguments = command(tiny_release, docs, tmp_path / "out", "--dim", "32", "--prompt-name", "query", *options)
    arguments[4:6] = [str(source)]
    assert main([*arguments, "--output-type", output]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: 20 embeddings in 1 shards\n"
    full = tiny.encode(TEXTS[:20], dim=32, prompt_name="query")
    table = read(tmp_path / "out")
    assert table["id"].to_pylist() == list(range(20)) and table["id"].type == pyarrow.int64()
    if output == "float16":
        assert table["embedding"].type == pyarrow.list_(pyarrow.float16(), 32)
        np.testing.assert_allclose(values(table, "float16"), full, atol=1e-3)
    else:
        wanted = f2llm.quantize(full, output, ranges if output == "int8" else None)
        assert table["embedding"].type.value_type == pyarrow.from_numpy_dtype(wanted.dtype)
        # A value on the edge of two levels may fall on either side: embeddings are equal to some 1e-7 only.
        assert (values(table, "int64") != wanted).mean() < 0.01
    assert (tmp_path / "out" / "ranges.npy").exists() == (output == "int8")


def test_truncated_texts_are_counted_once_for_all_shards(tiny_release, docs, tmp_path, capsys):
    source = tmp_path / "in.txt"
    source.write_text("".join(f"{text}\n" for text in ["fox", "fox " * 40, *["dog"] * 40, "dog " * 40]))
    arguments = command(tiny_release, docs, tmp_path / "out", "--max-length", "16")
    arguments[4:6] = [str(source)]
    assert main(arguments) == 0
    assert capsys.readouterr().err == ("f2llm: warning: 2 of 43 texts were longer than 16 tokens and were truncated\n")
    assert [shard["truncated"] for shard in manifest_of(tmp_path / "out")["shards"]] == [1, 1]


def test_no_rows_give_no_shards(tiny_release, tmp_path):
    (tmp_path / "in.jsonl").touch()
    outcome = encode_corpus(tiny_release, str(tmp_path / "*.jsonl"), tmp_path / "out")
    assert outcome.rows == outcome.shards == 0
    assert manifest_of(tmp_path / "out")["shards"] == []


def test_progress_is_of_all_rows(tiny_release, docs, tmp_path, capsys):
    (tmp_path / "in.txt").write_text("fox\ndog\n")
    arguments = command(tiny_release, docs, tmp_path / "out", "--progress")
    arguments[4:6] = [str(tmp_path / "in.txt")]
    assert main(arguments) == 0
    err = capsys.readouterr().err
    assert "reading: 100%" in err and "encoding: 100%" in err and "2/2" in err and "row/s" in err


# --- several processes, and their deaths


def test_processes_without_units_are_done_at_once(whole, tiny_release, docs, tmp_path):
    """Twenty processes for eight units, one after the other: nobody waits for anybody."""
    patterns, out = [f"{docs}/*.parquet", f"{docs}/[bcd].*"], tmp_path / "out"
    for number in range(20):
        outcome = encode_corpus(
            tiny_release, patterns, out, id_field="key", shard_rows=SHARD_ROWS, processes=Processes(number, 20)
        )
        assert outcome.finished == len(list((out / "shards").glob("*.parquet"))) == 8 * (number + 1) // 20
        assert (outcome.manifest is not None) == (outcome.finished == 8)
    assert contents(out) == contents(whole)


def test_a_process_is_killed_and_others_finish(whole, tiny_release, docs, tmp_path):
    """Of two independent processes one dies before its second shard; the other is not disturbed; then one, of other
    devices, does what is left: the same bytes."""
    out = tmp_path / "out"
    arguments = command(tiny_release, docs, out, "--id-field", "key", "--processes", "2", "--process-id")
    deadly = run_process([*arguments, "1"], die_in="pyarrow.parquet.write_table", count=2, devices=1)
    other = run_process([*arguments, "0"], devices=2)
    assert deadly.wait(120) == -signal.SIGKILL
    output, errors = other.communicate(timeout=120)
    assert other.returncode == 0, errors
    assert re.search("process 0 of 2 is done; [45] of 8 shards are there", output)
    left = sorted(path.name for path in (out / "shards").iterdir())
    assert len(left) == 6 and left[0].startswith(".000005.parquet.") and left[1] == "000000.parquet"
    assert not (out / "manifest.json").exists()
    times = {file: file.stat().st_mtime_ns for file in (out / "shards").glob("0*")}

    assert main(command(tiny_release, docs, out, "--id-field", "key")) == 0
    assert contents(out) == contents(whole)  # and so nothing unfinished is left
    assert manifest_of(out)["shards"] == manifest_of(whole)["shards"]
    assert {file: file.stat().st_mtime_ns for file in times} == times


def test_a_common_mesh_encodes_as_one_process_does(on_mesh, tiny, tiny_release, docs, tmp_path):
    """Two processes of four devices each; weights are gathered from both."""
    out, port = tmp_path / "out", free_port()
    joined = command(tiny_release, docs, out, *MESH, "--coordinator", f"localhost:{port}", "--processes", "2")
    both = [run_process([*joined, "--process-id", str(number)]) for number in range(2)]
    try:
        for process in both:
            output, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
            assert output.endswith("200 embeddings in 3 shards\n")
    finally:
        for process in both:
            process.kill()
    assert contents(out) == contents(on_mesh)
    assert np.abs(values(read(out)) - tiny.encode(TEXTS)).max() <= 2e-6


def test_a_common_mesh_is_killed_and_one_process_finishes(on_mesh, tiny_release, docs, tmp_path):
    """One of two processes dies, the other does not hang; one process does the rest."""
    out, port = tmp_path / "out", free_port()
    joined = command(tiny_release, docs, out, *MESH)
    deadly = run_process(joined, port=port, process=1, die_in="f2llm_jax.corpus_writer.Output.write", count=1)
    other = run_process(joined, port=port, process=0)
    try:
        assert deadly.wait(120) == -signal.SIGKILL
        other.communicate(timeout=120)
        assert other.returncode != 0
    finally:
        deadly.kill()
        other.kill()
    finished = {path.name for path in (out / "shards").glob("0*")}
    assert "000001.parquet" in finished and len(finished) < 3
    assert not (out / "manifest.json").exists()
    assert main(command(tiny_release, docs, out, *MESH[2:])) == 0  # on the mesh that the run was begun with
    assert contents(out) == contents(on_mesh)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_stop_cleanly(number, status, whole, tiny_release, docs, tmp_path, capsys, monkeypatch):
    if number == signal.SIGINT:  # a shell starts what runs in its background with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    out, before = tmp_path / "out", signal.getsignal(number)
    original, calls = Output.write, []

    def write(self, *args):
        original(self, *args)
        calls.append(args)
        if len(calls) == 3:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Output, "write", write)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])  # a unit after the other
    arguments = command(tiny_release, docs, out, "--id-field", "key")
    assert main(arguments) == status
    captured = capsys.readouterr()
    if number == signal.SIGTERM:
        assert captured.out.startswith("stopped with ") and "of 8 shards; the same command goes on" in captured.out
    else:
        assert captured.err == "f2llm: interrupted\n"
    assert signal.getsignal(number) == before
    assert 3 <= len(list((out / "shards").iterdir())) < 8 and not list((out / "shards").glob(".*"))
    monkeypatch.undo()
    assert main(arguments) == 0
    assert contents(out) == contents(whole)


def test_a_unit_stops_at_its_next_batch(tiny_release, tmp_path, monkeypatch):
    (tmp_path / "one.txt").write_text("".join(f"a text, the {n}th\n" for n in range(200)))
    advance, calls = corpus.Progress.advance, []

    def stop_in_the_third_batch(self, rows):
        calls.append(rows)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)  # until the main thread has noticed
        advance(self, rows)

    monkeypatch.setattr(corpus.Progress, "advance", stop_in_the_third_batch)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    options = {"batch_tokens": 64, "max_length": 32}
    outcome = corpus.encode_corpus(tiny_release, str(tmp_path / "one.txt"), tmp_path / "out", **options)
    assert outcome.terminated and outcome.finished == 0
    assert sum(calls) < 100 and len(calls) <= 4
    with ThreadPoolExecutor(1) as pool:  # where no signals come, and none are asked for
        arguments = (tiny_release, str(tmp_path / "one.txt"), tmp_path / "out")
        assert pool.submit(corpus.encode_corpus, *arguments, **options).result().finished == 1


def test_an_input_whose_name_is_no_unicode(tiny_release, tmp_path):
    file = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")
    Path(file).write_text("a\n")
    assert main(["encode", "--model", str(tiny_release), "--corpus", file, "--out", str(tmp_path / "out")]) == 0
    assert [Path(entry["path"]).name for entry in manifest_of(tmp_path / "out")["inputs"]] == [Path(file).name]


def test_a_full_disk_is_one_line_and_leaves_no_part_of_a_shard(tiny_release, docs, tmp_path, capsys, monkeypatch):
    def full(table, stream, **options):
        stream.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(parquet, "write_table", full)
        patched.setattr(jax, "local_devices", lambda: jax.devices()[:1])
        assert "No space left on device" in error_of(capsys, command(tiny_release, docs, tmp_path / "out"))
    assert list((tmp_path / "out" / "shards").iterdir()) == []


# --- going on


def test_finished_shards_are_verified(whole, tiny_release, docs, tmp_path, capsys, monkeypatch):
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    damaged, missing = out / "shards" / "000002.parquet", out / "shards" / "000005.parquet"
    data = bytearray(damaged.read_bytes())
    data[100] ^= 1
    damaged.write_bytes(data)
    missing.unlink()
    monkeypatch.chdir(docs.parent)  # where the inputs lie has another name, which is not part of a shard
    arguments = command(tiny_release, Path(docs.name), out, "--id-field", "key")
    assert main(arguments) == 0
    err = capsys.readouterr().err
    assert "000002.parquet is damaged; it is made again" in err
    assert "000005.parquet is missing; it is made again" in err
    assert contents(out) == contents(whole)
    assert main(arguments) == 0
    assert capsys.readouterr().err == ""


def test_a_finished_run_needs_no_model_in_memory(whole, tiny_release, docs, monkeypatch):
    monkeypatch.setattr("f2llm_jax.corpus.load", None)
    assert main(command(tiny_release, docs, whole, "--id-field", "key")) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "changed: id_field (was 'key', is None)"),
        (["--id-field", "key", "--dim", "8"], "changed: dim (was 96, is 8)"),
        (["--id-field", "key", "--prompt", "x"], "changed: prompt (was '', is 'x')"),
        (["--id-field", "key", "--dtype", "bfloat16"], "changed: dtype"),
        (["--id-field", "key", "--mesh", "data=2"], "changed: mesh"),
        (["--id-field", "key", "--output-type", "float16"], "changed: output"),
        (["--id-field", "key", "--shard-rows", "99"], "changed: shard_rows (was 32, is 99)"),
    ],
)
def test_other_settings_are_refused(options, message, whole, tiny_release, docs, capsys):
    assert message in error_of(capsys, command(tiny_release, docs, whole, *options))


def test_other_inputs_and_models_are_refused(whole, tiny_release, copied_release, docs, tmp_path, capsys):
    copy = Path(shutil.copytree(docs, tmp_path / "docs"))
    arguments = command(tiny_release, copy, whole, "--id-field", "key")
    assert main(arguments) == 0  # the same contents elsewhere are the same inputs
    (copy / "b.jsonl").write_text((copy / "b.jsonl").read_text().replace("row-150", "row-999"))
    assert f"changed: {copy}/b.jsonl in place of {docs}/b.jsonl;" in error_of(capsys, arguments)
    (copy / "d.csv").unlink()
    assert "changed: the number of input files (was 4, is 3)" in error_of(capsys, arguments)
    edit_json(copied_release / "config_sentence_transformers.json", prompts={"query": "other: ", "document": ""})
    message = error_of(capsys, command(copied_release, docs, whole, "--id-field", "key"))
    assert "changed: model_sha256" in message and "name another --out" in message


def test_the_same_bytes_in_another_format_are_other_inputs(tmp_path):
    table, out = tmp_path / "in.csv", tmp_path / "out"
    table.write_text("text\na\n")
    Output(out, {}, index([str(table)], unit_rows=8), model="tiny")
    lines = table.rename(tmp_path / "in.txt")
    with pytest.raises(f2llm.InputError, match=f"changed: {lines} in place of {table};"):
        Output(out, {}, index([str(lines)], unit_rows=8), model="tiny")


def test_a_folder_of_something_else_is_left_alone(tiny_release, docs, tmp_path, capsys):
    (tmp_path / "mine.txt").touch()
    message = error_of(capsys, command(tiny_release, docs, tmp_path))
    assert "exists and has no manifest.json, so no such command made it" in message
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_ranges_that_another_process_writes_are_no_stranger(tmp_path):
    (tmp_path / ".ranges.npy.0123.tmp").touch()
    assert read_plan(tmp_path) is None
    (tmp_path / ".other.npy.0123.tmp").touch()
    with pytest.raises(f2llm.InputError, match="no such command made it"):
        read_plan(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_tokens": 0}, "batch_tokens must be a positive whole number, not 0"),
        ({"shard_rows": 0}, "shard_rows must be a positive whole number, not 0"),
        ({"mesh": {"data": 0}}, r"mesh\['data'\] must be a positive whole number, not 0"),
        ({"mesh": {"rows": 2}}, "mesh has sizes of data, fsdp, tensor, not of 'rows'"),
        ({"output": "bfloat16"}, "output must be one of float32, float16, int8, binary, ubinary, not 'bfloat16'"),
    ],
)
def test_wrong_values_are_refused_before_anything_is_made(arguments, message, tiny_release, docs, tmp_path):
    with pytest.raises(f2llm.InputError, match=message):
        f2llm.encode_corpus(tiny_release, [f"{docs}/*.parquet"], tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_an_encoder_is_no_folder(tiny, docs, tmp_path):
    with pytest.raises(f2llm.InputError, match=r"model must be a folder or a hub id.*not Encoder"):
        encode_corpus(tiny, [f"{docs}/*.parquet"], tmp_path / "out")


@pytest.mark.parametrize("name", ["manifest.json", "work/plan.json"])
@pytest.mark.parametrize("content", ["", "[]"])
def test_a_damaged_plan_is_named(name, content, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / name).write_text(content)
    with pytest.raises(f2llm.InputError, match=rf"{name} is damaged: .*; name another folder, or remove {tmp_path}"):
        read_plan(tmp_path)


def test_a_folder_that_is_just_being_begun_is_joined(tiny_release, docs, tmp_path, monkeypatch):
    for name in ("shards", "work"):
        (tmp_path / "out" / name).mkdir(parents=True)
    patterns, out = [f"{docs}/*.parquet", f"{docs}/[bcd].*"], tmp_path / "out"
    outcome = encode_corpus(
        tiny_release, patterns, out, id_field="key", shard_rows=SHARD_ROWS, processes=Processes(7, 8)
    )
    assert outcome.finished == 1
    joined = Path(shutil.copytree(out, tmp_path / "joined"))
    monkeypatch.chdir(docs)  # who joins names the inputs otherwise: the manifest has one name of each
    encode_corpus(tiny_release, ["*.parquet", "[bcd].*"], joined, id_field="key", shard_rows=SHARD_ROWS)
    manifest = manifest_of(joined)
    assert [file["path"] for file in manifest["inputs"]] == ["a.parquet", "b.jsonl", "c.jsonl", "d.csv"]
    assert {shard["input"] for shard in manifest["shards"]} == {"a.parquet", "b.jsonl", "d.csv"}
    (out / "work" / "plan.json").unlink()  # shards without a plan are not ours
    with pytest.raises(f2llm.InputError, match="no such command made it"):
        encode_corpus(tiny_release, patterns, out, id_field="key", shard_rows=SHARD_ROWS)


def test_bad_arguments_are_one_clear_line(tiny_release, docs, tmp_path, capsys):
    out = tmp_path / "out"
    assert "s3:/bucket/out is a URL" in error_of(capsys, command(tiny_release, docs, Path("s3://bucket/out")))
    cases = [
        (
            ["--mesh", "data=3"],
            "a mesh data=3,fsdp=1,tensor=1 takes 3 devices; a mesh takes a divisor of the 8 devices",
        ),
        (["--output-type", "int8"], "int8 with --corpus needs --ranges"),
        (["--processes", "2"], "--processes and --process-id go together"),
        (["--processes", "2", "--process-id", "2"], "--process-id must be within 0..1 for --processes 2, not 2"),
        (["--coordinator", "localhost:1"], "--coordinator needs --processes and --process-id"),
        (["--output", "x.npy"], "--output and --force are for --input"),
        (["--dim", "97"], "dim must be a whole number within 1..96, not 97"),
        (["--max-length", "9999"], "max_length must be a whole number within 1..2048, not 9999"),
        (["--prompt-name", "poem"], "no prompt named 'poem'"),
        (["--field", "body"], "no column 'body'; there are key, text"),
    ]
    for options, message in cases:
        assert message in error_of(capsys, command(tiny_release, docs, out, *options))
    without = command(tiny_release, docs, out)[:6]
    assert "where to? --out DIR" in error_of(capsys, without)
    single = ["encode", "--model", str(tiny_release), "--input", "in.txt"]
    assert "where to? --output FILE" in error_of(capsys, single)
    assert "--out is for --corpus" in error_of(capsys, [*single, "--out", str(out)])
    for mesh in ("data", "rows=2", "data=0", "data=x"):
        with pytest.raises(SystemExit):
            main(command(tiny_release, docs, out, "--mesh", mesh))
        assert "takes sizes of data, fsdp, tensor, like data=2,tensor=4" in capsys.readouterr().err
    assert not out.exists()


def test_without_grain_the_error_says_what_to_install(tiny_release, docs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    message = error_of(capsys, command(tiny_release, docs, tmp_path / "out"))
    assert "a corpus is read with grain: pip install 'f2llm-jax[train]'" in message


# --- processes


def test_jax_starts_by_itself_on_a_cloud_tpu_and_only_there(monkeypatch):
    started = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments: started.append(arguments))
    assert distributed.start() == (0, 1) and started == []
    assert distributed.start(None, 4, 3) == (3, 4) and started == []
    assert distributed.start("host:1", 4, 3) == (0, 1) and started.pop() == ("host:1", 4, 3)
    distributed.start(detect=True)
    assert started.pop() == (None, None, None)

    class Config:
        jax_platforms = "tpu,cpu"

    monkeypatch.setattr(distributed.jax, "config", Config)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)
    assert not distributed.on_cloud_tpu()
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "one,two")
    assert distributed.on_cloud_tpu()
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES")
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY")
    assert distributed.on_cloud_tpu()
    Config.jax_platforms = "cpu"
    assert not distributed.on_cloud_tpu()


def test_training_processes_need_a_coordinator(tmp_path, capsys):
    arguments = ["train", "tiny", "--out", str(tmp_path / "run"), "--processes", "2", "--process-id", "0"]
    assert "need --coordinator HOST:PORT" in error_of(capsys, arguments)


# --- memory

MEASURED = """
import sys
from f2llm_jax.cli import main
from f2llm_jax.corpus_writer import Output, read_plan

def write(self, *arguments):
    original(self, *arguments)
    with open("/proc/self/status") as status:
        print(next(line.split()[1] for line in status if line.startswith("VmRSS")))

original, Output.write = Output.write, write
assert main(sys.argv[1:]) == 0
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads resident memory from /proc")
def test_memory_does_not_grow_with_rows(tiny_release, docs, tmp_path):
    """After 20 units everything is compiled and warm; texts and embeddings of the 30 that follow are some 35 MB."""
    source = tmp_path / "in.parquet"
    parquet.write_table(pyarrow.table({"text": [f"{n} fox" + "." * 700 for n in range(50 * 1024)]}), source)
    arguments = command(tiny_release, docs, tmp_path / "out", "--max-length", "8", "--shard-rows", "1024")
    arguments[4:6] = [str(source)]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    process = [sys.executable, "-c", MEASURED, *arguments]
    output = subprocess.run(process, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    resident = [1024 * int(line) for line in output.splitlines()[:50]]
    assert max(resident[20:]) - resident[19] < 20e6
