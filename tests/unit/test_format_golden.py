"""The bytes of every structure, pinned: a change here changes the format (FORMAT.md 10)."""

from __future__ import annotations

import pytest

from csvfs import format as fmt
from csvfs.format import BlockType

VOLUME = bytes.fromhex("00112233445566778899aabbccddeeff")
_geometry = fmt.Geometry.for_lun(1 << 40, 16)
_identity = fmt.Identity(
    incarnation=0x010203,
    generation=4,
    key=0xC5F5_02_010203_0004,
    since_ns=1_700_000_000_000_000_001,
    machine_id=bytes(range(0x10, 0x20)),
    boot_id=bytes(range(0x20, 0x30)),
    node_name="alpha",
    addresses=("192.0.2.1:7001", "[2001:db8::1]:7001"),
    certificate=b"\x30\x82certificate",
)
_join = fmt.JoinRequest(
    slot=2,
    key=0xC5F5_FF_0102030405,
    sequence=41,
    node_name="alpha",
    machine_id=bytes(range(0x10, 0x20)),
    boot_id=bytes(range(0x20, 0x30)),
    fingerprint=fmt.certificate_fingerprint(b"\x30\x82certificate"),
    addresses=("192.0.2.1:7001", "[2001:db8::1]:7001"),
    certificate=b"\x30\x82certificate",
)


def _superblock() -> bytearray:
    return fmt.Superblock(
        volume_id=VOLUME,
        geometry=_geometry,
        created_ns=1_700_000_000_000_000_000,
        label="images",
        device_id=bytes.fromhex("6001405abcdef0123456789abcdef012"),
        vendor="IET",
        product="VIRTUAL-DISK",
        serial="beaf11",
        probe=fmt.ProbeFlag.PROBED | fmt.ProbeFlag.FENCE_STOPS_WRITE | fmt.ProbeFlag.UNMAP_WORKS,
        write_cache=fmt.WriteCache.TARGET_SAYS_STABLE,
        compat=1,
        ro_compat=2,
        incompat=4,
    ).encode(0, 5)


def _view() -> bytearray:
    slots = [fmt.ViewSlot()] * 16
    host = (bytes(range(0x10, 0x20)), bytes(range(0x20, 0x30)))
    slots[2] = fmt.ViewSlot(
        7,
        fmt.SlotState.ACTIVE,
        fmt.NOBODY,
        b"F" * 32,
        "alpha",
        99,
        fmt.ViewSlotFlag.NONE,
        *host,
        ("192.0.2.1:7001", "[2001:db8::1]:7001"),
    )
    slots[15] = fmt.ViewSlot(
        8, fmt.SlotState.NEEDS_REPLAY, 2, bytes(32), "omega", 98, fmt.ViewSlotFlag.JOURNAL_USED
    )
    view = fmt.View(9, 0xC5F5_02_000007_0001, tuple(slots), b"S" * 32, 97, 8)
    return fmt.encode_view(view, VOLUME)


def _slot() -> bytearray:
    data = fmt.Session(
        fmt.SessionKind.DATA, 3, 11, "iqn.2026-11.test:alpha", 0x800001020304, "192.0.2.9:3260", 1
    )
    control = fmt.Session(fmt.SessionKind.CONTROL, 4, 12, "iqn.2026-11.test:beta", 5, carrier=6)
    return fmt.SlotBlock(2, _identity, (data, control)).encode(VOLUME, 50, 6)


def _heartbeat() -> bytearray:
    flags = fmt.HeartbeatFlag.HAS_DIRECT_PATH
    return fmt.encode_heartbeat(fmt.Heartbeat(2, 7, 41, 9, 0b1011, flags), VOLUME, 114)


def _record() -> bytearray:
    block = fmt.new_block(BlockType.JOURNAL_RECORD, 800, 2, VOLUME)
    fmt.RecordHeader(2, 7, 41, images=1, revokes=1).pack_into(block)
    fmt.RECORD_IMAGE.pack_into(block, fmt.RECORD_ENTRIES_OFFSET, 900, fmt.ImageFlag.FRESH, 0)
    fmt.RECORD_REVOKE.pack_into(block, fmt.RECORD_ENTRIES_OFFSET + 16, 901)
    fmt.seal(block, 41)
    return block


def _group() -> bytearray:
    header = fmt.GroupHeader(1, _geometry.group_first_unit(1), 26880, 26000, 5, 0b101)
    header = fmt.GroupHeader(
        header.index, header.first_unit, 26880, 26000, 5, 0b101, fmt.GroupFlag.NONE
    )
    return header.encode(VOLUME, 12)


def _map() -> bytearray:
    address = _geometry.group_map(1, 0)
    block = fmt.new_map_block(VOLUME, 1, address, 0, fmt.GROUP_UNITS)
    fmt.set_unit_state(block, 1, fmt.UnitState.DATA)
    fmt.set_unit_state(block, 6, fmt.UnitState.METADATA)
    fmt.set_used_blocks(block, 6, 0x8001)
    fmt.seal(block, 13)
    return block


