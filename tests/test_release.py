"""Every way a release has been written gives the same embeddings; what is something else is refused by name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import numpy as np
import pytest
import sentence_transformers
from compilation import quick_environment
from releases import QUERY_PROMPT, TINY, edit_json, set_appended_token, write_json, write_release
from safetensors.numpy import save_file

import f2llm_jax
from f2llm_jax.convert.digest import model_digest
from f2llm_jax.convert.safetensors import read_header
from f2llm_jax.errors import ReleaseError

TEXTS = ["the quick brown fox", "", "Ünïcödé 한국어 العربية", "Z" * 40]


@pytest.fixture(scope="module")
def expected(tiny) -> np.ndarray:
    return tiny.encode(TEXTS)


def load_quietly(folder: Path) -> f2llm_jax.Encoder:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return f2llm_jax.load(folder)


def rename_modules(folder: Path) -> None:
    """The module paths of sentence-transformers 6."""
    modules = json.loads((folder / "modules.json").read_text())
    for module, home in zip(modules, ("base", "sentence_transformer", "base"), strict=True):
        kind = module["type"].rsplit(".", 1)[-1]
        module["type"] = f"sentence_transformers.{home}.modules.{kind.lower()}.{kind}"
    write_json(folder / "modules.json", modules)


def edit_config(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def edit_prompts(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config_sentence_transformers.json", **changes)


def edit_limit(limit: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "tokenizer_config.json", model_max_length=limit)


def write_pooling(**values: object) -> Callable[[Path], None]:
    return lambda folder: write_json(folder / "1_Pooling" / "config.json", values)


VARIANTS: dict[str, Callable[[Path], None]] = {
    "rope_theta at the top": edit_config(rope_theta=1e6, rope_parameters=None, rope_scaling=None),
    "rope_theta in rope_parameters": edit_config(
        rope_theta=None, rope_parameters={"rope_theta": 1e6, "rope_type": "default"}
    ),
    "torch_dtype": edit_config(dtype=None, torch_dtype="float32"),
    "dtype": edit_config(dtype="float32", torch_dtype=None),
    "no layer_types": edit_config(layer_types=None),
    "architecture of a language model": edit_config(architectures=["Qwen3ForCausalLM"], tie_word_embeddings=True),
    "pooling as a name": write_pooling(pooling_mode="lasttoken", embedding_dimension=96, include_prompt=True),
    "pooling as a list": write_pooling(pooling_mode=["lasttoken"], word_embedding_dimension=96),
    "modules of sentence-transformers 6": rename_modules,
    "no modules.json": lambda folder: (folder / "modules.json").unlink(),
    "no prompts": lambda folder: (folder / "config_sentence_transformers.json").unlink(),
    "no weights' metadata": lambda folder: rewrite_weights(folder, metadata=None),
    "the limit of a sentence-transformers 2 file": lambda folder: write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": 512, "do_lower_case": False}
    ),
    "no limit of the tokenizer's": lambda folder: edit_limit(1e30)(folder),
    "other files": lambda folder: (folder / "README.md").write_text("A model."),
}


def rewrite_weights(folder: Path, metadata: dict[str, str] | None) -> None:
    from safetensors.numpy import load_file, save_file

    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata=metadata)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_give_the_same_embeddings(copied_release, expected, variant):
    VARIANTS[variant](copied_release)
    np.testing.assert_array_equal(load_quietly(copied_release).encode(TEXTS), expected)


@pytest.mark.parametrize(
    "layout",
    [{"lm_head": True}, {"max_shard_size": "60KB"}, {"lm_head": True, "max_shard_size": "60KB"}, {"append_eos": False}],
    ids=["prefix and lm_head", "shards", "shards with prefix and lm_head", "tokenizer without EOS"],
)
def test_layouts_give_the_same_embeddings(tmp_path, expected, layout):
    write_release(tmp_path, **layout)
    assert ("max_shard_size" in layout) == (tmp_path / "model.safetensors.index.json").exists()
    names = weight_names(tmp_path)
    assert ("lm_head.weight" in names) == ("model.norm.weight" in names) == ("lm_head" in layout)
    np.testing.assert_array_equal(load_quietly(tmp_path).encode(TEXTS), expected)


@pytest.mark.parametrize("left", ["model*", "model*.json"], ids=["shards", "an index without shards"])
def test_one_file_goes_before_what_is_left_of_shards(copied_release, expected, tmp_path, left):
    """As with sentence-transformers and transformers: a fine-tuned model saved over a sharded one is the fine-tuned."""
    older = write_release(tmp_path / "older", seed=1, max_shard_size="60KB")
    for file in older.glob(left):
        assert file.name != "model.safetensors"
        shutil.copy(file, copied_release)
    np.testing.assert_array_equal(load_quietly(copied_release).encode(TEXTS), expected)
    reference = sentence_transformers.SentenceTransformer(str(copied_release), device="cpu")
    np.testing.assert_allclose(reference.encode(TEXTS), expected, rtol=0, atol=5e-6)


def weight_names(folder: Path) -> set[str]:
    from safetensors import safe_open

    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "np") as weights:
            names |= set(weights.keys())
    return names


def test_prefixed_keys_without_lm_head(copied_release, expected):
    from safetensors.numpy import load_file, save_file

    file = copied_release / "model.safetensors"
    save_file({f"model.{name}": value for name, value in load_file(file).items()}, file)
    np.testing.assert_array_equal(load_quietly(copied_release).encode(TEXTS), expected)


def test_what_sentence_transformers_writes_is_read(tiny_release, expected, tmp_path):
    model = sentence_transformers.SentenceTransformer(str(tiny_release), device="cpu")
    model.save_pretrained(str(tmp_path))
    saved = load_quietly(tmp_path)
    np.testing.assert_array_equal(saved.encode(TEXTS), expected)
    assert saved.prompts == {"query": QUERY_PROMPT, "document": ""}
    assert saved.config == TINY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit_config(layer_types=["full_attention"] * 28), "layer_types has 28 entries for 3 layers"),
        (
            lambda folder: edit_json(folder / "1_Pooling" / "config.json", word_embedding_dimension=1024),
            "states 1024 dimensions, the backbone has 96",
        ),
        (write_pooling(pooling_mode="lasttoken", embedding_dimension=64), "states 64 dimensions, the backbone has 96"),
        (
            lambda folder: write_json(folder / "modules.json", json.loads((folder / "modules.json").read_text())[:2]),
            "no Normalize",
        ),
    ],
)
def test_what_a_release_gets_wrong_is_warned_of_and_mended(copied_release, expected, change, message):
    change(copied_release)
    with pytest.warns(UserWarning, match=message) as caught:
        model = f2llm_jax.load(copied_release)
    assert len(caught) == 1
    assert caught[0].filename == __file__, "the warning points at the caller of load"
    np.testing.assert_array_equal(model.encode(TEXTS), expected)


def test_qwen3_embedding(copied_release, tiny):
    """Its query prompt has no space at its end, its documents none at all, and it appends the pad token."""
    prompt = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
    edit_json(
        copied_release / "config_sentence_transformers.json",
        prompts={"query": prompt, "document": ""},
        default_prompt_name=None,
    )
    set_appended_token(copied_release, "<|endoftext|>")
    model = load_quietly(copied_release)
    assert model.prompts == {"query": prompt, "document": ""}
    got = model.encode_query(TEXTS)
    reference = sentence_transformers.SentenceTransformer(str(copied_release), device="cpu")
    np.testing.assert_allclose(got, reference.encode_query(TEXTS), rtol=0, atol=5e-6)
    assert (got * tiny.encode(TEXTS, prompt=prompt)).sum(axis=1).max() < 0.999  # of another EOS


def test_prompts_and_their_default(copied_release, tiny):
    edit_json(
        copied_release / "config_sentence_transformers.json",
        prompts={"query": "q: ", "cluster": "c: ", "document": None},
        default_prompt_name="cluster",
    )
    model = load_quietly(copied_release)
    assert model.prompts == {"query": "q: ", "cluster": "c: ", "document": ""}
    np.testing.assert_array_equal(model.encode(TEXTS), tiny.encode(TEXTS, prompt="c: "))
    np.testing.assert_array_equal(model.encode_query(TEXTS), tiny.encode(TEXTS, prompt="q: "))
    np.testing.assert_array_equal(model.encode_document(TEXTS), tiny.encode(TEXTS))
    reference = sentence_transformers.SentenceTransformer(str(copied_release), device="cpu")
    np.testing.assert_allclose(model.encode(TEXTS), reference.encode(TEXTS), rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("tokenizer_config.json", {"model_max_length": 12}),
        ("config.json", {"max_position_embeddings": 12}),
        ("sentence_bert_config.json", {"max_seq_length": 12}),
    ],
)
def test_the_least_limit_holds(copied_release, tiny, file, changes):
    write_json(copied_release / "sentence_bert_config.json", {"max_seq_length": 4096})
    edit_json(copied_release / file, **changes)
    model = load_quietly(copied_release)
    assert model.max_length == 12
    with pytest.warns(UserWarning, match="2 of 4 texts were longer than 12 tokens"):
        got = model.encode(TEXTS)
    with pytest.warns(UserWarning, match="truncated"):
        np.testing.assert_array_equal(got, tiny.encode(TEXTS, max_length=12))


def damage_modules(kinds: list[str]) -> Callable[[Path], None]:
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": "" if i == 0 else f"{i}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    return lambda folder: write_json(folder / "modules.json", modules)


@pytest.mark.parametrize(
    ("damage", "file", "message"),
    [
        (write_pooling(pooling_mode_mean_tokens=True), "1_Pooling/config.json", "pooling by mean_tokens"),
        (write_pooling(pooling_mode="mean"), "1_Pooling/config.json", "pooling by mean"),
        (write_pooling(pooling_mode=["cls", "lasttoken"]), "1_Pooling/config.json", "pooling by cls, lasttoken"),
        (
            write_pooling(pooling_mode_lasttoken=True, pooling_mode_cls_token=True),
            "1_Pooling/config.json",
            "lasttoken, cls_token",
        ),
        (write_pooling(word_embedding_dimension=96), "1_Pooling/config.json", "pooling by nothing"),
        (lambda folder: shutil.rmtree(folder / "1_Pooling"), "1_Pooling/config.json", "does not exist"),
        (damage_modules(["Transformer", "Pooling", "Dense", "Normalize"]), "modules.json", "Dense"),
        (damage_modules(["Transformer"]), "modules.json", "supported is Transformer, Pooling"),
        (damage_modules([]), "modules.json", "supported is Transformer, Pooling"),
        (lambda folder: write_json(folder / "modules.json", {"a": 1}), "modules.json", "damaged"),
        (lambda folder: write_json(folder / "modules.json", [{"idx": 0}]), "modules.json", "damaged"),
        (lambda folder: write_json(folder / "modules.json", [{"type": 0}]), "modules.json", "damaged"),
        (lambda folder: (folder / "modules.json").write_text("["), "modules.json", "damaged"),
        (
            lambda folder: edit_json(folder / "config_sentence_transformers.json", default_prompt_name="other"),
            "config_sentence_transformers.json",
            "'other' is not among the prompts query, document",
        ),
        (edit_prompts(prompts=["a"]), "config_sentence_transformers.json", "prompts must be a JSON object of strings"),
        (edit_prompts(prompts={"query": 3}), "config_sentence_transformers.json", "prompt 'query' must be a string"),
        (edit_prompts(default_prompt_name=["query"]), "config_sentence_transformers.json", "is not among the prompts"),
        (edit_config(num_hidden_layers="3"), "config.json", "num_hidden_layers must be a positive whole number"),
        (edit_limit("abc"), "tokenizer_config.json", "model_max_length must be a positive whole number, not 'abc'"),
        (
            edit_limit(float("inf")),
            "tokenizer_config.json",
            "model_max_length must be a positive whole number, not inf",
        ),
        (edit_limit(-1), "tokenizer_config.json", "model_max_length must be a positive whole number, not -1"),
        (
            lambda folder: write_json(folder / "sentence_bert_config.json", {"max_seq_length": 0}),
            "sentence_bert_config.json",
            "max_seq_length must be a positive whole number, not 0",
        ),
        (
            lambda folder: (folder / "config_sentence_transformers.json").write_text("nothing"),
            "config_sentence_transformers.json",
            "not valid JSON",
        ),
        (edit_config(model_type="qwen2"), "config.json", "model_type is 'qwen2'"),
        (edit_config(attention_bias=True), "config.json", "attention_bias"),
        (edit_config(rope_theta=None, rope_parameters=None), "config.json", "no rope_theta"),
        (edit_config(layer_types=["sliding_attention"] * 3), "config.json", "sliding_attention"),
        (
            edit_config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, "factor": 2.0}),
            "config.json",
            "rope_type is 'yarn'",
        ),
        (lambda folder: (folder / "config.json").unlink(), "config.json", "does not exist"),
        (lambda folder: (folder / "config.json").write_text("{'a': 1}"), "config.json", "not valid JSON"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "", "no tokenizer.json"),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "tokenizer_config.json", "does not exist"),
    ],
)
def test_other_releases_are_refused_by_name(copied_release, damage, file, message):
    damage(copied_release)
    with pytest.raises(ReleaseError, match=message) as error:
        load_quietly(copied_release)
    assert str(copied_release / file) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["no/such/folder", "./none", "/none", "~/none", "none"])
def test_no_such_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ReleaseError, match="neither a folder nor a hub id"):
        f2llm_jax.load(name)


def test_a_file_is_no_release(tiny_release):
    with pytest.raises(ReleaseError, match="neither a folder nor a hub id"):
        f2llm_jax.load(tiny_release / "model.safetensors")


def test_a_folder_has_no_revisions(tiny_release):
    with pytest.raises(ReleaseError, match="revision"):
        f2llm_jax.load(tiny_release, revision="main")


def test_hub_id_while_offline():
    with pytest.raises(ReleaseError, match="nobody/nothing is not in the local hub cache") as error:
        f2llm_jax.load("nobody/nothing")
    assert "HF_HUB_OFFLINE" in str(error.value)


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory, tiny_release) -> Path:
    """A hub cache with two revisions of one repository: the second is on ``main``, the first has a tag."""
    home = tmp_path_factory.mktemp("hub")
    repository = home / "hub" / "models--someone--tiny-v2"
    for revision, commit, seed in (("v1", "1" * 40, 1), ("main", "2" * 40, 0)):
        snapshot = repository / "snapshots" / commit
        snapshot.parent.mkdir(parents=True, exist_ok=True)
        if seed:
            write_release(snapshot, seed=seed)
        else:
            shutil.copytree(tiny_release, snapshot)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    return home


def run_on_hub(home: Path, script: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Runs a script in a process of its own: huggingface_hub reads its environment when it is imported."""
    env = {name: value for name, value in quick_environment().items() if not name.startswith("HF_")}
    env |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OUT": str(tmp_path / "out.npy")}
    preamble = f"import os, numpy as np, f2llm_jax\nTEXTS = {TEXTS!r}\n"
    command = [sys.executable, "-c", preamble + textwrap.dedent(script)]
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path, check=False)


