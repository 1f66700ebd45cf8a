"""Persistent reservations as csvfs uses them: one key a path, and fences that hold.

Theory. The target is the arbiter (DESIGN.md section 3). Everything here rests on four facts:

- under a type 6 reservation who is not registered neither reads nor writes;
- PREEMPT of a key works once: of two that name the same key one conflicts. Preempting the
  *holder's* key (`Registration.take`) is therefore an atomic compare-and-swap, provided that
  READ RESERVATION is asked afterwards, because a PREEMPT of a non-holder answers GOOD as well;
- PREEMPT does not wait for commands that were admitted earlier, LOGICAL UNIT RESET does; and that
  hangs on a host that does not read, until its session is closed by reinstatement;
- an answer "no" (unit attention, conflict, busy) means that nothing was done.

So the *fence of a path* is: reinstatement, PREEMPT, reset (`fence`). A PERSISTENT RESERVE OUT
whose outcome is unknown is never sent again: `OutcomeUnknown` leaves every function here, and
its caller asks, on a new session, what is registered (`survey`).

What answers mean (`attention_means`, `keys_verdict`):

    2A03, 2A05                  the registration is gone: the path is closed
    2900                        ask READ KEYS: closed if the own key is missing, or if PRGENERATION
                                went back (the target restarted); else go on
    conflict                    ask READ KEYS: closed if the own key is missing; else it is real
    any other unit attention    go on

A closed path decides nothing about membership: the view alone evicts.

Concurrency: no tasks; one `Registration` may be used by several tasks.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import TypeVar

import trio

from redirector.block.arbiter import (
    UA_REGISTRATIONS_PREEMPTED,
    UA_RESERVATIONS_PREEMPTED,
    UA_RESET,
)
from redirector.block.device import (
    BlockDevice,
    BlockError,
    InitiatorPort,
    LoginFailed,
    LostAfterLogin,
    Lun,
    RegisteredKeys,
    Reservation,
    ReservationConflict,
    ReservationType,
    TargetBusy,
    UnitAttention,
    Unreachable,
)
from redirector.block.keys import PathKey, key_words

log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

RESET_TIMEOUT_S = 2.0
"""A reset without answer for so long is issued again (of two at a time one is never answered)."""
_RESETS = 15
_REINSTATEMENTS = 5
_PORTAL_LIMIT_S = 2.0
"""For a login through the portal of the one whose session is to be closed."""
_ATTENTIONS = 32
_BUSY_PAUSES_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


class PathClosed(BlockError):
    """This nexus is not registered any more. Only a new one, with a new key, may go on."""


class TargetRestarted(PathClosed):
    """The target forgot its registrations; with them, perhaps, writes that were not flushed."""


class TakeoverLost(BlockError):
    """Somebody else holds the reservation."""

    def __init__(self, holder_key: int) -> None:
        super().__init__(f"the reservation is held by {key_words(holder_key)}")
        self.holder_key = holder_key


class NobodyHolds(BlockError):
    """There is no reservation to take over: RESERVE decides."""


class KeyInUse(BlockError):
    """The key to be registered is registered already: it was not unique."""


class FenceFailed(BlockError):
    """The target does not do its part of a fence: whatever the victim sent may still land."""


# -- decisions, without I/O -----------------------------------------------------------------------
class AttentionMeans(Enum):
    """What to do about a unit attention."""

    CLOSED = "closed"
    ASK_KEYS = "ask keys"
    GO_ON = "go on"


def attention_means(asc_ascq: int) -> AttentionMeans:
    """See the table in the module's docstring."""
    if asc_ascq in (UA_RESERVATIONS_PREEMPTED, UA_REGISTRATIONS_PREEMPTED):
        return AttentionMeans.CLOSED
    # 29xx: power on, reset, bus device reset and their kin (SPC-4 annex F).
    return AttentionMeans.ASK_KEYS if asc_ascq >> 8 == UA_RESET >> 8 else AttentionMeans.GO_ON


