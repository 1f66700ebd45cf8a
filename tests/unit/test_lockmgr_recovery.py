"""Recovery, scripted: what is kept, what is lost, and what waits for a replay."""

from __future__ import annotations

import pytest

from lockmgr.claim import Claim
from lockmgr.events import Patience
from lockmgr.messages import Resource
from lockmgr.modes import Mode
from lockmgr.recovery import Stage
from lockmgr.settings import Settings
from tests.unit.lockmgr_changing import ChangingCluster

NL, CR, CW, PR, PW, EX = Mode
AT = [Resource(b"at %d" % node, bytes([node])) for node in range(5)]
"""``AT[n]`` is mastered by node n as long as that is a member, then by the next."""


@pytest.fixture
def three() -> ChangingCluster:
    return ChangingCluster(3, Settings(min_hold_s=0.0))


def held(cluster: ChangingCluster, node: int, resource: Resource, mode: Mode) -> Claim:
    claim = cluster.acquire(node, resource, mode)
    cluster.settle()
    assert claim in cluster.held
    return claim


def depart(cluster: ChangingCluster, node: int) -> None:
    cluster.kill(node)
    cluster.change_view()
    cluster.recover()


def test_survivors_keep_what_they_hold(three: ChangingCluster) -> None:
    claims = [held(three, 1, AT[where], mode) for where, mode in ((0, EX), (1, PR), (2, PW))]
    depart(three, 2)
    assert all(claim in three.held for claim in claims)
    assert three.cores[0].master.resources[b"at 2"].granted == {1: PW}
    assert three.thawed[0] == three.thawed[1] == 4


def test_nothing_is_granted_over_an_unreplayed_journal(three: ChangingCluster) -> None:
    held(three, 2, AT[0], EX)
    waiter = three.acquire(1, AT[0], PR)
    three.settle()
    depart(three, 2)
    late = three.acquire(0, AT[0], CR)
    three.clear(2)
    three.settle()
    assert {waiter, late} <= three.waiting.keys()
    three.replay(2)
    three.settle()
    assert {waiter, late} <= three.held.keys()


def test_nothing_a_departed_reader_held_is_granted_before_it_is_cleared(
    three: ChangingCluster,
) -> None:
    held(three, 2, AT[0], PR)
    depart(three, 2)
    reader = held(three, 1, AT[0], PR)
    three.release(reader)
    writer = three.acquire(1, AT[0], EX)
    three.replay(2)
    three.settle()
    assert writer in three.waiting
    three.clear(2)
    three.settle()
    assert writer in three.held


def test_a_lost_master_may_have_granted_anything(three: ChangingCluster) -> None:
    depart(three, 2)
    waiter = three.acquire(1, AT[2], CR)
    other = held(three, 1, AT[1], EX)
    three.settle()
    assert waiter in three.waiting and other in three.held
    three.replay(2)
    three.settle()
    assert waiter in three.waiting, "it may have EX"
    three.clear(2)
    three.settle()
    assert waiter in three.held


@pytest.mark.parametrize(
    ("kept", "wanted", "granted"),
    [(PR, PR, True), (PR, CR, True), (EX, EX, True), (CR, CR, False), (CW, CW, False)],
)
def test_a_reasserted_mode_that_excludes_a_writer_needs_no_replay(
    three: ChangingCluster, kept: Mode, wanted: Mode, granted: bool
) -> None:
    first = held(three, 0, AT[2], kept)
    depart(three, 2)
    second = three.acquire(1, AT[2], wanted)
    three.settle()
    if kept is EX:
        assert second in three.waiting
        three.release(first)
        three.settle()
    assert (second in three.held) == granted


def test_a_debt_survives_the_master_that_knew_of_it() -> None:
    four = ChangingCluster(4, Settings(min_hold_s=0.0))
    held(four, 3, AT[0], EX)
    depart(four, 3)
    depart(four, 0)
    waiter = four.acquire(2, AT[0], PR)
    four.replay(0)
    four.clear(0)
    four.clear(3)
    four.settle()
    assert waiter in four.waiting
    four.replay(3)
    four.settle()
    assert waiter in four.held


def test_a_debt_on_what_nobody_knows_by_name_survives_too() -> None:
    five = ChangingCluster(5, Settings(min_hold_s=0.0))
    depart(five, 3)
    depart(five, 1)
    waiter = five.acquire(2, AT[3], PR)
    five.replay(1)
    five.clear(1)
    five.settle()
    assert waiter in five.waiting
    five.replay(3)
    five.clear(3)
    five.settle()
    assert waiter in five.held


def test_the_coordinator_tells_members_and_successors_what_is_settled() -> None:
    four = ChangingCluster(4, Settings(min_hold_s=0.0))
    held(four, 3, AT[2], EX)
    depart(four, 3)
    four.clear(3)
    four.settle()
    assert four.cores[2].recovery.debts.uncleared == frozenset()
    assert four.cores[2].owing == {3}
    depart(four, 0)
    assert four.cores[2].recovery.debts.uncleared == {0}
    assert four.cores[2].master.resources[b"at 2"].owed == {3: EX}
    four.replay(3)
    four.settle()
    assert b"at 2" not in four.cores[2].master.resources


