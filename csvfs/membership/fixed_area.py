"""Read and write what lies at fixed places: superblock, view, slot blocks.

All functions raise what the device raises, but for a medium error in a block that has a second
copy: that copy then counts.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from csvfs.format import (
    BLOCK_BYTES,
    BLOCKS_PER_UNIT,
    HEARTBEAT_AREA,
    JOIN_AREA,
    MAGIC,
    MAX_SLOTS,
    SLOT_AREA,
    SUPERBLOCK_ADDRESS,
    UNIT_BYTES,
    VIEW_ADDRESSES,
    VIEW_BYTES,
    BadBlock,
    BlockType,
    Heartbeat,
    JoinRequest,
    SlotBlock,
    Superblock,
    View,
    block_type,
    byte_offset,
    decode_heartbeat,
    decode_join,
    encode_view,
    newest_view,
    view_address,
)
from redirector.block.device import BlockDevice, BlockIO, MediumError
from redirector.block.reservations import Registration

_NEVER_WRITTEN: Final = bytes(len(MAGIC))


class NoVolume(Exception):
    """Neither the superblock nor its backup is valid: the LUN carries no csvfs volume."""


class OlderVolume(NoVolume):
    """An earlier csvfs formatted it, and this one does not read that format."""

    def __init__(self, label: str) -> None:
        name = f'"{label}"' if label else "on this LUN"
        super().__init__(
            f"the volume {name} was formatted by an earlier csvfs, and this one does not read it:"
            " copy its files away with that one, and format it anew"
        )


class SuperblocksDestroyed(NoVolume):
    """The same, but a view of csvfs lies where a view belongs: there was a volume."""


async def read_superblock(device: BlockIO) -> tuple[Superblock, BadBlock | None]:
    """The superblock, and what is wrong with the first copy if the backup had to be used.

    Raises `NoVolume`, and `OlderVolume` for one that cannot be read any more.
    """
    backup = (device.identity.size_bytes // UNIT_BYTES - 1) * (UNIT_BYTES // BLOCK_BYTES)
    errors: list[BadBlock] = []
    for address in (SUPERBLOCK_ADDRESS, max(backup, 0)):
        try:
            block = await device.read(byte_offset(address), BLOCK_BYTES)
            superblock = Superblock.decode(block, address)
        except BadBlock as error:
            errors.append(error)
        except MediumError as error:
            reason = f"it cannot be read ({error})"
            errors.append(BadBlock(address, BlockType.SUPERBLOCK, reason))
        else:
            if superblock.missing_incompat and not superblock.unknown_incompat:
                raise OlderVolume(superblock.label)
            return superblock, errors[0] if errors else None
    words = "; ".join(str(error) for error in errors)
    raise SuperblocksDestroyed(words) if await _has_views(device) else NoVolume(words)


async def _has_views(device: BlockIO) -> bool:
    """Whether blocks of csvfs lie where the views are. A medium error is no answer."""
    for address in VIEW_ADDRESSES:
        try:
            block = await device.read(byte_offset(address), BLOCK_BYTES)
        except MediumError:
            continue
        if block.startswith(MAGIC) and block_type(block) == BlockType.VIEW:
            return True
    return False


async def read_view(device: BlockIO, volume_id: bytes) -> View:
    """The view. Raises `NoView`."""
    return newest_view(await read_view_copies(device), volume_id)


async def read_view_copies(device: BlockIO) -> list[bytearray]:
    """Both copies as they lie there, zeroes for one that the medium lost."""
    copies = []
    for address in VIEW_ADDRESSES:
        try:
            copies.append(await device.read(byte_offset(address), VIEW_BYTES))
        except MediumError:
            copies.append(bytearray(VIEW_BYTES))
    return copies


async def write_view(holder: Registration, view: View, volume_id: bytes) -> None:
    """Write the next view on the reserving session; stable on return.

    After `OutcomeUnknown` it is not known which view counts, and it is not written again: whoever
    succeeds reads it.
    """
    device = holder.device
    block, address = encode_view(view, volume_id), view_address(view.epoch)
    await holder.ask(lambda: device.write(byte_offset(address), block, fua=True))
    await holder.ask(device.flush)


async def read_slot_blocks(device: BlockIO, superblock: Superblock) -> dict[int, SlotBlock]:
    """Those slot blocks that are valid."""
    area = memoryview(await device.read(byte_offset(SLOT_AREA), MAX_SLOTS * BLOCK_BYTES))
    found = {}
    for slot in range(superblock.geometry.slots):
        block = area[slot * BLOCK_BYTES : (slot + 1) * BLOCK_BYTES]
        address = superblock.geometry.slot_block(slot)
        try:
            found[slot], _ = SlotBlock.decode(block, address, superblock.volume_id, slot)
        except BadBlock:
            continue
    return found


async def read_slot_block(
    device: BlockDevice, superblock: Superblock, slot: int
) -> tuple[SlotBlock, int] | None:
    """One slot block and its version; None if it is not valid."""
    address = superblock.geometry.slot_block(slot)
    block = await device.read(byte_offset(address), BLOCK_BYTES)
    try:
        return SlotBlock.decode(block, address, superblock.volume_id, slot)
    except BadBlock:
        return None


async def read_life(
    device: BlockDevice, superblock: Superblock
) -> tuple[tuple[Heartbeat, ...], tuple[JoinRequest, ...]]:
    """The heartbeat and join blocks that are valid. Read in small pieces, one after the other: what
    a host that hangs leaves unread must not keep the target from answering a reset."""
    geometry, volume_id = superblock.geometry, superblock.volume_id
    beats: list[Heartbeat] = []
    joins: list[JoinRequest] = []
    for area in (HEARTBEAT_AREA, JOIN_AREA):
        for first in range(0, geometry.slots, BLOCKS_PER_UNIT):
            slots = range(first, min(first + BLOCKS_PER_UNIT, geometry.slots))
            piece = await device.read(byte_offset(area + first), len(slots) * BLOCK_BYTES)
            for index, slot in enumerate(slots):
                block = memoryview(piece)[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
                if block[: len(MAGIC)] == _NEVER_WRITTEN:
                    continue
                try:
                    if area == HEARTBEAT_AREA:
                        beats.append(decode_heartbeat(block, area + slot, volume_id, slot))
                    else:
                        joins.append(_decode_join(bytes(block), area + slot, volume_id, slot))
                except BadBlock:
                    continue
    return tuple(beats), tuple(joins)


@lru_cache(MAX_SLOTS)
def _decode_join(block: bytes, address: int, volume_id: bytes, slot: int) -> JoinRequest:
    """Every node reads them twice a second, and most are of nodes that joined long ago."""
    return decode_join(block, address, volume_id, slot)


async def read_heartbeats(device: BlockDevice) -> bytes:
    """All heartbeat blocks as they are, to see whether one changes."""
    return bytes(await device.read(byte_offset(HEARTBEAT_AREA), MAX_SLOTS * BLOCK_BYTES))
