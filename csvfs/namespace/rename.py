"""rename(2) and renameat2(2): the one operation that touches up to four inodes.

Theory. A rename within one directory changes nothing about the shape of the tree. One across
directories is done under the volume's rename lock: EX if a directory stands at one of the names,
PR if not. So while a rename across directories runs, no directory changes its place, and three
questions have lasting answers: where do the two directories stand in the tree, is the moved
directory above its new place (EINVAL), is what is to be replaced above the old place (then it is
not empty). Only then are locks taken: the two directories in the order of their paths, then what
is moved and what is replaced: neither is above the other, or above the two directories.

Why not the two directories by their numbers, if none is above the other: of three directories
a < b < c with c above a, renames from a to b and from b to c and a look-up of a in c would wait
for each other. Comparing paths, number by number from the root, is one order for all of them:
ancestors come first, brothers stand by number. Files come behind all directories, because a file
may have names in several.

What stands at the two names decides which locks are needed, so it is looked at before; if it is
something else once the directories are locked, the operation starts again.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Final, NamedTuple

from csvfs.engine.change import Change
from csvfs.engine.engine import Engine
from csvfs.engine.locks import RENAME
from csvfs.errors import (
    Damaged,
    InvalidArgument,
    IsADirectory,
    NameExists,
    NotADirectory,
    NotEmpty,
    NotFound,
)
from csvfs.namespace.directory import Entry, change_entry
from csvfs.namespace.inode import Inode, check_name
from csvfs.namespace.names import (
    enter,
    find_locked,
    leave,
    lose_name,
    require_directory,
    require_room_below,
)
from csvfs.ondisk.geometry import ROOT_INODE
from lockmgr.modes import Mode

NOREPLACE: Final = 1
EXCHANGE: Final = 2
"""As in renameat2(2)."""


class Place(NamedTuple):
    """A name in a directory."""

    parent: int
    name: bytes


class Found(NamedTuple):
    """What stands at the two places."""

    source: Entry
    target: Entry | None


class Renamer:
    """Moves names."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int = 0
    ) -> None:
        """Move a name, replacing what stands at the new one.

        With NOREPLACE nothing is replaced (`NameExists`); with EXCHANGE the two change places.
        Two names of one inode stay as they are (POSIX). Raises `NotFound`, `NotADirectory`,
        `IsADirectory`, `NotEmpty`, `InvalidArgument`, `TooManyLinks`, `NoSpace`.
        """
        if flags not in (0, NOREPLACE, EXCHANGE):
            raise InvalidArgument(f"rename flags {flags:#x}")
        check_name(name)
        check_name(new_name)
        source, target = Place(parent, name), Place(new_parent, new_name)
        while not await self._attempt(source, target, flags):
            pass

    async def _attempt(self, source: Place, target: Place, flags: int) -> bool:
        """Rename under locks chosen by a look without them; False if that look is out of date."""
        engine = self._engine
        found = await self._look(source, target)
        async with AsyncExitStack() as locks:
            if source.parent == target.parent:
                directories = [source.parent]
            else:
                mode = Mode.EX if _concerns_directory(found) else Mode.PR
                await locks.enter_async_context(engine.locks.acquire(RENAME, mode))
                directories = await self._in_order(source, target, found, flags)
            for ino in directories:
                await locks.enter_async_context(engine.alone(ino))
            if await self._find(source, target) != found:
                return False
            if found.target is not None and found.target.ino == found.source.ino:
                if flags == NOREPLACE:
                    raise NameExists(f"{target.name!r} is in directory {target.parent}")
                return True
            for entry in sorted((e for e in found if e is not None), key=_place_in_order):
                await locks.enter_async_context(engine.alone(entry.ino, entry.generation))
            unused = False
            if found.target is not None and not flags:
                victim = engine.table.state(found.target.ino)
                unused = await locks.enter_async_context(engine.last_user(victim))
            await engine.change(
                lambda change: _rename(change, source, target, found, flags, unused),
                privileged=found.target is not None,
            )
            return True

    async def _look(self, source: Place, target: Place) -> Found:
        """What stands at the two places at this moment."""
        async with self._engine.looking(source.parent):
            first = await self._entry(source)
        async with self._engine.looking(target.parent):
            return _found(source, first, await self._entry(target))

    async def _find(self, source: Place, target: Place) -> Found:
        """What stands at the two places, whose directories are locked."""
        return _found(source, await self._entry(source), await self._entry(target))

    async def _entry(self, place: Place) -> Entry | None:
        directory = self._engine.table.state(place.parent)
        return await find_locked(self._engine, directory, place.name)

    async def _in_order(self, source: Place, target: Place, found: Found, flags: int) -> list[int]:
        """The two directories as they are to be locked, under the rename lock.

        Raises for what would tear the tree apart, or would need a lock above one that is held.
        """
        above_source = await self._path_up(source.parent)
        above_target = await self._path_up(target.parent)
        if found.source.ino in above_target:
            raise InvalidArgument(f"{source.name!r} would be moved below itself")
        if found.target is not None and found.target.ino in above_source:
            if flags == EXCHANGE:
                raise InvalidArgument(f"{target.name!r} would be moved below itself")
            if flags == NOREPLACE:
                raise NameExists(f"{target.name!r} is in directory {target.parent}")
            raise NotEmpty(f"{target.name!r} holds the directory of {source.name!r}")
        return [path[0] for path in sorted((above_source, above_target), key=lambda p: p[::-1])]

    async def _path_up(self, ino: int) -> list[int]:
        """The directory, its parent, and so on up to the root."""
        path = [ino]
        while ino != ROOT_INODE:
            async with self._engine.looking(ino) as state:
                ino = require_directory(state).parent
            if ino in path:
                raise Damaged(f"directory {ino} is above itself; run csvctl check")
            path.append(ino)
        return path


