"""Encoding corpora larger than memory with any number of processes, each of which can be killed at any time.

The corpus is split into units of several thousand rows (``corpus_reader``), and every unit becomes a shard of the
output (``corpus_writer``). Each process takes an equal run of consecutive units. The contents of a shard depend only on
its unit, the settings and the kind of device: batches never span units, each unit is encoded by one copy of the model,
and a copy occupies as many devices as the mesh has. So any number of processes can finish a run that was killed, and
the output has the same bytes as without the interruption.

Usually the mesh fits into one process: every process works on its own, and its devices hold as many copies of the model
as meshes fit into them. A mesh of all devices of all processes is for models that need it: all processes then encode
every unit together.
"""

from __future__ import annotations

import hashlib
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from f2llm_jax.convert.digest import model_digest
from f2llm_jax.corpus_reader import Corpus, Reader, Unit, UnitTexts, find_files, index
from f2llm_jax.corpus_writer import Output, known_inputs, read_plan
from f2llm_jax.distributed import ALONE, Processes
from f2llm_jax.dtypes import FILE_OUTPUTS
from f2llm_jax.embedding import check_dim
from f2llm_jax.encoder import Done, Encoder, load
from f2llm_jax.errors import F2LLMError, InputError, warn, whole_number
from f2llm_jax.files import local_path
from f2llm_jax.quantization import check_ranges
from f2llm_jax.release import Release, find_release, pick_prompt, read_release
from f2llm_jax.sharding import make_mesh

SHARD_ROWS = 16384
"""Rows per shard: 64 MB with the 0.6B's 1,024 values per row in float32."""

# The settings that are passed on to ``Encoder.encode``.
_ENCODE_OPTIONS = ("prompt", "dim", "max_length", "batch_tokens", "output")

_ONE_DEVICE = {"data": 1, "fsdp": 1, "tensor": 1}

# How often the shards of other processes are counted: for the progress bar, and by a process waiting for the others.
_COUNT_SECONDS = 5.0
_WAIT_SECONDS = 1.0


class Outcome(NamedTuple):
    """How ``encode_corpus`` ended.

    Attributes:
        rows, shards: how many the whole corpus has.
        finished: number of finished shards, by any process.
        manifest: the contents of ``manifest.json``, if all shards are finished.
        terminated: whether a SIGTERM ended the run.
    """

    rows: int
    shards: int
    finished: int
    manifest: dict[str, Any] | None
    terminated: bool


