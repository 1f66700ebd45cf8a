"""Many messages at once, and a peer that takes none: it is lost for it, and nobody else waits."""

from __future__ import annotations

import random
import socket
import statistics
from dataclasses import replace
from functools import partial

import pytest
import trio

from lockmgr.cluster.connection import Connection
from lockmgr.cluster.messages import AskLease, LeaseGiven
from lockmgr.cluster.network_events import Arrived, Lost, NetworkEvent
from lockmgr.cluster.network_settings import NetworkSettings
from lockmgr.messages import GlimpseAnswer, Resource
from tests.unit.network_nodes import Node, open_node, until

BIG = GlimpseAnswer(Resource(b"r", b""), 1, 0, 1, bytes(60_000))


def mute(node: Node, other: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """``node`` reads nothing more of what ``other`` sends."""
    (connection,) = [c for c in node.network._open if c.peer == other.name]

    async def nothing(_most: int) -> bytes:
        await trio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr(connection._stream, "receive_some", nothing)


async def test_a_storm_between_four_nodes() -> None:
    """Every node floods every other, in bursts, with messages of all sizes, back-pressure and a
    lossless end: all arrive, in order, and memory stays bounded."""
    settings = NetworkSettings(queue_bytes=1 << 20, room_bytes=64 << 10, silence_s=60)
    async with (
        open_node(0, settings) as a,
        open_node(1, settings) as b,
        open_node(2, settings) as c,
        open_node(3, settings) as d,
    ):
        nodes = [a, b, c, d]
        for node in nodes:
            node.install(*nodes)
        await until(lambda: all(n.connected(o) for n in nodes for o in nodes if n is not o))
        rng = random.Random(1)

        async def flood(node: Node, other: Node, number: int) -> None:
            for first in range(0, number, 20):
                await node.network.wait_room(other.name)
                for stamp in range(first, first + 20):
                    assert node.network.send(other.name, AskLease(stamp))
                    if rng.random() < 0.02:
                        size = rng.randrange(60_000)
                        node.network.send(other.name, replace(BIG, answer=bytes(size)))

        async with trio.open_nursery() as nursery:
            for node in nodes:
                for other in nodes:
                    if node is not other:
                        nursery.start_soon(flood, node, other, 500)

        def stamps(node: Node, other: Node) -> list[float]:
            return [m.stamp for m in node.messages(other) if isinstance(m, AskLease)]

        pairs = [(n, o) for n in nodes for o in nodes if n is not o]
        await until(lambda: all(len(stamps(n, o)) == 500 for n, o in pairs), 60)
        assert all(stamps(n, o) == list(range(500)) for n, o in pairs)
        assert not any(node.of(Lost) for node in nodes)
        for node, other in pairs:
            traffic = node.statistics(other).traffic
            assert traffic.queue_peak_bytes <= settings.room_bytes + 20 * 61_000
            assert traffic.messages_out >= 500 <= traffic.messages_in


def has_answered(node: Node, other: Node, stamp: float) -> bool:
    got = node.messages(other)
    return bool(got) and got[-1] == LeaseGiven(stamp)


async def test_a_slow_peer_is_lost_and_blocks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = NetworkSettings(queue_bytes=2 << 20)
    async with (
        open_node(0, settings) as one,
        open_node(1, settings) as slow,
        open_node(2, settings) as quick,
    ):
        nodes = [one, slow, quick]
        for node in nodes:
            node.install(*nodes)
        await until(lambda: all(n.connected(o) for n in nodes for o in nodes if n is not o))

        def answer(event: NetworkEvent) -> None:
            if isinstance(event, Arrived):
                quick.network.send(event.peer, LeaseGiven(event.message.stamp))

        quick.react = answer
        mute(slow, one, monkeypatch)
        took = []
        for number in range(2000):
            if not one.network.send(slow.name, BIG):
                break
            if number % 4 == 0:
                started = trio.current_time()
                one.network.send(quick.name, AskLease(number))
                await until(partial(has_answered, one, quick, number))
                took.append(trio.current_time() - started)
        else:
            pytest.fail("the queue never filled")
        assert statistics.median(took) < 0.1
        await until(lambda: one.of(Lost, slow))
        assert "bytes wait to be sent" in one.of(Lost, slow)[0].reason
        assert one.statistics(slow).traffic.queue_peak_bytes <= settings.queue_bytes
        assert not one.of(Lost, quick)
        # The peer is not condemned: it is connected with again.
        await until(lambda: slow.connected(one) and one.statistics(slow).number)
        assert one.statistics(slow).traffic.connections == 2


async def test_a_peer_that_takes_nothing_is_lost_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = NetworkSettings(ping_s=0.2, silence_s=0.8, look_s=0.1)
    async with open_node(0, settings) as one, open_node(1, NetworkSettings()) as slow:
        one.install(slow)
        slow.install(one)
        await until(lambda: one.connected(slow) and slow.connected(one))
        mute(slow, one, monkeypatch)
        (mine,) = one.network._open
        waiting = trio.Event()

        async def keeps_talking() -> None:
            for _ in range(1000):
                slow.network.send(one.name, AskLease(1))
                await trio.sleep(0.05)

        async def waits() -> None:
            await one.network.wait_room(slow.name)
            waiting.set()

        for _ in range(200):
            one.network.send(slow.name, BIG)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keeps_talking)
            nursery.start_soon(waits)
            await until(lambda: one.of(Lost))
            assert "the peer has taken nothing for" in str(mine.failure)
            await until(waiting.is_set)
            nursery.cancel_scope.cancel()


