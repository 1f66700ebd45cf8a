"""The data path as the membership tells it: what flows after which words, and what is answered."""

# ruff: noqa: ARG001 (a clock does its work by being asked for)

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from redirector.block.arbiter import Op
from redirector.block.device import (
    IllegalRequest,
    MediumError,
    SpaceExhausted,
    TargetBusy,
    UnitAttention,
)
from redirector.block.medium import keep_none
from redirector.block.simulated import Command, Faults, SimulatedDevice
from redirector.data_path import DataPath, Evicted
from tests.unit.told_path import (
    BLOCK,
    DATA_PORT,
    Membership,
    ToldLun,
    nexus_of,
    port,
    told_path,
)

SIZE = 16 << 20


def block(letter: bytes) -> bytes:
    return letter * BLOCK


def is_op(op: Op) -> Callable[[Command], bool]:
    return lambda command: command.op is op and command.port == DATA_PORT


def written_with(letter: bytes) -> Callable[[Command], bool]:
    return lambda command: command.op is Op.WRITE and command.data[:1] == letter


async def next_session(told: Membership, *, restarted: bool = False) -> None:
    """All the steps after a loss, one by one."""
    registration, _ = await told.open()
    told.use(registration, restarted=restarted)
    await told.prove()
    told.ready(registration)


def lose(told: Membership) -> None:
    assert told.session is not None
    told.drop(told.session, "lost by the test")


# -- while all is well -----------------------------------------------------------------------------
async def test_healthy_path_is_a_block_device() -> None:
    lun = ToldLun(SIZE)
    async with told_path(lun) as (path, _):
        await path.write(BLOCK, block(b"a"))
        await path.write(2 * BLOCK, block(b"b"), fua=True)
        await path.flush()
        assert await path.read(BLOCK, 2 * BLOCK) == block(b"a") + block(b"b")
        await path.unmap([(BLOCK, BLOCK)])
        assert await path.read(2 * BLOCK, BLOCK) == block(b"b")
        assert path.identity == lun.identity
        status = path.status()
        assert status.flows
        assert status.answers
        assert not status.trouble
        assert status.losses == 0
        with pytest.raises(ValueError, match="blocks"):
            await path.write(1, block(b"x"))
        with pytest.raises(IllegalRequest):
            await path.read(SIZE, BLOCK)


async def test_what_is_no_loss_is_passed_up() -> None:
    lun = ToldLun(SIZE)
    async with told_path(lun) as (path, told):
        lun.medium_errors = [range(BLOCK, BLOCK + 512)]
        with pytest.raises(MediumError):
            await path.read(0, 4 * BLOCK)
        await path.write(BLOCK, block(b"h"))
        lun.space_exhausted = True
        with pytest.raises(SpaceExhausted):
            await path.write(64 * BLOCK, block(b"s"))
        lun.space_exhausted = False
        await path.write(64 * BLOCK, block(b"s"))
        assert path.status().repeating == 0
        assert not told.closed


async def test_busy_and_attentions_are_no_loss(autojump_clock: MockClock) -> None:
    lun = ToldLun(SIZE, faults=Faults(reset_aborts=True))
    async with told_path(lun) as (path, told):
        for op in (Op.WRITE, Op.READ, Op.SYNCHRONIZE_CACHE, Op.UNMAP):
            lun.inject(is_op(op), lambda what: TargetBusy(what, status=0x28), times=12)
        hold = lun.hold(written_with(b"w"), limit=3)
        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(path.write, number * BLOCK, block(b"w"))
            await hold.wait_held(3)
            await lun.reset()  # somebody else's
        await path.flush()
        assert await path.read(0, 3 * BLOCK) == block(b"w") * 3
        await path.unmap([(0, BLOCK)])
        lun.inject(
            is_op(Op.WRITE), lambda what: UnitAttention(what, sense_key=6, asc_ascq=0x2A04), times=3
        )
        await path.write(0, block(b"u"))
        assert not told.closed


