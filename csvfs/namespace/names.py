"""Names: lookup, create, link, unlink, readdir. (Rename has a file of its own.)

Every operation here locks the directory first, finds the entry under that lock, then locks the
inode it names: ancestors before descendants. What a body finds is final, since both stay locked
until the operation has returned; so the caller may count a lookup of the inode that is returned
(`Volume.remember`) before anybody can take its last name away.

POSIX.1-2017 says what each call does to times and link counts; where Linux decides (set-group-ID
directories, link count of directories) it is Linux that is followed.
"""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final

from csvfs.engine.change import Change
from csvfs.engine.engine import Engine
from csvfs.engine.glance import Glance
from csvfs.errors import (
    InvalidArgument,
    IsADirectory,
    NameExists,
    NotADirectory,
    NotEmpty,
    NotFound,
    NotPermitted,
    StaleInode,
    TooManyLinks,
)
from csvfs.journal.transaction import BlockReader
from csvfs.namespace.directory import (
    DOT_COOKIE,
    DOT_DOT_COOKIE,
    Entry,
    add_entry,
    find_entry,
    name_key,
    read_entries,
)
from csvfs.namespace.inode import (
    MAX_LINKS,
    Attributes,
    Inode,
    attributes_of,
    check_name,
    split_target,
)
from csvfs.namespace.inode_table import InodeState
from csvfs.ondisk.block import HEADER_BYTES, BlockType
from csvfs.ondisk.geometry import ROOT_INODE
from csvfs.ondisk.inode import INODE_ROOT_BYTES, INODE_ROOT_OFFSET

DOT: Final = b"."
DOT_DOT: Final = b".."

_PERMISSIONS: Final = 0o7777
_NODES: Final = frozenset((stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK))


@dataclass(frozen=True, slots=True)
class DirectoryEntry:
    """What readdir gives. ``cookie``: where the listing goes on behind this entry."""

    name: bytes
    cookie: int
    attributes: Attributes