def keys_verdict(own_key: int, seen_generation: int, answer: RegisteredKeys) -> PathClosed | None:
    """Whether a nexus that saw PRGENERATION ``seen_generation`` is still registered."""
    if answer.generation < seen_generation:
        return TargetRestarted(
            f"the target forgot its registrations (PRGENERATION went from {seen_generation} "
            f"back to {answer.generation})"
        )
    if own_key not in answer.keys:
        return PathClosed(f"the key {key_words(own_key)} is not registered any more")
    return None


@dataclass(frozen=True, slots=True)
class Standing:
    """READ KEYS and READ RESERVATION of one moment."""

    keys: RegisteredKeys
    reservation: Reservation

    @property
    def holder_key(self) -> int:
        """0: nobody holds."""
        return self.reservation.key

    def of_incarnation(self, slot: int, incarnation: int) -> tuple[int, ...]:
        """Every registered key of that life of that slot, each once, by generation."""
        paths = (PathKey.parse(key) for key in set(self.keys.keys))
        return tuple(p.pack() for p in sorted(p for p in paths if p) if p.is_of(slot, incarnation))

    def strange_reservation(self) -> str:
        """Words about a reservation that csvfs does not make; empty if there is none."""
        kind = self.reservation.type
        if kind in (ReservationType.NONE, ReservationType.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY):
            return ""
        return f"a reservation of type {int(kind)} by {key_words(self.holder_key)}"


# -- one nexus ------------------------------------------------------------------------------------
def _pauses() -> Iterator[float]:
    yield from _BUSY_PAUSES_S
    while True:
        yield _BUSY_PAUSES_S[-1]


async def patiently(ask: Callable[[], Awaitable[_Answer]]) -> _Answer:
    """Ask something of a nexus that need not be registered, past unit attentions and a busy target
    (neither of which did anything).
    """
    pauses = _pauses()
    for _ in range(_ATTENTIONS):
        try:
            return await ask()
        except UnitAttention:
            continue
        except TargetBusy:
            await trio.sleep(next(pauses))
    return await ask()


async def survey(device: BlockDevice) -> Standing:
    """Who is registered, who holds. Works unregistered; PRGENERATION is the same in both halves."""
    for _ in range(_ATTENTIONS):
        keys = await patiently(device.read_keys)
        reservation = await patiently(device.read_reservation)
        if keys.generation == reservation.generation:
            return Standing(keys, reservation)
    raise BlockError("the registrations change too fast to be read")


