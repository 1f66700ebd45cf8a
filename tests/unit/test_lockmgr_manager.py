"""The trio shell: waiting, cancelling, owners, closing."""

from __future__ import annotations

import logging
import random

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from lockmgr.errors import LockDeadlock, LockTimeout, ManagerClosed, ProtocolViolation
from lockmgr.manager import Lock, LockManager, open_lock_manager
from lockmgr.messages import Resource
from lockmgr.modes import Mode
from lockmgr.settings import Settings

NL, CR, CW, PR, PW, EX = Mode
A, B, C = Resource(b"aa", b"p"), Resource(b"bb", b"p"), Resource(b"cc", b"p")


class Owner:
    """Remembers what it was asked; demotes when it is let."""

    def __init__(self) -> None:
        self.demoted: list[tuple[bytes, Mode]] = []
        self.may_go_on = trio.Event()
        self.may_go_on.set()

    async def demote(self, resource: Resource, to_mode: Mode) -> None:
        await self.may_go_on.wait()
        self.demoted.append((resource.name, to_mode))

    async def glimpse(self, resource: Resource) -> bytes:
        await trio.lowlevel.checkpoint()
        return b"glimpse of " + resource.name


async def test_acquire_release_and_with() -> None:
    async with open_lock_manager() as manager:
        async with manager.acquire(A, EX) as lock:
            assert lock.held and lock.mode is EX
            assert manager.try_acquire(A, PR) is None
        assert not lock.held
        again = await manager.acquire(A, PR)
        with again:
            assert again.held
        async with await manager.acquire(A, PR) as third:
            third.release()
        found = manager.try_acquire(A, EX)
        assert found is not None
        found.release()
        with pytest.raises(ProtocolViolation):
            found.release()
        assert manager.statistics().master_grants == 1


async def test_a_lock_may_outlive_its_scope_and_be_released_by_another_task() -> None:
    async with open_lock_manager() as manager, trio.open_nursery() as nursery:
        send, receive = trio.open_memory_channel[Lock](1)

        async def opener() -> None:
            await send.send(await manager.acquire(A, PR))

        nursery.start_soon(opener)
        lock = await receive.receive()
        assert lock.held
        lock.release()


async def test_waiters_are_woken_in_order() -> None:
    order: list[int] = []
    async with open_lock_manager() as manager:
        holder = await manager.acquire(A, EX)

        async def waiter(number: int) -> None:
            async with manager.acquire(A, EX):
                order.append(number)
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(waiter, number)
                await wait_all_tasks_blocked()
            holder.release()
    assert order == [0, 1, 2, 3, 4]


async def test_acquire_is_a_checkpoint_even_when_nothing_is_in_the_way() -> None:
    async with open_lock_manager() as manager:
        for _ in range(2):
            with trio.testing.assert_checkpoints():
                lock = await manager.acquire(A, EX)
            with trio.testing.assert_checkpoints():
                await lock.convert(PR)
            lock.release()
        with trio.CancelScope() as scope:
            scope.cancel()
            await manager.acquire(A, EX)
        assert scope.cancelled_caught
        assert not manager.snapshot()[0].holders


async def test_timeout_is_on_the_clock_and_names_everybody(autojump_clock: MockClock) -> None:
    del autojump_clock
    async with open_lock_manager() as manager:
        async with manager.acquire(A, EX):
            started = trio.current_time()
            with pytest.raises(LockTimeout, match=r"could not acquire PR within 2\.0 s") as caught:
                await manager.acquire(A, PR, timeout_s=2.0)
            assert trio.current_time() - started == pytest.approx(2.0)
            (holder,) = caught.value.snapshot.holders
            assert holder.mode is EX and "names_everybody" in holder.holder
            assert [waiter.mode for waiter in caught.value.snapshot.waiters] == [PR]
            assert isinstance(caught.value, TimeoutError)
        found = manager.try_acquire(A, EX)
        assert found is not None, "a ghost is left"
        found.release()


