"""Who is not believed: refused with a line in the log, in bounded time, and harming nobody."""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from lockmgr.cluster.certificates import (
    Credentials,
    client_context,
    load_own,
    make_credentials,
)
from lockmgr.cluster.door import (
    ADDRESSES,
    EARLY_S,
    LINES_AT_ONCE,
    NEW_ROW_S,
    EarlyBirds,
    LineLimit,
)
from lockmgr.cluster.link_messages import Chosen, connection_registry
from lockmgr.cluster.messages import AskLease
from lockmgr.cluster.network_events import Arrived, Connected, Lost
from lockmgr.cluster.peers import Peer
from lockmgr.cluster.view import NodeId
from lockmgr.cluster.wire import FRAME_HEADER, HELLO_VERSION, Goodbye, Hello, frame
from tests.unit.network_nodes import HASTY, ID, Node, open_node, until, without_addresses

REGISTRY = connection_registry()
TlsStream = trio.SSLStream[trio.SocketStream]


@pytest.fixture
async def member() -> AsyncIterator[tuple[Node, Node]]:
    """A node, and a member that it believes but has not heard of; both with short times."""
    async with open_node(0, HASTY) as one, open_node(1, HASTY) as two:
        one.network.install(one.name, 1, [without_addresses(two)], bytes(32))
        yield one, two


async def dial(
    node: Node, ours: Credentials, change: Callable[[ssl.SSLContext], None] | None = None
) -> TlsStream:
    """TLS as ``ours``, up to the point where this side believes that it is done."""
    context = client_context(ours, node.credentials.certificate)
    if change is not None:
        change(context)
    tls = trio.SSLStream(await trio.open_tcp_stream(*node.network.address), context)
    try:
        await tls.do_handshake()
    except trio.BrokenResourceError:
        await trio.aclose_forcefully(tls)
        raise
    return tls


async def is_closed(stream: trio.abc.ReceiveStream, within_s: float = 5.0) -> bytes:
    """What still came, once the other side has closed."""
    got = b""
    with trio.fail_after(within_s):
        try:
            while data := await stream.receive_some(1 << 16):
                got += data
        except trio.BrokenResourceError:
            pass
    return got


async def still_works(one: Node, two: Node) -> None:
    """The member gets in."""
    two.install(one)
    await until(lambda: one.connected(two) and two.connected(one))
    two.network.send(one.name, AskLease(5))
    await until(lambda: one.messages(two) == [AskLease(5)])
    assert not one.of(Lost)


@pytest.fixture(autouse=True)
def every_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lockmgr.network")


def refusals(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for line in caplog.messages if "connection from 127.0.0.1 refused: " in line]


# -- certificates ------------------------------------------------------------------------------
async def test_a_stranger_with_a_certificate(
    member: tuple[Node, Node], caplog: pytest.LogCaptureFixture
) -> None:
    one, two = member
    async with await dial(one, make_credentials()) as tls:
        assert await is_closed(tls) == b"", "nothing is said to a stranger"
    await until(lambda: refusals(caplog))
    assert "its certificate is not one that this node believes" in refusals(caplog)[0]
    await still_works(one, two)


async def test_a_certificate_that_a_member_has_signed(
    member: tuple[Node, Node], caplog: pytest.LogCaptureFixture
) -> None:
    """A member cannot let others in."""
    one, two = member
    key = serialization.load_pem_private_key(two.credentials.key_pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    issuer = x509.load_der_x509_certificate(two.credentials.certificate).subject
    fresh = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "friend")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(fresh.public_key())
        .serial_number(1)
        .not_valid_before(datetime(1970, 1, 1))
        .not_valid_after(datetime(9999, 1, 1))
        .sign(key, hashes.SHA256())
    )
    pem = fresh.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    friend = Credentials(certificate.public_bytes(serialization.Encoding.DER), pem)
    async with await dial(one, friend) as tls:
        assert await is_closed(tls) == b""
    await until(lambda: refusals(caplog))
    assert "not one that this node believes" in refusals(caplog)[0]
    await still_works(one, two)


