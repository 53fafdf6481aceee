"""Errors that a user can mend: the message names the file, key or number, and what to do. And warnings like them."""

import sys
import warnings


class F2LLMError(Exception):
    """The base of every error this package raises on purpose; the command line prints it as one line."""


class ReleaseError(F2LLMError, ValueError):
    """A model folder that cannot be used as it is: something missing, damaged or not supported."""


class InputError(F2LLMError, ValueError):
    """An argument or an input file that cannot be used as it is."""


def warn(message: str) -> None:
    """A UserWarning that points at the line that called this package, however deep inside it was raised."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "f2llm_jax":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
