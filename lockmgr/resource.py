"""The master's side: the state of one resource, as a pure state machine.

Theory. A resource has three queues (Snaman and Thiel 1987): *granted*, what each node holds;
*converting*, nodes that hold one mode and wait for another; *waiting*, nodes that hold nothing
yet. There is at most one lock per node. Time plays no part here: timeouts are the node's.

Who is granted, and when:
- Conversions come before new requests; each queue is first in, first out.
- A new request is granted when nothing waits and its mode is compatible with all that is held.
  NL is granted always.
- A conversion is granted when its mode is compatible with what the *others* hold and no earlier
  conversion waits. It overtakes an earlier one only if it stands in that one's way, that is if
  what it holds is incompatible with what the earlier one wants: to make it wait would be a
  deadlock. (VMS lets every conversion overtake, or none with LCK$M_QUECVT; the first starves,
  the second deadlocks.)
- Lowering is granted always, at once; while the node's conversion waits, it keeps its place.
  A conversion may be granted while its node, which cannot know yet, lowers what it had before:
  the grant prevails, and the node will hold what it grants.

Blocking notifications: a request that has to wait tells each node whose held mode is incompatible
with it, once; a node that is granted something anew while it waits is told again, since what it
was told before concerned what it held before. A request refused for not queueing tells nobody.
When a request is cancelled, those it told learn what is still wanted of them (`Unblocking`).

Debts. ``owed`` names departed nodes, and the strongest mode in which each may have had the
resource. While the journal of one that may have written is not replayed, nothing is granted but NL;
while its lease may not be over, nothing incompatible with that mode (`lockmgr.debts`).

Value block: handed out with each grant, taken when a node lowers from PW or EX and has changed it.
It is forgotten, and so not valid, once nobody holds the resource.

invariants (`check`):
- held modes are compatible pairwise
- a node is in at most one queue; it is in ``converting`` only if it is in ``granted`` too, and in
  ``waiting`` only if it is not
- nothing grantable waits
- every holder that stands in the way of a queued request has been told
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lockmgr.debts import Debts
from lockmgr.errors import ProtocolViolation
from lockmgr.messages import (
    NEVER_WRITTEN,
    AskGlimpse,
    Blocking,
    Cancel,
    GlimpseAnswer,
    Granted,
    Lower,
    MasterBound,
    NodeBound,
    Probe,
    Refused,
    Request,
    Resource,
    Unblocking,
)
from lockmgr.modes import COMPATIBLE, COVERS, WRITES_VALUE, Mode, join


@dataclass(slots=True)
class Queued:
    """A request that waits, and the holders that were told so."""

    node: int
    serial: int
    mode: Mode
    told: set[int] = field(default_factory=set)


class MasteredResource:
    """One resource at its master. `step` takes a message and returns those it causes, in order."""

    __slots__ = (
        "_debts",
        "_serials",
        "converting",
        "epoch",
        "granted",
        "owed",
        "resource",
        "value",
        "waiting",
    )

    def __init__(self, resource: Resource, epoch: int, debts: Debts | None = None) -> None:
        self.resource = resource
        self.epoch = epoch
        self._debts = debts
        self.owed: dict[int, Mode] = {}
        self.granted: dict[int, Mode] = {}
        self._serials: dict[int, int] = {}
        """Which request of the node was granted last."""
        self.converting: list[Queued] = []
        self.waiting: list[Queued] = []
        self.value = NEVER_WRITTEN

    def granted_serial(self, node: int) -> int:
        """Which request of ``node`` was granted last; 0: none that still counts."""
        return self._serials.get(node, 0)

    @property
    def empty(self) -> bool:
        """Nobody holds or awaits it, nothing is owed: the master may forget it."""
        return not self.granted and not self.waiting and not self.owed

    def step(self, message: MasterBound) -> list[NodeBound]:
        """Carry out one message of a node. Raises `ProtocolViolation` for impossible ones."""
        out: list[NodeBound] = []
        _HANDLERS[type(message)](self, message, out)
        return out

    # -- recovery --------------------------------------------------------------------------
    def restore(self, node: int, mode: Mode, serial: int) -> None:
        """``node`` holds ``mode``, by its own word; ``serial`` is the last grant it has seen."""
        self.granted[node] = mode
        self._serials[node] = serial

    def enqueue(self, node: int, serial: int, mode: Mode) -> None:
        """``node`` has waited for ``mode`` before; called in the order of age, holders first."""
        queue = self.converting if node in self.granted else self.waiting
        queue.append(Queued(node, serial, mode))

    def resume(self) -> list[NodeBound]:
        """Grant and tell what became possible without a message: a thaw, or a debt is settled."""
        if self.owed and self._debts is not None:
            self.owed = self._debts.unsettled(self.owed)
        out: list[NodeBound] = []
        self._serve(out)
        self._tell(out)
        return out

    # -- messages --------------------------------------------------------------------------
    def _request(self, message: Request, out: list[NodeBound]) -> None:
        node = message.node
        if any(queued.node == node for queued in (*self.converting, *self.waiting)):
            raise ProtocolViolation(f"node {node} asks again while it waits: {message}")
        queued = Queued(node, message.serial, message.mode)
        held = self.granted.get(node)
        if (held is not None and COVERS[held][queued.mode]) or queued.mode is Mode.NL:
            self._grant(queued, out)
            self._serve(out)
            self._tell(out)
            return
        queue = self.waiting if held is None else self.converting
        queue.append(queued)
        self._serve(out)
        if not message.queue and queued in queue:
            queue.remove(queued)
            out.append(Refused(self.resource, self.epoch, node, queued.serial))
        self._tell(out)

    def _cancel(self, message: Cancel, out: list[NodeBound]) -> None:
        for queue in (self.converting, self.waiting):
            for queued in queue:
                if (queued.node, queued.serial) == (message.node, message.serial):
                    queue.remove(queued)
                    out.append(Refused(self.resource, self.epoch, message.node, message.serial))
                    self._untell(queued, out)
                    self._serve(out)
                    self._tell(out)
                    return

    def _lower(self, message: Lower, out: list[NodeBound]) -> None:
        held = self.granted.get(message.node)
        crossed = message.mode is not None and message.grant != self.granted_serial(message.node)
        fits = message.mode is None or crossed or (held is not None and COVERS[held][message.mode])
        if held is None or not fits:
            raise ProtocolViolation(f"node {message.node} holds {held}, cannot {message}")
        if message.value is not None:
            newer = message.value.sequence > self.value.sequence
            if not WRITES_VALUE[held] or not (newer or message.value == self.value):
                raise ProtocolViolation(f"value block {self.value} under {held}: {message}")
            self.value = message.value
        if crossed:
            return
        if message.mode is None:
            if any(queued.node == message.node for queued in self.converting):
                raise ProtocolViolation(f"node {message.node} releases what it converts: {message}")
            del self.granted[message.node]
            del self._serials[message.node]
            self._forget_told(message.node)
        else:
            self.granted[message.node] = message.mode
        self._serve(out)
        self._tell(out)

    def _glimpse(self, message: AskGlimpse, out: list[NodeBound]) -> None:
        for node, mode in self.granted.items():
            if WRITES_VALUE[mode]:
                out.append(Probe(self.resource, self.epoch, node, message.node, message.serial))
                return
        out.append(GlimpseAnswer(self.resource, self.epoch, message.node, message.serial, None))

    # -- granting --------------------------------------------------------------------------
    def _fits(self, queued: Queued) -> bool:
        compatible = COMPATIBLE[queued.mode]
        if self.owed and self._debts is not None and not self._debts.let(queued.mode, self.owed):
            return False
        return all(compatible[mode] for node, mode in self.granted.items() if node != queued.node)

    def _convertible(self, position: int) -> bool:
        queued = self.converting[position]
        if not self._fits(queued):
            return False
        held = COMPATIBLE[self.granted[queued.node]]
        earlier = self.converting[:position]
        return not earlier or any(not held[other.mode] for other in earlier)

    def _next_conversion(self) -> Queued | None:
        for position, queued in enumerate(self.converting):
            if self._convertible(position):
                return queued
        return None

    def _serve(self, out: list[NodeBound]) -> None:
        while (queued := self._next_conversion()) is not None:
            self.converting.remove(queued)
            self._grant(queued, out)
        while not self.converting and self.waiting and self._fits(self.waiting[0]):
            self._grant(self.waiting.pop(0), out)

    def _grant(self, queued: Queued, out: list[NodeBound]) -> None:
        self.granted[queued.node] = queued.mode
        self._serials[queued.node] = queued.serial
        self._forget_told(queued.node)
        out.append(
            Granted(self.resource, self.epoch, queued.node, queued.serial, queued.mode, self.value)
        )

    # -- blocking notifications ------------------------------------------------------------
    def in_the_way(self, queued: Queued) -> list[int]:
        """Nodes that hold what excludes ``queued``."""
        compatible = COMPATIBLE[queued.mode]
        return [
            node
            for node, mode in self.granted.items()
            if node != queued.node and not compatible[mode]
        ]

    def waits_for(self, node: int) -> bool:
        """Does a queued request wait for what ``node`` holds?"""
        return any(node in self.in_the_way(queued) for queued in (*self.converting, *self.waiting))

    def _tell(self, out: list[NodeBound]) -> None:
        for queued in (*self.converting, *self.waiting):
            for node in self.in_the_way(queued):
                if node not in queued.told:
                    queued.told.add(node)
                    out.append(Blocking(self.resource, self.epoch, node, queued.mode))

    def _untell(self, gone: Queued, out: list[NodeBound]) -> None:
        for node in sorted(gone.told):
            left = Mode.NL
            for queued in (*self.converting, *self.waiting):
                if node in queued.told:
                    left = join(left, queued.mode)
            if not COVERS[left][gone.mode]:
                out.append(Unblocking(self.resource, self.epoch, node, left))

    def _forget_told(self, node: int) -> None:
        for queued in (*self.converting, *self.waiting):
            queued.told.discard(node)

    def check(self) -> None:
        """Assert the invariants at the top of this module."""
        holders = list(self.granted.items())
        for position, (node, mode) in enumerate(holders):
            for other, other_mode in holders[:position]:
                assert COMPATIBLE[mode][other_mode], (self.resource, node, mode, other, other_mode)
        queued_nodes = [queued.node for queued in (*self.converting, *self.waiting)]
        assert len(set(queued_nodes)) == len(queued_nodes), queued_nodes
        assert all(queued.node in self.granted for queued in self.converting)
        assert all(queued.node not in self.granted for queued in self.waiting)
        assert self._next_conversion() is None
        assert self.converting or not self.waiting or not self._fits(self.waiting[0])
        for queued in (*self.converting, *self.waiting):
            assert queued.told.issuperset(self.in_the_way(queued)), queued


_HANDLERS: dict[type, Callable[..., None]] = {
    Request: MasteredResource._request,
    Cancel: MasteredResource._cancel,
    Lower: MasteredResource._lower,
    AskGlimpse: MasteredResource._glimpse,
}


class Master:
    """All resources that one node masters. Forgets those that nobody holds, awaits or owes."""

    __slots__ = ("debts", "epoch", "resources")

    def __init__(self, epoch: int, debts: Debts | None = None) -> None:
        self.epoch = epoch
        self.debts = Debts() if debts is None else debts
        self.resources: dict[bytes, MasteredResource] = {}

    def step(self, message: MasterBound) -> list[NodeBound]:
        """Carry out one message of a node. Raises `ProtocolViolation` for impossible ones."""
        name = message.resource.name
        mastered = self.resources.get(name)
        if mastered is None:
            mastered = MasteredResource(message.resource, self.epoch, self.debts)
            mastered.owed = self.debts.of_unknown(message.resource)
        out = mastered.step(message)  # may refuse; then nothing new is kept
        if not mastered.empty:
            self.resources[name] = mastered
        elif name in self.resources:
            del self.resources[name]
        return out

    def resume(self) -> list[NodeBound]:
        """Look at every resource again, after a thaw or when debts were settled."""
        out: list[NodeBound] = []
        for name, mastered in list(self.resources.items()):
            if not (mastered.owed or mastered.converting or mastered.waiting):
                continue  # nobody waits here, and somebody holds it
            out += mastered.resume()
            if mastered.empty:
                del self.resources[name]
        return out

    def check(self) -> None:
        """Assert the invariants of each resource."""
        for mastered in self.resources.values():
            mastered.check()
            assert not mastered.empty
