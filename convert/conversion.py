"""Converts model folders: a release to a converted folder, the reverse, or to another dtype or shard size.

Source and output are both tables of tensor locations (``TensorInfo``); a conversion copies tensors from one to the
other, a few MiB at a time, and checks every value on the way. Names, shapes and dtypes are checked before anything is
written, but a NaN or an infinity is found only when its bytes are copied. The unfinished folder is then removed: only
a complete model ever appears at ``OUT``.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from f2llm_jax.config import ModelConfig
from f2llm_jax.convert.export import Layout
from f2llm_jax.convert.load import open_checkpoint
from f2llm_jax.convert.safetensors import Checkpoint, parse_size, some
from f2llm_jax.convert.staging import Staging, output_path, refuse_to_delete, staged, unfinished_folder
from f2llm_jax.convert.table import Tensor, tensor_table
from f2llm_jax.convert.tensors import CODES, DTYPES, cast, dtype_code, write_part
from f2llm_jax.errors import ReleaseError, warn
from f2llm_jax.release import find_release, read_release
from f2llm_jax.tokens import Tokenizer

_WORKERS = 2  # one reads while the other writes


def convert_release(
    source: str | Path,
    out: str | Path,
    *,
    to: str,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    force: bool = False,
    revision: str | None = None,
    show_progress: bool = False,
) -> Path:
    """Converts a model folder; memory use does not grow with the model.

    If it is killed, nothing is at ``out``, only ``OUT.incomplete`` beside it; another call with the same arguments
    resumes from there.

    Args:
        source: a release or converted folder, or a hub id.
        out: the folder to write; it appears when it is complete.
        to: ``flax`` for a converted folder (an Orbax checkpoint among the release's files); ``hf`` for a release.
        dtype: ``float32``, ``bfloat16`` or ``float16``; default: the dtype of the weights, which are copied bit by bit.
        max_shard_size: maximum size of a safetensors file, in bytes or like ``5GB``.
        force: replace ``out`` if it is a model folder, and discard unfinished work with other arguments.
        revision: branch, tag or commit of a hub id.
        show_progress: show a progress bar with bytes, rate and time left on standard error.

    Returns:
        The absolute path of ``out``.

    Raises:
        ReleaseError: the source is damaged, incomplete or not supported, has tensors of several dtypes and ``dtype``
            is None, or holds a NaN, an infinity or a value out of the range of ``dtype``. The message names it.
        InputError: an argument is invalid, ``out`` exists, ``out`` is or contains the source, or there is unfinished
            work with other arguments.
        F2LLMError: there is too little space on the disk.
    """
    place = output_path(out)
    folder = find_release(source, revision)
    refuse_to_delete(folder, place)
    config = read_release(folder).config
    Tokenizer.from_release(folder)
    checkpoint = open_checkpoint(folder)
    table = tensor_table(config)
    checkpoint.check(table)
    code = _output_dtype(checkpoint, config, dtype)
    layout = Layout(unfinished_folder(place), config, to=to, dtype=code, max_shard_size=max_shard_size)
    plan = {
        "what": "conversion",
        "source": str(folder.resolve()),
        "to": to,
        "dtype": DTYPES[code].name,
        "max_shard_size": parse_size(max_shard_size),
        "source files": _identities(checkpoint),
    }
    with staged(place, plan, needed=layout.nbytes, force=force) as staging:
        if not staging.finished:
            layout.create()
        _copy(checkpoint, table, layout, staging, show_progress)
        layout.complete(folder)
    return place


def _output_dtype(checkpoint: Checkpoint, config: ModelConfig, dtype: str | None) -> str:
    """The dtype to write, a key of ``DTYPES``; mixed dtypes are an error, a mismatch with config.json is a warning."""
    if dtype is not None:
        return dtype_code(dtype)
    counts = Counter(info.dtype for info in checkpoint.tensors.values())
    common = counts.most_common()[0][0]
    if len(counts) > 1:
        others = [f"{name} {info.dtype}" for name, info in checkpoint.tensors.items() if info.dtype != common]
        raise ReleaseError(
            f"{checkpoint.folder} mixes dtypes: {counts[common]} tensors are {common}, but {some(others)}; "
            f"say which to write with --dtype {' or '.join(CODES)}"
        )
    found = DTYPES[common].name
    if found != config.dtype:
        warn(f"config.json states {config.dtype}, the weights are {found}: {found} is written, and stated")
    return common


def _identities(checkpoint: Checkpoint) -> list[list[Any]]:
    """Name, size and modification time of every weight file: unfinished work is resumed only if these are the same."""
    stats = [(file, file.stat()) for file in checkpoint.files()]
    return [[str(file.relative_to(checkpoint.folder)), stat.st_size, stat.st_mtime_ns] for file, stat in stats]


def _copy(checkpoint: Checkpoint, table: list[Tensor], layout: Layout, staging: Staging, show_progress: bool) -> None:
    """Copies all unfinished tensors, in the order in which the source stores them."""
    from tqdm import tqdm

    shapes = {name: tensor.layer_shape for tensor in table for name in tensor.hf_names}
    names = [name for name in checkpoint.tensors if name not in staging.finished]
    done = sum(layout.infos[name].nbytes for name in staging.finished)
    stop, lock = threading.Event(), threading.Lock()
    with tqdm(
        total=layout.nbytes, initial=done, unit="B", unit_scale=True, disable=not show_progress, desc=staging.out.name
    ) as bar:

        def advance(nbytes: int) -> None:
            with lock:
                bar.update(nbytes)

        def work(name: str) -> str:
            if not stop.is_set():
                _copy_tensor(checkpoint, name, shapes[name], layout, advance, stop)
            return name

        with ThreadPoolExecutor(_WORKERS, thread_name_prefix="convert") as pool:
            try:
                for future in as_completed([pool.submit(work, name) for name in names]):
                    staging.finish(future.result())
            finally:
                stop.set()  # after an error or Ctrl-C, abandons tensors that are queued or half copied


def _copy_tensor(
    checkpoint: Checkpoint,
    name: str,
    shape: tuple[int, ...],
    layout: Layout,
    advance: Callable[[int], None],
    stop: threading.Event,
) -> None:
    info = layout.infos[name]
    rest = (slice(None),) * (len(shape) - 1)
    for first, block in checkpoint.blocks(name, shape):
        if stop.is_set():
            return
        values = cast(block, info.dtype, name)
        write_part(info, shape, (slice(first, first + len(block)), *rest), values)
        advance(values.nbytes)
