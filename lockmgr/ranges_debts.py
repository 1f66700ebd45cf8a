"""Files whose byte ranges a departed node may hold, until it may be granted over.

A node that departed may go on until its lease is over (`lockmgr.debts`, ``uncleared``), and so may
its processes, with the locks that they have. What they have, its master knew. So after a recovery
a file is open if this node was its master in every view in which it may have been granted last,
and had not granted it to a departed node. Files of other masters, and of those that departed
themselves, stay closed. Journals do not matter here: who reads what the departed has written
needs other locks for that.

invariants (`check`):
- what is closed is so for somebody who is uncleared
- thawed: nothing is kept
"""

from __future__ import annotations

from collections.abc import Iterable

from lockmgr.debts import Debts
from lockmgr.mastering import Choose, Mastering
from lockmgr.messages import Resource
from lockmgr.ranges import RangeLocks


class RangeDebts:
    """What master ``node`` may not grant yet."""

    def __init__(self, node: int, debts: Debts, choose: Choose) -> None:
        self.node = node
        self._debts = debts
        self._choose = choose
        self._kept: dict[bytes, set[int]] = {}
        """Who has held ranges of a file here since the last thaw, by its name."""
        self._closed: dict[bytes, frozenset[int]] = {}
        self._views: dict[tuple[int, ...], tuple[Mastering, frozenset[int]]] = {}
        """Masters of views in which these may have been granted what this node did not master."""

    def freeze(self, files: Iterable[RangeLocks]) -> None:
        """The view changes; this is what the node knew as a master."""
        for file in files:
            holders = self._kept.setdefault(file.resource.name, set())
            holders.update(owner.node for owner in file.held)

    def thaw(self, views: Iterable[tuple[int, ...]]) -> None:
        """The locks are recovered. ``views``: members of each that may have granted last."""
        uncleared = self._debts.uncleared
        for name, holders in self._kept.items():
            if gone := holders & uncleared:
                self._closed[name] = self._closed.get(name, frozenset()) | gone
        self._kept.clear()
        for view in views if uncleared else ():
            self._views[view] = (Mastering(view, self._choose), uncleared)
        self.settle()

    def settle(self) -> None:
        """Forget whom nothing is owed by any more."""
        uncleared = self._debts.uncleared
        self._closed = {
            name: left for name, gone in self._closed.items() if (left := gone & uncleared)
        }
        self._views = {
            view: (mastering, left)
            for view, (mastering, gone) in self._views.items()
            if (left := gone & uncleared)
        }

    def may_grant(self, resource: Resource) -> bool:
        """Is nothing of this file held by a departed node that may still be there?"""
        if resource.name in self._closed:
            return False
        return all(m.master_of(resource) == self.node for m, _gone in self._views.values())

    def check(self, frozen: bool) -> None:
        """Assert the invariants at the top of this module."""
        owing = [*self._closed.values(), *(gone for _, gone in self._views.values())]
        assert all(gone and self._debts.uncleared.issuperset(gone) for gone in owing)
        assert frozen or not self._kept
