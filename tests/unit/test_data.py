"""The content of files: where it lies, what a write costs, what a failure means."""

from __future__ import annotations

import os
import stat
from itertools import pairwise
from random import Random

import pytest
import trio
import trio.testing

from csvfs import errors
from csvfs.namespace.inode import MAX_FILE_BYTES, SetAttributes
from redirector.block.arbiter import Op
from redirector.block.simulated import SimulatedLun
from tests.simulated_volume import LUN_BYTES, PORT, RDWR, ROOT, UNIT, create, formatted, mounted
from tests.volume_bench import bench

MIB = 1 << 20


class Crash(Exception):
    """The host dies."""


async def test_holes_and_unwritten_units_are_zeroes() -> None:
    async with bench() as b:
        handle = await create(b.volume, b"sparse")
        await b.volume.write(handle, 10 * UNIT + 100, b"x")
        found = await b.volume.getattr(handle.ino)
        assert (found.size, found.blocks) == (10 * UNIT + 101, UNIT // 512)
        assert await b.read(handle, 0, 11 * UNIT) == bytes(10 * UNIT + 100) + b"x"
        assert await b.read(handle, 11 * UNIT, 5) == b""
        await b.volume.setattr(handle.ino, SetAttributes(size=1 << 40))
        assert await b.read(handle, (1 << 40) - 10, 100) == bytes(10)
        await b.volume.release(handle)


async def test_a_first_write_fills_the_unit_with_zeroes_around_it() -> None:
    async with bench() as b:
        old = await create(b.volume, b"old")
        await b.volume.write(old, 0, b"secret" * 20_000)
        await b.volume.unlink(ROOT, b"old")
        await b.volume.release(old)
        await b.volume.forget(old.ino, 1)
        await b.volume.reclaimer.drain()
        new = await create(b.volume, b"new")
        for unit in range(1200):  # every free unit comes by
            await b.volume.write(new, unit * UNIT + 777, b"y")
        for unit in range(1200):
            assert await b.read(new, unit * UNIT, UNIT) == (
                bytes(777) + b"y" + bytes(UNIT - 778) * (unit < 1199)
            )
        await b.volume.release(new)


async def test_a_mebibyte_is_one_run_one_command_and_two_transactions() -> None:
    async with bench() as b:
        handle = await create(b.volume, b"image")
        merges = 0
        merge = b.volume.store.journal.merge

        def counting(transaction: object) -> None:
            nonlocal merges
            merges += 1
            merge(transaction)  # type: ignore[arg-type]

        b.volume.store.journal.merge = counting  # type: ignore[method-assign]
        places = []
        for i in range(8):
            b.data_writes()
            await b.volume.write(handle, i * MIB, bytes([i + 1]) * MIB)
            places += b.data_writes()
        assert merges == 16
        assert [length for _, length in places] == [MIB] * 8
        assert [offset for offset, _ in places] == [places[0][0] + i * MIB for i in range(8)]
        for i in range(8):
            assert await b.read(handle, i * MIB, MIB) == bytes([i + 1]) * MIB
        await b.volume.release(handle)


async def test_a_write_in_place_is_one_command_and_no_transaction() -> None:
    async with bench() as b:
        handle = await create(b.volume, b"image")
        await b.volume.write(handle, 0, bytes(UNIT))
        await b.volume.sync()
        b.data_writes()
        b.volume.store.journal.merge = None  # type: ignore[assignment]
        for at in (0, 4096, 512, 3 * 4096):
            await b.volume.write(handle, at, b"z" * 4096)
        seen = b.data_writes()
        del b.volume.store.journal.merge
        assert [length for _, length in seen] == [4096] * 4
        await b.volume.release(handle)


async def test_requests_cross_units_and_commands_have_a_limit() -> None:
    async with bench() as b:
        handle = await create(b.volume, b"image")
        content = bytearray(Random(1).randbytes(3 * MIB))
        assert await b.volume.write(handle, 300, bytes(content)) == 3 * MIB
        assert await b.read(handle, 300, 3 * MIB) == content
        assert await b.read(handle, 70_001, 2 * MIB) == content[69_701 : 69_701 + 2 * MIB]
        assert max(len(command.data) for command in b.commands) <= MIB
        await b.volume.release(handle)


@pytest.mark.parametrize("block_bytes", [512, 4096])
async def test_a_part_of_a_logical_block_leaves_the_rest_alone(block_bytes: int) -> None:
    async with bench(logical_block_bytes=block_bytes) as b:
        handle = await create(b.volume, b"image")
        expected = bytearray(Random(2).randbytes(2 * UNIT))
        await b.volume.write(handle, 0, bytes(expected))
        rng = Random(3)
        for _ in range(60):
            start = rng.randrange(2 * UNIT - 10_000)
            data = rng.randbytes(rng.choice((1, 100, 511, 513, 5000)))
            expected[start : start + len(data)] = data
            await b.volume.write(handle, start, data)
        assert await b.read(handle, 0, 2 * UNIT) == expected
        await b.volume.release(handle)


async def test_first_writes_to_one_unit_wait_for_each_other() -> None:
    async with bench() as b:
        handle = await create(b.volume, b"image")
        hold = b.lun.hold(lambda c: c.op is Op.WRITE and len(c.data) == UNIT, limit=1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.volume.write, handle, 0, b"a" * 4096)
            await hold.wait_held()
            for i in range(1, 8):
                nursery.start_soon(b.volume.write, handle, i * 4096, b"%d" % i * 4096)
            await trio.testing.wait_all_tasks_blocked()
            assert (await b.volume.getattr(handle.ino)).size == 0
            hold.lift()
        assert await b.read(handle, 0, UNIT) == b"a" * 4096 + b"".join(
            b"%d" % i * 4096 for i in range(1, 8)
        )
        assert len([c for c in b.commands if len(c.data) == UNIT]) == 1
        await b.volume.release(handle)


async def test_a_read_during_a_first_write_sees_zeroes_then_data() -> None:
    async with bench() as b:
        handle = await create(b.volume, b"image")
        await b.volume.setattr(handle.ino, SetAttributes(size=UNIT))
        hold = b.lun.hold(lambda c: c.op is Op.WRITE and len(c.data) == UNIT)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.volume.write, handle, 0, b"a" * UNIT)
            await hold.wait_held()
            assert await b.read(handle, 0, UNIT) == bytes(UNIT)
            hold.lift()
        assert await b.read(handle, 0, UNIT) == b"a" * UNIT
        await b.volume.release(handle)