class Registration:
    """A nexus and the key that it registered; made by `register`."""

    def __init__(self, device: BlockDevice, key: int, generation: int) -> None:
        self.device = device
        self.key = key
        self._seen_generation = generation

    @classmethod
    async def register(
        cls, device: BlockDevice, key: int, *, former_keys: Sequence[int] = ()
    ) -> Registration:
        """REGISTER a key that nobody has ever registered, on a fresh nexus.

        ``former_keys`` are those that the same initiator port may have registered before: where
        the target keeps a registration for the port, not the session (SPC-4 5.12.1), the new key
        takes the place of the old one. Raises `KeyInUse` and what the device raises; after
        `OutcomeUnknown` the key is burnt.
        """
        if key in (await patiently(device.read_keys)).keys:
            raise KeyInUse(f"the key {key_words(key)} is registered already")
        await cls._send_register(device, key, former_keys)
        answer = await patiently(device.read_keys)
        if answer.keys.count(key) > 1:
            await patiently(lambda: device.register(0, old_key=key))
            raise KeyInUse(f"the key {key_words(key)} was registered by two at a time")
        verdict = keys_verdict(key, 0, answer)
        if verdict is not None:
            raise verdict
        return cls(device, key, answer.generation)

    @staticmethod
    async def _send_register(device: BlockDevice, key: int, former_keys: Sequence[int]) -> None:
        for old_key in (0, *former_keys):
            try:
                return await patiently(partial(device.register, key, old_key=old_key))
            except ReservationConflict as error:
                conflict = error
        raise conflict

    async def unregister(self) -> None:
        """Give the key up. Never for the holder's key: its successor preempts it."""
        await self.ask(lambda: self.device.register(0, old_key=self.key))

    async def confirm(self) -> None:
        """READ KEYS on this very nexus. Raises `PathClosed` if it is not registered any more."""
        self._expect_in(await patiently(self.device.read_keys))

    async def survey(self) -> Standing:
        """Who is registered, who holds. Raises `PathClosed` if this nexus is not registered."""
        standing = await survey(self.device)
        self._expect_in(standing.keys)
        return standing

    def _expect_in(self, answer: RegisteredKeys) -> None:
        verdict = keys_verdict(self.key, self._seen_generation, answer)
        if verdict is not None:
            raise verdict
        self._seen_generation = answer.generation

    async def ask(self, command: Callable[[], Awaitable[_Answer]]) -> _Answer:
        """Send a command of this nexus and read "no" as the module's table says.

        Only what was certainly not done is sent again. Raises `PathClosed`, `OutcomeUnknown`, and
        the target's other refusals; `ReservationConflict` only while the own key is registered.
        """
        pauses = _pauses()
        for _ in range(_ATTENTIONS):
            try:
                return await command()
            except UnitAttention as attention:
                await self.heed(attention)
            except ReservationConflict:
                await self.confirm()
                raise
            except TargetBusy:
                await trio.sleep(next(pauses))
        return await command()

    async def heed(self, attention: UnitAttention) -> None:
        """Do what a unit attention asks for. Raises `PathClosed`; else the command may go again."""
        means = attention_means(attention.asc_ascq)
        if means is AttentionMeans.CLOSED:
            raise PathClosed(f"{attention}; the key was {key_words(self.key)}") from attention
        if means is AttentionMeans.ASK_KEYS:
            await self.confirm()

    # -- the reservation -----------------------------------------------------------------------
    async def holder(self) -> int:
        """The holder's key as this nexus sees it; 0: nobody holds."""
        return (await self.ask(self.device.read_reservation)).key

    async def take(self, victim_key: int) -> None:
        """Succession: PREEMPT the holder's key, and make sure that it was the holder's.

        Raises `TakeoverLost` when somebody else holds now, `NobodyHolds` when nobody does.
        """
        try:
            await self.ask(lambda: self.device.preempt(self.key, victim_key))
        except ReservationConflict:
            log.info("%s was preempted by somebody else", key_words(victim_key))
        await self._expect_to_hold()

    async def reserve(self) -> None:
        """RESERVE where nobody holds. Raises `TakeoverLost` when somebody was faster."""
        try:
            await self.ask(lambda: self.device.reserve(self.key))
        except ReservationConflict:
            log.info("somebody else reserved before %s", key_words(self.key))
        await self._expect_to_hold()

    async def _expect_to_hold(self) -> None:
        holder_key = await self.holder()
        if not holder_key:
            raise NobodyHolds("nobody holds the reservation")
        if holder_key != self.key:
            raise TakeoverLost(holder_key)

    async def preempt(self, victim_key: int, *, abort: bool = False) -> None:
        """Fencing: remove a key that does not hold. Gone already is as good as done.

        Raises `FenceFailed` when the target refuses although the victim is registered.
        """
        if victim_key == self.key:
            raise ValueError("a path does not fence itself")
        try:
            await self.ask(lambda: self.device.preempt(self.key, victim_key, abort=abort))
        except ReservationConflict as conflict:
            if victim_key in (await self.ask(self.device.read_keys)).keys:
                words = key_words(victim_key)
                raise FenceFailed(f"the target does not preempt the key {words}") from conflict


# -- the fence of a path --------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Victim:
    """A path to be fenced, as far as it is known."""

    key: int = 0
    """0: not registered, or not known."""
    port: InitiatorPort | None = None
    """The initiator port of its session; None: not known."""
    portal: str = ""
    """Through which its session was made; empty: not known, or there is none."""


