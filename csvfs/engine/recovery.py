"""What is left to do after a replay: the promises that a node made and did not live to keep.

Replay brings every block to a state between two transactions. Where an operation takes several,
the slot's orphan list says which inodes are in between:

    OPEN        lost its last name while somebody had it open: nobody of that node has any more,
                and who has it elsewhere is waited for by the node that recovers the slot
    TRUNCATE    got its new size, but not all units behind it were taken out

The slot's reclaim list is emptied as if nothing had happened: before, since somebody may wait for
the space, and afterwards.

What stands on the list is believed only of inodes that the maps say are there. A TRUNCATE entry
may outlive its file, removed and freed by another node: its block then holds anything, the last
image of the inode or a guest's forgery of it included.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final, NamedTuple

from csvfs.btree.tree import Tree, TreeRoot
from csvfs.data.peers import PeerReclaim
from csvfs.data.reclaim import Reclaimer
from csvfs.data.truncation import Truncation
from csvfs.engine.change import Change
from csvfs.engine.engine import Engine, Held
from csvfs.errors import Damaged, StaleInode
from csvfs.journal.transaction import BlockReader
from csvfs.namespace.inode import Inode
from csvfs.namespace.inode_table import InodeState
from csvfs.ondisk.inode import ORPHAN_VALUE, OrphanKind
from lockmgr.modes import Mode

_log: Final = logging.getLogger("csvfs.engine.recovery")


class Orphan(NamedTuple):
    """An entry of an orphan list."""

    ino: int
    kind: int
    generation: int


class Recovered(NamedTuple):
    """What recovery of one slot did."""

    retired: int
    trimmed: int
    left: int
    """Orphans that are damaged."""
    adopted: int = 0
    """Orphans that another node has open: on this slot's list from now on."""


class Recovery:
    """Finishes what the node of a slot left, once its journal was replayed."""

    def __init__(
        self,
        engine: Engine,
        truncation: Truncation,
        reclaimer: Reclaimer,
        peers: PeerReclaim,
    ) -> None:
        self._engine = engine
        self._peers = peers
        self._truncation = truncation
        self._reclaimer = reclaimer

    async def recover(self, slot: int) -> Recovered:
        """Nothing is done for another slot that has a node again: that does it for itself.

        Raises `Damaged` if the list itself cannot be read, `VolumeFailed`.
        """
        async with self._peers.in_place_of(slot) as ours:
            return await self._recover(slot) if ours else Recovered(0, 0, 0)

    async def _recover(self, slot: int) -> Recovered:
        if slot != self._engine.scope.slot:
            with suppress(Damaged):  # said again at the end
                await self._reclaimer.drain(slot)
            self._peers.progress()
        retired = trimmed = left = adopted = 0
        for orphan in await self._orphans(slot):
            try:
                if orphan.kind == OrphanKind.TRUNCATE:
                    await self._trim(orphan, slot)
                    trimmed += 1
                elif await self._retire(orphan, slot):
                    retired += 1
                else:
                    adopted += 1
            except (Damaged, StaleInode) as error:
                _log.error("orphan %d of slot %d stays: %s", orphan.ino, slot, error)
                left += 1
        if slot == self._engine.scope.slot:
            self._engine.scope.reclaim.set()
        else:
            await self._reclaimer.drain(slot)
        return Recovered(retired, trimmed, left, adopted)

    async def _orphans(self, slot: int) -> list[Orphan]:
        engine = self._engine
        root = TreeRoot.of_orphans(engine.scope.geometry.orphan_root(slot), slot)

        def body(reader: BlockReader) -> list[Orphan]:
            found = []
            for ino, value in Tree(reader, root).items():
                kind, generation, _ = ORPHAN_VALUE.unpack(value)
                found.append(Orphan(ino, kind, generation))
            return found

        async with engine.locks.acquire(engine.resources.orphans(slot), Mode.PR):
            return await engine.look(body)

    async def _trim(self, orphan: Orphan, slot: int) -> None:
        """Whoever wrote to the file, or removed it, may have done it since, from another slot."""
        try:
            async with self._locked(orphan) as state:
                await self._truncation.finish_locked(state, slot)
        except StaleInode as error:
            _log.info("orphan %d of slot %d is gone: %s", orphan.ino, slot, error)
        await self._engine.change(
            lambda change: change.settle_truncation(orphan.ino, slot), privileged=True
        )

    async def _retire(self, orphan: Orphan, slot: int) -> bool:
        """Put it onto *this* slot's reclaim list; False if another node has it open.

        Then it stands on this slot's orphan list, and this node retires it.
        """

        def unnamed(change: Change) -> Inode:
            inode = change.inode(orphan.ino)
            if inode.nlink:
                raise Damaged(f"inode {orphan.ino} is an orphan and has {inode.nlink} names")
            change.remove_orphan(orphan.ino, slot)
            return inode

        engine = self._engine
        async with (
            self._locked(orphan) as state,
            _adopted(state),
            engine.last_user(state) as unused,
        ):
            if unused:
                await engine.change(lambda change: change.bury(unnamed(change)), privileged=True)
            else:
                await engine.change(
                    lambda change: change.add_orphan(unnamed(change), OrphanKind.OPEN),
                    privileged=True,
                )
            return unused

    def _locked(self, orphan: Orphan) -> Held:
        if orphan.kind == OrphanKind.TRUNCATE:  # no longer, if the file lost its name
            return self._engine.alone(orphan.ino, orphan.generation, named=False)
        return self._engine.orphan(orphan.ino, orphan.generation)


@asynccontextmanager
async def _adopted(state: InodeState) -> AsyncIterator[None]:
    """It stands on this slot's orphan list from now on, or on none."""
    state.adopted = True
    try:
        yield
    finally:
        state.adopted = state.orphan
