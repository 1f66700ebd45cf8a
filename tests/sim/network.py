"""The network between hosts: datagrams, connections, and what becomes of both.

Datagrams are delayed, lost, duplicated and reordered. Connections are FIFO and lose what is on
its way when they break, and nobody learns how much that was. A cut is one direction of one pair of
hosts; what is said over a connection meanwhile is held back, and after `PATIENCE_S` the connection
breaks, which its two ends notice at different times. A killed process's connections are reset at
once where the way is open; a host without power says nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from tests.sim.world import Process, World

PATIENCE_S = 3.0
RETRY_S = 0.3
_TRAVEL_S = 0.0003


class Endpoint(Protocol):
    """A process that talks."""

    process: Process
    host_name: str

    def wants(self, other: Endpoint) -> bool:
        """Does it know ``other``'s incarnation, and accept its certificate?"""

    def connected(self, other: Endpoint) -> None:
        """A connection with ``other`` stands."""

    def disconnected(self, other: Endpoint) -> None:
        """It stands no more."""

    def received(self, other: Endpoint, message: object) -> None:
        """Something came over it."""


class Connection:
    """Between two endpoints; either may send as long as it has not noticed the end."""

    def __init__(self, network: Network, ends: tuple[Endpoint, Endpoint]) -> None:
        self.network = network
        self.ends = ends
        self.broken = False
        self.noticed = [False, False]
        self._last = [0.0, 0.0]
        self._stalled: list[list[object]] = [[], []]

    def send(self, sender: Endpoint, message: object) -> None:
        """Deliver ``message`` at the other end, if the connection lasts."""
        side = 0 if self.ends[0] is sender else 1
        if self.broken:
            return
        if self._stalled[side] or not self.network.streams(sender, self.ends[1 - side]):
            self._stalled[side].append(message)
            return
        world = self.network.world
        delay_s = _TRAVEL_S * (0.5 + world.rng.random())
        if self.network.slow_until > world.now:
            delay_s += world.rng.random() * self.network.slow_s
        self._last[side] = when = max(world.now + delay_s, self._last[side])
        world.at(when, self._arrive, side, message)

    def _arrive(self, side: int, message: object) -> None:
        if not self.broken:
            receiver, sender = self.ends[1 - side], self.ends[side]
            receiver.process.deliver(self._take, receiver, sender, message)

    def _take(self, receiver: Endpoint, sender: Endpoint, message: object) -> None:
        # What the kernel had already received is read even if the connection has broken since,
        # but not after the program was told of that.
        if not self.noticed[0 if self.ends[0] is receiver else 1]:
            receiver.received(sender, message)

    def changed(self) -> None:
        """A cut came or went."""
        for side in (0, 1):
            if self._stalled[side] and self.network.streams(self.ends[side], self.ends[1 - side]):
                stalled, self._stalled[side] = self._stalled[side], []
                for message in stalled:
                    self.send(self.ends[side], message)

    def blocked(self) -> bool:
        """Is one direction cut?"""
        a, b = self.ends
        return not (self.network.streams(a, b) and self.network.streams(b, a))

    def break_off(self, *, notice_s: tuple[float, float] = (0.0, 0.0)) -> None:
        """From now on nothing arrives; each end is told after its ``notice_s``."""
        if self.broken:
            return
        self.broken = True
        self._stalled = [[], []]
        for side in (0, 1):
            end = self.ends[side]
            self.network.world.after(notice_s[side], end.process.deliver, self._notice, side)

    def _notice(self, side: int) -> None:
        self.noticed[side] = True
        self.network.forget(self)
        self.ends[side].disconnected(self.ends[1 - side])


