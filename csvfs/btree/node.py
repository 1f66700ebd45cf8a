"""One node of a B-tree, packed: the only code that knows where in a node its bytes stand.

A node lives in an *area* of a metadata block: the root in what its owner leaves free (3840 bytes
of an inode, 4032 of a list's root block), every other node in the 4032 bytes behind the header of
a TREE_NODE block. Offsets in the table count from the area's start; integers are little-endian.

      0  level u8       0: leaf
      1  kind u8        `NodeKind` of the whole tree, the same in index nodes
      2  count u16      entries
      4  heap u16       variable leaves: lowest byte in use of the heap; else 0
      6  garbage u16    variable leaves: bytes in the heap that belong to no entry; else 0
      8  zero u64
     16  keys           count x u64, ascending

A *fixed* leaf (16-byte values) and an index node (8-byte child addresses) reserve the keys array
for the number of entries that fit, their values follow as a second array. A *variable* leaf grows
from both ends: behind the keys stands, at 16 + 8 x count, a slot (offset u16, length u16) for each
entry, the values fill the area from its end downward.

Invariants (`NodeLayout.faults` finds what breaks them):
  - keys ascend strictly; key 0 of an index node is 0, since its first child takes whatever is
    smaller than key 1: so no key is ever rewritten because a smaller one arrived;
  - what is no entry is zero: nothing old is kept, equal histories give equal bytes;
  - variable leaves: see `csvfs.btree.heap`.

Nothing is decoded and kept: every function works on the block's own bytes.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from struct import Struct
from typing import Final

from csvfs.ondisk.block import BadBlock, BlockType, block_address, block_type
from csvfs.ondisk.inode import NODE_HEADER, NODE_HEADER_BYTES, NodeKind

if sys.byteorder != "little":
    raise ImportError("csvfs reads packed blocks in place and needs a little-endian machine")

LEVEL_KIND_COUNT: Final = Struct("<BBH")
KEY: Final = Struct("<Q")
KEY_BYTES: Final = 8
FIXED_VALUE_BYTES: Final = 16
CHILD_BYTES: Final = 8
MAX_LEVEL: Final = 8
MAX_KEY: Final = (1 << 64) - 1

_COUNT: Final = Struct("<H")

Block = bytes | bytearray
Item = tuple[int, bytes]


def bad_node(block: Block, reason: str) -> BadBlock:
    """The error for a block whose checksum is right and whose node is not."""
    return BadBlock(block_address(block), BlockType(block_type(block)), reason)


class NodeLayout(ABC):
    """How one kind of node lies in one area. Stateless; ``block`` is always the whole block."""

    __slots__ = ("first_word", "keys_at", "length", "offset")

    def __init__(self, offset: int, length: int) -> None:
        assert offset % KEY_BYTES == 0, "keys are read through a cast of the whole block"
        self.offset = offset
        self.length = length
        self.keys_at = offset + NODE_HEADER_BYTES
        self.first_word = self.keys_at // KEY_BYTES

    def count(self, block: Block) -> int:
        """Entries of the node."""
        count: int = _COUNT.unpack_from(block, self.offset + 2)[0]
        return count

    def key(self, block: Block, index: int) -> int:
        """The key of entry ``index``."""
        key: int = KEY.unpack_from(block, self.keys_at + KEY_BYTES * index)[0]
        return key

    def keys(self, block: Block) -> list[int]:
        """All keys, in the order in which they stand."""
        first = self.first_word
        return memoryview(block).cast("Q")[first : first + self.count(block)].tolist()

    def position(self, block: Block, key: int) -> int:
        """How many entries have a smaller key."""
        first = self.first_word
        end = first + self.count(block)
        return bisect_left(memoryview(block).cast("Q"), key, first, end) - first

    def initialise(self, block: bytearray, level: int, kind: NodeKind) -> None:
        """Make the area an empty node."""
        block[self.offset : self.offset + self.length] = bytes(self.length)
        NODE_HEADER.pack_into(block, self.offset, level, kind, 0, self.empty_heap, 0, 0)

    def fill(self, block: bytearray, level: int, kind: NodeKind, items: Sequence[Item]) -> None:
        """Make the area a node of exactly ``items``, which fit."""
        self.initialise(block, level, kind)
        self.append(block, items)

    @property
    @abstractmethod
    def empty_heap(self) -> int:
        """The header's ``heap`` of a node without entries."""

    @abstractmethod
    def capacity(self) -> int:
        """No node has more entries than this."""

    @abstractmethod
    def require_plausible(self, block: Block) -> None:
        """Raise `BadBlock` unless the header allows to change the node in place."""

    @abstractmethod
    def fits(self, block: Block, value_bytes: int) -> bool:
        """Whether one more entry with such a value fits."""

    @abstractmethod
    def used(self, block: Block) -> int:
        """Bytes of the area that are in use, the header not counted."""

    @abstractmethod
    def value(self, block: Block, index: int) -> bytes:
        """The value of entry ``index``. Raises `BadBlock` if it lies outside its heap."""

    @abstractmethod
    def insert(self, block: bytearray, index: int, key: int, value: bytes) -> None:
        """Add an entry, which fits, before entry ``index``."""

    @abstractmethod
    def replace(self, block: bytearray, index: int, value: bytes) -> bool:
        """Change a value; False, and nothing done, if it does not fit."""

    @abstractmethod
    def remove(self, block: bytearray, first: int, end: int) -> None:
        """Remove the entries [first, end)."""

    @abstractmethod
    def items(self, block: Block, first: int = 0) -> list[Item]:
        """The entries from ``first`` on."""

    @abstractmethod
    def append(self, block: bytearray, items: Sequence[Item]) -> None:
        """Add ``items``, which fit, behind the last entry."""

    @abstractmethod
    def middle(self, block: Block, index: int, value_bytes: int) -> int:
        """Where to cut a full node that shall take a new entry before entry ``index``.

        Entries [0, middle) stay, the others move right; the new one goes left if
        ``index <= middle``, else right, and fits there. Neither side is empty.
        """

    def faults(self, block: Block) -> Iterator[str]:
        """What breaks the invariants of a node whose header was found plausible."""
        keys = self.keys(block)
        for index in range(1, len(keys)):
            if keys[index - 1] >= keys[index]:
                yield f"keys {index - 1} and {index} are out of order"


