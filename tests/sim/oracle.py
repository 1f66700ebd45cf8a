"""What must be true of the whole, whoever is dead, frozen or cut off: DESIGN section 11.

It sees what no node sees: the LUN, every core, who is alive. `Violation` ends the run. The cheap
part is asked about what changed, after each step; `Oracle.check_all` about everything, now and
then.

    1  one holder; only it changes the view (a write that was admitted while its session held may
       land later); epochs never repeat (`view_lands`, `lands`)
    2  no command of an evicted incarnation or a fenced path changes the LUN after its fence, nor
       one of a node's earlier paths once its new ones are ready (`lands`); nothing is sent over
       paths that are not (`flows`); nothing is answered to a guest after what its node held may be
       granted (`answers`)
    3  no two live nodes hold incompatible locks (`holds`); nothing is granted over an unreplayed
       journal (`granted`)
    4  what was acknowledged is read back; nobody reads what was not written, or an older value
       than one already read (`reads`)
    6  every request of a guest gets one answer: a second one is an error of `world.Process`, and a
       claim that nobody answers is found when all is calm (`Cluster.unsettled`)

5, what a crash in the middle of writes leaves, needs real blocks: tests/unit/test_crash_volume.py
and tests/whole.

Of section 4: a daemon whose event loop does not come round is silent after a second (`beats`), a
lease runs from no later than when its renewal was confirmed (`renews`), and without a lease nothing
is answered (`answers`).

Which hosts count for 3: those whose process lives (frozen ones too), until it has been declared
that what they held may be granted. At that moment their lease must have run out on their own
clock, or they must be dead (`may_be_granted`); and none may renew it later (`renews`).
"""

from __future__ import annotations

from typing import Any, Protocol

from lockmgr.cluster.view import NodeId, View
from lockmgr.modes import COMPATIBLE, Mode
from redirector.block.arbiter import Op
from redirector.block.keys import PathKey
from tests.sim.content import NOTHING_WRITTEN, Content, Stamp
from tests.sim.lun import Command, SimLun
from tests.sim.world import ROUNDING_S, World

SILENT_AFTER_S = 1.0
NOBODY = NodeId(0, 0)

_IN_ORDER = ("JOINING", "ACTIVE")
"""Who joins may have moved into a dead node's slot; it replays that one's journal as its own."""


class Violation(AssertionError):
    """An invariant does not hold."""


class Holder(Protocol):
    """A daemon, as far as the oracle asks."""

    name: str

    @property
    def node(self) -> NodeId | None: ...
    @property
    def serves(self) -> bool:
        """Its process lives, and has not given itself up."""

    @property
    def lease_left_s(self) -> float:
        """Of its own clock; negative: it has run out."""

    @property
    def lease_began_at(self) -> float:
        """When what it takes for the last renewal was sent, in seconds of the world."""

    @property
    def away_s(self) -> float:
        """How long its event loop has not come round."""

    @property
    def has_left(self) -> bool:
        """It has given up every lock, and wants none any more."""


