"""Give every metadata block of a volume another volume id, in place.

Theory. Which blocks are metadata the allocation maps say, so nothing is walked, and memory does not
grow with the volume. A block keeps its version and all of its content; what changes, checksum and
volume id, lies in its first 32 bytes. No disk tears a sector of 512 bytes: whenever power is lost,
each block is as it was or as it is to be, whole, and the sweep done again does the rest.

Only a block that is valid under the former id is touched. One that is not stays as it is: where the
map says that it is in use it may be damaged, and damage must not be sealed anew; or it waits on a
reclaim list and was never written.

invariants:
- a block is read under either id, and written under the new one only;
- blocks that are not metadata in use are never changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from csvfs.format import (
    BLOCK_BYTES,
    BLOCKS_PER_UNIT,
    HEADER,
    JOURNAL_AREA,
    MAGIC,
    MAP_STATES_BYTES,
    MAP_STATES_OFFSET,
    MAPS_PER_GROUP,
    ORPHAN_AREA,
    ROOT_INODE,
    UNITS_PER_MAP,
    VERSION_LIMIT,
    VOLUME_ID_OFFSET,
    BlockType,
    Geometry,
    GroupHeader,
    UnitState,
    byte_offset,
    checksum,
    seal,
    unit_state,
    used_blocks,
    verify,
)
from csvfs.journal.block_transfer import in_parallel, read_extent, write_extent
from redirector.block.device import BlockIO, Buffer

RUN_UNITS: Final = 4
"""Neighbouring metadata units that are read, and written, in one go: 256 KiB."""
_LIST_BLOCKS: Final = JOURNAL_AREA - ORPHAN_AREA
"""Orphan and reclaim roots of all slots."""


@dataclass(frozen=True, slots=True)
class Ids:
    """The volume id that blocks have, and the one that they get."""

    former: bytes
    new: bytes


def rename_block(block: memoryview, address: int, ids: Ids) -> bool:
    """Give a block of the former id the new one, in place; False: it is none, and is left alone."""
    magic, _, _, crc, _, volume_id, found, version, _, _ = HEADER.unpack_from(block)
    if volume_id != ids.former or magic != MAGIC or found != address:
        return False
    if not 0 < version < VERSION_LIMIT or checksum(block) != crc:
        return False
    block[VOLUME_ID_OFFSET : VOLUME_ID_OFFSET + 16] = ids.new
    seal(block, version)
    return True


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring blocks, read in one go; bit i of ``used``: block i may be renamed."""

    address: int
    blocks: int
    used: int


def metadata_runs(geometry: Geometry, group: int, index: int, block: memoryview) -> Iterator[Run]:
    """The metadata units that a map block knows, neighbours together, blocks in use only."""
    first_unit = geometry.group_first_unit(group) + index * UNITS_PER_MAP
    start = units = used = 0
    for position in _metadata_positions(block):
        bits = used_blocks(block, position)
        if not bits:
            continue
        if units and (position != start + units or units == RUN_UNITS):
            yield Run((first_unit + start) * BLOCKS_PER_UNIT, units * BLOCKS_PER_UNIT, used)
            units = used = 0
        if not units:
            start = position
        used |= bits << units * BLOCKS_PER_UNIT
        units += 1
    if units:
        yield Run((first_unit + start) * BLOCKS_PER_UNIT, units * BLOCKS_PER_UNIT, used)


_WITH_METADATA: Final = re.compile(
    b"["
    + b"".join(
        re.escape(bytes([byte]))
        for byte in range(256)
        if any(byte >> shift & 3 == UnitState.METADATA for shift in (0, 2, 4, 6))
    )
    + b"]"
)
"""A byte of the states in which one of the four units is metadata: most of a map has none."""


