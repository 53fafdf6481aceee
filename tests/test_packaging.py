"""The wheel: what is in it, and that it runs the README's example where the checkout is not."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent

FOLDERS = {
    "f2llm_jax": "f2llm_jax",
    "configs": "f2llm_jax/configs",
    "convert": "f2llm_jax/convert",
    "train": "f2llm_jax/train",
}
"""Folders of the checkout that hold code, and where a wheel has them."""

SHOW_WHERE = """
import importlib.util, json, f2llm_jax, f2llm_jax.configs.models, f2llm_jax.convert.load
files = [module.__file__ for module in (f2llm_jax, f2llm_jax.configs.models, f2llm_jax.convert.load)]
strays = [name for name in ("configs", "convert", "train", "tests") if importlib.util.find_spec(name)]
print(json.dumps([files, strays]))
"""


def run(*command: object, cwd: Path | None = None) -> str:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cwd, check=False)
    assert result.returncode == 0, result.stderr + result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the checkout, so that building leaves nothing in it."""
    folder = tmp_path_factory.mktemp("source")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, cwd=source)
    (file,) = out.iterdir()
    return file


def make_environment(folder: Path) -> Path:
    """An empty environment, its python: the packages of this one can be imported, but its .pth files do not act.

    So f2llm_jax, which is here by way of such a file, is not there until it is installed.
    """
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site_packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    missing = "import importlib.util; print(importlib.util.find_spec('f2llm_jax'))"
    assert run(python, "-c", missing, cwd=folder) == "None\n"
    return python


def pip_install(python: Path, *arguments: object) -> None:
    options = ("--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, *arguments)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The python of an environment that has the wheel."""
    python = make_environment(tmp_path_factory.mktemp("wheel"))
    pip_install(python, wheel)
    return python


def test_the_wheel_holds_all_code_under_one_name(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"f2llm_jax", "f2llm_jax-0.1.0.dist-info"}
    expected = {
        f"{home}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, home in FOLDERS.items()
        for file in (ROOT / folder).rglob("*.py")
    }
    code = {name for name in names if name.endswith(".py")}
    assert expected - code == set() and code - expected == set()
    data = {f"f2llm_jax/{file.relative_to(ROOT / 'f2llm_jax')}" for file in (ROOT / "f2llm_jax").rglob("*.jsonl")}
    assert data | {"f2llm_jax/py.typed"} <= names and data
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_is_importable_and_nothing_stands_beside_it(installed, tmp_path):
    files, strays = json.loads(run(installed, "-c", SHOW_WHERE, cwd=tmp_path))
    assert all(Path(file).is_relative_to(installed.parent.parent) for file in files)
    assert strays == []


def test_an_editable_install_has_the_same_names(source, tmp_path):
    python = make_environment(tmp_path / "editable")
    pip_install(python, "--editable", source)
    files, strays = json.loads(run(python, "-c", SHOW_WHERE, cwd=tmp_path))
    assert files == [str(source / name) for name in ("f2llm_jax/__init__.py", "configs/models.py", "convert/load.py")]
    assert strays == []


def readme_example() -> str:
    return re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]


def test_the_readme_example_is_ten_lines():
    assert len([line for line in readme_example().splitlines() if line.strip()]) <= 10


def test_the_readme_example_runs_from_the_wheel(installed, tiny_release, tmp_path):
    example, count = re.subn(r'"codefuse-ai/[^"]+"', repr(str(tiny_release)), readme_example())
    assert count == 1
    # A None there makes an import fail: whatever is installed here for other reasons is as good as absent.
    hide = f"import sys\nsys.modules.update(dict.fromkeys({undeclared_modules()}))\n"
    (tmp_path / "example.py").write_text(hide + example, encoding="utf-8")
    shown = run(installed, "-W", "error", tmp_path / "example.py", cwd=tmp_path).splitlines()
    scores = [float(line.split()[0]) for line in shown]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True) and all(-1 <= score <= 1 for score in scores)


def undeclared_modules() -> list[str]:
    """Top-level modules of this environment that no declared dependency, nor a dependency of one, brings."""
    declared, waiting = {"f2llm-jax"}, ["f2llm-jax"]
    while waiting:
        for text in importlib.metadata.requires(waiting.pop()) or []:
            requirement = Requirement(text)
            name = canonicalize_name(requirement.name)
            if name not in declared and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
                declared.add(name)
                waiting.append(name)
    owners = importlib.metadata.packages_distributions()
    undeclared = [
        module for module, names in owners.items() if declared.isdisjoint(canonicalize_name(name) for name in names)
    ]
    assert "torch" in undeclared and "jax" not in undeclared
    return sorted(set(undeclared) - sys.stdlib_module_names)


def test_the_command_is_installed(installed, tiny_release, tmp_path):
    command = installed.parent / "f2llm"
    assert "encode" in run(command, "--help", cwd=tmp_path)
    assert "hidden size" in run(command, "info", tiny_release, cwd=tmp_path)
