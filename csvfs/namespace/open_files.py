"""Who has what open, and what the kernel knows of.

Theory. An inode without a name lives on while a handle or a lookup of the kernel refers to it
(POSIX unlink). It stands on a slot's orphan list then, so that a crash does not forget it. The
last close or forget *retires* it (`csvfs.namespace.orphans`).

Other nodes may have it open, too. So each node holds the inode's *open lock* in PR from its first
open to its last release, and an inode is retired only by a node that gets that lock EX.

invariants:
  1. a state's ``open_lock`` is held while, and only while, it has handles
  2. counts go up under the inode's lock, or before anybody else can take it: so an unlink, which
     has that lock alone, sees every user there is
"""

from __future__ import annotations

import logging
import os
import stat
from typing import Final

from csvfs.data.truncation import Truncation
from csvfs.engine.engine import Engine
from csvfs.errors import InvalidArgument, IsADirectory, NameExists
from csvfs.namespace.handle import Handle
from csvfs.namespace.inode import Attributes, attributes_of, check_name
from csvfs.namespace.inode_table import InodeState
from csvfs.namespace.names import find_locked, make_entry, require_directory
from csvfs.namespace.orphans import Orphans
from lockmgr.modes import Mode

_log: Final = logging.getLogger("csvfs.inodes")

_PERMISSIONS: Final = 0o7777


class OpenFiles:
    """Handles and lookup counts. Methods raise `csvfs.errors.FilesystemError` and its kinds."""

    def __init__(self, engine: Engine, truncation: Truncation, orphans: Orphans) -> None:
        self._engine = engine
        self._truncation = truncation
        self._orphans = orphans
        self._table = engine.table

    # -- opening -----------------------------------------------------------------------------
    async def open(self, ino: int, flags: int, uid: int) -> Handle:
        """A handle for open(2) with ``flags``; O_TRUNC is carried out, O_CREAT is not.

        Raises `IsADirectory`, `StaleInode`, `InvalidArgument` for what is no regular file.
        """
        handle, _ = await self._open(ino, None, flags, uid)
        return handle

    async def create(
        self, parent: int, name: bytes, mode: int, flags: int, uid: int, gid: int
    ) -> tuple[Handle, Attributes]:
        """open(2) with O_CREAT: a new regular file, or without O_EXCL the one that is there.

        Raises `NameExists`, and as `open` and `Namespace.mknod` do.
        """
        check_name(name)
        engine = self._engine
        async with engine.alone(parent) as directory:
            require_directory(directory)
            entry = await find_locked(engine, directory, name)
            if entry is not None:
                if flags & os.O_EXCL:
                    raise NameExists(f"{name!r} is in directory {parent}")
                return await self._open(entry.ino, entry.generation, flags, uid)
            mode = stat.S_IFREG | mode & _PERMISSIONS
            inode = await engine.change(
                lambda change: make_entry(change, parent, name, mode, uid, gid)
            )
            handle = await self._attach(self._table.state(inode.ino), flags, uid)
            return handle, attributes_of(inode)

    async def _open(
        self, ino: int, generation: int | None, flags: int, uid: int
    ) -> tuple[Handle, Attributes]:
        truncates = flags & os.O_TRUNC and flags & os.O_ACCMODE != os.O_RDONLY
        lock = self._engine.alone if truncates else self._engine.looking
        async with lock(ino, generation) as state:
            inode = state.fields()
            if inode.is_directory:
                raise IsADirectory(f"inode {ino} is a directory")
            if not inode.is_regular:
                raise InvalidArgument(f"inode {ino} is no regular file")
            handle = await self._attach(state, flags, uid)
            try:
                if truncates:
                    await self._truncation.truncate(state, 0, privileged=uid == 0)
            except BaseException:
                self._detach(handle)
                raise
            return handle, attributes_of(state.fields())

    async def _attach(self, state: InodeState, flags: int, uid: int) -> Handle:
        state.handles += 1
        try:
            if state.open_lock is None:
                resource = self._engine.resources.opened(state.ino)
                lock = await self._engine.locks.acquire(resource, Mode.PR)
                if state.open_lock is None:
                    state.open_lock = lock
                else:  # another task of this node was quicker
                    lock.release()
        except BaseException:
            self._uncount(state)
            raise
        return Handle(state, self._table.file(state), flags, uid)

    def _uncount(self, state: InodeState) -> None:
        """One handle less; with the last one goes the open lock, whoever of this node got it.

        What failed to open retires nothing: it had the inode from an entry or from a lookup, and
        the end of that sees to it.
        """
        state.handles -= 1
        if state.handles == 0 and state.open_lock is not None:
            state.open_lock.release()
            state.open_lock = None
        self._table.let_go(state)

    async def release(self, handle: Handle) -> None:
        """The last close of what `open` or `create` gave."""
        if self._detach(handle):
            await self._orphans.retire(handle.ino)

    def _detach(self, handle: Handle) -> bool:
        """Uncount a handle; True if it was the last user of an inode without a name."""
        assert not handle.closed, f"a handle of inode {handle.ino} is released twice"
        handle.closed = True
        state = handle.state
        self._uncount(state)
        return state.orphan and not state.needed

    # -- what the kernel knows ---------------------------------------------------------------
    def remember(self, ino: int, count: int = 1) -> None:
        """The kernel was told of an inode ``count`` times.

        To be called before anything else is awaited after the call that gave the attributes.
        """
        self._table.remember(ino, count)

    async def forget(self, ino: int, count: int) -> None:
        """The kernel gives back ``count`` of what it was told."""
        state = self._table.get(ino)
        if state is None or state.lookups < count:
            _log.error("the kernel forgets inode %d more often than it was told of it", ino)
            return
        state.lookups -= count
        if state.orphan and not state.needed:
            await self._orphans.retire(ino)
        else:
            self._table.let_go(state)

    async def forget_all(self) -> None:
        """The kernel is gone: every handle and lookup with it."""
        for state in self._table.known():
            state.lookups = state.handles = 0
            if state.open_lock is not None:
                state.open_lock.release()
                state.open_lock = None
            if state.orphan:
                await self._orphans.retire(state.ino)
