"""A teacher's states of prepared data, computed once and read in every epoch.

A document is a passage or a negative of many examples, in every epoch, and its state is always the same. ::

    teacher.json                      the teacher, the data, and the limits on dimensions and tokens
    documents-NNNNN.array_record      the state of every distinct document; the index is its number
    queries-NNNNN.array_record        the state of every training example's query; the index is the example's number

A record holds the first ``dim`` values of the unnormalised EOS state, in ``dtype``, little-endian.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import grain
import jax
import ml_dtypes
import numpy as np
from array_record.python import array_record_module
from jax.sharding import Mesh

from f2llm_jax.axes import batch_parts
from f2llm_jax.batching import BATCH_TOKENS, Buckets, batched
from f2llm_jax.compilation import use_compilation_cache
from f2llm_jax.config import ModelConfig
from f2llm_jax.convert.load import load_params, open_checkpoint
from f2llm_jax.convert.staging import Workplace, output_path
from f2llm_jax.convert.table import tensor_table
from f2llm_jax.embedding import eos_states
from f2llm_jax.errors import InputError, ReleaseError
from f2llm_jax.model import Params
from f2llm_jax.pipeline import lagging
from f2llm_jax.release import find_release, read_release
from f2llm_jax.sharding import padded_config
from f2llm_jax.tokens import Tokenizer, truncated
from f2llm_jax.train.placement import on_mesh
from f2llm_jax.train.records import Records, Settings, data_digest
from f2llm_jax.train.units import new_folder

Kind = Literal["documents", "queries"]
KINDS: tuple[Kind, ...] = ("documents", "queries")

FORMAT = 1
STATES_FILE = "teacher.json"
DTYPES = {"float32": np.dtype("<f4"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

AS_THEY_ARE = "takes the states as they are"

# Texts per file, and so the most that a kill loses. Their states are in memory until the file is written.
_FILE_TEXTS = 1 << 14
_READ_TEXTS = 2048

# One record per group, for random access without reading other records; states do not compress.
_WRITER_OPTIONS = "group_size:1,uncompressed"


@dataclasses.dataclass(frozen=True)
class StatesSettings:
    """The contents of ``teacher.json``.

    Attributes:
        teacher: the teacher's name, as given.
        commit: the commit of its hub repository; None for a folder.
        teacher_digest, data_digest: digests of its weights and of the prepared data.
        max_length: number of tokens that texts were truncated to.
        dim, dtype: size and dtype of a state.
        documents, queries: number of states.
    """

    teacher: str
    commit: str | None
    teacher_digest: str
    data_digest: str
    max_length: int
    dim: int
    dtype: str
    documents: int
    queries: int


class TeacherStore:
    """A folder that ``teach`` wrote, open for reading. Thread-safe, and can be pickled."""

    def __init__(self, folder: str | Path, width: int | None = None):
        """Opens the folder.

        Args:
            folder: the folder.
            width: read only the first ``width`` values of a state, which are compared with a student of that width.

        Raises:
            InputError: there are no states, they are of another format version or narrower than ``width``, or
                ``teacher.json`` is damaged.
        """
        self.folder = Path(folder)
        file = self.folder / STATES_FILE
        if not file.exists():
            raise InputError(f"{folder} holds no teacher's states (no {STATES_FILE}); make them with f2llm teach")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            if (found := values.pop("format")) != FORMAT:
                raise InputError(f"{file} has format {found}, this version reads {FORMAT}; run f2llm teach again")
            self.settings = StatesSettings(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file} is damaged: {type(error).__name__}: {error}") from None
        check_width(self.settings.dim if width is None else width, self.settings.dim, f"the states in {folder}")
        self._width = self.settings.dim if width is None else width
        self._sources = {
            kind: grain.sources.ArrayRecordDataSource([str(file) for file in sorted(self.folder.glob(f"{kind}-*"))])
            for kind in KINDS
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return TeacherStore, (self.folder, self._width)

    def read(self, kind: Kind, numbers: np.ndarray) -> np.ndarray:
        """The states with these numbers [n, width], in the store's dtype."""
        distinct, inverse = np.unique(np.asarray(numbers, np.int64), return_inverse=True)
        records = self._sources[kind].__getitems__(distinct.tolist())
        dtype = DTYPES[self.settings.dtype]
        states = np.stack([np.frombuffer(record, dtype, self._width) for record in records])
        return states[inverse]


def check_width(student: int, teacher: int, of: str) -> None:
    """Raises an InputError if the student is wider than its teacher."""
    if student > teacher:
        raise InputError(
            f"a student of {student} dimensions cannot be distilled from {teacher}, which is what {of} have: a teacher "
            "must be at least as wide"
        )