def _metadata_positions(block: memoryview) -> Iterator[int]:
    states = bytes(block[MAP_STATES_OFFSET : MAP_STATES_OFFSET + MAP_STATES_BYTES])
    for match in _WITH_METADATA.finditer(states):
        for position in range(4 * match.start(), 4 * match.start() + 4):
            if unit_state(block, position) is UnitState.METADATA:
                yield position


class Sweep:
    """One pass over a volume. ``renamed`` counts blocks, ``done`` and ``total`` metadata units,
    those of the groups themselves included."""

    def __init__(
        self,
        device: BlockIO,
        geometry: Geometry,
        ids: Ids,
        progress: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> None:
        self._device = device
        self._geometry = geometry
        self._ids = ids
        self._progress = progress
        self.renamed = 0
        self.done = 0
        self.total = 0

    async def survey(self) -> None:
        """Read all headers and maps, so that damage there is found before anything is changed.

        Raises `BadBlock`, `BlockError`.
        """

        async def look(group: int) -> None:
            _, runs = await self._read_group(group)
            self.total += 1 + sum(run.blocks for run in runs) // BLOCKS_PER_UNIT

        self.total = 0
        # In pieces: the number of groups has no bound that memory should know of.
        for first in range(0, self._geometry.group_count, 256):
            await in_parallel(look, range(first, min(first + 256, self._geometry.group_count)))

    async def rename_root(self) -> None:
        """The root inode, and stable."""
        await self._rename(Run(ROOT_INODE, 1, 1))
        await self._device.flush()

    async def rename_rest(self) -> None:
        """Everything else that is found by its place or by the maps; not yet flushed.

        Raises `BadBlock`, `BlockError`.
        """
        await self._rename(Run(ORPHAN_AREA, _LIST_BLOCKS, (1 << _LIST_BLOCKS) - 1))
        for group in range(self._geometry.group_count):
            own, runs = await self._read_group(group)
            await in_parallel(self._rename_run, [*runs, own])

    # -- one group ---------------------------------------------------------------------------
    async def _read_group(self, group: int) -> tuple[Run, list[Run]]:
        """The group's own blocks, and where its metadata is in use. Raises `BadBlock`."""
        geometry = self._geometry
        address = geometry.group_header(group)
        block = await self._device.read(byte_offset(address), BLOCK_BYTES)
        self._check(block, address, BlockType.GROUP_HEADER, group)
        ready = GroupHeader.decode(block, address, volume_id_of(block), group).map_ready
        own = Run(address, BLOCKS_PER_UNIT, 1 | ready << 1)
        runs: list[Run] = []
        if ready:
            maps = memoryview(await read_extent(self._device, address + 1, MAPS_PER_GROUP))
            for index in range(geometry.map_count(group)):
                if ready >> index & 1:
                    map_block = maps[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
                    self._check(map_block, address + 1 + index, BlockType.GROUP_MAP, group)
                    runs += metadata_runs(geometry, group, index, map_block)
        return own, runs

    def _check(self, block: Buffer, address: int, kind: BlockType, owner: int) -> None:
        """It is what it must be, under either id."""
        is_new = volume_id_of(block) == self._ids.new
        verify(block, address, kind, self._ids.new if is_new else self._ids.former, owner)

    async def _rename_run(self, run: Run) -> None:
        await self._rename(run)
        self.done += run.blocks // BLOCKS_PER_UNIT
        self._progress(self.done, self.total)

    async def _rename(self, run: Run) -> None:
        data = memoryview(await read_extent(self._device, run.address, run.blocks))
        first = end = 0
        for index in range(run.blocks):
            block = data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
            if run.used >> index & 1 and rename_block(block, run.address + index, self._ids):
                self.renamed += 1
                first, end = (first if end else index), index + 1
        if end:
            part = data[first * BLOCK_BYTES : end * BLOCK_BYTES]
            await write_extent(self._device, run.address + first, part)


def volume_id_of(block: Buffer) -> bytes:
    """Of which volume a block says it is."""
    return bytes(block[VOLUME_ID_OFFSET : VOLUME_ID_OFFSET + 16])