def _found(source: Place, first: Entry | None, second: Entry | None) -> Found:
    if first is None:
        raise NotFound(f"{source.name!r} is not in directory {source.parent}")
    return Found(first, second)


def _concerns_directory(found: Found) -> bool:
    return any(entry is not None and entry.is_directory for entry in found)


def _place_in_order(entry: Entry) -> tuple[bool, int]:
    return not entry.is_directory, entry.ino


# -- the body ------------------------------------------------------------------------------------
def _rename(
    change: Change, source: Place, target: Place, found: Found, flags: int, unused: bool
) -> None:
    old, new = change.inode(source.parent), change.inode(target.parent)
    moved = change.inode(found.source.ino)
    if new.nlink == 0:
        raise NotFound(f"directory {new.ino} was removed")
    moved.ctime_ns = change.now_ns
    if flags == EXCHANGE:
        if found.target is None:
            raise NotFound(f"{target.name!r} is not in directory {target.parent}")
        _exchange(change, old, new, moved, found.source, found.target)
        return
    if found.target is None:
        if moved.is_directory and old is not new:
            require_room_below(new)
        leave(change, old, found.source)
        enter(change, new, target.name, moved)
    elif flags == NOREPLACE:
        raise NameExists(f"{target.name!r} is in directory {target.parent}")
    else:
        _replace(change, new, moved, found.target, unused)
        leave(change, old, found.source)
    _change_parent(moved, old, new)


def _replace(change: Change, new: Inode, moved: Inode, entry: Entry, unused: bool) -> None:
    """``entry`` of ``new`` stands for ``moved`` from now on; what it stood for loses a name."""
    victim = change.inode(entry.ino)
    if moved.is_directory and not victim.is_directory:
        raise NotADirectory(f"{entry.name!r} is no directory")
    if victim.is_directory and not moved.is_directory:
        raise IsADirectory(f"{entry.name!r} is a directory")
    lose_name(change, victim, unused=unused)
    if victim.is_directory:
        new.nlink -= 1
    change_entry(change.entries(new), entry, moved)
    new.touch(change.now_ns)


def _exchange(
    change: Change, old: Inode, new: Inode, moved: Inode, source: Entry, target: Entry
) -> None:
    other = change.inode(target.ino)
    other.ctime_ns = change.now_ns
    change_entry(change.entries(old), source, other)
    change_entry(change.entries(new), target, moved)
    old.touch(change.now_ns)
    new.touch(change.now_ns)
    if old is not new and moved.is_directory != other.is_directory:
        require_room_below(new if moved.is_directory else old)
    _change_parent(moved, old, new)
    _change_parent(other, new, old)


def _change_parent(child: Inode, old: Inode, new: Inode) -> None:
    """A directory's ".." is a link of its parent."""
    if child.is_directory and old is not new:
        old.nlink -= 1
        new.nlink += 1
        child.parent = new.ino
