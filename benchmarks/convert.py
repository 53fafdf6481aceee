"""Compares converting a release both ways with copying it: time, peak memory, and that no bit changes.

    python benchmarks/convert.py FOLDER --size 14B

writes a bfloat16 release with random weights to FOLDER, copies it, converts it to Flax and back to a release, each from
a cold page cache and until the bytes are on the disk, and compares the SHA-256 of every tensor before and after. At
most two copies of the weights are on the disk at a time (2 x 28 GB for the 14B); FOLDER is deleted at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import processes
from inputs import new_folder

from f2llm_jax.config import ModelConfig
from f2llm_jax.configs.models import MODELS
from f2llm_jax.convert.load import open_checkpoint
from f2llm_jax.convert.safetensors import create_shards, plan_shards
from f2llm_jax.convert.table import tensor_table
from f2llm_jax.convert.tensors import DTYPES, write_part


@dataclasses.dataclass
class Step:
    name: str
    seconds: float
    peak_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="on the disk to measure; it is made, and deleted at the end")
    parser.add_argument("--size", default="80M", choices=MODELS)
    args = parser.parse_args()
    release, copy, flax, back = (args.folder / name for name in ("release", "copy", "flax", "back"))
    with new_folder(args.folder):
        sums, nbytes = write_random_release(release, MODELS[args.size])
        copying = measure("copy", ["cp", "-r", "--reflink=never", str(release), str(copy)], release, copy)
        shutil.rmtree(copy)
        to_flax = measure("release to Flax", converting(release, flax, "flax"), release, flax)
        shutil.rmtree(release)
        to_hf = measure("Flax to release", converting(flax, back, "hf"), flax, back)
        shutil.rmtree(flax)
        identical = checksums(back) == sums
    print("| size | step | weights, GB | seconds | x copying | peak resident, GB |")
    print("|---|---|---|---|---|---|")
    for step in (copying, to_flax, to_hf):
        ratio = step.seconds / copying.seconds
        print(
            f"| {args.size} | {step.name} | {nbytes / 1e9:.2f} | {step.seconds:.1f} | {ratio:.2f} "
            f"| {step.peak_bytes / 1e9:.2f} |"
        )
    print(f"all {len(sums)} tensors bit-identical after both: {'yes' if identical else 'NO'}")
    sys.exit(not identical)


def write_random_release(folder: Path, config: ModelConfig) -> tuple[dict[str, str], int]:
    """Writes a release in shards of 5 GB; returns the SHA-256 of every tensor, and the bytes of all tensors."""
    import tokenizers

    folder.mkdir()
    infos, beginnings = plan_shards(folder, tensor_table(config), "BF16", 5 * 10**9)
    create_shards(infos, beginnings)
    random, sums = np.random.Generator(np.random.SFC64(0)), {}
    for name, info in infos.items():
        digest, rest = hashlib.sha256(), (slice(None),) * (len(info.shape) - 1)
        rows = max(1, (8 << 20) // (2 * int(np.prod(info.shape[1:]))))
        for first in range(0, info.shape[0], rows):
            shape = (min(rows, info.shape[0] - first), *info.shape[1:])
            # With the highest exponent bit cleared, every bit pattern is a finite number below 2.
            bits = random.integers(0, 1 << 16, shape, np.uint16) & np.uint16(0xBFFF)
            write_part(info, info.shape, (slice(first, first + shape[0]), *rest), bits.view(DTYPES["BF16"]))
            digest.update(bits)
        sums[name] = digest.hexdigest()
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0, "<unk>": 1}, unk_token="<unk>"))
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    return sums, sum(info.nbytes for info in infos.values())


def checksums(folder: Path) -> dict[str, str]:
    """The SHA-256 of every tensor of a release."""
    checkpoint, sums = open_checkpoint(folder), {}
    for name, info in checkpoint.tensors.items():
        digest = hashlib.sha256()
        for _, block in checkpoint.blocks(name, info.shape):
            digest.update(block.view(np.uint8))
        sums[name] = digest.hexdigest()
    return sums


def converting(source: Path, out: Path, to: str) -> list[str]:
    return [sys.executable, "-m", "f2llm_jax.cli", "convert", str(source), str(out), "--to", to, "--quiet"]


def measure(name: str, command: list[str], source: Path, out: Path) -> Step:
    """Times a command until its output is on the disk; peak memory is that of its process."""
    each_file(source, os.fsync)
    each_file(source, lambda descriptor: os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED))
    start = time.perf_counter()
    peak = processes.run(command)
    each_file(out, os.fsync)
    return Step(name, time.perf_counter() - start, peak)


def each_file(folder: Path, action: Callable[[int], None]) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                action(descriptor)
            finally:
                os.close(descriptor)


if __name__ == "__main__":
    main()
