"""A volume that several nodes fill: it is full when it is full."""

from __future__ import annotations

import trio

from csvfs.errors import NoSpace
from csvfs.namespace.handle import Handle
from tests.cluster_volumes import Node, cluster_volumes, in_virtual_time
from tests.simulated_volume import ROOT, UNIT, create

SIZE_BYTES = 80 << 20
CHUNK = bytes(16 * UNIT)


async def fill(node: Node, handle: Handle, most_units: int = 10**9) -> int:
    """Write until there is no space, or so much; how many units were written."""
    done = 0
    while done < most_units:
        try:
            done += await node.volume.write(handle, done * UNIT, CHUNK) // UNIT
        except NoSpace:
            break
        await trio.sleep(0.001)  # nothing here takes time, and the others have a right to some
    return done


@in_virtual_time
async def test_what_another_node_has_not_freed_yet_is_no_reason_to_be_full() -> None:
    async with cluster_volumes(3, size_bytes=SIZE_BYTES, slots=4) as cluster:
        one, two, three = cluster.nodes
        space = (await one.volume.statfs()).available_blocks // 16
        for number, (writer, remover) in enumerate(((one, two), (two, three), (three, one))):
            handle = await create(writer.volume, b"%d" % number)
            assert await fill(writer, handle, space * 7 // 10) >= space * 7 // 10
            await writer.volume.release(handle)
            await writer.volume.forget(handle.ino, 1)
            await remover.volume.unlink(ROOT, b"%d" % number)


@in_virtual_time
async def test_two_nodes_fill_the_volume_to_its_end() -> None:
    async with cluster_volumes(2, size_bytes=SIZE_BYTES, slots=4) as cluster:
        one, two = cluster.nodes
        space = (await one.volume.statfs()).available_blocks // 16
        handles = [await create(node.volume, b"%d" % node.slot) for node in (one, two)]
        written: list[int] = []

        async def work(node: Node, handle: Handle) -> None:
            written.append(await fill(node, handle))

        async with trio.open_nursery() as nursery:
            for node, handle in zip((one, two), handles, strict=True):
                nursery.start_soon(work, node, handle)
        assert sum(written) >= space - 8
        assert min(written) > space // 4, "one of the two got nothing"
        # Full: what gives space back works all the same, on either node.
        for node, other in ((one, two), (two, one)):
            await other.volume.unlink(ROOT, b"%d" % node.slot)
        for node, handle in zip((one, two), handles, strict=True):
            await node.volume.release(handle)
            await node.volume.forget(handle.ino, 1)
        handle = await create(two.volume, b"again")
        assert await fill(two, handle, space - 16) >= space - 16
