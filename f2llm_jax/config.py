"""The shape of a model, read from and written to a Hugging Face ``config.json``."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from f2llm_jax.errors import ReleaseError, warn, whole_number


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The sizes of a Qwen3 dense decoder without its language-model head, under Hugging Face's names.

    ``head_dim`` is independent of the others: it is not ``hidden_size / num_attention_heads`` (320 / 16 in the 80M,
    where it is 128). ``vocab_size`` is the number of rows of the embedding table, which may exceed the tokenizer's
    number of tokens.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 40960
    dtype: str = "bfloat16"
    """The dtype the weights were released in; the caller chooses the dtype they are loaded in."""
    matryoshka_dimensions: tuple[int, ...] = dataclasses.field(default=(), repr=False, compare=False)
    """The sizes of embeddings that ``config.json`` states, if any; no part of what the model computes. Use
    ``matryoshka_dims``."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                whole_number(field.name, value)
            elif field.type == "float" and not (type(value) in (int, float) and 0 < value < math.inf):
                raise ValueError(f"{field.name} must be a positive number, not {value!r}")
            elif field.type == "str" and not isinstance(value, str):
                raise ValueError(f"{field.name} must be a string, not {value!r}")
        for dim in self.matryoshka_dimensions:
            whole_number("every one of matryoshka_dimensions", dim)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, not {self.head_dim}")

    @property
    def matryoshka_dims(self) -> tuple[int, ...]:
        """The recommended embedding sizes, ascending: those stated in ``config.json``, and ``hidden_size`` itself.

        Where none are stated, they are those the family is trained at, powers of two from 8 (paper arXiv:2603.19223,
        Matryoshka section). Sizes above ``hidden_size``, which pruning leaves behind, are left out.
        """
        dims = self.matryoshka_dimensions or [2**n for n in range(3, 31)]
        return (*sorted({dim for dim in dims if dim < self.hidden_size}), self.hidden_size)

    @classmethod
    def from_release(cls, path: str | Path) -> ModelConfig:
        """Reads the ``config.json`` of a release folder (or that file itself).

        Raises:
            ReleaseError: the file is missing, is not JSON, or describes something other than a Qwen3 dense decoder with
                full attention.
        """
        path = Path(path)
        if not path.exists():
            raise ReleaseError(
                f"{path} does not exist: from_release takes a folder or its config.json; a hub id is downloaded by "
                "f2llm_jax.load, and without its weights by f2llm_jax.release.find_release(..., weights=False)"
            )
        file = path / "config.json" if path.is_dir() else path
        return cls.from_hf(read_json(file), source=str(file))

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
        """Builds the config from the mapping in a ``config.json`` of transformers 4 or 5.

        Args:
            values: the contents of the file.
            source: its name, for error messages.

        Raises:
            ReleaseError: a value is missing, or requests something that this model does not support.
        """
        _refuse_other_models(values, source)
        required = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "rms_norm_eps",
        )
        missing = [name for name in required if values.get(name) is None]
        if missing:
            raise ReleaseError(f"{source}: missing {', '.join(missing)}")
        rope_theta = _rope_theta(values, source)
        dims = values.get("matryoshka_dimensions") or []
        if not isinstance(dims, list):
            raise ReleaseError(f"{source}: matryoshka_dimensions must be a list, not {dims!r}")
        try:
            config = cls(
                **{name: values[name] for name in required},
                rope_theta=rope_theta,
                max_position_embeddings=values.get("max_position_embeddings", cls.max_position_embeddings),
                dtype=values.get("dtype") or values.get("torch_dtype") or "float32",
                matryoshka_dimensions=tuple(dims),
            )
        except ValueError as error:
            raise ReleaseError(f"{source}: {error}") from error
        _check_layer_types(values, config.num_hidden_layers, source)
        return config

    def to_hf(self) -> dict[str, Any]:
        """The contents of a ``config.json`` that transformers 4.51 and later, and 5, read as the same model.

        Keys that changed between the two are written in both spellings: ``rope_theta`` and ``rope_parameters``,
        ``torch_dtype`` and ``dtype``. Matryoshka sizes, if they are stated, are written as vLLM reads them.
        """
        sizes = dataclasses.asdict(self)
        rope_theta, dtype = sizes.pop("rope_theta"), sizes.pop("dtype")
        stated = sizes.pop("matryoshka_dimensions")
        matryoshka = {"is_matryoshka": True, "matryoshka_dimensions": list(self.matryoshka_dims)} if stated else {}
        return {
            "architectures": ["Qwen3Model"],
            "model_type": "qwen3",
            **sizes,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "layer_types": ["full_attention"] * self.num_hidden_layers,
            "rope_parameters": {"rope_theta": rope_theta, "rope_type": "default"},
            "rope_theta": rope_theta,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "dtype": dtype,
            "torch_dtype": dtype,
            "use_cache": True,
            "use_sliding_window": False,
            **matryoshka,
        }


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object; a missing or malformed file is a ReleaseError that names it."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReleaseError(f"{file} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ReleaseError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ReleaseError(f"{file} should hold a JSON object, not a {type(values).__name__}")
    return values


