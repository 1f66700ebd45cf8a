"""When the LUN refuses a write of the journal's: nothing follows, and everyone is told."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from csvfs.errors import VolumeFailed
from csvfs.format import BLOCK_BYTES
from csvfs.journal.store import Store
from redirector.block.arbiter import Op
from redirector.block.device import BlockError, OutcomeUnknown, SpaceExhausted
from redirector.block.simulated import Command, SimulatedLun
from tests.small_store import (
    FIRST,
    KIND,
    LUN_BYTES,
    creating,
    editing,
    home_tag,
    is_header,
    is_home,
    is_record,
    recovered,
    small_store,
)

A, B = FIRST, FIRST + 1


def is_flush(command: Command) -> bool:
    return command.op is Op.SYNCHRONIZE_CACHE


def full(what: str) -> SpaceExhausted:
    return SpaceExhausted(what, sense_key=7, asc_ascq=0x2707, words="space allocation failed")


def unknown(what: str) -> OutcomeUnknown:
    return OutcomeUnknown(f"{what}: no answer")


async def assert_everything_fails(store: Store) -> None:
    for call in (
        lambda: store.transact(creating((B, 1))),
        lambda: store.run(lambda reader: reader.read(A, KIND, 0)),
        store.commit,
        store.checkpoint,
        store.settle,
        lambda: store.flush_owned(0),
        store.close,
    ):
        with pytest.raises(VolumeFailed, match="can no longer write its metadata"):
            await call()


@pytest.mark.parametrize("error", [full, unknown])
@pytest.mark.parametrize("what", [is_record, is_home, is_flush, is_header])
async def test_nothing_is_written_after_a_failure(
    what: Callable[[Command], bool], error: Callable[[str], BlockError]
) -> None:
    lun = SimulatedLun(LUN_BYTES)
    told: list[VolumeFailed] = []
    async with small_store(lun, on_failed=told.append) as store:
        await store.transact(creating((A, 1)))
        await store.commit()
        await store.transact(editing((A, 2)))
        lun.inject(what, error)
        with pytest.raises(VolumeFailed) as caught:
            await store.checkpoint()
        assert isinstance(caught.value.__cause__, BlockError)
        assert len(told) == 1 and store.failure is told[0]
        written = lun.journal.writes
        await assert_everything_fails(store)
        assert lun.journal.writes == written
        assert home_tag(await recovered(lun), A) == (1 if what is is_record else 2)
    assert lun.journal.writes == written


async def test_all_who_wait_are_told() -> None:
    lun = SimulatedLun(LUN_BYTES)
    failures: list[str] = []
    async with small_store(lun) as store:
        hold = lun.hold(is_record, limit=1)

        async def wait(call: Callable[[], Awaitable[object]]) -> None:
            try:
                await call()
            except VolumeFailed as error:
                failures.append(str(error))

        async with trio.open_nursery() as nursery:
            await store.transact(creating((A, 1)))
            nursery.start_soon(wait, store.commit)
            await hold.wait_held()
            for round_ in range(6):
                nursery.start_soon(wait, store.commit)
                nursery.start_soon(wait, store.checkpoint)
                nursery.start_soon(wait, store.wait_stable)
                pairs = [(B + 40 * round_ + i, 1) for i in range(40)]
                nursery.start_soon(wait, lambda pairs=pairs: store.transact(creating(*pairs)))
            await trio.testing.wait_all_tasks_blocked()
            assert failures == []
            hold.drop()
        assert len(failures) >= 20
        assert "unmount it, look after the LUN" in failures[0]


async def test_a_commit_that_was_stable_before_the_failure_succeeds() -> None:
    lun = SimulatedLun(LUN_BYTES)
    async with small_store(lun) as store:
        await store.transact(creating((A, 1)))
        await store.commit()
        await store.transact(editing((A, 2)))
        lun.inject(is_record, full)
        with pytest.raises(VolumeFailed):
            await store.commit()
        await store.journal.wait_stable(1)


async def test_a_failed_flush_of_data_is_final() -> None:
    """A later flush that succeeds would prove nothing."""
    lun = SimulatedLun(LUN_BYTES)
    async with small_store(lun) as store:
        await store.device.write(A * BLOCK_BYTES, bytes(BLOCK_BYTES))
        store.note_write()
        lun.inject(is_flush, full)
        for _ in range(2):
            with pytest.raises(VolumeFailed):
                await store.flush()
        assert store.journal.flusher.flushes == 1


async def test_a_record_does_not_follow_a_home_write_that_failed_meanwhile() -> None:
    lun = SimulatedLun(LUN_BYTES)
    async with small_store(lun) as store:
        await store.transact(creating((A, 1)))
        await store.commit()
        flush = lun.hold(is_flush, limit=1)
        lun.inject(is_home, full)

        async def commit() -> None:
            with pytest.raises(VolumeFailed):
                await store.commit()

        async with trio.open_nursery() as nursery:
            store.note_write()
            await store.transact(creating((B, 1)))
            nursery.start_soon(commit)
            await flush.wait_held()
            store.journal._request_checkpoint()
            await trio.testing.wait_all_tasks_blocked()
            assert store.failure is not None
            flush.lift()
        assert store.journal.commits == 1 and home_tag(await recovered(lun), B) is None


async def test_a_bug_in_a_callback_stops_the_store_and_comes_out() -> None:
    def broken() -> None:
        raise ZeroDivisionError("a bug")

    stores: list[Store] = []

    async def live() -> None:
        async with small_store(SimulatedLun(LUN_BYTES)) as store:
            stores.append(store)
            await store.transact(lambda tx: tx.on_stable(broken))
            await store.commit()

    with pytest.raises((ZeroDivisionError, ExceptionGroup)) as caught:
        await live()
    assert isinstance(caught.value, ZeroDivisionError) or caught.group_contains(ZeroDivisionError)
    assert stores[0].failure is not None


async def test_an_error_inside_the_block_comes_out_as_itself_and_is_a_crash() -> None:
    lun = SimulatedLun(LUN_BYTES)
    stores: list[Store] = []

    async def live() -> None:
        async with small_store(lun) as store:
            stores.append(store)
            await store.transact(creating((A, 1)))
            await store.commit()
            await store.transact(editing((A, 2)))
            raise KeyError("the daemon dies")

    with pytest.raises(KeyError):
        await live()
    assert home_tag(lun, A) is None
    assert home_tag(await recovered(lun), A) == 1
    with pytest.raises(VolumeFailed, match="was stopped"):
        await stores[0].commit()
