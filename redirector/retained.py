"""Writes that the target has taken, and may still forget.

Theory. Until a SYNCHRONIZE CACHE that *began after* a write was answered has itself been answered,
a target with a volatile cache may lose the write. Whoever wrote it keeps it as long: if the
target restarts, the writes go out again, in order, before any flush is answered, so that no fsync
lies. Writes with FUA are kept too: an older retained write must not come out on top of them.

invariants:
  1. entries are in the order in which they were answered, and numbered without gaps
  2. ``size_bytes`` is the sum of the entries
"""

from __future__ import annotations

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
        """Offset and data of each, in the order in which they must be written again."""
        return iter(self._entries)

    def check(self) -> None:
        """Assert the invariants."""
        assert self.size_bytes == sum(len(data) for _, data in self._entries)
