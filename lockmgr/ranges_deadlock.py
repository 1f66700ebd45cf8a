"""Circles of waits for byte ranges that go through several masters: found in one place.

Each master ends the circles that it sees whole (`lockmgr.ranges_waits`). For the others it tells
the coordinator when a request has waited for a while (`RangeSuspicion`; again after four times as
long, and so on: a wait that is no deadlock may last for days). The coordinator asks every master
for its waits, twice. A wait that was there both times, for the same owners, was there all the time
between, and so were all waits of a circle at one moment: nothing is refused for a circle whose
parts never were at the same time. Then it sends verdicts, which change nothing if the wait is gone.

The rules are those of one master: among the POSIX requests in a circle of owners and holders the
newest is refused; a circle of processes that only fairness closes costs the held-back request its
patience.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from typing import Final

from lockmgr.ranges import process_of
from lockmgr.ranges_messages import (
    AskRangeWaits,
    Kind,
    Owner,
    RangeVerdict,
    RangeWaits,
    WaitEdges,
)

WaitKey = tuple[int, int]
"""Node and serial of a request that waits."""


def find_verdicts(waits: Iterable[WaitEdges]) -> list[tuple[WaitEdges, bool]]:
    """Which waits end the circles among ``waits``; true: by overtaking, false: by EDEADLK."""
    left = sorted(waits, key=lambda wait: (wait.waited_s, wait.owner.node, wait.serial))
    verdicts: list[tuple[WaitEdges, bool]] = []
    while (victim := _newest_in_circle(left)) is not None:
        left.remove(victim)
        verdicts.append((victim, False))
    held_back = [
        wait
        for wait in left
        if _reaches(left, wait.held_back_by, wait.owner, process_of, lambda w: w.held_back_by)
    ]
    return verdicts + [(wait, True) for wait in held_back]


def _newest_in_circle(waits: Sequence[WaitEdges]) -> WaitEdges | None:
    for wait in waits:
        if wait.owner.kind is Kind.POSIX and _reaches(
            waits, wait.behind, wait.owner, lambda owner: owner, lambda _wait: ()
        ):
            return wait
    return None


def _reaches(
    waits: Sequence[WaitEdges],
    owners: Iterable[Owner],
    goal: Owner,
    identity: Callable[[Owner], Hashable],
    softly: Callable[[WaitEdges], Iterable[Owner]],
) -> bool:
    """Do ``owners`` wait for ``goal``, for holders and for whom ``softly`` names?"""
    edges: dict[Hashable, set[Hashable]] = {}
    for wait in waits:
        reached = edges.setdefault(identity(wait.owner), set())
        reached.update(map(identity, wait.behind))
        reached.update(map(identity, softly(wait)))
    seen: set[Hashable] = set()
    ahead = list(map(identity, owners))
    while ahead:
        one = ahead.pop()
        if one == identity(goal):
            return True
        if one not in seen:
            seen.add(one)
            ahead.extend(edges.get(one, ()))
    return False


def in_both(before: Iterable[WaitEdges], after: Iterable[WaitEdges]) -> list[WaitEdges]:
    """The waits of the second round as far as the first one had them."""
    first = {(wait.owner.node, wait.serial): wait for wait in before}
    return [
        replace(
            wait,
            behind=tuple(owner for owner in wait.behind if owner in earlier.behind),
            held_back_by=tuple(o for o in wait.held_back_by if o in earlier.held_back_by),
        )
        for wait in after
        if (earlier := first.get((wait.owner.node, wait.serial))) is not None
    ]


PATIENCE_S: Final = 6.0
"""Who has not heard yet of another coordinator answers the one before: after so long without an
answer a suspicion begins anew. Shorter than the pause between two suspicions of one wait."""


class RangeDetector:
    """The coordinator's part, for one epoch; messages of another never reach it.

    invariants (`check`):
    - a round runs while answers are missing; there is at most one
    - ``before`` is there in a second round only
    """

    def __init__(self, epoch: int, members: Sequence[int]) -> None:
        self.epoch = epoch
        self.members = tuple(members)
        self._round = 0
        self._missing: set[int] = set()
        self._asked_at = 0.0
        self._waits: list[tuple[int, WaitEdges]] = []
        """With the master that told."""
        self._before: list[WaitEdges] | None = None
        self._again = False

    def suspect(self, now: float) -> list[AskRangeWaits]:
        """A master suspects a deadlock: ask, or ask again when the present round has ended."""
        if self._missing and now < self._asked_at + PATIENCE_S:
            self._again = True
            return []
        self._again = False
        return self._ask(None, now)

    def _ask(self, before: list[WaitEdges] | None, now: float) -> list[AskRangeWaits]:
        self._round += 1
        self._asked_at = now
        self._before = before
        self._waits = []
        self._missing = set(self.members)
        return [AskRangeWaits(self.epoch, member, self._round) for member in self.members]

    def receive(self, answer: RangeWaits, now: float) -> list[AskRangeWaits | RangeVerdict]:
        """Part of a master's answer. Those of a round that is over are passed over."""
        if answer.round != self._round or answer.node not in self._missing:
            return []
        self._waits += [(answer.node, wait) for wait in answer.waits]
        if answer.last:
            self._missing.discard(answer.node)
        return [] if self._missing else self._all_answered(now)

    def _all_answered(self, now: float) -> list[AskRangeWaits | RangeVerdict]:
        waits = [wait for _master, wait in self._waits]
        out: list[AskRangeWaits | RangeVerdict] = []
        if self._before is None:
            if find_verdicts(waits):
                return [*self._ask(waits, now)]
        else:
            masters = {(w.owner.node, w.serial): master for master, w in self._waits}
            for wait, overtake in find_verdicts(in_both(self._before, waits)):
                node = wait.owner.node
                master = masters[node, wait.serial]
                out.append(
                    RangeVerdict(wait.resource, self.epoch, master, node, wait.serial, overtake)
                )
        self._before = None
        if self._again:
            self._again = False
            out += self._ask(None, now)
        return out

    def check(self) -> None:
        """Assert the invariants."""
        assert self._missing <= set(self.members)
        assert self._before is None or self._missing
        assert not self._again or self._missing
