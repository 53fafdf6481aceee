"""Output folders that appear complete or not at all, and work on them that outlives its process.

While it is made, a folder ``OUT`` is ``OUT.incomplete/release``; beside it lie ``plan.json``, which says what is being
made of what, and ``finished``, a line for every tensor that is done. Then one rename puts it in its place. A process
that is killed leaves ``OUT.incomplete``, and nothing at ``OUT``; the same command goes on from there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from f2llm_jax.errors import F2LLMError, InputError

_PLAN = "plan.json"
_FINISHED = "finished"
_NOTE = "This model folder is incomplete. The command that began it goes on with it; deleting it loses only that work."


class Staging:
    """A folder in the making.

    Attributes:
        out: where it is to appear.
        folder: where it is made.
        finished: names of what an earlier process has finished; empty on a fresh start.
    """

    def __init__(self, out: Path, plan: dict[str, Any], *, force: bool = False):
        """Claims the place: starts afresh, or goes on with what a killed process left.

        Args:
            out: where the folder is to appear; its parent is made if need be.
            plan: JSON values that say what is made of what; unfinished work goes on only under an equal plan.
            force: replace a model folder at ``out``, and drop unfinished work under another plan.

        Raises:
            InputError: ``out`` exists, holds unfinished work under another plan, or is being made right now.
        """
        self.out = out
        self.finished: set[str] = set()
        self.folder = unfinished_folder(out)
        self._home = self.folder.parent
        self._force = force
        # A page that a process wrote survives the process, not the machine: after a restart nothing is taken as done.
        self._plan = json.loads(json.dumps({"note": _NOTE, **plan, "boot": _boot_id()}))
        self._refuse_existing()
        self._home.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
        try:
            self._resume_or_start()
        except BaseException:
            self._lock.close()
            raise

    def _refuse_existing(self) -> None:
        out = self.out
        if out.is_symlink() or (out.exists() and not out.is_dir()):
            raise InputError(f"{out} exists and is no folder")
        if not out.exists():
            return
        if not self._force:
            raise InputError(f"{out} exists; --force replaces it")
        if any(out.iterdir()) and not (out / "config.json").exists():
            raise InputError(f"{out} exists and is no model folder (it has no config.json); it is not replaced")

    def _take_lock(self) -> Any:
        stream = (self._home / ".lock").open("w")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            stream.close()
            raise InputError(f"{self.out} is being written by another process right now") from None
        return stream

    def _resume_or_start(self) -> None:
        plan_file = self._home / _PLAN
        found = json.loads(plan_file.read_text()) if plan_file.exists() else None
        if found == self._plan and self.folder.is_dir():
            lines = (self._home / _FINISHED).read_text().split("\n") if (self._home / _FINISHED).exists() else [""]
            self.finished = set(lines[:-1])  # the last line may have been cut off
        elif found is not None:
            differing = [key for key in self._plan if found.get(key) != self._plan[key]]
            if differing not in ([], ["boot"]) and not self._force:
                raise InputError(
                    f"{self._home} holds unfinished work with another {', '.join(differing)}: repeat that command to "
                    "finish it, or remove the folder or give --force to start over"
                )
        if not self.finished:
            self._start()
        self._journal = (self._home / _FINISHED).open("w" if not self.finished else "a", encoding="utf-8")
        if self.finished:
            self._journal.write("\n")

    def _start(self) -> None:
        known = {".lock", _PLAN, _PLAN + ".new", _FINISHED, "release", "replaced"}
        if strangers := sorted({path.name for path in self._home.iterdir()} - known):
            raise InputError(f"{self._home} holds {strangers[0]}, which is none of this command's; move it away")
        shutil.rmtree(self.folder, ignore_errors=True)
        (self._home / _FINISHED).unlink(missing_ok=True)
        self.folder.mkdir()
        write_text(self._home / (_PLAN + ".new"), json.dumps(self._plan, indent=2))
        (self._home / (_PLAN + ".new")).rename(self._home / _PLAN)

    def finish(self, name: str) -> None:
        """Notes that something is done, for a process that goes on after this one was killed."""
        self._journal.write(name + "\n")
        self._journal.flush()

    def commit(self) -> None:
        """Brings everything to disk, and puts the folder in its place."""
        with ThreadPoolExecutor(8) as pool:  # several at a time share a commit of the file system's journal
            list(pool.map(_sync, [self.folder, *self.folder.rglob("*")]))
        replaced = self._home / "replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        if self.out.exists():
            self.out.rename(replaced)
        self.folder.rename(self.out)
        _sync(self.out.parent)
        self.discard()

    def discard(self) -> None:
        """Leaves nothing behind but what stands at ``out``."""
        self.close()
        shutil.rmtree(self._home)

    def close(self) -> None:
        """Lets go of unfinished work, so that another process can go on with it."""
        self._journal.close()
        self._lock.close()


def output_path(out: str | Path) -> Path:
    """The absolute path of a folder to write: one that has a name, so that there can be one beside it."""
    path = Path(os.path.abspath(Path(out).expanduser()))
    if not path.name:
        raise InputError(f"{out} cannot be written; name a folder in it")
    return path


def unfinished_folder(out: Path) -> Path:
    """Where ``out`` is made."""
    return out.with_name(out.name + ".incomplete") / "release"


@contextlib.contextmanager
def staged(out: Path, plan: dict[str, Any], *, needed: int, force: bool = False) -> Iterator[Staging]:
    """A folder in the making, for a with block; it is committed at the end of it.

    What went wrong with the source or the arguments (an ``F2LLMError``) leaves nothing behind; anything else, a full
    disk or an interruption, leaves the unfinished work for the same command to go on with.

    Args:
        out, plan, force: as for ``Staging``.
        needed: bytes that the folder will take.

    Raises:
        InputError: as for ``Staging``.
        F2LLMError: the disk has too little room, before or after the start.
    """
    staging = Staging(out, plan, force=force)
    try:
        if not staging.finished:
            _check_room(out, needed)
        yield staging
        staging.commit()
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
    """Writes a text file as UTF-8, and its folder if need be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
