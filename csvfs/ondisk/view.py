"""The view on the LUN: two copies of 64 KiB with one checksum each.

What a view is, `lockmgr.cluster.view` says; here is how it is written down.

Invariants:
- every view written takes the next epoch; the block's version is the epoch;
- the view of epoch e lies in copy e % 2, so a torn write leaves the view before it whole;
- the valid copy with the higher epoch is the view.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from lockmgr.cluster.view import (
    FINGERPRINT_BYTES,
    NOBODY,
    SECRET_BYTES,
    SlotState,
    View,
    ViewSlot,
    ViewSlotFlag,
)

__all__ = [
    "ADDRESS_BYTES",
    "FINGERPRINT_BYTES",
    "MAX_ADDRESSES",
    "NOBODY",
    "NODE_NAME_BYTES",
    "SECRET_BYTES",
    "VIEW_FIELDS",
    "VIEW_SLOT",
    "VIEW_SLOTS_OFFSET",
    "VIEW_SLOT_ADDRESSES_OFFSET",
    "VIEW_SLOT_BYTES",
    "NoView",
    "SlotState",
    "View",
    "ViewSlot",
    "ViewSlotFlag",
    "decode_view",
    "encode_view",
    "newest_view",
    "pack_addresses",
    "unpack_addresses",
    "view_address",
]

Block = bytes | bytearray | memoryview

VIEW_FIELDS: Final = Struct("<QQqHH4x32sQ")
"""epoch, holder key, written_ns, slots, 0, heartbeat secret, lock epoch."""
VIEW_SLOTS_OFFSET: Final = 512
VIEW_SLOT: Final = Struct("<IBBHQq32s64s16s16s")
"""incarnation, state, replay by, flags, 0, since_ns, certificate fingerprint, node name,
machine id, boot id."""
VIEW_SLOT_ADDRESSES_OFFSET: Final = VIEW_SLOT.size
VIEW_SLOT_BYTES: Final = 512
NODE_NAME_BYTES: Final = 64
ADDRESS_BYTES: Final = 64
MAX_ADDRESSES: Final = 5
"""Of one node: as many as a slot's entry has room for."""

assert HEADER_BYTES + VIEW_FIELDS.size <= VIEW_SLOTS_OFFSET
assert VIEW_SLOT_ADDRESSES_OFFSET + MAX_ADDRESSES * ADDRESS_BYTES <= VIEW_SLOT_BYTES
assert VIEW_SLOTS_OFFSET + MAX_SLOTS * VIEW_SLOT_BYTES <= VIEW_BYTES


def view_address(epoch: int) -> int:
    """Where the view of that epoch lies."""
    return VIEW_ADDRESSES[epoch % 2]


def encode_view(view: View, volume_id: bytes) -> bytearray:
    """The sealed 64 KiB, to be written at `view_address`. Raises ValueError if it does not fit."""
    if not 0 < len(view.slots) <= MAX_SLOTS or view.epoch < 1:
        raise ValueError(f"a view of {len(view.slots)} slots and epoch {view.epoch}")
    address = view_address(view.epoch)
    block = new_block(BlockType.VIEW, address, 0, volume_id, size_bytes=VIEW_BYTES)
    VIEW_FIELDS.pack_into(
        block,
        HEADER_BYTES,
        view.epoch,
        view.holder_key,
        view.written_ns,
        len(view.slots),
        0,
        view.secret,
        view.lock_epoch,
    )
    for number, slot in enumerate(view.slots):
        at = VIEW_SLOTS_OFFSET + number * VIEW_SLOT_BYTES
        VIEW_SLOT.pack_into(
            block,
            at,
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
        pack_addresses(block, at + VIEW_SLOT_ADDRESSES_OFFSET, slot.addresses)
    seal(block, view.epoch)
    return block


def decode_view(block: Block, address: int, volume_id: bytes) -> View:
    """Verify and read one copy. Raises `BadBlock`."""
    kind = BlockType.VIEW
    if len(block) != VIEW_BYTES:
        raise BadBlock(address, kind, f"it has {len(block)} bytes")
    version = verify(block, address, kind, volume_id, 0)
    epoch, holder_key, written_ns, count, _, secret, lock_epoch = VIEW_FIELDS.unpack_from(
        block, HEADER_BYTES
    )
    if version != epoch or view_address(epoch) != address:
        raise BadBlock(address, kind, f"epoch {epoch}, version {version} in this place")
    if not 0 < count <= MAX_SLOTS:
        raise BadBlock(address, kind, f"{count} slots")
    if lock_epoch > epoch:
        raise BadBlock(address, kind, f"lock epoch {lock_epoch} in epoch {epoch}")
    slots = tuple(
        _decode_slot(block, VIEW_SLOTS_OFFSET + number * VIEW_SLOT_BYTES, address)
        for number in range(count)
    )
    return View(epoch, holder_key, slots, secret, written_ns, lock_epoch)


def _decode_slot(block: Block, at: int, address: int) -> ViewSlot:
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
        unpack_addresses(block, at + VIEW_SLOT_ADDRESSES_OFFSET, address, kind),
    )


# -- where a node listens: in views, slot blocks and join blocks ----------------------------------
def pack_addresses(block: bytearray, at: int, addresses: Sequence[str]) -> None:
    """Raises ValueError when they do not fit."""
    if len(addresses) > MAX_ADDRESSES:
        raise ValueError(f"{len(addresses)} addresses: at most {MAX_ADDRESSES}")
    for address in addresses:
        if not address:
            raise ValueError("an empty address")
        data = pack_text(address, ADDRESS_BYTES, "address")
        block[at : at + len(data)] = data
        at += ADDRESS_BYTES


def unpack_addresses(block: Block, at: int, address: int, kind: BlockType) -> tuple[str, ...]:
    """Read them from a verified block. Raises `BadBlock`."""
    places = range(at, at + MAX_ADDRESSES * ADDRESS_BYTES, ADDRESS_BYTES)
    fields = (bytes(block[place : place + ADDRESS_BYTES]) for place in places)
    texts = (unpack_text(field, address, kind, "address") for field in fields)
    return tuple(text for text in texts if text)


class NoView(Exception):
    """Neither copy of the view can be believed; says what is wrong with each."""


def newest_view(copies: Sequence[Block], volume_id: bytes) -> View:
    """The valid copy with the higher epoch; ``copies`` as read from `VIEW_ADDRESSES`, in order.

    Raises `NoView` when both are bad.
    """
    best: View | None = None
    errors: list[str] = []
    for block, address in zip(copies, VIEW_ADDRESSES, strict=True):
        try:
            view = decode_view(block, address, volume_id)
        except BadBlock as error:
            errors.append(str(error))
            continue
        if best is None or view.epoch > best.epoch:
            best = view
    if best is None:
        raise NoView("; ".join(errors))
    return best
