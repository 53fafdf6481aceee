"""Pruning: what is measured, what is chosen, and that nothing but the chosen changes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from conversions import tensor_sums
from raw_data import rows, write_raw
from releases import TINY, bitext, write_release
from sentence_transformers import SentenceTransformer
from transformers import Qwen3Model

import f2llm_jax
from f2llm_jax.cli import main
from f2llm_jax.configs.models import MODELS
from f2llm_jax.convert.load import load_params, open_checkpoint
from f2llm_jax.embedding import Batch
from f2llm_jax.errors import InputError
from f2llm_jax.model import abstract_params, count_parameters
from f2llm_jax.train.prepare import prepare
from f2llm_jax.train.prune import Measured, Sums, channel_scores, measure, prune, smaller_params

CALIBRATION = ["the quick brown fox", "jumps", "over the lazy dog and the meshes, in größter Eile", "東京", ""] * 4
HELD_OUT = ["a passage about foxes", "dogs", "Instruct: retrieve\nQuery: lazy", "Größe 東"]
LARGEST_DIFFERENCE = 5e-6

# What is constructed to be zero: hidden channels, MLP channels of each layer, and a layer that adds nothing.
DEAD_HIDDEN = np.sort(np.random.default_rng(0).permutation(TINY.hidden_size)[:33])
DEAD_MLP = np.sort(np.stack([np.random.default_rng(n).permutation(TINY.intermediate_size)[:48] for n in range(3)]))
IDLE_LAYER = 1


@pytest.fixture(scope="module")
def calibration(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in CALIBRATION))
    return file


@pytest.fixture(scope="module")
def dead_release(tmp_path_factory) -> Path:
    """The tiny release with channels that nothing is ever written to. What reads them, and their norms, stay."""
    folder = write_release(tmp_path_factory.mktemp("dead") / "r")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["embed_tokens.weight"][:, DEAD_HIDDEN] = 0
    for layer, dead in enumerate(DEAD_MLP):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            weights[f"layers.{layer}.{name}.weight"][DEAD_HIDDEN] = 0
        weights[f"layers.{layer}.mlp.up_proj.weight"][dead] = 0
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def without(dead: np.ndarray, size: int) -> list[int]:
    return np.setdiff1d(np.arange(size), dead).tolist()


def encode_with_torch(folder: Path, texts: list[str]) -> np.ndarray:
    """Unit embeddings by transformers alone, one text at a time."""
    model = Qwen3Model.from_pretrained(folder).eval()
    tokenizer = f2llm_jax.load(folder).tokenizer
    states = []
    with torch.no_grad():
        for ids in tokenizer.encode(texts, 512)[0]:
            states.append(model(torch.tensor(ids[None])).last_hidden_state[0, -1])
    return torch.nn.functional.normalize(torch.stack(states), dim=-1).numpy()


# --- what goes, and what stays


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pruning_nothing_is_the_identity(tmp_path, calibration, dtype):
    config = dataclasses.replace(TINY, dtype=str(dtype).removeprefix("torch."))
    release = write_release(tmp_path / "r", config, dtype=dtype)
    report = prune(release, tmp_path / "out", calibration=calibration)
    assert tensor_sums(tmp_path / "out") == tensor_sums(release)
    assert f2llm_jax.load(tmp_path / "out").config == config
    assert all(share == 1 for shares in report["energy_kept"].values() for share in shares)


@pytest.mark.parametrize("importance", ["l2", "mean", "weighted"])
def test_dead_channels_go_and_nothing_changes(tmp_path, calibration, dead_release, importance):
    sizes = {"hidden": TINY.hidden_size - DEAD_HIDDEN.size, "mlp": TINY.intermediate_size - DEAD_MLP.shape[1]}
    out = tmp_path / "out"
    report = prune(dead_release, out, calibration=calibration, importance=importance, **sizes)
    kept = report["hidden_channels"]
    assert sorted(kept) == without(DEAD_HIDDEN, TINY.hidden_size)
    # What the teacher's first channels are compared with are those very channels, if they were kept.
    assert all(kept[channel] == channel for channel in kept if channel < len(kept))
    assert report["mlp_channels"] == [without(dead, TINY.intermediate_size) for dead in DEAD_MLP]
    before, after = f2llm_jax.load(dead_release), f2llm_jax.load(out)
    assert (after.config.rms_norm_eps, after.config.num_attention_heads) == (1e-6, TINY.num_attention_heads)
    expected = before.encode(HELD_OUT)
    assert np.abs(expected[:, DEAD_HIDDEN]).max() == 0
    np.testing.assert_allclose(after.encode(HELD_OUT), expected[:, kept], rtol=0, atol=1e-6)
    # Not the direction alone: the unnormalised states, which distillation compares, are the same too.
    ids = after.tokenizer.encode(HELD_OUT, 64)[0]
    longest = max(map(len, ids))
    batch = Batch(np.stack([np.resize(x, longest) for x in ids]), np.array([len(x) for x in ids], np.int32))
    states = [f2llm_jax.eos_states(model.params, batch, config=model.config) for model in (before, after)]
    np.testing.assert_allclose(states[1], states[0][:, kept], rtol=0, atol=1e-5)
    np.testing.assert_allclose(encode_with_torch(out, HELD_OUT), expected[:, kept], rtol=0, atol=1e-6)


def test_an_idle_layer_goes_by_change(tmp_path, calibration):
    release = write_release(tmp_path / "r")
    weights = safetensors.torch.load_file(release / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"layers.{IDLE_LAYER}.{name}.weight"][:] = 0
    safetensors.torch.save_file(weights, release / "model.safetensors", metadata={"format": "pt"})
    report = prune(release, tmp_path / "out", calibration=calibration, layers=2, layers_by="change")
    assert report["layers"] == [0, 2]
    assert report["change"][IDLE_LAYER] == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(
        f2llm_jax.load(tmp_path / "out").encode(HELD_OUT), f2llm_jax.load(release).encode(HELD_OUT), rtol=0, atol=1e-6
    )


def test_the_first_layers_stay(tmp_path, calibration, tiny_release):
    report = prune(tiny_release, tmp_path / "out", calibration=calibration, layers=2)
    assert report["layers"] == [0, 1] and report["change"] is None
    sums = tensor_sums(tiny_release)
    assert tensor_sums(tmp_path / "out") == {k: v for k, v in sums.items() if not k.startswith("layers.2.")}


def test_how_much_a_channel_counts():
    """By mean the first of three, by l2 the second, weighted the third; the output has no weights that read it."""
    site = ([[5.0, 4.0, 3.0]], [[9.0, 25.0, 16.0]])  # roots 3, 5, 4
    sites = {"layers.mlp.up_proj": Sums("embed", *map(np.array, site)), "": Sums("embed", np.ones(3), np.ones(3))}
    sites["layers.mlp.down_proj"] = sites["layers.mlp.up_proj"]._replace(axis="mlp")
    measured = Measured(1, 1, sites, np.zeros(1))
    weights = dict.fromkeys(sites, np.array([[1.0, 1.0, 3.0]]))
    shares = {"mean": [5 / 12, 4 / 12, 3 / 12], "l2": [3 / 12, 5 / 12, 4 / 12], "weighted": [3 / 20, 5 / 20, 12 / 20]}
    for importance, share in shares.items():
        mlp = channel_scores(measured, "mlp", importance, weights)
        np.testing.assert_allclose(mlp, [share])
        embed = channel_scores(measured, "embed", importance, weights)
        np.testing.assert_allclose(embed, (np.array(share) + 1 / 3) / 2)


# --- what is measured


@pytest.mark.parametrize("sizes", [None, (2, 2, 2)], ids=["device", "mesh"])
def test_measured_is_what_torch_sees(tiny_release, sizes):
    """transformers, one text at a time: no padding is there to be counted."""
    model, tokenizer = Qwen3Model.from_pretrained(tiny_release).eval(), f2llm_jax.load(tiny_release).tokenizer
    sequences = tokenizer.encode(CALIBRATION[:5], 64)[0]
    names = {"q_proj": "attention", "v_proj": "attention", "gate_proj": "mlp", "down_proj": "mlp"}
    inputs: dict[str, list] = {}

    def note(path: str, values: torch.Tensor) -> None:
        inputs.setdefault(path, []).append(values.detach().double().numpy()[0])

    for layer, block in enumerate(model.layers):
        block.register_forward_hook(lambda _, args, out, layer=layer: note(f"in.{layer}", args[0]))
        block.register_forward_hook(lambda _, args, out, layer=layer: note(f"out.{layer}", out))
        for name, part in names.items():
            module = getattr(block.self_attn if part == "attention" else block.mlp, name)
            path = f"layers.{part}.{name}.{layer}"
            module.register_forward_pre_hook(lambda _, args, path=path: note(path, args[0]))
    with torch.no_grad():
        for ids in sequences:
            note("", model(torch.tensor(ids[None])).last_hidden_state)
    seen = {path: np.concatenate(values) for path, values in inputs.items()}

    mesh = None if sizes is None else f2llm_jax.make_mesh(*sizes)
    found = measure(load_params(open_checkpoint(tiny_release), TINY, mesh=mesh), TINY, sequences, mesh=mesh)
    assert (found.texts, found.tokens) == (5, sum(map(len, sequences)))
    for path, sums in found.sites.items():
        if path and path.rpartition(".")[2] not in names:
            continue
        layers = [path] if not path else [f"{path}.{layer}" for layer in range(3)]
        for got, function in ((sums.magnitude, np.abs), (sums.square, np.square)):
            expected = np.stack([function(seen[name]).sum(axis=0) for name in layers])
            np.testing.assert_allclose(np.atleast_2d(got), expected, rtol=1e-4, atol=1e-6 * expected.max())
    for layer in range(3):
        x, y = seen[f"in.{layer}"], seen[f"out.{layer}"]
        cosine = (x * y).sum(axis=1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
        assert found.change[layer] == pytest.approx((1 - cosine).mean(), rel=1e-4)


def test_a_mesh_cuts_what_a_device_cuts(tmp_path, calibration, tiny_release, capsys):
    sizes = ["--hidden", "48", "--mlp", "80", "--layers", "2", "--calibration", str(calibration)]
    assert main(["prune", str(tiny_release), str(tmp_path / "one"), *sizes]) == 0
    assert "48" not in capsys.readouterr().err
    assert main(["prune", str(tiny_release), str(tmp_path / "eight"), *sizes, "--mesh", "data=2,fsdp=2,tensor=2"]) == 0
    assert tensor_sums(tmp_path / "one") == tensor_sums(tmp_path / "eight")
    assert main(["prune", str(tiny_release), str(tmp_path / "x"), *sizes, "--mesh", "fsdp=7"]) == 2
    assert "a mesh data=1 fsdp=7 tensor=1 takes 7 devices, not 8" in capsys.readouterr().err


# --- sizes and files


@pytest.mark.parametrize(("size", "count"), [("80M", 80_084_288), ("160M", 159_185_024), ("330M", 334_349_184)])
def test_pruned_0_6b_has_the_published_parameters(size, count):
    large, small = MODELS["0.6B"], MODELS[size]
    keep = {
        "layers": np.arange(small.num_hidden_layers),
        "embed": np.arange(small.hidden_size),
        "mlp": np.tile(np.arange(small.intermediate_size), (small.num_hidden_layers, 1)),
    }
    config = large

    def both(params):
        nonlocal config
        params, config = smaller_params(params, config, {"layers": keep.pop("layers")}, None)
        params, config = smaller_params(params, config, keep, None)
        return params

    shapes = jax.eval_shape(both, f2llm_jax.model.nn.unbox(abstract_params(large)))
    assert config == small and count_parameters(small) == count
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
    jax.tree.map(
        lambda x, y: x.shape == y.shape or pytest.fail(), shapes, f2llm_jax.model.nn.unbox(abstract_params(small))
    )


def test_a_pruned_release_is_everybodys(tmp_path, real_release):
    """The real tokenizer, and sentences in 106 languages to calibrate and to compare with."""
    texts = bitext(1)
    (tmp_path / "texts.txt").write_text("\n".join(text.replace("\n", " ") for text in texts[::2]))
    out = tmp_path / "out"
    report = prune(real_release, out, calibration=tmp_path / "texts.txt", hidden=48, mlp=96, layers=3, texts=40)
    assert report["calibration"]["texts"] == 40
    model = f2llm_jax.load(out)
    assert report["to"]["parameters"] == count_parameters(model.config)
    reference = SentenceTransformer(str(out), device="cpu")
    assert sum(parameter.numel() for parameter in reference.parameters()) == report["to"]["parameters"]
    np.testing.assert_allclose(
        model.encode(texts[1::2]), reference.encode(texts[1::2]), rtol=0, atol=LARGEST_DIFFERENCE
    )
    np.testing.assert_allclose(
        model.encode(HELD_OUT), encode_with_torch(out, HELD_OUT), rtol=0, atol=LARGEST_DIFFERENCE
    )


def test_the_report_says_what_was_kept(tmp_path, tiny_release):
    data = prepare(
        write_raw(tmp_path / "raw", {"aya": rows(40, negatives=1)}), tiny_release, tmp_path / "data", workers=1
    )
    assert data["documents"]
    out = tmp_path / "out"
    arguments = ["--hidden", "64", "--mlp", "100", "--layers", "2", "--texts", "20", "--max-length", "8"]
    assert main(["prune", str(tiny_release), str(out), "--calibration", str(tmp_path / "data"), *arguments]) == 0
    report = json.loads((out / "pruning.json").read_text())
    assert report["calibration"]["texts"] == 20 and report["calibration"]["tokens"] <= 20 * 8
    assert [len(channels) for channels in report["mlp_channels"]] == [100, 100]
    assert len(report["hidden_channels"]) == 64 and report["to"]["parameters"] < report["from"]["parameters"]
    energy = report["energy_kept"]
    assert set(energy) == {"attention: hidden", "mlp: hidden", "mlp: mlp", "output: hidden"}
    # The largest 64 of 96 have more than their share.
    assert all(64 / 96 < share < 1 for name in energy if "hidden" in name for share in energy[name])
    assert all(100 / 160 < share < 1 for share in energy["mlp: mlp"])
    assert (out / "pruning.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hidden", "97"], "hidden_size can be cut to 1..96, not to 97"),
        (["--to", "80M"], "hidden_size can be cut to 1..96, not to 320"),
        (["--to", "80M", "--mlp", "8"], "--to 80M states all sizes; leave out --mlp"),
        ([], "to which size?"),
        (["--hidden", "50", "--mesh", "fsdp=4,tensor=2"], "50 embed do not divide over fsdp=4"),
        (["--hidden", "8", "--calibration", "EMPTY"], "EMPTY holds no texts to calibrate with"),
        (["--hidden", "8", "--calibration", "~/EMPTY"], "EMPTY holds no texts to calibrate with"),
        (["--hidden", "8", "--calibration", "FOLDER"], "holds no prepared data"),
    ],
)
def test_what_cannot_be_pruned_is_refused(tmp_path, monkeypatch, calibration, tiny_release, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("EMPTY").with_suffix(".txt").touch()
    Path("FOLDER").mkdir()
    arguments = [argument.replace("EMPTY", "EMPTY.txt") for argument in arguments]
    given = [] if "--calibration" in arguments else ["--calibration", str(calibration)]
    assert main(["prune", str(tiny_release), "out", *arguments, *given]) == 2
    assert message.replace("EMPTY", "EMPTY.txt") in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize("mesh", ["data", "data=0", "rows=2", "data=2,data=2", "2x2"])
def test_a_mesh_is_axes_and_sizes(mesh, capsys):
    with pytest.raises(SystemExit):
        main(["prune", "r", "o", "--calibration", "f", "--hidden", "8", "--mesh", mesh])
    assert f"takes sizes of data, fsdp, tensor, like data=2,tensor=4, not {mesh!r}" in capsys.readouterr().err


def test_arguments_of_the_function(tmp_path, calibration, tiny_release):
    with pytest.raises(InputError, match="importance must be one of l2, mean, weighted, not 'l1'"):
        prune(tiny_release, tmp_path / "out", calibration=calibration, importance="l1")
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists; --force replaces it"):
        prune(tiny_release, tmp_path / "out", calibration=calibration)
    for out in (tiny_release, tiny_release.parent):
        with pytest.raises(
            InputError, match=r"is, or holds, the model .* and would replace it; write to another folder"
        ):
            prune(tiny_release, out, calibration=calibration, force=True)
