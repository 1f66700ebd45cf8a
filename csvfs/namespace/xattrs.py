"""Extended attributes (xattr(7)): the packed list in an inode's one XATTR block.

`csvfs.ondisk.inode` says how the block lies: a count, the bytes in use, then each entry packed:
length of the name, length of the value, name, value. Entries stand in the order in which they
were set; one that changes moves to the end.

Namespaces: user, trusted and security. ACLs (system.posix_acl_*) are not kept, so that no file
looks protected by rules that nobody enforces.
"""

from __future__ import annotations

from typing import Final

from csvfs.engine.change import Change
from csvfs.errors import (
    AttributeTooBig,
    InvalidArgument,
    NameExists,
    NoAttribute,
    NotSupported,
    NoXattrSpace,
)
from csvfs.journal.transaction import BlockReader
from csvfs.namespace.inode import Inode
from csvfs.ondisk.block import BadBlock, BlockType, block_address
from csvfs.ondisk.inode import XATTR_BYTES, XATTR_ENTRY, XATTR_HEADER, XATTR_OFFSET

XATTR_CREATE: Final = 1
XATTR_REPLACE: Final = 2
MAX_NAME_BYTES: Final = 255
MAX_VALUE_BYTES: Final = 65536
CAPABILITY: Final = b"security.capability"
"""File capabilities (capabilities(7)): go with set-user-ID when a file is written or given away."""

_NAMESPACES: Final = (b"user.", b"trusted.", b"security.")
_DATA_OFFSET: Final = XATTR_OFFSET + XATTR_HEADER.size


def check_attribute(name: bytes, value: bytes = b"") -> None:
    """Raise `NotSupported`, `InvalidArgument` or `AttributeTooBig` for what cannot be kept."""
    if len(name) > MAX_NAME_BYTES:
        raise AttributeTooBig(f"an attribute name of {len(name)} bytes", value=False)
    if len(value) > MAX_VALUE_BYTES:
        raise AttributeTooBig(f"an attribute value of {len(value)} bytes", value=True)
    for prefix in _NAMESPACES:
        if name.startswith(prefix):
            if len(name) == len(prefix) or b"\0" in name:
                raise InvalidArgument(f"{name!r} cannot be the name of an attribute")
            return
    raise NotSupported(f"the namespace of attribute {name!r} is not kept here")


def unpack_attributes(block: bytes | bytearray) -> dict[bytes, bytes]:
    """The attributes of a verified XATTR block, in their order. Raises `BadBlock`."""
    count, used = XATTR_HEADER.unpack_from(block, XATTR_OFFSET)
    end = _DATA_OFFSET + used
    if used > XATTR_BYTES:
        raise _bad(block, f"{used} bytes in use")
    found: dict[bytes, bytes] = {}
    at = _DATA_OFFSET
    for _ in range(count):
        if at + XATTR_ENTRY.size > end:
            raise _bad(block, f"{count} attributes do not fit in {used} bytes")
        name_length, value_length = XATTR_ENTRY.unpack_from(block, at)
        at += XATTR_ENTRY.size
        name = bytes(block[at : at + name_length])
        at += name_length
        found[name] = bytes(block[at : at + value_length])
        at += value_length
    if at != end or len(found) != count:
        raise _bad(block, f"{count} attributes end at byte {at - _DATA_OFFSET} of {used}")
    return found


def pack_attributes(block: bytearray, attributes: dict[bytes, bytes]) -> None:
    """Replace what an XATTR block holds. Raises `NoXattrSpace`."""
    parts = []
    for name, value in attributes.items():
        parts += [XATTR_ENTRY.pack(len(name), len(value)), name, value]
    data = b"".join(parts)
    if len(data) > XATTR_BYTES:
        raise NoXattrSpace(f"all attributes of a file share {XATTR_BYTES} bytes")
    XATTR_HEADER.pack_into(block, XATTR_OFFSET, len(attributes), len(data))
    block[_DATA_OFFSET:] = data + bytes(XATTR_BYTES - len(data))


def packed_bytes(attributes: dict[bytes, bytes]) -> int:
    """What `attributes` take in the block."""
    return sum(XATTR_ENTRY.size + len(name) + len(value) for name, value in attributes.items())


def with_attribute(
    attributes: dict[bytes, bytes], name: bytes, value: bytes, flags: int
) -> dict[bytes, bytes]:
    """``attributes`` after setxattr(2). Raises `NameExists`, `NoAttribute`, `NoXattrSpace`."""
    if flags & ~(XATTR_CREATE | XATTR_REPLACE) or flags == XATTR_CREATE | XATTR_REPLACE:
        raise InvalidArgument(f"setxattr flags {flags:#x}")
    if flags & XATTR_CREATE and name in attributes:
        raise NameExists(f"attribute {name!r} exists")
    if flags & XATTR_REPLACE and name not in attributes:
        raise NoAttribute(f"no attribute {name!r}")
    changed = {key: kept for key, kept in attributes.items() if key != name}
    changed[name] = value
    if packed_bytes(changed) > XATTR_BYTES:
        raise NoXattrSpace(f"all attributes of a file share {XATTR_BYTES} bytes")
    return changed


# -- parts of bodies -----------------------------------------------------------------------------
def drop_privileges(change: Change, inode: Inode) -> None:
    """What was written, truncated or given away runs with nobody's privileges any more."""
    inode.clear_privileges()
    if inode.xattr_block and not inode.is_directory:
        attributes = read_attributes(change.tx, inode)
        if attributes.pop(CAPABILITY, None) is not None:
            write_attributes(change, inode, attributes)


def read_attributes(reader: BlockReader, inode: Inode) -> dict[bytes, bytes]:
    """All extended attributes. Raises `NeedBlocks`, `BadBlock`."""
    if not inode.xattr_block:
        return {}
    return unpack_attributes(reader.read(inode.xattr_block, BlockType.XATTR, inode.ino))


def write_attributes(change: Change, inode: Inode, attributes: dict[bytes, bytes]) -> None:
    """Replace all extended attributes; the block comes with the first and goes with the last."""
    inode.ctime_ns = change.now_ns
    if not attributes:
        change.drop_block(inode, inode.xattr_block)
        inode.xattr_block = 0
        return
    if inode.xattr_block:
        block = change.tx.edit(inode.xattr_block, BlockType.XATTR, inode.ino)
    else:
        inode.xattr_block, block = change.add_block(inode, BlockType.XATTR)
    pack_attributes(block, attributes)


def _bad(block: bytes | bytearray, reason: str) -> BadBlock:
    return BadBlock(block_address(block), BlockType.XATTR, reason)
