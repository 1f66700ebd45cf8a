"""A supervisor tells of its daemon's death, in its name."""

from __future__ import annotations

from functools import partial

import pytest

from lockmgr.cluster.certificates import make_credentials
from lockmgr.cluster.events import DeathProven
from lockmgr.cluster.messages import AskLease
from lockmgr.cluster.network_events import Connected, Lost
from lockmgr.cluster.obituary import report_death
from lockmgr.cluster.view import NodeId
from tests.unit.network_nodes import (
    HASTY,
    ID,
    Node,
    open_node,
    open_relay,
    until,
    without_addresses,
)


@pytest.mark.parametrize("slot", [0, 9], ids=["the dead would choose", "the peer would choose"])
async def test_death_is_proven(slot: int) -> None:
    async with open_node(5) as one, open_node(6) as two:
        async with open_node(slot) as dead:
            nodes = [one, two, dead]
            for node in nodes:
                node.install(*nodes)
            await until(lambda: all(n.connected(o) for n in nodes for o in nodes if n is not o))
        # The daemon is gone, and its network with it.
        noted = await report_death(dead.credentials, ID, dead.name, [one.peer, two.peer])
        assert noted == {one.name, two.name}
        for node in (one, two):
            assert node.of(DeathProven) == [DeathProven(dead.name)]
            await until(partial(over, node, dead))
        assert one.connected(two) and not one.of(Lost, two)


@pytest.mark.parametrize("slot", [0, 9])
async def test_before_the_connection_is_known_to_be_gone(slot: int) -> None:
    """The daemon's last packets are lost: its connection looks alive until the supervisor comes."""
    async with open_node(5) as one, open_node(slot) as dead, open_relay(dead.network.address) as r:
        by_relay = type(dead.peer)(dead.name, dead.credentials.certificate, (r.address,))
        one.network.install(one.name, 1, [by_relay], bytes(32))
        dead.network.install(dead.name, 1, [without_addresses(one)], bytes(32))
        await until(lambda: one.connected(dead) and dead.connected(one))
        r.mute()
        assert await report_death(dead.credentials, ID, dead.name, [one.peer]) == {one.name}
        assert one.of(DeathProven) == [DeathProven(dead.name)]
        assert [lost.reason for lost in one.of(Lost)] == ["the peer is dead"]


async def test_only_the_own_death_can_be_told() -> None:
    async with open_node(5, HASTY) as one, open_node(6, HASTY) as two, open_node(7) as three:
        nodes = [one, two, three]
        for node in nodes:
            node.install(*nodes)
        await until(lambda: one.connected(two) and two.connected(one))
        for credentials in (make_credentials(), three.credentials):
            assert not await report_death(credentials, ID, two.name, [one.peer], 0.5, HASTY)
        assert not one.of(DeathProven)
        one.network.send(two.name, AskLease(1))
        await until(lambda: two.messages(one))


async def test_nobody_is_there() -> None:
    async with open_node(5) as gone:
        peer = gone.peer
    assert await report_death(make_credentials(), ID, NodeId(1, 1), [peer], 0.3) == frozenset()


def over(node: Node, dead: Node) -> bool:
    return len(node.of(Connected, dead)) == len(node.of(Lost, dead)) > 0
