"""The superblock and its backup: what a volume is, written by format, and anew by a resignature.

Both copies are the same but for address and checksum. The first lies in block 0, the backup in
block 0 of the LUN's last whole unit, so that neither a partition table written over the start
nor one over the end takes both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from struct import Struct
from typing import Final

from csvfs.ondisk.block import (
    BLOCK_BYTES,
    HEADER_BYTES,
    UNIT_BYTES,
    VOLUME_ID_OFFSET,
    BadBlock,
    BlockType,
    new_block,
    pack_text,
    seal,
    unpack_enum,
    unpack_text,
    verify,
)
from csvfs.ondisk.geometry import GROUP_UNITS, SUPERBLOCK_ADDRESS, BadGeometry, Geometry

LABEL_BYTES: Final = 64
DEVICE_ID_BYTES: Final = 256
SUPERBLOCK_FIELDS: Final = Struct("<QQQIIIHHQIIqQ64s16s32s96sH256s16s")
"""compat, ro_compat, incompat, block bytes, unit bytes, group units, slots, write cache, size in
units, journal units, 0, created_ns, probe, label, vendor, product, serial, device id length,
device id, former volume id."""

assert HEADER_BYTES + SUPERBLOCK_FIELDS.size <= BLOCK_BYTES

KNOWN_COMPAT: Final = 0
KNOWN_RO_COMPAT: Final = 0
REQUIRED_INCOMPAT: Final = 1
"""Bit 0: views, join and heartbeat blocks are those of many hosts; whatever was formatted without
it is of an earlier csvfs."""
RESIGNATURE: Final = 2
"""Bit 1: a resignature is under way; some blocks still carry the former volume id."""
KNOWN_INCOMPAT: Final = REQUIRED_INCOMPAT | RESIGNATURE
"""Feature bits that this version of csvfs understands."""


class WriteCache(IntEnum):
    """What is believed of the target's write cache (DESIGN "Volatile target cache")."""

    VOLATILE = 0
    """It may forget what was neither flushed nor FUA."""
    TARGET_SAYS_STABLE = 1
    """The target says WCE=0 or NV_SUP=1."""
    ADMIN_SAYS_STABLE = 2
    """The administrator vouches for it."""


class ProbeFlag(IntFlag):
    """What the probe of the target found at format, from two initiators."""

    NONE = 0
    PROBED = 1 << 0
    PREEMPT_UNREGISTERED_CONFLICTS = 1 << 1
    FENCE_STOPS_READ = 1 << 2
    FENCE_STOPS_WRITE = 1 << 3
    FENCE_STOPS_UNMAP = 1 << 4
    FENCE_STOPS_WRITE_SAME = 1 << 5
    REINSTATEMENT_CLOSES = 1 << 6
    PREEMPT_DRAINS = 1 << 7
    PREEMPT_ABORT_WORKS = 1 << 8
    RESET_DRAINS = 1 << 9
    UNMAP_WORKS = 1 << 10
    WRITE_SAME_WORKS = 1 << 11