def _refuse_other_models(values: Mapping[str, Any], source: str) -> None:
    if values.get("model_type") != "qwen3":
        raise ReleaseError(f"{source}: model_type is {values.get('model_type')!r}; only 'qwen3' is supported")
    if values.get("hidden_act", "silu") != "silu":
        raise ReleaseError(f"{source}: hidden_act is {values['hidden_act']!r}; only 'silu' is supported")
    if values.get("attention_bias"):
        raise ReleaseError(f"{source}: attention_bias is true; projections with a bias are not supported")


def _check_layer_types(values: Mapping[str, Any], num_layers: int, source: str) -> None:
    layer_types = values.get("layer_types")
    if layer_types is None:
        first_sliding = values.get("max_window_layers", num_layers)
        none_slides = isinstance(first_sliding, int) and first_sliding >= num_layers
        if values.get("use_sliding_window") and values.get("sliding_window") and not none_slides:
            raise ReleaseError(
                f"{source}: use_sliding_window makes layers {first_sliding}..{num_layers - 1} sliding_attention, "
                "which is not supported"
            )
        return
    if not isinstance(layer_types, list):
        raise ReleaseError(f"{source}: layer_types must be a list, not {layer_types!r}")
    if len(layer_types) < num_layers:
        raise ReleaseError(f"{source}: layer_types has {len(layer_types)} entries for {num_layers} layers")
    if len(layer_types) > num_layers:
        # The released 80M was cut from a 28-layer model and still lists all 28.
        warn(f"{source}: layer_types has {len(layer_types)} entries for {num_layers} layers; the rest is ignored")
    others = sorted({str(kind) for kind in layer_types[:num_layers]} - {"full_attention"})
    if others:
        raise ReleaseError(f"{source}: layer_types has {', '.join(others)}; only full_attention is supported")


def _rope_theta(values: Mapping[str, Any], source: str) -> float:
    """Reads rope_theta, at the top level (transformers 4) or in rope_parameters (5); a default would be a guess.

    Both versions scale positions as rope_scaling says, transformers 5 even if rope_parameters is present.
    """
    theta = values.get("rope_theta")
    for key in ("rope_parameters", "rope_scaling"):
        rope = values.get(key) or {}
        if not isinstance(rope, dict):
            raise ReleaseError(f"{source}: {key} must be a JSON object, not {rope!r}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ReleaseError(
                f"{source}: rope_type is {kind!r} in {key}; only the default rotary positions are supported"
            )
        theta = rope.get("rope_theta", theta)
    if theta is None:
        raise ReleaseError(f"{source}: no rope_theta, neither at the top level nor in rope_parameters")
    return float(theta) if type(theta) is int else theta
