"""A host of the tiny world in `cluster_world`: a daemon, its sessions, what it did."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

from lockmgr.cluster.blocks import Identity
from lockmgr.cluster.effects import AnyIo, Beat, Effect, Stop, WriteHeartbeat
from lockmgr.cluster.events import Done, Event, HeartbeatFailed, HeartbeatWritten, Tick
from lockmgr.cluster.member import Member
from lockmgr.cluster.messages import Message
from lockmgr.cluster.outcomes import Good
from lockmgr.cluster.view import NodeId
from tests.unit.cluster_lun import KEYS, Session

if TYPE_CHECKING:
    from tests.unit.cluster_world import World

BEGIN_S = 1000.0
"""When the world begins; clocks are not at zero when a daemon starts."""


class Host:
    """One daemon."""

    def __init__(self, world: World, name: str, number: int, life: int, boot: int) -> None:
        self.world = world
        self.name = name
        identity = Identity(
            name,
            bytes([number] * 16),
            bytes([boot] * 16),
            bytes([number, life] * 16),
            (f"{name}:7000",),
        )
        self.member = Member(identity, world.settings, KEYS, Random(number * 100 + life))
        self.newcomer: Session | None = None
        self.control: Session | None = None
        self.data: Session | None = None
        self.generation = 0
        self.frozen = False
        self.dead = False
        self.inbox: list[Event] = []
        self.log: list[tuple[float, Effect | WriteHeartbeat]] = []
        self.epoch_of_locks = -1
        self.connected: set[NodeId] = set()
        self.outstanding: dict[int, AnyIo] = {}
        self.unanswered: set[int] = set()
        """Ops whose session broke: their answer is `Unknown`, whatever the target says."""
        self.writing: dict[int, tuple[int, float]] = {}
        """The heartbeat that is being written: its op, the session's key, when it was sent."""
        self._writes = 0
        self.writes_itself = True
        """False: the test says what is written."""
        self.sent: list[tuple[float, NodeId, Message]] = []
        self.ready: list[int] = []
        """Keys of the control sessions whose paths were said to be ready."""
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

    def when(self, kind: type[Effect | WriteHeartbeat], node: NodeId | None = None) -> list[float]:
        """Seconds since the world began at which such an effect came."""
        return [
            round(t - BEGIN_S, 3)
            for t, effect in self.log
            if isinstance(effect, kind) and (node is None or getattr(effect, "node", None) == node)
        ]

    def said(self, kind: type[Message]) -> list[tuple[float, NodeId, Message]]:
        """When, to whom and what, of the messages of a kind; seconds since the world began."""
        return [(round(t - BEGIN_S, 3), to, m) for t, to, m in self.sent if isinstance(m, kind)]

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
            if event.op in self.writing:
                event = self._wrote(event)
        effects = self.member.step(event, self.world.now)
        self.member.check()
        for effect in effects:
            self.world.carry_out(self, effect)
        self.world.set_tick(self)

    # -- its heartbeats --------------------------------------------------------------------------
    def write(self, beat: Beat) -> WriteHeartbeat | None:
        """What is to be written of it, unless a write is on its way."""
        if not beat.key or self.writing or not self.writes_itself:
            return None
        self._writes += 1
        self.writing[-self._writes] = (beat.key, self.world.now)
        return WriteHeartbeat(-self._writes, beat.heartbeat)

    def _wrote(self, done: Done) -> Event:
        key, sent_at = self.writing.pop(done.op)
        good = isinstance(done.outcome, Good)
        return HeartbeatWritten(key, sent_at) if good else HeartbeatFailed(key)

    def sessions(self) -> list[Session]:
        return [s for s in (self.newcomer, self.control, self.data) if s is not None]

    def drop_paths(self) -> None:
        for session in (self.control, self.data):
            if session is not None:
                session.alive = False
        self.control = self.data = None
