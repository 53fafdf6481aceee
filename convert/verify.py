"""Checks whether two model folders are the same model, by their settings, tensors and embeddings."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from f2llm_jax.convert.load import open_checkpoint
from f2llm_jax.convert.safetensors import Checkpoint
from f2llm_jax.convert.table import Tensor, tensor_table
from f2llm_jax.convert.tensors import DTYPES
from f2llm_jax.errors import InputError
from f2llm_jax.release import Release, find_release, read_release
from f2llm_jax.tokens import Tokenizer

TEXTS = (
    "The mitochondrion is the powerhouse of the cell.",
    "如何用一句话解释量子纠缠？",
    "¿Cuál es la capital de Bolivia?",
    "Почему небо голубое?",
    "ما هي فوائد القراءة اليومية؟",
    "सूर्य पूर्व में क्यों उगता है?",
    "def gcd(a, b):\n    return a if b == 0 else gcd(b, a % b)",
    "",
)
"""The texts to compare embeddings on by default."""

# For equal weights; and for weights compared with the same rounded to float16, a dtype that no model is computed in.
EMBEDDING_TOLERANCE = 5e-6
ROUNDED_EMBEDDING_TOLERANCE = 5e-3

_BLOCK_BYTES = 8 << 20

_SHOWN = 10


@dataclasses.dataclass(frozen=True)
class Difference:
    """A tensor that differs.

    Attributes:
        name: its Hugging Face name.
        largest: the largest absolute difference.
        index: its position in the tensor, in the Hugging Face shape.
        values: the values of A and B there.
    """

    name: str
    largest: float
    index: tuple[int, ...]
    values: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of ``verify``.

    Attributes:
        a, b: the folders.
        dtypes: dtypes of the weights of A and of B, named as in config.json; several are joined with a plus.
        tensors: number of tensors compared.
        settings: differences in sizes, tokenizer and prompts, one line each.
        differences: tensors that differ, the largest difference first.
        embeddings: largest difference of an embedding element over all texts, or None if not compared.
        cosine: smallest cosine between A's and B's embeddings of the same text, or None.
    """

    a: Path
    b: Path
    dtypes: tuple[str, str]
    tensors: int
    settings: list[str]
    differences: list[Difference]
    embeddings: float | None = None
    cosine: float | None = None

    @property
    def tolerance(self) -> float:
        """The largest difference between elements of two unit embeddings that still counts as agreement."""
        rounded = set(self.dtypes) == {"float16", "float32"}
        return ROUNDED_EMBEDDING_TOLERANCE if rounded else EMBEDDING_TOLERANCE

    @property
    def agree(self) -> bool:
        """Whether settings and tensors are equal, and embeddings, if compared, differ by at most ``tolerance``."""
        close = self.embeddings is None or self.embeddings <= self.tolerance
        return not self.settings and not self.differences and close

    def __str__(self) -> str:
        lines = [f"A  {self.a}  ({self.dtypes[0]})", f"B  {self.b}  ({self.dtypes[1]})"]
        lines += [f"setting     {line}" for line in self.settings]
        if self.tensors:
            same = self.tensors - len(self.differences)
            note = "" if self.dtypes[0] == self.dtypes[1] else ", where dtypes differ after rounding to the narrower"
            lines.append(f"tensors     {same} of {self.tensors} identical{note}")
        for difference in self.differences[:_SHOWN]:
            a, b = difference.values
            where = ", ".join(map(str, difference.index))
            lines.append(f"  {difference.name}[{where}]: {a:.9g} and {b:.9g} differ by {difference.largest:.3g}")
        if len(self.differences) > _SHOWN:
            lines.append(f"  and {len(self.differences) - _SHOWN} more")
        if self.embeddings is not None:
            lines.append(
                f"embeddings  differ by at most {self.embeddings:.3g} (allowed {self.tolerance:g}), "
                f"least cosine {self.cosine:.7f}"
            )
        return "\n".join([*lines, "A and B agree" if self.agree else "A and B DIFFER"])


def verify(
    a: str | Path,
    b: str | Path,
    *,
    texts: Sequence[str] | None = None,
    embeddings: bool = True,
    show_progress: bool = False,
) -> Report:
    """Compares two models of any kind: release or converted folders, or hub ids.

    Tensors are compared bit by bit, a few MiB at a time. If one model has a narrower dtype, they are compared in that
    dtype, so that a correctly rounded conversion agrees. Embeddings are computed with A, then with B, each loaded
    whole; for the same reason they are computed in bfloat16 if only one model is in bfloat16.

    Args:
        a, b: the models.
        texts: texts to embed, without a prompt and with the query prompt; default ``TEXTS``.
        embeddings: whether to compare embeddings too.
        show_progress: show a progress bar on standard error while tensors are compared.

    Returns:
        The report, to be printed or asked whether they ``agree``.

    Raises:
        ReleaseError: a model cannot be read, or holds a NaN or an infinity.
        InputError: ``texts`` is empty.
    """
    if texts is not None and not texts:
        raise InputError("there are no texts to compare embeddings on")
    releases = [read_release(find_release(model)) for model in (a, b)]
    checkpoints = [open_checkpoint(release.path) for release in releases]
    for release, checkpoint in zip(releases, checkpoints, strict=True):
        checkpoint.check(tensor_table(release.config))
    dtypes = _dtypes(checkpoints[0]), _dtypes(checkpoints[1])
    settings = _compare_settings(*releases)
    shapes = [dataclasses.replace(release.config, dtype="", max_position_embeddings=1) for release in releases]
    if shapes[0] != shapes[1]:
        return Report(releases[0].path, releases[1].path, dtypes, 0, settings, [])
    table = tensor_table(releases[0].config)
    differences = _compare_tensors(checkpoints, table, show_progress)
    count = sum(len(tensor.hf_names) for tensor in table)
    report = Report(releases[0].path, releases[1].path, dtypes, count, settings, differences)
    if not embeddings:
        return report
    largest, cosine = _compare_embeddings(releases, dtypes, list(TEXTS if texts is None else texts))
    return dataclasses.replace(report, embeddings=largest, cosine=cosine)


