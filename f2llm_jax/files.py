"""Outputs: their paths, files that appear complete or not at all, and locks for those that take long to write."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from f2llm_jax.errors import InputError


def local_path(path: str | Path) -> Path:
    """The local path of an output; ``~`` is the home folder.

    Raises:
        InputError: it is a URL, which would become a local folder named ``gs:``, say.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):  # a Path keeps only one slash
        raise InputError(f"{path} is a URL; mount the bucket, and give a folder")
    return Path(path).expanduser()


@contextlib.contextmanager
def new_file(path: Path, *, sync: bool = False) -> Iterator[BinaryIO]:
    """A stream to a temporary file that replaces ``path`` if the block succeeds, and is deleted otherwise.

    Args:
        path: the file to write; an existing one is replaced.
        sync: flush it to disk before that, so that it is complete even after the machine fails.
    """
    # Random: in containers a process may have the host name and the process id of one that was killed.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    opened = temporary.open("xb")
    try:
        with opened as stream:
            yield stream
            if sync:
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def unfinished(folder: Path, name: str = "*") -> Iterator[Path]:
    """The temporary files of ``new_file`` in a folder, including those of killed processes; for one name, or all."""
    return folder.glob(f".{name}.*.tmp")


def take_lock(file: Path, out: Path) -> TextIO:
    """Locks an output for this process until the stream is closed or the process ends, in whatever way.

    Args:
        file: the lock file; created if needed, and left there.
        out: the output, for the error message.

    Raises:
        InputError: another process is writing to it.
        OSError: the file system does not support locks.
    """
    import fcntl  # not available on Windows

    stream = file.open("w")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        raise InputError(f"{out} is being written by another process right now") from None
    except OSError as error:
        stream.close()
        raise OSError(error.errno, f"cannot be locked: {error.strerror}", stream.name) from None
    return stream
