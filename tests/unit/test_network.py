"""Connections of nodes that believe each other: one for each pair, in order, and again."""

from __future__ import annotations

import random
import socket
from contextlib import AsyncExitStack
from functools import partial
from itertools import pairwise

import pytest
import trio

from lockmgr.cluster.beats import bind
from lockmgr.cluster.blocks import Heartbeat
from lockmgr.cluster.events import BeatHeard, StrangerCame
from lockmgr.cluster.messages import AskLease, LeaseGiven
from lockmgr.cluster.network_events import Arrived, Connected, Lost, NetworkEvent
from lockmgr.cluster.network_settings import NetworkSettings
from lockmgr.cluster.pair import Backoff
from lockmgr.cluster.peers import Address
from lockmgr.cluster.view import NEWCOMER_SLOT, NodeId
from tests.unit.network_nodes import (
    HASTY,
    ID,
    Node,
    open_node,
    open_relay,
    two_nodes,
    until,
    without_addresses,
)


async def test_messages_in_order_both_ways() -> None:
    async with two_nodes() as (one, two):
        for number in range(1000):
            assert one.network.send(two.name, AskLease(number))
            assert two.network.send(one.name, LeaseGiven(number))
        await until(lambda: len(two.messages(one)) == 1000 == len(one.messages(two)))
        assert two.messages(one) == [AskLease(number) for number in range(1000)]
        assert one.messages(two) == [LeaseGiven(number) for number in range(1000)]


async def test_both_sides_number_a_connection_alike() -> None:
    async with two_nodes() as (one, two):
        (up,), (other,) = one.of(Connected), two.of(Connected)
        assert (up.peer, other.peer) == (two.name, one.name)
        assert up.number == other.number == 1
        assert other.agreed.peer == one.name and up.agreed.version == 1


@pytest.mark.parametrize("dialer", ["lower", "higher"])
async def test_one_way_of_dialing_is_enough(dialer: str) -> None:
    async with open_node(0) as one, open_node(1) as two:
        can_dial = one if dialer == "lower" else two
        for node, other in ((one, two), (two, one)):
            peer = other.peer if node is can_dial else without_addresses(other)
            node.network.install(node.name, 1, [peer], bytes(32))
        await until(lambda: one.connected(two) and two.connected(one))
        assert can_dial.network.statistics()[0].dialed
        assert one.network.send(two.name, AskLease(1))
        await until(lambda: two.messages(one) == [AskLease(1)])


async def test_who_dials_first_does_not_matter() -> None:
    settings = NetworkSettings(courtesy_s=0.0)
    for seed in range(5):
        async with open_node(0, settings, seed=seed) as one, open_node(1, settings) as two:
            two.install(one)
            one.install(two)
            await until(lambda: one.connected(two) and two.connected(one))
            one.network.send(two.name, AskLease(seed))
            await until(lambda: two.messages(one))
            assert two.messages(one) == [AskLease(seed)]
            assert one.statistics(two).number == two.statistics(one).number
            # The one that came second is refused, and disturbs nobody.
            await trio.sleep(0.05)
            assert not one.of(Lost) and not two.of(Lost)


async def test_five_nodes() -> None:
    async with (
        open_node(0) as a,
        open_node(1) as b,
        open_node(2) as c,
        open_node(3) as d,
        open_node(NEWCOMER_SLOT, incarnation=1 << 62) as e,
    ):
        nodes = [a, b, c, d, e]
        for node in nodes:
            node.install(*nodes)
        for node in nodes:
            for other in nodes:
                if node is not other:
                    await until(partial(node.connected, other))
        for node in nodes:
            for other in nodes:
                if node is not other:
                    assert node.network.send(other.name, AskLease(node.name.slot))
        await until(lambda: all(len(node.of(Arrived)) == 4 for node in nodes))
        assert not any(node.of(Lost) for node in nodes)


