"""Plans, as far as they go without the TPU compiler: reading programs, counting, choosing, refusing."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec
from releases import TINY

import f2llm_jax
from f2llm_jax import batching, packing, plan
from f2llm_jax.batching import Buckets
from f2llm_jax.cli import main
from f2llm_jax.configs.models import MODELS
from f2llm_jax.embedding import Batch, eos_states
from f2llm_jax.errors import F2LLMError, InputError
from f2llm_jax.model import count_parameters, init_params
from f2llm_jax.plan import needed_bytes
from f2llm_jax.planning import chips, counts
from f2llm_jax.planning.chips import parse_topology
from f2llm_jax.planning.hlo import Collective, Program, read_program
from f2llm_jax.planning.jobs import EncodeJob, TrainJob
from f2llm_jax.planning.programs import encode_program
from f2llm_jax.sharding import make_mesh


def compiled(function, *args):
    program = jax.jit(function).lower(*args).compile()
    return program, read_program(program.as_text())


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_a_loop_counts_as_often_as_it_runs_and_the_compiler_agrees_on_its_body():
    def function(x, weights):
        x = lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, weights)[0]
        return lax.fori_loop(0, 3, lambda _, x: lax.fori_loop(0, 4, lambda _, x: jnp.cos(x @ x), x), x)

    program, counted = compiled(function, array(64, 64), array(7, 64, 64))
    assert counted.flops == 2 * 64**3 * (7 + 3 * 4)
    assert counted.flops_once == 2 * 64**3 * 2
    assert counted.unknown_loops == []
    # XLA adds an operation for each element of what lies between.
    assert counted.flops_once == pytest.approx(program.cost_analysis()["flops"], rel=0.05)


def test_a_loop_of_unknown_length_is_named():
    _, counted = compiled(lambda x: lax.while_loop(lambda x: x[0, 0] < 9, lambda x: jnp.sin(x @ x), x), array(32, 32))
    assert len(counted.unknown_loops) == 1
    assert counted.flops == 2 * 32**3


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (1, 1), "padding": ((0, 0), (0, 0))},
        {"window_strides": (2, 3), "padding": ((1, 2), (3, 0))},
        {"window_strides": (1, 2), "padding": "SAME", "rhs_dilation": (2, 1)},
        {"window_strides": (3, 2), "padding": ((4, 4), (2, 2)), "lhs_dilation": (4, 3)},
    ],
)
def test_convolutions_count_as_xla_counts_them(options):
    program, counted = compiled(
        functools.partial(lax.conv_general_dilated, **options), array(2, 6, 9, 10), array(8, 6, 3, 4)
    )
    assert counted.flops == program.cost_analysis()["flops"]


def test_collectives_have_their_bytes_groups_and_trips():
    mesh = make_mesh(data=2, fsdp=4)
    spec = PartitionSpec("data", "fsdp")

    def body(x):
        def step(x, _):
            y = lax.all_gather(x, "fsdp", axis=1, tiled=True)
            y = lax.psum_scatter(y * 2, "fsdp", scatter_dimension=1, tiled=True)
            return lax.psum(jnp.sin(y), ("data", "fsdp")), None

        x = lax.scan(step, x, length=5)[0]
        x = lax.all_to_all(x, "fsdp", split_axis=0, concat_axis=1, tiled=True)
        return lax.ppermute(x, "data", [(0, 1), (1, 0)])

    function = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    _, counted = compiled(function, array(16, 64))
    found = {x.kind: x for x in counted.collectives}
    assert set(found) == {"all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"}
    part = 8 * 16 * 4  # bytes of a device's x
    assert (found["all-gather"].nbytes, found["all-gather"].times) == (4 * part, 5)
    assert (found["reduce-scatter"].nbytes, found["reduce-scatter"].times) == (4 * part, 5)
    assert (found["all-reduce"].nbytes, found["all-reduce"].times) == (part, 5)
    assert found["all-gather"].groups.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert sorted(found["all-reduce"].groups[0].tolist()) == list(range(8))
    assert found["all-gather"].sent_bytes == 5 * 3 * part
    assert found["all-reduce"].sent_bytes == 5 * 2 * 7 / 8 * part
    assert (found["all-to-all"].nbytes, found["all-to-all"].sent_bytes) == (part, 3 / 4 * part)
    assert found["collective-permute"].sent_bytes == part
    assert {tuple(pair) for pair in found["collective-permute"].groups.tolist()} >= {(0, 4), (4, 0)}


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("[2,4]<=[4,2]T(1,0)", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("mesh['a'=4,'b'=2] {'a'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("mesh['a'=4,'b'=2] {'b'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
    ],
)
def test_every_way_to_write_groups_is_read(text, groups):
    counted = read_program(
        "ENTRY %main (x: f32[8]) -> f32[8] {\n"
        "  %x = f32[8]{0} parameter(0)\n"
        f"  ROOT %y = f32[8]{{0}} all-reduce(%x), channel_id=1, replica_groups={text}, to_apply=%add\n}}\n"
    )
    assert counted.collectives[0].groups.tolist() == groups


def test_memory_traffic_counts_slices_of_what_is_stacked():
    def function(stack):
        return lax.fori_loop(
            0, 16, lambda i, x: x + jnp.sin(lax.dynamic_index_in_dim(stack, i, keepdims=False)), stack[0]
        )

    _, counted = compiled(function, array(16, 256, 256))
    slices = 16 * 256 * 256 * 4
    assert 2 * slices <= counted.hbm_bytes <= 5 * slices  # not 16 times the stack


@pytest.mark.parametrize("size", MODELS)
def test_counts_know_the_parameters_but_for_the_norms(size):
    assert counts.parameters(MODELS[size]) == pytest.approx(count_parameters(MODELS[size]), rel=1e-3)


def test_forward_flops_are_those_of_the_program():
    params = jax.eval_shape(lambda: init_params(TINY, jax.random.key(0)))
    batch = Batch(array(3, 32, dtype=jnp.int32), array(3, dtype=jnp.int32))
    _, counted = compiled(
        lambda params, batch: eos_states(params, batch, config=TINY, kernel="reference"), params, batch
    )
    flops = counts.forward_flops(TINY, texts=3, length=32)
    full_attention = flops.attention * 2 * 32 / 33  # the reference kernel computes both halves
    assert counted.flops == flops.projections + full_attention


@pytest.mark.parametrize("packed", [None, (32, 64, 4)])
@pytest.mark.parametrize(("chunk_rows", "remat", "few_layers"), [(0, "dots", 3), (4, "full", 3), (4, "full", 2)])
def test_training_passes_are_those_of_the_program(chunk_rows, remat, few_layers, packed, monkeypatch):
    monkeypatch.setattr("f2llm_jax.model.FEW_LAYERS", few_layers)
    from f2llm_jax.planning.programs import train_program
    from f2llm_jax.train.config import load_recipe

    recipe = load_recipe("tiny")
    recipe = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, batch_size=8),
        loss=dataclasses.replace(recipe.loss, mrl_dims=(8,)),
        compute=dataclasses.replace(recipe.compute, chunk_rows=chunk_rows, remat=remat, kernel="reference"),
    )
    mesh = make_mesh(devices=jax.devices()[:1])
    program = train_program(recipe, TINY, mesh, length=64, negatives=2, packed=packed).lower().compile()
    counted = read_program(program.as_text())
    runs = (8, 24) if packed is None else (32,)
    slots = 1 if packed is None else packed[2]
    work = counts.TrainWork(8, 2, runs, 64, slots, chunk_rows, remat, "reference", recipe.loss.mrl_dims, 4, 4)
    flops = counts.estimate_train(TINY, counts.Axes(1, 1, 1), work).flops
    full_attention = flops.attention * 2 * 64 / 65
    expected = flops.projections + full_attention + flops.end_attention + flops.loss
    assert counted.flops == pytest.approx(expected, rel=2e-3)
    assert counted.unknown_loops == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v9:4x4", "no chip 'v9' is known; there are v4, v5e, v5p, v6e, tpu7x"),
        ("v5e", "the shape of a v5e slice is 2 numbers, as in v5e:4x4"),
        ("v5p:4x4", "the shape of a v5p slice is 3 numbers"),
        ("v6e:0x4", "the shape of a v6e slice"),
        ("v3-16", r"no accelerator type v3-N is known; there are v4-N, v5litepod-N, v5e-N, v5p-N, v6e-N, and shapes"),
        ("v5e:4x4-", "the shape of a v5e slice is 2 numbers"),
        ("v5p-24", r"the shape of '24' is not known, only of v5p-8, 16, .*, 12288; others are written as in v5p:2x2x4"),
    ],
)
def test_a_slice_that_does_not_exist_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_topology(text)


@pytest.mark.parametrize(
    ("accelerator_type", "topology"),
    [
        ("v5litepod-16", "v5e:4x4"),
        ("v5e-8", "v5e:2x4"),
        ("v6e-256", "v6e:16x16"),
        ("v5p-32", "v5p:2x2x4"),
        ("v4-8", "v4:2x2x1"),
    ],
)
def test_slices_by_the_names_of_gcloud(accelerator_type, topology):
    assert parse_topology(accelerator_type) == parse_topology(topology)


@pytest.mark.parametrize("kind", chips.ACCELERATOR_TYPES)
def test_a_name_of_gcloud_counts_cores(kind):
    for number in chips.ACCELERATOR_TYPES[kind][1]:
        assert parse_topology(f"{kind}-{number}").size * (2 if kind in ("v4", "v5p") else 1) == number


def test_links_that_reach_a_group():
    slice_2d, pod, torus = parse_topology("v5e:4x4"), parse_topology("v5e:16x16"), parse_topology("v5p:4x4x4")
    link = slice_2d.chip.link_bandwidth
    row, square = [(x, 0, 0) for x in range(4)], [(x, y, 0) for x in range(4) for y in range(4)]
    assert slice_2d.ici_bandwidth(row) == link  # an open line
    assert slice_2d.ici_bandwidth(square) == 2 * link
    assert pod.ici_bandwidth([(x, 0, 0) for x in range(16)]) == 2 * link  # a ring
    assert pod.ici_bandwidth(row) == link  # a part of one
    assert torus.ici_bandwidth(square) == 4 * torus.chip.link_bandwidth
    # Rings of v5e and v6e are those of an axis; of the others they are those of whole cubes.
    flat, bar = parse_topology("v6e:8x16"), parse_topology("v5p:2x2x4")
    assert flat.ici_bandwidth([(0, y, 0) for y in range(16)]) == 2 * flat.chip.link_bandwidth
    assert flat.ici_bandwidth([(x, 0, 0) for x in range(8)]) == flat.chip.link_bandwidth
    assert bar.ici_bandwidth([(0, 0, z) for z in range(4)]) == bar.chip.link_bandwidth
    assert parse_topology("tpu7x:4x4x8").rings == (True, True, True)
    assert parse_topology("v4:4x4x2").rings == (False, False, False)


@pytest.mark.parametrize(("slice_name", "links"), [("v5e:4x4", 2), ("v5e:8x16", 3), ("v4:2x2x4", 3), ("v4:4x4x4", 6)])
def test_an_estimate_takes_all_links_of_the_slice(slice_name, links):
    topology = parse_topology(slice_name)
    estimate = counts.Estimate(counts.Flops(0, 0), hbm_bytes=0, ici_bytes=1e9, memory_bytes=0)
    assert estimate.seconds(topology, 2)[2] == pytest.approx(1e9 / (links * topology.chip.link_bandwidth))


def test_a_layer_exchanges_its_weights_over_fsdp_and_its_results_over_tensor():
    # Of 82,944 weights in bfloat16 a quarter on each part of tensor, of which 7 of 8 parts come from elsewhere; and of
    # two results of 100 x 96 numbers in float32 3 of 4 parts, there and back.
    weights = 96 * 32 * (4 + 2 + 2 + 4) + 3 * 96 * 160
    assert counts.layer_weights(TINY) == weights == 82_944
    exchange = counts.layer_exchange(TINY, 100, counts.Axes(data=2, fsdp=8, tensor=4), itemsize=2)
    assert exchange == (82_944 * 2 / 4 * 7 / 8, 2 * (100 * 96 * 4 * 3 / 4 * 2))
    assert counts.layer_exchange(TINY, 100, counts.Axes(16, 1, 1), itemsize=2) == (0, 0)


# A slice of two chips by two, and a program in which pairs of them exchange; v5e has links of 45 GB/s.
SQUARE = SimpleNamespace(devices=np.array([SimpleNamespace(coords=(x, y, 0)) for x in (0, 1) for y in (0, 1)]))
ACROSS = Collective("all-gather", (8,), nbytes=900, groups=np.array([[0, 3], [1, 2]]), times=5, source="")
MIXED = Collective("all-reduce", (8,), nbytes=600, groups=np.array([[0, 3], [1, 0]]), times=2, source="")


def test_a_collective_takes_as_long_as_its_slowest_group():
    topology = parse_topology("v5e:2x2")
    assert plan.collective_seconds(ACROSS, SQUARE, topology) == pytest.approx(900 / 2 * 5 / 9e10)
    assert plan.collective_seconds(MIXED, SQUARE, topology) == pytest.approx(2 * 600 / 2 * 2 / 4.5e10)


@pytest.fixture
def planned(monkeypatch):
    """Plans a program of these counts on that slice: 4e12 FLOPs in float32, and 3e9 bytes by estimate, 5e9 counted."""
    job = SimpleNamespace(
        program=lambda mesh, rows: SimpleNamespace(state_bytes=lambda: {"parameters": 10}),
        texts=lambda rows: 7 * rows,
        row_length=64,
        length=48,
        itemsize=4,
    )
    estimate = counts.Estimate(counts.Flops(3e12, 1e12), hbm_bytes=3e9, ici_bytes=6e9, memory_bytes=0)
    monkeypatch.setattr(plan, "make_mesh", lambda *_, **__: SQUARE)
    monkeypatch.setattr(plan, "read_program", lambda _: Program(1e12, 1e12, 5e9, [ACROSS, MIXED]))

    def compile_with(result):
        monkeypatch.setattr(plan, "compile_program", lambda _: result)
        candidate = plan.Candidate(counts.Axes(4, 1, 1), 8, estimate)
        return plan._compile(job, parse_topology("v5e:2x2"), candidate, [])

    return compile_with


def test_a_plan_is_made_of_what_the_program_says(planned):
    stats = SimpleNamespace(
        argument_size_in_bytes=100,
        temp_size_in_bytes=20,
        output_size_in_bytes=50,
        alias_size_in_bytes=47,
        generated_code_size_in_bytes=4,
    )
    compiled = SimpleNamespace(memory_analysis=lambda: stats, cost_analysis=lambda: {"flops": 2e12})
    made = planned((compiled, "a program"))
    ici = 900 / 2 * 5 / 9e10 + 2 * 600 / 2 * 2 / 4.5e10
    assert made.seconds == pytest.approx({"compute": 4e12 / (197e12 / 6), "hbm": 5e9 / 819e9, "ici": ici})
    assert (made.bound, made.step_seconds) == ("compute", made.seconds["compute"])
    assert made.texts_per_second == pytest.approx(7 * 8 / made.step_seconds)
    assert made.tokens_per_second == pytest.approx(48 * 7 * 8 / made.step_seconds)
    assert (made.batch_tokens, made.memory.total, made.fits) == (8 * 64, 100 + 20 + 3 + 4, True)
    assert (made.work.flops, made.work.compiler_ratio, made.work.ici_bytes) == (4e12, 0.5, 900 / 2 * 5 + 600 * 2)
    for slowest in made.seconds:
        assert dataclasses.replace(made, seconds={**made.seconds, slowest: 9.0}).bound == slowest


def test_of_a_program_that_is_not_seen_times_are_estimated(planned):
    made = planned((2**40, None))
    assert made.seconds == pytest.approx({"compute": 4e12 / (197e12 / 6), "hbm": 3e9 / 819e9, "ici": 6e9 / 9e10})
    assert (made.memory.total, made.fits, made.work) == (2**40, False, None)


def test_without_libtpu_the_error_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(F2LLMError, match=r"pip install 'f2llm-jax\[tpu\]'"):
        chips.topology_devices(parse_topology("v5e:4x4"))
    assert main(["plan", "80M", "--topology", "v5e:4x4"]) == 2
    assert "f2llm-jax[tpu]" in capsys.readouterr().err


def test_states_of_a_teacher_are_a_part_of_the_batch(monkeypatch):
    from f2llm_jax.planning.programs import train_program
    from f2llm_jax.train import config

    recipe = dataclasses.replace(
        config.load_recipe("tiny"), teacher="codefuse-ai/F2LLM-v2-0.6B", teacher_states="states"
    )
    monkeypatch.setattr(config, "load_recipe", lambda name: recipe)
    jobs = []

    def make_plan(job, *args, **options):
        jobs.append(job)
        return SimpleNamespace(fits=True)

    monkeypatch.setattr("f2llm_jax.plan.make_plan", make_plan)
    monkeypatch.setattr("f2llm_jax.planning.report.describe", str)
    assert main(["plan", "0.6B", "--topology", "v5e:4x4", "--do", "train", "--recipe", "mine"]) == 0
    assert jobs[0].teacher is None
    for packed in (None, (32, 64, 4)):
        program = train_program(
            recipe, TINY, make_mesh(devices=jax.devices()[:1]), length=64, negatives=2, packed=packed
        )
        batch = program.lower().in_avals[0][1]
        queries = recipe.data.batch_size
        shapes = [(queries, TINY.hidden_size)] * 2 + [(2 * queries, TINY.hidden_size)]
        assert [states.shape for states in batch.teacher] == shapes
        assert set(program.state) == {"parameters", "optimizer"}


def test_settings_of_a_recipe_are_planned(monkeypatch):
    jobs = []
    monkeypatch.setattr("f2llm_jax.plan.make_plan", lambda job, *args, **options: jobs.append(job))
    monkeypatch.setattr("f2llm_jax.planning.report.describe", str)
    settings = ["--set", "data.batch_size=64", "--set", "data.max_length=256", "--set", "teacher=none"]
    for options in ([], settings, [*settings, "--length", "128"]):
        with pytest.raises(AttributeError, match="fits"):  # there is no plan
            main(["plan", "80M", "--topology", "v5litepod-16", "--do", "train", *options])
    assert [(job.recipe.data.batch_size, job.length) for job in jobs] == [(512, 1024), (64, 256), (64, 128)]
    assert [job.teacher is None for job in jobs] == [False, True, True]


def test_float32_products_take_six_bfloat16_ones():
    estimate = counts.estimate_encode(TINY, counts.Axes(1, 1, 1), rows=8, length=64, slots=4, itemsize=4)
    seconds = {itemsize: estimate.seconds(parse_topology("v5e:4x4"), itemsize) for itemsize in (2, 4)}
    assert seconds[4] == pytest.approx((6 * seconds[2][0], *seconds[2][1:]))
    assert EncodeJob(config=TINY, dtype="float32").itemsize == 4


def test_int8_is_of_projections():
    flops = counts.Flops(projections=394e12 * 3, attention=197e12, end_attention=197e12)
    chip = {name: parse_topology(chips.CHIPS[name].example).chip for name in ("v4", "v5e")}
    assert flops.seconds(chip["v5e"], 1) == pytest.approx(3 + 2)
    assert flops.seconds(chip["v5e"], 2) == pytest.approx(6 + 2)
    assert flops.seconds(chip["v4"], 1) == flops.seconds(chip["v4"], 2)
    config, one = MODELS["0.6B"], counts.Axes(1, 1, 1)
    memory = {
        size: counts.estimate_encode(config, one, rows=8, length=64, slots=4, itemsize=size).memory_bytes
        for size in (1, 2)
    }
    assert memory[2] - memory[1] == config.num_hidden_layers * counts.layer_weights(config)


def test_int8_is_planned_as_it_is_loaded(tiny_release):
    mesh = make_mesh(2, 2, 2)
    loaded = f2llm_jax.load(tiny_release, dtype="int8", mesh=mesh).params
    planned = encode_program(TINY, mesh, rows=2, length=64, slots=None, dtype="int8").state["parameters"]
    assert jax.tree.structure(planned) == jax.tree.structure(loaded)
    for ours, theirs in zip(jax.tree.leaves(planned), jax.tree.leaves(loaded), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)


@pytest.mark.parametrize("length", [8, 100, 341, 350, 512, 600, 1024, 1025, 1100, 2048, 2100, 3000, 4000, 40960])
def test_texts_are_laid_out_as_the_encoder_lays_them_out(length):
    config = MODELS["80M"]
    sizes = (32768, config.max_position_embeddings)
    buckets, packs = Buckets(*sizes), packing.Packing(*sizes)
    chunk = [np.zeros(length, np.int32)] * (2048 if length < 4096 else 8)
    layout = packing.choose_layout("auto", "tpu", chunk, buckets, packs)
    job = EncodeJob(config=config, length=length)
    assert job.packed == (layout == "packed")
    first = next(packing.packed([chunk], packs, 0) if job.packed else batching.batched([chunk], buckets, 0))
    assert first.batch.tokens_bt.shape[1] == job.row_length
    assert len(first.texts) == len(first.batch.tokens_bt) * job.texts_per_row
    assert job.padding == pytest.approx(1 - first.tokens / first.batch.tokens_bt.size)


def test_rows_of_one_text_have_no_segments():
    mesh = make_mesh(devices=jax.devices()[:1])
    program = encode_program(TINY, mesh, rows=2, length=64, slots=None, dtype="float32")
    assert [array.shape for array in program.lower().in_avals[0][1]] == [(2, 64), (2,)]


@pytest.mark.parametrize("layout", ["packed", "bucketed"])
@pytest.mark.parametrize("chunk_rows", [24, 32, 100_000])
def test_chunks_are_those_of_the_step(chunk_rows, layout):
    from f2llm_jax.train.config import load_recipe, override
    from f2llm_jax.train.step import chunk_shape

    settings = [f"compute.chunk_rows={chunk_rows}", f"data.layout={layout}", "data.batch_size=512"]
    job = TrainJob(config=MODELS["80M"], recipe=override(load_recipe("stage2_80m"), settings))
    axes = counts.Axes(4, 2, 1)
    (rows_at_once,) = job.rows_at_once(axes)
    work = job._work(axes, rows_at_once)
    shapes = [chunk_shape(rows, chunk_rows, axes.batch_parts) for rows in job._runs(axes)]
    assert max(size for _, size in shapes) == rows_at_once == work.chunk_rows
    assert tuple(chunks * size for chunks, size in shapes) == work.runs
    assert work.chunks == sum(chunks for chunks, _ in shapes)


def test_a_kernel_that_tpus_do_not_have_is_named():
    from f2llm_jax.train.config import load_recipe

    recipe = load_recipe("tiny")
    recipe = dataclasses.replace(recipe, compute=dataclasses.replace(recipe.compute, kernel="cudnn"))
    with pytest.raises(InputError, match=r"compute\.kernel is 'cudnn', which TPUs do not have; take auto"):
        TrainJob(config=TINY, recipe=recipe)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "tiny"], "--recipe is for --do train"),
        (["--set", "data.batch_size=64"], "--set is for --do train"),
        (
            ["--do", "train", "--set", "data.batch=64"],
            "there is no setting 'data.batch'; nearest: ",
        ),
        (["--do", "train", "--set", "mesh.fsdp=2"], "--set mesh.fsdp=2: a plan takes it from --mesh"),
        (["--do", "train", "--set", "model=x"], "--set model=x: a plan takes it from MODEL"),
        (["--topology", "v5litepod-5"], "the shape of '5' is not known"),
        (["--do", "train", "--dtype", "float32"], "--dtype is for --do encode"),
        (["--length", "50000"], "length must be within 1..40960, not 50000"),
        (["--do", "train", "--length", "1025"], "within 1..1024, the recipe's data.max_length, not 1025"),
        (["--topology", "v7:4x4"], "no chip 'v7' is known"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, message, capsys):
    assert main(["plan", "80M", "--topology", "v5e:4x4", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "length"),
    [
        ([], 1024),
        (["--length", "2000"], 2000),
        (["--do", "train"], 1024),
        (["--do", "train", "--recipe", "tiny"], 128),
        (["--do", "train", "--recipe", "tiny", "--length", "77"], 77),
    ],
)
def test_training_is_planned_for_the_length_of_the_recipe(arguments, length, monkeypatch):
    jobs = []
    monkeypatch.setattr("f2llm_jax.plan.make_plan", lambda job, *args, **options: jobs.append(job))
    monkeypatch.setattr("f2llm_jax.planning.report.describe", str)
    with pytest.raises(AttributeError, match="fits"):  # there is no plan
        main(["plan", "80M", "--topology", "v5e:4x4", *arguments])
    assert jobs[0].length == length


@pytest.mark.parametrize("mesh", ["data=2,model=8", "data=x"])
def test_a_mesh_is_axes_and_sizes(mesh, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", "80M", "--topology", "v5e:4x4", "--mesh", mesh])
    assert stop.value.code == 2
    assert f"takes sizes of data, fsdp, tensor, like data=2,tensor=4, not {mesh!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("the total memory required for HLO temporaries (2.00T) exceeds available HBM (30.75G).", 2 * 2**40),
        ("Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm. Exceeded", int(20.5 * 2**30)),
        ("Mosaic failed to compile", None),
    ],
)
def test_what_a_refused_program_needs_is_read(message, expected):
    if expected is not None and "total memory" in message:
        message = f"Ran out of memory on HBM, {message}"
    assert needed_bytes(message) == expected