async def test_a_write_that_is_cancelled_leaves_no_claim() -> None:
    async with bench() as b:
        handle = await create(b.volume, b"image")
        hold = b.lun.hold(lambda c: c.op is Op.WRITE and len(c.data) == UNIT)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.volume.write, handle, 0, b"a" * UNIT)
            await hold.wait_held()
            nursery.cancel_scope.cancel()
            hold.lift()
        b.volume.check()
        await b.volume.write(handle, 0, b"b" * UNIT)
        assert await b.read(handle, 0, UNIT) == b"b" * UNIT
        assert (await b.volume.getattr(handle.ino)).blocks == UNIT // 512
        await b.volume.release(handle)


async def test_what_lies_behind_the_end_never_comes_back() -> None:
    async with bench() as b:
        handle = await create(b.volume, b"file")
        await b.volume.write(handle, 0, b"x" * (2 * UNIT))
        for size in (UNIT + 1000, 777, UNIT + 5):
            await b.volume.setattr(handle.ino, SetAttributes(size=size))
        await b.volume.write(handle, UNIT + 50_000, b"y")
        assert await b.read(handle, 0, 2 * UNIT) == (b"x" * 777 + bytes(UNIT + 50_000 - 777) + b"y")
        await b.volume.setattr(handle.ino, SetAttributes(size=300))
        await b.volume.write(handle, 300, b"z" * 100)
        await b.volume.setattr(handle.ino, SetAttributes(size=UNIT))
        assert await b.read(handle, 0, UNIT) == b"x" * 300 + b"z" * 100 + bytes(UNIT - 400)
        await b.volume.release(handle)


async def test_writes_that_a_crash_left_behind_the_end_are_zeroed_first() -> None:
    lun = SimulatedLun(LUN_BYTES, yields=False)
    superblock = await formatted(lun)

    async def live_and_die() -> None:
        async with mounted(await lun.login(PORT), superblock) as (volume, _):
            handle = await create(volume, b"file")
            await volume.write(handle, 0, b"a" * 100)
            await volume.sync()
            await volume.write(handle, 100, b"lost" * 1000)  # in place: its size is in memory only
            raise Crash

    with pytest.raises(ExceptionGroup):
        await live_and_die()
    async with mounted(await lun.login(PORT), superblock, incarnation=2) as (volume, _):
        ino = (await volume.lookup(ROOT, b"file")).ino
        handle = await volume.open(ino, RDWR, 0)
        assert bytes(await volume.read(handle, 0, UNIT)) == b"a" * 100
        await volume.write(handle, 5000, b"b")
        assert bytes(await volume.read(handle, 0, UNIT)) == b"a" * 100 + bytes(4900) + b"b"
        await volume.release(handle)


async def test_append_goes_to_the_end_whatever_the_offset() -> None:
    async with bench() as b:
        handle = await create(b.volume, b"log", flags=os.O_WRONLY | os.O_APPEND)
        for text in (b"one ", b"two ", b"three"):
            await b.volume.write(handle, 0, text)
        reader = await b.volume.open(handle.ino, os.O_RDONLY, 0)
        assert await b.read(reader, 0, 100) == b"one two three"
        with pytest.raises(errors.BadHandle):
            await b.volume.read(handle, 0, 1)
        with pytest.raises(errors.BadHandle):
            await b.volume.write(reader, 0, b"x")
        await b.volume.release(handle)
        await b.volume.release(reader)


