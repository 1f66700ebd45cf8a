"""Deadlocks are found and broken; nobody is denied who was in none.

The oracle needs no graph: in a copy of the whole cluster, with nobody looking for deadlocks, every
owner that does not wait releases what it has, again and again. Who still waits then waits for ever.
A verdict is right if each victim would wait for ever though all other victims gave way, from the
moment on when all nodes were asked for the second time. The same is asked of a copy in which nobody
overtakes: a request that nobody knows of yet may begin a demotion
that opens a queue, but nobody can count on it. At the end of each history nobody may be left who
waits.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Set

import pytest

from lockmgr import deadlock
from lockmgr.claim import Claim, ClaimState, NodeLock, Obstacle
from lockmgr.deadlock_graph import Graph, Vertex, common, deadlocked, shortest_cycle, victims
from lockmgr.events import Deliver, Deny, Effect, Event, Send, TimerDue
from lockmgr.messages import AskWaits, Deadlocks, Resource, Victim, WaitingClaim, Waits
from lockmgr.modes import Mode
from lockmgr.settings import Settings
from tests.unit.lockmgr_changing import ChangingCluster

NL, CR, CW, PR, PW, EX = Mode
AT = [Resource(b"at %d" % node, bytes([node])) for node in range(5)]
AFTER_S = 2.0


class Suspicious(ChangingCluster):
    """Looks for deadlocks, and checks each verdict against the oracle."""

    finds_deadlocks = True

    def __init__(self, nodes: int, min_hold_s: float = 0.0) -> None:
        settings = Settings(min_hold_s=min_hold_s, deadlock_after_s=AFTER_S)
        super().__init__(nodes, settings)
        self.victims: list[tuple[Claim, str]] = []
        self.strict = True
        self._between: Suspicious | None = None
        """The cluster as it was when the nodes were asked last."""

    def step(self, node: int, event: Event) -> list[Effect]:
        decides = isinstance(event, TimerDue) or (
            isinstance(event, Deliver) and isinstance(event.message, Waits)
        )
        if not decides or not self.strict:
            return super().step(node, event)
        asked, self._between = self._between, None
        before = copy.deepcopy(self)
        verdicts: list[set[tuple[int, int]]] = []

        def noted(graph: Graph, answers: Iterable[Waits]) -> list[tuple[Vertex, str]]:
            found = victims(graph, answers)
            verdicts.append({(wait.node, wait.number) for wait, _ in found})
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(deadlock, "victims", noted)
            effects = super().step(node, event)
        here = self.cores[node].search
        new_round = here._round != before.cores[node].search._round
        self._between = before if new_round else asked
        judged = asked if asked is not None and isinstance(event, Deliver) else before
        verdict = {
            (effect.message.node, effect.message.wait): effect.message.words
            for effect in effects
            if isinstance(effect, Send) and isinstance(effect.message, Victim)
        }
        for effect in effects:
            if isinstance(effect, Deny) and effect.deadlock is not None:
                verdict[node, effect.claim.wait] = effect.deadlock
        for wait, words in verdict.items():
            # A node alone may judge again within a step: who was denied first is judged without
            # those who were denied later.
            number = next(n for n, found in enumerate(verdicts) if wait in found)
            others = verdict.keys() & set().union(*verdicts[: number + 1]) - {wait}
            stuck = judged.waits_for_ever(wait, others) or judged.waits_for_ever(
                wait, others, overtakes=False
            )
            assert stuck, f"in no deadlock: {words}"
        return effects

    def _sacrificed(self, claim: Claim, words: str) -> None:
        self.victims.append((claim, words))

    def waits_for_ever(
        self, wait: tuple[int, int], others: Set[tuple[int, int]], overtakes: bool = True
    ) -> bool:
        """Does this wait (node, number) last for ever, though the ``others`` give way?"""
        cluster = copy.deepcopy(self)
        claims = {(node, claim.wait): claim for claim, node in cluster.waiting.items()}
        with pytest.MonkeyPatch.context() as patch:
            if not overtakes:
                patch.setattr(NodeLock, "passable", lambda _lock, why: why is Obstacle.GATE)
            for other in others:
                cluster.withdraw(claims[other])
            return claims[wait] in cluster.stuck()

    def calm_down(self) -> None:
        """Look for no deadlocks any more."""
        self.strict = False
        for _, core in self.living:
            core.search._after_s = core.search._suspect_at = None
        for channel in self.channels.values():
            for message in [one for one in channel if isinstance(one, Deadlocks)]:
                channel.remove(message)

    def stuck(self) -> set[Claim]:
        """Who waits for ever if nobody gives way. Uses the cluster up."""
        self.calm_down()
        while True:
            self.settle()
            if not self.release_idle():
                return set(self.waiting)

    def release_idle(self) -> bool:
        """Owners that do not wait release what they have; False: there are none."""
        busy = {(node, claim.owner) for claim, node in self.waiting.items() if claim.owner}
        idle = [
            claim
            for claim, node in self.held.items()
            if claim.state is ClaimState.HELD and (node, claim.owner) not in busy
        ]
        for claim in idle:
            self.release(claim)
        return bool(idle)

    def search(self) -> None:
        """Let every suspicion become due."""
        self.sleep(AFTER_S * 40)
        self.settle()


@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_two_owners_with_two_locks(nodes: int) -> None:
    cluster = Suspicious(nodes)
    a, b = 0, nodes - 1
    first, second = AT[0], AT[nodes - 1] if nodes > 1 else Resource(b"other", b"\0")
    cluster.acquire(a, first, EX, owner="alice")
    cluster.acquire(b, second, EX, owner="bob")
    cluster.settle()
    elder = cluster.acquire(a, second, EX, owner="alice")
    cluster.sleep(0.5)
    younger = cluster.acquire(b, first, EX, owner="bob")
    cluster.settle()
    assert not cluster.victims
    cluster.search()
    ((victim, words),) = cluster.victims
    assert victim is younger
    assert words.startswith(f"bob on node {b}, which wants EX of {first.name!r}; waits for alice")
    assert words.count("; waits for ") == 2
    cluster.release_idle()
    cluster.settle()
    assert elder in cluster.held


def test_two_readers_that_both_convert() -> None:
    cluster = Suspicious(2)
    claims = [cluster.acquire(node, AT[0], PR) for node in (0, 1)]
    cluster.settle()
    for claim in claims:
        cluster.convert(claim, EX)
        cluster.sleep(0.1)
    cluster.search()
    ((victim, words),) = cluster.victims
    assert victim is claims[1] and victim.state is ClaimState.HELD and victim.mode is PR
    assert "which has PR and wants EX" in words
    cluster.release(victim)
    cluster.settle()
    assert claims[0] in cluster.held and claims[0].mode is EX


def test_a_queue_is_waited_for_too() -> None:
    """Alice may stand beside Bob, but not before Carol, who waits for Bob."""
    cluster = Suspicious(3)
    cluster.acquire(1, AT[0], PR, owner="bob")
    cluster.acquire(2, AT[1], EX, owner="alice")
    cluster.settle()
    carol = cluster.acquire(0, AT[0], EX, owner="carol")
    cluster.settle()
    alice = cluster.acquire(2, AT[0], PR, owner="alice")
    cluster.settle()
    bob = cluster.acquire(1, AT[1], PR, owner="bob")
    cluster.settle()
    assert set(cluster.waiting) == {carol, alice, bob}
    cluster.search()
    assert len(cluster.victims) == 1


def test_answers_of_different_moments_make_no_victim() -> None:
    """Alice gives up waiting after her node has answered, Bob begins before his does."""
    cluster = Suspicious(3)
    x, y = AT[2], AT[0]
    cluster.acquire(0, x, EX, owner="alice")
    cluster.acquire(1, y, EX, owner="bob")
    cluster.settle()
    cluster.acquire(2, x, EX)
    cluster.acquire(2, y, EX)
    cluster.settle()
    alice = cluster.acquire(0, y, EX, owner="alice")
    cluster.settle()
    cluster.sleep(AFTER_S + 0.1)
    assert [type(message) for message in cluster.channels[0, 1]] == [AskWaits]
    cluster.withdraw(alice)
    bob = cluster.acquire(1, x, EX, owner="bob")
    cluster.deliver(1, 2)
    cluster.settle()
    assert cluster.cores[0].search._round == 2, "the first round showed a cycle"
    cluster.search()
    assert not cluster.victims and bob in cluster.waiting


def test_a_long_wait_is_no_deadlock() -> None:
    cluster = Suspicious(3)
    cluster.acquire(0, AT[1], EX, owner="alice")
    cluster.acquire(1, AT[2], EX, owner="bob")
    cluster.settle()
    cluster.acquire(1, AT[1], EX, owner="bob")
    cluster.settle()
    for _ in range(10):
        cluster.search()
    assert not cluster.victims


def test_another_view_begins_the_search_anew() -> None:
    cluster = Suspicious(4)
    cluster.acquire(1, AT[1], EX, owner="alice")
    cluster.acquire(2, AT[2], EX, owner="bob")
    cluster.settle()
    cluster.acquire(1, AT[2], EX, owner="alice")
    cluster.acquire(2, AT[1], EX, owner="bob")
    cluster.settle()
    cluster.sleep(AFTER_S + 0.1)
    cluster.deliver(1, 0)
    cluster.kill(0)
    cluster.change_view()
    cluster.recover()
    cluster.search()
    assert len(cluster.victims) == 1


def _in_a_cycle() -> Suspicious:
    """alice on node 1 and bob on node 2 wait for each other; their nodes are about to suspect."""
    cluster = Suspicious(4)
    cluster.acquire(1, AT[1], EX, owner="alice")
    cluster.acquire(2, AT[2], EX, owner="bob")
    cluster.settle()
    cluster.acquire(1, AT[2], EX, owner="alice")
    cluster.acquire(2, AT[1], EX, owner="bob")
    cluster.settle()
    cluster.sleep(AFTER_S + 0.1)
    return cluster


def _pass(cluster: Suspicious, source: int, to: int) -> None:
    while cluster.channels[source, to]:
        cluster.deliver(source, to)


def test_who_was_the_coordinator_and_is_again_begins_the_search_anew() -> None:
    cluster = _in_a_cycle()
    _pass(cluster, 1, 0)  # node 0 asks
    cluster.hand_over(3)
    for node in range(4):
        cluster.install(node)
    for node in (1, 2, 3):
        _pass(cluster, 0, node)
        _pass(cluster, node, 3)  # and node 3 is answered
    cluster.hand_over(0)
    cluster.recover()
    cluster.search()
    assert len(cluster.victims) == 1


def test_a_suspicion_that_reaches_the_next_coordinator_too_early() -> None:
    cluster = _in_a_cycle()
    cluster.hand_over(3)
    cluster.install(1)
    cluster.sleep(AFTER_S + 0.1)
    _pass(cluster, 1, 3)
    cluster.settle()
    cluster.recover()
    cluster.search()
    assert len(cluster.victims) == 1


def test_an_answer_to_the_coordinator_of_before_is_not_waited_for_for_ever() -> None:
    cluster = _in_a_cycle()
    cluster.hand_over(3)
    for node in (0, 1, 3):
        cluster.install(node)
    cluster.sleep(AFTER_S + 0.1)
    _pass(cluster, 1, 3)
    _pass(cluster, 3, 2)  # asked, node 2 tells node 0
    cluster.settle()
    cluster.recover()
    cluster.search()
    assert len(cluster.victims) == 1


def test_shortest_cycle() -> None:
    a, b, c, d = (Vertex(0, number) for number in range(4))
    assert shortest_cycle({}) is None
    assert shortest_cycle({a: frozenset({b}), b: frozenset({c})}) is None
    assert shortest_cycle({a: frozenset({a})}) == [a]
    edges = {a: frozenset({b}), b: frozenset({c}), c: frozenset({a, d}), d: frozenset({c})}
    assert shortest_cycle(edges) == [c, d]


def _all_of(*ends: Vertex) -> tuple[frozenset[Vertex], ...]:
    return (frozenset(ends),)


def test_deadlocked() -> None:
    a, b, c, d = (Vertex(0, number) for number in range(4))
    assert deadlocked({}) == {}
    assert deadlocked({a: _all_of(b), b: _all_of(c), c: _all_of()}) == {}
    assert deadlocked({a: _all_of(b)}) == {}, "nothing is known of b"
    circle: Graph = {a: _all_of(b), b: _all_of(a), c: _all_of(a, d)}
    assert deadlocked(circle) == {a: {b}, b: {a}, c: {a}}
    either = (frozenset({a}), frozenset({d}))
    assert deadlocked({**circle, b: either, d: _all_of()}) == {}
    assert deadlocked({**circle, b: either, d: _all_of(b)}).keys() == {a, b, c, d}


def test_both_rounds() -> None:
    a, b, c, d = (Vertex(0, number) for number in range(4))
    first: Graph = {a: _all_of(b, c), b: _all_of(a), d: _all_of(a)}
    second: Graph = {a: (frozenset({b, d}), frozenset({c})), b: _all_of(a)}
    assert common(first, second) == {
        a: (frozenset({b, c}), frozenset({b}), frozenset({c})),
        b: _all_of(a),
    }


def test_no_victim_is_superfluous() -> None:
    """The youngest of the first circle found is spared: the second one has a victim in both."""
    a, b, c = (Vertex(0, number) for number in range(1, 4))
    graph: Graph = {a: _all_of(b), b: _all_of(a, c), c: _all_of(Vertex(0, 9, True))}
    graph[Vertex(0, 9, True)] = _all_of(b)
    ages = {a: 1.0, b: 2.0, c: 3.0}
    claims = tuple(
        WaitingClaim(
            wait.number, wait.number, f"wait {wait.number}", b"r%d" % wait.number, age, (), (), 0
        )
        for wait, age in ages.items()
    )
    ((victim, words),) = victims(graph, [Waits(1, 0, 1, claims, (), ())])
    assert victim == b and words == "wait 2; waits for wait 1; waits for wait 2"


class History:
    """Owners that take locks in any order."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.nodes = rng.choice([1, 2, 3])
        self.cluster = Suspicious(self.nodes, rng.choice([0.0, 0.2]))
        self.resources = [Resource(b"r%d" % n, bytes([n])) for n in range(rng.choice([2, 3, 4]))]
        self.modes = rng.choice([(PR, EX), tuple(Mode), (CR, CW, PR, PW, EX)])

    def run(self) -> int:
        for _ in range(100):
            self.rng.choice([*[self._own] * 5, *[self._network] * 8, self._sleep])()
        return self._end()

    def _own(self) -> None:
        node, owner = self.rng.randrange(self.nodes), f"owner {self.rng.randrange(3)}"
        cluster = self.cluster
        if any(claim.owner == owner and where == node for claim, where in cluster.waiting.items()):
            return
        mine = [
            claim for claim, where in cluster.held.items() if where == node and claim.owner == owner
        ]
        what = self.rng.random()
        resource, mode = self.rng.choice(self.resources), self.rng.choice(self.modes)
        if mine and what < 0.15:
            cluster.convert(self.rng.choice(mine), mode)
        elif mine and what < 0.3:
            for claim in mine:
                cluster.release(claim)
        elif all(claim.resource is not resource for claim in mine):
            cluster.acquire(node, resource, mode, shared=self._shares(), owner=owner)

    def _shares(self) -> bool:
        """Stand beside other claims of the node that say so too."""
        return False

    def _network(self) -> None:
        cluster = self.cluster
        if cluster.busy_channels and self.rng.random() < 0.8:
            cluster.deliver(*self.rng.choice(cluster.busy_channels))
        elif cluster.demoting:
            cluster.demoted(*self.rng.choice(sorted(cluster.demoting, key=repr)))

    def _sleep(self) -> None:
        self.cluster.sleep(self.rng.choice([0.1, 1.0, 3.0]))

    def _end(self) -> int:
        cluster = self.cluster
        for _ in range(60):
            cluster.settle()
            cluster.release_idle()
            cluster.settle()
            if not cluster.waiting and not cluster.held:
                return len(cluster.victims)
            cluster.sleep(AFTER_S * 20)
        raise AssertionError(f"nobody gives way: {list(cluster.waiting)}")


