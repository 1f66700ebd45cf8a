"""Writing to the units of a file: first writes, writes in place, and requests that mix them.

The rules are those of `csvfs.data.path`. The order within one request:

    settle      wait until no first write to one of its units is on its way
    claim       those of its units that are not written: all at once, without an await in between
    allocate    the holes among them, in one transaction or several; they stay unwritten
    put         whole units where they are written first, whole logical blocks elsewhere, with
                zeroes or what the LUN holds around the data; neighbours in one command
    mark        one transaction: written, size, times; or, with no first write, in memory only

Concurrency: no task of its own; see the top of `csvfs.data.path`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio

from csvfs.data.device import DataDevice
from csvfs.data.extent_map import CHUNK_MASK, CHUNK_SHIFT, WRITTEN, Placed
from csvfs.data.extents import set_written
from csvfs.data.file_map import UNIT_MASK, device_offset, pieces, places, runs, units_of
from csvfs.engine.change import Change
from csvfs.engine.engine import Engine
from csvfs.namespace.inode_table import FileState, InodeState


class UnitWriter:
    """Writes bytes of files whose locks are held."""

    def __init__(self, engine: Engine, device: DataDevice) -> None:
        self._engine = engine
        self._device = device
        self._table = engine.table
        self._clock = engine.scope.clock
        self._block_mask = device.block_mask

    def note_written(self, state: InodeState, end: int) -> None:
        """Bytes up to ``end`` were written without a transaction."""
        inode = state.fields()
        inode.touch(self._clock())
        inode.change += 1
        if end > inode.size:
            inode.size = end
            state.dirty_size = True
        state.dirty_times = True
        self._table.note_dirty(state)

    async def write(
        self, state: InodeState, file: FileState, offset: int, data: memoryview
    ) -> None:
        """Write bytes of a file whose lock is held: first writes and others mixed.

        Raises `NoSpace`, `DataLost`, `VolumeFailed`.
        """
        end = offset + len(data)
        first, count = units_of(offset, end)
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
                self.note_written(state, end)

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


def _written(file: FileState, units: list[int]) -> list[Placed]:
    """What the map says of these units, with the written bit."""
    marked = []
    for unit in units:
        chunk = file.map.chunks.get(unit >> CHUNK_SHIFT)
        if chunk is not None:
            marked.append((unit, chunk[unit & CHUNK_MASK] | WRITTEN))
    return marked


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
