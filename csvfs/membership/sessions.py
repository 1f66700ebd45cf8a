"""A node's sessions with the LUN, as the arbiter needs them: newcomer's, control and data.

Theory. Each kind of session has an initiator port of its own, chosen once for the process: to log
in again closes the own session of before (reinstatement), so that nobody else has to. Each control
and data session has the next generation of the incarnation's key, registered once, ever.

The *paths* are the control and the data session; they live and end together. Their end is told
(`on_lost`) before any command of theirs that has no answer ends, so that nobody who waits for one
can believe the paths to be good: the devices call back (`BlockDevice.on_lost`) before they answer.

invariants (`check`):
- there is a data session only beside a control session of the same incarnation;
- a generation is taken once, whatever becomes of it;
- nothing is sent on a session that is not the present one of its kind.

Concurrency. `run` holds one task for each session, which waits for its loss; all else is done by
the caller's task. Losses are noticed at any `await`.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from random import Random
from typing import Final

import trio

from csvfs.ondisk.slots import Session, SessionKind
from lockmgr.cluster.view import NodeId
from redirector.block.device import (
    BlockDevice,
    InitiatorPort,
    LoginFailed,
    Lun,
    LunIdentity,
    OutcomeUnknown,
)
from redirector.block.keys import PathKey, choose_port, key_words
from redirector.block.reservations import Registration, patiently

_log = logging.getLogger(__name__)

LOGIN_TIMEOUT_S: Final = 5.0
CONTROL_PATIENCE_S: Final = 4.0
"""A control session is given up after so long a silence, however slow the target was before: the
others evict a node that shows no life for 6 s."""
_LOGOUT_LIMIT_S: Final = 5.0


class Sessions:
    """See the module's docstring. ``on_lost(keys)`` is told of the keys of paths that are gone; it
    neither waits nor raises."""

    def __init__(
        self,
        lun: Lun,
        initiator_name: str,
        rng: Random,
        on_lost: Callable[[tuple[int, ...]], None],
    ) -> None:
        self.lun = lun
        self.newcomer: Registration | None = None
        self.control: Registration | None = None
        self.data: Registration | None = None
        self.restarted = False
        """When the present paths were opened: the target had forgotten earlier ones."""
        self.ended = False
        self.leaving = False
        """The paths will be closed by others, and that is as it should be."""
        self.control_lun = lun.with_patience(CONTROL_PATIENCE_S)
        """For small I/O, and for fences: the first login on it has the own InitiatorName."""
        self._newcomer_port = choose_port(initiator_name, rng)
        self._ports = {
            SessionKind.CONTROL: choose_port(initiator_name, rng),
            SessionKind.DATA: choose_port(initiator_name, rng),
        }
        self._on_lost = on_lost
        self._node: NodeId | None = None
        self._generation = 0
        self._identity: LunIdentity | None = None
        self._last_keys: dict[InitiatorPort, int] = {}
        self._opening: list[int] = []
        """Keys that may have been registered for paths that are being opened."""
        self._known_keys: frozenset[int] = frozenset()
        """Those of the last paths that were open: as long as the target remembers, they are
        registered, unless somebody has fenced them."""
        self._known_generation = 0
        self._saw_restart = False
        self._nursery: trio.Nursery | None = None

    # -- what others ask -----------------------------------------------------------------------
    @property
    def used(self) -> Registration:
        """The control session, or the newcomer's as long as there is no other. Raises
        `OutcomeUnknown`."""
        registration = self.control or self.newcomer
        if registration is None:
            raise OutcomeUnknown(f"{self.lun.url}: there is no session")
        return registration

    @property
    def own_keys(self) -> frozenset[int]:
        """Of the sessions that are open."""
        present = (self.newcomer, self.control, self.data)
        return frozenset(each.key for each in present if each is not None)

    @property
    def own_ports(self) -> frozenset[InitiatorPort]:
        """Of all sessions that this process opens: to log in with one closes the own session."""
        return frozenset((self._newcomer_port, *self._ports.values()))

    # -- life ------------------------------------------------------------------------------------
    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch the sessions, until cancelled; then all are dropped, and stay registered."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None
            self.abort()

    def start(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do this beside; it ends with `run`."""
        assert self._nursery is not None, "the sessions are not watched: see `run`"
        self._nursery.start_soon(work)

    def abort(self) -> None:
        """Drop everything, for good; what is registered stays so."""
        self.ended = True
        self.drop_newcomer()
        self.drop_paths("the sessions were dropped")

    async def aclose(self) -> None:
        """Log out everywhere, for good; what is registered stays so ("parked")."""
        self.ended = True
        for registration in self._take_all():
            await log_out(registration.device)

    def _take_all(self) -> list[Registration]:
        present = (self.newcomer, self.data, self.control)
        self.newcomer = self.control = self.data = None
        taken = [each for each in present if each is not None]
        for registration in taken:
            registration.device.on_lost = None
        return taken

    # -- the newcomer's session ------------------------------------------------------------------
    async def open_newcomer(self, key: int) -> Registration:
        """In place of the one before it."""
        self.drop_newcomer()
        port = self._newcomer_port
        device = await self._log_in(self.control_lun, port)
        try:
            registration = await self._register(device, key)
            self._expect_alive(device)
        except BaseException:
            device.abort()
            raise
        self.newcomer = registration
        self._watch(device, self.drop_newcomer)
        return registration

    def drop_newcomer(self) -> None:
        registration, self.newcomer = self.newcomer, None
        if registration is not None:
            _drop(registration.device)

    # -- the paths -------------------------------------------------------------------------------
    def next_sessions(self, node: NodeId) -> tuple[Session, Session]:
        """The control and the data session to be opened next, as the slot block says it. Raises
        `KeysExhausted`."""
        if node != self._node:
            self._node, self._generation = node, 0
        return self._next(SessionKind.CONTROL), self._next(SessionKind.DATA)

    def _next(self, kind: SessionKind) -> Session:
        assert self._node is not None
        port = self._ports[kind]
        key = PathKey(*self._node, self._generation + 1)
        self._generation = key.generation
        return Session(kind, key.generation, key.pack(), port.name, port.isid)

    async def open_path(self, session: Session) -> Registration:
        """Log in and REGISTER; `adopt` or `give_up` follows."""
        is_control = session.kind is SessionKind.CONTROL
        port = InitiatorPort(session.initiator_name, session.isid)
        lun = self.control_lun if is_control else self.lun
        device = await self._log_in(lun.through(session.portal) if session.portal else lun, port)
        try:
            if is_control:
                await self._look_for_restart(device)
            self._opening.append(session.key)
            registration = await self._register(device, session.key)
        except BaseException:
            device.abort()
            raise
        return registration

    def adopt(self, control: Registration, data: Registration | None) -> None:
        """These are the paths now. Raises `OutcomeUnknown` if one was lost meanwhile."""
        for registration in (control, data):
            if registration is not None:
                self._expect_alive(registration.device)
        self.control, self.data = control, data
        self._opening.clear()
        if data is not None:
            self._known_keys = frozenset((control.key, data.key))
            self.restarted, self._saw_restart = self._saw_restart, False
        for registration in (control, data):
            if registration is not None:
                self._watch(registration.device, self._path_lost)

    def give_up(self, *registrations: Registration | None) -> None:
        """Paths that are being opened come to nothing."""
        keys = tuple(self._opening)
        self._opening.clear()
        if keys:
            self._on_lost(keys)
        for registration in registrations:
            if registration is not None:
                registration.device.abort()

    def drop_paths(self, why: str) -> None:
        """Both, if there are any; told before any of their commands ends."""
        dropped = [each for each in (self.control, self.data) if each is not None]
        self.control = self.data = None
        if not dropped:
            return
        level = logging.INFO if self.ended or self.leaving else logging.WARNING
        _log.log(level, "%s: the paths are closed: %s", self.lun.url, why)
        for registration in dropped:
            registration.device.on_lost = None
        self._on_lost(tuple(registration.key for registration in dropped))
        for registration in dropped:
            _drop(registration.device)

    def drop(self, registration: Registration, why: str) -> None:
        """That session is of no use any more; if it is a path, neither is the other one."""
        if registration is self.newcomer:
            self.drop_newcomer()
        elif registration in (self.control, self.data):
            self.drop_paths(why)

    def release(self, registration: Registration) -> None:
        """That path is unregistered: its end is no loss."""
        registration.device.on_lost = None
        if registration is self.data:
            self.data = None
        elif registration is self.control:
            self.control = None

    def _path_lost(self) -> None:
        self.drop_paths("a session was lost")

    # -- logging in ------------------------------------------------------------------------------
    async def _log_in(self, lun: Lun, port: InitiatorPort) -> BlockDevice:
        if self.ended:
            raise OutcomeUnknown(f"{self.lun.url}: this node has stopped")
        device = await lun.login(port, timeout_s=LOGIN_TIMEOUT_S)
        try:
            self._expect_same_lun(device.identity)
        except BaseException:
            device.abort()
            raise
        return device

    async def _register(self, device: BlockDevice, key: int) -> Registration:
        former = self._last_keys.get(device.port)
        self._last_keys[device.port] = key
        former_keys = () if former is None else (former,)
        return await Registration.register(device, key, former_keys=former_keys)

    async def _look_for_restart(self, device: BlockDevice) -> None:
        """Before REGISTER: what the target should remember of the last paths.

        Keys may be gone because somebody has fenced them: what is believed of the target then costs
        some writes that are repeated, and nothing else.
        """
        answer = await patiently(device.read_keys)
        gone = self._known_keys - set(answer.keys)
        went_back = answer.generation < self._known_generation
        if gone or went_back:
            if not self._saw_restart:
                words = ", ".join(key_words(key) for key in sorted(gone)) or "no key"
                if went_back:
                    _log.warning(
                        "%s: the target has started again, and forgot %s", self.lun.url, words
                    )
                else:
                    _log.info("%s: the target does not know %s any more", self.lun.url, words)
            self._saw_restart = True
        self._known_generation = answer.generation

    def note_generation(self, generation: int) -> None:
        """PRGENERATION, as it was read on a session that is open."""
        self._known_generation = max(self._known_generation, generation)

    def _expect_same_lun(self, found: LunIdentity) -> None:
        known = self._identity = self._identity or found
        if (found.device_id, found.serial) != (known.device_id, known.serial):
            raise LoginFailed(f"{self.lun.url} is another LUN now (serial {found.serial})")
        if found.size_bytes < known.size_bytes:
            raise LoginFailed(f"{self.lun.url} has shrunk to {found.size_bytes} bytes")

    def _expect_alive(self, device: BlockDevice) -> None:
        if device.lost or self.ended:
            raise OutcomeUnknown(f"{self.lun.url}: a session was lost as soon as it was open")

    def _watch(self, device: BlockDevice, lost: Callable[[], None]) -> None:
        device.on_lost = lost
        self.start(partial(_notice, device))

    # -- invariants ------------------------------------------------------------------------------
    def check(self) -> None:
        """Assert the invariants."""
        if self.data is not None:
            assert self.control is not None
            control, data = PathKey.parse(self.control.key), PathKey.parse(self.data.key)
            assert control is not None and data is not None
            assert control.is_of(data.slot, data.incarnation)
            assert max(control.generation, data.generation) <= self._generation


async def _notice(device: BlockDevice) -> None:
    """Until it is lost, which it says itself; then nothing of it is left."""
    await device.wait_lost()
    device.abort()


def _drop(device: BlockDevice) -> None:
    """Close it now, unless it is about to end by itself: its watcher does that."""
    device.on_lost = None
    if not device.lost:
        device.abort()


async def log_out(device: BlockDevice) -> None:
    """Say goodbye, but not for ever; the session is gone afterwards."""
    with trio.CancelScope(shield=True), trio.move_on_after(_LOGOUT_LIMIT_S):
        await device.aclose()
    device.abort()
