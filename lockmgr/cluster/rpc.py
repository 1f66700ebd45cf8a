"""The trio shell of the cluster's network: connections with every peer, and heartbeats.

    async with open_network(credentials, cluster_id, address, deliver, rng=rng) as network:
        network.install(own, view.epoch, peers_in(view, certificates, own), view.secret)
        network.send(peer, message)

There are no calls with answers: the protocols above are of messages. What is told goes to
``deliver``, a plain call that must not wait: it runs to its end before anything else is told, and
may itself call everything here that is not async.

Concurrency: one task listens, one for each peer dials and serves what it has dialed, each
connection that comes in has its own (`Connection.run` with its child), one looks at them all from
time to time, one reads datagrams. State changes between their checkpoints only. ``deliver`` is
called from these tasks, never from within `install`, `send`, or `beat`. An exception from it ends
the network: what a state machine has not taken in cannot be told again.

Who is in the way of nobody: a peer that takes nothing fills its own queue and is lost for it.
"""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import trio

from lockmgr.cluster.beats import BeatCounts, Beats, bind
from lockmgr.cluster.blocks import Heartbeat
from lockmgr.cluster.certificates import Credentials
from lockmgr.cluster.codec import Registry, WireError
from lockmgr.cluster.connection import Connection
from lockmgr.cluster.door import Door
from lockmgr.cluster.events import BeatHeard, DeathProven, StrangerCame
from lockmgr.cluster.greeting import Greeter, GreetingFailed
from lockmgr.cluster.link_messages import DEATH_NOTED, Chosen, connection_registry
from lockmgr.cluster.network_events import Arrived, Connected, Lost, NetworkEvent
from lockmgr.cluster.network_settings import NetworkSettings
from lockmgr.cluster.pair import Pair, PeerStatistics
from lockmgr.cluster.peers import Address, Believed, Peer
from lockmgr.cluster.view import NodeId
from lockmgr.cluster.wire import Hello

__all__ = ["Network", "PeerStatistics", "open_network"]

log = logging.getLogger("lockmgr.network")

SLEPT_S = 1.0


@asynccontextmanager
async def open_network(
    credentials: Credentials,
    cluster_id: bytes,
    listen: Address,
    deliver: Callable[[NetworkEvent], None],
    *,
    rng: random.Random,
    settings: NetworkSettings | None = None,
    registry: Registry | None = None,
    software: str = "",
) -> AsyncIterator[Network]:
    """A network without peers; `Network.install` gives it some. Port 0: any that is free.

    ``registry`` is a `connection_registry`, maybe with more in it. On leaving, what is queued is
    sent within `goodbye_s`, and nothing is delivered any more. Raises OSError if the address cannot
    be had.
    """
    listeners, beats = await bind(listen, cluster_id)
    host, port = listeners[0].socket.getsockname()[:2]
    try:
        async with trio.open_nursery() as nursery:
            network = Network(
                nursery,
                credentials,
                Hello(cluster_id, 0, 0, 0, software=software),
                Address(host, port),
                deliver,
                beats,
                rng,
                settings or NetworkSettings(),
                registry or connection_registry(),
            )
            nursery.start_soon(network._door.listen, listeners, nursery)
            nursery.start_soon(network._look_for_ever)
            nursery.start_soon(beats.listen, network._heard)
            yield network
            await network._close()
            nursery.cancel_scope.cancel()
    finally:
        beats.close()
        for listener in listeners:
            listener.socket.close()


