"""Whole runs of a tiny model on prepared data: killed, stopped, on other meshes, on another number of processes."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import functools
import itertools
import json
import logging
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import jax
import numpy as np
import pytest
import transformers
from compilation import quick_environment
from jax.experimental import multihost_utils
from raw_data import rows, write_raw
from releases import TINY, edit_json, set_appended_token, write_release

import f2llm_jax
from f2llm_jax.cli import main
from f2llm_jax.configs.common import QUERY_PROMPT
from f2llm_jax.convert.load import load_params, open_checkpoint
from f2llm_jax.embedding import Batch
from f2llm_jax.errors import InputError
from f2llm_jax.files import local_path, take_lock
from f2llm_jax.planning.counts import forward_flops
from f2llm_jax.release import read_release
from f2llm_jax.train import loop
from f2llm_jax.train.batch import PackedTrainBatch, TrainBatch
from f2llm_jax.train.checkpoint import Checkpoints
from f2llm_jax.train.config import MeshConfig, TrainConfig, load_recipe, override
from f2llm_jax.train.data import DataLoader
from f2llm_jax.train.loop import _claimed, export_run, train
from f2llm_jax.train.meter import Meter, Step, Work, by_dataset
from f2llm_jax.train.placement import make_train_mesh
from f2llm_jax.train.prepare import prepare
from f2llm_jax.train.records import Settings
from f2llm_jax.train.scalars import Scalars, best_step, read_scalars
from f2llm_jax.train.teacher import check_tokenizer
from f2llm_jax.train.validation import scalar_names

PROCESS = Path(__file__).with_name("train_process.py")

# 7 batches of retrieval and 4 of classification, all of the same shape: two programs are compiled.
STEPS = 11
SETTINGS = {
    "data.batch_size": 8,
    "data.max_length": 8,
    "loss.mrl_dims": "32",
    "optim.learning_rate": 1e-3,
    "optim.warmup_steps": 3,
    "compute.dtype": "float32",
    "every.log": 1,
    "every.validation": 5,
    "every.checkpoint": 3,
    "every.keep": 3,
}

# Of the one example held back there are no others in its batch: 0 at every validation, and the first is the best.
BEST = "Avg/retrieval/valid_loss_in_batch"


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_release) -> Path:
    home = tmp_path_factory.mktemp("train")
    tables = {"aya": rows(57, negatives=1, prefix=""), "imdb": rows(33, negatives=1, seed=1, prefix="")}
    prepare(write_raw(home / "raw", tables), tiny_release, home / "data", workers=1, max_length=8)
    return home / "data"


@pytest.fixture(scope="module")
def command(data, tiny_release):
    """Arguments of f2llm train for a run in a folder."""

    def arguments(out: Path, *more: str, **settings: object) -> list[str]:
        values = {"model": tiny_release, "data.path": data, **SETTINGS, **settings}
        changes = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
        return ["tiny", "--out", str(out), *changes, *more]

    return arguments


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory) -> Path:
    """A run from beginning to end, and ``export`` in its folder."""
    out = tmp_path_factory.mktemp("whole")
    settings = {"every.keep_best": BEST}
    assert main(["train", *command(out, "--export", str(out / "export"), **settings)]) == 0
    return out


def losses(run: Path) -> dict[int, dict[str, float]]:
    """{step: losses, learning rate and gradient norm} of a run's training steps."""
    lines = [line for line in read_scalars(run) if "lr" in line]
    return {int(line["step"]): {k: v for k, v in line.items() if not k.startswith("throughput")} for line in lines}


def validated(run: Path) -> list[float]:
    return [line["step"] for line in read_scalars(run) if "lr" not in line]


def events(file: Path) -> list:
    """What TensorBoard reads."""
    from tensorboardX.proto.event_pb2 import Event

    raw, position, events = file.read_bytes(), 0, []
    while position < len(raw):
        (length,) = struct.unpack_from("<Q", raw, position)
        events.append(Event.FromString(raw[position + 12 : position + 12 + length]))
        position += 16 + length
    return events


