"""What a member wants done on the LUN, done: `lockmgr.cluster.effects` over real sessions.

`LunArbiter.carry_out` does one I/O and says how it ended:

    returned                                  Good
    refused at the first command: conflict,
    2A03, 2A05, the key is not registered     Refused: nothing was done
    anything else                             Unknown: nobody continues on an assumption

After `Refused` and `Unknown` that session is closed, and with a path the other; a survey on the
next ones shows what happened. Only what was certainly not done is sent again: past unit attentions
(which are heeded: `redirector.block.reservations`), while the target is busy, after a RESERVE(6)
of a stranger was reset away.

invariants (`check`): those of `csvfs.membership.sessions`.

Concurrency. `run` must be running. `carry_out` may be called by many tasks at once, but opening and
closing by one at a time. ``on_lost`` and ``on_opened`` are called in the middle of things, neither
wait nor raise, and call nothing here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from random import Random, SystemRandom
from typing import Final

import trio

from csvfs.format import ProbeFlag, Session, Superblock
from csvfs.membership.path_keys import owner_of, victims_of_sessions
from csvfs.membership.sessions import Sessions, log_out
from csvfs.membership.volume_io import VolumeIO
from lockmgr.cluster import effects, outcomes
from lockmgr.cluster.blocks import Identity
from lockmgr.cluster.outcomes import Good, Outcome, Refused, Unknown, Why
from lockmgr.cluster.view import NodeId
from redirector.block.device import (
    BlockError,
    Lun,
    OutcomeUnknown,
    ReservationConflict,
    UnitAttention,
)
from redirector.block.keys import KeysExhausted
from redirector.block.reservations import (
    NobodyHolds,
    PathClosed,
    Registration,
    TakeoverLost,
    Victim,
    fence,
)

_log = logging.getLogger(__name__)

Contest = outcomes.Won | outcomes.Lost | outcomes.NobodyHolds
Opened = Callable[[Registration, Registration], None]

_SYSTEM_RANDOM: Final = SystemRandom()


class LunArbiter:
    """See the module's docstring.

    ``on_lost(keys)``: paths with these keys are gone, the control session's first; said before any
    of their commands that has no answer ends. Also of paths that came to nothing while they were
    opened. ``on_opened(control, data)``: there are new ones, `restarted` and `data` are theirs.
    ``on_opened`` comes before the answer to its `OpenPaths`, ``on_lost`` of it after.

    Raises ValueError if ``identity`` does not fit into the blocks that it is to be written into.
    """

    def __init__(
        self,
        lun: Lun,
        superblock: Superblock,
        identity: Identity,
        initiator_name: str,
        *,
        on_lost: Callable[[tuple[int, ...]], None],
        on_opened: Opened = lambda _control, _data: None,
        rng: Random = _SYSTEM_RANDOM,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.lun = lun
        self.trouble = ""
        """Why the last I/O that was not Good was not; empty after one that was."""
        self._sessions = Sessions(lun, initiator_name, rng, on_lost)
        self._volume = VolumeIO(self._sessions.control_lun, superblock, identity, now_ns())
        self._on_opened = on_opened
        self._knows_abort = bool(superblock.probe & ProbeFlag.PREEMPT_ABORT_WORKS)
        self._resetting = False

    # -- what others ask -----------------------------------------------------------------------
    @property
    def data(self) -> Registration | None:
        """The data session of the last `OpenPaths`, until it is lost."""
        return self._sessions.data

    @property
    def control(self) -> Registration | None:
        """The control session."""
        return self._sessions.control

    @property
    def certificates(self) -> dict[bytes, bytes]:
        """By fingerprint, DER: those that join and slot blocks showed last, and the own one."""
        return self._volume.certificates

    @property
    def restarted(self) -> bool:
        """When the present paths were opened, the target had forgotten earlier ones: it was started
        again, and has lost what its cache had. May be wrong, but only if they were fenced."""
        return self._sessions.restarted

    def lose(self, registration: Registration, why: BlockError) -> None:
        """Its user has found that it is closed: not registered any more, or worse."""
        self._sessions.drop(registration, str(why))

    def stranger(self) -> None:
        """The user of the data session gets conflicts although its key is registered: a stranger's
        RESERVE(6). Reset it away; returns at once."""
        if not self._resetting:
            self._resetting = True
            self._sessions.start(self._reset)

    async def _reset(self) -> None:
        try:
            await self._volume.reset_stranger("I/O conflicts")
        except BlockError as error:
            self.trouble = f"a RESERVE(6) of another system cannot be reset: {error}"
        finally:
            self._resetting = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch the sessions, until cancelled; then all are dropped, and stay registered."""
        await self._sessions.run(task_status=task_status)

    def expect_end(self) -> None:
        """This node is about to leave: a successor's PREEMPT closes its paths."""
        self._sessions.leaving = True

    async def aclose(self) -> None:
        """Log out everywhere, for good; what is registered stays so ("parked")."""
        await self._sessions.aclose()

    def abort(self) -> None:
        """Drop everything, for good; what is registered stays so."""
        self._sessions.abort()

    def check(self) -> None:
        """Assert the invariants."""
        self._sessions.check()

    # -- carrying out ----------------------------------------------------------------------------
    async def carry_out(self, effect: effects.AnyIo) -> Outcome:
        """Do it, and say how it ended. Raises `KeysExhausted` when this incarnation has used up its
        path generations: it can only leave, and come back as another one.
        """
        registration = self._session_for(effect)
        try:
            value = await self._do(effect)
        except KeysExhausted:
            raise
        except BlockError as error:
            outcome = _outcome_of(effect, error)
            self.trouble = f"{type(effect).__name__}: {error}"
            _log.info("%s: %s", self.lun.url, self.trouble)
            if registration is not None:
                self._sessions.drop(registration, self.trouble)
            return outcome
        self.trouble = ""
        return Good(value)

    def _session_for(self, effect: effects.AnyIo) -> Registration | None:
        """What is closed if it fails; those that open and close see to that themselves."""
        sessions = self._sessions
        match effect:
            case effects.OpenNewcomer() | effects.DropNewcomer() | effects.OpenPaths():
                return None
            case effects.WriteJoin():
                return sessions.newcomer
            case effects.WriteHeartbeat() | effects.Unregister():
                return sessions.control
            case _:
                return sessions.control or sessions.newcomer

    async def _do(self, effect: effects.AnyIo) -> outcomes.Value:
        sessions, volume = self._sessions, self._volume
        match effect:
            case effects.OpenNewcomer():
                return await self._open_newcomer(effect.key)
            case effects.DropNewcomer():
                await self._drop_newcomer()
            case effects.OpenPaths():
                return await self._open_paths(NodeId(effect.slot, effect.incarnation))
            case effects.Survey():
                return await self._survey(sessions.used)
            case effects.ReadBlocks():
                return await volume.read_blocks(sessions.used)
            case effects.WriteHeartbeat():
                await volume.write_heartbeat(_present(sessions.control), effect.heartbeat)
            case effects.WriteJoin():
                await volume.write_join(_present(sessions.newcomer), effect.request)
            case effects.WriteView():
                await volume.write_view(sessions.used, effect.view)
            case effects.Take():
                return await _contend(sessions.used.take(effect.old_key))
            case effects.Reserve():
                return await _contend(sessions.used.reserve())
            case effects.Fence():
                await self._fence(effect)
            case effects.Unregister():
                await self._unregister(effect.keep)
            case effects.Knock():
                raise AssertionError("to knock is the network's")
        return None

    async def _survey(self, registration: Registration) -> outcomes.Surveyed:
        """View, reservation, keys, in this order; the last two are of one moment."""
        view = await self._volume.read_view(registration)
        standing = await registration.survey()
        self._sessions.note_generation(standing.keys.generation)
        return outcomes.Surveyed(
            view, standing.holder_key, standing.keys.keys, standing.keys.generation
        )

    # -- opening and closing ---------------------------------------------------------------------
    async def _open_newcomer(self, key: int) -> outcomes.Opened:
        try:
            registration = await self._sessions.open_newcomer(key)
        except ReservationConflict as conflict:
            await self._volume.reset_stranger(conflict)
            raise
        try:
            return outcomes.Opened(key, await self._survey(registration))
        except BaseException:
            self._sessions.drop_newcomer()
            raise

    async def _drop_newcomer(self) -> None:
        registration = self._sessions.newcomer
        if registration is None:
            return
        try:
            if await registration.holder() != registration.key:
                await registration.unregister()
        except BlockError:
            pass  # lost, or fenced already: a newcomer's key is fenced by whoever holds
        if registration is self._sessions.newcomer:
            self._sessions.newcomer = None
            registration.device.on_lost = None
            await log_out(registration.device)

    async def _open_paths(self, node: NodeId) -> outcomes.Opened:
        sessions = self._sessions
        sessions.drop_paths("new ones are wanted")
        wanted = sessions.next_sessions(node)
        control: Registration | None = None
        data: Registration | None = None
        try:
            control = await sessions.open_path(wanted[0])
            survey = await self._survey(control)
            if survey.view.lists(*node):
                # The data session is made through the same portal: the block tells it beforehand.
                portal = control.device.portal
                wanted = (replace(wanted[0], portal=portal), replace(wanted[1], portal=portal))
                await self._volume.write_slot_block(control, node, wanted, survey.view)
                data = await sessions.open_path(wanted[1])
                view = await self._volume.read_view(data)
                survey = survey if view.lists(*node) else replace(survey, view=view)
            if not survey.view.lists(*node):
                # Evicted. Nobody looks for these keys any more: they are not left behind.
                await self._withdraw(survey.holder_key, data, control)
                if data is not None:
                    data.device.abort()
                    data = None
            sessions.adopt(control, data)
        except BaseException as error:
            sessions.give_up(data, control)
            if isinstance(error, ReservationConflict):
                await self._volume.reset_stranger(error)
            raise
        if data is not None:
            self._on_opened(control, data)
        return outcomes.Opened(control.key, survey)

    async def _withdraw(self, holder_key: int, *paths: Registration | None) -> None:
        for path in paths:
            if path is not None and path.key != holder_key:
                with suppress(PathClosed, ReservationConflict):
                    await path.unregister()

    async def _unregister(self, keep: int) -> None:
        sessions = self._sessions
        going = [each for each in (sessions.data, sessions.control) if each and each.key != keep]
        if not going:
            raise OutcomeUnknown("there is no path to be unregistered")
        # Nobody gives up the holder's key: without it anyone could write.
        if await going[-1].holder() in {each.key for each in going}:
            raise OutcomeUnknown("the key that is to be unregistered holds the reservation")
        for registration in going:
            try:
                await registration.unregister()
            except PathClosed:
                pass  # by somebody else, then
            sessions.release(registration)
            await log_out(registration.device)

    # -- certificates ----------------------------------------------------------------------------
    async def read_certificates(self, nodes: Iterable[NodeId]) -> None:
        """Look for those of these nodes in their slot blocks, and in join blocks, if there is one
        that has not opened its paths yet: `certificates` has what is there. If that fails, the
        session is closed, as it is by any I/O that fails."""
        registration = self._sessions.control or self._sessions.newcomer
        if registration is None:
            return
        try:
            nodes = set(nodes)
            found = await self._volume.slot_blocks_of(registration, nodes)
            if len(found) < len(nodes):
                await self._volume.read_blocks(registration)
        except BlockError as error:
            self.trouble = f"reading certificates: {error}"
            self._sessions.drop(registration, self.trouble)

    # -- fencing ---------------------------------------------------------------------------------
    async def _fence(self, effect: effects.Fence) -> None:
        holder = self._sessions.used
        own = self._sessions.own_keys
        registered = (await holder.ask(holder.device.read_keys)).keys
        keys = [key for key in effect.keys if key in registered]
        keys += [key for key in registered if owner_of(key) in effect.nodes]
        owners = [owner for key in effect.keys if (owner := owner_of(key)) is not None]
        sessions: list[Session] = []
        for block in await self._volume.slot_blocks_of(holder, (*effect.nodes, *owners)):
            node = NodeId(block.slot, block.identity.incarnation)
            sessions += [
                each for each in block.sessions if node in effect.nodes or each.key in effect.keys
            ]
        stragglers = await self._all_of(holder, effect.stragglers, registered)
        victims = [Victim(key=key) for key in dict.fromkeys(keys) if key not in own]
        victims += self._recorded(sessions)
        lun = self._sessions.control_lun
        await _as_long_as_it_lives(
            holder,
            lambda: fence(
                lun, holder, victims, abort=self._knows_abort, stragglers=lambda: stragglers
            ),
        )

    async def _all_of(
        self, holder: Registration, nodes: Sequence[NodeId], registered: Sequence[int]
    ) -> list[Victim]:
        own = self._sessions.own_keys
        keys = {key for key in registered if owner_of(key) in nodes and key not in own}
        blocks = await self._volume.slot_blocks_of(holder, nodes)
        recorded = self._recorded(each for block in blocks for each in block.sessions)
        return [*(Victim(key=key) for key in sorted(keys)), *recorded]

    def _recorded(self, sessions: Iterable[Session]) -> list[Victim]:
        """Never an own one: what that names was closed when this process logged in."""
        own = self._sessions.own_ports
        return [each for each in victims_of_sessions(sessions) if each.port not in own]


