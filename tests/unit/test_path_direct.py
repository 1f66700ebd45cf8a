"""The direct path on a simulated LUN: each kind of loss, each kind of answer."""

# ruff: noqa: ARG001 (a clock does its work by being asked for)

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock

from redirector.block.arbiter import ArbiterHabits, Op
from redirector.block.device import (
    IllegalRequest,
    InitiatorPort,
    MediumError,
    SpaceExhausted,
    TargetBusy,
    UnitAttention,
)
from redirector.block.keys import PathKey, newcomer_key
from redirector.block.medium import keep_none
from redirector.block.reservations import Registration
from redirector.block.simulated import Command, Faults, SimulatedDevice, SimulatedLun
from redirector.path import DirectPath, Evicted
from tests.unit.one_node import BLOCK, CONTROL, CONTROL_PORT, DATA_PORT, OneView, open_path, port

SIZE = 16 << 20


def block(letter: bytes) -> bytes:
    return letter * BLOCK


def session_of(lun: SimulatedLun, owner: InitiatorPort) -> SimulatedDevice:
    device = next(device for device in lun.sessions.values() if device.port == owner)
    assert isinstance(device, SimulatedDevice)
    return device


def data_of(lun: SimulatedLun) -> SimulatedDevice:
    return session_of(lun, DATA_PORT)


def is_op(op: Op) -> Callable[[Command], bool]:
    return lambda command: command.op is op


def written_with(letter: bytes) -> Callable[[Command], bool]:
    return lambda command: command.op is Op.WRITE and command.data[:1] == letter


async def settled(path: DirectPath) -> None:
    with trio.fail_after(600):
        await path._keeper.wait_healthy()


def assert_two_own_keys(lun: SimulatedLun, path: DirectPath) -> None:
    status = path.status()
    assert sorted(lun.arbiter.read_keys().keys) == sorted([status.control_key, status.data_key])
    assert lun.arbiter.read_reservation().key == status.control_key
    assert len(lun.sessions) == 2
    lun.check()


# -- while all is well -----------------------------------------------------------------------------
async def test_healthy_path_is_a_block_device() -> None:
    lun = SimulatedLun(SIZE)
    async with open_path(lun) as path:
        await path.write(BLOCK, block(b"a"))
        await path.write(2 * BLOCK, block(b"b"), fua=True)
        await path.flush()
        assert await path.read(BLOCK, 2 * BLOCK) == block(b"a") + block(b"b")
        await path.unmap([(BLOCK, BLOCK)])
        assert await path.read(2 * BLOCK, BLOCK) == block(b"b")
        assert path.identity == lun.identity
        status = path.status()
        assert status.healthy
        assert status.recoveries == 0
        with pytest.raises(ValueError, match="blocks"):
            await path.write(1, block(b"x"))
        with pytest.raises(IllegalRequest):
            await path.read(SIZE, BLOCK)


async def test_what_is_no_loss_is_passed_up() -> None:
    lun = SimulatedLun(SIZE)
    async with open_path(lun) as path:
        lun.medium_errors = [range(BLOCK, BLOCK + 512)]
        with pytest.raises(MediumError):
            await path.read(0, 4 * BLOCK)
        await path.write(BLOCK, block(b"h"))
        assert await path.read(BLOCK, BLOCK) == block(b"h")
        lun.space_exhausted = True
        with pytest.raises(SpaceExhausted):
            await path.write(64 * BLOCK, block(b"s"))
        await path.write(BLOCK, block(b"i"))
        lun.space_exhausted = False
        await path.write(64 * BLOCK, block(b"s"))
        assert path.status().healthy


async def test_busy_and_aborted_commands_go_again(autojump_clock: MockClock) -> None:
    lun = SimulatedLun(SIZE)
    async with open_path(lun) as path:
        for op in (Op.WRITE, Op.READ, Op.SYNCHRONIZE_CACHE, Op.UNMAP):
            lun.inject(is_op(op), lambda what: TargetBusy(what, status=0x28), times=12)
        await path.write(0, block(b"a"))
        await path.flush()
        assert await path.read(0, BLOCK) == block(b"a")
        await path.unmap([(0, BLOCK)])
        assert path.status().recoveries == 0