def _inode() -> bytearray:
    block = fmt.new_block(BlockType.INODE, 300, 300, VOLUME)
    fields = (300, 2, 0o100644, 1000, 1001, 1, 3, 1 << 33, 20, 2, 0x0801)
    times = (-1, 1_700_000_000_000_000_002, 3, 4)
    fmt.INODE_FIELDS.pack_into(
        block, fmt.INODE_FIELDS_OFFSET, *fields, *times, 15, 16, 17, 18, 19, 20
    )
    fmt.NODE_HEADER.pack_into(block, fmt.INODE_ROOT_OFFSET, 1, fmt.NodeKind.FIXED, 2, 3, 4, 0)
    fmt.EXTENT_VALUE.pack_into(
        block, fmt.INODE_ROOT_OFFSET + 16, fmt.pack_place(0x123456, 64), 0xFF
    )
    fmt.seal(block, 14)
    return block


def _records() -> bytearray:
    """Values of tree records, one behind the other; not a structure of its own."""
    block = bytearray(4096)
    fmt.DIRECTORY_VALUE.pack_into(block, 0, 300, 2, 8)
    fmt.ORPHAN_VALUE.pack_into(block, 16, fmt.OrphanKind.TRUNCATE, 2, 0)
    fmt.RECLAIM_VALUE.pack_into(block, 32, fmt.ReclaimKind.INODE, 1, 0)
    fmt.XATTR_HEADER.pack_into(block, 48, 3, 400)
    fmt.XATTR_ENTRY.pack_into(block, 56, 255, 4000)
    return block


_SAMPLES = {
    "superblock": _superblock(),
    "view": _view(),
    "slot": _slot(),
    "heartbeat": _heartbeat(),
    "join": fmt.encode_join(_join, VOLUME, 178),
    "journal header": fmt.JournalHeader(2, 7, 41, 1000).encode(VOLUME, 400, 15),
    "record": _record(),
    "group header": _group(),
    "group map": _map(),
    "inode": _inode(),
    "records": _records(),
}


def dump(block: bytes | bytearray) -> str:
    """The 16-byte lines that are not all zeroes, with their offsets."""
    lines = (
        f"{at:04x} {bytes(block[at : at + 16]).hex(' ', 4)}"
        for at in range(0, len(block), 16)
        if any(block[at : at + 16])
    )
    return "\n".join(lines)


