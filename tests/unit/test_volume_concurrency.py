"""Many tasks at once on few names and few files: nothing waits for ever, nothing is torn."""

from __future__ import annotations

import os
from collections import Counter
from random import Random

import pytest
import trio
import trio.testing

from csvfs.errors import FilesystemError
from csvfs.namespace.inode import SetAttributes
from csvfs.namespace.rename import EXCHANGE
from csvfs.volume import Volume
from lockmgr.modes import Mode
from redirector.block.simulated import SimulatedLun
from tests.crash import deterministic_run
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
    mounted,
)
from tests.volume_script import assert_clean

NAMES = (b"a", b"b", b"c")


class Crowd:
    """Tasks that do anything anywhere in a tree of at most three levels of three names."""

    def __init__(self, volume: Volume, seed: int) -> None:
        self.volume = volume
        self.rng = Random(seed)
        self.outcomes: Counter[str] = Counter()

    async def directory(self) -> int:
        """A directory, found as a kernel finds it."""
        ino = ROOT
        for _ in range(self.rng.randrange(4)):
            try:
                found = await self.volume.lookup(ino, self.rng.choice(NAMES))
            except FilesystemError:
                return ino
            if not found.is_directory:
                return ino
            ino = found.ino
        return ino

    async def work(self, steps: int) -> None:
        for _ in range(steps):
            action = self.rng.choice(
                [self.make, self.make_file, self.rename, self.remove] * 2
                + [self.exchange, self.link, self.list]
            )
            try:
                await action()
                self.outcomes[action.__name__] += 1
            except FilesystemError as error:
                self.outcomes[type(error).__name__] += 1

    async def make(self) -> None:
        await self.volume.mkdir(await self.directory(), self.rng.choice(NAMES), 0o755, 0, 0)

    async def make_file(self) -> None:
        parent = await self.directory()
        handle, _ = await self.volume.create(parent, self.rng.choice(NAMES), 0o644, RDWR, 0, 0)
        await self.volume.write(handle, self.rng.randrange(3 * UNIT), bytes(5000))
        await self.volume.release(handle)

    async def rename(self, flags: int = 0) -> None:
        old, new = await self.directory(), await self.directory()
        name, new_name = self.rng.choice(NAMES), self.rng.choice(NAMES)
        await self.volume.rename(old, name, new, new_name, flags)

    async def exchange(self) -> None:
        await self.rename(EXCHANGE)

    async def remove(self) -> None:
        remove = self.rng.choice((self.volume.unlink, self.volume.rmdir))
        await remove(await self.directory(), self.rng.choice(NAMES))

    async def link(self) -> None:
        found = await self.volume.lookup(await self.directory(), self.rng.choice(NAMES))
        await self.volume.link(found.ino, await self.directory(), self.rng.choice(NAMES))

    async def list(self) -> None:
        for entry in await self.volume.readdir(await self.directory(), 0, 10):
            assert entry.attributes.nlink > 0


@pytest.mark.parametrize("seed", range(6))
def test_a_crowd_of_renames_never_waits_for_ever(seed: int) -> None:
    outcomes: Counter[str] = Counter()

    async def main() -> None:
        lun = SimulatedLun(LUN_BYTES, seed=seed)
        superblock = await formatted(lun)
        device = await lun.login(PORT)
        async with mounted(device, superblock) as (volume, locks):
            crowd = Crowd(volume, seed)
            rival = LockRival(locks)
            with trio.fail_after(600):
                async with trio.open_nursery() as nursery:
                    for _ in range(8):
                        nursery.start_soon(crowd.work, 60)
                    for _ in range(20):
                        await rival.take_some(crowd.rng)
                        await trio.sleep(0.01)
            volume.check()
            outcomes.update(crowd.outcomes)
        await assert_clean(await lun.login(PORT), superblock, 1)

    deterministic_run(main, seed)
    for kind in ("make", "make_file", "rename", "remove", "exchange"):
        assert outcomes[kind], outcomes