async def test_a_deadlock_is_broken_and_told(autojump_clock: MockClock) -> None:
    told: list[str] = []
    started = autojump_clock.current_time()

    async def transfer(first: Resource, second: Resource, name: str) -> None:
        async with manager.acquire(first, EX, owner=name):
            await trio.sleep(0.1)
            try:
                async with manager.acquire(second, EX, owner=name):
                    await trio.sleep(0.1)
            except LockDeadlock as deadlock:
                told.append(str(deadlock))

    async with open_lock_manager() as manager:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transfer, A, B, "out", name="out")
            nursery.start_soon(transfer, B, A, "back", name="back")
        assert 2.0 < trio.current_time() - started < 3.0
        assert len(told) == 1 and manager.statistics().deadlocks == 1
        assert "out on node 0, which wants EX of b'bb'" in told[0]
        assert "back on node 0, which wants EX of b'aa'" in told[0]


async def test_of_two_that_convert_one_is_denied_and_keeps_what_it_has(
    autojump_clock: MockClock,  # noqa: ARG001
) -> None:
    denied: list[Mode] = []

    async def upgrade() -> None:
        async with manager.acquire(A, PR) as lock:
            await trio.sleep(0.1)
            try:
                await lock.convert(EX)
            except LockDeadlock:
                denied.append(lock.mode)

    async with open_lock_manager() as manager, trio.open_nursery() as nursery:
        nursery.start_soon(upgrade)
        nursery.start_soon(upgrade)
    assert denied == [PR]


async def test_timeout_zero_waits_for_nobody() -> None:
    async with open_lock_manager() as manager, manager.acquire(A, EX):
        with pytest.raises(LockTimeout, match="shared here"):
            await manager.acquire(A, PR, shared_here=True, timeout_s=0)
        async with manager.acquire(B, PR, timeout_s=0):
            pass


async def test_conversion(autojump_clock: MockClock) -> None:
    del autojump_clock
    async with open_lock_manager() as manager:
        one, two = await manager.acquire(A, PR), await manager.acquire(A, PR)
        assert not one.try_convert(EX) and one.mode is PR
        with pytest.raises(LockTimeout, match="could not convert to EX instead of PR"):
            await one.convert(EX, timeout_s=1.0)
        with pytest.raises(LockTimeout):
            await one.convert(EX, timeout_s=0)
        assert one.held and one.mode is PR
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.convert, EX)
            await wait_all_tasks_blocked()
            two.release()
        assert one.mode is EX
        assert one.try_convert(CR) and one.mode is CR
        one.release()


async def test_cancelled_conversion_keeps_the_lock() -> None:
    async with open_lock_manager() as manager:
        one, two = await manager.acquire(A, PR), await manager.acquire(A, PR)
        with trio.move_on_after(0):
            await one.convert(EX)
        assert one.held and one.mode is PR and not manager.snapshot()[0].waiters
        one.release()
        two.release()


async def test_cancelled_acquire_leaves_no_ghost() -> None:
    async with open_lock_manager() as manager:
        holder = await manager.acquire(A, EX)
        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()

            async def impatient() -> None:
                with scope:
                    await manager.acquire(A, EX)

            async def behind() -> None:
                async with manager.acquire(A, PR):
                    assert not holder.held

            nursery.start_soon(impatient)
            await wait_all_tasks_blocked()
            nursery.start_soon(behind)
            await wait_all_tasks_blocked()
            scope.cancel()
            await wait_all_tasks_blocked()
            assert [waiter.mode for waiter in manager.snapshot()[0].waiters] == [PR]
            holder.release()
        assert not manager.snapshot()[0].holders


async def test_a_grant_that_comes_with_the_cancellation_is_the_tasks() -> None:
    """Released and cancelled within one instant: granted came first, so the task has it."""
    async with open_lock_manager() as manager:
        holder = await manager.acquire(A, EX)
        got: list[Lock] = []
        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()

            async def waiter() -> None:
                with scope:
                    got.append(await manager.acquire(A, EX))

            nursery.start_soon(waiter)
            await wait_all_tasks_blocked()
            holder.release()
            scope.cancel()
        assert [lock.held for lock in got] == [True]
        got[0].release()


