"""Heartbeats as datagrams: one UDP socket, which never makes anybody wait.

A datagram that cannot be sent at once is lost, as one on the way may be; each kind of loss is
counted. What is received is believed for its HMAC alone; `HeartbeatFilter` drops what is old.

Concurrency: `Beats.listen` is one task; everything else is a plain call.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import trio

from lockmgr.cluster.blocks import Heartbeat
from lockmgr.cluster.codec import WireError
from lockmgr.cluster.datagram import (
    DATAGRAM_BYTES,
    HeartbeatFilter,
    decode_heartbeat,
    encode_heartbeat,
)
from lockmgr.cluster.door import LineLimit
from lockmgr.cluster.peers import Address
from lockmgr.cluster.wire import CLUSTER_ID_BYTES

AT_ONCE: Final = 128
"""Datagrams that are read before other tasks run: every node's, twice."""

PORT_TRIES: Final = 20

log = logging.getLogger("lockmgr.network")


@dataclass(slots=True)
class BeatCounts:
    """Datagrams, since the start."""

    sent: int = 0
    not_sent: int = 0
    heard: int = 0
    old: int = 0
    """Right, but not newer than what was heard before: duplicates, and late ones."""
    bad: int = 0
    """Not made with this view's secret, or not heartbeats at all."""


class Beats:
    """The heartbeat socket of a node. Closed with `close`."""

    def __init__(self, listen: Address, cluster_id: bytes) -> None:
        """Raises OSError if the address cannot be had."""
        self.counts = BeatCounts()
        self.on_install: Callable[[bytes, tuple[Address, ...]], None] | None = None
        """Told the same as `install`."""
        self._cluster_id = cluster_id
        self._secret: bytes | None = None
        self._targets: tuple[Address, ...] = ()
        self._filter = HeartbeatFilter()
        self._lines = LineLimit()
        family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        try:
            self._socket.setblocking(False)
            self._socket.bind((listen.host, listen.port))
        except BaseException:
            self._socket.close()
            raise

    def install(self, secret: bytes, targets: Iterable[Address]) -> None:
        """From now on with this secret, to these addresses."""
        self._secret = secret
        self._targets = tuple(targets)
        if self.on_install is not None:
            self.on_install(secret, self._targets)

    def send(self, heartbeat: Heartbeat) -> None:
        """To everybody, without waiting. Nothing before the first `install`."""
        if self._secret is None:
            return
        data = encode_heartbeat(heartbeat, self._cluster_id, self._secret)
        for address in self._targets:
            try:
                self._socket.sendto(data, (address.host, address.port))
                self.counts.sent += 1
            except OSError:  # no buffer, no route, refused by who was asked before: as if lost
                self.counts.not_sent += 1

    async def listen(self, heard: Callable[[Heartbeat], None]) -> None:
        """Report each new heartbeat, until cancelled."""
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            for _ in range(AT_ONCE):
                try:
                    data, source = self._socket.recvfrom(DATAGRAM_BYTES + 1)
                except BlockingIOError:
                    break
                except OSError:  # an ICMP answer to what was sent: reading takes it away
                    continue
                heartbeat = self._decoded(data, str(source[0]))
                if heartbeat is not None:
                    heard(heartbeat)

    def _decoded(self, data: bytes, source: str) -> Heartbeat | None:
        try:
            if self._secret is None:
                raise WireError("a heartbeat before this node knows a view")
            heartbeat = decode_heartbeat(data, self._cluster_id, self._secret)
        except WireError as error:
            self.counts.bad += 1
            more = self._lines.allow(trio.current_time())
            if more is not None:
                log.warning("datagram from %s dropped: %s%s", source, error, more)
            return None
        if not self._filter.is_new(heartbeat):
            self.counts.old += 1
            return None
        self.counts.heard += 1
        return heartbeat

    def fileno(self) -> int:
        """The socket's."""
        return self._socket.fileno()

    def close(self) -> None:
        """The socket is given back."""
        self._socket.close()


async def bind(listen: Address, cluster_id: bytes) -> tuple[list[trio.SocketListener], Beats]:
    """TCP and UDP on the same port; port 0: one that is free for both. Raises OSError, which names
    the address."""
    try:
        return await _bind(listen, cluster_id)
    except OSError as error:
        raise OSError(error.errno, f"cannot listen at {listen}: {error.strerror}") from error


async def _bind(listen: Address, cluster_id: bytes) -> tuple[list[trio.SocketListener], Beats]:
    if len(cluster_id) != CLUSTER_ID_BYTES:
        raise ValueError(f"a cluster id has {CLUSTER_ID_BYTES} bytes, not {len(cluster_id)}")
    for left in reversed(range(PORT_TRIES)):
        listeners = await trio.open_tcp_listeners(listen.port, host=listen.host)
        try:
            port = listeners[0].socket.getsockname()[1]
            return listeners, Beats(Address(listen.host, port), cluster_id)
        except OSError:
            for listener in listeners:
                listener.socket.close()
            if listen.port or not left:
                raise
    raise AssertionError
