"""A volume as a whole: recovery, failure, space, and what a kernel may do to it."""

from __future__ import annotations

import os

import pytest
import trio
import trio.testing

from csvfs import errors
from csvfs.namespace.inode import Inode, SetAttributes
from lockmgr.modes import Mode
from lockmgr.settings import Settings
from redirector.block.arbiter import Op
from redirector.block.device import MediumError
from redirector.block.simulated import SimulatedLun
from tests.lock_rival import LockRival
from tests.simulated_volume import (
    LUN_BYTES,
    PORT,
    RDWR,
    ROOT,
    UNIT,
    create,
    formatted,
    fresh_volume,
    mkdir,
    mounted,
    names,
)
from tests.volume_script import assert_clean


async def test_a_fresh_volume_is_an_empty_directory() -> None:
    async with fresh_volume() as volume:
        root = await volume.getattr(ROOT)
        assert root.is_directory and root.nlink == 2 and root.uid == 0
        assert await names(volume) == [b".", b".."]
        space = await volume.statfs()
        assert space.available_blocks < space.free_blocks < space.blocks == LUN_BYTES // 4096 - 896


async def test_what_was_left_is_there_after_the_next_mount() -> None:
    lun = SimulatedLun(LUN_BYTES, yields=False)
    superblock = await formatted(lun)
    async with mounted(await lun.login(PORT), superblock) as (volume, _):
        home = (await mkdir(volume, b"home")).ino
        handle = await create(volume, b"file", parent=home)
        await volume.write(handle, 12345, b"content")
        await volume.setattr(handle.ino, SetAttributes(mode=0o640, uid=7, gid=8, mtime_ns=99))
        await volume.setxattr(handle.ino, b"user.key", b"value")
        await volume.symlink(home, b"link", b"file", 0, 0)
        before = await volume.getattr(handle.ino)
        await volume.release(handle)
    async with mounted(await lun.login(PORT), superblock, incarnation=2) as (volume, _):
        home = (await volume.lookup(ROOT, b"home")).ino
        found = await volume.lookup(home, b"file")
        assert found == before
        handle = await volume.open(found.ino, os.O_RDONLY, 0)
        assert bytes(await volume.read(handle, 0, UNIT)) == bytes(12345) + b"content"
        assert await volume.getxattr(found.ino, b"user.key") == b"value"
        link = await volume.lookup(home, b"link")
        assert await volume.readlink(link.ino) == b"file"
        await volume.release(handle)
    await assert_clean(await lun.login(PORT), superblock, 2)


async def test_an_unlinked_file_lives_while_it_is_open_or_known() -> None:
    async with fresh_volume() as volume:
        empty = await volume.statfs()
        first = await create(volume, b"file")
        await volume.write(first, 0, b"alive")
        second = await volume.open(first.ino, RDWR, 0)
        await volume.unlink(ROOT, b"file")
        await volume.release(first)
        assert bytes(await volume.read(second, 0, 10)) == b"alive"
        await volume.write(second, UNIT, b"still")
        assert (await volume.getattr(second.ino)).nlink == 0
        with pytest.raises(errors.StaleInode):
            await volume.link(second.ino, ROOT, b"again")
        await volume.release(second)
        assert (await volume.getattr(second.ino)).size == UNIT + 5
        third = await volume.open(second.ino, RDWR, 0)
        await volume.release(third)
        await volume.forget(second.ino, 1)
        with pytest.raises(errors.StaleInode):
            await volume.getattr(second.ino)
        await volume.reclaimer.drain()
        assert (await volume.statfs()).free_blocks == empty.free_blocks


async def test_a_file_that_is_replaced_lives_while_it_is_open() -> None:
    async with fresh_volume() as volume:
        old, new = await create(volume, b"old"), await create(volume, b"new")
        await volume.write(old, 0, b"old")
        await volume.rename(ROOT, b"new", ROOT, b"old")
        assert bytes(await volume.read(old, 0, 10)) == b"old"
        assert (await volume.lookup(ROOT, b"old")).ino == new.ino
        await volume.release(old)
        await volume.release(new)


async def test_a_kernel_that_forgets_too_much_is_told_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with fresh_volume() as volume:
        handle = await create(volume, b"file")
        await volume.forget(handle.ino, 2)
        await volume.forget(12345, 1)
        assert len(caplog.records) == 2
        await volume.release(handle)
        volume.check()


