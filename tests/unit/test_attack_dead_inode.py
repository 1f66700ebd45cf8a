"""The block of a dead inode is somebody else's: nobody who still knows its number writes there."""

from __future__ import annotations

import pytest
import trio

from csvfs.errors import FilesystemError, StaleInode
from tests.cluster_volumes import cluster_volumes, in_virtual_time
from tests.simulated_volume import ROOT, create, mkdir


@in_virtual_time
async def test_a_number_of_a_dead_inode_whose_block_has_other_metadata_now() -> None:
    """It is not home yet, so the last image of the inode lies there still."""
    async with cluster_volumes(2) as cluster:
        one, two = cluster.nodes
        other = await create(one.volume, b"other")
        handle = await create(one.volume, b"f")
        await one.volume.release(handle)
        found = await two.volume.lookup(ROOT, b"f")
        two.volume.remember(found.ino, 1)
        await one.volume.unlink(ROOT, b"f")
        await one.volume.forget(handle.ino, 1)
        await one.volume.reclaimer.drain()
        await one.volume.setxattr(other.ino, b"user.x", b"1" * 500)
        assert one.volume.table.state(other.ino).fields().xattr_block == found.ino

        with pytest.raises(StaleInode):
            # What link(2) does when it has waited for its directory meanwhile.
            async with two.volume.engine.alone(found.ino, found.generation, named=False):
                pass
        with pytest.raises(StaleInode):
            await two.volume.setxattr(found.ino, b"user.y", b"2" * 500)
        with pytest.raises(StaleInode):
            await two.volume.getattr(found.ino)
        assert await two.volume.getxattr(other.ino, b"user.x") == b"1" * 500
        await two.volume.forget(found.ino, 1)
        await one.volume.release(other)


@in_virtual_time
async def test_a_link_to_what_another_node_removes_meanwhile() -> None:
    async with cluster_volumes(2) as cluster:
        one, two = cluster.nodes
        other = await create(one.volume, b"other")
        there = await mkdir(one.volume, b"there")
        handle = await create(one.volume, b"f")
        await one.volume.release(handle)
        found = await two.volume.lookup(ROOT, b"f")
        two.volume.remember(found.ino, 1)

        async def link() -> None:
            with pytest.raises(FilesystemError):
                await two.volume.link(found.ino, there.ino, b"again")

        async with trio.open_nursery() as nursery:
            async with one.volume.engine.alone(there.ino):
                nursery.start_soon(link)
                await trio.sleep(1)  # it has seen the file, and waits for the directory
                await one.volume.unlink(ROOT, b"f")
                await one.volume.forget(handle.ino, 1)
                await one.volume.reclaimer.drain()
                await one.volume.setxattr(other.ino, b"user.x", b"1" * 500)
        with pytest.raises(StaleInode):
            await two.volume.setxattr(found.ino, b"user.y", b"2" * 500)
        assert await two.volume.getxattr(other.ino, b"user.x") == b"1" * 500
        await two.volume.forget(found.ino, 1)
        await one.volume.release(other)
