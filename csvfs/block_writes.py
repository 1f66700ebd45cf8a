"""Many blocks to a device: neighbours in one command, several commands at once.

Every command that was issued has ended when a function here returns or raises, so the caller
knows that nothing of it is on its way any more (unless the error is `OutcomeUnknown`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import trio

from csvfs.format_block import BLOCK_BYTES
from redirector.block.device import BlockDevice, BlockError, Buffer

WRITE_DEPTH: Final = 16
MAX_RUN_BLOCKS: Final = 64
"""256 KiB: larger commands are no faster, and smaller ones leave room for a guest's."""


async def write_images(
    device: BlockDevice, images: Sequence[tuple[int, Buffer]], *, fua: bool = False
) -> None:
    """Write (address, 4096 bytes) pairs that ascend by address. Raises the first `BlockError`."""
    most = max(1, min(MAX_RUN_BLOCKS, device.identity.max_transfer_bytes // BLOCK_BYTES))
    await _write_all(device, list(_runs(images, most)), fua)


async def write_extent(
    device: BlockDevice, address: int, data: Buffer, *, fua: bool = False
) -> None:
    """Write one stretch of blocks, in as many commands as the target's limit asks for.

    Raises the first `BlockError`; then any part of it may have been written.
    """
    most = max(1, device.identity.max_transfer_bytes // BLOCK_BYTES) * BLOCK_BYTES
    view = memoryview(data)
    pieces = [
        (address + start // BLOCK_BYTES, view[start : start + most])
        for start in range(0, len(view), most)
    ]
    await _write_all(device, pieces, fua)


def _runs(images: Sequence[tuple[int, Buffer]], most: int) -> Iterator[tuple[int, Buffer]]:
    start = 0
    for index in range(1, len(images) + 1):
        if (
            index == len(images)
            or images[index][0] != images[index - 1][0] + 1
            or index - start == most
        ):
            address, data = images[start]
            if index - start > 1:
                data = b"".join(image for _, image in images[start:index])
            yield address, data
            start = index


async def _write_all(device: BlockDevice, pieces: Sequence[tuple[int, Buffer]], fua: bool) -> None:
    if len(pieces) == 1:
        await device.write(pieces[0][0] * BLOCK_BYTES, pieces[0][1], fua=fua)
        return
    waiting = iter(pieces)
    failures: list[BlockError] = []

    async def work() -> None:
        for address, data in waiting:
            if failures:
                return
            try:
                await device.write(address * BLOCK_BYTES, data, fua=fua)
            except BlockError as error:
                failures.append(error)

    async with trio.open_nursery() as nursery:
        for _ in range(min(WRITE_DEPTH, len(pieces))):
            nursery.start_soon(work)
    if failures:
        raise failures[0]
