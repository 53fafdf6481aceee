"""Release to converted folder to release: every bit, every family, every reader."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
import transformers
from conversions import tensor_sums, write_random_release
from releases import QUERY_PROMPT, TINY, edit_json, torch_model, write_release

import f2llm_jax
from f2llm_jax.config import ModelConfig
from f2llm_jax.configs.models import MODELS
from f2llm_jax.convert.conversion import convert_release
from f2llm_jax.convert.load import load_params, open_checkpoint
from f2llm_jax.convert.safetensors import parse_size
from f2llm_jax.convert.table import HF_NAMES, tensor_table
from f2llm_jax.errors import F2LLMError, InputError, ReleaseError
from f2llm_jax.release import read_release

TEXTS = ["Wie spät ist es?", "the quick brown fox", "", "今天天气很好"]

# A tiny model for each shape of the families: the head count of the size, the vocabulary of the tokenizer.
FAMILIES = {
    "F2LLM-v2": TINY,
    "F2LLM-v2-80M": dataclasses.replace(TINY, hidden_size=40, num_attention_heads=16, num_key_value_heads=8),
    "F2LLM-v1": dataclasses.replace(TINY, num_hidden_layers=2, num_attention_heads=8),
    "Qwen3-Embedding-0.6B": dataclasses.replace(TINY, vocab_size=151669, hidden_size=32, num_hidden_layers=2),
    "Qwen3-Embedding-4B": dataclasses.replace(TINY, vocab_size=151665, hidden_size=32, num_hidden_layers=2),
}


def round_trip(release: Path, tmp_path: Path, **options: object) -> Path:
    flax = convert_release(release, tmp_path / "flax", to="flax")
    return convert_release(flax, tmp_path / "back", to="hf", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lm_head", [False, True], ids=["bare", "prefixed-lm_head"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "150KB"], ids=["single", "sharded"])
def test_round_trip_is_bit_identical(tmp_path: Path, dtype: torch.dtype, lm_head: bool, max_shard_size: str) -> None:
    config = dataclasses.replace(TINY, dtype=str(dtype).removeprefix("torch."))
    release = write_release(tmp_path / "r", config, dtype=dtype, lm_head=lm_head, max_shard_size=max_shard_size)
    back = round_trip(release, tmp_path, max_shard_size=max_shard_size)
    assert tensor_sums(back) == tensor_sums(release)
    assert len(tensor_sums(back)) == 11 * TINY.num_hidden_layers + 2
    assert (len(list(back.glob("*.safetensors"))) > 1) == (max_shard_size == "150KB")


@pytest.mark.parametrize("name", FAMILIES)
def test_families_round_trip(tmp_path: Path, name: str) -> None:
    config = dataclasses.replace(FAMILIES[name], dtype="bfloat16")
    release = write_release(tmp_path / "r", config, dtype=torch.bfloat16)
    back = round_trip(release, tmp_path)
    assert tensor_sums(back) == tensor_sums(release)
    assert ModelConfig.from_release(back) == ModelConfig.from_release(release) == config


@pytest.mark.parametrize("size", ["80M", "330M", "0.6B"])
def test_real_shapes_round_trip(tmp_path: Path, size: str) -> None:
    release = write_random_release(tmp_path / "r", MODELS[size])
    before = tensor_sums(release)
    flax = convert_release(release, tmp_path / "flax", to="flax")
    for file in release.glob("*.safetensors"):
        file.unlink()  # two copies on the disk at a time are enough
    assert tensor_sums(convert_release(flax, tmp_path / "back", to="hf")) == before


def test_causal_models_with_tied_weights(tmp_path: Path) -> None:
    """Saved by Qwen3ForCausalLM with its head tied: prefixed names, and no lm_head in the file."""
    hf = transformers.Qwen3Config(**TINY.to_hf())
    causal = transformers.Qwen3ForCausalLM(hf)
    causal.model = torch_model(TINY)
    causal.tie_weights()
    release = write_release(tmp_path / "r", TINY)
    (release / "model.safetensors").unlink()
    causal.save_pretrained(release)
    assert tensor_sums(round_trip(release, tmp_path)) == tensor_sums(release)


def test_one_table() -> None:
    """Every parameter is in the table once, every Hugging Face name too, and no bytes are lost between the two."""
    table = tensor_table(TINY)
    assert {tensor.path for tensor in table} == HF_NAMES.keys()
    names = [name for tensor in table for name in tensor.hf_names]
    assert len(names) == len(set(names))
    expected = {name: tuple(value.shape) for name, value in torch_model(TINY).state_dict().items()}
    assert {name: tensor.hf_shape for tensor in table for name in tensor.hf_names} == expected


def test_converted_folder_is_all_that_load_needs(tmp_path: Path) -> None:
    release = write_release(tmp_path / "r")
    expected = f2llm_jax.load(release)
    embeddings = expected.encode_query(TEXTS)
    flax = convert_release(release, tmp_path / "flax", to="flax")
    for file in sorted(release.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    model = f2llm_jax.load(flax)
    np.testing.assert_array_equal(model.encode_query(TEXTS), embeddings)
    assert model.prompts == expected.prompts
    assert (model.max_length, model.tokenizer.eos_id) == (expected.max_length, expected.tokenizer.eos_id)
    marker = json.loads((flax / "f2llm_jax.json").read_text())
    assert marker == {"format": "f2llm_jax", "format_version": 1, "dtype": "float32", "complete": True}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_is_bit_exact(tmp_path: Path, dtype: str) -> None:
    torch_dtype = getattr(torch, dtype)
    release = write_release(tmp_path / "r", dataclasses.replace(TINY, dtype=dtype), dtype=torch_dtype)
    flax = convert_release(release, tmp_path / "flax", to="flax")
    assert_trees_equal(f2llm_jax.load(flax, dtype=dtype).params, f2llm_jax.load(release, dtype=dtype).params)


def test_plain_orbax_reads_it(tmp_path: Path) -> None:
    """With the interfaces that somebody who knows only Orbax would try."""
    release = write_release(tmp_path / "r")
    expected = f2llm_jax.load(release).params
    home = (convert_release(release, tmp_path / "flax", to="flax") / "params").absolute()
    sharding = jax.sharding.NamedSharding(jax.make_mesh((8,), ("x",)), jax.sharding.PartitionSpec())
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), expected)
    with ocp.StandardCheckpointer() as checkpointer:
        assert_trees_equal(checkpointer.restore(home), expected)
        onto_mesh = checkpointer.restore(home, abstract)
        shapes = checkpointer.metadata(home).item_metadata.tree
    assert_trees_equal(onto_mesh, expected)
    assert onto_mesh["norm"]["weight"].sharding == sharding
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(lambda x: x.shape, expected)
    with ocp.PyTreeCheckpointer() as checkpointer:
        assert_trees_equal(checkpointer.restore(home), expected)


@pytest.mark.filterwarnings("ignore:.*were truncated")
@pytest.mark.parametrize("append_eos", [True, False], ids=["tokenizer-appends", "tokenizer-does-not"])
def test_sentence_transformers_gives_our_embeddings(tmp_path: Path, append_eos: bool) -> None:
    from sentence_transformers import SentenceTransformer

    release = write_release(tmp_path / "r", append_eos=append_eos)
    (release / "sentence_bert_config.json").write_text('{"max_seq_length": 60, "do_lower_case": false}')
    ours = f2llm_jax.load(release)
    back = round_trip(release, tmp_path)
    theirs = SentenceTransformer(str(back), device="cpu")
    assert theirs.prompts == {"query": QUERY_PROMPT, "document": ""}
    assert theirs.max_seq_length == ours.max_length
    for texts in (TEXTS, ["quick " * 100]):
        assert np.abs(theirs.encode(texts) - ours.encode(texts, prompt="")).max() <= 5e-6
        assert np.abs(theirs.encode_query(texts) - ours.encode_query(texts)).max() <= 5e-6
    model = f2llm_jax.load(back)
    np.testing.assert_array_equal(model.encode(TEXTS), ours.encode(TEXTS))


def test_transformers_reads_it(tmp_path: Path) -> None:
    back = round_trip(write_release(tmp_path / "r", max_shard_size="150KB"), tmp_path, max_shard_size="200KB")
    model, loading = transformers.AutoModel.from_pretrained(back, output_loading_info=True)
    assert not any(loading.values()), loading
    expected = torch_model(TINY).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(value.numel() for value in expected.values())
    assert set(index["weight_map"]) == set(expected)


def test_config_reads_in_transformers_4_and_5(tmp_path: Path) -> None:
    release = write_release(tmp_path / "r")
    edit_json(release / "config.json", eos_token_id=5, pad_token_id=3)
    values = json.loads((round_trip(release, tmp_path) / "config.json").read_text())
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == 1e6
    assert values["dtype"] == values["torch_dtype"] == "float32"
    assert (values["eos_token_id"], values["pad_token_id"]) == (5, 3)


def test_matryoshka_sizes_go_both_ways(tmp_path: Path) -> None:
    """As vLLM reads them: the sizes that a request may ask for, or, without any, all of them."""
    release = write_release(tmp_path / "r")
    edit_json(release / "config.json", is_matryoshka=True, matryoshka_dimensions=[8, 16, 96])
    back = round_trip(release, tmp_path)
    values = json.loads((back / "config.json").read_text())
    assert (values["is_matryoshka"], values["matryoshka_dimensions"]) == (True, [8, 16, 96])
    assert read_release(back).config.matryoshka_dims == (8, 16, 96)
    assert "Matryoshka sizes: 8, 16, 96." in (back / "README.md").read_text()
    model, loading = transformers.AutoModel.from_pretrained(back, output_loading_info=True)
    assert model.config.matryoshka_dimensions == [8, 16, 96] and not any(loading.values())

    edit_json(release / "config.json", matryoshka_dimensions=None)
    values = json.loads((convert_release(release, tmp_path / "any", to="flax") / "config.json").read_text())
    assert values["is_matryoshka"] is True and "matryoshka_dimensions" not in values


def test_release_is_complete(tmp_path: Path) -> None:
    release = write_release(tmp_path / "r")
    (release / "sentence_bert_config.json").write_text('{"max_seq_length": 77, "do_lower_case": false}')
    back = round_trip(release, tmp_path)
    assert {str(path.relative_to(back)) for path in back.rglob("*") if path.is_file()} == {
        "1_Pooling/config.json",
        "README.md",
        "config.json",
        "config_sentence_transformers.json",
        "model.safetensors",
        "modules.json",
        "sentence_bert_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (back / "2_Normalize").is_dir()
    assert read_release(back).max_length == 77
    assert json.loads((back / "1_Pooling" / "config.json").read_text())["word_embedding_dimension"] == 96
    assert (back / "README.md").read_text().startswith("---\nlibrary_name: sentence-transformers\n")
    for name in ("tokenizer.json", "tokenizer_config.json", "sentence_bert_config.json"):
        assert (back / name).read_bytes() == (release / name).read_bytes()


def test_shards_stay_below_their_limit(tmp_path: Path) -> None:
    back = round_trip(write_release(tmp_path / "r"), tmp_path, max_shard_size="150KB")
    table = 4 * TINY.vocab_size * TINY.hidden_size
    for file in back.glob("*.safetensors"):
        with file.open("rb") as stream:
            weights = file.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")
        assert weights <= max(150_000, table)


@pytest.mark.parametrize(
    ("text", "count"),
    [("5GB", 5 * 10**9), ("512MiB", 512 << 20), ("300", 300), (1, 1), ("1.5kb", 1500), (" 2 MB ", 2_000_000)],
)
def test_sizes(text: str | int, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "0", "0.1", "5TB!", "five"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(InputError, match="size"):
        parse_size(text)


@pytest.mark.parametrize("to", ["flax", "hf"])
def test_casting(tmp_path: Path, to: str) -> None:
    """Rounded to nearest, as torch rounds, and stated in the config."""
    release = write_release(tmp_path / "r")
    exact = torch_model(TINY).state_dict()
    for dtype in ("bfloat16", "float16", "float32"):
        out = convert_release(release, tmp_path / dtype, to=to, dtype=dtype)
        assert ModelConfig.from_release(out).dtype == dtype
        back = out if to == "hf" else convert_release(out, tmp_path / f"{dtype}-hf", to="hf")
        sums = tensor_sums(back)
        assert {sums[name][0] for name in sums} == {f"torch.{dtype}"}
        model = transformers.AutoModel.from_pretrained(back, dtype="auto")
        for name, value in model.state_dict().items():
            assert torch.equal(value, exact[name].to(getattr(torch, dtype))), name


def test_same_kind_can_be_resharded(tmp_path: Path) -> None:
    release = write_release(tmp_path / "r")
    sharded = convert_release(release, tmp_path / "sharded", to="hf", max_shard_size="100KB")
    assert tensor_sums(sharded) == tensor_sums(release)
    flax = convert_release(sharded, tmp_path / "flax", to="flax", dtype="bfloat16")
    again = convert_release(flax, tmp_path / "again", to="flax")
    assert_trees_equal(f2llm_jax.load(again).params, f2llm_jax.load(flax).params)


def test_config_that_states_another_dtype(tmp_path: Path) -> None:
    """The weights decide, and the output says what they are."""
    release = write_release(tmp_path / "r")
    edit_json(release / "config.json", dtype="bfloat16", torch_dtype="bfloat16")
    with pytest.warns(UserWarning, match="config.json states bfloat16, the weights are float32"):
        out = convert_release(release, tmp_path / "flax", to="flax")
    assert ModelConfig.from_release(out).dtype == "float32"


def test_folders_saved_by_orbax(tmp_path: Path) -> None:
    """``params/`` as a training run saves it: compressed, many arrays in a file, rows added to the vocabulary."""
    config = dataclasses.replace(TINY, vocab_size=509)
    release = write_release(tmp_path / "r", config)
    mesh = f2llm_jax.make_mesh(data=2, fsdp=2, tensor=2)
    folder = convert_release(release, tmp_path / "saved", to="flax")
    for file in sorted((folder / "params").rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    (folder / "params").rmdir()
    (folder / "f2llm_jax.json").unlink()
    padded = f2llm_jax.load(release, mesh=mesh).params
    padded["embed_tokens"] = padded["embed_tokens"].at[509:].set(3.0)  # an optimizer may have moved them
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / "params").absolute(), padded)
    expected = f2llm_jax.load(release)
    assert_trees_equal(f2llm_jax.load(folder).params, expected.params)
    onto = f2llm_jax.load(folder, mesh=f2llm_jax.make_mesh(tensor=2, devices=jax.devices()[:2]))
    assert onto.params["embed_tokens"].shape[0] == 510
    assert not np.asarray(onto.params["embed_tokens"][509:]).any()
    np.testing.assert_allclose(onto.encode(TEXTS), expected.encode(TEXTS), atol=2e-6)
    assert tensor_sums(convert_release(folder, tmp_path / "back", to="hf")) == tensor_sums(release)


def test_bytes_are_read_once(tmp_path: Path) -> None:
    release = write_release(tmp_path / "r", lm_head=True)
    checkpoint = open_checkpoint(release)
    load_params(checkpoint, TINY)
    assert checkpoint.bytes_read == 4 * sum(tensor.size for tensor in tensor_table(TINY))


@pytest.mark.parametrize(
    "options", [{"to": "torch"}, {"to": "hf", "dtype": "int8"}, {"to": "hf", "max_shard_size": ""}]
)
def test_bad_arguments(tmp_path: Path, options: dict[str, str]) -> None:
    release = write_release(tmp_path / "r")
    with pytest.raises(F2LLMError):
        convert_release(release, tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_missing_source(tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match="neither a folder nor a hub id"):
        convert_release(tmp_path / "nothing", tmp_path / "out", to="flax")


def assert_trees_equal(a: object, b: object) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).dtype == np.asarray(y).dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
