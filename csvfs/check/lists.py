"""The orphan and the reclaim list of each slot: what waits there owns its space too."""

from __future__ import annotations

from functools import partial
from typing import cast

from csvfs.btree.node import Block, Item
from csvfs.btree.tree import TreeRoot
from csvfs.check.finding import Damage
from csvfs.check.tree_walk import walk_tree
from csvfs.check.walk import Visit, Walk
from csvfs.check.workbench import Workbench
from csvfs.format import (
    BLOCKS_PER_UNIT,
    ORPHAN_VALUE,
    RECLAIM_VALUE,
    BlockType,
    OrphanKind,
    ReclaimKind,
)
from csvfs.journal.transaction import BlockKey


async def walk_lists(walk: Walk, slots: list[int]) -> None:
    """Claim what the lists of these slots hold, and visit the inodes on them."""
    for slot in slots:
        orphans = TreeRoot.of_orphans(walk.geometry.orphan_root(slot), slot)
        for key, value in await _items(walk, orphans, f"orphan list of slot {slot}"):
            await _orphan(walk, orphans, key, value)
    for slot in slots:
        reclaim = TreeRoot.of_reclaim(walk.geometry.reclaim_root(slot), slot)
        for key, value in await _items(walk, reclaim, f"reclaim list of slot {slot}"):
            await _reclaim(walk, reclaim, key, value)


async def _items(walk: Walk, root: TreeRoot, where: str) -> list[Item]:
    address = root.address
    good, bad = await walk.image.read_verified([BlockKey(address, root.block_type, root.owner)])
    if address in bad:
        detail = bad[address].reason
        walk.find(Damage.LIST_ROOT, where, detail, partial(Workbench.make_list, root=root))
        return []
    items: list[Item] = []
    facts = await walk_tree(walk.image, walk.claims, root, cast(Block, good[address]), items.extend)
    rebuild = partial(Workbench.rebuild_tree, root=root, items=items)
    for node in facts.bad:
        walk.find(Damage.TREE_NODE, where, f"block {node.address}: {node.reason}", rebuild)
    return items


def _wrong(walk: Walk, root: TreeRoot, key: int, detail: str) -> None:
    kind = "orphan" if root.block_type is BlockType.ORPHAN_ROOT else "reclaim"
    walk.find(
        Damage.LIST_ENTRY,
        f"{kind} list of slot {root.owner}, entry {key}",
        detail,
        partial(Workbench.remove_item, root=root, key=key),
    )


async def _orphan(walk: Walk, root: TreeRoot, ino: int, value: bytes) -> None:
    kind, generation, _ = ORPHAN_VALUE.unpack(value)
    walk.totals.orphans += 1
    if kind == OrphanKind.TRUNCATE:
        known = walk.known.get(ino)
        if known is None or known.generation != generation:
            _wrong(walk, root, ino, "no such file is being truncated")
        return
    if kind != OrphanKind.OPEN:
        _wrong(walk, root, ino, f"kind {kind} is not known")
        return
    if ino in walk.known:
        _wrong(walk, root, ino, "the inode has a name, or is listed twice")
        return
    walk.dead[ino] = 0
    await walk.run([Visit(ino, None, generation, words=f"orphan {ino}")])
    if ino not in walk.known:
        _wrong(walk, root, ino, "the inode cannot be used")


async def _reclaim(walk: Walk, root: TreeRoot, key: int, value: bytes) -> None:
    kind, count, _ = RECLAIM_VALUE.unpack(value)
    walk.totals.reclaim_entries += 1
    claims = walk.claims
    unit, index = divmod(key, BLOCKS_PER_UNIT)
    if kind == ReclaimKind.DATA:
        if index or not count or not claims.inside(unit, count):
            _wrong(walk, root, key, f"{count} units from block {key} are in no group")
        elif (conflict := claims.claim_units(unit, count, 0)) is not None:
            detail = f"unit {conflict.first_unit} belongs to inode {conflict.owner}"
            _wrong(walk, root, key, detail)
    elif kind == ReclaimKind.BLOCK:
        if not claims.claim_block(key):
            _wrong(walk, root, key, "the block has an owner, or is in no group")
    elif kind == ReclaimKind.INODE:
        if key in walk.known:
            _wrong(walk, root, key, "the inode has a name, or is listed twice")
            return
        walk.dead[key] = -1
        await walk.run([Visit(key, None, words=f"dead inode {key}")])
        if key not in walk.known:
            _wrong(walk, root, key, "the inode cannot be used")
    else:
        _wrong(walk, root, key, f"kind {kind} is not known")
