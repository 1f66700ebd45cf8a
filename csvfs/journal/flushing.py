"""One SYNCHRONIZE CACHE for everybody who waits.

A flush makes stable what the target had answered *before the flush was issued*. So whoever asks
while one is on its way waits for the next, and that one serves all who asked meanwhile. A flush
with nothing written since the last good one sends nothing.

After a flush has failed nobody can know what the target still holds: a later flush that succeeds
would prove nothing (the lesson of fsync on Linux in 2018). So a failure is final: `failed` is told,
and every flush from then on raises.

invariants:
  1. at most one flush is on its way
  2. `_stable` <= `_written`; it is what `_written` was when the last good flush was issued

Concurrency: no task of its own. One of the callers issues the flush; if it is cancelled, another
one of those that wait issues it again.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from redirector.block.device import BlockError, BlockIO


class FlushBatcher:
    """Counts writes to one device, and flushes it when there were any."""

    def __init__(self, device: BlockIO, failed: Callable[[BlockError], None]) -> None:
        self._device = device
        self._failed = failed
        self._failure: BlockError | None = None
        self._written = 0
        self._stable = 0
        self._under_way: trio.Event | None = None
        self.flushes = 0
        """SYNCHRONIZE CACHE commands so far."""

    def note_write(self) -> None:
        """A write without FUA was answered. Every writer to the device says so."""
        self._written += 1

    @property
    def needed(self) -> bool:
        """Was anything written since the last good flush was issued?"""
        return self._stable < self._written

    @property
    def mark(self) -> int:
        """Names all writes noted so far, for a later `flush` of just these."""
        return self._written

    async def flush(self, mark: int | None = None) -> None:
        """On return every write noted before the call, or before ``mark`` was taken, is stable.

        Raises `BlockError`, from the first failure on.
        """
        target = self._written if mark is None else mark
        while self._stable < target:
            if self._failure is not None:
                raise self._failure
            if self._under_way is not None:
                await self._under_way.wait()
            else:
                await self._issue()
        if self._failure is not None:
            raise self._failure

    async def _issue(self) -> None:
        done = self._under_way = trio.Event()
        covered = self._written
        try:
            self.flushes += 1
            await self._device.flush()
            self._stable = covered
        except BlockError as error:
            self._failure = error
            self._failed(error)
        finally:
            self._under_way = None
            done.set()

    def check(self) -> None:
        """Assert the invariants at the top of this module."""
        assert self._stable <= self._written
