"""Many blocks to or from a device: neighbours in one command, several commands at once.

Every command that was issued has ended when a function here returns or raises, so the caller
knows that nothing of it is on its way any more (unless the error is `OutcomeUnknown`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Final, TypeVar

import trio

from csvfs.errors import VolumeFailed
from csvfs.ondisk.block import BLOCK_BYTES
from redirector.block.device import BlockError, BlockIO, Buffer

T = TypeVar("T")

TRANSFER_DEPTH: Final = 16
MAX_RUN_BLOCKS: Final = 64
"""256 KiB: larger commands are no faster, and smaller ones leave room for a guest's."""


def most_blocks(device: BlockIO) -> int:
    """Blocks that one command may carry."""
    return max(1, device.identity.max_transfer_bytes // BLOCK_BYTES)


async def read_extent(device: BlockIO, address: int, blocks: int) -> bytearray:
    """Read one stretch of blocks, in as many commands as the target's limit asks for.

    Raises the first `BlockError`.
    """
    data = bytearray(blocks * BLOCK_BYTES)
    view = memoryview(data)
    most = most_blocks(device) * BLOCK_BYTES

    async def read(start: int) -> None:
        await device.read_into(address * BLOCK_BYTES + start, view[start : start + most])

    await in_parallel(read, range(0, len(data), most))
    return data


async def write_images(
    device: BlockIO, images: Sequence[tuple[int, Buffer]], *, fua: bool = False
) -> None:
    """Write (address, 4096 bytes) pairs that ascend by address. Raises the first `BlockError`."""
    most = min(MAX_RUN_BLOCKS, most_blocks(device))
    await _write_all(device, list(_runs(images, most)), fua)


async def write_extent(device: BlockIO, address: int, data: Buffer, *, fua: bool = False) -> None:
    """Write one stretch of blocks, in as many commands as the target's limit asks for.

    Raises the first `BlockError`; then any part of it may have been written.
    """
    most = most_blocks(device) * BLOCK_BYTES
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


async def _write_all(device: BlockIO, pieces: Sequence[tuple[int, Buffer]], fua: bool) -> None:
    async def write(piece: tuple[int, Buffer]) -> None:
        await device.write(piece[0] * BLOCK_BYTES, piece[1], fua=fua)

    await in_parallel(write, pieces)


async def in_parallel(command: Callable[[T], Awaitable[None]], items: Sequence[T]) -> None:
    """Issue ``command`` for each item, several at a time; none after one has failed.

    Raises the first `BlockError` or `VolumeFailed`, when all that were issued have ended.
    """
    if len(items) == 1:
        await command(items[0])
        return
    waiting = iter(items)
    failures: list[BlockError | VolumeFailed] = []

    async def work() -> None:
        for item in waiting:
            if failures:
                return
            try:
                await command(item)
            except (BlockError, VolumeFailed) as error:
                failures.append(error)

    async with trio.open_nursery() as nursery:
        for _ in range(min(TRANSFER_DEPTH, len(items))):
            nursery.start_soon(work)
    if failures:
        raise failures[0]
