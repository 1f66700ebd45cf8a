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
    (`csvfs.ranges`). Claims come before ranges, so nobody waits for a claim with a range in hand.

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

from csvfs.change import Change
from csvfs.data_device import DataDevice, told
from csvfs.engine import Engine
from csvfs.errors import BadHandle, DataLost, FileTooBig, NoSpace
from csvfs.extent_map import CHUNK_MASK, CHUNK_SHIFT, WRITTEN, Placed
from csvfs.extents import set_written
from csvfs.file_map import (
    UNIT_MASK,
    UNIT_SHIFT,
    device_offset,
    load_chunk,
    pieces,
    places,
    runs,
)
from csvfs.format_block import UNIT_BYTES
from csvfs.format_inode import InodeFlag
from csvfs.handle import Handle
from csvfs.inode import MAX_FILE_BYTES
from csvfs.inode_table import FileState, InodeState
from csvfs.truncation import Truncation
from csvfs.xattrs import drop_privileges
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
        self._clock = engine.scope.clock
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
        first, count = _units(low, high)
        buffer = bytearray(high - low)
        view = memoryview(buffer)
        found = await places(self._engine, handle.ino, handle.file, first, count)
        await self._device.read(pieces(first, found, low, view))
        return buffer if len(buffer) == length else view[offset - low : offset - low + length]

    # -- writing -----------------------------------------------------------------------------
    async def write(self, handle: Handle, offset: int, data: Bytes) -> int:
        """Write ``data`` at ``offset`` (at the end of the file, if it was opened with O_APPEND).

        Returns how many bytes were written: all, unless the file reached its greatest size or
        space ran out within them. ``data`` must not change meanwhile. Raises `BadHandle`,
        `FileTooBig`, `NoSpace`, `DataLost`, `VolumeFailed`.
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
        self._note_written(state, 0)
        return True

    def _note_written(self, state: InodeState, end: int) -> None:
        """Bytes up to ``end`` were written without a transaction."""
        inode = state.fields()
        inode.touch(self._clock())
        inode.change += 1
        if end > inode.size:
            inode.size = end
            state.dirty_size = True
        state.dirty_times = True
        self._table.note_dirty(state)

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
            await self._write_units(state, file, offset, data)
            return len(data)
        except NoSpace:
            one_unit = UNIT_BYTES - (offset & UNIT_MASK)
            if len(data) <= one_unit:
                raise
        # As much as there is space for, unit by unit: POSIX wants a short write before ENOSPC.
        await self._write_units(state, file, offset, data[:one_unit])
        return one_unit

    async def _drop_privileges(self, state: InodeState, file: FileState) -> None:
        inode = state.fields()
        if inode.has_privileges or inode.xattr_block:
            await self._engine.change(
                lambda change: drop_privileges(change, change.inode(state.ino)), privileged=True
            )
        file.unprivileged = True

    async def _write_units(
        self, state: InodeState, file: FileState, offset: int, data: memoryview
    ) -> None:
        """Write within one request: first writes and others mixed."""
        end = offset + len(data)
        first, count = _units(offset, end)
        found = await self._settled_places(state, file, first, count)
        fresh = [first + i for i, place in enumerate(found) if not place & WRITTEN]
        with _claimed(file, fresh):
            while 0 in found:
                hole, length = next(runs([first + i for i, p in enumerate(found) if not p]))
                await self._allocate(state, file, hole, length)
                found = await places(self._engine, state.ino, file, first, count)
            await self._put(file, offset, data, first, found)
            if fresh:
                await self._mark_written(state, file, fresh, end)
            else:
                self._note_written(state, end)

    async def _settled_places(
        self, state: InodeState, file: FileState, first: int, count: int
    ) -> list[int]:
        """Places of units at an instant at which no first write to one of them is on its way."""
        while True:
            found = await places(self._engine, state.ino, file, first, count)
            if not file.converting:
                return found
            busy = [file.converting[u] for u in range(first, first + count) if u in file.converting]
            if not busy:
                return found
            for event in busy:
                await event.wait()

    async def _allocate(self, state: InodeState, file: FileState, first: int, count: int) -> None:
        """Map units of a hole, unwritten; as many as one transaction takes."""
        placed = await self._engine.change(
            lambda change: change.map_units(change.inode(state.ino), first, count)
        )
        file.map.update(placed)

    async def _mark_written(
        self, state: InodeState, file: FileState, fresh: list[int], end: int
    ) -> None:
        """All bytes of these units are on the LUN: they are data from now on."""

        def body(change: Change) -> None:
            inode = change.inode(state.ino)
            tree = change.extents(inode)
            for first, count in runs(fresh):
                set_written(tree, first, count)
            inode.size = max(inode.size, end)
            inode.touch(change.now_ns)

        await self._engine.change(body)
        file.map.update(_written(file, fresh))

    async def _put(
        self, file: FileState, offset: int, data: memoryview, first: int, found: list[int]
    ) -> None:
        """Write whole logical blocks, and whole units where they are written first."""
        mask, end = self._block_mask, offset + len(data)
        new_first, new_last = not found[0] & WRITTEN, not found[-1] & WRITTEN
        low = offset & ~(UNIT_MASK if new_first else mask)
        high = end + (-end & (UNIT_MASK if new_last else mask))
        keep_head = low < offset and not new_first
        keep_tail = end < high and not new_last
        held = None
        if not (keep_head or keep_tail):
            held = file.ranges.enter_nowait(low, high)
        if held is None:
            held = await file.ranges.enter(low, high, exclusive=keep_head or keep_tail)
        try:
            if low < offset or end < high:
                padded = bytearray(high - low)
                if keep_head:
                    await self._keep_block(padded, 0, found[0], low)
                if keep_tail and not (keep_head and high - low == mask + 1):
                    await self._keep_block(
                        padded, high - mask - 1 - low, found[-1], high - mask - 1
                    )
                padded[offset - low : end - low] = data
                data = memoryview(padded)
            await self._device.write(pieces(first, [p | WRITTEN for p in found], low, data))
        finally:
            file.ranges.leave(held)

    async def _keep_block(self, padded: bytearray, at: int, place: int, position: int) -> None:
        """What the LUN holds in the logical block at ``position`` of the file goes to ``at``."""
        block = bytearray(self._block_mask + 1)
        await self._device.read_one(device_offset(place, position), block)
        padded[at : at + len(block)] = block

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


def _units(start: int, end: int) -> tuple[int, int]:
    """First unit and number of units of the bytes [start, end), which are not none."""
    first = start >> UNIT_SHIFT
    return first, (end - 1 >> UNIT_SHIFT) - first + 1


def _written(file: FileState, units: list[int]) -> list[Placed]:
    """What the map says of these units, with the written bit."""
    marked = []
    for unit in units:
        chunk = file.map.chunks.get(unit >> CHUNK_SHIFT)
        if chunk is not None:
            marked.append((unit, chunk[unit & CHUNK_MASK] | WRITTEN))
    return marked


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


@contextmanager
def _claimed(file: FileState, units: list[int]) -> Iterator[None]:
    """These units are written for the first time: nobody else writes to them meanwhile."""
    if not units:
        yield
        return
    ended = trio.Event()
    file.converting.update(dict.fromkeys(units, ended))
    try:
        yield
    finally:
        for unit in units:
            del file.converting[unit]
        ended.set()
