"""What recovery of a slot believes of its orphan list."""

from __future__ import annotations

import logging

import pytest

from csvfs.format import (
    BLOCKS_PER_UNIT,
    INODE_ROOT_OFFSET,
    ORPHAN_VALUE,
    BlockType,
    OrphanKind,
    UnitState,
    new_block,
    seal,
    unit_state,
)
from csvfs.namespace.inode import Inode
from csvfs.ondisk.inode import InodeFlag
from csvfs.volume import Volume
from redirector.block.simulated import SimulatedLun
from tests.simulated_volume import LUN_BYTES, PORT, SLOT, UNIT, create, formatted, mounted


def forgery(lun: SimulatedLun, volume: Volume, model: int, address: int, nlink: int) -> bytes:
    """An inode block for ``address`` that claims what the file ``model`` owns."""
    volume_id = volume.store.journal.state.place.volume_id
    block = new_block(BlockType.INODE, address, address, volume_id)
    inode = Inode.unpack(lun.blocks[model])
    inode.ino, inode.nlink, inode.size = address, nlink, 0
    inode.flags |= InodeFlag.TRIMMING
    inode.pack_into(block)
    block[INODE_ROOT_OFFSET:] = lun.blocks[model][INODE_ROOT_OFFSET:]
    seal(block, 1 << 40)
    return bytes(block)


async def data_state(volume: Volume, unit: int) -> UnitState:
    geometry = volume.engine.scope.geometry
    group, index, position = geometry.map_place(unit)
    address = geometry.group_map(group, index)
    return unit_state(
        await volume.engine.look(lambda r: r.read(address, BlockType.GROUP_MAP, group)), position
    )


@pytest.mark.parametrize("kind", [OrphanKind.TRUNCATE, OrphanKind.OPEN])
@pytest.mark.parametrize("freed", [False, True], ids=["data", "freed"])
async def test_an_orphan_is_an_inode_only_where_the_map_says_so(
    kind: OrphanKind, freed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The entry is out of date; at its place lies a guest's forgery, or what was there before."""
    caplog.set_level(logging.CRITICAL, "csvfs.engine.recovery")
    lun = SimulatedLun(LUN_BYTES, yields=False)
    superblock = await formatted(lun)
    async with mounted(await lun.login(PORT), superblock) as (volume, _):
        victim, image = await create(volume, b"victim"), await create(volume, b"image")
        for handle in (victim, image):
            await volume.write(handle, 0, b"x" * 2 * UNIT)
        await volume.store.checkpoint()
        unit = victim.file.map.chunks[0][0] >> 1
        if freed:  # the last block of a unit of metadata: not in use
            address = victim.ino // BLOCKS_PER_UNIT * BLOCKS_PER_UNIT + BLOCKS_PER_UNIT - 1
        else:
            address = (image.file.map.chunks[0][0] >> 1) * BLOCKS_PER_UNIT
        nlink = 0 if kind is OrphanKind.OPEN else 1
        forged = forgery(lun, volume, victim.ino, address, nlink)
        lun.blocks[address] = forged
        entry = ORPHAN_VALUE.pack(kind, victim.state.generation, 0)
        await volume.engine.change(lambda change: change.orphan_list().insert(address, entry))
        for handle in (victim, image):
            await volume.release(handle)
    async with mounted(await lun.login(PORT), superblock, incarnation=2, recover=False) as (
        volume,
        _,
    ):
        recovered = await volume.recover(SLOT)
        assert recovered[:3] == ((0, 1, 0) if kind is OrphanKind.TRUNCATE else (0, 0, 1))
        await volume.reclaimer.drain()
        assert await data_state(volume, unit) is UnitState.DATA
        assert lun.blocks[address] == forged
        volume.check()
