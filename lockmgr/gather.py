"""Gathering what is locked in the whole cluster: one node's answer, and the asker's part. Pure.

A gathering asks all members at once, each for one page after another. It is complete when each has
told its last page. Another view begins it anew; whoever waits for it gives up when it likes, and
then has what has come. It is no consistent cut: each page is of its own moment.

invariants (`check`):
- a member is asked for one page at a time; a page that was not asked for changes nothing
- no more than ``LIMIT_RESOURCES`` resources are kept of each member
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from heapq import nsmallest
from typing import Final

from lockmgr.claim import Claim, ClaimState, NodeLock
from lockmgr.messages import Waits
from lockmgr.modes import Mode
from lockmgr.node import NodeLocks
from lockmgr.ranges import RangeLocks
from lockmgr.ranges_core import RangeCore
from lockmgr.ranges_messages import RangeHold
from lockmgr.recovery import Recovery
from lockmgr.resource import MasteredResource
from lockmgr.snapshot_messages import (
    CLAIMS_TOLD,
    OWNERS_TOLD,
    RANGES_TOLD,
    RESOURCES_PER_PART,
    TASK_BYTES,
    AskLocks,
    LocksPart,
    ToldClaim,
    ToldLock,
    ToldQueue,
    ToldRanges,
    ToldRangeWait,
)

LIMIT_RESOURCES: Final = 20_000


# -- one node's answer -----------------------------------------------------------------------
class Teller:
    """Answers for one node."""

    def __init__(
        self,
        node: int,
        locks: NodeLocks,
        recovery: Recovery,
        ranges: RangeCore,
        waits: Callable[[float], Waits],
    ) -> None:
        self.node = node
        self._locks = locks
        self._recovery = recovery
        self._ranges = ranges
        self._waits = waits

    def answer(self, asked: AskLocks, now: float) -> LocksPart:
        """The page that ``asked`` asks for."""
        names = [name for name in self._names(asked.cached) if name > asked.after]
        page = nsmallest(RESOURCES_PER_PART, names)
        locks, mastered = self._locks.locks, self._recovery.master.resources
        files = self._ranges.master.files
        waits = self._waits(now) if not asked.after else None
        return LocksPart(
            self._recovery.epoch,
            self.node,
            asked.round,
            asked.after,
            page[-1] if len(page) < len(names) else b"",
            self._recovery.frozen,
            tuple(_lock(locks[name], now) for name in page if name in locks),
            tuple(_queue(mastered[name]) for name in page if name in mastered),
            tuple(_ranges(files[name], now) for name in page if name in files),
            waits if waits is not None and (waits.waiting or waits.queued) else None,
        )

    def _names(self, cached: bool) -> Iterable[bytes]:
        locks, mastered = self._locks.locks, self._recovery.master.resources
        files = self._ranges.master.files
        if cached:
            return locks.keys() | mastered.keys() | files.keys()
        used = {name for name, lock in locks.items() if lock not in self._locks.idle}
        awaited = {
            name for name, one in mastered.items() if one.converting or one.waiting or one.owed
        }
        return used | awaited | files.keys()


def _lock(lock: NodeLock, now: float) -> ToldLock:
    shown = lock.snapshot(now)
    holders, waiters = list(lock.claims), list(lock.queued)
    return ToldLock(
        lock.resource,
        lock.held,
        shown.age_s,
        shown.demoting_to,
        tuple(_claim(claim, now) for claim in holders[:CLAIMS_TOLD]),
        tuple(_claim(claim, now) for claim in waiters[:CLAIMS_TOLD]),
        max(0, len(holders) - CLAIMS_TOLD) + max(0, len(waiters) - CLAIMS_TOLD),
    )


def _claim(claim: Claim, now: float) -> ToldClaim:
    waits = claim.state in (ClaimState.WAITING, ClaimState.CONVERTING)
    mode = Mode.NL if claim.state is ClaimState.WAITING else claim.mode
    task = claim.holder.encode()[:TASK_BYTES].decode(errors="ignore")
    wanted = claim.wanted_mode if waits else None
    return ToldClaim(task, mode, wanted, max(0.0, now - claim.since))


def _queue(mastered: MasteredResource) -> ToldQueue:
    queued = [*mastered.converting, *mastered.waiting]
    return ToldQueue(
        mastered.resource,
        tuple(mastered.granted.items()),
        tuple((one.node, one.mode) for one in queued),
        tuple(mastered.owed.items()),
    )


def _ranges(file: RangeLocks, now: float) -> ToldRanges:
    holds = [
        RangeHold(owner, *span) for owner, holdings in file.held.items() for span in holdings.spans
    ]
    waits = []
    for one in file.waiting[:RANGES_TOLD]:
        asked = one.message
        wanted = RangeHold(asked.owner, asked.start_bytes, asked.end_bytes, asked.access)
        behind = [hold.owner for hold in file.obstacles(asked)]
        behind += [ahead.message.owner for ahead in file.ahead_of(one)]
        first = tuple(dict.fromkeys(behind))[:OWNERS_TOLD]
        waits.append(ToldRangeWait(wanted, max(0.0, now - one.since), first))
    left_out = max(0, len(holds) - RANGES_TOLD) + len(file.waiting) - len(waits)
    return ToldRanges(file.resource, tuple(holds[:RANGES_TOLD]), tuple(waits), left_out)


# -- the asker -------------------------------------------------------------------------------
@dataclass(slots=True)
class Told:
    """What one member has told so far. ``truncated``: it has more than is kept."""

    locks: list[ToldLock] = field(default_factory=list)
    queues: list[ToldQueue] = field(default_factory=list)
    ranges: list[ToldRanges] = field(default_factory=list)
    waits: Waits | None = None
    frozen: bool = False
    truncated: bool = False
    next: bytes | None = b""
    """The page that was asked for is behind this name; None: it has told all."""


class Gathering:
    """One question to all members, under its own number."""

    def __init__(self, node: int, number: int, cached: bool) -> None:
        self.node = node
        self.number = number
        self.cached = cached
        self.epoch = 0
        self.told: dict[int, Told] = {}

    @property
    def missing(self) -> list[int]:
        """Members that have not told all."""
        return sorted(node for node, told in self.told.items() if told.next is not None)

    def begin(self, epoch: int, members: Iterable[int]) -> Iterator[tuple[int, AskLocks]]:
        """Ask everybody, from the beginning; whom to send what."""
        self.epoch = epoch
        self.told = {member: Told() for member in members}
        for member in self.told:
            yield member, self._ask(b"")

    def _ask(self, after: bytes) -> AskLocks:
        return AskLocks(self.epoch, self.node, self.number, after, self.cached)

    def receive(self, part: LocksPart) -> AskLocks | None:
        """Take in a page; the next one to ask its sender for. None: no more."""
        told = self.told.get(part.node)
        if told is None or part.after != told.next or part.round != self.number:
            return None
        told.locks += part.locks
        told.queues += part.queues
        told.ranges += part.ranges
        told.waits = told.waits or part.waits
        told.frozen |= part.frozen
        told.next = part.upto or None
        if told.next is None:
            return None
        if len(told.locks) + len(told.queues) + len(told.ranges) >= LIMIT_RESOURCES:
            told.truncated = True
            told.next = None
            return None
        return self._ask(told.next)

    def check(self) -> None:
        """Assert the invariants at the top of this module."""
        for told in self.told.values():
            kept = len(told.locks) + len(told.queues) + len(told.ranges)
            assert kept < LIMIT_RESOURCES + 3 * RESOURCES_PER_PART
