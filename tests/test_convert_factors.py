"""ML-Embed releases, written as the reference's ``save_checkpoint`` writes them: U.pth, V.pth, and the model."""

from __future__ import annotations

import builtins
import dataclasses
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conversions import rewrite, tensor_sums
from releases import TINY, torch_model, write_release

import f2llm_jax
from f2llm_jax.convert.conversion import convert_release
from f2llm_jax.errors import ReleaseError

CONFIG = dataclasses.replace(TINY, dtype="bfloat16")
TABLE = "embed_tokens.weight"


def write_ml_embed(folder: Path, *, table: bool) -> tuple[Path, torch.Tensor]:
    """A release with factors of rank 16, as ML-Embed/model.py makes them and ML-Embed/utils.py saves them."""
    write_release(folder, CONFIG, dtype=torch.bfloat16)
    model = torch_model(CONFIG, dtype=torch.bfloat16)
    with torch.no_grad():
        u, s, v = torch.linalg.svd(model.embed_tokens.weight.float(), full_matrices=False)
        u, v = (u[:, :16] @ torch.diag(s[:16])).bfloat16(), v[:16].bfloat16()
        product = u @ v
    torch.save(u, folder / "U.pth")
    torch.save(v, folder / "V.pth")
    rewrite(folder, **{TABLE: product if table else None})
    return folder, product


def loaded_table(folder: Path) -> np.ndarray:
    return np.asarray(f2llm_jax.load(folder, dtype="bfloat16").params["embed_tokens"])


@pytest.mark.parametrize("table", [True, False], ids=["with-table", "factors-alone"])
def test_table_is_the_product(tmp_path: Path, table: bool) -> None:
    folder, product = write_ml_embed(tmp_path / "r", table=table)
    expected = product.view(torch.int16).numpy()
    np.testing.assert_array_equal(loaded_table(folder).view(np.int16), expected)
    for to in ("flax", "hf"):
        out = convert_release(folder, tmp_path / to, to=to)
        np.testing.assert_array_equal(loaded_table(out).view(np.int16), expected)
        assert not list(out.glob("*.pth"))
    assert tensor_sums(tmp_path / "hf")[TABLE][:2] == ("torch.bfloat16", (512, 96))
    rewrite(folder, **{TABLE: product})
    assert tensor_sums(tmp_path / "hf") == tensor_sums(folder)


def test_factors_among_the_weights(tmp_path: Path) -> None:
    folder, product = write_ml_embed(tmp_path / "r", table=False)
    rewrite(folder, U=torch.load(folder / "U.pth").contiguous(), V=torch.load(folder / "V.pth").contiguous())
    for file in folder.glob("*.pth"):
        file.unlink()
    np.testing.assert_array_equal(loaded_table(folder).view(np.int16), product.view(torch.int16).numpy())


def test_factors_onto_a_mesh(tmp_path: Path) -> None:
    folder, product = write_ml_embed(tmp_path / "r", table=False)
    table = f2llm_jax.load(folder, mesh=f2llm_jax.make_mesh(1, 4, 2)).params["embed_tokens"]
    np.testing.assert_array_equal(np.asarray(table), product.float().numpy())
    assert table.dtype == jnp.float32


def test_only_tensors_are_unpickled(tmp_path: Path) -> None:
    folder, _ = write_ml_embed(tmp_path / "r", table=False)
    witness = tmp_path / "witness"

    class Attack:
        def __reduce__(self) -> object:
            return builtins.exec, (f"open({str(witness)!r}, 'w')",)

    torch.save(Attack(), folder / "U.pth")
    with pytest.raises(ReleaseError, match=r"U\.pth holds no plain tensor"):
        f2llm_jax.load(folder)
    assert not witness.exists()


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (torch.zeros(512, 15, dtype=torch.bfloat16), r"cannot be multiplied: U \[512, 15\] .* V \[16, 96\]"),
        (torch.zeros(512, 16), "cannot be multiplied: .*float32.*bfloat16"),
        (torch.zeros(511, 16, dtype=torch.bfloat16), r"embed_tokens\.weight has shape \(511, 96\)"),
        (torch.full((512, 16), float("nan"), dtype=torch.bfloat16), r"embed_tokens\.weight holds nan"),
        ([1, 2], "should hold a tensor"),
        (torch.zeros(512, 16, dtype=torch.int32), "should hold a tensor"),
    ],
)
def test_factors_that_do_not_fit(tmp_path: Path, factor: object, message: str) -> None:
    folder, _ = write_ml_embed(tmp_path / "r", table=False)
    torch.save(factor, folder / "U.pth")
    with pytest.raises(ReleaseError, match=message):
        convert_release(folder, tmp_path / "out", to="flax")


def test_half_of_the_factors_is_a_missing_table(tmp_path: Path) -> None:
    folder, _ = write_ml_embed(tmp_path / "r", table=False)
    (folder / "V.pth").unlink()
    with pytest.raises(ReleaseError, match=r"missing embed_tokens\.weight"):
        f2llm_jax.load(folder)


def test_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = write_ml_embed(tmp_path / "r", table=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ReleaseError, match="multiplying them takes PyTorch: pip install torch"):
        f2llm_jax.load(folder)
