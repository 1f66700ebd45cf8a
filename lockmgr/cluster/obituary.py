"""What a supervisor does once it has reaped its daemon: tell the peers, in the daemon's name.

It has the incarnation's credentials, so it is believed; see `link_messages.Died`. A death that
nobody can be told of is found out by silence, some seconds later.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import trio

from lockmgr.cluster.certificates import Credentials
from lockmgr.cluster.connection import Connection
from lockmgr.cluster.greeting import Greeter, GreetingFailed
from lockmgr.cluster.link_messages import DEATH_NOTED, Died, connection_registry
from lockmgr.cluster.network_settings import NetworkSettings
from lockmgr.cluster.peers import Believed, Peer
from lockmgr.cluster.view import NodeId
from lockmgr.cluster.wire import Hello

AGAIN_S: Final = 0.2


async def report_death(
    credentials: Credentials,
    cluster_id: bytes,
    dead: NodeId,
    peers: Iterable[Peer],
    within_s: float = 5.0,
    settings: NetworkSettings | None = None,
) -> frozenset[NodeId]:
    """Tell every peer that ``dead``, whose credentials these are, has been reaped: those that have
    confirmed it. Only to be called when that is true: what it held is given to others.

    Who cannot be reached is tried again until ``within_s`` is over.
    """
    settings = settings or NetworkSettings()
    believed = Believed(credentials, peers)
    hello = Hello(cluster_id, dead.slot, dead.incarnation, 0, software="supervisor")
    greeter = Greeter(connection_registry(), settings, lambda: hello, lambda: believed)
    noted: set[NodeId] = set()

    async def tell(peer: Peer) -> None:
        while True:
            for address in peer.addresses:
                try:
                    connection = await greeter.outgoing(peer, address)
                except GreetingFailed:
                    continue
                connection.send(Died())
                await connection.run(_Deaf())
                if connection.goodbye == DEATH_NOTED:
                    noted.add(peer.node)
                    return
            await trio.sleep(AGAIN_S)

    with trio.move_on_after(within_s):
        async with trio.open_nursery() as nursery:
            for peer in believed.peers.values():
                nursery.start_soon(tell, peer)
    return frozenset(noted)


class _Deaf:
    """Waits for the end of a connection."""

    def arrived(self, connection: Connection, message: Any) -> None:
        """What was meant for the daemon."""

    def chosen(self, connection: Connection, number: int) -> None:
        """It will not last."""

    def died(self, connection: Connection) -> None:
        """It is the other one that is dead."""

    def lost(self, connection: Connection) -> None:
        """That was it."""
