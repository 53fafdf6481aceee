"""Parameters from memory to folders, among them those of a training run."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conversions import tensor_sums
from releases import QUERY_PROMPT, TINY, edit_json, write_release

import f2llm_jax
from f2llm_jax.convert import export
from f2llm_jax.convert.export import export_release
from f2llm_jax.convert.load import load_params, open_checkpoint
from f2llm_jax.embedding import Batch
from f2llm_jax.errors import InputError, ReleaseError
from f2llm_jax.release import read_release

BATCH = Batch(jnp.arange(32, dtype=jnp.int32).reshape(4, 8), jnp.array([8, 5, 3, 1], jnp.int32))
OPTIMIZER = optax.adamw(1e-3)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("release") / "r")


@jax.jit
def train_step(params: dict, state: optax.OptState) -> tuple[dict, optax.OptState]:
    def loss(params: dict) -> jax.Array:
        embeddings = f2llm_jax.embed(params, BATCH, config=TINY, dtype=jnp.float32, kernel="reference")
        return jnp.sum((embeddings @ embeddings.T - jnp.eye(4)) ** 2)

    updates, state = OPTIMIZER.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state


def trained(params: dict, state: optax.OptState, steps: int) -> tuple[dict, optax.OptState]:
    for _ in range(steps):
        params, state = train_step(params, state)
    return params, state


@pytest.mark.parametrize("to", ["flax", "hf"])
@pytest.mark.parametrize("sizes", [None, (2, 2, 2)], ids=["device", "mesh"])
def test_training_continues_identically(
    release: Path, tmp_path: Path, to: str, sizes: tuple[int, int, int] | None
) -> None:
    """Exported in the middle of a run and loaded again, the parameters go where they would have gone."""
    mesh = None if sizes is None else f2llm_jax.make_mesh(*sizes)
    start = load_params(open_checkpoint(release), TINY, mesh=mesh)
    params, state = trained(start, OPTIMIZER.init(start), steps=3)
    out = export_release(params, TINY, tmp_path / "out", like=release, to=to)
    loaded = load_params(open_checkpoint(out), TINY, mesh=mesh)
    shardings = jax.tree.map(lambda x: x.sharding, params)
    expected, _ = trained(params, state, steps=2)
    result, _ = trained(jax.device_put(loaded, shardings), state, steps=2)
    for x, y in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    assert tensor_sums(out if to == "hf" else release) != tensor_sums(release) or to == "flax"


def test_numpy_parameters_and_prompts(release: Path, tmp_path: Path) -> None:
    params = jax.tree.map(np.asarray, load_params(open_checkpoint(release), TINY))
    out = export_release(params, TINY, tmp_path / "out", like=release, prompts={"query": "Q: ", "document": "D: "})
    assert tensor_sums(out) == tensor_sums(release)
    assert f2llm_jax.load(out).prompts == {"query": "Q: ", "document": "D: "}
    assert f2llm_jax.load(release).prompts["query"] == QUERY_PROMPT


def test_of_a_hub_model_only_the_settings_are_downloaded(
    release: Path, tmp_path: Path, hub_of_settings: list[tuple[str, str | None]]
) -> None:
    out = export_release(load_params(open_checkpoint(release), TINY), TINY, tmp_path / "out", like="owner/name")
    assert hub_of_settings == [("owner/name", None)]
    assert f2llm_jax.load(out).prompts["query"] == QUERY_PROMPT


def test_a_default_prompt_that_is_not_written_is_none(release: Path, tmp_path: Path) -> None:
    settings = {"prompts": {"query": "q: ", "cluster": "c: "}, "default_prompt_name": "cluster"}
    like = Path(shutil.copytree(release, tmp_path / "like"))
    edit_json(like / "config_sentence_transformers.json", **settings)
    params = load_params(open_checkpoint(release), TINY)
    for prompts, expected in ((None, "cluster"), ({"query": "Q: ", "document": ""}, None)):
        out = export_release(params, TINY, tmp_path / str(expected), like=like, prompts=prompts)
        assert read_release(out).default_prompt_name == expected


def test_the_folder_appears_in_a_step_that_all_processes_hear_of(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that its failure fails all of them."""
    committed = []
    original = export._together

    def together(step: Callable[[], None]) -> None:
        before = (tmp_path / "out").exists()
        original(step)
        committed.append(before != (tmp_path / "out").exists())

    monkeypatch.setattr(export, "_together", together)
    export_release(load_params(open_checkpoint(release), TINY), TINY, tmp_path / "out", like=release)
    assert any(committed)


def test_a_folder_that_holds_the_model_is_not_replaced(release: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(release, tmp_path / "out" / "model"))
    params, config = load_params(open_checkpoint(model), TINY), TINY
    with pytest.raises(
        InputError, match=r"out is, or holds, the model .*out/model, and would replace it; write to another"
    ):
        export_release(params, config, tmp_path / "out", like=model, force=True)
    assert tensor_sums(model) == tensor_sums(release)


def test_random_parameters(release: Path, tmp_path: Path) -> None:
    """A model that was never a release: made here, with a tokenizer from elsewhere, of other sizes than that one's."""
    config = dataclasses.replace(TINY, num_hidden_layers=2, hidden_size=64)
    params = f2llm_jax.init_params(config, jax.random.key(0))
    model = f2llm_jax.load(export_release(params, config, tmp_path / "out", like=release, dtype="bfloat16"))
    assert model.config == dataclasses.replace(config, dtype="bfloat16")
    for x, y in zip(jax.tree.leaves(model.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(x, y.astype(jnp.bfloat16).astype(jnp.float32))


def test_nan_is_named(release: Path, tmp_path: Path) -> None:
    params = load_params(open_checkpoint(release), TINY)
    params["layers"]["mlp"]["down_proj"]["weight"] = (
        params["layers"]["mlp"]["down_proj"]["weight"].at[2, 1, 0].set(jnp.nan)
    )
    with pytest.raises(ReleaseError, match=r"the parameters: layers\.mlp\.down_proj\.weight holds nan"):
        export_release(params, TINY, tmp_path / "out", like=release)
    assert not list(tmp_path.iterdir())


def test_parameters_that_do_not_fit(release: Path, tmp_path: Path) -> None:
    params = load_params(open_checkpoint(release), TINY)

    def refused(message: str, params: dict = params, **options: object) -> None:
        with pytest.raises(InputError, match=message):
            export_release(params, options.pop("config", TINY), tmp_path / "out", like=release, **options)
        assert not list(tmp_path.iterdir())

    refused(r"the parameters lack embed_tokens", {name: params[name] for name in ("layers", "norm")})
    refused(r"hold extra, which the model of this config does not have", {**params, "extra": jnp.zeros(1)})
    refused(
        r"norm\.weight has shape \(95,\), the config asks for \(96,\)", {**params, "norm": {"weight": jnp.ones(95)}}
    )
    refused(r"embed_tokens has shape \(512, 96\)", config=dataclasses.replace(TINY, vocab_size=513))
    refused(
        r"dtypes bfloat16, float32: give dtype=", {**params, "embed_tokens": params["embed_tokens"].astype("bfloat16")}
    )
    refused("dtype must be one of", dtype="int8")
    refused("written as hf or flax", to="onnx")


def test_leftovers_of_a_killed_export_do_not_stop_the_next(release: Path, tmp_path: Path) -> None:
    from f2llm_jax.convert.staging import Staging

    Staging(tmp_path / "out", {"what": "export"}).close()
    params = load_params(open_checkpoint(release), TINY)
    assert tensor_sums(export_release(params, TINY, tmp_path / "out", like=release)) == tensor_sums(release)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
