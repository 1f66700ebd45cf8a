"""`csvctl check` of a full-size volume: 1 TiB, 100 images of 10,000 extents, 100,000 files.

The volume is made by the filesystem's own code, on the LUN, through its real claim; only the
images' data is not written: their extents are mapped, a unit each, with holes between, as a guest
that writes at random leaves them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import SystemRandom

import trio

from csvfs.engine.change import Change
from csvfs.format import ROOT_INODE, UNIT_BYTES, Superblock
from csvfs.journal.store import JournalStart
from csvfs.membership.claim import Claim, claim_volume, release_volume
from csvfs.membership.decision import Host
from csvfs.membership.seat import JournalTask
from csvfs.membership.slot_start import begin_slot
from csvfs.mkfs import FormatOptions, make_filesystem
from csvfs.volume import Volume, open_volume
from lockmgr.manager import open_lock_manager
from redirector.block.device import BlockDevice
from redirector.block.keys import choose_port
from redirector.block.url import open_lun
from tests.tgt import Tgt

LUN_BYTES = 1 << 40
IMAGES, EXTENTS, FILES = 100, 10_000, 100_000
FILES_A_DIRECTORY = 1000
EXTENTS_A_TRANSACTION = 64
INITIATOR = "iqn.2026-11.bench.csvfs:big"


async def format_directly(url: str) -> None:
    """An empty volume that nobody holds."""
    port = choose_port(INITIATOR, SystemRandom())
    async with await open_lun(url).login(port) as device:
        await make_filesystem(
            device, FormatOptions(label="big"), now_ns=time.time_ns(), rng=SystemRandom()
        )


@asynccontextmanager
async def volume_on(url: str) -> AsyncIterator[Volume]:
    """The volume at ``url``, claimed as a host does, and left."""
    starts: list[JournalStart] = []

    async def prepare(device: BlockDevice, superblock: Superblock, task: JournalTask) -> None:
        starts.append(await begin_slot(device, superblock, task.slot, task.incarnation))

    host = Host("bench", b"b" * 16, b"b" * 16, INITIATOR)
    claim: Claim = await claim_volume(
        open_lun(url), host, prepare=prepare, take_lock=lambda _: True
    )
    async with (
        open_lock_manager() as locks,
        open_volume(claim.data.device, claim.superblock, 0, 1, starts[0], locks) as volume,
    ):
        yield volume
    await release_volume(claim)


async def make_image(volume: Volume, name: bytes) -> None:
    """An image of so many extents: one unit each, every second one."""
    handle, attributes = await volume.create(ROOT_INODE, name, 0o600, 0, 0, 0)
    for start in range(0, EXTENTS, EXTENTS_A_TRANSACTION):
        end = min(start + EXTENTS_A_TRANSACTION, EXTENTS)

        def body(change: Change, start: int = start, end: int = end) -> None:
            inode = change.inode(attributes.ino)
            for number in range(start, end):
                change.map_units(inode, number * 2, 1)
            inode.size = end * 2 * UNIT_BYTES

        await volume.engine.change(body)
    await volume.release(handle)


async def make_files(volume: Volume) -> None:
    """Empty files in directories."""
    for directory in range(FILES // FILES_A_DIRECTORY):
        made = await volume.mkdir(ROOT_INODE, b"d%05d" % directory, 0o755, 0, 0)
        for number in range(FILES_A_DIRECTORY):
            handle, _ = await volume.create(made.ino, b"file%05d" % number, 0o644, 0, 0, 0)
            await volume.release(handle)


async def build(url: str) -> None:
    """Format and fill the volume."""
    await format_directly(url)
    async with volume_on(url) as volume:
        for number in range(IMAGES):
            await make_image(volume, b"image%03d.raw" % number)
        await make_files(volume)


def check_tebibyte() -> list[tuple[str, float, str, float, str]]:
    """(name, value, unit, limit, command) of the two figures of the check."""
    with Tgt(lun_bytes=LUN_BYTES) as target:
        trio.run(build, target.url)
        started = time.monotonic()
        argv = [str(Path(sys.executable).with_name("csvctl")), "check", target.url]
        with subprocess.Popen(argv) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - started
    if process.returncode:
        raise RuntimeError(f"csvctl check ended with {process.returncode}")
    mebibytes = usage.ru_maxrss / 1024
    name = f"check of 1 TiB, {IMAGES} images of {EXTENTS:,} extents, {FILES:,} files"
    return [
        (name, seconds, "s", 120, "csvctl check LUN"),
        (f"{name}: memory", mebibytes, "MiB", 1024, "ru_maxrss of csvctl check LUN"),
    ]


if __name__ == "__main__":
    for figure in check_tebibyte():
        print(figure)