async def test_who_shows_no_certificate(
    member: tuple[Node, Node], caplog: pytest.LogCaptureFixture
) -> None:
    one, two = member
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    async with trio.SSLStream(await trio.open_tcp_stream(*one.network.address), context) as tls:
        await tls.do_handshake()
        assert await is_closed(tls) == b""
    await until(lambda: refusals(caplog))
    await still_works(one, two)


async def test_who_has_left_the_view(
    member: tuple[Node, Node], caplog: pytest.LogCaptureFixture
) -> None:
    one, two = member
    await still_works(one, two)
    one.install(epoch=2)
    await until(lambda: two.of(Lost))
    async with await dial(one, two.credentials) as tls:
        assert await is_closed(tls) == b""
    await until(lambda: refusals(caplog))
    assert len(one.of(Connected)) == 1


async def test_who_leaves_the_view_while_it_is_greeted(member: tuple[Node, Node]) -> None:
    one, two = member
    first = await dial(one, two.credentials)
    async with first, await dial(one, two.credentials) as second:
        await second.receive_some(4096)  # the node's Hello: both are believed so far
        one.install(epoch=2)
        await second.send_all(frame(REGISTRY, Hello(ID, *two.name, 1), HELLO_VERSION))
        await is_closed(first)
        await is_closed(second)
    assert not one.of(Connected)


async def test_certificates_are_for_one_name(
    member: tuple[Node, Node], caplog: pytest.LogCaptureFixture
) -> None:
    one, two = member
    async with await dial(one, two.credentials) as tls:
        await tls.send_all(frame(REGISTRY, Hello(ID, 5, 5, 1), HELLO_VERSION))
        await is_closed(tls)
    await until(lambda: refusals(caplog))
    assert "the peer says it is 5.5, its certificate is 1.1's" in refusals(caplog)[0]
    await still_works(one, two)


async def test_another_cluster(caplog: pytest.LogCaptureFixture) -> None:
    async with open_node(0) as one, open_node(1, cluster_id=bytes(16)) as two:
        one.install(two)
        two.install(one)
        await until(lambda: any("is of cluster" in line for line in caplog.messages))
        assert not one.of(Connected) and not two.of(Connected)


async def test_no_session_is_resumed(member: tuple[Node, Node]) -> None:
    """A ticket would let in who has left the view meanwhile."""
    one, two = member
    async with await dial(one, two.credentials) as tls:
        await tls.receive_some(4096)
        session = tls.session
        assert session is None or not session.has_ticket


# -- protocols ---------------------------------------------------------------------------------
async def test_an_older_tls(member: tuple[Node, Node], caplog: pytest.LogCaptureFixture) -> None:
    one, two = member

    def older(context: ssl.SSLContext) -> None:
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2

    with pytest.raises(trio.BrokenResourceError):
        await dial(one, two.credentials, older)
    await until(lambda: refusals(caplog))
    assert "no TLS 1.3 handshake" in refusals(caplog)[0]
    await still_works(one, two)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        frame(REGISTRY, Hello(ID, 1, 1, 1), HELLO_VERSION),
        bytes(100_000),
        b"\xff" * 100_000,
        b"\x16\x03\x01\xff\xff" + b"x" * 70_000,
        b"\x16\x03\x01\x40\x00\x01\xff\xff\xff" + b"\x01" * 50_000,
    ],
    ids=["http", "hello", "zeros", "ones", "record", "client hello"],
)
async def test_no_tls_at_all(
    member: tuple[Node, Node], caplog: pytest.LogCaptureFixture, data: bytes
) -> None:
    one, two = member
    async with await trio.open_tcp_stream(*one.network.address) as stream:
        try:
            await stream.send_all(data)
        except trio.BrokenResourceError:
            pass
        assert len(await is_closed(stream)) < 100
    await until(lambda: refusals(caplog))
    await still_works(one, two)


