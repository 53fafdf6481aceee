"""Embed the texts of a file, or of a corpus larger than memory.

Reads txt (one text per line), jsonl, csv (first line: column names) or parquet.

--input FILE --output FILE writes, in the order of the input,
  .npy      an array [texts, dim]
  .parquet  columns `id` (from the input if it has ids, else the row number from 0) and `embedding`
All texts and embeddings are held in memory. The output appears when it is complete, or not at all.

--corpus GLOB... --out DIR writes Parquet shards with the same two columns, `id` being that of --id-field, else the row
number, and manifest.json when all are finished. Documents to search take --prompt-name document if the model has one.
Memory use does not grow with the corpus. The same command resumes a run that was killed, also with more or fewer
processes, and writes the same bytes. All processes must see DIR and the inputs. With --processes and --process-id, each
process encodes its share on its own; a --mesh over the devices of all processes also needs --coordinator. f2llm search
--embeddings DIR searches the shards.

--output-type int8 scales the range of each dimension to 255 steps. The ranges come from --ranges, or, with --input and
no --ranges, from the embeddings of the input itself; they are then written beside the output as NAME.ranges.npy ([2,
dim]: minimum, maximum), to encode queries and later texts with --ranges. binary and ubinary pack one bit per dimension,
eight to a byte.

Exit status: 0 when this process has finished its share; 143 after a SIGTERM, 130 after Ctrl-C: the same command
resumes the run.
"""

from __future__ import annotations

import argparse
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from f2llm_jax.commands import (
    ALL_DEVICES,
    add_fields,
    add_mesh,
    add_model,
    add_processes,
    add_progress,
    add_prompt,
    check_output,
    dtype_of,
    load_model,
    positive,
    show_progress,
    start_processes,
)
from f2llm_jax.dtypes import FILE_OUTPUTS
from f2llm_jax.errors import InputError
from f2llm_jax.files import local_path, new_file
from f2llm_jax.texts import Texts, check_unicode, read_texts

if TYPE_CHECKING:
    import numpy as np
    import pyarrow

    from f2llm_jax.encoder import Encoder


