"""The configuration of a training run: one frozen tree of dataclasses, with overrides from the command line."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.util
import pkgutil
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from f2llm_jax.attention import KERNELS
from f2llm_jax.convert.load import PARAM_DTYPES
from f2llm_jax.errors import InputError
from f2llm_jax.model import REMAT_POLICIES
from f2llm_jax.train.optimizer import OptimizerConfig
from f2llm_jax.train.step import ComputeConfig, LossConfig

LAYOUTS = ("auto", "bucketed", "packed")

_CHOICES: dict[str, Iterable[str]] = {
    "params_dtype": PARAM_DTYPES,
    "data.layout": LAYOUTS,
    "compute.dtype": PARAM_DTYPES,
    "compute.remat": REMAT_POLICIES,
    "compute.kernel": ("auto", *KERNELS),
}
_LEAST = {
    **dict.fromkeys(("epochs", "data.batch_size", "data.max_length"), 1),
    **dict.fromkeys(("max_steps", "seed", "data.workers", "optim.warmup_steps", "compute.chunk_rows"), 0),
    **dict.fromkeys(("every.log", "every.validation", "every.checkpoint", "every.keep"), 0),
}
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    **dict.fromkeys(("loss.temperature", "optim.eps", "optim.clip_norm"), ("above 0", lambda value: value > 0)),
    **dict.fromkeys(
        ("loss.kd_weight", "optim.learning_rate", "optim.min_learning_rate", "optim.weight_decay"),
        ("at least 0", lambda value: value >= 0),
    ),
    **dict.fromkeys(("optim.b1", "optim.b2"), ("at least 0 and below 1", lambda value: 0 <= value < 1)),
}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The training data and its batches.

    Attributes:
        path: the folder that ``f2llm prepare`` wrote.
        batch_size: queries per global batch.
        max_length: longer texts are truncated to this many tokens, EOS included.
        workers: number of reader processes; 0 reads in the training process.
        layout: ``packed``: each row holds as many texts of the batch as fit; ``bucketed``: one text per row,
            padded to the longest query or document; ``auto`` is packed. If a batch makes fewer packed rows than the
            number of parts that the mesh divides it into, ``bucketed`` may be cheaper.
    """

    path: str = "data"
    batch_size: int = 512
    max_length: int = 1024
    workers: int = 0
    layout: str = "auto"

    @property
    def packed(self) -> bool:
        return self.layout != "bucketed"


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be 0, which stands for all devices that the others leave.

    Attributes:
        data: number of replicas.
        fsdp: number of parts that parameters and batch are sharded into.
        tensor: number of parts that heads, MLP channels and vocabulary are sharded into.
    """

    data: int = 0
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class IntervalConfig:
    """Intervals in steps; 0 for never. A run also ends with a checkpoint and, unless ``validation`` is 0, a validation.

    Attributes:
        log: between lines of scalars, which are averages over the interval.
        validation: between per-dataset validations.
        checkpoint: between checkpoints; one is also saved before each validation.
        keep: number of latest checkpoints to keep.
        keep_best: a validation scalar, such as ``Avg/retrieval/valid_accuracy``, whose best checkpoint is kept too: the
            one with the highest value or, if "loss" is in the part after the slash, the lowest; None for no such
            checkpoint.
    """

    log: int = 100
    validation: int = 5000
    checkpoint: int = 500
    keep: int = 5
    keep_best: str | None = None


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
        model: release folder or hub id to start from; the trained model inherits its tokenizer and settings.
        teacher: release folder or hub id to distil from; None for no distillation.
        teacher_states: a folder written by ``f2llm teach``, from which the teacher's states are read instead of being
            computed in every step. If ``teacher`` is given, they must be its states.
        params_dtype: dtype of the parameters and of the optimizer state; with bfloat16, training follows the reference.
        query_prompt: the query prompt of an exported release; empty for the one that the data was prepared with or, if
            there is none, the prompts of ``model``; None for no prompt.
        epochs: passes over the data.
        max_steps: the step at which training and the learning rate schedule end; 0 for all epochs.
        seed: determines the order of the data.
    """

    model: str
    teacher: str | None = None
    teacher_states: str | None = None
    params_dtype: str = "float32"
    query_prompt: str | None = ""
    epochs: int = 2
    max_steps: int = 0
    seed: int = 0
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optim: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    every: IntervalConfig = dataclasses.field(default_factory=IntervalConfig)


