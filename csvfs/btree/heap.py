"""Leaves with values of any length: the nodes of directories.

The area is used from both ends. Behind the keys stands, at 16 + 8 x count, a slot (offset u16,
length u16) for each entry, offsets counted from the area's start; the values fill the area from
its end downward. A removed value leaves a gap, counted as garbage; when the free bytes between
slots and heap are too few for a new entry, the heap is compacted.

Invariants (`HeapLayout.faults` finds what breaks them): the values lie within [heap, end of
area) and do not overlap, and their lengths plus ``garbage`` make up exactly that range. An empty
value's offset is the end of the area.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from struct import Struct
from typing import Final

from csvfs.btree.node import KEY, KEY_BYTES, Block, Item, NodeLayout, bad_node
from csvfs.ondisk.block import BadBlock
from csvfs.ondisk.inode import NODE_HEADER_BYTES

MAX_VALUE_BYTES: Final = 512
"""Of one value: so that either half of a full leaf can take one more."""

_COUNT_HEAP_GARBAGE: Final = Struct("<HHH")
_SLOT: Final = Struct("<HH")
_SLOT_BYTES: Final = 4
_ENTRY_BYTES: Final = KEY_BYTES + _SLOT_BYTES


class HeapLayout(NodeLayout):
    """Leaves with values of any length up to `MAX_VALUE_BYTES`: directories."""

    __slots__ = ()

    @property
    def empty_heap(self) -> int:
        return self.length

    def capacity(self) -> int:
        return (self.length - NODE_HEADER_BYTES) // _ENTRY_BYTES

    def _header(self, block: Block) -> tuple[int, int, int]:
        count, heap, garbage = _COUNT_HEAP_GARBAGE.unpack_from(block, self.offset + 2)
        return count, heap, garbage

    def require_plausible(self, block: Block) -> None:
        count, heap, garbage = self._header(block)
        if not NODE_HEADER_BYTES + _ENTRY_BYTES * count <= heap <= self.length - garbage:
            raise bad_node(block, f"{count} entries do not fit below a heap that begins at {heap}")

    def _slot(self, block: Block, count: int, index: int) -> tuple[int, int]:
        """Offset in the block and length of a value."""
        start, length = _SLOT.unpack_from(
            block, self.keys_at + KEY_BYTES * count + _SLOT_BYTES * index
        )
        if (
            start < NODE_HEADER_BYTES + _ENTRY_BYTES * count
            or start + length > self.length
            or length > MAX_VALUE_BYTES
        ):
            raise bad_node(block, f"value {index} lies outside the heap")
        return self.offset + start, length

    def fits(self, block: Block, value_bytes: int) -> bool:
        assert value_bytes <= MAX_VALUE_BYTES
        count, heap, garbage = self._header(block)
        arrays = NODE_HEADER_BYTES + _ENTRY_BYTES * (count + 1)
        return arrays + value_bytes <= heap + garbage

    def used(self, block: Block) -> int:
        count, heap, garbage = self._header(block)
        return _ENTRY_BYTES * count + self.length - heap - garbage

    def value(self, block: Block, index: int) -> bytes:
        start, length = self._slot(block, self.count(block), index)
        return bytes(block[start : start + length])

    def _compact(self, block: bytearray) -> int:
        """Close the gaps of the heap; its new lowest byte."""
        count = self.count(block)
        values, slots, heap = [], [], self.length
        for index in range(count):
            start, length = self._slot(block, count, index)
            heap -= length
            slots.append(_SLOT.pack(heap if length else self.length, length))
            values.append(block[start : start + length])
        values.reverse()
        at = self.keys_at + KEY_BYTES * count
        arrays = b"".join(slots)
        gap_bytes = self.offset + heap - at - len(arrays)
        if gap_bytes < 0:
            raise bad_node(block, "its values are longer than its heap")
        gap = bytes(gap_bytes)
        block[at : self.offset + self.length] = arrays + gap + b"".join(values)
        _COUNT_HEAP_GARBAGE.pack_into(block, self.offset + 2, count, heap, 0)
        return heap

    def insert(self, block: bytearray, index: int, key: int, value: bytes) -> None:
        count, heap, garbage = self._header(block)
        heap -= len(value)
        if heap < NODE_HEADER_BYTES + _ENTRY_BYTES * (count + 1):
            heap, garbage = self._compact(block) - len(value), 0
        assert heap >= NODE_HEADER_BYTES + _ENTRY_BYTES * (count + 1)
        at = self.offset + heap
        block[at : at + len(value)] = value
        start = heap if value else self.length
        # From the new key on: the later keys and the earlier slots move together by one key,
        # the later slots by one slot more.
        at = self.keys_at + KEY_BYTES * index
        slot_at = self.keys_at + KEY_BYTES * count + _SLOT_BYTES * index
        end = self.keys_at + _ENTRY_BYTES * count
        block[at : end + _ENTRY_BYTES] = b"".join(
            (KEY.pack(key), block[at:slot_at], _SLOT.pack(start, len(value)), block[slot_at:end])
        )
        _COUNT_HEAP_GARBAGE.pack_into(block, self.offset + 2, count + 1, heap, garbage)

    def replace(self, block: bytearray, index: int, value: bytes) -> bool:
        count, heap, garbage = self._header(block)
        start, length = self._slot(block, count, index)
        if length == len(value):
            block[start : start + length] = value
            return True
        arrays = NODE_HEADER_BYTES + _ENTRY_BYTES * count
        if arrays + len(value) > heap + garbage + length:
            return False
        key = self.key(block, index)
        self.remove(block, index, index + 1)
        self.insert(block, index, key, value)
        return True

    def remove(self, block: bytearray, first: int, end: int) -> None:
        count, heap, garbage = self._header(block)
        removed = end - first
        for index in range(first, end):
            start, length = self._slot(block, count, index)
            block[start : start + length] = bytes(length)
            if start == self.offset + heap:
                heap += length
            else:
                garbage += length
        keys_at, slots_at = self.keys_at, self.keys_at + KEY_BYTES * count
        at = keys_at + KEY_BYTES * first
        stop = keys_at + _ENTRY_BYTES * count
        block[at:stop] = b"".join(
            (
                block[keys_at + KEY_BYTES * end : slots_at + _SLOT_BYTES * first],
                block[slots_at + _SLOT_BYTES * end : stop],
                bytes(_ENTRY_BYTES * removed),
            )
        )
        count -= removed
        if count == 0:
            heap, garbage = self.length, 0
        _COUNT_HEAP_GARBAGE.pack_into(block, self.offset + 2, count, heap, garbage)

    def items(self, block: Block, first: int = 0) -> list[Item]:
        return [
            (key, self.value(block, index))
            for index, key in enumerate(self.keys(block)[first:], first)
        ]

    def append(self, block: bytearray, items: Sequence[Item]) -> None:
        for key, value in items:
            self.insert(block, self.count(block), key, value)

    def middle(self, block: Block, index: int, value_bytes: int) -> int:
        count = self.count(block)
        sizes = [self._slot(block, count, i)[1] + _ENTRY_BYTES for i in range(count)]
        new_bytes = value_bytes + _ENTRY_BYTES
        half = (sum(sizes) + new_bytes) // 2
        left = 0
        for at, size in enumerate(sizes):
            if at == index:
                left += new_bytes
            if left + size > half:
                return at
            left += size
        raise AssertionError("half of a node is less than all of it")

    def faults(self, block: Block) -> Iterator[str]:
        yield from super().faults(block)
        count, heap, garbage = self._header(block)
        try:
            self.require_plausible(block)
        except BadBlock as fault:
            yield fault.reason
            return
        spans = []
        for index in range(count):
            try:
                start, length = self._slot(block, count, index)
            except BadBlock as fault:
                yield fault.reason
                return
            spans.append((start - self.offset, length))
        spans.sort()
        for (start, length), (following, _) in pairwise(spans):
            if start + length > following:
                yield f"values at {start} and {following} overlap"
        if spans and spans[0][0] < heap:
            yield f"a value at {spans[0][0]} lies below the heap"
        if sum(length for _, length in spans) + garbage != self.length - heap:
            yield "lengths of the values and the garbage do not add up to the heap"
