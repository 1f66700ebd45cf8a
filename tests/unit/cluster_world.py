"""A tiny synchronous world for timelines: one LUN, a perfect network with cuts, some hosts.

Nothing is random. I/O takes `IO_S`, a fence `FENCE_S`, a message `NETWORK_S`. A host whose SAN is
cut gets `Unknown` and `PathLost` after 2 s. A frozen host's inputs queue up; what the target has
admitted goes on. Locks thaw, and journals are replayed, `RECOVERY_S` after they are asked for.

What must always hold is asserted where it would break: see the "holds:" comments.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random

from lockmgr.cluster.blocks import Heartbeat, Identity, JoinRequest
from lockmgr.cluster.effects import (
    Beat,
    CloseSessions,
    DepartedMayBeGranted,
    DropNewcomer,
    Effect,
    Fence,
    IoEffect,
    Knock,
    LeaseUntil,
    OpenNewcomer,
    OpenPaths,
    ReadBlocks,
    ReplayWanted,
    Reserve,
    SendTo,
    Stop,
    Survey,
    Take,
    Unregister,
    ViewInstalled,
    WriteHeartbeat,
    WriteJoin,
    WriteView,
)
from lockmgr.cluster.events import (
    BeatHeard,
    Done,
    Event,
    LocksThawed,
    PathBack,
    PathLost,
    Received,
    Replayed,
    Start,
    Tick,
)
from lockmgr.cluster.member import Member
from lockmgr.cluster.messages import Message
from lockmgr.cluster.outcomes import (
    Blocks,
    Good,
    Knocked,
    Lost,
    NobodyHolds,
    Opened,
    Outcome,
    Refused,
    Surveyed,
    Unknown,
    Value,
    Why,
    Won,
)
from lockmgr.cluster.settings import Settings
from lockmgr.cluster.view import NEWCOMER_SLOT, NodeId, View

IO_S = 0.004
FENCE_S = 0.05
NETWORK_S = 0.001
LOSS_S = 2.0
RECOVERY_S = 0.1
BEGIN_S = 1000.0
"""When the world begins; clocks are not at zero when a daemon starts."""


class WorldKeys:
    """slot 8 | incarnation 24 | generation 16; newcomers: slot 255 and 40 bits."""

    def owner(self, key: int) -> NodeId | None:
        slot = key >> 40
        return None if slot == NEWCOMER_SLOT else NodeId(slot, key >> 16 & 0xFFFFFF)

    def is_newcomer(self, key: int) -> bool:
        return key >> 40 == NEWCOMER_SLOT

    def newcomer(self, random_bits: int) -> int:
        return NEWCOMER_SLOT << 40 | random_bits & 0xFFFFFFFFFF

    def path(self, node: NodeId, generation: int) -> int:
        return node.slot << 40 | node.incarnation << 16 | generation


KEYS = WorldKeys()


@dataclass(eq=False, slots=True)
class Session:
    key: int
    alive: bool = True
    epoch: int = 0
    """Of the view when it registered; who registers later reads that view or a newer one."""
    told: bool = False
    """The unit attention about the PREEMPT was fetched."""


@dataclass(slots=True)
class Lun:
    """Reservations and blocks."""

    view: View
    holder: Session | None = None
    registered: list[Session] = field(default_factory=list)
    generation: int = 0
    heartbeats: dict[int, Heartbeat] = field(default_factory=dict)
    joins: dict[int, JoinRequest] = field(default_factory=dict)
    late: list[Callable[[], None]] = field(default_factory=list)
    """Writes that are admitted and have not landed."""

    @property
    def holder_key(self) -> int:
        return self.holder.key if self.holder else 0

    def drain(self) -> None:
        late, self.late = self.late, []
        for land in late:
            land()

    def preempt(self, by: Session, key: int) -> bool:
        victims = [session for session in self.registered if session.key == key and session != by]
        for victim in victims:
            self.registered.remove(victim)
            if self.holder is victim:
                self.holder = by
        self.generation += bool(victims)
        return bool(victims)

    def restart(self) -> None:
        """The target forgets who registered."""
        self.holder, self.generation = None, 0
        for session in self.registered:
            session.alive = False
        self.registered.clear()


class Host:
    """One daemon."""

    def __init__(self, world: World, name: str, number: int, life: int) -> None:
        self.world = world
        self.name = name
        identity = Identity(
            name, bytes([number] * 16), bytes(16), bytes([number, life] * 16), (f"{name}:7000",)
        )
        self.member = Member(identity, world.settings, KEYS, Random(number * 100 + life))
        self.newcomer: Session | None = None
        self.control: Session | None = None
        self.data: Session | None = None
        self.generation = 0
        self.frozen = False
        self.dead = False
        self.inbox: list[Event] = []
        self.log: list[tuple[float, Effect]] = []
        self.epoch_of_locks = -1
        self.outstanding: dict[int, IoEffect] = {}
        self.unanswered: set[int] = set()
        """Ops whose session broke: their answer is `Unknown`, whatever the target says."""
        self.hold_view = False
        """The next view write is admitted, and lands when somebody drains the target."""

    # -- what tests ask ------------------------------------------------------------------------
    @property
    def node(self) -> NodeId:
        assert self.member.node is not None
        return self.member.node

    @property
    def stopped(self) -> Stop | None:
        return self.member.stopped

    @property
    def epoch(self) -> int:
        return self.member.view.epoch if self.member.view else 0

    def when(self, kind: type[Effect], node: NodeId | None = None) -> list[float]:
        """Seconds since the world began at which such an effect came."""
        return [
            round(t - BEGIN_S, 3)
            for t, effect in self.log
            if isinstance(effect, kind) and (node is None or getattr(effect, "node", None) == node)
        ]

    # -- what happens to it ----------------------------------------------------------------------
    def give(self, event: Event) -> None:
        if self.dead:
            return
        if self.frozen:
            if not isinstance(event, Tick):
                self.inbox.append(event)
            return
        if isinstance(event, Done):
            if event.op not in self.outstanding:
                return  # its session broke, which was said already
            del self.outstanding[event.op]
        effects = self.member.step(event, self.world.now)
        self.member.check()
        for effect in effects:
            self.world.carry_out(self, effect)
        self.world.set_tick(self)

    def sessions(self) -> list[Session]:
        return [s for s in (self.newcomer, self.control, self.data) if s is not None]

    def drop_paths(self) -> None:
        for session in (self.control, self.data):
            if session is not None:
                session.alive = False
        self.control = self.data = None


class World:
    """See the module's docstring."""

    def __init__(self, slots: int = 8, settings: Settings | None = None) -> None:
        self.now = BEGIN_S
        self.settings = settings or Settings()
        self.lun = Lun(View.empty(slots))
        self.hosts: list[Host] = []
        self.cuts: set[tuple[str, str]] = set()
        self.san_cuts: set[str] = set()
        self.gone_since: dict[NodeId, int] = {}
        """The first epoch that does not list a node which was listed."""
        self.replays = True
        """Whether journals of the departed are replayed when they are asked for."""
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._numbers: dict[str, int] = {}
        self._lives: dict[str, int] = {}

    # -- running -------------------------------------------------------------------------------
    @property
    def t(self) -> float:
        return self.now - BEGIN_S

    def at(self, when: float, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._heap, (when, self._count, action))

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self._heap and self._heap[0][0] <= until:
            self.now, _, action = heapq.heappop(self._heap)
            action()
        self.now = until

    def run_until(self, condition: Callable[[], bool], within: float) -> float:
        """Run until it holds; how long that took."""
        begin, until = self.now, self.now + within
        while not condition():
            assert self._heap and self._heap[0][0] <= until, (
                f"not within {within} s\n{self.story()}"
            )
            self.now, _, action = heapq.heappop(self._heap)
            action()
        return self.now - begin

    def set_tick(self, host: Host) -> None:
        due = host.member.next_timer()
        if due is not None:
            self.at(max(due, self.now), lambda: self._tick(host, due))

    def _tick(self, host: Host, due: float) -> None:
        if host.member.next_timer() == due:
            host.give(Tick())

    def story(self) -> str:
        lines = [
            f"{t - BEGIN_S:9.3f} {host.name}: {effect}"
            for host in self.hosts
            for t, effect in host.log
            if not isinstance(effect, LeaseUntil)
        ]
        return "\n".join([*sorted(lines)[-60:], f"LUN: {self.lun.view}"])

    # -- what tests do -------------------------------------------------------------------------
    def host(self, name: str) -> Host:
        """A new daemon on the host with that name; it starts at once."""
        number = self._numbers.setdefault(name, len(self._numbers) + 1)
        life = self._lives[name] = self._lives.get(name, 0) + 1
        host = Host(self, name, number, life)
        self.hosts.append(host)
        host.give(Start())
        return host

    def cluster(self, count: int) -> list[Host]:
        """So many hosts, all active, the first the coordinator, in slots 0, 1, 2 ..."""
        hosts: list[Host] = []
        for n in range(count):
            host = self.host(f"host{n}")
            hosts.append(host)
            self.run_until(
                lambda: all(len(h.member.view.active) == len(hosts) if h.member.view else False
                            for h in hosts), 30)  # fmt: skip
        self.run(2.0)
        return hosts

    def cut(self, *pairs: tuple[Host, Host]) -> None:
        """Both ways."""
        for a, b in pairs:
            self.cuts |= {(a.name, b.name), (b.name, a.name)}

    def isolate(self, host: Host) -> None:
        self.cut(*((host, other) for other in self.hosts if other is not host))

    def cut_san(self, host: Host) -> None:
        self.san_cuts.add(host.name)
        self.at(self.now + LOSS_S, lambda: self._path_lost(host))

    def _path_lost(self, host: Host) -> None:
        if host.name in self.san_cuts:
            keys = tuple(s.key for s in (host.control, host.data) if s is not None)
            host.drop_paths()
            host.give(PathLost(keys))

    def break_session(self, host: Host) -> None:
        """The host's sessions close now: what is on its way lands, its answers do not come."""
        keys = tuple(s.key for s in (host.control, host.data) if s is not None)
        self.at(self.now + IO_S * 0.6, host.drop_paths)
        for op in tuple(host.outstanding):
            host.unanswered.add(op)
            self.at(self.now + IO_S * 0.7, partial(host.give, Done(op, Unknown())))
        self.at(self.now + IO_S * 0.8, partial(host.give, PathLost(keys)))

    def _give_up(self, host: Host, op: int) -> None:
        if op in host.outstanding and not host.dead:
            self.break_session(host)

    def heal_san(self, host: Host) -> None:
        self.san_cuts.discard(host.name)
        host.give(PathBack())

    def kill(self, host: Host) -> None:
        host.dead = True
        for session in host.sessions():
            session.alive = False

    def freeze(self, host: Host) -> None:
        host.frozen = True

    def thaw(self, host: Host) -> None:
        host.frozen = False
        inbox, host.inbox = host.inbox, []
        for event in inbox:
            host.give(event)
        host.give(Tick())

    def restart_target(self) -> None:
        self.lun.restart()
        for host in self.hosts:
            host.newcomer = None
            if host.control is not None:
                keys = tuple(s.key for s in (host.control, host.data) if s is not None)
                host.drop_paths()
                host.give(PathLost(keys))

    # -- effects -------------------------------------------------------------------------------
    def carry_out(self, host: Host, effect: Effect) -> None:
        match effect:
            case SendTo(peer, message):
                self._send(host, peer, message)
                return
            case Beat(beat):
                self._beat(host, beat)
                return
        host.log.append((self.now, effect))
        match effect:
            case ViewInstalled():
                self._installed(host, effect)
            case ReplayWanted(node):
                if self.replays or node == host.member.node:
                    self.at(self.now + RECOVERY_S, lambda: host.give(Replayed(node)))
            case DepartedMayBeGranted(node):
                self._may_be_granted(node)
            case CloseSessions() | Stop():
                for session in host.sessions():
                    session.alive = False
                host.newcomer = host.control = host.data = None
            case LeaseUntil():
                pass
            case _:
                host.outstanding[effect.op] = effect
                self._io(host, effect)

    def _installed(self, host: Host, effect: ViewInstalled) -> None:
        view = effect.view
        # holds: who is not listed is fenced before anybody goes by the view; it may register again,
        # and then reads that it is not listed
        for session in self.lun.registered:
            owner = KEYS.owner(session.key)
            gone = self.gone_since.get(owner, view.epoch + 1) if owner else view.epoch + 1
            assert gone > view.epoch or session.epoch >= gone, self.story()
        if view.lock_epoch != host.epoch_of_locks and host.node in view.active:
            host.epoch_of_locks = view.lock_epoch
            epoch = view.lock_epoch
            self.at(self.now + RECOVERY_S, lambda: host.give(LocksThawed(epoch)))

    def _may_be_granted(self, node: NodeId) -> None:
        for other in self.hosts:
            if other.member.node == node and not other.dead and other.stopped is None:
                # holds: nothing is granted while the departed may use its caches
                assert other.member.lease_until < self.now, self.story()

    def _send(self, host: Host, peer: NodeId, message: Message) -> None:
        for other in self.hosts:
            is_peer = (
                other.newcomer is not None and other.newcomer.key == peer.incarnation
                if peer.slot == NEWCOMER_SLOT
                else other.member.node == peer
            )
            sender = host.member.node
            if is_peer and sender is not None and (host.name, other.name) not in self.cuts:
                self.at(self.now + NETWORK_S, partial(other.give, Received(sender, message)))

    def _beat(self, host: Host, beat: Heartbeat) -> None:
        for other in self.hosts:
            if other is not host and (host.name, other.name) not in self.cuts:
                self.at(self.now + NETWORK_S, partial(other.give, BeatHeard(beat)))

    # -- I/O -----------------------------------------------------------------------------------
    def _io(self, host: Host, effect: IoEffect) -> None:
        seconds = FENCE_S if isinstance(effect, Fence) else IO_S

        session = host.control or host.newcomer

        def land() -> None:
            outcome = self._do(host, session, effect)
            if outcome is not None and effect.op not in host.unanswered:
                self.at(self.now + seconds / 2, lambda: host.give(Done(effect.op, outcome)))

        if host.name in self.san_cuts and not isinstance(effect, Knock):
            answer = Done(effect.op, Unknown())
            self.at(self.now + LOSS_S, lambda: host.give(answer))
        else:
            self.at(self.now + seconds / 2, land)

    def _do(self, host: Host, session: Session | None, effect: IoEffect) -> Outcome | None:
        """At the target; None: no answer for now."""
        if host.dead:
            return None
        match effect:
            case OpenNewcomer(_, key):
                host.newcomer = self._register(key)
                return Good(Opened(key, self._survey()))
            case OpenPaths(_, slot, incarnation):
                return self._open_paths(host, NodeId(slot, incarnation))
            case DropNewcomer():
                temporary, host.newcomer = host.newcomer, None
                if temporary is not None and temporary is not self.lun.holder:
                    self._unregister(temporary)
                return Good()
            case Unregister(_, keep):
                for own in (host.data, host.control):
                    if own is not None and own.key != keep:
                        self._unregister(own)
                return Good()
            case Knock(_, nodes):
                return Good(Knocked(frozenset(self._who_answers(host, nodes))))
        if session is None or not session.alive:
            return Unknown()
        refusal = self._admit(session)
        if refusal is not None:
            return refusal
        if isinstance(effect, WriteView) and host.hold_view:
            host.hold_view = False
            view = effect.view
            self.lun.late.append(lambda: self._write_view(view))
            self.at(self.now + LOSS_S, lambda: self._give_up(host, effect.op))
            return None
        return Good(self._command(host, session, effect))

    def _admit(self, session: Session) -> Refused | None:
        if session in self.lun.registered:
            return None
        if not session.told:
            session.told = True
            return Refused(Why.PREEMPTED)
        return Refused(Why.CONFLICT)

    def _register(self, key: int) -> Session:
        # holds: a key is registered once, ever
        assert all(session.key != key for session in self.lun.registered)
        session = Session(key, epoch=self.lun.view.epoch)
        self.lun.registered.append(session)
        self.lun.generation += 1
        return session

    def _unregister(self, session: Session) -> None:
        session.alive = False
        assert session is not self.lun.holder, "the holder's key is never unregistered"
        if session in self.lun.registered:
            self.lun.registered.remove(session)
            self.lun.generation += 1

    def _survey(self) -> Surveyed:
        keys = tuple(session.key for session in self.lun.registered)
        return Surveyed(self.lun.view, self.lun.holder_key, keys, self.lun.generation)

    def _open_paths(self, host: Host, node: NodeId) -> Outcome:
        host.drop_paths()
        host.generation += 2
        host.control = self._register(KEYS.path(node, host.generation - 1))
        host.data = self._register(KEYS.path(node, host.generation))
        return Good(Opened(host.control.key, self._survey()))

    def _who_answers(self, host: Host, nodes: tuple[NodeId, ...]) -> list[NodeId]:
        return [
            other.node
            for other in self.hosts
            if other.member.node in nodes
            and not (other.dead or other.frozen or other.stopped)
            and (host.name, other.name) not in self.cuts
        ]

    def _command(self, host: Host, session: Session, effect: IoEffect) -> Value:
        lun = self.lun
        match effect:
            case Survey():
                return self._survey()
            case ReadBlocks():
                return Blocks(tuple(lun.heartbeats.values()), tuple(lun.joins.values()))
            case WriteHeartbeat(_, beat):
                # holds: only listed nodes write, and only under a reservation
                assert lun.holder is not None and host.control is session
                lun.heartbeats[beat.slot] = beat
            case WriteJoin(_, request):
                lun.joins[request.slot] = request
            case WriteView(_, view):
                assert lun.holder is session, "who does not hold does not write the view"
                self._write_view(view)
            case Take(_, key):
                lun.preempt(session, key)
                return self._who_holds(session)
            case Reserve():
                lun.holder = lun.holder or session
                return self._who_holds(session)
            case Fence(_, keys, nodes):
                assert lun.holder is session, "only the holder fences"
                self._fence(session, keys, nodes)
        return None

    def _who_holds(self, session: Session) -> Won | Lost | NobodyHolds:
        if self.lun.holder is session:
            return Won()
        return Lost(self.lun.holder_key) if self.lun.holder else NobodyHolds()

    def _write_view(self, view: View) -> None:
        # holds: epochs never repeat, none is left out
        assert view.epoch == self.lun.view.epoch + 1, (view.epoch, self.lun.view.epoch)
        for node in self.lun.view.listed:
            if not view.lists(*node):
                self.gone_since[node] = view.epoch
        self.lun.view = view

    def _fence(self, by: Session, keys: tuple[int, ...], nodes: tuple[NodeId, ...]) -> None:
        for session in list(self.lun.registered):
            if session is not by and (session.key in keys or KEYS.owner(session.key) in nodes):
                session.alive = False
                self.lun.preempt(by, session.key)
        self.lun.drain()
