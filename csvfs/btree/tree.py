"""The B-tree: reading. Keys are u64; extents, directories, lists and shared ranges are such trees.

Theory. A tree is a root *area* that stays in its owner's block for ever, and TREE_NODE blocks
below it. Nodes are read from a `BlockReader` and searched in place, as packed bytes
(`csvfs.btree.node`); nothing decoded is kept, so there is nothing to invalidate. A reader that
raises `NeedBlocks` ends the operation, which has had no effect; the caller runs it again.

Entry i > 0 of an index node says: every key of child i is at least key i, every key of child
i - 1 is smaller. Separators need not be keys that exist.

Invariants (`csvfs.btree.verify` verifies them all; a descent verifies what it touches):
  1. levels fall by exactly one from parent to child: so no descent is longer than `MAX_LEVEL`
  2. no node but the root is empty
  3. keys ascend strictly over the whole tree, within the bounds that the parents set
  4. every TREE_NODE carries the owner and the flags of its tree, and has one parent

A breach raises `BadBlock` that names the block.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Final

from csvfs.btree.heap import MAX_VALUE_BYTES, HeapLayout
from csvfs.btree.node import (
    CHILD_BYTES,
    FIXED_VALUE_BYTES,
    KEY,
    LEVEL_KIND_COUNT,
    MAX_KEY,
    MAX_LEVEL,
    Block,
    FlatLayout,
    Item,
    NodeLayout,
    bad_node,
)
from csvfs.journal.transaction import BlockKey, BlockReader
from csvfs.ondisk.block import BlockType
from csvfs.ondisk.inode import (
    INODE_ROOT_BYTES,
    INODE_ROOT_OFFSET,
    NODE_BYTES,
    NODE_OFFSET,
    NodeKind,
    TreeOwner,
)

__all__ = ["MAX_KEY", "MAX_VALUE_BYTES", "Step", "Tree", "TreeRoot"]

_NODE_LEAF: Final[dict[NodeKind, NodeLayout]] = {
    NodeKind.FIXED: FlatLayout(NODE_OFFSET, NODE_BYTES, FIXED_VALUE_BYTES),
    NodeKind.VARIABLE: HeapLayout(NODE_OFFSET, NODE_BYTES),
}
_NODE_INDEX: Final = FlatLayout(NODE_OFFSET, NODE_BYTES, CHILD_BYTES)
_INODE_LEAF: Final[dict[NodeKind, NodeLayout]] = {
    NodeKind.FIXED: FlatLayout(INODE_ROOT_OFFSET, INODE_ROOT_BYTES, FIXED_VALUE_BYTES),
    NodeKind.VARIABLE: HeapLayout(INODE_ROOT_OFFSET, INODE_ROOT_BYTES),
}
_INODE_INDEX: Final = FlatLayout(INODE_ROOT_OFFSET, INODE_ROOT_BYTES, CHILD_BYTES)


class TreeRoot:
    """Where a tree is, and what its blocks must be found to be. Immutable; cheap to make."""

    __slots__ = (
        "address",
        "block_type",
        "flags",
        "index",
        "kind",
        "leaf",
        "node_index",
        "node_leaf",
        "owner",
    )

    def __init__(
        self, address: int, block_type: BlockType, owner: int, kind: NodeKind, flags: TreeOwner
    ) -> None:
        self.address = address
        self.block_type = block_type
        self.owner = owner
        self.kind = kind
        self.flags = int(flags)
        """Of the TREE_NODE blocks below the root."""
        in_inode = block_type is BlockType.INODE
        self.leaf = (_INODE_LEAF if in_inode else _NODE_LEAF)[kind]
        self.index = _INODE_INDEX if in_inode else _NODE_INDEX
        self.node_leaf = _NODE_LEAF[kind]
        self.node_index = _NODE_INDEX

    @classmethod
    def of_file(cls, ino: int) -> TreeRoot:
        """Extents of an inode."""
        return cls(ino, BlockType.INODE, ino, NodeKind.FIXED, TreeOwner.INODE)

    @classmethod
    def of_directory(cls, ino: int) -> TreeRoot:
        """Entries of a directory."""
        return cls(ino, BlockType.INODE, ino, NodeKind.VARIABLE, TreeOwner.INODE)

    @classmethod
    def of_orphans(cls, address: int, slot: int) -> TreeRoot:
        """The orphan list of a slot, whose root block is at ``address``."""
        return cls(address, BlockType.ORPHAN_ROOT, slot, NodeKind.FIXED, TreeOwner.ORPHAN)

    @classmethod
    def of_reclaim(cls, address: int, slot: int) -> TreeRoot:
        """The reclaim list of a slot, whose root block is at ``address``."""
        return cls(address, BlockType.RECLAIM_ROOT, slot, NodeKind.FIXED, TreeOwner.RECLAIM)

    def initialise(self, block: bytearray) -> None:
        """Make the root area of ``block`` an empty tree."""
        self.leaf.initialise(block, 0, self.kind)

    def __repr__(self) -> str:
        return f"TreeRoot({self.block_type.words} {self.address}, {self.kind.name.lower()})"


class Step:
    """One node on the way from the root to a leaf, and the entry that the way goes through."""

    __slots__ = ("address", "block", "index", "layout")

    def __init__(self, address: int, block: Block, layout: NodeLayout, index: int) -> None:
        self.address = address
        self.block = block
        self.layout = layout
        self.index = index


class Tree:
    """Look-ups in one tree. Every method may raise `NeedBlocks` and `BadBlock`."""

    __slots__ = ("reader", "root")

    def __init__(self, reader: BlockReader, root: TreeRoot) -> None:
        self.reader = reader
        self.root = root

    # -- nodes -------------------------------------------------------------------------------
    def read_root(self) -> tuple[Block, int, int]:
        """The root's block, its level and its count, checked."""
        root = self.root
        block = self.reader.read(root.address, root.block_type, root.owner, 0)
        level, kind, count = LEVEL_KIND_COUNT.unpack_from(block, root.leaf.offset)
        layout = root.index if level else root.leaf
        if kind != root.kind or level > MAX_LEVEL or count > layout.capacity():
            raise bad_node(block, f"its root says level {level}, kind {kind}, {count} entries")
        if level and not count:
            raise bad_node(block, "its root is an index without children")
        return block, level, count

    def read_node(self, address: int, level: int) -> tuple[Block, int]:
        """The node at ``address``, which must be of ``level``, and its count."""
        root = self.root
        block = self.reader.read(address, BlockType.TREE_NODE, root.owner, root.flags)
        found, kind, count = LEVEL_KIND_COUNT.unpack_from(block, NODE_OFFSET)
        layout = root.node_index if level else root.node_leaf
        if found != level or kind != root.kind or not 0 < count <= layout.capacity():
            raise bad_node(
                block, f"the node says level {found}, kind {kind}, {count} entries: not {level}"
            )
        return block, count

    def find_leaf(self, key: int) -> tuple[Block, NodeLayout, int]:
        """The leaf that ``key`` belongs to, its layout and its count: the short way down."""
        root = self.root
        block, level, count = self.read_root()
        if not level:
            return block, root.leaf, count
        index: FlatLayout = root.index
        while level:
            words = memoryview(block).cast("Q")
            first = index.first_word
            at = bisect_right(words, key, first + 1, first + count) - 1 - first
            level -= 1
            block, count = self.read_node(words[index.first_value_word + at], level)
            index = root.node_index
        return block, root.node_leaf, count

    def path(self, key: int) -> list[Step]:
        """The nodes from the root to the leaf that ``key`` belongs to.

        The last step's index is the position of the first key that is not smaller.
        """
        root = self.root
        address = root.address
        block, level, count = self.read_root()
        steps = []
        index = root.index
        while level:
            words = memoryview(block).cast("Q")
            first = index.first_word
            at = bisect_right(words, key, first + 1, first + count) - 1 - first
            steps.append(Step(address, block, index, at))
            address = words[index.first_value_word + at]
            level -= 1
            block, count = self.read_node(address, level)
            index = root.node_index
        leaf = root.node_leaf if steps else root.leaf
        first = leaf.first_word
        at = bisect_left(memoryview(block).cast("Q"), key, first, first + count) - first
        steps.append(Step(address, block, leaf, at))
        return steps

    def advance(self, steps: list[Step], direction: int = 1) -> bool:
        """Move a path to the first entry of the next leaf (-1: the last of the one before).

        False at the end of the tree: the path is then of no further use.
        """
        height = len(steps)
        while True:
            steps.pop()
            if not steps:
                return False
            step = steps[-1]
            step.index += direction
            if 0 <= step.index < step.layout.count(step.block):
                break
        while len(steps) < height:
            step = steps[-1]
            address = child_address(step.block, step.layout, step.index)
            level = height - len(steps) - 1
            block, count = self.read_node(address, level)
            layout = self.root.node_index if level else self.root.node_leaf
            steps.append(Step(address, block, layout, 0 if direction > 0 else count - 1))
        return True

    # -- look-ups ----------------------------------------------------------------------------
    def get(self, key: int) -> bytes | None:
        """The value of ``key``, None if there is none."""
        block, layout, count = self.find_leaf(key)
        first = layout.first_word
        words = memoryview(block).cast("Q")
        at = bisect_left(words, key, first, first + count)
        if at == first + count or words[at] != key:
            return None
        return layout.value(block, at - first)

    def floor(self, key: int) -> Item | None:
        """The entry with the greatest key that is not above ``key``."""
        block, layout, count = self.find_leaf(key)
        first = layout.first_word
        words = memoryview(block).cast("Q")
        at = bisect_right(words, key, first, first + count) - 1
        if at >= first:
            return words[at], layout.value(block, at - first)
        # The leaf has only greater keys: the answer, if there is one, ends the leaf before.
        steps = self.path(key)
        if not self.advance(steps, -1):
            return None
        return self._entry(steps[-1])

    def ceiling(self, key: int) -> Item | None:
        """The entry with the smallest key that is not below ``key``."""
        steps = self.path(key)
        leaf = steps[-1]
        if leaf.index == leaf.layout.count(leaf.block) and not self.advance(steps):
            return None
        return self._entry(steps[-1])

    def first(self) -> Item | None:
        """The entry with the smallest key."""
        return self.ceiling(0)

    def last(self) -> Item | None:
        """The entry with the greatest key."""
        return self.floor(MAX_KEY)

    def _entry(self, step: Step) -> Item:
        layout, block, index = step.layout, step.block, step.index
        return layout.key(block, index), layout.value(block, index)

    def items(self, first: int = 0) -> Iterator[Item]:
        """Entries in ascending order from ``first`` on, lazily, a leaf at a time.

        The tree must not be changed meanwhile: take a batch, then change it, then go on from
        the last key + 1.
        """
        steps = self.path(first)
        bound = first
        while True:
            leaf = steps[-1]
            for key, value in leaf.layout.items(leaf.block, leaf.index):
                if key < bound:
                    raise bad_node(leaf.block, f"key {key} is out of order")
                yield key, value
                bound = key + 1
            if not self.advance(steps):
                return

    def is_empty(self) -> bool:
        """True if there is no entry."""
        return self.read_root()[2] == 0

    def count(self) -> int:
        """Number of entries; reads every node."""
        steps = self.path(0)
        total = bound = 0
        while True:
            block, layout = steps[-1].block, steps[-1].layout
            entries = layout.count(block)
            if entries:
                if layout.key(block, 0) < bound:
                    raise bad_node(block, f"key {layout.key(block, 0)} is out of order")
                bound = layout.key(block, entries - 1) + 1
            total += entries
            if not self.advance(steps):
                return total

    def walk_blocks(self) -> Iterator[int]:
        """Addresses of all TREE_NODE blocks below the root, parents before children.

        Raises `BadBlock` where a node has two parents.
        """
        block, level, count = self.read_root()
        seen: set[int] = set()
        todo = [(block, self.root.index, count, level)] if level else []
        while todo:
            block, index, count, level = todo.pop()
            if level > 1:
                self.reader.require(
                    BlockKey(
                        child_address(block, index, at),
                        BlockType.TREE_NODE,
                        self.root.owner,
                        self.root.flags,
                    )
                    for at in range(count)
                )
            for at in range(count):
                address = child_address(block, index, at)
                if address in seen:
                    raise bad_node(block, f"node {address} has two parents")
                seen.add(address)
                yield address
                if level > 1:
                    child, children = self.read_node(address, level - 1)
                    todo.append((child, self.root.node_index, children, level - 1))


def child_address(block: Block, layout: NodeLayout, index: int) -> int:
    """Child ``index`` of an index node."""
    assert isinstance(layout, FlatLayout)
    address: int = KEY.unpack_from(block, layout.values_at + CHILD_BYTES * index)[0]
    return address
