"""The direct path: what the filesystem reads and writes through.

Theory. `DirectPath` is a `BlockIO` that survives the loss of sessions. A healthy command goes
straight to the data session. A command that failed is either passed up (medium error, thin array
full, what the target does not know), or issued again when REDIRECTION.md says that this is safe;
until then its caller waits. Newer commands that overlap a write of unknown fate wait for it.

Why the order is safe: a session's commands have all ended, and the ranges of those to be issued
again are noted, before the keeper lets data flow on the next session (`Session.wait_idle`).

Concurrency. Callers' tasks do the I/O; `Keeper.run` and, for a volatile cache, one flusher task
live in `DirectPath.run`. A cancelled caller is held until its command has ended, or leaves at once
while it waits for a path; a write that was interrupted so has an unknown fate, but none that
outlasts the next fence.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import trio

from redirector.block.device import (
    BlockError,
    BlockIO,
    Buffer,
    Lun,
    OutcomeUnknown,
    ReservationConflict,
    TargetBusy,
    UnitAttention,
)
from redirector.block.reservations import PathClosed, Registration
from redirector.flow import Evicted
from redirector.keeper import Keeper, Membership, Session
from redirector.repeats import BUSY_PAUSES_S, Ranges, Repeats
from redirector.retained import STOP_BYTES, RetainedWrites

__all__ = ["DirectPath", "Evicted", "Membership", "PathStatus"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PathStatus:
    """For ``csvctl status``."""

    healthy: bool
    trouble: str
    """What is being waited for, or why this node was evicted."""
    control_key: int
    """0: there is no such session now."""
    data_key: int
    recoveries: int
    """Losses that were recovered from since the mount."""
    retained_bytes: int
    """Written, and not known to be stable."""


class DirectPath(BlockIO):
    """See the module's docstring. Every method may also raise `Evicted`, finally.

    ``control`` holds the reservation; both sessions are registered and have read the view. They
    belong to the path from now on. `run` must be running.
    """

    def __init__(
        self, lun: Lun, control: Registration, data: Registration, membership: Membership
    ) -> None:
        volatile = data.device.identity.volatile_cache
        self._retained = RetainedWrites() if volatile else None
        self._keeper = Keeper(lun, control, data, membership, self._retained)
        self._repeats = Repeats()
        self._repeated = self._repeats.ranges
        self.identity = self._keeper.identity

    async def run(self) -> None:
        """Keep the sessions. Returns after `detach` and when this node was evicted.

        When it is cancelled both connections are dropped, and the keys stay registered, as after a
        crash; commands that wait, and later ones, raise `Evicted`.
        """
        async with trio.open_nursery() as nursery:
            if self._retained is not None:
                nursery.start_soon(self._flush_when_due, self._retained)
            await self._keeper.run()
            nursery.cancel_scope.cancel()

    # -- for the owner -------------------------------------------------------------------------
    @property
    def control(self) -> Registration | None:
        """The reserving session, for view and slot block; None while it is being renewed."""
        return self._keeper.control

    async def wait_evicted(self) -> Evicted:
        """Return the reason when the path has ended for good."""
        return await self._keeper.wait_evicted()

    async def detach(self) -> tuple[Registration, Registration]:
        """Flush, stop, and hand back control and data session, for a clean leave.

        The caller issues no more I/O. Raises `Evicted`, and what `flush` raises.
        """
        await self.flush()
        await self._keeper.wait_healthy()
        session, control = self._keeper.flowing, self._keeper.control
        assert session is not None
        assert control is not None
        self._keeper.leave()
        await session.wait_idle()
        return control, session.registration

    def abort(self) -> None:
        """Drop both connections at once, as if the host had died."""
        self._keeper.abort()

    def status(self) -> PathStatus:
        """The state of this moment."""
        keeper = self._keeper
        return PathStatus(
            healthy=not keeper.trouble and keeper.evicted is None,
            trouble=keeper.trouble,
            control_key=keeper.control.key if keeper.control else 0,
            data_key=keeper.data.key if keeper.data else 0,
            recoveries=keeper.recoveries,
            retained_bytes=self._retained.size_bytes if self._retained is not None else 0,
        )

    # -- data ----------------------------------------------------------------------------------
    async def read_into(self, offset_bytes: int, buffer: bytearray | memoryview) -> None:
        session = self._keeper.flowing
        failure: BlockError | None = None
        if session is not None and not self._repeated:
            session.in_flight += 1
            try:
                return await session.device.read_into(offset_bytes, buffer)
            except BlockError as error:
                failure = error
            finally:
                session.in_flight -= 1
                if session.draining:
                    session.ended()

        async def again(session: Session) -> None:
            await session.device.read_into(offset_bytes, buffer)

        # A read waits for repeated writes too: if the target lost its power, what an earlier read
        # has seen of them is there again only afterwards.
        ranges = [(offset_bytes, memoryview(buffer).nbytes)]
        return await self._repeat(again, session, failure, ranges, changes=False)

    async def write(self, offset_bytes: int, data: Buffer, *, fua: bool = False) -> None:
        session = self._keeper.flowing
        failure: BlockError | None = None
        tokens: list[object] = []
        if session is not None and not self._repeated:
            session.in_flight += 1
            try:
                await session.device.write(offset_bytes, data, fua=fua)
                retained = self._retained
                if retained is not None:
                    retained.add(offset_bytes, data)
            except BlockError as error:
                failure = error
                tokens = self._repeats.add([(offset_bytes, memoryview(data).nbytes)])
            finally:
                session.in_flight -= 1
                if session.draining:
                    session.ended()
            if failure is None:
                if retained is not None and retained.size_bytes >= STOP_BYTES:
                    await retained.wait_room()
                return

        async def again(session: Session) -> None:
            await session.device.write(offset_bytes, data, fua=fua)
            if self._retained is not None:
                self._retained.add(offset_bytes, data)

        ranges = [(offset_bytes, memoryview(data).nbytes)]
        await self._repeat(again, session, failure, ranges, tokens)

    async def flush(self) -> None:
        async def once(session: Session) -> None:
            mark = self._retained.mark() if self._retained is not None else 0
            await session.device.flush()
            if self._retained is not None:
                self._retained.forget(mark)

        await self._repeat(once)

    async def unmap(self, ranges: Sequence[tuple[int, int]]) -> None:
        async def once(session: Session) -> None:
            await session.device.unmap(ranges)

        await self._repeat(once, ranges=ranges)

    # -- repeating -------------------------------------------------------------------------------
    async def _repeat(
        self,
        command: Callable[[Session], Awaitable[None]],
        session: Session | None = None,
        failure: BlockError | None = None,
        ranges: Ranges = (),
        tokens: list[object] | None = None,
        *,
        changes: bool = True,
    ) -> None:
        """Issue a command until it was answered, each time after what its failure asks for.

        ``ranges`` is what it reads or changes, ``tokens`` its place in `Repeats` if it changes
        them and failed already.
        """
        pauses = iter(BUSY_PAUSES_S)
        tokens = tokens or []
        try:
            while True:
                if failure is not None:
                    assert session is not None
                    await self._digest(session, failure, next(pauses, BUSY_PAUSES_S[-1]))
                session = await self._keeper.wait_flowing()
                while not tokens and self._repeats.overlap(ranges):
                    await self._repeats.wait_change()
                    session = await self._keeper.wait_flowing()
                session.in_flight += 1
                try:
                    return await command(session)
                except BlockError as error:
                    failure = error
                    # Before the session counts as idle: then data may flow on the next one.
                    tokens = tokens or (self._repeats.add(ranges) if changes else [])
                finally:
                    session.in_flight -= 1
                    if session.draining:
                        session.ended()
        finally:
            if tokens:
                self._repeats.remove(tokens)

    async def _digest(self, session: Session, failure: BlockError, pause_s: float) -> None:
        """Do what a failed command asks for before it goes again; raise it if it must not."""
        try:
            match failure:
                case OutcomeUnknown():
                    self._keeper.close(session, failure)
                case UnitAttention():
                    await session.registration.heed(failure)
                case ReservationConflict():
                    await session.registration.confirm()
                    self._keeper.disturbed()
                    await trio.sleep(pause_s)
                case TargetBusy():
                    await trio.sleep(pause_s)
                case _:
                    raise failure
        except (PathClosed, OutcomeUnknown) as closed:
            self._keeper.close(session, closed)

    async def _flush_when_due(self, retained: RetainedWrites) -> None:
        """Bound what is kept for a target that may forget it."""
        try:
            while True:
                await retained.wait_due()
                try:
                    await self.flush()
                except Evicted:
                    return
                except BlockError as error:
                    # Whoever needs it stable flushes himself and is told; here it goes again.
                    log.error("the target does not flush: %s", error)  # noqa: TRY400
                    await trio.sleep(1)
        finally:
            retained.stop()
