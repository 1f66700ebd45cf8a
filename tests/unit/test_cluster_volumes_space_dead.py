"""What a node that died was about to free is there to be had, before anybody counts as full."""

from __future__ import annotations

import pytest
import trio

from csvfs.errors import NoSpace
from tests.cluster_volumes import cluster_volumes, in_virtual_time
from tests.simulated_volume import ROOT, UNIT, create
from tests.unit.test_cluster_volumes_space import CHUNK, SIZE_BYTES, fill


@pytest.mark.parametrize("open_there", [False, True])
@in_virtual_time
async def test_what_a_dead_node_had_removed_is_no_reason_to_be_full(open_there: bool) -> None:
    async with cluster_volumes(3, size_bytes=SIZE_BYTES, slots=4) as cluster:
        one, two, three = cluster.nodes
        space = (await one.volume.statfs()).available_blocks // 16
        handle = await create(one.volume, b"f")
        assert await fill(one, handle, space * 7 // 10) >= space * 7 // 10
        if not open_there:
            await one.volume.release(handle)
            await one.volume.forget(handle.ino, 1)
        await one.volume.unlink(ROOT, b"f")
        await one.volume.fsyncdir(ROOT, False)
        other = await create(three.volume, b"g")
        cluster.strike(one)
        done = await fill(three, other, space * 7 // 10)
        assert done >= space * 7 // 10
        await three.volume.release(other)
        await three.volume.forget(other.ino, 1)
