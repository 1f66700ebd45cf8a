"""A node comes back to groups of its own, whoever has been there meanwhile."""

from __future__ import annotations

import trio

from csvfs.allocation.affinity import Affinity
from csvfs.engine.change import Change
from lockmgr.modes import Mode
from tests.cluster_volumes import Cluster, Node, cluster_volumes, in_virtual_time
from tests.simulated_volume import create, mkdir
from tests.unit.test_cluster_volumes_placement import SIZE_BYTES


async def _files(node: Node, directory: int, first: int, count: int) -> set[int]:
    """Make files; the groups of their inodes."""
    groups = set()
    for number in range(first, first + count):
        handle = await create(node.volume, b"%d" % number, parent=directory)
        groups.add(node.volume.engine.scope.geometry.group_of(handle.ino))
        await node.volume.release(handle)
        await node.volume.forget(handle.ino, 1)
    return groups


def _own(cluster: Cluster, node: Node) -> set[int]:
    resources = node.volume.engine.resources
    mastering = node.locks.core.recovery.mastering
    groups = range(cluster.superblock.geometry.group_count)
    return {g for g in groups if mastering.master_of(resources.group(g)) == node.number}


async def _take_groups(by: Node, groups: set[int], mode: Mode) -> None:
    for group in sorted(groups):
        async with by.locks.acquire(by.volume.engine.resources.group(group), mode):
            pass


@in_virtual_time
async def test_a_node_whose_groups_others_have_locked_gets_them_back() -> None:
    """Somebody freed blocks there, or looked what is there, and keeps the locks in his cache."""
    async with cluster_volumes(3, size_bytes=SIZE_BYTES) as cluster:
        await trio.sleep(0.1)  # all know the view
        for node in cluster.nodes:
            own = _own(cluster, node)
            assert own
            for other in cluster.nodes:
                if other is not node:
                    await _take_groups(other, own, Mode.PR)
        directories = [
            (await mkdir(node.volume, b"dir%d" % node.slot)).ino for node in cluster.nodes
        ]
        for node, directory in zip(cluster.nodes, directories, strict=True):
            await _files(node, directory, 0, 3)
        await trio.sleep(3)
        for node, directory in zip(cluster.nodes, directories, strict=True):
            await _files(node, directory, 3, 3)
        cluster.sent.clear()
        for node, directory in zip(cluster.nodes, directories, strict=True):
            assert await _files(node, directory, 6, 300) <= _own(cluster, node)
        assert not cluster.sent


@in_virtual_time
async def test_a_node_whose_first_group_is_full_takes_the_next_of_its_own() -> None:
    async with cluster_volumes(3, size_bytes=SIZE_BYTES) as cluster:
        await trio.sleep(0.1)  # all know the view
        node = max(cluster.nodes, key=lambda each: len(_own(cluster, each)))
        own = _own(cluster, node)
        assert len(own) > 1
        directory = (await mkdir(node.volume, b"d")).ino
        [home] = await _files(node, directory, 0, 1)
        image = await create(node.volume, b"image", parent=directory)
        geometry = node.volume.engine.scope.geometry

        def fill(change: Change) -> int:
            inode = change.inode(image.ino)
            return change.map_units(inode, inode.units, 1000)[-1][1] >> 1

        while geometry.group_of_unit(await node.volume.engine.change(fill)) == home:
            pass
        assert await _files(node, directory, 1, 40) <= own
        await node.volume.release(image)


def test_homes_are_this_nodes_groups_upward() -> None:
    class Geometry:
        group_count = 10

    affinity = Affinity(Geometry(), lambda group: group % 3 == 1, lambda: 1)  # type: ignore[arg-type]
    assert affinity.home(2) == 4
    assert list(affinity.homes(5)) == [7, 1, 4]
    assert list(affinity.homes(4)) == [4, 7, 1]
