"""What happens to a node's lock manager (events) and what it wants done (effects).

A step takes one event and the time, and returns effects in order. Claims are the only objects
with an identity here: the shell makes them, the core grants them.

    event                       followed by
    Acquire, Convert            Grant or Deny of that claim, once, unless it is withdrawn before
    Release, Withdraw           nothing that concerns the claim
    Demoted                     (the answer to Demote)
    AwaitDrain                  Drained
    Glimpse                     Glimpsed with that ticket
    Answered                    (the answer to Answer)
    GatherLocks                 Gathered with its ticket, if all members tell before StopGathering
    ViewChanged                 Thawed with its epoch, unless another ViewChanged comes before
    TimerDue, Deliver, Close,
    Cleared, JournalsReplayed   whatever they cause

Those of byte ranges are in `lockmgr.ranges_events`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from lockmgr.carried import Carried
from lockmgr.claim import Claim
from lockmgr.messages import Resource
from lockmgr.modes import Mode
from lockmgr.ranges_events import RangeDone, RangeEvent, RangeFound
from lockmgr.snapshot import LockSnapshot


class Patience(Enum):
    """How far an `Acquire` or `Convert` may go before it is denied."""

    NONE = "answer within this step: neither wait nor ask another node"
    NO_QUEUE = "ask the master, but wait for no holder"
    QUEUE = "wait"


# -- events ------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Acquire:
    """A task wants ``claim.resource`` in ``claim.mode``; ``timeout_s`` counts with QUEUE only."""

    claim: Claim
    patience: Patience = Patience.QUEUE
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Convert:
    """The holder of ``claim`` wants ``mode`` instead, and keeps what it has until then."""

    claim: Claim
    mode: Mode
    patience: Patience = Patience.QUEUE
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Release:
    """The holder of ``claim`` is done with it."""

    claim: Claim


@dataclass(frozen=True, slots=True)
class Withdraw:
    """The task that waits for ``claim`` was cancelled; a converting claim keeps its old mode."""

    claim: Claim


@dataclass(frozen=True, slots=True)
class Demoted:
    """The owner's ``demote`` of this resource has returned."""

    resource: Resource


@dataclass(frozen=True, slots=True)
class AwaitDrain:
    """From within ``demote``: let no claim in above its mode, tell when the last is gone."""

    resource: Resource


@dataclass(frozen=True, slots=True)
class Glimpse:
    """A task asks the cluster's writer of ``resource``, if there is one, for its glimpse."""

    resource: Resource
    ticket: int


@dataclass(frozen=True, slots=True)
class GlimpseAll:
    """Many of `Glimpse` at once: few messages (`lockmgr.glimpses`)."""

    asked: tuple[Glimpse, ...]


@dataclass(frozen=True, slots=True)
class Answered:
    """The owner's answer to a glimpse."""

    resource: Resource
    asker: int
    serial: int
    answer: bytes


@dataclass(frozen=True, slots=True)
class AnsweredAll:
    """Many of `Answered` at once."""

    answers: tuple[Answered, ...]


@dataclass(frozen=True, slots=True)
class TimerDue:
    """The time that ``next_timer`` named has come."""


@dataclass(frozen=True, slots=True)
class Deliver:
    """A message from another node."""

    message: Carried


@dataclass(frozen=True, slots=True)
class Close:
    """Give up every lock as soon as no task uses it; `Emptied` follows, each time none is left."""


@dataclass(frozen=True, slots=True)
class ViewChanged:
    """The node goes by another view.

    ``epoch``: the *lock* epoch, that of the view in which the set of active members changed last.
    If it is the one the node has, only ``coordinator`` and ``unreplayed`` may differ. A lower one
    changes nothing. ``members``: the numbers of the active incarnations, sorted, each never used
    again (`lockmgr.mastering.node_number`). ``coordinator``: who collects `Reasserted`; a member.
    ``unreplayed``: departed nodes whose slot the view lists as NEEDS_REPLAY. For a departed node
    that it does not name, nothing is owed: its journal is empty, its lease is over.
    """

    epoch: int
    members: tuple[int, ...]
    coordinator: int
    unreplayed: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Cleared:
    """Membership: these departed nodes may be granted over (`DepartedMayBeGranted`). Said on the
    coordinator it is enough."""

    nodes: frozenset[int]


