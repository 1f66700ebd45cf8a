"""One node's side: caching, claims beside each other, giving up, timeouts. Scripted."""

from __future__ import annotations

import pytest

from lockmgr.claim import Claim, ClaimState, Phase
from lockmgr.core import LockCore
from lockmgr.errors import ProtocolViolation
from lockmgr.events import (
    Acquire,
    AwaitDrain,
    Close,
    Convert,
    Deliver,
    Demoted,
    Deny,
    Effect,
    EpochRefused,
    Grant,
    Patience,
    Release,
    TimerDue,
    ViewChanged,
    Withdraw,
)
from lockmgr.messages import Granted, Request, Resource, ValueBlock
from lockmgr.modes import Mode
from lockmgr.settings import Settings
from lockmgr.timers import Timers
from tests.unit.lockmgr_cluster import Cluster

NL, CR, CW, PR, PW, EX = Mode
HERE = Resource(b"here", b"\0")
THERE = Resource(b"there", b"\1")
HOLD_S = 0.25


def alone(cache_limit: int = 100, shed_at_once: int = 4) -> Cluster:
    settings = Settings(cache_limit, shed_at_once, min_hold_s=HOLD_S)
    return Cluster(1, settings)


@pytest.fixture
def node() -> Cluster:
    return alone()


@pytest.fixture
def pair() -> Cluster:
    return Cluster(2, Settings(min_hold_s=HOLD_S))


# -- claims on a node of its own ------------------------------------------------------------------
def test_a_released_lock_stays_cached(node: Cluster) -> None:
    node.release(node.acquire(0, HERE, EX))
    statistics = node.cores[0].statistics()
    assert (statistics.locks, statistics.idle, statistics.mastered) == (1, 1, 1)
    for mode in (EX, PR, CR, PW, NL):
        claim = node.acquire(0, HERE, mode, patience=Patience.NONE)
        assert claim in node.held
        node.release(claim)
    statistics = node.cores[0].statistics()
    assert (statistics.master_grants, statistics.cached_grants) == (1, 5)


def test_claims_exclude_each_other_by_the_matrix(node: Cluster) -> None:
    reader = node.acquire(0, HERE, PR)
    assert node.acquire(0, HERE, PR) in node.held
    assert node.acquire(0, HERE, EX, patience=Patience.NONE) not in node.held
    assert node.acquire(0, HERE, CW, patience=Patience.NO_QUEUE) not in node.held
    assert reader.lock is not None and reader.lock.held is PR


def test_shared_here_lets_a_reader_and_a_writer_stand_beside_each_other(node: Cluster) -> None:
    writer = node.acquire(0, HERE, EX, shared=True)
    reader = node.acquire(0, HERE, PR, shared=True)
    assert {writer, reader} == set(node.held)
    assert node.acquire(0, HERE, PR, patience=Patience.NONE) not in node.held
    alone_ = node.acquire(0, HERE, EX)
    assert alone_ in node.waiting
    node.release(writer)
    assert alone_ in node.waiting
    node.release(reader)
    assert alone_ in node.held
    assert node.acquire(0, HERE, PR, shared=True, patience=Patience.NONE) not in node.held


def test_a_stream_of_readers_does_not_starve_a_writer(node: Cluster) -> None:
    first = node.acquire(0, HERE, PR)
    writer = node.acquire(0, HERE, EX)
    readers = [node.acquire(0, HERE, PR) for _ in range(3)]
    assert not set(readers) & set(node.held)
    node.release(first)
    assert set(node.held) == {writer}
    node.release(writer)
    assert set(node.held) == set(readers)


def test_conversion_waits_for_the_others_and_goes_first(node: Cluster) -> None:
    one, two = node.acquire(0, HERE, PR), node.acquire(0, HERE, PR)
    newcomer = node.acquire(0, HERE, EX)
    node.convert(one, EX)
    assert one.state is ClaimState.CONVERTING and one.mode is PR
    node.release(two)
    assert one.mode is EX and one in node.held and newcomer in node.waiting
    node.convert(one, PR)
    assert one.mode is PR and newcomer in node.waiting
    node.release(one)
    assert newcomer in node.held


