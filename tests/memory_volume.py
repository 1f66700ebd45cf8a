"""A volume in memory, to prove the FUSE side by itself, and a process that mounts it.

It has the calls and the errors of a volume, POSIX as far as the tests go, and nothing else: no
permissions (the kernel checks them), no locks (no call awaits anything).

    python -m tests.memory_volume DIR [--trouble]

mounts one until it is unmounted, and `memory_mount` runs that. With ``--trouble``, names and data
that begin with ``boom`` make calls raise what no volume may raise. A lookup of a name that begins
with ``wait`` is answered once there is a file ``go``. statvfs(3) counts the inodes in ``f_files``.
Setting the attribute ``user.grow`` makes a file longer without the kernel's knowledge.
"""

from __future__ import annotations

import itertools
import logging
import os
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pyfuse3
import trio

from csvfs import errors
from csvfs.host import mountpoint
from csvfs.host.fuse import mount_options, prepare, serve
from csvfs.namespace.inode import Attributes, SetAttributes
from csvfs.operations import Operations
from tests.tgt import wait_until

ROOT = 1


@dataclass
class Node:
    """An inode, and the attributes of it that a volume tells."""

    ino: int
    mode: int
    uid: int = 0
    gid: int = 0
    rdev: int = 0
    generation: int = 1
    nlink: int = 1
    data: bytearray = field(default_factory=bytearray)
    target: bytes = b""
    names: dict[bytes, tuple[int, int]] = field(default_factory=dict)
    """name -> (cookie, ino)"""
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    lookups: int = 0
    opens: int = 0
    atime_ns: int = field(default_factory=time.time_ns)
    mtime_ns: int = field(default_factory=time.time_ns)
    ctime_ns: int = field(default_factory=time.time_ns)

    def attributes(self) -> Attributes:
        return Attributes(
            self.ino,
            self.generation,
            self.mode,
            self.uid,
            self.gid,
            self.nlink,
            len(self.data) or len(self.target),
            -(-len(self.data) // 512),
            self.rdev,
            self.atime_ns,
            self.mtime_ns,
            self.ctime_ns,
            self.ctime_ns,
        )


@dataclass(frozen=True)
class Listed:
    name: bytes
    cookie: int
    attributes: Attributes


@dataclass(eq=False)
class OpenNode:
    ino: int
    flags: int


@dataclass(frozen=True)
class MemorySpace:
    block_bytes: int = 4096
    blocks: int = 1000
    free_blocks: int = 600
    available_blocks: int = 500
    files: int = 0
    free_files: int = 90


class MemoryVolume:
    """Satisfies `csvfs.operations.Filesystem`."""

    def __init__(self, *, trouble: bool = False) -> None:
        self._trouble = trouble
        self._inos = itertools.count(2)
        self._cookies = itertools.count(256)
        self.nodes = {ROOT: Node(ROOT, stat.S_IFDIR | 0o755, nlink=2, lookups=1)}
        self._go = trio.Event()

    # -- lookup counts ---------------------------------------------------------------------
    def remember(self, ino: int, count: int) -> None:
        self.nodes[ino].lookups += count

    async def forget(self, ino: int, count: int) -> None:
        node = self.nodes[ino]
        node.lookups -= count
        assert node.lookups >= 0, f"inode {ino} was forgotten more often than looked up"
        self._reap(node)

    def gone(self, ino: int) -> None:
        """Nobody else is here."""

    def used(self, ino: int) -> None:
        """Nobody else is here."""

    def _reap(self, node: Node) -> None:
        if node.nlink == 0 and not node.lookups and not node.opens:
            del self.nodes[node.ino]

    # -- names -----------------------------------------------------------------------------
    def _node(self, ino: int) -> Node:
        try:
            return self.nodes[ino]
        except KeyError:
            raise errors.StaleInode(f"inode {ino} is gone") from None

    def _directory(self, ino: int) -> Node:
        node = self._node(ino)
        if not stat.S_ISDIR(node.mode):
            raise errors.NotADirectory(str(ino))
        return node

    def _child(self, parent: int, name: bytes) -> Node:
        if self._trouble and name.startswith(b"boom"):
            raise RuntimeError(f"trouble with {name!r}")
        try:
            return self.nodes[self._directory(parent).names[name][1]]
        except KeyError:
            raise errors.NotFound(repr(name)) from None

    def _make(self, parent: int, name: bytes, mode: int, uid: int, gid: int, rdev: int = 0) -> Node:
        directory = self._directory(parent)
        if len(name) > 255:
            raise errors.NameTooLong(repr(name))
        if name in directory.names:
            raise errors.NameExists(repr(name))
        if name == b"go":
            self._go.set()
        node = Node(next(self._inos), mode, uid, gid, rdev)
        self.nodes[node.ino] = node
        directory.names[name] = next(self._cookies), node.ino
        if stat.S_ISDIR(mode):
            node.nlink = 2
            directory.nlink += 1
        return node

    async def lookup(self, parent: int, name: bytes) -> Attributes:
        if name.startswith(b"wait"):
            await self._go.wait()
            raise errors.NotFound(repr(name))
        return self._child(parent, name).attributes()

    async def readlink(self, ino: int) -> bytes:
        return self._node(ino).target

    async def mknod(
        self, parent: int, name: bytes, mode: int, rdev: int, uid: int, gid: int
    ) -> Attributes:
        return self._make(parent, name, mode, uid, gid, rdev).attributes()

    async def mkdir(self, parent: int, name: bytes, mode: int, uid: int, gid: int) -> Attributes:
        return self._make(parent, name, stat.S_IFDIR | mode, uid, gid).attributes()

    async def symlink(
        self, parent: int, name: bytes, target: bytes, uid: int, gid: int
    ) -> Attributes:
        node = self._make(parent, name, stat.S_IFLNK | 0o777, uid, gid)
        node.target = target
        return node.attributes()

    async def link(self, ino: int, parent: int, name: bytes) -> Attributes:
        node = self._node(ino)
        if name in self._directory(parent).names:
            raise errors.NameExists(repr(name))
        self._directory(parent).names[name] = next(self._cookies), ino
        node.nlink += 1
        return node.attributes()

    async def unlink(self, parent: int, name: bytes) -> None:
        node = self._child(parent, name)
        if stat.S_ISDIR(node.mode):
            raise errors.IsADirectory(repr(name))
        del self._directory(parent).names[name]
        node.nlink -= 1
        self._reap(node)

    async def rmdir(self, parent: int, name: bytes) -> None:
        node = self._child(parent, name)
        if not stat.S_ISDIR(node.mode):
            raise errors.NotADirectory(repr(name))
        if node.names:
            raise errors.NotEmpty(repr(name))
        del self._directory(parent).names[name]
        self._directory(parent).nlink -= 1
        node.nlink = 0
        self._reap(node)

    async def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int
    ) -> None:
        old, new = self._directory(parent).names, self._directory(new_parent).names
        moved = self._child(parent, name)
        if flags & pyfuse3.RENAME_EXCHANGE:
            other = self._child(new_parent, new_name)
            old[name] = old[name][0], other.ino
            new[new_name] = new[new_name][0], moved.ino
            return
        if new_name in new:
            if flags & pyfuse3.RENAME_NOREPLACE:
                raise errors.NameExists(repr(new_name))
            await self.unlink(new_parent, new_name)
        del old[name]
        new[new_name] = next(self._cookies), moved.ino

    # -- attributes ------------------------------------------------------------------------
    async def getattr(self, ino: int) -> Attributes:
        return self._node(ino).attributes()

    async def setattr(self, ino: int, changes: SetAttributes) -> Attributes:
        node = self._node(ino)
        if changes.mode is not None:
            node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(changes.mode)
        for name in ("uid", "gid", "atime_ns", "mtime_ns"):
            value = getattr(changes, name)
            if value is not None:
                setattr(node, name, value)
        if changes.size is not None:
            node.data[changes.size :] = bytes(max(0, changes.size - len(node.data)))
        return node.attributes()

    async def statfs(self) -> MemorySpace:
        return MemorySpace(files=len(self.nodes))

    async def setxattr(self, ino: int, name: bytes, value: bytes) -> None:
        if name == b"user.grow":
            self._node(ino).data.extend(bytes(int(value)))
            return
        self._node(ino).xattrs[name] = value

    async def getxattr(self, ino: int, name: bytes) -> bytes:
        try:
            return self._node(ino).xattrs[name]
        except KeyError:
            raise errors.NoAttribute(repr(name)) from None

    async def listxattr(self, ino: int) -> list[bytes]:
        return list(self._node(ino).xattrs)

    async def removexattr(self, ino: int, name: bytes) -> None:
        if self._node(ino).xattrs.pop(name, None) is None:
            raise errors.NoAttribute(repr(name))

    async def readdir(self, ino: int, cookie: int, limit: int) -> list[Listed]:
        node = self._directory(ino)
        every = [
            Listed(b".", 1, node.attributes()),
            Listed(b"..", 2, self.nodes[ROOT].attributes()),
        ]
        every += [
            Listed(name, at, self.nodes[n].attributes()) for name, (at, n) in node.names.items()
        ]
        every.sort(key=lambda each: each.cookie)
        return [each for each in every if each.cookie > cookie][:limit]

    # -- files -----------------------------------------------------------------------------
    async def create(
        self, parent: int, name: bytes, mode: int, flags: int, uid: int, gid: int
    ) -> tuple[OpenNode, Attributes]:
        node = self._make(parent, name, stat.S_IFREG | mode, uid, gid)
        node.opens += 1
        return OpenNode(node.ino, flags), node.attributes()

    async def open(self, ino: int, flags: int, uid: int) -> OpenNode:  # noqa: ARG002
        node = self._node(ino)
        node.opens += 1
        if flags & os.O_TRUNC:
            node.data.clear()
        return OpenNode(ino, flags)

    async def release(self, handle: OpenNode) -> None:
        node = self._node(handle.ino)
        node.opens -= 1
        self._reap(node)

    async def read(self, handle: OpenNode, offset: int, size: int) -> bytes:
        return bytes(self._node(handle.ino).data[offset : offset + size])

    async def write(self, handle: OpenNode, offset: int, data: bytes) -> int:
        if self._trouble and data.startswith(b"boom"):
            raise RuntimeError("trouble with data")
        content = self._node(handle.ino).data
        if handle.flags & os.O_APPEND:
            offset = len(content)
        content.extend(bytes(max(0, offset - len(content))))
        content[offset : offset + len(data)] = data
        return len(data)

    async def fsync(self, ino: int, datasync: bool) -> None:
        self._node(ino).xattrs[b"user.synced"] = b"data" if datasync else b"all"

    async def fsyncdir(self, ino: int, datasync: bool) -> None:
        await self.fsync(ino, datasync)


