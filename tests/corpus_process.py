"""``f2llm`` in a process of its own, which dies if told to.

Run by test_corpus.py with a JSON object (``die_in``, ``count``: SIGKILL at so many calls of that method; ``port``,
``process``: the coordinator's and this one's number, of two that soon notice a death) and the arguments of the command.
"""

from __future__ import annotations

import json
import sys

import jax
from train_process import die_in

if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    if "port" in options:
        coordinator = f"localhost:{options['port']}"
        jax.distributed.initialize(coordinator, 2, options["process"], heartbeat_timeout_seconds=6)
    from f2llm_jax.cli import main

    if "die_in" in options:
        die_in(options["die_in"], options["count"])
    sys.exit(main(sys.argv[2:]))
