"""Reading group headers for statfs(2), so that it costs nothing after the first time.

How exact the sum is:

  - What this node allocates and frees is in it at once. So with one node it is exact.
  - What other nodes change is in it after the next reading of the group's header. That is read
    as it lies on the LUN, without the group's lock, which would make the node that allocates there
    write its journal home and wait. So it lags behind that node by what it has not brought home.

The first call reads all headers (4 KiB each 1.64 GiB of the volume). Later ones answer from memory;
one that comes `REFRESH_S` after the last reading also has the next `REFRESH_GROUPS` groups read in
the background, in turn. So while somebody asks, a header is read again within `REFRESH_S` on
volumes of up to 1.6 TiB, and within some seven minutes at 64 TiB; it never takes more than about
a hundred of the LUN's commands a second.

A header that is read while its owner writes it may be torn: it is read again. One that is damaged
fails the first call, and the next repeats it for that group alone; later it is logged, and what
was known of the group stays.

Concurrency: one reading at a time (`_turn`), in the task of `run` or of the first caller. A header
that this node has cached is taken from the cache: it holds the lock then, and nobody has it newer.
A header that it has not cached is at home as this node knows it; whatever this node merges while
it is being read counts instead (`csvfs.allocation.space`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Final

import trio

from csvfs.allocation.group import Group
from csvfs.allocation.space import SpaceCounts, Totals
from csvfs.engine.engine import told
from csvfs.errors import VolumeFailed
from csvfs.journal.block_transfer import in_parallel
from csvfs.journal.store import Store
from csvfs.ondisk.block import BLOCK_BYTES, BadBlock, BlockType
from csvfs.ondisk.geometry import Geometry, byte_offset
from csvfs.ondisk.groups import GroupHeader
from redirector.block.device import BlockError, MediumError

_log: Final = logging.getLogger("csvfs.engine.space")

REFRESH_S: Final = 10.0
REFRESH_GROUPS: Final = 1024
TORN_READS: Final = 3
"""So often a header that is not valid is read before it counts as damaged."""
TORN_PAUSE_S: Final = 0.05
_LOT: Final = 256

Damages = dict[int, BadBlock | MediumError]
"""By group."""


class SpaceReader:
    """Keeps `SpaceCounts` up to date."""

    def __init__(self, store: Store, geometry: Geometry, counts: SpaceCounts) -> None:
        self._store = store
        self._geometry = geometry
        self._counts = counts
        self._volume_id = store.journal.state.place.volume_id
        self._turn = trio.Lock()
        self._wanted = trio.Event()
        self._read_at = -math.inf
        self._next = 0
        """Where the next reading in the background begins."""
        self._complained: set[int] = set()

    async def totals(self) -> Totals:
        """How much is free; exact as the top of this module says.

        Raises `Damaged` while there is a group of which nothing could be learned, `VolumeFailed`.
        """
        self._store.journal.raise_if_failed()
        if self._counts.unknown:
            await self._read_unknown()
        elif trio.current_time() - self._read_at >= REFRESH_S:
            self._wanted.set()
        return self._counts.totals()

    async def run(self) -> None:
        """Read again what is wanted, until the volume fails."""
        while self._store.failure is None:
            await self._wanted.wait()
            try:
                await self._refresh()
            except VolumeFailed as error:
                if self._store.failure is None:
                    _log.warning("free space is told from an older reading: %s", error)
            self._wanted = trio.Event()

    async def _read_unknown(self) -> None:
        async with self._turn:
            groups = range(self._geometry.group_count)
            damages = await self._read([g for g in groups if not self._counts.is_known(g)])
        if damages:
            error = damages[min(damages)]
            raise told(error) from error

    async def _refresh(self) -> None:
        count = self._geometry.group_count
        stretch = range(self._next, self._next + min(count, REFRESH_GROUPS))
        self._next = stretch.stop % count
        groups = [group % count for group in stretch]
        async with self._turn:
            damages = await self._read(groups)
        for group in damages.keys() - self._complained:
            _log.error("free space is told from an older reading: %s", damages[group])
        self._complained.difference_update(groups)
        self._complained |= damages.keys()

    async def _read(self, groups: Sequence[int]) -> Damages:
        """Learn what the headers of these groups say. Raises `VolumeFailed`."""
        damages: Damages = {}
        self._read_at = trio.current_time()

        async def read(group: int) -> None:
            try:
                await self._read_one(group)
            except (BadBlock, MediumError) as error:
                damages[group] = error

        with self._counts.reading():
            for start in range(0, len(groups), _LOT):
                lot = groups[start : start + _LOT]
                try:
                    await in_parallel(read, [g for g in lot if not self._in_cache(g)])
                except BlockError as error:
                    raise told(error) from error
        return damages

    def _in_cache(self, number: int) -> bool:
        """Take a header from the cache, if it is there."""
        cache = self._store.cache
        if self._geometry.group_header(number) not in cache:
            return False
        group = Group(cache, self._geometry, number)
        self._counts.was_read(number, group.free_units, group.free_metadata_blocks)
        return True

    async def _read_one(self, group: int) -> None:
        """Read a header as it lies on the LUN."""
        address = self._geometry.group_header(group)
        block = bytearray(BLOCK_BYTES)
        for attempt in range(1, TORN_READS + 1):
            await self._store.device.read_into(byte_offset(address), block)
            try:
                header = GroupHeader.decode(block, address, self._volume_id, group)
            except BadBlock:
                if attempt == TORN_READS:
                    raise
                await trio.sleep(TORN_PAUSE_S)
                continue
            if header.unit_count != self._geometry.group_units(group):
                reason = f"it says that group {group} has {header.unit_count} units"
                raise BadBlock(address, BlockType.GROUP_HEADER, reason)
            self._counts.was_read(group, header.free_units, header.free_metadata_blocks)
            return
