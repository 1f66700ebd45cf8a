"""From a call to a transaction: locks, look-ups and changes, as every operation uses them.

    async with engine.alone(parent) as directory:           the inode's lock, and its state
        entry = await engine.look(lambda reader: ...)       read blocks
        await engine.change(lambda change: ...)             change blocks, all or none

Theory. An operation takes the inode locks it needs, in order (`csvfs.engine.locks`), looks at what
it finds, and runs one synchronous body that checks and changes (`csvfs.engine.change.Change`). What
a body raises is the operation's answer, and then nothing was changed. Locks that only a body can
name (allocation groups, the slot's lists) it tries; where that fails the store waits for them.

Concurrency: no task of its own; everything runs in the caller's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Final, TypeVar

from csvfs.engine.change import Change, ChangeScope
from csvfs.errors import Damaged, FilesystemError, NoSpace, StaleInode, VolumeFailed
from csvfs.journal.store import Store
from csvfs.journal.transaction import MAX_TX_BLOCKS, BlockReader, Transaction
from csvfs.namespace.inode import Inode
from csvfs.namespace.inode_table import InodeState
from csvfs.ondisk.block import BadBlock
from csvfs.ondisk.geometry import ROOT_INODE
from lockmgr.errors import LockTimeout
from lockmgr.lock import Lock
from lockmgr.manager import LockManager
from lockmgr.messages import Resource
from lockmgr.modes import Mode
from redirector.block.device import BlockError, MediumError

T = TypeVar("T")

OPEN_ELSEWHERE_S: Final = 0.1
"""How long to wait for an open lock that is perhaps only cached, before it counts as in use."""
DAY_NS: Final = 86_400_000_000_000

Reclaimed = Callable[[], Awaitable[bool]]
"""Free what is on the reclaim list now; True if something was freed."""


class Held:
    """An inode's lock, for an ``async with``, which gives the inode's state with its fields read.

    Raises `StaleInode` for an inode that is gone, or of another generation: `NotFound` is said of
    names alone (`csvfs.host.answers`).
    """

    __slots__ = (
        "_engine",
        "_generation",
        "_ino",
        "_lock",
        "_mode",
        "_named",
        "_orphan",
        "_shared_here",
    )

    def __init__(
        self,
        engine: Engine,
        ino: int,
        mode: Mode,
        shared_here: bool,
        generation: int | None,
        named: bool,
        orphan: bool = False,
    ) -> None:
        self._engine = engine
        self._ino = ino
        self._mode = mode
        self._shared_here = shared_here
        self._generation = generation
        self._named = named
        self._orphan = orphan
        self._lock: Lock | None = None

    async def __aenter__(self) -> InodeState:
        engine = self._engine
        engine.journal.raise_if_failed()
        resource = engine.resources.inode(self._ino)
        lock = await engine.acquire(resource, self._mode, self._shared_here)
        try:
            state = await engine.load(
                self._ino, self._generation, named=self._named, orphan=self._orphan
            )
        except BaseException:
            lock.release()
            raise
        self._lock = lock
        return state

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._lock is not None
        self._lock.release()


class Engine:
    """What the parts of a mounted volume stand on."""

    def __init__(
        self,
        store: Store,
        locks: LockManager,
        scope: ChangeScope,
        reclaimed: Reclaimed,
    ) -> None:
        self.store = store
        self.journal = store.journal
        self.locks = locks
        self.scope = scope
        self.resources = scope.resources
        self.table = scope.table
        self._reclaimed = reclaimed

    # -- locks -----------------------------------------------------------------------------
    async def acquire(self, resource: Resource, mode: Mode, shared_here: bool = False) -> Lock:
        """A lock; without the detour through the scheduler if it is to be had at once."""
        lock = self.locks.try_acquire(resource, mode, shared_here)
        if lock is None:
            lock = await self.locks.acquire(resource, mode, shared_here)
        return lock

    def looking(self, ino: int, generation: int | None = None, *, named: bool = True) -> Held:
        """The inode's lock in PR: its names and attributes hold still. ``named``: see `load`.

        Not so its size and times while this node writes to it: a stat(2) waits for no I/O.
        """
        return Held(self, ino, Mode.PR, True, generation, named)

    def alone(self, ino: int, generation: int | None = None, *, named: bool = True) -> Held:
        """The inode's lock in EX, not shared: nobody else reads, writes or looks."""
        return Held(self, ino, Mode.EX, False, generation, named)

    def orphan(self, ino: int, generation: int) -> Held:
        """`alone`, for an inode without a name that an orphan list vouches for."""
        return Held(self, ino, Mode.EX, False, generation, named=False, orphan=True)

    @asynccontextmanager
    async def last_user(self, state: InodeState) -> AsyncIterator[bool]:
        """True if nobody has the inode, which is locked alone, open or knows of it, on any node;
        and so it stays until the end of the block. Nobody is asked about one with further names.
        """
        inode = state.fields()
        if state.needed or (inode.nlink > 1 and not inode.is_directory):
            yield False
            return
        resource = self.resources.opened(state.ino)
        try:
            lock = await self.locks.acquire(resource, Mode.EX, timeout_s=OPEN_ELSEWHERE_S)
        except LockTimeout:
            yield False
            return
        with lock:
            yield True

    def note_access(self, state: InodeState) -> None:
        """The inode, locked here, was read: atime, as mount(8) says of relatime.

        Only while this node may write the inode anyway, and will: nobody waits for a lock because
        of it, and what is lowered to PR, while reads go on, was written back for the last time.
        """
        inode, now_ns = state.fields(), self.scope.clock()
        if (
            (inode.mtime_ns < inode.atime_ns > inode.ctime_ns and now_ns - inode.atime_ns < DAY_NS)
            or state.ino in self.table.lowered
            or not self.locks.node_holds(state.resource, Mode.EX)
        ):
            return
        inode.atime_ns = now_ns
        state.dirty_times = True
        self.table.note_dirty(state)

    async def load(
        self,
        ino: int,
        generation: int | None = None,
        *,
        named: bool = True,
        orphan: bool = False,
    ) -> InodeState:
        """The state of an inode whose lock is held, with its fields. Raises as `Held` does.

        ``named``: the generation is from an entry of a directory whose lock is held, too, so the
        inode is there. Otherwise it is from earlier, and the block may be somebody else's by now,
        with what looks like this inode still in it.

        An inode without a name is there as long as this node has it open or on its orphan list, or
        ``orphan`` says that another list has it. Of any other the block may be somebody else's
        at any moment, and he asks for no lock of an inode: it is gone.
        """
        table = self.table
        state = table.get(ino)
        if state is None or state.inode is None:
            # Neither a handle nor an orphan of this node is retired by another; what the kernel
            # has only looked up may be.
            kept = state is not None and (state.handles > 0 or state.orphan)
            if kept or ino == ROOT_INODE or (named and generation is not None):
                inode = await self.look(lambda reader: table.read(reader, ino, generation))
            else:
                inode = await self._look_up_unknown(ino, generation, orphan=orphan)
            # Whoever shares the lock may have been quicker, and may have changed it since.
            state = table.get(ino)
            if state is None or state.inode is None:
                state = table.adopt(inode)
        elif generation is not None and state.generation != generation:
            raise StaleInode(f"inode {ino} is of generation {state.generation}, not {generation}")
        elif not (state.inode.nlink or state.handles or state.orphan or orphan):
            raise StaleInode(f"inode {ino} has lost its last name")
        return state

    async def _look_up_unknown(self, ino: int, generation: int | None, *, orphan: bool) -> Inode:
        """Nobody vouches for this number: believe what lies there only if the map says that it
        is metadata, since a guest may have written what looks like an inode.

        It may be metadata of another kind by now, that is not home yet: what lies there then is the
        last image of a dead inode (`csvfs.engine.change.Change.free_inode`).
        """
        geometry, groups = self.scope.geometry, self.scope.groups
        if geometry.holds(ino):
            resource = self.resources.group(geometry.group_of(ino))
            async with self.locks.acquire(resource, Mode.PR):
                is_metadata = await self.look(lambda reader: groups.is_metadata_block(reader, ino))
            if is_metadata:
                with suppress(BadBlock):  # metadata of another kind
                    inode = await self.store.run(
                        lambda reader: self.table.read(reader, ino, generation)
                    )
                    if inode.nlink or orphan:
                        return inode
        # The block is nobody's, or about to be: who gets it next knows nothing of this lock.
        self.store.cache.forget_clean(ino)
        raise StaleInode(f"there is no inode {ino} any more")

    # -- bodies ----------------------------------------------------------------------------
    async def look(self, body: Callable[[BlockReader], T]) -> T:
        """Run a body that only reads. Raises what it raises, `Damaged`, `VolumeFailed`."""
        try:
            return await self.store.run(body)
        except (BadBlock, BlockError) as error:
            raise told(error) from error

    async def change(
        self,
        body: Callable[[Change], T],
        *,
        privileged: bool = False,
        bound: int = MAX_TX_BLOCKS,
    ) -> T:
        """Run a body that changes. Raises what it raises, `Damaged`, `VolumeFailed`, `NoSpace`.

        ``privileged``: it gives space back, and may use the reserve for that. Where space runs
        out, what is on the reclaim list is freed first, and the body run once more.
        """
        scope = self.scope

        def run(tx: Transaction) -> T:
            change = Change(tx, scope)
            value = body(change)
            change.save()
            return value

        while True:
            try:
                return await self.store.transact(run, bound=bound, privileged=privileged)
            except NoSpace:
                if not await self._reclaimed():
                    raise
            except (BadBlock, BlockError) as error:
                raise told(error) from error


def told(error: BadBlock | BlockError) -> FilesystemError:
    """What an operation answers when metadata cannot be read."""
    if isinstance(error, BadBlock | MediumError):
        return Damaged(f"{error}; run csvctl check on the unmounted volume")
    return VolumeFailed(f"the LUN does not answer as it should: {error}")
