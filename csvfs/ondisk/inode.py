"""Inodes and the records inside trees: extents, directory entries, orphans, reclaim, xattrs.

An inode is one block (type INODE, owner = inode number = address): 64 bytes of header, fields up
to byte 256, then 3840 bytes: the root node of the inode's B-tree (extents of a file, entries of a
directory), or the first bytes of a symbolic link's target.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from struct import Struct
from typing import Final

from csvfs.ondisk.block import BLOCK_BYTES, HEADER_BYTES, PAYLOAD_BYTES

# -- inode fields --------------------------------------------------------------------------------
INODE_FIELDS: Final = Struct("<QIIIIIIQQIIqqqqQQQQQQ")
"""ino, generation, mode, uid, gid, nlink, flags, size, units, metadata_blocks, rdev, atime_ns,
mtime_ns, ctime_ns, btime_ns, change, parent, entries, xattr_block, symlink_tail, hash_seed."""
INODE_FIELDS_OFFSET: Final = HEADER_BYTES
INODE_INO: Final = 64
INODE_GENERATION: Final = 72
INODE_MODE: Final = 76
INODE_UID: Final = 80
INODE_GID: Final = 84
INODE_NLINK: Final = 88
INODE_FLAGS: Final = 92
INODE_SIZE: Final = 96
INODE_UNITS: Final = 104
INODE_METADATA_BLOCKS: Final = 112
INODE_RDEV: Final = 116
INODE_ATIME: Final = 120
INODE_MTIME: Final = 128
INODE_CTIME: Final = 136
INODE_BTIME: Final = 144
INODE_CHANGE: Final = 152
INODE_PARENT: Final = 160
INODE_ENTRIES: Final = 168
INODE_XATTR_BLOCK: Final = 176
INODE_SYMLINK_TAIL: Final = 184
INODE_HASH_SEED: Final = 192
INODE_FIELDS_END: Final = 200
INODE_ROOT_OFFSET: Final = 256
INODE_ROOT_BYTES: Final = BLOCK_BYTES - INODE_ROOT_OFFSET
MAX_SYMLINK_BYTES: Final = 4095
MAX_NAME_BYTES: Final = 255


class InodeFlag(IntFlag):
    TRIMMING = 1
    """Units behind the end of the file are still to be taken out: it must not grow before."""


assert INODE_FIELDS_OFFSET + INODE_FIELDS.size == INODE_FIELDS_END <= INODE_ROOT_OFFSET
assert INODE_ROOT_BYTES == 3840
assert MAX_SYMLINK_BYTES <= INODE_ROOT_BYTES + PAYLOAD_BYTES

# -- B-tree nodes --------------------------------------------------------------------------------
NODE_HEADER: Final = Struct("<BBHHHQ")
"""level (0: leaf), kind, count, heap, garbage, 0. Variable leaves only: the lowest byte of the
heap in use, and the bytes in it that belong to no entry (`btree_node`)."""
NODE_HEADER_BYTES: Final = 16
NODE_OFFSET: Final = HEADER_BYTES
"""Where the node area begins in TREE_NODE, ORPHAN_ROOT and RECLAIM_ROOT blocks."""
NODE_BYTES: Final = PAYLOAD_BYTES

assert NODE_HEADER.size == NODE_HEADER_BYTES
assert NODE_BYTES == 4032


class NodeKind(IntEnum):
    """What the leaves of a tree hold."""

    FIXED = 1
    """16-byte values: extents, orphans, reclaim."""
    VARIABLE = 2
    """Values of any length: directory entries."""


class TreeOwner(IntEnum):
    """Header flags of a TREE_NODE block: which lock covers it, together with the owner."""

    INODE = 0
    ORPHAN = 1
    RECLAIM = 2


# -- extents: key = logical unit -----------------------------------------------------------------
EXTENT_VALUE: Final = Struct("<QQ")
"""(physical unit << 8 | count - 1), written mask (bit i: unit i holds data)."""
MAX_EXTENT_UNITS: Final = 64

assert EXTENT_VALUE.size == 16


def pack_place(physical_unit: int, count: int) -> int:
    """First word of an extent value; ``count`` units, 1..64."""
    assert 1 <= count <= MAX_EXTENT_UNITS and 0 < physical_unit < 1 << 40, (physical_unit, count)
    return physical_unit << 8 | count - 1


def unpack_place(word: int) -> tuple[int, int]:
    """(physical unit, count) of the first word of an extent value.

    The low byte may say up to 256 in a damaged record: the caller checks against 64.
    """
    return word >> 8, (word & 0xFF) + 1


# -- directory entries: key = hash of the name, low byte a collision number ----------------------
DIRECTORY_VALUE: Final = Struct("<QIB")
"""ino, generation, d_type; the name follows, to the end of the value."""
DIRECTORY_VALUE_BYTES: Final = 13
DIRECTORY_HASH_MASK: Final = 0x7FFF_FFFF_FFFF_FF00
DIRECTORY_MIN_KEY: Final = 256
DIRECTORY_MAX_COLLISIONS: Final = 256

assert DIRECTORY_VALUE.size == DIRECTORY_VALUE_BYTES

# -- orphans of a slot: key = ino ----------------------------------------------------------------
ORPHAN_VALUE: Final = Struct("<IIQ")
"""kind, generation, 0."""

assert ORPHAN_VALUE.size == 16


class OrphanKind(IntEnum):
    OPEN = 1
    """Unlinked, still open or known to a kernel."""
    TRUNCATE = 2
    """Extents beyond the size are still to be trimmed."""


# -- reclaim list of a slot: key = block address -------------------------------------------------
RECLAIM_VALUE: Final = Struct("<IIQ")
"""kind, count, 0."""

assert RECLAIM_VALUE.size == 16


class ReclaimKind(IntEnum):
    DATA = 1
    """``count`` data units from block address key = unit * 16."""
    BLOCK = 2
    """One metadata block."""
    INODE = 4
    """A dead inode and all that it owns."""


# -- extended attributes: one block an inode -----------------------------------------------------
XATTR_HEADER: Final = Struct("<HH4x")
"""count, bytes in use behind this header."""
XATTR_OFFSET: Final = HEADER_BYTES
XATTR_BYTES: Final = PAYLOAD_BYTES - XATTR_HEADER.size
XATTR_ENTRY: Final = Struct("<BxH")
"""Length of the name, of the value; name and value follow, packed."""

assert XATTR_HEADER.size == 8
assert XATTR_ENTRY.size == 4