_GOLDEN = {
    "superblock": """
0000 43535642 01000000 2ccd6080 00000000
0010 00112233 44556677 8899aabb ccddeeff
0020 00000000 00000000 05000000 00000000
0040 01000000 00000000 02000000 00000000
0050 04000000 00000000 00100000 00000100
0060 00690000 10000100 00000001 00000000
0070 00040000 00000000 00002a36 fe9c9717
0080 09040000 00000000 696d6167 65730000
00c0 00000000 00000000 49455400 00000000
00d0 00000000 00000000 56495254 55414c2d
00e0 4449534b 00000000 00000000 00000000
00f0 00000000 00000000 62656166 31310000
0150 00000000 00000000 10006001 405abcde
0160 f0123456 789abcde f0120000 00000000
""",
    "view": """
0000 43535642 10000000 03e79928 00000000
0010 00112233 44556677 8899aabb ccddeeff
0020 20000000 00000000 09000000 00000000
0040 09000000 00000000 01000700 0002f5c5
0050 61000000 00000000 10000000 00000000
0060 53535353 53535353 53535353 53535353
0070 53535353 53535353 53535353 53535353
0080 08000000 00000000 00000000 00000000
0200 00000000 00ff0000 00000000 00000000
0400 00000000 00ff0000 00000000 00000000
0600 07000000 02ff0000 00000000 00000000
0610 63000000 00000000 46464646 46464646
0620 46464646 46464646 46464646 46464646
0630 46464646 46464646 616c7068 61000000
0670 00000000 00000000 10111213 14151617
0680 18191a1b 1c1d1e1f 20212223 24252627
0690 28292a2b 2c2d2e2f 3139322e 302e322e
06a0 313a3730 30310000 00000000 00000000
06d0 00000000 00000000 5b323030 313a6462
06e0 383a3a31 5d3a3730 30310000 00000000
0800 00000000 00ff0000 00000000 00000000
0a00 00000000 00ff0000 00000000 00000000
0c00 00000000 00ff0000 00000000 00000000
0e00 00000000 00ff0000 00000000 00000000
1000 00000000 00ff0000 00000000 00000000
1200 00000000 00ff0000 00000000 00000000
1400 00000000 00ff0000 00000000 00000000
1600 00000000 00ff0000 00000000 00000000
1800 00000000 00ff0000 00000000 00000000
1a00 00000000 00ff0000 00000000 00000000
1c00 00000000 00ff0000 00000000 00000000
1e00 00000000 00ff0000 00000000 00000000
2000 08000000 03020100 00000000 00000000
2010 62000000 00000000 00000000 00000000
2030 00000000 00000000 6f6d6567 61000000
""",
    "slot": """
0000 43535642 03000000 b519456f 00000000
0010 00112233 44556677 8899aabb ccddeeff
0020 32000000 00000000 06000000 00000000
0030 02000000 00000000 00000000 00000000
0040 03020100 04000000 04000302 0102f5c5
0050 01002a36 fe9c9717 10111213 14151617
0060 18191a1b 1c1d1e1f 20212223 24252627
0070 28292a2b 2c2d2e2f 616c7068 61000000
0100 3139322e 302e322e 313a3730 30310000
0140 5b323030 313a6462 383a3a31 5d3a3730
0150 30310000 00000000 00000000 00000000
0280 0d000000 00000000 00000000 00000000
0290 30826365 72746966 69636174 65000000
0740 01ff0300 01000000 04030201 00800000
0750 0b000000 00000000 3139322e 302e322e
0760 393a3332 36300000 00000000 00000000
07a0 69716e2e 32303236 2d31312e 74657374
07b0 3a616c70 68610000 00000000 00000000
0880 02060400 00000000 05000000 00000000
0890 0c000000 00000000 00000000 00000000
08e0 69716e2e 32303236 2d31312e 74657374
08f0 3a626574 61000000 00000000 00000000
""",
    "heartbeat": """
0000 43535642 04000000 f53b065b 00000000
0010 00112233 44556677 8899aabb ccddeeff
0020 72000000 00000000 2a000000 00000000
0030 02000000 00000000 00000000 00000000
0040 07000000 02000000 29000000 00000000
0050 09000000 00000000 0b000000 00000000
""",
    "join": """
0000 43535642 05000000 4a3cc59c 00000000
0010 00112233 44556677 8899aabb ccddeeff
0020 b2000000 00000000 2a000000 00000000
0030 02000000 00000000 00000000 00000000
0040 00000000 00000000 05040302 01fff5c5
0050 00000000 00000000 10111213 14151617
0060 18191a1b 1c1d1e1f 20212223 24252627
0070 28292a2b 2c2d2e2f 616c7068 61000000
00b0 00000000 00000000 29000000 00000000
0100 3139322e 302e322e 313a3730 30310000
0140 5b323030 313a6462 383a3a31 5d3a3730
0150 30310000 00000000 00000000 00000000
0280 0d000000 00000000 00000000 00000000
0290 30826365 72746966 69636174 65000000
""",
    "journal header": """
0000 43535642 06000000 11ebab78 00000000
0010 00112233 44556677 8899aabb ccddeeff
0020 90010000 00000000 0f000000 00000000
0030 02000000 00000000 00000000 00000000
0040 07000000 e8030000 29000000 00000000
""",
    "record": """
0000 43535642 07000000 89ec8247 00000000
0010 00112233 44556677 8899aabb ccddeeff
0020 20030000 00000000 29000000 00000000
0030 02000000 00000000 00000000 00000000
0040 07000000 02000100 29000000 00000000
0050 01000000 01000000 02000000 00000000
0060 84030000 00000000 01000000 00000000
0070 85030000 00000000 00000000 00000000
""",
    "group header": """
0000 43535642 08000000 00a3201f 00000000
0010 00112233 44556677 8899aabb ccddeeff
0020 70910a00 00000000 0c000000 00000000
0030 01000000 00000000 00000000 00000000
0040 01000000 00000000 17a90000 00000000
0050 00690000 90650000 05000000 05000000
""",
    "group map": """
0000 43535642 09000000 37b821c8 00000000
0010 00112233 44556677 8899aabb ccddeeff
0020 71910a00 00000000 0d000000 00000000
0030 01000000 00000000 00000000 00000000
0040 07200000 00000000 00000000 00000000
0200 00000000 00000000 00000000 01800000
""",
    "inode": """
0000 43535642 0a000000 d5d416d4 00000000
0010 00112233 44556677 8899aabb ccddeeff
0020 2c010000 00000000 0e000000 00000000
0030 2c010000 00000000 00000000 00000000
0040 2c010000 00000000 02000000 a4810000
0050 e8030000 e9030000 01000000 03000000
0060 00000000 02000000 14000000 00000000
0070 02000000 01080000 ffffffff ffffffff
0080 02002a36 fe9c9717 03000000 00000000
0090 04000000 00000000 0f000000 00000000
00a0 10000000 00000000 11000000 00000000
00b0 12000000 00000000 13000000 00000000
00c0 14000000 00000000 00000000 00000000
0100 01010200 03000400 00000000 00000000
0110 3f563412 00000000 ff000000 00000000
""",
    "records": """
0000 2c010000 00000000 02000000 08000000
0010 02000000 02000000 00000000 00000000
0020 04000000 01000000 00000000 00000000
0030 03009001 00000000 ff00a00f 00000000
""",
}


@pytest.mark.parametrize("name", _SAMPLES)
def test_bytes_of(name: str) -> None:
    assert dump(_SAMPLES[name]) == _GOLDEN[name].strip()


def test_every_sample_is_pinned() -> None:
    assert _GOLDEN.keys() == _SAMPLES.keys()
