"""The LUN as files' data sees it: byte ranges, in commands no longer than the target takes.

What a failure means: a medium error concerns these bytes alone (`DataLost`), a full thin array
makes the writer wait until there is space again (DESIGN: "writes pause with the reason and
resume"), anything else means that the LUN cannot be worked with (`VolumeFailed`).

Concurrency: no task of its own; commands of one transfer run at once, and all have ended when it
returns or raises. A writer that waits for a full array is woken when the volume fails.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NamedTuple, Protocol

import trio

from csvfs.errors import DataLost, FilesystemError, VolumeFailed
from csvfs.journal.block_transfer import in_parallel
from redirector.block.device import (
    BlockError,
    BlockIO,
    Buffer,
    MediumError,
    SpaceExhausted,
)

_log: Final = logging.getLogger("csvfs.data.path")

FULL_ARRAY_RETRY_S: Final = 2.0


class Piece(NamedTuple):
    """Bytes of memory and where they lie on the LUN."""

    offset: int
    data: memoryview


class Writer(Protocol):
    """What a volume's store wants to know of data, and tells (`csvfs.journal.store.Store`)."""

    def note_write(self) -> None:
        """A write was answered."""

    async def wait_failed(self) -> None:
        """Return only by raising `VolumeFailed`, once nothing may be written any more."""


class DataDevice:
    """Reads and writes of data, of which ``store`` is told."""

    def __init__(self, device: BlockIO, store: Writer) -> None:
        self.device = device
        self._store = store
        identity = device.identity
        self.block_mask = identity.logical_block_bytes - 1
        """Bits of an offset that lie within one logical block."""
        self.most_bytes = identity.max_transfer_bytes & ~self.block_mask

    async def read(self, pieces: Sequence[Piece]) -> None:
        """Fill each piece. Raises `DataLost`, `VolumeFailed`."""
        try:
            await self._each(self._read, pieces)
        except BlockError as error:
            raise told(error) from error

    async def write(self, pieces: Sequence[Piece]) -> None:
        """Write each piece; stable with the next flush. Raises `DataLost`, `VolumeFailed`."""
        try:
            await self._each(self._write, pieces)
        except BlockError as error:
            raise told(error) from error

    async def read_one(self, offset: int, buffer: bytearray) -> None:
        """The short way for what fits in one command."""
        try:
            await self.device.read_into(offset, buffer)
        except BlockError as error:
            raise told(error) from error

    async def write_one(self, offset: int, data: Buffer) -> None:
        """The short way for what fits in one command."""
        try:
            await self._put(offset, data)
        except BlockError as error:
            raise told(error) from error

    async def _read(self, piece: Piece) -> None:
        await self.device.read_into(piece.offset, piece.data)

    async def _write(self, piece: Piece) -> None:
        await self._put(piece.offset, piece.data)

    async def _put(self, offset: int, data: Buffer) -> None:
        try:
            await self.device.write(offset, data)
        except SpaceExhausted:
            await self._put_when_space(offset, data)
        self._store.note_write()

    async def _put_when_space(self, offset: int, data: Buffer) -> None:
        """A full thin array is no error for a guest: it waits, as for a slow disk.

        Raises `VolumeFailed` as soon as the volume fails: nothing is written from then on.
        """
        _log.error("the array that holds the LUN is full: writes wait until it has space again")
        while True:
            with trio.move_on_after(FULL_ARRAY_RETRY_S):
                await self._store.wait_failed()
            try:
                await self.device.write(offset, data)
            except SpaceExhausted:
                continue
            _log.warning("the array that holds the LUN has space again")
            return

    async def _each(
        self, command: Callable[[Piece], Awaitable[None]], pieces: Sequence[Piece]
    ) -> None:
        if len(pieces) == 1 and len(pieces[0].data) <= self.most_bytes:
            await command(pieces[0])
        elif pieces:
            await in_parallel(command, self._cut(pieces))

    def _cut(self, pieces: Sequence[Piece]) -> list[Piece]:
        most = self.most_bytes
        return [
            Piece(offset + start, data[start : start + most])
            for offset, data in pieces
            for start in range(0, len(data), most)
        ]


def told(error: BlockError) -> FilesystemError:
    """What a read or a write answers when the LUN did not do it."""
    if isinstance(error, MediumError):
        return DataLost(f"the LUN cannot read or write these bytes of the file: {error}")
    return VolumeFailed(f"the LUN does not do what it is told: {error}")
