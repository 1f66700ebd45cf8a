"""What happens to a node's byte-range locks (events) and what it wants done (effects).

event                       followed by
SetRange, ForgetFile        RangeDone with its ticket, once
FindConflict                   RangeFound with its ticket; RangeDone with CANCELLED if cancelled
CancelRange, OwnerDied      nothing of their own
"""

from __future__ import annotations

from dataclasses import dataclass

from lockmgr.messages import Resource
from lockmgr.ranges_messages import Access, Outcome, Owner, RangeHold, RangeMessage


# -- events ------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class SetRange:
    """fcntl F_SETLK, F_SETLKW (``wait``) or flock; ``access`` NONE unlocks."""

    ticket: int
    resource: Resource
    owner: Owner
    start_bytes: int
    end_bytes: int
    access: Access
    wait: bool


@dataclass(frozen=True, slots=True)
class FindConflict:
    """fcntl F_GETLK."""

    ticket: int
    resource: Resource
    owner: Owner
    start_bytes: int
    end_bytes: int
    access: Access


@dataclass(frozen=True, slots=True)
class ForgetFile:
    """The owner has closed the file (POSIX: any of its descriptors).

    What the owner waits for in this file goes on waiting: another thread may do so.
    """

    ticket: int
    resource: Resource
    owner: Owner


@dataclass(frozen=True, slots=True)
class OwnerDied:
    """The owner is gone, with all it holds and awaits in any file.

    What it waited for is answered with CANCELLED, or with DONE just before.
    """

    owner: Owner


@dataclass(frozen=True, slots=True)
class CancelRange:
    """The task behind ``ticket`` was interrupted. Its answer still follows, and may be DONE."""

    ticket: int


RangeEvent = SetRange | FindConflict | ForgetFile | OwnerDied | CancelRange


# -- effects -----------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class RangeSend:
    """Send ``message`` to another node."""

    to: int
    message: RangeMessage


@dataclass(frozen=True, slots=True)
class RangeDone:
    """How the operation ``ticket`` ended."""

    ticket: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class RangeFound:
    """The answer to FindConflict. A conflict of another node has that node's pid: report it so."""

    ticket: int
    conflict: RangeHold | None


@dataclass(frozen=True, slots=True)
class RangeEpochRefused:
    """A message of another epoch arrived; it changed nothing."""

    message: RangeMessage


RangeEffect = RangeSend | RangeDone | RangeFound | RangeEpochRefused
