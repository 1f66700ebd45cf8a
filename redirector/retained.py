"""Writes that the target has taken, and may still forget.

Theory. Until a SYNCHRONIZE CACHE that *began after* a write was answered has itself been answered,
a target with a volatile cache may lose the write. Whoever wrote it keeps it as long: if the
target restarts, the writes go out again before any flush is answered, so that no fsync lies.
Writes with FUA are kept too: an older retained write must not come out on top of them.

Of bytes that were written more than once only the newest go out again (`RetainedWrites.newest`). An
older version must not even be there for a moment: should this host die in the middle, it would
have taken the place of a newer one that FUA has made stable. And so the order does not matter,
beginning again does not either, nor does it if the target had forgotten nothing.

invariants:
  1. entries are in the order in which they were answered, and numbered without gaps
  2. ``size_bytes`` is the sum of the entries
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator

import trio

from redirector.block.device import Buffer

FLUSH_BYTES = 32 << 20
"""So much retained makes a flush due at once ..."""
FLUSH_AFTER_S = 1.0
"""... and the oldest write after so long."""
STOP_BYTES = 2 * FLUSH_BYTES
"""With so much retained, writers are to `wait_room`."""


class RetainedWrites:
    """The writes since the last good flush."""

    def __init__(self) -> None:
        self._entries: deque[tuple[int, Buffer]] = deque()
        self._first = 0
        self.size_bytes = 0
        self._some = trio.Event()
        self._much = trio.Event()
        self._room = trio.Event()
        self._stopped = False

    def __len__(self) -> int:
        return len(self._entries)

    # -- hot path ------------------------------------------------------------------------------
    def add(self, offset_bytes: int, data: Buffer) -> None:
        """A write was answered. ``bytes`` are kept as they are, anything mutable is copied."""
        if type(data) is not bytes:
            data = bytes(data)
        self._entries.append((offset_bytes, data))
        self.size_bytes += len(data)
        if len(self._entries) == 1:
            self._some.set()
        if self.size_bytes >= FLUSH_BYTES:
            self._much.set()

    def mark(self) -> int:
        """Where a flush that begins now has everything before."""
        return self._first + len(self._entries)

    def forget(self, mark: int) -> None:
        """The flush that began at ``mark`` was answered."""
        while self._first < mark:
            _, data = self._entries.popleft()
            self._first += 1
            self.size_bytes -= len(data)
        # Only an event that is set is replaced: on any other somebody may be waiting.
        if not self._entries and self._some.is_set():
            self._some = trio.Event()
        if self.size_bytes < FLUSH_BYTES and self._much.is_set():
            self._much = trio.Event()
        self._room.set()
        self._room = trio.Event()

    def stop(self) -> None:
        """There will be no flush any more: let the writers go."""
        self._stopped = True
        self._room.set()

    # -- waiting -------------------------------------------------------------------------------
    async def wait_room(self) -> None:
        """Return when less than `STOP_BYTES` are retained."""
        while self.size_bytes >= STOP_BYTES and not self._stopped:
            await self._room.wait()

    async def wait_due(self) -> None:
        """Return when a flush is due."""
        await self._some.wait()
        with trio.move_on_after(FLUSH_AFTER_S):
            await self._much.wait()

    # -- after a restart of the target -----------------------------------------------------------
    def __iter__(self) -> Iterator[tuple[int, Buffer]]:
        """Offset and data of each, in the order in which they were answered."""
        return iter(self._entries)

    def newest(self) -> list[tuple[int, Buffer]]:
        """Offset and data of pieces that do not overlap: the newest version of every byte."""
        pieces: list[tuple[int, Buffer]] = []
        covered = _Covered()
        for offset_bytes, data in reversed(self._entries):
            end = offset_bytes + len(data)
            for start, stop in covered.cover(offset_bytes, end):
                whole = (start, stop) == (offset_bytes, end)
                piece = memoryview(data)[start - offset_bytes : stop - offset_bytes]
                pieces.append((start, data if whole else piece))
        return pieces

    def check(self) -> None:
        """Assert the invariants."""
        assert self.size_bytes == sum(len(data) for _, data in self._entries)


class _Covered:
    """A set of bytes, as ascending ranges that neither overlap nor touch."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def cover(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Add start..stop-1; returns the ranges of it that were not covered."""
        first, last = bisect_left(self._stops, start), bisect_right(self._starts, stop)
        gaps, at = [], start
        for n in range(first, last):
            if at < self._starts[n]:
                gaps.append((at, self._starts[n]))
            at = max(at, self._stops[n])
        if at < stop:
            gaps.append((at, stop))
        if first < last:
            start, stop = min(start, self._starts[first]), max(stop, self._stops[last - 1])
        self._starts[first:last], self._stops[first:last] = [start], [stop]
        return gaps
