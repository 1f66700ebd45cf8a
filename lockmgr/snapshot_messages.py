"""What nodes tell each other for people who ask what is locked in the whole cluster.

A node asks every member, itself too, for one page after another (`AskLocks`, `LocksPart`); pages
are in the order of the resources' names, so nobody has to remember how far another has got.
``node`` is the sender in both. Ages are in seconds, by the clock of the node that tells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from lockmgr.messages import RecoveryMessage, Resource, Waits
from lockmgr.modes import Mode
from lockmgr.ranges_messages import Owner, RangeHold

RESOURCES_PER_PART: Final = 32
CLAIMS_TOLD: Final = 16
RANGES_TOLD: Final = 32
OWNERS_TOLD: Final = 4
TASK_BYTES: Final = 80


@dataclass(frozen=True, slots=True)
class ToldClaim:
    """A task's claim. ``wanted``: what it converts to; a waiting one has ``mode`` NL if new."""

    task: str
    mode: Mode
    wanted: Mode | None
    age_s: float


@dataclass(frozen=True, slots=True)
class ToldLock:
    """What the sender has of a resource; ``more``: claims that are not in the lists."""

    resource: Resource
    held: Mode | None
    age_s: float
    demoting_to: Mode | None
    holders: tuple[ToldClaim, ...]
    waiters: tuple[ToldClaim, ...]
    more: int


@dataclass(frozen=True, slots=True)
class ToldQueue:
    """What the sender, its master, has granted of a resource, and who waits there, in order.

    ``owed``: departed nodes that may have had it, with the mode.
    """

    resource: Resource
    granted: tuple[tuple[int, Mode], ...]
    waiting: tuple[tuple[int, Mode], ...]
    owed: tuple[tuple[int, Mode], ...]


@dataclass(frozen=True, slots=True)
class ToldRangeWait:
    """A request for a byte range that waits for the owners ``behind``."""

    wanted: RangeHold
    age_s: float
    behind: tuple[Owner, ...]


@dataclass(frozen=True, slots=True)
class ToldRanges:
    """Byte ranges of a file that the sender masters; ``more``: what is not in the lists."""

    resource: Resource
    holds: tuple[RangeHold, ...]
    waits: tuple[ToldRangeWait, ...]
    more: int


@dataclass(frozen=True, slots=True)
class AskLocks(RecoveryMessage):
    """Tell what comes behind the name ``after``; ``cached``: also what nobody uses or awaits."""

    round: int
    after: bytes
    cached: bool


@dataclass(frozen=True, slots=True)
class LocksPart(RecoveryMessage):
    """The answer. ``upto``: the last name looked at; empty: that was all. The first part has the
    node's ``waits``, if somebody waits; ``frozen``: a recovery is under way."""

    round: int
    after: bytes
    upto: bytes
    frozen: bool
    locks: tuple[ToldLock, ...]
    queues: tuple[ToldQueue, ...]
    ranges: tuple[ToldRanges, ...]
    waits: Waits | None


Snapshots = AskLocks | LocksPart
