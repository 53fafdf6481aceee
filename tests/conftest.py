"""The tests' environment, and the models they share.

Set before JAX is imported: the CPU, as 8 devices; no network; a compilation cache that lives as long as the session.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_CACHE = tempfile.mkdtemp(prefix="f2llm_jax_tests_")

# Files that take a minute or more, longest first: what begins last should not be what takes longest.
_LONGEST = (
    "test_tpu_compile",
    "test_train_step",
    "test_train_packing",
    "test_train_loop",
    "test_model",
    "test_corpus",
    "test_mteb",
    "test_demo",
)

os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
os.environ.update(
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # several processes may compile for TPUs at a time
    HF_HUB_OFFLINE="1",
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    XDG_CACHE_HOME=_CACHE,
    XLA_FLAGS="--xla_force_host_platform_device_count=8",
)


def pytest_sessionstart() -> None:
    from compilation import compile_quickly

    compile_quickly()


def pytest_unconfigure() -> None:
    shutil.rmtree(_CACHE, ignore_errors=True)


def pytest_collection_finish() -> None:
    """Python's garbage collector leaves alone what was imported: looking through that took a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="session", autouse=True)
def _torch_threads() -> None:
    import torch

    torch.set_num_threads(1)  # two workers share two cores


@pytest.fixture(scope="session")
def tiny_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of a tiny model with a tiny tokenizer. Tests that change files make a copy."""
    from releases import write_release

    return write_release(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny(tiny_release: Path):
    import f2llm_jax

    return f2llm_jax.load(tiny_release)


@pytest.fixture
def copied_release(tiny_release: Path, tmp_path: Path) -> Path:
    """A copy of the tiny release, to be changed."""
    return Path(shutil.copytree(tiny_release, tmp_path / "release"))


@pytest.fixture
def hub_of_settings(tiny_release: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """The hub has the tiny release under every name; whoever asks for its weights fails. What was asked for, so far."""
    import fnmatch

    import huggingface_hub

    asked = []

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        wanted = [
            file.name for file in tiny_release.iterdir() if any(fnmatch.fnmatch(file.name, p) for p in allow_patterns)
        ]
        assert "config.json" in wanted and "model.safetensors" not in wanted
        asked.append((repo_id, revision))
        return str(tiny_release)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


@pytest.fixture(scope="session")
def real_release(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small model around the real Qwen3 tokenizer, which appends the EOS as sentence-transformers relies on."""
    from releases import QWEN_TOKENIZER, SMALL, skip_without_shared, write_release

    skip_without_shared()
    folder = tmp_path_factory.mktemp("real")
    yield write_release(folder, SMALL, tokenizer=QWEN_TOKENIZER)
    shutil.rmtree(folder)
