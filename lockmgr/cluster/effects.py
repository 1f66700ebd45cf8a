"""What a node's membership wants done.

Effects with an ``op`` are I/O: each is answered by exactly one `Done` with that number, in any
order, also after `Stop` (it then changes nothing). An I/O runs on the session that its docstring
names. Nothing is ever sent again by the shell. What outcomes mean: `lockmgr.cluster.outcomes`.

Sessions: the *newcomer's* (temporary key), from `OpenNewcomer` to `DropNewcomer`; the *control*
and data sessions, from `OpenPaths` on. An `OpenPaths` closes those before it, and takes the next
path generations. After `Refused`, `Unknown` and `PathLost` a session does nothing any more: what
is sent to it is answered `Unknown`. Whatever ends the paths, `PathLost` with both keys is said
before any I/O on them is answered, and before the next `OpenPaths` is.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from lockmgr.cluster.blocks import Heartbeat, JoinRequest
from lockmgr.cluster.messages import Message
from lockmgr.cluster.view import NOBODY, NodeId, View


# -- I/O, each answered by one `Done` ----
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
    """Good(Opened), in this order:

    1  log in a control session, REGISTER the next generation's key of this incarnation
    2  survey on it; if the view does not list the incarnation this is all, and nothing is written
    3  write the slot block on it: both generations, ISIDs, portals
    4  log in the data session, REGISTER, read the view on it

    The ISID of each kind is the same every time: the login closes the session before it at the
    target. If it does not come to the end, `PathLost` says which keys may be registered now.

    The slot block is written under a key of the incarnation, not under a temporary one: a host that
    freezes between 2 and 3 may wake up when it was evicted and its slot is another's, and then only
    its own incarnation's key is sure to be fenced. The control session is on the LUN after its
    login; it never blocks a drain, so nobody has to reinstate it. The data session is there before.

    All of it also when nobody holds (the target has restarted): the key is registered, and whoever
    reserves and evicts this incarnation finds and fences it. Nothing else is written until then.
    """

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
    """On the control session: Good(None) when it is on the LUN. No member asks for it: whoever
    carries out its `Beat` does, of the arbiter, and says how it ended by `HeartbeatWritten` or
    `HeartbeatFailed`. Its ``op`` is 0."""

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
    """PREEMPT ``old_key``, then READ RESERVATION, same session: Good(Won | Lost | NobodyHolds). A
    conflict because nobody has that key any more is a Lost, or a NobodyHolds."""

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
    its way any more, and nothing can come. A key that is not registered any more is no error. A
    path whose ISID serves a later one by now (the slot block has another key for it) was closed by
    that one's login: its session is not reinstated, its key is preempted.
    Without keys and nodes it only drains. If the RESET has no answer for 2 s, some frozen reader
    blocks it: fence the ``stragglers`` too, who are silent, and issue it again."""

    op: int
    keys: tuple[int, ...]
    nodes: tuple[NodeId, ...] = ()
    stragglers: tuple[NodeId, ...] = ()


@dataclass(frozen=True, slots=True)
class Unregister:
    """Unregister and log out every open path but the one with key ``keep`` (0: all): Good(None) if
    none of the others is registered any more, be it because somebody has preempted it. What a
    session that was lost earlier has left registered stays so: the coordinator fences it."""

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
    | WriteJoin
    | WriteView
    | Take
    | Reserve
    | Fence
    | Unregister
    | Knock
)
AnyIo = IoEffect | WriteHeartbeat
"""Also what a member does not ask for itself."""


# -- effects: network --------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class SendTo:
    """Over the connection to ``peer``; lost if there is none. A newcomer is a peer with slot
    `NEWCOMER_SLOT` and its key, reached at the address in its join block."""

    peer: NodeId
    message: Message


@dataclass(frozen=True, slots=True)
class Beat:
    """Show this life: by a datagram to every listed node and, on the control session with ``key``,
    by writing it into the own heartbeat block (0: not at all).

    Whoever carries it out may go on showing it every ``heartbeat_s`` on its own, under growing
    sequence numbers, until the next one, or until `Member.heartbeat_key` is another; but only while
    the daemon is known to be alive (`lockmgr.cluster.pulse`). At most one write is on its way;
    each ends with `HeartbeatWritten` or `HeartbeatFailed`.
    """

    heartbeat: Heartbeat
    key: int = 0


# -- effects: upwards --------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Departed:
    """An incarnation that was listed in the view installed before, and is not any more; with the
    first view, every one whose journal is still to be replayed."""

    node: NodeId
    was_active: bool
    needs_replay: bool
    """False: it has left with an empty journal, or is replayed already."""
    replay_by: int = NOBODY
    """The slot whose node replays its journal, as far as the view says."""
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
class PathsReady:
    """I/O may be issued on the data session that was opened with this control session: the view,
    read under a reservation, lists this node, and nothing of its earlier paths can come any more.
    At most once for each `OpenPaths`; `PathLost` ends it."""

    key: int
    """The control session's."""


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
    ViewInstalled
    | LeaseUntil
    | DepartedMayBeGranted
    | ReplayWanted
    | PathsReady
    | CloseSessions
    | Stop
)
Effect = IoEffect | NetworkEffect | UpwardEffect
