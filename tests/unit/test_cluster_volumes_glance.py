"""Looking at what other nodes write to: the truth, and nobody is disturbed."""

from __future__ import annotations

from random import Random

import pytest
import trio

from csvfs.errors import StaleInode
from csvfs.namespace.inode import Attributes
from lockmgr.messages import Blocking, Lower
from tests.cluster_volumes import Node, cluster_volumes, in_virtual_time
from tests.simulated_volume import ROOT, UNIT, create, mkdir
from tests.unit.test_cluster_volumes_placement import SIZE_BYTES

IMAGES = 20


async def listing(node: Node, ino: int) -> dict[bytes, Attributes]:
    """Names and attributes, as ``ls -l`` has them: each name is looked up, too."""
    found: dict[bytes, Attributes] = {}
    cookie = 2
    while entries := await node.volume.readdir(ino, cookie, 7):
        for entry in entries:
            found[entry.name] = entry.attributes
            again = await node.volume.lookup(ino, entry.name)
            node.volume.remember(again.ino, 1)
            assert again.size >= entry.attributes.size
            assert (await node.volume.getattr(again.ino)).size >= again.size
        cookie = entries[-1].cookie
    return found


@in_virtual_time
async def test_a_listing_of_running_images_disturbs_none_of_them() -> None:
    async with cluster_volumes(3) as cluster:
        one, two, three = cluster.nodes
        directory = await mkdir(one.volume, b"images")
        handles = []
        for number in range(IMAGES):
            at = (one, two)[number % 2].volume
            handles.append((at, await create(at, b"%d" % number, parent=directory.ino)))
        for at, handle in handles:
            await at.write(handle, 0, bytes(UNIT))
        await listing(three, directory.ino)  # takes the directory itself
        glimpses = [node.locks.statistics().glimpses for node in (one, two)]
        cluster.trace = []
        sizes = {handle.ino: UNIT for _, handle in handles}
        running = True

        async def run(number: int) -> None:
            at, handle = handles[number]
            rng = Random(number)
            while running:
                size = sizes[handle.ino] + 512
                await at.write(handle, size - 512, bytes(512))
                sizes[handle.ino] = size
                await trio.sleep(rng.uniform(0, 0.01))

        async with trio.open_nursery() as nursery:
            for number in range(IMAGES):
                nursery.start_soon(run, number)
            for _ in range(4):
                expected = dict(sizes)
                found = await listing(three, directory.ino)
                assert len(found) == IMAGES
                for attributes in found.values():
                    assert attributes.size >= expected[attributes.ino], "a stale size"
                await trio.sleep(0.1)
            running = False
        images = {one.volume.engine.resources.inode(handle.ino) for _, handle in handles}
        disturbed = [m for _, _, m in cluster.trace if isinstance(m, Blocking | Lower)]
        assert not [message for message in disturbed if message.resource in images]
        for node, was in zip((one, two), glimpses, strict=True):
            assert node.locks.statistics().glimpses > was
        cluster.check()


@in_virtual_time
async def test_a_listing_of_running_images_takes_few_messages() -> None:
    async with cluster_volumes(3) as cluster:
        one, two, three = cluster.nodes
        directory = await mkdir(one.volume, b"images")
        handles = []
        for number in range(4 * IMAGES):
            at = (one, two)[number % 2].volume
            handle = await create(at, b"%d" % number, parent=directory.ino)
            await at.write(handle, 0, bytes(UNIT + number))
            handles.append((at, handle))
        await three.volume.readdir(directory.ino, 0, 1)  # takes the directory itself
        cluster.sent.clear()
        entries = await three.volume.readdir(directory.ino, 2, 1000)
        assert sorted(e.attributes.size for e in entries) == [UNIT + n for n in range(4 * IMAGES)]
        # Two masters are asked, of which each probes the holders that it is not itself; each holder
        # answers what each master sent it.
        assert sum(cluster.sent.values()) <= 8, cluster.sent
        assert cluster.sent.keys() <= {"Glimpses", "AskGlimpse", "Probe", "GlimpseAnswer"}
        cluster.sent.clear()
        for entry in entries:
            await three.volume.getattr(entry.attributes.ino)
        assert sum(cluster.sent.values()) <= 3 * len(entries), cluster.sent
        for at, handle in handles:
            await at.release(handle)


@in_virtual_time
async def test_what_the_holder_has_no_use_for_is_asked_for_once() -> None:
    async with cluster_volumes(2) as cluster:
        one, two = cluster.nodes
        directory = await mkdir(one.volume, b"d")
        for number in range(5):
            await mkdir(one.volume, b"%d" % number, parent=directory.ino)
        await one.volume.store.checkpoint()
        await listing(two, directory.ino)
        before = cluster.sent.copy()
        await listing(two, directory.ino)
        assert cluster.sent == before


@in_virtual_time
async def test_a_glance_at_what_another_node_is_removing() -> None:
    async with cluster_volumes(2) as cluster:
        one, two = cluster.nodes
        for number in range(10):
            handle = await create(one.volume, b"f")
            found = await two.volume.lookup(ROOT, b"f")
            two.volume.remember(found.ino, 1)
            await one.volume.write(handle, 0, bytes(512))
            await one.volume.release(handle)
            await one.volume.forget(handle.ino, 1)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.volume.unlink, ROOT, b"f")
                await trio.sleep(0.0005 * number)
                try:
                    assert (await two.volume.getattr(found.ino)).generation == found.generation
                except StaleInode:
                    pass
            with pytest.raises(StaleInode):
                await two.volume.getattr(found.ino)
            await two.volume.forget(found.ino, 1)


@in_virtual_time
async def test_a_listing_of_files_that_nobody_uses_takes_two_messages_a_file() -> None:
    async with cluster_volumes(2, size_bytes=SIZE_BYTES) as cluster:
        one, two = cluster.nodes
        await trio.sleep(0.1)  # both know the view
        directory = await mkdir(one.volume, b"d")
        count = 4 * IMAGES
        for number in range(count):
            handle = await create(one.volume, b"%d" % number, parent=directory.ino)
            await one.volume.release(handle)
            await one.volume.forget(handle.ino, 1)
        await one.volume.store.checkpoint()
        await two.volume.readdir(directory.ino, 0, 1)  # takes the directory itself
        cluster.sent.clear()
        assert len(await two.volume.readdir(directory.ino, 2, 1000)) == count
        assert sum(cluster.sent.values()) <= 2 * count + 2, cluster.sent
        cluster.sent.clear()
        assert len(await listing(two, directory.ino)) == count
        assert not cluster.sent
