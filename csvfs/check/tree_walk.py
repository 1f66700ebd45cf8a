"""Read a whole B-tree, level by level, believing nothing.

Unlike `csvfs.btree.verify` this goes on where a node is damaged: what can be read is used, what
cannot is named, and the tree can be rebuilt of the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from csvfs.btree.node import LEVEL_KIND_COUNT, MAX_KEY, MAX_LEVEL, Block, Item, NodeLayout
from csvfs.btree.tree import TreeRoot, child_address
from csvfs.check.claims import Claims
from csvfs.check.image import VolumeImage
from csvfs.format import BadBlock, BlockType
from csvfs.journal.transaction import BlockKey

BATCH_NODES = 512


@dataclass(slots=True)
class BadNode:
    """A node that cannot be used, and why."""

    address: int
    reason: str
    claimed_twice: bool = False


@dataclass(slots=True)
class TreeFacts:
    """What was found besides the items."""

    nodes: int = 0
    items: int = 0
    bad: list[BadNode] = field(default_factory=list)


@dataclass(slots=True)
class _Place:
    """A node to be read: its bounds are those of its parent's entry."""

    address: int
    low: int
    high: int


def node_items(
    root: TreeRoot, block: Block, level: int, layout: NodeLayout, low: int, high: int
) -> tuple[list[Item], str | None]:
    """Entries of a verified block's node, or why it is no node of ``level`` within its bounds.

    For an index the values are child addresses, packed.
    """
    found, kind, count = LEVEL_KIND_COUNT.unpack_from(block, layout.offset)
    if found != level or kind != root.kind or count > layout.capacity():
        return [], f"it says level {found}, kind {kind}, {count} entries; level {level} was due"
    try:
        layout.require_plausible(block)
        fault = next(iter(layout.faults(block)), None)
        if fault is not None:
            return [], fault
        items = layout.items(block)
    except BadBlock as error:
        return [], error.reason
    first = 1 if level else 0
    if items[first:] and not (low <= items[first][0] and items[-1][0] <= high):
        return [], f"its keys leave the bounds {low} to {high} of its parent"
    return items, None


async def walk_tree(
    image: VolumeImage,
    claims: Claims,
    root: TreeRoot,
    root_block: Block,
    on_items: Callable[[list[Item]], None],
) -> TreeFacts:
    """Claim every node of the tree and hand each readable leaf's items to ``on_items`` in order.

    ``root_block`` is verified; a level that is damaged ends only its own branch.
    """
    facts = TreeFacts()
    level = LEVEL_KIND_COUNT.unpack_from(root_block, root.leaf.offset)[0]
    if level > MAX_LEVEL:
        facts.bad.append(BadNode(root.address, f"its root says level {level}"))
        return facts
    layout = root.index if level else root.leaf
    items, fault = node_items(root, root_block, level, layout, 0, MAX_KEY)
    if fault is None and level and not items:
        fault = "its root is an index without children"
    if fault is not None:
        facts.bad.append(BadNode(root.address, fault))
        return facts
    if not level:
        facts.items = len(items)
        on_items(items)
        return facts
    places = _children(root_block, root.index, items, 0, MAX_KEY)
    while level:
        level -= 1
        below: list[_Place] = []
        for start in range(0, len(places), BATCH_NODES):
            batch = places[start : start + BATCH_NODES]
            await _walk_batch(image, claims, root, level, batch, facts, below, on_items)
        places = below
    return facts


async def _walk_batch(
    image: VolumeImage,
    claims: Claims,
    root: TreeRoot,
    level: int,
    batch: list[_Place],
    facts: TreeFacts,
    below: list[_Place],
    on_items: Callable[[list[Item]], None],
) -> None:
    mine: list[_Place] = []
    for place in batch:
        if claims.claim_block(place.address):
            mine.append(place)
            facts.nodes += 1
        else:
            reason = "it lies outside the groups or belongs to another owner too"
            facts.bad.append(BadNode(place.address, reason, claimed_twice=True))
    good, bad = await image.read_verified(
        BlockKey(place.address, BlockType.TREE_NODE, root.owner, root.flags) for place in mine
    )
    layout = root.node_index if level else root.node_leaf
    for place in mine:
        if place.address in bad:
            facts.bad.append(BadNode(place.address, bad[place.address].reason))
            continue
        block = cast(Block, good[place.address])
        items, fault = node_items(root, block, level, layout, place.low, place.high)
        if fault is None and not items:
            fault = "it is empty"
        if fault is not None:
            facts.bad.append(BadNode(place.address, fault))
        elif level:
            below.extend(_children(block, layout, items, place.low, place.high))
        else:
            facts.items += len(items)
            on_items(items)


def _children(
    block: Block, layout: NodeLayout, items: list[Item], low: int, high: int
) -> list[_Place]:
    keys = [low, *[key for key, _ in items[1:]]]
    ends = [*[key - 1 for key in keys[1:]], high]
    return [
        _Place(child_address(block, layout, at), keys[at], ends[at]) for at in range(len(items))
    ]
