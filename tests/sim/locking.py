"""The locks of one daemon: a `LockCore`, what membership tells it, and its channels to peers.

Channels to one incarnation are FIFO and lose nothing, though connections break: each message has
a number, what the other end has not confirmed is kept, and a new connection begins with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lockmgr import events as lock_events
from lockmgr.carried import Carried
from lockmgr.cluster import effects, events
from lockmgr.cluster.view import NodeId
from lockmgr.core import LockCore
from lockmgr.mastering import node_number, slot_and_incarnation
from tests.sim.application import Application
from tests.sim.words import in_words
from tests.sim.world import ROUNDING_S, Resume

if TYPE_CHECKING:
    from tests.sim.daemon import Daemon


@dataclass(frozen=True, slots=True)
class Numbered:
    """A lock message on a channel. ``confirms``: how many the sender has received."""

    number: int
    confirms: int
    message: Carried


@dataclass(frozen=True, slots=True)
class Hello:
    """The first thing on a connection: how many messages the sender has received."""

    confirms: int


@dataclass(slots=True)
class Channel:
    """To and from one incarnation."""

    sent: int = 0
    received: int = 0
    kept: deque[Numbered] = field(default_factory=deque)
    greeted: bool = False
    """The other end has said, on this connection, from where on to send."""
    listed: bool = False
    """By a view that this node has gone by."""


def number_of(node: NodeId) -> int:
    """What the lock manager calls it."""
    return node_number(node.slot, node.incarnation)


class Locking:
    """See the module's docstring."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.core: LockCore | None = None
        self.application = Application(self)
        self.channels: dict[NodeId, Channel] = {}
        self.waits: dict[int, Resume] = {}
        self._timer_at = float("inf")
        self._timer_missed = False
        self._emptied: Callable[[], None] | None = None
        self._replaying: dict[NodeId, None] = {}

    # -- membership says -----------------------------------------------------------------------
    def view_installed(self, effect: effects.ViewInstalled) -> None:
        """Follow it, if this node takes part in locking."""
        daemon = self.daemon
        view = effect.view
        newest = {node.slot: node for node in view.listed}
        for node, channel in list(self.channels.items()):
            # As `LockLink` does: who is ahead of this view is not forgotten.
            if node in view.listed:
                channel.listed = True
            elif channel.listed or newest.get(node.slot, node) > node:
                del self.channels[node]
        if daemon.node is None or daemon.node not in view.active:
            return
        self._begin(daemon.node)
        if not self.application.started:
            self.application.start()
        if effect.replayed:
            nodes = frozenset(number_of(node) for node in effect.replayed)
            self.step(lock_events.JournalsReplayed(nodes))
        changed = lock_events.ViewChanged(
            view.lock_epoch,
            tuple(sorted(number_of(node) for node in view.active)),
            number_of(effect.coordinator),
            frozenset(number_of(node) for node in view.to_replay),
        )
        if effect.coordinator in view.active:
            self.step(changed)
        else:
            self.step(
                lock_events.ViewChanged(
                    changed.epoch, changed.members, changed.members[0], changed.unreplayed
                )
            )
        cleared = frozenset(number_of(d.node) for d in effect.departed if d.cleared)
        if cleared:
            self.step(lock_events.Cleared(cleared))

    def _begin(self, node: NodeId) -> LockCore:
        """There may be messages before there is the view that they are about."""
        if self.core is None:
            settings = self.daemon.cluster.lock_settings
            self.core = LockCore(number_of(node), 0, settings, members=())
            if not self.daemon.paths.ready:
                self.step(lock_events.Stalled(True))
        return self.core

    def may_be_granted(self, node: NodeId) -> None:
        """Its lease is over, and it is fenced."""
        if self.core is not None:
            self.step(lock_events.Cleared(frozenset({number_of(node)})))

    def replay_wanted(self, node: NodeId) -> None:
        """Bring a journal in order, once."""
        if node in self._replaying:
            return
        self._replaying[node] = None
        self.daemon.process.start(self._replay(node))

    async def _replay(self, node: NodeId) -> None:
        try:
            await self.application.replay(node)
        finally:
            self._replaying.pop(node, None)
        self.daemon.step(events.Replayed(node))

    def paths_ready(self) -> None:
        """What waits for a data path may go on."""
        self.step(lock_events.Stalled(False))
        self.application.paths_ready()

    def paths_lost(self) -> None:
        """What writes back waits, nobody knows for how long."""
        self.step(lock_events.Stalled(True))

    def lease_renewed(self) -> None:
        """What waits for a lease may look again."""
        self.application.lease_renewed()

    def close(self, emptied: Callable[[], None]) -> None:
        """Give everything up; ``emptied`` is called when nothing is left."""
        self._emptied = emptied
        if self.core is None:
            emptied()
            return
        self.application.stop()
        self.step(lock_events.Close())

    def stop(self) -> None:
        """This incarnation is over."""
        self.application.dead = True
        for name in list(self.core.locks.locks) if self.core is not None else ():
            self.daemon.cluster.oracle.holds(self.daemon, name, None)

    # -- steps ---------------------------------------------------------------------------------
    def step(self, event: lock_events.Event) -> None:
        """Let the core take an event, and carry out what follows."""
        daemon = self.daemon
        core = self.core
        if core is None or not daemon.serves:
            return
        cluster = daemon.cluster
        world = cluster.world
        if world.tracing and type(event) is not lock_events.TimerDue:
            world.trace(daemon.name, f"  locks: {in_words(event)}")
        followed = core.step(event, daemon.now)
        cluster.steps += 1
        cluster.coverage.lock_event(event)
        self._note_held(event)
        for effect in followed:
            daemon.do(self._carry_out, effect)
        if cluster.steps % 100 == 0:
            core.check()
            cluster.check_all()
        self._set_timer()

    def _note_held(self, event: lock_events.Event) -> None:
        core = self.core
        assert core is not None
        oracle = self.daemon.cluster.oracle
        message = getattr(event, "message", event)
        resource = getattr(message, "resource", None)
        claim = getattr(event, "claim", None)
        if claim is not None:
            resource = claim.resource
        if resource is not None:
            lock = core.locks.locks.get(resource.name)
            oracle.holds(self.daemon, resource.name, lock.held if lock is not None else None)
            return
        for name in self.application.names:
            lock = core.locks.locks.get(name)
            oracle.holds(self.daemon, name, lock.held if lock is not None else None)

    def _carry_out(self, effect: lock_events.Effect) -> None:
        daemon = self.daemon
        daemon.cluster.coverage.lock_effect(effect)
        application = self.application
        match effect:
            case lock_events.Send(to, message):
                self._send(NodeId(*slot_and_incarnation(to)), message)
            case lock_events.Grant(claim):
                application.granted(claim)
            case lock_events.Deny():
                application.denied(effect)
            case lock_events.Demote(resource, to_mode):
                daemon.process.start(application.demote(resource, to_mode))
            case lock_events.Drained(resource, empty):
                application.drained(resource, empty)
            case lock_events.Answer():
                application.asked(effect)
            case lock_events.Glimpsed(ticket, answer):
                application.glimpsed(ticket, answer)
            case lock_events.Thawed(epoch):
                daemon.world.trace(daemon.name, f"  locks of epoch {epoch} are thawed")
                daemon.step(events.LocksThawed(epoch))
            case lock_events.Emptied():
                emptied, self._emptied = self._emptied, None
                if emptied is not None:
                    emptied()
            case lock_events.Unresponsive(number):
                node = NodeId(*slot_and_incarnation(number))
                daemon.world.trace(daemon.name, f"  {effect.words()}")
                daemon.step(events.EvictWanted(node, effect.words()))
            case lock_events.EpochRefused():
                pass

    def _set_timer(self) -> None:
        assert self.core is not None
        due = self.core.next_timer()
        if due is None:
            return
        daemon = self.daemon
        when = max(daemon.world.now, daemon.machine.world_time(due) + ROUNDING_S)
        if when < self._timer_at:
            self._timer_at = when
            daemon.world.at(when, daemon.process.deliver, self._timer, when)

    def _timer(self, when: float) -> None:
        if when != self._timer_at:
            return
        self._timer_at = float("inf")
        assert self.core is not None
        due = self.core.next_timer()
        if due is not None and due <= self.daemon.now:
            self.step(lock_events.TimerDue())
        else:
            self._set_timer()

    # -- channels --------------------------------------------------------------------------
    def _channel(self, node: NodeId) -> Channel:
        channel = self.channels.get(node)
        if channel is None:
            channel = self.channels[node] = Channel()
        return channel

    def _send(self, to: NodeId, message: Carried) -> None:
        channel = self._channel(to)
        channel.sent += 1
        numbered = Numbered(channel.sent, channel.received, message)
        channel.kept.append(numbered)
        daemon = self.daemon
        peer = daemon.cluster.daemon_of(to)
        if peer is not None and channel.greeted:
            daemon.cluster.network.send(daemon, peer, numbered)

    def connected(self, peer: Daemon) -> None:
        """A new connection: say what has come."""
        assert peer.node is not None
        channel = self._channel(peer.node)
        channel.greeted = False
        self.daemon.cluster.network.send(self.daemon, peer, Hello(channel.received))

    def takes(self, peer: Daemon, message: object) -> bool:
        """Is it a message of a channel? Then it is carried out."""
        if not isinstance(message, Numbered | Hello):
            return False
        assert peer.node is not None
        channel = self._channel(peer.node)
        while channel.kept and channel.kept[0].number <= message.confirms:
            channel.kept.popleft()
        if isinstance(message, Hello):
            channel.greeted = True
            for numbered in channel.kept:
                self.daemon.cluster.network.send(self.daemon, peer, numbered)
            return True
        if message.number == channel.received + 1:
            assert self.daemon.node is not None
            self._begin(self.daemon.node)
            channel.received += 1
            self.step(lock_events.Deliver(message.message))
        return True
