"""Locks of three nodes over real connections on loopback, which break in the middle of it all."""

from __future__ import annotations

import random

import pytest
import trio

from lockmgr.messages import Resource
from tests.unit.lock_nodes import LockNode, Truth, cut, start_node, start_nodes
from tests.unit.network_nodes import until

RESOURCES = [Resource(b"r%d" % number, b"p%d" % (number % 7)) for number in range(12)]


async def cut_now_and_then(nodes: list[LockNode], rng: random.Random) -> None:
    while True:
        await trio.sleep(rng.expovariate(40))
        cut(rng.choice(nodes), rng)


async def cut_for_a_while(seed: int, times: int) -> Truth:
    rng = random.Random(seed)
    truth = Truth(rng)
    with trio.fail_after(60):
        async with trio.open_nursery() as outer:
            nodes = await start_nodes(outer, 3, seed)
            async with trio.open_nursery() as cutting:
                cutting.start_soon(cut_now_and_then, nodes, rng)
                async with trio.open_nursery() as workers:
                    for node in nodes:
                        for _ in range(4):
                            workers.start_soon(truth.work, node, RESOURCES, times)
                cutting.cancel_scope.cancel()
            for node in nodes:
                node.check()
                assert not node.accused
            lost = [one.traffic.connections for node in nodes for one in node.network.statistics()]
            assert sum(lost) > 6, "nothing was cut"
            await until(lambda: not any(kept(node) for node in nodes))
            outer.cancel_scope.cancel()
    assert truth.grants + truth.timeouts == 12 * times, "every request is answered"
    assert truth.grants > 5 * times and truth.valid
    return truth


def kept(node: LockNode) -> int:
    return sum(messages for messages, _bytes in node.link.statistics().values())


@pytest.mark.parametrize("seed", range(3))
async def test_connections_break_in_the_middle(seed: int) -> None:
    await cut_for_a_while(seed, 40)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(50))
async def test_connections_break_in_the_middle_often(seed: int) -> None:
    await cut_for_a_while(1000 + seed, 60)


async def views_change(seed: int, times: int) -> None:
    """A node is killed while its connections break too; another one joins; then it all goes on."""
    rng = random.Random(seed)
    truth = Truth(rng)
    with trio.fail_after(60):
        async with trio.open_nursery() as outer, trio.open_nursery() as cutting:
            nodes = await start_nodes(outer, 3, seed)
            cutting.start_soon(cut_now_and_then, nodes, rng)
            async with trio.open_nursery() as workers:
                for node in nodes:
                    for _ in range(3):
                        workers.start_soon(truth.work, node, RESOURCES, times)
                await trio.sleep(rng.random() * 0.2)
                victim = nodes.pop(rng.randrange(3))
                victim.die()
                await trio.sleep(rng.random() * 0.1)
                await install(nodes, 2, rng, victim)
                await until(lambda: all(node.thawed[-1] == 2 for node in nodes))
                grants = truth.grants
                await trio.sleep(rng.random() * 0.05)
                truth.bury(victim)
                nodes[0].manager.cleared([victim.number])
                nodes[0].manager.replayed([victim.number])
                nodes.append(await start_node(outer, 3, seed))
                await install(nodes, 3, rng)
                for _ in range(3):
                    workers.start_soon(truth.work, nodes[-1], RESOURCES, times)
            assert truth.grants > grants
            for node in nodes:
                node.check()
                assert not node.accused and node.thawed[-1] == 3
                assert victim.name not in node.link.statistics()
            cutting.cancel_scope.cancel()
            outer.cancel_scope.cancel()


async def install(
    nodes: list[LockNode], epoch: int, rng: random.Random, departed: LockNode | None = None
) -> None:
    """They learn of it one by one."""
    for node in rng.sample(nodes, len(nodes)):
        await trio.sleep(rng.random() * 0.02)
        owing = frozenset() if departed is None else frozenset({departed.number})
        node.install(nodes, epoch, owing)


@pytest.mark.parametrize("seed", range(3))
async def test_views_change(seed: int) -> None:
    await views_change(seed, 40)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(50))
async def test_views_change_often(seed: int) -> None:
    await views_change(1000 + seed, 40)
