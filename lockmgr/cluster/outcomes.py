"""How an I/O of a member ended.

Good(value)    done, with the value that the effect's docstring names
Refused(why)   the target said no, so nothing was done: RESERVATION CONFLICT, 2A03, 2A05.
               The session is closed for good
Unknown()      the session was destroyed; it may have been done, may be done later, until fenced
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from lockmgr.cluster.blocks import Heartbeat, JoinRequest
from lockmgr.cluster.view import NodeId, View


class Why(Enum):
    CONFLICT = "reservation conflict"
    PREEMPTED = "reservations or registrations preempted"


@dataclass(frozen=True, slots=True)
class Surveyed:
    """What a registered session saw, read in this order: view, reservation, keys."""

    view: View
    holder_key: int
    """0: nobody holds."""
    keys: tuple[int, ...]
    generation: int
    """PRGENERATION."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """All heartbeat and join blocks that are valid."""

    heartbeats: tuple[Heartbeat, ...]
    joins: tuple[JoinRequest, ...] = ()


@dataclass(frozen=True, slots=True)
class Opened:
    """The paths are open; ``key`` is the control session's, ``survey`` was read on it."""

    key: int
    survey: Surveyed


class TakeAnswer:
    """What READ RESERVATION showed after a PREEMPT or RESERVE."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Won(TakeAnswer):
    """READ RESERVATION after the PREEMPT or RESERVE shows the own key."""


@dataclass(frozen=True, slots=True)
class Lost(TakeAnswer):
    """Somebody else holds."""

    holder_key: int


@dataclass(frozen=True, slots=True)
class NobodyHolds(TakeAnswer):
    """There is no reservation: a PREEMPT took nothing."""


@dataclass(frozen=True, slots=True)
class Knocked:
    """Those that answered at one of their addresses."""

    answered: frozenset[NodeId]


Value = None | Surveyed | Blocks | Opened | Won | Lost | NobodyHolds | Knocked


@dataclass(frozen=True, slots=True)
class Good:
    value: Value = None


@dataclass(frozen=True, slots=True)
class Refused:
    why: Why = Why.CONFLICT


@dataclass(frozen=True, slots=True)
class Unknown:
    pass


Outcome = Good | Refused | Unknown