def test_the_value_of_a_dead_writer_is_not_valid(three: ChangingCluster) -> None:
    writer = held(three, 2, AT[0], EX)
    three.set_value(writer, b"1" * 64)
    three.release(writer)
    reader = held(three, 1, AT[0], PR)
    assert reader.lock is not None and reader.lock.value.data == b"1" * 64
    three.release(reader)
    writer = held(three, 2, AT[0], EX)
    three.set_value(writer, b"2" * 64)
    depart(three, 2)
    three.replay(2)
    three.clear(2)
    reader = held(three, 1, AT[0], PR)
    assert reader.lock is not None and reader.lock.value.data is None


def test_the_value_of_a_living_writer_survives_its_master(three: ChangingCluster) -> None:
    writer = held(three, 0, AT[2], EX)
    three.set_value(writer, b"1" * 64)
    depart(three, 2)
    three.release(writer)
    reader = held(three, 1, AT[2], PR)
    assert reader.lock is not None and reader.lock.value.data == b"1" * 64


def test_the_value_that_a_surviving_master_knows_stays_valid(three: ChangingCluster) -> None:
    interested = held(three, 0, AT[0], NL)
    writer = held(three, 1, AT[0], PW)
    three.set_value(writer, b"1" * 64)
    three.convert(writer, NL)
    three.acquire(0, AT[0], EX)
    three.settle()
    depart(three, 2)
    three.release(interested)
    assert three.cores[0].master.resources[b"at 0"].value.data == b"1" * 64


def test_a_value_lost_on_its_way_to_the_master_is_not_valid(three: ChangingCluster) -> None:
    interested = held(three, 0, AT[0], NL)
    writer = held(three, 1, AT[0], PW)
    three.set_value(writer, b"1" * 64)
    waiter = three.acquire(2, AT[0], EX)
    three.release(writer)
    for _ in range(3):
        while three.channels[2, 0]:
            three.deliver(2, 0)
        while three.channels[0, 1]:
            three.deliver(0, 1)
        for place in list(three.demoting):
            three.demoted(*place)
    assert 1 not in three.held.values() and three.channels[1, 0], "Lower is on its way"
    three.change_view()
    three.recover()
    assert waiter in three.held and waiter.lock is not None
    assert waiter.lock.value.data is None and three.refused
    three.release(interested)


def test_waiters_keep_their_age(three: ChangingCluster) -> None:
    holder = held(three, 0, AT[2], EX)
    waiters = []
    for node in (1, 0, 1):
        three.now += 1.0
        waiters.append(three.acquire(node, AT[2], EX))
        three.now += 1.0
    three.settle()
    depart(three, 2)
    three.replay(2)
    three.clear(2)
    three.release(holder)
    order = []
    for _ in waiters:
        three.settle()
        (claim,) = three.held
        order.append(claim)
        three.release(claim)
    assert order[0] is waiters[0]
    assert set(order) == set(waiters)


def test_a_glimpse_whose_answerer_departed_is_asked_again(three: ChangingCluster) -> None:
    held(three, 2, AT[0], EX)
    ticket = three.glimpse(1, AT[0])
    three.deliver(1, 0)
    depart(three, 2)
    assert three.glimpsed == {ticket: None}


def test_a_glimpse_answered_twice_is_told_once(three: ChangingCluster) -> None:
    held(three, 1, AT[0], EX)
    ticket = three.glimpse(0, AT[0])
    three.deliver(0, 1)
    assert three.answering
    three.kill(2)
    three.change_view()
    three.recover()
    assert three.glimpsed == {ticket: b"answer"}


def test_a_demotion_goes_on_across_a_view(three: ChangingCluster) -> None:
    three.cache(0, AT[2], EX)
    waiter = three.acquire(1, AT[2], EX)
    while not three.demoting:
        three.deliver(*three.busy_channels[0])
    three.kill(2)
    three.change_view()
    for node in (0, 1):
        three.install(node)
    three.demoted(0, AT[2])
    three.settle()
    three.replay(2)
    three.clear(2)
    three.settle()
    assert waiter in three.held and not three.demotions[1:]


def test_a_timeout_during_a_recovery(three: ChangingCluster) -> None:
    held(three, 0, AT[1], EX)
    waiter = three.acquire(1, AT[1], EX, timeout_s=1.0)
    three.settle()
    three.kill(2)
    three.change_view()
    three.install(1)
    three.sleep(2.0)
    assert waiter not in three.waiting
    three.recover()
    assert not three.cores[1].master.resources[b"at 1"].waiting


