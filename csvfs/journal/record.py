"""Journal records as bytes, and where they lie in the ring. Pure.

A record is the images and revokes of one commit, under one checksum (FORMAT.md, "Journal").
**Within one record its revokes come first**: a revoke kills the images of that block in *earlier*
records; an image in the same record is of the block's next life.

The ring is a stretch of blocks. A record never wraps: where it does not fit before the end it
starts at the beginning, and a reader looks for the next sequence in both places. What it finds at
a wrong place is never taken for that record: sequences never repeat, an incarnation names who
wrote it, and the first block of an image says that it is something else.

invariants (ring):
  1. live records are in order of sequence, without gaps, and overlap nowhere
  2. the room of a record is used again only when a header that lies beyond it is stable
  3. `fits(n)` stays true while records are released, until something is appended
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple

from csvfs.journal.transaction import BlockKey
from csvfs.ondisk.block import (
    BLOCK_BYTES,
    MAGIC,
    BadBlock,
    BlockType,
    block_address,
    block_type,
    block_version,
    new_block,
    seal,
    verify,
)
from csvfs.ondisk.journal import (
    JOURNAL_HEADER_BLOCKS,
    RECORD_ENTRIES_OFFSET,
    RECORD_IMAGE,
    RECORD_REVOKE,
    ImageFlag,
    RecordHeader,
    record_header_blocks,
)

_NO_IMAGES: Final = frozenset({BlockType.JOURNAL_HEADER, BlockType.JOURNAL_RECORD})


@dataclass(frozen=True, slots=True)
class JournalPlace:
    """Which journal, and where: ``address`` is its first header, ``blocks`` counts all of it."""

    volume_id: bytes
    slot: int
    address: int
    blocks: int

    @property
    def ring_blocks(self) -> int:
        return self.blocks - JOURNAL_HEADER_BLOCKS

    def ring_address(self, position: int) -> int:
        """Block address of a position in the ring."""
        return self.address + JOURNAL_HEADER_BLOCKS + position

    def header_address(self, version: int) -> int:
        """The header block that is written with ``version``: never the one before it."""
        return self.address + version % JOURNAL_HEADER_BLOCKS


class RecordImage(NamedTuple):
    """One block in a record."""

    address: int
    fresh: bool
    data: bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Record:
    """What one commit made stable."""

    sequence: int
    incarnation: int
    images: tuple[RecordImage, ...]
    revokes: tuple[int, ...]
    blocks: int
    """Its length in the ring."""


def record_blocks(images: int, revokes: int) -> int:
    """Blocks in the ring of a record with so many images and revokes."""
    return record_header_blocks(images, revokes) + images


def encode_record(
    place: JournalPlace,
    position: int,
    incarnation: int,
    sequence: int,
    images: Sequence[RecordImage],
    revokes: Sequence[int],
) -> bytearray:
    """The record as it is written at ``position`` of the ring. Images are sealed already."""
    header = RecordHeader(place.slot, incarnation, sequence, len(images), len(revokes))
    record = new_block(
        BlockType.JOURNAL_RECORD,
        place.ring_address(position),
        place.slot,
        place.volume_id,
        size_bytes=header.total_blocks * BLOCK_BYTES,
    )
    header.pack_into(record)
    offset = RECORD_ENTRIES_OFFSET
    start = header.header_blocks * BLOCK_BYTES
    for home, fresh, data in images:
        RECORD_IMAGE.pack_into(record, offset, home, ImageFlag.FRESH if fresh else 0, 0)
        offset += RECORD_IMAGE.size
        record[start : start + BLOCK_BYTES] = data
        start += BLOCK_BYTES
    for home in revokes:
        RECORD_REVOKE.pack_into(record, offset, home)
        offset += RECORD_REVOKE.size
    assert len(record) == header.total_blocks * BLOCK_BYTES
    seal(record, sequence)
    return record


def peek_record(
    block: bytes | bytearray | memoryview,
    place: JournalPlace,
    position: int,
    incarnation: int,
    sequence: int,
) -> int | None:
    """Length in blocks of the record that begins with ``block``, None if it is another or none.

    Its checksum is not looked at: the rest of it must be read first.
    """
    address = place.ring_address(position)
    if (
        bytes(block[:4]) != MAGIC
        or block_type(block) != BlockType.JOURNAL_RECORD
        or block_address(block) != address
        or block_version(block) != sequence
    ):
        return None
    try:
        header = RecordHeader.unpack(block, address)
    except BadBlock:
        return None
    if (header.slot, header.incarnation, header.sequence) != (place.slot, incarnation, sequence):
        return None
    if position + header.total_blocks > place.ring_blocks:
        return None
    return header.total_blocks


def parse_record(
    record: bytes | bytearray | memoryview, place: JournalPlace, position: int
) -> Record:
    """The record in ``record``, exactly. Raises `BadBlock` if it is torn or not of this journal."""
    address = place.ring_address(position)
    sequence = verify(record, address, BlockType.JOURNAL_RECORD, place.volume_id, place.slot)
    header = RecordHeader.unpack(record, address)
    if header.total_blocks * BLOCK_BYTES != len(record) or header.sequence != sequence:
        raise BadBlock(address, BlockType.JOURNAL_RECORD, f"{header} in {len(record)} bytes")
    view = memoryview(record)
    offset = RECORD_ENTRIES_OFFSET
    start = header.header_blocks * BLOCK_BYTES
    images = []
    for _ in range(header.images):
        home, flags, _ = RECORD_IMAGE.unpack_from(view, offset)
        data = view[start : start + BLOCK_BYTES]
        if block_address(data) != home or block_type(data) in _NO_IMAGES:
            raise BadBlock(
                address, BlockType.JOURNAL_RECORD, f"what it holds is no image of block {home}"
            )
        images.append(RecordImage(home, bool(flags & ImageFlag.FRESH), data))
        offset += RECORD_IMAGE.size
        start += BLOCK_BYTES
    revokes = tuple(
        RECORD_REVOKE.unpack_from(view, offset + index * RECORD_REVOKE.size)[0]
        for index in range(header.revokes)
    )
    return Record(sequence, header.incarnation, tuple(images), revokes, header.total_blocks)


@dataclass(frozen=True, slots=True)
class LiveRecord:
    """A record that replay would read, as the node that wrote it remembers it."""

    sequence: int
    position: int
    blocks: int
    keys: tuple[BlockKey, ...]
    revokes: tuple[int, ...]
    owned: dict[Hashable, list[int]]
    """Its images' addresses by the lock that covers them."""


