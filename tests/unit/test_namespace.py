"""Names: times, link counts, errors and listings, where the model of the machine does not look."""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from csvfs import errors
from csvfs.format import BLOCK_BYTES, BLOCKS_PER_UNIT, BlockType, new_block, seal
from csvfs.namespace import inode
from csvfs.namespace import names as namespace
from csvfs.namespace.inode import SetAttributes
from csvfs.namespace.inode_table import InodeState
from csvfs.namespace.rename import EXCHANGE, NOREPLACE
from csvfs.volume import Volume, VolumeOptions
from redirector.block.simulated import SimulatedLun
from tests.simulated_volume import LUN_BYTES, RDWR, ROOT, create, fresh_volume, mkdir, names


@dataclass
class Clock:
    """Every look at it is a nanosecond later."""

    now_ns: int = 1_000_000_000

    def __call__(self) -> int:
        self.now_ns += 1
        return self.now_ns


async def times(volume: Volume, ino: int) -> tuple[int, int]:
    found = await volume.getattr(ino)
    return found.mtime_ns, found.ctime_ns


async def test_what_changes_a_directory_marks_its_times() -> None:
    async with fresh_volume(options=VolumeOptions(clock=Clock())) as volume:
        home = (await mkdir(volume, b"home")).ino
        handle = await create(volume, b"file", parent=home)
        changes = (
            lambda: volume.mkdir(home, b"dir", 0o755, 0, 0),
            lambda: volume.symlink(home, b"link", b"target", 0, 0),
            lambda: volume.link(handle.ino, home, b"second"),
            lambda: volume.rename(home, b"file", home, b"renamed"),
            lambda: volume.unlink(home, b"second"),
            lambda: volume.rmdir(home, b"dir"),
        )
        for change in changes:
            before = await times(volume, home)
            await change()
            after = await times(volume, home)
            assert after[0] == after[1] > before[1]
        before = await times(volume, home)
        with pytest.raises(errors.NotFound):
            await volume.unlink(home, b"nothing")
        assert await times(volume, home) == before
        await volume.release(handle)


async def test_a_name_more_or_less_marks_ctime_of_the_inode_alone() -> None:
    async with fresh_volume(options=VolumeOptions(clock=Clock())) as volume:
        handle = await create(volume, b"file")
        mtime, ctime = await times(volume, handle.ino)
        for call in (
            volume.link(handle.ino, ROOT, b"second"),
            volume.rename(ROOT, b"second", ROOT, b"third"),
            volume.unlink(ROOT, b"third"),
            volume.setattr(handle.ino, SetAttributes(mode=0o600)),
            volume.setxattr(handle.ino, b"user.a", b"1"),
        ):
            await call
            found = await times(volume, handle.ino)
            assert found[0] == mtime and found[1] > ctime
            ctime = found[1]
        await volume.release(handle)


async def test_directories_count_their_subdirectories() -> None:
    async with fresh_volume() as volume:
        first, second = (await mkdir(volume, b"1")).ino, (await mkdir(volume, b"2")).ino

        async def links() -> tuple[int, ...]:
            return tuple([(await volume.getattr(ino)).nlink for ino in (ROOT, first, second)])

        assert await links() == (4, 2, 2)
        await volume.mkdir(first, b"sub", 0o755, 0, 0)
        assert await links() == (4, 3, 2)
        await volume.rename(first, b"sub", second, b"sub")
        assert await links() == (4, 2, 3)
        await volume.mkdir(first, b"other", 0o755, 0, 0)
        await volume.rename(first, b"other", second, b"sub")
        assert await links() == (4, 2, 3)
        handle = await create(volume, b"file", parent=first)
        await volume.rename(first, b"file", second, b"sub", EXCHANGE)
        assert await links() == (4, 3, 2)
        assert (await volume.lookup(first, b"file")).is_directory
        await volume.rmdir(first, b"file")
        assert await links() == (4, 2, 2)
        await volume.release(handle)


async def test_a_set_group_id_directory_hands_down_its_group() -> None:
    async with fresh_volume() as volume:
        home = (await mkdir(volume, b"home")).ino
        await volume.setattr(home, SetAttributes(mode=0o2775, gid=500))
        below = await volume.mkdir(home, b"dir", 0o755, 3, 3)
        assert (below.gid, below.mode) == (500, stat.S_IFDIR | 0o2755)
        file = await volume.mknod(home, b"file", stat.S_IFREG | 0o644, 0, 3, 3)
        assert (file.uid, file.gid, file.mode) == (3, 500, stat.S_IFREG | 0o644)


