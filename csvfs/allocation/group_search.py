"""In which order the allocation groups are tried for one allocation, and what it means if all fail.

    the goal's group, the groups that the caller prefers, then all others, upward from the goal's

A group's blocks are read only under its lock, which is tried and never waited for; headers are
asked for in growing lots, so that a volume whose first thousand groups are full costs a few
rounds of reading and not a thousand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from csvfs.allocation.group import Group
from csvfs.engine.locks import Resources
from csvfs.errors import NoSpace
from csvfs.journal.transaction import BlockKey, NeedLock, Transaction
from csvfs.ondisk.block import BlockType
from csvfs.ondisk.geometry import Geometry
from lockmgr.modes import Mode

_LOT_GROWTH: Final = 4
_MAX_LOT: Final = 256


class GroupSearch:
    """One search. ``seen`` remembers for later ones what ``measure`` said of each group."""

    __slots__ = (
        "_busy",
        "_geometry",
        "_goal",
        "_measure",
        "_passed",
        "_preferred",
        "_resources",
        "_seen",
        "_tx",
    )

    def __init__(
        self,
        geometry: Geometry,
        resources: Resources,
        tx: Transaction,
        goal: int | None,
        preferred: Iterable[int],
        seen: dict[int, int],
        measure: Callable[[Group], int],
    ) -> None:
        self._geometry = geometry
        self._resources = resources
        self._tx = tx
        self._goal = goal
        self._preferred = preferred
        self._seen = seen
        self._measure = measure
        self._busy: int | None = None
        self._passed = 0

    def order(self) -> Iterator[int]:
        """All groups, in the order in which they are tried."""
        geometry = self._geometry
        tried = set()
        first = 0
        if self._goal is not None and geometry.holds_unit(self._goal):
            first = geometry.group_of_unit(self._goal)
            tried.add(first)
            yield first
        for number in self._preferred:
            if number not in tried:
                tried.add(number)
                yield number
        for number in range(first, first + geometry.group_count):
            number %= geometry.group_count
            if number not in tried:
                yield number

    def passes(self, minimum: int) -> Iterator[Iterator[int]]:
        """First the groups that were not seen below ``minimum``; if that fails, the others.

        What was seen is what an ordinary transaction may take: a privileged one looks for itself.
        """
        skipped: list[int] = []
        if self._tx.privileged:
            yield self.order()
            return

        def hopeful() -> Iterator[int]:
            for number in self.order():
                if self._seen.get(number, minimum) < minimum:
                    skipped.append(number)
                    self._passed += 1
                else:
                    yield number

        yield hopeful()
        yield iter(skipped)

    def locked(self, numbers: Iterator[int]) -> Iterator[Group]:
        """Those of ``numbers`` whose lock is to be had without waiting.

        The first alone, and more at a time the more were passed by: by an earlier run of the
        same body, too, which saw them full.
        """
        lot: list[int] = []
        for number in numbers:
            lot.append(number)
            if len(lot) > min(_LOT_GROWTH * self._passed, _MAX_LOT):
                yield from self._read(lot)
                lot = []
        yield from self._read(lot)

    def _read(self, lot: list[int]) -> Iterator[Group]:
        held = [number for number in lot if self._try_lock(number)]
        self._passed += len(lot)
        if len(held) > 1:
            self._tx.require(
                BlockKey(self._geometry.group_header(number), BlockType.GROUP_HEADER, number)
                for number in held
            )
        for number in held:
            group = Group(self._tx, self._geometry, number)
            self._seen[number] = self._measure(group)
            yield group

    def _try_lock(self, number: int) -> bool:
        if self._tx.try_lock(self._resources.group(number), Mode.EX):
            return True
        if self._busy is None:
            self._busy = number
        return False

    def failure(self, reason: str) -> NeedLock | NoSpace:
        """What to raise when nothing was found: a group was locked elsewhere, or all are full."""
        if self._busy is not None:
            return NeedLock(self._resources.group(self._busy), Mode.EX)
        return NoSpace(reason)
