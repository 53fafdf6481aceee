"""Distillation: a teacher in the step, and its states computed beforehand."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from raw_data import rows, write_raw
from releases import TINY, edit_json, write_release
from transformers import Qwen3Model

import f2llm_jax
from f2llm_jax.cli import main
from f2llm_jax.convert.load import load_params, open_checkpoint
from f2llm_jax.embedding import Batch
from f2llm_jax.errors import InputError, ReleaseError
from f2llm_jax.losses import distillation_loss
from f2llm_jax.train import teacher as teacher_module
from f2llm_jax.train.batch import TrainBatch
from f2llm_jax.train.config import load_recipe, override
from f2llm_jax.train.data import TrainBatches, TrainingData
from f2llm_jax.train.prepare import prepare
from f2llm_jax.train.records import Records, data_digest, lengths_file
from f2llm_jax.train.scalars import read_scalars
from f2llm_jax.train.source import open_loader, with_query_prompt
from f2llm_jax.train.step import ComputeConfig, LossConfig, States, loss_terms, teacher_states
from f2llm_jax.train.teacher import TeacherStore, find_teacher, hub_commit, open_store, teach

MAX_LENGTH = 8
TEACHER = dataclasses.replace(TINY, hidden_size=128, num_hidden_layers=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_release) -> Path:
    """Three datasets, one of them without negatives; most texts are longer than MAX_LENGTH."""
    home = tmp_path_factory.mktemp("data")
    tables = {
        "aya": rows(24, negatives=2, prefix=""),
        "fiqa": rows(17, negatives=0, seed=1, prefix=""),
        "imdb": rows(16, negatives=1, seed=2, prefix=""),
    }
    prepare(write_raw(home / "raw", tables), tiny_release, home / "data", workers=1, max_length=32)
    return home / "data"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return write_release(tmp_path_factory.mktemp("teacher") / "r", TEACHER, seed=1)


@pytest.fixture(scope="module")
def states(tmp_path_factory, data, teacher) -> Path:
    out = tmp_path_factory.mktemp("states") / "float32"
    teach(data, teacher, out, dtype="float32", max_length=MAX_LENGTH)
    return out


@pytest.fixture(scope="module")
def command(data, tiny_release, teacher):
    """Arguments of f2llm train for a run in a folder."""

    def arguments(out: Path, *more: str, **settings: object) -> list[str]:
        values = {
            "model": tiny_release,
            "teacher": teacher,
            "query_prompt": "none",  # with any there would be a warning: the data was prepared without
            "data.path": data,
            "data.batch_size": 8,
            "data.max_length": MAX_LENGTH,
            "loss.mrl_dims": "32",
            "optim.learning_rate": 1e-4,
            "optim.warmup_steps": 2,
            "compute.dtype": "float32",
            "every.log": 1,
            "every.validation": 0,
            "every.checkpoint": 0,
            **settings,
        }
        return ["train", "tiny", "--out", str(out), *(f"--set={key}={value}" for key, value in values.items()), *more]

    return arguments


# --- the same training, whichever way the states come


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-3)])
def test_cached_and_in_step_teachers_give_the_same_losses(
    tmp_path, data, tiny_release, teacher, states, dtype, tolerance
):
    if dtype == "bfloat16":
        states = tmp_path / "states"
        length = ["--max-length", str(MAX_LENGTH)]
        assert main(["teach", str(data), str(states), "--teacher", str(teacher), "--dim", "96", *length]) == 0
        assert TeacherStore(states).settings.dtype == "bfloat16"
    batches = TrainBatches(TrainingData(data, max_length=MAX_LENGTH, teacher=TeacherStore(states)), batch_size=8)
    of = {batches[step].dataset: batches[step].batch for step in range(len(batches))}
    compute = ComputeConfig(dtype=dtype)
    params, its = (
        load_params(open_checkpoint(folder), config, dtype=kind)
        for folder, config, kind in ((tiny_release, TINY, "float32"), (teacher, TEACHER, dtype))
    )

    @jax.jit
    def terms(batch, teacher_params):
        own = teacher_states(batch._replace(teacher=None), params, TINY, compute)  # of the student, the same way
        its = teacher_states(batch, teacher_params, TEACHER, compute)
        return loss_terms(own, batch, LossConfig(), in_batch=True, teacher=its)

    for dataset in ("aya", "fiqa"):  # with negatives, and without
        cached = terms(of[dataset], None)
        in_step = terms(of[dataset]._replace(teacher=None), its)
        assert float(cached["distill"]) > 1
        for name in cached:
            assert float(cached[name]) == pytest.approx(float(in_step[name]), rel=tolerance), (dataset, name)


def test_a_batch_holds_the_states_of_its_texts(data, states, teacher):
    """Against transformers, text by text, with and without negatives."""
    model = Qwen3Model.from_pretrained(teacher).eval()
    store = pickle.loads(pickle.dumps(TeacherStore(states, width=96)))
    batches = TrainBatches(TrainingData(data, max_length=MAX_LENGTH, teacher=store), batch_size=4)
    seen = set()
    for step in range(len(batches)):
        item = batches[step]
        if item.dataset in seen:
            continue
        seen.add(item.dataset)
        found = item.batch.teacher
        assert (item.batch.negatives is None) == (found.negatives_md is None) == (item.dataset == "fiqa")
        pairs = [(item.batch.query, found.query_bd), (item.batch.passage, found.passage_bd)]
        if item.batch.negatives is not None:
            pairs.append((item.batch.negatives, found.negatives_md))
        for texts, got in pairs:
            assert got.shape == (len(texts.tokens_bt), 96) and got.dtype == np.float32
            for tokens, length, state in zip(texts.tokens_bt, texts.lengths_b, got, strict=True):
                with torch.no_grad():
                    expected = model(torch.tensor(tokens[None, :length])).last_hidden_state[0, -1, :96].numpy()
                np.testing.assert_allclose(state, expected, rtol=1e-4, atol=1e-5)
    assert seen == {"aya", "fiqa", "imdb"}
    assert TrainBatches(TrainingData(data, max_length=32), batch_size=4)[0].batch.teacher is None


def test_states_are_those_of_any_mesh(tmp_path, data, states, teacher):
    arguments = ["--dtype", "float32", "--max-length", str(MAX_LENGTH), "--mesh", "data=2,fsdp=2,tensor=2"]
    assert main(["teach", str(data), str(tmp_path / "out"), "--teacher", str(teacher), *arguments]) == 0
    one, eight = TeacherStore(states), TeacherStore(tmp_path / "out")
    assert one.settings == eight.settings
    for kind, count in (("documents", one.settings.documents), ("queries", one.settings.queries)):
        found = [store.read(kind, np.arange(count)) for store in (one, eight)]
        np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-5)


def test_a_killed_teacher_goes_on(tmp_path, data, teacher, monkeypatch):
    monkeypatch.setattr(teacher_module, "_FILE_TEXTS", 40)
    arguments = {"dtype": "float32", "max_length": MAX_LENGTH, "dim": 16}
    whole = teach(data, teacher, tmp_path / "whole", **arguments)
    count = whole.documents + whole.queries
    assert whole.documents == len(Records(data, "documents", "train")) and len(list(tmp_path.glob("whole/d*"))) > 2
    computed = []
    original = teacher_module._Compute.states

    def killed(self, chunks, size, *rest):
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(size)
        return original(self, chunks, size, *rest)

    monkeypatch.setattr(teacher_module._Compute, "states", killed)
    with pytest.raises(KeyboardInterrupt):
        teach(data, teacher, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.incomplete").exists()
    with pytest.raises(InputError, match="unfinished work with another dim"):
        teach(data, teacher, tmp_path / "out", **{**arguments, "dim": 17})
    after = []
    monkeypatch.setattr(
        teacher_module._Compute,
        "states",
        lambda self, c, size, *rest: after.append(size) or original(self, c, size, *rest),
    )
    teach(data, teacher, tmp_path / "out", **arguments)
    assert sum(computed) + sum(after) == count
    names = [sorted(file.name for file in (tmp_path / run).iterdir()) for run in ("whole", "out")]
    assert names[0] == names[1] and "teacher.json" in names[0]
    stores = [TeacherStore(tmp_path / run) for run in ("whole", "out")]
    for kind, size in (("documents", whole.documents), ("queries", whole.queries)):
        np.testing.assert_array_equal(*(store.read(kind, np.arange(size)) for store in stores))
    assert [path.name for path in tmp_path.iterdir() if "incomplete" in path.name] == []


# --- what is refused


def labelled(count: int, *, swapped: bool) -> list[dict[str, str]]:
    """Rows for classification; where labels are swapped, all texts have the same lengths."""
    labels = ("label 1", "label 2")
    pairs = (labels[:: 1 if (row % 2 == 0) != swapped else -1] for row in range(count))
    return [{"query": f"quick {row}", "passage": own, "negative_1": other} for row, (own, other) in enumerate(pairs)]


def test_states_that_do_not_belong_are_refused(tmp_path, command, data, states, teacher, tiny_release, capsys):
    def refused(message: str, **settings: object) -> None:
        assert main(command(tmp_path / "run", **{"teacher_states": states, **settings})) == 2
        said = capsys.readouterr().err.replace("\n", " ")
        assert message in said and said.count("warning: ") == ("data.max_length" in settings)
        assert not (tmp_path / "run").exists()

    other = write_release(tmp_path / "other", TEACHER, seed=2)
    refused(f"holds states of {teacher}, whose weights are not those of teacher={other}", teacher=other)
    refused(f"holds states of texts cut to {MAX_LENGTH} tokens, training cuts them to 32", **{"data.max_length": 99})
    refused("data.max_length=98, but the data was prepared with texts cut to 32 tokens", **{"data.max_length": 98})
    with pytest.warns(UserWarning, match="max_length=99, but"), pytest.raises(InputError, match="dim must be within"):
        teach(data, teacher, tmp_path / "wide", max_length=99, dim=999)
    raw = write_raw(tmp_path / "raw", {"aya": rows(30, negatives=1, seed=5)})
    prepare(raw, tiny_release, tmp_path / "data", workers=1, max_length=32)
    refused("holds states of other data than", **{"data.path": tmp_path / "data"})
    # Also of data with the very same lengths.
    for name, swapped in (("mistaken", True), ("mended", False)):
        tables = {"imdb": labelled(16, swapped=swapped)}
        prepare(write_raw(tmp_path / "raw", tables), tiny_release, tmp_path / name, workers=1)
    both = [np.load(lengths_file(tmp_path / name, "train")) for name in ("mistaken", "mended")]
    np.testing.assert_array_equal(*both)
    teach(tmp_path / "mistaken", teacher, tmp_path / "mistaken-states", max_length=MAX_LENGTH)
    of_mistaken = {"teacher_states": tmp_path / "mistaken-states"}
    refused("mistaken-states holds states of other data than", **of_mistaken, **{"data.path": tmp_path / "mended"})
    refused("holds no teacher's states (no teacher.json); make them with f2llm teach", teacher_states=tmp_path)
    narrow = tmp_path / "narrow"
    teach(data, teacher, narrow, dim=64, max_length=MAX_LENGTH)
    refused("a student of 96 dimensions cannot be distilled from 64", teacher_states=narrow)
    edit_json(narrow / "teacher.json", dim=None)
    refused("teacher.json is damaged: TypeError: ", teacher_states=narrow)


def test_the_same_weights_are_the_same_teacher(tmp_path, data, states, teacher):
    """In another format, and under another name; and without a teacher the states are taken as they are."""
    assert main(["convert", str(teacher), str(tmp_path / "flax"), "--to", "flax"]) == 0
    for name in (str(tmp_path / "flax"), None):
        store = open_store(states, data=data, max_length=MAX_LENGTH, width=96, teacher=name)
        assert store.settings.teacher == str(teacher) and store.settings.commit is None


def test_the_home_folder_is_a_tilde(data, states, tiny_release, tmp_path, monkeypatch, capsys):
    """No shell replaces it within --set data.path=~/data, nor in a recipe."""
    monkeypatch.setenv("HOME", str(data.parent))
    (data.parent / "states").symlink_to(states)
    settings = [f"model={tiny_release}", "data.path=~/data", "teacher_states=~/states"]
    config = override(load_recipe("tiny"), [*settings, "data.batch_size=8", f"data.max_length={MAX_LENGTH}"])
    with contextlib.closing(open_loader(config)) as loader:
        assert loader.get_state() == {"step": 0, "data": data_digest(data)}
    with pytest.warns(UserWarning, match="in ~/data begin with an instruction"):
        assert with_query_prompt(config, loader.settings) == config
    assert main(["teach", "~/nowhere", str(tmp_path / "out"), "--teacher", str(tiny_release)]) == 2
    assert f"{data.parent / 'nowhere'} holds no prepared data" in capsys.readouterr().err


def test_no_weights_of_a_hub_teacher_are_downloaded_to_compare_it(tmp_path, data, states, hub_of_settings):
    """Its commit is known, by the name of the folder that huggingface_hub downloads to."""
    commit = hub_commit("owner/name", Path("snapshots/1f7c"))
    assert commit == "1f7c" and hub_commit(tmp_path, tmp_path) is None
    copied = Path(shutil.copytree(states, tmp_path / "states"))
    edit_json(copied / "teacher.json", commit=find_teacher("owner/name", "", weights=False).name)
    options = {"data": data, "max_length": MAX_LENGTH, "width": 96, "teacher": "owner/name"}
    assert open_store(copied, **options).settings.dim == 128
    edit_json(copied / "teacher.json", commit="another")
    with pytest.raises(ReleaseError, match=r"^teacher=owner/name: downloading owner/name failed: AssertionError"):
        open_store(copied, **options)


def test_a_teacher_out_of_reach_is_an_error_that_names_the_setting(tmp_path, command, states, capsys):
    for folder, without in (("none", "trains without a teacher"), (states, "takes the states as they are")):
        assert main(command(tmp_path / "run", teacher="nowhere", teacher_states=folder)) == 2
        error = "teacher=nowhere: nowhere is neither a folder nor a hub id of the form owner/name; teacher=none "
        assert error + without in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_does_not_fit_is_refused(tmp_path, command, teacher, capsys):
    narrow = write_release(tmp_path / "narrow", dataclasses.replace(TINY, hidden_size=64))
    assert main(command(tmp_path / "run", teacher=narrow)) == 2
    assert "a student of 96 dimensions cannot be distilled from 64" in capsys.readouterr().err
    other = Path(shutil.copytree(teacher, tmp_path / "other"))
    edit_json(other / "tokenizer_config.json", eos_token="<|endoftext|>")
    settings = json.loads((other / "tokenizer.json").read_text())
    settings["post_processor"] = None
    (other / "tokenizer.json").write_text(json.dumps(settings))
    assert main(command(tmp_path / "run", teacher=other)) == 2
    assert "they have different tokenizers" in capsys.readouterr().err
    assert main(["teach", "nowhere", str(tmp_path / "out"), "--teacher", str(teacher)]) == 2
    assert "nowhere holds no prepared data" in capsys.readouterr().err


# --- the loss at every Matryoshka size


def test_matryoshka_distillation_is_an_option():
    rng = np.random.default_rng(0)
    student, its = rng.normal(size=(5, 3, 32)), rng.normal(size=(5, 3, 48))
    square = (student - its[..., :32]) ** 2
    assert distillation_loss(student, its) == pytest.approx(square.mean(), rel=1e-6)
    expected = sum(square[..., :dim].mean() / (n * (32 / dim) ** 0.5) for n, dim in ((1, 32), (2, 16), (3, 8)))
    assert distillation_loss(student, its, mrl_dims=(8, 16)) == pytest.approx(expected, rel=1e-6)

    batch = TrainBatch(*(Batch(np.zeros((5, 1)), np.ones(5)) for _ in range(3)), np.arange(5))
    states = [States(*(jnp.asarray(x[:, n]) for n in (0, 1))) for x in (student, its)]
    states = [x._replace(documents_md=jnp.concatenate([x.documents_md] * 2)) for x in states]
    found = [
        loss_terms(states[0], batch, LossConfig(mrl_dims=(8, 16), **option), in_batch=False, teacher=states[1])
        for option in ({}, {"kd_mrl": True})
    ]
    for terms, dims in zip(found, (None, (8, 16)), strict=True):
        three = [distillation_loss(student[:, n], its[:, n], mrl_dims=dims) for n in (0, 1, 1)]
        assert terms["distill"] == pytest.approx(sum(map(float, three)), rel=1e-6)


# --- from a large release to a small one that is evaluated


def test_the_commands_of_the_readme(tmp_path, monkeypatch, tiny_release):
    """As they stand there, but for the names of models, their sizes and the length of training."""
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
    commands = readme.partition("## Small models")[2].partition("```\n")[2].partition("```")[0].splitlines()
    monkeypatch.chdir(tmp_path)
    write_raw(Path("raw"), {"aya": rows(40, negatives=1)})
    beir = Path("my-data")
    (beir / "qrels").mkdir(parents=True)
    (beir / "corpus.jsonl").write_text('{"_id": "1", "text": "a fox"}\n{"_id": "2", "text": "a dog"}\n')
    (beir / "queries.jsonl").write_text('{"_id": "1", "text": "quick"}\n')
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n1\t2\t1\n")
    teacher = write_release(tmp_path / "teacher", seed=1)
    models = {"codefuse-ai/F2LLM-v2-0.6B-Preview": tiny_release, "codefuse-ai/F2LLM-v2-0.6B": teacher}
    short = [
        "data.batch_size=8",
        "loss.mrl_dims=8",
        "max_steps=2",
        "compute.dtype=float32",
        "compute.remat=none",
        f"teacher={teacher}",
    ]
    short += ["every.log=1", "optim.warmup_steps=1", "every.validation=0"]
    more = {"prepare": ["--workers", "1"], "train": [f"--set={setting}" for setting in short]}
    for line in commands:
        program, name, *arguments = line.replace("--to 80M", "--hidden 48 --mlp 80 --layers 2").split()
        assert program == "f2llm"
        arguments = [str(models.get(argument, argument)) for argument in arguments]
        arguments = ["48" if argument == "320" else argument for argument in arguments]
        arguments = [argument.replace(",64,", ",32,") for argument in arguments]
        assert main([name, *arguments, *more.get(name, [])]) == 0, line
    assert [line.split()[1] for line in commands] == ["prepare", "prune", "teach", "train", "evaluate", "convert"]
    first, last = read_scalars(Path("runs/80m"))
    assert first["aya/training_loss_distill"] > 0 and 0 == first["lr"] < last["lr"] <= 4e-5
    sizes = json.loads(Path("pruned-80m/pruning.json").read_text())["to"]
    models = [f2llm_jax.load(name) for name in ("pruned-80m", "80m", "80m-flax")]
    assert [model.config.hidden_size for model in models] == [sizes["hidden_size"]] * 3 == [48] * 3
    before, trained, converted = (model.encode(["a quick fox"]) for model in models)
    assert np.abs(before - trained).max() > 0
    np.testing.assert_array_equal(trained, converted)
    scores = json.loads(Path("results/retrieval.json").read_text())["rows"]
    assert [row["dim"] for row in scores] == [8, 32, 48]
