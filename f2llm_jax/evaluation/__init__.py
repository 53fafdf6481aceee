"""Evaluation: MTEB, and retrieval and bitext mining on your own data. Needs the extra ``[eval]``."""

from __future__ import annotations

import importlib
from types import ModuleType

from f2llm_jax.errors import InputError


def optional(module: str) -> ModuleType:
    """Imports a module of the extra ``[eval]``; an InputError that says so if it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise InputError(f"evaluation needs {error.name}: pip install 'f2llm-jax[eval]'") from None
