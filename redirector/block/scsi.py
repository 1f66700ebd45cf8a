"""SCSI on paper: command blocks, parameter data, sense data. Pure functions, no I/O.

SAM-5 (status), SPC-4 (INQUIRY, MODE SENSE, PERSISTENT RESERVE, sense data), SBC-3 (the rest).
All numbers on the wire are big-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from redirector.block.device import (
    IllegalRequest,
    MediumError,
    RegisteredKeys,
    Reservation,
    ReservationConflict,
    ReservationType,
    SpaceExhausted,
    TargetBusy,
    TargetRefused,
    UnitAttention,
)

CHECK_CONDITION = 0x02
RESERVATION_CONFLICT = 0x18

VPD_SUPPORTED = 0x00
VPD_SERIAL = 0x80
VPD_IDENTIFICATION = 0x83
VPD_EXTENDED = 0x86
VPD_LIMITS = 0xB0
VPD_PROVISIONING = 0xB2

TEST_UNIT_READY = bytes(6)
SYNCHRONIZE_CACHE_16 = bytes([0x91]) + bytes(15)
RESERVE_6 = bytes([0x16]) + bytes(5)
RELEASE_6 = bytes([0x17]) + bytes(5)

PR_READ_KEYS = 0x00
PR_READ_RESERVATION = 0x01
PR_REPORT_CAPABILITIES = 0x02

PR_REGISTER = 0x00
PR_RESERVE = 0x01
PR_RELEASE = 0x02
PR_CLEAR = 0x03
PR_PREEMPT = 0x04
PR_PREEMPT_AND_ABORT = 0x05
PR_REGISTER_AND_IGNORE_EXISTING_KEY = 0x06

LOGICAL_UNIT_RESET = 5
"""Task management function (RFC 7143 11.5.1)."""

_PAGE_CACHING = 0x08

_STATUS_WORDS = {
    0x08: "busy",
    0x18: "reservation conflict",
    0x28: "task set full",
    0x30: "ACA active",
    0x40: "task aborted",
}
_BUSY = (0x08, 0x28, 0x40)

_KEY_WORDS = (
    "no sense",
    "recovered error",
    "not ready",
    "medium error",
    "hardware error",
    "illegal request",
    "unit attention",
    "data protect",
    "blank check",
    "vendor specific",
    "copy aborted",
    "aborted command",
    "reserved",
    "volume overflow",
    "miscompare",
    "completed",
)
_NOT_READY, _MEDIUM, _ILLEGAL, _ATTENTION, _PROTECT = 2, 3, 5, 6, 7
_ASC_SPACE = 0x2707
_ASC_SOON_READY = (0x0401, 0x040A)

_ASC_WORDS = {
    0x0401: "the LUN is becoming ready",
    0x0402: "the LUN needs a START UNIT",
    0x0403: "the LUN needs manual intervention",
    0x040A: "asymmetric access state transition",
    0x040B: "the port is in standby state",
    0x040C: "the port is in unavailable state",
    0x0C00: "write error",
    0x0C02: "write error, reallocation failed",
    0x1100: "unrecovered read error",
    0x1A00: "parameter list length error",
    0x2000: "invalid command operation code",
    0x2100: "logical block address out of range",
    0x2400: "invalid field in CDB",
    0x2500: "logical unit not supported",
    0x2600: "invalid field in parameter list",
    0x2604: "invalid release of persistent reservation",
    0x2700: "write protected",
    0x2707: "space allocation failed",
    0x2900: "power on, reset, or bus device reset occurred",
    0x2901: "power on occurred",
    0x2902: "SCSI bus reset occurred",
    0x2903: "bus device reset function occurred",
    0x2904: "device internal reset",
    0x2907: "I_T nexus loss occurred",
    0x2A01: "mode parameters changed",
    0x2A03: "reservations preempted",
    0x2A04: "reservations released",
    0x2A05: "registrations preempted",
    0x2A06: "asymmetric access state changed",
    0x2A09: "capacity data has changed",
    0x3807: "thin provisioning soft threshold reached",
    0x3900: "saving parameters not supported",
    0x3A00: "medium not present",
    0x3F0E: "reported LUNs data has changed",
    0x4400: "internal target failure",
    0x5504: "insufficient registration resources",
}


@dataclass(frozen=True, slots=True)
class Sense:
    """Sense data (SPC-4 4.5), fixed or descriptor format."""

    key: int = 0
    asc_ascq: int = 0
    deferred: bool = False
    """It tells of an earlier command, and this one was not carried out."""

    @property
    def words(self) -> str:
        told = _ASC_WORDS.get(self.asc_ascq)
        key = _KEY_WORDS[self.key]
        text = f"{key}: {told}" if told else key
        return f"{text} (of an earlier command)" if self.deferred else text


def parse_sense(data: bytes) -> Sense:
    """Read sense data; what is too short or of an unknown format reads as "no sense"."""
    if not data:
        return Sense()
    code = data[0] & 0x7F
    if code in (0x70, 0x71) and len(data) >= 3:
        asc_ascq = int.from_bytes(data[12:14], "big") if len(data) >= 14 else 0
        return Sense(data[2] & 0xF, asc_ascq, deferred=code == 0x71)
    if code in (0x72, 0x73) and len(data) >= 4:
        return Sense(data[1] & 0xF, int.from_bytes(data[2:4], "big"), deferred=code == 0x73)
    return Sense()


def refusal(what: str, status: int, sense_data: bytes) -> TargetRefused:
    """The exception for an answer that was not GOOD."""
    if status != CHECK_CONDITION:
        words = _STATUS_WORDS.get(status, "")
        kind: type[TargetRefused] = TargetRefused
        if status == RESERVATION_CONFLICT:
            kind = ReservationConflict
        elif status in _BUSY:
            kind = TargetBusy
        return kind(what, status=status, words=words)
    sense = parse_sense(sense_data)
    kind = {_MEDIUM: MediumError, _ILLEGAL: IllegalRequest, _ATTENTION: UnitAttention}.get(
        sense.key, TargetRefused
    )
    if sense.key == _PROTECT and sense.asc_ascq == _ASC_SPACE:
        kind = SpaceExhausted
    elif sense.key == _NOT_READY and sense.asc_ascq in _ASC_SOON_READY:
        kind = TargetBusy  # an array that fails over to its other controller
    if sense.deferred:
        kind = TargetRefused  # not these bytes are lost, but others that were acknowledged
    return kind(
        what, status=status, sense_key=sense.key, asc_ascq=sense.asc_ascq, words=sense.words
    )


# -- command blocks -------------------------------------------------------------------------------
def inquiry(length_bytes: int, vpd_page: int | None = None) -> bytes:
    """INQUIRY, standard or of a vital product data page."""
    return struct.pack(">BBBHx", 0x12, vpd_page is not None, vpd_page or 0, length_bytes)


def mode_sense_caching(length_bytes: int) -> bytes:
    """MODE SENSE(6) of the caching page, current values, without block descriptors."""
    return struct.pack(">BBBxBx", 0x1A, 0x08, _PAGE_CACHING, length_bytes)


def read_capacity_16(length_bytes: int) -> bytes:
    """READ CAPACITY(16)."""
    return struct.pack(">BB8xIxx", 0x9E, 0x10, length_bytes)


def unmap_command(length_bytes: int) -> bytes:
    """UNMAP with a parameter list of that length."""
    return struct.pack(">B6xHx", 0x42, length_bytes)


def write_same_16(lba: int, blocks: int) -> bytes:
    """WRITE SAME(16) of one block that comes with it."""
    return struct.pack(">BxQIxx", 0x93, lba, blocks)


def persistent_reserve_in(action: int, length_bytes: int) -> bytes:
    """PERSISTENT RESERVE IN."""
    return struct.pack(">BB5xHx", 0x5E, action, length_bytes)


def persistent_reserve_out(action: int, kind: int = 0) -> bytes:
    """PERSISTENT RESERVE OUT, scope LU, with the 24 bytes of `reserve_parameters`."""
    return struct.pack(">BBB2xIx", 0x5F, action, kind, 24)


# -- parameter lists that are sent ----------------------------------------------------------------
def reserve_parameters(key: int, action_key: int = 0) -> bytes:
    """PERSISTENT RESERVE OUT's parameter list: own key, key to register or to preempt."""
    return struct.pack(">QQ8x", key, action_key)


