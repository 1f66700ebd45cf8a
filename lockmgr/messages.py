"""What nodes and masters say to each other, and the name of what they talk about.

Every message carries the lock epoch of its sender, and all but those of recovery and of deadlock
detection name their resource. A message of an earlier epoch is refused, one of a later epoch is
kept until the receiver has that view. Channels between two nodes are FIFO and lose nothing within
an epoch: whoever carries them numbers them, and sends again what a broken connection lost.

    node to master          Request, Cancel, Lower, AskGlimpse, Working
    master to node          Granted, Refused, Blocking, Unblocking, Probe
    node to node            GlimpseAnswer, Glimpses
    recovery, all to all    Reassert
    member to coordinator   Reasserted, Suspicion, Waits
    coordinator to member   Thaw, Settled, AskWaits, Victim

invariants:
- a node has at most one Request without an answer per resource
- each Request is answered by exactly one Granted or Refused with its serial; a Cancel that comes
  too late changes nothing, and is not answered itself
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from lockmgr.modes import Mode

NAME_LIMIT_BYTES = 32
VALUE_BYTES = 64


@dataclass(frozen=True, slots=True)
class Resource:
    """What is locked. ``placement`` decides which node masters it; one name has one placement.

    Hashing costs what hashing ``name`` costs, and bytes cache theirs; users keep a Resource with
    the object it stands for rather than build it for each lock.
    """

    name: bytes
    placement: bytes

    def __post_init__(self) -> None:
        if not 0 < len(self.name) <= NAME_LIMIT_BYTES:
            raise ValueError(
                f"resource name {self.name!r} has {len(self.name)} bytes, "
                f"not 1 to {NAME_LIMIT_BYTES}"
            )

    def __hash__(self) -> int:
        return hash(self.name)


@dataclass(frozen=True, slots=True)
class ValueBlock:
    """64 bytes that travel with the lock; ``sequence`` grows by one with each change.

    ``data`` is None while the block is *not valid*: never written, made not valid by a writer, or
    forgotten because nobody held the resource.
    """

    data: bytes | None = None
    sequence: int = 0

    def __post_init__(self) -> None:
        if self.data is not None and len(self.data) != VALUE_BYTES:
            raise ValueError(f"a value block has {VALUE_BYTES} bytes, not {len(self.data)}")


NEVER_WRITTEN: Final = ValueBlock()


@dataclass(frozen=True, slots=True)
class Message:
    """``node``: the sender in what goes to a master, the addressee in all others."""

    resource: Resource
    epoch: int
    node: int


# -- node to master ----------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Request(Message):
    """A first lock, or a conversion if the node has one. ``queue`` false: answer at once."""

    serial: int
    mode: Mode
    queue: bool


@dataclass(frozen=True, slots=True)
class Cancel(Message):
    """Forget the request ``serial`` if it still waits."""

    serial: int


@dataclass(frozen=True, slots=True)
class Lower(Message):
    """The node has given up all that ``mode`` does not cover; None: the lock itself.

    ``grant`` is the serial of the last `Granted` that the node had seen: if another is on its way
    to it, that one prevails, and of this message only the value block counts. ``value`` is the
    new value block when the node changed it under the PW or EX that it leaves. A conversion that
    waits stays where it is in the queue.
    """

    grant: int
    mode: Mode | None
    value: ValueBlock | None = None


@dataclass(frozen=True, slots=True)
class AskGlimpse(Message):
    """What would the holder of PW or EX answer about this resource?"""

    serial: int


@dataclass(frozen=True, slots=True)
class Working(Message):
    """The node has not lowered yet what others want, and works on it, or its tasks use it."""


# -- master to node ----------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Granted(Message):
    """The request ``serial`` is granted; with it comes the value block."""

    serial: int
    mode: Mode
    value: ValueBlock


@dataclass(frozen=True, slots=True)
class Refused(Message):
    """The request ``serial`` was cancelled, or would have had to wait."""

    serial: int


@dataclass(frozen=True, slots=True)
class Blocking(Message):
    """Somebody waits for ``mode`` behind what this node holds."""

    mode: Mode


@dataclass(frozen=True, slots=True)
class Unblocking(Message):
    """A request this node was told of is gone; what is left wants ``mode`` (NL: nothing)."""

    mode: Mode


@dataclass(frozen=True, slots=True)
class Probe(Message):
    """Answer ``asker``'s glimpse."""

    asker: int
    serial: int


# -- node to node ------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class GlimpseAnswer(Message):
    """The holder's answer; None: nobody holds PW or EX, so the lock itself is to be had."""

    serial: int
    answer: bytes | None


@dataclass(frozen=True, slots=True)
class Glimpses:
    """Many of `AskGlimpse`, `Probe` and `GlimpseAnswer` at once; ``node`` is the sender.

    ``asked``: resource and serial; ``probes``: resource, asker and serial; ``answers``: resource,
    serial and answer, of each.
    """

    epoch: int
    node: int
    asked: tuple[tuple[Resource, int], ...] = ()
    probes: tuple[tuple[Resource, int, int], ...] = ()
    answers: tuple[tuple[Resource, int, bytes | None], ...] = ()


