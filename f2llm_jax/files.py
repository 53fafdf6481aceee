"""Files that appear complete or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


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
    """The temporary files of ``new_file`` in a folder, also those it was killed over: of a name, by default of all."""
    return folder.glob(f".{name}.*.tmp")
