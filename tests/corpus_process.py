"""``f2llm`` in a process of its own, which dies if told to.

Run by test_corpus.py with ``METHOD:COUNT``, or nothing, for a SIGKILL at so many calls of that method, and the
arguments of the command.
"""

from __future__ import annotations

import sys

from train_process import die_in

if __name__ == "__main__":
    from f2llm_jax.cli import main

    if sys.argv[1]:
        method, _, count = sys.argv[1].partition(":")
        die_in(method, int(count))
    sys.exit(main(sys.argv[2:]))