def unmap_parameters(extents: Sequence[tuple[int, int]]) -> bytes:
    """UNMAP's parameter list of (lba, blocks) pairs."""
    body = b"".join(struct.pack(">QI4x", lba, blocks) for lba, blocks in extents)
    return struct.pack(">HH4x", 6 + len(body), len(body)) + body


# -- parameter data that is received --------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Inquiry:
    """Standard INQUIRY data (SPC-4 6.6.2)."""

    qualifier: int
    device_type: int
    vendor: str
    product: str
    revision: str


def parse_inquiry(data: bytes) -> Inquiry:
    """Raises `ValueError` if it is too short."""
    if len(data) < 36:
        raise ValueError(f"standard INQUIRY data of {len(data)} bytes")
    texts = (data[8:16], data[16:32], data[32:36])
    vendor, product, revision = (_ascii(text) for text in texts)
    return Inquiry(data[0] >> 5, data[0] & 0x1F, vendor, product, revision)


def _ascii(data: bytes) -> str:
    return data.decode("ascii", errors="replace").replace("\0", " ").strip()


def vpd_body(data: bytes, page: int) -> bytes:
    """The body of a VPD page, b"" if the data is not of that page."""
    if len(data) < 4 or data[1] != page:
        return b""
    return data[4 : 4 + int.from_bytes(data[2:4], "big")]


def parse_serial(body: bytes) -> str:
    """VPD 80h, unit serial number."""
    return _ascii(body)


_T10, _EUI64, _NAA = 1, 2, 3
_NAA_LOCAL = 16
"""Not a code of the standard: an NAA designator of format 3h, which is unique within one array
(tgt: the target's number and the LUN's) and therefore the last choice."""
_DESIGNATOR_ORDER = (_NAA, _EUI64, _T10, _NAA_LOCAL)


