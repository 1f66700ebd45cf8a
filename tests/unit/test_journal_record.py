"""Records as bytes, and their places in the ring."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csvfs.format import BLOCK_BYTES, BadBlock, BlockType, new_block, seal
from csvfs.journal.record import (
    JournalPlace,
    RecordImage,
    Ring,
    encode_record,
    parse_record,
    peek_record,
    record_blocks,
)
from csvfs.journal.transaction import BlockKey
from tests.small_store import KIND, PLACE, VOLUME_ID, sealed


def a_record(images: int = 3, revokes: int = 2, position: int = 10) -> bytearray:
    return encode_record(
        PLACE,
        position,
        incarnation=4,
        sequence=77,
        images=[RecordImage(600 + i, i == 1, sealed(600 + i, i)) for i in range(images)],
        revokes=[900 + i for i in range(revokes)],
    )


@pytest.mark.parametrize(("images", "revokes"), [(1, 0), (0, 1), (3, 2), (300, 0), (250, 600)])
def test_a_record_is_read_back(images: int, revokes: int) -> None:
    data = a_record(images, revokes, 2)
    assert len(data) == record_blocks(images, revokes) * BLOCK_BYTES
    large = JournalPlace(VOLUME_ID, 0, PLACE.address, 1024)
    assert peek_record(data[:BLOCK_BYTES], large, 2, 4, 77) == len(data) // BLOCK_BYTES
    record = parse_record(data, large, 2)
    assert (record.sequence, record.incarnation) == (77, 4)
    assert record.revokes == tuple(range(900, 900 + revokes))
    assert [image.address for image in record.images] == list(range(600, 600 + images))
    assert [image.address for image in record.images if image.fresh] == [601][: images - 1]
    assert all(bytes(i.data) == sealed(i.address, i.address - 600) for i in record.images)


def test_a_torn_record_is_refused_wherever_it_tears() -> None:
    data = a_record()
    for sector in range(0, len(data), 512):
        torn = bytearray(data)
        torn[sector : sector + 512] = Random(sector).randbytes(512)
        with pytest.raises(BadBlock):
            parse_record(torn, PLACE, 10)


@pytest.mark.parametrize(
    ("position", "incarnation", "sequence"), [(11, 4, 77), (10, 3, 77), (10, 5, 77), (10, 4, 78)]
)
def test_another_record_is_not_taken_for_it(position: int, incarnation: int, sequence: int) -> None:
    first = a_record()[:BLOCK_BYTES]
    assert peek_record(first, PLACE, 10, 4, 77) == 4
    assert peek_record(first, PLACE, position, incarnation, sequence) is None


def test_a_record_of_another_slot_or_volume_is_not_taken_for_it() -> None:
    data = a_record()
    other_slot = JournalPlace(VOLUME_ID, 1, PLACE.address, PLACE.blocks)
    assert peek_record(data[:BLOCK_BYTES], other_slot, 10, 4, 77) is None
    other_volume = JournalPlace(b"another volume!!", 0, PLACE.address, PLACE.blocks)
    with pytest.raises(BadBlock, match="belongs to volume"):
        parse_record(data, other_volume, 10)


def test_a_record_that_would_leave_the_ring_is_none() -> None:
    data = a_record(position=PLACE.ring_blocks - 3)
    assert peek_record(data[:BLOCK_BYTES], PLACE, PLACE.ring_blocks - 3, 4, 77) is None
    assert peek_record(bytes(BLOCK_BYTES), PLACE, 0, 4, 77) is None


def test_an_image_that_is_none_of_its_block_is_refused() -> None:
    for wrong in (sealed(601, 0), _journal_header(600)):
        data = encode_record(PLACE, 0, 1, 1, [RecordImage(600, False, wrong)], [])
        with pytest.raises(BadBlock, match="no image of block 600"):
            parse_record(data, PLACE, 0)


def _journal_header(address: int) -> bytearray:
    block = new_block(BlockType.JOURNAL_HEADER, address, 0, VOLUME_ID)
    seal(block, 1)
    return block


# -- the ring --------------------------------------------------------------------------------------
def keys(count: int) -> tuple[BlockKey, ...]:
    return tuple(BlockKey(600 + i, KIND, 0) for i in range(count))


def test_a_record_never_wraps() -> None:
    ring = Ring(20, next_sequence=5, position=0)
    assert [ring.append(keys(5), ()).position for _ in range(3)] == [0, 6, 12]
    assert not ring.fits(3)
    ring.release_before(6)
    assert ring.fits(6) and not ring.fits(7)
    assert ring.append(keys(4), ()).position == 0
    assert ring.used_blocks == 19
    ring.check()


def test_an_empty_ring_takes_any_record() -> None:
    ring = Ring(20, next_sequence=5, position=15)
    assert ring.fits(20) and not ring.fits(21)
    assert ring.append(keys(19), ()).position == 0
    assert not ring.fits(1)
    ring.check()


@settings(max_examples=200, deadline=None)
@given(
    st.integers(8, 60),
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 6)), max_size=60),
)
def test_live_records_never_overlap_and_a_reader_finds_them(
    blocks: int, steps: list[tuple[int, int]]
) -> None:
    """Whatever was appended and released, a reader that looks behind the last record, or at the
    start of the ring, finds every live record in order, and nothing else."""
    ring = Ring(blocks, next_sequence=1)
    on_disk: dict[int, int] = {}
    tail = (1, 0)
    for images, released in steps:
        need = record_blocks(images, 0)
        if ring.fits(need):
            record = ring.append(keys(images), ())
            for block in range(record.position, record.position + record.blocks):
                on_disk[block] = 0
            on_disk[record.position] = record.sequence
        else:
            fitted = {n for n in range(1, blocks + 1) if ring.fits(n)}
            sequence = min(ring.next_sequence - len(ring.live) + released, ring.next_sequence)
            tail = (sequence, ring.position_of(sequence))
            ring.release_before(sequence)
            assert all(ring.fits(n) for n in fitted)
        ring.check()
        found = []
        sequence, position = tail
        while True:
            start = next((p for p in (position, 0) if on_disk.get(p) == sequence), None)
            if start is None:
                break
            live = next(r for r in ring.live if r.sequence == sequence)
            found.append(live)
            sequence, position = sequence + 1, start + live.blocks
        assert found == list(ring.live)