@contextmanager
def memory_mount(*, trouble: bool = False) -> Iterator[tuple[Path, Path]]:
    """A fresh volume mounted by a process of its own; yields its directory and its log."""
    with tempfile.TemporaryDirectory(prefix="csvfs-memory-") as base:
        directory, log = Path(base, "mnt"), Path(base, "log")
        directory.mkdir()
        os.chmod(base, 0o755)  # for tests that come as another user
        command = [sys.executable, "-m", __name__, str(directory)]
        with log.open("wb") as out:
            process = subprocess.Popen(
                command + ["--trouble"] * trouble, stdout=out, stderr=out, start_new_session=True
            )
        try:
            wait_until(
                lambda: process.poll() is not None or mountpoint.find(str(directory)) is not None,
                "the memory volume's mount",
            )
            os.stat(directory)  # answered once it is served, and so prepared
            yield directory, log
            mountpoint.unmount(str(directory))
            assert process.wait(10) == 0, log.read_text()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            if mountpoint.find(str(directory)) is not None:
                mountpoint.detach(str(directory))


def main() -> None:
    """Mount a fresh volume until it is unmounted."""
    logging.basicConfig(format="%(levelname)s %(message)s")
    directory, trouble = sys.argv[1], "--trouble" in sys.argv
    volume = MemoryVolume(trouble=trouble)
    pyfuse3.init(Operations(volume), directory, mount_options("memory", set()))
    prepare(directory)
    try:
        trio.run(serve)
    finally:
        pyfuse3.close()


if __name__ == "__main__":
    main()