class Oracle:
    """See the module's docstring."""

    def __init__(self, world: World, lun: SimLun, content: Content) -> None:
        self.world = world
        self.lun = lun
        self.content = content
        self.fenced: set[int] = set()
        self.ready: dict[NodeId, int] = {}
        """By incarnation, the generation of the control session that was ready last."""
        self.grantable: dict[NodeId, float] = {}
        self.renewable: dict[NodeId, float] = {}
        """When a heartbeat of it landed, or a lease was given to it, last."""
        self.held: dict[bytes, dict[str, tuple[Holder, Mode]]] = {}
        self.floors: dict[bytes, Stamp] = {}
        """What was acknowledged or read last of each block: nobody reads less from now on."""
        self.written: dict[bytes, set[Stamp]] = {}
        self.acknowledged = 0
        self.answered = 0
        self.grants = 0
        self.views: dict[int, View] = {view.epoch: view for view in content.views}
        self.states: dict[tuple[str, str], int] = {}
        """Transitions of slots that views made, counted."""
        self._value = 0
        self._newest = content.view
        lun.on_landing = self.lands

    def fail(self, what: str) -> None:
        """Raise `Violation`."""
        self.world.trace("oracle", what)
        raise Violation(f"at {self.world.now:.4f}: {what}")

    # -- 1 ---------------------------------------------------------------------------------
    def view_lands(self, view: View, key: int) -> None:
        """A view is being written by the nexus with that key."""
        if view.epoch in self.views:
            self.fail(f"epoch {view.epoch} is written a second time, by {key:#x}")
        newest = self._newest
        if view.epoch != newest.epoch + 1:
            self.fail(f"view {view.epoch} is written after {newest.epoch}, by {key:#x}")
        holder = self.lun.arbiter.read_reservation().key
        if not holder:
            self.fail(f"view {view.epoch} is written by {key:#x} while nobody holds")
        try:
            view.check()
            view.follows(newest)
        except AssertionError as error:
            self.fail(f"view {view.epoch}: {error}")
        for number, (old, new) in enumerate(zip(newest.slots, view.slots, strict=True)):
            if old.state != new.state or old.incarnation != new.incarnation:
                change = (old.state.name, new.state.name)
                self.states[change] = self.states.get(change, 0) + 1
                if new.state.name == "FREE" or (old.state.name, new.state.name) == _IN_ORDER:
                    self._replayed(number)
        self.views[view.epoch] = self._newest = view

    def _replayed(self, slot: int) -> None:
        for name, stamp in self.content.journals.get(slot, {}).items():
            if stamp.version > self.content.home_of(name).version:
                self.fail(f"slot {slot} counts as replayed, and its journal has {name!r} {stamp}")

    # -- 2 ---------------------------------------------------------------------------------
    def fence_done(self, key: int) -> None:
        """Somebody was told that the fence of this key is complete."""
        self.fenced.add(key)

    def paths_ready(self, key: int) -> None:
        """Nothing of the paths before that control session's is on its way, a node believes."""
        path = PathKey.parse(key)
        assert path is not None
        node = NodeId(path.slot, path.incarnation)
        if self.ready.get(node, 0) >= path.generation:
            self.fail(f"{key:#x} is said to be ready again")
        self.ready[node] = path.generation

    def flows(self, key: int, *, ready: bool) -> None:
        """Something is sent over a data path."""
        if not ready:
            self.fail(f"something is sent over {key:#x}, which is not ready")

    def lands(self, command: Command[Any]) -> None:
        """A command is about to do what it does."""
        if command.op is not Op.WRITE:
            return
        key = command.session.key
        if command.is_view and command.holder != key:
            self.fail(f"{command.words} was admitted over {key:#x}, while {command.holder:#x} held")
        path = PathKey.parse(key)
        if path and command.words == "a heartbeat":
            self.renewable[NodeId(path.slot, path.incarnation)] = self.world.now
        if path and path.generation < self.ready.get(NodeId(path.slot, path.incarnation), 0):
            self.fail(f"{command.words} over {key:#x}, while later paths are ready")
        if key in self.fenced or self._owner(key) in self.grantable:
            self.fail(
                f"{command.words} over the fenced path {key:#x}"
                f" ({command.session.process.name}) changes the LUN"
            )

    @staticmethod
    def _owner(key: int) -> NodeId | None:
        path = PathKey.parse(key)
        return None if path is None else NodeId(path.slot, path.incarnation)

    def answers(self, daemon: Holder) -> None:
        """A guest's request is answered."""
        self.answered += 1
        node = daemon.node
        if node in self.grantable:
            self.fail(f"{daemon.name} answers a guest after what it held may be granted")
        if daemon.lease_left_s <= 0:
            self.fail(f"{daemon.name} answers a guest without a lease")

    def may_be_granted(self, node: NodeId, daemon: Holder | None, by: str) -> None:
        """Some member has declared that whatever ``node`` held may be granted to others."""
        if node in self.grantable:
            return
        counts = daemon is not None and daemon.serves and not daemon.has_left
        if daemon is not None and counts and daemon.lease_left_s > 0:
            self.fail(
                f"{by} grants what {daemon.name} held, whose lease runs for"
                f" {daemon.lease_left_s:.3f} s more"
            )
        self.grantable[node] = self.world.now
        for holders in self.held.values():
            for name in [n for n, (other, _) in holders.items() if other.node == node]:
                del holders[name]

    def renews(self, daemon: Holder) -> None:
        """A daemon believes to have a lease."""
        if daemon.node in self.grantable and daemon.lease_left_s > 0 and not daemon.has_left:
            self.fail(f"{daemon.name} renews its lease after what it held may be granted")
        late_s = daemon.lease_began_at - self.renewable.get(daemon.node or NOBODY, 0.0)
        if late_s > ROUNDING_S:
            self.fail(f"{daemon.name} counts its lease from {late_s:.6f} s after it was renewed")

    def gives_lease(self, node: NodeId) -> None:
        """A coordinator answers it."""
        self.renewable[node] = self.world.now

    def beats(self, daemon: Holder) -> None:
        """A heartbeat is sent, or written, by whatever sends them for this daemon."""
        if daemon.away_s >= SILENT_AFTER_S:
            self.fail(f"{daemon.name} shows life, and has been away for {daemon.away_s:.3f} s")

    # -- 3 ---------------------------------------------------------------------------------
    def holds(self, daemon: Holder, name: bytes, mode: Mode | None) -> None:
        """A node's core holds a resource in this mode now."""
        holders = self.held.setdefault(name, {})
        before = holders.get(daemon.name)
        if (before[1] if before else None) == mode:
            return
        if mode is None or mode is Mode.NL or daemon.node in self.grantable:
            holders.pop(daemon.name, None)
            return
        for other, (holder, held) in list(holders.items()):
            if not holder.serves:
                del holders[other]
            elif other != daemon.name and not COMPATIBLE[mode][held]:
                self.fail(f"{daemon.name} holds {name!r} in {mode}, while {other} has {held}")
        holders[daemon.name] = (daemon, mode)

    def granted(self, daemon: Holder, name: bytes, value: bytes | None) -> None:
        """A claim of this node was granted, and this value block came with it (None: not valid)."""
        self.grants += 1
        if daemon.node in self.grantable:
            return  # its core does not know yet; it answers nobody
        home = self.content.home_of(name).version
        node = daemon.node
        for slot, journal in self.content.journals.items():
            record = journal.get(name)
            if record is not None and record.version > home and (not node or slot != node.slot):
                self.fail(
                    f"{daemon.name} is granted {name!r} while the journal of slot {slot} has"
                    f" {record}, and its home {home}"
                )
        if value is not None:
            version = int.from_bytes(value[:8], "little")
            if version < self.floor(name).version:
                self.fail(
                    f"{daemon.name} is granted {name!r} with a valid value block of version"
                    f" {version}, after {self.floor(name)}"
                )

    # -- 4 ---------------------------------------------------------------------------------
    def floor(self, name: bytes) -> Stamp:
        """The least that may be read from now on."""
        return self.floors.get(name, NOTHING_WRITTEN)

    def next_value(self) -> int:
        """A name for a write."""
        self._value += 1
        return self._value

    def writes(self, name: bytes, stamp: Stamp) -> None:
        """A node has begun to write this."""
        self.written.setdefault(name, {NOTHING_WRITTEN}).add(stamp)

    def acknowledges(self, daemon: Holder, name: bytes, stamp: Stamp) -> None:
        """fsync was answered."""
        self.acknowledged += 1
        self.answers(daemon)
        floor = self.floor(name)
        if stamp.version <= floor.version:
            self.fail(f"{daemon.name} acknowledges {name!r} {stamp} after {floor}")
        self.floors[name] = stamp

    def reads(self, daemon: Holder, name: bytes, stamp: Stamp, floor: Stamp, *, kept: bool) -> None:
        """A read that began when the floor was ``floor`` is answered with ``stamp``.

        ``kept``: it is acknowledged, or stands at home; a writer may show its own, younger bytes.
        """
        self.answers(daemon)
        if stamp not in self.written.get(name, {NOTHING_WRITTEN}):
            self.fail(f"{daemon.name} reads {name!r} {stamp}, which nobody wrote")
        if stamp.version < floor.version or (
            stamp.version == floor.version and stamp.value != floor.value
        ):
            self.fail(f"{daemon.name} reads {name!r} {stamp}, after {floor}")
        if kept and stamp.version > self.floor(name).version:
            self.floors[name] = stamp

    # -- everything ------------------------------------------------------------------------
    def check_all(self) -> None:
        """What holds at any time, of everything."""
        self.lun.arbiter.check()
        for name, holders in self.held.items():
            live = [(n, m) for n, (holder, m) in holders.items() if holder.serves]
            for position, (one, mode) in enumerate(live):
                for other, held in live[:position]:
                    if not COMPATIBLE[mode][held]:
                        self.fail(f"{one} holds {name!r} in {mode}, {other} in {held}")
        for name, floor in self.floors.items():
            if not self._is_somewhere(name, floor):
                self.fail(f"{name!r} {floor} was acknowledged or read, and stands nowhere")

    def _is_somewhere(self, name: bytes, floor: Stamp) -> bool:
        if self.content.home_of(name).version >= floor.version:
            return True
        return any(
            journal.get(name, NOTHING_WRITTEN).version >= floor.version
            for journal in self.content.journals.values()
        )
