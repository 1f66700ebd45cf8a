"""Whether data may flow, on which session, and whether it may be answered: what the path is told.

Theory. The membership opens sessions, fences lost ones and reads the view (`lockmgr.cluster`); it
tells, and this keeps the facts together:

    use        a session is open, registered, and the view read on it lists us. Nothing flows yet
    ready      proven: nothing of any earlier session is on its way any more, and nothing can come
    lost       that session is over
    lease      until when what came back may be answered
    evict      this incarnation is over, for good

Data flows on a session that was said to be ready, after every command of earlier sessions has
ended here (so that the ranges of those to be issued again are noted) and after what a restarted
target may have forgotten was written again.

Whoever says something late names the session that he means: what is said of another than the one in
use changes nothing.

invariants (`check`):
  1. commands are issued only on ``flowing``, which is ``session``, proven, with nothing forgotten
  2. no command of an earlier session is in flight while data flows
  3. after `evict` nothing flows, and nothing is answered

Concurrency. `run` alone makes data flow; everything else is atomic under trio.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from itertools import chain, repeat

import trio

from redirector.block.device import (
    BlockDevice,
    BlockError,
    LoginFailed,
    LunIdentity,
    OutcomeUnknown,
    ReservationConflict,
)
from redirector.block.reservations import PathClosed, Registration
from redirector.retained import RetainedWrites

log = logging.getLogger(__name__)

OnClosed = Callable[[Registration, BlockError], None]
OnStranger = Callable[[], None]

_PAUSES_S = (0.1, 0.2, 0.5, 1.0)
"""Between attempts to write again what the target forgot; the last one for ever."""
_STRANGER_S = 0.5
"""A stranger's reservation is told again after so long."""


class Evicted(BlockError):
    """This incarnation may not use the LUN any more. Final: every command fails from now on."""


boottime_s: Callable[[], float] = partial(time.clock_gettime, time.CLOCK_BOOTTIME)
"""CLOCK_BOOTTIME, seconds: the clock of leases, which runs while this host sleeps."""


def expect_same_lun(known: LunIdentity, found: LunIdentity) -> None:
    """Raise `LoginFailed` if ``found`` is not the LUN that was mounted, or has shrunk."""
    if (found.device_id, found.serial) != (known.device_id, known.serial):
        raise LoginFailed(f"the URL leads to another LUN now (serial {found.serial})")
    if found.size_bytes < known.size_bytes:
        raise LoginFailed(f"the LUN has shrunk to {found.size_bytes} bytes")


class DataSession:
    """One registered session and the commands that are on it now."""

    def __init__(self, registration: Registration) -> None:
        self.registration = registration
        self.device: BlockDevice = registration.device
        self.in_flight = 0
        self.draining = False
        """Somebody waits for ``in_flight`` to become 0: whoever lowers it calls `ended`."""
        self._idle = trio.Event()

    def ended(self) -> None:
        """A command is back."""
        if not self.in_flight:
            self._idle.set()

    async def wait_idle(self) -> None:
        """Return when every command has ended. Only for a session that gets no new ones."""
        self.draining = True
        if self.in_flight:
            await self._idle.wait()


