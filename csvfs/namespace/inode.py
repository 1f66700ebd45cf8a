"""The inode in memory: its fields, what stat(2) shows of them, and how they come to be.

Invariants of an inode on disk (asserted by `Inode.check`):
- ``ino`` is the address of its block; ``generation`` is not zero.
- A directory: ``size`` is 0, ``nlink`` is 2 + the number of its subdirectories, or 0 once it was
  removed; ``parent`` is the directory that names it (the root is its own parent); ``entries``
  counts the names in it, "." and ".." not among them.
- Anything else has ``parent`` 0, and as many names as ``nlink`` says.
- ``units`` counts the data units in its extent tree, ``metadata_blocks`` the tree nodes, the xattr
  block and the symlink tail: every block it owns beside its own.
- A symbolic link's target has ``size`` bytes: 3840 in the inode, the rest in one tail block.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Final, Self

from csvfs.errors import InvalidArgument, NameTooLong
from csvfs.ondisk.block import BLOCK_BYTES, UNIT_BYTES, BadBlock, BlockType
from csvfs.ondisk.geometry import ROOT_INODE
from csvfs.ondisk.inode import (
    INODE_FIELDS,
    INODE_FIELDS_OFFSET,
    INODE_ROOT_BYTES,
    INODE_ROOT_OFFSET,
    MAX_NAME_BYTES,
    MAX_SYMLINK_BYTES,
)

MAX_FILE_BYTES: Final = (1 << 63) - 1
"""off_t ends here; so do the kernel's files."""
MAX_LINKS: Final = (1 << 31) - 1
"""As XFS. A field of 32 bits is never led to its end."""

TIME_LIMIT_NS: Final = 1 << 63
"""Times are kept as i64 nanoseconds: from 1677 to 2262."""

_STAT_BLOCK_BYTES: Final = 512
random_bytes: Callable[[int], bytes] = os.urandom
"""Where generations and hash seeds come from; a run that is to be repeated replaces it."""


@dataclass(slots=True)
class Inode:
    """Fields of an inode block, in the order of `INODE_FIELDS`. Times are ns since the epoch."""

    ino: int
    generation: int
    mode: int
    uid: int
    gid: int
    nlink: int
    flags: int
    size: int
    units: int
    metadata_blocks: int
    rdev: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    btime_ns: int
    change: int
    """Grows with every change; what NFS calls the change attribute (RFC 8881 5.8.1.4)."""
    parent: int
    entries: int
    xattr_block: int
    symlink_tail: int
    hash_seed: int

    @classmethod
    def unpack(cls, block: bytes | bytearray | memoryview) -> Self:
        """Fields of a verified inode block."""
        return cls(*INODE_FIELDS.unpack_from(block, INODE_FIELDS_OFFSET))

    def pack_into(self, block: bytearray | memoryview) -> None:
        """Replace the fields of an inode block; header and root area stay."""
        INODE_FIELDS.pack_into(
            block,
            INODE_FIELDS_OFFSET,
            self.ino,
            self.generation,
            self.mode,
            self.uid,
            self.gid,
            self.nlink,
            self.flags,
            self.size,
            self.units,
            self.metadata_blocks,
            self.rdev,
            self.atime_ns,
            self.mtime_ns,
            self.ctime_ns,
            self.btime_ns,
            self.change,
            self.parent,
            self.entries,
            self.xattr_block,
            self.symlink_tail,
            self.hash_seed,
        )

    def copy(self) -> Inode:
        return Inode(
            self.ino,
            self.generation,
            self.mode,
            self.uid,
            self.gid,
            self.nlink,
            self.flags,
            self.size,
            self.units,
            self.metadata_blocks,
            self.rdev,
            self.atime_ns,
            self.mtime_ns,
            self.ctime_ns,
            self.btime_ns,
            self.change,
            self.parent,
            self.entries,
            self.xattr_block,
            self.symlink_tail,
            self.hash_seed,
        )

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_regular(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_symlink(self) -> bool:
        return stat.S_ISLNK(self.mode)

    @property
    def dtype(self) -> int:
        """The type as `readdir` tells it (DT_REG, DT_DIR, ...)."""
        return stat.S_IFMT(self.mode) >> 12

    def touch(self, now_ns: int) -> None:
        """The content changed: mtime and ctime (POSIX "marked for update")."""
        self.mtime_ns = now_ns
        self.ctime_ns = now_ns

    def clear_privileges(self) -> None:
        """What a write, a truncation or a change of owner does to set-ID bits.

        S_ISGID without S_IXGRP once meant mandatory locking and stays (POSIX leaves it open;
        Linux keeps it).
        """
        if self.is_directory:
            return
        self.mode &= ~stat.S_ISUID
        if self.mode & stat.S_IXGRP:
            self.mode &= ~stat.S_ISGID

    @property
    def has_privileges(self) -> bool:
        """True if `clear_privileges` would change something."""
        mode = self.mode
        return bool(mode & stat.S_ISUID) or (
            mode & (stat.S_ISGID | stat.S_IXGRP) == stat.S_ISGID | stat.S_IXGRP
        )

    def check(self, address: int) -> None:
        """Assert what can be seen from the inode alone. Raises `BadBlock`."""
        reason = ""
        if self.ino != address:
            reason = f"it says that it is inode {self.ino}"
        elif not self.generation:
            reason = "its generation is 0"
        elif stat.S_IFMT(self.mode) not in _TYPES:
            reason = f"mode {self.mode:#o} is of no type"
        elif self.size > MAX_FILE_BYTES or (self.is_directory and self.size):
            reason = f"size is {self.size}"
        elif self.is_directory and self.nlink == 1:
            reason = "a directory with one link"
        elif bool(self.parent) != self.is_directory:
            reason = f"parent is {self.parent}"
        if reason:
            raise BadBlock(address, BlockType.INODE, reason)


assert len(fields(Inode)) == 21

_TYPES: Final = frozenset(
    (
        stat.S_IFREG,
        stat.S_IFDIR,
        stat.S_IFLNK,
        stat.S_IFIFO,
        stat.S_IFSOCK,
        stat.S_IFCHR,
        stat.S_IFBLK,
    )
)


@dataclass(frozen=True, slots=True)
class Attributes:
    """What stat(2) tells, with the generation. Times are ns since the epoch."""

    ino: int
    generation: int
    mode: int
    uid: int
    gid: int
    nlink: int
    size: int
    blocks: int
    """Of 512 bytes, as st_blocks."""
    rdev: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    btime_ns: int

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)


