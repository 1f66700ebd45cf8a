"""What members say to each other, over a connection that is FIFO while it lasts.

The connection proves who sends: no message carries its sender. A message that its receiver cannot
use (another coordinator, a node that is not listed any more) changes nothing; whoever wants an
answer asks again, of whoever is coordinator then, until the view shows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from lockmgr.cluster.view import NodeId, View

KEYS_PER_MESSAGE: Final = 32
"""A node that has lost more paths asks for the rest when these are fenced."""


@dataclass(frozen=True, slots=True)
class Announce:
    """From the holder: this view is on the LUN, and whoever it does not list is fenced."""

    view: View
    cleared: tuple[NodeId, ...] = ()
    """Departed in ``view.to_replay`` whose lease is over."""


@dataclass(frozen=True, slots=True)
class TakeOver:
    """From the holder, to a successor of its choice: PREEMPT this key, I do not mind."""

    holder_key: int
    lost_keys: tuple[int, ...] = ()
    """Of the sender's paths that are lost: fence them too. `KEYS_PER_MESSAGE` at most."""


@dataclass(frozen=True, slots=True)
class YouHold:
    """From whom that key has deposed: look at the reservation."""

    holder_key: int


@dataclass(frozen=True, slots=True)
class FenceAsked:
    """To the coordinator, from a member that has new paths: nothing of the lost ones with these
    keys may come any more."""

    keys: tuple[int, ...]
    """The sender's own; `KEYS_PER_MESSAGE` at most."""


@dataclass(frozen=True, slots=True)
class Fenced:
    """To who asked: nothing of the paths with these keys is on its way, and nothing can come."""

    keys: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AskLease:
    """To the coordinator, from a member without a path of its own."""

    stamp: float
    """Of the asker's clock, when it sent this."""


@dataclass(frozen=True, slots=True)
class LeaseGiven:
    stamp: float
    """That of the question: the lease runs from then."""


@dataclass(frozen=True, slots=True)
class Leave:
    """To the coordinator: all is drained, given up and journalled home."""

    clean: bool
    """All own keys are unregistered, and the journal is empty. If not, the sender wants to be
    fenced, and its journal to be replayed."""


@dataclass(frozen=True, slots=True)
class Ready:
    """To the coordinator, from a joining node: its journal is in order."""


@dataclass(frozen=True, slots=True)
class Thawed:
    """To the coordinator, from an active node: the locks are recovered. A coordinator that is
    still joining itself takes no part in locking, and would not know."""

    lock_epoch: int


@dataclass(frozen=True, slots=True)
class ReplayDone:
    """To the coordinator, from the node that the view told to replay."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class EvictAsked:
    """To the coordinator: ``node`` must go."""

    node: NodeId
    why: str


@dataclass(frozen=True, slots=True)
class DeathReported:
    """To the coordinator: that incarnation's supervisor has reaped it."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class JoinRefused:
    """To a newcomer."""

    words: str


Message = (
    Announce
    | TakeOver
    | YouHold
    | FenceAsked
    | Fenced
    | AskLease
    | LeaseGiven
    | Leave
    | Ready
    | Thawed
    | ReplayDone
    | EvictAsked
    | DeathReported
    | JoinRefused
)