async def test_resets_of_others_are_no_loss(autojump_clock: MockClock) -> None:
    lun = SimulatedLun(SIZE, faults=Faults(reset_aborts=True))
    async with open_path(lun) as path:
        hold = lun.hold(written_with(b"w"), limit=3)
        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(path.write, number * BLOCK, block(b"w"))
            await hold.wait_held(3)
            await lun.reset()
        assert await path.read(0, 3 * BLOCK) == block(b"w") * 3
        for _ in range(5):
            await lun.reset()
            async with trio.open_nursery() as nursery:
                for number in range(8):
                    nursery.start_soon(path.write, number * BLOCK, block(b"x"))
                nursery.start_soon(path.flush)
        assert path.status().recoveries == 0
        assert path.status().data_key == PathKey(3, 9, 2).pack()


async def test_a_strangers_legacy_reservation_is_reset(autojump_clock: MockClock) -> None:
    lun = SimulatedLun(SIZE)
    async with open_path(lun) as path:
        stranger = await lun.login(port(7))
        lun.arbiter.reserve_legacy(stranger.nexus)
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(path.write, number * BLOCK, block(b"y"))
        assert await path.read(0, 4 * BLOCK) == block(b"y") * 4
        assert path.status().data_key == PathKey(3, 9, 2).pack()


# -- losses ----------------------------------------------------------------------------------------
async def test_loss_of_the_data_session_with_writes_on_their_way(
    autojump_clock: MockClock,
) -> None:
    lun, view = SimulatedLun(SIZE), OneView()
    async with open_path(lun, view) as path:
        hold = lun.hold(written_with(b"l"), limit=8)
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(path.write, number * BLOCK, block(b"l"))
            await hold.wait_held(8)
            data_of(lun).abort()
            # Waits for the path; then reads what was written again.
            await path.write(100 * BLOCK, block(b"o"))
        await settled(path)
        assert await path.read(0, 8 * BLOCK) == block(b"l") * 8
        assert await path.read(100 * BLOCK, BLOCK) == block(b"o")
        assert view.moves == [(CONTROL, PathKey(3, 9, 3).pack())]
        assert path.status().recoveries == 1
        assert_two_own_keys(lun, path)


