"""Allocation groups on disk: the group header and the map blocks.

A group's unit 0 holds its own metadata: block 0 the header, blocks 1..15 the maps. Map block i
covers units [1792 i, 1792 (i+1)) of the group: two bits a unit, and for each *metadata* unit 16
bits that say which of its blocks are in use. A group whose header says UNINIT, and any map whose
bit in ``map_ready`` is clear, was never written: all its units are free, but the group's unit 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from struct import Struct
from typing import Final

from csvfs.ondisk.block import (
    BLOCK_BYTES,
    HEADER_BYTES,
    BadBlock,
    BlockType,
    new_block,
    seal,
    verify,
)
from csvfs.ondisk.geometry import GROUP_UNITS, MAPS_PER_GROUP, UNITS_PER_MAP

GROUP_FIELDS: Final = Struct("<IIQIIIHH")
"""index, flags, first unit, unit count, free units, free metadata blocks, map_ready, 0."""
GROUP_FIELDS_OFFSET: Final = HEADER_BYTES
GROUP_FLAGS_OFFSET: Final = 68
GROUP_FREE_UNITS_OFFSET: Final = 84
GROUP_FREE_METADATA_BLOCKS_OFFSET: Final = 88
GROUP_MAP_READY_OFFSET: Final = 92
GROUP_ROOT_OFFSET: Final = 256
"""Root area of the tree of ranges shared by clones; zeroes while nothing is shared."""
GROUP_ROOT_BYTES: Final = BLOCK_BYTES - GROUP_ROOT_OFFSET

MAP_STATES_OFFSET: Final = HEADER_BYTES
MAP_STATES_BYTES: Final = UNITS_PER_MAP // 4
MAP_BLOCKS_OFFSET: Final = MAP_STATES_OFFSET + MAP_STATES_BYTES
MAP_BLOCKS_BYTES: Final = UNITS_PER_MAP * 2

assert GROUP_FIELDS.size == 32
assert GROUP_FREE_UNITS_OFFSET == GROUP_FIELDS_OFFSET + 20
assert GROUP_MAP_READY_OFFSET == GROUP_FIELDS_OFFSET + 28
assert MAP_STATES_BYTES == 448
assert MAP_BLOCKS_OFFSET + MAP_BLOCKS_BYTES == BLOCK_BYTES


class UnitState(IntEnum):
    """Two bits a unit; unit u of a map has bits 2*(u%4) of byte u//4."""

    FREE = 0
    DATA = 1
    METADATA = 2
    RESERVED = 3
    """The group's own unit 0, and units behind the end of a short group."""


class GroupFlag(IntFlag):
    NONE = 0
    UNINIT = 1
    """No map block of the group was ever written."""


@dataclass(frozen=True, slots=True)
class GroupHeader:
    """Header of allocation group ``index``; ``owner`` of the block is that index too."""

    index: int
    first_unit: int
    unit_count: int
    free_units: int
    free_metadata_blocks: int = 0
    """Free blocks inside units that are metadata already."""
    map_ready: int = 0
    """Bit i: map block i exists on disk."""
    flags: GroupFlag = GroupFlag.UNINIT

    @classmethod
    def fresh(cls, index: int, first_unit: int, unit_count: int) -> GroupHeader:
        """As format writes it: everything free but the group's own unit."""
        return cls(index, first_unit, unit_count, unit_count - 1)

    @property
    def address(self) -> int:
        return self.first_unit * 16

    def encode(self, volume_id: bytes, version: int) -> bytearray:
        """The sealed block, with an empty shared-range tree."""
        block = new_block(BlockType.GROUP_HEADER, self.address, self.index, volume_id)
        self.pack_into(block)
        seal(block, version)
        return block

    def pack_into(self, block: bytearray) -> None:
        """Replace the fields of a header block; the root area stays."""
        GROUP_FIELDS.pack_into(
            block,
            GROUP_FIELDS_OFFSET,
            self.index,
            self.flags,
            self.first_unit,
            self.unit_count,
            self.free_units,
            self.free_metadata_blocks,
            self.map_ready,
            0,
        )

    @classmethod
    def unpack(cls, block: bytes | bytearray | memoryview) -> GroupHeader:
        """Fields of a block that was verified."""
        index, flags, first, count, free, free_blocks, ready, _ = GROUP_FIELDS.unpack_from(
            block, GROUP_FIELDS_OFFSET
        )
        return cls(index, first, count, free, free_blocks, ready, GroupFlag(flags))

    @classmethod
    def decode(
        cls, block: bytes | bytearray | memoryview, address: int, volume_id: bytes, index: int
    ) -> GroupHeader:
        """Verify and read a group header. Raises `BadBlock`."""
        verify(block, address, BlockType.GROUP_HEADER, volume_id, index)
        header = cls.unpack(block)
        kind = BlockType.GROUP_HEADER
        if header.index != index or header.address != address:
            raise BadBlock(address, kind, f"it says it is of group {header.index}, not {index}")
        if not header.free_units < header.unit_count <= GROUP_UNITS:
            raise BadBlock(
                address,
                kind,
                f"{header.free_units} free units of {header.unit_count}",
            )
        if header.map_ready >> MAPS_PER_GROUP or bool(header.map_ready) == bool(
            header.flags & GroupFlag.UNINIT
        ):
            raise BadBlock(
                address, kind, f"map_ready {header.map_ready:#x}, flags {header.flags:#x}"
            )
        return header


def unit_state(block: bytes | bytearray | memoryview, position: int) -> UnitState:
    """State of the unit at ``position`` of a map block."""
    return UnitState(block[MAP_STATES_OFFSET + position // 4] >> 2 * (position % 4) & 3)


def set_unit_state(block: bytearray, position: int, state: UnitState) -> None:
    """Set two bits of a map block."""
    at, shift = MAP_STATES_OFFSET + position // 4, 2 * (position % 4)
    block[at] = block[at] & ~(3 << shift) | state << shift


_U16: Final = Struct("<H")


def used_blocks(block: bytes | bytearray | memoryview, position: int) -> int:
    """Bit i: block i of the metadata unit at ``position`` is in use."""
    return int(_U16.unpack_from(block, MAP_BLOCKS_OFFSET + 2 * position)[0])


def set_used_blocks(block: bytearray, position: int, bits: int) -> None:
    """Set the 16-bit block map of a metadata unit."""
    _U16.pack_into(block, MAP_BLOCKS_OFFSET + 2 * position, bits)


def new_map_block(volume_id: bytes, group: int, address: int, index: int, units: int) -> bytearray:
    """A map block of a group of ``units`` units with everything free, unsealed.

    The group's own unit 0 and units behind the end of a short group are RESERVED.
    """
    block = new_block(BlockType.GROUP_MAP, address, group, volume_id)
    if index == 0:
        set_unit_state(block, 0, UnitState.RESERVED)
    for position in range(max(0, units - index * UNITS_PER_MAP), UNITS_PER_MAP):
        set_unit_state(block, position, UnitState.RESERVED)
    return block
