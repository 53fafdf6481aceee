"""Recipes, and changes to them from the command line."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from f2llm_jax.cli import main
from f2llm_jax.configs.models import MODELS
from f2llm_jax.errors import InputError
from f2llm_jax.train.config import (
    DataConfig,
    TrainConfig,
    check_values,
    differences,
    from_dict,
    load_recipe,
    override,
    recipe_names,
    to_dict,
    values,
)
from f2llm_jax.train.optimizer import OptimizerConfig
from f2llm_jax.train.step import LossConfig

BASE = TrainConfig(model="m")

# The published table: learning rate, epochs, and the size distilled from.
TABLE = {
    "80M": (4e-5, 4, "0.6B"),
    "160M": (3e-5, 3, "0.6B"),
    "330M": (2e-5, 3, "0.6B"),
    "0.6B": (1e-5, 2, "1.7B"),
    "1.7B": (9e-6, 2, "4B"),
    "4B": (7e-6, 2, None),
    "8B": (6e-6, 2, None),
    "14B": (5e-6, 2, None),
}


def recipe(stage: int, size: str) -> TrainConfig:
    return load_recipe(f"configs/stage{stage}_{size.lower().replace('.', '_')}.py")


def test_there_is_a_recipe_for_every_size_and_stage():
    large = [size for size in MODELS if not size.endswith("M")]
    assert len(recipe_names()) == len(MODELS) + len(large) + 1
    for size in large:
        assert recipe(1, size).teacher is None
        assert recipe(1, size).query_prompt == ""  # it trains without instructions
        assert recipe(1, size).model == f"Qwen/Qwen3-{size}"
        assert recipe(2, size).model == f"codefuse-ai/F2LLM-v2-{size}-Preview"
    for size in set(MODELS) - set(large):
        assert recipe(2, size).model == f"codefuse-ai/F2LLM-v2-0.6B-Preview-Pruned-{size}"


@pytest.mark.parametrize("size", TABLE)
def test_recipes_are_the_published_ones(size):
    learning_rate, epochs, teacher = TABLE[size]
    config = recipe(2, size)
    assert (config.optim.learning_rate, config.epochs) == (learning_rate, epochs)
    assert config.query_prompt.startswith("Instruct: Given a question, ") and config.query_prompt.endswith("\nQuery: ")
    assert config.teacher == (teacher and f"codefuse-ai/F2LLM-v2-{teacher}")
    optim = {"min_learning_rate": 1e-7, "warmup_steps": 500, "b1": 0.9, "b2": 0.98, "weight_decay": 0.01}
    assert {name: getattr(config.optim, name) for name in optim} == optim
    assert (config.optim.clip_norm, config.data.batch_size, config.data.max_length) == (1.0, 512, 1024)
    assert config.loss.temperature == 0.05
    assert config.loss.mask_duplicates and not config.loss.stop_passage_gradient
    assert (config.compute.dtype, config.params_dtype) == ("bfloat16", "float32")
    hidden = MODELS[size].hidden_size
    assert config.loss.mrl_dims == tuple(dim for dim in (2**n for n in range(3, 14)) if dim < hidden)


@pytest.mark.parametrize(
    ("setting", "key", "value"),
    [
        ("optim.learning_rate=1e-5", "optim.learning_rate", 1e-5),
        ("data.batch_size=64", "data.batch_size", 64),
        ("loss.mrl_dims=8, 16,32", "loss.mrl_dims", (8, 16, 32)),
        ("loss.mrl_dims=", "loss.mrl_dims", ()),
        ("loss.mask_duplicates=false", "loss.mask_duplicates", False),
        ("teacher=a=b", "teacher", "a=b"),
        ("teacher=none", "teacher", None),
        ("query_prompt=", "query_prompt", ""),
        ("query_prompt=none", "query_prompt", None),
    ],
)
def test_values_are_parsed_by_type(setting, key, value):
    start = dataclasses.replace(BASE, teacher="t", query_prompt="q")
    changed = override(start, [setting])
    assert values(changed) == {**values(start), key: value}
    assert type(values(changed)[key]) is type(value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optim.lerning_rate=1", "no setting 'optim.lerning_rate'; nearest: optim.learning_rate"),
        ("learning_rate=1", "nearest: .*optim.learning_rate"),
        ("batchsize=1", "nearest: data.batch_size"),
        ("optim=1", "optim is a group of optim.learning_rate"),
        ("epochs=1.5", "epochs takes a int, not '1.5'"),
        ("loss.mrl_dims=(8,16)", r"values separated by commas, such as 8,16, not '\(8,16\)'"),
        ("loss.mask_duplicates=1", "true or false, not '1'"),
        ("epochs", "KEY=VALUE, not 'epochs'"),
        ("params_dtype=bf16", "params_dtype is one of float32, bfloat16, not 'bf16'"),
        ("compute.dtype=float16", "compute.dtype is one of float32, bfloat16, not 'float16'"),
        ("compute.remat=foo", "compute.remat is one of none, dots, full, not 'foo'"),
        (
            "compute.kernel=foo",
            "compute.kernel is one of auto, blocked, cudnn, ragged, reference, splash, not 'foo'",
        ),
        ("data.max_length=0", "data.max_length must be at least 1, not 0"),
        ("epochs=0", "epochs must be at least 1, not 0"),
        ("max_steps=-1", "max_steps must be at least 0, not -1"),
        ("seed=-1", "seed must be at least 0, not -1"),
        ("optim.clip_norm=0", "optim.clip_norm must be above 0, not 0.0"),
        ("loss.temperature=-0.05", "loss.temperature must be above 0, not -0.05"),
        ("optim.learning_rate=-1e-5", "optim.learning_rate must be at least 0, not -1e-05"),
        ("optim.weight_decay=nan", "optim.weight_decay must be at least 0, not nan"),
        ("optim.b2=1", "optim.b2 must be at least 0 and below 1, not 1.0"),
    ],
)
def test_what_does_not_fit_is_refused(setting, message):
    with pytest.raises(InputError, match=message):
        override(BASE, [setting])


@pytest.mark.parametrize("interval", ["validation", "checkpoint"])
def test_the_best_checkpoint_needs_validation(interval):
    best = "every.keep_best=Avg/retrieval/valid_accuracy"
    with pytest.raises(InputError, match=f"{best} compares .* neither every.validation nor every.checkpoint can be 0"):
        override(BASE, [best, f"every.{interval}=0"])


def test_a_config_goes_through_json():
    config = override(recipe(2, "80M"), ["mesh.fsdp=4", "loss.mrl_dims=8,16"])
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    with pytest.raises(InputError, match="no setting 'modle'; nearest: model"):
        from_dict({"modle": "m"})
    assert differences(BASE, override(BASE, ["epochs=7", "mesh.tensor=2"])) == ["epochs: 2 -> 7", "mesh.tensor: 1 -> 2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": Path("m")}, r"model takes a str, not PosixPath\('m'\)"),
        ({"teacher": Path("m")}, r"teacher takes a str \| None, not PosixPath"),
        ({"data": DataConfig(path=Path("d"))}, "data.path takes a str, not PosixPath"),
        ({"loss": LossConfig(mrl_dims=[8, 16])}, r"loss.mrl_dims takes a tuple\[int, ...\], not \[8, 16\]"),
        ({"loss": LossConfig(mrl_dims=(8.0,))}, r"loss.mrl_dims takes a tuple\[int, ...\], not \(8.0,\)"),
        ({"max_steps": 2.5}, "max_steps takes a int, not 2.5"),
        ({"optim": OptimizerConfig(learning_rate=np.float32(1))}, "optim.learning_rate takes a float, not np.float32"),
    ],
)
def test_values_that_a_checkpoint_would_not_keep_are_refused(change, message):
    check_values(dataclasses.replace(BASE, optim=OptimizerConfig(learning_rate=1)))
    with pytest.raises(InputError, match=message):
        check_values(dataclasses.replace(BASE, **change))


def test_recipes_of_ones_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from f2llm_jax.train.config import TrainConfig\n\nget_config = lambda: TrainConfig('mine')\n")
    assert load_recipe(str(file)).model == "mine"
    file.write_text("config = 1\n")
    with pytest.raises(InputError, match=r"no function get_config\(\)"):
        load_recipe(str(file))
    with pytest.raises(InputError, match=r"no recipe 'stage2_80b', .*nearest: stage2_8b, stage2_80m"):
        load_recipe("stage2_80b")
    for name in ("experiments/stage2_80m.py", "my/stage2_80m.yaml", "stage2_80m.yaml"):
        with pytest.raises(InputError, match=f"no recipe '{name}', neither a file nor .*nearest: stage2_80m"):
            load_recipe(name)


def test_the_command_lists_recipes_and_settings(capsys):
    assert main(["train", "--list"]) == 0
    assert capsys.readouterr().out.split() == recipe_names()
    assert main(["train", "tiny", "--list", "--set", "epochs=9"]) == 0
    assert "epochs=9\n" in capsys.readouterr().out
    assert main(["train", "tiny", "--set", "epoch=9", "--out", "x"]) == 2
    assert "nearest: epochs" in capsys.readouterr().err
    assert main(["train"]) == 2
    assert main(["train", "tiny"]) == 2


def test_a_layout_that_is_none_is_refused():
    assert override(BASE, ["data.layout=bucketed"]).data.layout == "bucketed" and BASE.data.layout == "auto"
    with pytest.raises(InputError, match="layout is one of auto, bucketed, packed, not 'rows'"):
        override(BASE, ["data.layout=rows"])
