"""Each kind of loss, with a membership that opens, fences and proves by itself."""

# ruff: noqa: ARG001 (a clock does its work by being asked for)

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock

from redirector.block.arbiter import ArbiterHabits, Op
from redirector.block.device import UnitAttention
from redirector.block.medium import keep_none
from redirector.block.reservations import Registration
from redirector.block.simulated import Command, Faults, SimulatedDevice
from redirector.data_path import DataPath
from tests.unit.told_path import BLOCK, DATA_PORT, Membership, ToldLun, told_path

SIZE = 16 << 20


def block(letter: bytes) -> bytes:
    return letter * BLOCK


def session(told: Membership) -> Registration:
    assert told.session is not None
    return told.session


def device(told: Membership) -> SimulatedDevice:
    found = session(told).device
    assert isinstance(found, SimulatedDevice)
    return found


def written_with(letter: bytes) -> Callable[[Command], bool]:
    return lambda command: command.op is Op.WRITE and command.data[:1] == letter


async def settled(path: DataPath) -> None:
    with trio.fail_after(600):
        while not path.status().flows:  # noqa: ASYNC110 (what an admin sees)
            await trio.sleep(0.01)
    path.check()


async def test_loss_with_writes_on_their_way(autojump_clock: MockClock) -> None:
    lun = ToldLun(SIZE)
    async with told_path(lun) as (path, told):
        hold = lun.hold(written_with(b"l"), limit=8)
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(path.write, number * BLOCK, block(b"l"))
            await hold.wait_held(8)
            device(told).abort()
            await path.write(100 * BLOCK, block(b"o"))
        assert await path.read(0, 8 * BLOCK) == block(b"l") * 8
        assert await path.read(100 * BLOCK, BLOCK) == block(b"o")
        assert path.status().losses == 1
        assert told.proofs == 2