def teach(
    data: str | Path,
    teacher: str | Path,
    out: str | Path,
    *,
    dim: int | None = None,
    dtype: str = "bfloat16",
    max_length: int = 1024,
    batch_tokens: int | None = None,
    mesh: Mesh | None = None,
    force: bool = False,
    show_progress: bool = False,
) -> StatesSettings:
    """Computes a teacher's states of every distinct document and every training query.

    If it is killed, there is nothing at ``out``, but an ``OUT.incomplete`` beside it, from which a call with the same
    arguments resumes.

    Args:
        data: a folder that ``f2llm prepare`` wrote.
        teacher: release folder, converted folder or hub id.
        out: the folder to write; it appears when it is complete.
        dim: keep the first ``dim`` values of a state, at least the student's width; default: all. On disk, a state
            takes ``dim`` · 2 bytes (4 in float32).
        dtype: dtype of the operands of matrix products, and of the written states.
        max_length: texts are truncated to this many tokens; training's ``data.max_length`` must be the same.
        batch_tokens: tokens computed at a time.
        mesh: from ``make_mesh``; None for one device.
        force: replace what is at ``out``.
        show_progress: show a progress bar on standard error.

    Raises:
        InputError: ``data`` holds no prepared data or is for another tokenizer, ``dim`` is above the teacher's hidden
            size, or ``out`` exists.
        ReleaseError: the teacher cannot be used.
    """
    data = Path(data).expanduser()
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    prepared = Settings.read(data)
    max_length = prepared.cut_to(max_length)
    release = read_release(find_release(teacher))
    check_tokenizer(release.path, prepared, data)
    dim = release.config.hidden_size if dim is None else dim
    if not 1 <= dim <= release.config.hidden_size:
        raise InputError(f"dim must be within 1..{release.config.hidden_size}, the teacher's hidden size, not {dim}")
    settings = StatesSettings(
        teacher=str(teacher),
        commit=hub_commit(teacher, release.path),
        teacher_digest=teacher_digest(release.path, release.config),
        data_digest=data_digest(data),
        max_length=max_length,
        dim=dim,
        dtype=dtype,
        documents=prepared.documents,
        queries=len(Records(data, "examples", "train")),
    )
    plan = {"format": FORMAT, **dataclasses.asdict(settings)}
    use_compilation_cache()
    workplace = Workplace(output_path(out), plan, marker=STATES_FILE, force=force)
    with closing(workplace):
        params = load_params(open_checkpoint(release.path), release.config, dtype=dtype, mesh=mesh)
        devices = 1 if mesh is None else mesh.size
        if batch_tokens is None:
            batch_tokens = BATCH_TOKENS[jax.default_backend()] * devices
        compute = _Compute(params, padded_config(release.config, mesh), settings, mesh, batch_tokens)
        _write_files(workplace.home / "units", data, compute, prepared, show_progress=show_progress)
        for kind in KINDS:
            for unit in sorted((workplace.home / "units").glob(f"{kind}-*")):
                target = workplace.folder / f"{unit.name}.array_record"
                if not target.exists():  # an earlier process may have been killed here
                    (unit / "states").rename(target)
        (workplace.folder / STATES_FILE).write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
        workplace.commit()
    return settings


@dataclasses.dataclass(frozen=True)
class _Compute:
    """Computes states from tokens."""

    params: Params
    config: ModelConfig
    settings: StatesSettings
    mesh: Mesh | None
    batch_tokens: int

    @functools.cached_property
    def _step(self) -> Any:
        options: dict[str, Any] = {"config": self.config, "dtype": self.settings.dtype}
        return jax.jit(lambda params, batch: eos_states(params, batch, **options)[:, : self.settings.dim])

    def states(self, chunks: Iterator[list[np.ndarray]], count: int, pad_id: int, advance: Any) -> np.ndarray:
        """The states [count, dim] of the texts in all chunks, in the dtype to write."""
        parts = 1 if self.mesh is None else batch_parts(self.mesh)
        buckets = Buckets(self.batch_tokens, self.settings.max_length, parts)
        result = np.empty((count, self.settings.dim), DTYPES[self.settings.dtype])
        batches = batched(chunks, buckets, pad_id)
        started = ((rows, on_mesh(self._step, self.params, rows.batch, self.mesh)) for rows in batches)
        for rows, states_bd in lagging(started):
            result[rows.texts] = np.asarray(states_bd)[: len(rows.texts)]
            advance(len(rows.texts))
        return result