async def test_late_writes_never_land_on_top_of_newer_ones(autojump_clock: MockClock) -> None:
    """The target keeps an old write and lands it when it likes: the fence waits for that."""
    lun = SimulatedLun(SIZE)
    lun.drains_wait()
    async with open_path(lun) as path:
        hold = lun.hold(written_with(b"o"), limit=1)
        done = []

        async def old_then_new() -> None:
            await path.write(0, block(b"o"))
            done.append(trio.current_time())
            await path.write(0, block(b"n"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(old_then_new)
            await hold.wait_held()
            data_of(lun).abort()
            await trio.sleep(7)
            assert not done
            hold.land()
        await settled(path)
        await lun.reset()
        assert await path.read(0, BLOCK) == block(b"n")


async def test_newer_overlapping_commands_wait_for_a_repeated_one(
    autojump_clock: MockClock,
) -> None:
    lun = SimulatedLun(SIZE)
    async with open_path(lun) as path:
        first = lun.hold(written_with(b"r"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(path.write, 0, block(b"r") + block(b"r"))
            await first.wait_held()
            data_of(lun).abort()
            await settled(path)
            await first.wait_held()  # sent again, and held again
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


async def test_loss_of_the_control_session_lets_data_flow(autojump_clock: MockClock) -> None:
    lun, view = SimulatedLun(SIZE), OneView()
    async with open_path(lun, view) as path:
        lun.disconnect(lambda login: login == CONTROL_PORT)
        for number in range(20):
            await path.write(number * BLOCK, block(b"d"))
            await trio.sleep(0.1)
        assert not path.status().healthy
        assert path.control is None
        lun.reconnect()
        await settled(path)
        assert view.moves == [(PathKey(3, 9, 3).pack(), PathKey(3, 9, 2).pack())]
        assert path.control is not None
        assert_two_own_keys(lun, path)


async def test_loss_of_everything_for_a_while(autojump_clock: MockClock) -> None:
    lun, view = SimulatedLun(SIZE), OneView()
    view.writes_on_move = True
    async with open_path(lun, view) as path:
        async with trio.open_nursery() as nursery:
            lun.disconnect()
            for number in range(1, 9):
                nursery.start_soon(path.write, number * BLOCK, block(b"e"))
            nursery.start_soon(path.flush)
            nursery.start_soon(path.read, 0, BLOCK)
            await trio.sleep(300)
            assert not path.status().healthy
            lun.reconnect()
        await settled(path)
        assert await path.read(BLOCK, 8 * BLOCK) == block(b"e") * 8
        assert_two_own_keys(lun, path)
        # No generation was wasted on logins that failed.
        assert path.status().data_key == PathKey(3, 9, 4).pack()


async def test_a_frozen_reader_of_the_own_is_reinstated(autojump_clock: MockClock) -> None:
    """The connection is half open: the target still waits for us to read."""
    lun = SimulatedLun(SIZE)
    async with open_path(lun) as path:
        hold = lun.hold(lambda command: command.op is Op.READ, limit=2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(path.read, 0, BLOCK)
            nursery.start_soon(path.read, BLOCK, BLOCK)
            await hold.wait_held(2)
            device = data_of(lun)
            device.freeze()
            device.set_lost()
            start = trio.current_time()
        await settled(path)
        assert trio.current_time() - start < 1


@pytest.mark.parametrize("follow", [False, True], ids=["session", "port"])
@pytest.mark.parametrize("power_lost", [False, True])
async def test_restart_of_the_target_loses_nothing(
    autojump_clock: MockClock, power_lost: bool, follow: bool
) -> None:
    lun = SimulatedLun(SIZE, faults=Faults(registrations_follow_port=follow))
    async with open_path(lun) as path:
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
        await settled(path)
        assert_two_own_keys(lun, path)


async def test_without_a_volatile_cache_nothing_is_retained(autojump_clock: MockClock) -> None:
    lun = SimulatedLun(SIZE, volatile_cache=False)
    async with open_path(lun) as path:
        await path.write(0, block(b"x"))
        assert path.status().retained_bytes == 0
        lun.restart()
        assert await path.read(0, BLOCK) == block(b"x")


async def test_retained_writes_are_flushed_in_time(autojump_clock: MockClock) -> None:
    lun = SimulatedLun(256 << 20)
    async with open_path(lun) as path:
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


# -- the end ---------------------------------------------------------------------------------------
async def test_eviction_ends_everything_that_waits(autojump_clock: MockClock) -> None:
    lun, view = SimulatedLun(SIZE), OneView()
    async with open_path(lun, view) as path:
        view.listed = False
        failures = []

        async def fail(command: Callable[[], object]) -> None:
            with pytest.raises(Evicted) as caught:
                await command()  # type: ignore[misc]  # a coroutine function
            failures.append(str(caught.value))

        hold = lun.hold(written_with(b"v"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail, lambda: path.write(0, block(b"v")))
            await hold.wait_held()
            lun.disconnect()
            nursery.start_soon(fail, lambda: path.read(0, BLOCK))
            nursery.start_soon(fail, path.flush)
            nursery.start_soon(fail, lambda: path.unmap([(0, BLOCK)]))
            await trio.sleep(5)
            lun.reconnect()
        assert len(failures) == 4
        assert "member list" in failures[0]
        await fail(lambda: path.write(0, block(b"v")))
        assert "member list" in str(await path.wait_evicted())
        assert lun.sessions == {}


async def test_a_stranger_who_took_over_evicts_us(autojump_clock: MockClock) -> None:
    lun, view = SimulatedLun(SIZE), OneView()
    async with open_path(lun, view) as path:
        stranger = await Registration.register(await lun.login(port(5)), newcomer_key(lun.rng))
        await stranger.take(CONTROL)
        await stranger.preempt(path.status().data_key)
        with pytest.raises(Evicted, match="taken the volume over"):
            await path.write(0, block(b"e"))
        await stranger.ask(lambda: stranger.device.write(0, block(b"s")))
        with pytest.raises(Evicted):
            await path.read(0, BLOCK)
        assert lun.blocks[0] == block(b"s")
        assert not path.status().healthy


async def test_preempted_data_key_alone_is_a_lost_path(autojump_clock: MockClock) -> None:
    lun = SimulatedLun(SIZE)
    async with open_path(lun) as path:
        assert path.control is not None
        await path.control.preempt(path.status().data_key)
        await path.write(0, block(b"p"))
        await settled(path)
        assert_two_own_keys(lun, path)
        assert path.status().data_key == PathKey(3, 9, 3).pack()


async def test_another_lun_at_the_same_place_is_not_written(autojump_clock: MockClock) -> None:
    lun = SimulatedLun(SIZE, seed=1)
    async with open_path(lun) as path:
        known, lun.identity = lun.identity, SimulatedLun(SIZE, seed=2).identity
        lun.restart()
        with trio.move_on_after(60) as scope:
            await path.write(0, block(b"w"))
        assert scope.cancelled_caught
        assert "another LUN" in path.status().trouble
        assert lun.blocks == {}
        lun.identity = known
        await path.write(0, block(b"w"))


async def test_detach_hands_back_two_good_sessions(autojump_clock: MockClock) -> None:
    lun = SimulatedLun(SIZE)
    async with open_path(lun) as path:
        await path.write(0, block(b"d"))
        data_of(lun).abort()
        control, data = await path.detach()
        with pytest.raises(Evicted, match="given up"):
            await path.read(0, BLOCK)
        await data.unregister()
        await data.device.aclose()
        await control.ask(lambda: control.device.write(0, block(b"z"), fua=True))
        await control.device.aclose()
        assert lun.arbiter.read_keys().keys == (control.key,)
    assert lun.arbiter.read_reservation().key == CONTROL


async def test_cancelled_writers_leave_and_the_path_lives_on(autojump_clock: MockClock) -> None:
    lun = SimulatedLun(SIZE)
    async with open_path(lun) as path:
        lun.disconnect()
        with trio.move_on_after(3):
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(path.write, 0, block(b"c"))
        assert not path._repeats.ranges
        lun.reconnect()
        await path.write(0, block(b"k"))
        assert await path.read(0, BLOCK) == block(b"k")


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
    """Whatever command the second loss hits, on whichever session: everything is there."""
    for skip in range(40):
        lun, view = SimulatedLun(SIZE, faults=faults), OneView()
        view.writes_on_move = True
        async with open_path(lun, view) as path:
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
                for owner in (DATA_PORT, CONTROL_PORT)[: 1 + skip % 2]:
                    session_of(lun, owner).abort()
            await path.flush()
            await settled(path)
            assert await path.read(BLOCK, 2 * BLOCK) == block(b"m") * 2
            assert_two_own_keys(lun, path)
            assert view.moves[-1] == (path.status().control_key, path.status().data_key)


async def test_attentions_in_the_middle_of_a_recovery(autojump_clock: MockClock) -> None:
    for skip in range(30):
        lun = SimulatedLun(SIZE)
        async with open_path(lun) as path:
            count = [skip]

            def nth(command: Command, count: list[int] = count) -> bool:
                count[0] -= 1
                return count[0] in (-1, -2)

            lun.inject(nth, lambda what: UnitAttention(what, sense_key=6, asc_ascq=0x2900), times=2)
            lun.disconnect()
            lun.reconnect()
            await path.write(0, block(b"a"))
            await settled(path)
            assert_two_own_keys(lun, path)
