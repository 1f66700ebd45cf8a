"""From a TCP connection to a peer that is known: TLS 1.3, whose certificate, then the Hellos.

TLS proves that the other side has the key of a certificate that was believed when the connection
came; the view may have changed meanwhile, so who it is is looked up afterwards, in what is believed
then, by the certificate's fingerprint. Nothing is said to anybody before that.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any

import trio

from lockmgr.cluster.codec import Registry, WireError
from lockmgr.cluster.connection import Connection, cause_of
from lockmgr.cluster.network_settings import NetworkSettings
from lockmgr.cluster.peers import Address, Believed, Peer
from lockmgr.cluster.view import NodeId
from lockmgr.cluster.wire import Hello, WireLink


class GreetingFailed(Exception):
    """In words; the TCP connection is closed."""

    def __init__(self, words: str, *, left: bool = False, unknown: bool = False) -> None:
        """``left``: the other side has gone away by itself, as one does that dials and is
        connected the other way meanwhile. ``unknown``: it has a certificate, but not one that is
        believed; a node may dial before the view that lists it has come here."""
        super().__init__(words)
        self.left = left
        self.unknown = unknown


class Greeter:
    """What a greeting needs to know of its node, as it is at that moment."""

    def __init__(
        self,
        registry: Registry,
        settings: NetworkSettings,
        hello: Callable[[], Hello],
        believed: Callable[[], Believed],
    ) -> None:
        self._registry = registry
        self._settings = settings
        self._hello = hello
        self._believed = believed

    async def incoming(self, stream: trio.SocketStream) -> Connection:
        """Of whoever dialed. Raises `GreetingFailed`; the caller sets the time limit."""
        tls = trio.SSLStream(stream, self._believed().for_incoming, server_side=True)
        return await self._greet(tls, None)

    async def outgoing(self, peer: Peer, address: Address) -> Connection:
        """Dial. Raises `GreetingFailed`."""
        with trio.move_on_after(self._settings.greeting_s):
            tls = await self.secured(peer, address)
            return await self._greet(tls, peer.node)
        raise GreetingFailed(f"{address} has not answered within {self._settings.greeting_s:g} s")

    async def secured(self, peer: Peer, address: Address) -> trio.SSLStream[trio.SocketStream]:
        """A TLS connection whose other end has proven to have the peer's key. Whether that one
        believes this node shows later. Raises `GreetingFailed`."""
        context = self._believed().for_dialing(peer)
        stream = await self._connect(address)
        tls = trio.SSLStream(stream, context)
        await _shake_hands(tls)
        return tls

    async def _connect(self, address: Address) -> trio.SocketStream:
        try:
            with trio.fail_after(self._settings.connect_s):
                return await trio.open_tcp_stream(address.host, address.port)
        except (OSError, trio.TooSlowError) as error:
            words = cause_of(error) if isinstance(error, OSError) else "no answer"
            raise GreetingFailed(f"{address}: {words}") from None

    async def _greet(
        self, tls: trio.SSLStream[trio.SocketStream], want: NodeId | None
    ) -> Connection:
        try:
            await _shake_hands(tls)
            certificate = tls.getpeercert(binary_form=True)
            peer = None if certificate is None else self._believed().who(certificate)
            if peer is None or (want is not None and peer.node != want):
                raise GreetingFailed("its certificate is not one that this node believes any more")
            link = WireLink(self._registry, self._hello(), peer.node)
            early = await _exchange(tls, link)
        except BaseException:
            await trio.aclose_forcefully(tls)
            raise
        return Connection(
            tls, link, peer.node, self._settings, dialed=want is not None, early=early
        )


async def _shake_hands(tls: trio.SSLStream[trio.SocketStream]) -> None:
    try:
        await tls.do_handshake()
    except trio.BrokenResourceError as error:
        await trio.aclose_forcefully(tls)
        if isinstance(error.__cause__, ssl.SSLCertVerificationError):
            raise GreetingFailed(
                "its certificate is not one that this node believes", unknown=True
            ) from None
        if _has_left(error):
            raise GreetingFailed("it closed the connection", left=True) from None
        raise GreetingFailed(f"no TLS 1.3 handshake: {cause_of(error)}") from None
    except BaseException:
        await trio.aclose_forcefully(tls)
        raise


def _has_left(error: trio.BrokenResourceError) -> bool:
    cause = error.__cause__
    if isinstance(cause, ssl.SSLError):
        return isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError)
    return isinstance(cause, OSError)


async def _exchange(tls: trio.SSLStream[trio.SocketStream], link: WireLink) -> list[Any]:
    """Both Hellos; what came with the peer's is returned."""
    early: list[Any] = []
    try:
        await tls.send_all(link.opening())
        while link.agreed is None:
            data = await tls.receive_some(4096)
            if not data:
                raise GreetingFailed(
                    "it closed the connection, maybe it does not believe this node", left=True
                )
            link.feed(data)
            while (message := link.next()) is not None:
                early.append(message)
    except trio.BrokenResourceError as error:
        raise GreetingFailed(
            f"it broke the connection, maybe it does not believe this node: {cause_of(error)}",
            left=_has_left(error),
        ) from None
    except WireError as error:
        raise GreetingFailed(str(error)) from None
    return early
