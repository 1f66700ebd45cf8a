# ruff: noqa: ARG001 (autojump_clock works by being asked for)
"""Who may format a LUN, and that nothing is changed for those who may not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from random import Random

import pytest
import trio
from trio.testing import MockClock

from csvfs import format as fmt
from csvfs.format import Superblock, WriteCache
from csvfs.membership.claim import Claim, claim_volume, release_volume
from csvfs.membership.decision import Host
from csvfs.membership.fixed_area import read_superblock, read_view
from csvfs.membership.seat import JournalTask
from csvfs.mkfs import FormatOptions
from csvfs.mkfs_claim import (
    FormatRefused,
    Formatter,
    KeysInTheWay,
    LunOccupied,
    UnfitTarget,
    keys_in_the_way,
)
from redirector.block import probe_result
from redirector.block.arbiter import ArbiterHabits, Op
from redirector.block.device import (
    BlockDevice,
    BlockError,
    InitiatorPort,
    RegisteredKeys,
    Reservation,
    ReservationType,
)
from redirector.block.keys import PathKey, is_newcomer
from redirector.block.reservations import Standing
from redirector.block.simulated import SimulatedLun
from redirector.block.simulated_faults import TGT, Command, Faults

SIZE = 64 << 20
INITIATOR = "iqn.2026-11.test:alpha"
HOST = Host("alpha", b"A" * 16, b"1" * 16, INITIATOR)
PARKED = PathKey(0, 7, 2).pack()
STRANGER = 0xABC


def formatter(lun: SimulatedLun, *preempt_keys: int, force: bool = False) -> Formatter:
    return Formatter(
        lun,
        INITIATOR,
        FormatOptions(label="new", slots=2),
        force=force,
        preempt_keys=frozenset(preempt_keys),
        now_ns=5,
        rng=Random(5),
    )


async def mounted(lun: SimulatedLun) -> Claim:
    async def prepare(device: BlockDevice, superblock: Superblock, task: JournalTask) -> None:
        """There is nothing to replay."""

    return await claim_volume(lun, HOST, prepare=prepare, take_lock=lambda _: True, rng=Random(6))


@asynccontextmanager
async def stranger(lun: SimulatedLun, *, reserve: bool = False) -> AsyncIterator[BlockDevice]:
    async with await lun.login(InitiatorPort("iqn.2026-11.test:stranger", 1)) as device:
        await device.register(STRANGER)
        if reserve:
            await device.reserve(STRANGER)
        yield device


def registered(lun: SimulatedLun) -> list[int]:
    return list(lun.arbiter.registrations.values())


async def volume_of(lun: SimulatedLun) -> tuple[Superblock, fmt.View]:
    copy = SimulatedLun(SIZE, blocks=lun.blocks)
    async with await copy.login(InitiatorPort("iqn.2026-11.test:look", 9)) as device:
        superblock, trouble = await read_superblock(device)
        assert trouble is None
        return superblock, await read_view(device, superblock.volume_id)


async def assert_formatted(lun: SimulatedLun, superblock: Superblock) -> None:
    found, view = await volume_of(lun)
    assert found == superblock
    (key,) = registered(lun)
    assert is_newcomer(key)
    assert view.holder_key == key == lun.arbiter.read_reservation().key
    assert not lun.sessions


def state_of(lun: SimulatedLun) -> tuple[object, ...]:
    """What is on the LUN (the probe writes zeroes back where there were none), and who."""
    content = {address: block for address, block in lun.blocks.items() if any(block)}
    return content, sorted(registered(lun)), lun.arbiter.read_reservation().key


async def assert_refused(lun: SimulatedLun, wish: Formatter, kind: type[FormatRefused]) -> str:
    """Refused so, with nothing written, registered or reserved."""
    before, sessions = state_of(lun), len(lun.sessions)
    with pytest.raises(kind) as caught:
        await wish.run()
    assert state_of(lun) == before
    assert len(lun.sessions) == sessions
    return str(caught.value)


# -- the decision --------------------------------------------------------------------------------
def standing(*keys: int, holder: int = 0) -> Standing:
    held = ReservationType.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY if holder else ReservationType.NONE
    return Standing(RegisteredKeys(3, keys), Reservation(3, holder, held))


EMPTY = replace(fmt.View.empty(2, 3, secret=bytes(32)), holder_key=PARKED)
LISTED = EMPTY.with_slot(0, fmt.ViewSlot(7, fmt.SlotState.ACTIVE, node_name="omega"))


def test_nobody_is_in_nobodys_way() -> None:
    assert keys_in_the_way(standing(), None, force=False, preempt_keys=()) == ((), ())


@pytest.mark.parametrize("view", [EMPTY, LISTED, None])
@pytest.mark.parametrize("force", [False, True])
def test_force_overrides_a_parked_key_and_no_other(view: fmt.View | None, force: bool) -> None:
    who = standing(PARKED, STRANGER, holder=PARKED)
    in_the_way, victims = keys_in_the_way(who, view, force=force, preempt_keys=())
    parked = force and view is EMPTY
    assert victims == ((PARKED,) if parked else ())
    assert {key.key for key in in_the_way} == {STRANGER} | (set() if parked else {PARKED})


def test_a_named_key_is_overridden() -> None:
    who = standing(PARKED, STRANGER, PARKED)
    in_the_way, victims = keys_in_the_way(who, LISTED, force=False, preempt_keys=[PARKED])
    assert victims == (PARKED,)
    assert [key.key for key in in_the_way] == [STRANGER]


def test_whose_key_it_is_is_said() -> None:
    def words(key: int, view: fmt.View | None) -> str:
        ((only,), _) = keys_in_the_way(
            standing(key, holder=key), view, force=False, preempt_keys=()
        )
        return str(only)

    assert "omega has the volume mounted" in words(PARKED, LISTED)
    assert "--force overrides it" in words(PARKED, EMPTY)
    assert "another system" in words(STRANGER, EMPTY)
    assert "0x0000000000000abc (not a key of csvfs) holds the reservation" in words(STRANGER, None)
    assert "some csvfs" in words(PARKED, None)


def test_probe_flags_mean_on_disk_what_the_probe_meant() -> None:
    assert {flag.name: flag.value for flag in fmt.ProbeFlag} == {
        flag.name: flag.value for flag in probe_result.ProbeFlag
    }


# -- formatting ----------------------------------------------------------------------------------
async def test_an_empty_lun(autojump_clock: MockClock) -> None:
    lun = SimulatedLun(SIZE, faults=TGT)
    shown: list[str] = []
    probed: list[probe_result.ProbeResult] = []
    wish = replace(
        formatter(lun), show=lambda identity: shown.append(identity.serial), report=probed.append
    )
    superblock = await wish.run()
    await assert_formatted(lun, superblock)
    assert shown == [lun.identity.serial]
    assert superblock.probe == int(probed[0].flags)
    assert fmt.ProbeFlag.PROBED in superblock.probe
    assert fmt.ProbeFlag.FENCE_STOPS_WRITE in superblock.probe
    assert fmt.ProbeFlag.FENCE_STOPS_UNMAP not in superblock.probe
    assert superblock.unmap_allowed == (fmt.ProbeFlag.REINSTATEMENT_CLOSES in superblock.probe)


async def test_the_first_mount_succeeds_the_format_at_once(autojump_clock: MockClock) -> None:
    lun = SimulatedLun(SIZE)
    await formatter(lun).run()
    claim = await mounted(lun)
    await release_volume(claim)


@pytest.mark.parametrize("volatile", [False, True])
async def test_the_write_cache_is_noted(volatile: bool, autojump_clock: MockClock) -> None:
    lun = SimulatedLun(SIZE, volatile_cache=volatile)
    superblock = await formatter(lun).run()
    expected = WriteCache.VOLATILE if volatile else WriteCache.TARGET_SAYS_STABLE
    assert superblock.write_cache == expected


async def test_what_is_on_the_lun_is_named(autojump_clock: MockClock) -> None:
    lun = SimulatedLun(SIZE)
    lun.blocks[0] = b"XFSB".ljust(4096, b"\0")
    words = await assert_refused(lun, formatter(lun), LunOccupied)
    assert "XFS at byte 0" in words
    await assert_formatted(lun, await formatter(lun, force=True).run())


async def test_a_volume_that_was_left_is_overridden_by_force(autojump_clock: MockClock) -> None:
    lun = SimulatedLun(SIZE)
    old = await formatter(lun).run()
    for mount in (False, True):
        if mount:
            await release_volume(await mounted(lun))
        words = await assert_refused(lun, formatter(lun), LunOccupied)
        assert 'csvfs volume "new" at byte 0' in words
        new = await replace(formatter(lun, force=True), rng=Random(mount + 7)).run()
        assert new.volume_id != old.volume_id
        await assert_formatted(lun, new)


async def test_a_mounted_volume_is_never_overridden_by_force(autojump_clock: MockClock) -> None:
    lun = SimulatedLun(SIZE)
    await formatter(lun).run()
    claim = await mounted(lun)
    words = await assert_refused(lun, formatter(lun, force=True), KeysInTheWay)
    assert words.count("alpha has the volume mounted") == 2
    await claim.data.device.write(SIZE // 2, bytes(4096))
    claim.abort()
    await assert_refused(lun, formatter(lun, force=True), KeysInTheWay)
    await assert_refused(lun, formatter(lun, claim.control.key, force=True), KeysInTheWay)
    await assert_refused(lun, formatter(lun, claim.control.key, claim.data.key), LunOccupied)
    wish = formatter(lun, claim.control.key, claim.data.key, force=True)
    await assert_formatted(lun, await wish.run())


@pytest.mark.parametrize("reserve", [False, True])
async def test_a_stranger_is_refused_by_name(reserve: bool, autojump_clock: MockClock) -> None:
    lun = SimulatedLun(SIZE)
    async with stranger(lun, reserve=reserve):
        before = lun.arbiter.generation
        words = await assert_refused(lun, formatter(lun, force=True), KeysInTheWay)
        assert "0x0000000000000abc" in words
        assert lun.arbiter.generation == before, "not even registered"
    await assert_refused(lun, formatter(lun, force=True), KeysInTheWay)
    await assert_formatted(lun, await formatter(lun, STRANGER).run())


async def test_a_late_write_of_a_preempted_key_lands_before_the_format(
    autojump_clock: MockClock,
) -> None:
    lun = SimulatedLun(SIZE)
    async with stranger(lun, reserve=True) as device:
        hold = lun.hold(lambda command: command.data.startswith(b"SLOW"))

        async def write() -> None:
            with pytest.raises(BlockError):
                await device.write(0, b"SLOW" * 1024)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await hold.wait_held()
            device.abort()
        superblock = await formatter(lun, STRANGER).run()
        assert not hold.commands
        await assert_formatted(lun, superblock)


async def test_a_target_whose_arbiter_does_not_hold(autojump_clock: MockClock) -> None:
    lun = SimulatedLun(SIZE, faults=Faults(ArbiterHabits(leaks=frozenset({Op.WRITE}))))
    words = await assert_refused(lun, formatter(lun), UnfitTarget)
    assert "must not be used" in words


async def test_somebody_who_comes_during_the_probe_is_found(autojump_clock: MockClock) -> None:
    lun = SimulatedLun(SIZE)
    came: list[int] = []

    def come(result: probe_result.ProbeResult) -> None:
        nexus = 9999
        lun.arbiter.open(nexus)
        lun.arbiter.register(nexus, STRANGER, 0)
        came.append(nexus)

    wish = replace(formatter(lun), report=come)
    with pytest.raises(KeysInTheWay, match="abc"):
        await wish.run()
    assert registered(lun) == [STRANGER]
    assert not any(any(block) for block in lun.blocks.values())


@pytest.mark.parametrize(
    "options", [FormatOptions(label="x" * 99), FormatOptions(label="v", slots=64)]
)
async def test_bad_options_are_found_before_anything_is_done(
    options: FormatOptions, autojump_clock: MockClock
) -> None:
    lun = SimulatedLun(SIZE)
    with pytest.raises(ValueError, match=r"label|slots"):
        await replace(formatter(lun), options=options).run()
    assert lun.arbiter.generation == 0
    assert lun.journal.writes == 0


@pytest.mark.parametrize("landed", [False, True])
async def test_cut_off_at_any_command_the_next_format_succeeds(
    landed: bool, autojump_clock: MockClock
) -> None:
    number, done = 0, False
    while not done:
        number += 7
        lun = SimulatedLun(SIZE, seed=number)
        left = number

        def cut(command: Command, lun: SimulatedLun = lun) -> bool:
            nonlocal left
            left -= 1
            if left == 0:
                if not landed:
                    lun.lose_answer(lambda other: other is command, landed=False)
                lun.disconnect()
            return False

        lun.inject(cut, BlockError)
        try:
            await formatter(lun).run()
            done, left = left > 0, 0
        except BlockError:
            pass
        lun.reconnect()
        wish = replace(formatter(lun, *registered(lun), force=True), rng=Random(6))
        await assert_formatted(lun, await wish.run())
    assert number > 50
