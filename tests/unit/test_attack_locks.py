"""Locks given up in the middle of things, and tasks that wait for each other."""

from __future__ import annotations

import itertools
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.lowlevel
import trio.testing

from csvfs.engine.locks import RENAME
from csvfs.errors import NotEmpty
from csvfs.namespace.rename import EXCHANGE
from csvfs.volume import Volume
from lockmgr.manager import LockManager
from lockmgr.modes import Mode
from redirector.block.arbiter import Op
from redirector.block.simulated import SimulatedLun
from tests.lock_rival import LockRival
from tests.simulated_volume import LUN_BYTES, PORT, ROOT, UNIT, create, formatted, mkdir, mounted

Task = Callable[[], Awaitable[Any]]


@asynccontextmanager
async def fresh_volume_and_locks() -> AsyncIterator[tuple[Volume, LockManager]]:
    lun = SimulatedLun(LUN_BYTES)
    superblock = await formatted(lun)
    async with mounted(await lun.login(PORT), superblock) as found:
        yield found


@pytest.mark.usefixtures("autojump_clock")
@pytest.mark.parametrize("number", range(7))
async def test_a_read_while_the_lock_is_lowered_leaves_no_change_behind_that_nobody_may_write(
    number: int,
) -> None:
    lun = SimulatedLun(LUN_BYTES)
    superblock = await formatted(lun)
    async with mounted(await lun.login(PORT), superblock) as (volume, locks):
        rival = LockRival(locks)
        handle = await create(volume, b"f")
        await volume.write(handle, 0, bytes(UNIT))
        resource = volume.engine.resources.inode(handle.ino)
        count = itertools.count()
        hold = lun.hold(
            lambda command: command.op is not Op.READ and next(count) == number, limit=1
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rival.take, resource, Mode.PR)
            with trio.move_on_after(1):
                await hold.wait_held()
            with trio.move_on_after(1):
                await volume.read(handle, 0, 512)  # PR: served while EX is lowered to PR
            hold.lift()
        assert not locks.node_holds(resource, Mode.EX)
        volume.check()
        assert not handle.state.dirty
        assert not volume.store.journal.state.journaled(resource)
        await volume.sync()
        assert volume.failure is None


async def _two_wait_for_a_directory(
    volume: Volume, locks: LockManager, first: Task, second: Task
) -> None:
    """The directory ``d`` is kept until both tasks wait for something; then both end."""
    directory = await volume.lookup(ROOT, b"d")
    kept = await locks.acquire(volume.engine.resources.inode(directory.ino), Mode.EX)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(second)
            await trio.testing.wait_all_tasks_blocked()
            kept.release()


@pytest.mark.usefixtures("autojump_clock")
@pytest.mark.parametrize("second", ["exchange", "listing"])
async def test_nobody_waits_for_a_directory_with_a_file_in_hand(second: str) -> None:
    """link has the directory and waits for the file: who had it in hand would wait for link."""
    async with fresh_volume_and_locks() as (volume, locks):
        file = await create(volume, b"f")
        directory = await mkdir(volume, b"d")
        assert file.ino < directory.ino

        async def exchange() -> None:
            await volume.rename(ROOT, b"f", ROOT, b"d", EXCHANGE)

        async def listing() -> None:
            await volume.readdir(ROOT, 0, 32)

        await _two_wait_for_a_directory(
            volume,
            locks,
            lambda: volume.link(file.ino, directory.ino, b"again"),
            exchange if second == "exchange" else listing,
        )


@pytest.mark.usefixtures("autojump_clock")
async def test_renames_between_unrelated_directories_close_no_circle_with_an_ancestor() -> None:
    """a < b < c by number, and c is above a: were directories locked by their numbers, a rename
    would have a and wait for b, another have b and wait for c, and rmdir have c and wait for a."""
    async with fresh_volume_and_locks() as (volume, locks):
        a, b, c = sorted([(await mkdir(volume, name)).ino for name in (b"x", b"y", b"z")])
        for entry in await volume.readdir(ROOT, 2, 9):
            if entry.attributes.ino == a:
                await volume.rename(ROOT, entry.name, c, b"a")
        for parent, name in ((a, b"1"), (a, b"kept"), (b, b"2")):
            await volume.mknod(parent, name, stat.S_IFREG | 0o600, 0, 0, 0)

        async def rmdir() -> None:
            with pytest.raises(NotEmpty):
                await volume.rmdir(c, b"a")

        kept = [await locks.acquire(RENAME, Mode.EX)]
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(volume.rename, a, b"1", b, b"1")
                nursery.start_soon(volume.rename, b, b"2", c, b"2")
                await trio.testing.wait_all_tasks_blocked()
                kept += [
                    await locks.acquire(volume.engine.resources.inode(ino), Mode.PR)
                    for ino in (a, b, c)
                ]
                kept.pop(0).release()
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(rmdir)
                await trio.testing.wait_all_tasks_blocked()
                for lock in kept:
                    lock.release()
        assert sorted(entry.name for entry in await volume.readdir(c, 2, 9)) == [b"2", b"a"]
