"""Meshes: where parameters lie, that results do not depend on it, and what does not divide."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from releases import TINY, write_release

import f2llm_jax
from f2llm_jax.configs.models import MODELS
from f2llm_jax.errors import InputError
from f2llm_jax.sharding import padded_config, param_shardings


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX reads of a device to lay out a mesh."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    process_index: int = 0
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


TEXTS = ["the quick brown fox", "", "한국어 العربية", "Z" * 100, "over the lazy dog " * 9]

MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 2, "data": 4},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
}


def test_a_mesh_has_three_axes_of_automatic_type():
    mesh = f2llm_jax.make_mesh(2, 2, 2)
    assert mesh.shape == {"data": 2, "fsdp": 2, "tensor": 2}
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert mesh.size == len(jax.devices()) == 8


@pytest.mark.parametrize("axes", [{}, {"data": 3}, {"data": 16}, {"fsdp": 2, "tensor": 2}])
def test_a_mesh_takes_all_devices(axes):
    with pytest.raises(InputError, match="not 8"):
        f2llm_jax.make_mesh(**axes)
    f2llm_jax.make_mesh(1, 1, 1, devices=jax.devices()[:1])


def two_slices(platform: str = "tpu") -> list[Chip]:
    """Of 2x2 chips each, as jax.devices() lists them."""
    places = [(x, y, 0) for y in range(2) for x in range(2)]
    return [Chip(4 * s + n, s, place, s, platform=platform) for s in range(2) for n, place in enumerate(places)]


@pytest.mark.parametrize("axes", [(2, 4, 1), (4, 1, 2), (8, 1, 1), (2, 2, 2)])
def test_of_several_slices_each_holds_a_part_of_data(axes):
    mesh = f2llm_jax.make_mesh(*axes, devices=two_slices())
    assert mesh.devices.shape == axes
    first, second = ({chip.slice_index for chip in half.flat} for half in np.split(mesh.devices, 2))
    assert (first, second) == ({0}, {1})
    assert len(set(mesh.devices.flat)) == 8


def test_data_divides_over_the_slices():
    with pytest.raises(InputError, match="data=1 fsdp=8 tensor=1 does not divide over 2 TPU slices: data must be"):
        f2llm_jax.make_mesh(fsdp=8, devices=two_slices())
    assert f2llm_jax.make_mesh(fsdp=8, devices=two_slices("gpu")).shape["fsdp"] == 8


@pytest.mark.parametrize("size", MODELS)
def test_released_sizes_divide_over_eight(size):
    for axes in MESHES.values():
        mesh = f2llm_jax.make_mesh(**axes)
        param_shardings(padded_config(MODELS[size], mesh), mesh)


@pytest.mark.parametrize("axes", MESHES)
def test_embeddings_do_not_depend_on_the_mesh(tiny, tiny_release, axes):
    mesh = f2llm_jax.make_mesh(**MESHES[axes])
    model = f2llm_jax.load(tiny_release, mesh=mesh)
    table = model.params["embed_tokens"]
    parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
    assert {shard.data.size for shard in table.addressable_shards} == {table.size // parts}
    assert len(table.sharding.device_set) == 8
    np.testing.assert_allclose(model.encode(TEXTS), tiny.encode(TEXTS), rtol=0, atol=1e-6)
    np.testing.assert_allclose(model.encode(TEXTS[0], dim=8), tiny.encode(TEXTS[0], dim=8), rtol=0, atol=1e-6)


def test_a_vocabulary_that_does_not_divide_is_padded(tmp_path):
    folder = write_release(tmp_path, dataclasses.replace(TINY, vocab_size=509))
    model = f2llm_jax.load(folder, mesh=f2llm_jax.make_mesh(data=4, tensor=2))
    assert model.config.vocab_size == 509
    assert model.params["embed_tokens"].shape == (510, 96)
    assert np.all(np.asarray(model.params["embed_tokens"])[509:] == 0)
    expected = f2llm_jax.load(folder).encode(TEXTS)
    np.testing.assert_allclose(model.encode(TEXTS), expected, rtol=0, atol=1e-6)
