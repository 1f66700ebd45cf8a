"""The first session with a LUN of somebody who is no member: registered, so that it may read.

A newcomer's key has slot 255 and a random rest (DESIGN "Joining"). It reads; unless it comes to
hold the reservation (`csvfs.membership.claim`) it writes nothing. On a LUN that somebody else than
csvfs has reserved it does not even register, and on one that carries no csvfs volume it registers
only if it could not look otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from types import TracebackType
from typing import Final, Self

import trio

from csvfs.format import BadBlock, Superblock
from csvfs.membership.decision import Observation
from csvfs.membership.fixed_area import NoVolume, read_slot_blocks, read_superblock, read_view
from redirector.block.device import (
    BlockDevice,
    BlockError,
    Lun,
    Reservation,
    ReservationConflict,
)
from redirector.block.keys import choose_port, is_foreign, key_words, newcomer_key
from redirector.block.reservations import Registration, Standing, patiently, survey

_LOGOUT_LIMIT_S: Final = 5.0


class ForeignReservation(Exception):
    """Another system than csvfs has reserved the LUN."""

    def __init__(self, reservation: Reservation) -> None:
        super().__init__(
            f"the LUN is reserved (type {int(reservation.type)}) by key"
            f" {key_words(reservation.key)}: another system uses it. Find it and stop it there"
        )
        self.reservation = reservation


@dataclass(slots=True)
class Newcomer:
    """A registered session of slot 255. Made by `open_newcomer`; an async context manager."""

    registration: Registration
    superblock: Superblock
    superblock_trouble: BadBlock | None
    """What is wrong with the superblock, if its backup had to be used."""

    @property
    def device(self) -> BlockDevice:
        return self.registration.device

    @property
    def key(self) -> int:
        return self.registration.key

    async def aclose(self) -> None:
        """Unregister and log out; a key that holds the reservation stays, parked."""
        try:
            if await self.registration.holder() != self.key:
                await self.registration.unregister()
        except BlockError:
            pass  # lost, or fenced by whoever took the volume; a dead key is fenced by the next
        await self.device.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with trio.CancelScope(shield=True), trio.move_on_after(_LOGOUT_LIMIT_S) as limit:
            await self.aclose()
        if limit.cancelled_caught:
            self.device.abort()


async def open_newcomer(lun: Lun, initiator_name: str, rng: Random) -> Newcomer:
    """Log in, register under a random key of slot 255, and read the superblock.

    Raises `LoginFailed`, `ForeignReservation`, `NoVolume`, `BlockError`.
    """
    device = await lun.login(choose_port(initiator_name, rng))
    try:
        await _look_before(device)
        registration = await Registration.register(device, newcomer_key(rng))
        try:
            superblock, trouble = await registration.ask(lambda: read_superblock(device))
        except NoVolume:
            await registration.unregister()
            raise
    except BaseException:
        device.abort()
        raise
    return Newcomer(registration, superblock, trouble)


async def _look_before(device: BlockDevice) -> Standing:
    """Refuse what can be refused without a registration."""
    standing = await survey(device)
    if not standing.holder_key:
        try:
            await patiently(lambda: read_superblock(device))
        except ReservationConflict:
            standing = await survey(device)
    if standing.strange_reservation() or (standing.holder_key and is_foreign(standing.holder_key)):
        raise ForeignReservation(standing.reservation)
    return standing


async def observe(newcomer: Newcomer) -> Observation:
    """Read all that a decision needs. Raises `NoView`, or what reading raises."""
    device, superblock = newcomer.device, newcomer.superblock

    async def read() -> Observation:
        reservation = await device.read_reservation()
        keys = await device.read_keys()
        view = await read_view(device, superblock.volume_id)
        blocks = await read_slot_blocks(device, superblock)
        return Observation(superblock, device.identity, view, reservation, keys.keys, blocks)

    return await newcomer.registration.ask(read)
