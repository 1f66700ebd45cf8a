# ruff: noqa: ARG001 (autojump_clock works by being asked for)
"""Claim and release on a simulated LUN: alone, and against others."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import trio
from trio.testing import MockClock

from csvfs import format as fmt
from csvfs.membership.claim import (
    Claim,
    ClaimFailed,
    ClaimRefused,
    LeaveIncomplete,
)
from csvfs.membership.fixed_area import NoVolume
from csvfs.membership.newcomer import ForeignReservation, open_newcomer
from csvfs.membership.refusals import (
    RefuseCopy,
    RefuseForeign,
    RefuseMountedHere,
    RefuseOther,
)
from csvfs.membership.seat import JournalTask
from redirector.block.arbiter import Op
from redirector.block.device import (
    BlockError,
    InitiatorPort,
    LoginFailed,
)
from redirector.block.keys import is_newcomer, newcomer_key
from redirector.block.reservations import Registration
from redirector.block.simulated import SimulatedLun
from tests.unit.claim_nodes import (
    ALPHA,
    BETA,
    SIZE,
    Node,
    assert_taken,
    formatted,
    holder,
    registered,
    release,
    view_of,
)


# -- the ordinary life ---------------------------------------------------------------------------
async def test_a_life_of_mounts(autojump_clock: MockClock) -> None:
    lun, node = await formatted(), Node()
    incarnations = []
    for _ in range(4):
        claim = await node.claim(lun)
        await assert_taken(lun, claim)
        incarnations.append(claim.incarnation)
        await release(claim)
        view = await view_of(lun)
        assert view.members == ()
        assert view.holder_key == holder(lun) == claim.control.key
        assert registered(lun) == [claim.control.key]
        assert not lun.sessions
    assert incarnations == [1, 2, 3, 4]
    assert [task.used for task in node.tasks] == [False, True, True, True]
    assert {task.slot for task in node.tasks} == {0}


async def test_only_the_first_mount_waits_for_silence(autojump_clock: MockClock) -> None:
    lun, node = await formatted(), Node()
    started = trio.current_time()
    claim = await node.claim(lun)
    assert 5 <= trio.current_time() - started < 6
    assert "nobody holds" in node.waits[0]
    await release(claim)
    started = trio.current_time()
    claim = await node.claim(lun)
    assert trio.current_time() - started < 1
    claim.abort()


async def test_format_parks_its_key_for_the_first_mount(autojump_clock: MockClock) -> None:
    lun, node = await formatted(parked=True), Node()
    claim = await node.claim(lun)
    assert node.waits == []
    await assert_taken(lun, claim)
    claim.abort()


async def test_hosts_take_turns(autojump_clock: MockClock) -> None:
    lun, alpha, beta = await formatted(), Node(), Node(BETA, Random(2))
    for _ in range(2):
        for node in (alpha, beta):
            claim = await node.claim(lun)
            await assert_taken(lun, claim)
            await release(claim)


async def test_the_secret_stays_and_the_certificate_is_listed(autojump_clock: MockClock) -> None:
    lun = await formatted()
    secret = (await view_of(lun)).secret
    claim = await Node().claim(lun)
    assert claim.view.secret == secret
    assert claim.view.slots[0].fingerprint != bytes(32)
    claim.abort()


# -- refusals ------------------------------------------------------------------------------------
async def test_a_second_host_is_refused_and_told_by_whom(autojump_clock: MockClock) -> None:
    lun = await formatted()
    claim = await Node().claim(lun)
    for dead in (False, True):
        if dead:
            claim.abort()
        with pytest.raises(ClaimRefused, match=r"alpha \(192.0.2.1:7\) has the volume") as caught:
            await Node(BETA, Random(2)).claim(lun)
        assert caught.value.refusal == RefuseOther(0, "alpha", ("192.0.2.1:7",), 7)
        assert holder(lun) == claim.control.key
        assert registered(lun) == sorted([claim.data.key, claim.control.key])


async def test_the_first_host_works_on_while_a_second_is_refused(autojump_clock: MockClock) -> None:
    lun = await formatted()
    claim = await Node().claim(lun)
    with pytest.raises(ClaimRefused):
        await Node(BETA, Random(2)).claim(lun)
    await claim.data.device.write(SIZE // 2, bytes(4096))
    await release(claim)


async def test_mounted_twice_on_one_host(autojump_clock: MockClock) -> None:
    lun = await formatted()
    claim = await Node().claim(lun)
    with pytest.raises(ClaimRefused) as caught:
        await Node(rng=Random(2), lock_is_free=False).claim(lun)
    assert isinstance(caught.value.refusal, RefuseMountedHere)
    await release(claim)


async def test_a_copy_by_the_array_is_refused_and_untouched(autojump_clock: MockClock) -> None:
    lun = await formatted()
    copy = SimulatedLun(SIZE, seed=6, blocks=dict(lun.blocks))
    with pytest.raises(ClaimRefused) as caught:
        await Node().claim(copy)
    assert isinstance(caught.value.refusal, RefuseCopy)
    assert copy.journal.writes == 0
    assert registered(copy) == []


async def test_a_lun_that_is_no_volume(autojump_clock: MockClock) -> None:
    lun = SimulatedLun(SIZE)
    with pytest.raises(NoVolume, match=r"block 0 .* all zeroes"):
        await Node().claim(lun)
    assert lun.arbiter.generation == 0, "nothing was registered"


async def test_a_reservation_of_a_stranger_is_not_even_joined(autojump_clock: MockClock) -> None:
    lun = await formatted()
    stranger = await lun.login(InitiatorPort("iqn.2026-11.test:pacemaker", 1))
    await stranger.register(0xABC)
    await stranger.reserve(0xABC)
    with pytest.raises(ForeignReservation, match="0x0000000000000abc"):
        await Node().claim(lun)
    assert registered(lun) == [0xABC]


async def test_a_registration_of_a_stranger_is_named(autojump_clock: MockClock) -> None:
    lun = await formatted()
    stranger = await lun.login(InitiatorPort("iqn.2026-11.test:pacemaker", 1))
    await stranger.register(0xABC)
    with pytest.raises(ClaimRefused, match="0x0000000000000abc") as caught:
        await Node().claim(lun)
    assert isinstance(caught.value.refusal, RefuseForeign)
    assert registered(lun) == [0xABC]


async def test_both_views_bad_is_a_clear_error(autojump_clock: MockClock) -> None:
    lun = await formatted()
    for address in fmt.VIEW_ADDRESSES:
        lun.blocks[address + 3] = b"\xee" * 4096
    with pytest.raises(fmt.NoView, match=r"block 16 .* block 32 "):
        await Node().claim(lun)
    assert registered(lun) == []


@pytest.mark.parametrize("copy", [0, 1])
async def test_one_bad_view_is_enough(copy: int, autojump_clock: MockClock) -> None:
    lun = await formatted()
    claim = await Node().claim(lun)
    await release(claim)
    lun.blocks[fmt.VIEW_ADDRESSES[copy] + 3] = b"\xee" * 4096
    claim = await Node(rng=Random(2)).claim(lun)
    await assert_taken(lun, claim)
    claim.abort()


async def test_the_backup_superblock_is_used_and_said(autojump_clock: MockClock) -> None:
    lun = await formatted()
    lun.blocks[0] = bytes(4096)
    claim = await Node().claim(lun)
    assert "block 0 is not a valid superblock" in claim.superblock_trouble
    claim.abort()


async def test_a_newcomer_that_only_looks_leaves_no_trace(autojump_clock: MockClock) -> None:
    lun = await formatted()
    claim = await Node().claim(lun)
    async with await open_newcomer(lun, "iqn.2026-11.test:tool", Random(4)) as newcomer:
        assert is_newcomer(newcomer.key)
        assert newcomer.superblock.label == "v"
        assert len(registered(lun)) == 3
    assert len(registered(lun)) == 2
    await release(claim)


# -- one's own dead ------------------------------------------------------------------------------
@pytest.mark.parametrize("rebooted", [False, True])
async def test_own_dead_incarnation_is_recovered(rebooted: bool, autojump_clock: MockClock) -> None:
    lun = await formatted()
    first = await Node().claim(lun)
    first.abort()
    host = replace(ALPHA, boot_id=b"9" * 16) if rebooted else ALPHA
    node = Node(host, Random(2))
    claim = await node.claim(lun)
    await assert_taken(lun, claim)
    assert node.waits == []
    assert (claim.slot, claim.incarnation) == (first.slot, 2)
    assert node.tasks == [JournalTask(0, 2, used=True, own=True)]
    await release(claim)


async def test_a_volume_of_one_slot_recovers_as_well(autojump_clock: MockClock) -> None:
    lun = await formatted(slots=1)
    (await Node().claim(lun)).abort()
    claim = await Node(rng=Random(2)).claim(lun)
    await assert_taken(lun, claim)
    claim.abort()


async def test_a_write_of_the_dead_incarnation_lands_before_the_replay_or_never(
    autojump_clock: MockClock,
) -> None:
    lun = await formatted()
    first = await Node().claim(lun)
    lun.drains_wait()
    hold = lun.hold(lambda command: command.data.startswith(b"SLOW"))
    late = b"SLOW" * 1024

    async def write_late() -> None:
        with pytest.raises(BlockError):
            await first.data.device.write(SIZE // 2, late)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write_late)
        await hold.wait_held()
        first.abort()
        node = Node(rng=Random(2))
        claims: list[Claim] = []

        async def claim() -> None:
            claims.append(await node.claim(lun))

        nursery.start_soon(claim)
        await trio.sleep(1)
        assert not node.tasks, "replayed while a write was on its way"
        hold.land()
    assert node.tasks
    await assert_taken(lun, claims[0])
    data = claims[0].data.device
    assert await data.read(SIZE // 2, 4096) == late


async def test_a_frozen_reader_of_the_dead_incarnation_is_closed(autojump_clock: MockClock) -> None:
    lun = await formatted()
    first = await Node().claim(lun)
    hold = lun.hold(lambda command: command.op is Op.READ and command.port == first_port)
    first_port = first.data.device.port

    async def read() -> None:
        with pytest.raises(BlockError):
            await first.data.device.read(SIZE // 2, 4096)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await hold.wait_held()
        first.data.device.freeze()  # type: ignore[attr-defined]
        claim = await Node(rng=Random(2)).claim(lun)
    await assert_taken(lun, claim)
    assert first.data.device.lost
    claim.abort()


async def test_after_power_loss_of_the_target_own_dead_is_recovered_at_once(
    autojump_clock: MockClock,
) -> None:
    lun = await formatted()
    await Node().claim(lun)
    lun.restart(power_lost=True)
    node = Node(rng=Random(2))
    claim = await node.claim(lun)
    await assert_taken(lun, claim)
    assert node.waits == []
    claim.abort()


# -- against others ------------------------------------------------------------------------------
@pytest.mark.parametrize("parked", [False, True])
@pytest.mark.parametrize("seed", range(20))
async def test_of_two_hosts_one_wins(seed: int, parked: bool, autojump_clock: MockClock) -> None:
    lun = await formatted(parked=parked)
    won: list[Claim] = []
    lost: list[Exception] = []
    delay = Random(seed)

    async def try_claim(node: Node) -> None:
        await trio.sleep(delay.random() * 0.01)
        for _ in range(delay.randrange(6)):
            await trio.lowlevel.checkpoint()
        try:
            won.append(await node.claim(lun))
        except (ClaimRefused, ClaimFailed) as error:
            lost.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(try_claim, Node(ALPHA, Random(seed)))
        nursery.start_soon(try_claim, Node(BETA, Random(seed + 1000)))
    assert len(won) == 1, lost
    winner = won[0]
    assert len(lost) == 1
    assert isinstance(lost[0], ClaimRefused)
    assert winner.host.node_name in str(lost[0])
    await assert_taken(lun, winner)


# -- leaving -------------------------------------------------------------------------------------
async def test_a_lost_data_session_is_fenced_before_the_view_says_left(
    autojump_clock: MockClock,
) -> None:
    lun = await formatted()
    claim = await Node().claim(lun)
    data_key = claim.data.key
    claim.data.device.abort()
    await release(claim)
    assert registered(lun) == [claim.control.key]
    assert data_key not in registered(lun)
    assert (await view_of(lun)).members == ()


async def test_a_release_whose_target_does_not_drain_is_not_clean(
    autojump_clock: MockClock,
) -> None:
    lun = await formatted()
    claim = await Node().claim(lun)
    lun.drains_wait()
    hold = lun.hold(lambda command: command.data.startswith(b"SLOW"))

    async def write_late() -> None:
        with pytest.raises(BlockError):
            await claim.data.device.write(SIZE // 2, b"SLOW" * 1024)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write_late)
        await hold.wait_held()
        claim.data.device.abort()
        with pytest.raises(LeaveIncomplete, match="not left cleanly"):
            await release(claim)
    assert (await view_of(lun)).members == (0,)
    with pytest.raises(ClaimFailed, match="Look at the target"):
        await Node(rng=Random(3)).claim(lun)
    hold.lift()
    claim = await Node(rng=Random(4)).claim(lun)
    await assert_taken(lun, claim)


async def test_an_unreachable_target_is_said(autojump_clock: MockClock) -> None:
    lun = await formatted()
    lun.disconnect()
    with pytest.raises(LoginFailed):
        await Node().claim(lun)


async def test_a_holder_that_was_deposed_does_not_release(autojump_clock: MockClock) -> None:
    lun = await formatted()
    claim = await Node().claim(lun)
    other = await Registration.register(
        await lun.login(InitiatorPort("iqn.2026-11.test:x", 3)), newcomer_key(Random(3))
    )
    await other.take(claim.control.key)
    await other.preempt(claim.data.key)
    before = await view_of(lun)
    with pytest.raises(LeaveIncomplete):
        await release(claim)
    assert await view_of(lun) == before