def run_process(arguments: list[str], **options: object) -> subprocess.Popen:
    environment = quick_environment(4 if "port" in options else None)
    process = [sys.executable, str(PROCESS), json.dumps(options), *arguments]
    return subprocess.Popen(process, env=environment, stderr=subprocess.PIPE, text=True)


def kept(run: Path) -> list[int]:
    return sorted(int(folder.name) for folder in (run / "checkpoints").iterdir())


def copy_until(run: Path, out: Path, step: int) -> Path:
    """A copy of a run as it was when the checkpoint of a step was the last."""
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("export"))
    for folder in (out / "checkpoints").iterdir():
        if int(folder.name) > step:
            shutil.rmtree(folder)
    return out


def assert_close(run: Path, reference: Path) -> None:
    found, expected = losses(run), losses(reference)
    assert found.keys() == expected.keys()
    for step, values in expected.items():
        assert found[step].keys() == values.keys()
        for name, value in values.items():
            assert found[step][name] == pytest.approx(value, rel=1e-5, abs=1e-7), (step, name)


# --- a whole run


def test_a_run_logs_what_the_reference_logs(whole):
    steps = losses(whole)
    assert list(steps) == list(range(1, STEPS + 1))
    of = {
        name: [step for step, values in steps.items() if f"{name}/training_loss_hard" in values]
        for name in ("aya", "imdb")
    }
    assert (len(of["aya"]), len(of["imdb"])) == (7, 4)
    for name, task in (("aya", "retrieval"), ("imdb", "classification")):
        kinds = ("hard", "in_batch") if task == "retrieval" else ("hard",)
        for step in of[name]:
            means = {f"{name}/training_loss_{kind}" for kind in kinds}
            averages = {f"Avg/{task}/training_loss_{kind}" for kind in kinds}
            assert steps[step].keys() == {"step", "lr", "grad_norm", *means, *averages}
    assert steps[1]["lr"] == 0.0
    assert steps[4]["lr"] == pytest.approx(1e-3)
    assert steps[STEPS]["lr"] < steps[STEPS - 1]["lr"] < 1e-3
    first, *_, last = (steps[step]["aya/training_loss_hard"] for step in of["aya"])
    assert last < first

    throughput = read_scalars(whole)[-2]
    assert throughput["throughput/examples_per_second"] > 0
    assert 0 <= throughput["throughput/padding_share"] < 1
    assert "throughput/mfu_estimate" not in throughput  # nobody knows a CPU's peak


def test_a_run_validates_every_dataset(whole, data):
    assert validated(whole) == [5, 10, STEPS]
    lines = [line for line in read_scalars(whole) if "lr" not in line]
    names = {"aya": ("accuracy", "loss_hard", "loss_in_batch"), "imdb": ("accuracy", "loss_hard")}
    tasks = {"aya": "Avg/retrieval", "imdb": "Avg/classification"}
    expected = {
        f"{home}/valid_{kind}" for name, kinds in names.items() for kind in kinds for home in (name, tasks[name])
    }
    for line in lines:
        assert line.keys() == {"step", *expected}
        assert 0 <= line["aya/valid_accuracy"] <= 1
    assert set(scalar_names(Settings.read(data).datasets)) == expected


def test_tensorboard_has_the_same_scalars(whole):
    (file,) = (whole / "tensorboard").iterdir()
    found = {(event.step, value.tag): value.simple_value for event in events(file) for value in event.summary.value}
    written = {(line["step"], k): v for line in read_scalars(whole) for k, v in line.items() if k != "step"}
    assert found.keys() == written.keys()
    for key, value in written.items():
        assert found[key] == pytest.approx(value, rel=1e-6)


