# ruff: noqa: ARG001 (autojump_clock works by being asked for)
"""What slots leave of a view that is destroyed."""

from __future__ import annotations

import pytest
from trio.testing import MockClock

from csvfs import format as fmt
from csvfs.format import BadBlock, SlotState, Superblock
from csvfs.journal.record import JournalPlace, encode_record
from csvfs.membership.seat import JournalTask
from csvfs.membership.view_rebuild import (
    LEAP,
    Rebuild,
    SlotTraces,
    Traces,
    read_traces,
    rebuilt_view,
)
from redirector.block.device import InitiatorPort
from redirector.block.simulated import SimulatedLun
from tests.unit.claim_menders import (
    NOW_NS,
    SECRET,
    alpha,
    beta,
    tear_views,
    used,
    wipe,
)
from tests.unit.claim_nodes import (
    SIZE,
    assert_taken,
    formatted,
)


async def test_a_journal_without_a_slot_block_is_replayed(autojump_clock: MockClock) -> None:
    lun = await used(alpha())
    superblock = Superblock.decode(lun.blocks[0])
    journal = superblock.geometry.journal(0)
    wipe(lun, fmt.VIEW_ADDRESSES[0], fmt.JOURNAL_AREA)
    lun.restart()
    whole = dict(lun.blocks)
    for torn in ((), (journal,), (journal, journal + 1)):
        lun.blocks.update(whole)
        for address in torn:
            lun.blocks[address] = lun.blocks[address][:4000] + b"\xee" * 96
        traces = await traces_of(lun, superblock)
        assert traces.slots[0] == SlotTraces(1, None, journal_used=True)
        assert not any(trace.used for trace in traces.slots[1:])
        entry = rebuilt_view(traces, (), Rebuild(NOW_NS, SECRET)).slots[0]
        assert (entry.state, entry.incarnation) == (SlotState.NEEDS_REPLAY, 1 + LEAP)
        assert entry.flags == fmt.ViewSlotFlag.JOURNAL_USED


async def test_a_record_alone_shows_use(autojump_clock: MockClock) -> None:
    lun = await formatted()
    superblock = Superblock.decode(lun.blocks[0])
    geometry = superblock.geometry
    place = JournalPlace(superblock.volume_id, 2, geometry.journal(2), geometry.journal_blocks)
    record = encode_record(place, 0, 6, 40, (), (77,))
    lun.blocks[place.ring_address(0)] = bytes(record)
    assert (await traces_of(lun, superblock)).slots[2] == SlotTraces(6, None, journal_used=True)


async def test_journals_of_an_earlier_volume_mean_nothing(autojump_clock: MockClock) -> None:
    earlier, lun = await used(alpha()), await formatted(seed=9)
    superblock = Superblock.decode(lun.blocks[0])
    journal = superblock.geometry.journal(0)
    for address in (journal, journal + 1):
        lun.blocks[address] = earlier.blocks[address]
    assert not any(trace.used for trace in (await traces_of(lun, superblock)).slots)


async def test_a_torn_header_cannot_use_up_a_slot(autojump_clock: MockClock) -> None:
    lun = await formatted()
    superblock = Superblock.decode(lun.blocks[0])
    address = superblock.geometry.journal(1)
    header = fmt.JournalHeader(1, (1 << 32) - 1, 5, 0).encode(superblock.volume_id, address, 1)
    lun.blocks[address] = bytes(header[:4000]) + b"\xee" * 96
    assert (await traces_of(lun, superblock)).slots[1] == SlotTraces(0, None, journal_used=True)
    tear_views(lun)
    with pytest.raises(
        BadBlock
    ):  # its journal is damaged: what a mender gives up, a claim does not
        await alpha().claim(lun)


async def test_the_only_slot_is_replayed_and_taken_over(autojump_clock: MockClock) -> None:
    lun = await formatted(slots=1)
    theirs = await beta().claim(lun, rebuild=False)
    theirs.abort()
    tear_views(lun)
    lun.restart()
    node = alpha()
    claim = await node.claim(lun)
    await assert_taken(lun, claim)
    assert (claim.slot, claim.incarnation) == (0, theirs.incarnation + 1)
    assert node.tasks == [JournalTask(0, claim.incarnation, used=True, own=True)]
    claim.abort()


async def traces_of(lun: SimulatedLun, superblock: Superblock) -> Traces:
    copy = SimulatedLun(SIZE, blocks=dict(lun.blocks))
    return await read_traces(await copy.login(InitiatorPort("iqn.x:look", 9)), superblock)
