"""One life of a daemon: a `Member`, a `LockCore`, a toy filesystem, and the shell around them.

The shell is what a real daemon's will be: it carries out effects, answers them, keeps the timer.
What is about locks stands in `tests.sim.locking`, what is about blocks in
`tests.sim.application`, I/O in `tests.sim.paths`.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any, cast

from lockmgr.cluster import effects, events
from lockmgr.cluster.blocks import Heartbeat, Identity
from lockmgr.cluster.member import Member
from lockmgr.cluster.messages import LeaseGiven
from lockmgr.cluster.outcomes import Good, Knocked, Opened, Outcome, Surveyed
from lockmgr.cluster.view import NEWCOMER_SLOT, NodeId, View
from redirector.block.keys import is_newcomer, newcomer_key
from tests.sim.locking import Locking
from tests.sim.network import Endpoint
from tests.sim.paths import Paths, kill_sessions, owner_of
from tests.sim.pulse import ThreadPulse
from tests.sim.target import SimTarget
from tests.sim.words import in_words
from tests.sim.world import ROUNDING_S, Process

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster, Machine


class SimKeys:
    """Reservation keys as membership sees them."""

    def owner(self, key: int) -> NodeId | None:
        return owner_of(key)

    def is_newcomer(self, key: int) -> bool:
        return is_newcomer(key)

    def newcomer(self, random_bits: int) -> int:
        return newcomer_key(Random(random_bits))


class Daemon:
    """A process on a `Machine`."""

    def __init__(self, cluster: Cluster, machine: Machine, life: int) -> None:
        world = cluster.world
        self.cluster = cluster
        self.machine = machine
        self.world = world
        self.host_name = machine.name
        self.name = f"{machine.name}#{life}"
        self.process = Process(world, self.name)
        rng = Random(world.rng.getrandbits(64))
        self.identity = Identity(
            node_name=machine.name,
            machine_id=machine.machine_id,
            boot_id=machine.boot_id,
            fingerprint=self.name.encode().ljust(32, b"\0"),
            addresses=(f"{machine.name}:4242",),
        )
        self.member = Member(self.identity, cluster.settings, SimKeys(), rng)
        target = SimTarget(cluster.lun, self.process, machine.san)
        self.paths = Paths(
            target, cluster.content, cluster.oracle, rng, machine.name, self._path_lost
        )
        self.view: View | None = None
        """The one installed."""
        self.known: View | None = None
        """The newest that was read or installed: whose certificates are accepted."""
        self.node: NodeId | None = None
        self.newcomer_key = 0
        self.listed: frozenset[NodeId] = frozenset()
        """By the view that is known."""
        self.lease_until = 0.0
        self.stopped: effects.Stop | None = None
        self.locking = Locking(self)
        self.pulse = ThreadPulse(self) if rng.random() < 0.5 else None
        """What sends its heartbeats; None: the event loop does."""
        self._timer_at = float("inf")
        self._tick_missed = False
        self._writing = False
        """A heartbeat is on its way to its block."""
        self._leaving = False
        self.has_left = False
        self._away_since: float | None = None
        """Its event loop has not come round since, by its own clock."""

    # -- what the oracle asks ------------------------------------------------------------------
    @property
    def serves(self) -> bool:
        return self.process.alive and self.stopped is None

    @property
    def now(self) -> float:
        """CLOCK_BOOTTIME of its host."""
        return self.machine.clock(self.world.now)

    @property
    def lease_left_s(self) -> float:
        return self.lease_until - self.now

    @property
    def lease_began_at(self) -> float:
        """When what it takes for the last renewal was sent, in seconds of the world."""
        return self.machine.world_time(self.lease_until - self.cluster.settings.lease_s)

    @property
    def away_s(self) -> float:
        """How long its event loop has not come round, of its own clock."""
        return 0.0 if self._away_since is None else self.now - self._away_since

    @property
    def is_active(self) -> bool:
        """A member that takes part in locking, as far as it knows."""
        return self.view is not None and self.node in self.view.active and self.serves

    # -- life ------------------------------------------------------------------------------
    def start(self) -> None:
        """Run."""
        self.cluster.network.join(self)
        self.step(events.Start())

    def kill(self, *, power_off: bool = False) -> None:
        """SIGKILL, or no power."""
        if not self.process.alive:
            return
        self.process.kill()
        if self.pulse is not None:
            self.pulse.thread.kill()
        self.cluster.network.leave(self)
        kill_sessions(self.paths, power_off=power_off)
        self.world.trace(self.name, "loses its power" if power_off else "is killed")

    def freeze(self) -> None:
        """SIGSTOP."""
        self.hang()
        if self.pulse is not None:
            self.pulse.thread.freeze()

    def hang(self) -> None:
        """The event loop does not come round; threads go on. `thaw` ends it."""
        if self._away_since is None:
            self._away_since = self.now
        self.process.freeze()

    def thaw(self) -> None:
        """SIGCONT."""
        if self.pulse is not None:
            self.pulse.thread.thaw()
        self._away_since = None
        self.process.thaw()
        if self.process.alive and self._tick_missed:
            self._tick_missed = False
            self._tick()

    def leave(self) -> None:
        """`umount`."""
        if not self._leaving and self.serves:
            self._leaving = True
            self.world.trace(self.name, "is asked to leave")
            self.locking.close(self._emptied)

    def _emptied(self) -> None:
        self.has_left = True
        self.cluster.leaves(self)
        self.step(events.LeaveWanted())

    # -- steps -----------------------------------------------------------------------------
    def step(self, event: events.Event) -> None:
        """Let the member take an event, and carry out what follows."""
        if not self.process.alive or (self.stopped is not None):
            return
        world = self.world
        cluster = self.cluster
        if world.tracing:
            self._trace_event(event)
        followed = self.member.step(event, self.now)
        if self.pulse is not None:
            self.pulse.stamp()
        cluster.steps += 1
        for effect in followed:
            if world.tracing and type(effect) not in _QUIET:
                world.trace(self.name, f"    {in_words(effect)}")
            cluster.coverage.effect(effect)
            self.do(self._carry_out, effect)
        if cluster.steps % 100 == 0:
            self.member.check()
            cluster.check_all()
        if self.pulse is not None:
            self.pulse.follow(self.member.heartbeat_key)
        self._set_timer()

    def do(self, carry_out: Callable[[Any], None], effect: object) -> None:
        """Carry out an effect, unless the process ends at this very step."""
        ambush = self.cluster.ambush
        if ambush is None or not ambush.matches(effect):
            self.process.deliver(carry_out, effect)
            return
        self.cluster.ambush = None
        if ambush.after:
            self.process.deliver(carry_out, effect)
        ambush.strike(self.machine)
        if not ambush.after:
            self.process.deliver(carry_out, effect)

    def _trace_event(self, event: events.Event) -> None:
        if isinstance(event, events.Done):
            if not isinstance(event.outcome, Good):
                self.world.trace(self.name, f"op {event.op}: {in_words(event.outcome)}")
        elif type(event) not in _QUIET:
            self.world.trace(self.name, in_words(event))

    def _set_timer(self) -> None:
        due = self.member.next_timer()
        if due is None:
            return
        when = max(self.world.now, self.machine.world_time(due) + ROUNDING_S)
        if when < self._timer_at:
            self._timer_at = when
            self.world.at(when, self._timer, when)

    def _timer(self, when: float) -> None:
        if when != self._timer_at:
            return
        self._timer_at = float("inf")
        if self.process.frozen:
            self._tick_missed = True
        else:
            self._tick()

    def _tick(self) -> None:
        due = self.member.next_timer()
        if due is not None and due <= self.now:
            self.step(events.Tick())
        else:
            self._set_timer()

    # -- effects ---------------------------------------------------------------------------
    def _carry_out(self, effect: effects.Effect) -> None:
        handler = _HANDLERS.get(type(effect))
        if handler is not None:
            handler(self, effect)
            return
        self._do_io(cast("effects.IoEffect", effect))

    def _do_io(self, effect: effects.IoEffect) -> None:
        def done(outcome: Outcome) -> None:
            self.cluster.coverage.outcome(effect, outcome)
            value = outcome.value if isinstance(outcome, Good) else None
            surveyed = value.survey if isinstance(value, Opened) else value
            if isinstance(surveyed, Surveyed):
                self._knows(surveyed.view)
            self.step(events.Done(effect.op, outcome))

        self.process.start(self.paths.carry_out(effect), done)

    def _knows(self, view: View) -> None:
        if self.known is None or view.epoch > self.known.epoch:
            self.known = view
            self.listed = frozenset(view.listed)

    def _open_newcomer(self, effect: effects.OpenNewcomer) -> None:
        self.newcomer_key = effect.key
        self._do_io(effect)

    def _open_paths(self, effect: effects.OpenPaths) -> None:
        self.node = NodeId(effect.slot, effect.incarnation)
        self.cluster.claims(self)
        self._do_io(effect)

    def _knock(self, effect: effects.Knock) -> None:
        """Who lives and can be reached answers, unless it is frozen."""
        network = self.cluster.network
        answered = frozenset(
            node
            for node in effect.nodes
            if (peer := self.cluster.daemon_of(node)) is not None
            and network.streams(self, peer)
            and network.streams(peer, self)
            and not peer.process.frozen
        )
        for node in answered:
            peer = self.cluster.daemon_of(node)
            assert peer is not None
            self.world.after(0.001, peer.process.deliver, peer.step, events.StrangerCame())
        outcome = Good(Knocked(answered))
        self.cluster.coverage.outcome(effect, outcome)
        delay_s = 0.001 if len(answered) == len(effect.nodes) else 1.0
        self.world.after(delay_s, self.process.deliver, self.step, events.Done(effect.op, outcome))

    def _beat(self, effect: effects.Beat) -> None:
        if self.pulse is not None:
            self.pulse.beat(effect)
            return
        self.send_beat(effect.heartbeat)
        if effect.key:
            self.write_beat(effect.heartbeat)

    @property
    def is_writing(self) -> bool:
        """A heartbeat of the event loop's is on its way to its block."""
        return self._writing

    def write_beat(self, heartbeat: Heartbeat) -> None:
        """From the event loop, unless one is on its way."""
        if not self._writing:
            self._writing = True
            self.do(self._write_beat, effects.WriteHeartbeat(0, heartbeat))

    def _write_beat(self, effect: effects.WriteHeartbeat) -> None:
        """On the control session of this moment."""
        key, sent_at, control = self.member.heartbeat_key, self.now, self.paths.control
        if control is None or control.key != key:
            self._writing = False
            return

        def done(outcome: Outcome) -> None:
            self._writing = False
            self.cluster.coverage.outcome(effect, outcome)
            if isinstance(outcome, Good):
                if self.pulse is not None:
                    self.pulse.written_by_python()
                self.step(events.HeartbeatWritten(key, sent_at))
            else:
                self.step(events.HeartbeatFailed(key))

        self.process.start(self.paths.carry_out(effect), done)

    def send_beat(self, heartbeat: Heartbeat) -> None:
        """A datagram to everybody."""
        view = self.known
        if view is None:
            return
        network = self.cluster.network
        for peer in self.cluster.daemons:
            if peer is not self and peer.node in self.listed:
                network.datagram(self, peer, peer._heard, (heartbeat, view.secret))

    def _heard(self, what: tuple[Heartbeat, bytes]) -> None:
        beat, secret = what
        if self.known is not None and self.known.secret == secret:
            self.step(events.BeatHeard(beat))

    def _send_to(self, effect: effects.SendTo) -> None:
        network = self.cluster.network
        if isinstance(effect.message, LeaseGiven):
            self.cluster.oracle.gives_lease(effect.peer)
        if effect.peer.slot == NEWCOMER_SLOT:
            for peer in self.cluster.daemons:
                if peer.newcomer_key == effect.peer.incarnation and self.node is not None:
                    received = events.Received(self.node, effect.message)
                    if network.open(self, peer) and network.open(peer, self):
                        self.world.after(0.001, peer.process.deliver, peer.step, received)
            return
        daemon = self.cluster.daemon_of(effect.peer)
        if daemon is not None and daemon is not self:
            network.send(self, daemon, effect.message)

    def _view_installed(self, effect: effects.ViewInstalled) -> None:
        self.view = effect.view
        self._knows(effect.view)
        self.cluster.view_installed(self, effect)
        self.locking.view_installed(effect)

    def _lease_until(self, effect: effects.LeaseUntil) -> None:
        self.renewed_by_pulse(effect.until_s)
        self.locking.lease_renewed()

    def renewed_by_pulse(self, until_s: float) -> None:
        """A write is confirmed, of which the member does not know yet."""
        if until_s > self.lease_until:
            self.lease_until = until_s
            self.cluster.oracle.renews(self)

    def _may_be_granted(self, effect: effects.DepartedMayBeGranted) -> None:
        self.cluster.may_be_granted(effect.node, self.name)
        self.locking.may_be_granted(effect.node)

    def _replay_wanted(self, effect: effects.ReplayWanted) -> None:
        self.locking.replay_wanted(effect.node)

    def _paths_ready(self, effect: effects.PathsReady) -> None:
        control = self.paths.control
        if control is not None and control.key == effect.key:
            self.cluster.oracle.paths_ready(effect.key)
            self.paths.ready = True
            self.locking.paths_ready()

    def _close_sessions(self, _effect: effects.CloseSessions) -> None:
        self.paths.close_all()

    def _stop(self, effect: effects.Stop) -> None:
        self.stopped = effect
        if self.pulse is not None:
            self.pulse.stop()
        self.world.trace(self.name, f"stops ({effect.reason.value}): {effect.words}")
        self.cluster.stopped(self, effect)
        self.locking.stop()
        self.paths.close_all()
        self.cluster.network.leave(self)

    # -- what comes from below ---------------------------------------------------------------
    def _path_lost(self, keys: tuple[int, ...]) -> None:
        self.step(events.PathLost(keys))
        self.locking.paths_lost()

    # -- network.Endpoint ----------------------------------------------------------------------
    def wants(self, other: Endpoint) -> bool:
        """Its certificate stands in the view."""
        peer = other.node if isinstance(other, Daemon) else None
        return peer in self.listed and self.stopped is None

    def connected(self, other: Endpoint) -> None:
        if isinstance(other, Daemon) and other.node is not None:
            self.step(events.PeerConnected(other.node))
            self.locking.connected(other)

    def disconnected(self, other: Endpoint) -> None:
        if isinstance(other, Daemon) and other.node is not None:
            self.step(events.PeerLost(other.node))

    def received(self, other: Endpoint, message: object) -> None:
        if not isinstance(other, Daemon) or other.node is None:
            return
        if self.locking.takes(other, message):
            return
        if other.node in self.listed:
            self.step(events.Received(other.node, message))  # type: ignore[arg-type]


_QUIET = {
    events.Tick,
    events.BeatHeard,
    events.HeartbeatWritten,
    effects.Beat,
    effects.ReadBlocks,
    effects.LeaseUntil,
}

_HANDLERS: dict[type, Any] = {
    effects.OpenNewcomer: Daemon._open_newcomer,
    effects.OpenPaths: Daemon._open_paths,
    effects.Knock: Daemon._knock,
    effects.Beat: Daemon._beat,
    effects.SendTo: Daemon._send_to,
    effects.ViewInstalled: Daemon._view_installed,
    effects.LeaseUntil: Daemon._lease_until,
    effects.DepartedMayBeGranted: Daemon._may_be_granted,
    effects.ReplayWanted: Daemon._replay_wanted,
    effects.PathsReady: Daemon._paths_ready,
    effects.CloseSessions: Daemon._close_sessions,
    effects.Stop: Daemon._stop,
}
