"""What this node knows of inodes in memory: the truth while it holds their locks.

Theory. An inode's fields are read from its block once, after its lock was granted, and stay here
until the lock is given up: a call that holds the lock needs no look at the block. Transactions
change the block and then, when they are merged, what is here (`csvfs.engine.change`). Only three
things change here first, because a write in place must cost no transaction: mtime and ctime of a
write, atime of a read, and the size of a file that grew inside a unit that was written before. Such
an inode is *dirty*; its fields go into the next record of the journal just before that is frozen
(`InodeTable` is a commit hook), or earlier, when the inode's lock is given up.

What the kernel knows is counted here too: lookups (`remember`, `forget`) and open handles. An
inode that lost its last name stays while either count is above zero; it stands on this slot's
orphan list meanwhile.

invariants:
  1. ``inode`` is not None only while the node holds the inode's lock in PR or more
  2. a dirty inode's lock is held EX by the node, and ``inode`` is newer than its block
  3. ``orphan`` inodes have ``nlink`` 0 and an OPEN entry in this slot's orphan list
  4. a state with lookups, handles, dirt or unstable changes is never dropped
  5. nothing makes an inode dirty while its lock is being lowered, to PR either: reads go on then
"""

from __future__ import annotations

import logging
from typing import Final

import trio

from csvfs.data.extent_map import ExtentMap, MapBudget
from csvfs.data.ranges import RangeLocks
from csvfs.engine.locks import Resources
from csvfs.errors import StaleInode
from csvfs.journal.store import Store
from csvfs.journal.transaction import BlockKey, BlockReader, Transaction
from csvfs.namespace.inode import Inode
from csvfs.ondisk.block import BadBlock, BlockType
from lockmgr.lock import Lock
from lockmgr.messages import Resource
from redirector.block.device import MediumError

_log: Final = logging.getLogger("csvfs.inodes")

_SEEN: Final = 4096
"""More than the entries of any listing."""


class FileState:
    """What reading and writing a regular file needs to remember."""

    __slots__ = (
        "append_lock",
        "converting",
        "growing",
        "grown",
        "map",
        "ranges",
        "tail_is_zero",
        "tail_lock",
        "unprivileged",
    )

    def __init__(self, budget: MapBudget) -> None:
        self.map = ExtentMap(budget)
        self.converting: dict[int, trio.Event] = {}
        """Logical units whose first write is on its way; the event ends it."""
        self.ranges = RangeLocks()
        self.tail_is_zero = False
        """The bytes between the end of the file and the end of its last unit are known to be
        zeroes on the LUN. They need not be: after a crash, or a truncation."""
        self.growing = 0
        """Writes beyond the end of the file that are on their way. Their bytes lie in the tail
        before the end has moved: nobody makes the tail zero meanwhile."""
        self.grown = trio.Event()
        """Set when the last of them has ended; a new one for the next."""
        self.tail_lock = trio.Lock()
        """Held by who makes the tail zero."""
        self.append_lock = trio.Lock()
        """Held from finding the end of the file to having written there."""
        self.unprivileged = False
        """Known to have neither set-ID bits nor capabilities that a write would have to drop."""


class InodeState:
    """One inode, as long as anybody cares."""

    __slots__ = (
        "adopted",
        "dirty_size",
        "dirty_times",
        "file",
        "generation",
        "handles",
        "ino",
        "inode",
        "lookups",
        "lost",
        "open_lock",
        "orphan",
        "resource",
        "unstable",
        "unstable_data",
    )

    def __init__(self, ino: int, resource: Resource) -> None:
        self.ino = ino
        self.resource = resource
        self.inode: Inode | None = None
        self.generation = 0
        """Of the first time it was read; 0: not yet."""
        self.lookups = 0
        self.handles = 0
        self.open_lock: Lock | None = None
        self.orphan = False
        self.adopted = False
        """An orphan that another node had left: nothing here dropped the name, so the kernel may
        remember it for ever, and only handles count."""
        self.dirty_times = False
        self.dirty_size = False
        self.lost = False
        """What was dirty could not be written; the next fsync says so."""
        self.unstable = 0
        """Merged transactions that changed this inode and are not stable yet."""
        self.unstable_data = 0
        """Of these, the ones that reading the data back depends on (fdatasync)."""
        self.file: FileState | None = None

    @property
    def known(self) -> bool:
        """The kernel knows it: it must outlive its last name."""
        return self.lookups > 0 or self.handles > 0

    @property
    def needed(self) -> bool:
        """An orphan is kept for somebody of this node."""
        return self.handles > 0 or (self.lookups > 0 and not self.adopted)

    def fields(self) -> Inode:
        """The inode, whose lock the caller holds; not to be changed."""
        assert self.inode is not None, f"inode {self.ino} is used without its lock"
        return self.inode

    @property
    def dirty(self) -> bool:
        """Its fields are newer than its block."""
        return self.dirty_times or self.dirty_size