class Network:
    """Made by `open_network`. Nothing here waits but what is async."""

    def __init__(
        self,
        nursery: trio.Nursery,
        credentials: Credentials,
        hello: Hello,
        address: Address,
        deliver: Callable[[NetworkEvent], None],
        beats: Beats,
        rng: random.Random,
        settings: NetworkSettings,
        registry: Registry,
    ) -> None:
        self.address = address
        """Where it listens."""
        self._nursery = nursery
        self._credentials = credentials
        self._hello = hello
        self._settings = settings
        self._rng = rng
        self._beats = beats
        self._tell = deliver
        self._own: NodeId | None = None
        self._pairs: dict[NodeId, Pair] = {}
        self._open: dict[Connection, Pair] = {}
        """Every connection that is past its greeting."""
        self._numbers = count(1)
        self._believed = Believed(credentials)
        self._greeter = Greeter(registry, settings, lambda: self._hello, lambda: self._believed)
        self._door = Door(self._greeter, settings, self._serve, self._unknown_came)
        self._closing = False
        self._all_closed = trio.Event()

    # -- what the node wants -------------------------------------------------------------------
    def install(self, own: NodeId, epoch: int, peers: Iterable[Peer], secret: bytes) -> None:
        """From now on this node is ``own``, and talks to these peers and to nobody else.

        Connections with others are closed, after what has been queued for them; so are all, if
        ``own`` is new. One certificate is one node: a newcomer whose join block is still there
        when the view lists it is the member, and this node's own join block is nobody.
        """
        wanted = self._without_doubles(own, peers)
        if wanted != self._believed.peers:
            self._believed = Believed(self._credentials, wanted.values())
        renamed, self._own = self._own != own, own
        self._hello = Hello(
            self._hello.cluster_id,
            own.slot,
            own.incarnation,
            epoch,
            software=self._hello.software,
        )
        for node, pair in list(self._pairs.items()):
            peer = wanted.get(node)
            if renamed:
                self._drop(pair, f"this node is {own} now")
            elif peer is None or peer.certificate != pair.peer.certificate:
                self._drop(pair, f"node {node} is not listed any more")
            else:
                pair.peer = peer
        for node, peer in wanted.items():
            if node not in self._pairs:
                pair = self._pairs[node] = Pair(own, peer, self._settings, self._rng)
                self._nursery.start_soon(self._dial_for_ever, pair)
        self._beats.install(
            secret, [address for peer in wanted.values() for address in peer.addresses]
        )

    def _without_doubles(self, own: NodeId, peers: Iterable[Peer]) -> dict[NodeId, Peer]:
        """By name, members before newcomers."""
        found: dict[NodeId, Peer] = {}
        seen = {self._credentials.fingerprint}
        for peer in sorted(peers, key=lambda peer: peer.node):
            if peer.node != own and peer.fingerprint not in seen:
                seen.add(peer.fingerprint)
                found[peer.node] = peer
        return found

    def _drop(self, pair: Pair, reason: str) -> None:
        del self._pairs[pair.peer.node]
        pair.end(reason)

    def send(self, peer: NodeId, message: object) -> bool:
        """Queue a message for the peer; False: there is no connection, and the message is lost.

        Raises ValueError for a message that no peer could take.
        """
        pair = self._pairs.get(peer)
        if pair is None:
            return False
        if pair.used is not None and pair.used.send(message):
            return True
        pair.traffic.dropped += 1
        return False

    def refuse(self, peer: NodeId, reason: str) -> None:
        """The peer breaks the protocol of a layer above: close the connection with these words.

        It is told as `Lost`, and made again. To be called from within ``deliver``, too.
        """
        pair = self._pairs.get(peer)
        if pair is not None and pair.used is not None:
            pair.used.refuse(reason)

    async def wait_room(self, peer: NodeId) -> None:
        """Until little is queued for the peer, or there is no connection. For whoever has much to
        send and can wait; what cannot wait is sent all the same."""
        pair = self._pairs.get(peer)
        if pair is not None and pair.used is not None:
            await pair.used.wait_room()
        else:
            await trio.lowlevel.checkpoint()

    def beat(self, heartbeat: Heartbeat) -> None:
        """A datagram to every peer."""
        self._beats.send(heartbeat)

    @property
    def cluster_id(self) -> bytes:
        """What all nodes have in common."""
        return self._hello.cluster_id

    @property
    def beat_socket_fd(self) -> int:
        """The heartbeat socket, for whoever sends from elsewhere."""
        return self._beats.fileno()

    def beats_follow(self, told: Callable[[bytes, tuple[Address, ...]], None]) -> None:
        """Whoever sends heartbeats is told of each `install`: the secret, and where to."""
        self._beats.on_install = told

    async def knock(self, peers: Iterable[Peer], within_s: float = 1.0) -> frozenset[NodeId]:
        """Those that prove, at one of their addresses, that they live. They need not know this
        node; it need not have them installed."""
        answered: set[NodeId] = set()

        async def one(peer: Peer, address: Address) -> None:
            try:
                tls = await self._greeter.secured(peer, address)
            except GreetingFailed:
                return
            answered.add(peer.node)
            await trio.aclose_forcefully(tls)

        with trio.move_on_after(within_s):
            async with trio.open_nursery() as nursery:
                for peer in peers:
                    for address in peer.addresses:
                        nursery.start_soon(one, peer, address)
        return frozenset(answered)

    def statistics(self) -> tuple[PeerStatistics, ...]:
        """Of every peer, by slot."""
        return tuple(self._pairs[node].statistics() for node in sorted(self._pairs))

    @property
    def beat_counts(self) -> BeatCounts:
        """Datagrams so far."""
        return self._beats.counts

    # -- connections that go out ---------------------------------------------------------------
    async def _dial_for_ever(self, pair: Pair) -> None:
        while await pair.wait_unconnected():
            connection = None
            with pair.interruptible():
                await trio.sleep(pair.next_pause_s())
                connection = await self._dial(pair)
            if connection is not None:
                await self._serve(connection)

    async def _dial(self, pair: Pair) -> Connection | None:
        addresses = pair.peer.addresses
        if not addresses:
            await trio.sleep(self._settings.redial_most_s)
            return None
        address = addresses[pair.address % len(addresses)]
        try:
            return await self._greeter.outgoing(pair.peer, address)
        except GreetingFailed as error:
            pair.address += 1
            if str(error) != pair.last_words:
                pair.last_words = str(error)
                log.info("node %s cannot be reached at %s: %s", pair.peer.node, address, error)
            return None

    # -- connections that are past their greeting ----------------------------------------------
    async def _serve(self, connection: Connection) -> None:
        """Use it if it is to be used, until it ends."""
        pair = self._pairs.get(connection.peer)
        if pair is None or self._closing:
            connection.fail("it is not wanted any more", "not wanted any more")
            await connection.run(self)
            return
        self._open[connection] = pair
        pair.admit(connection)
        try:
            async with trio.open_nursery() as nursery:
                if pair.chooses:
                    nursery.start_soon(self._choose, pair, connection)
                await connection.run(self)
                nursery.cancel_scope.cancel()
        finally:
            del self._open[connection]
            pair.discard(connection)
            if self._closing and not self._open:
                self._all_closed.set()
            await connection.cut()

    async def _choose(self, pair: Pair, connection: Connection) -> None:
        """Take this connection, unless there is one that lives."""
        while (elder := pair.used) is not None and connection.failure is None:
            if await elder.probe(self._settings.probe_s):
                connection.fail("there is another that lives", "another connection lives")
            elif pair.used is elder:
                elder.fail("it is silent, and the peer has made another", forget=True)
                self._report(pair, elder)
        if connection.failure is None:
            number = next(self._numbers)
            connection.send(Chosen(number))
            self._use(pair, connection, number)

    def _use(self, pair: Pair, connection: Connection, number: int) -> None:
        for other, its_pair in list(self._open.items()):
            if other.peer == connection.peer and other is not connection and other.number:
                other.fail("another connection takes its place", forget=True)
                self._report(its_pair, other)
        if connection.failure is None:  # who was told of the loss may have wanted this too
            pair.use(connection, number)
            self._deliver(Connected(connection.peer, number, connection.agreed))

    def _report(self, pair: Pair, connection: Connection) -> None:
        """Tell of the loss, once."""
        if pair.used is connection:
            pair.discard(connection)
            reason = pair.traffic.last_loss = connection.failure or ""
            level = logging.INFO if connection.announced else logging.WARNING
            log.log(level, "connection with node %s lost: %s", connection.peer, reason)
            self._deliver(Lost(connection.peer, connection.number, reason))

    # -- what a connection tells (connection.Receiver) -----------------------------------------
    def arrived(self, connection: Connection, message: Any) -> None:
        """A message of the peer's."""
        if not connection.number:
            raise WireError(f"{type(message).__name__} before the connection was chosen")
        self._deliver(Arrived(connection.peer, connection.number, message))

    def chosen(self, connection: Connection, number: int) -> None:
        """The peer chooses."""
        pair = self._open[connection]
        if pair.chooses or connection.number:
            raise WireError("the peer chooses what is not its to choose")
        if number <= pair.number:
            connection.fail("it was chosen before the one in use", "chosen too late")
        else:
            self._use(pair, connection, number)

    def died(self, connection: Connection) -> None:
        """The peer's supervisor says so."""
        used = self._open[connection].used
        if used is not None and used is not connection:
            used.fail("the peer is dead", forget=True)
            self._report(self._open[connection], used)
        connection.fail("the peer is dead", DEATH_NOTED)
        self._deliver(DeathProven(connection.peer))

    def lost(self, connection: Connection) -> None:
        """It has failed."""
        pair = self._open.get(connection)
        if pair is not None:
            self._report(pair, connection)

    # -- all of them ---------------------------------------------------------------------------
    def _deliver(self, event: NetworkEvent) -> None:
        if self._closing:
            return
        try:
            self._tell(event)
        except BaseException:
            self._closing = True
            raise

    def _unknown_came(self) -> None:
        self._deliver(StrangerCame())

    def _heard(self, heartbeat: Heartbeat) -> None:
        self._deliver(BeatHeard(heartbeat))

    async def _look_for_ever(self) -> None:
        looked_s = trio.current_time()
        while True:
            await trio.sleep(self._settings.look_s)
            now = trio.current_time()
            slept = now - looked_s > self._settings.look_s + SLEPT_S
            looked_s = now
            for connection in list(self._open):
                if connection.failure is None:
                    connection.look(now, slept)

    async def _close(self) -> None:
        """Say goodbye to everybody."""
        self._closing = True
        for pair in self._pairs.values():
            pair.end("this node closes its connections")
        if self._open:
            with trio.move_on_after(self._settings.goodbye_s):
                await self._all_closed.wait()

    def check(self) -> None:
        """Assert the invariants of every pair."""
        for node, pair in self._pairs.items():
            assert pair.peer.node == node and (pair.gone is None or self._closing)
            pair.check()
