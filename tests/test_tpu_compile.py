"""The real programs, compiled by the real TPU compiler for slices that are not there.

Encoding for v5e and v5p, training for v5e and v6e (with a teacher that encodes), on meshes that use every axis.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from releases import TINY

from f2llm_jax.cli import main
from f2llm_jax.configs.models import MODELS
from f2llm_jax.errors import InputError
from f2llm_jax.model import has_few_layers
from f2llm_jax.plan import Plan, compile_program, make_plan
from f2llm_jax.planning.chips import CHIPS, parse_topology, topology_devices
from f2llm_jax.planning.counts import Axes
from f2llm_jax.planning.hlo import read_program, total_by_kind
from f2llm_jax.planning.jobs import EncodeJob, TrainJob
from f2llm_jax.planning.programs import AbstractProgram
from f2llm_jax.planning.report import describe
from f2llm_jax.sharding import make_mesh
from f2llm_jax.train.config import TrainConfig, load_recipe

ENCODE = {"14B": ("v5p:2x2x4", Axes(1, 8, 2))}
# The 0.6B by cached gradients in three chunks, one of queries and two of documents; the 80M directly, packed.
TRAIN = {
    "80M": ("v6e:4x4", Axes(4, 2, 2)),
    "0.6B": ("v5e:4x4", Axes(2, 8, 1)),
}
# The recipe's has 28 layers, whose compilation takes a minute more and shows nothing else.
TEACHER = MODELS["160M"]


def chunks(name: str) -> int:
    """Runs of the model in a training step."""
    return 3 if name == "0.6B" else 1


def recipe(size: str, *, batch_size: int, chunk_rows: int = 0, layout: str = "auto") -> TrainConfig:
    stage = 2 if size == "80M" else 1  # the first has none for small models
    config = load_recipe(f"stage{stage}_{size.replace('.', '_').lower()}")
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, batch_size=batch_size, layout=layout),
        compute=dataclasses.replace(config.compute, chunk_rows=chunk_rows),
    )


@functools.cache
def plan(do: str, size: str) -> Plan:
    if do == "encode":
        topology, mesh = ENCODE[size]
        return make_plan(EncodeJob(config=MODELS[size]), parse_topology(topology), mesh)
    topology, mesh = TRAIN[size]
    sizes = {"batch_size": 128, "chunk_rows": 128} if size == "0.6B" else {"batch_size": 32}
    config = recipe(size, **sizes, layout="bucketed" if size == "0.6B" else "auto")
    teacher = TEACHER if config.teacher else None
    job = TrainJob(config=MODELS[size], recipe=config, teacher=teacher, negatives=1)
    return make_plan(job, parse_topology(topology), mesh)


PROGRAMS = [*(("encode", size) for size in ENCODE), *(("train", size) for size in TRAIN)]


@pytest.mark.parametrize(("do", "size"), PROGRAMS)
def test_the_program_compiles_fits_and_does_what_was_counted(do, size):
    result = plan(do, size)
    assert result.work is not None
    assert result.fits and 0 < result.memory.total < result.topology.chip.hbm_bytes
    assert sum(result.memory.state.values()) <= result.memory.arguments
    assert result.work.flops_ratio == pytest.approx(1, abs=0.005)
    # The compiler adds what lies between the products, which for a gradient weighs most where the model is narrow.
    assert result.work.compiler_ratio == pytest.approx(1, abs=0.015 if (do, size) == ("train", "80M") else 0.01)
    assert 0.5 < result.work.hbm_ratio < 2.5
    assert result.work.unknown_loops == []


@pytest.mark.parametrize(("do", "size"), PROGRAMS)
def test_attention_is_the_splash_kernel(do, size):
    result, layers = plan(do, size), MODELS[size].num_hidden_layers
    assert result.work is not None
    # A backward pass is two kernels, after the forward pass that it computes again. The last layer's few queries take
    # none, where they are all there is: without a gradient, and with one in a model of few layers.
    with_gradient = 0 if do == "encode" else 4 * (layers - 1 if has_few_layers(layers) else layers)
    without = 0 if do == "train" and chunks(size) == 1 else layers - 1
    runs = 1 if do == "encode" else chunks(size)
    teacher = TEACHER.num_hidden_layers - 1 if (do, size) == ("train", "80M") else 0
    assert result.work.kernels["tpu_custom_call"] == runs * (with_gradient + without) + teacher


@pytest.mark.parametrize(("do", "size"), PROGRAMS)
def test_neither_the_vocabulary_nor_the_batch_is_gathered(do, size):
    result, config = plan(do, size), MODELS[size]
    mesh = result.mesh
    rows = result.batch_tokens // 1024
    activations = rows * 1024 * config.hidden_size
    widest = result.job.models[-1]
    widest_output = max(widest.intermediate_size, widest.num_attention_heads * widest.head_dim)
    largest_weight = widest.hidden_size * widest_output // mesh.tensor
    assert largest_weight < activations  # so that the two can be told apart
    vocabulary = {config.vocab_size, config.vocab_size // mesh.tensor}
    for collective in result.collectives:
        # The gradient of the vocabulary is summed over replicas (an all-reduce of a device's own part), as all are.
        if collective.kind == "all-gather":
            assert not vocabulary & set(collective.dims), collective
            assert math.prod(collective.dims) <= max(largest_weight, rows * 1024), collective


def test_rows_of_many_short_texts_compute_all_positions():
    """Of 341 texts in a row of 1,024 the last layer computes all positions, by the kernel: their scores are nowhere."""
    config, length, text = MODELS["80M"], 1024, 3
    result = make_plan(EncodeJob(config=config, length=text), parse_topology("v5e:1x1"), Axes(1, 1, 1))
    assert result.work is not None and result.work.flops_ratio == pytest.approx(1, abs=0.005)
    assert result.work.kernels["tpu_custom_call"] == config.num_hidden_layers
    scores = result.batch_tokens * (length // text) * config.num_attention_heads
    assert result.memory.temporaries < 4 * scores


def test_projections_of_int8_multiply_int8(monkeypatch):
    programs = []

    def compiled(program: AbstractProgram):
        programs.append(compile_program(program))
        return programs[-1]

    monkeypatch.setattr("f2llm_jax.plan.compile_program", compiled)
    job = EncodeJob(config=TINY, length=128, batch_tokens=1024, dtype="int8")
    result = make_plan(job, parse_topology("v6e:1x1"), Axes(1, 1, 1))
    assert result.work is not None and result.work.flops_ratio == pytest.approx(1, abs=0.005)
    assert "arithmetic at 918 to 1836 TFLOP/s" in describe(result)
    ((_, text),) = programs
    products = re.findall(r"= (\w+)\[\S* convolution\(", text)
    assert products.count("s32") == 2 * 7  # in the loop over layers, and in the last layer


def mlp_gradients(size: str) -> dict[str, int]:
    """{collective: how many run} over arrays of the size of a weight of the MLP, without those that gather weights."""
    weight = MODELS[size].hidden_size * MODELS[size].intermediate_size
    found = [x for x in plan("train", size).collectives if math.prod(x.dims) == weight and x.kind != "all-gather"]
    return {kind: times for kind, (times, _) in total_by_kind(found).items()}


def test_gradients_of_the_mlp_are_scattered_to_where_their_parameters_rest():
    """An all-reduce over fsdp would bring every device the whole of a gradient of which it keeps a part."""
    # By cached gradients: a backward pass of each chunk.
    assert mlp_gradients("0.6B") == {"reduce-scatter": 3 * chunks("0.6B") * MODELS["0.6B"].num_hidden_layers}


@pytest.mark.parametrize(("fsdp", "kind"), [(8, "reduce-scatter"), (16, "all-reduce")])
def test_the_compiler_sums_by_all_reduce_over_all_of_a_4x4_slice_whatever_is_asked(fsdp, kind):
    """Even a reduce-scatter by name is compiled as an all-reduce and a slice, where that sums along both axes at once.

    When libtpu no longer does so, this says it: then ``axes.gather`` gives a reduce-scatter there too.
    """
    mesh = make_mesh(16 // fsdp, fsdp, devices=topology_devices(parse_topology("v6e:4x4")))

    def scatter(x):
        return jax.lax.psum_scatter(x, "fsdp", scatter_dimension=1, tiled=True)

    scatter_all = jax.jit(jax.shard_map(scatter, mesh=mesh, in_specs=P(), out_specs=P(None, "fsdp"), check_vma=False))
    x = jax.ShapeDtypeStruct((1024, 2048), jnp.float32, sharding=NamedSharding(mesh, P()))
    _, text = compile_program(AbstractProgram(lambda: scatter_all.lower(x), {}))
    assert [(x.kind, x.dims) for x in read_program(text).collectives] == [(kind, (1024, 2048))]


def test_what_does_not_fit_is_said_with_the_bytes_it_lacks(capsys):
    assert main(["plan", "14B", "--topology", "v5e:1x1", "--batch-tokens", "1024", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["fits"]
    assert found["memory"]["limit"] == int(CHIPS["v5e"].hbm_bytes)
    assert found["memory"]["total"] >= found["memory"]["state"]["parameters"] == 2 * 13_990_394_880


def test_a_mesh_is_found_and_reported(capsys):
    assert main(["plan", "80M", "--topology", "v5e:2x2", "--length", "128", "--batch-tokens", "8192"]) == 0
    printed = capsys.readouterr().out
    assert "80,084,288 parameters on v5e:2x2: 4 devices TPU v5 lite, mesh data=4" in printed
    assert "8 in a row of 1,024 (0.0% padding)" in printed
    assert "of 15.75: fits" in printed
    assert "(estimate)" in printed


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_libtpu_knows_the_chip(chip):
    topology = parse_topology(chip.example)
    devices = topology_devices(topology)
    assert len(devices) == topology.size
    assert {device.device_kind for device in devices} == {chip.kind}


def test_a_slice_that_libtpu_does_not_know_is_an_error():
    with pytest.raises(InputError, match="--topology v5e:3x3: "):
        topology_devices(parse_topology("v5e:3x3"))


def test_a_mesh_that_is_not_the_slice_is_an_error():
    with pytest.raises(InputError, match="takes 15 devices, not 16"):
        make_plan(EncodeJob(config=MODELS["80M"]), parse_topology("v5e:4x4"), Axes(3, 5, 1))


def test_a_batch_that_does_not_divide_is_an_error():
    job = TrainJob(config=MODELS["80M"], recipe=recipe("0.6B", batch_size=24))
    with pytest.raises(InputError, match="a batch of 24 queries does not divide over data·fsdp=16"):
        make_plan(job, parse_topology("v5e:4x4"), Axes(16, 1, 1))