class Network:
    """All hosts' links, and the connections that stand."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.cuts: dict[tuple[str, str], int] = {}
        """From host, to host: how many faults cut it."""
        self.filtered: set[tuple[str, str]] = set()
        """The same, where datagrams pass and connections do not."""
        self.loss = 0.0
        self.duplication = 0.0
        self.slow_until = 0.0
        self.slow_s = 0.05
        self.off: set[str] = set()
        """Hosts without power."""
        self.connections: dict[tuple[str, str], Connection] = {}
        self.endpoints: list[Endpoint] = []

    # -- ways ------------------------------------------------------------------------------
    def open(self, source: Endpoint, to: Endpoint) -> bool:
        """Does what ``source`` sends arrive at ``to``'s host?"""
        return self.passable(source.host_name, to.host_name)

    def passable(self, source: str, to: str) -> bool:
        """The same, for hosts."""
        return (source, to) not in self.cuts and source not in self.off and to not in self.off

    def streams(self, source: Endpoint, to: Endpoint) -> bool:
        """Do bytes of connections arrive, too?"""
        return self.open(source, to) and (source.host_name, to.host_name) not in self.filtered

    def filter(self, one: str, other: str, *, on: bool) -> None:
        """Let nothing but datagrams pass between two hosts, or all again."""
        both = {(one, other), (other, one)}
        if on:
            self.filtered |= both
            self._watch()
            return
        self.filtered -= both
        for connection in list(self.connections.values()):
            connection.changed()

    def cut(self, source: str, to: str) -> None:
        """Drop everything in this direction."""
        self.cuts[source, to] = self.cuts.get((source, to), 0) + 1
        self._watch()

    def heal(self, source: str, to: str) -> None:
        """Undo one `cut`."""
        left = self.cuts.get((source, to), 0) - 1
        if left > 0:
            self.cuts[source, to] = left
        else:
            self.cuts.pop((source, to), None)
        for connection in list(self.connections.values()):
            connection.changed()

    def power(self, host: str, *, on: bool) -> None:
        """A host loses, or gets back, its power."""
        if on:
            self.off.discard(host)
        else:
            self.off.add(host)
            self._watch()

    def _watch(self) -> None:
        for connection in list(self.connections.values()):
            if connection.blocked():
                self.world.after(PATIENCE_S, self._lose_patience, connection)

    def _lose_patience(self, connection: Connection) -> None:
        if connection.blocked():
            rng = self.world.rng
            connection.break_off(notice_s=(rng.random(), rng.random()))

    # -- datagrams -------------------------------------------------------------------------
    def datagram(
        self, sender: Endpoint, to: Endpoint, take: Callable[..., None], what: object
    ) -> None:
        """Let ``take(what)`` happen in ``to``'s process: once, twice, late, or never."""
        world = self.world
        if not self.open(sender, to) or (self.loss and world.chance(self.loss)):
            return
        copies = 2 if self.duplication and world.chance(self.duplication) else 1
        for _ in range(copies):
            delay_s = _TRAVEL_S * (0.5 + world.rng.random())
            if self.slow_until > world.now:
                delay_s += world.rng.random() * self.slow_s * 4
            world.after(delay_s, to.process.deliver, take, what)

    # -- connections -----------------------------------------------------------------------
    def join(self, endpoint: Endpoint) -> None:
        """A new process listens, and connects with whom it knows."""
        self.endpoints.append(endpoint)
        self.world.after(_TRAVEL_S, self._connect, endpoint)

    def leave(self, endpoint: Endpoint) -> None:
        """The process is dead. Peers that can be reached hear its kernel reset the connections."""
        if endpoint not in self.endpoints:
            return
        self.endpoints.remove(endpoint)
        for connection in list(self.connections.values()):
            if endpoint in connection.ends:
                if connection.blocked():
                    self.world.after(PATIENCE_S, self._gone, connection)
                else:
                    connection.break_off(notice_s=(_TRAVEL_S, _TRAVEL_S))

    def _gone(self, connection: Connection) -> None:
        rng = self.world.rng
        connection.break_off(notice_s=(rng.random(), rng.random()))

    def _connect(self, endpoint: Endpoint) -> None:
        if not endpoint.process.alive or endpoint not in self.endpoints:
            return
        for other in self.endpoints:
            if other is not endpoint:
                self._try(endpoint, other)
        self.world.after(RETRY_S, self._connect, endpoint)

    def _try(self, a: Endpoint, b: Endpoint) -> None:
        key = self._key(a, b)
        if key in self.connections or a.process.frozen or b.process.frozen:
            return
        if self.streams(a, b) and self.streams(b, a) and a.wants(b) and b.wants(a):
            self.connections[key] = connection = Connection(self, (a, b))
            for end, other in ((a, b), (b, a)):
                self.world.after(_TRAVEL_S, end.process.deliver, self._tell, connection, end, other)

    @staticmethod
    def _key(a: Endpoint, b: Endpoint) -> tuple[str, str]:
        first, second = sorted((a.process.name, b.process.name))
        return first, second

    def _tell(self, connection: Connection, end: Endpoint, other: Endpoint) -> None:
        if not connection.noticed[0 if connection.ends[0] is end else 1]:
            end.connected(other)

    def forget(self, connection: Connection) -> None:
        """Both ends know, or are dead: another connection may be made."""
        a, b = connection.ends
        if all(connection.noticed[i] or not connection.ends[i].process.alive for i in (0, 1)):
            self.connections.pop(self._key(a, b), None)

    def send(self, sender: Endpoint, to: Endpoint, message: object) -> bool:
        """Over the connection with ``to``, if one stands as far as ``sender`` knows."""
        connection = self.connections.get(self._key(sender, to))
        if connection is None:
            return False
        side = 0 if connection.ends[0] is sender else 1
        if connection.noticed[side]:
            return False
        connection.send(sender, message)
        return True

    def reset(self, connection: Connection) -> None:
        """A connection is reset in the middle of things; this proves nothing about anybody."""
        connection.break_off(notice_s=(_TRAVEL_S, _TRAVEL_S * 2))