def encode_corpus(
    model: str | Path,
    patterns: str | Path | Sequence[str],
    out: str | Path,
    *,
    processes: Processes = ALONE,
    mesh: Mapping[str, int] | None = None,
    dtype: str = "float32",
    revision: str | None = None,
    field: str = "text",
    id_field: str | None = None,
    file_format: str | None = None,
    prompt_name: str | None = None,
    prompt: str | None = None,
    dim: int | None = None,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    output: str = "float32",
    ranges: np.ndarray | None = None,
    shard_rows: int = SHARD_ROWS,
    show_progress: bool = False,
) -> Outcome:
    """Embeds this process's share of the texts of many files into Parquet shards.

    Existing shards are verified and kept, so repeating the call resumes a run that was killed. Ctrl-C and SIGTERM lose
    no more than the units in progress. Memory holds a few units and the model, whatever the number of rows.

    Args:
        model, dtype, revision: as for ``f2llm_jax.load``.
        patterns: one or more globs of txt, jsonl, csv and parquet files. All processes must see the same files and the
            same ``out``.
        out: the folder for shards and manifest, new or begun by the same call.
        processes: the number of this process and how many there are, from ``f2llm_jax.distributed.start``.
        mesh: sizes of ``data``, ``fsdp`` and ``tensor`` for one copy of the model; those not given are 1. Default: the
            mesh of the run begun in ``out``, else one device.
        field, file_format: as for ``texts.read_texts``.
        id_field: the column or key of the ids; default: the row number, counted over all files.
        prompt_name, prompt, dim, max_length, batch_tokens: as for ``Encoder.encode``.
        output: one of ``dtypes.FILE_OUTPUTS``.
        ranges: float [2, dim] from ``int8_ranges``, for int8.
        shard_rows: maximum rows per shard; fewer if texts are long.
        show_progress: show a progress bar of all processes' rows on standard error.

    Raises:
        InputError: an argument or an input cannot be used, or ``out`` was begun with others.
        ReleaseError: the model cannot be used.
        F2LLMError: Grain is not installed.
    """
    _import_grain()
    if not isinstance(model, str | Path):
        raise InputError(
            "model must be a folder or a hub id, as for f2llm_jax.load, of which every device loads a copy, not "
            f"{type(model).__name__}"
        )
    patterns = [str(patterns)] if isinstance(patterns, str | Path) else patterns
    release = read_release(find_release(model, revision))
    out = local_path(out)
    plan = read_plan(out)
    settings = _settings(
        release,
        mesh=mesh or (_ONE_DEVICE if plan is None else plan["settings"]["mesh"]),
        output=output,
        dim=check_dim(dim, release.config),
        ranges=ranges,
        prompt=pick_prompt(release.prompts, release.default_prompt_name, prompt_name, prompt),
        max_length=_check_length(max_length, release),
        dtype=dtype,
        batch_tokens=None if batch_tokens is None else whole_number("batch_tokens", batch_tokens),
        field=field,
        id_field=id_field,
        file_format=file_format,
        shard_rows=whole_number("shard_rows", shard_rows),
    )
    team = Team.of(settings["mesh"], processes)
    corpus = _index(patterns, out, settings, plan, show_progress)
    calibration = None if ranges is None else np.asarray(ranges, np.float32)
    work = Output(out, settings, corpus, model=str(model), ranges=calibration)
    with _Termination(team) as termination:
        todo = team.todo(corpus.units, work, show_progress)
        with Progress(todo, corpus, work, show_progress) as progress:
            if todo:
                encoders = team.load(release.path, dtype, len(todo))
                options = {name: settings[name] for name in _ENCODE_OPTIONS} | {"ranges": calibration}
                job = _Job(Reader(corpus), encoders, options, work, team, progress)
                termination.came = job.run(todo)
            if not termination.came:
                team.wait_for_others(work, progress)
    manifest = work.commit()
    if manifest is not None and manifest["truncated"]:
        limit = settings["max_length"]
        warn(f"{manifest['truncated']} of {corpus.rows} texts were longer than {limit} tokens and were truncated")
    return Outcome(corpus.rows, len(corpus.units), len(work.finished()), manifest, termination.came)


class _Terminated(BaseException):
    """A SIGTERM was received."""


class _Termination:
    """Ends its ``with`` block on SIGTERM, at any point; processes that encode together all stop after the same unit.

    Attributes:
        came: whether a SIGTERM was received.
    """

    def __init__(self, team: Team):
        self.came = False
        self._alone = not team.joint and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> _Termination:
        if self._alone:
            self._before = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> bool:
        if self._alone:
            signal.signal(signal.SIGTERM, self._before)
        return kind is _Terminated

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if not self.came:
            self.came = True
            raise _Terminated


# --- settings and inputs


def _settings(
    release: Release,
    *,
    mesh: Mapping[str, int],
    output: str,
    dim: int,
    ranges: np.ndarray | None,
    **others: Any,
) -> dict[str, Any]:
    """Everything besides the inputs that the bytes of the shards depend on, as JSON values."""
    if output not in FILE_OUTPUTS:
        raise InputError(f"output must be one of {', '.join(FILE_OUTPUTS)}, not {output!r}")
    ranges = check_ranges(output, ranges, dim)
    device = jax.local_devices()[0]
    return {
        "model_sha256": model_digest(release.path),
        "mesh": _mesh_sizes(mesh),
        "device": f"{device.platform} {device.device_kind}",
        "dim": dim,
        "output": output,
        "ranges": None if ranges is None else hashlib.sha256(np.ascontiguousarray(ranges).tobytes()).hexdigest(),
        **others,
    }