def victims_of(keys: Iterable[int], ports: Iterable[InitiatorPort]) -> tuple[Victim, ...]:
    """Everything of a dead incarnation: the keys it has registered, the ports it recorded."""
    return (*(Victim(key=key) for key in keys), *(Victim(port=port) for port in ports))


Stragglers = Callable[[], Iterable[Victim]]
"""Who else may be keeping a reset from being answered."""


async def fence(
    lun: Lun,
    holder: Registration,
    victims: Sequence[Victim],
    *,
    abort: bool = False,
    stragglers: Stragglers = tuple,
) -> None:
    """Make the target refuse, and have drained, all that came or may come over these paths.

    ``holder`` holds the reservation, and must be on the reserving nexus. With ``abort`` PREEMPT AND
    ABORT is used (where the target knows it). When this returns, nothing of the victims is on its
    way, and the holder is known to be registered still.

    Raises `TakeoverLost`, `NobodyHolds` (only the holder fences), `PathClosed`, `FenceFailed`, and
    `OutcomeUnknown`; after any of them the whole fence is to be done again.
    """
    await holder._expect_to_hold()
    await _disarm(lun, holder, victims, abort=abort)
    await drain(lun, holder, stragglers=stragglers)


async def _disarm(
    lun: Lun, holder: Registration, victims: Iterable[Victim], *, abort: bool = False
) -> None:
    victims = tuple(victims)
    for victim in dict.fromkeys(replace(victim, key=0) for victim in victims):
        if victim.port is None:
            continue
        if victim.port == holder.device.port:
            raise ValueError("the holder does not reinstate its own session")
        await reinstate(lun, victim.port, victim.portal)
    for key in dict.fromkeys(victim.key for victim in victims if victim.key):
        await holder.preempt(key, abort=abort)


async def reinstate(lun: Lun, port: InitiatorPort, portal: str = "") -> None:
    """Close whatever session ``port`` has (RFC 7143 6.3.5). Raises `FenceFailed`.

    ``portal``: through which it was made. Where that portal is not to be reached from here, any
    other is used: it closes the session too, if it belongs to the same portal group; and if not,
    it is the reset that tells whether anything is still on its way.
    """
    pauses = _pauses()
    failure: LoginFailed | None = None
    there = lun.through(portal) if portal else lun
    for _ in range(_REINSTATEMENTS):
        try:
            if there is not lun:
                try:
                    device = await there.login(port, timeout_s=_PORTAL_LIMIT_S)
                except Unreachable:
                    there = lun
                    continue
            else:
                device = await lun.login(port)
        except LostAfterLogin:
            return  # its owner lives, and logs in again: whoever is first, the old one is closed
        except LoginFailed as error:
            failure = error
            await trio.sleep(next(pauses))
            continue
        await device.aclose()
        return
    raise FenceFailed(
        f"the session of {port.name} (ISID {port.isid:012x}) cannot be closed: {failure}"
    ) from failure


async def drain(
    lun: Lun, holder: Registration, *, stragglers: Stragglers = tuple, resets: int = _RESETS
) -> None:
    """LOGICAL UNIT RESET until one is answered. Raises `FenceFailed`, `PathClosed`."""
    pauses = _pauses()
    failure: Exception | None = None
    for _ in range(resets):
        try:
            await lun.reset(timeout_s=RESET_TIMEOUT_S)
            # Fetches the unit attention of that reset, and proves that it was no restart.
            await holder.confirm()
            return
        except TimeoutError as error:
            failure = error
            log.warning("the target did not answer a reset in %s s; again", RESET_TIMEOUT_S)
            await _disarm(lun, holder, stragglers())
        except LoginFailed as error:
            failure = error
            await trio.sleep(next(pauses))
    raise FenceFailed(f"the target answered none of {resets} resets: {failure}") from failure
