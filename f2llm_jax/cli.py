"""The ``f2llm`` command.

A sub-command is a module in ``f2llm_jax/commands`` that is named in ``COMMANDS``: its docstring is its help,
``declare`` adds its arguments to a parser, and ``run`` does the work and imports everything heavy, so that ``--help``
is immediate.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn, TextIO

import f2llm_jax
from f2llm_jax.errors import F2LLMError

COMMANDS = (
    *("encode", "search", "convert", "verify", "mine", "prepare", "prune", "teach", "train", "average", "evaluate"),
    *("plan", "info", "demo"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the arguments; default: those of the process.

    Returns:
        The exit status: 0; 1 if ``verify`` finds a difference or ``plan`` finds that the job does not fit; 2 after an
        error, which is one line on standard error; 130 after Ctrl-C; 141 if the reader of standard output has gone; 143
        after a SIGTERM that stopped ``train`` or ``encode --corpus``.
        Invalid arguments raise SystemExit(2), as in argparse.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # characters that the terminal cannot show must not stop the command
        sys.stdout.reconfigure(errors="backslashreplace")
    args = make_parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = _print_warning
        try:
            status = args.run(args)
            sys.stdout.flush()
        except BrokenPipeError:
            # The interpreter flushes standard output again at exit, which must not raise BrokenPipeError again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        except KeyboardInterrupt:
            _say("interrupted")
            return 128 + signal.SIGINT
        except F2LLMError as error:
            _say(f"error: {error}")
            return 2
        except OSError as error:
            _say(f"error: {_describe(error)}")
            return 2
    return status or 0


def make_parser() -> argparse.ArgumentParser:
    """The parser, with every sub-command of ``COMMANDS``."""
    parser = _Parser(prog="f2llm", description=_summary(f2llm_jax))
    parser.add_argument("--version", action="version", version=f"f2llm {f2llm_jax.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        command = importlib.import_module(f"f2llm_jax.commands.{name}")
        subparser = commands.add_parser(
            name,
            help=_summary(command),
            description=command.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.declare(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def _summary(module: ModuleType) -> str:
    return (module.__doc__ or "").partition("\n")[0]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"f2llm: error: {message} (see {self.prog} --help)\n")


def _print_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    _say(f"warning: {message}")


def _say(message: str) -> None:
    print("f2llm:", " ".join(line.strip() for line in message.splitlines()), file=sys.stderr)


def _describe(error: OSError) -> str:
    if error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror


if __name__ == "__main__":
    sys.exit(main())
