"""Bringing committed images home, and moving the journal's tail behind them.

The order is everything: home blocks are written; a flush that begins after that ends; only then
the header with the new tail is written, with FUA; only when that is stable is the room used again.

invariants:
  1. two home writes of one block are never on their way at the same time: whoever writes home
     holds `_home`, and picks the images while it does; so an older image never lands on a newer
  2. the tail on the LUN only grows, and never passes `JournalState.tail_candidate`
  3. a header is written over the older of the two, so a torn one leaves the other
  4. once `settle` has returned, no home write is on its way of any block whose revoke was stable
     when it was called

Concurrency: called by the journal's checkpoint task and by `flush_owned`. What is cancelled here
has ended its commands, and left the images unhomed: they are written again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import islice
from typing import Final

import trio

from csvfs.journal.block_transfer import write_images
from csvfs.journal.flushing import FlushBatcher
from csvfs.journal.state import HomeImage, JournalState
from csvfs.ondisk.block import BLOCK_BYTES
from csvfs.ondisk.journal import JournalHeader
from redirector.block.device import BlockIO

CHUNK_BLOCKS: Final = 256
"""Blocks written home at a time: so long `flush_owned` waits for a checkpoint at most."""


class Checkpointer:
    """Writes home blocks and journal headers of one journal."""

    def __init__(
        self,
        device: BlockIO,
        state: JournalState,
        flusher: FlushBatcher,
        header_version: int,
        raise_if_failed: Callable[[], None],
    ) -> None:
        self._device = device
        self._state = state
        self._flusher = flusher
        self._header_version = header_version
        self._raise_if_failed = raise_if_failed
        self._home = trio.Lock()
        self._tail = trio.Lock()
        self._home_mark = 0
        """`FlushBatcher.mark` behind the last home write."""

    async def checkpoint(self) -> None:
        """Everything committed so far goes home, and the tail beyond it.

        Raises `BlockError`, and `VolumeFailed` if the journal failed meanwhile.
        """
        await self.bring_home(self._state.unhomed.keys())
        await self.move_tail()

    async def bring_home(self, addresses: Collection[int]) -> None:
        """The committed images of these blocks are stable at home on return."""
        written: list[HomeImage] = []
        waiting = iter(sorted(addresses))
        while chunk := list(islice(waiting, CHUNK_BLOCKS)):
            async with self._home:
                self._raise_if_failed()
                # Picked now, not earlier: a block that was revoked meanwhile is no longer there,
                # and one that was committed again goes home as it is now.
                images = self._state.to_home(chunk)
                await write_images(self._device, [image[:2] for image in images])
                self._flusher.note_write()
                self._home_mark = self._flusher.mark
            written += images
        if written:
            await self._flusher.flush()
            self._state.home(written)

    async def move_tail(self) -> None:
        """Write the header that says where replay begins, if that has changed."""
        state = self._state
        async with self._tail:
            self._raise_if_failed()
            sequence = state.tail_candidate()
            if sequence == state.tail_sequence:
                return
            await self._write_header(sequence, state.ring.position_of(sequence))
            state.tail_moved(sequence)

    async def _write_header(self, sequence: int, position: int) -> None:
        place = self._state.place
        version = self._header_version + 1
        address = place.header_address(version)
        header = JournalHeader(place.slot, self._state.incarnation, sequence, position)
        block = header.encode(place.volume_id, address, version)
        await self._device.write(address * BLOCK_BYTES, block, fua=True)
        self._header_version = version

    async def settle(self) -> int:
        """Wait until the home writes that are on their way have ended; the mark of their flush."""
        async with self._home:
            return self._home_mark
