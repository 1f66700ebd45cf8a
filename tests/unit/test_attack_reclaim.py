"""Space that runs out, or a truncation that fails, in the middle of giving space back."""

from __future__ import annotations

import pytest
import trio
import trio.testing

import csvfs.data.reclaim
import csvfs.engine.change
from csvfs.engine.change import Change
from csvfs.errors import Damaged, NoSpace
from csvfs.namespace.inode import SetAttributes
from csvfs.ondisk.inode import InodeFlag
from redirector.block.simulated import SimulatedLun
from tests.simulated_volume import LUN_BYTES, PORT, ROOT, UNIT, create, formatted, mounted
from tests.volume_script import assert_clean


async def test_a_reclaimer_that_finds_no_space_does_not_wait_for_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Taking a dead inode apart may need a block for the list; there may be none."""
    lun = SimulatedLun(LUN_BYTES)
    superblock = await formatted(lun)
    async with mounted(await lun.login(PORT), superblock) as (volume, _):
        handle = await create(volume, b"f")
        await volume.write(handle, 0, bytes(5 * UNIT))
        take_apart = csvfs.data.reclaim._take_apart
        full = True

        def without_space(change: Change, slot: int, ino: int) -> bool:
            if full:
                raise NoSpace("no group has a free metadata block")
            return take_apart(change, slot, ino)

        monkeypatch.setattr(csvfs.data.reclaim, "_take_apart", without_space)
        await volume.release(handle)
        await volume.forget(handle.ino, 1)
        await volume.unlink(ROOT, b"f")
        await volume.sync()
        await trio.testing.wait_all_tasks_blocked()
        assert not await volume.reclaimer.drain()
        full = False
        other = await create(volume, b"g")  # the volume lives, and reclaims once there is space
        await volume.release(other)
        assert await volume.reclaimer.drain()
        volume.check()
    await assert_clean(await lun.login(PORT), superblock, 1)


async def test_a_file_that_loses_its_name_in_the_middle_of_a_truncation_leaves_no_orphan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(csvfs.engine.change, "REMOVAL_BLOCKS", 47)  # short batches
    lun = SimulatedLun(256 << 20)
    superblock = await formatted(lun)
    async with mounted(await lun.login(PORT), superblock) as (volume, _):
        handle = await create(volume, b"f")
        for n in range(30):
            await volume.write(handle, 2 * n * UNIT, b"x")
        ino = handle.ino
        trim = volume.engine.change
        calls = 0

        async def failing(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise Damaged("a node of the tree cannot be read")
            return await trim(*args, **kwargs)  # type: ignore[arg-type]

        volume.engine.change = failing  # type: ignore[method-assign,assignment]
        with pytest.raises(Damaged):
            await volume.setattr(ino, SetAttributes(size=0))
        volume.engine.change = trim  # type: ignore[method-assign]
        async with volume.engine.looking(ino) as state:
            assert state.fields().flags & InodeFlag.TRIMMING
        await volume.release(handle)
        await volume.forget(ino, 1)
        await volume.unlink(ROOT, b"f")
        await volume.reclaimer.drain()
        volume.check()
    await assert_clean(await lun.login(PORT), superblock, 1)