async def test_sixteen_nodes_start_at_once() -> None:
    """From one address, as behind a NAT: nobody is taken for a flood of strangers."""
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(open_node(slot)) for slot in range(16)]
        for node in nodes:
            node.install(*nodes)
        pairs = [(one, two) for one in nodes for two in nodes if one is not two]
        await until(lambda: all(one.connected(two) for one, two in pairs), 60)
        assert not any(node.of(Lost) for node in nodes)


async def test_a_peer_that_is_gone_and_comes_back() -> None:
    async with open_node(0) as one:
        async with open_node(1) as two:
            one.install(two)
            two.install(one)
            await until(lambda: one.connected(two) and two.connected(one))
        await until(lambda: one.of(Lost, two))
        assert one.of(Lost)[0].reason.startswith("the peer closes it: ")
        assert not one.network.send(two.name, AskLease(1))
        assert one.network.statistics()[0].traffic.dropped == 1
        async with open_node(1, incarnation=2) as again:
            one.install(again, epoch=2)
            again.install(one, epoch=2)
            await until(lambda: one.connected(again))
            assert one.of(Connected)[-1].peer == NodeId(1, 2)


async def test_a_cut_connection_is_made_again(caplog: pytest.LogCaptureFixture) -> None:
    """It looks like the end of the peer's daemon: of that a human learns from the view."""
    caplog.set_level("INFO", "lockmgr.network")
    async with two_nodes() as (one, two):
        for number in (1, 2, 3):
            (connection,) = one.network._open
            connection._stream.transport_stream.socket.shutdown(socket.SHUT_RDWR)
            await until(partial(one.connected, two, number + 1))
            await until(lambda: one.statistics(two).number == two.statistics(one).number)
        assert len(one.of(Lost)) == len(two.of(Lost)) == 3
        assert one.statistics(two).traffic.connections == 4
        said = [each for each in caplog.records if " lost: " in each.getMessage()]
        assert len(said) == 6
        assert {each.levelname for each in said} == {"INFO"}


async def test_a_connection_that_only_one_side_has_lost() -> None:
    """Nothing gets through the old one any more: the peer, which does not choose, dials again."""
    settings = NetworkSettings(probe_s=0.3, courtesy_s=0.02, silence_s=1000, ping_s=900)
    async with open_node(0, settings) as one, open_node(1, settings) as two:
        async with open_relay(two.network.address) as relay:
            by_relay = type(two.peer)(two.name, two.credentials.certificate, (relay.address,))
            one.network.install(one.name, 1, [by_relay], bytes(32))
            two.network.install(two.name, 1, [without_addresses(one)], bytes(32))
            await until(lambda: one.connected(two) and two.connected(one))
            relay.mute()
            (theirs,) = two.network._open
            two.install(one)
            theirs.fail("forgotten", forget=True)
            await until(lambda: two.connected(one) and one.statistics(two).number > 1)
            assert [lost.reason for lost in one.of(Lost)] == [
                "it is silent, and the peer has made another"
            ]
            one.network.send(two.name, AskLease(1))
            await until(lambda: two.messages(one) == [AskLease(1)])


async def test_a_second_connection_does_not_harm_the_first() -> None:
    """A peer that dials though the first lives (it has not seen the choice yet) is refused."""
    async with two_nodes() as (one, two):
        (pair,) = two.network._pairs.values()
        second = await two.network._dial(pair)
        assert second is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(two.network._serve, second)
            await until(lambda: second.failure is not None)
        assert "another connection lives" in str(second.failure)
        assert not one.of(Lost) and not two.of(Lost)


async def test_who_leaves_the_view_is_dropped() -> None:
    async with open_node(0) as one, open_node(1) as two, open_node(2) as three:
        nodes = [one, two, three]
        for node in nodes:
            node.install(*nodes)
        await until(lambda: all(n.connected(o) for n in nodes for o in nodes if n is not o))
        one.network.send(two.name, AskLease(77))
        one.install(three, epoch=2)
        assert not one.network.send(two.name, AskLease(78))
        await until(lambda: one.of(Lost, two) and two.of(Lost, one))
        assert two.messages(one) == [AskLease(77)], "what was said before the view changed arrives"
        assert "not listed any more" in two.of(Lost, one)[0].reason
        assert one.connected(three) and not one.of(Lost, three)


