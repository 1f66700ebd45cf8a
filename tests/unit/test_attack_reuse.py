"""A full volume, where what one file gives up is the next one's at once, cut at any write.

Every record of 512 bytes names the file that it was written to: so a byte of another file, or of
an earlier life of the unit, shows wherever it appears.
"""

from __future__ import annotations

import os
from random import Random

import pytest
import trio

from csvfs.errors import NoSpace
from csvfs.format import Superblock
from csvfs.namespace.inode import SetAttributes
from csvfs.volume import Volume
from redirector.block.simulated import SimulatedLun
from tests.crash import PORT, CrashRun, Cut, cut_everywhere, record_workload, show
from tests.simulated_volume import ROOT, UNIT, create, formatted, mounted
from tests.volume_script import assert_clean

FULL_BYTES = 66 << 20
RECORD = 512


def content(name: bytes, records: int) -> bytes:
    return name.ljust(RECORD, b".") * records


class Reuse:
    """Tasks that fill the volume, and delete and cut what they made."""

    superblock: Superblock
    first_write = 0

    async def __call__(self, run: CrashRun) -> None:
        self.superblock = await formatted(run.lun)
        async with mounted(run.device, self.superblock) as (volume, _):
            await self._fill(volume)
            await volume.store.checkpoint()
            self.first_write = run.lun.journal.writes
            async with trio.open_nursery() as nursery:
                for task in range(3):
                    nursery.start_soon(self._work, run, volume, task)

    async def _fill(self, volume: Volume) -> None:
        """Leave a dozen units."""
        handle = await create(volume, b"ballast")
        free = (await volume.statfs()).available_blocks // 16 - 12
        for unit in range(free):
            await volume.write(handle, unit * UNIT + UNIT - RECORD, content(b"ballast", 1))
        await volume.release(handle)

    async def _work(self, run: CrashRun, volume: Volume, task: int) -> None:
        rng = Random(run.seed * 10 + task)
        for life in range(8):
            name = b"%d-%d" % (task, life)
            try:
                handle = await create(volume, name)
            except NoSpace:
                run.count("no space to create")
                continue
            for _ in range(rng.randrange(1, 5)):
                first = rng.randrange(4 * UNIT // RECORD)
                count = rng.choice((1, 3, 100, 128, 256, 400))
                data = content(name, count)
                try:
                    done = await volume.write(handle, first * RECORD, data)
                    run.count("write" if done == len(data) else "short write")
                    if done < len(data):
                        continue
                except NoSpace:
                    run.count("no space")
                    continue
                if rng.random() < 0.5:
                    await volume.fsync(handle.ino, rng.random() < 0.5)
                    run.acknowledge(("there", name, first, count))
                    run.count("fsync")
            if rng.random() < 0.4:
                run.acknowledge(("gone", name, 0, 0))
                size = rng.choice((0, 700, UNIT, UNIT + 5000))
                await volume.setattr(handle.ino, SetAttributes(size=size))
                await volume.setattr(handle.ino, SetAttributes(size=5 * UNIT))
                run.count("truncate")
            if rng.random() < 0.7:
                run.acknowledge(("gone", name, 0, 0))
                await volume.unlink(ROOT, name)
                run.count("unlink")
            await volume.release(handle)
            await volume.forget(handle.ino, 1)


class Verify:
    def __init__(self, workload: Reuse) -> None:
        self.workload = workload

    async def __call__(self, cut: Cut) -> str:
        superblock = self.workload.superblock
        device = await cut.lun.login(PORT)
        promised: dict[bytes, list[tuple[int, int]]] = {}
        for what, name, first, count in cut.promises():
            if what == "gone":
                promised[name] = []
            else:
                promised.setdefault(name, []).append((first, count))
        async with mounted(device, superblock, incarnation=2) as (volume, _):
            there = {e.name: e.attributes for e in await volume.readdir(ROOT, 2, 100)}
            for name, spans in promised.items():
                if spans:
                    assert name in there, f"{name!r} was synced and is gone"
            for name, attributes in there.items():
                if name == b"ballast":
                    continue
                volume.remember(attributes.ino, 1)
                handle = await volume.open(attributes.ino, os.O_RDWR, 0)
                data = bytes(await volume.read(handle, 0, attributes.size))
                for at in range(0, len(data), RECORD):
                    found = data[at : at + RECORD]
                    whole, zeroes = content(name, 1)[: len(found)], bytes(len(found))
                    # A truncation to 700 bytes may cut a record.
                    cut_one = whole[: 700 % RECORD].ljust(len(found), b"\0")
                    cut_two = whole[: (UNIT + 5000) % RECORD].ljust(len(found), b"\0")
                    assert found in (whole, zeroes, cut_one, cut_two), (name, at, found[:20])
                for first, count in promised.get(name, ()):
                    assert data[first * RECORD : (first + count) * RECORD] == content(name, count)
                await volume.release(handle)
            volume.check()
        await assert_clean(device, superblock, 2)
        return "sound"


@pytest.mark.parametrize("seed", range(2))
def test_no_byte_of_another_file_shows_on_a_full_volume(seed: int) -> None:
    lun = SimulatedLun(FULL_BYTES, record=True)
    workload = Reuse()
    run = record_workload(lun, workload, seed=seed)
    report = cut_everywhere(run, Verify(workload), every=3, first_write=workload.first_write)
    show(report)
    assert report.types["no space"] and report.types["fsync"] and report.types["unlink"]