def declare(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", metavar="FILE", help="texts as txt, jsonl, csv or parquet; - for stdin")
    source.add_argument("--corpus", nargs="+", metavar="GLOB", help="files of texts, quoted: 'docs/*.parquet'")
    add_fields(parser, "--input")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a .npy or .parquet file to write, for --input")
    parser.add_argument("--force", action="store_true", help="replace an output that exists")
    add_prompt(parser, "each text", "default: the model's default prompt, none for F2LLM")
    parser.add_argument(
        "--output-type", default="float32", choices=FILE_OUTPUTS, help="of the embeddings; default: %(default)s"
    )
    parser.add_argument("--ranges", type=Path, metavar="FILE.npy", help="for int8: the ranges of an earlier output")
    add_mesh(parser, default="one device; with --corpus, whose mesh is that of one copy of the model, a copy on each")
    add_progress(parser)
    group = parser.add_argument_group("for --corpus")
    group.add_argument("--out", type=Path, metavar="DIR", help="folder for shards and manifest")
    group.add_argument("--id-field", metavar="NAME", help="column or key of the ids; default: the row number")
    group.add_argument("--shard-rows", type=positive, metavar="N", help="rows of a shard at most; default: 16384")
    add_processes(parser)


CORPUS_ONLY = ("out", "id_field", "shard_rows", "coordinator", "processes", "process_id", "distributed")


def run(args: argparse.Namespace) -> int:
    if args.corpus is not None:
        return _run_corpus(args)
    for name in CORPUS_ONLY:
        if getattr(args, name) not in (None, False):
            raise InputError(f"--{name.replace('_', '-')} is for --corpus, not for --input")
    if args.output is None:
        raise InputError("where to? --output FILE gets the embeddings of --input")
    _run_file(args)
    return 0


def _run_corpus(args: argparse.Namespace) -> int:
    if args.out is None:
        raise InputError("where to? --out DIR gets the shards of --corpus")
    if args.mesh == ALL_DEVICES:
        raise InputError("--mesh all is for --input: --corpus by itself has a copy of the model on every device")
    if args.output is not None or args.force:
        raise InputError("--output and --force are for --input; --corpus writes to --out DIR, and replaces nothing")
    if args.output_type == "int8" and args.ranges is None:
        raise InputError(
            "int8 with --corpus needs --ranges FILE.npy: encode a sample with --input and --output-type int8 to get one"
        )
    processes = start_processes(args)
    from f2llm_jax.corpus import SHARD_ROWS, encode_corpus

    outcome = encode_corpus(
        args.model,
        args.corpus,
        args.out,
        processes=processes,
        mesh=args.mesh,
        dtype=dtype_of(args),
        revision=args.revision,
        field=args.field,
        id_field=args.id_field,
        file_format=args.input_format,
        prompt_name=args.prompt_name,
        prompt=args.prompt,
        dim=args.dim,
        max_length=args.max_length,
        batch_tokens=args.batch_tokens,
        output=args.output_type,
        ranges=None if args.ranges is None else _read_ranges(args.ranges),
        shard_rows=args.shard_rows or SHARD_ROWS,
        show_progress=show_progress(args),
    )
    if outcome.manifest is not None:
        print(f"{args.out}: {outcome.rows} embeddings in {outcome.shards} shards")
    elif outcome.terminated:
        print(f"stopped with {outcome.finished} of {outcome.shards} shards; the same command goes on")
        return 128 + signal.SIGTERM
    else:
        print(
            f"{args.out}: process {processes.number} of {processes.total} is done; {outcome.finished} of "
            f"{outcome.shards} shards are there, and manifest.json comes with the last"
        )
    return 0


def _run_file(args: argparse.Namespace) -> None:
    args.output = local_path(args.output)
    write = _writer(args.output)
    calibrate = args.output_type == "int8" and args.ranges is None
    ranges_file = args.output.with_suffix(".ranges.npy")
    _check_arguments(args, [args.output, ranges_file] if calibrate else [args.output])
    texts = read_texts(args.input, field=args.field, file_format=args.input_format)
    if calibrate and len(texts.texts) < 2:
        raise InputError(
            f"int8 without --ranges takes them from the input, which needs at least 2 texts, not {len(texts.texts)}"
        )
    ranges = None if args.ranges is None else _read_ranges(args.ranges)
    ids = _id_column(texts) if write is _write_parquet else None
    # Opened before the work, so that a folder that is not writable is an error now.
    with new_file(args.output) as stream:
        embeddings, calibrated = _encode(load_model(args), texts.texts, args, ranges)
        write(stream, embeddings, ids)
        if calibrated is not None:
            with new_file(ranges_file) as ranges_stream:
                _write_npy(ranges_stream, calibrated, None)
    print(f"{args.output}: {len(embeddings)} embeddings, {embeddings.shape[1]} x {embeddings.dtype}")


def _writer(output: Path) -> Callable[[BinaryIO, np.ndarray, pyarrow.Array | None], None]:
    """The function that writes a file with this extension."""
    if output.suffix.lower() not in WRITERS:
        raise InputError(f"{output}: the output is a {' or '.join(WRITERS)} file, not {output.suffix!r}")
    return WRITERS[output.suffix.lower()]


def _check_arguments(args: argparse.Namespace, outputs: list[Path]) -> None:
    if args.ranges is not None and args.output_type != "int8":
        raise InputError(f"--ranges is for --output-type int8, not for {args.output_type}")
    for output in outputs:
        check_output(output, [args.input], force=args.force)


def _read_ranges(file: Path) -> np.ndarray:
    import numpy as np

    try:
        ranges = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile):
        ranges = None
    if not isinstance(ranges, np.ndarray) or ranges.dtype.kind != "f":
        raise InputError(f"{file} is not a .npy file of float ranges [2, dim]")
    return ranges


def _encode(
    model: Encoder, texts: list[str], args: argparse.Namespace, ranges: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """The embeddings that ``args`` ask for, and, for int8 without ranges, the ranges computed from them."""
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
    for row, id_ in enumerate(texts.ids):
        if isinstance(id_, str):
            check_unicode(id_, f"the id of the input's row {row}")
    try:
        return pyarrow.array(texts.ids, type=texts.id_type)
    except (pyarrow.ArrowException, OverflowError) as error:
        raise InputError(f"the input's ids do not make a column, which has values of one type: {error}") from None


def _write_npy(stream: BinaryIO, array: np.ndarray, ids: pyarrow.Array | None) -> None:
    import numpy as np

    np.save(stream, array)


def _write_parquet(stream: BinaryIO, embeddings: np.ndarray, ids: pyarrow.Array) -> None:
    from pyarrow import parquet

    from f2llm_jax.corpus_writer import embedding_table

    # Embeddings have hardly any repeated values: building a dictionary would be wasted work.
    parquet.write_table(embedding_table(ids, embeddings), stream, use_dictionary=False)


WRITERS = {".npy": _write_npy, ".parquet": _write_parquet}