class SharingHistory(History):
    """Owners of one node may have EX side by side."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.often = self.rng.choice([0.2, 0.5, 0.9])

    def _shares(self) -> bool:
        return self.rng.random() < self.often


def _run(seeds: range, kind: type[History] = History) -> None:
    found = 0
    for seed in seeds:
        try:
            found += kind(seed).run()
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
    assert found > len(seeds) / 6


@pytest.mark.parametrize("kind", [History, SharingHistory])
def test_histories(kind: type[History]) -> None:
    _run(range(50), kind)


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(1826, id="a-grant-would-open-the-gate"),
        pytest.param(1983, id="one-victim-makes-two-others-superfluous"),
        pytest.param(2300, id="a-conversion-depends-on-the-request-of-another-claim"),
        pytest.param(6547, id="a-demotion-waits-for-one-that-is-in-nobodys-way"),
        pytest.param(6565, id="a-reader-overtakes-between-answer-and-verdict"),
        pytest.param(14166, id="a-gate-that-lets-more-in-when-its-target-changes"),
    ],
)
def test_known_histories(seed: int) -> None:
    History(seed).run()


@pytest.mark.full
@pytest.mark.parametrize("kind", [History, SharingHistory])
def test_many_histories(kind: type[History]) -> None:
    _run(range(1000, 3000), kind)
