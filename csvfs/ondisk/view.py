"""The view: who is a member, in two copies of 64 KiB with one checksum each.

Invariants:
- every view written takes the next epoch; the block's version is the epoch;
- the view of epoch e lies in copy e % 2, so a torn write leaves the view before it whole;
- the valid copy with the higher epoch is the view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum, IntFlag
from struct import Struct
from typing import Final

from csvfs.ondisk.block import (
    HEADER_BYTES,
    MAX_SLOTS,
    BadBlock,
    BlockType,
    new_block,
    pack_text,
    seal,
    unpack_enum,
    unpack_text,
    verify,
)
from csvfs.ondisk.geometry import VIEW_ADDRESSES, VIEW_BYTES

VIEW_FIELDS: Final = Struct("<QQqHH4x32s")
"""epoch, holder key, written_ns, slots, 0, heartbeat secret."""
VIEW_SLOTS_OFFSET: Final = 512
VIEW_SLOT: Final = Struct("<IBBHQq32s64s16s16s")
"""incarnation, state, replay by, flags, 0, since_ns, certificate fingerprint, node name,
machine id, boot id."""
VIEW_SLOT_BYTES: Final = 512
NODE_NAME_BYTES: Final = 64
FINGERPRINT_BYTES: Final = 32
SECRET_BYTES: Final = 32
NOBODY: Final = 255
"""``replay_by`` while no node has been told to replay."""

assert HEADER_BYTES + VIEW_FIELDS.size <= VIEW_SLOTS_OFFSET
assert VIEW_SLOT.size <= VIEW_SLOT_BYTES
assert VIEW_SLOTS_OFFSET + MAX_SLOTS * VIEW_SLOT_BYTES <= VIEW_BYTES


class SlotState(IntEnum):
    FREE = 0
    """Nobody; its journal holds nothing live."""
    JOINING = 1
    """Its node may do I/O, and serves nothing yet: the slot's journal may still hold what the
    incarnation before it left."""
    ACTIVE = 2
    NEEDS_REPLAY = 3
    """Its node is gone and fenced; its journal is still to be replayed."""


class ViewSlotFlag(IntFlag):
    NONE = 0
    JOURNAL_USED = 1
    """Journal, orphan and reclaim root of the slot were written: from the first ACTIVE on."""


@dataclass(frozen=True, slots=True)
class ViewSlot:
    """One slot as the view has it."""

    incarnation: int = 0
    """Of the node that is, or was last, in the slot; never reused."""
    state: SlotState = SlotState.FREE
    replay_by: int = NOBODY
    """NEEDS_REPLAY: the slot whose node replays."""
    fingerprint: bytes = bytes(FINGERPRINT_BYTES)
    """SHA-256 of the node's certificate."""
    node_name: str = ""
    since_ns: int = 0
    """CLOCK_REALTIME of the last change of this entry; for people only."""
    flags: ViewSlotFlag = ViewSlotFlag.NONE
    machine_id: bytes = bytes(16)
    boot_id: bytes = bytes(16)
    """With the node's name, what proves that an incarnation was this host's and is dead. Here and
    not only in the slot block, because that has one copy and a write of it may be torn."""


