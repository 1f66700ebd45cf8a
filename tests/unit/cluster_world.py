"""A tiny synchronous world for timelines: one LUN, a perfect network with cuts, some hosts.

Nothing is random. I/O takes `IO_S`, a fence `FENCE_S`, a message `NETWORK_S`. A host whose SAN is
cut gets `Unknown` and `PathLost` after 2 s. A frozen host's inputs queue up; what the target has
admitted goes on. Locks thaw, and journals are replayed, `RECOVERY_S` after they are asked for.

What must always hold is asserted where it would break: see the "holds:" comments.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from functools import partial

from lockmgr.cluster.blocks import Heartbeat
from lockmgr.cluster.effects import (
    AnyIo,
    Beat,
    CloseSessions,
    DepartedMayBeGranted,
    DropNewcomer,
    Effect,
    Fence,
    Knock,
    LeaseUntil,
    OpenNewcomer,
    OpenPaths,
    PathsReady,
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
    LocksThawed,
    PathBack,
    PathLost,
    PeerConnected,
    PeerLost,
    Received,
    Replayed,
    Start,
    StrangerCame,
    Tick,
)
from lockmgr.cluster.messages import Message
from lockmgr.cluster.outcomes import (
    Blocks,
    Good,
    Knocked,
    Opened,
    Outcome,
    Unknown,
    Value,
)
from lockmgr.cluster.settings import Settings
from lockmgr.cluster.view import NEWCOMER_SLOT, NodeId, View
from tests.unit.cluster_host import BEGIN_S, Host
from tests.unit.cluster_lun import KEYS, Lun, Session

IO_S = 0.004
FENCE_S = 0.05
NETWORK_S = 0.001
LOSS_S = 2.0
RECOVERY_S = 0.1


class World:
    """See the module's docstring."""

    def __init__(self, slots: int = 8, settings: Settings | None = None) -> None:
        self.now = BEGIN_S
        self.settings = settings or Settings()
        self.lun = Lun(View.empty(slots))
        self.hosts: list[Host] = []
        self.cuts: set[tuple[str, str]] = set()
        self.tcp_cuts: set[tuple[str, str]] = set()
        self.san_cuts: set[str] = set()
        self.replays = True
        """Whether journals of the departed are replayed when they are asked for."""
        self.brings_in_order = True
        """Whether who joins brings its own journal in order."""
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
    def host(self, name: str, boot: int = 0) -> Host:
        """A new daemon on the host with that name; it starts at once. ``boot``: its boot id."""
        number = self._numbers.setdefault(name, len(self._numbers) + 1)
        life = self._lives[name] = self._lives.get(name, 0) + 1
        host = Host(self, name, number, life, boot)
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
    def carry_out(self, host: Host, effect: Effect | WriteHeartbeat) -> None:
        match effect:
            case SendTo(peer, message):
                self._send(host, peer, message)
                return
            case Beat(beat):
                self._beat(host, beat)
                write = host.write(effect)
                if write is not None:
                    self.carry_out(host, write)
                return
        host.log.append((self.now, effect))
        match effect:
            case ViewInstalled():
                self._installed(host, effect)
            case ReplayWanted(node):
                if self.brings_in_order if node == host.member.node else self.replays:
                    self.at(self.now + RECOVERY_S, lambda: host.give(Replayed(node)))
            case DepartedMayBeGranted(node):
                self._may_be_granted(node)
            case CloseSessions() | Stop():
                for session in host.sessions():
                    session.alive = False
                host.newcomer = host.control = host.data = None
            case PathsReady(key):
                self._ready(host, key)
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
            gone = self.lun.gone_since.get(owner, view.epoch + 1) if owner else view.epoch + 1
            assert gone > view.epoch or session.epoch >= gone, self.story()
        if view.lock_epoch != host.epoch_of_locks and host.node in view.active:
            host.epoch_of_locks = view.lock_epoch
            epoch = view.lock_epoch
            self.at(self.now + RECOVERY_S, lambda: host.give(LocksThawed(epoch)))

    def _ready(self, host: Host, key: int) -> None:
        # holds: once for each of its paths, while they are open, under a reservation that listed it
        assert host.control is not None and host.control.key == key, self.story()
        assert key not in host.ready, self.story()
        host.ready.append(key)
        # holds: nothing of its earlier paths may come any more
        for session in self.lun.registered:
            if session not in (host.control, host.data):
                assert KEYS.owner(session.key) != host.member.node, self.story()

    def _may_be_granted(self, node: NodeId) -> None:
        for other in self.hosts:
            if other.member.node == node and not other.dead and other.stopped is None:
                # holds: nothing is granted while the departed may use its caches
                assert other.member.lease_until < self.now, self.story()

    def _send(self, host: Host, peer: NodeId, message: Message) -> None:
        host.sent.append((self.now, peer, message))
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
        self._connect(host)
        for other in self.hosts:
            if other is not host and (host.name, other.name) not in self.cuts:
                self.at(self.now + NETWORK_S, partial(other.give, BeatHeard(beat)))

    def _connect(self, host: Host) -> None:
        """With all that it can be connected with; until `cut_connections` that is for good."""
        for other in self.hosts:
            both = {(host.name, other.name), (other.name, host.name)}
            if other is host or other.member.node is None or both & (self.cuts | self.tcp_cuts):
                continue
            for one, another in ((host, other), (other, host)):
                if another.node not in one.connected:
                    one.connected.add(another.node)
                    self.at(self.now + NETWORK_S, partial(one.give, PeerConnected(another.node)))

    def cut_connections(self, *pairs: tuple[Host, Host]) -> None:
        """Datagrams still pass."""
        for a, b in pairs:
            self.tcp_cuts |= {(a.name, b.name), (b.name, a.name)}
            for one, another in ((a, b), (b, a)):
                if another.member.node in one.connected:
                    one.connected.discard(another.node)
                    one.give(PeerLost(another.node))

    # -- I/O -----------------------------------------------------------------------------------
    def _io(self, host: Host, effect: AnyIo) -> None:
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

    def _do(self, host: Host, session: Session | None, effect: AnyIo) -> Outcome | None:
        """At the target; None: no answer for now."""
        if host.dead:
            return None
        match effect:
            case OpenNewcomer(_, key):
                host.newcomer = self.lun.register(key)
                return Good(Opened(key, self.lun.survey()))
            case OpenPaths(_, slot, incarnation):
                return self._open_paths(host, NodeId(slot, incarnation))
            case DropNewcomer():
                temporary, host.newcomer = host.newcomer, None
                if temporary is not None and temporary is not self.lun.holder:
                    self.lun.unregister(temporary)
                return Good()
            case Unregister(_, keep):
                for own in (host.data, host.control):
                    if own is not None and own.key != keep:
                        self.lun.unregister(own)
                return Good()
            case Knock(_, nodes):
                answered = frozenset(self._who_answers(host, nodes))
                for other in self.hosts:
                    if other.member.node in answered:
                        self.at(self.now + NETWORK_S, partial(other.give, StrangerCame()))
                return Good(Knocked(answered))
        if session is None or not session.alive:
            return Unknown()
        refusal = self.lun.admit(session)
        if refusal is not None:
            return refusal
        if isinstance(effect, WriteView) and host.hold_view:
            host.hold_view = False
            view = effect.view
            self.lun.late.append(lambda: self.lun.write_view(view))
            self.at(self.now + LOSS_S, lambda: self._give_up(host, effect.op))
            return None
        return Good(self._command(host, session, effect))

    def _open_paths(self, host: Host, node: NodeId) -> Outcome:
        if host.control is not None:
            keys = tuple(s.key for s in (host.control, host.data) if s is not None)
            host.drop_paths()
            host.give(PathLost(keys))
        return self.open_without_a_word(host, node)

    def open_without_a_word(self, host: Host, node: NodeId) -> Outcome:
        """New paths at the target; nobody is told of what became of those before."""
        host.generation += 2
        host.control = self.lun.register(KEYS.path(node, host.generation - 1))
        host.data = self.lun.register(KEYS.path(node, host.generation))
        return Good(Opened(host.control.key, self.lun.survey()))

    def _who_answers(self, host: Host, nodes: tuple[NodeId, ...]) -> list[NodeId]:
        return [
            other.node
            for other in self.hosts
            if other.member.node in nodes
            and not (other.dead or other.frozen or other.stopped)
            and (host.name, other.name) not in self.cuts
        ]

    def _command(self, host: Host, session: Session, effect: AnyIo) -> Value:
        lun = self.lun
        match effect:
            case Survey():
                return self.lun.survey()
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
                self.lun.write_view(view)
            case Take(_, key):
                lun.preempt(session, key)
                return self.lun.who_holds(session)
            case Reserve():
                lun.holder = lun.holder or session
                return self.lun.who_holds(session)
            case Fence(_, keys, nodes):
                assert lun.holder is session, "only the holder fences"
                self.lun.fence(session, keys, nodes)
        return None
