"""The B-tree: proving a whole tree. Used by the checker and, after every step, by the tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from csvfs.btree.node import MAX_KEY, NodeLayout
from csvfs.btree.tree import Tree, TreeRoot, child_address
from csvfs.journal.transaction import BlockReader
from csvfs.ondisk.block import BadBlock, BlockType


@dataclass(slots=True)
class TreeStatistics:
    """What `verify` saw."""

    levels: int = 0
    """Of index nodes: 0 for a tree that is only a root leaf."""
    nodes: int = 0
    """TREE_NODE blocks."""
    entries: int = 0
    used_bytes: int = 0
    """Of the node areas below the root."""


@dataclass(frozen=True, slots=True)
class _Visit:
    """A node still to be looked at: keys in [low, high), below ``parent``."""

    address: int
    level: int
    low: int
    high: int
    parent: int | None
    """None: the root."""


def verify(reader: BlockReader, root: TreeRoot) -> TreeStatistics:
    """Check every invariant of `csvfs.btree.tree` and `csvfs.btree.node`. Raises `BadBlock`."""
    statistics = TreeStatistics()
    for fault in faults(reader, root, statistics):
        raise fault
    return statistics


def faults(
    reader: BlockReader, root: TreeRoot, statistics: TreeStatistics | None = None
) -> Iterator[BadBlock]:
    """Every fault of a tree, none left out because of another; ends on any content.

    A node that cannot be read is one fault, and nothing below it is looked at.
    """
    tree = Tree(reader, root)
    seen = statistics or TreeStatistics()
    visited: set[int] = set()
    try:
        block, level, count = tree.read_root()
    except BadBlock as fault:
        yield fault
        return
    seen.levels = level
    layout: NodeLayout = root.index if level else root.leaf
    todo = [_Visit(root.address, level, 0, MAX_KEY + 1, None)]
    while todo:
        visit = todo.pop()
        if visit.parent is not None:
            if visit.address in visited or visit.address == root.address:
                yield _fault(root, visit.parent, f"node {visit.address} has two parents")
                continue
            visited.add(visit.address)
            try:
                block, count = tree.read_node(visit.address, visit.level)
            except BadBlock as fault:
                yield fault
                continue
            layout = root.node_index if visit.level else root.node_leaf
            seen.nodes += 1
            seen.used_bytes += layout.used(block)
        for reason in layout.faults(block):
            yield _fault(root, visit.address, reason)
        keys = layout.keys(block)
        yield from _bounds(root, visit, keys)
        if visit.level == 0:
            seen.entries += count
            continue
        borders = [visit.low, *keys[1:], visit.high]
        todo.extend(
            _Visit(
                child_address(block, layout, at),
                visit.level - 1,
                borders[at],
                borders[at + 1],
                visit.address,
            )
            for at in reversed(range(count))
        )


def _bounds(root: TreeRoot, visit: _Visit, keys: list[int]) -> Iterator[BadBlock]:
    """Keys that do not belong into this node, or a first key of an index that is not 0."""
    if visit.level:
        if keys[0] != 0:
            yield _fault(root, visit.address, f"the first key of an index node is {keys[0]}, not 0")
        keys = keys[1:]
    for key in keys:
        if not visit.low <= key < visit.high:
            yield _fault(
                root,
                visit.address,
                f"key {key} is not within {visit.low}..{visit.high - 1}, as its parents say",
            )


def _fault(root: TreeRoot, address: int, reason: str) -> BadBlock:
    if address == root.address:
        return BadBlock(address, root.block_type, reason)
    return BadBlock(address, BlockType.TREE_NODE, reason)
