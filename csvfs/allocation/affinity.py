"""Which groups are this node's to allocate in: those whose locks it masters.

Theory. The lock manager spreads the groups over the nodes (`lockmgr.mastering`), and what a node
masters it locks without a message: the group, and the inodes and open locks placed in it. So a node
begins in groups of its own, and what it made there stays cheap for it. Two nodes that fill
directories of their own have nothing to say to each other.

Only a preference: a node without a group of its own, or whose groups are full, takes any. And so
does one whose groups are locked by others, who freed something there or looked what is there: a
transaction waits for no group as long as there is another. They keep those locks in their caches,
though; so that the node does not stay for ever where each file costs messages, it *claims* one of
its groups beside (`csvfs.engine.homes`): asks for its lock, and lets it go into its own cache.

invariants: `home` is a group that this node masters in the present view, if there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import trio

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
        self._strayed = trio.Event()
        self._stray_home = 0

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
        return next(self.homes(group), group)

    def homes(self, group: int) -> Iterator[int]:
        """All groups of this node, from ``group`` upward, around the end."""
        for step in range(self._count):
            candidate = (group + step) % self._count
            if self._masters(candidate):
                yield candidate

    def used(self, home: int, group: int) -> None:
        """``group`` was taken for what was best in ``home``."""
        if group != home and self._masters(home) and not self._masters(group):
            self._stray_home = home
            self._strayed.set()

    async def strayed(self) -> int:
        """The `home` of something that was made in the group of another node, since the last
        return: await it."""
        await self._strayed.wait()
        self._strayed = trio.Event()
        return self._stray_home
