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

from csvfs.format import BadBlock, NoView, Superblock, View
from csvfs.membership.decision import Observation
from csvfs.membership.fixed_area import (
    NoVolume,
    SuperblocksDestroyed,
    read_slot_blocks,
    read_superblock,
    read_view,
    read_view_copies,
)
from csvfs.membership.superblock_rebuild import derive_superblock
from csvfs.membership.view_rebuild import (
    Rebuild,
    Traces,
    ViewsDestroyed,
    belongs_to_another,
    read_traces,
    rebuilt_view,
)
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
    superblock_rebuilt: str = ""
    """Not empty: both copies are destroyed; this one stands nowhere, and was made in this way."""

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


async def open_newcomer(
    lun: Lun, initiator_name: str, rng: Random, *, derive: bool = False
) -> Newcomer:
    """Log in, register under a random key of slot 255, and read the superblock.

    With ``derive`` one whose copies are both destroyed is derived from the rest of the volume.
    Raises `LoginFailed`, `ForeignReservation`, `NoVolume`, `BlockError`.
    """
    device = await lun.login(choose_port(initiator_name, rng))
    try:
        await _look_before(device, derive=derive)
        registration = await Registration.register(device, newcomer_key(rng))
        try:
            return await _read_superblock(registration, derive=derive)
        except NoVolume:
            await registration.unregister()
            raise
    except BaseException:
        device.abort()
        raise


async def _read_superblock(registration: Registration, *, derive: bool) -> Newcomer:
    device = registration.device
    try:
        superblock, trouble = await registration.ask(lambda: read_superblock(device))
    except SuperblocksDestroyed as error:
        if not derive:
            raise
        damage = str(error)
        derived = await registration.ask(lambda: derive_superblock(device, damage))
        return Newcomer(registration, derived.superblock, None, derived.words)
    return Newcomer(registration, superblock, trouble)


async def _look_before(device: BlockDevice, *, derive: bool) -> Standing:
    """Refuse what can be refused without a registration."""
    standing = await survey(device)
    if not standing.holder_key:
        try:
            await patiently(lambda: read_superblock(device))
        except ReservationConflict:
            standing = await survey(device)
        except SuperblocksDestroyed:
            if not derive:
                raise
    if standing.strange_reservation() or (standing.holder_key and is_foreign(standing.holder_key)):
        raise ForeignReservation(standing.reservation)
    return standing


async def observe(newcomer: Newcomer, rebuild: Rebuild | None = None) -> Observation:
    """Read all that a decision needs; with ``rebuild`` a destroyed view is made anew, in memory.

    Raises `ViewsDestroyed`, or what reading raises.
    """
    device, superblock = newcomer.device, newcomer.superblock

    async def read() -> Observation:
        reservation = await device.read_reservation()
        keys = (await device.read_keys()).keys
        trouble = ""
        if superblock.resignature_under_way:  # `decision.refuse` refuses it, whatever the view
            nobody = View.empty(superblock.geometry.slots)
            return Observation(superblock, device.identity, nobody, reservation, keys, {})
        try:
            view = await read_view(device, superblock.volume_id)
            blocks = await read_slot_blocks(device, superblock)
        except NoView as error:
            trouble = f"{error}"
            traces = await _traces(device, superblock, trouble, rebuild)
            assert rebuild is not None
            view, blocks = rebuilt_view(traces, keys, rebuild), dict(traces.blocks)
        return Observation(superblock, device.identity, view, reservation, keys, blocks, trouble)

    return await newcomer.registration.ask(read)


async def _traces(
    device: BlockDevice, superblock: Superblock, trouble: str, rebuild: Rebuild | None
) -> Traces:
    """What a view can be made of. Raises `ViewsDestroyed` where it may, or can, not be made."""
    stranger = belongs_to_another(await read_view_copies(device), superblock.volume_id)
    if stranger:
        raise ViewsDestroyed(
            f"the superblock is of volume {superblock.volume_id.hex()}, but {stranger}: parts of"
            " two volumes lie on this LUN. Restore it from a snapshot or backup of the array",
            rebuildable=False,
        )
    if rebuild is None:
        raise ViewsDestroyed(
            f"both copies of the view, which says who is a member, are destroyed ({trouble});"
            " `csvctl check --repair` rebuilds it",
            rebuildable=True,
        )
    return await read_traces(device, superblock)
