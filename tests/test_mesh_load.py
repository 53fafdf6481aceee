"""Releases and checkpoints onto any mesh, from any mesh, each byte read by those who need it."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conversions import tensor_sums
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType, PartitionSpec
from releases import TINY, write_release

import f2llm_jax
from f2llm_jax.convert.conversion import convert_release
from f2llm_jax.convert.export import export_release
from f2llm_jax.convert.load import load_params, open_checkpoint
from f2llm_jax.convert.table import tensor_table
from f2llm_jax.errors import InputError
from f2llm_jax.sharding import STORAGE_RULES, padded_config

# Sizes of data, fsdp, tensor; as many devices as their product.
MESHES = [(1, 1, 1), (1, 4, 1), (1, 1, 2), (2, 1, 2), (1, 2, 2), (8, 1, 1), (1, 8, 1), (2, 2, 2), (4, 1, 2), (1, 4, 2)]

# Rows that divide over no tensor axis.
ODD = dataclasses.replace(TINY, vocab_size=509)


def mesh_of(sizes: tuple[int, int, int]) -> jax.sharding.Mesh:
    return f2llm_jax.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("release") / "r", ODD)


@pytest.fixture(scope="module")
def flax(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_release(release, tmp_path_factory.mktemp("flax") / "f", to="flax")


@pytest.fixture(scope="module")
def whole(release: Path) -> dict[str, np.ndarray]:
    params = load_params(open_checkpoint(release), ODD)
    return {path: np.asarray(array) for path, array in flatten_dict(params, sep=".").items()}


@pytest.mark.parametrize("kind", ["release", "flax"])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_onto_any_mesh(
    request: pytest.FixtureRequest, whole: dict[str, np.ndarray], kind: str, sizes: tuple[int, int, int]
) -> None:
    """Every value is where its sharding says, padding is zeros, and every byte of the file is read just once."""
    mesh = mesh_of(sizes)
    checkpoint = open_checkpoint(request.getfixturevalue(kind))
    arrays = flatten_dict(load_params(checkpoint, ODD, mesh=mesh), sep=".")
    for tensor in tensor_table(padded_config(ODD, mesh)):
        array, expected = arrays[tensor.path], whole[tensor.path]
        assert array.shape == tensor.shape
        assert array.sharding.spec == PartitionSpec(*(STORAGE_RULES[axis] for axis in tensor.axes))
        assert np.asarray(array)[: len(expected)].tobytes() == expected.tobytes()
        assert not np.asarray(array)[len(expected) :].any()
    assert checkpoint.bytes_read == sum(value.nbytes for value in whole.values())


@pytest.mark.parametrize("kind", ["release", "flax"])
@pytest.mark.parametrize("around", [("x",), ("data", "fsdp", "tensor")])
@pytest.mark.parametrize("sizes", [None, (1, 2, 2)], ids=str)
def test_whatever_mesh_is_set(request: pytest.FixtureRequest, whole: dict[str, np.ndarray], kind, around, sizes):
    """One of somebody else's axes, and one of ours over which the model does not divide."""
    shape = (1,) * (len(around) - 1) + (8,)
    with jax.set_mesh(jax.make_mesh(shape, around, axis_types=(AxisType.Auto,) * len(around))):
        model = f2llm_jax.load(request.getfixturevalue(kind), mesh=None if sizes is None else mesh_of(sizes))
    for path, array in flatten_dict(model.params, sep=".").items():
        assert np.asarray(array)[: len(whole[path])].tobytes() == whole[path].tobytes()


@pytest.mark.parametrize("to", ["flax", "hf"])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_exported_from_any_mesh(release: Path, tmp_path: Path, to: str, sizes: tuple[int, int, int]) -> None:
    """Saved on one mesh and loaded on another, and the padding is stripped."""
    params = load_params(open_checkpoint(release), ODD, mesh=mesh_of(sizes))
    out = export_release(params, ODD, tmp_path / "out", like=release, to=to)
    back = out if to == "hf" else convert_release(out, tmp_path / "back", to="hf")
    assert tensor_sums(back) == tensor_sums(release)
    other = load_params(open_checkpoint(out), ODD, mesh=mesh_of((1, 2, 2)))
    assert other["embed_tokens"].shape[0] == 510


@pytest.mark.parametrize("vocab_size", [151_669, 151_665])
def test_vocabularies_of_qwen3_embedding(tmp_path: Path, vocab_size: int) -> None:
    config = dataclasses.replace(TINY, vocab_size=vocab_size, hidden_size=16, num_hidden_layers=1)
    release = write_release(tmp_path / "r", config)
    one, spread = f2llm_jax.load(release), f2llm_jax.load(release, mesh=mesh_of((1, 4, 2)))
    assert one.params["embed_tokens"].shape[0] == vocab_size
    assert spread.params["embed_tokens"].shape[0] == vocab_size + 1
    np.testing.assert_allclose(spread.encode(["a", "b c"]), one.encode(["a", "b c"]), atol=2e-6)
    out = export_release(spread.params, spread.config, tmp_path / "out", like=release)
    assert tensor_sums(out) == tensor_sums(release)


def test_mesh_that_does_not_divide(release: Path) -> None:
    with pytest.raises(InputError, match="do not divide over tensor=3"):
        load_params(open_checkpoint(release), ODD, mesh=mesh_of((1, 1, 3)))


@pytest.mark.parametrize("to", ["flax", "hf"])
def test_two_processes(release: Path, flax: Path, tmp_path: Path, to: str) -> None:
    """Each reads the bytes of its own shards, together they export the model, and it is the same."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    script = Path(__file__).with_name("mesh_process.py")
    source, out = (release if to == "hf" else flax), tmp_path / "out"
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(number), port, str(source), str(out), to],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for number in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0]
    counts = [json.loads(line) for output in outputs for line in output.splitlines() if line.startswith("{")]
    assert len(counts) == 2
    total = sum(info.nbytes for info in open_checkpoint(release).tensors.values())
    for count in counts:
        assert count["read"] == count["needed"] < 0.6 * total
    back = out if to == "hf" else convert_release(out, tmp_path / "back", to="hf")
    assert tensor_sums(back) == tensor_sums(release)