async def test_special_files_keep_type_and_device() -> None:
    async with fresh_volume() as volume:
        for kind in (stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK):
            rdev = os.makedev(8, 17) if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0
            made = await volume.mknod(ROOT, b"node", kind | 0o640, rdev, 1, 2)
            assert (made.mode, made.rdev, made.size) == (kind | 0o640, rdev, 0)
            with pytest.raises(errors.InvalidArgument):
                await volume.open(made.ino, RDWR, 0)
            await volume.unlink(ROOT, b"node")
        with pytest.raises(errors.InvalidArgument):
            await volume.mknod(ROOT, b"node", stat.S_IFDIR | 0o755, 0, 0, 0)


async def test_limits_of_names_targets_and_links(monkeypatch: pytest.MonkeyPatch) -> None:
    async with fresh_volume() as volume:
        await volume.mkdir(ROOT, b"n" * 255, 0o755, 0, 0)
        with pytest.raises(errors.NameTooLong):
            await volume.mkdir(ROOT, b"n" * 256, 0o755, 0, 0)
        with pytest.raises(errors.NameTooLong):
            await volume.lookup(ROOT, b"n" * 256)
        made = await volume.symlink(ROOT, b"link", b"t" * 4095, 0, 0)
        assert await volume.readlink(made.ino) == b"t" * 4095 and made.size == 4095
        with pytest.raises(errors.NameTooLong):
            await volume.symlink(ROOT, b"link2", b"t" * 4096, 0, 0)
        monkeypatch.setattr(namespace, "MAX_LINKS", 3)
        for name in (b"b", b"c"):
            await volume.link(made.ino, ROOT, name)
        with pytest.raises(errors.TooManyLinks):
            await volume.link(made.ino, ROOT, b"d")
        with pytest.raises(errors.TooManyLinks):
            await volume.mkdir(ROOT, b"e", 0o755, 0, 0)


async def test_a_removed_directory_takes_no_new_names() -> None:
    async with fresh_volume() as volume:
        gone = (await mkdir(volume, b"gone")).ino
        await volume.rmdir(ROOT, b"gone")
        assert (await volume.getattr(gone)).nlink == 0
        for cookie in range(3):
            with pytest.raises(errors.NotFound):
                await volume.readdir(gone, cookie, 10)
        with pytest.raises(errors.NotFound):
            await volume.mkdir(gone, b"dir", 0o755, 0, 0)
        with pytest.raises(errors.NotFound):
            await volume.create(gone, b"file", 0o644, RDWR, 0, 0)
        await volume.mkdir(ROOT, b"dir", 0o755, 0, 0)
        with pytest.raises(errors.NotFound):
            await volume.rename(ROOT, b"dir", gone, b"dir")
        await volume.forget(gone, 1)
        with pytest.raises(errors.StaleInode):
            await volume.getattr(gone)


async def inode_in_place_of(volume: Volume, ino: int) -> None:
    """A file, further down in the tree, with the number of an inode that is to be gone."""
    await volume.reclaimer.drain()
    for number in range(1000):
        made = await volume.mknod(ROOT, b"new %d" % number, stat.S_IFREG, 0, 0, 0)
        volume.remember(made.ino, 1)
        if made.ino == ino:
            return
    pytest.fail("the number is not used again")


async def test_above_a_removed_directory_is_nothing() -> None:
    """Not even what has the number of its parent by now."""
    async with fresh_volume() as volume:
        parent = (await mkdir(volume, b"parent")).ino
        child = (await mkdir(volume, b"child", parent=parent)).ino
        assert (await volume.lookup(child, b"..")).ino == parent
        await volume.rmdir(parent, b"child")
        await volume.rmdir(ROOT, b"parent")
        await volume.forget(parent, 1)
        await inode_in_place_of(volume, parent)
        with pytest.raises(errors.NotFound):
            await volume.lookup(child, b"..")
        with pytest.raises(errors.NotFound):
            await volume.readdir(child, 0, 10)
        assert (await volume.lookup(child, b".")).nlink == 0


