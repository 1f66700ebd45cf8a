"""What happens to a node's membership.

`Member.step(event, now)` takes one event and the node's CLOCK_BOOTTIME in seconds, and returns
effects in the order in which they are to be carried out. `Member.next_timer()` says when the next
`Tick` is due; a shell that was asleep delivers what has queued up and then one `Tick`.
"""

from __future__ import annotations

from dataclasses import dataclass

from lockmgr.cluster.blocks import Heartbeat
from lockmgr.cluster.messages import Message
from lockmgr.cluster.outcomes import Outcome
from lockmgr.cluster.view import NodeId


@dataclass(frozen=True, slots=True)
class Start:
    """Once, first."""


@dataclass(frozen=True, slots=True)
class Tick:
    """The time that ``next_timer`` named has come."""


@dataclass(frozen=True, slots=True)
class Done:
    """The answer to the effect with that number."""

    op: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class BeatHeard:
    """A datagram whose HMAC is right."""

    beat: Heartbeat


@dataclass(frozen=True, slots=True)
class HeartbeatWritten:
    """An own heartbeat is on the LUN, written on the control session with that key."""

    key: int
    sent_at: float
    """When that write was sent, or earlier; on this node's clock."""


@dataclass(frozen=True, slots=True)
class HeartbeatFailed:
    """The write of a heartbeat on the session with that key was `Refused` or `Unknown`: it is
    closed."""

    key: int


@dataclass(frozen=True, slots=True)
class Received:
    """A message from a peer that a connection has proven to be ``peer``."""

    peer: NodeId
    message: Message


@dataclass(frozen=True, slots=True)
class PeerConnected:
    """From now on messages reach ``peer``; those sent before may be lost."""

    peer: NodeId


@dataclass(frozen=True, slots=True)
class PeerLost:
    """The connection is gone, and messages with it. It proves nothing."""

    peer: NodeId


@dataclass(frozen=True, slots=True)
class DeathProven:
    """That incarnation's supervisor says, with its certificate, that it has reaped it."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class PathLost:
    """The control or the data session is gone or was silent for 2 s; both are dropped. I/O that
    is outstanding is answered (`Unknown`) after this was said. Also of paths that were not opened
    to the end."""

    keys: tuple[int, ...] = ()
    """Those of the lost paths, the control session's among them. Nothing flows on the next paths
    before these are fenced (`lockmgr.cluster.proof`). None: a newcomer's session is lost."""


@dataclass(frozen=True, slots=True)
class PathBack:
    """A portal answers again: worth an `OpenPaths` now."""


@dataclass(frozen=True, slots=True)
class StrangerCame:
    """Somebody has dialed whose certificate this node does not know: perhaps a newcomer, whose
    join block it has not looked at yet. It proves nothing."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """``ReplayWanted`` of that incarnation is done and stable."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class LocksThawed:
    """The locks are recovered in this lock epoch."""

    lock_epoch: int


@dataclass(frozen=True, slots=True)
class LeaveWanted:
    """The node wants to go. All its I/O is drained, no lock is held, its journal is empty."""


@dataclass(frozen=True, slots=True)
class EvictWanted:
    """An administrator, or the lock manager, wants ``node`` to go."""

    node: NodeId
    why: str


Event = (
    Start
    | Tick
    | Done
    | BeatHeard
    | HeartbeatWritten
    | HeartbeatFailed
    | Received
    | PeerConnected
    | PeerLost
    | DeathProven
    | PathLost
    | PathBack
    | StrangerCame
    | Replayed
    | LocksThawed
    | LeaveWanted
    | EvictWanted
)
