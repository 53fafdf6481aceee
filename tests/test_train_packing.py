"""Packed training batches: losses and gradients of rows of one text each, in few shapes with little padding."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packs import as_packed
from raw_data import rows, write_raw
from releases import SHARED, TINY

from f2llm_jax.attention import KERNELS
from f2llm_jax.embedding import Batch, PackedBatch, eos_states
from f2llm_jax.model import init_params
from f2llm_jax.packing import text_lengths
from f2llm_jax.sharding import make_mesh, param_shardings
from f2llm_jax.train import placement
from f2llm_jax.train.batch import PackedTrainBatch, TeacherStates, TrainBatch
from f2llm_jax.train.data import Share, TrainBatches, TrainingData, ValidationBatches
from f2llm_jax.train.meter import Work
from f2llm_jax.train.packing import TrainPacking
from f2llm_jax.train.placement import global_batch
from f2llm_jax.train.prepare import prepare
from f2llm_jax.train.step import (
    ComputeConfig,
    LossConfig,
    loss_and_grads,
    loss_terms,
    teacher_states,
)
from f2llm_jax.train.validation import validation_step

QUERIES = 8
LONGEST = 15  # of a passage
LOSS = LossConfig(mrl_dims=(8, 32), kd_mrl=True)


@functools.cache
def params(seed: int = 0) -> dict:
    return init_params(TINY, jax.random.key(seed))


def bucketed(negatives: int = 2, *, teacher: bool = False, seed: int = 0) -> TrainBatch:
    rng = np.random.default_rng(seed)

    def texts(count: int, longest: int) -> Batch:
        tokens = rng.integers(0, 200, (count, longest)).astype(np.int32)
        return Batch(tokens, rng.integers(1, longest + 1, count).astype(np.int32))

    def states(count: int) -> np.ndarray:
        return rng.normal(size=(count, TINY.hidden_size)).astype(np.float32)

    count = QUERIES * negatives
    return TrainBatch(
        texts(QUERIES, 8),
        texts(QUERIES, LONGEST),
        texts(count, LONGEST) if negatives else None,
        np.arange(QUERIES, dtype=np.int32) // 2,
        TeacherStates(states(QUERIES), states(QUERIES), states(count) if negatives else None) if teacher else None,
    )


def step(params, batch, teacher_params=None, *, compute: ComputeConfig):
    """The loss with all its terms, and the gradient."""
    teacher = teacher_states(batch, teacher_params, TINY, compute)

    def loss(states):
        terms = loss_terms(states, batch, LOSS, in_batch=True, teacher=teacher)
        return terms["hard"] + terms["in_batch"] + terms["distill"], terms

    return loss_and_grads(loss, params, batch, TINY, compute)


run_step = jax.jit(step, static_argnames="compute")


def assert_same(found, expected) -> None:
    for name, value in expected[1].items():
        assert float(found[1][name]) == pytest.approx(float(value), rel=1e-5), name
    for (path, own), reference in zip(jax.tree.leaves_with_path(found[2]), jax.tree.leaves(expected[2]), strict=True):
        assert np.abs(np.asarray(own) - np.asarray(reference)).max() <= 1e-5 * np.abs(reference).max(), path


# --- the same losses and gradients


@pytest.mark.parametrize(
    ("negatives", "teacher", "chunk_rows"),
    [(2, None, 1), (0, "states", 1), (2, "states", 0), (2, "states", 1), (2, "in the step", 1)],
)
def test_losses_and_gradients_are_those_of_a_text_a_row(negatives, teacher, chunk_rows):
    batch = bucketed(negatives, teacher=teacher == "states")
    its = params(1) if teacher == "in the step" else None
    expected = run_step(params(), batch, its, compute=ComputeConfig(dtype="float32"))
    assert (float(expected[1]["distill"]) > 0) == (teacher is not None)
    packed = as_packed(batch, chunk_rows=chunk_rows, fitted=False, row_length=64)
    assert len(packed.rows.tokens_bt) > chunk_rows
    assert packed.rows.tokens_bt.size < (QUERIES * 8 + (1 + negatives) * QUERIES * LONGEST)
    found = run_step(params(), packed, its, compute=ComputeConfig(dtype="float32", chunk_rows=chunk_rows))
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("axes", "chunk_rows"),
    [
        ({"data": 8}, 8),
        ({"data": 2, "fsdp": 4}, 0),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 0),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 8),
    ],
)
def test_gradients_on_a_mesh_are_those_of_one_device(axes, chunk_rows):
    batch = bucketed(teacher=True)
    expected = run_step(params(), batch, None, compute=ComputeConfig(dtype="float32"))
    mesh = make_mesh(**axes)
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    packed = as_packed(batch, multiple=parts, chunk_rows=chunk_rows, fitted=False, row_length=16)
    assert len(packed.rows.tokens_bt) > chunk_rows
    with jax.set_mesh(mesh):
        shardings = param_shardings(TINY, mesh)
        run = jax.jit(step, static_argnames="compute", out_shardings=(None, None, shardings))
        found = run(
            jax.device_put(params(), shardings),
            global_batch(packed, mesh),
            compute=ComputeConfig(dtype="float32", chunk_rows=chunk_rows),
        )
    assert_same(found, expected)


@functools.cache
def grads(kernel: str, remat: str) -> dict:
    batch = as_packed(bucketed(), multiple=8).rows

    def total(params):
        states = eos_states(params, batch, config=TINY, kernel=kernel, remat=remat)
        return (states * (batch.ends_be > 0)[..., None]).sum()

    return jax.jit(jax.grad(total))(params())


@pytest.mark.parametrize("kernel", sorted(set(KERNELS) - {"cudnn", "reference"}))
def test_every_kernel_has_the_gradient_of_packed_rows(kernel):
    """Slots without a text and rows without any are among them: their states reach no loss."""
    expected, found = grads("reference", "none"), grads(kernel, "full")
    for own, reference in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(own, reference, rtol=1e-4, atol=2e-6 * np.abs(reference).max())


def test_validation_is_that_of_a_text_a_row():
    batch, everything = bucketed(), np.ones(QUERIES, bool)
    options = {"config": TINY, "loss": LOSS, "compute": ComputeConfig(dtype="float32"), "in_batch": True}
    run = jax.jit(functools.partial(validation_step, **options))
    expected, found = run(params(), batch, everything), run(params(), as_packed(batch), everything)
    assert found.keys() == expected.keys() and len(found) == 3
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-5), name

    # Whatever fills a batch counts for nothing.
    example_mask_b = np.arange(QUERIES) < 5
    first, last = run(params(), batch, example_mask_b), run(params(), batch, ~example_mask_b)
    for name in ("loss_hard", "accuracy"):
        mean = (5 * float(first[name]) + 3 * float(last[name])) / QUERIES
        assert mean == pytest.approx(float(expected[name]), rel=1e-5), name
    tokens_bt = np.where(example_mask_b[:, None], batch.passage.tokens_bt, 7)
    filled = run(params(), batch._replace(passage=batch.passage._replace(tokens_bt=tokens_bt)), example_mask_b)
    assert jax.device_get(filled) == jax.device_get(first)


def test_work_is_counted_by_the_texts():
    batch = bucketed()
    packed = as_packed(batch, multiple=4)
    expected, found = Work.of(batch), Work.of(packed)
    assert found._replace(computed_tokens=0) == expected._replace(computed_tokens=0)
    assert found.computed_tokens == packed.rows.tokens_bt.size < expected.computed_tokens


# --- the shapes


@settings(max_examples=100, deadline=None)
@given(
    shares=st.lists(st.lists(st.integers(1, 300), min_size=4, max_size=4), min_size=1, max_size=3),
    multiple=st.sampled_from([1, 6, 8]),
    chunk_rows=st.sampled_from([0, 2, 5]),
    fitted=st.booleans(),
)
def test_all_processes_fill_the_same_shape(shares, multiple, chunk_rows, fitted):
    packing = TrainPacking(multiple=multiple, chunk_rows=chunk_rows, fitted=fitted)
    plan = packing.plan([np.array(lengths) for lengths in shares])
    assert plan.length in packing.lengths(max(map(max, shares)))
    assert plan.rows % multiple == plan.rows % len(shares) == 0
    assert not chunk_rows or plan.rows <= chunk_rows or plan.rows % chunk_rows == 0
    for lengths, filled in zip(shares, plan.shares, strict=True):
        assert len(filled) <= plan.rows // len(shares)
        assert sorted(text for row in filled for text in row.texts) == list(range(len(lengths)))
        for row in filled:
            assert sum(lengths[text] for text in row.texts) == row.tokens <= plan.length
            assert len(row.texts) <= plan.slots


def test_slots_count_through_the_rows_of_all_processes(monkeypatch):
    """Also where the rows of a process lie apart."""

    class Sharding:
        def addressable_devices_indices_map(self, shape):
            assert shape == (8,)
            return {"a": (slice(6, 8),), "b": (slice(2, 4),)}

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    rows = PackedBatch(np.zeros((4, 64)), np.zeros((4, 64)), np.zeros((4, 3)))
    batch = PackedTrainBatch(rows, np.array([0, 7]), np.array([4, 11]), None, np.arange(2))
    moved = placement._with_global_slots(batch, Sharding())
    # Rows 0, 1, 2, 3 of the process are 2, 3, 6, 7 of the batch.
    assert moved.query_slots_b.tolist() == [6, 19] and moved.passage_slots_b.tolist() == [10, 23]
    assert moved.negative_slots_m is None


def test_rows_are_as_long_as_pays():
    """On CPUs of a length that the texts of a batch fill, and short ones where the texts are."""
    cpu = TrainPacking.on("cpu")
    assert cpu.lengths(200) == list(range(256, 513, 32))
    assert cpu.lengths(900) == [960, 1024] and cpu.lengths(1100) == list(range(1152, 2049, 128))
    assert cpu.lengths(20) == [64, 128, 192, *range(256, 513, 32)]
    rng = np.random.default_rng(0)
    sentences, paragraphs = rng.integers(8, 32, 144), rng.integers(100, 256, 18)
    assert cpu.plan([sentences]).length <= 96
    plan = cpu.plan([paragraphs])
    assert 1 - paragraphs.sum() / (plan.rows * plan.length) < 0.08
    accelerator = TrainPacking()
    assert accelerator.lengths(20) == [1024] and accelerator.lengths(2049) == [4096]
    assert TrainPacking().plan([np.array([5, 1100])])[:3] == (1, 2048, 4)
    # Every text as long as a text may be: a text a row, and none added.
    assert accelerator.plan([np.full(4608, 1024)])[:3] == (4608, 1024, 1)


# --- prepared data


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_release) -> Path:
    home = tmp_path_factory.mktemp("data")
    tables = {
        "aya": rows(200, words=40),
        "fiqa": rows(60, negatives=0, seed=1),
        "imdb": rows(60, negatives=1, seed=2, words=40),
    }
    prepare(write_raw(home / "raw", tables), tiny_release, home / "out", workers=1)
    return home / "out"


def texts_of(batch: TrainBatch | PackedTrainBatch) -> list[list[tuple[int, ...]]]:
    """The tokens of queries, passages and negatives."""
    if isinstance(batch, TrainBatch):
        kinds = [kind for kind in (batch.query, batch.passage, batch.negatives) if kind is not None]
        return [[tuple(r[:n].tolist()) for r, n in zip(*kind, strict=True)] for kind in kinds]
    tokens_bt, segment_ids_bt, ends_be = batch.rows
    kinds = [k for k in (batch.query_slots_b, batch.passage_slots_b, batch.negative_slots_m) if k is not None]
    found = []
    for kind in kinds:
        places = [divmod(int(slot), ends_be.shape[1]) for slot in kind]
        found.append([tuple(tokens_bt[b][segment_ids_bt[b] == e + 1].tolist()) for b, e in places])
        assert all(segment_ids_bt[b, ends_be[b, e]] == e + 1 for b, e in places)
    return found


@pytest.mark.parametrize("max_length", [20, 1024])
def test_a_step_holds_the_same_texts_in_both_layouts(folder, max_length):
    one, other = (
        TrainBatches(TrainingData(folder, max_length=max_length, packing=packing), batch_size=8)
        for packing in (None, TrainPacking(multiple=2, fitted=True))
    )
    for number in range(0, len(one), 4):
        plain, packed = one[number].batch, other[number].batch
        assert isinstance(packed, PackedTrainBatch) and len(packed.rows.tokens_bt) % 2 == 0
        assert texts_of(packed) == texts_of(plain)
        assert len(text_lengths(packed.rows)) == sum(map(len, texts_of(plain)))
        np.testing.assert_array_equal(packed.passage_ids_b, plain.passage_ids_b)
        assert all(array.dtype == np.int32 for array in jax.tree.leaves(packed))


@pytest.mark.parametrize("processes", [2, 4])
def test_shares_of_a_batch_have_one_shape_and_its_texts(folder, processes):
    data = TrainingData(folder, packing=TrainPacking(multiple=8, fitted=True))
    whole = TrainBatches(TrainingData(folder), batch_size=8)
    parts = [TrainBatches(data, batch_size=8, share=Share(n, processes)) for n in range(processes)]
    for number in range(0, len(whole), 5):
        shares = [part[number].batch for part in parts]
        assert len({tuple(x.shape for x in jax.tree.leaves(share)) for share in shares}) == 1
        assert len(shares[0].rows.tokens_bt) * processes % 8 == 0
        joined = [list(itertools.chain(*kinds)) for kinds in zip(*map(texts_of, shares), strict=True)]
        assert joined == texts_of(whole[number].batch)


def test_validation_batches_are_packed_too(folder):
    data = TrainingData(folder, packing=TrainPacking(fitted=True))
    plain, packed = (ValidationBatches(source, "aya", batch_size=4) for source in (TrainingData(folder), data))
    for number in range(len(plain)):
        assert texts_of(packed[number].batch) == texts_of(plain[number].batch)


# --- real data

REAL = SHARED / "train_raw"
PADDING = 0.12
"""Of a whole epoch; rows as long as the longest text would be seven tenths padding."""


@pytest.mark.skipif(not REAL.exists(), reason="shared/data/train_raw is not here")
@pytest.mark.parametrize(("fitted", "programs"), [(True, 48), (False, 24)])
def test_real_batches_are_of_few_shapes_with_little_padding(real_data, fitted, programs):
    """Texts of 5 to 1,000 tokens of three tasks and 30 datasets, in batches of 32 and of 512."""
    for batch_size in (32, 512):
        data = LengthsOnly(real_data, packing=TrainPacking.on("cpu" if fitted else "tpu"))
        batches = TrainBatches(data, batch_size=batch_size)
        plans = [batches[number].batch for number in range(0, len(batches), 4 if batch_size == 32 else 1)]
        tokens = sum(row.tokens for plan in plans for row in plan.shares[0])
        assert 1 - tokens / sum(plan.rows * plan.length for plan in plans) < PADDING
        shapes = Counter(plan[:3] for plan in plans)
        assert len(shapes) <= programs, shapes


class LengthsOnly(TrainingData):
    """Gives the plan of a batch."""

    def batch(self, dataset, split, examples, negatives, share):
        return self.pack_plan(self.text_lengths(dataset, split, examples, negatives), share.processes)


@pytest.fixture(scope="module")
def real_data(tmp_path_factory, real_release) -> Path:
    out = tmp_path_factory.mktemp("real") / "data"
    prepare(REAL, real_release, out, workers=1, cap=1000)
    return out
