"""What is retained until a flush, for a target that may forget it."""

# ruff: noqa: ARG001 (a clock does its work by being asked for)

from __future__ import annotations

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from redirector.retained import FLUSH_AFTER_S, FLUSH_BYTES, STOP_BYTES, RetainedWrites


def numbers(retained: RetainedWrites) -> list[int]:
    return [offset for offset, _ in retained]


async def test_a_flush_covers_what_was_answered_before_it_began() -> None:
    retained = RetainedWrites()
    for number in range(4):
        retained.add(number, b"x" * 512)
    mark = retained.mark()
    retained.add(4, b"y" * 512)
    retained.forget(mark)
    assert numbers(retained) == [4]
    retained.forget(mark)
    retained.forget(retained.mark())
    assert len(retained) == 0
    retained.check()


@given(st.lists(st.one_of(st.integers(1, 5), st.just("begin"), st.just("end")), max_size=60))
def test_flushes_may_overlap(course: list[int | str]) -> None:
    async def run() -> None:
        retained, answered, stable = RetainedWrites(), 0, 0
        marks: list[tuple[int, int]] = []
        for event in course:
            if isinstance(event, int):
                for _ in range(event):
                    retained.add(answered, bytes(512))
                    answered += 1
            elif event == "begin":
                marks.append((retained.mark(), answered))
            elif marks:
                mark, covers = marks.pop(len(marks) // 2)
                retained.forget(mark)
                stable = max(stable, covers)
            assert numbers(retained) == list(range(stable, answered))
            retained.check()

    trio.run(run)


async def test_mutable_data_is_copied_and_bytes_are_not() -> None:
    retained = RetainedWrites()
    fixed, mutable = b"f" * 512, bytearray(b"m" * 512)
    retained.add(0, fixed)
    retained.add(1, mutable)
    retained.add(2, memoryview(mutable)[:512])
    mutable[:] = bytes(512)
    kept = [data for _, data in retained]
    assert kept[0] is fixed
    assert kept[1:] == [b"m" * 512] * 2


async def test_due_by_age_or_by_size(autojump_clock: MockClock) -> None:
    retained = RetainedWrites()
    with trio.move_on_after(100) as scope:
        await retained.wait_due()
    assert scope.cancelled_caught
    retained.add(0, bytes(512))
    start = trio.current_time()
    await retained.wait_due()
    assert trio.current_time() - start == pytest.approx(FLUSH_AFTER_S)
    retained.add(0, bytes(FLUSH_BYTES))
    start = trio.current_time()
    await retained.wait_due()
    assert trio.current_time() == start


async def test_writers_wait_for_room(autojump_clock: MockClock) -> None:
    retained = RetainedWrites()
    retained.add(0, bytes(STOP_BYTES))
    with trio.move_on_after(1) as scope:
        await retained.wait_room()
    assert scope.cancelled_caught
    async with trio.open_nursery() as nursery:
        nursery.start_soon(retained.wait_room)
        await trio.testing.wait_all_tasks_blocked()
        retained.forget(retained.mark())
    retained.add(0, bytes(STOP_BYTES))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(retained.wait_room)
        await trio.testing.wait_all_tasks_blocked()
        retained.stop()


async def test_a_flush_of_somebody_else_does_not_lose_who_waits_for_one_to_be_due(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """A flush with nothing retained, while the forced flush waits for a first write."""
    retained = RetainedWrites()
    due = trio.Event()

    async def wait() -> None:
        await retained.wait_due()
        due.set()

    nursery.start_soon(wait)
    await trio.testing.wait_all_tasks_blocked()
    retained.forget(retained.mark())
    retained.add(0, b"x")
    await trio.testing.wait_all_tasks_blocked()
    retained.forget(0)
    retained.add(1, bytes(FLUSH_BYTES))
    started = trio.current_time()
    with trio.fail_after(FLUSH_AFTER_S * 2):
        await due.wait()
    assert trio.current_time() == started


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12)), max_size=40))
def test_newest_is_what_all_in_order_would_leave(writes: list[tuple[int, int]]) -> None:
    retained = RetainedWrites()
    medium: dict[int, int] = {}
    for number, (start, length) in enumerate(writes, 1):
        retained.add(start, bytes([number]) * length)
        medium |= dict.fromkeys(range(start, start + length), number)
    pieces = retained.newest()
    assert sum(len(data) for _, data in pieces) == len(medium), "each byte once"
    assert {
        start + at: byte for start, data in pieces for at, byte in enumerate(bytes(data))
    } == medium


def test_newest_of_many_writes_takes_no_time() -> None:
    retained = RetainedWrites()
    for number in range(16384):
        retained.add(number * 7919 % 16384 * 8192, bytes(4096))
    assert len(retained.newest()) == 16384
