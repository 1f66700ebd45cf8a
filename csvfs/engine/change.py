"""One transaction as the operations of a volume see it: inodes, trees, blocks, lists.

A body gets a `Change`, asks it for the inodes that it will change, changes their fields, names,
extents, and returns. Then `save` packs the inodes into their blocks, and when the transaction is
merged the inode table follows. The body may run several times before that, each time with a fresh
`Change`; nothing it does shows before.

Nothing is freed here: units and blocks that an inode gives up go onto this slot's reclaim list in
the same transaction, and a background task frees them once that is stable (`csvfs.data.reclaim`).
"""

from __future__ import annotations

import stat
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Final

import trio

from csvfs.allocation import placement
from csvfs.allocation.affinity import Affinity
from csvfs.allocation.allocator import Groups
from csvfs.btree.edit import TreeEditor
from csvfs.btree.tree import TreeRoot
from csvfs.data.extent_map import Placed
from csvfs.data.extents import contiguous, insert_units, remove_range
from csvfs.data.extents import goal as extent_goal
from csvfs.engine.locks import Resources
from csvfs.errors import Damaged
from csvfs.journal.transaction import NeedLock, Transaction
from csvfs.namespace.inode import MAX_FILE_BYTES, Inode, new_inode
from csvfs.namespace.inode_table import InodeTable
from csvfs.ondisk.block import BLOCKS_PER_UNIT, UNIT_BYTES, BlockType
from csvfs.ondisk.geometry import Geometry
from csvfs.ondisk.inode import (
    ORPHAN_VALUE,
    RECLAIM_VALUE,
    InodeFlag,
    OrphanKind,
    ReclaimKind,
)
from lockmgr.messages import Resource
from lockmgr.modes import Mode

MAX_UNITS: Final = MAX_FILE_BYTES // UNIT_BYTES + 1
"""Units of the largest file."""
ALLOCATION_BLOCKS: Final = 12
"""Images that mapping one more run may take: the header and a map of a group, and a split of the
extent tree from the leaf to the root."""
REMOVAL_EXTENTS: Final = 2
REMOVAL_UNITS: Final = 1024
"""More extents than that only if they make one run of so many units, and so one reclaim item: less
than the units of a map block, so that freeing it changes two maps at most."""
REMOVAL_BLOCKS: Final = 24
"""Images that taking so many extents out may take: both trees, the file's and the reclaim list,
may split and join nodes on every level, and a split allocates."""
CUT_ROUNDS: Final = 32
"""So many times in one transaction: a body must not hold up all other tasks for long."""


class ReclaimSignal:
    """Tells the reclaimer that there is something on this slot's list."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def set(self) -> None:
        self._event.set()

    async def wait(self) -> None:
        """Return when it was set since the last return."""
        await self._event.wait()
        self._event = trio.Event()


class OrphanQueue:
    """Names inodes of this slot's orphan list that nobody of this node uses: others may."""

    def __init__(self) -> None:
        self._inos: deque[int] = deque()
        self._event = trio.Event()

    def add(self, ino: int) -> None:
        self._inos.append(ino)
        self._event.set()

    async def next(self) -> int:
        """One that was added, each as often as it was."""
        while not self._inos:
            self._event = trio.Event()
            await self._event.wait()
        return self._inos.popleft()


@dataclass(frozen=True, slots=True)
class ChangeScope:
    """What all changes of one mounted volume share."""

    geometry: Geometry
    resources: Resources
    groups: Groups
    table: InodeTable
    slot: int
    clock: Callable[[], int]
    """Now, in ns since the epoch."""
    has_peers: Callable[[], bool]
    """Are there other nodes that have the volume mounted?"""
    affinity: Affinity
    reclaim: ReclaimSignal
    orphans: OrphanQueue