async def test_create_without_exclusive_opens_what_is_there() -> None:
    async with fresh_volume() as volume:
        first = await create(volume, b"file")
        await volume.write(first, 0, b"content")
        second, found = await volume.create(ROOT, b"file", 0o600, RDWR, 0, 0)
        assert (found.ino, found.size) == (first.ino, 7)
        third, found = await volume.create(ROOT, b"file", 0o600, RDWR | os.O_TRUNC, 0, 0)
        assert found.size == 0
        with pytest.raises(errors.NameExists):
            await volume.create(ROOT, b"file", 0o600, RDWR | os.O_EXCL, 0, 0)
        await mkdir(volume, b"dir")
        with pytest.raises(errors.IsADirectory):
            await volume.create(ROOT, b"dir", 0o600, RDWR, 0, 0)
        for handle in (first, second, third):
            await volume.release(handle)


async def test_another_node_sees_what_was_written_when_it_gets_the_lock() -> None:
    lun = SimulatedLun(LUN_BYTES, yields=False)
    superblock = await formatted(lun)
    async with mounted(await lun.login(PORT), superblock) as (volume, locks):
        rival = LockRival(locks)
        handle = await create(volume, b"file")
        await volume.write(handle, 0, b"a" * UNIT)
        await volume.sync()
        await volume.write(handle, 100, b"b" * 512)
        state = volume.table.get(handle.ino)
        assert state is not None and state.dirty
        mtime = (await volume.getattr(handle.ino)).mtime_ns
        await rival.take(state.resource, Mode.PR)
        assert not state.dirty and state.inode is not None
        home = Inode.unpack(lun.blocks[handle.ino])
        assert (home.size, home.mtime_ns) == (UNIT, mtime)
        await rival.take(state.resource, Mode.EX)
        assert state.inode is None and handle.ino not in volume.store.cache
        assert not handle.file.map.chunks
        assert bytes(await volume.read(handle, 0, 200)) == b"a" * 100 + b"b" * 100
        await volume.release(handle)
        volume.check()


async def test_writers_and_the_lock_that_another_node_wants() -> None:
    async def main() -> None:
        lun = SimulatedLun(LUN_BYTES, seed=1)
        superblock = await formatted(lun)
        async with mounted(await lun.login(PORT), superblock) as (volume, locks):
            rival = LockRival(locks)
            handle = await create(volume, b"file")
            state = volume.table.get(handle.ino)
            assert state is not None

            async def write(task: int) -> None:
                for i in range(40):
                    await volume.write(handle, (task * 40 + i) * 4096, bytes([task]) * 4096)

            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    for task in range(4):
                        nursery.start_soon(write, task)
                    for mode in (Mode.EX, Mode.PR) * 10:
                        await rival.take(state.resource, mode)
            for task in range(4):
                found = bytes(await volume.read(handle, task * 40 * 4096, 40 * 4096))
                assert found == bytes([task]) * (40 * 4096)
            await volume.release(handle)

    await main()


async def test_after_a_failed_journal_write_every_call_says_so() -> None:
    lun = SimulatedLun(LUN_BYTES, yields=False)
    superblock = await formatted(lun)
    failures: list[errors.VolumeFailed] = []

    async def live_and_fail() -> None:
        async with mounted(await lun.login(PORT), superblock, on_failed=failures.append) as (
            volume,
            _,
        ):
            handle = await create(volume, b"file")
            await volume.write(handle, 0, bytes(UNIT))
            lun.inject(
                lambda c: c.op is Op.WRITE and c.fua, lambda what: MediumError(what, sense_key=3)
            )
            with pytest.raises(errors.VolumeFailed):
                await volume.fsync(handle.ino, False)
            for call in (
                volume.mkdir(ROOT, b"dir", 0o755, 0, 0),
                volume.unlink(ROOT, b"file"),
                volume.setattr(handle.ino, SetAttributes(mode=0o600)),
                volume.write(handle, UNIT, b"x"),
                volume.write(handle, 0, bytes(4096)),
                volume.read(handle, 0, 10),
                volume.getattr(handle.ino),
                volume.lookup(ROOT, b"file"),
                volume.open(handle.ino, RDWR, 0),
                volume.getxattr(handle.ino, b"user.a"),
                volume.fsync(handle.ino, True),
                volume.sync(),
            ):
                with pytest.raises(errors.VolumeFailed):
                    await call
            assert volume.failure is not None
            raise volume.failure

    with pytest.raises(ExceptionGroup):
        await live_and_fail()
    assert len(failures) == 1
    async with mounted(await lun.login(PORT), superblock, incarnation=2) as (volume, _):
        await volume.sync()
    await assert_clean(await lun.login(PORT), superblock, 2)


