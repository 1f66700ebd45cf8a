"""The B-tree: changing. Works inside one transaction; blocks come and go through two callbacks.

Rules
  - The root stays in place. When it overflows, its content moves into a new node and the tree
    grows by a level; when its only child fills less than three quarters of the root area, the
    child's content moves back.
  - A full node is cut in the middle; one that overflows at its end is left as it is, and the new
    entry begins the next node: keys that arrive in ascending order fill their nodes.
  - A node that loses its last entry is dropped. One that falls below a third of its area is
    joined with a neighbour under the same parent if the two fill at most three quarters of one.
    So a tree that shrinks gives its blocks back, and no entry that comes and goes at a border
    makes nodes come and go with it.
  - Dropped nodes are released at the end of an operation, when the tree is whole again: the
    callback may itself change this tree (the reclaim list frees nodes into itself).

After any exception the transaction must be abandoned: a tree may be half changed in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from csvfs.btree.heap import MAX_VALUE_BYTES
from csvfs.btree.node import (
    FIXED_VALUE_BYTES,
    KEY,
    LEVEL_KIND_COUNT,
    MAX_LEVEL,
    Item,
    NodeLayout,
    bad_node,
)
from csvfs.btree.tree import Step, Tree, TreeRoot, child_address
from csvfs.journal.transaction import Transaction
from csvfs.ondisk.block import BlockType
from csvfs.ondisk.inode import NODE_OFFSET, NodeKind


class DuplicateKey(ValueError):
    """`TreeEditor.insert` of a key that the tree has."""


class RemovedRange(NamedTuple):
    """What one batch of `TreeEditor.remove_range` did."""

    items: list[Item]
    done: bool
    """False: the budget ended it; the same call goes on in a later transaction."""


class TreeEditor(Tree):
    """Changes to one tree inside one transaction.

    ``allocate()`` gives the address of a free metadata block; the tree creates its node there.
    ``release(address)`` takes back a node that is no longer part of the tree; it has to
    `Transaction.free` the block and to note it for reclaim.
    """

    __slots__ = ("_allocate", "_dropped", "_release", "tx")

    def __init__(
        self,
        tx: Transaction,
        root: TreeRoot,
        allocate: Callable[[], int],
        release: Callable[[int], None],
    ) -> None:
        super().__init__(tx, root)
        self.tx = tx
        self._allocate = allocate
        self._release = release
        self._dropped: list[int] = []

    # -- entries -----------------------------------------------------------------------------
    def insert(self, key: int, value: bytes) -> None:
        """Add an entry. Raises `DuplicateKey` if the key exists."""
        self._check_value(value)
        steps = self.path(key)
        leaf = steps[-1]
        layout, index = leaf.layout, leaf.index
        if index < layout.count(leaf.block) and layout.key(leaf.block, index) == key:
            raise DuplicateKey(f"{self.root}: key {key} exists")
        self._add(steps, len(steps) - 1, key, value)

    def replace(self, key: int, value: bytes) -> None:
        """Change the value of ``key``. Raises KeyError if there is none."""
        self._check_value(value)
        steps = self._require(key)
        leaf = steps[-1]
        if leaf.layout.replace(self._edit(leaf), leaf.index, value):
            return
        self._remove(steps, len(steps) - 1, leaf.index, leaf.index + 1)
        self.insert(key, value)
        self._release_dropped()

    def remove(self, key: int) -> bytes:
        """Remove an entry and return its value. Raises KeyError if there is none."""
        steps = self._require(key)
        leaf = steps[-1]
        value = leaf.layout.value(leaf.block, leaf.index)
        self._remove(steps, len(steps) - 1, leaf.index, leaf.index + 1)
        self._release_dropped()
        return value

    def remove_range(
        self,
        first: int,
        end: int,
        *,
        max_blocks: int | None = None,
        max_items: int | None = None,
    ) -> RemovedRange:
        """Remove the entries with keys in [first, end), in ascending order, a leaf at a time.

        Stops after ``max_items`` entries, or once the transaction uses ``max_blocks`` blocks. A
        leaf changes at most two blocks on every level of the tree, one that goes as a whole only
        its parent; what ``release`` changes comes on top.
        """
        removed: list[Item] = []
        while (max_blocks is None or self.tx.blocks_used < max_blocks) and (
            max_items is None or len(removed) < max_items
        ):
            steps = self.path(first)
            leaf = steps[-1]
            if leaf.index == leaf.layout.count(leaf.block):
                if not self.advance(steps):
                    return RemovedRange(removed, True)
                leaf = steps[-1]
            count = leaf.layout.count(leaf.block)
            stop = last = leaf.layout.position(leaf.block, end)
            if stop <= leaf.index:
                return RemovedRange(removed, True)
            if max_items is not None:
                stop = min(stop, leaf.index + max_items - len(removed))
            removed += leaf.layout.items(leaf.block, leaf.index)[: stop - leaf.index]
            self._remove(steps, len(steps) - 1, leaf.index, stop)
            self._release_dropped()
            if stop == last < count:
                return RemovedRange(removed, True)
        return RemovedRange(removed, False)

    # -- growing -----------------------------------------------------------------------------
    def _add(self, steps: list[Step], depth: int, key: int, value: bytes) -> None:
        """Put an entry before the entry that ``steps[depth]`` points to; split upward."""
        step = steps[depth]
        if not step.layout.fits(step.block, len(value)):
            if depth == 0:
                self._grow(steps)
                depth = 1
            if not step.layout.fits(step.block, len(value)):
                step = self._split(steps, depth, key, len(value))
        if step.index == 0 and step.layout is self.root.node_index:
            key = 0
        step.layout.insert(self._edit(step), step.index, key, value)

    def _grow(self, steps: list[Step]) -> None:
        """Move the root's content into a new node; the root becomes its parent."""
        root, step = self.root, steps[0]
        block, level, _ = self.read_root()
        if level == MAX_LEVEL:
            raise bad_node(block, f"the tree has {MAX_LEVEL} levels below it and should grow")
        step.address, step.block, step.layout = self._move_down()
        block = self._edit_root()
        root.index.fill(block, level + 1, root.kind, [(0, KEY.pack(step.address))])
        steps.insert(0, Step(root.address, block, root.index, 0))

    def _move_down(self) -> tuple[int, bytearray, NodeLayout]:
        """Copy the root's content into a new node: its address, its block and its layout."""
        root = self.root
        block, level, _ = self.read_root()
        items = (root.index if level else root.leaf).items(block)
        address, node = self._create()
        layout = root.node_index if level else root.node_leaf
        layout.fill(node, level, root.kind, items)
        return address, node, layout

    def _split(self, steps: list[Step], depth: int, key: int, value_bytes: int) -> Step:
        """Cut a full node in two; the step of the side that takes the new entry ``key``."""
        step = steps[depth]
        layout, index, count = step.layout, step.index, step.layout.count(step.block)
        level = LEVEL_KIND_COUNT.unpack_from(step.block, NODE_OFFSET)[0]
        at_end = index == count
        middle = count if at_end else layout.middle(step.block, index, value_bytes)
        items = layout.items(step.block, middle)
        separator = key if at_end else items[0][0]
        if level and items:
            items[0] = (0, items[0][1])
        address, right = self._create()
        layout.fill(right, level, self.root.kind, items)
        if not at_end:
            layout.remove(self._edit(step), middle, count)
        if at_end or index > middle:
            step = Step(address, right, layout, index - middle)
        steps[depth - 1].index += 1
        self._add(steps, depth - 1, separator, KEY.pack(address))
        return step

    # -- shrinking ---------------------------------------------------------------------------
    def _remove(self, steps: list[Step], depth: int, first: int, end: int) -> None:
        """Remove entries [first, end) of ``steps[depth]`` and mend the tree above."""
        step = steps[depth]
        layout = step.layout
        if depth and end - first == layout.count(step.block):
            at = steps[depth - 1].index
            self._dropped.append(step.address)
            self._remove(steps, depth - 1, at, at + 1)
            return
        block = self._edit(step)
        layout.remove(block, first, end)
        if first == 0 and depth < len(steps) - 1:
            KEY.pack_into(block, layout.keys_at, 0)
        if depth == 0:
            if layout.count(block) == 0:
                self.root.initialise(block)
            else:
                self._shrink()
        elif layout.used(block) * 3 < layout.length and not self._merge(steps, depth):
            self._shrink()

    def _merge(self, steps: list[Step], depth: int) -> bool:
        """Join a node with a neighbour if the two leave a quarter of one node free."""
        parent, step = steps[depth - 1], steps[depth]
        level = LEVEL_KIND_COUNT.unpack_from(step.block, NODE_OFFSET)[0]
        for at in (parent.index + 1, parent.index - 1):
            if not 0 <= at < parent.layout.count(parent.block):
                continue
            address = child_address(parent.block, parent.layout, at)
            block, _ = self.read_node(address, level)
            other = Step(address, block, step.layout, 0)
            if (
                step.layout.used(step.block) + step.layout.used(block)
            ) * 4 > step.layout.length * 3:
                continue
            left, right = (step, other) if at > parent.index else (other, step)
            border = max(at, parent.index)
            items = right.layout.items(right.block)
            if level:
                items[0] = (parent.layout.key(parent.block, border), items[0][1])
            left.layout.append(self._edit(left), items)
            self._dropped.append(right.address)
            self._remove(steps, depth - 1, border, border + 1)
            return True
        return False

    def _shrink(self) -> None:
        """Take the content of an only child back into the root while it fits well."""
        root = self.root
        while True:
            block, level, count = self.read_root()
            if level == 0 or count > 1:
                return
            address = child_address(block, root.index, 0)
            child, _ = self.read_node(address, level - 1)
            source = root.node_index if level > 1 else root.node_leaf
            target = root.index if level > 1 else root.leaf
            if source.used(child) * 4 > target.length * 3:
                return
            target.fill(self._edit_root(), level - 1, root.kind, source.items(child))
            self._dropped.append(address)

    # -- blocks ------------------------------------------------------------------------------
    def _edit(self, step: Step) -> bytearray:
        """The private copy of a step's node, which the step is made to show."""
        root = self.root
        if step.address == root.address:
            block = self._edit_root()
        else:
            block = self.tx.edit(step.address, BlockType.TREE_NODE, root.owner, root.flags)
        step.layout.require_plausible(block)
        step.block = block
        return block

    def _edit_root(self) -> bytearray:
        root = self.root
        return self.tx.edit(root.address, root.block_type, root.owner, 0)

    def _create(self) -> tuple[int, bytearray]:
        """A new node's block."""
        address = self._allocate()
        root = self.root
        return address, self.tx.create(address, BlockType.TREE_NODE, root.owner, root.flags)

    def _release_dropped(self) -> None:
        """Give back the nodes that left the tree."""
        while self._dropped:
            self._release(self._dropped.pop())

    def _require(self, key: int) -> list[Step]:
        """The path to an entry that must exist."""
        steps = self.path(key)
        leaf = steps[-1]
        layout, index = leaf.layout, leaf.index
        if index == layout.count(leaf.block) or layout.key(leaf.block, index) != key:
            raise KeyError(f"{self.root}: no key {key}")
        return steps

    def _check_value(self, value: bytes) -> None:
        if self.root.kind is NodeKind.FIXED:
            assert len(value) == FIXED_VALUE_BYTES
        elif len(value) > MAX_VALUE_BYTES:
            raise ValueError(f"a value has at most {MAX_VALUE_BYTES} bytes, not {len(value)}")
