"""Keeping a device ahead of the host."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

IN_FLIGHT = 2
"""Batches or steps in flight while the result of the one before them is fetched: on accelerators one computes and one
is queued behind it, on CPUs both compute."""


def lagging(items: Iterable[T], depth: int = IN_FLIGHT) -> Iterator[T]:
    """The items in order, each yielded once ``depth`` later ones have been taken.

    If taking an item dispatches work, and the caller waits for its result, ``depth`` items stay queued on the device.
    """
    waiting: deque[T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > depth:
            yield waiting.popleft()
    yield from waiting
