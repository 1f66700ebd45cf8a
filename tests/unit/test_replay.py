"""What replay believes, what it writes, and where it stops."""

from __future__ import annotations

import pytest

from csvfs.format import BLOCK_BYTES, VERSION_LIMIT, BadBlock, JournalHeader
from csvfs.journal.record import Record, RecordImage, encode_record
from csvfs.journal.replay import (
    JournalDamaged,
    ReplayPlan,
    ReplayReport,
    initialise_journal,
    read_header,
    replay,
)
from redirector.block.medium import Blocks
from redirector.block.simulated import SimulatedLun
from tests.small_store import (
    FIRST,
    LUN_BYTES,
    PLACE,
    PORT,
    creating,
    editing,
    home_tag,
    sealed,
    small_store,
    tag_of,
)

A, B, C = FIRST, FIRST + 1, FIRST + 2


def record(sequence: int, *images: RecordImage, revokes: tuple[int, ...] = ()) -> Record:
    return Record(sequence, 1, images, revokes, 1)


def image(address: int, tag: int, *, fresh: bool = False, version: int = 5) -> RecordImage:
    return RecordImage(address, fresh, sealed(address, tag, version))


def planned(*records: Record) -> dict[int, tuple[int, bool]]:
    plan = ReplayPlan()
    for each in records:
        plan.add(each)
    return {a: (tag_of(p.data), p.fresh) for a, p in plan.blocks.items()}


# -- the plan --------------------------------------------------------------------------------------
def test_the_last_image_wins() -> None:
    assert planned(record(1, image(A, 1), image(B, 2)), record(2, image(A, 3))) == {
        A: (3, False),
        B: (2, False),
    }


def test_a_revoke_kills_earlier_images_only() -> None:
    assert planned(record(1, image(A, 1)), record(2, revokes=(A,))) == {}
    assert planned(
        record(1, image(A, 1, fresh=True)), record(2, revokes=(A,)), record(3, image(A, 2))
    ) == {A: (2, False)}


def test_an_image_lives_beside_a_revoke_in_its_own_record() -> None:
    assert planned(record(1, image(A, 1)), record(2, image(A, 2), revokes=(A,))) == {A: (2, False)}


def test_fresh_stays_fresh_until_revoked() -> None:
    chain = record(1, image(A, 1, fresh=True)), record(2, image(A, 2))
    assert planned(*chain) == {A: (2, True)}
    assert planned(record(1, image(A, 1)), record(2, image(A, 2, fresh=True))) == {A: (2, True)}


# -- against the home blocks -----------------------------------------------------------------------
def journal_with(*records: tuple[list[RecordImage], list[int]], position: int = 0) -> Blocks:
    """The ring's blocks, as incarnation 1 wrote the records one behind the other from ``position``
    on, or at the start of the ring where they do not fit."""
    blocks: Blocks = {}
    for sequence, (images, revokes) in enumerate(records, 1):
        data = encode_record(PLACE, position, 1, sequence, images, revokes)
        count = len(data) // BLOCK_BYTES
        if position + count > PLACE.ring_blocks:
            position = 0
            data = encode_record(PLACE, position, 1, sequence, images, revokes)
        for index in range(count):
            part = data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
            blocks[PLACE.ring_address(position + index)] = bytes(part)
        position += count
    return blocks


async def replayed(lun: SimulatedLun, incarnation: int = 2) -> ReplayReport:
    device = await lun.login(PORT)
    return await replay(device, PLACE, incarnation)


async def lun_with(journal: Blocks, homes: Blocks | None = None) -> SimulatedLun:
    lun = SimulatedLun(LUN_BYTES, record=True, blocks=dict(homes or {}))
    await initialise_journal(await lun.login(PORT), PLACE, 1)
    lun.blocks.update(journal)
    return lun