async def test_a_newcomer_gets_its_name() -> None:
    """The same certificate, another name: from then on it is that."""
    async with open_node(0) as one, open_node(NEWCOMER_SLOT, incarnation=99) as two:
        one.install(two)
        two.install(one)
        await until(lambda: one.connected(two) and two.connected(one))
        newcomer, two.name = two.name, NodeId(1, 5)
        one.install(two, epoch=2)
        await until(lambda: any(lost.peer == newcomer for lost in one.of(Lost)))
        two.install(one, epoch=2)
        await until(lambda: one.connected(two) and two.connected(one))
        assert one.of(Connected)[-1].peer == NodeId(1, 5)


async def test_a_join_block_that_is_still_there() -> None:
    """The newcomer that the view lists by now, and this node's own."""
    async with open_node(0) as one, open_node(1, incarnation=5) as two:
        stale = type(two.peer)(NodeId(NEWCOMER_SLOT, 99), two.credentials.certificate)
        own = type(two.peer)(NodeId(NEWCOMER_SLOT, 98), one.credentials.certificate)
        one.network.install(one.name, 1, [own, stale, two.peer, one.peer], bytes(32))
        two.install(one)
        await until(lambda: one.connected(two) and two.connected(one))
        assert [peer.peer for peer in one.network.statistics()] == [two.name]


async def test_whoever_is_told_may_do_anything() -> None:
    """`send` and `install` from within what is told, also of its own peer."""
    async with open_node(0) as one, open_node(1) as two:

        def answer(event: NetworkEvent) -> None:
            if isinstance(event, Connected):
                two.network.send(one.name, LeaseGiven(0))
            elif isinstance(event, Arrived):
                two.network.send(one.name, LeaseGiven(event.message.stamp))
                if event.message.stamp == 3:
                    two.install(epoch=2)

        two.react = answer
        one.install(two)
        two.install(one)
        await until(lambda: one.connected(two))
        for number in range(1, 10):
            one.network.send(two.name, AskLease(number))
        await until(lambda: one.of(Lost))
        assert one.messages(two) == [LeaseGiven(number) for number in range(4)]
        assert two.messages(one) == [AskLease(number) for number in range(1, 4)]


async def test_an_error_of_who_is_told_is_not_swallowed() -> None:
    def fail(event: NetworkEvent) -> None:
        raise KeyError(event)

    nodes: list[Node] = []

    async def until_it_ends() -> None:
        async with open_node(0) as one, open_node(1) as two:
            nodes.append(one)
            one.react = fail
            one.install(two)
            two.install(one)
            await trio.sleep_forever()

    with pytest.raises(ExceptionGroup) as caught:
        await until_it_ends()
    assert caught.group_contains(KeyError)
    assert len(nodes[0].events) == 1


async def test_idle_connections_live_and_measure() -> None:
    async with two_nodes(HASTY) as (one, two):
        await until(lambda: one.statistics(two).rtt_s and two.statistics(one).rtt_s)
        await trio.sleep(2 * HASTY.silence_s)
        assert not one.of(Lost) and not two.of(Lost)
        traffic = one.statistics(two).traffic
        assert traffic.bytes_in and traffic.bytes_out and traffic.queue_peak_bytes


async def test_a_peer_that_hangs_is_lost_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    async with two_nodes(HASTY) as (one, two):
        (theirs,) = two.network._open
        started = trio.current_time()
        # It reads and says nothing, as a process that is stopped: the kernel goes on.
        monkeypatch.setattr(theirs, "send", lambda _message: True)
        await until(lambda: one.of(Lost))
        assert "nothing has been heard" in one.of(Lost)[0].reason
        assert trio.current_time() - started >= 0.9 * HASTY.silence_s


async def test_who_has_slept_does_not_blame_the_peer() -> None:
    async with two_nodes(HASTY) as (one, two):
        (mine,) = one.network._open
        later = trio.current_time() + 100
        mine.look(later, slept=True)
        assert mine.failure is None and mine.heard_s == later
        mine.look(later + 1, slept=False)
        assert mine.failure is not None
        await until(lambda: two.of(Lost))