def test_checkpoints_are_kept_and_exported(whole, tiny_release, capsys):
    """Among them that before a validation, of step 10, and the best, of step 5."""
    assert kept(whole) == [5, 9, 10, STEPS]
    trained = load_params(open_checkpoint(whole / "checkpoints" / str(STEPS)), TINY)
    exported = f2llm_jax.load(whole / "export")
    jax.tree.map(np.testing.assert_array_equal, trained, exported.params)
    before = f2llm_jax.load(tiny_release)
    assert exported.prompts == before.prompts
    assert np.abs(exported.encode("a quick fox") - before.encode("a quick fox")).max() > 1e-3
    config = transformers.AutoConfig.from_pretrained(whole / "export")
    assert (config.is_matryoshka, config.matryoshka_dimensions) == (True, [32, 96])
    assert main(["info", str(whole / "export")]) == 0
    assert "  32 96\n" in capsys.readouterr().out


def test_an_export_has_the_query_prompt_of_its_recipe(tiny, copied_release, tmp_path):
    """Without one, as in stage 1, the prompts that it began with: of a language model there are none."""
    (copied_release / "config_sentence_transformers.json").unlink()
    release = read_release(copied_release)
    for name, prompt in (("stage1_0_6b", ""), ("stage2_0_6b", QUERY_PROMPT)):
        config = override(load_recipe(name), ["loss.mrl_dims=8"])
        export_run(tiny.params, config, release, tmp_path / name)
        assert read_release(tmp_path / name).prompts == {"query": prompt, "document": ""}


def test_average_is_the_mean_of_the_last_checkpoints(whole, tmp_path, capsys, caplog, monkeypatch, hub_of_settings):
    """The run is taken to be one of a hub model, of which no weights are downloaded."""
    read = Checkpoints.read_config
    monkeypatch.setattr(Checkpoints, "read_config", lambda *args: dataclasses.replace(read(*args), model="owner/name"))
    monkeypatch.setenv("HOME", str(whole.parent))
    assert main(["average", f"~/{whole.name}", str(tmp_path / "mean"), "--last", "2"]) == 0
    assert f"steps 10, {STEPS}" in capsys.readouterr().out
    assert hub_of_settings == [("owner/name", None)] and not caplog.records
    parts = [load_params(open_checkpoint(whole / "checkpoints" / str(step)), TINY) for step in (10, STEPS)]
    mean = f2llm_jax.load(tmp_path / "mean").params
    jax.tree.map(lambda x, a, b: np.testing.assert_allclose(x, (a + b) / 2, rtol=1e-6, atol=1e-9), mean, *parts)
    assert main(["average", str(whole), str(tmp_path / "more"), "--last", "4"]) == 2
    assert "holds 3 checkpoints besides the best, not 4" in capsys.readouterr().err
    assert main(["average", str(tmp_path), str(tmp_path / "more")]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_a_checkpoint_of_ones_choice_is_exported(whole, tmp_path, capsys):
    def exported(*which: str) -> tuple[dict, str]:
        out = tmp_path / "-".join(which)
        assert main(["average", str(whole), str(out), *which]) == 0
        return load_params(open_checkpoint(out), TINY), capsys.readouterr().out.removeprefix(f"{out}: ")

    params = {step: load_params(open_checkpoint(whole / "checkpoints" / str(step)), TINY) for step in (5, 9, 10)}
    found, said = exported("--best")
    assert said == "step 5\n"
    jax.tree.map(np.testing.assert_array_equal, found, params[5])
    found, said = exported("--steps", "10,9")
    assert said == "the mean of steps 9, 10\n"
    assert_means = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9)
    jax.tree.map(lambda x, a, b: assert_means(x, (a + b) / 2), found, params[9], params[10])