class Namespace:
    """Operations on names. Each raises `csvfs.errors.FilesystemError` and its kinds."""

    def __init__(self, engine: Engine, glance: Glance) -> None:
        self._engine = engine
        self._glance = glance

    # -- looking ---------------------------------------------------------------------------
    @asynccontextmanager
    async def looking_up(self, parent: int, name: bytes) -> AsyncIterator[Attributes]:
        """The inode called ``name``; "." and ".." are understood. The directory is locked
        meanwhile, except for "..".

        Raises `NotFound`, `NotADirectory`, `NameTooLong`.
        """
        if name == DOT_DOT:
            yield await self._above(parent)
            return
        async with self._engine.looking(parent) as directory:
            inode = require_directory(directory)
            if name == DOT:
                yield attributes_of(inode)
                return
            entry = await self._find(directory, name)
            yield await self._glance.attributes(entry.ino, entry.generation)

    async def _attributes(self, parent: int, name: bytes) -> Attributes:
        async with self.looking_up(parent, name) as found:
            return found

    async def _above(self, ino: int) -> Attributes:
        """The directory that names the directory ``ino``.

        A parent is locked before its children, so the two are locked in turn. Meanwhile the child
        may move or go, and so may the parent then, and its number be another inode's. What has
        one generation before and after a moment at which the child names it was its parent then.

        Raises `NotFound` for a directory that was removed: nothing is above it.
        """
        engine = self._engine
        parent, generation = 0, None
        while True:
            async with engine.looking(ino, generation, named=False) as directory:
                inode = require_present(require_directory(directory))
                if ino == ROOT_INODE:
                    return attributes_of(inode)
                moved, parent = inode.parent != parent, inode.parent
                generation = inode.generation
            if moved:
                before = await self._generation_at(parent)
                continue
            if before is None:
                raise NotFound(f"directory {parent}, above {ino}, is not there")
            with suppress(NotFound, StaleInode):  # removed, and perhaps freed
                async with engine.looking(parent, before, named=False) as above:
                    return attributes_of(require_present(require_directory(above)))
            parent = 0

    async def _generation_at(self, ino: int) -> int | None:
        """The generation of the inode that has this number now."""
        try:
            async with self._engine.looking(ino) as state:
                return state.fields().generation
        except StaleInode:
            return None

    async def _find(self, directory: InodeState, name: bytes) -> Entry:
        """The entry, in a directory whose lock is held."""
        check_name(name)
        entry = await find_locked(self._engine, directory, name)
        if entry is None:
            raise NotFound(f"{name!r} is not in directory {directory.ino}")
        return entry

    async def readlink(self, ino: int) -> bytes:
        """The target of a symbolic link. Raises `InvalidArgument` for anything else."""
        async with self._engine.looking(ino) as state:
            inode = state.fields()
            target = await self._engine.look(lambda reader: read_target(reader, inode))
            self._engine.note_access(state)
            return target

    async def readdir(self, ino: int, cookie: int, limit: int) -> list[DirectoryEntry]:
        """At most ``limit`` entries behind ``cookie`` (0: from the start), none at the end.

        An entry that is there all the time is seen once, whatever comes and goes meanwhile.
        Raises `NotFound` for a directory that was removed, as Linux does (IS_DEADDIR).
        """
        try:
            return await self._read_directory(ino, cookie, limit)
        except StaleInode as error:  # another node removed it
            raise NotFound(f"directory {ino} was removed") from error

    async def _read_directory(self, ino: int, cookie: int, limit: int) -> list[DirectoryEntry]:
        found: list[DirectoryEntry] = []
        if cookie < DOT_COOKIE and limit > 0:
            here = await self._attributes(ino, DOT)
            found.append(DirectoryEntry(DOT, DOT_COOKIE, here))
        if cookie < DOT_DOT_COOKIE and len(found) < limit:
            above = await self._attributes(ino, DOT_DOT)
            found.append(DirectoryEntry(DOT_DOT, DOT_DOT_COOKIE, above))
        behind, left = max(cookie, DOT_DOT_COOKIE), limit - len(found)
        engine = self._engine
        async with engine.looking(ino) as state:
            inode = require_present(require_directory(state))
            entries = await engine.look(lambda reader: read_entries(reader, inode, behind, left))
            engine.note_access(state)
            children = await self._glance.attributes_of_all({e.ino: e.generation for e in entries})
            # The directory stays locked until the caller goes on: no child can lose its name
            # before its lookup is counted.
            return found + [
                DirectoryEntry(entry.name, entry.key, children[entry.ino]) for entry in entries
            ]

    # -- making ----------------------------------------------------------------------------
    async def mkdir(self, parent: int, name: bytes, mode: int, uid: int, gid: int) -> Attributes:
        """Raises `NameExists`, `NotFound`, `TooManyLinks`, `NoSpace`."""
        mode = stat.S_IFDIR | mode & _PERMISSIONS
        return await self._make(parent, name, mode, uid, gid)

    async def mknod(
        self, parent: int, name: bytes, mode: int, rdev: int, uid: int, gid: int
    ) -> Attributes:
        """A regular file, a FIFO, a socket or a device, as ``mode`` says. Raises as `mkdir`."""
        if stat.S_IFMT(mode) not in _NODES:
            raise InvalidArgument(f"mknod does not make what mode {mode:#o} says")
        return await self._make(parent, name, mode, uid, gid, rdev=rdev)

    async def symlink(
        self, parent: int, name: bytes, target: bytes, uid: int, gid: int
    ) -> Attributes:
        """Raises `NameTooLong` for a target above 4095 bytes, and as `mkdir`."""
        here, tail = split_target(target)

        def fill(change: Change, link: Inode) -> None:
            link.size = len(target)
            block = change.block_of(link)
            block[INODE_ROOT_OFFSET : INODE_ROOT_OFFSET + len(here)] = here
            if tail:
                link.symlink_tail, block = change.add_block(link, BlockType.SYMLINK_TAIL)
                block[HEADER_BYTES : HEADER_BYTES + len(tail)] = tail

        return await self._make(parent, name, stat.S_IFLNK | 0o777, uid, gid, fill=fill)

    async def _make(
        self,
        parent: int,
        name: bytes,
        mode: int,
        uid: int,
        gid: int,
        *,
        rdev: int = 0,
        fill: Callable[[Change, Inode], None] | None = None,
    ) -> Attributes:
        check_name(name)

        def body(change: Change) -> Inode:
            child = make_entry(change, parent, name, mode, uid, gid, rdev=rdev)
            if fill is not None:
                fill(change, child)
            return child

        async with self._engine.alone(parent) as directory:
            require_directory(directory)
            return attributes_of(await self._engine.change(body))

    async def link(self, ino: int, parent: int, name: bytes) -> Attributes:
        """A further name for an inode. Raises `NotPermitted` for a directory, `StaleInode` for an
        inode without a name, `TooManyLinks`, and as `mkdir`."""
        check_name(name)

        def body(change: Change) -> Inode:
            directory, inode = change.inode(parent), change.inode(ino)
            require_absent(change, directory, name)
            if inode.nlink == 0:
                raise StaleInode(f"inode {ino} has lost its last name")
            if inode.nlink >= MAX_LINKS:
                raise TooManyLinks(f"inode {ino} has {inode.nlink} names")
            inode.nlink += 1
            inode.ctime_ns = change.now_ns
            enter(change, directory, name, inode)
            return inode

        # What an inode is never changes. A directory must not be locked behind ``parent``, which
        # may be below it: so the look comes first, and alone.
        async with self._engine.looking(ino) as state:
            generation = state.generation
            if state.fields().is_directory:
                raise NotPermitted(f"{ino} is a directory: it has one name")
        async with self._engine.alone(parent) as directory:
            require_directory(directory)
            async with self._engine.alone(ino, generation, named=False):
                return attributes_of(await self._engine.change(body))

    # -- unmaking ----------------------------------------------------------------------------
    async def unlink(self, parent: int, name: bytes) -> None:
        """Remove a name. Raises `NotFound`, `IsADirectory`.

        The inode goes with its last name, or when the last who has it open closes it.
        """
        await self._remove(parent, name, directory=False)

    async def rmdir(self, parent: int, name: bytes) -> None:
        """Remove an empty directory. Raises `NotFound`, `NotADirectory`, `NotEmpty`."""
        await self._remove(parent, name, directory=True)

    async def _remove(self, parent: int, name: bytes, *, directory: bool) -> None:
        engine = self._engine
        async with engine.alone(parent) as state:
            entry = await self._find(state, name)
            if entry.is_directory and not directory:
                raise IsADirectory(f"{name!r} is a directory")
            if directory and not entry.is_directory:
                raise NotADirectory(f"{name!r} is no directory")
            async with (
                engine.alone(entry.ino, entry.generation) as child,
                engine.last_user(child) as unused,
            ):
                await engine.change(
                    lambda change: _unname(change, parent, entry, unused), privileged=True
                )


