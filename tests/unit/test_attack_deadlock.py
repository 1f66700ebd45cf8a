"""Many tasks at once on few names: whatever they do, none waits for another for ever.

In virtual time with a deterministic scheduler: a circle of waiting tasks shows at once, as a
timeout, and its seed shows it again.
"""

from __future__ import annotations

import os
import stat
from random import Random

import pytest
import trio

from csvfs.errors import FilesystemError, VolumeFailed
from csvfs.namespace.rename import EXCHANGE
from csvfs.volume import Volume
from lockmgr.settings import Settings
from redirector.block.simulated import SimulatedLun
from tests.crash import deterministic_run
from tests.lock_rival import LockRival
from tests.simulated_volume import LUN_BYTES, PORT, RDWR, ROOT, formatted, mounted
from tests.volume_script import assert_clean

NAMES = [b"a", b"b", b"c"]


class Chaos:
    """One task's calls: on whatever it has seen."""

    def __init__(self, volume: Volume, rng: Random, seen: list[int], files: list[int]) -> None:
        self.volume = volume
        self.rng = rng
        self.seen = seen
        self.files = files

    async def run(self, calls: int) -> None:
        for _ in range(calls):
            try:
                await self.one()
            except VolumeFailed:
                raise
            except FilesystemError:
                pass

    async def one(self) -> None:
        volume, rng = self.volume, self.rng
        here, there = rng.choice(self.seen), rng.choice(self.seen)
        name, other = rng.choice(NAMES), rng.choice(NAMES)
        match rng.randrange(12):
            case 0 | 1:
                made = await volume.mkdir(here, name, 0o755, 0, 0)
                volume.remember(made.ino, 1)
                self.seen.append(made.ino)
            case 2:
                handle, made = await volume.create(here, name, 0o644, RDWR | os.O_CREAT, 0, 0)
                volume.remember(made.ino, 1)
                self.files.append(made.ino)
                await volume.write(handle, rng.randrange(70000), bytes(rng.randrange(1, 9000)))
                await volume.release(handle)
            case 3:
                await volume.unlink(here, name)
            case 4:
                await volume.rmdir(here, name)
            case 5 | 6:
                await volume.rename(here, name, there, other)
            case 7:
                await volume.rename(here, name, there, other, EXCHANGE)
            case 8 if self.files:
                await volume.link(rng.choice(self.files), there, other)
            case 9:
                for entry in await volume.readdir(here, 0, 32):
                    if entry.name not in (b".", b".."):
                        volume.remember(entry.attributes.ino, 1)
            case 10:
                found = await volume.lookup(here, name)
                volume.remember(found.ino, 1)
                if stat.S_ISDIR(found.mode):
                    self.seen.append(found.ino)
            case _:
                await volume.getattr(there)


async def _chaos(seed: int, *, tasks: int, calls: int, sheds: bool) -> None:
    rng = Random(seed)
    lun = SimulatedLun(LUN_BYTES)
    superblock = await formatted(lun)
    settings = Settings(cache_limit=0, min_hold_s=0) if sheds else None
    device = await lun.login(PORT)
    async with mounted(device, superblock, settings=settings) as (volume, locks):
        seen: list[int] = [ROOT]
        files: list[int] = []
        rival = LockRival(locks)
        done = False

        async def greedy() -> None:
            while not done:
                await rival.take_some(rng)
                await trio.sleep(0.001)

        with trio.fail_after(600):
            async with trio.open_nursery() as outer:
                if seed % 2:
                    outer.start_soon(greedy)
                async with trio.open_nursery() as nursery:
                    for _ in range(tasks):
                        chaos = Chaos(volume, Random(rng.random()), seen, files)
                        nursery.start_soon(chaos.run, calls)
                done = True
        volume.check()
        assert volume.failure is None
    await assert_clean(await lun.login(PORT), superblock, 1)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("sheds", [False, True])
def test_tasks_that_change_the_tree_at_random_all_end(seed: int, sheds: bool) -> None:
    deterministic_run(lambda: _chaos(seed, tasks=8, calls=40, sheds=sheds), seed)
