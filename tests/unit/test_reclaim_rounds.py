"""What happens between giving space up and having it again."""

from __future__ import annotations

import errno
import itertools
from contextlib import suppress
from dataclasses import replace

import pytest
import trio
import trio.testing

from csvfs import errors
from csvfs.btree.tree import Tree, TreeRoot
from csvfs.data.extents import extents
from csvfs.engine.change import Change
from csvfs.format import (
    BLOCKS_PER_UNIT,
    RECLAIM_VALUE,
    ProbeFlag,
    ReclaimKind,
    UnitState,
    unit_state,
)
from csvfs.host.answers import errno_of
from csvfs.namespace.handle import Handle
from csvfs.namespace.inode import SetAttributes
from csvfs.namespace.rename import EXCHANGE
from csvfs.ondisk.inode import InodeFlag
from csvfs.volume import Volume
from redirector.block.arbiter import Op
from redirector.block.device import BlockError, IllegalRequest
from redirector.block.simulated import Command, SimulatedLun
from tests.simulated_volume import (
    LUN_BYTES,
    PORT,
    RDWR,
    ROOT,
    SLOT,
    UNIT,
    create,
    formatted,
    fresh_volume,
    mkdir,
    mounted,
)
from tests.volume_script import assert_clean

CHUNK = bytes(16 * UNIT)


async def drop(volume: Volume, name: bytes, ino: int) -> None:
    """Unlink a file that is closed, and let the kernel forget it."""
    await volume.unlink(ROOT, name)
    await volume.forget(ino, 1)


async def closed_file(volume: Volume, name: bytes, size: int) -> int:
    handle = await create(volume, name)
    for offset in range(0, size, len(CHUNK)):
        await volume.write(handle, offset, CHUNK[: size - offset])
    await volume.release(handle)
    return handle.ino


async def fill(volume: Volume, handle: Handle) -> int:
    """Write until there is no space; the size of the file."""
    size = 0
    with suppress(errors.NoSpace):
        while True:
            written = await volume.write(handle, size, CHUNK)
            assert written in (len(CHUNK), UNIT)
            size += written
    return size


async def placed(volume: Volume, ino: int) -> list[int]:
    """Physical units of a file, in the order of the file."""
    root = TreeRoot.of_file(ino)
    found = await volume.engine.look(lambda reader: list(extents(reader, root)))
    return [extent.physical + i for extent in found for i in range(extent.units)]


async def reclaim_items(volume: Volume) -> list[int]:
    """Addresses of what is on the reclaim list."""
    address = volume.engine.scope.geometry.reclaim_root(SLOT)
    tree = TreeRoot.of_reclaim(address, SLOT)
    found = await volume.engine.look(lambda reader: list(Tree(reader, tree).items()))
    return [key for key, _ in found]


def state_of(volume: Volume, unit: int) -> UnitState:
    """What the maps say of a unit, as this node has them cached."""
    geometry = volume.engine.scope.geometry
    group, index, position = geometry.map_place(unit)
    block = volume.store.cache._blocks[geometry.group_map(group, index)].data
    return unit_state(block, position)


async def test_a_unit_is_free_only_after_its_removal_is_stable() -> None:
    lun = SimulatedLun(LUN_BYTES, yields=False)
    async with fresh_volume(lun) as volume:
        handle = await create(volume, b"file")
        await volume.write(handle, 0, bytes(UNIT))
        unit = handle.file.map.chunks[0][0] >> 1
        await volume.sync()
        hold = lun.hold(lambda c: c.op is Op.WRITE and c.fua)
        await volume.setattr(handle.ino, SetAttributes(size=0))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(volume.reclaimer.drain)
            await hold.wait_held()
            await trio.testing.wait_all_tasks_blocked()
            assert state_of(volume, unit) is UnitState.DATA
            hold.lift()
        assert state_of(volume, unit) is UnitState.FREE
        await volume.release(handle)


async def test_the_background_frees_without_being_asked() -> None:
    async with fresh_volume() as volume:
        before = await volume.statfs()
        ino = await closed_file(volume, b"file", 40 * UNIT)
        await drop(volume, b"file", ino)
        await volume.sync()
        with trio.fail_after(5):
            while (await volume.statfs()).free_blocks < before.free_blocks:
                await volume.sync()
                await trio.sleep(0.01)
        assert volume.reclaimer.units_freed == 40


async def test_a_file_of_many_extents_is_dropped_at_once_and_freed_in_batches() -> None:
    async with fresh_volume() as volume:
        before = await volume.statfs()
        handle = await create(volume, b"file")
        for unit in range(0, 1400, 2):
            await volume.write(handle, unit * UNIT, b"x")
        await volume.release(handle)
        merges = 0
        merge = volume.store.journal.merge

        def counting(transaction: object) -> None:
            nonlocal merges
            merges += 1
            merge(transaction)  # type: ignore[arg-type]

        volume.store.journal.merge = counting  # type: ignore[method-assign]
        await drop(volume, b"file", handle.ino)
        assert merges == 2, "an orphan, then dead"
        await volume.reclaimer.drain()
        assert merges > 2 + 700 // 64 + 700 // 64
        assert volume.reclaimer.units_freed == 700
        after = await volume.statfs()
        assert after.free_blocks == before.free_blocks