async def test_late_writes_never_land_on_top_of_newer_ones(autojump_clock: MockClock) -> None:
    """The target keeps an old write and lands it when it likes: the fence waits for that."""
    lun = ToldLun(SIZE)
    lun.drains_wait()
    async with told_path(lun) as (path, told):
        hold = lun.hold(written_with(b"o"), limit=1)
        done = []

        async def old_then_new() -> None:
            await path.write(0, block(b"o"))
            done.append(trio.current_time())
            await path.write(0, block(b"n"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(old_then_new)
            await hold.wait_held()
            device(told).abort()
            await trio.sleep(7)
            assert not done
            hold.land()
        await lun.reset()
        assert await path.read(0, BLOCK) == block(b"n")


async def test_newer_overlapping_commands_wait_for_a_repeated_one(
    autojump_clock: MockClock,
) -> None:
    lun = ToldLun(SIZE)
    async with told_path(lun) as (path, told):
        first = lun.hold(written_with(b"r"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(path.write, 0, block(b"r") + block(b"r"))
            await first.wait_held()
            device(told).abort()
            await trio.sleep(1)
            await settled(path)
            await first.wait_held()  # sent again, and held again
            assert path.status().repeating == 1
            nursery.start_soon(path.write, BLOCK, block(b"n"))
            nursery.start_soon(path.unmap, [(0, BLOCK)])
            await path.write(2 * BLOCK, block(b"f"))  # elsewhere: goes at once
            assert await path.read(2 * BLOCK, BLOCK) == block(b"f")
            with trio.move_on_after(5) as scope:
                await path.read(0, BLOCK)
            assert scope.cancelled_caught, "a read waits too"
            assert lun.blocks[1] == block(b"r"), "landed by the drain"
            first.lift()
        assert await path.read(BLOCK, BLOCK) == block(b"n")


async def test_loss_of_everything_for_a_while(autojump_clock: MockClock) -> None:
    lun = ToldLun(SIZE)
    async with told_path(lun) as (path, _):
        async with trio.open_nursery() as nursery:
            lun.disconnect()
            for number in range(1, 9):
                nursery.start_soon(path.write, number * BLOCK, block(b"e"))
            nursery.start_soon(path.flush)
            nursery.start_soon(path.read, 0, BLOCK)
            await trio.sleep(300)
            assert not path.status().flows
            lun.reconnect()
        assert await path.read(BLOCK, 8 * BLOCK) == block(b"e") * 8


async def test_preempted_by_another_and_still_a_member(autojump_clock: MockClock) -> None:
    lun = ToldLun(SIZE)
    async with told_path(lun) as (path, told):
        await path.write(0, block(b"1"))
        await told.coordinator.fence((session(told).key,))
        await path.write(BLOCK, block(b"2"))
        assert await path.read(0, 2 * BLOCK) == block(b"1") + block(b"2")
        assert "preempted" in told.closed[0]
        assert path.status().losses == 1


async def test_a_key_that_vanished_without_a_word(autojump_clock: MockClock) -> None:
    """A conflict and no own key among those registered: the target may have restarted."""
    lun = ToldLun(SIZE)
    async with told_path(lun) as (path, told):
        await path.write(0, block(b"1"))
        lun.arbiter.registrations.pop(device(told).nexus)
        async with trio.open_nursery() as nursery:
            for number in range(1, 9):
                nursery.start_soon(path.write, number * BLOCK, block(b"2"))
        assert await path.read(0, 2 * BLOCK) == block(b"1") + block(b"2")
        assert "not registered" in told.closed[0]
        assert len(told.closed) == 1


async def test_a_frozen_reader_of_the_own_is_reinstated(autojump_clock: MockClock) -> None:
    """The connection is half open: the target still waits for us to read."""
    lun = ToldLun(SIZE)
    async with told_path(lun) as (path, told):
        hold = lun.hold(lambda command: command.op is Op.READ, limit=2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(path.read, 0, BLOCK)
            nursery.start_soon(path.read, BLOCK, BLOCK)
            await hold.wait_held(2)
            found = device(told)
            found.freeze()
            found.set_lost()
            start = trio.current_time()
        assert trio.current_time() - start < 1


@pytest.mark.parametrize("follow", [False, True], ids=["session", "port"])
@pytest.mark.parametrize("power_lost", [False, True])
async def test_restart_of_the_target_loses_nothing(
    autojump_clock: MockClock, power_lost: bool, follow: bool
) -> None:
    lun = ToldLun(SIZE, faults=Faults(registrations_follow_port=follow))
    async with told_path(lun) as (path, _):
        await path.write(0, block(b"1"))
        await path.flush()
        for number in range(50):
            await path.write(number * BLOCK, block(b"2"))
            await path.write(number * BLOCK, block(b"3"), fua=number % 3 == 0)
        assert path.status().retained_bytes == 100 * BLOCK
        lun.restart(power_lost=power_lost, keep=keep_none)
        await path.flush()
        assert path.status().retained_bytes == 0
        after = lun.crashed(keep=keep_none)
        assert b"".join(after.blocks[number] for number in range(50)) == block(b"3") * 50


async def test_what_fua_made_stable_is_never_older_again(autojump_clock: MockClock) -> None:
    """The target restarts, and then this host dies, wherever it is in writing again."""
    for survives in range(1, 12):
        lun = ToldLun(SIZE, record=True)
        async with told_path(lun) as (path, _):
            for number in range(4):
                await path.write(number * BLOCK, block(b"1"))
                await path.write(number * BLOCK, block(b"2"), fua=True)
            lun.restart(power_lost=True, keep=keep_none)
            lun.crash_after_writes(survives)
            with trio.move_on_after(5):
                await path.flush()
            after = lun.crashed(keep=lambda _: True)
            for number in range(4):
                assert after.blocks[number] == block(b"2")


async def test_retained_writes_are_flushed_in_time(autojump_clock: MockClock) -> None:
    lun = ToldLun(256 << 20)
    async with told_path(lun) as (path, _):
        await path.write(0, block(b"x"))
        await trio.sleep(1.1)
        assert path.status().retained_bytes == 0
        hold = lun.hold(lambda command: command.op is Op.SYNCHRONIZE_CACHE)
        with trio.move_on_after(0.5) as scope:
            for number in range(200):
                await path.write(number << 20, bytes(1 << 20))
        assert scope.cancelled_caught, "a writer waits while too much is retained"
        assert path.status().retained_bytes <= 65 << 20
        hold.lift()
        await path.write(0, bytes(1 << 20))


@pytest.mark.parametrize("landed", [False, True], ids=["lost", "landed"])
@pytest.mark.parametrize(
    "faults",
    [
        Faults(),
        Faults(registrations_follow_port=True),
        Faults(reset_aborts=True),
        Faults(ArbiterHabits(checks_keys=True)),
    ],
    ids=["good", "port", "aborts", "keys"],
)
async def test_losses_in_the_middle_of_a_recovery(
    autojump_clock: MockClock, faults: Faults, landed: bool
) -> None:
    """Whatever command the second loss hits, of this host or of the coordinator."""
    for skip in range(40):
        lun = ToldLun(SIZE, faults=faults)
        async with told_path(lun) as (path, told):
            await path.write(BLOCK, block(b"0"))
            hold = lun.hold(written_with(b"m"), limit=2)
            async with trio.open_nursery() as nursery:
                for number in (1, 2):
                    nursery.start_soon(path.write, number * BLOCK, block(b"m"))
                await hold.wait_held(2)
                count = [skip]

                def nth(command: Command, count: list[int] = count) -> bool:
                    count[0] -= 1
                    return count[0] == -1

                lun.lose_answer(nth, landed=landed)
                device(told).abort()
            await path.flush()
            await settled(path)
            assert await path.read(BLOCK, 2 * BLOCK) == block(b"m") * 2
            lun.check()


async def test_attentions_in_the_middle_of_a_recovery(autojump_clock: MockClock) -> None:
    for skip in range(30):
        lun = ToldLun(SIZE)
        async with told_path(lun) as (path, _):
            await path.write(BLOCK, block(b"0"))
            count = [skip]

            def nth(command: Command, count: list[int] = count) -> bool:
                count[0] -= 1
                return count[0] in (-1, -2)

            lun.inject(nth, lambda what: UnitAttention(what, sense_key=6, asc_ascq=0x2900), times=2)
            lun.disconnect(lambda login: login == DATA_PORT)
            lun.reconnect()
            await path.write(0, block(b"a"))
            assert await path.read(0, 2 * BLOCK) == block(b"a") + block(b"0")
