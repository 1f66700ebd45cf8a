# ruff: noqa: ARG001 (autojump_clock works by being asked for)
"""`csvctl validate` on a simulated LUN: what it finds, and that it changes nothing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from random import Random

import pytest
import trio
from trio.testing import MockClock

from csvfs import format as fmt
from csvfs.host.validate import STRANGER_NAME, Validator
from csvfs.host.validate_facts import Door, KeyState, Property, Refused, Report, Verdict
from csvfs.mkfs_claim import FormatRefused, KeysInTheWay, LunOccupied
from redirector.block.arbiter import PR_OUT_OPS, ArbiterHabits, Op
from redirector.block.device import (
    AuthenticationFailed,
    IllegalRequest,
    InitiatorPort,
    OutcomeUnknown,
    Unreachable,
)
from redirector.block.keys import PathKey, is_newcomer
from redirector.block.reservations import Registration
from redirector.block.simulated import SimulatedDevice, SimulatedLun
from redirector.block.simulated_faults import TGT, Command, Faults, Injection
from tests.unit.claim_nodes import SIZE, Node, formatted, holder, registered, release

STRANGER = 0xABC
TOOL = "iqn.2026-11.test:tool"
HEIR = PathKey(2, 1, 1).pack()
WRITES = frozenset({Op.WRITE, Op.UNMAP, Op.WRITE_SAME, Op.SYNCHRONIZE_CACHE})


class Watched(SimulatedLun):
    """Notes every command that comes."""

    def __init__(self, lun: SimulatedLun, *, faults: Faults | None = None) -> None:
        super().__init__(
            lun.identity.size_bytes,
            seed=5,
            faults=faults,
            blocks=lun.blocks,
            reservations=lun.arbiter.state(),
        )
        self.seen: list[Op] = []
        self.doors: dict[str, Exception] = {}

    def arrive(self, command: Command) -> Injection | None:
        self.seen.append(command.op)
        return super().arrive(command)

    async def login(self, port: InitiatorPort, *, timeout_s: float = 10.0) -> SimulatedDevice:
        if port.name in self.doors:
            raise self.doors[port.name]
        return await super().login(port, timeout_s=timeout_s)


async def validate(
    lun: SimulatedLun, *, anonymous: SimulatedLun | None = None, destructive: bool = False
) -> Report:
    validator = Validator(lun, TOOL, anonymous=anonymous, rng=Random(9))
    return await validator.run(destructive=destructive)


def the(report: Report, name: str) -> Property:
    return next(each for each in report.properties if each.name == name)


def bad(report: Report) -> dict[str, Verdict]:
    return {each.name: each.verdict for each in report.properties if each.to_do}


# -- nothing changes -------------------------------------------------------------------------------
async def test_a_live_volume(autojump_clock: MockClock) -> None:
    lun = Watched(await formatted(parked=True))
    claim = await Node().claim(lun)
    before, keys = dict(lun.blocks), registered(lun)
    lun.seen.clear()
    report = await validate(lun)
    assert lun.blocks == before
    assert registered(lun) == keys
    assert not WRITES & set(lun.seen)
    outs = [op for op in lun.seen if op in PR_OUT_OPS]
    assert outs == [Op.REGISTER, Op.REGISTER], "its own key, and its removal"
    assert report.facts.outsider_read is Refused.YES
    assert is_newcomer(report.facts.own_key)
    assert the(report, "reservation").found == "held by alpha"
    assert {use.state for use in report.keys} == {KeyState.MEMBER}
    assert {use.path for use in report.keys} == {"data", "control"}
    # Its volume was formatted without a probe.
    assert bad(report) == {"arbiter": Verdict.WARNING, "provisioning": Verdict.WARNING}
    assert len(report.facts.reads_s) == 32
    await claim.control.confirm()
    await claim.data.confirm()
    await release(claim)


async def test_no_key_is_registered_where_reading_needs_none() -> None:
    lun = Watched(await formatted())
    report = await validate(lun)
    assert not [op for op in lun.seen if op in PR_OUT_OPS | WRITES]
    assert report.facts.own_key == 0
    assert report.facts.superblock is not None
    assert the(report, "reservation").verdict is Verdict.NOTE


async def test_an_empty_lun() -> None:
    lun = Watched(SimulatedLun(SIZE))
    report = await validate(lun)
    assert lun.blocks == {}
    assert report.verdict is Verdict.PASSED
    assert the(report, "volume").verdict is Verdict.NOT_TESTED


# -- what it finds ---------------------------------------------------------------------------------
async def test_damaged_copies(autojump_clock: MockClock) -> None:
    lun = await formatted(parked=True)
    claim = await Node().claim(lun)
    lun.blocks[fmt.SUPERBLOCK_ADDRESS] = bytes(4096)
    lun.blocks[fmt.VIEW_ADDRESSES[(claim.view.epoch + 1) % 2]] = bytes(4096)
    report = await validate(lun)
    assert the(report, "superblock copies").verdict is Verdict.WARNING
    assert the(report, "view copies").verdict is Verdict.NOTE
    assert the(report, "reservation").found == "held by alpha"
    lun.blocks[fmt.VIEW_ADDRESSES[claim.view.epoch % 2]] = bytes(4096)
    report = await validate(lun)
    assert the(report, "view copies").verdict is Verdict.FAILED


async def test_both_superblocks_destroyed() -> None:
    lun = await formatted()
    for address in (fmt.SUPERBLOCK_ADDRESS, SIZE // fmt.BLOCK_BYTES - 16):
        lun.blocks[address] = bytes(4096)
    report = await validate(lun)
    assert the(report, "volume").verdict is Verdict.FAILED
    assert report.facts.destroyed


async def test_a_view_that_is_being_written_is_not_called_damaged(
    autojump_clock: MockClock,
) -> None:
    lun = await formatted(parked=True)
    claim = await Node().claim(lun)
    address = fmt.view_address(claim.view.epoch)
    whole, lun.blocks[address] = lun.blocks[address], bytes(4096)
    async with trio.open_nursery() as nursery:

        async def finish() -> None:
            await trio.sleep(0.1)
            lun.blocks[address] = whole

        nursery.start_soon(finish)
        report = await validate(lun)
    assert the(report, "view copies").verdict is Verdict.PASSED


async def test_lost_bytes(autojump_clock: MockClock) -> None:
    lun = await formatted()
    lun.medium_errors.append(range(4096))
    slots = fmt.byte_offset(fmt.SLOT_AREA)
    lun.medium_errors.append(range(slots, slots + 4096))
    report = await validate(lun)
    assert the(report, "superblock copies").verdict is Verdict.WARNING
    found = the(report, "medium")
    assert found.verdict is Verdict.FAILED
    assert "byte 0" in found.found and "slot blocks" in found.found
    assert len(report.facts.reads_s) == 31


async def test_a_fence_that_leaks_reads(autojump_clock: MockClock) -> None:
    faults = Faults(ArbiterHabits(leaks=frozenset({Op.READ})))
    lun = Watched(await formatted(), faults=faults)
    claim = await Node().claim(lun)
    lun.seen.clear()
    report = await validate(lun)
    assert the(report, "exclusion").verdict is Verdict.FAILED
    assert not [op for op in lun.seen if op in PR_OUT_OPS], "no need to register: it may read"
    await release(claim)


async def test_a_target_without_reservations() -> None:
    lun = await formatted()

    def unsupported(what: str) -> IllegalRequest:
        return IllegalRequest(what, sense_key=5, asc_ascq=0x2000)

    lun.inject(lambda command: command.op is Op.READ_KEYS, unsupported, times=99)
    report = await validate(lun)
    assert the(report, "persistent reservations").verdict is Verdict.FAILED
    assert the(report, "superblock copies").verdict is Verdict.PASSED


async def test_a_stale_key_and_a_stranger(autojump_clock: MockClock) -> None:
    lun = await formatted(parked=True)
    claim = await Node().claim(lun)
    left = PathKey(3, 9, 1).pack()
    async with await lun.login(InitiatorPort("iqn.2026-11.test:b", 2)) as one:
        await one.register(left)
    async with await lun.login(InitiatorPort("iqn.2026-11.test:c", 3)) as two:
        await two.register(STRANGER)
    report = await validate(lun)
    states = {use.key: use.state for use in report.keys}
    assert states[left] is KeyState.STALE
    assert states[STRANGER] is KeyState.FOREIGN
    assert the(report, "stale keys").verdict is Verdict.WARNING
    assert report.verdict is Verdict.FAILED
    assert claim.data.key in states


async def test_beside_another_systems_reservation_nothing_is_registered() -> None:
    lun = Watched(SimulatedLun(SIZE))
    async with await lun.login(InitiatorPort("iqn.2026-11.test:c", 3)) as stranger:
        await stranger.register(STRANGER)
        await stranger.reserve(STRANGER)
        lun.seen.clear()
        report = await validate(lun)
    assert not [op for op in lun.seen if op in PR_OUT_OPS | WRITES]
    assert the(report, "reservation").verdict is Verdict.FAILED
    assert the(report, "latency").verdict is Verdict.NOT_TESTED


async def held_up(lun: SimulatedLun, read: int, meanwhile: Callable[[], Awaitable[None]]) -> Report:
    """Validate, and let something happen while the tool's ``read``-th READ is on its way."""
    reads = 0

    def is_it(command: Command) -> bool:
        nonlocal reads
        if command.op is not Op.READ or command.port.name != TOOL:
            return False
        reads += 1
        return reads == read

    hold = lun.hold(is_it, limit=1)
    reports: list[Report] = []

    async def look() -> None:
        reports.append(await validate(lun))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        await hold.wait_held()
        await meanwhile()
        hold.lift()
    return reports[0]


