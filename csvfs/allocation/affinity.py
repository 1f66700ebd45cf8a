"""Which groups are this node's to allocate in: those whose locks it masters.

Theory. The lock manager spreads the groups over the nodes (`lockmgr.mastering`), and what a node
masters it locks without a message: the group, and the inodes and open locks placed in it. So a node
begins in groups of its own, and what it made there stays cheap for it. Two nodes that fill
directories of their own have nothing to say to each other.

Only a preference: a node without a group of its own, or whose groups are full, takes any.

invariants: `home` is a group that this node masters in the present view, if there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from csvfs.ondisk.geometry import Geometry


class Affinity:
    """``masters`` says of a group whether this node masters its lock, in the view of ``epoch``."""

    def __init__(
        self, geometry: Geometry, masters: Callable[[int], bool], epoch: Callable[[], int]
    ) -> None:
        self._count: Final = geometry.group_count
        self._masters = masters
        self._epoch = epoch
        self._homes: dict[int, int] = {}
        self._homes_of = 0

    def home(self, group: int) -> int:
        """``group`` itself or the next one upward, around the end, that is this node's."""
        epoch = self._epoch()
        if epoch != self._homes_of:
            self._homes.clear()
            self._homes_of = epoch
        found = self._homes.get(group)
        if found is None:
            found = self._homes[group] = self._search(group)
        return found

    def _search(self, group: int) -> int:
        for step in range(self._count):
            candidate = (group + step) % self._count
            if self._masters(candidate):
                return candidate
        return group
