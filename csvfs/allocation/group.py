"""One allocation group inside a transaction: its header's counts and its map blocks.

A `Group` lives as long as one call of the allocator. It shows the header as the transaction sees
it, and keeps the counts in the header exact with every change; the caller holds the group's lock.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import Final

from csvfs.allocation.unit_map import count_free, free_mask, metadata_mask, unused_map_mask
from csvfs.errors import Damaged
from csvfs.journal.transaction import BlockKey, BlockReader, Transaction
from csvfs.ondisk.block import BLOCKS_PER_UNIT, HEADER_BYTES, BadBlock, BlockType
from csvfs.ondisk.geometry import UNITS_PER_MAP, Geometry
from csvfs.ondisk.groups import (
    GROUP_FIELDS,
    GROUP_FIELDS_OFFSET,
    GROUP_FLAGS_OFFSET,
    GROUP_FREE_UNITS_OFFSET,
    GROUP_MAP_READY_OFFSET,
    MAP_BLOCKS_BYTES,
    MAP_BLOCKS_OFFSET,
    UnitState,
    new_map_block,
    unit_state,
)

RESERVE_UNITS: Final = 2
"""Free units of each group that only privileged transactions may take."""

_COUNTS: Final = Struct("<II")
_FLAGS: Final = Struct("<I")
_MAP_READY: Final = Struct("<H")


class Group:
    """Header and maps of group ``number``. Raises `NeedBlocks` and `BadBlock` as its reader."""

    unit_count: int
    free_units: int
    free_metadata_blocks: int
    map_ready: int

    __slots__ = (
        "first_unit",
        "free_metadata_blocks",
        "free_units",
        "geometry",
        "map_count",
        "map_ready",
        "number",
        "reader",
        "unit_count",
    )

    def __init__(self, reader: BlockReader, geometry: Geometry, number: int) -> None:
        self.reader = reader
        self.geometry = geometry
        self.number = number
        self.first_unit = geometry.group_first_unit(number)
        block = reader.read(self.header_address, BlockType.GROUP_HEADER, number)
        (
            index,
            _,
            first_unit,
            self.unit_count,
            self.free_units,
            self.free_metadata_blocks,
            self.map_ready,
            _,
        ) = GROUP_FIELDS.unpack_from(block, GROUP_FIELDS_OFFSET)
        if (
            index != number
            or first_unit != self.first_unit
            or self.unit_count != geometry.group_units(number)
            or self.free_units >= self.unit_count
        ):
            raise BadBlock(
                self.header_address,
                BlockType.GROUP_HEADER,
                f"group {index}, {self.free_units} free of {self.unit_count} units from"
                f" {first_unit}: not group {number} of this volume",
            )
        self.map_count = -(-self.unit_count // UNITS_PER_MAP)

    @property
    def header_address(self) -> int:
        """Block address of the header; the maps follow it."""
        return self.first_unit * BLOCKS_PER_UNIT

    def available(self, privileged: bool) -> int:
        """Free units for such a transaction."""
        return self.free_units if privileged else max(self.free_units - RESERVE_UNITS, 0)

    # -- maps --------------------------------------------------------------------------------
    def map_units(self, index: int) -> int:
        """How many units map block ``index`` covers."""
        return min(UNITS_PER_MAP, self.unit_count - index * UNITS_PER_MAP)

    def is_ready(self, index: int) -> bool:
        """False: the map was never written, every unit that it covers is free."""
        return bool(self.map_ready >> index & 1)

    def read_map(self, index: int) -> bytes | bytearray:
        """A map block that is ready."""
        return self.reader.read(self.header_address + 1 + index, BlockType.GROUP_MAP, self.number)

    def require_maps(self) -> None:
        """Ask for all map blocks at once."""
        self.reader.require(
            BlockKey(self.header_address + 1 + index, BlockType.GROUP_MAP, self.number)
            for index in range(self.map_count)
            if self.is_ready(index)
        )

    def free_mask(self, index: int) -> int:
        """Bit 2u is set if unit u of the map is free."""
        if self.is_ready(index):
            return free_mask(self.read_map(index))
        return unused_map_mask(self.map_units(index), first_of_group=index == 0)

    # -- changing ----------------------------------------------------------------------------
    def edit_map(self, tx: Transaction, index: int) -> bytearray:
        """A map block to be changed; one that was never written begins to exist."""
        address = self.header_address + 1 + index
        if self.is_ready(index):
            return tx.edit(address, BlockType.GROUP_MAP, self.number)
        block = tx.create(address, BlockType.GROUP_MAP, self.number)
        fresh = new_map_block(bytes(16), self.number, address, index, self.unit_count)
        block[HEADER_BYTES:] = fresh[HEADER_BYTES:]
        self.map_ready |= 1 << index
        header = tx.edit(self.header_address, BlockType.GROUP_HEADER, self.number)
        _MAP_READY.pack_into(header, GROUP_MAP_READY_OFFSET, self.map_ready)
        _FLAGS.pack_into(header, GROUP_FLAGS_OFFSET, 0)
        return block

    def add(self, tx: Transaction, *, units: int = 0, blocks: int = 0) -> None:
        """Change the counts of free units and of free blocks in metadata units."""
        free_units = self.free_units + units
        free_blocks = self.free_metadata_blocks + blocks
        if not 0 <= free_units < self.unit_count or free_blocks < 0:
            raise Damaged(
                f"group {self.number}: the header says {self.free_units} free units and"
                f" {self.free_metadata_blocks} free metadata blocks, its maps say otherwise"
            )
        self.free_units, self.free_metadata_blocks = free_units, free_blocks
        header = tx.edit(self.header_address, BlockType.GROUP_HEADER, self.number)
        _COUNTS.pack_into(header, GROUP_FREE_UNITS_OFFSET, free_units, free_blocks)

    # -- proving -----------------------------------------------------------------------------
    def faults(self) -> Iterator[str]:
        """What breaks the invariants of `csvfs.allocation.allocator` in this group."""
        name = f"group {self.number}"
        free_units = free_blocks = 0
        if self.map_ready >> self.map_count:
            yield f"{name}: map_ready {self.map_ready:#x}, but it has {self.map_count} maps"
            return
        for index in range(self.map_count):
            free_units += count_free(self.free_mask(index))
            if not self.is_ready(index):
                continue
            block = self.read_map(index)
            metadata = metadata_mask(block)
            used = memoryview(block)[MAP_BLOCKS_OFFSET:].cast("H").tolist()
            assert len(used) * 2 == MAP_BLOCKS_BYTES
            for position, bits in enumerate(used):
                is_metadata = bool(metadata >> 2 * position & 1)
                unit = self.first_unit + index * UNITS_PER_MAP + position
                if is_metadata and not bits:
                    yield f"{name}: unit {unit} is metadata, and no block of it is in use"
                elif bits and not is_metadata:
                    yield f"{name}: unit {unit} is no metadata, and has blocks in use: {bits:#06x}"
                if is_metadata:
                    free_blocks += BLOCKS_PER_UNIT - bits.bit_count()
            beyond = range(self.map_units(index), UNITS_PER_MAP)
            for position in (*([0] if index == 0 else []), *beyond):
                if unit_state(block, position) is not UnitState.RESERVED:
                    yield f"{name}: unit {position} of map {index} is not reserved"
        if free_units != self.free_units:
            yield f"{name}: the header says {self.free_units} free units, the maps {free_units}"
        if free_blocks != self.free_metadata_blocks:
            yield (
                f"{name}: the header says {self.free_metadata_blocks} free metadata blocks,"
                f" the maps {free_blocks}"
            )


assert GROUP_FREE_UNITS_OFFSET + _COUNTS.size == GROUP_MAP_READY_OFFSET
assert MAP_BLOCKS_OFFSET % 2 == 0
