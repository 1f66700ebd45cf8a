"""A name that another node keeps replacing: who was told ESTALE is not told so again."""

from __future__ import annotations

import pytest
import trio

from csvfs.errors import NotFound, StaleInode
from csvfs.namespace.second_look import KEPT_S, MORE_S
from csvfs.volume import Volume
from tests.cluster_volumes import cluster_volumes, in_virtual_time
from tests.simulated_volume import ROOT

NAME, NEW = b"link", b"new"


async def replace(volume: Volume, target: bytes) -> None:
    await volume.symlink(ROOT, NEW, target, 0, 0)
    await volume.rename(ROOT, NEW, ROOT, NAME, 0)


async def told_stale(one: Volume, two: Volume) -> None:
    """Two has looked the name up, and then one has replaced it."""
    found = await two.lookup(ROOT, NAME)
    await replace(one, b"then")
    with pytest.raises(StaleInode):
        await two.readlink(found.ino)
    two.gone(found.ino)


@in_virtual_time
async def test_the_second_walk_is_not_disturbed() -> None:
    async with cluster_volumes(2) as cluster:
        one, two = (node.volume for node in cluster.nodes)
        await replace(one, b"at first")
        await told_stale(one, two)
        found = await two.lookup(ROOT, NAME)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(replace, one, b"later")
            await trio.sleep(KEPT_S / 2)  # longer than any lock is kept otherwise
            assert await two.readlink(found.ino) == b"then"
            two.used(found.ino)
            used_at = trio.current_time()
        assert trio.current_time() - used_at < 2 * MORE_S


@in_virtual_time
async def test_who_does_not_come_again_is_not_waited_for_long() -> None:
    async with cluster_volumes(2) as cluster:
        one, two = (node.volume for node in cluster.nodes)
        await replace(one, b"at first")
        await told_stale(one, two)
        await two.lookup(ROOT, NAME)
        began = trio.current_time()
        await replace(one, b"later")
        took = trio.current_time() - began
        assert 0.8 * KEPT_S <= took <= KEPT_S + 0.05


@in_virtual_time
async def test_each_who_walks_again_has_a_look_of_its_own() -> None:
    async with cluster_volumes(2) as cluster:
        one, two = (node.volume for node in cluster.nodes)
        await replace(one, b"at first")
        await told_stale(one, two)
        found = await two.lookup(ROOT, NAME)
        again = await two.lookup(ROOT, NAME)
        assert again.ino == found.ino
        async with trio.open_nursery() as nursery:
            nursery.start_soon(replace, one, b"later")
            two.used(found.ino)
            await trio.sleep(2 * MORE_S)
            assert await two.readlink(found.ino) == b"then"


@in_virtual_time
async def test_a_second_look_may_find_nothing() -> None:
    async with cluster_volumes(2) as cluster:
        one, two = (node.volume for node in cluster.nodes)
        await replace(one, b"at first")
        await told_stale(one, two)
        await one.unlink(ROOT, NAME)
        for _ in range(2):
            with pytest.raises(NotFound):
                await two.lookup(ROOT, NAME)
        await replace(one, b"again")  # nothing is kept
