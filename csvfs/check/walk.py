"""Follow every name from the root, and every list of a slot, and claim what they own.

The walk goes in batches: the inodes of one batch are read with a few commands, sorted by address;
then each inode's tree. What a batch's directories name is the next batches' work. Memory: a few
words for each inode, a byte for each unit (`Claims`).
"""

from __future__ import annotations

import stat
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import cast

from csvfs.btree.node import Block, Item
from csvfs.btree.tree import TreeRoot
from csvfs.check.claims import Claims
from csvfs.check.entries import entry_fault, extent_fault, name_words, parse_entry
from csvfs.check.finding import Damage, Finding, Repair, Totals
from csvfs.check.image import VolumeImage
from csvfs.check.tree_walk import TreeFacts, walk_tree
from csvfs.check.workbench import Workbench
from csvfs.format import (
    EXTENT_VALUE,
    INODE_ROOT_BYTES,
    MAX_SYMLINK_BYTES,
    ROOT_INODE,
    BadBlock,
    BlockType,
    Geometry,
    UnitState,
    unpack_place,
)
from csvfs.journal.transaction import BlockKey
from csvfs.namespace.directory import Entry
from csvfs.namespace.inode import Inode
from csvfs.namespace.xattrs import unpack_attributes

BATCH_INODES = 512
Name = tuple[int, int]
"""(directory's inode number, key of the entry)."""


class Known:
    """What is kept of an inode that the walk has seen."""

    __slots__ = ("dtype", "entries", "generation", "names", "nlink", "parent", "subdirectories")

    def __init__(self, inode: Inode) -> None:
        self.generation = inode.generation
        self.dtype = inode.dtype
        self.nlink = inode.nlink
        self.parent = inode.parent
        self.names = 0
        self.entries = 0
        self.subdirectories = 0

    @property
    def is_directory(self) -> bool:
        return self.dtype == stat.S_IFDIR >> 12


@dataclass(slots=True)
class Visit:
    """An inode to look at, and the first name that led to it (None: a list or the root did)."""

    ino: int
    name: Name | None
    generation: int = 0
    """As the name says; 0: not checked."""
    dtype: int | None = None
    words: str = ""


