"""Weights from files: every damage is named, and the host never holds much more than the parameters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from releases import TINY, write_around, write_json, write_release, write_tiny_tokenizer
from safetensors.numpy import load_file, save_file

import f2llm_jax
from f2llm_jax.configs.models import MODELS
from f2llm_jax.errors import InputError, ReleaseError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

Q_PROJ = "layers.1.self_attn.q_proj.weight"


def edit_weights(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS)

    return damage


def set_value(name: str, value: float) -> Callable[[Path], None]:
    def change(weights: dict[str, np.ndarray]) -> None:
        weights[name].flat[-1] = value

    return edit_weights(change)


def truncate(to: Callable[[int], int]) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / WEIGHTS, to((folder / WEIGHTS).stat().st_size))


def edit_header(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Changes the JSON header of the file and leaves the tensors' bytes as they are."""

    def damage(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return damage


def write_bytes(content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / WEIGHTS).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate(lambda size: size - 1), "truncated"),
        (truncate(lambda size: size // 2), "truncated"),
        (truncate(lambda _: 100), "truncated"),
        (truncate(lambda _: 5), "truncated"),
        (truncate(lambda _: 0), "truncated"),
        (lambda folder: (folder / WEIGHTS).unlink(), "neither model.safetensors nor"),
        (lambda folder: (folder / WEIGHTS).open("ab").write(b"\x00"), "last tensor ends"),
        (write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), "no safetensors file"),
        (write_bytes((16).to_bytes(8, "little") + b'{"a": {"dtype": '), "header is damaged"),
        (write_bytes((8).to_bytes(8, "little") + b"\xff" * 8), "header is damaged"),
        (write_bytes((2).to_bytes(8, "little") + b"[]"), "header is damaged"),
        (write_bytes((7).to_bytes(8, "little") + b'{"a":1}'), "header is damaged"),
        (edit_header(lambda header: header[Q_PROJ].pop("shape")), f"{Q_PROJ} is"),
        (edit_header(lambda header: header[Q_PROJ].update(dtype="I64")), f"{Q_PROJ} has dtype I64"),
        (edit_header(lambda header: header[Q_PROJ].update(shape=[127, 96])), f"{Q_PROJ} should have"),
        (edit_header(lambda header: header["norm.weight"].update(data_offsets=[0, 384])), "begins at byte"),
        (edit_weights(lambda weights: weights.pop(Q_PROJ)), f"missing {Q_PROJ}"),
        (edit_weights(lambda weights: weights.pop("norm.weight")), "missing norm.weight"),
        (edit_weights(lambda weights: weights.update(extra=np.zeros(1, np.float32))), "unexpected extra"),
        (
            edit_weights(lambda weights: weights.update({"layers.3.mlp.up_proj.weight": np.zeros(1, np.float32)})),
            "unexpected layers.3.mlp.up_proj.weight",
        ),
        (
            edit_weights(lambda weights: weights.update({f"{Q_PROJ[:-6]}bias": np.zeros(128, np.float32)})),
            "unexpected layers.1.self_attn.q_proj.bias",
        ),
        (
            edit_weights(lambda weights: weights.update({f"model.{Q_PROJ}": weights[Q_PROJ]})),
            f"{Q_PROJ} is both in",
        ),
        (
            edit_weights(lambda weights: weights.update({Q_PROJ: weights[Q_PROJ].T.copy()})),
            rf"{Q_PROJ} has shape \(96, 128\), config.json asks for \(128, 96\)",
        ),
        (
            edit_weights(lambda weights: weights.update({"embed_tokens.weight": weights["embed_tokens.weight"][:-1]})),
            r"embed_tokens.weight has shape \(511, 96\), config.json asks for \(512, 96\)",
        ),
        (set_value(Q_PROJ, np.nan), f"{Q_PROJ} holds nan"),
        (set_value("embed_tokens.weight", np.inf), "embed_tokens.weight holds inf"),
        (set_value("norm.weight", -np.inf), "norm.weight holds -inf"),
        (set_value("layers.2.mlp.down_proj.weight", np.nan), "layers.2.mlp.down_proj.weight holds nan"),
    ],
)
def test_damaged_weights_are_named(copied_release, damage, message):
    damage(copied_release)
    with pytest.raises(ReleaseError, match=message) as error:
        f2llm_jax.load(copied_release)
    assert str(copied_release) in str(error.value)


