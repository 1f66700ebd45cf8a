"""Nodes of a cluster network over loopback sockets, and what they were told."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import trio

from lockmgr.cluster.blocks import Heartbeat
from lockmgr.cluster.certificates import Credentials, make_credentials
from lockmgr.cluster.events import BeatHeard, DeathProven, StrangerCame
from lockmgr.cluster.network_events import Arrived, Connected, Lost, NetworkEvent
from lockmgr.cluster.network_settings import NetworkSettings
from lockmgr.cluster.peers import Address, Peer
from lockmgr.cluster.rpc import Network, PeerStatistics, open_network
from lockmgr.cluster.view import NodeId

ID = bytes(range(16))
SECRET = bytes(range(32))
LOOPBACK = Address("127.0.0.1", 0)
HASTY = NetworkSettings(
    greeting_s=0.6, probe_s=0.3, courtesy_s=0.02, ping_s=0.2, silence_s=0.8, look_s=0.1
)
"""Times for tests that wait for one to be over."""


@dataclass
class Node:
    """One network, with a name and a memory."""

    name: NodeId
    network: Network
    credentials: Credentials
    events: list[NetworkEvent] = field(default_factory=list)
    react: Callable[[NetworkEvent], None] | None = None

    @property
    def peer(self) -> Peer:
        return Peer(self.name, self.credentials.certificate, (self.network.address,))

    def told(self, event: NetworkEvent) -> None:
        """Check, remember, react."""
        self.network.check()
        self.events.append(event)
        check_order(self.events, event)
        if self.react is not None:
            self.react(event)

    def install(self, *others: Node, epoch: int = 1, secret: bytes = SECRET) -> None:
        """Talk to these."""
        self.network.install(self.name, epoch, [other.peer for other in others], secret)

    def of(self, kind: type, other: Node | None = None) -> list[Any]:
        """What was told of that kind, of that peer."""
        return [
            event
            for event in self.events
            if isinstance(event, kind)
            and (other is None or getattr(event, "peer", None) == other.name)
        ]

    def messages(self, other: Node) -> list[Any]:
        return [event.message for event in self.of(Arrived, other)]

    def beats(self) -> list[Heartbeat]:
        return [event.beat for event in self.of(BeatHeard)]

    def statistics(self, other: Node) -> PeerStatistics:
        return next(one for one in self.network.statistics() if one.peer == other.name)

    def connected(self, other: Node, least: int = 1) -> bool:
        """Is a connection up, on this side, with at least that number?"""
        return any(
            one.peer == other.name and one.number >= least for one in self.network.statistics()
        )


def check_order(events: list[NetworkEvent], event: NetworkEvent) -> None:
    """Connected, what arrives, Lost, and again; of growing numbers."""
    if isinstance(event, BeatHeard | DeathProven | StrangerCame):
        return
    before = [
        one for one in events[:-1] if isinstance(one, Connected | Lost) and one.peer == event.peer
    ]
    last = before[-1] if before else None
    if isinstance(event, Connected):
        assert last is None or (isinstance(last, Lost) and last.number < event.number), events
    else:
        assert isinstance(last, Connected) and last.number == event.number, events


async def until(condition: Callable[[], object], within_s: float = 20.0) -> None:
    """Wait for a condition; a test that waits too long fails."""
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110 - conditions of any kind
            await trio.sleep(0.002)


@asynccontextmanager
async def open_node(
    slot: int,
    settings: NetworkSettings | None = None,
    *,
    incarnation: int = 1,
    cluster_id: bytes = ID,
    credentials: Credentials | None = None,
    seed: int = 1,
) -> AsyncIterator[Node]:
    """A node that listens and knows nobody."""
    credentials = credentials or make_credentials()
    node: Node

    def deliver(event: NetworkEvent) -> None:
        node.told(event)

    async with open_network(
        credentials,
        cluster_id,
        LOOPBACK,
        deliver,
        rng=random.Random(seed * 100 + slot),
        settings=settings,
    ) as network:
        node = Node(NodeId(slot, incarnation), network, credentials)
        yield node


@asynccontextmanager
async def two_nodes(settings: NetworkSettings | None = None) -> AsyncIterator[tuple[Node, Node]]:
    """Connected with each other."""
    async with open_node(0, settings) as one, open_node(1, settings) as two:
        one.install(two)
        two.install(one)
        await until(lambda: one.connected(two) and two.connected(one))
        yield one, two


def without_addresses(node: Node) -> Peer:
    """A peer that cannot be dialed."""
    return replace(node.peer, addresses=())


class Relay:
    """Carries bytes between whoever connects and an address, until it is muted: then nothing comes
    through any more, and nobody learns of it."""

    def __init__(self, target: Address, address: Address) -> None:
        self.address = address
        self._target = target
        self._muted = False

    def mute(self) -> None:
        self._muted = True

    async def carry(self, stream: trio.SocketStream) -> None:
        """One connection."""
        other = await trio.open_tcp_stream(*self._target)
        async with stream, other, trio.open_nursery() as nursery:
            nursery.start_soon(self._copy, stream, other)
            nursery.start_soon(self._copy, other, stream)

    async def _copy(self, source: trio.SocketStream, target: trio.SocketStream) -> None:
        try:
            while data := await source.receive_some(1 << 16):
                if not self._muted:
                    await target.send_all(data)
            if not self._muted:
                await target.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            if not self._muted:
                await trio.aclose_forcefully(target)


@asynccontextmanager
async def open_relay(target: Address) -> AsyncIterator[Relay]:
    """Between a port of its own and ``target``."""
    listeners = await trio.open_tcp_listeners(0, host=LOOPBACK.host)
    relay = Relay(target, Address(*listeners[0].socket.getsockname()[:2]))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, relay.carry, listeners)
        yield relay
        nursery.cancel_scope.cancel()