async def test_what_is_full_inside_an_inode_hurries_no_reclaim(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A full attribute block, or 256 names of one hash, are not the volume's lack of space."""
    monkeypatch.setattr("csvfs.namespace.directory.name_key", lambda _seed, _name: 512)
    monkeypatch.setattr("csvfs.namespace.names.name_key", lambda _seed, _name: 512)
    async with fresh_volume() as volume:
        await drop(volume, b"dead", await closed_file(volume, b"dead", UNIT))
        ino = await closed_file(volume, b"0", 1)
        await volume.setxattr(ino, b"user.a", bytes(4000))
        for number in range(1, 256):
            await volume.link(ino, ROOT, b"%d" % number)
        commits = volume.store.statistics().commits
        freed = volume.reclaimer.units_freed
        for call, error in (
            (volume.setxattr(ino, b"user.b", bytes(100)), errors.NoXattrSpace),
            (volume.link(ino, ROOT, b"one too many"), errors.NoEntrySpace),
        ):
            with pytest.raises(error):
                await call
            assert errno_of(error("")) == errno.ENOSPC
        assert volume.reclaimer.units_freed == freed
        assert volume.store.statistics().commits == commits


async def test_a_contiguous_file_is_cut_and_freed_by_the_run() -> None:
    """An image that was written once in order: 64 units make an extent, many of them one item."""
    async with fresh_volume() as volume:
        before = await volume.statfs()
        handle = await create(volume, b"image")
        state = handle.state
        mapped = 0

        def map_more(change: Change) -> int:
            return len(change.map_units(change.inode(handle.ino), mapped, 1400 - mapped))

        async with volume.engine.alone(handle.ino):
            while mapped < 1400:
                mapped += await volume.engine.change(map_more)
        await volume.setattr(handle.ino, SetAttributes(size=1400 * UNIT))
        places = await placed(volume, handle.ino)
        breaks = sum(b != a + 1 for a, b in itertools.pairwise(places))
        await volume.setattr(handle.ino, SetAttributes(size=0))
        assert not state.fields().flags & InodeFlag.TRIMMING
        assert state.fields().units == 0
        assert len(await reclaim_items(volume)) <= 4 + 2 * breaks
        await volume.reclaimer.drain()
        assert volume.reclaimer.units_freed == 1400
        await volume.unlink(ROOT, b"image")
        await volume.release(handle)
        await volume.forget(handle.ino, 1)
        await volume.reclaimer.drain()
        assert (await volume.statfs()).free_blocks == before.free_blocks


async def test_a_full_volume_says_so_and_lets_go_of_what_it_has() -> None:
    async with fresh_volume() as volume:
        handle = await create(volume, b"big")
        keep = await closed_file(volume, b"small", UNIT)
        directory = await mkdir(volume, b"dir")
        size = await fill(volume, handle)
        assert (await volume.statfs()).available_blocks == 0
        assert (await volume.getattr(handle.ino)).size == size
        made = 0
        with suppress(errors.NoSpace):
            while True:
                await volume.mkdir(directory.ino, b"%d" % made, 0o755, 0, 0)
                made += 1
        assert made < 100
        # What gives space back, or needs none, goes on.
        await volume.write(handle, 0, b"in place" * 512)
        await volume.rename(ROOT, b"small", directory.ino, b"other")
        await volume.rename(directory.ino, b"other", ROOT, b"small")
        await volume.rename(ROOT, b"small", ROOT, b"dir", EXCHANGE)
        await volume.rename(ROOT, b"small", ROOT, b"dir", EXCHANGE)
        await volume.unlink(ROOT, b"small")
        await volume.forget(keep, 1)
        await volume.setattr(handle.ino, SetAttributes(size=10 * UNIT))
        await volume.write(handle, 10 * UNIT, CHUNK)
        await volume.unlink(ROOT, b"big")
        await volume.release(handle)
        await volume.forget(handle.ino, 1)
        await volume.mkdir(ROOT, b"again", 0o755, 0, 0)


async def test_a_write_that_space_ends_within_is_short() -> None:
    async with fresh_volume() as volume:
        handle = await create(volume, b"big")
        size = await fill(volume, handle)
        assert size % UNIT == 0
        content = bytes(await volume.read(handle, size - UNIT, 2 * UNIT))
        assert content == bytes(UNIT)
        await volume.release(handle)


@pytest.mark.parametrize("allowed", [False, True])
async def test_unmap_is_sent_only_where_the_probe_allows_it(allowed: bool) -> None:
    lun = SimulatedLun(LUN_BYTES, yields=False)
    superblock = await formatted(lun)
    probe = ProbeFlag.UNMAP_WORKS | ProbeFlag.REINSTATEMENT_CLOSES
    if allowed:
        superblock = replace(superblock, probe=probe)
    seen: list[Command] = []

    def see(command: Command) -> bool:
        seen.extend([command] * (command.op is Op.UNMAP))
        return False

    lun.hold(see)
    async with mounted(await lun.login(PORT), superblock) as (volume, _):
        ino = await closed_file(volume, b"file", 40 * UNIT)
        await drop(volume, b"file", ino)
        await volume.reclaimer.drain()
    assert bool(seen) is allowed


async def test_a_target_that_refuses_unmap_is_not_asked_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lun = SimulatedLun(LUN_BYTES, yields=False)
    probe = ProbeFlag.UNMAP_WORKS | ProbeFlag.REINSTATEMENT_CLOSES
    superblock = replace(await formatted(lun), probe=probe)

    def refuse(what: str) -> BlockError:
        return IllegalRequest(what, sense_key=5)

    lun.inject(lambda c: c.op is Op.UNMAP, refuse, times=99)
    async with mounted(await lun.login(PORT), superblock) as (volume, _):
        for name in (b"a", b"b"):
            await drop(volume, name, await closed_file(volume, name, 20 * UNIT))
            await volume.reclaimer.drain()
        assert volume.reclaimer.units_freed == 40
    assert [record.levelname for record in caplog.records] == ["WARNING"]


async def test_orphans_and_dead_files_of_a_crash_are_reclaimed_by_the_next_mount() -> None:
    lun = SimulatedLun(LUN_BYTES, yields=False)
    superblock = await formatted(lun)
    async with mounted(await lun.login(PORT), superblock) as (volume, _):
        empty = await volume.statfs()

    async def live_and_die() -> None:
        async with mounted(await lun.login(PORT), superblock, incarnation=2) as (volume, _):
            handle = await create(volume, b"open")
            await volume.write(handle, 0, CHUNK)
            await volume.unlink(ROOT, b"open")
            directory = await mkdir(volume, b"dir")
            await volume.rmdir(ROOT, b"dir")
            assert (await volume.getattr(directory.ino)).nlink == 0
            await drop(volume, b"dead", await closed_file(volume, b"dead", 20 * UNIT))
            await volume.sync()
            raise KeyError

    with pytest.raises(ExceptionGroup):
        await live_and_die()
    async with mounted(await lun.login(PORT), superblock, incarnation=3, recover=False) as (
        volume,
        _,
    ):
        recovered = await volume.recover(SLOT)
        assert (recovered.retired, recovered.trimmed, recovered.left) == (2, 0, 0)
        await volume.reclaimer.drain()
        assert (await volume.statfs()).free_blocks == empty.free_blocks
    await assert_clean(await lun.login(PORT), superblock, 3)


async def test_a_truncation_cut_off_is_finished_before_the_file_grows() -> None:
    lun = SimulatedLun(LUN_BYTES, yields=False)
    superblock = await formatted(lun)
    seen = 0

    async def live_and_die() -> None:
        nonlocal seen
        async with mounted(await lun.login(PORT), superblock) as (volume, _):
            handle = await create(volume, b"file")
            for unit in range(0, 600, 2):
                await volume.write(handle, unit * UNIT, b"secret" * 100)
            await volume.sync()
            merge = volume.store.journal.merge

            def first_only(transaction: object) -> None:
                nonlocal seen
                if seen:
                    raise KeyError
                seen += 1
                merge(transaction)  # type: ignore[arg-type]

            volume.store.journal.merge = first_only  # type: ignore[method-assign]
            with pytest.raises(KeyError):
                await volume.setattr(handle.ino, SetAttributes(size=100))
            volume.store.journal.merge = merge  # type: ignore[method-assign]
            await volume.sync()
            raise IndexError

    with pytest.raises(ExceptionGroup):
        await live_and_die()
    async with mounted(await lun.login(PORT), superblock, incarnation=2, recover=False) as (
        volume,
        _,
    ):
        ino = (await volume.lookup(ROOT, b"file")).ino
        volume.remember(ino, 1)
        handle = await volume.open(ino, RDWR, 0)
        assert (await volume.getattr(ino)).blocks > UNIT // 512
        # Even before recovery came by: nobody reads what was cut off.
        await volume.write(handle, 600 * UNIT, b"x")
        assert bytes(await volume.read(handle, 0, 600 * UNIT)) == b"secret" * 16 + b"secr" + bytes(
            600 * UNIT - 100
        )
        await volume.recover(SLOT)
        await volume.release(handle)
    await assert_clean(await lun.login(PORT), superblock, 2)


async def test_an_item_that_contradicts_the_maps_is_passed_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with fresh_volume() as volume:
        inos = [await closed_file(volume, b"%d" % i, 3 * UNIT) for i in range(3)]
        last = volume.engine.scope.geometry.groups_end_unit - 40
        bogus = RECLAIM_VALUE.pack(ReclaimKind.DATA, 2, 0)
        await volume.engine.change(
            lambda change: change.reclaim_list().insert(last * BLOCKS_PER_UNIT, bogus)
        )
        for i, ino in enumerate(inos):
            await drop(volume, b"%d" % i, ino)
        await volume.reclaimer.drain()
        assert volume.reclaimer.units_freed == 9
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        assert await volume.reclaimer.drain() is False, "it is not tried again and again"
        assert len(caplog.records) == 1
