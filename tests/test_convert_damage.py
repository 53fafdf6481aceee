"""Damaged sources: found, named, and nothing is left behind by the attempt."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.torch
import torch
from conversions import edit_tensor, rewrite
from releases import TINY, edit_json, write_release

import f2llm_jax
from f2llm_jax.convert.conversion import convert_release
from f2llm_jax.convert.load import load_params, open_checkpoint
from f2llm_jax.convert.table import tensor_table
from f2llm_jax.errors import ReleaseError

Q = "layers.1.self_attn.q_proj.weight"
NORM = "norm.weight"
INDEX = "model.safetensors.index.json"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def poisoned(folder: Path, name: str, value: float) -> torch.Tensor:
    tensor = weights(folder)[name].clone()
    tensor.view(-1)[-1] = value
    return tensor


def truncate(file: Path, by: int) -> None:
    os.truncate(file, file.stat().st_size - by)


def append(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0" * 8)


def overlap(folder: Path) -> None:
    names = ("layers.0.input_layernorm.weight", "layers.1.input_layernorm.weight")
    data = (folder / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    edit_tensor(folder, names[1], data_offsets=header[names[0]]["data_offsets"])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda r: truncate(r / "model.safetensors", 1), "model.safetensors is truncated"),
    "cut inside the header": (lambda r: os.truncate(r / "model.safetensors", 100), "truncated or no safetensors"),
    "empty": (lambda r: os.truncate(r / "model.safetensors", 0), "truncated or no safetensors"),
    "too long": (lambda r: append(r / "model.safetensors"), "but its last tensor ends at"),
    "header is a list": (lambda r: (r / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0[]"), "no JSON object"),
    "no weights": (lambda r: (r / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "overlapping tensors": (overlap, "begins at byte"),
    "offsets of strings": (lambda r: edit_tensor(r, NORM, data_offsets=["0", "1"]), "header is damaged: norm.weight"),
    "offsets of another size": (lambda r: edit_tensor(r, NORM, shape=[97]), "should have 388 bytes"),
    "negative shape": (lambda r: edit_tensor(r, NORM, shape=[-96]), "header is damaged: norm.weight"),
    "integers": (lambda r: edit_tensor(r, NORM, dtype="I32"), "norm.weight has dtype I32"),
    "float64": (lambda r: rewrite(r, **{NORM: weights(r)[NORM].double()}), "norm.weight has dtype F64"),
    "wrong shape": (lambda r: rewrite(r, **{Q: weights(r)[Q][:-1]}), Q + r" has shape \(127, 96\)"),
    "transposed": (lambda r: rewrite(r, **{Q: weights(r)[Q].T.contiguous()}), Q + r" has shape \(96, 128\)"),
    "missing key": (lambda r: rewrite(r, **{Q: None}), "missing " + Q),
    "unexpected key": (lambda r: rewrite(r, **{"score.weight": torch.zeros(2)}), "unexpected score.weight"),
    "a bias": (
        lambda r: rewrite(r, **{"layers.0.mlp.up_proj.bias": torch.zeros(2)}),
        "unexpected layers.0.mlp.up_proj",
    ),
    "twice": (lambda r: rewrite(r, **{"model." + NORM: torch.zeros(96)}), "norm.weight is both in"),
    "NaN": (lambda r: rewrite(r, **{Q: poisoned(r, Q, float("nan"))}), Q + " holds nan"),
    "infinity": (lambda r: rewrite(r, **{NORM: poisoned(r, NORM, -float("inf"))}), NORM + " holds -inf"),
    "mixed dtypes": (
        lambda r: rewrite(r, **{NORM: weights(r)[NORM].bfloat16()}),
        "mixes dtypes: 34 tensors are F32, but norm.weight BF16; .*--dtype",
    ),
    "fewer layers than stated": (lambda r: edit_json(r / "config.json", num_hidden_layers=2), "unexpected layers.2"),
    "other sizes than stated": (lambda r: edit_json(r / "config.json", vocab_size=500), "config.json asks for"),
    "no config": (lambda r: (r / "config.json").unlink(), "config.json does not exist"),
    "no tokenizer": (lambda r: (r / "tokenizer.json").unlink(), "no tokenizer.json"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("sound") / "r")


@pytest.fixture(scope="module")
def sound_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("shards") / "r", max_shard_size="200KB")


@pytest.fixture(scope="module")
def sound_flax(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_release(sound, tmp_path_factory.mktemp("flax") / "f", to="flax")


@pytest.mark.filterwarnings("ignore:.*layer_types")
@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_release(sound: Path, tmp_path: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    release = Path(shutil.copytree(sound, tmp_path / "r"))
    damage(release)
    refuses(release, tmp_path, message)


SHARD_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda r: next(iter(r.glob("*-00002-of-*"))).unlink(), "names model-00002-of-.* is missing"),
    "truncated shard": (lambda r: truncate(next(iter(r.glob("*-00002-of-*"))), 5), "model-00002-of-.* is truncated"),
    "no weight_map": (lambda r: (r / INDEX).write_text("{}"), "index.json is damaged"),
    "no JSON": (lambda r: (r / INDEX).write_text("{"), "not valid JSON"),
    "elsewhere": (
        lambda r: (r / INDEX).write_text('{"weight_map": {"a": "/x.safetensors"}}'),
        "names /x.safetensors, outside its own folder",
    ),
    "outside": (
        lambda r: (r / INDEX).write_text('{"weight_map": {"a": "../x.safetensors"}}'),
        "outside its own folder",
    ),
}


@pytest.mark.parametrize("name", SHARD_DAMAGE)
def test_damaged_shards(sound_shards: Path, tmp_path: Path, name: str) -> None:
    damage, message = SHARD_DAMAGE[name]
    release = Path(shutil.copytree(sound_shards, tmp_path / "r"))
    damage(release)
    refuses(release, tmp_path, message)


def set_chunk(folder: Path, value: float) -> None:
    file = folder / "params" / "layers.mlp_norm.weight" / "1.0"
    values = np.fromfile(file, np.float32)
    values[3] = value
    values.tofile(file)


FLAX_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated chunk": (lambda f: truncate(f / "params/norm.weight/0", 4), "norm.weight/0 is truncated: 380 bytes"),
    "missing chunk": (lambda f: (f / "params/layers.mlp_norm.weight/2.0").unlink(), r"mlp_norm.weight/2\.0 is missing"),
    "missing array": (lambda f: shutil.rmtree(f / "params/norm.weight"), "missing norm.weight"),
    "unexpected array": (
        lambda f: shutil.copytree(f / "params/norm.weight", f / "params/other.weight"),
        "unexpected other.weight",
    ),
    "NaN": (lambda f: set_chunk(f, float("nan")), r"layers\.1\.post_attention_layernorm\.weight holds nan"),
    "compressed": (lambda f: edit_json(f / "params/norm.weight/.zarray", compressor={"id": "zstd"}), "not written by"),
    "no array": (lambda f: (f / "params/norm.weight/.zarray").write_text("{}"), "is damaged"),
    "layers in the config": (lambda f: edit_json(f / "config.json", num_hidden_layers=4), "missing layers.3"),
    "later format": (lambda f: edit_json(f / "f2llm_jax.json", format_version=2), "format_version 2; this f2llm_jax"),
}


@pytest.mark.filterwarnings("ignore:.*layer_types")
@pytest.mark.parametrize("name", FLAX_DAMAGE)
def test_damaged_converted_folder(sound_flax: Path, tmp_path: Path, name: str) -> None:
    damage, message = FLAX_DAMAGE[name]
    folder = Path(shutil.copytree(sound_flax, tmp_path / "f"))
    if name == "layers in the config":
        edit_json(folder / "config.json", layer_types=["full_attention"] * 4)
    damage(folder)
    refuses(folder, tmp_path, message, to="hf")


def test_checkpoints_that_orbax_does_not_read(sound_flax: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sound_flax, tmp_path / "f"))
    (folder / "f2llm_jax.json").unlink()
    (folder / "params" / "_METADATA").write_text("{")
    refuses(folder, tmp_path, "no checkpoint that Orbax reads", to="hf")


def test_nan_in_a_checkpoint_saved_by_orbax(sound_flax: Path, tmp_path: Path) -> None:
    folder = Path(
        shutil.copytree(sound_flax, tmp_path / "f", ignore=shutil.ignore_patterns("params", "f2llm_jax.json"))
    )
    params = f2llm_jax.load(sound_flax).params
    params["layers"]["mlp"]["up_proj"]["weight"] = params["layers"]["mlp"]["up_proj"]["weight"].at[1, 2, 3].set(np.nan)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / "params").absolute(), params)
    with pytest.raises(ReleaseError, match=r"layers\.mlp\.up_proj\.weight hold NaNs"):
        load_params(open_checkpoint(folder), TINY)
    with pytest.raises(ReleaseError, match=r"layers\.mlp\.up_proj\.weight hold NaNs"):
        load_params(open_checkpoint(folder), TINY, dtype="bfloat16", int8=True)  # which has none
    refuses(folder, tmp_path, r"layers\.1\.mlp\.up_proj\.weight holds nan", to="hf")


@pytest.mark.parametrize(("value", "dtype"), [(1e6, "float16"), (3.4e38, "bfloat16")])
def test_values_that_a_dtype_cannot_hold(sound: Path, tmp_path: Path, value: float, dtype: str) -> None:
    release = Path(shutil.copytree(sound, tmp_path / "r"))
    rewrite(release, **{Q: poisoned(release, Q, value)})
    refuses(release, tmp_path, f"{Q} holds .*, which {dtype} cannot hold", dtype=dtype)
    convert_release(release, tmp_path / "out", to="flax")


def test_mixed_dtypes_convert_when_told(sound: Path, tmp_path: Path) -> None:
    release = Path(shutil.copytree(sound, tmp_path / "r"))
    rewrite(release, **{NORM: weights(release)[NORM].bfloat16()})
    out = convert_release(release, tmp_path / "out", to="hf", dtype="bfloat16")
    assert {value.dtype for value in weights(out).values()} == {torch.bfloat16}


def test_any_damaged_byte_of_a_header(sound: Path, tmp_path: Path) -> None:
    """Either the header still says the same tensors, or a ReleaseError: no other exception, whatever the byte."""
    release = Path(shutil.copytree(sound, tmp_path / "r"))
    file = release / "model.safetensors"
    data = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    table, rng = tensor_table(TINY), random.Random(0)
    refused = 0
    for _ in range(300):
        place, old = rng.randrange(header), None
        old = data[place]
        data[place] = rng.randrange(256)
        file.write_bytes(data)
        data[place] = old
        try:
            open_checkpoint(release).check(table)
        except ReleaseError as error:
            assert "model.safetensors" in str(error) or "do not fit its config.json" in str(error)
            refused += 1
    assert refused > 200


def refuses(source: Path, tmp_path: Path, message: str, *, to: str = "flax", dtype: str | None = None) -> None:
    with pytest.raises(ReleaseError, match=message):
        convert_release(source, tmp_path / "out", to=to, dtype=dtype)
    assert not list(tmp_path.glob("out*"))