@dataclass(frozen=True, slots=True)
class JournalsReplayed:
    """The journals of these departed nodes are replayed and stable. Whom to tell: as `Cleared`."""

    nodes: frozenset[int]


@dataclass(frozen=True, slots=True)
class Stalled:
    """This node's owners wait for what may never come, a path to the LUN; or do not any more."""

    stalled: bool


@dataclass(frozen=True, slots=True)
class GatherLocks:
    """Somebody wants to see all locks of the cluster; ``cached``: also what nobody uses."""

    ticket: int
    cached: bool


@dataclass(frozen=True, slots=True)
class StopGathering:
    """Nobody waits for that any more."""

    ticket: int


Event = (
    Acquire
    | Convert
    | Release
    | Withdraw
    | Demoted
    | AwaitDrain
    | Glimpse
    | GlimpseAll
    | Answered
    | AnsweredAll
    | TimerDue
    | Deliver
    | Close
    | ViewChanged
    | Cleared
    | JournalsReplayed
    | Stalled
    | GatherLocks
    | StopGathering
    | RangeEvent
)


# -- effects -----------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Grant:
    """The claim is held in its mode; wake its task."""

    claim: Claim


@dataclass(frozen=True, slots=True)
class Deny:
    """The claim is not granted (a conversion: keeps its old mode); wake its task.

    ``snapshot``: who was in the way; None for Patience.NONE, where nobody reads it. ``deadlock``:
    the cycle in words, if the claim was denied to break one.
    """

    claim: Claim
    snapshot: LockSnapshot | None
    deadlock: str | None = None


@dataclass(frozen=True, slots=True)
class Demote:
    """Have the owner prepare to keep ``to_mode`` only; answer with `Demoted`."""

    resource: Resource
    to_mode: Mode


@dataclass(frozen=True, slots=True)
class Drained:
    """No claim above the mode of the demotion is left and none is let in (``empty``); or one is
    left that needs another demotion before it can go on, so that this one will be repeated.
    """

    resource: Resource
    empty: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """Have the owner glimpse; answer with `Answered`."""

    resource: Resource
    asker: int
    serial: int


@dataclass(frozen=True, slots=True)
class Glimpsed:
    """The answer to a `Glimpse`; None: nobody holds PW or EX."""

    ticket: int
    answer: bytes | None


@dataclass(frozen=True, slots=True)
class Send:
    """Send ``message`` to another node."""

    to: int
    message: Carried


@dataclass(frozen=True, slots=True)
class EpochRefused:
    """A message of an earlier epoch arrived; it changed nothing."""

    message: Carried


@dataclass(frozen=True, slots=True)
class Emptied:
    """After `Close`: the node holds and awaits nothing."""


@dataclass(frozen=True, slots=True)
class Thawed:
    """The locks of this epoch are recovered (membership: `LocksThawed`)."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Unresponsive:
    """Others wait for what ``node`` has, and it says nothing about it (`lockmgr.unanswered`): it is
    to be evicted. It may be this node itself."""

    node: int
    resource: bytes
    """The name of one that others want."""
    held: Mode
    silent_s: float

    def words(self, resource: str = "") -> str:
        """For people, who may know the resource by another name."""
        return (
            f"it holds {self.held} of {resource or repr(self.resource)}, which others want, and "
            f"has not said for {self.silent_s:g} s that it works on it"
        )


@dataclass(frozen=True, slots=True)
class Gathered:
    """All members have told: `LockCore.gathered`."""

    ticket: int


Effect = (
    Grant
    | Deny
    | Demote
    | Drained
    | Answer
    | Glimpsed
    | Send
    | EpochRefused
    | Emptied
    | Thawed
    | Gathered
    | Unresponsive
    | RangeDone
    | RangeFound
)
