"""SIGTERM: what a scheduler sends before it takes a machine away."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax


class Preemption:
    """Notices a SIGTERM while its block runs.

    With several processes JAX's preemption service does, and makes all of them stop at the same place: it counts their
    calls of ``reached``, and stops them one after the most that any has made when the signal comes.
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
        """Whether to stop here, and from then on. All processes call it in the same places; it waits for none of them.

        Without a signal a call takes a microsecond: the service looks at a number that it has.
        """
        if jax.process_count() > 1 and not self._stops:
            from jax.experimental import multihost_utils

            self._calls += 1
            self._stops = multihost_utils.reached_preemption_sync_point(self._calls)
        return self._stops
