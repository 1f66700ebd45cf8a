"""Holders that say nothing though others wait are named; who works on it, or is used, is not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from lockmgr.events import Stalled, Unresponsive, ViewChanged
from lockmgr.manager import LockManager, open_lock_manager
from lockmgr.mastering import rendezvous
from lockmgr.messages import Resource, Working
from lockmgr.modes import Mode
from lockmgr.settings import Settings
from tests.unit.lockmgr_cluster import Cluster

EVICT_AFTER_S = 6.0
MASTER, HOLDER, ASKER = 0, 1, 2
R = Resource(b"r", bytes([MASTER]))
S = Resource(b"s", bytes([MASTER]))
PR, EX = Mode.PR, Mode.EX


def contended(*resources: Resource, cluster: Cluster | None = None) -> Cluster:
    """HOLDER has them in EX and has been told that ASKER wants them; its owner does not finish."""
    cluster = cluster or Cluster(3, Settings(evict_after_s=EVICT_AFTER_S))
    for resource in resources:
        cluster.cache(HOLDER, resource, EX)
    for resource in resources:
        cluster.acquire(ASKER, resource, EX)
    deliver(cluster)
    return cluster


def deliver(cluster: Cluster, *, mute: int | None = None) -> None:
    """All messages arrive, but those of ``mute``: they get lost."""
    while busy := cluster.busy_channels:
        if busy[0][0] == mute:
            cluster.channels[busy[0]].clear()
        else:
            cluster.deliver(*busy[0])


def pass_time(cluster: Cluster, seconds: float, *, mute: int | None = None) -> None:
    for _ in range(round(seconds / 0.25)):
        cluster.sleep(0.25)
        deliver(cluster, mute=mute)


def named(cluster: Cluster) -> list[tuple[int, int]]:
    return [(judge, found.node) for judge, found in cluster.unresponsive]


def test_an_owner_that_takes_its_time_is_not_named() -> None:
    cluster = contended(R)
    pass_time(cluster, 60)
    assert cluster.demoting == {(HOLDER, R): Mode.NL}, "its owner writes back all the time"
    assert not cluster.unresponsive
    cluster.settle()
    assert not cluster.waiting
    pass_time(cluster, 3)
    assert all(core.unanswered.next_timer() is None for core in cluster.cores)


def test_a_task_that_uses_the_lock_for_long_is_not_named() -> None:
    cluster = Cluster(3, Settings(evict_after_s=EVICT_AFTER_S))
    cluster.acquire(HOLDER, R, EX)
    deliver(cluster)
    cluster.acquire(ASKER, R, PR)
    for _ in range(4):
        cluster.settle()
        pass_time(cluster, 10)
    assert cluster.waiting and not cluster.unresponsive


def test_a_stalled_holder_is_named_again_and_again() -> None:
    cluster = contended(R, S)
    pass_time(cluster, 5)
    cluster.step(HOLDER, Stalled(True))
    pass_time(cluster, 4)
    assert not cluster.unresponsive, "it has said something 5 s ago"
    pass_time(cluster, 3)
    assert named(cluster) == [(MASTER, HOLDER)], "once for all that it holds"
    assert cluster.unresponsive == [(MASTER, Unresponsive(HOLDER, b"r", EX, 6))]
    assert cluster.unresponsive[0][1].words() == (
        "it holds EX of b'r', which others want, and has not said for 6 s that it works on it"
    )
    pass_time(cluster, 7)
    assert named(cluster) == [(MASTER, HOLDER)] * 2
    cluster.step(HOLDER, Stalled(False))
    pass_time(cluster, 30)
    assert named(cluster) == [(MASTER, HOLDER)] * 2


def test_a_silent_holder_is_named() -> None:
    cluster = contended(R)
    pass_time(cluster, 5.5, mute=HOLDER)
    assert not cluster.unresponsive
    pass_time(cluster, 1.5, mute=HOLDER)
    assert named(cluster) == [(MASTER, HOLDER)]


def test_a_master_names_itself_but_nobody_else_while_it_is_stalled() -> None:
    cluster = Cluster(3, Settings(evict_after_s=EVICT_AFTER_S))
    cluster.cache(MASTER, S, EX)
    contended(R, cluster=cluster)
    cluster.acquire(ASKER, S, EX)
    deliver(cluster)
    cluster.step(MASTER, Stalled(True))
    cluster.step(HOLDER, Stalled(True))
    pass_time(cluster, 20)
    assert set(named(cluster)) == {(MASTER, MASTER)}
    cluster.unresponsive.clear()
    cluster.step(MASTER, Stalled(False))
    pass_time(cluster, 5)
    assert not cluster.unresponsive, "it begins afresh"
    pass_time(cluster, 2)
    assert named(cluster) == [(MASTER, HOLDER)]


def test_a_judge_that_has_slept_begins_afresh() -> None:
    cluster = contended(R)
    cluster.step(HOLDER, Stalled(True))
    pass_time(cluster, 5)
    cluster.sleep(20)
    assert not cluster.unresponsive
    pass_time(cluster, 5)
    assert not cluster.unresponsive
    pass_time(cluster, 2)
    assert named(cluster) == [(MASTER, HOLDER)]


def test_who_does_not_stand_in_the_way_any_more_is_forgotten() -> None:
    cluster = contended(R)
    (claim,) = cluster.waiting
    cluster.withdraw(claim)
    deliver(cluster)
    pass_time(cluster, 20, mute=HOLDER)
    assert not cluster.unresponsive
    assert all(core.unanswered.next_timer() is None for core in cluster.cores)


def test_nothing_is_said_where_it_is_switched_off() -> None:
    cluster = contended(R, cluster=Cluster(3, Settings(evict_after_s=None)))
    pass_time(cluster, 20)
    assert not cluster.unresponsive
    assert all(core.unanswered.next_timer() is None for core in cluster.cores)


@pytest.mark.parametrize("resource", [R, Resource(b"unknown", b"")])
def test_a_word_about_nothing_changes_nothing(resource: Resource) -> None:
    cluster = Cluster(3, Settings(evict_after_s=EVICT_AFTER_S))
    cluster.channels[HOLDER, MASTER].append(Working(resource, 3, HOLDER))
    deliver(cluster)
    cluster.check()
    assert all(core.unanswered.next_timer() is None for core in cluster.cores)


class Wires:
    """Two lock managers in one process; what one sends the other takes in a task of its own."""

    def __init__(self) -> None:
        self.managers: list[LockManager] = []
        self.send, self._arrives = trio.open_memory_channel[tuple[int, Any]](1000)
        self.named: list[tuple[int, int]] = []

    def take(self, to: int, message: Any) -> None:
        self.send.send_nowait((to, message))

    async def carry(self) -> None:
        async for to, message in self._arrives:
            self.managers[to].deliver(message)


class Slow:
    """An owner that takes its time."""

    def __init__(self) -> None:
        self.may_go_on = trio.Event()

    async def demote(self, resource: Resource, to_mode: Mode) -> None:
        del resource, to_mode
        await self.may_go_on.wait()

    async def glimpse(self, resource: Resource) -> bytes:
        await trio.lowlevel.checkpoint()
        return resource.name


@asynccontextmanager
async def two_managers(wires: Wires) -> AsyncIterator[tuple[LockManager, LockManager]]:
    """Of the same view, thawed."""
    async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
        nursery.start_soon(wires.carry)
        for node in range(2):

            def name(found: Unresponsive, judge: int = node) -> None:
                wires.named.append((judge, found.node))

            wires.managers.append(
                await stack.enter_async_context(
                    open_lock_manager(
                        node=node, epoch=0, members=(), send=wires.take, on_unresponsive=name
                    )
                )
            )
        for manager in wires.managers:
            manager.view_changed(ViewChanged(1, (0, 1), 0))
        yield wires.managers[0], wires.managers[1]
        await stack.aclose()
        nursery.cancel_scope.cancel()


async def test_the_shell_names_who_is_stalled(autojump_clock: MockClock) -> None:
    del autojump_clock
    wires = Wires()
    async with two_managers(wires) as (one, other):
        resource = next(
            found
            for found in (Resource(b"n", b"p%d" % number) for number in range(100))
            if rendezvous(found.placement, (0, 1)) == 0
        )
        slow = Slow()
        other.register_owner(b"", slow)
        async with other.acquire(resource, EX):
            pass
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                async with one.acquire(resource, EX):
                    pass

            nursery.start_soon(wait)
            await trio.sleep(30)
            assert not wires.named, "its owner works"
            other.stalled(True)
            await trio.sleep(8)
            assert wires.named == [(0, 1)]
            other.stalled(False)
            await trio.sleep(20)
            assert wires.named == [(0, 1)]
            slow.may_go_on.set()
