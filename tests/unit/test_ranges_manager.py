"""What a filesystem sees of byte ranges: three nodes, each with a trio shell, in virtual time."""
# ruff: noqa: ARG001 (a clock does its work by being asked for)

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock

from lockmgr.errors import ManagerClosed, RangeRefused
from lockmgr.manager import open_lock_manager
from lockmgr.messages import Resource
from lockmgr.ranges_manager import RangeLocks
from lockmgr.ranges_messages import END, Access, Kind, Outcome
from tests.unit.ranges_hosts import FILES, of, three

NONE, READ, WRITE = Access
POSIX, OFD, FLOCK = Kind


async def refused(call: Awaitable[None]) -> RangeRefused:
    with pytest.raises(RangeRefused) as caught:
        await call
    return caught.value


@pytest.mark.parametrize("file", FILES[:3], ids=lambda file: file.name.decode())
async def test_one_waits_until_the_other_unlocks(autojump_clock: MockClock, file: Resource) -> None:
    async with three() as hosts, trio.open_nursery() as nursery:
        a, alice = of(hosts, 0)
        b, bob = of(hosts, 1)
        await a.lock(file, alice, 0, 10, WRITE, wait=True)
        assert (await refused(b.lock(file, bob, 5, 6, READ, wait=False))).errno == errno.EAGAIN
        await b.lock(file, bob, 10, 20, WRITE, wait=False)
        got: list[float] = []

        async def wants() -> None:
            await b.lock(file, bob, 5, 6, READ, wait=True)
            got.append(trio.current_time())

        nursery.start_soon(wants)
        await trio.sleep(5)
        assert not got
        await a.unlock(file, alice, 4, 8)
        await trio.sleep(0.1)
        assert got
        found = await a.test(file, alice, 0, END, WRITE)
        assert found is not None and (found.owner, found.start_bytes) == (bob, 5)
        assert found.owner.pid == 101
        assert await a.test(file, alice, 6, 8, WRITE) is None


async def test_a_circle_of_processes_through_two_masters_is_refused(
    autojump_clock: MockClock,
) -> None:
    async with three() as hosts, trio.open_nursery() as nursery:
        a, alice = of(hosts, 0)
        b, bob = of(hosts, 1)
        await a.lock(FILES[1], alice, 0, 1, WRITE, wait=True)
        await b.lock(FILES[2], bob, 0, 1, WRITE, wait=True)
        granted = trio.Event()

        async def elder() -> None:
            await a.lock(FILES[2], alice, 0, 1, WRITE, wait=True)
            granted.set()

        nursery.start_soon(elder)
        await trio.sleep(0.3)
        error = await refused(b.lock(FILES[1], bob, 0, 1, WRITE, wait=True))
        assert error.errno == errno.EDEADLK and "POSIX" in str(error)
        await b.close(FILES[2], bob)
        with trio.fail_after(1):
            await granted.wait()


async def test_an_interrupted_wait_leaves_nothing(autojump_clock: MockClock) -> None:
    async with three() as hosts:
        a, alice = of(hosts, 0)
        b, bob = of(hosts, 1)
        c, carol = of(hosts, 2)
        await a.lock(FILES[2], alice, 0, 10, READ, wait=True)
        with trio.move_on_after(1) as scope:
            await b.lock(FILES[2], bob, 0, 10, WRITE, wait=True)
        assert scope.cancelled_caught
        await c.lock(FILES[2], carol, 0, 10, READ, wait=False)
        await a.unlock(FILES[2], alice)
        assert await b.test(FILES[2], bob, 0, END, READ) is None


@pytest.mark.parametrize("seed", range(30))
async def test_an_interruption_that_crosses_the_grant(autojump_clock: MockClock, seed: int) -> None:
    """Either it is locked and the task goes on, or it is not and the task is cancelled."""
    async with three(seed) as hosts, trio.open_nursery() as nursery:
        a, alice = of(hosts, 0)
        b, bob = of(hosts, 1)
        await a.lock(FILES[2], alice, 0, 10, WRITE, wait=True)
        got = False
        scope = trio.CancelScope()

        async def wants() -> None:
            nonlocal got
            with scope:
                await b.lock(FILES[2], bob, 0, 10, WRITE, wait=True)
                got = True

        nursery.start_soon(wants)
        await trio.sleep(1)
        nursery.start_soon(a.unlock, FILES[2], alice)
        await trio.sleep(hosts.rng.random() * 0.03)
        scope.cancel()
        await trio.sleep(1)
        found = await a.test(FILES[2], alice, 0, END, WRITE)
        assert (found is not None and found.owner == bob) == got != scope.cancelled_caught