def _mesh_sizes(mesh: Mapping[str, int]) -> dict[str, int]:
    """The sizes of all axes; those not given are 1."""
    if unknown := mesh.keys() - _ONE_DEVICE.keys():
        axes = ", ".join(_ONE_DEVICE)
        raise InputError(f"mesh has sizes of {axes}, not of {', '.join(map(repr, sorted(unknown)))}")
    return {axis: whole_number(f"mesh[{axis!r}]", mesh.get(axis, size)) for axis, size in _ONE_DEVICE.items()}


def _index(
    patterns: Sequence[str], out: Path, settings: Mapping[str, Any], plan: dict[str, Any] | None, show_progress: bool
) -> Corpus:
    """The corpus; files that the earlier run split in the same way are not read again."""
    reading = ("field", "id_field", "file_format", "shard_rows")
    same_cuts = plan is not None and all(plan["settings"].get(key) == settings[key] for key in reading)
    return index(
        find_files(patterns, out),
        field=settings["field"],
        id_field=settings["id_field"],
        file_format=settings["file_format"],
        unit_rows=settings["shard_rows"],
        known=known_inputs(plan) if same_cuts else (),
        show_progress=show_progress,
    )


def _check_length(max_length: int | None, release: Release) -> int:
    if max_length is None:
        return release.max_length
    return whole_number("max_length", max_length, release.config.max_position_embeddings)


# --- who encodes what


class Team:
    """Which processes encode units together, and which units are theirs.

    Attributes:
        joint: whether all processes encode every unit together, on one mesh; else each has units of its own.
    """

    def __init__(self, sizes: dict[str, int], processes: Processes, *, joint: bool):
        self._sizes = sizes
        self._devices = math.prod(sizes.values())
        self._processes = processes
        self.joint = joint

    @classmethod
    def of(cls, sizes: dict[str, int], processes: Processes) -> Team:
        """The team for a mesh.

        Raises:
            InputError: the mesh takes neither a divisor of this process's devices nor all devices of all processes.
        """
        size, local, everywhere = math.prod(sizes.values()), jax.local_device_count(), jax.device_count()
        if local % size == 0:
            return cls(sizes, processes, joint=False)
        if size == everywhere:
            return cls(sizes, processes, joint=True)
        axes = ",".join(f"{axis}={length}" for axis, length in sizes.items())
        beyond = f", or all {everywhere} of all processes" if everywhere > local else ""
        raise InputError(
            f"a mesh {axes} takes {size} devices; a mesh takes a divisor of the {local} devices of this process{beyond}"
        )

    def todo(self, units: list[Unit], work: Output, show_progress: bool) -> list[Unit]:
        """The units to encode, in order: those of this process's share, or of all if joint, that are not finished."""
        from tqdm import tqdm

        number, total = self._processes
        share = units[number * len(units) // total : (number + 1) * len(units) // total]
        finished = np.zeros(len(units), bool)
        begun = bool(work.finished())
        for unit in tqdm(share, desc="verifying", unit="shard", disable=not (show_progress and begun)):
            finished[unit.number] = work.verify(unit)
        if not self.joint:
            return [unit for unit in share if not finished[unit.number]]
        from jax.experimental import multihost_utils

        finished_pu = np.asarray(multihost_utils.process_allgather(finished)).reshape(total, len(units))
        return [unit for unit in units if not finished_pu[:, unit.number].any()]

    def load(self, path: Path, dtype: str, units: int) -> list[Encoder]:
        """Loads copies of the model: one on the joint mesh, or as many as this process has devices and units for."""
        if self.joint:
            return [load(path, dtype=dtype, mesh=self._mesh(jax.devices()))]
        devices = jax.local_devices()
        groups = [devices[first : first + self._devices] for first in range(0, len(devices), self._devices)]
        mesh = self._mesh(groups[0]) if self._devices > 1 else None
        first = load(path, dtype=dtype, mesh=mesh)
        return [first, *(first.copy_to(group) for group in groups[1:units])]

    def _mesh(self, devices: Sequence[jax.Device]) -> Mesh:
        return make_mesh(self._sizes["data"], self._sizes["fsdp"], self._sizes["tensor"], devices=devices)

    def writes(self, unit: Unit) -> bool:
        """Whether this process writes the shard of a unit that it encodes."""
        return not self.joint or unit.number % self._processes.total == self._processes.number

    def wait_for_others(self, work: Output, progress: Progress) -> None:
        """Waits until all shards exist, if JAX has joined the processes: soon after the first exits, it ends all."""
        while jax.distributed.is_initialized() and not work.all_finished:
            time.sleep(_WAIT_SECONDS)
            progress.advance(0)

    def stops_after(self, done: int) -> bool:
        """Whether all processes are to stop after ``done`` units because one of them received a SIGTERM."""
        if not self.joint:
            return False
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(done)


# --- encoding


class _Job:
    """Encodes and writes units, as many at a time as there are encoders, each in a thread."""

    def __init__(
        self,
        reader: Reader,
        encoders: list[Encoder],
        options: dict[str, Any],
        work: Output,
        team: Team,
        progress: Progress,
    ):
        self._reader = reader
        self._encoders = encoders
        self._options = options
        self._work = work
        self._team = team
        self._progress = progress
        self._stopping = threading.Event()

    def run(self, units: list[Unit]) -> bool:
        """Runs the job; returns whether a SIGTERM to a process of the team ended it early."""
        idle = list(self._encoders)
        running: set[Future[Encoder]] = set()

        def settle() -> None:
            """Waits for at least one of the running units, and raises the error of one that failed."""
            finished, left = wait(running, return_when=FIRST_COMPLETED)
            running.intersection_update(left)
            idle.extend(future.result() for future in finished)

        with ThreadPoolExecutor(len(idle), thread_name_prefix="encode") as pool:
            try:
                for done, item in enumerate(_read_ahead(units, self._reader)):
                    if not idle:
                        settle()
                        if self._team.stops_after(done):
                            return True
                    running.add(pool.submit(self._unit, idle.pop(), item))
                while running:
                    settle()
            finally:
                self._stopping.set()
        return False

    def _unit(self, encoder: Encoder, item: UnitTexts) -> Encoder:
        """Encodes a unit and writes its shard; returns the encoder."""
        so_far = Done(0, 0, 0)

        def on_batch(now: Done) -> None:
            nonlocal so_far
            if self._stopping.is_set():
                raise _StopError
            self._progress.advance(now.texts - so_far.texts)
            so_far = now

        embeddings = encoder.encode(item.texts, on_batch=on_batch, **self._options)
        if self._team.writes(item.unit):
            self._work.write(item.unit, item.ids, embeddings, so_far.truncated)
        return encoder


class _StopError(Exception):
    """Ends a thread whose result is no longer needed."""


def _read_ahead(units: list[Unit], reader: Reader) -> Iterator[UnitTexts]:
    """The units in order; Grain reads the next one in a thread while the previous ones are encoded."""
    grain = _import_grain()
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)  # one thread: a Parquet file is read in order
    return iter(grain.MapDataset.source(units).map(reader.read).to_iter_dataset(options))


