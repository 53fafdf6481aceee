"""The training step against 40 steps of the reference's losses, AdamW, schedule and clipping in PyTorch."""

import contextlib
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compilation import jit_as_users
from hypothesis import example, given
from hypothesis import strategies as st
from packs import as_packed
from releases import SHARED, TINY

from f2llm_jax import losses
from f2llm_jax.config import ModelConfig
from f2llm_jax.convert.load import load_params
from f2llm_jax.convert.safetensors import Checkpoint
from f2llm_jax.embedding import Batch, eos_states
from f2llm_jax.errors import InputError
from f2llm_jax.model import init_params
from f2llm_jax.sharding import make_mesh, param_shardings
from f2llm_jax.train import step as step_module
from f2llm_jax.train import validation
from f2llm_jax.train.batch import AnyTrainBatch, TeacherStates, TrainBatch
from f2llm_jax.train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from f2llm_jax.train.placement import abstract_state, global_batch, shardings_of
from f2llm_jax.train.step import (
    ComputeConfig,
    LossConfig,
    States,
    TrainState,
    loss_and_grads,
    loss_terms,
    train_step,
)

ORACLE = SHARED / "reference_training"
needs_oracle = pytest.mark.skipif(not ORACLE.exists(), reason="shared/data/reference_training is not here")


@functools.cache
def trajectory() -> dict:
    return json.loads((ORACLE / "trajectory.json").read_text())


@functools.cache
def load_model(name: str) -> tuple[ModelConfig, dict]:
    config = ModelConfig.from_release(ORACLE / name)
    return config, load_params(Checkpoint(ORACLE / name), config)


def load_batch(step: int, size: int, layout: str = "bucketed") -> AnyTrainBatch:
    with np.load(ORACLE / "batches.npz") as data:
        # One length for all, so that a kind of batch is one program; what follows an EOS changes nothing.
        ids = data[f"{step}/input_ids"]
        rows = Batch(np.pad(ids, ((0, 0), (0, 24 - ids.shape[1]))), data[f"{step}/lengths"])
    query, passage, negatives = (
        Batch(rows.tokens_bt[part], rows.lengths_b[part])
        for part in (slice(0, size), slice(size, 2 * size), slice(2 * size, None))
    )
    batch = TrainBatch(query, passage, negatives, np.arange(size, dtype=np.int32))
    return as_packed(batch, multiple=4) if layout == "packed" else batch


def reference_optimizer():
    run = trajectory()
    config = OptimizerConfig(
        learning_rate=run["learning_rate"],
        min_learning_rate=run["min_lr"],
        warmup_steps=run["warmup_steps"],
        b1=run["betas"][0],
        b2=run["betas"][1],
        eps=run["eps"],
        weight_decay=run["weight_decay"],
        clip_norm=run["clip_norm"],
    )
    return make_optimizer(config, run["steps"]), make_schedule(config, run["steps"])


def run_steps(compute: ComputeConfig, mesh: jax.sharding.Mesh | None = None, layout: str = "bucketed"):
    """All steps of the trajectory, on a mesh or on one device: the metrics of each, and the final parameters."""
    run = trajectory()
    config, params = load_model("student_init")
    teacher_config, teacher = load_model("teacher")
    loss = LossConfig(
        temperature=run["temperature"],
        mrl_dims=tuple(dim for dim in run["mrl_dims"] if dim < config.hidden_size),
        mask_duplicates=False,
        kd_weight=run["kd_weight"],
    )
    optimizer, schedule = reference_optimizer()
    shardings = teacher_shardings = None
    if mesh is not None:
        shardings = shardings_of(abstract_state(config, optimizer, "float32", mesh))
        teacher_shardings = param_shardings(teacher_config, mesh)
    jit = jit_as_users if mesh is None else jax.jit
    step = jit(
        functools.partial(
            train_step, config=config, loss=loss, compute=compute, optimizer=optimizer, teacher_config=teacher_config
        ),
        static_argnames="in_batch",
        out_shardings=None if mesh is None else (shardings, None),
    )
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        # Where a step leaves it: from elsewhere the first step would be a program of its own.
        state = jax.device_put(TrainState(np.int32(0), params, optimizer.init(params)), shardings or jax.devices()[0])
        return follow(step, state, jax.device_put(teacher, teacher_shardings), schedule, layout)


def follow(step, state, teacher, schedule, layout):
    log = []
    for entry in trajectory()["log"]:
        batch = load_batch(entry["step"], entry["batch_size"], layout)
        state, metrics = step(state, batch, teacher, in_batch=entry["kind"] == "retrieval")
        log.append({**{name: float(value) for name, value in metrics.items()}, "lr": float(schedule(entry["step"]))})
    return log, state.params


