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
            two.used(found.ino, more=False)
            used_at = trio.current_time()
        assert trio.current_time() - used_at < KEPT_S / 4


@pytest.mark.parametrize("more", [False, True])
@in_virtual_time
async def test_who_does_not_come_again_is_not_waited_for_long(more: bool) -> None:
    async with cluster_volumes(2) as cluster:
        one, two = (node.volume for node in cluster.nodes)
        await replace(one, b"at first")
        await told_stale(one, two)
        found = await two.lookup(ROOT, NAME)
        if more:
            two.used(found.ino, more=True)
        began = trio.current_time()
        await replace(one, b"later")
        took = trio.current_time() - began
        least = MORE_S if more else KEPT_S
        assert 0.8 * least <= took <= least + 0.05


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
