"""SIGTERM: what a scheduler sends before it takes a machine away."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax


class Preemption:
    """Notices a SIGTERM while its block runs.

    With several processes JAX's preemption service does, and makes all of them stop after the same step.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._before: Any = None

    def __enter__(self) -> Preemption:
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def reached(self, step: int) -> bool:
        """Whether to stop after this step."""
        if jax.process_count() == 1:
            return self._signalled
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)
