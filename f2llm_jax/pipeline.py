"""Keeping a device ahead of the host."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def lagging(items: Iterable[T], depth: int) -> Iterator[T]:
    """The items in order, each yielded once ``depth`` later ones have been taken.

    If taking an item dispatches work, and the caller waits for its result, ``depth`` items stay queued on the device.
    """
    waiting: deque[T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > depth:
            yield waiting.popleft()
    yield from waiting
