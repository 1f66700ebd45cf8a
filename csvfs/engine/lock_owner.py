"""Between the lock manager and the store: how locks are taken, and what giving one up takes.

`LockAdapter` is how transactions take the locks that only their bodies can name. `LockOwner` is
asked by the lock manager before the node gives a lock up, to another node or because too many are
cached; then what the lock covers has to be on the LUN, at home, and out of this node's memory.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable
from typing import Final

import trio

from csvfs.engine.glance import glimpsed
from csvfs.engine.locks import INODE_PREFIX, Resources, in_words, lock_order
from csvfs.errors import VolumeFailed
from csvfs.journal.store import Store
from csvfs.namespace.inode_table import InodeState, InodeTable
from csvfs.ondisk.block import BlockType
from lockmgr.lock import Lock
from lockmgr.manager import LockManager
from lockmgr.messages import Resource
from lockmgr.modes import COVERS, Mode
from redirector.block.device import BlockError

_log: Final = logging.getLogger("csvfs.engine.locks")


class LockAdapter:
    """A lock manager as `csvfs.journal.transaction.LockSource`; proof that a lock is held."""

    def __init__(self, manager: LockManager, resources: Resources) -> None:
        self._manager = manager
        self._resources = resources

    def try_acquire(self, resource: Hashable, mode: int) -> Lock | None:
        assert isinstance(resource, Resource)
        return self._manager.try_acquire(resource, Mode(mode))

    async def acquire(self, resource: Hashable, mode: int) -> Lock:
        assert isinstance(resource, Resource)
        return await self._manager.acquire(resource, Mode(mode))

    def order(self, resource: Hashable) -> tuple[int, ...]:
        assert isinstance(resource, Resource)
        return lock_order(resource)

    def holds(self, kind: BlockType, owner: int, flags: int) -> bool:
        """Is the lock that covers such a block held EX (`csvfs.journal.transaction.Holds`)?"""
        return self._manager.node_holds(self._resources.covering(kind, owner, flags), Mode.EX)


class LockOwner:
    """What has to happen before this node gives a lock up (`lockmgr.manager.ResourceOwner`).

    Claims that need what is given up are drained first: what is written back then is the last.
    """

    def __init__(self, manager: LockManager, store: Store, table: InodeTable) -> None:
        self._manager = manager
        self._store = store
        self._table = table

    async def demote(self, resource: Resource, to_mode: Mode) -> None:
        await self._manager.drain(resource)
        ino = inode_of(resource)
        if ino is None:
            await self._flush(resource)
        else:
            self._table.lowered.add(ino)
            try:
                await self._flush(resource, self._table.get(ino))
            finally:
                self._table.lowered.discard(ino)
        if not COVERS[to_mode][Mode.PR]:
            if ino is not None:
                self._table.forget(ino)
            self._store.drop_owned(resource)

    async def _flush(self, resource: Resource, state: InodeState | None = None) -> None:
        """What the lock covers is at home, and in no live record of the journal."""
        try:
            if state is not None:
                await self._table.write_back_now(state)
            await self._store.flush_owned(resource)
        except (VolumeFailed, BlockError) as failure:
            # Nobody may read the half of it that reached the LUN: the lock stays with this node
            # until it has left. Nothing else is waited for; the mount is being torn down.
            _log.error("%s: not given up: %s", in_words(resource.name), failure)
            await trio.sleep_forever()

    async def glimpse(self, resource: Resource) -> bytes:
        ino = inode_of(resource)
        state = None if ino is None else self._table.get(ino)
        if state is None or not (state.handles or self._costs(state)):
            return b""  # let them have the lock, and they need not ask again
        return glimpsed(state)

    def _costs(self, state: InodeState) -> bool:
        """Would giving up its lock take a write?"""
        return state.dirty or bool(self._store.journal.state.journaled(state.resource))


def inode_of(resource: Resource) -> int | None:
    """The inode whose lock this is, None for any other lock."""
    name = resource.name
    return int.from_bytes(name[1:]) if name[:1] == INODE_PREFIX and len(name) == 9 else None