def test_a_try_waits_for_the_thaw_and_for_no_holder(three: ChangingCluster) -> None:
    held(three, 0, AT[1], EX)
    three.kill(2)
    three.change_view()
    three.install(0)
    refused = three.acquire(0, AT[0], EX, patience=Patience.NONE)
    assert refused not in three.held and refused not in three.waiting
    granted = three.acquire(0, AT[0], EX, patience=Patience.NO_QUEUE)
    assert granted in three.waiting
    denied = three.acquire(1, AT[1], EX, patience=Patience.NO_QUEUE)
    three.recover()
    assert granted in three.held and denied not in three.waiting and denied not in three.held


def test_a_newcomer_takes_over_with_values(three: ChangingCluster) -> None:
    depart(three, 2)
    three.replay(2)
    three.clear(2)
    three.settle()
    resource = Resource(b"at 3", bytes([3]))
    keeper = held(three, 1, resource, CR)
    writer = held(three, 1, Resource(b"at 3", bytes([3])), PW)
    three.set_value(writer, b"1" * 64)
    three.release(writer)
    assert three.may_join()
    node = three.join()
    three.recover()
    assert b"at 3" in three.cores[node].master.resources
    reader = held(three, node, resource, PR)
    assert reader.lock is not None and reader.lock.value.data == b"1" * 64
    three.release(keeper)


def test_another_coordinator_in_the_same_epoch_finishes_the_barrier() -> None:
    three = ChangingCluster(3, Settings(min_hold_s=0.0))
    three.kill(2)
    three.change_view()
    for node in (0, 1):
        three.install(node)
    while three.thawed[0] == 3:
        three.deliver(*three.busy_channels[0])
    three.channels[0, 1].pop()  # the Thaw is lost with the old coordinator's role
    three.coordinator = 1
    three.retell()
    three.settle()
    assert three.thawed[1] == 4


def test_a_newer_view_restarts_and_one_may_be_skipped() -> None:
    four = ChangingCluster(4, Settings(min_hold_s=0.0))
    claim = held(four, 1, AT[0], EX)
    four.kill(3)
    four.change_view()
    four.install(0)
    four.install(1)
    four.kill(2)
    four.change_view()
    four.install(1, skip=True)
    four.recover()
    assert four.thawed[0] == four.thawed[1] == 5 and claim in four.held


def test_a_value_that_died_with_its_master_is_not_valid() -> None:
    three = ChangingCluster(3, Settings(cache_limit=0, min_hold_s=0.0))
    interested = held(three, 1, AT[2], CR)
    writer = held(three, 0, AT[2], PW)
    three.set_value(writer, b"1" * 64)
    three.release(writer)
    three.convert(interested, PR)
    three.settle()
    assert interested.lock is not None and interested.lock.value.data == b"1" * 64
    three.convert(interested, CR)
    three.acquire(0, AT[2], PW)
    three.settle()
    three.release(next(claim for claim, node in three.held.items() if node == 0))
    writer = held(three, 0, AT[2], PW)
    three.set_value(writer, b"2" * 64)
    three.release(writer)
    three.settle()
    assert not three.cores[0].locks.locks, "only the master knows the second value"
    depart(three, 2)
    three.replay(2)
    three.clear(2)
    reader = held(three, 0, AT[2], PR)
    assert reader.lock is not None and reader.lock.value.data is None


@pytest.mark.parametrize("rebuilt", [True, False], ids=["newcomer rebuilt", "newcomer lags"])
def test_a_debt_handed_to_a_newcomer_survives_a_failure_in_between(rebuilt: bool) -> None:
    """The old master has gone on, the newcomer has not; each alone must still know of the debt."""
    cluster = ChangingCluster(3, Settings(min_hold_s=0.0))
    resource = Resource(b"at 3", bytes([3]))  # mastered by 0, then by 3
    held(cluster, 2, resource, EX)
    depart(cluster, 2)
    newcomer = cluster.join()
    for node in sorted(cluster.alive):
        cluster.install(node)
    stage = Stage.THAWED if rebuilt else Stage.BARRIER
    cores = cluster.cores
    while cores[0].recovery.stage is not stage:
        channels = cluster.busy_channels
        heard = [channel for channel in channels if rebuilt or channel[1] != newcomer]
        cluster.deliver(*heard[0])
    assert cores[newcomer].recovery.stage is (Stage.BARRIER if rebuilt else Stage.REASSERTING)
    depart(cluster, 1)
    assert cores[newcomer].master.resources[b"at 3"].owed == {2: EX}


def test_what_a_departed_node_wanted_is_wanted_no_more(three: ChangingCluster) -> None:
    holder = held(three, 0, AT[0], EX)
    three.acquire(2, AT[0], EX)
    three.settle()
    assert three.demotions and three.cores[0].locks.locks[b"at 0"].wanted is EX
    depart(three, 2)
    assert three.cores[0].locks.locks[b"at 0"].wanted is NL
    three.release(holder)
    three.settle()
    assert not three.demotions[1:], "nobody waits any more"