def attributes_of(inode: Inode) -> Attributes:
    """An inode as stat(2) shows it."""
    metadata_bytes = inode.metadata_blocks * BLOCK_BYTES
    is_directory = inode.is_directory
    return Attributes(
        inode.ino,
        inode.generation,
        inode.mode,
        inode.uid,
        inode.gid,
        inode.nlink,
        BLOCK_BYTES + metadata_bytes if is_directory else inode.size,
        (inode.units * UNIT_BYTES + metadata_bytes) // _STAT_BLOCK_BYTES,
        inode.rdev,
        inode.atime_ns,
        inode.mtime_ns,
        inode.ctime_ns,
        inode.btime_ns,
    )


@dataclass(frozen=True, slots=True)
class SetAttributes:
    """What setattr is to change; None leaves a field alone. Times are ns since the epoch."""

    mode: int | None = None
    """Permission bits and set-ID bits; a type in it is ignored."""
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


def new_inode(
    ino: int, mode: int, uid: int, gid: int, now_ns: int, *, parent: Inode | None, rdev: int = 0
) -> Inode:
    """A fresh inode below ``parent``, linked once (a directory: twice).

    A set-group-ID directory hands down its group, and to directories the bit itself, as on every
    System V heritage. ``parent`` None makes the root.
    """
    is_directory = stat.S_ISDIR(mode)
    if parent is not None and parent.mode & stat.S_ISGID:
        gid = parent.gid
        if is_directory:
            mode |= stat.S_ISGID
    return Inode(
        ino=ino,
        generation=int.from_bytes(random_bytes(4), "little") or 1,
        mode=mode,
        uid=uid,
        gid=gid,
        nlink=2 if is_directory else 1,
        flags=0,
        size=0,
        units=0,
        metadata_blocks=0,
        rdev=rdev,
        atime_ns=now_ns,
        mtime_ns=now_ns,
        ctime_ns=now_ns,
        btime_ns=now_ns,
        change=1,
        parent=(ROOT_INODE if parent is None else parent.ino) if is_directory else 0,
        entries=0,
        xattr_block=0,
        symlink_tail=0,
        hash_seed=int.from_bytes(random_bytes(8), "little") if is_directory else 0,
    )


def within_time(time_ns: int) -> int:
    """The nearest time that can be kept, as Linux clamps to what a filesystem has."""
    return max(-TIME_LIMIT_NS, min(TIME_LIMIT_NS - 1, time_ns))


def check_name(name: bytes) -> None:
    """Raise `NameTooLong` or `InvalidArgument` for what cannot be an entry's name."""
    if len(name) > MAX_NAME_BYTES:
        raise NameTooLong(f"a name of {len(name)} bytes; the limit is {MAX_NAME_BYTES}")
    if not name or name in (b".", b"..") or b"/" in name or b"\0" in name:
        raise InvalidArgument(f"{name!r} cannot be the name of an entry")


def split_target(target: bytes) -> tuple[bytes, bytes]:
    """A symbolic link's target as (part in the inode, part in the tail block).

    Raises `NameTooLong` above 4095 bytes, `InvalidArgument` for an empty one or one with a NUL.
    """
    if len(target) > MAX_SYMLINK_BYTES:
        raise NameTooLong(f"a link target of {len(target)} bytes; the limit is {MAX_SYMLINK_BYTES}")
    if not target or b"\0" in target:
        raise InvalidArgument("a link target is not empty and holds no NUL")
    return target[:INODE_ROOT_BYTES], target[INODE_ROOT_BYTES:]


def root_area(block: bytearray) -> memoryview:
    """The root node's place in an inode block."""
    return memoryview(block)[INODE_ROOT_OFFSET:]
