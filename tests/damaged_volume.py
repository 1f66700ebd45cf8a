"""A volume with one of everything, and ways to damage it behind the filesystem's back."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from csvfs.check import Report, check_volume
from csvfs.format import (
    BLOCK_BYTES,
    BlockType,
    Identity,
    SlotBlock,
    Superblock,
    View,
    block_owner,
    block_type,
    block_version,
    seal,
)
from csvfs.namespace.inode import Inode
from csvfs.volume import Volume
from redirector.block.device import BlockDevice
from redirector.block.simulated import SimulatedLun
from tests.simulated_volume import (
    LUN_BYTES,
    PORT,
    ROOT,
    SLOT,
    UNIT,
    create,
    formatted,
    mkdir,
    mounted,
)
from tests.volume_script import slot_view

EXTENTS = 400
ENTRIES = 300
LONG_TARGET = b"far/" * 1000


@dataclass
class Content:
    """Inode numbers of what was made."""

    directory: int = 0
    large_directory: int = 0
    file: int = 0
    fragmented: int = 0
    symlink: int = 0
    attributes: int = 0
    orphan: int = 0


@dataclass
class DamagedVolume:
    """The LUN of a volume that nobody has mounted."""

    lun: SimulatedLun
    device: BlockDevice
    superblock: Superblock
    content: Content

    @property
    def view(self) -> View:
        """As the volume's only member would have it."""
        return slot_view(self.superblock, 1)

    async def check(self, *, repair: bool = False) -> Report:
        """`check_volume` with the slot's journal and lists taken as used."""
        return await check_volume(
            self.device, self.superblock, repair=repair, now_ns=10**18, own_view=self.view
        )

    async def read(self, address: int) -> bytearray:
        """A raw block."""
        return await self.device.read(address * BLOCK_BYTES, BLOCK_BYTES)

    async def write(self, address: int, block: bytes | bytearray) -> None:
        """Replace a raw block."""
        await self.device.write(address * BLOCK_BYTES, block)

    async def tear(self, address: int) -> None:
        """Flip bits in the middle of a block, so that its checksum is wrong."""
        block = await self.read(address)
        block[2000] ^= 0x5A
        await self.write(address, block)

    async def forge(self, address: int, change: Callable[[bytearray], object]) -> None:
        """Change a block and make its checksum right: damage that only its meaning shows."""
        block = await self.read(address)
        change(block)
        seal(block, block_version(block) + 1)
        await self.write(address, block)

    async def forge_inode(self, ino: int, **fields: int) -> None:
        """Set fields of an inode."""

        def change(block: bytearray) -> None:
            inode = Inode.unpack(block)
            for name, value in fields.items():
                setattr(inode, name, value)
            inode.pack_into(block)

        await self.forge(ino, change)

    async def inode(self, ino: int) -> Inode:
        """Fields of an inode block as it lies on the LUN."""
        return Inode.unpack(await self.read(ino))

    async def blocks(self, kind: BlockType, owner: int) -> list[int]:
        """Addresses in the groups of blocks of this type and owner."""
        geometry = self.superblock.geometry
        first, end = geometry.groups_unit * 16, geometry.groups_end_unit * 16
        found = []
        for address in range(first, min(end, first + 16 * 400)):
            block = await self.read(address)
            if block[:4] == b"CSVB" and block_type(block) == kind and block_owner(block) == owner:
                found.append(address)
        return found


class _Vanish(Exception):
    """The host dies."""


async def _fill(volume: Volume) -> Content:
    content = Content()
    content.directory = (await mkdir(volume, b"directory")).ino
    content.large_directory = (await mkdir(volume, b"large")).ino
    for number in range(ENTRIES):
        handle = await create(volume, b"entry-%04d" % number, parent=content.large_directory)
        await volume.release(handle)
    handle = await create(volume, b"file", parent=content.directory)
    content.file = handle.state.ino
    await volume.write(handle, 0, os.urandom(3 * UNIT))
    await volume.release(handle)
    await volume.link(content.file, ROOT, b"second-name")
    handle = await create(volume, b"fragmented")
    content.fragmented = handle.state.ino
    for number in range(EXTENTS):
        await volume.write(handle, number * 2 * UNIT, b"%08d" % number)
    await volume.release(handle)
    made = await volume.symlink(ROOT, b"symlink", LONG_TARGET, 0, 0)
    content.symlink = made.ino
    handle = await create(volume, b"attributes")
    content.attributes = handle.state.ino
    await volume.setxattr(content.attributes, b"user.name", b"value", 0)
    await volume.release(handle)
    await mkdir(volume, b"inner", parent=content.directory)
    return content


@asynccontextmanager
async def damaged_volume(*, crashed: bool = False) -> AsyncIterator[DamagedVolume]:
    """A clean volume, left; ``crashed``: with a file unlinked but open when the host died."""
    lun = SimulatedLun(LUN_BYTES, yields=False)
    superblock = await formatted(lun)
    device = await lun.login(PORT)
    content = Content()
    try:
        async with mounted(device, superblock) as (volume, _):
            content = await _fill(volume)
            if crashed:
                handle = await create(volume, b"orphan")
                content.orphan = handle.state.ino
                await volume.write(handle, 0, os.urandom(UNIT))
                await volume.unlink(ROOT, b"orphan")
                await volume.sync()
                raise _Vanish
    except* _Vanish:
        pass
    volume_on_lun = DamagedVolume(lun, device, superblock, content)
    identity = Identity(1, 1, 0, 1, bytes(16), bytes(16), "host")
    address = superblock.geometry.slot_block(SLOT)
    block = SlotBlock(SLOT, identity).encode(superblock.volume_id, address, 1)
    await volume_on_lun.write(address, block)
    yield volume_on_lun