def check_values(config: TrainConfig) -> None:
    """Raises an InputError if a value is not allowed for its key. Configs of checkpoints are read without this."""
    found = values(config)
    for key, kind in _keys(TrainConfig).items():
        if not _is_of(found[key], kind):
            raise InputError(f"{key} takes a {kind.__name__ if isinstance(kind, type) else kind}, not {found[key]!r}")
    for key, choices in _CHOICES.items():
        if found[key] not in choices:
            raise InputError(f"{key} is one of {', '.join(choices)}, not {found[key]!r}")
    for key, least in _LEAST.items():
        if found[key] < least:
            raise InputError(f"{key} must be at least {least}, not {found[key]}")
    for key, (words, fits) in _RANGES.items():
        if not fits(found[key]):
            raise InputError(f"{key} must be {words}, not {found[key]}")
    if config.every.keep_best is not None and not (config.every.validation and config.every.checkpoint):
        raise InputError(
            f"every.keep_best={config.every.keep_best} compares checkpoints by their validation: neither "
            "every.validation nor every.checkpoint can be 0"
        )


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of a type of the config's; others do not come back as they were from a checkpoint's JSON."""
    members = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return any(_is_of(value, member) for member in members)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_of(part, members[0]) for part in value)
    return isinstance(value, int | float if kind is float else kind)


def load_recipe(name: str) -> TrainConfig:
    """The config of a recipe.

    Args:
        name: a Python file with a function ``get_config``, or the name of a recipe of this package (``stage2_80m``, or
            its path in the repository, ``configs/stage2_80m.py``).

    Raises:
        InputError: there is no such recipe; the message names the closest ones.
    """
    file = Path(name)
    if file.is_file():
        module = _import_file(file)
    elif file in (Path(file.stem), Path("configs", f"{file.stem}.py")) and file.stem in recipe_names():
        module = importlib.import_module(f"f2llm_jax.configs.{file.stem}")
    else:
        raise InputError(
            f"there is no recipe {name!r}, neither a file nor of this package; {_nearest(file.stem, recipe_names())}"
        )
    if not isinstance(config := getattr(module, "get_config", lambda: None)(), TrainConfig):
        raise InputError(f"{name} has no function get_config() that returns a TrainConfig")
    return config


def recipe_names() -> list[str]:
    """The recipes of this package."""
    import f2llm_jax.configs

    names = (module.name for module in pkgutil.iter_modules(f2llm_jax.configs.__path__))
    return sorted(name for name in names if name == "tiny" or name.startswith("stage"))


def override(config: TrainConfig, settings: Iterable[str]) -> TrainConfig:
    """The config with some values replaced.

    Args:
        config: the config to change.
        settings: assignments such as ``optim.learning_rate=1e-5``. A tuple is written ``8,16,32``, None ``none``.

    Raises:
        InputError: there is no such key (the message names the closest), or the key does not allow the value.
    """
    types_of = _keys(type(config))
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"--set takes KEY=VALUE, not {setting!r}")
        if key not in types_of:
            inside = [name for name in types_of if name.startswith(f"{key}.")]
            hint = f"{key} is a group of {', '.join(inside)}" if inside else _nearest(key, types_of)
            raise InputError(f"there is no setting {key!r}; {hint}")
        config = _replace(config, key.split("."), parse(text, types_of[key], key))
    check_values(config)
    return config


def parse(text: str, kind: Any, key: str) -> Any:
    """Parses a value of type ``kind``: int, float, str, bool, a tuple of one of these, or one of these or None."""
    members = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        (inner,) = (member for member in members if member is not types.NoneType)
        return None if text.lower() == "none" else parse(text, inner, key)
    if typing.get_origin(kind) is tuple:
        if text.strip()[:1] in ("(", "["):
            raise InputError(f"{key} takes values separated by commas, such as 8,16, not {text!r}")
        return tuple(parse(part.strip(), members[0], key) for part in text.split(",") if part.strip())
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise InputError(f"{key} is true or false, not {text!r}")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        raise InputError(f"{key} takes a {kind.__name__}, not {text!r}") from None


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The config as a tree that can be written as JSON."""
    return dataclasses.asdict(config)


def from_dict(tree: Mapping[str, Any], kind: type = TrainConfig) -> Any:
    """The inverse of ``to_dict``, also after a round trip through JSON.

    Raises:
        InputError: the config has no such key.
    """
    hints = typing.get_type_hints(kind)
    if unknown := [key for key in tree if key not in hints]:
        raise InputError(f"there is no setting {unknown[0]!r}; {_nearest(unknown[0], hints)}")

    def value(key: str) -> Any:
        if dataclasses.is_dataclass(hints[key]):
            return from_dict(tree[key], typing.cast(type, hints[key]))
        return tuple(tree[key]) if typing.get_origin(hints[key]) is tuple else tree[key]

    return kind(**{key: value(key) for key in tree})


def values(config: TrainConfig) -> dict[str, Any]:
    """{dotted key: value}."""
    return {key: functools.reduce(getattr, key.split("."), config) for key in _keys(TrainConfig)}


def differences(before: TrainConfig, after: TrainConfig) -> list[str]:
    """The differences between two configs, each like ``optim.learning_rate: 1e-05 -> 2e-05``."""
    old, new = values(before), values(after)
    return [f"{key}: {old[key]} -> {new[key]}" for key in old if old[key] != new[key]]


def _keys(kind: type, prefix: str = "") -> dict[str, Any]:
    """{dotted key: type} of every value in a tree of dataclasses."""
    keys: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            keys |= _keys(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            keys[prefix + name] = hint
    return keys


def _replace(config: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    return dataclasses.replace(config, **{name: _replace(getattr(config, name), rest, value) if rest else value})


def _nearest(key: str, keys: Iterable[str]) -> str:
    """A hint for an unknown key: the keys most similar to it, by their full names or by their last parts."""
    keys = list(keys)
    last = {name.rpartition(".")[2]: name for name in keys}
    close = difflib.get_close_matches(key, keys, n=2)
    close += [last[name] for name in difflib.get_close_matches(key.rpartition(".")[2], last, n=2)]
    return f"nearest: {', '.join(dict.fromkeys(close))}" if close else f"there are {', '.join(keys)}"


def _import_file(file: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise InputError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
