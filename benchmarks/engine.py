"""`python -m benchmarks.engine`: the iSCSI engine beside the raw LUN, without a filesystem.

The same four workloads as `benchmarks`, through `IscsiDevice` under trio in one process, and by
iscsi-perf and qemu-img bench, in turn on one target. What the engine's figure includes that theirs
do not: a Python task for each command in flight.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time

import trio
from rich.console import Console
from rich.table import Table

from benchmarks import raw
from redirector.block.device import InitiatorPort
from redirector.block.iscsi import IscsiLun
from redirector.block.iscsi_device import IscsiDevice
from tests.tgt import Tgt

LUN_BYTES = 2 << 30
PORT = InitiatorPort("iqn.2026-11.bench.csvfs:engine", 0x80_0000_0000_01)
WORKLOADS = (
    ("4K random read, depth 32", "read", 4096, 32),
    ("4K random write, depth 32", "write", 4096, 32),
    ("1M sequential read, depth 4", "read", 1 << 20, 4),
    ("1M sequential write, depth 4", "write", 1 << 20, 4),
)


async def iops(device: IscsiDevice, way: str, block_bytes: int, depth: int, seconds: int) -> float:
    """Commands a second of ``depth`` tasks."""
    blocks = LUN_BYTES // block_bytes
    small = block_bytes <= 65536
    end = time.monotonic() + seconds
    done = 0

    async def work(number: int) -> None:
        nonlocal done
        rng = random.Random(number)
        buffer = bytearray(block_bytes)
        at = number
        while time.monotonic() < end:
            offset_bytes = (rng.randrange(blocks) if small else at % blocks) * block_bytes
            at += depth
            if way == "read":
                await device.read_into(offset_bytes, buffer)
            else:
                await device.write(offset_bytes, buffer)
            done += 1

    started = time.monotonic()
    async with trio.open_nursery() as nursery:
        for number in range(depth):
            nursery.start_soon(work, number)
    return done / (time.monotonic() - started)


def engine(target: Tgt, way: str, block_bytes: int, depth: int, seconds: int) -> float:
    """One session, one workload."""

    async def run() -> float:
        lun = IscsiLun(target.address, target.port, target.iqn, 1)
        async with await lun.login(PORT) as device:
            return await iops(device, way, block_bytes, depth, seconds)

    return trio.run(run)


def main() -> int:
    """Measure in turn, print medians."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    options.add_argument("--seconds", type=int, default=3, help="length of each measurement")
    options.add_argument("--rounds", type=int, default=3, help="measurements a figure")
    chosen = options.parse_args()
    table = Table(
        "workload", "engine /s", "raw /s", "of raw", title="the engine beside the raw LUN"
    )
    with Tgt(lun_bytes=LUN_BYTES) as target:
        for chunk in range(LUN_BYTES >> 24):  # tmpfs gives pages on the first write
            with target.backing().open("r+b") as file:
                file.seek(chunk << 24)
                file.write(bytes(1 << 24))
        for name, way, block_bytes, depth in WORKLOADS:
            measure = raw.read_iops if way == "read" else raw.write_iops
            mine, theirs = [], []
            for _ in range(chosen.rounds):
                mine.append(engine(target, way, block_bytes, depth, chosen.seconds))
                small = block_bytes <= 65536
                theirs.append(measure(target.url, block_bytes, depth, chosen.seconds, random=small))
            value, base = statistics.median(mine), statistics.median(theirs)
            table.add_row(name, f"{value:,.0f}", f"{base:,.0f}", f"{value / base:.2f}")
    Console(width=90).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
