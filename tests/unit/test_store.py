"""Bodies: run again until they have what they need, then once for all."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import pytest
import trio
import trio.testing

from csvfs.format import BLOCK_BYTES, BadBlock
from csvfs.journal.store import StoreOptions
from csvfs.journal.transaction import BlockKey, BlockReader, NeedLock, Transaction
from redirector.block.arbiter import Op
from redirector.block.device import MediumError
from redirector.block.simulated import SimulatedLun
from tests.small_store import (
    FIRST,
    KIND,
    LUN_BYTES,
    creating,
    editing,
    fill,
    freeing,
    sealed,
    small_store,
    tag_of,
)

A, B, C = FIRST, FIRST + 1, FIRST + 2


def lun_with(*addresses: int) -> SimulatedLun:
    return SimulatedLun(LUN_BYTES, blocks={a: sealed(a, a) for a in addresses})


async def test_a_body_is_run_again_from_the_start_for_each_missing_block() -> None:
    runs: list[int] = []

    def body(tx: Transaction) -> int:
        runs.append(tx.blocks_used)
        fill(tx.edit(A, KIND, 0), 1)
        fill(tx.edit(B, KIND, 0), 2)
        return tag_of(tx.read(C, KIND, 0))

    async with small_store(lun_with(A, B, C)) as store:
        assert await store.transact(body) == C
        assert runs == [0, 0, 0, 0]
        assert tag_of(store.cache.read(B, KIND, 0)) == 2


async def test_blocks_that_are_asked_for_together_take_one_round() -> None:
    runs: list[int] = []

    def body(reader: BlockReader) -> int:
        runs.append(1)
        reader.require(BlockKey(a, KIND, 0) for a in (A, B, C))
        return sum(tag_of(reader.read(a, KIND, 0)) for a in (A, B, C))

    async with small_store(lun_with(A, B, C)) as store:
        assert await store.run(body) == A + B + C
        assert len(runs) == 2


async def test_a_body_that_raises_changed_nothing() -> None:
    def body(tx: Transaction) -> None:
        fill(tx.edit(A, KIND, 0), 1)
        tx.create(B, KIND, 0)
        tx.after_merge(lambda: pytest.fail("merged"))
        raise LookupError("no such name")

    async with small_store(lun_with(A)) as store:
        with pytest.raises(LookupError):
            await store.transact(body)
        assert tag_of(store.cache.read(A, KIND, 0)) == A
        assert B not in store.cache and not store.journal.state.running


async def test_what_cannot_be_read_is_raised_to_the_caller() -> None:
    lun = lun_with(A, B)
    lun.medium_errors.append(range(B * BLOCK_BYTES, C * BLOCK_BYTES))
    async with small_store(lun) as store:
        with pytest.raises(MediumError):
            await store.transact(editing((A, 1), (B, 1)))
        with pytest.raises(BadBlock, match=f"block {C}"):
            await store.run(lambda reader: reader.read(C, KIND, 0))
        await store.transact(editing((A, 1)))
        assert store.failure is None


async def test_a_body_larger_than_the_cache_gets_all_its_blocks() -> None:
    addresses = range(FIRST, FIRST + 120, 2)
    options = StoreOptions(clean_cache_bytes=0)

    def body(reader: BlockReader) -> int:
        return sum(tag_of(reader.read(a, KIND, 0)) for a in addresses)

    async with small_store(lun_with(*addresses), options=options) as store:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(store.run, body)
        assert await store.run(body) == sum(addresses)
        assert len(store.cache) <= 16
        store.check()


def reading(address: int) -> Callable[[BlockReader], int]:
    return lambda reader: tag_of(reader.read(address, KIND, 0))


async def test_transactions_of_many_tasks_never_interleave() -> None:
    """A counter in each of two blocks, always equal, raised by tasks that load them anew."""
    lun = SimulatedLun(LUN_BYTES, blocks={a: sealed(a, 0) for a in range(A, A + 60)})
    options = StoreOptions(clean_cache_bytes=0)

    def body(tx: Transaction) -> None:
        value = tag_of(tx.read(A, KIND, 0))
        assert value == tag_of(tx.read(A + 59, KIND, 0))
        fill(tx.edit(A, KIND, 0), value + 1)
        fill(tx.edit(A + 59, KIND, 0), value + 1)

    async with small_store(lun, options=options) as store:

        async def work(task: int) -> None:
            for round_ in range(20):
                await store.run(reading(A + 1 + task + round_))
                await store.transact(body)
                if round_ % 5 == task % 5:
                    await store.checkpoint()

        async with trio.open_nursery() as nursery:
            for task in range(8):
                nursery.start_soon(work, task)
        assert tag_of(store.cache.read(A, KIND, 0)) == 160
        store.check()


async def test_changing_or_freeing_without_the_lock_is_an_error() -> None:
    held = {7}
    async with small_store(SimulatedLun(LUN_BYTES), holds=lambda *key: key[1] in held) as store:
        await store.transact(creating((A, 1), owner=7))
        held.clear()
        with pytest.raises(AssertionError, match="without its lock"):
            await store.transact(editing((A, 2), owner=7))
        with pytest.raises(AssertionError, match="freed without its lock"):
            await store.transact(freeing(A))


# -- locks -----------------------------------------------------------------------------------------
EX = 5


class Locks:
    """Exclusive locks by number, in ascending order."""

    def __init__(self) -> None:
        self.held: dict[Hashable, trio.Semaphore] = {}

    def _of(self, resource: Hashable) -> trio.Semaphore:
        return self.held.setdefault(resource, trio.Semaphore(1))

    def try_acquire(self, resource: Hashable, mode: int) -> Held | None:
        assert mode == EX
        try:
            self._of(resource).acquire_nowait()
        except trio.WouldBlock:
            return None
        return Held(self._of(resource))

    async def acquire(self, resource: Hashable, mode: int) -> Held:
        assert mode == EX
        await self._of(resource).acquire()
        return Held(self._of(resource))

    def order(self, resource: Hashable) -> tuple[int, ...]:
        assert isinstance(resource, int)
        return (resource,)

    def free(self) -> bool:
        return all(lock.value == 1 for lock in self.held.values())


class Held:
    def __init__(self, lock: trio.Semaphore) -> None:
        self._lock = lock

    def release(self) -> None:
        self._lock.release()


async def test_locks_are_released_however_a_body_ends() -> None:
    locks = Locks()

    def body(tx: Transaction) -> None:
        assert tx.try_lock(3, EX)
        fill(tx.edit(A, KIND, 0), 1)

    def failing(tx: Transaction) -> None:
        body(tx)
        raise LookupError

    async with small_store(lun_with(A), locks=locks) as store:
        await store.transact(body)
        assert locks.free()
        with pytest.raises(LookupError):
            await store.transact(failing)
        assert locks.free()


async def test_a_lock_is_held_while_its_blocks_are_loaded() -> None:
    locks = Locks()
    lun = lun_with(A)

    def body(tx: Transaction) -> None:
        assert tx.try_lock(3, EX)
        fill(tx.edit(A, KIND, 0), 1)

    async with small_store(lun, locks=locks) as store:
        read = lun.hold(lambda command: command.op is Op.READ, limit=1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.transact, body)
            await read.wait_held()
            assert not locks.free()
            read.lift()
        assert locks.free()


async def test_a_body_waits_for_a_lock_that_another_holds() -> None:
    locks = Locks()
    theirs = locks.try_acquire(3, EX)
    assert theirs is not None
    runs: list[int] = []

    def body(tx: Transaction) -> None:
        runs.append(1)
        if not tx.try_lock(3, EX):
            raise NeedLock(3, EX)
        fill(tx.edit(A, KIND, 0), 1)

    async with small_store(lun_with(A), locks=locks) as store:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.transact, body)
            await trio.testing.wait_all_tasks_blocked()
            assert len(runs) == 1
            theirs.release()
        assert len(runs) == 3  # the lock, then the block
        assert locks.free() and tag_of(store.cache.read(A, KIND, 0)) == 1


async def test_a_caller_cancelled_while_it_waits_holds_nothing() -> None:
    locks = Locks()
    theirs = locks.try_acquire(7, EX)
    assert theirs is not None

    def body(tx: Transaction) -> None:
        assert tx.try_lock(3, EX)
        if not tx.try_lock(7, EX):
            raise NeedLock(7, EX)

    async with small_store(SimulatedLun(LUN_BYTES), locks=locks) as store:
        with trio.move_on_after(0.01):
            await store.transact(body)
        theirs.release()
        assert locks.free()


async def test_two_who_need_each_others_locks_do_not_deadlock() -> None:
    locks = Locks()

    def body_of(*wanted: int) -> Callable[[Transaction], None]:
        def body(tx: Transaction) -> None:
            for resource in wanted:
                if not tx.try_lock(resource, EX):
                    raise NeedLock(resource, EX)
            tx.read(A, KIND, 0)
            tx.read(B, KIND, 0)

        return body

    options = StoreOptions(clean_cache_bytes=0)
    async with small_store(lun_with(A, B), locks=locks, options=options) as store:
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                for index in range(20):
                    wanted = (1, 2, 3) if index % 2 else (3, 2, 1)
                    nursery.start_soon(store.transact, body_of(*wanted))
        assert locks.free()