def test_a_conversion_overtakes_any_in_whose_way_it_stands(node: Cluster) -> None:
    blocker = node.acquire(0, HERE, CR)
    first, second = node.acquire(0, HERE, CR, shared=True), node.acquire(0, HERE, NL)
    third = node.acquire(0, HERE, PR, shared=True)
    node.convert(first, EX)
    node.convert(second, CW)
    node.convert(third, PW)
    assert third.mode is PW, "second waits for it, so it must not wait for second"
    assert {first, second} == set(node.waiting)
    node.release(blocker)
    assert first.mode is EX and third.mode is PW and second in node.waiting


def test_conversion_down_lets_others_in(node: Cluster) -> None:
    writer = node.acquire(0, HERE, EX)
    reader = node.acquire(0, HERE, PR)
    node.convert(writer, PR, patience=Patience.NONE)
    assert reader in node.held


def test_conversion_that_cannot_be_is_denied_and_keeps_its_mode(node: Cluster) -> None:
    one, _two = node.acquire(0, HERE, PR), node.acquire(0, HERE, PR)
    for patience in (Patience.NONE, Patience.NO_QUEUE):
        node.convert(one, EX, patience=patience)
        assert one.state is ClaimState.HELD and one.mode is PR and one.wanted_mode is PR


def test_withdrawing_a_claim_lets_those_behind_it_go(node: Cluster) -> None:
    node.acquire(0, HERE, PR)
    writer = node.acquire(0, HERE, EX)
    reader = node.acquire(0, HERE, PR)
    node.withdraw(writer)
    assert reader in node.held and writer.state is ClaimState.NEW


def test_withdrawing_a_conversion_keeps_the_old_mode(node: Cluster) -> None:
    one, two = node.acquire(0, HERE, PR), node.acquire(0, HERE, PR)
    node.convert(one, EX)
    node.withdraw(one)
    node.release(two)
    assert one.mode is PR and one.state is ClaimState.HELD


def _deny(effects: list[Effect]) -> Deny:
    (denial,) = [effect for effect in effects if isinstance(effect, Deny)]
    return denial


def test_timeout_names_holders_and_waiters() -> None:
    core = LockCore()
    core.step(Acquire(Claim(HERE, EX, holder="the holder")), now=100.0)
    late, later = Claim(HERE, PR, holder="late"), Claim(HERE, EX, True, holder="later")
    core.step(Acquire(late, timeout_s=2.0), now=101.0)
    core.step(Acquire(later, timeout_s=9.0), now=102.0)
    assert core.next_timer() == 103.0
    assert core.step(TimerDue(), now=102.9) == []
    denial = _deny(core.step(TimerDue(), now=103.0))
    assert denial.claim is late and late.state is ClaimState.NEW
    assert denial.snapshot is not None
    assert denial.snapshot.sentence() == (
        "b'here': the node holds EX, held by the holder EX 3.0 s, "
        "awaited by late PR 2.0 s; later EX shared 1.0 s"
    )
    assert core.next_timer() == 111.0
    assert core.statistics().timeouts == 1


def test_a_granted_claim_leaves_no_timer(node: Cluster) -> None:
    holder = node.acquire(0, HERE, EX)
    node.acquire(0, HERE, EX, timeout_s=1.0)
    node.release(holder)
    assert node.cores[0].next_timer() is None


def test_timers_are_swept() -> None:
    alive: set[int] = set()
    timers = Timers[int](lambda _when, key: key in alive)
    for key in range(10_000):
        alive = {key}
        timers.set(float(key), key)
    assert len(timers._heap) < 200
    assert timers.next() == 9999.0
    assert timers.pop_due(9998.0) is None
    assert timers.pop_due(9999.0) == 9999
    assert timers.next() is None


def test_impossible_calls_are_refused(node: Cluster) -> None:
    core = node.cores[0]
    claim = node.acquire(0, HERE, PR)
    with pytest.raises(ProtocolViolation):
        core.step(Acquire(claim), 0.0)
    with pytest.raises(ProtocolViolation):
        core.step(Withdraw(claim), 0.0)
    with pytest.raises(ProtocolViolation):
        core.step(AwaitDrain(HERE), 0.0)
    with pytest.raises(ValueError, match="value block"):
        core.locks.set_value(claim, bytes(64))
    node.release(claim)
    with pytest.raises(ProtocolViolation):
        core.step(Release(claim), 0.0)
    with pytest.raises(ProtocolViolation):
        core.step(Convert(claim, EX), 0.0)
    with pytest.raises(ProtocolViolation):
        core.step(Deliver(Granted(HERE, 3, 0, 99, EX, ValueBlock())), 0.0)


