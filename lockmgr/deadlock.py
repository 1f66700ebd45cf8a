"""Deadlocks across nodes: who waits for whom, cycles, and which wait is given up for one.

Theory. Somebody whose claim has waited for ``deadlock_after_s`` makes its node tell the coordinator
(`Suspicion`). That asks every member who waits for whom (`AskWaits`, `Waits`), twice, and puts the
answers together. A wait depends on

    a holder            a claim in a mode that excludes it; if its owner waits itself: on that wait
    another wait        one before it in a queue, here or at the master, that it may not overtake

It needs all of these to end (the AND model), so a cycle of waits is a deadlock, and it stays one
until somebody gives way. Answers of one round are of different moments, and may show a cycle that
never was. But each wait has a number that is never used again, and an owner awaits one claim at a
time and releases nothing meanwhile. So a cycle that both rounds show stood, as a whole, at the
moment between them. (Two rounds that only compare who waits for whom do not prove that; Knapp,
"Deadlock Detection in Distributed Databases", ACM Computing Surveys 1987.) A timeout or a
cancellation may still overtake the verdict; then a wait is denied that could have had its turn.

The victim is the youngest wait of a cycle by (age, node, number); shortest cycles first, until none
is left. Its task gets `lockmgr.errors.LockDeadlock` and releases what it holds.

Suspicion comes again, at growing intervals, as long as such a wait lasts: an edge may be formed
without a new wait. Nobody suspects who holds nothing: claims without owner, unless they convert.

invariants:
- one search at a time; another view ends it
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable

from lockmgr.claim import Claim, ClaimState, NodeLock, Obstacle, Phase
from lockmgr.events import Effect, Send
from lockmgr.messages import (
    AskWaits,
    Deadlocks,
    HoldingClaim,
    QueuedRequest,
    Suspicion,
    Victim,
    WaitingClaim,
    Waits,
)
from lockmgr.modes import COMPATIBLE, COVERS
from lockmgr.node import NodeLocks
from lockmgr.recovery import Recovery
from lockmgr.resource import MasteredResource, Queued

LONGEST_INTERVAL = 16
"""How many times ``deadlock_after_s`` a suspicion that came to nothing is kept back at most."""

HOLDER_LIMIT = 80
WAITS_TOLD = 64
CLAIMS_PER_ANSWER = 500
OWNERS_PER_CLAIM = 64
AHEAD_PER_CLAIM = 8
"""What an answer has at most. Edges that are left out hide a cycle and make none; whoever is behind
many is behind the last of them, who are behind the others."""

Wait = tuple[int, int]
"""(node, number)"""
Edges = dict[Wait, frozenset[Wait]]


class Search:
    """This node's suspicions and answers; as coordinator, the search itself."""

    def __init__(self, node: int, locks: NodeLocks, recovery: Recovery) -> None:
        self.node = node
        self._locks = locks
        self._recovery = recovery
        self._after_s = locks.settings.deadlock_after_s
        self._suspect_at: float | None = None
        self._interval_s = 0.0
        self._waits = 0
        self._owners: dict[Hashable, int] = {}
        self._owner = 0
        self._round = 0
        self._answers: dict[int, Waits] = {}
        self._first: Edges | None = None
        self._searching = False
        self._again = False

    # -- suspicion -------------------------------------------------------------------------
    def watch(self, claim: Claim, now: float) -> None:
        """``claim`` begins to wait."""
        self._waits += 1
        claim.wait = self._waits
        if self._after_s is not None and _may_be_in_a_cycle(claim):
            self._interval_s = self._after_s
            due = now + self._after_s
            if self._suspect_at is None or self._suspect_at > due:
                self._suspect_at = due

    def next_timer(self) -> float | None:
        """When to look for claims that have waited for long."""
        return self._suspect_at

    def time_passed(self, now: float) -> list[Effect]:
        """Suspect, if a claim has waited for long."""
        if self._suspect_at is None or now < self._suspect_at or self._after_s is None:
            return []
        since = [
            claim.since
            for lock in self._locks.locks.values()
            for claim in lock.queued
            if _may_be_in_a_cycle(claim)
        ]
        if not since:
            self._suspect_at = None
            return []
        if min(since) + self._after_s > now:
            self._suspect_at = min(since) + self._after_s
            return []
        self._suspect_at = now + self._interval_s
        self._interval_s = min(2 * self._interval_s, LONGEST_INTERVAL * self._after_s)
        return [self._to_coordinator(Suspicion(self._recovery.epoch, self.node))]

    def view_changed(self, now: float) -> None:
        """The search ends; whoever waits begins to suspect anew."""
        self._answers.clear()
        self._searching = self._again = False
        if self._suspect_at is not None and self._after_s is not None:
            self._interval_s = self._after_s
            self._suspect_at = now + self._after_s

    # -- messages --------------------------------------------------------------------------
    def receive(self, message: Deadlocks, now: float) -> list[Effect]:
        """A message of this epoch."""
        match message:
            case Suspicion():
                self._again = True
                return [] if self._searching else self._begin()
            case AskWaits(round=number):
                return [self._to_coordinator(self._answer(number, now))]
            case Waits():
                return self._collect(message)
            case Victim(wait=wait, words=words):
                for lock in self._locks.locks.values():
                    for claim in lock.queued:
                        if claim.wait == wait:
                            return self._locks.sacrifice(claim, words, now)
                return []

    def _to_coordinator(self, message: Suspicion | Waits) -> Send:
        return Send(self._recovery.coordinator, message)

    # -- the coordinator -------------------------------------------------------------------
    def _begin(self) -> list[Effect]:
        self._searching = True
        self._again = False
        self._first = None
        return self._ask()

    def _ask(self) -> list[Effect]:
        self._round += 1
        self._answers.clear()
        epoch = self._recovery.epoch
        return [
            Send(member, AskWaits(epoch, member, self._round)) for member in self._recovery.members
        ]

    def _collect(self, answer: Waits) -> list[Effect]:
        if not self._searching or answer.round != self._round:
            return []
        self._answers[answer.node] = answer
        if not self._answers.keys() >= set(self._recovery.members):
            return []
        edges = dependencies(self._answers.values())
        if self._first is None and shortest_cycle(edges) is not None:
            self._first = edges
            return self._ask()
        self._searching = False
        out: list[Effect] = []
        if self._first is not None:
            for wait, words in victims(common(self._first, edges), self._answers.values()):
                epoch = self._recovery.epoch
                out.append(Send(wait[0], Victim(epoch, wait[0], wait[1], words)))
        return out + (self._begin() if self._again else [])

    # -- what this node knows --------------------------------------------------------------
    def _answer(self, number: int, now: float) -> Waits:
        before, self._owners = self._owners, {}
        waiting: list[WaitingClaim] = []
        holding: list[HoldingClaim] = []
        for lock in self._locks.locks.values():
            queued = list(lock.queued)
            for position, claim in enumerate(queued):
                waits_for, behind, request = _obstacles(lock, claim, queued[:position])
                waiting.append(
                    WaitingClaim(
                        claim.wait,
                        self._number(claim, before),
                        f"{claim.holder[:HOLDER_LIMIT] or 'a task'} on node {self.node}, which "
                        f"{'has ' + str(claim.mode) + ' and ' if claim in lock.claims else ''}"
                        f"wants {claim.wanted_mode} of {lock.resource.name!r}",
                        lock.resource.name,
                        max(0.0, now - claim.since),
                        tuple(self._number(o, before) for o in waits_for[:OWNERS_PER_CLAIM]),
                        tuple(other.wait for other in behind[-AHEAD_PER_CLAIM:]),
                        request,
                    )
                )
            if lock.held is not None and not COMPATIBLE[lock.held][lock.wanted]:
                for claim in lock.claims:
                    owner = self._number(claim, before)
                    holding.append(HoldingClaim(lock.resource.name, owner, claim.mode))
        queued_here = [
            request
            for mastered in self._recovery.master.resources.values()
            for request in _requests(mastered)
            if not self._recovery.frozen  # then they wait for the thaw
        ]
        return Waits(
            self._recovery.epoch,
            self.node,
            number,
            tuple(waiting[:CLAIMS_PER_ANSWER]),
            tuple(holding[:CLAIMS_PER_ANSWER]),
            tuple(queued_here[:CLAIMS_PER_ANSWER]),
        )

    def _number(self, claim: Claim, before: dict[Hashable, int]) -> int:
        owner: Hashable = claim if claim.owner is None else claim.owner
        if owner not in self._owners:
            if owner not in before:
                self._owner += 1
            self._owners[owner] = before.get(owner, self._owner)
        return self._owners[owner]


