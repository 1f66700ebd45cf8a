"""How much is free, group by group, as far as this node knows: what statfs(2) tells is a sum of it.

Two things teach it. Each transaction of this node that changes a group's header says, when it is
merged, what the header says then (`SpaceCounts.merged`). And headers are read, all of them once,
some of them again from time to time (`csvfs.engine.space`), for what other nodes have changed.

Pure: memory only, and 8 bytes a group.

invariants (`check`)
  1. the totals are the sums over all groups; a group that is not known counts as full
  2. a reading never replaces what was merged since it began
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from csvfs.allocation.group import RESERVE_UNITS
from csvfs.ondisk.geometry import Geometry


class Totals(NamedTuple):
    """What statfs(2) tells."""

    units: int
    """All units of all groups."""
    free_units: int
    available_units: int
    """Without the reserve."""
    free_metadata_blocks: int
    """In units that hold metadata already."""


class SpaceCounts:
    """Free units and free metadata blocks of every group of a volume."""

    def __init__(self, geometry: Geometry) -> None:
        count = geometry.group_count
        self._units: Final = geometry.groups_end_unit - geometry.groups_unit
        self._free_units = array("I", bytes(4 * count))
        self._free_blocks = array("I", bytes(4 * count))
        self._known = bytearray(count)
        self._total_units = self._total_available = self._total_blocks = 0
        self._merged: set[int] | None = None
        """Groups that were merged since the reading on its way began."""
        self.unknown = count
        """Groups of which nothing is known yet."""

    def is_known(self, group: int) -> bool:
        return bool(self._known[group])

    def merged(self, group: int, free_units: int, free_blocks: int) -> None:
        """A transaction of this node made the group's header say this."""
        if self._merged is not None:
            self._merged.add(group)
        self._set(group, free_units, free_blocks)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Headers are being read within the block. One reading at a time."""
        assert self._merged is None
        self._merged = set()
        try:
            yield
        finally:
            self._merged = None

    def was_read(self, group: int, free_units: int, free_blocks: int) -> None:
        """The group's header said this at some moment since `reading` began."""
        assert self._merged is not None
        if group not in self._merged:
            self._set(group, free_units, free_blocks)

    def _set(self, group: int, free_units: int, free_blocks: int) -> None:
        before = self._free_units[group]
        self._total_units += free_units - before
        self._total_available += _available(free_units) - _available(before)
        self._total_blocks += free_blocks - self._free_blocks[group]
        self._free_units[group] = free_units
        self._free_blocks[group] = free_blocks
        if not self._known[group]:
            self._known[group] = 1
            self.unknown -= 1

    def totals(self) -> Totals:
        """The sums, as far as they are known."""
        return Totals(self._units, self._total_units, self._total_available, self._total_blocks)

    def check(self) -> None:
        """Assert the invariants at the top of this module."""
        assert self._total_units == sum(self._free_units)
        assert self._total_available == sum(map(_available, self._free_units))
        assert self._total_blocks == sum(self._free_blocks)
        assert self.unknown == self._known.count(0)


def _available(free_units: int) -> int:
    return max(free_units - RESERVE_UNITS, 0)