async def test_who_is_fenced_while_looking_looks_again(autojump_clock: MockClock) -> None:
    """Another host takes the volume over, and fences every key that it does not know."""
    lun = await formatted(parked=True)
    async with await lun.login(InitiatorPort("iqn.2026-11.test:b", 2)) as device:

        async def take_over() -> None:
            heir = await Registration.register(device, HEIR)
            (tool,) = (key for key in registered(lun) if key not in (holder(lun), HEIR))
            await heir.take(holder(lun))
            await heir.preempt(tool)

        report = await held_up(lun, 3, take_over)
    assert report.facts.standing.holder_key == HEIR
    assert report.facts.superblock is not None
    assert registered(lun) == [HEIR]


async def test_a_mount_while_it_reads_unregistered(autojump_clock: MockClock) -> None:
    lun = await formatted()
    async with await lun.login(InitiatorPort("iqn.2026-11.test:b", 2)) as device:

        async def reserve() -> None:
            await (await Registration.register(device, HEIR)).reserve()

        report = await held_up(lun, 5, reserve)
    assert report.facts.own_key
    assert report.facts.standing.holder_key == HEIR
    assert registered(lun) == [HEIR]


async def test_a_lost_session_says_so(autojump_clock: MockClock) -> None:
    lun = await formatted()
    lun.lose_answer(lambda command: command.op is Op.READ, landed=True)
    with pytest.raises(OutcomeUnknown):
        await validate(lun)
    assert not lun.sessions


