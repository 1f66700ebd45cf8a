"""What another node removed: numbers are stale, names are not found (`csvfs.host.answers`)."""

from __future__ import annotations

import os
import stat
from collections.abc import Awaitable, Callable

import pytest
import trio

from csvfs.errors import FilesystemError, NotFound, StaleInode
from csvfs.namespace.inode import SetAttributes
from csvfs.volume import Volume
from tests.cluster_volumes import cluster_volumes, in_virtual_time
from tests.simulated_volume import ROOT, UNIT, create, mkdir

Call = Callable[[Volume, int], Awaitable[object]]

OF_A_FILE: list[tuple[Call, type[FilesystemError]]] = [
    (lambda v, ino: v.open(ino, os.O_RDWR, 0), StaleInode),
    (lambda v, ino: v.open(ino, os.O_RDWR | os.O_TRUNC, 0), StaleInode),
    (lambda v, ino: v.getattr(ino), StaleInode),
    (lambda v, ino: v.setattr(ino, SetAttributes(mode=0o600)), StaleInode),
    (lambda v, ino: v.setattr(ino, SetAttributes(size=0)), StaleInode),
    (lambda v, ino: v.readlink(ino), StaleInode),
    (lambda v, ino: v.getxattr(ino, b"user.a"), StaleInode),
    (lambda v, ino: v.setxattr(ino, b"user.a", b""), StaleInode),
    (lambda v, ino: v.listxattr(ino), StaleInode),
    (lambda v, ino: v.removexattr(ino, b"user.a"), StaleInode),
    (lambda v, ino: v.link(ino, ROOT, b"again"), StaleInode),
]
OF_A_DIRECTORY: list[tuple[Call, type[FilesystemError]]] = [
    (lambda v, ino: v.getattr(ino), StaleInode),
    (lambda v, ino: v.lookup(ino, b"x"), StaleInode),
    (lambda v, ino: v.lookup(ino, b".."), StaleInode),
    (lambda v, ino: v.mkdir(ino, b"x", 0o755, 0, 0), StaleInode),
    (lambda v, ino: v.mknod(ino, b"x", stat.S_IFREG | 0o644, 0, 0, 0), StaleInode),
    (lambda v, ino: v.symlink(ino, b"x", b"y", 0, 0), StaleInode),
    (lambda v, ino: v.create(ino, b"x", 0o644, os.O_RDWR, 0, 0), StaleInode),
    (lambda v, ino: v.unlink(ino, b"x"), StaleInode),
    (lambda v, ino: v.rmdir(ino, b"x"), StaleInode),
    (lambda v, ino: v.rename(ino, b"x", ROOT, b"y", 0), StaleInode),
    (lambda v, ino: v.rename(ROOT, b"there", ino, b"y", 0), StaleInode),
    (lambda v, ino: v.readdir(ino, 0, 9), NotFound),
    (lambda v, ino: v.readdir(ino, 2, 9), NotFound),
]


@pytest.mark.parametrize("freed", [False, True])
@in_virtual_time
async def test_every_call_on_what_another_node_removed(freed: bool) -> None:
    async with cluster_volumes(2) as cluster:
        one, two = cluster.nodes
        await mkdir(one.volume, b"there")
        for directory, calls in enumerate((OF_A_FILE, OF_A_DIRECTORY)):
            if directory:
                await one.volume.mkdir(ROOT, b"gone", 0o755, 0, 0)
            else:
                await one.volume.mknod(ROOT, b"gone", stat.S_IFREG | 0o644, 0, 0, 0)
            found = await two.volume.lookup(ROOT, b"gone")
            two.volume.remember(found.ino, 1)
            await (one.volume.rmdir if directory else one.volume.unlink)(ROOT, b"gone")
            if freed:
                await one.volume.reclaimer.drain()
            for call, error in calls:
                with pytest.raises(error):
                    await call(two.volume, found.ino)
            with pytest.raises(NotFound):
                await two.volume.lookup(ROOT, b"gone")
            await two.volume.forget(found.ino, 1)


@in_virtual_time
async def test_what_this_node_removed_is_not_found_by_its_number() -> None:
    """POSIX: there are no new names in a directory that was removed."""
    async with cluster_volumes(2) as cluster:
        one, _ = cluster.nodes
        gone = await mkdir(one.volume, b"gone")
        await one.volume.rmdir(ROOT, b"gone")
        assert (await one.volume.getattr(gone.ino)).nlink == 0
        with pytest.raises(NotFound):
            await one.volume.mkdir(gone.ino, b"x", 0o755, 0, 0)


@pytest.mark.parametrize("opened", [False, True])
@in_virtual_time
async def test_a_kernel_that_never_forgets_keeps_no_file_whose_remover_died(opened: bool) -> None:
    """Nobody told it that the name is gone, so it may keep it in its cache for ever."""
    async with cluster_volumes(3) as cluster:
        one, two, three = cluster.nodes
        handle = await create(one.volume, b"f")
        await one.volume.write(handle, 0, bytes(3 * UNIT))
        users = []
        for node in (two, three):
            found = await node.volume.lookup(ROOT, b"f")
            node.volume.remember(found.ino, 1)
            if opened:
                users.append((node, await node.volume.open(found.ino, os.O_RDONLY, 0)))
        await one.volume.unlink(ROOT, b"f")
        await one.volume.sync()
        await cluster.kill(one)
        for node, reader in users:
            await trio.sleep(10)
            assert sum(n.volume.reclaimer.units_freed for n in cluster.nodes) == 0
            assert len(await node.volume.read(reader, 0, 9 * UNIT)) == 3 * UNIT
            await node.volume.release(reader)
        await trio.sleep(10)  # the commit that the reclaimer waits for
        assert sum(n.volume.reclaimer.units_freed for n in cluster.nodes) == 3
        for node in (two, three):
            with pytest.raises(StaleInode):
                await node.volume.getattr(handle.ino)
            await node.volume.forget(handle.ino, 1)