class Change:
    """What one body does to the volume. Use within the body only."""

    __slots__ = ("_buried", "_inodes", "now_ns", "scope", "tx")

    def __init__(self, tx: Transaction, scope: ChangeScope) -> None:
        self.tx: Final = tx
        self.scope = scope
        self._inodes: dict[int, _Edited] = {}
        self._buried: list[int] = []
        self.now_ns = scope.clock()

    # -- inodes ----------------------------------------------------------------------------
    def inode(self, ino: int, *, data: bool = True) -> Inode:
        """The fields of an inode whose lock is held EX, to be changed in place.

        ``data`` False: the change is none that fdatasync(2) has to wait for.
        """
        edited = self._inodes.get(ino)
        if edited is None:
            inode = self.scope.table.read(self.tx, ino).copy()
            edited = self._inodes[ino] = _Edited(inode, data)
        edited.data |= data
        return edited.inode

    def create_inode(
        self, parent: Inode, key: int, mode: int, uid: int, gid: int, *, rdev: int = 0
    ) -> Inode:
        """A new inode for the entry ``key`` of ``parent``; linked as that entry will link it."""
        scope = self.scope
        if stat.S_ISDIR(mode):
            group = placement.directory_group(scope.geometry, parent.ino, key)
        else:
            group = placement.near(scope.geometry, parent.ino)
        home = scope.affinity.home(group)
        ino = self._allocate_near(home)
        scope.affinity.used(home, placement.near(scope.geometry, ino))
        self._lock(scope.resources.inode(ino))
        inode = new_inode(ino, mode, uid, gid, self.now_ns, parent=parent, rdev=rdev)
        block = self.tx.create(ino, BlockType.INODE, ino)
        if inode.is_directory:
            TreeRoot.of_directory(ino).initialise(block)
        elif inode.is_regular:
            TreeRoot.of_file(ino).initialise(block)
        self._inodes[ino] = _Edited(inode, True)
        return inode

    def block_of(self, inode: Inode) -> bytearray:
        """The inode's own block, for what stands behind its fields."""
        return self.tx.edit(inode.ino, BlockType.INODE, inode.ino)

    def save(self) -> None:
        """The body has ended well: pack what it changed. Called once, by `csvfs.engine.engine`."""
        table = self.scope.table
        for ino, edited in self._inodes.items():
            inode = edited.inode
            if ino in self.tx.freed:
                continue
            inode.change += 1
            inode.pack_into(self.tx.edit(ino, BlockType.INODE, ino))
            table.merged(self.tx, inode, data=edited.data)
        for ino in self._buried:
            self.tx.after_merge(partial(table.bury, ino))

    # -- trees and blocks of an inode --------------------------------------------------------
    def entries(self, directory: Inode) -> TreeEditor:
        """The names of a directory."""
        return self._tree(TreeRoot.of_directory(directory.ino), directory)

    def extents(self, file: Inode) -> TreeEditor:
        """The extents of a file."""
        return self._tree(TreeRoot.of_file(file.ino), file)

    def _tree(self, root: TreeRoot, inode: Inode) -> TreeEditor:
        return TreeEditor(
            self.tx,
            root,
            allocate=lambda: self._count_block(inode),
            release=lambda address: self.drop_block(inode, address),
        )

    def _count_block(self, inode: Inode) -> int:
        inode.metadata_blocks += 1
        return self._allocate_block(inode.ino)

    def add_block(self, inode: Inode, kind: BlockType) -> tuple[int, bytearray]:
        """One more block of the inode (attributes, the tail of a symbolic link)."""
        address = self._count_block(inode)
        return address, self.tx.create(address, kind, inode.ino)

    def drop_block(self, inode: Inode, address: int) -> None:
        """The inode gives up a block other than its own."""
        inode.metadata_blocks -= 1
        self._free_block(address)

    def drop_units(self, inode: Inode, runs: Iterable[tuple[int, int]]) -> None:
        """The inode gives up runs (first unit, count) that its extents name no more."""
        for unit, count in runs:
            inode.units -= count
            self._reclaim(unit * BLOCKS_PER_UNIT, ReclaimKind.DATA, count)

    # -- units of a file ---------------------------------------------------------------------
    def map_units(self, file: Inode, first: int, count: int) -> list[Placed]:
        """Allocate units for a hole of ``count`` logical units, unwritten; where they lie.

        Takes as many as the transaction has room for, at least one. Raises `NoSpace`.
        """
        scope, tree = self.scope, self.extents(file)
        placed: list[Placed] = []
        while count and (not placed or self.tx.blocks_left >= ALLOCATION_BLOCKS):
            goal = extent_goal(self.tx, tree.root, first)
            home = scope.affinity.home(placement.near(scope.geometry, file.ino))
            if goal is None:
                goal = placement.file_goal(scope.geometry, file.ino, home)
            homes = scope.affinity.homes(home)
            run = scope.groups.allocate_units(self.tx, count, goal, groups=homes)
            insert_units(tree, first, run.first_unit, run.units)
            placed += [(first + i, run.first_unit + i << 1) for i in range(run.units)]
            file.units += run.units
            first, count = first + run.units, count - run.units
        return placed

    def cut(self, file: Inode, first: int) -> bool:
        """Take the units from logical unit ``first`` on out of a file, as many as the
        transaction has room for. True when none is left."""
        tree, count = self.extents(file), REMOVAL_EXTENTS
        for _ in range(CUT_ROUNDS):
            if self.tx.blocks_left < REMOVAL_BLOCKS:
                break
            removed = remove_range(tree, first, MAX_UNITS, max_extents=count)
            self.drop_units(file, removed.runs)
            if removed.done:
                return True
            first, count = removed.next_unit, REMOVAL_EXTENTS
            if len(removed.runs) == 1:  # probably there is more of that run
                count = max(count, contiguous(self.tx, tree.root, first, REMOVAL_UNITS))
        return False

    # -- the end of an inode -----------------------------------------------------------------
    def dispose(self, inode: Inode, *, unused: bool) -> None:
        """The inode lost its last name: dead if it is ``unused``, else an orphan meanwhile."""
        assert inode.nlink == 0
        if unused:
            self.bury(inode)
        else:
            self.add_orphan(inode, OrphanKind.OPEN)

    def bury(self, inode: Inode) -> None:
        """Nobody can reach the inode any more: what it owns is to be reclaimed."""
        assert inode.nlink == 0
        if inode.flags & InodeFlag.TRIMMING:
            # A truncation that an error had ended: the reclaimer takes out the rest, too.
            self.settle_truncation(inode.ino)
        self._reclaim(inode.ino, ReclaimKind.INODE, 1)
        self._buried.append(inode.ino)

    def free_inode(self, inode: Inode, slot: int | None = None) -> None:
        """The last thing that a dead inode owned is gone: its own block goes too.

        As long as the map says that the block is in use, another node whose kernel knows the inode
        may look there, and must find that it is dead: so its last image goes home.
        """
        if inode.units or inode.metadata_blocks:
            raise Damaged(
                f"inode {inode.ino} counts {inode.units} units and {inode.metadata_blocks} blocks"
                " and has none of them"
            )
        if not self.scope.has_peers():
            self.tx.free(inode.ino)
        self.reclaim_list(slot).replace(inode.ino, _reclaim_value(ReclaimKind.BLOCK, 1))
        self._buried.append(inode.ino)

    # -- the slot's lists ----------------------------------------------------------------------
    def add_orphan(self, inode: Inode, kind: OrphanKind) -> None:
        """Note what a crash must not make forgotten. An OPEN entry replaces a TRUNCATE one.

        One that nobody of this node uses is to be watched: others do.
        """
        orphans = self.orphan_list()
        value = ORPHAN_VALUE.pack(kind, inode.generation, 0)
        if orphans.get(inode.ino) is None:
            orphans.insert(inode.ino, value)
        else:
            orphans.replace(inode.ino, value)
        if kind is OrphanKind.OPEN:
            state = self.scope.table.state(inode.ino)

            def follow() -> None:
                state.orphan = True
                if not state.needed:
                    self.scope.orphans.add(inode.ino)

            self.tx.after_merge(follow)

    def remove_orphan(self, ino: int, slot: int | None = None) -> None:
        """What the entry promised was done."""
        self.orphan_list(slot).remove(ino)

    def settle_truncation(self, ino: int, slot: int | None = None) -> None:
        """Nothing of the inode is left to be trimmed: its TRUNCATE entry goes, if it has one."""
        if self.orphan_kind(ino, slot) is OrphanKind.TRUNCATE:
            self.remove_orphan(ino, slot)

    def orphan_kind(self, ino: int, slot: int | None = None) -> OrphanKind | None:
        """What the orphan list of a slot says of an inode, None if nothing."""
        value = self.orphan_list(slot).get(ino)
        return None if value is None else OrphanKind(ORPHAN_VALUE.unpack(value)[0])

    def orphan_list(self, slot: int | None = None) -> TreeEditor:
        """The orphan list of a slot, by default this node's."""
        scope = self.scope
        slot = scope.slot if slot is None else slot
        self._lock(scope.resources.orphans(slot))
        return self._list(TreeRoot.of_orphans(scope.geometry.orphan_root(slot), slot))

    def reclaim_list(self, slot: int | None = None) -> TreeEditor:
        """The reclaim list of a slot, by default this node's."""
        scope = self.scope
        slot = scope.slot if slot is None else slot
        self._lock(scope.resources.reclaim(slot))
        return self._list(TreeRoot.of_reclaim(scope.geometry.reclaim_root(slot), slot))

    def _list(self, root: TreeRoot) -> TreeEditor:
        return TreeEditor(
            self.tx,
            root,
            allocate=lambda: self._allocate_block(root.address),
            release=self._free_block,
        )

    def _allocate_block(self, near: int) -> int:
        scope = self.scope
        return self._allocate_near(placement.near(scope.geometry, near))

    def _allocate_near(self, group: int) -> int:
        """A block in ``group``, else in one of this node's."""
        scope = self.scope
        homes = scope.affinity.homes(group)
        return scope.groups.allocate_block(self.tx, group, groups=homes)

    def _reclaim(self, address: int, kind: ReclaimKind, count: int) -> None:
        self.reclaim_list().insert(address, _reclaim_value(kind, count))
        self.tx.after_merge(self.scope.reclaim.set)

    def _free_block(self, address: int) -> None:
        self.tx.free(address)
        self._reclaim(address, ReclaimKind.BLOCK, 1)

    def _lock(self, resource: Resource) -> None:
        if not self.tx.try_lock(resource, Mode.EX):
            raise NeedLock(resource, Mode.EX)


@dataclass(slots=True)
class _Edited:
    """An inode that the body changes; ``data``: fdatasync has to wait for it."""

    inode: Inode
    data: bool


def _reclaim_value(kind: ReclaimKind, count: int) -> bytes:
    return RECLAIM_VALUE.pack(kind, count, 0)
