"""What a supervisor does once it has reaped its daemon: tell the peers, in the daemon's name.

It has the incarnation's credentials, so it is believed; see `link_messages.Died`. A death that
nobody can be told of is found out by silence, some seconds later.

Whom to tell stands in a file, which the daemon writes whenever its peers change (`write_obituary`)
and removes when it has left the cluster. It is useless without the credentials, and those of
another incarnation do not fit it: an old file does no harm.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from lockmgr.cluster.certificates import Credentials
from lockmgr.cluster.connection import Connection
from lockmgr.cluster.greeting import Greeter, GreetingFailed
from lockmgr.cluster.link_messages import DEATH_NOTED, Died, connection_registry
from lockmgr.cluster.network_settings import NetworkSettings
from lockmgr.cluster.peer_book import Acquaintance
from lockmgr.cluster.peers import Believed, Peer, parse_address
from lockmgr.cluster.view import NEWCOMER_SLOT, NodeId
from lockmgr.cluster.wire import CLUSTER_ID_BYTES, Hello

log = logging.getLogger("lockmgr.network")

AGAIN_S: Final = 0.2
FORMAT: Final = 1
FILE_LIMIT: Final = 1 << 20


class BadObituary(Exception):
    """The file is not there, or says nothing that these credentials can use; in words."""


@dataclass(frozen=True, slots=True)
class Obituary:
    """What the file says."""

    cluster_id: bytes
    node: NodeId
    fingerprint: bytes
    peers: tuple[Peer, ...]


# -- the file ------------------------------------------------------------------------------------
def write_obituary(
    path: Path, cluster_id: bytes, credentials: Credentials, known: Acquaintance
) -> None:
    """Write the file, in one piece, for its owner only. If that fails it is logged: nothing but
    some seconds are lost. A few KiB, meant for a tmpfs (/run): it does not wait for a disk."""
    text = json.dumps(
        {
            "format": FORMAT,
            "cluster_id": cluster_id.hex(),
            "node": list(known.own),
            "fingerprint": credentials.fingerprint.hex(),
            "peers": [
                {
                    "node": list(peer.node),
                    "certificate": peer.certificate.hex(),
                    "addresses": [str(address) for address in peer.addresses],
                }
                for peer in known.peers
                if peer.node.slot != NEWCOMER_SLOT
            ],
        }
    )
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "w", encoding="ascii") as file:
            file.write(text)
        new.replace(path)
    except OSError as error:
        log.warning(
            "%s cannot be written (%s): if this daemon dies, the others notice it late", path, error
        )


def remove_obituary(path: Path) -> None:
    """This incarnation has left: nobody is to be told."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s cannot be removed: %s", path, error)


def read_obituary(path: Path) -> Obituary:
    """Raises `BadObituary`."""
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(FILE_LIMIT))
        if found["format"] != FORMAT:
            raise BadObituary(f"{path} has format {found['format']!r:.20}, not {FORMAT}")
        obituary = Obituary(
            bytes.fromhex(found["cluster_id"]),
            NodeId(*map(int, found["node"])),
            bytes.fromhex(found["fingerprint"]),
            tuple(
                Peer(
                    NodeId(*map(int, peer["node"])),
                    bytes.fromhex(peer["certificate"]),
                    tuple(parse_address(text) for text in peer["addresses"]),
                )
                for peer in found["peers"]
            ),
        )
    except OSError as error:
        raise BadObituary(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise BadObituary(f"{path} is damaged: {error!r:.100}") from None
    if len(obituary.cluster_id) != CLUSTER_ID_BYTES:
        raise BadObituary(f"{path} is damaged: a cluster id of {len(obituary.cluster_id)} bytes")
    return obituary


async def report_death_from(
    path: Path,
    credentials: Credentials,
    within_s: float = 5.0,
    settings: NetworkSettings | None = None,
) -> frozenset[NodeId]:
    """`report_death` to whom the file names, and remove the file once somebody has confirmed it.

    ``credentials`` are those that the dead daemon had. Raises `BadObituary`.
    """
    obituary = read_obituary(path)
    if obituary.fingerprint != credentials.fingerprint:
        raise BadObituary(f"{path} is of another incarnation than the one that has died")
    noted = await report_death(
        credentials, obituary.cluster_id, obituary.node, obituary.peers, within_s, settings
    )
    if noted:
        remove_obituary(path)
    return noted


# -- the message ---------------------------------------------------------------------------------


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