class FlatLayout(NodeLayout):
    """Values of one width: leaves of extents and lists (16 bytes), index nodes (8 bytes)."""

    __slots__ = ("_capacity", "first_value_word", "values_at", "width")

    def __init__(self, offset: int, length: int, width: int) -> None:
        super().__init__(offset, length)
        self.width = width
        self._capacity = (length - NODE_HEADER_BYTES) // (KEY_BYTES + width)
        self.values_at = self.keys_at + KEY_BYTES * self._capacity
        self.first_value_word = self.values_at // KEY_BYTES

    @property
    def empty_heap(self) -> int:
        return 0

    def capacity(self) -> int:
        return self._capacity

    def require_plausible(self, block: Block) -> None:
        if self.count(block) > self._capacity:
            raise bad_node(block, f"{self.count(block)} entries do not fit")

    def fits(self, block: Block, value_bytes: int) -> bool:
        return value_bytes == self.width and self.count(block) < self._capacity

    def used(self, block: Block) -> int:
        return self.count(block) * (KEY_BYTES + self.width)

    def value(self, block: Block, index: int) -> bytes:
        at = self.values_at + self.width * index
        return bytes(block[at : at + self.width])

    def insert(self, block: bytearray, index: int, key: int, value: bytes) -> None:
        count = self.count(block)
        keys_at, values_at, width = self.keys_at, self.values_at, self.width
        assert len(value) == width and index <= count < self._capacity
        at, end = keys_at + KEY_BYTES * index, keys_at + KEY_BYTES * count
        block[at : end + KEY_BYTES] = KEY.pack(key) + block[at:end]
        at, end = values_at + width * index, values_at + width * count
        block[at : end + width] = value + block[at:end]
        _COUNT.pack_into(block, self.offset + 2, count + 1)

    def replace(self, block: bytearray, index: int, value: bytes) -> bool:
        assert len(value) == self.width
        at = self.values_at + self.width * index
        block[at : at + self.width] = value
        return True

    def remove(self, block: bytearray, first: int, end: int) -> None:
        count = self.count(block)
        assert first <= end <= count
        for base, width in ((self.keys_at, KEY_BYTES), (self.values_at, self.width)):
            tail = block[base + width * end : base + width * count]
            block[base + width * first : base + width * count] = tail + bytes(width * (end - first))
        _COUNT.pack_into(block, self.offset + 2, count - (end - first))

    def items(self, block: Block, first: int = 0) -> list[Item]:
        count, width = self.count(block), self.width
        at = self.values_at + width * first
        values = bytes(block[at : self.values_at + width * count])
        cut = [values[i : i + width] for i in range(0, len(values), width)]
        return list(zip(self.keys(block)[first:], cut, strict=True))

    def append(self, block: bytearray, items: Sequence[Item]) -> None:
        count = self.count(block)
        assert count + len(items) <= self._capacity
        keys = b"".join([KEY.pack(key) for key, _ in items])
        values = b"".join([value for _, value in items])
        assert len(values) == self.width * len(items)
        at = self.keys_at + KEY_BYTES * count
        block[at : at + len(keys)] = keys
        at = self.values_at + self.width * count
        block[at : at + len(values)] = values
        _COUNT.pack_into(block, self.offset + 2, count + len(items))

    def middle(self, block: Block, index: int, value_bytes: int) -> int:  # noqa: ARG002
        return self.count(block) // 2

    def faults(self, block: Block) -> Iterator[str]:
        yield from super().faults(block)
        if NODE_HEADER.unpack_from(block, self.offset)[3:] != (0, 0, 0):
            yield "reserved bytes of the node header are not zero"
