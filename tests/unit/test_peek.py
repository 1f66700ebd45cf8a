"""A look at the volume before this node's membership begins."""

# ruff: noqa: ARG001 (a clock does its work by being asked for)

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import trio
from trio.testing import MockClock

from csvfs import format as fmt
from csvfs.format import BLOCK_BYTES, Superblock
from csvfs.membership.claim import ClaimRefused
from csvfs.membership.fixed_area import NoVolume, OlderVolume
from csvfs.membership.newcomer import ForeignReservation
from csvfs.membership.peek import peek, shows_life
from csvfs.membership.refusals import RefuseCopy, RefuseFeature, RefuseForeign
from csvfs.membership.view_rebuild import ViewsDestroyed
from csvfs.ondisk.geometry import HEARTBEAT_AREA
from redirector.block.arbiter import Op
from redirector.block.device import InitiatorPort, OutcomeUnknown
from redirector.block.simulated import SimulatedLun
from tests.unit.arbiter_bench import NODE, OFFICER, open_bench
from tests.unit.claim_nodes import SIZE, formatted

NAME = "iqn.2026-11.test:alpha"


def forge_superblock(lun: SimulatedLun, **changes: object) -> None:
    old = Superblock.decode(lun.blocks[0])
    new = replace(old, **changes)  # type: ignore[arg-type]
    for address in (0, old.geometry.backup_superblock):
        lun.blocks[address] = bytes(new.encode(address))


async def test_it_sees_and_leaves_nothing_behind() -> None:
    async with open_bench() as bench:
        seen = await peek(bench.lun, NAME, rng=Random(1))
        assert seen.superblock == bench.superblock
        assert seen.superblock_trouble is None
        assert seen.view.lists(*NODE)
        assert seen.identity.size_bytes == SIZE
        assert bench.registered == [OFFICER]
        assert not [s for s in bench.lun.sessions.values() if s.port.name == NAME]
        assert Op.WRITE not in bench.ops()


async def test_who_is_fenced_meanwhile_looks_again() -> None:
    async with open_bench() as bench:
        bench.lun.lose_answer(lambda c: c.op is Op.READ_RESERVATION, landed=True, times=3)
        seen = await peek(bench.lun, NAME, rng=Random(1))
        assert seen.superblock == bench.superblock


async def test_a_target_that_never_answers_is_left() -> None:
    async with open_bench() as bench:
        bench.lun.lose_answer(lambda c: c.op is Op.READ_RESERVATION, landed=True, times=99)
        with pytest.raises(OutcomeUnknown):
            await peek(bench.lun, NAME, rng=Random(1))


async def test_a_volume_of_an_earlier_csvfs_is_refused_with_words() -> None:
    lun = await formatted()
    forge_superblock(lun, incompat=0)
    for address in fmt.VIEW_ADDRESSES:  # as it was before views had this form
        lun.blocks[address] = bytes(4096)
    with pytest.raises(OlderVolume, match=r'volume "v" was formatted by an earlier csvfs.*anew'):
        await peek(lun, NAME)
    assert not lun.arbiter.registrations


async def test_a_newer_one_too() -> None:
    lun = await formatted()
    forge_superblock(lun, incompat=1 << 40 | 1)
    with pytest.raises(ClaimRefused) as caught:
        await peek(lun, NAME)
    assert isinstance(caught.value.refusal, RefuseFeature)


async def test_a_copy_of_the_lun_is_refused() -> None:
    lun = await formatted()
    lun.identity = replace(lun.identity, device_id=b"another")
    with pytest.raises(ClaimRefused) as caught:
        await peek(lun, NAME)
    assert isinstance(caught.value.refusal, RefuseCopy)


async def test_a_stranger_is_refused() -> None:
    lun = await formatted()
    device = await lun.login(InitiatorPort("iqn.x:stranger", 1))
    await device.register(77)
    with pytest.raises(ClaimRefused) as caught:
        await peek(lun, NAME)
    assert isinstance(caught.value.refusal, RefuseForeign)
    await device.reserve(77)
    with pytest.raises(ForeignReservation):
        await peek(lun, NAME)


async def test_no_volume_and_no_view() -> None:
    with pytest.raises(NoVolume):
        await peek(SimulatedLun(SIZE), NAME)
    lun = await formatted()
    for address in fmt.VIEW_ADDRESSES:
        lun.blocks[address] = b"\xee" * 4096
    with pytest.raises(ViewsDestroyed, match="check --repair"):
        await peek(lun, NAME)


async def test_a_superblock_that_is_damaged_is_told(autojump_clock: MockClock) -> None:
    lun = await formatted()
    lun.blocks[0] = bytes(4096)
    seen = await peek(lun, NAME)
    assert seen.superblock_trouble is not None


async def test_a_node_shows_life_by_its_heartbeats(autojump_clock: MockClock) -> None:
    async with open_bench() as bench:
        lun, slot = bench.lun, frozenset({NODE.slot})
        assert not await shows_life(lun, NAME, slot, rng=Random(1))

        async def beat() -> None:
            await trio.sleep(1.2)
            address = HEARTBEAT_AREA + NODE.slot
            lun.blocks[address] = bytes([7]) * BLOCK_BYTES

        async with trio.open_nursery() as nursery:
            nursery.start_soon(beat)
            assert await shows_life(lun, NAME, slot, rng=Random(1))
            nursery.start_soon(beat)
        assert not await shows_life(lun, NAME, frozenset({NODE.slot + 1}), rng=Random(1))
        assert bench.registered == [OFFICER]