async def test_a_strangers_legacy_reservation_is_told(autojump_clock: MockClock) -> None:
    lun = ToldLun(SIZE)
    async with told_path(lun) as (path, told):
        stranger = await lun.login(port(7))
        lun.arbiter.reserve_legacy(stranger.nexus)
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(path.write, number * BLOCK, block(b"y"))
        assert await path.read(0, 4 * BLOCK) == block(b"y") * 4
        assert told.strangers == 1, "told once, not by each command"
        assert not told.closed


async def test_a_stranger_that_stays_is_told_again(autojump_clock: MockClock) -> None:
    lun = ToldLun(SIZE)
    async with told_path(lun, serve=False) as (path, told):
        stranger = await lun.login(port(7))
        lun.arbiter.reserve_legacy(stranger.nexus)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(path.write, 0, block(b"y"))
            await trio.sleep(10)
            assert 10 <= told.strangers <= 20
            await lun.reset()


# -- what flows when -------------------------------------------------------------------------------
async def test_nothing_flows_before_ready(autojump_clock: MockClock) -> None:
    lun = ToldLun(SIZE)
    async with told_path(lun, serve=False) as (path, told):
        lose(told)
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(path.write, number * BLOCK, block(b"n"))
            nursery.start_soon(path.flush)
            registration, _ = await told.open()
            told.use(registration)
            await trio.sleep(60)
            assert lun.blocks == {}
            assert "proof" in path.status().trouble
            await told.prove()
            told.ready(registration)
        assert len(lun.blocks) == 4


async def test_what_is_told_late_changes_nothing(autojump_clock: MockClock) -> None:
    """A proof for, or the loss of, a session that is not in use any more."""
    lun = ToldLun(SIZE)
    async with told_path(lun, serve=False) as (path, told):
        first = told.session
        assert first is not None
        path.lost(first, "only told")
        assert first.device.lost, "its commands end"
        lose(told)
        second, _ = await told.open()
        told.use(second)
        lose(told)
        third, _ = await told.open()
        told.use(third)
        path.ready(first)
        path.ready(second)
        with trio.move_on_after(5) as scope:
            await path.write(0, block(b"t"))
        assert scope.cancelled_caught
        await told.prove()
        told.ready(third)
        path.lost(first, "late")
        path.lost(second, "late")
        path.ready(second)
        await path.write(0, block(b"t"))
        assert path.status().key == third.key
        assert path.status().losses == 2


async def test_ready_may_come_while_commands_of_the_lost_session_are_ending(
    autojump_clock: MockClock,
) -> None:
    """They end first: then the ranges of what goes again are known, and newer commands wait."""
    lun = ToldLun(SIZE)
    async with told_path(lun, serve=False) as (path, told):
        hold = lun.hold(written_with(b"o"), limit=8)
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(path.write, number * BLOCK, block(b"o"))
            await hold.wait_held(8)
            lose(told)
            await next_session(told)
            path.check()
            await path.write(3 * BLOCK, block(b"n"))
        assert await path.read(0, 8 * BLOCK) == block(b"o") * 3 + block(b"n") + block(b"o") * 4


