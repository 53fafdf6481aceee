"""Output folders that appear complete or not at all, and that can be finished after their process was killed.

While a folder ``OUT`` is being written, it is in ``OUT.incomplete``, beside ``plan.json``, which states the inputs and
settings, and whatever else the work needs. Then a rename moves it into place. A process that is killed leaves
``OUT.incomplete`` and nothing at ``OUT``; the same command resumes from there.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from f2llm_jax.errors import F2LLMError, InputError
from f2llm_jax.files import local_path, new_file, take_lock

_LOCK = ".lock"
_PLAN = "plan.json"
_FINISHED = "finished"
_NOTE = "This model folder is incomplete. The command that began it goes on with it; deleting it loses only that work."


class OutputAppearedError(InputError):
    """Something that must not be replaced appeared at the place for a folder; the folder itself is complete."""


class Workplace:
    """A folder that is being written, and a working folder around it, claimed for this process.

    Attributes:
        out: where the folder is to appear.
        home: the working folder, ``OUT.incomplete``.
        folder: where the folder is written, in ``home``.
    """

    _FOLDER = "result"
    _STRANGER = "has no {marker}, so no such command made it"

    def __init__(self, out: Path, plan: dict[str, Any], *, marker: str, force: bool = False):
        """Claims the working folder: starts afresh, or resumes what a killed process left.

        Args:
            out: where the folder is to appear; its parent is created if necessary.
            plan: inputs and settings as JSON values; unfinished work is resumed only if its plan is equal.
            marker: a file that every folder of this kind has; a folder without it is not replaced.
            force: replace a folder at ``out``, and discard unfinished work with another plan.

        Raises:
            InputError: ``out`` exists, there is unfinished work with another plan, or another process is writing it.
        """
        self.out, self.home = out, _home(out)
        self.folder = self.home / self._FOLDER
        self._marker, self._force = marker, force
        self._refuse_existing()
        self._refuse_strangers()
        self.home.mkdir(parents=True, exist_ok=True)
        self._lock = take_lock(self.home / _LOCK, self.out)
        try:
            self._resume_or_start(json.loads(json.dumps(plan)))
        except BaseException:
            self.close()
            raise

    def _refuse_existing(self) -> None:
        out, marker = self.out, self._marker
        if out.is_symlink() or (out.exists() and not out.is_dir()):
            raise InputError(f"{out} exists and is no folder")
        if not out.exists():
            return
        if not self._force:
            raise InputError(f"{out} exists; --force replaces it")
        if any(out.iterdir()) and not (out / marker).exists():
            raise InputError(f"{out} exists and {self._STRANGER.format(marker=marker)}; it is not replaced")

    def _refuse_strangers(self) -> None:
        """An InputError if the working folder is not ours: ours has a lock from its first moment to its last."""
        if self.home.exists() and not (self.home / _LOCK).exists() and (found := sorted(self.home.iterdir())):
            raise InputError(f"{self.home} holds {found[0].name}, which is none of this command's; move it away")

    def _resume_or_start(self, plan: dict[str, Any]) -> None:
        found = self._read_plan()
        if found is not None and found != plan:
            differing = [key for key in plan if found.get(key) != plan[key]]
            if differing not in ([], ["boot"]) and not self._force:
                raise InputError(
                    f"{self.home} holds unfinished work with another {', '.join(differing)}: repeat that command to "
                    "finish it, or remove the folder or give --force to start over"
                )
        if found != plan or not self._begun():
            self._start(plan)
        for left in self.home.rglob(".*/"):  # temporary folders of interrupted parts
            shutil.rmtree(left, ignore_errors=True)

    def _read_plan(self) -> dict[str, Any] | None:
        """The plan in the working folder; None if there is none or it is damaged, as that work cannot be resumed."""
        try:
            found = json.loads((self.home / _PLAN).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _begun(self) -> bool:
        """Whether there is work to resume, with the plan in the working folder."""
        return self.folder.is_dir()

    def _start(self, plan: dict[str, Any]) -> None:
        self._clear()
        self.folder.mkdir()
        with new_file(self.home / _PLAN, sync=True) as stream:
            stream.write(json.dumps(plan, indent=2).encode())

    def _clear(self) -> None:
        """Deletes all but the lock; the plan goes first, so that no process resumes from what is left of the rest."""
        (self.home / _PLAN).unlink(missing_ok=True)
        for path in self.home.iterdir():
            if path.name != _LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def commit(self) -> None:
        """Flushes everything to disk, and moves the folder into place.

        Raises:
            OutputAppearedError: something new appeared at ``out``, or what is there may not be replaced.
        """
        sync(self.folder)
        try:
            self._refuse_existing()
        except InputError as error:
            raise OutputAppearedError(f"{error}; what was made is whole, in {self.folder}") from None
        replaced = self.home / "replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        if self._force and self.out.exists():
            self.out.rename(replaced)
        self.folder.rename(self.out)
        _sync(self.out.parent)
        self.discard()

    def discard(self) -> None:
        """Deletes everything but what is at ``out``."""
        self._clear()
        self.close()
        shutil.rmtree(self.home)

    def close(self) -> None:
        """Releases unfinished work, so that another process can resume it."""
        self._lock.close()


class Staging(Workplace):
    """A model folder that is being written: its files have their full size and are filled tensor by tensor.

    Attributes:
        finished: names of the tensors that an earlier process finished; empty on a fresh start.
    """

    _FOLDER = "release"
    _STRANGER = "is no model folder (it has no {marker})"

    def __init__(self, out: Path, plan: dict[str, Any], *, force: bool = False):
        """See ``Workplace``."""
        self.finished: set[str] = set()
        # Written pages survive a kill of the process, not a crash of the machine: after a reboot, nothing counts as
        # finished.
        super().__init__(out, {"note": _NOTE, **plan, "boot": _boot_id()}, marker="config.json", force=force)

    def _begun(self) -> bool:
        file = self.home / _FINISHED
        if super()._begun() and file.exists():
            text = file.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]
            os.truncate(file, len(whole))  # the last line may be incomplete
            self.finished = set(whole.decode().split())
        return bool(self.finished)

    def finish(self, name: str) -> None:
        """Records a tensor as finished, for a process that resumes after this one was killed."""
        with (self.home / _FINISHED).open("a", encoding="utf-8") as journal:
            journal.write(name + "\n")


def output_path(out: str | Path) -> Path:
    """The absolute path of a folder to write; an InputError for a URL or for a path without a name, such as ``/``."""
    path = Path(os.path.abspath(local_path(out)))
    if not path.name:
        raise InputError(f"{out} cannot be written; name a folder in it")
    return path


def refuse_to_delete(source: Path, out: Path) -> None:
    """An InputError if the output, or its working folder, would replace the source."""
    for place in (out, _home(out)):
        if source.resolve().is_relative_to(place.resolve()):
            raise InputError(f"{place} is, or holds, the model {source}, and would replace it; write to another folder")


def _home(out: Path) -> Path:
    return out.with_name(out.name + ".incomplete")


def unfinished_folder(out: Path) -> Path:
    """Where the model folder ``out`` is written before it is complete."""
    return _home(out) / Staging._FOLDER


@contextlib.contextmanager
def staged(out: Path, plan: dict[str, Any], *, needed: int, force: bool = False) -> Iterator[Staging]:
    """A model folder that is written in a with block, and committed at the end of the block.

    An error in the source or the arguments (an ``F2LLMError``) leaves nothing behind; anything else (a full disk, an
    interruption, a folder that appeared at ``out``) leaves the work for the same command to resume.

    Args:
        out, plan, force: as for ``Staging``.
        needed: bytes that the folder will take.

    Raises:
        InputError: as for ``Staging``.
        F2LLMError: there is too little space on the disk, before the start or during the work.
    """
    staging = Staging(out, plan, force=force)
    try:
        if not staging.finished:
            _check_room(out, needed)
        yield staging
        staging.commit()
    except OutputAppearedError:
        staging.close()
        raise
    except F2LLMError:
        staging.discard()
        raise
    except OSError as error:
        staging.close()
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise F2LLMError(
            f"the disk of {out} is full: {_size(needed)} are needed for it in all, {_size(_free(out))} are free now; "
            "make room and repeat the command, which goes on where it stopped"
        ) from None
    except BaseException:
        staging.close()
        raise


def _check_room(out: Path, needed: int) -> None:
    free = _free(out)
    if needed > free:
        raise F2LLMError(f"{out} needs {_size(needed)} ({needed} bytes), its disk has {_size(free)} ({free} bytes)")


def _free(out: Path) -> int:
    return shutil.disk_usage(out.parent).free


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _boot_id() -> str:
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.exists() else ""


def write_text(file: Path, text: str) -> None:
    """Writes a text file as UTF-8, and creates its folder if necessary."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def sync(folder: Path) -> None:
    """Flushes a folder and everything in it to disk."""
    with ThreadPoolExecutor(8) as pool:  # concurrent calls share one commit of the file system's journal
        list(pool.map(_sync, [folder, *folder.rglob("*")]))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
