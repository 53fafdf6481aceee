"""ModelConfig against what transformers reads and writes, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from releases import TINY

import f2llm_jax
from f2llm_jax.config import ModelConfig
from f2llm_jax.configs.models import MODELS
from f2llm_jax.errors import F2LLMError, ReleaseError


def hf(**changes: object) -> dict[str, object]:
    """A config.json of transformers 5; None removes a key."""
    values = {**TINY.to_hf(), **changes}
    return {key: value for key, value in values.items() if value is not None}


@pytest.mark.parametrize("config", [TINY, *MODELS.values()], ids=["tiny", *MODELS])
def test_transformers_reads_what_is_written(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    assert isinstance(read, transformers.Qwen3Config)
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(read, name) == getattr(config, name)
    assert (read.num_key_value_heads, read.head_dim) == (config.num_key_value_heads, config.head_dim)
    assert (read.rms_norm_eps, read.rope_parameters["rope_theta"]) == (config.rms_norm_eps, config.rope_theta)
    assert read.layer_types == ["full_attention"] * config.num_hidden_layers
    assert read.tie_word_embeddings and not read.attention_bias and read.sliding_window is None


def test_what_transformers_writes_is_read(tmp_path):
    transformers.Qwen3Config(**TINY.to_hf()).save_pretrained(tmp_path)
    assert ModelConfig.from_release(tmp_path) == TINY
    assert ModelConfig.from_release(tmp_path / "config.json") == TINY


@given(
    heads=st.integers(1, 4),
    groups=st.integers(1, 5),
    half_head=st.integers(1, 99),
    sizes=st.tuples(*[st.integers(1, 10**6)] * 5),
    theta=st.floats(1, 1e9),
    epsilon=st.floats(1e-9, 1),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_round_trip(heads, groups, half_head, sizes, theta, epsilon, dtype):
    vocab, hidden, mlp, layers, positions = sizes
    layers = layers % 50 + 1
    config = ModelConfig(
        vocab, hidden, mlp, layers, heads * groups, heads, 2 * half_head, theta, epsilon, positions, dtype
    )
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": None},  # transformers 4
        {"rope_theta": None},  # transformers 5
        {"rope_parameters": {"rope_theta": 1e6}},
        {"rope_scaling": None, "rope_parameters": None},
        {"dtype": None},
        {"torch_dtype": None},
        {"layer_types": None},
        {"layer_types": None, "use_sliding_window": True, "sliding_window": None},
        {"layer_types": None, "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3},
        {"layer_types": None, "use_sliding_window": False, "sliding_window": 64, "max_window_layers": 1},
        {"attention_bias": None, "hidden_act": None},
        {"tie_word_embeddings": False, "architectures": ["Qwen3ForCausalLM"]},
    ],
)
def test_variants_are_the_same_model(changes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ModelConfig.from_hf(hf(**changes)) == TINY


def test_theta_is_read_wherever_it_stands():
    assert ModelConfig.from_hf(hf(rope_theta=5e4, rope_parameters=None)).rope_theta == 5e4
    assert ModelConfig.from_hf(hf(rope_theta=None, rope_parameters={"rope_theta": 5e4})).rope_theta == 5e4


def test_head_dim_is_read_not_computed():
    assert MODELS["80M"].head_dim == 128 != MODELS["80M"].hidden_size / MODELS["80M"].num_attention_heads
    assert ModelConfig.from_hf(hf(head_dim=6)).head_dim == 6


def test_long_layer_types_are_cut_with_a_warning():
    with pytest.warns(UserWarning, match="28 entries for 3 layers"):
        config = ModelConfig.from_hf(hf(layer_types=["full_attention"] * 28))
    assert config == TINY
    assert config.to_hf()["layer_types"] == ["full_attention"] * 3


def test_sliding_attention_beyond_the_layers_is_no_matter():
    with pytest.warns(UserWarning, match="4 entries for 3 layers"):
        ModelConfig.from_hf(hf(layer_types=["full_attention"] * 3 + ["sliding_attention"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"model_type": "qwen3_moe"}, "model_type is 'qwen3_moe'"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"rope_theta": None, "rope_parameters": None}, "no rope_theta"),
        ({"rope_theta": None, "rope_parameters": {"rope_type": "default"}}, "no rope_theta"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}}, "rope_type is 'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        # Beside the rope_parameters of the release.
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn' in rope_scaling"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types has 2 entries for 3 layers"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "sliding_attention"),
        (
            {"layer_types": None, "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
            "layers 1..2 sliding_attention",
        ),
        ({"head_dim": None}, "missing head_dim"),
        ({"vocab_size": None, "hidden_size": None}, "missing vocab_size, hidden_size"),
        ({"hidden_size": 0}, "hidden_size must be a positive whole number, not 0"),
        ({"hidden_size": "big"}, "hidden_size must be a positive whole number, not 'big'"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers must be a positive whole number, not '3'"),
        ({"num_hidden_layers": 3.0, "layer_types": None}, "num_hidden_layers must be .* not 3.0"),
        ({"vocab_size": 512.0}, "vocab_size must be a positive whole number, not 512.0"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a positive number, not '1e-6'"),
        ({"dtype": 32}, "dtype must be a string, not 32"),
        ({"layer_types": 3}, "layer_types must be a list, not 3"),
        ({"rope_parameters": [1]}, r"rope_parameters must be a JSON object, not \[1\]"),
        ({"rope_theta": "1e6", "rope_parameters": None}, "rope_theta must be a positive number, not '1e6'"),
        ({"rope_theta": math.inf, "rope_parameters": None}, "rope_theta must be a positive number, not inf"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"head_dim": 7}, "head_dim must be even"),
    ],
)
def test_other_models_are_refused_by_name(changes, message):
    with pytest.raises(ReleaseError, match=message) as error:
        ModelConfig.from_hf(hf(**changes), source="somewhere/config.json")
    assert str(error.value).count("somewhere/config.json") == 1


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\x00"])
def test_damaged_files_are_named(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ReleaseError, match=r"config\.json"):
        ModelConfig.from_release(tmp_path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ReleaseError, match=r"config\.json does not exist$"):
        ModelConfig.from_release(tmp_path)
    with pytest.raises(
        ReleaseError, match=r"^owner/name does not exist: from_release takes a folder.* f2llm_jax\.load"
    ):
        ModelConfig.from_release("owner/name")


def test_matryoshka_dims():
    assert MODELS["80M"].matryoshka_dims == (8, 16, 32, 64, 128, 256, 320)
    assert MODELS["0.6B"].matryoshka_dims == (8, 16, 32, 64, 128, 256, 512, 1024)
    assert dataclasses.replace(TINY, hidden_size=4).matryoshka_dims == (4,)
    assert "matryoshka_dimensions" not in TINY.to_hf()


def test_matryoshka_dims_of_the_config():
    config = ModelConfig.from_hf(hf(matryoshka_dimensions=[TINY.hidden_size, 32, 8]))
    assert config.matryoshka_dims == (8, 32, TINY.hidden_size)
    assert config == TINY and hash(config) == hash(TINY)  # the same programs and weights
    small = dataclasses.replace(config, hidden_size=16)  # as pruning does
    assert small.matryoshka_dims == (8, 16) and small.to_hf()["matryoshka_dimensions"] == [8, 16]
    for wrong in (8, [8, "16"], [0]):
        with pytest.raises(ReleaseError, match=r"somewhere/config\.json: .*matryoshka_dimensions must be"):
            ModelConfig.from_hf(hf(matryoshka_dimensions=wrong), source="somewhere/config.json")


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.hidden_size = 1


def test_errors_can_be_caught_at_three_levels():
    for kind in (f2llm_jax.ReleaseError, f2llm_jax.InputError):
        assert issubclass(kind, F2LLMError) and issubclass(kind, ValueError)
