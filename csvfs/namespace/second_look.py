"""A path that is walked once more holds still until its end is used.

Between the LOOKUP that gives the kernel an inode number and the request that uses it another host
may replace the inode. The request is answered ESTALE then, and the kernel walks the path once more,
but only once (`csvfs.host.answers`). So that a name which others keep replacing is never missing
for who has bad luck twice, the second LOOKUP keeps the directory's lock until shortly after a
request for what it found has been answered, and for `KEPT_S` at most.

    gone      number     a request was answered ESTALE: its directory is due for a second look
    lookup    directory  due: its lock is taken in PR for the LOOKUP, and kept with the number
    used      number     a request for it was answered: the lock goes `MORE_S` later

invariants:
  1. a lock that is kept here waits for nothing, and goes within `KEPT_S`

Concurrency: `run`, and a task in it for each lock that is kept.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Final

import trio

from csvfs.namespace.inode import Attributes

KEPT_S: Final = 0.1
"""Longer than a request takes on a busy host, shorter than what anybody notices."""
MORE_S: Final = 0.02
"""Behind a request that was answered: what comes next comes within this time."""
DUE_S: Final = 1.0
"""How long after ESTALE a LOOKUP in the same directory is taken for the second one."""
REMEMBERED: Final = 4096

LookingUp = Callable[[int, bytes], AbstractAsyncContextManager[Attributes]]


class SecondLook:
    """See the module's docstring. ``looking_up`` finds a name, and holds its directory's lock."""

    def __init__(self, looking_up: LookingUp) -> None:
        self._looking_up = looking_up
        self._parents: OrderedDict[int, int] = OrderedDict()
        """Where a number was found last."""
        self._due: dict[int, float] = {}
        """Directories, and until when."""
        self._kept: dict[int, deque[trio.CancelScope]] = {}
        """What was found by second looks, and until when its directory is kept for each of them."""
        self._nursery: trio.Nursery | None = None

    async def lookup(self, parent: int, name: bytes) -> Attributes:
        """See `csvfs.namespace.names.Namespace.looking_up`."""
        if self._nursery is not None and self._is_due(parent):
            found: Attributes = await self._nursery.start(self._keep, parent, name)
        else:
            async with self._looking_up(parent, name) as found:
                pass
        self._parents[found.ino] = parent
        self._parents.move_to_end(found.ino)
        if len(self._parents) > REMEMBERED:
            self._parents.popitem(last=False)
        return found

    def _is_due(self, parent: int) -> bool:
        until = self._due.get(parent)
        if until is None:
            return False
        if trio.current_time() >= until:
            del self._due[parent]
            return False
        return True

    def gone(self, ino: int) -> None:
        """A request for it was answered ESTALE."""
        parent = self._parents.pop(ino, None)
        if parent is not None:
            if len(self._due) >= REMEMBERED:
                self._due.clear()
            self._due[parent] = trio.current_time() + DUE_S

    def used(self, ino: int) -> None:
        """A request for it was answered. Another one may follow, as OPEN does GETATTR."""
        kept = self._kept.get(ino)
        if kept:
            scope = kept.popleft()
            scope.deadline = min(scope.deadline, trio.current_time() + MORE_S)

    async def run(self) -> None:
        """Keep locks, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    async def _keep(
        self, parent: int, name: bytes, task_status: trio.TaskStatus[Attributes]
    ) -> None:
        async with self._looking_up(parent, name) as found:
            kept = self._kept.setdefault(found.ino, deque())
            with trio.move_on_after(KEPT_S) as scope:
                kept.append(scope)
                task_status.started(found)
                await trio.sleep_forever()
        if scope in kept:
            kept.remove(scope)
        if not kept:
            self._kept.pop(found.ino, None)
