"""Reading and writing the content of files.

Theory. A file's content lies in units of 64 KiB, each a hole, allocated or *written*. What is not
written reads as zeroes, whatever lies there. So there are two kinds of write:

  in place      to a unit that is written: one command, no transaction. mtime and ctime change in
                memory only and go into the journal with the next record.
  first write   to any other: allocate (a transaction, the unit stays unwritten), write the *whole*
                unit with zeroes around the data, then a second transaction that marks it written
                and sets size and times. A crash before the second leaves a unit that reads as
                zeroes; so no reader ever sees what a deleted file left there.

Reads share the inode's lock in PR, writes in EX; a truncation has it alone, so none is on its way
while units are taken out. Among the tasks that share it:

  - One first write per unit at a time (`FileState.converting`); whoever else wants to write to
    that unit waits, then writes in place. Units are claimed all at once or not at all.
  - A write of a part of a logical block reads the block and writes it back, alone on those bytes
    (`csvfs.data.ranges`). Claims come before ranges, so nobody waits for a claim with a range in
    hand.

The end of the file. Bytes behind it in its last unit are *not* known to be zero on the LUN: a
crash may have left a write there whose size was not committed, a write that failed its first half,
a truncation what was cut off. Whoever makes the file longer zeroes them before, unless they are
known to be zero (`FileState.tail_is_zero`), and while no other write behind the end is on its way.

invariants:
  1. a unit is marked written only by a transaction that runs after all its 64 KiB were written
  2. no unit that is mapped lies behind the last unit of the file, except while ``TRIMMING`` is set
     in its inode, or by a first write that has not ended
  3. what is acknowledged is read back by any read that begins later

Concurrency: no task of its own. A caller that is cancelled leaves a unit allocated, never a claim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import trio

from csvfs.data.device import DataDevice, told
from csvfs.data.extent_map import CHUNK_MASK, CHUNK_SHIFT, WRITTEN
from csvfs.data.file_map import UNIT_MASK, UNIT_SHIFT, load_chunk, pieces, places, units_of
from csvfs.data.truncation import Truncation
from csvfs.data.unit_writer import UnitWriter
from csvfs.engine.engine import Engine
from csvfs.errors import BadHandle, DataLost, FileTooBig, NoSpace
from csvfs.namespace.handle import Handle
from csvfs.namespace.inode import MAX_FILE_BYTES
from csvfs.namespace.inode_table import FileState, InodeState
from csvfs.namespace.xattrs import drop_privileges
from csvfs.ondisk.block import UNIT_BYTES
from csvfs.ondisk.inode import InodeFlag
from lockmgr.modes import Mode
from redirector.block.device import BlockError

Bytes = bytes | bytearray | memoryview

_PR: Final = Mode.PR
_EX: Final = Mode.EX
_CHUNK_BYTES_SHIFT: Final = UNIT_SHIFT + CHUNK_SHIFT


class DataPath:
    """Reads, writes and fsync. Each method raises `csvfs.errors.FilesystemError` and its kinds."""

    def __init__(self, engine: Engine, device: DataDevice, truncation: Truncation) -> None:
        self._engine = engine
        self._device = device
        self._truncation = truncation
        self._locks = engine.locks
        self._table = engine.table
        self._store = engine.store
        self._journal = engine.journal
        self._writer = UnitWriter(engine, device)
        self._block_mask = device.block_mask

    # -- reading -----------------------------------------------------------------------------
    async def read(self, handle: Handle, offset: int, length: int) -> Bytes:
        """Up to ``length`` bytes from ``offset`` on; fewer only at the end of the file.

        The buffer is the caller's. Raises `BadHandle`, `DataLost`, `VolumeFailed`.
        """
        if not handle.readable:
            raise BadHandle(f"the file {handle.ino} was not opened for reading")
        if self._journal.failure is not None:
            self._journal.raise_if_failed()
        state = handle.state
        lock = self._locks.try_acquire(state.resource, _PR, True)
        if lock is None:
            lock = await self._locks.acquire(state.resource, _PR, True)
        try:
            inode = state.inode
            if inode is None:
                inode = (await self._engine.load(state.ino)).fields()
            self._engine.note_access(state)
            if offset + length > inode.size:
                length = inode.size - offset
                if length <= 0:
                    return b""
            if (offset & UNIT_MASK) + length > UNIT_BYTES or (offset | length) & self._block_mask:
                return await self._read_pieces(handle, offset, length)
            number = offset >> _CHUNK_BYTES_SHIFT
            chunk = handle.file.map.chunks.get(number)
            if chunk is None:
                chunk = await load_chunk(self._engine, handle.ino, handle.file, number)
            place = chunk[offset >> UNIT_SHIFT & CHUNK_MASK]
            buffer = bytearray(length)
            if place & WRITTEN:
                await self._device.read_one(
                    (place >> 1 << UNIT_SHIFT) + (offset & UNIT_MASK), buffer
                )
            return buffer
        finally:
            lock.release()

    async def _read_pieces(self, handle: Handle, offset: int, length: int) -> Bytes:
        """Whole logical blocks around the bytes, of which the caller gets a part."""
        mask = self._block_mask
        low, high = offset & ~mask, (offset + length + mask) & ~mask
        first, count = units_of(low, high)
        buffer = bytearray(high - low)
        view = memoryview(buffer)
        found = await places(self._engine, handle.ino, handle.file, first, count)
        await self._device.read(pieces(first, found, low, view))
        return buffer if len(buffer) == length else view[offset - low : offset - low + length]

    # -- writing -----------------------------------------------------------------------------
    async def write(self, handle: Handle, offset: int, data: Bytes) -> int:
        """Write ``data`` at ``offset`` (at the end of the file, if it was opened with O_APPEND).

        Returns how many bytes were written: all, unless the file reached its greatest size or
        space ran out within them. ``data`` must not change meanwhile. Nothing is stable before
        `fsync`, with O_SYNC and O_DSYNC neither: who answers the write waits for that too
        (`csvfs.operations`), since in the end each request has such flags of its own. Raises
        `BadHandle`, `FileTooBig`, `NoSpace`, `DataLost`, `VolumeFailed`.
        """
        if not handle.writable:
            raise BadHandle(f"the file {handle.ino} was not opened for writing")
        if self._journal.failure is not None:
            self._journal.raise_if_failed()
        state, file = handle.state, handle.file
        length = len(data)
        while True:
            lock = self._locks.try_acquire(state.resource, _EX, True)
            if lock is None:
                lock = await self._locks.acquire(state.resource, _EX, True)
            try:
                inode = state.inode
                if inode is None:
                    inode = (await self._engine.load(state.ino)).fields()
                if (
                    offset + length <= inode.size
                    and not (offset | length) & self._block_mask
                    and (offset & UNIT_MASK) + length <= UNIT_BYTES
                    and (file.unprivileged or handle.keeps_privileges)
                    and not handle.append
                    and await self._write_in_place(state, file, offset, data)
                ):
                    return length
                if not inode.flags & InodeFlag.TRIMMING:
                    return await self._write_anywhere(handle, offset, memoryview(data))
            finally:
                lock.release()
            await self._truncation.finish(state.ino)

    async def _write_in_place(
        self, state: InodeState, file: FileState, offset: int, data: Bytes
    ) -> bool:
        """Whole logical blocks within one unit: True if that unit was written, so this is all."""
        chunk = file.map.chunks.get(offset >> _CHUNK_BYTES_SHIFT)
        place = 0 if chunk is None else chunk[offset >> UNIT_SHIFT & CHUNK_MASK]
        if not place & WRITTEN:
            return False
        held = file.ranges.enter_nowait(offset, offset + len(data))
        if held is None:
            return False
        try:
            await self._device.write_one((place >> 1 << UNIT_SHIFT) + (offset & UNIT_MASK), data)
        finally:
            file.ranges.leave(held)
        self._writer.note_written(state, 0)
        return True

    async def _write_anywhere(self, handle: Handle, offset: int, data: memoryview) -> int:
        """Any write, under the inode's lock."""
        if not handle.append:
            return await self._write_at(handle, offset, data)
        async with handle.file.append_lock:
            return await self._write_at(handle, handle.state.fields().size, data)

    async def _write_at(self, handle: Handle, offset: int, data: memoryview) -> int:
        state, file = handle.state, handle.file
        if not data:
            return 0
        if offset >= MAX_FILE_BYTES:
            raise FileTooBig(f"byte {offset}; the limit is {MAX_FILE_BYTES}")
        data = data[: MAX_FILE_BYTES - offset]
        if not (file.unprivileged or handle.keeps_privileges):
            await self._drop_privileges(state, file)
        if offset + len(data) <= state.fields().size:
            return await self._write_as_far(state, file, offset, data)
        while not file.tail_is_zero:
            await self._truncation.zero_tail(state)
        with _growing(file):
            return await self._write_as_far(state, file, offset, data)

    async def _write_as_far(
        self, state: InodeState, file: FileState, offset: int, data: memoryview
    ) -> int:
        """All of ``data``, or as much of it as there is space for."""
        try:
            await self._writer.write(state, file, offset, data)
            return len(data)
        except NoSpace:
            one_unit = UNIT_BYTES - (offset & UNIT_MASK)
            if len(data) <= one_unit:
                raise
        # As much as there is space for, unit by unit: POSIX wants a short write before ENOSPC.
        await self._writer.write(state, file, offset, data[:one_unit])
        return one_unit

    async def _drop_privileges(self, state: InodeState, file: FileState) -> None:
        inode = state.fields()
        if inode.has_privileges or inode.xattr_block:
            await self._engine.change(
                lambda change: drop_privileges(change, change.inode(state.ino)), privileged=True
            )
        file.unprivileged = True

    # -- durability --------------------------------------------------------------------------
    async def fsync(self, ino: int, datasync: bool) -> None:
        """What was written to the file, and what is needed to read it back, is stable on return;
        with ``datasync`` False its times and mode too (POSIX fdatasync, fsync).

        Raises `DataLost`, `VolumeFailed`.
        """
        state = self._table.get(ino)
        if state is None:
            await self._store.flush()
            return
        if state.dirty_size or (not datasync and state.dirty_times):
            try:
                await self._table.write_back_now(state)
            except BlockError as error:
                raise told(error) from error
        if state.lost:
            state.lost = False
            raise DataLost(f"inode {ino}: its times and size could not be written")
        if state.unstable_data or (not datasync and state.unstable):
            await self._store.commit()
        else:
            await self._store.flush()


@contextmanager
def _growing(file: FileState) -> Iterator[None]:
    """A write beyond the end of the file. If it fails, some of it may lie there all the same."""
    file.growing += 1
    try:
        yield
    except BaseException:
        file.tail_is_zero = False
        raise
    finally:
        file.growing -= 1
        if not file.growing:
            file.grown.set()
            file.grown = trio.Event()
