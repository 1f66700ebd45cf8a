"""A volume on a simulated LUN, formatted and mounted within a test."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random

from csvfs.errors import VolumeFailed
from csvfs.format import Superblock
from csvfs.membership.slot_start import begin_slot, replay_slot
from csvfs.mkfs import FormatOptions, make_filesystem
from csvfs.namespace.handle import Handle
from csvfs.namespace.inode import Attributes
from csvfs.ondisk.geometry import ROOT_INODE
from csvfs.volume import Volume, VolumeOptions, open_volume
from lockmgr.manager import LockManager, open_lock_manager
from lockmgr.settings import Settings
from redirector.block.device import BlockDevice, InitiatorPort
from redirector.block.simulated import SimulatedLun

PORT = InitiatorPort("iqn.2026-11.test:volume", 1)
LUN_BYTES = 128 << 20
ROOT = ROOT_INODE
SLOT = 1
UNIT = 65536
RDWR = os.O_RDWR


async def formatted(lun: SimulatedLun, *, slots: int = 2) -> Superblock:
    """An empty volume on ``lun``, with journals of 1 MiB."""
    options = FormatOptions(label="test", slots=slots, journal_bytes=1 << 20)
    async with await lun.login(PORT) as device:
        return await make_filesystem(device, options, now_ns=5, rng=Random(5))


@asynccontextmanager
async def mounted(
    device: BlockDevice,
    superblock: Superblock,
    *,
    incarnation: int = 1,
    options: VolumeOptions | None = None,
    settings: Settings | None = None,
    recover: bool = True,
    on_failed: Callable[[VolumeFailed], None] | None = None,
) -> AsyncIterator[tuple[Volume, LockManager]]:
    """The volume, in a slot that was used before if this is not the first incarnation."""
    used = incarnation > 1
    if used:
        start = (await replay_slot(device, superblock, SLOT, incarnation)).start
    else:
        start = await begin_slot(device, superblock, SLOT, incarnation)
    async with (
        open_lock_manager(settings=settings) as locks,
        open_volume(
            device,
            superblock,
            SLOT,
            incarnation,
            start,
            locks,
            options=options,
            on_failed=on_failed,
        ) as volume,
    ):
        if used and recover:
            await volume.recover(SLOT)
        yield volume, locks


@asynccontextmanager
async def fresh_volume(
    lun: SimulatedLun | None = None, *, options: VolumeOptions | None = None
) -> AsyncIterator[Volume]:
    """A volume that was just formatted."""
    lun = lun or SimulatedLun(LUN_BYTES, yields=False)
    superblock = await formatted(lun)
    async with mounted(await lun.login(PORT), superblock, options=options) as (volume, _):
        yield volume


async def create(volume: Volume, name: bytes, *, parent: int = ROOT, flags: int = RDWR) -> Handle:
    """A new regular file, open; the kernel knows it."""
    handle, attributes = await volume.create(parent, name, 0o644, flags | os.O_CREAT, 0, 0)
    volume.remember(attributes.ino, 1)
    return handle


async def mkdir(volume: Volume, name: bytes, *, parent: int = ROOT) -> Attributes:
    made = await volume.mkdir(parent, name, 0o755, 0, 0)
    volume.remember(made.ino, 1)
    return made


async def names(volume: Volume, ino: int = ROOT) -> list[bytes]:
    """All names of a directory, in the order of a listing."""
    found: list[bytes] = []
    cookie = 0
    while entries := await volume.readdir(ino, cookie, 7):
        found += [entry.name for entry in entries]
        cookie = entries[-1].cookie
    return found
