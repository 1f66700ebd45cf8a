"""This node and one peer: which of their connections is used. Pure but for cancel scopes.

Both dial, so that one way through a firewall is enough; the lower node chooses. It takes the first
connection that gets through its greeting and says `Chosen` over it. When another one comes while
that is up, the peer may have lost the first without this node noticing, or have dialed at the same
moment: the first is probed, and stays if it answers. The higher node uses what the lower one has
chosen last, and gives up all others.

invariants (`Pair.check`):
- at most one connection is ``used``; it has a number, and no higher one has been seen
- of those that are not, at most one was dialed and at most one came in (`admit` sees to it)
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Final

import trio

from lockmgr.cluster.connection import Connection, Traffic
from lockmgr.cluster.network_settings import NetworkSettings
from lockmgr.cluster.peers import Peer
from lockmgr.cluster.view import NodeId

STABLE_S: Final = 5.0
"""A connection that lived so long was a good one: dialing begins at the first pause again."""


@dataclass(frozen=True, slots=True)
class PeerStatistics:
    """For people and for tests."""

    peer: NodeId
    number: int
    """Of the connection; 0: there is none."""
    dialed: bool
    queue_bytes: int
    rtt_s: float | None
    """Of the last `Ping`."""
    traffic: Traffic
    """Over all connections so far; a copy."""


class Backoff:
    """Pauses between attempts: doubled up to a limit, each times 0.5 to 1.5."""

    def __init__(self, settings: NetworkSettings, rng: random.Random) -> None:
        self._settings = settings
        self._rng = rng
        self._pause_s = settings.redial_first_s

    def reset(self) -> None:
        """Something has worked."""
        self._pause_s = self._settings.redial_first_s

    def next(self) -> float:
        """How long to pause now."""
        pause_s = self._pause_s * self._rng.uniform(0.5, 1.5)
        self._pause_s = min(2 * self._pause_s, self._settings.redial_most_s)
        return pause_s


class Pair:
    """What this node knows of its connections with ``peer``."""

    def __init__(
        self, own: NodeId, peer: Peer, settings: NetworkSettings, rng: random.Random
    ) -> None:
        self.peer = peer
        self.chooses = own < peer.node
        self.used: Connection | None = None
        self.others: list[Connection] = []
        self.number = 0
        """Of the last connection that was used."""
        self.gone: str | None = None
        """Why there is to be no connection any more."""
        self.traffic = Traffic()
        self._settings = settings
        self._rng = rng
        self._backoff = Backoff(settings, rng)
        self.last_words = ""
        """Why dialing has failed last; for the log, once each."""
        self.address = 0
        """Which of the peer's addresses is tried next."""
        self._pause: trio.CancelScope | None = None
        self._changed = trio.Event()

    def statistics(self) -> PeerStatistics:
        """As it is now."""
        used, traffic = self.used, replace(self.traffic)
        if used is None:
            return PeerStatistics(self.peer.node, 0, False, 0, None, traffic)
        return PeerStatistics(
            self.peer.node, used.number, used.dialed, used.queue_bytes, used.rtt_s, traffic
        )

    # -- waiting -------------------------------------------------------------------------------
    def interruptible(self) -> trio.CancelScope:
        """What the dialer does while there is no connection; cancelled when there is one, or when
        there is to be none."""
        self._pause = trio.CancelScope()
        if self.used is not None or self.gone is not None:
            self._pause.cancel()
        return self._pause

    def next_pause_s(self) -> float:
        """How long to wait before dialing: longer each time, and who does not choose lets the
        other begin."""
        pause_s = self._backoff.next()
        if not self.chooses:
            pause_s += self._settings.courtesy_s * self._rng.uniform(0.5, 1.5)
        return pause_s

    def changed(self) -> None:
        """``used`` or ``gone`` is another one now."""
        if self._pause is not None and (self.used is not None or self.gone is not None):
            self._pause.cancel()
        self._changed.set()
        self._changed = trio.Event()

    async def wait_unconnected(self) -> bool:
        """True at once, or after the connection is lost; False: there is to be none any more."""
        while self.used is not None and self.gone is None:
            await self._changed.wait()
        return self.gone is None

    # -- connections ---------------------------------------------------------------------------
    def admit(self, connection: Connection) -> None:
        """A connection has been greeted. One before it, made the same way, was given up."""
        for other in self.others:
            if other.dialed == connection.dialed:
                other.fail("a newer connection was made", "a newer connection was made")
        connection.traffic = self.traffic
        self.others.append(connection)
        if self.gone is not None:
            connection.fail(self.gone, self.gone)

    def use(self, connection: Connection, number: int) -> None:
        """This is the one from now on. The one before must have been reported lost."""
        assert self.used is None and number > self.number
        self.used = connection
        self.number = connection.number = number
        self.traffic.connections += 1
        self.last_words = ""
        if connection in self.others:
            self.others.remove(connection)
        for other in self.others:
            other.fail("another connection is used", "another connection is used")
        self.changed()

    def discard(self, connection: Connection) -> None:
        """The connection has ended."""
        if connection in self.others:
            self.others.remove(connection)
        if connection is self.used:
            self.used = None
            if trio.current_time() - connection.born_s >= STABLE_S:
                self._backoff.reset()
            self.changed()

    def end(self, reason: str) -> None:
        """There is to be no connection any more."""
        self.gone = reason
        for connection in (self.used, *self.others):
            if connection is not None:
                connection.fail(reason, reason)
        self.changed()

    def check(self) -> None:
        """Assert the invariants."""
        assert self.used is None or 0 < self.used.number == self.number
        alive = [other for other in self.others if other.failure is None]
        assert len({other.dialed for other in alive}) == len(alive)
        for connection in alive if self.used is None else (*alive, self.used):
            connection.check()
