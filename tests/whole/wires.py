"""The network between hosts: the interface of `lockmgr.cluster.rpc.Network`, without sockets.

A connection is in order and without loss until it breaks; then what was on its way is gone, and
both ends are told in their own time. A cut stops what is sent; who hears nothing for 5 s loses its
connections. Datagrams are lost, late, or come twice.

Everything that a host is told comes to it through an inbox, whose task runs on that host: a frozen
one finds it all when it is thawed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from heapq import heappop, heappush
from itertools import count
from random import Random
from typing import Any, Final

import trio

from lockmgr.cluster.beats import BeatCounts
from lockmgr.cluster.blocks import Heartbeat
from lockmgr.cluster.certificates import Credentials
from lockmgr.cluster.codec import Registry
from lockmgr.cluster.datagram import HeartbeatFilter
from lockmgr.cluster.events import BeatHeard, DeathProven, StrangerCame
from lockmgr.cluster.link_messages import connection_registry
from lockmgr.cluster.network_events import Arrived, Connected, Lost, NetworkEvent
from lockmgr.cluster.pair import PeerStatistics
from lockmgr.cluster.peers import Address, Peer
from lockmgr.cluster.view import NodeId
from lockmgr.cluster.wire import Agreed

SILENCE_S: Final = 5.0
_DIAL_S: Final = (0.05, 0.4)
_TRIPS_S: Final = (0.0001, 0.0003, 0.0003, 0.002, 0.03)


class Link:
    """A connection between two networks."""

    def __init__(self, number: int, one: SimulatedNetwork, other: SimulatedNetwork) -> None:
        self.number = number
        self.ends = (one, other)
        self.names = {one: one.own, other: other.own}
        self.broken = False
        self.arrives_at = {one: 0.0, other: 0.0}
        self.stalled: list[tuple[SimulatedNetwork, NetworkEvent]] = []

    def other(self, end: SimulatedNetwork) -> SimulatedNetwork:
        return self.ends[1] if end is self.ends[0] else self.ends[0]


class Wires:
    """All of the network."""

    def __init__(self, rng: Random, tell: Callable[[str], None]) -> None:
        self.rng = rng
        self.tell = tell
        self.networks: dict[str, SimulatedNetwork] = {}
        """By host, of the daemon that runs there."""
        self.registry: Registry = connection_registry()
        self.numbers = count(1)
        self.order = count()
        self.cuts: set[frozenset[str]] = set()
        """Pairs of hosts that do not reach each other."""
        self.silent: set[str] = set()
        """Hosts that are frozen, or without power: what comes for them waits."""
        self.loss = 0.02
        self.links: list[Link] = []

    def reach(self, one: SimulatedNetwork, other: SimulatedNetwork) -> bool:
        """Does what one sends come to the other?"""
        return frozenset((one.host, other.host)) not in self.cuts

    def hears(self, network: SimulatedNetwork) -> bool:
        """Does it answer?"""
        return network.host not in self.silent and not network.closed

    # -- connections -----------------------------------------------------------------------------
    def connect(self, one: SimulatedNetwork, peer: Peer) -> None:
        """One dials; there is a connection if the other wants it."""
        other = next((n for n in self.networks.values() if n.fingerprint == peer.fingerprint), None)
        if other is None or one.own is None or not (self.hears(other) and self.reach(one, other)):
            return
        known = other.peers.get(one.own)
        if other.own != peer.node or known is None or known.fingerprint != one.fingerprint:
            return
        if one.own in other.links:  # the other does not know yet that it is lost
            self.break_link(other.links[one.own], "another connection takes its place")
        link = Link(next(self.numbers), one, other)
        self.links.append(link)
        for end in link.ends:
            name = link.names[link.other(end)]
            assert name is not None
            end.links[name] = link
            self.carry(link, end, Connected(name, link.number, Agreed(name, 1, 0, 0, "")))

    def carry(self, link: Link, to: SimulatedNetwork, event: NetworkEvent) -> None:
        """Over a connection, behind all that is on its way there."""
        if not self.reach(*link.ends):
            link.stalled.append((to, event))
            return
        at = trio.current_time() + self.rng.choice(_TRIPS_S)
        at = link.arrives_at[to] = max(at, link.arrives_at[to])
        to.expect(at, event, link)

    def break_link(self, link: Link, why: str) -> None:
        """For both ends; what is on its way is lost, or arrives before."""
        if link.broken:
            return
        link.broken = True
        self.links.remove(link)
        for end in link.ends:
            name = link.names[link.other(end)]
            assert name is not None
            if end.links.get(name) is link:
                del end.links[name]
            at = max(trio.current_time() + self.rng.choice(_TRIPS_S), link.arrives_at[end])
            if self.rng.random() < 0.5:  # some of it is lost
                at = end.drop_some(link, self.rng)
            end.expect(at, Lost(name, link.number, why), link)

    def cut(self, one: str, other: str) -> None:
        """Nothing comes through between them."""
        self.cuts.add(frozenset((one, other)))

    def heal(self) -> None:
        """Everybody reaches everybody; what has waited comes."""
        self.cuts.clear()
        for link in self.links:
            stalled, link.stalled = link.stalled, []
            for to, event in stalled:
                self.carry(link, to, event)

    async def watch(self) -> None:
        """Lose the connections that have been silent for too long."""
        since: dict[Link, float] = {}
        while True:
            await trio.sleep(0.5)
            now = trio.current_time()
            for link in list(self.links):
                silent = not self.reach(*link.ends) or any(n.host in self.silent for n in link.ends)
                if not silent:
                    since.pop(link, None)
                elif now - since.setdefault(link, now) > SILENCE_S:
                    self.break_link(link, "it is silent")

    def death(self, host: str, node: NodeId) -> None:
        """The supervisor there says that this incarnation is dead."""
        for network in self.networks.values():
            if node in network.peers and frozenset((host, network.host)) not in self.cuts:
                network.expect(trio.current_time() + 0.01, DeathProven(node), None)


class SimulatedNetwork:
    """What a daemon has instead of a `Network`."""

    def __init__(
        self,
        wires: Wires,
        host: str,
        credentials: Credentials,
        cluster_id: bytes,
        listen: Address,
        deliver: Callable[[NetworkEvent], None],
    ) -> None:
        self.address = listen
        self.cluster_id = cluster_id
        self.beat_socket_fd = -1
        self.beat_counts = BeatCounts()
        self.host = host
        self.fingerprint = credentials.fingerprint
        self.own: NodeId | None = None
        self.peers: dict[NodeId, Peer] = {}
        self.links: dict[NodeId, Link] = {}
        self.closed = False
        self._wires = wires
        self._deliver = deliver
        self._secret = b""
        self._filter = HeartbeatFilter()
        self._inbox: list[tuple[float, int, NetworkEvent, Link | None]] = []
        self._news = trio.Event()

    # -- what a daemon asks ----------------------------------------------------------------------
    def install(self, own: NodeId, epoch: int, peers: Iterable[Peer], secret: bytes) -> None:
        """See `Network.install`."""
        del epoch
        renamed, self.own, self._secret = own != self.own, own, secret
        self.peers = {}
        seen = {self.fingerprint}
        for peer in sorted(peers, key=lambda peer: peer.node):
            if peer.node != own and peer.fingerprint not in seen:
                seen.add(peer.fingerprint)
                self.peers[peer.node] = peer
        for node, link in list(self.links.items()):
            if renamed or node not in self.peers:
                self._wires.break_link(link, f"node {node} is not wanted any more")

    def send(self, peer: NodeId, message: object) -> bool:
        """See `Network.send`."""
        link = self.links.get(peer)
        if link is None or self.closed:
            return False
        registry = self._wires.registry
        copy = registry.decode(*registry.encode(message))
        assert self.own is not None
        self._wires.carry(link, link.other(self), Arrived(self.own, link.number, copy))
        return True

    def refuse(self, peer: NodeId, reason: str) -> None:
        """See `Network.refuse`."""
        self._wires.tell(f"{self.host} refuses {peer}: {reason}")
        if peer in self.links:
            self._wires.break_link(self.links[peer], reason)

    async def wait_room(self, peer: NodeId) -> None:
        """There is always room."""
        del peer
        await trio.lowlevel.checkpoint()

    def beat(self, heartbeat: Heartbeat) -> None:
        """See `Network.beat`."""
        wires = self._wires
        for peer in self.peers.values():
            for other in wires.networks.values():
                if other.address not in peer.addresses or not wires.reach(self, other):
                    continue
                while wires.rng.random() > wires.loss:
                    late_s = wires.rng.choice((*_TRIPS_S, 0.3))
                    other.expect(trio.current_time() + late_s, BeatHeard(heartbeat), None)
                    if wires.rng.random() > wires.loss:
                        break  # else it comes twice

    def beats_follow(self, told: Callable[[bytes, tuple[Address, ...]], None]) -> None:
        """Nobody else sends heartbeats."""

    async def knock(self, peers: Iterable[Peer], within_s: float = 1.0) -> frozenset[NodeId]:
        """See `Network.knock`."""
        wires, peers = self._wires, tuple(peers)
        await trio.sleep(0.002)
        answered = set()
        for peer in peers:
            for other in wires.networks.values():
                is_there = other.fingerprint == peer.fingerprint and wires.hears(other)
                if is_there and wires.reach(self, other):
                    answered.add(peer.node)
                    other.expect(trio.current_time(), StrangerCame(), None)
        if len(answered) < len(peers):
            await trio.sleep(within_s)
        return frozenset(answered)

    def statistics(self) -> tuple[PeerStatistics, ...]:
        """Nobody looks."""
        return ()

    # -- what it is told -------------------------------------------------------------------------
    def expect(self, at: float, event: NetworkEvent, link: Link | None) -> None:
        """It comes at that time."""
        if not self.closed:
            heappush(self._inbox, (at, next(self._wires.order), event, link))
            self._news.set()

    def drop_some(self, link: Link, rng: Random) -> float:
        """Lose the last of what is on its way over a connection; when what is left has come."""
        mine = sorted(item for item in self._inbox if item[3] is link)
        left = mine[: rng.randrange(len(mine) + 1)]
        if mine and not any(isinstance(item[2], Connected) for item in mine[len(left) :]):
            lost = {item[1] for item in mine[len(left) :]}
            self._inbox[:] = sorted(item for item in self._inbox if item[1] not in lost)
            mine = left
        return max([trio.current_time(), *(item[0] for item in mine)])

    async def run(self) -> None:
        """Deliver, for ever."""
        while True:
            while self._inbox and self._inbox[0][0] <= trio.current_time():
                event = heappop(self._inbox)[2]
                if not isinstance(event, BeatHeard) or self._is_believed(event):
                    self._deliver(event)
            self._news = trio.Event()
            with trio.move_on_at(self._inbox[0][0] if self._inbox else float("inf")):
                await self._news.wait()

    def _is_believed(self, event: BeatHeard) -> bool:
        beat = event.beat
        wanted = any(node == (beat.slot, beat.incarnation) for node in self.peers)
        return wanted and self._filter.is_new(beat)

    async def dial(self) -> None:
        """Connect with whom there is no connection, for ever."""
        while True:
            await trio.sleep(self._wires.rng.uniform(*_DIAL_S))
            for node, peer in list(self.peers.items()):
                if peer.addresses and node not in self.links:
                    self._wires.connect(self, peer)

    def close(self, why: str) -> None:
        """The daemon is gone."""
        if not self.closed:
            self.closed = True
            for link in list(self.links.values()):
                self._wires.break_link(link, why)


def opener(wires: Wires, host_of: Callable[[Credentials], str]) -> Callable[..., Any]:
    """What takes the place of `lockmgr.cluster.rpc.open_network`."""

    @asynccontextmanager
    async def open_network(
        credentials: Credentials,
        cluster_id: bytes,
        listen: Address,
        deliver: Callable[[NetworkEvent], None],
        **_more: Any,
    ) -> AsyncIterator[SimulatedNetwork]:
        host = host_of(credentials)
        network = SimulatedNetwork(wires, host, credentials, cluster_id, listen, deliver)
        wires.networks[host] = network
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(network.run)
                nursery.start_soon(network.dial)
                yield network
                nursery.cancel_scope.cancel()
        finally:
            network.close("the peer has ended")
            if wires.networks.get(host) is network:
                del wires.networks[host]

    return open_network
