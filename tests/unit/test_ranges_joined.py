"""Byte ranges and modes in one cluster: the same views, and one barrier for both."""

from __future__ import annotations

import random

import pytest

from lockmgr.messages import Reassert, Resource
from lockmgr.modes import Mode
from lockmgr.ranges_messages import END, Access, Kind, Outcome, Owner, RangeReassert
from tests.unit.ranges_joined import RangesCluster

NONE, READ, WRITE = Access
FILES = [Resource(b"file %d" % number, bytes([number])) for number in range(4)]
"""By the number of the node that masters it."""


def owner(node: int, kind: Kind = Kind.POSIX) -> Owner:
    return next(o for o in RangesCluster(0).owners_of(node) if o.kind is kind)


def test_ranges_are_told_before_the_last_word() -> None:
    cluster = RangesCluster(3)
    cluster.lock(FILES[1], owner(0), 0, 10, WRITE)
    cluster.settle()
    cluster.kill(2)
    cluster.change_view()
    cluster.install(0)
    sent = list(cluster.channels[0, 1])
    assert isinstance(sent[0], RangeReassert)
    last = [m for m in sent if isinstance(m, Reassert) and m.last]
    assert sent.index(last[0]) > 0
    cluster.end()


def test_a_master_that_has_not_heard_all_grants_nothing() -> None:
    cluster = RangesCluster(3)
    cluster.lock(FILES[2], owner(0), 0, 10, WRITE)
    cluster.settle()
    cluster.kill(2)
    cluster.change_view()
    cluster.install(1)
    ticket = cluster.lock(FILES[2], owner(1), 0, 10, WRITE, wait=False)
    cluster.settle()
    assert ticket not in cluster.outcomes, "node 0 has not said what it has"
    cluster.install(0)
    cluster.settle()
    assert ticket not in cluster.outcomes, "its master is gone: node 2 may have had bytes"
    cluster.clear(2)
    cluster.settle()
    assert cluster.outcomes[ticket] is Outcome.WOULD_BLOCK
    cluster.end()


def test_what_a_departed_node_had_is_free_when_it_is_cleared_not_before() -> None:
    cluster = RangesCluster(3)
    cluster.lock(FILES[0], owner(2), 0, 10, WRITE)
    cluster.lock(FILES[0], owner(1), 20, 30, WRITE)
    cluster.settle()
    waiting = cluster.lock(FILES[0], owner(0), 0, 10, WRITE)
    cluster.evict(2)
    cluster.change_view()
    cluster.recover()
    assert waiting not in cluster.outcomes
    cluster.lock(FILES[0], owner(1), 20, 30, NONE)
    cluster.settle()
    assert not cluster.truth[FILES[0], owner(1)].spans, "giving up is served"
    cluster.replay(2)
    cluster.settle()
    assert waiting not in cluster.outcomes
    cluster.clear(2)
    cluster.settle()
    assert cluster.outcomes[waiting] is Outcome.DONE
    cluster.end()


@pytest.mark.parametrize("file", FILES[:3], ids=lambda file: file.name.decode())
def test_only_files_of_the_departed_are_closed(file: Resource) -> None:
    """Node 2 had nothing; what it mastered itself it may have had."""
    cluster = RangesCluster(3)
    cluster.lock(file, owner(0), 0, 5, READ)
    cluster.settle()
    cluster.kill(2)
    cluster.change_view()
    cluster.recover()
    ticket = cluster.lock(file, owner(1), 0, 5, READ)
    cluster.settle()
    if file is FILES[2]:
        assert ticket not in cluster.outcomes
        cluster.clear(2)
        cluster.settle()
    assert cluster.outcomes[ticket] is Outcome.DONE
    cluster.end()


def test_what_was_known_survives_a_second_failure() -> None:
    """Node 0 knows what node 3 had; in the next view a newcomer masters the file."""
    cluster = RangesCluster(4)
    cluster.lock(FILES[0], owner(3), 0, 10, WRITE)
    cluster.settle()
    cluster.evict(3)
    cluster.change_view()
    cluster.install(0)
    cluster.settle()
    cluster.kill(1)
    cluster.change_view()
    cluster.recover()
    cluster.clear(1)
    ticket = cluster.lock(FILES[0], owner(2), 0, 10, WRITE, wait=False)
    cluster.settle()
    assert ticket not in cluster.outcomes
    cluster.kill(0)
    cluster.change_view()
    cluster.recover()
    cluster.clear(0)
    cluster.settle()
    assert ticket not in cluster.outcomes, "node 3 may still be there"
    cluster.clear(3)
    cluster.settle()
    assert cluster.outcomes[ticket] is Outcome.DONE
    cluster.end()


def test_an_interrupted_request_is_answered_by_the_view_change() -> None:
    cluster = RangesCluster(3)
    cluster.lock(FILES[2], owner(0), 0, 10, WRITE)
    cluster.settle()
    ticket = cluster.lock(FILES[2], owner(1), 0, 10, WRITE)
    cluster.settle()
    cluster.kill(2)
    cluster.cancel_range(owner(1))
    assert ticket not in cluster.outcomes
    cluster.change_view()
    cluster.install(1)
    assert cluster.outcomes[ticket] is Outcome.CANCELLED
    cluster.end()


def test_a_circle_through_two_masters_after_a_change_of_coordinator() -> None:
    cluster = RangesCluster(3)
    a, b = owner(0), owner(1)
    cluster.lock(FILES[0], a, 0, 5, WRITE)
    cluster.lock(FILES[1], b, 0, 5, WRITE)
    cluster.settle()
    cluster.hand_over(2)
    cluster.recover()
    elder = cluster.lock(FILES[1], a, 0, 5, WRITE)
    cluster.settle()
    cluster.sleep(0.1)
    younger = cluster.lock(FILES[0], b, 0, 5, WRITE)
    cluster.settle()
    cluster.sleep(0.6)
    cluster.settle()
    assert cluster.outcomes.get(younger) is Outcome.DEADLOCK
    cluster.lock(FILES[1], b, 0, 5, NONE)
    cluster.settle()
    assert cluster.outcomes[elder] is Outcome.DONE
    cluster.end()


