"""How the tests' programs compile: quickly, or as users' programs do.

Compiling as users do took four fifths of the suite's time. So that is kept for one of each kind of comparison with
others: parity with sentence-transformers, the 80M with transformers, the reference's steps on one device, what the
compiler makes of products. A process that a test starts compiles so too, unless it gets the ``quick_environment``.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.managers import BaseManager
from pathlib import Path

import jax

import f2llm_jax

# LLVM optimises nothing, and loops come from XLA's older emitters, which do not go through MLIR kernel by kernel.
_QUICK_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
_AS_USERS = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}

jit_as_users = functools.partial(jax.jit, compiler_options=_AS_USERS)


def compile_quickly() -> None:
    """Of this process alone: others read the environment, and so does libtpu, which ends at a flag that it lacks."""
    users = os.environ["XLA_FLAGS"]
    os.environ["XLA_FLAGS"] = f"{users} {_QUICK_FLAGS}"
    jax.devices()  # the flags are read once, here
    os.environ["XLA_FLAGS"] = users


def quick_environment(devices: int | None = None) -> dict[str, str]:
    """Of a process that makes the same bits as this one; with as many devices, or another number."""
    flags = os.environ["XLA_FLAGS"] if devices is None else f"--xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": f"{flags} {_QUICK_FLAGS}"}


class _Loader(BaseManager):
    pass


_Loader.register("load", f2llm_jax.load)


@contextmanager
def encoder_as_users(release: Path) -> Iterator[f2llm_jax.Encoder]:
    """An encoder, or what passes for it, in a process of its own, with programs as users' are."""
    with _Loader(ctx=get_context("spawn")) as loader:
        yield loader.load(str(release))
