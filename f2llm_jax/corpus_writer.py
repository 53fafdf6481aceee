"""Embeddings in Parquet shards, one for each unit of a corpus, and the manifest that describes them.

::

    manifest.json          once all shards are finished: settings, inputs, and each shard's rows and SHA-256
    shards/000000.parquet   columns `id` and `embedding` (a list of fixed size), in the order of the input
    ranges.npy             for int8: the range of each dimension
    work/plan.json         until then: settings and inputs
    work/000000.json        until then: what the manifest will say of a finished shard

Every file appears by a rename, and a shard before its note in ``work``. So processes need not communicate: a unit is
finished once it has a note, and whichever process sees that all have one writes the manifest.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from f2llm_jax.corpus_reader import Corpus, InputFile, Unit
from f2llm_jax.errors import F2LLMError, InputError, warn
from f2llm_jax.files import new_file, unfinished

if TYPE_CHECKING:
    import pyarrow

FORMAT = 1
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Shard:
    """A finished shard.

    Attributes:
        file: its path in the output folder.
        input: the input file that its rows come from.
        first_row, rows: which rows, counted over all inputs.
        bytes, sha256: of the file.
        truncated: number of texts that exceeded the token limit.
    """

    file: str
    input: str
    first_row: int
    rows: int
    bytes: int
    sha256: str
    truncated: int


def embedding_table(ids: pyarrow.Array, embeddings: np.ndarray) -> pyarrow.Table:
    """A table of columns ``id`` and ``embedding``, the latter a list of fixed size, from [n, dim]."""
    import pyarrow

    values = pyarrow.array(embeddings.reshape(-1))
    embedding_column = pyarrow.FixedSizeListArray.from_arrays(values, embeddings.shape[1])
    return pyarrow.table({"id": ids, "embedding": embedding_column})


def read_plan(out: Path) -> dict[str, Any] | None:
    """The plan of an earlier run in this folder: ``settings`` and ``inputs``; None for a new or empty folder.

    Raises:
        InputError: the folder holds something else.
    """
    for file in (out / "work" / "plan.json", out / MANIFEST):
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        return _parse(text, file, out)
    if out.exists() and not _is_new(out):
        raise InputError(f"{out} exists and has no {MANIFEST}, so no such command made it; name a new folder")
    return None


def read_manifest(out: Path) -> dict[str, Any]:
    """What ``manifest.json`` says of a finished folder.

    Raises:
        InputError: the folder is unfinished, or holds something else.
    """
    file = out / MANIFEST
    try:
        return _parse(file.read_text(encoding="utf-8"), file, out)
    except FileNotFoundError:
        if (out / "work").is_dir():
            raise InputError(
                f"{out} is unfinished, without {MANIFEST} yet: the f2llm encode command that began it goes on with it"
            ) from None
        raise InputError(f"{out} has no {MANIFEST}, so f2llm encode --corpus did not write it") from None


def _parse(text: str, file: Path, out: Path) -> dict[str, Any]:
    """A plan or a manifest, of the folder's format."""
    try:
        plan = json.loads(text)
    except ValueError as error:
        plan = error
    if not isinstance(plan, dict):
        raise InputError(f"{file} is damaged: {plan}; name another folder, or remove {out} to start over")
    if plan.get("format") != FORMAT:
        raise InputError(f"{file} is of format {plan.get('format')!r}; this version writes {FORMAT}")
    return plan


def _is_new(out: Path) -> bool:
    """Whether a folder holds only what a run creates before its plan: another process may just have begun it."""
    if not out.is_dir():
        return False
    shards = out / "shards"
    own = {out / name for name in ("shards", "work", "ranges.npy")}
    strangers = set(out.iterdir()) - own - set(unfinished(out, "ranges.npy"))
    return not strangers and not (shards.exists() and any(shards.iterdir()))