class Ring:
    """Which part of the ring is in use."""

    def __init__(self, blocks: int, next_sequence: int, position: int = 0) -> None:
        self.blocks = blocks
        self.next_sequence = next_sequence
        self.head = position
        """Where the next record goes, if it fits there."""
        self.live: deque[LiveRecord] = deque()

    def fits(self, blocks: int) -> bool:
        """Is there room for a record of so many blocks?"""
        return self._position_for(blocks) is not None

    def _position_for(self, blocks: int) -> int | None:
        if not self.live:
            if self.head + blocks <= self.blocks:
                return self.head
            return 0 if blocks <= self.blocks else None
        tail = self.live[0].position
        if self.head <= tail:
            return self.head if self.head + blocks <= tail else None
        if self.head + blocks <= self.blocks:
            return self.head
        return 0 if blocks <= tail else None

    def append(
        self,
        keys: tuple[BlockKey, ...],
        revokes: tuple[int, ...],
        owned: dict[Hashable, list[int]] | None = None,
    ) -> LiveRecord:
        """Give the next record its place and its sequence. It must fit."""
        blocks = record_blocks(len(keys), len(revokes))
        position = self._position_for(blocks)
        assert position is not None, "no room in the journal was held for this record"
        record = LiveRecord(self.next_sequence, position, blocks, keys, revokes, owned or {})
        self.live.append(record)
        self.head = position + blocks
        self.next_sequence += 1
        return record

    def release_before(self, sequence: int) -> None:
        """A header beyond these records is stable: their room is free."""
        while self.live and self.live[0].sequence < sequence:
            self.live.popleft()

    def position_of(self, sequence: int) -> int:
        """Where a live record begins; for the one to come: where a reader looks first."""
        for record in self.live:
            if record.sequence == sequence:
                return record.position
        assert sequence == self.next_sequence
        return self.head

    @property
    def used_blocks(self) -> int:
        """Blocks between tail and head, what is skipped at the end included."""
        if not self.live:
            return 0
        distance = self.head - self.live[0].position
        return distance if distance > 0 else distance + self.blocks

    def check(self) -> None:
        """Assert the invariants at the top of this module."""
        spans = sorted((record.position, record.position + record.blocks) for record in self.live)
        assert all(end <= self.blocks for _, end in spans)
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
        sequences = [record.sequence for record in self.live]
        assert sequences == list(range(self.next_sequence - len(sequences), self.next_sequence))
        assert not self.live or self.live[-1].position + self.live[-1].blocks == self.head
