"""Safetensors files: reads the weights of a release, accounting for every byte, and writes them without holding them.

The format: 8 bytes of little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the
tensors' bytes, row-major, without gaps (huggingface/safetensors README).
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from f2llm_jax.config import read_json
from f2llm_jax.convert.table import IGNORED, PREFIX, Tensor
from f2llm_jax.convert.tensors import DTYPES, TensorInfo, check_finite, read_blocks
from f2llm_jax.errors import InputError, ReleaseError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_HEADER_LIMIT = 100_000_000  # the format's own

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one file; checks the size of the file against its header.

    Raises:
        ReleaseError: the file is missing, truncated, not a safetensors file, or has tensors of an unsupported dtype.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(size - 8, _HEADER_LIMIT):
                raise ReleaseError(f"{file} is truncated or no safetensors file: {size} bytes, header of {length}")
            header = json.loads(stream.read(length))
    except FileNotFoundError:
        raise ReleaseError(f"{file} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ReleaseError(f"{file}: the header is damaged: {error}") from None
    if not isinstance(header, dict):
        raise ReleaseError(f"{file}: the header is damaged: no JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _tensor_info(file, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for name, info in sorted(tensors.items(), key=lambda item: item[1].offset):
        if info.offset != end:
            raise ReleaseError(f"{file}: {name} begins at byte {info.offset}, the tensor before it ends at {end}")
        end += info.nbytes
        if end > size:
            raise ReleaseError(f"{file} is truncated: {size} bytes, but {name} ends at {end}")
    if end != size:
        raise ReleaseError(f"{file} has {size} bytes, but its last tensor ends at {end}")
    return tensors


def _tensor_info(file: Path, name: str, entry: Any, start: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole:
        raise ReleaseError(f"{file}: the header is damaged: {name} is {entry!r}")
    if dtype not in DTYPES:
        raise ReleaseError(f"{file}: {name} has dtype {dtype}; supported are {', '.join(DTYPES)}")
    info = TensorInfo(file, dtype, shape, start + begin)
    if info.nbytes != end - begin:
        raise ReleaseError(f"{file}: {name} should have {info.nbytes} bytes, its offsets give {end - begin}")
    return info


class Checkpoint:
    """The weights of a release folder: one file, or shards with an index.

    Attributes:
        folder: the folder.
        tensors: {name without prefix: its location}, without the ignored tensors, in the order of the files.
        bytes_read: bytes of tensors read so far by this class; what Orbax reads does not count.
    """

    def __init__(self, folder: Path):
        """Reads all headers, no weights.

        Raises:
            ReleaseError: there are no weights, a shard is missing, a file is damaged, or a tensor appears twice.
        """
        self.folder = folder
        self.bytes_read = 0
        self.tensors: dict[str, TensorInfo] = {}
        self._lock = threading.Lock()
        for name, info in self._read_infos():
            if name in self.tensors:
                raise ReleaseError(f"{name} is both in {self.tensors[name].file} and in {info.file}")
            self.tensors[name] = info

    def _read_infos(self) -> Iterator[tuple[str, TensorInfo]]:
        for file in _weight_files(self.folder):
            infos = read_header(file)
            for name in sorted(infos, key=lambda name: infos[name].offset):
                if name.removeprefix(PREFIX) not in IGNORED:
                    yield name.removeprefix(PREFIX), infos[name]

    def files(self) -> list[Path]:
        """The files that hold the weights."""
        return _weight_files(self.folder)

    def check(self, table: list[Tensor]) -> None:
        """Checks that the weights are exactly the tensors of the table, with the same shapes.

        Raises:
            ReleaseError: tensors are missing, unexpected or of another shape; the message names them.
        """
        self._compare({name: tensor.hf_shape for tensor in table for name in tensor.hf_names})

    def _compare(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        problems = []
        if missing := [name for name in expected if name not in self.tensors]:
            problems.append(f"missing {some(missing)}")
        if unexpected := [name for name in self.tensors if name not in expected]:
            problems.append(f"unexpected {some(unexpected)}")
        wrong = [
            f"{name} has shape {self.tensors[name].shape}, config.json asks for {shape}"
            for name, shape in expected.items()
            if name in self.tensors and self.tensors[name].shape != shape
        ]
        if wrong:
            problems.append(some(wrong))
        if problems:
            raise ReleaseError(f"the weights in {self.folder} do not fit its config.json: {'; '.join(problems)}")

    def blocks(
        self, name: str, shape: tuple[int, ...], index: tuple[slice, ...] | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Reads a tensor, or a slice of it, some rows at a time.

        Args:
            name: name of the tensor, without prefix.
            shape: the shape to read it in: its own, or one with axes split.
            index: a slice with step 1 for each axis of ``shape``; None for the whole tensor.

        Yields:
            (first row, block [rows, ...] in the file's dtype); the next block may reuse the same memory.

        Raises:
            ReleaseError: the file ended early, or the values hold a NaN or an infinity.
        """
        info = self.tensors[name]
        for first, block in read_blocks(info, shape, index or (slice(None),) * len(shape)):
            with self._lock:
                self.bytes_read += block.nbytes
            check_finite(block, name, info.file)
            yield first, block

    def read_into(self, out: np.ndarray, name: str, shape: tuple[int, ...], index: tuple[slice, ...]) -> None:
        """Reads a slice of a tensor, cast to the dtype of ``out``.

        Args:
            out: an array of the slice's shape, filled in place.
            name, shape, index: as for ``blocks``.

        Raises:
            ReleaseError: the file ended early, or the values hold a NaN or an infinity.
        """
        begin = index[0].indices(shape[0])[0]
        for first, block in self.blocks(name, shape, index):
            out[first - begin : first - begin + len(block)] = block


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / SINGLE, folder / INDEX
    if single.exists():  # takes precedence, as in transformers: an index or shards beside it are from older weights
        return [single]
    if not index.exists():
        raise ReleaseError(f"{folder} has neither {SINGLE} nor {INDEX}")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ReleaseError(f"{index} is damaged: weight_map should be an object of file names")
    names = sorted(set(shards.values()))
    files = [folder / name for name in names]
    if outside := [name for name, file in zip(names, files, strict=True) if file.parent != folder]:
        raise ReleaseError(f"{index} names {', '.join(outside)}, outside its own folder")
    if missing := [file.name for file in files if not file.exists()]:
        raise ReleaseError(f"{index} names {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} missing")
    return files


