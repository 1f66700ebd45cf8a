"""What statfs(2) tells, and what it costs."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from csvfs import errors
from csvfs.allocation.group import Group
from csvfs.allocation.space import SpaceCounts, Totals
from csvfs.engine.space import REFRESH_GROUPS, REFRESH_S
from csvfs.format import BLOCKS_PER_UNIT, Geometry, GroupHeader, Superblock
from csvfs.namespace.inode import SetAttributes
from csvfs.volume import Volume
from lockmgr.modes import Mode
from redirector.block.arbiter import Op
from redirector.block.device import MediumError
from redirector.block.simulated import Command, SimulatedLun
from tests.lock_rival import LockRival
from tests.simulated_volume import PORT, ROOT, UNIT, create, formatted, mounted

TIB = 1 << 40


class Reads:
    """Counts the group headers that are read from the LUN."""

    def __init__(self, lun: SimulatedLun, geometry: Geometry) -> None:
        headers = {geometry.group_header(g) * 4096 for g in range(geometry.group_count)}
        self.taken = 0

        def see(command: Command) -> bool:
            self.taken += command.op is Op.READ and command.offset_bytes in headers
            return False

        lun.hold(see)

    def take(self) -> int:
        taken, self.taken = self.taken, 0
        return taken


@asynccontextmanager
async def volume_of(size: int) -> AsyncIterator[tuple[SimulatedLun, Superblock, Volume]]:
    lun = SimulatedLun(size, yields=False)
    superblock = await formatted(lun)
    async with mounted(await lun.login(PORT), superblock) as (volume, _):
        yield lun, superblock, volume
        volume.check()


async def in_headers(volume: Volume) -> int:
    """Free blocks by all headers as this node sees them."""
    geometry = volume.engine.scope.geometry
    groups = [
        await volume.engine.look(lambda reader, n=n: Group(reader, geometry, n))  # type: ignore[misc]
        for n in range(geometry.group_count)
    ]
    return sum(g.free_units * BLOCKS_PER_UNIT + g.free_metadata_blocks for g in groups)


def change_header(
    lun: SimulatedLun,
    superblock: Superblock,
    group: int,
    change: Callable[[GroupHeader], GroupHeader],
) -> None:
    """As another node would that holds the group's lock."""
    address = superblock.geometry.group_header(group)
    header = GroupHeader.decode(lun.blocks[address], address, superblock.volume_id, group)
    lun.blocks[address] = bytes(change(header).encode(superblock.volume_id, 99))


def test_a_reading_never_replaces_what_was_merged_meanwhile() -> None:
    counts = SpaceCounts(Geometry.for_lun(8 << 30, 2, 1 << 20))
    assert counts.unknown == 5 and counts.totals().free_units == 0
    counts.merged(3, 7, 1)
    with counts.reading():
        counts.merged(1, 10, 2)
        for group in range(5):
            counts.was_read(group, 100, 0)
        counts.check()
    assert counts.unknown == 0
    assert counts.totals() == Totals(counts.totals().units, 410, 4 * 98 + 8, 2)
    with counts.reading():
        counts.was_read(1, 1, 1)
    assert counts.totals()[1:] == (401, 4 * 98, 1)
    counts.check()