def test_what_is_no_checkpoint_is_not_exported(whole, tmp_path, capsys, monkeypatch):
    def refused(message: str, *arguments: object) -> None:
        assert main([*map(str, arguments)]) == 2
        assert message in capsys.readouterr().err

    average = ("average", whole, tmp_path / "out")
    held = f"{whole / 'checkpoints'} has no checkpoint of step"
    refused(f"{held} 6, but of steps 5, 9, 10, 11\n", *average, "--steps", "6,9")
    with pytest.raises(SystemExit):
        refused("", *average, "--steps", "9,x")
    assert "argument --steps: takes steps like 1000,1500, not '9,x'" in capsys.readouterr().err
    (whole / "scalars.jsonl").rename(tmp_path / "scalars.jsonl")
    refused("has no checkpoint yet that was validated: --steps takes some of steps 5, 9,", *average, "--best")
    (tmp_path / "scalars.jsonl").rename(whole / "scalars.jsonl")
    for folder in (whole / "checkpoints" / "9", whole):  # where a model is expected
        refused(f"f2llm average {whole} OUT", "convert", folder, tmp_path / "out", "--to", "flax")
    refused(f"f2llm average {whole} OUT --steps 9 makes", "info", whole / "checkpoints" / "9")
    read = Checkpoints.read_config
    monkeypatch.setattr(Checkpoints, "read_config", lambda *args: without_best(read(*args)))
    refused("was trained with every.keep_best=none", *average, "--best")
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    refused("checkpoints holds no checkpoint yet\n", "average", tmp_path / "new", tmp_path / "out")


