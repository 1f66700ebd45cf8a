"""The member list when both its copies are destroyed: made anew of what the slots have left.

Theory. Who is a member stands in the view alone. But a node's slot block is stable before its
sessions exist, and its journal before it serves: so slot blocks, journal headers and the keys that
are registered show every slot that ever held something to replay, and mostly under which
incarnation. A view made of them *lists nobody*: each used slot needs replay, of the greatest
incarnation that was seen. Whoever was a member and is cut off finds, when it comes back and reads
the view, that it is evicted.

That holds only if no number comes again. So

- where a slot block cannot be read (zeroes included: a slot that was never used looks the same as
  one that was wiped), an incarnation may have been there that left no trace: the slot goes on
  `LEAP` beyond what was seen;
- the epoch goes on beyond any trace of an older one *and* beyond the clock's milliseconds: epochs
  grow by a few a mount, so no view was ever written under such a number.

`slot_traces` and `rebuilt_view` are pure; `read_traces` does the I/O. Who may do this at all, and
when, is decided in `csvfs.membership.decision`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from csvfs.format import (
    BLOCK_BYTES,
    HEADER_BYTES,
    HEARTBEAT_AREA,
    JOURNAL_FIELDS,
    JOURNAL_HEADER_BLOCKS,
    MAGIC,
    MAX_SLOTS,
    RECORD_FIELDS,
    RECORD_FIELDS_OFFSET,
    SLOT_AREA,
    VIEW_ADDRESSES,
    VIEW_FIELDS,
    VOLUME_ID_OFFSET,
    BadBlock,
    BlockType,
    Geometry,
    NoView,
    SlotBlock,
    SlotState,
    Superblock,
    View,
    ViewSlot,
    ViewSlotFlag,
    block_owner,
    block_type,
    block_version,
    byte_offset,
    certificate_fingerprint,
    decode_heartbeat,
    decode_view,
)
from csvfs.membership.fixed_area import read_view_copies
from redirector.block.device import BlockDevice
from redirector.block.keys import MAX_INCARNATION, PathKey

LEAP: Final = 1 << 16
"""How far a slot's incarnation goes on where one without a trace may have been. A slot must
have been mounted so often, all of it unseen, for a number to come again; 24 bits hold 255 leaps."""
_EPOCH_SHIFT: Final = 20
"""Nanoseconds to about milliseconds: as a journal that is given up chooses its sequence."""
_CREDIBLE_EPOCH: Final = 1 << 62
"""Beyond it a torn copy's epoch is noise: 2^62 ms are 146 million years."""
_JOURNAL_TRACE_BLOCKS: Final = JOURNAL_HEADER_BLOCKS + 1
"""Both headers and the ring's first block."""


class ViewsDestroyed(NoView):
    """Both copies are, and this is no repair; or one that cannot make a view."""

    def __init__(self, words: str, *, rebuildable: bool) -> None:
        super().__init__(words)
        self.rebuildable = rebuildable


@dataclass(frozen=True, slots=True)
class Rebuild:
    """Given to a claim that may make anew what nobody can read: view and superblock."""

    now_ns: int
    """CLOCK_REALTIME."""
    secret: bytes
    """Of a rebuilt view: the old one is lost with it."""
    preempt_keys: frozenset[int] = frozenset()
    """Keys whose owners the administrator says are gone for good. Only where no view can tell."""


@dataclass(frozen=True, slots=True)
class SlotTraces:
    """What one slot has left."""

    incarnation: int = 0
    """The greatest seen; 0: none."""
    block: SlotBlock | None = None
    """Its slot block, if that is valid."""
    journal_used: bool = False
    """Journal headers, or a record at the start of the ring."""

    @property
    def used(self) -> bool:
        return self.journal_used or self.block is not None

    @property
    def certain(self) -> bool:
        """No incarnation after this one can have done anything: it would have written the block."""
        return self.block is not None


@dataclass(frozen=True, slots=True)
class Traces:
    """What the fixed area and the journals have left of the member list."""

    slots: tuple[SlotTraces, ...]
    epoch: int = 0
    """The greatest seen."""
    blocks: Mapping[int, SlotBlock] = field(default_factory=dict)


