"""Slot, heartbeat and join blocks: one of each a slot.

A slot block is written by the slot's node and read by whoever must reach or fence it: it is on
the LUN *before* the sessions it names exist. A heartbeat block changes as long as its node
lives. In a join block a newcomer asks to become a member (used from many hosts on).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from struct import Struct
from typing import Final

from csvfs.ondisk.block import (
    BLOCK_BYTES,
    HEADER_BYTES,
    BadBlock,
    BlockType,
    new_block,
    pack_text,
    seal,
    unpack_enum,
    unpack_text,
    verify,
)
from csvfs.ondisk.view import NODE_NAME_BYTES

INITIATOR_NAME_BYTES: Final = 224
"""RFC 7143 4.2.7.1: at most 223 bytes."""
PORTAL_BYTES: Final = 72
ADDRESS_BYTES: Final = 64
MAX_ADDRESSES: Final = 6
MAX_SESSIONS: Final = 7
MAX_CERTIFICATE_BYTES: Final = 1152

IDENTITY_FIELDS: Final = Struct("<IIQq16s16s64s")
"""incarnation, generation, key, since_ns, machine id, boot id, node name; in slot and join blocks
at 64."""
ADDRESSES_OFFSET: Final = 256
CERTIFICATE_OFFSET: Final = ADDRESSES_OFFSET + MAX_ADDRESSES * ADDRESS_BYTES
CERTIFICATE_LENGTH: Final = Struct("<H")
CERTIFICATE_DATA_OFFSET: Final = CERTIFICATE_OFFSET + 16
SESSIONS_OFFSET: Final = 1856
SESSION: Final = Struct("<BBHIQQ72s224s")
"""kind, carrier, generation, portal group tag, ISID, key, portal, InitiatorName."""

assert HEADER_BYTES + IDENTITY_FIELDS.size <= ADDRESSES_OFFSET
assert CERTIFICATE_DATA_OFFSET + MAX_CERTIFICATE_BYTES <= SESSIONS_OFFSET
assert SESSION.size == 320
assert SESSIONS_OFFSET + MAX_SESSIONS * SESSION.size == BLOCK_BYTES

HEARTBEAT_FIELDS: Final = Struct("<IIQQqQ")
"""incarnation, flags, sequence, epoch, sent_ns (CLOCK_BOOTTIME), bit map of slots it hears."""

DIRECT: Final = 255
"""``carrier`` of a session that the node itself logged in."""


class SessionKind(IntEnum):
    UNUSED = 0
    DATA = 1
    CONTROL = 2


class HeartbeatFlag(IntFlag):
    NONE = 0
    LEAVING = 1
    HAS_DIRECT_PATH = 2


@dataclass(frozen=True, slots=True)
class Session:
    """One I_T nexus of a node: what another host needs to reinstate it (and so to fence it)."""

    kind: SessionKind
    generation: int
    key: int
    initiator_name: str
    isid: int
    portal: str = ""
    """``host:port`` it was made through; empty where the LUN has no portals."""
    portal_group: int = 0
    carrier: int = DIRECT


@dataclass(frozen=True, slots=True)
class Identity:
    """Who somebody is: the same head in slot blocks and join blocks."""

    incarnation: int
    generation: int
    """The greatest path generation that this incarnation has ever given."""
    key: int
    """Join block: the newcomer's temporary key. Slot block: 0."""
    since_ns: int
    """CLOCK_REALTIME when this incarnation began; for people only."""
    machine_id: bytes
    boot_id: bytes
    node_name: str
    addresses: tuple[str, ...] = ()
    certificate: bytes = b""
    """X.509, DER."""

    def pack_into(self, block: bytearray) -> None:
        """Raises ValueError when something does not fit."""
        if len(self.machine_id) != 16 or len(self.boot_id) != 16:
            raise ValueError("machine id and boot id have 16 bytes")
        if len(self.addresses) > MAX_ADDRESSES:
            raise ValueError(f"{len(self.addresses)} addresses: at most {MAX_ADDRESSES}")
        if len(self.certificate) > MAX_CERTIFICATE_BYTES:
            raise ValueError(f"a certificate of {len(self.certificate)} bytes")
        IDENTITY_FIELDS.pack_into(
            block,
            HEADER_BYTES,
            self.incarnation,
            self.generation,
            self.key,
            self.since_ns,
            self.machine_id,
            self.boot_id,
            pack_text(self.node_name, NODE_NAME_BYTES, "node name"),
        )
        for number, address in enumerate(self.addresses):
            if not address:
                raise ValueError("an empty address")
            data = pack_text(address, ADDRESS_BYTES, "address")
            at = ADDRESSES_OFFSET + number * ADDRESS_BYTES
            block[at : at + len(data)] = data
        CERTIFICATE_LENGTH.pack_into(block, CERTIFICATE_OFFSET, len(self.certificate))
        end = CERTIFICATE_DATA_OFFSET + len(self.certificate)
        block[CERTIFICATE_DATA_OFFSET:end] = self.certificate

    @classmethod
    def unpack(
        cls, block: bytes | bytearray | memoryview, address: int, kind: BlockType
    ) -> Identity:
        """Read it from a verified block. Raises `BadBlock`."""
        incarnation, generation, key, since_ns, machine_id, boot_id, name = (
            IDENTITY_FIELDS.unpack_from(block, HEADER_BYTES)
        )
        addresses = []
        for number in range(MAX_ADDRESSES):
            at = ADDRESSES_OFFSET + number * ADDRESS_BYTES
            text = unpack_text(bytes(block[at : at + ADDRESS_BYTES]), address, kind, "address")
            if text:
                addresses.append(text)
        (length,) = CERTIFICATE_LENGTH.unpack_from(block, CERTIFICATE_OFFSET)
        if length > MAX_CERTIFICATE_BYTES:
            raise BadBlock(address, kind, f"a certificate of {length} bytes")
        return cls(
            incarnation,
            generation,
            key,
            since_ns,
            machine_id,
            boot_id,
            unpack_text(name, address, kind, "node name"),
            tuple(addresses),
            bytes(block[CERTIFICATE_DATA_OFFSET : CERTIFICATE_DATA_OFFSET + length]),
        )