def _write_files(home: Path, data: Path, compute: _Compute, prepared: Settings, *, show_progress: bool) -> None:
    """Writes the files that an earlier process has not written."""
    from tqdm import tqdm

    settings = compute.settings
    counts: dict[Kind, int] = {"documents": settings.documents, "queries": settings.queries}
    sources = {"documents": Records(data, "documents", "train"), "queries": Records(data, "examples", "train")}
    field = {"documents": "tokens", "queries": "query"}
    with tqdm(total=sum(counts.values()), unit="text", disable=not show_progress) as bar:
        for kind, count in counts.items():
            for first in range(0, count, _FILE_TEXTS):
                numbers = range(first, min(first + _FILE_TEXTS, count))
                folder = home / f"{kind}-{first // _FILE_TEXTS:05d}"
                if folder.exists():
                    bar.update(len(numbers))
                    continue
                chunks = _chunks(sources[kind], numbers, field[kind], settings.max_length, prepared.eos_id)
                states = compute.states(chunks, len(numbers), prepared.pad_id, bar.update)
                with new_folder(folder) as temporary:
                    writer = array_record_module.ArrayRecordWriter(str(temporary / "states"), _WRITER_OPTIONS)
                    for state in states:
                        writer.write(state.tobytes())
                    writer.close()


def _chunks(source: Records, numbers: range, field: str, max_length: int, eos_id: int) -> Iterator[list[np.ndarray]]:
    for first in range(0, len(numbers), _READ_TEXTS):
        records = source.read(numbers[first : first + _READ_TEXTS])
        yield [truncated(record[field], max_length, eos_id) for record in records]


# --- checks of tokenizer, teacher and data


def check_tokenizer(release: Path, prepared: Settings, data: str | Path) -> None:
    """Raises an InputError if the data was prepared for models with another EOS or other tokens."""
    tokenizer = Tokenizer.from_release(release)
    mend = f"prepare it with --tokenizer {release}"
    if tokenizer.eos_id != prepared.eos_id:
        raise InputError(
            f"{data} was prepared for models whose EOS is token {prepared.eos_id}; that of {release} is "
            f"{tokenizer.eos_id}: {mend}"
        )
    if prepared.vocabulary != tokenizer.vocabulary:
        raise InputError(f"{data} was prepared for models with other tokens than {release}, or other ids: {mend}")


def teacher_digest(folder: Path, config: ModelConfig) -> str:
    """A digest of the sizes and of the first row of every tensor; independent of a model's format and sharding."""
    digest = hashlib.blake2b(repr(dataclasses.replace(config, dtype="")).encode(), digest_size=16)
    checkpoint = open_checkpoint(folder)
    table = tensor_table(config)
    checkpoint.check(table)
    for tensor in table:
        row = (slice(0, 1), *(slice(None),) * (len(tensor.layer_shape) - 1))
        for name in tensor.hf_names:
            for _, block in checkpoint.blocks(name, tensor.layer_shape, row):
                digest.update(block.astype("<f4").tobytes())
    return digest.hexdigest()


def hub_commit(teacher: str | Path, folder: Path) -> str | None:
    """The commit of a hub model, after which huggingface_hub names its folder; None for a model given as a folder."""
    return None if Path(teacher).expanduser().is_dir() else folder.name


def find_teacher(teacher: str, without: str, *, weights: bool = True) -> Path:
    """``find_release`` for the setting ``teacher``; errors name the setting, and what the run does ``without`` one."""
    try:
        return find_release(teacher, weights=weights)
    except ReleaseError as error:
        raise ReleaseError(f"teacher={teacher}: {error}; teacher=none {without}") from error


def open_store(folder: str | Path, *, data: Path, max_length: int, width: int, teacher: str | None) -> TeacherStore:
    """Opens a teacher's states for a run, after checking that they are the ones that it needs.

    Args:
        folder: a folder that ``teach`` wrote.
        data: the prepared data of the run.
        max_length: number of tokens that the run truncates texts to.
        width: the student's hidden size.
        teacher: the teacher that the states must come from; None for any.

    Raises:
        InputError: they are of other data, another length or another teacher, or the student is wider.
        ReleaseError: the teacher cannot be found.
    """
    store = TeacherStore(folder, width)
    settings = store.settings
    if settings.data_digest != data_digest(data):
        raise InputError(f"{folder} holds states of other data than {data}: make them with f2llm teach {data}")
    if settings.max_length != max_length:
        raise InputError(
            f"{folder} holds states of texts cut to {settings.max_length} tokens, training cuts them to {max_length}: "
            f"set data.max_length={settings.max_length}, or run f2llm teach with --max-length {max_length}"
        )
    if teacher is not None and not _are_of(settings, teacher):
        raise InputError(
            f"{folder} holds states of {settings.teacher}, whose weights are not those of teacher={teacher}; "
            f"teacher=none {AS_THEY_ARE}"
        )
    return store


def _are_of(settings: StatesSettings, teacher: str) -> bool:
    """Whether states come from this teacher. No weights are downloaded if it is a hub model at the same commit."""
    folder = find_teacher(teacher, AS_THEY_ARE, weights=False)
    if settings.commit is not None and settings.commit == hub_commit(teacher, folder):
        return True
    folder = find_teacher(teacher, AS_THEY_ARE)
    return settings.teacher_digest == teacher_digest(folder, ModelConfig.from_release(folder))