async def find_locked(engine: Engine, directory: InodeState, name: bytes) -> Entry | None:
    """The entry in a directory whose lock is held. Raises `NotADirectory`."""
    inode = require_directory(directory)
    return await engine.look(lambda reader: find_entry(reader, inode, name))


# -- parts of bodies -----------------------------------------------------------------------------
def make_entry(
    change: Change, parent: int, name: bytes, mode: int, uid: int, gid: int, *, rdev: int = 0
) -> Inode:
    """A new inode and its name in ``parent``. The name must be checked already."""
    directory = change.inode(parent)
    require_absent(change, directory, name)
    if stat.S_ISDIR(mode):
        require_room_below(directory)
        directory.nlink += 1
    key = name_key(directory.hash_seed, name)
    child = change.create_inode(directory, key, mode, uid, gid, rdev=rdev)
    enter(change, directory, name, child)
    return child


def enter(change: Change, directory: Inode, name: bytes, child: Inode) -> None:
    """The name is in the directory from now on."""
    add_entry(change.entries(directory), directory, name, child)
    directory.entries += 1
    directory.touch(change.now_ns)


def leave(change: Change, directory: Inode, entry: Entry) -> None:
    """The name is no longer in the directory."""
    change.entries(directory).remove(entry.key)
    directory.entries -= 1
    directory.touch(change.now_ns)


def lose_name(change: Change, inode: Inode, *, unused: bool) -> None:
    """One name of an inode is gone; with the last one it is disposed of (`Change.dispose`).

    A directory has one name. Raises `NotEmpty` if it holds any.
    """
    inode.ctime_ns = change.now_ns
    if inode.is_directory:
        require_empty(inode)
        inode.nlink = 0
    else:
        inode.nlink -= 1
    if inode.nlink == 0:
        change.dispose(inode, unused=unused)


def _unname(change: Change, parent: int, entry: Entry, unused: bool) -> None:
    directory, child = change.inode(parent), change.inode(entry.ino)
    lose_name(change, child, unused=unused)
    leave(change, directory, entry)
    if child.is_directory:
        directory.nlink -= 1


def require_present(directory: Inode) -> Inode:
    """Raise `NotFound` for a directory that was removed."""
    if directory.nlink == 0:
        raise NotFound(f"directory {directory.ino} was removed")
    return directory


def require_absent(change: Change, directory: Inode, name: bytes) -> None:
    """Raise `NameExists`, or `NotFound` for a directory that was removed."""
    require_present(directory)
    if find_entry(change.tx, directory, name) is not None:
        raise NameExists(f"{name!r} is in directory {directory.ino}")


def require_room_below(directory: Inode) -> None:
    """Raise `TooManyLinks` if the directory cannot have one more directory in it."""
    if directory.nlink >= MAX_LINKS:
        raise TooManyLinks(f"directory {directory.ino} holds {directory.nlink - 2} directories")


def require_empty(directory: Inode) -> None:
    """Raise `NotEmpty` for a directory that holds names."""
    if directory.entries:
        raise NotEmpty(f"directory {directory.ino} holds {directory.entries} names")


def require_directory(state: InodeState) -> Inode:
    """The fields of a locked inode. Raises `NotADirectory` for anything but a directory."""
    inode = state.fields()
    if not inode.is_directory:
        raise NotADirectory(f"inode {state.ino} is no directory")
    return inode


def read_target(reader: BlockReader, link: Inode) -> bytes:
    """The target of a symbolic link. Raises `InvalidArgument`, `NeedBlocks`, `BadBlock`."""
    if not link.is_symlink:
        raise InvalidArgument(f"inode {link.ino} is no symbolic link")
    block = reader.read(link.ino, BlockType.INODE, link.ino)
    target = bytes(block[INODE_ROOT_OFFSET : INODE_ROOT_OFFSET + min(link.size, INODE_ROOT_BYTES)])
    if link.size > INODE_ROOT_BYTES:
        tail = reader.read(link.symlink_tail, BlockType.SYMLINK_TAIL, link.ino)
        target += tail[HEADER_BYTES : HEADER_BYTES + link.size - INODE_ROOT_BYTES]
    return target