@pytest.mark.parametrize("keeps", [False, True])
async def test_reinstatement(keeps: bool, autojump_clock: MockClock) -> None:
    lun = Watched(await formatted(), faults=Faults(reinstatement_keeps_old=keeps))
    assert (await validate(lun)).facts.closes_old_session is not keeps


# -- doors -----------------------------------------------------------------------------------------
async def test_doors() -> None:
    lun, anonymous = Watched(await formatted()), Watched(SimulatedLun(SIZE))
    assert (await validate(lun)).facts.no_password is Door.NONE
    found = (await validate(lun, anonymous=lun)).facts
    assert (found.no_password, found.stranger) == (Door.OPEN, Door.OPEN)
    lun.doors[STRANGER_NAME] = AuthenticationFailed("CHAP")
    anonymous.doors[TOOL] = AuthenticationFailed("CHAP")
    found = (await validate(lun, anonymous=anonymous)).facts
    assert (found.no_password, found.stranger) == (Door.SHUT, Door.SHUT)
    lun.doors[STRANGER_NAME] = Unreachable("gone")
    assert (await validate(lun, anonymous=lun)).facts.stranger is Door.UNKNOWN


# -- destructive -----------------------------------------------------------------------------------
async def test_a_writing_probe_of_an_empty_lun(autojump_clock: MockClock) -> None:
    lun = Watched(SimulatedLun(SIZE), faults=TGT)
    report = await validate(lun, destructive=True)
    assert Op.WRITE in lun.seen
    assert all(not any(block) for block in lun.blocks.values()), "as it was"
    assert registered(lun) == []
    assert report.verdict is Verdict.PASSED
    assert the(report, "the fence stops WRITE").verdict is Verdict.PASSED
    assert the(report, "the fence stops UNMAP").verdict is Verdict.NOTE


async def test_a_writing_probe_of_a_target_that_does_not_hold(autojump_clock: MockClock) -> None:
    habits = ArbiterHabits(preempts_unregistered=True)
    report = await validate(Watched(SimulatedLun(SIZE), faults=Faults(habits)), destructive=True)
    found = the(report, "PREEMPT of a key that nobody registered conflicts")
    assert found.verdict is Verdict.FAILED
    assert "two hosts" in found.means


async def test_a_writing_probe_is_refused_beside_data() -> None:
    lun = Watched(await formatted(parked=True))
    await _refused(lun, LunOccupied)
    ext4 = Watched(SimulatedLun(SIZE))
    ext4.blocks[0] = bytes(1080) + b"\x53\xef" + bytes(3014)
    await _refused(ext4, LunOccupied)
    used = Watched(SimulatedLun(SIZE))
    async with await used.login(InitiatorPort("iqn.2026-11.test:c", 3)) as stranger:
        await stranger.register(STRANGER)
        await _refused(used, KeysInTheWay)


async def test_a_writing_probe_is_refused_on_a_live_volume(autojump_clock: MockClock) -> None:
    lun = Watched(await formatted(parked=True))
    claim = await Node().claim(lun)
    await _refused(lun, KeysInTheWay)
    await claim.control.confirm()
    await release(claim)


async def _refused(lun: Watched, error: type[FormatRefused]) -> None:
    before, keys = dict(lun.blocks), registered(lun)
    lun.seen.clear()
    with pytest.raises(error):
        await validate(lun, destructive=True)
    assert lun.blocks == before
    assert registered(lun) == keys
    assert not WRITES & set(lun.seen)
