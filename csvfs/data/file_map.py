"""Where the bytes of a file lie: the extent map, loaded as it is asked for, and pieces of it.

A *place* is what `csvfs.data.extent_map` keeps of a unit: its physical unit and whether it is
written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from csvfs.btree.tree import TreeRoot
from csvfs.data.device import Piece
from csvfs.data.extent_map import CHUNK_SHIFT, CHUNK_UNITS, WRITTEN, Chunk, Placed
from csvfs.data.extents import Segment, lookup
from csvfs.engine.engine import Engine
from csvfs.namespace.inode_table import FileState
from csvfs.ondisk.block import UNIT_BYTES

UNIT_SHIFT: Final = 16
UNIT_MASK: Final = UNIT_BYTES - 1

assert 1 << UNIT_SHIFT == UNIT_BYTES


async def load_chunk(engine: Engine, ino: int, file: FileState, number: int) -> Chunk:
    """Chunk ``number`` of a file whose lock is held. Raises `Damaged`, `VolumeFailed`."""
    root = TreeRoot.of_file(ino)
    first = number << CHUNK_SHIFT
    segments = await engine.look(lambda reader: lookup(reader, root, first, CHUNK_UNITS))
    return file.map.load(number, _placed(segments))


def _placed(segments: Sequence[Segment]) -> Iterator[Placed]:
    for logical, physical, count, written in segments:
        if physical is not None:
            for i in range(count):
                yield logical + i, physical + i << 1 | written >> i & WRITTEN


async def places(engine: Engine, ino: int, file: FileState, first: int, count: int) -> list[int]:
    """Places of the units [first, first + count), all as they are at one instant: the one in
    which this returns."""
    while True:
        found = file.map.places(first, count)
        if found is not None:
            return found
        for number in range(first >> CHUNK_SHIFT, (first + count - 1 >> CHUNK_SHIFT) + 1):
            if number not in file.map.chunks:
                await load_chunk(engine, ino, file, number)


def units_of(start: int, end: int) -> tuple[int, int]:
    """First unit and number of units of the bytes [start, end), which are not none."""
    first = start >> UNIT_SHIFT
    return first, (end - 1 >> UNIT_SHIFT) - first + 1


def device_offset(place: int, position: int) -> int:
    """Where the byte at ``position`` of the file lies, in the unit at ``place``."""
    return (place >> 1 << UNIT_SHIFT) + (position & UNIT_MASK)


def pieces(first: int, found: Sequence[int], start: int, data: memoryview) -> list[Piece]:
    """Bytes from ``start`` of the file on, cut where the LUN's are not contiguous.

    ``found`` are the places of the units from ``first`` on; units that are not written are left
    out.
    """
    cut: list[Piece] = []
    end = start + len(data)
    index, count = 0, len(found)
    while index < count:
        place = found[index]
        stop = index + 1
        if place & WRITTEN:
            while stop < count and found[stop] == place + (stop - index << 1):
                stop += 1
            low = max(start, first + index << UNIT_SHIFT)
            high = min(end, first + stop << UNIT_SHIFT)
            offset = (place >> 1 << UNIT_SHIFT) + low - (first + index << UNIT_SHIFT)
            cut.append(Piece(offset, data[low - start : high - start]))
        index = stop
    return cut


def runs(units: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ascending units as (first, count) of what is contiguous."""
    start = 0
    for index in range(1, len(units) + 1):
        if index == len(units) or units[index] != units[index - 1] + 1:
            yield units[start], index - start
            start = index