async def test_a_process_that_dies_gives_everything_back(autojump_clock: MockClock) -> None:
    async with three() as hosts, trio.open_nursery() as nursery:
        a, alice = of(hosts, 0)
        b, bob = of(hosts, 1)
        for file in FILES[:3]:
            await a.lock(file, alice, 0, END, WRITE, wait=True)
        await b.lock(FILES[3], bob, 0, 1, WRITE, wait=True)
        ended: list[int] = []

        async def awaits() -> None:
            error = await refused(a.lock(FILES[3], alice, 0, 1, WRITE, wait=True))
            ended.append(error.errno)

        nursery.start_soon(awaits)
        await trio.sleep(0.1)
        a.died(alice)
        for file in FILES[:3]:
            await b.lock(file, bob, 0, END, WRITE, wait=True)
        await trio.sleep(0.1)
        assert ended == [errno.EINTR]


async def test_read_over_written_bytes_lets_readers_in(autojump_clock: MockClock) -> None:
    async with three() as hosts:
        a, alice = of(hosts, 0)
        b, bob = of(hosts, 1)
        await a.lock(FILES[2], alice, 0, 10, WRITE, wait=True)
        await a.lock(FILES[2], alice, 5, 15, READ, wait=True)
        await b.lock(FILES[2], bob, 5, 15, READ, wait=False)
        assert (await refused(b.lock(FILES[2], bob, 4, 5, READ, wait=False))).errno == errno.EAGAIN


async def test_a_flock_conversion_that_fails_has_lost_the_old_lock(
    autojump_clock: MockClock,
) -> None:
    async with three() as hosts:
        a, alice = of(hosts, 0, FLOCK)
        b, bob = of(hosts, 1, FLOCK)
        await a.lock(FILES[2], alice, 0, END, READ, wait=True)
        await b.lock(FILES[2], bob, 0, END, READ, wait=True)
        error = await refused(a.lock(FILES[2], alice, 0, END, WRITE, wait=False))
        assert error.outcome is Outcome.WOULD_BLOCK
        await b.lock(FILES[2], bob, 0, END, WRITE, wait=False)


async def test_kinds_and_ranges_that_do_not_exist(autojump_clock: MockClock) -> None:
    async with three() as hosts:
        a, alice = of(hosts, 0)
        with pytest.raises(ValueError, match="no range"):
            await a.lock(FILES[0], alice, 5, 5, READ, wait=True)
        _a, file = of(hosts, 0, FLOCK)
        with pytest.raises(ValueError, match="whole files"):
            await a.lock(FILES[0], file, 0, 5, READ, wait=True)
        await a.lock(FILES[0], alice, 0, 5, READ, wait=True)


async def test_a_wait_survives_its_master(autojump_clock: MockClock) -> None:
    async with three() as hosts, trio.open_nursery() as nursery:
        a, alice = of(hosts, 0)
        b, bob = of(hosts, 1)
        await a.lock(FILES[2], alice, 0, 10, WRITE, wait=True)
        got = trio.Event()

        async def wants() -> None:
            await b.lock(FILES[2], bob, 0, 10, WRITE, wait=True)
            got.set()

        nursery.start_soon(wants)
        await trio.sleep(1)
        hosts.kill(2)
        hosts.change_view()
        await hosts.thaw()
        with trio.move_on_after(3):
            await a.unlock(FILES[2], alice)
        await trio.sleep(3)
        assert not got.is_set(), "the dead master may have had bytes of it"
        hosts.clear()
        with trio.fail_after(1):
            await got.wait()


async def test_no_wait_outlives_a_node_that_stops(autojump_clock: MockClock) -> None:
    async with three() as hosts:
        a, alice = of(hosts, 0)
        b, bob = of(hosts, 1)
        await a.lock(FILES[2], alice, 0, 10, WRITE, wait=True)
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:

                async def stopped(call: Callable[[], Awaitable[object]]) -> None:
                    with pytest.raises(ManagerClosed, match="evicted"):
                        await call()

                def wait() -> Awaitable[object]:
                    return b.lock(FILES[2], bob, 0, 1, WRITE, wait=True)

                async def interrupted(scope: trio.CancelScope) -> None:
                    _b, other = of(hosts, 1, OFD)
                    with scope:
                        await b.lock(FILES[2], other, 0, 1, WRITE, wait=True)

                scope = trio.CancelScope()
                nursery.start_soon(stopped, wait)
                nursery.start_soon(interrupted, scope)
                await trio.sleep(1)
                hosts.kill(2)
                scope.cancel()
                await trio.sleep(1)
                assert not scope.cancelled_caught, "nobody is there to call it back"
                b.abandon("evicted")
                await trio.sleep(0.1)
                assert scope.cancelled_caught
        with pytest.raises(ManagerClosed):
            await b.lock(FILES[0], bob, 0, 1, READ, wait=False)


async def test_a_node_alone_needs_no_network(autojump_clock: MockClock) -> None:
    async with open_lock_manager() as manager:
        ranges = RangeLocks(manager)
        a, b = ranges.owner(POSIX, 1, 7), ranges.owner(POSIX, 2, 8)
        await ranges.lock(FILES[0], a, 0, 5, WRITE, wait=True)
        assert (await refused(ranges.lock(FILES[0], b, 0, 5, READ, wait=False))).errno == 11
        await ranges.close(FILES[0], a)
        await ranges.lock(FILES[0], b, 0, 5, READ, wait=False)
