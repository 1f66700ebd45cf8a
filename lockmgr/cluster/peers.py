"""Who is believed: the nodes that this one talks to, each with its certificate and addresses.

A `Peer` is checked when it is made, so what comes from a LUN is looked at in one place. Addresses
are numeric: a name service that is away must not keep a cluster from coming together.
"""

from __future__ import annotations

import ipaddress
import logging
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple

from lockmgr.cluster.certificates import (
    BadCertificate,
    Credentials,
    check_certificate,
    client_context,
    fingerprint_of,
    server_context,
)
from lockmgr.cluster.view import NodeId, View

DEFAULT_PORT: Final = 21065
"""Of TCP, for connections, and of UDP, for heartbeats."""

log = logging.getLogger("lockmgr.network")


class Address(NamedTuple):
    """Where a node listens, TCP and UDP."""

    host: str
    """IPv4 or IPv6, numeric."""
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """``192.0.2.1``, ``192.0.2.1:21065``, ``2001:db8::1``, ``[2001:db8::1]:21065``.

    Raises ValueError in words.
    """
    host, port = text, ""
    if text.startswith("["):
        host, bracket, port = text[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            raise ValueError(f"{text!r:.60} is no address: [IPV6]:PORT expected")
        port = port[1:]
    elif text.count(":") == 1:
        host, _colon, port = text.partition(":")
    if port and not (port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise ValueError(f"{text!r:.60} has no port between 1 and 65535")
    try:
        number = ipaddress.ip_address(host)
    except ValueError:
        raise ValueError(f"{text!r:.60} is no numeric IP address, with or without a port") from None
    if number.is_unspecified or number.is_multicast:
        raise ValueError(f"{text!r:.60} is not one node's address")
    return Address(str(number), int(port) if port else DEFAULT_PORT)


@dataclass(frozen=True, slots=True)
class Peer:
    """A node to be connected with. Raises `BadCertificate`."""

    node: NodeId
    certificate: bytes
    """DER."""
    addresses: tuple[Address, ...] = ()

    def __post_init__(self) -> None:
        check_certificate(self.certificate)

    @property
    def fingerprint(self) -> bytes:
        return fingerprint_of(self.certificate)


def peers_in(view: View, certificates: Mapping[bytes, bytes], own: NodeId) -> tuple[Peer, ...]:
    """Everybody whom the view lists but the node itself. ``certificates``: by fingerprint, from
    the slot and join blocks.

    Whose certificate is not there, or is none, is left out and logged; the others are not harmed.
    """
    found = []
    for node in view.listed:
        slot = view.slots[node.slot]
        certificate = certificates.get(slot.fingerprint)
        if node == own:
            continue
        if certificate is None or fingerprint_of(certificate) != slot.fingerprint:
            log.info("node %s cannot be connected with: its certificate is missing", node)
            continue
        try:
            found.append(Peer(node, certificate, addresses_of(node, slot.addresses)))
        except BadCertificate as error:
            log.warning("node %s cannot be connected with: it has %s", node, error)
    return tuple(found)


def addresses_of(node: NodeId, texts: Iterable[str]) -> tuple[Address, ...]:
    """Where a node says that it listens; what is no address is logged and left out."""
    found = []
    for text in texts:
        try:
            found.append(parse_address(text))
        except ValueError as error:
            log.warning("an address of node %s cannot be used: %s", node, error)
    return tuple(found)


class Believed:
    """The peers of one moment, and the TLS contexts that know them. Never changed."""

    def __init__(self, ours: Credentials, peers: Iterable[Peer] = ()) -> None:
        self.peers = {peer.node: peer for peer in peers}
        self._ours = ours
        self._by_fingerprint = {peer.fingerprint: peer for peer in self.peers.values()}
        if len(self._by_fingerprint) != len(self.peers):
            raise ValueError("two peers with one certificate")
        if ours.fingerprint in self._by_fingerprint:
            raise ValueError("a peer with this node's own certificate")

    @cached_property
    def for_incoming(self) -> ssl.SSLContext:
        """Believes every peer."""
        return server_context(self._ours, (peer.certificate for peer in self.peers.values()))

    def for_dialing(self, peer: Peer) -> ssl.SSLContext:
        """Believes that peer only."""
        return client_context(self._ours, peer.certificate)

    def who(self, certificate: bytes) -> Peer | None:
        """Whose certificate that is; None: nobody's whom this node talks to."""
        return self._by_fingerprint.get(fingerprint_of(certificate))
