"""The probe of a target: what a good one shows, why bad ones are refused, what it leaves behind."""

# ruff: noqa: ARG001 (a clock does its work by being asked for)

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import trio
from trio.testing import MockClock

from csvfs.ondisk.superblock import ProbeFlag as StoredFlag
from redirector.block.arbiter import ArbiterHabits, Op
from redirector.block.device import InitiatorPort, LoginFailed, OutcomeUnknown
from redirector.block.file import FileLun
from redirector.block.probe import ProbeFailed, ProbeFlag, ProbeResult, probe
from redirector.block.reservations import Registration
from redirector.block.simulated import TGT, Command, Faults, SimulatedLun

NAMES = ("iqn.2026-11.test:a", "iqn.2026-11.test:b")
SCRATCH = (32768, 32768)
ALL_FENCED = (
    ProbeFlag.FENCE_STOPS_READ
    | ProbeFlag.FENCE_STOPS_WRITE
    | ProbeFlag.FENCE_STOPS_UNMAP
    | ProbeFlag.FENCE_STOPS_WRITE_SAME
)
GOOD = (
    ProbeFlag.PROBED
    | ProbeFlag.PREEMPT_UNREGISTERED_CONFLICTS
    | ALL_FENCED
    | ProbeFlag.REINSTATEMENT_CLOSES
    | ProbeFlag.RESET_DRAINS
    | ProbeFlag.UNMAP_WORKS
    | ProbeFlag.WRITE_SAME_WORKS
)


def habits(**switches: object) -> Faults:
    return Faults(ArbiterHabits(**switches))  # type: ignore[arg-type]  # keywords of a test


async def probed(lun: SimulatedLun) -> ProbeResult:
    """The probe's result, after checking that it left nothing behind."""
    device = await lun.login(InitiatorPort("iqn.2026-11.test:before", 1))
    await device.write(0, Random(5).randbytes(128 << 10))
    before = dict(lun.blocks)
    try:
        return await probe(lun, NAMES, SCRATCH, rng=Random(6))
    finally:
        assert lun.arbiter.registrations == {}
        assert lun.arbiter.holder is None
        assert lun.blocks == before
        assert list(lun.sessions) == [device.nexus]
        lun.check()


def test_flags_are_those_of_the_superblock() -> None:
    assert {flag.name: flag.value for flag in ProbeFlag} == {
        flag.name: flag.value for flag in StoredFlag
    }


async def test_a_good_target(autojump_clock: MockClock) -> None:
    result = await probed(SimulatedLun(1 << 20))
    assert result.flags == GOOD
    assert not result.refusals
    assert all(line.startswith("ok") for line in result.lines())


async def test_tgt_leaks_and_is_accepted(autojump_clock: MockClock) -> None:
    result = await probed(SimulatedLun(1 << 20, faults=TGT))
    leaks = ProbeFlag.FENCE_STOPS_UNMAP | ProbeFlag.FENCE_STOPS_WRITE_SAME
    assert result.flags == GOOD & ~leaks
    assert not result.refusals
    assert sum(line.startswith("note") for line in result.lines()) == 2


async def test_targets_that_know_abort_or_compare_keys(autojump_clock: MockClock) -> None:
    result = await probed(SimulatedLun(1 << 20, faults=habits(knows_abort=True, checks_keys=True)))
    assert result.flags == GOOD | ProbeFlag.PREEMPT_ABORT_WORKS


async def test_without_unmap(autojump_clock: MockClock) -> None:
    result = await probed(SimulatedLun(1 << 20, unmap_granularity_bytes=0))
    assert result.flags == GOOD & ~(ProbeFlag.UNMAP_WORKS | ProbeFlag.FENCE_STOPS_UNMAP)
    assert not result.refusals