def parse_device_id(body: bytes) -> bytes:
    """VPD 83h: the logical unit's designator, NAA before EUI-64 before T10; b"" without one."""
    found: dict[int, bytes] = {}
    while len(body) >= 4:
        association, kind = body[1] >> 4 & 3, body[1] & 0xF
        identifier, body = body[4 : 4 + body[3]], body[4 + body[3] :]
        if association == 0 and identifier:
            if kind == _NAA and identifier[0] >> 4 == 3:
                kind = _NAA_LOCAL
            found.setdefault(kind, bytes(identifier))
    return next((found[kind] for kind in _DESIGNATOR_ORDER if kind in found), b"")


@dataclass(frozen=True, slots=True)
class BlockLimits:
    """VPD B0h, in blocks; 0: the target states no limit."""

    max_transfer_blocks: int = 0
    max_unmap_blocks: int = 0
    max_unmap_extents: int = 0
    unmap_granularity_blocks: int = 0


def parse_block_limits(body: bytes) -> BlockLimits:
    """VPD B0h; a page of SBC-2 ends before the UNMAP fields."""
    body = body[:60].ljust(60, b"\0")
    max_transfer, max_unmap, extents, granularity = struct.unpack_from(">4xI8xIII", body)
    return BlockLimits(max_transfer, max_unmap, extents, granularity)


def parse_unmap_supported(body: bytes) -> bool:
    """VPD B2h: LBPU."""
    return len(body) >= 2 and bool(body[1] & 0x80)


def parse_cache_non_volatile(body: bytes) -> bool:
    """VPD 86h: there is a non-volatile cache (NV_SUP) and no volatile one (V_SUP)."""
    return len(body) >= 3 and body[2] & 0x03 == 0x02


@dataclass(frozen=True, slots=True)
class Capacity:
    """READ CAPACITY(16) data."""

    blocks: int
    block_bytes: int
    thin: bool


def parse_capacity(data: bytes) -> Capacity:
    """Raises `ValueError` if it is too short or senseless."""
    if len(data) < 15:
        raise ValueError(f"READ CAPACITY(16) data of {len(data)} bytes")
    last, block_bytes = struct.unpack_from(">QI", data)
    if block_bytes < 512 or block_bytes & (block_bytes - 1):
        raise ValueError(f"a logical block of {block_bytes} bytes")
    return Capacity(last + 1, block_bytes, bool(data[14] & 0x80))


def parse_write_cache_enabled(data: bytes) -> bool | None:
    """MODE SENSE(6): WCE of the caching page; None if that page is not there."""
    if len(data) < 4:
        return None
    page = data[4 + data[3] : 1 + data[0]]
    if len(page) < 3 or page[0] & 0x3F != _PAGE_CACHING:
        return None
    return bool(page[2] & 0x04)


def key_list_bytes(data: bytes) -> int:
    """How many bytes READ KEYS has in all, from its first eight."""
    return 8 + int.from_bytes(data[4:8], "big")


def parse_keys(data: bytes) -> RegisteredKeys:
    """PERSISTENT RESERVE IN, READ KEYS. Raises `ValueError` if it is too short."""
    if len(data) < 8:
        raise ValueError(f"READ KEYS data of {len(data)} bytes")
    generation, length = struct.unpack_from(">II", data)
    if len(data) < 8 + length:
        raise ValueError(f"READ KEYS data of {len(data)} bytes, {8 + length} announced")
    return RegisteredKeys(generation, struct.unpack_from(f">{length // 8}Q", data, 8))


def parse_reservation(data: bytes) -> Reservation:
    """PERSISTENT RESERVE IN, READ RESERVATION. Raises `ValueError` if it is too short."""
    if len(data) < 8:
        raise ValueError(f"READ RESERVATION data of {len(data)} bytes")
    generation, length = struct.unpack_from(">II", data)
    if not length:
        return Reservation(generation, 0, ReservationType.NONE)
    if len(data) < 24:
        raise ValueError(f"READ RESERVATION data of {len(data)} bytes, {8 + length} announced")
    key, scope_type = struct.unpack_from(">Q5xB", data, 8)
    kind = scope_type & 0xF
    known = kind in ReservationType.__members__.values()
    return Reservation(generation, key, ReservationType(kind) if known else kind)


@dataclass(frozen=True, slots=True)
class ReserveCapabilities:
    """PERSISTENT RESERVE IN, REPORT CAPABILITIES (SPC-4 6.15.4)."""

    persists_through_power_loss: bool = False
    """It could (PTPL_C); csvfs does not ask for it."""
    exclusive_access_registrants_only: bool | None = None
    """None: the target does not say which types it has."""


def parse_capabilities(data: bytes) -> ReserveCapabilities:
    """Raises `ValueError` if it is too short."""
    if len(data) < 8:
        raise ValueError(f"REPORT CAPABILITIES data of {len(data)} bytes")
    types = bool(data[4] & 0x40) if data[3] & 0x80 else None
    return ReserveCapabilities(bool(data[2] & 0x01), types)
