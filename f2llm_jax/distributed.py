"""Multiple processes: which of them this one is, and how they find each other."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import jax

from f2llm_jax.errors import InputError


class Processes(NamedTuple):
    """Which process this is, from 0, and how many there are."""

    number: int
    total: int


ALONE = Processes(0, 1)


def start(
    coordinator: str | None = None, count: int | None = None, number: int | None = None, *, detect: bool = False
) -> Processes:
    """Joins the processes of a run; call it before anything is computed.

    With a coordinator, ``jax.distributed`` is started, and ``jax.devices()`` are those of all processes. Without one,
    ``count`` and ``number`` only describe independent processes, each with its own devices. On a Cloud TPU, and with
    ``detect``, JAX finds the coordinator and the numbers itself. A process that has already joined stays as it is.

    Args:
        coordinator: HOST:PORT of process 0, the same in every process.
        count: how many processes there are.
        number: which one this is, from 0.
        detect: let JAX find the others, as it can under Slurm, Open MPI and Kubernetes.

    Raises:
        InputError: the arguments are inconsistent, or the processes do not find each other.
    """
    if (count is None) != (number is None):
        raise InputError("--processes and --process-id go together: how many there are, and which one this is, from 0")
    if count is not None and number is not None and not 0 <= number < count:
        raise InputError(f"--process-id must be within 0..{count - 1} for --processes {count}, not {number}")
    if coordinator is not None and count is None:
        raise InputError("--coordinator needs --processes and --process-id")
    if not jax.distributed.is_initialized():
        if coordinator is not None:
            _initialize(coordinator_address=coordinator, num_processes=count, process_id=number)
        elif count is not None and number is not None:
            return Processes(number, count)
        elif detect or on_cloud_tpu():
            _initialize()
        else:
            return ALONE
    return Processes(jax.process_index(), jax.process_count())


def on_cloud_tpu() -> bool:
    """Whether JAX will run on the chips of a Cloud TPU that can tell which hosts belong together.

    ``import jax`` sets TPU_SKIP_MDS_QUERY if it finds no chips, as do users whose machine has no metadata server; on
    Kubernetes the hosts are listed in TPU_WORKER_HOSTNAMES.
    """
    settings: Any = jax.config  # its attributes are created at run time
    on_tpu = "tpu" in (settings.jax_platforms or "").split(",")
    return on_tpu and ("TPU_WORKER_HOSTNAMES" in os.environ or "TPU_SKIP_MDS_QUERY" not in os.environ)


def _initialize(
    coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    try:
        jax.distributed.initialize(coordinator_address, num_processes, process_id)
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"the processes do not find each other: {error}; "
            "--coordinator HOST:PORT --processes N --process-id I name them"
        ) from None