async def on_volume(volume: Volume, seed: int) -> None:
    """Tasks that write and read one file; each byte belongs to one task."""
    handle = await create(volume, b"shared")
    rng = Random(seed)
    tasks, slices, width = 8, 400, 96
    expected = bytearray(tasks * slices * width)

    async def write(task: int) -> None:
        order = list(range(slices))
        rng.shuffle(order)
        for place in order[: slices // 2]:
            at = (place * tasks + task) * width
            data = bytes([task + 1]) * width
            assert await volume.write(handle, at, data) == width
            expected[at : at + width] = data
            assert bytes(await volume.read(handle, at, width)) == data

    async with trio.open_nursery() as nursery:
        for task in range(tasks):
            nursery.start_soon(write, task)
    found = bytes(await volume.read(handle, 0, len(expected)))
    assert found == bytes(expected[: len(found)]) and not any(expected[len(found) :])
    volume.check()
    await volume.release(handle)


@pytest.mark.parametrize("seed", range(3))
def test_neighbours_in_a_logical_block_do_not_undo_each_other(seed: int) -> None:
    async def main() -> None:
        lun = SimulatedLun(LUN_BYTES, seed=seed)
        superblock = await formatted(lun)
        async with mounted(await lun.login(PORT), superblock) as (volume, _):
            await on_volume(volume, seed)
        await assert_clean(await lun.login(PORT), superblock, 1)

    deterministic_run(main, seed)


@pytest.mark.parametrize("seed", range(3))
def test_appends_at_once_leave_no_gap_and_no_overlap(seed: int) -> None:
    async def main() -> None:
        lun = SimulatedLun(LUN_BYTES, seed=seed)
        superblock = await formatted(lun)
        async with mounted(await lun.login(PORT), superblock) as (volume, _):
            handle = await create(volume, b"log", flags=os.O_RDWR | os.O_APPEND)

            async def append(task: int) -> None:
                for line in range(40):
                    text = b"%d %d %s\n" % (task, line, b"." * Random(line).randrange(3000))
                    assert await volume.write(handle, 0, text) == len(text)

            async with trio.open_nursery() as nursery:
                for task in range(6):
                    nursery.start_soon(append, task)
            size = (await volume.getattr(handle.ino)).size
            lines = bytes(await volume.read(handle, 0, size)).splitlines()
            found = sorted(tuple(map(int, line.split()[:2])) for line in lines)
            assert found == [(task, line) for task in range(6) for line in range(40)]
            await volume.release(handle)

    deterministic_run(main, seed)


@pytest.mark.parametrize("seed", range(4))
def test_reads_and_writes_during_truncations_see_no_foreign_byte(seed: int) -> None:
    async def main() -> None:
        lun = SimulatedLun(LUN_BYTES, seed=seed)
        superblock = await formatted(lun)
        async with mounted(await lun.login(PORT), superblock) as (volume, locks):
            rng = Random(seed)
            handles = [await create(volume, b"file%d" % i) for i in range(3)]
            rival = LockRival(locks)

            async def use(index: int) -> None:
                handle, mark = handles[index], bytes([index + 1])
                for _ in range(60):
                    at = rng.randrange(6 * UNIT)
                    match rng.randrange(4):
                        case 0 | 1:
                            await volume.write(handle, at, mark * rng.choice((100, 4096, 200_000)))
                        case 2:
                            await volume.setattr(handle.ino, SetAttributes(size=at))
                        case 3:
                            found = bytes(await volume.read(handle, at, 100_000))
                            assert not found.strip(mark + b"\0"), "bytes of another file"

            async with trio.open_nursery() as nursery:
                for index in (0, 0, 1, 1, 2, 2):
                    nursery.start_soon(use, index)
                for _ in range(20):
                    await rival.take_some(rng)
                    await trio.sleep(0.01)
            volume.check()
            for handle in handles:
                await volume.release(handle)
        await assert_clean(await lun.login(PORT), superblock, 1)

    deterministic_run(main, seed)


async def test_an_open_that_is_cancelled_leaves_no_open_lock() -> None:
    """It may be the last that is counted, and another open may have got the lock meanwhile."""
    async with fresh_volume() as volume:
        made = await create(volume, b"file")
        await volume.release(made)
        locks, resource = volume.engine.locks, volume.engine.resources.opened(made.ino)
        opened = trio.Event()
        taken = trio.Event()

        async def open_and_close() -> None:
            handle = await volume.open(made.ino, RDWR, 0)
            opened.set()
            await volume.release(handle)

        async def retire() -> None:
            async with locks.acquire(resource, Mode.EX):
                taken.set()

        async with trio.open_nursery() as nursery:
            async with locks.acquire(resource, Mode.EX):
                for task in (open_and_close, retire):
                    nursery.start_soon(task)
                    await trio.testing.wait_all_tasks_blocked()
                cancelled = trio.CancelScope()
                nursery.start_soon(_open_within, cancelled, volume, made.ino)
                await trio.testing.wait_all_tasks_blocked()
            await opened.wait()
            await trio.testing.wait_all_tasks_blocked()
            assert not taken.is_set()
            cancelled.cancel()
            with trio.fail_after(1):
                await taken.wait()
        volume.check()


async def _open_within(scope: trio.CancelScope, volume: Volume, ino: int) -> None:
    with scope:
        await volume.open(ino, RDWR, 0)
