"""What lies at known places: superblocks, views, slot blocks, journals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from secrets import token_bytes

from csvfs.check.finding import Damage, Finding, Repair
from csvfs.check.image import VolumeImage
from csvfs.check.workbench import Workbench
from csvfs.format import (
    BLOCK_BYTES,
    BLOCKS_PER_UNIT,
    SECRET_BYTES,
    SUPERBLOCK_ADDRESS,
    VIEW_ADDRESSES,
    BadBlock,
    BlockType,
    Geometry,
    Identity,
    NoView,
    SlotBlock,
    Superblock,
    View,
    ViewSlot,
    decode_view,
    encode_view,
    newest_view,
    view_address,
)
from csvfs.journal.record import JournalPlace
from csvfs.journal.replay import (
    JournalDamaged,
    home_is_older,
    initialise_journal,
    plan_replay,
    replay,
)
from csvfs.membership.view_rebuild import Rebuild, read_traces, rebuilt_view
from redirector.block.device import BlockDevice

Report = Callable[[Finding], None]


async def check_superblocks(image: VolumeImage, superblock: Superblock, report: Report) -> None:
    """Hold both copies against the superblock that is believed."""
    places = {
        SUPERBLOCK_ADDRESS: (Damage.SUPERBLOCK, "block 0"),
        superblock.geometry.backup_superblock: (
            Damage.BACKUP_SUPERBLOCK,
            f"block {superblock.geometry.backup_superblock}",
        ),
    }
    blocks = await image.read(places)
    for address, (damage, where) in places.items():
        try:
            found = Superblock.decode(blocks[address], address, superblock.volume_id)
            if found != superblock:
                raise BadBlock(address, BlockType.SUPERBLOCK, "the two copies differ")
        except BadBlock as error:
            repair = partial(Workbench.put_block, address=address, block=superblock.encode(address))
            report(Finding(damage, where, error.reason, repair))


async def read_views(image: VolumeImage) -> list[bytearray]:
    """The two copies of the view, 64 KiB each."""
    copies = []
    for address in VIEW_ADDRESSES:
        blocks = await image.read(range(address, address + BLOCKS_PER_UNIT))
        copies.append(bytearray(b"".join(blocks[at] for at in sorted(blocks))))
    return copies


async def check_views(
    image: VolumeImage,
    device: BlockDevice,
    superblock: Superblock,
    now_ns: int,
    report: Report,
) -> View | None:
    """The view that is believed; None, and a finding, when both copies are bad."""
    copies = await read_views(image)
    try:
        view = newest_view(copies, image.volume_id)
    except NoView as error:
        view = await _view_of_traces(device, superblock, now_ns)
        report(Finding(Damage.VIEW, "view", str(error), partial(_put_view, view=view)))
        return None
    for copy, address in zip(copies, VIEW_ADDRESSES, strict=True):
        try:
            decode_view(copy, address, image.volume_id)
        except BadBlock as error:
            report(
                Finding(
                    Damage.VIEW_COPY,
                    f"view at block {address}",
                    error.reason,
                    partial(_put_next_view, view=view),
                )
            )
    return view


async def _view_of_traces(device: BlockDevice, superblock: Superblock, now_ns: int) -> View:
    """The caller has the volume for itself, so whatever keys are registered mean nothing."""
    rebuild = Rebuild(now_ns, token_bytes(SECRET_BYTES))
    return rebuilt_view(await read_traces(device, superblock), (), rebuild)


async def _put_next_view(bench: Workbench, *, view: View) -> None:
    """Epochs never repeat: the damaged copy is the one that the next epoch goes to."""
    following = view.next(view.holder_key, {}, bench.now_ns)
    await _put_view(bench, view=following)


async def _put_view(bench: Workbench, *, view: View) -> None:
    data = encode_view(view, bench.image.volume_id)
    for index in range(BLOCKS_PER_UNIT):
        at = index * BLOCK_BYTES
        bench.image.put_sealed(view_address(view.epoch) + index, data[at : at + BLOCK_BYTES])


async def check_slot_blocks(
    image: VolumeImage, geometry: Geometry, view: View, slots: list[int], report: Report
) -> None:
    """Slots that were used have a slot block that can be read."""
    blocks = await image.read(geometry.slot_block(slot) for slot in slots)
    for slot in slots:
        address = geometry.slot_block(slot)
        try:
            SlotBlock.decode(blocks[address], address, image.volume_id, slot)
        except BadBlock as error:
            repair = partial(_new_slot_block, address=address, slot=slot, entry=view.slots[slot])
            report(Finding(Damage.SLOT_BLOCK, f"slot {slot}", error.reason, repair))


async def _new_slot_block(bench: Workbench, *, address: int, slot: int, entry: ViewSlot) -> None:
    """What the view knows of the node; the sessions that it had cannot be known any more."""
    identity = Identity(
        entry.incarnation, 0, 0, entry.since_ns, bytes(16), bytes(16), entry.node_name
    )
    block = SlotBlock(slot, identity).encode(bench.image.volume_id, address, 1)
    bench.image.put(address, block)


async def check_journals(
    image: VolumeImage,
    device: BlockDevice,
    geometry: Geometry,
    incarnations: dict[int, int],
    report: Report,
    *,
    repair: bool,
) -> int:
    """Take in what the journals of these slots (slot: incarnation) hold.

    With ``repair`` on the LUN, else in the overlay only. Returns the number of records.
    """
    records = 0
    for slot in sorted(incarnations):
        place = JournalPlace(image.volume_id, slot, geometry.journal(slot), geometry.journal_blocks)
        try:
            if repair:
                records += (await replay(device, place, incarnations[slot])).records
            else:
                records += await _overlay(image, device, place)
        except (BadBlock, JournalDamaged) as error:
            mend: Repair = partial(
                _new_journal, device=device, place=place, incarnation=incarnations[slot]
            )
            report(Finding(Damage.JOURNAL, f"journal of slot {slot}", str(error), mend))
    return records


async def _overlay(image: VolumeImage, device: BlockDevice, place: JournalPlace) -> int:
    plan = await plan_replay(device, place)
    homes = await image.read(plan.blocks)
    for address, planned in plan.blocks.items():
        version = int.from_bytes(planned.data[40:48], "little")
        home = bytes(homes[address])
        if planned.fresh or home_is_older(home, address, image.volume_id, version):
            image.put_sealed(address, planned.data)
    return plan.records


async def _new_journal(
    bench: Workbench, *, device: BlockDevice, place: JournalPlace, incarnation: int
) -> None:
    """An empty journal whose sequence is beyond any that it can have had."""
    await initialise_journal(device, place, incarnation, first_sequence=bench.now_ns >> 20)
