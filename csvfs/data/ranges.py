"""Byte ranges of one file that tasks of this node write in place, and who keeps out of whose way.

Theory. A write of whole logical blocks needs no order: two that overlap are two writes at once,
and POSIX promises nothing about them. A write of a part of a block reads the block, changes it and
writes it back, and would undo a write to the rest of that block that lands in between. So whole
writes are *shared*, read-modify-writes *exclusive*: an exclusive range waits for every range that
overlaps it, a shared one for the exclusive ones. First come, first served among those that
overlap, so that neither kind starves.

invariants:
  1. of two granted ranges that overlap, both are shared
  2. a range waits only if it conflicts with one that came earlier
"""

from __future__ import annotations

import trio


class ByteRange:
    """Bytes [start, end) of a file, from `RangeLocks.enter` to `RangeLocks.leave`."""

    __slots__ = ("end", "exclusive", "left", "start")

    def __init__(self, start: int, end: int, exclusive: bool) -> None:
        self.start = start
        self.end = end
        self.exclusive = exclusive
        self.left: trio.Event | None = None
        """Made by the first who waits for this range."""

    def conflicts(self, other: ByteRange) -> bool:
        return (
            (self.exclusive or other.exclusive)
            and self.start < other.end
            and other.start < self.end
        )


class RangeLocks:
    """The ranges of one file, in the order in which they came."""

    __slots__ = ("_exclusive", "_ranges")

    def __init__(self) -> None:
        self._ranges: dict[ByteRange, bool] = {}
        """In order of arrival; True: granted."""
        self._exclusive = 0

    def enter_nowait(self, start: int, end: int) -> ByteRange | None:
        """A shared range if no exclusive one is about: what nearly every write needs."""
        if self._exclusive:
            return None
        held = ByteRange(start, end, False)
        self._ranges[held] = True
        return held

    async def enter(self, start: int, end: int, *, exclusive: bool) -> ByteRange:
        """Wait for the bytes [start, end)."""
        wanted = ByteRange(start, end, exclusive)
        earlier = [held for held in self._ranges if held.conflicts(wanted)]
        self._ranges[wanted] = False
        self._exclusive += exclusive
        try:
            for held in earlier:
                if held in self._ranges:
                    if held.left is None:
                        held.left = trio.Event()
                    await held.left.wait()
        except BaseException:
            self.leave(wanted)
            raise
        self._ranges[wanted] = True
        return wanted

    def leave(self, held: ByteRange) -> None:
        """The bytes are free again."""
        del self._ranges[held]
        self._exclusive -= held.exclusive
        if held.left is not None:
            held.left.set()

    def __len__(self) -> int:
        """Ranges held or waited for."""
        return len(self._ranges)

    def check(self) -> None:
        """Assert the invariants at the top of this module."""
        assert self._exclusive == sum(held.exclusive for held in self._ranges)
        granted = [held for held, here in self._ranges.items() if here]
        for index, held in enumerate(granted):
            assert not any(held.conflicts(other) for other in granted[:index])
