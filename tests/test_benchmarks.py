"""What the benchmarks' scripts do besides measuring: which folders they take, and what their tables say."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a script by its name; the others are found as they are when it is run."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclasses look
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.parametrize(("name", "arguments"), [("convert", []), ("corpus", []), ("prune", ["--tokenizer", "none"])])
def test_a_folder_that_exists_is_left_alone(
    name: str, arguments: list[str], script: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [
        tmp_path / "texts.txt",
        *(tmp_path / folder / "file" for folder in ("release", "0.6B", "model", "settings")),
    ]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text("the user's")
    monkeypatch.setattr(sys, "argv", [name, str(tmp_path), *arguments])
    with pytest.raises(SystemExit, match="exists; name one that does not"):
        script(name).main()
    assert [file.read_text() for file in files] == ["the user's"] * len(files)


def test_a_new_folder_is_gone_at_the_end(script: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "new"
    with pytest.raises(KeyboardInterrupt), script("inputs").new_folder(folder):
        (folder / "inside").mkdir()
        raise KeyboardInterrupt
    assert not folder.exists() and folder.parent.exists()


def test_tables_are_aligned(script: Callable) -> None:
    rows = [("bag of words", "0.1"), ("r", "10.25")]
    assert script("tables").markdown(("model", "accuracy"), rows, text=1).split("\n") == [
        "| model        | accuracy |",
        "| ------------ | -------: |",
        "| bag of words |      0.1 |",
        "| r            |    10.25 |",
    ]


def test_memory_is_that_of_an_engine(script: Callable) -> None:
    peaks = {"torch-fp32": 200, "openvino-fp32": 150, "f2llm-fp32": 100, "f2llm-int8": 50}
    memory = [{"size": "80M", "engine": engine, "peak_bytes": peak * 10**6} for engine, peak in peaks.items()]
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in script("encode").memory_table(memory).split("\n")
    ]
    assert lines[2:] == [
        ["80M", "torch-fp32", "200", "1.00 x"],
        ["80M", "openvino-fp32", "150", "0.75 x"],
        ["80M", "f2llm-fp32", "100", "0.50 x"],
        ["80M", "f2llm-int8", "50", ""],
    ]