class InodeTable:
    """All inode states of one mounted volume. Implements `csvfs.journal.commit_hooks.PreCommit`."""

    def __init__(self, store: Store, resources: Resources) -> None:
        self._store = store
        self._resources = resources
        self._budget = MapBudget()
        self._states: dict[int, InodeState] = {}
        self._dirty: dict[int, InodeState] = {}
        self._seen: dict[int, int] = {}
        """Generations of inodes that were only asked for, until the kernel is told of them."""
        self.lowered: set[int] = set()
        """Inodes whose locks are being given up: what was dirty has been written back, and nothing
        makes them dirty again (`csvfs.engine.lock_owner`)."""

    # -- states ----------------------------------------------------------------------------
    def state(self, ino: int) -> InodeState:
        """The state of an inode, made if there is none."""
        found = self._states.get(ino)
        if found is None:
            found = self._states[ino] = InodeState(ino, self._resources.inode(ino))
        return found

    def get(self, ino: int) -> InodeState | None:
        return self._states.get(ino)

    def file(self, state: InodeState) -> FileState:
        """What is remembered of a file's content; made when that is first used."""
        if state.file is None:
            state.file = FileState(self._budget)
        return state.file

    def known(self) -> list[InodeState]:
        """States of what the kernel knows, and of inodes without a name."""
        return [state for state in self._states.values() if state.known or state.orphan]

    def read(self, reader: BlockReader, ino: int, generation: int | None = None) -> Inode:
        """The fields of an inode whose lock is held; not to be changed.

        Raises `NeedBlocks`, `BadBlock`, and `StaleInode` for another generation than the one
        asked for or known.
        """
        state = self._states.get(ino)
        if state is not None and state.inode is not None:
            inode = state.inode
        else:
            inode = Inode.unpack(reader.read(ino, BlockType.INODE, ino))
            inode.check(ino)
        known = generation or (state.generation if state is not None and state.known else 0)
        if known and known != inode.generation:
            raise StaleInode(f"inode {ino} is of generation {inode.generation}, not {known}")
        return inode

    def adopt(self, inode: Inode) -> InodeState:
        """These fields are the truth from now on: read under the lock, or merged."""
        state = self.state(inode.ino)
        state.inode = inode
        state.generation = inode.generation
        return state

    def forget(self, ino: int) -> None:
        """The inode's lock is gone: nothing that was read under it is true any more."""
        state = self._states.get(ino)
        if state is None:
            return
        assert not state.dirty, f"inode {ino} is dirty, yet its lock is given up"
        state.inode = None
        if state.file is not None:
            state.file.map.clear()
            state.file.tail_is_zero = False
            state.file.unprivileged = False
        if not (state.known or state.orphan or state.unstable):
            del self._states[ino]

    def bury(self, ino: int) -> None:
        """The inode is on the reclaim list: who asks for it again has only heard of it.

        Of one that another node had retired, this node's kernel may not know yet that it is gone.
        """
        state = self._states.get(ino)
        if state is not None:
            assert not state.handles, f"inode {ino} is buried alive"
            self._clean(state)
            state.orphan = state.adopted = False
            state.inode = None
            if state.file is not None:
                state.file.map.clear()
            if not state.lookups:
                del self._states[ino]

    # -- what the kernel knows -------------------------------------------------------------
    def saw(self, ino: int, generation: int) -> None:
        """The node that may write the inode said that it is of this generation now."""
        state = self._states.get(ino)
        if state is not None:
            state.generation = generation
            return
        if len(self._seen) >= _SEEN:
            self._seen.clear()
        self._seen[ino] = generation

    def remember(self, ino: int, count: int) -> None:
        """The kernel was told of an inode, whose attributes this node has just found."""
        state = self._states.get(ino)
        if state is None:
            state = self.state(ino)
            state.generation = self._seen.pop(ino, 0)
        state.lookups += count

    def let_go(self, state: InodeState) -> None:
        """A count went down: drop the state if nobody needs it any more."""
        if state.inode is None and not (state.known or state.orphan or state.unstable):
            self._states.pop(state.ino, None)

    # -- dirt ------------------------------------------------------------------------------
    def note_dirty(self, state: InodeState) -> None:
        """The fields of ``state`` were changed without a transaction."""
        if state.ino not in self._dirty:
            self._dirty[state.ino] = state
            self._store.note_pending()

    def _clean(self, state: InodeState) -> None:
        state.dirty_times = state.dirty_size = False
        self._dirty.pop(state.ino, None)

    def write_back(self, tx: Transaction, state: InodeState) -> None:
        """Put dirty fields into the inode's block."""
        inode = state.inode
        assert inode is not None
        inode.pack_into(tx.edit(state.ino, BlockType.INODE, state.ino))
        self.track(tx, state, data=state.dirty_size)
        tx.after_merge(lambda: self._clean(state))

    def merged(self, tx: Transaction, inode: Inode, *, data: bool) -> None:
        """A transaction packed ``inode`` into its block: let memory follow when it is merged."""
        state = self.state(inode.ino)
        self.track(tx, state, data=data or state.dirty_size)

        def follow() -> None:
            self.adopt(inode)
            self._clean(state)

        tx.after_merge(follow)

    def track(self, tx: Transaction, state: InodeState, *, data: bool) -> None:
        """Count the transaction as unstable from its merging until it is stable."""

        def merged() -> None:
            state.unstable += 1
            state.unstable_data += data

        def stable() -> None:
            state.unstable -= 1
            state.unstable_data -= data

        tx.after_merge(merged)
        tx.on_stable(stable)

    async def write_back_now(self, state: InodeState | None = None) -> None:
        """Put the dirty fields of one inode, or of all, into the running set.

        Whoever is about to promise that they are stable asks for this: the room that a record
        holds back for `fill` may be less than there is dirt. Raises `VolumeFailed`, `BlockError`.
        """
        for each in list(self._dirty.values()) if state is None else [state]:
            if each.dirty:
                await self._write_back_one(each)

    async def _write_back_one(self, state: InodeState) -> None:
        def body(tx: Transaction) -> None:
            if state.dirty:  # still: it may have been committed, or buried, meanwhile
                self.write_back(tx, state)

        try:
            await self._store.transact(body, bound=1)
        except (BadBlock, MediumError) as error:
            self.unreadable(BlockKey(state.ino, BlockType.INODE, state.ino), error)

    @property
    def pending(self) -> bool:
        """Is any inode dirty?"""
        return bool(self._dirty)

    def fill(self, tx: Transaction) -> None:
        """Write back as many dirty inodes as the record takes (see `PreCommit`)."""
        chosen = list(self._dirty.values())[: tx.blocks_left]
        tx.require(BlockKey(state.ino, BlockType.INODE, state.ino) for state in chosen)
        for state in chosen:
            self.write_back(tx, state)

    def unreadable(self, key: BlockKey, error: Exception) -> None:
        """An inode block that was good before cannot be read: what was dirty is lost, not more."""
        state = self._states.get(key.address)
        if state is not None:
            _log.error("inode %d: its times and size cannot be written: %s", key.address, error)
            self._clean(state)
            state.inode = None
            state.lost = True

    def check(self) -> None:
        """Assert the invariants at the top of this module."""
        for ino, state in self._states.items():
            assert state.ino == ino
            assert state.lookups >= 0 and state.handles >= 0
            assert state.dirty == (ino in self._dirty)
            assert not state.dirty or state.inode is not None
            assert state.inode is None or state.inode.ino == ino
            assert not state.orphan or state.inode is None or state.inode.nlink == 0
            assert state.open_lock is None or state.handles > 0
            if state.file is not None:
                state.file.ranges.check()
        self._budget.check()


def bad_inode(ino: int, reason: str) -> BadBlock:
    """The error for an inode that contradicts something else on the volume."""
    return BadBlock(ino, BlockType.INODE, reason)
