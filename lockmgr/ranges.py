"""Byte-range locks on one file, at its master, as a pure state machine.

Theory. An owner's locks on a file are a function from bytes to `Access`, so locking, unlocking and
changing part of what is held are one operation, and splitting and merging follow from keeping
that function in its shortest form (POSIX.1-2017 fcntl; fcntl(2), flock(2)). Two owners exclude
each other where both have access and one may write. POSIX and OFD owners share one space, as in
Linux; flock has another, in which every range is the whole file.

Who is granted, and when:
- A try, and a request for what the owner has already, is granted when no other *holder* stands in
  the way, whoever waits: as in Linux.
- A request that may wait is also held back by earlier requests that wait for what it would take
  away from them, so nobody starves; among those that wait, first come, first served.
- Fairness must not make a deadlock where Linux has none: a program may well take a second read
  lock while a writer waits for its first. So a request that those before it turn out to depend on
  loses its patience (``patient``) and is held back by holders only. Who depends on whom is found
  in `lockmgr.ranges_master`, which sees all files.
- flock: a change from shared to exclusive or back is a release, which others may use, and then a
  request (flock(2): "not guaranteed to be atomic"); a try that fails has lost the old lock.

invariants (`check`):
- spans of an owner are sorted, disjoint, of the shortest form, and not empty
- no two owners of a space exclude each other anywhere
- nothing grantable waits
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from lockmgr.errors import ProtocolViolation
from lockmgr.messages import Resource
from lockmgr.ranges_messages import (
    END,
    Access,
    Kind,
    Outcome,
    Owner,
    RangeHold,
    RangeLock,
    RangeTest,
)


class Span(NamedTuple):
    """``access`` to the bytes from ``start`` up to, not with, ``end``."""

    start: int
    end: int
    access: Access


def _start(span: Span) -> int:
    return span.start


def _end(span: Span) -> int:
    return span.end


class Holdings:
    """What one owner may do with each byte of one file."""

    __slots__ = ("spans",)

    def __init__(self, spans: list[Span] | None = None) -> None:
        self.spans: list[Span] = spans if spans is not None else []

    def copy(self) -> Holdings:
        """One that changes on its own."""
        return Holdings(list(self.spans))

    def assign(self, start: int, end: int, access: Access) -> None:
        """The bytes have exactly this access from now on."""
        spans = self.spans
        first = bisect_left(spans, start, key=_end)
        behind = bisect_right(spans, end, key=_start)
        pieces: list[Span] = []
        tail: list[Span] = []
        for span in spans[first:behind]:
            if span.access is access:
                start = min(start, span.start)
                end = max(end, span.end)
                continue
            if span.start < start:
                pieces.append(Span(span.start, min(span.end, start), span.access))
            if span.end > end:
                tail.append(Span(max(span.start, end), span.end, span.access))
        if access is not Access.NONE:
            pieces.append(Span(start, end, access))
        spans[first:behind] = pieces + tail

    def overlapping(self, start: int, end: int) -> Iterator[Span]:
        """The spans that share a byte with the range, in order."""
        spans = self.spans
        for index in range(bisect_right(spans, start, key=_end), len(spans)):
            if spans[index].start >= end:
                return
            yield spans[index]

    def raise_to(self, start: int, end: int, access: Access) -> None:
        """Each byte has at least ``access``."""
        if access is Access.WRITE:
            self.assign(start, end, access)
            return
        for span in list(self.overlapping(start, end)):
            if start < span.start:
                self.assign(start, span.start, access)
            start = span.end
        if start < end:
            self.assign(start, end, access)

    def lower_to(self, start: int, end: int, keep: Access) -> None:
        """Each byte has at most ``keep``."""
        for span in list(self.overlapping(start, end)):
            if span.access > keep:
                self.assign(max(start, span.start), min(end, span.end), keep)

    def covers(self, start: int, end: int, access: Access) -> bool:
        """Has every byte at least ``access``?"""
        for span in self.overlapping(start, end):
            if span.start > start or span.access < access:
                return False
            start = span.end
        return start >= end

    def obstacle(self, start: int, end: int, access: Access) -> Span | None:
        """The first span that keeps others from having ``access`` to the range."""
        for span in self.overlapping(start, end):
            if access is Access.WRITE or span.access is Access.WRITE:
                return span
        return None

    def would_split(self, start: int, end: int, keep: Access) -> bool:
        """Does `lower_to` leave more spans than there are?"""
        for span in self.overlapping(start, end):
            if span.access > keep:
                return span.start < start and end < span.end
        return False

    def check(self) -> None:
        """Assert the shortest form."""
        before: Span | None = None
        for span in self.spans:
            assert 0 <= span.start < span.end <= END, span
            assert span.access is not Access.NONE, span
            if before is not None:
                assert before.end <= span.start, (before, span)
                assert before.end < span.start or before.access is not span.access, (before, span)
            before = span


Process = Owner | tuple[int, int]
"""(node, pid), or an owner whose process is not known."""


def process_of(owner: Owner) -> Process:
    """What two owners of one process have in common."""
    return (owner.node, owner.pid) if owner.pid else owner


@dataclass(slots=True, eq=False)
class Waiting:
    """A request that waits, since ``since`` on the master's clock.

    ``doubt_at``: when a deadlock that goes through other masters is to be looked for, ``doubt_s``
    after the last time.
    """

    message: RangeLock
    since: float
    patient: bool = True
    doubt_at: float = 0.0
    doubt_s: float = 0.0


def _same_space(a: Owner, b: Owner) -> bool:
    return (a.kind is Kind.FLOCK) == (b.kind is Kind.FLOCK)


def _exclude(a: RangeLock, b: RangeLock) -> bool:
    return (
        a.owner != b.owner
        and _same_space(a.owner, b.owner)
        and a.start_bytes < b.end_bytes
        and b.start_bytes < a.end_bytes
        and (a.access is Access.WRITE or b.access is Access.WRITE)
    )


class RangeLocks:
    """The byte-range locks of one file. Changes it by one operation at a time; sends nothing.

    ``holders`` counts, for all files, the owners of each process that hold something in a file.
    """

    __slots__ = ("held", "holders", "ranges_per_owner", "resource", "waiting")

    def __init__(
        self, resource: Resource, ranges_per_owner: int, holders: Counter[Process]
    ) -> None:
        self.resource = resource
        self.holders = holders
        self.ranges_per_owner = ranges_per_owner
        self.held: dict[Owner, Holdings] = {}
        self.waiting: list[Waiting] = []

    @property
    def empty(self) -> bool:
        """Nobody holds or awaits anything."""
        return not self.held and not self.waiting

    # -- who stands in the way -------------------------------------------------------------
    def obstacles(self, request: RangeLock | RangeTest) -> Iterator[RangeHold]:
        """One hold of each other owner that excludes the request."""
        for owner, holdings in self.held.items():
            if owner == request.owner or not _same_space(owner, request.owner):
                continue
            span = holdings.obstacle(request.start_bytes, request.end_bytes, request.access)
            if span is not None:
                yield RangeHold(owner, *span)

    def has(self, request: RangeLock) -> bool:
        """Is what the owner holds enough?"""
        holdings = self.held.get(request.owner)
        return holdings is not None and holdings.covers(
            request.start_bytes, request.end_bytes, request.access
        )

    def ahead_of(self, waiting: Waiting) -> Iterator[Waiting]:
        """Earlier requests that hold this one back for fairness's sake."""
        if not waiting.patient:
            return
        for other in self.waiting:
            if other is waiting:
                return
            if _exclude(other.message, waiting.message):
                yield other

    def test(self, request: RangeTest) -> RangeHold | None:
        """F_GETLK: of the locks in the way the one that begins first."""
        return min(
            self.obstacles(request), key=lambda hold: (hold.start_bytes, hold.owner), default=None
        )

    # -- changes ---------------------------------------------------------------------------
    def attempt(self, request: RangeLock) -> Outcome:
        """Grant the request unless a holder is in the way."""
        for _ in self.obstacles(request):
            return Outcome.WOULD_BLOCK
        holdings = self.held.get(request.owner)
        if holdings is None:
            holdings = self._new_holder(request.owner)
        elif len(holdings.spans) >= self.ranges_per_owner:
            return Outcome.NO_LOCKS
        if request.owner.kind is Kind.FLOCK:
            holdings.assign(request.start_bytes, request.end_bytes, request.access)
        else:
            holdings.raise_to(request.start_bytes, request.end_bytes, request.access)
        return Outcome.DONE

    def leave_flock(self, request: RangeLock) -> bool:
        """The first half of a conversion: drop what the owner has in another access."""
        holdings = self.held.get(request.owner)
        if request.owner.kind is not Kind.FLOCK or holdings is None:
            return False
        if holdings.spans[0].access is request.access:
            return False
        self.forget(request.owner)
        return True

    def enqueue(self, request: RangeLock, now: float) -> Waiting:
        """Let the request wait, behind all others."""
        waiting = Waiting(request, now - request.waited_ms / 1000)
        self.waiting.append(waiting)
        return waiting

    def lower(self, owner: Owner, start: int, end: int, keep: Access) -> Outcome:
        """Give up what the owner has in the range beyond ``keep``."""
        holdings = self.held.get(owner)
        if holdings is None:
            return Outcome.DONE
        full = len(holdings.spans) >= self.ranges_per_owner
        if full and holdings.would_split(start, end, keep):
            return Outcome.NO_LOCKS
        holdings.lower_to(start, end, keep)
        if not holdings.spans:
            self.forget(owner)
        return Outcome.DONE

    def forget(self, owner: Owner) -> None:
        """The owner holds nothing from now on."""
        if self.held.pop(owner, None) is not None:
            process = process_of(owner)
            self.holders[process] -= 1
            if not self.holders[process]:
                del self.holders[process]

    def _new_holder(self, owner: Owner) -> Holdings:
        self.holders[process_of(owner)] += 1
        holdings = self.held[owner] = Holdings()
        return holdings

    def assert_held(self, hold: RangeHold) -> None:
        """Take an owner's word after a recovery. Raises `ProtocolViolation` if two exclude."""
        for owner, holdings in self.held.items():
            if owner != hold.owner and _same_space(owner, hold.owner):
                span = holdings.obstacle(hold.start_bytes, hold.end_bytes, hold.access)
                if span is not None:
                    raise ProtocolViolation(
                        f"{self.resource.name!r}: {hold} against {RangeHold(owner, *span)}"
                    )
        known = self.held.get(hold.owner)
        holdings = known if known is not None else self._new_holder(hold.owner)
        holdings.raise_to(hold.start_bytes, hold.end_bytes, hold.access)

    def next_grantable(self) -> Waiting | None:
        """The first that waits although nothing is in its way."""
        for waiting in self.waiting:
            if any(True for _ in self.obstacles(waiting.message)):
                continue
            if not any(True for _ in self.ahead_of(waiting)):
                return waiting
        return None

    def check(self) -> None:
        """Assert the invariants at the top of this module."""
        owners = list(self.held.items())
        for position, (owner, holdings) in enumerate(owners):
            assert holdings.spans, owner
            holdings.check()
            for other, others in owners[:position]:
                if _same_space(owner, other):
                    for span in holdings.spans:
                        assert others.obstacle(*span) is None, (self.resource, owner, other, span)
            if owner.kind is Kind.FLOCK:
                assert len(holdings.spans) == 1, owner
        assert self.next_grantable() is None, self.waiting
