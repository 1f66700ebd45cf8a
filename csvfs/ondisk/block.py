"""The 4 KiB metadata block: constants, the header that every block carries, seal and verify.

Theory. A metadata block says by itself what it is (type), where it belongs (volume id, address),
whose it is (owner) and which of two images of it is the newer one (version, a Lamport clock). The
checksum covers all of that and the rest of the block. So a block read from the wrong place, of
another volume, torn, stale from an earlier format or forged inside a file's data is told from the
real one, and the error can name it.

Invariants: `seal` is the last thing that happens to an image before it is written; `verify` is
the first thing that happens to one that was read. All integers are little-endian.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import Final, TypeVar

from crc32c import crc32c

BLOCK_BYTES: Final = 4096
UNIT_BYTES: Final = 65536
BLOCKS_PER_UNIT: Final = UNIT_BYTES // BLOCK_BYTES
MAX_SLOTS: Final = 64
NEWCOMER_SLOT: Final = 255
"""Slot number in the keys of newcomers and offline tools; no slot on the volume."""

MAGIC: Final = b"CSVB"
HEADER: Final = Struct("<4sHHII16sQQQQ")
"""magic, type, flags, crc32c, 0, volume id, address, version, owner, 0."""
HEADER_BYTES: Final = 64
PAYLOAD_BYTES: Final = BLOCK_BYTES - HEADER_BYTES

TYPE_OFFSET: Final = 4
FLAGS_OFFSET: Final = 6
CRC_OFFSET: Final = 8
CRC_END: Final = 12
VOLUME_ID_OFFSET: Final = 16
ADDRESS_OFFSET: Final = 32
VERSION_OFFSET: Final = 40
OWNER_OFFSET: Final = 48

VERSION_LIMIT: Final = 1 << 63
"""Versions are 1 .. VERSION_LIMIT - 1; 0 means: never sealed."""

_U16: Final = Struct("<H")
_U32: Final = Struct("<I")
_U64: Final = Struct("<Q")

assert HEADER.size == HEADER_BYTES
assert BLOCKS_PER_UNIT == 16


class BlockType(IntEnum):
    """What a block is. Numbers are on disk: never reused."""

    SUPERBLOCK = 1
    VIEW = 16
    SLOT = 3
    HEARTBEAT = 4
    JOIN = 5
    JOURNAL_HEADER = 6
    JOURNAL_RECORD = 7
    GROUP_HEADER = 8
    GROUP_MAP = 9
    INODE = 10
    TREE_NODE = 11
    XATTR = 12
    SYMLINK_TAIL = 13
    ORPHAN_ROOT = 14
    RECLAIM_ROOT = 15

    @property
    def words(self) -> str:
        """The name for people: "group map"."""
        return self.name.lower().replace("_", " ")


class BadBlock(Exception):
    """A block is not what it must be here. Names the block, what was expected and what was found.

    ``address`` is a block number from the LUN's start, ``expected`` the type looked for,
    ``reason`` what does not fit.
    """

    def __init__(self, address: int, expected: BlockType, reason: str) -> None:
        super().__init__(f"block {address} is not a valid {expected.words} block: {reason}")
        self.address = address
        self.expected = expected
        self.reason = reason


def new_block(
    kind: BlockType,
    address: int,
    owner: int,
    volume_id: bytes,
    flags: int = 0,
    *,
    size_bytes: int = BLOCK_BYTES,
) -> bytearray:
    """A zeroed block with its header; `seal` gives it version and checksum."""
    if len(volume_id) != 16:
        raise ValueError(f"a volume id has 16 bytes, not {len(volume_id)}")
    block = bytearray(size_bytes)
    HEADER.pack_into(block, 0, MAGIC, kind, flags, 0, 0, volume_id, address, 0, owner, 0)
    return block


def checksum(block: bytes | bytearray | memoryview) -> int:
    """CRC32C (RFC 3720 B.4) of everything but the checksum field itself."""
    view = memoryview(block)
    return crc32c(view[CRC_END:], crc32c(view[:CRC_OFFSET]))


def seal(block: bytearray | memoryview, version: int) -> None:
    """Stamp ``version`` and the checksum, in place. ``block`` may be longer than 4 KiB (a view)."""
    assert 0 < version < VERSION_LIMIT, version
    _U64.pack_into(block, VERSION_OFFSET, version)
    view = memoryview(block)
    _U32.pack_into(block, CRC_OFFSET, crc32c(view[CRC_END:], crc32c(view[:CRC_OFFSET])))


def verify(
    block: bytes | bytearray | memoryview,
    address: int,
    kind: BlockType,
    volume_id: bytes | None,
    owner: int | None = None,
) -> int:
    """Return the version of a block that is what it must be, else raise `BadBlock`.

    ``volume_id`` None accepts any volume (only for a superblock), ``owner`` None any owner.
    """
    if len(block) < BLOCK_BYTES:
        raise BadBlock(address, kind, f"it has {len(block)} bytes")
    magic, kind_, _, crc, _, volume_id_, address_, version, owner_, _ = HEADER.unpack_from(block)
    view = memoryview(block)
    if (
        crc32c(view[CRC_END:], crc32c(view[:CRC_OFFSET])) != crc
        or kind_ != kind
        or magic != MAGIC
        or address_ != address
        or (volume_id is not None and volume_id_ != volume_id)
        or (owner is not None and owner_ != owner)
        or not 0 < version < VERSION_LIMIT
    ):
        raise BadBlock(address, kind, _what_is_wrong(block, address, kind, volume_id, owner))
    return int(version)


def _what_is_wrong(
    block: bytes | bytearray | memoryview,
    address: int,
    kind: BlockType,
    volume_id: bytes | None,
    owner: int | None,
) -> str:
    """Words for the first thing that does not fit; what a reader can act on comes first."""
    magic, kind_, _, crc, _, volume_id_, address_, version, owner_, _ = HEADER.unpack_from(block)
    if bytes(block) == bytes(len(block)):
        return "it is all zeroes"
    if magic != MAGIC:
        return f"magic is {bytes(magic).hex()}, not {MAGIC.hex()}"
    found = checksum(block)
    if crc != found:
        return f"checksum is {crc:#010x}, its content gives {found:#010x}"
    if volume_id is not None and volume_id_ != volume_id:
        return f"it belongs to volume {bytes(volume_id_).hex()}, not {volume_id.hex()}"
    if kind_ != kind:
        return f"type is {type_words(kind_)}, not {kind.words}"
    if address_ != address:
        return f"it says that it is block {address_}"
    if owner is not None and owner_ != owner:
        return f"owner is {owner_}, not {owner}"
    return f"version is {version:#x}"


def type_words(number: int) -> str:
    """Name of a type number, known or not."""
    try:
        return BlockType(number).words
    except ValueError:
        return f"unknown ({number})"


def block_type(block: bytes | bytearray | memoryview) -> int:
    """The type field, unchecked."""
    return int(_U16.unpack_from(block, TYPE_OFFSET)[0])


def block_flags(block: bytes | bytearray | memoryview) -> int:
    """The flags field, unchecked."""
    return int(_U16.unpack_from(block, FLAGS_OFFSET)[0])


def block_address(block: bytes | bytearray | memoryview) -> int:
    """The address field, unchecked."""
    return int(_U64.unpack_from(block, ADDRESS_OFFSET)[0])


def block_version(block: bytes | bytearray | memoryview) -> int:
    """The version field, unchecked."""
    return int(_U64.unpack_from(block, VERSION_OFFSET)[0])


def block_owner(block: bytes | bytearray | memoryview) -> int:
    """The owner field, unchecked."""
    return int(_U64.unpack_from(block, OWNER_OFFSET)[0])


# -- text and enumerations inside blocks ---------------------------------------------------------
def pack_text(text: str, size_bytes: int, what: str) -> bytes:
    """UTF-8 for a NUL-padded field. Raises ValueError naming ``what`` when it does not fit."""
    data = text.encode()
    if len(data) > size_bytes:
        raise ValueError(f"{what} {text!r} is longer than {size_bytes} bytes")
    if b"\0" in data:
        raise ValueError(f"{what} {text!r} holds a NUL character")
    return data


def unpack_text(field: bytes, address: int, kind: BlockType, what: str) -> str:
    """Text of a NUL-padded UTF-8 field, else `BadBlock`."""
    try:
        return field.rstrip(b"\0").decode()
    except UnicodeDecodeError as error:
        raise BadBlock(address, kind, f"{what} is not UTF-8: {error}") from None


_Enum = TypeVar("_Enum", bound=IntEnum)


def unpack_enum(
    members: type[_Enum], number: int, address: int, kind: BlockType, what: str
) -> _Enum:
    """The member of an enumeration on disk, else `BadBlock`."""
    try:
        return members(number)
    except ValueError:
        raise BadBlock(address, kind, f"{what} {number} is not known") from None