async def test_nothing_flows_while_a_command_of_the_lost_session_has_not_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its range is not noted yet: a newer write of the same bytes could be overtaken."""
    lun = ToldLun(SIZE)
    async with told_path(lun, serve=False) as (path, told):
        hold = lun.hold(written_with(b"o"))
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(path.write, number * BLOCK, block(b"o"))
            await hold.wait_held(8)
            assert told.session is not None
            slow = told.session.device
            assert isinstance(slow, SimulatedDevice)
            with monkeypatch.context() as patch:
                patch.setattr(slow, "set_lost", lambda: None)
                lose(told)
                registration, _ = await told.open()
                told.use(registration)
                lun.ready_nexus = nexus_of(registration.device)
                path.ready(registration)
                await wait_all_tasks_blocked()
                assert not path.status().flows
            for number in range(8):
                nursery.start_soon(path.write, number * BLOCK, block(b"n"))
            await wait_all_tasks_blocked()
            slow.set_lost()
            await wait_all_tasks_blocked()
            hold.lift()
        assert await path.read(0, 8 * BLOCK) == block(b"n") * 8


async def test_another_session_takes_the_place_of_one_that_was_not_lost() -> None:
    lun = ToldLun(SIZE)
    async with told_path(lun, serve=False) as (path, told):
        first = told.session
        assert first is not None
        hold = lun.hold(written_with(b"a"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(path.write, 0, block(b"a"))
            await hold.wait_held()
            registration, _ = await told.open()
            told.unproven.append(first.key)
            told.use(registration)
            assert first.device.lost
            await told.prove()
            hold.lift()
            told.ready(registration)
        assert await path.read(0, BLOCK) == block(b"a")


async def test_another_lun_is_refused(autojump_clock: MockClock) -> None:
    lun = ToldLun(SIZE, seed=1)
    async with told_path(lun, serve=False) as (path, told):
        lose(told)
        known, lun.identity = lun.identity, ToldLun(SIZE, seed=2).identity
        registration, _ = await told.open()
        path.use(registration, restarted=False)
        assert "another LUN" in told.closed[0]
        path.ready(registration)
        await wait_all_tasks_blocked()
        assert "another LUN" in path.status().trouble
        assert path.status().key == 0
        lun.identity = known
        await next_session(told)
        await path.write(0, block(b"w"))


# -- what the target forgot ------------------------------------------------------------------------
async def test_restarted_counts_until_data_has_flowed(autojump_clock: MockClock) -> None:
    """Said of an opening that came to nothing; the next one does not know of it."""
    lun = ToldLun(SIZE)
    async with told_path(lun, serve=False) as (path, told):
        for number in range(1, 9):
            await path.write(number * BLOCK, block(b"r"))
        lun.restart(power_lost=True, keep=keep_none)
        lose(told)
        registration, restarted = await told.open()
        assert restarted
        told.use(registration, restarted=True)
        lose(told)
        told.registered.clear()
        await next_session(told, restarted=False)
        assert await path.read(BLOCK, 8 * BLOCK) == block(b"r") * 8
        assert path.status().retained_bytes == 0
        after = lun.crashed(keep=keep_none)
        assert len(after.blocks) == 8


async def test_a_key_that_the_path_misses_itself_counts_as_a_restart(
    autojump_clock: MockClock,
) -> None:
    lun = ToldLun(SIZE)
    async with told_path(lun, serve=False) as (path, told):
        await path.write(BLOCK, block(b"v"))
        assert told.session is not None
        lun.arbiter.registrations.pop(nexus_of(told.session.device))
        lun.blocks.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(path.read, 0, BLOCK)
            await wait_all_tasks_blocked()
            assert "not registered" in told.closed[0]
            await next_session(told, restarted=False)
        assert await path.read(BLOCK, BLOCK) == block(b"v")


async def test_the_second_loss_hits_what_is_written_again(autojump_clock: MockClock) -> None:
    lun = ToldLun(SIZE)
    async with told_path(lun, serve=False) as (path, told):
        for number in range(1, 9):
            await path.write(number * BLOCK, block(b"s"))
        lun.restart(power_lost=True, keep=keep_none)
        lose(told)
        hold = lun.hold(lambda c: c.op is Op.WRITE and c.offset_bytes == 4 * BLOCK, limit=1)
        await next_session(told, restarted=True)
        await hold.wait_held()
        with trio.move_on_after(1) as scope:
            await path.read(BLOCK, BLOCK)
        assert scope.cancelled_caught
        assert "writing again" in path.status().trouble
        lose(told)
        await next_session(told)
        assert await path.read(BLOCK, 8 * BLOCK) == block(b"s") * 8
        path.check()


async def test_writing_again_waits_for_a_full_array_and_a_stranger(
    autojump_clock: MockClock,
) -> None:
    lun = ToldLun(SIZE)
    async with told_path(lun, serve=False) as (path, told):
        await path.write(BLOCK, block(b"f"))
        lun.restart(power_lost=True, keep=keep_none)
        lose(told)
        lun.space_exhausted = True
        await next_session(told, restarted=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(path.flush)
            await trio.sleep(10)
            assert "space" in path.status().trouble
            stranger = await lun.login(port(7))
            lun.arbiter.reserve_legacy(stranger.nexus)
            lun.space_exhausted = False
            await trio.sleep(5)
            assert told.strangers
            await lun.reset()
        assert await path.read(BLOCK, BLOCK) == block(b"f")


async def test_a_cache_that_becomes_volatile_is_retained_for(autojump_clock: MockClock) -> None:
    lun = ToldLun(SIZE, volatile_cache=False)
    async with told_path(lun, serve=False) as (path, told):
        await path.write(0, block(b"x"))
        assert path.status().retained_bytes == 0
        lun.identity = ToldLun(SIZE).identity
        lose(told)
        await next_session(told)
        await path.write(0, block(b"y"))
        assert path.status().retained_bytes == BLOCK
        await trio.sleep(1.1)
        assert path.status().retained_bytes == 0, "the flusher runs"


# -- what is answered ------------------------------------------------------------------------------
async def test_nothing_is_answered_without_a_lease(autojump_clock: MockClock) -> None:
    lun = ToldLun(SIZE)
    async with told_path(lun, lease_s=4) as (path, _):
        await path.write(0, block(b"a"))
        await trio.sleep(3.9)
        await path.read(0, BLOCK)
        await trio.sleep(0.1)
        answered: list[str] = []

        async def ask(name: str, command: Awaitable[object]) -> None:
            await command
            answered.append(name)

        assert not path.status().answers
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "read", path.read(0, BLOCK))
            nursery.start_soon(ask, "write", path.write(BLOCK, block(b"b")))
            nursery.start_soon(ask, "flush", path.flush())
            nursery.start_soon(ask, "unmap", path.unmap([(8 * BLOCK, BLOCK)]))
            await trio.sleep(30)
            assert not answered
            path.lease_until(trio.current_time())  # over as it comes
            await trio.sleep(1)
            assert not answered
            path.lease_until(trio.current_time() + 4)
            path.lease_until(trio.current_time() - 4)  # it never goes back
            await wait_all_tasks_blocked()
            assert sorted(answered) == ["flush", "read", "unmap", "write"]


async def test_what_came_back_before_the_eviction_is_not_answered_after_it(
    autojump_clock: MockClock,
) -> None:
    """The host was frozen: the answer is there, the lease is over."""
    lun = ToldLun(SIZE)
    async with told_path(lun, lease_s=4) as (path, _):
        hold = lun.hold(is_op(Op.READ))

        async def read() -> None:
            with pytest.raises(Evicted, match="fenced"):
                await path.read(0, BLOCK)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await hold.wait_held()
            await trio.sleep(5)
            hold.lift()
            await trio.sleep(5)
            path.evict("fenced")


async def test_an_answer_that_waited_for_the_lease_survives_a_loss(
    autojump_clock: MockClock,
) -> None:
    """The node is still a member, and its caller has held its locks all the time."""
    lun = ToldLun(SIZE)
    async with told_path(lun, lease_s=1) as (path, told):
        await path.write(0, block(b"k"))
        await trio.sleep(2)
        async with trio.open_nursery() as nursery:
            found: list[bytes] = []

            async def read() -> None:
                found.append(bytes(await path.read(0, BLOCK)))

            nursery.start_soon(read)
            await trio.sleep(1)
            lose(told)
            await trio.sleep(5)
            assert path.status().flows
            path.lease_until(trio.current_time() + 1)
        assert found == [block(b"k")]


# -- the end ---------------------------------------------------------------------------------------
async def test_eviction_ends_everything_that_waits(autojump_clock: MockClock) -> None:
    lun = ToldLun(SIZE)
    async with told_path(lun, serve=False) as (path, told):
        failures = []

        async def fail(command: Callable[[], Awaitable[object]]) -> None:
            with pytest.raises(Evicted) as caught:
                await command()
            failures.append(str(caught.value))

        async def write() -> None:
            await path.write(0, block(b"v"))

        hold = lun.hold(written_with(b"v"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail, write)
            await hold.wait_held()
            lun.disconnect(lambda login: login == DATA_PORT)
            lose(told)
            nursery.start_soon(fail, lambda: path.read(0, BLOCK))
            nursery.start_soon(fail, path.flush)
            nursery.start_soon(fail, lambda: path.unmap([(0, BLOCK)]))
            await trio.sleep(5)
            path.evict("the member list does not name this host")
        assert len(failures) == 4
        assert set(failures) == {"the member list does not name this host"}
        await fail(write)
        lun.reconnect()
        registration, _ = await told.open()
        path.use(registration, restarted=False)
        path.ready(registration)
        path.lease_until(1e9)
        path.evict("another reason")
        await fail(write)
        with pytest.raises(Evicted, match="member list"):
            await path.detach()
        assert not path.status().answers


async def test_a_write_of_unknown_fate_is_not_repeated_by_the_evicted(
    autojump_clock: MockClock,
) -> None:
    lun = ToldLun(SIZE)
    lun.drains_wait()
    async with told_path(lun, serve=False) as (path, told):
        hold = lun.hold(written_with(b"u"))

        async def write() -> None:
            with pytest.raises(Evicted):
                await path.write(0, block(b"u"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await hold.wait_held()
            lose(told)
            nursery.start_soon(told.prove)
            await trio.sleep(1)
            hold.land()
            await trio.sleep(1)
            path.evict("evicted")
        lun.blocks.clear()
        await trio.sleep(10)
        assert lun.blocks == {}


async def test_eviction_in_the_middle_of_a_healthy_write(autojump_clock: MockClock) -> None:
    """It landed, and was answered after the eviction: nobody is told that it did."""
    lun = ToldLun(SIZE)
    async with told_path(lun, serve=False) as (path, _):
        hold = lun.hold(written_with(b"h"))

        async def write() -> None:
            with pytest.raises(Evicted):
                await path.write(0, block(b"h"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await hold.wait_held()
            path._flow.end("evicted")  # before its connection is dropped
            hold.lift()


async def test_detach_leaves_a_good_session(autojump_clock: MockClock) -> None:
    lun = ToldLun(SIZE)
    async with told_path(lun, serve=False) as (path, told):
        await path.write(0, block(b"d"))
        lose(told)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(path.detach)
            await next_session(told)
        with pytest.raises(Evicted, match="left"):
            await path.read(0, BLOCK)
        path.evict("does nothing now")
        assert told.session is not None
        await told.session.unregister()
        assert len(lun.crashed(keep=keep_none).blocks) == 1


async def test_run_that_is_cancelled_evicts(autojump_clock: MockClock) -> None:
    lun = ToldLun(SIZE)
    told = Membership(lun)
    registration, _ = await told.open()
    path = DataPath(lun.identity, on_closed=told.on_closed, on_stranger=told.on_stranger)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(path.run)
        await wait_all_tasks_blocked()
        path.use(registration, restarted=False)
        nursery.cancel_scope.cancel()
    with pytest.raises(Evicted, match="no longer kept"):
        await path.read(0, BLOCK)
    assert registration.device.lost


async def test_cancelled_writers_leave_and_the_path_lives_on(autojump_clock: MockClock) -> None:
    lun = ToldLun(SIZE)
    async with told_path(lun) as (path, _):
        hold = lun.hold(written_with(b"c"), limit=1)
        with trio.move_on_after(3):
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(path.write, 0, block(b"c"))
                await hold.wait_held()
                lun.disconnect()
        assert path.status().repeating == 0
        lun.reconnect()
        await path.write(0, block(b"k"))
        assert await path.read(0, BLOCK) == block(b"k")