def without_best(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(config, every=dataclasses.replace(config.every, keep_best=None))


# --- interrupted


def test_a_killed_run_goes_on_bit_for_bit(command, whole, tmp_path):
    out = tmp_path / "run"
    deaths = [
        {"die_in": "f2llm_jax.train.data.DataLoader.__next__", "count": 2},  # before the first checkpoint
        {"die_in": "f2llm_jax.train.checkpoint.Checkpoints.save", "count": 2},  # while step 5 is written, not validated
    ]
    for death in deaths:
        process = run_process(command(out, "--resume", "auto"), **death)
        process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL
    assert not validated(out)
    assert main(["train", *command(out, "--resume", "auto")]) == 0
    assert losses(out) == losses(whole) and validated(out) == validated(whole)
    ends = [load_params(open_checkpoint(run / "checkpoints" / str(STEPS)), TINY) for run in (out, whole)]
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_sigterm_saves_and_stops(command, whole, tmp_path, monkeypatch, capsys):
    original = DataLoader.__next__

    def preempted(loader: DataLoader):
        item = original(loader)
        if loader.get_state()["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return item

    monkeypatch.setattr(DataLoader, "__next__", preempted)
    handler = signal.getsignal(signal.SIGTERM)
    assert main(["train", *command(tmp_path)]) == 128 + signal.SIGTERM
    assert f"stopped after step 5 of {STEPS}; --resume auto goes on from {tmp_path}" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == handler
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["3", "5"]
    monkeypatch.undo()

    assert main(["train", *command(tmp_path)]) == 2
    assert "holds a run up to step 5; --resume auto goes on from there" in capsys.readouterr().err
    assert validated(tmp_path) == []

    # Within the last validation: it is cut short, and not exported before it is done.
    validation = DataLoader.validation

    def preempted_validation(loader: DataLoader):
        if loader.get_state()["step"] < STEPS:
            return validation(loader)
        return {"all": _killing(itertools.chain.from_iterable(validation(loader).values()))}

    monkeypatch.setattr(DataLoader, "validation", preempted_validation)
    more = ("--resume", "auto", "--export", str(tmp_path / "export"))
    assert main(["train", *command(tmp_path, *more)]) == 128 + signal.SIGTERM
    assert f"stopped after step {STEPS} of {STEPS}; --resume auto goes on" in capsys.readouterr().out
    assert validated(tmp_path) == [5, 10] and not (tmp_path / "export").exists()
    monkeypatch.undo()
    assert main(["train", *command(tmp_path, *more, "--progress")]) == 0
    assert "validation: " in capsys.readouterr().err
    assert losses(tmp_path) == losses(whole)
    assert validated(tmp_path) == [5, 10, STEPS] and (tmp_path / "export").exists()


def _killing(items):
    yield next(iter(items))
    os.kill(os.getpid(), signal.SIGTERM)
    yield from items


def test_a_loss_that_is_not_finite_stops_the_run(command, tmp_path, monkeypatch, capsys):
    original = DataLoader.__next__

    def broken(loader: DataLoader):
        item = original(loader)
        if loader.get_state()["step"] == 5:
            item.batch.rows.ends_be[:] = 99  # the state of a token that is not there
        return item

    monkeypatch.setattr(DataLoader, "__next__", broken)
    assert main(["train", *command(tmp_path, **{"every.checkpoint": 1, "every.keep": 0})]) == 2
    error = capsys.readouterr().err
    assert "error: step 5, a batch of " in error and "hard is nan" in error
    assert f"the last good checkpoint is {tmp_path / 'checkpoints' / '3'}" in error
    assert max(int(name) for name in os.listdir(tmp_path / "checkpoints")) == 4


# --- elsewhere


def test_a_run_goes_on_on_another_mesh(command, whole, tmp_path, capsys, monkeypatch):
    """And keeps the best checkpoint, of before; what it does goes to standard error, once, and to a function."""
    monkeypatch.setattr(logging.root, "handlers", [logging.StreamHandler()])  # as libraries do
    out, seen = copy_until(whole, tmp_path / "run", 9), []
    monkeypatch.setattr("f2llm_jax.train.loop.validate", lambda *args, **options: {BEST: 0.5})
    heard = functools.partial(train, on_scalars=lambda step, values: seen.append({"step": step, **values}))
    monkeypatch.setattr("f2llm_jax.train.loop.train", heard)
    settings = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "every.keep": 1, "every.keep_best": BEST}
    assert main(["train", *command(out, "--resume", "auto", **settings)]) == 0
    error = capsys.readouterr().err
    assert "another config: mesh.data: 0 -> 2, mesh.fsdp: 1 -> 2, mesh.tensor: 1 -> 2, every.keep: 3 -> 1" in error
    assert_close(out, whole)
    assert kept(out) == [5, STEPS]
    begin, *_ = lines = [line.split(" ", 2)[2] for line in error.splitlines() if not line.startswith("f2llm: ")]
    assert "298,848 parameters, on data=2 fsdp=2 tensor=2 (8 x cpu, processes: 1): " in begin
    assert begin.endswith(": 11 steps of 8 queries, going on from step 9")
    assert [line.split(" ")[1] for line in lines[1:]] == [f"{step}/{STEPS}:" for step in (10, 10, 10, STEPS, STEPS)]
    assert "compiled in " in lines[1] and f"validation: {BEST} 0.5000" in lines[3]
    last = seen[-2]
    assert f"lr {last['lr']:.3g}, {last['throughput/examples_per_second']:,.1f} examples/s, " in lines[4]
    assert seen == read_scalars(out)[-4:]


def test_a_run_goes_on_with_two_processes(command, whole, tmp_path):
    out = copy_until(whole, tmp_path / "run", 9)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    settings = {"mesh.data": 2, "mesh.fsdp": 4, "every.validation": 0}
    arguments = command(out, "--resume", "auto", "--export", str(tmp_path / "export"), **settings)
    processes = [run_process(arguments, port=port, process=number) for number in range(2)]
    for process in processes:
        error = process.communicate(timeout=300)[1]
        assert process.returncode == 0, error
    assert_close(out, whole)
    ends = [f2llm_jax.load(folder).params for folder in (tmp_path / "export", whole / "export")]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *ends)


