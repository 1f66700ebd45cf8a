"""Keeps a node's two sessions: notices losses, opens, fences and switches.

`Recovery` (recovery.py) says what to do, `Registration` and `drain` (block/reservations.py) know
how to talk to the target; this shell joins them, waits between attempts, and tells everybody else
whether data flows. REDIRECTION.md has the timelines.

Concurrency. The keeper task alone opens sessions and changes the reservation. Tasks doing I/O
report trouble (`close`, `disturbed`) and wait (`wait_flowing`). A watcher task for each session
reports its loss. It may be cancelled at any point; the next incarnation clears what it leaves.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import Protocol

import trio

from redirector.block.device import (
    BlockDevice,
    BlockError,
    InitiatorPort,
    LoginFailed,
    Lun,
    LunIdentity,
    ReservationConflict,
)
from redirector.block.keys import KeysExhausted, key_words
from redirector.block.reservations import (
    NobodyHolds,
    PathClosed,
    Registration,
    TakeoverLost,
    TargetRestarted,
    drain,
    patiently,
)
from redirector.flow import Evicted
from redirector.recovery import Do, Kind, Recovery, Step
from redirector.retained import RetainedWrites

log = logging.getLogger(__name__)

LOGIN_TIMEOUT_S = 10.0
PAUSES_S = (0.1, 0.2, 0.5, 1.0)
"""Between attempts; the last one for ever."""
_STEADY_S = 10.0
"""Sessions that lived so long begin again with the shortest pause."""


class Membership(Protocol):
    """What the keeper asks of, and tells, whoever knows the view. All may raise `BlockError` only;
    they are then asked again, perhaps with new sessions.
    """

    async def lists_us(self, path: Registration) -> bool:
        """Read the view on exactly this session: does it list this incarnation?"""
        ...

    async def moved(self, control: Registration, data: Registration) -> None:
        """There are new sessions, and ``control`` holds the reservation: put them into the slot
        block and, if the holder's key is another one, write the next view, on ``control``. Whether
        an earlier attempt landed is for you to find out by reading.
        """
        ...


class Session:
    """One registered session and the commands that are on it now."""

    def __init__(self, kind: Kind, registration: Registration) -> None:
        self.kind = kind
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


class Keeper:
    """See the module's docstring. ``flowing`` is the data session while data may flow."""

    def __init__(
        self,
        lun: Lun,
        control: Registration,
        data: Registration,
        membership: Membership,
        retained: RetainedWrites | None,
    ) -> None:
        self.lun = lun
        self.identity: LunIdentity = data.device.identity
        self.recovery = Recovery.of(control.key, data.key)
        self.evicted: Evicted | None = None
        self.trouble = ""
        """What is being recovered from, in words; empty while all is well."""
        self.recoveries = 0
        self._left = False
        self.flowing: Session | None = None
        self._membership = membership
        self._retained = retained
        self._ports: dict[Kind, InitiatorPort] = {
            Kind.CONTROL: control.device.port,
            Kind.DATA: data.device.port,
        }
        self._sessions: dict[Kind, Session] = {}
        self._closing: list[Session] = []
        self._nursery: trio.Nursery | None = None
        self._wake = trio.Event()
        self._changed = trio.Event()
        self._steady_since = trio.current_time()
        self._pauses = self._fresh_pauses()
        self._sessions[Kind.CONTROL] = Session(Kind.CONTROL, control)
        self._sessions[Kind.DATA] = Session(Kind.DATA, data)
        self._judge_flow()

    # -- for those who do I/O ------------------------------------------------------------------
    async def wait_flowing(self) -> Session:
        """The data session, as soon as data may flow. Raises `Evicted`."""
        while self.flowing is None:
            if self.evicted is not None:
                raise Evicted(str(self.evicted))
            await self._changed.wait()
        return self.flowing

    def close(self, session: Session, why: BlockError) -> None:
        """That session is lost, or not registered any more. Idempotent."""
        if self._sessions.get(session.kind) is not session:
            return
        log.warning("%s: the %s session is lost: %s", self.lun.url, session.kind.value, why)
        del self._sessions[session.kind]
        self._closing.append(session)
        session.device.abort()
        self.recovery.lost(session.kind)
        if isinstance(why, TargetRestarted):
            self._target_restarted(why)
        self.trouble = self.trouble or f"{session.kind.value} session lost: {why}"
        self._judge_flow()
        self._wake.set()

    def _target_restarted(self, why: BlockError) -> None:
        # A session that survived would let old writes land among the repeated ones.
        for session in list(self._sessions.values()):
            if session.kind in self.recovery.viewed:
                self.close(session, PathClosed(str(why)))
        self.recovery.forgot()

    def disturbed(self) -> None:
        """Commands conflict although the own key is registered: reset the LUN."""
        self.recovery.disturbed()
        self._wake.set()

    async def wait_evicted(self) -> Evicted:
        """Return the reason when this incarnation was evicted."""
        while self.evicted is None:
            await self._changed.wait()
        return self.evicted

    # -- for the owner -------------------------------------------------------------------------
    @property
    def control(self) -> Registration | None:
        """The reserving session; None while there is none."""
        session = self._sessions.get(Kind.CONTROL)
        return session.registration if session and self.recovery.holding else None

    @property
    def data(self) -> Registration | None:
        """The data session; None while there is none."""
        session = self._sessions.get(Kind.DATA)
        return session.registration if session else None

    async def wait_healthy(self) -> None:
        """Return when both sessions are good and nothing is left to be done. Raises `Evicted`."""
        while self.recovery.next_step().do is not Do.DONE:
            if self.evicted is not None:
                raise Evicted(str(self.evicted))
            await self._changed.wait()

    async def run(self) -> None:
        """Watch and keep, until cancelled or evicted."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for session in self._sessions.values():
                    nursery.start_soon(self._watch, session)
                while self.evicted is None:
                    await self._wake.wait()
                    self._wake = trio.Event()
                    await self._recover()
                nursery.cancel_scope.cancel()
        finally:
            if not self._left and self.evicted is None:
                self._end(f"{self.lun.url}: the path is no longer kept")

    def leave(self) -> None:
        """Let go of the sessions as they are: from now on they are the caller's alone."""
        self._left = True
        self.evicted = Evicted(f"{self.lun.url}: the path was given up")
        self._judge_flow()
        self._wake.set()

    def abort(self) -> None:
        """Drop both sessions; the keys stay registered."""
        for session in (*self._sessions.values(), *self._closing):
            session.device.abort()

    # -- keeping -------------------------------------------------------------------------------
    async def _watch(self, session: Session) -> None:
        await session.device.wait_lost()
        self.close(session, PathClosed("the connection was closed"))

    async def _recover(self) -> None:
        started = trio.current_time()
        if started - self._steady_since > _STEADY_S:
            self._pauses = self._fresh_pauses()
        while self.evicted is None and (step := self.recovery.next_step()).do is not Do.DONE:
            self.recovery.check()
            if not await self._attempt(step):
                await trio.sleep(next(self._pauses))
        if self.evicted is None and self.trouble:
            self.recoveries += 1
            passed_s = trio.current_time() - started
            log.warning("%s: the path is back after %.1f s", self.lun.url, passed_s)
            self.trouble = ""
        self._steady_since = trio.current_time()
        self._tell()

    async def _attempt(self, step: Step) -> bool:
        """One step; False if it should be tried again only after a pause."""
        session = self._sessions.get(step.kind) if step.kind else None
        try:
            await self._carry_out(step)
        except Evicted as error:
            self._evict(str(error))
        except KeysExhausted as error:
            self._evict(str(error))
        except (NobodyHolds, TakeoverLost) as error:
            log.info("%s: %s; asking again", self.lun.url, error)
        except BlockError as error:
            log.info("%s: %s: %s", self.lun.url, step, error)
            self.trouble = f"{step}: {error}"
            for each in list(self._sessions.values()):
                if each.device.lost:
                    self.close(each, error)
            if session is not None and isinstance(error, PathClosed):
                self.close(session, error)
            if isinstance(error, ReservationConflict):
                self.recovery.disturbed()
            return False
        finally:
            self._judge_flow()
        return True

    async def _carry_out(self, step: Step) -> None:
        match step.do:
            case Do.OPEN:
                assert step.kind is not None
                await self._open(step.kind)
            case Do.TAKE:
                await self._take(self._registration(Kind.CONTROL), step)
            case Do.PREEMPT:
                await self._registration(Kind.CONTROL).preempt(step.key)
                self.recovery.preempted(step.key)
            case Do.DRAIN:
                control = self._registration(Kind.CONTROL)
                await drain(self.lun, control, resets=1)
                self.recovery.drained(step, (await control.ask(control.device.read_keys)).keys)
            case Do.VIEW:
                assert step.kind is not None
                await self._read_view(step.kind)
                self.recovery.saw_view(step)
            case Do.REISSUE:
                await self._write_again(self._registration(Kind.DATA))
                self.recovery.reissued(step)
            case Do.ANNOUNCE:
                await self._membership.moved(
                    self._registration(Kind.CONTROL), self._registration(Kind.DATA)
                )
                self.recovery.told(step)
            case Do.DONE:
                raise AssertionError("there is nothing to do")

    def _registration(self, kind: Kind) -> Registration:
        return self._sessions[kind].registration

    async def _open(self, kind: Kind) -> None:
        path = self.recovery.take_generation()
        device = await self.lun.login(self._ports[kind], timeout_s=LOGIN_TIMEOUT_S)
        try:
            self._expect_same_lun(device.identity)
            if self.recovery.misses_keys((await patiently(device.read_keys)).keys):
                self._target_restarted(PathClosed("the target has restarted: it lost our keys"))
            former_keys = tuple(reversed(self.recovery.unfenced))
            self.recovery.registering()
            registration = await Registration.register(device, path.pack(), former_keys=former_keys)
        except BaseException:
            device.abort()
            raise
        session = self._sessions[kind] = Session(kind, registration)
        self.recovery.opened(kind, registration.key)
        assert self._nursery is not None
        self._nursery.start_soon(self._watch, session)

    def _expect_same_lun(self, found: LunIdentity) -> None:
        known = self.identity
        if (found.device_id, found.serial) != (known.device_id, known.serial):
            raise LoginFailed(f"{self.lun.url} is another LUN now (serial {found.serial})")
        if found.size_bytes < known.size_bytes:
            raise LoginFailed(f"{self.lun.url} has shrunk to {found.size_bytes} bytes")

    async def _take(self, control: Registration, step: Step) -> None:
        holder_key = await control.holder()
        if not holder_key:
            # Noted before RESERVE: if its answer is lost, the next session finds an own key.
            self._target_restarted(PathClosed("the target has restarted: nobody holds"))
            await control.reserve()
        elif holder_key != control.key:
            if not self.recovery.is_own(holder_key):
                raise Evicted(
                    f"{self.lun.url}: somebody else has taken the volume over: the reservation is "
                    f"held by {key_words(holder_key)}. Unmount here"
                )
            await control.take(holder_key)
            self.recovery.preempted(holder_key)
        self.recovery.took(step)

    async def _read_view(self, kind: Kind) -> None:
        if kind is Kind.DATA:
            # From here on their ranges are known: whatever overlaps them waits.
            for session in list(self._closing):
                await session.wait_idle()
                self._closing.remove(session)
        if not await self._membership.lists_us(self._registration(kind)):
            raise Evicted(
                f"{self.lun.url}: the volume's member list does not name this host any more. "
                "Unmount here, and mount again"
            )

    async def _write_again(self, data: Registration) -> None:
        if self._retained is None or not len(self._retained):
            return
        log.warning("%s: writing %d bytes again", self.lun.url, self._retained.size_bytes)
        mark = self._retained.mark()
        for offset_bytes, piece in self._retained.newest():
            await data.ask(partial(data.device.write, offset_bytes, piece))
        await data.ask(data.device.flush)
        self._retained.forget(mark)

    # -- telling ---------------------------------------------------------------------------------
    def _judge_flow(self) -> None:
        flows = self.evicted is None and self.recovery.data_flows
        self.flowing = self._sessions.get(Kind.DATA) if flows else None
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _evict(self, why: str) -> None:
        if self.evicted is None:
            log.error("%s", why)
            self._end(why)

    def _end(self, why: str) -> None:
        self.evicted = Evicted(why)
        self.trouble = why
        self.abort()
        self._judge_flow()

    @staticmethod
    def _fresh_pauses() -> Iterator[float]:
        yield from PAUSES_S
        while True:
            yield PAUSES_S[-1]
