"""The superblock when both copies are destroyed: derived from what else names the volume.

Theory. A superblock says three things that matter. *Which volume*: every metadata block carries
the volume's id. *Of what shape*: the number of slots stands in the view; the LUN's size is known;
the size of a journal decides where the groups lie, and every group header says where it lies, which
group it is of and how many units it has. *What must be known to touch it*: the feature words, of
which there is no second record; FORMAT.md section 10 has what follows from that.

So the shape is searched for: for each journal size it is known where the header of group 0 would
be. A shape is believed when

- a view is valid, and nothing valid contradicts its volume id;
- the last group's header is there and says that the group ends where this LUN's size puts its end
  (else the LUN was resized, or the shape is wrong);
- at least half of all group headers are where they must be, and none says anything else;
- no second shape fulfils all this.

A guest that forges group headers inside its image cannot pass for half of the volume; but in a
volume of one group its forgery would be a second shape, and the rebuild is refused.

What cannot be derived gets the value that promises least: no probe results (so no UNMAP is sent),
a volatile write cache. The device id becomes that of the LUN it lies on: that this is no copy which
the array made, nobody can tell any more, and the words of the result say so.

Nothing is written here. Whoever derives a superblock goes on to claim the volume, which the view
and the target's registrations may still refuse, and writes it as its only member.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from csvfs.format import (
    BLOCK_BYTES,
    BLOCKS_PER_UNIT,
    JOURNAL_AREA,
    MIN_JOURNAL_BYTES,
    ROOT_INODE,
    UNIT_BYTES,
    VIEW_ADDRESSES,
    VOLUME_ID_OFFSET,
    BadBlock,
    BadGeometry,
    BlockType,
    Geometry,
    GroupHeader,
    Superblock,
    View,
    byte_offset,
    decode_view,
    verify,
)
from csvfs.journal.block_transfer import in_parallel
from csvfs.membership.fixed_area import SuperblocksDestroyed, read_view_copies
from csvfs.mkfs import FormatOptions, plan_superblock
from csvfs.namespace.inode import Inode
from redirector.block.device import BlockDevice, MediumError

LABEL: Final = "recovered"
_MAX_JOURNAL_UNITS: Final = (1 << 30) // UNIT_BYTES
"""Larger journals are not searched for; format makes them of at most 64 MiB unless told to."""


class CannotRebuild(SuperblocksDestroyed):
    """Both superblocks are destroyed, and what else there is does not tell beyond doubt."""

    def __init__(self, damage: str, reason: str) -> None:
        super().__init__(
            f"{damage}. The superblock cannot be rebuilt: {reason}. Nothing was changed: restore"
            " the LUN's first and last 64 KiB from a snapshot or backup of the array, or the LUN"
        )


@dataclass(frozen=True, slots=True)
class DerivedSuperblock:
    """A superblock that stands nowhere on the LUN."""

    superblock: Superblock
    words: str
    """What it was made of, and what of it is a guess."""


async def derive_superblock(device: BlockDevice, damage: str) -> DerivedSuperblock:
    """Derive it; ``damage`` says what is wrong with both copies.

    Raises `CannotRebuild`, and what the device raises, but for medium errors.
    """
    views = _valid_views(await read_view_copies(device))
    ids = sorted({volume_id for volume_id, _ in views})
    if not ids:
        raise CannotRebuild(
            damage,
            "both copies of the view are destroyed too; the number of slots stands nowhere else",
        )
    if len(ids) > 1:
        raise CannotRebuild(damage, f"one view is of volume {ids[0].hex()}, one of {ids[1].hex()}")
    volume_id, view = ids[0], max((view for _, view in views), key=lambda view: view.epoch)
    created_ns = await _created_ns(device, volume_id, damage)
    slots = len(view.slots)
    search = _Search(device, volume_id, slots)
    shapes = await search.run()
    if len(shapes) != 1:
        raise CannotRebuild(damage, _why_not(shapes, slots, search.resized))
    ((geometry, found),) = shapes.items()
    options = FormatOptions(
        label=LABEL, slots=slots, journal_bytes=geometry.journal_units * UNIT_BYTES
    )
    superblock = plan_superblock(
        device.identity, options, volume_id=volume_id, now_ns=created_ns or view.written_ns
    )
    return DerivedSuperblock(superblock, _words(superblock, found))


def _valid_views(copies: Iterable[bytearray]) -> list[tuple[bytes, View]]:
    found = []
    for copy, address in zip(copies, VIEW_ADDRESSES, strict=True):
        volume_id = bytes(copy[VOLUME_ID_OFFSET : VOLUME_ID_OFFSET + 16])
        try:
            found.append((volume_id, decode_view(copy, address, volume_id)))
        except BadBlock:
            continue
    return found


def _why_not(shapes: dict[Geometry, int], slots: int, resized: str) -> str:
    if not shapes:
        return resized or (
            f"for {slots} slots there is no journal size with which half of the group headers, the"
            " last one among them, lie where they must on a LUN of this size"
        )
    sizes = " and ".join(str(each.journal_units * UNIT_BYTES) for each in shapes)
    return f"group headers fit journals of {sizes} bytes: one of them is a forgery"


def _words(superblock: Superblock, found: int) -> str:
    geometry = superblock.geometry
    return (
        f"derived from the view and {found} of {geometry.group_count} group headers: volume"
        f" {superblock.volume_id.hex()}, {geometry.slots} slots, journals of"
        f" {geometry.journal_units * UNIT_BYTES >> 10} KiB. Not derivable: the label (now"
        f" {superblock.label!r}), what the probe of the target found (no UNMAP is sent from now"
        " on), that the write cache is stable (taken as volatile), features of a newer csvfs"
        " (taken as none), and the device it was formatted on (taken as this LUN,"
        f" {superblock.device_id.hex() or 'without an id'}: make sure that it is the original and"
        " not a copy that the array made)"
    )


async def _read_or_zeroes(device: BlockDevice, address: int) -> bytearray:
    try:
        return await device.read(byte_offset(address), BLOCK_BYTES)
    except MediumError:
        return bytearray(BLOCK_BYTES)


async def _created_ns(device: BlockDevice, volume_id: bytes, damage: str) -> int:
    """When format made the root inode; 0 if that is destroyed. Raises `CannotRebuild`."""
    block = await _read_or_zeroes(device, ROOT_INODE)
    try:
        verify(block, ROOT_INODE, BlockType.INODE, None, ROOT_INODE)
    except BadBlock:
        return 0
    found = bytes(block[VOLUME_ID_OFFSET : VOLUME_ID_OFFSET + 16])
    if found != volume_id:
        raise CannotRebuild(
            damage, f"the view is of volume {volume_id.hex()}, the root inode of {found.hex()}"
        )
    return Inode.unpack(block).btime_ns


# -- the shape -----------------------------------------------------------------------------------
class _Search:
    """Every shape that the group headers bear out, and by how many of them."""

    def __init__(self, device: BlockDevice, volume_id: bytes, slots: int) -> None:
        self._device = device
        self._volume_id = volume_id
        self._slots = slots
        self.resized = ""
        """Why a shape that fits all but its end was not taken."""
        self._size_units = device.identity.size_bytes // UNIT_BYTES

    async def run(self) -> dict[Geometry, int]:
        """What is found; raises what the device raises."""
        wanted = list(self._candidates())
        hopeful: list[Geometry] = []

        async def look(geometry: Geometry) -> None:
            # Two of them: one header may be damaged like any other block.
            for group in range(min(2, geometry.group_count)):
                if await self._header(geometry, group) is not None:
                    hopeful.append(geometry)
                    return

        await in_parallel(look, wanted)
        found = {}
        for geometry in sorted(hopeful, key=lambda each: each.journal_units):
            count = await self._count(geometry)
            if count:
                found[geometry] = count
        return found

    def _candidates(self) -> Iterable[Geometry]:
        first = MIN_JOURNAL_BYTES // UNIT_BYTES
        space = self._size_units - JOURNAL_AREA // BLOCKS_PER_UNIT
        for units in range(first, min(_MAX_JOURNAL_UNITS, space // self._slots) + 1):
            try:
                yield Geometry.of_units(self._size_units, self._slots, units)
            except BadGeometry:
                return

    async def _header(self, geometry: Geometry, group: int) -> GroupHeader | None:
        address = geometry.group_header(group)
        block = await _read_or_zeroes(self._device, address)
        try:
            return GroupHeader.decode(block, address, self._volume_id, group)
        except BadBlock:
            return None

    async def _count(self, geometry: Geometry) -> int:
        """How many headers bear the shape out; 0 if that is not enough."""
        headers: dict[int, GroupHeader] = {}

        async def look(group: int) -> None:
            header = await self._header(geometry, group)
            if header is not None:
                headers[group] = header

        await in_parallel(look, range(geometry.group_count))
        if 2 * len(headers) < geometry.group_count:
            return 0
        for group, header in sorted(headers.items()):
            if header.unit_count != geometry.group_units(group):
                self.resized = (
                    f"group {group} has {header.unit_count} units, on a LUN of"
                    f" {self._device.identity.size_bytes} bytes it would have"
                    f" {geometry.group_units(group)}: the LUN was resized. Give it its former size"
                )
                return 0
        return len(headers) if geometry.group_count - 1 in headers else 0