async def test_random_cancellations_leave_nothing_behind() -> None:
    rng = random.Random(7)
    async with open_lock_manager(settings=Settings(cache_limit=1)) as manager:
        owner = Owner()
        manager.register_owner(b"", owner)

        async def task() -> None:
            for _ in range(20):
                with trio.CancelScope() as scope:
                    if rng.random() < 0.4:
                        scope.deadline = trio.current_time() + rng.random() * 0.001
                    resource = rng.choice([A, B])
                    async with manager.acquire(resource, rng.choice([PR, EX]), rng.random() < 0.3):
                        await trio.lowlevel.checkpoint()
                manager.core.check()

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(task)
        for lock in manager.snapshot():
            assert not lock.holders and not lock.waiters
    assert not manager.core.locks.locks


async def test_value_block() -> None:
    async with open_lock_manager() as manager:
        async with manager.acquire(A, EX) as lock:
            assert lock.value is None
            lock.set_value(b"v" * 64)
            assert lock.value == b"v" * 64
            with pytest.raises(ValueError, match="64 bytes"):
                lock.set_value(b"short")
            assert lock.try_convert(PR)
            with pytest.raises(ValueError, match="value block"):
                lock.set_value(b"w" * 64)
        async with manager.acquire(A, PR) as lock:
            assert lock.value == b"v" * 64
        with pytest.raises(ValueError, match="not held"):
            _ = lock.value


async def test_owner_demotes_at_the_cap_and_the_longest_prefix_decides() -> None:
    general, special = Owner(), Owner()
    async with open_lock_manager(settings=Settings(cache_limit=0)) as manager:
        manager.register_owner(b"a", general)
        manager.register_owner(b"aa", special)
        with pytest.raises(ValueError, match="have an owner"):
            manager.register_owner(b"a", general)
        for resource in (A, Resource(b"ab", b""), B):
            (await manager.acquire(resource, EX)).release()
            await wait_all_tasks_blocked()
        assert special.demoted == [(b"aa", NL)]
        assert general.demoted == [(b"ab", NL)]
        assert manager.snapshot() == []


async def test_requests_are_served_while_the_owner_demotes() -> None:
    owner = Owner()
    async with open_lock_manager(settings=Settings(cache_limit=0)) as manager:
        manager.register_owner(b"aa", owner)
        owner.may_go_on = trio.Event()
        (await manager.acquire(A, EX)).release()
        await wait_all_tasks_blocked()
        assert manager.snapshot()[0].demoting_to is NL
        async with manager.acquire(A, EX, shared_here=True, timeout_s=0):
            pass
        owner.may_go_on.set()
        await wait_all_tasks_blocked()
        assert manager.snapshot() == []
    assert owner.demoted == [(b"aa", NL), (b"aa", NL)], "it was used, so it is demoted again"


async def test_drain_waits_for_the_last_claim_and_spares_the_second_pass() -> None:
    async with open_lock_manager(settings=Settings(cache_limit=0)) as manager:
        steps: list[str] = []
        started = trio.Event()
        served = trio.Event()

        class Drainer(Owner):
            async def demote(self, resource: Resource, to_mode: Mode) -> None:
                started.set()
                await served.wait()
                steps.append("drains")
                assert await manager.drain(resource)
                steps.append("drained")
                self.demoted.append((resource.name, to_mode))

        owner = Drainer()
        manager.register_owner(b"", owner)
        (await manager.acquire(A, EX)).release()
        await started.wait()
        lock = manager.try_acquire(A, EX, shared_here=True)
        assert lock is not None
        served.set()
        await wait_all_tasks_blocked()
        assert manager.try_acquire(A, EX, shared_here=True) is None
        steps.append("releases")
        lock.release()
        await wait_all_tasks_blocked()
        assert steps == ["drains", "releases", "drained"]
        assert owner.demoted == [(b"aa", NL)] and manager.snapshot() == []