@pytest.mark.parametrize("lock", range(4))
@pytest.mark.parametrize("removed", [False, True])
async def test_what_is_above_a_directory_that_moves_meanwhile(lock: int, removed: bool) -> None:
    """Before any of the locks that the look-up takes, the parent becomes another inode."""
    async with fresh_volume() as volume:
        parent = (await mkdir(volume, b"parent")).ino
        other = (await mkdir(volume, b"other")).ino
        child = (await mkdir(volume, b"child", parent=parent)).ino
        looking = volume.engine.looking
        taken = 0

        @asynccontextmanager
        async def meanwhile(
            ino: int, generation: int | None = None, *, named: bool = True
        ) -> AsyncIterator[InodeState]:
            nonlocal taken
            taken += 1
            if taken == lock + 1:
                volume.engine.looking = looking  # type: ignore[method-assign]
                if removed:
                    await volume.rmdir(parent, b"child")
                else:
                    await volume.rename(parent, b"child", other, b"moved")
                await volume.rmdir(ROOT, b"parent")
                await volume.forget(parent, 1)
                await inode_in_place_of(volume, parent)
            async with looking(ino, generation, named=named) as state:
                yield state

        volume.engine.looking = meanwhile  # type: ignore[method-assign,assignment]
        if removed:
            with pytest.raises(errors.NotFound):
                await volume.lookup(child, b"..")
        else:
            assert (await volume.lookup(child, b"..")).ino == other
        assert taken > lock


async def test_renames_that_cannot_be() -> None:
    async with fresh_volume() as volume:
        top = (await mkdir(volume, b"top")).ino
        middle = (await mkdir(volume, b"middle", parent=top)).ino
        await mkdir(volume, b"low", parent=middle)
        with pytest.raises(errors.InvalidArgument):
            await volume.rename(ROOT, b"top", middle, b"x")
        with pytest.raises(errors.InvalidArgument):
            await volume.rename(ROOT, b"top", top, b"x")
        with pytest.raises(errors.NotEmpty):
            await volume.rename(middle, b"low", ROOT, b"top")
        with pytest.raises(errors.InvalidArgument):
            await volume.rename(middle, b"low", ROOT, b"top", EXCHANGE)
        with pytest.raises(errors.NameExists):
            await volume.rename(middle, b"low", ROOT, b"top", NOREPLACE)
        with pytest.raises(errors.NotFound):
            await volume.rename(middle, b"low", ROOT, b"nothing", EXCHANGE)
        with pytest.raises(errors.InvalidArgument):
            await volume.rename(middle, b"low", ROOT, b"x", 4)
        with pytest.raises(errors.InvalidArgument):
            await volume.rename(middle, b"..", ROOT, b"x")
        assert await names(volume, middle) == [b".", b"..", b"low"]


async def test_renaming_a_name_to_another_of_the_same_inode_does_nothing() -> None:
    async with fresh_volume() as volume:
        handle = await create(volume, b"a")
        await volume.link(handle.ino, ROOT, b"b")
        before = await volume.getattr(handle.ino)
        await volume.rename(ROOT, b"a", ROOT, b"b")
        assert await volume.getattr(handle.ino) == before
        assert set(await names(volume)) == {b".", b"..", b"a", b"b"}
        await volume.release(handle)


async def test_cookies_hold_while_entries_come_and_go() -> None:
    async with fresh_volume() as volume:
        stay = {b"stay%d" % i for i in range(60)}
        for name in stay:
            await volume.mknod(ROOT, name, stat.S_IFREG, 0, 0, 0)
        for i in range(60):
            await volume.mknod(ROOT, b"go%d" % i, stat.S_IFREG, 0, 0, 0)
        seen: list[bytes] = []
        cookie = count = 0
        while entries := await volume.readdir(ROOT, cookie, 3):
            cookie = entries[-1].cookie
            seen += [entry.name for entry in entries]
            if count < 60:
                await volume.unlink(ROOT, b"go%d" % count)
                await volume.mkdir(ROOT, b"come%d" % count, 0o755, 0, 0)
                count += 1
        assert len(seen) == len(set(seen))
        assert stay <= set(seen) and seen[:2] == [b".", b".."]


