"""Files cut into units: every row is in one unit, whatever the format, and units are read in any order."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from f2llm_jax import InputError, corpus_reader
from f2llm_jax.corpus_reader import Corpus, Reader, find_files, index
from f2llm_jax.texts import read_texts

ROWS = [
    (f"id-{n}", text) for n, text in enumerate(["", "a", "naïve", "할머니", "x" * 300, "tab\tand \u2028", "🙂"] * 9)
]


def write(file: Path, rows: list[tuple[object, str]], **options: object) -> Path:
    if file.suffix == ".txt":
        file.write_bytes("".join(f"{text}\n" for _, text in rows).encode())
    elif file.suffix == ".jsonl":
        lines = [json.dumps({"id": id_, "text": text}, ensure_ascii=False) for id_, text in rows]
        file.write_text("\n\n".join(lines), encoding="utf-8")  # with blank lines between, and no last newline
    elif file.suffix == ".csv":
        with file.open("w", encoding="utf-8-sig", newline="") as stream:
            csv.writer(stream).writerows([("id", "text"), *rows])
    else:
        columns = {"id": [id_ for id_, _ in rows], "text": [text for _, text in rows]}
        parquet.write_table(pyarrow.table(columns), file, **{"row_group_size": 13, **options})
    return file


def read_all(corpus: Corpus, order: list[int] | None = None) -> tuple[list[str], list[object]]:
    """Texts and ids of all units, in the order of the rows, however they are read."""
    reader, parts = Reader(corpus), {}
    for number in range(len(corpus.units)) if order is None else order:
        _, texts, ids = reader.read(corpus.units[number])
        parts[number] = texts, ids.to_pylist()
    texts = [text for number in sorted(parts) for text in parts[number][0]]
    return texts, [id_ for number in sorted(parts) for id_ in parts[number][1]]


@pytest.mark.parametrize("unit_rows", [1, 5, 13, 1000])
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv", "parquet"])
def test_every_row_is_in_one_unit(suffix, unit_rows, tmp_path):
    rows = ROWS if suffix == "txt" else [(id_, f'{text}\nof\r\n{text}, "two" lines') for id_, text in ROWS]
    file = write(tmp_path / f"in.{suffix}", rows)
    id_field = None if suffix == "txt" else "id"
    corpus = index([str(file)], id_field=id_field, unit_rows=unit_rows)
    assert [unit.rows for unit in corpus.units[:-1]] == [unit_rows] * (len(corpus.units) - 1)
    assert [unit.first_row for unit in corpus.units] == list(range(0, len(rows), unit_rows))
    assert corpus.files[0].bytes == file.stat().st_size
    if suffix != "parquet":
        assert corpus.files[0].sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    texts, ids = read_all(corpus)
    assert texts == read_texts(file).texts == [text for _, text in rows]
    assert ids == ([id_ for id_, _ in rows] if id_field else list(range(len(rows))))


@given(order=st.permutations(range(8)), skipped=st.integers(0, 7), group=st.sampled_from([7, 8, 20, 1000]))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_units_of_a_parquet_file_are_read_in_any_order(order, skipped, group, tmp_path):
    rows = ROWS[:61]
    corpus = index([str(write(tmp_path / "in.parquet", rows, row_group_size=group))], id_field="id", unit_rows=8)
    assert len(corpus.units) == 8
    order = order[skipped:]
    expected = [row for number in sorted(order) for row in rows[8 * number : 8 * number + 8]]
    assert read_all(corpus, order) == ([text for _, text in expected], [id_ for id_, _ in expected])


def test_files_are_taken_by_pattern_then_by_name_and_once(tmp_path, monkeypatch):
    for name in ("b.txt", "a.txt", "sub/c.txt", "a.jsonl", "p[1].md", "p1.md", "out/shards/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "link.txt").symlink_to("a.txt")
    monkeypatch.chdir(tmp_path)
    out = Path("sub/../out")
    found = find_files([f"{tmp_path}/*.jsonl", f"{tmp_path}/**/*.txt", f"{tmp_path}/a.*", "./a.txt"], out)
    assert [Path(file).relative_to(tmp_path).as_posix() for file in found] == ["a.jsonl", "a.txt", "b.txt", "sub/c.txt"]
    assert find_files(["p[1].md"], out) == ["p[1].md"]  # its name, and a pattern of p1.md's
    assert find_files(["p[1-9].md", *sorted(map(str, Path().glob("*.md")))], out) == ["p1.md", "p[1].md"]
    with pytest.raises(InputError, match="the list of patterns is empty"):
        find_files([], tmp_path)
    with pytest.raises(InputError, match=r"no file matches .*/\*\.csv"):
        find_files([f"{tmp_path}/*.txt", f"{tmp_path}/*.csv"], out)
    with pytest.raises(InputError, match=r"no file matches out/\*\*/\*\.txt but those of .*/out itself"):
        find_files(["out/**/*.txt"], out)


def test_rows_are_numbered_over_all_files(tmp_path):
    files = [write(tmp_path / f"{name}", ROWS[:7]) for name in ("a.txt", "b.parquet", "c.jsonl")]
    (tmp_path / "bb.txt").touch()
    corpus = index([str(files[0]), str(tmp_path / "bb.txt"), *map(str, files[1:])], unit_rows=5)
    assert [(unit.file, unit.first_row, unit.rows) for unit in corpus.units] == [
        (0, 0, 5), (0, 5, 2), (2, 7, 5), (2, 12, 2), (3, 14, 5), (3, 19, 2)
    ]  # fmt: skip
    assert read_all(corpus)[1] == list(range(21))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_units_of_long_texts_have_fewer_rows(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_reader, "_UNIT_BYTES", 4000)
    letters = np.random.default_rng(0).integers(97, 123, (40, 1000), np.uint8)
    rows = [(str(n), bytes(row).decode()) for n, row in enumerate(letters)]
    corpus = index([str(write(tmp_path / f"in.{suffix}", rows, compression="none"))], unit_rows=1000)
    assert {unit.rows for unit in corpus.units[:-1]} <= {3, 4}
    assert read_all(corpus)[0] == [text for _, text in rows]


def test_unchanged_files_are_not_read_again(tmp_path):
    one, two = write(tmp_path / "one.jsonl", ROWS), write(tmp_path / "two.jsonl", ROWS)
    first = index([str(one), str(two)], id_field="id", unit_rows=8)
    blank = one.read_bytes()[:-1]
    times = one.stat().st_mtime_ns
    one.write_bytes(blank + b"?")  # of the same size, and broken: reading it would fail
    os.utime(one, ns=(times, times))
    again = index([str(one), str(two)], id_field="id", unit_rows=8, known=first.files)
    assert again.units == first.units
    with pytest.raises(InputError, match="not valid JSON"):
        index([str(one), str(two)], id_field="id", unit_rows=8)


@pytest.mark.parametrize("rows", [ROWS[::-1], ROWS[:9]])
@pytest.mark.parametrize("suffix", ["txt", "parquet"])
def test_files_that_change_are_not_read_on(suffix, rows, tmp_path):
    file = write(tmp_path / f"in.{suffix}", ROWS)
    corpus = index([str(file)], unit_rows=8)
    begun = Reader(corpus)
    begun.read(corpus.units[0])
    write(file, rows)
    for reader, unit in ((begun, corpus.units[1]), (Reader(corpus), corpus.units[-1])):
        with pytest.raises(InputError, match=rf"in\.{suffix} has changed since it was indexed"):
            reader.read(unit)


def test_files_that_change_while_a_unit_is_read_are_named(tmp_path, monkeypatch):
    file = write(tmp_path / "in.txt", ROWS)
    corpus = index([str(file)], unit_rows=8)
    monkeypatch.setattr(corpus_reader, "_row_numbers", lambda unit: write(file, ROWS[:9]))
    with pytest.raises(InputError, match=r"in\.txt has changed since it was indexed"):
        Reader(corpus).read(corpus.units[0])


BAD = {
    "null.jsonl": (
        b'{"text": "a", "id": "1"}\n{"text": null, "id": "2"}',
        "line 2: field 'text' is null, not a string",
    ),
    "no_id.jsonl": (b'{"text": "a", "id": 1}\n{"text": "b"}', "line 2: there is no id in field 'id'"),
    "float.jsonl": (b'{"text": "a", "id": 1.5}', "line 1: an id is of type float in field 'id'"),
    "mixed.jsonl": (
        b'{"text": "a", "id": 1}\n{"text": "b", "id": "2"}',
        "line 2: the id in field 'id' is string, those",
    ),
    "large.jsonl": (b'{"text": "a", "id": 9223372036854775808}', "line 1: the id 9223372036854775808 in field 'id'"),
    "half.jsonl": (
        b'{"text": "a", "id": "\\ud800"}',
        "line 1: the id in field 'id': character 0 is half of a surrogate pair",
    ),
    "no_id.csv": (b"text\na\n", "line 2: there is no id in field 'id'"),
    "lines.txt": (b"a\n", "lines.txt is a txt file, which has no field 'id'"),
    "bytes.csv": (b"text,id\na,1\n\xff,2\n", "line 3: not valid UTF-8"),
    "bad.parquet": (b"PAR1 no", "bad.parquet is not valid Parquet"),
    "name": (b"", "no extension to tell the format by"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named_before_the_work(name, tmp_path):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        index([str(tmp_path / name)], id_field="id", unit_rows=8)


BAD_COLUMNS = {
    "no column 'text'; there are body, id": {"body": ["a"], "id": [1]},
    "no column 'id'; there are text": {"text": ["a"]},
    "field 'text' is of type int64, not a string": {"text": [1], "id": [1]},
    "field 'text' is null in 1 of 2 rows": {"text": ["a", None], "id": [1, 2]},
    "field 'id' is null in 1 of 2 rows": {"text": ["a", "b"], "id": [1, None]},
    "column 'id' is of type list": {"text": ["a"], "id": [[1]]},
}


@pytest.mark.parametrize("message", BAD_COLUMNS)
def test_bad_columns_are_named_before_the_work(message, tmp_path):
    parquet.write_table(pyarrow.table(BAD_COLUMNS[message]), tmp_path / "in.parquet")
    with pytest.raises(InputError, match=message):
        index([str(tmp_path / "in.parquet")], id_field="id", unit_rows=8)


@pytest.mark.parametrize("column", ["text", "id"])
def test_nulls_that_the_footer_does_not_count_are_found_while_reading(column, tmp_path):
    columns = {"text": ["a", "b", "c"], "id": ["1", "2", "3"]}
    columns[column] = ["x", None, "z"]
    parquet.write_table(pyarrow.table(columns), tmp_path / "in.parquet", write_statistics=False)
    corpus = index([str(tmp_path / "in.parquet")], id_field="id", unit_rows=8)
    with pytest.raises(InputError, match=rf"in.parquet, row 1: .*field '{column}'"):
        read_all(corpus)


def test_ids_of_all_files_are_of_one_type(tmp_path):
    one, two = tmp_path / "one.parquet", tmp_path / "two.jsonl"
    parquet.write_table(pyarrow.table({"text": ["a"], "id": pyarrow.array([1], pyarrow.int32())}), one)
    two.write_text('{"text": "b", "id": "b"}')
    with pytest.raises(InputError, match=r"the ids in .id. are int32 in .*one\.parquet and string in .*two\.jsonl"):
        index([str(one), str(two)], id_field="id", unit_rows=8)
    strings = pyarrow.array(["x", "y", "x"])
    dictionary, large = strings.dictionary_encode(), strings.cast(pyarrow.large_string())  # as pandas 3 writes them
    parquet.write_table(pyarrow.table({"text": dictionary, "id": large}), one)
    assert read_all(index([str(one), str(two)], id_field="id", unit_rows=2))[1] == ["x", "y", "x", "b"]
    parquet.write_table(pyarrow.table({"text": large, "id": dictionary}), one)
    corpus = index([str(one), str(two)], id_field="id", unit_rows=2)
    assert read_all(corpus) == (["x", "y", "x", "b"], ["x", "y", "x", "b"])


def test_a_large_row_group_is_read_in_bounded_memory(tmp_path):
    """What Arrow holds while it reads is a small part of the one column chunk there is."""
    letters = np.random.default_rng(0).integers(97, 123, (20_000, 2000), np.uint8)
    table = pyarrow.table({"text": [bytes(row).decode() for row in letters]})
    parquet.write_table(table, tmp_path / "in.parquet", row_group_size=20_000, compression="none", use_dictionary=False)
    del table, letters
    corpus = index([str(tmp_path / "in.parquet")], unit_rows=1000)
    reader, before, peak = Reader(corpus), pyarrow.total_allocated_bytes(), 0
    for unit in corpus.units:
        assert len(reader.read(unit).texts) == 1000
        peak = max(peak, pyarrow.total_allocated_bytes() - before)
    assert peak < 10e6 < 40e6 < (tmp_path / "in.parquet").stat().st_size
