"""The end of inodes that lost their last name while somebody had them open.

Theory. The node that removed the last name keeps the inode on *its* orphan list until nobody uses
it any more, wherever that was. Its own kernel tells it of its own users
(`csvfs.namespace.open_files`); of others it learns by waiting for the inode's open lock, which they
hold in PR from open to release. Whoever goes, by closing the file or by dying, lets that lock go;
then the inode is *retired*: one transaction takes it off the orphan list and puts it onto the
reclaim list.

Only the node on whose list it stands retires it. A node that leaves, or dies, leaves its list to
another one: that recovers the slot, and takes over what is still in use (`csvfs.engine.recovery`).

invariants:
  1. every inode on this slot's OPEN list is needed by this node, or is waited for here
  2. nobody waits for an open lock without a limit while holding any other lock

Concurrency: `run`, and a task in it for each inode that only other nodes use.
"""

from __future__ import annotations

import logging
from typing import Final

import trio

from csvfs.engine.change import Change
from csvfs.engine.engine import Engine
from csvfs.errors import FilesystemError, StaleInode, VolumeFailed
from csvfs.ondisk.inode import OrphanKind
from lockmgr.modes import Mode

_log: Final = logging.getLogger("csvfs.inodes")


class Orphans:
    """Retires the orphans of this slot's list."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._watched: set[int] = set()

    async def retire(self, ino: int) -> None:
        """Put an orphan that nobody of this node uses onto the reclaim list: now, or when those
        who have it open on other nodes have closed it."""
        engine = self._engine
        async with engine.alone(ino) as state, engine.last_user(state) as unused:
            if not state.orphan or state.needed:
                return
            if unused:
                await engine.change(lambda change: _retire(change, ino), privileged=True)
            else:
                engine.scope.orphans.add(ino)

    async def run(self) -> None:
        """Wait for what other nodes have open, until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                ino = await self._engine.scope.orphans.next()
                if ino not in self._watched:
                    self._watched.add(ino)
                    nursery.start_soon(self._watch, ino)

    async def _watch(self, ino: int) -> None:
        engine = self._engine
        lock = await engine.locks.acquire(engine.resources.opened(ino), Mode.EX)
        lock.release()
        self._watched.discard(ino)
        try:
            await self.retire(ino)
        except VolumeFailed:
            return  # whoever uses the volume is told
        except FilesystemError as error:
            state = engine.table.get(ino)
            if isinstance(error, StaleInode) and (state is None or not state.orphan):
                return  # who closed it here was quicker
            _log.error("orphan %d stays until the next mount: %s", ino, error)


def _retire(change: Change, ino: int) -> None:
    inode = change.inode(ino)
    if change.orphan_kind(ino) is OrphanKind.OPEN:
        change.remove_orphan(ino)
        change.bury(inode)
