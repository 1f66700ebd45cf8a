"""Giving up a lock: its blocks are home, and replay of this journal leaves them alone."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from csvfs.format import BLOCK_BYTES
from redirector.block.arbiter import Op
from redirector.block.simulated import SimulatedLun
from tests.small_store import (
    FIRST,
    KIND,
    LUN_BYTES,
    creating,
    editing,
    freeing,
    home_tag,
    is_home,
    is_record,
    recovered,
    sealed,
    small_store,
)

A, B, C = FIRST, FIRST + 1, FIRST + 2
GUEST = b"a guest's data, " * 256


async def test_the_tail_passes_when_nothing_else_is_in_the_journal() -> None:
    lun = SimulatedLun(LUN_BYTES)
    async with small_store(lun) as store:
        await store.transact(creating((A, 1), owner=7))
        await store.flush_owned(7)
        assert home_tag(lun, A) == 1 and store.journal.state.idle
        assert store.journal.commits == 1
        store.drop_owned(7)
        assert A not in store.cache


async def test_a_revoke_where_other_blocks_keep_the_tail() -> None:
    lun = SimulatedLun(LUN_BYTES)
    async with small_store(lun) as store:
        await store.transact(creating((B, 5), owner=8))
        await store.transact(creating((A, 1), owner=7))
        await store.commit()
        await store.flush_owned(7)
        assert (home_tag(lun, A), home_tag(lun, B)) == (1, None)
        assert not store.journal.state.idle
        store.drop_owned(7)
        store.check()
        lun.blocks[A] = GUEST  # another node freed it, and it became data
        copy = await recovered(lun)
        assert copy.blocks[A] == GUEST and home_tag(copy, B) == 5


async def test_blocks_that_are_home_already_are_revoked_too() -> None:
    """A checkpoint brought them home, but the tail could not pass."""
    lun = SimulatedLun(LUN_BYTES)
    async with small_store(lun) as store:
        await store.transact(creating((A, 1), owner=7))
        await store.transact(creating((B, 1), owner=8))
        await store.commit()
        hold = lun.hold(lambda c: is_home(c) and c.offset_bytes == A * BLOCK_BYTES, limit=1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.checkpoint)
            await hold.wait_held()
            await store.transact(editing((B, 2), owner=8))
            await store.commit()
            hold.lift()
        state = store.journal.state
        assert A not in state.unhomed and B in state.unhomed
        await store.flush_owned(7)
        lun.blocks[A] = GUEST
        assert (await recovered(lun)).blocks[A] == GUEST


async def test_a_block_that_is_taken_back_after_a_revoke_is_replayed() -> None:
    lun = SimulatedLun(LUN_BYTES)
    async with small_store(lun) as store:
        await store.transact(creating((B, 5), owner=8))
        await store.transact(creating((A, 1), owner=7))
        await store.flush_owned(7)
        store.drop_owned(7)
        lun.blocks[A] = sealed(A, 2, version=1000, owner=7)  # another node's turn
        await store.transact(editing((A, 3), owner=7))
        assert store.cache.greatest_version == 1000
        await store.commit()
        assert home_tag(await recovered(lun), A) == 3


async def test_a_revoke_and_a_new_image_in_one_record() -> None:
    lun = SimulatedLun(LUN_BYTES)
    async with small_store(lun) as store:
        await store.transact(creating((A, 1), (B, 1)))
        await store.checkpoint()
        await store.transact(editing((A, 2), (B, 2)))
        await store.commit()
        await store.journal._checkpointer.bring_home([A])
        store.journal.state.revoke_homed([A])
        await store.transact(editing((A, 3)))
        await store.commit()
        store.check()
        assert home_tag(await recovered(lun), A) == 3


async def test_a_lock_without_changes_costs_no_write() -> None:
    lun = SimulatedLun(LUN_BYTES, blocks={A: sealed(A, 1, owner=7)})
    async with small_store(lun) as store:
        await store.run(lambda reader: reader.read(A, KIND, 7))
        await store.transact(creating((B, 5), owner=8))
        written = lun.journal.writes
        await store.flush_owned(7)
        assert lun.journal.writes == written
        store.drop_owned(7)
        assert A not in store.cache and B in store.cache


async def test_a_free_that_nobody_committed_is_committed_first() -> None:
    lun = SimulatedLun(LUN_BYTES)
    async with small_store(lun) as store:
        await store.transact(creating((A, 1), owner=7))
        await store.commit()
        await store.transact(freeing(A))
        await store.flush_owned(7)
        assert (await recovered(lun)).blocks.get(A) is None


async def test_dropping_a_changed_block_is_an_error() -> None:
    async with small_store(SimulatedLun(LUN_BYTES)) as store:
        await store.transact(creating((A, 1), owner=7))
        with pytest.raises(AssertionError, match="not home"):
            store.drop_owned(7)


async def test_a_handover_that_is_cancelled_may_be_repeated() -> None:
    lun = SimulatedLun(LUN_BYTES)
    async with small_store(lun) as store:
        await store.transact(creating((B, 5), owner=8))
        await store.transact(creating((A, 1), owner=7))
        hold = lun.hold(is_record)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store.flush_owned, 7)
                await hold.wait_held()
                scope.cancel()
        hold.lift()
        await store.flush_owned(7)
        lun.blocks[A] = GUEST
        assert (await recovered(lun)).blocks[A] == GUEST


async def test_many_blocks_are_revoked_in_several_transactions() -> None:
    count = 600
    lun = SimulatedLun(LUN_BYTES)
    async with small_store(lun) as store:
        state = store.journal.state
        for start in range(0, count, 40):
            tags = [(FIRST + start + i, 1) for i in range(40)]
            await store.transact(creating(*tags, owner=7), bound=40)
        await store.journal._revoke(set(range(FIRST + 5000, FIRST + 5000 + count)))
        store.check()
        assert not state.running.revokes
        await store.flush_owned(7)
        store.drop_owned(7)
        assert home_tag(lun, FIRST + count - 1) == 1


async def test_what_a_checkpoint_writes_meanwhile_is_flushed_too() -> None:
    """The checkpoint writes the same image a second time, while the first is being flushed. Of a
    target that forgot it, it would be written again: over what the next holder of the lock wrote.
    """
    lun = SimulatedLun(LUN_BYTES)
    async with small_store(lun) as store:
        await store.transact(creating((A, 1), owner=7))
        await store.commit()
        done = trio.Event()

        async def hand_over() -> None:
            await store.flush_owned(7)
            done.set()

        first = lun.hold(lambda c: c.op is Op.SYNCHRONIZE_CACHE, limit=1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hand_over)
            await first.wait_held()
            second = lun.hold(lambda c: is_home(c) and c.offset_bytes == A * BLOCK_BYTES, limit=1)
            nursery.start_soon(store.journal._checkpointer.checkpoint)
            await second.wait_held()
            flush = lun.hold(lambda c: c.op is Op.SYNCHRONIZE_CACHE, limit=1)
            first.lift()
            await trio.testing.wait_all_tasks_blocked()
            second.lift()
            await flush.wait_held()
            await trio.testing.wait_all_tasks_blocked()
            early = done.is_set()
            flush.lift()
            await done.wait()
    assert not early, "the lock is given up with a write that nobody has flushed"