def assert_on_trajectory(log, params):
    names = {"hard": "hard", "in_batch": "in_batch", "distill": "distill", "loss": "total", "lr": "lr"}
    for ours, entry in zip(log, trajectory()["log"], strict=True):
        for name, theirs in {**names, "grad_norm": "grad_norm"}.items():
            np.testing.assert_allclose(ours[name], entry[theirs], rtol=1e-5, atol=1e-12, err_msg=f"{entry} {name}")
    _, expected = load_model("student_final")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        reference = functools.reduce(lambda tree, key: tree[key.key], path, expected)
        assert np.abs(np.asarray(leaf) - np.asarray(reference)).max() <= 1e-5, path


@needs_oracle
def test_trajectory_is_the_references():
    assert_on_trajectory(*run_steps(ComputeConfig(dtype="float32", remat="none"), layout="bucketed"))


@needs_oracle
@pytest.mark.parametrize(("remat", "kernel"), [("dots", "ragged"), ("full", "ragged"), ("full", "splash")])
def test_remat_and_kernel_change_no_gradient(remat, kernel):
    config, params = load_model("student_init")
    rows = load_batch(0, 6).query

    def grads(**options):
        return jax.jit(jax.grad(lambda params: eos_states(params, rows, config=config, **options).sum()))(params)

    expected_grads = grads(remat="none", kernel="reference")
    for own, expected in zip(
        jax.tree.leaves(grads(remat=remat, kernel=kernel)), jax.tree.leaves(expected_grads), strict=True
    ):
        np.testing.assert_allclose(own, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


@needs_oracle
def test_the_attention_kernel_is_the_configs():
    for chunk_rows in (0, 6):
        with pytest.raises(InputError, match="no attention kernel 'fast'"):
            run_steps(ComputeConfig(kernel="fast", chunk_rows=chunk_rows))


@needs_oracle
def test_trajectory_on_a_mesh_in_packed_rows_with_cached_gradients():
    """Few packed rows over eight parts of a batch: rows are added to what does not divide."""
    compute = ComputeConfig(dtype="float32", chunk_rows=4)
    assert_on_trajectory(*run_steps(compute, make_mesh(data=2, fsdp=4), "packed"))


def test_gradients_on_a_mesh_are_those_of_one_device():
    """The in-batch loss is over the batch of all devices, and its gradient reaches passages on other devices.

    There with cached gradients, on one device without. Chunks of 10 cut 16 queries into halves; to 48 documents two
    rows are added.
    """
    params = init_params(TINY, jax.random.key(0))
    rng = np.random.default_rng(0)

    def rows(count: int) -> Batch:
        return Batch(rng.integers(0, 200, (count, 8)).astype(np.int32), rng.integers(1, 9, count).astype(np.int32))

    batch = TrainBatch(rows(16), rows(16), rows(32), np.arange(16, dtype=np.int32) // 2)

    def grads(params, batch, chunk_rows):
        def loss(states):
            terms = loss_terms(states, batch, LossConfig(mrl_dims=(8, 32)), in_batch=True)
            return terms["hard"] + terms["in_batch"], terms

        return loss_and_grads(loss, params, batch, TINY, ComputeConfig(dtype="float32", chunk_rows=chunk_rows))

    (expected_loss, _, expected) = jax.jit(grads, static_argnums=2)(params, batch, 0)
    mesh = make_mesh(data=8)
    with jax.set_mesh(mesh):
        shardings = param_shardings(TINY, mesh)
        (loss, _, found) = jax.jit(grads, static_argnums=2, out_shardings=(None, None, shardings))(
            jax.device_put(params, shardings), global_batch(batch, mesh), 10
        )
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-6)
    for (path, own), reference in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(np.asarray(own) - np.asarray(reference)).max() <= 1e-5 * np.abs(reference).max(), path


def random_states(seed: int = 0) -> States:
    """Of 4 queries and their passages, with one negative each."""
    query_bd, documents_md = np.split(np.random.default_rng(seed).normal(size=(12, 16)).astype(np.float32), [4])
    return States(jnp.asarray(query_bd), jnp.asarray(documents_md))


def empty_batch(**fields) -> TrainBatch:
    """Passages 0 and 1 are one document, and 2 and 3 another."""
    rows = Batch(np.zeros((4, 1), np.int32), np.ones(4, np.int32))
    return TrainBatch(rows, rows, rows, np.array([0, 0, 1, 1], np.int32), **fields)


def test_duplicates_are_masked_as_the_config_says():
    states, batch = random_states(), empty_batch()
    for mask in (True, False):
        terms = loss_terms(states, batch, LossConfig(mask_duplicates=mask), in_batch=True)
        ids = batch.passage_ids_b if mask else None
        expected = losses.in_batch_loss(states.query_bd, states.documents_md[:4], passage_ids_c=ids)
        assert float(terms["in_batch"]) == pytest.approx(float(expected), rel=1e-6)


def test_passages_have_a_gradient_as_the_config_says():
    def grad(stop: bool) -> jax.Array:
        loss = LossConfig(stop_passage_gradient=stop)
        terms = jax.grad(lambda states: loss_terms(states, empty_batch(), loss, in_batch=True)["in_batch"])
        return np.abs(terms(random_states()).documents_md[:4]).max()

    assert grad(False) > 0 and grad(True) == 0


def test_distillation_weighs_as_the_config_says(monkeypatch):
    """In the loss of a step, whose states are given here."""
    student, teacher = random_states(), random_states(1)
    batch = empty_batch(teacher=TeacherStates(teacher.query_bd, teacher.documents_md[:4], teacher.documents_md[4:]))
    monkeypatch.setattr(step_module, "loss_and_grads", lambda loss, params, *rest: (*loss(student), params))
    optimizer = optax.sgd(0.0)
    params = {"w": jnp.ones(1)}
    state = TrainState(jnp.int32(0), params, optimizer.init(params))
    options = {"config": TINY, "compute": ComputeConfig(), "optimizer": optimizer, "in_batch": True}
    _, found = train_step(state, batch, loss=LossConfig(kd_weight=0.5), **options)
    expected = found["hard"] + found["in_batch"] + 0.5 * found["distill"]
    assert float(found["loss"]) == pytest.approx(float(expected), rel=1e-6) and found["distill"] > 1


def test_validation_is_that_of_a_batch_of_the_examples_alone(monkeypatch):
    """At the full size. Of a batch whose states are given here; whatever fills it counts for nothing."""
    count, size, negatives = 5, 8, 2
    rng = np.random.default_rng(0)
    query_bd, passage_bd, *hard = rng.normal(size=(2 + negatives, size, 16)).astype(np.float32)
    query_bd += passage_bd / 4
    negatives_bnd = np.stack(hard, axis=1)
    states = States(query_bd, np.concatenate([passage_bd, negatives_bnd.reshape(-1, 16)]))
    monkeypatch.setattr(validation, "batch_states", lambda *args: jax.tree.map(jnp.asarray, states))
    batch = empty_batch()._replace(passage_ids_b=jnp.array([0, 1, 1, 2, 3, 0, 4, 4]))
    options = {"config": TINY, "loss": LossConfig(mrl_dims=(8,)), "compute": ComputeConfig(), "in_batch": True}
    found = validation.validation_step({}, batch, np.arange(size) < count, **options)

    query_bd, passage_bd, negatives_bnd = (x[:count] for x in (query_bd, passage_bd, negatives_bnd))
    documents = np.concatenate([passage_bd[:, None], negatives_bnd], axis=1)
    cosines = np.einsum("bd,bnd->bn", query_bd, documents) / np.linalg.norm(documents, axis=2)  # times the query's norm
    won = cosines.argmax(axis=1) == 0
    assert 0 < won.mean() < 1
    expected = {
        "loss_hard": losses.hard_negative_loss(query_bd, passage_bd, negatives_bnd),
        "loss_in_batch": losses.in_batch_loss(query_bd, passage_bd, passage_ids_c=batch.passage_ids_b[:count]),
        "accuracy": won.mean(),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-5), name


@given(rows=st.integers(1, 5000), chunk_rows=st.integers(1, 600), parts=st.sampled_from([1, 2, 8, 16]))
@example(rows=4608, chunk_rows=24, parts=16)
def test_chunks_divide_over_devices_and_pad_little(rows, chunk_rows, parts):
    chunks, size = step_module.chunk_shape(rows, chunk_rows, parts)
    assert size % parts == 0 and size < chunk_rows + parts
    assert 0 <= chunks * size - rows < chunks * parts and (chunks - 1) * size < rows
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((parts, 1, 1), ("data", "fsdp", "tensor"))):
        assert jax.eval_shape(lambda x: step_module._chunks(x, chunk_rows), np.zeros(rows)).shape == (chunks, size)


