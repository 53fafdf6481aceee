"""SIGTERM, which a scheduler sends before it takes a machine away."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax


class Preemption:
    """Notices a SIGTERM while its with block runs.

    With several processes, JAX's preemption service notices it, and stops all of them at the same point: it counts
    their calls of ``reached``, and stops them one call after the highest count of any process when the signal arrives.
    """

    def __init__(self) -> None:
        self._stops = False
        self._calls = 0
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
        self._stops = True

    def reached(self) -> bool:
        """Whether to stop here; once True, it stays so. All processes must call it at the same points; it never waits.

        Without a signal, a call takes a microsecond: the service only looks up a number.
        """
        if jax.process_count() > 1 and not self._stops:
            from jax.experimental import multihost_utils

            self._calls += 1
            self._stops = multihost_utils.reached_preemption_sync_point(self._calls)
        return self._stops