@dataclass(frozen=True, slots=True)
class SlotBlock:
    """The node in a slot, and its sessions."""

    slot: int
    identity: Identity
    sessions: tuple[Session, ...] = ()

    def encode(self, volume_id: bytes, address: int, version: int) -> bytearray:
        """The sealed block. Raises ValueError when something does not fit."""
        if len(self.sessions) > MAX_SESSIONS:
            raise ValueError(f"{len(self.sessions)} sessions: at most {MAX_SESSIONS}")
        block = new_block(BlockType.SLOT, address, self.slot, volume_id)
        self.identity.pack_into(block)
        for number, session in enumerate(self.sessions):
            SESSION.pack_into(
                block,
                SESSIONS_OFFSET + number * SESSION.size,
                session.kind,
                session.carrier,
                session.generation,
                session.portal_group,
                session.isid,
                session.key,
                pack_text(session.portal, PORTAL_BYTES, "portal"),
                pack_text(session.initiator_name, INITIATOR_NAME_BYTES - 1, "initiator name"),
            )
        seal(block, version)
        return block

    @classmethod
    def decode(
        cls, block: bytes | bytearray | memoryview, address: int, volume_id: bytes, slot: int
    ) -> tuple[SlotBlock, int]:
        """The slot block and its version. Raises `BadBlock`."""
        kind = BlockType.SLOT
        version = verify(block, address, kind, volume_id, slot)
        sessions = []
        for number in range(MAX_SESSIONS):
            what, carrier, generation, group, isid, key, portal, name = SESSION.unpack_from(
                block, SESSIONS_OFFSET + number * SESSION.size
            )
            if what == SessionKind.UNUSED:
                continue
            if isid >> 48:
                raise BadBlock(address, kind, f"ISID {isid:#x} is not 48 bits")
            sessions.append(
                Session(
                    unpack_enum(SessionKind, what, address, kind, "session kind"),
                    generation,
                    key,
                    unpack_text(name, address, kind, "initiator name"),
                    isid,
                    unpack_text(portal, address, kind, "portal"),
                    group,
                    carrier,
                )
            )
        return cls(slot, Identity.unpack(block, address, kind), tuple(sessions)), version


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A sign of life; the block's version is its sequence + 1."""

    slot: int
    incarnation: int
    sequence: int
    epoch: int = 0
    sent_ns: int = 0
    """CLOCK_BOOTTIME of the sender: comparable only with itself."""
    hears: int = 0
    flags: HeartbeatFlag = HeartbeatFlag.NONE

    def encode(self, volume_id: bytes, address: int) -> bytearray:
        """The sealed block."""
        block = new_block(BlockType.HEARTBEAT, address, self.slot, volume_id)
        HEARTBEAT_FIELDS.pack_into(
            block,
            HEADER_BYTES,
            self.incarnation,
            self.flags,
            self.sequence,
            self.epoch,
            self.sent_ns,
            self.hears,
        )
        seal(block, self.sequence + 1)
        return block

    @classmethod
    def decode(
        cls, block: bytes | bytearray | memoryview, address: int, volume_id: bytes, slot: int
    ) -> Heartbeat:
        """Verify and read one. Raises `BadBlock`."""
        verify(block, address, BlockType.HEARTBEAT, volume_id, slot)
        incarnation, flags, sequence, epoch, sent_ns, hears = HEARTBEAT_FIELDS.unpack_from(
            block, HEADER_BYTES
        )
        return cls(slot, incarnation, sequence, epoch, sent_ns, hears, HeartbeatFlag(flags))


@dataclass(frozen=True, slots=True)
class JoinBlock:
    """A newcomer's request to be taken into slot ``slot``."""

    slot: int
    identity: Identity

    def encode(self, volume_id: bytes, address: int, version: int) -> bytearray:
        """The sealed block. Raises ValueError when something does not fit."""
        block = new_block(BlockType.JOIN, address, self.slot, volume_id)
        self.identity.pack_into(block)
        seal(block, version)
        return block

    @classmethod
    def decode(
        cls, block: bytes | bytearray | memoryview, address: int, volume_id: bytes, slot: int
    ) -> tuple[JoinBlock, int]:
        """The request and its version. Raises `BadBlock`."""
        version = verify(block, address, BlockType.JOIN, volume_id, slot)
        return cls(slot, Identity.unpack(block, address, BlockType.JOIN)), version
