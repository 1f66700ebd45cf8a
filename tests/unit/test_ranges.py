"""What byte-range locks promise, case by case; histories at random are in test_ranges_*.py."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import fields
from enum import IntEnum
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from lockmgr.errors import ProtocolViolation
from lockmgr.messages import Resource
from lockmgr.ranges import Holdings, Span
from lockmgr.ranges_core import RangeCore
from lockmgr.ranges_deadlock import PATIENCE_S, RangeDetector
from lockmgr.ranges_events import (
    CancelRange,
    FindConflict,
    ForgetFile,
    OwnerDied,
    RangeDone,
    RangeEffect,
    RangeEpochRefused,
    RangeEvent,
    RangeFound,
    RangeSend,
    SetRange,
)
from lockmgr.ranges_messages import (
    END,
    HOLDS_PER_MESSAGE,
    Access,
    AskRangeWaits,
    Kind,
    Outcome,
    Owner,
    RangeAnswer,
    RangeHold,
    RangeLock,
    RangeMessage,
    RangeReassert,
    RangeWaits,
    WaitEdges,
)

A, B = Resource(b"a", b"\0"), Resource(b"b", b"\1")
NONE, READ, WRITE = Access


def posix(node: int, number: int) -> Owner:
    return Owner(Kind.POSIX, node, number, pid=100 + number)


def ofd(node: int, number: int) -> Owner:
    return Owner(Kind.OFD, node, number, pid=100 + number)


def flock(node: int, number: int, pid: int = 0) -> Owner:
    return Owner(Kind.FLOCK, node, number, pid or 100 + number)


class Nodes:
    """Nodes whose messages arrive at once; file ``a`` is mastered by node 0, ``b`` by node 1."""

    def __init__(self, count: int = 2, ranges_per_owner: int = 100) -> None:
        self.now = 0.0
        self.tickets = 0
        self.outcomes: dict[int, Outcome] = {}
        self.found: dict[int, RangeHold | None] = {}
        self.closed: set[Resource] = set()
        self.sent: list[RangeMessage] = []
        self.count = count
        self.cores = [
            RangeCore(
                node,
                1,
                self._master_of,
                members=range(count),
                coordinator=0,
                may_grant=lambda file: file not in self.closed,
                ranges_per_owner=ranges_per_owner,
            )
            for node in range(count)
        ]

    def _master_of(self, resource: Resource) -> int:
        return resource.placement[0] % self.count

    def carry_out(self, effects: list[RangeEffect]) -> None:
        pending = deque(effects)
        while pending:
            effect = pending.popleft()
            if isinstance(effect, RangeSend):
                self.sent.append(effect.message)
                pending += self.cores[effect.to].deliver(effect.message, self.now)
            elif isinstance(effect, RangeDone):
                self.outcomes[effect.ticket] = effect.outcome
            elif isinstance(effect, RangeFound):
                self.found[effect.ticket] = effect.conflict
        for core in self.cores:
            core.check()

    def step(self, node: int, event: RangeEvent) -> None:
        self.carry_out(self.cores[node].step(event, self.now))

    def lock(
        self,
        owner: Owner,
        file: Resource,
        start: int,
        end: int,
        access: Access,
        *,
        wait: bool = True,
    ) -> int:
        """The ticket; `outcomes` has what came of it."""
        self.tickets += 1
        self.step(owner.node, SetRange(self.tickets, file, owner, start, end, access, wait))
        return self.tickets

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for core in self.cores:
            due = core.next_timer()
            if due is not None and due <= self.now:
                self.carry_out(core.timer_due(self.now))

    def held(self, owner: Owner, file: Resource) -> list[Span]:
        return self.cores[owner.node].client.held.get(file, {}).get(owner, Holdings()).spans


def test_two_steps_to_a_read_lock_over_written_bytes() -> None:
    nodes = Nodes()
    one, two = posix(1, 1), posix(0, 2)
    nodes.lock(one, A, 0, 10, WRITE)
    nodes.lock(two, A, 10, 20, WRITE)
    waiting = nodes.lock(one, A, 5, 15, READ)
    reader = nodes.lock(two, A, 5, 8, READ)
    assert nodes.held(one, A) == [Span(0, 10, WRITE)]
    assert waiting not in nodes.outcomes
    assert nodes.outcomes[reader] is Outcome.DEADLOCK
    nodes.step(1, CancelRange(waiting))
    assert nodes.outcomes[waiting] is Outcome.CANCELLED
    assert nodes.held(one, A) == [Span(0, 10, WRITE)], "EINTR changes nothing"
    nodes.lock(two, A, 10, 20, NONE)
    done = nodes.lock(one, A, 5, 15, READ)
    assert nodes.outcomes[done] is Outcome.DONE
    assert nodes.held(one, A) == [Span(0, 5, WRITE), Span(5, 15, READ)]


def test_deadlock_across_files_of_one_master() -> None:
    nodes = Nodes(count=1)
    one, two, three = (posix(0, number) for number in (1, 2, 3))
    for owner, file, start in ((one, A, 0), (two, A, 5), (three, B, 0)):
        nodes.lock(owner, file, start, start + 5, WRITE)
    assert nodes.lock(one, A, 5, 6, READ) not in nodes.outcomes
    assert nodes.lock(two, B, 0, END, WRITE) not in nodes.outcomes
    last = nodes.lock(three, A, 0, 1, READ)
    assert nodes.outcomes[last] is Outcome.DEADLOCK
    assert nodes.held(three, B) == [Span(0, 5, WRITE)]


def test_ofd_requests_are_never_refused() -> None:
    nodes = Nodes(count=1)
    one, two = ofd(0, 1), ofd(0, 2)
    nodes.lock(one, A, 0, 1, WRITE)
    nodes.lock(two, A, 1, 2, WRITE)
    tickets = [nodes.lock(one, A, 1, 2, WRITE), nodes.lock(two, A, 0, 1, WRITE)]
    assert not set(tickets) & set(nodes.outcomes)


def test_writer_is_not_starved_by_readers() -> None:
    nodes = Nodes()
    readers = [flock(1, number) for number in range(3)]
    nodes.lock(readers[0], A, 0, END, READ)
    writer = nodes.lock(flock(0, 9), A, 0, END, WRITE)
    later = [nodes.lock(reader, A, 0, END, READ) for reader in readers[1:]]
    assert not {writer, *later} & set(nodes.outcomes)
    tried = nodes.lock(flock(1, 8), A, 0, END, READ, wait=False)
    assert nodes.outcomes[tried] is Outcome.DONE, "a try looks at holders only, as in Linux"
    nodes.lock(flock(1, 8), A, 0, END, NONE)
    nodes.lock(readers[0], A, 0, END, NONE)
    assert nodes.outcomes[writer] is Outcome.DONE and not set(later) & set(nodes.outcomes)
    nodes.lock(flock(0, 9), A, 0, END, NONE)
    assert all(nodes.outcomes[ticket] is Outcome.DONE for ticket in later)


def test_fairness_makes_no_deadlock() -> None:
    """A process takes a second read lock while a writer waits for its first one."""
    nodes = Nodes()
    nodes.lock(flock(1, 1, pid=7), A, 0, END, READ)
    writer = nodes.lock(flock(0, 2), A, 0, END, WRITE)
    second = nodes.lock(flock(1, 3, pid=7), A, 0, END, READ)
    assert writer not in nodes.outcomes
    assert nodes.outcomes[second] is Outcome.DONE


def test_flock_conversion_lets_others_in_between() -> None:
    nodes = Nodes()
    nodes.lock(flock(1, 1), A, 0, END, READ)
    writer = nodes.lock(flock(0, 2), A, 0, END, WRITE)
    converting = nodes.lock(flock(1, 1), A, 0, END, WRITE)
    assert nodes.outcomes[writer] is Outcome.DONE and converting not in nodes.outcomes
    assert nodes.held(flock(1, 1), A) == []
    nodes.step(0, OwnerDied(flock(0, 2)))
    assert nodes.outcomes[converting] is Outcome.DONE


def test_failed_try_of_a_flock_conversion_loses_the_lock() -> None:
    nodes = Nodes()
    nodes.lock(flock(1, 1), A, 0, END, READ)
    nodes.lock(flock(0, 2), A, 0, END, READ)
    tried = nodes.lock(flock(1, 1), A, 0, END, WRITE, wait=False)
    assert nodes.outcomes[tried] is Outcome.WOULD_BLOCK
    assert nodes.held(flock(1, 1), A) == []


def test_flock_and_fcntl_do_not_meet_and_posix_and_ofd_do() -> None:
    nodes = Nodes()
    nodes.lock(flock(0, 1), A, 0, END, WRITE)
    nodes.lock(ofd(0, 2), A, 3, 4, WRITE)
    nodes.step(1, FindConflict(99, A, posix(1, 3), 0, END, READ))
    assert nodes.found[99] == RangeHold(ofd(0, 2), 3, 4, WRITE)


def test_too_many_ranges() -> None:
    nodes = Nodes(ranges_per_owner=4)
    owner = posix(1, 1)
    for start in range(0, 8, 2):
        nodes.lock(owner, A, start, start + 1, READ)
    refused = nodes.lock(owner, A, 20, 21, READ)
    assert nodes.outcomes[refused] is Outcome.NO_LOCKS
    nodes.lock(owner, A, 0, 7, NONE)
    nodes.lock(owner, B, 0, 100, WRITE)
    splits = [nodes.lock(owner, B, at, at + 1, NONE) for at in range(10, 90, 10)]
    assert [nodes.outcomes[ticket] for ticket in splits[2:]] == [
        Outcome.DONE,
        *[Outcome.NO_LOCKS] * 5,
    ]
    assert nodes.outcomes[nodes.lock(owner, B, 0, END, NONE)] is Outcome.DONE


def test_owner_died_ends_waits_and_holds_everywhere() -> None:
    nodes = Nodes()
    victim, other = posix(1, 1), posix(0, 2)
    nodes.lock(victim, A, 0, 5, WRITE)
    nodes.lock(other, B, 0, 5, WRITE)
    waiting = nodes.lock(victim, B, 0, 5, WRITE)
    nodes.step(1, OwnerDied(victim))
    assert nodes.outcomes[waiting] is Outcome.CANCELLED
    assert nodes.outcomes[nodes.lock(other, A, 0, 5, WRITE, wait=False)] is Outcome.DONE


def test_close_keeps_what_another_thread_waits_for() -> None:
    nodes = Nodes()
    nodes.lock(posix(0, 2), A, 0, 5, WRITE)
    nodes.lock(posix(1, 1), A, 5, 9, WRITE)
    waiting = nodes.lock(posix(1, 1), A, 0, 5, WRITE)
    nodes.step(1, ForgetFile(50, A, posix(1, 1)))
    assert nodes.held(posix(1, 1), A) == [] and waiting not in nodes.outcomes
    nodes.lock(posix(0, 2), A, 0, 5, NONE)
    assert nodes.outcomes[waiting] is Outcome.DONE


# -- recovery ----------------------------------------------------------------------------------
def recover(nodes: Nodes, epoch: int = 2, *, thaw: bool = True) -> None:
    effects = [
        effect
        for core in nodes.cores
        for effect in core.new_epoch(
            epoch,
            nodes._master_of,
            nodes.now,
            members=range(nodes.count),
            coordinator=0,
        )
    ]
    nodes.carry_out(effects)
    if thaw:
        for core in nodes.cores:
            nodes.carry_out(core.thaw(nodes.now))


def test_waits_keep_their_order_through_a_recovery() -> None:
    nodes = Nodes()
    holder, first, second = posix(0, 1), posix(1, 2), posix(0, 3)
    nodes.lock(holder, A, 0, 1, WRITE)
    one = nodes.lock(first, A, 0, 1, WRITE)
    nodes.now = 5.0
    two = nodes.lock(second, A, 0, 1, WRITE)
    recover(nodes)
    assert [w.message.owner for w in nodes.cores[0].master.files[b"a"].waiting] == [first, second]
    nodes.lock(holder, A, 0, 1, NONE)
    assert one in nodes.outcomes and two not in nodes.outcomes


def test_nothing_is_answered_before_the_thaw_but_cancellations() -> None:
    nodes = Nodes()
    nodes.lock(posix(1, 1), A, 0, 1, WRITE)
    recover(nodes, thaw=False)
    free = nodes.lock(posix(1, 2), A, 5, 6, WRITE, wait=False)
    gone = nodes.lock(posix(1, 3), A, 7, 8, WRITE)
    unlock = nodes.lock(posix(1, 1), A, 0, 1, NONE)
    nodes.step(1, FindConflict(90, A, posix(1, 2), 0, END, READ))
    nodes.step(1, CancelRange(gone))
    assert nodes.outcomes[gone] is Outcome.CANCELLED
    assert not {free, unlock} & set(nodes.outcomes) and 90 not in nodes.found
    for core in nodes.cores:
        nodes.carry_out(core.thaw(nodes.now))
    assert nodes.outcomes[free] is nodes.outcomes[unlock] is Outcome.DONE
    assert nodes.found[90] is None


def test_closed_file_serves_only_what_gives_up() -> None:
    nodes = Nodes()
    nodes.lock(posix(1, 1), A, 0, 1, WRITE)
    nodes.closed = {A}
    recover(nodes)
    tried = nodes.lock(posix(0, 2), A, 5, 6, READ, wait=False)
    asked = nodes.lock(posix(0, 3), A, 0, 1, READ)
    assert nodes.outcomes[nodes.lock(posix(1, 1), A, 0, 1, NONE)] is Outcome.DONE
    assert nodes.outcomes[nodes.lock(posix(0, 2), B, 0, 1, READ)] is Outcome.DONE
    assert not {tried, asked} & set(nodes.outcomes)
    nodes.closed = set()
    for core in nodes.cores:
        nodes.carry_out(core.reopened(nodes.now))
    assert nodes.outcomes[tried] is nodes.outcomes[asked] is Outcome.DONE


def sent_to(node: int, effects: list[RangeEffect]) -> list[RangeMessage]:
    return [e.message for e in effects if isinstance(e, RangeSend) and e.to == node]


def test_what_was_given_up_without_an_answer_is_not_claimed_again() -> None:
    nodes = Nodes()
    one, two = posix(1, 1), posix(0, 2)
    nodes.lock(one, A, 0, 10, WRITE)
    unlock = nodes.cores[1].step(SetRange(7, A, one, 0, 10, NONE, False), 0.0)
    (message,) = sent_to(0, unlock)
    nodes.cores[0].deliver(message, 0.0)  # and the answer is lost with the epoch
    assert nodes.outcomes[nodes.lock(two, A, 0, 10, WRITE)] is Outcome.DONE
    assert nodes.held(one, A) == [Span(0, 10, WRITE)]
    recover(nodes)
    assert nodes.outcomes[7] is Outcome.DONE and nodes.held(one, A) == []
    assert nodes.held(two, A) == [Span(0, 10, WRITE)]


def test_what_was_cancelled_is_not_asked_again() -> None:
    nodes = Nodes()
    nodes.lock(posix(0, 2), A, 0, 10, WRITE)
    waiting = nodes.lock(posix(1, 1), A, 0, 10, WRITE)
    nodes.cores[1].step(CancelRange(waiting), 0.0)  # lost
    recover(nodes, thaw=False)
    assert nodes.outcomes[waiting] is Outcome.CANCELLED
    assert not nodes.cores[1].client.pending and not nodes.cores[0].master.later


@pytest.mark.parametrize("recovery", [False, True])
def test_namesake_of_a_dead_owner(recovery: bool) -> None:
    """The kernel uses owner values again, perhaps before all is answered that ended the old one."""
    nodes = Nodes()
    owner = ofd(1, 1)
    nodes.lock(owner, A, 0, 10, READ)
    core = nodes.cores[1]
    lost = core.step(OwnerDied(owner), nodes.now)
    lost += core.step(SetRange(7, A, owner, 0, 5, READ, True), nodes.now)
    nodes.now = 3.0
    if recovery:
        recover(nodes)
    else:
        nodes.carry_out(lost)
    assert nodes.outcomes[7] is Outcome.DONE
    assert nodes.held(owner, A) == [Span(0, 5, READ)]
    assert nodes.cores[0].master.files[b"a"].held[owner].spans == [Span(0, 5, READ)]


def test_many_holds_go_in_parts() -> None:
    nodes = Nodes(ranges_per_owner=5000)
    owner = posix(1, 1)
    for at in range(HOLDS_PER_MESSAGE + 10):
        nodes.lock(owner, A, 2 * at, 2 * at + 1, READ)
    nodes.sent.clear()
    recover(nodes)
    parts = [len(m.holds) for m in nodes.sent if isinstance(m, RangeReassert)]
    assert parts == [HOLDS_PER_MESSAGE, 10]
    assert nodes.cores[0].master.files[b"a"].held[owner].spans == nodes.held(owner, A)


def test_messages_of_another_epoch_change_nothing() -> None:
    nodes = Nodes()
    message = RangeLock(A, 9, 1, 1, posix(1, 1), 0, 1, READ, False)
    assert nodes.cores[0].deliver(message, 0.0) == [RangeEpochRefused(message)]
    assert not nodes.cores[0].master.files


# -- deadlocks through several masters ---------------------------------------------------------
def test_deadlock_through_two_masters() -> None:
    nodes = Nodes()
    one, two = posix(0, 1), posix(1, 2)
    nodes.lock(one, A, 0, 1, WRITE)
    nodes.lock(two, B, 0, 1, WRITE)
    older = nodes.lock(one, B, 0, 1, WRITE)
    nodes.now = 0.2
    newer = nodes.lock(two, A, 0, 1, WRITE)
    assert not {older, newer} & set(nodes.outcomes)
    nodes.sleep(0.6)
    assert nodes.outcomes == {**nodes.outcomes, newer: Outcome.DEADLOCK}
    assert older not in nodes.outcomes
    nodes.lock(two, B, 0, 1, NONE)
    assert nodes.outcomes[older] is Outcome.DONE


def test_fairness_through_two_masters() -> None:
    """Reader 3 of b waits for process 1's lock on a; process 1 is held back behind b's writer."""
    nodes = Nodes()
    nodes.lock(flock(0, 1), A, 0, END, READ)
    nodes.lock(flock(1, 3, pid=9), B, 0, END, READ)
    writer = nodes.lock(flock(0, 2), B, 0, END, WRITE)
    stuck = nodes.lock(flock(1, 4, pid=9), A, 0, END, WRITE)
    held_back = nodes.lock(flock(0, 5, pid=101), B, 0, END, READ)
    assert not {writer, stuck, held_back} & set(nodes.outcomes)
    nodes.sleep(0.6)
    assert nodes.outcomes[held_back] is Outcome.DONE
    assert not {writer, stuck} & set(nodes.outcomes)


def test_long_waits_are_suspected_less_and_less() -> None:
    nodes = Nodes(count=1)
    nodes.lock(posix(0, 1), A, 0, 1, WRITE)
    nodes.lock(posix(0, 2), A, 0, 1, WRITE)
    times = []
    while (due := nodes.cores[0].next_timer()) is not None and due < 200:
        times.append(due)
        nodes.sleep(due - nodes.now)
    assert times == [0.5, 2.5, 10.5, 42.5, 170.5]
    nodes.lock(posix(0, 1), A, 0, 1, NONE)
    assert nodes.cores[0].next_timer() is None


def test_no_verdict_for_waits_that_never_were_at_the_same_time() -> None:
    one, two = posix(0, 1), posix(1, 2)
    detector = RangeDetector(1, [0, 1])
    assert len(detector.suspect(0.0)) == 2 and detector.suspect(0.0) == []

    def answer(round_: int, node: int, *waits: WaitEdges) -> list[object]:
        detector.check()
        return [*detector.receive(RangeWaits(1, node, round_, waits, last=True), 0.0)]

    first = WaitEdges(A, one, 5, 1.0, (two,), ())
    second = WaitEdges(B, two, 6, 1.0, (one,), ())
    assert answer(1, 0, first) == []
    assert answer(1, 0, first) == [], "twice the same answer"
    assert answer(1, 1, second) == [AskRangeWaits(1, 0, 2), AskRangeWaits(1, 1, 2)]
    assert answer(1, 1, second) == [], "of a round that is over"
    assert answer(2, 0, WaitEdges(A, one, 7, 0.1, (two,), ())) == []
    again = answer(2, 1, second)
    assert again == [AskRangeWaits(1, 0, 3), AskRangeWaits(1, 1, 3)], "suspected meanwhile"
    assert answer(3, 0) == [] and answer(3, 1) == []


def test_an_answer_that_never_comes_does_not_keep_others_from_searching() -> None:
    detector = RangeDetector(1, [0, 1])
    assert detector.suspect(0.0) == [AskRangeWaits(1, 0, 1), AskRangeWaits(1, 1, 1)]
    assert detector.receive(RangeWaits(1, 0, 1, (), last=True), 0.1) == []
    assert detector.suspect(PATIENCE_S - 0.1) == []
    assert detector.suspect(PATIENCE_S) == [AskRangeWaits(1, 0, 2), AskRangeWaits(1, 1, 2)]
    detector.check()


# -- what no correct caller or peer does -------------------------------------------------------
@pytest.mark.parametrize(
    ("start", "end", "owner"),
    [(5, 5, posix(0, 1)), (-1, 5, posix(0, 1)), (0, END + 1, posix(0, 1)), (0, 5, flock(0, 1))],
)
def test_no_range(start: int, end: int, owner: Owner) -> None:
    nodes = Nodes()
    with pytest.raises(ValueError, match=r"no range|whole files"):
        nodes.lock(owner, A, start, end, READ)
    with pytest.raises(ProtocolViolation):
        nodes.cores[0].deliver(RangeLock(A, 1, 0, 1, owner, start, end, READ, False), 0.0)


def test_violations() -> None:
    nodes = Nodes()
    core = nodes.cores[0]
    with pytest.raises(ProtocolViolation, match="speaks for another"):
        core.deliver(RangeLock(A, 1, 1, 1, posix(0, 1), 0, 1, READ, False), 0.0)
    with pytest.raises(ProtocolViolation, match="nothing that can be locked"):
        core.deliver(RangeLock(A, 1, 1, 1, posix(1, 1), 0, 1, NONE, False), 0.0)
    with pytest.raises(ProtocolViolation, match="after the thaw"):
        core.deliver(RangeReassert(A, 1, 1, ()), 0.0)
    with pytest.raises(ProtocolViolation, match="nobody asked"):
        core.deliver(RangeAnswer(A, 1, 0, 77, Outcome.DONE), 0.0)
    nodes.lock(posix(1, 1), A, 0, 1, WRITE)
    recover(nodes, thaw=False)
    with pytest.raises(ProtocolViolation, match=r"POSIX 0x5 of node 0.*against POSIX 0x1"):
        core.deliver(RangeReassert(A, 2, 0, (RangeHold(posix(0, 5), 0, END, READ),)), 0.0)


def test_snapshot_says_who_waits_for_whom() -> None:
    nodes = Nodes(count=1)
    nodes.lock(posix(0, 1), A, 0, END, READ)
    nodes.lock(posix(0, 2), A, 3, 4, WRITE)
    nodes.lock(posix(0, 3), A, 0, 9, READ)
    (file,) = nodes.cores[0].master.snapshot(2.0)
    assert file.sentence() == (
        "b'a': held by POSIX 0x1 of node 0 pid 101 READ 0..end, awaited by "
        "POSIX 0x2 of node 0 pid 102 WRITE 3..4 waits 2.0 s "
        "behind POSIX 0x1 of node 0 pid 101 READ 0..end; "
        "POSIX 0x3 of node 0 pid 103 READ 0..9 waits 2.0 s "
        "after POSIX 0x2 of node 0 pid 102, who came first"
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_wild_peer_is_a_violation_and_nothing_else(seed: int) -> None:
    """Well-formed messages that make no sense: refused, or carried out; the state stays sound."""
    rng = random.Random(seed)
    core = RangeCore(0, 1, lambda _resource: 0, members=[0, 1, 2], coordinator=0)
    kinds = [kind for kind in get_args(RangeMessage) if kind is not RangeReassert]
    refused = 0
    for _ in range(200):
        message = wild(rng, rng.choice(kinds))
        try:
            core.deliver(message, 0.0)
        except ProtocolViolation:
            refused += 1
        if rng.random() < 0.2:
            start = rng.randrange(4)
            access = rng.choice([*Access])
            core.step(SetRange(rng.getrandbits(60), A, posix(0, 1), start, 9, access, True), 0.0)
        core.check()
    assert 0 < refused < 200


def wild(rng: random.Random, kind: Any) -> Any:
    """Any value of that type, drawn from few, so that it may meet another."""
    if kind is int:
        return rng.choice([0, 1, 1, 2, 3, 5, 8, END])
    if kind in (float, bool):
        return kind(rng.randrange(2))
    if kind is Resource:
        return rng.choice([A, B])
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return wild(rng, arguments[0])
    if origin is tuple:
        return tuple(wild(rng, arguments[0]) for _ in range(rng.randrange(3)))
    if isinstance(kind, type) and issubclass(kind, IntEnum):
        return rng.choice([*kind])
    hints = get_type_hints(kind)
    drawn = {field.name: wild(rng, hints[field.name]) for field in fields(kind)}
    if "epoch" in drawn:
        drawn["epoch"] = 1
    return kind(**drawn)