def test_an_earlier_epoch_is_refused_a_later_one_kept(pair: Cluster) -> None:
    request = Request(HERE, 2, 1, 1, EX, queue=True)
    assert pair.cores[0].step(Deliver(request), 0.0) == [EpochRefused(request)]
    assert not pair.cores[0].master.resources
    early = Request(HERE, 4, 1, 1, EX, queue=True)
    assert pair.cores[0].step(Deliver(early), 0.0) == []
    pair.cores[0].step(ViewChanged(4, (0,), coordinator=0), 0.0)
    assert 1 in pair.cores[0].master.resources[HERE.name].granted


# -- the cache ------------------------------------------------------------------------------------
def test_least_recently_used_locks_are_given_up_beyond_the_cap() -> None:
    node = alone(cache_limit=2)
    names = [b"a", b"b", b"c"]
    a, b, c = (Resource(name, b"") for name in names)
    for resource in (a, b):
        node.release(node.acquire(0, resource, EX))
    node.release(node.acquire(0, a, PR))
    in_use = node.acquire(0, c, EX)
    assert not node.demoting, "a lock in use is not cached for nobody"
    node.release(in_use)
    assert node.demoting == {(0, b): NL}
    node.demoted(0, b)
    assert set(node.cores[0].locks.locks) == {b"a", b"c"}
    assert set(node.cores[0].master.resources) == {b"a", b"c"}


def test_shedding_is_bounded_and_goes_on() -> None:
    node = alone(cache_limit=0, shed_at_once=2)
    claims = [node.acquire(0, Resource(b"%d" % i, b""), EX) for i in range(5)]
    for claim in claims:
        node.release(claim)
    assert len(node.demoting) == 2
    node.settle()
    assert not node.cores[0].locks.locks
    assert node.cores[0].statistics().shed == 5


def test_a_lock_that_is_used_while_it_is_shed_stays() -> None:
    node = alone(cache_limit=0)
    node.release(node.acquire(0, HERE, EX))
    assert node.demoting == {(0, HERE): NL}
    claim = node.acquire(0, HERE, EX)
    assert claim in node.held, "requests are served during demote"
    node.demoted(0, HERE)
    assert not node.demoting and claim in node.held
    node.release(claim)
    node.settle()
    assert not node.cores[0].locks.locks


def test_close_gives_everything_up() -> None:
    node = alone()
    for i in range(3):
        node.release(node.acquire(0, Resource(b"%d" % i, b""), EX))
    held = node.acquire(0, HERE, EX)
    node.step(0, Close())
    node.settle()
    assert set(node.cores[0].locks.locks) == {b"here"} and not node.emptied
    node.release(held)
    node.settle()
    assert node.emptied == {0}


def test_a_node_lowers_itself_rather_than_ask_for_more_than_it_needs(node: Cluster) -> None:
    node.release(node.acquire(0, HERE, PR))
    writer = node.acquire(0, HERE, CW)
    assert writer in node.waiting and node.demoting == {(0, HERE): CR}
    node.demoted(0, HERE)
    assert writer.lock is not None and writer.lock.held is CW


# -- two nodes ------------------------------------------------------------------------------------
def _cached_there(pair: Cluster, mode: Mode = EX) -> None:
    """Node 0 has cached ``mode`` on a resource that node 1 masters; its minimum hold is over."""
    pair.cache(0, THERE, mode)
    pair.sleep(HOLD_S)


def test_a_remote_master_is_asked_once_then_never(pair: Cluster) -> None:
    assert pair.acquire(0, THERE, EX, patience=Patience.NONE) not in pair.held
    assert not pair.busy_channels, "try_acquire asks nobody"
    _cached_there(pair)
    assert pair.acquire(0, THERE, PR, patience=Patience.NONE) in pair.held
    assert not pair.busy_channels


def test_without_queueing_a_remote_master_says_no(pair: Cluster) -> None:
    pair.acquire(1, THERE, EX)
    asker = pair.acquire(0, THERE, PR, patience=Patience.NO_QUEUE)
    assert asker in pair.waiting
    pair.settle()
    assert asker.state is ClaimState.NEW and not pair.demoting


