"""The sub-commands of ``f2llm``, one per module, and the arguments that several of them share."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from f2llm_jax.dtypes import DTYPES
from f2llm_jax.errors import F2LLMError, InputError
from f2llm_jax.texts import FORMATS, STDIN

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from f2llm_jax.distributed import Processes
    from f2llm_jax.encoder import Encoder

ALL_DEVICES = "all"
"""The value of --mesh for a mesh with all devices along ``data``."""

# From the data sheets: a TPU multiplies float32 in six bfloat16 passes, a GPU without its tensor cores.
FASTER_IN_BFLOAT16 = {"tpu": "about six times as fast on TPUs", "gpu": "several times as fast on GPUs"}


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments for ``load_model``, and the limits for ``Encoder.encode``."""
    parser.add_argument("--model", required=True, metavar="M", help="release folder, converted folder or hub id")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of weights and of what they are multiplied with; default: float32"
    )
    parser.add_argument("--dim", type=int, help="Matryoshka size: keep the first DIM values; default: all")
    parser.add_argument("--max-length", type=int, metavar="N", help="cut texts to N tokens; default: the model's limit")
    parser.add_argument("--batch-tokens", type=positive, metavar="N", help="tokens computed at a time")


def add_prompt(parser: argparse.ArgumentParser, of: str, default: str) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--prompt-name", metavar="NAME", help=f"the model's prompt to put before {of}; {default}")
    group.add_argument("--prompt", metavar="TEXT", help=f"a text to put before {of}")


def add_fields(parser: argparse.ArgumentParser, option: str) -> None:
    """Adds the arguments that say how to read the texts of ``option``."""
    parser.add_argument(
        f"{option}-format", choices=FORMATS, help="default: by the file's extension, and txt (a text a line) for stdin"
    )
    parser.add_argument("--field", default="text", help="column or key that holds the text; default: %(default)s")


def check_output(output: Path, inputs: Iterable[str], *, force: bool) -> None:
    """An InputError if the output cannot be a file, if it exists and may not be replaced, or if it is an input."""
    if not output.parent.is_dir():
        raise InputError(f"{output.parent} is not a folder")
    if output.is_dir():
        raise InputError(f"{output} is a folder")
    if output.exists() and not force:
        raise InputError(f"{output} exists; --force replaces it")
    if output.exists() and any(source != STDIN and os.path.samefile(output, source) for source in inputs):
        raise InputError(f"{output} is the input too")


def add_progress(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--quiet", action="store_true", help="show no progress")
    group.add_argument("--progress", action="store_true", help="a progress bar even if stderr is no terminal")


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments for ``start_processes``."""
    group = parser.add_argument_group(
        "several processes", "on a Cloud TPU they find each other by themselves; elsewhere, in each of them:"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, which the others join")
    group.add_argument("--processes", type=positive, metavar="N", help="how many there are")
    group.add_argument("--process-id", type=int, metavar="I", help="which one this is, from 0")
    group.add_argument(
        "--distributed", action="store_true", help="JAX finds the others by itself: Slurm, Open MPI, Kubernetes"
    )


def start_processes(args: argparse.Namespace) -> Processes:
    from f2llm_jax.distributed import start

    return start(args.coordinator, args.processes, args.process_id, detect=args.distributed)


def mesh_sizes(text: str) -> dict[str, int]:
    """Parses an argument like data=2,fsdp=4: sizes of mesh axes; those not given are 1."""
    from f2llm_jax.axes import MESH_AXES

    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = (word.strip() for word in part.partition("="))
        if axis not in MESH_AXES or axis in sizes or not size.isdecimal() or int(size) < 1:
            raise argparse.ArgumentTypeError(
                f"takes sizes of {', '.join(MESH_AXES)}, like data=2,tensor=4, not {text!r}"
            )
        sizes[axis] = int(size)
    return {axis: sizes.get(axis, 1) for axis in MESH_AXES}


def mesh_or_all(text: str) -> dict[str, int] | str:
    """Like ``mesh_sizes``, or ``all``: one copy of the model per device, whose number only JAX knows."""
    return text if text == ALL_DEVICES else mesh_sizes(text)


def add_mesh(parser: argparse.ArgumentParser, default: str = "one device") -> None:
    """Adds the argument for ``mesh_of``."""
    parser.add_argument(
        "--mesh",
        type=mesh_or_all,
        metavar="AXIS=N,…",
        help=f"devices to spread over, such as data=2,fsdp=4,tensor=1; all: data over all of them; default: {default}",
    )


def mesh_of(args: argparse.Namespace) -> Mesh | None:
    """The mesh of ``--mesh``; without it None, and a note if that leaves accelerators idle."""
    import jax

    from f2llm_jax.sharding import make_mesh

    if args.mesh == ALL_DEVICES:
        return make_mesh(data=jax.device_count())
    if args.mesh is not None:
        return make_mesh(**args.mesh)
    platform, count = jax.default_backend(), jax.device_count()
    if platform != "cpu" and count > 1:
        note(f"one of {count} {platform.upper()} devices is used; --mesh all uses all of them")
    return None


def add_settings(parser: argparse.ArgumentParser, of: str = "") -> None:
    """Adds the argument for changes to a recipe, for ``train.config.override``."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help=f"{of}change a value of the recipe",
    )


def show_progress(args: argparse.Namespace) -> bool:
    return args.progress or (sys.stderr.isatty() and not args.quiet)


def note(text: str) -> None:
    """Prints a line for the user on standard error."""
    print(f"f2llm: {text}", file=sys.stderr)


def dtype_of(args: argparse.Namespace) -> str:
    """``--dtype`` of ``add_model``; without it float32, with a note on platforms where that is slow."""
    if args.dtype is not None:
        return args.dtype
    import jax

    if (faster := FASTER_IN_BFLOAT16.get(jax.default_backend())) is not None:
        note(f"float32; --dtype bfloat16 is {faster}")
    return "float32"


@contextlib.contextmanager
def show_log(args: argparse.Namespace) -> Iterator[None]:
    """Shows the log of this package on standard error, above any progress bar; with --quiet shows nothing."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    if args.quiet:
        yield
        return
    logger, handler = logging.getLogger("f2llm_jax"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.propagate = False  # libraries add a handler to the root logger, which would print everything twice
    logger.addHandler(handler)
    try:
        with logging_redirect_tqdm([logger]):
            yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
        logger.setLevel(level)


def load_model(args: argparse.Namespace) -> Encoder:
    """Loads the model given by the arguments of ``add_model`` and ``add_mesh``."""
    from f2llm_jax.encoder import load

    return load(args.model, dtype=dtype_of(args), mesh=mesh_of(args), revision=args.revision)


@contextlib.contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """For imports that need an extra of pyproject.toml: if it is not installed, an F2LLMError that says so."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise F2LLMError(f"{error.name} is not installed: pip install 'f2llm-jax[{extra}]'") from None


def positive(text: str) -> int:
    """Parses an argument that is a whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return number
