"""Outputs: where they may be, files that appear complete or not at all, and locks on what takes long to write."""

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
    """Where an output is to be.

    Raises:
        InputError: it is a URL, of which a folder ``gs:`` here would be made.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):  # a Path has but one slash left
        raise InputError(f"{path} is a URL; mount the bucket, and give a folder")
    return Path(path)


@contextlib.contextmanager
def new_file(path: Path, *, sync: bool = False) -> Iterator[BinaryIO]:
    """A stream to a file beside ``path`` that takes its place when the block ends well, else vanishes.

    Args:
        path: where it is to appear; a file that is there is replaced.
        sync: bring it to disk first, so that it is complete also after the machine has failed.
    """
    # At random: in containers a process may have the host name and the number of one that was killed.
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
    """Claims an output for this process, until the stream is closed or the process ends, however it ends.

    Args:
        file: what is locked; it is made if need be, and stays.
        out: the output, for the message.

    Raises:
        InputError: another process writes to it.
        OSError: the file system has no locks.
    """
    import fcntl  # which Windows has not

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