def known_inputs(plan: dict[str, Any] | None) -> list[InputFile]:
    """The indexed inputs of a plan; those of a manifest are not indexed."""
    inputs = [] if plan is None else plan["inputs"]
    return [InputFile(**{**file, "units": tuple(map(tuple, file["units"]))}) for file in inputs if "units" in file]


class Output:
    """An output folder, new or begun by an earlier run.

    Attributes:
        folder: where it is.
        fingerprint: of the settings and of the inputs' formats and contents; shards with another do not belong here.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        corpus: Corpus,
        *,
        model: str,
        ranges: np.ndarray | None = None,
    ):
        """Claims the folder for these settings and inputs.

        Args:
            folder: created if needed.
            settings: JSON values; nothing belongs here that can vary while the result stays the same.
            corpus: the inputs.
            model: its name, for the manifest.
            ranges: float32 [2, dim], for int8 embeddings.

        Raises:
            InputError: the folder holds the output of other settings or inputs; the message says which.
        """
        self.folder = folder
        self._corpus = corpus
        self._model = model
        self._settings = json.loads(json.dumps(settings))
        contents = [[file.format, file.bytes, file.sha256] for file in corpus.files]
        self.fingerprint = hashlib.sha256(json.dumps([self._settings, contents]).encode()).hexdigest()
        found = read_plan(folder)
        if found is not None:
            self._refuse_changes(found)
        try:
            if not self.complete:
                self._begin(ranges)
        except FileNotFoundError:
            if not self.complete:  # else other processes have just finished and removed the notes
                raise

    def _refuse_changes(self, found: dict[str, Any]) -> None:
        changed = [
            f"{key} (was {before!r}, is {self._settings.get(key)!r})"
            for key, before in found["settings"].items()
            if self._settings.get(key) != before
        ]
        before, now = found["inputs"], self._corpus.files
        if not changed and len(before) != len(now):
            changed = [f"the number of input files (was {len(before)}, is {len(now)})"]
        for old, new in zip(before, now, strict=False):
            if (old["format"], old["bytes"], old["sha256"]) != (new.format, new.bytes, new.sha256):
                changed.append(new.path if old["path"] == new.path else f"{new.path} in place of {old['path']}")
        if changed:
            raise InputError(
                f"{self.folder} was begun with other settings or inputs; changed: {', '.join(changed)}; "
                "repeat that command to finish it, or name another --out"
            )

    def _begin(self, ranges: np.ndarray | None) -> None:
        (self.folder / "shards").mkdir(parents=True, exist_ok=True)
        (self.folder / "work").mkdir(exist_ok=True)
        if ranges is not None:
            with new_file(self.folder / "ranges.npy", sync=True) as stream:
                np.save(stream, ranges)
        inputs = [dataclasses.asdict(file) for file in self._corpus.files]
        plan = {"format": FORMAT, "settings": self._settings, "inputs": inputs}
        self._write_json(self.folder / "work" / "plan.json", plan)

    @property
    def complete(self) -> bool:
        """Whether the manifest exists."""
        return (self.folder / MANIFEST).exists()

    @property
    def all_finished(self) -> bool:
        return len(self.finished()) == len(self._corpus.units)

    def finished(self) -> set[int]:
        """The numbers of the units that any process has finished."""
        try:
            names = os.listdir(self.folder / "work")
        except FileNotFoundError:
            names = []
        if self.complete:  # the notes may then be gone
            return {unit.number for unit in self._corpus.units}
        return {int(name.removesuffix(".json")) for name in names if name[0].isdigit()}

    def verify(self, unit: Unit) -> bool:
        """Whether a unit is finished and its shard intact; warns if the shard is damaged, and removes its note."""
        shard = self._noted(unit)
        if shard is None:
            return False
        file = self.folder / shard.file
        if file.exists() and file.stat().st_size == shard.bytes and _sha256(file) == shard.sha256:
            return True
        warn(f"{file} is {'damaged' if file.exists() else 'missing'}; it is made again")
        self._note(unit).unlink(missing_ok=True)
        return False

    def write(self, unit: Unit, ids: pyarrow.Array, embeddings: np.ndarray, truncated: int) -> None:
        """Writes the shard of a unit.

        Args:
            unit: the unit.
            ids: Arrow array [rows].
            embeddings: [rows, dim].
            truncated: the number of texts that were truncated.

        Raises:
            F2LLMError: a shard that the manifest lists was made again, and came out different.
        """
        from pyarrow import parquet

        file = self.folder / _shard_file(unit.number)
        with new_file(file, sync=True) as stream:
            # Embeddings hardly ever repeat a value: building a dictionary of them would be wasted work.
            parquet.write_table(embedding_table(ids, embeddings), stream, use_dictionary=False)
        shard = Shard(
            file=_shard_file(unit.number),
            input=self._corpus.files[unit.file].path,
            first_row=unit.first_row,
            rows=unit.rows,
            bytes=file.stat().st_size,
            sha256=_sha256(file),
            truncated=truncated,
        )
        if not self.complete:
            self._write_json(self._note(unit), {"fingerprint": self.fingerprint, **dataclasses.asdict(shard)})
        elif shard != self._noted(unit):
            raise F2LLMError(f"{file} comes out otherwise than {MANIFEST} has it: other hardware, or other versions?")

    def commit(self) -> dict[str, Any] | None:
        """Writes the manifest if all shards are finished, and removes the notes.

        Returns:
            The manifest; None if shards are missing.
        """
        units = self._corpus.units
        if not self.complete:
            if not self.all_finished:
                return None
            shards = [self._noted(unit) for unit in units]
            if self.complete:  # another process was faster
                pass
            elif None in shards:
                raise F2LLMError(f"{self.folder} is being written with other settings at the same time")
            else:
                self._write_manifest([shard for shard in shards if shard is not None])
        shutil.rmtree(self.folder / "work", ignore_errors=True)
        for left in unfinished(self.folder / "shards"):  # left by processes that were killed
            left.unlink(missing_ok=True)
        return json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))

    def _write_manifest(self, shards: list[Shard]) -> None:
        import jax
        import pyarrow

        import f2llm_jax

        manifest = {
            "format": FORMAT,
            "rows": self._corpus.rows,
            "truncated": sum(shard.truncated for shard in shards),
            "model": self._model,
            "settings": self._settings,
            "software": {"f2llm_jax": f2llm_jax.__version__, "jax": jax.__version__, "pyarrow": pyarrow.__version__},
            "inputs": [
                {
                    "path": file.path,
                    "format": file.format,
                    "bytes": file.bytes,
                    "sha256": file.sha256,
                    "rows": file.rows,
                }
                for file in self._corpus.files
            ],
            "shards": [dataclasses.asdict(shard) for shard in shards],
        }
        self._write_json(self.folder / MANIFEST, manifest, indent=1)

    def _note(self, unit: Unit) -> Path:
        return self.folder / "work" / f"{unit.number:06d}.json"

    def _noted(self, unit: Unit) -> Shard | None:
        """The record of a shard, from the manifest or from its note; None if it is not finished.

        Its input is the path that this run uses: other runs may have named the same file differently.
        """
        if self.complete:
            shard = self._listed[unit.number]
        else:
            try:
                note = json.loads(self._note(unit).read_text(encoding="utf-8"))
            except FileNotFoundError:
                return None
            if note.pop("fingerprint") != self.fingerprint:
                return None
            shard = Shard(**note)
        return dataclasses.replace(shard, input=self._corpus.files[unit.file].path)

    @functools.cached_property
    def _listed(self) -> list[Shard]:
        """The shards that the manifest lists."""
        manifest = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
        return [Shard(**shard) for shard in manifest["shards"]]

    @staticmethod
    def _write_json(file: Path, value: dict[str, Any], indent: int | None = None) -> None:
        with new_file(file, sync=True) as stream:
            stream.write(json.dumps(value, indent=indent).encode())  # in ASCII: a file name may not be valid Unicode


def _shard_file(number: int) -> str:
    return f"shards/{number:06d}.parquet"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