def test_hub_id_from_the_cache(hub_cache, expected, tmp_path):
    script = """
    models = [f2llm_jax.load("someone/tiny-v2", revision=r) for r in (None, "main", "v1", "1" * 40)]
    np.save(os.environ["OUT"], np.stack([model.encode(TEXTS) for model in models]))
    """
    result = run_on_hub(hub_cache, script, tmp_path)
    assert result.returncode == 0, result.stderr
    latest, main, tagged, commit = np.load(tmp_path / "out.npy")
    np.testing.assert_array_equal(latest, expected)
    np.testing.assert_array_equal(main, expected)
    np.testing.assert_array_equal(tagged, commit)
    assert np.abs(tagged - expected).max() > 0.01


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("f2llm_jax.load('someone/other')", "someone/other is not in the local hub cache"),
        ("f2llm_jax.load('someone/tiny-v2', revision='v9')", "not in the local hub cache"),
    ],
)
def test_hub_id_that_is_not_cached(hub_cache, tmp_path, call, message):
    result = run_on_hub(hub_cache, call, tmp_path)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("f2llm_jax.errors.ReleaseError") and message in last
    assert "During handling" not in result.stderr


@pytest.mark.parametrize("error", [TimeoutError("timed out"), RuntimeError("403 Forbidden")])
def test_a_download_that_fails_is_one_clear_error(monkeypatch, error):
    """Whatever its HTTP client or its transfer of large files raises."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=error))
    with pytest.raises(
        ReleaseError, match=rf"downloading a/b failed: {type(error).__name__}: {error}; what was downloaded"
    ):
        f2llm_jax.load("a/b")


def test_a_digest_is_of_every_tensor_and_of_nothing_else(tmp_path: Path) -> None:
    def flip(file: Path, offset: int) -> None:
        content = bytearray(file.read_bytes())
        content[offset] ^= 1
        file.write_bytes(content)

    tensors = {"a": np.zeros(1 << 19, np.float32), "b": np.zeros(1280, np.float32), "c": np.zeros(1 << 20, np.float32)}
    write_json(tmp_path / "config.json", {"padding": " " * (4 << 20)})
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "params" / "norm.weight").mkdir(parents=True)
    (tmp_path / "params" / "norm.weight" / "0").write_bytes(bytes(1280))
    places = [(tmp_path / "config.json", 3 << 20), (tmp_path / "params" / "norm.weight" / "0", 640)]
    places += [(info.file, info.offset + 4000) for info in read_header(tmp_path / "model.safetensors").values()]
    before = model_digest(tmp_path)
    for file, offset in places:
        flip(file, offset)
        assert model_digest(tmp_path) != before, (file, offset)
        flip(file, offset)
    for name in (".git/index", "results/results/tiny/revision/STS17.json", "results/retrieval.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_json(tmp_path / name, {})
    assert model_digest(tmp_path) == before