def parse_size(size: int | str) -> int:
    """Bytes of ``5GB``, ``512MiB`` or a plain number, as transformers reads max_shard_size.

    Raises:
        InputError: it has another form, or is not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B|)\s*", str(size), re.IGNORECASE)
    if match is None or (count := int(float(match[1]) * _UNITS[match[2].upper()])) < 1:
        raise InputError(f"a size is a number of bytes or like 5GB or 512MiB, not {size!r}")
    return count


def plan_shards(
    folder: Path, table: list[Tensor], dtype: str, max_shard_size: int
) -> tuple[dict[str, TensorInfo], dict[Path, bytes]]:
    """Plans the files for the weights of a release.

    Tensors are laid out in the order of layers, without prefix, in shards of at most ``max_shard_size`` bytes (a larger
    tensor gets a shard of its own), with the file names of transformers.

    Args:
        folder: the folder for the files.
        table: the tensors.
        dtype: the dtype of all tensors, a key of ``DTYPES``.
        max_shard_size: in bytes.

    Returns:
        {name: its future location}, and {file: its first bytes}: the header of a shard, all of the index.
    """
    shapes = {name: tensor.hf_shape for tensor in table for name in tensor.hf_names}
    sizes = {name: math.prod(shape) * DTYPES[dtype].itemsize for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    for name in sorted(shapes, key=_reading_order):
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + sizes[name] > max_shard_size:
            shards.append([])
        shards[-1].append(name)
    infos, beginnings, weight_map = {}, {}, {}
    for number, names in enumerate(shards, start=1):
        single = len(shards) == 1
        file = folder / (SINGLE if single else f"model-{number:05}-of-{len(shards):05}.safetensors")
        beginnings[file] = header = _header(names, shapes, sizes, dtype)
        offset = len(header)
        for name in names:
            infos[name] = TensorInfo(file, dtype, shapes[name], offset)
            weight_map[name] = file.name
            offset += sizes[name]
    if len(shards) > 1:
        totals = {"total_parameters": sum(map(math.prod, shapes.values())), "total_size": sum(sizes.values())}
        index = {"metadata": totals, "weight_map": dict(sorted(weight_map.items()))}
        beginnings[folder / INDEX] = (json.dumps(index, indent=2) + "\n").encode()
    return infos, beginnings


def create_shards(infos: Mapping[str, TensorInfo], beginnings: Mapping[Path, bytes]) -> None:
    """Creates the planned files at their full sizes; tensors read as zeros until they are written."""
    sizes: dict[Path, int] = {}
    for info in infos.values():
        sizes[info.file] = max(sizes.get(info.file, 0), info.offset + info.nbytes)
    for file, beginning in beginnings.items():
        with file.open("wb") as stream:
            stream.write(beginning)
            stream.truncate(sizes.get(file, len(beginning)))


def _header(names: list[str], shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int], dtype: str) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        header[name] = {
            "dtype": dtype,
            "shape": list(shapes[name]),
            "data_offsets": [offset, offset + sizes[name]],
        }
        offset += sizes[name]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers map the file and want the tensors aligned
    return len(text).to_bytes(8, "little") + text


def _reading_order(name: str) -> tuple[int, int, str]:
    """Sort key: embedding, layers by number, final norm, which is the order in which a forward pass needs them."""
    layer = re.match(r"layers\.(\d+)\.", name)
    if layer:
        return 1, int(layer[1]), name
    return (0 if name.startswith("embed") else 2), 0, name


def some(names: list[str]) -> str:
    """The first few names, for a message."""
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
