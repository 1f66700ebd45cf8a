"""Space that other nodes are about to give back: before a node says that the volume is full, all of
them empty their reclaim lists.

Each node tends the lists of its slot, and shows so by holding the lock ``w <slot>`` in EX as long
as it has the volume mounted. A glimpse at that lock is the request: the holder empties its list and
then answers whether anything was freed. Who recovers the lists of a node that has gone holds its
lock meanwhile; so nobody touches the lists of a slot but who holds that. It counts as one of those
who are about to give space back: it says that nothing was freed when that is done, too.

Concurrency: `PeerReclaim.tend` is one background task; one question per peer is on its way while
somebody waits for space. Nobody asks from within a round of the reclaimer: two rounds that wait for
each other would wait for ever.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import trio

from csvfs.data.reclaim import Reclaimer
from csvfs.engine.locks import Resources
from csvfs.errors import FilesystemError
from lockmgr.errors import LockTimeout
from lockmgr.manager import LockManager
from lockmgr.mastering import slot_and_incarnation
from lockmgr.messages import Resource
from lockmgr.modes import Mode

_log: Final = logging.getLogger("csvfs.data.reclaim")

PRESENT_S: Final = 1.0
"""How long to wait for the lists of a slot before asking whether a node is there again."""
RECOVERY_S: Final = 10.0
"""How long who needs space waits for what a node that has gone leaves, if that frees nothing yet:
two that recover may need space of each other."""
FREED: Final = b"\1"
NOTHING: Final = b"\0"


class PeerReclaim:
    """Asks the others, and answers them (`lockmgr.manager.ResourceOwner`)."""

    def __init__(
        self, locks: LockManager, resources: Resources, slot: int, reclaimer: Reclaimer
    ) -> None:
        self._locks = locks
        self._resources = resources
        self._slot = slot
        self._reclaimer = reclaimer
        self._recovering: Counter[trio.lowlevel.Task] = Counter()
        """Tasks that tend, or are about to, the lists of others."""
        self._progress = trio.Event()

    async def tend(self) -> None:
        """Hold this slot's lock until cancelled."""
        async with self._locks.acquire(self._resources.tended(self._slot), Mode.EX):
            self._reclaimer.lists_are_ours.set()
            await trio.sleep_forever()

    @asynccontextmanager
    async def in_place_of(self, slot: int) -> AsyncIterator[bool]:
        """Tend the lists of a slot within the block; False: a node has come back there, and does.

        For this node's own slot: as soon as nobody else does.
        """
        task = trio.lowlevel.current_task()
        self._recovering[task] += 1
        try:
            async with self._tending(slot) as ours:
                yield ours
        finally:
            self._recovering[task] -= 1
            self._recovering += Counter()
            self.progress()

    def progress(self) -> None:
        """Something of the lists of others was freed, or nothing is left of them."""
        self._progress.set()
        self._progress = trio.Event()

    @asynccontextmanager
    async def _tending(self, slot: int) -> AsyncIterator[bool]:
        if slot == self._slot:
            await self._reclaimer.lists_are_ours.wait()
            yield True
            return
        resource = self._resources.tended(slot)
        while True:
            try:
                lock = await self._locks.acquire(resource, Mode.EX, timeout_s=PRESENT_S)
            except LockTimeout:
                # The debts of the node that has gone may not be settled: then nobody answers.
                if await self._locks.glimpse(resource) is not None:
                    yield False
                    return
            else:
                with lock:
                    yield True
                    return

    async def reclaim(self) -> bool:
        """Have this node's list emptied, or else those of all others; True if space was freed."""
        if self._reclaimer.in_round:
            return False
        if await self._drain():
            return True
        freed = False

        async def ask(slot: int) -> None:
            nonlocal freed
            if await self._locks.glimpse(self._resources.tended(slot)) == FREED:
                freed = True

        async with trio.open_nursery() as nursery:
            for node in self._locks.core.members:
                if node != self._locks.core.node:
                    nursery.start_soon(ask, slot_and_incarnation(node)[0])
        return freed

    async def _drain(self) -> bool:
        """Free what is on this node's list, and on those that it recovers."""
        before = self._reclaimer.freed
        await self._reclaimer.drain()
        with trio.move_on_after(RECOVERY_S):
            while self._others_recover() and self._reclaimer.freed == before:
                await self._progress.wait()
        return self._reclaimer.freed > before

    def _others_recover(self) -> bool:
        return bool(self._recovering.keys() - {trio.lowlevel.current_task()})

    async def demote(self, resource: Resource, to_mode: Mode) -> None:
        """Nothing was cached under it."""

    async def glimpse(self, resource: Resource) -> bytes:
        del resource
        try:
            return FREED if await self._drain() else NOTHING
        except FilesystemError as error:
            _log.error("another node asked for space, and nothing can be reclaimed: %s", error)
            return NOTHING
