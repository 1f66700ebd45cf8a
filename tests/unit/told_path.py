"""A data path, and a membership that tests play: it opens, fences, proves and tells, by a script or
by itself (`Membership.serve`).

Two hosts: the coordinator, which holds the reservation and fences, and the one whose path it is.
`ToldLun` looks at every command of that host: data goes only where the path was told to be ready.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Callable

import trio

from redirector.block.arbiter import DATA_OPS
from redirector.block.device import (
    BlockDevice,
    BlockError,
    InitiatorPort,
    Lun,
    ReservationConflict,
)
from redirector.block.keys import PathKey
from redirector.block.reservations import Registration, Victim, fence, patiently
from redirector.block.simulated import Command, SimulatedDevice, SimulatedLun
from redirector.block.simulated_faults import Injection
from redirector.data_path import DataPath
from redirector.flow import expect_same_lun

BLOCK = 4096
NAME = "iqn.2026-11.test:host"
SLOT, INCARNATION = 3, 9


def port(number: int) -> InitiatorPort:
    return InitiatorPort(f"{NAME}{number}", 0x8000_0000_0000 + number)


COORDINATOR_PORT, DATA_PORT = port(1), port(2)


def nexus_of(device: BlockDevice) -> int:
    assert isinstance(device, SimulatedDevice)
    return device.nexus


class ToldLun(SimulatedLun):
    """Asserts that no data command comes on a session before it was ready, or after another was."""

    ready_nexus = 0
    opening_nexus = 0
    """On which the membership reads the view."""
    evicted = False

    def arrive(self, command: Command) -> Injection | None:
        if command.port == DATA_PORT and command.op in DATA_OPS:
            opens = command.nexus == self.opening_nexus
            assert opens or command.nexus == self.ready_nexus, "data without a proof"
            assert opens or not self.evicted, "data after the eviction"
        return super().arrive(command)

    def check_proof(self, registration: Registration) -> None:
        """The proof is about to be told: nothing of an earlier session may be on its way."""
        self.ready_nexus = nexus_of(registration.device)
        late = [c for c in self.parked if c.port == DATA_PORT and c.nexus != self.ready_nexus]
        assert not late, "a command of an earlier session may still land"


class Coordinator:
    """The other host: it holds, and fences when it is asked to."""

    def __init__(self, lun: Lun) -> None:
        self.lun = lun
        self._key = PathKey(1, 1, 1)
        self.held: Registration | None = None
        self._keys: list[int] = []
        """The latest first."""

    async def holder(self) -> Registration:
        """Its reserving session, a new one if the last is lost."""
        if self.held is None or self.held.device.lost:
            device = await self.lun.login(COORDINATOR_PORT)
            self._key = self._key.next()
            former = tuple(self._keys)
            self._keys.insert(0, self._key.pack())
            held = await Registration.register(device, self._key.pack(), former_keys=former)
            holder_key = await held.holder()
            if not holder_key:
                await held.reserve()
            elif holder_key != held.key:
                await held.take(holder_key)
            self.held = held
        return self.held

    async def fence(self, keys: tuple[int, ...]) -> None:
        while True:
            try:
                return await fence(self.lun, await self.holder(), [Victim(key) for key in keys])
            except BlockError:
                if self.held is not None:
                    self.held.device.abort()
                await trio.sleep(0.1)


class Membership:
    """Opens data sessions, has lost ones fenced, and tells the path."""

    path: DataPath

    def __init__(self, lun: Lun) -> None:
        self.lun = lun
        self.coordinator = Coordinator(lun)
        self.generation = PathKey(SLOT, INCARNATION, 1)
        self.unproven: list[int] = []
        """Keys of lost sessions that are not fenced yet."""
        self.registered: set[int] = set()
        """Keys that were registered once, and not fenced since."""
        self.session: Registration | None = None
        self.closed: list[str] = []
        """What the path has found itself."""
        self.strangers = 0
        self.proofs = 0
        self.pause: Callable[[], float] = lambda: 0.0
        """How long each step takes."""
        self._wake = trio.Event()

    # -- what the path calls -------------------------------------------------------------------
    def on_closed(self, registration: Registration, why: BlockError) -> None:
        self.closed.append(str(why))
        self.drop(registration, str(why))

    def on_stranger(self) -> None:
        self.strangers += 1
        self._wake.set()

    # -- steps ---------------------------------------------------------------------------------
    async def open(self) -> tuple[Registration, bool]:
        """A registered session on which the view was read; whether the target has restarted."""
        device = await self.lun.login(DATA_PORT)
        missing = self.registered - set((await patiently(device.read_keys)).keys)
        former = tuple(reversed(self.unproven))
        self.generation = self.generation.next()
        key = self.generation.pack()
        self.unproven.append(key)
        registration = await Registration.register(device, key, former_keys=former)
        if isinstance(self.lun, ToldLun):
            self.lun.opening_nexus = nexus_of(device)
        await registration.ask(lambda: device.read(0, BLOCK))
        if isinstance(self.lun, ToldLun):
            self.lun.opening_nexus = 0
        self.registered.add(key)
        return registration, bool(missing)

    def use(self, registration: Registration, *, restarted: bool = False) -> None:
        self.unproven.remove(registration.key)
        self.session = registration
        self.path.use(registration, restarted=restarted)

    def drop(self, registration: Registration, why: str) -> None:
        """That session is lost."""
        registration.device.abort()
        if self.session is registration:
            self.session = None
            self.unproven.append(registration.key)
            self.path.lost(registration, why)
            self._wake.set()

    async def prove(self) -> None:
        """Have every lost session fenced."""
        keys = tuple(self.unproven)
        await self.coordinator.fence(keys)
        self.unproven = [key for key in self.unproven if key not in keys]
        self.registered.difference_update(keys)
        self.proofs += 1

    def ready(self, registration: Registration) -> None:
        if isinstance(self.lun, ToldLun) and registration is self.session:
            self.lun.check_proof(registration)
        self.path.ready(registration)

    # -- by itself -----------------------------------------------------------------------------
    async def serve(self) -> None:
        """Whatever is lost is opened, proven and ready again. What is told late is told, too."""
        late: Registration | None = None
        async with trio.open_nursery() as nursery:
            while True:
                await self._wake.wait()
                try:
                    if self.session is None:
                        registration, restarted = await self.open()
                        await trio.sleep(self.pause())
                        expect_same_lun(self.path.identity, registration.device.identity)
                        self.use(registration, restarted=restarted)
                        nursery.start_soon(self._watch, registration)
                        if late is not None:
                            self.ready(late)
                            self.path.lost(late, "told late")
                    late = await self._make_ready()
                except BlockError as error:
                    self._wake.set()
                    await trio.sleep(0.1 + self.pause())
                    if isinstance(error, ReservationConflict):
                        await self.coordinator.fence(())

    async def _make_ready(self) -> Registration | None:
        """Prove until nothing is unproven; the session that is, or would have been, ready."""
        self._wake = trio.Event()
        registration = self.session
        if registration is None:
            self._wake.set()
            return None
        await self.prove()
        await trio.sleep(self.pause())
        if registration is self.session and not self.unproven:
            self.ready(registration)
        else:
            self._wake.set()
        return registration

    async def _watch(self, registration: Registration) -> None:
        await registration.device.wait_lost()
        self.drop(registration, "the connection was closed")


@contextlib.asynccontextmanager
async def told_path(
    lun: Lun, *, serve: bool = True, lease_s: float = math.inf
) -> AsyncIterator[tuple[DataPath, Membership]]:
    """A running path whose first session is ready; its session is dropped at the end."""
    told = Membership(lun)
    await told.coordinator.holder()
    first, _ = await told.open()
    told.path = path = DataPath(
        first.device.identity,
        on_closed=told.on_closed,
        on_stranger=told.on_stranger,
        clock=trio.current_time,
    )
    path.lease_until(trio.current_time() + lease_s)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(path.run)
        told.use(first)
        await told.prove()
        told.ready(first)
        if serve:
            nursery.start_soon(told._watch, first)
            nursery.start_soon(told.serve)
        yield path, told
        nursery.cancel_scope.cancel()
    for registration in (told.session, told.coordinator.held):
        if registration is not None:
            registration.device.abort()