# -- recovery ----------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class HeldState:
    """What a node has and awaits of one resource: its word, which is the truth.

    ``held`` None: it only waits. ``grant``: the serial of the last grant it has seen. ``asked``:
    the mode it has asked for in vain so far, under ``serial``; ``waited_s``: since when.
    """

    resource: Resource
    held: Mode | None
    grant: int = 0
    value: ValueBlock = NEVER_WRITTEN
    asked: Mode | None = None
    serial: int = 0
    queue: bool = True
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True)
class MasterState:
    """What the master of an earlier epoch, who has survived, knows of a resource.

    ``writer``: whom it had granted PW or EX; that node may have changed the value block. ``owed``:
    departed nodes, each with the strongest mode in which it may have had the resource.
    """

    resource: Resource
    value: ValueBlock
    writer: int | None
    owed: tuple[tuple[int, Mode], ...]


def _must_be_nodes(members: tuple[int, ...]) -> None:
    if members and not 0 <= min(members) <= max(members) < 1 << 63:
        raise ValueError(f"members {members}")


@dataclass(frozen=True, slots=True)
class Loss:
    """Masters ``gone`` of the view ``members`` took with them who held what they mastered.

    Each of ``owed`` (departed nodes) may have held any of it.
    """

    members: tuple[int, ...]
    gone: frozenset[int]
    owed: frozenset[int]

    def __post_init__(self) -> None:
        _must_be_nodes(self.members)


@dataclass(frozen=True, slots=True)
class RecoveryMessage:
    """``node``: the sender, or, from the coordinator, the addressee."""

    epoch: int
    node: int


@dataclass(frozen=True, slots=True)
class Reassert(RecoveryMessage):
    """What the sender has of resources that the addressee masters from now on.

    A sender's last one has ``last``; and only that one has its ``views`` (members of each view that
    may have been the last one with thawed locks) and ``losses``.
    """

    held: tuple[HeldState, ...] = ()
    mastered: tuple[MasterState, ...] = ()
    last: bool = False
    views: tuple[tuple[int, ...], ...] = ()
    losses: tuple[Loss, ...] = ()

    def __post_init__(self) -> None:
        for view in self.views:
            _must_be_nodes(view)


@dataclass(frozen=True, slots=True)
class Reasserted(RecoveryMessage):
    """The sender has heard the last `Reassert` of every member. ``cleared`` and ``replayed``: what
    it has been told of departed nodes (`Settled`)."""

    cleared: frozenset[int]
    replayed: frozenset[int]


@dataclass(frozen=True, slots=True)
class Thaw(RecoveryMessage):
    """Every member has said `Reasserted`: masters grant again."""

    cleared: frozenset[int]
    replayed: frozenset[int]


@dataclass(frozen=True, slots=True)
class Settled(RecoveryMessage):
    """These departed nodes may be granted over (``cleared``); these journals are replayed."""

    cleared: frozenset[int]
    replayed: frozenset[int]


# -- deadlocks ---------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Suspicion(RecoveryMessage):
    """Somebody at the sender has waited for long, and holds something."""


@dataclass(frozen=True, slots=True)
class AskWaits(RecoveryMessage):
    """Who waits for whom, as far as the addressee knows?"""

    round: int


@dataclass(frozen=True, slots=True)
class WaitingClaim:
    """A claim that waits; ``wait`` is never used again by its node. ``owner`` numbers the owner.

    It needs that the request to the master with the serial ``request`` is answered (0: none); and
    that the owners ``holders`` of this node release what excludes it and the waits ``behind`` of
    this node, which are before it, end; or, if there are any, that the owners ``instead`` do.
    """

    wait: int
    owner: int
    words: str
    resource: bytes
    age_s: float
    holders: tuple[int, ...]
    behind: tuple[int, ...]
    request: int
    instead: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class HoldingClaim:
    """An owner that holds ``mode`` of ``resource``, though others want what excludes it.

    ``drained``: the node lowers its lock in one step, for all who want it to, and not before this
    owner has released; so those whom ``mode`` would leave room wait for it too.
    """

    resource: bytes
    owner: int
    mode: Mode
    drained: bool = False


@dataclass(frozen=True, slots=True)
class QueuedRequest:
    """At the master: the request ``serial`` of node ``waiter`` for ``mode`` waits for the nodes
    ``holders`` and for the requests ``behind`` (node, serial)."""

    resource: bytes
    waiter: int
    serial: int
    mode: Mode
    holders: tuple[int, ...]
    behind: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Waits(RecoveryMessage):
    """The answer to `AskWaits`."""

    round: int
    waiting: tuple[WaitingClaim, ...]
    holding: tuple[HoldingClaim, ...]
    queued: tuple[QueuedRequest, ...]


@dataclass(frozen=True, slots=True)
class Victim(RecoveryMessage):
    """Deny that wait, if it still is one: it closes a cycle, which ``words`` tells."""

    wait: int
    words: str


MasterBound = Request | Cancel | Lower | AskGlimpse
NodeBound = Granted | Refused | Blocking | Unblocking | Probe | GlimpseAnswer
Recovering = Reassert | Reasserted | Thaw | Settled
Deadlocks = Suspicion | AskWaits | Waits | Victim
AnyMessage = MasterBound | NodeBound | Recovering | Deadlocks | Working | Glimpses