async def test_drain_outside_a_demotion_is_a_bug() -> None:
    async with open_lock_manager() as manager, manager.acquire(A, EX):
        with pytest.raises(ProtocolViolation):
            await manager.drain(A)


async def test_an_error_of_an_owner_is_not_swallowed() -> None:
    class Broken(Owner):
        async def demote(self, resource: Resource, to_mode: Mode) -> None:
            raise OSError(f"cannot write {resource.name!r} back for {to_mode}")

    async def use() -> None:
        async with open_lock_manager() as manager:
            manager.register_owner(b"", Broken())
            (await manager.acquire(A, EX)).release()

    with pytest.raises(ExceptionGroup) as caught:
        await use()
    assert caught.group_contains(OSError, match="cannot write b'aa' back for NL")


async def test_close_demotes_everything_then_refuses() -> None:
    owner = Owner()
    async with open_lock_manager() as manager:
        manager.register_owner(b"", owner)
        for resource in (A, B):
            (await manager.acquire(resource, EX)).release()
        await manager.aclose()
        assert sorted(owner.demoted) == [(b"aa", NL), (b"bb", NL)]
        with pytest.raises(ManagerClosed):
            manager.try_acquire(A, PR)
        with pytest.raises(ManagerClosed):
            await manager.acquire(A, PR)
        await manager.aclose()


async def test_an_owner_may_take_locks_while_everything_is_closed() -> None:
    async with open_lock_manager() as manager:

        class Writer(Owner):
            async def demote(self, resource: Resource, to_mode: Mode) -> None:
                if resource is A:
                    async with manager.acquire(B, EX):
                        await trio.lowlevel.checkpoint()
                self.demoted.append((resource.name, to_mode))

        owner = Writer()
        manager.register_owner(b"", owner)
        for resource in (B, A):
            (await manager.acquire(resource, EX)).release()
    assert owner.demoted[-1] == (b"bb", NL)
    assert manager.snapshot() == []


async def test_close_waits_for_holders_and_says_who_they_are(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    del autojump_clock
    caplog.set_level(logging.WARNING, "lockmgr")
    async with open_lock_manager() as manager, trio.open_nursery() as nursery:
        lock = await manager.acquire(A, EX)
        nursery.start_soon(manager.aclose)
        nursery.start_soon(manager.aclose)
        await trio.sleep(15)
        assert len(caplog.records) == 2, "once for each who closes"
        assert "still closing: b'aa': the node holds EX, held by" in caplog.text
        lock.release()


async def test_glimpse_asks_the_writers_owner() -> None:
    async with open_lock_manager() as manager:
        manager.register_owner(b"a", Owner())
        assert await manager.glimpse(A) is None
        async with manager.acquire(A, EX), manager.acquire(B, EX):
            assert await manager.glimpse(A) == b"glimpse of aa"
            assert await manager.glimpse(B) == b"", "without an owner"
            assert await manager.glimpse_all([A, C, B, A]) == {A: b"glimpse of aa", B: b"", C: None}
            assert await manager.glimpse_all([]) == {}
            with trio.CancelScope() as scope:
                scope.cancel()
                await manager.glimpse(A)
            await wait_all_tasks_blocked()
        async with manager.acquire(A, PR):
            assert manager.node_holds(A, EX) and not manager.node_holds(Resource(b"x", b""), NL)


async def test_many_tasks_keep_a_counter_right() -> None:
    counter = 0
    async with open_lock_manager() as manager:

        async def add() -> None:
            nonlocal counter
            for _ in range(10):
                async with manager.acquire(A, EX):
                    seen = counter
                    await trio.lowlevel.checkpoint()
                    counter = seen + 1

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(add)
    assert counter == 100


async def test_a_manager_in_a_nursery_of_its_user() -> None:
    async with trio.open_nursery() as nursery:
        manager = LockManager(nursery, node=4, epoch=9)
        async with manager.acquire(A, EX):
            assert manager.core.master.resources[b"aa"].granted == {4: EX}
        await manager.aclose()