def test_a_doubt_that_was_told_to_the_coordinator_of_before_is_told_again() -> None:
    cluster = RangesCluster(3)
    a, b = owner(0), owner(1)
    cluster.lock(FILES[0], a, 0, 5, WRITE)
    cluster.lock(FILES[1], b, 0, 5, WRITE)
    cluster.settle()
    cluster.lock(FILES[1], a, 0, 5, WRITE)
    cluster.settle()
    cluster.sleep(0.1)
    younger = cluster.lock(FILES[0], b, 0, 5, WRITE)
    cluster.settle()
    cluster.sleep(0.6)
    cluster.hand_over(2)
    cluster.recover()
    assert younger not in cluster.outcomes, "the one of before has nothing more to say"
    cluster.sleep(0.6)
    cluster.settle()
    assert cluster.outcomes.get(younger) is Outcome.DEADLOCK
    cluster.lock(FILES[1], b, 0, 5, NONE)
    cluster.settle()
    cluster.end()


class History:
    """Programs, locks of the nodes themselves, and one failure after another."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.cluster = RangesCluster(rng.choice([2, 3, 4]))
        self.speed = rng.choice([1, 4, 12])

    def run(self) -> None:
        actions = [
            *[self._lock] * 24,
            *[self._deliver] * 20,
            *[self._cancel] * 2,
            self._find,
            self._close,
            self._died,
            self._mode,
            self._sleep,
            *[self._install] * 4,
            *[self._view] * 2,
            self._fail,
            *[self._settled] * 2,
            self._join,
            self._hand_over,
        ]
        for _ in range(160):
            self.rng.choice(actions)()
        self.cluster.end()

    def _lock(self) -> None:
        if not (free := self.cluster.free()):
            return
        owner, rng = self.rng.choice(free), self.rng
        file = FILES[0] if rng.random() < 0.5 else rng.choice(FILES)
        start = rng.randrange(6)
        end = END if start > 4 else start + rng.randint(1, 4)
        if owner.kind is Kind.FLOCK:
            start, end = 0, END
        self.cluster.lock(file, owner, start, end, rng.choice([*Access]), rng.random() < 0.6)

    def _deliver(self) -> None:
        for _ in range(self.rng.randint(1, self.speed)):
            if self.cluster.busy_channels:
                self.cluster.deliver(*self.rng.choice(self.cluster.busy_channels))

    def _cancel(self) -> None:
        if self.cluster.busy:
            self.cluster.cancel_range(self.rng.choice(sorted(self.cluster.busy)))

    def _find(self) -> None:
        if free := self.cluster.free():
            self.cluster.find(self.rng.choice(FILES), self.rng.choice(free), 0, END, WRITE)

    def _close(self) -> None:
        if free := self.cluster.free():
            self.cluster.close_file(self.rng.choice(FILES), self.rng.choice(free))

    def _died(self) -> None:
        node = self.rng.choice(sorted(self.cluster.alive))
        self.cluster.owner_died(self.rng.choice(self.cluster.owners_of(node)))

    def _mode(self) -> None:
        held = list(self.cluster.held)
        if held and self.rng.random() < 0.6:
            self.cluster.release(held[0])
        else:
            node = self.rng.choice(sorted(self.cluster.present))
            mode = self.rng.choice([Mode.PR, Mode.EX])
            self.cluster.acquire(node, Resource(b"mode", b"\1"), mode)

    def _sleep(self) -> None:
        self.cluster.sleep(self.rng.choice([0.1, 1.0]))

    def _install(self) -> None:
        learning = [node for node in sorted(self.cluster.alive) if self.cluster.views[node]]
        if learning:
            self.cluster.install(self.rng.choice(learning), skip=self.rng.random() < 0.3)

    def _view(self) -> None:
        if set(self.cluster.members) != self.cluster.present:
            self.cluster.change_view()

    def _fail(self) -> None:
        cluster = self.cluster
        if len(cluster.present) > 1 and self.rng.random() < 0.5:
            node = self.rng.choice(sorted(cluster.present))
            if self.rng.random() < 0.5:
                cluster.evict(node)
            else:
                cluster.kill(node, self.rng.choice([0, 2]))

    def _settled(self) -> None:
        cluster = self.cluster
        gone = [dead for dead in cluster.dead.values() if dead.gone_in is not None]
        if not gone or cluster.coordinator not in cluster.present:
            return
        dead = self.rng.choice(gone)
        if not dead.replayed:
            cluster.replay(dead.node)
        elif not dead.cleared:
            cluster.clear(dead.node)

    def _join(self) -> None:
        cluster = self.cluster
        coordinator_lives = cluster.coordinator in cluster.present
        if len(cluster.present) < 4 and coordinator_lives and cluster.may_join(with_debts=True):
            cluster.join()

    def _hand_over(self) -> None:
        cluster = self.cluster
        if set(cluster.members) == cluster.present:
            cluster.hand_over(self.rng.choice(sorted(cluster.present)))


def _run(seeds: range) -> None:
    for seed in seeds:
        try:
            History(seed).run()
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise


def test_histories() -> None:
    _run(range(40))


def test_a_known_history() -> None:
    """A namesake of an owner locks one file while what that one had of another is given up."""
    _run(range(2526, 2527))


@pytest.mark.full
def test_many_histories() -> None:
    _run(range(1000, 2000))
