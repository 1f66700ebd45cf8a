"""Holders that say nothing though others wait are named; who works on it, or is used, is not."""

from __future__ import annotations

import pytest

from lockmgr.events import Stalled
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
    return [(judge, holder) for judge, holder, _words in cluster.unresponsive]


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
    (_, _, words) = cluster.unresponsive[0]
    assert words == (
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
