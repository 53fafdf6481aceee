"""``f2llm train`` in a process of its own: one that dies, or one of two with four CPU devices each.

Run by test_train_loop.py with a JSON object (``die_in``, ``count``: SIGKILL at so many calls of that method; ``port``,
``process``: the coordinator's and this one's number, of two) and the arguments of the command.
"""

from __future__ import annotations

import itertools
import json
import os
import pkgutil
import signal
import sys

import jax


def die_in(path: str, count: int) -> None:
    """SIGKILL when the method has returned for the ``count``th time."""
    owner_path, name = path.rsplit(".", 1)
    owner = pkgutil.resolve_name(owner_path)
    original, calls = getattr(owner, name), itertools.count(1)

    def deadly(*args: object, **kwargs: object) -> object:
        result = original(*args, **kwargs)
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, deadly)


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    if "port" in options:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{options['port']}", num_processes=2, process_id=options["process"])
    if "die_in" in options:
        die_in(options["die_in"], options["count"])
    from f2llm_jax.cli import main

    sys.exit(main(["train", *sys.argv[2:]]))
