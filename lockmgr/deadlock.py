"""Deadlocks across nodes: who waits for whom, and which wait is given up so that others go on.

Theory. Somebody whose claim has waited for ``deadlock_after_s`` makes its node tell the coordinator
(`Suspicion`). That asks every member who waits for whom (`AskWaits`, `Waits`), twice, and puts the
answers together (`lockmgr.deadlock_graph`). A wait depends on

    a holder            a claim in a mode that excludes it; if its owner waits itself: on that wait
    another wait        one before it in a queue of this node that it may not overtake
    a request           that of its node to the master, whichever claim it was made for: a node has
                        one at a time. A request depends on holders, and on requests before it

It needs all of these to end. Only a claim that a demotion keeps out while its node's request is on
its way needs the request and *one* of two: that the demotion goes on, or that there is room once
the request is granted, for a grant ends the reason of the demotion.

What is deadlocked stays so until somebody gives way. Answers of one round are of different moments,
and may show a deadlock that never was. But each wait has a number that is never used again, and an
owner awaits one claim at a time and releases nothing meanwhile. So what both rounds show stood, as
a whole, at the moment between them. (Two rounds that only compare who waits for whom do not prove
that; Knapp, "Deadlock Detection in Distributed Databases", ACM Computing Surveys 1987.) A timeout
or a cancellation may still overtake the verdict; then a wait is denied that could have had its
turn. So may a request that nobody knew of, and that makes a demotion begin (`NodeLock.passable`).

The victim is the youngest wait of a cycle by (age, node, number). Its task gets
`lockmgr.errors.LockDeadlock` and releases what it holds.

Suspicion comes again, at growing intervals, as long as such a wait lasts: an edge may be formed
without a new wait. Nobody suspects who holds nothing: claims without owner, unless they convert.

invariants:
- one search at a time; another view, or another coordinator, ends it
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from lockmgr.claim import Claim, ClaimState, NodeLock, Obstacle, Phase
from lockmgr.deadlock_graph import Graph, common, deadlocked, needs, victims
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

PATIENCE = 4
"""How many times ``deadlock_after_s`` an answer may take. Who has not heard yet of another
coordinator answers the one before; the next suspicion begins anew then."""

HOLDER_LIMIT = 80
CLAIMS_PER_ANSWER = 500
OWNERS_PER_CLAIM = 64
AHEAD_PER_CLAIM = 8
"""What an answer has at most. Edges that are left out hide a cycle and make none; whoever is behind
many is behind the last of them, who are behind the others."""


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
        self._first: Graph | None = None
        self._searching = False
        self._asked_at = 0.0
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
            case Suspicion() | Waits() if self._recovery.coordinator != self.node:
                return []  # it was, or will be in a moment; whoever suspects will do so again
            case Suspicion():
                self._again = True
                patience_s = PATIENCE * (self._after_s or 0.0)
                searches = self._searching and now < self._asked_at + patience_s
                return [] if searches else self._begin(now)
            case AskWaits(round=number):
                return [self._to_coordinator(self.waits(number, now))]
            case Waits():
                return self._collect(message, now)
            case Victim(wait=wait, words=words):
                for lock in self._locks.locks.values():
                    for claim in lock.queued:
                        if claim.wait == wait:
                            return self._locks.sacrifice(claim, words, now)
                return []

    def _to_coordinator(self, message: Suspicion | Waits) -> Send:
        return Send(self._recovery.coordinator, message)

    # -- the coordinator -------------------------------------------------------------------
    def _begin(self, now: float) -> list[Effect]:
        self._searching = True
        self._again = False
        self._first = None
        return self._ask(now)

    def _ask(self, now: float) -> list[Effect]:
        self._round += 1
        self._asked_at = now
        self._answers.clear()
        epoch = self._recovery.epoch
        return [
            Send(member, AskWaits(epoch, member, self._round)) for member in self._recovery.members
        ]

    def _collect(self, answer: Waits, now: float) -> list[Effect]:
        if not self._searching or answer.round != self._round:
            return []
        self._answers[answer.node] = answer
        if not self._answers.keys() >= set(self._recovery.members):
            return []
        graph = needs(self._answers.values())
        if self._first is None and deadlocked(graph):
            self._first = graph
            return self._ask(now)
        self._searching = False
        out: list[Effect] = []
        if self._first is not None:
            epoch = self._recovery.epoch
            for wait, words in victims(common(self._first, graph), self._answers.values()):
                out.append(Send(wait.node, Victim(epoch, wait.node, wait.number, words)))
        # What is left once these have given way is not known: look again.
        return out + (self._begin(now) if self._again or out else [])

    # -- what this node knows --------------------------------------------------------------
    def waits(self, number: int, now: float) -> Waits:
        """Who waits for whom, as far as this node knows."""
        before, self._owners = self._owners, {}
        waiting: list[WaitingClaim] = []
        holding: list[HoldingClaim] = []
        for lock in self._locks.locks.values():
            queued = list(lock.queued)
            for position, claim in enumerate(queued):
                obstacles = _obstacles(lock, claim, queued[:position])
                waiting.append(
                    WaitingClaim(
                        claim.wait,
                        self._number(claim, before),
                        f"{claim.holder[:HOLDER_LIMIT] or 'a task'} on node {self.node}, which "
                        f"{'has ' + str(claim.mode) + ' and ' if claim in lock.claims else ''}"
                        f"wants {claim.wanted_mode} of {lock.resource.name!r}",
                        lock.resource.name,
                        max(0.0, now - claim.since),
                        self._numbers(obstacles.holders, before),
                        tuple(other.wait for other in obstacles.behind[-AHEAD_PER_CLAIM:]),
                        obstacles.request,
                        self._numbers(obstacles.instead, before),
                    )
                )
            if lock.held is not None and not COMPATIBLE[lock.held][lock.wanted]:
                for claim in lock.claims:
                    owner = self._number(claim, before)
                    drained = lock.phase is not Phase.HELD and not COVERS[lock.target][claim.mode]
                    holding.append(HoldingClaim(lock.resource.name, owner, claim.mode, drained))
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

    def _numbers(self, claims: list[Claim], before: dict[Hashable, int]) -> tuple[int, ...]:
        return tuple(self._number(claim, before) for claim in claims[:OWNERS_PER_CLAIM])

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


@dataclass(slots=True)
class _Obstacles:
    """What a claim awaits, as `lockmgr.messages.WaitingClaim` says it."""

    holders: list[Claim] = field(default_factory=list)
    behind: list[Claim] = field(default_factory=list)
    request: int = 0
    instead: list[Claim] = field(default_factory=list)


def _obstacles(lock: NodeLock, claim: Claim, ahead: list[Claim]) -> _Obstacles:
    enough = lock.held is not None and COVERS[lock.held][claim.wanted_mode]
    asked = lock.asked is not None and not lock.cancelled and not enough
    found = _Obstacles(request=lock.serial if asked else 0)
    above: list[Claim] = []
    if lock.obstacle(claim) is Obstacle.GATE:
        draining = lock.phase is Phase.DRAINING
        if not draining and (not lock.drain or lock.drained):
            return _Obstacles()  # the owner works: nothing is known that it waits for
        above = [other for other in lock.claims if not COVERS[lock.target][other.mode]]
        if not (draining and asked):
            found.holders = above
            return found
        found.instead = above
    if not lock.fits_here(claim):
        found.holders = [other for other in lock.claims if _exclude(claim, other)]
    if claim.state is not ClaimState.CONVERTING or not lock.has_turn(claim):
        found.behind = [other for other in ahead if _holds_up(lock, other, claim)]
    return found


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
