"""The data path: what the filesystem reads and writes through, told by the membership.

Theory. `DataPath` is a `BlockIO` that survives the loss of sessions, and asks nobody how to. A
healthy command goes straight to the data session. A command that failed is either passed up (medium
error, thin array full, what the target does not know), or issued again when REDIRECTION.md says
that this is safe; until then its caller waits. Newer commands that overlap a write of unknown fate
wait for it. What came back is answered only under a lease: a host that was frozen, and fenced
meanwhile, may have stale answers in its socket, and its clock knows before anybody tells it.

Which session is used, and when data flows on it, is `Flow` (flow.py).

Concurrency. Callers' tasks do the I/O; `run` makes data flow and has, for a volatile cache, one
flusher task. A cancelled caller is held until its command has ended, or leaves at once while it
waits; a write that was interrupted so has an unknown fate, but none that outlasts the next proof.
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
    LunIdentity,
    OutcomeUnknown,
    ReservationConflict,
    TargetBusy,
    UnitAttention,
)
from redirector.block.reservations import PathClosed, Registration
from redirector.flow import DataSession, Evicted, Flow, OnClosed, OnStranger, boottime_s
from redirector.repeats import BUSY_PAUSES_S, Ranges, Repeats
from redirector.retained import STOP_BYTES, RetainedWrites

__all__ = ["DataPath", "DataPathStatus", "Evicted"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DataPathStatus:
    """For ``csvctl status``."""

    flows: bool
    """Commands are issued as they come."""
    answers: bool
    """There is a lease."""
    trouble: str
    """What is being waited for, or why this node was evicted; empty while data flows."""
    key: int
    """Of the session in use; 0: there is none."""
    losses: int
    """Sessions that were lost since the mount."""
    repeating: int
    """Writes with an unknown outcome that are still to be answered."""
    retained_bytes: int
    """Written, and not known to be stable."""


class DataPath(BlockIO):
    """See the module's docstring. Every method may also raise `Evicted`, finally.

    ``identity`` is that of a registered session (before REGISTER a target may not tell whether its
    cache is volatile). ``on_closed(registration, why)`` is called when I/O finds that the session
    in use is lost or not registered any more: its owner drops it, tells the membership, and opens
    another; ``on_stranger()`` about twice a second while commands conflict although the own key is
    registered: the coordinator is to reset the LUN. Both return at once. ``clock`` is that of
    `lease_until`.

    Nothing is issued before `use` and `ready`, nothing is answered before `lease_until`, and
    nothing happens at all unless `run` is running.
    """

    def __init__(
        self,
        identity: LunIdentity,
        *,
        on_closed: OnClosed,
        on_stranger: OnStranger,
        clock: Callable[[], float] = boottime_s,
    ) -> None:
        self.identity = identity
        self._clock = clock
        self._flow = Flow(identity, on_closed, on_stranger, clock)
        self._repeats = Repeats()
        self._repeated = self._repeats.ranges

    async def run(self) -> None:
        """Make data flow. Returns after `detach` and `evict`; cancelled, it is an `evict`."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._flush_when_due)
                await self._flow.run()
                nursery.cancel_scope.cancel()
        finally:
            self.evict("the data path is no longer kept")

    # -- what the membership tells -----------------------------------------------------------------
    def use(self, registration: Registration, *, restarted: bool) -> None:
        """A data session is open and registered, and the view read on it lists us. It takes the
        place of any other, and nothing flows on it yet.

        ``restarted``: the target may have forgotten what was not flushed. That is to be said of
        this opening if READ KEYS, before its REGISTER, lacked a key of a lost session that was
        registered, or if nobody held; said in vain it only repeats writes. What is said of one
        opening counts until data has flowed. A session of another LUN is refused (`on_closed`).
        """
        self._flow.use(registration, restarted=restarted)

    def ready(self, registration: Registration) -> None:
        """The proof for that session: nothing of any session before it is on its way any more, nor
        can come. Ignored if another one is in use by now.
        """
        self._flow.ready(registration)

    def lost(self, registration: Registration, why: str) -> None:
        """That session is lost, and dropped. Ignored if another one is in use. Idempotent."""
        self._flow.lost(registration, why)

    def lease_until(self, until_s: float) -> None:
        """What comes back until then, on ``clock``, may be answered. Never goes back."""
        self._flow.lease(until_s)

    def evict(self, words: str) -> None:
        """This incarnation is over: every command, also one whose answer is here, raises
        `Evicted`; the sessions are dropped. Does nothing after `detach`.
        """
        if self._flow.evicted is None:
            self._flow.end(words)
            self._flow.abort()

    async def detach(self) -> None:
        """Flush and stop, for a clean leave: then nothing is on its way, and the session, which is
        left as it is, belongs to its owner alone. The caller issues no more I/O.

        Raises `Evicted`, and what `flush` raises.
        """
        await self.flush()
        self._flow.end("the volume was left")
        await self._flow.wait_idle()

    def status(self) -> DataPathStatus:
        """The state of this moment."""
        flow = self._flow
        return DataPathStatus(
            flows=flow.flowing is not None,
            answers=self._clock() < flow.answer_until_s,
            trouble=flow.trouble,
            key=flow.session.registration.key if flow.session else 0,
            losses=flow.losses,
            repeating=len(self._repeated),
            retained_bytes=flow.retained.size_bytes if flow.retained is not None else 0,
        )

    def check(self) -> None:
        """Assert the invariants."""
        self._flow.check()
        if self._flow.retained is not None:
            self._flow.retained.check()

    # -- data ----------------------------------------------------------------------------------
    async def read_into(self, offset_bytes: int, buffer: bytearray | memoryview) -> None:
        flow = self._flow
        session = flow.flowing
        failure: BlockError | None = None
        if session is not None and not self._repeated:
            session.in_flight += 1
            try:
                await session.device.read_into(offset_bytes, buffer)
                if self._clock() < flow.answer_until_s:
                    return None
            except BlockError as error:
                failure = error
            finally:
                session.in_flight -= 1
                if session.draining:
                    session.ended()
            if failure is None:
                return await flow.wait_lease()

        async def again(session: DataSession) -> None:
            await session.device.read_into(offset_bytes, buffer)

        # A read waits for repeated writes too: if the target lost its power, what an earlier read
        # has seen of them is there again only afterwards.
        ranges = [(offset_bytes, memoryview(buffer).nbytes)]
        await self._repeat(again, session, failure, ranges, changes=False)
        return await flow.wait_lease()

    async def write(self, offset_bytes: int, data: Buffer, *, fua: bool = False) -> None:
        flow = self._flow
        session = flow.flowing
        failure: BlockError | None = None
        tokens: list[object] = []
        if session is not None and not self._repeated:
            session.in_flight += 1
            try:
                await session.device.write(offset_bytes, data, fua=fua)
                retained = flow.retained
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
                if self._clock() < flow.answer_until_s:
                    return None
                return await flow.wait_lease()

        async def again(session: DataSession) -> None:
            await session.device.write(offset_bytes, data, fua=fua)
            if flow.retained is not None:
                flow.retained.add(offset_bytes, data)

        ranges = [(offset_bytes, memoryview(data).nbytes)]
        await self._repeat(again, session, failure, ranges, tokens)
        return await flow.wait_lease()

    async def flush(self) -> None:
        await self._repeat(self._flush_once)
        await self._flow.wait_lease()

    async def _flush_once(self, session: DataSession) -> None:
        retained = self._flow.retained
        mark = retained.mark() if retained is not None else 0
        await session.device.flush()
        if retained is not None:
            retained.forget(mark)

    async def unmap(self, ranges: Sequence[tuple[int, int]]) -> None:
        async def once(session: DataSession) -> None:
            await session.device.unmap(ranges)

        await self._repeat(once, ranges=ranges)
        await self._flow.wait_lease()

    # -- repeating -------------------------------------------------------------------------------
    async def _repeat(
        self,
        command: Callable[[DataSession], Awaitable[None]],
        session: DataSession | None = None,
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
                session = await self._flow.wait_flowing()
                while not tokens and self._repeats.overlap(ranges):
                    await self._repeats.wait_change()
                    session = await self._flow.wait_flowing()
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

    async def _digest(self, session: DataSession, failure: BlockError, pause_s: float) -> None:
        """Do what a failed command asks for before it goes again; raise it if it must not."""
        try:
            match failure:
                case OutcomeUnknown():
                    self._flow.closed(session, failure)
                case UnitAttention():
                    await session.registration.heed(failure)
                case ReservationConflict():
                    await session.registration.confirm()
                    self._flow.stranger()
                    await trio.sleep(pause_s)
                case TargetBusy():
                    await trio.sleep(pause_s)
                case _:
                    raise failure
        except (PathClosed, OutcomeUnknown) as closed:
            self._flow.closed(session, closed)

    async def _flush_when_due(self) -> None:
        """Bound what is kept for a target that may forget it."""
        retained: RetainedWrites = await self._flow.wait_retaining()
        while True:
            await retained.wait_due()
            try:
                await self._repeat(self._flush_once)
            except Evicted:
                return
            except BlockError as error:
                # Whoever needs it stable flushes himself and is told; here it goes again.
                log.error("the target does not flush: %s", error)  # noqa: TRY400
                await trio.sleep(1)
