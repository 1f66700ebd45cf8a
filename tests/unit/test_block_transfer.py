"""Neighbours in one command, several at once, and no command larger than the target takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio

from csvfs.format import BLOCK_BYTES
from csvfs.journal.block_transfer import in_parallel, read_extent, write_extent, write_images
from redirector.block.device import MediumError
from redirector.block.simulated import Command, SimulatedDevice, SimulatedLun
from tests.small_store import LUN_BYTES, PORT, sealed


async def device_with(
    max_transfer_bytes: int,
) -> tuple[SimulatedLun, SimulatedDevice, list[tuple[int, int]]]:
    """A device of which each command is logged as (address, blocks)."""
    lun = SimulatedLun(LUN_BYTES)
    device = await lun.login(PORT)
    device.identity = replace(device.identity, max_transfer_bytes=max_transfer_bytes)
    seen: list[tuple[int, int]] = []

    def note(command: Command) -> bool:
        seen.append((command.offset_bytes // BLOCK_BYTES, command.length_bytes // BLOCK_BYTES))
        return False

    lun.hold(note)
    return lun, device, seen


async def test_an_extent_is_cut_to_what_the_target_takes() -> None:
    lun, device, seen = await device_with(3 * BLOCK_BYTES)
    data = b"".join(sealed(600 + i, i) for i in range(8))
    await write_extent(device, 600, data, fua=True)
    assert sorted(seen) == [(600, 3), (603, 3), (606, 2)]
    assert await read_extent(device, 600, 8) == data
    assert lun.blocks[607] == sealed(607, 7)


@pytest.mark.parametrize(
    ("most", "commands"),
    [(64, [(600, 3), (610, 1), (620, 2)]), (2, [(600, 2), (602, 1), (610, 1), (620, 2)])],
)
async def test_images_are_merged(most: int, commands: list[tuple[int, int]]) -> None:
    lun, device, seen = await device_with(most * BLOCK_BYTES)
    addresses = (600, 601, 602, 610, 620, 621)
    await write_images(device, [(a, sealed(a, a)) for a in addresses])
    assert sorted(seen) == commands
    assert all(lun.blocks[a] == sealed(a, a) for a in addresses)


async def test_the_first_failure_is_raised_when_all_have_ended() -> None:
    ended: list[int] = []

    async def command(item: int) -> None:
        await trio.lowlevel.checkpoint()
        ended.append(item)
        if item == 3:
            raise MediumError("READ", sense_key=3)

    with pytest.raises(MediumError):
        await in_parallel(command, range(200))
    assert 3 in ended and len(ended) < 200
    await in_parallel(command, [])