def _import_grain() -> Any:
    try:
        import grain
    except ModuleNotFoundError as error:
        raise F2LLMError(f"a corpus is read with {error.name}: pip install 'f2llm-jax[train]'") from None
    return grain


class Progress:
    """A progress bar on standard error of the rows that all processes have done; thread-safe."""

    def __init__(self, todo: list[Unit], corpus: Corpus, work: Output, show: bool):
        self._rows = {unit.number: unit.rows for unit in corpus.units}
        self._todo = {unit.number for unit in todo}
        self._work = work
        self._show = show
        self._total = corpus.rows
        self._lock = threading.Lock()
        self._own = 0

    def __enter__(self) -> Progress:
        from tqdm import tqdm

        self._count_others()
        self._bar = tqdm(
            total=self._total, initial=self._others, unit="row", smoothing=0, disable=not self._show, desc="encoding"
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def advance(self, rows: int) -> None:
        """Adds rows that this process has done; those of the others are recounted at most every ``_COUNT_SECONDS``."""
        with self._lock:
            self._own += rows
            if self._show and time.monotonic() - self._counted >= _COUNT_SECONDS:
                self._count_others()
            self._bar.update(self._others + self._own - self._bar.n)

    def _count_others(self) -> None:
        finished = self._work.finished() - self._todo
        self._others = sum(self._rows[number] for number in finished)
        self._counted = time.monotonic()
