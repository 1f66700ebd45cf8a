"""Replay of a journal: what a crash left undone is done, once or again, with the same result.

Theory. The records from the tail on are read for as long as sequence, incarnation and checksum
fit. In order of sequence, the revokes of a record kill the images of that block in earlier
records; then its images are taken, the last one of each block. Such an image is applied

    if its chain of live images began FRESH:    always. The block was allocated within these
        records, so what lies at its home may be what a guest wrote when it was data: a block that
        looks like metadata, with whatever version the guest liked.
    else:   if the home block is not valid (torn) or its version is lower. There the home is
        this filesystem's own, and it is newer where a checkpoint had been on its way.

Then: flush, and only then a header whose tail lies beyond. A crash anywhere in between repeats the
same; nothing is read from what replay itself changes but versions of home blocks.

`read_records` and `ReplayPlan` are pure; `replay` does the I/O. The caller has made sure that
nobody else, and nothing still on its way, writes to this journal or to what it covers.

invariants:
  1. sequences never repeat in a slot: the next record continues behind the last that was found
  2. replaying twice, or again after a crash at any write of the first time, gives the same blocks
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Final

from csvfs.journal.block_transfer import in_parallel, read_extent, write_images
from csvfs.journal.record import JournalPlace, Record, parse_record, peek_record
from csvfs.journal.store import JournalStart
from csvfs.ondisk.block import BLOCK_BYTES, BadBlock, BlockType, block_type, block_version, verify
from csvfs.ondisk.journal import JOURNAL_HEADER_BLOCKS, JournalHeader
from redirector.block.device import BlockIO, MediumError

READ_AHEAD_BLOCKS: Final = 64


class JournalDamaged(Exception):
    """The journal cannot be what a node wrote and a crash left: replaying it would guess."""


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """What replay found and did. All counts are 0 after a clean leave."""

    start: JournalStart
    """Where the journal goes on."""
    previous_incarnation: int
    records: int
    images: int
    """In all records."""
    revoked: int
    """Images that a later revoke killed."""
    superseded: int
    """Images that a later image of the same block replaced."""
    written: int
    skipped: int
    """Blocks that were home already, or newer there."""


# -- pure ----------------------------------------------------------------------------------------
@dataclass(slots=True)
class PlannedImage:
    """The image of a block to apply. ``fresh``: whatever its home holds."""

    data: bytes
    fresh: bool


@dataclass(slots=True)
class ReplayPlan:
    """The blocks to write, from the records in order of sequence."""

    blocks: dict[int, PlannedImage] = field(default_factory=dict)
    records: int = 0
    images: int = 0
    revoked: int = 0
    superseded: int = 0

    def add(self, record: Record) -> None:
        """Take the next record."""
        self.records += 1
        self.images += len(record.images)
        for address in record.revokes:
            if self.blocks.pop(address, None) is not None:
                self.revoked += 1
        for address, fresh, data in record.images:
            older = self.blocks.get(address)
            if older is not None:
                self.superseded += 1
                fresh = fresh or older.fresh
            self.blocks[address] = PlannedImage(bytes(data), fresh)

    @property
    def greatest_version(self) -> int:
        """Greatest version of any image to apply."""
        return max((block_version(image.data) for image in self.blocks.values()), default=0)


def home_is_older(home: bytes | memoryview, address: int, volume_id: bytes, version: int) -> bool:
    """Does an image with ``version`` replace what lies at ``address``?"""
    try:
        kind = BlockType(block_type(home))
        return verify(home, address, kind, volume_id) < version
    except (BadBlock, ValueError):
        return True


Span = tuple[int, int]
"""Position in the ring and number of blocks."""


def read_records(
    place: JournalPlace, header: JournalHeader, plan: ReplayPlan
) -> Generator[Span, memoryview, Span]:
    """Ask for spans of the ring, be sent their bytes, add the records; return where they end.

    Returns (position behind the last record, next sequence). Raises `JournalDamaged` if a record
    is unreadable though a later one is there: a node writes that only after the first was stable,
    so this is no crash, but a medium that lost what it had acknowledged.
    """
    position, sequence = header.tail_position, header.tail_sequence
    while True:
        found = yield from _find(place, header, position, sequence)
        if found is None:
            return position, sequence
        start, blocks = found
        record = yield start, blocks
        try:
            plan.add(parse_record(record, place, start))
        except BadBlock as error:
            if (yield from _find(place, header, start + blocks, sequence + 1)) is not None:
                raise JournalDamaged(
                    f"the journal of slot {place.slot} is damaged: {error}, but record"
                    f" {sequence + 1} after it is there. The medium lost writes that it had"
                    " acknowledged; `csvctl check --repair` shows what can be saved"
                ) from error
            return position, sequence
        position, sequence = start + blocks, sequence + 1


def _find(
    place: JournalPlace, header: JournalHeader, position: int, sequence: int
) -> Generator[Span, memoryview, Span | None]:
    """Where the record with this sequence seems to begin: at ``position``, or at the start."""
    for start in dict.fromkeys((position, 0)):
        if start < place.ring_blocks:
            first = yield start, 1
            blocks = peek_record(first, place, start, header.incarnation, sequence)
            if blocks is not None:
                return start, blocks
    return None


# -- I/O -----------------------------------------------------------------------------------------
async def read_header(device: BlockIO, place: JournalPlace) -> tuple[JournalHeader, int]:
    """The newest valid journal header and its version. Raises `BadBlock` if there is none."""
    data = await device.read(place.address * BLOCK_BYTES, JOURNAL_HEADER_BLOCKS * BLOCK_BYTES)
    newest: tuple[JournalHeader, int] | None = None
    failure: BadBlock | None = None
    for index in range(JOURNAL_HEADER_BLOCKS):
        block = memoryview(data)[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
        try:
            found = JournalHeader.decode(block, place.address + index, place.volume_id, place.slot)
        except BadBlock as error:
            failure = failure or error
            continue
        if newest is None or found[1] > newest[1]:
            newest = found
    if newest is None:
        assert failure is not None
        raise failure
    header, version = newest
    if header.tail_position > place.ring_blocks:
        raise BadBlock(
            place.header_address(version),
            BlockType.JOURNAL_HEADER,
            f"tail position {header.tail_position} lies outside the journal",
        )
    return newest


async def initialise_journal(
    device: BlockIO, place: JournalPlace, incarnation: int, *, first_sequence: int = 1
) -> JournalStart:
    """Write both headers of an empty journal: a slot's first use. Stable on return.

    A journal that is given up for lost goes on with a ``first_sequence`` that it never had.
    """
    header = JournalHeader(place.slot, incarnation, first_sequence, tail_position=0)
    versions = range(1, JOURNAL_HEADER_BLOCKS + 1)
    for version in versions:
        await _write_header(device, place, header, version)
    return JournalStart(next_sequence=first_sequence, header_version=versions[-1])


async def plan_replay(device: BlockIO, place: JournalPlace) -> ReplayPlan:
    """What `replay` would apply; writes nothing. Raises as it does."""
    header, _ = await read_header(device, place)
    plan = ReplayPlan()
    await _read_ring(device, place, read_records(place, header, plan))
    return plan


async def replay(device: BlockIO, place: JournalPlace, incarnation: int) -> ReplayReport:
    """Bring home what the journal holds and leave it empty, for ``incarnation`` to go on.

    Idempotent; a crash during it is harmless. Raises `BadBlock` if no header is valid,
    `JournalDamaged`, also if a later incarnation goes on with it already, `BlockError`.
    """
    header, version = await read_header(device, place)
    if header.incarnation > incarnation:
        raise JournalDamaged(
            f"incarnation {header.incarnation} goes on with it already: "
            f"that of {incarnation} is not to be replayed any more"
        )
    plan = ReplayPlan()
    _, sequence = await _read_ring(device, place, read_records(place, header, plan))
    older = await _older_homes(device, place.volume_id, plan)
    images = [(address, plan.blocks[address].data) for address in sorted(older)]
    if images:
        await write_images(device, images)
    # Also when nothing was written now: an earlier replay, or a checkpoint, may have been cut off
    # between its home writes and its flush, and the images must not leave the journal before that.
    if plan.records:
        await device.flush()
    empty = JournalHeader(place.slot, incarnation, tail_sequence=sequence, tail_position=0)
    if header != empty:
        version += 1
        await _write_header(device, place, empty, version)
    return ReplayReport(
        start=JournalStart(sequence, version, empty.tail_position, plan.greatest_version),
        previous_incarnation=header.incarnation,
        records=plan.records,
        images=plan.images,
        revoked=plan.revoked,
        superseded=plan.superseded,
        written=len(images),
        skipped=len(plan.blocks) - len(images),
    )


async def _write_header(
    device: BlockIO, place: JournalPlace, header: JournalHeader, version: int
) -> None:
    address = place.header_address(version)
    block = header.encode(place.volume_id, address, version)
    await device.write(address * BLOCK_BYTES, block, fua=True)


async def _read_ring(
    device: BlockIO, place: JournalPlace, reader: Generator[Span, memoryview, Span]
) -> Span:
    """Serve the spans that ``reader`` asks for, reading ahead: records lie one behind the other."""
    start, window = 0, memoryview(b"")
    try:
        position, blocks = next(reader)
        while True:
            if not start <= position <= position + blocks <= start + len(window) // BLOCK_BYTES:
                start = position
                length = min(max(blocks, READ_AHEAD_BLOCKS), place.ring_blocks - position)
                window = memoryview(await read_extent(device, place.ring_address(position), length))
            first = (position - start) * BLOCK_BYTES
            span = window[first : first + blocks * BLOCK_BYTES]
            position, blocks = reader.send(span)
    except StopIteration as end:
        result: Span = end.value
        return result


async def _older_homes(device: BlockIO, volume_id: bytes, plan: ReplayPlan) -> set[int]:
    """Which of the planned blocks are to be written."""
    older = {address for address, image in plan.blocks.items() if image.fresh}

    async def compare(address: int) -> None:
        version = block_version(plan.blocks[address].data)
        try:
            home = await device.read(address * BLOCK_BYTES, BLOCK_BYTES)
        except MediumError:
            older.add(address)  # writing it again may heal it
            return
        if home_is_older(memoryview(home), address, volume_id, version):
            older.add(address)

    await in_parallel(compare, sorted(plan.blocks.keys() - older))
    return older