def _dtypes(checkpoint: Checkpoint) -> str:
    return "+".join(sorted({DTYPES[info.dtype].name for info in checkpoint.tensors.values()}))


def _common_dtype(a: str, b: str) -> np.dtype:
    """The dtype in which two tensors are compared: the narrower of the two; float32 for bfloat16 and float16."""
    if a == b:
        return DTYPES[a]
    return DTYPES[(b if a == "F32" else a) if "F32" in (a, b) else "F32"]


def _compare_settings(a: Release, b: Release) -> list[str]:
    """Differences between the files other than weights; the dtype does not count."""
    tokenizers = [Tokenizer.from_release(release.path) for release in (a, b)]

    def described(release: Release, tokenizer: Tokenizer) -> dict[str, Any]:
        sizes = {name: value for name, value in dataclasses.asdict(release.config).items() if name != "dtype"}
        return {
            **sizes,
            **{f"prompt {name!r}": prompt for name, prompt in release.prompts.items()},
            "default_prompt_name": release.default_prompt_name,
            "max_length": release.max_length,
            "EOS": tokenizer.eos_id,
        }

    values = [described(release, tokenizer) for release, tokenizer in zip((a, b), tokenizers, strict=True)]
    lines = [
        f"{name}: {values[0].get(name)!r} and {values[1].get(name)!r}"
        for name in {**values[0], **values[1]}
        if values[0].get(name) != values[1].get(name)
    ]
    first, second = (_tokenizer_model(tokenizer) for tokenizer in tokenizers)
    return lines if first == second else [*lines, "the tokenizers split text differently"]


def _tokenizer_model(tokenizer: Tokenizer) -> dict[str, Any]:
    """The part of the tokenizer that decides how text is split; special tokens around it are compared by the EOS."""
    values = json.loads(tokenizer.backend.to_str())
    return {name: value for name, value in values.items() if name not in ("post_processor", "truncation", "padding")}


def _compare_tensors(checkpoints: list[Checkpoint], table: list[Tensor], show_progress: bool) -> list[Difference]:
    """The tensors that differ, the largest difference first."""
    from tqdm import tqdm

    found = []
    total = sum(info.nbytes for checkpoint in checkpoints for info in checkpoint.tensors.values())
    with tqdm(total=total, unit="B", unit_scale=True, disable=not show_progress, desc="comparing") as bar:
        for tensor in table:
            for name in tensor.hf_names:
                if difference := _compare_tensor(checkpoints, name, tensor.layer_shape, tensor.hf_shape):
                    found.append(difference)
                bar.update(sum(checkpoint.tensors[name].nbytes for checkpoint in checkpoints))
    return sorted(found, key=lambda difference: -difference.largest)


def _compare_tensor(
    checkpoints: Sequence[Checkpoint], name: str, shape: tuple[int, ...], hf_shape: tuple[int, ...]
) -> Difference | None:
    common = _common_dtype(*(checkpoint.tensors[name].dtype for checkpoint in checkpoints))
    rows = max(1, _BLOCK_BYTES // (4 * math.prod(shape[1:])))
    found: Difference | None = None
    for first in range(0, shape[0], rows):
        index = (slice(first, min(first + rows, shape[0])), *(slice(None),) * (len(shape) - 1))
        values = []
        for checkpoint in checkpoints:
            part = np.empty((index[0].stop - first, *shape[1:]), common)
            checkpoint.read_into(part, name, shape, index)
            values.append(part)
        if np.array_equal(values[0].view(np.uint8), values[1].view(np.uint8)):
            continue
        wide = [part.astype(np.float32).reshape(-1) for part in values]
        gaps = np.abs(wide[0] - wide[1])
        worst = int(gaps.argmax())
        if found is None or gaps[worst] > found.largest:
            place = np.unravel_index(first * math.prod(shape[1:]) + worst, hf_shape)
            found = Difference(
                name, float(gaps[worst]), tuple(map(int, place)), (float(wide[0][worst]), float(wide[1][worst]))
            )
    return found


def _compare_embeddings(releases: Sequence[Release], dtypes: Sequence[str], texts: list[str]) -> tuple[float, float]:
    from f2llm_jax.encoder import load

    dtype = "bfloat16" if any("bfloat16" in name for name in dtypes) and len(set(dtypes)) > 1 else "float32"
    embeddings = []
    for release in releases:
        model = load(release.path, dtype=dtype)
        embeddings.append(np.concatenate([model.encode(texts, prompt=""), model.encode_query(texts)]))
        del model
    largest = float(np.abs(embeddings[0] - embeddings[1]).max())
    return largest, float((embeddings[0] * embeddings[1]).sum(axis=1).min())
