"""Who waits for whom among the byte-range locks of one master: deadlocks, and fairness undone.

Theory. A request that waits does so for the *owners* of what stands in its way. Linux answers
EDEADLK to a POSIX request whose wait would close a circle of owners (fs/locks.c,
`posix_locks_deadlock`), whatever files they are in; so does this. OFD and flock requests are never
refused, as there, since a process may have many such owners; but a circle that they, or a grant,
close around a POSIX request ends too: its newest POSIX request is refused.

Fairness adds edges: from a request to those before it that it would exclude. A circle that has
such an edge is none in Linux, so the request that is held back loses its patience instead. There
*processes* are compared, not owners, for any kind: too many circles found cost fairness only.

A new circle has an owner in it that has just begun to wait, or that has been granted something
while it waits elsewhere; so only these need to be looked at.

A circle may go through other masters too. So a request that has waited `FIRST_DOUBT_S` is a reason
to look for one (`lockmgr.ranges_deadlock`), and again each time it has waited four times as long.

invariants (`check`):
- all indexes have exactly what waits, ``holders`` who holds
- no circle goes through a patient request that is held back by others
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from typing import Final, TypeVar

from lockmgr.ranges import Process, RangeLocks, Waiting, process_of
from lockmgr.ranges_messages import EDGES_PER_WAIT, Kind, Owner, RangeLock, WaitEdges
from lockmgr.timers import Timers

FIRST_DOUBT_S: Final = 0.5
DOUBT_GROWS: Final = 4

FileWait = tuple[RangeLocks, Waiting]

Key = TypeVar("Key")


class WaitGraph:
    """All that waits in the files of one master, by owner and by process."""

    __slots__ = ("_all", "_by_owner", "_by_process", "_doubts", "holders")

    def __init__(self) -> None:
        self.holders: Counter[Process] = Counter()
        """How many owners of a process hold something in a file; kept by the files."""
        self._all: dict[Waiting, RangeLocks] = {}
        """The oldest first."""
        self._by_owner: dict[Owner, list[FileWait]] = {}
        self._by_process: dict[Process, list[FileWait]] = {}

        self._doubts: Timers[Waiting] = Timers(self._still_due)

    def _still_due(self, when: float, waiting: Waiting) -> bool:
        return waiting in self._all and waiting.doubt_at == when

    def add(self, file: RangeLocks, waiting: Waiting, now: float) -> None:
        """It waits in ``file``."""
        self._doubt(waiting, now, FIRST_DOUBT_S)
        self._all[waiting] = file
        owner = waiting.message.owner
        self._by_owner.setdefault(owner, []).append((file, waiting))
        self._by_process.setdefault(process_of(owner), []).append((file, waiting))

    def _doubt(self, waiting: Waiting, now: float, after_s: float) -> None:
        waiting.doubt_s = after_s
        waiting.doubt_at = now + after_s
        self._doubts.set(waiting.doubt_at, waiting)

    def doubt_anew(self, now: float) -> None:
        """As if all of them had begun to wait now."""
        for waiting in self._all:
            self._doubt(waiting, now, FIRST_DOUBT_S)

    def next_doubt(self) -> float | None:
        """When `take_doubts` will have something to say."""
        return self._doubts.next()

    def take_doubts(self, now: float) -> bool:
        """Has something waited for so long that it may be a deadlock?"""
        found = False
        while (waiting := self._doubts.pop_due(now)) is not None:
            found = True
            self._doubt(waiting, now, waiting.doubt_s * DOUBT_GROWS)
        return found

    def edges(self, now: float) -> Iterator[WaitEdges]:
        """All that waits, for whoever sees all masters."""
        for waiting, file in self._all.items():
            behind = (hold.owner for hold in file.obstacles(waiting.message))
            ahead = dict.fromkeys(other.message.owner for other in file.ahead_of(waiting))
            yield WaitEdges(
                file.resource,
                waiting.message.owner,
                waiting.message.serial,
                max(0.0, now - waiting.since),
                tuple(islice(behind, EDGES_PER_WAIT)),
                tuple(islice(ahead, EDGES_PER_WAIT)),
            )

    def remove(self, file: RangeLocks, waiting: Waiting) -> None:
        """It waits no more."""
        del self._all[waiting]
        owner = waiting.message.owner
        _take_out(self._by_owner, owner, (file, waiting))
        _take_out(self._by_process, process_of(owner), (file, waiting))

    def clear(self) -> None:
        """Nobody waits."""
        self.holders.clear()
        self._all.clear()
        self._by_owner.clear()
        self._by_process.clear()

    def deadlock(self, file: RangeLocks, message: RangeLock) -> bool:
        """Does, or would, the wait of ``message`` close a circle of owners and holders?"""
        seen: set[Owner] = set()
        reached = [hold.owner for hold in file.obstacles(message)]
        while reached:
            owner = reached.pop()
            if owner == message.owner:
                return True
            if owner not in seen:
                seen.add(owner)
                for other_file, waiting in self._by_owner.get(owner, ()):
                    reached.extend(hold.owner for hold in other_file.obstacles(waiting.message))
        return False

    def victim(self, owner: Owner) -> FileWait | None:
        """The request to be refused if ``owner`` waits in a circle of owners and holders."""
        if not any(self.deadlock(file, w.message) for file, w in self._by_owner.get(owner, ())):
            return None
        for waiting, file in reversed(self._all.items()):
            posix = waiting.message.owner.kind is Kind.POSIX
            if posix and self.deadlock(file, waiting.message):
                return file, waiting
        return None

    def in_circle(self, owner: Owner) -> bool:
        """Does the process of ``owner`` wait for itself, by way of holders and of fairness?

        May say no of a process that holds nothing and has one wait only: of whom the newest wait
        of a circle is, others wait for what it holds or for what else it waits for.
        """
        process = process_of(owner)
        waits = self._by_process.get(process, ())
        if not waits or (len(waits) == 1 and process not in self.holders):
            return False
        awaited = (other for file, waiting in waits for other in _awaited(file, waiting))
        return self._reaches(awaited, process)

    def held_back_in_circle(self) -> list[FileWait]:
        """Requests that fairness holds back behind those that depend on them."""
        return [
            (file, waiting)
            for waiting, file in self._all.items()
            if waiting.patient
            and self._reaches(
                (process_of(ahead.message.owner) for ahead in file.ahead_of(waiting)),
                process_of(waiting.message.owner),
            )
        ]

    def _reaches(self, processes: Iterable[Process], goal: Process) -> bool:
        seen: set[Process] = set()
        reached = list(processes)
        while reached:
            process = reached.pop()
            if process == goal:
                return True
            if process not in seen:
                seen.add(process)
                for file, waiting in self._by_process.get(process, ()):
                    reached.extend(_awaited(file, waiting))
        return False

    def check(self, files: Collection[RangeLocks]) -> None:
        """Assert the invariants; ``files``: all that this graph is about."""
        holders = Counter(process_of(owner) for file in files for owner in file.held)
        assert holders == self.holders
        listed = {(id(file), id(waiting)) for file in files for waiting in file.waiting}
        indexes: tuple[Iterable[list[FileWait]], ...] = (
            self._by_owner.values(),
            self._by_process.values(),
        )
        for index in indexes:
            indexed = [(id(file), id(waiting)) for waits in index for file, waiting in waits]
            assert len(indexed) == len(listed) and set(indexed) == listed
            assert all(index)
        assert not self.held_back_in_circle()


def _awaited(file: RangeLocks, waiting: Waiting) -> Iterator[Process]:
    for hold in file.obstacles(waiting.message):
        yield process_of(hold.owner)
    for ahead in file.ahead_of(waiting):
        yield process_of(ahead.message.owner)


def _take_out(index: dict[Key, list[FileWait]], key: Key, wait: FileWait) -> None:
    index[key].remove(wait)
    if not index[key]:
        del index[key]
