"""FUSE requests become calls of a volume: `pyfuse3.Operations` over `Volume`.

Theory. The kernel keeps nothing that another host may change: entry and attribute timeouts are 0,
negative entries are not cached, every open is DIRECT_IO without KEEP_CACHE. So each system call
on a path or a descriptor asks this class, and each question is answered exactly once.

Invariants
- No handler raises anything but `FUSEError`: any other exception would end pyfuse3's loop, and
  with it every request of every guest. `csvfs.host.answers` maps errors to errno.
- A lookup count is raised for every entry that a reply carries, and only then ("." and ".." never).
- A file handle number is never reused within a mount.
- Nothing is answered without a lease: whoever was frozen may have been succeeded meanwhile, and
  what it has cached, or has just read, is old. It is looked at last, when all else is done.

What pyfuse3 does not show, and what follows: write() carries no flags, so O_APPEND, O_SYNC,
O_DSYNC and O_DIRECT count as given to open(2) (RWF_* and F_SETFL cannot be served); O_TRUNC comes
with open and no SETATTR; the caller of a write is unknown, so whether it clears set-user-id bits
is decided by who opened the file.

Concurrency. pyfuse3 runs each request in a task of its own; the only state here are the tables of
open files and directories, changed between awaits. Nothing is cancelled but by the end of the loop.
"""

# ruff: noqa: ARG002 -- the signatures are pyfuse3's

from __future__ import annotations

import errno
import functools
import itertools
import os
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, Final, Generic, ParamSpec, Protocol, TypeVar

import pyfuse3
from pyfuse3 import (
    EntryAttributes,
    FileInfo,
    FUSEError,
    ReaddirToken,
    RequestContext,
    SetattrFields,
    StatvfsData,
)

from csvfs.errors import StaleInode
from csvfs.host.answers import Answers, Space, entry_attributes, statvfs_data
from csvfs.namespace.inode import Attributes, SetAttributes
from csvfs.ondisk.inode import MAX_NAME_BYTES

P = ParamSpec("P")
R = TypeVar("R")

_DIRECT_MASK: Final = 511
_READDIR_BATCH: Final = 32
"""Entries asked for at once: what fits in the page that the kernel offers, and not much more."""
_DOTS: Final = frozenset((b".", b".."))
_TRUSTED: Final = b"trusted."


class Entry(Protocol):
    """A directory entry; ``cookie`` is where the listing goes on behind it."""

    @property
    def name(self) -> bytes: ...
    @property
    def cookie(self) -> int: ...
    @property
    def attributes(self) -> Attributes: ...


class Handle(Protocol):
    """An open file of a volume: O_APPEND and O_TRUNC of its flags are the volume's business."""

    @property
    def ino(self) -> int: ...


class Lease(Protocol):
    """How long this node may answer from what it knows (DESIGN.md section 4)."""

    def valid(self) -> bool:
        """Whether it runs now."""
        ...

    async def wait_valid(self) -> None:
        """Return when it runs again. Raises when that will never be."""
        ...


class Unlimited:
    """The lease of a volume that no other node can take."""

    def valid(self) -> bool:
        return True

    async def wait_valid(self) -> None:
        return


H = TypeVar("H", bound=Handle)


class Filesystem(Protocol[H]):
    """What is asked of a volume. Every call may raise a `csvfs.errors.FilesystemError`."""

    def remember(self, ino: int, count: int) -> None: ...
    async def forget(self, ino: int, count: int) -> None: ...
    async def lookup(self, parent: int, name: bytes) -> Attributes: ...
    def gone(self, ino: int) -> None: ...
    def used(self, ino: int) -> None: ...
    async def readlink(self, ino: int) -> bytes: ...
    async def mknod(
        self, parent: int, name: bytes, mode: int, rdev: int, uid: int, gid: int
    ) -> Attributes: ...
    async def mkdir(
        self, parent: int, name: bytes, mode: int, uid: int, gid: int
    ) -> Attributes: ...
    async def symlink(
        self, parent: int, name: bytes, target: bytes, uid: int, gid: int
    ) -> Attributes: ...
    async def link(self, ino: int, parent: int, name: bytes) -> Attributes: ...
    async def unlink(self, parent: int, name: bytes) -> None: ...
    async def rmdir(self, parent: int, name: bytes) -> None: ...
    async def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int
    ) -> None: ...
    async def getattr(self, ino: int) -> Attributes: ...
    async def setattr(self, ino: int, changes: SetAttributes) -> Attributes: ...
    async def statfs(self) -> Space: ...
    async def setxattr(self, ino: int, name: bytes, value: bytes) -> None: ...
    async def getxattr(self, ino: int, name: bytes) -> bytes: ...
    async def listxattr(self, ino: int) -> Sequence[bytes]: ...
    async def removexattr(self, ino: int, name: bytes) -> None: ...
    async def readdir(self, ino: int, cookie: int, limit: int) -> Sequence[Entry]: ...
    async def create(
        self, parent: int, name: bytes, mode: int, flags: int, uid: int, gid: int
    ) -> tuple[H, Attributes]: ...
    async def open(self, ino: int, flags: int, uid: int) -> H: ...
    async def release(self, handle: H) -> None: ...
    async def read(self, handle: H, offset: int, size: int) -> bytes | bytearray | memoryview: ...

    async def write(self, handle: H, offset: int, data: bytes) -> int: ...
    async def fsync(self, ino: int, datasync: bool) -> None: ...
    async def fsyncdir(self, ino: int, datasync: bool) -> None: ...


