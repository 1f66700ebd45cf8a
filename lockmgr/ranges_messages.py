"""What nodes and masters say to each other about byte ranges, and who owns one.

As in `lockmgr.messages`: every message names its resource (the file), its epoch and a node;
channels between two nodes are FIFO and lose nothing within an epoch.

    node to master      RangeLock, RangeLower, RangeForget, RangeTest, RangeCancel, RangeReassert
    master to node      RangeAnswer, RangeTested, RangeLost
    master to coordinator, about circles of waits      RangeSuspicion, RangeWaits
    coordinator to master                              AskRangeWaits, RangeVerdict

invariants:
- each RangeLock, RangeLower and RangeForget is answered by exactly one RangeAnswer with its serial,
  each RangeTest by exactly one RangeTested; a RangeCancel has no answer of its own
- a node changes what it believes to hold only when it hears from the master, so that its belief is
  what the master had when it said so
- only a RangeLock can fail or wait, and it takes nothing away (flock apart); only RangeLower and
  RangeForget take away, and they never fail or wait. So after a recovery an owner claims all that
  it was granted except what it has asked to give up, and no two claims conflict
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from lockmgr.messages import Message, RecoveryMessage, Resource

END: Final = 1 << 63
"""``end_bytes`` of a range to the end of the file, however far the file grows (POSIX: l_len 0)."""

WAITS_PER_MESSAGE: Final = 16
EDGES_PER_WAIT: Final = 512
"""A `RangeWaits` has at most so many waits, and each so many owners of either kind; what is beyond
that may hide a circle."""

HOLDS_PER_MESSAGE: Final = 512
"""A `RangeReassert` has at most so many; a node sends as many of them as it needs."""


class Kind(IntEnum):
    """Whose semantics. POSIX and OFD locks exclude each other; flock's are a world of their own."""

    POSIX = 1
    """fcntl(2) F_SETLK: the owner is a process (the kernel's files_struct)."""
    OFD = 2
    """fcntl(2) F_OFD_SETLK: the owner is an open file description."""
    FLOCK = 3
    """flock(2): whole file; the owner is an open file description."""


class Access(IntEnum):
    """What an owner may do with a byte: `READ` beside other readers, `WRITE` alone."""

    NONE = 0
    READ = 1
    WRITE = 2


class Outcome(IntEnum):
    """How an operation ended; the errno for the application stands beside it."""

    DONE = 0
    WOULD_BLOCK = 1
    """EAGAIN."""
    DEADLOCK = 2
    """EDEADLK."""
    CANCELLED = 3
    """EINTR."""
    NO_LOCKS = 4
    """ENOLCK: the owner has too many ranges in this file."""


@dataclass(frozen=True, slots=True, order=True)
class Owner:
    """Who holds ranges: ``number`` is the kernel's lock owner (POSIX) or names an open file.

    ``pid`` belongs to reports (l_pid of F_GETLK) and to fairness, not to the identity; 0: unknown.
    """

    kind: Kind
    node: int
    number: int
    pid: int = field(default=0, compare=False)

    def __str__(self) -> str:
        pid = f" pid {self.pid}" if self.pid else ""
        return f"{self.kind.name} {self.number:#x} of node {self.node}{pid}"


@dataclass(frozen=True, slots=True)
class RangeHold:
    """``owner`` has ``access`` to the bytes from ``start_bytes`` up to, not with, ``end_bytes``."""

    owner: Owner
    start_bytes: int
    end_bytes: int
    access: Access

    def __str__(self) -> str:
        end = "end" if self.end_bytes == END else str(self.end_bytes)
        return f"{self.owner} {self.access.name} {self.start_bytes}..{end}"


# -- node to master ----------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class RangeLock(Message):
    """Give ``owner`` at least ``access`` to the range; what it has beyond that it keeps.

    ``wait`` false: answer at once. Kind FLOCK: what it has in another access it loses first.
    ``waited_ms`` is how long it waits already, in earlier epochs: the order of those who wait
    survives a recovery.
    """

    serial: int
    owner: Owner
    start_bytes: int
    end_bytes: int
    access: Access
    wait: bool
    waited_ms: int = 0


@dataclass(frozen=True, slots=True)
class RangeLower(Message):
    """``owner`` gives up what it has in the range beyond ``keep`` (NONE: unlocks it)."""

    serial: int
    owner: Owner
    start_bytes: int
    end_bytes: int
    keep: Access


@dataclass(frozen=True, slots=True)
class RangeForget(Message):
    """``owner`` gives up all it has in this file; ``waits``: what it waits for, too."""

    serial: int
    owner: Owner
    waits: bool


@dataclass(frozen=True, slots=True)
class RangeTest(Message):
    """F_GETLK: what would stand in the way of this lock?"""

    serial: int
    owner: Owner
    start_bytes: int
    end_bytes: int
    access: Access


@dataclass(frozen=True, slots=True)
class RangeCancel(Message):
    """Forget the `RangeLock` ``serial`` if it still waits; it is answered with CANCELLED."""

    serial: int


@dataclass(frozen=True, slots=True)
class RangeReassert(Message):
    """In a new epoch, before anything else about this file: what this node's owners hold."""

    holds: tuple[RangeHold, ...]


# -- master to node ----------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class RangeAnswer(Message):
    """How the operation ``serial`` ended."""

    serial: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class RangeTested(Message):
    """A lock that stands in the way, the one that begins first; None: nothing does."""

    serial: int
    conflict: RangeHold | None


@dataclass(frozen=True, slots=True)
class RangeLost(Message):
    """flock: the owner asked for another access and has lost what it had; the answer to what it
    asked for follows, at once or after a wait."""

    owner: Owner


# -- circles of waits through several masters --------------------------------------------------
@dataclass(frozen=True, slots=True)
class WaitEdges:
    """The request ``serial`` of ``owner`` waits for the holders ``behind``, and lets the earlier
    requests of ``held_back_by`` go first."""

    resource: Resource
    owner: Owner
    serial: int
    waited_s: float
    behind: tuple[Owner, ...]
    held_back_by: tuple[Owner, ...]


@dataclass(frozen=True, slots=True)
class RangeSuspicion(RecoveryMessage):
    """Something has waited for long at the sender."""


@dataclass(frozen=True, slots=True)
class AskRangeWaits(RecoveryMessage):
    """What waits at the addressee?"""

    round: int


@dataclass(frozen=True, slots=True)
class RangeWaits(RecoveryMessage):
    """Part of the answer; the end of it, if ``last``."""

    round: int
    waits: tuple[WaitEdges, ...]
    last: bool


@dataclass(frozen=True, slots=True)
class RangeVerdict(Message):
    """The request ``serial`` of node ``waiter`` is in a circle: refuse it, or let it ``overtake``.
    Nothing, if it does not wait any more."""

    waiter: int
    serial: int
    overtake: bool


RangeMasterBound = RangeLock | RangeLower | RangeForget | RangeTest | RangeCancel | RangeReassert
RangeNodeBound = RangeAnswer | RangeTested | RangeLost
RangeDeadlocks = RangeSuspicion | AskRangeWaits | RangeWaits | RangeVerdict
RangeMessage = RangeMasterBound | RangeNodeBound | RangeDeadlocks
