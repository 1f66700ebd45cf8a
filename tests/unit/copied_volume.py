"""A volume in use, and what an array's snapshot of it looks like: for the tests of resignature."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from random import Random

from csvfs import format as fmt
from csvfs.check import check_volume
from csvfs.format import (
    NOBODY,
    Session,
    SessionKind,
    SlotState,
    Superblock,
    View,
    ViewSlot,
    ViewSlotFlag,
)
from csvfs.journal.replay import read_header
from csvfs.membership.fixed_area import read_superblock, read_view
from csvfs.membership.seat import Seat, seat_block
from csvfs.membership.slot_start import journal_place
from csvfs.namespace.inode import Attributes
from csvfs.volume import Volume
from redirector.block.device import BlockDevice, InitiatorPort
from redirector.block.keys import PathKey
from redirector.block.simulated import SimulatedLun
from tests.simulated_volume import LUN_BYTES, PORT, ROOT, SLOT, create, formatted, mkdir, mounted
from tests.unit.claim_nodes import ALPHA

COPY_ID = b"the copy"
LOOK = InitiatorPort("iqn.2026-11.test:look", 9)
EPOCH = 9
Files = dict[bytes, bytes]
"""Path -> content, of a directory its listing."""


class _Vanish(Exception):
    """The host dies."""


@dataclass(frozen=True)
class InUse:
    """A volume that a host had mounted when it was copied."""

    lun: SimulatedLun
    superblock: Superblock
    files: Files
    """All of them acknowledged, many in the journal only."""

    @property
    def last_sequence(self) -> int:
        """Of any record that the ring holds."""
        geometry = self.superblock.geometry
        first = geometry.journal(SLOT)
        ring = (self.lun.blocks.get(first + n, b"") for n in range(2, geometry.journal_blocks))
        kind = fmt.BlockType.JOURNAL_RECORD
        records = [b for b in ring if b[:4] == fmt.MAGIC and fmt.block_type(b) == kind]
        return max(map(fmt.block_version, records))

    def copy(self, *, record: bool = False, device_id: bytes = COPY_ID) -> SimulatedLun:
        """As the array makes one: another device."""
        lun = self.lun.crashed(keep=lambda _: True, record=record)
        return as_device(lun, device_id)


def as_device(lun: SimulatedLun, device_id: bytes) -> SimulatedLun:
    lun.identity = replace(lun.identity, device_id=device_id)
    return lun


async def volume_in_use() -> InUse:
    """With a bit of everything that is metadata, and a journal that holds some of it."""
    lun = SimulatedLun(LUN_BYTES, yields=False)
    superblock = await formatted(lun)
    device = await lun.login(PORT)
    files: Files = {}
    try:
        async with mounted(device, superblock) as (volume, _):
            await _fill(volume)
            files = await contents(volume)
            last = await create(volume, b"last")  # in the journal only, whatever came home
            await volume.write(last, 0, b"the last")
            await volume.sync()
            files[b"/last"] = b"the last"
            moment = lun.crashed(keep=lambda _: True)
            raise _Vanish
    except* _Vanish:
        lun.close_session(device)
    await _list_node(moment, superblock)
    return InUse(moment, superblock, files)


async def _fill(volume: Volume) -> None:
    home = await mkdir(volume, b"home")
    for number in range(150):  # more than one node of the directory holds
        handle = await create(volume, b"image-%d-%s" % (number, b"x" * 60), parent=home.ino)
        await volume.write(handle, 0, b"%d" % number * 700)
        if number == 7:
            for piece in range(120):  # and of a file's extents
                await volume.write(handle, (300 - 2 * piece) << 16, b"piece %d" % piece)
            await volume.setxattr(handle.ino, b"user.owner", b"somebody", 0)
        await volume.release(handle)
        if number == 100:
            await volume.sync()
    await volume.symlink(ROOT, b"long", b"t" * 4000, 0, 0)
    gone = await create(volume, b"gone")
    await volume.write(gone, 0, b"still open")
    await volume.unlink(ROOT, b"gone")


async def _list_node(lun: SimulatedLun, superblock: Superblock) -> None:
    """The view and the slot block of the node whose life this was."""
    entry = ViewSlot(
        1,
        SlotState.ACTIVE,
        NOBODY,
        node_name="alpha",
        flags=ViewSlotFlag.JOURNAL_USED,
        machine_id=ALPHA.machine_id,
        boot_id=ALPHA.boot_id,
    )
    slots = [ViewSlot()] * superblock.geometry.slots
    slots[SLOT] = entry
    view = View(EPOCH, PathKey(SLOT, 1, 1).pack(), tuple(slots), b"s" * 32)
    session = Session(SessionKind.DATA, 1, PathKey(SLOT, 1, 1).pack(), PORT.name, PORT.isid)
    address = superblock.geometry.slot_block(SLOT)
    block = seat_block(Seat(SLOT, 1, ()), ALPHA, (session,), 5)
    async with await lun.login(LOOK) as device:
        for epoch in (EPOCH, EPOCH - 1):
            data = fmt.encode_view(replace(view, epoch=epoch), superblock.volume_id)
            await device.write(fmt.byte_offset(fmt.view_address(epoch)), data, fua=True)
        data = block.encode(superblock.volume_id, address, 1)
        await device.write(fmt.byte_offset(address), data, fua=True)


# -- looking -------------------------------------------------------------------------------------
async def contents(volume: Volume, ino: int = ROOT, path: bytes = b"") -> Files:
    """Everything that has a name."""
    found: Files = {}
    cookie = 0
    while entries := await volume.readdir(ino, cookie, 50):
        cookie = entries[-1].cookie
        for entry in entries:
            if entry.name not in (b".", b".."):
                found |= await _content(volume, entry.attributes, path + b"/" + entry.name)
    return found


async def _content(volume: Volume, attributes: Attributes, path: bytes) -> Files:
    if attributes.is_directory:
        return await contents(volume, attributes.ino, path)
    if attributes.mode & 0o170000 == 0o120000:
        return {path: bytes(await volume.readlink(attributes.ino))}
    handle = await volume.open(attributes.ino, os.O_RDONLY, 0)
    content = bytes(await volume.read(handle, 0, attributes.size))
    await volume.release(handle)
    names = await volume.listxattr(attributes.ino)
    values = [await volume.getxattr(attributes.ino, name) for name in names]
    return {path: b"|".join([content, *names, *values])}


async def superblock_of(lun: SimulatedLun) -> Superblock:
    """As the medium has it."""
    copy = SimulatedLun(LUN_BYTES, blocks=lun.blocks, yields=False)
    return (await read_superblock(await copy.login(LOOK)))[0]


async def assert_own_volume(lun: SimulatedLun, used: InUse, former: Superblock) -> Superblock:
    """It is a clean volume of its own, with all files, that a host can mount. Changes the LUN."""
    device = await lun.login(PORT)
    superblock, trouble = await read_superblock(device)
    assert trouble is None or lun.identity.device_id == superblock.device_id
    assert superblock.volume_id not in (used.superblock.volume_id, former.volume_id)
    assert superblock.device_id == lun.identity.device_id
    assert superblock.incompat == fmt.REQUIRED_INCOMPAT and not any(superblock.former_volume_id)
    assert superblock.geometry == used.superblock.geometry
    view = await read_view(device, superblock.volume_id)
    assert not view.members and view.secret not in (b"s" * 32, bytes(32))
    entry = view.slots[SLOT]
    assert (entry.incarnation, entry.flags) == (1, ViewSlotFlag.JOURNAL_USED)
    assert not entry.node_name and view.epoch > EPOCH
    header, _ = await read_header(device, journal_place(superblock, SLOT))
    assert header.tail_sequence > used.last_sequence, "records of the former id pass for damaged"
    await _assert_clean(device, superblock, trouble is not None)
    async with mounted(device, superblock, incarnation=2) as (volume, _):
        assert await contents(volume) == used.files
        volume.check()
    report = await check_volume(device, superblock, now_ns=9, own_view=view)
    assert not report.totals.orphans and not report.totals.reclaim_entries
    return superblock


async def _assert_clean(device: BlockDevice, superblock: Superblock, torn: bool) -> None:
    report = await check_volume(device, superblock, now_ns=9)
    wrong = [f for f in report.findings if not torn or f.damage.name != "SUPERBLOCK"]
    assert not wrong, "\n".join(map(str, wrong))
    assert report.totals.orphans == 1
    assert report.totals.replayed_records == 0


def random_of(seed: int) -> Random:
    return Random(f"resignature {seed}")
