"""What files make of a LUN that fails."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from csvfs import errors
from csvfs.namespace.inode import SetAttributes
from redirector.block.arbiter import Op
from redirector.block.device import MediumError, SpaceExhausted
from redirector.block.simulated import Command
from tests.simulated_volume import UNIT, create
from tests.volume_bench import bench


async def test_a_medium_error_is_that_files_alone() -> None:
    async with bench() as b:
        bad, good = await create(b.volume, b"bad"), await create(b.volume, b"good")
        for handle in (bad, good):
            await b.volume.write(handle, 0, bytes(UNIT))
        await b.volume.sync()
        place = bad.file.map.chunks[0][0] >> 1

        def hits(command: Command) -> bool:
            return place * UNIT <= command.offset_bytes < (place + 1) * UNIT

        def broken(what: str) -> MediumError:
            return MediumError(what, sense_key=3)

        b.lun.inject(hits, broken, times=2)
        with pytest.raises(errors.DataLost):
            await b.volume.read(bad, 0, 4096)
        with pytest.raises(errors.DataLost):
            await b.volume.write(bad, 0, bytes(4096))
        assert await b.read(good, 0, 4096) == bytes(4096)
        await b.volume.write(good, 0, bytes(4096))
        await b.volume.fsync(good.ino, False)
        assert await b.read(bad, 0, 4096) == bytes(4096)
        await b.volume.release(bad)
        await b.volume.release(good)


async def test_a_first_write_that_fails_leaves_zeroes() -> None:
    async with bench() as b:
        handle = await create(b.volume, b"file")
        b.lun.inject(
            lambda c: c.op is Op.WRITE and len(c.data) == UNIT,
            lambda what: MediumError(what, sense_key=3),
        )
        with pytest.raises(errors.DataLost):
            await b.volume.write(handle, 100, b"x" * 1000)
        assert (await b.volume.getattr(handle.ino)).size == 0
        await b.volume.setattr(handle.ino, SetAttributes(size=UNIT))
        assert await b.read(handle, 0, UNIT) == bytes(UNIT)
        await b.volume.write(handle, 100, b"x" * 1000)
        assert await b.read(handle, 0, UNIT) == bytes(100) + b"x" * 1000 + bytes(UNIT - 1100)
        await b.volume.release(handle)


async def test_a_full_thin_array_makes_writers_wait(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    del autojump_clock
    async with bench() as b:
        handle = await create(b.volume, b"file")
        b.lun.inject(
            lambda c: c.op is Op.WRITE and len(c.data) == UNIT,
            lambda what: SpaceExhausted(what, sense_key=7, asc_ascq=0x2707),
            times=3,
        )
        started = trio.current_time()
        await b.volume.write(handle, 0, b"x" * UNIT)
        assert trio.current_time() - started >= 6
        assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
        assert await b.read(handle, 0, UNIT) == b"x" * UNIT
        await b.volume.release(handle)


@pytest.mark.parametrize("units", [1, 40])
async def test_who_waits_for_a_full_array_is_told_when_the_volume_fails(
    units: int, autojump_clock: trio.testing.MockClock
) -> None:
    """Its guest would hang for ever, and with it the end of a mount that is dead already."""
    del autojump_clock

    async def live_and_fail() -> None:
        async with bench() as b:
            handle = await create(b.volume, b"file")
            b.lun.inject(
                lambda c: c.op is Op.WRITE and len(c.data) >= UNIT,
                lambda what: SpaceExhausted(what, sense_key=7, asc_ascq=0x2707),
                times=1 << 30,
            )
            ended = trio.Event()

            async def write() -> None:
                with pytest.raises(errors.VolumeFailed):
                    await b.volume.write(handle, 0, b"x" * units * UNIT)
                ended.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(write)
                await trio.sleep(7)
                assert not ended.is_set()
                b.lun.inject(
                    lambda c: c.op is Op.SYNCHRONIZE_CACHE,
                    lambda what: MediumError(what, sense_key=3),
                )
                b.volume.store.note_write()
                with pytest.raises(errors.VolumeFailed):
                    await b.volume.sync()
                with trio.fail_after(0.1):
                    await ended.wait()
            raise errors.VolumeFailed("leave without a word")

    with pytest.raises(ExceptionGroup):
        await live_and_fail()
