"""Images in several stages at once: changed, committed, freed and written home meanwhile."""

from __future__ import annotations

import trio
import trio.testing

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
    small_store,
    tag_of,
)

A, B, C = FIRST, FIRST + 1, FIRST + 2


async def test_a_freed_block_that_is_its_own_past_is_not_written_home() -> None:
    lun = SimulatedLun(LUN_BYTES)
    async with small_store(lun) as store:
        await store.transact(creating((A, 1), (B, 2)))
        await store.commit()
        await store.transact(freeing(A))
        await store.commit()
        await store.checkpoint()
        assert (home_tag(lun, A), home_tag(lun, B)) == (None, 2)
        store.check()


async def test_a_frozen_image_never_changes() -> None:
    lun = SimulatedLun(LUN_BYTES)
    async with small_store(lun) as store:
        await store.transact(creating((A, 1)))
        hold = lun.hold(is_record, limit=1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.commit)
            await hold.wait_held()
            await store.transact(editing((A, 2)))
            store.check()
            now = store.statistics()
            assert (now.cached, now.running, now.committing, now.unhomed) == (1, 1, 1, 0)
            hold.lift()
        now = store.statistics()
        assert (now.running, now.committing, now.unhomed, now.ring_used) == (1, 0, 1, 2)
        assert home_tag(await recovered(lun), A) == 1
        assert tag_of(store.cache.read(A, KIND, 0)) == 2
        await store.commit()
        assert home_tag(await recovered(lun), A) == 2


async def test_a_block_committed_again_during_its_home_write_goes_home_again() -> None:
    lun = SimulatedLun(LUN_BYTES)
    async with small_store(lun) as store:
        await store.transact(creating((A, 1)))
        hold = lun.hold(is_home, limit=1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.checkpoint)
            await hold.wait_held()
            await store.transact(editing((A, 2)))
            await store.commit()
            hold.lift()
        store.check()
        state = store.journal.state
        assert home_tag(lun, A) == 1 and A in state.unhomed
        assert state.tail_sequence == 2, "the first record is home, the second is not"
        assert home_tag(await recovered(lun), A) == 2
        await store.checkpoint()
        assert home_tag(lun, A) == 2 and state.idle


async def test_settle_waits_for_the_home_write_of_a_freed_block() -> None:
    lun = SimulatedLun(LUN_BYTES)
    async with small_store(lun) as store:
        await store.transact(creating((A, 1)))
        hold = lun.hold(is_home, limit=1)
        settled = trio.Event()

        async def free() -> None:
            await store.transact(freeing(A))
            await store.commit()
            await store.settle()
            settled.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.checkpoint)
            await hold.wait_held()
            nursery.start_soon(free)
            await trio.testing.wait_all_tasks_blocked()
            assert not settled.is_set()
            assert A not in store.journal.state.unhomed
            hold.lift()
        assert settled.is_set()


async def test_what_is_revoked_while_a_checkpoint_waits_is_not_written() -> None:
    """Images are picked when it is their turn, not when the checkpoint began."""
    lun = SimulatedLun(LUN_BYTES)
    async with small_store(lun) as store:
        await store.transact(creating((A, 1), owner=1))
        await store.transact(creating((C, 3), owner=3))
        await store.commit()
        hold = lun.hold(is_home, limit=1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.flush_owned, 1)
            await hold.wait_held()
            nursery.start_soon(store.checkpoint)
            await trio.testing.wait_all_tasks_blocked()
            await store.transact(freeing(C))
            await store.commit()
            hold.lift()
        assert (home_tag(lun, A), home_tag(lun, C)) == (1, None)
        store.check()


async def test_a_free_that_is_not_stable_keeps_the_last_image_in_the_journal() -> None:
    lun = SimulatedLun(LUN_BYTES)
    async with small_store(lun) as store:
        await store.transact(creating((A, 1)))
        await store.commit()
        await store.transact(freeing(A))
        hold = lun.hold(is_record)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.commit)
            await hold.wait_held()
            await store.journal._checkpointer.checkpoint()
            store.check()
            assert home_tag(await recovered(lun), A) == 1
            hold.lift()
        assert store.journal.state.unhomed == {}


async def test_freed_and_created_in_one_running_set() -> None:
    lun = SimulatedLun(LUN_BYTES)
    async with small_store(lun) as store:
        await store.transact(creating((A, 1)))
        await store.commit()
        await store.transact(freeing(A))
        await store.transact(creating((A, 2), owner=5))
        store.check()
        await store.commit()
        store.check()
        assert home_tag(await recovered(lun), A) == 2
        await store.transact(freeing(A))
        await store.transact(creating((A, 3)))
        await store.transact(freeing(A))
        await store.commit()
        assert home_tag(await recovered(lun), A) is None
