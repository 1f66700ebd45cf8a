"""What happens to a node's membership (events) and what it wants done (effects).

`Member.step(event, now)` takes one event and the node's CLOCK_BOOTTIME in seconds, and returns
effects in the order in which they are to be carried out. `Member.next_timer()` says when the next
`Tick` is due; a shell that was asleep delivers what has queued up and then one `Tick`.

Effects with an ``op`` are I/O: each is answered by exactly one `Done` with that number, in any
order, also after `Stop` (it then changes nothing). An I/O runs on the session that its docstring
names. Nothing is ever sent again by the shell. Outcomes:

    Good(value)    done, with the value that the effect's docstring names
    Refused(why)   the target said no, so nothing was done: RESERVATION CONFLICT, 2A03, 2A05.
                   The session is closed for good
    Unknown()      the session was destroyed; it may have been done, may be done later, until fenced

Sessions: the *newcomer's* (temporary key), from `OpenNewcomer` to `DropNewcomer`; the *control*
and data sessions, from `OpenPaths` on. An `OpenPaths` closes those before it, and takes the next
path generations. After `Refused`, `Unknown` and `PathLost` a session does nothing any more: what
is sent to it is answered `Unknown`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntFlag

from lockmgr.cluster.view import NOBODY, NodeId, View


# -- what stands on the LUN, or is sent --------------------------------------------------------
class HeartbeatFlag(IntFlag):
    NONE = 0
    LEAVING = 1
    HAS_DIRECT_PATH = 2


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A sign of life: on the LUN and, the same, as a datagram."""

    slot: int
    incarnation: int
    sequence: int
    epoch: int
    """Of the view that its node has installed."""
    hears: int
    """Bit map of the slots whose datagrams it hears."""
    flags: HeartbeatFlag = HeartbeatFlag.NONE

    @property
    def node(self) -> NodeId:
        return NodeId(self.slot, self.incarnation)


@dataclass(frozen=True, slots=True)
class JoinRequest:
    """The join block of slot ``slot``: a newcomer asks to be taken into that slot."""

    slot: int
    key: int
    """The newcomer's temporary key."""
    sequence: int
    """Grows as long as the newcomer lives."""
    node_name: str
    machine_id: bytes
    boot_id: bytes
    fingerprint: bytes
    addresses: tuple[str, ...] = ()
    certificate: bytes = b""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this node is. The shell holds the daemon's lock file of this volume: whatever the view
    lists under the same node name and machine id is an earlier, dead incarnation of this host.
    """

    node_name: str
    machine_id: bytes
    boot_id: bytes
    fingerprint: bytes
    addresses: tuple[str, ...] = ()
    certificate: bytes = b""
    wall_offset_ns: int = 0
    """CLOCK_REALTIME - CLOCK_BOOTTIME at start; for people only."""


# -- outcomes ----------------------------------------------------------------------------------
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


@dataclass(frozen=True, slots=True)
class Won:
    """READ RESERVATION after the PREEMPT or RESERVE shows the own key."""


@dataclass(frozen=True, slots=True)
class Lost:
    """Somebody else holds."""

    holder_key: int


@dataclass(frozen=True, slots=True)
class NobodyHolds:
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


# -- messages between members (over a connection, FIFO while it lasts) --------------------------
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
    lost: bool
    """The sender has lost its paths: fence all keys of it that are not carried by a peer."""


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
    """All own keys are unregistered. If not, the sender wants to be fenced."""


@dataclass(frozen=True, slots=True)
class Ready:
    """To the coordinator, from a joining node: its journal is in order."""


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
    | AskLease
    | LeaseGiven
    | Leave
    | Ready
    | ReplayDone
    | EvictAsked
    | DeathReported
    | JoinRefused
)


# -- events ------------------------------------------------------------------------------------
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
    is outstanding is still answered (`Unknown`)."""


@dataclass(frozen=True, slots=True)
class PathBack:
    """A portal answers again: worth an `OpenPaths` now."""


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
    | Received
    | PeerConnected
    | PeerLost
    | DeathProven
    | PathLost
    | PathBack
    | Replayed
    | LocksThawed
    | LeaveWanted
    | EvictWanted
)


# -- effects: I/O, each answered by one `Done` ---------------------------------------------------
@dataclass(frozen=True, slots=True)
class OpenNewcomer:
    """Log in, REGISTER ``key``, survey: Good(Opened). Closes the newcomer's session before it."""

    op: int
    key: int


@dataclass(frozen=True, slots=True)
class DropNewcomer:
    """Unregister the newcomer's key (unless it holds, or is gone), log out: Good(None)."""

    op: int


@dataclass(frozen=True, slots=True)
class OpenPaths:
    """The slot block first (next generations, ISIDs, portals), then log in, REGISTER control and
    data key, then survey on the control session: Good(Opened). The slot block is written on the
    control session that is there, else on the newcomer's, else on a session of its own under a
    newcomer's key that is dropped afterwards."""

    op: int
    slot: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class Survey:
    """Read view, READ RESERVATION, READ KEYS on the control session, or the newcomer's as long as
    there is no other: Good(Surveyed)."""

    op: int