async def test_damaged_metadata_is_an_error_of_that_call_alone() -> None:
    lun = SimulatedLun(LUN_BYTES, yields=False)
    superblock = await formatted(lun)
    async with mounted(await lun.login(PORT), superblock) as (volume, _):
        bad = (await mkdir(volume, b"bad")).ino
        await mkdir(volume, b"good")
    lun.blocks[bad] = bytes(100) + b"garbage" + bytes(4096 - 107)
    async with mounted(await lun.login(PORT), superblock, incarnation=2) as (volume, _):
        with pytest.raises(errors.Damaged, match=f"block {bad}"):
            await volume.lookup(ROOT, b"bad")
        assert (await volume.lookup(ROOT, b"good")).is_directory
        with pytest.raises(errors.Damaged):
            await volume.readdir(ROOT, 0, 10)
        await volume.mkdir(ROOT, b"more", 0o755, 0, 0)


async def test_times_that_cannot_be_kept_become_the_nearest() -> None:
    async with fresh_volume() as volume:
        changes = SetAttributes(atime_ns=-(1 << 70), mtime_ns=1 << 70)
        found = await volume.setattr(ROOT, changes)
        assert (found.atime_ns, found.mtime_ns) == (-(1 << 63), (1 << 63) - 1)
        await volume.sync()


async def test_extended_attributes_follow_xattr_7() -> None:
    async with fresh_volume() as volume:
        ino = (await mkdir(volume, b"dir")).ino
        await volume.setxattr(ino, b"user.a", b"1", 1)
        with pytest.raises(errors.NameExists):
            await volume.setxattr(ino, b"user.a", b"2", 1)
        with pytest.raises(errors.NoAttribute):
            await volume.setxattr(ino, b"user.b", b"2", 2)
        await volume.setxattr(ino, b"user.a", b"", 2)
        assert await volume.getxattr(ino, b"user.a") == b""
        for name, error in (
            (b"user.", errors.InvalidArgument),
            (b"system.posix_acl_access", errors.NotSupported),
            (b"other.x", errors.NotSupported),
            (b"user." + b"n" * 251, errors.AttributeTooBig),
        ):
            with pytest.raises(error):
                await volume.setxattr(ino, name, b"")
        with pytest.raises(errors.AttributeTooBig):
            await volume.setxattr(ino, b"user.b", bytes(65537))
        with pytest.raises(errors.NoXattrSpace):
            await volume.setxattr(ino, b"user.b", bytes(4096))
        with pytest.raises(errors.InvalidArgument):
            await volume.setxattr(ino, b"user.b", b"", 4)
        await volume.setxattr(ino, b"trusted.b", bytes(3000))
        assert await volume.listxattr(ino) == [b"user.a", b"trusted.b"]
        await volume.removexattr(ino, b"user.a")
        await volume.removexattr(ino, b"trusted.b")
        assert await volume.listxattr(ino) == []
        with pytest.raises(errors.NoAttribute):
            await volume.removexattr(ino, b"user.a")
        assert (await volume.getattr(ino)).blocks == 0


async def test_memory_of_many_files_is_bounded_by_the_locks_that_are_cached() -> None:
    lun = SimulatedLun(LUN_BYTES, yields=False)
    superblock = await formatted(lun)
    settings = Settings(cache_limit=50, min_hold_s=0)
    async with mounted(await lun.login(PORT), superblock, settings=settings) as (volume, _):
        for i in range(300):
            await volume.mknod(ROOT, b"%d" % i, 0o100644, 0, 0, 0)
        await trio.testing.wait_all_tasks_blocked()
        assert len(volume.table._states) < 120
        assert len(await names(volume)) == 302


@pytest.mark.parametrize("_again", range(20))
async def test_a_lock_on_its_way_out_holds_nobody_up_who_leaves(
    _again: int, autojump_clock: trio.testing.MockClock
) -> None:
    """Shrunk from `test_volume_machine`: each call starts the demotion of its locks."""
    del autojump_clock
    lun = SimulatedLun(LUN_BYTES)
    superblock = await formatted(lun)
    nothing_cached = Settings(cache_limit=0, min_hold_s=0)
    device = await lun.login(PORT)
    with trio.fail_after(60):
        async with mounted(device, superblock, settings=nothing_cached) as (volume, _):
            await volume.setxattr(ROOT, b"user.a", b"")
            link = await volume.symlink(ROOT, b"b", b"t", 0, 0)
            volume.remember(link.ino, 1)
            await volume.forget(link.ino, 1)
            await names(volume)
            for ino in (ROOT, link.ino):
                await volume.getattr(ino)
                for name in await volume.listxattr(ino):
                    await volume.getxattr(ino, name)
    await assert_clean(await lun.login(PORT), superblock, 1)
