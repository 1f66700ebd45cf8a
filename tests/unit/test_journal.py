"""The journal at work: group commit, flushes, room, hooks, and when it acts by itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
import trio.testing

from csvfs.format import BLOCK_BYTES, BadBlock
from csvfs.journal.journal import JournalTimes
from csvfs.journal.store import Store, StoreOptions
from csvfs.journal.transaction import MAX_TX_BLOCKS, BlockKey, NeedBlocks, Transaction
from redirector.block.arbiter import Op
from redirector.block.simulated import Command, SimulatedLun
from tests.small_store import (
    FIRST,
    KIND,
    LUN_BYTES,
    creating,
    editing,
    fill,
    home_tag,
    is_record,
    recovered,
    sealed,
    small_store,
)

A, B, C = FIRST, FIRST + 1, FIRST + 2


def is_flush(command: Command) -> bool:
    return command.op is Op.SYNCHRONIZE_CACHE


# -- group commit ----------------------------------------------------------------------------------
async def test_committed_is_what_replay_finds() -> None:
    lun = SimulatedLun(LUN_BYTES)
    async with small_store(lun) as store:
        await store.transact(creating((A, 1), (B, 2)))
        await store.commit()
        await store.transact(editing((A, 3)))
        assert home_tag(await recovered(lun), A) == 1
        await store.commit()
        copy = await recovered(lun)
        assert (home_tag(copy, A), home_tag(copy, B)) == (3, 2)
        assert home_tag(lun, A) is None
        store.check()


async def test_who_arrives_during_a_commit_goes_with_the_next() -> None:
    lun = SimulatedLun(LUN_BYTES)
    async with small_store(lun) as store:
        hold = lun.hold(is_record, limit=1)

        async def one(index: int) -> None:
            await store.transact(creating((FIRST + index, index)), bound=1)
            await store.commit()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, 0)
            await hold.wait_held()
            for index in range(1, 20):
                nursery.start_soon(one, index)
            await trio.testing.wait_all_tasks_blocked()
            assert store.journal.commits == 0
            hold.lift()
        assert store.journal.commits == 2


async def test_a_cancelled_commit_goes_on() -> None:
    lun = SimulatedLun(LUN_BYTES)
    async with small_store(lun) as store:
        hold = lun.hold(is_record)
        await store.transact(creating((A, 1)))
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store.commit)
                await hold.wait_held()
                scope.cancel()
        assert scope.cancelled_caught
        hold.lift()
        await store.wait_stable()
        assert home_tag(await recovered(lun), A) == 1


async def test_callbacks_run_when_merged_and_when_stable() -> None:
    lun = SimulatedLun(LUN_BYTES)
    log: list[str] = []

    def telling(name: str, address: int) -> Callable[[Transaction], None]:
        def body(tx: Transaction) -> None:
            fill(tx.create(address, KIND, 0), 1)
            tx.after_merge(lambda: log.append(f"{name} merged"))
            tx.on_stable(lambda: log.append(f"{name} stable"))

        return body

    async with small_store(lun) as store:
        hold = lun.hold(is_record)
        await store.transact(telling("a", A))
        await store.transact(telling("b", B))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.commit)
            await hold.wait_held()
            assert log == ["a merged", "b merged"]
            hold.lift()
        assert log[2:] == ["a stable", "b stable"]


async def test_a_callback_without_a_change_runs_too() -> None:
    log: list[int] = []
    async with small_store(SimulatedLun(LUN_BYTES)) as store:
        await store.transact(lambda tx: tx.on_stable(lambda: log.append(1)))
        await store.commit()
        assert log == [1]
        assert store.journal.commits == 0


# -- flushes ---------------------------------------------------------------------------------------
async def write_data(store: Store, address: int) -> None:
    await store.device.write(address * BLOCK_BYTES, bytes(BLOCK_BYTES))
    store.note_write()


async def test_data_is_stable_before_the_record_that_speaks_of_it_is_written() -> None:
    lun = SimulatedLun(LUN_BYTES)
    async with small_store(lun) as store:
        hold = lun.hold(lambda command: is_flush(command) or is_record(command))
        await write_data(store, 900)
        await store.transact(creating((A, 1)))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.commit)
            await hold.wait_held()
            assert is_flush(hold.commands[0]) and len(hold.commands) == 1
            hold.land()
            await hold.wait_held()
            assert is_record(hold.commands[0]) and hold.commands[0].fua
            hold.lift()


async def test_one_flush_serves_all_who_came_before_it() -> None:
    lun = SimulatedLun(LUN_BYTES)
    async with small_store(lun) as store:
        hold = lun.hold(is_flush, limit=1)
        async with trio.open_nursery() as nursery:
            await write_data(store, 900)
            nursery.start_soon(store.flush)
            await hold.wait_held()
            for index in range(20):
                await write_data(store, 901 + index)
                nursery.start_soon(store.flush if index % 2 else store.commit)
            await trio.testing.wait_all_tasks_blocked()
            hold.lift()
        assert store.journal.flusher.flushes == 2
        assert not store.journal.flusher.needed


async def test_nothing_written_means_no_flush_and_no_record() -> None:
    async with small_store(SimulatedLun(LUN_BYTES)) as store:
        await store.commit()
        await store.flush()
        assert (store.journal.flusher.flushes, store.journal.commits) == (0, 0)


async def test_a_flush_whose_caller_was_cancelled_is_issued_again() -> None:
    lun = SimulatedLun(LUN_BYTES)
    async with small_store(lun) as store:
        await write_data(store, 900)
        with trio.CancelScope() as scope:
            scope.cancel()
            await store.flush()
        assert store.journal.flusher.needed
        await store.flush()
        assert not store.journal.flusher.needed


# -- by itself -------------------------------------------------------------------------------------
async def test_a_transaction_is_stable_within_five_seconds(
    autojump_clock: trio.testing.MockClock,
) -> None:
    lun = SimulatedLun(LUN_BYTES)
    async with small_store(lun) as store:
        start = trio.current_time()
        await store.transact(creating((A, 1)))
        await trio.sleep(2)
        await store.transact(creating((B, 1)))
        await store.wait_stable()
        assert trio.current_time() - start == pytest.approx(5)
        assert store.journal.commits == 1
        await trio.sleep(20)
        assert store.journal.commits == 1
    assert autojump_clock.rate == 0


async def test_an_idle_journal_goes_home(autojump_clock: trio.testing.MockClock) -> None:
    lun = SimulatedLun(LUN_BYTES)
    options = StoreOptions(times=JournalTimes(idle_checkpoint_s=30))
    async with small_store(lun, options=options) as store:
        await store.transact(creating((A, 1)))
        await store.commit()
        await trio.sleep(29)
        assert not store.journal.state.idle
        await trio.sleep(2)
        assert store.journal.state.idle and home_tag(lun, A) == 1
        assert store.cache.pinned() == set()
        await trio.sleep(1000)
        assert store.journal.checkpoints == 1
    assert autojump_clock.rate == 0


async def test_close_leaves_an_empty_journal() -> None:
    lun = SimulatedLun(LUN_BYTES)
    async with small_store(lun) as store:
        await store.transact(creating((A, 1)))
        await store.close()
        assert store.journal.state.idle and home_tag(lun, A) == 1
        with pytest.raises(AssertionError, match="closed"):
            await store.transact(editing((A, 2)))
    async with small_store(lun, incarnation=2) as store:
        assert store.journal.state.ring.next_sequence == 2
        await store.transact(editing((A, 2)))  # loads it
        assert store.cache.loads == 1


# -- room ------------------------------------------------------------------------------------------
async def test_many_times_the_journal_goes_through_it() -> None:
    """Every block of every transaction is new: only checkpoints make room."""
    lun = SimulatedLun(LUN_BYTES)
    async with small_store(lun) as store:
        for round_ in range(30):
            pairs = [(FIRST + i, round_ * 100 + i) for i in range(MAX_TX_BLOCKS)]
            await store.transact((editing if round_ else creating)(*pairs))
            await store.commit()
            store.check()
        assert store.journal.checkpoints > 3
        copy = await recovered(lun)
        assert home_tag(copy, FIRST) == 2900


async def test_the_running_set_is_committed_when_it_is_full() -> None:
    lun = SimulatedLun(LUN_BYTES)
    async with small_store(lun) as store:
        for index in range(300):
            await store.transact(creating((FIRST + index, index)))
            store.check()
        assert store.journal.commits >= 3
        await store.commit()
        copy = await recovered(lun)
        assert [home_tag(copy, FIRST + i) for i in range(300)] == list(range(300))


async def test_large_transactions_of_many_tasks_all_find_room() -> None:
    lun = SimulatedLun(LUN_BYTES)
    async with small_store(lun) as store:

        async def work(task: int) -> None:
            start = FIRST + 64 * task
            for round_ in range(12):
                count = MAX_TX_BLOCKS if (task + round_) % 3 else 2
                await store.transact(writing(*((start + i, round_) for i in range(count))))
                if round_ % 4 == task % 4:
                    await store.commit()

        async with trio.open_nursery() as nursery:
            for task in range(10):
                nursery.start_soon(work, task)
        store.check()


def writing(*pairs: tuple[int, int]) -> Callable[[Transaction], None]:
    """Create what is not there, edit what is."""

    def body(tx: Transaction) -> None:
        for address, tag in pairs:
            try:
                block = tx.edit(address, KIND, 0)
            except NeedBlocks:
                block = tx.create(address, KIND, 0)
            fill(block, tag)

    return body


# -- hooks -----------------------------------------------------------------------------------------
class DirtyTimes:
    """As many dirty inodes as one likes, added to each record."""

    def __init__(self, *addresses: int) -> None:
        self.dirty = list(addresses)
        self.lost: list[tuple[int, str]] = []
        self.tag = 70

    @property
    def pending(self) -> bool:
        return bool(self.dirty)

    def fill(self, tx: Transaction) -> None:
        now = self.dirty[: tx.blocks_left]
        tx.require(BlockKey(address, KIND, 0) for address in now)
        for address in now:
            fill(tx.edit(address, KIND, 0), self.tag)
        tx.after_merge(lambda: self.dirty.__delitem__(slice(len(now))))

    def unreadable(self, key: BlockKey, error: Exception) -> None:
        self.lost.append((key.address, type(error).__name__))
        self.dirty.remove(key.address)


async def test_a_hook_adds_to_the_record() -> None:
    lun = SimulatedLun(LUN_BYTES, blocks={B: sealed(B, 1)})
    async with small_store(lun) as store:
        hook = DirtyTimes(B)
        store.add_hook(hook)
        await store.transact(creating((A, 1)))
        await store.commit()
        assert store.journal.commits == 1 and not hook.pending
        copy = await recovered(lun)
        assert (home_tag(copy, A), home_tag(copy, B)) == (1, 70)
        hook.dirty.append(A)
        await store.commit()
        assert store.journal.commits == 2


async def test_a_hook_with_too_much_gets_several_records(
    autojump_clock: trio.testing.MockClock,
) -> None:
    addresses = range(FIRST, FIRST + 200)
    lun = SimulatedLun(LUN_BYTES, blocks={a: sealed(a, 1) for a in addresses})
    async with small_store(lun) as store:
        hook = DirtyTimes(*addresses)
        store.add_hook(hook)
        store.note_pending()
        await trio.sleep(5.1)
        assert 0 < len(hook.dirty) < 200
        await store.close()
        assert not hook.pending
        assert {home_tag(lun, a) for a in addresses} == {70}
    assert autojump_clock.rate == 0


async def test_a_hook_gets_room_in_a_full_journal() -> None:
    lun = SimulatedLun(LUN_BYTES)
    async with small_store(lun) as store:
        hook = DirtyTimes()
        store.add_hook(hook)
        await store.transact(creating(*((FIRST + i, 0) for i in range(MAX_TX_BLOCKS))))
        for round_ in range(40):
            hook.tag = round_
            hook.dirty.extend(range(FIRST, FIRST + 30))
            while hook.pending:
                await store.commit()
                store.check()
        assert home_tag(await recovered(lun), FIRST) == 39


async def test_an_unreadable_inode_does_not_stop_the_commits_of_others() -> None:
    lun = SimulatedLun(LUN_BYTES, blocks={A: sealed(A, 1), C: sealed(C, 1)})
    lun.medium_errors.append(range(C * BLOCK_BYTES, (C + 1) * BLOCK_BYTES))
    async with small_store(lun) as store:
        hook = DirtyTimes(A, B, C)
        store.add_hook(hook)
        await store.commit()
        assert sorted(hook.lost) == [(B, BadBlock.__name__), (C, "MediumError")]
        assert home_tag(await recovered(lun), A) == 70