def test_a_run_that_is_done_is_exported_and_not_validated_again(command, whole, tmp_path, capsys):
    out = copy_until(whole, tmp_path / "run", STEPS)
    scalars = (out / "scalars.jsonl").read_text()
    arguments = command(out, "--quiet", "--resume", "auto", "--export", str(tmp_path / "again"), max_steps=STEPS)
    assert main(["train", *arguments]) == 0
    of_prompt, going_on = capsys.readouterr().err.splitlines()
    assert going_on.startswith("f2llm: warning: going on from step")
    assert of_prompt.startswith("f2llm: warning: the exported model will put")
    assert (out / "scalars.jsonl").read_text() == scalars
    ends = [f2llm_jax.load(folder).params for folder in (tmp_path / "again", whole / "export")]
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_what_does_not_fit_a_run_is_not_gone_on_with(command, whole, tmp_path, capsys):
    def refused(message: str, **settings: object) -> None:
        assert main(["train", *command(whole, "--resume", "auto", **settings)]) == 2
        assert message in capsys.readouterr().err.replace("\n", " ")

    small = write_release(tmp_path / "small", dataclasses.replace(TINY, hidden_size=64))
    refused("embed_tokens.weight has shape (512, 96), config.json asks for (512, 64)", model=small)
    small = write_release(tmp_path / "low", dataclasses.replace(TINY, num_hidden_layers=1))
    refused(f"model={small} is not of the size of the run", model=small)
    held = f"{whole / 'checkpoints'} holds a run up to step {STEPS}; this config ends at step"
    refused(f"{held} 10 (max_steps=10, epochs=1, data.batch_size=8, data.path=", max_steps=10)
    refused(f"{held} 6 (max_steps=0, epochs=1, data.batch_size=16, data.path=", **{"data.batch_size": 16})


# --- other ways to train


def test_rows_of_one_text_train_as_packed_ones(command, whole, tmp_path):
    """Both layouts take the same texts to the same losses and gradients."""
    assert main(["train", *command(tmp_path, **{"data.layout": "bucketed", "every.validation": 0})]) == 0
    assert_close(tmp_path, whole)


@pytest.mark.parametrize("layout", ["bucketed", "packed"])
def test_bfloat16_with_a_teacher_and_cached_gradients(command, tmp_path, layout, monkeypatch):
    planned = {name: Mock(wraps=getattr(loop, name)) for name in ("make_optimizer", "make_schedule")}
    for name, function in planned.items():
        monkeypatch.setattr(loop, name, function)
    teacher = write_release(tmp_path / "teacher", seed=1)
    settings = {
        "teacher": teacher,
        "params_dtype": "bfloat16",
        "compute.dtype": "bfloat16",
        "compute.chunk_rows": 8,
        "data.layout": layout,
        "max_steps": 1,
        "every.validation": 0,
    }
    assert main(["train", *command(tmp_path / "run", **settings)]) == 0
    # The learning rate ends where the run does.
    assert [function.call_args.args[1] for function in planned.values()] == [1, 1]
    (values,) = losses(tmp_path / "run").values()
    names = [name for name in values if name.endswith("training_loss_distill")]
    assert len(names) == 2 and all(values[name] > 0 for name in names)
    with Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps == [1]
        assert checkpoints.read_config(1).params_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data.batch_size": 12}, "data.batch_size=12 does not divide over data=8 · fsdp=1 = 8 parts of the mesh"),
        ({"mesh.data": 3}, "a mesh data=3 fsdp=1 tensor=1 takes 3 devices, not 8"),
        ({"mesh.fsdp": 0}, "only one can be 0, not data and fsdp"),
        ({"data.path": "nowhere"}, "nowhere holds no prepared data"),
        (
            {"loss.mrl_dims": "16,256"},
            "loss.mrl_dims=16,256 must be within 1..96, the hidden size of model=",
        ),
        ({"loss.mrl_dims": "0"}, ": --set loss.mrl_dims=8,16,32,64\n"),
        ({"every.keep_best": "valid_loss"}, "which gives Avg/classification/valid_loss_hard, "),
        ({"model": "nowhere"}, "nowhere is neither a folder nor a hub id"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(command, tmp_path, capsys, settings, message):
    assert main(["train", *command(tmp_path / "run", **settings)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_that_goes_on_is_left_alone(command, tmp_path, capsys, monkeypatch):
    """Another one is refused before it removes the checkpoint that is being written, or lines of scalars."""
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
    (tmp_path / "scalars.jsonl").write_text('{"step": 1, "lr": 0.0}\n')
    with take_lock(tmp_path / ".lock", tmp_path):
        before = sorted(tmp_path.rglob("*"))
        assert main(["train", *command(tmp_path, "--resume", "auto")]) == 2
        assert f"{tmp_path} is being written by another process right now" in capsys.readouterr().err
        assert sorted(tmp_path.rglob("*")) == before
        assert (tmp_path / "scalars.jsonl").read_text() == '{"step": 1, "lr": 0.0}\n'
    for _ in range(2):  # free again after a run
        with _claimed(tmp_path):
            pass
    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))))
        warned = pytest.warns(UserWarning, match="cannot be locked: No locks.*: nothing keeps a second run out of")
        with warned, _claimed(tmp_path):
            pass
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", np.logical_not)
    with pytest.raises(InputError, match="cannot be written; the first process says why"), _claimed(tmp_path):
        pass


