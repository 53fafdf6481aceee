"""Errors that a user can fix: the message names the file, key or number, and says what to do. Warnings likewise."""

import operator
import sys
import warnings
from typing import Any


class F2LLMError(Exception):
    """The base of all errors that this package raises on purpose; the command line prints them as one line."""


class ReleaseError(F2LLMError, ValueError):
    """A model folder that cannot be used as it is: something missing, damaged or not supported."""


class InputError(F2LLMError, ValueError):
    """An argument or an input file that cannot be used as it is."""


def warn(message: str, *, every_time: bool = False) -> None:
    """Issues a UserWarning that points at the line that called this package, however deep inside it is raised.

    Args:
        message: what to say.
        every_time: show the warning even if it was shown before; by default, Python leaves out repeats.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "f2llm_jax":
        frame = frame.f_back
    said = None if every_time else frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(
        message, UserWarning, frame.f_code.co_filename, frame.f_lineno, frame.f_globals.get("__name__"), said
    )


def whole_number(name: str, value: Any, largest: int | None = None, advice: str = "") -> int:
    """``value`` as an int; an InputError unless it is a whole number (NumPy's included) within 1 … ``largest``."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1 or (largest is not None and number > largest):
        kind = "a positive whole number" if largest is None else f"a whole number within 1..{largest}"
        raise InputError(f"{name} must be {kind}, not {value!r}{advice}")
    return number