@dataclass(slots=True)
class Walk:
    """The state of one walk. ``state_of`` tells what the allocation map says of a unit."""

    image: VolumeImage
    geometry: Geometry
    claims: Claims
    totals: Totals
    report: Callable[[Finding], None]
    state_of: Callable[[int], UnitState | None]
    known: dict[int, Known] = field(default_factory=dict)
    names: dict[int, list[Name]] = field(default_factory=dict)
    """Inode number -> every name that leads to it."""
    dead: dict[int, int] = field(default_factory=dict)
    """Inodes on orphan and reclaim lists: number -> nlink they must have, or -1 for any."""
    _queue: deque[Visit] = field(default_factory=deque)

    def find(self, damage: Damage, where: str, detail: str, repair: Repair | None = None) -> None:
        """Note one piece of damage."""
        self.report(Finding(damage, where, detail, repair))

    # -- the queue ---------------------------------------------------------------------------
    async def run(self, visits: Iterable[Visit]) -> None:
        """Visit these inodes and everything below them."""
        self._queue.extend(visits)
        while self._queue:
            batch = [self._queue.popleft() for _ in range(min(BATCH_INODES, len(self._queue)))]
            usable = [visit for visit in batch if self._is_plausible(visit)]
            good, bad = await self.image.read_verified(
                BlockKey(visit.ino, BlockType.INODE, visit.ino) for visit in usable
            )
            for visit in usable:
                if visit.ino in bad:
                    self._bad_inode(visit, bad[visit.ino].reason)
                else:
                    await self._visit(visit, cast(Block, good[visit.ino]))

    def _is_plausible(self, visit: Visit) -> bool:
        if visit.ino == ROOT_INODE:
            return True
        inside = self.geometry.holds(visit.ino)
        state = self.state_of(visit.ino // 16) if inside else None
        if inside and state is not UnitState.DATA:
            return True
        what = "the maps say that it is file data" if inside else "no inode can be there"
        self._unusable(visit, Damage.DANGLING_ENTRY, f"it leads to block {visit.ino}: {what}")
        return False

    def _bad_inode(self, visit: Visit, reason: str) -> None:
        if visit.ino == ROOT_INODE:
            self.find(Damage.ROOT_DIRECTORY, "inode 1", reason, Workbench.make_root)
        else:
            self._unusable(visit, Damage.INODE, reason)

    def _unusable(self, visit: Visit, damage: Damage, reason: str) -> None:
        """Nothing can be reached through this visit: its name goes, or its list's entry."""
        repair = None
        if visit.name is not None:
            repair = partial(Workbench.remove_names, names=self.names[visit.ino])
        where = visit.words or f"inode {visit.ino}"
        self.find(damage, where, reason, repair)

    # -- one inode ---------------------------------------------------------------------------
    async def _visit(self, visit: Visit, block: Block) -> None:
        ino = visit.ino
        inode = Inode.unpack(block)
        try:
            inode.check(ino)
        except BadBlock as error:
            self._bad_inode(visit, error.reason)
            return
        if visit.generation and inode.generation != visit.generation:
            detail = f"generation {visit.generation} is named, {inode.generation} is there"
            self._unusable(visit, Damage.STALE_ENTRY, detail)
            return
        if ino != ROOT_INODE and not self.claims.claim_block(ino):
            self._unusable(visit, Damage.DOUBLE_BLOCK, "the inode's block has another owner")
            return
        known = self.known[ino] = Known(inode)
        if visit.dtype is not None and visit.dtype != inode.dtype:
            self._wrong_type(visit.words, ino)
        blocks = await self._xattrs(inode)
        if inode.is_directory:
            self.totals.directories += 1
            blocks += await self._directory(inode, block, known)
        elif inode.is_regular:
            self.totals.files += 1
            blocks += await self._file(inode, block)
        else:
            self.totals.others += 1
            if inode.is_symlink:
                blocks += await self._symlink(visit, inode)
        if blocks != inode.metadata_blocks:
            self.find(
                Damage.UNIT_COUNT,
                f"inode {ino}",
                f"it says {inode.metadata_blocks} metadata blocks, {blocks} are there",
                partial(Workbench.edit_inode, ino=ino, metadata_blocks=blocks),
            )

    async def _xattrs(self, inode: Inode) -> int:
        address = inode.xattr_block
        if not address:
            return 0
        where = f"inode {inode.ino}"
        drop = partial(Workbench.edit_inode, ino=inode.ino, xattr_block=0)
        if not self.claims.claim_block(address):
            self.find(Damage.DOUBLE_BLOCK, where, f"xattr block {address}", drop)
            return 0
        key = BlockKey(address, BlockType.XATTR, inode.ino)
        good, bad = await self.image.read_verified([key])
        try:
            if address in bad:
                raise bad[address]
            unpack_attributes(cast(Block, good[address]))
        except BadBlock as error:
            self.find(Damage.XATTRS, where, str(error), drop)
        return 1

    async def _symlink(self, visit: Visit, inode: Inode) -> int:
        blocks, reason = 0, ""
        if inode.symlink_tail:
            if self.claims.claim_block(inode.symlink_tail):
                blocks = 1
            else:
                reason = f"its tail block {inode.symlink_tail} has another owner"
        reason = reason or await symlink_fault(self.image, inode)
        if reason:
            repair = (
                partial(Workbench.remove_names, names=self.names[inode.ino]) if visit.name else None
            )
            self.find(Damage.SYMLINK, f"inode {inode.ino}", reason, repair)
        return blocks

    # -- directories -------------------------------------------------------------------------
    async def _directory(self, inode: Inode, block: Block, known: Known) -> int:
        ino = inode.ino
        root = TreeRoot.of_directory(ino)
        items: list[Item] = []

        def on_items(leaf: list[Item]) -> None:
            items.extend(leaf)
            known.entries += len(leaf)
            for key, value in leaf:
                self._entry(inode, key, value)

        facts = await walk_tree(self.image, self.claims, root, block, on_items)
        self._tree_damage(root, f"directory {ino}", facts, items)
        if not facts.bad and known.entries != inode.entries:
            self.find(
                Damage.ENTRY_COUNT,
                f"directory {ino}",
                f"it says {inode.entries} entries, {known.entries} are there",
                partial(Workbench.edit_inode, ino=ino, entries=known.entries),
            )
        return facts.nodes

    def _entry(self, inode: Inode, key: int, value: bytes) -> None:
        where = f"directory {inode.ino}, entry {key:#x}"
        remove = partial(Workbench.remove_entry, directory=inode.ino, key=key)
        fault = entry_fault(inode.hash_seed, key, value)
        if fault is not None:
            self.find(Damage.ENTRY, where, fault, remove)
            return
        entry = parse_entry(key, value)
        where = f"directory {inode.ino}, {name_words(entry.name)}"
        names = self.names.setdefault(entry.ino, [])
        names.append((inode.ino, key))
        child = self.known.get(entry.ino)
        if child is not None:
            self._another_name(where, entry, child, remove)
        elif len(names) == 1:
            self._queue.append(Visit(entry.ino, names[0], entry.generation, entry.dtype, where))

    def _another_name(self, where: str, entry: Entry, child: Known, remove: Repair) -> None:
        if entry.generation != child.generation:
            self.names[entry.ino].pop()
            detail = f"generation {entry.generation} is named, {child.generation} is there"
            self.find(Damage.STALE_ENTRY, where, detail, remove)
        elif entry.dtype != child.dtype:
            self._wrong_type(where, entry.ino)

    def _wrong_type(self, where: str, ino: int) -> None:
        self.find(
            Damage.ENTRY_TYPE,
            where,
            f"it does not show the type of inode {ino}",
            partial(Workbench.correct_types, ino=ino, names=self.names[ino]),
        )

    def _tree_damage(self, root: TreeRoot, where: str, facts: TreeFacts, items: list[Item]) -> None:
        """One repair mends all bad nodes of a tree: it is rebuilt of the items that were read."""
        rebuild: Repair | None = partial(Workbench.rebuild_tree, root=root, items=items)
        for bad in facts.bad:
            damage = Damage.DOUBLE_BLOCK if bad.claimed_twice else Damage.TREE_NODE
            self.find(damage, where, f"block {bad.address}: {bad.reason}", rebuild)
            rebuild = None

    # -- files -------------------------------------------------------------------------------
    async def _file(self, inode: Inode, block: Block) -> int:
        root = TreeRoot.of_file(inode.ino)
        nodes, units = await self.extents(root, block, f"file {inode.ino}", inode.ino)
        if units >= 0 and units != inode.units:
            self.find(
                Damage.UNIT_COUNT,
                f"file {inode.ino}",
                f"it says {inode.units} units, {units} are there",
                partial(Workbench.edit_inode, ino=inode.ino, units=units),
            )
        return nodes

    async def extents(
        self, root: TreeRoot, block: Block, where: str, owner: int
    ) -> tuple[int, int]:
        """Claim the units of an extent tree; (nodes, units), units -1 where damage was found."""
        kept: list[Item] = []
        wrong: list[tuple[Damage, str]] = []
        claims, unpack = self.claims, EXTENT_VALUE.unpack
        units = end = 0

        def on_items(leaf: list[Item]) -> None:
            nonlocal units, end
            for item in leaf:
                logical, value = item
                word, mask = unpack(value)
                unit, count = unpack_place(word)
                fault = extent_fault(logical, count, mask, end)
                if fault is None and not claims.inside(unit, count):
                    fault = f"units {unit} to {unit + count - 1} are in no group"
                if fault is not None:
                    wrong.append((Damage.EXTENT, f"at unit {logical} of the file: {fault}"))
                    continue
                conflict = claims.claim_units(unit, count, owner)
                if conflict is not None:
                    whose = f"inode {conflict.owner}" if conflict.owner else "metadata"
                    detail = f"units {conflict.first_unit} +{conflict.count}: also of {whose}"
                    wrong.append((Damage.DOUBLE_UNITS, detail))
                    continue
                end = logical + count
                units += count
                kept.append(item)

        facts = await walk_tree(self.image, claims, root, block, on_items)
        self.totals.extents += facts.items
        self._tree_damage(root, where, facts, kept)
        rebuild: Repair | None = None
        if not facts.bad:
            rebuild = partial(Workbench.rebuild_tree, root=root, items=kept)
        for damage, detail in wrong:
            self.find(damage, where, detail, rebuild)
            rebuild = None
        return facts.nodes, -1 if facts.bad or wrong else units

    # -- afterwards --------------------------------------------------------------------------
    def finish_names(self) -> None:
        """Compare names, links and parents, once everything was visited."""
        for ino, names in self.names.items():
            child = self.known.get(ino)
            if child is None:
                continue
            child.names = len(names)
            if not child.is_directory:
                continue
            for directory, key in names[1:]:
                self.find(
                    Damage.SECOND_NAME,
                    f"directory {ino}",
                    f"directory {directory} names it too",
                    partial(Workbench.remove_entry, directory=directory, key=key),
                )
            self.known[names[0][0]].subdirectories += 1
        for ino, known in self.known.items():
            self._finish_inode(ino, known)

    def _finish_inode(self, ino: int, known: Known) -> None:
        is_directory = known.is_directory
        expected = known.names
        if is_directory:
            expected = 2 + known.subdirectories if known.names or ino == ROOT_INODE else 0
        wanted = self.dead.get(ino)
        if wanted is not None:
            expected = known.nlink if wanted < 0 else wanted
        if known.nlink != expected:
            self.find(
                Damage.LINK_COUNT,
                f"inode {ino}",
                f"it says {known.nlink} links, there are {expected}",
                partial(Workbench.edit_inode, ino=ino, nlink=expected),
            )
        if is_directory and wanted is None:
            parent = ROOT_INODE if ino == ROOT_INODE else self.names.get(ino, [(0, 0)])[0][0]
            if parent and known.parent != parent:
                self.find(
                    Damage.PARENT,
                    f"directory {ino}",
                    f"it says that directory {known.parent} names it, it is {parent}",
                    partial(Workbench.edit_inode, ino=ino, parent=parent),
                )


async def symlink_fault(image: VolumeImage, inode: Inode) -> str:
    """Why the target of a symbolic link cannot be read; empty if it can."""
    tail = inode.symlink_tail
    if not 0 < inode.size <= MAX_SYMLINK_BYTES:
        return f"a target of {inode.size} bytes"
    if (inode.size > INODE_ROOT_BYTES) != bool(tail):
        return f"a target of {inode.size} bytes with tail block {tail}"
    if tail:
        _, bad = await image.read_verified([BlockKey(tail, BlockType.SYMLINK_TAIL, inode.ino)])
        if tail in bad:
            return str(bad[tail])
    return ""