async def test_older_torn_and_absent_homes_are_written() -> None:
    torn = bytearray(sealed(B, 9, 2))
    torn[2048:2560] = bytes(512)
    lun = await lun_with(
        journal_with(([image(A, 1), image(B, 2), image(C, 3)], [])),
        {A: sealed(A, 9, 4), B: bytes(torn)},
    )
    report = await replayed(lun)
    assert [home_tag(lun, a) for a in (A, B, C)] == [1, 2, 3]
    assert (report.records, report.images, report.written, report.skipped) == (1, 3, 3, 0)
    assert report.start.greatest_version == 5


@pytest.mark.parametrize("version", [5, 6, 1000])
async def test_a_home_that_is_as_new_is_left_alone(version: int) -> None:
    lun = await lun_with(journal_with(([image(A, 1)], [])), {A: sealed(A, 9, version)})
    report = await replayed(lun)
    assert home_tag(lun, A) == 9
    assert (report.written, report.skipped) == (0, 1)


async def test_a_forged_block_is_never_believed() -> None:
    """A guest wrote what looks like the newest metadata; then the unit became metadata."""
    forged = sealed(A, 666, VERSION_LIMIT - 1)
    lun = await lun_with(
        journal_with(([image(A, 1, fresh=True, version=3)], []), ([image(A, 2, version=4)], [])),
        {A: forged},
    )
    await replayed(lun)
    assert home_tag(lun, A) == 2


async def test_a_revoked_block_is_not_touched() -> None:
    lun = await lun_with(
        journal_with(([image(A, 1), image(B, 2)], []), ([], [A])), {A: b"guest" * 819 + b"!"}
    )
    report = await replayed(lun)
    assert lun.blocks[A] == b"guest" * 819 + b"!"
    assert home_tag(lun, B) == 2
    assert (report.revoked, report.written) == (1, 1)


async def test_a_home_that_cannot_be_read_is_written() -> None:
    lun = await lun_with(journal_with(([image(A, 1)], [])))
    lun.medium_errors.append(range(A * BLOCK_BYTES, B * BLOCK_BYTES))
    await replayed(lun)
    assert home_tag(lun, A) == 1


# -- where the records are -------------------------------------------------------------------------
async def test_records_are_followed_to_the_start_of_the_ring() -> None:
    images = [image(FIRST + i, i) for i in range(100)]
    more = [image(FIRST + i, 1000 + i) for i in range(90)]
    last = [image(FIRST + 99, 7)]
    lun = await lun_with(journal_with((images, []), (images, []), (more, []), (last, [])))
    tail = JournalHeader(PLACE.slot, 1, tail_sequence=2, tail_position=101)
    address = PLACE.header_address(3)
    lun.blocks[address] = bytes(tail.encode(PLACE.volume_id, address, 3))
    report = await replayed(lun)
    assert (report.records, report.superseded) == (3, 90 + 1)
    assert home_tag(lun, FIRST) == 1000 and home_tag(lun, FIRST + 99) == 7


async def test_a_torn_last_record_is_not_there() -> None:
    journal = journal_with(([image(A, 1)], []), ([image(A, 2), image(B, 2)], []))
    journal[max(journal)] = bytes(BLOCK_BYTES)
    lun = await lun_with(journal)
    report = await replayed(lun)
    assert (home_tag(lun, A), home_tag(lun, B)) == (1, None)
    assert report.start.next_sequence == 2


async def test_a_damaged_record_before_a_good_one_is_an_error() -> None:
    journal = journal_with(([image(A, 1)], []), ([image(A, 2)], []), ([image(A, 3)], []))
    journal[PLACE.ring_address(3)] = bytes(BLOCK_BYTES)
    lun = await lun_with(journal)
    with pytest.raises(JournalDamaged, match="record 3 after it is there"):
        await replayed(lun)
    assert home_tag(lun, A) is None


