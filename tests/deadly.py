"""A conversion that dies. In a file of its own: the process that runs it needs neither torch nor pytest."""

from __future__ import annotations

import itertools
import os
import pkgutil
import signal
from pathlib import Path

from f2llm_jax.convert.conversion import convert_release


def convert_and_die(source: Path, out: Path, to: str, where: str = "", count: int = 0) -> None:
    """Converts, with --force; SIGKILL strikes when the function named ``where`` is called for the ``count``th time."""
    if where:
        path, name = where.rsplit(".", 1)
        owner = pkgutil.resolve_name(path)
        original, calls = getattr(owner, name), itertools.count(1)

        def deadly(*args: object, **kwargs: object) -> object:
            if next(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, deadly)
    convert_release(source, out, to=to, force=True)