# -- time and number ---------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["nothing", "drops", "tls and no hello"])
async def test_who_is_slow(
    member: tuple[Node, Node], caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """Half-open, slow loris, and a member's certificate with nothing after it."""
    one, two = member
    started = trio.current_time()
    if how == "tls and no hello":
        stream: trio.abc.Stream = await dial(one, two.credentials)
    else:
        stream = await trio.open_tcp_stream(*one.network.address)
    async with stream, trio.open_nursery() as nursery:

        async def drip() -> None:
            try:
                for byte in b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(1000):
                    await stream.send_all(bytes([byte]))
                    await trio.sleep(0.02)
            except trio.BrokenResourceError:
                pass

        if how == "drops":
            nursery.start_soon(drip)
        await is_closed(stream)
        nursery.cancel_scope.cancel()
    assert trio.current_time() - started >= 0.9 * HASTY.greeting_s
    await until(lambda: refusals(caplog))
    assert "it has not said who it is within 0.6 s" in refusals(caplog)[0]
    await still_works(one, two)


async def test_many_who_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    settings = replace(HASTY, greeting_s=30, strangers=10, strangers_each=4)
    async with open_node(0, settings) as one, open_node(1) as two:
        one.network.install(one.name, 1, [without_addresses(two)], bytes(32))
        streams = [await trio.open_tcp_stream(*one.network.address) for _ in range(100)]
        strangers = one.network._door._strangers
        await until(lambda: len(caplog.messages) >= LINES_AT_ONCE)
        await until(lambda: len(strangers) == 4)
        for stream in streams[:96]:
            assert await is_closed(stream) == b""
        assert "too many connections" in refusals(caplog)[0]
        assert len(refusals(caplog)) <= LINES_AT_ONCE + 5, "the log is not flooded either"
        await still_works(one, two)
        for stream in streams:
            await trio.aclose_forcefully(stream)


async def test_who_resets_at_once(member: tuple[Node, Node]) -> None:
    one, two = member
    for _ in range(50):
        stream = await trio.open_tcp_stream(*one.network.address)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await trio.aclose_forcefully(stream)
    await still_works(one, two)


def test_line_limit() -> None:
    limit = LineLimit()
    assert [limit.allow(100.0) for _ in range(LINES_AT_ONCE)] == [""] * LINES_AT_ONCE
    assert [limit.allow(100.0) for _ in range(7)] == [None] * 7
    assert limit.allow(101.5) == " (7 more like this were not logged)"
    assert limit.allow(90.0) is None


def test_who_dials_before_the_view_has_come_is_nothing_to_look_at() -> None:
    birds = EarlyBirds()
    assert birds.is_early("10.0.0.1", 100.0)
    assert birds.is_early("10.0.0.1", 100.0 + EARLY_S / 2)
    assert not birds.is_early("10.0.0.1", 100.0 + EARLY_S)
    assert birds.is_early("10.0.0.2", 100.0 + EARLY_S)
    assert not birds.is_early("10.0.0.1", 100.0 + EARLY_S + NEW_ROW_S)
    assert birds.is_early("10.0.0.1", 101.0 + EARLY_S + 2 * NEW_ROW_S), "another row"
    for number in range(2 * ADDRESSES):
        birds.is_early(f"10.1.0.{number}", 200.0)
    assert birds.is_early("10.0.0.2", 200.0), "forgotten: their number is bounded"


# -- members that do wrong ---------------------------------------------------------------------
@asynccontextmanager
async def greeted(one: Node, two: Node) -> AsyncIterator[TlsStream]:
    """A connection on which ``two`` is known, driven by hand; ``one`` has chosen it."""
    async with await dial(one, two.credentials) as tls:
        await tls.send_all(frame(REGISTRY, Hello(ID, *two.name, 1), HELLO_VERSION))
        await until(lambda: one.connected(two))
        yield tls


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xff" * 12, "frame of wire version"),
        (FRAME_HEADER.pack(1 << 31, 0, 1, 0, 99), "AskLease of 2147483648 bytes"),
        (FRAME_HEADER.pack(1, 0, 1, 0, 99) + b"\xc1", "bad msgpack"),
        (FRAME_HEADER.pack(1, 0, 1, 0, 9999), "no message has code 9999"),
        (frame(REGISTRY, Hello(ID, 1, 1, 1), 1), "Hello comes first, and once"),
        (frame(REGISTRY, Chosen(9), 1), "not its to choose"),
        (frame(REGISTRY, Goodbye("so\nlong"), 1), "the peer closes it: so\\nlong"),
    ],
)
async def test_bytes_of_a_member(member: tuple[Node, Node], data: bytes, words: str) -> None:
    one, two = member
    async with greeted(one, two) as tls:
        await tls.send_all(frame(REGISTRY, AskLease(1), 1) + data + frame(REGISTRY, AskLease(2), 1))
        await is_closed(tls)
    await until(lambda: one.of(Lost))
    assert words in one.of(Lost)[0].reason
    assert one.messages(two) == [AskLease(1)]