@pytest.mark.parametrize("warmup", [7, 0])
def test_schedule_is_transformers_with_a_floor(warmup):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, 50)
    ours = make_schedule(OptimizerConfig(learning_rate=1e-3, min_learning_rate=1e-5, warmup_steps=warmup), 50)
    for step in range(50):
        theirs = scheduler.get_last_lr()[0]
        np.testing.assert_allclose(ours(step), max(theirs, 1e-5) if step else theirs, rtol=1e-6)
        optimizer.step()
        scheduler.step()


def test_weight_decay_and_clipping_are_torchs():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start, grads = rng.normal(size=(5, 3)).astype(np.float32), rng.normal(size=(6, 5, 3)).astype(np.float32)
    config = OptimizerConfig(learning_rate=1e-2, min_learning_rate=0.0, warmup_steps=2)
    ours, schedule = make_optimizer(config, 6), make_schedule(config, 6)
    parameter = torch.nn.Parameter(torch.tensor(start))
    theirs = torch.optim.AdamW([parameter], lr=1.0, betas=(0.9, 0.98), weight_decay=0.01)
    params = start
    state = ours.init(params)
    for step, grad in enumerate(grads):
        updates, state = ours.update(grad, state, params)
        params = optax.apply_updates(params, updates)
        parameter.grad = torch.tensor(grad)
        torch.nn.utils.clip_grad_norm_([parameter], 1.0)
        theirs.param_groups[0]["lr"] = float(schedule(step))
        theirs.step()
    np.testing.assert_allclose(params, parameter.detach().numpy(), rtol=1e-5)