def _may_be_in_a_cycle(claim: Claim) -> bool:
    if claim.state is ClaimState.CONVERTING:
        return claim.queue
    return claim.state is ClaimState.WAITING and claim.queue and claim.owner is not None


def _obstacles(
    lock: NodeLock, claim: Claim, ahead: list[Claim]
) -> tuple[list[Claim], list[Claim], int]:
    """Claims of this node whose release ``claim`` awaits, waits that must end before its own, and
    the request to the master on which it depends (0: none).
    """
    obstacle = lock.obstacle(claim)
    if obstacle is Obstacle.GATE:
        if lock.phase is Phase.DRAINING or (lock.drain and not lock.drained):
            above = [other for other in lock.claims if not COVERS[lock.target][other.mode]]
            return above, [], 0
        return [], [], 0  # the owner works: nothing is known that it waits for
    beside = [] if lock.fits_here(claim) else [o for o in lock.claims if _exclude(claim, o)]
    held_up = [other for other in ahead if _holds_up(lock, other, claim)]
    if claim.state is ClaimState.CONVERTING and lock.has_turn(claim):
        held_up = []
    asks = lock.asked is not None and lock.asked_for is claim and not lock.cancelled
    return beside, held_up, lock.serial if asks else 0


def _holds_up(lock: NodeLock, ahead: Claim, claim: Claim) -> bool:
    obstacle = lock.obstacle(ahead)
    both_new = ahead.state is claim.state is ClaimState.WAITING
    return not lock.passable(obstacle) or (both_new and obstacle is Obstacle.GATE)


