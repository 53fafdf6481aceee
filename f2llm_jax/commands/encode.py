"""Embed the texts of a file.

Reads txt (a text on every line), jsonl, csv (first line: column names) or parquet. Writes, in the order of the input,
  .npy      an array [texts, dim]
  .parquet  columns `id` (that of the input if it has one, else the row number from 0) and `embedding`
All texts and embeddings are held in memory. The output appears when it is complete, or not at all.

--output-type int8 scales each dimension's range to 255 steps. The ranges come from --ranges, or else from the
embeddings of this very input; then they are written beside the output as NAME.ranges.npy ([2, dim]: least, largest),
for encoding queries and later texts with --ranges. binary and ubinary pack a bit per dimension, eight to a byte.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from f2llm_jax.commands import add_model, add_progress, add_prompt, add_texts, load_model, show_progress
from f2llm_jax.errors import InputError
from f2llm_jax.texts import STDIN, Texts, read_texts

if TYPE_CHECKING:
    import numpy as np
    import pyarrow

    from f2llm_jax.encoder import Encoder

OUTPUT_TYPES = ("float32", "float16", "int8", "binary", "ubinary")


def declare(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_texts(parser, "--input")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="a .npy or .parquet file to write")
    parser.add_argument("--force", action="store_true", help="replace an output that exists")
    add_prompt(parser, "each text", "default: the model's default prompt, none for F2LLM")
    parser.add_argument(
        "--output-type", default="float32", choices=OUTPUT_TYPES, help="of the embeddings; default: %(default)s"
    )
    parser.add_argument("--ranges", type=Path, metavar="FILE.npy", help="for int8: the ranges of an earlier output")
    add_progress(parser)


def run(args: argparse.Namespace) -> None:
    calibrate = args.output_type == "int8" and args.ranges is None
    ranges_file = args.output.with_suffix(".ranges.npy")
    _check_arguments(args, [args.output, ranges_file] if calibrate else [args.output])
    texts = read_texts(args.input, field=args.field, file_format=args.input_format)
    if calibrate and len(texts.texts) < 2:
        raise InputError(
            f"int8 without --ranges takes them from the input, which needs at least 2 texts, not {len(texts.texts)}"
        )
    ranges = None if args.ranges is None else _read_ranges(args.ranges)
    write = WRITERS[args.output.suffix.lower()]
    ids = _id_column(texts) if write is _write_parquet else None
    # Opened before the work, so that a folder that cannot be written to is found out now.
    with new_file(args.output) as stream:
        embeddings, calibrated = _encode(load_model(args), texts.texts, args, ranges)
        write(stream, embeddings, ids)
        if calibrated is not None:
            with new_file(ranges_file) as ranges_stream:
                _write_npy(ranges_stream, calibrated, None)
    print(f"{args.output}: {len(embeddings)} embeddings, {embeddings.shape[1]} x {embeddings.dtype}")


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A stream to a file beside ``path`` that takes its place when the block ends well, else vanishes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("xb") as stream:
            yield stream
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _check_arguments(args: argparse.Namespace, outputs: list[Path]) -> None:
    if args.output.suffix.lower() not in WRITERS:
        raise InputError(f"{args.output}: the output is a {' or '.join(WRITERS)} file, not {args.output.suffix!r}")
    if args.ranges is not None and args.output_type != "int8":
        raise InputError(f"--ranges is for --output-type int8, not for {args.output_type}")
    if not args.output.parent.is_dir():
        raise InputError(f"{args.output.parent} is not a folder")
    for output in outputs:
        if output.is_dir():
            raise InputError(f"{output} is a folder")
        if output.exists() and not args.force:
            raise InputError(f"{output} exists; --force replaces it")
        if output.exists() and args.input != STDIN and os.path.samefile(output, args.input):
            raise InputError(f"{output} is the input too")


def _read_ranges(file: Path) -> np.ndarray:
    import numpy as np

    try:
        ranges = np.load(file, allow_pickle=False)
    except (ValueError, EOFError):
        ranges = None
    if not isinstance(ranges, np.ndarray) or ranges.dtype.kind != "f":
        raise InputError(f"{file} is not a .npy file of float ranges [2, dim]")
    return ranges


def _encode(
    model: Encoder, texts: list[str], args: argparse.Namespace, ranges: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """The embeddings as ``args`` ask for them, and for int8 without ranges those taken from the embeddings."""
    import numpy as np

    from f2llm_jax.quantization import int8_ranges, quantize

    def encode(output: str) -> np.ndarray:
        return model.encode(
            texts,
            prompt_name=args.prompt_name,
            prompt=args.prompt,
            dim=args.dim,
            max_length=args.max_length,
            batch_tokens=args.batch_tokens,
            output=output,
            ranges=ranges,
            show_progress=show_progress(args),
        )

    if args.output_type == "float16":
        return encode("float32").astype(np.float16), None
    if args.output_type == "int8" and ranges is None:
        embeddings = encode("float32")
        calibrated = int8_ranges(embeddings)
        return quantize(embeddings, "int8", calibrated), calibrated
    return encode(args.output_type), None


def _id_column(texts: Texts) -> pyarrow.Array:
    import numpy as np
    import pyarrow

    if texts.ids is None:
        return pyarrow.array(np.arange(len(texts.texts)))
    try:
        return pyarrow.array(texts.ids, type=texts.id_type)
    except (pyarrow.ArrowException, OverflowError) as error:
        raise InputError(f"the input's ids do not make a column, which has values of one type: {error}") from None


def _write_npy(stream: BinaryIO, array: np.ndarray, ids: pyarrow.Array | None) -> None:
    import numpy as np

    np.save(stream, array)


def _write_parquet(stream: BinaryIO, embeddings: np.ndarray, ids: pyarrow.Array) -> None:
    import pyarrow
    from pyarrow import parquet

    values = pyarrow.array(embeddings.reshape(-1))
    embedding_column = pyarrow.FixedSizeListArray.from_arrays(values, embeddings.shape[1])
    # Embeddings hold next to no value twice: a dictionary of them would be built in vain.
    parquet.write_table(pyarrow.table({"id": ids, "embedding": embedding_column}), stream, use_dictionary=False)


WRITERS = {".npy": _write_npy, ".parquet": _write_parquet}
