"""What the tests of conversions share: checksums of tensors, and large releases that are quick to write."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from releases import write_around, write_json, write_tiny_tokenizer

from f2llm_jax.config import ModelConfig
from f2llm_jax.convert.table import tensor_table

Sums = dict[str, tuple[str, tuple[int, ...], str]]


def tensor_sums(folder: Path) -> Sums:
    """{name without prefix: (dtype, shape, SHA-256)} of a release's weights, read by safetensors itself; no lm_head."""
    sums: Sums = {}
    for file in folder.glob("*.safetensors"):
        with safetensors.safe_open(file, "pt") as stream:
            assert stream.metadata() == {"format": "pt"}
            for name in stream.keys():  # noqa: SIM118, it is no dict
                value = stream.get_tensor(name).contiguous()
                digest = hashlib.sha256(value.view(torch.uint8).numpy()).hexdigest()
                sums[name.removeprefix("model.")] = str(value.dtype), tuple(value.shape), digest
    sums.pop("lm_head.weight", None)
    return sums


def write_random_release(folder: Path, config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A release of one file, its weights cut from one stretch of random bits, at a new place for every tensor."""
    folder.mkdir(parents=True)
    # Without the highest bit of the exponent every pattern is a finite number, in all three dtypes.
    pool = np.random.default_rng(0).integers(0, 1 << 16, 1 << 24, np.uint16) & np.uint16(0xBFFF)
    tensors = {}
    for tensor in tensor_table(config):
        for name in tensor.hf_names:
            halves = int(np.prod(tensor.hf_shape)) * dtype.itemsize // 2
            start = 12345 * len(tensors) % (len(pool) // 2)
            bits = pool[start : start + halves] if start + halves <= len(pool) else np.resize(pool, halves)
            tensors[name] = torch.from_numpy(bits.view(np.int16)).view(dtype).reshape(tensor.hf_shape)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = dataclasses.replace(config, dtype=str(dtype).removeprefix("torch."))
    write_json(folder / "config.json", config.to_hf())
    write_around(folder, config)
    write_tiny_tokenizer(folder)
    return folder


def edit_tensor(folder: Path, name: str, **changes: object) -> None:
    """Changes the entry of a tensor in the header of model.safetensors, its bytes staying as they are."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[name].update(changes)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Writes model.safetensors again with tensors set, or removed where None."""
    file = folder / "model.safetensors"
    tensors = {**safetensors.torch.load_file(file), **changes}
    kept = {name: value for name, value in tensors.items() if value is not None}
    safetensors.torch.save_file(kept, file, metadata={"format": "pt"})