_SINGLE = (
    effects.Survey,
    effects.ReadBlocks,
    effects.WriteHeartbeat,
    effects.WriteJoin,
    effects.WriteView,
)
"""What changes nothing, or changes it with one command: refused, nothing was done."""


def _outcome_of(effect: effects.AnyIo, error: BlockError) -> Outcome:
    if isinstance(effect, _SINGLE):
        if isinstance(error, ReservationConflict):
            return Refused(Why.CONFLICT)
        if isinstance(error, PathClosed):
            told = isinstance(error.__cause__, UnitAttention)
            return Refused(Why.PREEMPTED if told else Why.CONFLICT)
    return Unknown()


def _present(registration: Registration | None) -> Registration:
    if registration is None:
        raise OutcomeUnknown("there is no such session")
    return registration


async def _as_long_as_it_lives(path: Registration, work: Callable[[], Awaitable[None]]) -> None:
    """Do what also uses other sessions; given up with `OutcomeUnknown` when this one is lost."""
    outcome: BlockError | None = OutcomeUnknown("the session was lost meanwhile")
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            await path.device.wait_lost()
            nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        try:
            await work()
            outcome = None
        except BlockError as error:
            outcome = error
        nursery.cancel_scope.cancel()
    if outcome is not None:
        raise outcome


async def _contend(contest: Awaitable[None]) -> Contest:
    try:
        await contest
    except TakeoverLost as lost:
        return outcomes.Lost(lost.holder_key)
    except NobodyHolds:
        return outcomes.NobodyHolds()
    return outcomes.Won()
