"""Power loss in the middle of a truncation that takes many transactions, and of what follows."""

from __future__ import annotations

import pytest
import trio

from csvfs.data import reclaim
from csvfs.engine import change
from csvfs.format import Superblock
from csvfs.namespace.inode import SetAttributes
from redirector.block.simulated import SimulatedLun
from tests.crash import CrashReport, CrashRun, Cut, cut_everywhere, record_workload, show
from tests.simulated_volume import (
    LUN_BYTES,
    PORT,
    RDWR,
    ROOT,
    SLOT,
    UNIT,
    create,
    formatted,
    mounted,
)
from tests.volume_script import assert_clean

EXTENTS = 60
MARK = b"old." * 1024


class Truncating:
    """A file of many extents is cut short while others sync, made longer again, and removed."""

    def __init__(self) -> None:
        self.superblock: Superblock
        self.first_write = 0

    async def __call__(self, run: CrashRun) -> None:
        self.superblock = await formatted(run.lun)
        run.device = await run.lun.login(PORT)
        async with mounted(run.device, self.superblock) as (volume, _):
            handle = await create(volume, b"file")
            for number in range(EXTENTS):
                await volume.write(handle, number * 2 * UNIT, MARK)
            await volume.sync()
            self.first_write = run.lun.journal.writes
            run.acknowledge("written")

            async def sync_all_the_time() -> None:
                while True:
                    await volume.setattr(ROOT, SetAttributes(mode=0o755))
                    await volume.sync()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(sync_all_the_time)
                await volume.setattr(handle.ino, SetAttributes(size=4 * UNIT + 100))
                run.acknowledge("cut")
                await volume.sync()
                await volume.write(handle, EXTENTS * 2 * UNIT, b"end")
                await volume.sync()
                run.acknowledge("grown")
                await volume.release(handle)
                await volume.unlink(ROOT, b"file")
                await volume.forget(handle.ino, 1)
                await volume.reclaimer.drain()
                nursery.cancel_scope.cancel()

    async def verify(self, cut: Cut) -> str:
        device = await cut.lun.login(PORT)
        async with mounted(device, self.superblock, incarnation=2, recover=False) as (volume, _):
            recovered = await volume.recover(SLOT)
            entries = await volume.readdir(ROOT, 2, 5)
            if entries:
                ino = entries[0].attributes.ino
                volume.remember(ino, 1)
                handle = await volume.open(ino, RDWR, 0)
                size = (await volume.getattr(ino)).size
                end = EXTENTS * 2 * UNIT
                assert size in (end - 2 * UNIT + len(MARK), 4 * UNIT + 100, end + 3)
                await volume.write(handle, end + UNIT, b"x")
                found = bytes(await volume.read(handle, 0, end))
                kept = EXTENTS if size == end - 2 * UNIT + len(MARK) else 2
                expected = b"".join(MARK + bytes(2 * UNIT - len(MARK)) for _ in range(kept))
                if kept == 2:
                    expected += MARK[:100]
                assert found == expected.ljust(end, b"\0")
                await volume.release(handle)
        await assert_clean(device, self.superblock, 2)
        return "to be finished" if recovered.trimmed else "all or nothing"


def test_a_truncation_is_finished_after_any_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(change, "CUT_ROUNDS", 1)
    monkeypatch.setattr(reclaim, "FREE_ITEMS", 5)
    total = CrashReport()
    for seed in range(5):
        workload = Truncating()
        run = record_workload(SimulatedLun(LUN_BYTES, record=True), workload, seed=seed)
        total.add(cut_everywhere(run, workload.verify, first_write=workload.first_write))
    show(total)
    assert total.outcomes["to be finished"] >= 5 and total.outcomes["all or nothing"] >= 20
