"""Make a copy of a LUN a volume of its own: another volume id, the device id of the LUN it lies on.

Theory. An array copies a LUN with everything on it. Mounting such a copy is refused, because two
volumes of one id could not be told apart. A resignature replays what the copy's journals hold (the
copy of a volume that is in use looks like one whose hosts all lost power at once), and writes the
new id into every block. While that is under way the superblock says so, by an incompat bit that
makes every csvfs refuse the volume, and names both ids; a block is then valid under either.

    1  replay all journals, still under the former id; survey all maps; flush
    2  superblocks: new id, former id, this LUN's device id, the bit; backup first, each FUA
    3  root inode; flush
    4  lists, metadata in use, maps, group headers (`csvfs.resignature_sweep`)
    5  slot blocks without sessions; heartbeat and join blocks zeroed; empty journals; flush
    6  views: nobody is a member, a secret of its own; both copies, each FUA
    7  superblocks without the bit; backup first, each FUA

Cut off before 2, the LUN is a copy as before. Cut off later, the next run goes on under the ids
that the superblock names; each step may be done again. From 3 to 6 the root inode and the views
are of two volumes, so that even with both superblocks destroyed nothing is derived from them.

A copy of a LUN on which a resignature was cut off is finished first as what it was to become, and
then is a copy of that; so no two LUNs ever get one id.

What the original's hosts left in slot blocks and views is not used: they are no members of the
copy. To reinstate the sessions that stand there would close those of the original, where both lie
on one target. What waits on orphan and reclaim lists is left to the first mount.

Concurrency: the caller's task; nobody else writes to the LUN (`csvfs.resignature_claim`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random, SystemRandom
from typing import Final

from csvfs.format import (
    BLOCK_BYTES,
    LABEL_BYTES,
    MAX_SLOTS,
    ORPHAN_AREA,
    RESIGNATURE,
    SECRET_BYTES,
    SLOT_AREA,
    SUPERBLOCK_ADDRESS,
    BadBlock,
    Identity,
    NoView,
    ProbeFlag,
    SlotBlock,
    SlotState,
    Superblock,
    View,
    ViewSlot,
    ViewSlotFlag,
    WriteCache,
    byte_offset,
    encode_view,
    newest_view,
    view_address,
)
from csvfs.journal.block_transfer import write_extent
from csvfs.journal.record import JournalPlace
from csvfs.journal.replay import JournalDamaged, initialise_journal, read_header
from csvfs.membership.fixed_area import read_slot_blocks, read_view_copies
from csvfs.membership.slot_start import journal_place, replay_slot
from csvfs.mkfs import FormatOptions, plan_superblock, stored_device_id
from csvfs.resignature_sweep import Ids, Sweep
from redirector.block.device import BlockIO, LunIdentity

_SYSTEM_RANDOM: Final = SystemRandom()
_NO_ID: Final = bytes(16)
_SLOT_BLOCKS: Final = ORPHAN_AREA - SLOT_AREA
"""Slot, heartbeat and join blocks."""


class CopyDamaged(Exception):
    """Parts of the copied volume cannot be read; it stays what it was."""

    def __init__(self, error: Exception) -> None:
        super().__init__(
            f"the copied volume is damaged: {error}. Mend the original with `csvctl check --repair`"
            " and copy it again, or take another copy"
        )


@dataclass(frozen=True, slots=True)
class Wish:
    """What the new volume is to be, besides what the copy is."""

    label: str | None = None
    """None: the copy's own. At most 64 bytes of UTF-8."""
    probe: ProbeFlag = ProbeFlag.NONE
    write_cache: WriteCache = WriteCache.VOLATILE
    holder_key: int = 0
    """Under which the caller holds the reservation; the empty view names it as parked."""


@dataclass(slots=True)
class Resigned:
    """What was done."""

    superblock: Superblock
    """As it is now."""
    former_volume_id: bytes
    resumed: bool = False
    """An earlier run had been cut off."""
    replayed_records: int = 0
    renamed_blocks: int = 0