async def test_a_message_before_the_choice() -> None:
    async with open_node(5, HASTY) as one, open_node(1, HASTY) as two:
        one.network.install(one.name, 1, [without_addresses(two)], bytes(32))
        async with await dial(one, two.credentials) as tls:
            await tls.send_all(
                frame(REGISTRY, Hello(ID, *two.name, 1), HELLO_VERSION)
                + frame(REGISTRY, AskLease(1), 1)
            )
            got = await is_closed(tls)
            assert b"before the connection was chosen" in got
        assert not one.of(Connected) and not one.of(Arrived)


async def test_who_dials_and_never_chooses() -> None:
    async with open_node(5, HASTY) as one, open_node(1, HASTY) as two:
        one.network.install(one.name, 1, [without_addresses(two)], bytes(32))
        async with await dial(one, two.credentials) as tls:
            await tls.send_all(frame(REGISTRY, Hello(ID, *two.name, 1), HELLO_VERSION))
            assert b"not chosen in time" in await is_closed(tls)


async def test_one_member_with_many_connections(member: tuple[Node, Node]) -> None:
    """Those that are not used are given up for newer ones: their number is bounded."""
    one, two = member
    async with greeted(one, two) as first:
        streams = []
        for _ in range(10):
            tls = await dial(one, two.credentials)
            await tls.send_all(frame(REGISTRY, Hello(ID, *two.name, 1), HELLO_VERSION))
            await tls.receive_some(4096)
            streams.append(tls)
        await until(lambda: len(one.network._open) <= 2)
        for tls in streams:
            await trio.aclose_forcefully(tls)
        await first.aclose()


# -- who is dialed -----------------------------------------------------------------------------
async def serve_as(
    credentials: Credentials | None, dialing: Node, two: Node, caplog: pytest.LogCaptureFixture
) -> str:
    """At the address of ``two`` there is somebody else: what does the dialer say of it?"""

    async def answer(stream: trio.SocketStream) -> None:
        if credentials is None:
            await trio.sleep_forever()
        assert credentials is not None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        load_own(context, credentials)
        try:
            await trio.SSLStream(stream, context, server_side=True).do_handshake()
        except trio.BrokenResourceError:
            pass
        await trio.aclose_forcefully(stream)

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    address = type(two.network.address)(*listeners[0].socket.getsockname()[:2])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, answer, listeners)
        peer = Peer(two.name, two.credentials.certificate, (address,))
        dialing.network.install(NodeId(0, 1), 1, [peer], bytes(32))
        await until(lambda: any("cannot be reached" in line for line in caplog.messages))
        nursery.cancel_scope.cancel()
    assert not dialing.of(Connected)
    return next(line for line in caplog.messages if "cannot be reached" in line)


async def test_an_impostor_is_not_believed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with open_node(0, HASTY) as one, open_node(1) as two:
        words = await serve_as(make_credentials(), one, two, caplog)
        assert "its certificate is not one that this node believes" in words


async def test_who_is_dialed_and_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with open_node(0, HASTY) as one, open_node(1) as two:
        words = await serve_as(None, one, two, caplog)
        assert "has not answered within 0.6 s" in words
