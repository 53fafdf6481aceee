"""The code's own rules: lint, format, types, what the core may import, and how long an import takes."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import f2llm_jax

ROOT = Path(__file__).resolve().parent.parent

# What training and other frameworks need; the core does without.
BANNED = {"grain", "optax", "sentence_transformers", "tensorflow", "tensorflow_datasets", "torch"}


def run(*command: object, cwd: Path = ROOT) -> str:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cwd, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("arguments", [("check",), ("format", "--check")], ids=["check", "format"])
def test_ruff(arguments):
    run(sys.executable, "-m", "ruff", *arguments, ".")


def test_mypy(tmp_path):
    """On a tree of links where configs, convert and train lie as an installed package has them."""
    package = tmp_path / "f2llm_jax"
    package.mkdir()
    for path in [*(ROOT / "f2llm_jax").iterdir(), *(ROOT / name for name in ("configs", "convert", "train"))]:
        if path.exists() and path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    options = ("--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache")
    run(sys.executable, "-m", "mypy", *options, "-p", "f2llm_jax", cwd=tmp_path)


@pytest.mark.parametrize("file", sorted((ROOT / "f2llm_jax").glob("*.py")), ids=lambda file: file.name)
def test_the_core_does_not_name_what_it_does_without(file):
    imported = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            imported.add((node.module or "").split(".")[0])
    assert imported & BANNED == ({"grain"} if file.name == "corpus.py" else set())  # when it is used, see below


def modules_after(script: str) -> set[str]:
    show = "\nimport json, sys\nprint(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    return set(json.loads(run(sys.executable, "-c", script + show).splitlines()[-1]))


def test_encoding_imports_nothing_it_does_without(tiny_release):
    script = f"import f2llm_jax; f2llm_jax.load({str(tiny_release)!r}).encode(['a'], output='ubinary')"
    imported = modules_after(script)
    assert {"jax", "flax", "tokenizers"} <= imported
    assert imported & (BANNED | {"transformers"}) == set()


def test_the_corpus_reader_imports_grain_only_when_used():
    imported = modules_after("import f2llm_jax.corpus")
    assert "jax" in imported and imported & BANNED == set()


def test_import_is_light():
    assert modules_after("import f2llm_jax") & {"jax", "flax", "numpy", "transformers", *BANNED} == set()


def test_import_takes_under_a_second():
    script = "import time; start = time.perf_counter(); import f2llm_jax; print(time.perf_counter() - start)"
    assert float(run(sys.executable, "-c", script)) < 1


def test_public_names():
    for name in f2llm_jax.__all__:
        assert getattr(f2llm_jax, name) is not None
    assert set(f2llm_jax.__all__) <= set(dir(f2llm_jax))
    with pytest.raises(AttributeError, match="nothing_such"):
        f2llm_jax.nothing_such  # noqa: B018
