"""The volume's blocks as a check sees them: the LUN, replayed journals, repairs, in that order.

Nothing is written before `write_back`: replayed images and repairs lie in an overlay in memory. So
a check without repair writes nothing, and a repair that gives up half way has changed nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import trio

from csvfs.format import BLOCK_BYTES, BadBlock, BlockType, block_flags, seal, verify
from csvfs.journal.transaction import BlockKey, NeedBlocks
from redirector.block.device import Buffer

READ_DEPTH = 32
MAX_RUN_BLOCKS = 256
GAP_BLOCKS = 4
"""Reading over so many unwanted blocks is cheaper than another command."""


class Disk(Protocol):
    """What a check needs of a `BlockDevice`."""

    async def read_into(self, offset_bytes: int, buffer: bytearray | memoryview) -> None: ...
    async def write(self, offset_bytes: int, data: Buffer, *, fua: bool = False) -> None: ...
    async def flush(self) -> None: ...


class VolumeImage:
    """Blocks by address. Implements `BlockReader` over what `load` brought."""

    def __init__(self, disk: Disk, volume_id: bytes) -> None:
        self._disk = disk
        self.volume_id = volume_id
        self._overlay: dict[int, bytearray] = {}
        self._kept: dict[int, bytes] = {}
        self.greatest_version = 1

    # -- reading ---------------------------------------------------------------------------
    async def read(self, addresses: Iterable[int]) -> dict[int, Buffer]:
        """The raw blocks at ``addresses``, unverified, read in as few commands as makes sense."""
        found: dict[int, Buffer] = {}
        wanted: list[int] = []
        for address in sorted(set(addresses)):
            patched = self._overlay.get(address)
            if patched is not None:
                found[address] = patched
            else:
                wanted.append(address)
        limit = trio.CapacityLimiter(READ_DEPTH)

        async def read_run(run: list[int]) -> None:
            buffer = bytearray((run[-1] - run[0] + 1) * BLOCK_BYTES)
            async with limit:
                await self._disk.read_into(run[0] * BLOCK_BYTES, buffer)
            for address in run:
                at = (address - run[0]) * BLOCK_BYTES
                found[address] = bytes(memoryview(buffer)[at : at + BLOCK_BYTES])

        async with trio.open_nursery() as nursery:
            for run in _runs(wanted):
                nursery.start_soon(read_run, run)
        return found

    def verify(self, block: Buffer, key: BlockKey) -> None:
        """Raise `BadBlock` unless ``block`` is what ``key`` says."""
        version = verify(block, key.address, key.kind, self.volume_id, key.owner)
        if key.kind is BlockType.TREE_NODE and block_flags(block) != key.flags:
            raise BadBlock(key.address, key.kind, "it belongs to a tree of another kind")
        self.greatest_version = max(self.greatest_version, version)

    async def read_verified(
        self, keys: Iterable[BlockKey]
    ) -> tuple[dict[int, Buffer], dict[int, BadBlock]]:
        """Blocks that are what they must be, and the errors of those that are not."""
        wanted = {key.address: key for key in keys}
        good: dict[int, Buffer] = {}
        bad: dict[int, BadBlock] = {}
        for address, block in (await self.read(wanted)).items():
            try:
                self.verify(block, wanted[address])
                good[address] = block
            except BadBlock as error:
                bad[address] = error
        return good, bad

    # -- synchronous bodies ------------------------------------------------------------------
    def block(self, key: BlockKey) -> Buffer:
        """A block that was kept or patched, verified. Raises `NeedBlocks` and `BadBlock`."""
        block = self._overlay.get(key.address) or self._kept.get(key.address)
        if block is None:
            raise NeedBlocks(key)
        self.verify(block, key)
        return block

    async def keep(self, keys: Iterable[BlockKey]) -> None:
        """Read blocks that a synchronous body asked for."""
        blocks = await self.read(key.address for key in keys)
        for address, block in blocks.items():
            if address not in self._overlay:
                self._kept[address] = bytes(block)

    def forget_kept(self) -> None:
        """Give back the memory of `keep`."""
        self._kept.clear()

    # -- changing ----------------------------------------------------------------------------
    def put(self, address: int, block: bytearray) -> None:
        """Replace a block, sealed as the newest image of all."""
        self.greatest_version += 1
        seal(block, self.greatest_version)
        self.put_sealed(address, block)

    def put_sealed(self, address: int, block: Buffer) -> None:
        """Replace a block by one that has its version and checksum (an image of a journal)."""
        assert len(block) == BLOCK_BYTES
        self._overlay[address] = bytearray(block)

    @property
    def changed(self) -> int:
        """Blocks in the overlay."""
        return len(self._overlay)

    async def write_back(self) -> int:
        """Write the overlay and flush; return the number of blocks.

        Raises `BlockError`; what was written by then is newer than what it replaced, and the next
        check goes on from there.
        """
        limit = trio.CapacityLimiter(READ_DEPTH)

        async def write(address: int, block: bytearray) -> None:
            async with limit:
                await self._disk.write(address * BLOCK_BYTES, block)

        async with trio.open_nursery() as nursery:
            for address, block in sorted(self._overlay.items()):
                nursery.start_soon(write, address, block)
        await self._disk.flush()
        written = len(self._overlay)
        self._overlay.clear()
        return written


def _runs(addresses: list[int]) -> Iterator[list[int]]:
    """Ascending addresses in runs that one command reads, small gaps included."""
    run: list[int] = []
    for address in addresses:
        if run and (address > run[-1] + GAP_BLOCKS or address - run[0] >= MAX_RUN_BLOCKS):
            yield run
            run = []
        run.append(address)
    if run:
        yield run
