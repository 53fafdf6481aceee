"""Reads embeddings that ``f2llm encode`` wrote: the folder of a corpus, or a single file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from f2llm_jax.corpus_writer import MANIFEST, read_manifest
from f2llm_jax.errors import InputError
from f2llm_jax.quantization import dequantize

# Rows read at a time: as many as a shard of a corpus has by default.
_BLOCK_ROWS = 16384

_FLOAT_OUTPUTS = ("float32", "float16")


@dataclasses.dataclass(frozen=True)
class StoredEmbeddings:
    """Where embeddings are stored, and in which form.

    Attributes:
        source: the folder or the file.
        files: the files that hold them, in order, each with its number of rows.
        dim: dimensions of an embedding.
        output: the form in which they were written, one of ``dtypes.FILE_OUTPUTS``.
        ranges: float32 [2, dim], for int8.
        model, model_sha256: the name of the model that wrote them, and its ``convert.digest.model_digest``; None for a
            single file, which does not record them.
        prompt: the text prepended to what was embedded; None for a single file.
    """

    source: Path
    files: tuple[tuple[Path, int], ...]
    dim: int
    output: str
    ranges: np.ndarray | None = None
    model: str | None = None
    model_sha256: str | None = None
    prompt: str | None = None

    @property
    def rows(self) -> int:
        return sum(rows for _, rows in self.files)

    def blocks(self) -> Iterator[np.ndarray]:
        """All embeddings in order, in blocks of float32 [n, dim], with unit norm, so that products are cosines.

        int8, binary and ubinary embeddings are dequantised (``quantization.dequantize``).
        """
        for file, _ in self.files:
            for block in _read_blocks(file):
                values_nd = dequantize(block, self.output, self.dim, self.ranges)
                if self.output not in _FLOAT_OUTPUTS:
                    values_nd /= np.maximum(np.linalg.norm(values_nd, axis=1, keepdims=True), 1e-12)
                yield values_nd

    def ids(self, rows: np.ndarray) -> list[Any]:
        """The ids of rows, which are counted from 0; for a .npy file, the row numbers themselves."""
        wanted, inverse = np.unique(rows, return_inverse=True)
        ids: list[Any] = []
        first = 0
        for file, count in self.files:
            own = wanted[(wanted >= first) & (wanted < first + count)] - first
            if len(own):
                ids += own.tolist() if file.suffix.lower() == ".npy" else _read_ids(file, own)
            first += count
        return [ids[number] for number in inverse.reshape(-1)]


def open_stored(source: str | Path) -> StoredEmbeddings:
    """Opens what ``f2llm encode`` wrote: a folder with ``--corpus``, a .npy or .parquet file with ``--input``.

    Raises:
        InputError: the folder is unfinished, damaged or from another command, or the file holds anything but float32 or
            float16 embeddings.
        OSError: it cannot be read.
    """
    source = Path(source)
    return _open_folder(source) if source.is_dir() else _open_file(source)


def _open_folder(folder: Path) -> StoredEmbeddings:
    manifest = read_manifest(folder)
    settings = manifest["settings"]
    files = []
    for shard in manifest["shards"]:
        file = folder / shard["file"]
        if not file.is_file() or file.stat().st_size != shard["bytes"]:
            state = "damaged" if file.is_file() else "missing"
            raise InputError(f"{file} is {state}; the f2llm encode command that wrote {folder} makes it again")
        files.append((file, shard["rows"]))
    ranges = np.load(folder / "ranges.npy") if settings["output"] == "int8" else None
    return StoredEmbeddings(
        source=folder,
        files=tuple(files),
        dim=settings["dim"],
        output=settings["output"],
        ranges=ranges,
        model=manifest["model"],
        model_sha256=settings["model_sha256"],
        prompt=settings["prompt"],
    )


def _open_file(file: Path) -> StoredEmbeddings:
    if file.suffix.lower() == ".npy":
        shape, dtype = _npy(file).shape, _npy(file).dtype
    elif file.suffix.lower() == ".parquet":
        shape, dtype = _parquet_shape(file)
    else:
        raise InputError(
            f"{file} is neither a folder of f2llm encode --corpus nor a .npy or .parquet file of f2llm encode --input"
        )
    if len(shape) != 2 or dtype.name not in _FLOAT_OUTPUTS:
        raise InputError(
            f"{file} holds {dtype.name} of shape {shape}; of a single file {' and '.join(_FLOAT_OUTPUTS)} embeddings "
            f"are taken, of fewer bits those of f2llm encode --corpus, whose {MANIFEST} says what they are"
        )
    return StoredEmbeddings(file, ((file, shape[0]),), shape[1], dtype.name)


def _npy(file: Path) -> np.ndarray:
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"{file} is not a .npy file of embeddings, or damaged: {error}") from None


def _parquet_shape(file: Path) -> tuple[tuple[int, int], np.dtype]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as opened:
            schema, rows = opened.schema_arrow, opened.metadata.num_rows
    except pyarrow.ArrowException as error:
        raise InputError(f"{file} is not a Parquet file, or damaged: {error}") from None
    if "embedding" not in schema.names or "id" not in schema.names:
        raise InputError(f"{file} has no columns 'id' and 'embedding'; it has {', '.join(schema.names)}")
    kind = schema.field("embedding").type
    if not pyarrow.types.is_fixed_size_list(kind):
        raise InputError(f"{file}: the column 'embedding' holds {kind}, not lists of fixed size as f2llm encode writes")
    return (rows, kind.list_size), np.dtype(kind.value_type.to_pandas_dtype())


def _read_blocks(file: Path) -> Iterator[np.ndarray]:
    """The embeddings of a file as they were written, in blocks [n, values]."""
    if file.suffix.lower() == ".npy":
        embeddings = _npy(file)
        for first in range(0, len(embeddings), _BLOCK_ROWS):
            yield embeddings[first : first + _BLOCK_ROWS]
        return
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(_BLOCK_ROWS, columns=["embedding"]):
                column = batch.column(0)
                yield column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
    except (pyarrow.ArrowException, ValueError) as error:
        raise InputError(f"{file} is damaged: {error}") from None


def _read_ids(file: Path, rows: np.ndarray) -> list[Any]:
    from pyarrow import parquet

    return parquet.read_table(file, columns=["id"])["id"].take(rows).to_pylist()
