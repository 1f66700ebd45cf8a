"""What a file shows after writes that failed or were given up half-way, and what fsync promises."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import trio
import trio.testing

from csvfs.errors import DataLost
from csvfs.journal.block_transfer import TRANSFER_DEPTH
from csvfs.journal.store import StoreOptions
from csvfs.namespace.inode import SetAttributes
from csvfs.volume import VolumeOptions
from redirector.block.arbiter import Op
from redirector.block.device import MediumError
from redirector.block.medium import keep_none
from redirector.block.simulated import Command, SimulatedLun
from tests.simulated_volume import (
    LUN_BYTES,
    PORT,
    UNIT,
    create,
    formatted,
    mounted,
)


class _Vanish(Exception):
    """The host dies."""


def _bad(what: str) -> MediumError:
    return MediumError(what, sense_key=3, asc_ascq=0x0C00)


@pytest.mark.parametrize("data_sync", [False, True])
@pytest.mark.parametrize("how", ["fsync", "sync"])
async def test_fsync_makes_stable_what_it_is_asked_for_however_much_else_is_dirty(
    how: str, data_sync: bool
) -> None:
    """A record takes a limited number of inodes that were changed without a transaction."""
    lun = SimulatedLun(LUN_BYTES, record=True)
    superblock = await formatted(lun)
    try:
        async with mounted(await lun.login(PORT), superblock) as (volume, _):
            handles = [await create(volume, b"f%d" % n) for n in range(60)]
            for handle in handles:
                await volume.write(handle, 0, bytes(512))
            await volume.sync()
            for handle in handles:
                await volume.write(handle, 512, b"x" * 512)  # longer, in place: in memory only
            if how == "sync":
                await volume.sync()
            else:
                await volume.fsync(handles[-1].ino, data_sync)
            inos = [h.ino for h in (handles if how == "sync" else handles[-1:])]
            raise _Vanish
    except* _Vanish:
        pass
    lun = lun.crashed(keep=keep_none)
    async with mounted(await lun.login(PORT), superblock, incarnation=2) as (volume, _):
        for ino in inos:
            assert (await volume.getattr(ino)).size == 1024


@pytest.mark.parametrize("then", ["truncate", "write"])
@pytest.mark.parametrize("how", ["error", "cancel"])
async def test_bytes_of_a_failed_write_behind_the_end_never_show(how: str, then: str) -> None:
    """The write covers the rest of the last unit and many more; only the first part of it lands."""
    lun = SimulatedLun(LUN_BYTES)
    superblock = await formatted(lun)
    lun.identity = replace(lun.identity, max_transfer_bytes=UNIT)  # several commands
    async with mounted(await lun.login(PORT), superblock) as (volume, _):
        handle = await create(volume, b"f")
        await volume.write(handle, 0, b"a" * 100)
        await volume.write(handle, 100, b"b" * 50)  # from here on the tail is known to be zero
        count = itertools.count()

        def long(command: Command) -> bool:
            return command.op is Op.WRITE and command.length_bytes == UNIT

        if how == "error":
            lun.inject(lambda command: long(command) and next(count) == 1, _bad)
            with pytest.raises(DataLost):
                await volume.write(handle, 4096, b"!" * (20 * UNIT))
        else:
            hold = lun.hold(long, limit=TRANSFER_DEPTH)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(volume.write, handle, 4096, b"!" * (20 * UNIT))
                await hold.wait_held(TRANSFER_DEPTH)
                nursery.cancel_scope.cancel()
                hold.lift()
        assert (await volume.getattr(handle.ino)).size == 150
        if then == "truncate":
            await volume.setattr(handle.ino, SetAttributes(size=22 * UNIT))
        else:
            await volume.write(handle, 22 * UNIT - 1, b"\0")
        found = bytes(await volume.read(handle, 0, 22 * UNIT))
        assert found == b"a" * 100 + b"b" * 50 + bytes(22 * UNIT - 150)
        volume.check()


async def test_two_writes_behind_the_end_one_of_which_fails() -> None:
    """Who makes the tail zero after the failure waits for the write that is still on its way: it
    would wipe out what that one has written."""
    lun = SimulatedLun(LUN_BYTES)
    superblock = await formatted(lun)
    async with mounted(await lun.login(PORT), superblock) as (volume, _):
        handle = await create(volume, b"f")
        await volume.write(handle, 0, b"a" * 512)
        await volume.write(handle, 512, b"b" * 512)
        lun.inject(lambda command: command.data == b"!" * 512, _bad)
        hold = lun.hold(lambda command: command.data == b"c" * 512, limit=1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(volume.write, handle, 2048, b"c" * 512)
            await hold.wait_held()
            with pytest.raises(DataLost):
                await volume.write(handle, 8192, b"!" * 512)
            nursery.start_soon(volume.write, handle, 4096, b"d" * 512)
            await trio.testing.wait_all_tasks_blocked()
            hold.lift()
        found = bytes(await volume.read(handle, 0, UNIT))
        expected = bytearray(4608)
        for start, letter in ((0, b"a"), (512, b"b"), (2048, b"c"), (4096, b"d")):
            expected[start : start + 512] = letter * 512
        assert found == expected


async def test_fsync_says_that_the_size_was_lost_with_the_inode() -> None:
    lun = SimulatedLun(LUN_BYTES)
    superblock = await formatted(lun)
    options = VolumeOptions(store=StoreOptions(clean_cache_bytes=1))
    async with mounted(await lun.login(PORT), superblock, options=options) as (volume, _):
        handles = [await create(volume, b"f%d" % n) for n in range(40)]
        for handle in handles:
            await volume.write(handle, 0, bytes(512))
        await volume.store.checkpoint()
        first = handles[0]
        assert first.ino not in volume.store.cache
        lun.medium_errors.append(range(first.ino * 4096, first.ino * 4096 + 4096))
        await volume.write(first, 512, bytes(512))
        with pytest.raises(DataLost):
            await volume.fsync(first.ino, True)
        assert volume.failure is None
        lun.medium_errors.clear()
