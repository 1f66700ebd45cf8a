"""What a volume must do, written the short way: a tree of Python objects, POSIX as it is written.

Every method either changes the model and returns what the volume's must return (as far as it is
compared), or raises the same `csvfs.errors.FilesystemError` and changes nothing.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

from csvfs import errors
from csvfs.namespace.inode import SetAttributes
from csvfs.namespace.rename import EXCHANGE, NOREPLACE


@dataclass(eq=False)
class Node:
    """An inode of any kind."""

    mode: int
    nlink: int = 1
    uid: int = 0
    gid: int = 0
    data: bytearray = field(default_factory=bytearray)
    names: dict[bytes, Node] = field(default_factory=dict)
    parent: Node | None = None
    target: bytes = b""
    xattrs: dict[bytes, bytes] = field(default_factory=dict)

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def size(self) -> int:
        return len(self.target) or len(self.data)


@dataclass(eq=False)
class OpenFile:
    """A handle."""

    node: Node
    flags: int

    @property
    def append(self) -> bool:
        return bool(self.flags & os.O_APPEND)


def check_name(name: bytes) -> None:
    if len(name) > 255:
        raise errors.NameTooLong
    if name in (b"", b".", b"..") or b"/" in name:
        raise errors.InvalidArgument


class Model:
    """The volume."""

    def __init__(self) -> None:
        self.root = Node(stat.S_IFDIR | 0o755, 2)
        self.root.parent = self.root

    # -- names -----------------------------------------------------------------------------
    def lookup(self, parent: Node, name: bytes) -> Node:
        self._directory(parent)
        if name == b".":
            return parent
        if name == b"..":
            assert parent.parent is not None
            if parent.nlink == 0:
                raise errors.NotFound  # a directory that was removed is below nothing
            return parent.parent
        check_name(name)
        if name not in parent.names:
            raise errors.NotFound
        return parent.names[name]

    def _directory(self, node: Node) -> None:
        if not node.is_directory:
            raise errors.NotADirectory

    def _require_absent(self, parent: Node, name: bytes) -> None:
        if parent.nlink == 0:
            raise errors.NotFound
        if name in parent.names:
            raise errors.NameExists

    def make(self, parent: Node, name: bytes, mode: int, *, target: bytes = b"") -> Node:
        check_name(name)
        self._directory(parent)
        self._require_absent(parent, name)
        node = Node(mode, target=target, parent=parent)
        node.gid = parent.gid if parent.mode & stat.S_ISGID else 0
        if node.is_directory:
            node.mode |= parent.mode & stat.S_ISGID
            node.nlink = 2
            parent.nlink += 1
        parent.names[name] = node
        return node

    def create(self, parent: Node, name: bytes, mode: int, flags: int) -> OpenFile:
        check_name(name)
        self._directory(parent)
        if name not in parent.names:
            return OpenFile(self.make(parent, name, stat.S_IFREG | mode), flags)
        if flags & os.O_EXCL:
            raise errors.NameExists
        return self.open(parent.names[name], flags)

    def link(self, node: Node, parent: Node, name: bytes) -> Node:
        check_name(name)
        if node.is_directory:
            raise errors.NotPermitted
        self._directory(parent)
        self._require_absent(parent, name)
        if node.nlink == 0:
            raise errors.StaleInode
        node.nlink += 1
        parent.names[name] = node
        return node

    def unlink(self, parent: Node, name: bytes) -> None:
        node = self._named(parent, name)
        if node.is_directory:
            raise errors.IsADirectory
        node.nlink -= 1
        del parent.names[name]

    def rmdir(self, parent: Node, name: bytes) -> None:
        node = self._named(parent, name)
        if not node.is_directory:
            raise errors.NotADirectory
        if node.names:
            raise errors.NotEmpty
        node.nlink = 0
        parent.nlink -= 1
        del parent.names[name]

    def _named(self, parent: Node, name: bytes) -> Node:
        self._directory(parent)
        check_name(name)
        if name not in parent.names:
            raise errors.NotFound
        return parent.names[name]

    def rename(self, parent: Node, name: bytes, new: Node, new_name: bytes, flags: int) -> None:
        if flags not in (0, NOREPLACE, EXCHANGE):
            raise errors.InvalidArgument
        check_name(name)
        check_name(new_name)
        self._directory(parent)
        self._directory(new)
        if name not in parent.names:
            raise errors.NotFound
        moved, other = parent.names[name], new.names.get(new_name)
        if moved in self._path_up(new):
            raise errors.InvalidArgument
        if other is not None and parent is not new and other in self._path_up(parent):
            if flags == EXCHANGE:
                raise errors.InvalidArgument
            raise errors.NameExists if flags == NOREPLACE else errors.NotEmpty
        if other is moved:
            if flags == NOREPLACE:
                raise errors.NameExists
            return
        if new.nlink == 0 or (flags == EXCHANGE and other is None):
            raise errors.NotFound
        if flags == EXCHANGE:
            assert other is not None
            parent.names[name], new.names[new_name] = other, moved
            self._move(other, new, parent)
        elif other is not None:
            self._replace(moved, other, new, flags)
            new.names[new_name] = moved
            del parent.names[name]
        else:
            del parent.names[name]
            new.names[new_name] = moved
        self._move(moved, parent, new)

    def _replace(self, moved: Node, other: Node, parent: Node, flags: int) -> None:
        if flags == NOREPLACE:
            raise errors.NameExists
        if moved.is_directory and not other.is_directory:
            raise errors.NotADirectory
        if other.is_directory and not moved.is_directory:
            raise errors.IsADirectory
        if other.names:
            raise errors.NotEmpty
        other.nlink = 0 if other.is_directory else other.nlink - 1
        parent.nlink -= other.is_directory

    def _move(self, node: Node, old: Node, new: Node) -> None:
        if node.is_directory:
            old.nlink -= 1
            new.nlink += 1
            node.parent = new

    def _path_up(self, node: Node) -> Iterator[Node]:
        while node is not self.root:
            yield node
            assert node.parent is not None
            node = node.parent
        yield node

    def readdir(self, node: Node) -> list[bytes]:
        self._directory(node)
        return sorted(node.names)

    def readlink(self, node: Node) -> bytes:
        if not stat.S_ISLNK(node.mode):
            raise errors.InvalidArgument
        return node.target

    # -- attributes ------------------------------------------------------------------------
    def setattr(self, node: Node, changes: SetAttributes) -> Node:
        if changes.size is not None:
            self.truncate(node, changes.size)
        if changes.uid is not None:
            node.uid = changes.uid
            if not node.is_directory:
                node.mode &= ~stat.S_ISUID
                if node.mode & stat.S_IXGRP:
                    node.mode &= ~stat.S_ISGID
        if changes.mode is not None:
            node.mode = stat.S_IFMT(node.mode) | changes.mode
        return node

    def truncate(self, node: Node, size: int) -> None:
        if node.is_directory:
            raise errors.IsADirectory
        if not node.is_file:
            raise errors.InvalidArgument
        node.data[size:] = bytes(max(0, size - len(node.data)))

    def setxattr(self, node: Node, name: bytes, value: bytes) -> None:
        left = {key: kept for key, kept in node.xattrs.items() if key != name}
        left[name] = value
        if sum(4 + len(key) + len(kept) for key, kept in left.items()) > 4024:
            raise errors.NoXattrSpace
        node.xattrs = left

    def removexattr(self, node: Node, name: bytes) -> None:
        if name not in node.xattrs:
            raise errors.NoAttribute
        del node.xattrs[name]

    # -- files -----------------------------------------------------------------------------
    def open(self, node: Node, flags: int) -> OpenFile:
        if node.is_directory:
            raise errors.IsADirectory
        if not node.is_file:
            raise errors.InvalidArgument
        if flags & os.O_TRUNC and flags & os.O_ACCMODE != os.O_RDONLY:
            node.data.clear()
        return OpenFile(node, flags)

    def write(self, handle: OpenFile, offset: int, data: bytes) -> int:
        if handle.flags & os.O_ACCMODE == os.O_RDONLY:
            raise errors.BadHandle
        content = handle.node.data
        offset = len(content) if handle.append else offset
        if data:
            content.extend(bytes(max(0, offset - len(content))))
            content[offset : offset + len(data)] = data
        return len(data)

    def read(self, handle: OpenFile, offset: int, length: int) -> bytes:
        if handle.flags & os.O_ACCMODE == os.O_WRONLY:
            raise errors.BadHandle
        return bytes(handle.node.data[offset : offset + length])