def test_a_cached_lock_is_lowered_to_what_others_leave(pair: Cluster) -> None:
    _cached_there(pair)
    reader = pair.acquire(1, THERE, PR)
    pair.deliver(1, 0)
    assert pair.demoting == {(0, THERE): PR} and reader in pair.waiting
    pair.demoted(0, THERE)
    pair.deliver(0, 1)
    assert reader in pair.held
    assert pair.acquire(0, THERE, PR, patience=Patience.NONE) in pair.held


def test_the_minimum_hold_is_kept(pair: Cluster) -> None:
    claim = pair.acquire(0, THERE, EX)
    pair.deliver(0, 1)
    pair.deliver(1, 0)
    assert claim in pair.held
    pair.release(claim)
    pair.acquire(1, THERE, EX)
    pair.deliver(1, 0)
    assert not pair.demoting
    assert pair.cores[0].next_timer() == HOLD_S
    pair.release(pair.acquire(0, THERE, EX, patience=Patience.NONE))
    pair.sleep(HOLD_S)
    assert pair.demoting == {(0, THERE): NL}


def test_a_busy_lock_is_given_up_after_the_second_pass(pair: Cluster) -> None:
    _cached_there(pair)
    remote = pair.acquire(1, THERE, EX)
    pair.deliver(1, 0)
    served = pair.acquire(0, THERE, EX, shared=True)
    assert served in pair.held, "the owner's first pass may depend on it"
    pair.demoted(0, THERE)
    assert not pair.demoting, "the lock is in use"
    late = pair.acquire(0, THERE, EX, shared=True)
    assert late in pair.waiting, "the gate is closed"
    pair.release(served)
    assert pair.demoting == {(0, THERE): NL}
    assert pair.acquire(0, THERE, PR) in pair.waiting, "and stays so in the second pass"
    pair.demoted(0, THERE)
    pair.deliver(0, 1)
    assert remote in pair.held
    assert pair.demotions == [(0, b"there", NL), (0, b"there", NL)]


def test_a_claim_that_was_there_when_the_pass_began_makes_a_second_one_necessary(
    pair: Cluster,
) -> None:
    _cached_there(pair)
    holder = pair.acquire(0, THERE, EX)
    pair.acquire(1, THERE, EX)
    pair.deliver(1, 0)
    assert pair.demoting == {(0, THERE): NL}, "the owner may begin, whoever still writes"
    pair.release(holder)
    pair.demoted(0, THERE)
    assert pair.demoting == {(0, THERE): NL}, "what the holder wrote last is not home yet"
    pair.demoted(0, THERE)
    assert pair.cores[0].statistics().demotions == 1


def _both_convert(pair: Cluster) -> tuple[Claim, Claim]:
    """Both nodes have PR and ask for EX; node 0 is about to give up, its request still unread."""
    for which in (0, 1):
        pair.cache(which, THERE, PR)
    pair.sleep(HOLD_S)
    ours = pair.acquire(0, THERE, EX)
    theirs = pair.acquire(1, THERE, EX)
    pair.deliver(1, 0)
    assert pair.demoting == {(0, THERE): NL}
    return ours, theirs


def test_what_is_granted_in_the_last_pass_is_kept(pair: Cluster) -> None:
    ours, theirs = _both_convert(pair)
    served = pair.acquire(0, THERE, PR)
    pair.demoted(0, THERE)
    pair.release(served)
    assert pair.cores[0].locks.locks[b"there"].phase is Phase.LAST
    pair.deliver(0, 1)
    pair.demoted(1, THERE)
    pair.deliver(1, 0)
    assert ours in pair.waiting, "the owner relies on the gate"
    pair.demoted(0, THERE)
    assert ours in pair.held, "or what it was granted would be thrown away"
    pair.release(ours)
    pair.sleep(HOLD_S)
    pair.settle()
    assert theirs in pair.held


def test_a_grant_does_not_open_the_gate_of_an_owner_that_drains(pair: Cluster) -> None:
    ours, theirs = _both_convert(pair)
    served = pair.acquire(0, THERE, PR)
    pair.drain(0, THERE)
    pair.deliver(0, 1)
    pair.demoted(1, THERE)
    pair.deliver(1, 0)
    pair.release(served)
    assert not pair.draining and ours in pair.waiting
    pair.demoted(0, THERE)
    assert ours in pair.held
    pair.release(ours)
    pair.sleep(HOLD_S)
    pair.settle()
    assert theirs in pair.held


