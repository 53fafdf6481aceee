"""Which models agree, which do not, and what the report says of it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conversions import rewrite
from releases import TINY, edit_json, set_appended_token, write_release
from safetensors.torch import load_file

from f2llm_jax.cli import main
from f2llm_jax.convert.conversion import convert_release
from f2llm_jax.convert.verify import TEXTS, Report, verify
from f2llm_jax.errors import InputError, ReleaseError

Q = "layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("release") / "r")


@pytest.fixture(scope="module")
def flax(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_release(release, tmp_path_factory.mktemp("flax") / "f", to="flax")


@pytest.fixture
def copy(release: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(release, tmp_path / "copy"))


def nudge(folder: Path, name: str, index: tuple[int, ...], by: float) -> None:
    tensor = load_file(folder / "model.safetensors")[name].clone()
    tensor[index] += by
    rewrite(folder, **{name: tensor})


def test_a_release_and_its_conversion_agree(release: Path, flax: Path) -> None:
    report = verify(release, flax)
    assert report.agree
    assert (report.tensors, report.differences, report.settings) == (35, [], [])
    assert report.embeddings == 0
    assert "tensors     35 of 35 identical\n" in str(report)
    assert str(report).endswith("\nA and B agree")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_rounded_copy_agrees(release: Path, tmp_path: Path, dtype: str) -> None:
    report = verify(release, convert_release(release, tmp_path / "out", to="flax", dtype=dtype))
    assert report.agree
    assert report.dtypes == ("float32", dtype)
    assert "35 of 35 identical, where dtypes differ after rounding to the narrower" in str(report)


def test_a_wrongly_rounded_copy_differs(release: Path, tmp_path: Path) -> None:
    """Cut off instead of rounded: one unit in the last place, in half of the values."""
    weights = load_file(release / "model.safetensors")
    cut = {
        name: (value.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16) for name, value in weights.items()
    }
    folder = Path(shutil.copytree(release, tmp_path / "cut"))
    rewrite(folder, **cut)
    assert not verify(release, folder, embeddings=False).agree


@pytest.mark.parametrize(
    ("dtypes", "difference", "agree"),
    [
        (("float32", "float32"), None, True),
        (("float32", "float32"), 4e-6, True),
        (("float32", "float32"), 1e-3, False),
        (("bfloat16", "float32"), 1e-3, False),
        (("float16", "float32"), 1e-3, True),
        (("float16", "float32"), 1e-2, False),
    ],
)
def test_embeddings_count(dtypes: tuple[str, str], difference: float | None, agree: bool) -> None:
    assert Report(Path("a"), Path("b"), dtypes, 35, [], [], difference, 1.0).agree == agree


def test_where_and_how_much(copy: Path, flax: Path) -> None:
    nudge(copy, Q, (70, 5), 0.25)
    nudge(copy, "norm.weight", (95,), 1e-6)
    report = verify(flax, copy)
    assert not report.agree
    assert [(d.name, d.index) for d in report.differences] == [(Q, (70, 5)), ("norm.weight", (95,))]
    assert report.differences[0].largest == pytest.approx(0.25)
    assert report.differences[0].values[1] - report.differences[0].values[0] == pytest.approx(0.25)
    assert report.embeddings > 0 and report.cosine < 1
    assert "tensors     33 of 35 identical" in str(report)
    assert f"  {Q}[70, 5]: " in str(report)
    assert str(report).endswith("\nA and B DIFFER")


def test_the_last_bit_counts(copy: Path, release: Path) -> None:
    tensor = load_file(copy / "model.safetensors")[Q].clone()
    tensor.view(torch.int32)[3, 4] ^= 1
    rewrite(copy, **{Q: tensor})
    assert [d.index for d in verify(release, copy, embeddings=False).differences] == [(3, 4)]


SETTINGS: dict[str, tuple[Callable[[Path], None], str]] = {
    "prompt": (
        lambda r: edit_json(r / "config_sentence_transformers.json", prompts={"query": "Q: ", "document": ""}),
        "prompt 'query': ",
    ),
    "a prompt more": (
        lambda r: edit_json(r / "config_sentence_transformers.json", prompts={"query": "", "document": "", "sts": "x"}),
        "prompt 'sts': None and 'x'",
    ),
    "EOS": (lambda r: set_appended_token(r, "<|endoftext|>"), "EOS: 1 and 0"),
    "rope_theta": (
        lambda r: edit_json(r / "config.json", rope_theta=1e4, rope_parameters=None),
        "rope_theta: 1000000.0 and 10000.0",
    ),
    "max_length": (lambda r: edit_json(r / "tokenizer_config.json", model_max_length=99), "max_length: 2048 and 99"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_count(copy: Path, release: Path, name: str) -> None:
    change, line = SETTINGS[name]
    change(copy)
    report = verify(release, copy, embeddings=False)
    assert not report.agree
    assert f"setting     {line}" in str(report)


def test_other_tokens(copy: Path, release: Path) -> None:
    text = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(text.replace('"type": "NFC"', '"type": "NFKC"'))
    assert "the tokenizers split text differently" in str(verify(release, copy, embeddings=False))


def test_models_of_other_sizes(release: Path, tmp_path: Path) -> None:
    other = write_release(tmp_path / "r", dataclasses.replace(TINY, num_hidden_layers=2))
    report = verify(release, other)
    assert not report.agree and report.tensors == 0
    assert "setting     num_hidden_layers: 3 and 2" in str(report)


def test_damaged_models_are_errors(copy: Path, release: Path) -> None:
    tensor = load_file(copy / "model.safetensors")[Q].clone()
    tensor[0, 0] = float("nan")
    rewrite(copy, **{Q: tensor})
    with pytest.raises(ReleaseError, match="holds nan"):
        verify(release, copy)
    with pytest.raises(InputError, match="no texts"):
        verify(release, release, texts=[])


def test_texts_are_multilingual() -> None:
    assert "" in TEXTS
    assert sum(not text.isascii() for text in TEXTS) >= 4


def test_command_line(
    release: Path, flax: Path, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("one\ntwo\n")
    assert main(["verify", str(release), str(flax), "--texts", str(texts)]) == 0
    assert "A and B agree" in capsys.readouterr().out
    nudge(copy, Q, (0, 0), 1.0)
    assert main(["verify", str(release), str(copy), "--no-embeddings"]) == 1
    assert f"{Q}[0, 0]" in capsys.readouterr().out
    assert main(["verify", str(release), str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.startswith("f2llm: error: ")


def test_convert_command_line(release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flax, back = tmp_path / "flax", tmp_path / "back"
    assert main(["convert", str(release), str(flax), "--to", "flax", "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out == f"{flax}\n"
    assert main(["convert", str(flax), str(back), "--to", "hf", "--max-shard-size", "100KB", "--progress"]) == 0
    assert "back: 100%" in capsys.readouterr().err
    assert len(list(back.glob("*.safetensors"))) > 1
    assert main(["convert", str(flax), str(back), "--to", "hf"]) == 2
    assert "back exists; --force replaces it" in capsys.readouterr().err
    assert main(["convert", str(flax), str(back), "--to", "hf", "--force"]) == 0