class Flow:
    """See the module's docstring. ``on_closed`` and ``on_stranger`` are those of `DataPath`."""

    def __init__(
        self,
        identity: LunIdentity,
        on_closed: OnClosed,
        on_stranger: OnStranger,
        clock: Callable[[], float],
    ) -> None:
        self.identity = identity
        self.clock = clock
        self.flowing: DataSession | None = None
        self.session: DataSession | None = None
        """The one in use."""
        self.answer_until_s = float("-inf")
        self.evicted: Evicted | None = None
        self.trouble = "no session was opened yet"
        """What is being waited for, in words; empty while data flows."""
        self.losses = 0
        self.retained = RetainedWrites() if identity.volatile_cache else None
        self._on_closed = on_closed
        self._on_stranger = on_stranger
        self._stranger_told_s = float("-inf")
        self._proven = False
        self._restarted = False
        self._earlier: list[DataSession] = []
        self._changed = trio.Event()

    # -- what is told --------------------------------------------------------------------------
    def use(self, registration: Registration, *, restarted: bool) -> None:
        """See `DataPath.use`."""
        if self.evicted is not None:
            return
        if self.session is not None:
            self._leave(self.session, "another session was opened")
        self._restarted |= restarted
        try:
            expect_same_lun(self.identity, registration.device.identity)
        except LoginFailed as error:
            log.error("%s", error)  # noqa: TRY400 (told, not raised: the owner drops the session)
            self.trouble = str(error)
            self._on_closed(registration, error)
            return
        if registration.device.identity.volatile_cache and self.retained is None:
            self.retained = RetainedWrites()
        self.session = DataSession(registration)
        self.trouble = "waiting for the proof that nothing of earlier sessions can come"
        self._tell()

    def ready(self, registration: Registration) -> None:
        """See `DataPath.ready`."""
        if self.session is not None and self.session.registration is registration:
            self._proven = True
            self._tell()

    def lost(self, registration: Registration, why: str) -> None:
        """See `DataPath.lost`."""
        if self.session is not None and self.session.registration is registration:
            self._leave(self.session, why)

    def lease(self, until_s: float) -> None:
        """See `DataPath.lease_until`."""
        if self.evicted is None and until_s > self.answer_until_s:
            self.answer_until_s = until_s
            self._tell()

    def end(self, words: str) -> None:
        """Everything that waits, and everything later, raises `Evicted`."""
        if self.evicted is not None:
            return
        self.evicted = Evicted(words)
        self.trouble = words
        self.answer_until_s = float("-inf")
        self._proven = False
        if self.session is not None:
            self._earlier.append(self.session)
        self.session = self.flowing = None
        if self.retained is not None:
            self.retained.stop()
        self._tell()

    def abort(self) -> None:
        """After `end`: drop the connection, so that what is in flight ends now."""
        for session in self._earlier:
            session.device.abort()

    # -- for those who do I/O --------------------------------------------------------------------
    async def wait_flowing(self) -> DataSession:
        """The data session, as soon as data may flow. Raises `Evicted`."""
        while self.flowing is None:
            if self.evicted is not None:
                raise Evicted(str(self.evicted))
            await self._changed.wait()
        return self.flowing

    async def wait_lease(self) -> None:
        """Return when what came back may be answered. Raises `Evicted`."""
        while self.clock() >= self.answer_until_s:
            if self.evicted is not None:
                raise Evicted(str(self.evicted))
            await self._changed.wait()

    def closed(self, session: DataSession, why: BlockError) -> None:
        """A command has found that session lost, or not registered any more. Idempotent."""
        if session is not self.session:
            return
        if isinstance(why, PathClosed):
            # Perhaps the target forgot the key; if somebody preempted it this costs only time.
            self._restarted = True
        # Its owner hears of it before any of its commands goes on.
        self._on_closed(session.registration, why)
        if session is self.session:
            self._leave(session, str(why))

    def stranger(self) -> None:
        """A command conflicts although the own key is registered."""
        now = self.clock()
        if now - self._stranger_told_s >= _STRANGER_S:
            self._stranger_told_s = now
            log.warning("a stranger's reservation is in the way")
            self._on_stranger()

    async def wait_retaining(self) -> RetainedWrites:
        """The writes that are kept, as soon as some session's cache is volatile."""
        while self.retained is None:
            await self._changed.wait()
        return self.retained

    async def wait_idle(self) -> None:
        """After `end`: return when no command is in flight on any session."""
        for session in self._earlier:
            await session.wait_idle()

    # -- making it flow --------------------------------------------------------------------------
    async def run(self) -> None:
        """Make data flow whenever it may. Returns when this incarnation is over."""
        while self.evicted is None:
            if self._proven and self.flowing is None:
                assert self.session is not None
                await self._begin(self.session)
            else:
                await self._changed.wait()

    async def _begin(self, session: DataSession) -> None:
        # Before anything is written again: the writes that end now are to be among it.
        while self._earlier:
            await self._earlier[0].wait_idle()
            del self._earlier[0]
        if self._restarted:
            await self._write_again(session)
        if session is self.session and self.evicted is None:
            assert not self._restarted
            self.flowing = session
            self.trouble = ""
            log.info("data flows")
            self._tell()

    async def _write_again(self, session: DataSession) -> None:
        """Until it is done or ``session`` is not in use any more."""
        pauses = chain(_PAUSES_S, repeat(_PAUSES_S[-1]))
        while session is self.session and self.evicted is None:
            try:
                await self._write_once(session.registration)
            except (PathClosed, OutcomeUnknown) as error:
                self.closed(session, error)
            except BlockError as error:
                if isinstance(error, ReservationConflict):
                    self.stranger()
                log.warning("what the target forgot is not written again: %s", error)
                self.trouble = f"writing again what the target forgot: {error}"
                await trio.sleep(next(pauses))
            else:
                # Also if another restart was told meanwhile: there is nothing left to be forgotten.
                self._restarted = False
                return

    async def _write_once(self, data: Registration) -> None:
        retained = self.retained
        if retained is None or not len(retained):
            return
        log.info("writing %d bytes again", retained.size_bytes)
        self.trouble = "writing again what the target may have forgotten"
        mark = retained.mark()
        for offset_bytes, piece in retained.newest():
            await data.ask(partial(data.device.write, offset_bytes, piece))
        await data.ask(data.device.flush)
        retained.forget(mark)

    def _leave(self, session: DataSession, why: str) -> None:
        log.info("the data session is lost: %s", why)  # who closed it says what people must know
        self.session = self.flowing = None
        self._proven = False
        self._earlier.append(session)
        self.losses += 1
        self.trouble = f"the session was lost: {why}"
        session.device.abort()
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def check(self) -> None:
        """Assert the invariants."""
        if self.flowing is not None:
            assert self.flowing is self.session
            assert self._proven
            assert not self._restarted
            assert self.evicted is None
        assert self.session is not None or not self._proven
        if self.flowing is not None:
            assert not any(session.in_flight for session in self._earlier)
        assert self.evicted is None or self.clock() >= self.answer_until_s
