"""What a node that died was about to free is there to be had, before anybody counts as full."""

from __future__ import annotations

import os

import pytest
import trio

from tests.cluster_volumes import cluster_volumes, in_virtual_time
from tests.simulated_volume import ROOT, create
from tests.unit.test_cluster_volumes_space import SIZE_BYTES, fill

ORPHANS = 30


@pytest.mark.parametrize("seed", range(6))
@in_virtual_time
async def test_what_a_dead_node_had_removed_is_no_reason_to_be_full(seed: int) -> None:
    """Who recovers its lists takes a while over each file that is open somewhere."""
    async with cluster_volumes(3, seed=seed, size_bytes=SIZE_BYTES, slots=4) as cluster:
        one, two, three = cluster.nodes
        space = (await one.volume.statfs()).available_blocks // 16
        other = await create(three.volume, b"g")
        opened = []
        for number in range(ORPHANS):
            handle = await create(one.volume, b"%d" % number)
            opened.append(await two.volume.open(handle.ino, os.O_RDONLY, 0))
            await one.volume.release(handle)
            await one.volume.forget(handle.ino, 1)
            await one.volume.unlink(ROOT, b"%d" % number)
        handle = await create(one.volume, b"f")
        assert await fill(one, handle, space * 7 // 10) >= space * 7 // 10
        await one.volume.release(handle)
        await one.volume.forget(handle.ino, 1)
        await one.volume.unlink(ROOT, b"f")
        await one.volume.fsyncdir(ROOT, False)
        cluster.strike(one)
        while cluster._unreplayed:  # noqa: ASYNC110 -- before anybody is told
            await trio.sleep(0.001)
        began = trio.current_time()
        done = await fill(three, other, space * 7 // 10)
        assert done >= space * 7 // 10
        assert trio.current_time() - began < 5
        await three.volume.release(other)
        await three.volume.forget(other.ino, 1)
        for reader in opened:
            await two.volume.release(reader)
