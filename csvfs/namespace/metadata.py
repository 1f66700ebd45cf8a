"""Attributes of inodes: stat, chmod, chown, utimens, extended attributes.

Who may do what is checked by the kernel (default_permissions). What is left to the filesystem is
what a change brings with it: ctime, and the loss of set-ID bits and file capabilities when the
owner changes (POSIX.1-2017 chown).
"""

from __future__ import annotations

import stat
from typing import Final

from csvfs.data.truncation import Truncation
from csvfs.engine.change import Change
from csvfs.engine.engine import Engine
from csvfs.engine.glance import Glance
from csvfs.errors import NoAttribute
from csvfs.namespace.inode import Attributes, SetAttributes, attributes_of, within_time
from csvfs.namespace.inode_table import InodeState
from csvfs.namespace.xattrs import (
    check_attribute,
    drop_privileges,
    read_attributes,
    with_attribute,
    write_attributes,
)

_PERMISSIONS: Final = 0o7777


class Metadata:
    """Operations on attributes. Each raises `csvfs.errors.FilesystemError` and its kinds."""

    def __init__(self, engine: Engine, glance: Glance, truncation: Truncation) -> None:
        self._engine = engine
        self._glance = glance
        self._truncation = truncation

    async def getattr(self, ino: int) -> Attributes:
        """What stat(2) tells. Raises `StaleInode`."""
        return await self._glance.attributes(ino)

    async def setattr(self, ino: int, changes: SetAttributes) -> Attributes:
        """chmod, chown, truncate and utimens, any of them at once. A new size comes first.

        Raises `IsADirectory`, `InvalidArgument` and `FileTooBig` for a size that cannot be.
        """
        async with self._engine.alone(ino) as state:
            if changes.size is not None:
                await self._truncation.truncate(state, changes.size)
            if changes != SetAttributes(size=changes.size):
                await self._engine.change(lambda change: _set(change, ino, changes))
                _look_again(state)
            return attributes_of(state.fields())

    # -- extended attributes -----------------------------------------------------------------
    async def getxattr(self, ino: int, name: bytes) -> bytes:
        """The value of an attribute. Raises `NoAttribute`, `NotSupported`."""
        check_attribute(name)
        value = (await self._attributes(ino)).get(name)
        if value is None:
            raise NoAttribute(f"inode {ino} has no attribute {name!r}")
        return value

    async def listxattr(self, ino: int) -> list[bytes]:
        """The names of all attributes, in the order in which they were set."""
        return list(await self._attributes(ino))

    async def _attributes(self, ino: int) -> dict[bytes, bytes]:
        async with self._engine.looking(ino) as state:
            inode = state.fields()
            if not inode.xattr_block:
                return {}
            return await self._engine.look(lambda reader: read_attributes(reader, inode))

    async def setxattr(self, ino: int, name: bytes, value: bytes, flags: int = 0) -> None:
        """Set an attribute; ``flags`` as in setxattr(2).

        Raises `NotSupported`, `NameExists`, `NoAttribute`, `AttributeTooBig`, `NoXattrSpace`.
        """
        check_attribute(name, value)

        def body(change: Change) -> None:
            inode = change.inode(ino)
            before = read_attributes(change.tx, inode)
            write_attributes(change, inode, with_attribute(before, name, value, flags))

        async with self._engine.alone(ino) as state:
            await self._engine.change(body)
            _look_again(state)

    async def removexattr(self, ino: int, name: bytes) -> None:
        """Remove an attribute. Raises `NoAttribute`, `NotSupported`."""
        check_attribute(name)

        def body(change: Change) -> None:
            inode = change.inode(ino)
            left = read_attributes(change.tx, inode)
            if left.pop(name, None) is None:
                raise NoAttribute(f"inode {ino} has no attribute {name!r}")
            write_attributes(change, inode, left)

        async with self._engine.alone(ino):
            await self._engine.change(body, privileged=True)


def _set(change: Change, ino: int, changes: SetAttributes) -> None:
    inode = change.inode(ino, data=False)
    inode.ctime_ns = change.now_ns
    if changes.uid is not None or changes.gid is not None:
        inode.uid = inode.uid if changes.uid is None else changes.uid
        inode.gid = inode.gid if changes.gid is None else changes.gid
        drop_privileges(change, inode)
    if changes.mode is not None:
        inode.mode = stat.S_IFMT(inode.mode) | changes.mode & _PERMISSIONS
    if changes.atime_ns is not None:
        inode.atime_ns = within_time(changes.atime_ns)
    if changes.mtime_ns is not None:
        inode.mtime_ns = within_time(changes.mtime_ns)


def _look_again(state: InodeState) -> None:
    """The next write has to see whether there are privileges to drop."""
    if state.file is not None:
        state.file.unprivileged = False
