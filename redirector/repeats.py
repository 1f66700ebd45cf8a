"""The ranges of commands that are to be issued again, and who waits for them.

Theory. A write with an unknown outcome is issued again when that is safe. A newer command that
overlaps it must not overtake it: a newer write would be undone by the repeat, and a newer read of a
target that has lost its power would show what was there before.

invariants:
  1. a range is noted from before its first session counts as idle until its command was answered
"""

from __future__ import annotations

from collections.abc import Sequence

import trio

Ranges = Sequence[tuple[int, int]]
"""(offset, length) pairs, bytes."""

BUSY_PAUSES_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Before a command goes again that the target was too busy for; the last one for ever."""


class Repeats:
    """The ranges of writes that are to be issued again; newer commands that overlap wait."""

    def __init__(self) -> None:
        self.ranges: dict[object, tuple[int, int]] = {}
        self._changed = trio.Event()

    def add(self, ranges: Ranges) -> list[object]:
        """Note (offset, length) pairs; `remove` takes what this returns."""
        tokens: list[object] = []
        for offset_bytes, length_bytes in ranges:
            tokens.append(token := object())
            self.ranges[token] = (offset_bytes, offset_bytes + length_bytes)
        return tokens

    def remove(self, tokens: list[object]) -> None:
        """These were answered, or their callers have left."""
        for token in tokens:
            del self.ranges[token]
        self._changed.set()
        self._changed = trio.Event()

    def overlap(self, ranges: Ranges) -> bool:
        """Whether any of them touches a noted one."""
        return any(
            start < offset + length and offset < end
            for start, end in self.ranges.values()
            for offset, length in ranges
        )

    async def wait_change(self) -> None:
        """Return when something was removed."""
        await self._changed.wait()
