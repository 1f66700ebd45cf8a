"""What nodes and masters say to each other, and the name of what they talk about.

Every message names its resource and carries the epoch of its sender's view; a receiver in another
epoch refuses it. Channels between two nodes are FIFO and lose nothing within an epoch.

    node to master      Request, Cancel, Lower, AskGlimpse
    master to node      Granted, Refused, Blocking, Unblocking, Probe
    node to node        GlimpseAnswer

invariants:
- a node has at most one Request without an answer per resource
- each Request is answered by exactly one Granted or Refused with its serial; a Cancel that comes
  too late changes nothing, and is not answered itself
"""

from __future__ import annotations

from dataclasses import dataclass

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


MasterBound = Request | Cancel | Lower | AskGlimpse
NodeBound = Granted | Refused | Blocking | Unblocking | Probe | GlimpseAnswer
AnyMessage = MasterBound | NodeBound