async def test_dots_are_the_directory_and_its_parent() -> None:
    async with fresh_volume() as volume:
        top = await mkdir(volume, b"top")
        low = await mkdir(volume, b"low", parent=top.ino)
        assert (await volume.lookup(low.ino, b".")).ino == low.ino
        assert (await volume.lookup(low.ino, b"..")).ino == top.ino
        assert (await volume.lookup(ROOT, b"..")).ino == ROOT
        entries = await volume.readdir(low.ino, 0, 10)
        assert [(e.name, e.cookie, e.attributes.ino) for e in entries] == [
            (b".", 1, low.ino),
            (b"..", 2, top.ino),
        ]
        await volume.rename(top.ino, b"low", ROOT, b"low")
        assert (await volume.lookup(low.ino, b"..")).ino == ROOT


async def test_a_large_directory_grows_and_shrinks() -> None:
    async with fresh_volume() as volume:
        home = (await mkdir(volume, b"home")).ino
        for i in range(600):
            await volume.mknod(home, b"a name that is long enough %d" % i, stat.S_IFREG, 0, 0, 0)
        big = await volume.getattr(home)
        assert big.size > 8 * BLOCK_BYTES and big.blocks > 64
        assert len(await names(volume, home)) == 602
        with pytest.raises(errors.NotEmpty):
            await volume.rmdir(ROOT, b"home")
        for i in range(600):
            await volume.unlink(home, b"a name that is long enough %d" % i)
        assert (await volume.getattr(home)).size == BLOCK_BYTES
        await volume.rmdir(ROOT, b"home")


async def test_names_whose_hashes_collide_live_side_by_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("csvfs.namespace.directory.name_key", lambda _seed, _name: 512)
    monkeypatch.setattr("csvfs.namespace.names.name_key", lambda _seed, _name: 512)
    async with fresh_volume() as volume:
        for i in range(256):
            await volume.mknod(ROOT, b"%d" % i, stat.S_IFREG, 0, 0, 0)
        with pytest.raises(errors.NoEntrySpace):
            await volume.mknod(ROOT, b"one too many", stat.S_IFREG, 0, 0, 0)
        for i in range(0, 256, 2):
            await volume.unlink(ROOT, b"%d" % i)
        for i in range(1, 256, 2):
            await volume.lookup(ROOT, b"%d" % i)
        await volume.mknod(ROOT, b"again", stat.S_IFREG, 0, 0, 0)
        assert len(await names(volume)) == 2 + 128 + 1


async def test_what_a_guest_writes_is_never_an_inode() -> None:
    lun = SimulatedLun(LUN_BYTES, yields=False)
    async with fresh_volume(lun) as volume:
        handle = await create(volume, b"image")
        await volume.write(handle, 0, bytes(65536))
        data = (handle.file.map.chunks[0][0] >> 1) * BLOCKS_PER_UNIT
        forged = new_block(BlockType.INODE, data, data, volume.store.journal.state.place.volume_id)
        made = inode.new_inode(data, stat.S_IFREG | 0o4755, 0, 0, 1, parent=None)
        made.parent = 0
        made.pack_into(forged)
        seal(forged, 1 << 40)
        await volume.write(handle, 0, bytes(forged) * BLOCKS_PER_UNIT)
        assert bytes(lun.blocks[data]) == bytes(forged)
        for call in (volume.getattr(data), volume.open(data, RDWR, 0), volume.listxattr(data)):
            with pytest.raises(errors.StaleInode):
                await call
        await volume.release(handle)


async def test_numbers_that_are_no_inode_are_stale() -> None:
    async with fresh_volume() as volume:
        directory = (await mkdir(volume, b"home")).ino
        for i in range(200):
            await volume.mknod(directory, b"%d" % i * 30, stat.S_IFREG, 0, 0, 0)
        tree_nodes = [
            a for a in range(1000) if (k := volume.store.cache.key_of(a)) and k.kind == 11
        ]
        assert tree_nodes
        for number in (0, 7, 10**12, *tree_nodes):
            with pytest.raises(errors.StaleInode):
                await volume.getattr(number)


async def test_a_number_that_was_reused_is_stale() -> None:
    async with fresh_volume() as volume:
        old = await create(volume, b"old")
        await volume.release(old)
        state = volume.table.get(old.ino)
        assert state is not None and state.known
        volume.table.forget(old.ino)  # as when another node takes the lock, and reuses the block
        state.generation ^= 1
        with pytest.raises(errors.StaleInode):
            await volume.getattr(old.ino)
        state.generation ^= 1