@dataclass(slots=True)
class OpenFile(Generic[H]):
    """What an open(2) asked for that later requests do not repeat."""

    handle: H
    direct: bool
    datasync: bool | None
    """How each write is made stable before it is answered: None (not at all), data only, or all."""


Self_ = TypeVar("Self_", bound="Operations[Any]")
Handler = Callable[Concatenate[Self_, P], Coroutine[Any, Any, R]]


def answered(handler: Handler[Self_, P, R]) -> Handler[Self_, P, R]:
    """A handler that raises nothing but `FUSEError`, whatever the volume raises."""
    name = handler.__name__

    @functools.wraps(handler)
    async def answering(self: Self_, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            answer = await handler(self, *args, **kwargs)
            if not self._lease.valid():
                await self._lease.wait_valid()
            if isinstance(args[0], int):
                self._volume.used(args[0])
            return answer
        except FUSEError:
            if not self._lease.valid():
                await self._wait_lease()
            raise
        except Exception as error:
            if not self._lease.valid():
                await self._wait_lease()
            if isinstance(error, StaleInode) and isinstance(args[0], int):
                self._volume.gone(args[0])
            raise self._answers.to(f"{name}({args[0]})", error) from None

    return answering


class Operations(pyfuse3.Operations, Generic[H]):
    """Every request that pyfuse3 passes on, answered by one volume."""

    supports_dot_lookup = True
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, volume: Filesystem[H], lease: Lease | None = None) -> None:
        super().__init__()
        self._volume = volume
        self._lease = lease or Unlimited()
        self._answers = Answers()
        self._files: dict[int, OpenFile[H]] = {}
        self._directories: dict[int, int] = {}
        self._numbers = itertools.count(1)

    def check(self) -> None:
        """Assert the invariants that can be seen from here."""
        assert not self._files.keys() & self._directories.keys()

    @property
    def open_files(self) -> int:
        """How many open(2) have seen no release yet."""
        return len(self._files)

    async def _wait_lease(self) -> None:
        """Before an error is answered, which may be as old as any other answer."""
        try:
            await self._lease.wait_valid()
        except Exception as error:
            raise self._answers.to("lease", error) from None

    # -- names -----------------------------------------------------------------------------
    @answered
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        attributes = await self._volume.lookup(parent_inode, name)
        return self._known(attributes)

    def _known(self, attributes: Attributes) -> EntryAttributes:
        """The reply that tells the kernel of an inode: its lookup count goes up by one."""
        self._volume.remember(attributes.ino, 1)
        return entry_attributes(attributes)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for ino, count in inode_list:
            try:
                await self._volume.forget(ino, count)
            except Exception as error:
                self._answers.to(f"forget({ino})", error)  # nobody waits for an answer: log it

    @answered
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        return await self._volume.readlink(inode)

    @answered
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        made = await self._volume.mknod(parent_inode, name, mode, rdev, ctx.uid, ctx.gid)
        return self._known(made)

    @answered
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext
    ) -> EntryAttributes:
        made = await self._volume.mkdir(parent_inode, name, mode, ctx.uid, ctx.gid)
        return self._known(made)

    @answered
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        made = await self._volume.symlink(parent_inode, name, target, ctx.uid, ctx.gid)
        return self._known(made)

    @answered
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        return self._known(await self._volume.link(inode, new_parent_inode, new_name))

    @answered
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        await self._volume.unlink(parent_inode, name)

    @answered
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        await self._volume.rmdir(parent_inode, name)

    @answered
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        if flags & ~(pyfuse3.RENAME_NOREPLACE | pyfuse3.RENAME_EXCHANGE):
            raise FUSEError(errno.EINVAL)  # RENAME_WHITEOUT and whatever comes after it
        await self._volume.rename(parent_inode_old, name_old, parent_inode_new, name_new, flags)

    # -- attributes ------------------------------------------------------------------------
    @answered
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return entry_attributes(await self._volume.getattr(inode))

    @answered
    async def setattr(
        self,
        inode: int,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: int | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        changes = SetAttributes(
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )
        changed = await self._volume.setattr(inode, changes)
        return entry_attributes(changed)

    @answered
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        return statvfs_data(await self._volume.statfs(), MAX_NAME_BYTES)

    @answered
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        await self._volume.setxattr(inode, name, value)

    @answered
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        return await self._volume.getxattr(inode, name)

    @answered
    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        names = await self._volume.listxattr(inode)
        if ctx.uid == 0:
            return names
        # xattr(7): who has no CAP_SYS_ADMIN does not even see the names of trusted attributes.
        return [name for name in names if not name.startswith(_TRUSTED)]

    @answered
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        await self._volume.removexattr(inode, name)

    # -- files -----------------------------------------------------------------------------
    @answered
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        handle, attributes = await self._volume.create(
            parent_inode, name, mode, flags, ctx.uid, ctx.gid
        )
        return self._opened(handle, flags), self._known(attributes)

    @answered
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        handle = await self._volume.open(inode, flags, ctx.uid)
        return self._opened(handle, flags)

    def _opened(self, handle: H, flags: int) -> FileInfo:
        number = next(self._numbers)
        datasync = None
        if flags & os.O_DSYNC:
            datasync = flags & os.O_SYNC != os.O_SYNC  # O_SYNC is O_DSYNC and one bit more
        self._files[number] = OpenFile(handle, bool(flags & os.O_DIRECT), datasync)
        return FileInfo(fh=number, direct_io=True, keep_cache=False)

    # pyfuse3 declares bytes, and takes whatever has a buffer.
    async def read(  # type: ignore[override]
        self, fh: int, off: int, size: int
    ) -> bytes | bytearray | memoryview:
        file = self._files[fh]
        # open(2): O_DIRECT wants whole logical blocks. QEMU finds the alignment by a read of one
        # byte: were it served, QEMU would do guest I/O in units of 4096 bytes. Writes are not
        # refused: dd takes O_DIRECT off its descriptor for the last one, which nobody tells us.
        if file.direct and (off | size) & _DIRECT_MASK:
            raise FUSEError(errno.EINVAL)
        try:
            data = await self._volume.read(file.handle, off, size)
            if not self._lease.valid():
                await self._lease.wait_valid()
            return data
        except Exception as error:
            raise self._answers.to(f"read({fh})", error) from None

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        file = self._files[fh]
        try:
            written = await self._volume.write(file.handle, off, buf)
            if file.datasync is not None:
                await self._volume.fsync(file.handle.ino, file.datasync)
            if not self._lease.valid():
                await self._lease.wait_valid()
            return written
        except Exception as error:
            raise self._answers.to(f"write({fh})", error) from None

    async def flush(self, fh: int) -> None:
        """close(2) has nothing to wait for: what was written is at the target already."""

    @answered
    async def release(self, fh: int) -> None:
        await self._volume.release(self._files.pop(fh).handle)

    @answered
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._volume.fsync(self._files[fh].handle.ino, datasync)

    # -- directories -----------------------------------------------------------------------
    @answered
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        await self._volume.getattr(inode)  # a directory that is gone is looked up again
        number = next(self._numbers)
        self._directories[number] = inode
        return number

    @answered
    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        ino = self._directories[fh]
        cookie = start_id
        while entries := await self._volume.readdir(ino, cookie, _READDIR_BATCH):
            for entry in entries:
                shown = entry_attributes(entry.attributes)
                if not pyfuse3.readdir_reply(token, entry.name, shown, entry.cookie):
                    return
                if entry.name not in _DOTS:
                    self._volume.remember(entry.attributes.ino, 1)
                cookie = entry.cookie

    @answered
    async def releasedir(self, fh: int) -> None:
        del self._directories[fh]

    @answered
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self._volume.fsyncdir(self._directories[fh], datasync)
