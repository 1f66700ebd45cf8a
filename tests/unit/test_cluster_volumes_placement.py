"""Each node allocates where it needs to ask nobody."""

from __future__ import annotations

from typing import Final

import trio

from csvfs.ondisk.geometry import GROUP_UNITS
from csvfs.ondisk.superblock import Superblock
from tests.cluster_volumes import Node, cluster_volumes, in_virtual_time
from tests.simulated_volume import UNIT, create, mkdir

GROUPS: Final = 8
SIZE_BYTES: Final = (GROUPS * GROUP_UNITS + 600) * UNIT


async def _files(node: Node, directory: int, first: int, count: int) -> None:
    for number in range(first, first + count):
        handle = await create(node.volume, b"%d" % number, parent=directory)
        await node.volume.write(handle, 0, bytes(2 * UNIT))
        await node.volume.release(handle)
        await node.volume.forget(handle.ino, 1)


def _owner(superblock: Superblock, node: Node, ino: int) -> int:
    resources = node.volume.engine.resources
    group = resources.group(superblock.geometry.group_of(ino))
    return node.locks.core.recovery.mastering.master_of(group)


@in_virtual_time
async def test_files_in_directories_of_their_own_cost_no_messages() -> None:
    async with cluster_volumes(2, size_bytes=SIZE_BYTES) as cluster:
        directories = [
            (await mkdir(node.volume, b"dir%d" % node.slot)).ino for node in cluster.nodes
        ]
        for node, directory in zip(cluster.nodes, directories, strict=True):
            assert _owner(cluster.superblock, node, directory) == node.number
            await _files(node, directory, 0, 5)
        before = cluster.sent.copy()
        async with trio.open_nursery() as nursery:
            for node, directory in zip(cluster.nodes, directories, strict=True):
                nursery.start_soon(_files, node, directory, 5, 60)
        assert cluster.sent == before


@in_virtual_time
async def test_a_node_fills_the_directory_of_another_from_its_own_groups() -> None:
    async with cluster_volumes(3, size_bytes=SIZE_BYTES) as cluster:
        one, two, _ = cluster.nodes
        directory = await mkdir(one.volume, b"d")
        await _files(two, directory.ino, 0, 5)
        for entry in await two.volume.readdir(directory.ino, 2, 10):
            assert _owner(cluster.superblock, two, entry.attributes.ino) == two.number


@in_virtual_time
async def test_a_node_without_a_group_of_its_own_takes_any() -> None:
    async with cluster_volumes(3) as cluster:  # one group
        for node in cluster.nodes:
            directory = await mkdir(node.volume, b"dir%d" % node.slot)
            await _files(node, directory.ino, 0, 3)