async def test_records_of_another_incarnation_are_not_read() -> None:
    lun = SimulatedLun(LUN_BYTES)
    async with small_store(lun) as store:
        await store.transact(creating((A, 1)))
        await store.checkpoint()
        await store.transact(editing((A, 2)))
        await store.commit()
        unclean = dict(lun.blocks)
    lun = SimulatedLun(LUN_BYTES, blocks=unclean)
    first = await replayed(lun, 2)
    assert (first.records, first.previous_incarnation) == (1, 1)
    assert home_tag(lun, A) == 2
    again = await replayed(lun, 3)
    assert (again.records, again.previous_incarnation) == (0, 2)
    assert again.start.next_sequence == first.start.next_sequence == 3


async def test_the_journal_of_a_later_incarnation_is_not_touched() -> None:
    """Who replays late, after the slot was given to somebody else, finds that one's records."""
    lun = await lun_with({})
    await replayed(lun, 3)
    writes = lun.journal.writes
    with pytest.raises(JournalDamaged, match="incarnation 3 goes on with it already"):
        await replayed(lun, 2)
    assert lun.journal.writes == writes


async def test_sequences_go_on_after_replay() -> None:
    lun = SimulatedLun(LUN_BYTES)
    for life in range(1, 6):
        async with small_store(lun, incarnation=life) as store:
            await store.transact((creating if life == 1 else editing)((A, life)))
            await store.commit()
            crashed = dict(lun.blocks)
        lun = SimulatedLun(LUN_BYTES, blocks=crashed)
    report = await replayed(lun, 6)
    assert report.start.next_sequence == 6
    assert home_tag(lun, A) == 5


# -- headers ---------------------------------------------------------------------------------------
async def test_a_torn_header_leaves_the_other() -> None:
    lun = await lun_with({})
    device = await lun.login(PORT)
    header, version = await read_header(device, PLACE)
    lun.blocks[PLACE.header_address(version)] = b"x" * BLOCK_BYTES
    assert await read_header(device, PLACE) == (header, version - 1)
    report = await replayed(lun, 7)
    assert report.start.header_version == version
    lun.blocks[PLACE.header_address(version)] = b"x" * BLOCK_BYTES
    lun.blocks[PLACE.header_address(version + 1)] = b"x" * BLOCK_BYTES
    with pytest.raises(BadBlock, match="journal header"):
        await replayed(lun)


async def test_a_header_that_points_out_of_the_ring_is_an_error() -> None:
    lun = await lun_with({})
    device = await lun.login(PORT)
    header, version = await read_header(device, PLACE)
    wrong = type(header)(0, 1, 1, PLACE.blocks)
    address = PLACE.header_address(version + 1)
    lun.blocks[address] = bytes(wrong.encode(PLACE.volume_id, address, version + 1))
    with pytest.raises(BadBlock, match="outside the journal"):
        await replayed(lun)


# -- crashes ---------------------------------------------------------------------------------------
async def test_a_crash_at_any_write_of_replay_is_harmless() -> None:
    forged = sealed(A, 666, VERSION_LIMIT - 1)
    journal = journal_with(
        ([image(A, 1, fresh=True), *(image(FIRST + 3 * i, i) for i in range(1, 40))], []),
        ([image(A, 2)], [FIRST + 6]),
    )
    lun = await lun_with(journal, {A: forged})
    # Everything so far is stable: only what replay writes is at risk.
    lun = SimulatedLun(LUN_BYTES, blocks=dict(lun.blocks), record=True)
    first = await replayed(lun)
    expected = dict(lun.blocks)
    assert lun.journal.writes > 30
    for writes in range(lun.journal.writes + 1):
        for _ in range(3):
            crashed = lun.crashed(writes)
            again = await replayed(crashed)
            assert again.start.next_sequence == first.start.next_sequence
            for address in range(FIRST, FIRST + 200):
                assert crashed.blocks.get(address) == expected.get(address)


async def test_replay_of_nothing_writes_nothing_but_the_new_incarnation() -> None:
    lun = await lun_with({})
    writes = lun.journal.writes
    await replayed(lun, 1)
    assert lun.journal.writes == writes
    await replayed(lun, 2)
    assert lun.journal.writes == writes + 1