# -- pure ----------------------------------------------------------------------------------------
def slot_traces(
    superblock: Superblock, slot: int, slot_block: memoryview, journal: memoryview
) -> SlotTraces:
    """``journal``: the first blocks of the slot's journal."""
    geometry, volume_id = superblock.geometry, superblock.volume_id
    found: SlotBlock | None = None
    try:
        found, _ = SlotBlock.decode(slot_block, geometry.slot_block(slot), volume_id, slot)
    except BadBlock:
        pass
    seen = [found.identity.incarnation] if found is not None else []
    used = False
    for index in range(len(journal) // BLOCK_BYTES):
        block = journal[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
        incarnation = _journal_incarnation(block, volume_id, slot)
        if incarnation is not None:
            used = True
            seen.append(incarnation)
    return SlotTraces(max(seen, default=0), found, used)


def _journal_incarnation(block: memoryview, volume_id: bytes, slot: int) -> int | None:
    """Of a block that was a journal's header or record of this slot, torn or not; else None.

    A number that a torn block made too great does no harm but to skip some; one that would use up
    the slot is not believed.
    """
    if bytes(block[:4]) != MAGIC or block_owner(block) != slot:
        return None
    if bytes(block[VOLUME_ID_OFFSET : VOLUME_ID_OFFSET + 16]) != volume_id:
        return None  # left by an earlier volume: format does not clear the journals
    if block_type(block) == BlockType.JOURNAL_HEADER:
        incarnation: int = JOURNAL_FIELDS.unpack_from(block, HEADER_BYTES)[0]
    elif block_type(block) == BlockType.JOURNAL_RECORD:
        incarnation = RECORD_FIELDS.unpack_from(block, RECORD_FIELDS_OFFSET)[0]
    else:
        return None
    return incarnation if incarnation < MAX_INCARNATION - 2 * LEAP else 0


def rebuilt_view(traces: Traces, keys: Sequence[int], rebuild: Rebuild) -> View:
    """A view with no member, in which every slot that was used needs replay."""
    of_keys = [path for key in keys if (path := PathKey.parse(key)) is not None]
    slots = []
    for number, trace in enumerate(traces.slots):
        seen = [path.incarnation for path in of_keys if path.slot == number]
        slots.append(_entry(trace, max(trace.incarnation, *seen, 0), rebuild.now_ns))
    epoch = max(traces.epoch + 1, rebuild.now_ns >> _EPOCH_SHIFT)
    return View(epoch, 0, tuple(slots), rebuild.secret, rebuild.now_ns, lock_epoch=epoch)


def _entry(trace: SlotTraces, seen: int, now_ns: int) -> ViewSlot:
    incarnation = seen if trace.certain else min(seen + LEAP, MAX_INCARNATION)
    entry = ViewSlot(incarnation, since_ns=now_ns)
    if trace.used:
        flags = ViewSlotFlag.JOURNAL_USED if trace.journal_used else ViewSlotFlag.NONE
        entry = replace(entry, state=SlotState.NEEDS_REPLAY, flags=flags)
    if trace.block is None:
        return entry
    who = trace.block.identity
    return replace(
        entry,
        fingerprint=certificate_fingerprint(who.certificate),
        node_name=who.node_name,
        machine_id=who.machine_id,
        boot_id=who.boot_id,
    )


def torn_epoch(copy: bytes | bytearray | memoryview, volume_id: bytes) -> int:
    """The epoch that a view's torn copy had, as far as it says so twice; else 0."""
    if bytes(copy[:4]) != MAGIC or bytes(copy[VOLUME_ID_OFFSET:][:16]) != volume_id:
        return 0
    epoch: int = VIEW_FIELDS.unpack_from(copy, HEADER_BYTES)[0]
    return epoch if epoch == block_version(copy) and epoch < _CREDIBLE_EPOCH else 0


def belongs_to_another(copies: Sequence[bytes | bytearray | memoryview], volume_id: bytes) -> str:
    """Words about a whole view of another volume; empty if there is none.

    Then nothing was destroyed: this superblock and these views were never one volume's.
    """
    for copy, address in zip(copies, VIEW_ADDRESSES, strict=True):
        found = bytes(copy[VOLUME_ID_OFFSET : VOLUME_ID_OFFSET + 16])
        try:
            decode_view(copy, address, found)
        except BadBlock:
            continue
        if found != volume_id:
            return f"the view at block {address} is one of the volume {found.hex()}"
    return ""


# -- I/O -----------------------------------------------------------------------------------------
async def read_traces(device: BlockDevice, superblock: Superblock) -> Traces:
    """Raises what the device raises."""
    geometry, volume_id = superblock.geometry, superblock.volume_id
    copies = await read_view_copies(device)
    epoch = max(torn_epoch(copy, volume_id) for copy in copies)
    area = memoryview(await device.read(byte_offset(SLOT_AREA), MAX_SLOTS * BLOCK_BYTES))
    beats = memoryview(await device.read(byte_offset(HEARTBEAT_AREA), MAX_SLOTS * BLOCK_BYTES))
    slots = []
    for slot in range(geometry.slots):
        at = slot * BLOCK_BYTES
        journal = await device.read(
            byte_offset(geometry.journal(slot)), _JOURNAL_TRACE_BLOCKS * BLOCK_BYTES
        )
        slots.append(
            slot_traces(superblock, slot, area[at : at + BLOCK_BYTES], memoryview(journal))
        )
        epoch = max(epoch, _heard_epoch(geometry, volume_id, slot, beats[at : at + BLOCK_BYTES]))
    blocks = {n: trace.block for n, trace in enumerate(slots) if trace.block is not None}
    return Traces(tuple(slots), epoch, blocks)


def _heard_epoch(geometry: Geometry, volume_id: bytes, slot: int, block: memoryview) -> int:
    """Of the view that a slot's last heartbeat acted on; 0: never heard."""
    try:
        return decode_heartbeat(block, geometry.heartbeat(slot), volume_id, slot).epoch
    except BadBlock:
        return 0