@dataclass(frozen=True, slots=True)
class ReadBlocks:
    """Read all heartbeat and join blocks, same session: Good(Blocks)."""

    op: int


@dataclass(frozen=True, slots=True)
class WriteHeartbeat:
    """On the control session: Good(None) when it is on the LUN."""

    op: int
    heartbeat: Heartbeat


@dataclass(frozen=True, slots=True)
class WriteJoin:
    """On the newcomer's session: Good(None)."""

    op: int
    request: JoinRequest


@dataclass(frozen=True, slots=True)
class WriteView:
    """Write and flush, on the session that reserves (control, or the newcomer's as long as there
    is no other): Good(None)."""

    op: int
    view: View


@dataclass(frozen=True, slots=True)
class Take:
    """PREEMPT ``old_key``, then READ RESERVATION, same session: Good(Won | Lost | NobodyHolds)."""

    op: int
    old_key: int


@dataclass(frozen=True, slots=True)
class Reserve:
    """RESERVE, then READ RESERVATION, same session: Good(Won | Lost | NobodyHolds). A conflict
    because somebody else holds is a Lost."""

    op: int


@dataclass(frozen=True, slots=True)
class Fence:
    """The whole fence, on the reserving session: close by reinstatement, PREEMPT, RESET. Of the
    paths with these ``keys``, and of every path of these ``nodes``: each session that their slot
    block records and each registered key of theirs, read now. Good(None): nothing of them is on
    its way any more, and nothing can come. A key that is not registered any more is no error."""

    op: int
    keys: tuple[int, ...]
    nodes: tuple[NodeId, ...] = ()


@dataclass(frozen=True, slots=True)
class Unregister:
    """Unregister and log out every own path but the one with key ``keep`` (0: all): Good(None)."""

    op: int
    keep: int


@dataclass(frozen=True, slots=True)
class Knock:
    """Ask these nodes at all their addresses whether they live, 1 s at most: Good(Knocked)."""

    op: int
    nodes: tuple[NodeId, ...]


IoEffect = (
    OpenNewcomer
    | DropNewcomer
    | OpenPaths
    | Survey
    | ReadBlocks
    | WriteHeartbeat
    | WriteJoin
    | WriteView
    | Take
    | Reserve
    | Fence
    | Unregister
    | Knock
)


# -- effects: network --------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class SendTo:
    """Over the connection to ``peer``; lost if there is none. A newcomer is a peer with slot
    `NEWCOMER_SLOT` and its key, reached at the address in its join block."""

    peer: NodeId
    message: Message


@dataclass(frozen=True, slots=True)
class Beat:
    """A datagram to every listed node."""

    heartbeat: Heartbeat


# -- effects: upwards --------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Departed:
    """An incarnation that was listed in the view installed before, and is not any more."""

    node: NodeId
    was_active: bool
    replay_by: int = NOBODY
    """The slot whose node replays its journal; `NOBODY`: that is done, or there is nothing."""
    cleared: bool = False
    """`DepartedMayBeGranted` holds for it already (and is not said again)."""


@dataclass(frozen=True, slots=True)
class ViewInstalled:
    """This node goes by ``view`` now; everybody whom it does not list is fenced. Locks are to be
    recovered if ``view.lock_epoch`` is another one than before. The first one lists this node."""

    view: View
    coordinator: NodeId
    departed: tuple[Departed, ...] = ()
    replayed: tuple[NodeId, ...] = ()
    """Incarnations whose journals were to be replayed in the view before, and are."""


@dataclass(frozen=True, slots=True)
class LeaseUntil:
    """Caches may be used until then, on this node's clock; never earlier than said before."""

    until_s: float


@dataclass(frozen=True, slots=True)
class DepartedMayBeGranted:
    """It is fenced, and its lease is over or its death proven. Once for each departed."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class ReplayWanted:
    """Replay that journal, and answer with `Replayed`; idempotent, once per view that says so. If
    ``node`` is this node itself: bring the own journal in order, create it if ``used`` is false.
    """

    node: NodeId
    used: bool


@dataclass(frozen=True, slots=True)
class CloseSessions:
    """Log out everywhere; what is registered stays so ("parked")."""


class StopReason(Enum):
    LEFT = "left"
    EVICTED = "evicted"
    REFUSED = "refused"
    CANNOT_GO_ON = "cannot go on"


@dataclass(frozen=True, slots=True)
class Stop:
    """The last effect: this incarnation is over. Every session is to be dropped, nothing that is
    cached may be used, and the FUSE connection is aborted (unless it has left)."""

    reason: StopReason
    words: str


NetworkEffect = SendTo | Beat
UpwardEffect = (
    ViewInstalled | LeaseUntil | DepartedMayBeGranted | ReplayWanted | CloseSessions | Stop
)
Effect = IoEffect | NetworkEffect | UpwardEffect