async def test_with_one_node_it_is_exact_all_the_time(autojump_clock: MockClock) -> None:
    del autojump_clock
    async with volume_of(8 << 30) as (_, _, volume):
        early = await create(volume, b"before the first statfs")
        await volume.write(early, 0, b"x" * 30 * UNIT)
        for count in range(40):
            assert (await volume.statfs()).free_blocks == await in_headers(volume)
            made = await volume.mkdir(ROOT, b"dir %d" % count, 0o755, 0, 0)
            handle = await create(volume, b"file", parent=made.ino)
            await volume.write(handle, 0, b"x" * (count + 1) * UNIT)
            if count % 3 == 0:
                await volume.setattr(handle.ino, SetAttributes(size=count * UNIT // 2))
            if count % 4 == 0:
                await volume.reclaimer.drain()
            await volume.release(handle)
            await trio.sleep(REFRESH_S / 3)
        await volume.release(early)
        assert (await volume.statfs()).free_blocks == await in_headers(volume)


async def test_only_the_first_call_reads(autojump_clock: MockClock) -> None:
    del autojump_clock
    async with volume_of(4 * TIB) as (lun, superblock, volume):
        groups = superblock.geometry.group_count
        assert groups > 2 * REFRESH_GROUPS
        reads = Reads(lun, superblock.geometry)
        first = await volume.statfs()
        assert reads.take() == groups
        assert first.free_blocks == (first.blocks // BLOCKS_PER_UNIT - groups) * BLOCKS_PER_UNIT
        for _ in range(100):
            assert await volume.statfs() == first
        assert not reads.take()
        # The LUN is silent: a call answers all the same, and has the background read one lot.
        await trio.sleep(REFRESH_S)
        held = lun.hold(lambda command: command.op is Op.READ)
        assert await volume.statfs() == first
        await trio.testing.wait_all_tasks_blocked()
        assert 0 < reads.take() <= 16
        assert await volume.statfs() == first
        held.lift()
        await trio.testing.wait_all_tasks_blocked()
        assert reads.take() > REFRESH_GROUPS - 32
        for _ in range(2 * groups // REFRESH_GROUPS):
            await trio.sleep(REFRESH_S)
            await volume.statfs()
            await trio.testing.wait_all_tasks_blocked()
            assert REFRESH_GROUPS - 16 <= reads.take() <= REFRESH_GROUPS


async def test_what_another_node_changes_is_seen_after_the_next_reading(
    autojump_clock: MockClock,
) -> None:
    del autojump_clock
    async with volume_of(8 << 30) as (lun, superblock, volume):
        first = await volume.statfs()
        change_header(lun, superblock, 4, lambda h: replace(h, free_units=h.free_units - 1000))
        assert await volume.statfs() == first
        await trio.sleep(REFRESH_S)
        await volume.statfs()
        await trio.testing.wait_all_tasks_blocked()
        assert (await volume.statfs()).free_blocks == first.free_blocks - 1000 * BLOCKS_PER_UNIT


async def test_a_group_that_went_to_another_node_and_came_back(autojump_clock: MockClock) -> None:
    del autojump_clock
    lun = SimulatedLun(128 << 20, yields=False)
    superblock = await formatted(lun)
    async with mounted(await lun.login(PORT), superblock) as (volume, locks):
        handle = await create(volume, b"file")
        await volume.write(handle, 0, b"x" * UNIT)
        before = await volume.statfs()
        rival = LockRival(locks)
        await rival.take(volume.engine.resources.group(0), Mode.EX)
        change_header(lun, superblock, 0, lambda h: replace(h, free_units=h.free_units - 10))
        await trio.sleep(REFRESH_S)
        await volume.statfs()
        await trio.testing.wait_all_tasks_blocked()
        assert (await volume.statfs()).free_blocks == before.free_blocks - 10 * BLOCKS_PER_UNIT
        change_header(lun, superblock, 0, lambda h: replace(h, free_units=h.free_units + 10))
        await volume.write(handle, UNIT, b"x" * UNIT)
        assert (await volume.statfs()).free_blocks == before.free_blocks - BLOCKS_PER_UNIT
        await volume.release(handle)


async def test_a_reading_that_is_overtaken_by_an_allocation() -> None:
    async with volume_of(128 << 20) as (_, _, volume):
        device = volume.store.device
        read_into = device.read_into
        begun, go_on = trio.Event(), trio.Event()

        async def slow(offset: int, buffer: bytearray | memoryview) -> None:
            await read_into(offset, buffer)
            begun.set()
            await go_on.wait()

        found = []
        async with trio.open_nursery() as nursery:
            device.read_into = slow  # type: ignore[method-assign,assignment]

            async def ask() -> None:
                found.append(await volume.statfs())

            nursery.start_soon(ask)
            await begun.wait()
            device.read_into = read_into  # type: ignore[method-assign]
            handle = await create(volume, b"file")
            await volume.write(handle, 0, b"x" * 20 * UNIT)
            go_on.set()
        assert found[0].free_blocks == await in_headers(volume)
        await volume.release(handle)


async def test_a_torn_header_is_read_again_and_a_damaged_one_said(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    del autojump_clock
    async with volume_of(8 << 30) as (lun, superblock, volume):
        address = superblock.geometry.group_header(3)
        good = lun.blocks[address]
        lun.blocks[address] = good[:2048] + bytes(2048 - 1) + b"x"
        with pytest.raises(errors.Damaged, match=f"block {address}"):
            await volume.statfs()
        lun.inject(
            lambda c: c.op is Op.READ and c.offset_bytes == address * 4096,
            lambda what: MediumError(what, sense_key=3),
        )
        with pytest.raises(errors.Damaged):
            await volume.statfs()

        async def mend() -> None:
            await trio.sleep(0.06)
            lun.blocks[address] = good

        async with trio.open_nursery() as nursery:
            nursery.start_soon(mend)
            whole = await volume.statfs()
        lun.blocks[address] = bytes(4096)
        for _ in range(3):
            await trio.sleep(REFRESH_S)
            assert await volume.statfs() == whole
            await trio.sleep(1)
        assert await volume.statfs() == whole
        said = [record for record in caplog.records if record.name == "csvfs.engine.space"]
        assert [record.levelno for record in said] == [logging.ERROR]
        lun.blocks[address] = good


async def test_nothing_is_told_of_a_volume_that_failed() -> None:
    async def live_and_fail() -> None:
        async with volume_of(128 << 20) as (lun, _, volume):
            await volume.statfs()
            lun.inject(
                lambda c: c.op is Op.SYNCHRONIZE_CACHE, lambda what: MediumError(what, sense_key=3)
            )
            volume.store.note_write()
            with pytest.raises(errors.VolumeFailed):
                await volume.sync()
            with pytest.raises(errors.VolumeFailed):
                await volume.statfs()
            raise errors.VolumeFailed("leave without a word")

    with pytest.raises(ExceptionGroup):
        await live_and_fail()


@pytest.mark.full
async def test_at_64_tib() -> None:
    async with volume_of(64 * TIB) as (lun, superblock, volume):
        reads = Reads(lun, superblock.geometry)
        first = await volume.statfs()
        assert reads.take() == superblock.geometry.group_count > 39_000
        started = time.perf_counter()
        for _ in range(1000):
            assert await volume.statfs() == first
        assert time.perf_counter() - started < 1
        assert len(volume.store.cache) < 100