@dataclass(frozen=True, slots=True)
class View:
    """The member list of one epoch."""

    epoch: int
    holder_key: int
    """Key of the node that holds the reservation; under an empty view the parked key; 0: none."""
    slots: tuple[ViewSlot, ...]
    secret: bytes = field(default=bytes(SECRET_BYTES), repr=False)
    written_ns: int = 0

    @classmethod
    def empty(
        cls, slots: int, epoch: int, secret: bytes, written_ns: int = 0, *, holder_key: int = 0
    ) -> View:
        """A view with nobody in it and no slot ever used, as format writes it."""
        return cls(epoch, holder_key, (ViewSlot(),) * slots, secret, written_ns)

    @property
    def address(self) -> int:
        """Where this epoch's view lies."""
        return VIEW_ADDRESSES[self.epoch % 2]

    @property
    def members(self) -> tuple[int, ...]:
        """Slots that are not free: a view with none is *empty*."""
        return tuple(n for n, slot in enumerate(self.slots) if slot.state != SlotState.FREE)

    def lists(self, slot: int, incarnation: int) -> bool:
        """True if that incarnation may do I/O: joining or active."""
        if not 0 <= slot < len(self.slots):
            return False
        entry = self.slots[slot]
        return entry.incarnation == incarnation and entry.state in (
            SlotState.JOINING,
            SlotState.ACTIVE,
        )

    def with_slot(self, number: int, slot: ViewSlot) -> View:
        """The same view with one entry replaced; the epoch is the caller's to raise."""
        return replace(self, slots=(*self.slots[:number], slot, *self.slots[number + 1 :]))

    def encode(self, volume_id: bytes) -> bytearray:
        """The sealed 64 KiB, to be written at `address`."""
        if not 0 < len(self.slots) <= MAX_SLOTS or self.epoch < 1:
            raise ValueError(f"a view of {len(self.slots)} slots and epoch {self.epoch}")
        block = new_block(BlockType.VIEW, self.address, 0, volume_id, size_bytes=VIEW_BYTES)
        VIEW_FIELDS.pack_into(
            block,
            HEADER_BYTES,
            self.epoch,
            self.holder_key,
            self.written_ns,
            len(self.slots),
            0,
            self.secret,
        )
        for number, slot in enumerate(self.slots):
            VIEW_SLOT.pack_into(
                block,
                VIEW_SLOTS_OFFSET + number * VIEW_SLOT_BYTES,
                slot.incarnation,
                slot.state,
                slot.replay_by,
                slot.flags,
                0,
                slot.since_ns,
                slot.fingerprint,
                pack_text(slot.node_name, NODE_NAME_BYTES, "node name"),
                slot.machine_id,
                slot.boot_id,
            )
        seal(block, self.epoch)
        return block

    @classmethod
    def decode(cls, block: bytes | bytearray | memoryview, address: int, volume_id: bytes) -> View:
        """Verify and read one copy. Raises `BadBlock`."""
        kind = BlockType.VIEW
        if len(block) != VIEW_BYTES:
            raise BadBlock(address, kind, f"it has {len(block)} bytes")
        version = verify(block, address, kind, volume_id, 0)
        epoch, holder_key, written_ns, count, _, secret = VIEW_FIELDS.unpack_from(
            block, HEADER_BYTES
        )
        if version != epoch or VIEW_ADDRESSES[epoch % 2] != address:
            raise BadBlock(address, kind, f"epoch {epoch}, version {version} in this place")
        if not 0 < count <= MAX_SLOTS:
            raise BadBlock(address, kind, f"{count} slots")
        slots = tuple(
            _decode_slot(block, VIEW_SLOTS_OFFSET + number * VIEW_SLOT_BYTES, address)
            for number in range(count)
        )
        return cls(epoch, holder_key, slots, secret, written_ns)


def _decode_slot(block: bytes | bytearray | memoryview, at: int, address: int) -> ViewSlot:
    kind = BlockType.VIEW
    (
        incarnation,
        state,
        replay_by,
        flags,
        _,
        since_ns,
        fingerprint,
        name,
        machine_id,
        boot_id,
    ) = VIEW_SLOT.unpack_from(block, at)
    return ViewSlot(
        incarnation,
        unpack_enum(SlotState, state, address, kind, "slot state"),
        replay_by,
        fingerprint,
        unpack_text(name, address, kind, "node name"),
        since_ns,
        ViewSlotFlag(flags),
        machine_id,
        boot_id,
    )


class NoView(Exception):
    """Neither copy of the view can be believed; says what is wrong with each."""


def newest_view(copies: Sequence[bytes | bytearray | memoryview], volume_id: bytes) -> View:
    """The valid copy with the higher epoch; ``copies`` as read from `VIEW_ADDRESSES`, in order.

    Raises `NoView` when both are bad.
    """
    best: View | None = None
    errors: list[str] = []
    for block, address in zip(copies, VIEW_ADDRESSES, strict=True):
        try:
            view = View.decode(block, address, volume_id)
        except BadBlock as error:
            errors.append(str(error))
            continue
        if best is None or view.epoch > best.epoch:
            best = view
    if best is None:
        raise NoView("; ".join(errors))
    return best