@pytest.fixture
def sharded_release(tmp_path) -> Path:
    return write_release(tmp_path / "sharded", max_shard_size="60KB")


def test_missing_shards_are_named(sharded_release):
    shards = sorted(sharded_release.glob("model-*.safetensors"))
    assert len(shards) > 3
    shards[1].unlink()
    with pytest.raises(ReleaseError, match=f"{INDEX} names {shards[1].name}, which is missing"):
        f2llm_jax.load(sharded_release)
    shards[2].unlink()
    with pytest.raises(ReleaseError, match=f"{shards[1].name}, {shards[2].name}, which are missing"):
        f2llm_jax.load(sharded_release)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "weight_map"),
        ({"weight_map": []}, "weight_map"),
        ({"weight_map": {"norm.weight": 3}}, "weight_map"),
        ({"weight_map": {"norm.weight": "../../model.safetensors"}}, "outside"),
    ],
)
def test_damaged_index_is_named(sharded_release, index, message):
    write_json(sharded_release / INDEX, index)
    with pytest.raises(ReleaseError, match=message) as error:
        f2llm_jax.load(sharded_release)
    assert INDEX in str(error.value)


def test_a_shard_that_the_index_leaves_out_is_missed(sharded_release):
    index = json.loads((sharded_release / INDEX).read_text())
    left_out = index["weight_map"]["norm.weight"]
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != left_out}
    write_json(sharded_release / INDEX, index)
    with pytest.raises(ReleaseError, match=r"missing .*norm.weight"):
        f2llm_jax.load(sharded_release)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_are_those_of_the_file_in_every_dtype(copied_release, stored, dtype):
    file = copied_release / WEIGHTS
    weights = {name: value.astype(stored) for name, value in load_file(file).items()}
    save_file(weights, file)
    params = f2llm_jax.load(copied_release, dtype=dtype).params
    wanted = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(wanted)}
    table = {name: value.astype(wanted) for name, value in weights.items()}
    np.testing.assert_array_equal(params["embed_tokens"], table["embed_tokens.weight"])
    np.testing.assert_array_equal(params["norm"]["weight"], table["norm.weight"])
    for layer in range(TINY.num_hidden_layers):
        attention = params["layers"]["attention"]
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
            expected = table[f"layers.{layer}.self_attn.{name}.weight"]
            np.testing.assert_array_equal(attention[name]["weight"][layer].reshape(expected.shape), expected)


@pytest.mark.parametrize("dtype", ["float16", "f32", ""])
def test_other_dtypes_are_refused(tiny_release, dtype):
    with pytest.raises(InputError, match="float32, bfloat16"):
        f2llm_jax.load(tiny_release, dtype=dtype)


# Loads a tiny model first, so that what Python, JAX and compiled programs take is there before the measured load.
MEASURE_PEAK = """
import gc, sys, f2llm_jax, jax
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
folder, tiny, dtype = sys.argv[1:]
f2llm_jax.load(tiny, dtype=dtype).encode(["a"])
gc.collect()
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
model = f2llm_jax.load(folder, dtype=dtype)
jax.block_until_ready(model.params)
print(status("VmHWM") - before, sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)))
"""


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def released_80m(request, tmp_path_factory):
    """A release of the 80M's shape, its weights in either dtype."""
    from f2llm_jax.convert.table import tensor_table

    folder, config = tmp_path_factory.mktemp("80M"), MODELS["80M"]
    dtype = np.dtype(ml_dtypes.bfloat16 if request.param == "bfloat16" else np.float32)
    write_around(folder, config)
    write_json(folder / "config.json", config.to_hf())
    write_tiny_tokenizer(folder)
    save_file(
        {name: np.full(tensor.hf_shape, 0.5, dtype) for tensor in tensor_table(config) for name in tensor.hf_names},
        folder / WEIGHTS,
    )
    yield folder
    (folder / WEIGHTS).unlink()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure memory")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_memory_of_load(released_80m, tiny_release, dtype):
    command = [sys.executable, "-c", MEASURE_PEAK, str(released_80m), str(tiny_release), dtype]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, size = map(int, result.stdout.split())
    assert size == 80_084_288 * (2 if dtype == "bfloat16" else 4)
    assert 0.9 * size < peak <= 1.3 * size
