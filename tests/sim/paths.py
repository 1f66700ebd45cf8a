"""The I/O of one daemon: what `lockmgr.cluster.effects` asks for, done on the simulated LUN.

Sessions are `redirector.block.reservations.Registration`s, and registering, surveying, succession
and the fence are the product's own code; this module only says on which session, and turns what
they raise into outcomes:

    ReservationConflict, PathClosed       Refused: the target said no; the session is closed
    OutcomeUnknown, LoginFailed,
    FenceFailed, KeyInUse                 Unknown: the session is dropped
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from random import Random
from typing import TypeVar, cast

from lockmgr.cluster import effects, outcomes
from lockmgr.cluster.outcomes import Good, Outcome, Refused, Unknown, Why
from lockmgr.cluster.view import NodeId
from redirector.block import reservations
from redirector.block.arbiter import Op
from redirector.block.device import (
    BlockDevice,
    BlockError,
    InitiatorPort,
    Lun,
    OutcomeUnknown,
    ReservationConflict,
)
from redirector.block.keys import PathKey, choose_port
from redirector.block.reservations import PathClosed, Registration, Victim
from tests.sim.content import Content
from tests.sim.lun import Session
from tests.sim.oracle import Oracle
from tests.sim.target import SimDevice, SimTarget

T = TypeVar("T")
Contest = outcomes.Won | outcomes.Lost | outcomes.NobodyHolds


def owner_of(key: int) -> NodeId | None:
    """The incarnation that a key belongs to."""
    path = PathKey.parse(key)
    return None if path is None else NodeId(path.slot, path.incarnation)


class Paths:
    """Sessions of one process, and what is done on them."""

    def __init__(
        self,
        target: SimTarget,
        content: Content,
        oracle: Oracle,
        rng: Random,
        initiator_name: str,
        lost: Callable[[tuple[int, ...]], None],
    ) -> None:
        self.target = target
        self.lun = cast("Lun", target)
        self.content = content
        self.oracle = oracle
        self.rng = rng
        self.initiator_name = initiator_name
        self.newcomer: Registration | None = None
        self.control: Registration | None = None
        self.data: Registration | None = None
        self.ready = False
        """`PathsReady` was said of the present paths."""
        self._ports = tuple(choose_port(initiator_name, rng) for _ in range(2))
        """Of control and data sessions, always the same: a login closes the one before it."""
        self._lost = lost
        self._generation = 0

    # -- sessions --------------------------------------------------------------------------
    async def _register(self, key: int, port: InitiatorPort) -> Registration:
        session = await self.target.session(port)
        device = SimDevice(session)
        try:
            return await Registration.register(cast("BlockDevice", device), key)
        except BlockError:
            session.close()
            raise

    @staticmethod
    def _close(registration: Registration | None) -> None:
        if registration is not None:
            cast("SimDevice", registration.device).session.close()

    def _is_alive(self, registration: Registration | None) -> bool:
        return registration is not None and self.session_of(registration).here

    @staticmethod
    def session_of(registration: Registration) -> Session:
        return cast("SimDevice", registration.device).session

    def drop(self) -> None:
        """Both paths, for good."""
        self._drop(lambda _: None)

    def _drop(self, tell: Callable[[tuple[int, ...]], None]) -> None:
        """``tell`` comes before the I/O that is outstanding is answered."""
        self.ready = False
        dropped = [r for r in (self.control, self.data) if r is not None]
        self.control = self.data = None
        for registration in dropped:
            self.session_of(registration).on_lost = None
        if dropped:
            tell(tuple(registration.key for registration in dropped))
        for registration in dropped:
            self._close(registration)

    def path_lost(self, registration: Registration) -> None:
        """A session is of no use any more; if it is a path, both are dropped: `PathLost`."""
        if registration is self.newcomer:
            self._close(registration)
            self.newcomer = None
        elif registration in (self.control, self.data):
            self._drop(self._lost)

    def close_all(self) -> None:
        """Log out everywhere."""
        self._close(self.newcomer)
        self.newcomer = None
        self.drop()

    def _used(self) -> Registration:
        """The control session, or the newcomer's as long as there is no other."""
        registration = self.control or self.newcomer
        if registration is None:
            raise OutcomeUnknown("there is no session")
        return registration

    # -- effects ---------------------------------------------------------------------------
    async def carry_out(self, effect: effects.AnyIo) -> Outcome:
        """Do it, and say how it ended."""
        registration = self.control or self.newcomer
        try:
            value = await _HANDLERS[type(effect)](self, effect)
        except (ReservationConflict, PathClosed) as refusal:
            conflict = isinstance(refusal, ReservationConflict)
            outcome: Outcome = Refused(Why.CONFLICT if conflict else Why.PREEMPTED)
        except BlockError:
            outcome = Unknown()
        else:
            return Good(value)
        if registration is not None and not isinstance(
            effect, effects.OpenNewcomer | effects.DropNewcomer | effects.OpenPaths
        ):
            self.path_lost(registration)
        return outcome

    async def _open_newcomer(self, effect: effects.OpenNewcomer) -> outcomes.Opened:
        self._close(self.newcomer)
        self.newcomer = None
        port = choose_port(self.initiator_name, self.rng)
        registration = await self._register(effect.key, port)
        surveyed = await self._surveyed(registration)
        self.newcomer = registration
        return outcomes.Opened(effect.key, surveyed)

    async def _drop_newcomer(self, _effect: effects.DropNewcomer) -> None:
        registration, self.newcomer = self.newcomer, None
        if registration is None:
            return
        try:
            if await registration.holder() != registration.key:
                await registration.unregister()
        except BlockError:
            pass
        self._close(registration)

    async def _open_paths(self, effect: effects.OpenPaths) -> outcomes.Opened:
        self._drop(self._lost)
        keys = []
        for _ in self._ports:
            self._generation += 1
            keys.append(PathKey(effect.slot, effect.incarnation, self._generation).pack())
        control: Registration | None = None
        data: Registration | None = None
        try:
            control = await self._register(keys[0], self._ports[0])
            surveyed = await self._surveyed(control)
            if surveyed.view.lists(effect.slot, effect.incarnation):
                await self._write_slot_block(control, keys)
                data = await self._register(keys[1], self._ports[1])
                view = await self._read(data, lambda: self.content.view)
                if not view.lists(effect.slot, effect.incarnation):
                    raise OutcomeUnknown("evicted while it was opened")
                if not (self._is_alive(control) and self._is_alive(data)):
                    raise OutcomeUnknown("lost while it was opened")
        except BlockError:
            self._lost(tuple(keys))
            self._close(control)
            self._close(data)
            raise
        self.control, self.data = control, data
        for registration in (control, data):
            if registration is not None:
                self._notice(registration)
        return outcomes.Opened(control.key, surveyed)

    def _notice(self, registration: Registration) -> None:
        session = self.session_of(registration)
        session.on_lost = lambda: self.path_lost(registration)

    async def _write_slot_block(self, control: Registration, keys: list[int]) -> None:
        node = owner_of(control.key)

        def apply() -> None:
            ports = self.content.ports
            for key in [key for key in ports if owner_of(key) == node]:
                del ports[key]
            ports.update(zip(keys, self._ports, strict=True))

        await self._write(control, "the slot block", apply)

    async def _survey(self, _effect: effects.Survey) -> outcomes.Surveyed:
        return await self._surveyed(self._used())

    async def _surveyed(self, registration: Registration) -> outcomes.Surveyed:
        view = await self._read(registration, lambda: self.content.view)
        standing = await reservations.survey(registration.device)
        if registration.key not in standing.keys.keys:
            raise PathClosed("the own key is not registered any more")
        return outcomes.Surveyed(
            view, standing.holder_key, standing.keys.keys, standing.keys.generation
        )

    async def _read_blocks(self, _effect: effects.ReadBlocks) -> outcomes.Blocks:
        content = self.content
        return await self._read(
            self._used(),
            lambda: outcomes.Blocks(
                tuple(content.heartbeats.values()), tuple(content.joins.values())
            ),
        )

    async def _write_heartbeat(self, effect: effects.WriteHeartbeat) -> None:
        beat = effect.heartbeat

        def apply() -> None:
            self.content.heartbeats[beat.slot] = beat

        if self.control is None:
            raise OutcomeUnknown("there is no control session")
        await self._write(self.control, "a heartbeat", apply)

    async def _write_join(self, effect: effects.WriteJoin) -> None:
        request = effect.request

        def apply() -> None:
            self.content.joins[request.slot] = request

        if self.newcomer is None:
            raise OutcomeUnknown("there is no newcomer's session")
        await self._write(self.newcomer, "a join block", apply)

    async def _write_view(self, effect: effects.WriteView) -> None:
        registration = self._used()
        view = effect.view

        def apply() -> None:
            self.oracle.view_lands(view, registration.key)
            self.content.views[view.epoch % 2] = view

        await self._write(registration, f"view {view.epoch}", apply)

    async def _take(self, effect: effects.Take) -> Contest:
        return await self._contend(self._used().take(effect.old_key))

    async def _reserve(self, _effect: effects.Reserve) -> Contest:
        return await self._contend(self._used().reserve())

    async def _contend(self, contest: Awaitable[None]) -> Contest:
        try:
            await contest
        except reservations.TakeoverLost as lost:
            return outcomes.Lost(lost.holder_key)
        except reservations.NobodyHolds:
            return outcomes.NobodyHolds()
        return outcomes.Won()

    async def _fence(self, effect: effects.Fence) -> None:
        registration = self._used()
        present = [r for r in (self.newcomer, self.control, self.data) if r is not None]
        own = {r.key for r in present}
        own_ports = {r.device.port for r in present}  # logging in has closed what they had
        registered = (await registration.ask(registration.device.read_keys)).keys
        known = await self._read(registration, lambda: dict(self.content.ports))
        keys = dict.fromkeys(effect.keys)
        for key in (*registered, *known):
            if owner_of(key) in effect.nodes:
                keys[key] = None
        ports = {key: port for key, port in known.items() if port not in own_ports}
        victims = [
            Victim(key if key in registered else 0, ports.get(key))
            for key in keys
            if key not in own
        ]
        await reservations.fence(
            self.lun,
            registration,
            victims,
            stragglers=lambda: self._of_nodes(effect.stragglers, own),
        )
        for key in keys:
            if key not in own:
                self.oracle.fence_done(key)
                self.content.ports.pop(key, None)

    def _of_nodes(self, nodes: tuple[NodeId, ...], own: set[int]) -> list[Victim]:
        ports = self.content.ports
        return [
            Victim(key, ports[key]) for key in ports if owner_of(key) in nodes and key not in own
        ]

    async def _unregister(self, effect: effects.Unregister) -> None:
        """Good if no open path but that one is registered any more, and all it sent has ended."""
        going = [r for r in (self.data, self.control) if r is not None and r.key != effect.keep]
        if not going:
            raise OutcomeUnknown("there is no session")
        for registration in going:
            session = self.session_of(registration)
            session.on_lost = None
            while session.outstanding:  # a leaver drains
                await self.target.process.sleep(0.02)
            with suppress(PathClosed):
                await registration.unregister()
        for registration in going:
            self._close(registration)
            if registration is self.data:
                self.data = None
            else:
                self.control = None

    # -- commands --------------------------------------------------------------------------
    async def _read(self, registration: Registration, what: Callable[[], T]) -> T:
        session = self.session_of(registration)

        def command() -> Awaitable[T]:
            return cast("Awaitable[T]", session.ask(Op.READ, what))

        return await registration.ask(command)

    async def _write(
        self, registration: Registration, words: str, apply: Callable[[], None]
    ) -> None:
        session = self.session_of(registration)
        await registration.ask(lambda: session.ask(Op.WRITE, apply, words))

    async def read_data(self, registration: Registration, what: Callable[[], T]) -> T:
        """A big read, over the data path."""
        self.oracle.flows(registration.key, ready=self.ready)
        session = self.session_of(registration)

        def command() -> Awaitable[T]:
            return cast("Awaitable[T]", session.ask(Op.READ, what, big=True))

        return await registration.ask(command)

    async def write_data(
        self, registration: Registration, words: str, apply: Callable[[], None]
    ) -> None:
        """A write, over the data path."""
        self.oracle.flows(registration.key, ready=self.ready)
        await self._write(registration, words, apply)


def kill_sessions(paths: Paths, *, power_off: bool) -> None:
    """The process is dead: its kernel closes what it had, or nobody does."""
    for session in list(paths.target.link.sessions):
        if session.process is paths.target.process:
            session.orphan(power_off=power_off)


_HANDLERS: dict[type, Callable[..., Awaitable[outcomes.Value]]] = {
    effects.OpenNewcomer: Paths._open_newcomer,
    effects.DropNewcomer: Paths._drop_newcomer,
    effects.OpenPaths: Paths._open_paths,
    effects.Survey: Paths._survey,
    effects.ReadBlocks: Paths._read_blocks,
    effects.WriteHeartbeat: Paths._write_heartbeat,
    effects.WriteJoin: Paths._write_join,
    effects.WriteView: Paths._write_view,
    effects.Take: Paths._take,
    effects.Reserve: Paths._reserve,
    effects.Fence: Paths._fence,
    effects.Unregister: Paths._unregister,
}
