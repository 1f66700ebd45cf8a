"""Changing the size of a file other than by writing: truncate(2), and the bytes behind the end.

Making a file shorter takes its units out from behind the new end, in as many transactions as that
needs. The first one sets the new size; if more are to follow, it also sets ``TRIMMING`` in the
inode and an entry in the slot's orphan list, so that a crash, or an error, between them leaves a
file that nobody makes longer before the rest was taken out. The inode's lock is held alone
throughout: no read or write is on its way to a unit that is taken out.

Making it longer takes no unit at all; see `csvfs.data.path` on the bytes behind the end.
"""

from __future__ import annotations

import trio

from csvfs.data.device import DataDevice, Piece
from csvfs.data.extent_map import WRITTEN
from csvfs.data.file_map import UNIT_MASK, UNIT_SHIFT, device_offset, places
from csvfs.engine.change import Change
from csvfs.engine.engine import Engine
from csvfs.errors import FileTooBig, InvalidArgument, IsADirectory
from csvfs.namespace.inode import MAX_FILE_BYTES
from csvfs.namespace.inode_table import InodeState
from csvfs.namespace.xattrs import drop_privileges
from csvfs.ondisk.inode import InodeFlag, OrphanKind


class Truncation:
    """Sets sizes. Each method raises `csvfs.errors.FilesystemError` and its kinds."""

    def __init__(self, engine: Engine, device: DataDevice) -> None:
        self._engine = engine
        self._device = device

    async def truncate(self, state: InodeState, size: int, *, privileged: bool = True) -> None:
        """Give a file, locked alone, a new size; mtime and ctime change even if it is the old one.

        ``privileged`` False drops set-ID bits and capabilities. Raises `IsADirectory`,
        `InvalidArgument`, `FileTooBig`.
        """
        inode = state.fields()
        if inode.is_directory:
            raise IsADirectory(f"inode {state.ino} is a directory")
        if not inode.is_regular or size < 0:
            raise InvalidArgument(f"inode {state.ino} cannot have size {size}")
        if size > MAX_FILE_BYTES:
            raise FileTooBig(f"{size} bytes; the limit is {MAX_FILE_BYTES}")
        if inode.flags & InodeFlag.TRIMMING:
            await self._trim(state)
        if size > inode.size:
            await self.zero_tail(state)
        trimmed = await self._engine.change(
            lambda change: _resize(change, state.ino, size, privileged), privileged=True
        )
        self._forget_map(state)
        if not trimmed:
            await self._trim(state)

    async def finish(self, ino: int) -> None:
        """Take out what an earlier truncation left behind the end, if it left anything."""
        async with self._engine.alone(ino) as state:
            await self.finish_locked(state)

    async def finish_locked(self, state: InodeState, slot: int | None = None) -> None:
        """`finish` for a file that is locked alone.

        ``slot``: on whose orphan list it stands (None: this node's).
        """
        if state.fields().flags & InodeFlag.TRIMMING:
            await self._trim(state, slot)

    async def _trim(self, state: InodeState, slot: int | None = None) -> None:
        while not await self._engine.change(lambda c: _trim(c, state.ino, slot), privileged=True):
            await trio.lowlevel.checkpoint()
        self._forget_map(state)

    def _forget_map(self, state: InodeState) -> None:
        if state.file is not None:
            state.file.map.clear()
            state.file.tail_is_zero = False

    async def zero_tail(self, state: InodeState) -> None:
        """Make the bytes between the end of the file and the end of its last unit zero."""
        file = self._engine.table.file(state)
        async with file.tail_lock:
            while file.growing:
                await file.grown.wait()
            size = state.fields().size
            if file.tail_is_zero:
                return
            if size & UNIT_MASK:
                unit = size >> UNIT_SHIFT
                [place] = await places(self._engine, state.ino, file, unit, 1)
                if place & WRITTEN:
                    low, high = size & ~self._device.block_mask, (size | UNIT_MASK) + 1
                    held = await file.ranges.enter(low, high, exclusive=True)
                    try:
                        await self._zero(place, size, low, high)
                    finally:
                        file.ranges.leave(held)
            file.tail_is_zero = True

    async def _zero(self, place: int, size: int, low: int, high: int) -> None:
        """Zero [size, high); ``low`` is where the logical block of ``size`` begins."""
        buffer = bytearray(high - low)
        if low < size:
            kept = bytearray(self._device.block_mask + 1)
            await self._device.read_one(device_offset(place, low), kept)
            buffer[: size - low] = kept[: size - low]
        await self._device.write([Piece(device_offset(place, low), memoryview(buffer))])


# -- bodies ----------------------------------------------------------------------------------------
def _resize(change: Change, ino: int, size: int, privileged: bool) -> bool:
    inode = change.inode(ino)
    shorter = size < inode.size
    inode.size = size
    inode.touch(change.now_ns)
    if not privileged:
        drop_privileges(change, inode)
    if not shorter or change.cut(inode, units_within(size)):
        return True
    inode.flags |= InodeFlag.TRIMMING
    # An older TRUNCATE entry may be of another inode that had this number: another node finished
    # that truncation, or removed that file.
    if change.orphan_kind(ino) is not OrphanKind.OPEN:
        change.add_orphan(inode, OrphanKind.TRUNCATE)
    return False


def _trim(change: Change, ino: int, slot: int | None) -> bool:
    inode = change.inode(ino)
    if not change.cut(inode, units_within(inode.size)):
        return False
    inode.flags &= ~InodeFlag.TRIMMING
    change.settle_truncation(ino, slot)
    return True


def units_within(size_bytes: int) -> int:
    """Units that a file of so many bytes may use."""
    return size_bytes + UNIT_MASK >> UNIT_SHIFT