def is_copy(superblock: Superblock, identity: LunIdentity) -> bool:
    """Whether it lies on another device than it was made for, or was on its way to that."""
    unfinished = superblock.resignature_under_way
    return unfinished or superblock.device_id != stored_device_id(identity)


async def resign_volume(
    device: BlockIO,
    superblock: Superblock,
    wish: Wish,
    *,
    now_ns: int,
    rng: Random = _SYSTEM_RANDOM,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Resigned:
    """Make the copy that ``superblock`` (as read) describes a volume of its own; stable on return.

    ``rng`` draws volume id and secret; ``progress`` is told (metadata units done, in all). Raises
    `CopyDamaged`, ValueError for a bad label, `BlockError`; done again it goes on.
    """
    assert is_copy(superblock, device.identity)
    result = Resigned(superblock, superblock.former_volume_id)
    try:
        if superblock.resignature_under_way:
            result.resumed = True
            await _Pass(device, superblock, wish, now_ns, rng, progress, result).finish()
        if is_copy(result.superblock, device.identity):
            result.former_volume_id = result.superblock.volume_id
            await _Pass(device, result.superblock, wish, now_ns, rng, progress, result).begin()
    except (BadBlock, NoView, JournalDamaged) as error:
        raise CopyDamaged(error) from error
    return result


@dataclass(slots=True)
class _Pass:
    """From one volume id to the next."""

    device: BlockIO
    superblock: Superblock
    wish: Wish
    now_ns: int
    rng: Random
    progress: Callable[[int, int], None]
    result: Resigned

    async def begin(self) -> None:
        """All steps, on a copy that nothing was done to."""
        former = self.superblock
        planned = self._planned(former)
        view = await self._read_view(former.volume_id)
        for slot, entry in enumerate(view.slots):
            if entry.state is not SlotState.FREE and entry.flags & ViewSlotFlag.JOURNAL_USED:
                done = await replay_slot(self.device, former, slot, entry.incarnation)
                self.result.replayed_records += done.records
        await self.device.flush()
        self.superblock = replace(
            planned,
            volume_id=self.rng.randbytes(16),
            former_volume_id=former.volume_id,
            incompat=former.incompat | RESIGNATURE,
        )
        await self.finish()

    async def finish(self) -> None:
        """Steps 2 to 7, whichever of them were done before."""
        if self.superblock.device_id == stored_device_id(self.device.identity):
            self.superblock = self._planned(self.superblock)
        superblock = self.superblock
        ids = Ids(superblock.former_volume_id, superblock.volume_id)
        sweep = Sweep(self.device, superblock.geometry, ids, self.progress)
        await sweep.survey()
        view = await self._read_view(ids.new, ids.former)
        incarnations = await self._incarnations(view, ids)
        await self._write_superblocks()
        await sweep.rename_root()
        await sweep.rename_rest()
        await self._write_slots(incarnations)
        await self.device.flush()
        await self._write_views(view, incarnations)
        self.superblock = replace(
            superblock,
            former_volume_id=_NO_ID,
            incompat=superblock.incompat & ~RESIGNATURE,
        )
        await self._write_superblocks()
        self.result.superblock = self.superblock
        self.result.renamed_blocks += sweep.renamed

    # -- superblocks -------------------------------------------------------------------------
    def _planned(self, superblock: Superblock) -> Superblock:
        """What is said of the LUN and its target is said of this one. Raises ValueError."""
        label = superblock.label if self.wish.label is None else self.wish.label
        if len(label.encode()) > LABEL_BYTES or not label.isprintable():
            raise ValueError(f"the label {label!r} is longer than 64 bytes, or cannot be shown")
        here = plan_superblock(
            self.device.identity, FormatOptions(slots=1), volume_id=_NO_ID, now_ns=0
        )
        return replace(
            superblock,
            label=label,
            device_id=here.device_id,
            vendor=here.vendor,
            product=here.product,
            serial=here.serial,
            probe=self.wish.probe,
            write_cache=self.wish.write_cache,
        )

    async def _write_superblocks(self) -> None:
        """The backup first: who finds the first one as it was does all of this again."""
        for address in (self.superblock.geometry.backup_superblock, SUPERBLOCK_ADDRESS):
            block = self.superblock.encode(address)
            await self.device.write(byte_offset(address), block, fua=True)

    # -- views and slots ---------------------------------------------------------------------
    async def _read_view(self, *volume_ids: bytes) -> View:
        """The newest under any of these ids. Raises `NoView`."""
        copies = await read_view_copies(self.device)
        found = []
        for volume_id in volume_ids:
            try:
                found.append(newest_view(copies, volume_id))
            except NoView as error:
                failure = error
        if not found:
            raise failure
        return max(found, key=lambda view: view.epoch)

    async def _incarnations(self, view: View, ids: Ids) -> dict[int, int]:
        """Of the slots whose journal is in use: the greatest that the original ever gave."""
        known = {n: entry.incarnation for n, entry in enumerate(view.slots)}
        for volume_id in (ids.former, ids.new):
            superblock = replace(self.superblock, volume_id=volume_id)
            for slot, block in (await read_slot_blocks(self.device, superblock)).items():
                known[slot] = max(known[slot], block.identity.incarnation)
        used = ViewSlotFlag.JOURNAL_USED
        return {slot: known[slot] for slot, e in enumerate(view.slots) if e.flags & used}

    async def _write_slots(self, incarnations: dict[int, int]) -> None:
        """As if a node had been there, and had left without a trace of itself."""
        superblock, geometry = self.superblock, self.superblock.geometry
        blocks = bytearray(_SLOT_BLOCKS * BLOCK_BYTES)
        assert _SLOT_BLOCKS == 3 * MAX_SLOTS
        for slot, incarnation in incarnations.items():
            address = geometry.slot_block(slot)
            identity = Identity(incarnation, 0, 0, self.now_ns, bytes(16), bytes(16), "")
            block = SlotBlock(slot, identity).encode(superblock.volume_id, address, incarnation)
            at = (address - SLOT_AREA) * BLOCK_BYTES
            blocks[at : at + BLOCK_BYTES] = block
        await write_extent(self.device, SLOT_AREA, blocks)
        for slot, incarnation in incarnations.items():
            place = journal_place(superblock, slot)
            await initialise_journal(
                self.device,
                place,
                incarnation,
                first_sequence=await self._next_sequence(place),
            )

    async def _next_sequence(self, place: JournalPlace) -> int:
        """Beyond all records in the ring: they are of the former id, but where the one that is next
        should be they would pass for it, damaged.

        The headers that are left may be older ones, if this step was cut off before; from the tail
        of any of them on there are never more records than the ring has blocks.
        """
        tails = []
        for volume_id in (self.superblock.former_volume_id, place.volume_id):
            try:
                header, _ = await read_header(self.device, replace(place, volume_id=volume_id))
            except BadBlock:
                continue
            tails.append(header.tail_sequence + place.ring_blocks)
        return max(tails, default=self.now_ns >> 20)  # as `csvfs.check` gives a journal up

    async def _write_views(self, view: View, incarnations: dict[int, int]) -> None:
        """One in each copy, the older copy first: torn, it leaves the other."""
        volume_id = self.superblock.volume_id
        slots = tuple(
            ViewSlot(incarnations[slot], flags=ViewSlotFlag.JOURNAL_USED)
            if slot in incarnations
            else ViewSlot()
            for slot in range(len(view.slots))
        )
        secret = self.rng.randbytes(SECRET_BYTES)
        for epoch in (view.epoch + 1, view.epoch + 2):
            following = View(
                epoch, self.wish.holder_key, slots, secret, self.now_ns, lock_epoch=view.epoch + 1
            )
            block = encode_view(following, volume_id)
            await self.device.write(byte_offset(view_address(epoch)), block, fua=True)
