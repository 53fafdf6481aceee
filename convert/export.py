"""Writes parameters on devices to a folder: a release for any library, or a converted folder for this package."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from f2llm_jax.config import ModelConfig
from f2llm_jax.convert import orbax, safetensors
from f2llm_jax.convert.release_files import write_release_files
from f2llm_jax.convert.safetensors import some
from f2llm_jax.convert.staging import output_path, refuse_to_delete, staged, unfinished_folder
from f2llm_jax.convert.table import Tensor, tensor_table
from f2llm_jax.convert.tensors import DTYPES, TensorInfo, array_blocks, cast, check_finite, dtype_code, write_part
from f2llm_jax.errors import F2LLMError, InputError
from f2llm_jax.model import Params
from f2llm_jax.release import find_release

FORMATS = ("hf", "flax")


class Layout:
    """The location of every tensor in a folder that is being written.

    Attributes:
        infos: {tensor name: its location}.
        nbytes: total bytes of all tensors.
    """

    def __init__(self, folder: Path, config: ModelConfig, *, to: str, dtype: str, max_shard_size: int | str):
        """Plans the files.

        Args:
            folder: where to put them.
            config: the sizes.
            to: ``hf`` for safetensors, ``flax`` for an Orbax checkpoint.
            dtype: a key of ``DTYPES``.
            max_shard_size: maximum size of a safetensors file, in the form that transformers takes.

        Raises:
            InputError: the format is unknown or the size is invalid.
        """
        if to not in FORMATS:
            raise InputError(f"a folder can be written as {' or '.join(FORMATS)}, not {to!r}")
        table = tensor_table(config)
        self._write_marker: Callable[[], None] = lambda: None
        if to == "hf":
            self.infos, beginnings = safetensors.plan_shards(
                folder, table, dtype, safetensors.parse_size(max_shard_size)
            )
            self.create = functools.partial(safetensors.create_shards, self.infos, beginnings)
        else:
            self.infos = orbax.plan_chunks(folder, table, dtype)
            self.create = functools.partial(orbax.create_chunks, folder, table, dtype)
            self._write_marker = functools.partial(orbax.write_marker, folder, dtype)
        self.nbytes = sum(info.nbytes for info in self.infos.values())
        self._folder, self._config = folder, dataclasses.replace(config, dtype=DTYPES[dtype].name)

    def complete(
        self, like: Path, prompts: Mapping[str, str] | None = None, files: Mapping[str, bytes] | None = None
    ) -> None:
        """Writes everything but the weights, which makes the folder a complete model."""
        self._write_marker()
        for name, content in (files or {}).items():
            (self._folder / name).write_bytes(content)
        write_release_files(self._folder, self._config, like=like, prompts=prompts)


def export_release(
    params: Params,
    config: ModelConfig,
    out: str | Path,
    *,
    like: str | Path,
    to: str = "hf",
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    prompts: Mapping[str, str] | None = None,
    files: Mapping[str, bytes] | None = None,
    force: bool = False,
) -> Path:
    """Writes parameters as a complete model folder: weights, config, tokenizer, prompts, pooling, model card.

    Vocabulary rows added as padding for a mesh are left out. Beyond the parameters, host memory holds one shard of one
    parameter. With several processes, all of them must call this and see the disk of ``out``; each writes its own
    shards.

    Args:
        params: the parameters, on one device or any mesh; layers stacked on axis 0.
        config: the sizes, with the vocabulary without padding for a mesh.
        out: the folder to write; it appears when it is complete.
        like: a release folder or hub id to take the tokenizer, prompts and settings from.
        to: ``hf``, which sentence-transformers, transformers and this package load; ``flax``, which ``f2llm_jax.load``
            and Orbax load.
        dtype: ``float32``, ``bfloat16`` or ``float16``; default: the dtype of the parameters.
        max_shard_size: maximum size of a safetensors file, in bytes or like ``5GB``.
        prompts: {name: text}, replaces the prompts of ``like``.
        files: {name: content}, additional files for the folder.
        force: replace ``out`` if it is a model folder.

    Returns:
        The absolute path of ``out``.

    Raises:
        InputError: ``out`` exists or contains ``like``, the parameters do not fit the config or have several dtypes, or
            an argument is invalid.
        ReleaseError: a parameter holds a NaN, an infinity, or a value out of the range of the dtype; or ``like`` cannot
            be used.
    """
    place = output_path(out)
    source = find_release(like, weights=False)
    if source.resolve() != place.resolve():  # out may be like itself: its weights are replaced
        refuse_to_delete(source, place)
    table = tensor_table(config)
    flat = flatten_dict(params, sep=".")
    _check_params(flat, table)
    code = dtype_code(_common_dtype(flat) if dtype is None else dtype)
    layout = Layout(unfinished_folder(place), config, to=to, dtype=code, max_shard_size=max_shard_size)
    first = jax.process_index() == 0
    with contextlib.ExitStack() as stack:

        def create() -> None:
            if first:
                stack.enter_context(staged(place, {"what": "export"}, needed=layout.nbytes, force=force))
                layout.create()

        def write() -> None:
            for tensor in table:
                _write_parameter(flat[tensor.path], tensor, layout.infos)

        def complete() -> None:
            if first:
                layout.complete(source, prompts, files)

        for step in (create, write, complete, stack.close):  # the last moves the folder into place
            _together(step)
    return place


def _check_params(flat: Mapping[str, jax.Array], table: list[Tensor]) -> None:
    shapes = {tensor.path: tensor.shape for tensor in table}
    if missing := [path for path in shapes if path not in flat]:
        raise InputError(f"the parameters lack {some(missing)}")
    if unexpected := [path for path in flat if path not in shapes]:
        raise InputError(f"the parameters hold {some(unexpected)}, which the model of this config does not have")
    for tensor in table:
        shape = flat[tensor.path].shape
        padded = tensor.axes[0] == "vocab" and shape[1:] == tensor.shape[1:] and shape[0] > tensor.shape[0]
        if shape != tensor.shape and not padded:
            raise InputError(f"{tensor.path} has shape {shape}, the config asks for {tensor.shape}")


def _common_dtype(flat: Mapping[str, jax.Array]) -> str:
    dtypes = sorted({leaf.dtype.name for leaf in flat.values()})
    if len(dtypes) > 1:
        raise InputError(f"the parameters have dtypes {', '.join(dtypes)}: give dtype= to say which to write")
    return dtypes[0]


def _write_parameter(array: jax.Array | np.ndarray, tensor: Tensor, infos: Mapping[str, TensorInfo]) -> None:
    """Writes the shards of a parameter on this process's devices; of replicated shards, only one replica is written."""
    on_devices = array if isinstance(array, jax.Array) else jax.device_put(array)
    for shard in on_devices.addressable_shards:
        if shard.replica_id:
            continue
        values = np.asarray(shard.data)
        begins = [part.indices(size)[0] for part, size in zip(shard.index, array.shape, strict=True)]
        if not tensor.stacked:
            _write_slice(values, begins, infos[tensor.hf_names[0]], tensor)
            continue
        for position, layer_values in enumerate(values):
            _write_slice(layer_values, begins[1:], infos[tensor.hf_names[begins[0] + position]], tensor)


def _write_slice(values: np.ndarray, begins: list[int], info: TensorInfo, tensor: Tensor) -> None:
    """Writes a slice of a tensor that starts at ``begins``, without vocabulary rows added as padding for a mesh."""
    inner = tuple(slice(begin, begin + size) for begin, size in zip(begins[1:], values.shape[1:], strict=True))
    for first, block in array_blocks(values[: max(0, tensor.layer_shape[0] - begins[0])]):
        check_finite(block, tensor.path, Path("the parameters"))
        index = (slice(begins[0] + first, begins[0] + first + len(block)), *inner)
        write_part(info, tensor.layer_shape, index, cast(block, info.dtype, tensor.path))


def _together(step: Callable[[], None]) -> None:
    """Runs a step in all processes and waits until all have finished; a failure in one is an error in all."""
    error: Exception | None = None
    try:
        step()
    except Exception as caught:
        error = caught
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        failed = multihost_utils.process_allgather(np.array([error is not None])).any()
        if failed and error is None:
            error = F2LLMError("the export failed in another process, which says why")
    if error is not None:
        raise error
