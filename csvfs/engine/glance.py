"""stat(2) of what another node is writing to: asked of that node, which gives nothing up.

Theory. A node that holds an inode's lock EX has its size and times in memory, newer than anything
on the LUN. To look at them with a lock of one's own would take the lock from the writer: journal,
home, a flush, and for an image that a guest runs from a pause. So, as Lustre does with glimpse
callbacks, who only wants the attributes

    1. takes PR, if it is to be had without anybody giving up anything (not tried where a holder
       answered the last time: it will again);
    2. else asks the holder (`lockmgr.manager.LockManager.glimpse`), which answers from memory if it
       has the file open, or would have to write something to give the lock up;
    3. else, since the holder has no use for the lock, or is no more, waits for PR.

The answer is the inode as it was at a moment between question and answer, so it is never stale.

A listing asks for all its files at once, which is one message to each master and one to each
holder (`lockmgr.glimpses`); what nobody writes to is then taken one by one.

Concurrency: no task of its own, except some that take locks while many inodes are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from struct import Struct
from typing import Final

import trio

from csvfs.engine.engine import Engine
from csvfs.errors import FilesystemError, StaleInode
from csvfs.journal.transaction import BlockKey
from csvfs.namespace.inode import Attributes, attributes_of
from csvfs.namespace.inode_table import InodeState
from csvfs.ondisk.block import BlockType
from lockmgr.errors import LockTimeout
from lockmgr.lock import Lock
from lockmgr.modes import Mode

ANSWER: Final = Struct("<QIIIIIQQIqqqq")
"""The fields of `Attributes`, in their order."""
AT_A_TIME: Final = 64
"""Locks that are awaited for one listing."""
_REMEMBERED: Final = 65536


class Glance:
    """Attributes of inodes whose locks may be anywhere."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._locks = engine.locks
        self._table = engine.table
        self._used_elsewhere: set[int] = set()
        """Inodes of which the node that has them in use answered the last question."""

    async def attributes(self, ino: int, generation: int | None = None) -> Attributes:
        """What stat(2) tells. ``generation`` is from an entry of a directory whose lock is held.

        Raises `StaleInode` for an inode that is gone, or of another generation.
        """
        engine = self._engine
        engine.journal.raise_if_failed()
        resource = engine.resources.inode(ino)
        lock = self._locks.try_acquire(resource, Mode.PR, True)
        if lock is None and not self._locks.node_holds(resource, Mode.PR):
            if ino not in self._used_elsewhere:
                with suppress(LockTimeout):
                    lock = await self._locks.acquire(resource, Mode.PR, True, timeout_s=0)
            if lock is None:
                answer = await self._locks.glimpse(resource)
                found = self._told(ino, generation, answer)
                if found is not None:
                    return found
        if lock is None:
            lock = await self._locks.acquire(resource, Mode.PR, True)
        return await self._read(lock, ino, generation)

    def _told(self, ino: int, generation: int | None, answer: bytes | None) -> Attributes | None:
        """What another node said of an inode; None: its lock is to be had."""
        if not answer:
            self._used_elsewhere.discard(ino)
            return None
        if len(self._used_elsewhere) >= _REMEMBERED:
            self._used_elsewhere.clear()
        self._used_elsewhere.add(ino)
        return self._known(Attributes(*ANSWER.unpack(answer)), generation)

    async def _read(self, lock: Lock, ino: int, generation: int | None) -> Attributes:
        with lock:
            return attributes_of((await self._engine.load(ino, generation)).fields())

    def _known(self, found: Attributes, generation: int | None) -> Attributes:
        """An answer, if it is of the inode that was meant."""
        state = self._table.get(found.ino)
        known = state is not None and state.known
        if generation is None:
            kept = state is not None and (state.handles or state.orphan)
            if not (found.nlink or kept):
                raise StaleInode(f"inode {found.ino} has lost its last name")
            generation = state.generation if state is not None and known else found.generation
        if found.generation != generation:
            raise StaleInode(
                f"inode {found.ino} is of generation {found.generation}, not {generation}"
            )
        self._table.saw(found.ino, generation)
        return found

    async def attributes_of_all(self, wanted: Mapping[int, int]) -> dict[int, Attributes]:
        """The attributes of many inodes (number: generation), each at a moment of its own.

        Those whose locks are to be had at once are read together; of the others their holders are
        asked, all in one; what is left is taken concurrently, each with none of the others in hand:
        a file may have names in several directories, so there is no order in which to hold a
        directory's children.
        """
        engine = self._engine
        found: dict[int, Attributes] = {}
        with ExitStack() as held:
            at_once = []
            for ino in sorted(wanted):
                lock = self._locks.try_acquire(engine.resources.inode(ino), Mode.PR, True)
                if lock is not None:
                    held.enter_context(lock)
                    at_once.append(ino)
            absent = [ino for ino in at_once if self._table.state(ino).inode is None]
            await engine.look(
                lambda reader: reader.require(BlockKey(i, BlockType.INODE, i) for i in absent)
            )
            for ino in at_once:
                found[ino] = attributes_of((await engine.load(ino, wanted[ino])).fields())
        if len(found) < len(wanted):
            await self._ask(wanted, found)
        if len(found) < len(wanted):
            await self._take(wanted, sorted(wanted.keys() - found.keys()), found)
        return found

    async def _await(self, ino: int, generation: int) -> Attributes:
        """`attributes` of what nobody has a use for: who was asked a moment ago lets it go."""
        lock = await self._engine.acquire(self._engine.resources.inode(ino), Mode.PR, True)
        return await self._read(lock, ino, generation)

    async def _ask(self, wanted: Mapping[int, int], found: dict[int, Attributes]) -> None:
        locks, resources = self._locks, self._engine.resources
        asked = {resources.inode(ino): ino for ino in sorted(wanted.keys() - found.keys())}
        elsewhere = [each for each in asked if not locks.node_holds(each, Mode.PR)]
        for resource, answer in (await locks.glimpse_all(elsewhere)).items():
            ino = asked[resource]
            told = self._told(ino, wanted[ino], answer)
            if told is not None:
                found[ino] = told

    async def _take(
        self, wanted: Mapping[int, int], inos: Iterable[int], found: dict[int, Attributes]
    ) -> None:
        waiting = iter(inos)
        failures: list[FilesystemError] = []

        async def work() -> None:
            for ino in waiting:
                if failures:
                    return
                try:
                    found[ino] = await self._await(ino, wanted[ino])
                except FilesystemError as error:
                    failures.append(error)

        async with trio.open_nursery() as nursery:
            for _ in range(min(AT_A_TIME, len(wanted) - len(found))):
                nursery.start_soon(work)
        if failures:
            raise failures[0]


def glimpsed(state: InodeState) -> bytes:
    """The answer of a node that holds the inode's lock in EX; empty: it has nothing in memory."""
    if state.inode is None:
        return b""
    shown = attributes_of(state.inode)
    return ANSWER.pack(
        shown.ino,
        shown.generation,
        shown.mode,
        shown.uid,
        shown.gid,
        shown.nlink,
        shown.size,
        shown.blocks,
        shown.rdev,
        shown.atime_ns,
        shown.mtime_ns,
        shown.ctime_ns,
        shown.btime_ns,
    )