def test_a_claim_that_a_drain_waits_for_may_need_another_demotion_first(pair: Cluster) -> None:
    """PR is cached, a CR claim wants CW, and another node wants EX: CR first, then CW, then NL."""
    _cached_there(pair, PR)
    claim = pair.acquire(0, THERE, CR)
    remote = pair.acquire(1, THERE, EX)
    pair.deliver(1, 0)
    pair.drain(0, THERE)
    pair.convert(claim, CW)
    assert not pair.draining, "this drain would wait for ever"
    pair.demoted(0, THERE)
    assert pair.demoting == {(0, THERE): CR}
    pair.settle()
    assert claim.mode is CW
    pair.release(claim)
    pair.settle()
    assert remote in pair.held


def test_an_owner_that_drains_is_called_once(pair: Cluster) -> None:
    _cached_there(pair)
    pair.acquire(1, THERE, EX)
    pair.deliver(1, 0)
    served = pair.acquire(0, THERE, EX, shared=True)
    pair.drain(0, THERE)
    late = pair.acquire(0, THERE, EX, shared=True)
    assert (0, THERE) in pair.draining and late in pair.waiting
    pair.release(served)
    assert not pair.draining and late in pair.waiting
    pair.demoted(0, THERE)
    assert pair.cores[0].locks.locks[b"there"].held is None
    assert pair.cores[0].statistics().demote_passes == 1


def test_claims_below_the_target_are_never_held_up(pair: Cluster) -> None:
    _cached_there(pair)
    pair.acquire(1, THERE, PR)
    pair.deliver(1, 0)
    pair.drain(0, THERE)
    reader = pair.acquire(0, THERE, PR)
    assert reader in pair.held
    pair.demoted(0, THERE)
    assert reader in pair.held


def test_a_claim_that_the_drain_waits_for_still_converts(pair: Cluster) -> None:
    _cached_there(pair)
    reader = pair.acquire(0, THERE, PR)
    pair.acquire(1, THERE, EX)
    pair.deliver(1, 0)
    pair.drain(0, THERE)
    pair.convert(reader, EX)
    assert reader.mode is EX and reader in pair.held


def test_a_pass_served_by_nobody_above_the_target_is_the_only_one(pair: Cluster) -> None:
    _cached_there(pair)
    pair.acquire(1, THERE, PR)
    pair.deliver(1, 0)
    pair.release(pair.acquire(0, THERE, PR))
    pair.demoted(0, THERE)
    assert pair.cores[0].locks.locks[b"there"].held is PR


def test_a_request_overtakes_those_that_wait_for_the_master_during_the_first_pass(
    pair: Cluster,
) -> None:
    _cached_there(pair, PR)
    pair.acquire(1, THERE, EX)
    pair.deliver(1, 0)
    assert pair.demoting == {(0, THERE): NL}
    writer = pair.acquire(0, THERE, EX)
    provoked = pair.acquire(0, THERE, PR)
    assert writer in pair.waiting and provoked in pair.held


def test_what_nobody_wants_any_more_is_not_given_up(pair: Cluster) -> None:
    claim = pair.acquire(0, THERE, EX)
    pair.settle()
    pair.sleep(HOLD_S)
    impatient = pair.acquire(1, THERE, EX)
    pair.deliver(1, 0)
    pair.demoted(0, THERE)
    assert pair.cores[0].locks.locks[b"there"].phase is Phase.DRAINING
    pair.withdraw(impatient)
    pair.settle()
    lock = pair.cores[0].locks.locks[b"there"]
    assert lock.phase is Phase.HELD and lock.held is EX
    pair.release(claim)
    assert pair.acquire(0, THERE, EX, patience=Patience.NONE) in pair.held


def test_two_cached_readers_that_both_convert_do_not_deadlock(pair: Cluster) -> None:
    for which in (0, 1):
        pair.cache(which, THERE, PR)
    pair.sleep(HOLD_S)
    writers = [pair.acquire(which, THERE, EX) for which in (0, 1)]
    pair.settle()
    (first,) = [writer for writer in writers if writer in pair.held]
    pair.release(first)
    pair.settle()
    assert all(writer in pair.held or writer is first for writer in writers)


