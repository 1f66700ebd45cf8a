"""Points in time at which something is to be looked at again; entries are never taken out early."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

_ROOM = 64


class Timers(Generic[Key]):
    """A heap of (time, key). A timer that ``still_due(when, key)`` denies is dropped unseen.

    Granted claims leave their deadline behind; the heap is swept when it has doubled, so that
    setting a timer stays cheap and the rest is bounded by twice what is alive.
    """

    __slots__ = ("_count", "_heap", "_still_due", "_sweep_at")

    def __init__(self, still_due: Callable[[float, Key], bool]) -> None:
        self._heap: list[tuple[float, int, Key]] = []
        self._count = 0
        self._sweep_at = _ROOM
        self._still_due = still_due

    def set(self, when: float, key: Key) -> None:
        """Look at ``key`` at ``when``."""
        if len(self._heap) >= self._sweep_at:
            self._heap = [timer for timer in self._heap if self._still_due(timer[0], timer[2])]
            heapify(self._heap)
            self._sweep_at = max(_ROOM, 2 * len(self._heap))
        self._count += 1
        heappush(self._heap, (when, self._count, key))

    def next(self) -> float | None:
        """The time of the first timer that is still due; None: there is none."""
        heap = self._heap
        while heap:
            when, _, key = heap[0]
            if self._still_due(when, key):
                return when
            heappop(heap)
        return None

    def pop_due(self, now: float) -> Key | None:
        """Take the first timer whose time has come; None: there is none."""
        when = self.next()
        if when is None or when > now:
            return None
        return heappop(self._heap)[2]