async def test_the_largest_file() -> None:
    async with bench() as b:
        handle = await create(b.volume, b"huge")
        await b.volume.setattr(handle.ino, SetAttributes(size=MAX_FILE_BYTES))
        assert (await b.volume.getattr(handle.ino)).size == (1 << 63) - 1
        assert await b.volume.write(handle, MAX_FILE_BYTES - 3, b"abcdef") == 3
        assert await b.read(handle, MAX_FILE_BYTES - 5, 100) == b"\0\0abc"
        with pytest.raises(errors.FileTooBig):
            await b.volume.write(handle, MAX_FILE_BYTES, b"x")
        with pytest.raises(errors.FileTooBig):
            await b.volume.setattr(handle.ino, SetAttributes(size=MAX_FILE_BYTES + 1))
        await b.volume.setattr(handle.ino, SetAttributes(size=0))
        assert (await b.volume.getattr(handle.ino)).blocks == 0
        await b.volume.release(handle)


async def test_fsync_writes_the_journal_only_if_it_must() -> None:
    async with bench() as b:
        handle = await create(b.volume, b"file")
        journal = b.volume.store.journal

        async def costs(datasync: bool) -> tuple[int, int]:
            commits, flushes = journal.commits, journal.flusher.flushes
            await b.volume.fsync(handle.ino, datasync)
            return journal.commits - commits, journal.flusher.flushes - flushes

        await b.volume.write(handle, 0, bytes(UNIT))
        assert await costs(datasync=True) == (1, 1)
        assert await costs(datasync=True) == (0, 0)
        await b.volume.write(handle, 0, bytes(4096))
        assert await costs(datasync=True) == (0, 1), "times alone are not fdatasync's business"
        assert (await costs(datasync=False))[0] == 1
        assert (await costs(datasync=False))[0] == 0
        await b.volume.write(handle, UNIT - 4096, bytes(4096))
        await b.volume.write(handle, UNIT, bytes(100))
        assert (await costs(datasync=True))[0] == 1
        await b.volume.write(handle, UNIT + 100, bytes(100))
        assert (await costs(datasync=True))[0] == 1, "the size is needed to read it back"
        await b.volume.setattr(handle.ino, SetAttributes(mode=0o600))
        assert (await costs(datasync=True))[0] == 0
        assert (await costs(datasync=False))[0] == 1
        await b.volume.release(handle)


async def test_a_write_takes_privileges_away_unless_root_opened() -> None:
    async with bench() as b:
        handle = await create(b.volume, b"tool")
        await b.volume.write(handle, 0, bytes(UNIT))
        user = await b.volume.open(handle.ino, RDWR, 1000)
        for mode, left in ((0o6755, 0o755), (0o2644, 0o2644), (0o4711, 0o711)):
            await b.volume.setattr(handle.ino, SetAttributes(mode=mode))
            await b.volume.setxattr(handle.ino, b"security.capability", b"\1\2")
            await b.volume.write(handle, 0, bytes(4096))
            assert stat.S_IMODE((await b.volume.getattr(handle.ino)).mode) == mode
            await b.volume.write(user, 0, bytes(4096))
            assert stat.S_IMODE((await b.volume.getattr(handle.ino)).mode) == left
            assert await b.volume.listxattr(handle.ino) == []
        await b.volume.setattr(handle.ino, SetAttributes(mode=0o4755))
        await b.volume.setattr(handle.ino, SetAttributes(uid=5))
        assert stat.S_IMODE((await b.volume.getattr(handle.ino)).mode) == 0o755
        await b.volume.setattr(handle.ino, SetAttributes(mode=0o4755))
        again = await b.volume.open(handle.ino, os.O_WRONLY | os.O_TRUNC, 1000)
        assert stat.S_IMODE((await b.volume.getattr(handle.ino)).mode) == 0o755
        for each in (handle, user, again):
            await b.volume.release(each)


async def test_reading_marks_atime_as_relatime_does() -> None:
    async with bench() as b:
        handle = await create(b.volume, b"file")
        await b.volume.write(handle, 0, b"x")
        before = await b.volume.getattr(handle.ino)
        assert before.atime_ns < before.mtime_ns
        await b.read(handle, 0, 1)
        first = await b.volume.getattr(handle.ino)
        assert first.atime_ns > before.mtime_ns and first.ctime_ns == before.ctime_ns
        await b.read(handle, 0, 1)
        assert (await b.volume.getattr(handle.ino)).atime_ns == first.atime_ns
        await b.volume.release(handle)


async def test_files_that_grow_at_once_get_long_runs() -> None:
    async with bench() as b:
        handles = [await create(b.volume, b"image%d" % i) for i in range(3)]
        for step in range(64):
            for handle in handles:
                await b.volume.write(handle, step * UNIT, bytes(UNIT))
        for handle in handles:
            places = [place >> 1 for place in handle.file.map.chunks[0]]
            breaks = sum(second != first + 1 for first, second in pairwise(places))
            assert breaks <= 4, places
            await b.volume.release(handle)
