"""The LUN of the tiny world in `cluster_world`: reservations, blocks, and writes on their way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lockmgr.cluster.blocks import Heartbeat, JoinRequest
from lockmgr.cluster.outcomes import Lost, NobodyHolds, Refused, Surveyed, Why, Won
from lockmgr.cluster.view import NEWCOMER_SLOT, NodeId, View


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
    gone_since: dict[NodeId, int] = field(default_factory=dict)
    """The first epoch that does not list a node which was listed."""

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

    def admit(self, session: Session) -> Refused | None:
        if session in self.registered:
            return None
        if not session.told:
            session.told = True
            return Refused(Why.PREEMPTED)
        return Refused(Why.CONFLICT)

    def register(self, key: int) -> Session:
        # holds: a key is registered once, ever
        assert all(session.key != key for session in self.registered)
        session = Session(key, epoch=self.view.epoch)
        self.registered.append(session)
        self.generation += 1
        return session

    def unregister(self, session: Session) -> None:
        session.alive = False
        assert session is not self.holder, "the holder's key is never unregistered"
        if session in self.registered:
            self.registered.remove(session)
            self.generation += 1

    def survey(self) -> Surveyed:
        keys = tuple(session.key for session in self.registered)
        return Surveyed(self.view, self.holder_key, keys, self.generation)

    def who_holds(self, session: Session) -> Won | Lost | NobodyHolds:
        if self.holder is session:
            return Won()
        return Lost(self.holder_key) if self.holder else NobodyHolds()

    def write_view(self, view: View) -> None:
        # holds: epochs never repeat, none is left out
        assert view.epoch == self.view.epoch + 1, (view.epoch, self.view.epoch)
        for node in self.view.listed:
            if not view.lists(*node):
                self.gone_since[node] = view.epoch
        self.view = view

    def fence(self, by: Session, keys: tuple[int, ...], nodes: tuple[NodeId, ...]) -> None:
        for session in list(self.registered):
            if session is not by and (session.key in keys or KEYS.owner(session.key) in nodes):
                session.alive = False
                self.preempt(by, session.key)
        self.drain()