def test_an_export_is_not_overwritten(command, tmp_path, capsys):
    assert main(["train", *command(tmp_path / "run", "--export", str(tmp_path))]) == 2
    assert f"{tmp_path} exists" in capsys.readouterr().err


def test_a_url_is_no_output(command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in (command("gs://bucket/run"), command(tmp_path / "run", "--export", "gs://bucket/run")):
        assert main(["train", *arguments]) == 2
        assert "gs://bucket/run is a URL; mount the bucket, and give a folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="s3:/bucket is a URL"):
        local_path(Path("s3://bucket"))
    assert [str(local_path(path)) for path in ("a:b/c", "C:/runs", "/gs:/run")] == ["a:b/c", "C:/runs", "/gs:/run"]
    assert local_path("~/run") == Path.home() / "run"


def test_data_for_another_tokenizer_is_refused(command, data, tiny_release, copied_release, tmp_path, capsys):
    def refused(message: str, **settings: object) -> None:
        assert main(["train", *command(tmp_path / "run", **settings)]) == 2
        assert message in capsys.readouterr().err

    file, prepared = copied_release / "tokenizer.json", Settings.read(data)
    edit_json(copied_release / "tokenizer_config.json", chat_template="{{ messages }}")
    check_tokenizer(copied_release, prepared, data)
    backend = json.loads(file.read_text())
    ids = backend["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    file.write_text(json.dumps(backend))
    refused("was prepared for models with other tokens than", model=copied_release)
    refused("have different tokenizers", teacher=copied_release)
    edit_json(copied_release / "tokenizer_config.json", eos_token="<|endoftext|>")
    set_appended_token(copied_release, "<|endoftext|>")
    refused("was prepared for models whose EOS is token 1; that of", model=copied_release)


# --- parts


def test_one_free_axis_takes_all_devices():
    shape = dict(make_train_mesh(MeshConfig(data=2, fsdp=0, tensor=2)).shape)
    assert shape == {"data": 2, "fsdp": 2, "tensor": 2}
    with pytest.raises(InputError, match="takes 6 devices, not 8"):
        make_train_mesh(MeshConfig(data=3, fsdp=0))


def test_work_counts_tokens_and_operations():
    from f2llm_jax.train.batch import TrainBatch

    def texts(lengths: list[int]) -> Batch:
        return Batch(np.zeros((len(lengths), 8), np.int32), np.array(lengths, np.int32))

    work = Work.of(TrainBatch(texts([3, 4]), texts([5, 6]), texts([1, 1, 2, 2]), np.arange(2)))
    assert work == Work(examples=2, tokens=24, computed_tokens=64, squares=96)
    # Of a single text, test_plan.py compares the count with what a compiled program does.
    flops = [forward_flops(TINY, texts=1, length=length).total for length in (3, 4, 5, 6, 1, 1, 2, 2)]
    assert work.forward_flops(TINY) == sum(flops)


def test_averages_are_over_datasets():
    results = {
        ("retrieval", "a"): [{"x": 1.0}, {"x": 3.0}],
        ("retrieval", "b"): [{"x": 8.0}],
        ("clustering", "c"): [{"x": 5.0}],
    }
    averages = {"Avg/retrieval/valid_x": 5.0, "Avg/clustering/valid_x": 5.0}
    assert by_dataset("valid", results) == {"a/valid_x": 2.0, "b/valid_x": 8.0, "c/valid_x": 5.0, **averages}


def test_the_best_step_is_the_highest_or_of_the_lowest_loss(tmp_path):
    values = {2: 0.5, 4: 0.9, 5: 0.9, 6: float("nan"), 8: 0.2}
    with Scalars(tmp_path, 0) as scalars:
        for step, value in values.items():
            scalars.write(step, {"lr": 1.0, "grad_norm": 0.0})
            scalars.write(step, {"accuracy": value, "loss": value, "glossary/valid_accuracy": value})
        assert scalars.best_step("accuracy", range(9)) == 4
    assert best_step(tmp_path, "loss", range(9)) == 8
    assert best_step(tmp_path, "glossary/valid_accuracy", range(9)) == 4  # a loss only in the dataset's name
    assert best_step(tmp_path, "loss", [2, 5, 6]) == 2
    assert best_step(tmp_path, "loss", [6, 7]) is None


def test_a_loss_that_a_batch_has_not_is_no_part_of_an_average():
    meter = Meter(TINY, None, distilled=False)
    for dataset, task, has_negatives in (
        ("a", "retrieval", True),
        ("b", "retrieval", False),
        ("c", "clustering", True),
    ):
        hard = 2.0 if has_negatives else 0.0
        metrics = {"loss": 5.0, "hard": hard, "in_batch": 3.0, "distill": 0.0, "grad_norm": 1.0}
        meter.add(Step(1, dataset, task, has_negatives, Work(1, 2, 4, 4), {}), metrics)
    assert meter.losses() == {"loss": 5.0, "hard": 2.0, "in_batch": 3.0}
    found = {name: value for name, value in meter.scalars().items() if "_loss_" in name}
    hard = ("a", "Avg/retrieval", "c", "Avg/clustering")
    in_batch = ("a", "b", "Avg/retrieval")
    expected = {f"{name}/training_loss_hard": 2.0 for name in hard}
    assert found == {**expected, **{f"{name}/training_loss_in_batch": 3.0 for name in in_batch}}
    rows = np.zeros((2, 1))
    for batch in (TrainBatch(rows, rows, None, rows), PackedTrainBatch(rows, rows, rows, None, rows)):
        assert not batch.has_negatives
    for batch in (TrainBatch(rows, rows, rows, rows), PackedTrainBatch(rows, rows, rows, rows, rows)):
        assert batch.has_negatives


def test_scalars_of_steps_to_be_done_again_are_taken_back(tmp_path):
    with Scalars(tmp_path, 0) as scalars:
        for step in (1, 2, 3):
            scalars.write(step, {"x": step / 3})
    with (tmp_path / "scalars.jsonl").open("a") as file:
        file.write('\0\0\0\n{"step": 4, "x"')
    with pytest.warns(UserWarning, match="scalars.jsonl: line 4 is damaged"), Scalars(tmp_path, 2) as scalars:
        scalars.write(3, {"x": 7.0})
    assert read_scalars(tmp_path) == [{"step": 1, "x": 1 / 3}, {"step": 2, "x": 2 / 3}, {"step": 3, "x": 7.0}]
    with Scalars(tmp_path, 0):  # killed before its first checkpoint
        pass
    assert read_scalars(tmp_path) == []
    logged = [event for file in (tmp_path / "tensorboard").iterdir() for event in events(file)]
    # From there on TensorBoard leaves out what was written before.
    assert 1 in [event.step for event in logged if event.HasField("session_log")]
