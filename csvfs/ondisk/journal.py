"""A slot's journal on disk: two header blocks, then the ring of records.

The headers are double-buffered: the valid one with the higher version wins. A record is one
logical header of one or more blocks (the common header, `RECORD_FIELDS`, then an entry an image
and an address a revoke), then the images. One checksum, in the common header, covers header
blocks *and* images, so a record is there whole or not at all. A record never wraps; its address
field says where it was written, its version field is its sequence number.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag
from struct import Struct
from typing import Final

from csvfs.ondisk.block import (
    BLOCK_BYTES,
    HEADER_BYTES,
    MAX_SLOTS,
    BadBlock,
    BlockType,
    new_block,
    seal,
    verify,
)

JOURNAL_HEADER_BLOCKS: Final = 2
JOURNAL_FIELDS: Final = Struct("<IIQQ")
"""incarnation, tail position, tail sequence, 0."""

RECORD_FIELDS: Final = Struct("<IHHQIIII")
"""incarnation, slot, header blocks, sequence, images, revokes, total blocks, 0."""
RECORD_FIELDS_OFFSET: Final = HEADER_BYTES
RECORD_ENTRIES_OFFSET: Final = 96
RECORD_IMAGE: Final = Struct("<QII")
"""home address, `ImageFlag`, 0."""
RECORD_REVOKE: Final = Struct("<Q")

assert JOURNAL_FIELDS.size == 24
assert RECORD_FIELDS_OFFSET + RECORD_FIELDS.size == RECORD_ENTRIES_OFFSET
assert RECORD_IMAGE.size == 16


class ImageFlag(IntFlag):
    FRESH = 1
    """First image since the block was allocated: what lies at home means nothing."""


def record_header_blocks(images: int, revokes: int) -> int:
    """Blocks that a record's header takes."""
    entries = images * RECORD_IMAGE.size + revokes * RECORD_REVOKE.size
    return -(-(RECORD_ENTRIES_OFFSET + entries) // BLOCK_BYTES)


@dataclass(frozen=True, slots=True)
class JournalHeader:
    """Where replay begins. Positions count blocks from the first block of the ring."""

    slot: int
    incarnation: int
    tail_sequence: int
    """Sequence of the oldest live record; if there is none, of the next one to be written."""
    tail_position: int

    def encode(self, volume_id: bytes, address: int, version: int) -> bytearray:
        """The sealed block for one of the two header places."""
        block = new_block(BlockType.JOURNAL_HEADER, address, self.slot, volume_id)
        JOURNAL_FIELDS.pack_into(
            block, HEADER_BYTES, self.incarnation, self.tail_position, self.tail_sequence, 0
        )
        seal(block, version)
        return block

    @classmethod
    def decode(
        cls, block: bytes | bytearray | memoryview, address: int, volume_id: bytes, slot: int
    ) -> tuple[JournalHeader, int]:
        """The header and its version. Raises `BadBlock`."""
        version = verify(block, address, BlockType.JOURNAL_HEADER, volume_id, slot)
        incarnation, position, sequence, _ = JOURNAL_FIELDS.unpack_from(block, HEADER_BYTES)
        return cls(slot, incarnation, sequence, position), version


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """The counts of one record; entries follow at `RECORD_ENTRIES_OFFSET`."""

    slot: int
    incarnation: int
    sequence: int
    images: int
    revokes: int

    @property
    def header_blocks(self) -> int:
        return record_header_blocks(self.images, self.revokes)

    @property
    def total_blocks(self) -> int:
        return self.header_blocks + self.images

    def pack_into(self, block: bytearray | memoryview) -> None:
        """Write the counts behind the common header."""
        RECORD_FIELDS.pack_into(
            block,
            RECORD_FIELDS_OFFSET,
            self.incarnation,
            self.slot,
            self.header_blocks,
            self.sequence,
            self.images,
            self.revokes,
            self.total_blocks,
            0,
        )

    @classmethod
    def unpack(cls, block: bytes | bytearray | memoryview, address: int) -> RecordHeader:
        """Read the counts of a first header block whose checksum may be unchecked yet.

        Raises `BadBlock` when they do not fit together; the result is then safe to size reads by.
        """
        incarnation, slot, header_blocks, sequence, images, revokes, total, _ = (
            RECORD_FIELDS.unpack_from(block, RECORD_FIELDS_OFFSET)
        )
        header = cls(slot, incarnation, sequence, images, revokes)
        if (
            slot >= MAX_SLOTS
            or header_blocks != header.header_blocks
            or total != header.total_blocks
        ):
            raise BadBlock(
                address,
                BlockType.JOURNAL_RECORD,
                f"{images} images and {revokes} revokes in {header_blocks} + {total} blocks",
            )
        return header