def _exclude(claim: Claim, other: Claim) -> bool:
    if other is claim or (other.shared_here and claim.shared_here):
        return False
    return not COMPATIBLE[claim.wanted_mode][other.mode]


def _requests(mastered: MasteredResource) -> Iterable[QueuedRequest]:
    for queued in (*mastered.converting, *mastered.waiting):
        yield QueuedRequest(
            mastered.resource.name,
            queued.node,
            queued.serial,
            queued.mode,
            tuple(mastered.in_the_way(queued)),
            tuple((other.node, other.serial) for other in _before(mastered, queued)),
        )


def _before(mastered: MasteredResource, queued: Queued) -> list[Queued]:
    if queued in mastered.waiting:
        return [*mastered.converting, *mastered.waiting[: mastered.waiting.index(queued)]]
    ahead = mastered.converting[: mastered.converting.index(queued)]
    held = COMPATIBLE[mastered.granted[queued.node]]
    return [] if any(not held[other.mode] for other in ahead) else ahead


# -- the graph -------------------------------------------------------------------------------
def dependencies(answers: Iterable[Waits]) -> Edges:
    """Which waits must end before each wait can."""
    answers = list(answers)
    waits_of: dict[tuple[int, int], list[Wait]] = {}
    asked: dict[tuple[bytes, int, int], list[Wait]] = {}
    for answer in answers:
        for claim in answer.waiting:
            wait = (answer.node, claim.wait)
            waits_of.setdefault((answer.node, claim.owner), []).append(wait)
            if claim.request:
                asked.setdefault((claim.resource, answer.node, claim.request), []).append(wait)
    edges: dict[Wait, set[Wait]] = {}
    for answer in answers:
        for claim in answer.waiting:
            ends = edges.setdefault((answer.node, claim.wait), set())
            ends.update((answer.node, number) for number in claim.behind)
            for owner in claim.holders:
                ends.update(waits_of.get((answer.node, owner), ()))
    holding = {
        (claim.resource, answer.node): [
            other for other in answer.holding if other.resource == claim.resource
        ]
        for answer in answers
        for claim in answer.holding
    }
    for answer in answers:
        for request in answer.queued:
            ends = set()
            for node, serial in request.behind:
                ends.update(asked.get((request.resource, node, serial), ()))
            for node in request.holders:
                for held in holding.get((request.resource, node), ()):
                    if not COMPATIBLE[request.mode][held.mode]:
                        ends.update(waits_of.get((node, held.owner), ()))
            for wait in asked.get((request.resource, request.waiter, request.serial), ()):
                edges[wait] |= ends
    return {wait: frozenset(ends - {wait}) for wait, ends in edges.items()}


def common(first: Edges, second: Edges) -> Edges:
    """What both rounds show."""
    return {wait: ends & first[wait] for wait, ends in second.items() if wait in first}


def shortest_cycle(edges: Edges) -> list[Wait] | None:
    """The waits of a shortest cycle in order, beginning with the lowest; None: there is none."""
    best: list[Wait] | None = None
    for start in sorted(edges):
        before: dict[Wait, Wait] = {}
        queue = deque([start])
        while queue and start not in before:
            wait = queue.popleft()
            for end in sorted(edges.get(wait, ())):
                if end not in before:
                    before[end] = wait
                    queue.append(end)
        if start not in before:
            continue
        cycle = [before[start]]
        while cycle[-1] != start:
            cycle.append(before[cycle[-1]])
        cycle.reverse()
        if best is None or len(cycle) < len(best):
            best = cycle
    return best


def victims(edges: Edges, answers: Iterable[Waits]) -> list[tuple[Wait, str]]:
    """Waits to be denied so that no cycle is left, each with its cycle in words."""
    claims = {(answer.node, claim.wait): claim for answer in answers for claim in answer.waiting}
    chosen: list[tuple[Wait, str]] = []
    while (cycle := shortest_cycle(edges)) is not None:
        victim = min(cycle, key=lambda wait: (claims[wait].age_s, wait))
        at = cycle.index(victim)
        said = [claims[wait].words for wait in (cycle[at:] + cycle[:at])[:WAITS_TOLD]]
        chosen.append((victim, "; waits for ".join([*said, said[0]])))
        edges = {wait: ends - {victim} for wait, ends in edges.items() if wait != victim}
    return chosen