def test_a_withdrawn_request_is_cancelled_at_the_master(pair: Cluster) -> None:
    holder = pair.acquire(1, THERE, EX)
    asker = pair.acquire(0, THERE, EX)
    pair.settle()
    pair.withdraw(asker)
    pair.settle()
    assert not pair.cores[0].locks.locks
    assert pair.cores[1].master.resources[b"there"].granted == {1: EX}
    pair.release(holder)


def test_a_grant_that_crosses_its_cancellation_is_cached(pair: Cluster) -> None:
    asker = pair.acquire(0, THERE, EX)
    pair.deliver(0, 1)
    pair.withdraw(asker)
    pair.settle()
    lock = pair.cores[0].locks.locks[b"there"]
    assert lock.held is EX and lock in pair.cores[0].locks.idle


def test_another_claim_takes_over_the_request_of_a_withdrawn_one(pair: Cluster) -> None:
    first = pair.acquire(0, THERE, EX)
    second = pair.acquire(0, THERE, EX)
    third = pair.acquire(0, THERE, PR)
    pair.withdraw(first)
    assert len(pair.channels[0, 1]) == 1, "still the same request"
    pair.withdraw(second)
    assert len(pair.channels[0, 1]) == 2, "EX is cancelled"
    pair.settle()
    assert third in pair.held


def test_value_block_goes_along(pair: Cluster) -> None:
    writer = pair.acquire(0, THERE, EX)
    pair.settle()
    assert writer.lock is not None and writer.lock.value.data is None
    pair.set_value(writer, b"1" * 64)
    pair.release(writer)
    reader = pair.acquire(1, THERE, PR)
    pair.sleep(HOLD_S)
    pair.settle()
    assert reader.lock is not None and reader.lock.value == ValueBlock(b"1" * 64, 1)


def test_a_value_written_under_pw_survives_the_conversion_to_ex(node: Cluster) -> None:
    writer = node.acquire(0, HERE, PW)
    node.set_value(writer, b"1" * 64)
    node.convert(writer, EX)
    assert writer.lock is not None and writer.lock.value.data == b"1" * 64


def test_glimpse_takes_nothing_away(pair: Cluster) -> None:
    nobody = pair.glimpse(0, THERE)
    pair.settle()
    assert pair.glimpsed[nobody] is None
    pair.acquire(0, THERE, EX)
    pair.settle()
    asked = [pair.glimpse(which, THERE) for which in (0, 1)]
    pair.settle()
    assert [pair.glimpsed[ticket] for ticket in asked] == [b"answer", b"answer"]
    assert not pair.demotions


def test_an_answer_about_a_lock_that_was_given_up_is_none(pair: Cluster) -> None:
    _cached_there(pair)
    ticket = pair.glimpse(1, THERE)
    pair.deliver(1, 0)
    assert len(pair.answering) == 1
    pair.acquire(1, THERE, EX)
    pair.deliver(1, 0)
    pair.demoted(0, THERE)
    pair.answer(0, b"what was true once")
    pair.settle()
    assert pair.glimpsed[ticket] is None


def test_grants_are_told_in_order(node: Cluster) -> None:
    holder = node.acquire(0, HERE, EX)
    readers = [node.acquire(0, HERE, PR) for _ in range(4)]
    node.held.pop(holder)
    effects = node.cores[0].step(Release(holder), 0.0)
    assert effects == [Grant(reader) for reader in readers]


def test_whom_another_target_lets_in_does_not_wait() -> None:
    """EX is wanted, a reader drains; then CW is all that is wanted: CR may come in beside it."""
    cluster = Cluster(3, Settings(min_hold_s=0.0))
    reader = cluster.acquire(1, THERE, PR)
    cluster.settle()
    writer = cluster.acquire(2, THERE, EX)
    cluster.settle()
    other = cluster.acquire(0, THERE, CW)
    late = cluster.acquire(1, THERE, CR)
    cluster.settle()
    assert {writer, other, late} == cluster.waiting.keys()
    cluster.withdraw(writer)
    cluster.settle()
    assert cluster.held.keys() == {reader, late} and cluster.waiting.keys() == {other}
    cluster.release(reader)
    cluster.drain_everything()


def test_demoted_without_a_pass_is_a_bug(node: Cluster) -> None:
    node.acquire(0, HERE, EX)
    with pytest.raises(AssertionError):
        node.cores[0].step(Demoted(HERE), 0.0)
