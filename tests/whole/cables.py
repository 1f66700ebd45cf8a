"""Each host's way to the LUN, and the eye on what lands there.

A command is on its way for a while, lands as `SimulatedLun` says, and its answer is on its way for
a while. All that a host notices, it notices in tasks of its own: a frozen host has answers in its
socket that were given before it was fenced, and does not know that its sessions are lost.

What lands is judged: nothing may land of an incarnation that a view has left out.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from random import Random
from typing import Final, Protocol, TypeVar

import trio

from redirector.block.device import (
    BlockDevice,
    Buffer,
    InitiatorPort,
    Lun,
    OutcomeUnknown,
    RegisteredKeys,
    Reservation,
    Unreachable,
)
from redirector.block.simulated import Command, SimulatedDevice, SimulatedLun

T = TypeVar("T")

PATIENCE_S: Final = 4.0
_TRIPS_S: Final = (0.0, 0.0001, 0.0001, 0.0005, 0.005)


class Initiator(Protocol):
    """The daemon that a session belongs to."""

    rng: Random
    gone: bool
    """Nothing of it happens any more."""

    @property
    def cable_cut(self) -> bool: ...

    def may_write(self) -> str:
        """Empty; or why nothing of it may land."""


class WatchedLun(SimulatedLun):
    """A shared disk that tells who writes although he must not."""

    def __init__(self, size_bytes: int, *, seed: int) -> None:
        super().__init__(size_bytes, seed=seed)
        self.owners: dict[int, Initiator] = {}
        """By nexus."""
        self.wrongs: list[str] = []

    def write_landed(self, command: Command, data: bytes | None) -> int:
        owner = self.owners.get(command.nexus)
        why = owner.may_write() if owner is not None else ""
        if why:
            words = f"{command.op} of {command.length_bytes} at {command.offset_bytes} lands: {why}"
            self.wrongs.append(words)
        return super().write_landed(command, data)


class CabledLun(Lun):
    """The LUN as one daemon sees it."""

    def __init__(self, lun: WatchedLun, owner: Initiator) -> None:
        self.url = lun.url
        self._lun = lun
        self._owner = owner

    async def login(self, port: InitiatorPort, *, timeout_s: float = 10.0) -> CabledDevice:
        """See `Lun.login`."""
        await self._reach(timeout_s)
        device = await self._lun.login(port, timeout_s=timeout_s)
        self._lun.owners[device.nexus] = self._owner
        await trio.sleep(self._owner.rng.choice(_TRIPS_S))
        return CabledDevice(device, self._owner)

    async def reset(self, *, timeout_s: float = 2.0) -> None:
        """See `Lun.reset`."""
        await self._reach(timeout_s)
        await self._lun.reset(timeout_s=timeout_s)

    async def _reach(self, timeout_s: float) -> None:
        await trio.sleep(self._owner.rng.choice(_TRIPS_S))
        if self._owner.cable_cut:
            await trio.sleep(timeout_s)
            raise Unreachable(f"{self.url}: no answer within {timeout_s} s")
        if self._owner.gone:
            raise Unreachable(f"{self.url}: this host is gone")


class CabledDevice(BlockDevice):
    """A session as one daemon sees it."""

    def __init__(self, device: SimulatedDevice, owner: Initiator) -> None:
        self._device = device
        self._owner = owner
        self._lost = False
        self._known = trio.Event()
        self._in_flight = 0
        self._idle = trio.Event()
        self.port = device.port
        self.identity = device.identity

    @property
    def lost(self) -> bool:
        return self._lost

    async def wait_lost(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._notice)
            await self._known.wait()
            nursery.cancel_scope.cancel()

    async def _notice(self) -> None:
        while True:
            await self._device.wait_lost()
            if not self._owner.cable_cut:
                self._note()
            await trio.sleep(0.5)  # nobody can tell it yet

    def _note(self) -> None:
        if not self._lost:
            self._lost = True
            self._known.set()
            if self.on_lost is not None:
                self.on_lost()

    def _unknown(self) -> OutcomeUnknown:
        return OutcomeUnknown(f"{self._device.lun.url}: the session was lost")

    async def _carry(self, command: Callable[[], Awaitable[T]]) -> T:
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._lost:
            raise self._unknown()
        self._in_flight += 1
        try:
            with trio.CancelScope(shield=True):
                await self._travel()
                try:
                    answer = await command()
                except OutcomeUnknown:
                    self._note()
                    raise
                await self._travel()
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()
        return answer

    async def _travel(self) -> None:
        await trio.sleep(self._owner.rng.choice(_TRIPS_S))
        if self._owner.cable_cut:
            with trio.move_on_after(PATIENCE_S):
                await self._known.wait()
            self._note()  # the target knows nothing of that
        if self._lost or self._owner.gone:
            raise self._unknown()

    # -- commands --------------------------------------------------------------------------------
    async def read_into(self, offset_bytes: int, buffer: bytearray | memoryview) -> None:
        await self._carry(lambda: self._device.read_into(offset_bytes, buffer))

    async def write(self, offset_bytes: int, data: Buffer, *, fua: bool = False) -> None:
        await self._carry(lambda: self._device.write(offset_bytes, data, fua=fua))

    async def flush(self) -> None:
        await self._carry(self._device.flush)

    async def unmap(self, ranges: Sequence[tuple[int, int]]) -> None:
        await self._carry(lambda: self._device.unmap(ranges))

    async def read_keys(self) -> RegisteredKeys:
        return await self._carry(self._device.read_keys)

    async def read_reservation(self) -> Reservation:
        return await self._carry(self._device.read_reservation)

    async def register(self, key: int, *, old_key: int = 0) -> None:
        await self._carry(lambda: self._device.register(key, old_key=old_key))

    async def reserve(self, key: int) -> None:
        await self._carry(lambda: self._device.reserve(key))

    async def release(self, key: int) -> None:
        await self._carry(lambda: self._device.release(key))

    async def preempt(self, key: int, victim_key: int, *, abort: bool = False) -> None:
        await self._carry(lambda: self._device.preempt(key, victim_key, abort=abort))

    async def test_unit_ready(self) -> None:
        await self._carry(self._device.test_unit_ready)

    # -- end -------------------------------------------------------------------------------------
    async def aclose(self) -> None:
        while self._in_flight:
            self._idle = trio.Event()
            with trio.CancelScope(shield=True):
                await self._idle.wait()
        self.abort()
        await trio.lowlevel.checkpoint()

    def abort(self) -> None:
        if not self._owner.cable_cut:
            self._device.lun.close_session(self._device)
        self._note()