async def test_addresses_in_turn() -> None:
    """A peer with an address where nobody listens, and one where it does."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        async with open_node(0) as one, open_node(1) as two:
            dead = two.network.address._replace(port=unused.getsockname()[1])
            peer = type(two.peer)(
                two.name, two.credentials.certificate, (dead, two.network.address)
            )
            one.network.install(one.name, 1, [peer], bytes(32))
            two.network.install(two.name, 1, [without_addresses(one)], bytes(32))
            await until(lambda: one.connected(two))


async def test_who_has_much_to_say_can_wait() -> None:
    async with two_nodes() as (one, two):
        for number in range(2000):
            await one.network.wait_room(two.name)
            one.network.send(two.name, AskLease(number))
        await until(lambda: len(two.messages(one)) == 2000)
        assert one.statistics(two).queue_bytes == 0


async def test_knock() -> None:
    async with open_node(0) as one, open_node(1) as two, open_node(2) as three:
        gone = without_addresses(three)
        impostor = type(two.peer)(
            NodeId(3, 1), three.credentials.certificate, (two.network.address,)
        )
        found = await one.network.knock([two.peer, gone, impostor])
        assert found == {two.name}, "it proves that it lives to whom it does not know"
        await until(lambda: two.of(StrangerCame))
        await two.network.knock([three.peer])
        await until(lambda: three.of(StrangerCame))
        assert not one.of(StrangerCame), "nobody has come there"


# -- heartbeats --------------------------------------------------------------------------------
async def test_heartbeats() -> None:
    async with open_node(0) as one, open_node(1) as two, open_node(2) as three:
        nodes: list[Node] = [one, two, three]
        for node in nodes:
            node.install(*nodes)

        def both_heard(beat: Heartbeat) -> bool:
            return beat in two.beats() and beat in three.beats()

        beats = [Heartbeat(0, 1, number, 1, 7) for number in range(1, 6)]
        for beat in beats:
            one.network.beat(beat)
            await until(partial(both_heard, beat))
        one.network.beat(beats[2])  # late
        one.network.beat(Heartbeat(0, 1, 6, 1, 7))
        await until(lambda: len(two.beats()) == 6)
        assert [beat.sequence for beat in two.beats()] == [1, 2, 3, 4, 5, 6]
        assert two.network.beat_counts.old == 1 and two.network.beat_counts.bad == 0
        assert not one.beats()


async def test_heartbeats_of_strangers(caplog: pytest.LogCaptureFixture) -> None:
    async with open_node(0) as one, open_node(1) as two:
        one.install(two, secret=bytes(32))
        two.install(one)
        for number in range(100):
            one.network.beat(Heartbeat(0, 1, number, 1, 7))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            for size in (0, 1, 71, 72, 73, 60_000):
                stranger.sendto(random.randbytes(size), tuple(two.network.address))
        await until(lambda: two.network.beat_counts.bad == 106)
        assert not two.of(BeatHeard)
        lines = [line for line in caplog.messages if "datagram from 127.0.0.1 dropped" in line]
        assert 1 <= len(lines) < 30


def test_backoff() -> None:
    settings = NetworkSettings()
    backoff = Backoff(settings, random.Random(1))
    pauses = [backoff.next() for _ in range(50)]
    assert 0.5 * settings.redial_first_s <= pauses[0] <= 1.5 * settings.redial_first_s
    assert max(pauses) <= 1.5 * settings.redial_most_s and min(pauses[10:]) >= 0.5
    assert len({round(b - a, 6) for a, b in pairwise(pauses[10:])}) > 30, "not in step"
    backoff.reset()
    assert backoff.next() <= 1.5 * settings.redial_first_s


async def test_an_address_that_cannot_be_had_is_named() -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        address = Address("127.0.0.1", busy.getsockname()[1])
        with pytest.raises(OSError, match=f"cannot listen at {address}: .* in use"):
            await bind(address, ID)