@pytest.mark.parametrize(
    ("faults", "missing", "words"),
    [
        (
            habits(preempts_unregistered=True),
            ProbeFlag.PREEMPT_UNREGISTERED_CONFLICTS,
            "two hosts win one election",
        ),
        (habits(forgets_closed=True), ProbeFlag.NONE, "gone with the connection"),
        (habits(leaks=frozenset({Op.READ})), ProbeFlag.FENCE_STOPS_READ, "evicted"),
        (habits(leaks=frozenset({Op.WRITE})), ProbeFlag.FENCE_STOPS_WRITE, "evicted"),
    ],
)
async def test_arbiters_that_do_not_hold_are_refused(
    autojump_clock: MockClock, faults: Faults, missing: ProbeFlag, words: str
) -> None:
    result = await probed(SimulatedLun(1 << 20, faults=faults))
    assert not missing & result.flags
    assert any(words in str(finding) for finding in result.refusals)
    assert all("Use another target" in finding.meaning for finding in result.refusals)


async def test_reinstatement_that_closes_nothing_is_noted(autojump_clock: MockClock) -> None:
    result = await probed(SimulatedLun(1 << 20, faults=Faults(reinstatement_keeps_old=True)))
    assert result.flags == GOOD & ~ProbeFlag.REINSTATEMENT_CLOSES
    assert not result.refusals


def by_victim(command: Command) -> bool:
    return command.op is Op.WRITE and command.port.name == NAMES[1]


async def land_late(lun: SimulatedLun) -> None:
    """Writes of the victim take 0.1 s, unless a reset drains them."""
    hold = lun.hold(by_victim)
    while True:
        await trio.sleep(0.1)
        while hold.commands:
            hold.land()


@pytest.mark.parametrize("drains", [True, False])
async def test_late_writes_after_a_reset_are_seen(
    autojump_clock: MockClock, drains: bool, nursery: trio.Nursery
) -> None:
    lun = SimulatedLun(1 << 20, faults=Faults(reset_does_not_drain=not drains))
    nursery.start_soon(land_late, lun)
    result = await probed(lun)
    assert (ProbeFlag.RESET_DRAINS in result.flags) is drains
    assert bool(result.refusals) is not drains


async def test_a_reset_that_is_never_answered(autojump_clock: MockClock) -> None:
    lun = SimulatedLun(1 << 20)
    lun.drains_wait()

    async def give_in() -> None:
        hold = lun.hold(by_victim, limit=40)
        await hold.wait_held(32)
        await trio.sleep(8)
        hold.lift()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(give_in)
        result = await probed(lun)
        nursery.cancel_scope.cancel()
    assert any("RESET" in finding.name for finding in result.refusals)


async def test_somebody_is_there_already() -> None:
    lun = SimulatedLun(1 << 20)
    other = await Registration.register(await lun.login(InitiatorPort("iqn.x:y", 9)), 77)
    with pytest.raises(ProbeFailed, match="registered"):
        await probe(lun, NAMES, SCRATCH)
    await other.confirm()


@pytest.mark.parametrize("landed", [True, False])
@pytest.mark.parametrize("op", [Op.WRITE, Op.PREEMPT, Op.REGISTER, Op.RESERVE, Op.READ])
async def test_a_connection_lost_in_the_middle_leaves_nothing_behind(
    autojump_clock: MockClock, op: Op, landed: bool
) -> None:
    for skip in range(3):
        lun = SimulatedLun(1 << 20)
        seen = [skip]

        def matches(command: Command, seen: list[int] = seen, lun: SimulatedLun = lun) -> bool:
            if command.op is op and command.port.name in NAMES:
                seen[0] -= 1
            return seen[0] == -1 and command.op is op and command.port.name in NAMES

        lun.lose_answer(matches, landed=landed)
        try:
            await probed(lun)
        except (ProbeFailed, OutcomeUnknown):
            continue


async def test_an_unreachable_target() -> None:
    lun = SimulatedLun(1 << 20)
    lun.disconnect()
    with pytest.raises(LoginFailed):
        await probe(lun, NAMES, SCRATCH)


async def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "lun"
    path.write_bytes(Random(8).randbytes(1 << 20))
    before = path.read_bytes()
    result = await probe(FileLun(path), NAMES, SCRATCH)
    assert not result.refusals
    assert result.flags | ProbeFlag.UNMAP_WORKS | ProbeFlag.FENCE_STOPS_UNMAP == GOOD
    assert path.read_bytes() == before