async def test_small_messages_share_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_node(0) as one, open_node(1) as two:
        one.install(two)
        two.install(one)
        await until(lambda: one.connected(two) and two.connected(one))
        (mine,) = one.network._open
        stream = mine._stream.transport_stream
        writes: list[int] = []
        real = stream.send_all

        async def spy(data: bytes) -> None:
            writes.append(len(data))
            await real(data)

        monkeypatch.setattr(stream, "send_all", spy)
        for number in range(1000):
            one.network.send(two.name, AskLease(number))
        await until(lambda: len(two.messages(one)) == 1000)
        assert len(writes) <= 5 and sum(writes) < 1000 * 40


async def test_nagle_is_off() -> None:
    async with open_node(0) as one, open_node(1) as two:
        one.install(two)
        two.install(one)
        await until(lambda: one.connected(two) and two.connected(one))
        for node in (one, two):
            (connection,) = node.network._open
            assert no_delay(connection)


def no_delay(connection: Connection) -> bool:
    stream = connection._stream.transport_stream
    return bool(stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))


async def test_random_cuts_lose_only_what_is_reported() -> None:
    """What a node sends over one connection arrives as a prefix of it, and whatever did not arrive
    is followed by a `Lost` on the sender's side."""
    rng = random.Random(7)
    settings = NetworkSettings(redial_first_s=0.005, redial_most_s=0.05, courtesy_s=0.005)
    async with open_node(0, settings) as one, open_node(1, settings) as two:
        one.install(two)
        two.install(one)
        sent: dict[int, list[float]] = {}
        for stamp in range(2000):
            number = one.statistics(two).number
            if number and one.network.send(two.name, AskLease(stamp)):
                sent.setdefault(number, []).append(stamp)
            if rng.random() < 0.01:
                for node in (one, two):
                    for connection in list(node.network._open):
                        if rng.random() < 0.5:
                            connection.fail("cut by the test", forget=rng.random() < 0.5)
            if rng.random() < 0.3:
                await trio.sleep(rng.choice([0, 0.001]))
            if not one.connected(two):
                await until(lambda: one.connected(two))

        def settled() -> bool:
            number = one.statistics(two).number
            alike = number and number == two.statistics(one).number
            return bool(alike and received(two, number) == sent.get(number, []))

        await until(settled)
        live = one.statistics(two).number
        lost = {event.number for event in one.of(Lost)}
        assert len(lost) > 5 and lost | {live} >= sent.keys()
        for connection_number, stamps in sent.items():
            got = received(two, connection_number)
            assert got == stamps[: len(got)]


def received(node: Node, number: int) -> list[float]:
    """Over the connection with that number."""
    return [event.message.stamp for event in node.of(Arrived) if event.number == number]