@dataclass(frozen=True, slots=True)
class Superblock:
    """One volume. ``owner`` and flags of the block are 0."""

    volume_id: bytes
    geometry: Geometry
    created_ns: int
    """CLOCK_REALTIME."""
    label: str = ""
    device_id: bytes = b""
    """VPD page 83h designator of the LUN; empty where the LUN has none (``file://``)."""
    vendor: str = ""
    product: str = ""
    serial: str = ""
    probe: ProbeFlag = ProbeFlag.NONE
    write_cache: WriteCache = WriteCache.VOLATILE
    compat: int = field(default=0, kw_only=True)
    ro_compat: int = field(default=0, kw_only=True)
    incompat: int = field(default=REQUIRED_INCOMPAT, kw_only=True)
    former_volume_id: bytes = field(default=bytes(16), kw_only=True)
    """While a resignature is under way: what blocks carry that it has not come to yet."""

    @property
    def unmap_allowed(self) -> bool:
        """UNMAP may be sent: the fence stops it, or closes the session that sent it."""
        fence = ProbeFlag.FENCE_STOPS_UNMAP | ProbeFlag.REINSTATEMENT_CLOSES
        return bool(self.probe & ProbeFlag.UNMAP_WORKS) and bool(self.probe & fence)

    @property
    def unknown_incompat(self) -> int:
        """Feature bits without which the volume must not be touched at all."""
        return self.incompat & ~KNOWN_INCOMPAT

    @property
    def missing_incompat(self) -> int:
        """Feature bits without which this csvfs cannot read the volume: an earlier one made it."""
        return REQUIRED_INCOMPAT & ~self.incompat

    @property
    def resignature_under_way(self) -> bool:
        """A copy of a LUN that is half a volume of its own: only `csvctl resignature` goes on."""
        return bool(self.incompat & RESIGNATURE)

    @property
    def unknown_ro_compat(self) -> int:
        """Feature bits without which the volume must not be written."""
        return self.ro_compat & ~KNOWN_RO_COMPAT

    def encode(self, address: int, version: int = 1) -> bytearray:
        """The sealed block for one of its two places. Raises ValueError if a text is too long."""
        if len(self.device_id) > DEVICE_ID_BYTES:
            raise ValueError(f"a device id of {len(self.device_id)} bytes")
        block = new_block(BlockType.SUPERBLOCK, address, 0, self.volume_id)
        SUPERBLOCK_FIELDS.pack_into(
            block,
            HEADER_BYTES,
            self.compat,
            self.ro_compat,
            self.incompat,
            BLOCK_BYTES,
            UNIT_BYTES,
            GROUP_UNITS,
            self.geometry.slots,
            self.write_cache,
            self.geometry.size_units,
            self.geometry.journal_units,
            0,
            self.created_ns,
            self.probe,
            pack_text(self.label, LABEL_BYTES, "label"),
            pack_text(self.vendor, 16, "vendor"),
            pack_text(self.product, 32, "product"),
            pack_text(self.serial, 96, "serial"),
            len(self.device_id),
            self.device_id,
            self.former_volume_id,
        )
        seal(block, version)
        return block

    @classmethod
    def decode(
        cls,
        block: bytes | bytearray | memoryview,
        address: int = SUPERBLOCK_ADDRESS,
        volume_id: bytes | None = None,
    ) -> Superblock:
        """Verify and read a superblock of any volume, or of one. Raises `BadBlock`.

        Unknown feature bits are no error here: see `unknown_incompat`.
        """
        kind = BlockType.SUPERBLOCK
        verify(block, address, kind, volume_id, 0)
        (
            compat,
            ro_compat,
            incompat,
            block_bytes,
            unit_bytes,
            group_units,
            slots,
            write_cache,
            size_units,
            journal_units,
            _,
            created_ns,
            probe,
            label,
            vendor,
            product,
            serial,
            device_id_bytes,
            device_id,
            former_volume_id,
        ) = SUPERBLOCK_FIELDS.unpack_from(block, HEADER_BYTES)
        if (block_bytes, unit_bytes, group_units) != (BLOCK_BYTES, UNIT_BYTES, GROUP_UNITS):
            raise BadBlock(
                address,
                kind,
                f"blocks of {block_bytes} bytes, units of {unit_bytes}, groups of {group_units}"
                f" units; this csvfs knows {BLOCK_BYTES}, {UNIT_BYTES}, {GROUP_UNITS}",
            )
        try:
            geometry = Geometry.for_lun(size_units * UNIT_BYTES, slots, journal_units * UNIT_BYTES)
        except BadGeometry as error:
            raise BadBlock(address, kind, str(error)) from None
        if address not in (SUPERBLOCK_ADDRESS, geometry.backup_superblock):
            raise BadBlock(address, kind, "neither the first block nor where the backup belongs")
        if device_id_bytes > DEVICE_ID_BYTES:
            raise BadBlock(address, kind, f"a device id of {device_id_bytes} bytes")
        return cls(
            volume_id=bytes(block[VOLUME_ID_OFFSET : VOLUME_ID_OFFSET + 16]),
            geometry=geometry,
            created_ns=created_ns,
            label=unpack_text(label, address, kind, "label"),
            device_id=device_id[:device_id_bytes],
            vendor=unpack_text(vendor, address, kind, "vendor"),
            product=unpack_text(product, address, kind, "product"),
            serial=unpack_text(serial, address, kind, "serial"),
            probe=ProbeFlag(probe),
            write_cache=unpack_enum(WriteCache, write_cache, address, kind, "write cache"),
            compat=compat,
            ro_compat=ro_compat,
            incompat=incompat,
            former_volume_id=former_volume_id,
        )
