"""Slot, heartbeat and join blocks: one of each a slot.

A slot block is written by the slot's node and read by whoever must reach or fence it: it is on
the LUN *before* the data sessions it names exist. A heartbeat block changes as long as its node
lives. In a join block a newcomer asks to become a member. What the last two say is
`lockmgr.cluster.blocks`; here is how it is written down.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import IntEnum
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
from csvfs.ondisk.view import (
    ADDRESS_BYTES,
    MAX_ADDRESSES,
    NODE_NAME_BYTES,
    Block,
    pack_addresses,
    unpack_addresses,
)
from lockmgr.cluster.blocks import Heartbeat, HeartbeatFlag, JoinRequest
from lockmgr.cluster.view import FINGERPRINT_BYTES

INITIATOR_NAME_BYTES: Final = 224
"""RFC 7143 4.2.7.1: at most 223 bytes."""
PORTAL_BYTES: Final = 72
MAX_SESSIONS: Final = 7
MAX_CERTIFICATE_BYTES: Final = 1152

IDENTITY_FIELDS: Final = Struct("<IIQq16s16s64s")
"""incarnation, generation, key, since_ns, machine id, boot id, node name; in slot and join blocks
at 64."""
JOIN_SEQUENCE: Final = Struct("<Q")
"""In join blocks, behind that."""
JOIN_SEQUENCE_OFFSET: Final = HEADER_BYTES + IDENTITY_FIELDS.size
ADDRESSES_OFFSET: Final = 256
CERTIFICATE_OFFSET: Final = 640
CERTIFICATE_LENGTH: Final = Struct("<H")
CERTIFICATE_DATA_OFFSET: Final = CERTIFICATE_OFFSET + 16
SESSIONS_OFFSET: Final = 1856
SESSION: Final = Struct("<BBHIQQ72s224s")
"""kind, carrier, generation, portal group tag, ISID, key, portal, InitiatorName."""

assert JOIN_SEQUENCE_OFFSET + JOIN_SEQUENCE.size <= ADDRESSES_OFFSET
assert ADDRESSES_OFFSET + MAX_ADDRESSES * ADDRESS_BYTES <= CERTIFICATE_OFFSET
assert CERTIFICATE_DATA_OFFSET + MAX_CERTIFICATE_BYTES <= SESSIONS_OFFSET
assert SESSION.size == 320
assert SESSIONS_OFFSET + MAX_SESSIONS * SESSION.size == BLOCK_BYTES

HEARTBEAT_FIELDS: Final = Struct("<IIQQQ")
"""incarnation, flags, sequence, epoch, bit map of slots it hears."""

DIRECT: Final = 255
"""``carrier`` of a session that the node itself logged in."""


class SessionKind(IntEnum):
    UNUSED = 0
    DATA = 1
    CONTROL = 2


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
        pack_addresses(block, ADDRESSES_OFFSET, self.addresses)
        CERTIFICATE_LENGTH.pack_into(block, CERTIFICATE_OFFSET, len(self.certificate))
        end = CERTIFICATE_DATA_OFFSET + len(self.certificate)
        block[CERTIFICATE_DATA_OFFSET:end] = self.certificate

    @classmethod
    def unpack(cls, block: Block, address: int, kind: BlockType) -> Identity:
        """Read it from a verified block. Raises `BadBlock`."""
        incarnation, generation, key, since_ns, machine_id, boot_id, name = (
            IDENTITY_FIELDS.unpack_from(block, HEADER_BYTES)
        )
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
            unpack_addresses(block, ADDRESSES_OFFSET, address, kind),
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
        cls, block: Block, address: int, volume_id: bytes, slot: int
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


# -- signs of life ---------------------------------------------------------------------------------
def encode_heartbeat(beat: Heartbeat, volume_id: bytes, address: int) -> bytearray:
    """The sealed block; its version is the sequence + 1."""
    block = new_block(BlockType.HEARTBEAT, address, beat.slot, volume_id)
    HEARTBEAT_FIELDS.pack_into(
        block,
        HEADER_BYTES,
        beat.incarnation,
        beat.flags,
        beat.sequence,
        beat.epoch,
        beat.hears,
    )
    seal(block, beat.sequence + 1)
    return block


def decode_heartbeat(block: Block, address: int, volume_id: bytes, slot: int) -> Heartbeat:
    """Verify and read one. Raises `BadBlock`."""
    verify(block, address, BlockType.HEARTBEAT, volume_id, slot)
    incarnation, flags, sequence, epoch, hears = HEARTBEAT_FIELDS.unpack_from(block, HEADER_BYTES)
    return Heartbeat(slot, incarnation, sequence, epoch, hears, HeartbeatFlag(flags))


# -- asking to be taken in -------------------------------------------------------------------------
def encode_join(request: JoinRequest, volume_id: bytes, address: int) -> bytearray:
    """The sealed block; its version is the sequence + 1. Raises ValueError when something does not
    fit, or the fingerprint is not the certificate's: it is not written, but made of that."""
    if not request.certificate:
        raise ValueError("a request without a certificate")
    if request.fingerprint != certificate_fingerprint(request.certificate):
        raise ValueError("the fingerprint is not that of the certificate")
    block = new_block(BlockType.JOIN, address, request.slot, volume_id)
    Identity(
        incarnation=0,
        generation=0,
        key=request.key,
        since_ns=0,
        machine_id=request.machine_id,
        boot_id=request.boot_id,
        node_name=request.node_name,
        addresses=request.addresses,
        certificate=request.certificate,
    ).pack_into(block)
    JOIN_SEQUENCE.pack_into(block, JOIN_SEQUENCE_OFFSET, request.sequence)
    seal(block, request.sequence + 1)
    return block


def decode_join(block: Block, address: int, volume_id: bytes, slot: int) -> JoinRequest:
    """Verify and read one. Raises `BadBlock`."""
    verify(block, address, BlockType.JOIN, volume_id, slot)
    who = Identity.unpack(block, address, BlockType.JOIN)
    if not who.certificate:
        raise BadBlock(address, BlockType.JOIN, "there is no certificate in it")
    (sequence,) = JOIN_SEQUENCE.unpack_from(block, JOIN_SEQUENCE_OFFSET)
    return JoinRequest(
        slot,
        who.key,
        sequence,
        who.node_name,
        who.machine_id,
        who.boot_id,
        certificate_fingerprint(who.certificate),
        who.addresses,
        who.certificate,
    )


def certificate_fingerprint(certificate: bytes) -> bytes:
    """As a view lists it: SHA-256 of the DER bytes, zeroes without a certificate."""
    return hashlib.sha256(certificate).digest() if certificate else bytes(FINGERPRINT_BYTES)
