"""Inodes that the maps know and nobody names: named in /lost+found, with all below them."""

from __future__ import annotations

import stat
from functools import partial
from typing import cast

from csvfs.btree.node import Block, Item
from csvfs.btree.tree import TreeRoot
from csvfs.check.claims import Claims
from csvfs.check.entries import entry_fault, parse_entry
from csvfs.check.finding import Damage
from csvfs.check.tree_walk import walk_tree
from csvfs.check.walk import BATCH_INODES, Visit, Walk, symlink_fault
from csvfs.check.workbench import Workbench
from csvfs.format import BadBlock, BlockType
from csvfs.journal.transaction import BlockKey
from csvfs.namespace.inode import Inode


async def walk_lost(walk: Walk, unclaimed: list[int]) -> None:
    """Visit the inodes among these blocks; those that no lost directory names are findings."""
    lost: dict[int, Inode] = {}
    below: set[int] = set()
    for start in range(0, len(unclaimed), BATCH_INODES):
        batch = unclaimed[start : start + BATCH_INODES]
        good, _ = await walk.image.read_verified(
            BlockKey(address, BlockType.INODE, address) for address in batch
        )
        for ino in sorted(good):
            inode = Inode.unpack(good[ino])
            try:
                inode.check(ino)
            except BadBlock:
                continue
            if inode.is_symlink and await symlink_fault(walk.image, inode):
                continue  # nothing of it is worth a name: its block is free
            lost[ino] = inode
            if inode.is_directory:
                below |= await _children(walk, inode, cast(Block, good[ino]))
    for ino in [*sorted(lost.keys() - below), *sorted(lost)]:
        if ino in walk.known:
            continue
        await walk.run([Visit(ino, None, words=f"inode {ino}")])
        if ino in walk.known:
            walk.dead[ino] = -1
            what = "directory" if stat.S_ISDIR(lost[ino].mode) else "file"
            detail = f"a {what} of {lost[ino].size} bytes, changed {lost[ino].mtime_ns // 10**9}"
            repair = partial(Workbench.name_lost, ino=ino)
            walk.find(Damage.LOST_INODE, f"inode {ino}", detail, repair)


async def _children(walk: Walk, inode: Inode, block: Block) -> set[int]:
    """Inode numbers that a directory names; its blocks are not claimed yet."""
    found: set[int] = set()

    def on_items(leaf: list[Item]) -> None:
        for key, value in leaf:
            if entry_fault(inode.hash_seed, key, value) is None:
                found.add(parse_entry(key, value).ino)

    root = TreeRoot.of_directory(inode.ino)
    await walk_tree(walk.image, Claims(walk.geometry), root, block, on_items)
    return found - {inode.ino}
