"""Converted folders: a release's files around ``params/``, an Orbax checkpoint of the parameter tree.

We write Orbax's format with one directory per array: Zarr version 2, uncompressed, one chunk per layer. Orbax writes
the metadata, and any Orbax reads the checkpoint, onto any mesh. A chunk is a file with exactly the bytes of one Hugging
Face tensor, so that conversion copies bytes in both directions, and a process reads only what its shards need.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from f2llm_jax.config import read_json
from f2llm_jax.convert.safetensors import Checkpoint, some
from f2llm_jax.convert.staging import write_text
from f2llm_jax.convert.table import HF_NAMES, Tensor
from f2llm_jax.convert.tensors import CODES, DTYPES, TensorInfo, array_blocks, check_finite
from f2llm_jax.errors import ReleaseError

PARAMS = "params"
MARKER = "f2llm_jax.json"
FORMAT_VERSION = 1

_ARRAY = ".zarray"

# Zarr's names of dtypes.
_ZARR_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "bfloat16"}


class FlaxCheckpoint(Checkpoint):
    """The weights of a converted folder, read like those of a release, by their Hugging Face names.

    The shape of a tensor is here that of one layer of the parameter, with (heads, head_dim) as separate axes.
    """

    def __init__(self, folder: Path):
        """Reads the arrays' metadata, no weights.

        Raises:
            ReleaseError: the folder has another format version, or an array or a chunk of one is missing or damaged.
        """
        version = read_json(folder / MARKER).get("format_version")
        if version != FORMAT_VERSION:
            raise ReleaseError(f"{folder / MARKER}: format_version {version!r}; this f2llm_jax reads {FORMAT_VERSION}")
        super().__init__(folder)

    def files(self) -> list[Path]:
        return _files_in(self.folder / PARAMS)

    def _read_infos(self) -> Iterator[tuple[str, TensorInfo]]:
        for file in sorted((self.folder / PARAMS).glob(f"*/{_ARRAY}")):
            yield from _chunks(file).items()

    def check(self, table: list[Tensor]) -> None:
        self._compare({name: tensor.layer_shape for tensor in table for name in tensor.hf_names})


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _chunks(file: Path) -> dict[str, TensorInfo]:
    """The Hugging Face tensors in the chunks of an array; checks that every chunk exists at its full size."""
    array, path = read_json(file), file.parent.name
    codes = {name: code for code, name in _ZARR_DTYPES.items()}
    stacked = path.startswith("layers.")
    try:
        shape, code = tuple(array["shape"]), codes[array["dtype"]]
        layer_shape = shape[1:] if stacked else shape
        chunks = [1, *layer_shape] if stacked else [*layer_shape]
        plain = array["chunks"] == chunks and array["compressor"] is array["filters"] is None and array["order"] == "C"
    except (KeyError, TypeError):
        plain = False
    if not plain:
        raise ReleaseError(f"{file} is damaged, or not written by f2llm_jax: {array}")
    pattern = HF_NAMES.get(path, path)
    infos = {}
    for layer in range(shape[0] if stacked else 1):
        chunk = file.parent / _chunk_name(layer if stacked else None, layer_shape)
        info = infos[pattern.format(layer=layer)] = TensorInfo(chunk, code, layer_shape, 0)
        if not chunk.exists():
            raise ReleaseError(f"{chunk} is missing")
        if chunk.stat().st_size != info.nbytes:
            raise ReleaseError(f"{chunk} is truncated: {chunk.stat().st_size} bytes instead of {info.nbytes}")
    return infos


def _chunk_name(layer: int | None, layer_shape: tuple[int, ...]) -> str:
    return ".".join([*([] if layer is None else [str(layer)]), *("0" for _ in layer_shape)])


class OrbaxCheckpoint(Checkpoint):
    """The weights of a folder whose ``params/`` was saved by Orbax itself, from any mesh, such as by a training run.

    Orbax stores each device's shard as a compressed chunk, so parameters are read whole, one at a time.
    """

    def files(self) -> list[Path]:
        return _files_in(self.folder / PARAMS)

    def _read_infos(self) -> Iterator[tuple[str, TensorInfo]]:
        home = self.folder / PARAMS
        with _reading(home) as checkpointer:
            tree = checkpointer.metadata(home.absolute()).item_metadata.tree
        self._paths: dict[str, tuple[str, int | None]] = {}
        self._held: tuple[str, np.ndarray] | None = None
        for keys, array in jax.tree_util.tree_leaves_with_path(tree):
            path = ".".join(str(key.key) for key in keys)
            if (dtype := getattr(array, "dtype", None)) is None or dtype.name not in CODES:
                raise ReleaseError(f"{home}: {path} is {dtype or array!r}; supported are {', '.join(CODES)}")
            stacked = path.startswith("layers.")
            for layer in range(array.shape[0] if stacked else 1):
                name = HF_NAMES.get(path, path).format(layer=layer)
                self._paths[name] = path, layer if stacked else None
                yield name, TensorInfo(home / path, CODES[dtype.name], array.shape[1:] if stacked else array.shape, 0)

    def check(self, table: list[Tensor]) -> None:
        for tensor in table:  # the vocabulary may have padding rows for a mesh
            info = self.tensors.get(tensor.hf_names[0])
            if info and tensor.axes[0] == "vocab" and info.shape[0] > tensor.shape[0]:
                self.tensors[tensor.hf_names[0]] = info._replace(shape=(tensor.shape[0], *info.shape[1:]))
        self._compare({name: tensor.layer_shape for tensor in table for name in tensor.hf_names})

    def restore(
        self, tensor: Tensor, shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding
    ) -> jax.Array:
        """Reads a parameter into shards with Orbax; rows beyond the vocabulary are set to zero."""
        import orbax.checkpoint as ocp

        args = ocp.ArrayRestoreArgs(sharding=sharding, global_shape=shape, dtype=dtype, strict=False)
        value = self._restore(tensor.path, args)
        if shape != tensor.shape:  # padding rows for the mesh: if the checkpoint has them too, they may not be zero
            rows = jnp.arange(shape[0]).reshape(-1, *(1 for _ in shape[1:]))
            value = jax.jit(lambda x: jnp.where(rows < tensor.shape[0], x, 0), out_shardings=sharding)(value)
        return value

    def check_finite(self, arrays: Mapping[str, jax.Array]) -> None:
        """Raises a ReleaseError that names the arrays in {path: array} that hold NaNs or infinities."""
        finite = jax.jit(lambda arrays: jax.tree.map(lambda x: jnp.isfinite(x).all(), arrays))(dict(arrays))
        if damaged := [path for path, ok in finite.items() if not ok]:
            raise ReleaseError(f"{self.folder / PARAMS}: {some(damaged)} hold NaNs or infinities: they are damaged")

    def blocks(
        self, name: str, shape: tuple[int, ...], index: tuple[slice, ...] | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        path, layer = self._paths[name]
        with self._lock:
            if self._held is None or self._held[0] != path:
                import orbax.checkpoint as ocp

                self._held = None
                self._held = path, self._restore(path, ocp.RestoreArgs(restore_type=np.ndarray))
            parameter = self._held[1]
        array = (parameter if layer is None else parameter[layer])[: shape[0]]
        for first, block in array_blocks(array, index):
            check_finite(block, name, self.tensors[name].file)
            yield first, block

    def _restore(self, path: str, args: Any) -> Any:
        import orbax.checkpoint as ocp

        item, restore_args = (unflatten_dict({path: value}, sep=".") for value in (0, args))
        home = self.folder / PARAMS
        with _reading(home) as checkpointer:
            tree = checkpointer.restore(
                home.absolute(),
                args=ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True),
            )
        return flatten_dict(tree, sep=".")[path]


@contextlib.contextmanager
def _reading(home: Path) -> Iterator[Any]:
    """An Orbax checkpointer; any exception becomes a ReleaseError that names the folder."""
    import orbax.checkpoint as ocp

    try:
        with quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            yield checkpointer
    except Exception as error:
        raise ReleaseError(f"{home} is no checkpoint that Orbax reads: {type(error).__name__}: {error}") from error


def plan_chunks(folder: Path, table: list[Tensor], dtype: str) -> dict[str, TensorInfo]:
    """Plans the files for the weights of a converted folder.

    Args:
        folder: the folder that will hold ``params/``.
        table: the tensors.
        dtype: the dtype of all tensors, a key of ``DTYPES``.

    Returns:
        {name: its future location}.
    """
    infos = {}
    for tensor in table:
        for layer, name in enumerate(tensor.hf_names):
            chunk = _chunk_name(layer if tensor.stacked else None, tensor.layer_shape)
            infos[name] = TensorInfo(folder / PARAMS / tensor.path / chunk, dtype, tensor.layer_shape, 0)
    return infos


def create_chunks(folder: Path, table: list[Tensor], dtype: str) -> None:
    """Creates the planned files at their full sizes, and the metadata that makes them an Orbax checkpoint.

    Orbax saves a tree of the right structure with one number per array; then the metadata of each array is changed to
    its real shape, its chunks, and no compression.
    """
    import orbax.checkpoint as ocp

    tree = unflatten_dict({tensor.path: np.zeros(1, DTYPES[dtype]) for tensor in table}, sep=".")
    # Only one of several processes gets here: Orbax must not wait for the others.
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix="f2llm_jax"
    )
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, multiprocessing_options=alone)
    with quiet(), ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        checkpointer.save((folder / PARAMS).absolute(), tree)
    for tensor in table:
        home = folder / PARAMS / tensor.path
        array = read_json(home / _ARRAY)
        chunks = (1, *tensor.layer_shape) if tensor.stacked else tensor.shape
        array.update(shape=tensor.shape, chunks=chunks, compressor=None, dtype=_ZARR_DTYPES[dtype])
        write_text(home / _ARRAY, json.dumps(array))
        (home / "0").unlink()
    for info in plan_chunks(folder, table, dtype).values():
        with info.file.open("wb") as stream:
            stream.truncate(info.nbytes)


def write_marker(folder: Path, dtype: str) -> None:
    """Marks the folder as a complete converted folder."""
    values = {"format": "f2llm_jax", "format_version": FORMAT_VERSION, "dtype": DTYPES[dtype].name, "complete": True}
    write_text(folder / MARKER, json.dumps(values, indent=2) + "\n")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides Orbax's warnings (in absl's logger) of merging nothing and restoring numpy arrays: both are intended."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
